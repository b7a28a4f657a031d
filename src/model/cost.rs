//! `Architecture` and batch sizes -> `Work`: the forecast of what the decoder executes, op by op.
//!
//! Sums the same cost functions that the running ops add to the counter: forecast and execution are
//! equal, not close.

mod head;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::architecture::{Architecture, TensorShape};
use super::backward::{BackwardNeeds, BackwardRange};
use super::linears::Linears;
use super::recompute::Recompute;
use super::residual::{BranchNorms, BranchShape};
use super::trained::{
    FrozenSize, TrainedBlock, TrainedEmbedding, TrainedLinear, TrainedNames, is_tied,
};
use crate::adapter::{Adaptation, Site};
use crate::ops::{
    ExpertsShape, LinearShape, LoraShape, attention_backward_cost, attention_decode_cost,
    attention_forward_cost, columns_cost, dtype, norm_backward_cost, norm_cost, residual_cost,
    rope_cost, scatter_cost,
};
use crate::work::{Precision, Work};

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
    /// What is trained of each block.
    blocks: Vec<TrainedBlock>,
    /// For each block the first one that does the same work.
    alike: Vec<usize>,
    embedding: TrainedEmbedding,
    norm_trained: bool,
    /// Of the layers of the head, the output last.
    head: Vec<TrainedLinear>,
    frozen: FrozenSize,
    /// Rows of the input and of the output embedding that are trained alone.
    pub(super) token_rows: [usize; 2],
    /// Initial factors that are kept because the base weights have lost them.
    kept_factors: u64,
    dropout: bool,
    precision: Precision,
}

impl ModelShape {
    /// The shape of a model that `adaptation` adapts.
    pub fn with_adapters(
        architecture: &Architecture,
        adaptation: &Adaptation,
        dropout: bool,
        precision: Precision,
    ) -> Self {
        let lora = |site: &Site| LoraShape {
            r: site.r,
            bias: adaptation.lora_bias,
            magnitude: adaptation.use_dora,
        };
        let sites = adaptation.sites.iter();
        let factors = sites
            .clone()
            .map(|site| site.r * (site.in_features + site.out_features));
        let kept_factors = factors.sum::<usize>() * usize::from(adaptation.init.changes_the_base());
        let adapters: HashMap<&str, LoraShape> =
            sites.map(|site| (site.path.as_str(), lora(site))).collect();
        let trained = TrainedNames {
            lora: &|path| adapters.get(path).copied(),
            weight: &|tensor| adaptation.trains(tensor),
            tied: is_tied(architecture, adaptation),
        };
        let names = &architecture.names;
        let embeddings = [names.embed_tokens_path(), names.lm_head.to_string()];
        Self {
            kept_factors: kept_factors as u64,
            token_rows: embeddings.map(|path| adaptation.token_rows(&path)),
            ..Self::new(architecture, &trained, dropout, precision)
        }
    }

    /// The shape with every weight trained.
    pub fn fully_trained(architecture: &Architecture, precision: Precision) -> Self {
        let trained = TrainedNames {
            lora: &|_| None,
            weight: &|_| true,
            tied: architecture.tie_word_embeddings,
        };
        Self::new(architecture, &trained, false, precision)
    }

    pub(super) fn new(
        architecture: &Architecture,
        trained: &TrainedNames<'_>,
        dropout: bool,
        precision: Precision,
    ) -> Self {
        let blocks: Vec<_> = (0..architecture.num_hidden_layers)
            .map(|layer| trained.block(architecture, layer))
            .collect();
        let alike = |layer: usize| {
            let same = |other: &usize| {
                let [a, b] = [layer, *other].map(|i| (architecture.layers[i], &blocks[i]));
                a == b
            };
            (0..layer).find(same).unwrap_or(layer)
        };
        let [head, _] = architecture.tied_tensors();
        let mut tensors = architecture.tensors();
        if architecture.tie_word_embeddings && !trained.tied {
            tensors.push(TensorShape {
                name: head.clone(),
                shape: vec![architecture.vocab_size, architecture.hidden_size],
                transposed: false,
            });
        }
        Self {
            alike: (0..blocks.len()).map(alike).collect(),
            blocks,
            embedding: trained.embedding(architecture),
            norm_trained: architecture
                .names
                .norm_path()
                .is_some_and(|path| trained.norm(&path)),
            head: trained.head(architecture),
            frozen: trained.frozen_size(architecture, &tensors),
            architecture: architecture.clone(),
            token_rows: [0; 2],
            kept_factors: 0,
            dropout,
            precision,
        }
    }

    /// The same model for products in `precision`, with LoRA dropout or without.
    pub(super) fn with_pass(&self, precision: Precision, dropout: bool) -> Self {
        Self {
            precision,
            dropout,
            ..self.clone()
        }
    }

