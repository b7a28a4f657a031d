//! A figure that is not known exactly: low, central, high.
//!
//! Owns the arithmetic of intervals: ends are combined as if every uncertain factor lay at the same end at once, the widest the
//! figure can be. Takes and returns quantities; knows nothing of what they are of, nor how likely an end is.

use serde::Serialize;

use crate::units::Joules;

/// A power model made from rated power is wrong by 27 to 37 % on average (Newkirk et al. 2025, arXiv:2506.14551): the factor between a
/// counted energy and either end of its interval.
pub const MODEL_FACTOR: f64 = 1.37;

/// Power times wall time, without counters, was found off by up to 40 % against wall meters (Fischer 2025, arXiv:2509.22092).
pub const TIMED_FACTOR: f64 = 1.4;

/// A central figure with the least and the most it may be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval<T> {
    /// The least.
    pub low: T,
    /// The most plausible.
    pub central: T,
    /// The most.
    pub high: T,
}

impl Interval<Joules> {
    /// What power times wall time may be: [`TIMED_FACTOR`] either way.
    pub fn timed(central: Joules) -> Self {
        Self {
            low: central / TIMED_FACTOR,
            central,
            high: central * TIMED_FACTOR,
        }
    }

    /// What a counted energy may be: [`MODEL_FACTOR`] either way.
    pub fn counted(central: Joules) -> Self {
        Self {
            low: central / MODEL_FACTOR,
            central,
            high: central * MODEL_FACTOR,
        }
    }
}

impl<T: Copy> Interval<T> {
    /// A figure that was given.
    pub fn exact(value: T) -> Self {
        Self {
            low: value,
            central: value,
            high: value,
        }
    }

    /// `f` of it, where more of it means more of the result.
    pub fn map<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval {
            low: f(self.low),
            central: f(self.central),
            high: f(self.high),
        }
    }

    /// `f` of it, where more of it means less of the result.
    pub fn map_falling<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval {
            low: f(self.high),
            central: f(self.central),
            high: f(self.low),
        }
    }

    /// `f` of two, where more of either means more of the result.
    pub fn with<U: Copy, V>(self, other: Interval<U>, f: impl Fn(T, U) -> V) -> Interval<V> {
        Interval {
            low: f(self.low, other.low),
            central: f(self.central, other.central),
            high: f(self.high, other.high),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_meet_their_like() {
        let (a, b) = (
            Interval {
                low: 1.0,
                central: 2.0,
                high: 4.0,
            },
            Interval {
                low: 10.0,
                central: 20.0,
                high: 30.0,
            },
        );
        assert_eq!(
            a.with(b, |a, b| a * b),
            Interval {
                low: 10.0,
                central: 40.0,
                high: 120.0
            }
        );
        assert_eq!(
            a.map_falling(|a| 8.0 / a),
            Interval {
                low: 2.0,
                central: 4.0,
                high: 8.0
            }
        );
        let counted = Interval::counted(Joules(137.0));
        assert!((counted.low.0 - 100.0).abs() < 1e-9 && (counted.high.0 - 187.69).abs() < 1e-9);
        assert_eq!(
            Interval::exact(3.0).map(|x| 2.0 * x),
            Interval {
                low: 6.0,
                central: 6.0,
                high: 6.0
            }
        );
    }
}
