//! The fused passes: scores with queries along the vectors, so that softmax runs down columns and no tile is ever transposed.
//!
//! For up to a tile's width of queries, scores lie as (keys, queries): S^T = K Q^T. The same buffer is then read by broadcast in either
//! direction: O = P V and dQ = dS K take its columns, dV += P^T dO and dK += dS^T Q its rows. One task is one query head of a segment (in
//! the forward pass, of some of its query blocks); what the query heads of one key head add up to is summed afterwards, in order.

use std::ops::Range;

use candle_core::Tensor;
use half::bf16;

use super::{Attention, AttentionSaved, BLOCK, Block};
use crate::error::Result;
use crate::ops::host::{Host, ROWS_PER_TASK, Shared, Stored, tensor, uninitialized};
use crate::ops::product::{Isa, Matrix, TileArgs, Values, best, pack, strip};
use crate::ops::simd::{self, vectorized};
use crate::ops::team::each;
use crate::ops::{Context, Segments, issue};
use crate::work::Precision;

/// Query rows of a forward task: enough that copying the keys once for them does not show.
const QUERIES: usize = 4 * BLOCK;
/// Keys whose probabilities are summed before the sum goes on in another: sums of thousands stay accurate in f32.
const KEYS: usize = 256;

/// Rows and channels of one head inside a (N, `stride`) tensor, from the segment's first row on.
#[derive(Clone, Copy)]
struct Head<'a> {
    values: Values<'a>,
    stride: usize,
    d: usize,
}

impl<'a> Head<'a> {
    fn new(values: Values<'a>, stride: usize, start: usize, first: usize, d: usize) -> Self {
        Self { values: values.after(start * stride + first), stride, d }
    }

    /// Rows `rows` as columns, in f32: (d, `lanes`), zero beyond the last row.
    fn columns(&self, isa: &Isa, rows: Range<usize>, lanes: usize, out: &mut Vec<f32>) {
        out.resize(self.d * lanes, 0.0);
        let matrix = Matrix::inside(self.values, rows.start * self.stride, (self.d, 1), (rows.len(), self.stride));
        pack(isa, &matrix, 0..self.d, 0..rows.len(), out);
    }

    /// Rows `0..count`, one after the other.
    fn rows(&self, isa: &Isa, count: usize) -> Rows {
        let width = self.d.next_multiple_of(isa.lanes);
        let mut values = vec![0.0; count * width];
        pack(isa, &Matrix::inside(self.values, 0, (count, self.stride), (self.d, 1)), 0..count, 0..self.d, &mut values);
        Rows { values, width }
    }
}

/// Rows of one head, in f32, as wide as a whole number of vectors (zero beyond the head's channels).
struct Rows {
    values: Vec<f32>,
    width: usize,
}

impl Rows {
    fn row(&self, row: usize) -> *const f32 {
        self.values[row * self.width..].as_ptr()
    }
}

/// Up to a tile's width of queries of a block, and the keys they see: all counted from the segment's start.
pub(super) struct Panel {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    /// Lanes of its buffers: the queries, rounded up to whole vectors.
    pub(super) lanes: usize,
}

/// A block's panels, each with the keys up to its last query: no later one is seen. What a pass counts is the block's products all the same.
fn panels(isa: &Isa, block: &Block) -> impl Iterator<Item = Panel> + use<> {
    let (queries, first, most, vector) = (block.queries.clone(), block.keys.start, isa.columns(), isa.lanes);
    queries.clone().step_by(most).map(move |start| {
        let queries = start..(start + most).min(queries.end);
        Panel { lanes: queries.len().next_multiple_of(vector), keys: first..queries.end, queries }
    })
}

