//! `Architecture` and batch sizes -> `Work`: the forecast of what the decoder executes, op by op.
//!
//! Sums the same cost functions that the running ops add to the counter: forecast and execution are
//! equal, not close.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::architecture::{Architecture, LinearSpec};
use super::backward::{BackwardNeeds, BackwardRange};
use super::linears::Linears;
use super::residual::{BranchNorms, BranchShape};
use crate::adapter::Site;
use crate::ops::{
    LinearShape, LmHeadShape, attention_backward_cost, attention_decode_cost,
    attention_forward_cost, columns_cost, dtype, embedding_backward_cost, embedding_cost,
    norm_backward_cost, norm_cost, residual_cost, rope_cost, scale_cost,
};
use crate::work::{Precision, Work};

/// Activation checkpointing (Chen et al. 2016): of this many blocks only the input is saved, and
/// their forward pass runs again in the backward pass.
///
/// They are the lowest of the blocks that the backward pass visits: by then the memory of the
/// others is free again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recompute(usize);

impl Recompute {
    /// In no block.
    pub const NONE: Self = Self(0);
    /// In every block.
    pub const ALL: Self = Self(usize::MAX);

    /// In the lowest `blocks` of those that the backward pass visits, or in all of them if there
    /// are fewer.
    pub fn lowest(blocks: usize) -> Self {
        Self(blocks)
    }

    /// In how many of the `visited` blocks.
    pub fn count(self, visited: usize) -> usize {
        self.0.min(visited)
    }
}

/// The tokens of a micro-batch, and the lengths of the segments that attend to themselves.
#[derive(Clone, Copy)]
struct Rows<'a> {
    tokens: usize,
    segments: &'a [usize],
}

impl<'a> Rows<'a> {
    fn of(segments: &'a [usize]) -> Self {
        Self {
            tokens: segments.iter().sum(),
            segments,
        }
    }
}

