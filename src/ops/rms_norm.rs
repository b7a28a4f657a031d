//! `y = x / sqrt(mean(x^2) + eps) * weight`, row by row (Zhang and Sennrich 2019, equation 4).

use candle_core::{D, Tensor};

use super::host::{Host, ROWS_PER_TASK, expect, kept, restored, tensor, uninitialized};
use super::residual::residual_cost;
use super::simd::{self, vectorized};
use super::team::each;
use super::{Context, Gradients, Weight};
use crate::error::Result;
use crate::work::Work;

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
    /// x (N, C) -> y (N, C).
    pub fn forward(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, RmsNormSaved)> {
        Ok((self.output(context, x)?, RmsNormSaved { x: kept(context, x)? }))
    }

    /// The output again, in the backward pass.
    pub fn again(&self, context: Context<'_>, saved: &RmsNormSaved) -> Result<Tensor> {
        self.output(context, &restored(context, &saved.x)?)
    }

    fn output(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        expect("weight", &self.weight.tensor, &[c])?;
        context.tally.add(rms_norm_cost(n, c));
        if context.fused(x) { self.forward_cpu(x) } else { self.forward_reference(x) }
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
        expect("dy", dy, &[n, c])?;
        context.tally.add(rms_norm_backward_cost(n, c, self.weight.is_trained()));
        if let Some(base) = base {
            expect("base", base, &[n, c])?;
            context.tally.add(residual_cost(n, c));
        }
        let x = restored(context, &saved.x)?;
        if self.weight.is_trained() {
            let normed = x.broadcast_mul(&self.inverse_rms(&x)?)?;
            gradients.add(&self.weight, (dy * normed)?.sum(0)?)?;
        }
        if context.fused(dy) {
            return self.backward_cpu(dy, &x, base);
        }
        let dx = self.backward_reference(dy, &x)?;
        Ok(match base {
            Some(base) => (dx + base)?,
            None => dx,
        })
    }

    /// 1 / sqrt(mean(x^2) + eps), (N, 1).
    fn inverse_rms(&self, x: &Tensor) -> Result<Tensor> {
        Ok((x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?)
    }

    fn forward_reference(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_mul(&self.inverse_rms(x)?)?.broadcast_mul(&self.weight.tensor)?)
    }

    /// With s = inverse rms and g = dy * weight: dx = s g - x s^3 mean(g x).
    fn backward_reference(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        let s = self.inverse_rms(x)?;
        let g = dy.broadcast_mul(&self.weight.tensor)?;
        let along = ((&g * x)?.mean_keepdim(D::Minus1)? * s.powf(3.0)?)?;
        Ok((g.broadcast_mul(&s)? - x.broadcast_mul(&along)?)?)
    }

    fn forward_cpu(&self, x: &Tensor) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let (x, weight) = (Host::open(x)?, Host::open(&self.weight.tensor)?);
        let (x, weight) = (x.slice(), weight.slice());
        // SAFETY: the loop writes every row.
        let mut y = unsafe { uninitialized(n * c) };
        let rows = c.max(1) * ROWS_PER_TASK;
        each(y.chunks_mut(rows).zip(x.chunks(rows)), |(y, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                        let s = self.inverse_rms_of(x);
                        y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * s * w);
                    }
                },
            );
        });
        tensor(y, (n, c))
    }

    fn backward_cpu(&self, dy: &Tensor, x: &Tensor, base: Option<&Tensor>) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        let (dy, x, weight) = (Host::open(dy)?, Host::open(x)?, Host::open(&self.weight.tensor)?);
        let (dy, x, weight) = (dy.slice(), x.slice(), weight.slice());
        let base = base.map(Host::open).transpose()?;
        // SAFETY: the loop writes every row, from `base` where there is one.
        let mut dx: Vec<f32> = unsafe { uninitialized(n * c) };
        let rows = c.max(1) * ROWS_PER_TASK;
        each(dx.chunks_mut(rows).zip(dy.chunks(rows)).zip(x.chunks(rows)).enumerate(), |(index, ((dx, dy), x))| {
            vectorized(
                #[inline(always)]
                || {
                    for (row, ((dx, dy), x)) in dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c)).enumerate()
                    {
                        let s = self.inverse_rms_of(x);
                        let gx = simd::sum(c, |i| dy[i] * weight[i] * x[i]) as f32;
                        let along = gx / c as f32 * s * s * s;
                        dx.iter_mut().zip(dy).zip(weight).zip(x).for_each(|(((dx, dy), w), x)| *dx = dy * w * s - x * along);
                        if let Some(base) = &base {
                            let base = &base.slice()[index * rows + row * c..][..c];
                            dx.iter_mut().zip(base).for_each(|(dx, base)| *dx += base);
                        }
                    }
                },
            );
        });
        tensor(dx, (n, c))
    }

    #[inline(always)]
    fn inverse_rms_of(&self, x: &[f32]) -> f32 {
        1.0 / (simd::dot(x, x) / x.len() as f32 + self.eps as f32).sqrt()
    }
}
