//! `y = f(gate) up`, f a scalar activation function: the gate of a gated feed-forward (Shazeer 2020,
//! "GLU variants improve transformer"), or `y = f(x)` without `up`.

mod functions;

use candle_core::{DType, Device, Tensor, WithDType};
use half::bf16;

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{
    CpuTensor, cast_into, check_shape, load_activation, save_activation, uninit_vec,
};
use super::{Context, Path, new_tensor, optional_chunks};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};
pub(super) use functions::{Function, Gelu, GeluTanh, Relu, Silu, Tanh};
use functions::{TANH_CUBIC, TANH_SLOPE};

/// Elements of a task.
const ELEMENTS: usize = 2048;

/// A scalar activation function.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Activation, Context};
/// # use wattune::work::{Precision, WorkCounter};
/// let gate = Tensor::new(&[[0f32, 1., 100.]], &Device::Cpu)?;
/// let up = Tensor::new(&[[5f32, 2., 2.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let (y, _) = Activation::Silu.forward(context, &gate, Some(&up))?;
/// let y = y.to_vec2::<f32>()?; // silu(1) = 1 / (1 + 1 / e) = 0.73106
/// assert!(y[0][0] == 0. && (y[0][1] - 1.46212).abs() < 1e-5 && y[0][2] == 200.);
/// let (y, _) = Activation::Gelu.forward(context, &gate, None)?;
/// assert!((y.to_vec2::<f32>()?[0][1] - 0.84134).abs() < 1e-5);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x).
    Silu,
    /// x Phi(x), by the error function.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// tanh(x).
    Tanh,
}

/// Input of `backward`: gate, and up if there is one (N, F), in the compute type.
#[derive(Debug, Clone)]
pub struct ActivationSaved {
    gate: Tensor,
    up: Option<Tensor>,
}

/// Runs `body` with the type `F` of the function of an [`Activation`].
macro_rules! with_function {
    ($activation:expr, $F:ident => $body:expr) => {
        match $activation {
            $crate::ops::Activation::Silu => {
                type $F = $crate::ops::activation::Silu;
                $body
            }
            $crate::ops::Activation::Gelu => {
                type $F = $crate::ops::activation::Gelu;
                $body
            }
            $crate::ops::Activation::GeluTanh => {
                type $F = $crate::ops::activation::GeluTanh;
                $body
            }
            $crate::ops::Activation::Relu => {
                type $F = $crate::ops::activation::Relu;
                $body
            }
            $crate::ops::Activation::Tanh => {
                type $F = $crate::ops::activation::Tanh;
                $body
            }
        }
    };
}
pub(super) use with_function;

impl Activation {
    /// By its name in config.json.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// Vector operations of a value, and of a value with its slope.
    fn flops(self) -> [usize; 2] {
        match self {
            Self::Silu => [4, 7],
            Self::Gelu => [19, 22],
            Self::GeluTanh => [8, 15],
            Self::Relu => [1, 2],
            Self::Tanh => [5, 7],
        }
    }

    /// Work of a forward pass over n elements; `gated`: with `up`.
    pub fn cost(self, n: usize, gated: bool) -> Work {
        let [value, _] = self.flops();
        if gated {
            Work::sweep(12 * n, (value + 1) * n)
        } else {
            Work::sweep(8 * n, value * n)
        }
    }

    /// Work of a backward pass over n elements; `gated`: with `up`.
    pub fn backward_cost(self, n: usize, gated: bool) -> Work {
        let [_, both] = self.flops();
        if gated {
            Work::sweep(20 * n, (both + 3) * n)
        } else {
            Work::sweep(12 * n, (both + 1) * n)
        }
    }

