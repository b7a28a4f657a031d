//! Attribution of a machine-wide counter to a process that may use some of its CPUs.
//!
//! Scales a sensor's energy by allowed CPUs over all CPUs. This is an attribution, not a
//! measurement: the energy of other processes is attributed in the same proportion. `covers` states
//! it.

use std::time::Duration;

use super::{Gap, Sensor};
use crate::units::{MicroJoules, Watts};

/// A sensor and the share of its energy attributed to this process.
pub struct AttributedSensor {
    sensor: Box<dyn Sensor>,
    allowed: usize,
    all: usize,
}

impl AttributedSensor {
    /// Attributes `allowed` of `all` CPUs, clamped to 1..=all.
    pub fn new(sensor: Box<dyn Sensor>, allowed: usize, all: usize) -> AttributedSensor {
        let all = all.max(1);
        let allowed = allowed.clamp(1, all);
        AttributedSensor {
            sensor,
            allowed,
            all,
        }
    }
}

impl Sensor for AttributedSensor {
    fn name(&self) -> &str {
        self.sensor.name()
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        let energy = u128::from(self.sensor.read()?.0);
        Ok(MicroJoules(
            (energy * self.allowed as u128 / self.all as u128) as u64,
        ))
    }

    fn covers(&self) -> String {
        format!(
            "{}; attributed, not measured: the share of {} of {} CPUs",
            self.sensor.covers(),
            self.allowed,
            self.all
        )
    }

    fn device(&self) -> &str {
        self.sensor.device()
    }

    fn max_read_interval(&self) -> Option<Duration> {
        self.sensor.max_read_interval()
    }

    fn max_power(&self) -> Option<Watts> {
        self.sensor.max_power()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u64);

    impl Sensor for Fixed {
        fn name(&self) -> &str {
            "rapl"
        }

        fn read(&mut self) -> Result<MicroJoules, Gap> {
            Ok(MicroJoules(self.0))
        }

        fn covers(&self) -> String {
            "package-0".to_string()
        }
    }

    #[test]
    fn energy_is_shared_by_cpu_count() {
        // 2 of 64 CPUs: 1/32, without overflow for large counters.
        let mut share = AttributedSensor::new(Box::new(Fixed(u64::MAX)), 2, 64);
        assert_eq!(share.read(), Ok(MicroJoules(u64::MAX / 32)));
        assert_eq!(share.name(), "rapl");
        assert_eq!(
            share.covers(),
            "package-0; attributed, not measured: the share of 2 of 64 CPUs"
        );
        let mut all = AttributedSensor::new(Box::new(Fixed(10)), 9, 4);
        assert_eq!(all.read(), Ok(MicroJoules(10)));
    }
}