impl Panel {
    /// out (keys, lanes) = rows of `head` times `columns` (d, lanes).
    fn scores(&self, isa: &Isa, head: &Rows, columns: &[f32], d: usize, out: &mut Vec<f32>) {
        out.resize(self.keys.len() * self.lanes, 0.0);
        let (a_row, b_row, out_row) = (head.width, self.lanes, self.lanes);
        let (start, start_row) = (std::ptr::null(), 0);
        let (a, b, out) = (head.row(self.keys.start), columns.as_ptr(), out.as_mut_ptr());
        let args = TileArgs { k: d, a, a_row, a_column: 1, b, b_row, start, start_row, out, out_row };
        // SAFETY: `head` holds every key's row, `columns` is (d, lanes), `out` (keys, lanes), just resized.
        unsafe { strip(isa, self.keys.len(), self.lanes / isa.lanes, args) };
    }

    /// out (queries, head's width) = the columns of `scores` (keys, lanes) times the keys' rows of `head`.
    fn mix(&self, isa: &Isa, scores: &[f32], head: &Rows, out: &mut Vec<f32>) {
        out.resize(self.queries.len() * head.width, 0.0);
        assert!(scores.len() >= self.keys.len() * self.lanes, "every key has a score");
        for first in (0..head.width).step_by(isa.columns()) {
            let vectors = (head.width - first).min(isa.columns()) / isa.lanes;
            // SAFETY: scores are (keys, lanes) with a lane for each query, `head` holds every key's row of `width`, `out` (queries, width).
            unsafe {
                let args = TileArgs {
                    k: self.keys.len(),
                    a: scores.as_ptr(),
                    a_row: 1,
                    a_column: self.lanes,
                    b: head.row(self.keys.start).add(first),
                    b_row: head.width,
                    start: std::ptr::null(),
                    start_row: 0,
                    out: out.as_mut_ptr().add(first),
                    out_row: head.width,
                };
                strip(isa, self.queries.len(), vectors, args);
            }
        }
    }

    /// The keys' rows of `sum` += the rows of `scores` (keys, lanes) times the queries' rows of `head`.
    fn spread(&self, isa: &Isa, scores: &[f32], head: &Rows, sum: &mut Rows) {
        assert!(scores.len() >= self.keys.len() * self.lanes && sum.values.len() >= self.keys.end * sum.width);
        for first in (0..head.width).step_by(isa.columns()) {
            let vectors = (head.width - first).min(isa.columns()) / isa.lanes;
            // SAFETY: scores are (keys, lanes), `head` holds every query's row, `sum` every key's (checked), both `width` wide.
            unsafe {
                let out = sum.values.as_mut_ptr().add(self.keys.start * sum.width + first);
                let args = TileArgs {
                    k: self.queries.len(),
                    a: scores.as_ptr(),
                    a_row: self.lanes,
                    a_column: 1,
                    b: head.row(self.queries.start).add(first),
                    b_row: head.width,
                    start: out,
                    start_row: sum.width,
                    out,
                    out_row: sum.width,
                };
                strip(isa, self.keys.len(), vectors, args);
            }
        }
    }

