//! Attention tasks in f32 vectors, with f32 or bf16 inputs: one key block at a time, so that its
//! rows stay in L2 while every query block of the task reads them.

use std::cell::RefCell;
use std::ops::Range;

use super::cpu::{BackwardTask, ForwardTask, Grad};
use super::softmax::{ScoreScaling, by_lanes, cap_scores, online_softmax, softmax_backward};
use super::tile::{RowBuffer, ScoreTile};
use super::{KEY_BLOCK, QUERY_BLOCK, QueryBlock};
use crate::ops::gemm::{Element, Isa};

/// Buffers of a task, one set per thread: short segments make many tasks.
#[derive(Default)]
pub(super) struct Scratch {
    q: RowBuffer,
    k: RowBuffer,
    v: RowBuffer,
    dout: RowBuffer,
    /// The output or dQ, summed over key blocks.
    sum: RowBuffer,
    dk: RowBuffer,
    dv: RowBuffer,
    /// Query or dO rows, packed transposed.
    columns: Vec<f32>,
    /// Scores, then probabilities, and their gradients; written before they are read.
    p: Vec<f32>,
    ds: Vec<f32>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Grows the score buffers to a query block times the first key block of `keys`.
    fn reserve(&mut self, keys: usize) {
        let scores = keys.min(KEY_BLOCK) * QUERY_BLOCK;
        self.p.resize(scores.max(self.p.len()), 0.0);
        self.ds.resize(scores.max(self.ds.len()), 0.0);
    }
}

/// The key blocks, aligned to `KEY_BLOCK`, that contain these keys.
fn key_blocks(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    (keys.start / KEY_BLOCK * KEY_BLOCK..keys.end)
        .step_by(KEY_BLOCK)
        .map(move |start| start..(start + KEY_BLOCK).min(keys.end))
}

/// Running maximum and sum of each query's softmax, in whole vectors.
struct RunningSoftmax {
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl<O: Element> ForwardTask<'_, O> {
    pub(super) fn run_vector(&self, isa: &Isa, scratch: &mut Scratch) {
        let queries = self.queries.clone();
        let [q, k, v] = self.heads();
        let blocks = self.blocks();
        let first = blocks.first().map_or(0, |block| block.keys.start);
        let end = blocks.last().map_or(0, |block| block.keys.end);
        scratch.reserve(end);
        q.pack_columns(isa, queries.clone(), &mut scratch.columns);
        scratch.sum.clear(isa, queries.clone(), q.d);
        let lanes = queries.len().next_multiple_of(isa.lanes);
        let mut state = RunningSoftmax {
            max: vec![f32::MIN; lanes],
            sum: vec![0.0; lanes],
        };
        let causal = self.attention().causal;
        for keys in key_blocks(first..end) {
            k.pack_rows(isa, keys.clone(), &mut scratch.k);
            v.pack_rows(isa, keys.clone(), &mut scratch.v);
            for block in &blocks {
                if let Some(tile) = ScoreTile::new(isa, causal, block, &keys) {
                    self.accumulate(&tile, block.keys.start < keys.start, &mut state, scratch);
                }
            }
        }
        for (index, query) in queries.enumerate() {
            self.store(
                query,
                state.max[index],
                state.sum[index],
                scratch.sum.tail(query),
            );
        }
    }

    /// S = Q K^T, one online-softmax update, O = rescale O + P V. `rescale`: whether the block has
    /// earlier keys.
    fn accumulate(
        &self,
        tile: &ScoreTile<'_>,
        rescale: bool,
        state: &mut RunningSoftmax,
        scratch: &mut Scratch,
    ) {
        let d = self.attention().head_dim;
        let scaling = ScoreScaling::new(self.attention());
        let Scratch {
            k,
            v,
            sum: out,
            columns,
            p,
            ..
        } = scratch;
        let first = tile.queries.start - self.queries.start;
        tile.scores(k, &columns[first * d..], d, p);
        for panel in &tile.panels {
            let column = tile.column(panel);
            let scores = &mut p[column..panel.keys.len() * QUERY_BLOCK];
            by_lanes!(tile.lanes(panel), cap_scores(scores, QUERY_BLOCK, scaling));
            panel.mask(self.attention(), scores);
            let max = &mut state.max[first + column..];
            let sum = &mut state.sum[first + column..];
            let mut factors = [0.0; 32];
            by_lanes!(
                tile.lanes(panel),
                online_softmax(
                    scores,
                    QUERY_BLOCK,
                    scaling.after_cap(),
                    max,
                    sum,
                    &mut factors
                )
            );
            if rescale {
                for (query, factor) in panel.queries.clone().zip(factors) {
                    out.scale(query, factor);
                }
            }
        }
        tile.accumulate_queries(p, v, out);
    }
}

