//! Products in tile registers (Intel AMX): bf16 in, f32 sums, 32 x 32 numbers of the result at a time.
//!
//! In bf16 both operands are rounded to it once, while they are packed. In f32 each is split into three bf16 parts that add up to all of
//! its 24 bits, and the six products of parts that reach them are summed: as exact as f32 multiply-adds, and faster. A B that is stored
//! in bf16 is one such part, so that three products are left. Numbers below 2^-126 count as zero. The same order of summation whatever the threads and the other size of the product.

mod kernel;
mod pack;

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use self::kernel::{DEPTH, Line, PAIR, Runs, kernel};
pub(in crate::ops) use self::kernel::{SIDE, Tiles};
pub(in crate::ops) use self::pack::{Side, View};
use super::{Matrix, Start, even_parts, tasks};
use crate::ops::host::{Shared, uninitialized};
use crate::ops::team::each;
use crate::work::Precision;

/// Bytes of packed B of one run through k: with A's it streams through a second-level cache of 2 MiB, which every processor with AMX has.
const DEEPEST: usize = 128 << 10;
/// Bytes of packed B of one task: half of that cache.
const PACKED: usize = 1 << 20;

/// Fewest rows that are packed. One alone is a generated token, which takes no longer than reading B; from two on what a row gives does not
/// depend on how many there are.
const LEAST_ROWS: usize = 2;

/// Whether the processor has these registers and the system lets this process use them (on Linux a process has to ask).
pub(super) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        use std::arch::x86_64::__cpuid_count;
        const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
        // From the kernel's documentation of extended states: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
        const REQUEST: usize = 0x1023;
        const TILE_DATA: usize = 18;
        if !is_x86_feature_detected!("avx512bf16") || __cpuid_count(7, 0).edx & TILES_AND_BF16 != TILES_AND_BF16 {
            return false;
        }
        // SAFETY: this call takes two numbers and touches no memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
    })
}

/// One side of a product, packed: strips of 32 lanes, each with all its steps of k.
#[derive(Default)]
pub(in crate::ops) struct Operand<const P: usize> {
    lines: Vec<Line>,
    lanes: usize,
    steps: usize,
}

impl<const P: usize> Operand<P> {
    /// Room for `lanes` of `depth`, with nothing in it yet.
    fn room(&mut self, lanes: usize, depth: usize) {
        (self.lanes, self.steps) = (lanes, depth.div_ceil(DEPTH));
        let size = lanes.div_ceil(SIDE) * self.strip();
        if self.lines.len() < size {
            // SAFETY: who packs an operand writes every line of its strips before a tile reads them.
            self.lines = unsafe { uninitialized(size) };
        }
    }

    /// Lines of a strip.
    fn strip(&self) -> usize {
        self.steps * P * PAIR
    }

    /// Packs `view` on this thread.
    pub(in crate::ops) fn fill(&mut self, view: &View<'_>) {
        self.room(view.lanes, view.depth);
        let (strip, strips) = (self.strip().max(1), self.lanes.div_ceil(SIDE));
        for (index, lines) in self.lines.chunks_exact_mut(strip).take(strips).enumerate() {
            view.pack::<P>(index * SIDE, 0..view.depth, lines);
        }
    }

    /// `view`, packed on this thread.
    pub(in crate::ops) fn of(view: &View<'_>) -> Self {
        let mut operand = Self::default();
        operand.fill(view);
        operand
    }

    /// `view`, packed on all threads.
    fn shared(view: &View<'_>) -> Self {
        let mut operand = Self::default();
        operand.room(view.lanes, view.depth);
        let strip = operand.strip().max(1);
        each(operand.lines.chunks_mut(strip).enumerate(), |(index, lines)| view.pack::<P>(index * SIDE, 0..view.depth, lines));
        operand
    }

    /// Steps of k.
    pub(in crate::ops) fn steps(&self) -> usize {
        self.steps
    }

    /// A strip from step `step` on.
    fn at(&self, strip: usize, step: usize) -> *const Line {
        self.lines[strip * self.strip() + step * P * PAIR..].as_ptr()
    }
}

