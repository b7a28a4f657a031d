//! The CPU passes: FlashAttention tiling (Dao et al. 2022), one task per query head and part of a
//! segment.
//!
//! A forward task computes some query blocks, a backward task a range of keys with all queries that
//! attend to them. A task runs in f32 vectors (`vector`) or, where the CPU has them, bf16 matrix
//! units (`bf16`). Sums across tasks, dK and dV over the query heads of a key head and dQ over key
//! ranges, are added afterwards in a fixed order.

use std::ops::Range;

use candle_core::Tensor;
use half::bf16;

use super::softmax::{ScoreScaling, scale_into};
use super::tile::HeadView;
use super::vector::SCRATCH;
use super::{Attention, AttentionSaved, KEY_BLOCK, QUERY_BLOCK, QueryBlock};
use crate::error::Result;
use crate::ops::gemm::{CpuSlice, Element, best};
use crate::ops::parallel::par_for_each;
use crate::ops::simd::{self, simd};
use crate::ops::storage::{
    CpuTensor, ELEMENTS_PER_TASK, ROWS_PER_TASK, SendPtr, f32_tensor, uninit_vec,
};
use crate::ops::{Context, Segments, count_flops};
use crate::work::Precision;

/// Query rows of a forward task: enough to amortise packing the keys.
const QUERIES_PER_TASK: usize = 4 * QUERY_BLOCK;
/// Minimum number of keys of a backward task, in whole key blocks.
const MIN_KEYS_PER_TASK: usize = 2 * KEY_BLOCK;
/// Maximum number of key ranges of a segment: enough tasks for more threads than heads, while the
/// partial dQ take at most 1.5 times the memory of dQ, or 3 times if bidirectional.
const MAX_KEY_RANGES: usize = 4;

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> the output in the compute type and the log-sum-exp (N, Hq).
    pub(super) fn forward_cpu(
        &self,
        context: Context<'_>,
        qkv: [&Tensor; 3],
        segments: &Segments,
    ) -> Result<(Tensor, Tensor)> {
        let shape = (qkv[0].dims2()?.0, self.heads * self.head_dim);
        if context.precision == Precision::Bf16 {
            // SAFETY: every row and head belongs to one task, which writes it.
            let mut out: Vec<bf16> = unsafe { uninit_vec(shape.0 * shape.1) };
            let lse = self.forward_into(context, qkv, segments, &mut out)?;
            return Ok((Tensor::from_vec(out, shape, qkv[0].device())?, lse));
        }
        // SAFETY: as above.
        let mut out: Vec<f32> = unsafe { uninit_vec(shape.0 * shape.1) };
        let lse = self.forward_into(context, qkv, segments, &mut out)?;
        Ok((f32_tensor(out, shape)?, lse))
    }

    /// Writes the output; returns the log-sum-exp.
    fn forward_into<O: Element>(
        &self,
        context: Context<'_>,
        [q, k, v]: [&Tensor; 3],
        segments: &Segments,
        out: &mut [O],
    ) -> Result<Tensor> {
        let q = CpuTensor::borrow(q)?;
        let k = CpuTensor::borrow(k)?;
        let v = CpuTensor::borrow(v)?;
        let shape = (segments.tokens(), self.heads);
        // SAFETY: every row and head belongs to one task, which writes it.
        let mut lse: Vec<f32> = unsafe { uninit_vec(shape.0 * shape.1) };
        let pass = ForwardPass {
            attention: self,
            qkv: [q.slice(), k.slice(), v.slice()],
            out: SendPtr(out.as_mut_ptr()),
            lse: SendPtr(lse.as_mut_ptr()),
        };
        let mut tasks = Vec::new();
        for segment in segments.ranges() {
            for start in (0..segment.len()).step_by(QUERIES_PER_TASK) {
                let queries = start..(start + QUERIES_PER_TASK).min(segment.len());
                tasks.extend((0..self.heads).map(|head| (segment, queries.clone(), head)));
            }
        }
        let isa = best();
        let unit = isa.bf16_unit(context.precision);
        par_for_each(tasks.into_iter(), |(segment, queries, head)| {
            let task = ForwardTask {
                pass: &pass,
                segment,
                queries,
                head,
            };
            match unit {
                #[cfg(target_arch = "x86_64")]
                Some(unit) => task.run_bf16(unit),
                _ => SCRATCH.with_borrow_mut(|scratch| task.run_vector(isa, scratch)),
            }
        });
        f32_tensor(lse, shape)
    }

    /// dout (N, Hq D) -> (dq, dk, dv).
    pub(super) fn backward_cpu(
        &self,
        context: Context<'_>,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (n, width) = (segments.tokens(), self.heads * self.head_dim);
        let dout = dout.contiguous()?;
        let dout = CpuTensor::borrow_f32(&dout)?;
        let q = CpuTensor::borrow(&saved.q)?;
        let k = CpuTensor::borrow(&saved.k)?;
        let v = CpuTensor::borrow(&saved.v)?;
        let out = CpuTensor::borrow(&saved.out)?;
        let lse = CpuTensor::borrow_f32(&saved.lse)?;
        let (ranges, partial_rows) = KeyRange::split(self.causal, segments.ranges());
        // SAFETY: every row and query head belongs to one task, which writes it.
        let buffer = |rows: usize| unsafe { uninit_vec::<f32>(rows * width) };
        let (mut dq, mut partial_dq) = (buffer(n), buffer(partial_rows));
        let (mut dk, mut dv) = (buffer(n), buffer(n));
        let pass = BackwardPass {
            attention: self,
            qkv: [q.slice(), k.slice(), v.slice()],
            out: out.slice(),
            dout: dout.f32_slice(),
            lse: lse.f32_slice(),
            dq: SendPtr(dq.as_mut_ptr()),
            partial_dq: SendPtr(partial_dq.as_mut_ptr()),
            dk: SendPtr(dk.as_mut_ptr()),
            dv: SendPtr(dv.as_mut_ptr()),
        };
        let heads = |range| (0..self.heads).map(move |head| (range, head));
        let isa = best();
        let unit = isa.bf16_unit(context.precision);
        par_for_each(ranges.iter().flat_map(heads), |(range, head)| {
            let task = BackwardTask {
                pass: &pass,
                range,
                head,
            };
            match unit {
                #[cfg(target_arch = "x86_64")]
                Some(unit) => task.run_bf16(unit),
                _ => SCRATCH.with_borrow_mut(|scratch| task.run_vector(isa, scratch)),
            }
        });
        for range in &ranges {
            range.add_partial_dq(&partial_dq, &mut dq, width);
        }
        let kv_shape = (n, self.kv_heads * self.head_dim);
        Ok((
            f32_tensor(dq, (n, width))?,
            f32_tensor(self.sum_groups_cpu(dk), kv_shape)?,
            f32_tensor(self.sum_groups_cpu(dv), kv_shape)?,
        ))
    }

    /// (N, Hq D) -> (N, Hkv D): the sum over each key head's group.
    fn sum_groups_cpu(&self, values: Vec<f32>) -> Vec<f32> {
        let (group, d) = (self.group(), self.head_dim);
        if group == 1 {
            return values;
        }
        // SAFETY: the loop writes every head of every row.
        let mut sums: Vec<f32> = unsafe { uninit_vec(values.len() / group) };
        let size = ROWS_PER_TASK * self.kv_heads * d;
        let tasks = sums.chunks_mut(size).zip(values.chunks(group * size));
        par_for_each(tasks, |(sums, values)| {
            for (sum, heads) in sums.chunks_exact_mut(d).zip(values.chunks_exact(group * d)) {
                sum.copy_from_slice(&heads[..d]);
                heads[d..]
                    .chunks_exact(d)
                    .for_each(|head| sum.iter_mut().zip(head).for_each(|(sum, x)| *sum += x));
            }
        });
        sums
    }

    /// Query head `head` of q, or of another tensor (N, Hq D), from row `start` on.
    fn query_head<'a>(&self, values: CpuSlice<'a>, start: usize, head: usize) -> HeadView<'a> {
        let (stride, d) = (self.heads * self.head_dim, self.head_dim);
        let values = values.slice_from(start * stride + head * d);
        HeadView { values, stride, d }
    }

    /// The key head of k or v (N, Hkv D) that query head `head` reads, from row `start` on.
    fn key_head<'a>(&self, values: CpuSlice<'a>, start: usize, head: usize) -> HeadView<'a> {
        let (stride, d) = (self.kv_heads * self.head_dim, self.head_dim);
        let values = values.slice_from(start * stride + head / self.group() * d);
        HeadView { values, stride, d }
    }
}

