//! The fused passes: a block of queries meets a run of keys at a time, so that what they read and add to stays in a second-level cache.
//!
//! Scores lie as (keys, queries): S^T = K Q^T, with queries along the vectors, so that softmax runs down columns and no tile is ever
//! transposed. The same buffer is then read by broadcast in either direction: O = P V and dQ = dS K take its columns, dV += P^T dO and
//! dK += dS^T Q its rows. One task is one query head of a segment: forward with some of its query blocks, back with some of its keys. What
//! the query heads of one key head, and the keys of one query, add up to is summed afterwards, in order.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::Tensor;
use half::bf16;

use super::{Attention, AttentionSaved, QUERY_BLOCK, QueryBlock};
use crate::error::Result;
use crate::ops::gemm::{
    CpuSlice, Element, Isa, KernelArgs, KernelTerm, MatRef, best, even_parts, gemm_strip, pack,
};
use crate::ops::parallel::par_for_each;
use crate::ops::simd::{self, dispatch};
use crate::ops::storage::{
    CpuTensor, ELEMENTS_PER_TASK, ROWS_PER_TASK, SendPtr, f32_tensor, uninit_vec,
};
use crate::ops::{Context, Segments, count_flops};
use crate::work::Precision;

/// Query rows of a forward task: enough that copying the keys once for them does not show.
const QUERIES_PER_TASK: usize = 4 * QUERY_BLOCK;
/// Keys of a run: while every block of queries meets them, their rows and the sums over them stay in a second-level cache. Their
/// probabilities are summed before the sum goes on in another, which keeps sums of thousands accurate in f32.
const KEY_BLOCK: usize = 256;

/// Keys of a backward task, at least and in whole runs, and tasks that a segment's keys are cut into at most: tasks enough for more threads
/// than there are heads, and dQ of long segments no more than one and a half times beside itself.
const MIN_KEYS_PER_TASK: usize = 2 * KEY_BLOCK;
const MAX_KEY_RANGES: usize = 4;

/// RowBuffer and channels of one head inside a (N, `stride`) tensor, from the segment's first row on.
#[derive(Clone, Copy)]
struct HeadView<'a> {
    values: CpuSlice<'a>,
    stride: usize,
    d: usize,
}

impl<'a> HeadView<'a> {
    fn new(values: CpuSlice<'a>, stride: usize, start: usize, first: usize, d: usize) -> Self {
        Self {
            values: values.slice_from(start * stride + first),
            stride,
            d,
        }
    }

    /// Rows `rows`: (rows, d).
    fn matrix(&self, rows: Range<usize>) -> MatRef<'a> {
        let values = self.values.slice_from(rows.start * self.stride);
        MatRef::strided(values, [rows.len(), self.d], [self.stride, 1])
    }

    /// Rows `rows` as columns, in f32, a panel after the other: (d, lanes) each, zero beyond the last row.
    fn columns(&self, isa: &Isa, rows: Range<usize>, out: &mut Vec<f32>) {
        out.resize(self.d * rows.len().next_multiple_of(isa.lanes), 0.0);
        let matrix = self.matrix(rows.clone()).t();
        for (index, panel) in out.chunks_mut(self.d * isa.nr()).enumerate() {
            let first = index * isa.nr();
            pack(
                isa,
                &matrix,
                0..self.d,
                first..(first + isa.nr()).min(rows.len()),
                panel,
            );
        }
    }

    /// Rows `rows`, one after the other, into `out`.
    fn rows(&self, isa: &Isa, rows: Range<usize>, out: &mut RowBuffer) {
        out.shape(isa, rows.clone(), self.d);
        let matrix = self.matrix(rows.clone());
        pack(isa, &matrix, 0..rows.len(), 0..self.d, &mut out.values);
    }
}

/// Rows of one head, in f32, as wide as a whole number of vectors (zero beyond the head's channels).
#[derive(Default)]
struct RowBuffer {
    values: Vec<f32>,
    width: usize,
    /// The first row's number in the segment.
    first: usize,
}

impl RowBuffer {
    /// Room for these rows; what stood there stays.
    fn shape(&mut self, isa: &Isa, rows: Range<usize>, d: usize) {
        self.width = d.next_multiple_of(isa.lanes);
        self.first = rows.start;
        self.values.resize(rows.len() * self.width, 0.0);
    }

