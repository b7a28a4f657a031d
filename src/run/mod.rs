//! The composition root: the one room that knows all the others.
//!
//! `prepare` turns a recipe into everything a run needs before weights are read (preflight); `plan` says what that run will cost;
//! `trainee` puts the model together; `training` runs the loop in a run directory and writes the report. `evaluate`, `generate`,
//! `merge`, `probe`, `calibrate` and `reconcile` are the other things a person can do. Numerics live in the rooms below; words for people in `cli`.

mod baseline_run;
mod checks;
mod directory;
mod evaluate;
mod generate;
mod inference;
mod loss_curve;
mod machine;
mod measured_baselines;
mod merge;
mod model;
mod options;
mod plan;
mod prepare;
mod probe;
mod reconcile;
mod records;
mod reporting;
mod sample;
mod spending;
mod step_logger;
mod target;
mod trainee;
mod training;

pub use directory::RunDirectory;
pub use evaluate::{Evaluation, EvaluationJob, evaluate};
pub use generate::{Generated, GenerationJob, generate};
pub use inference::ModelRequest;
pub use machine::{DeviceChoice, allowed_threads};
pub use merge::{MergeRequest, merge_model};
pub use model::{find_model, tokenizer_of};
pub use plan::{Plan, plan};
pub use prepare::{Prepared, prepare};
pub use probe::plan_with_probe;
pub use reconcile::reconcile;
pub use training::{Finished, TrainRequest, train};

// What the command line speaks of: it imports this room, `recipe` and `report` alone.
pub use candle_core::Device;

pub use crate::data::{Format, OnBadRecord, Options as DataOptions, RenderedSample, TxtUnit};
pub use crate::energy::sensor::{self, State as SensorState};
pub use crate::energy::{DeviceRef, Interval, Profile};
pub use crate::forecast::{
    BaselineCost, BaselineRequest, Choice, Method, PublishedFigures, Target, baseline_cost,
};
pub use crate::hub::{Progress, Silent};
pub use crate::measure::{Calibration, Calibrator, Effort, Probe, Reconciled, machine::peak_rss};
pub use crate::model::Sampling;
pub use crate::train::{StepRecord, Stop};

use crate::error::Result;

/// Who watches: the command line shows what it is told; tests stay silent.
pub trait Screen {
    /// Something worth a line: what is being done, a warning.
    fn note(&mut self, line: &str);
    /// A step was done.
    fn step(&mut self, record: &StepRecord, view: &StepView);
    /// `done` of `of` evaluation batches were done.
    fn evaluating(&mut self, done: usize, of: usize);
    /// Validation loss after `step` steps.
    fn evaluated(&mut self, step: u64, val_loss: f64);
    /// Downloads report here.
    fn downloads(&self) -> &dyn Progress;
}

/// What a progress line shows beside the step itself.
#[derive(Debug, Clone, PartialEq)]
pub struct StepView {
    /// Steps if no budget binds.
    pub steps: u64,
    /// Steps that fit the budget, as counted before the start.
    pub expected_steps: u64,
    /// Energy spent on the meter that decides.
    pub spent: crate::units::Joules,
    /// The limit nearest to its end, its name and the part spent.
    pub budget: Option<(&'static str, f64)>,
    /// Steps so far in this process.
    pub done: u64,
    /// Tokens of all steps so far in this process.
    pub tokens: u64,
    /// Wall time of all steps so far in this process.
    pub train_wall: crate::units::Seconds,
}

/// A screen that shows nothing.
pub struct NoProgress;

impl Screen for NoProgress {
    fn note(&mut self, _: &str) {}
    fn step(&mut self, _: &StepRecord, _: &StepView) {}
    fn evaluating(&mut self, _: usize, _: usize) {}
    fn evaluated(&mut self, _: u64, _: f64) {}
    fn downloads(&self) -> &dyn Progress {
        &Silent
    }
}

/// Reads a file's whole text.
fn read_text(path: &std::path::Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| crate::error::Error::io("read", path, e))
}
