//! Rotary position embedding, half-rotated layout: of the first R channels of each head, channel i <
//! R/2 is paired with channel i + R/2 (Su et al. 2021); the others pass through unchanged.
//!
//! The backward pass is the rotation by the negative angle. Frequency scaling follows the published
//! definitions: linear (Chen et al. 2023), dynamic NTK and YaRN (Peng et al. 2023), LongRoPE (Ding et
//! al. 2024), and the piecewise rule of Llama 3.1's model card.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use half::bf16;

use super::cuda::Rotation;
use super::gemm::Element;
use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{CpuTensor, ROWS_PER_TASK, cast_into, check_shape};
use super::{Context, Path, Segments, new_tensor};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Frequency scaling for sequences beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// Divides every frequency.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Dynamic NTK: raises the base with the sequence length, beyond `original` positions.
    Dynamic {
        /// Growth of the base.
        factor: f64,
        /// Positions the model was trained on.
        original: usize,
    },
    /// Divides low frequencies by `factor`, leaves high ones, ramps between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// `low_freq_factor`: frequencies of wavelengths above `original / low` are divided.
        low: f64,
        /// `high_freq_factor`: those of wavelengths below `original / high` are unchanged.
        high: f64,
        /// Positions the model was trained on.
        original: usize,
    },
    /// Ramps over pairs of channels, and scales attention scores through cos and sin.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Rotations over `original` positions above which a frequency is unchanged.
        beta_fast: f64,
        /// Rotations over `original` positions below which a frequency is divided.
        beta_slow: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
        /// Positions the model was trained on.
        original: usize,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE: a divisor for each frequency, of two lists by the length of the sequence.
    LongRope {
        /// Divisors (R / 2) of sequences of at most `original` tokens.
        short: Vec<f64>,
        /// Divisors (R / 2) of longer ones.
        long: Vec<f64>,
        /// Factor of cos and sin, in both cases.
        attention_factor: f64,
        /// Positions the model was trained on.
        original: usize,
    },
}

/// A model's rotary embedding.
///
/// With theta 1 every pair of channels rotates by one radian per position:
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, Rope, RopeScaling, Segments};
/// # use wattune::work::{Precision, WorkCounter};
/// let scaling = RopeScaling::None;
/// let rope = Rope { head_dim: 2, rotary_dim: 2, interleaved: false, theta: 1., scaling };
/// let tables = rope.tables(&Segments::from_lengths([2]), &Device::Cpu)?;
/// let x = Tensor::new(&[[1f32, 0.], [1., 0.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let y = tables.forward(Context::new(&counter, Precision::F32), &x)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 0.], [1f32.cos(), 1f32.sin()]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Channels of one head.
    pub head_dim: usize,
    /// The first of them, which are rotated; even.
    pub rotary_dim: usize,
    /// Whether neighbouring channels 2i and 2i + 1 rotate together (GPT-J), rather than i and
    /// rotary_dim / 2 + i (GPT-NeoX).
    pub interleaved: bool,
    /// Base of the frequencies.
    pub theta: f64,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// A factor of queries by position: 1 + beta ln(1 + floor(position / original)) (Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// Growth of the factor.
    pub beta: f64,
    /// Positions with a factor of 1: the length the model was trained on.
    pub original: usize,
}

impl QueryScaling {
    /// The tables of queries at these positions, from the tables of keys.
    pub fn query_tables(
        &self,
        keys: &RopeTables,
        positions: impl Iterator<Item = usize>,
    ) -> Result<RopeTables> {
        let factor =
            |position| (self.beta * ((position / self.original) as f64).ln_1p() + 1.0) as f32;
        let factors: Vec<f32> = positions.map(factor).collect();
        let shape = (factors.len(), 1);
        let factors = Tensor::from_vec(factors, shape, keys.cos.device())?;
        Ok(RopeTables {
            cos: keys.cos.broadcast_mul(&factors)?,
            sin: keys.sin.broadcast_mul(&factors)?,
            ..keys.clone()
        })
    }
}

