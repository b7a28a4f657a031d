//! Products in blocks: bf16 in, f32 sums, 32 x 32 numbers of the result at a time, in tile registers (Intel AMX) or in vectors of pairs
//! (AVX512-BF16), which read one layout.
//!
//! In bf16 both operands are rounded to it once, while they are packed. In f32, in tile registers alone, each is split into three bf16
//! parts that add up to all of its 24 bits, and the six products of parts that reach them are summed: as exact as f32 multiply-adds, and
//! faster. A B that is stored in bf16 is one such part, so that three products are left. Numbers below 2^-126 count as zero. The order of
//! a sum is the same whatever the number of threads and the other size of the product.

pub(super) mod amx;
mod kernel;
mod pack;
pub(super) mod pairs;

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use self::kernel::{DEPTH, Line, PAIR, Run, SPLIT};
pub(in crate::ops) use self::kernel::{ROUNDED, Ready, SIDE, Unit};
pub(in crate::ops) use self::pack::{Side, View};
use self::pack::{pack_block, turn, widen_block};
use super::{Matrix, Start, Values, even_parts, tasks};
use crate::ops::host::{Shared, uninitialized};
use crate::ops::issue;
use crate::ops::team::each;
use crate::work::Precision;

/// Bytes of packed B of one run through k: with A's it streams through a second-level cache of 2 MiB, which every processor with AMX has.
const DEEPEST: usize = 128 << 10;
/// Bytes of packed B of one task: half of that cache. (Where it is 1 MiB, less gained nothing: benches/LOG.md, "a processor with fast dot
/// products of bf16 pairs".)
const PACKED: usize = 1 << 20;

/// Fewest rows that are packed. One alone is a generated token, which takes no longer than reading B; from two on what a row gives does not
/// depend on how many there are.
const LEAST_ROWS: usize = 2;

/// One side of a product, packed: strips of 32 lanes, each with all its steps of k. As A a step of a strip is a block of 32 rows by 32 k:
/// one plane after the other, each row by row.
pub(in crate::ops) struct Operand {
    lines: Vec<Line>,
    /// 1 (numbers rounded to bf16) or 3 (f32 in three parts).
    planes: usize,
    lanes: usize,
    depth: usize,
    steps: usize,
}

impl Operand {
    /// Holds nothing yet.
    pub(in crate::ops) fn new(planes: usize) -> Self {
        assert!(planes == ROUNDED || planes == SPLIT, "one plane or three");
        Self {
            lines: Vec::new(),
            planes,
            lanes: 0,
            depth: 0,
            steps: 0,
        }
    }

    /// Room for `lanes` of `depth`, with nothing in it yet.
    fn room(&mut self, lanes: usize, depth: usize) {
        (self.lanes, self.depth, self.steps) = (lanes, depth, depth.div_ceil(DEPTH));
        let size = self.strips() * self.strip();
        if self.lines.len() < size {
            // SAFETY: who packs an operand writes every line of its strips before a tile reads them.
            self.lines = unsafe { uninitialized(size) };
        }
    }

    /// Strips of lanes.
    fn strips(&self) -> usize {
        self.lanes.div_ceil(SIDE)
    }

    /// Lines of a strip.
    fn strip(&self) -> usize {
        self.steps * self.step()
    }

    /// Lines of a step of a strip.
    fn step(&self) -> usize {
        self.planes * PAIR
    }

    /// Packs `view` on this thread.
    pub(in crate::ops) fn fill(&mut self, view: &View<'_>) {
        self.room(view.lanes, view.depth);
        let (planes, strip, strips) = (self.planes, self.strip().max(1), self.strips());
        for (index, lines) in self.lines.chunks_exact_mut(strip).take(strips).enumerate() {
            view.pack(planes, index * SIDE, 0..view.depth, lines);
        }
    }

    /// `view`, packed on this thread.
    pub(in crate::ops) fn of(planes: usize, view: &View<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.fill(view);
        operand
    }

