//! CPU matrix products (GEMM): sums of products in one pass over the result; f32 or bf16 in, f32
//! out.
//!
//! Packs panels and runs register-tiled micro-kernels as BLIS does (Van Zee and van de Geijn 2015,
//! "BLIS: A Framework for Rapidly Instantiating BLAS Functionality"), chosen at run time for the
//! instruction set. bf16 is upcast while it is packed, or multiplied as bf16 by AMX or AVX512-BF16
//! (`bf16`). m = 1 takes the GEMV path (`gemv`), small m the unpacked path (`blocked`).
//!
//! Takes strided views of slices. The order of accumulation depends on the instruction set, on k,
//! on B's strides, on the column, and on which of these paths m selects; never on the number of
//! threads. Knows nothing of tensors, layers or gradients.

#[cfg(target_arch = "x86_64")]
pub(super) mod bf16;
#[cfg(not(target_arch = "x86_64"))]
#[path = "bf16_unsupported.rs"]
mod bf16;
mod blocked;
mod element;
mod gemv;
mod matrix;
mod microkernel;
mod pack;
pub(super) mod packed_rhs;
mod panels;
mod schedule;

use std::borrow::Cow;
use std::sync::Arc;

use self::bf16::Bf16Lhs;
use self::matrix::{area, span};
use super::count_flops;
use super::storage::{cast_vec, uninit_vec};
use crate::work::Precision;
pub(super) use element::Element;
pub(super) use matrix::{CpuSlice, MatMut, MatRef, Values};
#[cfg(test)]
pub(super) use microkernel::{FORCED_ISA, available};
pub(super) use microkernel::{Isa, KernelArgs, KernelTerm, best, gemm_strip};
pub(super) use pack::pack;
pub(super) use packed_rhs::PackedWeightCache;
pub(super) use schedule::even_parts;

/// Rows of A below which an f32 product is skinny.
const SKINNY_ROWS: usize = 64;

/// One product of a sum: lhs (m, k) times rhs (k, n).
#[derive(Clone, Copy)]
pub(super) struct GemmTerm<'a> {
    pub(super) lhs: &'a Lhs<'a>,
    pub(super) rhs: MatRef<'a>,
}

/// A left-hand side as micro-kernels read it, prepared once for any number of products.
pub(super) struct Lhs<'a> {
    rows: usize,
    columns: usize,
    form: Form<'a>,
}

enum Form<'a> {
    /// Strided f32, read in place by broadcasts.
    Unpacked {
        values: Cow<'a, [f32]>,
        row_stride: usize,
        column_stride: usize,
    },
    /// Packed for a matrix unit.
    Packed(Arc<Bf16Lhs>),
}

/// A left-hand side packed for a matrix unit, shared by all products of one matrix; `None` if no
/// unit multiplies it.
#[derive(Clone, Default)]
pub(super) struct PackedLhs(Option<Arc<Bf16Lhs>>);

impl PackedLhs {
    /// Packs A for products in `precision`.
    pub(super) fn new(precision: Precision, a: &MatRef<'_>) -> Self {
        Self::with_isa(best(), precision, a)
    }

    /// From blocks that were written directly in packed form.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn from_bf16(packed: Bf16Lhs) -> Self {
        Self(Some(Arc::new(packed)))
    }

    /// The packed form, if there is one.
    pub(super) fn packed(&self) -> Option<&Bf16Lhs> {
        self.0.as_deref()
    }

    fn with_isa(isa: &Isa, precision: Precision, a: &MatRef<'_>) -> Self {
        let packed = isa
            .gemm_unit(precision)
            .and_then(|unit| Bf16Lhs::new(unit, a, precision));
        Self(packed.map(Arc::new))
    }
}

impl<'a> Lhs<'a> {
    /// Prepares A for products in `precision` on the best instruction set.
    pub(super) fn new(precision: Precision, a: MatRef<'a>) -> Self {
        Self::with_isa(best(), precision, a)
    }

    fn with_isa(isa: &Isa, precision: Precision, a: MatRef<'a>) -> Self {
        Self::with_packed(a, PackedLhs::with_isa(isa, precision, &a))
    }

    /// A (rows, columns) from its packed form alone; `None` if that is empty.
    pub(super) fn from_packed(rows: usize, columns: usize, packed: &PackedLhs) -> Option<Self> {
        packed.0.clone().map(|packed| Self {
            rows,
            columns,
            form: Form::Packed(packed),
        })
    }

    /// A with its packed form, or in f32 if that is empty.
    pub(super) fn with_packed(a: MatRef<'a>, packed: PackedLhs) -> Self {
        let unpacked = |values| Form::Unpacked {
            values,
            row_stride: a.row_stride,
            column_stride: a.column_stride,
        };
        let form = match (packed.0, a.values) {
            (Some(packed), _) => Form::Packed(packed),
            (None, Values::F32(values)) => unpacked(Cow::Borrowed(values)),
            (None, Values::Bf16(values)) => unpacked(Cow::Owned(cast_vec(values))),
            (None, Values::Quantized(values)) => unpacked(Cow::Owned(values.to_vec())),
        };
        Self {
            rows: a.rows,
            columns: a.columns,
            form,
        }
    }