    /// Zeros.
    fn clear(&mut self, isa: &Isa, rows: Range<usize>, d: usize) {
        self.values.clear();
        self.shape(isa, rows, d);
    }

    fn holds(&self, rows: &Range<usize>) -> bool {
        self.first <= rows.start && rows.end <= self.first + self.values.len() / self.width
    }

    /// These rows, counted from its own first.
    fn own(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start - self.first..rows.end - self.first
    }

    /// The first `d` channels of its rows, counted from its own first.
    fn head(&self, d: usize) -> HeadView<'_> {
        HeadView {
            values: CpuSlice::F32(&self.values),
            stride: self.width,
            d,
        }
    }

    /// The number of a row's first number.
    fn at(&self, row: usize) -> usize {
        (row - self.first) * self.width
    }

    fn row(&self, row: usize) -> *const f32 {
        self.values[self.at(row)..].as_ptr()
    }

    fn row_mut(&mut self, row: usize) -> *mut f32 {
        let at = self.at(row);
        self.values[at..].as_mut_ptr()
    }

    /// The row times `share`.
    fn scale(&mut self, row: usize, share: f32) {
        let at = self.at(row);
        let row = &mut self.values[at..at + self.width];
        dispatch(
            #[inline(always)]
            |_| row.iter_mut().for_each(|x| *x *= share),
        );
    }

    /// The first column and the vectors of each part that a tile is as wide as.
    fn parts(&self, isa: &Isa) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (width, most, lanes) = (self.width, isa.nr(), isa.lanes);
        (0..width)
            .step_by(most)
            .map(move |first| (first, (width - first).min(most) / lanes))
    }
}

/// What a task computes in: each thread keeps its own, for short segments are many.
#[derive(Default)]
struct Scratch {
    /// Queries, keys and values, and dO.
    q: RowBuffer,
    k: RowBuffer,
    v: RowBuffer,
    dout: RowBuffer,
    /// What is summed over runs and over blocks.
    sum: RowBuffer,
    dk: RowBuffer,
    dv: RowBuffer,
    /// A block's queries, or rows of dO, as columns.
    columns: Vec<f32>,
    /// Scores, then probabilities, and their gradients: what stands there is overwritten before it is read.
    p: Vec<f32>,
    ds: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Room for the scores of a block with the first run of `keys`.
    fn room(&mut self, keys: usize) {
        let room = keys.min(KEY_BLOCK) * QUERY_BLOCK;
        [&mut self.p, &mut self.ds]
            .into_iter()
            .for_each(|scores| scores.resize(room.max(scores.len()), 0.0));
    }
}

/// A block's queries and the keys of a run that they see, counted from the segment's start. Its scores are (keys, `QUERY_BLOCK`); there are none
/// where a whole tile of them would be hidden.
struct ScoreTile<'a> {
    isa: &'a Isa,
    queries: Range<usize>,
    keys: Range<usize>,
    /// The keys of a row of tiles each.
    strips: Vec<Range<usize>>,
    /// Queries as many as a tile is wide each, and the keys of the strips that begin before their last.
    panels: Vec<Panel>,
}

/// Some queries of a block, and the keys that they have scores with.
pub(super) struct Panel {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    /// Numbers from one key's scores to the next's.
    pub(super) row: usize,
}

impl<'a> ScoreTile<'a> {
    /// What the block sees of the run, if anything.
    fn new(isa: &'a Isa, block: &QueryBlock, run: &Range<usize>) -> Option<Self> {
        let (queries, keys) = (
            block.queries.clone(),
            block.keys.start.max(run.start)..block.keys.end.min(run.end),
        );
        if keys.is_empty() {
            return None;
        }
        let strips: Vec<Range<usize>> = even_parts(keys.clone(), isa.mr).collect();
        let panel = |start: usize| {
            let queries = start..(start + isa.nr()).min(queries.end);
            let seen = strips
                .iter()
                .take_while(|strip| strip.start < queries.end)
                .last();
            Panel {
                keys: keys.start..seen.map_or(keys.start, |strip| strip.end),
                queries,
                row: QUERY_BLOCK,
            }
        };
        let panels = queries.clone().step_by(isa.nr()).map(panel).collect();
        Some(Self {
            isa,
            queries,
            keys,
            strips,
            panels,
        })
    }