    /// `view`, packed on all threads.
    fn shared(planes: usize, view: &View<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.refill(view);
        operand
    }

    /// Packs `view` on all threads.
    fn refill(&mut self, view: &View<'_>) {
        self.room(view.lanes, view.depth);
        let (planes, strip, strips) = (self.planes, self.strip().max(1), self.strips());
        let lines = self.lines.chunks_exact_mut(strip).take(strips).enumerate();
        each(lines, |(index, lines)| {
            view.pack(planes, index * SIDE, 0..view.depth, lines)
        });
    }

    /// Room for an A of `rows` by `columns`, whose blocks `blocks` gives a place.
    ///
    /// # Safety
    /// Every block must be written before it is read.
    pub(in crate::ops) unsafe fn uninitialized(planes: usize, rows: usize, columns: usize) -> Self {
        let mut operand = Self::new(planes);
        operand.room(rows, columns);
        operand
    }

    /// Where blocks are written.
    pub(in crate::ops) fn blocks(&mut self) -> Blocks {
        Blocks {
            at: Shared(self.lines.as_mut_ptr()),
            planes: self.planes,
            strip: self.strip(),
        }
    }

    /// The lines of step `step` of a strip.
    fn block(&self, strip: usize, step: usize) -> &[Line] {
        &self.lines[strip * self.strip() + step * self.step()..][..self.step()]
    }

    /// The first plane of a block, as a tile.
    pub(in crate::ops) fn read(&self, strip: usize, step: usize) -> Tile {
        widen_block(&self.block(strip, step)[..PAIR])
    }

    /// Steps of k.
    pub(in crate::ops) fn steps(&self) -> usize {
        self.steps
    }

    /// Numbers of k that these steps hold.
    fn depth_of(&self, steps: Range<usize>) -> usize {
        (steps.end * DEPTH).min(self.depth) - steps.start * DEPTH
    }

    /// A strip from step `step` on.
    fn at(&self, strip: usize, step: usize) -> *const Line {
        self.lines[strip * self.strip() + step * self.step()..].as_ptr()
    }
}

/// The blocks of an operand that several threads write.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Blocks {
    at: Shared<Line>,
    planes: usize,
    strip: usize,
}

impl Blocks {
    /// Packs a tile as step `step` of a strip.
    ///
    /// # Safety
    /// The operand has this block, is still there, and no other thread touches the block; the processor has AVX-512 F, BW, VL and BF16.
    pub(in crate::ops) unsafe fn write(self, strip: usize, step: usize, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            pack_block(
                self.planes,
                tile,
                self.at.at(strip * self.strip + step * self.planes * PAIR),
            )
        };
    }
}

