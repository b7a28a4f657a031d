//! GGUF files as weights: names of tensors by family, and the order of their rows.
//!
//! Source: `gguf-py/gguf/{constants,tensor_mapping}.py` and `convert_hf_to_gguf.py` of llama.cpp (MIT). The container is read by
//! candle.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use safetensors::tensor::Dtype;

use super::Architecture;
use super::quantized_files::join_scales;
use super::stored::StoredTensor;
use crate::adapter::shards::{TensorEntry, read_headers};
use crate::error::{Error, Kind, Result};
use crate::ops::{Activation, StoredFormat};

/// The tensor of Llama 3's divisors of rotary frequencies.
pub const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// What GGUF writes differently for a family.
#[derive(Debug)]
pub struct Family {
    /// config.json's `model_type`.
    pub(crate) model_type: &'static str,
    /// `general.architecture`.
    pub(crate) arch: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    pub(crate) interleaves_qk: bool,
    /// Whether llama.cpp applies the sliding window of its layers.
    pub(crate) has_window: bool,
    /// The activation of its MLP.
    pub(crate) activation: Activation,
    /// Keys of config.json that are written, with their name after the architecture's.
    pub(crate) extra: &'static [(&'static str, &'static str)],
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

impl Family {
    /// The family of config.json's `model_type`.
    pub fn of(model_type: &str) -> Option<&'static Self> {
        let mut families = FAMILIES.iter();
        families.find(|family| family.model_type == model_type)
    }

    /// Every family.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        FAMILIES.iter()
    }

    /// GGUF's name of the tensor `name`.
    pub fn tensor_name(&self, name: &str, architecture: &Architecture) -> Option<String> {
        let (module, part) = name.rsplit_once('.')?;
        let names = &architecture.names;
        if module == names.lm_head {
            return Some(format!("output.{part}"));
        }
        if module == names.embed_tokens_path() {
            return Some(format!("token_embd.{part}"));
        }
        if Some(module) == names.norm_path().as_deref() {
            return Some(format!("output_norm.{part}"));
        }
        let layer = names.layer_of(module)?;
        let inner = module
            .strip_prefix(&names.block_path(layer))?
            .strip_prefix('.')?;
        let gguf = if architecture.attention_norms.output == Some(inner) {
            "post_attention_norm"
        } else {
            BLOCK.iter().find(|(own, _)| *own == inner)?.1
        };
        Some(format!("blk.{layer}.{gguf}.{part}"))
    }

    /// Heads whose rows the tensor `name` stores interleaved.
    pub(crate) fn interleaved_heads(
        &self,
        name: &str,
        architecture: &Architecture,
    ) -> Option<usize> {
        let attention = architecture.attention;
        match name {
            _ if !self.interleaves_qk => None,
            _ if name.contains(".q_proj.") => Some(attention.heads),
            _ if name.contains(".k_proj.") => Some(attention.kv_heads),
            _ => None,
        }
    }
}

/// Whether weights are one GGUF file.
pub fn is_gguf(paths: &[PathBuf]) -> bool {
    matches!(paths, [path] if path.extension().is_some_and(|extension| extension == "gguf"))
}

/// The header of a GGUF file.
///
/// # Errors
/// A file that is damaged or holds types that are not read.
pub fn read_content(path: &Path) -> Result<Content> {
    let file = File::open(path).map_err(|source| Error::io("read", path, source))?;
    Content::read(&mut BufReader::new(file)).map_err(|error| {
        let types = StoredFormat::ALL.iter().filter(|f| f.ggml_type().is_some());
        let types: Vec<&str> = types.map(|format| format.name()).collect();
        Error::new(
            Kind::Model,
            format!("the GGUF file cannot be read: {error}"),
        )
        .at(path.display().to_string())
        .rule(format!("types {}", types.join(", ")))
        .hint("fetch the file again, or another quantisation of the model")
    })
}

