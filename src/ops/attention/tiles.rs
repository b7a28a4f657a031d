//! The fused passes in bf16 blocks: `cpu.rs`'s panels and loops over scores, with every product in tiles of 32 keys by 32
//! queries. (In f32 its vectors are as fast: what is done to each score takes longer than the products.) What a pass counts is
//! `Attention::blocks`'s products, whatever whole tiles add to them or leave out.
//!
//! Operands are packed straight from the (N, H D) tensors: keys and values once for a task, queries for each panel. Scores lie as (keys,
//! queries), so that what the backward pass sums over queries is packed as it lies; O = P V and dQ = dS K pack it transposed.

use std::ops::Range;

use super::cpu::{Destination, Inputs, KeyRange, Panel, gradients, scale_into, softmax, write};
use super::{Attention, QueryBlock};
use crate::ops::count_flops;
use crate::ops::gemm::bf16::{
    ActiveUnit, BF16_PLANES, MatrixUnit, PackedOperand, TILE, gemm_strips,
};
use crate::ops::gemm::{CpuSlice, Element, MatMut, MatRef};
use crate::ops::storage::SendPtr;

/// RowBuffer and channels of one head inside a (N, width) tensor.
#[derive(Clone, Copy)]
struct HeadView<'a> {
    values: CpuSlice<'a>,
    width: usize,
    /// The segment's first row.
    start: usize,
    first: usize,
    d: usize,
}

impl<'a> HeadView<'a> {
    /// `rows` of the segment: (rows, d).
    fn rows(&self, rows: Range<usize>) -> MatRef<'a> {
        let start = (self.start + rows.start) * self.width + self.first;
        let values = self.values.slice_from(start);
        MatRef::strided(values, [rows.len(), self.d], [self.width, 1])
    }
}

/// A block's panels of up to 32 queries, with the keys up to their own in whole tiles: those that a query must not see are hidden anyway.
fn panels(block: &QueryBlock) -> impl Iterator<Item = Panel> + use<> {
    let (queries, first) = (block.queries.clone(), block.keys.start / TILE * TILE);
    queries.clone().step_by(TILE).map(move |start| {
        let queries = start..(start + TILE).min(queries.end);
        Panel {
            keys: first..queries.end.next_multiple_of(TILE),
            queries,
            row: TILE,
        }
    })
}

fn tiles(range: &Range<usize>) -> Range<usize> {
    range.start / TILE..range.end.div_ceil(TILE)
}

/// Scores (keys, 32), summed over the queries.
fn over_queries(scores: &[f32]) -> MatRef<'_> {
    MatRef::from_f32(scores, scores.len() / TILE, TILE)
}

/// Scores (keys, 32) transposed, summed over the keys.
fn over_keys(scores: &[f32]) -> MatRef<'_> {
    over_queries(scores).t()
}

/// scores (keys, 32) = the rows of `a` in these tiles times the queries in `columns`.
fn scores(
    ready: &ActiveUnit,
    keys: Range<usize>,
    a: &PackedOperand,
    columns: &PackedOperand,
    out: &mut Vec<f32>,
) {
    out.resize(keys.len() * TILE * TILE, 0.0);
    gemm_strips(
        ready,
        a.strips_from(keys, 0),
        columns.strips_from(0..1, 0),
        columns.steps(),
        MatMut::new(out, TILE),
        false,
    );
}

