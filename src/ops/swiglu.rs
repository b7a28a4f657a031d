//! `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").

use candle_core::{DType, Device, Tensor, WithDType};
use half::bf16;

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::{Simd, simd};
use super::storage::{
    CpuTensor, cast_into, check_shape, load_activation, save_activation, uninit_vec,
};
use super::{Context, Path, new_tensor, optional_chunks};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Elements of a task.
const ELEMENTS: usize = 2048;

/// Input of `backward`: gate and up (N, F), in the compute type.
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

/// gate, up (N, F) -> y (N, F); on the CPU in the compute type, because the next op is a GEMM.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, swiglu};
/// # use wattune::work::{Precision, WorkCounter};
/// let gate = Tensor::new(&[[0f32, 1., 100.]], &Device::Cpu)?;
/// let up = Tensor::new(&[[5f32, 2., 2.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let (y, _) = swiglu(Context::new(&counter, Precision::F32), &gate, &up)?;
/// let y = y.to_vec2::<f32>()?; // silu(1) = 1 / (1 + 1 / e) = 0.73106
/// assert!(y[0][0] == 0. && (y[0][1] - 1.46212).abs() < 1e-5 && y[0][2] == 200.);
/// # Ok::<(), wattune::error::Error>(())
/// ```
pub fn swiglu(context: Context<'_>, gate: &Tensor, up: &Tensor) -> Result<(Tensor, SwigluSaved)> {
    check_shape("up", up, gate.dims())?;
    context.counter.add(swiglu_cost(gate.elem_count()));
    if context.path(gate) != Path::Cpu {
        let saved = SwigluSaved {
            gate: save_activation(context, gate)?,
            up: save_activation(context, up)?,
        };
        return Ok((forward_reference(gate, up)?, saved));
    }
    CpuTensor::borrow_f32(gate)?;
    CpuTensor::borrow_f32(up)?;
    let shape = gate.dims2()?;
    if context.precision != Precision::Bf16 {
        let write = |y: &mut [f32]| forward_cpu(gate, up, y, [&mut [], &mut []]);
        // SAFETY: `forward_cpu` writes every element.
        let y = unsafe { new_tensor(shape, write) }?;
        let (gate, up) = (gate.clone(), up.clone());
        return Ok((y, SwigluSaved { gate, up }));
    }
    let n = gate.elem_count();
    // SAFETY: `forward_cpu` writes every element of all three.
    let (y, gate16, up16) = unsafe {
        let (mut gate16, mut up16): (Vec<bf16>, Vec<bf16>) = (uninit_vec(n), uninit_vec(n));
        let write = |y: &mut [bf16]| forward_cpu(gate, up, y, [&mut gate16, &mut up16]);
        (new_tensor(shape, write)?, gate16, up16)
    };
    let saved = SwigluSaved {
        gate: Tensor::from_vec(gate16, shape, gate.device())?,
        up: Tensor::from_vec(up16, shape, gate.device())?,
    };
    Ok((y, saved))
}

/// The output, recomputed in the backward pass.
pub fn swiglu_recompute(context: Context<'_>, saved: &SwigluSaved) -> Result<Tensor> {
    let SwigluSaved { gate, up } = saved;
    context.counter.add(swiglu_cost(gate.elem_count()));
    if context.path(gate) != Path::Cpu {
        let gate = load_activation(context, gate)?;
        return forward_reference(&gate, &load_activation(context, up)?);
    }
    let shape = gate.dims2()?;
    // SAFETY: `forward_cpu` writes every element.
    unsafe {
        match gate.dtype() {
            DType::F32 => new_tensor(shape, |y: &mut [f32]| {
                forward_cpu(gate, up, y, [&mut [], &mut []])
            }),
            _ => new_tensor(shape, |y: &mut [bf16]| {
                forward_cpu(gate, up, y, [&mut [], &mut []])
            }),
        }
    }
}

/// Also the device path: `silu` is one kernel.
fn forward_reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((gate.silu()? * up)?)
}

/// Writes y, and bf16 copies of gate and up to `copies` unless those are empty.
fn forward_cpu<Y: Element>(
    gate: &Tensor,
    up: &Tensor,
    y: &mut [Y],
    copies: [&mut [bf16]; 2],
) -> Result<()> {
    let gate = CpuTensor::borrow(gate)?;
    let up = CpuTensor::borrow(up)?;
    match (gate.slice(), up.slice()) {
        (CpuSlice::F32(gate), CpuSlice::F32(up)) => forward_elements(gate, up, y, copies),
        (CpuSlice::Bf16(gate), CpuSlice::Bf16(up)) => forward_elements(gate, up, y, copies),
        _ => return Err(mixed_dtypes()),
    }
    Ok(())
}

