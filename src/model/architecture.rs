//! The architecture of a decoder: its sizes and switches, linear layers and tensors.

use std::collections::BTreeMap;

use half::{bf16, f16};

use super::embedding::EmbeddingParts;
use super::expert_sizes::ExpertSizes;
use super::head::Head;
use super::linears::Linears;
use super::names::ModuleNames;
use super::residual::BranchNorms;
use crate::adapter::targets::ModuleKind;
use crate::adapter::{ModelLayout, Module};
use crate::error::{Error, Kind, Result};
use crate::ops::{Activation, Attention, NormKind, QueryScaling, Rope, StoredFormat};
use crate::work::Precision;

/// Every size and switch of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// config.json's `model_type`.
    pub model_type: String,
    /// config.json's first `architectures` entry, or one made from the model type.
    pub class: String,
    /// Names of its modules.
    pub names: ModuleNames,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Channels inside the MLP.
    pub intermediate_size: usize,
    /// The experts of blocks that have them in place of an MLP.
    pub experts: Option<ExpertSizes>,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads and their sizes, without a window.
    pub attention: Attention,
    /// Whether the scores of block N also have a factor of 1 / (N + 1) (GPT-2).
    pub scales_by_layer: bool,
    /// What differs from block to block, one entry each.
    pub layers: Vec<LayerKind>,
    /// Groups that the columns of a fused q, k, v fall into, each with a share of q, of k and of v: 1
    /// for `[q|k|v]`, the number of heads for `[h][q,k,v]`.
    pub qkv_groups: usize,
    /// The norms of q and k, if they have any.
    pub qk_norm: Option<QkNorm>,
    /// Whether those norms follow the rotation.
    pub norms_rotated_qk: bool,
    /// The activation of gate.
    pub activation: Activation,
    /// The norms around attention.
    pub attention_norms: BranchNorms,
    /// The norms around the MLP.
    pub mlp_norms: BranchNorms,
    /// Whether attention and MLP both read the block's input, x + a(n(x)) + m(n(x)), rather than one
    /// the other's sum.
    pub parallel: bool,
    /// Whether the MLP is gated, down(f(gate x) up x), rather than down(f(up x)).
    pub gated_mlp: bool,
    /// Factor of the embedding in f32.
    pub embedding_factor: f64,
    /// Whether the factor of the embedding is rounded to the compute type, as in transformers' Gemma.
    pub rounds_embedding_factor: bool,
    /// What is added to the embedding.
    pub embedding_parts: EmbeddingParts,
    /// Factor of each branch before it is added to the residual stream.
    pub residual_factor: f64,
    /// Factor of the logits.
    pub logits_factor: f64,
    /// c of c tanh(logit / c), after the factor.
    pub logits_softcap: Option<f64>,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence that the model supports.
    pub max_position_embeddings: usize,
    /// What every norm does to a row.
    pub norm_kind: NormKind,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// Whether norms scale by 1 + weight.
    pub norm_unit_offset: bool,
    /// Rotary embeddings, one of which a block may use.
    pub ropes: Vec<Rope>,
    /// Factor of rotated queries by position.
    pub query_scaling: Option<QueryScaling>,
    /// Whether input and output embedding are one tensor: as config.json states, corrected by the
    /// weight files once they are opened.
    pub tie_word_embeddings: bool,
    /// Which layers have biases.
    pub biases: Biases,
    /// Whether the files hold the transposes (in, out) of the weights of the blocks' linear layers
    /// (GPT-2's Conv1D).
    pub transposed_linears: bool,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// Whether the matrices are stored in bf16: as config.json states (`dtype`, earlier
    /// `torch_dtype`), corrected by the weight files once they are opened.
    pub stored_in_bf16: bool,
    /// What follows the blocks.
    pub head: Head,
    /// The formats of quantised weights, by the name of the tensor.
    pub stored_formats: BTreeMap<String, StoredFormat>,
    /// The dropouts of config.json above zero. transformers applies them in training.
    pub dropout: Vec<ConfigDropout>,
}

/// A dropout of config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConfigDropout {
    /// Its key.
    pub key: &'static str,
    /// Probability that an element is dropped.
    pub p: f64,
    /// Whether it is transformers' default for the model type.
    pub is_default: bool,
}

