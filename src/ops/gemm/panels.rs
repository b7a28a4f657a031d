//! B as tiles of vectors read it, for more than one product.

use std::ops::Range;

use super::microkernel::{Isa, KernelArgs, KernelTerm};
use super::packed_rhs::PackedRhs;
use super::{MatRef, even_parts, pack};
use crate::ops::parallel::par_for_each;

/// A matrix (k, columns) in panels as wide as a tile of vectors, the last as wide as whole vectors that hold its columns.
pub(in crate::ops) struct Panels {
    isa: &'static Isa,
    values: Vec<f32>,
    k: usize,
    columns: usize,
}

impl Panels {
    /// Holds nothing yet.
    pub(super) fn new(isa: &'static Isa) -> Self {
        Self {
            isa,
            values: Vec::new(),
            k: 0,
            columns: 0,
        }
    }

    /// Those of `matrix` that stay.
    pub(super) fn kept<'a>(isa: &'static Isa, matrix: &MatRef<'a>) -> Option<&'a Self> {
        match matrix.held(&|| PackedRhs::Panels(Self::new(isa)))? {
            PackedRhs::Panels(panels) => Some(panels),
            PackedRhs::Bf16(_) => None,
        }
    }

    /// Whether they are for one instruction set.
    pub(super) fn is_compatible(&self, other: &Self) -> bool {
        std::ptr::eq(self.isa, other.isa)
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(super) fn pack(&mut self, matrix: &MatRef<'_>) {
        (self.k, self.columns) = (matrix.rows, matrix.columns);
        let width = self.isa.nr();
        self.values
            .resize(matrix.columns.div_ceil(width) * width * matrix.rows, 0.0);
        par_for_each(
            self.values
                .chunks_mut((width * matrix.rows).max(1))
                .enumerate(),
            |(index, panel)| {
                let columns = index * width..((index + 1) * width).min(matrix.columns);
                pack(self.isa, matrix, 0..matrix.rows, columns, panel);
            },
        );
    }

    /// The first `m` rows of `a` times this, into `out` or added to it.
    pub(super) fn gemm(
        &self,
        m: usize,
        (a, a_row): (&[f32], usize),
        add: bool,
        (out, out_row): (&mut [f32], usize),
    ) {
        let &Self {
            isa,
            k: depth,
            columns,
            ..
        } = self;
        let width = isa.nr();
        assert!(
            m == 0 || a.len() >= (m - 1) * a_row + depth,
            "every row of a has k numbers"
        );
        assert!(
            m == 0 || out.len() >= (m - 1) * out_row + columns.next_multiple_of(isa.lanes),
            "every row of out has whole vectors"
        );
        let piece = if depth > isa.max_kc {
            isa.kc
        } else {
            depth.max(1)
        };
        for start in (0..depth).step_by(piece) {
            let k = piece.min(depth - start);
            // Half of what a task packs elsewhere: the other half of the cache holds the rows.
            let group = width * (isa.packed_elements / 2 / (k * width)).max(1);
            for first in (0..columns).step_by(group) {
                for rows in even_parts(0..m, isa.mr) {
                    for column in (first..(first + group).min(columns)).step_by(width) {
                        let vectors = (columns - column).min(width).div_ceil(isa.lanes);
                        let panel = self.panel(
                            &(column..(column + width).min(columns)),
                            &(start..start + k),
                        );
                        // SAFETY: these rows and columns lie inside `a` and `out` (checked), and the panel has k rows of whole vectors.
                        unsafe {
                            let a = a.as_ptr().add(rows.start * a_row + start);
                            let part = KernelTerm {
                                k,
                                a,
                                a_row,
                                a_column: 1,
                                b: panel.as_ptr(),
                                b_row: vectors * isa.lanes,
                            };
                            let out =
                                (out.as_mut_ptr().add(rows.start * out_row + column), out_row);
                            isa.kernel(rows.len(), vectors)(KernelArgs::new(
                                &[part],
                                out,
                                add || start > 0,
                            ));
                        }
                    }
                }
            }
        }
    }

    /// The rows `k` of the panel of `columns`, each as wide as whole vectors.
    pub(super) fn panel(&self, columns: &Range<usize>, k: &Range<usize>) -> &[f32] {
        let row = columns.len().next_multiple_of(self.isa.lanes);
        &self.values[columns.start * self.k + k.start * row..][..k.len() * row]
    }
}
