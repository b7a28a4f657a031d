//! LoRA's dropout: which numbers of an adapter's input are dropped, one bit for each (Srivastava et al. 2014, "Dropout").
//!
//! Takes random bits from whoever draws them, returns what a mask makes of an input or a gradient. A mask of f32 would be as large as
//! all else that a block keeps for its backward pass.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::dispatch;
use super::storage::{CpuTensor, ROWS_PER_TASK, uninit_vec};
use crate::error::Result;

/// Numbers whose bits are in one word.
const WORD: usize = 32;

/// Which numbers of an input (N, in) are kept, and what they are multiplied by.
#[derive(Debug, Clone)]
pub struct DropoutMask {
    /// Row by row, each in whole words.
    kept: Arc<[u32]>,
    shape: (usize, usize),
    /// `1 / (1 - p)`: the mean stays.
    scale: f32,
}

impl DropoutMask {
    /// For an input of `shape`, of which each number is dropped with probability `p` below 1. `draw` fills a row's numbers with uniform
    /// random bits: rows in any order, on all threads.
    pub fn sample(shape: (usize, usize), p: f64, draw: impl Fn(usize, &mut [u32]) + Sync) -> Self {
        let (rows, width) = shape;
        // The upper 24 bits as a number in [0, 1) lie below p.
        let least = (p * f64::from(1 << 24)).ceil() as u32;
        let words = width.div_ceil(WORD).max(1);
        let mut kept = vec![0; rows * words];
        par_for_each(
            kept.chunks_mut(words * ROWS_PER_TASK).enumerate(),
            |(task, kept)| {
                let mut drawn = vec![0; words * WORD];
                for (row, kept) in kept.chunks_exact_mut(words).enumerate() {
                    draw(task * ROWS_PER_TASK + row, &mut drawn[..width]);
                    dispatch(
                        #[inline(always)]
                        |_| {
                            for (kept, drawn) in kept.iter_mut().zip(drawn.as_chunks::<WORD>().0) {
                                let mut bits = 0;
                                for (i, drawn) in drawn.iter().enumerate() {
                                    bits |= u32::from(drawn >> 8 >= least) << i;
                                }
                                *kept = bits;
                            }
                        },
                    );
                }
            },
        );
        Self {
            kept: kept.into(),
            shape,
            scale: (1.0 / (1.0 - p)) as f32,
        }
    }

    /// The mask as numbers (N, in): zero, or `1 / (1 - p)`.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        let ones = vec![1.0f32; self.shape.0 * self.shape.1];
        Ok(Tensor::from_vec(self.of_slice(&ones), self.shape, device)?)
    }

    /// x (N, in) on a CPU, masked.
    pub(super) fn of(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(match CpuTensor::borrow(x)?.slice() {
            CpuSlice::F32(x) => self.of_slice(x),
            CpuSlice::Bf16(x) => self.of_slice(x),
        })
    }

    fn of_slice<T: Element>(&self, x: &[T]) -> Vec<f32> {
        // SAFETY: the loop writes every number.
        let mut out = unsafe { uninit_vec(x.len()) };
        self.apply::<false, T>(x, &mut out);
        out
    }

    /// sum (N, in) += x (N, in), masked.
    pub(super) fn add(&self, x: &[f32], sum: &mut [f32]) {
        self.apply::<true, f32>(x, sum);
    }

    fn apply<const ADD: bool, T: Element>(&self, x: &[T], out: &mut [f32]) {
        let (rows, width) = self.shape;
        assert!(
            x.len() == rows * width && out.len() == x.len(),
            "a mask has its input's shape"
        );
        let (words, part) = (width.div_ceil(WORD), (width * ROWS_PER_TASK).max(1));
        par_for_each(
            out.chunks_mut(part).zip(x.chunks(part)).enumerate(),
            |(task, (out, x))| {
                let kept = &self.kept[task * ROWS_PER_TASK * words..];
                dispatch(
                    #[inline(always)]
                    |_| {
                        for (row, (out, x)) in out
                            .chunks_exact_mut(width)
                            .zip(x.chunks_exact(width))
                            .enumerate()
                        {
                            let kept = &kept[row * words..][..words];
                            let ((out, out_rest), (x, x_rest)) =
                                (out.as_chunks_mut::<WORD>(), x.as_chunks::<WORD>());
                            for (word, (out, x)) in out.iter_mut().zip(x).enumerate() {
                                for i in 0..WORD {
                                    let x = x[i].as_f32() * self.factor(kept[word], i);
                                    out[i] = if ADD { out[i] + x } else { x };
                                }
                            }
                            for i in 0..out_rest.len() {
                                let x = x_rest[i].as_f32() * self.factor(kept[words - 1], i);
                                out_rest[i] = if ADD { out_rest[i] + x } else { x };
                            }
                        }
                    },
                );
            },
        );
    }

    /// What number `i` of a word is multiplied by.
    #[inline(always)]
    fn factor(&self, word: u32, i: usize) -> f32 {
        ((word >> i) & 1) as f32 * self.scale
    }
}
