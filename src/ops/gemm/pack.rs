//! Copies a panel of B into the layout that tiles read: row after row of k, each as wide as the tile, in f32, zero beyond B's edge.

use std::ops::Range;

use half::bf16;

use super::microkernel::{Isa, Transposes};
use super::{CpuSlice, MatRef};
use crate::ops::simd::dispatch;

/// A number format that operands are stored in.
pub(in crate::ops) trait Element: Copy + Send + Sync {
    /// The same number in f32.
    fn as_f32(self) -> f32;

    /// Sixteen numbers from `from`, those that `mask` leaves out zero and not read.
    ///
    /// # Safety
    /// The numbers that `mask` names must be readable; the processor has AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, mask: u16) -> std::arch::x86_64::__m512;

    /// Eight numbers from `from`.
    ///
    /// # Safety
    /// They must be readable; the processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_8(from: *const Self) -> std::arch::x86_64::__m256;

    /// The same pointers where the numbers are bf16 as they stand.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn bf16(_low: *const Self, _high: *const Self) -> Option<(*const bf16, *const bf16)> {
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn as_f32(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: u16) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask, from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Element for bf16 {
    /// bf16 is the upper half of f32.
    #[inline(always)]
    fn as_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: u16) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        unsafe {
            let narrow = _mm256_maskz_loadu_epi16(mask, from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(from.cast()),
            )))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn bf16(low: *const Self, high: *const Self) -> Option<(*const bf16, *const bf16)> {
        Some((low, high))
    }
}

/// Packs rows `k` of b's columns `columns` into `panel`: (k, width), width the next whole number of vectors.
pub(in crate::ops) fn pack(
    isa: &Isa,
    b: &MatRef<'_>,
    k: Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
) {
    assert!(
        k.end <= b.rows && columns.end <= b.columns && !columns.is_empty(),
        "a panel lies inside its matrix"
    );
    let width = columns.len().next_multiple_of(isa.lanes);
    let panel = &mut panel[..k.len() * width];
    let start = k.start * b.row_stride + columns.start * b.column_stride;
    let strides = (b.row_stride, b.column_stride);
    match b.values {
        CpuSlice::F32(values) => {
            panel_of(isa, &values[start..], strides, columns.len(), panel, width)
        }
        CpuSlice::Bf16(values) => {
            panel_of(isa, &values[start..], strides, columns.len(), panel, width)
        }
    }
}

/// Rows that are asked for before they are read: they lie on other pages, where no hardware looks ahead.
const AHEAD: usize = 16;

/// Asks for the cache lines of `count` numbers from `start` on; beyond the slice it asks for nothing.
#[inline(always)]
fn prefetch<T: Element>(values: &[T], start: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for number in (start..(start + count).min(values.len())).step_by(64 / size_of::<T>()) {
        // SAFETY: a prefetch reads nothing, and SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                values.as_ptr().add(number).cast(),
            )
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, start, count);
}

fn panel_of<T: Element>(
    isa: &Isa,
    values: &[T],
    (row_stride, column_stride): (usize, usize),
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    if column_stride == 1 {
        // A row of a whole tile, or of a usual head, is moved in registers: a copy of unknown length is a call.
        return match (columns == width, width) {
            (true, 8) => rows::<T, 8>(values, row_stride, panel),
            (true, 16) => rows::<T, 16>(values, row_stride, panel),
            (true, 32) => rows::<T, 32>(values, row_stride, panel),
            (true, 64) => rows::<T, 64>(values, row_stride, panel),
            _ => dispatch(
                #[inline(always)]
                |_| {
                    for (row, out) in panel.chunks_exact_mut(width).enumerate() {
                        prefetch(values, (row + AHEAD) * row_stride, columns);
                        let (whole, rest) = out.split_at_mut(columns);
                        let from = &values[row * row_stride..][..columns];
                        whole
                            .iter_mut()
                            .zip(from)
                            .for_each(|(out, x)| *out = x.as_f32());
                        rest.fill(0.0);
                    }
                },
            ),
        };
    }
    if row_stride == 1 {
        assert!(
            (columns - 1) * column_stride + panel.len() / width <= values.len(),
            "every column lies inside the matrix"
        );
        match isa.transposes {
            Transposes::Portable => {}
            #[cfg(target_arch = "x86_64")]
            Transposes::Avx2 => {
                // SAFETY: the columns are readable (asserted), and `isa` is chosen only where the processor has it.
                return unsafe {
                    transposed_by_8(values.as_ptr(), column_stride, columns, panel, width)
                };
            }
            #[cfg(target_arch = "x86_64")]
            Transposes::Avx512 => {
                // SAFETY: as above.
                return unsafe {
                    transposed_by_16(values.as_ptr(), column_stride, columns, panel, width)
                };
            }
        }
    }
    for (row, out) in panel.chunks_exact_mut(width).enumerate() {
        let (whole, rest) = out.split_at_mut(columns);
        for (column, out) in whole.iter_mut().enumerate() {
            *out = values[row * row_stride + column * column_stride].as_f32();
        }
        rest.fill(0.0);
    }
}

/// Rows of `W` numbers, `stride` apart.
fn rows<T: Element, const W: usize>(values: &[T], stride: usize, panel: &mut [f32]) {
    dispatch(
        #[inline(always)]
        |_| {
            for (row, out) in panel.as_chunks_mut::<W>().0.iter_mut().enumerate() {
                prefetch(values, (row + AHEAD) * stride, W);
                let from = &values[row * stride..][..W];
                for i in 0..W {
                    out[i] = from[i].as_f32();
                }
            }
        },
    );
}

