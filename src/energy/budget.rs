//! Budgets: whether the next step may be spent.
//!
//! Takes amounts, returns a verdict; pure. Limits on energy, carbon and money per kilowatt-hour are
//! converted to the largest integer number of microjoules within them, so that a budget on the
//! counted meter is never exceeded, not by a microjoule. Independent of meters and steps.

use serde::{Deserialize, Serialize};

use super::carbon::carbon;
use super::options::Limits;
use super::spent::{Allowance, Spent, Threshold};
use crate::error::{Error, Kind, Result};
use crate::units::{Flops, GramsPerKwh, Joules, MicroJoules, Money, Per, Price, Pue, Seconds};

/// Conversion of joules and seconds to emissions and money.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rates {
    /// Carbon intensity of the grid.
    pub grid: GramsPerKwh,
    /// Power usage effectiveness of the facility.
    pub pue: Pue,
    /// Price of energy or of device time.
    pub price: Option<Price>,
}

/// Kind of a limit.
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
    /// The recipe's key, also in `stop_reason` ("budget:energy").
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

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Relative error of an amount that was computed in another order, or printed and parsed.
const ROUNDING: f64 = 8.0 * f64::EPSILON;

/// Whether `amount` is within `limit`, but for rounding.
pub(super) fn is_within(amount: f64, limit: f64) -> bool {
    amount <= limit * (1.0 + ROUNDING)
}

/// Limits with the rates that make them comparable.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    limits: Limits,
    rates: Rates,
    thresholds: Vec<(Limit, Threshold)>,
}

