//! The budget: whether the next step may run.
//!
//! Owns limits on energy, carbon, FLOPs, time and money and their exact comparison with what was spent. Takes amounts, returns a
//! verdict; pure. Limits on energy, carbon and money per kilowatt-hour become the largest whole number of microjoules that keeps
//! them, so that a budget on the counted meter is never passed, not by a microjoule. Knows nothing of meters or of steps.

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use super::carbon::carbon;
use super::options::Limits;
use crate::error::{Error, Kind, Result};
use crate::units::{GramsCo2e, GramsPerKwh, Joules, MicroJoules, Money, Per, Price, Pue, Seconds};

/// What turns joules and seconds into grams and money.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rates {
    /// The grid's intensity.
    pub grid: GramsPerKwh,
    /// The facility's overhead.
    pub pue: Pue,
    /// The price of energy or of device time.
    pub price: Option<Price>,
}

/// What was, or will be, spent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// On the meter that decides.
    pub energy: MicroJoules,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Wall time.
    pub time: Seconds,
}

impl Add for Spent {
    type Output = Spent;
    fn add(self, other: Spent) -> Spent {
        let flops = self.flops.saturating_add(other.flops);
        Spent {
            energy: self.energy + other.energy,
            flops,
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
    /// This `often` times, or a part of it.
    pub fn times(&self, often: f64) -> Spent {
        let whole = |amount: u64| (amount as f64 * often).round() as u64;
        Spent {
            energy: MicroJoules(whole(self.energy.0)),
            flops: whole(self.flops),
            time: self.time * often,
        }
    }

    /// Half of it, whole microjoules and FLOPs rounded down.
    pub fn half(&self) -> Spent {
        Spent {
            energy: MicroJoules(self.energy.0 / 2),
            flops: self.flops / 2,
            time: self.time / 2.0,
        }
    }
}

/// Which limit binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Joules.
    Energy,
    /// Grams of CO2e.
    Carbon,
    /// FLOPs.
    Flops,
    /// Seconds.
    Time,
    /// Money.
    Cost,
}

impl Limit {
    /// The word of the recipe's key and of `stop_reason` ("budget:energy").
    pub fn as_str(self) -> &'static str {
        match self {
            Limit::Energy => "energy",
            Limit::Carbon => "carbon",
            Limit::Flops => "flops",
            Limit::Time => "time",
            Limit::Cost => "cost",
        }
    }
}

/// One limit in the quantity that is compared.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cap {
    Energy(MicroJoules),
    Flops(u64),
    Time(Seconds),
}

impl Cap {
    fn holds(&self, spent: &Spent) -> bool {
        match self {
            Cap::Energy(cap) => spent.energy <= *cap,
            Cap::Flops(cap) => spent.flops <= *cap,
            // False where the time is not a number.
            Cap::Time(cap) => spent.time <= *cap,
        }
    }

    /// The part of the cap that is spent; one where nothing may be spent and nothing was.
    fn fraction(&self, spent: &Spent) -> f64 {
        let (spent, cap) = match self {
            Cap::Energy(cap) => (spent.energy.0 as f64, cap.0 as f64),
            Cap::Flops(cap) => (spent.flops as f64, *cap as f64),
            Cap::Time(cap) => (spent.time.0, cap.0),
        };
        if cap > 0.0 { spent / cap } else { 1.0 }
    }
}

/// What may still be spent: every limit in microjoules, FLOPs or seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Allowance {
    /// The least that energy, carbon and money leave.
    pub energy: Option<MicroJoules>,
    /// What the FLOP limit leaves.
    pub flops: Option<u64>,
    /// The least that time and a price per hour leave.
    pub time: Option<Seconds>,
}

impl Allowance {
    /// The largest part of the allowance that `spent` is, over every limit; 0 without a limit, and never more than 1.
    pub fn fraction(&self, spent: &Spent) -> f64 {
        let caps = [
            self.energy.map(Cap::Energy),
            self.flops.map(Cap::Flops),
            self.time.map(Cap::Time),
        ];
        caps.iter()
            .flatten()
            .map(|cap| cap.fraction(spent))
            .fold(0.0, f64::max)
            .min(1.0)
    }

