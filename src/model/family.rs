//! config.json -> [`Architecture`], for every supported `model_type`.
//!
//! Class defaults and the keys of each type are data (`class_defaults.json`); what a type adds or
//! reads differently stands here.

use std::path::Path;

use serde_json::Value;

use super::architecture::{Architecture, Biases, LayerKind};
use super::config::{Config, Range};
use super::rope_config::rope;
use crate::error::{Error, Kind, Result};
use crate::ops::Attention;

/// Most parameters, blocks and columns of q: far beyond any published model, and small enough that the work of a
/// step stays within 64 bits.
const MAX_PARAMETERS: u64 = 1 << 44;
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 24;

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

    /// Reads a parsed config.json, as transformers' class of its `model_type` does.
    ///
    /// # Errors
    /// A value that the model type cannot have or that nothing here implements, by its key.
    pub fn from_config(value: &Value) -> Result<Self> {
        let object = value
            .as_object()
            .ok_or_else(|| Error::new(Kind::Model, "config.json is not a JSON object"))?;
        let (config, model_type) = Config::new(object)?;
        check_activation(&config)?;
        let hidden_size = config.required_size("hidden_size")?;
        let attention = attention(&config, hidden_size)?;
        let max_position_embeddings = config.required_size("max_position_embeddings")?;
        let layers = layers(&config, model_type)?;
        let architecture = Self {
            class: class(&config, model_type),
            model_type: model_type.to_string(),
            hidden_size,
            intermediate_size: config.required_size("intermediate_size")?,
            num_hidden_layers: layers.len(),
            attention,
            layers,
            qk_norm: model_type == "qwen3",
            vocab_size: config.required_size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: config.required_number("rms_norm_eps", Range::NON_NEGATIVE)?,
            rope: rope(&config, attention.head_dim, max_position_embeddings)?,
            tie_word_embeddings: config.flag("tie_word_embeddings")?,
            biases: biases(&config, model_type)?,
            initializer_range: config.required_number("initializer_range", Range::NON_NEGATIVE)?,
            stored_in_bf16: stored_in_bf16(&config)?,
            dropout: dropout(&config)?,
        };
        // Sizes are bounded one by one, so that the sum cannot overflow.
        if architecture.parameters() > MAX_PARAMETERS {
            return Err(
                Error::new(Kind::Model, "config.json: these sizes are beyond any model")
                    .value(format!("{} parameters", architecture.parameters()))
                    .rule(format!("at most {MAX_PARAMETERS}"))
                    .hint(
                        "correct the sizes: the file is damaged, or was not published with a model",
                    ),
            );
        }
        Ok(architecture)
    }
}

fn check_activation(config: &Config<'_>) -> Result<()> {
    match config.text("hidden_act")? {
        Some("silu" | "swish") => Ok(()),
        _ => Err(config.wrong("hidden_act", "silu: no other activation is supported")),
    }
}

fn attention(config: &Config<'_>, hidden_size: usize) -> Result<Attention> {
    let heads = config.required_size("num_attention_heads")?;
    let kv_heads = config.size("num_key_value_heads")?.unwrap_or(heads);
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
        window: None,
    })
}

/// The blocks. The window is on the layers that `layer_types` names, else on those from
/// `max_window_layers` on, else, for a type without these keys (Mistral), on all.
fn layers(config: &Config<'_>, model_type: &str) -> Result<Vec<LayerKind>> {
    let count = config.required_size("num_hidden_layers")?;
    if count > MAX_LAYERS {
        let rule = format!("a whole number from 1 to {MAX_LAYERS}");
        return Err(config.wrong("num_hidden_layers", &rule));
    }
    let by_flag = config.has("use_sliding_window");
    let window =
        if config.has("sliding_window") && (!by_flag || config.flag("use_sliding_window")?) {
            config.size("sliding_window")?
        } else {
            None
        };
    let types = config.read("layer_types", "a list", Value::as_array)?;
    if types.is_some_and(|types| types.len() != count) {
        return Err(config.wrong("layer_types", "one entry for each of `num_hidden_layers`"));
    }
    let first = if by_flag {
        let whole = |value: &Value| Some(value.as_u64()?.min(MAX_LAYERS as u64) as usize);
        config
            .read("max_window_layers", "a whole number", whole)?
            .unwrap_or(count)
    } else {
        0
    };
    let is_sliding = |layer: usize| match types {
        None => Ok(layer >= first),
        Some(types) => match types[layer].as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let rule = format!("full_attention or sliding_attention in a {model_type} model");
                Err(config.wrong("layer_types", &rule))
            }
        },
    };
    let kind = |layer| {
        Ok(LayerKind {
            window: if is_sliding(layer)? { window } else { None },
        })
    };
    (0..count).map(kind).collect()
}

fn biases(config: &Config<'_>, model_type: &str) -> Result<Biases> {
    let attention = config.flag("attention_bias")?;
    Ok(Biases {
        qkv: attention || model_type == "qwen2",
        o: attention,
        mlp: config.flag("mlp_bias")?,
    })
}

/// `dtype` (transformers 5), else `torch_dtype`.
fn stored_in_bf16(config: &Config<'_>) -> Result<bool> {
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

fn dropout(config: &Config<'_>) -> Result<Option<(&'static str, f64)>> {
    let key = "attention_dropout";
    let p = config.number(key, Range::NON_NEGATIVE)?;
    Ok(p.filter(|p| *p > 0.0).map(|p| (key, p)))
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
