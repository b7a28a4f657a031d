//! The extent of a backward pass: a gradient is computed only if it leads to a trained weight.

use std::ops::Range;

use super::linears::Linears;

/// The part of a model that a backward pass visits: the blocks from the last down to the lowest
/// trained one, then the embedding if that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BackwardRange {
    /// The lowest block visited; the number of blocks if there is none.
    pub(super) first_block: usize,
    /// Blocks of the model.
    pub(super) blocks: usize,
    /// Whether the embedding is trained.
    pub(super) embedding: bool,
}

impl BackwardRange {
    /// `trained`: for each block, whether it holds trained values.
    pub(super) fn new(mut trained: impl ExactSizeIterator<Item = bool>, embedding: bool) -> Self {
        let blocks = trained.len();
        let lowest = trained.position(|trained| trained).unwrap_or(blocks);
        Self {
            first_block: if embedding { 0 } else { lowest },
            blocks,
            embedding,
        }
    }

    /// Whether nothing below the head is trained.
    pub(super) fn is_empty(self) -> bool {
        self.first_block == self.blocks && !self.embedding
    }

    /// The blocks visited.
    pub(super) fn visited(self) -> Range<usize> {
        self.first_block..self.blocks
    }

    /// Whether the input gradient of `block` is needed.
    pub(super) fn needs_input_gradient(self, block: usize) -> bool {
        block > self.first_block || self.embedding
    }
}

/// The gradients that a block's backward pass computes: those that lead to a trained weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BackwardNeeds {
    /// The gradient of the block's input.
    pub(super) input: bool,
    /// The gradients of q, k and v.
    pub(super) qkv: bool,
    /// The gradient of the attention's output.
    pub(super) attention: bool,
    /// The gradients of gate and up.
    pub(super) gate: bool,
    /// The gradient of the normalised input of gate and up.
    pub(super) mlp_input_gradient: bool,
    /// The normalised input of q, k and v, recomputed for their gradients.
    pub(super) qkv_input: bool,
    /// The normalised input of gate and up, recomputed for their gradients.
    pub(super) mlp_input: bool,
}

impl BackwardNeeds {
    /// `trained`: which linear layers hold trained values; `input`: whether the gradient of the
    /// block's input is needed; `parallel`: whether attention and MLP both read it.
    pub(super) fn new(trained: &Linears<bool>, input: bool, parallel: bool) -> Self {
        let qkv_input = trained.qkv.contains(&true);
        let mlp_input = trained.gate_up.contains(&true);
        let qkv = input || qkv_input;
        let attention = qkv || trained.o;
        let mlp_input_gradient = if parallel { input } else { attention };
        Self {
            input,
            qkv,
            attention,
            gate: mlp_input_gradient || mlp_input,
            mlp_input_gradient,
            qkv_input,
            mlp_input,
        }
    }
}