    /// Where this is what a run has left: what training may have spent at its end, `trained` of it already. Of what is left it gets the part
    /// that a step takes of `step` and what comes `beside` it, in each quantity.
    pub fn with_trained(&self, trained: &Spent, step: &Spent, beside: &Spent) -> Allowance {
        let share = |left: f64, step: f64, beside: f64| {
            if step > 0.0 {
                left * step / (step + beside)
            } else {
                left
            }
        };
        let whole = |left: u64, step: u64, beside: u64| {
            share(left as f64, step as f64, beside as f64).round() as u64
        };
        Allowance {
            energy: self.energy.map(|left| {
                trained.energy + MicroJoules(whole(left.0, step.energy.0, beside.energy.0))
            }),
            flops: self.flops.map(|left| {
                trained
                    .flops
                    .saturating_add(whole(left, step.flops, beside.flops))
            }),
            time: self
                .time
                .map(|left| trained.time + Seconds(share(left.0, step.time.0, beside.time.0))),
        }
    }
}

/// Limits with the rates that make them comparable.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    limits: Limits,
    rates: Rates,
    caps: Vec<(Limit, Cap)>,
}

impl Budget {
    /// A budget; refused where a limit is not a number above zero, or where a cost has no price in its currency.
    ///
    /// ```
    /// use wattune::energy::{Budget, Limit, Limits, Rates, Spent};
    /// use wattune::units::{GramsPerKwh, Joules, MicroJoules, Pue};
    /// let rates = Rates { grid: GramsPerKwh(473.0), pue: Pue::ONE, price: None };
    /// let budget = Budget::new(Limits { energy: Some(Joules(1.0)), ..Limits::default() }, rates).unwrap();
    /// let step = Spent { energy: MicroJoules(600_000), ..Spent::default() };
    /// assert_eq!(budget.admits(&Spent::default(), &step, &Spent::default()), Ok(()));
    /// assert_eq!(budget.admits(&step, &step, &Spent::default()), Err(Limit::Energy));
    /// ```
    pub fn new(limits: Limits, rates: Rates) -> Result<Budget> {
        check(&limits, &rates)?;
        let micro =
            |joules: Joules| Cap::Energy(largest_energy(|energy| energy.joules() <= joules));
        let grams = |limit: GramsCo2e| {
            Cap::Energy(largest_energy(|energy| {
                carbon(energy.joules(), rates.pue, rates.grid) <= limit
            }))
        };
        let caps = [
            (Limit::Energy, limits.energy.map(micro)),
            (Limit::Carbon, limits.carbon.map(grams)),
            // A count above u64 cannot be reached: the cast holds it there.
            (
                Limit::Flops,
                limits.flops.map(|flops| Cap::Flops(flops.0 as u64)),
            ),
            (Limit::Time, limits.time.map(Cap::Time)),
            (
                Limit::Cost,
                limits
                    .cost
                    .as_ref()
                    .zip(rates.price.as_ref())
                    .map(|(cost, price)| cost_cap(cost, price, rates.pue)),
            ),
        ];
        let caps = caps
            .into_iter()
            .filter_map(|(limit, cap)| Some((limit, cap?)))
            .collect();
        Ok(Budget {
            limits,
            rates,
            caps,
        })
    }

    /// The limits as given.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The rates as given.
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// Whether anything binds at all.
    pub fn is_limited(&self) -> bool {
        !self.caps.is_empty()
    }

    /// Whether `next` may be spent and `reserve` still after it; else the first limit, in the order of `Limits`, that forbids it.
    pub fn admits(
        &self,
        spent: &Spent,
        next: &Spent,
        reserve: &Spent,
    ) -> std::result::Result<(), Limit> {
        let total = *spent + *next + *reserve;
        self.caps
            .iter()
            .find(|(_, cap)| !cap.holds(&total))
            .map_or(Ok(()), |(limit, _)| Err(*limit))
    }

