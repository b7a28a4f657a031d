//! The blocks of `report.json`, key by key as the contract names them.
//!
//! Owns the plain data that a run fills and every page is made of. Takes numbers with their units, returns a `Report` in which
//! a figure is finite or absent (`sealed`). Refuses to know where a figure came from, and never replaces a missing one by zero:
//! what is not known is `None`, and `null` in the file.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::inference::Inference;
use super::measured::{CurvePoint, MeasuredBaseline};
use super::memory::Memory;
use super::parts::{CountedParts, Factor, HostLeftOut};
use super::reconciliation::{ProfileFactor, Reconciliation};
pub use crate::energy::MeterKind as Meter;
pub use crate::energy::Phase;
pub use crate::energy::baseline::{BaselineKind, Label};
pub use crate::energy::sensor::Absent;
use crate::train::Stop;
use crate::units::{Bytes, Flops, GramsCo2e, GramsPerKwh, Joules, Money, Pue, Seconds};

/// All that a run reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The model that was specialised.
    pub model: Model,
    /// What was trained on it.
    pub adapter: Adapter,
    /// On what.
    pub data: Data,
    /// How training went.
    pub training: Training,
    /// What it took.
    pub energy: Energy,
    /// Within what.
    pub budget: Budget,
    /// What that emitted.
    pub carbon: Carbon,
    /// Against what it is compared.
    pub baselines: Vec<Baseline>,
    /// What memory it was forecast to take.
    #[serde(default)]
    pub memory: Option<Memory>,
    /// Where it ran.
    pub environment: Environment,
    /// What the model takes once it is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<Inference>,
    /// What a reader should know before trusting the rest.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// One generation before and after.
    #[serde(default)]
    pub sample: Option<Sample>,
}

/// The `model` block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// As the recipe names it: hub id, directory or `embedded:NAME`.
    pub id: String,
    /// The commit of a hub model; `None` for a directory.
    pub revision: Option<String>,
    /// Its architecture's name in `config.json`.
    pub architecture: String,
    /// How many weights it has, shared ones once.
    pub parameters: u64,
}

/// What sort of thing was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    /// Low-rank adapters.
    Lora,
    /// Every weight.
    None,
}

/// The `adapter` block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    /// LoRA, or every weight.
    pub r#type: AdapterType,
    /// Rank; `None` where every weight is trained.
    pub r: Option<u64>,
    /// LoRA's alpha; `None` where every weight is trained.
    pub lora_alpha: Option<f64>,
    /// The module names as in `adapter_config.json`; empty where every weight is trained.
    pub target_modules: Vec<String>,
    /// How many weights were trained.
    pub trainable_parameters: u64,
}

/// The `data` block: the training set as encoded, each record once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Records that training can draw from.
    pub examples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them with a loss.
    pub loss_tokens: u64,
    /// Records cut at `max_length`.
    pub truncated: u64,
    /// Records left without a loss token.
    pub dropped: u64,
    /// Records that could not be read and were left out.
    #[serde(default)]
    pub skipped: u64,
    /// Where they came from.
    #[serde(default)]
    pub sources: Vec<String>,
    /// A hash over the encoded training and validation records: equal where two runs saw the same data.
    #[serde(default)]
    pub fingerprint: Option<String>,
}

/// The checkpoint of lowest validation loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After which step.
    pub step: u64,
    /// Nats per loss token.
    pub val_loss: f64,
    /// Relative to the run directory.
    pub path: String,
}

/// The `training` block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Optimizer steps done.
    pub steps: u64,
    /// Passes over the data done.
    #[serde(default)]
    pub epochs: Option<f64>,
    /// Tokens trained on, repetitions included.
    #[serde(default)]
    pub tokens: Option<u64>,
    /// Those of them with a loss.
    #[serde(default)]
    pub loss_tokens: Option<u64>,
    /// Why it ended.
    pub stop_reason: Stop,
    /// Nats per loss token before the first step.
    pub val_loss_before: Option<f64>,
    /// Nats per loss token after the last step.
    pub val_loss_after: Option<f64>,
    /// Loss of the last step, nats per loss token.
    pub train_loss_last: Option<f64>,
    /// Training tokens over the wall time of the training steps alone.
    pub tokens_per_second: Option<f64>,
    /// Wall time of the whole run.
    pub wall_s: Seconds,
    /// Largest resident memory.
    pub peak_rss_bytes: Option<Bytes>,
    /// The kept best checkpoint.
    #[serde(default)]
    pub best: Option<Best>,
    /// Loss against training energy, where a baseline was trained to be held against it; `steps.jsonl` has every step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<CurvePoint>,
}