/// Log-sum-exp and delta of a task's queries.
struct RowStatistics {
    lse: Vec<f32>,
    delta: Vec<f32>,
}

impl BackwardTask<'_> {
    pub(super) fn run_vector(&self, isa: &Isa, scratch: &mut Scratch) {
        let queries = self.range.queries.clone();
        let [q, k, v, dout] = self.heads();
        let d = q.d;
        scratch.reserve(self.range.keys.len());
        q.pack_rows(isa, queries.clone(), &mut scratch.q);
        dout.pack_rows(isa, queries.clone(), &mut scratch.dout);
        scratch.sum.clear(isa, queries.clone(), d);
        let mut rows = RowStatistics {
            lse: self.lse(queries.clone()).collect(),
            delta: vec![0.0; queries.len()],
        };
        self.delta(queries.start, &mut rows.delta);
        let visible = |block: &QueryBlock| !self.range.visible(block).is_empty();
        let blocks: Vec<_> = self.blocks().into_iter().filter(visible).collect();
        let causal = self.attention().causal;
        for keys in key_blocks(self.range.keys.clone()) {
            k.pack_rows(isa, keys.clone(), &mut scratch.k);
            v.pack_rows(isa, keys.clone(), &mut scratch.v);
            scratch.dk.clear(isa, keys.clone(), d);
            scratch.dv.clear(isa, keys.clone(), d);
            for block in &blocks {
                if let Some(tile) = ScoreTile::new(isa, causal, block, &keys) {
                    self.accumulate(isa, &tile, &rows, scratch);
                }
            }
            let (dk, dv) = (&scratch.dk, &scratch.dv);
            self.store(Grad::K, keys.start, &dk.values, dk.width);
            self.store(Grad::V, keys.start, &dv.values, dv.width);
        }
        self.store(
            Grad::Q,
            queries.start,
            &scratch.sum.values,
            scratch.sum.width,
        );
    }

    /// P and dS of a tile, dV += P^T dO, dK += dS^T Q, dQ += dS K.
    fn accumulate(
        &self,
        isa: &Isa,
        tile: &ScoreTile<'_>,
        rows: &RowStatistics,
        scratch: &mut Scratch,
    ) {
        let d = self.attention().head_dim;
        let scaling = ScoreScaling::new(self.attention());
        let Scratch {
            q,
            k,
            v,
            dout,
            sum: dq,
            dk,
            dv,
            columns,
            p,
            ds,
        } = scratch;
        q.view(d).pack_columns(isa, q.local(&tile.queries), columns);
        tile.scores(k, columns, d, p);
        dout.view(d)
            .pack_columns(isa, dout.local(&tile.queries), columns);
        tile.scores(v, columns, d, ds);
        for panel in &tile.panels {
            let scores = tile.column(panel)..panel.keys.len() * QUERY_BLOCK;
            let (p, ds) = (&mut p[scores.clone()], &mut ds[scores]);
            by_lanes!(tile.lanes(panel), cap_scores(p, QUERY_BLOCK, scaling));
            panel.mask(self.attention(), p);
            let queries = q.local(&panel.queries);
            let (lse, delta) = (&rows.lse[queries.clone()], &rows.delta[queries]);
            by_lanes!(
                tile.lanes(panel),
                softmax_backward(p, ds, QUERY_BLOCK, scaling, lse, delta)
            );
        }
        tile.accumulate_keys(p, dout, dv);
        tile.accumulate_keys(ds, q, dk);
        tile.accumulate_queries(ds, k, dq);
    }
}
