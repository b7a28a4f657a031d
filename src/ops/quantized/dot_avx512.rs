//! Dot products with quantised rows on AVX-512: 32 values of a block at a time, decoded in registers.
//!
//! Codes of 4 bits are looked up in a table of 16 levels. Two sums alternate, so that a multiply-add does not wait for the last.

use std::arch::x86_64::*;

use super::decode::{self, FP4_LEVELS, NF4_LEVELS, PART, f16_at, f32_at, scale_and_minimum};
use super::{QuantizedSlice, StoredFormat};

/// A block format with a kernel.
trait Kernel: decode::Block {
    /// Whether the codes of neighbours share a byte: x is then given as its even and its odd elements.
    const PAIRS: bool = false;

    /// `sum` + values `PART * part` to `PART * (part + 1)` of a block times x.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL; the block has `BYTES` bytes.
    unsafe fn add(block: &[u8], part: usize, x: [__m512; 2], sum: __m512) -> __m512;
}

/// out += x (k) times rows `first..` of `w`; false, and nothing done, for a format, a length or a CPU without a kernel.
pub(super) fn dots(x: &[f32], w: &QuantizedSlice<'_>, first: usize, out: &mut [f32]) -> bool {
    let supported = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    if !supported || !x.len().is_multiple_of(PART) {
        return false;
    }
    macro_rules! kernels {
        ($($name:ident)*) => {
            match w.format {
                $(StoredFormat::$name => rows::<decode::$name>(x, w.blocks, first, out),)*
                _ => return false,
            }
        };
    }
    kernels!(Q8_0 Q4_0 MXFP4 NF4 FP4 Q4_K Q6_K);
    true
}

fn rows<B: Kernel>(x: &[f32], blocks: &[u8], first: usize, out: &mut [f32]) {
    let arranged = B::PAIRS.then(|| evens_and_odds(x));
    let arranged = arranged.as_deref().unwrap_or(x);
    for (row, out) in out.iter_mut().enumerate() {
        // SAFETY: `dots` has found the instructions.
        *out += unsafe { dot::<B>(arranged, blocks, (first + row) * x.len()) };
    }
}

/// Of each 32 elements those with an even index, then the others.
fn evens_and_odds(x: &[f32]) -> Vec<f32> {
    const HALF: usize = PART / 2;
    let mut arranged = vec![0.0; x.len()];
    let parts = x.as_chunks::<PART>().0.iter();
    for (x, out) in parts.zip(arranged.as_chunks_mut::<PART>().0) {
        for i in 0..HALF {
            out[i] = x[2 * i];
            out[HALF + i] = x[2 * i + 1];
        }
    }
    arranged
}

/// x times the values from index `at` on, a multiple of `PART`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dot<B: Kernel>(x: &[f32], blocks: &[u8], at: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 2];
    for (index, x) in x.as_chunks::<PART>().0.iter().enumerate() {
        let at = at + index * PART;
        let block = &blocks[at / B::VALUES * B::BYTES..][..B::BYTES];
        // SAFETY: x has 32 elements; the block has its bytes; the caller has the instructions.
        unsafe {
            let x = [
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x.as_ptr().add(PART / 2)),
            ];
            sums[index % 2] = B::add(block, at % B::VALUES / PART, x, sums[index % 2]);
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// Sixteen bytes from index `at` on as integers.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn bytes_at(block: &[u8], at: usize) -> __m512i {
    let bytes = &block[at..at + 16];
    // SAFETY: sixteen bytes.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// sum + scale (low levels x[0] + high levels x[1]), of 16 bytes of two codes each.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_levels(
    codes: __m512i,
    levels: &[f32; 16],
    scale: f32,
    [low, high]: [__m512; 2],
    sum: __m512,
) -> __m512 {
    // SAFETY: sixteen levels. The permutation reads the low four bits of an index alone.
    let levels = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
    let product = _mm512_mul_ps(_mm512_permutexvar_ps(codes, levels), low);
    let upper = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), levels);
    let product = _mm512_fmadd_ps(upper, high, product);
    _mm512_fmadd_ps(_mm512_set1_ps(scale), product, sum)
}

