//! Norms, row by row: `y = factor (weight (x - m) / sqrt(mean((x - m)^2) + eps) + bias)`, with m = 0
//! (RMSNorm, Zhang and Sennrich 2019, equation 4) or m = mean(x) (LayerNorm, Ba et al. 2016).

use candle_core::{D, DType, Device, Tensor};
use half::bf16;

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::{self, simd};
use super::storage::{
    CpuTensor, ROWS_PER_TASK, cast_into, check_shape, f32_tensor, load_activation, save_activation,
    uninit_vec,
};
use super::{Context, Gradients, Path, Weight, new_tensor, optional_chunks, residual_cost};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// What a norm does to a row before it scales it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Nothing.
    Rms,
    /// Subtracts its mean.
    Layer,
}

/// A norm: its weight (C), bias and epsilon.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, Norm, NormKind, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// let weight = Weight::frozen(Tensor::new(&[1f32, 10.], &Device::Cpu)?);
/// let norm = Norm { kind: NormKind::Rms, weight, bias: None, unit_offset: false, eps: 0., factor: 1. };
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?; // rms = sqrt((1 + 49) / 2) = 5
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// assert_eq!(norm.forward(context, &x)?.0.to_vec2::<f32>()?, [[0.2, 14.]]);
/// let norm = Norm { kind: NormKind::Layer, ..norm }; // mean 4, standard deviation 3
/// assert_eq!(norm.forward(context, &x)?.0.to_vec2::<f32>()?, [[-1., 10.]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Norm {
    /// Whether the mean is subtracted.
    pub kind: NormKind,
    /// (C).
    pub weight: Weight,
    /// (C).
    pub bias: Option<Weight>,
    /// Whether the scale is 1 + weight (Gemma).
    pub unit_offset: bool,
    /// Added to the mean square.
    pub eps: f64,
    /// Factor of the result: 1, except where logits are scaled through the last norm.
    pub factor: f64,
}

/// Input of `backward`: x (N, C) in the compute type; the rest is cheaper to recompute.
#[derive(Debug, Clone)]
pub struct NormSaved {
    x: Tensor,
}

impl NormSaved {
    /// Saves an input x (N, C) that no norm precedes, in the compute type.
    pub(crate) fn new(context: Context<'_>, x: &Tensor) -> Result<Self> {
        let x = save_activation(context, x)?;
        Ok(Self { x })
    }

    /// x (N, C).
    pub(crate) fn x(&self) -> &Tensor {
        &self.x
    }
}

/// Work of a forward pass over (n, c); a LayerNorm's with a bias.
pub fn norm_cost(kind: NormKind, n: usize, c: usize) -> Work {
    let operations = match kind {
        NormKind::Rms => 4,
        NormKind::Layer => 8,
    };
    Work::sweep(8 * n * c, operations * n * c)
}

/// Work of a backward pass over (n, c); `trained`: whether the weight or the bias is.
pub fn norm_backward_cost(kind: NormKind, n: usize, c: usize, trained: bool) -> Work {
    let (operations, of_weights) = match kind {
        NormKind::Rms => (8, 2),
        NormKind::Layer => (14, 3),
    };
    let extra = if trained { of_weights } else { 0 };
    Work::sweep(12 * n * c, (operations + extra) * n * c)
}

impl Norm {
    /// Whether the weight or the bias is trained.
    pub fn is_trained(&self) -> bool {
        self.weight.is_trained() || self.bias.as_ref().is_some_and(Weight::is_trained)
    }

