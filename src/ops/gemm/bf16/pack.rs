//! Packing of operands for matrix units: bf16 in steps of 32 k, each step in planes, each plane in
//! two tiles of 16 lanes.
//!
//! A tile of A has a lane in each row, its 32 elements of k side by side. A tile of B has pairs of
//! neighbouring k in each row, one pair for each lane (the VNNI layout). The loops are plain
//! indices, as the kernels' are.

#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Tile;
use super::unit::{BF16_PLANES, BLOCK_LINES, CacheLine, F32_PLANES, K_STEP, TILE};
use crate::ops::gemm::pack::transpose_16;
use crate::ops::gemm::{Element, MatRef, Values};
use crate::ops::quantized::QuantizedSlice;

/// Elements of k that are decoded at once of a quantised matrix: 16 KiB of f32, half of L1.
const DECODED_K: usize = 4 * K_STEP;

/// Lanes of a tile, and its lines.
const LANES: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Lhs,
    Rhs,
}

/// A matrix as one side of a product: lanes, and k along each. One of the two is contiguous.
#[derive(Clone, Copy)]
pub(super) struct OperandView<'a> {
    side: Side,
    values: Values<'a>,
    pub(super) lanes: usize,
    pub(super) depth: usize,
    lane_stride: usize,
    k_stride: usize,
}

impl<'a> OperandView<'a> {
    /// A: lanes are rows.
    pub(super) fn lhs(a: &MatRef<'a>) -> Self {
        Self::new(Side::Lhs, a)
    }

    /// B: lanes are columns.
    pub(super) fn rhs(b: &MatRef<'a>) -> Self {
        Self::new(Side::Rhs, &b.t())
    }

    fn new(side: Side, lanes_by_k: &MatRef<'a>) -> Self {
        let view = Self {
            side,
            values: lanes_by_k.values,
            lanes: lanes_by_k.rows,
            depth: lanes_by_k.columns,
            lane_stride: lanes_by_k.row_stride,
            k_stride: lanes_by_k.column_stride,
        };
        assert!(
            view.lane_stride == 1 || view.k_stride == 1,
            "lanes or k are contiguous"
        );
        view
    }

    /// Planes of this matrix as B, for an A of `lhs_planes`: one if it is stored in bf16.
    pub(super) fn rhs_planes(&self, lhs_planes: usize) -> usize {
        match self.values {
            Values::F32(_) | Values::Quantized(_) => lhs_planes,
            Values::Bf16(_) => BF16_PLANES,
        }
    }

    /// Whether a lane is contiguous.
    pub(super) fn contiguous_k(&self) -> bool {
        self.k_stride == 1
    }

    /// Packs `k` of lanes `first..first + 32` in `planes` planes, step by step, zero beyond the
    /// matrix and beyond `k`.
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
            (Values::F32(x), BF16_PLANES) => self.pack_as::<_, BF16_PLANES>(x, first, k, out),
            (Values::F32(x), _) => self.pack_as::<_, F32_PLANES>(x, first, k, out),
            (Values::Bf16(x), BF16_PLANES) => self.pack_as::<_, BF16_PLANES>(x, first, k, out),
            (Values::Bf16(x), _) => self.pack_as::<_, F32_PLANES>(x, first, k, out),
            (Values::Quantized(x), _) => self.pack_quantized(x, planes, first, k, out),
        }
    }

    /// `pack` of a quantised matrix: decodes `DECODED_K` of the lanes at once into a buffer that is packed next.
    fn pack_quantized(
        &self,
        values: QuantizedSlice<'_>,
        planes: usize,
        first: usize,
        k: Range<usize>,
        out: &mut [CacheLine],
    ) {
        let mut decoded = [0.0; TILE * DECODED_K];
        let lanes = (self.lanes - first).min(TILE);
        let starts = k.clone().step_by(DECODED_K);
        let steps = out.chunks_mut(DECODED_K / K_STEP * planes * BLOCK_LINES);
        for (start, out) in starts.zip(steps) {
            let depth = (k.end - start).min(DECODED_K);
            let (lane_stride, k_stride) = if self.contiguous_k() {
                for (lane, run) in decoded.chunks_exact_mut(depth).take(lanes).enumerate() {
                    values.decode((first + lane) * self.lane_stride + start, run);
                }
                (depth, 1)
            } else {
                for (row, run) in decoded.chunks_exact_mut(TILE).take(depth).enumerate() {
                    values.decode((start + row) * self.k_stride + first, &mut run[..lanes]);
                }
                (1, TILE)
            };
            let dense = OperandView {
                side: self.side,
                values: Values::F32(&decoded),
                lanes,
                depth,
                lane_stride,
                k_stride,
            };
            dense.pack(planes, 0, 0..depth, out);
        }
    }

    fn pack_as<T: Element, const P: usize>(
        &self,
        values: &[T],
        first: usize,
        k: Range<usize>,
        out: &mut [CacheLine],
    ) {
        let steps = k.clone().step_by(K_STEP);
        for (start, step) in steps.zip(out.chunks_exact_mut(P * BLOCK_LINES)) {
            for half in 0..TILE / LANES {
                let lane = first + half * LANES;
                let from = Source {
                    values: values
                        .as_ptr()
                        .wrapping_add(lane * self.lane_stride + start * self.k_stride),
                    stride: if self.contiguous_k() {
                        self.lane_stride
                    } else {
                        self.k_stride
                    },
                    lanes: self.lanes.saturating_sub(lane).min(LANES),
                    depth: (k.end - start).min(K_STEP),
                };
                let out = step[half * LANES..].as_mut_ptr();
                let transposed = self.contiguous_k() == (self.side == Side::Rhs);
                // SAFETY: these lanes and k lie inside the matrix (asserted by `pack`), and `step`
                // has room for them; a view is only made for a matrix unit, and every CPU with one
                // has the instructions used here.
                unsafe {
                    if self.contiguous_k() {
                        pack_contiguous_k::<T, P>(from, transposed, out);
                    } else {
                        pack_contiguous_lanes::<T, P>(from, transposed, out);
                    }
                }
            }
        }
    }
}

