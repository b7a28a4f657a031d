//! Causal grouped-query attention over segments, without a (T, T) matrix.
//!
//! q (N, Hq * D), k and v (N, Hkv * D), output (N, Hq * D); query head h reads key head h / (Hq / Hkv). Queries go in blocks of
//! `QUERY_BLOCK` rows against the keys up to the block's end, a run of keys at a time, so that memory does not grow with T squared and the
//! executed work is that of the blocks, not of the full square. The forward pass keeps each row's log-sum-exp; the backward pass computes the block's probabilities again from it
//! (Dao et al. 2022, "FlashAttention", section 3.1, at this block size).

mod cpu;
mod decode;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};

use super::storage::{
    CpuTensor, check_shape, f32_tensor, load_activation, save_activation, to_f32_contiguous,
};
use super::{Context, Segments, batched};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Query rows of one block.
const QUERY_BLOCK: usize = 64;

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
struct QueryBlock {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Attention {
    fn query_blocks(&self, length: usize) -> impl Iterator<Item = QueryBlock> + use<> {
        let window = self.window.unwrap_or(usize::MAX);
        (0..length).step_by(QUERY_BLOCK).map(move |start| {
            let end = (start + QUERY_BLOCK).min(length);
            QueryBlock {
                queries: start..end,
                keys: (start + 1).saturating_sub(window)..end,
            }
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
fn blocks_cost(
    attention: &Attention,
    segments: &[usize],
    scores: usize,
    mixes: usize,
    precision: Precision,
) -> Work {
    let mut work = Work::default();
    let (heads, d) = (attention.heads, attention.head_dim);
    for length in segments {
        for block in attention.query_blocks(*length) {
            let (q, k) = (block.queries.len(), block.keys.len());
            work += &Work::products(heads * scores, q, k, d, precision);
            work += &Work::products(heads * mixes, q, d, k, precision);
        }
    }
    work
}

/// Work of a forward pass over segments of these lengths.
pub fn attention_forward_cost(attention: &Attention, segments: &[usize]) -> Work {
    let pairs: usize = segments
        .iter()
        .flat_map(|t| attention.query_blocks(*t))
        .map(|b| b.queries.len() * b.keys.len())
        .sum();
    blocks_cost(attention, segments, 1, 1, Precision::F32)
        + Work::sweep(4 * attention.heads * pairs, 4 * attention.heads * pairs)
}

/// Work of a backward pass: scores again, dP = dO V^T; dQ = dS K; dK = dS^T Q and dV = P^T dO cost as much as a mix each.
pub fn attention_backward_cost(attention: &Attention, segments: &[usize]) -> Work {
    let pairs: usize = segments
        .iter()
        .flat_map(|t| attention.query_blocks(*t))
        .map(|b| b.queries.len() * b.keys.len())
        .sum();
    blocks_cost(attention, segments, 2, 3, Precision::F32)
        + Work::sweep(8 * attention.heads * pairs, 6 * attention.heads * pairs)
}

/// Work of one new token against `keys` cached ones (itself included).
pub fn attention_decode_cost(attention: &Attention, keys: usize) -> Work {
    let seen = keys.min(attention.window.unwrap_or(usize::MAX));
    let (heads, d) = (attention.heads, attention.head_dim);
    Work::products(heads, 1, seen, d, Precision::F32)
        + Work::products(heads, 1, d, seen, Precision::F32)
}

/// What `backward` needs: inputs and output in the compute type, and each row's log-sum-exp (N, Hq).
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
    pub fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.to_dtype(DType::F32)?, self.v.to_dtype(DType::F32)?))
    }

