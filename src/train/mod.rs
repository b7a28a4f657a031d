//! The loop: one optimizer step at a time, inside the budget.
//!
//! Takes a model, its trained values, batches, settings and an energy account; returns how the run ended. Each step is admitted by the
//! account before it runs and charged after it. Evaluations and checkpoints are charged to the same account, and what the last of them
//! will cost is held in reserve. Does not print: an `Observer` is told what happened.

mod checkpoint;
mod forecast;
mod record;
pub mod schedule;
mod step;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

pub use checkpoint::{
    Checkpoints, Evaluated as Evaluation, Standing as TrainState, checkpoint_bytes, put_in_place,
    remove_directory,
};
pub use forecast::{BudgetProgress, Forecast, Scheduled, StepCosts, forecast};
pub use record::{StepEnergy, StepRecord, Stop};
pub use schedule::{Decay, Schedule};
pub use step::{accumulate_gradients, batch_to_device, optimizer_update};

use crate::data::{MicroBatch, Sampler};
use crate::energy::{Account, Phase, Verdict};
use crate::error::Result;
use crate::model::{Decoder, ModelShape, Recompute};
use crate::ops::{Context, Parameters};
use crate::work::{Precision, Work, WorkCounter};

/// Everything the loop works on.
pub struct Trainer<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// Its trained values.
    pub parameters: &'a Parameters,
    /// What its work depends on.
    pub shape: &'a ModelShape,
    /// Training batches, a pure function of the step.
    pub sampler: &'a Sampler,
    /// Validation batches; empty: no evaluation.
    pub validation: &'a [MicroBatch],
    /// How to train.
    pub settings: &'a Settings,
    /// What may be spent, and what was.
    pub account: &'a mut Account,
    /// Where checkpoints go.
    pub checkpoints: &'a Checkpoints,
    /// Adds the model's own files to a checkpoint.
    pub export: &'a dyn Fn(&Path) -> Result<()>,
    /// Set when the person asks to stop.
    pub interrupted: &'a AtomicBool,
    /// What the caller will still do within the budget when the loop has ended.
    pub ending: Vec<(Phase, Work)>,
}

/// How to train: plain numbers, no recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Steps if no budget binds.
    pub steps: u64,
    /// Whether `steps` was given in epochs.
    pub by_epochs: bool,
    /// The learning rate over the run.
    pub schedule: Schedule,
    /// AdamW's beta1, beta2, epsilon.
    pub adam: (f64, f64, f64),
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global gradient norm is clipped here; 0 never clips.
    pub max_grad_norm: f64,
    /// Evaluate every so many steps; 0: before and after only.
    pub eval_every: u64,
    /// Save every so many steps; 0: at the end only.
    pub save_every: u64,
    /// Save at every evaluation, so that the best stays.
    pub keep_best: bool,
    /// Whether activations are computed again in the backward pass.
    pub recompute: Recompute,
    /// LoRA dropout.
    pub dropout: f64,
    /// Keys every random mask.
    pub seed: u64,
    /// Format of matrix-product inputs.
    pub precision: Precision,
    /// Names the recipe in checkpoints.
    pub recipe: String,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why.
    pub stop: Stop,
    /// Where it stood.
    pub state: TrainState,
}

/// Told what happens, as it happens.
pub trait Observer {
    /// A step was done.
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()>;
    /// Some of an evaluation's batches were done.
    fn evaluating(&mut self, done: usize, of: usize);
    /// An evaluation gave a loss (nats per loss token).
    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()>;
    /// A checkpoint is about to be written: what was told before must be on disk, for a resumed run goes on from there.
    fn saving(&mut self) -> Result<()>;
}

