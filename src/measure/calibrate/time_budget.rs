//! Time of a calibration: `each` for every figure while the total allows it, else an even share of what is left.

use std::time::{Duration, Instant};

use crate::units::Seconds;

/// The time left, and the figures left.
pub(super) struct TimeBudget {
    each: Duration,
    end: Instant,
    left: usize,
    /// The shortest time given, if below `each`.
    shortest: Option<Duration>,
}

impl TimeBudget {
    /// `each` for every one of `figures`, all `within` a time from now.
    pub fn new(each: Seconds, within: Seconds, figures: usize) -> Self {
        let duration = |time: Seconds| Duration::try_from_secs_f64(time.0).unwrap_or_default();
        Self {
            each: duration(each),
            end: Instant::now() + duration(within),
            left: figures,
            shortest: None,
        }
    }

    /// Time of the next figure: at most half of its share of what is left, because warm-up takes time too.
    pub fn next(&mut self) -> Duration {
        self.next_at(Instant::now())
    }

    /// A note, if a figure got less than `each`.
    pub fn note(&self) -> Option<String> {
        let shortest = Seconds(self.shortest?.as_secs_f64());
        let each = Seconds(self.each.as_secs_f64());
        let got = if shortest == Seconds::ZERO {
            "a single try".to_string()
        } else {
            shortest.to_string()
        };
        Some(format!(
            "the machine is busy or `--each` is long: a figure got {got} instead of {each}, to be done within a minute"
        ))
    }

    fn next_at(&mut self, now: Instant) -> Duration {
        let part = self.end.saturating_duration_since(now) / self.left.max(1) as u32;
        self.left = self.left.saturating_sub(1);
        let given = self.each.min(part / 2);
        if given < self.each {
            self.shortest = Some(self.shortest.map_or(given, |shortest| shortest.min(given)));
        }
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn a_figure_gets_its_time_while_there_is_enough_and_then_half_of_its_part() {
        let mut time = TimeBudget::new(Seconds(2.0), Seconds(40.0), 4);
        let start = time.end - seconds(40.0);
        // Ten seconds are left for each: two are enough.
        assert_eq!((time.next_at(start), time.note()), (seconds(2.0), None));
        // The first took 37 s. Three share three seconds; then one takes all that was left, and the last gets none.
        assert_eq!(time.next_at(start + seconds(37.0)), seconds(0.5));
        assert_eq!(time.next_at(start + seconds(38.0)), seconds(0.5));
        assert_eq!(time.next_at(start + seconds(41.0)), Duration::ZERO);
        assert!(
            time.note()
                .unwrap()
                .contains("a figure got a single try instead of 2 s"),
            "{:?}",
            time.note()
        );
    }
}