    /// gate, up (N, F) -> y (N, F); on the CPU in the compute type, because the next op is a GEMM.
    pub fn forward(
        self,
        context: Context<'_>,
        gate: &Tensor,
        up: Option<&Tensor>,
    ) -> Result<(Tensor, ActivationSaved)> {
        if let Some(up) = up {
            check_shape("up", up, gate.dims())?;
        }
        let cost = self.cost(gate.elem_count(), up.is_some());
        context.counter.add(cost);
        if context.path(gate) == Path::Cuda {
            let (y, gate, up) = self.forward_cuda(context, gate, up)?;
            return Ok((y, ActivationSaved { gate, up }));
        }
        if context.path(gate) != Path::Cpu {
            let save = |x| save_activation(context, x);
            let saved = ActivationSaved {
                gate: save(gate)?,
                up: up.map(save).transpose()?,
            };
            return Ok((self.forward_reference(gate, up)?, saved));
        }
        for x in [Some(gate), up].into_iter().flatten() {
            CpuTensor::borrow_f32(x)?;
        }
        if context.precision == Precision::Bf16 {
            return self.forward_bf16(gate, up);
        }
        let write = |y: &mut [f32]| self.forward_cpu(gate, up, y, [&mut [], &mut []]);
        // SAFETY: `forward_cpu` writes every element.
        let y = unsafe { new_tensor(gate.dims2()?, write) }?;
        let (gate, up) = (gate.clone(), up.cloned());
        Ok((y, ActivationSaved { gate, up }))
    }

    /// The fused forward pass in bf16.
    fn forward_bf16(self, gate: &Tensor, up: Option<&Tensor>) -> Result<(Tensor, ActivationSaved)> {
        let (shape, n) = (gate.dims2()?, gate.elem_count());
        let up_elements = up.map_or(0, Tensor::elem_count);
        // SAFETY: `forward_cpu` writes every element of all three.
        let (y, gate16, up16) = unsafe {
            let mut gate16: Vec<bf16> = uninit_vec(n);
            let mut up16: Vec<bf16> = uninit_vec(up_elements);
            let write = |y: &mut [bf16]| self.forward_cpu(gate, up, y, [&mut gate16, &mut up16]);
            (new_tensor(shape, write)?, gate16, up16)
        };
        let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
        let saved = ActivationSaved {
            gate: tensor(gate16)?,
            up: up.map(|_| tensor(up16)).transpose()?,
        };
        Ok((y, saved))
    }

    /// The output, recomputed in the backward pass.
    pub fn recompute(self, context: Context<'_>, saved: &ActivationSaved) -> Result<Tensor> {
        let ActivationSaved { gate, up } = saved;
        let up = up.as_ref();
        let cost = self.cost(gate.elem_count(), up.is_some());
        context.counter.add(cost);
        if context.path(gate) == Path::Cuda {
            return Ok(self.forward_cuda(context, gate, up)?.0);
        }
        if context.path(gate) != Path::Cpu {
            let gate = load_activation(context, gate)?;
            let up = up.map(|up| load_activation(context, up)).transpose()?;
            return self.forward_reference(&gate, up.as_ref());
        }
        let shape = gate.dims2()?;
        // SAFETY: `forward_cpu` writes every element.
        unsafe {
            match gate.dtype() {
                DType::F32 => new_tensor(shape, |y: &mut [f32]| {
                    self.forward_cpu(gate, up, y, [&mut [], &mut []])
                }),
                _ => new_tensor(shape, |y: &mut [bf16]| {
                    self.forward_cpu(gate, up, y, [&mut [], &mut []])
                }),
            }
        }
    }

    /// Also the device path: each function is one kernel.
    fn forward_reference(self, gate: &Tensor, up: Option<&Tensor>) -> Result<Tensor> {
        let y = match self {
            Self::Silu => gate.silu()?,
            Self::Gelu => gate.gelu_erf()?,
            Self::GeluTanh => gate.gelu()?,
            Self::Relu => gate.relu()?,
            Self::Tanh => gate.tanh()?,
        };
        Ok(match up {
            Some(up) => (y * up)?,
            None => y,
        })
    }

    /// Writes y, and bf16 copies of gate and up to `copies` unless those are empty.
    fn forward_cpu<Y: Element>(
        self,
        gate: &Tensor,
        up: Option<&Tensor>,
        y: &mut [Y],
        copies: [&mut [bf16]; 2],
    ) -> Result<()> {
        let gate = CpuTensor::borrow(gate)?;
        let up = up.map(CpuTensor::borrow).transpose()?;
        match (gate.slice(), up.as_ref().map(CpuTensor::slice)) {
            (CpuSlice::F32(gate), up) => {
                let up = f32_or_empty(up)?;
                with_function!(self, F => forward_elements::<F, _, _>(gate, up, y, copies));
            }
            (CpuSlice::Bf16(gate), up) => {
                let up = bf16_or_empty(up)?;
                with_function!(self, F => forward_elements::<F, _, _>(gate, up, y, copies));
            }
        }
        Ok(())
    }

