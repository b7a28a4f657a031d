//! A figure that is not known exactly: low, central, high.
//!
//! Owns the arithmetic of intervals: ends are combined as if every uncertain factor lay at the same end at once, the widest the
//! figure can be. Takes and returns quantities; knows nothing of what they are of, nor how likely an end is.

use serde::Serialize;

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

impl<T: Copy> Interval<T> {
    /// A figure that was given.
    pub fn exact(value: T) -> Self {
        Self { low: value, central: value, high: value }
    }

    /// `f` of it, where more of it means more of the result.
    pub fn map<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval { low: f(self.low), central: f(self.central), high: f(self.high) }
    }

    /// `f` of it, where more of it means less of the result.
    pub fn map_falling<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval { low: f(self.high), central: f(self.central), high: f(self.low) }
    }

    /// `f` of two, where more of either means more of the result.
    pub fn with<U: Copy, V>(self, other: Interval<U>, f: impl Fn(T, U) -> V) -> Interval<V> {
        Interval { low: f(self.low, other.low), central: f(self.central, other.central), high: f(self.high, other.high) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_meet_their_like() {
        let (a, b) = (Interval { low: 1.0, central: 2.0, high: 4.0 }, Interval { low: 10.0, central: 20.0, high: 30.0 });
        assert_eq!(a.with(b, |a, b| a * b), Interval { low: 10.0, central: 40.0, high: 120.0 });
        assert_eq!(a.map_falling(|a| 8.0 / a), Interval { low: 2.0, central: 4.0, high: 8.0 });
        assert_eq!(Interval::exact(3.0).map(|x| 2.0 * x), Interval { low: 6.0, central: 6.0, high: 6.0 });
    }
}