/// out, rows of `out.1` numbers = [out where `onto`] + strips of A times strips of B, over `steps` of k from each one's step on: on
/// this thread, which has `Tiles`.
pub(in crate::ops) fn multiply<const P: usize>(
    a: (&Operand<P>, Range<usize>, usize),
    b: (&Operand<P>, Range<usize>, usize),
    steps: usize,
    out: (&mut [f32], usize),
    onto: bool,
) {
    assert!(a.2 + steps <= a.0.steps && b.2 + steps <= b.0.steps, "both operands have these steps");
    assert!(a.1.end * SIDE < a.0.lanes + SIDE && b.1.end * SIDE < b.0.lanes + SIDE, "both operands have these strips");
    assert!(b.1.len() * SIDE <= out.1 && a.1.len() * SIDE * out.1 <= out.0.len(), "the result has room for whole tiles");
    for (row, strip) in a.1.enumerate() {
        for (column, panel) in b.1.clone().enumerate() {
            let runs = [(a.0.at(strip, a.2), steps), (std::ptr::null(), 0)];
            // SAFETY: all three asserted above.
            unsafe {
                let at = out.0.as_mut_ptr().add(row * SIDE * out.1 + column * SIDE);
                kernel::<P>(runs, [false; 2], b.0.at(panel, b.2), at, out.1, onto);
            }
        }
    }
}

/// A, packed.
pub(super) enum Packed {
    Rounded(Operand<1>),
    Split(Operand<3>),
}

impl Packed {
    /// Packs `a` where it has rows enough.
    pub(super) fn new(a: &Matrix<'_>, precision: Precision) -> Option<Self> {
        (a.rows >= LEAST_ROWS).then(|| match precision {
            Precision::F32 => Self::Split(Operand::shared(&View::a(a))),
            Precision::Bf16 | Precision::F16 => Self::Rounded(Operand::shared(&View::a(a))),
        })
    }
}

