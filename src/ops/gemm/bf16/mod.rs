//! Products in blocks: bf16 in, f32 sums, 32 x 32 numbers of the result at a time, in tile registers (Intel AMX) or in vectors of pairs
//! (AVX512-BF16), which read one layout.
//!
//! In bf16 both operands are rounded to it once, while they are packed. In f32, in tile registers alone, each is split into three bf16
//! parts that add up to all of its 24 bits, and the six products of parts that reach them are summed: as exact as f32 multiply-adds, and
//! faster. A B that is stored in bf16 is one such part, so that three products are left. Numbers below 2^-126 count as zero. The order of
//! a sum is the same whatever the number of threads and the other size of the product.

pub(super) mod amx;
pub(super) mod avx512_bf16;
mod pack;
mod unit;

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

pub(in crate::ops) use self::pack::{OperandView, Side};
use self::pack::{pack_block, turn, widen_block};
pub(in crate::ops) use self::unit::{ActiveUnit, BF16_PLANES, MatrixUnit, TILE};
use self::unit::{BLOCK_LINES, CacheLine, F32_PLANES, K_STEP, Run};
use super::{CpuSlice, Init, MatRef, even_parts, tasks};
use crate::ops::count_flops;
use crate::ops::parallel::par_for_each;
use crate::ops::storage::{SendPtr, uninit_vec};
use crate::work::Precision;

/// Bytes of packed B of one run through k: with A's it streams through a second-level cache of 2 MiB, which every processor with AMX has.
const MAX_PANEL_BYTES: usize = 128 << 10;
/// Bytes of packed B of one task: half of that cache. (Where it is 1 MiB, less gained nothing: benches/LOG.md, "a processor with fast dot
/// products of bf16 pairs".)
const TASK_BYTES: usize = 1 << 20;

/// Fewest rows that are packed. One alone is a generated token, which takes no longer than reading B; from two on what a row gives does not
/// depend on how many there are.
const MIN_ROWS: usize = 2;

/// One side of a product, packed: strips of 32 lanes, each with all its steps of k. As A a step of a strip is a block of 32 rows by 32 k:
/// one plane after the other, each row by row.
pub(in crate::ops) struct PackedOperand {
    lines: Vec<CacheLine>,
    /// 1 (numbers rounded to bf16) or 3 (f32 in three parts).
    planes: usize,
    lanes: usize,
    depth: usize,
    steps: usize,
}

impl PackedOperand {
    /// Holds nothing yet.
    pub(in crate::ops) fn new(planes: usize) -> Self {
        assert!(
            planes == BF16_PLANES || planes == F32_PLANES,
            "one plane or three"
        );
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
        (self.lanes, self.depth, self.steps) = (lanes, depth, depth.div_ceil(K_STEP));
        let size = self.strips() * self.strip();
        if self.lines.len() < size {
            // SAFETY: who packs an operand writes every line of its strips before a tile reads them.
            self.lines = unsafe { uninit_vec(size) };
        }
    }

    /// Strips of lanes.
    fn strips(&self) -> usize {
        self.lanes.div_ceil(TILE)
    }

    /// Lines of a strip.
    fn strip(&self) -> usize {
        self.steps * self.step()
    }

    /// Lines of a step of a strip.
    fn step(&self) -> usize {
        self.planes * BLOCK_LINES
    }

    /// Packs `view` on this thread.
    pub(in crate::ops) fn pack(&mut self, view: &OperandView<'_>) {
        self.room(view.lanes, view.depth);
        let (planes, strip, strips) = (self.planes, self.strip().max(1), self.strips());
        for (index, lines) in self.lines.chunks_exact_mut(strip).take(strips).enumerate() {
            view.pack(planes, index * TILE, 0..view.depth, lines);
        }
    }

    /// `view`, packed on this thread.
    pub(in crate::ops) fn from_view(planes: usize, view: &OperandView<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.pack(view);
        operand
    }

