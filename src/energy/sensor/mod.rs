//! Hardware energy counters.
//!
//! Owns the one seam to the machine: a `Sensor` gives microjoules since it was opened, or says that it cannot (`Gap`), and a
//! sensor that cannot be opened is `Absent` with a reason and a remedy. Never returns a zero for what it could not read. Knows
//! nothing of windows, work or budgets.

mod attributed;
mod counter;
mod nvml;
mod power;
mod rapl;
mod visible;
mod zones;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use attributed::Attributed;
pub use nvml::{NvmlSensor, gpu_name};
pub use rapl::RaplSensor;

use counter::{Bounds, Counter};

use crate::units::MicroJoules;

/// An energy counter.
pub trait Sensor: Send {
    /// "rapl", "nvml:0".
    fn name(&self) -> &str;

    /// Energy since the sensor was opened; it never falls. What a `Gap` calls lost is in no later reading; after any other gap the next
    /// reading holds everything again.
    fn read(&mut self) -> Result<MicroJoules, Gap>;

    /// What it adds up, in words ("package-0, dram of package-0").
    fn covers(&self) -> String {
        String::new()
    }

    /// What it measures, as the device itself is known ("GPU-5f1b..."): two sensors of one device are one meter.
    fn device(&self) -> &str {
        self.name()
    }

    /// The longest it may be left unread without losing anything; `None` where that does not matter.
    fn unread_at_most(&self) -> Option<Duration> {
        None
    }
}

/// A reading that could not be had, or not be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Why.
    pub reason: String,
    /// What was spent since the last good reading will never be known. Else the next good reading holds it.
    pub lost: bool,
}

impl Gap {
    /// A gap whose energy is lost.
    pub fn lost(reason: impl Into<String>) -> Gap {
        Gap {
            reason: reason.into(),
            lost: true,
        }
    }

    /// A reading that failed; the counter went on.
    pub fn unread(reason: impl Into<String>) -> Gap {
        Gap {
            reason: reason.into(),
            lost: false,
        }
    }
}

/// Why a sensor cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    /// What was found.
    pub reason: String,
    /// What to type or change.
    pub remedy: String,
}

/// Whether a sensor can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was opened and read.
    Available,
    /// It was not.
    Absent(Absent),
}

/// One line of `devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Availability {
    /// "rapl", "nvml:0".
    pub name: String,
    /// What it measures ("package-0, dram of package-0", "NVIDIA T4, energy counter").
    pub covers: String,
    /// What was found beside that and is not added, each with its reason.
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

/// Every sensor this program knows of, tried on this machine.
pub fn probe() -> Vec<Availability> {
    let rapl = match RaplSensor::open_default() {
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
    fn every_sensor_is_there_or_says_why_not() {
        for Availability { name, state, .. } in probe() {
            if let State::Absent(absent) = state {
                assert!(
                    !absent.reason.is_empty() && !absent.remedy.is_empty(),
                    "{name}"
                );
            }
        }
    }
}
