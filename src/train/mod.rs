//! The training loop: one optimizer step at a time, inside the budget.
//!
//! Takes a model, its trained parameters, batches, settings and an energy account; returns how the
//! run ended. The account admits each step before it runs and is charged after it. Evaluations and
//! checkpoints are charged to the same account; the cost of the last ones is reserved. Never
//! prints: an `Observer` receives the events.

mod checkpoint;
mod early_stopping;
mod forecast;
pub mod metrics;
mod record;
pub mod schedule;
mod step;
mod step_charges;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

pub use checkpoint::{Checkpoints, Evaluation, TrainState, checkpoint_bytes};
pub use early_stopping::{EarlyStopping, Waited};
pub use forecast::{BudgetProgress, Forecast, Scheduled, StepCosts, forecast, unseen};
pub use record::{StepEnergy, StepRecord, Stop};
pub use schedule::{Decay, Schedule};
pub use step::{accumulate_gradients, batch_to_device};
pub use step_charges::StepCharges;

use self::metrics::Scores;
use crate::data::{MicroBatch, Sampler};
use crate::energy::{Account, Phase, Reading, Verdict};
use crate::error::{Error, Kind, Result};
use crate::model::{BatchLosses, Decoder, ModelShape, Recompute};
use crate::ops::{AdamW, Context, Parameters};
use crate::work::{Precision, Work, WorkCounter};

/// Everything a training run works on.
pub struct Trainer<'a> {
    /// Model.
    pub decoder: &'a Decoder,
    /// Trained parameters of `decoder`.
    pub parameters: &'a Parameters,
    /// Sizes that the work of a step depends on.
    pub shape: &'a ModelShape,
    /// Training batches, a pure function of the step.
    pub sampler: &'a Sampler,
    /// Validation batches; empty: no evaluation.
    pub validation: &'a [MicroBatch],
    /// Hyperparameters and intervals.
    pub settings: &'a Settings,
    /// Budget, meters and ledger.
    pub account: &'a mut Account,
    /// Checkpoint folder.
    pub checkpoints: &'a Checkpoints,
    /// Adds the model's files to a checkpoint directory.
    pub export: &'a dyn Fn(&Path) -> Result<()>,
    /// Set when the user interrupts.
    pub interrupted: &'a AtomicBool,
    /// Work of the caller after the loop, reserved in the budget.
    pub ending: Vec<(Phase, Work)>,
}

/// Hyperparameters and intervals of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Steps if no budget binds.
    pub steps: u64,
    /// Whether `steps` was given in epochs.
    pub by_epochs: bool,
    /// Learning rate over the run.
    pub schedule: Schedule,
    /// Optimizer.
    pub optimizer: AdamW,
    /// Steps between evaluations; 0: before and after the run only.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: at the end only.
    pub save_every: u64,
    /// Saves at every evaluation, so that the best checkpoint exists.
    pub keep_best: bool,
    /// Ends the run at the first evaluation at or below this loss, as if its steps were done.
    pub target_loss: Option<f64>,
    /// Ends the run once the validation loss falls too little.
    pub early_stopping: Option<EarlyStopping>,
    /// Activation checkpointing.
    pub recompute: Recompute,
    /// LoRA dropout probability.
    pub dropout: f64,
    /// Seed of every dropout mask.
    pub seed: u64,
    /// Format of matrix-product inputs.
    pub precision: Precision,
    /// Digest that identifies the recipe in checkpoints.
    pub recipe: String,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Reason.
    pub stop: Stop,
    /// State after the last completed step.
    pub state: TrainState,
}

/// Receives the events of a run as they happen.
pub trait Observer {
    /// A step was completed and charged.
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()>;
    /// `done` of `of` batches of an evaluation were computed.
    fn evaluating(&mut self, done: usize, of: usize);
    /// An evaluation gave a loss in nats per loss token.
    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()>;
    /// A checkpoint is about to be written: earlier events must reach the disk first, since a
    /// resumed run relies on them.
    fn saving(&mut self) -> Result<()>;
}