/// A decoder's sizes and trained weights: with the batch, everything that the cost of a step
/// depends on.
#[derive(Debug, Clone)]
pub struct ModelShape {
    architecture: Architecture,
    /// Rank of the adapter on each linear layer, by block.
    ranks: Vec<Linears<Option<usize>>>,
    /// For each block the first one that does the same work.
    alike: Vec<usize>,
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
    ) -> Self {
        let by_path: HashMap<&str, usize> = sites
            .iter()
            .map(|site| (site.path.as_str(), site.r))
            .collect();
        let linears = architecture.linears();
        let rank = |block: &str, linear: &LinearSpec| {
            let path = format!("{block}.{}", linear.name);
            by_path.get(path.as_str()).copied()
        };
        let ranks = (0..architecture.num_hidden_layers)
            .map(|layer| architecture.names.block_path(layer))
            .map(|block| linears.map(|linear| rank(&block, linear)))
            .collect();
        Self::new(architecture, ranks, false, dropout, precision)
    }

    /// The shape with adapters of these ranks, by block, or with every weight trained.
    pub(super) fn new(
        architecture: &Architecture,
        ranks: Vec<Linears<Option<usize>>>,
        all_trained: bool,
        dropout: bool,
        precision: Precision,
    ) -> Self {
        let alike = |layer: usize| {
            let same = |other: &usize| {
                let [a, b] = [layer, *other].map(|i| (architecture.layers[i], &ranks[i]));
                a == b
            };
            (0..layer).find(same).unwrap_or(layer)
        };
        Self {
            architecture: architecture.clone(),
            alike: (0..ranks.len()).map(alike).collect(),
            ranks,
            all_trained,
            dropout,
            precision,
        }
    }

    /// The shape with every weight trained.
    pub fn fully_trained(architecture: &Architecture, precision: Precision) -> Self {
        Self {
            all_trained: true,
            ..Self::with_adapters(architecture, &[], false, precision)
        }
    }

    /// The architecture it was made from.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The blocks that the backward pass visits.
    fn backward_range(&self) -> BackwardRange {
        let trained = self
            .ranks
            .iter()
            .map(|ranks| ranks.iter().any(Option::is_some));
        BackwardRange::new(trained, self.all_trained)
    }

    /// The number of blocks that the backward pass visits.
    pub fn backward_blocks(&self) -> usize {
        self.backward_range().visited().len()
    }

    /// Format of matrix-product inputs.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether the weights are trained, rather than adapters on them.
    pub fn all_trained(&self) -> bool {
        self.all_trained
    }

    /// Bytes that block `layer` saves for the backward pass of `tokens` tokens. In the compute
    /// type: its input, q, k, v, the attention's output, x1, gate, up if there is one; the inputs of
    /// other norms.
    /// In f32: x A^T of each adapter. One bit an element: dropout masks.
    pub(super) fn saved_bytes(&self, layer: usize, tokens: usize) -> u64 {
        let a = &self.architecture;
        let (q, kv) = self.head_widths();
        let outputs = [a.attention_norms.output, a.mlp_norms.output];
        let before_norms =
            outputs.iter().flatten().count() * a.hidden_size + a.qk_norm.map_or(0, |_| q + kv);
        // Parallel branches save one input, of which each rounds a copy.
        let inputs = 2 - usize::from(a.parallel && self.precision == Precision::F32);
        let inner = a.inner_parts() * a.intermediate_size;
        let compute_type = inputs * a.hidden_size + 2 * (q + kv) + inner + before_norms;
        let adapter = |shape: &LinearShape| {
            let mask = if shape.dropout {
                shape.in_features.div_ceil(32)
            } else {
                0
            };
            shape.r.map_or(0, |r| r + mask)
        };
        let shapes = self.linears(layer, tokens, self.dropout);
        let words: usize = shapes.iter().map(adapter).sum();
        let element = dtype(self.precision).size_in_bytes();
        (tokens * (compute_type * element + 4 * words)) as u64
    }

    /// Columns of q, and of k or v.
    fn head_widths(&self) -> (usize, usize) {
        let attention = &self.architecture.attention;
        (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
        )
    }

    /// Shapes of the linear layers of block `layer` for `tokens` rows.
    fn linears(&self, layer: usize, tokens: usize, dropout: bool) -> Linears<LinearShape> {
        let mut ranks = self.ranks[layer].iter();
        self.architecture.linears().map(|linear| {
            let r = ranks.next().copied().flatten();
            LinearShape {
                tokens,
                in_features: linear.in_features,
                out_features: linear.out_features,
                r,
                bias: linear.bias,
                trained: self.all_trained,
                dropout: dropout && r.is_some(),
            }
        })
    }

    fn block_forward(&self, layer: usize, rows: Rows<'_>, dropout: bool) -> Work {
        let attention = self.architecture.attention(layer);
        self.block_without_attention(layer, rows.tokens, dropout)
            + attention_forward_cost(&attention, rows.segments)
    }

    fn block_without_attention(&self, layer: usize, n: usize, dropout: bool) -> Work {
        let a = &self.architecture;
        let (q, kv) = self.head_widths();
        let linears = self.linears(layer, n, dropout);
        let mut work: Work = linears
            .iter()
            .map(|shape| shape.forward_cost(self.precision))
            .sum();
        for branch in [a.attention_norms, a.mlp_norms] {
            work += &self.branch(n, branch).forward_cost();
        }
        if a.qk_norm.is_some() {
            work += &(norm_cost(a.norm_kind, n, q) + norm_cost(a.norm_kind, n, kv));
        }
        if let Some(rope) = a.layers[layer].rope {
            work += &self.rope_cost(rope, n);
        }
        work += &(fused_cost(&linears.qkv, 3) + fused_cost(&linears.gate_up, a.inner_parts()));
        work + a.activation.cost(n * a.intermediate_size, a.gated_mlp)
    }

    /// Work of rotating q and k of `n` tokens.
    fn rope_cost(&self, rope: usize, n: usize) -> Work {
        let (q, kv) = self.head_widths();
        let rope = &self.architecture.ropes[rope];
        let cost = |c: usize| rope_cost(n, c, c / rope.head_dim * rope.rotary_dim);
        cost(q) + cost(kv)
    }

    /// Attention or feed-forward layers' part around them, for `tokens` rows.
    fn branch(&self, tokens: usize, norms: BranchNorms) -> BranchShape {
        BranchShape {
            tokens,
            hidden: self.architecture.hidden_size,
            norms,
            norm_kind: self.architecture.norm_kind,
            factor: self.architecture.residual_factor,
            trained: self.all_trained,
        }
    }

    /// `input`: whether the gradient of the block's input is needed.
    fn block_backward(&self, layer: usize, rows: Rows<'_>, input: bool) -> Work {
        let a = &self.architecture;
        let n = rows.tokens;
        let (q, kv) = self.head_widths();
        let shapes = self.linears(layer, n, self.dropout);
        let trained = self.trained_linears(layer);
        let needs = BackwardNeeds::new(&trained, input, a.parallel);
        let linear = |shape: &LinearShape, input: bool| shape.backward_cost(self.precision, input);
        let [attention, mlp] = [a.attention_norms, a.mlp_norms].map(|norms| self.branch(n, norms));
        let mut work = mlp.output_backward_cost() + linear(&shapes.down, needs.gate);
        // The input of a trained layer is recomputed from what was saved.
        if trained.down {
            work += &a.activation.cost(n * a.intermediate_size, a.gated_mlp);
        }
        if needs.gate {
            work += &a
                .activation
                .backward_cost(n * a.intermediate_size, a.gated_mlp);
            work += &fused_cost(&shapes.gate_up, a.inner_parts());
            work += &self.inputs_backward(&shapes.gate_up, needs.mlp_input_gradient);
        }
        if needs.mlp_input {
            work += &mlp.recompute_cost();
        }
        if needs.mlp_input_gradient {
            work += &mlp.input_backward_cost();
        }
        if needs.attention {
            work += &(attention.output_backward_cost() + linear(&shapes.o, needs.qkv));
        }
        if needs.qkv {
            work += &attention_backward_cost(&a.attention(layer), rows.segments);
            if let Some(rope) = a.layers[layer].rope {
                work += &self.rope_cost(rope, n);
            }
            if a.qk_norm.is_some() {
                let cost =
                    |width: usize| norm_backward_cost(a.norm_kind, n, width, self.all_trained);
                work += &(cost(q) + cost(kv));
            }
            work += &fused_cost(&shapes.qkv, 3);
            work += &self.inputs_backward(&shapes.qkv, needs.input);
        }
        if needs.qkv_input {
            work += &attention.recompute_cost();
        }
        if needs.input {
            work += &attention.input_backward_cost();
        }
        work
    }

    /// Backward of layers that read one input; `input`: whether its gradient is needed, the sum of
    /// theirs.
    fn inputs_backward(&self, layers: &[LinearShape], input: bool) -> Work {
        let linear = |shape: &LinearShape| shape.backward_cost(self.precision, input);
        let work: Work = layers.iter().map(linear).sum();
        if !input {
            return work;
        }
        let addition = residual_cost(layers[0].tokens, layers[0].in_features);
        work + addition.times(layers.len() as u64 - 1)
    }

    fn head(&self, loss_tokens: usize) -> LmHeadShape {
        let (hidden, vocab) = (self.architecture.hidden_size, self.architecture.vocab_size);
        LmHeadShape {
            loss_tokens,
            hidden,
            vocab,
            trained: self.all_trained,
            softcap: self.architecture.logits_softcap.is_some(),
        }
    }

    fn embed_cost(&self, tokens: usize) -> Work {
        let a = &self.architecture;
        embedding_cost(tokens, a.hidden_size)
            + scale_cost(tokens, a.hidden_size, a.embedding_factor(self.precision))
    }

    fn blocks_forward(&self, rows: Rows<'_>, dropout: bool) -> Work {
        self.embed_cost(rows.tokens)
            + self.sum_over_blocks(0..self.architecture.num_hidden_layers, |layer| {
                self.block_forward(layer, rows, dropout)
            })
    }

    /// The rows with a loss, and the norm before the output embedding.
    fn final_norm(&self, loss_tokens: usize) -> Work {
        let c = self.architecture.hidden_size;
        gather_cost(loss_tokens, c) + norm_cost(self.architecture.norm_kind, loss_tokens, c)
    }

    /// The sum of `work(layer)` over these blocks, evaluated once for blocks that are alike.
    fn sum_over_blocks(&self, blocks: Range<usize>, work: impl Fn(usize) -> Work) -> Work {
        let each = |(layer, count): (usize, u64)| work(layer).times(count);
        self.counted(blocks).into_iter().map(each).sum()
    }

    /// Of each kind of block among `blocks` the first block, and how many there are.
    fn counted(&self, blocks: impl Iterator<Item = usize>) -> BTreeMap<usize, u64> {
        let mut counts = BTreeMap::new();
        for block in blocks {
            *counts.entry(self.alike[block]).or_default() += 1;
        }
        counts
    }

    /// Which linear layers of block `layer` are trained.
    fn trained_linears(&self, layer: usize) -> Linears<bool> {
        self.ranks[layer].map(|rank| rank.is_some() || self.all_trained)
    }

    /// Work of the losses of one micro-batch; `segments`: the length of each.
    pub fn evaluation(&self, segments: &[usize], loss_tokens: usize) -> Work {
        self.blocks_forward(Rows::of(segments), false)
            + self.final_norm(loss_tokens)
            + self.head(loss_tokens).forward_cost(self.precision)
    }

    /// Work of the losses and gradients of one micro-batch; `segments`: the length of each.
    pub fn training(&self, segments: &[usize], loss_tokens: usize, recompute: Recompute) -> Work {
        let rows = Rows::of(segments);
        self.rows_training(rows, recompute)
            + self.losses_training(loss_tokens)
            + self.scatter_training(rows.tokens, loss_tokens)
    }

    /// The part of [`ModelShape::training`] that depends on the number of tokens alone.
    pub fn tokens_training(&self, tokens: usize, recompute: Recompute) -> Work {
        let rows = Rows {
            tokens,
            segments: &[],
        };
        self.rows_training(rows, recompute)
    }

    /// The attention of [`ModelShape::training`] for segments of these lengths: the work of each kind of pass with its count. Its
    /// products add up over segments; its sweeps are as large as those of all segments together.
    pub fn attention_training(&self, segments: &[usize], recompute: Recompute) -> Vec<(Work, u64)> {
        let backward = self.backward_range();
        let visited = backward.visited();
        let recomputed = visited.start..visited.start + recompute.count(visited.len());
        let forward = (0..self.architecture.num_hidden_layers).chain(recomputed);
        let reaches_attention = |layer: &usize| {
            let input = backward.needs_input_gradient(*layer);
            BackwardNeeds::new(
                &self.trained_linears(*layer),
                input,
                self.architecture.parallel,
            )
            .qkv
        };
        let attention = |layer| self.architecture.attention(layer);
        let forward = self.counted(forward).into_iter().map(|(layer, count)| {
            let work = attention_forward_cost(&attention(layer), segments);
            (work, count)
        });
        let walked = visited.clone().filter(reaches_attention);
        let backward = self.counted(walked).into_iter().map(|(layer, count)| {
            let work = attention_backward_cost(&attention(layer), segments);
            (work, count)
        });
        forward.chain(backward).collect()
    }

    /// The part of [`ModelShape::training`] that depends on the number of losses alone.
    pub fn losses_training(&self, loss_tokens: usize) -> Work {
        let a = &self.architecture;
        let is_walked = !self.backward_range().is_empty();
        let mut work = self.final_norm(loss_tokens);
        work += &self
            .head(loss_tokens)
            .backward_cost(self.precision, is_walked);
        if is_walked {
            let c = a.hidden_size;
            work += &norm_backward_cost(a.norm_kind, loss_tokens, c, self.all_trained);
        }
        work
    }

    /// The part of [`ModelShape::training`] that depends on both: the gradients of the rows with a loss among all rows.
    pub fn scatter_training(&self, tokens: usize, loss_tokens: usize) -> Work {
        if self.backward_range().is_empty() {
            return Work::default();
        }
        scatter_cost(tokens, loss_tokens, self.architecture.hidden_size)
    }

    /// Embedding and blocks, forward and backward.
    fn rows_training(&self, rows: Rows<'_>, recompute: Recompute) -> Work {
        let c = self.architecture.hidden_size;
        let n = rows.tokens;
        let backward = self.backward_range();
        let visited = backward.visited();
        let mut work = self.blocks_forward(rows, self.dropout);
        let recomputed = visited.start..visited.start + recompute.count(visited.len());
        work += &self.sum_over_blocks(recomputed, |layer| {
            self.block_forward(layer, rows, self.dropout)
        });
        if !visited.is_empty() {
            let first = visited.start;
            work += &self.block_backward(first, rows, backward.needs_input_gradient(first));
            work += &self.sum_over_blocks(first + 1..visited.end, |layer| {
                self.block_backward(layer, rows, true)
            });
        }
        if backward.embedding {
            work += &scale_cost(n, c, self.architecture.embedding_factor(self.precision));
            work += &embedding_backward_cost(n, c, self.architecture.vocab_size);
        }
        work
    }

    /// Work of reading a prompt of `tokens` tokens and the logits that follow it.
    pub fn prefill(&self, tokens: usize) -> Work {
        let a = &self.architecture;
        let mut work = self.embed_cost(tokens) + norm_cost(a.norm_kind, 1, a.hidden_size);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_forward(layer, Rows::of(&[tokens]), false)
        });
        work + self.head(1).logits_cost(self.precision)
    }

    /// Work of generating one token when `before` tokens are cached; of reading them all again where
    /// their rotations end.
    pub fn decoding(&self, before: usize) -> Work {
        let a = &self.architecture;
        if a.rotations_end_at(before) {
            return self.prefill(before + 1);
        }
        let mut work = self.embed_cost(1) + norm_cost(a.norm_kind, 1, a.hidden_size);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_without_attention(layer, 1, false)
                + attention_decode_cost(&a.attention(layer), before + 1)
        });
        work + self.head(1).logits_cost(self.precision)
    }
}

/// Work of splitting the columns of one layer into `parts`, or of joining them.
fn fused_cost(layers: &[LinearShape], parts: usize) -> Work {
    match layers {
        [fused] if parts > 1 => columns_cost(fused.tokens, fused.out_features),
        _ => Work::default(),
    }
}

/// Work of gathering n rows of c elements.
pub(super) fn gather_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
}

/// Work of scattering `rows` rows of c elements into n rows.
pub(super) fn scatter_cost(n: usize, rows: usize, c: usize) -> Work {
    Work::sweep(4 * n * c + 8 * rows * c, rows * c)
}