/// The values of Q4_0 without their scale.
const Q4_0_LEVELS: [f32; 16] = [
    -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
];

/// Implements `Kernel` with a body that reads a block, a part, x and a sum.
macro_rules! kernel {
    ($name:ident, $pairs:literal, |$block:ident, $part:ident, $x:ident, $sum:ident| $body:expr) => {
        impl Kernel for decode::$name {
            const PAIRS: bool = $pairs;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            unsafe fn add($block: &[u8], $part: usize, $x: [__m512; 2], $sum: __m512) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { $body }
            }
        }
    };
}

kernel!(Q4_0, false, |block, _part, x, sum| {
    add_levels(bytes_at(block, 2), &Q4_0_LEVELS, f16_at(block, 0), x, sum)
});
kernel!(MXFP4, false, |block, _part, x, sum| {
    let levels = &decode::E2M1_TWICE;
    let scale = decode::half_power_of_two(block[0]);
    add_levels(bytes_at(block, 1), levels, scale, x, sum)
});
kernel!(NF4, true, |block, part, x, sum| {
    let codes = bytes_at(block, 4 + PART / 2 * part);
    add_levels(codes, &NF4_LEVELS, f32_at(block, 0), [x[1], x[0]], sum)
});
kernel!(FP4, true, |block, part, x, sum| {
    let codes = bytes_at(block, 4 + PART / 2 * part);
    add_levels(codes, &FP4_LEVELS, f32_at(block, 0), [x[1], x[0]], sum)
});
kernel!(Q8_0, false, |block, _part, x, sum| {
    let halves = [2, 18].map(|at| {
        let codes = _mm_loadu_si128(block[at..at + 16].as_ptr().cast());
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
    });
    let product = _mm512_mul_ps(halves[0], x[0]);
    let product = _mm512_fmadd_ps(halves[1], x[1], product);
    _mm512_fmadd_ps(_mm512_set1_ps(f16_at(block, 0)), product, sum)
});
kernel!(Q4_K, false, |block, part, x, sum| {
    let (scale, minimum) = scale_and_minimum(&block[4..16], part);
    let scale = _mm512_set1_ps(f16_at(block, 0) * scale);
    let minimum = _mm512_set1_ps(f16_at(block, 2) * minimum);
    let start = 16 + part / 2 * PART;
    let shift = _mm_cvtsi32_si128(4 * (part as i32 % 2));
    let mask = _mm512_set1_epi32(15);
    let halves = [start, start + 16].map(|at| {
        let codes = _mm512_srl_epi32(bytes_at(block, at), shift);
        _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask))
    });
    let product = _mm512_mul_ps(halves[0], x[0]);
    let product = _mm512_fmadd_ps(halves[1], x[1], product);
    let sum = _mm512_fmadd_ps(scale, product, sum);
    _mm512_fnmadd_ps(minimum, _mm512_add_ps(x[0], x[1]), sum)
});
kernel!(Q6_K, false, |block, part, x, mut_sum| {
    let mut sum = mut_sum;
    let d = f16_at(block, 208);
    let (half, group) = (part / 4, part % 4);
    let low_shift = _mm_cvtsi32_si128(4 * (group as i32 / 2));
    let high_shift = _mm_cvtsi32_si128(2 * group as i32);
    for sub in 0..2 {
        let low = bytes_at(block, 64 * half + PART * (group % 2) + 16 * sub);
        let low = _mm512_and_si512(_mm512_srl_epi32(low, low_shift), _mm512_set1_epi32(15));
        let high = bytes_at(block, 128 + PART * half + 16 * sub);
        let high = _mm512_and_si512(_mm512_srl_epi32(high, high_shift), _mm512_set1_epi32(3));
        let codes = _mm512_or_si512(low, _mm512_slli_epi32::<4>(high));
        let codes = _mm512_sub_epi32(codes, _mm512_set1_epi32(32));
        let scale = d * f32::from(block[192 + 2 * part + sub] as i8);
        let product = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), x[sub]);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(scale), product, sum);
    }
    sum
});
