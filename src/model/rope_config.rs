//! The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and
//! `rope_scaling` (transformers 4).

use serde_json::{Map, Value};

use super::config::{Config, Range};
use crate::error::{Error, Kind, Result};
use crate::ops::{QueryScaling, Rope, RopeScaling};

/// What a table is read for: heads of `head_dim` channels in a model of at most `max_position`
/// positions.
#[derive(Clone, Copy)]
pub(super) struct RopeShape {
    pub(super) head_dim: usize,
    pub(super) max_position: usize,
    /// Whether `su` and `yarn` mean `longrope`, and there are no other kinds (Phi-3).
    pub(super) longrope_alone: bool,
    /// As [`Rope::interleaved`].
    pub(super) interleaved: bool,
    /// Whether `alpha` of `dynamic` scales the base, at any length (Hunyuan).
    pub(super) scales_base_by_alpha: bool,
}

/// Reads the one rotary embedding of a model. As in transformers, `rope_scaling` replaces
/// `rope_parameters` unless it is empty, and a table's `rope_theta` precedes the top level's.
pub(super) fn rope(config: &Config<'_>, shape: RopeShape) -> Result<Rope> {
    read_table(config, table(config)?.as_ref(), shape)
}

fn table<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>> {
    let scaling = config.object("rope_scaling")?;
    match scaling.filter(|table| !table.object.is_empty()) {
        Some(table) => Ok(Some(table)),
        None => config.object("rope_parameters"),
    }
}

/// Reads the factor of queries by position (Ministral 3), which stands in the table.
pub(super) fn query_scaling(config: &Config<'_>) -> Result<QueryScaling> {
    let table = table(config)?.ok_or_else(|| config.wrong("rope_parameters", "an object"))?;
    let original = table.required_size("original_max_position_embeddings")?;
    let beta = table.required_number("llama_4_scaling_beta", Range::NON_NEGATIVE)?;
    Ok(QueryScaling { beta, original })
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
        let table = Config {
            object,
            defaults: None,
            key_names: &[],
        };
        read_table(config, Some(&table), shape)
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
    let rotary_dim = rotary_dim(config, table, shape.head_dim)?;
    let theta = match table
        .map(|table| alpha(table, shape))
        .transpose()?
        .flatten()
    {
        Some(alpha) => theta * alpha.powf(rotary_dim as f64 / (rotary_dim as f64 - 2.0)),
        None => theta,
    };
    let scaling = match table {
        Some(table) => rope_scaling(config, table, shape, rotary_dim)?,
        None => RopeScaling::None,
    };
    if theta <= 1.0 && matches!(scaling, RopeScaling::Yarn { .. }) {
        let error = Error::new(Kind::Model, "config.json: YaRN divides by ln(`rope_theta`)");
        return Err(error.value(theta.to_string()).rule("above 1"));
    }
    Ok(Rope {
        head_dim: shape.head_dim,
        rotary_dim,
        interleaved: shape.interleaved,
        theta,
        scaling,
    })
}

/// The channels of a head that rotate: `partial_rotary_factor` of the table, or of the top level,
/// times `head_dim`, rounded down.
fn rotary_dim(config: &Config<'_>, table: Option<&Config<'_>>, head_dim: usize) -> Result<usize> {
    const KEY: &str = "partial_rotary_factor";
    let in_table = table.map(|table| table.number(KEY, Range::POSITIVE));
    let in_table = in_table.transpose()?.flatten();
    if !config.has(KEY) {
        return match (table, in_table) {
            (Some(table), Some(given)) if given != 1.0 => {
                Err(table.wrong(KEY, "1: this model type rotates whole heads"))
            }
            _ => Ok(head_dim),
        };
    }
    let factor = match in_table {
        Some(factor) => factor,
        None => config.required_number(KEY, Range::POSITIVE)?,
    };
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
        let error = Error::new(
            Kind::Model,
            "config.json: `partial_rotary_factor` must leave an even number of channels of a head",
        );
        return Err(error
            .value(format!("{factor} of {head_dim} channels"))
            .rule(format!("an even number from 2 to {head_dim}"))
            .hint("use the config.json that was published with the model"));
    }
    Ok(rotary_dim)
}

