//! The blocks of `report.json`, key by key.
//!
//! Owns the plain data that a run fills and every page shows. An unknown figure is `None` here and `null` in the file, never zero.
//! Knows nothing of how a figure was obtained.
#![allow(
    missing_docs,
    reason = "fields are keys of report.json; units are in their names"
)]

use serde::{Deserialize, Deserializer, Serialize};

use super::baselines::{Baseline, CurvePoint};
use super::energy::Energy;
use crate::energy::Interval;
pub use crate::energy::Limits as Amounts;
pub use crate::energy::MeterKind as Meter;
pub use crate::energy::Phase;
pub use crate::energy::sensor::Absent;
use crate::forecast::Inference;
use crate::train::Stop;
use crate::train::metrics::Metrics;
use crate::units::{Bytes, GramsCo2e, GramsPerKwh, Joules, Pue, Seconds};

/// Everything a run reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub model: Model,
    pub adapter: Adapter,
    pub data: Data,
    pub training: Training,
    pub energy: Energy,
    pub budget: Budget,
    pub carbon: Carbon,
    pub baselines: Vec<Baseline>,
    #[serde(default)]
    pub memory: Option<Memory>,
    pub environment: Environment,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<Inference>,
    /// Recipe keys that decide what is trained, with their values.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub hyperparameters: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    pub warnings: Vec<String>,
    #[serde(default)]
    pub sample: Option<Sample>,
}

impl Report {
    /// Reduction of the validation loss, nats per token; negative where it rose.
    pub fn loss_reduction(&self) -> Option<f64> {
        let reduction = self.training.val_loss_before? - self.training.val_loss_after?;
        reduction.is_finite().then_some(reduction)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// As in the recipe: hub id, directory or `embedded:NAME`.
    pub id: String,
    /// Commit of a hub model; `None` for a directory.
    pub revision: Option<String>,
    /// Class name in `config.json`.
    pub architecture: String,
    /// Shared weights counted once.
    pub parameters: u64,
}

/// What was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    Lora,
    /// Every weight.
    None,
}

/// What a program does with the adapter's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Portability {
    /// PEFT, vLLM, llama.cpp or mistral.rs.
    pub runtime: String,
    /// Whether it loads the adapter and computes the same.
    pub verdict: String,
    /// Why not, or under which condition.
    pub reasons: Vec<String>,
}

/// `r`, `lora_alpha` and `target_modules` are empty where every weight is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    pub r#type: AdapterType,
    pub r: Option<u64>,
    pub lora_alpha: Option<f64>,
    /// As in `adapter_config.json`.
    pub target_modules: Vec<String>,
    pub trainable_parameters: u64,
    /// Which programs load it; empty where every weight is trained.
    #[serde(default)]
    pub portability: Vec<Portability>,
}

/// The training set as encoded, each record once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    pub examples: u64,
    pub tokens: u64,
    pub loss_tokens: u64,
    /// Records cut at `max_length`.
    pub truncated: u64,
    /// Records without a loss token after truncation.
    pub dropped: u64,
    /// Records that could not be read.
    #[serde(default)]
    pub skipped: u64,
    #[serde(default)]
    pub sources: Vec<String>,
    /// Hash of the encoded training and validation records: equal for runs on the same data.
    #[serde(default)]
    pub fingerprint: Option<String>,
}

/// The checkpoint of lowest validation loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub val_loss: f64,
    /// Relative to the run directory.
    pub path: String,
}

/// What a loss is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossUnit {
    /// Of a loss token.
    #[default]
    NatsPerToken,
    /// Of a record with one class or several labels.
    NatsPerRecord,
    /// Of a record's number.
    SquaredError,
}

impl LossUnit {
    /// Behind a figure.
    pub fn words(self) -> &'static str {
        match self {
            Self::NatsPerToken => "nats per token",
            Self::NatsPerRecord => "nats per record",
            Self::SquaredError => "squared error per record",
        }
    }

    /// Behind "Losses are".
    pub fn sentence(self) -> &'static str {
        match self {
            Self::NatsPerToken => "in nats per token, over tokens with a loss",
            Self::NatsPerRecord => "in nats per record",
            Self::SquaredError => "mean squared errors",
        }
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Counts of records by true class (row) and predicted class (column).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfusionMatrix {
    /// Names of the classes, by id.
    pub labels: Vec<String>,
    /// A row for each true class.
    pub counts: Vec<Vec<u64>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    pub steps: u64,
    #[serde(default)]
    pub epochs: Option<f64>,
    /// Repetitions included.
    #[serde(default)]
    pub tokens: Option<u64>,
    #[serde(default)]
    pub loss_tokens: Option<u64>,
    pub stop_reason: Stop,
    pub val_loss_before: Option<f64>,
    pub val_loss_after: Option<f64>,
    /// Standard error of `val_loss_after` over the loss tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss_after_se: Option<f64>,
    /// On the validation set after the last step, of a classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// On the same records, where each has one class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confusion_matrix: Option<ConfusionMatrix>,
    /// Of the losses above and below.
    #[serde(default, skip_serializing_if = "LossUnit::is_default")]
    pub loss_unit: LossUnit,
    pub train_loss_last: Option<f64>,
    /// Over the wall time of training steps alone.
    pub tokens_per_second: Option<f64>,
    /// Of the run, evaluations and checkpoints included.
    pub wall_s: Seconds,
    /// CPU time of the process, all threads together; `None` of a resumed run.
    #[serde(default)]
    pub cpu_s: Option<Seconds>,
    pub peak_rss_bytes: Option<Bytes>,
    #[serde(default)]
    pub best: Option<Best>,
    /// Loss against training energy, where a baseline was trained; `steps.jsonl` has every step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<CurvePoint>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    pub limits: Amounts,
    /// Crashed attempts included.
    pub spent: Amounts,
    /// Lower bounds of energy, emissions and, at a price of energy, money.
    #[serde(default)]
    pub spent_low: Amounts,
    #[serde(default)]
    pub spent_high: Amounts,
    /// Energy beyond the tightest limit on energy, carbon or money; zero on the counted meter.
    pub overshoot_j: Option<Joules>,
    /// Cost of the last step and everything after it beyond the prediction: an upper bound of the overshoot.
    #[serde(default)]
    pub margin_j: Option<Joules>,
}

