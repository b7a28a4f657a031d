//! Splits the columns of a fused projection into its parts, and joins them again.
//!
//! A fused row holds G groups, each with the columns of every part in turn: `[q|k|v]` with one group
//! (Phi-3, GPT-2), `[h][q,k,v]` with one group a head (GPT-NeoX).

use std::ops::Range;

use candle_core::{DType, Tensor};
use half::bf16;

use super::gemm::{CpuSlice, Element};
use super::parallel::par_for_each;
use super::storage::{CpuTensor, cast_into, check_dims, f32_tensor, uninit_vec};
use super::{Context, Path, new_tensor};
use crate::error::Result;
use crate::work::{Precision, Work};

/// Groups of a parallel task: a whole part of a row, or one head of it.
const GROUPS_PER_TASK: usize = 64;

/// Work of splitting or joining (n, c).
pub fn columns_cost(n: usize, c: usize) -> Work {
    Work::sweep(8 * n * c, 0)
}

/// x (N, G sum(widths)) in f32 -> one part (N, G width) for each of `widths`.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, join_columns, split_columns};
/// # use wattune::work::{Precision, WorkCounter};
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let x = Tensor::new(&[[1f32, 2., 3., 4., 5., 6.]], &Device::Cpu)?;
/// let parts = split_columns(context, &x, 2, &[1, 2])?; // two groups of 1 + 2 columns
/// assert_eq!(parts[0].to_vec2::<f32>()?, [[1., 4.]]);
/// assert_eq!(parts[1].to_vec2::<f32>()?, [[2., 3., 5., 6.]]);
/// assert_eq!(join_columns(context, &parts, 2)?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
/// # Ok::<(), wattune::error::Error>(())
/// ```
pub fn split_columns(
    context: Context<'_>,
    x: &Tensor,
    groups: usize,
    widths: &[usize],
) -> Result<Vec<Tensor>> {
    let (n, c) = x.dims2()?;
    let group: usize = widths.iter().sum();
    check_dims("x", &[n, c], &[n, groups * group])?;
    context.counter.add(columns_cost(n, c));
    let starts = widths.iter().scan(0, |end, width| {
        *end += width;
        Some(*end - width)
    });
    let part = |(start, width): (usize, &usize)| {
        if context.path(x) == Path::Cpu {
            return copy_part(x, start..start + width, group);
        }
        let part = x.reshape((n, groups, group))?.narrow(2, start, *width)?;
        Ok(part.contiguous()?.reshape((n, groups * width))?)
    };
    starts.zip(widths).map(part).collect()
}

/// The columns `part` of each group of x (N, G group).
fn copy_part(x: &Tensor, part: Range<usize>, group: usize) -> Result<Tensor> {
    let (n, c) = x.dims2()?;
    let columns = c / group * part.len();
    let host = CpuTensor::borrow_f32(x)?;
    // SAFETY: the loop writes every element.
    let mut y: Vec<f32> = unsafe { uninit_vec(n * columns) };
    let tasks = y.chunks_mut(part.len() * GROUPS_PER_TASK);
    let inputs = host.f32_slice().chunks(group * GROUPS_PER_TASK);
    par_for_each(tasks.zip(inputs), |(y, x)| {
        let groups = y.chunks_exact_mut(part.len()).zip(x.chunks_exact(group));
        groups.for_each(|(y, x)| y.copy_from_slice(&x[part.clone()]));
    });
    f32_tensor(y, (n, columns))
}

/// The parts (N, G width), each in f32 or bf16 -> (N, G sum(widths)), on the CPU in the compute
/// type: the adjoint of `split_columns`.
pub fn join_columns(context: Context<'_>, parts: &[Tensor], groups: usize) -> Result<Tensor> {
    let (n, _) = parts[0].dims2()?;
    let mut c = 0;
    for part in parts {
        let columns = part.dims2()?.1;
        check_dims("part", part.dims(), &[n, columns / groups * groups])?;
        c += columns;
    }
    context.counter.add(columns_cost(n, c));
    if context.path(&parts[0]) == Path::Cpu {
        // SAFETY: `join_into` writes every element.
        return unsafe {
            match context.precision {
                Precision::Bf16 => new_tensor((n, c), |y: &mut [bf16]| join_into(parts, groups, y)),
                Precision::F32 | Precision::F16 => {
                    new_tensor((n, c), |y: &mut [f32]| join_into(parts, groups, y))
                }
            }
        };
    }
    let grouped = |part: &Tensor| part.to_dtype(DType::F32)?.reshape((n, groups, ()));
    let parts = parts
        .iter()
        .map(grouped)
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 2)?.reshape((n, c))?)
}

/// Writes the parts (n, G width) to the rows of y.
fn join_into<Y: Element>(parts: &[Tensor], groups: usize, y: &mut [Y]) -> Result<()> {
    let group = y.len() / parts[0].dims2()?.0 / groups;
    let mut start = 0;
    for part in parts {
        let host = CpuTensor::borrow(part)?;
        let columns = start..start + part.dims2()?.1 / groups;
        start = columns.end;
        match host.slice() {
            CpuSlice::F32(x) => place(x, columns, group, y),
            CpuSlice::Bf16(x) => place(x, columns, group, y),
        }
    }
    Ok(())
}

/// Writes x to `columns` of each group of y.
fn place<X: Element, Y: Element>(x: &[X], columns: Range<usize>, group: usize, y: &mut [Y]) {
    let tasks = y.chunks_mut(group * GROUPS_PER_TASK);
    let inputs = x.chunks(columns.len() * GROUPS_PER_TASK);
    par_for_each(tasks.zip(inputs), |(y, x)| {
        let groups = y.chunks_exact_mut(group).zip(x.chunks_exact(columns.len()));
        groups.for_each(|(y, x)| cast_into(&mut y[columns.clone()], x));
    });
}
