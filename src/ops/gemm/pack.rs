//! Packing of B for micro-kernels: panels of rows of k, each as wide as the micro-tile, in f32,
//! zero beyond B's last column.

use std::ops::Range;

use super::microkernel::{Isa, Transpose};
use super::{Element, MatRef, Values, span};
use crate::ops::quantized::QuantizedSlice;
use crate::ops::simd::simd;

/// Rows prefetched ahead: they lie on other pages, across which hardware does not prefetch.
const PREFETCH_ROWS: usize = 16;
/// Columns of the widest panel.
const MAX_WIDTH: usize = 32;
/// Rows of k that are decoded at once for a panel: 16 KiB of f32, half of L1.
const DECODED_ROWS: usize = 128;

/// Packs rows `k` of b's columns `columns` into `panel` (k, width), with width the columns rounded
/// up to vectors.
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
    let strides = [b.row_stride, b.column_stride];
    match b.values {
        Values::F32(values) => {
            pack_panel(isa, &values[start..], strides, columns.len(), panel, width)
        }
        Values::Bf16(values) => {
            pack_panel(isa, &values[start..], strides, columns.len(), panel, width)
        }
        Values::Quantized(values) => {
            pack_quantized(isa, values, strides, start, columns.len(), panel, width)
        }
    }
}

/// Packs `columns` columns of a quantised B from index `start` on: decodes rows into the panel, or, where B is transposed, runs of
/// its columns into a buffer that is packed next.
fn pack_quantized(
    isa: &Isa,
    values: QuantizedSlice<'_>,
    strides: [usize; 2],
    start: usize,
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    let [row_stride, column_stride] = strides;
    if column_stride == 1 {
        for (row, out) in panel.chunks_exact_mut(width).enumerate() {
            let (filled, padding) = out.split_at_mut(columns);
            values.decode(start + row * row_stride, filled);
            padding.fill(0.0);
        }
        return;
    }
    let mut decoded = [0.0; MAX_WIDTH * DECODED_ROWS];
    for (block, panel) in panel.chunks_mut(width * DECODED_ROWS).enumerate() {
        let depth = panel.len() / width;
        let start = start + block * DECODED_ROWS;
        for (column, out) in decoded.chunks_exact_mut(depth).take(columns).enumerate() {
            values.decode(start + column * column_stride, out);
        }
        pack_panel(isa, &decoded, [1, depth], columns, panel, width);
    }
}

/// Packs `columns` columns that start at the first of `values`, with the strides of a row and of a column.
fn pack_panel<T: Element>(
    isa: &Isa,
    values: &[T],
    [row_stride, column_stride]: [usize; 2],
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    if column_stride == 1 {
        return copy_panel(values, row_stride, columns, panel, width);
    }
    if row_stride == 1 {
        assert!(
            span(columns, column_stride, panel.len() / width)
                .is_some_and(|end| end <= values.len()),
            "every column lies inside the matrix"
        );
        #[cfg(target_arch = "x86_64")]
        if isa.transpose != Transpose::Portable {
            let values = values.as_ptr();
            // SAFETY: the columns are readable (asserted), and `isa` is chosen only where the CPU
            // has it.
            return unsafe {
                if isa.transpose == Transpose::Avx512 {
                    transpose_panel_16(values, column_stride, columns, panel, width)
                } else {
                    transpose_panel_8(values, column_stride, columns, panel, width)
                }
            };
        }
    }
    for (row, out) in panel.chunks_exact_mut(width).enumerate() {
        let (filled, padding) = out.split_at_mut(columns);
        for (column, out) in filled.iter_mut().enumerate() {
            *out = values[row * row_stride + column * column_stride].as_f32();
        }
        padding.fill(0.0);
    }
}

/// Packs rows of `columns` contiguous elements. Widths of micro-tiles and of usual heads are
/// constants, so that no row is a call of memcpy.
fn copy_panel<T: Element>(
    values: &[T],
    row_stride: usize,
    columns: usize,
    panel: &mut [f32],
    width: usize,
) {
    match (columns == width, width) {
        (true, 8) => copy_rows::<T, 8>(values, row_stride, panel),
        (true, 16) => copy_rows::<T, 16>(values, row_stride, panel),
        (true, 32) => copy_rows::<T, 32>(values, row_stride, panel),
        (true, 64) => copy_rows::<T, 64>(values, row_stride, panel),
        _ => simd!(|_| {
            for (row, out) in panel.chunks_exact_mut(width).enumerate() {
                prefetch(values, (row + PREFETCH_ROWS) * row_stride, columns);
                let (filled, padding) = out.split_at_mut(columns);
                let from = &values[row * row_stride..][..columns];
                filled
                    .iter_mut()
                    .zip(from)
                    .for_each(|(out, x)| *out = x.as_f32());
                padding.fill(0.0);
            }
        }),
    }
}

/// Packs rows of `W` contiguous elements.
fn copy_rows<T: Element, const W: usize>(values: &[T], row_stride: usize, panel: &mut [f32]) {
    simd!(|_| {
        for (row, out) in panel.as_chunks_mut::<W>().0.iter_mut().enumerate() {
            prefetch(values, (row + PREFETCH_ROWS) * row_stride, W);
            let from = &values[row * row_stride..][..W];
            for i in 0..W {
                out[i] = from[i].as_f32();
            }
        }
    });
}

/// Prefetches `count` elements from `start` on, as far as they lie inside the slice.
#[inline(always)]
fn prefetch<T: Element>(values: &[T], start: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for index in (start..(start + count).min(values.len())).step_by(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().add(index).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, start, count);
}

/// Packs a B that is contiguous along k (a weight in its forward pass) by 16 x 16 transposes in
/// registers.
///
/// # Safety
/// `columns` runs of `panel.len() / width` elements, `stride` apart, are readable; the CPU has
/// AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn transpose_panel_16<T: Element>(
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
                // SAFETY: column `first + row` has the elements under the mask, which is empty
                // beyond the last column.
                block[row] =
                    unsafe { T::load(values.wrapping_add((first + row) * stride + start), mask) };
            }
            transpose_16(&mut block);
            for row in 0..16 {
                if row < depth {
                    // SAFETY: row `start + row` < k of the panel has 16 elements from `first` on:
                    // width is a multiple of 16.
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

/// Transposes a 16 x 16 block: by pairs, by fours, then by 128-bit quarters.
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
            let a = _mm512_castps_pd(pairs[4 * i + j]);
            let b = _mm512_castps_pd(pairs[4 * i + j + 2]);
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

/// `transpose_panel_16` by 8 x 8 transposes.
///
/// # Safety
/// `columns` runs of `panel.len() / width` elements, `stride` apart, are readable; the CPU has
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx2")]
unsafe fn transpose_panel_8<T: Element>(
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
                // SAFETY: column `first + row` has `depth` elements from `start` on.
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
                // SAFETY: row `start + row` < k of the panel has 8 elements from `first` on: width
                // is a multiple of 8.
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

/// `count` < 8 elements from `from`, padded with zeros.
///
/// # Safety
/// They are readable; the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn first_of_8<T: Element>(from: *const T, count: usize) -> std::arch::x86_64::__m256 {
    let mut wide = [0.0f32; 8];
    // SAFETY: the caller's promise.
    (0..count).for_each(|index| wide[index] = unsafe { *from.add(index) }.as_f32());
    // SAFETY: eight elements of the array.
    unsafe { std::arch::x86_64::_mm256_loadu_ps(wide.as_ptr()) }
}

/// Transposes an 8 x 8 block: by pairs, by fours, then by 128-bit halves.
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
        let low = [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)];
        let high = [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)];
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
