//! What the class of each decoder's model type does, one entry a type.
//!
//! Data alone: `family` reads config.json by it. A type without an entry is as Llama, apart from its
//! class defaults.

use super::architecture::{Biases, QkNorm};
use super::names::ModuleNames;
use super::residual::BranchNorms;
use crate::ops::NormKind;

/// What a model type's class does that no key of config.json says.
pub(super) struct Family {
    pub(super) norm_kind: NormKind,
    pub(super) names: ModuleNames,
    pub(super) qk_norm: Option<QkNorm>,
    /// As `Architecture::norms_rotated_qk`.
    pub(super) norms_rotated_qk: bool,
    pub(super) attention_norms: BranchNorms,
    pub(super) mlp_norms: BranchNorms,
    /// Layers that have biases whatever config.json says.
    pub(super) biases: Biases,
    pub(super) gated_mlp: bool,
    /// Name of the table of learned positions, in place of rotations.
    pub(super) positions: Option<&'static str>,
    /// As `Architecture::transposed_linears`.
    pub(super) transposed_linears: bool,
    /// As [`Rope::interleaved`](crate::ops::Rope::interleaved).
    pub(super) interleaved_rope: bool,
    /// Whether blocks without a window have no rotation, in a model with windows.
    pub(super) rotates_windowed_alone: bool,
    /// Whether `attention_bias` leaves out the attention's output.
    pub(super) bare_attention_output: bool,
    /// Whether blocks have mixtures of experts, and whether the weights of a token's experts sum to
    /// one where no key says so.
    pub(super) experts: Option<bool>,
    /// Whether the columns of a fused q, k, v are grouped by head.
    pub(super) groups_qkv_by_head: bool,
    /// Whether parallel branches share the norm before attention.
    pub(super) shares_parallel_norm: bool,
    /// Whether attention and MLP are parallel whatever config.json says.
    pub(super) always_parallel: bool,
    /// Whether full and sliding attention have rotary embeddings of their own.
    pub(super) ropes_by_layer_type: bool,
    /// Without `layer_types`: every how many blocks attention is full; 0: never.
    pub(super) full_attention_interval: usize,
    /// Whether rotated queries have a factor by position.
    pub(super) scales_queries: bool,
    /// Gemma: norms scale by 1 + weight, the embedding by sqrt(hidden_size).
    pub(super) is_gemma: bool,
    /// Whether the class reads the rotations `su` and `yarn` as `longrope` and has no others.
    pub(super) scales_by_longrope_alone: bool,
    /// As [`RopeShape::scales_base_by_alpha`](super::rope_config::RopeShape).
    pub(super) scales_base_by_alpha: bool,
}

const LLAMA: Family = Family {
    norm_kind: NormKind::Rms,
    names: ModuleNames::LLAMA,
    qk_norm: None,
    norms_rotated_qk: false,
    attention_norms: BranchNorms::before("input_layernorm"),
    mlp_norms: BranchNorms::before("post_attention_layernorm"),
    biases: Biases::NONE,
    gated_mlp: true,
    positions: None,
    transposed_linears: false,
    interleaved_rope: false,
    rotates_windowed_alone: false,
    bare_attention_output: false,
    experts: None,
    groups_qkv_by_head: false,
    shares_parallel_norm: false,
    always_parallel: false,
    ropes_by_layer_type: false,
    full_attention_interval: 0,
    scales_queries: false,
    is_gemma: false,
    scales_by_longrope_alone: false,
    scales_base_by_alpha: false,
};

/// Llama with LayerNorm.
const LAYER_NORM: Family = Family {
    norm_kind: NormKind::Layer,
    biases: Biases {
        norm: true,
        ..Biases::NONE
    },
    ..LLAMA
};

const OLMO2: Family = Family {
    qk_norm: Some(QkNorm::Rows),
    attention_norms: BranchNorms::after("post_attention_layernorm"),
    mlp_norms: BranchNorms::after("post_feedforward_layernorm"),
    ..LLAMA
};

const COHERE: Family = Family {
    norm_kind: NormKind::Layer,
    interleaved_rope: true,
    shares_parallel_norm: true,
    always_parallel: true,
    ..LLAMA
};

const GLM: Family = Family {
    names: ModuleNames::GLM,
    interleaved_rope: true,
    bare_attention_output: true,
    ..LLAMA
};

