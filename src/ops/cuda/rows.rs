//! Cross-entropy and row gathers by their kernels.

use candle_core::{DType, Tensor};

use super::launch::{Arg, Launch, output, type_name};
use crate::error::Result;
use crate::ops::storage::to_f32_contiguous;

/// Threads of a row of logits.
const LOGIT_THREADS: usize = 512;

/// logits (L, V) in f32, targets (L) u32 -> losses (L), and with `scale` the gradient (L, V) of `scale * sum of losses` in
/// `dtype`, which in f32 replaces the logits.
pub(in crate::ops) fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    scale: Option<f64>,
    softcap: Option<f64>,
    dtype: DType,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, vocab) = logits.dims2()?;
    let device = logits.device();
    let logits = to_f32_contiguous(logits)?;
    let losses = output(device, DType::F32, rows)?;
    let gradient = match (scale, dtype) {
        (None, _) => None,
        (Some(_), DType::F32) => Some(logits.clone()),
        (Some(_), dtype) => Some(output(device, dtype, (rows, vocab))?),
    };
    let args = [
        Arg::from(&logits),
        Arg::from(targets),
        Arg::from(&losses),
        Arg::Tensor(gradient.as_ref()),
        Arg::Int(vocab),
        Arg::Float(scale.unwrap_or(0.0)),
        Arg::Float(softcap.unwrap_or(0.0)),
    ];
    let to = gradient.as_ref().map_or(DType::F32, Tensor::dtype);
    let kernel = format!("cross_entropy_{}", type_name(to)?);
    let launch = Launch {
        block: [LOGIT_THREADS, 1, 1],
        ..Launch::of_rows("cross_entropy", &kernel, rows)
    };
    launch.run(device, &args)?;
    Ok((losses, gradient))
}

/// x (N, C) in f32 or bf16, `indices` (L) u32 -> the rows (L, C) in f32; NaN for an index of N
/// or more.
pub(in crate::ops) fn gather(x: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (n, cols) = x.dims2()?;
    let rows = indices.dims1()?;
    let [x, indices] = [x.contiguous()?, indices.contiguous()?];
    let y = output(x.device(), DType::F32, (rows, cols))?;
    let args = [
        Arg::from(&x),
        Arg::from(&indices),
        Arg::from(&y),
        Arg::Int(n),
        Arg::Int(cols),
    ];
    let kernel = format!("gather_rows_{}", type_name(x.dtype())?);
    Launch::of_rows("gather", &kernel, rows).run(x.device(), &args)?;
    Ok(y)
}

/// dx (L, C), `indices` (L) u32 -> (n, C), the sum of the rows of each index, in their order; an index of n
/// or more is left out.
pub(in crate::ops) fn scatter(dx: &Tensor, indices: &Tensor, n: usize) -> Result<Tensor> {
    let (rows, cols) = dx.dims2()?;
    let [dx, indices] = [to_f32_contiguous(dx)?, indices.contiguous()?];
    let y = Tensor::zeros((n, cols), DType::F32, dx.device())?;
    let args = [
        Arg::from(&dx),
        Arg::from(&indices),
        Arg::from(&y),
        Arg::Int(rows),
        Arg::Int(n),
        Arg::Int(cols),
    ];
    Launch::of_rows("gather", "scatter_rows", rows).run(dx.device(), &args)?;
    Ok(y)
}
