//! Causal grouped-query attention over segments, without a (T, T) matrix.
//!
//! q (N, Hq * D), k and v (N, Hkv * D), output (N, Hq * D); query head h reads key head h / (Hq / Hkv). Queries go in blocks of
//! `BLOCK` rows against the keys up to the block's end, so memory is `BLOCK x T` and the executed work is that of the blocks, not
//! of the full square. The forward pass keeps each row's log-sum-exp; the backward pass computes the block's probabilities again from it
//! (Dao et al. 2022, "FlashAttention", section 3.1, at this block size).

use std::ops::Range;

use candle_core::{D, Device, Tensor};
use rayon::prelude::*;

use super::host::{Host, Shared, expect, tensor};
use super::simd::{self, vectorized};
use super::{Context, Segments, batched, issue};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Query rows of one block.
const BLOCK: usize = 64;

/// The sizes of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// A token sees itself and this many tokens before it, less one; `None`: all before it.
    pub window: Option<usize>,
}

/// One block of a segment of length T: its query rows and the key rows they may see, both counted from the segment's start.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Attention {
    fn blocks(&self, length: usize) -> impl Iterator<Item = Block> + use<> {
        let window = self.window.unwrap_or(usize::MAX);
        (0..length).step_by(BLOCK).map(move |start| {
            let end = (start + BLOCK).min(length);
            Block { queries: start..end, keys: (start + 1).saturating_sub(window)..end }
        })
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Query heads of one key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The keys that query row `i` (counted from the segment's start) sees.
    fn visible(&self, i: usize) -> Range<usize> {
        (i + 1).saturating_sub(self.window.unwrap_or(usize::MAX))..i + 1
    }
}

/// Work of `count` products per block: (queries, keys, D) or its permutations.
fn blocks_cost(attention: &Attention, segments: &[usize], scores: usize, mixes: usize, precision: Precision) -> Work {
    let mut work = Work::default();
    let (heads, d) = (attention.heads, attention.head_dim);
    for length in segments {
        for block in attention.blocks(*length) {
            let (q, k) = (block.queries.len(), block.keys.len());
            work += &Work::products(heads * scores, q, k, d, precision);
            work += &Work::products(heads * mixes, q, d, k, precision);
        }
    }
    work
}

/// Work of a forward pass over segments of these lengths.
pub fn attention_forward_cost(attention: &Attention, segments: &[usize]) -> Work {
    let pairs: usize = segments.iter().flat_map(|t| attention.blocks(*t)).map(|b| b.queries.len() * b.keys.len()).sum();
    blocks_cost(attention, segments, 1, 1, Precision::F32) + Work::sweep(4 * attention.heads * pairs, 4 * attention.heads * pairs)
}

/// Work of a backward pass: scores again, dP = dO V^T; dQ = dS K; dK = dS^T Q and dV = P^T dO cost as much as a mix each.
pub fn attention_backward_cost(attention: &Attention, segments: &[usize]) -> Work {
    let pairs: usize = segments.iter().flat_map(|t| attention.blocks(*t)).map(|b| b.queries.len() * b.keys.len()).sum();
    blocks_cost(attention, segments, 2, 3, Precision::F32) + Work::sweep(8 * attention.heads * pairs, 6 * attention.heads * pairs)
}

/// Work of one new token against `keys` cached ones (itself included).
pub fn attention_decode_cost(attention: &Attention, keys: usize) -> Work {
    let seen = keys.min(attention.window.unwrap_or(usize::MAX));
    let (heads, d) = (attention.heads, attention.head_dim);
    Work::products(heads, 1, seen, d, Precision::F32) + Work::products(heads, 1, d, seen, Precision::F32)
}

/// What `backward` needs: inputs, output, and each row's log-sum-exp (N, Hq).
#[derive(Debug, Clone)]
pub struct AttentionSaved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
}

