//! The architecture of a decoder: its sizes and switches, linear layers and tensors.

use super::linears::{LINEAR_NAMES, Linears};
use crate::adapter::Module;
use crate::ops::{Attention, Rope};
use crate::work::Precision;

/// Every size and switch of a decoder.
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
    /// Heads and their sizes, without a window.
    pub attention: Attention,
    /// What differs from block to block, one entry each.
    pub layers: Vec<LayerKind>,
    /// Whether each head of q and k has an RMSNorm before its rotation.
    pub qk_norm: bool,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence that the model supports.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Position embedding.
    pub rope: Rope,
    /// Whether input and output embedding are one tensor: as config.json states, corrected by the
    /// weight files once they are opened.
    pub tie_word_embeddings: bool,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// Whether the matrices are stored in bf16: as config.json states (`dtype`, earlier
    /// `torch_dtype`), corrected by the weight files once they are opened.
    pub stored_in_bf16: bool,
    /// The first dropout key of config.json above zero. transformers applies it in training.
    pub dropout: Option<(&'static str, f64)>,
}

/// What differs from block to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Sliding window of its attention, as in [`Attention`].
    pub window: Option<usize>,
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
    /// Attention of block `layer`.
    pub(super) fn attention(&self, layer: usize) -> Attention {
        Attention {
            window: self.layers[layer].window,
            ..self.attention
        }
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

    /// Path of the output embedding among [`Architecture::modules`], which `all-linear` leaves out.
    pub fn output_embedding(&self) -> &'static str {
        "lm_head"
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
            path: self.output_embedding().into(),
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
            if self.qk_norm {
                let head = &[self.attention.head_dim];
                add(format!("{prefix}.self_attn.q_norm.weight"), head);
                add(format!("{prefix}.self_attn.k_norm.weight"), head);
            }
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