    /// What the limits leave after `spent`, held at zero.
    pub fn remaining(&self, spent: &Spent) -> Allowance {
        let mut left = Allowance::default();
        for (_, cap) in &self.caps {
            match cap {
                Cap::Energy(cap) => least(&mut left.energy, cap.saturating_sub(spent.energy)),
                Cap::Flops(cap) => least(&mut left.flops, cap.saturating_sub(spent.flops)),
                Cap::Time(cap) => least(&mut left.time, (*cap - spent.time).max(Seconds::ZERO)),
            }
        }
        left
    }

    /// What training may spend: the rest after `spent` (before the first step) and `reserved` (final evaluation and save, and
    /// every other evaluation and save still planned).
    pub fn allowance(&self, spent: &Spent, reserved: &Spent) -> Allowance {
        self.remaining(&(*spent + *reserved))
    }

    /// The limit nearest to its end and the part of it that is spent.
    pub fn largest_fraction(&self, spent: &Spent) -> Option<(Limit, f64)> {
        let fractions = self
            .caps
            .iter()
            .map(|(limit, cap)| (*limit, cap.fraction(spent)));
        fractions.reduce(|best, other| if other.1 > best.1 { other } else { best })
    }

    /// How far `spent` lies past the tightest limit in joules; zero on the counted meter.
    pub fn overshoot(&self, spent: &Spent) -> MicroJoules {
        let over = |cap: &Cap| {
            if let Cap::Energy(cap) = cap {
                spent.energy.saturating_sub(*cap)
            } else {
                MicroJoules::ZERO
            }
        };
        self.caps
            .iter()
            .map(|(_, cap)| over(cap))
            .max()
            .unwrap_or_default()
    }
}

fn least<T: PartialOrd + Copy>(slot: &mut Option<T>, value: T) {
    if slot.is_none_or(|held| value < held) {
        *slot = Some(value);
    }
}

/// The largest x for which `keeps(x)` holds, for a rule that holds up to some x and never after; 0 if it never holds.
fn largest(keeps: impl Fn(u64) -> bool) -> u64 {
    if keeps(u64::MAX) {
        return u64::MAX;
    }
    let (mut low, mut high) = (0, u64::MAX);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if keeps(middle) {
            low = middle
        } else {
            high = middle
        }
    }
    low
}

fn largest_energy(keeps: impl Fn(MicroJoules) -> bool) -> MicroJoules {
    MicroJoules(largest(|energy| keeps(MicroJoules(energy))))
}

/// Money as joules (a price of energy, paid for the facility's) or as seconds (a price of device time).
fn cost_cap(cost: &Money, price: &Price, pue: Pue) -> Cap {
    match price.per {
        Per::KilowattHour => Cap::Energy(largest_energy(|energy| {
            price.cost(pue * energy.joules(), Seconds::ZERO).amount <= cost.amount
        })),
        // The bits of a float that is not negative rise with it, so the same search finds the largest number of seconds.
        Per::DeviceHour => {
            let seconds = |bits: u64| f64::from_bits(bits.min(f64::MAX.to_bits()));
            let bits = largest(|bits| {
                price.cost(Joules::ZERO, Seconds(seconds(bits))).amount <= cost.amount
            });
            Cap::Time(Seconds(seconds(bits)))
        }
    }
}

