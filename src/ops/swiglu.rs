//! `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::Context;
use super::host::{Host, Stored, expect, kept, narrow_into, restored, tensor, uninitialized};
use super::product::{Number, Values};
use super::simd::{Instructions, vectorized};
use super::team::each;
use crate::error::{Error, Kind, Result};
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

/// gate, up (N, F) -> y (N, F), in the compute type where the fused pass runs: y goes into matrix products alone.
pub fn swiglu(context: Context<'_>, gate: &Tensor, up: &Tensor) -> Result<(Tensor, SwigluSaved)> {
    expect("up", up, gate.dims())?;
    context.tally.add(swiglu_cost(gate.elem_count()));
    if !context.fused(gate) {
        return Ok((
            (gate.silu()? * up)?,
            SwigluSaved {
                gate: kept(context, gate)?,
                up: kept(context, up)?,
            },
        ));
    }
    Host::open(gate)?;
    Host::open(up)?;
    let n = gate.elem_count();
    if context.precision != Precision::Bf16 {
        // SAFETY: `forward` writes every number.
        let mut y: Vec<f32> = unsafe { uninitialized(n) };
        forward(gate, up, &mut y, [&mut [], &mut []])?;
        return Ok((
            tensor(y, gate.dims2()?)?,
            SwigluSaved {
                gate: gate.clone(),
                up: up.clone(),
            },
        ));
    }
    // SAFETY: as above.
    let mut narrow: [Vec<bf16>; 3] =
        unsafe { [uninitialized(n), uninitialized(n), uninitialized(n)] };
    let [y, gate16, up16] = &mut narrow;
    forward(gate, up, y, [gate16, up16])?;
    let [y, gate16, up16] =
        narrow.map(|values| Tensor::from_vec(values, gate.shape(), &Device::Cpu));
    Ok((
        y?,
        SwigluSaved {
            gate: gate16?,
            up: up16?,
        },
    ))
}

/// The output again, in the backward pass.
pub fn swiglu_again(context: Context<'_>, saved: &SwigluSaved) -> Result<Tensor> {
    let (gate, up) = (&saved.gate, &saved.up);
    let n = gate.elem_count();
    context.tally.add(swiglu_cost(n));
    if !context.fused(gate) {
        return Ok((restored(context, gate)?.silu()? * restored(context, up)?)?);
    }
    if gate.dtype() == DType::F32 {
        // SAFETY: `forward` writes every number.
        let mut y: Vec<f32> = unsafe { uninitialized(n) };
        forward(gate, up, &mut y, [&mut [], &mut []])?;
        return tensor(y, gate.dims2()?);
    }
    // SAFETY: as above.
    let mut y: Vec<bf16> = unsafe { uninitialized(n) };
    forward(gate, up, &mut y, [&mut [], &mut []])?;
    Ok(Tensor::from_vec(y, gate.shape(), &Device::Cpu)?)
}

/// Writes y, and gate and up themselves where `copies` have room for them.
fn forward<Y: Stored>(
    gate: &Tensor,
    up: &Tensor,
    y: &mut [Y],
    copies: [&mut [bf16]; 2],
) -> Result<()> {
    let (gate, up) = (Host::open_any(gate)?, Host::open_any(up)?);
    match (gate.values(), up.values()) {
        (Values::F32(gate), Values::F32(up)) => forward_of(gate, up, y, copies),
        (Values::Bf16(gate), Values::Bf16(up)) => forward_of(gate, up, y, copies),
        _ => return Err(unlike()),
    }
    Ok(())
}

fn forward_of<X: Number, Y: Stored>(gate: &[X], up: &[X], y: &mut [Y], copies: [&mut [bf16]; 2]) {
    let [gates, ups] = copies.map(|copy| {
        copy.chunks_mut(SWEEP)
            .map(Some)
            .chain(std::iter::repeat_with(|| None))
    });
    let inputs = gate.chunks(SWEEP).zip(up.chunks(SWEEP));
    each(
        y.chunks_mut(SWEEP).zip(inputs).zip(gates.zip(ups)),
        |((y, (gate, up)), (gate16, up16))| {
            let n = y.len();
            vectorized(
                #[inline(always)]
                |cpu| {
                    let (y, gate, up) = (&mut y[..n], &gate[..n], &up[..n]);
                    for i in 0..n {
                        y[i] = Y::of(gated(cpu, gate[i].widen(), up[i].widen()));
                    }
                    if let (Some(gate16), Some(up16)) = (gate16, up16) {
                        narrow_into(gate16, gate);
                        narrow_into(up16, up);
                    }
                },
            );
        },
    );
}

