//! How long each figure of a calibration may take, so that all of them keep to a time.
//!
//! Takes the time for one figure and for all of them; gives each the former where there is enough left, else an even part of what is left.
//! Measures nothing.

use std::time::{Duration, Instant};

use crate::units::Seconds;

/// The time of a calibration.
pub(super) struct Pace {
    each: Duration,
    end: Instant,
    /// Figures still to be measured.
    left: usize,
    /// The shortest that a figure was given, where that is less than `each`.
    shortest: Option<Duration>,
}

impl Pace {
    /// `each` for every one of `figures`, all of them from now on `within` a time.
    pub fn new(each: Seconds, within: Seconds, figures: usize) -> Pace {
        let duration = |time: Seconds| Duration::try_from_secs_f64(time.0).unwrap_or_default();
        let end = Instant::now() + duration(within);
        Pace {
            each: duration(each),
            end,
            left: figures,
            shortest: None,
        }
    }

    /// How long the next figure is timed: at most half of its part of what is left, for what is tried and mapped before it takes time too.
    pub fn time(&mut self) -> Duration {
        self.time_at(Instant::now())
    }

    /// What to say of figures that got less than was asked for.
    pub fn note(&self) -> Option<String> {
        let (shortest, each) = (
            Seconds(self.shortest?.as_secs_f64()),
            Seconds(self.each.as_secs_f64()),
        );
        let got = if shortest == Seconds::ZERO {
            "a single try".to_string()
        } else {
            shortest.to_string()
        };
        Some(format!(
            "the machine is busy or `--each` is long: a figure got {got} instead of {each}, to be done within a minute"
        ))
    }

    fn time_at(&mut self, now: Instant) -> Duration {
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
        let mut pace = Pace::new(Seconds(2.0), Seconds(40.0), 4);
        let start = pace.end - seconds(40.0);
        // Ten seconds are left for each: two are enough.
        assert_eq!((pace.time_at(start), pace.note()), (seconds(2.0), None));
        // The first took 37 s. Three share three seconds; then one takes all that was left, and the last gets none.
        assert_eq!(pace.time_at(start + seconds(37.0)), seconds(0.5));
        assert_eq!(pace.time_at(start + seconds(38.0)), seconds(0.5));
        assert_eq!(pace.time_at(start + seconds(41.0)), Duration::ZERO);
        assert!(
            pace.note()
                .unwrap()
                .contains("a figure got a single try instead of 2 s"),
            "{:?}",
            pace.note()
        );
    }
}