/// What differs from block to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Sliding window of its attention, as in [`Attention`].
    pub window: Option<usize>,
    /// Its rotary embedding in [`Architecture::ropes`]; `None`: q and k are not rotated.
    pub rope: Option<usize>,
    /// Whether it has experts in place of an MLP.
    pub sparse: bool,
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
    /// The output embedding.
    pub lm_head: bool,
    /// Every norm.
    pub norm: bool,
}

impl Biases {
    /// No layer.
    pub const NONE: Self = Self {
        qkv: false,
        o: false,
        mlp: false,
        lm_head: false,
        norm: false,
    };
    /// Every layer.
    pub const ALL: Self = Self {
        qkv: true,
        o: true,
        mlp: true,
        lm_head: false,
        norm: true,
    };
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
    /// Whether the file holds its transpose.
    pub transposed: bool,
}

impl TensorShape {
    /// Number of elements.
    pub fn parameters(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }

    /// Its shape in the file.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}

impl Architecture {
    /// Attention of block `layer`.
    pub(super) fn attention(&self, layer: usize) -> Attention {
        let by_layer = self.attention.scale() / (layer + 1) as f64;
        Attention {
            window: self.layers[layer].window,
            scale: if self.scales_by_layer {
                Some(by_layer)
            } else {
                self.attention.scale
            },
            ..self.attention
        }
    }

    /// Factor of the embedding in a pass of this precision.
    pub(super) fn embedding_factor(&self, precision: Precision) -> f64 {
        let factor = self.embedding_factor;
        match precision {
            Precision::Bf16 if self.rounds_embedding_factor => bf16::from_f64(factor).to_f64(),
            Precision::F16 if self.rounds_embedding_factor => f16::from_f64(factor).to_f64(),
            _ => factor,
        }
    }

    /// Names of a block's norms on the residual stream; one that is before attention and the MLP is
    /// named once.
    fn norm_names(&self) -> impl Iterator<Item = &'static str> + use<> {
        let (attention, mlp) = (self.attention_norms, self.mlp_norms);
        let mlp_input = mlp.input.filter(|_| mlp.input != attention.input);
        [attention.input, attention.output, mlp_input, mlp.output]
            .into_iter()
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

    /// Whether a sequence of `length` tokens is the longest by its rotations: with one more token, all
    /// of its positions rotate by other frequencies (LongRoPE), and cached keys do not fit.
    pub(super) fn rotations_end_at(&self, length: usize) -> bool {
        let mut limits = self.ropes.iter().map(Rope::long_above);
        limits.any(|limit| limit == Some(length))
    }

    /// Format of frozen matrices in memory for products in `precision`: the same, except that bf16
    /// weights stay bf16 for f32 products.
    pub fn frozen_precision(&self, precision: Precision) -> Precision {
        match precision {
            Precision::F32 if self.stored_in_bf16 => Precision::Bf16,
            precision => precision,
        }
    }

    /// Quantises the linear layers of the blocks to `format`. Embeddings, norms and biases keep their type, as with bitsandbytes.
    ///
    /// # Errors
    /// A layer whose rows are not whole blocks.
    pub fn quantize_linears(&mut self, format: StoredFormat) -> Result<()> {
        if self.experts.is_some() {
            let what = "a mixture of experts cannot be quantised";
            return Err(Error::new(Kind::Model, what)
                .value(format.name().to_lowercase())
                .rule("none: the stacks of experts keep their type")
                .hint(
                    "write `quantization = \"none\"` in [model], or leave `--quantization` out",
                ));
        }
        let block = format.block_values();
        if let Some(linear) = self
            .linears(0)
            .iter()
            .find(|linear| !format.fits_row(linear.in_features))
        {
            let name = format.name().to_lowercase();
            return Err(
                Error::new(Kind::Model, "the model cannot be quantised to this format")
                    .at(format!("`{}`", linear.name))
                    .value(format!("{} input features", linear.in_features))
                    .rule(format!("{name} stores rows in blocks of {block} values"))
                    .hint("choose nf4 or int8, whose blocks fit any row"),
            );
        }
        for layer in 0..self.num_hidden_layers {
            let block = self.names.block_path(layer);
            let weights = self
                .linears(layer)
                .map(|linear| format!("{block}.{}.weight", linear.name));
            let formats = weights.iter().map(|name| (name.clone(), format));
            self.stored_formats.extend(formats);
        }
        Ok(())
    }