    /// x (N, C) -> y (N, C); on the CPU in the compute type, because the next op is a GEMM.
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, NormSaved)> {
        self.check_and_count(context, x)?;
        if context.path(x) == Path::Cpu {
            CpuTensor::borrow_f32(x)?;
            return self.forward_cpu(context, x);
        }
        if context.path(x) == Path::Cuda {
            let (y, x) = self.forward_cuda(context, x)?;
            return Ok((y, NormSaved { x }));
        }
        let saved = NormSaved {
            x: save_activation(context, x)?,
        };
        Ok((self.forward_primitives(context, x)?, saved))
    }

    /// The output, recomputed in the backward pass.
    pub fn recompute(&self, context: Context<'_>, saved: &NormSaved) -> Result<Tensor> {
        self.check_and_count(context, &saved.x)?;
        match context.path(&saved.x) {
            Path::Cpu => return Ok(self.forward_cpu(context, &saved.x)?.0),
            Path::Cuda => return Ok(self.forward_cuda(context, &saved.x)?.0),
            Path::Device | Path::Reference => {}
        }
        self.forward_primitives(context, &load_activation(context, &saved.x)?)
    }

    /// x (N, H D) in f32 -> y (N, H D) in f32: each of the H groups of columns is normalised with
    /// the weight (D), as the heads of queries and keys before their rotation.
    pub fn forward_groups(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, NormSaved)> {
        let (y, saved) = self.forward(context.in_f32(), &self.groups(x)?)?;
        let y = y.reshape(x.dims2()?)?;
        let x = save_activation(context, &saved.x)?;
        Ok((y, NormSaved { x }))
    }

    /// dy (N, H D) in f32 -> dx (N, H D) in f32; adds the gradients of what is trained.
    pub fn backward_groups(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &NormSaved,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let dx = self.backward(context, &self.groups(dy)?, saved, None, gradients)?;
        Ok(dx.reshape(dy.dims2()?)?)
    }

    /// x (N, H D) as (N H, D).
    fn groups(&self, x: &Tensor) -> Result<Tensor> {
        let (n, width) = x.dims2()?;
        let group = self.weight.tensor.dims1()?;
        if group == 0 || !width.is_multiple_of(group) {
            return Err(
                Error::new(Kind::Tensor, "normalised rows must hold whole groups")
                    .value(width.to_string())
                    .rule(format!("a multiple of the weight's {group} elements")),
            );
        }
        Ok(x.reshape((n * width / group, group))?)
    }

    fn check_and_count(&self, context: Context<'_>, x: &Tensor) -> Result<()> {
        let (n, c) = x.dims2()?;
        check_shape("weight", &self.weight.tensor, &[c])?;
        if let Some(bias) = &self.bias {
            check_shape("bias", &bias.tensor, &[c])?;
        }
        context.counter.add(norm_cost(self.kind, n, c));
        Ok(())
    }
    /// dy (N, C) -> dx (N, C), added to `base` if given; adds the gradients of the weight and the
    /// bias where they are trained.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &NormSaved,
        base: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let (n, c) = saved.x.dims2()?;
        check_shape("dy", dy, &[n, c])?;
        let trained = self.is_trained();
        let cost = norm_backward_cost(self.kind, n, c, trained);
        context.counter.add(cost);
        if let Some(base) = base {
            check_shape("base", base, &[n, c])?;
            context.counter.add(residual_cost(n, c));
        }
        if context.path(dy) == Path::Cpu {
            let x = CpuTensor::borrow(&saved.x)?;
            return match x.slice() {
                CpuSlice::F32(x) => self.backward_cpu(dy, x, base, gradients),
                CpuSlice::Bf16(x) => self.backward_cpu(dy, x, base, gradients),
            };
        }
        if context.path(dy) == Path::Cuda {
            let (dx, sums) = self.backward_cuda(dy, &saved.x, base)?;
            if let Some(sums) = sums {
                self.add_scaled_gradients(&sums, gradients)?;
            }
            return Ok(dx);
        }
        let x = load_activation(context, &saved.x)?;
        let (normed, s) = self.standardize(&x)?;
        if trained {
            let dweight = (dy * &normed)?.sum(0)?;
            self.add_gradients(dweight, || Ok(dy.sum(0)?), gradients)?;
        }
        let dx = self.backward_reference(dy, &normed, &s)?;
        Ok(match base {
            Some(base) => (dx + base)?,
            None => dx,
        })
    }

    /// x (N, C) -> y (N, C) in candle ops: the device pass or the reference.
    fn forward_primitives(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        match context.path(x) {
            Path::Device => self.forward_device(x),
            Path::Cpu | Path::Cuda | Path::Reference => self.forward_reference(x),
        }
    }

    fn forward_device(&self, x: &Tensor) -> Result<Tensor> {
        let (x, gain, eps) = (x.contiguous()?, self.gain()?, self.eps as f32);
        let shift = self.shift()?;
        Ok(match (self.kind, shift) {
            (NormKind::Rms, None) => candle_nn::ops::rms_norm(&x, &gain, eps)?,
            (NormKind::Rms, Some(shift)) => {
                candle_nn::ops::rms_norm(&x, &gain, eps)?.broadcast_add(&shift)?
            }
            (NormKind::Layer, shift) => {
                let shift = shift.map_or_else(|| gain.zeros_like(), Ok)?;
                candle_nn::ops::layer_norm(&x, &gain, &shift, eps)?
            }
        })
    }

    /// factor weight, or factor (1 + weight) (C).
    fn gain(&self) -> Result<Tensor> {
        if self.unit_offset {
            return Ok(self.weight.tensor.affine(self.factor, self.factor)?);
        }
        self.scaled(&self.weight)
    }

    /// factor bias (C).
    fn shift(&self) -> Result<Option<Tensor>> {
        let bias = self.bias.as_ref();
        bias.map(|bias| self.scaled(bias)).transpose()
    }

    fn scaled(&self, weight: &Weight) -> Result<Tensor> {
        if self.factor == 1.0 {
            return Ok(weight.tensor.clone());
        }
        Ok((&weight.tensor * self.factor)?)
    }

    /// x (N, C) -> (x - m) s (N, C) and s = 1 / sqrt(mean((x - m)^2) + eps) (N, 1).
    fn standardize(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let centred = match self.kind {
            NormKind::Rms => x.clone(),
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let mean = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let s = (mean + self.eps)?.sqrt()?.recip()?;
        Ok((centred.broadcast_mul(&s)?, s))
    }

    fn forward_reference(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.standardize(x)?.0.broadcast_mul(&self.gain()?)?;
        Ok(match self.shift()? {
            Some(shift) => y.broadcast_add(&shift)?,
            None => y,
        })
    }

    /// With z = (x - m) s and g = dy * gain: dx = s (g - mean(g) - z mean(g z)), without mean(g) if
    /// m = 0.
    fn backward_reference(&self, dy: &Tensor, normed: &Tensor, s: &Tensor) -> Result<Tensor> {
        let g = dy.broadcast_mul(&self.gain()?)?;
        let along = (&g * normed)?.mean_keepdim(D::Minus1)?;
        let dx = (&g - normed.broadcast_mul(&along)?)?;
        let dx = match self.kind {
            NormKind::Rms => dx,
            NormKind::Layer => dx.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?,
        };
        Ok(dx.broadcast_mul(s)?)
    }

    /// Adds the gradients of the trained ones of weight and bias, (C) each before the factor.
    fn add_gradients(
        &self,
        dweight: Tensor,
        dbias: impl FnOnce() -> Result<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.weight.is_trained() {
            gradients.add(&self.weight, (dweight * self.factor)?)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.is_trained()) {
            gradients.add(bias, (dbias()? * self.factor)?)?;
        }
        Ok(())
    }

    /// Adds the gradients (2, C) of weight and bias, where they are trained.
    fn add_scaled_gradients(&self, sums: &Tensor, gradients: &mut Gradients) -> Result<()> {
        for (at, weight) in [Some(&self.weight), self.bias.as_ref()]
            .into_iter()
            .enumerate()
        {
            if let Some(weight) = weight.filter(|weight| weight.is_trained()) {
                gradients.add(weight, sums.get(at)?)?;
            }
        }
        Ok(())
    }

    /// x (N, C) in f32, or in the compute type as saved -> y in the compute type, and x to save.
    fn forward_cpu(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, NormSaved)> {
        let shape = x.dims2()?;
        if context.precision != Precision::Bf16 {
            let write = |y: &mut [f32]| self.write_rows(x, y, &mut []);
            // SAFETY: `write_rows` writes every element.
            let y = unsafe { new_tensor(shape, write) }?;
            return Ok((y, NormSaved { x: x.clone() }));
        }
        let saved_already = x.dtype() == DType::BF16;
        let copied = if saved_already { 0 } else { x.elem_count() };
        // SAFETY: `write_rows` writes every element of both.
        let (y, copy) = unsafe {
            let mut copy: Vec<bf16> = uninit_vec(copied);
            let write = |y: &mut [bf16]| self.write_rows(x, y, &mut copy);
            (new_tensor(shape, write)?, copy)
        };
        let x = if saved_already {
            x.clone()
        } else {
            Tensor::from_vec(copy, shape, x.device())?
        };
        Ok((y, NormSaved { x }))
    }

    /// Writes y (N, C), and a bf16 copy of x to `copy` unless that is empty.
    fn write_rows<Y: Element>(&self, x: &Tensor, y: &mut [Y], copy: &mut [bf16]) -> Result<()> {
        let gain = self.gain()?;
        let shift = self.shift()?.map_or_else(|| gain.zeros_like(), Ok)?;
        let gain = CpuTensor::borrow_f32(&gain)?;
        let shift = CpuTensor::borrow_f32(&shift)?;
        let affine = [gain.f32_slice(), shift.f32_slice()];
        match CpuTensor::borrow(x)?.slice() {
            CpuSlice::F32(x) => self.normalize(x, affine, y, copy),
            CpuSlice::Bf16(x) => self.normalize(x, affine, y, copy),
        }
        Ok(())
    }

    fn normalize<X: Element, Y: Element>(
        &self,
        x: &[X],
        [gain, shift]: [&[f32]; 2],
        y: &mut [Y],
        copy: &mut [bf16],
    ) {
        let c = gain.len();
        let size = c.max(1) * ROWS_PER_TASK;
        let copies = optional_chunks(copy, size);
        let tasks = y.chunks_mut(size).zip(x.chunks(size)).zip(copies);
        par_for_each(tasks, |((y, x), copy)| {
            simd!(|_| {
                let (gain, shift) = (&gain[..c], &shift[..c]);
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                    let (y, Moments { mean, s }) = (&mut y[..c], self.moments(x));
                    for i in 0..c {
                        y[i] = Y::cast((x[i].as_f32() - mean) * s * gain[i] + shift[i]);
                    }
                }
                if let Some(copy) = copy {
                    cast_into(copy, x);
                }
            });
        });
    }

    fn backward_cpu<X: Element>(
        &self,
        dy: &Tensor,
        x: &[X],
        base: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let shape = dy.dims2()?;
        let (n, c) = shape;
        let dy = CpuTensor::borrow_f32(dy)?;
        let gain = self.gain()?;
        let gain = CpuTensor::borrow_f32(&gain)?;
        let gain = gain.f32_slice();
        let base = base.map(CpuTensor::borrow_f32).transpose()?;
        let base = base.as_ref().map(CpuTensor::f32_slice);
        // SAFETY: the loop writes every row.
        let mut dx: Vec<f32> = unsafe { uninit_vec(n * c) };
        let size = c.max(1) * ROWS_PER_TASK;
        // The gradients of weight and bias, by task.
        let width = if self.bias.is_some() { 2 * c } else { c };
        let tasks = if self.is_trained() {
            n.div_ceil(ROWS_PER_TASK)
        } else {
            0
        };
        let mut partial = vec![0.0; tasks * width];
        let partials = optional_chunks(&mut partial, width.max(1));
        let inputs = dy.f32_slice().chunks(size).zip(x.chunks(size));
        let tasks = dx.chunks_mut(size).zip(inputs).zip(partials).enumerate();
        par_for_each(tasks, |(index, ((dx, (dy, x)), mut partial))| {
            let mut g = vec![0.0; c];
            simd!(|_| {
                let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c));
                for (row, (dx, dy)) in rows.enumerate() {
                    let x = &x[row * c..][..c];
                    let base = base.map(|base| &base[index * size + row * c..][..c]);
                    let moments = self.moments(x);
                    let row = BackwardRow { dy, x, base };
                    row.gradient(self.kind, moments, gain, &mut g, dx);
                    if let Some(partial) = partial.as_deref_mut() {
                        row.add_gradients(moments, partial);
                    }
                }
            });
        });
        if self.is_trained() {
            let mut sum = vec![0.0; width];
            for partial in partial.chunks(width.max(1)) {
                sum.iter_mut().zip(partial).for_each(|(sum, x)| *sum += x);
            }
            let vector = |x: &[f32]| Ok(Tensor::from_slice(x, c, &Device::Cpu)?);
            let (dweight, dbias) = sum.split_at(c);
            self.add_gradients(vector(dweight)?, || vector(dbias), gradients)?;
        }
        f32_tensor(dx, shape)
    }

    #[inline(always)]
    fn moments<X: Element>(&self, x: &[X]) -> Moments {
        let n = x.len() as f32;
        let mean = match self.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => simd::sum_map(x, |x| x) as f32 / n,
        };
        let squares = simd::sum_map(x, |x| (x - mean) * (x - mean)) as f32;
        let s = 1.0 / (squares / n + self.eps as f32).sqrt();
        Moments { mean, s }
    }
}

