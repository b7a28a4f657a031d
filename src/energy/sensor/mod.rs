//! Hardware energy counters.
//!
//! Owns the one seam to the machine: a `Sensor` gives microjoules since it was opened, or says that it cannot (`Gap`), and a
//! sensor that cannot be opened is `Absent` with a reason and a remedy. Never returns a zero for what it could not read. Knows
//! nothing of windows, work or budgets.

mod nvml;
mod rapl;

use std::time::Duration;

use serde::Serialize;

pub use nvml::{NvmlSensor, gpu_name};
pub use rapl::RaplSensor;

use crate::units::MicroJoules;

/// An energy counter.
pub trait Sensor: Send {
    /// "rapl", "nvml:0".
    fn name(&self) -> &str;

    /// Energy since the sensor was opened; it never falls.
    fn read(&mut self) -> Result<MicroJoules, Gap>;
}

/// A reading that could not be had, or not be trusted. What was spent since the last good one is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Why.
    pub reason: String,
}

/// Why a sensor cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
    /// What it measures ("package-0, dram", "NVIDIA T4").
    pub covers: String,
    /// Whether it can be used.
    pub state: State,
}

/// Every sensor this program knows of, tried on this machine.
pub fn probe() -> Vec<Availability> {
    let rapl = match RaplSensor::open_default() {
        Ok(sensor) => Availability { name: "rapl".to_string(), covers: sensor.covers(), state: State::Available },
        Err(absent) => {
            Availability { name: "rapl".to_string(), covers: "processor and memory".to_string(), state: State::Absent(absent) }
        }
    };
    std::iter::once(rapl).chain(nvml::probe()).collect()
}

/// A counter that rises, may wrap at `range`, and may be reset: turns raw readings into energy since the first.
#[derive(Debug, Clone)]
struct Counter {
    /// The value at which it wraps; `None` for one that does not.
    range: Option<u64>,
    /// Energy per second beyond which a difference cannot be true, in watts.
    ceiling: f64,
    last: u64,
    /// When `last` was read.
    at: Duration,
    total: u64,
}

impl Counter {
    fn new(range: Option<u64>, ceiling: f64, first: u64, at: Duration) -> Counter {
        Counter { range, ceiling, last: first, at, total: 0 }
    }

    /// Follows the counter to `raw`, read at `at`. A fall that is no plausible wrap is a reset: counting goes on from `raw`, and
    /// the energy in between is unknown. So it is after so long a silence that the counter may have wrapped unseen.
    fn advance(&mut self, raw: u64, at: Duration) -> Result<u64, Gap> {
        let most = self.ceiling * (at.saturating_sub(self.at)).as_secs_f64() * 1e6;
        let (last, silent) = (std::mem::replace(&mut self.last, raw), most);
        self.at = at;
        if self.range.is_some_and(|range| silent > range as f64) {
            return Err(Gap { reason: "the counter was not read for so long that it may have wrapped around".to_string() });
        }
        let risen = match self.range {
            _ if raw >= last => raw - last,
            Some(range) if last <= range => (range - last).saturating_add(raw),
            _ => return Err(reset()),
        };
        // One reading's worth of slack: counters tick in steps, and the clock is read a little after them.
        if raw < last && risen as f64 > most + self.ceiling * 1e4 {
            return Err(reset());
        }
        self.total = self.total.saturating_add(risen);
        Ok(self.total)
    }
}

fn reset() -> Gap {
    Gap { reason: "the counter fell back and was not at its end: it was reset".to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn a_counter_wraps_at_its_range() {
        // 100 J range, at most 20 W. 95 J -> 3 J in one second: 8 J went by (range 100: 5 J to the end, 3 J after).
        let mut counter = Counter::new(Some(100_000_000), 20.0, 95_000_000, seconds(0));
        assert_eq!(counter.advance(3_000_000, seconds(1)), Ok(8_000_000));
        assert_eq!(counter.advance(4_000_000, seconds(2)), Ok(9_000_000));
    }

    #[test]
    fn a_reset_is_a_gap_and_adds_nothing() {
        // 50 J -> 1 J in one second would be 51 J at most 20 W: no wrap, a reset.
        let mut counter = Counter::new(Some(100_000_000), 20.0, 50_000_000, seconds(0));
        assert!(counter.advance(1_000_000, seconds(1)).is_err());
        assert_eq!(counter.advance(3_000_000, seconds(2)), Ok(2_000_000));
        let mut unwrapping = Counter::new(None, 20.0, 50, seconds(0));
        assert!(unwrapping.advance(1, seconds(1)).is_err());
    }

    #[test]
    fn a_long_silence_is_a_gap() {
        // 20 W for 6 s is 120 J: the 100 J counter may have gone round.
        let mut counter = Counter::new(Some(100_000_000), 20.0, 0, seconds(0));
        assert!(counter.advance(5_000_000, seconds(6)).unwrap_err().reason.contains("wrapped"));
        assert_eq!(counter.advance(6_000_000, seconds(7)), Ok(1_000_000));
    }

    #[test]
    fn every_sensor_is_there_or_says_why_not() {
        for Availability { name, state, .. } in probe() {
            if let State::Absent(absent) = state {
                assert!(!absent.reason.is_empty() && !absent.remedy.is_empty(), "{name}");
            }
        }
    }
}