/// B of a sum: a matrix, the packed form of one that stays, or the rows of what was packed as A.
#[derive(Clone, Copy)]
enum Right<'a> {
    View(View<'a>),
    Kept(&'a Operand),
    Packed(&'a Operand),
}

impl<'a> Right<'a> {
    /// A matrix (k, n) that `a` is multiplied by.
    fn of(a: &Packed, b: &Matrix<'a>) -> Self {
        match b.held(&|| super::held::Held::Blocks(a.held())) {
            Some(super::held::Held::Blocks(held)) => Self::Kept(&held.operand),
            _ => Self::View(View::b(b)),
        }
    }

    fn lanes(&self) -> usize {
        match self {
            Self::View(view) => view.lanes,
            Self::Kept(operand) => operand.lanes,
            Self::Packed(operand) => operand.depth,
        }
    }

    fn depth(&self) -> usize {
        match self {
            Self::View(view) => view.depth,
            Self::Kept(operand) => operand.depth,
            Self::Packed(operand) => operand.lanes,
        }
    }

    /// Planes beside an A of `planes`.
    fn planes(&self, planes: usize) -> usize {
        match self {
            Self::View(view) => view.planes(planes),
            Self::Kept(operand) | Self::Packed(operand) => operand.planes,
        }
    }

    /// Steps that are packed for all of a task's panels before the next. A matrix whose rows lie far apart is read a step at a time: else
    /// every row is another page, for each panel.
    fn at_once(&self, steps: usize) -> usize {
        match self {
            Self::View(view) if !view.along_k() => 1,
            _ => steps.max(1),
        }
    }

    /// Packs these steps of a panel, unless they are kept.
    fn pack(&self, planes: usize, panel: usize, steps: Range<usize>, out: &mut [Line]) {
        match self {
            Self::View(view) => {
                let k = steps.start * DEPTH..(steps.end * DEPTH).min(view.depth);
                view.pack(planes, panel * SIDE, k, out);
            }
            Self::Kept(_) => {}
            Self::Packed(operand) => {
                for (step, out) in steps.zip(out.chunks_exact_mut(operand.step())) {
                    for (block, out) in operand
                        .block(step, panel)
                        .chunks_exact(PAIR)
                        .zip(out.chunks_exact_mut(PAIR))
                    {
                        turn(block, out);
                    }
                }
            }
        }
    }
}

/// A term of a sum.
type Term<'a> = (&'a Operand, Right<'a>);

/// out, rows of `out.1` numbers = [out where `onto`] + strips of A times strips of B, over `steps` of k from each one's step on: on
/// this thread. B has A's planes, or is one of numbers stored in bf16.
pub(in crate::ops) fn multiply(
    ready: &Ready,
    a: (&Operand, Range<usize>, usize),
    b: (&Operand, Range<usize>, usize),
    steps: usize,
    out: (&mut [f32], usize),
    onto: bool,
) {
    assert!(
        a.2 + steps <= a.0.steps && b.2 + steps <= b.0.steps,
        "both operands have these steps"
    );
    assert!(
        a.1.end * SIDE < a.0.lanes + SIDE && b.1.end * SIDE < b.0.lanes + SIDE,
        "both operands have these strips"
    );
    assert!(
        b.0.planes == a.0.planes || b.0.planes == ROUNDED,
        "B has A's planes or one"
    );
    let (rows, columns) = (a.1.len() * SIDE, b.1.len() * SIDE);
    assert!(
        columns <= out.1 && rows * out.1 + columns <= out.0.len() + out.1,
        "the result has room for whole tiles"
    );
    for (row, strip) in a.1.enumerate() {
        for (column, panel) in b.1.clone().enumerate() {
            let depth = a.0.depth_of(a.2..a.2 + steps);
            let run = Run {
                a: a.0.at(strip, a.2),
                b: b.0.at(panel, b.2),
                planes: b.0.planes,
                depth,
            };
            let size = ((a.0.lanes - strip * SIDE).min(SIDE), SIDE);
            // SAFETY: all asserted above.
            unsafe {
                let at = out.0.as_mut_ptr().add(row * SIDE * out.1 + column * SIDE);
                ready.multiply(a.0.planes, [run, Run::EMPTY], (at, out.1), size, onto);
            }
        }
    }
}

/// A, packed for a unit.
pub(in crate::ops) struct Packed {
    unit: Unit,
    operand: Operand,
}

impl Packed {
    /// Packs `a` where it has rows enough.
    pub(in crate::ops) fn new(unit: Unit, a: &Matrix<'_>, precision: Precision) -> Option<Self> {
        let planes = if precision == Precision::F32 {
            SPLIT
        } else {
            ROUNDED
        };
        (a.rows >= LEAST_ROWS).then(|| Self {
            unit,
            operand: Operand::shared(planes, &View::a(a)),
        })
    }

    /// Room for an A of `rows` by `columns` that is packed as this one is.
    ///
    /// # Safety
    /// Every block must be written before it is read.
    pub(in crate::ops) unsafe fn alike(&self, rows: usize, columns: usize) -> Self {
        Self {
            unit: self.unit,
            // SAFETY: the caller's promise.
            operand: unsafe { Operand::uninitialized(self.operand.planes, rows, columns) },
        }
    }

    /// Where blocks are written.
    pub(in crate::ops) fn blocks(&mut self) -> Blocks {
        self.operand.blocks()
    }

    /// What it can be multiplied by; holds nothing yet.
    pub(super) fn held(&self) -> Held {
        Held {
            unit: self.unit,
            planes: self.operand.planes,
            operand: Operand::new(ROUNDED),
        }
    }
}

/// A B of many products.
pub(in crate::ops) struct Held {
    unit: Unit,
    /// A's.
    planes: usize,
    operand: Operand,
}

impl Held {
    /// Whether both are for the same A's.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.unit, self.planes) == (other.unit, other.planes)
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(super) fn fill(&mut self, matrix: &Matrix<'_>) {
        let view = View::b(matrix);
        self.operand.planes = view.planes(self.planes);
        self.operand.refill(&view);
    }

    /// out = rows of `a`, from a whole strip on, times what is held.
    pub(super) fn product(&self, a: &Packed, rows: Range<usize>, out: (&mut [f32], usize)) {
        assert!(rows.start.is_multiple_of(SIDE), "rows begin with a strip");
        self.times(
            &a.operand,
            rows.start / SIDE..rows.end.div_ceil(SIDE),
            out,
            false,
        );
    }

    /// out += the first `rows` rows of `a`, `a.1` numbers apart, times what is held.
    pub(super) fn add_product(&self, rows: usize, a: (&[f32], usize), out: (&mut [f32], usize)) {
        let view = View::new(
            Side::A,
            Values::F32(a.0),
            0,
            (rows, a.1),
            (self.operand.depth, 1),
        );
        self.times(
            &Operand::of(self.planes, &view),
            0..rows.div_ceil(SIDE),
            out,
            true,
        );
    }

    /// out = [out where it is to `add`] + strips of A times all of B, on this thread: as much of B at a time as a task packs elsewhere.
    fn times(&self, a: &Operand, strips: Range<usize>, (out, row): (&mut [f32], usize), add: bool) {
        let (b, ready) = (&self.operand, Ready::new(self.unit));
        assert_eq!(a.planes, self.planes, "a B is held for A's planes");
        assert_eq!(a.depth, b.depth, "A's and B's k are one");
        for steps in even_parts(0..a.steps, deepest(a.planes)) {
            for panels in even_parts(0..b.strips(), together(steps.len() * b.step())) {
                let (a, first) = ((a, strips.clone(), steps.start), panels.start * SIDE);
                multiply(
                    &ready,
                    a,
                    (b, panels, steps.start),
                    steps.len(),
                    (&mut out[first..], row),
                    add || steps.start > 0,
                );
            }
        }
    }
}

/// Steps of one run through k.
fn deepest(planes: usize) -> usize {
    DEEPEST / (planes * PAIR * size_of::<Line>())
}

/// Panels of one task, of so many lines each.
fn together(lines: usize) -> usize {
    (PACKED / (lines * size_of::<Line>()).max(1)).max(1)
}

/// out (m, n) = a times the rows of what was packed as A, for any number of rows.
pub(super) fn product_by(a: &Matrix<'_>, b: &Packed, out: &mut [f32]) {
    let a = Operand::shared(b.operand.planes, &View::a(a));
    products_of(b.unit, &[(&a, Right::Packed(&b.operand))], Start::Zero, out);
}

/// out (m, n) = start + the sum of the terms, of which there is one at least.
pub(super) fn products(terms: &[(&Packed, Matrix<'_>)], start: Start<'_>, out: &mut [f32]) {
    let unit = terms[0].0.unit;
    products_of(unit, &terms_by(unit, terms), start, out);
}

/// The terms, each B as its form that stays where there is one.
fn terms_by<'a>(unit: Unit, terms: &[(&'a Packed, Matrix<'a>)]) -> Vec<Term<'a>> {
    assert!(
        terms.iter().all(|(a, _)| a.unit == unit),
        "operands of one sum are packed for one unit"
    );
    terms
        .iter()
        .map(|(a, b)| (&a.operand, Right::of(a, b)))
        .collect()
}

fn products_of(unit: Unit, terms: &[Term<'_>], start: Start<'_>, out: &mut [f32]) {
    let (m, n) = (terms[0].0.lanes, terms[0].1.lanes());
    assert_eq!(out.len(), m * n, "a result is (m, n)");
    let passes = Sum::passes(terms, (m, n));
    for (index, sum) in passes.iter().enumerate() {
        let last = index + 1 == passes.len();
        let start = if last { start } else { Start::Zero };
        let pass = Pass {
            unit,
            sum,
            onto: index > 0,
            start,
            out: Shared(out.as_mut_ptr()),
            m,
            n,
        };
        tasks(
            n.div_ceil(SIDE),
            together(sum.lines),
            (m.div_ceil(SIDE), 1),
            |panels, strips| pass.task(panels, strips),
        );
    }
}

/// Computes sums of one shape tile by tile, and gives `take` the tiles of each strip (of 32 rows) and panel (of 32 columns): zero beyond
/// the last row and column.
pub(in crate::ops) fn tiles_of<const S: usize>(
    sums: [&[(&Packed, Matrix<'_>)]; S],
    take: impl Fn(usize, usize, &mut [Tile; S]) + Sync,
) {
    let unit = sums[0][0].0.unit;
    let sums = sums.map(|terms| terms_by(unit, terms));
    let (m, n) = (sums[0][0].0.lanes, sums[0][0].1.lanes());
    sums.iter()
        .flatten()
        .for_each(|(a, _)| issue(1, m, n, a.depth));
    let sums = sums.map(|terms| Sum::passes(&terms, (m, n)));
    let all = || sums.iter().flatten();
    let (size, most) = (
        all().map(|sum| sum.packed).sum(),
        together(all().map(|sum| sum.lines).sum()),
    );
    tasks(
        n.div_ceil(SIDE),
        most,
        (m.div_ceil(SIDE), 1),
        |panels, strips| {
            with_room(panels.len() * size, |packed| {
                let mut done = 0;
                for sum in all() {
                    sum.pack(panels.clone(), &mut packed[done..], size);
                    done += sum.packed;
                }
                let ready = Ready::new(unit);
                let mut tiles = [Tile::ZERO; S];
                for strip in strips {
                    for panel in panels.clone() {
                        let mut packed = &packed[(panel - panels.start) * size..][..size];
                        for (tile, passes) in tiles.iter_mut().zip(&sums) {
                            for (index, sum) in passes.iter().enumerate() {
                                // SAFETY: the panel is packed, in this order; a tile is 32 rows of 32 numbers.
                                unsafe {
                                    sum.tile(
                                        &ready,
                                        (strip, panel),
                                        packed,
                                        (tile.0.as_mut_ptr(), SIDE),
                                        (SIDE, SIDE),
                                        index > 0,
                                    )
                                };
                                packed = &packed[sum.packed..];
                            }
                        }
                        take(strip, panel, &mut tiles);
                    }
                }
            });
        },
    );
}

/// A tile on its way, row by row.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(in crate::ops) struct Tile(pub(in crate::ops) [f32; SIDE * SIDE]);

impl Tile {
    pub(in crate::ops) const ZERO: Self = Self([0.0; SIDE * SIDE]);
}

/// A run of k of one term.
struct Piece<'a> {
    a: &'a Operand,
    b: Right<'a>,
    steps: Range<usize>,
    /// B's: A's, or one.
    planes: usize,
}

impl Piece<'_> {
    /// Lines of B's panel.
    fn lines(&self) -> usize {
        self.steps.len() * self.planes * PAIR
    }

    /// Those of them that are not kept.
    fn packed(&self) -> usize {
        if matches!(self.b, Right::Kept(_)) {
            0
        } else {
            self.lines()
        }
    }
}

/// What is summed while a tile stays in registers: two pieces at most, the one of fewer planes first.
struct Sum<'a> {
    /// A's.
    planes: usize,
    pieces: Vec<Piece<'a>>,
    /// Lines of a panel of B, over all pieces, and those of them that are packed for this product.
    lines: usize,
    packed: usize,
}

impl<'a> Sum<'a> {
    /// The terms of a result (m, n), in as many passes as it takes.
    fn passes(terms: &[Term<'a>], (m, n): (usize, usize)) -> Vec<Self> {
        let planes = terms[0].0.planes;
        let most = deepest(planes);
        let mut passes: Vec<Vec<Piece<'a>>> = vec![Vec::new()];
        let mut done = 0;
        for &(a, b) in terms {
            assert!(
                a.lanes == m && b.lanes() == n && a.depth == b.depth(),
                "the terms of a sum have one shape"
            );
            assert_eq!(a.planes, planes, "operands of one sum are packed alike");
            for steps in even_parts(0..a.steps, most) {
                let piece = Piece {
                    a,
                    b,
                    steps,
                    planes: b.planes(planes),
                };
                // An adapter's few steps join whatever is there.
                let joins = |pass: &Vec<Piece<'_>>| {
                    pass.len() < 2 && pass.iter().all(|before| before.planes <= piece.planes)
                };
                let fits =
                    passes.last().is_some_and(joins) && done + piece.steps.len() <= most + most / 8;
                if done > 0 && !fits {
                    passes.push(Vec::new());
                    done = 0;
                }
                done += piece.steps.len();
                if let Some(pass) = passes.last_mut() {
                    pass.push(piece);
                }
            }
        }
        let sum = |pieces: Vec<Piece<'a>>| {
            let of = |lines: fn(&Piece<'a>) -> usize| pieces.iter().map(lines).sum();
            Self {
                planes,
                lines: of(Piece::lines),
                packed: of(Piece::packed),
                pieces,
            }
        };
        passes.into_iter().map(sum).collect()
    }

    /// Packs these panels of B, `size` lines apart, where they are not kept.
    fn pack(&self, panels: Range<usize>, packed: &mut [Line], size: usize) {
        let mut done = 0;
        for piece @ Piece {
            b,
            steps: all,
            planes,
            ..
        } in self.pieces.iter().filter(|piece| piece.packed() > 0)
        {
            for steps in even_parts(all.clone(), b.at_once(all.len())) {
                let at = done + (steps.start - all.start) * planes * PAIR;
                for panel in panels.clone() {
                    let packed = &mut packed[(panel - panels.start) * size + at..]
                        [..steps.len() * planes * PAIR];
                    b.pack(*planes, panel, steps.clone(), packed);
                }
            }
            done += piece.packed();
        }
    }

    /// out (32, 32), `out.1` numbers from row to row = [out where `onto`] + a strip of A times a panel; `size` as `Ready::multiply`'s.
    ///
    /// # Safety
    /// What is not kept of the panel is packed from `packed`'s first line on, and `out` is writable.
    unsafe fn tile(
        &self,
        ready: &Ready,
        (strip, panel): (usize, usize),
        packed: &[Line],
        out: (*mut f32, usize),
        size: (usize, usize),
        onto: bool,
    ) {
        assert!(
            packed.len() >= self.packed,
            "a panel holds every piece that is packed"
        );
        let (mut runs, mut done) = ([Run::EMPTY; 2], 0);
        for (run, piece) in runs.iter_mut().zip(&self.pieces) {
            let Piece {
                a, steps, planes, ..
            } = piece;
            let b = match piece.b {
                Right::Kept(operand) => operand.at(panel, steps.start),
                Right::View(_) | Right::Packed(_) => packed[done..].as_ptr(),
            };
            *run = Run {
                a: a.at(strip, steps.start),
                b,
                planes: *planes,
                depth: a.depth_of(steps.clone()),
            };
            done += piece.packed();
        }
        // SAFETY: the caller's promise; A's strips and what is kept have all their steps.
        unsafe { ready.multiply(self.planes, runs, out, size, onto) };
    }
}

thread_local! {
    /// Where a thread packs its panels of B.
    static PANELS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with this thread's room for `lines` of packed B.
fn with_room(lines: usize, work: impl FnOnce(&mut [Line])) {
    PANELS.with_borrow_mut(|buffer| {
        if buffer.len() < lines {
            // SAFETY: panels are packed before a tile reads them.
            *buffer = unsafe { uninitialized(lines) };
        }
        work(&mut buffer[..lines]);
    });
}

/// One pass over the result.
struct Pass<'a> {
    unit: Unit,
    sum: &'a Sum<'a>,
    /// Whether it goes on from what the passes before left in `out`.
    onto: bool,
    start: Start<'a>,
    out: Shared,
    m: usize,
    n: usize,
}

impl Pass<'_> {
    /// Packs these panels (of 32 columns of B) and multiplies these strips (of 32 rows of A) by them.
    fn task(&self, panels: Range<usize>, strips: Range<usize>) {
        let size = self.sum.packed;
        with_room(panels.len() * size, |packed| {
            self.sum.pack(panels.clone(), packed, size);
            let ready = Ready::new(self.unit);
            for strip in strips {
                for panel in panels.clone() {
                    self.tile(
                        &ready,
                        strip,
                        panel,
                        &packed[(panel - panels.start) * size..][..size],
                    );
                }
            }
        });
    }

    fn tile(&self, ready: &Ready, strip: usize, panel: usize, packed: &[Line]) {
        let (row, column) = (strip * SIDE, panel * SIDE);
        let (rows, columns) = ((self.m - row).min(SIDE), (self.n - column).min(SIDE));
        let start = match self.start {
            Start::Zero => None,
            Start::Row(values) => Some((&values[column..], 0)),
            Start::Matrix(values) => Some((&values[row * self.n + column..], self.n)),
        };
        // SAFETY: this task alone writes these rows and columns of `out`, which has m rows of n numbers; `task` packed the
        // panel.
        unsafe {
            let out = self.out.at(row * self.n + column);
            if rows == SIDE && columns == SIDE && start.is_none() {
                return self.sum.tile(
                    ready,
                    (strip, panel),
                    packed,
                    (out, self.n),
                    (SIDE, SIDE),
                    self.onto,
                );
            }
            let mut scratch = MaybeUninit::<Tile>::uninit();
            let at = scratch.as_mut_ptr().cast::<f32>();
            if self.onto {
                (0..rows).for_each(|i| {
                    at.add(i * SIDE)
                        .copy_from_nonoverlapping(out.add(i * self.n), columns)
                });
            }
            self.sum.tile(
                ready,
                (strip, panel),
                packed,
                (at, SIDE),
                (rows, columns),
                self.onto,
            );
            finish(at, (out, self.n), start, rows, columns);
        }
    }
}

/// out (rows, columns) = a tile + start, `out.1` and `start.1` numbers from row to row.
///
/// # Safety
/// The tile is readable, out's rows are writable; the processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn finish(
    tile: *const f32,
    out: (*mut f32, usize),
    start: Option<(&[f32], usize)>,
    rows: usize,
    columns: usize,
) {
    use std::arch::x86_64::{_mm512_add_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps};
    if let Some((start, stride)) = start {
        assert!(
            rows == 0 || (rows - 1) * stride + columns <= start.len(),
            "every number has something to be added to it"
        );
    }
    for row in 0..rows {
        for column in (0..columns).step_by(16) {
            let mask = if columns - column < 16 {
                (1 << (columns - column)) - 1
            } else {
                u16::MAX
            };
            // SAFETY: the mask names what lies inside every row: the caller's promise, and asserted.
            unsafe {
                let mut sum = _mm512_maskz_loadu_ps(mask, tile.add(row * SIDE + column));
                if let Some((start, stride)) = start {
                    sum = _mm512_add_ps(
                        sum,
                        _mm512_maskz_loadu_ps(mask, start.as_ptr().add(row * stride + column)),
                    );
                }
                _mm512_mask_storeu_ps(out.0.add(row * out.1 + column), mask, sum);
            }
        }
    }
}