    /// Intermediate activations of the MLP that are saved: gate and up, or one.
    pub(super) fn inner_parts(&self) -> usize {
        1 + usize::from(self.gated_mlp)
    }

    /// The linear layers of block `layer`.
    pub(super) fn linears(&self, layer: usize) -> Linears<LinearSpec> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let heads = self.attention.heads * self.attention.head_dim;
        let kv_heads = self.attention.kv_heads * self.attention.head_dim;
        let spec = |name, out_features, in_features, bias| LinearSpec {
            name,
            out_features,
            in_features,
            bias,
        };
        // One layer for each part, or one with the columns of all parts.
        let fused = |names: &[&'static str], widths: &[usize], bias| match names {
            [name] => vec![spec(name, widths.iter().sum(), hidden, bias)],
            names => {
                let layers = names.iter().zip(widths);
                layers
                    .map(|(name, width)| spec(name, *width, hidden, bias))
                    .collect()
            }
        };
        let names = &self.names.linears;
        let Biases { qkv, o, mlp, .. } = self.biases;
        let dense = !self.layers[layer].sparse;
        let gate_up = || fused(names.gate_up, &[inner, inner][..self.inner_parts()], mlp);
        Linears {
            qkv: fused(names.qkv, &[heads, kv_heads, kv_heads], qkv),
            o: spec(names.o, hidden, heads, o),
            gate_up: if dense { gate_up() } else { Vec::new() },
            down: dense.then(|| spec(names.down, hidden, inner, mlp)),
        }
    }

    /// The linear layers of the head, the output last, by their paths.
    pub(super) fn head_linears(&self) -> Vec<LinearSpec> {
        let head = self.classifier_head();
        let layer = |name, out_features| LinearSpec {
            name,
            out_features,
            in_features: self.hidden_size,
            bias: head.map_or(self.biases.lm_head, |head| head.bias),
        };
        let dense = head.and_then(|head| head.dense);
        let dense = dense.map(|path| layer(path, self.hidden_size));
        let output = layer(self.names.lm_head, self.outputs());
        dense.into_iter().chain([output]).collect()
    }

