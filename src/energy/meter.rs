//! The three meters: counted, measured, timed.
//!
//! Owns the measurement window and the choice of the meter that decides. Takes a `Work` at a window's end, returns a `Reading`
//! with every meter that was available. Refuses to turn a missing or failed counter into a number: it is a reason.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use super::charge::Charge;
use super::counters::{Counters, Snapshot};
use super::detect::{Computing, allowed_cores, part_of_machine};
use super::ledger::Energies;
use super::options::MeterKind;
use super::profile::{DeviceKind, Profile};
use super::sensor::{Absent, AttributedSensor, Gap, NvmlSensor, RaplSensor, Sensor};
use crate::error::{Error, Kind, Result};
use crate::units::{MicroJoules, Seconds, Watts};
use crate::work::Work;

/// What one window cost on every meter.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Work times profile.
    pub counted: MicroJoules,
    /// Profile power times wall time.
    pub timed: MicroJoules,
    /// The counters, or why they failed inside the window; `None` where there are none.
    pub measured: Option<std::result::Result<MicroJoules, Gap>>,
    /// Wall time of the window.
    pub wall: Seconds,
    /// How `counted` came about.
    pub charge: Charge,
}

impl Reading {
    /// The amounts as the ledger holds them.
    pub fn energies(&self) -> Energies {
        let measured = self
            .measured
            .as_ref()
            .and_then(|measured| measured.as_ref().ok())
            .copied();
        Energies {
            counted: self.counted,
            measured,
            timed: self.timed,
        }
    }
}

/// An open measurement.
#[derive(Debug)]
pub struct Window {
    start: Instant,
    start_snapshot: Option<Snapshot>,
}

/// The meters of one run. A clone reads the same counters.
#[derive(Clone)]
pub struct Meters {
    profile: Profile,
    timed_power: Watts,
    counters: Rc<RefCell<Counters>>,
    /// A host without a counter beside a device that has one: its profile's name and the power it is taken to draw.
    host: Option<(String, Watts)>,
    /// Why `measured` is not to be had.
    absent: Option<Absent>,
    /// The computing device's joules are a share by head: no measurement, so that `auto` does not take them for one.
    attributed: bool,
}

impl Meters {
    /// Counted and timed only.
    pub fn without_counters(profile: Profile) -> Meters {
        let timed_power = match profile.kind {
            DeviceKind::Cpu => profile.scaled_to(allowed_cores()).power_at(1.0),
            DeviceKind::Gpu | DeviceKind::Soc => profile.power_at(1.0),
        };
        let absent = Absent {
            reason: "no hardware counter was asked for".to_string(),
            remedy: "write `meter = \"auto\"` in [energy]".to_string(),
        };
        Meters {
            profile,
            timed_power,
            counters: Rc::new(RefCell::new(Counters::new(Vec::new()))),
            host: None,
            absent: Some(absent),
            attributed: false,
        }
    }

    /// Counted and timed, and whatever counters this machine lets this process read. Where the process may use a part of the machine's
    /// processors, theirs is attributed by share.
    pub fn open(profile: Profile, computing: Computing) -> Meters {
        let rapl = RaplSensor::open_default().map(|sensor| match part_of_machine() {
            Some((allowed, all)) => {
                Box::new(AttributedSensor::new(Box::new(sensor), allowed, all)) as Box<dyn Sensor>
            }
            None => Box::new(sensor),
        });
        let mut meters = Self::without_counters(profile);
        match computing {
            Computing::Cpu => match rapl {
                Ok(sensor) => Meters {
                    attributed: part_of_machine().is_some(),
                    ..meters.with_counters(vec![sensor], None)
                },
                Err(absent) => meters.explained(absent),
            },
            Computing::Nvidia(index) => match (NvmlSensor::open(index), rapl) {
                (Ok(gpu), Ok(host)) => meters.with_counters(vec![Box::new(gpu), host], None),
                (Ok(gpu), Err(_)) => meters.with_counters(vec![Box::new(gpu)], Some(host_model())),
                (Err(absent), _) => meters.explained(absent),
            },
            Computing::Other => {
                meters.absent = Some(Absent {
                    reason: "this device has no energy counter that can be read".to_string(),
                    remedy: "write `meter = \"counted\"` in [energy]".to_string(),
                });
                meters
            }
        }
    }

    /// These counters, which together cover the computing device; `host` is a modelled host's name and power.
    pub fn with_counters(
        mut self,
        sensors: Vec<Box<dyn Sensor>>,
        host: Option<(String, Watts)>,
    ) -> Meters {
        self.absent = None;
        self.counters = Rc::new(RefCell::new(Counters::new(sensors)));
        self.host = host;
        self
    }

    fn explained(mut self, absent: Absent) -> Meters {
        self.absent = Some(absent);
        self
    }

    /// The device that is charged.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The power that `timed` multiplies with wall time: full load of the cores this process may use.
    pub fn timed_power(&self) -> Watts {
        self.timed_power
    }

    /// What `measured` consists of ("rapl (package-0)", "generic-cpu modelled at 17 W"); empty where there is no counter.
    pub fn measured_by(&self) -> Vec<String> {
        let modelled = self
            .host
            .iter()
            .map(|(name, power)| format!("{name} modelled at {power}"));
        let names = self.counters.borrow().names();
        names.into_iter().chain(modelled).collect()
    }

