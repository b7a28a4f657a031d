//! The innermost loop: 32 x 32 numbers of a result over a run of k, by whichever unit multiplies bf16.

use super::super::Precision;
use super::{amx, avx512_bf16};

/// Bytes of a tile's row, and the stride of packed tiles.
pub(super) const ROW: usize = 64;
/// Rows and columns of the result that one call computes.
pub(in crate::ops) const TILE: usize = 32;
/// Numbers of k of one step: what a tile's row holds in bf16.
pub(super) const K_STEP: usize = 32;
/// Cache lines of one operand's two tiles.
pub(super) const BLOCK_LINES: usize = 32;
/// Planes of numbers rounded to bf16.
pub(in crate::ops) const BF16_PLANES: usize = 1;
/// Planes of f32 in three parts.
pub(super) const F32_PLANES: usize = 3;

/// One line of a packed tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::ops) struct CacheLine([u8; ROW]);

/// A run of k, which begins with a step of its own: where A's and B's steps begin, B's planes, and how many numbers of k there are.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) a: *const CacheLine,
    pub(super) b: *const CacheLine,
    pub(super) planes: usize,
    pub(super) depth: usize,
}

impl Run {
    pub(super) const EMPTY: Self = Self {
        a: std::ptr::null(),
        b: std::ptr::null(),
        planes: BF16_PLANES,
        depth: 0,
    };
}

/// Two runs of k, one after the other. The second may be empty.
pub(super) type Runs = [Run; 2];

/// What multiplies bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum MatrixUnit {
    /// Tile registers (Intel AMX).
    Amx,
    /// Dot products of pairs in vectors (AVX512-BF16).
    Avx512Bf16,
}

impl MatrixUnit {
    /// Whether products in `precision` go through this unit. f32 takes six products of its parts: more than what vectors of pairs gain.
    pub(in crate::ops) fn takes(self, precision: Precision) -> bool {
        self == Self::Amx || precision != Precision::F32
    }
}

/// A unit, ready on this thread: tile registers are shaped for the loop, and given back when dropped.
pub(in crate::ops) struct ActiveUnit(MatrixUnit);

impl ActiveUnit {
    pub(in crate::ops) fn new(unit: MatrixUnit) -> Self {
        match unit {
            MatrixUnit::Amx => amx::shape(),
            MatrixUnit::Avx512Bf16 => assert!(
                avx512_bf16::present(),
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
        // SAFETY: the caller's promise; this thread is `ActiveUnit`.
        unsafe {
            match self.0 {
                MatrixUnit::Amx => amx::multiply(planes, runs, out, onto),
                MatrixUnit::Avx512Bf16 => {
                    assert_eq!(planes, BF16_PLANES, "f32 is not split into parts for pairs");
                    avx512_bf16::multiply(runs, out, size, onto);
                }
            }
        }
    }
}

impl Drop for ActiveUnit {
    fn drop(&mut self) {
        if self.0 == MatrixUnit::Amx {
            amx::release();
        }
    }
}
