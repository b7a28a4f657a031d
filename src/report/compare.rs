//! Comparison of runs: cost of each, and loss reduction per joule.
//!
//! Runs of different models or data are not ranked. Knows nothing of run directories.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::finite::FiniteReport;
use super::format;
use super::text::{Table, bullet, paragraph, printable};
use super::types::{Meter, keys};
use crate::energy::Interval;
use crate::units::{GramsCo2e, Joules};

/// Figures of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Name given by the caller.
    pub name: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Training tokens.
    pub tokens: Option<u64>,
    /// On the comparison's meter: `energy_j`, `low_j`, `high_j`.
    #[serde(flatten, serialize_with = "keys::energy::serialize")]
    pub energy: Interval<Joules>,
    /// On the run's own grid: `gco2e`, `low_gco2e`, `high_gco2e`.
    #[serde(flatten, serialize_with = "keys::emissions::serialize")]
    pub emissions: Interval<GramsCo2e>,
    /// Nats per loss token.
    pub val_loss_before: Option<f64>,
    /// Nats per loss token.
    pub val_loss_after: Option<f64>,
    /// Standard error of `val_loss_after` over the loss tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_loss_after_se: Option<f64>,
    /// Reduction of the validation loss per kilojoule.
    pub loss_per_kj: Option<f64>,
}

/// Several runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Meter of every row's energy.
    pub meter: Meter,
    /// In the caller's order.
    pub runs: Vec<Row>,
    /// Run of the largest loss reduction per joule; `None` where runs cannot be ranked, no loss fell, or the first two differ
    /// by no more than the standard error of their losses.
    pub best: Option<String>,
    /// Run of the lowest validation loss, under the same conditions.
    pub lowest_loss: Option<String>,
    /// Differences that affect the comparison.
    pub notes: Vec<String>,
}

/// Compares runs. Runs on different meters are compared on the counted one, which all have.
pub fn compare(runs: &[(String, FiniteReport)]) -> Comparison {
    let meters: BTreeSet<String> = runs
        .iter()
        .map(|(_, report)| format::word(report.energy.meter))
        .collect();
    let meter = match runs.first() {
        Some((_, first)) if meters.len() == 1 => first.energy.meter,
        _ => Meter::Counted,
    };
    let rows: Vec<Row> = runs
        .iter()
        .map(|(name, report)| row(name, report, meter))
        .collect();
    let mut notes = incomparable(runs);
    let mut ties = Vec::new();
    let [best, lowest_loss] = if notes.is_empty() {
        winners(&rows, &mut ties)
    } else {
        notes.push("runs are not ranked: their losses are not comparable".to_string());
        [None, None]
    };
    if meters.len() > 1 {
        let meters: Vec<String> = meters.into_iter().collect();
        notes.push(format!(
            "the runs used different meters ({}): energies here are counted",
            meters.join(", ")
        ));
    }
    notes.extend(different_bases(runs));
    notes.extend(ties);
    Comparison {
        meter,
        runs: rows,
        best,
        lowest_loss,
        notes,
    }
}

/// Differences of grids, device profiles and what the energy includes.
fn different_bases(runs: &[(String, FiniteReport)]) -> Vec<String> {
    let grids = differing(
        runs,
        "emissions are not comparable: grids or overheads differ",
        |report| {
            let carbon = &report.carbon;
            let intensity = carbon.gco2e_per_kwh.0;
            let pue = carbon.pue.value();
            Some(format!(
                "{} at {intensity} gCO2e/kWh, PUE {pue}",
                carbon.grid
            ))
        },
    );
    let devices = differing(runs, "the runs used different device profiles", |report| {
        Some(report.energy.device.clone())
    });
    let alone: Vec<&str> = runs
        .iter()
        .filter(|(_, report)| report.energy.host_left_out.is_some())
        .map(|(name, _)| name.as_str())
        .collect();
    let hosts = (!alone.is_empty() && alone.len() < runs.len())
        .then(|| format!("host machine not included for {}", alone.join(", ")));
    [grids, devices, hosts].into_iter().flatten().collect()
}

