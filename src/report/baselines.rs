//! The `baselines` block of `report.json`, and the comparison section.
//!
//! An energy to equal loss that was extrapolated says so. Knows nothing of how a baseline is counted or trained.
#![allow(
    missing_docs,
    reason = "fields are keys of report.json; units are in their names"
)]

use serde::{Deserialize, Serialize};

use super::format;
use super::sections::{Block, bullets};
use super::text::Table;
use super::types::{Meter, Report, keys};
use crate::energy::Interval;
pub use crate::energy::baseline::{BaselineKind, Label};
use crate::units::{Flops, GramsCo2e, Joules};

/// Another way to the same model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    pub kind: BaselineKind,
    pub label: Label,
    pub flops: Option<Flops>,
    /// On this run's device and meter: `energy_j`, `low_j`, `high_j`.
    #[serde(flatten, with = "keys::energy")]
    pub energy: Option<Interval<Joules>>,
    /// Factor from counted to measured or timed energy, as this run showed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metered_over_counted: Option<f64>,
    /// On this run's grid: `gco2e`, `low_gco2e`, `high_gco2e`.
    #[serde(flatten, with = "keys::emissions")]
    pub emissions: Option<Interval<GramsCo2e>>,
    /// Energy over this run's: `ratio`, `low_ratio`, `high_ratio`. Narrower than the energies where both share their error.
    #[serde(flatten, with = "keys::ratio")]
    pub ratio: Option<Interval<f64>>,
    /// Publisher or formula.
    pub source: String,
    #[serde(default)]
    pub assumptions: Vec<String>,
    /// Nats per loss token, after this run's training energy.
    #[serde(default)]
    pub val_loss_at_equal_energy: Option<f64>,
    /// Training energy to this run's validation loss; `measured` says whether it was reached or extrapolated.
    #[serde(default)]
    pub energy_to_equal_loss_j: Option<Joules>,
    /// Where the baseline was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<MeasuredBaseline>,
}

/// Training of a baseline. Training energy is that of steps, without loading, evaluations and checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasuredBaseline {
    pub steps: u64,
    /// Steps whose counted energy is the run's training energy.
    pub steps_at_equal_energy: u64,
    pub stop_reason: BaselineStop,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Training energy of the run, on its meter.
    pub run_training_j: Joules,
    /// Training energy of the baseline, on the same meter.
    pub training_j: Joules,
    /// Nats per loss token.
    pub run_val_loss: f64,
    pub equal_loss: EqualLoss,
    /// Loss against training energy.
    pub curve: Vec<CurvePoint>,
}

/// Why a trained baseline stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaselineStop {
    /// At the run's training energy.
    EqualEnergy,
    /// At the run's loss, beyond equal energy.
    EqualLoss,
    /// At `energy_multiple` times the run's training energy.
    EnergyMultiple,
    /// At `baseline.budget`.
    Budget,
    Interrupted,
    /// A loss or gradient was not finite.
    Diverged,
}

/// Basis of an energy to equal loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reached {
    /// An evaluation was at or below the loss.
    Measured,
    /// A power law through the last evaluations reaches it.
    Extrapolated,
    /// Neither.
    No,
}

/// Training energy to the run's validation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EqualLoss {
    pub how: Reached,
    /// `None` where the loss was neither reached nor extrapolated to.
    pub energy_j: Option<Joules>,
    /// Over the run's training energy.
    pub times: Option<f64>,
    /// Training energy spent.
    pub tried_j: Joules,
}

/// A point of a loss curve; losses in nats per loss token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    pub step: u64,
    /// Training energy up to this step, on the run's meter.
    pub energy_j: Joules,
    pub train_loss: Option<f64>,
    /// On steps followed by an evaluation.
    pub val_loss: Option<f64>,
}

impl Baseline {
    /// "full fine-tuning"; a trained baseline is listed next to the counted one of its kind.
    pub fn name(&self) -> String {
        let trained = if self.measured.is_some() {
            ", trained here"
        } else {
            ""
        };
        format!("{}{trained}", kind_name(self.kind))
    }

    /// How its figures are known.
    fn basis(&self, meter: Meter) -> String {
        if self.measured.is_some() {
            return format!("trained, energy {}", format::word(meter));
        }
        let scaled = self
            .metered_over_counted
            .map(|factor| format!(", scaled by {}", format::number(factor)));
        format::word(self.label) + &scaled.unwrap_or_default()
    }