/// The elements of a tile: up to 16 lanes of up to 32 k, lanes (or k) `stride` apart.
#[derive(Clone, Copy)]
struct Source<T> {
    values: *const T,
    stride: usize,
    lanes: usize,
    depth: usize,
}

/// Packs a row-major tile as a block of A.
///
/// # Safety
/// There is room for 32 lines of each plane at `out`; the CPU has AVX-512 F, BW, VL and BF16.
pub(super) unsafe fn pack_block(planes: usize, tile: &Tile, out: *mut CacheLine) {
    for half in 0..TILE / LANES {
        // SAFETY: the caller's promise; a tile is 32 rows of 32.
        unsafe {
            let rows = Source {
                values: tile.0.as_ptr().add(half * LANES * TILE),
                stride: TILE,
                lanes: LANES,
                depth: K_STEP,
            };
            let out = out.add(half * LANES);
            if planes == BF16_PLANES {
                pack_contiguous_k::<f32, BF16_PLANES>(rows, false, out);
            } else {
                pack_contiguous_k::<f32, F32_PLANES>(rows, false, out);
            }
        };
    }
}

/// A plane of a block of A in f32.
pub(super) fn upcast_block(block: &[CacheLine]) -> Tile {
    assert_eq!(block.len(), BLOCK_LINES, "a plane of a block");
    let mut tile = MaybeUninit::<Tile>::uninit();
    // SAFETY: 32 lines are 32 rows of 32 bf16, and every element of the tile is written; operands
    // are only made for a matrix unit, and every CPU with one has AVX-512.
    unsafe {
        upcast_lines(block.as_ptr(), tile.as_mut_ptr().cast());
        tile.assume_init()
    }
}

/// # Safety
/// 32 lines are readable, 32 rows of 32 writable; the CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn upcast_lines(block: *const CacheLine, tile: *mut f32) {
    for row in 0..BLOCK_LINES {
        // SAFETY: the caller's promise.
        unsafe {
            let line = _mm512_load_si512(block.add(row).cast());
            let halves = [
                _mm512_castsi512_si256(line),
                _mm512_extracti64x4_epi64::<1>(line),
            ];
            for (half, narrow) in halves.into_iter().enumerate() {
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow));
                let out = tile.add(row * TILE + half * LANES);
                _mm512_storeu_ps(out, _mm512_castsi512_ps(wide));
            }
        }
    }
}

/// Repacks a plane of a block of A (rows, columns) as B with k along its rows.
pub(super) fn transpose_block(block: &[CacheLine], out: &mut [CacheLine]) {
    assert!(
        block.len() == BLOCK_LINES && out.len() == BLOCK_LINES,
        "a plane of a block"
    );
    // SAFETY: both are 32 lines; operands are only made for a matrix unit, and every CPU with one
    // has AVX-512.
    unsafe { interleave_lines(block.as_ptr(), out.as_mut_ptr()) };
}

/// # Safety
/// 32 lines are readable and 32 writable; the CPU has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave_lines(block: *const CacheLine, out: *mut CacheLine) {
    // Element i of the first row, then element i of the second: the lower half of each row, and the
    // upper.
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
            let low = _mm512_permutex2var_epi16(first, lower, second);
            let high = _mm512_permutex2var_epi16(first, upper, second);
            _mm512_store_si512(out.add(pair).cast(), low);
            _mm512_store_si512(out.add(LANES + pair).cast(), high);
        }
    }
}

