//! One row times matrices whose columns lie one after the other: a frozen W read once, as it is stored, for the next token of a text.
//!
//! Packing pays where many rows read what was packed; one row's product takes as long as reading W from memory.

use super::super::parallel::par_for_each;
use super::super::simd::dispatch;
use super::{CpuSlice, Element, Form, GemmTerm, Init, MatRef};

/// Numbers of B that a task reads, about: long runs for the processor to read ahead, and tasks enough for every thread.
const READ: usize = 32 << 10;

/// Each term's row and its B, where every A is one row and every B's columns are whole.
pub(super) fn as_gemv<'a>(terms: &'a [GemmTerm<'_>]) -> Option<Vec<(&'a [f32], &'a MatRef<'a>)>> {
    let row = |GemmTerm { lhs: a, rhs: b }: &'a GemmTerm<'_>| match &a.form {
        Form::Unpacked {
            values,
            column_stride: 1,
            ..
        } if a.rows == 1 && b.row_stride == 1 => Some((&values[..a.columns], b)),
        _ => None,
    };
    terms.iter().map(row).collect()
}

/// out (n) = start + the sum of the rows times their B.
pub(super) fn gemv(rows: &[(&[f32], &MatRef<'_>)], start: Init<'_>, out: &mut [f32]) {
    let depth: usize = rows.iter().map(|(a, _)| a.len()).sum();
    let columns = (READ / depth.max(1)).max(1);
    par_for_each(out.chunks_mut(columns).enumerate(), |(task, out)| {
        let first = task * columns;
        match start {
            Init::Zero => out.fill(0.0),
            Init::Bias(row) | Init::Matrix(row) => {
                out.copy_from_slice(&row[first..first + out.len()])
            }
        }
        for (a, b) in rows {
            match b.values {
                CpuSlice::F32(right) => add(a, (right, b), first, out),
                CpuSlice::Bf16(right) => add(a, (right, b), first, out),
            }
        }
    });
}

/// out += a times B's columns from `first` on.
fn add<T: Element>(a: &[f32], (right, b): (&[T], &MatRef<'_>), first: usize, out: &mut [f32]) {
    dispatch(
        #[inline(always)]
        |cpu| {
            for (index, out) in out.iter_mut().enumerate() {
                *out += cpu.dot(a, &right[(first + index) * b.column_stride..][..a.len()]);
            }
        },
    );
}
