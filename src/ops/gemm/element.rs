//! The element formats of operands and results.

use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// An element format: f32 or bf16.
pub(in crate::ops) trait Element: Copy + Send + Sync {
    /// The value in f32.
    fn as_f32(self) -> f32;

    /// `wide`, rounded to nearest even.
    fn cast(wide: f32) -> Self;

    /// Sixteen elements from `from`, zero and not read where `mask` has no bit.
    ///
    /// # Safety
    /// The elements under `mask` are readable; the CPU has AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, mask: u16) -> __m512;

    /// Eight elements from `from`.
    ///
    /// # Safety
    /// They are readable; the CPU has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_8(from: *const Self) -> __m256;

    /// The same pointers if the format is bf16.
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

    #[inline(always)]
    fn cast(wide: f32) -> Self {
        wide
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_8(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Element for bf16 {
    /// bf16 is the upper half of f32.
    #[inline(always)]
    fn as_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn cast(wide: f32) -> Self {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        // Rounding could carry a NaN into infinity.
        let bits = if wide.is_nan() {
            bits | 0x0040_0000
        } else {
            rounded
        };
        bf16::from_bits((bits >> 16) as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        unsafe {
            let narrow = _mm256_maskz_loadu_epi16(mask, from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_8(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; bf16 is a transparent u16.
        unsafe {
            let narrow = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn bf16(low: *const Self, high: *const Self) -> Option<(*const bf16, *const bf16)> {
        Some((low, high))
    }
}
