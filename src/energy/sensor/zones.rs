//! Selection of powercap zones that make up a machine, each counted once.
//!
//! Takes the tree's root, returns the zones to sum and a description of those left out:
//!
//! | zone | meaning | selected |
//! |---|---|---|
//! | `package-N`, `package-N-die-M` | a processor (Intel, AMD), or one of its dies | yes |
//! | `dram` in a package | memory attached to the processor | yes |
//! | `core`, `uncore` in a package | part of the package (AMD reports one core as `core`) | no |
//! | `psys` | platform: packages, memory and more | no; a spare for packages that are missing or not credible |
//! | `intel-rapl-mmio:N` | the package of that name through another interface | only if listed nowhere else; else a spare |
//!
//! Reads names only, no energy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name prefixes of the interfaces to a counter, the preferred one first.
const INTERFACES: [&str; 2] = ["intel-rapl:", "intel-rapl-mmio:"];

/// A zone to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Zone {
    /// "package-0", "dram of package-0".
    pub label: String,
    /// Directory of its files.
    pub dir: PathBuf,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Zones {
    /// To be summed.
    pub selected: Vec<Zone>,
    /// Other interfaces to selected zones, and the platform.
    pub spare: Vec<Zone>,
    /// Description and reason of every other zone.
    pub left_out: Vec<String>,
}

impl Zone {
    /// The file of its counter, in microjoules.
    pub fn energy_file(&self) -> PathBuf {
        self.dir.join("energy_uj")
    }

    /// Whether it is memory, which is part of the machine only in addition to its package.
    pub fn is_memory(&self) -> bool {
        self.label.starts_with("dram")
    }

    /// Whether it is the platform.
    pub fn is_platform(&self) -> bool {
        self.label == PLATFORM
    }
}

/// Name of the platform's zone.
const PLATFORM: &str = "psys";

/// A zone as listed. `interface` is an index of [`INTERFACES`]; `parent` is a directory name.
#[derive(Debug)]
struct ListedZone {
    interface: usize,
    parent: Option<String>,
    name: String,
    dir: PathBuf,
}

/// Reads the tree. A zone may be listed twice (at the top and nested in its parent) under the same
/// directory name.
pub(super) fn find(root: &Path) -> std::io::Result<Zones> {
    let mut listed = BTreeMap::new();
    for (entry, dir) in zone_dirs(root)? {
        let nested = zone_dirs(&dir).unwrap_or_default();
        for (entry, dir) in std::iter::once((entry, dir)).chain(nested) {
            if let Some(zone) = ListedZone::read(&entry, dir) {
                listed.entry(entry).or_insert(zone);
            }
        }
    }
    Ok(select(&listed))
}

impl ListedZone {
    fn read(entry: &str, dir: PathBuf) -> Option<ListedZone> {
        let name = std::fs::read_to_string(dir.join("name")).ok()?;
        let interface = INTERFACES
            .iter()
            .position(|prefix| entry.starts_with(prefix))?;
        let prefix = INTERFACES[interface];
        let parent = entry[prefix.len()..].rsplit_once(':');
        Some(ListedZone {
            interface,
            parent: parent.map(|(parent, _)| format!("{prefix}{parent}")),
            name: name.trim().to_string(),
            dir,
        })
    }

    fn is_package(&self) -> bool {
        self.parent.is_none() && self.name.starts_with("package")
    }
}

fn select(listed: &BTreeMap<String, ListedZone>) -> Zones {
    let has_packages = listed.values().any(ListedZone::is_package);
    let mut left_out = Vec::new();
    let mut spare = Vec::new();
    let mut selected: BTreeMap<String, PathBuf> = BTreeMap::new();
    for (interface, prefix) in INTERFACES.iter().enumerate() {
        for zone in listed.values().filter(|zone| zone.interface == interface) {
            let parent = zone.parent.as_ref().and_then(|parent| listed.get(parent));
            let label = match parent {
                Some(parent) => format!("{} of {}", zone.name, parent.name),
                None => zone.name.clone(),
            };
            let duplicate = selected
                .contains_key(&label)
                .then_some("the same counter through another interface");
            if let Some(reason) = exclusion(zone, parent.is_some(), has_packages).or(duplicate) {
                let interface = prefix.trim_end_matches(':');
                left_out.push(format!("{label} ({interface}): {reason}"));
                if duplicate.is_some() || (parent.is_none() && label == PLATFORM) {
                    let dir = zone.dir.clone();
                    spare.push(Zone { label, dir });
                }
            } else {
                selected.insert(label, zone.dir.clone());
            }
        }
    }
    let zones = selected.into_iter().map(|(label, dir)| Zone { label, dir });
    let mut selected: Vec<Zone> = zones.collect();
    // A package, then its memory.
    selected.sort_by_key(|zone| {
        let package = zone.label.rsplit(' ').next().map(str::to_string);
        (package, zone.label.len())
    });
    Zones {
        selected,
        spare,
        left_out,
    }
}

