//! Blocked GEMM on vector registers: panels of B, NR wide, are packed by the task that reads them;
//! A is read in place, MR rows at a time, by broadcasts.
//!
//! A task's packed panels fill half of L2 while its strips of A pass over them, and k is cut into
//! blocks (KC) so that they do. Up to `MAX_UNPACKED_ROWS` rows B is read in place too: copying it
//! would take longer than the product.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::microkernel::{Isa, KernelArgs, KernelTerm, MicroKernel, gemm_strip};
use super::panels::Panels;
use super::schedule::{blocks, even_parts, par_for_each_task};
use super::{Form, GemmTerm, Init, Values, pack};
use crate::ops::storage::SendPtr;

/// Tasks of one thread that share the panels it packed.
pub(super) const TASKS_PER_PACK: usize = 8;
/// Pages of B that stay in the TLB while all panels of a task read them, and f32 elements of a 4
/// KiB page.
const TLB_PAGES: usize = 32;
const PAGE_ELEMENTS: usize = 1024;
/// Maximum rows of B packed at a time for all panels of a task, so that those of one panel fit L1.
const MAX_TLB_ROWS: usize = 256;
/// Rows of A up to which row-major f32 B is read in place.
const MAX_UNPACKED_ROWS: usize = 16;
/// Elements of the largest micro-tile, MR x NR, of any instruction set.
const SCRATCH: usize = 14 * 32;

/// out (m, n) = init + the sum of the terms.
pub(super) fn gemm_sum(isa: &'static Isa, terms: &[GemmTerm<'_>], init: Init<'_>, out: &mut [f32]) {
    let m = terms[0].lhs.rows;
    let n = terms[0].rhs.columns;
    // With few rows, tasks start at any vector, and the panels of a cached form do not.
    let prepacked = terms.iter().map(|term| {
        if m > MAX_UNPACKED_ROWS {
            Panels::prepacked(isa, &term.rhs)
        } else {
            None
        }
    });
    let prepacked: Vec<_> = prepacked.collect();
    for (index, k_blocks) in passes(isa, terms).iter().enumerate() {
        let pass = GemmPass {
            id: PASSES.fetch_add(1, Ordering::Relaxed) + 1,
            isa,
            terms,
            prepacked: &prepacked,
            k_blocks,
            init: (index == 0).then_some(init),
            out: SendPtr(out.as_mut_ptr()),
            m,
            n,
        };
        pass.run();
    }
}

/// A block of k of one term.
struct KBlock {
    term: usize,
    k: Range<usize>,
}

/// The blocks of k that each pass over the result sums: one pass if a panel of all terms fits.
fn passes(isa: &Isa, terms: &[GemmTerm<'_>]) -> Vec<Vec<KBlock>> {
    let mut passes: Vec<Vec<KBlock>> = vec![Vec::new()];
    let mut depth = 0;
    for (term, GemmTerm { lhs, rhs }) in terms.iter().enumerate() {
        let length = if lhs.rows <= MAX_UNPACKED_ROWS && rhs.column_stride == 1 {
            tlb_rows(rhs.row_stride)
        } else {
            isa.block_depth(lhs.columns)
        };
        for k in blocks(0..lhs.columns, length) {
            if depth > 0 && depth + k.len() > isa.max_kc {
                passes.push(Vec::new());
                depth = 0;
            }
            depth += k.len();
            if let Some(pass) = passes.last_mut() {
                pass.push(KBlock { term, k });
            }
        }
    }
    passes
}

/// Rows of B on `TLB_PAGES` pages.
fn tlb_rows(row_stride: usize) -> usize {
    (TLB_PAGES * PAGE_ELEMENTS / row_stride.max(1)).clamp(TLB_PAGES, MAX_TLB_ROWS)
}

/// The panels of B that a thread packed last.
#[derive(Default)]
struct PackedPanels {
    values: Vec<f32>,
    pass: u64,
    columns: Range<usize>,
}

thread_local! {
    static PACKED: RefCell<PackedPanels> = RefCell::default();
}

/// Number of passes started, from which each gets the `id` that marks its packed panels.
static PASSES: AtomicU64 = AtomicU64::new(0);

/// One pass over the result.
struct GemmPass<'a> {
    id: u64,
    isa: &'a Isa,
    terms: &'a [GemmTerm<'a>],
    /// Each term's cached form of B.
    prepacked: &'a [Option<&'a Panels>],
    k_blocks: &'a [KBlock],
    /// `None`: continues the sum that the passes before left in `out`.
    init: Option<Init<'a>>,
    out: SendPtr,
    m: usize,
    n: usize,
}

