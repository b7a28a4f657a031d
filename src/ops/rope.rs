//! Rotary position embedding, half-rotated layout: for each head, channel i < D/2 is paired with channel i + D/2 (Su et al. 2021).
//!
//! The backward pass is the rotation by the negative angle. Frequency scaling follows the published definitions: linear (Chen et al.
//! 2023), dynamic NTK and YaRN (Peng et al. 2023), and the piecewise rule of Llama 3.1's model card.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use half::bf16;

use super::gemm::Element;
use super::parallel::par_for_each;
use super::simd::dispatch;
use super::storage::{CpuTensor, ROWS_PER_TASK, check_shape, f32_tensor, uninit_vec};
use super::{Context, Segments};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// How frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the sequence, beyond `original` positions.
    Dynamic {
        /// The growth.
        factor: f64,
        /// Positions the model was trained on.
        original: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Positions the model was trained on.
        original: usize,
    },
    /// A ramp over dimensions, and logits scaled through cos and sin.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// What cos and sin are multiplied by.
        attention_factor: f64,
        /// Positions the model was trained on.
        original: usize,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

/// A model's rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Channels of one head; even.
    pub head_dim: usize,
    /// The base of the frequencies.
    pub theta: f64,
    /// Their stretching.
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

    /// The share of interpolation in dimension pair `i`.
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

    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// Angles of positions `first..first + length` of a sequence that is `whole` tokens long: cos, then sin, row by row.
    fn angles(&self, first: usize, length: usize, whole: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.inverse_frequencies(whole);
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
            let own = by_length.then(|| self.angles(0, range.len(), range.len()));
            let (c, s) = own.as_ref().unwrap_or(&shared);
            let end = range.len() * self.head_dim / 2;
            cos.extend_from_slice(&c[..end]);
            sin.extend_from_slice(&s[..end]);
        }
        self.upload(cos, sin, device)
    }

    /// Tables for `length` tokens that follow `first` earlier ones of the same sequence.
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

    /// Rotates x (N, H * D) by each token's angles; in the compute type where the fused pass runs, as for `backward`.
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        self.rotate(context, x, 1.0)
    }

    /// Rotates dy (N, H * D) back.
    pub fn backward(&self, context: Context<'_>, dy: &Tensor) -> Result<Tensor> {
        self.rotate(context, dy, -1.0)
    }

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
        if context.fused(x) {
            self.rotate_cpu(context, x, direction)
        } else {
            self.rotate_reference(x, direction)
        }
    }

    fn rotate_reference(&self, x: &Tensor, direction: f32) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let half = self.cos.dims2()?.1;
        let x = x.reshape((n, c / (2 * half), 2, half))?;
        let (first, second) = (x.narrow(2, 0, 1)?, x.narrow(2, 1, 1)?);
        let cos = self.cos.reshape((n, 1, 1, half))?;
        let sin = (self.sin.reshape((n, 1, 1, half))? * f64::from(direction))?;
        let y1 = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let y2 = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[y1, y2], 2)?.reshape((n, c))?)
    }

    fn rotate_cpu(&self, context: Context<'_>, x: &Tensor, direction: f32) -> Result<Tensor> {
        let shape = x.dims2()?;
        let n = shape.0 * shape.1;
        if context.precision != Precision::Bf16 {
            // SAFETY: `rotate_into` writes every number.
            let mut y: Vec<f32> = unsafe { uninit_vec(n) };
            self.rotate_into(x, direction, &mut y)?;
            return f32_tensor(y, shape);
        }
        // SAFETY: as above.
        let mut y: Vec<bf16> = unsafe { uninit_vec(n) };
        self.rotate_into(x, direction, &mut y)?;
        Ok(Tensor::from_vec(y, shape, &Device::Cpu)?)
    }

    fn rotate_into<Y: Element>(&self, x: &Tensor, direction: f32, y: &mut [Y]) -> Result<()> {
        let (c, half) = (x.dims2()?.1, self.cos.dims2()?.1);
        let (x, cos, sin) = (
            CpuTensor::borrow_f32(x)?,
            CpuTensor::borrow_f32(&self.cos)?,
            CpuTensor::borrow_f32(&self.sin)?,
        );
        let (x, cos, sin) = (x.f32_slice(), cos.f32_slice(), sin.f32_slice());
        let rows = |width: usize| width.max(1) * ROWS_PER_TASK;
        let angles = cos.chunks(rows(half)).zip(sin.chunks(rows(half)));
        par_for_each(
            y.chunks_mut(rows(c)).zip(x.chunks(rows(c))).zip(angles),
            |((y, x), (cos, sin))| {
                dispatch(
                    #[inline(always)]
                    |_| {
                        let heads = c / (2 * half);
                        for (head, (y, x)) in y
                            .chunks_exact_mut(2 * half)
                            .zip(x.chunks_exact(2 * half))
                            .enumerate()
                        {
                            let (cos, sin) = (
                                &cos[head / heads * half..][..half],
                                &sin[head / heads * half..][..half],
                            );
                            let ((y1, y2), (x1, x2)) = (y.split_at_mut(half), x.split_at(half));
                            let (x1, x2, y2) = (&x1[..half], &x2[..half], &mut y2[..half]);
                            for i in 0..half {
                                let (a, b, s) = (x1[i], x2[i], direction * sin[i]);
                                y1[i] = Y::cast(a * cos[i] - b * s);
                                y2[i] = Y::cast(b * cos[i] + a * s);
                            }
                        }
                    },
                );
            },
        );
        Ok(())
    }
}
