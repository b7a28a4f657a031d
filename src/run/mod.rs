//! Composition root: connects the other modules into the program's commands.
//!
//! `prepare` turns a recipe into everything a run needs before weights are read (preflight), `plan` forecasts its cost,
//! `training` runs the loop in a run directory and writes the report. `evaluate`, `generate`, `merge`, `adapters`,
//! `probe` and `reconcile` are the other commands. No numerics and no printing.

mod adapters;
mod architecture;
mod baseline_run;
mod checks;
mod continued;
mod directory;
mod divergence;
mod evaluate;
mod export;
mod export_adapter;
mod first_recipe;
mod fit;
mod generate;
mod generation_scores;
mod gguf;
mod inference;
mod loss_curve;
mod machine;
mod measured_baselines;
mod merge;
mod metering;
mod model;
mod model_source;
mod multiple_choice;
mod options;
mod place;
mod plan;
mod predict;
mod prepare;
mod preview;
mod probe;
mod push;
mod reconcile;
mod records;
mod reporting;
mod resume;
mod sample;
mod session;
mod spending;
mod step_logger;
mod target;
mod task;
mod trained_model;
mod training;

pub use adapters::{convert_adapter, diff_adapters, inspect_adapter};
pub use directory::RunDirectory;
pub use divergence::{Divergence, divergence};
pub use evaluate::{Classification, Evaluation, EvaluationJob, evaluate, validation_files};
pub use export::{ExportFormat, ExportRequest, Exported, export_gguf};
pub use export_adapter::export_adapter;
pub use first_recipe::{FirstRecipe, Suggestion, first_recipe};
pub use generate::{Generated, GenerationJob, generate};
pub use generation_scores::{GenerationScores, evaluate_generations};
pub use inference::ModelRequest;
pub use machine::{DeviceChoice, allowed_threads};
pub use merge::{MergeRequest, merge_model};
pub use metering::{MeterLine, MeterRequest, Metering};
pub use model::{find_model, tokenizer_of};
pub use model_source::{ModelSelection, ModelSource};
pub use multiple_choice::{ChoiceJob, ChoiceScores, evaluate_choices};
pub use options::data_options;
pub use place::{PlaceRequest, place_model};
pub use plan::{Planned, plan};
pub use predict::{Prediction, Predictions, RecordPrediction, predict};
pub use prepare::{Prepared, Purpose, prepare};
pub use preview::{Preview, RowsPreview, SetPreview, ShownExample, preview};
pub use probe::plan_with_probe;
pub use push::{PushRequest, push};
pub use reconcile::reconcile;
pub use records::data_files;
pub use training::{Finished, TrainRequest, train};

// For `cli`, which imports `run`, `recipe` and `report` alone.
pub use candle_core::Device;

pub use crate::adapter::{
    Conversion as AdapterConversion, Difference as AdapterDifference, Inspection, Verdict,
};
pub use crate::data::{
    Format, OnBadRecord, Options as DataOptions, PromptTemplate, RenderedSample, TxtUnit,
};
pub use crate::energy::sensor::{self, State as SensorState};
pub use crate::energy::{DeviceRef, GridRef, Interval, MeterKind, Phase, Profile};
pub use crate::forecast::place::{PlacedRow, Placement};
pub use crate::forecast::{
    BaselineCost, BaselineRequest, Choice, MeasuredForecast, Method, PublishedFigures, Target,
    baseline_cost, published_runs,
};
pub use crate::gguf::Quantization;
pub use crate::hub::{Progress, Silent};
pub use crate::measure::{Calibration, Calibrator, Effort, Reconciled, machine::peak_rss};
pub use crate::model::Sampling;
pub use crate::train::{StepRecord, Stop};

use crate::error::Result;
use first_recipe::limit_of;

/// Receives progress for display.
pub trait Screen {
    /// A line of text: an activity or a warning.
    fn note(&mut self, line: &str);
    /// `done` of `of` steps were planned.
    fn planning(&mut self, _done: u64, _of: u64) {}
    /// A step was completed.
    fn step(&mut self, record: &StepRecord, view: &StepView);
    /// `done` of `of` evaluation batches were computed.
    fn evaluating(&mut self, done: usize, of: usize);
    /// Validation loss after `step` steps.
    fn evaluated(&mut self, step: u64, val_loss: f64);
    /// Progress of downloads.
    fn downloads(&self) -> &dyn Progress;
}

/// Totals for a progress line.
#[derive(Debug, Clone, PartialEq)]
pub struct StepView {
    /// Steps if no budget binds.
    pub steps: u64,
    /// Steps that fit the budget by the plan.
    pub expected_steps: u64,
    /// Energy spent on the meter that decides.
    pub spent: crate::units::Joules,
    /// Name and spent fraction of the limit nearest to its end.
    pub budget: Option<(&'static str, f64)>,
    /// Steps of this process.
    pub done: u64,
    /// Tokens of this process.
    pub tokens: u64,
    /// Wall time of the steps of this process.
    pub train_wall: crate::units::Seconds,
}

/// Shows nothing.
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

/// Reads a text file.
fn read_text(path: &std::path::Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| crate::error::Error::io("read", path, e))
}