impl GemmPass<'_> {
    fn run(&self) {
        let depth: usize = self.k_blocks.iter().map(|block| block.k.len()).sum();
        let mr = self.isa.mr;
        let nr = self.isa.nr();
        par_for_each_task(
            self.n.div_ceil(nr),
            (self.isa.packed_elements / (depth * nr).max(1)).max(1),
            self.m.div_ceil(mr),
            TASKS_PER_PACK,
            |panels, strips| {
                let columns = panels.start * nr..(panels.end * nr).min(self.n);
                self.task(columns, strips.start * mr..(strips.end * mr).min(self.m));
            },
        );
    }

    /// Computes these rows and columns: whole vectors of few rows from B in place, all else from
    /// packed panels.
    fn task(&self, columns: Range<usize>, rows: Range<usize>) {
        let in_place = |block: &KBlock| {
            let rhs = self.terms[block.term].rhs;
            matches!(rhs.values, Values::F32(_)) && rhs.column_stride == 1
        };
        let mut split = columns.start;
        if self.m <= MAX_UNPACKED_ROWS && self.k_blocks.iter().all(in_place) {
            split += columns.len() / self.isa.lanes * self.isa.lanes;
        }
        self.run_unpacked(columns.start..split, rows.clone());
        if split < columns.end {
            self.run_packed(split..columns.end, rows);
        }
    }

    /// Whole vectors of columns, block by block of k, with B in place.
    fn run_unpacked(&self, columns: Range<usize>, rows: Range<usize>) {
        let lanes = self.isa.lanes;
        let terms = self.k_blocks.iter().zip(self.kernel_terms(rows.start));
        for (index, (block, mut term)) in terms.enumerate() {
            let rhs = self.terms[block.term].rhs;
            let Values::F32(values) = rhs.values else {
                return;
            };
            term.rs_b = rhs.row_stride;
            for columns in blocks(columns.clone(), self.isa.nr()) {
                let column = columns.start;
                let vectors = columns.len() / lanes;
                let (init, rs_init) = if index == 0 {
                    self.init_at(rows.start, column)
                } else {
                    self.sum_at(rows.start, column)
                };
                let b = &values[block.k.start * rhs.row_stride + column..];
                debug_assert!((term.k - 1) * rhs.row_stride + vectors * lanes <= b.len());
                term.b = b.as_ptr();
                // SAFETY: rows, columns and k lie inside A, B and (m, n) buffers; no other task
                // writes these rows and columns.
                unsafe {
                    let args = KernelArgs {
                        terms: &[term],
                        init,
                        rs_init,
                        out: self.out.add(rows.start * self.n + column),
                        rs_out: self.n,
                    };
                    gemm_strip(self.isa, rows.len(), vectors, args);
                }
            }
        }
    }

    /// One term for each k block, with A from `row` on and `b` to be set.
    fn kernel_terms(&self, row: usize) -> impl Iterator<Item = KernelTerm> + '_ {
        self.k_blocks.iter().filter_map(move |block| {
            let Form::Unpacked {
                values,
                row_stride,
                column_stride,
            } = &self.terms[block.term].lhs.form
            else {
                return None;
            };
            Some(KernelTerm {
                k: block.k.len(),
                a: values[row * row_stride + block.k.start * column_stride..].as_ptr(),
                rs_a: *row_stride,
                cs_a: *column_stride,
                b: std::ptr::null(),
                rs_b: 0,
            })
        })
    }

    /// Packs B's columns, unless they are cached or the previous task packed them, and runs the
    /// micro-kernels.
    fn run_packed(&self, columns: Range<usize>, rows: Range<usize>) {
        let panels: Vec<Range<usize>> = blocks(columns.clone(), self.isa.nr()).collect();
        let depth: usize = self.needs_packing().map(|block| block.k.len()).sum();
        PACKED.with_borrow_mut(|packed| {
            if packed.pass != self.id || packed.columns != columns {
                self.pack_panels(depth, &panels, &mut packed.values);
                packed.pass = self.id;
                packed.columns = columns;
            }
            let mut terms = self.panel_terms(depth, &panels, &packed.values, rows.start);
            let count = self.k_blocks.len().max(1);
            for rows in even_parts(rows, self.isa.mr) {
                for (columns, terms) in panels.iter().zip(terms.chunks_mut(count)) {
                    self.run_kernel(&rows, columns, terms);
                    for term in terms {
                        term.a = term.a.wrapping_add(rows.len() * term.rs_a);
                    }
                }
            }
        });
    }

    /// The k blocks of each panel, with A from `row` on and B cached or in `values` as
    /// `pack_panels` left it.
    fn panel_terms(
        &self,
        depth: usize,
        panels: &[Range<usize>],
        values: &[f32],
        row: usize,
    ) -> Vec<KernelTerm> {
        let mut terms = Vec::with_capacity(panels.len() * self.k_blocks.len());
        for (index, columns) in panels.iter().enumerate() {
            let mut packed = &values[index * depth * self.isa.nr()..];
            let width = columns.len().next_multiple_of(self.isa.lanes);
            for (mut term, block) in self.kernel_terms(row).zip(self.k_blocks) {
                let panel = match self.prepacked[block.term] {
                    Some(prepacked) => prepacked.panel(columns, &block.k),
                    None => {
                        let (panel, rest) = packed.split_at(block.k.len() * width);
                        packed = rest;
                        panel
                    }
                };
                term.b = panel.as_ptr();
                term.rs_b = width;
                terms.push(term);
            }
        }
        terms
    }

    /// Blocks of terms without a cached form.
    fn needs_packing(&self) -> impl Iterator<Item = &KBlock> {
        self.k_blocks
            .iter()
            .filter(|block| self.prepacked[block.term].is_none())
    }

    /// Packs these columns of B, panel by panel, all blocks of a panel after each other. A few rows
    /// at a time are read for all panels, so that their pages stay in the TLB.
    fn pack_panels(&self, depth: usize, panels: &[Range<usize>], values: &mut Vec<f32>) {
        let size = depth * self.isa.nr();
        if values.len() < panels.len() * size {
            values.resize(panels.len() * size, 0.0);
        }
        let mut done = 0;
        for KBlock { term, k } in self.needs_packing() {
            let b = &self.terms[*term].rhs;
            let rows_at_once = if b.column_stride == 1 {
                tlb_rows(b.row_stride)
            } else {
                k.len()
            };
            for rows in blocks(k.clone(), rows_at_once) {
                for (columns, panel) in panels.iter().zip(values.chunks_mut(size.max(1))) {
                    let width = columns.len().next_multiple_of(self.isa.lanes);
                    let at = (done + rows.start - k.start) * width;
                    pack(self.isa, b, rows.clone(), columns.clone(), &mut panel[at..]);
                }
            }
            done += k.len();
        }
    }

    /// One micro-tile of the result.
    fn run_kernel(&self, rows: &Range<usize>, columns: &Range<usize>, terms: &[KernelTerm]) {
        let width = columns.len().next_multiple_of(self.isa.lanes);
        let kernel = self.isa.kernel(rows.len(), width / self.isa.lanes);
        let (mut init, mut rs_init) = self.init_at(rows.start, columns.start);
        // SAFETY: rows and k lie inside A, whose slice is the matrix, and panels hold k rows of
        // `width`; no other task writes these rows and columns of `out`. Partial vectors go through
        // `scratch`, which has room for every micro-tile.
        unsafe {
            let out = self.out.add(rows.start * self.n + columns.start);
            if width == columns.len() {
                return self.accumulate(kernel, terms, init, rs_init, out, self.n);
            }
            let mut scratch = [const { MaybeUninit::<f32>::uninit() }; SCRATCH];
            let tile = scratch.as_mut_ptr().cast::<f32>();
            if !init.is_null() {
                for row in 0..rows.len() {
                    let line = tile.add(row * width);
                    line.copy_from_nonoverlapping(init.add(row * rs_init), columns.len());
                    line.add(columns.len())
                        .write_bytes(0, width - columns.len());
                }
                (init, rs_init) = (tile.cast_const(), width);
            }
            self.accumulate(kernel, terms, init, rs_init, tile, width);
            for row in 0..rows.len() {
                let line = tile.add(row * width);
                out.add(row * self.n)
                    .copy_from_nonoverlapping(line, columns.len());
            }
        }
    }

    /// out = init + the terms; few rows sum block by block, as they do with B in place.
    ///
    /// # Safety
    /// As `MicroKernel`'s.
    unsafe fn accumulate(
        &self,
        kernel: MicroKernel,
        terms: &[KernelTerm],
        mut init: *const f32,
        mut rs_init: usize,
        out: *mut f32,
        rs_out: usize,
    ) {
        let at_once = if self.m <= MAX_UNPACKED_ROWS {
            1
        } else {
            terms.len().max(1)
        };
        for terms in terms.chunks(at_once) {
            // SAFETY: the caller's promise.
            unsafe {
                kernel(KernelArgs {
                    terms,
                    init,
                    rs_init,
                    out,
                    rs_out,
                })
            };
            (init, rs_init) = (out.cast_const(), rs_out);
        }
    }

    /// The initial value at (row, column), null for zero, and its row stride.
    fn init_at(&self, row: usize, column: usize) -> (*const f32, usize) {
        let Some(init) = self.init else {
            return self.sum_at(row, column);
        };
        match init.rows_from(row, column, self.n) {
            Some((values, stride)) => (values.as_ptr(), stride),
            None => (std::ptr::null(), 0),
        }
    }

    /// The sum at (row, column) so far, and its row stride.
    fn sum_at(&self, row: usize, column: usize) -> (*const f32, usize) {
        // SAFETY: (row, column) lies in `out`.
        let sum = unsafe { self.out.add(row * self.n + column) };
        (sum.cast_const(), self.n)
    }
}