fn rope_scaling(
    config: &Config<'_>,
    table: &Config<'_>,
    shape: RopeShape,
    rotary_dim: usize,
) -> Result<RopeScaling> {
    let max_position = shape.max_position;
    let kind = kind(table)?;
    let factor = || table.required_number("factor", Range::POSITIVE);
    // A top-level key precedes the table's.
    let original = || {
        let top = config.size("original_max_position_embeddings")?;
        let inner = table.size("original_max_position_embeddings")?;
        Ok::<usize, Error>(top.or(inner).unwrap_or(max_position))
    };
    if shape.longrope_alone {
        return match kind {
            "default" => Ok(RopeScaling::None),
            "longrope" | "su" | "yarn" => longrope(table, original()?, max_position, rotary_dim),
            _ => Err(table.wrong(kind_key(table), "default or longrope")),
        };
    }
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        // The base is scaled instead.
        "dynamic" if alpha(table, shape)?.is_some() => RopeScaling::None,
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
        "longrope" => longrope(table, original()?, max_position, rotary_dim)?,
        _ => {
            let rule = "default, linear, dynamic, llama3, yarn or longrope";
            return Err(table.wrong(kind_key(table), rule));
        }
    })
}

/// Of a table of the kind `dynamic`: the theta of a head of d rotated channels is multiplied by
/// alpha^(d / (d - 2)), whatever the length of a sequence (Hunyuan). `None` of 0.
///
/// # Errors
/// A model type that does not read it.
fn alpha(table: &Config<'_>, shape: RopeShape) -> Result<Option<f64>> {
    const KEY: &str = "alpha";
    let given = table.number(KEY, Range::ANY)?.filter(|alpha| *alpha != 0.0);
    let Some(alpha) = given else { return Ok(None) };
    if !shape.scales_base_by_alpha || kind(table)? != "dynamic" {
        return Err(table.wrong(KEY, "this model type rotates by plain frequencies"));
    }
    if alpha < 0.0 || shape.head_dim <= 2 {
        return Err(table.wrong(KEY, "a number above 0, of heads of more than 2 channels"));
    }
    Ok(Some(alpha))
}

fn kind<'a>(table: &Config<'a>) -> Result<&'a str> {
    Ok(match table.text("rope_type")? {
        Some(kind) => kind,
        None => table.text("type")?.unwrap_or("default"),
    })
}

/// The key that names the kind of a table.
fn kind_key(table: &Config<'_>) -> &'static str {
    if table.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    }
}

/// LongRoPE (Ding et al. 2024), whose factors go by the length of each sequence: an adapter trained on
/// records of at most `original` tokens has seen the short ones alone.
///
/// The attention factor is sqrt(1 + ln(factor) / ln(original)) unless
/// the table gives it.
fn longrope(
    table: &Config<'_>,
    original: usize,
    max_position: usize,
    rotary_dim: usize,
) -> Result<RopeScaling> {
    let divisors = |key: &str| {
        let count = rotary_dim / 2;
        let rule = format!("a list of {count} numbers above 0, one for each pair of channels");
        let positive = |value: &Value| value.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        let list = |value: &Value| {
            let list: Option<Vec<f64>> = value.as_array()?.iter().map(positive).collect();
            list.filter(|list| list.len() == count)
        };
        let read = table.read(key, &rule, list)?;
        read.ok_or_else(|| table.wrong(key, &rule))
    };
    let factor = table.number("factor", Range::POSITIVE)?;
    let factor = factor.unwrap_or(max_position as f64 / original as f64);
    let attention_factor = match table.number("attention_factor", Range::NON_NEGATIVE)? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original.max(2) as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short: divisors("short_factor")?,
        long: divisors("long_factor")?,
        attention_factor,
        original,
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
