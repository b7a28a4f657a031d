//! Values and metadata of the model families that llama.cpp knows, on the way to GGUF.
//!
//! Source: `gguf-py/gguf/{constants,tensor_mapping}.py` and `convert_hf_to_gguf.py` of llama.cpp (MIT).

use serde_json::Value as Json;

use super::CONVERT;
use super::container::Value;
use super::quantization::Role;
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, Family};
use crate::ops::{Activation, Rope, RopeScaling};

/// The family of a model.
///
/// # Errors
/// [`Kind::Model`] for a family that cannot be exported.
pub fn family(architecture: &Architecture) -> Result<&'static Family> {
    let refused = |what: &str| {
        Error::new(Kind::Model, format!("{what} cannot be written as GGUF")).hint(CONVERT)
    };
    let Some(family) = Family::of(&architecture.model_type) else {
        let known: Vec<&str> = Family::all().map(|family| family.model_type).collect();
        let rule = format!("one of {}", known.join(", "));
        return Err(refused("this model type")
            .value(&architecture.model_type)
            .rule(rule));
    };
    if architecture.activation != family.activation {
        return Err(refused("a model with another activation than its family's")
            .value(format!("{:?}", architecture.activation))
            .rule(format!("`hidden_act` is {:?}", family.activation)));
    }
    // llama.cpp takes another scale for Gemma 2 and 3 27B alone, which it knows by their blocks.
    let head_dim = architecture.attention.head_dim as f64;
    let scale = architecture.attention.scale;
    let is_27b = matches!(architecture.num_hidden_layers, 46 | 62);
    let is_default = scale.is_none_or(|scale| (scale * head_dim.sqrt() - 1.0).abs() < 1e-6);
    if family.activation == Activation::GeluTanh && !is_27b && !is_default {
        return Err(refused("a Gemma model with another attention scale")
            .rule("`query_pre_attn_scalar` is `head_dim`"));
    }
    Ok(family)
}

impl Family {
    /// GGUF's name of the tensor `name`, and what the tensor is for.
    pub fn tensor(&self, name: &str, architecture: &Architecture) -> Option<(String, Role)> {
        let stored = self.tensor_name(name, architecture)?;
        let mut parts = stored.split('.');
        let role = match (parts.next()?, parts.nth(1)) {
            ("output", _) => Role::Output,
            ("token_embd", _) if architecture.tie_word_embeddings => Role::Output,
            ("blk", Some("attn_v" | "ffn_down")) => Role::Sensitive {
                layer: architecture.names.layer_of(name.rsplit_once('.')?.0)?,
                layers: architecture.num_hidden_layers,
            },
            _ => Role::Other,
        };
        Some((stored, role))
    }

