//! Rows of a matrix by their numbers, and back to their places.

use candle_core::{DType, Tensor};

use super::Context;
use super::parallel::par_for_each;
use super::storage::{CpuTensor, ROWS_PER_TASK, f32_tensor, uninit_vec};
use crate::error::Result;

/// x (N, C) and row numbers (L) u32 -> (L, C).
pub fn gather_rows(context: Context<'_>, x: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    let (n, c) = x.dims2()?;
    let Some(numbers) = on_host(context, x, numbers, n)? else {
        return Ok(x.index_select(numbers, 0)?);
    };
    let host = CpuTensor::borrow_f32(x)?;
    // SAFETY: the loop writes every row.
    let mut out: Vec<f32> = unsafe { uninit_vec(numbers.len() * c) };
    par_for_each(
        out.chunks_mut((c * ROWS_PER_TASK).max(1))
            .zip(numbers.chunks(ROWS_PER_TASK)),
        |(out, numbers)| {
            for (out, number) in out.chunks_exact_mut(c).zip(numbers) {
                out.copy_from_slice(&host.f32_slice()[*number as usize * c..][..c]);
            }
        },
    );
    f32_tensor(out, (numbers.len(), c))
}

/// dx (L, C) and the numbers (L) u32 of its rows -> (n, C), the sum of each number's rows, zero where there are none. Fast where no number
/// comes twice.
pub fn scatter_rows(
    context: Context<'_>,
    dx: &Tensor,
    numbers: &Tensor,
    n: usize,
) -> Result<Tensor> {
    let c = dx.dims2()?.1;
    let Some(places) = on_host(context, dx, numbers, n)?.and_then(|numbers| places(&numbers, n))
    else {
        return Ok(Tensor::zeros((n, c), DType::F32, dx.device())?.index_add(numbers, dx, 0)?);
    };
    let host = CpuTensor::borrow_f32(dx)?;
    // SAFETY: the loop writes every row.
    let mut out: Vec<f32> = unsafe { uninit_vec(n * c) };
    par_for_each(
        out.chunks_mut((c * ROWS_PER_TASK).max(1))
            .zip(places.chunks(ROWS_PER_TASK)),
        |(out, places)| {
            for (out, place) in out.chunks_exact_mut(c).zip(places) {
                match place {
                    Some(row) => out.copy_from_slice(&host.f32_slice()[row * c..][..c]),
                    None => out.fill(0.0),
                }
            }
        },
    );
    f32_tensor(out, (n, c))
}

/// The numbers, where the loops here run on x: elsewhere they stay on their device. A number that is not below n is candle's to refuse.
fn on_host(
    context: Context<'_>,
    x: &Tensor,
    numbers: &Tensor,
    n: usize,
) -> Result<Option<Vec<u32>>> {
    if !context.fused(x) || x.dtype() != DType::F32 || !x.is_contiguous() {
        return Ok(None);
    }
    let numbers = numbers.to_vec1::<u32>()?;
    Ok(numbers
        .iter()
        .all(|number| (*number as usize) < n)
        .then_some(numbers))
}

/// Which row goes to each of n places; none where two go to one.
fn places(numbers: &[u32], n: usize) -> Option<Vec<Option<usize>>> {
    let mut places = vec![None; n];
    let distinct = numbers
        .iter()
        .enumerate()
        .all(|(row, number)| places[*number as usize].replace(row).is_none());
    distinct.then_some(places)
}
