//! Processor energy from the Linux powercap tree (RAPL).
//!
//! Takes the tree's root, returns the sum over every package and its memory, each counted once
//! (`zones` selects them). A counter that stands still is replaced by another one of the same zone,
//! packages without any by the platform's. RAPL counts a socket, not one process.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use super::zones::{self, Zone};
use super::{Absent, Counter, CounterLimits, Gap, Sensor, wait_until};
use crate::units::{MicroJoules, Watts};

/// The powercap tree of Linux; `ROOT_VARIABLE` names another (a host's, mounted in a container).
const ROOT: &str = "/sys/class/powercap";
const ROOT_VARIABLE: &str = "WATTUNE_POWERCAP";
/// Watts no domain draws, whatever its rated power: turbo limits are several times that of a mobile
/// processor.
const MAX_POWER_W: f64 = 1000.0;
/// Multiple of the largest stated power limit that no domain draws.
const LIMIT_FACTOR: f64 = 4.0;
/// Watts that a package draws at least.
const MIN_POWER_W: f64 = 0.1;
/// Time given to a memory's counter once every package's has moved.
const MEMORY_PATIENCE: Duration = Duration::from_millis(50);
/// Counters tick every millisecond; the reading thread may be preempted before it reads the clock.
const UPDATE_LAG: Duration = Duration::from_millis(100);

/// The packages and memories of one machine.
#[derive(Debug)]
pub struct RaplSensor {
    domains: Vec<Domain>,
    /// Replacements for domains that stand still.
    spare: Vec<Domain>,
    left_out: Vec<String>,
    opened: Instant,
}

#[derive(Debug)]
struct Domain {
    zone: Zone,
    counter: Counter,
}

impl RaplSensor {
    /// The sensor of this machine, `/sys/class/powercap` or the tree that `WATTUNE_POWERCAP` names,
    /// once its counters have moved.
    ///
    /// # Errors
    /// A tree that is missing or unreadable, and counters that do not move within `patience`.
    pub fn open_default(patience: Duration) -> Result<RaplSensor, Absent> {
        let root = std::env::var_os(ROOT_VARIABLE).unwrap_or_else(|| ROOT.into());
        Self::open(Path::new(&root))?.moving(patience)
    }

    /// The sensor of the powercap tree under `root`. Every package must be readable: a partial sum
    /// would pass for the total. Memory that is not is left out.
    pub fn open(root: &Path) -> Result<RaplSensor, Absent> {
        let mut zones = zones::find(root).map_err(|e| no_tree(root, &e))?;
        if zones.selected.is_empty() {
            return Err(Absent::new(
                format!("{} lists no processor package", root.display()),
                "load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers often have no counter",
            ));
        }
        let mut domains = Vec::new();
        let mut unreadable = None;
        for zone in zones.selected {
            let is_memory = zone.is_memory();
            match Domain::open(zone.clone()) {
                Ok(domain) => domains.push(domain),
                Err(absent) if is_memory => {
                    zones
                        .left_out
                        .push(format!("{}: {}", zone.label, absent.reason));
                }
                Err(absent) => unreadable = Some(absent),
            }
        }
        let spare = zones.spare.into_iter().map(Domain::open);
        let mut spare: Vec<Domain> = spare.filter_map(Result::ok).collect();
        if let Some(absent) = unreadable {
            zones.left_out.push(absent.reason.clone());
            spare.retain(|domain| domain.zone.is_platform());
            domains = vec![spare.pop().ok_or(absent)?];
        }
        Ok(RaplSensor {
            domains,
            spare,
            left_out: zones.left_out,
            opened: Instant::now(),
        })
    }