fn row(name: &str, report: &FiniteReport, meter: Meter) -> Row {
    let energy = if meter == report.energy.meter {
        report.energy.total
    } else {
        Interval::exact(report.energy.meters.counted_j)
    };
    let training = &report.training;
    let per_kj = report
        .loss_reduction()
        .map(|reduction| reduction / (energy.central.0 / 1000.0));
    Row {
        name: name.to_string(),
        steps: training.steps,
        tokens: training.tokens,
        energy,
        emissions: report.carbon.emissions,
        val_loss_before: training.val_loss_before,
        val_loss_after: training.val_loss_after,
        val_loss_after_se: training.val_loss_after_se,
        loss_per_kj: per_kj.filter(|rate| rate.is_finite()),
    }
}

/// The runs of the largest loss reduction per joule and of the lowest loss.
fn winners(rows: &[Row], ties: &mut Vec<String>) -> [Option<String>; 2] {
    let kilojoules = |row: &Row| row.energy.central.0 / 1000.0;
    let best = winner(
        rows,
        "loss reductions per joule",
        |row| row.loss_per_kj.filter(|rate| *rate > 0.0),
        |row| Some(row.val_loss_after_se? / kilojoules(row)),
        ties,
    );
    let lowest_loss = winner(
        rows,
        "losses",
        |row| row.val_loss_after.map(|loss| -loss),
        |row| row.val_loss_after_se,
        ties,
    );
    [best, lowest_loss]
}

/// The run of the highest score, each with its standard error (zero where unknown). Two runs that differ by no more than that are a
/// tie, which a note says.
fn winner(
    rows: &[Row],
    what: &str,
    score: impl Fn(&Row) -> Option<f64>,
    standard_error: impl Fn(&Row) -> Option<f64>,
    notes: &mut Vec<String>,
) -> Option<String> {
    let mut scored: Vec<(f64, &Row)> = rows
        .iter()
        .filter_map(|row| Some((score(row)?, row)))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (best, winner) = *scored.first()?;
    let error = |row: &Row| standard_error(row).unwrap_or(0.0);
    let tied: Vec<&str> = scored
        .iter()
        .filter(|(score, row)| best - score <= error(winner).max(error(row)))
        .map(|(_, row)| row.name.as_str())
        .collect();
    if tied.len() < 2 {
        return Some(winner.name.clone());
    }
    notes.push(format!(
        "a tie: the {what} of {} differ by no more than their standard error",
        tied.join(", ")
    ));
    None
}

/// Why the losses of these runs are not comparable; empty where they are.
fn incomparable(runs: &[(String, FiniteReport)]) -> Vec<String> {
    let model = differing(runs, "the runs are of different models", |report| {
        Some(report.model.id.clone())
    });
    let revision = differing(runs, "the models' revisions differ", |report| {
        report.model.revision.clone()
    });
    let data = differing(runs, "the runs used different data", |report| {
        report.data.fingerprint.clone()
    });
    let mut notes: Vec<String> = [model, revision, data].into_iter().flatten().collect();
    let unknown: Vec<&str> = runs
        .iter()
        .filter(|(_, report)| report.data.fingerprint.is_none())
        .map(|(name, _)| name.as_str())
        .collect();
    if !unknown.is_empty() && runs.len() > 1 {
        notes.push(format!(
            "whether the data are the same is not known: no fingerprint in {}",
            unknown.join(", ")
        ));
    }
    notes
}

/// A note with each value and its runs, where the known values differ.
fn differing(
    runs: &[(String, FiniteReport)],
    what: &str,
    value: impl Fn(&FiniteReport) -> Option<String>,
) -> Option<String> {
    let values: Vec<(&str, String)> = runs
        .iter()
        .filter_map(|(name, report)| Some((name.as_str(), value(report)?)))
        .collect();
    let distinct: BTreeSet<&String> = values.iter().map(|(_, value)| value).collect();
    if distinct.len() < 2 {
        return None;
    }
    let named = |value: &String| {
        let names: Vec<&str> = values
            .iter()
            .filter(|(_, other)| other == value)
            .map(|(name, _)| *name)
            .collect();
        format!("{}: {value}", names.join(", "))
    };
    let all: Vec<String> = distinct.into_iter().map(named).collect();
    Some(format!("{what} ({})", all.join("; ")))
}

