//! Operands of the f32 pass: packed rows of one head, and the GEMMs of one query block x key block
//! tile of scores.
//!
//! Scores are stored as (keys, `QUERY_BLOCK`): S^T = K Q^T. The same buffer serves as the left-hand
//! side in either direction: O += P V and dQ += dS K read its columns, dV += P^T dO and dK += dS^T
//! Q its rows.

use std::ops::Range;

use super::softmax::Panel;
use super::{QUERY_BLOCK, QueryBlock};
use crate::ops::gemm::{
    CpuSlice, Isa, KernelArgs, KernelTerm, MatRef, even_parts, gemm_strip, pack,
};
use crate::ops::simd::simd;

/// Rows and channels of one head inside a (N, `stride`) tensor, from the segment's first row on.
#[derive(Clone, Copy)]
pub(super) struct HeadView<'a> {
    pub(super) values: CpuSlice<'a>,
    pub(super) stride: usize,
    pub(super) d: usize,
}

impl<'a> HeadView<'a> {
    /// Rows of the segment: (rows, d).
    pub(super) fn rows(&self, rows: Range<usize>) -> MatRef<'a> {
        let values = self.values.slice_from(rows.start * self.stride);
        MatRef::strided(values, [rows.len(), self.d], [self.stride, 1])
    }

    /// Packs rows transposed, in f32: panels (d, NR) one after the other, the last as wide as whole
    /// vectors, zero beyond the last row.
    pub(super) fn pack_columns(&self, isa: &Isa, rows: Range<usize>, out: &mut Vec<f32>) {
        out.resize(self.d * rows.len().next_multiple_of(isa.lanes), 0.0);
        let matrix = self.rows(rows.clone()).t();
        for (index, panel) in out.chunks_mut(self.d * isa.nr()).enumerate() {
            let first = index * isa.nr();
            let columns = first..(first + isa.nr()).min(rows.len());
            pack(isa, &matrix, 0..self.d, columns, panel);
        }
    }

    /// Packs rows without a transpose.
    pub(super) fn pack_rows(&self, isa: &Isa, rows: Range<usize>, out: &mut RowBuffer) {
        out.resize(isa, rows.clone(), self.d);
        let matrix = self.rows(rows.clone());
        pack(isa, &matrix, 0..rows.len(), 0..self.d, &mut out.values);
    }
}

/// Rows of one head in f32, padded with zeros to a multiple of the vector length.
#[derive(Default)]
pub(super) struct RowBuffer {
    pub(super) values: Vec<f32>,
    pub(super) width: usize,
    /// Index of the first row in the segment.
    first: usize,
}

impl RowBuffer {
    /// Resizes without clearing.
    fn resize(&mut self, isa: &Isa, rows: Range<usize>, d: usize) {
        self.width = d.next_multiple_of(isa.lanes);
        self.first = rows.start;
        self.values.resize(rows.len() * self.width, 0.0);
    }

    /// Resizes and fills with zeros.
    pub(super) fn clear(&mut self, isa: &Isa, rows: Range<usize>, d: usize) {
        self.values.clear();
        self.resize(isa, rows, d);
    }

    fn contains(&self, rows: &Range<usize>) -> bool {
        self.first <= rows.start && rows.end <= self.first + self.values.len() / self.width
    }

    /// Converts rows of the segment to rows of this buffer.
    pub(super) fn local(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start - self.first..rows.end - self.first
    }

    /// The first `d` channels, indexed by rows of this buffer.
    pub(super) fn view(&self, d: usize) -> HeadView<'_> {
        HeadView {
            values: CpuSlice::F32(&self.values),
            stride: self.width,
            d,
        }
    }

    /// The values from row `row` of the segment on.
    pub(super) fn tail(&self, row: usize) -> &[f32] {
        &self.values[(row - self.first) * self.width..]
    }

    fn tail_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[(row - self.first) * self.width..]
    }

    /// Multiplies row `row` of the segment by `factor`.
    pub(super) fn scale(&mut self, row: usize, factor: f32) {
        let width = self.width;
        let row = &mut self.tail_mut(row)[..width];
        simd!(|_| row.iter_mut().for_each(|x| *x *= factor));
    }

    /// Splits the columns into panels of up to NR: (first column, number of vectors) of each.
    fn panels(&self, isa: &Isa) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (width, nr, lanes) = (self.width, isa.nr(), isa.lanes);
        (0..width)
            .step_by(nr)
            .map(move |first| (first, (width - first).min(nr) / lanes))
    }
}

/// A query block and the keys of one key block that it attends to: scores (keys, `QUERY_BLOCK`),
/// without the micro-tiles that the causal mask hides as a whole.
pub(super) struct ScoreTile<'a> {
    isa: &'a Isa,
    pub(super) queries: Range<usize>,
    keys: Range<usize>,
    /// Rows of micro-tiles: up to MR keys each.
    strips: Vec<Range<usize>>,
    /// Columns of micro-tiles: up to NR queries each, with all strips or, if causal, those that begin
    /// at or before their last query.
    pub(super) panels: Vec<Panel>,
}

