//! `y = x / sqrt(mean(x^2) + eps) * factor weight`, row by row (Zhang and Sennrich 2019, equation 4).

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

/// A norm: its weight (C) and epsilon.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, RmsNorm, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// let weight = Weight::frozen(Tensor::new(&[1f32, 10.], &Device::Cpu)?);
/// let norm = RmsNorm { weight, eps: 0., factor: 1. };
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?; // rms = sqrt((1 + 49) / 2) = 5
/// let counter = WorkCounter::default();
/// let (y, _) = norm.forward(Context::new(&counter, Precision::F32), &x)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 14.]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// (C).
    pub weight: Weight,
    /// Added to the mean square.
    pub eps: f64,
    /// Factor of the result: 1, except where logits are scaled through the last norm.
    pub factor: f64,
}

/// Input of `backward`: x (N, C) in the compute type; the rest is cheaper to recompute.
#[derive(Debug, Clone)]
pub struct RmsNormSaved {
    x: Tensor,
}

impl RmsNormSaved {
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

/// Work of a forward pass over (n, c).
pub fn rms_norm_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 4 * n * c)
}

/// Work of a backward pass over (n, c).
pub fn rms_norm_backward_cost(n: usize, c: usize, trained: bool) -> Work {
    let extra = if trained { 2 * n * c } else { 0 };
    Work::sweep(12 * n * c, 8 * n * c + extra)
}