    /// This sensor once every package has moved; what has not within `patience` is replaced, or
    /// left out if it is memory.
    fn moving(mut self, patience: Duration) -> Result<RaplSensor, Absent> {
        let packages = |domain: &&Domain| !domain.zone.is_memory();
        wait_until(patience, || {
            self.read_all();
            self.domains.iter().filter(packages).all(Domain::has_moved)
        });
        wait_until(MEMORY_PATIENCE.min(patience), || {
            self.read_all();
            self.domains.iter().all(Domain::has_moved)
        });
        let mut still = None;
        for domain in std::mem::take(&mut self.domains) {
            let label = domain.zone.label.clone();
            let same = |spare: &Domain| spare.zone.label == label && spare.has_moved();
            if domain.has_moved() {
                self.domains.push(domain);
            } else if let Some(at) = self.spare.iter().position(same) {
                self.left_out.push(format!(
                    "{label}: its counter stands still, read through another interface"
                ));
                self.domains.push(self.spare.swap_remove(at));
            } else if domain.zone.is_memory() {
                self.left_out
                    .push(format!("{label}: its counter stands still"));
            } else {
                still = Some(Absent::standing_still(&label, patience));
            }
        }
        let Some(absent) = still else {
            return Ok(self);
        };
        self.left_out.push(absent.reason.clone());
        let platform = |spare: &Domain| spare.zone.is_platform() && spare.has_moved();
        let at = self.spare.iter().position(platform).ok_or(absent)?;
        self.domains = vec![self.spare.swap_remove(at)];
        Ok(self)
    }

    /// Reads every counter, spares too, for the side effects.
    fn read_all(&mut self) {
        let elapsed = self.opened.elapsed();
        for domain in self.domains.iter_mut().chain(&mut self.spare) {
            let _ = domain.read(elapsed);
        }
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
            .map(|domain| domain.zone.label.as_str())
            .collect();
        labels.join(", ")
    }

    fn max_read_interval(&self) -> Option<Duration> {
        let limits = self.domains.iter().map(|domain| domain.counter.limits());
        limits.filter_map(CounterLimits::max_read_interval).min()
    }

    fn max_power(&self) -> Option<Watts> {
        let limits = self.domains.iter().map(|domain| domain.counter.limits());
        Some(Watts(limits.map(|limits| limits.max_power_w).sum()))
    }
}

impl Domain {
    /// A domain without a stated range never wraps around.
    fn open(zone: Zone) -> Result<Domain, Absent> {
        let path = zone.energy_file();
        let first = read_integer(&path).map_err(|e| unreadable(&path, &e))?;
        let stated = |name: String| read_integer(&zone.dir.join(name)).ok();
        let powers = (0..3).filter_map(|n| stated(format!("constraint_{n}_max_power_uw")));
        let limit_w = powers.max().unwrap_or(0) as f64 / 1e6;
        let limits = CounterLimits {
            wrap_range: stated("max_energy_range_uj".to_string()).filter(|range| *range > 0),
            max_power_w: MAX_POWER_W.max(LIMIT_FACTOR * limit_w),
            min_power_w: if zone.is_memory() { 0.0 } else { MIN_POWER_W },
            update_lag: UPDATE_LAG,
        };
        let counter = Counter::new(limits, first, Duration::ZERO);
        Ok(Domain { zone, counter })
    }

    fn has_moved(&self) -> bool {
        self.counter.has_moved()
    }

    fn read(&mut self, elapsed: Duration) -> Result<u64, Gap> {
        let path = self.zone.energy_file();
        let raw = read_integer(&path)
            .map_err(|e| Gap::unread(format!("cannot read {}: {e}", path.display())))?;
        let label = &self.zone.label;
        self.counter.update(raw, elapsed).map_err(|gap| Gap {
            reason: format!("{label}: {}", gap.reason),
            ..gap
        })
    }
}

fn read_integer(path: &Path) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    let text = text.trim();
    text.parse()
        .map_err(|_| std::io::Error::new(ErrorKind::InvalidData, format!("`{text}` is no number")))
}

fn no_tree(root: &Path, source: &std::io::Error) -> Absent {
    Absent::new(
        format!("no powercap tree under {}: {source}", root.display()),
        "on a Linux machine, load the driver with `sudo modprobe intel_rapl_msr`; virtual machines and containers have none",
    )
}

