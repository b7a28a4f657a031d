//! The innermost loop on AVX512-BF16: each f32 lane accumulates a dot product of two bf16 pairs.

#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::unit::{BLOCK_LINES, K_STEP, KRun, Runs, TILE, TileOut};

/// Rows summed in registers at a time: with two vectors of columns, 16 independent accumulators.
/// More rows gained nothing (benches/LOG.md, "a processor with fast dot products of bf16 pairs").
const ROWS: usize = 8;
/// f32 lanes of a vector.
const LANES: usize = 16;

/// Whether the CPU has AVX512-BF16 and the instructions that packing uses.
pub(in crate::ops::gemm) fn present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether these dot products are faster than f32 FMA: twice as fast on AMD, which issues them at
/// the same rate; half as fast on Intel.
pub(in crate::ops::gemm) fn fast() -> bool {
    let vendor = __cpuid(0);
    // "AuthenticAMD"
    [vendor.ebx, vendor.edx, vendor.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
}

/// `ActiveUnit::multiply` on AVX512-BF16; writes full vectors and multiples of `ROWS` rows.
///
/// # Safety
/// A's and B's steps are readable, `out` is writable as 32 x 32; the CPU has AVX512-BF16.
pub(super) unsafe fn multiply(runs: Runs, out: TileOut) {
    for first in (0..out.rows.min(TILE)).step_by(ROWS) {
        let runs = runs.map(|run| KRun {
            a: run.a.wrapping_add(first),
            ..run
        });
        // SAFETY: the caller's promise; these rows are among the 32.
        unsafe {
            let ptr = out.ptr.add(first * out.stride);
            if out.columns > LANES {
                strip::<2>(runs, ptr, out.stride, out.accumulate);
            } else {
                strip::<1>(runs, ptr, out.stride, out.accumulate);
            }
        }
    }
}

/// `ROWS` rows of `V` vectors.
///
/// # Safety
/// As `multiply`'s, from these rows on.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn strip<const V: usize>(runs: Runs, out: *mut f32, stride: usize, accumulate: bool) {
    let mut sums = [[_mm512_setzero_ps(); V]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        if accumulate {
            for row in 0..ROWS {
                for v in 0..V {
                    sums[row][v] = _mm512_loadu_ps(out.add(row * stride + v * LANES));
                }
            }
        }
        for run in runs {
            let mut a = run.a;
            let mut b = run.b;
            for start in (0..run.depth).step_by(K_STEP) {
                for pair in 0..(run.depth - start).min(K_STEP).div_ceil(2) {
                    let mut columns = [_mm512_setzero_si512(); V];
                    for v in 0..V {
                        columns[v] = _mm512_load_si512(b.add(v * LANES + pair).cast());
                    }
                    for row in 0..ROWS {
                        let both = _mm512_set1_epi32(*a.add(row).cast::<i32>().add(pair));
                        for v in 0..V {
                            sums[row][v] =
                                _mm512_dpbf16_ps(sums[row][v], as_bf16(both), as_bf16(columns[v]));
                        }
                    }
                }
                (a, b) = (a.add(BLOCK_LINES), b.add(BLOCK_LINES));
            }
        }
        for row in 0..ROWS {
            for v in 0..V {
                _mm512_storeu_ps(out.add(row * stride + v * LANES), sums[row][v]);
            }
        }
    }
}

/// The same bits as 32 bf16.
#[inline(always)]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which every pattern is valid.
    unsafe { std::mem::transmute(bits) }
}
