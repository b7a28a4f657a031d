//! Copies operands into tiles: bf16, a step of k after the other, for each step its planes, for each plane two tiles of 16 lanes.
//!
//! A lane is a row of A or a column of B. A's tiles hold a lane in each row, its 32 numbers of k side by side; B's hold two
//! neighbours of k in each row, for one lane after the other. Loops here are plain indices, as the tiles' are.

#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::pack::{Element, transpose_16};
use super::super::{CpuSlice, MatRef};
use super::Tile;
use super::unit::{BF16_PLANES, BLOCK_LINES, CacheLine, F32_PLANES, K_STEP, TILE};

/// Lanes of a tile, and lines.
const LANES: usize = 16;

/// The side of a product that is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Side {
    Lhs,
    Rhs,
}

/// A matrix seen from its side of the product: lanes, and k along each.
#[derive(Clone, Copy)]
pub(in crate::ops) struct OperandView<'a> {
    side: Side,
    values: CpuSlice<'a>,
    pub(super) lanes: usize,
    pub(super) depth: usize,
    lane_stride: usize,
    k_stride: usize,
}

impl<'a> OperandView<'a> {
    /// The numbers from `offset` on: lanes and k, each as how many there are and how far apart they lie. One of them lies side by side.
    pub(in crate::ops) fn new(
        side: Side,
        values: CpuSlice<'a>,
        offset: usize,
        (lanes, lane_stride): (usize, usize),
        (depth, k_stride): (usize, usize),
    ) -> Self {
        let values = values.after(offset);
        let last = lanes.saturating_sub(1) * lane_stride + depth.saturating_sub(1) * k_stride;
        assert!(
            lanes * depth == 0 || last < values.len(),
            "every number lies inside the matrix"
        );
        assert!(
            lane_stride == 1 || k_stride == 1,
            "lanes or k lie side by side"
        );
        Self {
            side,
            values,
            lanes,
            depth,
            lane_stride,
            k_stride,
        }
    }

    /// A's lanes are its rows.
    pub(super) fn a(m: &MatRef<'a>) -> Self {
        Self::new(
            Side::Lhs,
            m.values,
            0,
            (m.rows, m.row_stride),
            (m.columns, m.column_stride),
        )
    }

    /// B's lanes are its columns.
    pub(super) fn b(m: &MatRef<'a>) -> Self {
        Self::new(
            Side::Rhs,
            m.values,
            0,
            (m.columns, m.column_stride),
            (m.rows, m.row_stride),
        )
    }

    /// Planes of a B beside an A of `planes`: one where its numbers are stored in bf16.
    pub(super) fn planes(&self, planes: usize) -> usize {
        match self.values {
            CpuSlice::F32(_) => planes,
            CpuSlice::Bf16(_) => BF16_PLANES,
        }
    }

    /// Whether a lane's numbers lie side by side.
    pub(super) fn along_k(&self) -> bool {
        self.k_stride == 1
    }

    /// Packs numbers `k` of lanes `first..first + 32` in so many planes, step by step, zero beyond the matrix and beyond `k`.
    pub(super) fn pack(&self, planes: usize, first: usize, k: Range<usize>, out: &mut [CacheLine]) {
        assert!(
            k.end <= self.depth && first < self.lanes,
            "a strip lies inside its matrix"
        );
        assert_eq!(
            out.len(),
            k.len().div_ceil(K_STEP) * planes * BLOCK_LINES,
            "room for every step"
        );
        match (self.values, planes) {
            (CpuSlice::F32(values), BF16_PLANES) => {
                self.pack_of::<f32, BF16_PLANES>(values, first, k, out)
            }
            (CpuSlice::F32(values), _) => self.pack_of::<f32, F32_PLANES>(values, first, k, out),
            (CpuSlice::Bf16(values), BF16_PLANES) => {
                self.pack_of::<half::bf16, BF16_PLANES>(values, first, k, out)
            }
            (CpuSlice::Bf16(values), _) => {
                self.pack_of::<half::bf16, F32_PLANES>(values, first, k, out)
            }
        }
    }

    fn pack_of<T: Element, const P: usize>(
        &self,
        values: &[T],
        first: usize,
        k: Range<usize>,
        out: &mut [CacheLine],
    ) {
        for (start, step) in k
            .clone()
            .step_by(K_STEP)
            .zip(out.chunks_exact_mut(P * BLOCK_LINES))
        {
            for half in 0..TILE / LANES {
                let lane = first + half * LANES;
                let (lanes, depth) = (
                    self.lanes.saturating_sub(lane).min(LANES),
                    (k.end - start).min(K_STEP),
                );
                let from = values
                    .as_ptr()
                    .wrapping_add(lane * self.lane_stride + start * self.k_stride);
                let at = step[half * LANES..].as_mut_ptr();
                let turned = self.along_k() == (self.side == Side::Rhs);
                // SAFETY: these lanes and numbers lie inside the matrix (asserted by `pack`), and `step` has room for them; a view is only
                // made where a unit multiplies blocks, which no processor has without the vectors used here.
                unsafe {
                    match self.along_k() {
                        true => along_k::<T, P>(from, self.lane_stride, (lanes, depth), turned, at),
                        false => {
                            along_lanes::<T, P>(from, self.k_stride, (lanes, depth), turned, at)
                        }
                    }
                }
            }
        }
    }
}

