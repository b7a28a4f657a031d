//! PEFT's `LoraConfig`: which layers carry LoRA, and with which rank and scaling.
//!
//! Plain values under PEFT's names, so that a recipe can hold them.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// PEFT's three ways to name modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer except the output embedding.
    AllLinear,
    /// Modules whose path equals a name or ends with `.name`.
    Names(Vec<String>),
    /// Modules whose full path matches.
    Regex(String),
}

impl Targets {
    /// A single text as PEFT reads it: `all-linear` in any case, else a regular expression.
    pub fn from_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") {
            Self::AllLinear
        } else {
            Self::Regex(text.to_string())
        }
    }
}

/// Which biases are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the layers with LoRA.
    LoraOnly,
}

/// The part of PEFT's `LoraConfig` that decides what is trained and how it is scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank, unless `rank_pattern` gives another.
    pub r: usize,
    /// Alpha, unless `alpha_pattern` gives another.
    pub lora_alpha: f64,
    /// Probability that an input element of A is dropped.
    pub lora_dropout: f64,
    /// Modules that carry LoRA.
    pub target_modules: Targets,
    /// Modules left out, whatever `target_modules` says.
    pub exclude_modules: Option<Targets>,
    /// Scaling is `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// Pattern -> rank; the first match decides.
    pub rank_pattern: Vec<(String, usize)>,
    /// Pattern -> alpha; the first match decides.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Only these layers, for modules named by a suffix. An empty list means all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the module lists that contain layers; empty: the first list in a path.
    pub layers_pattern: Vec<String>,
    /// Modules trained in full, by the ends of their paths.
    pub modules_to_save: Vec<String>,
    /// Trains tied embeddings of `modules_to_save` as one table.
    pub ensure_weight_tying: bool,
    /// DoRA: a trained magnitude for each row of the adapted weight.
    pub use_dora: bool,
    /// The biases trained.
    pub bias: Bias,
    /// A trained bias on each B.
    pub lora_bias: bool,
}

impl Default for LoraConfig {
    /// PEFT's defaults, on every linear layer.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            use_dora: false,
            bias: Bias::None,
            lora_bias: false,
        }
    }
}
