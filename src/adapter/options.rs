//! PEFT's `LoraConfig`: which layers carry LoRA, and with which rank and scaling.
//!
//! Plain values under PEFT's names, so that a recipe can hold them.

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

/// The part of PEFT's `LoraConfig` that decides where LoRA sits and how it is scaled.
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
}