/// Inputs and outputs of all forward tasks.
pub(super) struct ForwardPass<'a, O> {
    attention: &'a Attention,
    qkv: [CpuSlice<'a>; 3],
    out: SendPtr<O>,
    lse: SendPtr,
}

/// Some query blocks of one query head of a segment.
pub(super) struct ForwardTask<'a, O> {
    pass: &'a ForwardPass<'a, O>,
    segment: &'a Range<usize>,
    /// Counted from the segment's start.
    pub(super) queries: Range<usize>,
    head: usize,
}

impl<O: Element> ForwardTask<'_, O> {
    pub(super) fn attention(&self) -> &Attention {
        self.pass.attention
    }

    /// Head views of q, k and v.
    pub(super) fn heads(&self) -> [HeadView<'_>; 3] {
        let (attention, start) = (self.pass.attention, self.segment.start);
        let [q, k, v] = self.pass.qkv;
        [
            attention.query_head(q, start, self.head),
            attention.key_head(k, start, self.head),
            attention.key_head(v, start, self.head),
        ]
    }

    /// The task's query blocks; counts their products.
    pub(super) fn blocks(&self) -> Vec<QueryBlock> {
        let attention = self.pass.attention;
        let blocks = attention.query_blocks(self.segment.len());
        let blocks: Vec<_> = blocks
            .filter(|block| self.queries.contains(&block.queries.start))
            .collect();
        for block in &blocks {
            count_flops(1, block.queries.len(), block.keys.len(), attention.head_dim);
            count_flops(1, block.queries.len(), attention.head_dim, block.keys.len());
        }
        blocks
    }

    /// Writes the output row `pv / sum` of a query, and its log-sum-exp; `pv` (D) and `sum` are the
    /// sums of exp(scale (score - max)) V and of exp(scale (score - max)), scores after
    /// `cap_scores`.
    pub(super) fn store(&self, query: usize, max: f32, sum: f32, pv: &[f32]) {
        let (heads, d) = (self.pass.attention.heads, self.pass.attention.head_dim);
        let row = self.segment.start + query;
        let lse = ScoreScaling::new(self.pass.attention).after_cap() * max + sum.ln();
        // SAFETY: this row of this head belongs to this task alone.
        let out = unsafe {
            *self.pass.lse.add(row * heads + self.head) = lse;
            std::slice::from_raw_parts_mut(self.pass.out.add((row * heads + self.head) * d), d)
        };
        scale_into(out, &pv[..d], 1.0 / sum);
    }
}