const GEMMA2: Family = Family {
    attention_norms: BranchNorms::around("input_layernorm", "post_attention_layernorm"),
    mlp_norms: BranchNorms::around("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    full_attention_interval: 2,
    is_gemma: true,
    ..LLAMA
};

impl Family {
    /// The norms around the MLP, by whether the branches are parallel.
    pub(super) fn mlp_norms_of(&self, parallel: bool) -> BranchNorms {
        if parallel && self.shares_parallel_norm {
            self.attention_norms
        } else {
            self.mlp_norms
        }
    }
}

/// The model types that differ from Llama.
const FAMILIES: &[(&str, Family)] = &[
    (
        "qwen2",
        Family {
            biases: Biases {
                qkv: true,
                ..Biases::NONE
            },
            ..LLAMA
        },
    ),
    (
        "qwen3",
        Family {
            qk_norm: Some(QkNorm::Heads),
            ..LLAMA
        },
    ),
    (
        "hunyuan_v1_dense",
        Family {
            names: ModuleNames::HUNYUAN,
            qk_norm: Some(QkNorm::Heads),
            norms_rotated_qk: true,
            scales_base_by_alpha: true,
            ..LLAMA
        },
    ),
    (
        "phi",
        Family {
            names: ModuleNames::PHI,
            biases: Biases {
                lm_head: true,
                ..Biases::ALL
            },
            gated_mlp: false,
            shares_parallel_norm: true,
            always_parallel: true,
            ..LAYER_NORM
        },
    ),
    ("cohere", COHERE),
    (
        "cohere2",
        Family {
            rotates_windowed_alone: true,
            ..COHERE
        },
    ),
    ("glm", GLM),
    (
        "glm4",
        Family {
            attention_norms: BranchNorms::around("input_layernorm", "post_self_attn_layernorm"),
            mlp_norms: BranchNorms::around("post_attention_layernorm", "post_mlp_layernorm"),
            ..GLM
        },
    ),
    (
        "helium",
        Family {
            names: ModuleNames::LLAMA,
            ..GLM
        },
    ),
    (
        "ernie4_5",
        Family {
            interleaved_rope: true,
            ..LLAMA
        },
    ),
    (
        "exaone4",
        Family {
            qk_norm: Some(QkNorm::Heads),
            rotates_windowed_alone: true,
            ..OLMO2
        },
    ),
    (
        "qwen3_moe",
        Family {
            qk_norm: Some(QkNorm::Heads),
            experts: Some(false),
            ..LLAMA
        },
    ),
    (
        "olmoe",
        Family {
            qk_norm: Some(QkNorm::Rows),
            experts: Some(false),
            ..LLAMA
        },
    ),
    (
        "mixtral",
        Family {
            names: ModuleNames::MIXTRAL,
            experts: Some(true),
            ..LLAMA
        },
    ),
    ("olmo2", OLMO2),
    (
        "olmo3",
        Family {
            ropes_by_layer_type: true,
            full_attention_interval: 4,
            ..OLMO2
        },
    ),
    (
        "ministral3",
        Family {
            scales_queries: true,
            ..LLAMA
        },
    ),
    (
        "gemma",
        Family {
            is_gemma: true,
            ..LLAMA
        },
    ),
    ("gemma2", GEMMA2),
    (
        "gemma3_text",
        Family {
            qk_norm: Some(QkNorm::Heads),
            ropes_by_layer_type: true,
            ..GEMMA2
        },
    ),
    (
        "phi3",
        Family {
            names: ModuleNames::PHI3,
            scales_by_longrope_alone: true,
            ..LLAMA
        },
    ),
    (
        "gpt_neox",
        Family {
            names: ModuleNames::GPT_NEOX,
            biases: Biases {
                mlp: true,
                ..LAYER_NORM.biases
            },
            gated_mlp: false,
            groups_qkv_by_head: true,
            ..LAYER_NORM
        },
    ),
    (
        "gpt2",
        Family {
            names: ModuleNames::GPT2,
            attention_norms: BranchNorms::before("ln_1"),
            mlp_norms: BranchNorms::before("ln_2"),
            biases: Biases::ALL,
            gated_mlp: false,
            positions: Some("wpe"),
            transposed_linears: true,
            ..LAYER_NORM
        },
    ),
    (
        "stablelm",
        Family {
            shares_parallel_norm: true,
            ..LAYER_NORM
        },
    ),
    (
        "starcoder2",
        Family {
            names: ModuleNames::STARCODER2,
            gated_mlp: false,
            ..LAYER_NORM
        },
    ),
];

/// The family of a model type: Llama's, unless the table has another.
pub(super) fn family(model_type: &str) -> &'static Family {
    let mut families = FAMILIES.iter();
    let found = families.find(|(name, _)| *name == model_type);
    found.map_or(&LLAMA, |(_, family)| family)
}