/// cos and sin of every token's angles: each (N, rotary_dim / 2).
#[derive(Debug, Clone)]
pub struct RopeTables {
    head_dim: usize,
    interleaved: bool,
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Unscaled over scaled inverse frequencies of a short sequence, (rotary_dim / 2).
    pub fn frequency_divisors(&self) -> Vec<f32> {
        let unscaled = Self {
            scaling: RopeScaling::None,
            ..self.clone()
        };
        let pairs = unscaled
            .inverse_frequencies(1)
            .into_iter()
            .zip(self.inverse_frequencies(1));
        pairs
            .map(|(unscaled, scaled)| (unscaled / scaled) as f32)
            .collect()
    }

    /// Inverse frequencies (rotary_dim / 2) for a sequence of `length` tokens.
    fn inverse_frequencies(&self, length: usize) -> Vec<f64> {
        let dim = self.rotary_dim as f64;
        let plain =
            |base: f64| (0..self.rotary_dim / 2).map(move |i| base.powf(-2.0 * i as f64 / dim));
        match &self.scaling {
            RopeScaling::None => plain(self.theta).collect(),
            RopeScaling::Linear { factor } => plain(self.theta).map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, original } => {
                let stretch = length.max(*original) as f64 / *original as f64;
                plain(self.theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0)))
                    .collect()
            }
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => plain(self.theta)
                .map(|f| llama3(f, *factor, *low, *high, *original as f64))
                .collect(),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original,
                truncate,
                ..
            } => {
                let ramp = self.yarn_ramp(*beta_fast, *beta_slow, *original as f64, *truncate);
                plain(self.theta)
                    .enumerate()
                    .map(|(i, f)| ramp(i) * f / factor + (1.0 - ramp(i)) * f)
                    .collect()
            }
            RopeScaling::LongRope {
                short,
                long,
                original,
                ..
            } => {
                let divisors = if length > *original { long } else { short };
                plain(self.theta)
                    .zip(divisors)
                    .map(|(f, d)| f / d)
                    .collect()
            }
        }
    }

    /// Interpolation weight of each pair of channels: 0 leaves its frequency, 1 divides it.
    fn yarn_ramp(
        &self,
        beta_fast: f64,
        beta_slow: f64,
        original: f64,
        truncate: bool,
    ) -> impl Fn(usize) -> f64 {
        let dim = self.rotary_dim as f64;
        let pair = |rotations: f64| {
            dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(dim - 1.0);
        if low == high {
            high += 0.001;
        }
        move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }

    /// Factor of cos and sin: YaRN's and LongRoPE's, else 1.
    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// The length above which LongRoPE rotates every position of a sequence by other frequencies.
    pub fn long_above(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope { original, .. } => Some(original),
            _ => None,
        }
    }

    /// cos and sin of the angles at positions `first..first + length` of a sequence of `total`
    /// tokens, row by row.
    pub(crate) fn angles(&self, first: usize, length: usize, total: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.inverse_frequencies(total);
        let factor = self.attention_factor();
        let each =
            || (first..first + length).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        (
            each().map(|a| (a.cos() * factor) as f32).collect(),
            each().map(|a| (a.sin() * factor) as f32).collect(),
        )
    }

    /// Tables for every token of `segments`; positions restart in each, and scaling by length goes by
    /// the length of each.
    pub fn tables(&self, segments: &Segments, device: &Device) -> Result<RopeTables> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let longest = segments
            .ranges()
            .iter()
            .map(|range| range.len())
            .max()
            .unwrap_or(0);
        let by_length = matches!(
            self.scaling,
            RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. }
        );
        let shared = self.angles(0, longest, longest);
        for range in segments.ranges() {
            let scaled = by_length.then(|| self.angles(0, range.len(), range.len()));
            let (c, s) = scaled.as_ref().unwrap_or(&shared);
            let end = range.len() * self.rotary_dim / 2;
            cos.extend_from_slice(&c[..end]);
            sin.extend_from_slice(&s[..end]);
        }
        self.upload(cos, sin, device)
    }

    /// Tables for `length` tokens from position `first` on.
    pub fn tables_from(&self, first: usize, length: usize, device: &Device) -> Result<RopeTables> {
        let (cos, sin) = self.angles(first, length, first + length);
        self.upload(cos, sin, device)
    }

    fn upload(&self, cos: Vec<f32>, sin: Vec<f32>, device: &Device) -> Result<RopeTables> {
        let shape = (cos.len() / (self.rotary_dim / 2), self.rotary_dim / 2);
        Ok(RopeTables {
            head_dim: self.head_dim,
            interleaved: self.interleaved,
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }
}

/// Rotates the neighbouring channels of a head x by angles (rotary_dim / 2); copies the others.
#[inline(always)]
fn rotate_pairs<Y: Element>(y: &mut [Y], x: &[f32], cos: &[f32], sin: &[f32], direction: f32) {
    let (rotated, rest) = x.split_at(2 * cos.len());
    let (y, y_rest) = y.split_at_mut(2 * cos.len());
    let pairs = y.chunks_exact_mut(2).zip(rotated.chunks_exact(2));
    for ((y, x), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
        let s = direction * sin;
        y[0] = Y::cast(x[0] * cos - x[1] * s);
        y[1] = Y::cast(x[1] * cos + x[0] * s);
    }
    cast_into(y_rest, rest);
}

/// Llama 3.1's rule for one frequency.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength > original / low {
        frequency / factor
    } else if wavelength < original / high {
        frequency
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// Work of a pass over (n, c) in which `rotated` columns of each row rotate.
pub fn rope_cost(n: usize, c: usize, rotated: usize) -> Work {
    Work::sweep(8 * n * c, 3 * n * rotated)
}

impl RopeTables {
    /// Rotates x (N, H D) by each token's angles; on the CPU the result is in the compute type, as
    /// of `backward`.
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        self.rotate(context, x, 1.0)
    }

    /// Rotates dy (N, H D) by the negative angles.
    pub fn backward(&self, context: Context<'_>, dy: &Tensor) -> Result<Tensor> {
        self.rotate(context, dy, -1.0)
    }

    /// Rotates x (N, H D) by `direction` (1 or -1) times the angles.
    fn rotate(&self, context: Context<'_>, x: &Tensor, direction: f32) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let half = self.cos.dims2()?.1;
        check_shape("cos", &self.cos, &[n, half])?;
        if !c.is_multiple_of(self.head_dim) {
            return Err(
                Error::new(Kind::Tensor, "rotated rows must hold whole heads")
                    .value(c.to_string())
                    .rule(format!("a multiple of head_dim = {}", self.head_dim)),
            );
        }
        let rotated = c / self.head_dim * 2 * half;
        context.counter.add(rope_cost(n, c, rotated));
        match context.path(x) {
            Path::Cpu => self.rotate_cpu(context, x, direction),
            Path::Cuda => {
                let rotation = Rotation {
                    tables: [&self.cos, &self.sin],
                    head_dim: self.head_dim,
                    interleaved: self.interleaved,
                    direction,
                };
                rotation.run(context, x)
            }
            Path::Device if !self.interleaved => {
                self.rotate_channels(x, |x| self.rotate_device(x, direction))
            }
            Path::Device | Path::Reference => {
                self.rotate_channels(x, |x| self.rotate_reference(x, direction))
            }
        }
    }

    /// x (N, H D) with `rotate` (of (N, H, R)) on the first R channels of each head.
    fn rotate_channels(
        &self,
        x: &Tensor,
        rotate: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let rotary_dim = 2 * self.cos.dims2()?.1;
        let heads = x.reshape((n, c / self.head_dim, self.head_dim))?;
        let rotated = rotate(&heads.narrow(2, 0, rotary_dim)?.contiguous()?)?;
        let rest = heads.narrow(2, rotary_dim, self.head_dim - rotary_dim)?;
        let heads = if self.head_dim > rotary_dim {
            Tensor::cat(&[rotated, rest], 2)?
        } else {
            rotated
        };
        Ok(heads.reshape((n, c))?)
    }

    /// x (N, H, R) by candle's fused pass.
    fn rotate_device(&self, x: &Tensor, direction: f32) -> Result<Tensor> {
        let sin = if direction < 0.0 {
            self.sin.neg()?
        } else {
            self.sin.clone()
        };
        let rotated = candle_nn::rotary_emb::rope_thd(&x.unsqueeze(0)?, &self.cos, &sin)?;
        Ok(rotated.squeeze(0)?)
    }

    /// x (N, H, R) by primitives.
    fn rotate_reference(&self, x: &Tensor, direction: f32) -> Result<Tensor> {
        let (n, heads, rotary_dim) = x.dims3()?;
        let half = rotary_dim / 2;
        // The two channels of each pair, and the dimension that they differ in.
        let (pairs, dim) = if self.interleaved {
            (x.reshape((n, heads, half, 2))?, 3)
        } else {
            (x.reshape((n, heads, 2, half))?, 2)
        };
        let first = pairs.narrow(dim, 0, 1)?.squeeze(dim)?;
        let second = pairs.narrow(dim, 1, 1)?.squeeze(dim)?;
        let cos = self
            .cos
            .reshape((n, 1, half))?
            .broadcast_as((n, heads, half))?;
        let sin = (self.sin.reshape((n, 1, half))? * f64::from(direction))?;
        let sin = sin.broadcast_as((n, heads, half))?;
        let y1 = ((&first * &cos)? - (&second * &sin)?)?;
        let y2 = ((&second * &cos)? + (&first * &sin)?)?;
        Ok(Tensor::stack(&[y1, y2], dim)?.reshape((n, heads, rotary_dim))?)
    }

    fn rotate_cpu(&self, context: Context<'_>, x: &Tensor, direction: f32) -> Result<Tensor> {
        let shape = x.dims2()?;
        // SAFETY: `rotate_into` writes every element.
        unsafe {
            match context.precision {
                Precision::Bf16 => {
                    new_tensor(shape, |y: &mut [bf16]| self.rotate_into(x, direction, y))
                }
                Precision::F32 | Precision::F16 => {
                    new_tensor(shape, |y: &mut [f32]| self.rotate_into(x, direction, y))
                }
            }
        }
    }

    fn rotate_into<Y: Element>(&self, x: &Tensor, direction: f32, y: &mut [Y]) -> Result<()> {
        let c = x.dims2()?.1;
        let half = self.cos.dims2()?.1;
        let head_dim = self.head_dim;
        let x = CpuTensor::borrow_f32(x)?;
        let cos = CpuTensor::borrow_f32(&self.cos)?;
        let sin = CpuTensor::borrow_f32(&self.sin)?;
        let size = |width: usize| width.max(1) * ROWS_PER_TASK;
        let cos = cos.f32_slice().chunks(size(half));
        let angles = cos.zip(sin.f32_slice().chunks(size(half)));
        let inputs = x.f32_slice().chunks(size(c)).zip(angles);
        par_for_each(y.chunks_mut(size(c)).zip(inputs), |(y, (x, (cos, sin)))| {
            simd!(|_| {
                let heads = y.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim));
                for (head, (y, x)) in heads.enumerate() {
                    let row = head / (c / head_dim);
                    let cos = &cos[row * half..][..half];
                    let sin = &sin[row * half..][..half];
                    if self.interleaved {
                        rotate_pairs(y, x, cos, sin, direction);
                        continue;
                    }
                    let (y1, y2) = y.split_at_mut(half);
                    let (y2, rest) = y2.split_at_mut(half);
                    let (x1, x2) = (&x[..half], &x[half..][..half]);
                    for i in 0..half {
                        let (a, b, s) = (x1[i], x2[i], direction * sin[i]);
                        y1[i] = Y::cast(a * cos[i] - b * s);
                        y2[i] = Y::cast(b * cos[i] + a * s);
                    }
                    cast_into(rest, &x[2 * half..]);
                }
            });
        });
        Ok(())
    }
}