    /// dy (N, F) -> dgate, and dup if there is an up; on the CPU in the compute type. dgate = dy up
    /// f'(gate), dup = dy f(gate).
    pub fn backward(
        self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &ActivationSaved,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let ActivationSaved { gate, up } = saved;
        check_shape("dy", dy, gate.dims())?;
        let cost = self.backward_cost(gate.elem_count(), up.is_some());
        context.counter.add(cost);
        let path = context.path(dy);
        if path == Path::Cpu {
            return match context.precision {
                Precision::Bf16 => self.backward_cpu::<bf16>(dy, saved),
                Precision::F32 | Precision::F16 => self.backward_cpu::<f32>(dy, saved),
            };
        }
        if path == Path::Cuda {
            return self.backward_cuda(context, dy, gate, up.as_ref());
        }
        let (value, slope) = self.reference_slope(path, &load_activation(context, gate)?)?;
        let Some(up) = up else {
            return Ok(((dy * slope)?, None));
        };
        let up = &load_activation(context, up)?;
        Ok((((dy * up)? * slope)?, Some((dy * value)?)))
    }

    /// f(x) and f'(x) in candle's primitives.
    fn reference_slope(self, path: Path, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let sigmoid = |x: &Tensor| match path {
            Path::Device => candle_nn::ops::sigmoid(x),
            Path::Cpu | Path::Cuda | Path::Reference => (x.neg()?.exp()? + 1.0)?.recip(),
        };
        Ok(match self {
            Self::Silu => {
                let s = sigmoid(x)?;
                let slope = (&s * ((x * (1.0 - &s)?)? + 1.0)?)?;
                ((x * s)?, slope)
            }
            Self::Gelu => {
                let cdf = ((x / std::f64::consts::SQRT_2)?.erf()?.affine(0.5, 0.5))?;
                let density = (x.sqr()? * -0.5)?.exp()? / std::f64::consts::TAU.sqrt();
                let slope = (&cdf + (x * density?)?)?;
                ((x * cdf)?, slope)
            }
            Self::GeluTanh => {
                let cubic = (x.sqr()? * TANH_CUBIC)?;
                let s = sigmoid(&((x * (&cubic + 1.0)?)? * (2.0 * TANH_SLOPE))?)?;
                let z_slope = cubic.affine(6.0 * TANH_SLOPE, 2.0 * TANH_SLOPE)?;
                let value = (x * &s)?;
                let slope = (&s + ((&value * (1.0 - &s)?)? * z_slope)?)?;
                (value, slope)
            }
            Self::Relu => (x.relu()?, x.gt(0.0)?.to_dtype(x.dtype())?),
            Self::Tanh => {
                let value = x.tanh()?;
                let slope = value.sqr()?.affine(-1.0, 1.0)?;
                (value, slope)
            }
        })
    }

    fn backward_cpu<Y: Element + WithDType>(
        self,
        dy: &Tensor,
        saved: &ActivationSaved,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (shape, n) = (saved.gate.dims2()?, saved.gate.elem_count());
        let dy = CpuTensor::borrow_f32(dy)?;
        let gate = CpuTensor::borrow(&saved.gate)?;
        let up = saved.up.as_ref().map(CpuTensor::borrow).transpose()?;
        // SAFETY: `backward_elements` writes every element.
        let mut dgate: Vec<Y> = unsafe { uninit_vec(n) };
        // SAFETY: as above.
        let mut dup: Vec<Y> = unsafe { uninit_vec(if up.is_some() { n } else { 0 }) };
        let (dy, grads) = (dy.f32_slice(), [&mut dgate[..], &mut dup]);
        match (gate.slice(), up.as_ref().map(CpuTensor::slice)) {
            (CpuSlice::F32(gate), up) => {
                let up = f32_or_empty(up)?;
                with_function!(self, F => backward_elements::<F, _, _>(dy, gate, up, grads));
            }
            (CpuSlice::Bf16(gate), up) => {
                let up = bf16_or_empty(up)?;
                with_function!(self, F => backward_elements::<F, _, _>(dy, gate, up, grads));
            }
        }
        let tensor = |grad| Tensor::from_vec(grad, shape, &Device::Cpu);
        Ok((tensor(dgate)?, up.map(|_| tensor(dup)).transpose()?))
    }
}

