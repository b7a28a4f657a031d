//! Matrix products of the fused CPU passes: sums of products in one pass over the result, f32 or bf16 in, f32 out.
//!
//! Takes views of slices with strides; returns f32. Sums are f32; bf16 is upcast while it is packed, except for blocks, which multiply
//! bf16. The instruction set is chosen at run time; the order of a sum depends on it, on k, on B's strides and on the column alone
//! (and on whether A has one row, which meets whole columns as they lie, or few, which go by vectors), never on the number of threads or
//! the shape of the tasks. Knows nothing of tensors, layers or gradients.

#[cfg(target_arch = "x86_64")]
pub(super) mod bf16;
#[cfg(not(target_arch = "x86_64"))]
#[path = "bf16_unsupported.rs"]
mod bf16;
mod gemv;
mod microkernel;
mod pack;
pub(super) mod packed_rhs;
mod panels;

use std::borrow::Cow;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::packed_rhs::PackedRhs;
use self::panels::Panels;
use super::count_flops;
use super::parallel::{num_threads, par_for_each};
use super::storage::{SendPtr, uninit_vec, upcast};
use crate::work::Precision;
#[cfg(test)]
pub(super) use microkernel::{FORCED_ISA, available};
pub(super) use microkernel::{Isa, KernelArgs, KernelTerm, best};
pub(super) use pack::{Element, pack};
pub(super) use packed_rhs::PackedWeightCache;

/// Rows of A that are few: four tiles'.
const SKINNY_ROWS: usize = 64;
/// Tasks of one thread that share what it packed.
const TASKS_PER_PACK: usize = 8;
/// Strips of rows of one task, at least: fewer are not worth packing its panels again.
const MIN_STRIPS: usize = 4;
/// Pages of B that are read for all of a task's panels before the next, and numbers of a page.
const TLB_PAGES: usize = 32;
const PAGE: usize = 1024;
/// Rows of B that are read so at most: a panel of them stays in a first-level cache.
const MAX_TLB_ROWS: usize = 256;
/// Rows of A for which B is not packed, where it can be read as it lies: copying it takes longer than a few rows' product.
const MIN_ROWS_TO_PACK: usize = 16;

/// Elements of either format.
#[derive(Clone, Copy, Debug)]
pub(super) enum CpuSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [half::bf16]),
}

impl<'a> CpuSlice<'a> {
    /// The numbers from number `start` on.
    pub(super) fn after(self, start: usize) -> CpuSlice<'a> {
        match self {
            CpuSlice::F32(values) => CpuSlice::F32(&values[start..]),
            CpuSlice::Bf16(values) => CpuSlice::Bf16(&values[start..]),
        }
    }

    fn len(&self) -> usize {
        match self {
            CpuSlice::F32(values) => values.len(),
            CpuSlice::Bf16(values) => values.len(),
        }
    }

    /// A copy in f32, where they are narrower.
    pub(super) fn upcast(&self) -> Option<Vec<f32>> {
        match self {
            CpuSlice::F32(_) => None,
            CpuSlice::Bf16(values) => Some(upcast(values)),
        }
    }
}