impl Budget {
    /// A budget.
    ///
    /// # Errors
    /// [`Kind::Budget`] for a limit that is not above zero, or a cost without a price in its
    /// currency.
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
        check_limits(&limits)?;
        check_rates(&rates, limits.cost.as_ref())?;
        let thresholds = thresholds(&limits, &rates);
        Ok(Budget {
            limits,
            rates,
            thresholds,
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

    /// `spent` in the unit of `limit`, "8.5 mgCO2e".
    pub fn amount(&self, limit: Limit, spent: &Spent) -> String {
        let Rates { grid, pue, price } = &self.rates;
        let energy = spent.energy.joules();
        match limit {
            Limit::Energy => energy.to_string(),
            Limit::Carbon => carbon(energy, *pue, *grid).to_string(),
            Limit::Flops => Flops(spent.flops as f64).to_string(),
            Limit::Time => spent.time.spoken(),
            Limit::Cost => {
                let price = price.as_ref();
                let cost = price.map(|price| price.cost(*pue * energy, spent.time));
                cost.map_or_else(|| energy.to_string(), |cost| cost.to_string())
            }
        }
    }

    /// The limit itself, "2 gCO2e"; `None` if it is not set.
    pub fn allowed(&self, limit: Limit) -> Option<String> {
        let limits = &self.limits;
        match limit {
            Limit::Energy => limits.energy.map(|limit| limit.to_string()),
            Limit::Carbon => limits.carbon.map(|limit| limit.to_string()),
            Limit::Flops => limits.flops.map(|limit| limit.to_string()),
            Limit::Time => limits.time.map(Seconds::spoken),
            Limit::Cost => limits.cost.as_ref().map(Money::to_string),
        }
    }

    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        !self.thresholds.is_empty()
    }

    /// Whether `next` may be spent with `reserve` still possible after it; else the first limit, in
    /// the order of `Limits`, that would be exceeded.
    pub fn admits(
        &self,
        spent: &Spent,
        next: &Spent,
        reserve: &Spent,
    ) -> std::result::Result<(), Limit> {
        let total = *spent + *next + *reserve;
        let exceeded = self
            .thresholds
            .iter()
            .find(|(_, threshold)| !threshold.admits(&total));
        exceeded.map_or(Ok(()), |(limit, _)| Err(*limit))
    }

    /// The amounts left after `spent`, at least zero.
    pub fn remaining(&self, spent: &Spent) -> Allowance {
        let mut remaining = Allowance::default();
        for (_, threshold) in &self.thresholds {
            remaining.restrict(threshold, spent);
        }
        remaining
    }

    /// The amounts left for training after `spent` (before the first step) and `reserved` (final
    /// evaluation and save, and every other evaluation and save still planned).
    pub fn allowance(&self, spent: &Spent, reserved: &Spent) -> Allowance {
        self.remaining(&(*spent + *reserved))
    }

    /// The limit with the largest fraction spent, and that fraction.
    pub fn largest_fraction(&self, spent: &Spent) -> Option<(Limit, f64)> {
        let fractions = self.thresholds.iter();
        let fractions = fractions.map(|(limit, threshold)| (*limit, threshold.fraction(spent)));
        fractions.reduce(|best, other| if other.1 > best.1 { other } else { best })
    }

    /// Energy by which `spent` exceeds the tightest limit; zero on the counted meter.
    pub fn overshoot(&self, spent: &Spent) -> MicroJoules {
        let excess = self
            .thresholds
            .iter()
            .filter_map(|(_, threshold)| match threshold {
                Threshold::Energy(limit) => Some(spent.energy.saturating_sub(*limit)),
                _ => None,
            });
        excess.max().unwrap_or_default()
    }
}

/// Converts each limit to the quantity that is compared, in the order of `Limits`.
fn thresholds(limits: &Limits, rates: &Rates) -> Vec<(Limit, Threshold)> {
    let energy = limits
        .energy
        .map(|limit| largest_energy(|energy| is_within(energy.0, limit.0)));
    let carbon = limits.carbon.map(|limit| {
        largest_energy(|energy| is_within(carbon(energy, rates.pue, rates.grid).0, limit.0))
    });
    // The cast saturates: a count above u64::MAX cannot be reached.
    let flops = limits.flops.map(|flops| Threshold::Flops(flops.0 as u64));
    let priced = limits.cost.as_ref().zip(rates.price.as_ref());
    let cost = priced.map(|(cost, price)| cost_threshold(cost, price, rates.pue));
    let thresholds = [
        (Limit::Energy, energy),
        (Limit::Carbon, carbon),
        (Limit::Flops, flops),
        (Limit::Time, limits.time.map(Threshold::Time)),
        (Limit::Cost, cost),
    ];
    let thresholds = thresholds.into_iter();
    thresholds
        .filter_map(|(limit, threshold)| Some((limit, threshold?)))
        .collect()
}

/// Money as energy (priced per facility kilowatt-hour) or as device time.
fn cost_threshold(cost: &Money, price: &Price, pue: Pue) -> Threshold {
    let affords = |energy, time| is_within(price.cost(energy, time).amount, cost.amount);
    match price.per {
        Per::KilowattHour => largest_energy(|energy| affords(pue * energy, Seconds::ZERO)),
        Per::DeviceHour => {
            // The bits of non-negative floats are ordered like their values.
            let seconds = |bits: u64| Seconds(f64::from_bits(bits.min(f64::MAX.to_bits())));
            let bits = largest(|bits| affords(Joules::ZERO, seconds(bits)));
            Threshold::Time(seconds(bits))
        }
    }
}

/// The largest energy within a limit, in integer microjoules.
fn largest_energy(within: impl Fn(Joules) -> bool) -> Threshold {
    Threshold::Energy(MicroJoules(largest(|energy| {
        within(MicroJoules(energy).joules())
    })))
}

/// The largest x for which a monotone predicate holds, by binary search; 0 if it never holds.
fn largest(holds: impl Fn(u64) -> bool) -> u64 {
    if holds(u64::MAX) {
        return u64::MAX;
    }
    let mut low = 0;
    let mut high = u64::MAX;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

fn check_limits(limits: &Limits) -> Result<()> {
    let values = [
        ("budget.energy", limits.energy.map(|v| v.0)),
        ("budget.carbon", limits.carbon.map(|v| v.0)),
        ("budget.flops", limits.flops.map(|v| v.0)),
        ("budget.time", limits.time.map(|v| v.0)),
        ("budget.cost", limits.cost.as_ref().map(|v| v.amount)),
    ];
    for (key, value) in values {
        if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
            return Err(Error::new(Kind::Budget, format!("`{key}` is no budget"))
                .value(value.to_string())
                .rule("a number above zero")
                .hint(format!("remove `{key}` for a run without this limit")));
        }
    }
    Ok(())
}

fn check_rates(rates: &Rates, cost: Option<&Money>) -> Result<()> {
    let valid = |value: f64| value.is_finite() && value >= 0.0;
    if !valid(rates.grid.0) {
        let what = "the grid's intensity is no number of grams per kilowatt-hour";
        return Err(Error::new(Kind::Budget, what)
            .value(rates.grid.0.to_string())
            .rule("zero or more")
            .hint("write `grid = \"world\"` in [energy]"));
    }
    match (cost, &rates.price) {
        (Some(cost), None) => Err(Error::new(Kind::Budget, "a budget of money needs a price")
            .value(format!("budget.cost = \"{cost}\""))
            .hint(format!(
                "add `price = \"0.30 {}/kWh\"` (or `.../h` for a rented device) to [energy]",
                cost.currency
            ))),
        (Some(cost), Some(price)) if cost.currency != price.money.currency => {
            let what = "the budget and the price are in different currencies";
            let hint = format!(
                "write the price in {}, or the budget in {}",
                cost.currency, price.money.currency
            );
            Err(Error::new(Kind::Budget, what)
                .value(format!("{cost}; {price}"))
                .hint(hint))
        }
        (_, Some(price)) if !valid(price.money.amount) => {
            let what = "the price is not a number of zero or more";
            Err(Error::new(Kind::Budget, what).value(price.to_string()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GramsCo2e;

    fn rates(price: Option<&str>) -> Rates {
        Rates {
            grid: GramsPerKwh(429.0),
            pue: Pue::new(1.1).unwrap(),
            price: price.map(|p| p.parse().unwrap()),
        }
    }

    fn budget(limits: Limits, price: Option<&str>) -> Budget {
        Budget::new(limits, rates(price)).unwrap()
    }

    fn energy_limit(joules: f64) -> Limits {
        Limits {
            energy: Some(Joules(joules)),
            ..Limits::default()
        }
    }

    fn carbon_limit(grams: f64) -> Limits {
        Limits {
            carbon: Some(GramsCo2e(grams)),
            ..Limits::default()
        }
    }

    fn cost_limit(cost: &str) -> Limits {
        Limits {
            cost: Some(cost.parse().unwrap()),
            ..Limits::default()
        }
    }

    fn time_limit(seconds: f64) -> Limits {
        Limits {
            time: Some(Seconds(seconds)),
            ..Limits::default()
        }
    }

    fn spent(energy: u64, flops: u64, time: f64) -> Spent {
        Spent {
            energy: MicroJoules(energy),
            flops,
            time: Seconds(time),
        }
    }

    /// Limits that equal `spent`: as computed, and printed and parsed in another unit; with a price where the limit is money.
    fn equal_limits(spent: &Spent) -> Vec<(Limits, Option<&'static str>)> {
        let joules = spent.energy.joules();
        let grams = carbon(joules, rates(None).pue, rates(None).grid).0;
        let energy_text = |text: String| energy_limit(text.parse::<Joules>().unwrap().0);
        let carbon_text = |text: String| carbon_limit(text.parse::<GramsCo2e>().unwrap().0);
        let cost = |price: &'static str| {
            let price_of = rates(Some(price)).price.unwrap();
            let amount = price_of.cost(rates(None).pue * joules, spent.time).amount;
            (cost_limit(&format!("{amount} EUR")), Some(price))
        };
        let free = [
            energy_limit(joules.0),
            energy_text(format!("{} mJ", joules.0 * 1e3)),
            energy_text(format!("{} mWh", joules.0 / 3.6)),
            carbon_limit(grams),
            carbon_text(format!("{} mg", grams * 1e3)),
            carbon_text(format!("{} kg", grams / 1e3)),
            time_limit(spent.time.0),
        ];
        let priced = [cost("0.37 EUR/kWh"), cost("0.7 EUR/h")];
        free.map(|limit| (limit, None))
            .into_iter()
            .chain(priced)
            .collect()
    }

    #[test]
    fn a_limit_equal_to_the_cost_admits_it() {
        for step in 1..=100u64 {
            let energy = 7_919_317 * step * step;
            let spent = spent(energy, 0, 0.1 * step as f64);
            let more = Spent {
                energy: MicroJoules(energy + 2),
                time: spent.time * 1.000001,
                ..spent
            };
            for (limit, price) in equal_limits(&spent) {
                let budget = budget(limit.clone(), price);
                let none = Spent::default();
                assert_eq!(budget.admits(&none, &spent, &none), Ok(()), "{limit:?}");
                assert!(budget.admits(&none, &more, &none).is_err(), "{limit:?}");
            }
        }
    }

    #[test]
    fn the_first_exceeded_limit_is_returned() {
        let limits = Limits {
            energy: Some(Joules(2e-6)),
            flops: Some(Flops(10.0)),
            time: Some(Seconds(1.0)),
            ..Limits::default()
        };
        let budget = budget(limits, None);
        let none = Spent::default();
        let one = spent(1, 0, 0.0);
        assert_eq!(budget.admits(&one, &one, &none), Ok(()));
        assert_eq!(budget.admits(&one, &one, &one), Err(Limit::Energy));
        let flops = budget.admits(&spent(0, 10, 0.0), &none, &spent(0, 1, 0.0));
        assert_eq!(flops, Err(Limit::Flops));
        for time in [1.5, f64::NAN] {
            let verdict = budget.admits(&none, &spent(0, 0, time), &none);
            assert_eq!(verdict, Err(Limit::Time));
        }
        let largest = budget.largest_fraction(&spent(1, 7, 0.1));
        assert_eq!(largest, Some((Limit::Flops, 0.7)));
    }

    #[test]
    fn carbon_and_cost_limits_become_microjoules_or_seconds() {
        let left = |limits, price| budget(limits, price).remaining(&Spent::default());
        // 1 kWh (3.6e12 uJ) at 429 g and PUE 1.1 is 471.9 g: the largest integer number of
        // microjoules is that or one less.
        let energy = left(carbon_limit(471.9), None).energy.unwrap().0;
        assert!(energy.abs_diff(3_600_000_000_000) <= 1, "{energy}");
        // 0.33 USD at 0.30 USD per facility kWh and PUE 1.1: again 1 kWh of the machine.
        let energy = left(cost_limit("0.33 USD"), Some("0.30 USD/kWh"))
            .energy
            .unwrap()
            .0;
        assert!(energy.abs_diff(3_600_000_000_000) <= 1, "{energy}");
        // 0.33 USD at 0.66 USD an hour: half an hour.
        let time = left(cost_limit("0.33 USD"), Some("0.66 USD/h"))
            .time
            .unwrap();
        assert!((time.0 - 1800.0).abs() < 1e-6);
    }

    #[test]
    fn a_carbon_limit_never_binds_on_a_grid_of_zero_intensity() {
        let rates = Rates {
            grid: GramsPerKwh(0.0),
            ..rates(None)
        };
        let budget = Budget::new(carbon_limit(1.0), rates).unwrap();
        let verdict = budget.admits(
            &spent(u64::MAX, 0, 0.0),
            &spent(1, 0, 0.0),
            &Spent::default(),
        );
        assert_eq!(verdict, Ok(()));
    }

    #[test]
    fn an_invalid_budget_is_refused_with_a_remedy() {
        let refused = [
            Budget::new(cost_limit("1 USD"), rates(None)),
            Budget::new(cost_limit("1 EUR"), rates(Some("0.3 USD/kWh"))),
            Budget::new(energy_limit(0.0), rates(None)),
            Budget::new(time_limit(f64::NAN), rates(None)),
        ];
        for result in refused {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), Kind::Budget);
            assert!(error.remedy().is_some(), "{error}");
        }
    }

    #[test]
    fn progress_is_the_fraction_of_trainings_allowance() {
        // 100 uJ, of which 10 went on loading and 20 are reserved: 70 for training. 35 spent is
        // half of it.
        let limited = budget(energy_limit(1e-4), None);
        let allowance = limited.allowance(&spent(10, 0, 0.0), &spent(20, 0, 0.0));
        assert_eq!(allowance.energy, Some(MicroJoules(70)));
        assert_eq!(allowance.fraction(&spent(35, 0, 0.0)), 0.5);
        assert_eq!(allowance.fraction(&spent(90, 0, 0.0)), 1.0);
        assert_eq!(limited.overshoot(&spent(103, 0, 0.0)), MicroJoules(3));
        let unlimited = budget(Limits::default(), None);
        let allowance = unlimited.allowance(&Spent::default(), &Spent::default());
        assert_eq!(allowance.fraction(&spent(35, 9, 9.0)), 0.0);
    }
}
