//! A raw hardware counter as energy since it was first read.
//!
//! Owns wrap-around, reset and implausible rises. Takes raw values with the time of their reading, returns microjoules that never
//! fall, or a `Gap` after which counting goes on from the new value. Knows nothing of where the values come from.

use std::time::Duration;

use super::Gap;

/// What a counter cannot do, by which its readings are judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The value at which it wraps; `None` for one that does not.
    pub range: Option<u64>,
    /// Power that the device never draws, in watts: twice its limit.
    pub ceiling: f64,
    /// How far its value may lag behind the device.
    pub lag: Duration,
}

impl Bounds {
    /// The most it can rise in `time`, in microjoules.
    fn most(&self, time: Duration) -> f64 {
        self.ceiling * time.as_secs_f64() * 1e6
    }

    /// How long it may be left unread before it may wrap unseen; `None` for one that does not wrap.
    pub fn silence(&self) -> Option<Duration> {
        self.range
            .map(|range| Duration::from_secs_f64(range as f64 / 1e6 / self.ceiling))
    }
}

/// A counter that rises, may wrap, and may be reset: turns raw readings into energy since the first.
#[derive(Debug, Clone)]
pub(super) struct Counter {
    bounds: Bounds,
    last: u64,
    /// When `last` was read.
    at: Duration,
    total: u64,
}

impl Counter {
    pub fn new(bounds: Bounds, first: u64, at: Duration) -> Counter {
        Counter {
            bounds,
            last: first,
            at,
            total: 0,
        }
    }

    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Follows the counter to `raw`, read at `at`. A fall that is no plausible wrap is a reset; a rise that no device could draw is one
    /// too, or a misreading. After so long a silence that it may have wrapped unseen nothing is known. In each of these cases the energy
    /// since the last reading is lost, and counting goes on from `raw`.
    pub fn advance(&mut self, raw: u64, at: Duration) -> Result<u64, Gap> {
        let Bounds { range, lag, .. } = self.bounds;
        let since = at.saturating_sub(self.at);
        let last = std::mem::replace(&mut self.last, raw);
        self.at = at;
        if self.bounds.silence().is_some_and(|silence| since > silence) {
            // In whole seconds: gaps of one reason are added up.
            let silence = if since.as_secs() == 0 {
                "under a second".to_string()
            } else {
                format!("{} s", since.as_secs())
            };
            let reason =
                format!("the counter was not read for {silence}: it may have wrapped around");
            return Err(Gap::lost(reason));
        }
        let risen = match range {
            _ if raw >= last => raw - last,
            Some(range) if last <= range => (range - last).saturating_add(raw),
            _ => return Err(reset()),
        };
        if risen as f64 <= self.bounds.most(since + lag) {
            self.total = self.total.saturating_add(risen);
            return Ok(self.total);
        }
        if raw < last {
            return Err(reset());
        }
        Err(Gap::lost(format!(
            "the counter rose by {} J in {:.1} s, which the device cannot draw",
            risen / 1_000_000,
            since.as_secs_f64()
        )))
    }
}

fn reset() -> Gap {
    Gap::lost("the counter fell back and was not at its end: it was reset")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// At most 20 W.
    fn counter(range: Option<u64>, first: u64) -> Counter {
        Counter::new(
            Bounds {
                range,
                ceiling: 20.0,
                lag: Duration::from_millis(10),
            },
            first,
            seconds(0),
        )
    }

    #[test]
    fn it_wraps_at_its_range() {
        // 100 J range. 95 J -> 3 J in one second: 8 J went by (5 J to the end, 3 J after).
        let mut counter = counter(Some(100_000_000), 95_000_000);
        assert_eq!(counter.advance(3_000_000, seconds(1)), Ok(8_000_000));
        assert_eq!(counter.advance(4_000_000, seconds(2)), Ok(9_000_000));
    }

    #[test]
    fn a_reset_loses_what_was_spent_and_counting_goes_on() {
        // 50 J -> 1 J in one second would be 51 J at most 20 W: no wrap, a reset.
        let mut wrapping = counter(Some(100_000_000), 50_000_000);
        assert!(wrapping.advance(1_000_000, seconds(1)).unwrap_err().lost);
        assert_eq!(wrapping.advance(3_000_000, seconds(2)), Ok(2_000_000));
        let mut unwrapping = counter(None, 50);
        assert!(
            unwrapping
                .advance(1, seconds(1))
                .unwrap_err()
                .reason
                .contains("reset")
        );
    }

    #[test]
    fn a_rise_that_nothing_draws_is_not_believed() {
        // 40 J in a second at most 20 W: read wrongly, or reset and set. One J more after that is one J.
        let mut counter = counter(None, 0);
        assert!(
            counter
                .advance(40_000_000, seconds(1))
                .unwrap_err()
                .reason
                .contains("40 J in 1.0 s")
        );
        assert_eq!(counter.advance(41_000_000, seconds(2)), Ok(1_000_000));
        // What it lags behind may come at once: 0.2 J within 10 ms at 20 W.
        assert_eq!(counter.advance(41_200_000, seconds(2)), Ok(1_200_000));
    }

    #[test]
    fn a_long_silence_loses_what_was_spent() {
        // 20 W for 6 s is 120 J: the 100 J counter may have gone round. It may be silent for 5 s.
        let mut counter = counter(Some(100_000_000), 0);
        assert_eq!(counter.bounds().silence(), Some(seconds(5)));
        assert!(
            counter
                .advance(5_000_000, seconds(6))
                .unwrap_err()
                .reason
                .contains("wrapped")
        );
        assert_eq!(counter.advance(6_000_000, seconds(7)), Ok(1_000_000));
    }
}
