//! Attention of one new token to a KV cache, which is read once, in place: one task per key head
//! and key block, whose partial softmaxes are combined afterwards (Dao et al. 2023,
//! "Flash-Decoding").

#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use candle_core::Tensor;

use super::{Attention, KEY_BLOCK};
use crate::error::Result;
use crate::ops::count_flops;
use crate::ops::parallel::par_for_each;
use crate::ops::simd::{Simd, max, simd};
use crate::ops::softcap::capped;
use crate::ops::storage::{CpuTensor, f32_tensor, to_f32_contiguous, uninit_vec};

impl Attention {
    /// Attention of q (1, Hq D) to rows `seen` of k, v (T, Hkv D) -> (1, Hq D).
    pub(super) fn decode_cpu(&self, [q, k, v]: [&Tensor; 3], seen: Range<usize>) -> Result<Tensor> {
        let [q, k, v] = [q, k, v].map(to_f32_contiguous);
        let (q, k, v) = (q?, k?, v?);
        let q = CpuTensor::borrow_f32(&q)?;
        let k = CpuTensor::borrow_f32(&k)?;
        let v = CpuTensor::borrow_f32(&v)?;
        let partials = self.decode_partials(q.f32_slice(), [k.f32_slice(), v.f32_slice()], seen);
        let d = self.head_dim;
        let mut out = vec![0.0; self.heads * d];
        for (head, out) in out.chunks_mut(d).enumerate() {
            let partials = || partials.chunks(2 + d).skip(head).step_by(self.heads);
            let max = partials().map(|partial| partial[0]);
            let max = max.fold(f32::NEG_INFINITY, f32::max);
            let rescale = |partial: &[f32]| (partial[0] - max).exp();
            let sum: f32 = partials()
                .map(|partial| rescale(partial) * partial[1])
                .sum();
            for partial in partials() {
                let weight = rescale(partial) / sum;
                let pv = &partial[2..];
                out.iter_mut()
                    .zip(pv)
                    .for_each(|(out, x)| *out += weight * x);
            }
        }
        f32_tensor(out, (1, self.heads * d))
    }

    /// Partial softmaxes (key blocks, Hq, 2 + D): the largest score, the sum of exp(score -
    /// largest), and the sum of exp(score - largest) v.
    fn decode_partials(&self, q: &[f32], [k, v]: [&[f32]; 2], seen: Range<usize>) -> Vec<f32> {
        count_flops(self.heads, 1, seen.len(), self.head_dim);
        count_flops(self.heads, 1, self.head_dim, seen.len());
        let (d, group) = (self.head_dim, self.group());
        let blocks = seen.len().div_ceil(KEY_BLOCK);
        // SAFETY: `decode_block` writes all of its partials.
        let mut partials: Vec<f32> = unsafe { uninit_vec(blocks * self.heads * (2 + d)) };
        let tasks = partials.chunks_mut(group * (2 + d)).enumerate();
        par_for_each(tasks, |(index, partials)| {
            let (block, head) = (index / self.kv_heads, index % self.kv_heads);
            let start = seen.start + block * KEY_BLOCK;
            let n = KEY_BLOCK.min(seen.end - start);
            let kv = [k, v].map(|x| &x[(start * self.kv_heads + head) * d..]);
            let q = &q[head * group * d..][..group * d];
            simd!(|simd| self.decode_block(simd, q, kv, n, partials));
        });
        partials
    }

    /// Partial softmaxes (group, 2 + D) of one key head's query heads q (group, D) over the first
    /// `n` rows of k and v.
    #[inline(always)]
    fn decode_block(
        &self,
        simd: Simd,
        q: &[f32],
        [k, v]: [&[f32]; 2],
        n: usize,
        partials: &mut [f32],
    ) {
        let scale = self.scale() as f32;
        let softcap = self.softcap.map(|c| c as f32);
        let (d, stride) = (self.head_dim, self.kv_heads * self.head_dim);
        for (q, partial) in q.chunks_exact(d).zip(partials.chunks_exact_mut(2 + d)) {
            let mut scores = [0.0; KEY_BLOCK];
            let scores = &mut scores[..n];
            for key in 0..n {
                scores[key] = scale * simd.dot(q, &k[key * stride..][..d]);
            }
            if let Some(c) = softcap {
                for key in 0..n {
                    scores[key] = capped(simd, scores[key], c);
                }
            }
            let largest = max(scores);
            for key in 0..n {
                scores[key] = simd.exp(scores[key] - largest);
            }
            let (head, pv) = partial.split_at_mut(2);
            head.copy_from_slice(&[largest, scores.iter().sum()]);
            pv.fill(0.0);
            for key in 0..n {
                simd.axpy(pv, scores[key], &v[key * stride..][..d]);
            }
        }
    }
}