    /// The architecture it was made from.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The blocks that the backward pass visits.
    pub(super) fn backward_range(&self) -> BackwardRange {
        let trained = self.blocks.iter().map(TrainedBlock::any);
        BackwardRange::new(trained, self.embedding.any() || self.token_rows[0] > 0)
    }

    /// The number of blocks that the backward pass visits.
    pub fn backward_blocks(&self) -> usize {
        self.backward_range().visited().len()
    }

    /// Format of matrix-product inputs.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The weights that are not trained.
    pub(super) fn frozen(&self) -> FrozenSize {
        self.frozen
    }

    /// Values of the initial factors that are kept until the adapter is saved.
    pub(super) fn kept_factors(&self) -> u64 {
        self.kept_factors
    }

    /// Whether an adapter has DoRA's magnitudes.
    pub(super) fn has_magnitudes(&self) -> bool {
        let linears = self.blocks.iter().map(|block| &block.linears);
        let mut in_blocks = linears.flat_map(Linears::iter);
        in_blocks.any(|linear| linear.lora.is_some_and(|lora| lora.magnitude))
            || self
                .head
                .last()
                .and_then(|output| output.lora)
                .is_some_and(|lora| lora.magnitude)
    }

    /// Whether the input and the output embedding are trained in full.
    pub(super) fn trained_embeddings(&self) -> [bool; 2] {
        let head = self.head.last().is_some_and(|output| output.weight);
        [self.embedding.tokens, head]
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
        let mlp = match self.experts(layer, 1) {
            Some(experts) => experts.saved_elements(),
            None => a.inner_parts() * a.intermediate_size,
        };
        let compute_type = inputs * a.hidden_size + 2 * (q + kv) + mlp + before_norms;
        let adapter = |shape: &LinearShape| {
            let mask = if shape.dropout {
                shape.in_features.div_ceil(32)
            } else {
                0
            };
            // DoRA saves the result before the magnitude.
            let magnitude = if shape.magnitude {
                shape.out_features
            } else {
                0
            };
            shape.r.map_or(0, |r| r + mask + magnitude)
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
        let mut trained = self.blocks[layer].linears.iter();
        self.architecture.linears(layer).map(|linear| {
            let trained = trained.next().copied().unwrap_or_default();
            LinearShape {
                in_features: linear.in_features,
                out_features: linear.out_features,
                bias: linear.bias,
                ..trained.shape(tokens, dropout)
            }
        })
    }

    /// The experts of block `layer` for `tokens` tokens, if it has any.
    fn experts(&self, layer: usize, tokens: usize) -> Option<ExpertsShape> {
        let a = &self.architecture;
        let sizes = a.experts.filter(|_| a.layers[layer].sparse)?;
        Some(ExpertsShape {
            tokens,
            hidden: a.hidden_size,
            inner: sizes.intermediate_size,
            experts: sizes.count,
            per_token: sizes.per_token,
            activation: a.activation,
            trained: self.blocks[layer].experts,
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
        for branch in self.branches(layer, n) {
            work += &branch.forward_cost();
        }
        if a.qk_norm.is_some() {
            work += &(norm_cost(a.norm_kind, n, q) + norm_cost(a.norm_kind, n, kv));
        }
        if let Some(rope) = a.layers[layer].rope {
            work += &self.rope_cost(rope, n);
        }
        work += &(fused_cost(&linears.qkv, 3) + fused_cost(&linears.gate_up, a.inner_parts()));
        work + match self.experts(layer, n) {
            Some(experts) => experts.forward_cost(self.precision),
            None => a.activation.cost(n * a.intermediate_size, a.gated_mlp),
        }
    }

    /// Work of rotating q and k of `n` tokens.
    fn rope_cost(&self, rope: usize, n: usize) -> Work {
        let (q, kv) = self.head_widths();
        let rope = &self.architecture.ropes[rope];
        let cost = |c: usize| rope_cost(n, c, c / rope.head_dim * rope.rotary_dim);
        cost(q) + cost(kv)
    }

    /// The parts around attention and around the feed-forward layers, for `tokens` rows.
    fn branches(&self, layer: usize, tokens: usize) -> [BranchShape; 2] {
        let (a, block) = (&self.architecture, &self.blocks[layer]);
        let branch = |norms: BranchNorms, trained: [bool; 2]| BranchShape {
            tokens,
            hidden: a.hidden_size,
            norms,
            norm_kind: a.norm_kind,
            factor: a.residual_factor,
            trained,
        };
        [
            branch(a.attention_norms, block.attention_norms),
            branch(a.mlp_norms, block.mlp_norms),
        ]
    }

    /// `input`: whether the gradient of the block's input is needed.
    fn block_backward(&self, layer: usize, rows: Rows<'_>, input: bool) -> Work {
        let a = &self.architecture;
        let n = rows.tokens;
        let (q, kv) = self.head_widths();
        let shapes = self.linears(layer, n, self.dropout);
        let needs = self.needs(layer, input);
        let linear = |shape: &LinearShape, input: bool| shape.backward_cost(self.precision, input);
        let [attention, mlp] = self.branches(layer, n);
        let mut work = mlp.output_backward_cost();
        work += &match self.experts(layer, n) {
            Some(experts) if needs.gate => {
                experts.backward_cost(self.precision, needs.mlp_input_gradient)
            }
            Some(_) => Work::default(),
            None => self.mlp_backward(layer, n, needs),
        };
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
                let [q_norm, k_norm] = self.blocks[layer].qk_norms;
                work += &norm_backward_cost(a.norm_kind, n, q, q_norm);
                work += &norm_backward_cost(a.norm_kind, n, kv, k_norm);
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

    /// Backward of the linear layers of the MLP.
    fn mlp_backward(&self, layer: usize, n: usize, needs: BackwardNeeds) -> Work {
        let a = &self.architecture;
        let shapes = self.linears(layer, n, self.dropout);
        let down = shapes.down.iter();
        let mut work: Work = down
            .map(|down| down.backward_cost(self.precision, needs.gate))
            .sum();
        // The input of a trained layer is recomputed from what was saved.
        if self.trained_linears(layer).down == Some(true) {
            work += &a.activation.cost(n * a.intermediate_size, a.gated_mlp);
        }
        if needs.gate {
            work += &a
                .activation
                .backward_cost(n * a.intermediate_size, a.gated_mlp);
            work += &fused_cost(&shapes.gate_up, a.inner_parts());
            work += &self.inputs_backward(&shapes.gate_up, needs.mlp_input_gradient);
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

    fn blocks_forward(&self, rows: Rows<'_>, dropout: bool) -> Work {
        self.embed_cost(rows.tokens)
            + self.sum_over_blocks(0..self.architecture.num_hidden_layers, |layer| {
                self.block_forward(layer, rows, dropout)
            })
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
        self.blocks[layer].linears.map(|linear| linear.any())
    }

    /// The gradients of block `layer`; a trained norm needs all of them.
    fn needs(&self, layer: usize, input: bool) -> BackwardNeeds {
        let any_norm = self.blocks[layer].any_norm();
        let mut trained = self.trained_linears(layer);
        // Experts take the place of gate and up.
        let experts = self.blocks[layer].experts;
        trained.gate_up.push(experts.contains(&true));
        BackwardNeeds::new(&trained, input || any_norm, self.architecture.parallel)
    }

    /// Work of the losses of one micro-batch; `segments`: the length of each.
    pub fn evaluation(&self, segments: &[usize], loss_tokens: usize) -> Work {
        self.blocks_forward(Rows::of(segments), false)
            + self.final_norm(loss_tokens)
            + self.head_cost(loss_tokens, None)
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
            self.needs(*layer, input).qkv
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
        let below_head = !self.backward_range().is_empty() || self.norm_trained;
        let mut work = self.final_norm(loss_tokens);
        work += &self.head_cost(loss_tokens, Some(below_head));
        if below_head && a.names.norm.is_some() {
            let c = a.hidden_size;
            work += &norm_backward_cost(a.norm_kind, loss_tokens, c, self.norm_trained);
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
            work += &self.embedding_backward(n);
        }
        work
    }

    /// Work of reading a prompt of `tokens` tokens and the logits that follow it.
    pub fn prefill(&self, tokens: usize) -> Work {
        let a = &self.architecture;
        let mut work = self.embed_cost(tokens) + self.last_norm_cost(1);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_forward(layer, Rows::of(&[tokens]), false)
        });
        work + self.lm_head(1).logits_cost(self.precision)
    }

    /// Work of generating one token when `before` tokens are cached; of reading them all again where
    /// their rotations end.
    pub fn decoding(&self, before: usize) -> Work {
        let a = &self.architecture;
        if a.rotations_end_at(before) {
            return self.prefill(before + 1);
        }
        let mut work = self.embed_cost(1) + self.last_norm_cost(1);
        work += &self.sum_over_blocks(0..a.num_hidden_layers, |layer| {
            self.block_without_attention(layer, 1, false)
                + attention_decode_cost(&a.attention(layer), before + 1)
        });
        work + self.lm_head(1).logits_cost(self.precision)
    }
}

/// Work of splitting the columns of one layer into `parts`, or of joining them.
fn fused_cost(layers: &[LinearShape], parts: usize) -> Work {
    match layers {
        [fused] if parts > 1 => columns_cost(fused.tokens, fused.out_features),
        _ => Work::default(),
    }
}
