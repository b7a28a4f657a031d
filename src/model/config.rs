//! Reading config.json field by field, with errors that name the key, the value and the rule.

use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};
use crate::ops::RopeScaling;

/// A JSON object of a configuration.
pub(super) struct Config<'a>(pub(super) &'a Map<String, Value>);

impl Config<'_> {
    /// The value of `key`; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// A positive integer.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let size = |value: &Value| {
            let size = value.as_u64().filter(|n| *n > 0 && *n < 1 << 32)?;
            Some(size as usize)
        };
        self.read(key, "a whole number of at least one", size)
    }

    /// The value of `key` as `convert` reads it; `rule` is for the error.
    fn read<T>(
        &self,
        key: &str,
        rule: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key)
            .map(|value| convert(value).ok_or_else(|| wrong(key, value, rule)))
            .transpose()
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| missing(key))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| missing(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// The rope table: `rope_parameters` (transformers 5) or `rope_scaling`, if there is one.
    pub(super) fn rope_table(&self) -> Option<Config<'_>> {
        self.get("rope_parameters")
            .or_else(|| self.get("rope_scaling"))
            .and_then(Value::as_object)
            .map(Config)
    }
}

fn wrong(key: &str, value: &Value, rule: &str) -> Error {
    Error::new(
        Kind::Model,
        format!("config.json: `{key}` is not what it must be"),
    )
    .value(value.to_string())
    .rule(rule)
}

fn missing(key: &str) -> Error {
    Error::new(Kind::Model, format!("config.json: `{key}` is missing"))
        .hint("use the config.json that was published with the model")
}

/// Reads a rope table; `max_position` is the model's limit.
pub(super) fn rope_scaling(table: &Config<'_>, max_position: usize) -> Result<RopeScaling> {
    let kind = table
        .text("rope_type")
        .or_else(|| table.text("type"))
        .unwrap_or("default");
    let original = table
        .size("original_max_position_embeddings")?
        .unwrap_or(max_position);
    let number = |key: &str, default: f64| Ok::<f64, Error>(table.number(key)?.unwrap_or(default));
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: table.required_number("factor")?,
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: table.required_number("factor")?,
            original,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: table.required_number("factor")?,
            low: table.required_number("low_freq_factor")?,
            high: table.required_number("high_freq_factor")?,
            original,
        },
        "yarn" => RopeScaling::Yarn {
            factor: table.required_number("factor")?,
            beta_fast: number("beta_fast", 32.0)?,
            beta_slow: number("beta_slow", 1.0)?,
            attention_factor: yarn_attention_factor(table)?,
            original,
            truncate: table.flag("truncate")?.unwrap_or(true),
        },
        other => {
            return Err(Error::new(
                Kind::Model,
                "config.json: this kind of rope scaling is not supported",
            )
            .value(other)
            .rule("default, linear, dynamic, llama3 or yarn"));
        }
    })
}

/// YaRN's factor on cos and sin: given, or 0.1 mscale ln(factor) + 1 (Peng et al. 2023, equation
/// 22), or the ratio of two such factors.
fn yarn_attention_factor(table: &Config<'_>) -> Result<f64> {
    if let Some(given) = table.number("attention_factor")? {
        return Ok(given);
    }
    let factor = table.required_number("factor")?;
    let attention_factor = |mscale: f64| 0.1 * mscale * factor.max(1.0).ln() + 1.0;
    let mscale = table.number("mscale")?.filter(|mscale| *mscale != 0.0);
    let all_dim = table
        .number("mscale_all_dim")?
        .filter(|mscale| *mscale != 0.0);
    Ok(match (mscale, all_dim) {
        (Some(mscale), Some(all_dim)) => attention_factor(mscale) / attention_factor(all_dim),
        _ => attention_factor(1.0),
    })
}