/// The three meters side by side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Meters {
    /// Always there.
    pub counted_j: Joules,
    /// Where the machine has complete counters.
    pub measured_j: Option<Joules>,
    /// Where the profile has a power.
    pub timed_j: Option<Joules>,
}

/// The `energy` block: the machine's own, before the facility's overhead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// The meter that `total_j`, `by_phase` and the budget go by.
    pub meter: Meter,
    /// The whole run on that meter.
    pub total_j: Joules,
    /// A lower bound of `total_j`, where the coefficients have one.
    #[serde(default)]
    pub low_j: Option<Joules>,
    /// An upper bound of `total_j`, where the coefficients have one.
    #[serde(default)]
    pub high_j: Option<Joules>,
    /// The same by what it was spent on; sums to `total_j`.
    pub by_phase: BTreeMap<Phase, Joules>,
    /// Every meter there was.
    pub meters: Meters,
    /// Why `measured_j` is not there.
    #[serde(default)]
    pub measured_absent: Option<Absent>,
    /// What the counted energy is made of; sums to `counted_j`.
    #[serde(default)]
    pub counted_parts: Option<CountedParts>,
    /// What the counted energy was multiplied with, where the device profile keeps such a factor.
    #[serde(default)]
    pub profile_factor: Option<ProfileFactor>,
    /// Measured against counted, where there are counters.
    #[serde(default)]
    pub reconciliation: Option<Reconciliation>,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes moved to and from main memory, by the profile's model.
    pub bytes: Bytes,
    /// Bytes moved at each memory level, by the profile's model.
    #[serde(default)]
    pub bytes_by_level: BTreeMap<String, Bytes>,
    /// The device profile.
    pub device: String,
    /// The profile's coefficients, each with its source.
    #[serde(default)]
    pub factors: Vec<Factor>,
    /// What `total_j` lacks of an accelerator's machine; `None` where the device is the machine, or the counters see it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_left_out: Option<HostLeftOut>,
}

/// An amount of each thing a budget can limit; `None`: not limited, or not known.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Amounts {
    /// The machine's own energy.
    pub energy_j: Option<Joules>,
    /// Emissions, facility overhead included.
    pub carbon_gco2e: Option<GramsCo2e>,
    /// Executed FLOPs.
    pub flops: Option<Flops>,
    /// Wall time.
    pub time_s: Option<Seconds>,
    /// Money.
    pub cost: Option<Money>,
}

/// The `budget` block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// What the recipe allowed.
    pub limits: Amounts,
    /// What was spent, crashed runs included.
    pub spent: Amounts,
    /// The least that was spent, where a coefficient is uncertain: energy, emissions and, at a price of energy, money.
    #[serde(default)]
    pub spent_low: Amounts,
    /// The most.
    #[serde(default)]
    pub spent_high: Amounts,
    /// How far the energy budget was passed; zero on the counted meter; `None` without an energy budget.
    pub overshoot_j: Option<Joules>,
    /// What the last step and everything after it cost more than predicted: no energy budget is passed by more.
    #[serde(default)]
    pub margin_j: Option<Joules>,
}