/// out (m, n) = start + the sum of the terms.
pub(super) fn products(terms: &[(&Packed, Matrix<'_>)], start: Start<'_>, out: &mut [f32]) {
    let (mut rounded, mut split) = (Vec::new(), Vec::new());
    for (a, b) in terms {
        match a {
            Packed::Rounded(a) => rounded.push((a, View::b(b))),
            Packed::Split(a) => split.push((a, View::b(b))),
        }
    }
    assert!(rounded.is_empty() || split.is_empty(), "operands of one sum are packed alike");
    match split.is_empty() {
        true => products_of(&rounded, start, out),
        false => products_of(&split, start, out),
    }
}

fn products_of<const P: usize>(terms: &[(&Operand<P>, View<'_>)], start: Start<'_>, out: &mut [f32]) {
    let (m, n) = (terms[0].0.lanes, terms[0].1.lanes);
    assert_eq!(out.len(), m * n, "a result is (m, n)");
    let passes = passes(terms, DEEPEST / (P * PAIR * size_of::<Line>()));
    for (index, pieces) in passes.iter().enumerate() {
        let lines = pieces.iter().map(Piece::lines::<P>).sum::<usize>();
        let last = index + 1 == passes.len();
        let start = if last { start } else { Start::Zero };
        let pass = Pass { terms, pieces, lines, onto: index > 0, start, out: Shared(out.as_mut_ptr()), m, n };
        let panel = lines * size_of::<Line>();
        tasks(n.div_ceil(SIDE), (PACKED / panel.max(1)).max(1), m.div_ceil(SIDE), 4, |panels, strips| pass.task(panels, strips));
    }
}

/// A run of k of one term.
struct Piece {
    term: usize,
    steps: Range<usize>,
    /// Whether B is bf16 as it is: one plane, whatever A has.
    narrow: bool,
}

impl Piece {
    /// Lines of B's panel.
    fn lines<const P: usize>(&self) -> usize {
        self.steps.len() * if self.narrow { 1 } else { P } * PAIR
    }
}

/// Which pieces are summed while a tile stays in registers: two at most, the narrower first, and about `most` steps.
fn passes<const P: usize>(terms: &[(&Operand<P>, View<'_>)], most: usize) -> Vec<Vec<Piece>> {
    let mut passes: Vec<Vec<Piece>> = vec![Vec::new()];
    let mut done = 0;
    for (term, (a, b)) in terms.iter().enumerate() {
        let narrow = b.is_narrow();
        for steps in even_parts(0..a.steps, most) {
            // An adapter's few steps join whatever is there.
            let joins = |pass: &Vec<Piece>| pass.len() < 2 && pass.iter().all(|before| before.narrow || !narrow);
            let fits = passes.last().is_some_and(joins) && done + steps.len() <= most + most / 8;
            if done > 0 && !fits {
                passes.push(Vec::new());
                done = 0;
            }
            done += steps.len();
            if let Some(pass) = passes.last_mut() {
                pass.push(Piece { term, steps, narrow });
            }
        }
    }
    passes
}

thread_local! {
    /// Where a thread packs its panels of B.
    static PANELS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// One pass over the result.
struct Pass<'a, const P: usize> {
    terms: &'a [(&'a Operand<P>, View<'a>)],
    pieces: &'a [Piece],
    /// Lines of a panel of B, over all pieces.
    lines: usize,
    /// Whether it goes on from what the passes before left in `out`.
    onto: bool,
    start: Start<'a>,
    out: Shared,
    m: usize,
    n: usize,
}

impl<const P: usize> Pass<'_, P> {
    /// Packs these panels (of 32 columns of B) and multiplies these strips (of 32 rows of A) by them.
    fn task(&self, panels: Range<usize>, strips: Range<usize>) {
        PANELS.with_borrow_mut(|buffer| {
            let size = self.lines.max(1);
            if buffer.len() < panels.len() * size {
                // SAFETY: `pack` writes every line of the panels before a tile reads them.
                *buffer = unsafe { uninitialized(panels.len() * size) };
            }
            let packed = &mut buffer[..panels.len() * size];
            self.pack(panels.clone(), packed, size);
            let _tiles = Tiles::new();
            for strip in strips {
                for panel in panels.clone() {
                    self.tile(strip, panel, &packed[(panel - panels.start) * size..][..size]);
                }
            }
        });
    }

    fn pack(&self, panels: Range<usize>, packed: &mut [Line], size: usize) {
        let mut done = 0;
        for piece in self.pieces {
            let view = &self.terms[piece.term].1;
            // A B whose rows lie far apart is read a step at a time for all panels: else every row is another page, for each panel.
            let most = if view.along_k() { piece.steps.len() } else { 1 };
            for steps in even_parts(piece.steps.clone(), most.max(1)) {
                let k = steps.start * DEPTH..(steps.end * DEPTH).min(view.depth);
                let planes = if piece.narrow { 1 } else { P };
                let at = done + (steps.start - piece.steps.start) * planes * PAIR;
                for panel in panels.clone() {
                    let at = (panel - panels.start) * size + at;
                    let packed = &mut packed[at..][..steps.len() * planes * PAIR];
                    match piece.narrow {
                        true => view.pack::<1>(panel * SIDE, k.clone(), packed),
                        false => view.pack::<P>(panel * SIDE, k.clone(), packed),
                    }
                }
            }
            done += piece.lines::<P>();
        }
    }

    fn tile(&self, strip: usize, panel: usize, packed: &[Line]) {
        let (row, column) = (strip * SIDE, panel * SIDE);
        let (rows, columns) = ((self.m - row).min(SIDE), (self.n - column).min(SIDE));
        let (mut runs, mut narrow): (Runs, _) = ([(std::ptr::null(), 0); 2], [true; 2]);
        for (index, piece) in self.pieces.iter().enumerate() {
            runs[index] = (self.terms[piece.term].0.at(strip, piece.steps.start), piece.steps.len());
            narrow[index] = piece.narrow;
        }
        let start = match self.start {
            Start::Zero => None,
            Start::Row(values) => Some((&values[column..], 0)),
            Start::Matrix(values) => Some((&values[row * self.n + column..], self.n)),
        };
        // SAFETY: this task alone writes these rows and columns of `out`, which has m rows of n numbers; the runs' steps are packed, in A
        // from this strip on and in B in this order; `task` holds the registers.
        unsafe {
            let out = self.out.at(row * self.n + column);
            if rows == SIDE && columns == SIDE && start.is_none() {
                return kernel::<P>(runs, narrow, packed.as_ptr(), out, self.n, self.onto);
            }
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let at = scratch.as_mut_ptr().cast::<f32>();
            if self.onto {
                (0..rows).for_each(|i| at.add(i * SIDE).copy_from_nonoverlapping(out.add(i * self.n), columns));
            }
            kernel::<P>(runs, narrow, packed.as_ptr(), at, SIDE, self.onto);
            finish(at, (out, self.n), start, rows, columns);
        }
    }
}

/// A tile on its way to the result.
#[repr(align(64))]
struct Scratch(#[allow(dead_code)] [f32; SIDE * SIDE]);

/// out (rows, columns) = a tile + start, `out.1` and `start.1` numbers from row to row.
///
/// # Safety
/// The tile is readable, out's rows are writable; the processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn finish(tile: *const f32, out: (*mut f32, usize), start: Option<(&[f32], usize)>, rows: usize, columns: usize) {
    use std::arch::x86_64::{_mm512_add_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps};
    if let Some((start, stride)) = start {
        assert!(rows == 0 || (rows - 1) * stride + columns <= start.len(), "every number has something to be added to it");
    }
    for row in 0..rows {
        for column in (0..columns).step_by(16) {
            let mask = if columns - column < 16 { (1 << (columns - column)) - 1 } else { u16::MAX };
            // SAFETY: the mask names what lies inside every row: the caller's promise, and asserted.
            unsafe {
                let mut sum = _mm512_maskz_loadu_ps(mask, tile.add(row * SIDE + column));
                if let Some((start, stride)) = start {
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, start.as_ptr().add(row * stride + column)));
                }
                _mm512_mask_storeu_ps(out.0.add(row * out.1 + column), mask, sum);
            }
        }
    }
}
