//! `y = a + b`: the residual stream's additions and LoRA's.

use candle_core::Tensor;
use rayon::prelude::*;

use super::Context;
use super::host::{Host, tensor};
use crate::error::Result;
use crate::work::Work;

/// Elements a parallel task takes.
const CHUNK: usize = 16 * 1024;

/// Work of adding two (n, c).
pub fn residual_cost(n: usize, c: usize) -> Work {
    Work::sweep(12 * n * c, n * c)
}

/// a + b, both (N, C).
pub fn residual(context: Context<'_>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (n, c) = a.dims2()?;
    context.tally.add(residual_cost(n, c));
    add(context, a, b)
}

/// a + b; the caller counts it.
pub(super) fn add(context: Context<'_>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    super::host::expect("b", b, a.dims())?;
    if !context.fused(a) || !a.is_contiguous() || !b.is_contiguous() {
        return Ok((a + b)?);
    }
    let shape = a.dims2()?;
    let (a, b) = (Host::open(a)?, Host::open(b)?);
    let (a, b) = (a.slice(), b.slice());
    let mut y = vec![0.0; a.len()];
    y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((y, a), b)| {
        y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b);
    });
    tensor(y, shape)
}