impl AttentionSaved {
    /// The keys and values that went in, (N, Hkv D) each.
    pub fn keys_and_values(&self) -> (Tensor, Tensor) {
        (self.k.clone(), self.v.clone())
    }
}

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> (N, Hq D).
    pub fn forward(
        &self,
        context: Context<'_>,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, AttentionSaved)> {
        self.check(segments.tokens(), &[("q", &q, self.heads), ("k", &k, self.kv_heads), ("v", &v, self.kv_heads)])?;
        context.tally.add(attention_forward_cost(self, &lengths(segments)));
        let (out, lse) = if context.fused(&q) {
            self.forward_cpu(&q, &k, &v, segments)?
        } else {
            self.forward_reference(&q, &k, &v, segments)?
        };
        Ok((out.clone(), AttentionSaved { q, k, v, out, lse }))
    }

    /// dout (N, Hq D) -> (dq, dk, dv).
    pub fn backward(
        &self,
        context: Context<'_>,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (q, kv) = (self.heads, self.kv_heads);
        let all = [("q", &saved.q, q), ("k", &saved.k, kv), ("v", &saved.v, kv), ("out", &saved.out, q), ("dout", dout, q)];
        self.check(segments.tokens(), &all)?;
        expect("lse", &saved.lse, &[segments.tokens(), self.heads])?;
        context.tally.add(attention_backward_cost(self, &lengths(segments)));
        if context.fused(dout) {
            self.backward_cpu(dout, saved, segments)
        } else {
            self.backward_reference(dout, saved, segments)
        }
    }

    /// One new token: q (1, Hq D) against k, v (T, Hkv D), all of them visible unless a window cuts them -> (1, Hq D).
    pub fn decode(&self, context: Context<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let keys = k.dims2()?.0.max(1);
        self.check(1, &[("q", q, self.heads)])?;
        self.check(keys, &[("k", k, self.kv_heads), ("v", v, self.kv_heads)])?;
        context.tally.add(attention_decode_cost(self, keys));
        let seen = self.visible(keys - 1);
        let (d, hkv) = (self.head_dim, self.kv_heads);
        let heads_first = |t: &Tensor| -> Result<Tensor> {
            Ok(t.narrow(0, seen.start, seen.len())?.reshape((seen.len(), hkv, d))?.transpose(0, 1)?.contiguous()?)
        };
        let q = q.reshape((hkv, self.group(), d))?;
        let scores = (batched(&q, &heads_first(k)?.t()?)? * self.scale())?;
        let p = softmax(&scores)?.0;
        Ok(batched(&p, &heads_first(v)?)?.reshape((1, self.heads * d))?)
    }

    /// Refuses sizes that cannot be and tensors, each of so many heads, that contradict them: the fused pass computes addresses from both.
    fn check(&self, tokens: usize, tensors: &[(&str, &Tensor, usize)]) -> Result<()> {
        let divides = self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        if !divides || self.head_dim == 0 || self.window == Some(0) {
            return Err(Error::new(Kind::Tensor, "attention cannot have these sizes")
                .value(format!("{self:?}"))
                .rule("all are at least 1, and kv_heads divides heads"));
        }
        tensors.iter().try_for_each(|(name, tensor, heads)| expect(name, tensor, &[tokens, heads * self.head_dim]))
    }

    // ---- reference: candle primitives on (H, T, D), any device ----

    /// (T, H D) rows `range` of x as (H, T, D), key heads repeated for their group.
    fn heads_of(&self, x: &Tensor, range: &Range<usize>, heads: usize) -> Result<Tensor> {
        let (t, d) = (range.len(), self.head_dim);
        let x = x.narrow(0, range.start, t)?.reshape((t, heads, 1, d))?;
        let repeats = self.heads / heads;
        Ok(x.broadcast_as((t, heads, repeats, d))?.reshape((t, self.heads, d))?.transpose(0, 1)?.contiguous()?)
    }

    /// Zero where visible, minus infinity elsewhere: (queries, keys).
    fn mask(&self, block: &Block, device: &Device) -> Result<Tensor> {
        let mut mask = vec![f32::NEG_INFINITY; block.queries.len() * block.keys.len()];
        for (row, i) in mask.chunks_mut(block.keys.len()).zip(block.queries.clone()) {
            let seen = self.visible(i);
            row[seen.start.max(block.keys.start) - block.keys.start..seen.end - block.keys.start].fill(0.0);
        }
        Ok(Tensor::from_vec(mask, (block.queries.len(), block.keys.len()), device)?)
    }

    fn block_scores(&self, q: &Tensor, k: &Tensor, block: &Block) -> Result<Tensor> {
        let q = q.narrow(1, block.queries.start, block.queries.len())?;
        let k = k.narrow(1, block.keys.start, block.keys.len())?;
        let scores = (batched(&q.contiguous()?, &k.contiguous()?.t()?)? * self.scale())?;
        Ok(scores.broadcast_add(&self.mask(block, scores.device())?)?)
    }

    fn forward_reference(&self, q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments) -> Result<(Tensor, Tensor)> {
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for range in segments.ranges() {
            let (q, k, v) = (
                self.heads_of(q, range, self.heads)?,
                self.heads_of(k, range, self.kv_heads)?,
                self.heads_of(v, range, self.kv_heads)?,
            );
            for block in self.blocks(range.len()) {
                let (p, lse) = softmax(&self.block_scores(&q, &k, &block)?)?;
                let v = v.narrow(1, block.keys.start, block.keys.len())?.contiguous()?;
                let rows = block.queries.len();
                outs.push(batched(&p, &v)?.transpose(0, 1)?.contiguous()?.reshape((rows, self.heads * self.head_dim))?);
                lses.push(lse.squeeze(2)?.t()?.contiguous()?);
            }
        }
        Ok((Tensor::cat(&outs, 0)?, Tensor::cat(&lses, 0)?))
    }

    fn backward_reference(&self, dout: &Tensor, saved: &AttentionSaved, segments: &Segments) -> Result<(Tensor, Tensor, Tensor)> {
        let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
        for range in segments.ranges() {
            let t = range.len();
            let of = |x: &Tensor, heads: usize| self.heads_of(x, range, heads);
            let (q, k, v) = (of(&saved.q, self.heads)?, of(&saved.k, self.kv_heads)?, of(&saved.v, self.kv_heads)?);
            let (dout, out) = (of(dout, self.heads)?, of(&saved.out, self.heads)?);
            let lse = saved.lse.narrow(0, range.start, t)?.t()?.contiguous()?.unsqueeze(2)?; // (H, T, 1)
            let inner = (&dout * &out)?.sum_keepdim(D::Minus1)?; // (H, T, 1)
            let (mut dk, mut dv) = (k.zeros_like()?, v.zeros_like()?);
            let mut dq = Vec::new();
            for block in self.blocks(t) {
                let rows =
                    |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(1, block.queries.start, block.queries.len())?.contiguous()?) };
                let cols = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(1, block.keys.start, block.keys.len())?.contiguous()?) };
                let p = self.block_scores(&q, &k, &block)?.broadcast_sub(&rows(&lse)?)?.exp()?;
                let dp = batched(&rows(&dout)?, &cols(&v)?.t()?)?;
                let ds = ((p.clone() * dp.broadcast_sub(&rows(&inner)?)?)? * self.scale())?;
                dq.push(batched(&ds, &cols(&k)?)?);
                let pad = |x: Tensor| -> Result<Tensor> { Ok(x.pad_with_zeros(1, block.keys.start, t - block.keys.end)?) };
                dk = (dk + pad(batched(&ds.t()?, &rows(&q)?)?)?)?;
                dv = (dv + pad(batched(&p.t()?, &rows(&dout)?)?)?)?;
            }
            dqs.push(self.tokens_first(&Tensor::cat(&dq, 1)?, self.heads)?);
            dks.push(self.tokens_first(&dk, self.kv_heads)?);
            dvs.push(self.tokens_first(&dv, self.kv_heads)?);
        }
        Ok((Tensor::cat(&dqs, 0)?, Tensor::cat(&dks, 0)?, Tensor::cat(&dvs, 0)?))
    }

    /// (Hq, T, D) -> (T, heads * D), summing over each key head's group.
    fn tokens_first(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (_, t, d) = x.dims3()?;
        let x = x.reshape((heads, self.heads / heads, t, d))?.sum(1)?;
        Ok(x.transpose(0, 1)?.contiguous()?.reshape((t, heads * d))?)
    }

    // ---- fused CPU: one task per segment and key head ----

    /// Every (segment, key head): the units that parallel tasks take.
    fn tasks(&self, segments: &Segments) -> Vec<(Range<usize>, usize)> {
        let heads = 0..self.kv_heads;
        segments.ranges().iter().flat_map(|range| heads.clone().map(move |head| (range.clone(), head))).collect()
    }

    fn forward_cpu(&self, q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments) -> Result<(Tensor, Tensor)> {
        let n = q.dims2()?.0;
        let (d, width, kv_width) = (self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (q, k, v) = (Host::open(q)?, Host::open(k)?, Host::open(v)?);
        let (q, k, v) = (q.slice(), k.slice(), v.slice());
        let (mut out, mut lse) = (vec![0.0f32; n * width], vec![0.0f32; n * self.heads]);
        let (out_ptr, lse_ptr) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
        self.tasks(segments).into_par_iter().for_each(|(range, kv_head)| {
            let mut scores = Vec::new();
            for head in kv_head * self.group()..(kv_head + 1) * self.group() {
                for block in self.blocks(range.len()) {
                    let (rows, cols) = (block.queries.len(), block.keys.len());
                    let first = range.start + block.queries.start;
                    let key = (range.start + block.keys.start) * kv_width + kv_head * d;
                    scores.resize(rows * cols, 0.0);
                    let q_at = Rows::of(q, first * width + head * d, width);
                    product(&mut scores, (rows, cols, d), q_at, Rows::of(k, key, kv_width).transposed(), self.scale() as f32);
                    for (r, row) in scores.chunks_mut(cols).enumerate() {
                        let value = self.softmax_row(row, &block, r);
                        // SAFETY: row `first + r` of head `head` belongs to this task alone.
                        unsafe { *lse_ptr.at((first + r) * self.heads + head) = value };
                    }
                    let p = Rows::of(&scores, 0, cols);
                    // SAFETY: the columns of head `head` in these rows belong to this task alone.
                    unsafe {
                        product_into(
                            out_ptr.at(first * width + head * d),
                            width,
                            (rows, d, cols),
                            p,
                            Rows::of(v, key, kv_width),
                            1.0,
                            0.0,
                        )
                    };
                }
            }
        });
        Ok((tensor(out, (n, width))?, tensor(lse, (n, self.heads))?))
    }

    /// Scores -> probabilities of row `r` of a block, zero where not visible; returns the log-sum-exp.
    fn softmax_row(&self, row: &mut [f32], block: &Block, r: usize) -> f32 {
        let seen = self.visible(block.queries.start + r);
        let (start, end) = (seen.start.max(block.keys.start) - block.keys.start, seen.end - block.keys.start);
        row[..start].fill(0.0);
        row[end..].fill(0.0);
        let row = &mut row[start..end];
        vectorized(|| {
            let max = simd::max(row);
            row.iter_mut().for_each(|x| *x = simd::exp(*x - max));
            let sum = simd::sum(row.len(), |i| row[i]);
            let share = 1.0 / sum as f32;
            row.iter_mut().for_each(|x| *x *= share);
            max + sum.ln() as f32
        })
    }

    fn backward_cpu(&self, dout: &Tensor, saved: &AttentionSaved, segments: &Segments) -> Result<(Tensor, Tensor, Tensor)> {
        let n = dout.dims2()?.0;
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let dout = dout.contiguous()?;
        let hosts = [&saved.q, &saved.k, &saved.v, &saved.out, &saved.lse, &dout].map(Host::open);
        let [q, k, v, out, lse, dout] = hosts;
        let (q, k, v, out, lse, dout) = (q?, k?, v?, out?, lse?, dout?);
        let inputs = Inputs { q: q.slice(), k: k.slice(), v: v.slice(), out: out.slice(), lse: lse.slice(), dout: dout.slice() };
        let (mut dq, mut dk, mut dv) = (vec![0.0f32; n * width], vec![0.0f32; n * kv_width], vec![0.0f32; n * kv_width]);
        let grads = [Shared(dq.as_mut_ptr()), Shared(dk.as_mut_ptr()), Shared(dv.as_mut_ptr())];
        self.tasks(segments).into_par_iter().for_each(|(range, kv_head)| {
            let (mut p, mut ds) = (Vec::new(), Vec::new());
            for head in kv_head * self.group()..(kv_head + 1) * self.group() {
                for block in self.blocks(range.len()) {
                    self.backward_block(&inputs, grads, &range, (kv_head, head), &block, &mut p, &mut ds);
                }
            }
        });
        Ok((tensor(dq, (n, width))?, tensor(dk, (n, kv_width))?, tensor(dv, (n, kv_width))?))
    }

    /// One block of one query head: adds to dk and dv, writes dq.
    #[allow(clippy::too_many_arguments)]
    fn backward_block(
        &self,
        x: &Inputs<'_>,
        [dq, dk, dv]: [Shared; 3],
        range: &Range<usize>,
        (kv_head, head): (usize, usize),
        block: &Block,
        p: &mut Vec<f32>,
        ds: &mut Vec<f32>,
    ) {
        let (d, width, kv_width) = (self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (rows, cols) = (block.queries.len(), block.keys.len());
        let first = range.start + block.queries.start;
        let query = first * width + head * d;
        let key = (range.start + block.keys.start) * kv_width + kv_head * d;
        p.resize(rows * cols, 0.0);
        ds.resize(rows * cols, 0.0);
        let (q_at, dout_at) = (Rows::of(x.q, query, width), Rows::of(x.dout, query, width));
        let (k_at, v_at) = (Rows::of(x.k, key, kv_width), Rows::of(x.v, key, kv_width));
        product(p, (rows, cols, d), q_at, k_at.transposed(), self.scale() as f32);
        product(ds, (rows, cols, d), dout_at, v_at.transposed(), 1.0);
        for r in 0..rows {
            let at = query + r * width;
            let (dout, out) = (&x.dout[at..at + d], &x.out[at..at + d]);
            let lse = x.lse[(first + r) * self.heads + head];
            let seen = self.visible(block.queries.start + r);
            let seen = seen.start.max(block.keys.start) - block.keys.start..seen.end - block.keys.start;
            let (p, ds) = (&mut p[r * cols..][..cols], &mut ds[r * cols..][..cols]);
            for row in [&mut *p, &mut *ds] {
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
            }
            let (p, ds, scale) = (&mut p[seen.clone()], &mut ds[seen], self.scale() as f32);
            vectorized(|| {
                let inner = simd::dot(dout, out);
                for (p, ds) in p.iter_mut().zip(ds) {
                    *p = simd::exp(*p - lse);
                    *ds = *p * (*ds - inner) * scale;
                }
            });
        }
        let (p_at, ds_at) = (Rows::of(p, 0, cols), Rows::of(ds, 0, cols));
        // SAFETY: rows of query head `head` and of key head `kv_head` in this segment belong to this task alone.
        unsafe {
            product_into(dq.at(query), width, (rows, d, cols), ds_at, k_at, 1.0, 0.0);
            product_into(dk.at(key), kv_width, (cols, d, rows), ds_at.transposed(), q_at, 1.0, 1.0);
            product_into(dv.at(key), kv_width, (cols, d, rows), p_at.transposed(), dout_at, 1.0, 1.0);
        }
    }
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
}

fn lengths(segments: &Segments) -> Vec<usize> {
    segments.ranges().iter().map(|range| range.len()).collect()
}

/// Softmax over the last dimension and its log-sum-exp (kept dimension).
fn softmax(scores: &Tensor) -> Result<(Tensor, Tensor)> {
    let max = scores.max_keepdim(D::Minus1)?;
    let e = scores.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    Ok((e.broadcast_div(&sum)?, (max + sum.log()?)?))
}

/// A matrix inside a slice: its first element and its strides.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Rows<'a> {
    fn of(values: &'a [f32], start: usize, row_stride: usize) -> Self {
        Self { values: &values[start..], row_stride, column_stride: 1 }
    }

    fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// Whether (rows, columns) of this matrix lie inside the slice.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.values.len()
    }
}

/// out (m, n) = scale * a (m, k) b (k, n).
fn product(out: &mut [f32], (m, n, k): (usize, usize, usize), a: Rows<'_>, b: Rows<'_>, scale: f32) {
    assert!(out.len() >= m * n, "the result has room for the product");
    // SAFETY: `out` is a row-major (m, n) buffer, checked above.
    unsafe { product_into(out.as_mut_ptr(), n, (m, n, k), a, b, scale, 0.0) }
}

/// out (m, n; row stride `stride`) = keep * out + scale * a (m, k) b (k, n), on the calling thread.
///
/// # Safety
/// `out` must point to m rows of n writable floats, `stride` apart, that no other thread touches.
unsafe fn product_into(
    out: *mut f32,
    stride: usize,
    (m, n, k): (usize, usize, usize),
    a: Rows<'_>,
    b: Rows<'_>,
    scale: f32,
    keep: f32,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "a product's inputs lie inside their slices");
    issue(1, m, n, k);
    // SAFETY: inputs are inside their slices (checked), the output is the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            keep != 0.0,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
