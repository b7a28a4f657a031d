//! Primitives with an explicit forward and backward.
//!
//! Each op is one file or folder and one pair on plain tensors: `forward(x) -> (y, Saved)` and `backward(dy, Saved) -> (dx, gradients)`,
//! as candle primitives (the reference, on any device), as a fused CPU pass where that pays, and with its cost. A running op adds
//! to the context's counter the very value that its cost function predicts. Activations are (N, C): N tokens of all segments laid
//! end to end, C channels. Knows nothing of models.

mod adamw;
mod attention;
mod cross_entropy;
mod dropout;
mod embedding;
mod feed_forward;
mod gather;
mod gemm;
mod linear;
mod parallel;
mod parameters;
mod rms_norm;
mod rope;
mod segments;
mod simd;
mod storage;
mod swiglu;

pub use adamw::{AdamW, adamw_cost};
pub use attention::{
    Attention, AttentionSaved, attention_backward_cost, attention_decode_cost,
    attention_forward_cost,
};
pub use cross_entropy::{LmHead, LmHeadShape};
pub use dropout::DropoutMask;
pub use embedding::{embedding, embedding_backward, embedding_backward_cost, embedding_cost};
pub use feed_forward::{FeedForward, FeedForwardLayer, FeedForwardSaved, Masks};
pub use gather::{gather_rows, scatter_rows};
pub use linear::{
    Branch, Linear, LinearInput, LinearSaved, LinearShape, Lora, backward_shared_input,
};
pub use parallel::par_map;
pub use parameters::{Gradients, Parameters, Slot, Weight};
pub use rms_norm::{RmsNorm, RmsNormSaved, rms_norm_backward_cost, rms_norm_cost};
pub use rope::{Rope, RopeScaling, RopeTables};
pub use segments::Segments;
pub use swiglu::{SwigluSaved, swiglu, swiglu_backward, swiglu_backward_cost, swiglu_cost};

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::work::{Precision, Work, WorkCounter};

/// Settings of an op call.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Counts executed work.
    pub counter: &'a WorkCounter,
    /// Format of GEMM inputs.
    pub precision: Precision,
    /// Run the candle-primitive reference even if a fused CPU pass exists: the oracle of tests.
    pub reference: bool,
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

    /// Whether the fused CPU pass runs on this tensor.
    fn fused(&self, x: &Tensor) -> bool {
        !self.reference && x.device().is_cpu()
    }
}

/// The instruction set of this CPU's GEMM kernels: `amx`, `avx512_bf16`, `avx512`, `avx2` or `portable`.
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
}

/// Counts `count` products (m, k) x (k, n); a no-op outside tests.
fn count_flops(_count: usize, _m: usize, _n: usize, _k: usize) {
    #[cfg(test)]
    FLOPS_ISSUED.set(FLOPS_ISSUED.get() + (2 * _count * _m * _n * _k) as u64);
}

/// Work of a residual addition (n, c), fused into a GEMM (as its initial C) or a norm: one more operand is read.
pub fn residual_cost(n: usize, c: usize) -> Work {
    Work::sweep(4 * n * c, n * c)
}

/// a (batch, m, k) b (batch, k, n) of one dtype, on any device.
fn batched(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (count, m, k) = a.dims3()?;
    count_flops(count, m, b.dims3()?.2, k);
    Ok(a.matmul(b)?)
}

/// `a (m, k) x b (k, n) -> (m, n)` in f32: inputs are rounded to the context's precision, sums are f32, and a result of 16-bit inputs
/// is rounded to their precision once more.
fn matmul(context: Context<'_>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    count_flops(1, a.dims2()?.0, b.dims2()?.1, a.dims2()?.1);
    let dtype = dtype(context.precision);
    let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
    Ok(a.matmul(&b)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests;