    /// `view`, packed on all threads.
    fn shared(planes: usize, view: &OperandView<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.pack_parallel(view);
        operand
    }

    /// Packs `view` on all threads.
    fn pack_parallel(&mut self, view: &OperandView<'_>) {
        self.room(view.lanes, view.depth);
        let (planes, strip, strips) = (self.planes, self.strip().max(1), self.strips());
        let lines = self.lines.chunks_exact_mut(strip).take(strips).enumerate();
        par_for_each(lines, |(index, lines)| {
            view.pack(planes, index * TILE, 0..view.depth, lines)
        });
    }

    /// Room for an A of `rows` by `columns`, whose blocks `blocks` gives a place.
    ///
    /// # Safety
    /// Every block must be written before it is read.
    pub(in crate::ops) unsafe fn uninit(planes: usize, rows: usize, columns: usize) -> Self {
        let mut operand = Self::new(planes);
        operand.room(rows, columns);
        operand
    }

    /// Where blocks are written.
    pub(in crate::ops) fn blocks(&mut self) -> BlockWriter {
        BlockWriter {
            at: SendPtr(self.lines.as_mut_ptr()),
            planes: self.planes,
            strip: self.strip(),
        }
    }

    /// The lines of step `step` of a strip.
    fn block(&self, strip: usize, step: usize) -> &[CacheLine] {
        &self.lines[strip * self.strip() + step * self.step()..][..self.step()]
    }

    /// The first plane of a block, as a tile.
    pub(in crate::ops) fn read(&self, strip: usize, step: usize) -> Tile {
        widen_block(&self.block(strip, step)[..BLOCK_LINES])
    }

    /// Steps of k.
    pub(in crate::ops) fn steps(&self) -> usize {
        self.steps
    }

    /// Numbers of k that these steps hold.
    fn depth_of(&self, steps: Range<usize>) -> usize {
        (steps.end * K_STEP).min(self.depth) - steps.start * K_STEP
    }

    /// A strip from step `step` on.
    fn at(&self, strip: usize, step: usize) -> *const CacheLine {
        self.lines[strip * self.strip() + step * self.step()..].as_ptr()
    }
}

/// The blocks of an operand that several threads write.
#[derive(Clone, Copy)]
pub(in crate::ops) struct BlockWriter {
    at: SendPtr<CacheLine>,
    planes: usize,
    strip: usize,
}

impl BlockWriter {
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
                self.at
                    .add(strip * self.strip + step * self.planes * BLOCK_LINES),
            )
        };
    }
}

