//! What a run, its alternatives and its use would cost, counted without running anything.
//!
//! Owns the plan's figures, what-if tables, baselines, inference and the estimates of published training runs. Takes a
//! [`Subject`] (borrowed parts of a prepared run) or figures given by hand; returns plain types, each figure in its unit.
//! Knows nothing of weights, run directories or how a figure is shown.

pub mod accelerator;
mod baseline_request;
mod baselines;
mod inference;
mod inference_cost;
mod measured_baseline;
pub mod place;
mod plan;
pub mod published;
mod request;
pub mod split;
mod stored_formats;
mod subject;
pub mod training_cost;
mod what_if;

pub use accelerator::Accelerator;
pub use baseline_request::{BaselineCost, BaselineRequest, PublishedFigures, baseline_cost};
pub use baselines::{Metered, baselines};
pub use inference::{Alternative, AlternativeKind, Bounds, Inference, Served, ServedModel, Year};
pub use inference_cost::{inference_cost, request_too_long};
pub use measured_baseline::{BaselineSetup, measured_kinds};
pub use plan::{MeasuredForecast, Recomputation, RunForecast, forecast_run};
pub use published::{PublishedRun, published_runs};
pub use request::{RequestCost, RequestSize, resident};
pub use subject::{Subject, Target, emissions, load_work, model_name};
pub use training_cost::{Estimate, Method, TrainingJob};
pub use what_if::{Choice, machine_over_profile};
