//! How far a ratio of two counted energies may be off.
//!
//! Owns the bounds of `other / own` where both were charged to one profile. Takes what each is made of, returns the least and the most as
//! parts of what the ratio is. Knows nothing of what the two are.
//!
//! Both are `a x arithmetic + m x movement + i x idle` with the same unknown factors a, m, i, each in `1/f ..= f`. What is wrong for
//! one is wrong for the other, so two runs of the same mix have a ratio that is certain however uncertain either is. A ratio of
//! two such sums has its extremes where every factor is at an end: eight corners.

use super::entry::Parts;
use super::interval::MODEL_FACTOR;
use crate::units::Joules;

/// The least and the most that `other / own` may be, over what it is; `None` where either is nothing. What is not among `own`'s parts (a crash
/// took it) counts as of their mix.
///
/// ```
/// use wattune::{energy::{ledger::Parts, ratio}, units::Joules};
/// let of = |a, m, i| Parts { arithmetic_j: Joules(a), movement_j: Joules(m), idle_j: Joules(i), ..Parts::default() };
/// assert_eq!(ratio::bounds(&of(3.0, 2.0, 1.0), &of(6.0, 4.0, 2.0)), Some([1.0, 1.0]));
/// ```
pub fn bounds(own: &Parts, other: &Parts) -> Option<[f64; 2]> {
    let ends = [1.0 / MODEL_FACTOR, MODEL_FACTOR];
    let corners = ends
        .into_iter()
        .flat_map(|a| ends.into_iter().flat_map(move |m| ends.map(|i| [a, m, i])));
    let of = |factors| at(other, factors) / at(own, factors);
    let ratios: Vec<f64> = corners.map(|factors| of(factors) / of([1.0; 3])).collect();
    let [least, most] = [
        ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    ];
    (least.is_finite() && most.is_finite()).then_some([least, most])
}

fn at(parts: &Parts, [a, m, i]: [f64; 3]) -> f64 {
    let Parts {
        arithmetic_j,
        movement_j,
        idle_j,
        ..
    } = parts;
    let sum: Joules = *arithmetic_j * a + *movement_j * m + *idle_j * i;
    sum.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(a: f64, m: f64, i: f64) -> Parts {
        Parts {
            arithmetic_j: Joules(a),
            movement_j: Joules(m),
            idle_j: Joules(i),
            ..Parts::default()
        }
    }

    #[test]
    fn a_shared_error_cancels_and_an_unshared_one_does_not() {
        // All arithmetic against all movement: the factors are independent, 1.37 squared = 1.8769 either way.
        let [low, high] = bounds(&of(1.0, 0.0, 0.0), &of(0.0, 4.0, 0.0)).unwrap();
        assert!(
            (low - 1.0 / 1.8769).abs() < 1e-12 && (high - 1.8769).abs() < 1e-12,
            "{low} {high}"
        );
        // Half of own is shared: most at a = 1/f, m = f, that is 4 f / (1/f + f) with f = 1.37: 5.48 / 2.0999270 = 2.6096146, where it is 2.
        let [low, high] = bounds(&of(1.0, 1.0, 0.0), &of(0.0, 4.0, 0.0)).unwrap();
        assert!(
            (high - 2.609_614_6 / 2.0).abs() < 1e-6 && (low - 2.0 / 1.37 / 2.099_927).abs() < 1e-6,
            "{low} {high}"
        );
        assert_eq!(bounds(&of(0.0, 0.0, 0.0), &of(1.0, 1.0, 1.0)), None);
    }
}