/// B of a sum: a matrix, the packed form of one that stays, or the rows of what was packed as A.
#[derive(Clone, Copy)]
enum Rhs<'a> {
    View(OperandView<'a>),
    Prepacked(&'a PackedOperand),
    Transposed(&'a PackedOperand),
}

impl<'a> Rhs<'a> {
    /// A matrix (k, n) that `a` is multiplied by.
    fn new(a: &Bf16Lhs, b: &MatRef<'a>) -> Self {
        match b.held(&|| super::packed_rhs::PackedRhs::Bf16(a.held())) {
            Some(super::packed_rhs::PackedRhs::Bf16(held)) => Self::Prepacked(&held.operand),
            _ => Self::View(OperandView::b(b)),
        }
    }

    fn lanes(&self) -> usize {
        match self {
            Self::View(view) => view.lanes,
            Self::Prepacked(operand) => operand.lanes,
            Self::Transposed(operand) => operand.depth,
        }
    }

    fn depth(&self) -> usize {
        match self {
            Self::View(view) => view.depth,
            Self::Prepacked(operand) => operand.depth,
            Self::Transposed(operand) => operand.lanes,
        }
    }

    /// Planes beside an A of `planes`.
    fn planes(&self, planes: usize) -> usize {
        match self {
            Self::View(view) => view.planes(planes),
            Self::Prepacked(operand) | Self::Transposed(operand) => operand.planes,
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
    fn pack(&self, planes: usize, panel: usize, steps: Range<usize>, out: &mut [CacheLine]) {
        match self {
            Self::View(view) => {
                let k = steps.start * K_STEP..(steps.end * K_STEP).min(view.depth);
                view.pack(planes, panel * TILE, k, out);
            }
            Self::Prepacked(_) => {}
            Self::Transposed(operand) => {
                for (step, out) in steps.zip(out.chunks_exact_mut(operand.step())) {
                    for (block, out) in operand
                        .block(step, panel)
                        .chunks_exact(BLOCK_LINES)
                        .zip(out.chunks_exact_mut(BLOCK_LINES))
                    {
                        turn(block, out);
                    }
                }
            }
        }
    }
}

/// A term of a sum.
type PackedTerm<'a> = (&'a PackedOperand, Rhs<'a>);

/// out, rows of `out.1` numbers = [out where `onto`] + strips of A times strips of B, over `steps` of k from each one's step on: on
/// this thread. B has A's planes, or is one of numbers stored in bf16.
pub(in crate::ops) fn gemm_strips(
    ready: &ActiveUnit,
    a: (&PackedOperand, Range<usize>, usize),
    b: (&PackedOperand, Range<usize>, usize),
    steps: usize,
    out: (&mut [f32], usize),
    onto: bool,
) {
    assert!(
        a.2 + steps <= a.0.steps && b.2 + steps <= b.0.steps,
        "both operands have these steps"
    );
    assert!(
        a.1.end * TILE < a.0.lanes + TILE && b.1.end * TILE < b.0.lanes + TILE,
        "both operands have these strips"
    );
    assert!(
        b.0.planes == a.0.planes || b.0.planes == BF16_PLANES,
        "B has A's planes or one"
    );
    let (rows, columns) = (a.1.len() * TILE, b.1.len() * TILE);
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
            let size = ((a.0.lanes - strip * TILE).min(TILE), TILE);
            // SAFETY: all asserted above.
            unsafe {
                let at = out.0.as_mut_ptr().add(row * TILE * out.1 + column * TILE);
                ready.multiply(a.0.planes, [run, Run::EMPTY], (at, out.1), size, onto);
            }
        }
    }
}

/// A, packed for a unit.
pub(in crate::ops) struct Bf16Lhs {
    unit: MatrixUnit,
    operand: PackedOperand,
}

impl Bf16Lhs {
    /// Packs `a` where it has rows enough.
    pub(in crate::ops) fn new(
        unit: MatrixUnit,
        a: &MatRef<'_>,
        precision: Precision,
    ) -> Option<Self> {
        let planes = if precision == Precision::F32 {
            F32_PLANES
        } else {
            BF16_PLANES
        };
        (a.rows >= MIN_ROWS).then(|| Self {
            unit,
            operand: PackedOperand::shared(planes, &OperandView::a(a)),
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
            operand: unsafe { PackedOperand::uninit(self.operand.planes, rows, columns) },
        }
    }

    /// Where blocks are written.
    pub(in crate::ops) fn blocks(&mut self) -> BlockWriter {
        self.operand.blocks()
    }

    /// What it can be multiplied by; holds nothing yet.
    pub(super) fn held(&self) -> Bf16Rhs {
        Bf16Rhs {
            unit: self.unit,
            planes: self.operand.planes,
            operand: PackedOperand::new(BF16_PLANES),
        }
    }
}

/// A B of many products.
pub(in crate::ops) struct Bf16Rhs {
    unit: MatrixUnit,
    /// A's.
    planes: usize,
    operand: PackedOperand,
}

impl Bf16Rhs {
    /// Whether both are for the same A's.
    pub(super) fn is_compatible(&self, other: &Self) -> bool {
        (self.unit, self.planes) == (other.unit, other.planes)
    }

    /// Packs `matrix` instead of what was held, on all threads.
    pub(super) fn pack(&mut self, matrix: &MatRef<'_>) {
        let view = OperandView::b(matrix);
        self.operand.planes = view.planes(self.planes);
        self.operand.pack_parallel(&view);
    }

    /// out = rows of `a`, from a whole strip on, times what is held.
    pub(super) fn gemm(&self, a: &Bf16Lhs, rows: Range<usize>, out: (&mut [f32], usize)) {
        assert!(rows.start.is_multiple_of(TILE), "rows begin with a strip");
        self.times(
            &a.operand,
            rows.start / TILE..rows.end.div_ceil(TILE),
            out,
            false,
        );
    }

    /// out += the first `rows` rows of `a`, `a.1` numbers apart, times what is held.
    pub(super) fn gemm_add(&self, rows: usize, a: (&[f32], usize), out: (&mut [f32], usize)) {
        let view = OperandView::new(
            Side::Lhs,
            CpuSlice::F32(a.0),
            0,
            (rows, a.1),
            (self.operand.depth, 1),
        );
        self.times(
            &PackedOperand::from_view(self.planes, &view),
            0..rows.div_ceil(TILE),
            out,
            true,
        );
    }

    /// out = [out where it is to `add`] + strips of A times all of B, on this thread: as much of B at a time as a task packs elsewhere.
    fn times(
        &self,
        a: &PackedOperand,
        strips: Range<usize>,
        (out, row): (&mut [f32], usize),
        add: bool,
    ) {
        let (b, ready) = (&self.operand, ActiveUnit::new(self.unit));
        assert_eq!(a.planes, self.planes, "a B is held for A's planes");
        assert_eq!(a.depth, b.depth, "A's and B's k are one");
        for steps in even_parts(0..a.steps, deepest(a.planes)) {
            for panels in even_parts(0..b.strips(), together(steps.len() * b.step())) {
                let (a, first) = ((a, strips.clone(), steps.start), panels.start * TILE);
                gemm_strips(
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
    MAX_PANEL_BYTES / (planes * BLOCK_LINES * size_of::<CacheLine>())
}

/// Panels of one task, of so many lines each.
fn together(lines: usize) -> usize {
    (TASK_BYTES / (lines * size_of::<CacheLine>()).max(1)).max(1)
}

/// out (m, n) = a times the rows of what was packed as A, for any number of rows.
pub(super) fn gemm_by_packed(a: &MatRef<'_>, b: &Bf16Lhs, out: &mut [f32]) {
    let a = PackedOperand::shared(b.operand.planes, &OperandView::a(a));
    gemm_sum_of(
        b.unit,
        &[(&a, Rhs::Transposed(&b.operand))],
        Init::Zero,
        out,
    );
}

/// out (m, n) = start + the sum of the terms, of which there is one at least.
pub(super) fn gemm_sum(terms: &[(&Bf16Lhs, MatRef<'_>)], start: Init<'_>, out: &mut [f32]) {
    let unit = terms[0].0.unit;
    gemm_sum_of(unit, &terms_by(unit, terms), start, out);
}

/// The terms, each B as its form that stays where there is one.
fn terms_by<'a>(unit: MatrixUnit, terms: &[(&'a Bf16Lhs, MatRef<'a>)]) -> Vec<PackedTerm<'a>> {
    assert!(
        terms.iter().all(|(a, _)| a.unit == unit),
        "operands of one sum are packed for one unit"
    );
    terms
        .iter()
        .map(|(a, b)| (&a.operand, Rhs::new(a, b)))
        .collect()
}

fn gemm_sum_of(unit: MatrixUnit, terms: &[PackedTerm<'_>], start: Init<'_>, out: &mut [f32]) {
    let (m, n) = (terms[0].0.lanes, terms[0].1.lanes());
    assert_eq!(out.len(), m * n, "a result is (m, n)");
    let passes = Sum::passes(terms, (m, n));
    for (index, sum) in passes.iter().enumerate() {
        let last = index + 1 == passes.len();
        let start = if last { start } else { Init::Zero };
        let pass = GemmPass {
            unit,
            sum,
            onto: index > 0,
            start,
            out: SendPtr(out.as_mut_ptr()),
            m,
            n,
        };
        tasks(
            n.div_ceil(TILE),
            together(sum.lines),
            (m.div_ceil(TILE), 1),
            |panels, strips| pass.task(panels, strips),
        );
    }
}

/// Computes sums of one shape tile by tile, and gives `take` the tiles of each strip (of 32 rows) and panel (of 32 columns): zero beyond
/// the last row and column.
pub(in crate::ops) fn gemm_tiles<const S: usize>(
    sums: [&[(&Bf16Lhs, MatRef<'_>)]; S],
    take: impl Fn(usize, usize, &mut [Tile; S]) + Sync,
) {
    let unit = sums[0][0].0.unit;
    let sums = sums.map(|terms| terms_by(unit, terms));
    let (m, n) = (sums[0][0].0.lanes, sums[0][0].1.lanes());
    sums.iter()
        .flatten()
        .for_each(|(a, _)| count_flops(1, m, n, a.depth));
    let sums = sums.map(|terms| Sum::passes(&terms, (m, n)));
    let all = || sums.iter().flatten();
    let (size, most) = (
        all().map(|sum| sum.packed).sum(),
        together(all().map(|sum| sum.lines).sum()),
    );
    tasks(
        n.div_ceil(TILE),
        most,
        (m.div_ceil(TILE), 1),
        |panels, strips| {
            with_room(panels.len() * size, |packed| {
                let mut done = 0;
                for sum in all() {
                    sum.pack(panels.clone(), &mut packed[done..], size);
                    done += sum.packed;
                }
                let ready = ActiveUnit::new(unit);
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
                                        (tile.0.as_mut_ptr(), TILE),
                                        (TILE, TILE),
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
pub(in crate::ops) struct Tile(pub(in crate::ops) [f32; TILE * TILE]);

impl Tile {
    pub(in crate::ops) const ZERO: Self = Self([0.0; TILE * TILE]);
}

/// A run of k of one term.
struct KBlock<'a> {
    a: &'a PackedOperand,
    b: Rhs<'a>,
    steps: Range<usize>,
    /// B's: A's, or one.
    planes: usize,
}

impl KBlock<'_> {
    /// Lines of B's panel.
    fn lines(&self) -> usize {
        self.steps.len() * self.planes * BLOCK_LINES
    }

    /// Those of them that are not kept.
    fn packed(&self) -> usize {
        if matches!(self.b, Rhs::Prepacked(_)) {
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
    pieces: Vec<KBlock<'a>>,
    /// Lines of a panel of B, over all pieces, and those of them that are packed for this product.
    lines: usize,
    packed: usize,
}

impl<'a> Sum<'a> {
    /// The terms of a result (m, n), in as many passes as it takes.
    fn passes(terms: &[PackedTerm<'a>], (m, n): (usize, usize)) -> Vec<Self> {
        let planes = terms[0].0.planes;
        let most = deepest(planes);
        let mut passes: Vec<Vec<KBlock<'a>>> = vec![Vec::new()];
        let mut done = 0;
        for &(a, b) in terms {
            assert!(
                a.lanes == m && b.lanes() == n && a.depth == b.depth(),
                "the terms of a sum have one shape"
            );
            assert_eq!(a.planes, planes, "operands of one sum are packed alike");
            for steps in even_parts(0..a.steps, most) {
                let piece = KBlock {
                    a,
                    b,
                    steps,
                    planes: b.planes(planes),
                };
                // An adapter's few steps join whatever is there.
                let joins = |pass: &Vec<KBlock<'_>>| {
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
        let sum = |pieces: Vec<KBlock<'a>>| {
            let of = |lines: fn(&KBlock<'a>) -> usize| pieces.iter().map(lines).sum();
            Self {
                planes,
                lines: of(KBlock::lines),
                packed: of(KBlock::packed),
                pieces,
            }
        };
        passes.into_iter().map(sum).collect()
    }

    /// Packs these panels of B, `size` lines apart, where they are not kept.
    fn pack(&self, panels: Range<usize>, packed: &mut [CacheLine], size: usize) {
        let mut done = 0;
        for piece @ KBlock {
            b,
            steps: all,
            planes,
            ..
        } in self.pieces.iter().filter(|piece| piece.packed() > 0)
        {
            for steps in even_parts(all.clone(), b.at_once(all.len())) {
                let at = done + (steps.start - all.start) * planes * BLOCK_LINES;
                for panel in panels.clone() {
                    let packed = &mut packed[(panel - panels.start) * size + at..]
                        [..steps.len() * planes * BLOCK_LINES];
                    b.pack(*planes, panel, steps.clone(), packed);
                }
            }
            done += piece.packed();
        }
    }

    /// out (32, 32), `out.1` numbers from row to row = [out where `onto`] + a strip of A times a panel; `size` as `ActiveUnit::multiply`'s.
    ///
    /// # Safety
    /// What is not kept of the panel is packed from `packed`'s first line on, and `out` is writable.
    unsafe fn tile(
        &self,
        ready: &ActiveUnit,
        (strip, panel): (usize, usize),
        packed: &[CacheLine],
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
            let KBlock {
                a, steps, planes, ..
            } = piece;
            let b = match piece.b {
                Rhs::Prepacked(operand) => operand.at(panel, steps.start),
                Rhs::View(_) | Rhs::Transposed(_) => packed[done..].as_ptr(),
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
    static PANELS: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with this thread's room for `lines` of packed B.
fn with_room(lines: usize, work: impl FnOnce(&mut [CacheLine])) {
    PANELS.with_borrow_mut(|buffer| {
        if buffer.len() < lines {
            // SAFETY: panels are packed before a tile reads them.
            *buffer = unsafe { uninit_vec(lines) };
        }
        work(&mut buffer[..lines]);
    });
}

/// One pass over the result.
struct GemmPass<'a> {
    unit: MatrixUnit,
    sum: &'a Sum<'a>,
    /// Whether it goes on from what the passes before left in `out`.
    onto: bool,
    start: Init<'a>,
    out: SendPtr,
    m: usize,
    n: usize,
}

impl GemmPass<'_> {
    /// Packs these panels (of 32 columns of B) and multiplies these strips (of 32 rows of A) by them.
    fn task(&self, panels: Range<usize>, strips: Range<usize>) {
        let size = self.sum.packed;
        with_room(panels.len() * size, |packed| {
            self.sum.pack(panels.clone(), packed, size);
            let ready = ActiveUnit::new(self.unit);
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

    fn tile(&self, ready: &ActiveUnit, strip: usize, panel: usize, packed: &[CacheLine]) {
        let (row, column) = (strip * TILE, panel * TILE);
        let (rows, columns) = ((self.m - row).min(TILE), (self.n - column).min(TILE));
        let start = match self.start {
            Init::Zero => None,
            Init::Bias(values) => Some((&values[column..], 0)),
            Init::Matrix(values) => Some((&values[row * self.n + column..], self.n)),
        };
        // SAFETY: this task alone writes these rows and columns of `out`, which has m rows of n numbers; `task` packed the
        // panel.
        unsafe {
            let out = self.out.add(row * self.n + column);
            if rows == TILE && columns == TILE && start.is_none() {
                return self.sum.tile(
                    ready,
                    (strip, panel),
                    packed,
                    (out, self.n),
                    (TILE, TILE),
                    self.onto,
                );
            }
            let mut scratch = MaybeUninit::<Tile>::uninit();
            let at = scratch.as_mut_ptr().cast::<f32>();
            if self.onto {
                (0..rows).for_each(|i| {
                    at.add(i * TILE)
                        .copy_from_nonoverlapping(out.add(i * self.n), columns)
                });
            }
            self.sum.tile(
                ready,
                (strip, panel),
                packed,
                (at, TILE),
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
                let mut sum = _mm512_maskz_loadu_ps(mask, tile.add(row * TILE + column));
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
