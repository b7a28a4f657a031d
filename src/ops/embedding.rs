//! Token ids -> rows of a table, and back.

use candle_core::{DType, Tensor};

use super::{Context, Gradients, Weight, gather_rows};
use crate::error::Result;
use crate::work::Work;

/// Work of looking n rows of c up.
pub fn embedding_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
}

/// Work of adding n rows of c into a table of v rows.
pub fn embedding_backward_cost(n: usize, c: usize, v: usize) -> Work {
    Work::sweep(8 * n * c + 4 * v * c, n * c)
}

/// ids (N) u32, table (V, C) -> (N, C) in f32.
pub fn embedding(context: Context<'_>, ids: &Tensor, table: &Weight) -> Result<Tensor> {
    let (n, c) = (ids.dims1()?, table.tensor.dims2()?.1);
    context.counter.add(embedding_cost(n, c));
    Ok(gather_rows(context, &table.tensor, ids)?.to_dtype(DType::F32)?)
}

/// Adds dx (N, C) to the rows of the trained table that `ids` named.
pub fn embedding_backward(
    context: Context<'_>,
    ids: &Tensor,
    dx: &Tensor,
    table: &Weight,
    gradients: &mut Gradients,
) -> Result<()> {
    let (v, c) = table.tensor.dims2()?;
    context
        .counter
        .add(embedding_backward_cost(ids.dims1()?, c, v));
    let zeros = Tensor::zeros((v, c), DType::F32, dx.device())?;
    gradients.add(table, zeros.index_add(ids, dx, 0)?)
}
