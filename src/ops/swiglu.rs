//! `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").

use candle_core::{Device, Tensor};
use half::bf16;

use super::Context;
use super::host::{CHUNK, Host, expect, kept, narrow_into, restored, tensor, uninitialized};
use super::product::{Number, Values};
use super::simd::{self, vectorized};
use super::team::each;
use crate::error::Result;
use crate::work::{Precision, Work};

/// What `backward` needs: gate and up (N, F), in the compute type.
#[derive(Debug, Clone)]
pub struct SwigluSaved {
    gate: Tensor,
    up: Tensor,
}

/// Work of a forward pass over n elements.
pub fn swiglu_cost(n: usize) -> Work {
    Work::sweep(12 * n, 5 * n)
}

/// Work of a backward pass over n elements.
pub fn swiglu_backward_cost(n: usize) -> Work {
    Work::sweep(20 * n, 10 * n)
}

/// gate, up (N, F) -> y (N, F).
pub fn swiglu(context: Context<'_>, gate: &Tensor, up: &Tensor) -> Result<(Tensor, SwigluSaved)> {
    expect("up", up, gate.dims())?;
    context.tally.add(swiglu_cost(gate.elem_count()));
    if !context.fused(gate) {
        return Ok(((gate.silu()? * up)?, SwigluSaved { gate: kept(context, gate)?, up: kept(context, up)? }));
    }
    let shape = gate.dims2()?;
    let (gate_host, up_host) = (Host::open(gate)?, Host::open(up)?);
    let n = gate_host.slice().len();
    let inputs = gate_host.slice().chunks(CHUNK).zip(up_host.slice().chunks(CHUNK));
    // SAFETY: the loops below write every number.
    let mut y: Vec<f32> = unsafe { uninitialized(n) };
    if context.precision != Precision::Bf16 {
        each(y.chunks_mut(CHUNK).zip(inputs), |(y, (gate, up))| {
            vectorized(
                #[inline(always)]
                || forward(y, gate, up),
            )
        });
        return Ok((tensor(y, shape)?, SwigluSaved { gate: gate.clone(), up: up.clone() }));
    }
    // SAFETY: as above.
    let (mut gate16, mut up16): (Vec<bf16>, Vec<bf16>) = unsafe { (uninitialized(n), uninitialized(n)) };
    let narrow = gate16.chunks_mut(CHUNK).zip(up16.chunks_mut(CHUNK));
    each(y.chunks_mut(CHUNK).zip(narrow).zip(inputs), |((y, (gate16, up16)), (gate, up))| {
        vectorized(
            #[inline(always)]
            || {
                forward(y, gate, up);
                narrow_into(gate16, gate);
                narrow_into(up16, up);
            },
        );
    });
    let saved = |values: Vec<bf16>| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(y, shape)?, SwigluSaved { gate: saved(gate16)?, up: saved(up16)? }))
}

#[inline(always)]
fn forward<T: Number>(y: &mut [f32], gate: &[T], up: &[T]) {
    y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| {
        let g = g.widen();
        *y = g * sigmoid(g) * u.widen();
    });
}

/// The output again, in the backward pass.
pub fn swiglu_again(context: Context<'_>, saved: &SwigluSaved) -> Result<Tensor> {
    let (gate, up) = (&saved.gate, &saved.up);
    context.tally.add(swiglu_cost(gate.elem_count()));
    if !context.fused(gate) {
        return Ok((restored(context, gate)?.silu()? * restored(context, up)?)?);
    }
    let shape = gate.dims2()?;
    let (gate, up) = (Host::open_any(gate)?, Host::open_any(up)?);
    // SAFETY: the loop below writes every number.
    let mut y: Vec<f32> = unsafe { uninitialized(shape.0 * shape.1) };
    each(y.chunks_mut(CHUNK).enumerate(), |(chunk, y)| {
        let range = chunk * CHUNK..chunk * CHUNK + y.len();
        vectorized(
            #[inline(always)]
            || match (gate.values(), up.values()) {
                (Values::F32(gate), Values::F32(up)) => forward(y, &gate[range.clone()], &up[range]),
                (Values::Bf16(gate), Values::Bf16(up)) => forward(y, &gate[range.clone()], &up[range]),
                // Both were kept in one type.
                _ => y.fill(f32::NAN),
            },
        );
    });
    tensor(y, shape)
}

/// dy (N, F) -> (dgate, dup). With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)).
pub fn swiglu_backward(context: Context<'_>, dy: &Tensor, saved: &SwigluSaved) -> Result<(Tensor, Tensor)> {
    let (gate, up) = (&saved.gate, &saved.up);
    expect("dy", dy, gate.dims())?;
    context.tally.add(swiglu_backward_cost(gate.elem_count()));
    if !context.fused(dy) {
        let (gate, up) = (&restored(context, gate)?, &restored(context, up)?);
        let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
        return Ok((((dy * up)? * slope)?, (dy * (gate * &s)?)?));
    }
    let shape = gate.dims2()?;
    let (dy, gate, up) = (Host::open(dy)?, Host::open_any(gate)?, Host::open_any(up)?);
    let n = dy.slice().len();
    // SAFETY: the loop below writes every number.
    let (mut dgate, mut dup): (Vec<f32>, Vec<f32>) = unsafe { (uninitialized(n), uninitialized(n)) };
    let outputs = dgate.chunks_mut(CHUNK).zip(dup.chunks_mut(CHUNK));
    each(outputs.zip(dy.slice().chunks(CHUNK)).enumerate(), |(chunk, ((dgate, dup), dy))| {
        let range = chunk * CHUNK..chunk * CHUNK + dy.len();
        let n = dy.len();
        let (dgate, dup) = (&mut dgate[..n], &mut dup[..n]);
        vectorized(
            #[inline(always)]
            || {
                // What was kept goes through the places of the results, in f32.
                gate.values().widen_into(range.clone(), dgate);
                up.values().widen_into(range, dup);
                for i in 0..n {
                    let (g, u, s) = (dgate[i], dup[i], sigmoid(dgate[i]));
                    dup[i] = dy[i] * g * s;
                    dgate[i] = dy[i] * u * s * (1.0 + g * (1.0 - s));
                }
            },
        );
    });
    Ok((tensor(dgate, shape)?, tensor(dup, shape)?))
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + simd::exp(-x))
}