/// Why a zone is not summed, by the table of the module's documentation.
fn exclusion(zone: &ListedZone, in_package: bool, has_packages: bool) -> Option<&'static str> {
    match zone.name.as_str() {
        _ if zone.is_package() => None,
        "dram" if in_package => None,
        PLATFORM if !in_package && !has_packages => None,
        PLATFORM => Some("includes the packages, which are counted"),
        "core" | "uncore" => Some("part of its package"),
        _ => Some("unknown coverage"),
    }
}

/// Directories named `intel-rapl:...` or `intel-rapl-mmio:...`, by name.
fn zone_dirs(dir: &Path) -> std::io::Result<BTreeMap<String, PathBuf>> {
    let entries = std::fs::read_dir(dir)?.filter_map(Result::ok);
    let named = entries.map(|entry| {
        (
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        )
    });
    let is_zone = |name: &str| INTERFACES.iter().any(|prefix| name.starts_with(prefix));
    Ok(named.filter(|(name, _)| is_zone(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels of the selected zones and the others' descriptions, in a tree of (directory, name).
    fn find_in(zones: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let root = tempfile::tempdir().unwrap();
        for (dir, name) in zones {
            std::fs::create_dir_all(root.path().join(dir)).unwrap();
            std::fs::write(root.path().join(dir).join("name"), format!("{name}\n")).unwrap();
        }
        let found = find(root.path()).unwrap();
        let labels = found.selected.into_iter().map(|zone| zone.label).collect();
        (labels, found.left_out)
    }

    #[test]
    fn a_laptop_package_is_counted_once() {
        // A client Intel machine: package with core, uncore and memory, the platform, and the
        // package again by mmio.
        let (selected, left_out) = find_in(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "uncore"),
            ("intel-rapl:0:2", "dram"),
            ("intel-rapl:1", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
            ("intel-rapl-mmio:0:0", "dram"),
        ]);
        assert_eq!(selected, ["package-0", "dram of package-0"]);
        assert_eq!(
            left_out,
            [
                "core of package-0 (intel-rapl): part of its package",
                "uncore of package-0 (intel-rapl): part of its package",
                "psys (intel-rapl): includes the packages, which are counted",
                "package-0 (intel-rapl-mmio): the same counter through another interface",
                "dram of package-0 (intel-rapl-mmio): the same counter through another interface",
            ]
        );
    }

    #[test]
    fn a_server_has_every_package_and_its_memory() {
        // Nested directories repeat a zone.
        let (selected, _) = find_in(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "dram"),
            ("intel-rapl:0/intel-rapl:0:0", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:1/intel-rapl:1:0", "dram"),
        ]);
        let expected = [
            "package-0",
            "dram of package-0",
            "package-1",
            "dram of package-1",
        ];
        assert_eq!(selected, expected);
        // Two dies of one processor are two counters.
        let (dies, _) = find_in(&[
            ("intel-rapl:0", "package-0-die-0"),
            ("intel-rapl:1", "package-0-die-1"),
        ]);
        assert_eq!(dies, ["package-0-die-0", "package-0-die-1"]);
    }

    #[test]
    fn an_amd_core_zone_is_left_out() {
        let (selected, left_out) =
            find_in(&[("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")]);
        assert_eq!(selected, ["package-0"]);
        assert_eq!(left_out.len(), 1);
    }

    #[test]
    fn mmio_zones_fill_in_what_the_first_interface_lacks() {
        let (selected, left_out) =
            find_in(&[("intel-rapl-mmio:0", "package-0"), ("intel-rapl:0", "psys")]);
        assert_eq!(selected, ["package-0"]);
        assert_eq!(
            left_out,
            ["psys (intel-rapl): includes the packages, which are counted"]
        );
        // Memory listed by mmio alone.
        let (selected, _) = find_in(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl-mmio:0", "package-0"),
            ("intel-rapl-mmio:0:0", "dram"),
        ]);
        assert_eq!(selected, ["package-0", "dram of package-0"]);
    }

    #[test]
    fn the_platform_counter_is_used_without_packages() {
        assert_eq!(find_in(&[("intel-rapl:0", "psys")]).0, ["psys"]);
        let (selected, left_out) = find_in(&[
            ("intel-rapl:0", "mystery"),
            ("dtpm", "cpu0"),
            ("intel-rapl", ""),
        ]);
        assert!(selected.is_empty());
        assert_eq!(left_out, ["mystery (intel-rapl): unknown coverage"]);
    }
}
