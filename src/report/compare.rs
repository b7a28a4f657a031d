//! Comparison of runs: cost of each, and loss reduction per joule.
//!
//! Runs of different models or data are not ranked. Knows nothing of run directories.

use std::collections::BTreeSet;

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
    /// Run of the largest loss reduction per joule; `None` where runs cannot be ranked or no loss fell.
    pub best: Option<String>,
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
    let best = if notes.is_empty() {
        best(&rows)
    } else {
        notes.push("runs are not ranked: their losses are not comparable".to_string());
        None
    };
    if meters.len() > 1 {
        let meters: Vec<String> = meters.into_iter().collect();
        notes.push(format!(
            "the runs used different meters ({}): energies here are counted",
            meters.join(", ")
        ));
    }
    notes.extend(different_bases(runs));
    Comparison {
        meter,
        runs: rows,
        best,
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
        loss_per_kj: per_kj.filter(|rate| rate.is_finite()),
    }
}

/// The run of the highest positive rate; of equals the first.
fn best(rows: &[Row]) -> Option<String> {
    let rated = rows
        .iter()
        .filter_map(|row| Some((row.loss_per_kj.filter(|rate| *rate > 0.0)?, row)));
    let best = rated.reduce(|best, next| if next.0 > best.0 { next } else { best });
    best.map(|(_, row)| row.name.clone())
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

    /// The best run.
    pub fn verdict(&self) -> String {
        match &self.best {
            Some(name) => format!("Largest loss reduction per joule: {name}."),
            None => "Runs are not ranked.".to_string(),
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
