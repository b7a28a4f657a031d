//! Energy from sampled power, for a device without an energy counter.
//!
//! Owns the trapezoid between two samples. Takes watts with the time of their reading, returns microjoules since the first sample. Never
//! draws a line over a silence longer than `SILENCE`: what was spent in it is lost, and said to be.

use std::time::Duration;

use super::Gap;

/// Beyond this the power between two samples is anybody's guess.
pub(super) const SILENCE: Duration = Duration::from_secs(30);

/// The integral of power over time.
#[derive(Debug, Clone)]
pub(super) struct Integral {
    at: Duration,
    watts: f64,
    /// Microjoules, with the fractions that single trapezoids leave.
    total: f64,
}

impl Integral {
    /// Begins with a first sample.
    pub fn new(watts: f64, at: Duration) -> Integral {
        Integral {
            at,
            watts,
            total: 0.0,
        }
    }

    /// The energy up to a new sample, in microjoules.
    pub fn advance(&mut self, watts: f64, at: Duration) -> Result<u64, Gap> {
        let since = at.saturating_sub(self.at);
        let mean = (std::mem::replace(&mut self.watts, watts) + watts) / 2.0;
        self.at = at;
        if since > SILENCE {
            return Err(Gap::lost(format!(
                "the power was not sampled for {} s",
                since.as_secs()
            )));
        }
        self.total += mean * since.as_secs_f64() * 1e6;
        Ok(self.total.round() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_and_rising_power_are_integrated_exactly() {
        // 250 W for 4 s is 1000 J; then a line from 250 W to 350 W in 2 s has the mean 300 W: 600 J more.
        let mut integral = Integral::new(250.0, Duration::ZERO);
        for quarter in 1..=16 {
            integral
                .advance(250.0, Duration::from_millis(250 * quarter))
                .unwrap();
        }
        for tenth in 1..=20 {
            let watts = 250.0 + 5.0 * tenth as f64;
            integral
                .advance(watts, Duration::from_millis(4000 + 100 * tenth))
                .unwrap();
        }
        assert_eq!(
            integral.advance(350.0, Duration::from_secs(6)),
            Ok(1_600_000_000)
        );
    }

    #[test]
    fn nothing_is_drawn_over_a_silence() {
        let mut integral = Integral::new(100.0, Duration::ZERO);
        let gap = integral
            .advance(100.0, Duration::from_secs(31))
            .unwrap_err();
        assert!(gap.lost && gap.reason.contains("31 s"));
        assert_eq!(
            integral.advance(100.0, Duration::from_secs(32)),
            Ok(100_000_000)
        );
    }
}