/// The values of a recipe by dotted key.
fn flattened(recipe: &toml::Table) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    for (key, value) in recipe {
        match value {
            toml::Value::Table(table) => {
                let nested = flattened(table).into_iter();
                flat.extend(nested.map(|(inner, value)| (format!("{key}.{inner}"), value)));
            }
            value => {
                flat.insert(key.clone(), value.to_string());
            }
        }
    }
    flat
}

impl Comparison {
    /// One row a run.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "run",
            "steps",
            "tokens",
            "energy",
            "emissions",
            "loss before",
            "loss after",
            "reduction per kJ",
        ]);
        for row in &self.runs {
            table.row([
                row.name.clone(),
                format::count(row.steps),
                format::or_unknown(row.tokens, format::count),
                format::energy(row.energy.central),
                format::carbon(row.emissions.central),
                format::or_unknown(row.val_loss_before, format::number),
                format::or_unknown(row.val_loss_after, format::number),
                format::or_unknown(row.loss_per_kj, format::number),
            ]);
        }
        table
    }

    /// Ranges of energy and emissions, by run.
    pub fn ranges(&self) -> Vec<String> {
        let ranges = self.runs.iter().filter_map(|row| {
            let energy = format::range(&row.energy, |joules| joules.to_string());
            let emissions = format::range(&row.emissions, format::carbon);
            let both: Vec<String> = energy.into_iter().chain(emissions).collect();
            (!both.is_empty()).then(|| format!("{}: {}", row.name, both.join(", ")))
        });
        ranges.collect()
    }

    /// Meter and unit of the figures.
    pub fn basis(&self) -> String {
        format!(
            "Energy is {}; validation losses are in nats per token.",
            format::word(self.meter)
        )
    }

    /// The best runs.
    pub fn verdict(&self) -> String {
        let named = |what: &str, run: &Option<String>| {
            let run = run.as_ref()?;
            Some(format!("{what}: {run}."))
        };
        let best = named("Largest loss reduction per joule", &self.best);
        let lowest = named("Lowest validation loss", &self.lowest_loss);
        let said: Vec<String> = best.into_iter().chain(lowest).collect();
        if said.is_empty() {
            "Runs are not ranked.".to_string()
        } else {
            said.join(" ")
        }
    }

    /// Adds the keys in which the runs' recipes differ, each with its values. `recipes` is in the order of the runs.
    pub fn note_recipes(&mut self, recipes: &[toml::Table]) {
        let flat: Vec<BTreeMap<String, String>> = recipes.iter().map(flattened).collect();
        let keys: BTreeSet<&String> = flat.iter().flat_map(BTreeMap::keys).collect();
        for key in keys {
            let values: BTreeSet<Option<&String>> = flat.iter().map(|keys| keys.get(key)).collect();
            if values.len() < 2 {
                continue;
            }
            let named = self.runs.iter().zip(&flat).map(|(run, keys)| {
                let value = keys.get(key).map_or("not set", String::as_str);
                format!("{}: {value}", run.name)
            });
            let named: Vec<String> = named.collect();
            self.notes
                .push(format!("{key} differs ({})", named.join("; ")));
        }
    }

    /// Text for a terminal of at most 100 columns.
    pub fn text(&self) -> String {
        let notes: String = self
            .ranges()
            .iter()
            .chain(&self.notes)
            .map(|note| bullet(note))
            .collect();
        let sentences = paragraph(&self.basis(), 0) + &paragraph(&self.verdict(), 0);
        printable(&format!("{}\n{sentences}{notes}", self.table().text(0)))
    }
}
