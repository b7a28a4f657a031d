//! The architecture of a decoder: sizes and switches, read from config.json alone.

use std::path::Path;

use serde_json::Value;

use super::config::{Config, rope_scaling};
use super::linears::{LINEAR_NAMES, Linears};
use crate::adapter::Module;
use crate::error::{Error, Kind, Result};
use crate::ops::{Attention, Rope, RopeScaling};
use crate::work::Precision;

/// Every size and switch of a Llama-architecture decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// config.json's `model_type`.
    pub model_type: String,
    /// config.json's first `architectures` entry, or one made from the model type.
    pub class: String,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads and their sizes.
    pub attention: Attention,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence that the model supports.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Position embedding.
    pub rope: Rope,
    /// Whether input and output embedding are one tensor.
    pub tie_word_embeddings: bool,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// Whether the matrices are stored in bf16: as config.json states (`dtype`, earlier
    /// `torch_dtype`), corrected by the weight files once they are opened.
    pub stored_in_bf16: bool,
}

/// Which linear layers have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The attention's output.
    pub o: bool,
    /// gate, up and down.
    pub mlp: bool,
}

/// A linear layer of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearSpec {
    /// Name inside the block: `self_attn.q_proj`.
    pub(super) name: &'static str,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) bias: bool,
}

/// A tensor that the model's files must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Architecture {
    /// Reads a config.json file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| {
            Error::new(Kind::Model, format!("config.json is not JSON: {e}"))
                .at(path.display().to_string())
        })?;
        Self::from_config(&value).map_err(|e| e.at(path.display().to_string()))
    }

    /// Reads a parsed config.json.
    pub fn from_config(value: &Value) -> Result<Self> {
        let object = value
            .as_object()
            .ok_or_else(|| Error::new(Kind::Model, "config.json is not a JSON object"))?;
        let config = Config(object);
        let model_type = config.text("model_type").unwrap_or("llama").to_string();
        check_supported(&model_type, &config)?;
        let hidden_size = config.required_size("hidden_size")?;
        let attention = attention(&config, &model_type, hidden_size)?;
        let max_position_embeddings = config.size("max_position_embeddings")?.unwrap_or(2048);
        let table = config.rope_table();
        let scaling = table
            .as_ref()
            .map(|t| rope_scaling(t, max_position_embeddings))
            .transpose()?;
        let theta = match (config.number("rope_theta")?, &table) {
            (Some(theta), _) => theta,
            (None, Some(table)) => table.number("rope_theta")?.unwrap_or(10_000.0),
            (None, None) => 10_000.0,
        };
        Ok(Self {
            class: class(&config, &model_type),
            hidden_size,
            intermediate_size: config.required_size("intermediate_size")?,
            num_hidden_layers: config.required_size("num_hidden_layers")?,
            attention,
            vocab_size: config.required_size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: Rope {
                head_dim: attention.head_dim,
                theta,
                scaling: scaling.unwrap_or(RopeScaling::None),
            },
            tie_word_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
            biases: biases(&config, &model_type)?,
            initializer_range: config.number("initializer_range")?.unwrap_or(0.02),
            stored_in_bf16: config.text("dtype").or(config.text("torch_dtype")) == Some("bfloat16"),
            model_type,
        })
    }

    /// Format of frozen matrices in memory for products in `precision`: the same, except that bf16
    /// weights stay bf16 for f32 products.
    pub fn frozen_precision(&self, precision: Precision) -> Precision {
        match precision {
            Precision::F32 if self.stored_in_bf16 => Precision::Bf16,
            precision => precision,
        }
    }

    /// The linear layers of a block.
    pub(super) fn linears(&self) -> Linears<LinearSpec> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let heads = self.attention.heads * self.attention.head_dim;
        let kv_heads = self.attention.kv_heads * self.attention.head_dim;
        let Biases { qkv, o, mlp } = self.biases;
        let shapes = Linears {
            q_proj: (heads, hidden, qkv),
            k_proj: (kv_heads, hidden, qkv),
            v_proj: (kv_heads, hidden, qkv),
            o_proj: (hidden, heads, o),
            gate_proj: (inner, hidden, mlp),
            up_proj: (inner, hidden, mlp),
            down_proj: (hidden, inner, mlp),
        };
        LINEAR_NAMES.zip(shapes).map(|(name, shape)| {
            let (out_features, in_features, bias) = shape;
            LinearSpec {
                name,
                out_features,
                in_features,
                bias,
            }
        })
    }

    /// Every linear layer in model order, the output embedding last: what adapters can target.
    pub fn modules(&self) -> Vec<Module> {
        let mut modules = Vec::new();
        for layer in 0..self.num_hidden_layers {
            let linears = self.linears().into_array();
            modules.extend(linears.map(|linear| Module {
                path: format!("model.layers.{layer}.{}", linear.name),
                out_features: linear.out_features,
                in_features: linear.in_features,
            }));
        }
        modules.push(Module {
            path: "lm_head".into(),
            out_features: self.vocab_size,
            in_features: self.hidden_size,
        });
        modules
    }

    /// Every tensor of the model in order; a tied output embedding is not listed.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let hidden = self.hidden_size;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let shape = shape.to_vec();
            tensors.push(TensorShape { name, shape });
        };
        add(
            "model.embed_tokens.weight".into(),
            &[self.vocab_size, hidden],
        );
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            add(format!("{prefix}.input_layernorm.weight"), &[hidden]);
            for linear in self.linears().into_array() {
                let path = format!("{prefix}.{}", linear.name);
                let shape = [linear.out_features, linear.in_features];
                add(format!("{path}.weight"), &shape);
                if linear.bias {
                    add(format!("{path}.bias"), &shape[..1]);
                }
            }
            add(
                format!("{prefix}.post_attention_layernorm.weight"),
                &[hidden],
            );
        }
        add("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            add("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        tensors
    }

    /// Parameters of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors()
            .iter()
            .map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>())
            .sum()
    }

    /// Whether a layer's products take less time than synchronising the threads that would share
    /// them. On a CPU each thread then runs the whole model on a shard of the batch, and frozen
    /// weights stay packed for both directions.
    pub fn is_small(&self) -> bool {
        self.parameters() <= SMALL
    }
}