/// A tile as A's block: its rows as lanes, in so many planes.
///
/// # Safety
/// There must be room for 32 lines of each plane at `out`; the processor has AVX-512 F, BW, VL and BF16.
pub(super) unsafe fn pack_block(planes: usize, tile: &Tile, out: *mut CacheLine) {
    for half in 0..TILE / LANES {
        // SAFETY: the caller's promise; a tile is 32 rows of 32 numbers.
        unsafe {
            let (rows, out) = (
                tile.0.as_ptr().add(half * LANES * TILE),
                out.add(half * LANES),
            );
            match planes {
                BF16_PLANES => along_k::<f32, BF16_PLANES>(rows, TILE, (LANES, K_STEP), false, out),
                _ => along_k::<f32, F32_PLANES>(rows, TILE, (LANES, K_STEP), false, out),
            }
        };
    }
}

/// A plane of A's block as a tile.
pub(super) fn widen_block(block: &[CacheLine]) -> Tile {
    assert_eq!(block.len(), BLOCK_LINES, "a plane of a block");
    let mut tile = MaybeUninit::<Tile>::uninit();
    // SAFETY: 32 lines are 32 rows of 32 bf16 numbers, as a tile's are f32, and each is written; see `turn` for the processor.
    unsafe {
        widen_lines(block.as_ptr(), tile.as_mut_ptr().cast());
        tile.assume_init()
    }
}

/// # Safety
/// 32 lines must be readable, 32 rows of 32 numbers writable; the processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn widen_lines(block: *const CacheLine, tile: *mut f32) {
    for row in 0..BLOCK_LINES {
        // SAFETY: the caller's promise.
        unsafe {
            let line = _mm512_load_si512(block.add(row).cast());
            for (half, narrow) in [
                _mm512_castsi512_si256(line),
                _mm512_extracti64x4_epi64::<1>(line),
            ]
            .into_iter()
            .enumerate()
            {
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow));
                _mm512_storeu_ps(
                    tile.add(row * TILE + half * LANES),
                    _mm512_castsi512_ps(wide),
                );
            }
        }
    }
}

/// A plane of A's block, 32 rows of 32 numbers, as B's: its rows as k.
pub(super) fn turn(block: &[CacheLine], out: &mut [CacheLine]) {
    assert!(
        block.len() == BLOCK_LINES && out.len() == BLOCK_LINES,
        "a plane of a block"
    );
    // SAFETY: both are 32 lines; operands are only made where AMX is, which no processor has without these vectors.
    unsafe { turn_lines(block.as_ptr(), out.as_mut_ptr()) };
}

/// # Safety
/// 32 lines must be readable and 32 writable; the processor has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn turn_lines(block: *const CacheLine, out: *mut CacheLine) {
    // Number i of the first row, then number i of the second: the lower half of each row, and the upper.
    let lower = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0,
    );
    let upper = _mm512_add_epi16(lower, _mm512_set1_epi16(LANES as i16));
    for pair in 0..LANES {
        // SAFETY: the caller's promise; lines are 64 bytes, aligned.
        unsafe {
            let first = _mm512_load_si512(block.add(2 * pair).cast());
            let second = _mm512_load_si512(block.add(2 * pair + 1).cast());
            _mm512_store_si512(
                out.add(pair).cast(),
                _mm512_permutex2var_epi16(first, lower, second),
            );
            _mm512_store_si512(
                out.add(LANES + pair).cast(),
                _mm512_permutex2var_epi16(first, upper, second),
            );
        }
    }
}

