//! Reading config.json field by field, with errors that name the key, the value and the rule.
//!
//! Takes the parsed file; returns values checked for type and range. An absent key has the default
//! of transformers' class for the model type (`class_defaults.json`); null stands for itself. A key
//! that the model type does not have, set to a value that changes the result in another, is an
//! error.

use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};

/// The declared defaults of transformers' configuration classes by model type, for the keys that
/// are read; written by scripts/config_reference.py.
static CLASS_DEFAULTS: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("class_defaults.json")).expect("the embedded table is JSON")
});

/// Composite models whose text decoder is supported, and its type where it is not stated.
const COMPOSITES: [(&str, &str); 3] = [
    ("gemma3", "gemma3_text"),
    ("mistral3", "mistral"),
    ("ministral3", "ministral3"),
];

/// Keys of a composite model's configuration that hold for its text decoder.
const OUTER_KEYS: [&str; 4] = [
    "architectures",
    "dtype",
    "torch_dtype",
    "quantization_config",
];

/// The configuration of the text decoder in a composite model's; `None` for other models.
pub(super) fn text_config(object: &Map<String, Value>) -> Option<Map<String, Value>> {
    let outer = object.get("model_type")?.as_str()?;
    let (_, model_type) = COMPOSITES.iter().find(|(name, _)| *name == outer)?;
    let mut text = object.get("text_config")?.as_object()?.clone();
    text.entry("model_type").or_insert((*model_type).into());
    for key in OUTER_KEYS {
        if let Some(value) = object.get(key) {
            text.insert(key.into(), value.clone());
        }
    }
    // The composite class ties by its own key alone.
    let tied = object.get("tie_word_embeddings");
    text.insert(
        "tie_word_embeddings".into(),
        tied.cloned().unwrap_or(true.into()),
    );
    Some(text)
}

/// Largest size of one dimension: far beyond any published model, and small enough that the
/// products of two sizes and of a micro-batch stay within 64 bits.
const MAX_SIZE: usize = 1 << 24;

/// A JSON object of a configuration, and the defaults of its absent keys.
pub(super) struct Config<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) defaults: Option<&'a Map<String, Value>>,
    /// Keys of other names in this model type: the common name and its own.
    pub(super) key_names: &'static [[&'static str; 2]],
}

/// What the class of a model type calls keys that most types have under one name.
const KEY_NAMES: &[(&str, &[[&str; 2]])] = &[
    (
        "gpt_neox",
        &[
            ["rms_norm_eps", "layer_norm_eps"],
            ["rope_theta", "rotary_emb_base"],
            ["partial_rotary_factor", "rotary_pct"],
        ],
    ),
    (
        "distilbert",
        &[
            ["hidden_size", "dim"],
            ["intermediate_size", "hidden_dim"],
            ["num_hidden_layers", "n_layers"],
            ["num_attention_heads", "n_heads"],
            ["hidden_act", "activation"],
        ],
    ),
    ("cohere", &[["rms_norm_eps", "layer_norm_eps"]]),
    ("cohere2", &[["rms_norm_eps", "layer_norm_eps"]]),
    ("stablelm", &[["rms_norm_eps", "layer_norm_eps"]]),
    ("phi", &[["rms_norm_eps", "layer_norm_eps"]]),
    ("starcoder2", &[["rms_norm_eps", "norm_epsilon"]]),
    (
        "gpt2",
        &[
            ["hidden_size", "n_embd"],
            ["intermediate_size", "n_inner"],
            ["num_hidden_layers", "n_layer"],
            ["num_attention_heads", "n_head"],
            ["max_position_embeddings", "n_positions"],
            ["hidden_act", "activation_function"],
            ["rms_norm_eps", "layer_norm_epsilon"],
        ],
    ),
];

/// A range of numbers and how an error states it.
#[derive(Clone, Copy)]
pub(super) struct Range {
    contains: fn(f64) -> bool,
    rule: &'static str,
}

