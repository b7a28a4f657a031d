//! Which zones of the kernel's powercap tree make up a machine, each counted once.
//!
//! Owns the choice. Takes the tree's root, returns the zones to add up and, in words, those left out:
//!
//! | zone | is | so |
//! |---|---|---|
//! | `package-N`, `package-N-die-M` | a processor (Intel, AMD), or a die of one | added |
//! | `dram` under it | memory beside the processor | added |
//! | `core`, `uncore` under it | a part of the package (AMD names one core's counter `core`) | left out |
//! | `psys` | the platform: packages, memory and more | left out; alone where no package is listed |
//! | `intel-rapl-mmio:N` | the package of that name again, by another way | left out; used where that package is listed there alone |
//!
//! Knows nothing of energy: it reads names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The ways to a counter, the trusted one first.
const WAYS: [&str; 2] = ["intel-rapl:", "intel-rapl-mmio:"];

/// A zone to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Zone {
    /// "package-0", "dram of package-0".
    pub label: String,
    /// Where its files are.
    pub dir: PathBuf,
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Zones {
    /// Added up.
    pub counted: Vec<Zone>,
    /// In words, with the reason.
    pub left_out: Vec<String>,
}

/// A zone as listed: the way to it, its own number, its parent's, its name.
#[derive(Debug)]
struct Listed {
    way: usize,
    parent: Option<String>,
    name: String,
    dir: PathBuf,
}

/// Reads the tree. Zones stand in it once or twice (flat, and nested in their parent): a directory's name is what tells them.
pub(super) fn find(root: &Path) -> std::io::Result<Zones> {
    let mut listed = BTreeMap::new();
    for (entry, dir) in rapl_dirs(root)? {
        let nested = rapl_dirs(&dir).unwrap_or_default();
        for (entry, dir) in std::iter::once((entry, dir)).chain(nested) {
            let Ok(name) = std::fs::read_to_string(dir.join("name")) else {
                continue;
            };
            let Some(way) = WAYS.iter().position(|way| entry.starts_with(way)) else {
                continue;
            };
            let numbers = &entry[WAYS[way].len()..];
            let parent = numbers
                .rsplit_once(':')
                .map(|(parent, _)| format!("{}{parent}", WAYS[way]));
            listed.entry(entry).or_insert(Listed {
                way,
                parent,
                name: name.trim().to_string(),
                dir,
            });
        }
    }
    Ok(choose(&listed))
}

fn choose(listed: &BTreeMap<String, Listed>) -> Zones {
    let mut zones = Zones::default();
    let mut taken: BTreeMap<String, PathBuf> = BTreeMap::new();
    let packages = listed.values().any(is_package);
    for (way, prefix) in WAYS.iter().enumerate() {
        for zone in listed.values().filter(|zone| zone.way == way) {
            let parent = zone
                .parent
                .as_ref()
                .and_then(|parent| listed.get(parent))
                .map(|parent| parent.name.as_str());
            let label = parent.map_or(zone.name.clone(), |parent| {
                format!("{} of {parent}", zone.name)
            });
            let reason = match (zone.name.as_str(), parent) {
                _ if is_package(zone) => None,
                ("dram", Some(_)) => None,
                ("psys", None) if !packages => None,
                ("psys", _) => Some("it holds the packages, which are counted"),
                ("core" | "uncore", _) => Some("it lies inside its package"),
                _ => Some("what it covers is not known"),
            };
            let twice = taken.contains_key(&label);
            match reason.or(twice.then_some("the same counter by another way")) {
                Some(reason) => zones.left_out.push(format!(
                    "{label} ({}): {reason}",
                    prefix.trim_end_matches(':')
                )),
                None => drop(taken.insert(label, zone.dir.clone())),
            }
        }
    }
    zones.counted = taken
        .into_iter()
        .map(|(label, dir)| Zone { label, dir })
        .collect();
    // A package, then its memory.
    zones.counted.sort_by_key(|zone| {
        zone.label
            .rsplit(' ')
            .next()
            .map(|package| (package.to_string(), zone.label.len()))
    });
    zones
}

