//! Energy of an NVIDIA graphics processor, from its driver.
//!
//! Owns the driver's total-energy counter (millijoules since the driver was loaded, Volta and newer). The library is loaded at
//! run time: without it the sensor is absent, with the reason. A counter that falls was reset with its driver: a gap. Knows
//! nothing of which process draws the power.

use std::time::Instant;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::{Absent, Availability, Counter, Gap, Sensor, State};
use crate::units::MicroJoules;

/// Watts that no device draws.
const CEILING_W: f64 = 3000.0;

/// One graphics processor.
pub struct NvmlSensor {
    nvml: Nvml,
    index: u32,
    name: String,
    device: String,
    counter: Counter,
    opened: Instant,
}

impl NvmlSensor {
    /// The device of this index, in the driver's order.
    pub fn open(index: u32) -> Result<NvmlSensor, Absent> {
        let nvml = Nvml::init().map_err(|e| no_driver(&e))?;
        let opened = Instant::now();
        let device = nvml.device_by_index(index).and_then(|device| device.name()).map_err(|e| no_counter(index, &e))?;
        let first = read_microjoules(&nvml, index).map_err(|e| no_counter(index, &e))?;
        let counter = Counter::new(None, CEILING_W, first, opened.elapsed());
        Ok(NvmlSensor { nvml, index, name: format!("nvml:{index}"), device, counter, opened })
    }

    /// The name the driver gives the device ("NVIDIA H100 80GB HBM3"): what `Profile::of_gpu` takes.
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl Sensor for NvmlSensor {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        let raw =
            read_microjoules(&self.nvml, self.index).map_err(|e| Gap { reason: format!("the driver gave no energy: {e}") })?;
        self.counter.advance(raw, self.opened.elapsed()).map(MicroJoules)
    }
}

fn read_microjoules(nvml: &Nvml, index: u32) -> Result<u64, NvmlError> {
    let millijoules = nvml.device_by_index(index)?.total_energy_consumption()?;
    Ok(millijoules.saturating_mul(1000))
}

/// The name the driver gives the device of this index, whether or not it has a counter.
pub fn gpu_name(index: u32) -> Result<String, Absent> {
    let nvml = Nvml::init().map_err(|e| no_driver(&e))?;
    nvml.device_by_index(index).and_then(|device| device.name()).map_err(|e| Absent {
        reason: format!("the driver knows no device {index}: {e}"),
        remedy: "`nvidia-smi -L` lists the devices".to_string(),
    })
}

/// Every device of the driver, or the reason why there is none.
pub(super) fn probe() -> Vec<Availability> {
    let count = match Nvml::init().map_err(|e| no_driver(&e)).and_then(|nvml| nvml.device_count().map_err(|e| no_driver(&e))) {
        Ok(count) => count,
        Err(absent) => {
            return vec![Availability {
                name: "nvml".to_string(),
                covers: "NVIDIA graphics processors".to_string(),
                state: State::Absent(absent),
            }];
        }
    };
    let each = |index| match NvmlSensor::open(index) {
        Ok(sensor) => Availability { name: sensor.name.clone(), covers: sensor.device.clone(), state: State::Available },
        Err(absent) => Availability {
            name: format!("nvml:{index}"),
            covers: "an NVIDIA graphics processor".to_string(),
            state: State::Absent(absent),
        },
    };
    (0..count).map(each).collect()
}

fn no_driver(source: &NvmlError) -> Absent {
    Absent {
        reason: format!("no NVIDIA driver: {source}"),
        remedy: "install the NVIDIA driver (libnvidia-ml.so.1), or start the container with `--gpus all`".to_string(),
    }
}

fn no_counter(index: u32, source: &NvmlError) -> Absent {
    Absent {
        reason: format!("device {index} has no energy counter: {source}"),
        remedy: "counters exist on Volta and newer; `nvidia-smi -L` lists the devices; else use the counted meter".to_string(),
    }
}