impl Attention {
    pub(super) fn forward_tiles<O: Element>(
        &self,
        unit: MatrixUnit,
        x: [CpuSlice<'_>; 3],
        range: &Range<usize>,
        queries: Range<usize>,
        head: usize,
        at: (SendPtr<O>, SendPtr),
    ) {
        let ready = ActiveUnit::new(unit);
        let [q, k, v] = self.heads_in(x, range, head);
        let (width, d, scale) = (
            self.heads * self.head_dim,
            self.head_dim,
            self.scale() as f32,
        );
        let k = PackedOperand::lhs(BF16_PLANES, k.rows(0..queries.end));
        let v = PackedOperand::rhs(BF16_PLANES, v.rows(0..queries.end));
        let (mut own, mut p) = (
            PackedOperand::new(BF16_PLANES),
            PackedOperand::new(BF16_PLANES),
        );
        let room = d.next_multiple_of(TILE);
        let (mut s, mut mixed) = (Vec::new(), vec![0.0f32; TILE * room]);
        let within = |block: &QueryBlock| {
            block.queries.start >= queries.start && block.queries.start < queries.end
        };
        for block in self.query_blocks(range.len()).filter(within) {
            count_flops(1, block.queries.len(), block.keys.len(), d);
            count_flops(1, block.queries.len(), d, block.keys.len());
            for panel in panels(&block) {
                own.pack_rhs(q.rows(panel.queries.clone()).t());
                scores(&ready, tiles(&panel.keys), &k, &own, &mut s);
                panel.mask(self.window, &mut s);
                let (mut max, mut sums) = ([f32::MIN; TILE], [0.0f32; TILE]);
                softmax::<TILE>(&mut s, TILE, scale, (&mut max, &mut sums), &mut [0.0; TILE]);
                p.pack_lhs(over_keys(&s));
                let keys = tiles(&panel.keys);
                gemm_strips(
                    &ready,
                    p.strips_from(0..1, 0),
                    v.strips_from(0..room / TILE, keys.start),
                    keys.len(),
                    MatMut::new(&mut mixed, room),
                    false,
                );
                for (lane, query) in panel.queries.clone().enumerate() {
                    let (row, share) = (range.start + query, 1.0 / sums[lane]);
                    // SAFETY: this row of this head belongs to this task alone.
                    let out = unsafe {
                        *at.1.add(row * self.heads + head) = scale * max[lane] + sums[lane].ln();
                        std::slice::from_raw_parts_mut(at.0.add(row * width + head * d), d)
                    };
                    scale_into(out, &mixed[lane * room..][..d], share);
                }
            }
        }
    }

    pub(super) fn backward_tiles(
        &self,
        unit: MatrixUnit,
        x: &Inputs<'_>,
        part: &KeyRange,
        head: usize,
        to: Destination,
    ) {
        let ready = ActiveUnit::new(unit);
        let (range, all) = (&part.segment, &part.keys);
        let [q, k, v] = self.heads_in(x.qkv, range, head);
        let (width, d, scale) = (
            self.heads * self.head_dim,
            self.head_dim,
            self.scale() as f32,
        );
        let dout = HeadView {
            values: CpuSlice::F32(x.dout),
            ..q
        };
        let (k_rows, k_channels) = (
            PackedOperand::lhs(BF16_PLANES, k.rows(all.clone())),
            PackedOperand::rhs(BF16_PLANES, k.rows(all.clone())),
        );
        let v_rows = PackedOperand::lhs(BF16_PLANES, v.rows(all.clone()));
        let (mut own, mut left) = (
            PackedOperand::new(BF16_PLANES),
            PackedOperand::new(BF16_PLANES),
        );
        let (room, keys) = (d.next_multiple_of(TILE), all.len().next_multiple_of(TILE));
        let (mut dk, mut dv, mut dq) = (
            vec![0.0f32; keys * room],
            vec![0.0f32; keys * room],
            vec![0.0f32; TILE * room],
        );
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for block in self
            .query_blocks(range.len())
            .filter(|block| block.queries.start >= all.start)
        {
            let (rows, cols) = (block.queries.len(), part.seen(&block).len());
            count_flops(2, rows, cols, d);
            count_flops(3, rows, d, cols);
            for mut panel in panels(&block) {
                let queries = panel.queries.clone();
                let count = queries.len();
                let start = panel.keys.start.max(all.start);
                panel.keys = start..panel.keys.end.min(all.start + keys).max(start);
                if panel.keys.is_empty() {
                    dq.fill(0.0);
                } else {
                    // Counted from the part's first key.
                    let seen = tiles(&(start - all.start..panel.keys.end - all.start));
                    own.pack_rhs(q.rows(queries.clone()).t());
                    scores(&ready, seen.clone(), &k_rows, &own, &mut p);
                    panel.mask(self.window, &mut p);
                    own.pack_rhs(dout.rows(queries.clone()).t());
                    scores(&ready, seen.clone(), &v_rows, &own, &mut ds);
                    let (mut lses, mut delta) = ([0.0f32; TILE], [0.0f32; TILE]);
                    for (lane, query) in queries.clone().enumerate() {
                        lses[lane] = x.lse[(range.start + query) * self.heads + head];
                    }
                    x.delta(
                        range.start + queries.start,
                        (width, head * d, d),
                        &mut delta[..count],
                    );
                    gradients::<TILE>(&mut p, &mut ds, TILE, (&lses, &delta), scale);
                    let (panels, below) = (0..room / TILE, seen.start * TILE * room);
                    own.pack_rhs(dout.rows(queries.clone()));
                    left.pack_lhs(over_queries(&p));
                    gemm_strips(
                        &ready,
                        left.strips_from(0..seen.len(), 0),
                        own.strips_from(panels.clone(), 0),
                        1,
                        MatMut::new(&mut dv[below..], room),
                        true,
                    );
                    own.pack_rhs(q.rows(queries.clone()));
                    left.pack_lhs(over_queries(&ds));
                    gemm_strips(
                        &ready,
                        left.strips_from(0..seen.len(), 0),
                        own.strips_from(panels.clone(), 0),
                        1,
                        MatMut::new(&mut dk[below..], room),
                        true,
                    );
                    left.pack_lhs(over_keys(&ds));
                    gemm_strips(
                        &ready,
                        left.strips_from(0..1, 0),
                        k_channels.strips_from(panels, seen.start),
                        seen.len(),
                        MatMut::new(&mut dq, room),
                        false,
                    );
                }
                let row = to.dq.1 + queries.start - all.start;
                // SAFETY: these rows of this head belong to this task alone.
                unsafe {
                    write(
                        &dq[..count * room],
                        room,
                        d,
                        row,
                        (to.dq.0, width, head * d),
                    )
                };
            }
        }
        // SAFETY: the rows of these keys belong, in this head's columns, to this task alone.
        unsafe {
            write(
                &dk[..all.len() * room],
                room,
                d,
                range.start + all.start,
                (to.dk, width, head * d),
            );
            write(
                &dv[..all.len() * room],
                room,
                d,
                range.start + all.start,
                (to.dv, width, head * d),
            );
        }
    }

    fn heads_in<'a>(
        &self,
        [q, k, v]: [CpuSlice<'a>; 3],
        range: &Range<usize>,
        head: usize,
    ) -> [HeadView<'a>; 3] {
        let (d, start) = (self.head_dim, range.start);
        let of = |values, heads: usize, head: usize| HeadView {
            values,
            width: heads * d,
            start,
            first: head * d,
            d,
        };
        let kv = head / self.group();
        [
            of(q, self.heads, head),
            of(k, self.kv_heads, kv),
            of(v, self.kv_heads, kv),
        ]
    }
}