/// What is subtracted from a row, and the factor of the difference: 1 / sqrt(mean square + eps).
#[derive(Clone, Copy)]
struct Moments {
    mean: f32,
    s: f32,
}

/// One row's inputs of the backward pass, C elements each.
struct BackwardRow<'a, X> {
    dy: &'a [f32],
    x: &'a [X],
    base: Option<&'a [f32]>,
}

impl<X: Element> BackwardRow<'_, X> {
    /// Writes dx; `g` is scratch.
    #[inline(always)]
    fn gradient(
        &self,
        kind: NormKind,
        Moments { mean, s }: Moments,
        gain: &[f32],
        g: &mut [f32],
        dx: &mut [f32],
    ) {
        let c = g.len();
        let (dx, dy) = (&mut dx[..c], &self.dy[..c]);
        let (x, gain) = (&self.x[..c], &gain[..c]);
        for i in 0..c {
            g[i] = dy[i] * gain[i];
        }
        let mean_g = match kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => simd::sum_map(g, |g| g) as f32 / c as f32,
        };
        let products = simd::sum_map2(g, x, |g, x: X| g * (x.as_f32() - mean));
        let along = products as f32 / c as f32 * s * s * s;
        if let Some(base) = self.base {
            let base = &base[..c];
            for i in 0..c {
                dx[i] = (g[i] - mean_g) * s - (x[i].as_f32() - mean) * along + base[i];
            }
        } else {
            for i in 0..c {
                dx[i] = (g[i] - mean_g) * s - (x[i].as_f32() - mean) * along;
            }
        }
    }

    /// Adds to the gradients of the weight (C) and, if `partial` is longer, the bias (C).
    #[inline(always)]
    fn add_gradients(&self, Moments { mean, s }: Moments, partial: &mut [f32]) {
        let c = self.dy.len();
        let (dweight, dbias) = partial.split_at_mut(c);
        let (x, dy) = (&self.x[..c], &self.dy[..c]);
        for i in 0..c {
            dweight[i] += dy[i] * ((x[i].as_f32() - mean) * s);
        }
        if !dbias.is_empty() {
            let dbias = &mut dbias[..c];
            for i in 0..c {
                dbias[i] += dy[i];
            }
        }
    }
}
