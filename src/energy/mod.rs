//! Device profiles, sensors, meters, carbon, baselines, the budget and the ledger.
//!
//! Owns what joules are made of: a `Work` goes in, a charge, a verdict or a line of the ledger comes out. `Profile` is the
//! device, `Meters` measure a window, `Budget` says whether the next step may run, `Ledger` remembers, `Account` puts the four
//! together for whoever spends. Knows nothing of tensors, models or training: a phase is a name here and a step is a number.

pub mod account;
pub mod baseline;
pub mod budget;
pub mod carbon;
pub mod charge;
mod cloud;
pub mod counters;
mod detect;
mod entry;
pub mod interval;
pub mod ledger;
pub mod meter;
pub mod options;
pub mod profile;
pub mod sensor;
mod table;
pub mod traffic;

pub use account::{Account, Verdict};
pub use baseline::Baseline;
pub use budget::{Budget, Limit, Rates, Spent};
pub use carbon::{Grid, carbon};
pub use charge::{Charge, EnergyBreakdown};
pub use counters::Counters;
pub use detect::{allowed_cores, part_of_machine};
pub use interval::Interval;
pub use ledger::{Energies, Entry, Ledger, Phase};
pub use meter::{Meters, Reading};
pub use options::{DeviceRef, GridRef, Limits, MeterKind};
pub use profile::Profile;
pub use table::{Measured, MeasuredCache, MeasuredPower};

/// The names most like `text`, best first, at most five: for the hint of an error about an unknown name.
pub(crate) fn near_matches<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = text.to_lowercase();
    let likeness = |name: &str| {
        let name = name.to_lowercase();
        let part = if name.contains(&wanted) || wanted.contains(&name) {
            0.2
        } else {
            0.0
        };
        strsim::jaro_winkler(&wanted, &name) + part
    };
    let mut scored: Vec<(f64, &str)> = names
        .map(|name| (likeness(name), name))
        .filter(|(score, _)| *score > 0.75)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(5).map(|(_, name)| name).collect()
}

/// "did you mean `a`, `b`?", or `otherwise` where nothing is near.
pub(crate) fn did_you_mean(near: &[&str], otherwise: &str) -> String {
    if near.is_empty() {
        return otherwise.to_string();
    }
    let quoted: Vec<String> = near.iter().map(|name| format!("`{name}`")).collect();
    format!("did you mean {}? {otherwise}", quoted.join(", "))
}