    /// Ranges of energy and emissions.
    fn ranges(&self) -> Option<String> {
        let energy = self
            .energy
            .and_then(|energy| format::range(&energy, |joules| joules.to_string()));
        let emissions = self
            .emissions
            .and_then(|emissions| format::range(&emissions, format::carbon));
        let ranges: Vec<String> = energy.into_iter().chain(emissions).collect();
        (!ranges.is_empty()).then(|| format!("{}: {}", self.name(), ranges.join(", ")))
    }

    /// "1.50 (1.45 to 1.55)".
    fn ratio_text(&self) -> String {
        let Some(ratio) = self.ratio else {
            return format::UNKNOWN.to_string();
        };
        let [low, central, high] = [ratio.low, ratio.central, ratio.high].map(format::times);
        if low == high {
            central
        } else {
            format!("{central} ({})", format::span(&low, &high))
        }
    }
}

pub fn kind_name(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full fine-tuning",
        BaselineKind::FromScratchSameTask => "from scratch, same task",
        BaselineKind::Pretraining => "pretraining",
    }
}

/// The baselines in reading order.
pub(super) fn sorted(report: &Report) -> Vec<&Baseline> {
    let mut baselines: Vec<&Baseline> = report.baselines.iter().collect();
    baselines.sort_by_key(|baseline| baseline.kind);
    baselines
}

/// The run and every baseline; full fine-tuning has a row even where it is not known.
pub(super) fn comparison(report: &Report) -> Vec<Block> {
    let baselines = sorted(report);
    if baselines.is_empty() {
        return vec![Block::Paragraph("No baselines.".to_string())];
    }
    let meter = report.energy.meter;
    let mut blocks = vec![Block::Table(comparison_table(report, &baselines))];
    if let Some(factor) = baselines.iter().find_map(|b| b.metered_over_counted) {
        blocks.push(Block::Paragraph(format!(
            "The {} energy of this run is {} times its counted energy; counted baselines are scaled by that factor.",
            format::word(meter),
            format::number(factor)
        )));
    }
    let ranges = baselines.iter().filter_map(|baseline| baseline.ranges());
    let trained = baselines.iter().flat_map(|baseline| at_equal(baseline));
    blocks.extend(bullets(ranges.chain(trained).collect()));
    if baselines
        .iter()
        .any(|b| b.kind == BaselineKind::Pretraining)
    {
        let advice = "Any fine-tuning is cheap next to pretraining: compare an adapter with full fine-tuning.";
        blocks.push(Block::Paragraph(advice.to_string()));
    }
    blocks
}

fn comparison_table(report: &Report, baselines: &[&Baseline]) -> Table {
    let energy = &report.energy;
    let mut table = Table::new(&[
        "method",
        "FLOPs",
        "energy",
        "emissions",
        "relative to this run",
        "basis",
    ]);
    table.row([
        "this run".to_string(),
        format::flops(Flops(energy.flops as f64)),
        format::energy(energy.total.central),
        format::carbon(report.carbon.emissions.central),
        "1".to_string(),
        format::word(energy.meter),
    ]);
    if baselines[0].kind != BaselineKind::FullFineTuning {
        let mut row = vec![kind_name(BaselineKind::FullFineTuning).to_string()];
        row.resize(6, format::UNKNOWN.to_string());
        table.row(row);
    }
    for baseline in baselines {
        table.row([
            baseline.name(),
            format::or_unknown(baseline.flops, format::flops),
            format::or_unknown(baseline.energy, |energy| format::energy(energy.central)),
            format::or_unknown(baseline.emissions, |grams| format::carbon(grams.central)),
            baseline.ratio_text(),
            baseline.basis(energy.meter),
        ]);
    }
    table
}

