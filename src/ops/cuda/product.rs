//! Matrix products by cuBLAS, with bf16 inputs and f32 results, without copies of transposed operands.

use candle_core::{DType, Tensor};

use super::backend;
use super::launch::{first_address, output};
use crate::error::{Error, Kind, Result};

/// An operand as cuBLAS takes it, which counts by columns: `transposed` if the matrix is stored by columns of ours.
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "for a backend")
)]
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) transposed: bool,
    pub(super) leading: usize,
}

/// C (n, m) = A B by columns, that is our y (m, n) = b^T a^T with a and b swapped; A (n, k), B (k, m).
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "for a backend")
)]
#[derive(Clone, Copy)]
pub(super) struct Gemm {
    pub(super) a: Operand,
    pub(super) b: Operand,
    /// Of both operands.
    pub(super) dtype: DType,
    /// Rows of C, columns of C, and the length of the sums.
    pub(super) sizes: [usize; 3],
    /// f32, leading dimension `sizes[0]`.
    pub(super) c: u64,
}

/// A matrix and whether it is stored by columns, without a copy where its rows or columns are dense.
fn stored(x: &Tensor, dtype: DType) -> Result<(Tensor, bool)> {
    let (rows, columns) = x.dims2()?;
    let by_columns = |x: &Tensor| x.stride()[0] == 1 && rows > 1 && x.stride()[1] >= rows;
    let by_rows = |x: &Tensor| x.stride()[1] == 1 && x.stride()[0] >= columns;
    if by_columns(x) {
        // A cast of the transpose reads and writes along the memory.
        return Ok((x.t()?.to_dtype(dtype)?, true));
    }
    let x = x.to_dtype(dtype)?;
    if by_rows(&x) {
        return Ok((x, false));
    }
    Ok((x.contiguous()?, false))
}

/// a (m, k) b (k, n) -> (m, n) in f32, with both rounded to `dtype`.
pub(in crate::ops) fn product(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    let (m, k) = a.dims2()?;
    let n = b.dims2()?.1;
    let device = a.device();
    let (a, a_by_columns) = stored(a, dtype)?;
    let (b, b_by_columns) = stored(b, dtype)?;
    if m == 0 || n == 0 || k == 0 {
        return Ok(Tensor::zeros((m, n), DType::F32, device)?);
    }
    let y = output(device, DType::F32, (m, n))?;
    let operand = |x: &Tensor, by_columns| -> Result<Operand> {
        Ok(Operand {
            address: first_address(x)?,
            transposed: by_columns,
            leading: x.stride()[0].max(x.dims2()?.1),
        })
    };
    let gemm = Gemm {
        a: operand(&b, b_by_columns)?,
        b: operand(&a, a_by_columns)?,
        dtype,
        sizes: [n, m, k],
        c: first_address(&y)?,
    };
    for size in [m, n, k, gemm.a.leading, gemm.b.leading] {
        if i32::try_from(size).is_err() {
            return Err(
                Error::new(Kind::Tensor, "a product is too large for cuBLAS")
                    .value(size.to_string())
                    .rule("sizes below 2^31"),
            );
        }
    }
    backend::gemm(device, &gemm)?;
    Ok(y)
}
