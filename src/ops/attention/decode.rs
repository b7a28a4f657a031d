//! One new token against the keys and values of those before it, read once where they lie: each key head meets all of its query heads, by runs
//! of keys, and the runs' sums are put together as those of one softmax (Dao et al. 2023, "Flash-Decoding").

#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::Attention;
use crate::ops::parallel::par_for_each;
use crate::ops::simd::{Simd, dispatch, max};
use crate::ops::{count_flops, storage::uninit_vec};

/// Keys of one task: few enough to share a long text among threads.
const KEYS: usize = 256;

impl Attention {
    /// q (Hq D) against rows `seen` of k, v (T, Hkv D) -> (Hq D).
    pub(super) fn decode_cpu(
        &self,
        q: &[f32],
        [k, v]: [&[f32]; 2],
        seen: Range<usize>,
    ) -> Vec<f32> {
        count_flops(self.heads, 1, seen.len(), self.head_dim);
        count_flops(self.heads, 1, self.head_dim, seen.len());
        let (d, group, runs) = (self.head_dim, self.group(), seen.len().div_ceil(KEYS));
        // SAFETY: `run` writes all of its part: of each query head the largest score, the sum of the exponentials against it, and their product
        // with the values.
        let mut parts: Vec<f32> = unsafe { uninit_vec(runs * self.heads * (2 + d)) };
        par_for_each(
            parts.chunks_mut(group * (2 + d)).enumerate(),
            |(index, part)| {
                let (run, head) = (index / self.kv_heads, index % self.kv_heads);
                let start = seen.start + run * KEYS;
                let x = [k, v].map(|x| &x[(start * self.kv_heads + head) * d..]);
                let q = &q[head * group * d..][..group * d];
                dispatch(
                    #[inline(always)]
                    |cpu| self.run(cpu, q, x, KEYS.min(seen.end - start), part),
                );
            },
        );
        let mut out = vec![0.0; self.heads * d];
        for (head, out) in out.chunks_mut(d).enumerate() {
            let parts = || parts.chunks(2 + d).skip(head).step_by(self.heads);
            let most = parts()
                .map(|part| part[0])
                .fold(f32::NEG_INFINITY, f32::max);
            let share = |part: &[f32]| (part[0] - most).exp();
            let sum: f32 = parts().map(|part| share(part) * part[1]).sum();
            for part in parts() {
                let share = share(part) / sum;
                out.iter_mut()
                    .zip(&part[2..])
                    .for_each(|(out, x)| *out += share * x);
            }
        }
        out
    }

    /// One key head's query heads against a run of `n` keys, whose first row k and v begin with.
    #[inline(always)]
    fn run(&self, cpu: Simd, q: &[f32], [k, v]: [&[f32]; 2], n: usize, part: &mut [f32]) {
        let (scale, d, stride) = (
            self.scale() as f32,
            self.head_dim,
            self.kv_heads * self.head_dim,
        );
        for (q, part) in q.chunks_exact(d).zip(part.chunks_exact_mut(2 + d)) {
            let mut scores = [0.0; KEYS];
            let scores = &mut scores[..n];
            for key in 0..n {
                scores[key] = scale * cpu.dot(q, &k[key * stride..][..d]);
            }
            let most = max(scores);
            for key in 0..n {
                scores[key] = cpu.exp(scores[key] - most);
            }
            let (head, mix) = part.split_at_mut(2);
            head.copy_from_slice(&[most, scores.iter().sum()]);
            mix.fill(0.0);
            for key in 0..n {
                cpu.axpy(mix, scores[key], &v[key * stride..][..d]);
            }
        }
    }
}
