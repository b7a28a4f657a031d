//! `y = x / sqrt(mean(x^2) + eps) * weight`, row by row (Zhang and Sennrich 2019, equation 4).

use candle_core::{D, DType, Device, Tensor};
use half::bf16;

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::{self, dispatch};
use super::storage::{
    CpuTensor, ROWS_PER_TASK, cast_into, check_shape, f32_tensor, load_activation, save_activation,
    uninit_vec,
};
use super::{Context, Gradients, Weight, residual_cost};
use crate::error::Result;
use crate::work::{Precision, Work};

/// A norm: its weight (C) and epsilon.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// (C).
    pub weight: Weight,
    /// Added to the mean square.
    pub eps: f64,
}

/// What `backward` needs: the input (N, C), in the compute type; everything else is cheaper to compute again.
#[derive(Debug, Clone)]
pub struct RmsNormSaved {
    x: Tensor,
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
    /// x (N, C) -> y (N, C), in the compute type where the fused pass runs: y goes into matrix products alone.
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, RmsNormSaved)> {
        self.count(context, x)?;
        match context.fused(x) {
            true => {
                CpuTensor::borrow_f32(x)?;
                self.forward_cpu(context, x)
            }
            false => Ok((
                self.forward_reference(x)?,
                RmsNormSaved {
                    x: save_activation(context, x)?,
                },
            )),
        }
    }

    /// The output again, in the backward pass.
    pub fn recompute(&self, context: Context<'_>, saved: &RmsNormSaved) -> Result<Tensor> {
        self.count(context, &saved.x)?;
        match context.fused(&saved.x) {
            true => Ok(self.forward_cpu(context, &saved.x)?.0),
            false => self.forward_reference(&load_activation(context, &saved.x)?),
        }
    }

    fn count(&self, context: Context<'_>, x: &Tensor) -> Result<()> {
        let (n, c) = x.dims2()?;
        check_shape("weight", &self.weight.tensor, &[c])?;
        context.counter.add(rms_norm_cost(n, c));
        Ok(())
    }

    /// dy (N, C) -> dx (N, C), added to `base` where there is one; the weight's gradient where it is trained.
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
        context
            .counter
            .add(rms_norm_backward_cost(n, c, self.weight.is_trained()));
        if let Some(base) = base {
            check_shape("base", base, &[n, c])?;
            context.counter.add(residual_cost(n, c));
        }
        if context.fused(dy) {
            return self.backward_cpu(dy, &saved.x, base, gradients);
        }
        let x = load_activation(context, &saved.x)?;
        if self.weight.is_trained() {
            let normed = x.broadcast_mul(&self.inverse_rms(&x)?)?;
            gradients.add(&self.weight, (dy * normed)?.sum(0)?)?;
        }
        let dx = self.backward_reference(dy, &x)?;
        Ok(match base {
            Some(base) => (dx + base)?,
            None => dx,
        })
    }

    /// 1 / sqrt(mean(x^2) + eps), (N, 1).
    fn inverse_rms(&self, x: &Tensor) -> Result<Tensor> {
        Ok((x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?
            .sqrt()?
            .recip()?)
    }

    fn forward_reference(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_mul(&self.inverse_rms(x)?)?
            .broadcast_mul(&self.weight.tensor)?)
    }

    /// With s = inverse rms and g = dy * weight: dx = s g - x s^3 mean(g x).
    fn backward_reference(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let s = self.inverse_rms(x)?;
        let g = dy.broadcast_mul(&self.weight.tensor)?;
        let along = ((&g * x)?.mean_keepdim(D::Minus1)? * s.powf(3.0)?)?;
        Ok((g.broadcast_mul(&s)? - x.broadcast_mul(&along)?)?)
    }

    /// x (N, C) in f32, or as it was kept -> y in the compute type, and what is kept of x.
    fn forward_cpu(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, RmsNormSaved)> {
        let shape = x.dims2()?;
        let (n, host) = (shape.0 * shape.1, CpuTensor::borrow(x)?);
        if context.precision != Precision::Bf16 {
            // SAFETY: `rows` writes every number.
            let mut y = unsafe { uninit_vec(n) };
            self.rows(host.slice(), shape.1, &mut y, &mut [])?;
            return Ok((f32_tensor(y, shape)?, RmsNormSaved { x: x.clone() }));
        }
        // SAFETY: as above, and of the copy where it is as long.
        let (mut y, mut copy): (Vec<bf16>, Vec<bf16>) = unsafe {
            (
                uninit_vec(n),
                uninit_vec(if x.dtype() == DType::BF16 { 0 } else { n }),
            )
        };
        self.rows(host.slice(), shape.1, &mut y, &mut copy)?;
        let x = if copy.is_empty() {
            x.clone()
        } else {
            Tensor::from_vec(copy, shape, x.device())?
        };
        Ok((Tensor::from_vec(y, shape, x.device())?, RmsNormSaved { x }))
    }

    /// Writes y, and x itself where `copy` has room for it.
    fn rows<Y: Element>(
        &self,
        x: CpuSlice<'_>,
        c: usize,
        y: &mut [Y],
        copy: &mut [bf16],
    ) -> Result<()> {
        match x {
            CpuSlice::F32(x) => self.rows_of(x, c, y, copy),
            CpuSlice::Bf16(x) => self.rows_of(x, c, y, copy),
        }
    }

    fn rows_of<X: Element, Y: Element>(
        &self,
        x: &[X],
        c: usize,
        y: &mut [Y],
        copy: &mut [bf16],
    ) -> Result<()> {
        let weight = CpuTensor::borrow_f32(&self.weight.tensor)?;
        let (weight, rows) = (weight.f32_slice(), c.max(1) * ROWS_PER_TASK);
        let copies = copy
            .chunks_mut(rows)
            .map(Some)
            .chain(std::iter::repeat_with(|| None));
        par_for_each(
            y.chunks_mut(rows).zip(x.chunks(rows)).zip(copies),
            |((y, x), copy)| {
                dispatch(
                    #[inline(always)]
                    |_| {
                        let weight = &weight[..c];
                        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                            let (y, s) = (&mut y[..c], self.inverse_rms_of(x));
                            for i in 0..c {
                                y[i] = Y::cast(x[i].as_f32() * s * weight[i]);
                            }
                        }
                        if let Some(copy) = copy {
                            cast_into(copy, x);
                        }
                    },
                );
            },
        );
        Ok(())
    }

    fn backward_cpu(
        &self,
        dy: &Tensor,
        x: &Tensor,
        base: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let host = CpuTensor::borrow(x)?;
        match host.slice() {
            CpuSlice::F32(values) => self.backward_of(dy, values, x.dims2()?, base, gradients),
            CpuSlice::Bf16(values) => self.backward_of(dy, values, x.dims2()?, base, gradients),
        }
    }

    fn backward_of<X: Element>(
        &self,
        dy: &Tensor,
        x: &[X],
        (n, c): (usize, usize),
        base: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let (dy, weight) = (
            CpuTensor::borrow_f32(dy)?,
            CpuTensor::borrow_f32(&self.weight.tensor)?,
        );
        let (dy, weight) = (dy.f32_slice(), weight.f32_slice());
        let base = base.map(CpuTensor::borrow_f32).transpose()?;
        // SAFETY: the loop writes every row, from `base` where there is one.
        let mut dx: Vec<f32> = unsafe { uninit_vec(n * c) };
        let rows = c.max(1) * ROWS_PER_TASK;
        // What each task adds to a trained weight's gradient.
        let mut sums = vec![
            0.0;
            if self.weight.is_trained() {
                n.div_ceil(ROWS_PER_TASK) * c
            } else {
                0
            }
        ];
        let own = sums
            .chunks_mut(c.max(1))
            .map(Some)
            .chain(std::iter::repeat_with(|| None));
        par_for_each(
            dx.chunks_mut(rows)
                .zip(dy.chunks(rows))
                .zip(x.chunks(rows))
                .zip(own)
                .enumerate(),
            |(index, (((dx, dy), x), mut own))| {
                let mut g = vec![0.0; c];
                dispatch(
                    #[inline(always)]
                    |_| {
                        let (g, weight) = (&mut g[..c], &weight[..c]);
                        for (row, (dx, dy)) in
                            dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).enumerate()
                        {
                            let (dx, dy, x) = (&mut dx[..c], &dy[..c], &x[row * c..][..c]);
                            let s = self.inverse_rms_of(x);
                            for i in 0..c {
                                g[i] = dy[i] * weight[i];
                            }
                            if let Some(own) = &mut own {
                                let own = &mut own[..c];
                                for i in 0..c {
                                    own[i] += dy[i] * (x[i].as_f32() * s);
                                }
                            }
                            let along = simd::dot(g, x) as f32 / c as f32 * s * s * s;
                            match &base {
                                Some(base) => {
                                    let base = &base.f32_slice()[index * rows + row * c..][..c];
                                    for i in 0..c {
                                        dx[i] = g[i] * s - x[i].as_f32() * along + base[i];
                                    }
                                }
                                None => {
                                    for i in 0..c {
                                        dx[i] = g[i] * s - x[i].as_f32() * along;
                                    }
                                }
                            }
                        }
                    },
                );
            },
        );
        if self.weight.is_trained() {
            let mut sum = vec![0.0; c];
            sums.chunks(c.max(1))
                .for_each(|own| sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own));
            gradients.add(&self.weight, Tensor::from_vec(sum, c, &Device::Cpu)?)?;
        }
        f32_tensor(dx, (n, c))
    }

    #[inline(always)]
    fn inverse_rms_of<X: Element>(&self, x: &[X]) -> f32 {
        1.0 / (simd::sum_of_squares(x) as f32 / x.len() as f32 + self.eps as f32).sqrt()
    }
}
