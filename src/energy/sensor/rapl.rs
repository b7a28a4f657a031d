//! Processor energy from the kernel's powercap tree (RAPL).
//!
//! Owns the reading of the zones that `zones` chose. Takes the tree's root, returns the sum of every package, with the memory beside each,
//! every joule once. Knows nothing of who spends the energy: a counter sees the whole socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::zones::{self, Zone};
use super::{Absent, Bounds, Counter, Gap, Sensor};
use crate::units::MicroJoules;

/// Where Linux keeps the tree, unless the variable names another place (a container's view of its host's).
const ROOT: &str = "/sys/class/powercap";
const ROOT_VARIABLE: &str = "WATTUNE_POWERCAP";
/// Watts that no domain draws, where the kernel names no limit of its own.
const CEILING_W: f64 = 1000.0;
/// The counters tick every millisecond; the clock is read a little after them, by a thread that may be interrupted in between.
const LAG: Duration = Duration::from_millis(100);

/// The packages and memories of one machine.
#[derive(Debug)]
pub struct RaplSensor {
    domains: Vec<Domain>,
    left_out: Vec<String>,
    opened: Instant,
}

#[derive(Debug)]
struct Domain {
    label: String,
    energy: PathBuf,
    counter: Counter,
}

impl RaplSensor {
    /// The sensor of this machine: `/sys/class/powercap`, or the tree that `WATTUNE_POWERCAP` names.
    pub fn open_default() -> Result<RaplSensor, Absent> {
        let root =
            std::env::var_os(ROOT_VARIABLE).map_or_else(|| PathBuf::from(ROOT), PathBuf::from);
        Self::open(&root)
    }

    /// The sensor of the powercap tree under `root`. Every chosen zone must be readable: a part would pass for the whole.
    pub fn open(root: &Path) -> Result<RaplSensor, Absent> {
        let found = zones::find(root).map_err(|e| no_tree(root, &e))?;
        if found.counted.is_empty() {
            return Err(Absent {
                reason: format!("{} lists no processor package", root.display()),
                remedy:
                    "load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers often have no counter"
                        .to_string(),
            });
        }
        let domains = found
            .counted
            .into_iter()
            .map(Domain::open)
            .collect::<Result<_, _>>()?;
        Ok(RaplSensor {
            domains,
            left_out: found.left_out,
            opened: Instant::now(),
        })
    }

    /// The zones that are not, each with its reason.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Energy since the sensor was opened, at `since` after that.
    fn read_at(&mut self, since: Duration) -> Result<MicroJoules, Gap> {
        // Every domain is followed, even after one failed; a loss outweighs a reading that merely failed.
        let readings: Vec<_> = self
            .domains
            .iter_mut()
            .map(|domain| domain.read(since))
            .collect();
        let lost = readings
            .iter()
            .find_map(|reading| reading.as_ref().err().filter(|gap| gap.lost).cloned());
        lost.map_or_else(
            || {
                readings
                    .into_iter()
                    .sum::<Result<u64, Gap>>()
                    .map(MicroJoules)
            },
            Err,
        )
    }
}

impl Sensor for RaplSensor {
    fn name(&self) -> &str {
        "rapl"
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        self.read_at(self.opened.elapsed())
    }

    /// The zones that are summed ("package-0, dram of package-0").
    fn covers(&self) -> String {
        self.domains
            .iter()
            .map(|domain| domain.label.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn unread_at_most(&self) -> Option<Duration> {
        self.domains
            .iter()
            .filter_map(|domain| domain.counter.bounds().silence())
            .min()
    }
}

impl Domain {
    fn open(Zone { label, dir }: Zone) -> Result<Domain, Absent> {
        let energy = dir.join("energy_uj");
        let first = read_number(&energy).map_err(|e| unreadable(&energy, &e))?;
        let range_file = dir.join("max_energy_range_uj");
        let range = read_number(&range_file).map_err(|e| unreadable(&range_file, &e))?;
        // The long-term limit is the rated power; twice that is out of reach for seconds on end.
        let rated = read_number(&dir.join("constraint_0_max_power_uw"))
            .ok()
            .filter(|uw| *uw > 0);
        let ceiling = rated.map_or(CEILING_W, |uw| 2.0 * uw as f64 / 1e6);
        let bounds = Bounds {
            range: Some(range),
            ceiling,
            lag: LAG,
        };
        Ok(Domain {
            label,
            energy,
            counter: Counter::new(bounds, first, Duration::ZERO),
        })
    }

    fn read(&mut self, since: Duration) -> Result<u64, Gap> {
        let raw = read_number(&self.energy)
            .map_err(|e| Gap::unread(format!("cannot read {}: {e}", self.energy.display())))?;
        self.counter.advance(raw, since)
    }
}

fn read_number(path: &Path) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| {
        std::io::Error::new(
            ErrorKind::InvalidData,
            format!("`{}` is no number", text.trim()),
        )
    })
}

fn no_tree(root: &Path, source: &std::io::Error) -> Absent {
    Absent {
        reason: format!("no powercap tree under {}: {source}", root.display()),
        remedy: "on a Linux machine of your own, load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers have none"
            .to_string(),
    }
}