/// A trained baseline at equal energy and at equal loss.
fn at_equal(baseline: &Baseline) -> Vec<String> {
    let measured = baseline.measured.as_ref();
    let loss = baseline.val_loss_at_equal_energy.map(|loss| {
        let own = measured.map(|m| format!(" (this run: {})", format::number(m.run_val_loss)));
        format!(
            "validation loss {} at equal training energy{}",
            format::number(loss),
            own.unwrap_or_default()
        )
    });
    let energy = match measured {
        Some(measured) => Some(equal_loss(&measured.equal_loss)),
        None => baseline
            .energy_to_equal_loss_j
            .map(|joules| format!("{} to equal validation loss", format::energy(joules))),
    };
    let stop = measured.and_then(|measured| early_stop(measured.stop_reason));
    let sentences = loss.into_iter().chain(energy).chain(stop);
    let name = baseline.name();
    sentences.map(|text| format!("{name}: {text}")).collect()
}

fn equal_loss(equal: &EqualLoss) -> String {
    let tried = format::energy(equal.tried_j);
    let times = equal
        .times
        .map(|times| {
            format!(
                ", {} times this run's training energy",
                format::times(times)
            )
        })
        .unwrap_or_default();
    match (equal.how, equal.energy_j.map(format::energy)) {
        (Reached::Measured, Some(energy)) => format!("{energy} to equal validation loss{times}"),
        (Reached::Extrapolated, Some(energy)) => format!(
            "equal validation loss not reached in {tried}; extrapolated, not measured: {energy}{times}"
        ),
        _ => {
            format!("equal validation loss not reached in {tried}; extrapolation does not reach it")
        }
    }
}

fn early_stop(stop: BaselineStop) -> Option<String> {
    let text = match stop {
        BaselineStop::EqualEnergy | BaselineStop::EqualLoss | BaselineStop::EnergyMultiple => {
            return None;
        }
        BaselineStop::Budget => "stopped at `baseline.budget`",
        BaselineStop::Interrupted => "interrupted; `wattune train --resume RUN` continues it",
        BaselineStop::Diverged => "diverged: a loss or gradient was not finite",
    };
    Some(text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sentences of the fixture's from-scratch baseline, ended by `stop_reason` and `how` at 3.582 kJ of training.
    fn sentences(stop_reason: BaselineStop, how: Reached, energy_j: Option<f64>) -> Vec<String> {
        let report: Report = serde_json::from_str(include_str!("../../tests/fixtures/report.json"))
            .expect("a report");
        let scratch = report
            .baselines
            .into_iter()
            .find(|baseline| baseline.val_loss_at_equal_energy.is_some())
            .expect("a baseline");
        let energy_j = energy_j.map(Joules);
        let equal_loss = EqualLoss {
            how,
            energy_j,
            times: energy_j.map(|energy| energy.0 / 1800.0),
            tried_j: Joules(3582.0),
        };
        let measured = MeasuredBaseline {
            steps: 20,
            steps_at_equal_energy: 10,
            stop_reason,
            learning_rate: 1e-3,
            run_training_j: Joules(1800.0),
            training_j: Joules(3582.0),
            run_val_loss: 2.5,
            equal_loss,
            curve: Vec::new(),
        };
        at_equal(&Baseline {
            measured: Some(measured),
            ..scratch
        })
    }

    #[test]
    fn an_extrapolation_never_reads_as_a_measurement() {
        let name = "from scratch, same task, trained here";
        let reached = sentences(BaselineStop::EqualLoss, Reached::Measured, Some(3600.0));
        let after = format!("{name}: validation loss 6.9 at equal training energy (this run: 2.5)");
        let energy = format!(
            "{name}: 3.6 kJ (1 Wh) to equal validation loss, 2.00 times this run's training energy"
        );
        assert_eq!(reached, [after.clone(), energy]);
        let beyond = sentences(
            BaselineStop::EnergyMultiple,
            Reached::Extrapolated,
            Some(18_000.0),
        );
        let tried = "equal validation loss not reached in 3.582 kJ (0.995 Wh)";
        assert_eq!(
            beyond[1],
            format!(
                "{name}: {tried}; extrapolated, not measured: 18 kJ (5 Wh), 10.0 times this run's training energy"
            )
        );
        let cut = sentences(BaselineStop::Budget, Reached::No, None);
        let lost = format!("{name}: {tried}; extrapolation does not reach it");
        let stopped = sentences(BaselineStop::Interrupted, Reached::No, None);
        assert!(
            stopped[2].contains("`wattune train --resume RUN` continues it"),
            "{stopped:?}"
        );
        assert_eq!(
            cut,
            [after, lost, format!("{name}: stopped at `baseline.budget`")]
        );
    }
}
