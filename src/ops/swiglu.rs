//! `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").

use candle_core::Tensor;
use rayon::prelude::*;

use super::Context;
use super::host::{Host, expect, tensor};
use super::simd::{self, vectorized};
use crate::error::Result;
use crate::work::Work;

/// Elements a parallel task takes.
const CHUNK: usize = 16 * 1024;

/// Work of a forward pass over n elements.
pub fn swiglu_cost(n: usize) -> Work {
    Work::sweep(12 * n, 5 * n)
}

/// Work of a backward pass over n elements.
pub fn swiglu_backward_cost(n: usize) -> Work {
    Work::sweep(20 * n, 10 * n)
}

/// gate, up (N, F) -> y (N, F).
pub fn swiglu(context: Context<'_>, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    expect("up", up, gate.dims())?;
    context.tally.add(swiglu_cost(gate.elem_count()));
    if !context.fused(gate) {
        return Ok((gate.silu()? * up)?);
    }
    let shape = gate.dims2()?;
    let (gate, up) = (Host::open(gate)?, Host::open(up)?);
    let (gate, up) = (gate.slice(), up.slice());
    let mut y = vec![0.0; gate.len()];
    y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(|((y, gate), up)| {
        vectorized(|| y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = g * sigmoid(*g) * u));
    });
    tensor(y, shape)
}

/// dy (N, F) -> (dgate, dup). With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)).
pub fn swiglu_backward(context: Context<'_>, dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    expect("up", up, gate.dims())?;
    expect("dy", dy, gate.dims())?;
    context.tally.add(swiglu_backward_cost(gate.elem_count()));
    if !context.fused(gate) {
        let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let dup = (dy * (gate * &s)?)?;
        let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
        return Ok((((dy * up)? * slope)?, dup));
    }
    let shape = gate.dims2()?;
    let (dy, gate, up) = (Host::open(dy)?, Host::open(gate)?, Host::open(up)?);
    let (dy, gate, up) = (dy.slice(), gate.slice(), up.slice());
    let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
    let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
    let inputs = dy.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    outputs.zip(inputs).for_each(|((dgate, dup), ((dy, gate), up))| {
        let n = dy.len();
        let (dgate, dup, gate, up) = (&mut dgate[..n], &mut dup[..n], &gate[..n], &up[..n]);
        vectorized(|| {
            for i in 0..n {
                let (g, s) = (gate[i], sigmoid(gate[i]));
                dup[i] = dy[i] * g * s;
                dgate[i] = dy[i] * up[i] * s * (1.0 + g * (1.0 - s));
            }
        });
    });
    Ok((tensor(dgate, shape)?, tensor(dup, shape)?))
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + simd::exp(-x))
}
