//! B of many products, packed once for all of them. Each product is one thread's, of some rows, into a buffer that stays in its caches.

use std::ops::Range;

use super::tile::{Isa, Part, TileArgs, best};
use super::{Form, Left, Matrix, blocks, even_parts, pack};
use crate::ops::team::each;

/// Columns and rows of a result are padded to a multiple of this: the widest tile's, or a block's.
pub(in crate::ops) const SIDE: usize = 32;

/// A matrix (k, columns) as tiles read it.
pub(in crate::ops) enum Held {
    /// In panels as wide as a tile of vectors.
    Panels {
        isa: &'static Isa,
        values: Vec<f32>,
        k: usize,
        columns: usize,
    },
    Blocks(blocks::Held),
}

impl Held {
    /// What `left` can be multiplied by; holds nothing yet.
    pub(in crate::ops) fn beside(left: &Left<'_>) -> Self {
        match left.packed().map(blocks::Packed::held) {
            Some(held) => Self::Blocks(held),
            None => Self::Panels { isa: best(), values: Vec::new(), k: 0, columns: 0 },
        }
    }

    /// Rows of one product: most of them (they and what they are multiplied by share a second-level cache), and what they are a multiple of.
    pub(in crate::ops) fn rows(&self) -> (usize, usize) {
        match self {
            Self::Panels { .. } => (64, 1),
            Self::Blocks(_) => (128, SIDE),
        }
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(in crate::ops) fn fill(&mut self, matrix: &Matrix<'_>) {
        match self {
            Self::Panels { isa, values, k, columns } => {
                (*k, *columns) = (matrix.rows, matrix.columns);
                let width = isa.columns();
                values.resize(matrix.columns.div_ceil(width) * width * matrix.rows, 0.0);
                each(values.chunks_mut((width * matrix.rows).max(1)).enumerate(), |(index, panel)| {
                    let columns = index * width..((index + 1) * width).min(matrix.columns);
                    pack(isa, matrix, 0..matrix.rows, columns, panel);
                });
            }
            Self::Blocks(held) => held.fill(matrix),
        }
    }

    /// out = rows of `left` times what is held, from a multiple of `rows` on; `out.1` numbers from row to row. What lies beyond the rows and
    /// columns, up to whole `SIDE`s, may be written or not.
    pub(in crate::ops) fn product(&self, left: &Left<'_>, rows: Range<usize>, out: (&mut [f32], usize)) {
        match (self, &left.form) {
            (Self::Panels { .. }, Form::Wide { values, row_stride, column_stride: 1 }) => {
                self.by_vectors(rows.len(), (&values[rows.start * row_stride..], *row_stride), false, out);
            }
            (Self::Blocks(held), Form::Packed(packed)) => held.product(packed, rows, out),
            _ => unreachable!("what is held is packed for its left side, whose rows lie side by side"),
        }
    }

    /// out += the first `rows` rows of `a` times what is held; `a.1` and `out.1` numbers from row to row.
    pub(in crate::ops) fn add_product(&self, rows: usize, a: (&[f32], usize), out: (&mut [f32], usize)) {
        match self {
            Self::Panels { .. } => self.by_vectors(rows, a, true, out),
            Self::Blocks(held) => held.add_product(rows, a, out),
        }
    }

    fn by_vectors(&self, m: usize, (a, a_row): (&[f32], usize), add: bool, (out, out_row): (&mut [f32], usize)) {
        let &Self::Panels { isa, ref values, k: depth, columns } = self else { return };
        let width = isa.columns();
        assert!(m == 0 || a.len() >= (m - 1) * a_row + depth, "every row of a has k numbers");
        assert!(
            m == 0 || out.len() >= (m - 1) * out_row + columns.next_multiple_of(isa.lanes),
            "every row of out has whole vectors"
        );
        let piece = if depth > isa.deepest { isa.piece } else { depth.max(1) };
        for start in (0..depth).step_by(piece) {
            let k = piece.min(depth - start);
            // Half of what a task packs elsewhere: the other half of the cache holds the rows.
            let group = width * (isa.packed / 2 / (k * width)).max(1);
            for first in (0..columns).step_by(group) {
                for rows in even_parts(0..m, isa.rows) {
                    for column in (first..(first + group).min(columns)).step_by(width) {
                        let vectors = (columns - column).min(width).div_ceil(isa.lanes);
                        let b_row = vectors * isa.lanes;
                        let panel = &values[column * depth + start * b_row..][..k * b_row];
                        // SAFETY: these rows and columns lie inside `a` and `out` (checked), and the panel has k rows of whole vectors.
                        unsafe {
                            let a = a.as_ptr().add(rows.start * a_row + start);
                            let part = Part { k, a, a_row, a_column: 1, b: panel.as_ptr(), b_row };
                            let out = (out.as_mut_ptr().add(rows.start * out_row + column), out_row);
                            isa.tile(rows.len(), vectors)(TileArgs::into(&[part], out, add || start > 0));
                        }
                    }
                }
            }
        }
    }
}
