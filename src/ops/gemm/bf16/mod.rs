//! GEMM on bf16 matrix units: bf16 in, f32 sums, micro-tiles of 32 x 32, on AMX tile registers or
//! AVX512-BF16 dot products, which share one packed layout (`operand`).
//!
//! In bf16, operands are rounded once, while they are packed. In f32, on AMX alone, each operand is
//! split into three bf16 planes that add up to its 24 bits, and the six products of planes above
//! 2^-24 are summed: as exact as f32 multiply-adds, and faster. B stored in bf16 is one plane,
//! which leaves three products. Denormals count as zero. The order of a sum depends neither on the
//! number of threads nor on the other size of the product.

pub(super) mod amx;
pub(super) mod avx512_bf16;
mod operand;
mod pack;
mod sum;
mod unit;

use std::ops::Range;

use self::operand::Strips;
use self::pack::OperandView;
use self::unit::{BLOCK_LINES, CacheLine, F32_PLANES, KRun, TileOut};
use super::schedule::even_parts;
use super::{MatMut, MatRef, span};
use crate::work::Precision;

pub(in crate::ops) use self::operand::{BlockWriter, PackedOperand};
pub(in crate::ops) use self::sum::gemm_tiles;
pub(super) use self::sum::{gemm_by_packed, gemm_sum};
pub(in crate::ops) use self::unit::{ActiveUnit, BF16_PLANES, MatrixUnit, TILE};

/// Maximum size of a panel of B: with A's strip it streams through an L2 of 2 MiB, which every CPU
/// with AMX has.
const MAX_PANEL_BYTES: usize = 128 << 10;
/// Bytes of packed B of one task: half of that L2. (Less gained nothing where L2 is 1 MiB:
/// benches/LOG.md, "a processor with fast dot products of bf16 pairs".)
const TASK_BYTES: usize = 1 << 20;

/// Minimum rows of A for a matrix unit. The product of a single row (a generated token) is bound by
/// reading B; from two rows on, the result of a row does not depend on the number of rows.
const MIN_ROWS: usize = 2;

/// A micro-tile of the result, row-major.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(in crate::ops) struct Tile(pub(in crate::ops) [f32; TILE * TILE]);

impl Tile {
    pub(in crate::ops) const ZERO: Self = Self([0.0; TILE * TILE]);
}

/// out = strips of A times strips of B over `steps` steps of k, or out += it, on this thread. B has
/// as many planes as A, or one. `out` has room for whole micro-tiles.
pub(in crate::ops) fn gemm_strips(
    unit: &ActiveUnit,
    a: Strips<'_>,
    b: Strips<'_>,
    steps: usize,
    out: MatMut<'_>,
    accumulate: bool,
) {
    check_room(&a, &b, steps, &out);
    let planes = a.operand.planes;
    let depth = a.operand.depth_of(a.first_step..a.first_step + steps);
    for (row, strip) in a.strips.clone().enumerate() {
        for (column, panel) in b.strips.clone().enumerate() {
            let run = KRun {
                a: a.operand.at(strip, a.first_step),
                b: b.operand.at(panel, b.first_step),
                planes: b.operand.planes,
                depth,
            };
            // SAFETY: checked above.
            unsafe {
                let at = row * TILE * out.stride + column * TILE;
                let out = TileOut {
                    ptr: out.values.as_mut_ptr().add(at),
                    stride: out.stride,
                    rows: (a.operand.lanes - strip * TILE).min(TILE),
                    columns: TILE,
                    accumulate,
                };
                unit.multiply(planes, [run, KRun::EMPTY], out);
            }
        }
    }
}

/// Panics unless the operands contain these steps and `out` has room for whole micro-tiles.
fn check_room(a: &Strips<'_>, b: &Strips<'_>, steps: usize, out: &MatMut<'_>) {
    assert!(
        a.exist(steps) && b.exist(steps),
        "operands have these strips and steps"
    );
    assert!(
        b.operand.planes == a.operand.planes || b.operand.planes == BF16_PLANES,
        "B has A's planes or one"
    );
    let rows = a.strips.len() * TILE;
    let columns = b.strips.len() * TILE;
    assert!(
        columns <= out.stride
            && span(rows, out.stride, columns).is_some_and(|end| end <= out.values.len()),
        "the result has room for its micro-tiles"
    );
}

/// A left-hand side packed for a matrix unit.
pub(in crate::ops) struct Bf16Lhs {
    unit: MatrixUnit,
    operand: PackedOperand,
}

