//! Energy of an NVIDIA graphics processor, from its driver.
//!
//! Owns the driver's total-energy counter (millijoules since the driver was loaded, Volta and newer) and, on older cards, the integral
//! of sampled power. The library is loaded at run time: without it the sensor is absent, with the reason. A counter that falls was reset
//! with its driver: a gap. Knows nothing of which process draws the power; `visible` knows which card the computing library means.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::power::Integral;
use super::visible::{Wanted, wanted};
use super::{Absent, Availability, Bounds, Counter, Gap, Sensor, State};
use crate::units::MicroJoules;

/// Watts that no device draws.
const CEILING_W: f64 = 3000.0;
/// The driver refreshes the counter some ten to fifty times a second, and now and then later.
const LAG: Duration = Duration::from_secs(1);
/// How long power may go unsampled where there is no counter: it is read every fifth of a second, three times within that.
const SAMPLE: Duration = Duration::from_millis(600);

/// Asks a device for one number: millijoules or milliwatts.
type Ask = Box<dyn FnMut() -> Result<u64, String> + Send>;

/// One graphics processor.
pub struct NvmlSensor {
    name: String,
    title: String,
    uuid: String,
    ask: Ask,
    source: Source,
    opened: Instant,
}

/// What its numbers are.
#[derive(Debug)]
enum Source {
    /// Millijoules of the driver's counter.
    Counter(Counter),
    /// Milliwatts, to be integrated.
    Power(Integral),
}

impl NvmlSensor {
    /// The device that the computing library calls by this ordinal.
    pub fn open(ordinal: u32) -> Result<NvmlSensor, Absent> {
        let nvml = driver()?;
        let index = locate(&nvml, ordinal)?;
        Self::of_driver(Arc::new(nvml), index)
    }

    /// The device of this index, in the driver's order.
    fn of_driver(nvml: Arc<Nvml>, index: u32) -> Result<NvmlSensor, Absent> {
        let (title, uuid) = nvml
            .device_by_index(index)
            .and_then(|device| Ok((device.name()?, device.uuid()?)))
            .map_err(|e| unknown_device(index, &e))?;
        let shared = Arc::clone(&nvml);
        let energy = Box::new(move || {
            let energy = shared
                .device_by_index(index)
                .and_then(|device| device.total_energy_consumption());
            energy.map_err(|e| e.to_string())
        });
        let power = Box::new(move || {
            let power = nvml
                .device_by_index(index)
                .and_then(|device| device.power_usage());
            power.map(u64::from).map_err(|e| e.to_string())
        });
        Self::start(index, title, uuid, energy, power)
    }

    /// The counter where the device has one, else its power.
    fn start(
        index: u32,
        title: String,
        uuid: String,
        mut energy: Ask,
        mut power: Ask,
    ) -> Result<NvmlSensor, Absent> {
        let bounds = Bounds {
            range: None,
            ceiling: CEILING_W,
            lag: LAG,
        };
        let (ask, source) = match energy() {
            Ok(first) => (
                energy,
                Source::Counter(Counter::new(
                    bounds,
                    first.saturating_mul(1000),
                    Duration::ZERO,
                )),
            ),
            Err(counter) => match power() {
                Ok(first) => (
                    power,
                    Source::Power(Integral::new(first as f64 / 1000.0, Duration::ZERO)),
                ),
                Err(power) => return Err(no_figure(index, &counter, &power)),
            },
        };
        Ok(NvmlSensor {
            name: format!("nvml:{index}"),
            title,
            uuid,
            ask,
            source,
            opened: Instant::now(),
        })
    }

    fn read_at(&mut self, since: Duration) -> Result<MicroJoules, Gap> {
        let value =
            (self.ask)().map_err(|e| Gap::unread(format!("the driver gave no reading: {e}")))?;
        let energy = match &mut self.source {
            Source::Counter(counter) => counter.advance(value.saturating_mul(1000), since),
            Source::Power(integral) => integral.advance(value as f64 / 1000.0, since),
        };
        energy.map(MicroJoules)
    }
}

impl Sensor for NvmlSensor {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        self.read_at(self.opened.elapsed())
    }

    fn covers(&self) -> String {
        let how = match self.source {
            Source::Counter(_) => "energy counter",
            Source::Power(_) => "no energy counter: its power is sampled",
        };
        format!("{}, {how}", self.title)
    }

    fn device(&self) -> &str {
        &self.uuid
    }

    fn unread_at_most(&self) -> Option<Duration> {
        matches!(self.source, Source::Power(_)).then_some(SAMPLE)
    }
}

/// The name the driver gives the device that the computing library calls by this ordinal, whether or not it has a counter.
pub fn gpu_name(ordinal: u32) -> Result<String, Absent> {
    let nvml = driver()?;
    let index = locate(&nvml, ordinal)?;
    nvml.device_by_index(index)
        .and_then(|device| device.name())
        .map_err(|e| unknown_device(index, &e))
}

/// Every device of the driver, or the reason why there is none.
pub(super) fn probe() -> Vec<Availability> {
    let found = driver().and_then(|nvml| {
        Ok((
            nvml.device_count().map_err(|e| no_driver(&e))?,
            Arc::new(nvml),
        ))
    });
    let (count, nvml) = match found {
        Ok(found) => found,
        Err(absent) => {
            return vec![Availability::absent(
                "nvml",
                "NVIDIA graphics processors",
                absent,
            )];
        }
    };
    let each = |index| match NvmlSensor::of_driver(Arc::clone(&nvml), index) {
        Ok(sensor) => Availability {
            name: sensor.name.clone(),
            covers: sensor.covers(),
            left_out: Vec::new(),
            state: State::Available,
        },
        Err(absent) => Availability::absent(
            format!("nvml:{index}"),
            "an NVIDIA graphics processor",
            absent,
        ),
    };
    (0..count).map(each).collect()
}