/// A range of a segment's keys, with all queries of the segment, or, if causal, those from its first
/// key on. With a sliding window some may attend to none of the keys.
pub(super) struct KeyRange {
    segment: Range<usize>,
    /// Counted from the segment's start.
    pub(super) keys: Range<usize>,
    /// Counted from the segment's start.
    pub(super) queries: Range<usize>,
    /// First row of its partial sum in the buffer of partial dQ; `None`: it writes to dQ directly.
    partial_dq: Option<usize>,
}

impl KeyRange {
    /// The key ranges of all segments, and the number of rows in the buffer of partial dQ.
    fn split(causal: bool, segments: &[Range<usize>]) -> (Vec<Self>, usize) {
        let mut ranges = Vec::new();
        let mut rows = 0;
        for segment in segments {
            let size = segment.len().div_ceil(MAX_KEY_RANGES);
            let size = size.next_multiple_of(KEY_BLOCK).max(MIN_KEYS_PER_TASK);
            for start in (0..segment.len()).step_by(size) {
                let first = if causal { start } else { 0 };
                ranges.push(Self {
                    segment: segment.clone(),
                    keys: start..(start + size).min(segment.len()),
                    queries: first..segment.len(),
                    partial_dq: (start > 0).then_some(rows),
                });
                if start > 0 {
                    rows += segment.len() - first;
                }
            }
        }
        (ranges, rows)
    }

    /// Adds the range's partial dQ, if any, to dQ; both have a row stride of `width`.
    fn add_partial_dq(&self, partial: &[f32], dq: &mut [f32], width: usize) {
        let Some(first) = self.partial_dq else { return };
        let start = self.segment.start + self.queries.start;
        let to = dq[start * width..self.segment.end * width].chunks_mut(ELEMENTS_PER_TASK);
        let from = partial[first * width..].chunks(ELEMENTS_PER_TASK);
        par_for_each(to.zip(from), |(to, from)| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        });
    }

    /// The keys of this range that the query block attends to; empty if none.
    pub(super) fn visible(&self, block: &QueryBlock) -> Range<usize> {
        let start = block.keys.start.max(self.keys.start);
        start..block.keys.end.min(self.keys.end).max(start)
    }
}

