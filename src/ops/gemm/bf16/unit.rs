//! Matrix units and their innermost loop: a micro-tile of 32 x 32 over a block of k.

use super::{amx, avx512_bf16};
use crate::work::Precision;

/// Bytes of a row of a packed tile: a cache line.
pub(super) const ROW_BYTES: usize = 64;
/// Rows and columns of a micro-tile.
pub(in crate::ops) const TILE: usize = 32;
/// Elements of k in one step: a row of bf16.
pub(super) const K_STEP: usize = 32;
/// Cache lines of one plane of an operand's step.
pub(super) const BLOCK_LINES: usize = 32;
/// Planes of an operand rounded to bf16.
pub(in crate::ops) const BF16_PLANES: usize = 1;
/// Planes of an f32 operand, split into three bf16.
pub(super) const F32_PLANES: usize = 3;

/// One line of a packed tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::ops) struct CacheLine([u8; ROW_BYTES]);

/// A run over `depth` elements of k from the start of a step: A's and B's lines there, and B's
/// planes.
#[derive(Clone, Copy)]
pub(super) struct KRun {
    pub(super) a: *const CacheLine,
    pub(super) b: *const CacheLine,
    pub(super) planes: usize,
    pub(super) depth: usize,
}

impl KRun {
    pub(super) const EMPTY: Self = Self {
        a: std::ptr::null(),
        b: std::ptr::null(),
        planes: BF16_PLANES,
        depth: 0,
    };
}

/// Two consecutive runs, the second perhaps empty.
pub(super) type Runs = [KRun; 2];

/// Destination of a micro-tile.
#[derive(Clone, Copy)]
pub(super) struct TileOut {
    pub(super) ptr: *mut f32,
    /// Elements from row to row.
    pub(super) stride: usize,
    /// Rows and columns that are needed; the rest of the 32 x 32 may be overwritten.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Whether the product is added to the present elements.
    pub(super) accumulate: bool,
}

/// Hardware that multiplies bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum MatrixUnit {
    /// Tile registers (Intel AMX).
    Amx,
    /// Dot products of bf16 pairs in vectors (AVX512-BF16).
    Avx512Bf16,
}

impl MatrixUnit {
    /// Whether linear layers in `precision` use this unit. f32 needs six products of planes: more
    /// than dot products of pairs gain.
    pub(in crate::ops) fn supports(self, precision: Precision) -> bool {
        self == Self::Amx || precision != Precision::F32
    }
}

/// A unit in use on this thread: AMX tile registers are configured, and released on drop.
pub(in crate::ops) struct ActiveUnit(MatrixUnit);

impl ActiveUnit {
    pub(in crate::ops) fn new(unit: MatrixUnit) -> Self {
        match unit {
            MatrixUnit::Amx => amx::configure(),
            MatrixUnit::Avx512Bf16 => {
                assert!(avx512_bf16::present(), "the CPU has AVX512-BF16");
            }
        }
        Self(unit)
    }

    /// out = the runs' products, or out += them, for an A of `planes`. In each run B
    /// has as many planes or one; a run with one does not follow a run with more.
    ///
    /// # Safety
    /// A's and B's steps are readable, `out` is writable as 32 x 32.
    pub(super) unsafe fn multiply(&self, planes: usize, runs: Runs, out: TileOut) {
        // SAFETY: the caller's promise; the unit is active.
        unsafe {
            match self.0 {
                MatrixUnit::Amx => amx::multiply(planes, runs, out),
                MatrixUnit::Avx512Bf16 => {
                    assert_eq!(planes, BF16_PLANES, "f32 is split on AMX alone");
                    avx512_bf16::multiply(runs, out);
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
