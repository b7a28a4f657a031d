//! PEFT's `LoraConfig`: which layers carry LoRA, and with which rank and scaling.
//!
//! Plain values under PEFT's names, so that a recipe can hold them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

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

/// Tokens of which only the rows of the embeddings are trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the input embedding, and of the output embedding where the two are tied.
    Embedding(Vec<u32>),
    /// By the ends of the embeddings' paths.
    ByModule(BTreeMap<String, Vec<u32>>),
}

/// The initial values of the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraInit {
    /// Kaiming-uniform A and zero B.
    #[default]
    Default,
    /// Normal A with a standard deviation of 1 / r, zero B.
    Gaussian,
    /// The largest singular values of the base weight, which loses them.
    Pissa,
    /// The same from a randomised decomposition of so many power iterations.
    PissaNiter(usize),
    /// The first columns of Q and rows of R of the base weight, which loses them.
    Olora,
}

impl LoraInit {
    /// The values that are read.
    pub const RULE: &str =
        "one of \"default\", \"gaussian\", \"pissa\", \"pissa_niter_N\" (N iterations), \"olora\"";
    const NITER: &str = "pissa_niter_";
    /// Most iterations of `pissa_niter_N`.
    const MAX_NITER: usize = 1000;
    const NAMED: [(Self, &str); 4] = [
        (Self::Default, "default"),
        (Self::Gaussian, "gaussian"),
        (Self::Pissa, "pissa"),
        (Self::Olora, "olora"),
    ];

    /// Whether the base weight loses what the factors hold; the adapter is then saved as plain LoRA of twice the rank.
    pub fn changes_the_base(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }
}

impl FromStr for LoraInit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::NAMED.into_iter().find(|(_, name)| *name == text);
        let niter = text.strip_prefix(Self::NITER).and_then(|n| n.parse().ok());
        let niter = niter
            .filter(|n| *n <= Self::MAX_NITER)
            .map(Self::PissaNiter);
        let init = named.map(|(init, _)| init).or(niter);
        init.ok_or_else(|| Self::RULE.to_string())
    }
}

impl fmt::Display for LoraInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::PissaNiter(n) = self {
            return write!(f, "{}{n}", Self::NITER);
        }
        let name = Self::NAMED.iter().find(|(init, _)| init == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
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
    /// Initial values of A and B.
    pub init_lora_weights: LoraInit,
    /// Modules trained in full, by the ends of their paths.
    pub modules_to_save: Vec<String>,
    /// Tokens whose embeddings are trained.
    pub trainable_token_indices: Option<TokenIndices>,
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
            init_lora_weights: LoraInit::Default,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            ensure_weight_tying: false,
            use_dora: false,
            bias: Bias::None,
            lora_bias: false,
        }
    }
}