impl RmsNorm {
    /// x (N, C) -> y (N, C); on the CPU in the compute type, because the next op is a GEMM.
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, RmsNormSaved)> {
        self.check_and_count(context, x)?;
        if context.path(x) == Path::Cpu {
            CpuTensor::borrow_f32(x)?;
            return self.forward_cpu(context, x);
        }
        let saved = RmsNormSaved {
            x: save_activation(context, x)?,
        };
        Ok((self.forward_primitives(context, x)?, saved))
    }

    /// The output, recomputed in the backward pass.
    pub fn recompute(&self, context: Context<'_>, saved: &RmsNormSaved) -> Result<Tensor> {
        self.check_and_count(context, &saved.x)?;
        if context.path(&saved.x) == Path::Cpu {
            return Ok(self.forward_cpu(context, &saved.x)?.0);
        }
        self.forward_primitives(context, &load_activation(context, &saved.x)?)
    }

    /// x (N, H D) in f32 -> y (N, H D) in f32: each of the H groups of columns is normalised with
    /// the weight (D), as the heads of queries and keys before their rotation.
    pub fn forward_groups(
        &self,
        context: Context<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, RmsNormSaved)> {
        let (y, saved) = self.forward(context.in_f32(), &self.groups(x)?)?;
        let y = y.reshape(x.dims2()?)?;
        let x = save_activation(context, &saved.x)?;
        Ok((y, RmsNormSaved { x }))
    }

    /// dy (N, H D) in f32 -> dx (N, H D) in f32; adds the weight's gradient where it is trained.
    pub fn backward_groups(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &RmsNormSaved,
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
        context.counter.add(rms_norm_cost(n, c));
        Ok(())
    }

    /// dy (N, C) -> dx (N, C), added to `base` if given; adds the weight's gradient where it is
    /// trained.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &RmsNormSaved,
        base: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let (n, c) = saved.x.dims2()?;
        check_shape("dy", dy, &[n, c])?;
        let trained = self.weight.is_trained();
        context.counter.add(rms_norm_backward_cost(n, c, trained));
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
        let x = load_activation(context, &saved.x)?;
        if trained {
            let normed = (x.broadcast_mul(&self.inverse_rms(&x)?)? * self.factor)?;
            gradients.add(&self.weight, (dy * normed)?.sum(0)?)?;
        }
        let dx = self.backward_reference(dy, &x)?;
        Ok(match base {
            Some(base) => (dx + base)?,
            None => dx,
        })
    }

    /// x (N, C) -> y (N, C) in candle ops: the device pass or the reference.
    fn forward_primitives(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        match context.path(x) {
            Path::Device => self.forward_device(x),
            Path::Cpu | Path::Reference => self.forward_reference(x),
        }
    }

    fn forward_device(&self, x: &Tensor) -> Result<Tensor> {
        let eps = self.eps as f32;
        Ok(candle_nn::ops::rms_norm(
            &x.contiguous()?,
            &self.gain()?,
            eps,
        )?)
    }

    /// factor weight (C).
    fn gain(&self) -> Result<Tensor> {
        if self.factor == 1.0 {
            return Ok(self.weight.tensor.clone());
        }
        Ok((&self.weight.tensor * self.factor)?)
    }

    /// 1 / sqrt(mean(x^2) + eps), (N, 1).
    fn inverse_rms(&self, x: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        Ok((mean + self.eps)?.sqrt()?.recip()?)
    }

    fn forward_reference(&self, x: &Tensor) -> Result<Tensor> {
        let normed = x.broadcast_mul(&self.inverse_rms(x)?)?;
        Ok(normed.broadcast_mul(&self.gain()?)?)
    }

    /// With s = inverse rms and g = dy * gain: dx = s g - x s^3 mean(g x).
    fn backward_reference(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let s = self.inverse_rms(x)?;
        let g = dy.broadcast_mul(&self.gain()?)?;
        let along = ((&g * x)?.mean_keepdim(D::Minus1)? * s.powf(3.0)?)?;
        Ok((g.broadcast_mul(&s)? - x.broadcast_mul(&along)?)?)
    }

    /// x (N, C) in f32, or in the compute type as saved -> y in the compute type, and x to save.
    fn forward_cpu(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, RmsNormSaved)> {
        let shape = x.dims2()?;
        if context.precision != Precision::Bf16 {
            let write = |y: &mut [f32]| self.write_rows(x, y, &mut []);
            // SAFETY: `write_rows` writes every element.
            let y = unsafe { new_tensor(shape, write) }?;
            return Ok((y, RmsNormSaved { x: x.clone() }));
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
        Ok((y, RmsNormSaved { x }))
    }

    /// Writes y (N, C), and a bf16 copy of x to `copy` unless that is empty.
    fn write_rows<Y: Element>(&self, x: &Tensor, y: &mut [Y], copy: &mut [bf16]) -> Result<()> {
        let gain = self.gain()?;
        let weight = CpuTensor::borrow_f32(&gain)?;
        match CpuTensor::borrow(x)?.slice() {
            CpuSlice::F32(x) => self.normalize(x, weight.f32_slice(), y, copy),
            CpuSlice::Bf16(x) => self.normalize(x, weight.f32_slice(), y, copy),
        }
        Ok(())
    }

    fn normalize<X: Element, Y: Element>(
        &self,
        x: &[X],
        weight: &[f32],
        y: &mut [Y],
        copy: &mut [bf16],
    ) {
        let c = weight.len();
        let size = c.max(1) * ROWS_PER_TASK;
        let copies = optional_chunks(copy, size);
        let tasks = y.chunks_mut(size).zip(x.chunks(size)).zip(copies);
        par_for_each(tasks, |((y, x), copy)| {
            simd!(|_| {
                let weight = &weight[..c];
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                    let (y, s) = (&mut y[..c], self.row_inverse_rms(x));
                    for i in 0..c {
                        y[i] = Y::cast(x[i].as_f32() * s * weight[i]);
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
        let weight = CpuTensor::borrow_f32(&gain)?;
        let weight = weight.f32_slice();
        let base = base.map(CpuTensor::borrow_f32).transpose()?;
        let base = base.as_ref().map(CpuTensor::f32_slice);
        // SAFETY: the loop writes every row.
        let mut dx: Vec<f32> = unsafe { uninit_vec(n * c) };
        let size = c.max(1) * ROWS_PER_TASK;
        // The weight's gradient, by task.
        let tasks = if self.weight.is_trained() {
            n.div_ceil(ROWS_PER_TASK)
        } else {
            0
        };
        let mut partial = vec![0.0; tasks * c];
        let partials = optional_chunks(&mut partial, c.max(1));
        let inputs = dy.f32_slice().chunks(size).zip(x.chunks(size));
        let tasks = dx.chunks_mut(size).zip(inputs).zip(partials).enumerate();
        par_for_each(tasks, |(index, ((dx, (dy, x)), mut dweight))| {
            let mut g = vec![0.0; c];
            simd!(|_| {
                let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c));
                for (row, (dx, dy)) in rows.enumerate() {
                    let row = BackwardRow {
                        dy,
                        x: &x[row * c..][..c],
                        weight,
                        base: base.map(|base| &base[index * size + row * c..][..c]),
                    };
                    row.run(
                        self.row_inverse_rms(row.x),
                        &mut g,
                        dx,
                        dweight.as_deref_mut(),
                    );
                }
            });
        });
        if self.weight.is_trained() {
            let mut sum = vec![0.0; c];
            for partial in partial.chunks(c.max(1)) {
                sum.iter_mut().zip(partial).for_each(|(sum, x)| *sum += x);
            }
            sum.iter_mut().for_each(|sum| *sum *= self.factor as f32);
            gradients.add(&self.weight, Tensor::from_vec(sum, c, &Device::Cpu)?)?;
        }
        f32_tensor(dx, shape)
    }

    #[inline(always)]
    fn row_inverse_rms<X: Element>(&self, x: &[X]) -> f32 {
        1.0 / (simd::sum_of_squares(x) as f32 / x.len() as f32 + self.eps as f32).sqrt()
    }
}

/// One row's inputs of the backward pass, C elements each.
struct BackwardRow<'a, X> {
    dy: &'a [f32],
    x: &'a [X],
    weight: &'a [f32],
    base: Option<&'a [f32]>,
}

impl<X: Element> BackwardRow<'_, X> {
    /// Writes dx, and adds to the weight's gradient if given; `s` is the inverse rms of x, `g`
    /// scratch.
    #[inline(always)]
    fn run(&self, s: f32, g: &mut [f32], dx: &mut [f32], dweight: Option<&mut [f32]>) {
        let c = g.len();
        let (dx, dy) = (&mut dx[..c], &self.dy[..c]);
        let (x, weight) = (&self.x[..c], &self.weight[..c]);
        for i in 0..c {
            g[i] = dy[i] * weight[i];
        }
        if let Some(dweight) = dweight {
            let dweight = &mut dweight[..c];
            for i in 0..c {
                dweight[i] += dy[i] * (x[i].as_f32() * s);
            }
        }
        let along = simd::dot(g, x) as f32 / c as f32 * s * s * s;
        if let Some(base) = self.base {
            let base = &base[..c];
            for i in 0..c {
                dx[i] = g[i] * s - x[i].as_f32() * along + base[i];
            }
        } else {
            for i in 0..c {
                dx[i] = g[i] * s - x[i].as_f32() * along;
            }
        }
    }
}
