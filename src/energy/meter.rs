//! The three meters: counted, measured, timed.
//!
//! Opens measurement windows and selects the deciding meter. Takes a `Work` at the end of a window,
//! returns a [`Reading`] of every available meter. A missing or failed counter yields its reason,
//! never a number.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::charge::Charge;
use super::counters::{Counters, Snapshot};
use super::detect::{Computing, computing_cores, part_of_machine};
use super::entry::Energies;
use super::options::MeterKind;
use super::profile::{DeviceKind, Profile};
use super::sensor::{
    Absent, AttributedSensor, Gap, NvmlSensor, PATIENCE, PATIENCE_IF_MEASURED, RaplSensor, Sensor,
};
use crate::error::{Error, Kind, Result};
use crate::units::{MicroJoules, Seconds, Watts};
use crate::work::Work;

/// The energy of one window on every meter.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Work times profile.
    pub counted: MicroJoules,
    /// Full-load power times wall time.
    pub timed: MicroJoules,
    /// The counters' energy, or why they failed inside the window; `None` without counters.
    pub measured: Option<std::result::Result<MicroJoules, Gap>>,
    /// Wall time of the window.
    pub wall: Seconds,
    /// Details of `counted`.
    pub charge: Charge,
}

impl Reading {
    /// The energies as stored in the ledger.
    pub fn energies(&self) -> Energies {
        let measured = self
            .measured
            .as_ref()
            .and_then(|measured| measured.as_ref().ok());
        Energies {
            counted: self.counted,
            measured: measured.copied(),
            timed: self.timed,
        }
    }
}

/// An open measurement window.
#[derive(Debug)]
pub struct Window {
    start: Instant,
    counters: Option<Snapshot>,
}

/// The meters of one run. Clones share the counters.
#[derive(Clone)]
pub struct Meters {
    profile: Profile,
    timed_power: Watts,
    counters: Rc<RefCell<Counters>>,
    /// Name and assumed power of a host without a counter, for a GPU with one.
    modelled_host: Option<(String, Watts)>,
    /// Why there is no measured energy.
    absent: Option<Absent>,
    /// The counters' energy is attributed by CPU share, which `auto` does not accept as a
    /// measurement.
    attributed: bool,
}

impl Meters {
    /// Counted and timed only.
    pub fn without_counters(profile: Profile) -> Meters {
        let timed_power = match profile.kind {
            DeviceKind::Cpu => profile.scaled_to(computing_cores()).power_at(1.0),
            DeviceKind::Gpu | DeviceKind::Soc => profile.power_at(1.0),
        };
        let absent = Absent::new(
            "no hardware counter was asked for",
            "write `meter = \"auto\"` in [energy]",
        );
        Meters {
            profile,
            timed_power,
            counters: Rc::new(RefCell::new(Counters::new(Vec::new()))),
            modelled_host: None,
            absent: Some(absent),
            attributed: false,
        }
    }

    /// Counted and timed, and the counters this process may read. If it may use only some of the
    /// machine's CPUs, the processor's energy is attributed by their share. `requested` decides how
    /// long a counter may take to move for the first time.
    pub fn open(profile: Profile, computing: Computing, requested: Option<MeterKind>) -> Meters {
        let meters = Self::without_counters(profile);
        let patience = match requested {
            Some(MeterKind::Measured) => PATIENCE_IF_MEASURED,
            Some(MeterKind::Counted | MeterKind::Timed) => PATIENCE / 10,
            None => PATIENCE,
        };
        match computing {
            Computing::Cpu => match open_rapl(patience) {
                Ok(sensor) => Meters {
                    attributed: part_of_machine().is_some(),
                    ..meters.with_counters(vec![sensor], None)
                },
                Err(absent) => meters.without_measurement(absent),
            },
            Computing::Nvidia(index) => match NvmlSensor::open_moving(index, patience) {
                Ok(gpu) => match open_rapl(patience) {
                    Ok(host) => meters.with_counters(vec![Box::new(gpu), host], None),
                    Err(_) => meters.with_counters(vec![Box::new(gpu)], Some(host_model())),
                },
                Err(absent) => meters.without_measurement(absent),
            },
            Computing::Other => meters.without_measurement(Absent::new(
                "this device has no energy counter that can be read",
                "write `meter = \"counted\"` in [energy]",
            )),
        }
    }

    /// Adds the measured meter: `sensors` together cover the computing device. `modelled_host`:
    /// name and assumed power of a host without a counter.
    pub fn with_counters(
        mut self,
        sensors: Vec<Box<dyn Sensor>>,
        modelled_host: Option<(String, Watts)>,
    ) -> Meters {
        self.absent = None;
        self.counters = Rc::new(RefCell::new(Counters::new(sensors)));
        self.modelled_host = modelled_host;
        self
    }

    fn without_measurement(mut self, absent: Absent) -> Meters {
        self.absent = Some(absent);
        self
    }

    /// The device that is charged.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Power of the timed meter: full load of the cores that compute.
    pub fn timed_power(&self) -> Watts {
        self.timed_power
    }

    /// Components of the measured energy ("rapl (package-0)", "generic-cpu modelled at 17 W");
    /// empty without counters.
    pub fn measured_by(&self) -> Vec<String> {
        let mut components = self.counters.borrow().names();
        if let Some((name, power)) = &self.modelled_host {
            components.push(format!("{name} modelled at {power}"));
        }
        components
    }

    /// Why there is no measured energy, with the remedy.
    pub fn absent(&self) -> Option<&Absent> {
        self.absent.as_ref()
    }

    /// Says that a counter is present and not credible, so that nothing is measured.
    pub fn warning(&self) -> Option<String> {
        let absent = self.absent.as_ref().filter(|absent| absent.distrusted)?;
        Some(format!(
            "energy is counted, not measured: {}; {}",
            absent.reason, absent.remedy
        ))
    }

