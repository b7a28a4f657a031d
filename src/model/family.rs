//! config.json -> [`Architecture`], for every supported `model_type`.
//!
//! Class defaults and the keys of each type are data (`class_defaults.json`); what a type adds or
//! reads differently stands here.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::architecture::{Architecture, Biases, ConfigDropout, LayerKind};
use super::config::{Config, Range, text_config};
use super::embedding::{EmbeddingParts, LearnedPositions};
use super::encoder_config::{encoder, labels, problem_type};
use super::expert_sizes::{expert_sizes, sparse_layers};
use super::families::{Family, family};
use super::head::{Classified, Head};
use super::names::ModuleNames;
use super::rope_config::{RopeShape, query_scaling, rope, ropes_by_layer_type};
use crate::error::{Error, Kind, Result};
use crate::ops::{Activation, Attention, Rope};

/// Most parameters, blocks and columns of q: far beyond any published model, and small enough that the work of a
/// step stays within 64 bits.
const MAX_PARAMETERS: u64 = 1 << 44;
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 24;

/// Keys of dropouts that transformers applies in training.
const DROPOUT_KEYS: [&str; 13] = [
    "router_jitter_noise",
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "embedding_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "seq_classif_dropout",
];

impl Architecture {
    /// Reads a config.json file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| {
            Error::new(Kind::Model, format!("config.json is not JSON: {e}"))
                .at(path.display().to_string())
        })?;
        Self::from_config(&value).map_err(|e| e.at(path.display().to_string()))
    }

    /// Reads a parsed config.json, as transformers' class of its `model_type` does; of a composite
    /// model the text decoder's part.
    ///
    /// # Errors
    /// A value that the model type cannot have or that nothing here implements, by its key.
    pub fn from_config(value: &Value) -> Result<Self> {
        let object = value
            .as_object()
            .ok_or_else(|| Error::new(Kind::Model, "config.json is not a JSON object"))?;
        let decoder = text_config(object);
        let (config, model_type) = Config::new(decoder.as_ref().unwrap_or(object))?;
        if let Some(mut architecture) = encoder(&config, model_type)? {
            architecture.classify_as(&class(&config, model_type), &config)?;
            architecture.quantize_as_stored(&config)?;
            check_parameters(&architecture)?;
            return Ok(architecture);
        }
        let mut architecture = decoder_of(&config, model_type, decoder.is_some())?;
        architecture.classify_as(&architecture.class.clone(), &config)?;
        architecture.quantize_as_stored(&config)?;
        check_parameters(&architecture)?;
        Ok(architecture)
    }
}