    /// The output (N, Hq D), for the layer it went into: in the compute type.
    pub fn output(&self) -> &Tensor {
        &self.out
    }
}

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> (N, Hq D), in the compute type where the fused pass runs: it goes into matrix products alone.
    pub fn forward(
        &self,
        context: Context<'_>,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, AttentionSaved)> {
        self.check(
            segments.tokens(),
            &[
                ("q", &q, self.heads),
                ("k", &k, self.kv_heads),
                ("v", &v, self.kv_heads),
            ],
        )?;
        context
            .counter
            .add(attention_forward_cost(self, &lengths(segments)));
        let (q, k, v) = (
            save_activation(context, &q)?,
            save_activation(context, &k)?,
            save_activation(context, &v)?,
        );
        let (out, lse) = if context.fused(&q) {
            self.forward_cpu(context, &q, &k, &v, segments)?
        } else {
            let wide = |x: &Tensor| load_activation(context, x);
            self.forward_reference(&wide(&q)?, &wide(&k)?, &wide(&v)?, segments)?
        };
        Ok((
            out.clone(),
            AttentionSaved {
                q,
                k,
                v,
                out: save_activation(context, &out)?,
                lse,
            },
        ))
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
        let all = [
            ("q", &saved.q, q),
            ("k", &saved.k, kv),
            ("v", &saved.v, kv),
            ("out", &saved.out, q),
            ("dout", dout, q),
        ];
        self.check(segments.tokens(), &all)?;
        check_shape("lse", &saved.lse, &[segments.tokens(), self.heads])?;
        context
            .counter
            .add(attention_backward_cost(self, &lengths(segments)));
        if context.fused(dout) {
            self.backward_cpu(context, dout, saved, segments)
        } else {
            let wide = |x: &Tensor| load_activation(context, x);
            let (q, k, v, out) = (
                wide(&saved.q)?,
                wide(&saved.k)?,
                wide(&saved.v)?,
                wide(&saved.out)?,
            );
            self.backward_reference(
                dout,
                &AttentionSaved {
                    q,
                    k,
                    v,
                    out,
                    lse: saved.lse.clone(),
                },
                segments,
            )
        }
    }

    /// One new token: q (1, Hq D) against k, v (T, Hkv D), all of them visible unless a window cuts them -> (1, Hq D).
    pub fn decode(
        &self,
        context: Context<'_>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let keys = k.dims2()?.0.max(1);
        self.check(1, &[("q", q, self.heads)])?;
        self.check(keys, &[("k", k, self.kv_heads), ("v", v, self.kv_heads)])?;
        context.counter.add(attention_decode_cost(self, keys));
        let seen = self.visible(keys - 1);
        if context.fused(q) {
            let (q, k, v) = (
                to_f32_contiguous(q)?,
                to_f32_contiguous(k)?,
                to_f32_contiguous(v)?,
            );
            let hosts = (
                CpuTensor::borrow_f32(&q)?,
                CpuTensor::borrow_f32(&k)?,
                CpuTensor::borrow_f32(&v)?,
            );
            let out = self.decode_cpu(
                hosts.0.f32_slice(),
                [hosts.1.f32_slice(), hosts.2.f32_slice()],
                seen,
            );
            return f32_tensor(out, (1, self.heads * self.head_dim));
        }
        let (d, hkv) = (self.head_dim, self.kv_heads);
        let heads_first = |t: &Tensor| -> Result<Tensor> {
            Ok(t.narrow(0, seen.start, seen.len())?
                .reshape((seen.len(), hkv, d))?
                .transpose(0, 1)?
                .contiguous()?)
        };
        let q = q.reshape((hkv, self.group(), d))?;
        let scores = (batched(&q, &heads_first(k)?.t()?)? * self.scale())?;
        let p = softmax(&scores)?.0;
        Ok(batched(&p, &heads_first(v)?)?.reshape((1, self.heads * d))?)
    }

    /// Refuses sizes that cannot be and tensors, each of so many heads, that contradict them: the fused pass computes addresses from both.
    fn check(&self, tokens: usize, tensors: &[(&str, &Tensor, usize)]) -> Result<()> {
        let divides =
            self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        if !divides || self.head_dim == 0 || self.window == Some(0) {
            return Err(
                Error::new(Kind::Tensor, "attention cannot have these sizes")
                    .value(format!("{self:?}"))
                    .rule("all are at least 1, and kv_heads divides heads"),
            );
        }
        tensors.iter().try_for_each(|(name, tensor, heads)| {
            check_shape(name, tensor, &[tokens, heads * self.head_dim])
        })
    }

    // ---- reference: candle primitives on (H, T, D), any device ----

    /// (T, H D) rows `range` of x as (H, T, D), key heads repeated for their group.
    fn heads_of(&self, x: &Tensor, range: &Range<usize>, heads: usize) -> Result<Tensor> {
        let (t, d) = (range.len(), self.head_dim);
        let x = x.narrow(0, range.start, t)?.reshape((t, heads, 1, d))?;
        let repeats = self.heads / heads;
        Ok(x.broadcast_as((t, heads, repeats, d))?
            .reshape((t, self.heads, d))?
            .transpose(0, 1)?
            .contiguous()?)
    }

