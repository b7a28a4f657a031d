//! Hardware energy counters.
//!
//! The only access to the machine's counters: a [`Sensor`] returns the microjoules since it was
//! opened, or a [`Gap`] when it cannot. A sensor that cannot be opened is [`Absent`], with a reason
//! and a remedy. An unreadable counter never reads as zero. Independent of measurement windows,
//! work and budgets.

mod attributed;
mod counter;
mod nvml;
mod nvml_device;
mod power;
mod rapl;
mod zones;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use attributed::AttributedSensor;
pub use nvml::{NvmlSensor, gpu_name};
pub use rapl::RaplSensor;

use counter::{Counter, CounterLimits};

use crate::units::{MicroJoules, Seconds, Watts};

/// An energy counter.
pub trait Sensor: Send {
    /// "rapl", "nvml:0".
    fn name(&self) -> &str;

    /// Energy since the sensor was opened; monotonic. Energy lost in a [`Gap::lost`] appears in no
    /// later reading; after any other gap the next reading includes it.
    fn read(&mut self) -> Result<MicroJoules, Gap>;

    /// The parts it sums ("package-0, dram of package-0").
    fn covers(&self) -> String {
        String::new()
    }

    /// Identifier of the device ("GPU-5f1b..."): two sensors of one device are counted once.
    fn device(&self) -> &str {
        self.name()
    }

    /// Longest time between two readings without loss of energy; `None` if unlimited.
    fn max_read_interval(&self) -> Option<Duration> {
        None
    }

    /// Power that the device never exceeds; `None` if unknown.
    fn max_power(&self) -> Option<Watts> {
        None
    }
}

/// A failed or implausible reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Cause.
    pub reason: String,
    /// True if the energy since the last good reading is unknown for good; false if the next good
    /// reading includes it.
    pub lost: bool,
}

impl Gap {
    /// A gap whose energy is lost.
    pub fn lost(reason: impl Into<String>) -> Gap {
        let reason = reason.into();
        Gap { reason, lost: true }
    }

    /// A failed reading of a counter that continues to count.
    pub fn unread(reason: impl Into<String>) -> Gap {
        let reason = reason.into();
        Gap {
            reason,
            lost: false,
        }
    }
}

/// Why a sensor cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    /// Cause.
    pub reason: String,
    /// What to type or change.
    pub remedy: String,
    /// It can be read, and its readings are not credible: worth a warning where it was to be used.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub distrusted: bool,
}

impl Absent {
    /// A sensor that is missing or unreadable.
    pub fn new(reason: impl Into<String>, remedy: impl Into<String>) -> Absent {
        Absent {
            reason: reason.into(),
            remedy: remedy.into(),
            distrusted: false,
        }
    }

    /// The sensor of `what`, which showed no credible energy for `patience`.
    fn standing_still(what: &str, patience: Duration) -> Absent {
        let seconds = Seconds(patience.as_secs_f64());
        let reason =
            format!("the counter of {what} showed no energy for {seconds}: it stands still");
        let remedy = format!(
            "virtual machines have such counters: write `meter = \"counted\"` in [energy]; for a counter that moves only every few seconds write `meter = \"measured\"`, which waits up to {}",
            Seconds(PATIENCE_IF_MEASURED.as_secs_f64())
        );
        Absent {
            distrusted: true,
            ..Absent::new(reason, remedy)
        }
    }
}

/// Time given to a counter to move once, where the measured meter is requested.
pub const PATIENCE_IF_MEASURED: Duration = Duration::from_secs(5);
/// The same, where any meter may decide.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Calls `has_moved` until it holds; false if it does not within `patience`. Real counters move
/// within milliseconds.
fn wait_until(patience: Duration, mut has_moved: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !has_moved() {
        if start.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Whether a sensor can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Opened and read.
    Available,
    /// Not usable.
    Absent(Absent),
}

/// A sensor as listed by `devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Availability {
    /// "rapl", "nvml:0".
    pub name: String,
    /// Parts it sums ("package-0, dram of package-0", "NVIDIA T4, energy counter").
    pub covers: String,
    /// Further counters that are not summed, each with its reason.
    pub left_out: Vec<String>,
    /// Whether it can be used.
    pub state: State,
}

impl Availability {
    fn absent(name: impl Into<String>, covers: &str, absent: Absent) -> Availability {
        Availability {
            name: name.into(),
            covers: covers.to_string(),
            left_out: Vec::new(),
            state: State::Absent(absent),
        }
    }
}

/// Tries every supported sensor on this machine.
pub fn probe() -> Vec<Availability> {
    let rapl = match RaplSensor::open_default(PATIENCE) {
        Ok(sensor) => Availability {
            name: "rapl".to_string(),
            covers: sensor.covers(),
            left_out: sensor.left_out().to_vec(),
            state: State::Available,
        },
        Err(absent) => Availability::absent("rapl", "processor and memory", absent),
    };
    std::iter::once(rapl).chain(nvml::probe()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_sensor_has_a_reason_and_a_remedy() {
        for Availability { name, state, .. } in probe() {
            if let State::Absent(Absent { reason, remedy, .. }) = state {
                assert!(!reason.is_empty() && !remedy.is_empty(), "{name}");
            }
        }
    }
}
