//! `plan.json`: the forecast of a run, in blocks of the report.
#![allow(
    missing_docs,
    reason = "fields are keys of plan.json; units are in their names"
)]

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::baselines::Baseline;
use super::energy::{CountedParts, HostLeftOut, Meters, ProfileFactor, ThisMachine};
use super::types::{Adapter, Budget, Carbon, Data, Environment, Memory, Meter, Model, Phase, keys};
use crate::energy::Interval;
use crate::forecast::{Choice, MeasuredForecast, Recomputation};
use crate::recipe::Checkpointing;
use crate::train::Stop;
use crate::units::{Bytes, GramsCo2e, Joules, Money, Seconds};

/// The forecast of a recipe.
#[derive(Debug, Serialize)]
pub struct Plan {
    pub model: Model,
    pub adapter: Adapter,
    /// `None` where tokenizer or data are missing.
    #[serde(flatten)]
    pub run: Option<PlannedRun>,
    pub memory: Memory,
    pub warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
}

/// Blocks that need tokenizer and data.
#[derive(Debug, Serialize)]
pub struct PlannedRun {
    pub data: Data,
    pub training: PlannedTraining,
    pub energy: PlannedEnergy,
    pub budget: Budget,
    pub carbon: Carbon,
    pub baselines: Vec<Baseline>,
    pub environment: Environment,
    pub forecast: Forecast,
    /// What-if table; the recipe first.
    pub choices: Vec<Choice>,
    pub recomputation: Recomputation,
    /// Baselines to be trained after the run, apart from its energy.
    pub measured_baselines: Vec<MeasuredForecast>,
}

#[derive(Debug, Serialize)]
pub struct PlannedTraining {
    /// Steps that the budget admits.
    pub steps: u64,
    pub stop_reason: Stop,
    /// Steps of the recipe; `None` where the budget alone ends the run.
    pub steps_requested: Option<u64>,
    pub tokens: u64,
    pub loss_tokens: u64,
    pub steps_per_epoch: u64,
    pub activation_checkpointing: Checkpointing,
}

/// Energy on the counted meter.
#[derive(Debug, Serialize)]
pub struct PlannedEnergy {
    /// Meter of the run.
    pub meter: Meter,
    pub total_j: Joules,
    pub by_phase: BTreeMap<Phase, Joules>,
    pub meters: Meters,
    pub flops: u64,
    pub bytes: Option<Bytes>,
    pub bytes_by_level: BTreeMap<String, Bytes>,
    pub counted_parts: Option<CountedParts>,
    pub device: String,
    /// The computing device, where `device` is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub this_machine: Option<ThisMachine>,
    pub profile_factor: Option<ProfileFactor>,
    pub host_left_out: Option<HostLeftOut>,
}

#[derive(Debug, Serialize)]
pub struct Forecast {
    pub energy_j: Interval<Joules>,
    #[serde(serialize_with = "with_null_bounds")]
    pub carbon_gco2e: Interval<GramsCo2e>,
    /// `None` without a price.
    pub cost: Option<Interval<Money>>,
    /// Roofline time: as tuned code takes it.
    pub wall_s: Seconds,
    /// Lower bound: the arithmetic at the device's highest rate.
    pub least_s: Seconds,
    pub steps_affordable: u64,
    pub tokens_affordable: u64,
}

/// A bound that equals the central figure is `null`.
fn with_null_bounds<S: Serializer>(
    interval: &Interval<GramsCo2e>,
    output: S,
) -> Result<S::Ok, S::Error> {
    let [central, low, high] = keys::Field::ends(interval);
    Interval { low, central, high }.serialize(output)
}

/// Timed steps on random weights.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// Timed steps; one more ran before them.
    pub steps: usize,
    /// Every row at its full length.
    pub tokens_per_second: f64,
    /// Median wall time of a step.
    pub step_s: Seconds,
    /// Peak memory of the process; `None` where the system does not report it.
    pub peak_rss_bytes: Option<Bytes>,
    /// Executed FLOPs of a step's matrix products and attention, over `step_s`.
    pub flops_per_second: f64,
    /// Energy of a step on the counted meter.
    pub step_j: Joules,
    /// The device profile that it is counted on.
    pub device: String,
    /// `step_j` times the recipe's steps; `None` without a number of steps.
    pub all_steps_j: Option<Joules>,
}
