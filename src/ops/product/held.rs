//! B of many products, packed once for all of them. Each product is one thread's, of some rows, into a buffer that stays in its caches.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use super::panels::Panels;
use super::tile::best;
use super::{Form, Left, Matrix, blocks};

/// Columns and rows of a result are padded to a multiple of this: the widest tile's, or a block's.
pub(in crate::ops) const SIDE: usize = 32;

/// A matrix (k, columns) as tiles read it.
pub(in crate::ops) enum Held {
    Panels(Panels),
    Blocks(blocks::Held),
}

/// How a frozen weight (out, in) is packed for its products, each form at its first and then for good.
#[derive(Default)]
pub(in crate::ops) struct Packings {
    /// As it lies, for gradients, and with rows and columns exchanged, for outputs.
    forms: [OnceLock<Held>; 2],
    /// Some rows after others, each in both forms, for losses.
    words: OnceLock<Vec<[Held; 2]>>,
}

impl Packings {
    /// The form of `matrix`, which is the whole weight or the whole `turned`; none where it was packed for others than `empty` is.
    pub(super) fn of(
        &self,
        turned: bool,
        matrix: &Matrix<'_>,
        empty: &dyn Fn() -> Held,
    ) -> Option<&Held> {
        let held = self.forms[usize::from(turned)].get_or_init(|| Held::of(empty, matrix));
        held.is_like(&empty()).then_some(held)
    }

    /// `count` rows of the weight after others, each turned and as they lie; none as above.
    pub(in crate::ops) fn words(
        &self,
        weight: &Matrix<'_>,
        count: usize,
        empty: &dyn Fn() -> Held,
    ) -> Option<&[[Held; 2]]> {
        let both = |start: usize| {
            let rows = weight.rows(start..(start + count).min(weight.rows));
            [rows.t(), rows].map(|rows| Held::of(empty, &rows))
        };
        let words = self
            .words
            .get_or_init(|| (0..weight.rows).step_by(count).map(both).collect());
        let like = empty();
        words
            .iter()
            .flatten()
            .all(|held| held.is_like(&like))
            .then_some(words)
    }
}

impl fmt::Debug for Packings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Packings")
    }
}

impl Held {
    fn of(empty: &dyn Fn() -> Self, matrix: &Matrix<'_>) -> Self {
        let mut held = empty();
        held.fill(matrix);
        held
    }

    /// Whether both are multiplied by the same A's.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Panels(own), Self::Panels(other)) => own.is_like(other),
            (Self::Blocks(own), Self::Blocks(other)) => own.is_like(other),
            _ => false,
        }
    }

    /// What `left` can be multiplied by; holds nothing yet.
    pub(in crate::ops) fn beside(left: &Left<'_>) -> Self {
        match left.packed().map(blocks::Packed::held) {
            Some(held) => Self::Blocks(held),
            None => Self::Panels(Panels::new(best())),
        }
    }

    /// Rows of one product: most of them (they and what they are multiplied by share a second-level cache), and what they are a multiple of.
    pub(in crate::ops) fn rows(&self) -> (usize, usize) {
        match self {
            Self::Panels(_) => (64, 1),
            Self::Blocks(_) => (128, SIDE),
        }
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(in crate::ops) fn fill(&mut self, matrix: &Matrix<'_>) {
        match self {
            Self::Panels(panels) => panels.fill(matrix),
            Self::Blocks(held) => held.fill(matrix),
        }
    }

    /// out = rows of `left` times what is held, from a multiple of `rows` on; `out.1` numbers from row to row. What lies beyond the rows and
    /// columns, up to whole `SIDE`s, may be written or not.
    pub(in crate::ops) fn product(
        &self,
        left: &Left<'_>,
        rows: Range<usize>,
        out: (&mut [f32], usize),
    ) {
        match (self, &left.form) {
            (
                Self::Panels(panels),
                Form::Wide {
                    values,
                    row_stride,
                    column_stride: 1,
                },
            ) => {
                panels.product(
                    rows.len(),
                    (&values[rows.start * row_stride..], *row_stride),
                    false,
                    out,
                );
            }
            (Self::Blocks(held), Form::Packed(packed)) => held.product(packed, rows, out),
            _ => unreachable!(
                "what is held is packed for its left side, whose rows lie side by side"
            ),
        }
    }

    /// out += the first `rows` rows of `a` times what is held; `a.1` and `out.1` numbers from row to row.
    pub(in crate::ops) fn add_product(
        &self,
        rows: usize,
        a: (&[f32], usize),
        out: (&mut [f32], usize),
    ) {
        match self {
            Self::Panels(panels) => panels.product(rows, a, true, out),
            Self::Blocks(held) => held.add_product(rows, a, out),
        }
    }
}
