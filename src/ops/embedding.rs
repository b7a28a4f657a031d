//! Embedding lookup: token ids -> rows of a table; backward adds into those rows.

use candle_core::{DType, Tensor};

use super::{Context, Gradients, Weight, gather_rows};
use crate::error::Result;
use crate::work::Work;

/// Work of looking up n rows of c.
pub fn embedding_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
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
    let cost = embedding_cost(ids.dims1()?, table.tensor.dims2()?.1);
    context.counter.add(cost);
    Ok(gather_rows(context, &table.tensor, ids)?.to_dtype(DType::F32)?)
}

/// Adds dx (N, C) to the gradient of the trained table, at rows `ids`.
pub fn embedding_backward(
    context: Context<'_>,
    ids: &Tensor,
    dx: &Tensor,
    table: &Weight,
    gradients: &mut Gradients,
) -> Result<()> {
    let (v, c) = table.tensor.dims2()?;
    let cost = embedding_backward_cost(ids.dims1()?, c, v);
    context.counter.add(cost);
    let zeros = Tensor::zeros((v, c), DType::F32, dx.device())?;
    gradients.add(table, zeros.index_add(ids, dx, 0)?)
}
