//! One row times matrices whose columns lie one after the other: a frozen W read once, as it is stored, for the next token of a text.
//!
//! Packing pays where many rows read what was packed; one row's product takes as long as reading W from memory.

use super::super::simd::vectorized;
use super::super::team::each;
use super::{Form, Matrix, Number, Start, Term, Values};

/// Numbers of B that a task reads, about: long runs for the processor to read ahead, and tasks enough for every thread.
const READ: usize = 32 << 10;

/// Each term's row and its B, where every A is one row and every B's columns are whole.
pub(super) fn rows<'a>(terms: &'a [Term<'_>]) -> Option<Vec<(&'a [f32], &'a Matrix<'a>)>> {
    let row = |Term { a, b }: &'a Term<'_>| match &a.form {
        Form::Wide {
            values,
            column_stride: 1,
            ..
        } if a.rows == 1 && b.row_stride == 1 => Some((&values[..a.columns], b)),
        _ => None,
    };
    terms.iter().map(row).collect()
}

/// out (n) = start + the sum of the rows times their B.
pub(super) fn products(rows: &[(&[f32], &Matrix<'_>)], start: Start<'_>, out: &mut [f32]) {
    let depth: usize = rows.iter().map(|(a, _)| a.len()).sum();
    let columns = (READ / depth.max(1)).max(1);
    each(out.chunks_mut(columns).enumerate(), |(task, out)| {
        let first = task * columns;
        match start {
            Start::Zero => out.fill(0.0),
            Start::Row(row) | Start::Matrix(row) => {
                out.copy_from_slice(&row[first..first + out.len()])
            }
        }
        for (a, b) in rows {
            match b.values {
                Values::F32(right) => add(a, (right, b), first, out),
                Values::Bf16(right) => add(a, (right, b), first, out),
            }
        }
    });
}

/// out += a times B's columns from `first` on.
fn add<T: Number>(a: &[f32], (right, b): (&[T], &Matrix<'_>), first: usize, out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        |cpu| {
            for (index, out) in out.iter_mut().enumerate() {
                *out += cpu.dot(a, &right[(first + index) * b.column_stride..][..a.len()]);
            }
        },
    );
}