    /// The values of the tensor `name` as GGUF holds them: the weight of a norm with its offset of 1, the rows of q and k in
    /// their order.
    pub fn convert(
        &self,
        name: &str,
        mut values: Vec<f32>,
        architecture: &Architecture,
    ) -> Vec<f32> {
        if architecture.norm_unit_offset && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|weight| *weight += 1.0);
        }
        match self.interleaved_heads(name, architecture) {
            Some(heads) => interleave_halves(&values, heads, architecture.attention.head_dim),
            None => values,
        }
    }

    /// The architecture's metadata, with the scaling of its rotary embedding.
    ///
    /// # Errors
    /// [`Kind::Model`] for a rotary embedding or a config.json value that GGUF cannot hold.
    pub fn metadata(
        &self,
        architecture: &Architecture,
        config: &Json,
    ) -> Result<Vec<(String, Value)>> {
        let attention = architecture.attention;
        let rope = global_rope(architecture);
        let size = |value: usize| {
            u32::try_from(value).map(Value::U32).map_err(|_| {
                Error::new(Kind::Model, "a size is too large for GGUF").value(value.to_string())
            })
        };
        let mut own = vec![
            ("block_count", size(architecture.num_hidden_layers)?),
            (
                "context_length",
                size(architecture.max_position_embeddings)?,
            ),
            ("embedding_length", size(architecture.hidden_size)?),
            ("feed_forward_length", size(architecture.intermediate_size)?),
            ("vocab_size", size(architecture.vocab_size)?),
            ("attention.head_count", size(attention.heads)?),
            ("attention.head_count_kv", size(attention.kv_heads)?),
            ("attention.key_length", size(attention.head_dim)?),
            ("attention.value_length", size(attention.head_dim)?),
            (
                "attention.layer_norm_rms_epsilon",
                Value::F32(architecture.norm_eps as f32),
            ),
        ];
        if let Some(rope) = rope {
            own.push(("rope.dimension_count", size(rope.rotary_dim)?));
            own.push(("rope.freq_base", Value::F32(rope.theta as f32)));
            own.extend(rope_scaling(&rope.scaling)?);
        }
        let window = architecture.layers.iter().find_map(|layer| layer.window);
        if let Some(window) = window.filter(|_| self.has_window) {
            own.push(("attention.sliding_window", size(window)?));
        }
        for (key, name) in self.extra {
            if let Some(value) = config.get(key).and_then(Json::as_f64) {
                own.push((name, Value::F32(value as f32)));
            }
        }
        let mut all = vec![("general.architecture".into(), Value::Text(self.arch.into()))];
        all.extend(
            own.into_iter()
                .map(|(key, value)| (format!("{}.{key}", self.arch), value)),
        );
        Ok(all)
    }

    /// The divisors of the rotary frequencies, (rotary_dim / 2): the tensor `rope_freqs.weight` of Llama 3.
    pub fn rope_divisors(&self, architecture: &Architecture) -> Option<Vec<f32>> {
        let rope = global_rope(architecture)?;
        matches!(rope.scaling, RopeScaling::Llama3 { .. }).then(|| rope.frequency_divisors())
    }

    /// What llama.cpp computes otherwise.
    pub fn warning(&self, architecture: &Architecture) -> Option<String> {
        let window = architecture.layers.iter().find_map(|layer| layer.window)?;
        (!self.has_window).then(|| {
            format!("llama.cpp ignores the sliding window of this model: texts of more than {window} tokens are attended to in full")
        })
    }
}

/// The rotary embedding of layers without a window; those with one have a base that llama.cpp knows.
fn global_rope(architecture: &Architecture) -> Option<&Rope> {
    let mut layers = architecture.layers.iter();
    let global = layers.find_map(|layer| layer.rope.filter(|_| layer.window.is_none()));
    architecture.ropes.get(global.unwrap_or(0))
}

/// (heads, 2, head_dim / 2) -> (heads, head_dim / 2, 2), by rows.
fn interleave_halves(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                let row = head * head_dim + half * head_dim / 2 + pair;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn rope_scaling(scaling: &RopeScaling) -> Result<Vec<(&'static str, Value)>> {
    let kind = |name: &str| ("rope.scaling.type", Value::Text(name.into()));
    let factor = |factor: f64| ("rope.scaling.factor", Value::F32(factor as f32));
    Ok(match scaling {
        // Llama 3's is a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } => Vec::new(),
        RopeScaling::Linear { factor: by } => vec![kind("linear"), factor(*by)],
        RopeScaling::Yarn {
            factor: by,
            original,
            ..
        } => vec![
            kind("yarn"),
            factor(*by),
            (
                "rope.scaling.original_context_length",
                Value::U32(*original as u32),
            ),
        ],
        RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. } => {
            return Err(Error::new(
                Kind::Model,
                "this scaling of the rotary embedding cannot be written as GGUF",
            )
            .rule("none, linear, llama3 or yarn")
            .hint(CONVERT));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_interleaved() {
        // Two heads of four rows, one column: rows 0 1 | 2 3 become 0 2 1 3.
        let rows: Vec<f32> = (0..8).map(|row| row as f32).collect();
        assert_eq!(
            interleave_halves(&rows, 2, 4),
            [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
        );
    }
}
