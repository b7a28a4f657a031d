//! Processor energy from the Linux powercap tree (RAPL).
//!
//! Takes the tree's root, returns the sum over every package and its memory, each counted once
//! (`zones` selects them). RAPL counts a socket, not one process.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::zones::{self, Zone};
use super::{Absent, Counter, CounterLimits, Gap, Sensor};
use crate::units::MicroJoules;

/// The powercap tree of Linux; `ROOT_VARIABLE` names another (a host's, mounted in a container).
const ROOT: &str = "/sys/class/powercap";
const ROOT_VARIABLE: &str = "WATTUNE_POWERCAP";
/// Watts no domain draws, if the kernel states no limit.
const MAX_POWER_W: f64 = 1000.0;
/// Counters tick every millisecond; the reading thread may be preempted before it reads the clock.
const UPDATE_LAG: Duration = Duration::from_millis(100);

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
    energy_file: PathBuf,
    counter: Counter,
}

impl RaplSensor {
    /// The sensor of this machine: `/sys/class/powercap`, or the tree that `WATTUNE_POWERCAP`
    /// names.
    pub fn open_default() -> Result<RaplSensor, Absent> {
        let root = std::env::var_os(ROOT_VARIABLE).unwrap_or_else(|| ROOT.into());
        Self::open(Path::new(&root))
    }

    /// The sensor of the powercap tree under `root`. Every selected zone must be readable: a
    /// partial sum would pass for the total.
    pub fn open(root: &Path) -> Result<RaplSensor, Absent> {
        let zones = zones::find(root).map_err(|e| no_tree(root, &e))?;
        if zones.selected.is_empty() {
            return Err(Absent {
                reason: format!("{} lists no processor package", root.display()),
                remedy:
                    "load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers often have no counter"
                        .to_string(),
            });
        }
        let domains = zones.selected.into_iter().map(Domain::open);
        Ok(RaplSensor {
            domains: domains.collect::<Result<_, _>>()?,
            left_out: zones.left_out,
            opened: Instant::now(),
        })
    }

    /// The zones not summed, each with its reason.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Energy since the sensor was opened; `elapsed` is the time since then. Reads every domain
    /// even if one fails; a lost interval takes precedence over a failed reading.
    fn read_at(&mut self, elapsed: Duration) -> Result<MicroJoules, Gap> {
        let readings: Vec<Result<u64, Gap>> = self
            .domains
            .iter_mut()
            .map(|domain| domain.read(elapsed))
            .collect();
        let gaps = readings.iter().filter_map(|reading| reading.as_ref().err());
        if let Some(lost) = gaps.clone().find(|gap| gap.lost) {
            return Err(lost.clone());
        }
        readings
            .into_iter()
            .sum::<Result<u64, Gap>>()
            .map(MicroJoules)
    }
}

impl Sensor for RaplSensor {
    fn name(&self) -> &str {
        "rapl"
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        self.read_at(self.opened.elapsed())
    }

    fn covers(&self) -> String {
        let labels: Vec<&str> = self
            .domains
            .iter()
            .map(|domain| domain.label.as_str())
            .collect();
        labels.join(", ")
    }

    fn max_read_interval(&self) -> Option<Duration> {
        let limits = self.domains.iter().map(|domain| domain.counter.limits());
        limits.filter_map(CounterLimits::max_read_interval).min()
    }
}

impl Domain {
    fn open(Zone { label, dir }: Zone) -> Result<Domain, Absent> {
        let required = |path: &Path| read_integer(path).map_err(|e| unreadable(path, &e));
        let energy_file = dir.join("energy_uj");
        let first = required(&energy_file)?;
        let range = required(&dir.join("max_energy_range_uj"))?;
        // The long-term limit is the rated power; no package sustains twice that for seconds.
        let rated_uw = read_integer(&dir.join("constraint_0_max_power_uw")).unwrap_or(0);
        let limits = CounterLimits {
            wrap_range: Some(range),
            max_power_w: if rated_uw > 0 {
                2.0 * rated_uw as f64 / 1e6
            } else {
                MAX_POWER_W
            },
            update_lag: UPDATE_LAG,
        };
        let counter = Counter::new(limits, first, Duration::ZERO);
        Ok(Domain {
            label,
            energy_file,
            counter,
        })
    }

    fn read(&mut self, elapsed: Duration) -> Result<u64, Gap> {
        let raw = read_integer(&self.energy_file)
            .map_err(|e| Gap::unread(format!("cannot read {}: {e}", self.energy_file.display())))?;
        self.counter.update(raw, elapsed)
    }
}

fn read_integer(path: &Path) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    let text = text.trim();
    text.parse()
        .map_err(|_| std::io::Error::new(ErrorKind::InvalidData, format!("`{text}` is no number")))
}

fn no_tree(root: &Path, source: &std::io::Error) -> Absent {
    Absent {
        reason: format!("no powercap tree under {}: {source}", root.display()),
        remedy: "on a Linux machine, load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers have none"
            .to_string(),
    }
}

