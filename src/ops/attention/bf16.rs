//! Attention tasks on bf16 matrix units: products in tiles of 32 keys by 32 queries, softmax in
//! f32.
//!
//! In f32 the vector pass is as fast, because softmax takes longer than the products. Operands are
//! packed straight from the (N, H D) tensors, keys and values once per task, queries once per
//! panel. Scores are stored as (keys, queries): the left-hand sides of dV and dK are packed without
//! a transpose, those of O = P V and dQ = dS K with one. The FLOPs counted are those of
//! `Attention::query_blocks`; the tiles execute a few more, on masked scores.

use std::ops::Range;

use super::QueryBlock;
use super::cpu::{BackwardTask, ForwardTask, Grad};
use super::softmax::{Panel, ScoreScaling, cap_scores, online_softmax, softmax_backward};
use crate::ops::gemm::bf16::{
    ActiveUnit, BF16_PLANES, MatrixUnit, PackedOperand, TILE, gemm_strips,
};
use crate::ops::gemm::{Element, MatMut, MatRef};

/// Splits a block into panels of up to 32 queries; the keys of a panel end with the block's, or, if
/// causal, with its last query, rounded out to whole tiles.
fn panels(causal: bool, block: &QueryBlock) -> impl Iterator<Item = Panel> + use<> {
    let QueryBlock { queries, keys } = block.clone();
    let first = keys.start / TILE * TILE;
    queries.clone().step_by(TILE).map(move |start| {
        let queries = start..(start + TILE).min(queries.end);
        let end = if causal { queries.end } else { keys.end };
        Panel {
            keys: first..end.next_multiple_of(TILE),
            padding: keys.end,
            queries,
            stride: TILE,
        }
    })
}

/// The tiles of 32 rows that cover `range`.
fn tiles(range: Range<usize>) -> Range<usize> {
    range.start / TILE..range.end.div_ceil(TILE)
}

/// Views scores as a row-major matrix (keys, 32).
fn score_matrix(scores: &[f32]) -> MatRef<'_> {
    MatRef::from_f32(scores, scores.len() / TILE, TILE)
}

/// The GEMMs of a task, with scratch for the operands that are packed for each panel.
struct Products {
    unit: ActiveUnit,
    lhs: PackedOperand,
    rhs: PackedOperand,
    /// Row stride of the outputs O, dQ, dK and dV: head_dim rounded up to whole tiles.
    width: usize,
}

impl Products {
    fn new(unit: MatrixUnit, head_dim: usize) -> Self {
        Self {
            unit: ActiveUnit::new(unit),
            lhs: PackedOperand::new(BF16_PLANES),
            rhs: PackedOperand::new(BF16_PLANES),
            width: head_dim.next_multiple_of(TILE),
        }
    }

    /// out (keys, 32) = the key tiles `keys` of `lhs`, times `queries` (32, D) transposed: K Q^T
    /// or V dO^T.
    fn scores(
        &mut self,
        keys: Range<usize>,
        lhs: &PackedOperand,
        queries: MatRef<'_>,
        out: &mut Vec<f32>,
    ) {
        out.resize(keys.len() * TILE * TILE, 0.0);
        self.rhs.pack_rhs(queries.t());
        let (lhs, rhs) = (lhs.strips_from(keys, 0), self.rhs.strips_from(0..1, 0));
        let out = MatMut::new(out, TILE);
        gemm_strips(&self.unit, lhs, rhs, self.rhs.steps(), out, false);
    }

    /// out (32, D) = scores^T times the packed V or K from key tile `first` on: P V or dS K.
    fn queries(&mut self, scores: &[f32], keys: &PackedOperand, first: usize, out: &mut [f32]) {
        self.lhs.pack_lhs(score_matrix(scores).t());
        let lhs = self.lhs.strips_from(0..1, 0);
        let rhs = keys.strips_from(0..self.width / TILE, first);
        let steps = scores.len() / (TILE * TILE);
        gemm_strips(
            &self.unit,
            lhs,
            rhs,
            steps,
            MatMut::new(out, self.width),
            false,
        );
    }

    /// out (keys, D) += scores (keys, 32) times `queries` (32, D): P^T dO, dS^T Q.
    fn accumulate_keys(&mut self, scores: &[f32], queries: MatRef<'_>, out: &mut [f32]) {
        self.lhs.pack_lhs(score_matrix(scores));
        self.rhs.pack_rhs(queries);
        let lhs = self.lhs.strips_from(0..scores.len() / (TILE * TILE), 0);
        let rhs = self.rhs.strips_from(0..self.width / TILE, 0);
        gemm_strips(&self.unit, lhs, rhs, 1, MatMut::new(out, self.width), true);
    }
}

