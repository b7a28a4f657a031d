//! Fused linear cross-entropy for a frozen LM head, as in Liger Kernel and cut-cross-entropy:
//! logits z are computed one vocabulary chunk at a time with an online softmax (Milakov and
//! Gimelshein 2018) and never leave the cache; W is packed once for all rows.
//!
//! With e = exp(z - max z), dh = scale (e W / sum(e) - W[target]). With a softcap z are the capped
//! logits, and e and onehot target are multiplied by its slope.

use std::ops::Range;

use candle_core::Tensor;

use super::{LmHead, Losses};
use crate::error::Result;
use crate::ops::gemm::packed_rhs::{PADDING, PackedRhs};
use crate::ops::gemm::{CpuSlice, Element, Lhs, MatMut, MatRef, Values};
use crate::ops::parallel::{num_threads, par_for_each};
use crate::ops::simd::{self, simd};
use crate::ops::softcap::{capped, slope};
use crate::ops::storage::{CpuTensor, f32_tensor, uninit_vec};
use crate::ops::{Context, count_flops};

/// Rows of W in a vocabulary chunk, packed once for all blocks of rows of h.
const VOCAB_CHUNK: usize = 512;

impl LmHead {
    /// h (L, C), targets (L) -> the losses (L) in nats; with `scale` also dh (L, C) of `scale * sum
    /// of losses`, unless L is 0.
    pub(super) fn fused_linear_cross_entropy(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: Option<f64>,
    ) -> Result<Losses> {
        let rows = targets.len();
        if rows == 0 {
            return Ok((Vec::new(), None));
        }
        let (vocab, hidden) = self.weight.dims2()?;
        let h = h.contiguous()?;
        let h = CpuTensor::borrow(&h)?;
        let storage = self.weight.storage()?;
        let w = self.weight.matrix(&storage)?.with_cache(None);
        let lhs = Lhs::new(context.precision, h.matrix(rows, hidden));
        count_flops(1 + usize::from(scale.is_some()), rows, vocab, hidden);
        // The same number of blocks for each thread; a row's sums do not depend on its block.
        let rhs = PackedRhs::for_lhs(&lhs);
        let blocks = rows.div_ceil(rhs.max_rows());
        let blocks = blocks.next_multiple_of(num_threads());
        let block_rows = rows.div_ceil(blocks).next_multiple_of(rhs.row_alignment());
        let width = hidden.next_multiple_of(PADDING);
        let mut dh = Vec::new();
        if scale.is_some() {
            dh.resize(rows.next_multiple_of(block_rows) * width, 0.0);
        }
        let mut dh_blocks = dh.chunks_mut(block_rows * width);
        let block = |(index, targets)| RowBlock {
            softcap: self.softcap.map(|c| c as f32),
            ..RowBlock::new(index * block_rows, targets, dh_blocks.next(), width)
        };
        let mut blocks: Vec<_> = targets.chunks(block_rows).enumerate().map(block).collect();
        self.accumulate_vocabulary(&mut blocks, &lhs, w, vocab);

        let losses = blocks.iter().flat_map(RowBlock::losses).collect();
        let Some(scale) = scale else {
            return Ok((losses, None));
        };
        let range = |row: usize| row * hidden..(row + 1) * hidden;
        par_for_each(blocks.iter_mut(), |block| match w.values() {
            Values::F32(w) => block.finish(|row| &w[range(row)], scale),
            Values::Bf16(w) => block.finish(|row| &w[range(row)], scale),
            Values::Quantized(w) => block.finish(|row| w.row(row), scale),
        });
        drop(blocks);
        Ok((
            losses,
            Some(f32_tensor(
                without_padding(dh, width, rows, hidden),
                (rows, hidden),
            )?),
        ))
    }

    /// Accumulates every chunk of W (V, C) in every block; packs the chunks that are not cached.
    fn accumulate_vocabulary(
        &self,
        blocks: &mut [RowBlock<'_>],
        lhs: &Lhs<'_>,
        w: MatRef<'_>,
        vocab: usize,
    ) {
        let rows: usize = blocks.iter().map(|block| block.targets.len()).sum();
        let mut scratch = [PackedRhs::for_lhs(lhs), PackedRhs::for_lhs(lhs)];
        // A single row is packed differently, and the cache serves the others.
        let cache = self.weight.packings.as_ref().filter(|_| rows > 1);
        let cached =
            cache.and_then(|cache| cache.row_chunks(&w, VOCAB_CHUNK, &|| PackedRhs::for_lhs(lhs)));
        for (index, start) in (0..vocab).step_by(VOCAB_CHUNK).enumerate() {
            let chunk = start..(start + VOCAB_CHUNK).min(vocab);
            let [w_t, w] = match cached {
                Some(cached) => &cached[index],
                None => {
                    let w = w.row_range(chunk.start, chunk.end);
                    scratch[0].pack(&w.t());
                    if blocks[0].dh.is_some() {
                        scratch[1].pack(&w);
                    }
                    &scratch
                }
            };
            par_for_each(blocks.iter_mut(), |block| {
                block.accumulate_chunk(&chunk, lhs, w_t, w)
            });
        }
    }
}

/// The rows of h from `first` on, one for each target, with their online softmax: running maximum,
/// sum of e, and target logit.
struct RowBlock<'a> {
    first: usize,
    targets: &'a [u32],
    max: Vec<f32>,
    sum: Vec<f64>,
    target_logits: Vec<f32>,
    /// e W with a row stride of `width`, which `finish` converts to dh; `None`: losses only.
    dh: Option<&'a mut [f32]>,
    width: usize,
    softcap: Option<f32>,
}

