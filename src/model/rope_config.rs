//! The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and
//! `rope_scaling` (transformers 4).

use serde_json::{Map, Value};

use super::config::{Config, Range};
use crate::error::{Error, Kind, Result};
use crate::ops::{Rope, RopeScaling};

/// What a table is read for: heads of `head_dim` channels in a model of at most `max_position`
/// positions.
#[derive(Clone, Copy)]
pub(super) struct RopeShape {
    pub(super) head_dim: usize,
    pub(super) max_position: usize,
}

/// Reads the one rotary embedding of a model. As in transformers, `rope_scaling` replaces
/// `rope_parameters` unless it is empty, and a table's `rope_theta` precedes the top level's.
pub(super) fn rope(config: &Config<'_>, shape: RopeShape) -> Result<Rope> {
    let scaling = config.object("rope_scaling")?;
    let table = match scaling.filter(|table| !table.object.is_empty()) {
        Some(table) => Some(table),
        None => config.object("rope_parameters")?,
    };
    read_table(config, table.as_ref(), shape)
}

/// Reads the rotary embeddings of full and of sliding attention (OLMo 3, Gemma 3), in this order:
/// `rope_parameters` by type, or the keys of transformers 4, whose `rope_scaling` is for full
/// attention alone.
pub(super) fn ropes_by_layer_type(config: &Config<'_>, shape: RopeShape) -> Result<Vec<Rope>> {
    let tables = config.object("rope_parameters")?;
    let table = |name: &str| {
        let given = tables
            .as_ref()
            .map(|tables| tables.object(name))
            .transpose()?;
        let mut entries = given
            .flatten()
            .map_or_else(Map::new, |table| table.object.clone());
        entries.entry("rope_type").or_insert("default".into());
        Ok::<_, Error>(entries)
    };
    let [mut full, mut sliding] = [table("full_attention")?, table("sliding_attention")?];
    if let Some(scaling) = config.object("rope_scaling")? {
        full.extend(scaling.object.clone());
    }
    let local = "rope_local_base_freq";
    if config.has(local) {
        let theta = config.required_number(local, Range::POSITIVE)?;
        sliding.entry("rope_theta").or_insert(theta.into());
    }
    // transformers 5 reads a top-level theta for full attention alone, transformers 4 for both.
    let given = config.object.get("rope_theta");
    let default = config.defaults.and_then(|keys| keys.get("rope_theta"));
    let differs = given.is_some_and(|given| given.as_f64() != default.and_then(Value::as_f64));
    if differs && !sliding.contains_key("rope_theta") {
        return Err(config.wrong("rope_theta", "one in `rope_parameters` for each layer type"));
    }
    let read = |object| {
        let defaults = None;
        read_table(config, Some(&Config { object, defaults }), shape)
    };
    [full, sliding].iter().map(read).collect()
}

/// Reads a table; where it has no theta, the top level's holds.
fn read_table(config: &Config<'_>, table: Option<&Config<'_>>, shape: RopeShape) -> Result<Rope> {
    let in_table = table.map(|table| table.number("rope_theta", Range::POSITIVE));
    let theta = match in_table.transpose()?.flatten() {
        Some(theta) => theta,
        None => config.required_number("rope_theta", Range::POSITIVE)?,
    };
    let scaling = match table {
        Some(table) => rope_scaling(config, table, shape.max_position)?,
        None => RopeScaling::None,
    };
    if theta <= 1.0 && matches!(scaling, RopeScaling::Yarn { .. }) {
        let error = Error::new(Kind::Model, "config.json: YaRN divides by ln(`rope_theta`)");
        return Err(error.value(theta.to_string()).rule("above 1"));
    }
    Ok(Rope {
        head_dim: shape.head_dim,
        rotary_dim: shape.head_dim,
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
    let truncate = table.read("truncate", "true or false", Value::as_bool)?;
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
