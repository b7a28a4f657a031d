//! A GGUF file -> config.json, as transformers would have it, and the parts of its tokenizer (`reader_tokenizer`).
//!
//! Metadata keys are those of the GGUF specification; keys of config.json are those that the family's reader expects.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};

use crate::error::{Error, Kind, Result};
use crate::model::{Family, ROPE_DIVISORS, read_content};
use crate::ops::{Activation, Rope, RopeScaling};

/// The scalings of Llama 3.1 and 3.2, of which a file holds the divisors alone: factor, low and high frequency factor, original
/// length.
const LLAMA3_SCALINGS: [(f64, f64, f64, usize); 2] =
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)];

/// Most channels of a head of which divisors are read.
const MOST_HEAD_DIM: usize = 4096;

/// The header of a GGUF file of a known family.
pub struct GgufFile {
    path: PathBuf,
    content: Content,
    family: &'static Family,
}

impl GgufFile {
    /// Reads the header.
    ///
    /// # Errors
    /// A damaged file, and a family that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        let content = read_content(path)?;
        let place = || path.display().to_string();
        let arch = match content.metadata.get("general.architecture") {
            Some(Value::String(arch)) => arch.clone(),
            _ => {
                let what = "the GGUF file names no architecture";
                return Err(Error::new(Kind::Model, what).at(place()));
            }
        };
        let Some(family) = Family::all().find(|family| family.arch == arch) else {
            let mut known: Vec<&str> = Family::all().map(|family| family.arch).collect();
            known.dedup();
            return Err(
                Error::new(Kind::Model, "GGUF files of this architecture are not read")
                    .at(place())
                    .value(arch)
                    .rule(format!("one of {}", known.join(", ")))
                    .hint("use the safetensors files of the model"),
            );
        };
        Ok(Self {
            path: path.to_path_buf(),
            content,
            family,
        })
    }

    /// An error about the file.
    pub(super) fn refused(&self, kind: Kind, what: impl Into<String>) -> Error {
        Error::new(kind, what.into()).at(self.path.display().to_string())
    }

    /// The metadata value of `key`.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A whole number; `None` where the key is absent.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::U8(x) => Some(u64::from(*x)),
            Value::U16(x) => Some(u64::from(*x)),
            Value::U32(x) => Some(u64::from(*x)),
            Value::U64(x) => Some(*x),
            Value::I8(x) => u64::try_from(*x).ok(),
            Value::I16(x) => u64::try_from(*x).ok(),
            Value::I32(x) => u64::try_from(*x).ok(),
            Value::I64(x) => u64::try_from(*x).ok(),
            _ => None,
        };
        let wrong = || {
            self.refused(Kind::Model, "a metadata value is not one whole number")
                .value(key)
        };
        number.ok_or_else(wrong).map(Some)
    }

    /// A float, as it is printed in f32.
    fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::F32(x) => x.to_string().parse().ok(),
            Value::F64(x) => Some(*x),
            _ => None,
        }
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The licence.
    pub fn license(&self) -> Option<&str> {
        self.text("general.license")
            .filter(|text| !text.contains('\n'))
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.family.arch)
    }

    fn size(&self, name: &str) -> Result<u64> {
        let missing = || {
            self.refused(Kind::Model, "the GGUF file lacks a size")
                .value(self.key(name))
        };
        self.number(&self.key(name))?.ok_or_else(missing)
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// The model's configuration.
    ///
    /// # Errors
    /// Sizes that are missing, and what no configuration of the family can say.
    pub fn config_json(&self) -> Result<Json> {
        let heads = self.size("attention.head_count")?;
        let hidden = self.size("embedding_length")?;
        let key_length = self.number(&self.key("attention.key_length"))?;
        let head_dim = key_length.unwrap_or(hidden / heads.max(1));
        let kv_heads = self.number(&self.key("attention.head_count_kv"))?;
        if let Some(experts) = self.number(&self.key("expert_count"))?.filter(|n| *n > 0) {
            let what = "mixtures of experts in GGUF are not read";
            return Err(self.refused(Kind::Model, what).value(experts.to_string()));
        }
        let table = self.content.tensor_infos.get("token_embd.weight");
        let rows = table.and_then(|info| info.shape.dims().first());
        let rows =
            rows.ok_or_else(|| self.refused(Kind::Model, "the GGUF file has no embedding"))?;
        let activation = match self.family.activation {
            Activation::GeluTanh => "gelu_pytorch_tanh",
            _ => "silu",
        };
        let theta = self.float(&self.key("rope.freq_base")).unwrap_or(10_000.0);
        let mut config = json!({
            "architectures": [class_of(self.family)],
            "model_type": self.family.model_type,
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads.unwrap_or(heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length")?,
            "rms_norm_eps": self.float(&self.key("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "vocab_size": rows,
            "tie_word_embeddings": !self.has_tensor("output.weight"),
            "hidden_act": activation,
            "hidden_activation": activation,
            "attention_bias": self.has_tensor("blk.0.attn_q.bias"),
            "torch_dtype": "float32",
        });
        let rotated = self.number(&self.key("rope.dimension_count"))?;
        if let Some(rotated) = rotated.filter(|rotated| *rotated != head_dim) {
            let what = "partial rotation in GGUF is not read";
            return Err(self.refused(Kind::Model, what).value(rotated.to_string()));
        }
        if let Some(scaling) = self.rope_scaling(head_dim as usize, theta)? {
            config["rope_scaling"] = scaling;
        }
        let window = self.number(&self.key("attention.sliding_window"))?;
        if let Some(window) = window.filter(|_| self.family.has_window) {
            config["sliding_window"] = window.into();
        }
        for (key, name) in self.family.extra {
            if let Some(value) = self.float(&self.key(name)) {
                config[*key] = value.into();
            }
        }
        self.add_attention_scale(&mut config, head_dim);
        Ok(config)
    }

    /// Gemma's attention scale, which llama.cpp knows by the number of blocks.
    fn add_attention_scale(&self, config: &mut Json, head_dim: u64) {
        if !matches!(self.family.arch, "gemma2" | "gemma3") {
            return;
        }
        let [blocks, hidden, heads] = ["num_hidden_layers", "hidden_size", "num_attention_heads"]
            .map(|key| config[key].as_u64().unwrap_or_default());
        let is_27b = matches!((self.family.arch, blocks), ("gemma2", 46) | ("gemma3", 62));
        let scalar = if is_27b {
            hidden / heads.max(1)
        } else {
            head_dim
        };
        config["query_pre_attn_scalar"] = scalar.into();
    }

    fn rope_scaling(&self, head_dim: usize, theta: f64) -> Result<Option<Json>> {
        if self.has_tensor(ROPE_DIVISORS) {
            return self.llama3_scaling(head_dim, theta).map(Some);
        }
        let kind = self.text(&self.key("rope.scaling.type"));
        let factor = self.float(&self.key("rope.scaling.factor"));
        let original = self.number(&self.key("rope.scaling.original_context_length"))?;
        match (kind, factor, original) {
            (None | Some("none"), ..) => Ok(None),
            (Some("linear"), Some(factor), _) => {
                Ok(Some(json!({"rope_type": "linear", "factor": factor})))
            }
            (Some("yarn"), Some(factor), Some(original)) => Ok(Some(json!({
                "rope_type": "yarn", "factor": factor,
                "original_max_position_embeddings": original,
            }))),
            (Some(kind), ..) => {
                let what = "this scaling of the rotary embedding is not read from GGUF";
                Err(self
                    .refused(Kind::Model, what)
                    .value(kind)
                    .rule("linear, llama3 or yarn"))
            }
        }
    }

    /// The published scaling whose divisors the file holds.
    fn llama3_scaling(&self, head_dim: usize, theta: f64) -> Result<Json> {
        let other = || {
            let what = "the divisors of the rotary frequencies are those of no published model";
            self.refused(Kind::Model, what)
                .value(ROPE_DIVISORS)
                .hint("use the safetensors files of the model")
        };
        let shape = self.content.tensor_infos.get(ROPE_DIVISORS);
        if shape.is_none_or(|info| info.shape.dims() != [head_dim / 2]) || head_dim > MOST_HEAD_DIM
        {
            return Err(other());
        }
        let file = std::fs::File::open(&self.path);
        let mut file = file.map_err(|source| Error::io("read", &self.path, source))?;
        let stored = self.content.tensor(&mut file, ROPE_DIVISORS, &Device::Cpu);
        let stored: candle_core::Result<Tensor> = stored.and_then(|t| t.dequantize(&Device::Cpu));
        let stored: Vec<f32> = stored?.flatten_all()?.to_vec1()?;
        for (factor, low, high, original) in LLAMA3_SCALINGS {
            let rope = Rope {
                interleaved: false,
                head_dim,
                rotary_dim: head_dim,
                theta,
                scaling: RopeScaling::Llama3 {
                    factor,
                    low,
                    high,
                    original,
                },
            };
            let divisors = rope.frequency_divisors();
            let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
            if divisors.len() == stored.len() && stored.iter().zip(&divisors).all(is_near) {
                return Ok(json!({
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                    "high_freq_factor": high, "original_max_position_embeddings": original,
                }));
            }
        }
        Err(other())
    }
}

/// transformers' class of a family.
fn class_of(family: &Family) -> &'static str {
    match family.arch {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "smollm3" => "SmolLM3ForCausalLM",
        "olmo2" => "Olmo2ForCausalLM",
        "gemma" => "GemmaForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        "gemma3" => "Gemma3ForCausalLM",
        "granite" => "GraniteForCausalLM",
        _ => "LlamaForCausalLM",
    }
}
