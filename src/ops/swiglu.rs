//! `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::Context;
use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::{Simd, dispatch};
use super::storage::{
    CpuTensor, cast_into, check_shape, f32_tensor, load_activation, save_activation, uninit_vec,
};
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
    check_shape("up", up, gate.dims())?;
    context.counter.add(swiglu_cost(gate.elem_count()));
    if !context.fused(gate) {
        return Ok((
            (gate.silu()? * up)?,
            SwigluSaved {
                gate: save_activation(context, gate)?,
                up: save_activation(context, up)?,
            },
        ));
    }
    CpuTensor::borrow_f32(gate)?;
    CpuTensor::borrow_f32(up)?;
    let n = gate.elem_count();
    if context.precision != Precision::Bf16 {
        // SAFETY: `forward` writes every number.
        let mut y: Vec<f32> = unsafe { uninit_vec(n) };
        forward(gate, up, &mut y, [&mut [], &mut []])?;
        return Ok((
            f32_tensor(y, gate.dims2()?)?,
            SwigluSaved {
                gate: gate.clone(),
                up: up.clone(),
            },
        ));
    }
    // SAFETY: as above.
    let mut narrow: [Vec<bf16>; 3] = unsafe { [uninit_vec(n), uninit_vec(n), uninit_vec(n)] };
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
pub fn swiglu_recompute(context: Context<'_>, saved: &SwigluSaved) -> Result<Tensor> {
    let (gate, up) = (&saved.gate, &saved.up);
    let n = gate.elem_count();
    context.counter.add(swiglu_cost(n));
    if !context.fused(gate) {
        return Ok((load_activation(context, gate)?.silu()? * load_activation(context, up)?)?);
    }
    if gate.dtype() == DType::F32 {
        // SAFETY: `forward` writes every number.
        let mut y: Vec<f32> = unsafe { uninit_vec(n) };
        forward(gate, up, &mut y, [&mut [], &mut []])?;
        return f32_tensor(y, gate.dims2()?);
    }
    // SAFETY: as above.
    let mut y: Vec<bf16> = unsafe { uninit_vec(n) };
    forward(gate, up, &mut y, [&mut [], &mut []])?;
    Ok(Tensor::from_vec(y, gate.shape(), &Device::Cpu)?)
}

/// Writes y, and gate and up themselves where `copies` have room for them.
fn forward<Y: Element>(
    gate: &Tensor,
    up: &Tensor,
    y: &mut [Y],
    copies: [&mut [bf16]; 2],
) -> Result<()> {
    let (gate, up) = (CpuTensor::borrow(gate)?, CpuTensor::borrow(up)?);
    match (gate.slice(), up.slice()) {
        (CpuSlice::F32(gate), CpuSlice::F32(up)) => forward_of(gate, up, y, copies),
        (CpuSlice::Bf16(gate), CpuSlice::Bf16(up)) => forward_of(gate, up, y, copies),
        _ => return Err(unlike()),
    }
    Ok(())
}

fn forward_of<X: Element, Y: Element>(gate: &[X], up: &[X], y: &mut [Y], copies: [&mut [bf16]; 2]) {
    let [gates, ups] = copies.map(|copy| {
        copy.chunks_mut(SWEEP)
            .map(Some)
            .chain(std::iter::repeat_with(|| None))
    });
    let inputs = gate.chunks(SWEEP).zip(up.chunks(SWEEP));
    par_for_each(
        y.chunks_mut(SWEEP).zip(inputs).zip(gates.zip(ups)),
        |((y, (gate, up)), (gate16, up16))| {
            let n = y.len();
            dispatch(
                #[inline(always)]
                |cpu| {
                    let (y, gate, up) = (&mut y[..n], &gate[..n], &up[..n]);
                    for i in 0..n {
                        y[i] = Y::cast(swiglu_element(cpu, gate[i].as_f32(), up[i].as_f32()));
                    }
                    if let (Some(gate16), Some(up16)) = (gate16, up16) {
                        cast_into(gate16, gate);
                        cast_into(up16, up);
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
    check_shape("dy", dy, gate.dims())?;
    context.counter.add(swiglu_backward_cost(gate.elem_count()));
    if !context.fused(dy) {
        let (gate, up) = (
            &load_activation(context, gate)?,
            &load_activation(context, up)?,
        );
        let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
        let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
        return Ok((((dy * up)? * slope)?, (dy * (gate * &s)?)?));
    }
    let (n, shape) = (gate.elem_count(), gate.dims2()?);
    if context.precision != Precision::Bf16 {
        // SAFETY: `backward` writes every number.
        let (mut dgate, mut dup): (Vec<f32>, Vec<f32>) = unsafe { (uninit_vec(n), uninit_vec(n)) };
        backward(dy, saved, &mut dgate, &mut dup)?;
        return Ok((f32_tensor(dgate, shape)?, f32_tensor(dup, shape)?));
    }
    // SAFETY: as above.
    let (mut dgate, mut dup): (Vec<bf16>, Vec<bf16>) = unsafe { (uninit_vec(n), uninit_vec(n)) };
    backward(dy, saved, &mut dgate, &mut dup)?;
    Ok((
        Tensor::from_vec(dgate, shape, &Device::Cpu)?,
        Tensor::from_vec(dup, shape, &Device::Cpu)?,
    ))
}

fn backward<Y: Element>(
    dy: &Tensor,
    saved: &SwigluSaved,
    dgate: &mut [Y],
    dup: &mut [Y],
) -> Result<()> {
    let (dy, gate, up) = (
        CpuTensor::borrow_f32(dy)?,
        CpuTensor::borrow(&saved.gate)?,
        CpuTensor::borrow(&saved.up)?,
    );
    match (gate.slice(), up.slice()) {
        (CpuSlice::F32(gate), CpuSlice::F32(up)) => {
            backward_of(dy.f32_slice(), gate, up, dgate, dup)
        }
        (CpuSlice::Bf16(gate), CpuSlice::Bf16(up)) => {
            backward_of(dy.f32_slice(), gate, up, dgate, dup)
        }
        _ => return Err(unlike()),
    }
    Ok(())
}

fn backward_of<X: Element, Y: Element>(
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
    par_for_each(
        dgate
            .chunks_mut(SWEEP)
            .zip(dup.chunks_mut(SWEEP))
            .zip(inputs),
        |((dgate, dup), ((dy, gate), up))| {
            let n = dy.len();
            dispatch(
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
                            gradients(cpu, dy[i], gate[i].as_f32(), up[i].as_f32());
                        (dgate[i], dup[i]) = (Y::cast(of_gate), Y::cast(of_up));
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
pub(super) fn swiglu_element(cpu: Simd, gate: f32, up: f32) -> f32 {
    gate * sigmoid(cpu, gate) * up
}

/// The gradients of gate and up, from that of y = silu(gate) up; and y again.
#[inline(always)]
pub(super) fn gradients(cpu: Simd, dy: f32, gate: f32, up: f32) -> [f32; 3] {
    let s = sigmoid(cpu, gate);
    [
        dy * up * s * (1.0 + gate * (1.0 - s)),
        dy * gate * s,
        gate * s * up,
    ]
}

#[inline(always)]
fn sigmoid(cpu: Simd, x: f32) -> f32 {
    1.0 / (1.0 + cpu.exp(-x))
}