    /// The panel's first query of the block, and vectors that hold its queries.
    fn lanes(&self, panel: &Panel) -> (usize, usize) {
        (
            panel.queries.start - self.queries.start,
            panel.queries.len().div_ceil(self.isa.lanes),
        )
    }

    /// out = the keys' rows of `head` times the block's `columns`, (d, lanes) of each panel.
    fn scores(&self, head: &RowBuffer, columns: &[f32], d: usize, out: &mut [f32]) {
        let isa = self.isa;
        assert!(head.holds(&self.keys) && out.len() >= self.keys.len() * QUERY_BLOCK);
        assert!(columns.len() >= d * self.queries.len().next_multiple_of(isa.lanes));
        for keys in &self.strips {
            for panel in self
                .panels
                .iter()
                .filter(|panel| keys.start < panel.queries.end)
            {
                let (at, vectors) = self.lanes(panel);
                // SAFETY: `head` holds every key's row, `columns` d vectors of each panel and `out` a row for each key (checked).
                unsafe {
                    let (a, b) = (head.row(keys.start), columns.as_ptr().add(d * at));
                    let part = KernelTerm {
                        k: d,
                        a,
                        rs_a: head.width,
                        cs_a: 1,
                        b,
                        rs_b: vectors * isa.lanes,
                    };
                    let out = out
                        .as_mut_ptr()
                        .add((keys.start - self.keys.start) * QUERY_BLOCK + at);
                    isa.kernel(keys.len(), vectors)(KernelArgs::new(
                        &[part],
                        out,
                        QUERY_BLOCK,
                        false,
                    ));
                }
            }
        }
    }

    /// The queries' rows of `sum` += the columns of `scores` times the keys' rows of `head`.
    fn accumulate_queries(&self, scores: &[f32], head: &RowBuffer, sum: &mut RowBuffer) {
        let isa = self.isa;
        assert!(scores.len() >= self.keys.len() * QUERY_BLOCK && head.holds(&self.keys));
        assert!(sum.holds(&self.queries) && sum.width == head.width);
        for panel in &self.panels {
            for (first, vectors) in head.parts(isa) {
                // SAFETY: scores are (keys, QUERY_BLOCK), `head` holds every key's row and `sum` every query's, both `width` wide (checked).
                unsafe {
                    let (a, b) = (
                        scores.as_ptr().add(self.lanes(panel).0),
                        head.row(self.keys.start).add(first),
                    );
                    let terms = [KernelTerm {
                        k: panel.keys.len(),
                        a,
                        rs_a: 1,
                        cs_a: QUERY_BLOCK,
                        b,
                        rs_b: head.width,
                    }];
                    let out = sum.row_mut(panel.queries.start).add(first);
                    let args = KernelArgs::new(&terms, out, sum.width, true);
                    gemm_strip(isa, panel.queries.len(), vectors, args);
                }
            }
        }
    }

    /// The keys' rows of `sum` += the rows of `scores` times the queries' rows of `head`.
    fn accumulate_keys(&self, scores: &[f32], head: &RowBuffer, sum: &mut RowBuffer) {
        let isa = self.isa;
        assert!(scores.len() >= self.keys.len() * QUERY_BLOCK && head.holds(&self.queries));
        assert!(sum.holds(&self.keys) && sum.width == head.width);
        for keys in &self.strips {
            // Panels before hold no scores of this strip.
            let at = keys.start.saturating_sub(self.queries.start) / isa.nr() * isa.nr();
            for (first, vectors) in head.parts(isa) {
                // SAFETY: scores are (keys, QUERY_BLOCK), `head` holds every query's row and `sum` every key's, both `width` wide (checked).
                unsafe {
                    let a = scores
                        .as_ptr()
                        .add((keys.start - self.keys.start) * QUERY_BLOCK + at);
                    let b = head.row(self.queries.start + at).add(first);
                    let part = KernelTerm {
                        k: self.queries.len() - at,
                        a,
                        rs_a: QUERY_BLOCK,
                        cs_a: 1,
                        b,
                        rs_b: head.width,
                    };
                    let out = sum.row_mut(keys.start).add(first);
                    isa.kernel(keys.len(), vectors)(KernelArgs::new(&[part], out, sum.width, true));
                }
            }
        }
    }
}