    /// Why there is no `measured`, and what would help.
    pub fn absent(&self) -> Option<&Absent> {
        self.absent.as_ref()
    }

    /// The meter that decides: the one asked for, or (`None`) measured where complete, else counted.
    pub fn resolve(&self, asked: Option<MeterKind>) -> Result<MeterKind> {
        match (asked, &self.absent) {
            (Some(MeterKind::Measured), Some(absent)) => Err(Error::new(
                Kind::Energy,
                format!("energy cannot be measured here: {}", absent.reason),
            )
            .at("energy.meter")
            .hint(format!("{}; or write `meter = \"counted\"`", absent.remedy))),
            (Some(kind), _) => Ok(kind),
            (None, None) if !self.attributed => Ok(MeterKind::Measured),
            (None, _) => Ok(MeterKind::Counted),
        }
    }

    /// Opens a window.
    pub fn begin(&mut self) -> Window {
        let mut counters = self.counters.borrow_mut();
        let start_snapshot = (!counters.is_empty()).then(|| counters.snapshot());
        Window {
            start: Instant::now(),
            start_snapshot,
        }
    }

    /// Closes `window` and charges `work` to it.
    pub fn end(&mut self, window: Window, work: &Work) -> Reading {
        let wall = Seconds(window.start.elapsed().as_secs_f64());
        let host = self
            .host
            .as_ref()
            .map_or(MicroJoules::ZERO, |(_, power)| (*power * wall).rounded());
        let measured = window.start_snapshot.map(|start| {
            self.counters
                .borrow_mut()
                .energy_since(&start)
                .map(|energy| energy + host)
        });
        let charge = self.profile.charge(work);
        Reading {
            counted: charge.energy,
            timed: (self.timed_power * wall).rounded(),
            measured,
            wall,
            charge,
        }
    }
}

/// A host that feeds a graphics processor keeps about one core busy: idle power and one core's share of the rest.
fn host_model() -> (String, Watts) {
    let host = Profile::detect();
    let busy = (host.load_w - host.idle_w) / host.cores.unwrap_or(1) as f64;
    (host.name.clone(), host.idle_w + busy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Precision;

    /// A counter that shows what it is told.
    struct Scripted(Vec<std::result::Result<u64, Gap>>);

    impl Sensor for Scripted {
        fn name(&self) -> &str {
            "scripted"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            self.0.remove(0).map(MicroJoules)
        }
    }

    fn with(script: Vec<std::result::Result<u64, Gap>>, host: Option<(String, Watts)>) -> Meters {
        Meters::without_counters(Profile::named("nvidia-t4").unwrap())
            .with_counters(vec![Box::new(Scripted(script))], host)
    }

    #[test]
    fn a_window_is_the_difference_of_its_ends() {
        let mut meters = with(vec![Ok(100), Ok(350)], None);
        let work = Work::product(64, 64, 64, Precision::F32);
        let window = meters.begin();
        let reading = meters.end(window, &work);
        assert_eq!(reading.measured, Some(Ok(MicroJoules(250))));
        assert_eq!(reading.counted, meters.profile().charge(&work).energy);
        // A T4 at full load: 70 W over the window.
        assert_eq!(reading.timed, (Watts(70.0) * reading.wall).rounded());
    }

    #[test]
    fn a_failed_counter_is_a_gap_and_never_zero() {
        let lost = Gap::lost("told to fail");
        let mut meters = with(vec![Ok(100), Err(lost), Ok(300), Ok(300), Ok(400)], None);
        let window = meters.begin();
        let reading = meters.end(window, &Work::default());
        assert!(reading.measured.as_ref().unwrap().is_err());
        assert_eq!(reading.energies().measured, None);
        let window = meters.begin();
        assert_eq!(
            meters.end(window, &Work::default()).energies().measured,
            Some(MicroJoules(100))
        );
    }

    #[test]
    fn a_host_without_a_counter_is_modelled_by_name() {
        let mut meters = with(
            vec![Ok(0), Ok(10)],
            Some(("generic-cpu".to_string(), Watts(1e6))),
        );
        let window = meters.begin();
        let reading = meters.end(window, &Work::default());
        assert_eq!(
            reading.energies().measured.unwrap(),
            MicroJoules(10) + (Watts(1e6) * reading.wall).rounded()
        );
        assert_eq!(
            meters.measured_by(),
            ["scripted", "generic-cpu modelled at 1 MW"]
        );
    }

    #[test]
    fn auto_is_measured_where_complete_and_counted_elsewhere() {
        assert_eq!(
            with(vec![], None).resolve(None).unwrap(),
            MeterKind::Measured
        );
        let share = Meters {
            attributed: true,
            ..with(vec![], None)
        };
        assert_eq!(share.resolve(None).unwrap(), MeterKind::Counted);
        assert_eq!(
            share.resolve(Some(MeterKind::Measured)).unwrap(),
            MeterKind::Measured
        );
        let none = Meters::without_counters(Profile::named("generic-cpu").unwrap());
        assert_eq!(none.resolve(None).unwrap(), MeterKind::Counted);
        assert_eq!(
            none.resolve(Some(MeterKind::Timed)).unwrap(),
            MeterKind::Timed
        );
        let error = none.resolve(Some(MeterKind::Measured)).unwrap_err();
        assert!(error.kind() == Kind::Energy && error.remedy().unwrap().contains("counted"));
    }
}