impl Bf16Lhs {
    /// Packs `a` in parallel; `None` if it has too few rows.
    pub(in crate::ops) fn new(
        unit: MatrixUnit,
        a: &MatRef<'_>,
        precision: Precision,
    ) -> Option<Self> {
        if a.rows < MIN_ROWS {
            return None;
        }
        let mut operand = PackedOperand::new(if precision == Precision::F32 {
            F32_PLANES
        } else {
            BF16_PLANES
        });
        operand.par_pack(&OperandView::lhs(a));
        Some(Self { unit, operand })
    }

    /// A left-hand side (rows, columns) of the same unit and planes, to be written by its
    /// `block_writer`.
    ///
    /// # Safety
    /// Every block is written before it is read.
    pub(in crate::ops) unsafe fn uninit_like(&self, rows: usize, columns: usize) -> Self {
        Self {
            unit: self.unit,
            // SAFETY: the caller's promise.
            operand: unsafe { PackedOperand::uninit(self.operand.planes, rows, columns) },
        }
    }

    /// A writer of blocks, for several threads.
    pub(in crate::ops) fn block_writer(&mut self) -> BlockWriter {
        self.operand.block_writer()
    }

    /// An empty right-hand side for products with this left-hand side.
    pub(super) fn empty_rhs(&self) -> Bf16Rhs {
        Bf16Rhs {
            unit: self.unit,
            lhs_planes: self.operand.planes,
            operand: PackedOperand::new(BF16_PLANES),
        }
    }
}

/// A right-hand side packed for a matrix unit.
pub(in crate::ops) struct Bf16Rhs {
    unit: MatrixUnit,
    lhs_planes: usize,
    operand: PackedOperand,
}

impl Bf16Rhs {
    /// Whether both are packed for left-hand sides of the same unit and number of planes.
    pub(super) fn is_compatible(&self, other: &Self) -> bool {
        self.unit == other.unit && self.lhs_planes == other.lhs_planes
    }

    /// Packs `matrix` over the previous contents, in parallel.
    pub(super) fn pack(&mut self, matrix: &MatRef<'_>) {
        let view = OperandView::rhs(matrix);
        self.operand.planes = view.rhs_planes(self.lhs_planes);
        self.operand.par_pack(&view);
    }

    /// out = rows `rows` of `a` times B; `rows` starts at a multiple of 32.
    pub(super) fn gemm(&self, a: &Bf16Lhs, rows: Range<usize>, out: MatMut<'_>) {
        assert!(rows.start.is_multiple_of(TILE), "rows start with a strip");
        let strips = rows.start / TILE..rows.end.div_ceil(TILE);
        self.gemm_strips(&a.operand, strips, out, false);
    }

    /// out += a times B.
    pub(super) fn gemm_add(&self, a: MatRef<'_>, out: MatMut<'_>) {
        let a = PackedOperand::lhs(self.lhs_planes, a);
        self.gemm_strips(&a, 0..a.strips(), out, true);
    }

    /// out = strips of A times B, or out += it, on this thread, in blocks of B of `TASK_BYTES`.
    fn gemm_strips(
        &self,
        a: &PackedOperand,
        strips: Range<usize>,
        mut out: MatMut<'_>,
        accumulate: bool,
    ) {
        let b = &self.operand;
        let unit = ActiveUnit::new(self.unit);
        assert_eq!(a.planes, self.lhs_planes, "B is packed for A's planes");
        assert_eq!(a.depth, b.depth, "A and B have one k");
        for steps in even_parts(0..a.steps, max_steps(a.planes)) {
            for panels in even_parts(0..b.strips(), panels_per_task(steps.len() * b.step_lines())) {
                gemm_strips(
                    &unit,
                    a.strips_from(strips.clone(), steps.start),
                    b.strips_from(panels.clone(), steps.start),
                    steps.len(),
                    out.columns_from(panels.start * TILE),
                    accumulate || steps.start > 0,
                );
            }
        }
    }
}

/// Maximum number of steps of k in one panel.
fn max_steps(planes: usize) -> usize {
    MAX_PANEL_BYTES / (planes * BLOCK_LINES * size_of::<CacheLine>())
}

/// Number of panels of one task if each has `lines` cache lines.
fn panels_per_task(lines: usize) -> usize {
    (TASK_BYTES / (lines * size_of::<CacheLine>()).max(1)).max(1)
}
