//! A raw hardware counter as energy since its first reading.
//!
//! Handles wrap-around, resets and implausible increments. Takes raw values with their read times,
//! returns monotonic microjoules, or a [`Gap`] after which counting continues from the new value.

use std::time::Duration;

use super::Gap;

/// Limits by which a counter's readings are judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct CounterLimits {
    /// Value at which the counter wraps around; `None` if it never does.
    pub wrap_range: Option<u64>,
    /// Watts the device never draws: twice its power limit.
    pub max_power_w: f64,
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
    total: u64,
}

impl Counter {
    pub fn new(limits: CounterLimits, first: u64, at: Duration) -> Counter {
        Counter {
            limits,
            last: first,
            last_read: at,
            total: 0,
        }
    }

    pub fn limits(&self) -> &CounterLimits {
        &self.limits
    }

    /// Adds the increment up to `raw`, read at `at`; returns the microjoules since the first
    /// reading.
    ///
    /// # Errors
    /// A lost gap, after which counting continues from `raw`: a decrease that is no plausible
    /// wrap-around (a reset), an increment above `max_power_w`, or a read interval so long that the
    /// counter may have wrapped unnoticed.
    pub fn update(&mut self, raw: u64, at: Duration) -> Result<u64, Gap> {
        let interval = at.saturating_sub(self.last_read);
        let last = std::mem::replace(&mut self.last, raw);
        self.last_read = at;
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
        if increment as f64 <= self.limits.max_increment(interval + self.limits.update_lag) {
            self.total = self.total.saturating_add(increment);
            return Ok(self.total);
        }
        if raw < last {
            return Err(reset());
        }
        Err(Gap::lost(format!(
            "the counter rose by {} J in {:.1} s, which the device cannot draw",
            increment / 1_000_000,
            interval.as_secs_f64()
        )))
    }
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
        assert!(gap.reason.contains("40 J in 1.0 s"));
        assert_eq!(counter.update(41_000_000, seconds(2)), Ok(1_000_000));
        // A delayed update may come at once: 0.2 J within 10 ms at 20 W.
        assert_eq!(counter.update(41_200_000, seconds(2)), Ok(1_200_000));
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
