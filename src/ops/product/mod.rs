//! Matrix products of the fused CPU passes: sums of products in one pass over the result, f32 or bf16 in, f32 out.
//!
//! Takes views of slices with strides; returns f32. Sums are f32; bf16 is widened while it is packed, except for blocks, which multiply
//! bf16. The instruction set is chosen at run time; the order of a sum depends on it, on k, on B's strides and on the column alone
//! (and on whether A has one row, which meets whole columns as they lie, or few, which go by vectors), never on the number of threads or
//! the shape of the tasks. Knows nothing of tensors, layers or gradients.

#[cfg(target_arch = "x86_64")]
pub(super) mod blocks;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_blocks.rs"]
mod blocks;
pub(super) mod held;
mod pack;
mod panels;
mod row;
mod tile;

use std::borrow::Cow;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;

use self::held::Held;
use self::panels::Panels;
use super::host::{Shared, uninitialized, widen};
use super::issue;
use super::team::{each, threads};
use crate::work::Precision;
pub(super) use held::Packings;
pub(super) use pack::{Number, pack};
#[cfg(test)]
pub(super) use tile::{CHOSEN, available};
pub(super) use tile::{Isa, Part, TileArgs, best};

/// Rows of A that are few: four tiles'.
const FEW: usize = 64;
/// Tasks of one thread that share what it packed.
const TURNS: usize = 8;
/// Strips of rows of one task, at least: fewer are not worth packing its panels again.
const LEAST_STRIPS: usize = 4;
/// Pages of B that are read for all of a task's panels before the next, and numbers of a page.
const NEAR_PAGES: usize = 32;
const PAGE: usize = 1024;
/// Rows of B that are read so at most: a panel of them stays in a first-level cache.
const MOST_NEAR: usize = 256;
/// Rows of A for which B is not packed, where it can be read as it lies: copying it takes longer than a few rows' product.
const UNPACKED: usize = 16;

/// Stored numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// The numbers from number `start` on.
    pub(super) fn after(self, start: usize) -> Values<'a> {
        match self {
            Values::F32(values) => Values::F32(&values[start..]),
            Values::Bf16(values) => Values::Bf16(&values[start..]),
        }
    }

    fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    /// A copy in f32, where they are narrower.
    pub(super) fn widened(&self) -> Option<Vec<f32>> {
        match self {
            Values::F32(_) => None,
            Values::Bf16(values) => Some(widen(values)),
        }
    }
}

/// A matrix inside a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    values: Values<'a>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    /// Where packed forms of the whole stay, and whether this is the one with rows and columns exchanged.
    packings: Option<(&'a Packings, bool)>,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix.
    pub(super) fn new(values: Values<'a>, rows: usize, columns: usize) -> Self {
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
    pub(super) fn keeping(self, packings: Option<&'a Packings>) -> Self {
        Self {
            packings: packings.map(|packings| (packings, false)),
            ..self
        }
    }

    /// Its packed form that stays, packed now where it is the first of its kind; none where nothing stays, or for others than `empty` is.
    fn held(&self, empty: &dyn Fn() -> Held) -> Option<&'a Held> {
        let (packings, turned) = self.packings?;
        packings.of(turned, self, empty)
    }

    /// A row-major matrix of f32.
    pub(super) fn of(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(Values::F32(values), rows, columns)
    }

    /// Rows and columns inside a larger matrix: each as how many there are and how far apart they lie, from number `start` on.
    pub(super) fn inside(
        values: Values<'a>,
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
        Self::inside(
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
pub(super) struct Term<'a> {
    pub(super) a: &'a Left<'a>,
    pub(super) b: Matrix<'a>,
}

/// A as tiles read it: prepared once, whatever it is multiplied by.
pub(super) struct Left<'a> {
    rows: usize,
    columns: usize,
    form: Form<'a>,
}

enum Form<'a> {
    /// f32 with strides.
    Wide {
        values: Cow<'a, [f32]>,
        row_stride: usize,
        column_stride: usize,
    },
    /// Packed for blocks.
    Packed(Arc<blocks::Packed>),
}

/// A packed for blocks, where that is done: for all products of one matrix.
#[derive(Clone, Default)]
pub(super) struct Prepared(Option<Arc<blocks::Packed>>);

impl Prepared {
    /// Packs A for products in `precision`.
    pub(super) fn new(precision: Precision, a: &Matrix<'_>) -> Self {
        Self::with(best(), precision, a)
    }

