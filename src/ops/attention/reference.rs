//! Attention in candle primitives on (H, T, D), on any device: the reference, and the device path.

use std::ops::Range;

use candle_core::{D, Device, Tensor};

use super::{Attention, AttentionSaved, QueryBlock};
use crate::error::Result;
use crate::ops::softcap::{capped_gradient, capped_tensor};
use crate::ops::{Path, Segments, batched_matmul, softmax};

/// One segment's tensors (Hq, T, D), key heads repeated for their group.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl QueryBlock {
    /// The block's query rows of x (H, T, D).
    fn queries_of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.narrow(1, self.queries.start, self.queries.len())?
            .contiguous()?)
    }

    /// The key rows of x (H, T, D) that the block sees.
    fn keys_of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.narrow(1, self.keys.start, self.keys.len())?
            .contiguous()?)
    }
}

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> the output (N, Hq D) and the log-sum-exp (N, Hq).
    pub(super) fn forward_reference(
        &self,
        path: Path,
        qkv: [&Tensor; 3],
        segments: &Segments,
    ) -> Result<(Tensor, Tensor)> {
        let mut outs = Vec::new();
        let mut lses = Vec::new();
        for range in segments.ranges() {
            let heads = self.heads(qkv, range)?;
            for block in self.query_blocks(range.len()) {
                let scores = self.block_scores(&heads, &block)?;
                let mask = self.mask(&block, scores.device())?;
                let (p, lse) = softmax(path, &scores.broadcast_add(&mask)?)?;
                let out = batched_matmul(&p, &block.keys_of(&heads.v)?)?;
                outs.push(self.tokens_first(&out)?);
                lses.push(lse.squeeze(2)?.t()?.contiguous()?);
            }
        }
        Ok((Tensor::cat(&outs, 0)?, Tensor::cat(&lses, 0)?))
    }

    /// dout (N, Hq D) -> (dq, dk, dv).
    pub(super) fn backward_reference(
        &self,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let mut grads = [Vec::new(), Vec::new(), Vec::new()];
        for range in segments.ranges() {
            let heads = self.heads([&saved.q, &saved.k, &saved.v], range)?;
            let dout = self.heads_first(dout, range, self.heads)?;
            let out = self.heads_first(&saved.out, range, self.heads)?;
            let delta = (&dout * &out)?.sum_keepdim(D::Minus1)?; // (H, T, 1)
            let lse = saved.lse.narrow(0, range.start, range.len())?;
            let lse = lse.t()?.contiguous()?.unsqueeze(2)?; // (H, T, 1)
            let segment = self.segment_backward(&heads, &dout, &lse, &delta)?;
            let heads = [self.heads, self.kv_heads, self.kv_heads];
            for ((grads, grad), heads) in grads.iter_mut().zip(segment).zip(heads) {
                grads.push(self.tokens_first(&self.sum_groups(&grad, heads)?)?);
            }
        }
        let [dq, dk, dv] = grads.map(|grads| Tensor::cat(&grads, 0));
        Ok((dq?, dk?, dv?))
    }

    /// dq, dk and dv of one segment, (Hq, T, D) each, from dout, the log-sum-exp and delta =
    /// rowsum(dout * out).
    fn segment_backward(
        &self,
        heads: &Heads,
        dout: &Tensor,
        lse: &Tensor,
        delta: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let length = heads.q.dims3()?.1;
        let mut dq = Vec::new();
        let mut dk = heads.k.zeros_like()?;
        let mut dv = heads.v.zeros_like()?;
        for block in self.query_blocks(length) {
            let scores = self.block_scores(heads, &block)?;
            let masked = scores.broadcast_add(&self.mask(&block, scores.device())?)?;
            let p = masked.broadcast_sub(&block.queries_of(lse)?)?.exp()?;
            let dout = block.queries_of(dout)?;
            let dp = batched_matmul(&dout, &block.keys_of(&heads.v)?.t()?)?;
            let ds = (&p * dp.broadcast_sub(&block.queries_of(delta)?)?)?;
            let ds = (capped_gradient(ds, &scores, self.softcap)? * self.scale())?;
            dq.push(batched_matmul(&ds, &block.keys_of(&heads.k)?)?);
            let pad = |x: Tensor| x.pad_with_zeros(1, block.keys.start, length - block.keys.end);
            let q = block.queries_of(&heads.q)?;
            dk = (dk + pad(batched_matmul(&ds.t()?, &q)?)?)?;
            dv = (dv + pad(batched_matmul(&p.t()?, &dout)?)?)?;
        }
        Ok([Tensor::cat(&dq, 1)?, dk, dv])
    }

    /// One new token: q (1, Hq D) against rows `seen` of k, v (T, Hkv D) -> (1, Hq D).
    pub(super) fn decode_reference(
        &self,
        path: Path,
        [q, k, v]: [&Tensor; 3],
        seen: Range<usize>,
    ) -> Result<Tensor> {
        let d = self.head_dim;
        let heads_first = |x: &Tensor| -> Result<Tensor> {
            let x = x.narrow(0, seen.start, seen.len())?;
            let x = x.reshape((seen.len(), self.kv_heads, d))?;
            Ok(x.transpose(0, 1)?.contiguous()?)
        };
        let q = q.reshape((self.kv_heads, self.group(), d))?;
        let scores = (batched_matmul(&q, &heads_first(k)?.t()?)? * self.scale())?;
        let scores = capped_tensor(scores, self.softcap)?;
        let (p, _) = softmax(path, &scores)?;
        Ok(batched_matmul(&p, &heads_first(v)?)?.reshape((1, self.heads * d))?)
    }

    fn heads(&self, [q, k, v]: [&Tensor; 3], range: &Range<usize>) -> Result<Heads> {
        Ok(Heads {
            q: self.heads_first(q, range, self.heads)?,
            k: self.heads_first(k, range, self.kv_heads)?,
            v: self.heads_first(v, range, self.kv_heads)?,
        })
    }

    /// Rows `range` of x (N, heads D) as (Hq, T, D), key heads repeated for their group.
    fn heads_first(&self, x: &Tensor, range: &Range<usize>, heads: usize) -> Result<Tensor> {
        let (t, d) = (range.len(), self.head_dim);
        let x = x.narrow(0, range.start, t)?.reshape((t, heads, 1, d))?;
        let x = x.broadcast_as((t, heads, self.heads / heads, d))?;
        let x = x.reshape((t, self.heads, d))?;
        Ok(x.transpose(0, 1)?.contiguous()?)
    }

    /// x (H, T, D) -> (T, H D).
    fn tokens_first(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, t, d) = x.dims3()?;
        Ok(x.transpose(0, 1)?.contiguous()?.reshape((t, heads * d))?)
    }

    /// x (Hq, T, D) -> (heads, T, D): the sum over each key head's group.
    fn sum_groups(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (_, t, d) = x.dims3()?;
        Ok(x.reshape((heads, self.heads / heads, t, d))?.sum(1)?)
    }

    /// Scaled and capped scores of a block, (H, queries, keys), before the mask.
    fn block_scores(&self, heads: &Heads, block: &QueryBlock) -> Result<Tensor> {
        let q = block.queries_of(&heads.q)?;
        let k = block.keys_of(&heads.k)?;
        let scores = (batched_matmul(&q, &k.t()?)? * self.scale())?;
        capped_tensor(scores, self.softcap)
    }

    /// The additive mask of a block (queries, keys): zero where visible, minus infinity elsewhere.
    fn mask(&self, block: &QueryBlock, device: &Device) -> Result<Tensor> {
        let (queries, keys) = (block.queries.len(), block.keys.len());
        let mut mask = vec![f32::NEG_INFINITY; queries * keys];
        for (row, query) in mask.chunks_mut(keys).zip(block.queries.clone()) {
            let visible = self.visible(query, block.keys.end);
            row[visible.start - block.keys.start..visible.end - block.keys.start].fill(0.0);
        }
        Ok(Tensor::from_vec(mask, (queries, keys), device)?)
    }
}
