//! A counter of the whole machine, for a process that may use a part of it.
//!
//! Owns the share: CPUs that the process may use over CPUs there are. Takes a sensor, returns its joules times that share. An attribution,
//! not a measurement: it gives idle and busy neighbours alike their part by head, and it says so in what it covers.

use std::time::Duration;

use super::{Gap, Sensor};
use crate::units::MicroJoules;

/// A sensor and the part of its joules that is this process's.
pub struct Attributed {
    sensor: Box<dyn Sensor>,
    allowed: usize,
    all: usize,
}

impl Attributed {
    /// `allowed` of `all` CPUs of what `sensor` shows; at least one of them, and no more than all.
    pub fn new(sensor: Box<dyn Sensor>, allowed: usize, all: usize) -> Attributed {
        Attributed {
            sensor,
            allowed: allowed.clamp(1, all.max(1)),
            all: all.max(1),
        }
    }
}

impl Sensor for Attributed {
    fn name(&self) -> &str {
        self.sensor.name()
    }

    fn read(&mut self) -> Result<MicroJoules, Gap> {
        let share = |energy: MicroJoules| {
            (u128::from(energy.0) * self.allowed as u128 / self.all as u128) as u64
        };
        self.sensor.read().map(share).map(MicroJoules)
    }

    fn covers(&self) -> String {
        let Attributed {
            sensor,
            allowed,
            all,
        } = self;
        format!(
            "{}; attributed, not measured: the share of {allowed} of {all} CPUs",
            sensor.covers()
        )
    }

    fn device(&self) -> &str {
        self.sensor.device()
    }

    fn unread_at_most(&self) -> Option<Duration> {
        self.sensor.unread_at_most()
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
    fn a_part_of_the_processors_gets_its_part_of_the_joules() {
        // 2 of 64: a thirty-second. Large counters do not overflow on the way.
        let mut share = Attributed::new(Box::new(Fixed(u64::MAX)), 2, 64);
        assert_eq!(share.read(), Ok(MicroJoules(u64::MAX / 32)));
        assert_eq!(
            (share.name(), share.covers().as_str()),
            (
                "rapl",
                "package-0; attributed, not measured: the share of 2 of 64 CPUs"
            )
        );
        assert_eq!(
            Attributed::new(Box::new(Fixed(10)), 9, 4).read(),
            Ok(MicroJoules(10))
        );
    }
}
