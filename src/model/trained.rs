//! What is trained of a model, found by the names of its layers and tensors.

use super::architecture::{Architecture, LinearSpec, TensorShape};
use super::linears::Linears;
use super::names::ModuleNames;
use super::residual::BranchNorms;
use crate::adapter::Adaptation;
use crate::ops::{LinearShape, LoraShape, StoredFormat};

/// What is trained of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TrainedBlock {
    pub(super) linears: Linears<TrainedLinear>,
    /// The router, and the experts' gate and up, and down.
    pub(super) experts: [bool; 3],
    /// The norms before and after attention.
    pub(super) attention_norms: [bool; 2],
    /// The norms before and after the MLP.
    pub(super) mlp_norms: [bool; 2],
    /// The norms of q and k.
    pub(super) qk_norms: [bool; 2],
}

/// What is trained of the embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TrainedEmbedding {
    pub(super) tokens: bool,
    pub(super) positions: bool,
    pub(super) token_types: bool,
    pub(super) norm: bool,
    pub(super) lora: Option<LoraShape>,
    /// The format of a quantised table of tokens.
    pub(super) stored: Option<StoredFormat>,
}

impl TrainedEmbedding {
    pub(super) fn any(self) -> bool {
        let tables = self.tokens || self.positions || self.token_types;
        tables || self.norm || self.lora.is_some()
    }
}

/// What is trained of a linear layer, and how a frozen W is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct TrainedLinear {
    pub(super) stored: Option<StoredFormat>,
    pub(super) lora: Option<LoraShape>,
    pub(super) weight: bool,
    pub(super) bias: bool,
}

/// The size of the weights that are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FrozenSize {
    /// Parameters of those that are not quantised.
    pub(super) parameters: u64,
    /// Bytes of the quantised ones.
    pub(super) quantized_bytes: u64,
}

impl TrainedLinear {
    /// The shape of a layer without a bias and without features, for `tokens` rows.
    pub(super) fn shape(self, tokens: usize, dropout: bool) -> LinearShape {
        LinearShape {
            tokens,
            in_features: 0,
            out_features: 0,
            r: self.lora.map(|lora| lora.r),
            lora_bias: self.lora.is_some_and(|lora| lora.bias),
            magnitude: self.lora.is_some_and(|lora| lora.magnitude),
            bias: false,
            stored: self.stored,
            trained: self.weight,
            bias_trained: self.bias,
            dropout: dropout && self.lora.is_some(),
        }
    }

    pub(super) fn any(self) -> bool {
        self.lora.is_some() || self.weight || self.bias
    }
}

impl TrainedBlock {
    pub(super) fn any_norm(&self) -> bool {
        let norms = [self.attention_norms, self.mlp_norms, self.qk_norms];
        norms.as_flattened().contains(&true)
    }

    pub(super) fn any(&self) -> bool {
        let linear = self.linears.iter().any(|linear| linear.any());
        self.any_norm() || linear || self.experts.contains(&true)
    }
}

/// Whether both embeddings of the adapted model read one tensor.
pub(super) fn is_tied(architecture: &Architecture, adaptation: &Adaptation) -> bool {
    let tensors = architecture.tied_tensors();
    let copied = tensors.iter().any(|tensor| adaptation.trains(tensor));
    architecture.tie_word_embeddings && !(adaptation.unties && copied)
}

/// What is trained of a model, by name.
pub(super) struct TrainedNames<'a> {
    /// The adapter on the layer of this path.
    pub(super) lora: &'a dyn Fn(&str) -> Option<LoraShape>,
    /// Whether the tensor of this name is trained.
    pub(super) weight: &'a dyn Fn(&str) -> bool,
    /// Whether the output embedding is the input embedding's tensor.
    pub(super) tied: bool,
}