impl Panel {
    /// Minus infinity where a query does not see a key: where it comes before the key, or `window` or more after it.
    pub(super) fn mask(&self, window: Option<usize>, scores: &mut [f32]) {
        let (first, queries, count) = (self.keys.start, &self.queries, self.queries.len());
        for key in first.max(queries.start + 1)..self.keys.end {
            scores[(key - first) * self.row..][..(key - queries.start).min(count)]
                .fill(f32::NEG_INFINITY);
        }
        let unseen = window.and_then(|window| Some((window, queries.end.checked_sub(window)?)));
        if let Some((window, end)) = unseen {
            for key in first..self.keys.end.min(end) {
                let seen = (key + window).saturating_sub(queries.start);
                scores[(key - first) * self.row..][seen..count].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Calls `$name::<LANES>` with the number of lanes as a constant.
macro_rules! by_lanes {
    ($lanes:expr, $name:ident($($argument:expr),*)) => {
        match $lanes {
            8 => $name::<8>($($argument),*),
            16 => $name::<16>($($argument),*),
            _ => $name::<32>($($argument),*),
        }
    };
}

/// Some keys of a segment, for the backward pass: with all queries that come no earlier.
pub(super) struct KeyRange {
    pub(super) segment: Range<usize>,
    /// Counted from the segment's start.
    pub(super) keys: Range<usize>,
    /// The first of its rows of what is added to dQ; none where it writes to dQ itself.
    beside: Option<usize>,
}

impl KeyRange {
    /// Every segment's parts, and the rows that are added to dQ.
    fn of(segments: &[Range<usize>]) -> (Vec<Self>, usize) {
        let (mut parts, mut rows) = (Vec::new(), 0);
        for segment in segments {
            let size = segment
                .len()
                .div_ceil(MAX_KEY_RANGES)
                .next_multiple_of(KEY_BLOCK)
                .max(MIN_KEYS_PER_TASK);
            for start in (0..segment.len()).step_by(size) {
                let part = Self {
                    segment: segment.clone(),
                    keys: start..(start + size).min(segment.len()),
                    beside: (start > 0).then_some(rows),
                };
                rows += if start > 0 { part.queries().len() } else { 0 };
                parts.push(part);
            }
        }
        (parts, rows)
    }

    /// The queries that may see the keys, and others whose window ends before them.
    pub(super) fn queries(&self) -> Range<usize> {
        self.keys.start..self.segment.len()
    }

    /// The block's keys among these.
    pub(super) fn seen(&self, block: &QueryBlock) -> Range<usize> {
        let start = block.keys.start.max(self.keys.start);
        start..block.keys.end.min(self.keys.end).max(start)
    }
}

/// Where a backward task writes: rows of dQ, or of what is added to it, from its first query on; dK and dV.
#[derive(Clone, Copy)]
pub(super) struct Destination {
    pub(super) dq: (SendPtr, usize),
    pub(super) dk: SendPtr,
    pub(super) dv: SendPtr,
}

/// Runs of keys that hold these.
fn runs(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    (keys.start / KEY_BLOCK * KEY_BLOCK..keys.end)
        .step_by(KEY_BLOCK)
        .map(move |start| start..(start + KEY_BLOCK).min(keys.end))
}

/// Scores -> exp(scale (score - max)), not yet divided by their sum, of `L` queries, one key's `row` numbers after another's. Goes on from
/// the largest scores and the sums of keys before (`f32::MIN` and zero, where there are none); what was summed with those counts as much as
/// `shares` then say.
pub(super) fn softmax<const L: usize>(
    scores: &mut [f32],
    row: usize,
    scale: f32,
    (max, sums): (&mut [f32], &mut [f32]),
    shares: &mut [f32],
) {
    dispatch(
        #[inline(always)]
        |cpu| {
            let (mut largest, mut total) = ([0.0f32; L], [0.0f32; L]);
            largest.copy_from_slice(&max[..L]);
            total.copy_from_slice(&sums[..L]);
            for scores in scores.chunks(row) {
                let scores = &scores[..L];
                for lane in 0..L {
                    largest[lane] = if scores[lane] > largest[lane] {
                        scores[lane]
                    } else {
                        largest[lane]
                    };
                }
            }
            for lane in 0..L {
                shares[lane] = cpu.exp(scale * (max[lane] - largest[lane]));
                total[lane] *= shares[lane];
            }
            for scores in scores.chunks_mut(KEY_BLOCK * row) {
                let mut sum = [0.0f32; L];
                for scores in scores.chunks_mut(row) {
                    let scores = &mut scores[..L];
                    for lane in 0..L {
                        scores[lane] = cpu.exp(scale * (scores[lane] - largest[lane]));
                        sum[lane] += scores[lane];
                    }
                }
                for lane in 0..L {
                    total[lane] += sum[lane];
                }
            }
            max[..L].copy_from_slice(&largest);
            sums[..L].copy_from_slice(&total);
        },
    );
}

/// Scores and dP -> P and dS, in place, of `L` queries, one key's `row` numbers after another's.
pub(super) fn gradients<const L: usize>(
    scores: &mut [f32],
    dp: &mut [f32],
    row: usize,
    (lse, inner): (&[f32], &[f32]),
    scale: f32,
) {
    let (mut lses, mut delta) = ([0.0; L], [0.0; L]);
    lses[..lse.len()].copy_from_slice(lse);
    delta[..inner.len()].copy_from_slice(inner);
    dispatch(
        #[inline(always)]
        |cpu| {
            for (p, ds) in scores.chunks_mut(row).zip(dp.chunks_mut(row)) {
                let (p, ds) = (&mut p[..L], &mut ds[..L]);
                for lane in 0..L {
                    p[lane] = cpu.exp(scale * p[lane] - lses[lane]);
                    ds[lane] = p[lane] * (ds[lane] - delta[lane]) * scale;
                }
            }
        },
    );
}

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> the output and each row's log-sum-exp (N, Hq).
    pub(super) fn forward_cpu(
        &self,
        context: Context<'_>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor)> {
        let (n, width) = (q.dims2()?.0, self.heads * self.head_dim);
        if context.precision != Precision::Bf16 {
            // SAFETY: every row and head belongs to one task, which writes it.
            let mut out: Vec<f32> = unsafe { uninit_vec(n * width) };
            let lse = self.forward_into(context, [q, k, v], segments, &mut out)?;
            return Ok((f32_tensor(out, (n, width))?, lse));
        }
        // SAFETY: as above.
        let mut out: Vec<bf16> = unsafe { uninit_vec(n * width) };
        let lse = self.forward_into(context, [q, k, v], segments, &mut out)?;
        Ok((Tensor::from_vec(out, (n, width), q.device())?, lse))
    }

    /// Writes the output; returns the log-sum-exps.
    fn forward_into<O: Element>(
        &self,
        context: Context<'_>,
        x: [&Tensor; 3],
        segments: &Segments,
        out: &mut [O],
    ) -> Result<Tensor> {
        let n = x[0].dims2()?.0;
        let hosts = (
            CpuTensor::borrow(x[0])?,
            CpuTensor::borrow(x[1])?,
            CpuTensor::borrow(x[2])?,
        );
        let (q, k, v) = (hosts.0.slice(), hosts.1.slice(), hosts.2.slice());
        // SAFETY: every row and head belongs to one task, which writes it.
        let mut lse: Vec<f32> = unsafe { uninit_vec(n * self.heads) };
        let (out_at, lse_at) = (SendPtr(out.as_mut_ptr()), SendPtr(lse.as_mut_ptr()));
        let parts = segments.ranges().iter().flat_map(|range| {
            let starts = (0..range.len()).step_by(QUERIES_PER_TASK);
            starts.map(move |start| {
                (
                    range.clone(),
                    start..(start + QUERIES_PER_TASK).min(range.len()),
                )
            })
        });
        let tasks: Vec<_> = parts
            .flat_map(|part| (0..self.heads).map(move |head| (part.clone(), head)))
            .collect();
        let isa = best();
        let unit = isa.bf16_unit(context.precision);
        par_for_each(tasks.into_iter(), |((range, queries), head)| {
            let at = (out_at, lse_at);
            match unit {
                #[cfg(target_arch = "x86_64")]
                Some(unit) => self.forward_tiles(unit, [q, k, v], &range, queries, head, at),
                _ => SCRATCH.with_borrow_mut(|buffers| {
                    self.forward_task((isa, buffers), [q, k, v], &range, queries, head, at)
                }),
            }
        });
        f32_tensor(lse, (n, self.heads))
    }

    fn forward_task<O: Element>(
        &self,
        (isa, buffers): (&Isa, &mut Scratch),
        x: [CpuSlice<'_>; 3],
        range: &Range<usize>,
        queries: Range<usize>,
        head: usize,
        at: (SendPtr<O>, SendPtr),
    ) {
        let (d, width, scale) = (
            self.head_dim,
            self.heads * self.head_dim,
            self.scale() as f32,
        );
        let (kv, first) = (self.kv_heads * d, head / self.group() * d);
        buffers.room(queries.end);
        let Scratch {
            k,
            v,
            sum: out,
            columns,
            p: scores,
            ..
        } = buffers;
        HeadView::new(x[0], width, range.start, head * d, d).columns(isa, queries.clone(), columns);
        let [k_head, v_head] = [x[1], x[2]].map(|x| HeadView::new(x, kv, range.start, first, d));
        let within = |block: &QueryBlock| {
            block.queries.start >= queries.start && block.queries.start < queries.end
        };
        let blocks: Vec<QueryBlock> = self.query_blocks(range.len()).filter(within).collect();
        for block in &blocks {
            count_flops(1, block.queries.len(), block.keys.len(), d);
            count_flops(1, block.queries.len(), d, block.keys.len());
        }
        out.clear(isa, queries.clone(), d);
        let lanes = queries.len().next_multiple_of(isa.lanes);
        let (mut max, mut sums) = (vec![f32::MIN; lanes], vec![0.0; lanes]);
        let first = blocks
            .iter()
            .map(|block| block.keys.start)
            .min()
            .unwrap_or(queries.end);
        for run in runs(first..queries.end) {
            k_head.rows(isa, run.clone(), k);
            v_head.rows(isa, run.clone(), v);
            for (block, tile) in blocks
                .iter()
                .filter_map(|block| Some((block, ScoreTile::new(isa, block, &run)?)))
            {
                let before = tile.queries.start - queries.start;
                tile.scores(k, &columns[before * d..], d, scores);
                for panel in &tile.panels {
                    let (lane, vectors) = tile.lanes(panel);
                    let scores = &mut scores[lane..panel.keys.len() * QUERY_BLOCK];
                    panel.mask(self.window, scores);
                    let (so_far, mut shares) = (
                        (&mut max[before + lane..], &mut sums[before + lane..]),
                        [0.0; 32],
                    );
                    by_lanes!(
                        vectors * isa.lanes,
                        softmax(scores, QUERY_BLOCK, scale, so_far, &mut shares)
                    );
                    if block.keys.start < run.start {
                        panel
                            .queries
                            .clone()
                            .zip(shares)
                            .for_each(|(query, share)| out.scale(query, share));
                    }
                }
                tile.accumulate_queries(scores, v, out);
            }
        }
        for (query, (max, sum)) in queries.zip(max.into_iter().zip(sums)) {
            let row = range.start + query;
            // SAFETY: this row of this head belongs to this task alone.
            let to = unsafe {
                *at.1.add(row * self.heads + head) = scale * max + sum.ln();
                std::slice::from_raw_parts_mut(at.0.add(row * width + head * d), d)
            };
            scale_into(to, &out.values[out.at(query)..][..d], 1.0 / sum);
        }
    }

    /// dout (N, Hq D) -> (dq, dk, dv).
    pub(super) fn backward_cpu(
        &self,
        context: Context<'_>,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (n, width) = (dout.dims2()?.0, self.heads * self.head_dim);
        let dout = dout.contiguous()?;
        let hosts = (
            CpuTensor::borrow(&saved.q)?,
            CpuTensor::borrow(&saved.k)?,
            CpuTensor::borrow(&saved.v)?,
        );
        let (out, dout, lse) = (
            CpuTensor::borrow(&saved.out)?,
            CpuTensor::borrow_f32(&dout)?,
            CpuTensor::borrow_f32(&saved.lse)?,
        );
        let x = Inputs {
            qkv: [hosts.0.slice(), hosts.1.slice(), hosts.2.slice()],
            out: out.slice(),
            dout: dout.f32_slice(),
            lse: lse.f32_slice(),
        };
        let (parts, rows) = KeyRange::of(segments.ranges());
        // SAFETY: every row and query head belongs to one task, which writes it.
        let room = |rows: usize| unsafe { uninit_vec::<f32>(rows * width) };
        let (mut dq, mut beside, mut dk, mut dv) = (room(n), room(rows), room(n), room(n));
        let at =
            [&mut dq, &mut beside, &mut dk, &mut dv].map(|values| SendPtr(values.as_mut_ptr()));
        let tasks = parts
            .iter()
            .flat_map(|part| (0..self.heads).map(move |head| (part, head)));
        let isa = best();
        let unit = isa.bf16_unit(context.precision);
        par_for_each(tasks, |(part, head)| {
            let dq = part
                .beside
                .map_or((at[0], part.segment.start), |first| (at[1], first));
            let to = Destination {
                dq,
                dk: at[2],
                dv: at[3],
            };
            match unit {
                #[cfg(target_arch = "x86_64")]
                Some(unit) => self.backward_tiles(unit, &x, part, head, to),
                _ => SCRATCH.with_borrow_mut(|buffers| {
                    self.backward_task((isa, buffers), &x, part, head, to)
                }),
            }
        });
        for (part, first) in parts.iter().filter_map(|part| Some((part, part.beside?))) {
            let (queries, start) = (part.queries(), part.segment.start);
            let to = &mut dq[(start + queries.start) * width..(start + queries.end) * width];
            par_for_each(
                to.chunks_mut(ELEMENTS_PER_TASK)
                    .zip(beside[first * width..].chunks(ELEMENTS_PER_TASK)),
                |(to, from)| {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                },
            );
        }
        let kv = (n, self.kv_heads * self.head_dim);
        Ok((
            f32_tensor(dq, (n, width))?,
            f32_tensor(self.sum_groups(dk), kv)?,
            f32_tensor(self.sum_groups(dv), kv)?,
        ))
    }

    fn backward_task(
        &self,
        (isa, buffers): (&Isa, &mut Scratch),
        x: &Inputs<'_>,
        part: &KeyRange,
        head: usize,
        to: Destination,
    ) {
        let (range, queries) = (&part.segment, part.queries());
        let (d, width) = (self.head_dim, self.heads * self.head_dim);
        let (kv, first, scale) = (
            self.kv_heads * d,
            head / self.group() * d,
            self.scale() as f32,
        );
        let of = |values, stride, first| HeadView::new(values, stride, range.start, first, d);
        let [k_head, v_head] = [x.qkv[1], x.qkv[2]].map(|values| of(values, kv, first));
        let [q_head, dout_head] =
            [x.qkv[0], CpuSlice::F32(x.dout)].map(|values| of(values, width, head * d));
        buffers.room(part.keys.len());
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
        } = buffers;
        q_head.rows(isa, queries.clone(), q);
        dout_head.rows(isa, queries.clone(), dout);
        dq.clear(isa, queries.clone(), d);
        let row = range.start + queries.start;
        let lses: Vec<f32> = (row..range.end)
            .map(|row| x.lse[row * self.heads + head])
            .collect();
        let mut delta = vec![0.0; queries.len()];
        x.delta(row, (width, head * d, d), &mut delta);
        let blocks: Vec<QueryBlock> = self
            .query_blocks(range.len())
            .filter(|block| !part.seen(block).is_empty())
            .collect();
        for block in &blocks {
            let keys = part.seen(block).len();
            count_flops(2, block.queries.len(), keys, d);
            count_flops(3, block.queries.len(), d, keys);
        }
        for run in runs(part.keys.clone()) {
            k_head.rows(isa, run.clone(), k);
            v_head.rows(isa, run.clone(), v);
            dk.clear(isa, run.clone(), d);
            dv.clear(isa, run.clone(), d);
            for tile in blocks
                .iter()
                .filter_map(|block| ScoreTile::new(isa, block, &run))
            {
                q.head(d).columns(isa, q.own(&tile.queries), columns);
                tile.scores(k, columns, d, p);
                dout.head(d).columns(isa, dout.own(&tile.queries), columns);
                tile.scores(v, columns, d, ds);
                for panel in &tile.panels {
                    let (lane, vectors) = tile.lanes(panel);
                    let scores = lane..panel.keys.len() * QUERY_BLOCK;
                    let (p, ds, rows) = (
                        &mut p[scores.clone()],
                        &mut ds[scores],
                        q.own(&panel.queries),
                    );
                    panel.mask(self.window, p);
                    let rows = (&lses[rows.clone()], &delta[rows]);
                    by_lanes!(
                        vectors * isa.lanes,
                        gradients(p, ds, QUERY_BLOCK, rows, scale)
                    );
                }
                tile.accumulate_keys(p, dout, dv);
                tile.accumulate_keys(ds, q, dk);
                tile.accumulate_queries(ds, k, dq);
            }
            // SAFETY: these rows of this head belong to this task alone.
            unsafe {
                write(
                    &dk.values,
                    dk.width,
                    d,
                    range.start + run.start,
                    (to.dk, width, head * d),
                );
                write(
                    &dv.values,
                    dv.width,
                    d,
                    range.start + run.start,
                    (to.dv, width, head * d),
                );
            }
        }
        // SAFETY: as above.
        unsafe { write(&dq.values, dq.width, d, to.dq.1, (to.dq.0, width, head * d)) };
    }

    /// (N, Hq D) -> (N, Hkv D): the sum over each key head's group.
    fn sum_groups(&self, values: Vec<f32>) -> Vec<f32> {
        let (group, d) = (self.group(), self.head_dim);
        if group == 1 {
            return values;
        }
        // SAFETY: the loop writes every head of every row.
        let mut sums: Vec<f32> = unsafe { uninit_vec(values.len() / group) };
        let size = ROWS_PER_TASK * self.kv_heads * d;
        par_for_each(
            sums.chunks_mut(size).zip(values.chunks(group * size)),
            |(sums, values)| {
                for (sum, heads) in sums.chunks_exact_mut(d).zip(values.chunks_exact(group * d)) {
                    sum.copy_from_slice(&heads[..d]);
                    heads[d..]
                        .chunks_exact(d)
                        .for_each(|head| sum.iter_mut().zip(head).for_each(|(sum, x)| *sum += x));
                }
            },
        );
        sums
    }
}

/// out = share x.
pub(super) fn scale_into<O: Element>(out: &mut [O], x: &[f32], share: f32) {
    let n = out.len();
    dispatch(
        #[inline(always)]
        |_| {
            let (out, x) = (&mut out[..n], &x[..n]);
            for i in 0..n {
                out[i] = O::cast(x[i] * share);
            }
        },
    );
}

pub(super) struct Inputs<'a> {
    pub(super) qkv: [CpuSlice<'a>; 3],
    pub(super) out: CpuSlice<'a>,
    pub(super) dout: &'a [f32],
    pub(super) lse: &'a [f32],
}

impl Inputs<'_> {
    /// dout times out, summed over the `d` channels from `first` on of rows of `width`, from row `row` on.
    pub(super) fn delta(
        &self,
        row: usize,
        (width, first, d): (usize, usize, usize),
        delta: &mut [f32],
    ) {
        match self.out {
            CpuSlice::F32(out) => row_dots(self.dout, out, row * width + first, (width, d), delta),
            CpuSlice::Bf16(out) => row_dots(self.dout, out, row * width + first, (width, d), delta),
        }
    }
}

fn row_dots<T: Element>(
    dout: &[f32],
    out: &[T],
    start: usize,
    (width, d): (usize, usize),
    delta: &mut [f32],
) {
    dispatch(
        #[inline(always)]
        |_| {
            for (row, inner) in delta.iter_mut().enumerate() {
                let at = start + row * width;
                *inner = simd::dot(&dout[at..at + d], &out[at..at + d]) as f32;
            }
        },
    );
}

/// Copies rows of `d` numbers, `width` apart, to rows from `first` on of a (N, stride) buffer, from column `column` on.
///
/// # Safety
/// Those rows and columns lie inside the buffer, and no other task touches them.
pub(super) unsafe fn write(
    from: &[f32],
    width: usize,
    d: usize,
    first: usize,
    (at, stride, column): (SendPtr, usize, usize),
) {
    for (row, from) in from.chunks_exact(width).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(at.add((first + row) * stride + column), d) }
            .copy_from_slice(&from[..d]);
    }
}
