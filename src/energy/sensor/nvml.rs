//! Energy of an NVIDIA GPU, from its driver (NVML).
//!
//! Reads the driver's total-energy counter (millijoules since the driver was loaded, Volta and
//! newer) or, on older GPUs and where the counter stands still, integrates sampled power. Without the library the sensor is absent,
//! with the reason. A decreasing counter was reset with its driver: a gap. The counter covers the
//! GPU, not one process; `nvml_device` finds the GPU that CUDA uses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::nvml_device::{driver, no_driver, nvml_index};
use super::power::PowerIntegral;
use super::{
    Absent, Availability, Counter, CounterLimits, Gap, PATIENCE, Sensor, State, wait_until,
};
use crate::units::{MicroJoules, Watts};

/// Watts no device draws.
const MAX_POWER_W: f64 = 3000.0;
/// The driver updates the counter ten to fifty times a second, occasionally later.
const UPDATE_LAG: Duration = Duration::from_secs(1);
/// Longest interval between power samples; the sampler reads three times within it, every 200 ms.
const MAX_SAMPLE_INTERVAL: Duration = Duration::from_millis(600);

/// Reads millijoules or milliwatts from a device.
type ReadFn = Box<dyn FnMut() -> Result<u64, String> + Send>;

/// The energy of one GPU.
pub struct NvmlSensor {
    name: String,
    title: String,
    uuid: String,
    read_raw: ReadFn,
    source: Source,
    /// Reads the power, where `source` is a counter.
    read_power: Option<ReadFn>,
    opened: Instant,
}

/// What `read_raw` returns.
#[derive(Debug)]
enum Source {
    /// Millijoules of the driver's counter.
    Counter(Counter),
    /// Milliwatts, to be integrated, and why.
    Power(PowerIntegral, &'static str),
}

impl NvmlSensor {
    /// The GPU that CUDA calls `ordinal`.
    pub fn open(ordinal: u32) -> Result<NvmlSensor, Absent> {
        let nvml = driver()?;
        let index = nvml_index(&nvml, ordinal)?;
        Self::open_index(Arc::new(nvml), index)
    }

    /// As `open`, once the counter has moved; sampled power in place of one that does not within
    /// `patience`.
    ///
    /// # Errors
    /// Also a GPU without any credible reading.
    pub fn open_moving(ordinal: u32, patience: Duration) -> Result<NvmlSensor, Absent> {
        Self::open(ordinal)?.moving(patience)
    }

    fn moving(mut self, patience: Duration) -> Result<NvmlSensor, Absent> {
        if let Some(mut power) = self.read_power.take() {
            if wait_until(patience, || self.read().is_ok_and(|energy| energy.0 > 0)) {
                return Ok(self);
            }
            let watts = power().map_or(0.0, |milliwatts| milliwatts as f64 / 1000.0);
            let integral = PowerIntegral::new(watts, self.opened.elapsed());
            self.source = Source::Power(integral, "its energy counter stands still");
            self.read_raw = power;
        }
        if (self.read_raw)().is_ok_and(|milliwatts| milliwatts > 0) {
            Ok(self)
        } else {
            Err(Absent::standing_still(&self.title, patience))
        }
    }

    /// The GPU of this NVML index.
    fn open_index(nvml: Arc<Nvml>, index: u32) -> Result<NvmlSensor, Absent> {
        let (title, uuid) = nvml
            .device_by_index(index)
            .and_then(|device| Ok((device.name()?, device.uuid()?)))
            .map_err(|e| unknown_device(index, &e))?;
        let shared = Arc::clone(&nvml);
        let energy = Box::new(move || {
            let device = shared.device_by_index(index);
            let energy = device.and_then(|device| device.total_energy_consumption());
            energy.map_err(|e| e.to_string())
        });
        let power = Box::new(move || {
            let device = nvml.device_by_index(index);
            let power = device.and_then(|device| device.power_usage());
            power.map(u64::from).map_err(|e| e.to_string())
        });
        Self::start(index, title, uuid, energy, power)
    }

