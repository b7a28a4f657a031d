//! B packed once in panels for vector micro-kernels.

use std::ops::Range;

use super::microkernel::{Isa, KernelArgs, KernelTerm};
use super::packed_rhs::PackedRhs;
use super::schedule::blocks;
use super::{MatMut, MatRef, even_parts, pack, span};
use crate::ops::parallel::par_for_each;

/// B (k, columns) in panels of NR columns; the last is as wide as the vectors that its columns
/// fill.
pub(in crate::ops) struct Panels {
    isa: &'static Isa,
    values: Vec<f32>,
    k: usize,
    columns: usize,
}

impl Panels {
    pub(super) fn new(isa: &'static Isa) -> Self {
        Self {
            isa,
            values: Vec::new(),
            k: 0,
            columns: 0,
        }
    }

    /// The cached panels of `matrix`.
    pub(super) fn prepacked<'a>(isa: &'static Isa, matrix: &MatRef<'a>) -> Option<&'a Self> {
        match matrix.prepacked(&|| PackedRhs::Panels(Self::new(isa)))? {
            PackedRhs::Panels(panels) => Some(panels),
            PackedRhs::Bf16(_) => None,
        }
    }

    /// Whether both are for the same instruction set.
    pub(super) fn is_compatible(&self, other: &Self) -> bool {
        std::ptr::eq(self.isa, other.isa)
    }

    /// Packs `matrix` over the previous contents, in parallel.
    pub(super) fn pack(&mut self, matrix: &MatRef<'_>) {
        (self.k, self.columns) = (matrix.rows, matrix.columns);
        let nr = self.isa.nr();
        self.values
            .resize(matrix.columns.div_ceil(nr) * nr * matrix.rows, 0.0);
        let panels = self.values.chunks_mut((nr * matrix.rows).max(1));
        par_for_each(panels.enumerate(), |(index, panel)| {
            let columns = index * nr..((index + 1) * nr).min(matrix.columns);
            pack(self.isa, matrix, 0..matrix.rows, columns, panel);
        });
    }

    /// out = the first `m` rows of `a` (row-major, `rs_a` elements apart) times B, or out += it, on
    /// this thread.
    pub(super) fn gemm(&self, m: usize, a: &[f32], rs_a: usize, accumulate: bool, out: MatMut<'_>) {
        self.check_room(m, a.len(), rs_a, &out);
        let isa = self.isa;
        let nr = isa.nr();
        let rs_out = out.stride;
        let out = out.values.as_mut_ptr();
        for k in blocks(0..self.k, isa.block_depth(self.k)) {
            // Half as many panels as a packing task has: the rows take the other half of the cache.
            let group = nr * (isa.packed_elements / 2 / (k.len() * nr)).max(1);
            for group in blocks(0..self.columns, group) {
                for rows in even_parts(0..m, isa.mr) {
                    for columns in blocks(group.clone(), nr) {
                        let vectors = columns.len().div_ceil(isa.lanes);
                        // SAFETY: these rows and columns lie inside `a` and `out` (checked), and
                        // the panel has k rows of `vectors`.
                        unsafe {
                            let terms = [KernelTerm {
                                k: k.len(),
                                a: a.as_ptr().add(rows.start * rs_a + k.start),
                                rs_a,
                                cs_a: 1,
                                b: self.panel(&columns, &k).as_ptr(),
                                rs_b: vectors * isa.lanes,
                            }];
                            let out = out.add(rows.start * rs_out + columns.start);
                            let add = accumulate || k.start > 0;
                            let kernel = isa.kernel(rows.len(), vectors);
                            kernel(KernelArgs::new(&terms, out, rs_out, add));
                        }
                    }
                }
            }
        }
    }

    fn check_room(&self, m: usize, a_len: usize, rs_a: usize, out: &MatMut<'_>) {
        let width = self.columns.next_multiple_of(self.isa.lanes);
        assert!(
            span(m, rs_a, self.k).is_some_and(|end| end <= a_len),
            "every row of a has k elements"
        );
        assert!(
            span(m, out.stride, width).is_some_and(|end| end <= out.values.len()),
            "every row of out has room for its vectors"
        );
    }

    /// Rows `k` of the panel of `columns`.
    pub(super) fn panel(&self, columns: &Range<usize>, k: &Range<usize>) -> &[f32] {
        let width = columns.len().next_multiple_of(self.isa.lanes);
        &self.values[columns.start * self.k + k.start * width..][..k.len() * width]
    }
}
