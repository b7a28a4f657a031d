//! Blocks -> f32, 32 values at a time.
//!
//! Formulas and layouts are those of gguf-py's `quants.py` (MIT) and of bitsandbytes' `backends/default/ops.py` (MIT); products and
//! sums round where theirs do.

#![allow(clippy::needless_range_loop)]

use super::StoredFormat;
use crate::ops::simd::simd;

/// Values that are decoded at once.
pub(super) const PART: usize = 32;

/// The levels of NF4 by code: QLoRA, appendix E.
pub(super) const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The levels of FP4 by code, as bitsandbytes normalises them.
pub(super) const FP4_LEVELS: [f32; 16] = {
    const POSITIVE: [f32; 8] = [
        0.0,
        0.005_208_333_3,
        0.666_666_7,
        1.0,
        0.333_333_34,
        0.5,
        0.166_666_67,
        0.25,
    ];
    let mut levels = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        levels[i] = POSITIVE[i];
        levels[i + 8] = 0.0 - POSITIVE[i];
        i += 1;
    }
    levels
};

/// Twice the levels of MXFP4 (e2m1) by code.
pub(super) const E2M1_TWICE: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

/// A format of blocks of a fixed size.
pub(super) trait Block {
    /// Values of a block.
    const VALUES: usize;
    /// Bytes of a block.
    const BYTES: usize;

    /// Decodes values `PART * part` to `PART * (part + 1)` of a block.
    fn decode(block: &[u8], part: usize, out: &mut [f32; PART]);
}

/// Binds `$block` to the type of a format's blocks in `$body`; `$other` for formats without.
macro_rules! with_block {
    ($format:expr, $block:ident => $body:expr, $other:expr) => {
        with_block!(@ $format, $block => $body, $other;
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4 NF4 FP4 FP8 INT4)
    };
    (@ $format:expr, $block:ident => $body:expr, $other:expr; $($name:ident)*) => {
        match $format {
            $($crate::ops::quantized::StoredFormat::$name => {
                type $block = $crate::ops::quantized::decode::$name;
                $body
            })*
            _ => $other,
        }
    };
}
pub(super) use with_block;

/// Decodes the values from index `at` on, in row-major order, of a matrix with rows of `columns` values; all are of one row.
pub(super) fn decode(
    format: StoredFormat,
    blocks: &[u8],
    columns: usize,
    at: usize,
    out: &mut [f32],
) {
    with_block!(format, B => simd!(|_| decode_blocks::<B>(blocks, at, out)), {
        let (codes, maximum) = int8_row(blocks, columns, at / columns);
        let codes = &codes[at % columns..][..out.len()];
        simd!(|_| for i in 0..codes.len() {
            out[i] = f32::from(codes[i] as i8) * maximum * INVERSE_OF_127;
        });
    });
}

/// 1 / 127, as bitsandbytes writes it.
pub(super) const INVERSE_OF_127: f32 = 7.874_016e-3;

/// A row of an INT8 matrix: its codes, then the absolute maximum of its values in f32. A value is code times maximum over 127.
pub(super) fn int8_row(blocks: &[u8], columns: usize, row: usize) -> (&[u8], f32) {
    let row = &blocks[row * (columns + size_of::<f32>())..][..columns + size_of::<f32>()];
    let (codes, maximum) = row.split_at(columns);
    (codes, f32_at(maximum, 0))
}

#[inline(always)]
fn decode_blocks<B: Block>(blocks: &[u8], at: usize, out: &mut [f32]) {
    let mut at = at;
    let mut out = out;
    while !out.is_empty() {
        let block = &blocks[at / B::VALUES * B::BYTES..][..B::BYTES];
        let (part, skipped) = (at % B::VALUES / PART, at % PART);
        let count = (PART - skipped).min(out.len());
        let (now, rest) = std::mem::take(&mut out).split_at_mut(count);
        match now.as_chunks_mut::<PART>() {
            ([whole], []) => B::decode(block, part, whole),
            _ => {
                let mut values = [0.0; PART];
                B::decode(block, part, &mut values);
                now.copy_from_slice(&values[skipped..][..count]);
            }
        }
        at += count;
        out = rest;
    }
}

#[inline(always)]
pub(super) fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// An f16. Its normal values have the mantissa of an f32 and another bias of the exponent; subnormal ones are converted as integers,
/// because arithmetic on subnormal f32 takes 100 cycles and more, and the scales of Q4_K and Q6_K are mostly subnormal.
#[inline(always)]
pub(super) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    const TWO_TO_THE_MINUS_24: f32 = f32::from_bits(0x3380_0000);
    let bits = u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let magnitude = match bits & 0x7c00 {
        0 => ((bits & 0x03ff) as f32 * TWO_TO_THE_MINUS_24).to_bits(),
        0x7c00 => 0x7f80_0000 | (bits & 0x03ff) << 13,
        _ => ((bits & 0x7fff) << 13) + ((127 - 15) << 23),
    };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