fn check(limits: &Limits, rates: &Rates) -> Result<()> {
    let numbers = [
        ("budget.energy", limits.energy.map(|v| v.0)),
        ("budget.carbon", limits.carbon.map(|v| v.0)),
        ("budget.flops", limits.flops.map(|v| v.0)),
        ("budget.time", limits.time.map(|v| v.0)),
        ("budget.cost", limits.cost.as_ref().map(|v| v.amount)),
    ];
    for (key, value) in numbers {
        if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
            let error =
                Error::new(Kind::Budget, format!("`{key}` is no budget")).value(value.to_string());
            return Err(error
                .rule("a number above zero")
                .hint(format!("remove `{key}` for a run without this limit")));
        }
    }
    if !(rates.grid.0.is_finite() && rates.grid.0 >= 0.0) {
        let error = Error::new(
            Kind::Budget,
            "the grid's intensity is no number of grams per kilowatt-hour",
        );
        return Err(error
            .value(rates.grid.0.to_string())
            .rule("zero or more")
            .hint("write `grid = \"world\"` in [energy]"));
    }
    match (&limits.cost, &rates.price) {
        (Some(cost), None) => Err(Error::new(Kind::Budget, "a budget of money needs a price")
            .value(format!("budget.cost = \"{cost}\""))
            .hint(format!(
                "add `price = \"0.30 {}/kWh\"` (or `.../h` for a rented device) to [energy]",
                cost.currency
            ))),
        (Some(cost), Some(price)) if cost.currency != price.money.currency => {
            let error = Error::new(
                Kind::Budget,
                "the budget and the price are in different currencies",
            );
            Err(error.value(format!("{cost}; {price}")).hint(format!(
                "write the price in {}, or the budget in {}",
                cost.currency, price.money.currency
            )))
        }
        (_, Some(price)) if !(price.money.amount.is_finite() && price.money.amount >= 0.0) => Err(
            Error::new(Kind::Budget, "the price is not a number of zero or more")
                .value(price.to_string()),
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Flops;

    fn rates(price: Option<&str>) -> Rates {
        Rates {
            grid: GramsPerKwh(429.0),
            pue: Pue::new(1.1).unwrap(),
            price: price.map(|p| p.parse().unwrap()),
        }
    }

    fn spent(energy: u64, flops: u64, time: f64) -> Spent {
        Spent {
            energy: MicroJoules(energy),
            flops,
            time: Seconds(time),
        }
    }

    #[test]
    fn the_first_limit_that_would_be_passed_is_named() {
        let limits = Limits {
            energy: Some(Joules(2e-6)),
            flops: Some(Flops(10.0)),
            time: Some(Seconds(1.0)),
            ..Limits::default()
        };
        let budget = Budget::new(limits, rates(None)).unwrap();
        let none = Spent::default();
        assert_eq!(
            budget.admits(&spent(1, 0, 0.0), &spent(1, 0, 0.0), &none),
            Ok(())
        );
        assert_eq!(
            budget.admits(&spent(1, 0, 0.0), &spent(1, 0, 0.0), &spent(1, 0, 0.0)),
            Err(Limit::Energy)
        );
        assert_eq!(
            budget.admits(&spent(0, 10, 0.0), &none, &spent(0, 1, 0.0)),
            Err(Limit::Flops)
        );
        assert_eq!(
            budget.admits(&none, &spent(0, 0, 1.5), &none),
            Err(Limit::Time)
        );
        assert_eq!(
            budget.admits(&none, &spent(0, 0, f64::NAN), &none),
            Err(Limit::Time)
        );
        assert_eq!(
            budget.largest_fraction(&spent(1, 7, 0.1)),
            Some((Limit::Flops, 0.7))
        );
    }

    #[test]
    fn grams_and_money_become_microjoules() {
        // 1 kWh (3.6e12 uJ) at 429 g and PUE 1.1 is 471.9 g: the largest whole number of microjoules is that or one less.
        let grams = Budget::new(
            Limits {
                carbon: Some(GramsCo2e(471.9)),
                ..Limits::default()
            },
            rates(None),
        )
        .unwrap();
        let cap = grams.remaining(&Spent::default()).energy.unwrap().0;
        assert!(cap.abs_diff(3_600_000_000_000) <= 1, "{cap}");
        // 0.33 USD at 0.30 USD per facility kWh and PUE 1.1: again 1 kWh of the machine's own.
        let cost = Limits {
            cost: Some("0.33 USD".parse().unwrap()),
            ..Limits::default()
        };
        let cap = Budget::new(cost.clone(), rates(Some("0.30 USD/kWh")))
            .unwrap()
            .remaining(&Spent::default())
            .energy
            .unwrap()
            .0;
        assert!(cap.abs_diff(3_600_000_000_000) <= 1, "{cap}");
        // 0.33 USD at 0.66 USD an hour: half an hour.
        let time = Budget::new(cost, rates(Some("0.66 USD/h")))
            .unwrap()
            .remaining(&Spent::default())
            .time
            .unwrap();
        assert!((time.0 - 1800.0).abs() < 1e-6);
    }

    #[test]
    fn a_clean_grid_never_binds() {
        let clean = Rates {
            grid: GramsPerKwh(0.0),
            ..rates(None)
        };
        let budget = Budget::new(
            Limits {
                carbon: Some(GramsCo2e(1.0)),
                ..Limits::default()
            },
            clean,
        )
        .unwrap();
        assert_eq!(
            budget.admits(
                &spent(u64::MAX, 0, 0.0),
                &spent(1, 0, 0.0),
                &Spent::default()
            ),
            Ok(())
        );
    }

    #[test]
    fn a_budget_that_cannot_be_kept_is_refused() {
        let money = |text: &str| Limits {
            cost: Some(text.parse().unwrap()),
            ..Limits::default()
        };
        let refused = [
            Budget::new(money("1 USD"), rates(None)),
            Budget::new(money("1 EUR"), rates(Some("0.3 USD/kWh"))),
            Budget::new(
                Limits {
                    energy: Some(Joules(0.0)),
                    ..Limits::default()
                },
                rates(None),
            ),
            Budget::new(
                Limits {
                    time: Some(Seconds(f64::NAN)),
                    ..Limits::default()
                },
                rates(None),
            ),
        ];
        for result in refused {
            let error = result.unwrap_err();
            assert!(
                error.kind() == Kind::Budget && error.remedy().is_some(),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_left_is_shared_between_steps_and_what_comes_beside_them() {
        // 60 uJ and 9 s are left; a step takes 2 uJ and 1 s, beside it 1 uJ and 0.5 s: two thirds of both go to training, which has spent 35.
        let left = Allowance {
            energy: Some(MicroJoules(60)),
            flops: None,
            time: Some(Seconds(9.0)),
        };
        let all = left.with_trained(&spent(35, 7, 4.0), &spent(2, 3, 1.0), &spent(1, 0, 0.5));
        assert_eq!(
            all,
            Allowance {
                energy: Some(MicroJoules(75)),
                flops: None,
                time: Some(Seconds(10.0))
            }
        );
        // A step that takes nothing, as far as is known, leaves nothing to share.
        assert_eq!(
            left.with_trained(&spent(0, 0, 0.0), &Spent::default(), &spent(1, 0, 0.0)),
            left
        );
    }

    #[test]
    fn progress_is_the_training_part_of_what_training_may_spend() {
        // 100 uJ, of which 10 went on loading and 20 are kept: 70 for training. 35 spent is half of it.
        let budget = Budget::new(
            Limits {
                energy: Some(Joules(1e-4)),
                ..Limits::default()
            },
            rates(None),
        )
        .unwrap();
        let allowance = budget.allowance(&spent(10, 0, 0.0), &spent(20, 0, 0.0));
        assert_eq!(allowance.energy, Some(MicroJoules(70)));
        assert_eq!(allowance.fraction(&spent(35, 0, 0.0)), 0.5);
        assert_eq!(allowance.fraction(&spent(90, 0, 0.0)), 1.0);
        let free = Budget::new(Limits::default(), rates(None)).unwrap();
        assert_eq!(
            free.allowance(&Spent::default(), &Spent::default())
                .fraction(&spent(35, 9, 9.0)),
            0.0
        );
        assert_eq!(budget.overshoot(&spent(103, 0, 0.0)), MicroJoules(3));
    }
}
