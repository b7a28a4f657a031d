//! The architecture of a decoder: its sizes and switches, linear layers and tensors.

use super::linears::{LINEAR_NAMES, Linears};
use super::residual::BranchNorms;
use crate::adapter::Module;
use crate::ops::{Activation, Attention, NormKind, Rope};
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
    /// The norms of q and k before their rotation, if they have any.
    pub qk_norm: Option<QkNorm>,
    /// The activation of gate.
    pub activation: Activation,
    /// The norms around attention.
    pub attention_norms: BranchNorms,
    /// The norms around the MLP.
    pub mlp_norms: BranchNorms,
    /// Factor of the embedding.
    pub embedding_factor: f64,
    /// Factor of each branch before it is added to the residual stream.
    pub residual_factor: f64,
    /// Factor of the logits.
    pub logits_factor: f64,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence that the model supports.
    pub max_position_embeddings: usize,
    /// What every norm does to a row.
    pub norm_kind: NormKind,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// Rotary embeddings, one of which a block may use.
    pub ropes: Vec<Rope>,
    /// Whether input and output embedding are one tensor: as config.json states, corrected by the
    /// weight files once they are opened.
    pub tie_word_embeddings: bool,
    /// Which layers have biases.
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
    /// Its rotary embedding in [`Architecture::ropes`]; `None`: q and k are not rotated.
    pub rope: Option<usize>,
}

/// The rows that a norm of q or k is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head: a weight (head_dim).
    Heads,
    /// All heads together: a weight (heads x head_dim).
    Rows,
}

/// Which layers have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The attention's output.
    pub o: bool,
    /// gate, up and down.
    pub mlp: bool,
    /// Every norm.
    pub norm: bool,
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

    /// Names of a block's norms on the residual stream.
    fn norm_names(&self) -> impl Iterator<Item = &'static str> + use<> {
        [self.attention_norms, self.mlp_norms]
            .into_iter()
            .flat_map(|norms| [norms.input, norms.output])
            .flatten()
    }

    /// Elements of the weights of the norms of q and k.
    pub(super) fn qk_norm_widths(&self) -> Option<[usize; 2]> {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.attention;
        Some(match self.qk_norm? {
            QkNorm::Heads => [head_dim, head_dim],
            QkNorm::Rows => [heads * head_dim, kv_heads * head_dim],
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
        let Biases { qkv, o, mlp, .. } = self.biases;
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
        let mut add = |name: String, shape: &[usize], bias: bool| {
            let mut tensor = |part, shape: &[usize]| {
                let name = format!("{name}.{part}");
                let shape = shape.to_vec();
                tensors.push(TensorShape { name, shape });
            };
            tensor("weight", shape);
            if bias {
                tensor("bias", &shape[..1]);
            }
        };
        let norm_bias = self.biases.norm;
        let vocabulary = [self.vocab_size, hidden];
        add("model.embed_tokens".into(), &vocabulary, false);
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            for norm in self.norm_names() {
                add(format!("{prefix}.{norm}"), &[hidden], norm_bias);
            }
            if let Some([q, k]) = self.qk_norm_widths() {
                add(format!("{prefix}.self_attn.q_norm"), &[q], norm_bias);
                add(format!("{prefix}.self_attn.k_norm"), &[k], norm_bias);
            }
            for linear in self.linears().into_array() {
                let path = format!("{prefix}.{}", linear.name);
                let shape = [linear.out_features, linear.in_features];
                add(path, &shape, linear.bias);
            }
        }
        add("model.norm".into(), &[hidden], norm_bias);
        if !self.tie_word_embeddings {
            add("lm_head".into(), &vocabulary, false);
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