impl<'a> ScoreTile<'a> {
    /// `None` where the query block attends to none of these keys.
    pub(super) fn new(
        isa: &'a Isa,
        causal: bool,
        block: &QueryBlock,
        keys: &Range<usize>,
    ) -> Option<Self> {
        let queries = block.queries.clone();
        let keys = block.keys.start.max(keys.start)..block.keys.end.min(keys.end);
        if keys.is_empty() {
            return None;
        }
        let strips: Vec<Range<usize>> = even_parts(keys.clone(), isa.mr).collect();
        let panel = |start: usize| {
            let queries = start..(start + isa.nr()).min(queries.end);
            let seen = |strip: &&Range<usize>| !causal || strip.start < queries.end;
            let end = strips.iter().take_while(seen).last();
            let keys = keys.start..end.map_or(keys.start, |strip| strip.end);
            Panel {
                padding: keys.end,
                keys,
                queries,
                stride: QUERY_BLOCK,
            }
        };
        let panels = queries.clone().step_by(isa.nr()).map(panel).collect();
        Some(Self {
            isa,
            queries,
            keys,
            strips,
            panels,
        })
    }

    /// Column of the panel's first query in the tile.
    pub(super) fn column(&self, panel: &Panel) -> usize {
        panel.queries.start - self.queries.start
    }

    /// Vectors that hold a panel's queries.
    fn vectors(&self, panel: &Panel) -> usize {
        panel.queries.len().div_ceil(self.isa.lanes)
    }

    /// Columns of a panel, rounded up to whole vectors.
    pub(super) fn lanes(&self, panel: &Panel) -> usize {
        self.vectors(panel) * self.isa.lanes
    }

    /// out (keys, queries) = key rows of `rows` times the packed query `columns`, (d, lanes) of
    /// each panel: S^T = K Q^T, dP^T = V dO^T.
    pub(super) fn scores(&self, rows: &RowBuffer, columns: &[f32], d: usize, out: &mut [f32]) {
        let isa = self.isa;
        assert!(rows.contains(&self.keys) && out.len() >= self.keys.len() * QUERY_BLOCK);
        assert!(columns.len() >= d * self.queries.len().next_multiple_of(isa.lanes));
        for keys in &self.strips {
            let seen = |panel: &&Panel| keys.start < panel.keys.end;
            for panel in self.panels.iter().filter(seen) {
                let (column, vectors) = (self.column(panel), self.vectors(panel));
                let out = &mut out[(keys.start - self.keys.start) * QUERY_BLOCK + column..];
                let terms = [KernelTerm {
                    k: d,
                    a: rows.tail(keys.start).as_ptr(),
                    rs_a: rows.width,
                    cs_a: 1,
                    b: columns[d * column..].as_ptr(),
                    rs_b: vectors * isa.lanes,
                }];
                let args = KernelArgs::new(&terms, out.as_mut_ptr(), QUERY_BLOCK, false);
                // SAFETY: `rows` holds every key's row, `columns` d vectors of each panel and `out`
                // a row for each key (checked).
                unsafe { isa.kernel(keys.len(), vectors)(args) };
            }
        }
    }

    /// Query rows of `sum` += scores^T times the key rows of `rows`: O += P V, dQ += dS K.
    pub(super) fn accumulate_queries(&self, scores: &[f32], rows: &RowBuffer, sum: &mut RowBuffer) {
        let isa = self.isa;
        assert!(scores.len() >= self.keys.len() * QUERY_BLOCK && rows.contains(&self.keys));
        assert!(sum.contains(&self.queries) && sum.width == rows.width);
        let width = sum.width;
        for panel in &self.panels {
            for (first, vectors) in rows.panels(isa) {
                let terms = [KernelTerm {
                    k: panel.keys.len(),
                    a: scores[self.column(panel)..].as_ptr(),
                    rs_a: 1,
                    cs_a: QUERY_BLOCK,
                    b: rows.tail(self.keys.start)[first..].as_ptr(),
                    rs_b: width,
                }];
                let out = sum.tail_mut(panel.queries.start)[first..].as_mut_ptr();
                let args = KernelArgs::new(&terms, out, width, true);
                // SAFETY: scores are (keys, QUERY_BLOCK), `rows` holds every key's row and `sum`
                // every query's, both `width` wide (checked).
                unsafe { gemm_strip(isa, panel.queries.len(), vectors, args) };
            }
        }
    }

    /// Key rows of `sum` += scores times the query rows of `rows`: dV += P^T dO, dK += dS^T Q.
    pub(super) fn accumulate_keys(&self, scores: &[f32], rows: &RowBuffer, sum: &mut RowBuffer) {
        let isa = self.isa;
        assert!(scores.len() >= self.keys.len() * QUERY_BLOCK && rows.contains(&self.queries));
        assert!(sum.contains(&self.keys) && sum.width == rows.width);
        let width = sum.width;
        for keys in &self.strips {
            // Panels of queries before a causal strip hold no scores of it.
            let seen = |panel: &&Panel| keys.start < panel.keys.end;
            let Some(panel) = self.panels.iter().find(seen) else {
                continue;
            };
            let column = self.column(panel);
            for (first, vectors) in rows.panels(isa) {
                let scores = &scores[(keys.start - self.keys.start) * QUERY_BLOCK + column..];
                let terms = [KernelTerm {
                    k: self.queries.len() - column,
                    a: scores.as_ptr(),
                    rs_a: QUERY_BLOCK,
                    cs_a: 1,
                    b: rows.tail(self.queries.start + column)[first..].as_ptr(),
                    rs_b: width,
                }];
                let out = sum.tail_mut(keys.start)[first..].as_mut_ptr();
                let args = KernelArgs::new(&terms, out, width, true);
                // SAFETY: scores are (keys, QUERY_BLOCK), `rows` holds every query's row and `sum`
                // every key's, both `width` wide (checked).
                unsafe { isa.kernel(keys.len(), vectors)(args) };
            }
        }
    }
}
