//! Runs side by side: what each cost, and how much loss each bought per joule.
//!
//! Owns the comparison. Takes named reports, returns rows, the run that bought most, and notes on everything that makes the
//! rows unlike. Refuses to name a winner among runs of different models or data. Knows nothing of run directories.

use std::collections::BTreeSet;

use serde::Serialize;

use super::show;
use super::table::Table;
use super::text::{bullet, paragraph, printable};
use super::types::{Meter, Report};
use crate::units::{GramsCo2e, Joules};

/// One run's line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// As the caller names the run.
    pub name: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: Option<u64>,
    /// Energy on the comparison's meter.
    pub energy_j: Joules,
    /// A lower bound of it, where the coefficients have one.
    pub low_j: Option<Joules>,
    /// An upper bound of it.
    pub high_j: Option<Joules>,
    /// The run's own emissions.
    pub gco2e: GramsCo2e,
    /// A lower bound of them, where there is one.
    pub low_gco2e: Option<GramsCo2e>,
    /// An upper bound of them.
    pub high_gco2e: Option<GramsCo2e>,
    /// Validation loss before, nats per loss token.
    pub val_loss_before: Option<f64>,
    /// Validation loss after.
    pub val_loss_after: Option<f64>,
    /// Nats per loss token that the validation loss fell for each kilojoule.
    pub loss_per_kj: Option<f64>,
}

/// Several runs side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The meter that every row's energy goes by.
    pub meter: Meter,
    /// One row a run, in the caller's order.
    pub runs: Vec<Row>,
    /// The run that bought the most loss per joule; `None` where the runs cannot be ranked or none bought any.
    pub best: Option<String>,
    /// What a reader of the rows has to know.
    pub notes: Vec<String>,
}

/// Compares runs. Where they went by different meters, every row's energy is the counted one, which all of them have.
pub fn compare(runs: &[(String, Report)]) -> Comparison {
    let meters: BTreeSet<String> = runs
        .iter()
        .map(|(_, report)| show::word(report.energy.meter))
        .collect();
    let meter = match runs.first() {
        Some((_, first)) if meters.len() == 1 => first.energy.meter,
        _ => Meter::Counted,
    };
    let rows: Vec<Row> = runs
        .iter()
        .map(|(name, report)| row(name, report, meter))
        .collect();
    let unlike = unlike(runs);
    let best = if unlike.is_empty() { best(&rows) } else { None };
    let mut notes = unlike;
    if !notes.is_empty() {
        notes.push(
            "no run is named the best: their losses do not measure the same thing".to_string(),
        );
    }
    if meters.len() > 1 {
        let meters: Vec<String> = meters.into_iter().collect();
        notes.push(format!(
            "the runs went by different meters ({}): energies here are the counted ones",
            meters.join(", ")
        ));
    }
    notes.extend(differing(
        runs,
        "the emissions are not comparable: the grids or overheads differ",
        |report| {
            Some(format!(
                "{} at {} gCO2e/kWh, PUE {}",
                report.carbon.grid,
                report.carbon.gco2e_per_kwh.0,
                report.carbon.pue.value()
            ))
        },
    ));
    notes.extend(differing(
        runs,
        "the runs were charged to different device profiles",
        |report| Some(report.energy.device.clone()),
    ));
    let alone: Vec<&str> = runs
        .iter()
        .filter(|(_, report)| report.energy.host_left_out.is_some())
        .map(|(name, _)| name.as_str())
        .collect();
    if !alone.is_empty() && alone.len() < runs.len() {
        notes.push(format!(
            "the machine around the device is in no joule of {}",
            alone.join(", ")
        ));
    }
    Comparison {
        meter,
        runs: rows,
        best,
        notes,
    }
}

fn row(name: &str, report: &Report, meter: Meter) -> Row {
    let own = meter == report.energy.meter;
    let energy_j = if own {
        report.energy.total_j
    } else {
        report.energy.meters.counted_j
    };
    let per_kj = report
        .loss_bought()
        .map(|bought| bought / (energy_j.0 / 1000.0))
        .filter(|rate| rate.is_finite());
    Row {
        name: name.to_string(),
        steps: report.training.steps,
        tokens: report.training.tokens,
        energy_j,
        low_j: report.energy.low_j.filter(|low| own && low.0.is_finite()),
        high_j: report
            .energy
            .high_j
            .filter(|high| own && high.0.is_finite()),
        gco2e: report.carbon.gco2e,
        low_gco2e: report.carbon.low_gco2e.filter(|low| low.0.is_finite()),
        high_gco2e: report.carbon.high_gco2e.filter(|high| high.0.is_finite()),
        val_loss_before: report
            .training
            .val_loss_before
            .filter(|loss| loss.is_finite()),
        val_loss_after: report
            .training
            .val_loss_after
            .filter(|loss| loss.is_finite()),
        loss_per_kj: per_kj,
    }
}

