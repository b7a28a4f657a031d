//! The innermost loop: 32 x 32 numbers of a result over a run of k, by whichever unit multiplies bf16.

use super::super::Precision;
use super::{amx, pairs};

/// Bytes of a tile's row, and the stride of packed tiles.
pub(super) const ROW: usize = 64;
/// Rows and columns of the result that one call computes.
pub(in crate::ops) const SIDE: usize = 32;
/// Numbers of k of one step: what a tile's row holds in bf16.
pub(super) const DEPTH: usize = 32;
/// Cache lines of one operand's two tiles.
pub(super) const PAIR: usize = 32;
/// Planes of numbers rounded to bf16.
pub(in crate::ops) const ROUNDED: usize = 1;
/// Planes of f32 in three parts.
pub(super) const SPLIT: usize = 3;

/// One line of a packed tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::ops) struct Line([u8; ROW]);

/// A run of k, which begins with a step of its own: where A's and B's steps begin, B's planes, and how many numbers of k there are.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) a: *const Line,
    pub(super) b: *const Line,
    pub(super) planes: usize,
    pub(super) depth: usize,
}

impl Run {
    pub(super) const EMPTY: Self = Self {
        a: std::ptr::null(),
        b: std::ptr::null(),
        planes: ROUNDED,
        depth: 0,
    };
}

/// Two runs of k, one after the other. The second may be empty.
pub(super) type Runs = [Run; 2];

/// What multiplies bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Unit {
    /// Tile registers (Intel AMX).
    Tiles,
    /// Dot products of pairs in vectors (AVX512-BF16).
    Pairs,
}

impl Unit {
    /// Whether products in `precision` go through this unit. f32 takes six products of its parts: more than what vectors of pairs gain.
    pub(in crate::ops) fn takes(self, precision: Precision) -> bool {
        self == Self::Tiles || precision != Precision::F32
    }
}

/// A unit, ready on this thread: tile registers are shaped for the loop, and given back when dropped.
pub(in crate::ops) struct Ready(Unit);

impl Ready {
    pub(in crate::ops) fn new(unit: Unit) -> Self {
        match unit {
            Unit::Tiles => amx::shape(),
            Unit::Pairs => assert!(
                pairs::present(),
                "dot products of pairs are used only where there are any"
            ),
        }
        Self(unit)
    }

    /// out (rows, columns), `out_row` numbers from row to row = [out where `onto`] + the runs' products, for an A in `planes`: B has
    /// as many or one, and none one after a run of more. What lies beyond `size` (rows, columns) in the (32, 32) numbers may be written or
    /// not.
    ///
    /// # Safety
    /// A's and B's steps are readable, `out` is writable as (32, 32) numbers.
    pub(super) unsafe fn multiply(
        &self,
        planes: usize,
        runs: Runs,
        out: (*mut f32, usize),
        size: (usize, usize),
        onto: bool,
    ) {
        // SAFETY: the caller's promise; this thread is `Ready`.
        unsafe {
            match self.0 {
                Unit::Tiles => amx::multiply(planes, runs, out, onto),
                Unit::Pairs => {
                    assert_eq!(planes, ROUNDED, "f32 is not split into parts for pairs");
                    pairs::multiply(runs, out, size, onto);
                }
            }
        }
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.0 == Unit::Tiles {
            amx::release();
        }
    }
}
