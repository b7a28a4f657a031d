//! Bit-packed dropout masks for LoRA inputs (Srivastava et al. 2014, "Dropout").
//!
//! Takes random bits from the caller; returns masked inputs and gradients. A mask in f32 would be
//! as large as all other activations that a block saves.

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::cuda;
use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{CpuTensor, ROWS_PER_TASK, uninit_vec};
use crate::error::Result;

/// Elements of a mask word.
const WORD: usize = 32;

/// Which elements of an input (N, in) dropout keeps, and their scale.
///
/// ```
/// use candle_core::Device;
/// use wattune::ops::DropoutMask;
/// // Random bits above p = 0.5 keep an element, scaled by 1 / (1 - p).
/// let mask = DropoutMask::sample((1, 4), 0.5, |_, bits| {
///     bits.copy_from_slice(&[0, u32::MAX, 1 << 31, 1])
/// });
/// let mask = mask.tensor(&Device::Cpu)?.to_vec2::<f32>()?;
/// assert_eq!(mask, [[0., 2., 2., 0.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DropoutMask {
    bits: Arc<Bits>,
    shape: (usize, usize),
    /// `1 / (1 - p)`, which preserves the mean.
    scale: f32,
}

/// The random bits of each row: row r takes `words[r] * width` onwards of `streams[segments[r]]`.
#[derive(Debug, Clone)]
pub struct StreamRows {
    /// ChaCha8 streams.
    pub streams: Vec<ChaCha8Rng>,
    /// (N).
    pub segments: Vec<u32>,
    /// (N): rows of the stream before this one.
    pub tokens: Vec<u32>,
}

/// One bit for each element, which is set where it is kept; each row is padded to words. Drawn at the first use, where the
/// input is.
#[derive(Debug, Default)]
struct Bits {
    host: OnceLock<Vec<u32>>,
    device: OnceLock<Tensor>,
    rows: Option<StreamRows>,
    threshold: u32,
}

/// The upper 24 bits of a random word are a fraction of 2^24 to compare with p.
fn threshold(p: f64) -> u32 {
    (p * f64::from(1 << 24)).ceil() as u32
}

impl DropoutMask {
    /// Samples a mask for an input of `shape`, which drops each element with probability `p` < 1.
    /// `draw(row, bits)` fills one row with 32 uniform random bits per element; rows are drawn in
    /// any order and in parallel.
    pub fn sample(shape: (usize, usize), p: f64, draw: impl Fn(usize, &mut [u32]) + Sync) -> Self {
        let bits = Bits::default();
        bits.host
            .get_or_init(|| draw_bits(shape, threshold(p), draw));
        Self::new(shape, p, bits)
    }

    /// The mask of `sample` with the bits of streams, one row of them for each of `shape`.
    pub fn from_streams(shape: (usize, usize), p: f64, rows: StreamRows) -> Self {
        assert!(
            rows.segments.len() == shape.0 && rows.tokens.len() == shape.0,
            "each row has its bits"
        );
        let bits = Bits {
            rows: Some(rows),
            threshold: threshold(p),
            ..Bits::default()
        };
        Self::new(shape, p, bits)
    }

    fn new(shape: (usize, usize), p: f64, bits: Bits) -> Self {
        Self {
            bits: Arc::new(bits),
            shape,
            scale: (1.0 / (1.0 - p)) as f32,
        }
    }

    /// The bits (N, words) on the host.
    fn kept(&self) -> &[u32] {
        let width = self.shape.1;
        self.bits.host.get_or_init(|| {
            let Some(rows) = &self.bits.rows else {
                return Vec::new();
            };
            draw_bits(self.shape, self.bits.threshold, |row, words| {
                let mut stream = rows.streams[rows.segments[row] as usize].clone();
                stream.set_word_pos(u128::from(rows.tokens[row]) * width as u128);
                words.iter_mut().for_each(|word| *word = stream.next_u32());
            })
        })
    }