fn is_package(zone: &Listed) -> bool {
    zone.parent.is_none() && zone.name.starts_with("package")
}

/// Entries called `intel-rapl:...` or `intel-rapl-mmio:...`, by name.
fn rapl_dirs(dir: &Path) -> std::io::Result<BTreeMap<String, PathBuf>> {
    let entries = std::fs::read_dir(dir)?.filter_map(Result::ok);
    let named = entries.map(|entry| {
        (
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        )
    });
    Ok(named
        .filter(|(name, _)| WAYS.iter().any(|way| name.starts_with(way)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of (directory, name).
    fn tree(zones: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (dir, name) in zones {
            std::fs::create_dir_all(root.path().join(dir)).unwrap();
            std::fs::write(root.path().join(dir).join("name"), format!("{name}\n")).unwrap();
        }
        root
    }

    fn labels(zones: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let found = find(tree(zones).path()).unwrap();
        (
            found.counted.into_iter().map(|zone| zone.label).collect(),
            found.left_out,
        )
    }

    #[test]
    fn a_laptop_has_its_package_once() {
        // As a client Intel machine lists them: package with core, uncore and memory, the platform, and the package again by mmio.
        let (counted, left_out) = labels(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "uncore"),
            ("intel-rapl:0:2", "dram"),
            ("intel-rapl:1", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
            ("intel-rapl-mmio:0:0", "dram"),
        ]);
        assert_eq!(counted, ["package-0", "dram of package-0"]);
        assert_eq!(
            left_out,
            [
                "core of package-0 (intel-rapl): it lies inside its package",
                "uncore of package-0 (intel-rapl): it lies inside its package",
                "psys (intel-rapl): it holds the packages, which are counted",
                "package-0 (intel-rapl-mmio): the same counter by another way",
                "dram of package-0 (intel-rapl-mmio): the same counter by another way",
            ]
        );
    }

    #[test]
    fn a_server_has_every_package_and_its_memory() {
        // Flat and nested: the nested directory is the same zone.
        let (counted, _) = labels(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "dram"),
            ("intel-rapl:0/intel-rapl:0:0", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:1/intel-rapl:1:0", "dram"),
        ]);
        assert_eq!(
            counted,
            [
                "package-0",
                "dram of package-0",
                "package-1",
                "dram of package-1"
            ]
        );
        // Two dies of one processor are two counters.
        let (dies, _) = labels(&[
            ("intel-rapl:0", "package-0-die-0"),
            ("intel-rapl:1", "package-0-die-1"),
        ]);
        assert_eq!(dies, ["package-0-die-0", "package-0-die-1"]);
    }

    #[test]
    fn an_amd_machine_has_its_package_and_not_one_core_of_it() {
        let (counted, left_out) =
            labels(&[("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")]);
        assert_eq!(
            (counted, left_out.len()),
            (vec!["package-0".to_string()], 1)
        );
    }

    #[test]
    fn what_the_trusted_way_lacks_is_taken_from_the_other() {
        let (counted, left_out) =
            labels(&[("intel-rapl-mmio:0", "package-0"), ("intel-rapl:0", "psys")]);
        assert_eq!(counted, ["package-0"]);
        assert_eq!(
            left_out,
            ["psys (intel-rapl): it holds the packages, which are counted"]
        );
        // The memory is listed by mmio alone.
        let (counted, _) = labels(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl-mmio:0", "package-0"),
            ("intel-rapl-mmio:0:0", "dram"),
        ]);
        assert_eq!(counted, ["package-0", "dram of package-0"]);
    }

    #[test]
    fn the_platform_alone_is_better_than_nothing() {
        assert_eq!(labels(&[("intel-rapl:0", "psys")]).0, ["psys"]);
        let (none, left_out) = labels(&[
            ("intel-rapl:0", "mystery"),
            ("dtpm", "cpu0"),
            ("intel-rapl", ""),
        ]);
        assert_eq!(
            (none.len(), left_out),
            (
                0,
                vec!["mystery (intel-rapl): what it covers is not known".to_string()]
            )
        );
    }
}