impl Trainer<'_> {
    /// Trains from `state` until the steps are done, a budget binds, the user interrupts, or a loss
    /// or gradient is not finite.
    pub fn train(&mut self, state: TrainState, observer: &mut dyn Observer) -> Result<Outcome> {
        let counter = WorkCounter::default();
        let costs = StepCosts::new(
            self.shape,
            self.sampler,
            self.validation,
            self.parameters.len(),
            self.settings,
            self.ending.clone(),
        );
        let mut training = Training {
            context: Context::new(&counter, self.settings.precision),
            trainer: self,
            costs,
            state,
            observer,
        };
        let stop = match training.run() {
            Err(error) if error.kind() == Kind::Diverged => {
                training.charge_failed_step()?;
                Stop::Diverged(error.to_string())
            }
            stop => stop?,
        };
        Ok(Outcome {
            stop,
            state: training.state,
        })
    }
}

/// One call of [`Trainer::train`].
struct Training<'r, 'a> {
    trainer: &'r mut Trainer<'a>,
    context: Context<'r>,
    costs: StepCosts<'a>,
    state: TrainState,
    observer: &'r mut dyn Observer,
}

impl Training<'_, '_> {
    /// Runs the loop to its end and returns the reason. A loss or gradient that is not finite is an
    /// error of `Kind::Diverged`, which names the step and its records.
    fn run(&mut self) -> Result<Stop> {
        self.evaluate_before_training()?;
        let settings = self.trainer.settings;
        let progress =
            BudgetProgress::new(&self.costs, settings, self.trainer.account, &self.state);
        let stop = loop {
            if let Some(stop) = self.finished() {
                break stop;
            }
            let step = self.state.step;
            let work = self.costs.step(step);
            let due = settings.scheduled_after(step + 1);
            let reserve = self.costs.reserve(due);
            if let Verdict::Stop(limit) =
                self.trainer.account.admit(Phase::Train, &work, &reserve)?
            {
                break Stop::Budget(limit);
            }
            let progress = progress.at(&self.state, self.trainer.account, &work);
            let lr = settings.schedule.lr(progress);
            self.trainer.account.begin();
            let batches = self.trainer.sampler.step(step);
            let (loss, gradients) = self.forward_backward(&batches)?;
            let grad_norm = self.optimizer_step(lr, &gradients, &batches)?;
            let record = self.charge_step(&batches, loss, lr, grad_norm)?;
            self.observer.step(&record, self.trainer.account)?;
            if due.evaluation && self.costs.has_validation() {
                self.evaluate()?;
            }
            if due.save {
                self.save(None)?;
            }
        };
        let is_untrained = self.state.step == 0 && matches!(stop, Stop::Budget(_));
        if !is_untrained {
            self.finish(&stop)?;
        }
        Ok(stop)
    }

    /// Evaluates the untrained model, once a run and before its first step; skipped after an
    /// interrupt.
    fn evaluate_before_training(&mut self) -> Result<()> {
        let state = &self.state;
        let first = state.step == 0 && state.val_loss_before.is_none();
        if !first || !self.costs.has_validation() || self.is_interrupted() {
            return Ok(());
        }
        let evaluation = self.validation_loss()?;
        if !evaluation.val_loss.is_finite() {
            return Err(diverged(
                "the validation loss is not finite before the first step",
            ));
        }
        self.note_loss(evaluation.val_loss);
        self.state.val_loss_before = Some(evaluation.val_loss);
        self.state.val_loss_last = Some(evaluation);
        Ok(())
    }

    fn note_loss(&mut self, val_loss: f64) {
        if let Some(rule) = self.trainer.settings.early_stopping {
            let spent = self.trainer.account.spent().energy.joules();
            rule.note(&mut self.state.waited, val_loss, spent);
        }
    }

    fn is_interrupted(&self) -> bool {
        self.trainer.interrupted.load(Ordering::Relaxed)
    }

    /// Why the loop ends before the next step, budgets aside; `None` if it continues.
    fn finished(&self) -> Option<Stop> {
        let settings = self.trainer.settings;
        let loss = self.state.val_loss_last.map(|last| last.val_loss);
        let on_target = settings
            .target_loss
            .zip(loss)
            .is_some_and(|(target, loss)| loss <= target);
        let rule = settings.early_stopping;
        if self.state.step == settings.steps || on_target {
            Some(settings.last_step())
        } else if rule.is_some_and(|rule| rule.is_over(&self.state.waited)) {
            Some(Stop::EarlyStopping)
        } else {
            self.is_interrupted().then_some(Stop::Interrupted)
        }
    }

