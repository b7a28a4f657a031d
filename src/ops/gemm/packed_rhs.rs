//! B of many products, packed once for all of them. Each product is one thread's, of some rows, into a buffer that stays in its caches.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use super::microkernel::best;
use super::panels::Panels;
use super::{Form, Lhs, MatRef, bf16};

/// Columns and rows of a result are padded to a multiple of this: the widest tile's, or a block's.
pub(in crate::ops) const PADDING: usize = 32;

/// A matrix (k, columns) as tiles read it.
pub(in crate::ops) enum PackedRhs {
    Panels(Panels),
    Bf16(bf16::Bf16Rhs),
}

/// How a frozen weight (out, in) is packed for its products, each form at its first and then for good.
#[derive(Default)]
pub(in crate::ops) struct PackedWeightCache {
    /// As it lies, for gradients, and with rows and columns exchanged, for outputs.
    forms: [OnceLock<PackedRhs>; 2],
    /// Some rows after others, each in both forms, for losses.
    row_chunks: OnceLock<Vec<[PackedRhs; 2]>>,
}

impl PackedWeightCache {
    /// The form of `matrix`, which is the whole weight or the whole `turned`; none where it was packed for others than `empty` is.
    pub(super) fn get_or_pack(
        &self,
        turned: bool,
        matrix: &MatRef<'_>,
        empty: &dyn Fn() -> PackedRhs,
    ) -> Option<&PackedRhs> {
        let held =
            self.forms[usize::from(turned)].get_or_init(|| PackedRhs::from_matrix(empty, matrix));
        held.is_compatible(&empty()).then_some(held)
    }

    /// `count` rows of the weight after others, each turned and as they lie; none as above.
    pub(in crate::ops) fn row_chunks(
        &self,
        weight: &MatRef<'_>,
        count: usize,
        empty: &dyn Fn() -> PackedRhs,
    ) -> Option<&[[PackedRhs; 2]]> {
        let both = |start: usize| {
            let rows = weight.rows(start..(start + count).min(weight.rows));
            [rows.t(), rows].map(|rows| PackedRhs::from_matrix(empty, &rows))
        };
        let words = self
            .row_chunks
            .get_or_init(|| (0..weight.rows).step_by(count).map(both).collect());
        let like = empty();
        words
            .iter()
            .flatten()
            .all(|held| held.is_compatible(&like))
            .then_some(words)
    }
}

impl fmt::Debug for PackedWeightCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackedWeightCache")
    }
}

impl PackedRhs {
    fn from_matrix(empty: &dyn Fn() -> Self, matrix: &MatRef<'_>) -> Self {
        let mut held = empty();
        held.pack(matrix);
        held
    }

    /// Whether both are multiplied by the same A's.
    fn is_compatible(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Panels(own), Self::Panels(other)) => own.is_compatible(other),
            (Self::Bf16(own), Self::Bf16(other)) => own.is_compatible(other),
            _ => false,
        }
    }

    /// What `left` can be multiplied by; holds nothing yet.
    pub(in crate::ops) fn for_lhs(left: &Lhs<'_>) -> Self {
        match left.packed().map(bf16::Bf16Lhs::held) {
            Some(held) => Self::Bf16(held),
            None => Self::Panels(Panels::new(best())),
        }
    }

    /// Rows of one product: most of them (they and what they are multiplied by share a second-level cache), and what they are a multiple of.
    pub(in crate::ops) fn rows(&self) -> (usize, usize) {
        match self {
            Self::Panels(_) => (64, 1),
            Self::Bf16(_) => (128, PADDING),
        }
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(in crate::ops) fn pack(&mut self, matrix: &MatRef<'_>) {
        match self {
            Self::Panels(panels) => panels.pack(matrix),
            Self::Bf16(held) => held.pack(matrix),
        }
    }

    /// out = rows of `left` times what is held, from a multiple of `rows` on; `out.1` numbers from row to row. What lies beyond the rows and
    /// columns, up to whole `PADDING`s, may be written or not.
    pub(in crate::ops) fn gemm(
        &self,
        left: &Lhs<'_>,
        rows: Range<usize>,
        out: (&mut [f32], usize),
    ) {
        match (self, &left.form) {
            (
                Self::Panels(panels),
                Form::Unpacked {
                    values,
                    row_stride,
                    column_stride: 1,
                },
            ) => {
                panels.gemm(
                    rows.len(),
                    (&values[rows.start * row_stride..], *row_stride),
                    false,
                    out,
                );
            }
            (Self::Bf16(held), Form::Packed(packed)) => held.gemm(packed, rows, out),
            _ => unreachable!(
                "what is held is packed for its left side, whose rows lie side by side"
            ),
        }
    }

    /// out += the first `rows` rows of `a` times what is held; `a.1` and `out.1` numbers from row to row.
    pub(in crate::ops) fn gemm_add(
        &self,
        rows: usize,
        a: (&[f32], usize),
        out: (&mut [f32], usize),
    ) {
        match self {
            Self::Panels(panels) => panels.gemm(rows, a, true, out),
            Self::Bf16(held) => held.gemm_add(rows, a, out),
        }
    }
}
