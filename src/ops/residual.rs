//! `x + factor y` and `factor x`, for residual branches and embeddings that are scaled.

use candle_core::Tensor;

use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{CpuTensor, ELEMENTS_PER_TASK, check_shape};
use super::{Context, Path, new_tensor};
use crate::error::Result;
use crate::work::Work;

/// Work of `add_scaled` on (n, c).
pub fn add_scaled_cost(n: usize, c: usize) -> Work {
    Work::sweep(12 * n * c, 2 * n * c)
}

/// Work of `scale` by `factor` on (n, c).
pub fn scale_cost(n: usize, c: usize, factor: f64) -> Work {
    if factor == 1.0 {
        return Work::default();
    }
    Work::sweep(8 * n * c, n * c)
}

/// x, y (N, C) in f32 -> x + factor y.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, add_scaled};
/// # use wattune::work::{Precision, WorkCounter};
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let y = Tensor::new(&[[10f32, 20.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let sum = add_scaled(Context::new(&counter, Precision::F32), &x, &y, 0.5)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[6., 12.]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
pub fn add_scaled(context: Context<'_>, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    let (n, c) = x.dims2()?;
    check_shape("y", y, &[n, c])?;
    context.counter.add(add_scaled_cost(n, c));
    if context.path(x) != Path::Cpu {
        return Ok((x + (y * factor)?)?);
    }
    zip(x, y, |x, y| x + factor as f32 * y)
}

/// x (N, C) in f32 -> factor x; x itself for a factor of 1.
pub fn scale(context: Context<'_>, x: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    let (n, c) = x.dims2()?;
    context.counter.add(scale_cost(n, c, factor));
    if context.path(x) != Path::Cpu {
        return Ok((x * factor)?);
    }
    zip(x, x, |x, _| factor as f32 * x)
}

/// `f` of the elements of x and y, of one shape, in parallel.
fn zip(x: &Tensor, y: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
    let shape = x.dims2()?;
    let x = CpuTensor::borrow_f32(x)?;
    let y = CpuTensor::borrow_f32(y)?;
    let write = |out: &mut [f32]| {
        let x = x.f32_slice().chunks(ELEMENTS_PER_TASK);
        let inputs = x.zip(y.f32_slice().chunks(ELEMENTS_PER_TASK));
        let tasks = out.chunks_mut(ELEMENTS_PER_TASK).zip(inputs);
        par_for_each(tasks, |(out, (x, y))| {
            simd!(|_| {
                let n = out.len();
                let (x, y) = (&x[..n], &y[..n]);
                for i in 0..n {
                    out[i] = f(x[i], y[i]);
                }
            });
        });
        Ok(())
    };
    // SAFETY: `write` writes every element.
    unsafe { new_tensor(shape, write) }
}