/// `gco2e = total_j x pue x gco2e_per_kwh`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Carbon {
    /// Emissions of the electricity, facility overhead included: `gco2e`, `low_gco2e`, `high_gco2e`.
    #[serde(flatten, with = "keys::emissions")]
    pub emissions: Interval<GramsCo2e>,
    /// Share of the device's manufacturing; not part of `gco2e`.
    #[serde(default)]
    pub embodied_gco2e: Option<GramsCo2e>,
    #[serde(default)]
    pub embodied_source: Option<String>,
    /// Grid code.
    pub grid: String,
    pub gco2e_per_kwh: GramsPerKwh,
    #[serde(deserialize_with = "at_least_one")]
    pub pue: Pue,
    /// Year of the intensity.
    #[serde(default)]
    pub year: Option<u16>,
    #[serde(default)]
    pub source: Option<String>,
    #[serde(default)]
    pub place: Option<String>,
    /// Scope of the intensity: production or consumption, direct or life cycle.
    #[serde(default)]
    pub basis: Option<String>,
    #[serde(default)]
    pub licence: Option<String>,
    /// SHA-256 of the grid tables; `None` for an intensity given as a number.
    #[serde(default)]
    pub dataset_sha256: Option<String>,
}

fn at_least_one<'de, D: Deserializer<'de>>(input: D) -> Result<Pue, D::Error> {
    let value = f64::deserialize(input)?;
    Pue::new(value).ok_or_else(|| serde::de::Error::custom(format!("pue: {value} is below 1")))
}

/// The memory forecast by part; the measured peak is `training.peak_rss_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub peak_bytes: Bytes,
    /// Frozen weights.
    pub weights: Bytes,
    /// Trained values, moments and gradients.
    pub trained: Bytes,
    /// Activations saved for the backward pass.
    pub activations: Bytes,
    /// Chunks of logits and the largest temporaries.
    pub temporaries: Bytes,
    /// The executable.
    pub program: Bytes,
    /// Free memory when the forecast was made; `None` afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of wattune.
    pub version: String,
    pub cpu: String,
    /// Instruction set of CPU matrix products: `amx`, `avx512_bf16`, `avx512`, `avx2` or `portable`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    pub threads: u64,
    pub os: String,
}

/// One generation before and after training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    pub prompt: String,
    pub before: String,
    pub after: String,
}

/// Three keys for an [`Interval`], such as `total_j`, `low_j` and `high_j`. A bound that equals the central figure is `null`.
pub(super) mod keys {
    use crate::energy::Interval;

    /// A field behind three keys: an interval, or none where the central figure is `null`.
    pub trait Field: Sized {
        type Value;

        /// Central, low and high.
        fn ends(&self) -> [Option<Self::Value>; 3];

        /// `None` where a required central figure is missing.
        fn from_ends(ends: [Option<Self::Value>; 3]) -> Option<Self>;
    }

    impl<T: Copy + PartialEq> Field for Interval<T> {
        type Value = T;

        fn ends(&self) -> [Option<T>; 3] {
            let bound = |end: T| Some(end).filter(|end| *end != self.central);
            [Some(self.central), bound(self.low), bound(self.high)]
        }

        fn from_ends([central, low, high]: [Option<T>; 3]) -> Option<Self> {
            central.map(|central| Self {
                low: low.unwrap_or(central),
                central,
                high: high.unwrap_or(central),
            })
        }
    }

    impl<T: Copy + PartialEq> Field for Option<Interval<T>> {
        type Value = T;

        fn ends(&self) -> [Option<T>; 3] {
            self.as_ref().map(Field::ends).unwrap_or_default()
        }

        fn from_ends(ends: [Option<T>; 3]) -> Option<Self> {
            Some(Interval::from_ends(ends))
        }
    }

    macro_rules! interval_keys {
        ($($name:ident: $central:literal, $low:literal, $high:literal;)*) => {$(
            pub mod $name {
                use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

                use super::Field;

                #[derive(Serialize, Deserialize)]
                struct Keys<T> {
                    #[serde(rename = $central)]
                    central: Option<T>,
                    #[serde(rename = $low)]
                    low: Option<T>,
                    #[serde(rename = $high)]
                    high: Option<T>,
                }

                pub fn serialize<F, S>(field: &F, output: S) -> Result<S::Ok, S::Error>
                where
                    F: Field<Value: Serialize>,
                    S: Serializer,
                {
                    let [central, low, high] = field.ends();
                    Keys { central, low, high }.serialize(output)
                }

                pub fn deserialize<'de, F, D>(input: D) -> Result<F, D::Error>
                where
                    F: Field<Value: Deserialize<'de>>,
                    D: Deserializer<'de>,
                {
                    let Keys { central, low, high } = Keys::deserialize(input)?;
                    F::from_ends([central, low, high])
                        .ok_or_else(|| D::Error::missing_field($central))
                }
            }
        )*};
    }
    interval_keys! {
        total: "total_j", "low_j", "high_j";
        energy: "energy_j", "low_j", "high_j";
        emissions: "gco2e", "low_gco2e", "high_gco2e";
        ratio: "ratio", "low_ratio", "high_ratio";
    }
}
