//! Training in one folder: account, checkpoints and state of a run or of a measured baseline.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::Screen;
use super::prepare::Prepared;
use super::step_logger::StepLogger;
use super::trained_model::Assembled;
use crate::energy::{Account, Phase};
use crate::error::Result;
use crate::model::{ModelShape, TrainableModel};
use crate::train::{Checkpoints, Settings, Stop, TrainState, Trainer};
use crate::work::Work;

/// An opened folder.
pub(super) struct Session<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) account: Account,
    pub(super) checkpoints: Checkpoints,
    /// `steps.jsonl`.
    pub(super) steps_log: PathBuf,
    /// State of the newest checkpoint, else of an untrained model.
    pub(super) state: TrainState,
    /// Whether `state` is that of a checkpoint.
    pub(super) has_checkpoint: bool,
}

/// One call of the training loop.
pub(super) struct Segment<'a> {
    pub(super) model: &'a TrainableModel,
    pub(super) shape: &'a ModelShape,
    pub(super) settings: &'a Settings,
    /// Entries that the caller charges after the loop.
    pub(super) ending: Vec<(Phase, Work)>,
    /// Steps that fit the budget by the plan.
    pub(super) expected_steps: u64,
    /// Adds the model's files to a checkpoint.
    pub(super) export: &'a dyn Fn(&Path) -> Result<()>,
    /// Set when the user interrupts.
    pub(super) interrupted: &'a AtomicBool,
}

impl Session<'_> {
    /// Builds the model by `assemble`, restores the checkpoint's values, and charges `work`, if any.
    pub(super) fn load_model(
        &mut self,
        work: Option<&Work>,
        assemble: impl FnOnce() -> Result<Assembled>,
    ) -> Result<Assembled> {
        if let Some(work) = work {
            self.account.admit(Phase::Load, work, &[])?;
            self.account.begin();
        }
        let assembled = assemble()?;
        if self.has_checkpoint {
            self.checkpoints
                .restore(self.state.step, &assembled.model.parameters)?;
        }
        if let Some(work) = work {
            self.account.charge(Phase::Load, self.state.step, work)?;
        }
        Ok(assembled)
    }

    /// Trains from the state until the loop stops, and logs each step.
    pub(super) fn train(&mut self, segment: Segment<'_>, screen: &mut dyn Screen) -> Result<Stop> {
        let mut logger = StepLogger::new(
            self.steps_log.clone(),
            screen,
            segment.settings.steps,
            segment.expected_steps,
        )?;
        let mut trainer = Trainer {
            decoder: &segment.model.decoder,
            parameters: &segment.model.parameters,
            shape: segment.shape,
            sampler: &self.prepared.sampler,
            validation: &self.prepared.validation_batches,
            settings: segment.settings,
            account: &mut self.account,
            checkpoints: &self.checkpoints,
            export: segment.export,
            interrupted: segment.interrupted,
            ending: segment.ending,
        };
        let outcome = trainer.train(self.state.clone(), &mut logger)?;
        logger.flush()?;
        self.state = outcome.state;
        Ok(outcome.stop)
    }
}