    /// The bits (N, words) on a CUDA device.
    pub(super) fn bits(&self, device: &Device) -> Result<Tensor> {
        if let Some(bits) = self.bits.device.get() {
            return Ok(bits.clone());
        }
        let bits = match &self.bits.rows {
            Some(rows) => cuda::draw_bits(device, rows, self.shape, self.bits.threshold)?,
            None => {
                let shape = (self.shape.0, words_of(self.shape.1));
                Tensor::from_slice(self.kept(), shape, device)?
            }
        };
        Ok(self.bits.device.get_or_init(|| bits).clone())
    }

    /// `1 / (1 - p)`.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// The mask in f32 (N, in): 0 or `1 / (1 - p)`.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        let ones = vec![1.0f32; self.shape.0 * self.shape.1];
        Ok(Tensor::from_vec(self.masked(&ones), self.shape, device)?)
    }

    /// x (N, in) on the CPU, masked.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(match CpuTensor::borrow(x)?.slice() {
            CpuSlice::F32(x) => self.masked(x),
            CpuSlice::Bf16(x) => self.masked(x),
        })
    }

    fn masked<T: Element>(&self, x: &[T]) -> Vec<f32> {
        // SAFETY: the loop writes every element.
        let mut out = unsafe { uninit_vec(x.len()) };
        self.apply_into::<false, T>(x, &mut out);
        out
    }

    /// sum (N, in) += x (N, in), masked.
    pub(super) fn add_masked(&self, x: &[f32], sum: &mut [f32]) {
        self.apply_into::<true, f32>(x, sum);
    }

    /// out = x, masked; or out += it.
    fn apply_into<const ADD: bool, T: Element>(&self, x: &[T], out: &mut [f32]) {
        let (rows, width) = self.shape;
        assert!(
            x.len() == rows * width && out.len() == x.len(),
            "a mask has its input's shape"
        );
        let words = words_of(width);
        let kept = self.kept();
        let part = (width * ROWS_PER_TASK).max(1);
        let tasks = out.chunks_mut(part).zip(x.chunks(part)).enumerate();
        par_for_each(tasks, |(task, (out, x))| {
            let kept = &kept[task * ROWS_PER_TASK * words..];
            simd!(|_| {
                let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for (row, (out, x)) in rows.enumerate() {
                    let kept = &kept[row * words..][..words];
                    let (out, out_rest) = out.as_chunks_mut::<WORD>();
                    let (x, x_rest) = x.as_chunks::<WORD>();
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
            });
        });
    }

    /// The factor of the element of bit `i`: `scale` or 0.
    #[inline(always)]
    fn factor(&self, word: u32, i: usize) -> f32 {
        ((word >> i) & 1) as f32 * self.scale
    }
}

/// Words of a row of `width` bits.
pub(super) fn words_of(width: usize) -> usize {
    width.div_ceil(WORD).max(1)
}

/// The bits of rows that `draw` fills with random words, set from `threshold` on.
fn draw_bits(
    (rows, width): (usize, usize),
    threshold: u32,
    draw: impl Fn(usize, &mut [u32]) + Sync,
) -> Vec<u32> {
    let words = words_of(width);
    let mut kept = vec![0; rows * words];
    let tasks = kept.chunks_mut(words * ROWS_PER_TASK).enumerate();
    par_for_each(tasks, |(task, kept)| {
        let mut drawn = vec![0; words * WORD];
        for (row, kept) in kept.chunks_exact_mut(words).enumerate() {
            draw(task * ROWS_PER_TASK + row, &mut drawn[..width]);
            simd!(|_| {
                for (kept, drawn) in kept.iter_mut().zip(drawn.as_chunks::<WORD>().0) {
                    let mut bits = 0;
                    for (i, drawn) in drawn.iter().enumerate() {
                        bits |= u32::from(drawn >> 8 >= threshold) << i;
                    }
                    *kept = bits;
                }
            });
        }
    });
    kept
}