/// The run of the highest positive rate; of equals the first.
fn best(rows: &[Row]) -> Option<String> {
    let bought = rows
        .iter()
        .filter_map(|row| Some((row.loss_per_kj.filter(|rate| *rate > 0.0)?, row)));
    let best = bought.reduce(|best, next| if next.0 > best.0 { next } else { best });
    best.map(|(_, row)| row.name.clone())
}

/// Why the losses of these runs do not measure the same thing; empty where they do.
fn unlike(runs: &[(String, Report)]) -> Vec<String> {
    let mut notes = differing(runs, "the runs are of different models", |report| {
        Some(report.model.id.clone())
    });
    notes.extend(differing(runs, "the models' revisions differ", |report| {
        report.model.revision.clone()
    }));
    notes.extend(differing(runs, "the runs saw different data", |report| {
        report.data.fingerprint.clone()
    }));
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

/// A note with each value and its runs, where the known values are not all equal.
fn differing(
    runs: &[(String, Report)],
    what: &str,
    of: impl Fn(&Report) -> Option<String>,
) -> Vec<String> {
    let values: Vec<(&str, String)> = runs
        .iter()
        .filter_map(|(name, report)| Some((name.as_str(), of(report)?)))
        .collect();
    let distinct: BTreeSet<&String> = values.iter().map(|(_, value)| value).collect();
    if distinct.len() < 2 {
        return Vec::new();
    }
    let runs_of = |value: &String| {
        let names: Vec<&str> = values
            .iter()
            .filter(|(_, own)| own == value)
            .map(|(name, _)| *name)
            .collect();
        names.join(", ")
    };
    let each: Vec<String> = distinct
        .into_iter()
        .map(|value| format!("{}: {value}", runs_of(value)))
        .collect();
    vec![format!("{what} ({})", each.join("; "))]
}

impl Comparison {
    /// Every run's figures, one row a run.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "run",
            "steps",
            "tokens",
            "energy",
            "emissions",
            "loss before",
            "after",
            "bought per kJ",
        ]);
        for row in &self.runs {
            table.row([
                row.name.clone(),
                show::count(row.steps),
                show::or_unknown(row.tokens, show::count),
                show::energy(row.energy_j),
                show::carbon(row.gco2e),
                show::or_unknown(row.val_loss_before, show::number),
                show::or_unknown(row.val_loss_after, show::number),
                show::or_unknown(row.loss_per_kj, show::number),
            ]);
        }
        table
    }

    /// How far each run's energy and emissions may be off.
    pub fn bounds(&self) -> Vec<String> {
        let of = |row: &Row| {
            let energy = show::between(row.low_j, row.high_j, |joules| joules.to_string());
            let carbon = show::between(row.low_gco2e, row.high_gco2e, show::carbon);
            let both: Vec<String> = energy.into_iter().chain(carbon).collect();
            (!both.is_empty()).then(|| format!("{}: {}", row.name, both.join(", ")))
        };
        self.runs.iter().filter_map(of).collect()
    }

    /// What the rows' figures are.
    pub fn basis(&self) -> String {
        format!(
            "Energy as {}; losses on validation records, in nats per loss token.",
            show::word(self.meter)
        )
    }

    /// Which run bought the most.
    pub fn verdict(&self) -> String {
        match &self.best {
            Some(name) => format!("{name} bought the most loss per joule."),
            None => "No run is named the best.".to_string(),
        }
    }

    /// The lines for a terminal, at most 100 columns wide.
    pub fn text(&self) -> String {
        let notes: String = self
            .bounds()
            .iter()
            .chain(&self.notes)
            .map(|note| bullet(note))
            .collect();
        let words = paragraph(&self.basis(), 0) + &paragraph(&self.verdict(), 0);
        printable(&format!("{}\n{words}{notes}", self.table().text(0)))
    }

    /// The JSON document of `compare --json`.
    pub fn json(&self) -> serde_json::Value {
        // Every optional figure here is finite, and serde_json writes any other number that is not as null.
        serde_json::to_value(self).expect("a comparison holds only texts, numbers and lists")
    }
}