impl TrainedNames<'_> {
    /// Whether the weight or the bias of a norm is trained.
    pub(super) fn norm(&self, path: &str) -> bool {
        (self.weight)(&format!("{path}.weight")) || (self.weight)(&format!("{path}.bias"))
    }

    /// The format of the tensor `name` if it is quantised, and not trained.
    pub(super) fn stored_format(
        &self,
        architecture: &Architecture,
        name: &str,
    ) -> Option<StoredFormat> {
        let format = architecture.stored_formats.get(name).copied();
        format.filter(|_| !(self.weight)(name))
    }

    /// The size of those `tensors` that are not trained.
    pub(super) fn frozen_size(
        &self,
        architecture: &Architecture,
        tensors: &[TensorShape],
    ) -> FrozenSize {
        let mut size = FrozenSize::default();
        for tensor in tensors.iter().filter(|tensor| !(self.weight)(&tensor.name)) {
            let format = self.stored_format(architecture, &tensor.name);
            match (format, &*tensor.shape) {
                (Some(format), [rows, columns]) => {
                    let bytes = format.bytes_of_matrix(*rows, *columns);
                    size.quantized_bytes += bytes.unwrap_or(usize::MAX) as u64;
                }
                _ => size.parameters += tensor.parameters(),
            }
        }
        size
    }

    pub(super) fn embedding(&self, architecture: &Architecture) -> TrainedEmbedding {
        let (names, parts) = (&architecture.names, &architecture.embedding_parts);
        let part = |name: Option<&str>| {
            name.is_some_and(|name| (self.weight)(&format!("{}.weight", names.base_path(name))))
        };
        TrainedEmbedding {
            tokens: part(Some(names.embed_tokens)),
            positions: part(parts.positions.map(|table| table.name)),
            token_types: part(parts.token_types.map(|table| table.name)),
            norm: parts
                .norm
                .is_some_and(|name| self.norm(&names.base_path(name))),
            lora: (self.lora)(&names.embed_tokens_path()),
            stored: self.stored_format(
                architecture,
                &format!("{}.weight", names.embed_tokens_path()),
            ),
        }
    }

    /// The layers of the head; a tied one is the embedding's tensor.
    pub(super) fn head(&self, architecture: &Architecture) -> Vec<TrainedLinear> {
        let embed_tokens = architecture.names.embed_tokens_path();
        let layer = |layer: LinearSpec| {
            let path = layer.name;
            let weight = if self.tied { &embed_tokens } else { path };
            let stored = self.stored_format(architecture, &format!("{weight}.weight"));
            TrainedLinear {
                stored,
                lora: (self.lora)(path),
                weight: (self.weight)(&format!("{weight}.weight")),
                bias: layer.bias && (self.weight)(&format!("{path}.bias")),
            }
        };
        architecture.head_linears().into_iter().map(layer).collect()
    }

    pub(super) fn block(&self, architecture: &Architecture, layer: usize) -> TrainedBlock {
        let path = architecture.names.block_path(layer);
        let weight = |name: &str| (self.weight)(&format!("{path}.{name}.weight"));
        let norm =
            |name: Option<&str>| name.is_some_and(|name| self.norm(&format!("{path}.{name}")));
        let norms = |norms: BranchNorms| [norm(norms.input), norm(norms.output)];
        let stored =
            |name: &str| self.stored_format(architecture, &format!("{path}.{name}.weight"));
        let linear = |linear: &LinearSpec| TrainedLinear {
            stored: stored(linear.name),
            lora: (self.lora)(&format!("{path}.{}", linear.name)),
            weight: weight(linear.name),
            bias: linear.bias && (self.weight)(&format!("{path}.{}.bias", linear.name)),
        };
        let qk_norm = |name: &'static str| norm(architecture.qk_norm.map(|_| name));
        TrainedBlock {
            linears: architecture.linears(layer).map(linear),
            experts: if architecture.layers[layer].sparse {
                let stack = |name: &str| (self.weight)(&format!("{path}.{name}"));
                ModuleNames::EXPERTS.map(|name| weight(name) || stack(name))
            } else {
                [false; 3]
            },
            attention_norms: norms(architecture.attention_norms),
            mlp_norms: norms(architecture.mlp_norms),
            qk_norms: architecture.names.qk_norms.map(qk_norm),
        }
    }
}
