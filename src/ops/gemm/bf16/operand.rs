//! Operands packed for a matrix unit.
//!
//! A lane is a row of A or a column of B. Lanes are packed in strips of 32, a strip in steps of 32
//! k, a step in planes, and a plane is 32 cache lines (`pack`). For A, a plane is a block of 32
//! rows by 32 k in row-major bf16.

use std::ops::Range;

use super::Tile;
use super::pack::{OperandView, pack_block, upcast_block};
use super::unit::{BF16_PLANES, BLOCK_LINES, CacheLine, F32_PLANES, K_STEP, TILE};
use crate::ops::gemm::MatRef;
use crate::ops::parallel::par_for_each;
use crate::ops::storage::{SendPtr, uninit_vec};

/// One side of a product, packed.
pub(in crate::ops) struct PackedOperand {
    lines: Vec<CacheLine>,
    /// `BF16_PLANES` or `F32_PLANES`.
    pub(super) planes: usize,
    /// Rows of A or columns of B.
    pub(super) lanes: usize,
    /// k.
    pub(super) depth: usize,
    /// Steps of 32 k: `depth / 32`, rounded up.
    pub(super) steps: usize,
}

impl PackedOperand {
    /// An empty buffer for operands of 1 or 3 planes.
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

    /// `a`, packed as a left-hand side on this thread.
    pub(in crate::ops) fn lhs(planes: usize, a: MatRef<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.pack_lhs(a);
        operand
    }

    /// `b`, packed as a right-hand side on this thread.
    pub(in crate::ops) fn rhs(planes: usize, b: MatRef<'_>) -> Self {
        let mut operand = Self::new(planes);
        operand.pack_rhs(b);
        operand
    }

    /// A left-hand side (rows, columns) to be written by a `BlockWriter`.
    ///
    /// # Safety
    /// Every block is written before it is read.
    pub(in crate::ops) unsafe fn uninit(planes: usize, rows: usize, columns: usize) -> Self {
        let mut operand = Self::new(planes);
        operand.resize(rows, columns);
        operand
    }

    /// Packs `a` as a left-hand side over the previous contents, on this thread.
    pub(in crate::ops) fn pack_lhs(&mut self, a: MatRef<'_>) {
        self.pack(&OperandView::lhs(&a));
    }

    /// Packs `b` as a right-hand side over the previous contents, on this thread.
    pub(in crate::ops) fn pack_rhs(&mut self, b: MatRef<'_>) {
        self.pack(&OperandView::rhs(&b));
    }

    /// Packs `view` on this thread.
    fn pack(&mut self, view: &OperandView<'_>) {
        let planes = self.planes;
        self.strips_mut(view).for_each(|(strip, lines)| {
            view.pack(planes, strip * TILE, 0..view.depth, lines);
        });
    }

    /// Packs `view` in parallel.
    pub(super) fn par_pack(&mut self, view: &OperandView<'_>) {
        let planes = self.planes;
        par_for_each(self.strips_mut(view), |(strip, lines)| {
            view.pack(planes, strip * TILE, 0..view.depth, lines);
        });
    }

    /// Resizes for `view`; returns each strip's index and cache lines.
    fn strips_mut(
        &mut self,
        view: &OperandView<'_>,
    ) -> impl Iterator<Item = (usize, &mut [CacheLine])> {
        self.resize(view.lanes, view.depth);
        let lines = self.strip_lines().max(1);
        let strips = self.strips();
        self.lines.chunks_exact_mut(lines).take(strips).enumerate()
    }

    /// Sets the shape; the contents are undefined until packed.
    fn resize(&mut self, lanes: usize, depth: usize) {
        (self.lanes, self.depth, self.steps) = (lanes, depth, depth.div_ceil(K_STEP));
        let size = self.strips() * self.strip_lines();
        if self.lines.len() < size {
            // SAFETY: packing writes every line of the strips before a kernel reads them.
            self.lines = unsafe { uninit_vec(size) };
        }
    }

    /// Number of strips.
    pub(super) fn strips(&self) -> usize {
        self.lanes.div_ceil(TILE)
    }

    /// Number of steps of k.
    pub(in crate::ops) fn steps(&self) -> usize {
        self.steps
    }

    /// Cache lines of a strip.
    fn strip_lines(&self) -> usize {
        self.steps * self.step_lines()
    }

    /// Cache lines of a step of a strip: all its planes.
    pub(super) fn step_lines(&self) -> usize {
        self.planes * BLOCK_LINES
    }

    /// Elements of k in these steps.
    pub(super) fn depth_of(&self, steps: Range<usize>) -> usize {
        (steps.end * K_STEP).min(self.depth) - steps.start * K_STEP
    }

    /// The cache lines of a step of a strip: all its planes.
    pub(super) fn block(&self, strip: usize, step: usize) -> &[CacheLine] {
        &self.lines[strip * self.strip_lines() + step * self.step_lines()..][..self.step_lines()]
    }

    /// The first plane of a block, in f32.
    pub(in crate::ops) fn read(&self, strip: usize, step: usize) -> Tile {
        upcast_block(&self.block(strip, step)[..BLOCK_LINES])
    }

    /// The cache lines of a strip from a step on.
    pub(super) fn at(&self, strip: usize, step: usize) -> *const CacheLine {
        self.lines[strip * self.strip_lines() + step * self.step_lines()..].as_ptr()
    }

    /// A writer of blocks, for several threads.
    pub(in crate::ops) fn block_writer(&mut self) -> BlockWriter {
        BlockWriter {
            lines: SendPtr(self.lines.as_mut_ptr()),
            planes: self.planes,
            strip_lines: self.strip_lines(),
        }
    }

    /// A view of these strips from step `first_step` of k on.
    pub(in crate::ops) fn strips_from(
        &self,
        strips: Range<usize>,
        first_step: usize,
    ) -> Strips<'_> {
        Strips {
            operand: self,
            strips,
            first_step,
        }
    }
}

/// A view of some strips of an operand, from a step of k on.
pub(in crate::ops) struct Strips<'a> {
    pub(super) operand: &'a PackedOperand,
    pub(super) strips: Range<usize>,
    pub(super) first_step: usize,
}

impl Strips<'_> {
    /// Whether the operand has all these strips and `steps` steps.
    pub(super) fn exist(&self, steps: usize) -> bool {
        self.first_step + steps <= self.operand.steps
            && self.strips.end * TILE < self.operand.lanes + TILE
    }
}

/// Writes blocks of a left-hand side in packed form.
#[derive(Clone, Copy)]
pub(in crate::ops) struct BlockWriter {
    lines: SendPtr<CacheLine>,
    planes: usize,
    strip_lines: usize,
}

impl BlockWriter {
    /// Packs a tile as step `step` of a strip.
    ///
    /// # Safety
    /// The operand has this block and outlives the call, and no other thread accesses the block;
    /// the CPU has AVX-512 F, BW, VL and BF16.
    pub(in crate::ops) unsafe fn write(self, strip: usize, step: usize, tile: &Tile) {
        let line = strip * self.strip_lines + step * self.planes * BLOCK_LINES;
        // SAFETY: the caller's promise.
        unsafe { pack_block(self.planes, tile, self.lines.add(line)) };
    }
}