/// The first `count` of sixteen lanes.
#[inline(always)]
fn first(count: usize) -> u16 {
    if count >= LANES {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// CacheLine i = 32 numbers of lane i; where `turned`, words (two numbers each) and lines exchanged.
///
/// # Safety
/// `depth` numbers of `lanes` lanes, `stride` apart, must be readable; the processor has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn along_k<T: Element, const P: usize>(
    from: *const T,
    stride: usize,
    (lanes, depth): (usize, usize),
    turned: bool,
    out: *mut CacheLine,
) {
    let masks = (first(depth), first(depth.saturating_sub(LANES)));
    // SAFETY: the masks name what lies inside each lane; `out` is the caller's promise.
    unsafe {
        let mut planes = match lanes == LANES && depth == K_STEP {
            true => read::<T, P>(from, (stride, LANES), |_| ALL),
            false => read::<T, P>(from, (stride, LANES), |lane| {
                if lane < lanes { masks } else { (0, 0) }
            }),
        };
        store(&mut planes, turned, out);
    }
}

/// CacheLine i = numbers 2 i and 2 i + 1 of each lane; where `turned`, words and lines exchanged.
///
/// # Safety
/// `depth` rows of `lanes` numbers, `stride` apart, must be readable; the processor has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn along_lanes<T: Element, const P: usize>(
    from: *const T,
    stride: usize,
    (lanes, depth): (usize, usize),
    turned: bool,
    out: *mut CacheLine,
) {
    // Number i of the lower half, then number i of the upper half.
    let both = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0,
    );
    let mask = first(lanes);
    // SAFETY: the masks name what lies inside each two rows; `out` is the caller's promise.
    unsafe {
        let mut planes = match lanes == LANES && depth == K_STEP {
            true => read::<T, P>(from, (2 * stride, stride), |_| ALL),
            false => read::<T, P>(from, (2 * stride, stride), |pair| {
                (
                    if 2 * pair < depth { mask } else { 0 },
                    if 2 * pair + 1 < depth { mask } else { 0 },
                )
            }),
        };
        for plane in 0..P {
            for pair in 0..LANES {
                planes[plane][pair] = _mm512_permutexvar_epi16(both, planes[plane][pair]);
            }
        }
        store(&mut planes, turned, out);
    }
}

/// Sixteen times sixteen numbers and sixteen more, `steps.1` further on, `steps.0` from one to the next; each plane of them.
///
/// # Safety
/// As `words`', by the masks of each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn read<T: Element, const P: usize>(
    from: *const T,
    steps: (usize, usize),
    masks: impl Fn(usize) -> (u16, u16),
) -> [[__m512i; LANES]; P] {
    let mut planes = [[_mm512_setzero_si512(); LANES]; P];
    for line in 0..LANES {
        let low = from.wrapping_add(line * steps.0);
        // SAFETY: the caller's promise.
        let words = unsafe { words::<T, P>(low, low.wrapping_add(steps.1), masks(line)) };
        for plane in 0..P {
            planes[plane][line] = words[plane];
        }
    }
    planes
}

/// Both masks where nothing is left out. A mask that is known is none.
const ALL: (u16, u16) = (u16::MAX, u16::MAX);

/// Writes sixteen lines of each plane; where `turned`, word j of line i as word i of line j.
///
/// # Safety
/// They must be writable; the processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store<const P: usize>(
    planes: &mut [[__m512i; LANES]; P],
    turned: bool,
    out: *mut CacheLine,
) {
    for plane in 0..P {
        if turned {
            let mut words = [_mm512_setzero_ps(); LANES];
            for line in 0..LANES {
                words[line] = _mm512_castsi512_ps(planes[plane][line]);
            }
            transpose_16(&mut words);
            for line in 0..LANES {
                planes[plane][line] = _mm512_castps_si512(words[line]);
            }
        }
        for line in 0..LANES {
            // SAFETY: a line is 64 bytes, aligned.
            unsafe {
                _mm512_store_si512(
                    out.add(plane * BLOCK_LINES + line).cast(),
                    planes[plane][line],
                )
            };
        }
    }
}

/// Sixteen numbers and sixteen more as bf16, in `P` parts that add up to them: rounded, or the 24 bits of f32 in three times 8.
///
/// # Safety
/// The numbers that the masks name must be readable; the processor has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn words<T: Element, const P: usize>(
    low: *const T,
    high: *const T,
    masks: (u16, u16),
) -> [__m512i; P] {
    if let (Some((low, high)), 1) = (T::bf16(low, high), P) {
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        return unsafe {
            let (low, high) = (
                _mm256_maskz_loadu_epi16(masks.0, low.cast()),
                _mm256_maskz_loadu_epi16(masks.1, high.cast()),
            );
            [_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high); P]
        };
    }
    // SAFETY: the caller's promise.
    let (low, high) = unsafe {
        (
            parts::<P>(T::load(low, masks.0)),
            parts::<P>(T::load(high, masks.1)),
        )
    };
    let mut words = [_mm512_setzero_si512(); P];
    for plane in 0..P {
        // SAFETY: both are 512 bits without a meaning of their own.
        words[plane] = unsafe {
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high[plane], low[plane]))
        };
    }
    words
}

/// x = the sum of its parts, each but the last of 8 bits: the last is rounded by what stores it.
#[target_feature(enable = "avx512f")]
#[inline]
fn parts<const P: usize>(x: __m512) -> [__m512; P] {
    let mut parts = [x; P];
    for part in 1..P {
        let rest = parts[part - 1];
        let bits = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
        parts[part - 1] = _mm512_castsi512_ps(_mm512_and_si512(
            bits,
            _mm512_set1_epi32(0xffff_0000_u32.cast_signed()),
        ));
        parts[part] = _mm512_sub_ps(rest, parts[part - 1]);
    }
    parts
}
