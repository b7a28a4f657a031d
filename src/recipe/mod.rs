//! The recipe: what a run is, in one TOML file.
//!
//! Owns the file format. `raw` is exactly the file (unknown keys refused); `Recipe` is the checked form, in which no illegal
//! value exists. Every mistake is reported in one go, with line, column, caret, rule and remedy. Knows nothing of tensors,
//! devices or the network: whether a model or a file exists is found out later, in preflight.
//!
//! ```text
//! text, --set ──► raw (tree with places) ──► read (keys, types, ranges) ──► check (ids, contradictions) ──► Recipe ──► write
//!                                              └── keys: the one table of every key ──► schema, starter
//! ```

mod check;
mod contradictions;
mod given;
mod keys;
mod larger;
mod mistake;
mod open;
mod raw;
mod read;
mod schema;
mod suggest;
mod words;
mod write;

pub use larger::LargerModel;
pub use mistake::Mistake;
pub use open::{check, load, parse};
pub use schema::json_schema;
pub use write::starter;

use std::path::PathBuf;

use serde::Serialize;

use crate::adapter::options::LoraConfig;
pub use crate::adapter::options::Targets;
pub use crate::data::options::{Format, OnBadRecord, TxtUnit};
use crate::energy::options::{DeviceRef, GridRef, Limits, MeterKind};
pub use crate::train::schedule::Decay;
use crate::units::{Joules, Price, Pue};
use crate::work::Precision;

/// A checked recipe with every default filled in. Paths are absolute.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Names the run directory; the file's stem where the recipe gives none.
    pub name: String,
    /// Seeds every random choice.
    pub seed: u64,
    /// Which model.
    pub model: Model,
    /// What is trained.
    pub adapter: Adapter,
    /// On what.
    pub data: Data,
    /// How.
    pub train: Train,
    /// Within what.
    pub budget: Limits,
    /// How energy is counted.
    pub energy: Energy,
    /// Against what it is compared.
    pub baseline: Baseline,
    /// What the report says of the time after training.
    pub report: Report,
}

/// The `[model]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// A hub id, a directory, or `embedded:tiny`.
    pub id: ModelId,
    /// Branch, tag or commit of a hub model.
    pub revision: String,
    /// Compute precision.
    pub dtype: Precision,
    /// Where the weights come from.
    pub init: Init,
}

/// Where a model is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelId {
    /// `owner/name` on the hub.
    Hub(String),
    /// A local directory (resolved against the recipe's).
    Directory(PathBuf),
    /// A model inside the program: the part after `embedded:`.
    Embedded(String),
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The model's files.
    Pretrained,
    /// Drawn anew: training from scratch.
    Random,
}

/// The `[adapter]` table.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a run holds one of it")]
pub enum Adapter {
    /// Low-rank adapters on a frozen model.
    Lora(Lora),
    /// Every weight is trained.
    None,
}

/// The LoRA settings of a recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// PEFT's configuration.
    pub config: LoraConfig,
    /// An existing PEFT adapter to continue from.
    pub init_from: Option<PathBuf>,
    /// The keys the recipe itself wrote (of `r`, `lora_alpha`, `target_modules`, ...): with `init_from` only these may contradict the adapter.
    /// Empty without `init_from`.
    pub written: Vec<String>,
}

/// The `[data]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// Training records.
    pub train: DataSource,
    /// Records the loss is evaluated on.
    pub validation: Validation,
    /// How a record is read.
    pub format: Format,
    /// The wanted field -> the file's column.
    pub columns: Vec<(String, String)>,
    /// Longest record in tokens.
    pub max_length: usize,
    /// Several records in one row.
    pub packing: bool,
    /// A new order each epoch.
    pub shuffle: bool,
    /// What a record that cannot be read does.
    pub on_bad_record: OnBadRecord,
    /// How a `.txt` file is cut into texts.
    pub txt_unit: TxtUnit,
}

/// Where records are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// A local file (resolved against the recipe's directory).
    File(PathBuf),
    /// A data set on the hub: id and, after a `:`, a split.
    Hub {
        /// `owner/name`.
        id: String,
        /// Named split; "train" unless given.
        split: String,
    },
}

/// Where validation records come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Validation {
    /// There are none.
    None,
    /// A source of their own.
    Source(DataSource),
    /// This share of the training records, chosen by the seed.
    Fraction(f64),
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the data, fractions allowed.
    Epochs(f64),
}

/// The `[train]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Train {
    /// `steps` or `epochs`.
    pub length: Length,
    /// Rows in one forward pass.
    pub micro_batch_size: usize,
    /// Forward passes in one step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Decay,
    /// Its rise at the start.
    pub warmup: Warmup,
    /// AdamW's beta1.
    pub adam_beta1: f64,
    /// AdamW's beta2.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global gradient norm is clipped here; 0 never clips.
    pub max_grad_norm: f64,
    /// Evaluate every so many steps; 0: before and after only.
    pub eval_every: u64,
    /// Save every so many steps; 0: at the end only.
    pub save_every: u64,
    /// Checkpoints kept.
    pub save_total_limit: usize,
    /// Keep the checkpoint of lowest validation loss.
    pub keep_best: bool,
    /// Recompute activations in the backward pass.
    pub activation_checkpointing: Checkpointing,
}

/// The rise of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A share of the whole course.
    Ratio(f64),
    /// A number of steps.
    Steps(u64),
}

/// In which blocks activations are recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Where memory forces it; resolved by plan.
    Auto,
    /// In every block.
    Always,
    /// In none.
    Never,
    /// In the lowest so many blocks of those that the backward pass walks.
    #[serde(untagged)]
    Blocks(usize),
}

/// The `[energy]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Energy {
    /// The device whose profile counts.
    pub device: DeviceRef,
    /// The meter the budget binds on; `None`: measured where complete, else counted.
    pub meter: Option<MeterKind>,
    /// The electricity grid.
    pub grid: GridRef,
    /// Facility overhead.
    pub pue: Pue,
    /// Price of electricity or of the device.
    pub price: Option<Price>,
}

/// The `[baseline]` table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Baseline {
    /// How training from scratch is compared.
    pub from_scratch: Compared,
    /// How training every weight is compared.
    pub full_fine_tuning: Compared,
    /// A measured baseline that has not reached the run's loss goes on to so many times the run's training energy.
    pub energy_multiple: f64,
    /// Peak learning rate of measured baselines; the run's own where there is none.
    pub learning_rate: Option<f64>,
    /// Energy of all measured baselines together, apart from the run's budget.
    pub budget: Option<Joules>,
}

/// How a comparison is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// By counting.
    Counted,
    /// By training, for the same energy.
    Measured,
    /// Not at all.
    Off,
}

/// The `[report]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Requests a day once it is in use.
    pub requests_per_day: Option<f64>,
    /// Tokens of a request's prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer.
    pub generated_tokens: usize,
    /// The model that would be prompted instead.
    pub larger_model: Option<LargerModel>,
    /// Examples in the base model's prompt, which stands in where no larger model is given.
    pub few_shot_examples: usize,
}