fn driver() -> Result<Nvml, Absent> {
    Nvml::init().map_err(|e| no_driver(&e))
}

/// The driver's index of the card that the computing library calls by `ordinal`.
fn locate(nvml: &Nvml, ordinal: u32) -> Result<u32, Absent> {
    let wanted = wanted(
        ordinal,
        std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(),
    )
    .map_err(|reason| Absent {
        reason,
        remedy:
            "`nvidia-smi -L` lists the devices; CUDA_VISIBLE_DEVICES takes their numbers or UUIDs"
                .to_string(),
    })?;
    let devices = || -> Result<Vec<(String, String)>, NvmlError> {
        let each = |index| {
            nvml.device_by_index(index)
                .and_then(|device| Ok((device.uuid()?, device.name()?)))
        };
        (0..nvml.device_count()?).map(each).collect()
    };
    match wanted {
        Wanted::Uuid(start) => {
            let devices = devices().map_err(|e| no_driver(&e))?;
            let found = devices
                .iter()
                .position(|(uuid, _)| uuid.starts_with(&start));
            found.map(|index| index as u32).ok_or_else(|| Absent {
                reason: format!(
                    "the driver knows no device `{start}`, which CUDA_VISIBLE_DEVICES names"
                ),
                remedy: "`nvidia-smi -L` lists the devices".to_string(),
            })
        }
        Wanted::Index(index) => {
            let ordered =
                std::env::var("CUDA_DEVICE_ORDER").is_ok_and(|order| order == "PCI_BUS_ID");
            let devices = devices().unwrap_or_default();
            if !ordered && devices.iter().any(|(_, name)| *name != devices[0].1) {
                return Err(Absent {
                    reason: "the cards differ, and CUDA numbers them by speed where the driver numbers them by place".to_string(),
                    remedy: "`export CUDA_DEVICE_ORDER=PCI_BUS_ID`, then choose the card again".to_string(),
                });
            }
            Ok(index)
        }
    }
}

fn no_driver(source: &NvmlError) -> Absent {
    Absent {
        reason: format!("no NVIDIA driver: {source}"),
        remedy: "install the NVIDIA driver (libnvidia-ml.so.1), or start the container with `--gpus all`".to_string(),
    }
}

fn unknown_device(index: u32, source: &NvmlError) -> Absent {
    Absent {
        reason: format!("the driver knows no device {index}: {source}"),
        remedy: "`nvidia-smi -L` lists the devices".to_string(),
    }
}

fn no_figure(index: u32, counter: &str, power: &str) -> Absent {
    Absent {
        reason: format!("device {index} gives neither its energy ({counter}) nor its power ({power})"),
        remedy: "counters exist on Volta and newer, power on most cards; a slice of a card has neither: use the counted meter"
            .to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that answers with each of these in turn.
    fn answers(values: &[Result<u64, &str>]) -> Ask {
        let mut values: Vec<_> = values
            .iter()
            .map(|value| value.map_err(str::to_string))
            .rev()
            .collect();
        Box::new(move || values.pop().unwrap_or(Err("asked too often".to_string())))
    }

    fn sensor(
        energy: &[Result<u64, &str>],
        power: &[Result<u64, &str>],
    ) -> Result<NvmlSensor, Absent> {
        NvmlSensor::start(
            3,
            "NVIDIA Test".to_string(),
            "GPU-1".to_string(),
            answers(energy),
            answers(power),
        )
    }

    #[test]
    fn the_counter_is_used_where_there_is_one() {
        // Millijoules since the driver was loaded: 5 J went by.
        let mut volta = sensor(&[Ok(7_000), Ok(12_000), Err("busy"), Ok(12_500)], &[]).unwrap();
        assert_eq!(
            volta.read_at(Duration::from_secs(1)),
            Ok(MicroJoules(5_000_000))
        );
        // What a failed reading missed is in the next one.
        assert!(!volta.read_at(Duration::from_secs(2)).unwrap_err().lost);
        assert_eq!(
            volta.read_at(Duration::from_secs(3)),
            Ok(MicroJoules(5_500_000))
        );
        assert_eq!((volta.unread_at_most(), volta.device()), (None, "GPU-1"));
    }

    #[test]
    fn a_driver_that_was_loaded_anew_is_a_gap() {
        let mut sensor = sensor(&[Ok(9_000), Ok(10), Ok(20)], &[]).unwrap();
        assert!(sensor.read_at(Duration::from_secs(1)).unwrap_err().lost);
        assert_eq!(
            sensor.read_at(Duration::from_secs(2)),
            Ok(MicroJoules(10_000))
        );
    }

    #[test]
    fn an_older_card_has_its_power_integrated() {
        // 100 W, then 200 W a second later: 150 J; then 200 W for a second more.
        let mut pascal = sensor(
            &[Err("not supported")],
            &[Ok(100_000), Ok(200_000), Ok(200_000)],
        )
        .unwrap();
        assert!(pascal.covers().contains("sampled"));
        assert_eq!(pascal.unread_at_most(), Some(SAMPLE));
        assert_eq!(
            pascal.read_at(Duration::from_secs(1)),
            Ok(MicroJoules(150_000_000))
        );
        assert_eq!(
            pascal.read_at(Duration::from_secs(2)),
            Ok(MicroJoules(350_000_000))
        );
    }

    #[test]
    fn a_card_that_gives_nothing_is_absent_with_both_reasons() {
        let absent = sensor(&[Err("not supported")], &[Err("no permission")])
            .err()
            .unwrap();
        assert!(
            absent.reason.contains("not supported") && absent.reason.contains("no permission"),
            "{}",
            absent.reason
        );
    }
}
