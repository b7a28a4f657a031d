//! A raw hardware counter as energy since its first reading.
//!
//! Handles wrap-around, resets, implausible increments and counters that stand still. Takes raw
//! values with their read times, returns monotonic microjoules, or a [`Gap`] after which counting
//! continues from the new value. A counter may move as rarely as every few seconds: an increment is
//! judged by the time since the counter last moved.

use std::time::Duration;

use super::Gap;

/// Time without an increment after which a counter is taken to have stopped: several times the
/// period of the slowest ones.
const STANDSTILL: Duration = Duration::from_secs(12);
/// Time after which the mean power since the first reading is judged.
const JUDGED_AFTER: Duration = Duration::from_secs(1);

/// Limits by which a counter's readings are judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct CounterLimits {
    /// Value at which the counter wraps around; `None` if it never does.
    pub wrap_range: Option<u64>,
    /// Watts the device never draws, not even for a moment.
    pub max_power_w: f64,
    /// Watts the device always draws while its machine computes; 0 if there is no such figure.
    pub min_power_w: f64,
    /// Longest delay between consumption and the counter's update.
    pub update_lag: Duration,
}

impl CounterLimits {
    /// Largest plausible increment over `time`, in microjoules.
    fn max_increment(&self, time: Duration) -> f64 {
        self.max_power_w * time.as_secs_f64() * 1e6
    }

    /// Longest read interval in which it cannot wrap unnoticed; `None` if it never wraps.
    pub fn max_read_interval(&self) -> Option<Duration> {
        let range = self.wrap_range?;
        Some(Duration::from_secs_f64(
            range as f64 / 1e6 / self.max_power_w,
        ))
    }
}

/// Accumulates raw readings in microjoules into energy since the first.
#[derive(Debug, Clone)]
pub(super) struct Counter {
    limits: CounterLimits,
    last: u64,
    last_read: Duration,
    /// Read time of the last value that differed from the one before.
    last_moved: Duration,
    opened: Duration,
    total: u64,
    /// The mean power was below `min_power_w` at the last increment.
    too_low: bool,
}

impl Counter {
    pub fn new(limits: CounterLimits, first: u64, at: Duration) -> Counter {
        Counter {
            limits,
            last: first,
            last_read: at,
            last_moved: at,
            opened: at,
            total: 0,
            too_low: false,
        }
    }

    pub fn limits(&self) -> &CounterLimits {
        &self.limits
    }

    /// Whether it has shown any energy.
    pub fn has_moved(&self) -> bool {
        self.total > 0
    }

    /// Adds the increment up to `raw`, read at `at`; returns the microjoules since the first
    /// reading.
    ///
    /// # Errors
    /// A lost gap, after which counting continues from `raw`: a decrease that is no plausible
    /// wrap-around (a reset), an increment above `max_power_w`, or a read interval so long that the
    /// counter may have wrapped unnoticed. An unread gap: a counter that has stood still for too
    /// long, or that shows less than `min_power_w`.
    pub fn update(&mut self, raw: u64, at: Duration) -> Result<u64, Gap> {
        let interval = at.saturating_sub(self.last_read);
        let last = std::mem::replace(&mut self.last, raw);
        self.last_read = at;
        let since_moved = at.saturating_sub(self.last_moved);
        if raw != last {
            self.last_moved = at;
        }
        if self
            .limits
            .max_read_interval()
            .is_some_and(|max| interval > max)
        {
            return Err(unread_too_long(interval));
        }
        let increment = match self.limits.wrap_range {
            _ if raw >= last => raw - last,
            Some(range) if last <= range => (range - last).saturating_add(raw),
            _ => return Err(reset()),
        };
        if increment as f64
            > self
                .limits
                .max_increment(since_moved + self.limits.update_lag)
        {
            return Err(if raw < last { reset() } else { self.jump() });
        }
        if increment == 0 && since_moved > STANDSTILL {
            return Err(stands_still());
        }
        self.total = self.total.saturating_add(increment);
        self.judge(increment, at.saturating_sub(self.opened))
    }

    /// The total, unless its mean over `elapsed` is below what the device always draws.
    fn judge(&mut self, increment: u64, elapsed: Duration) -> Result<u64, Gap> {
        if increment > 0 && elapsed >= JUDGED_AFTER {
            let least = self.limits.min_power_w * elapsed.as_secs_f64() * 1e6;
            self.too_low = (self.total as f64) < least;
        }
        if self.too_low {
            return Err(Gap::unread(format!(
                "the counter shows less than {} W, which the device always draws",
                self.limits.min_power_w
            )));
        }
        Ok(self.total)
    }

    fn jump(&self) -> Gap {
        Gap::lost(format!(
            "the counter rose faster than at {} W, which the device cannot draw",
            self.limits.max_power_w
        ))
    }
}

