//! The head whose table is frozen: a block of rows meets some words at a time, forward and back, so that logits never leave the caches and
//! W is packed once for all rows.
//!
//! Each row's largest logit so far is what its exponentials are held against; where a larger one comes, what was summed is scaled down. With
//! s the sum of exponentials e, dh = scale (e W / s - W[target]).

use std::ops::Range;

use candle_core::Tensor;

use super::{LmHead, Losses};
use crate::error::Result;
use crate::ops::gemm::packed_rhs::{PADDING, PackedRhs};
use crate::ops::gemm::{CpuSlice, Element, Lhs, MatMut, MatRef};
use crate::ops::parallel::{num_threads, par_for_each};
use crate::ops::simd::{self, dispatch};
use crate::ops::storage::{CpuTensor, f32_tensor, uninit_vec};
use crate::ops::{Context, count_flops};

/// Words that are packed at a time, for every block.
const VOCAB_CHUNK: usize = 512;

impl LmHead {
    /// h (L, C), targets (L) -> the losses, and dh of `scale * sum of losses` where there is a scale and a row.
    pub(super) fn fused_linear_cross_entropy(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: Option<f64>,
    ) -> Result<Losses> {
        let (h, (l, c), v) = (h.contiguous()?, h.dims2()?, self.weight.tensor.dims2()?.0);
        if l == 0 {
            return Ok((Vec::new(), None));
        }
        let (h, w) = (
            CpuTensor::borrow(&h)?,
            CpuTensor::borrow(&self.weight.tensor)?,
        );
        let (table, h) = (w.matrix(v, c), Lhs::new(context.precision, h.matrix(l, c)));
        count_flops(1 + usize::from(scale.is_some()), l, v, c);
        let mut own = [PackedRhs::for_lhs(&h), PackedRhs::for_lhs(&h)];
        // As many blocks for each thread; a row's sums do not depend on its block.
        let parts = l
            .div_ceil(own[0].max_rows())
            .next_multiple_of(num_threads());
        let (size, width) = (
            l.div_ceil(parts).next_multiple_of(own[0].row_alignment()),
            c.next_multiple_of(PADDING),
        );
        let mut dh = vec![
            0.0;
            if scale.is_some() {
                l.next_multiple_of(size) * width
            } else {
                0
            }
        ];
        let mut outs = dh.chunks_mut(size * width);
        let mut blocks: Vec<RowBlock> = targets
            .chunks(size)
            .enumerate()
            .map(|(index, targets)| {
                RowBlock::new(index * size, targets, outs.next().map(|dh| (dh, width)))
            })
            .collect();
        // A single row is not packed as others are, and what is kept is for those.
        let packings = self.weight.packings.as_ref().filter(|_| l > 1);
        let kept = packings.and_then(|packings| {
            packings.row_chunks(&table, VOCAB_CHUNK, &|| PackedRhs::for_lhs(&h))
        });
        for (index, start) in (0..v).step_by(VOCAB_CHUNK).enumerate() {
            let words = start..(start + VOCAB_CHUNK).min(v);
            let table = table.row_range(words.start, words.end);
            let [columns, rows] = match kept {
                Some(kept) => &kept[index],
                None => {
                    own[0].pack(&table.t());
                    if scale.is_some() {
                        own[1].pack(&table);
                    }
                    &own
                }
            };
            par_for_each(blocks.iter_mut(), |block| {
                block.accumulate_chunk(&words, &h, columns, rows)
            });
        }
        let losses = blocks.iter().flat_map(RowBlock::losses).collect();
        let Some(scale) = scale else {
            return Ok((losses, None));
        };
        par_for_each(blocks.iter_mut(), |block| match w.slice() {
            CpuSlice::F32(w) => block.finish(w, c, scale),
            CpuSlice::Bf16(w) => block.finish(w, c, scale),
        });
        drop(blocks);
        match width == c {
            true => dh.truncate(l * c),
            false => {
                dh = dh
                    .chunks(width)
                    .take(l)
                    .flat_map(|row| &row[..c])
                    .copied()
                    .collect()
            }
        }
        Ok((losses, Some(f32_tensor(dh, (l, c))?)))
    }
}

/// Some rows, and what is summed for them over the words so far.
struct RowBlock<'a> {
    /// The first row.
    first: usize,
    targets: &'a [u32],
    max: Vec<f32>,
    sums: Vec<f64>,
    target_logits: Vec<f32>,
    /// e W, and the numbers of a row.
    dh: Option<(&'a mut [f32], usize)>,
}

impl<'a> RowBlock<'a> {
    fn new(first: usize, targets: &'a [u32], dh: Option<(&'a mut [f32], usize)>) -> Self {
        let n = targets.len();
        Self {
            first,
            targets,
            max: vec![f32::MIN; n],
            sums: vec![0.0; n],
            target_logits: vec![0.0; n],
            dh,
        }
    }

    /// Goes on with `words`: `columns` is (C, words), `rows` (words, C).
    fn accumulate_chunk(
        &mut self,
        words: &Range<usize>,
        h: &Lhs<'_>,
        columns: &PackedRhs,
        rows: &PackedRhs,
    ) {
        let n = self.targets.len();
        // SAFETY: the product writes every row's first numbers, and only these are read.
        let mut z = unsafe { uninit_vec(n.next_multiple_of(PADDING) * VOCAB_CHUNK) };
        columns.gemm(
            h,
            self.first..self.first + n,
            MatMut::new(&mut z, VOCAB_CHUNK),
        );
        for (row, target) in self.targets.iter().enumerate() {
            let (z, target) = (&mut z[row * VOCAB_CHUNK..][..words.len()], *target as usize);
            if words.contains(&target) {
                self.target_logits[row] = z[target - words.start];
            }
            let before = self.max[row];
            let (max, share, sum) = dispatch(
                #[inline(always)]
                |cpu| {
                    let max = before.max(simd::max(z));
                    z.iter_mut().for_each(|z| *z = cpu.exp(*z - max));
                    (max, cpu.exp(before - max), simd::sum_map(z, |e| e))
                },
            );
            if max > before {
                self.max[row] = max;
                self.sums[row] *= f64::from(share);
                if let Some((dh, width)) = &mut self.dh {
                    dh[row * *width..][..*width]
                        .iter_mut()
                        .for_each(|dh| *dh *= share);
                }
            }
            self.sums[row] += sum;
        }
        if let Some((dh, width)) = &mut self.dh {
            let z = MatRef::strided(CpuSlice::F32(&z), [n, words.len()], [VOCAB_CHUNK, 1]);
            rows.gemm_add(z, MatMut::new(dh, *width));
        }
    }

    fn losses(&self) -> impl Iterator<Item = f32> + use<'_> {
        (0..self.targets.len())
            .map(|row| self.max[row] + self.sums[row].ln() as f32 - self.target_logits[row])
    }

    /// e W -> dh, with W (V, `c`).
    fn finish<T: Element>(&mut self, w: &[T], c: usize, scale: f64) {
        let Some((dh, width)) = &mut self.dh else {
            return;
        };
        for ((row, target), dh) in self
            .targets
            .iter()
            .enumerate()
            .zip(dh.chunks_exact_mut(*width))
        {
            let (w, share, scale) = (
                &w[*target as usize * c..][..c],
                (scale / self.sums[row]) as f32,
                scale as f32,
            );
            dispatch(
                #[inline(always)]
                |_| {
                    dh.iter_mut()
                        .zip(w)
                        .for_each(|(dh, w)| *dh = share * *dh - scale * w.as_f32())
                },
            );
        }
    }
}