    /// Path of the output embedding among [`Architecture::modules`], or of a classifier's output
    /// layer, which `all-linear` leaves out.
    pub fn output_embedding(&self) -> &'static str {
        self.names.lm_head
    }

    /// Names of the tensors that are one if the embeddings are tied: the head's and the embedding's.
    pub fn tied_tensors(&self) -> [String; 2] {
        let embed_tokens = self.names.embed_tokens_path();
        [self.names.lm_head, &embed_tokens].map(|path| format!("{path}.weight"))
    }

    /// What adapters can target, in model order: the input embedding, every linear layer, the output
    /// embedding. Of a model with experts only attention's layers: to PEFT the names of an MLP mean
    /// the experts there.
    pub fn modules(&self) -> Vec<Module> {
        let mut modules = vec![Module {
            path: self.names.embed_tokens_path(),
            out_features: self.hidden_size,
            in_features: self.vocab_size,
            kind: ModuleKind::Embedding,
        }];
        for layer in 0..self.num_hidden_layers {
            let block = self.names.block_path(layer);
            let linears = self.linears(layer);
            let linears = linears
                .iter()
                .filter(|linear| self.experts.is_none() || !linear.name.starts_with("mlp."));
            modules.extend(linears.map(|linear| Module {
                path: format!("{block}.{}", linear.name),
                out_features: linear.out_features,
                in_features: linear.in_features,
                kind: if self.transposed_linears {
                    ModuleKind::Conv1d
                } else {
                    ModuleKind::Linear
                },
            }));
        }
        // No targets are the layers that PEFT trains in full: those inside the head's module, and
        // those whose name ends as its own.
        let is_saved = |path: &str| {
            let rest = self.classifier().and_then(|head| path.rsplit_once(head));
            rest.is_some_and(|rest| rest != ("", ""))
        };
        let head = self.head_linears().into_iter();
        modules.extend(
            head.filter(|layer| !is_saved(layer.name))
                .map(|layer| Module {
                    path: layer.name.into(),
                    out_features: layer.out_features,
                    in_features: layer.in_features,
                    kind: ModuleKind::Linear,
                }),
        );
        modules
    }

    /// What an adapter can name of the model.
    pub fn layout(&self) -> ModelLayout {
        let tensors = self.tensors().into_iter();
        ModelLayout {
            modules: self.modules(),
            input_embedding: self.names.embed_tokens_path(),
            output_embedding: self.output_embedding().into(),
            tied: self.tie_word_embeddings,
            tensors: tensors.map(|tensor| (tensor.name, tensor.shape)).collect(),
        }
    }

    /// Every tensor of the model in order; a tied output embedding is not listed.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let hidden = self.hidden_size;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], bias: bool| {
            // A stack of experts is no module, and its name has no part.
            let stacked = shape.len() == 3;
            let mut tensor = |part, shape: &[usize]| {
                tensors.push(TensorShape {
                    name: if stacked {
                        name.clone()
                    } else {
                        format!("{name}.{part}")
                    },
                    shape: shape.to_vec(),
                    transposed: false,
                });
            };
            tensor("weight", shape);
            if bias {
                tensor("bias", &shape[..1]);
            }
        };
        let norm_bias = self.biases.norm;
        let vocabulary = [self.vocab_size, hidden];
        add(self.names.embed_tokens_path(), &vocabulary, false);
        let parts = &self.embedding_parts;
        let positions = parts.positions.map(|table| (table.name, table.rows));
        let token_types = parts.token_types.map(|table| (table.name, table.rows));
        for (name, rows) in positions.into_iter().chain(token_types) {
            add(self.names.base_path(name), &[rows, hidden], false);
        }
        if let Some(norm) = parts.norm {
            add(self.names.base_path(norm), &[hidden], norm_bias);
        }
        for layer in 0..self.num_hidden_layers {
            let prefix = self.names.block_path(layer);
            for norm in self.norm_names() {
                add(format!("{prefix}.{norm}"), &[hidden], norm_bias);
            }
            if let Some([q, k]) = self.qk_norm_widths() {
                let [q_norm, k_norm] = self.names.qk_norms;
                add(format!("{prefix}.{q_norm}"), &[q], norm_bias);
                add(format!("{prefix}.{k_norm}"), &[k], norm_bias);
            }
            for linear in self.linears(layer).iter() {
                let path = format!("{prefix}.{}", linear.name);
                let shape = [linear.out_features, linear.in_features];
                add(path, &shape, linear.bias);
            }
            for (name, shape) in self.expert_tensors(layer) {
                add(name, &shape, false);
            }
        }
        if let Some(norm) = self.names.norm_path() {
            add(norm, &[hidden], norm_bias);
        }
        if !self.tie_word_embeddings {
            for layer in self.head_linears() {
                let shape = [layer.out_features, layer.in_features];
                add(layer.name.into(), &shape, layer.bias);
            }
        }
        let in_block = |name: &str| self.names.layer_of(name).is_some();
        for tensor in &mut tensors {
            let is_matrix = tensor.shape.len() == 2 && in_block(&tensor.name);
            tensor.transposed = self.transposed_linears && is_matrix;
        }
        tensors
    }

    /// The router of block `layer` (a module), and its experts' tensors, with their shapes; none
    /// in a block without experts.
    fn expert_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let sizes = self.experts.filter(|_| self.layers[layer].sparse);
        let shapes = sizes.map(|sizes| sizes.shapes(self.hidden_size));
        let names = ModuleNames::EXPERTS.map(|name| self.names.in_block(layer, name));
        names
            .into_iter()
            .zip(shapes.into_iter().flatten())
            .collect()
    }

    /// Parameters of which a token is multiplied: all, but of experts those of its own.
    pub fn active_parameters(&self) -> u64 {
        let share = |tensor: &TensorShape| match (self.experts, tensor.shape.as_slice()) {
            (Some(experts), [count, ..]) if tensor.shape.len() == 3 => {
                tensor.parameters() / *count as u64 * experts.per_token as u64
            }
            _ => tensor.parameters(),
        };
        self.tensors().iter().map(share).sum()
    }

    /// Parameters of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(TensorShape::parameters).sum()
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
