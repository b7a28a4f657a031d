//! A stretch of a baseline's training: what it costs, and the loop over it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::energy::Account;
use crate::error::Result;
use crate::forecast::BaselineSetup;
use crate::model::TrainableModel;
use crate::run::Screen;
use crate::run::prepare::Prepared;
use crate::run::watch::Watch;
use crate::train::{Checkpoints, Observer, Outcome, StepRecord, TrainState, Trainer};

/// One call of the training loop.
pub(super) struct Leg<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) field: &'a BaselineSetup<'a>,
    pub(super) trainee: &'a TrainableModel,
    /// Steps to equal energy, and at which the schedule ends.
    pub(super) steps: [u64; 2],
    /// Stops at the first evaluation at or below this loss.
    pub(super) target: Option<f64>,
}

impl Leg<'_> {
    /// Trains from `standing`; `asked` is the person's flag, `stop` our own.
    pub(super) fn run(
        &self,
        standing: TrainState,
        account: &mut Account,
        checkpoints: &Checkpoints,
        folder: &Path,
        [asked, stop]: [&AtomicBool; 2],
        screen: &mut dyn Screen,
    ) -> Result<Outcome> {
        let [equal, steps] = self.steps;
        let settings = self.field.settings(steps, equal);
        let watch = Watch::new(
            folder.join(crate::report::files::STEPS_JSONL),
            screen,
            steps,
            steps,
        )?;
        let mut observer = Racer {
            watch,
            target: self.target,
            asked,
            stop,
        };
        let prepared = self.prepared;
        let mut trainer = Trainer {
            decoder: &self.trainee.decoder,
            parameters: &self.trainee.parameters,
            shape: &self.field.shape,
            sampler: &prepared.sampler,
            validation: &prepared.validation_batches,
            settings: &settings,
            account,
            checkpoints,
            export: &|_| Ok(()),
            interrupted: stop,
            ending: Vec::new(),
        };
        let outcome = trainer.train(standing, &mut observer)?;
        observer.watch.flush()?;
        Ok(outcome)
    }
}

/// Watches a leg, and stops it where the person or the loss says so.
struct Racer<'a> {
    watch: Watch<'a>,
    target: Option<f64>,
    asked: &'a AtomicBool,
    stop: &'a AtomicBool,
}

impl Observer for Racer<'_> {
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.watch.step(record, account)
    }

    fn evaluating(&mut self, done: usize, of: usize) {
        self.watch.evaluating(done, of);
    }

    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()> {
        if self.target.is_some_and(|target| val_loss <= target) {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.watch.evaluated(step, val_loss)
    }

    fn saving(&mut self) -> Result<()> {
        self.watch.saving()
    }
}