/// The mask of the first `count` of sixteen elements.
#[inline(always)]
fn first(count: usize) -> u16 {
    if count >= LANES {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Masks of the two halves of a line.
type Masks = [u16; 2];

/// Full masks, known at compile time.
const ALL: Masks = [u16::MAX; 2];

/// Line i = 32 k of lane i; if `transposed`, pairs of k and lines are exchanged.
///
/// # Safety
/// The source is readable; the CPU has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_contiguous_k<T: Element, const P: usize>(
    from: Source<T>,
    transposed: bool,
    out: *mut CacheLine,
) {
    let masks = [first(from.depth), first(from.depth.saturating_sub(LANES))];
    // SAFETY: the masks cover what lies inside each lane; `out` is the caller's promise.
    unsafe {
        let mut planes = if from.lanes == LANES && from.depth == K_STEP {
            load_planes::<T, P>(from.values, from.stride, LANES, |_| ALL)
        } else {
            load_planes::<T, P>(from.values, from.stride, LANES, |lane| {
                if lane < from.lanes { masks } else { [0; 2] }
            })
        };
        store_planes(&mut planes, transposed, out);
    }
}

/// Line i = k 2 i and 2 i + 1 of each lane; if `transposed`, pairs of k and lines are exchanged.
///
/// # Safety
/// The source is readable; the CPU has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_contiguous_lanes<T: Element, const P: usize>(
    from: Source<T>,
    transposed: bool,
    out: *mut CacheLine,
) {
    // Element i of the lower half, then element i of the upper half.
    let interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0,
    );
    let mask = first(from.lanes);
    let row_mask = |k: usize| if k < from.depth { mask } else { 0 };
    // SAFETY: the masks cover what lies inside each pair of rows; `out` is the caller's promise.
    unsafe {
        let mut planes = if from.lanes == LANES && from.depth == K_STEP {
            load_planes::<T, P>(from.values, 2 * from.stride, from.stride, |_| ALL)
        } else {
            load_planes::<T, P>(from.values, 2 * from.stride, from.stride, |pair| {
                [row_mask(2 * pair), row_mask(2 * pair + 1)]
            })
        };
        for plane in 0..P {
            for pair in 0..LANES {
                planes[plane][pair] = _mm512_permutexvar_epi16(interleave, planes[plane][pair]);
            }
        }
        store_planes(&mut planes, transposed, out);
    }
}

/// The planes of sixteen lines `line_stride` apart; each is sixteen elements, and sixteen more
/// `half_stride` on.
///
/// # Safety
/// As `load_line`'s, for the masks of each line.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn load_planes<T: Element, const P: usize>(
    from: *const T,
    line_stride: usize,
    half_stride: usize,
    masks: impl Fn(usize) -> Masks,
) -> [[__m512i; LANES]; P] {
    let mut planes = [[_mm512_setzero_si512(); LANES]; P];
    for index in 0..LANES {
        let low = from.wrapping_add(index * line_stride);
        // SAFETY: the caller's promise.
        let line = unsafe { load_line::<T, P>(low, low.wrapping_add(half_stride), masks(index)) };
        for plane in 0..P {
            planes[plane][index] = line[plane];
        }
    }
    planes
}

/// Writes sixteen lines of each plane; if `transposed`, 32-bit word j of line i becomes word i of
/// line j.
///
/// # Safety
/// They are writable; the CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_planes<const P: usize>(
    planes: &mut [[__m512i; LANES]; P],
    transposed: bool,
    out: *mut CacheLine,
) {
    for plane in 0..P {
        if transposed {
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
                let out = out.add(plane * BLOCK_LINES + line);
                _mm512_store_si512(out.cast(), planes[plane][line]);
            };
        }
    }
}

/// Sixteen elements and sixteen more as bf16, in `P` planes that add up to them: rounded, or the 24
/// bits of f32 in three times 8.
///
/// # Safety
/// The elements under the masks are readable; the CPU has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn load_line<T: Element, const P: usize>(
    low: *const T,
    high: *const T,
    masks: Masks,
) -> [__m512i; P] {
    if let (Some((low, high)), 1) = (T::bf16(low, high), P) {
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        return unsafe {
            let low = _mm256_maskz_loadu_epi16(masks[0], low.cast());
            let high = _mm256_maskz_loadu_epi16(masks[1], high.cast());
            [_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high); P]
        };
    }
    // SAFETY: the caller's promise.
    let low = split::<P>(unsafe { T::load(low, masks[0]) });
    // SAFETY: as above.
    let high = split::<P>(unsafe { T::load(high, masks[1]) });
    let mut line = [_mm512_setzero_si512(); P];
    for plane in 0..P {
        let rounded = _mm512_cvtne2ps_pbh(high[plane], low[plane]);
        // SAFETY: both are 512 bits, of which every pattern is valid.
        line[plane] = unsafe { std::mem::transmute::<__m512bh, __m512i>(rounded) };
    }
    line
}

/// Splits x into planes that add up to it, each but the last of 8 bits; the last is rounded when
/// stored.
#[target_feature(enable = "avx512f")]
#[inline]
fn split<const P: usize>(x: __m512) -> [__m512; P] {
    let mut planes = [x; P];
    for plane in 1..P {
        let rest = planes[plane - 1];
        let bits = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
        let upper_half = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        planes[plane - 1] = _mm512_castsi512_ps(_mm512_and_si512(bits, upper_half));
        planes[plane] = _mm512_sub_ps(rest, planes[plane - 1]);
    }
    planes
}