fn unreadable(path: &Path, source: &std::io::Error) -> Absent {
    let reason = format!("cannot read {}: {source}", path.display());
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => {
            "the kernel lets root alone read it: `sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj` (until the next boot)"
                .to_string()
        }
        _ => "use the counted meter on this machine".to_string(),
    };
    Absent { reason, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: u64 = 262_143_328_850; // a common Intel package: 262 kJ

    fn domain(root: &Path, at: &str, name: &str, energy: u64) {
        let dir = root.join(at);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("name"), format!("{name}\n")).unwrap();
        std::fs::write(dir.join("max_energy_range_uj"), RANGE.to_string()).unwrap();
        set(root, at, &energy.to_string());
    }

    fn set(root: &Path, at: &str, energy: &str) {
        std::fs::write(root.join(at).join("energy_uj"), energy).unwrap();
    }

    /// Two packages, each with core and dram; psys; the first package a second time through mmio.
    fn server() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for package in 0..2 {
            domain(
                dir.path(),
                &format!("intel-rapl:{package}"),
                &format!("package-{package}"),
                1000,
            );
            domain(dir.path(), &format!("intel-rapl:{package}:0"), "core", 1000);
            domain(dir.path(), &format!("intel-rapl:{package}:1"), "dram", 1000);
            domain(
                dir.path(),
                &format!("intel-rapl:{package}/intel-rapl:{package}:1"),
                "dram",
                1000,
            );
        }
        domain(dir.path(), "intel-rapl:2", "psys", 1000);
        domain(dir.path(), "intel-rapl-mmio:0", "package-0", 1000);
        dir
    }

    fn after(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn packages_and_their_memory_are_summed_once() {
        let root = server();
        let mut sensor = RaplSensor::open(root.path()).unwrap();
        assert_eq!(
            sensor.covers(),
            "package-0, dram of package-0, package-1, dram of package-1"
        );
        assert_eq!(sensor.left_out().len(), 4);
        // 262 kJ at 1000 W.
        assert_eq!(sensor.unread_at_most().unwrap().as_secs(), 262);
        for at in [
            "intel-rapl:0",
            "intel-rapl:1",
            "intel-rapl:0:0",
            "intel-rapl:2",
            "intel-rapl-mmio:0",
        ] {
            set(root.path(), at, "1100");
        }
        for at in ["intel-rapl:0:1", "intel-rapl:0/intel-rapl:0:1"] {
            set(root.path(), at, "1007");
        }
        // Two packages rose by 100, one memory by 7; core, psys and mmio are the same joules again.
        assert_eq!(sensor.read_at(after(1)), Ok(MicroJoules(207)));
    }

    #[test]
    fn a_wrap_adds_what_went_by() {
        let root = tempfile::tempdir().unwrap();
        domain(root.path(), "intel-rapl:0", "package-0", RANGE - 30_000_000);
        let mut sensor = RaplSensor::open(root.path()).unwrap();
        set(root.path(), "intel-rapl:0", "20000000");
        assert_eq!(sensor.read_at(after(1)), Ok(MicroJoules(50_000_000)));
    }

    #[test]
    fn a_failed_read_is_a_gap_and_adds_no_range() {
        // The fault of a widely used meter: an error read as 0 adds one full range, and the next reading the whole counter.
        let root = tempfile::tempdir().unwrap();
        domain(root.path(), "intel-rapl:0", "package-0", 5_000_000_000);
        let mut sensor = RaplSensor::open(root.path()).unwrap();
        for broken in ["", "garbage"] {
            set(root.path(), "intel-rapl:0", broken);
            assert!(sensor.read_at(after(1)).is_err());
        }
        set(root.path(), "intel-rapl:0", "5000040000");
        assert_eq!(sensor.read_at(after(2)), Ok(MicroJoules(40_000)));
        // A reset to 1 J is no wrap: 258 kJ cannot go by in a second.
        set(root.path(), "intel-rapl:0", "1000000");
        assert!(
            sensor
                .read_at(after(3))
                .unwrap_err()
                .reason
                .contains("reset")
        );
        set(root.path(), "intel-rapl:0", "1000005");
        assert_eq!(sensor.read_at(after(4)), Ok(MicroJoules(40_005)));
        std::fs::remove_file(root.path().join("intel-rapl:0/energy_uj")).unwrap();
        assert!(sensor.read_at(after(5)).is_err());
    }

    #[test]
    fn what_cannot_be_opened_says_why_and_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let nothing = RaplSensor::open(&root.path().join("none")).unwrap_err();
        assert!(nothing.reason.contains("no powercap tree") && nothing.remedy.contains("modprobe"));
        domain(root.path(), "intel-rapl:0", "mystery", 1);
        assert!(
            RaplSensor::open(root.path())
                .unwrap_err()
                .reason
                .contains("no processor package")
        );
        let denied = unreadable(
            Path::new("energy_uj"),
            &std::io::Error::from(ErrorKind::PermissionDenied),
        );
        assert!(
            denied.remedy.contains("sudo chmod a+r"),
            "{}",
            denied.remedy
        );
    }

    /// Root may read anything, so this one says nothing there.
    #[cfg(unix)]
    #[test]
    fn a_counter_for_root_alone_is_absent() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        domain(root.path(), "intel-rapl:0", "package-0", 1);
        let file = root.path().join("intel-rapl:0/energy_uj");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
        if std::fs::read(&file).is_ok() {
            return;
        }
        assert!(
            RaplSensor::open(root.path())
                .unwrap_err()
                .remedy
                .contains("chmod")
        );
    }
}
