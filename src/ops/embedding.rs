//! Embedding lookup: token ids -> rows of a table; backward adds into those rows.

use candle_core::{DType, Tensor};

use super::{
    Context, Gradients, Lora, Path, StoredFormat, Weight, cuda, gather_rows, matmul, residual_cost,
};
use crate::error::Result;
use crate::work::{Precision, Work};

/// Work of looking up n rows of c, which are decoded if the table is quantised.
pub fn embedding_cost(n: usize, c: usize, stored: Option<StoredFormat>) -> Work {
    match stored.and_then(|format| Some((format, format.bytes_of_matrix(n, c)?))) {
        Some((format, bytes)) => Work::sweep(bytes + 4 * n * c, format.decode_operations() * n * c),
        None => Work::sweep(8 * n * c, 0),
    }
}

/// Work of adding n rows of c into a table of v rows.
pub fn embedding_backward_cost(n: usize, c: usize, v: usize) -> Work {
    Work::sweep(8 * n * c + 4 * v * c, n * c)
}

/// ids (N) u32, table (V, C) -> (N, C) in f32.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, Weight, embedding};
/// # use wattune::work::{Precision, WorkCounter};
/// let table = Weight::frozen(Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?);
/// let ids = Tensor::new(&[1u32, 1, 0], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let x = embedding(Context::new(&counter, Precision::F32), &ids, &table)?;
/// assert_eq!(x.to_vec2::<f32>()?, [[3., 4.], [3., 4.], [1., 2.]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
pub fn embedding(context: Context<'_>, ids: &Tensor, table: &Weight) -> Result<Tensor> {
    let (_, c) = table.dims2()?;
    context
        .counter
        .add(embedding_cost(ids.dims1()?, c, table.stored_format()));
    let x = if table.stored_format().is_some() {
        table.gather_dequantized(ids)?
    } else {
        gather_rows(context, &table.tensor, ids)?.to_dtype(DType::F32)?
    };
    match table.token_rows() {
        Some(rows) => rows.replace(context, ids, &x),
        None => Ok(x),
    }
}

/// Adds dx (N, C) to the gradient of the trained table, at rows `ids`.
pub fn embedding_backward(
    context: Context<'_>,
    ids: &Tensor,
    dx: &Tensor,
    table: &Weight,
    gradients: &mut Gradients,
) -> Result<()> {
    let (v, c) = table.dims2()?;
    let cost = embedding_backward_cost(ids.dims1()?, c, v);
    context.counter.add(cost);
    if context.path(dx) == Path::Cuda {
        return gradients.add(table, cuda::scatter(dx, ids, v)?);
    }
    let zeros = Tensor::zeros((v, c), DType::F32, dx.device())?;
    gradients.add(table, zeros.index_add(ids, dx, 0)?)
}

/// Work of adding the rows of an adapter of rank r to n rows of c.
pub fn lora_embedding_cost(n: usize, c: usize, r: usize) -> Work {
    Work::product(n, c, r, Precision::F32) + Work::sweep(16 * n * r, n * r) + residual_cost(n, c)
}

/// Work of the backward pass of an adapter of rank r for n rows of c, on a table of v rows.
pub fn lora_embedding_backward_cost(n: usize, c: usize, r: usize, v: usize) -> Work {
    Work::product(n, r, c, Precision::F32)
        + Work::product(c, r, n, Precision::F32)
        + Work::sweep(24 * n * r + 4 * v * r, 3 * n * r)
}

/// LoRA on an embedding, with A (r, V) and B (C, r): ids (N), x (N, C) -> x + scaling * B A[:, ids].
pub fn lora_embedding(
    context: Context<'_>,
    ids: &Tensor,
    x: &Tensor,
    lora: &Lora,
) -> Result<Tensor> {
    let (c, r) = lora.b.tensor.dims2()?;
    context.counter.add(lora_embedding_cost(ids.dims1()?, c, r));
    let scaled = (columns(ids, lora)? * lora.scaling)?; // (N, r)
    Ok((x + matmul(context.in_f32(), &scaled, &lora.b.tensor.t()?)?)?)
}

/// Adds the gradients of A and B for the gradient dx (N, C) of the embedded ids (N).
pub fn lora_embedding_backward(
    context: Context<'_>,
    ids: &Tensor,
    dx: &Tensor,
    lora: &Lora,
    gradients: &mut Gradients,
) -> Result<()> {
    let (c, r) = lora.b.tensor.dims2()?;
    let v = lora.a.tensor.dims2()?.1;
    let cost = lora_embedding_backward_cost(ids.dims1()?, c, r, v);
    context.counter.add(cost);
    let context = context.in_f32();
    let scaled = (columns(ids, lora)? * lora.scaling)?;
    gradients.add(&lora.b, matmul(context, &dx.t()?, &scaled)?)?;
    let dxa = (matmul(context, dx, &lora.b.tensor)? * lora.scaling)?; // (N, r)
    let zeros = Tensor::zeros((r, v), DType::F32, dx.device())?;
    let da = zeros.index_add(ids, &dxa.t()?.contiguous()?, 1)?;
    gradients.add(&lora.a, da)
}

/// The columns `ids` (N) of A (r, V) -> (N, r).
fn columns(ids: &Tensor, lora: &Lora) -> Result<Tensor> {
    Ok(lora.a.tensor.index_select(ids, 1)?.t()?.contiguous()?)
}
