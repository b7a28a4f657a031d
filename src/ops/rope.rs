//! Rotary position embedding, half-rotated layout: for each head, channel i < D/2 is paired with
//! channel i + D/2 (Su et al. 2021).
//!
//! The backward pass is the rotation by the negative angle. Frequency scaling follows the published
//! definitions: linear (Chen et al. 2023), dynamic NTK and YaRN (Peng et al. 2023), and the
//! piecewise rule of Llama 3.1's model card.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use half::bf16;

use super::gemm::Element;
use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{CpuTensor, ROWS_PER_TASK, check_shape};
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
}

/// A model's rotary embedding.
///
/// With theta 1 every pair of channels rotates by one radian per position:
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, Rope, RopeScaling, Segments};
/// # use wattune::work::{Precision, WorkCounter};
/// let rope = Rope { head_dim: 2, theta: 1., scaling: RopeScaling::None };
/// let tables = rope.tables(&Segments::from_lengths([2]), &Device::Cpu)?;
/// let x = Tensor::new(&[[1f32, 0.], [1., 0.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let y = tables.forward(Context::new(&counter, Precision::F32), &x)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1., 0.], [1f32.cos(), 1f32.sin()]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Channels of one head; even.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// cos and sin of every token's angles: each (N, head_dim / 2).
#[derive(Debug, Clone)]
pub struct RopeTables {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Inverse frequencies (head_dim / 2) for a sequence of `length` tokens.
    fn inverse_frequencies(&self, length: usize) -> Vec<f64> {
        let dim = self.head_dim as f64;
        let plain =
            |base: f64| (0..self.head_dim / 2).map(move |i| base.powf(-2.0 * i as f64 / dim));
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
        let dim = self.head_dim as f64;
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

    /// Factor of cos and sin: YaRN's, else 1.
    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
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

    /// Tables for every token of `segments`; positions restart in each.
    pub fn tables(&self, segments: &Segments, device: &Device) -> Result<RopeTables> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let longest = segments
            .ranges()
            .iter()
            .map(|range| range.len())
            .max()
            .unwrap_or(0);
        let by_length = matches!(self.scaling, RopeScaling::Dynamic { .. });
        let shared = self.angles(0, longest, longest);
        for range in segments.ranges() {
            let scaled = by_length.then(|| self.angles(0, range.len(), range.len()));
            let (c, s) = scaled.as_ref().unwrap_or(&shared);
            let end = range.len() * self.head_dim / 2;
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
        let shape = (cos.len() / (self.head_dim / 2), self.head_dim / 2);
        Ok(RopeTables {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }
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

impl RopeTables {
    /// Work of rotating (n, c).
    pub fn cost(n: usize, c: usize) -> Work {
        Work::sweep(8 * n * c, 3 * n * c)
    }

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
        if !c.is_multiple_of(2 * half) {
            return Err(
                Error::new(Kind::Tensor, "rotated rows must hold whole heads")
                    .value(c.to_string())
                    .rule(format!("a multiple of head_dim = {}", 2 * half)),
            );
        }
        context.counter.add(Self::cost(n, c));
        match context.path(x) {
            Path::Cpu => self.rotate_cpu(context, x, direction),
            Path::Device => self.rotate_device(x, direction),
            Path::Reference => self.rotate_reference(x, direction),
        }
    }

    fn rotate_device(&self, x: &Tensor, direction: f32) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let head_dim = 2 * self.cos.dims2()?.1;
        let heads = x.contiguous()?.reshape((1, n, c / head_dim, head_dim))?;
        let sin = if direction < 0.0 {
            self.sin.neg()?
        } else {
            self.sin.clone()
        };
        Ok(candle_nn::rotary_emb::rope_thd(&heads, &self.cos, &sin)?.reshape((n, c))?)
    }

    fn rotate_reference(&self, x: &Tensor, direction: f32) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let half = self.cos.dims2()?.1;
        let x = x.reshape((n, c / (2 * half), 2, half))?;
        let first = x.narrow(2, 0, 1)?;
        let second = x.narrow(2, 1, 1)?;
        let cos = self.cos.reshape((n, 1, 1, half))?;
        let sin = (self.sin.reshape((n, 1, 1, half))? * f64::from(direction))?;
        let y1 = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let y2 = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[y1, y2], 2)?.reshape((n, c))?)
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
        let x = CpuTensor::borrow_f32(x)?;
        let cos = CpuTensor::borrow_f32(&self.cos)?;
        let sin = CpuTensor::borrow_f32(&self.sin)?;
        let size = |width: usize| width.max(1) * ROWS_PER_TASK;
        let cos = cos.f32_slice().chunks(size(half));
        let angles = cos.zip(sin.f32_slice().chunks(size(half)));
        let inputs = x.f32_slice().chunks(size(c)).zip(angles);
        par_for_each(y.chunks_mut(size(c)).zip(inputs), |(y, (x, (cos, sin)))| {
            simd!(|_| {
                let heads = y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                for (head, (y, x)) in heads.enumerate() {
                    let row = head / (c / (2 * half));
                    let cos = &cos[row * half..][..half];
                    let sin = &sin[row * half..][..half];
                    let (y1, y2) = y.split_at_mut(half);
                    let (x1, x2) = (&x[..half], &x[half..][..half]);
                    let y2 = &mut y2[..half];
                    for i in 0..half {
                        let (a, b, s) = (x1[i], x2[i], direction * sin[i]);
                        y1[i] = Y::cast(a * cos[i] - b * s);
                        y2[i] = Y::cast(b * cos[i] + a * s);
                    }
                }
            });
        });
        Ok(())
    }
}