/// The same for a B whose k lies contiguous in memory (a weight in its forward pass), by 16 x 16 transposes in registers.
///
/// # Safety
/// `columns` runs of `panel.len() / width` numbers, `stride` apart, must be readable; the processor has AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn transposed_by_16<T: Element>(
    values: *const T,
    stride: usize,
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    use std::arch::x86_64::*;
    let k = panel.len() / width;
    for first in (0..width).step_by(16) {
        for start in (0..k).step_by(16) {
            let depth = (k - start).min(16);
            let mask = (u32::MAX >> (32 - depth)) as u16;
            let mut block = [_mm512_setzero_ps(); 16];
            for row in 0..16 {
                let mask = if first + row < columns { mask } else { 0 };
                // SAFETY: column `first + row` holds what the mask names; beyond the last column it names nothing.
                block[row] =
                    unsafe { T::load(values.wrapping_add((first + row) * stride + start), mask) };
            }
            transpose_16(&mut block);
            for row in 0..16 {
                if row < depth {
                    // SAFETY: row `start + row` < k of the panel has 16 numbers from `first` on, for width is a multiple of 16.
                    unsafe {
                        _mm512_storeu_ps(
                            panel.as_mut_ptr().add((start + row) * width + first),
                            block[row],
                        )
                    };
                }
            }
        }
    }
}

/// Row i, lane j <-> row j, lane i: by pairs, by fours, then whole quarters.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose_16(rows: &mut [std::arch::x86_64::__m512; 16]) {
    use std::arch::x86_64::*;
    let mut pairs = [_mm512_setzero_ps(); 16];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4 i + j]: rows 4 i..4 i + 4, column j of each quarter.
    let mut fours = [_mm512_setzero_ps(); 16];
    for i in 0..4 {
        for j in 0..2 {
            let (a, b) = (
                _mm512_castps_pd(pairs[4 * i + j]),
                _mm512_castps_pd(pairs[4 * i + j + 2]),
            );
            fours[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // Of two vectors, 0x88 takes the first and third quarter of each, 0xdd the second and fourth.
    for j in 0..4 {
        let even = _mm512_shuffle_f32x4::<0x88>(fours[j], fours[4 + j]);
        let even_below = _mm512_shuffle_f32x4::<0x88>(fours[8 + j], fours[12 + j]);
        let odd = _mm512_shuffle_f32x4::<0xdd>(fours[j], fours[4 + j]);
        let odd_below = _mm512_shuffle_f32x4::<0xdd>(fours[8 + j], fours[12 + j]);
        rows[j] = _mm512_shuffle_f32x4::<0x88>(even, even_below);
        rows[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even_below);
        rows[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd_below);
        rows[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_below);
    }
}

/// The same by 8 x 8 transposes.
///
/// # Safety
/// `columns` runs of `panel.len() / width` numbers, `stride` apart, must be readable; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx2")]
unsafe fn transposed_by_8<T: Element>(
    values: *const T,
    stride: usize,
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    use std::arch::x86_64::*;
    let k = panel.len() / width;
    for first in (0..width).step_by(8) {
        for start in (0..k).step_by(8) {
            let depth = (k - start).min(8);
            let mut block = [_mm256_setzero_ps(); 8];
            for row in 0..(columns - first).min(8) {
                let from = values.wrapping_add((first + row) * stride + start);
                // SAFETY: column `first + row` holds `depth` numbers from `start` on.
                block[row] = unsafe {
                    if depth == 8 {
                        T::load_8(from)
                    } else {
                        first_of_8(from, depth)
                    }
                };
            }
            transpose_8(&mut block);
            for row in 0..depth {
                // SAFETY: row `start + row` < k of the panel has 8 numbers from `first` on, for width is a multiple of 8.
                unsafe {
                    _mm256_storeu_ps(
                        panel.as_mut_ptr().add((start + row) * width + first),
                        block[row],
                    )
                };
            }
        }
    }
}

/// `count` < 8 numbers from `from`, and zeros.
///
/// # Safety
/// They must be readable; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn first_of_8<T: Element>(from: *const T, count: usize) -> std::arch::x86_64::__m256 {
    let mut wide = [0.0f32; 8];
    // SAFETY: the caller's promise.
    (0..count).for_each(|index| wide[index] = unsafe { *from.add(index) }.as_f32());
    // SAFETY: eight numbers of the array.
    unsafe { std::arch::x86_64::_mm256_loadu_ps(wide.as_ptr()) }
}

/// Row i, lane j <-> row j, lane i: by pairs, by fours, then whole halves.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_8(rows: &mut [std::arch::x86_64::__m256; 8]) {
    use std::arch::x86_64::*;
    // fours[j] and fours[4 + j]: rows 0..4 and 4..8, column j of each half.
    let mut fours = [_mm256_setzero_ps(); 8];
    for i in 0..2 {
        let [a, b, c, d] = [
            rows[4 * i],
            rows[4 * i + 1],
            rows[4 * i + 2],
            rows[4 * i + 3],
        ];
        let (low, high) = (
            [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)],
            [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)],
        );
        fours[4 * i] = _mm256_shuffle_ps::<0x44>(low[0], low[1]);
        fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(low[0], low[1]);
        fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(high[0], high[1]);
        fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(high[0], high[1]);
    }
    for j in 0..4 {
        rows[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
        rows[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
    }
}
