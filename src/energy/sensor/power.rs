//! Energy from sampled power, for a device without an energy counter.
//!
//! Integrates watts over time by the trapezoidal rule. Never interpolates over more than
//! [`MAX_SAMPLE_GAP`]: energy in a longer gap is lost and reported as such.

use std::time::Duration;

use super::Gap;

/// Longest interval between two samples that is interpolated.
pub(super) const MAX_SAMPLE_GAP: Duration = Duration::from_secs(30);

/// Integral of power over time.
#[derive(Debug, Clone)]
pub(super) struct PowerIntegral {
    last_sample: Duration,
    watts: f64,
    /// Microjoules, unrounded.
    total: f64,
}

impl PowerIntegral {
    /// Starts at the first sample.
    pub fn new(watts: f64, at: Duration) -> PowerIntegral {
        PowerIntegral {
            last_sample: at,
            watts,
            total: 0.0,
        }
    }

    /// Adds a sample; returns the microjoules since the first.
    pub fn add_sample(&mut self, watts: f64, at: Duration) -> Result<u64, Gap> {
        let interval = at.saturating_sub(self.last_sample);
        let mean = (std::mem::replace(&mut self.watts, watts) + watts) / 2.0;
        self.last_sample = at;
        if interval > MAX_SAMPLE_GAP {
            let seconds = interval.as_secs();
            return Err(Gap::lost(format!(
                "the power was not sampled for {seconds} s"
            )));
        }
        self.total += mean * interval.as_secs_f64() * 1e6;
        Ok(self.total.round() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_and_linear_power_are_integrated_exactly() {
        // 250 W for 4 s is 1000 J; then 250 W to 350 W over 2 s has mean 300 W: 600 J more.
        let mut integral = PowerIntegral::new(250.0, Duration::ZERO);
        for quarter in 1..=16 {
            let at = Duration::from_millis(250 * quarter);
            integral.add_sample(250.0, at).unwrap();
        }
        for tenth in 1..=20 {
            let at = Duration::from_millis(4000 + 100 * tenth);
            integral.add_sample(250.0 + 5.0 * tenth as f64, at).unwrap();
        }
        let total = integral.add_sample(350.0, Duration::from_secs(6));
        assert_eq!(total, Ok(1_600_000_000));
    }

    #[test]
    fn a_long_gap_is_not_interpolated() {
        let mut integral = PowerIntegral::new(100.0, Duration::ZERO);
        let gap = integral
            .add_sample(100.0, Duration::from_secs(31))
            .unwrap_err();
        assert!(gap.lost && gap.reason.contains("31 s"));
        let total = integral.add_sample(100.0, Duration::from_secs(32));
        assert_eq!(total, Ok(100_000_000));
    }
}