fn unreadable(path: &Path, source: &std::io::Error) -> Absent {
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => {
            "only root may read it: `sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj` (until the next boot)"
        }
        _ => "use the counted meter on this machine",
    };
    Absent {
        reason: format!("cannot read {}: {source}", path.display()),
        remedy: remedy.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: u64 = 262_143_328_850; // a common Intel package: 262 kJ

    fn add_zone(root: &Path, zone: &str, name: &str, energy: u64) {
        let dir = root.join(zone);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("name"), format!("{name}\n")).unwrap();
        std::fs::write(dir.join("max_energy_range_uj"), RANGE.to_string()).unwrap();
        set(root, zone, &energy.to_string());
    }

    fn set(root: &Path, zone: &str, energy: &str) {
        std::fs::write(root.join(zone).join("energy_uj"), energy).unwrap();
    }

    /// A machine with one package at `energy`, and its sensor.
    fn one_package(energy: u64) -> (tempfile::TempDir, RaplSensor) {
        let root = tempfile::tempdir().unwrap();
        add_zone(root.path(), "intel-rapl:0", "package-0", energy);
        let sensor = RaplSensor::open(root.path()).unwrap();
        (root, sensor)
    }

    /// Two packages, each with core and dram; psys; the first package a second time through mmio.
    fn server() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let add = |zone: &str, name: &str| add_zone(dir.path(), zone, name, 1000);
        for package in 0..2 {
            add(
                &format!("intel-rapl:{package}"),
                &format!("package-{package}"),
            );
            add(&format!("intel-rapl:{package}:0"), "core");
            add(&format!("intel-rapl:{package}:1"), "dram");
            add(
                &format!("intel-rapl:{package}/intel-rapl:{package}:1"),
                "dram",
            );
        }
        add("intel-rapl:2", "psys");
        add("intel-rapl-mmio:0", "package-0");
        dir
    }

    fn read(sensor: &mut RaplSensor, seconds: u64) -> Result<MicroJoules, Gap> {
        sensor.read_at(Duration::from_secs(seconds))
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
        assert_eq!(sensor.max_read_interval().unwrap().as_secs(), 262);
        set(root.path(), "intel-rapl:0", "1100");
        set(root.path(), "intel-rapl:1", "1100");
        for counted_elsewhere in ["intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"] {
            set(root.path(), counted_elsewhere, "1100");
        }
        for memory in ["intel-rapl:0:1", "intel-rapl:0/intel-rapl:0:1"] {
            set(root.path(), memory, "1007");
        }
        // Two packages rose by 100, one memory by 7.
        assert_eq!(read(&mut sensor, 1), Ok(MicroJoules(207)));
    }

    #[test]
    fn a_wrap_around_is_counted() {
        let (root, mut sensor) = one_package(RANGE - 30_000_000);
        set(root.path(), "intel-rapl:0", "20000000");
        assert_eq!(read(&mut sensor, 1), Ok(MicroJoules(50_000_000)));
    }

    #[test]
    fn a_failed_read_is_a_gap_and_adds_no_range() {
        // A known bug of another meter: an error read as 0 adds one full range, and the next
        // reading the absolute counter.
        let (root, mut sensor) = one_package(5_000_000_000);
        for broken in ["", "garbage"] {
            set(root.path(), "intel-rapl:0", broken);
            assert!(read(&mut sensor, 1).is_err());
        }
        set(root.path(), "intel-rapl:0", "5000040000");
        assert_eq!(read(&mut sensor, 2), Ok(MicroJoules(40_000)));
        // A fall to 1 J is no wrap-around: 258 kJ cannot be drawn in a second.
        set(root.path(), "intel-rapl:0", "1000000");
        assert!(read(&mut sensor, 3).unwrap_err().reason.contains("reset"));
        set(root.path(), "intel-rapl:0", "1000005");
        assert_eq!(read(&mut sensor, 4), Ok(MicroJoules(40_005)));
        std::fs::remove_file(root.path().join("intel-rapl:0/energy_uj")).unwrap();
        assert!(read(&mut sensor, 5).is_err());
    }

    #[test]
    fn an_absent_sensor_has_a_reason_and_a_remedy() {
        let root = tempfile::tempdir().unwrap();
        let nothing = RaplSensor::open(&root.path().join("none")).unwrap_err();
        assert!(nothing.reason.contains("no powercap tree") && nothing.remedy.contains("modprobe"));
        add_zone(root.path(), "intel-rapl:0", "mystery", 1);
        let no_package = RaplSensor::open(root.path()).unwrap_err();
        assert!(no_package.reason.contains("no processor package"));
        let denied = std::io::Error::from(ErrorKind::PermissionDenied);
        let remedy = unreadable(Path::new("energy_uj"), &denied).remedy;
        assert!(remedy.contains("sudo chmod a+r"), "{remedy}");
    }

    /// Root may read any file, so the test is void for root.
    #[cfg(unix)]
    #[test]
    fn a_counter_readable_by_root_only_is_absent() {
        use std::os::unix::fs::PermissionsExt;
        let (root, _) = one_package(1);
        let file = root.path().join("intel-rapl:0/energy_uj");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
        if std::fs::read(&file).is_ok() {
            return;
        }
        let absent = RaplSensor::open(root.path()).unwrap_err();
        assert!(absent.remedy.contains("chmod"));
    }
}
