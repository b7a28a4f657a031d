//! Uncertain figures as intervals: low, central, high.
//!
//! Interval ends are combined as if every uncertain factor were at the same end at once, which
//! gives the widest interval; no probability is attached to an end.

use serde::Serialize;

use super::charge::EnergyBreakdown;
use crate::units::Joules;

/// Factor between a counted energy and either end of its interval: power models from rated power
/// are off by 27 to 37 % on average (Newkirk et al. 2025, arXiv:2506.14551).
pub const MODEL_FACTOR: f64 = 1.37;

/// Factor between a timed energy and either end of its interval: power times wall time, without
/// counters, was off by up to 40 % against wall meters (Fischer 2025, arXiv:2509.22092).
pub const TIMED_FACTOR: f64 = 1.4;

/// A central value with its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval<T> {
    /// Lower bound.
    pub low: T,
    /// Most plausible value.
    pub central: T,
    /// Upper bound.
    pub high: T,
}

impl Interval<Joules> {
    /// The interval of power times wall time: [`TIMED_FACTOR`] either way.
    pub fn timed(central: Joules) -> Self {
        Self::within(central, TIMED_FACTOR)
    }

    /// The interval of a counted energy: [`MODEL_FACTOR`] either way.
    pub fn counted(central: Joules) -> Self {
        Self::within(central, MODEL_FACTOR)
    }

    fn within(central: Joules, factor: f64) -> Self {
        Self {
            low: central / factor,
            central,
            high: central * factor,
        }
    }
}

impl<T: Copy> Interval<T> {
    /// An exact value.
    pub fn exact(value: T) -> Self {
        Self {
            low: value,
            central: value,
            high: value,
        }
    }

    /// Applies an increasing function.
    pub fn map<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval {
            low: f(self.low),
            central: f(self.central),
            high: f(self.high),
        }
    }

    /// Applies a decreasing function.
    pub fn map_falling<U>(self, f: impl Fn(T) -> U) -> Interval<U> {
        Interval {
            low: f(self.high),
            central: f(self.central),
            high: f(self.low),
        }
    }

    /// Applies a function that increases in both arguments.
    pub fn with<U: Copy, V>(self, other: Interval<U>, f: impl Fn(T, U) -> V) -> Interval<V> {
        Interval {
            low: f(self.low, other.low),
            central: f(self.central, other.central),
            high: f(self.high, other.high),
        }
    }
}

/// Bounds of the ratio `other / run` of two energies counted on one profile, as factors of the
/// central ratio; `None` if either is zero.
///
/// Both energies are `a * arithmetic + m * movement + i * idle` with the same unknown factors, each
/// in `1/MODEL_FACTOR ..= MODEL_FACTOR`. Errors that affect both alike cancel: two works of the
/// same mix have an exact ratio. The extremes lie at corners of the cube of factors.
///
/// ```
/// use wattune::{energy::{EnergyBreakdown, interval::ratio_bounds}, units::Joules};
/// let parts = |a, m, i| EnergyBreakdown {
///     arithmetic_j: Joules(a), movement_j: Joules(m), idle_j: Joules(i), ..Default::default()
/// };
/// let bounds = ratio_bounds(&parts(3.0, 2.0, 1.0), &parts(6.0, 4.0, 2.0));
/// assert_eq!(bounds, Some([1.0, 1.0]));
/// ```
pub fn ratio_bounds(run: &EnergyBreakdown, other: &EnergyBreakdown) -> Option<[f64; 2]> {
    let ratio = |factors| scaled_sum(other, factors) / scaled_sum(run, factors);
    let central = ratio([1.0; 3]);
    let ends = [1.0 / MODEL_FACTOR, MODEL_FACTOR];
    let mut low = f64::INFINITY;
    let mut high = f64::NEG_INFINITY;
    for a in ends {
        for m in ends {
            for i in ends {
                let factor = ratio([a, m, i]) / central;
                low = low.min(factor);
                high = high.max(factor);
            }
        }
    }
    (low.is_finite() && high.is_finite()).then_some([low, high])
}

fn scaled_sum(parts: &EnergyBreakdown, [a, m, i]: [f64; 3]) -> f64 {
    let sum: Joules = parts.arithmetic_j * a + parts.movement_j * m + parts.idle_j * i;
    sum.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(low: f64, central: f64, high: f64) -> Interval<f64> {
        Interval { low, central, high }
    }

    fn breakdown(a: f64, m: f64, i: f64) -> EnergyBreakdown {
        EnergyBreakdown {
            arithmetic_j: Joules(a),
            movement_j: Joules(m),
            idle_j: Joules(i),
            ..EnergyBreakdown::default()
        }
    }

    #[test]
    fn functions_apply_to_both_ends() {
        let a = interval(1.0, 2.0, 4.0);
        let product = a.with(interval(10.0, 20.0, 30.0), |a, b| a * b);
        assert_eq!(product, interval(10.0, 40.0, 120.0));
        assert_eq!(a.map_falling(|a| 8.0 / a), interval(2.0, 4.0, 8.0));
        assert_eq!(
            Interval::exact(3.0).map(|x| 2.0 * x),
            interval(6.0, 6.0, 6.0)
        );
        let counted = Interval::counted(Joules(137.0));
        assert!((counted.low.0 - 100.0).abs() < 1e-9 && (counted.high.0 - 187.69).abs() < 1e-9);
    }

    #[test]
    fn shared_errors_cancel_in_a_ratio() {
        // All arithmetic against all movement: the factors are independent, 1.37 squared = 1.8769
        // either way.
        let [low, high] =
            ratio_bounds(&breakdown(1.0, 0.0, 0.0), &breakdown(0.0, 4.0, 0.0)).unwrap();
        assert!(
            (low - 1.0 / 1.8769).abs() < 1e-12 && (high - 1.8769).abs() < 1e-12,
            "{low} {high}"
        );
        // Half of the run is shared: largest at a = 1/f, m = f, that is 4 f / (1/f + f) with f =
        // 1.37: 5.48 / 2.0999270 = 2.6096146, where the central ratio is 2.
        let [low, high] =
            ratio_bounds(&breakdown(1.0, 1.0, 0.0), &breakdown(0.0, 4.0, 0.0)).unwrap();
        assert!(
            (high - 2.609_614_6 / 2.0).abs() < 1e-6 && (low - 2.0 / 1.37 / 2.099_927).abs() < 1e-6,
            "{low} {high}"
        );
        let zero = breakdown(0.0, 0.0, 0.0);
        assert_eq!(ratio_bounds(&zero, &breakdown(1.0, 1.0, 1.0)), None);
    }
}