impl Architecture {
    /// Replaces the head by a classifier's if the class has one.
    fn classify_as(&mut self, class: &str, config: &Config<'_>) -> Result<()> {
        match Classified::of_class(class) {
            Some(classified) => {
                self.classify(classified, labels(config)?)?;
                self.set_problem_type(problem_type(config, classified)?);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Reads the configuration of a decoder; `composite`: one inside a composite model.
fn decoder_of(config: &Config<'_>, model_type: &str, composite: bool) -> Result<Architecture> {
    let hidden_size = config.required_size("hidden_size")?;
    let family = family(model_type);
    let attention = attention(config, hidden_size)?;
    let parallel = family.always_parallel || config.flag("use_parallel_residual")?;
    let max_position_embeddings = config.required_size("max_position_embeddings")?;
    let layers = layers(config, family)?;
    let shape = RopeShape {
        head_dim: attention.head_dim,
        max_position: max_position_embeddings,
        longrope_alone: family.scales_by_longrope_alone,
        scales_base_by_alpha: family.scales_base_by_alpha,
        interleaved: family.interleaved_rope,
    };
    Ok(Architecture {
        class: class(config, model_type),
        model_type: model_type.to_string(),
        names: if composite {
            ModuleNames::IN_LLAVA
        } else {
            family.names
        },
        hidden_size,
        intermediate_size: intermediate_size(config, hidden_size)?,
        experts: expert_sizes(config, family)?,
        num_hidden_layers: layers.len(),
        attention,
        scales_by_layer: config.flag("scale_attn_by_inverse_layer_idx")?,
        layers,
        qkv_groups: if family.groups_qkv_by_head {
            attention.kv_heads
        } else {
            1
        },
        qk_norm: family.qk_norm,
        norms_rotated_qk: family.norms_rotated_qk,
        activation: activation(config, family)?,
        attention_norms: family.attention_norms,
        mlp_norms: family.mlp_norms_of(parallel),
        parallel,
        gated_mlp: family.gated_mlp,
        embedding_factor: embedding_factor(config, family, hidden_size)?,
        rounds_embedding_factor: family.is_gemma,
        embedding_parts: embedding_parts(family, max_position_embeddings),
        residual_factor: factor(config, "residual_multiplier")?,
        logits_factor: factor(config, "logit_scale")? / factor(config, "logits_scaling")?,
        logits_softcap: config.number("final_logit_softcapping", Range::POSITIVE)?,
        vocab_size: config.required_size("vocab_size")?,
        max_position_embeddings,
        norm_kind: family.norm_kind,
        norm_unit_offset: family.is_gemma,
        norm_eps: config.required_number("rms_norm_eps", Range::NON_NEGATIVE)?,
        ropes: ropes(config, family, shape)?,
        query_scaling: family
            .scales_queries
            .then(|| query_scaling(config))
            .transpose()?,
        tie_word_embeddings: config.flag("tie_word_embeddings")?,
        biases: biases(config, family)?,
        transposed_linears: family.transposed_linears,
        initializer_range: config.required_number("initializer_range", Range::NON_NEGATIVE)?,
        stored_in_bf16: stored_in_bf16(config)?,
        stored_formats: BTreeMap::new(),
        dropout: dropout(config)?,
        head: Head::Vocabulary,
    })
}

/// Refuses more parameters than any model has. Sizes are bounded one by one, so that the sum cannot overflow.
fn check_parameters(architecture: &Architecture) -> Result<()> {
    if architecture.parameters() <= MAX_PARAMETERS {
        return Ok(());
    }
    Err(
        Error::new(Kind::Model, "config.json: these sizes are beyond any model")
            .value(format!("{} parameters", architecture.parameters()))
            .rule(format!("at most {MAX_PARAMETERS}"))
            .hint("correct the sizes: the file is damaged, or was not published with a model"),
    )
}

fn activation(config: &Config<'_>, family: &Family) -> Result<Activation> {
    let key = if config.has("hidden_activation") {
        "hidden_activation"
    } else {
        "hidden_act"
    };
    let activation = activation_of(config, key)?;
    // Gemma's first files say gelu and mean its tanh approximation.
    let means_tanh = family.is_gemma && key == "hidden_act" && activation == Activation::Gelu;
    Ok(if means_tanh {
        Activation::GeluTanh
    } else {
        activation
    })
}

/// The activation function that `key` names.
pub(super) fn activation_of(config: &Config<'_>, key: &str) -> Result<Activation> {
    let activation = config.text(key)?.and_then(Activation::from_name);
    activation.ok_or_else(|| config.wrong(key, "silu, gelu, gelu_pytorch_tanh or relu"))
}

/// Channels inside the MLP: without `n_inner`, four times the hidden size (GPT-2).
fn intermediate_size(config: &Config<'_>, hidden_size: usize) -> Result<usize> {
    if config.has("n_inner") {
        return Ok(config.size("n_inner")?.unwrap_or(4 * hidden_size));
    }
    config.required_size("intermediate_size")
}

pub(super) fn attention(config: &Config<'_>, hidden_size: usize) -> Result<Attention> {
    let heads = config.required_size("num_attention_heads")?;
    let kv_heads = if config.has("num_key_value_heads") {
        config.size("num_key_value_heads")?
    } else {
        None
    };
    let kv_heads = kv_heads.unwrap_or(heads);
    let given = config.size("head_dim")?;
    let head_dim = given.unwrap_or(hidden_size / heads);
    let refuse = |what: &str, value: String| {
        Err(Error::new(Kind::Model, format!("config.json: {what}"))
            .value(value)
            .hint("use the config.json that was published with the model"))
    };
    if heads % kv_heads != 0 {
        return refuse(
            "`num_key_value_heads` must divide `num_attention_heads`",
            format!("{kv_heads} and {heads}"),
        );
    }
    if given.is_none() && !hidden_size.is_multiple_of(heads) {
        return refuse(
            "`num_attention_heads` must divide `hidden_size` where there is no `head_dim`",
            format!("{heads} and {hidden_size}"),
        );
    }
    if head_dim % 2 != 0 || head_dim == 0 {
        return refuse("`head_dim` must be even", head_dim.to_string());
    }
    if heads * head_dim > MAX_WIDTH {
        return refuse(
            "`num_attention_heads` x `head_dim` is beyond any model",
            format!("{heads} x {head_dim}, above {MAX_WIDTH}"),
        );
    }
    Ok(Attention {
        heads,
        kv_heads,
        head_dim,
        causal: true,
        window: None,
        scale: scale(config)?,
        softcap: config.number("attn_logit_softcapping", Range::POSITIVE)?,
    })
}

/// Factor of the scores: Granite's multiplier, Gemma's `query_pre_attn_scalar`^(-1/2).
fn scale(config: &Config<'_>) -> Result<Option<f64>> {
    let required = |key| config.required_number(key, Range::POSITIVE);
    Ok(if config.has("attention_multiplier") {
        Some(required("attention_multiplier")?)
    } else if config.has("query_pre_attn_scalar") {
        Some(required("query_pre_attn_scalar")?.powf(-0.5))
    } else if config.has("scale_attn_weights") && !config.flag("scale_attn_weights")? {
        Some(1.0)
    } else {
        None
    })
}

/// The blocks: which have a window, and which a rotation.
fn layers(config: &Config<'_>, family: &Family) -> Result<Vec<LayerKind>> {
    let count = layer_count(config)?;
    let by_flag = config.has("use_sliding_window");
    let has_window =
        config.has("sliding_window") && (!by_flag || config.flag("use_sliding_window")?);
    let window = if has_window {
        config.size("sliding_window")?
    } else {
        None
    };
    let rotated = match family.positions {
        Some(_) => vec![false; count],
        None => rotated_layers(config, count)?,
    };
    let sliding = sliding_layers(config, family, &rotated)?;
    let only_windowed = family.rotates_windowed_alone && window.is_some();
    let sparse = sparse_layers(config, family, count)?;
    let kinds = rotated.into_iter().zip(sliding).zip(sparse);
    let kind = |((rotated, sliding), sparse): ((bool, bool), bool)| LayerKind {
        sparse,
        window: window.filter(|_| sliding),
        rope: (rotated && (sliding || !only_windowed))
            .then_some(usize::from(family.ropes_by_layer_type && sliding)),
    };
    Ok(kinds.map(kind).collect())
}

/// Number of blocks.
pub(super) fn layer_count(config: &Config<'_>) -> Result<usize> {
    let count = config.required_size("num_hidden_layers")?;
    if count > MAX_LAYERS {
        let rule = format!("a whole number from 1 to {MAX_LAYERS}");
        return Err(config.wrong("num_hidden_layers", &rule));
    }
    Ok(count)
}

/// Which blocks rotate q and k: those with 1 in `no_rope_layers` (SmolLM 3), or all but every
/// `no_rope_layer_interval`th, or all.
fn rotated_layers(config: &Config<'_>, count: usize) -> Result<Vec<bool>> {
    if !config.has("no_rope_layers") {
        return Ok(vec![true; count]);
    }
    let flag = |value: &Value| Some(value.as_u64().filter(|flag| *flag <= 1)? == 1);
    let flags = |value: &Value| {
        let flags: Option<Vec<bool>> = value.as_array()?.iter().map(flag).collect();
        flags.filter(|flags| flags.len() == count)
    };
    let rule = "a list with 1 (rotated) or 0 for each of `num_hidden_layers`";
    if let Some(rotated) = config.read("no_rope_layers", rule, flags)? {
        return Ok(rotated);
    }
    let interval = config.required_size("no_rope_layer_interval")?;
    Ok((1..=count).map(|n| !n.is_multiple_of(interval)).collect())
}

/// Which blocks have the window: those that `layer_types` names; without it those that the type's
/// class chooses.
fn sliding_layers(config: &Config<'_>, family: &Family, rotated: &[bool]) -> Result<Vec<bool>> {
    let count = rotated.len();
    if config.has("layer_types")
        && let Some(types) = config.read("layer_types", "a list", Value::as_array)?
    {
        if types.len() != count {
            return Err(config.wrong("layer_types", "one entry for each of `num_hidden_layers`"));
        }
        let is_sliding = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(config.wrong("layer_types", "each full_attention or sliding_attention")),
        };
        return types.iter().map(is_sliding).collect();
    }
    if config.has("max_window_layers") {
        let whole = |value: &Value| usize::try_from(value.as_u64()?).ok();
        let first = config.read("max_window_layers", "a whole number", whole)?;
        let first = first.ok_or_else(|| config.wrong("max_window_layers", "a whole number"))?;
        return Ok((0..count).map(|layer| layer >= first).collect());
    }
    if config.has("no_rope_layers") {
        return Ok(rotated.iter().map(|rotated| !rotated).collect());
    }
    let interval = if config.has("sliding_window_pattern") {
        config.required_size("sliding_window_pattern")?
    } else {
        family.full_attention_interval
    };
    let full = |n: usize| interval > 0 && n.is_multiple_of(interval);
    Ok((1..=count).map(|n| !full(n)).collect())
}

/// The rotary embeddings that blocks choose from; none with learned positions.
fn ropes(config: &Config<'_>, family: &Family, shape: RopeShape) -> Result<Vec<Rope>> {
    if family.positions.is_some() {
        return Ok(Vec::new());
    }
    if family.ropes_by_layer_type {
        return ropes_by_layer_type(config, shape);
    }
    Ok(vec![rope(config, shape)?])
}

/// Learned positions, if the family has them.
fn embedding_parts(family: &Family, rows: usize) -> EmbeddingParts {
    let table = |name| LearnedPositions {
        name,
        rows,
        first: 0,
    };
    EmbeddingParts {
        positions: family.positions.map(table),
        ..EmbeddingParts::default()
    }
}

fn embedding_factor(config: &Config<'_>, family: &Family, hidden_size: usize) -> Result<f64> {
    if family.is_gemma {
        return Ok((hidden_size as f64).sqrt());
    }
    factor(config, "embedding_multiplier")
}

/// A factor of Granite or Cohere; 1 for other types.
fn factor(config: &Config<'_>, key: &str) -> Result<f64> {
    if config.has(key) {
        return config.required_number(key, Range::POSITIVE);
    }
    Ok(1.0)
}

fn biases(config: &Config<'_>, family: &Family) -> Result<Biases> {
    let always = family.biases;
    let all = config.flag("use_bias")?;
    let attention = all || config.flag("attention_bias")?;
    Ok(Biases {
        lm_head: family.biases.lm_head,
        qkv: attention || config.flag("use_qkv_bias")? || always.qkv,
        o: if config.has("attention_out_bias") {
            config.flag("attention_out_bias")?
        } else {
            attention && !family.bare_attention_output || always.o
        },
        mlp: all || config.flag("mlp_bias")? || always.mlp,
        norm: always.norm,
    })
}

/// `dtype` (transformers 5), else `torch_dtype`.
pub(super) fn stored_in_bf16(config: &Config<'_>) -> Result<bool> {
    let key = if config.get("dtype").is_some() {
        "dtype"
    } else {
        "torch_dtype"
    };
    match config.text(key)? {
        Some("bfloat16") => Ok(true),
        None | Some("float16" | "float32" | "float64") => Ok(false),
        Some(_) => Err(config.wrong(key, "bfloat16, float16, float32 or float64")),
    }
}

pub(super) fn dropout(config: &Config<'_>) -> Result<Vec<ConfigDropout>> {
    let mut dropout = Vec::new();
    for key in DROPOUT_KEYS.into_iter().filter(|key| config.has(key)) {
        let p = config.number(key, Range::NON_NEGATIVE)?;
        let default = config.defaults.and_then(|keys| keys.get(key)?.as_f64());
        dropout.extend(p.filter(|p| *p > 0.0).map(|p| ConfigDropout {
            key,
            p,
            is_default: default == Some(p),
        }));
    }
    Ok(dropout)
}

/// The first `architectures` entry, else the name that transformers gives the type's causal model.
fn class(config: &Config<'_>, model_type: &str) -> String {
    let listed = config
        .get("architectures")
        .and_then(|listed| listed.get(0)?.as_str());
    let made = || {
        let (first, rest) = model_type.split_at(1);
        format!("{}{rest}ForCausalLM", first.to_uppercase())
    };
    listed.map_or_else(made, str::to_string)
}
