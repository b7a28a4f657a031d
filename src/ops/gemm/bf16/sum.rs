//! Parallel sums of products on a matrix unit, micro-tile by micro-tile.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::{OperandView, transpose_block};
use super::unit::{BLOCK_LINES, CacheLine, K_STEP, KRun, TileOut};
use super::{
    ActiveUnit, Bf16Lhs, MatrixUnit, PackedOperand, TILE, Tile, max_steps, panels_per_task,
};
use crate::ops::count_flops;
use crate::ops::gemm::packed_rhs::PackedRhs;
use crate::ops::gemm::schedule::{even_parts, par_for_each_task};
use crate::ops::gemm::{Init, MatRef, span};
use crate::ops::storage::{SendPtr, uninit_vec};

/// Source of B's panels.
#[derive(Clone, Copy)]
enum Rhs<'a> {
    /// A matrix (k, n).
    View(OperandView<'a>),
    /// A weight's cached packed form.
    Prepacked(&'a PackedOperand),
    /// A matrix (k, n) that was packed as a left-hand side.
    Transposed(&'a PackedOperand),
}

impl<'a> Rhs<'a> {
    fn new(a: &Bf16Lhs, b: &MatRef<'a>) -> Self {
        match b.prepacked(&|| PackedRhs::Bf16(a.empty_rhs())) {
            Some(PackedRhs::Bf16(rhs)) => Self::Prepacked(&rhs.operand),
            _ => Self::View(OperandView::rhs(b)),
        }
    }

    /// n.
    fn lanes(&self) -> usize {
        match self {
            Self::View(view) => view.lanes,
            Self::Prepacked(operand) => operand.lanes,
            Self::Transposed(operand) => operand.depth,
        }
    }

    /// k.
    fn depth(&self) -> usize {
        match self {
            Self::View(view) => view.depth,
            Self::Prepacked(operand) => operand.depth,
            Self::Transposed(operand) => operand.lanes,
        }
    }

    /// Planes of B in a product with an A of `lhs_planes`.
    fn planes(&self, lhs_planes: usize) -> usize {
        match self {
            Self::View(view) => view.rhs_planes(lhs_planes),
            Self::Prepacked(operand) | Self::Transposed(operand) => operand.planes,
        }
    }

    /// Steps packed for all panels of a task before the next. A matrix strided along k is read one
    /// step at a time: else every panel would touch the pages of all its rows again.
    fn steps_at_once(&self, steps: usize) -> usize {
        match self {
            Self::View(view) if !view.contiguous_k() => 1,
            _ => steps.max(1),
        }
    }

    /// Packs steps `steps` of a panel.
    fn pack(&self, planes: usize, panel: usize, steps: Range<usize>, out: &mut [CacheLine]) {
        match self {
            Self::View(view) => {
                let k = steps.start * K_STEP..(steps.end * K_STEP).min(view.depth);
                view.pack(planes, panel * TILE, k, out);
            }
            Self::Prepacked(_) => {}
            Self::Transposed(operand) => {
                for (step, out) in steps.zip(out.chunks_exact_mut(operand.step_lines())) {
                    let block = operand.block(step, panel).chunks_exact(BLOCK_LINES);
                    for (plane, out) in block.zip(out.chunks_exact_mut(BLOCK_LINES)) {
                        transpose_block(plane, out);
                    }
                }
            }
        }
    }
}

/// One product of a sum, in packed form.
#[derive(Clone, Copy)]
struct PackedTerm<'a> {
    lhs: &'a PackedOperand,
    rhs: Rhs<'a>,
}

/// The terms with the source of each B: its cached form if there is one.
fn packed_terms<'a>(unit: MatrixUnit, terms: &[(&'a Bf16Lhs, MatRef<'a>)]) -> Vec<PackedTerm<'a>> {
    assert!(
        terms.iter().all(|(a, _)| a.unit == unit),
        "operands of one sum are packed for one unit"
    );
    let term = |(a, b): &(&'a Bf16Lhs, MatRef<'a>)| PackedTerm {
        lhs: &a.operand,
        rhs: Rhs::new(a, b),
    };
    terms.iter().map(term).collect()
}

/// out (m, n) = a (m, k) times b (k, n), which was packed as a left-hand side; any m.
pub(in crate::ops::gemm) fn gemm_by_packed(a: &MatRef<'_>, b: &Bf16Lhs, out: &mut [f32]) {
    let mut lhs = PackedOperand::new(b.operand.planes);
    lhs.par_pack(&OperandView::lhs(a));
    let term = PackedTerm {
        lhs: &lhs,
        rhs: Rhs::Transposed(&b.operand),
    };
    gemm_packed(b.unit, &[term], Init::Zero, out);
}

/// out (m, n) = init + the sum of at least one term.
pub(in crate::ops::gemm) fn gemm_sum(
    terms: &[(&Bf16Lhs, MatRef<'_>)],
    init: Init<'_>,
    out: &mut [f32],
) {
    let unit = terms[0].0.unit;
    gemm_packed(unit, &packed_terms(unit, terms), init, out);
}

fn gemm_packed(unit: MatrixUnit, terms: &[PackedTerm<'_>], init: Init<'_>, out: &mut [f32]) {
    let m = terms[0].lhs.lanes;
    let n = terms[0].rhs.lanes();
    assert_eq!(Some(out.len()), m.checked_mul(n), "a result is (m, n)");
    let passes = SumPass::all(terms, m, n);
    for (index, sum) in passes.iter().enumerate() {
        let last = index + 1 == passes.len();
        let output = Output {
            init: if last { init } else { Init::Zero },
            accumulate: index > 0,
            out: SendPtr(out.as_mut_ptr()),
            m,
            n,
        };
        let no_scratch = || ();
        par_for_each_tile(
            unit,
            &[sum],
            m,
            n,
            no_scratch,
            |(), unit, strip, panel, packed| {
                output.tile(sum, unit, strip, panel, packed);
            },
        );
    }
}

/// Computes `S` sums of one shape and passes the micro-tiles of each (strip, panel) to `consume`
/// while they are in cache; they are zero beyond the last row and column.
pub(in crate::ops) fn gemm_tiles<const S: usize>(
    sums: [&[(&Bf16Lhs, MatRef<'_>)]; S],
    consume: impl Fn(usize, usize, &mut [Tile; S]) + Sync,
) {
    let unit = sums[0][0].0.unit;
    let sums = sums.map(|terms| packed_terms(unit, terms));
    let m = sums[0][0].lhs.lanes;
    let n = sums[0][0].rhs.lanes();
    for term in sums.iter().flatten() {
        count_flops(1, m, n, term.lhs.depth);
    }
    let sums = sums.map(|terms| SumPass::all(&terms, m, n));
    let all: Vec<&SumPass<'_>> = sums.iter().flatten().collect();
    let scratch = || [Tile::ZERO; S];
    par_for_each_tile(
        unit,
        &all,
        m,
        n,
        scratch,
        |tiles, unit, strip, panel, mut packed| {
            for (tile, passes) in tiles.iter_mut().zip(&sums) {
                for (index, sum) in passes.iter().enumerate() {
                    let out = TileOut {
                        ptr: tile.0.as_mut_ptr(),
                        stride: TILE,
                        rows: TILE,
                        columns: TILE,
                        accumulate: index > 0,
                    };
                    // SAFETY: the panel is packed, in this order; `out` is a tile.
                    unsafe { sum.tile(unit, strip, panel, packed, out) };
                    packed = &packed[sum.packed_lines..];
                }
            }
            consume(strip, panel, tiles);
        },
    );
}

/// Calls `tile(scratch, unit, strip, panel, packed)` for every micro-tile of (m, n) in parallel,
/// with the panel of each of `sums` packed one after the other and a `scratch` for each task.
fn par_for_each_tile<T>(
    unit: MatrixUnit,
    sums: &[&SumPass<'_>],
    m: usize,
    n: usize,
    scratch: impl Fn() -> T + Sync,
    tile: impl Fn(&mut T, &ActiveUnit, usize, usize, &[CacheLine]) + Sync,
) {
    let size: usize = sums.iter().map(|sum| sum.packed_lines).sum();
    let max_panels = panels_per_task(sums.iter().map(|sum| sum.lines).sum());
    let task = |panels: Range<usize>, strips: Range<usize>| {
        with_panel_buffer(panels.len() * size, |packed| {
            let mut done = 0;
            for sum in sums {
                sum.pack(panels.clone(), &mut packed[done..], size);
                done += sum.packed_lines;
            }
            let unit = ActiveUnit::new(unit);
            let mut scratch = scratch();
            for strip in strips {
                for panel in panels.clone() {
                    let packed = &packed[(panel - panels.start) * size..][..size];
                    tile(&mut scratch, &unit, strip, panel, packed);
                }
            }
        });
    };
    par_for_each_task(n.div_ceil(TILE), max_panels, m.div_ceil(TILE), 1, task);
}

thread_local! {
    static PANELS: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with this thread's buffer for `lines` lines of packed B, uninitialized.
fn with_panel_buffer(lines: usize, work: impl FnOnce(&mut [CacheLine])) {
    PANELS.with_borrow_mut(|buffer| {
        if buffer.len() < lines {
            // SAFETY: panels are packed before a kernel reads them.
            *buffer = unsafe { uninit_vec(lines) };
        }
        work(&mut buffer[..lines]);
    });
}

/// A block of k of one term.
struct PackedKBlock<'a> {
    lhs: &'a PackedOperand,
    rhs: Rhs<'a>,
    steps: Range<usize>,
    rhs_planes: usize,
}

impl PackedKBlock<'_> {
    /// Cache lines of B's panel.
    fn lines(&self) -> usize {
        self.steps.len() * self.rhs_planes * BLOCK_LINES
    }

    /// Cache lines of B's panel to pack: none if B is cached.
    fn packed_lines(&self) -> usize {
        if matches!(self.rhs, Rhs::Prepacked(_)) {
            0
        } else {
            self.lines()
        }
    }
}

/// The blocks of k summed while a micro-tile stays in registers: at most two, the one of fewer
/// planes first.
struct SumPass<'a> {
    lhs_planes: usize,
    blocks: Vec<PackedKBlock<'a>>,
    /// Cache lines of a panel of B over all blocks, and those to pack: all but the cached ones.
    lines: usize,
    packed_lines: usize,
}

impl<'a> SumPass<'a> {
    fn new(lhs_planes: usize, blocks: Vec<PackedKBlock<'a>>) -> Self {
        Self {
            lhs_planes,
            lines: blocks.iter().map(PackedKBlock::lines).sum(),
            packed_lines: blocks.iter().map(PackedKBlock::packed_lines).sum(),
            blocks,
        }
    }

    /// The passes over a result (m, n) that sum all terms.
    fn all(terms: &[PackedTerm<'a>], m: usize, n: usize) -> Vec<Self> {
        let planes = terms[0].lhs.planes;
        let max_steps = max_steps(planes);
        let mut passes: Vec<Vec<PackedKBlock<'a>>> = vec![Vec::new()];
        let mut done = 0;
        for &PackedTerm { lhs, rhs } in terms {
            assert!(
                lhs.lanes == m && rhs.lanes() == n && lhs.depth == rhs.depth(),
                "the terms of a sum have one shape"
            );
            assert_eq!(lhs.planes, planes, "operands of one sum are packed alike");
            let rhs_planes = rhs.planes(planes);
            for steps in even_parts(0..lhs.steps, max_steps) {
                // An eighth more than a full panel, so that an adapter's few steps join the pass of
                // its layer.
                let fits = done + steps.len() <= max_steps + max_steps / 8
                    && passes.last().is_some_and(|pass| {
                        pass.len() < 2 && pass.iter().all(|block| block.rhs_planes <= rhs_planes)
                    });
                if done > 0 && !fits {
                    passes.push(Vec::new());
                    done = 0;
                }
                done += steps.len();
                if let Some(pass) = passes.last_mut() {
                    pass.push(PackedKBlock {
                        lhs,
                        rhs,
                        steps,
                        rhs_planes,
                    });
                }
            }
        }
        let pass = |blocks| Self::new(planes, blocks);
        passes.into_iter().map(pass).collect()
    }

    /// Packs these panels of B, `size` lines apart, except for cached forms.
    fn pack(&self, panels: Range<usize>, packed: &mut [CacheLine], size: usize) {
        let mut done = 0;
        for block in self.blocks.iter().filter(|block| block.packed_lines() > 0) {
            let step_lines = block.rhs_planes * BLOCK_LINES;
            let at_once = block.rhs.steps_at_once(block.steps.len());
            for steps in even_parts(block.steps.clone(), at_once) {
                let at = done + (steps.start - block.steps.start) * step_lines;
                for panel in panels.clone() {
                    let packed = &mut packed[(panel - panels.start) * size + at..]
                        [..steps.len() * step_lines];
                    block
                        .rhs
                        .pack(block.rhs_planes, panel, steps.clone(), packed);
                }
            }
            done += block.packed_lines();
        }
    }

    /// out = a strip of A times a panel of B, or out += it.
    ///
    /// # Safety
    /// `packed` starts with the panel as `pack` left it; `out` is writable.
    unsafe fn tile(
        &self,
        unit: &ActiveUnit,
        strip: usize,
        panel: usize,
        packed: &[CacheLine],
        out: TileOut,
    ) {
        assert!(
            packed.len() >= self.packed_lines,
            "a panel has all blocks that are packed"
        );
        let mut runs = [KRun::EMPTY; 2];
        let mut done = 0;
        for (run, block) in runs.iter_mut().zip(&self.blocks) {
            *run = KRun {
                a: block.lhs.at(strip, block.steps.start),
                b: match block.rhs {
                    Rhs::Prepacked(operand) => operand.at(panel, block.steps.start),
                    Rhs::View(_) | Rhs::Transposed(_) => packed[done..].as_ptr(),
                },
                planes: block.rhs_planes,
                depth: block.lhs.depth_of(block.steps.clone()),
            };
            done += block.packed_lines();
        }
        // SAFETY: the caller's promise; A's strips and cached panels have all their steps.
        unsafe { unit.multiply(self.lhs_planes, runs, out) };
    }
}

/// Where a pass writes its result (m, n).
struct Output<'a> {
    init: Init<'a>,
    /// Whether `out` has the sum of the passes before.
    accumulate: bool,
    out: SendPtr,
    m: usize,
    n: usize,
}

impl Output<'_> {
    /// Computes one micro-tile; on the edges and with an initial value, through scratch.
    fn tile(
        &self,
        sum: &SumPass<'_>,
        unit: &ActiveUnit,
        strip: usize,
        panel: usize,
        packed: &[CacheLine],
    ) {
        let row = strip * TILE;
        let column = panel * TILE;
        let init = self.init.rows_from(row, column, self.n);
        // SAFETY: no other task writes these rows and columns of `out` (m, n); the panel is packed.
        unsafe {
            let out = TileOut {
                ptr: self.out.add(row * self.n + column),
                stride: self.n,
                rows: (self.m - row).min(TILE),
                columns: (self.n - column).min(TILE),
                accumulate: self.accumulate,
            };
            if out.rows == TILE && out.columns == TILE && init.is_none() {
                return sum.tile(unit, strip, panel, packed, out);
            }
            let mut scratch = MaybeUninit::<Tile>::uninit();
            let tile = TileOut {
                ptr: scratch.as_mut_ptr().cast::<f32>(),
                stride: TILE,
                ..out
            };
            if self.accumulate {
                for row in 0..out.rows {
                    let from = out.ptr.add(row * out.stride);
                    let to = tile.ptr.add(row * TILE);
                    to.copy_from_nonoverlapping(from, out.columns);
                }
            }
            sum.tile(unit, strip, panel, packed, tile);
            store_tile(tile.ptr, init, out);
        }
    }
}

/// out = a tile + init; `init`: elements and row stride.
///
/// # Safety
/// The tile is readable and `out` writable; the CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn store_tile(tile: *const f32, init: Option<(&[f32], usize)>, out: TileOut) {
    use std::arch::x86_64::{_mm512_add_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps};
    let TileOut { rows, columns, .. } = out;
    if let Some((init, stride)) = init {
        assert!(
            span(rows, stride, columns).is_some_and(|end| end <= init.len()),
            "every element has an initial value"
        );
    }
    for row in 0..rows {
        for column in (0..columns).step_by(16) {
            let mask = if columns - column < 16 {
                (1 << (columns - column)) - 1
            } else {
                u16::MAX
            };
            // SAFETY: the mask covers what lies inside every row: the caller's promise, and
            // asserted.
            unsafe {
                let mut sum = _mm512_maskz_loadu_ps(mask, tile.add(row * TILE + column));
                if let Some((init, stride)) = init {
                    let init = init.as_ptr().add(row * stride + column);
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, init));
                }
                _mm512_mask_storeu_ps(out.ptr.add(row * out.stride + column), mask, sum);
            }
        }
    }
}
