//! Tensor names and metadata keys of the model families that llama.cpp knows, as a table.
//!
//! Source: `gguf-py/gguf/{constants,tensor_mapping}.py` and `convert_hf_to_gguf.py` of llama.cpp (MIT).

use serde_json::Value as Json;

use super::CONVERT;
use super::container::Value;
use super::quantization::Role;
use crate::error::{Error, Kind, Result};
use crate::model::Architecture;
use crate::ops::{Activation, Rope, RopeScaling};

/// What GGUF writes differently for a family.
#[derive(Debug)]
pub struct Family {
    /// config.json's `model_type`.
    model_type: &'static str,
    /// `general.architecture`.
    arch: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    interleaves_qk: bool,
    /// Whether llama.cpp applies the sliding window of its layers.
    has_window: bool,
    /// The activation of its MLP.
    activation: Activation,
    /// Keys of config.json that are written, with their name after the architecture's.
    extra: &'static [(&'static str, &'static str)],
}

const FAMILIES: &[Family] = &[
    plain("llama", "llama", true),
    plain("mistral", "llama", true),
    plain("qwen2", "qwen2", false),
    plain("qwen3", "qwen3", false),
    plain("smollm3", "smollm3", true),
    plain("olmo2", "olmo2", false),
    with_gelu(plain("gemma", "gemma", false)),
    with_gelu(windowed(
        "gemma2",
        "gemma2",
        &[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
    )),
    with_gelu(windowed("gemma3_text", "gemma3", &[])),
    Family {
        extra: &[
            ("attention_multiplier", "attention.scale"),
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("logits_scaling", "logit_scale"),
        ],
        ..plain("granite", "granite", true)
    },
];

const fn plain(model_type: &'static str, arch: &'static str, interleaves_qk: bool) -> Family {
    Family {
        model_type,
        arch,
        interleaves_qk,
        has_window: false,
        activation: Activation::Silu,
        extra: &[],
    }
}

const fn windowed(
    model_type: &'static str,
    arch: &'static str,
    extra: &'static [(&'static str, &'static str)],
) -> Family {
    Family {
        has_window: true,
        extra,
        ..plain(model_type, arch, false)
    }
}

const fn with_gelu(family: Family) -> Family {
    Family {
        activation: Activation::GeluTanh,
        ..family
    }
}

/// Names of a block's tensors. A norm on the result of attention has a name of its own.
const BLOCK: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("pre_feedforward_layernorm", "ffn_norm"),
];

/// The family of a model.
///
/// # Errors
/// [`Kind::Model`] for a family that cannot be exported.
pub fn family(architecture: &Architecture) -> Result<&'static Family> {
    let refused = |what: &str| {
        Error::new(Kind::Model, format!("{what} cannot be written as GGUF")).hint(CONVERT)
    };
    let mut families = FAMILIES.iter();
    let found = families.find(|family| family.model_type == architecture.model_type);
    let Some(family) = found else {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
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
        let (module, part) = name.rsplit_once('.')?;
        let names = &architecture.names;
        let output = (format!("output.{part}"), Role::Output);
        if module == names.lm_head {
            return Some(output);
        }
        if module == names.embed_tokens_path() {
            let (_, output) = output;
            let role = if architecture.tie_word_embeddings {
                output
            } else {
                Role::Other
            };
            return Some((format!("token_embd.{part}"), role));
        }
        if Some(module) == names.norm_path().as_deref() {
            return Some((format!("output_norm.{part}"), Role::Other));
        }
        let layer = names.layer_of(module)?;
        let inner = module
            .strip_prefix(&names.block_path(layer))?
            .strip_prefix('.')?;
        let on_result = architecture.attention_norms.output == Some(inner);
        let gguf = if on_result {
            "post_attention_norm"
        } else {
            BLOCK.iter().find(|(own, _)| *own == inner)?.1
        };
        let role = match gguf {
            "attn_v" | "ffn_down" => Role::Sensitive {
                layer,
                layers: architecture.num_hidden_layers,
            },
            _ => Role::Other,
        };
        Some((format!("blk.{layer}.{gguf}.{part}"), role))
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
        let attention = architecture.attention;
        let heads = match name {
            _ if !self.interleaves_qk => return values,
            _ if name.contains(".q_proj.") => attention.heads,
            _ if name.contains(".k_proj.") => attention.kv_heads,
            _ => return values,
        };
        interleave_halves(&values, heads, attention.head_dim)
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
