//! Dot products of one row of f32 with quantised rows: the GEMV of a generated token.

#![allow(clippy::needless_range_loop)]

use super::QuantizedSlice;
use super::decode::{Block, INVERSE_OF_127, PART, int8_row, with_block};
use crate::ops::simd::{LANES, Simd, simd, sum_lanes};

/// out += x (k) times rows `first..` of `w`, one for each element of `out`.
pub(in crate::ops) fn dots(x: &[f32], w: QuantizedSlice<'_>, first: usize, out: &mut [f32]) {
    assert_eq!(x.len(), w.columns, "rows have one length");
    assert!(
        (first + out.len()) * w.columns <= w.len,
        "these rows lie inside the matrix"
    );
    let first = w.start / w.columns.max(1) + first;
    #[cfg(target_arch = "x86_64")]
    if super::dot_avx512::dots(x, &w, first, out) {
        return;
    }
    portable_dots(x, w, first, out);
}

/// `dots` for rows `first..` from the first of the matrix on, on any CPU.
pub(super) fn portable_dots(x: &[f32], w: QuantizedSlice<'_>, first: usize, out: &mut [f32]) {
    with_block!(w.format, B => {
        if x.len().is_multiple_of(PART) {
            simd!(|simd| for (row, out) in out.iter_mut().enumerate() {
                *out += dot_blocks::<B>(simd, x, w.blocks, (first + row) * x.len());
            });
        } else {
            let mut decoded = vec![0.0; x.len()];
            for (row, out) in out.iter_mut().enumerate() {
                w.decode((first + row) * x.len() - w.start, &mut decoded);
                *out += simd!(|simd| simd.dot(x, &decoded));
            }
        }
    }, for (row, out) in out.iter_mut().enumerate() {
        let (codes, maximum) = int8_row(w.blocks, w.columns, first + row);
        *out += maximum * INVERSE_OF_127 * simd!(|simd| simd.dot_map(x, codes, |code| f32::from(code as i8)));
    });
}

/// x times the values from index `at` on, a multiple of `PART`.
#[inline(always)]
fn dot_blocks<B: Block>(simd: Simd, x: &[f32], blocks: &[u8], at: usize) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut values = [0.0; PART];
    for (index, x) in x.as_chunks::<PART>().0.iter().enumerate() {
        let at = at + index * PART;
        let block = &blocks[at / B::VALUES * B::BYTES..][..B::BYTES];
        B::decode(block, at % B::VALUES / PART, &mut values);
        for lane in 0..LANES {
            let sum = simd.mul_add(x[lane], values[lane], lanes[lane]);
            lanes[lane] = simd.mul_add(x[LANES + lane], values[LANES + lane], sum);
        }
    }
    sum_lanes(lanes)
}
