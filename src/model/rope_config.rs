//! The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and
//! `rope_scaling` (transformers 4).

use super::config::{Config, Range};
use crate::error::{Error, Kind, Result};
use crate::ops::{Rope, RopeScaling};

/// Reads the rotary embedding for heads of `head_dim` channels; `max_position` is the model's
/// limit. As in transformers, `rope_scaling` replaces `rope_parameters` unless it is empty, and a
/// table's `rope_theta` precedes the top level's.
pub(super) fn rope(config: &Config<'_>, head_dim: usize, max_position: usize) -> Result<Rope> {
    let scaling = config.object("rope_scaling")?;
    let table = scaling.filter(|table| !table.object.is_empty());
    let table = match table {
        Some(table) => Some(table),
        None => config.object("rope_parameters")?,
    };
    let in_table = table
        .as_ref()
        .map(|table| table.number("rope_theta", Range::POSITIVE))
        .transpose()?
        .flatten();
    let theta = match in_table {
        Some(theta) => theta,
        None => config.required_number("rope_theta", Range::POSITIVE)?,
    };
    let scaling = match table {
        Some(table) => rope_scaling(config, &table, max_position)?,
        None => RopeScaling::None,
    };
    if theta <= 1.0 && matches!(scaling, RopeScaling::Yarn { .. }) {
        let error = Error::new(Kind::Model, "config.json: YaRN divides by ln(`rope_theta`)");
        return Err(error.value(theta.to_string()).rule("above 1"));
    }
    Ok(Rope {
        head_dim,
        theta,
        scaling,
    })
}

fn rope_scaling(
    config: &Config<'_>,
    table: &Config<'_>,
    max_position: usize,
) -> Result<RopeScaling> {
    for (key, neutral) in [("partial_rotary_factor", 1.0), ("alpha", 0.0)] {
        let given = table.number(key, Range::ANY)?.unwrap_or(neutral);
        if given != neutral {
            return Err(table.wrong(
                key,
                "this model type rotates whole heads by plain frequencies",
            ));
        }
    }
    let kind = match table.text("rope_type")? {
        Some(kind) => kind,
        None => table.text("type")?.unwrap_or("default"),
    };
    let factor = || table.required_number("factor", Range::POSITIVE);
    // A top-level key precedes the table's.
    let original = || {
        let top = config.size("original_max_position_embeddings")?;
        let inner = table.size("original_max_position_embeddings")?;
        Ok::<usize, Error>(top.or(inner).unwrap_or(max_position))
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic {
            factor: factor()?,
            original: max_position,
        },
        "llama3" => {
            let low = table.required_number("low_freq_factor", Range::POSITIVE)?;
            let high = table.required_number("high_freq_factor", Range::POSITIVE)?;
            if high <= low {
                return Err(table.wrong("high_freq_factor", "above `low_freq_factor`"));
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low,
                high,
                original: original()?,
            }
        }
        "yarn" => yarn(table, original()?, max_position)?,
        _ => {
            let key = if table.get("rope_type").is_some() {
                "rope_type"
            } else {
                "type"
            };
            return Err(table.wrong(key, "default, linear, dynamic, llama3 or yarn"));
        }
    })
}

fn yarn(table: &Config<'_>, original: usize, max_position: usize) -> Result<RopeScaling> {
    // Zero counts as absent.
    let beta = |key: &str, default: f64| {
        let given = table.number(key, Range::NON_NEGATIVE)?;
        Ok::<f64, Error>(given.filter(|beta| *beta > 0.0).unwrap_or(default))
    };
    let given = table.number("factor", Range::POSITIVE)?;
    if given.is_none() && !table.object.contains_key("factor") {
        return Err(table.wrong("factor", "a number above 0"));
    }
    let factor = given.unwrap_or(max_position as f64 / original as f64);
    let attention_factor = match table.number("attention_factor", Range::NON_NEGATIVE)? {
        Some(given) => given,
        None => yarn_attention_factor(table, factor)?,
    };
    let truncate = table.read("truncate", "true or false", serde_json::Value::as_bool)?;
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: beta("beta_fast", 32.0)?,
        beta_slow: beta("beta_slow", 1.0)?,
        attention_factor,
        original,
        truncate: truncate.unwrap_or(true),
    })
}

/// YaRN's factor on cos and sin: 0.1 mscale ln(factor) + 1 (Peng et al. 2023, equation 22), or the
/// ratio of two such factors.
fn yarn_attention_factor(table: &Config<'_>, factor: f64) -> Result<f64> {
    let attention_factor = |mscale: f64| 0.1 * mscale * factor.max(1.0).ln() + 1.0;
    let mscale = |key: &str| {
        let mscale = table.number(key, Range::NON_NEGATIVE)?;
        Ok::<Option<f64>, Error>(mscale.filter(|mscale| *mscale > 0.0))
    };
    Ok(match (mscale("mscale")?, mscale("mscale_all_dim")?) {
        (Some(mscale), Some(all_dim)) => attention_factor(mscale) / attention_factor(all_dim),
        _ => attention_factor(1.0),
    })
}
