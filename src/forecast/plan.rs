//! A run as counted before its first step: where it ends, what each phase takes, and what other choices would.

use serde::Serialize;

use super::measured_baseline::{BaselineSetup, measured_kinds};
use super::subject::Subject;
use super::what_if::{Choice, what_if};
use crate::energy::baseline::BaselineKind;
use crate::energy::{Charge, Limit, Phase, Spent};
use crate::error::Result;
use crate::model::{Recompute, forecast_memory};
use crate::train::{Settings, StepCosts, Stop, TrainState, forecast};
use crate::units::{Bytes, Joules, MicroJoules};
use crate::work::Work;

/// A run played through without training.
#[derive(Debug)]
pub struct RunForecast {
    /// Steps that the budget admits.
    pub steps: u64,
    /// Why the run will end.
    pub stop: Stop,
    /// Tokens of those steps.
    pub tokens: u64,
    /// Loss tokens of those steps.
    pub loss_tokens: u64,
    /// Evaluations, the one before the first step included.
    pub evaluations: usize,
    /// The charge of each phase.
    pub phases: Vec<(Phase, Charge)>,
    /// All phases.
    pub total: Charge,
    /// The recipe's row and one for each other choice.
    pub choices: Vec<Choice>,
    /// Cost and gain of activation checkpointing.
    pub recomputation: Recomputation,
    /// Energies of the baselines that are trained after the run.
    pub measured_baselines: Vec<MeasuredForecast>,
    /// The limit that stops the run before its first step, and what the shortest run would spend.
    pub too_small: Option<(Limit, Spent)>,
}

/// Activation checkpointing in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recomputation {
    /// Blocks whose activations are recomputed.
    pub blocks: usize,
    /// Blocks that the backward pass walks.
    pub of: usize,
    /// Energy of recomputing, over all training steps.
    pub energy_j: Joules,
    /// FLOPs of the same.
    pub flops: u64,
    /// Peak memory saved.
    pub saved_bytes: Bytes,
}

/// Expected energy of a baseline that is trained after the run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredForecast {
    /// Which.
    pub kind: BaselineKind,
    /// Over all phases.
    pub energy_j: MeasuredEnergy,
    /// Its limit.
    pub budget_j: Option<Joules>,
}

/// Energies of a measured baseline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeasuredEnergy {
    /// Up to the run's training energy.
    pub equal_energy: Joules,
    /// Up to `energy_multiple` times as much.
    pub most: Joules,
}

/// Plays the run through; `sample` is the work of the text that is generated before and after training, `progress` as of
/// [`forecast`].
///
/// # Errors
/// An architecture or adapter that some choice cannot be counted for.
pub fn forecast_run(
    subject: &Subject<'_>,
    sample: Option<&Work>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RunForecast> {
    let ending = sample.map(|work| (Phase::Eval, work.clone()));
    let ending = ending.into_iter().collect();
    let costs = subject.step_costs(subject.shape, subject.trained(), subject.settings, ending);
    let charge = |work: &Work| subject.profile.charge(work);
    let load = charge(&subject.load_work());
    // Before the first step: a sample and an evaluation.
    let opening = sample.into_iter().chain(costs.evaluation()).map(charge);
    let opening: Vec<Charge> = opening.collect();
    let before: Spent = opening.iter().chain([&load]).map(Charge::spent).sum();
    let run = forecast(
        &costs,
        subject.settings,
        subject.profile,
        subject.budget,
        before,
        &TrainState::default(),
        progress,
    );
    let training = run.charge(Phase::Train);
    let mut phases = vec![(Phase::Load, load)];
    phases.extend(run.phases);
    for (_, sum) in phases.iter_mut().filter(|(p, _)| *p == Phase::Eval) {
        opening.iter().for_each(|charge| *sum += charge);
    }
    let too_small = match &run.stop {
        Stop::Budget(limit) if run.steps == 0 => {
            Some((*limit, least_needed(&costs, subject, before)))
        }
        _ => None,
    };
    Ok(RunForecast {
        steps: run.steps,
        tokens: run.tokens,
        loss_tokens: run.loss_tokens,
        evaluations: run.evaluations + usize::from(!subject.validation.is_empty()),
        total: phases.iter().map(|(_, charge)| charge.clone()).sum(),
        phases,
        choices: what_if(subject, run.steps, &training)?,
        recomputation: recomputation(subject, run.steps, &training),
        measured_baselines: measured_baselines(subject, training.energy),
        too_small,
        stop: run.stop,
    })
}

/// What the shortest run spends: everything before the first step, one step, and what ends a run.
fn least_needed(costs: &StepCosts<'_>, subject: &Subject<'_>, before: Spent) -> Spent {
    let charge = |work: &Work| subject.profile.charge(work).spent();
    let due = subject.settings.scheduled_after(1);
    let ending: Spent = costs
        .reserve(due)
        .iter()
        .map(|(_, work)| charge(work))
        .sum();
    before + charge(&costs.step(0)) + ending
}

/// Activation checkpointing over `steps` training steps, whose charge is `training`.
fn recomputation(subject: &Subject<'_>, steps: u64, training: &Charge) -> Recomputation {
    let walked = subject.shape.backward_blocks();
    let blocks = subject.settings.recompute.count(walked);
    let trained = subject.trained();
    let settings = Settings {
        recompute: Recompute::NONE,
        ..subject.settings.clone()
    };
    let costs = subject.step_costs(subject.shape, trained, &settings, Vec::new());
    let stored: Charge = if blocks == 0 {
        training.clone()
    } else {
        costs.charges(subject.profile).sum(0..steps)
    };
    let peak = forecast_memory(
        subject.shape,
        trained as u64,
        subject.longest_batch,
        Recompute::NONE,
    )
    .peak();
    Recomputation {
        blocks,
        of: walked,
        energy_j: MicroJoules(training.energy.0 - stored.energy.0).joules(),
        flops: training.flops - stored.flops,
        saved_bytes: Bytes(peak.0.saturating_sub(subject.memory.peak().0)),
    }
}

fn measured_baselines(subject: &Subject<'_>, training: MicroJoules) -> Vec<MeasuredForecast> {
    measured_kinds(subject.recipe)
        .map(|kind| {
            let [equal_energy, most] = BaselineSetup::new(*subject, kind).expected(training);
            MeasuredForecast {
                kind,
                energy_j: MeasuredEnergy { equal_energy, most },
                budget_j: subject.recipe.baseline.budget,
            }
        })
        .collect()
}
