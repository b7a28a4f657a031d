//! The innermost loop in vectors of pairs (AVX512-BF16): each lane takes the sum of two products of bf16 numbers onto an f32.

#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::unit::{BLOCK_LINES, K_STEP, Run, Runs, TILE};

/// Rows that are summed in registers at a time: with two vectors of columns, 16 sums that wait for nothing. More rows gained nothing
/// (benches/LOG.md, "a processor with fast dot products of bf16 pairs").
const ROWS: usize = 8;
/// f32 numbers of a vector.
const LANES: usize = 16;

/// Whether the processor has these dot products, and the vectors that pack for them.
pub(in crate::ops::gemm) fn present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether they are faster than f32's multiply-adds where there are any: twice on AMD's processors, where one is issued as often; half on
/// Intel's.
pub(in crate::ops::gemm) fn fast() -> bool {
    let vendor = __cpuid(0);
    // "AuthenticAMD"
    [vendor.ebx, vendor.edx, vendor.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
}

/// out (rows, columns) = [out where `onto`] + the runs' products; whole vectors and eights of rows are written.
///
/// # Safety
/// A's and B's steps are readable, `out` is writable as (32, 32) numbers, `out.1` from row to row; the processor has AVX512-BF16.
pub(super) unsafe fn multiply(
    runs: Runs,
    (out, out_row): (*mut f32, usize),
    (rows, columns): (usize, usize),
    onto: bool,
) {
    for first in (0..rows.min(TILE)).step_by(ROWS) {
        let runs = runs.map(|run| Run {
            a: run.a.wrapping_add(first),
            ..run
        });
        // SAFETY: the caller's promise; these rows are among the 32.
        unsafe {
            let out = out.add(first * out_row);
            match columns > LANES {
                true => strip::<2>(runs, out, out_row, onto),
                false => strip::<1>(runs, out, out_row, onto),
            }
        }
    }
}

/// Eight rows of `V` vectors.
///
/// # Safety
/// As `multiply`'s, from these rows on.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn strip<const V: usize>(runs: Runs, out: *mut f32, out_row: usize, onto: bool) {
    let mut sums = [[_mm512_setzero_ps(); V]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        if onto {
            for row in 0..ROWS {
                for v in 0..V {
                    sums[row][v] = _mm512_loadu_ps(out.add(row * out_row + v * LANES));
                }
            }
        }
        for Run {
            mut a,
            mut b,
            depth,
            ..
        } in runs
        {
            for start in (0..depth).step_by(K_STEP) {
                for pair in 0..(depth - start).min(K_STEP).div_ceil(2) {
                    let mut columns = [_mm512_setzero_si512(); V];
                    for v in 0..V {
                        columns[v] = _mm512_load_si512(b.add(v * LANES + pair).cast());
                    }
                    for row in 0..ROWS {
                        let both = _mm512_set1_epi32(*a.add(row).cast::<i32>().add(pair));
                        for v in 0..V {
                            sums[row][v] =
                                _mm512_dpbf16_ps(sums[row][v], of_bf16(both), of_bf16(columns[v]));
                        }
                    }
                }
                (a, b) = (a.add(BLOCK_LINES), b.add(BLOCK_LINES));
            }
        }
        for row in 0..ROWS {
            for v in 0..V {
                _mm512_storeu_ps(out.add(row * out_row + v * LANES), sums[row][v]);
            }
        }
    }
}

/// The same bits as 32 numbers.
#[inline(always)]
fn of_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without a meaning of their own.
    unsafe { std::mem::transmute(bits) }
}
