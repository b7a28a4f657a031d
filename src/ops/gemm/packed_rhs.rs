//! Pre-packed right-hand side, reused across GEMM calls. Each call runs on one thread, for a block
//! of rows that fits its L2 cache.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use super::bf16::{Bf16Lhs, Bf16Rhs};
use super::microkernel::best;
use super::panels::Panels;
use super::{Form, Lhs, MatMut, MatRef};

/// The buffer of a result has its rows and columns rounded up to a multiple of this, the widest
/// micro-tile.
pub(in crate::ops) const PADDING: usize = 32;

/// B (k, n), packed for vector micro-kernels (`Panels`) or for a matrix unit (`Bf16`).
pub(in crate::ops) enum PackedRhs {
    Panels(Panels),
    Bf16(Bf16Rhs),
}

/// The packed forms of a frozen weight (out, in), each made at its first use and never dropped.
#[derive(Default)]
pub(in crate::ops) struct PackedWeightCache {
    /// As stored (for dx), and transposed (for y).
    forms: [OnceLock<PackedRhs>; 2],
    /// Chunks of rows, each transposed and as stored, for the fused linear cross-entropy.
    row_chunks: OnceLock<Vec<[PackedRhs; 2]>>,
}

impl PackedWeightCache {
    /// The packed form of `matrix`, the weight or its transpose. `empty` makes an empty right-hand
    /// side of the wanted format; `None` if the cached one has another format.
    pub(super) fn get_or_pack(
        &self,
        transposed: bool,
        matrix: &MatRef<'_>,
        empty: &dyn Fn() -> PackedRhs,
    ) -> Option<&PackedRhs> {
        let packed = self.forms[usize::from(transposed)]
            .get_or_init(|| PackedRhs::from_matrix(empty, matrix));
        packed.is_compatible(&empty()).then_some(packed)
    }

    /// The weight in chunks of `count` rows, each transposed and as stored. `empty` and the result
    /// `None` are those of `get_or_pack`.
    pub(in crate::ops) fn row_chunks(
        &self,
        weight: &MatRef<'_>,
        count: usize,
        empty: &dyn Fn() -> PackedRhs,
    ) -> Option<&[[PackedRhs; 2]]> {
        let pack_chunk = |start: usize| {
            let rows = weight.row_range(start, (start + count).min(weight.rows));
            [rows.t(), rows].map(|rows| PackedRhs::from_matrix(empty, &rows))
        };
        let chunks = self
            .row_chunks
            .get_or_init(|| (0..weight.rows).step_by(count).map(pack_chunk).collect());
        let wanted = empty();
        let compatible = chunks
            .iter()
            .flatten()
            .all(|rhs| rhs.is_compatible(&wanted));
        compatible.then_some(chunks)
    }
}

impl fmt::Debug for PackedWeightCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackedWeightCache")
    }
}

impl PackedRhs {
    fn from_matrix(empty: &dyn Fn() -> Self, matrix: &MatRef<'_>) -> Self {
        let mut packed = empty();
        packed.pack(matrix);
        packed
    }

    /// Whether both have the same packed format.
    fn is_compatible(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Panels(a), Self::Panels(b)) => a.is_compatible(b),
            (Self::Bf16(a), Self::Bf16(b)) => a.is_compatible(b),
            _ => false,
        }
    }

    /// An empty right-hand side for products with `lhs`.
    pub(in crate::ops) fn for_lhs(lhs: &Lhs<'_>) -> Self {
        match lhs.packed().map(Bf16Lhs::empty_rhs) {
            Some(rhs) => Self::Bf16(rhs),
            None => Self::Panels(Panels::new(best())),
        }
    }

    /// Maximum rows of A in one call of `gemm`: they and the packed panels share L2.
    pub(in crate::ops) fn max_rows(&self) -> usize {
        match self {
            Self::Panels(_) => 64,
            Self::Bf16(_) => 128,
        }
    }

    /// The first row of a call of `gemm` must be a multiple of this.
    pub(in crate::ops) fn row_alignment(&self) -> usize {
        match self {
            Self::Panels(_) => 1,
            Self::Bf16(_) => PADDING,
        }
    }

    /// Packs `matrix` over the previous contents, in parallel.
    pub(in crate::ops) fn pack(&mut self, matrix: &MatRef<'_>) {
        match self {
            Self::Panels(panels) => panels.pack(matrix),
            Self::Bf16(rhs) => rhs.pack(matrix),
        }
    }

    /// out = rows `rows` of `lhs` times B. Rows and columns beyond the product, up to a multiple of
    /// `PADDING`, may be overwritten.
    pub(in crate::ops) fn gemm(&self, lhs: &Lhs<'_>, rows: Range<usize>, out: MatMut<'_>) {
        match (self, &lhs.form) {
            (
                Self::Panels(panels),
                Form::Unpacked {
                    values,
                    row_stride,
                    column_stride: 1,
                },
            ) => panels.gemm(
                rows.len(),
                &values[rows.start * row_stride..],
                *row_stride,
                false,
                out,
            ),
            (Self::Bf16(rhs), Form::Packed(lhs)) => rhs.gemm(lhs, rows, out),
            _ => unreachable!("a right-hand side is packed for its row-major left-hand side"),
        }
    }

    /// out += a (m, k) row-major f32 times B.
    pub(in crate::ops) fn gemm_add(&self, a: MatRef<'_>, out: MatMut<'_>) {
        match (self, a.values) {
            (Self::Panels(panels), super::Values::F32(values)) if a.column_stride == 1 => {
                panels.gemm(a.rows, values, a.row_stride, true, out);
            }
            (Self::Panels(_), _) => unreachable!("sums continue from row-major f32"),
            (Self::Bf16(rhs), _) => rhs.gemm_add(a, out),
        }
    }
}
