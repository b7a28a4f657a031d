//! `Architecture` and batch sizes -> `Work`: the forecast of what the decoder executes, op by op.
//!
//! Sums the very cost functions that the running ops add to the counter, so that forecast and execution are equal, not close.

use std::ops::Range;

use super::architecture::Architecture;
use super::linears::{LINEAR_NAMES, Linears, Needs};
use crate::adapter::Site;
use crate::error::Result;
use crate::ops::{
    LinearShape, LmHeadShape, RopeTables, attention_backward_cost, attention_decode_cost,
    attention_forward_cost, dtype, embedding_backward_cost, embedding_cost, residual_cost,
    rms_norm_backward_cost, rms_norm_cost, swiglu_backward_cost, swiglu_cost,
};
use crate::work::{Precision, Work};

/// How many blocks' activations are computed again in the backward pass: only their input is kept, and their forward pass runs twice.
///
/// They are the lowest of the blocks that the backward pass walks: when it comes to them, what the others kept is free again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recompute(usize);

impl Recompute {
    /// In no block.
    pub const NONE: Self = Self(0);
    /// In every block.
    pub const ALL: Self = Self(usize::MAX);

    /// In the lowest `blocks` of those that the backward pass walks; in all of them where there are fewer.
    pub fn lowest(blocks: usize) -> Self {
        Self(blocks)
    }

    /// In how many of `walked` blocks.
    pub fn count(self, backward_blocks: usize) -> usize {
        self.0.min(backward_blocks)
    }
}

/// A decoder's sizes together with what is trained in it: all that the cost of a step depends on, beside the batch.
#[derive(Debug, Clone)]
pub struct ModelShape {
    architecture: Architecture,
    /// Rank of the adapter on each linear layer, by block.
    ranks: Vec<Linears<Option<usize>>>,
    all_trained: bool,
    dropout: bool,
    precision: Precision,
}

impl ModelShape {
    /// The shape with adapters on `sites`.
    pub fn with_adapters(
        architecture: &Architecture,
        sites: &[Site],
        dropout: bool,
        precision: Precision,
    ) -> Result<Self> {
        let rank_at = |layer: usize, name: &&str| {
            let path = format!("model.layers.{layer}.{name}");
            Ok(sites
                .iter()
                .find(|site| site.path == path)
                .map(|site| site.r))
        };
        let ranks = (0..architecture.num_hidden_layers)
            .map(|layer| LINEAR_NAMES.try_map(|name| rank_at(layer, name)))
            .collect::<Result<_>>()?;
        Ok(Self::new(architecture, ranks, false, dropout, precision))
    }

    /// The shape with adapters of these ranks, by block, or with every weight trained.
    pub(super) fn new(
        architecture: &Architecture,
        ranks: Vec<Linears<Option<usize>>>,
        all_trained: bool,
        dropout: bool,
        precision: Precision,
    ) -> Self {
        Self {
            architecture: architecture.clone(),
            ranks,
            all_trained,
            dropout,
            precision,
        }
    }

    /// The shape with every weight trained.
    pub fn fully_trained(architecture: &Architecture, precision: Precision) -> Result<Self> {
        Ok(Self {
            all_trained: true,
            ..Self::with_adapters(architecture, &[], false, precision)?
        })
    }

    /// The architecture it was made from.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The first block whose backward pass runs, and whether its input gradient is wanted (only where the embedding is trained).
    pub(super) fn first_trainable_layer(&self) -> (usize, bool) {
        let trains = |ranks: &Linears<Option<usize>>| ranks.each().iter().any(|r| r.is_some());
        match self.all_trained {
            true => (0, true),
            false => (
                self.ranks
                    .iter()
                    .position(trains)
                    .unwrap_or(self.ranks.len()),
                false,
            ),
        }
    }

    /// Blocks whose backward pass runs.
    pub fn backward_blocks(&self) -> usize {
        self.architecture.num_hidden_layers - self.first_trainable_layer().0
    }

    /// Format of matrix-product inputs.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether the weights themselves are trained, rather than adapters beside them.
    pub fn all_trained(&self) -> bool {
        self.all_trained
    }

