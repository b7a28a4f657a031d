//! Every key of PEFT's LoraConfig and its meaning for an adapter that is loaded.
//!
//! One row a key: name, PEFT's default (peft 0.21.2, `tuners/lora/config.py`), and its use here. A file's value is read, without
//! effect, ignored with a warning, or refused with the reason. Knows nothing of the types of the keys that are read.

use serde_json::{Map, Value};

use super::config::PEFT_VERSION;
use crate::text::nearest;

/// One key of LoraConfig.
pub(super) struct PeftKey {
    /// Name in the file.
    pub name: &'static str,
    /// PEFT's default as JSON; empty for keys that [`super::PeftConfig`] reads into a field.
    default: &'static str,
    usage: Usage,
}

/// The use of a key that has no field.
enum Usage {
    /// A field of `PeftConfig`.
    Field,
    /// Neither the tensors nor the computation depend on it.
    NoEffect,
    /// PEFT's own reading of a trained adapter ignores it, which is said with the reason.
    Ignored(&'static str),
    /// It changes the computation: refused if Python takes the value for true.
    Refused(&'static str),
    /// As `Refused`, for keys whose presence counts: `{}` is a value.
    RefusedUnlessNull(&'static str),
}

use Usage::{Field, Ignored, NoEffect, Refused, RefusedUnlessNull};

const fn key(name: &'static str, default: &'static str, usage: Usage) -> PeftKey {
    PeftKey {
        name,
        default,
        usage,
    }
}

/// The keys, sorted by name.
#[rustfmt::skip]
const KEYS: [PeftKey; 41] = [
    key("alora_invocation_tokens", "null", Refused("activated LoRA acts on some tokens only")),
    key("alpha_pattern", "", Field),
    key("arrow_config", "null", RefusedUnlessNull("Arrow routes between several adapters")),
    key("auto_mapping", "null", NoEffect),
    key("base_model_name_or_path", "", Field),
    key("bias", "", Field),
    key("corda_config", "null", Ignored("it concerns the initial values, which training has replaced")),
    key("ensure_weight_tying", "", Field),
    key("eva_config", "null", Ignored("it concerns the initial values, which training has replaced")),
    key("exclude_modules", "", Field),
    key("fan_in_fan_out", "false", Ignored("the orientation of a weight follows from its layer")),
    key("inference_mode", "true", NoEffect),
    key("init_lora_weights", "", Field),
    key("kasa_config", "null", RefusedUnlessNull("KaSA truncates the base weights")),
    key("layer_replication", "null", Refused("the model would have more layers than its files")),
    key("layers_pattern", "", Field),
    key("layers_to_transform", "", Field),
    key("loftq_config", "{}", Ignored("it concerns the initial values, which training has replaced")),
    key("lora_alpha", "", Field),
    key("lora_bias", "", Field),
    key("lora_dropout", "", Field),
    key("lora_ga_config", "null", Ignored("it concerns the initial values, which training has replaced")),
    key("megatron_config", "null", Refused("Megatron's parallel layers are not supported")),
    key("megatron_core", "\"megatron.core\"", NoEffect),
    key("modules_to_save", "", Field),
    key("monteclora_config", "null", RefusedUnlessNull("variational LoRA is not supported")),
    key("peft_type", "", Field),
    key("peft_version", "", Field),
    key("qalora_group_size", "16", NoEffect),
    key("r", "", Field),
    key("rank_pattern", "", Field),
    key("revision", "", Field),
    key("target_modules", "", Field),
    key("target_parameters", "null", Refused("LoRA on bare parameters (experts) is not supported")),
    key("task_type", "", Field),
    key("trainable_token_indices", "", Field),
    key("use_bdlora", "null", RefusedUnlessNull("block-diagonal LoRA is not supported")),
    key("use_dora", "", Field),
    key("use_qalora", "false", Refused("QALoRA pools the input, which is not plain LoRA")),
    key("use_rslora", "", Field),
    key("velora_config", "null", RefusedUnlessNull("VeLoRA compresses activations for the backward pass")),
];

/// PEFT's defaults of the keys that have no field.
pub(super) fn defaults() -> Map<String, Value> {
    let parsed = KEYS.iter().filter_map(|key| {
        let default = serde_json::from_str(key.default).ok()?;
        Some((key.name.to_string(), default))
    });
    parsed.collect()
}

/// One sentence for each refused value among `values`.
pub(super) fn refused(values: &Map<String, Value>) -> Vec<String> {
    let sentence = |key: &PeftKey, why: &str, counts: fn(&Value) -> bool| {
        let value = values.get(key.name).filter(|value| counts(value))?;
        Some(format!("`{}` is {value}: {why}", key.name))
    };
    let reasons = KEYS.iter().filter_map(|key| match key.usage {
        Refused(why) => sentence(key, why, is_truthy),
        RefusedUnlessNull(why) => sentence(key, why, |value| {
            !matches!(value, Value::Null | Value::Bool(false))
        }),
        Field | NoEffect | Ignored(_) => None,
    });
    reasons.collect()
}

/// One sentence for each ignored value among `values` that is not the default.
pub(super) fn ignored(values: &Map<String, Value>) -> Vec<String> {
    let sentences = KEYS.iter().filter_map(|key| {
        let Ignored(why) = key.usage else {
            return None;
        };
        let value = values.get(key.name).filter(|value| is_truthy(value))?;
        Some(format!(
            "`{}` = {value} of the adapter is ignored: {why}",
            key.name
        ))
    });
    sentences.collect()
}

/// One sentence for a key that LoraConfig does not have, as PEFT warns of it.
pub(super) fn unknown(name: &str) -> String {
    let names = KEYS.iter().map(|key| key.name);
    let meant = match nearest(name, names, 0.8) {
        Some(meant) => format!("; did you mean `{meant}`?"),
        None => String::new(),
    };
    format!("`{name}` of the adapter is ignored: PEFT {PEFT_VERSION} has no such key{meant}")
}

/// Python's truth of a JSON value.
pub(super) fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
    }
}
