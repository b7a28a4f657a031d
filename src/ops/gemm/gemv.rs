//! GEMV: one row times matrices that are contiguous along k, each read once as stored. Generation
//! of one token is this product.
//!
//! Packing pays only if many rows read a panel; here the time is that of reading B from memory.

use super::{Element, Form, GemmTerm, Init, MatRef, Values};
use crate::ops::parallel::par_for_each;
use crate::ops::quantized;
use crate::ops::simd::simd;

/// Approximate number of elements of B per task: long enough for hardware prefetching, short enough
/// to balance threads.
const TASK_ELEMENTS: usize = 32 << 10;

/// Each term's row and B, if every A is one contiguous row and every B is contiguous along k.
pub(super) fn as_gemv<'a>(terms: &'a [GemmTerm<'_>]) -> Option<Vec<(&'a [f32], &'a MatRef<'a>)>> {
    let row = |term: &'a GemmTerm<'_>| match &term.lhs.form {
        Form::Unpacked {
            values,
            column_stride: 1,
            ..
        } if term.lhs.rows == 1 && term.rhs.row_stride == 1 => {
            Some((&values[..term.lhs.columns], &term.rhs))
        }
        _ => None,
    };
    terms.iter().map(row).collect()
}

/// out (n) = init + the sum of a (k) times B (k, n).
pub(super) fn gemv(terms: &[(&[f32], &MatRef<'_>)], init: Init<'_>, out: &mut [f32]) {
    let depth: usize = terms.iter().map(|(a, _)| a.len()).sum();
    let columns = (TASK_ELEMENTS / depth.max(1)).max(1);
    par_for_each(out.chunks_mut(columns).enumerate(), |(task, out)| {
        let first = task * columns;
        match init {
            Init::Zero => out.fill(0.0),
            Init::Bias(row) | Init::Matrix(row) => {
                out.copy_from_slice(&row[first..first + out.len()])
            }
        }
        for (a, b) in terms {
            match b.values {
                Values::F32(values) => add_dots(a, values, b.column_stride, first, out),
                Values::Bf16(values) => add_dots(a, values, b.column_stride, first, out),
                Values::Quantized(values) => quantized::dots(a, values, first, out),
            }
        }
    });
}

/// out += a times B's columns from `first` on.
fn add_dots<T: Element>(a: &[f32], b: &[T], column_stride: usize, first: usize, out: &mut [f32]) {
    simd!(|simd| {
        for (index, out) in out.iter_mut().enumerate() {
            *out += simd.dot(a, &b[(first + index) * column_stride..][..a.len()]);
        }
    });
}
