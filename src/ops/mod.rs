//! Primitives with an explicit forward and backward.
//!
//! Each op is one file or folder and one pair on plain tensors: `forward(x) -> (y, Saved)` and
//! `backward(dy, Saved) -> (dx, gradients)`, with a cost function of the shapes. A running op adds
//! to the context's counter the very value that its cost function returns. Activations are (N, C):
//! N tokens of all segments laid end to end, C channels. Knows nothing of models.
//!
//! An op has up to three implementations ([`Context`] and the tensor's device choose): a fused CPU
//! pass, a device pass, and the reference in candle primitives, which candle's autograd can follow.
//! The device pass is ours on CUDA (`cuda`: the `.cu` file beside the op, and cuBLAS), else candle-nn's
//! fused forwards. Where there is neither, the device runs the reference.

mod activation;
mod adamw;
mod attention;
mod columns;
mod cross_entropy;
mod cuda;
mod dropout;
mod embedding;
mod experts;
mod feed_forward;
mod gather;
mod gemm;
mod linear;
mod norm;
mod output_losses;
mod parallel;
mod parameters;
mod quantized;
mod residual;
mod rope;
mod segments;
mod simd;
mod softcap;
mod storage;
mod token_rows;

pub use token_rows::{TokenRows, token_rows_backward_cost, token_rows_cost};

pub use activation::{Activation, ActivationSaved};
pub use adamw::{AdamW, adamw_cost};
pub use attention::{
    Attention, AttentionSaved, attention_backward_cost, attention_decode_cost,
    attention_forward_cost,
};
pub use columns::{columns_cost, join_columns, split_columns};
pub use cross_entropy::{HeadMasks, LmHead, LmHeadShape, cross_entropy};
pub use cuda::{device_memory, open_cuda};
pub use dropout::{DropoutMask, StreamRows};
pub use embedding::{
    embedding, embedding_backward, embedding_backward_cost, embedding_cost, lora_embedding,
    lora_embedding_backward, lora_embedding_backward_cost, lora_embedding_cost,
};
pub use experts::{Experts, ExpertsSaved, ExpertsShape};
pub use feed_forward::{BackwardDepth, FeedForward, FeedForwardSaved, Masks};
pub use gather::{gather_cost, gather_rows, scatter_cost, scatter_rows};
pub use linear::{
    Branch, InputGradient, Linear, LinearInput, LinearSaved, LinearShape, Lora, LoraShape,
    Magnitude, backward_shared_input,
};
pub use norm::{Norm, NormKind, NormSaved, norm_backward_cost, norm_cost};
pub use output_losses::{OutputLoss, OutputTargets};
pub use parallel::par_map;
pub use parameters::{Gradients, Parameters, Slot, Weight};
pub use quantized::StoredFormat;
pub use residual::{add_scaled, add_scaled_cost, scale, scale_cost};
pub use rope::{QueryScaling, Rope, RopeScaling, RopeTables, rope_cost};
pub use segments::Segments;

use candle_core::{D, DType, Device, Tensor, WithDType};

use crate::error::Result;
use crate::work::{Precision, Work, WorkCounter};

/// Settings of an op call.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Counts executed work.
    pub counter: &'a WorkCounter,
    /// Format of GEMM inputs.
    pub precision: Precision,
    /// Always run the reference: the oracle of tests.
    pub reference: bool,
}

/// An implementation of an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// The fused CPU pass.
    Cpu,
    /// Our kernels on CUDA, and primitives.
    Cuda,
    /// candle-nn's fused forwards on Metal, and primitives.
    Device,
    /// Candle primitives on any device.
    Reference,
}

impl<'a> Context<'a> {
    /// The context of a normal run.
    pub fn new(counter: &'a WorkCounter, precision: Precision) -> Self {
        Self {
            counter,
            precision,
            reference: false,
        }
    }

    /// The same with results in f32.
    pub(crate) fn in_f32(self) -> Self {
        Self {
            precision: Precision::F32,
            ..self
        }
    }