impl<'a> RowBlock<'a> {
    fn new(first: usize, targets: &'a [u32], dh: Option<&'a mut [f32]>, width: usize) -> Self {
        let rows = targets.len();
        Self {
            first,
            targets,
            max: vec![f32::MIN; rows],
            sum: vec![0.0; rows],
            target_logits: vec![0.0; rows],
            dh,
            width,
            softcap: None,
        }
    }

    /// One online-softmax update with the logits of one vocabulary chunk: logits = h W^T, running
    /// max and sum, dh = rescale dh + e W. `w_t` is (C, chunk), `w` (chunk, C).
    fn accumulate_chunk(
        &mut self,
        chunk: &Range<usize>,
        h: &Lhs<'_>,
        w_t: &PackedRhs,
        w: &PackedRhs,
    ) {
        let rows = self.targets.len();
        // SAFETY: the product writes the first `chunk.len()` elements of `rows` rows, and only
        // these are read.
        let mut logits = unsafe { uninit_vec(rows.next_multiple_of(PADDING) * VOCAB_CHUNK) };
        w_t.gemm(
            h,
            self.first..self.first + rows,
            MatMut::new(&mut logits, VOCAB_CHUNK),
        );
        for row in 0..rows {
            let logits = &mut logits[row * VOCAB_CHUNK..][..chunk.len()];
            self.update_row(row, chunk.start, logits);
        }
        if let Some(dh) = &mut self.dh {
            let e = MatRef::strided(
                CpuSlice::F32(&logits),
                [rows, chunk.len()],
                [VOCAB_CHUNK, 1],
            );
            w.gemm_add(e, MatMut::new(dh, self.width));
        }
    }

    /// Updates the softmax of row `row`; its logits of the chunk from token `start` on become e,
    /// times the slope of the softcap.
    fn update_row(&mut self, row: usize, start: usize, logits: &mut [f32]) {
        let mut slopes = self.softcap.map(|_| [0.0; VOCAB_CHUNK]);
        if let Some((c, slopes)) = self.softcap.zip(slopes.as_mut()) {
            simd!(|simd| {
                for (z, slope_of_z) in logits.iter_mut().zip(slopes) {
                    *z = capped(simd, *z, c);
                    *slope_of_z = slope(*z, c);
                }
            });
        }
        let target = (self.targets[row] as usize).checked_sub(start);
        if let Some(logit) = target.and_then(|target| logits.get(target)) {
            self.target_logits[row] = *logit;
        }
        let previous = self.max[row];
        let (max, rescale, sum) = simd!(|simd| {
            let max = previous.max(simd::max(logits));
            logits.iter_mut().for_each(|z| *z = simd.exp(*z - max));
            (max, simd.exp(previous - max), simd::sum_map(logits, |e| e))
        });
        if max > previous {
            self.max[row] = max;
            self.sum[row] *= f64::from(rescale);
            if let Some(dh) = &mut self.dh {
                let dh = &mut dh[row * self.width..][..self.width];
                dh.iter_mut().for_each(|dh| *dh *= rescale);
            }
        }
        self.sum[row] += sum;
        let slopes = slopes.iter().flatten();
        logits
            .iter_mut()
            .zip(slopes)
            .for_each(|(e, slope)| *e *= slope);
    }

    fn losses(&self) -> impl Iterator<Item = f32> + use<'_> {
        (0..self.targets.len())
            .map(|row| self.max[row] + self.sum[row].ln() as f32 - self.target_logits[row])
    }

    /// Converts e W to dh = scale (e W / sum(e) - slope W[target]); `row_of` returns a row of W.
    fn finish<T: Element, R: AsRef<[T]>>(&mut self, row_of: impl Fn(usize) -> R, scale: f64) {
        let Some(dh) = &mut self.dh else { return };
        for (row, (&target, dh)) in self
            .targets
            .iter()
            .zip(dh.chunks_exact_mut(self.width))
            .enumerate()
        {
            let w = row_of(target as usize);
            let w = w.as_ref();
            let target_slope = self.softcap.map(|c| slope(self.target_logits[row], c));
            let factor = (scale / self.sum[row]) as f32;
            let scale = scale as f32 * target_slope.unwrap_or(1.0);
            simd!(|_| {
                dh.iter_mut()
                    .zip(w)
                    .for_each(|(dh, w)| *dh = factor * *dh - scale * w.as_f32())
            });
        }
    }
}

/// x (at least `rows`, `width`) -> its first `rows` rows and `columns` columns.
fn without_padding(mut x: Vec<f32>, width: usize, rows: usize, columns: usize) -> Vec<f32> {
    if width == columns {
        x.truncate(rows * columns);
        return x;
    }
    let rows = x.chunks(width).take(rows);
    rows.flat_map(|row| &row[..columns]).copied().collect()
}
