//! What a model takes in use: the `inference` block of `report.json`.

use serde::{Deserialize, Serialize};

use crate::units::{GramsCo2e, Joules};

/// What a request takes, counted on the run's device profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// The device profile.
    pub device: String,
    /// Tokens of a request's prompt.
    pub prompt_tokens: u64,
    /// Tokens of its answer.
    pub generated_tokens: u64,
    /// Requests that are answered at once.
    #[serde(default = "one")]
    pub batch: u64,
    /// Before and after training.
    pub models: Vec<Served>,
    /// What would be prompted instead; `None` where nothing is comparable.
    pub alternative: Option<Alternative>,
    /// The first year, where the recipe says how many requests come.
    pub year: Option<Year>,
    /// What has to hold for it.
    pub assumptions: Vec<String>,
}

fn one() -> u64 {
    1
}

/// Which model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServedModel {
    /// The model before training.
    Base,
    /// The model with an unmerged adapter.
    Adapter,
    /// The adapter merged into the weights.
    Merged,
    /// The model of which every weight was trained.
    Trained,
}

/// What one model takes for a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// Which.
    pub model: ServedModel,
    /// FLOPs of a request.
    pub request_flops: u64,
    /// Energy of reading the prompt.
    pub prompt_j: Joules,
    /// Energy of a request.
    pub request_j: Joules,
    /// Energy of 1,000 generated tokens, their prompts included.
    pub per_1000_tokens_j: Joules,
    /// The same in emissions, facility overhead included.
    pub per_1000_tokens_gco2e: GramsCo2e,
    /// The bounds of the two; `None` in a report that was written before there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_bounds: Option<Bounds>,
}

/// The bounds of a counted energy and of its emissions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// With every coefficient at the end that gives least.
    pub low_j: Joules,
    /// At the end that gives most.
    pub high_j: Joules,
    /// The least energy on the grid at its lowest.
    pub low_gco2e: GramsCo2e,
    /// The most on the grid at its highest.
    pub high_gco2e: GramsCo2e,
}

/// What sort of thing would be prompted instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlternativeKind {
    /// A larger model with the same prompt.
    LargerModel,
    /// The base model with examples in its prompt.
    FewShot,
}

/// Prompting instead of fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// Which sort.
    pub kind: AlternativeKind,
    /// In words.
    pub name: String,
    /// Parameters of the model that answers.
    pub parameters: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Energy of a request.
    pub request_j: Joules,
    /// Energy of 1,000 generated tokens, their prompts included.
    pub per_1000_tokens_j: Joules,
    /// The same in emissions, facility overhead included; `None` in a report that was written before they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_gco2e: Option<GramsCo2e>,
    /// The bounds of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_bounds: Option<Bounds>,
    /// What the fine-tuned model takes less, a request; negative where it takes more.
    pub saved_per_request_j: Joules,
    /// Requests after which the run's energy is saved; `None` if a request saves nothing.
    pub pays_after_requests: Option<u64>,
}

/// The first year of use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Year {
    /// Requests a day.
    pub requests_per_day: f64,
    /// Requests in 365 days.
    pub requests: f64,
    /// Energy of them.
    pub energy_j: Joules,
    /// Their emissions, facility overhead included.
    pub gco2e: GramsCo2e,
    /// The bounds of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Bounds>,
    /// Use over use and fine-tuning together.
    pub share_of_life_cycle: f64,
    /// Fine-tuning over the same.
    pub fine_tuning_share: f64,
    /// Days after which the run's energy is saved.
    pub pays_after_days: Option<f64>,
}
