//! Amounts spent and allowances, in the quantities that a budget compares: microjoules, FLOPs,
//! seconds.

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use crate::units::{MicroJoules, Seconds};

/// An amount spent or to be spent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// On the deciding meter.
    pub energy: MicroJoules,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Wall time.
    pub time: Seconds,
}

impl Add for Spent {
    type Output = Spent;
    fn add(self, other: Spent) -> Spent {
        Spent {
            energy: self.energy + other.energy,
            flops: self.flops.saturating_add(other.flops),
            time: self.time + other.time,
        }
    }
}

impl AddAssign for Spent {
    fn add_assign(&mut self, other: Spent) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Spent {
    fn sum<I: Iterator<Item = Spent>>(items: I) -> Spent {
        items.fold(Spent::default(), Add::add)
    }
}

impl Spent {
    /// The amount times `factor`, rounded to integer microjoules and FLOPs.
    pub fn scaled(&self, factor: f64) -> Spent {
        let rounded = |amount: u64| (amount as f64 * factor).round() as u64;
        Spent {
            energy: MicroJoules(rounded(self.energy.0)),
            flops: rounded(self.flops),
            time: self.time * factor,
        }
    }

    /// The amount `count` times.
    pub fn repeated(&self, count: u64) -> Spent {
        Spent {
            energy: MicroJoules(self.energy.0.saturating_mul(count)),
            flops: self.flops.saturating_mul(count),
            time: self.time * count as f64,
        }
    }

    /// Half the amount, rounded down to integer microjoules and FLOPs.
    pub fn half(&self) -> Spent {
        Spent {
            energy: MicroJoules(self.energy.0 / 2),
            flops: self.flops / 2,
            time: self.time / 2.0,
        }
    }
}

/// Relative error of a sum of times in another order.
const TIME_ROUNDING: f64 = 1e-12;

/// A limit in the quantity that is compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Threshold {
    Energy(MicroJoules),
    Flops(u64),
    Time(Seconds),
}

impl Threshold {
    /// Whether `spent` stays within it, of a time but for rounding; false for a time that is not a
    /// number.
    pub fn admits(&self, spent: &Spent) -> bool {
        match self {
            Threshold::Energy(limit) => spent.energy <= *limit,
            Threshold::Flops(limit) => spent.flops <= *limit,
            Threshold::Time(limit) => spent.time.0 <= limit.0 * (1.0 + TIME_ROUNDING),
        }
    }

    /// `spent` over the limit; one for a limit of zero.
    pub fn fraction(&self, spent: &Spent) -> f64 {
        let (spent, limit) = match self {
            Threshold::Energy(limit) => (spent.energy.0 as f64, limit.0 as f64),
            Threshold::Flops(limit) => (spent.flops as f64, *limit as f64),
            Threshold::Time(limit) => (spent.time.0, limit.0),
        };
        if limit > 0.0 { spent / limit } else { 1.0 }
    }
}

/// Amounts that may still be spent, by quantity; `None`: unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Allowance {
    /// The tightest of the limits on energy, carbon and money.
    pub energy: Option<MicroJoules>,
    /// The limit on FLOPs.
    pub flops: Option<u64>,
    /// The tightest of the limits on time and on money per hour.
    pub time: Option<Seconds>,
}

impl Allowance {
    /// Lowers the allowance to a threshold less `spent`, at least zero.
    pub(super) fn restrict(&mut self, threshold: &Threshold, spent: &Spent) {
        match threshold {
            Threshold::Energy(limit) => {
                lower(&mut self.energy, limit.saturating_sub(spent.energy));
            }
            Threshold::Flops(limit) => lower(&mut self.flops, limit.saturating_sub(spent.flops)),
            Threshold::Time(limit) => {
                lower(&mut self.time, (*limit - spent.time).max(Seconds::ZERO));
            }
        }
    }

    /// The largest fraction of the allowance that `spent` is, over every limit, in 0..=1; 0 if
    /// unlimited.
    pub fn fraction(&self, spent: &Spent) -> f64 {
        let thresholds = [
            self.energy.map(Threshold::Energy),
            self.flops.map(Threshold::Flops),
            self.time.map(Threshold::Time),
        ];
        let fractions = thresholds
            .iter()
            .flatten()
            .map(|limit| limit.fraction(spent));
        fractions.fold(0.0, f64::max).min(1.0)
    }

    /// Converts the remainder of a run to the total of its training: `trained` so far, plus
    /// training's share of the remainder. In each quantity the share is that of a `step` in a step
    /// plus its `overhead` (evaluations and saves).
    pub fn with_trained(&self, trained: &Spent, step: &Spent, overhead: &Spent) -> Allowance {
        let share = |remainder: f64, step: f64, overhead: f64| {
            if step > 0.0 {
                remainder * step / (step + overhead)
            } else {
                remainder
            }
        };
        let rounded = |remainder: u64, step: u64, overhead: u64| {
            share(remainder as f64, step as f64, overhead as f64).round() as u64
        };
        Allowance {
            energy: self.energy.map(|remainder| {
                let share = rounded(remainder.0, step.energy.0, overhead.energy.0);
                trained.energy + MicroJoules(share)
            }),
            flops: self.flops.map(|remainder| {
                let share = rounded(remainder, step.flops, overhead.flops);
                trained.flops.saturating_add(share)
            }),
            time: self.time.map(|remainder| {
                let share = share(remainder.0, step.time.0, overhead.time.0);
                trained.time + Seconds(share)
            }),
        }
    }
}

fn lower<T: PartialOrd + Copy>(limit: &mut Option<T>, value: T) {
    if limit.is_none_or(|limit| value < limit) {
        *limit = Some(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(energy: u64, flops: u64, time: f64) -> Spent {
        Spent {
            energy: MicroJoules(energy),
            flops,
            time: Seconds(time),
        }
    }

    fn allowance(energy: u64, time: f64) -> Allowance {
        Allowance {
            energy: Some(MicroJoules(energy)),
            flops: None,
            time: Some(Seconds(time)),
        }
    }

    #[test]
    fn the_remainder_is_shared_between_steps_and_their_overhead() {
        // 60 uJ and 9 s are left; a step takes 2 uJ and 1 s, its overhead 1 uJ and 0.5 s: two
        // thirds of both go to training, which has spent 35 uJ and 4 s.
        let left = allowance(60, 9.0);
        let total = left.with_trained(&spent(35, 7, 4.0), &spent(2, 3, 1.0), &spent(1, 0, 0.5));
        assert_eq!(total, allowance(75, 10.0));
        // A step without a known cost leaves nothing to share.
        let unknown = left.with_trained(&spent(0, 0, 0.0), &Spent::default(), &spent(1, 0, 0.0));
        assert_eq!(unknown, left);
    }
}