fn forward_elements<X: Element, Y: Element>(
    gate: &[X],
    up: &[X],
    y: &mut [Y],
    copies: [&mut [bf16]; 2],
) {
    let [gate_copies, up_copies] = copies.map(|copy| optional_chunks(copy, ELEMENTS));
    let inputs = gate.chunks(ELEMENTS).zip(up.chunks(ELEMENTS));
    let tasks = y.chunks_mut(ELEMENTS).zip(inputs);
    let tasks = tasks.zip(gate_copies.zip(up_copies));
    par_for_each(tasks, |((y, (gate, up)), (gate_copy, up_copy))| {
        let n = y.len();
        simd!(|simd| {
            let (y, gate, up) = (&mut y[..n], &gate[..n], &up[..n]);
            for i in 0..n {
                y[i] = Y::cast(swiglu_element(simd, gate[i].as_f32(), up[i].as_f32()));
            }
            if let (Some(gate_copy), Some(up_copy)) = (gate_copy, up_copy) {
                cast_into(gate_copy, gate);
                cast_into(up_copy, up);
            }
        });
    });
}

fn mixed_dtypes() -> Error {
    Error::new(Kind::Tensor, "gate and up are of one type").rule("both f32 or both bf16")
}

/// dy (N, F) -> (dgate, dup); on the CPU in the compute type. With s = sigmoid(gate): dup = dy gate
/// s, dgate = dy up s (1 + gate (1 - s)).
pub fn swiglu_backward(
    context: Context<'_>,
    dy: &Tensor,
    saved: &SwigluSaved,
) -> Result<(Tensor, Tensor)> {
    let SwigluSaved { gate, up } = saved;
    check_shape("dy", dy, gate.dims())?;
    context.counter.add(swiglu_backward_cost(gate.elem_count()));
    let path = context.path(dy);
    if path == Path::Cpu {
        return match context.precision {
            Precision::Bf16 => backward_cpu::<bf16>(dy, saved),
            Precision::F32 | Precision::F16 => backward_cpu::<f32>(dy, saved),
        };
    }
    let gate = &load_activation(context, gate)?;
    let up = &load_activation(context, up)?;
    let s = match path {
        Path::Device => candle_nn::ops::sigmoid(gate)?,
        Path::Cpu | Path::Reference => (gate.neg()?.exp()? + 1.0)?.recip()?,
    };
    let slope = (&s * ((gate * (1.0 - &s)?)? + 1.0)?)?;
    Ok((((dy * up)? * slope)?, (dy * (gate * &s)?)?))
}

fn backward_cpu<Y: Element + WithDType>(
    dy: &Tensor,
    saved: &SwigluSaved,
) -> Result<(Tensor, Tensor)> {
    let shape = saved.gate.dims2()?;
    let dy = CpuTensor::borrow_f32(dy)?;
    let gate = CpuTensor::borrow(&saved.gate)?;
    let up = CpuTensor::borrow(&saved.up)?;
    let n = shape.0 * shape.1;
    // SAFETY: `backward_elements` writes every element.
    let (mut dgate, mut dup): (Vec<Y>, Vec<Y>) = unsafe { (uninit_vec(n), uninit_vec(n)) };
    let (dy, grads) = (dy.f32_slice(), [&mut dgate[..], &mut dup]);
    match (gate.slice(), up.slice()) {
        (CpuSlice::F32(gate), CpuSlice::F32(up)) => backward_elements(dy, gate, up, grads),
        (CpuSlice::Bf16(gate), CpuSlice::Bf16(up)) => backward_elements(dy, gate, up, grads),
        _ => return Err(mixed_dtypes()),
    }
    let [dgate, dup] = [dgate, dup].map(|grad| Tensor::from_vec(grad, shape, &Device::Cpu));
    Ok((dgate?, dup?))
}

fn backward_elements<X: Element, Y: Element>(
    dy: &[f32],
    gate: &[X],
    up: &[X],
    [dgate, dup]: [&mut [Y]; 2],
) {
    let inputs = gate.chunks(ELEMENTS).zip(up.chunks(ELEMENTS));
    let inputs = dy.chunks(ELEMENTS).zip(inputs);
    let grads = dgate.chunks_mut(ELEMENTS).zip(dup.chunks_mut(ELEMENTS));
    par_for_each(grads.zip(inputs), |((dgate, dup), (dy, (gate, up)))| {
        let n = dy.len();
        simd!(|simd| {
            let (dgate, dup) = (&mut dgate[..n], &mut dup[..n]);
            let (dy, gate, up) = (&dy[..n], &gate[..n], &up[..n]);
            for i in 0..n {
                let (gate, up) = (gate[i].as_f32(), up[i].as_f32());
                let [of_gate, of_up, _] = swiglu_backward_element(simd, dy[i], gate, up);
                (dgate[i], dup[i]) = (Y::cast(of_gate), Y::cast(of_up));
            }
        });
    });
}

/// silu(gate) up.
#[inline(always)]
pub(super) fn swiglu_element(simd: Simd, gate: f32, up: f32) -> f32 {
    gate * sigmoid(simd, gate) * up
}

/// `[dgate, dup, y]` of y = silu(gate) up.
#[inline(always)]
pub(super) fn swiglu_backward_element(simd: Simd, dy: f32, gate: f32, up: f32) -> [f32; 3] {
    let s = sigmoid(simd, gate);
    [
        dy * up * s * (1.0 + gate * (1.0 - s)),
        dy * gate * s,
        gate * s * up,
    ]
}

#[inline(always)]
fn sigmoid(simd: Simd, x: f32) -> f32 {
    1.0 / (1.0 + simd.exp(-x))
}