fn stored_format(dtype: GgmlDType) -> Option<StoredFormat> {
    Some(match dtype {
        GgmlDType::F32 => StoredFormat::F32,
        GgmlDType::F16 => StoredFormat::F16,
        GgmlDType::BF16 => StoredFormat::BF16,
        GgmlDType::Q4_0 => StoredFormat::Q4_0,
        GgmlDType::Q4_1 => StoredFormat::Q4_1,
        GgmlDType::Q5_0 => StoredFormat::Q5_0,
        GgmlDType::Q5_1 => StoredFormat::Q5_1,
        GgmlDType::Q8_0 => StoredFormat::Q8_0,
        GgmlDType::Q2K => StoredFormat::Q2_K,
        GgmlDType::Q3K => StoredFormat::Q3_K,
        GgmlDType::Q4K => StoredFormat::Q4_K,
        GgmlDType::Q5K => StoredFormat::Q5_K,
        GgmlDType::Q6K => StoredFormat::Q6_K,
        GgmlDType::Q8_1 | GgmlDType::Q8K => return None,
    })
}

/// The tensors of weight files under the names of `architecture`: of safetensors files as they are stored, with each quantised matrix and
/// its scales as one.
///
/// # Errors
/// A damaged file; a tensor of a GGUF file in a type that is not read, or beyond the file's end.
pub(super) fn headers(paths: &[PathBuf], architecture: &Architecture) -> Result<Vec<TensorEntry>> {
    if !is_gguf(paths) {
        return join_scales(read_headers(paths)?, &|tensor| {
            let path = &paths[tensor.file];
            let file = File::open(path).map_err(|source| Error::io("read", path, source))?;
            StoredTensor {
                path,
                file: &file,
                tensor,
                transposed: false,
            }
            .bytes()
        });
    }
    let path = &paths[0];
    let content = read_content(path)?;
    let metadata = std::fs::metadata(path).map_err(|source| Error::io("read", path, source))?;
    let family = Family::of(&architecture.model_type);
    let names = architecture.tensors().into_iter().filter_map(|tensor| {
        let stored = family?.tensor_name(&tensor.name, architecture)?;
        Some((stored, tensor.name))
    });
    let names: std::collections::HashMap<String, String> = names.collect();
    let mut entries = Vec::with_capacity(content.tensor_infos.len());
    for (name, info) in &content.tensor_infos {
        if name == ROPE_DIVISORS {
            continue;
        }
        let refused = |what: &str| {
            Error::new(Kind::Model, format!("the tensor `{name}` {what}"))
                .at(path.display().to_string())
        };
        let Some(format) = stored_format(info.ggml_dtype) else {
            return Err(refused("has a type that is not for weights"));
        };
        let shape = info.shape.dims().to_vec();
        let [.., columns] = *shape else {
            return Err(refused("has no dimensions"));
        };
        let elements = shape
            .iter()
            .try_fold(1usize, |n, size| n.checked_mul(*size));
        let whole = elements.filter(|_| format.fits_row(columns));
        let Some(size) = whole.and_then(|n| format.bytes_of_matrix(n / columns.max(1), columns))
        else {
            return Err(refused("has rows that are not whole blocks"));
        };
        let start = content.tensor_data_offset.saturating_add(info.offset);
        if start.saturating_add(size as u64) > metadata.len() {
            return Err(refused("lies beyond the end of the file").hint("fetch the file again"));
        }
        entries.push(TensorEntry {
            name: names.get(name).unwrap_or(name).clone(),
            dtype: match format {
                StoredFormat::F32 => Dtype::F32,
                StoredFormat::F16 => Dtype::F16,
                StoredFormat::BF16 => Dtype::BF16,
                _ => Dtype::U8,
            },
            format: Some(format).filter(|format| !format.is_float()),
            scales: Vec::new(),
            shape,
            file: 0,
            start,
            size: size as u64,
        });
    }
    Ok(entries)
}

/// Rows (heads, head_dim / 2, 2) of `width` elements -> (heads, 2, head_dim / 2): the order of transformers.
pub(super) fn deinterleave<T: Copy>(rows: &[T], width: usize, head_dim: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks(width * head_dim) {
        for half in 0..2 {
            for pair in head.chunks(2 * width) {
                out.extend_from_slice(&pair[half * width..][..width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_put_back() {
        // Two heads of four rows of two: the order 0 2 1 3 becomes 0 1 2 3.
        let stored = [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7];
        let rows = deinterleave(&stored, 2, 4);
        assert_eq!(rows, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]);
    }
}