/// A matrix inside a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatRef<'a> {
    values: CpuSlice<'a>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    /// Where packed forms of the whole stay, and whether this is the one with rows and columns exchanged.
    packings: Option<(&'a PackedWeightCache, bool)>,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix.
    pub(super) fn new(values: CpuSlice<'a>, rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix is its slice");
        Self {
            values,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
            packings: None,
        }
    }

    /// The same for a matrix whose packed forms stay in `packings`, if anywhere.
    pub(super) fn with_cache(self, packings: Option<&'a PackedWeightCache>) -> Self {
        Self {
            packings: packings.map(|packings| (packings, false)),
            ..self
        }
    }

    /// Its packed form that stays, packed now where it is the first of its kind; none where nothing stays, or for others than `empty` is.
    fn held(&self, empty: &dyn Fn() -> PackedRhs) -> Option<&'a PackedRhs> {
        let (packings, turned) = self.packings?;
        packings.get_or_pack(turned, self, empty)
    }

    /// A row-major matrix of f32.
    pub(super) fn from_f32(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(CpuSlice::F32(values), rows, columns)
    }

    /// Rows and columns inside a larger matrix: each as how many there are and how far apart they lie, from number `start` on.
    pub(super) fn strided(
        values: CpuSlice<'a>,
        start: usize,
        (rows, row_stride): (usize, usize),
        (columns, column_stride): (usize, usize),
    ) -> Self {
        let last = rows.saturating_sub(1) * row_stride + columns.saturating_sub(1) * column_stride;
        assert!(
            rows * columns == 0 || start + last < values.len(),
            "every number lies inside the matrix"
        );
        Self {
            values: values.after(start),
            rows,
            columns,
            row_stride,
            column_stride,
            packings: None,
        }
    }

    /// These rows.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        Self::strided(
            self.values,
            rows.start * self.row_stride,
            (rows.len(), self.row_stride),
            (self.columns, self.column_stride),
        )
    }

    /// Rows and columns exchanged.
    pub(super) fn t(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            packings: self.packings.map(|(packings, turned)| (packings, !turned)),
        }
    }
}

/// One product of a sum: a (m, k) b (k, n).
#[derive(Clone, Copy)]
pub(super) struct GemmTerm<'a> {
    pub(super) lhs: &'a Lhs<'a>,
    pub(super) rhs: MatRef<'a>,
}

/// A as tiles read it: prepared once, whatever it is multiplied by.
pub(super) struct Lhs<'a> {
    rows: usize,
    columns: usize,
    form: Form<'a>,
}

enum Form<'a> {
    /// f32 with strides.
    Unpacked {
        values: Cow<'a, [f32]>,
        row_stride: usize,
        column_stride: usize,
    },
    /// Packed for blocks.
    Packed(Arc<bf16::Bf16Lhs>),
}

/// A packed for blocks, where that is done: for all products of one matrix.
#[derive(Clone, Default)]
pub(super) struct PackedLhs(Option<Arc<bf16::Bf16Lhs>>);

impl PackedLhs {
    /// Packs A for products in `precision`.
    pub(super) fn new(precision: Precision, a: &MatRef<'_>) -> Self {
        Self::with(best(), precision, a)
    }

    /// What was packed already.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn from_bf16(packed: bf16::Bf16Lhs) -> Self {
        Self(Some(Arc::new(packed)))
    }

    /// What was packed.
    pub(super) fn packed(&self) -> Option<&bf16::Bf16Lhs> {
        self.0.as_deref()
    }

    fn with(isa: &Isa, precision: Precision, a: &MatRef<'_>) -> Self {
        Self(
            isa.gemm_unit(precision)
                .and_then(|unit| bf16::Bf16Lhs::new(unit, a, precision))
                .map(Arc::new),
        )
    }
}

impl<'a> Lhs<'a> {
    /// Prepares A for products in `precision`, by the best instruction set.
    pub(super) fn new(precision: Precision, a: MatRef<'a>) -> Self {
        Self::with(best(), precision, a)
    }

    /// The same for a given instruction set.
    pub(super) fn with(isa: &Isa, precision: Precision, a: MatRef<'a>) -> Self {
        Self::with_packed(a, PackedLhs::with(isa, precision, &a))
    }

    /// (rows, columns) that were packed before.
    pub(super) fn from_packed(rows: usize, columns: usize, prepared: &PackedLhs) -> Option<Self> {
        prepared.0.clone().map(|packed| Self {
            rows,
            columns,
            form: Form::Packed(packed),
        })
    }