fn unreadable(path: &Path, source: &std::io::Error) -> Absent {
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => {
            "only root may read it: `sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj` (until the next boot)"
        }
        _ => "use the counted meter on this machine",
    };
    Absent::new(format!("cannot read {}: {source}", path.display()), remedy)
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
        set(root.path(), "intel-rapl:0", "1001000");
        set(root.path(), "intel-rapl:1", "1001000");
        for counted_elsewhere in ["intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"] {
            set(root.path(), counted_elsewhere, "1001000");
        }
        for memory in ["intel-rapl:0:1", "intel-rapl:0/intel-rapl:0:1"] {
            set(root.path(), memory, "1007");
        }
        // Two packages rose by a joule, one memory by 7 uJ.
        assert_eq!(read(&mut sensor, 1), Ok(MicroJoules(2_000_007)));
    }

    /// A sensor of zones (directory, name) of which these move, waited for.
    fn moving(zones: &[(&str, &str)], moved: &[&str]) -> Result<RaplSensor, Absent> {
        let root = tempfile::tempdir().unwrap();
        for (zone, name) in zones {
            add_zone(root.path(), zone, name, 1000);
        }
        let sensor = RaplSensor::open(root.path()).unwrap();
        for zone in moved {
            set(root.path(), zone, "2000");
        }
        sensor.moving(Duration::ZERO)
    }

    #[test]
    fn a_counter_that_stands_still_is_no_measurement() {
        let server = [
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ];
        // What moves, and what is summed.
        let summed = [
            (
                vec!["intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"],
                "package-0, dram of package-0, package-1",
            ),
            (vec!["intel-rapl:0", "intel-rapl:1"], "package-0, package-1"),
            (
                vec!["intel-rapl-mmio:0", "intel-rapl:1"],
                "package-0, package-1",
            ),
            // A part of the machine would pass for all of it.
            (vec!["intel-rapl:0", "intel-rapl:2"], "psys"),
            (vec!["intel-rapl:2"], "psys"),
        ];
        for (moved, covers) in summed {
            let sensor = moving(&server, &moved).unwrap();
            assert_eq!(sensor.covers(), covers, "{moved:?}");
        }
        for moved in [vec![], vec!["intel-rapl:0"], vec!["intel-rapl:0:0"]] {
            let absent = moving(&server, &moved).unwrap_err();
            let named =
                absent.reason.contains("stands still") && absent.reason.contains("package-");
            assert!(named && absent.distrusted, "{moved:?}: {absent:?}");
        }
    }

    #[test]
    fn draw_above_the_rated_power_is_believed() {
        // 15 W rated, 61 W for ten seconds.
        let root = tempfile::tempdir().unwrap();
        add_zone(root.path(), "intel-rapl:0", "package-0", 1000);
        let rated = root.path().join("intel-rapl:0/constraint_0_max_power_uw");
        std::fs::write(rated, "15000000").unwrap();
        let mut sensor = RaplSensor::open(root.path()).unwrap();
        set(root.path(), "intel-rapl:0", "610001000");
        assert_eq!(read(&mut sensor, 10), Ok(MicroJoules(610_000_000)));
    }

    #[test]
    fn a_range_that_is_missing_or_zero_is_no_range() {
        for range in [None, Some("0"), Some("")] {
            let root = tempfile::tempdir().unwrap();
            add_zone(root.path(), "intel-rapl:0", "package-0", 5_000_000);
            let file = root.path().join("intel-rapl:0/max_energy_range_uj");
            match range {
                Some(text) => std::fs::write(file, text).unwrap(),
                None => std::fs::remove_file(file).unwrap(),
            }
            let mut sensor = RaplSensor::open(root.path()).unwrap();
            set(root.path(), "intel-rapl:0", "9000000");
            assert_eq!(
                read(&mut sensor, 1),
                Ok(MicroJoules(4_000_000)),
                "{range:?}"
            );
            set(root.path(), "intel-rapl:0", "10");
            assert!(read(&mut sensor, 2).unwrap_err().lost, "{range:?}");
        }
    }

    #[test]
    fn memory_that_cannot_be_read_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        add_zone(root.path(), "intel-rapl:0", "package-0", 1);
        add_zone(root.path(), "intel-rapl:0:0", "dram", 1);
        set(root.path(), "intel-rapl:0:0", "nothing");
        let sensor = RaplSensor::open(root.path()).unwrap();
        assert_eq!(sensor.covers(), "package-0");
        assert!(sensor.left_out()[0].contains("`nothing` is no number"));
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
        set(root.path(), "intel-rapl:0", "5004000000");
        assert_eq!(read(&mut sensor, 2), Ok(MicroJoules(4_000_000)));
        // A fall to 1 J is no wrap-around: 258 kJ cannot be drawn in a second.
        set(root.path(), "intel-rapl:0", "1000000");
        assert!(read(&mut sensor, 3).unwrap_err().reason.contains("reset"));
        set(root.path(), "intel-rapl:0", "1000005");
        assert_eq!(read(&mut sensor, 4), Ok(MicroJoules(4_000_005)));
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