    /// Bytes that the block `layer` keeps of `tokens` tokens for its backward pass. In the compute type: its input, q, k, v, the mix, x1, gate,
    /// up. In f32: what each adapter's A makes. A mask has a bit for
    /// each number.
    pub(super) fn saved_bytes(&self, layer: usize, tokens: usize) -> u64 {
        let a = &self.architecture;
        let (q, kv) = (
            a.attention.heads * a.attention.head_dim,
            a.attention.kv_heads * a.attention.head_dim,
        );
        let narrow = 2 * (a.hidden_size + q + kv + a.intermediate_size);
        let wide = |shape: &LinearShape| {
            shape.r.map_or(0, |r| {
                r + if shape.dropout {
                    shape.in_features.div_ceil(32)
                } else {
                    0
                }
            })
        };
        let wide: usize = self
            .linears(layer, tokens, self.dropout)
            .each()
            .into_iter()
            .map(wide)
            .sum();
        (tokens * (narrow * dtype(self.precision).size_in_bytes() + 4 * wide)) as u64
    }

    fn linears(&self, layer: usize, tokens: usize, dropout: bool) -> Linears<LinearShape> {
        let ranks = &self.ranks[layer];
        let of = |name: &str, r: Option<usize>| {
            let (out_features, in_features) = self.architecture.linear_sizes(name);
            let (bias, trained) = (self.architecture.linear_bias(name), self.all_trained);
            LinearShape {
                tokens,
                in_features,
                out_features,
                r,
                bias,
                trained,
                dropout: dropout && r.is_some(),
            }
        };
        Linears {
            q_proj: of(LINEAR_NAMES.q_proj, ranks.q_proj),
            k_proj: of(LINEAR_NAMES.k_proj, ranks.k_proj),
            v_proj: of(LINEAR_NAMES.v_proj, ranks.v_proj),
            o_proj: of(LINEAR_NAMES.o_proj, ranks.o_proj),
            gate_proj: of(LINEAR_NAMES.gate_proj, ranks.gate_proj),
            up_proj: of(LINEAR_NAMES.up_proj, ranks.up_proj),
            down_proj: of(LINEAR_NAMES.down_proj, ranks.down_proj),
        }
    }

    fn block_forward(&self, layer: usize, segments: &[usize], dropout: bool) -> Work {
        let attention = attention_forward_cost(&self.architecture.attention, segments);
        self.block_without_attention(layer, segments.iter().sum(), dropout) + attention
    }

    fn block_without_attention(&self, layer: usize, n: usize, dropout: bool) -> Work {
        let a = &self.architecture;
        let (q, kv) = (
            a.attention.heads * a.attention.head_dim,
            a.attention.kv_heads * a.attention.head_dim,
        );
        let linears = self.linears(layer, n, dropout);
        let mut work: Work = linears
            .each()
            .iter()
            .map(|shape| shape.forward_cost(self.precision))
            .sum();
        work += &rms_norm_cost(n, a.hidden_size).times(2);
        work += &(RopeTables::cost(n, q) + RopeTables::cost(n, kv));
        work += &swiglu_cost(n * a.intermediate_size);
        work + residual_cost(n, a.hidden_size).times(2)
    }

    fn block_backward(&self, layer: usize, segments: &[usize], input: bool) -> Work {
        let a = &self.architecture;
        let n: usize = segments.iter().sum();
        let (q, kv) = (
            a.attention.heads * a.attention.head_dim,
            a.attention.kv_heads * a.attention.head_dim,
        );
        let shapes = self.linears(layer, n, self.dropout);
        let trains = Linears {
            q_proj: trains(&shapes.q_proj),
            k_proj: trains(&shapes.k_proj),
            v_proj: trains(&shapes.v_proj),
            o_proj: trains(&shapes.o_proj),
            gate_proj: trains(&shapes.gate_proj),
            up_proj: trains(&shapes.up_proj),
            down_proj: trains(&shapes.down_proj),
        };
        let needs = Needs::new(&trains, input);
        let linear = |shape: &LinearShape, input: bool| shape.backward_cost(self.precision, input);
        let mut work = linear(&shapes.down_proj, needs.gate);
        // What a trained layer read is made again from what was kept.
        if trains.down_proj {
            work += &swiglu_cost(n * a.intermediate_size);
        }
        if needs.gate {
            work += &swiglu_backward_cost(n * a.intermediate_size);
            work += &(linear(&shapes.gate_proj, needs.attention)
                + linear(&shapes.up_proj, needs.attention));
            if trains.gate_proj || trains.up_proj {
                work += &rms_norm_cost(n, a.hidden_size);
            }
        }
        if needs.attention {
            work += &(rms_norm_backward_cost(n, a.hidden_size, self.all_trained)
                + residual_cost(n, a.hidden_size).times(2));
            work += &linear(&shapes.o_proj, needs.qkv);
        }
        if needs.qkv {
            work += &attention_backward_cost(&a.attention, segments);
            work += &(RopeTables::cost(n, q) + RopeTables::cost(n, kv));
            for shape in [&shapes.q_proj, &shapes.k_proj, &shapes.v_proj] {
                work += &linear(shape, needs.input);
            }
            if trains.q_proj || trains.k_proj || trains.v_proj {
                work += &rms_norm_cost(n, a.hidden_size);
            }
        }
        if needs.input {
            work += &(rms_norm_backward_cost(n, a.hidden_size, self.all_trained)
                + residual_cost(n, a.hidden_size).times(3));
        }
        work
    }