/// Inputs and outputs of all backward tasks.
pub(super) struct BackwardPass<'a> {
    attention: &'a Attention,
    qkv: [CpuSlice<'a>; 3],
    out: CpuSlice<'a>,
    dout: &'a [f32],
    lse: &'a [f32],
    dq: SendPtr,
    partial_dq: SendPtr,
    dk: SendPtr,
    dv: SendPtr,
}

/// One query head of a key range.
pub(super) struct BackwardTask<'a> {
    pass: &'a BackwardPass<'a>,
    pub(super) range: &'a KeyRange,
    head: usize,
}

/// The gradient that a task writes: dq, dk or dv, each (N, Hq D) before the sum over groups.
#[derive(Clone, Copy)]
pub(super) enum Grad {
    Q,
    K,
    V,
}

impl BackwardTask<'_> {
    pub(super) fn attention(&self) -> &Attention {
        self.pass.attention
    }

    /// Head views of q, k, v and dout.
    pub(super) fn heads(&self) -> [HeadView<'_>; 4] {
        let (attention, start) = (self.pass.attention, self.range.segment.start);
        let [q, k, v] = self.pass.qkv;
        [
            attention.query_head(q, start, self.head),
            attention.key_head(k, start, self.head),
            attention.key_head(v, start, self.head),
            attention.query_head(CpuSlice::F32(self.pass.dout), start, self.head),
        ]
    }

    /// The range's query blocks; counts their products with its keys.
    pub(super) fn blocks(&self) -> Vec<QueryBlock> {
        let attention = self.pass.attention;
        let blocks = attention.query_blocks(self.range.segment.len());
        let blocks: Vec<_> = blocks
            .filter(|block| block.queries.start >= self.range.queries.start)
            .collect();
        for block in &blocks {
            let keys = self.range.visible(block).len();
            count_flops(2, block.queries.len(), keys, attention.head_dim);
            count_flops(3, block.queries.len(), attention.head_dim, keys);
        }
        blocks
    }

    /// The log-sum-exp of these queries.
    pub(super) fn lse(&self, queries: Range<usize>) -> impl Iterator<Item = f32> {
        let start = self.range.segment.start;
        let heads = self.pass.attention.heads;
        queries.map(move |query| self.pass.lse[(start + query) * heads + self.head])
    }

    /// delta = rowsum(dout * out) of the queries from `first` on.
    pub(super) fn delta(&self, first: usize, delta: &mut [f32]) {
        let (heads, d) = (self.pass.attention.heads, self.pass.attention.head_dim);
        let row = self.range.segment.start + first;
        let start = (row * heads + self.head) * d;
        let dout = &self.pass.dout[start..];
        match self.pass.out.slice_from(start) {
            CpuSlice::F32(out) => row_dots(dout, out, heads * d, d, delta),
            CpuSlice::Bf16(out) => row_dots(dout, out, heads * d, d, delta),
        }
    }

    /// Writes the first D columns of `rows` (row stride `width`) to a gradient, from row `first` of
    /// the segment on.
    pub(super) fn store(&self, grad: Grad, first: usize, rows: &[f32], width: usize) {
        let (heads, d) = (self.pass.attention.heads, self.pass.attention.head_dim);
        let row = self.range.segment.start + first;
        let within = first - self.range.queries.start;
        let (to, row) = match (grad, self.range.partial_dq) {
            (Grad::Q, Some(partial)) => (self.pass.partial_dq, partial + within),
            (Grad::Q, None) => (self.pass.dq, row),
            (Grad::K, _) => (self.pass.dk, row),
            (Grad::V, _) => (self.pass.dv, row),
        };
        for (index, from) in rows.chunks_exact(width).enumerate() {
            let at = ((row + index) * heads + self.head) * d;
            // SAFETY: these rows belong, in this head's columns, to this task alone.
            unsafe { std::slice::from_raw_parts_mut(to.add(at), d) }.copy_from_slice(&from[..d]);
        }
    }
}

/// `out[i]` = dot product of row i of `a` and of `b`: rows of `d` elements, `stride` apart.
fn row_dots<T: Element>(a: &[f32], b: &[T], stride: usize, d: usize, out: &mut [f32]) {
    simd!(|_| {
        for (row, out) in out.iter_mut().enumerate() {
            let at = row * stride;
            *out = simd::sum_map2(&a[at..at + d], &b[at..at + d], |a, b: T| a * b.as_f32()) as f32;
        }
    });
}