/// A float with 4 bits of exponent and 3 of mantissa, as [`f16_at`].
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    const TWO_TO_THE_MINUS_9: f32 = f32::from_bits(0x3b00_0000);
    let bits = u32::from(code);
    let subnormal = ((bits & 7) as f32 * TWO_TO_THE_MINUS_9).to_bits();
    let normal = ((bits & 0x7f) << 20) + ((127 - 7) << 23);
    let magnitude = if bits & 0x78 == 0 { subnormal } else { normal };
    f32::from_bits(magnitude | (bits & 0x80) << 24)
}

/// Two 4-bit codes a byte, the first half of 32 in the low bits.
#[inline(always)]
fn halves_of_nibbles(bytes: &[u8], value: impl Fn(u8) -> f32, out: &mut [f32; PART]) {
    for i in 0..PART / 2 {
        out[i] = value(bytes[i] & 15);
        out[i + PART / 2] = value(bytes[i] >> 4);
    }
}

/// Two 4-bit codes a byte, neighbours, the first in the high bits.
#[inline(always)]
fn pairs_of_nibbles(bytes: &[u8], value: impl Fn(u8) -> f32, out: &mut [f32; PART]) {
    for i in 0..PART / 2 {
        out[2 * i] = value(bytes[i] >> 4);
        out[2 * i + 1] = value(bytes[i] & 15);
    }
}

/// 32 codes of 5 bits: the fifth of each in `fifth`, little-endian, the others as `halves_of_nibbles`.
#[inline(always)]
fn five_bits(fifth: &[u8], bytes: &[u8]) -> [u8; PART] {
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    let mut codes = [0; PART];
    for i in 0..PART / 2 {
        codes[i] = (bytes[i] & 15) | ((fifth >> i) as u8 & 1) << 4;
        codes[i + PART / 2] = (bytes[i] >> 4) | ((fifth >> (i + PART / 2)) as u8 & 1) << 4;
    }
    codes
}

/// 2^(e - 128): half of the scale e8m0, for levels twice as large. A subnormal for e < 2.
#[inline(always)]
pub(super) fn half_power_of_two(e: u8) -> f32 {
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        u32::from(e - 1) << 23
    })
}