    fn head(&self, loss_tokens: usize) -> LmHeadShape {
        let (hidden, vocab) = (self.architecture.hidden_size, self.architecture.vocab_size);
        LmHeadShape {
            loss_tokens,
            hidden,
            vocab,
            trained: self.all_trained,
        }
    }

    fn blocks_forward(&self, segments: &[usize], loss_tokens: usize, dropout: bool) -> Work {
        let c = self.architecture.hidden_size;
        let around = embedding_cost(segments.iter().sum(), c)
            + gather_cost(loss_tokens, c)
            + rms_norm_cost(loss_tokens, c);
        around
            + self.sum_over_blocks(0..self.architecture.num_hidden_layers, |layer| {
                self.block_forward(layer, segments, dropout)
            })
    }

    /// The sum over these blocks, of which neighbours with the same adapters have the same `work`.
    fn sum_over_blocks(&self, blocks: Range<usize>, work: impl Fn(usize) -> Work) -> Work {
        let mut first = blocks.start;
        let alike = self.ranks[blocks].chunk_by(|a, b| a == b).map(|run| {
            first += run.len();
            work(first - run.len()).times(run.len() as u64)
        });
        alike.sum()
    }

    /// Work of the losses of one micro-batch.
    pub fn evaluation(&self, segments: &[usize], loss_tokens: usize) -> Work {
        self.blocks_forward(segments, loss_tokens, false)
            + self.head(loss_tokens).forward_cost(self.precision)
    }

    /// Work of the losses and gradients of one micro-batch.
    pub fn training(&self, segments: &[usize], loss_tokens: usize, recompute: Recompute) -> Work {
        let c = self.architecture.hidden_size;
        let n = segments.iter().sum();
        let (end, input) = self.first_trainable_layer();
        let any = end < self.architecture.num_hidden_layers || input;
        let mut work = self.blocks_forward(segments, loss_tokens, self.dropout);
        work += &self.head(loss_tokens).backward_cost(self.precision, any);
        if any {
            work += &(rms_norm_backward_cost(loss_tokens, c, self.all_trained)
                + scatter_cost(n, loss_tokens, c));
        }
        let (blocks, again) = (
            self.architecture.num_hidden_layers,
            end + recompute.count(self.backward_blocks()),
        );
        work += &self.sum_over_blocks(end..again, |layer| {
            self.block_forward(layer, segments, self.dropout)
        });
        if end < blocks {
            work += &self.block_backward(end, segments, input);
            work += &self.sum_over_blocks(end + 1..blocks, |layer| {
                self.block_backward(layer, segments, true)
            });
        }
        if input {
            work += &embedding_backward_cost(n, c, self.architecture.vocab_size);
        }
        work
    }

    /// Work of reading a prompt of `tokens` tokens and the logits that follow it.
    pub fn prefill(&self, tokens: usize) -> Work {
        let a = &self.architecture;
        let mut work = embedding_cost(tokens, a.hidden_size) + rms_norm_cost(1, a.hidden_size);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_forward(layer, &[tokens], false)
        });
        work + Work::product(1, a.vocab_size, a.hidden_size, self.precision)
    }

    /// Work of generating one token after `before` others are cached.
    pub fn decoding(&self, before: usize) -> Work {
        let a = &self.architecture;
        let mut work = embedding_cost(1, a.hidden_size) + rms_norm_cost(1, a.hidden_size);
        let attention = attention_decode_cost(&a.attention, before + 1);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_without_attention(layer, 1, false) + attention.clone()
        });
        work + Work::product(1, a.vocab_size, a.hidden_size, self.precision)
    }
}

fn trains(shape: &LinearShape) -> bool {
    shape.r.is_some() || shape.trained
}

/// Work of picking n rows of c.
pub(super) fn gather_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
}

/// Work of putting `rows` rows of c back among n.
pub(super) fn scatter_cost(n: usize, rows: usize, c: usize) -> Work {
    Work::sweep(4 * n * c + 8 * rows * c, rows * c)
}