/// The gap of a counter that has shown nothing for too long.
fn stands_still() -> Gap {
    let seconds = STANDSTILL.as_secs();
    Gap::unread(format!("the counter has stood still for over {seconds} s"))
}

/// Whole seconds only, so that gaps of one cause have equal reasons and are summed.
fn unread_too_long(interval: Duration) -> Gap {
    let interval = match interval.as_secs() {
        0 => "under a second".to_string(),
        seconds => format!("{seconds} s"),
    };
    Gap::lost(format!(
        "the counter was not read for {interval}: it may have wrapped around"
    ))
}

fn reset() -> Gap {
    Gap::lost("the counter decreased without wrapping around: it was reset")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// At most 20 W.
    fn counter(wrap_range: Option<u64>, first: u64) -> Counter {
        let update_lag = Duration::from_millis(10);
        let limits = CounterLimits {
            wrap_range,
            max_power_w: 20.0,
            min_power_w: 0.1,
            update_lag,
        };
        Counter::new(limits, first, seconds(0))
    }

    #[test]
    fn a_wrap_around_is_counted() {
        // Range 100 J; 95 J -> 3 J in one second: 5 J to the end and 3 J after.
        let mut counter = counter(Some(100_000_000), 95_000_000);
        assert_eq!(counter.update(3_000_000, seconds(1)), Ok(8_000_000));
        assert_eq!(counter.update(4_000_000, seconds(2)), Ok(9_000_000));
    }

    #[test]
    fn a_reset_loses_its_interval_only() {
        // 50 J -> 1 J in one second would be 51 J at no more than 20 W: not a wrap-around.
        let mut wrapping = counter(Some(100_000_000), 50_000_000);
        assert!(wrapping.update(1_000_000, seconds(1)).unwrap_err().lost);
        assert_eq!(wrapping.update(3_000_000, seconds(2)), Ok(2_000_000));
        let gap = counter(None, 50).update(1, seconds(1)).unwrap_err();
        assert!(gap.reason.contains("reset"));
    }

    #[test]
    fn an_implausible_increment_is_rejected() {
        // 40 J in a second at no more than 20 W; one more joule after it is one joule.
        let mut counter = counter(None, 0);
        let gap = counter.update(40_000_000, seconds(1)).unwrap_err();
        assert!(gap.reason.contains("faster than at 20 W"), "{gap:?}");
        assert_eq!(counter.update(41_000_000, seconds(2)), Ok(1_000_000));
        // A delayed update may come at once: 0.2 J within 10 ms at 20 W.
        assert_eq!(counter.update(41_200_000, seconds(2)), Ok(1_200_000));
    }

    #[test]
    fn a_counter_that_moves_rarely_is_believed() {
        // 15 W, shown every 4 s and read every second: 60 J at once are 15 W, not 60.
        let mut counter = counter(None, 0);
        for second in 1..=12 {
            let total = second / 4 * 60_000_000;
            assert_eq!(counter.update(total, seconds(second)), Ok(total));
        }
    }

    #[test]
    fn a_counter_that_stops_is_a_gap_until_it_moves_again() {
        let mut counter = counter(None, 0);
        assert_eq!(counter.update(5_000_000, seconds(1)), Ok(5_000_000));
        assert_eq!(counter.update(5_000_000, seconds(13)), Ok(5_000_000));
        let gap = counter.update(5_000_000, seconds(14)).unwrap_err();
        assert!(gap.reason.contains("stood still"), "{gap:?}");
        assert_eq!(counter.update(80_000_000, seconds(15)), Ok(80_000_000));
    }

    #[test]
    fn millijoules_in_place_of_microjoules_are_refused() {
        // 15 W in millijoules is 15 000 a second, 0.015 W as microjoules; as kilowatts it is a jump.
        let mut small = counter(None, 0);
        let gap = small.update(15_000, seconds(1)).unwrap_err();
        assert!(gap.reason.contains("less than 0.1 W"), "{gap:?}");
        assert!(small.update(15_000, seconds(2)).is_err());
        let mut large = counter(None, 0);
        let gap = large.update(15_000_000_000, seconds(1)).unwrap_err();
        assert!(gap.lost, "{gap:?}");
    }

    #[test]
    fn a_long_read_interval_loses_its_energy() {
        // 20 W for 6 s is 120 J: a 100 J counter may have wrapped. It must be read every 5 s.
        let mut counter = counter(Some(100_000_000), 0);
        assert_eq!(counter.limits().max_read_interval(), Some(seconds(5)));
        let gap = counter.update(5_000_000, seconds(6)).unwrap_err();
        assert!(gap.reason.contains("wrapped"));
        assert_eq!(counter.update(6_000_000, seconds(7)), Ok(1_000_000));
    }
}