/// The `carbon` block: `gco2e = total_j x pue x gco2e_per_kwh`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Carbon {
    /// Emissions of the electricity, facility overhead included.
    pub gco2e: GramsCo2e,
    /// A lower bound of it, where a coefficient is uncertain.
    #[serde(default)]
    pub low_gco2e: Option<GramsCo2e>,
    /// An upper bound of it, where a coefficient is uncertain.
    #[serde(default)]
    pub high_gco2e: Option<GramsCo2e>,
    /// The device's share of its own manufacture; not part of `gco2e`.
    #[serde(default)]
    pub embodied_gco2e: Option<GramsCo2e>,
    /// What that share rests on.
    #[serde(default)]
    pub embodied_source: Option<String>,
    /// The grid's code.
    pub grid: String,
    /// Its intensity.
    pub gco2e_per_kwh: GramsPerKwh,
    /// Facility overhead.
    #[serde(deserialize_with = "at_least_one")]
    pub pue: Pue,
    /// The year of the intensity.
    #[serde(default)]
    pub year: Option<u16>,
    /// Who published it.
    #[serde(default)]
    pub source: Option<String>,
    /// The place in words.
    #[serde(default)]
    pub place: Option<String>,
    /// What the intensity counts: production or consumption, direct or life cycle.
    #[serde(default)]
    pub basis: Option<String>,
    /// The intensity's licence.
    #[serde(default)]
    pub licence: Option<String>,
    /// The SHA-256 of the tables it was looked up in; `None` for a number of the user's own.
    #[serde(default)]
    pub dataset_sha256: Option<String>,
}

fn at_least_one<'de, D: Deserializer<'de>>(input: D) -> Result<Pue, D::Error> {
    let value = f64::deserialize(input)?;
    Pue::new(value).ok_or_else(|| serde::de::Error::custom(format!("pue: {value} is below 1")))
}

/// One entry of `baselines`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// What the run is compared with.
    pub kind: BaselineKind,
    /// How that is known.
    pub label: Label,
    /// Its FLOPs.
    pub flops: Option<Flops>,
    /// Its energy on this run's device and meter.
    pub energy_j: Option<Joules>,
    /// What its counted energy was multiplied with to stand beside a run that was measured or timed: that run's meter over its count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metered_over_counted: Option<f64>,
    /// Its emissions on this run's grid.
    pub gco2e: Option<GramsCo2e>,
    /// Its energy over this run's.
    pub ratio: Option<f64>,
    /// A lower bound of `energy_j`.
    #[serde(default)]
    pub low_j: Option<Joules>,
    /// An upper bound of `energy_j`.
    #[serde(default)]
    pub high_j: Option<Joules>,
    /// A lower bound of `gco2e`.
    #[serde(default)]
    pub low_gco2e: Option<GramsCo2e>,
    /// An upper bound of `gco2e`.
    #[serde(default)]
    pub high_gco2e: Option<GramsCo2e>,
    /// A lower bound of `ratio`; narrower than the energies', whose error both sides share where both are counted.
    #[serde(default)]
    pub low_ratio: Option<f64>,
    /// An upper bound of `ratio`.
    #[serde(default)]
    pub high_ratio: Option<f64>,
    /// Who says so, or which formula.
    pub source: String,
    /// What has to hold for it.
    #[serde(default)]
    pub assumptions: Vec<String>,
    /// Its validation loss after this run's energy, nats per loss token.
    #[serde(default)]
    pub val_loss_at_equal_energy: Option<f64>,
    /// The training energy it takes to this run's validation loss; `measured` says whether it was reached or extrapolated.
    #[serde(default)]
    pub energy_to_equal_loss_j: Option<Joules>,
    /// How it went, where it was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<MeasuredBaseline>,
}

/// The `environment` block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// wattune's own version.
    pub version: String,
    /// The processor's name.
    pub cpu: String,
    /// The instruction set of matrix products on the processor: `amx`, `avx512_bf16`, `avx512`, `avx2` or `portable`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// Threads used.
    pub threads: u64,
    /// The operating system's name.
    pub os: String,
}

/// One generation before and after training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// What the model was given.
    pub prompt: String,
    /// What it said before.
    pub before: String,
    /// What it said after.
    pub after: String,
}

impl Report {
    /// The lowering of the validation loss, nats per loss token; negative where it rose.
    pub fn loss_bought(&self) -> Option<f64> {
        let bought = self.training.val_loss_before? - self.training.val_loss_after?;
        bought.is_finite().then_some(bought)
    }
}
