//! What a baseline that was trained adds to its entry in `report.json`: equal energy, equal loss, and the curve between.
//!
//! Owns the `measured` block of a baseline and the form of a curve. Takes plain numbers; an energy that was not reached but computed from
//! the curve says so. Knows nothing of how a baseline is trained.

use serde::{Deserialize, Serialize};

use super::page::name;
use super::show;
use super::types::Baseline;
use crate::units::Joules;

/// The `measured` block of a baseline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasuredBaseline {
    /// Steps done.
    pub steps: u64,
    /// Steps whose counted energy is the run's training energy.
    pub steps_at_equal_energy: u64,
    /// Why it ended.
    pub stop_reason: BaselineStop,
    /// Its peak learning rate.
    pub learning_rate: f64,
    /// The training energy of the run, on the run's meter: that of its steps, without loading, evaluations and saves.
    pub run_training_j: Joules,
    /// The same of this baseline.
    pub training_j: Joules,
    /// The run's validation loss, nats per loss token.
    pub run_val_loss: f64,
    /// What it takes to that loss.
    pub equal_loss: EqualLoss,
    /// Loss against training energy.
    pub curve: Vec<CurvePoint>,
}

/// Why a measured baseline ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaselineStop {
    /// It spent the run's training energy and was not to go on.
    EqualEnergy,
    /// It came to the run's loss beyond equal energy.
    EqualLoss,
    /// It spent so many times the run's training energy as it was to at most.
    EnergyMultiple,
    /// One more step would have passed its own budget.
    Budget,
    /// Somebody asked it to.
    Interrupted,
    /// A loss or a gradient was not finite.
    Diverged,
}

/// How an energy to equal loss is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reached {
    /// An evaluation was at or below the loss.
    Measured,
    /// None was: a power law through the last evaluations comes to it.
    Extrapolated,
    /// Neither.
    No,
}

/// The training energy that it takes to the run's loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EqualLoss {
    /// How it is known.
    pub how: Reached,
    /// The energy; `None` where the loss was not reached and the curve does not lead to it.
    pub energy_j: Option<Joules>,
    /// The same over the run's training energy.
    pub times: Option<f64>,
    /// What was tried.
    pub tried_j: Joules,
}

/// A point of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Steps done.
    pub step: u64,
    /// Training energy spent by then, on the run's meter.
    pub energy_j: Joules,
    /// Loss of that step, nats per loss token.
    pub train_loss: Option<f64>,
    /// Validation loss after it, where there was an evaluation.
    pub val_loss: Option<f64>,
}

/// What a baseline that was trained showed at equal energy and at equal loss, in sentences.
pub(super) fn at_equal(baseline: &Baseline) -> Vec<String> {
    let name = name(baseline);
    let loss = baseline.val_loss_at_equal_energy.map(|loss| {
        let against = baseline.measured.as_ref().map_or_else(String::new, |it| {
            format!(" (this run: {})", show::number(it.run_val_loss))
        });
        format!(
            "{name}: validation loss {} after the same training energy{against}",
            show::number(loss)
        )
    });
    let energy = match &baseline.measured {
        Some(measured) => Some(format!("{name}: {}", equal_loss(&measured.equal_loss))),
        None => baseline.energy_to_equal_loss_j.map(|joules| {
            format!(
                "{name}: {} to the same validation loss",
                show::energy(joules)
            )
        }),
    };
    let cut_short = baseline
        .measured
        .as_ref()
        .and_then(|measured| cut_short(measured.stop_reason));
    let cut_short = cut_short.map(|why| format!("{name}: {why}"));
    loss.into_iter().chain(energy).chain(cut_short).collect()
}

fn equal_loss(equal: &EqualLoss) -> String {
    let times = equal.times.map_or_else(String::new, |times| {
        format!(", {} times this run's training energy,", show::times(times))
    });
    let tried = show::energy(equal.tried_j);
    match (equal.how, equal.energy_j.map(show::energy)) {
        (Reached::Measured, Some(energy)) => format!("{energy}{times} to the same validation loss"),
        (Reached::Extrapolated, Some(energy)) => {
            format!(
                "the same validation loss was not reached in {tried}; extrapolated, not measured: {energy}{times} to it"
            )
        }
        _ => format!(
            "the same validation loss was not reached in {tried}, and its curve does not lead there"
        ),
    }
}

fn cut_short(stop: BaselineStop) -> Option<&'static str> {
    match stop {
        BaselineStop::EqualEnergy | BaselineStop::EqualLoss | BaselineStop::EnergyMultiple => None,
        BaselineStop::Budget => Some("cut short by `baseline.budget`"),
        BaselineStop::Interrupted => {
            Some("cut short by whoever ran it; `wattune train --resume RUN` goes on with it")
        }
        BaselineStop::Diverged => Some("it diverged: a loss or a gradient was not finite"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;

    /// The report of the tests, its from-scratch baseline ended by `stop` and `how` at 3.582 kJ of training.
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
        let after =
            format!("{name}: validation loss 6.9 after the same training energy (this run: 2.5)");
        assert_eq!(
            reached,
            [
                after.clone(),
                format!(
                    "{name}: 3.6 kJ (1 Wh), 2.00 times this run's training energy, to the same validation loss"
                )
            ]
        );
        let beyond = sentences(
            BaselineStop::EnergyMultiple,
            Reached::Extrapolated,
            Some(18_000.0),
        );
        let tried = "the same validation loss was not reached in 3.582 kJ (0.995 Wh)";
        assert_eq!(
            beyond[1],
            format!(
                "{name}: {tried}; extrapolated, not measured: 18 kJ (5 Wh), 10.0 times this run's training energy, to it"
            )
        );
        let cut = sentences(BaselineStop::Budget, Reached::No, None);
        let lost = format!("{name}: {tried}, and its curve does not lead there");
        let stopped = sentences(BaselineStop::Interrupted, Reached::No, None);
        assert!(
            stopped[2].contains("`wattune train --resume RUN` goes on with it"),
            "{stopped:?}"
        );
        assert_eq!(
            cut,
            [
                after,
                lost,
                format!("{name}: cut short by `baseline.budget`")
            ]
        );
    }
}