/// The 6-bit scale and minimum of sub-block `j` of Q4_K and Q5_K.
#[inline(always)]
pub(super) fn scale_and_minimum(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4,
            (packed[j + 4] >> 4) | (packed[j] >> 6) << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

/// Defines the blocks of formats: values, bytes, and the decoding of a part.
macro_rules! blocks {
    ($($(#[$doc:meta])* $name:ident($values:literal, $bytes:literal) = $decode:expr;)*) => {$(
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl Block for $name {
            const VALUES: usize = $values;
            const BYTES: usize = $bytes;

            #[inline(always)]
            fn decode(block: &[u8], part: usize, out: &mut [f32; PART]) {
                let decode: fn(&[u8; $bytes], usize, &mut [f32; PART]) = $decode;
                if let Some(block) = block.first_chunk() {
                    decode(block, part, out);
                }
            }
        }
    )*};
}

blocks! {
    /// d (q - 8).
    Q4_0(32, 18) = |block, _, out| {
        let d = f16_at(block, 0);
        halves_of_nibbles(&block[2..], |q| d * f32::from(q as i8 - 8), out);
    };
    /// d q + m.
    Q4_1(32, 20) = |block, _, out| {
        let (d, m) = (f16_at(block, 0), f16_at(block, 2));
        halves_of_nibbles(&block[4..], |q| d * f32::from(q) + m, out);
    };
    /// d (q - 16).
    Q5_0(32, 22) = |block, _, out| {
        let d = f16_at(block, 0);
        let codes = five_bits(&block[2..], &block[6..]);
        for i in 0..PART {
            out[i] = d * f32::from(codes[i] as i8 - 16);
        }
    };
    /// d q + m.
    Q5_1(32, 24) = |block, _, out| {
        let (d, m) = (f16_at(block, 0), f16_at(block, 2));
        let codes = five_bits(&block[4..], &block[8..]);
        for i in 0..PART {
            out[i] = d * f32::from(codes[i]) + m;
        }
    };
    /// d q.
    Q8_0(32, 34) = |block, _, out| {
        let d = f16_at(block, 0);
        for i in 0..PART {
            out[i] = d * f32::from(block[2 + i] as i8);
        }
    };
    /// d sc q - dmin mn, with sc and mn of 16 values: 16 bytes of (mn, sc), 64 of codes, d, dmin.
    Q2_K(256, 84) = |block, part, out| {
        let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
        let (codes, shift) = (&block[16 + part / 4 * PART..], 2 * (part % 4));
        for half in 0..2 {
            let scales = block[2 * part + half];
            let (scale, minimum) = (d * f32::from(scales & 15), dmin * f32::from(scales >> 4));
            for i in 16 * half..16 * half + 16 {
                out[i] = scale * f32::from((codes[i] >> shift) & 3) - minimum;
            }
        }
    };
    /// d (sc - 32) (q - 4 or q): 32 bytes of third bits, 64 of codes, 12 of scales, d.
    Q3_K(256, 110) = |block, part, out| {
        let d = f16_at(block, 108);
        let (codes, shift) = (&block[PART + part / 4 * PART..], 2 * (part % 4));
        for half in 0..2 {
            let j = 2 * part + half;
            let low = (block[96 + j % 8] >> (4 * (j / 8))) & 15;
            let high = (block[104 + j % 4] >> (2 * (j / 4))) & 3;
            let scale = d * f32::from((low | high << 4) as i8 - 32);
            for i in 16 * half..16 * half + 16 {
                let third = ((block[i] >> part) & 1) ^ 1;
                let code = ((codes[i] >> shift) & 3) as i8 - ((third << 2) as i8);
                out[i] = scale * f32::from(code);
            }
        }
    };
    /// d sc q - dmin mn: d, dmin, 12 bytes of sc and mn, 128 of codes.
    Q4_K(256, 144) = |block, part, out| {
        let (scale, minimum) = scale_and_minimum(&block[4..], part);
        let (scale, minimum) = (f16_at(block, 0) * scale, f16_at(block, 2) * minimum);
        let (codes, shift) = (&block[16 + part / 2 * PART..], 4 * (part % 2));
        for i in 0..PART {
            out[i] = scale * f32::from((codes[i] >> shift) & 15) - minimum;
        }
    };
    /// As Q4_K, with 32 bytes of fifth bits before the codes.
    Q5_K(256, 176) = |block, part, out| {
        let (scale, minimum) = scale_and_minimum(&block[4..], part);
        let (scale, minimum) = (f16_at(block, 0) * scale, f16_at(block, 2) * minimum);
        let (fifth, codes) = (&block[16..], &block[48 + part / 2 * PART..]);
        let shift = 4 * (part % 2);
        for i in 0..PART {
            let code = ((codes[i] >> shift) & 15) | ((fifth[i] >> part) & 1) << 4;
            out[i] = scale * f32::from(code) - minimum;
        }
    };
    /// d sc (q - 32): 128 bytes of low bits, 64 of high bits, 16 scales, d.
    Q6_K(256, 210) = |block, part, out| {
        let d = f16_at(block, 208);
        let (half, group) = (part / 4, part % 4);
        let low = &block[64 * half + PART * (group % 2)..];
        let high = &block[128 + PART * half..];
        for sub in 0..2 {
            let scale = d * f32::from(block[192 + 2 * part + sub] as i8);
            for i in 16 * sub..16 * sub + 16 {
                let code = ((low[i] >> (4 * (group / 2))) & 15) | ((high[i] >> (2 * group)) & 3) << 4;
                out[i] = scale * f32::from(code as i8 - 32);
            }
        }
    };
    /// 2^(e - 127) times e2m1: e, 16 bytes of codes.
    MXFP4(32, 17) = |block, _, out| {
        let d = half_power_of_two(block[0]);
        halves_of_nibbles(&block[1..], |q| d * E2M1_TWICE[usize::from(q & 15)], out);
    };
    /// Maximum times level: the maximum in f32, 32 bytes of codes.
    NF4(64, 36) = |block, part, out| {
        let maximum = f32_at(block, 0);
        let codes = &block[4 + PART / 2 * part..];
        pairs_of_nibbles(codes, |q| NF4_LEVELS[usize::from(q & 15)] * maximum, out);
    };
    /// Likewise.
    FP4(64, 36) = |block, part, out| {
        let maximum = f32_at(block, 0);
        let codes = &block[4 + PART / 2 * part..];
        pairs_of_nibbles(codes, |q| FP4_LEVELS[usize::from(q & 15)] * maximum, out);
    };
    /// Scale times e4m3: the scale in f32, 128 bytes.
    FP8(128, 132) = |block, part, out| {
        let scale = f32_at(block, 0);
        for i in 0..PART {
            out[i] = e4m3(block[4 + PART * part + i]) * scale;
        }
    };
    /// Scale times (q - 8): the scale in f32, 64 bytes of codes, two neighbours a byte, the first in the low bits.
    INT4(128, 68) = |block, part, out| {
        let scale = f32_at(block, 0);
        for i in 0..PART / 2 {
            let codes = block[4 + PART / 2 * part + i];
            out[2 * i] = f32::from((codes & 15) as i8 - 8) * scale;
            out[2 * i + 1] = f32::from((codes >> 4) as i8 - 8) * scale;
        }
    };
}