/// Most parameters of a small model: packed for both directions they take 32 MB, or 48 MB for tile
/// registers.
const SMALL: u64 = 4_000_000;

fn check_supported(model_type: &str, config: &Config<'_>) -> Result<()> {
    const SUPPORTED: [&str; 3] = ["llama", "mistral", "qwen2"];
    if !SUPPORTED.contains(&model_type) {
        return Err(
            Error::new(Kind::Model, "config.json: this model type is not supported")
                .value(model_type)
                .rule(format!("one of {}", SUPPORTED.join(", ")))
                .hint("choose a Llama-architecture decoder such as `HuggingFaceTB/SmolLM2-135M`"),
        );
    }
    if let Some(quantization) = config.get("quantization_config") {
        return Err(Error::new(
            Kind::Model,
            "config.json: quantised weights cannot be trained on yet",
        )
        .value(quantization.to_string())
        .hint("use the model's original, unquantised repository"));
    }
    match config.text("hidden_act").unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => Err(Error::new(
            Kind::Model,
            "config.json: this `hidden_act` is not supported",
        )
        .value(other)
        .rule("silu")),
    }
}

fn attention(config: &Config<'_>, model_type: &str, hidden_size: usize) -> Result<Attention> {
    let heads = config.required_size("num_attention_heads")?;
    let kv_heads = config.size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = config.size("head_dim")?.unwrap_or(hidden_size / heads);
    let refuse = |what: &str, value: String| {
        Err(Error::new(Kind::Model, format!("config.json: {what}")).value(value))
    };
    if heads % kv_heads != 0 {
        return refuse(
            "`num_key_value_heads` must divide `num_attention_heads`",
            format!("{heads} and {kv_heads}"),
        );
    }
    if config.get("head_dim").is_none() && !hidden_size.is_multiple_of(heads) {
        return refuse(
            "`num_attention_heads` must divide `hidden_size` where there is no `head_dim`",
            format!("{hidden_size} and {heads}"),
        );
    }
    if head_dim % 2 != 0 || head_dim == 0 {
        return refuse("`head_dim` must be even", head_dim.to_string());
    }
    let window = match model_type {
        "mistral" => config.size("sliding_window")?,
        "qwen2" if config.flag("use_sliding_window")?.unwrap_or(false) => {
            return refuse(
                "a sliding window on some layers only is not supported",
                "use_sliding_window = true".into(),
            );
        }
        _ => None,
    };
    Ok(Attention {
        heads,
        kv_heads,
        head_dim,
        window,
    })
}

fn biases(config: &Config<'_>, model_type: &str) -> Result<Biases> {
    let attention = config.flag("attention_bias")?.unwrap_or(false);
    let mlp = config.flag("mlp_bias")?.unwrap_or(false);
    Ok(match model_type {
        "qwen2" => Biases {
            qkv: true,
            o: false,
            mlp: false,
        },
        "mistral" => Biases::default(),
        _ => Biases {
            qkv: attention,
            o: attention,
            mlp,
        },
    })
}

fn class(config: &Config<'_>, model_type: &str) -> String {
    let listed = config
        .get("architectures")
        .and_then(Value::as_array)
        .and_then(|a| a.first())
        .and_then(Value::as_str);
    let made = match model_type {
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    listed.unwrap_or(made).to_string()
}