    /// Power that the measured components together never exceed; `None` if unknown.
    pub fn max_power(&self) -> Option<Watts> {
        let host = self.modelled_host.as_ref();
        let host = host.map_or(Watts::ZERO, |(_, power)| *power);
        Some(self.counters.borrow().max_power()? + host)
    }

    /// The deciding meter: the requested one; by default measured, or counted if the counters are
    /// absent or attributed by CPU share.
    ///
    /// # Errors
    /// [`Kind::Energy`] if `Measured` is requested but absent.
    pub fn resolve(&self, requested: Option<MeterKind>) -> Result<MeterKind> {
        match (requested, &self.absent) {
            (Some(MeterKind::Measured), Some(absent)) => {
                let what = format!("energy cannot be measured here: {}", absent.reason);
                let hint = format!("{}; or write `meter = \"counted\"`", absent.remedy);
                Err(Error::new(Kind::Energy, what).at("energy.meter").hint(hint))
            }
            (Some(kind), _) => Ok(kind),
            (None, None) if !self.attributed => Ok(MeterKind::Measured),
            (None, _) => Ok(MeterKind::Counted),
        }
    }

    /// Opens a window.
    pub fn begin(&mut self) -> Window {
        let mut counters = self.counters.borrow_mut();
        let snapshot = (!counters.is_empty()).then(|| counters.snapshot());
        Window {
            start: Instant::now(),
            counters: snapshot,
        }
    }

    /// Closes `window` and charges `work` to it.
    pub fn end(&mut self, window: Window, work: &Work) -> Reading {
        let wall = Seconds(window.start.elapsed().as_secs_f64());
        let measured = window.counters.map(|start| {
            let energy = self.counters.borrow_mut().energy_since(&start)?;
            Ok(energy + self.host_energy(wall))
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

    /// Energy of the modelled host over `wall`; zero without one.
    fn host_energy(&self, wall: Seconds) -> MicroJoules {
        let host = self.modelled_host.as_ref();
        host.map_or(MicroJoules::ZERO, |(_, power)| (*power * wall).rounded())
    }
}

/// The processor's counters, attributed by CPU share if this process may not use every CPU.
fn open_rapl(patience: Duration) -> std::result::Result<Box<dyn Sensor>, Absent> {
    let sensor = Box::new(RaplSensor::open_default(patience)?);
    Ok(match part_of_machine() {
        Some((allowed, all)) => Box::new(AttributedSensor::new(sensor, allowed, all)),
        None => sensor,
    })
}

/// Assumes one busy core on the host of a GPU: idle power plus one core's share of the dynamic
/// power.
fn host_model() -> (String, Watts) {
    let host = Profile::detect();
    let busy_core = (host.load_w - host.idle_w) / host.cores.unwrap_or(1) as f64;
    (host.name.clone(), host.idle_w + busy_core)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Precision;

    type Script = Vec<std::result::Result<u64, Gap>>;

    /// Returns these readings one after another.
    struct Scripted(Script);

    impl Sensor for Scripted {
        fn name(&self) -> &str {
            "scripted"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            self.0.remove(0).map(MicroJoules)
        }
    }

    fn scripted(script: Script, modelled_host: Option<(String, Watts)>) -> Meters {
        Meters::without_counters(Profile::named("nvidia-t4").unwrap())
            .with_counters(vec![Box::new(Scripted(script))], modelled_host)
    }

    /// A window without work.
    fn idle_window(meters: &mut Meters) -> Reading {
        let window = meters.begin();
        meters.end(window, &Work::default())
    }

    #[test]
    fn a_window_is_read_on_every_meter() {
        let mut meters = scripted(vec![Ok(100), Ok(350)], None);
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
        let mut meters = scripted(vec![Ok(100), Err(lost), Ok(300), Ok(300), Ok(400)], None);
        let failed = idle_window(&mut meters);
        assert!(failed.measured.as_ref().unwrap().is_err());
        assert_eq!(failed.energies().measured, None);
        let next = idle_window(&mut meters);
        assert_eq!(next.energies().measured, Some(MicroJoules(100)));
    }

    #[test]
    fn a_host_without_a_counter_is_modelled_and_named() {
        let host = ("generic-cpu".to_string(), Watts(1e6));
        let mut meters = scripted(vec![Ok(0), Ok(10)], Some(host));
        let reading = idle_window(&mut meters);
        let host_energy = (Watts(1e6) * reading.wall).rounded();
        assert_eq!(
            reading.energies().measured.unwrap(),
            MicroJoules(10) + host_energy
        );
        let components = meters.measured_by();
        assert_eq!(components, ["scripted", "generic-cpu modelled at 1 MW"]);
    }

    #[test]
    fn auto_is_measured_if_complete_and_else_counted() {
        let complete = scripted(vec![], None);
        assert_eq!(complete.resolve(None).unwrap(), MeterKind::Measured);
        let attributed = Meters {
            attributed: true,
            ..scripted(vec![], None)
        };
        assert_eq!(attributed.resolve(None).unwrap(), MeterKind::Counted);
        let requested = attributed.resolve(Some(MeterKind::Measured)).unwrap();
        assert_eq!(requested, MeterKind::Measured);
        let absent = Meters::without_counters(Profile::named("generic-cpu").unwrap());
        assert_eq!(absent.resolve(None).unwrap(), MeterKind::Counted);
        assert_eq!(
            absent.resolve(Some(MeterKind::Timed)).unwrap(),
            MeterKind::Timed
        );
        let error = absent.resolve(Some(MeterKind::Measured)).unwrap_err();
        assert_eq!(error.kind(), Kind::Energy);
        assert!(error.remedy().unwrap().contains("counted"));
    }
}