    fn packed(&self) -> Option<&Bf16Lhs> {
        match &self.form {
            Form::Packed(packed) => Some(packed),
            Form::Unpacked { .. } => None,
        }
    }
}

/// The initial value of a sum.
#[derive(Clone, Copy, Debug)]
pub(super) enum Init<'a> {
    Zero,
    /// A bias (n), added to every row.
    Bias(&'a [f32]),
    /// A row-major (m, n): a residual stream or an earlier sum.
    Matrix(&'a [f32]),
}

impl<'a> Init<'a> {
    fn check(self, m: usize, n: usize) {
        match self {
            Init::Zero => {}
            Init::Bias(bias) => assert_eq!(bias.len(), n, "a bias is (n)"),
            Init::Matrix(matrix) => {
                assert_eq!(matrix.len(), area(m, n), "an initial matrix is (m, n)")
            }
        }
    }

    /// The value as a row-major (m, n).
    fn to_vec(self, m: usize, n: usize) -> Vec<f32> {
        match self {
            Init::Zero => vec![0.0; area(m, n)],
            Init::Bias(bias) => bias.repeat(m),
            Init::Matrix(matrix) => matrix.to_vec(),
        }
    }

    /// The elements from (row, column) of (m, n) on and their row stride; `None` for zero.
    fn rows_from(self, row: usize, column: usize, n: usize) -> Option<(&'a [f32], usize)> {
        match self {
            Init::Zero => None,
            Init::Bias(bias) => Some((&bias[column..], 0)),
            Init::Matrix(matrix) => Some((&matrix[row * n + column..], n)),
        }
    }
}

/// init + the sum of the terms, row-major (m, n), in parallel.
pub(super) fn gemm_sum(terms: &[GemmTerm<'_>], init: Init<'_>) -> Vec<f32> {
    gemm_sum_with(best(), terms, init)
}

/// a b in `precision`.
pub(super) fn gemm(precision: Precision, a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    let lhs = &Lhs::new(precision, a);
    gemm_sum(&[GemmTerm { lhs, rhs: b }], Init::Zero)
}

/// a b for an `a` of few rows, such as an adapter's rank. In f32, splitting B into bf16 planes
/// would cost more than such a product.
pub(super) fn skinny_gemm(precision: Precision, a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    if precision == Precision::F32 && a.rows < SKINNY_ROWS {
        let lhs = &Lhs::with_packed(a, PackedLhs::default());
        return gemm_sum(&[GemmTerm { lhs, rhs: b }], Init::Zero);
    }
    gemm(precision, a, b)
}

/// a (m, k) times b (k, `columns`), which was packed as a left-hand side.
pub(super) fn gemm_by_packed(a: MatRef<'_>, b: &Bf16Lhs, columns: usize) -> Vec<f32> {
    count_flops(1, a.rows, columns, a.columns);
    // SAFETY: the product writes every element.
    let mut out = unsafe { uninit_vec(area(a.rows, columns)) };
    bf16::gemm_by_packed(&a, b, &mut out);
    out
}

/// `gemm_sum` on an instruction set that every left-hand side was prepared for.
fn gemm_sum_with(isa: &'static Isa, terms: &[GemmTerm<'_>], init: Init<'_>) -> Vec<f32> {
    let m = terms[0].lhs.rows;
    let n = terms[0].rhs.columns;
    for GemmTerm { lhs, rhs } in terms {
        assert!(
            lhs.rows == m && rhs.columns == n && lhs.columns == rhs.rows,
            "the terms of a sum have one shape"
        );
        count_flops(1, m, n, lhs.columns);
    }
    init.check(m, n);
    if terms.iter().all(|term| term.lhs.columns == 0) {
        return init.to_vec(m, n);
    }
    // SAFETY: every path below writes all elements before it reads one.
    let mut out = unsafe { uninit_vec(area(m, n)) };
    if out.is_empty() {
        return out;
    }
    let packed: Vec<_> = terms
        .iter()
        .filter_map(|term| Some((term.lhs.packed()?, term.rhs)))
        .collect();
    if !packed.is_empty() {
        assert_eq!(packed.len(), terms.len(), "a sum's terms are packed alike");
        bf16::gemm_sum(&packed, init, &mut out);
    } else if let Some(rows) = gemv::as_gemv(terms) {
        gemv::gemv(&rows, init, &mut out);
    } else {
        blocked::gemm_sum(isa, terms, init, &mut out);
    }
    out
}

#[cfg(test)]
mod tests;