    /// Makes the last evaluation (unless just made, or interrupted) and the last checkpoint.
    fn finish(&mut self, stop: &Stop) -> Result<()> {
        let step = self.state.step;
        let evaluated = self
            .state
            .val_loss_last
            .is_some_and(|last| last.step == step);
        if *stop != Stop::Interrupted && self.costs.has_validation() && !evaluated {
            self.evaluate()?;
        } else if self.trainer.checkpoints.steps()?.last() == Some(&step) {
            if stop.is_regular() {
                // The parameters are saved: only the state changes, and nothing is charged.
                self.write_checkpoint(Some(stop))?;
            }
            return Ok(());
        }
        self.save(stop.is_regular().then_some(stop))
    }

    /// Evaluates and records the loss. A loss that is not finite ends the run before such
    /// parameters replace a good checkpoint.
    fn evaluate(&mut self) -> Result<()> {
        let evaluation = self.validation_loss()?;
        if !evaluation.val_loss.is_finite() {
            return Err(diverged(format!(
                "the validation loss is not finite after step {}",
                evaluation.step
            )));
        }
        self.note_loss(evaluation.val_loss);
        self.state.val_loss_last = Some(evaluation);
        let best = self.state.best;
        if best.is_none_or(|best| evaluation.val_loss < best.val_loss) {
            self.state.best = Some(evaluation);
        }
        Ok(())
    }

    /// Validation loss after the steps so far, charged as one entry.
    ///
    /// Its energy was reserved, so the verdict is ignored: `admit` is called for its lease alone,
    /// which covers a crash.
    fn validation_loss(&mut self) -> Result<Evaluation> {
        let account = &mut *self.trainer.account;
        if let Some(work) = self.costs.evaluation() {
            account.admit(Phase::Eval, work, &[])?;
        }
        account.begin();
        let batches = self.trainer.validation;
        let mut sum = 0.0;
        let mut sum_of_squares = 0.0;
        let mut loss_tokens = 0;
        let mut scores = Scores::new(self.trainer.decoder.architecture());
        for (done, batch) in batches.iter().enumerate() {
            self.observer.evaluating(done, batches.len());
            let decoder = self.trainer.decoder;
            let input = batch_to_device(batch, decoder.device())?;
            let BatchLosses { losses, outputs } = decoder.evaluate(self.context, &input)?;
            scores.add(batch, &outputs);
            sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            let squares = losses.iter().map(|loss| f64::from(*loss).powi(2));
            sum_of_squares += squares.sum::<f64>();
            loss_tokens += losses.len();
        }
        let step = self.state.step;
        self.charge(Phase::Eval, step)?;
        let n = loss_tokens as f64;
        let val_loss = sum / n;
        let variance = (sum_of_squares / n - val_loss * val_loss).max(0.0) * n / (n - 1.0);
        self.state.confusion_matrix = scores.confusion();
        self.observer.evaluated(step, val_loss)?;
        Ok(Evaluation {
            step,
            val_loss,
            standard_error: Some((variance / n).sqrt()).filter(|error| error.is_finite()),
            metrics: scores.metrics(),
        })
    }

    /// Saves a checkpoint and charges it; `ended` is the reason if it is the loop's last.
    fn save(&mut self, ended: Option<&Stop>) -> Result<()> {
        self.observer.saving()?;
        let trainer = &mut *self.trainer;
        trainer.account.admit(Phase::Save, self.costs.save(), &[])?;
        trainer.account.begin();
        self.context.counter.add(self.costs.save().clone());
        self.write_checkpoint(ended)?;
        self.charge(Phase::Save, self.state.step)?;
        Ok(())
    }

    fn write_checkpoint(&mut self, ended: Option<&Stop>) -> Result<()> {
        let trainer = &mut *self.trainer;
        let state = TrainState {
            spent: Some(trainer.account.record()?),
            ended: ended.cloned(),
            ..self.state.clone()
        };
        trainer
            .checkpoints
            .save(&state, trainer.parameters, trainer.export)?;
        Ok(())
    }

    /// Charges the work executed since the last charge, which the device has completed.
    fn charge(&mut self, phase: Phase, step: u64) -> Result<Reading> {
        self.trainer.decoder.device().synchronize()?;
        let work = self.context.counter.take();
        self.trainer.account.charge(phase, step, &work)
    }
}

impl Settings {
    /// The reason of a run that completed all its steps: steps or epochs, as the user stated them.
    fn last_step(&self) -> Stop {
        if self.by_epochs {
            Stop::Epochs
        } else {
            Stop::Steps
        }
    }
}

fn diverged(what: impl Into<String>) -> Error {
    Error::new(Kind::Diverged, what)
}