    /// Zero where visible, minus infinity elsewhere: (queries, keys).
    fn mask(&self, block: &QueryBlock, device: &Device) -> Result<Tensor> {
        let mut mask = vec![f32::NEG_INFINITY; block.queries.len() * block.keys.len()];
        for (row, i) in mask.chunks_mut(block.keys.len()).zip(block.queries.clone()) {
            let seen = self.visible(i);
            row[seen.start.max(block.keys.start) - block.keys.start..seen.end - block.keys.start]
                .fill(0.0);
        }
        Ok(Tensor::from_vec(
            mask,
            (block.queries.len(), block.keys.len()),
            device,
        )?)
    }

    fn block_scores(&self, q: &Tensor, k: &Tensor, block: &QueryBlock) -> Result<Tensor> {
        let q = q.narrow(1, block.queries.start, block.queries.len())?;
        let k = k.narrow(1, block.keys.start, block.keys.len())?;
        let scores = (batched(&q.contiguous()?, &k.contiguous()?.t()?)? * self.scale())?;
        Ok(scores.broadcast_add(&self.mask(block, scores.device())?)?)
    }

    fn forward_reference(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor)> {
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for range in segments.ranges() {
            let (q, k, v) = (
                self.heads_of(q, range, self.heads)?,
                self.heads_of(k, range, self.kv_heads)?,
                self.heads_of(v, range, self.kv_heads)?,
            );
            for block in self.query_blocks(range.len()) {
                let (p, lse) = softmax(&self.block_scores(&q, &k, &block)?)?;
                let v = v
                    .narrow(1, block.keys.start, block.keys.len())?
                    .contiguous()?;
                let rows = block.queries.len();
                outs.push(
                    batched(&p, &v)?
                        .transpose(0, 1)?
                        .contiguous()?
                        .reshape((rows, self.heads * self.head_dim))?,
                );
                lses.push(lse.squeeze(2)?.t()?.contiguous()?);
            }
        }
        Ok((Tensor::cat(&outs, 0)?, Tensor::cat(&lses, 0)?))
    }

    fn backward_reference(
        &self,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
        for range in segments.ranges() {
            let t = range.len();
            let of = |x: &Tensor, heads: usize| self.heads_of(x, range, heads);
            let (q, k, v) = (
                of(&saved.q, self.heads)?,
                of(&saved.k, self.kv_heads)?,
                of(&saved.v, self.kv_heads)?,
            );
            let (dout, out) = (of(dout, self.heads)?, of(&saved.out, self.heads)?);
            let lse = saved
                .lse
                .narrow(0, range.start, t)?
                .t()?
                .contiguous()?
                .unsqueeze(2)?; // (H, T, 1)
            let inner = (&dout * &out)?.sum_keepdim(D::Minus1)?; // (H, T, 1)
            let (mut dk, mut dv) = (k.zeros_like()?, v.zeros_like()?);
            let mut dq = Vec::new();
            for block in self.query_blocks(t) {
                let rows = |x: &Tensor| -> Result<Tensor> {
                    Ok(x.narrow(1, block.queries.start, block.queries.len())?
                        .contiguous()?)
                };
                let cols = |x: &Tensor| -> Result<Tensor> {
                    Ok(x.narrow(1, block.keys.start, block.keys.len())?
                        .contiguous()?)
                };
                let p = self
                    .block_scores(&q, &k, &block)?
                    .broadcast_sub(&rows(&lse)?)?
                    .exp()?;
                let dp = batched(&rows(&dout)?, &cols(&v)?.t()?)?;
                let ds = ((p.clone() * dp.broadcast_sub(&rows(&inner)?)?)? * self.scale())?;
                dq.push(batched(&ds, &cols(&k)?)?);
                let pad = |x: Tensor| -> Result<Tensor> {
                    Ok(x.pad_with_zeros(1, block.keys.start, t - block.keys.end)?)
                };
                dk = (dk + pad(batched(&ds.t()?, &rows(&q)?)?)?)?;
                dv = (dv + pad(batched(&p.t()?, &rows(&dout)?)?)?)?;
            }
            dqs.push(self.tokens_first(&Tensor::cat(&dq, 1)?, self.heads)?);
            dks.push(self.tokens_first(&dk, self.kv_heads)?);
            dvs.push(self.tokens_first(&dv, self.kv_heads)?);
        }
        Ok((
            Tensor::cat(&dqs, 0)?,
            Tensor::cat(&dks, 0)?,
            Tensor::cat(&dvs, 0)?,
        ))
    }

    /// (Hq, T, D) -> (T, heads * D), summing over each key head's group.
    fn tokens_first(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (_, t, d) = x.dims3()?;
        let x = x.reshape((heads, self.heads / heads, t, d))?.sum(1)?;
        Ok(x.transpose(0, 1)?.contiguous()?.reshape((t, heads * d))?)
    }
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