/// Trains from `state` until the steps are done, a budget binds, the person interrupts or a number is not finite.
pub fn train(
    trainer: &mut Trainer<'_>,
    mut state: TrainState,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, trainer.settings.precision);
    let costs = StepCosts::new(
        trainer.shape,
        trainer.sampler,
        trainer.validation,
        trainer.parameters.len(),
        trainer.settings,
        trainer.ending.clone(),
    );
    let at_once = trainer.interrupted.load(Ordering::Relaxed);
    if state.step == 0 && state.val_loss_before.is_none() && costs.has_validation() && !at_once {
        let val_loss = evaluate(trainer, context, &costs, 0, observer)?;
        if !val_loss.is_finite() {
            return Ok(Outcome {
                stop: Stop::Diverged(
                    "the validation loss is not finite before the first step".into(),
                ),
                state,
            });
        }
        state.val_loss_before = Some(val_loss);
        state.val_loss_last = Some(Evaluation { step: 0, val_loss });
    }
    let budget_progress = BudgetProgress::new(&costs, trainer.settings, trainer.account, &state);
    let stop = loop {
        if state.step == trainer.settings.steps {
            break if trainer.settings.by_epochs {
                Stop::Epochs
            } else {
                Stop::Steps
            };
        }
        if trainer.interrupted.load(Ordering::Relaxed) {
            break Stop::Interrupted;
        }
        let work = costs.step(state.step);
        let due = trainer.settings.scheduled_after(state.step + 1);
        if let Verdict::Stop(limit) =
            trainer
                .account
                .admit(Phase::Train, &work, &costs.reserve(due))?
        {
            break Stop::Budget(limit);
        }
        let lr =
            trainer
                .settings
                .schedule
                .lr(budget_progress.progress(&state, trainer.account, &work));
        match step::optimizer_step(trainer, context, &mut state, lr)? {
            Ok(record) => observer.step(&record, trainer.account)?,
            Err(diverged) => {
                return Ok(Outcome {
                    stop: Stop::Diverged(diverged),
                    state,
                });
            }
        }
        if due.evaluation
            && costs.has_validation()
            && let Some(diverged) =
                evaluate_and_record(trainer, context, &costs, &mut state, observer)?
        {
            return Ok(Outcome {
                stop: diverged,
                state,
            });
        }
        if due.save {
            save(trainer, context, &costs, &state, observer)?;
        }
    };
    let diverged = finish(
        trainer,
        context,
        &costs,
        &mut state,
        observer,
        stop != Stop::Interrupted,
    )?;
    Ok(Outcome {
        stop: diverged.unwrap_or(stop),
        state,
    })
}

/// The last evaluation (unless one was just made, or the person is waiting) and the last checkpoint; none where the model diverged.
fn finish(
    trainer: &mut Trainer<'_>,
    context: Context<'_>,
    costs: &StepCosts<'_>,
    state: &mut TrainState,
    observer: &mut dyn Observer,
    evaluate: bool,
) -> Result<Option<Stop>> {
    let evaluated = state
        .val_loss_last
        .is_some_and(|last| last.step == state.step);
    if evaluate && costs.has_validation() && !evaluated {
        let diverged = evaluate_and_record(trainer, context, costs, state, observer)?;
        if diverged.is_some() {
            return Ok(diverged);
        }
    } else if trainer.checkpoints.steps()?.last() == Some(&state.step) {
        return Ok(None);
    }
    save(trainer, context, costs, state, observer)?;
    Ok(None)
}

/// Evaluates and notes the result. A loss that is not finite is a divergence, told before such values overwrite a good checkpoint.
fn evaluate_and_record(
    trainer: &mut Trainer<'_>,
    context: Context<'_>,
    costs: &StepCosts<'_>,
    state: &mut TrainState,
    observer: &mut dyn Observer,
) -> Result<Option<Stop>> {
    let val_loss = evaluate(trainer, context, costs, state.step, observer)?;
    if !val_loss.is_finite() {
        return Ok(Some(Stop::Diverged(format!(
            "the validation loss is not finite after step {}",
            state.step
        ))));
    }
    let evaluated = Evaluation {
        step: state.step,
        val_loss,
    };
    state.val_loss_last = Some(evaluated);
    if state.best.is_none_or(|best| val_loss < best.val_loss) {
        state.best = Some(evaluated);
    }
    Ok(None)
}

/// Validation loss in nats per loss token, charged as one entry.
///
/// Its energy was held in reserve, so the verdict is not asked again: admission only leases it, in case of a crash.
fn evaluate(
    trainer: &mut Trainer<'_>,
    context: Context<'_>,
    costs: &StepCosts<'_>,
    step: u64,
    observer: &mut dyn Observer,
) -> Result<f64> {
    if let Some(work) = costs.evaluation() {
        trainer.account.admit(Phase::Eval, work, &[])?;
    }
    trainer.account.begin();
    let (mut sum, mut count) = (0.0, 0);
    for (done, batch) in trainer.validation.iter().enumerate() {
        observer.evaluating(done, trainer.validation.len());
        let losses = trainer
            .decoder
            .losses(context, &batch_to_device(batch, trainer.decoder.device())?)?;
        sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        count += losses.len();
    }
    trainer
        .account
        .charge(Phase::Eval, step, &context.counter.take())?;
    let val_loss = sum / count as f64;
    observer.evaluated(step, val_loss)?;
    Ok(val_loss)
}

fn save(
    trainer: &mut Trainer<'_>,
    context: Context<'_>,
    costs: &StepCosts<'_>,
    state: &TrainState,
    observer: &mut dyn Observer,
) -> Result<()> {
    observer.saving()?;
    trainer.account.admit(Phase::Save, costs.save(), &[])?;
    trainer.account.begin();
    context.counter.add(costs.save().clone());
    trainer
        .checkpoints
        .save(state, trainer.parameters, trainer.export)?;
    trainer
        .account
        .charge(Phase::Save, state.step, &context.counter.take())?;
    Ok(())
}