/// What is said where one of two tensors is in f32 and the other in bf16.
fn unlike() -> Error {
    Error::new(Kind::Tensor, "gate and up are of one type").rule("both f32 or both bf16")
}

/// dy (N, F) -> (dgate, dup), in the compute type where the fused pass runs. With s = sigmoid(gate): dup = dy gate s,
/// dgate = dy up s (1 + gate (1 - s)).
pub fn swiglu_backward(
    context: Context<'_>,
    dy: &Tensor,
    saved: &SwigluSaved,
) -> Result<(Tensor, Tensor)> {
    let (gate, up) = (&saved.gate, &saved.up);
    expect("dy", dy, gate.dims())?;
    context.tally.add(swiglu_backward_cost(gate.elem_count()));
    if !context.fused(dy) {
        let (gate, up) = (&restored(context, gate)?, &restored(context, up)?);
        let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
        return Ok((((dy * up)? * slope)?, (dy * (gate * &s)?)?));
    }
    let (n, shape) = (gate.elem_count(), gate.dims2()?);
    if context.precision != Precision::Bf16 {
        // SAFETY: `backward` writes every number.
        let (mut dgate, mut dup): (Vec<f32>, Vec<f32>) =
            unsafe { (uninitialized(n), uninitialized(n)) };
        backward(dy, saved, &mut dgate, &mut dup)?;
        return Ok((tensor(dgate, shape)?, tensor(dup, shape)?));
    }
    // SAFETY: as above.
    let (mut dgate, mut dup): (Vec<bf16>, Vec<bf16>) =
        unsafe { (uninitialized(n), uninitialized(n)) };
    backward(dy, saved, &mut dgate, &mut dup)?;
    Ok((
        Tensor::from_vec(dgate, shape, &Device::Cpu)?,
        Tensor::from_vec(dup, shape, &Device::Cpu)?,
    ))
}

fn backward<Y: Stored>(
    dy: &Tensor,
    saved: &SwigluSaved,
    dgate: &mut [Y],
    dup: &mut [Y],
) -> Result<()> {
    let (dy, gate, up) = (
        Host::open(dy)?,
        Host::open_any(&saved.gate)?,
        Host::open_any(&saved.up)?,
    );
    match (gate.values(), up.values()) {
        (Values::F32(gate), Values::F32(up)) => backward_of(dy.slice(), gate, up, dgate, dup),
        (Values::Bf16(gate), Values::Bf16(up)) => backward_of(dy.slice(), gate, up, dgate, dup),
        _ => return Err(unlike()),
    }
    Ok(())
}

fn backward_of<X: Number, Y: Stored>(
    dy: &[f32],
    gate: &[X],
    up: &[X],
    dgate: &mut [Y],
    dup: &mut [Y],
) {
    let inputs = dy
        .chunks(SWEEP)
        .zip(gate.chunks(SWEEP))
        .zip(up.chunks(SWEEP));
    each(
        dgate
            .chunks_mut(SWEEP)
            .zip(dup.chunks_mut(SWEEP))
            .zip(inputs),
        |((dgate, dup), ((dy, gate), up))| {
            let n = dy.len();
            vectorized(
                #[inline(always)]
                |cpu| {
                    let (dgate, dup, dy, gate, up) = (
                        &mut dgate[..n],
                        &mut dup[..n],
                        &dy[..n],
                        &gate[..n],
                        &up[..n],
                    );
                    for i in 0..n {
                        let [of_gate, of_up, _] =
                            gradients(cpu, dy[i], gate[i].widen(), up[i].widen());
                        (dgate[i], dup[i]) = (Y::of(of_gate), Y::of(of_up));
                    }
                },
            );
        },
    );
}

/// Numbers of a task.
const SWEEP: usize = 2048;

/// silu(gate) up.
#[inline(always)]
pub(super) fn gated(cpu: Instructions, gate: f32, up: f32) -> f32 {
    gate * sigmoid(cpu, gate) * up
}

/// The gradients of gate and up, from that of y = silu(gate) up; and y again.
#[inline(always)]
pub(super) fn gradients(cpu: Instructions, dy: f32, gate: f32, up: f32) -> [f32; 3] {
    let s = sigmoid(cpu, gate);
    [
        dy * up * s * (1.0 + gate * (1.0 - s)),
        dy * gate * s,
        gate * s * up,
    ]
}

#[inline(always)]
fn sigmoid(cpu: Instructions, x: f32) -> f32 {
    1.0 / (1.0 + cpu.exp(-x))
}