    /// What was packed already.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn of(packed: blocks::Packed) -> Self {
        Self(Some(Arc::new(packed)))
    }

    /// What was packed.
    pub(super) fn packed(&self) -> Option<&blocks::Packed> {
        self.0.as_deref()
    }

    fn with(isa: &Isa, precision: Precision, a: &Matrix<'_>) -> Self {
        Self(
            isa.unit(precision)
                .and_then(|unit| blocks::Packed::new(unit, a, precision))
                .map(Arc::new),
        )
    }
}

impl<'a> Left<'a> {
    /// Prepares A for products in `precision`, by the best instruction set.
    pub(super) fn new(precision: Precision, a: Matrix<'a>) -> Self {
        Self::with(best(), precision, a)
    }

    /// The same for a given instruction set.
    pub(super) fn with(isa: &Isa, precision: Precision, a: Matrix<'a>) -> Self {
        Self::of(a, Prepared::with(isa, precision, &a))
    }

    /// (rows, columns) that were packed before.
    pub(super) fn prepared(rows: usize, columns: usize, prepared: &Prepared) -> Option<Self> {
        prepared.0.clone().map(|packed| Self {
            rows,
            columns,
            form: Form::Packed(packed),
        })
    }

    /// The same where it was packed before.
    pub(super) fn of(a: Matrix<'a>, prepared: Prepared) -> Self {
        let Matrix {
            values,
            rows,
            columns,
            row_stride,
            column_stride,
            ..
        } = a;
        let form = match (prepared.0, values) {
            (Some(packed), _) => Form::Packed(packed),
            (None, Values::F32(values)) => Form::Wide {
                values: Cow::Borrowed(values),
                row_stride,
                column_stride,
            },
            (None, Values::Bf16(values)) => Form::Wide {
                values: Cow::Owned(widen(values)),
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

    fn packed(&self) -> Option<&blocks::Packed> {
        match &self.form {
            Form::Packed(packed) => Some(packed),
            Form::Wide { .. } => None,
        }
    }
}

/// What the sum starts from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start<'a> {
    Zero,
    /// The same row (n) in every row: a bias.
    Row(&'a [f32]),
    /// A row-major (m, n): a residual stream, or what earlier products gave.
    Matrix(&'a [f32]),
}

/// start + the sum of the terms, row-major (m, n), on all threads of the pool.
pub(super) fn products(terms: &[Term<'_>], start: Start<'_>) -> Vec<f32> {
    products_with(best(), terms, start)
}

/// The product of two matrices in `precision`.
pub(super) fn product(precision: Precision, a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    products(
        &[Term {
            a: &Left::new(precision, a),
            b,
        }],
        Start::Zero,
    )
}

/// The same for an A whose rows are an adapter's: in f32, splitting B for tile registers takes longer than multiplying a few rows by it.
pub(super) fn product_of_few(precision: Precision, a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let few = precision == Precision::F32 && a.rows < FEW;
    let left = if few {
        Left::of(a, Prepared::default())
    } else {
        Left::new(precision, a)
    };
    products(&[Term { a: &left, b }], Start::Zero)
}

/// a times the rows of what was packed as A: (m, `columns`).
pub(super) fn product_by(a: Matrix<'_>, b: &blocks::Packed, columns: usize) -> Vec<f32> {
    issue(1, a.rows, columns, a.columns);
    // SAFETY: the product writes every number.
    let mut out = unsafe { uninitialized(a.rows * columns) };
    blocks::product_by(&a, b, &mut out);
    out
}

/// The sum by a given instruction set, which every A was prepared for.
pub(super) fn products_with(isa: &'static Isa, terms: &[Term<'_>], start: Start<'_>) -> Vec<f32> {
    let (m, n) = (terms[0].a.rows, terms[0].b.columns);
    for Term { a, b } in terms {
        assert!(
            a.rows == m && b.columns == n && a.columns == b.rows,
            "the terms of a sum have one shape"
        );
        issue(1, m, n, a.columns);
    }
    match start {
        Start::Row(row) => assert_eq!(row.len(), n, "a row to start from has n numbers"),
        Start::Matrix(matrix) => {
            assert_eq!(matrix.len(), m * n, "a matrix to start from is (m, n)")
        }
        Start::Zero => {}
    }
    if terms.iter().all(|term| term.a.columns == 0) {
        return match start {
            Start::Zero => vec![0.0; m * n],
            Start::Row(row) => row.repeat(m),
            Start::Matrix(matrix) => matrix.to_vec(),
        };
    }
    // SAFETY: the tasks of the first pass write every number before anything reads one.
    let mut out = unsafe { uninitialized(m * n) };
    if out.is_empty() {
        return out;
    }
    let packed: Vec<_> = terms
        .iter()
        .filter_map(|term| Some((term.a.packed()?, term.b)))
        .collect();
    if !packed.is_empty() {
        assert_eq!(
            packed.len(),
            terms.len(),
            "the terms of a sum are prepared alike"
        );
        blocks::products(&packed, start, &mut out);
        return out;
    }
    if let Some(rows) = row::rows(terms) {
        row::products(&rows, start, &mut out);
        return out;
    }
    // Where A has few rows, tasks begin at any vector, and not at a panel.
    let kept = terms.iter().map(|term| {
        if m > UNPACKED {
            Panels::kept(isa, &term.b)
        } else {
            None
        }
    });
    let kept: Vec<Option<&Panels>> = kept.collect();
    for (index, pieces) in passes(isa, terms).iter().enumerate() {
        let start = if index == 0 { Some(start) } else { None };
        let number = PASSES.fetch_add(1, Ordering::Relaxed) + 1;
        Pass {
            number,
            isa,
            terms,
            kept: &kept,
            pieces,
            start,
            out: Shared(out.as_mut_ptr()),
            m,
            n,
        }
        .run();
    }
    out
}

/// A run of k of one term.
struct Piece {
    term: usize,
    k: Range<usize>,
}

/// Which pieces of the terms are summed while a tile's B is packed: all at once where they fit.
fn passes(isa: &Isa, terms: &[Term<'_>]) -> Vec<Vec<Piece>> {
    let mut passes: Vec<Vec<Piece>> = vec![Vec::new()];
    let mut depth = 0;
    for (term, Term { a, b }) in terms.iter().enumerate() {
        let length = match a.rows <= UNPACKED && b.column_stride == 1 {
            true => near_rows(b.row_stride),
            false if a.columns > isa.deepest => isa.piece,
            false => a.columns.max(1),
        };
        for start in (0..a.columns).step_by(length) {
            let k = start..(start + length).min(a.columns);
            if depth > 0 && depth + k.len() > isa.deepest {
                passes.push(Vec::new());
                depth = 0;
            }
            depth += k.len();
            if let Some(pass) = passes.last_mut() {
                pass.push(Piece { term, k });
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
    let threads = threads();
    // A few panels that do not come out even are better shared by rows, though each part then packs them for itself; and so are panels
    // that are no more than the strips, which then are read by the thread that wrote them.
    let uneven = panels < 8 * threads && !panels.is_multiple_of(threads);
    let by_rows = uneven || panels <= strips && strips >= LEAST_STRIPS * threads;
    let splits = if by_rows {
        threads.min(strips.div_ceil(LEAST_STRIPS)).max(1)
    } else {
        1
    };
    let groups = panels
        .div_ceil(most)
        .next_multiple_of(threads.div_ceil(splits))
        .min(panels);
    let turns = if splits > 1 {
        turns.min(strips / splits / LEAST_STRIPS).max(1)
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
        count => each(0..count, cut),
    }
}

/// One pass over the result.
struct Pass<'a> {
    number: u64,
    isa: &'a Isa,
    terms: &'a [Term<'a>],
    /// Of each term, what was packed of its B before.
    kept: &'a [Option<&'a Panels>],
    pieces: &'a [Piece],
    /// `None`: goes on from what the passes before left in `out`.
    start: Option<Start<'a>>,
    out: Shared,
    m: usize,
    n: usize,
}

impl Pass<'_> {
    /// Cuts the result into tasks and runs them.
    fn run(&self) {
        let depth: usize = self.pieces.iter().map(|piece| piece.k.len()).sum();
        let width = self.isa.columns();
        let most = (self.isa.packed / (depth * width).max(1)).max(1);
        let height = self.isa.rows;
        tasks(
            self.n.div_ceil(width),
            most,
            (self.m.div_ceil(height), TURNS),
            |panels, strips| {
                let rows = strips.start * height..(strips.end * height).min(self.m);
                self.task(panels.start * width..(panels.end * width).min(self.n), rows);
            },
        );
    }

    /// Runs every tile of these rows and columns: whole ones of few rows with B as it lies, else packed.
    fn task(&self, columns: Range<usize>, rows: Range<usize>) {
        let plain = |piece: &Piece| {
            matches!(
                self.terms[piece.term].b,
                Matrix {
                    values: Values::F32(_),
                    column_stride: 1,
                    ..
                }
            )
        };
        let whole = match self.m <= UNPACKED && self.pieces.iter().all(plain) {
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
        for (index, (Piece { term, k }, mut part)) in
            self.pieces.iter().zip(self.parts(rows.start)).enumerate()
        {
            let Matrix {
                values: Values::F32(right),
                row_stride,
                ..
            } = self.terms[*term].b
            else {
                return;
            };
            part.b_row = row_stride;
            for column in columns.clone().step_by(self.isa.columns()) {
                let vectors = (columns.end - column).min(self.isa.columns()) / self.isa.lanes;
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
                    let out = self.out.at(rows.start * self.n + column);
                    strip(self.isa, (rows.len(), vectors), part, start, (out, self.n));
                }
            }
        }
    }

    /// What the pieces multiply, from this row of A on; where B lies is not told yet.
    fn parts(&self, row: usize) -> impl Iterator<Item = Part> + '_ {
        self.pieces.iter().filter_map(move |Piece { term, k }| {
            let Form::Wide {
                values,
                row_stride,
                column_stride,
            } = &self.terms[*term].a.form
            else {
                return None;
            };
            let a = values[row * row_stride + k.start * column_stride..].as_ptr();
            Some(Part {
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
            let width = self.isa.columns();
            let panels: Vec<Range<usize>> = columns
                .clone()
                .step_by(width)
                .map(|first| first..(first + width).min(columns.end))
                .collect();
            let depth: usize = self.unkept().map(|piece| piece.k.len()).sum();
            let key = (self.number, columns);
            if *of != key {
                self.pack(depth, &panels, values);
                *of = key;
            }
            let mut parts = self.panel_parts(depth, &panels, values, rows.start);
            let count = self.pieces.len().max(1);
            for rows in even_parts(rows, self.isa.rows) {
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
    ) -> Vec<Part> {
        let mut all = Vec::with_capacity(panels.len() * self.pieces.len());
        for (index, columns) in panels.iter().enumerate() {
            let mut own = &values[index * depth * self.isa.columns()..];
            let width = columns.len().next_multiple_of(self.isa.lanes);
            for (mut part, Piece { term, k }) in self.parts(row).zip(self.pieces) {
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
    fn unkept(&self) -> impl Iterator<Item = &Piece> {
        self.pieces
            .iter()
            .filter(|piece| self.kept[piece.term].is_none())
    }

    /// Packs these columns of B, piece after piece, a panel after the other.
    fn pack(&self, depth: usize, panels: &[Range<usize>], values: &mut Vec<f32>) {
        let size = depth * self.isa.columns();
        if values.len() < panels.len() * size {
            values.resize(panels.len() * size, 0.0);
        }
        let mut done = 0;
        for Piece { term, k } in self.unkept() {
            let b = &self.terms[*term].b;
            let near = if b.column_stride == 1 {
                near_rows(b.row_stride)
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
    fn tile(&self, rows: &Range<usize>, columns: &Range<usize>, parts: &[Part]) {
        let width = columns.len().next_multiple_of(self.isa.lanes);
        let tile = self.isa.tile(rows.len(), width / self.isa.lanes);
        // SAFETY: this task alone writes these rows and columns of `out`.
        let place = unsafe { self.out.at(rows.start * self.n + columns.start) };
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
        for parts in parts.chunks(if self.m <= UNPACKED {
            1
        } else {
            parts.len().max(1)
        }) {
            // SAFETY: rows and k lie inside A, whose slice is the whole matrix; the panel holds k rows of `width`; `start` and `out` are
            // rows of (m, n) buffers or of `scratch`, wide enough because only whole tiles go to `out` directly.
            unsafe {
                tile(TileArgs {
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
            Some(Start::Zero) => (std::ptr::null(), 0),
            Some(Start::Row(values)) => (values[column..].as_ptr(), 0),
            Some(Start::Matrix(values)) => (values[row * self.n + column..].as_ptr(), self.n),
            None => self.so_far(row, column),
        }
    }

    /// The sum at (row, column) as it stands, and its row stride.
    fn so_far(&self, row: usize, column: usize) -> (*const f32, usize) {
        // SAFETY: (row, column) lies in `out`.
        (
            unsafe { self.out.at(row * self.n + column) }.cast_const(),
            self.n,
        )
    }
}

/// Rows of B that lie on `NEAR_PAGES` pages.
fn near_rows(row_stride: usize) -> usize {
    (NEAR_PAGES * PAGE / row_stride.max(1)).clamp(NEAR_PAGES, MOST_NEAR)
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
    part: Part,
    (start, start_row): (*const f32, usize),
    (out, out_row): (*mut f32, usize),
) {
    for rows in even_parts(0..m, isa.rows) {
        let first = rows.start;
        let start = if start.is_null() {
            start
        } else {
            start.wrapping_add(first * start_row)
        };
        // SAFETY: the caller's promise; these rows are among the m.
        unsafe {
            let (part, out) = (
                Part {
                    a: part.a.add(first * part.a_row),
                    ..part
                },
                out.add(first * out_row),
            );
            isa.tile(rows.len(), vectors)(TileArgs {
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