impl Range {
    pub(super) const ANY: Self = Self {
        contains: |_| true,
        rule: "a number",
    };
    pub(super) const POSITIVE: Self = Self {
        contains: |x| x > 0.0,
        rule: "a number above 0",
    };
    pub(super) const NON_NEGATIVE: Self = Self {
        contains: |x| x >= 0.0,
        rule: "a number of at least 0",
    };
}

impl<'a> Config<'a> {
    /// The configuration of a model type that transformers' class defaults are known for.
    ///
    /// # Errors
    /// `model_type` absent or none of these.
    pub(super) fn new(object: &'a Map<String, Value>) -> Result<(Self, &'a str)> {
        let supported = || {
            let composites = COMPOSITES
                .iter()
                .map(|(name, _)| *name)
                .filter(|name| !CLASS_DEFAULTS.contains_key(*name));
            let names = CLASS_DEFAULTS.keys().map(String::as_str);
            let names: Vec<&str> = names.chain(composites).collect();
            format!("one of {}", names.join(", "))
        };
        let Some(model_type) = object.get("model_type").and_then(Value::as_str) else {
            let listed = object.get("architectures").map(Value::to_string);
            let error = Error::new(Kind::Model, "config.json: `model_type` is missing")
                .value(format!("architectures = {}", listed.unwrap_or_default()))
                .rule(supported());
            return Err(error.hint(
                "add the model's type to config.json, for example `\"model_type\": \"llama\"`",
            ));
        };
        let Some(defaults) = CLASS_DEFAULTS.get(model_type).and_then(Value::as_object) else {
            return Err(
                Error::new(Kind::Model, "config.json: this model type is not supported")
                    .value(model_type)
                    .rule(supported())
                    .hint("choose a decoder of one of these types, such as `HuggingFaceTB/SmolLM2-135M`"),
            );
        };
        let named = KEY_NAMES.iter().find(|(name, _)| *name == model_type);
        let config = Self {
            object,
            defaults: Some(defaults),
            key_names: named.map_or(&[], |(_, names)| names),
        };
        config.refuse_foreign_keys(model_type)?;
        Ok((config, model_type))
    }

    /// What the model type calls `key`.
    fn name<'k>(&self, key: &'k str) -> &'k str {
        let named = self.key_names.iter().find(|[common, _]| *common == key);
        named.map_or(key, |[_, name]| name)
    }

    /// The value of `key`, or its class default; `None` for null, and for a key without either.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        let key = self.name(key);
        let default = || self.defaults?.get(key);
        let value = self.object.get(key).or_else(default);
        value.filter(|value| !value.is_null())
    }

    /// Whether the model type has the key.
    pub(super) fn has(&self, key: &str) -> bool {
        let key = self.name(key);
        self.defaults
            .is_some_and(|defaults| defaults.contains_key(key))
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let wrong = || self.wrong(key, "a text");
        value.as_str().map(Some).ok_or_else(wrong)
    }

    /// A positive integer of at most `MAX_SIZE`.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let size = |value: &Value| {
            let size = usize::try_from(value.as_u64()?).ok()?;
            (1..=MAX_SIZE).contains(&size).then_some(size)
        };
        self.read(key, &format!("a whole number from 1 to {MAX_SIZE}"), size)
    }

    /// The value of `key` as `convert` reads it; `rule` is for the error.
    pub(super) fn read<T>(
        &self,
        key: &str,
        rule: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key)
            .map(|value| convert(value).ok_or_else(|| self.wrong(key, rule)))
            .transpose()
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a number"))
    }

    pub(super) fn number(&self, key: &str, range: Range) -> Result<Option<f64>> {
        let number = |value: &Value| {
            let number = value.as_f64()?;
            (number.is_finite() && (range.contains)(number)).then_some(number)
        };
        self.read(key, range.rule, number)
    }

    pub(super) fn required_number(&self, key: &str, range: Range) -> Result<f64> {
        self.number(key, range)?
            .ok_or_else(|| self.wrong(key, range.rule))
    }

    /// A flag; `false` for a key that the model type does not have.
    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        if !self.has(key) {
            return Ok(false);
        }
        self.read(key, "true or false", Value::as_bool)?
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// The object under `key`, without defaults.
    pub(super) fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        let object = self.read(key, "an object, as in {\"rope_type\": ...}", |value| {
            value.as_object()
        })?;
        Ok(object.map(|object| Config {
            object,
            defaults: None,
            key_names: &[],
        }))
    }

    /// The error about the value of `key`.
    pub(super) fn wrong(&self, key: &str, rule: &str) -> Error {
        let key = self.name(key);
        let Some(value) = self.object.get(key) else {
            return Error::new(Kind::Model, format!("config.json: `{key}` is missing"))
                .rule(rule)
                .hint("use the config.json that was published with the model");
        };
        Error::new(
            Kind::Model,
            format!("config.json: `{key}` has a value that the model cannot have"),
        )
        .value(value.to_string())
        .rule(rule)
        .hint("correct config.json, or use the one that was published with the model")
    }

    /// Refuses keys of other model types whose value would change the result there.
    fn refuse_foreign_keys(&self, model_type: &str) -> Result<()> {
        let matters = |(key, neutral): &&(&str, Neutral)| {
            !self.has(key) && self.get(key).is_some_and(|value| !neutral.is(value))
        };
        let unused_window = self.object.get("use_sliding_window") == Some(&Value::Bool(false));
        let found = FOREIGN_KEYS
            .iter()
            .filter(|(key, _)| !(unused_window && *key == "sliding_window"))
            // Hunyuan's class always has these norms.
            .filter(|(key, _)| !(model_type == "hunyuan_v1_dense" && *key == "use_qk_norm"))
            .find(matters);
        let Some((key, _)) = found else { return Ok(()) };
        let rule = match *key {
            "compression_config" => "weights in f32, bf16 or f16".into(),
            "qk_layernorm" | "use_qk_norm" => {
                "false: these norms of q and k are not supported".into()
            }
            _ => format!("a model of type {model_type} has no such setting"),
        };
        Err(self.wrong(key, &rule).hint(match *key {
            "compression_config" => "use the model's original, unquantised repository",
            "qk_layernorm" | "use_qk_norm" => "choose a model whose config.json has it false",
            _ => {
                "transformers would ignore it: remove it from config.json, or correct `model_type`"
            }
        }))
    }
}

