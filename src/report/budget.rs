//! The budgets a recipe set, in words and numbers.
//!
//! Owns the order and the names of the five budgets on a page. Takes the report's `budget` block, returns one entry for each
//! limit that was set. Knows nothing of how a budget binds.

use super::show;
use super::types::Budget;
use crate::units::Money;

/// A limit that was set.
pub struct Entry {
    /// The recipe's key.
    pub name: &'static str,
    /// The limit, for people.
    pub allowed: String,
    /// What was spent of it, for people.
    pub spent: String,
    /// What was spent over the limit, in per cent.
    pub used: String,
}

/// The limits that were set, in the recipe's order.
pub fn entries(budget: &Budget) -> Vec<Entry> {
    let (limits, spent) = (&budget.limits, &budget.spent);
    let money = |money: Money| money.to_string();
    let all = [
        entry(
            "energy",
            limits.energy_j,
            spent.energy_j,
            |joules| joules.0,
            show::energy,
        ),
        entry(
            "carbon",
            limits.carbon_gco2e,
            spent.carbon_gco2e,
            |grams| grams.0,
            show::carbon,
        ),
        entry(
            "flops",
            limits.flops,
            spent.flops,
            |flops| flops.0,
            show::flops,
        ),
        entry(
            "time",
            limits.time_s,
            spent.time_s,
            |seconds| seconds.0,
            show::time,
        ),
        entry(
            "cost",
            limits.cost.clone(),
            spent.cost.clone(),
            |money| money.amount,
            money,
        ),
    ];
    all.into_iter().flatten().collect()
}

fn entry<T: Clone>(
    name: &'static str,
    limit: Option<T>,
    spent: Option<T>,
    size: impl Fn(&T) -> f64,
    form: impl Fn(T) -> String,
) -> Option<Entry> {
    let limit = limit?;
    let used = show::or_unknown(spent.as_ref(), |spent| {
        show::share(size(spent), size(&limit))
    });
    Some(Entry {
        name,
        allowed: form(limit),
        spent: show::or_unknown(spent, form),
        used,
    })
}