    /// Uses the energy counter if the device has one, else sampled power.
    fn start(
        index: u32,
        title: String,
        uuid: String,
        mut energy: ReadFn,
        mut power: ReadFn,
    ) -> Result<NvmlSensor, Absent> {
        let limits = CounterLimits {
            wrap_range: None,
            max_power_w: MAX_POWER_W,
            min_power_w: 0.0,
            update_lag: UPDATE_LAG,
        };
        let (read_raw, source, read_power) = match energy() {
            Ok(first) => {
                let counter = Counter::new(limits, first.saturating_mul(1000), Duration::ZERO);
                (energy, Source::Counter(counter), Some(power))
            }
            Err(no_energy) => {
                let first = power().map_err(|no_power| no_reading(index, &no_energy, &no_power))?;
                let integral = PowerIntegral::new(first as f64 / 1000.0, Duration::ZERO);
                (power, Source::Power(integral, "no energy counter"), None)
            }
        };
        Ok(NvmlSensor {
            name: format!("nvml:{index}"),
            title,
            uuid,
            read_raw,
            source,
            read_power,
            opened: Instant::now(),
        })
    }

    /// Energy since the sensor was opened; `elapsed` is the time since then.
    fn read_at(&mut self, elapsed: Duration) -> Result<MicroJoules, Gap> {
        let raw = (self.read_raw)()
            .map_err(|e| Gap::unread(format!("the driver gave no reading: {e}")))?;
        let energy = match &mut self.source {
            Source::Counter(counter) => counter.update(raw.saturating_mul(1000), elapsed),
            Source::Power(integral, _) => integral.add_sample(raw as f64 / 1000.0, elapsed),
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
        match self.source {
            Source::Counter(_) => format!("{}, energy counter", self.title),
            Source::Power(_, why) => format!("{}, {why}: its power is sampled", self.title),
        }
    }

    fn device(&self) -> &str {
        &self.uuid
    }

    fn max_read_interval(&self) -> Option<Duration> {
        matches!(self.source, Source::Power(..)).then_some(MAX_SAMPLE_INTERVAL)
    }

    fn max_power(&self) -> Option<Watts> {
        Some(Watts(MAX_POWER_W))
    }
}

/// The driver's name for the GPU that CUDA calls `ordinal`, with or without an energy counter.
pub fn gpu_name(ordinal: u32) -> Result<String, Absent> {
    let nvml = driver()?;
    let index = nvml_index(&nvml, ordinal)?;
    nvml.device_by_index(index)
        .and_then(|device| device.name())
        .map_err(|e| unknown_device(index, &e))
}

/// Every GPU of the driver, or one entry that says why there is none.
pub(super) fn probe() -> Vec<Availability> {
    list_gpus().unwrap_or_else(|absent| {
        vec![Availability::absent(
            "nvml",
            "NVIDIA graphics processors",
            absent,
        )]
    })
}

fn list_gpus() -> Result<Vec<Availability>, Absent> {
    let nvml = Arc::new(driver()?);
    let count = nvml.device_count().map_err(|e| no_driver(&e))?;
    let open = |index| NvmlSensor::open_index(Arc::clone(&nvml), index)?.moving(PATIENCE);
    let gpu = |index| match open(index) {
        Ok(sensor) => Availability {
            name: sensor.name.clone(),
            covers: sensor.covers(),
            left_out: Vec::new(),
            state: State::Available,
        },
        Err(absent) => {
            let name = format!("nvml:{index}");
            Availability::absent(name, "an NVIDIA graphics processor", absent)
        }
    };
    Ok((0..count).map(gpu).collect())
}

fn unknown_device(index: u32, source: &NvmlError) -> Absent {
    Absent::new(
        format!("the driver knows no device {index}: {source}"),
        "`nvidia-smi -L` lists the devices",
    )
}

fn no_reading(index: u32, energy: &str, power: &str) -> Absent {
    Absent::new(
        format!("device {index} gives neither its energy ({energy}) nor its power ({power})"),
        "counters exist on Volta and newer, power on most GPUs; a MIG slice has neither: use the counted meter",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns these readings one after another.
    fn scripted(readings: &[Result<u64, &str>]) -> ReadFn {
        let readings: Vec<_> = readings.iter().map(|r| r.map_err(str::to_string)).collect();
        let mut readings = readings.into_iter();
        Box::new(move || {
            readings
                .next()
                .unwrap_or(Err("no more readings".to_string()))
        })
    }

    fn sensor(
        energy: &[Result<u64, &str>],
        power: &[Result<u64, &str>],
    ) -> Result<NvmlSensor, Absent> {
        let title = "NVIDIA Test".to_string();
        NvmlSensor::start(
            3,
            title,
            "GPU-1".to_string(),
            scripted(energy),
            scripted(power),
        )
    }

    fn read(sensor: &mut NvmlSensor, seconds: u64) -> Result<MicroJoules, Gap> {
        sensor.read_at(Duration::from_secs(seconds))
    }

    #[test]
    fn the_energy_counter_is_preferred() {
        // Millijoules since the driver was loaded: 5 J.
        let mut volta = sensor(&[Ok(7_000), Ok(12_000), Err("busy"), Ok(12_500)], &[]).unwrap();
        assert_eq!(read(&mut volta, 1), Ok(MicroJoules(5_000_000)));
        // The reading after a failed one includes its energy.
        assert!(!read(&mut volta, 2).unwrap_err().lost);
        assert_eq!(read(&mut volta, 3), Ok(MicroJoules(5_500_000)));
        assert_eq!((volta.max_read_interval(), volta.device()), (None, "GPU-1"));
    }

    #[test]
    fn a_counter_that_stands_still_is_replaced_by_power() {
        let still = || sensor(&[Ok(7_000), Ok(7_000)], &[Ok(100_000), Ok(100_000)]);
        let sampled = still().unwrap().moving(Duration::ZERO).unwrap();
        assert_eq!(
            sampled.covers(),
            "NVIDIA Test, its energy counter stands still: its power is sampled"
        );
        let moving = sensor(&[Ok(7_000), Ok(7_001)], &[]).unwrap();
        let counted = moving.moving(Duration::ZERO).unwrap();
        assert_eq!(counted.covers(), "NVIDIA Test, energy counter");
        let no_power = sensor(&[Ok(0), Ok(0)], &[Ok(0), Ok(0)]).unwrap();
        let absent = no_power.moving(Duration::ZERO).err().unwrap();
        assert!(
            absent.distrusted && absent.reason.contains("NVIDIA Test"),
            "{absent:?}"
        );
    }

    #[test]
    fn a_reloaded_driver_is_a_gap() {
        let mut sensor = sensor(&[Ok(9_000), Ok(10), Ok(20)], &[]).unwrap();
        assert!(read(&mut sensor, 1).unwrap_err().lost);
        assert_eq!(read(&mut sensor, 2), Ok(MicroJoules(10_000)));
    }

    #[test]
    fn power_is_integrated_without_a_counter() {
        // 100 W, then 200 W a second later: 150 J; then 200 W for a second more.
        let samples = [Ok(100_000), Ok(200_000), Ok(200_000)];
        let mut pascal = sensor(&[Err("not supported")], &samples).unwrap();
        assert!(pascal.covers().contains("sampled"));
        assert_eq!(pascal.max_read_interval(), Some(MAX_SAMPLE_INTERVAL));
        assert_eq!(read(&mut pascal, 1), Ok(MicroJoules(150_000_000)));
        assert_eq!(read(&mut pascal, 2), Ok(MicroJoules(350_000_000)));
    }

    #[test]
    fn a_gpu_without_readings_is_absent_with_both_reasons() {
        let absent = sensor(&[Err("not supported")], &[Err("no permission")]);
        let reason = absent.err().unwrap().reason;
        assert!(
            reason.contains("not supported") && reason.contains("no permission"),
            "{reason}"
        );
    }
}