fn f32_or_empty(x: Option<CpuSlice<'_>>) -> Result<&[f32]> {
    match x {
        None => Ok(&[]),
        Some(CpuSlice::F32(x)) => Ok(x),
        Some(CpuSlice::Bf16(_)) => Err(mixed_dtypes()),
    }
}

fn bf16_or_empty(x: Option<CpuSlice<'_>>) -> Result<&[bf16]> {
    match x {
        None => Ok(&[]),
        Some(CpuSlice::Bf16(x)) => Ok(x),
        Some(CpuSlice::F32(_)) => Err(mixed_dtypes()),
    }
}

fn mixed_dtypes() -> Error {
    Error::new(Kind::Tensor, "gate and up are of one type").rule("both f32 or both bf16")
}

/// `up` is empty if there is none.
fn forward_elements<F: Function, X: Element, Y: Element>(
    gate: &[X],
    up: &[X],
    y: &mut [Y],
    copies: [&mut [bf16]; 2],
) {
    let [gate_copies, up_copies] = copies.map(|copy| optional_chunks(copy, ELEMENTS));
    let ups = up.chunks(ELEMENTS).map(Some);
    let ups = ups.chain(std::iter::repeat(None));
    let inputs = gate.chunks(ELEMENTS).zip(ups);
    let tasks = y.chunks_mut(ELEMENTS).zip(inputs);
    let tasks = tasks.zip(gate_copies.zip(up_copies));
    par_for_each(tasks, |((y, (gate, up)), (gate_copy, up_copy))| {
        let n = y.len();
        simd!(|simd| {
            let (y, gate) = (&mut y[..n], &gate[..n]);
            if let Some(up) = up {
                let up = &up[..n];
                for i in 0..n {
                    y[i] = Y::cast(F::value(simd, gate[i].as_f32()) * up[i].as_f32());
                }
                if let Some(up_copy) = up_copy {
                    cast_into(up_copy, up);
                }
            } else {
                for i in 0..n {
                    y[i] = Y::cast(F::value(simd, gate[i].as_f32()));
                }
            }
            if let Some(gate_copy) = gate_copy {
                cast_into(gate_copy, gate);
            }
        });
    });
}

/// `up` and `dup` are empty if there is no up.
fn backward_elements<F: Function, X: Element, Y: Element>(
    dy: &[f32],
    gate: &[X],
    up: &[X],
    [dgate, dup]: [&mut [Y]; 2],
) {
    let ups = up.chunks(ELEMENTS).zip(dup.chunks_mut(ELEMENTS)).map(Some);
    let ups = ups.chain(std::iter::repeat_with(|| None));
    let inputs = dy.chunks(ELEMENTS).zip(gate.chunks(ELEMENTS));
    let tasks = dgate.chunks_mut(ELEMENTS).zip(inputs).zip(ups);
    par_for_each(tasks, |((dgate, (dy, gate)), up)| {
        let n = dy.len();
        simd!(|simd| {
            let (dgate, dy, gate) = (&mut dgate[..n], &dy[..n], &gate[..n]);
            if let Some((up, dup)) = up {
                let (up, dup) = (&up[..n], &mut dup[..n]);
                for i in 0..n {
                    let (gate, up) = (gate[i].as_f32(), up[i].as_f32());
                    let [of_gate, of_up, _] = F::gated_backward(simd, dy[i], gate, up);
                    (dgate[i], dup[i]) = (Y::cast(of_gate), Y::cast(of_up));
                }
            } else {
                for i in 0..n {
                    let [_, slope] = F::value_and_slope(simd, gate[i].as_f32());
                    dgate[i] = Y::cast(dy[i] * slope);
                }
            }
        });
    });
}