impl<O: Element> ForwardTask<'_, O> {
    pub(super) fn run_bf16(&self, unit: MatrixUnit) {
        let [q, k, v] = self.heads();
        let attention = self.attention();
        let scaling = ScoreScaling::new(attention);
        let blocks = self.blocks();
        let end = blocks.last().map_or(0, |block| block.keys.end);
        let k = PackedOperand::lhs(BF16_PLANES, k.rows(0..end));
        let v = PackedOperand::rhs(BF16_PLANES, v.rows(0..end));
        let mut products = Products::new(unit, q.d);
        let width = products.width;
        let mut p = Vec::new();
        let mut pv = vec![0.0f32; TILE * width];
        for panel in blocks
            .iter()
            .flat_map(|block| panels(attention.causal, block))
        {
            let keys = tiles(panel.keys.clone());
            let queries = q.rows(panel.queries.clone());
            products.scores(keys.clone(), &k, queries, &mut p);
            cap_scores::<TILE>(&mut p, TILE, scaling);
            panel.mask(attention, &mut p);
            let (mut max, mut sum) = ([f32::MIN; TILE], [0.0f32; TILE]);
            let scale = scaling.after_cap();
            online_softmax::<TILE>(&mut p, TILE, scale, &mut max, &mut sum, &mut [0.0; TILE]);
            products.queries(&p, &v, keys.start, &mut pv);
            for (lane, query) in panel.queries.enumerate() {
                self.store(query, max[lane], sum[lane], &pv[lane * width..]);
            }
        }
    }
}

/// Packed operands, scratch and accumulated gradients of a backward task; `k_rows` and `v_rows` are
/// packed as left-hand sides, `k_channels` as a right-hand side.
struct BackwardState {
    products: Products,
    k_rows: PackedOperand,
    k_channels: PackedOperand,
    v_rows: PackedOperand,
    p: Vec<f32>,
    ds: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl BackwardState {
    fn new(unit: MatrixUnit, task: &BackwardTask<'_>) -> Self {
        let [_, k, v, _] = task.heads();
        let keys = || task.range.keys.clone();
        let products = Products::new(unit, k.d);
        let rows = keys().len().next_multiple_of(TILE);
        Self {
            k_rows: PackedOperand::lhs(BF16_PLANES, k.rows(keys())),
            k_channels: PackedOperand::rhs(BF16_PLANES, k.rows(keys())),
            v_rows: PackedOperand::lhs(BF16_PLANES, v.rows(keys())),
            p: Vec::new(),
            ds: Vec::new(),
            dq: vec![0.0; TILE * products.width],
            dk: vec![0.0; rows * products.width],
            dv: vec![0.0; rows * products.width],
            products,
        }
    }

    /// Recomputes P and dS of a panel; dV += P^T dO, dK += dS^T Q, dQ = dS K.
    fn accumulate(&mut self, task: &BackwardTask<'_>, panel: &Panel) {
        let [q, _, _, dout] = task.heads();
        let (p, ds, products) = (&mut self.p, &mut self.ds, &mut self.products);
        let first = task.range.keys.start;
        let keys = tiles(panel.keys.start - first..panel.keys.end - first);
        let (q, dout) = (
            q.rows(panel.queries.clone()),
            dout.rows(panel.queries.clone()),
        );
        products.scores(keys.clone(), &self.k_rows, q, p);
        let scaling = ScoreScaling::new(task.attention());
        cap_scores::<TILE>(p, TILE, scaling);
        panel.mask(task.attention(), p);
        products.scores(keys.clone(), &self.v_rows, dout, ds);
        let (mut lse, mut delta) = ([0.0f32; TILE], [0.0f32; TILE]);
        for (to, lse) in lse.iter_mut().zip(task.lse(panel.queries.clone())) {
            *to = lse;
        }
        task.delta(panel.queries.start, &mut delta[..panel.queries.len()]);
        softmax_backward::<TILE>(p, ds, TILE, scaling, &lse, &delta);
        let below = keys.start * TILE * products.width;
        products.accumulate_keys(p, dout, &mut self.dv[below..]);
        products.accumulate_keys(ds, q, &mut self.dk[below..]);
        products.queries(ds, &self.k_channels, keys.start, &mut self.dq);
    }
}

impl BackwardTask<'_> {
    pub(super) fn run_bf16(&self, unit: MatrixUnit) {
        let keys = &self.range.keys;
        let end = keys.start + keys.len().next_multiple_of(TILE);
        let mut state = BackwardState::new(unit, self);
        let width = state.products.width;
        let causal = self.attention().causal;
        let blocks = self.blocks();
        for mut panel in blocks.iter().flat_map(|block| panels(causal, block)) {
            let start = panel.keys.start.max(keys.start);
            panel.keys = start..panel.keys.end.min(end).max(start);
            if panel.keys.is_empty() {
                state.dq.fill(0.0);
            } else {
                state.accumulate(self, &panel);
            }
            let rows = &state.dq[..panel.queries.len() * width];
            self.store(Grad::Q, panel.queries.start, rows, width);
        }
        self.store(Grad::K, keys.start, &state.dk[..keys.len() * width], width);
        self.store(Grad::V, keys.start, &state.dv[..keys.len() * width], width);
    }
}