/// The values of a key that change nothing.
enum Neutral {
    /// null, false, zero or empty.
    Off,
    /// One.
    One,
    /// A list of this text alone, or of ones.
    Each(&'static str),
}

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Self::Off => match value {
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                Value::Object(object) => object.is_empty(),
                other => other == &Value::Bool(false),
            },
            Self::One => value.as_f64() == Some(1.0),
            Self::Each(text) => value
                .as_array()
                .is_some_and(|list| list.iter().all(|x| x == text || x == 1)),
        }
    }
}

/// Keys that change what some model type of transformers computes.
const FOREIGN_KEYS: &[(&str, Neutral)] = &[
    ("compression_config", Neutral::Off),
    ("partial_rotary_factor", Neutral::One),
    ("rotary_pct", Neutral::One),
    ("sliding_window", Neutral::Off),
    ("use_sliding_window", Neutral::Off),
    ("attention_chunk_size", Neutral::Off),
    ("layer_types", Neutral::Each("full_attention")),
    ("no_rope_layers", Neutral::Each("1")),
    ("attn_logit_softcapping", Neutral::Off),
    ("final_logit_softcapping", Neutral::Off),
    ("query_pre_attn_scalar", Neutral::Off),
    ("llama_4_scaling_beta", Neutral::Off),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("attention_multiplier", Neutral::Off),
    ("logits_scaling", Neutral::One),
    ("logit_scale", Neutral::One),
    ("scale_emb", Neutral::One),
    ("lm_head_bias", Neutral::Off),
    ("clip_qkv", Neutral::Off),
    ("use_qk_norm", Neutral::Off),
    ("qk_layernorm", Neutral::Off),
    ("alibi", Neutral::Off),
    ("use_bidirectional_attention", Neutral::Off),
    ("add_cross_attention", Neutral::Off),
    ("num_experts", Neutral::Off),
    ("num_local_experts", Neutral::Off),
    ("n_routed_experts", Neutral::Off),
    ("num_kv_shared_layers", Neutral::Off),
];