    /// The same where it was packed before.
    pub(super) fn with_packed(a: MatRef<'a>, prepared: PackedLhs) -> Self {
        let MatRef {
            values,
            rows,
            columns,
            row_stride,
            column_stride,
            ..
        } = a;
        let form = match (prepared.0, values) {
            (Some(packed), _) => Form::Packed(packed),
            (None, CpuSlice::F32(values)) => Form::Unpacked {
                values: Cow::Borrowed(values),
                row_stride,
                column_stride,
            },
            (None, CpuSlice::Bf16(values)) => Form::Unpacked {
                values: Cow::Owned(upcast(values)),
                row_stride,
                column_stride,
            },
        };
        Self {
            rows,
            columns,
            form,
        }
    }

    fn packed(&self) -> Option<&bf16::Bf16Lhs> {
        match &self.form {
            Form::Packed(packed) => Some(packed),
            Form::Unpacked { .. } => None,
        }
    }
}

/// What the sum starts from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Init<'a> {
    Zero,
    /// The same row (n) in every row: a bias.
    Bias(&'a [f32]),
    /// A row-major (m, n): a residual stream, or what earlier products gave.
    Matrix(&'a [f32]),
}

/// start + the sum of the terms, row-major (m, n), on all threads of the pool.
pub(super) fn gemm_sum(terms: &[GemmTerm<'_>], start: Init<'_>) -> Vec<f32> {
    gemm_sum_with(best(), terms, start)
}

/// The product of two matrices in `precision`.
pub(super) fn gemm(precision: Precision, a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    gemm_sum(
        &[GemmTerm {
            lhs: &Lhs::new(precision, a),
            rhs: b,
        }],
        Init::Zero,
    )
}

/// The same for an A whose rows are an adapter's: in f32, splitting B for tile registers takes longer than multiplying a few rows by it.
pub(super) fn skinny_gemm(precision: Precision, a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    let few = precision == Precision::F32 && a.rows < SKINNY_ROWS;
    let left = if few {
        Lhs::with_packed(a, PackedLhs::default())
    } else {
        Lhs::new(precision, a)
    };
    gemm_sum(&[GemmTerm { lhs: &left, rhs: b }], Init::Zero)
}

/// a times the rows of what was packed as A: (m, `columns`).
pub(super) fn gemm_by_packed(a: MatRef<'_>, b: &bf16::Bf16Lhs, columns: usize) -> Vec<f32> {
    count_flops(1, a.rows, columns, a.columns);
    // SAFETY: the product writes every number.
    let mut out = unsafe { uninit_vec(a.rows * columns) };
    bf16::gemm_by_packed(&a, b, &mut out);
    out
}

/// The sum by a given instruction set, which every A was prepared for.
pub(super) fn gemm_sum_with(
    isa: &'static Isa,
    terms: &[GemmTerm<'_>],
    start: Init<'_>,
) -> Vec<f32> {
    let (m, n) = (terms[0].lhs.rows, terms[0].rhs.columns);
    for GemmTerm { lhs: a, rhs: b } in terms {
        assert!(
            a.rows == m && b.columns == n && a.columns == b.rows,
            "the terms of a sum have one shape"
        );
        count_flops(1, m, n, a.columns);
    }
    match start {
        Init::Bias(row) => assert_eq!(row.len(), n, "a row to start from has n numbers"),
        Init::Matrix(matrix) => {
            assert_eq!(matrix.len(), m * n, "a matrix to start from is (m, n)")
        }
        Init::Zero => {}
    }
    if terms.iter().all(|term| term.lhs.columns == 0) {
        return match start {
            Init::Zero => vec![0.0; m * n],
            Init::Bias(row) => row.repeat(m),
            Init::Matrix(matrix) => matrix.to_vec(),
        };
    }
    // SAFETY: the tasks of the first pass write every number before anything reads one.
    let mut out = unsafe { uninit_vec(m * n) };
    if out.is_empty() {
        return out;
    }
    let packed: Vec<_> = terms
        .iter()
        .filter_map(|term| Some((term.lhs.packed()?, term.rhs)))
        .collect();
    if !packed.is_empty() {
        assert_eq!(
            packed.len(),
            terms.len(),
            "the terms of a sum are prepared alike"
        );
        bf16::gemm_sum(&packed, start, &mut out);
        return out;
    }
    if let Some(rows) = gemv::as_gemv(terms) {
        gemv::gemv(&rows, start, &mut out);
        return out;
    }
    // Where A has few rows, tasks begin at any vector, and not at a panel.
    let kept = terms.iter().map(|term| {
        if m > MIN_ROWS_TO_PACK {
            Panels::kept(isa, &term.rhs)
        } else {
            None
        }
    });
    let kept: Vec<Option<&Panels>> = kept.collect();
    for (index, pieces) in passes(isa, terms).iter().enumerate() {
        let start = if index == 0 { Some(start) } else { None };
        let number = PASSES.fetch_add(1, Ordering::Relaxed) + 1;
        GemmPass {
            number,
            isa,
            terms,
            kept: &kept,
            pieces,
            start,
            out: SendPtr(out.as_mut_ptr()),
            m,
            n,
        }
        .run();
    }
    out
}

/// A run of k of one term.
struct KBlock {
    term: usize,
    k: Range<usize>,
}

/// Which pieces of the terms are summed while a tile's B is packed: all at once where they fit.
fn passes(isa: &Isa, terms: &[GemmTerm<'_>]) -> Vec<Vec<KBlock>> {
    let mut passes: Vec<Vec<KBlock>> = vec![Vec::new()];
    let mut depth = 0;
    for (term, GemmTerm { lhs: a, rhs: b }) in terms.iter().enumerate() {
        let length = match a.rows <= MIN_ROWS_TO_PACK && b.column_stride == 1 {
            true => tlb_rows(b.row_stride),
            false if a.columns > isa.max_kc => isa.kc,
            false => a.columns.max(1),
        };
        for start in (0..a.columns).step_by(length) {
            let k = start..(start + length).min(a.columns);
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

/// What a thread has packed of B, and for which pass and columns.
#[derive(Default)]
struct Packed {
    values: Vec<f32>,
    of: (u64, Range<usize>),
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// Passes that were begun: what is packed for one is of no use to another.
static PASSES: AtomicU64 = AtomicU64::new(0);

/// Cuts a result into tasks of whole panels, at most `most` each, and of strips of rows, and runs them: as many tasks for each thread, of
/// nearly one size. Where a thread's tasks are rows, they come in `turns` for the same panels, one after the other, so that a thread that is
/// held up leaves some to others.
fn tasks(
    panels: usize,
    most: usize,
    (strips, turns): (usize, usize),
    task: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let threads = num_threads();
    // A few panels that do not come out even are better shared by rows, though each part then packs them for itself; and so are panels
    // that are no more than the strips, which then are read by the thread that wrote them.
    let uneven = panels < 8 * threads && !panels.is_multiple_of(threads);
    let by_rows = uneven || panels <= strips && strips >= MIN_STRIPS * threads;
    let splits = if by_rows {
        threads.min(strips.div_ceil(MIN_STRIPS)).max(1)
    } else {
        1
    };
    let groups = panels
        .div_ceil(most)
        .next_multiple_of(threads.div_ceil(splits))
        .min(panels);
    let turns = if splits > 1 {
        turns.min(strips / splits / MIN_STRIPS).max(1)
    } else {
        1
    };
    let cut = |index: usize| {
        let (split, group, turn) = (
            index / turns / groups,
            index / turns % groups,
            index % turns,
        );
        let part = |index: usize| strips * index / (splits * turns);
        let first = split * turns + turn;
        task(
            panels * group / groups..panels * (group + 1) / groups,
            part(first)..part(first + 1),
        );
    };
    match groups * splits * turns {
        1 => cut(0),
        count => par_for_each(0..count, cut),
    }
}

/// One pass over the result.
struct GemmPass<'a> {
    number: u64,
    isa: &'a Isa,
    terms: &'a [GemmTerm<'a>],
    /// Of each term, what was packed of its B before.
    kept: &'a [Option<&'a Panels>],
    pieces: &'a [KBlock],
    /// `None`: goes on from what the passes before left in `out`.
    start: Option<Init<'a>>,
    out: SendPtr,
    m: usize,
    n: usize,
}

impl GemmPass<'_> {
    /// Cuts the result into tasks and runs them.
    fn run(&self) {
        let depth: usize = self.pieces.iter().map(|piece| piece.k.len()).sum();
        let width = self.isa.nr();
        let most = (self.isa.packed_elements / (depth * width).max(1)).max(1);
        let height = self.isa.mr;
        tasks(
            self.n.div_ceil(width),
            most,
            (self.m.div_ceil(height), TASKS_PER_PACK),
            |panels, strips| {
                let rows = strips.start * height..(strips.end * height).min(self.m);
                self.task(panels.start * width..(panels.end * width).min(self.n), rows);
            },
        );
    }

    /// Runs every tile of these rows and columns: whole ones of few rows with B as it lies, else packed.
    fn task(&self, columns: Range<usize>, rows: Range<usize>) {
        let plain = |piece: &KBlock| {
            matches!(
                self.terms[piece.term].rhs,
                MatRef {
                    values: CpuSlice::F32(_),
                    column_stride: 1,
                    ..
                }
            )
        };
        let whole = match self.m <= MIN_ROWS_TO_PACK && self.pieces.iter().all(plain) {
            true => columns.start + columns.len() / self.isa.lanes * self.isa.lanes,
            false => columns.start,
        };
        self.unpacked(columns.start..whole, rows.clone());
        if whole < columns.end {
            self.packed(whole..columns.end, rows);
        }
    }

    /// Whole vectors of columns, the few rows of a piece of B at a time for all of them.
    fn unpacked(&self, columns: Range<usize>, rows: Range<usize>) {
        for (index, (KBlock { term, k }, mut part)) in
            self.pieces.iter().zip(self.parts(rows.start)).enumerate()
        {
            let MatRef {
                values: CpuSlice::F32(right),
                row_stride,
                ..
            } = self.terms[*term].rhs
            else {
                return;
            };
            part.b_row = row_stride;
            for column in columns.clone().step_by(self.isa.nr()) {
                let vectors = (columns.end - column).min(self.isa.nr()) / self.isa.lanes;
                let start = if index == 0 {
                    self.start_of(rows.start, column)
                } else {
                    self.so_far(rows.start, column)
                };
                let right = &right[k.start * row_stride + column..];
                debug_assert!((part.k - 1) * row_stride + vectors * self.isa.lanes <= right.len());
                part.b = right.as_ptr();
                // SAFETY: rows, columns and k lie inside A, B and (m, n) buffers; this task alone writes these rows and columns.
                unsafe {
                    let out = self.out.add(rows.start * self.n + column);
                    strip(self.isa, (rows.len(), vectors), part, start, (out, self.n));
                }
            }
        }
    }

    /// What the pieces multiply, from this row of A on; where B lies is not told yet.
    fn parts(&self, row: usize) -> impl Iterator<Item = KernelTerm> + '_ {
        self.pieces.iter().filter_map(move |KBlock { term, k }| {
            let Form::Unpacked {
                values,
                row_stride,
                column_stride,
            } = &self.terms[*term].lhs.form
            else {
                return None;
            };
            let a = values[row * row_stride + k.start * column_stride..].as_ptr();
            Some(KernelTerm {
                k: k.len(),
                a,
                a_row: *row_stride,
                a_column: *column_stride,
                b: std::ptr::null(),
                b_row: 0,
            })
        })
    }

    /// Packs B's columns, unless they are kept or the task before did, and runs the tiles.
    fn packed(&self, columns: Range<usize>, rows: Range<usize>) {
        PACKED.with_borrow_mut(|Packed { values, of }| {
            let width = self.isa.nr();
            let panels: Vec<Range<usize>> = columns
                .clone()
                .step_by(width)
                .map(|first| first..(first + width).min(columns.end))
                .collect();
            let depth: usize = self.needs_packing().map(|piece| piece.k.len()).sum();
            let key = (self.number, columns);
            if *of != key {
                self.pack(depth, &panels, values);
                *of = key;
            }
            let mut parts = self.panel_parts(depth, &panels, values, rows.start);
            let count = self.pieces.len().max(1);
            for rows in even_parts(rows, self.isa.mr) {
                for (columns, parts) in panels.iter().zip(parts.chunks_mut(count)) {
                    self.tile(&rows, columns, parts);
                    // The same rows of A further on.
                    parts
                        .iter_mut()
                        .for_each(|part| part.a = part.a.wrapping_add(rows.len() * part.a_row));
                }
            }
        });
    }

    /// What the pieces multiply, from this row of A on, for each panel: kept, or among `values`, where `pack` put it.
    fn panel_parts(
        &self,
        depth: usize,
        panels: &[Range<usize>],
        values: &[f32],
        row: usize,
    ) -> Vec<KernelTerm> {
        let mut all = Vec::with_capacity(panels.len() * self.pieces.len());
        for (index, columns) in panels.iter().enumerate() {
            let mut own = &values[index * depth * self.isa.nr()..];
            let width = columns.len().next_multiple_of(self.isa.lanes);
            for (mut part, KBlock { term, k }) in self.parts(row).zip(self.pieces) {
                let panel = match self.kept[*term] {
                    Some(kept) => kept.panel(columns, k),
                    None => {
                        let (panel, others) = own.split_at(k.len() * width);
                        own = others;
                        panel
                    }
                };
                (part.b, part.b_row) = (panel.as_ptr(), width);
                all.push(part);
            }
        }
        all
    }

    /// Pieces of terms whose B is packed for this pass.
    fn needs_packing(&self) -> impl Iterator<Item = &KBlock> {
        self.pieces
            .iter()
            .filter(|piece| self.kept[piece.term].is_none())
    }

    /// Packs these columns of B, piece after piece, a panel after the other.
    fn pack(&self, depth: usize, panels: &[Range<usize>], values: &mut Vec<f32>) {
        let size = depth * self.isa.nr();
        if values.len() < panels.len() * size {
            values.resize(panels.len() * size, 0.0);
        }
        let mut done = 0;
        for KBlock { term, k } in self.needs_packing() {
            let b = &self.terms[*term].rhs;
            let near = if b.column_stride == 1 {
                tlb_rows(b.row_stride)
            } else {
                k.len()
            };
            for start in (k.start..k.end).step_by(near) {
                let rows = start..(start + near).min(k.end);
                for (columns, panel) in panels.iter().zip(values.chunks_mut(size.max(1))) {
                    let at =
                        (done + start - k.start) * columns.len().next_multiple_of(self.isa.lanes);
                    pack(self.isa, b, rows.clone(), columns.clone(), &mut panel[at..]);
                }
            }
            done += k.len();
        }
    }

    /// One tile of the result, over all pieces.
    fn tile(&self, rows: &Range<usize>, columns: &Range<usize>, parts: &[KernelTerm]) {
        let width = columns.len().next_multiple_of(self.isa.lanes);
        let tile = self.isa.kernel(rows.len(), width / self.isa.lanes);
        // SAFETY: this task alone writes these rows and columns of `out`.
        let place = unsafe { self.out.add(rows.start * self.n + columns.start) };
        let (mut start, mut start_row) = self.start_of(rows.start, columns.start);
        // What is not whole vectors begins and ends in a tile of its own.
        let whole = width == columns.len();
        let mut scratch = [const { MaybeUninit::<f32>::uninit() }; SCRATCH];
        let (out, out_row) = if whole {
            (place, self.n)
        } else {
            (scratch.as_mut_ptr().cast::<f32>(), width)
        };
        if !whole && !start.is_null() {
            for row in 0..rows.len() {
                for column in 0..width {
                    // SAFETY: `start` is as large as these rows and columns, `out` as `width`.
                    unsafe {
                        let before = if column < columns.len() {
                            *start.add(row * start_row + column)
                        } else {
                            0.0
                        };
                        out.add(row * width + column).write(before);
                    }
                }
            }
            (start, start_row) = (out.cast_const(), out_row);
        }
        // Few rows sum as where B is not packed, piece by piece.
        for parts in parts.chunks(if self.m <= MIN_ROWS_TO_PACK {
            1
        } else {
            parts.len().max(1)
        }) {
            // SAFETY: rows and k lie inside A, whose slice is the whole matrix; the panel holds k rows of `width`; `start` and `out` are
            // rows of (m, n) buffers or of `scratch`, wide enough because only whole tiles go to `out` directly.
            unsafe {
                tile(KernelArgs {
                    parts,
                    start,
                    start_row,
                    out,
                    out_row,
                })
            };
            (start, start_row) = (out.cast_const(), out_row);
        }
        if !whole {
            for row in 0..rows.len() {
                // SAFETY: inside this task's rows and columns; the tile wrote `out`.
                unsafe {
                    place
                        .add(row * self.n)
                        .copy_from_nonoverlapping(out.add(row * width), columns.len())
                };
            }
        }
    }

    /// Where the sum at (row, column) starts from, and its row stride.
    fn start_of(&self, row: usize, column: usize) -> (*const f32, usize) {
        match self.start {
            Some(Init::Zero) => (std::ptr::null(), 0),
            Some(Init::Bias(values)) => (values[column..].as_ptr(), 0),
            Some(Init::Matrix(values)) => (values[row * self.n + column..].as_ptr(), self.n),
            None => self.so_far(row, column),
        }
    }

    /// The sum at (row, column) as it stands, and its row stride.
    fn so_far(&self, row: usize, column: usize) -> (*const f32, usize) {
        // SAFETY: (row, column) lies in `out`.
        (
            unsafe { self.out.add(row * self.n + column) }.cast_const(),
            self.n,
        )
    }
}

/// Rows of B that lie on `TLB_PAGES` pages.
fn tlb_rows(row_stride: usize) -> usize {
    (TLB_PAGES * PAGE / row_stride.max(1)).clamp(TLB_PAGES, MAX_TLB_ROWS)
}

/// Numbers of the largest tile of any instruction set.
const SCRATCH: usize = 14 * 32;

/// One strip of a product on the calling thread, m rows of `vectors`: `part`, `start` (null for zero) and `out` tell of its first row, the
/// latter two with their row strides.
///
/// # Safety
/// As `Tile`'s, for m rows of `vectors` vectors.
pub(super) unsafe fn strip(
    isa: &Isa,
    (m, vectors): (usize, usize),
    part: KernelTerm,
    (start, start_row): (*const f32, usize),
    (out, out_row): (*mut f32, usize),
) {
    for rows in even_parts(0..m, isa.mr) {
        let first = rows.start;
        let start = if start.is_null() {
            start
        } else {
            start.wrapping_add(first * start_row)
        };
        // SAFETY: the caller's promise; these rows are among the m.
        unsafe {
            let (part, out) = (
                KernelTerm {
                    a: part.a.add(first * part.a_row),
                    ..part
                },
                out.add(first * out_row),
            );
            isa.kernel(rows.len(), vectors)(KernelArgs {
                parts: &[part],
                start,
                start_row,
                out,
                out_row,
            });
        }
    }
}

/// `range` in the fewest parts of at most `most`, whose lengths differ by one at most.
pub(super) fn even_parts(
    range: Range<usize>,
    most: usize,
) -> impl Iterator<Item = Range<usize>> + Clone {
    let (start, length) = (range.start, range.len());
    let parts = length.div_ceil(most);
    (0..parts).map(move |part| start + part * length / parts..start + (part + 1) * length / parts)
}

#[cfg(test)]
mod tests;