    /// Minus infinity where a query does not see a key: where it comes before the key, or `window` or more after it.
    pub(super) fn hide(&self, window: Option<usize>, scores: &mut [f32]) {
        let (start, lanes) = (self.queries.start, self.queries.len());
        for (key, row) in self.keys.clone().zip(scores.chunks_exact_mut(self.lanes)) {
            row[..key.saturating_sub(start).min(lanes)].fill(f32::NEG_INFINITY);
            let unseen = window.map_or(lanes, |window| (key + window).saturating_sub(start).min(lanes));
            row[unseen..lanes].fill(f32::NEG_INFINITY);
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

/// Scores (keys, L) -> exp(scale (score - max)), not yet divided by their sum; each lane's sum, and log-sum-exp of `scale` times its scores.
pub(super) fn softmax<const L: usize>(scores: &mut [f32], scale: f32, sums: &mut [f32], lse: &mut [f32]) {
    let rows = scores.as_chunks_mut::<L>().0;
    vectorized(
        #[inline(always)]
        || {
            let mut max = [f32::NEG_INFINITY; L];
            for row in rows.iter() {
                max.iter_mut().zip(row).for_each(|(max, x)| *max = if *x > *max { *x } else { *max });
            }
            let mut total = [0.0f32; L];
            for rows in rows.chunks_mut(KEYS) {
                let mut sum = [0.0f32; L];
                for row in rows.iter_mut() {
                    for lane in 0..L {
                        row[lane] = simd::exp(scale * (row[lane] - max[lane]));
                        sum[lane] += row[lane];
                    }
                }
                total.iter_mut().zip(sum).for_each(|(total, sum)| *total += sum);
            }
            for lane in 0..L {
                lse[lane] = scale * max[lane] + total[lane].ln();
                sums[lane] = total[lane];
            }
        },
    );
}

/// Scores and dP (keys, L) -> P and dS, in place.
pub(super) fn gradients<const L: usize>(scores: &mut [f32], dp: &mut [f32], lse: &[f32], inner: &[f32], scale: f32) {
    let (mut lses, mut inners) = ([0.0; L], [0.0; L]);
    lses[..lse.len()].copy_from_slice(lse);
    inners[..inner.len()].copy_from_slice(inner);
    vectorized(
        #[inline(always)]
        || {
            let (scores, dp) = (scores.as_chunks_mut::<L>().0, dp.as_chunks_mut::<L>().0);
            for row in 0..scores.len() {
                let (p, ds) = (&mut scores[row], &mut dp[row]);
                for lane in 0..L {
                    p[lane] = simd::exp(scale * p[lane] - lses[lane]);
                    ds[lane] = p[lane] * (ds[lane] - inners[lane]) * scale;
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
            let mut out: Vec<f32> = unsafe { uninitialized(n * width) };
            let lse = self.forward_into(context, [q, k, v], segments, &mut out)?;
            return Ok((tensor(out, (n, width))?, lse));
        }
        // SAFETY: as above.
        let mut out: Vec<bf16> = unsafe { uninitialized(n * width) };
        let lse = self.forward_into(context, [q, k, v], segments, &mut out)?;
        Ok((Tensor::from_vec(out, (n, width), q.device())?, lse))
    }

    /// Writes the output; returns the log-sum-exps.
    fn forward_into<O: Stored>(
        &self,
        context: Context<'_>,
        x: [&Tensor; 3],
        segments: &Segments,
        out: &mut [O],
    ) -> Result<Tensor> {
        let n = x[0].dims2()?.0;
        let hosts = (Host::open_any(x[0])?, Host::open_any(x[1])?, Host::open_any(x[2])?);
        let (q, k, v) = (hosts.0.values(), hosts.1.values(), hosts.2.values());
        // SAFETY: every row and head belongs to one task, which writes it.
        let mut lse: Vec<f32> = unsafe { uninitialized(n * self.heads) };
        let (out_at, lse_at) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
        let parts = segments.ranges().iter().flat_map(|range| {
            let starts = (0..range.len()).step_by(QUERIES);
            starts.map(move |start| (range.clone(), start..(start + QUERIES).min(range.len())))
        });
        let tasks: Vec<_> = parts.flat_map(|part| (0..self.heads).map(move |head| (part.clone(), head))).collect();
        let isa = best();
        let unit = isa.narrow_unit(context.precision);
        each(tasks.into_iter(), |((range, queries), head)| {
            let at = (out_at, lse_at);
            match unit {
                #[cfg(target_arch = "x86_64")]
                Some(unit) => self.forward_tiles(unit, [q, k, v], &range, queries, head, at),
                _ => self.forward_task(isa, [q, k, v], &range, queries, head, at),
            }
        });
        tensor(lse, (n, self.heads))
    }

    fn forward_task<O: Stored>(
        &self,
        isa: &Isa,
        x: [Values<'_>; 3],
        range: &Range<usize>,
        queries: Range<usize>,
        head: usize,
        at: (Shared<O>, Shared),
    ) {
        let (d, width, scale) = (self.head_dim, self.heads * self.head_dim, self.scale() as f32);
        let (kv, first) = (self.kv_heads * d, head / self.group() * d);
        let q = Head::new(x[0], width, range.start, head * d, d);
        let [k, v] = [x[1], x[2]].map(|x| Head::new(x, kv, range.start, first, d).rows(isa, queries.end));
        let (mut columns, mut scores, mut mixed) = (Vec::new(), Vec::new(), Vec::new());
        let within = |block: &Block| block.queries.start >= queries.start && block.queries.start < queries.end;
        for block in self.blocks(range.len()).filter(within) {
            issue(1, block.queries.len(), block.keys.len(), d);
            issue(1, block.queries.len(), d, block.keys.len());
            for panel in panels(isa, &block) {
                q.columns(isa, panel.queries.clone(), panel.lanes, &mut columns);
                panel.scores(isa, &k, &columns, d, &mut scores);
                panel.hide(self.window, &mut scores);
                let (mut sums, mut lses) = ([0.0f32; 32], [0.0f32; 32]);
                by_lanes!(panel.lanes, softmax(&mut scores, scale, &mut sums, &mut lses));
                panel.mix(isa, &scores, &v, &mut mixed);
                for (lane, query) in panel.queries.clone().enumerate() {
                    let (row, share) = (range.start + query, 1.0 / sums[lane]);
                    // SAFETY: this row of this head belongs to this task alone.
                    let out = unsafe {
                        *at.1.at(row * self.heads + head) = lses[lane];
                        std::slice::from_raw_parts_mut(at.0.at(row * width + head * d), d)
                    };
                    share_out(out, &mixed[lane * v.width..][..d], share);
                }
            }
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
        let hosts = (Host::open_any(&saved.q)?, Host::open_any(&saved.k)?, Host::open_any(&saved.v)?);
        let (out, dout, lse) = (Host::open_any(&saved.out)?, Host::open(&dout)?, Host::open(&saved.lse)?);
        let x = Inputs {
            qkv: [hosts.0.values(), hosts.1.values(), hosts.2.values()],
            out: out.values(),
            dout: dout.slice(),
            lse: lse.slice(),
        };
        // SAFETY: every row and query head belongs to one task, which writes it.
        let mut grads: [Vec<f32>; 3] = unsafe { [uninitialized(n * width), uninitialized(n * width), uninitialized(n * width)] };
        let at = grads.each_mut().map(|values| Shared(values.as_mut_ptr()));
        let tasks = segments.ranges().iter().flat_map(|range| (0..self.heads).map(move |head| (range, head)));
        let isa = best();
        let unit = isa.narrow_unit(context.precision);
        each(tasks, |(range, head)| match unit {
            #[cfg(target_arch = "x86_64")]
            Some(unit) => self.backward_tiles(unit, &x, range, head, at),
            _ => self.backward_task(isa, &x, range, head, at),
        });
        let [dq, dk, dv] = grads;
        let kv = (n, self.kv_heads * self.head_dim);
        Ok((tensor(dq, (n, width))?, tensor(self.grouped(dk), kv)?, tensor(self.grouped(dv), kv)?))
    }

    fn backward_task(&self, isa: &Isa, x: &Inputs<'_>, range: &Range<usize>, head: usize, at: [Shared; 3]) {
        let (d, width) = (self.head_dim, self.heads * self.head_dim);
        let (kv, first, scale) = (self.kv_heads * d, head / self.group() * d, self.scale() as f32);
        let of = |values, stride, first| Head::new(values, stride, range.start, first, d);
        let [q_head, dout_head] = [x.qkv[0], Values::F32(x.dout)].map(|values| of(values, width, head * d));
        let [k, v] = [x.qkv[1], x.qkv[2]].map(|values| of(values, kv, first).rows(isa, range.len()));
        let [q, out, dout] = [q_head, of(x.out, width, head * d), dout_head].map(|head| head.rows(isa, range.len()));
        let zero = || Rows { values: vec![0.0; k.values.len()], width: k.width };
        let (mut dk, mut dv) = (zero(), zero());
        let (mut columns, mut p, mut ds, mut dq) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for block in self.blocks(range.len()) {
            let (rows, cols) = (block.queries.len(), block.keys.len());
            issue(2, rows, cols, d);
            issue(3, rows, d, cols);
            for panel in panels(isa, &block) {
                let queries = panel.queries.clone();
                q_head.columns(isa, queries.clone(), panel.lanes, &mut columns);
                panel.scores(isa, &k, &columns, d, &mut p);
                panel.hide(self.window, &mut p);
                dout_head.columns(isa, queries.clone(), panel.lanes, &mut columns);
                panel.scores(isa, &v, &columns, d, &mut ds);
                let (mut lses, mut inners) = ([0.0f32; 32], [0.0f32; 32]);
                for (lane, query) in queries.clone().enumerate() {
                    lses[lane] = x.lse[(range.start + query) * self.heads + head];
                    let of = |head: &Rows| query * head.width..query * head.width + d;
                    inners[lane] = vectorized(
                        #[inline(always)]
                        || simd::dot(&dout.values[of(&dout)], &out.values[of(&out)]) as f32,
                    );
                }
                let count = queries.len();
                by_lanes!(panel.lanes, gradients(&mut p, &mut ds, &lses[..count], &inners[..count], scale));
                panel.spread(isa, &p, &dout, &mut dv);
                panel.spread(isa, &ds, &q, &mut dk);
                panel.mix(isa, &ds, &k, &mut dq);
                // SAFETY: these rows of this head belong to this task alone.
                unsafe { write(&dq, q.width, d, range.start + queries.start, (at[0], width, head * d)) };
            }
        }
        // SAFETY: the rows of this segment belong, in this head's columns, to this task alone.
        unsafe {
            write(&dk.values, dk.width, d, range.start, (at[1], width, head * d));
            write(&dv.values, dv.width, d, range.start, (at[2], width, head * d));
        }
    }

    /// (N, Hq D) -> (N, Hkv D): the sum over each key head's group.
    fn grouped(&self, values: Vec<f32>) -> Vec<f32> {
        let (group, d) = (self.group(), self.head_dim);
        if group == 1 {
            return values;
        }
        // SAFETY: the loop writes every head of every row.
        let mut sums: Vec<f32> = unsafe { uninitialized(values.len() / group) };
        let size = ROWS_PER_TASK * self.kv_heads * d;
        each(sums.chunks_mut(size).zip(values.chunks(group * size)), |(sums, values)| {
            for (sum, heads) in sums.chunks_exact_mut(d).zip(values.chunks_exact(group * d)) {
                sum.copy_from_slice(&heads[..d]);
                heads[d..].chunks_exact(d).for_each(|head| sum.iter_mut().zip(head).for_each(|(sum, x)| *sum += x));
            }
        });
        sums
    }
}

/// out = share x.
pub(super) fn share_out<O: Stored>(out: &mut [O], x: &[f32], share: f32) {
    let n = out.len();
    vectorized(
        #[inline(always)]
        || {
            let (out, x) = (&mut out[..n], &x[..n]);
            for i in 0..n {
                out[i] = O::of(x[i] * share);
            }
        },
    );
}

pub(super) struct Inputs<'a> {
    pub(super) qkv: [Values<'a>; 3],
    pub(super) out: Values<'a>,
    pub(super) dout: &'a [f32],
    pub(super) lse: &'a [f32],
}

/// Copies rows of `d` numbers, `width` apart, to rows from `first` on of a (N, stride) buffer, from column `column` on.
///
/// # Safety
/// Those rows and columns lie inside the buffer, and no other task touches them.
pub(super) unsafe fn write(from: &[f32], width: usize, d: usize, first: usize, (at, stride, column): (Shared, usize, usize)) {
    for (row, from) in from.chunks_exact(width).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(at.at((first + row) * stride + column), d) }.copy_from_slice(&from[..d]);
    }
}