    /// The same with another counter.
    fn counting(self, counter: &WorkCounter) -> Context<'_> {
        Context {
            counter,
            precision: self.precision,
            reference: self.reference,
        }
    }

    /// The implementation that runs on the device of `x`.
    fn path(&self, x: &Tensor) -> Path {
        if self.reference {
            return Path::Reference;
        }
        #[cfg(test)]
        if let Some(path) = FORCED_PATH.get() {
            return path;
        }
        match x.device() {
            Device::Cpu => Path::Cpu,
            // The kernels take f32 and bf16.
            Device::Cuda(_) if self.precision != Precision::F16 => Path::Cuda,
            _ => Path::Device,
        }
    }

    /// Whether the fused CPU pass runs on `x`.
    fn fused(&self, x: &Tensor) -> bool {
        self.path(x) == Path::Cpu
    }
}

/// The instruction set of the GEMM kernels on this CPU: `amx`, `avx512_bf16`, `avx512`, `avx2` or
/// `portable`.
pub fn instruction_set() -> &'static str {
    gemm::best().name
}

/// The candle dtype of a precision.
pub fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    }
}

#[cfg(test)]
thread_local! {
    /// FLOPs of the GEMM calls of this thread, which tests compare with the cost functions.
    static FLOPS_ISSUED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    /// The path of CPU tensors.
    static FORCED_PATH: std::cell::Cell<Option<Path>> = const { std::cell::Cell::new(None) };
}

/// Counts `count` products (m, k) x (k, n); a no-op outside tests.
fn count_flops(_count: usize, _m: usize, _n: usize, _k: usize) {
    #[cfg(test)]
    FLOPS_ISSUED.set(FLOPS_ISSUED.get() + (2 * _count * _m * _n * _k) as u64);
}

/// Work of a residual addition (n, c), fused into a GEMM (as its initial C) or a norm: one more
/// operand is read.
pub fn residual_cost(n: usize, c: usize) -> Work {
    Work::sweep(4 * n * c, n * c)
}

/// a (batch, m, k) b (batch, k, n) of one dtype, on any device.
fn batched_matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (count, m, k) = a.dims3()?;
    count_flops(count, m, b.dims3()?.2, k);
    Ok(a.matmul(b)?)
}

/// `a (m, k) x b (k, n) -> (m, n)` in f32: inputs are rounded to the context's precision, sums are
/// f32; but on CUDA a result of 16-bit inputs is rounded to their precision once more.
fn matmul(context: Context<'_>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (m, k) = a.dims2()?;
    count_flops(1, m, b.dims2()?.1, k);
    let dtype = dtype(context.precision);
    if context.path(a) == Path::Cuda {
        return cuda::product(a, b, dtype);
    }
    let y = a.to_dtype(dtype)?.matmul(&b.to_dtype(dtype)?)?;
    Ok(y.to_dtype(DType::F32)?)
}

/// Softmax over the last dimension, and its log-sum-exp (last dimension 1), by candle.
fn softmax(path: Path, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let max = x.max_keepdim(D::Minus1)?;
    if matches!(path, Path::Cuda | Path::Device) {
        let p = candle_nn::ops::softmax_last_dim(&x.contiguous()?)?;
        // The largest probability is exp(max - lse).
        let lse = (max - p.max_keepdim(D::Minus1)?.log()?)?;
        return Ok((p, lse));
    }
    let e = x.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    Ok((e.broadcast_div(&sum)?, (max + sum.log()?)?))
}

/// Chunks of an output that is empty if it is not wanted: then `None` for every task.
fn optional_chunks<T>(x: &mut [T], size: usize) -> impl Iterator<Item = Option<&mut [T]>> {
    let chunks = x.chunks_mut(size).map(Some);
    chunks.chain(std::iter::repeat_with(|| None))
}

/// A CPU tensor of `shape` that `write` fills.
///
/// # Safety
/// `write` writes every element, or fails.
unsafe fn new_tensor<T: WithDType>(
    shape: (usize, usize),
    write: impl FnOnce(&mut [T]) -> Result<()>,
) -> Result<Tensor> {
    // SAFETY: the caller's promise.
    let mut values = unsafe { storage::uninit_vec(shape.0 * shape.1) };
    write(&mut values)?;
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

#[cfg(test)]
mod tests;
