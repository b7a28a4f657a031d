//! Gathers rows of a matrix by index, and the adjoint: scatter-add.

use candle_core::{DType, Tensor};

use super::parallel::par_for_each;
use super::storage::{CpuTensor, ROWS_PER_TASK, f32_tensor, uninit_vec};
use super::{Context, Path, cuda};
use crate::error::Result;
use crate::work::Work;

/// Work of gathering n rows of c elements.
pub fn gather_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
}

/// Work of scattering `rows` rows of c elements into n rows.
pub fn scatter_cost(n: usize, rows: usize, c: usize) -> Work {
    Work::sweep(4 * n * c + 8 * rows * c, rows * c)
}

/// x (N, C), `indices` (L) u32 -> the rows (L, C).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use wattune::ops::{Context, gather_rows, scatter_rows};
/// use wattune::work::{Precision, WorkCounter};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let indices = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let rows = gather_rows(context, &x, &indices)?;
/// assert_eq!(rows.to_vec2::<f32>()?, [[5., 6.], [1., 2.]]);
/// let sums = scatter_rows(context, &rows, &indices, 3)?;
/// assert_eq!(sums.to_vec2::<f32>()?, [[1., 2.], [0., 0.], [5., 6.]]);
/// # Ok(())
/// # }
/// ```
pub fn gather_rows(context: Context<'_>, x: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (n, _) = x.dims2()?;
    if context.path(x) == Path::Cuda {
        return cuda::gather(x, indices);
    }
    let Some(indices) = cpu_indices(context, x, indices, n)? else {
        return Ok(x.index_select(indices, 0)?);
    };
    let sources: Vec<_> = indices.iter().map(|index| Some(*index as usize)).collect();
    select_rows(x, &sources)
}

/// dx (L, C), `indices` (L) u32 -> (n, C), the sum of the rows of each index. Distinct indices take
/// the fast path.
pub fn scatter_rows(
    context: Context<'_>,
    dx: &Tensor,
    indices: &Tensor,
    n: usize,
) -> Result<Tensor> {
    if context.path(dx) == Path::Cuda {
        return cuda::scatter(dx, indices, n);
    }
    let sources = cpu_indices(context, dx, indices, n)?.and_then(|indices| inverse(&indices, n));
    match sources {
        Some(sources) => select_rows(dx, &sources),
        None => {
            let zeros = Tensor::zeros((n, dx.dims2()?.1), DType::F32, dx.device())?;
            Ok(zeros.index_add(indices, dx, 0)?)
        }
    }
}

/// The rows of x (N, C) at `sources`, zero for `None`: (L, C).
fn select_rows(x: &Tensor, sources: &[Option<usize>]) -> Result<Tensor> {
    let (_, c) = x.dims2()?;
    let host = CpuTensor::borrow_f32(x)?;
    // SAFETY: the loop writes every row.
    let mut out: Vec<f32> = unsafe { uninit_vec(sources.len() * c) };
    let chunks = out.chunks_mut((c * ROWS_PER_TASK).max(1));
    par_for_each(
        chunks.zip(sources.chunks(ROWS_PER_TASK)),
        |(out, sources)| {
            for (out, source) in out.chunks_exact_mut(c).zip(sources) {
                match source {
                    Some(row) => out.copy_from_slice(&host.f32_slice()[row * c..][..c]),
                    None => out.fill(0.0),
                }
            }
        },
    );
    f32_tensor(out, (sources.len(), c))
}

/// The indices on the CPU if the fused loop can run: x is contiguous f32 on the CPU and all indices
/// are below `n`. Otherwise `None`, and candle's op runs, which rejects indices out of range.
fn cpu_indices(
    context: Context<'_>,
    x: &Tensor,
    indices: &Tensor,
    n: usize,
) -> Result<Option<Vec<u32>>> {
    if !context.fused(x) || x.dtype() != DType::F32 || !x.is_contiguous() {
        return Ok(None);
    }
    let indices = indices.to_vec1::<u32>()?;
    let in_range = indices.iter().all(|index| (*index as usize) < n);
    Ok(in_range.then_some(indices))
}

/// The position of each of 0..n in `indices`, `None` if it is absent; `None` if an index occurs
/// twice.
fn inverse(indices: &[u32], n: usize) -> Option<Vec<Option<usize>>> {
    let mut positions = vec![None; n];
    for (position, index) in indices.iter().enumerate() {
        if positions[*index as usize].replace(position).is_some() {
            return None;
        }
    }
    Some(positions)
}
