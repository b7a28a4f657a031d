//! f32 values -> blocks.
//!
//! F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 equal gguf-py's `quants.quantize` bit for bit, NF4, FP4 and INT8 bitsandbytes';
//! K-quants are candle's port of ggml's reference quantisers.

#![allow(clippy::needless_range_loop)]

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::StoredFormat;
use super::decode::NF4_LEVELS;
use crate::error::{Error, Kind, Result};
use crate::ops::simd::simd;

/// Values of a row that are quantised together.
const BLOCK: usize = 32;
/// Blocks that a thread encodes at once.
const BLOCKS_PER_TASK: usize = 1 << 10;

impl StoredFormat {
    /// The stored form of `values`, rows of `columns` values one after another.
    ///
    /// # Errors
    /// A format that nothing here quantises to, and values that candle's quantiser refuses.
    pub fn encode(self, values: &[f32], columns: usize) -> Result<Vec<u8>> {
        let each = |encode: fn(f32) -> [u8; 2]| values.iter().flat_map(|x| encode(*x)).collect();
        Ok(match self {
            Self::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16 => each(|x| f16::from_f32(x).to_le_bytes()),
            Self::BF16 => each(|x| bf16::from_f32(x).to_le_bytes()),
            Self::Q4_0 => self.encode_blocks(values, q4_0),
            Self::Q4_1 => self.encode_blocks(values, q4_1),
            Self::Q5_0 => self.encode_blocks(values, q5_0),
            Self::Q5_1 => self.encode_blocks(values, q5_1),
            Self::Q8_0 => self.encode_blocks(values, q8_0),
            Self::Q4_K => encode_k(values, GgmlDType::Q4K)?,
            Self::Q5_K => encode_k(values, GgmlDType::Q5K)?,
            Self::Q6_K => encode_k(values, GgmlDType::Q6K)?,
            Self::NF4 => encode_nf4(values),
            Self::INT8 => values
                .par_chunks(columns.max(1))
                .flat_map_iter(int8)
                .collect(),
            Self::Q2_K | Self::Q3_K | Self::MXFP4 | Self::FP4 | Self::FP8 | Self::INT4 => {
                let what = format!("weights are not quantised to {}", self.name());
                return Err(Error::new(Kind::Model, what));
            }
        })
    }

    fn encode_blocks(
        self,
        values: &[f32],
        encode: impl Fn(&[f32; BLOCK], &mut [u8]) + Sync,
    ) -> Vec<u8> {
        let bytes = self.bytes_of(BLOCK);
        let mut out = vec![0; self.bytes_of(values.len())];
        let tasks = out.par_chunks_mut(bytes * BLOCKS_PER_TASK);
        let inputs = values.par_chunks(BLOCK * BLOCKS_PER_TASK);
        tasks.zip(inputs).for_each(|(out, values)| {
            let blocks = values.as_chunks::<BLOCK>().0;
            for (out, block) in out.chunks_exact_mut(bytes).zip(blocks) {
                encode(block, out);
            }
        });
        out
    }
}

fn encode_k(values: &[f32], dtype: GgmlDType) -> Result<Vec<u8>> {
    let quantised = Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|tensor| QTensor::quantize(&tensor, dtype))
        .and_then(|tensor| Ok(tensor.data()?.into_owned()));
    quantised.map_err(|e| Error::new(Kind::Model, format!("a tensor cannot be quantised: {e}")))
}

/// 1 / d, or 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The first value of the largest magnitude.
fn largest(block: &[f32; BLOCK]) -> f32 {
    block.iter().fold(
        0.0f32,
        |most, x| if x.abs() > most.abs() { *x } else { most },
    )
}

/// Two 4-bit values a byte: the first half of the block in the low bits.
fn put_nibbles(out: &mut [u8], values: &[u8; BLOCK]) {
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = (values[i] & 15) | ((values[i + BLOCK / 2] & 15) << 4);
    }
}

/// The fifth bits of a block, little-endian.
fn fifth_bits(values: &[u8; BLOCK]) -> [u8; 4] {
    let bits = values.iter().enumerate();
    let word = bits.fold(0u32, |word, (i, x)| word | (u32::from(x >> 4) << i));
    word.to_le_bytes()
}

/// d = largest / -8, q = trunc(x / d + 8.5) at most 15; product and sum in f32 one after the other, as gguf-py's.
fn q4_0(block: &[f32; BLOCK], out: &mut [u8]) {
    let d = largest(block) / -8.0;
    let inverse = inverse(d);
    let quantised = block.map(|x| ((x * inverse + 8.5) as u8).min(15));
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    put_nibbles(&mut out[2..], &quantised);
}

/// d = largest / -16, q = trunc(x / d + 16.5) at most 31, as Q4_0.
fn q5_0(block: &[f32; BLOCK], out: &mut [u8]) {
    let d = largest(block) / -16.0;
    let inverse = inverse(d);
    let quantised = block.map(|x| ((x * inverse + 16.5) as u8).min(31));
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    out[2..6].copy_from_slice(&fifth_bits(&quantised));
    put_nibbles(&mut out[6..], &quantised);
}

/// d = (largest - least) / 15, m = least, q = trunc((x - m) / d + 0.5) at most 15.
fn q4_1(block: &[f32; BLOCK], out: &mut [u8]) {
    let (d, least) = step_and_least(block, 15.0);
    let inverse = inverse(d);
    let quantised = block.map(|x| (((x - least) * inverse + 0.5) as u8).min(15));
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    out[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
    put_nibbles(&mut out[4..], &quantised);
}

/// (largest - least) / `steps`, and the least.
fn step_and_least(block: &[f32; BLOCK], steps: f32) -> (f32, f32) {
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    ((most - least) / steps, least)
}

/// d = (largest - least) / 31, m = least, q = trunc((x - m) / d + 0.5) at most 31.
fn q5_1(block: &[f32; BLOCK], out: &mut [u8]) {
    let (d, least) = step_and_least(block, 31.0);
    let inverse = inverse(d);
    let quantised = block.map(|x| (((x - least) * inverse + 0.5) as u8).min(31));
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    out[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
    out[4..8].copy_from_slice(&fifth_bits(&quantised));
    put_nibbles(&mut out[8..], &quantised);
}

/// d = max|x| / 127, q = x / d rounded half away from zero.
fn q8_0(block: &[f32; BLOCK], out: &mut [u8]) {
    let d = largest(block).abs() / 127.0;
    let inverse = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (byte, x) in out[2..].iter_mut().zip(block) {
        *byte = ((x * inverse).round() as i8) as u8;
    }
}

/// Values of a block of NF4.
const NF4_BLOCK: usize = 64;

/// Blocks of 64 by their absolute maximum; the last may be shorter.
fn encode_nf4(values: &[f32]) -> Vec<u8> {
    const TASK: usize = NF4_BLOCK * BLOCKS_PER_TASK;
    let bytes = StoredFormat::NF4.bytes_of(NF4_BLOCK);
    let mut out = vec![0; StoredFormat::NF4.bytes_of(values.len())];
    let tasks = out.par_chunks_mut(bytes * BLOCKS_PER_TASK);
    tasks
        .zip(values.par_chunks(TASK))
        .for_each(|(out, values)| {
            let blocks = values.chunks(NF4_BLOCK);
            for (out, block) in out.chunks_exact_mut(bytes).zip(blocks) {
                nf4(block, out);
            }
        });
    out
}

/// The code of x / maximum: the number of midpoints of neighbouring levels below it. A shorter block is divided, a whole one
/// multiplied by the inverse.
fn nf4(block: &[f32], out: &mut [u8]) {
    const SMALLEST: f32 = 1e-38;
    let maximum = block.iter().fold(0f32, |most, x| most.max(x.abs()));
    let divisor = maximum.max(SMALLEST);
    let inverse = 1.0 / divisor;
    let mut scaled = [0.0; NF4_BLOCK];
    for (scaled, x) in scaled.iter_mut().zip(block) {
        let ratio = if block.len() == NF4_BLOCK {
            x * inverse
        } else {
            x / divisor
        };
        *scaled = ratio.clamp(-1.0, 1.0);
    }
    let codes = simd!(|_| {
        let mut codes = [0u8; NF4_BLOCK];
        for pair in NF4_LEVELS.windows(2) {
            let midpoint = (pair[0] + pair[1]) / 2.0;
            for i in 0..NF4_BLOCK {
                codes[i] += u8::from(midpoint < scaled[i]);
            }
        }
        codes
    });
    out[..4].copy_from_slice(&maximum.to_le_bytes());
    for (i, code) in codes[..block.len()].iter().enumerate() {
        out[4 + i / 2] |= code << (4 * (1 - i % 2));
    }
}

/// A row: x times 127 / maximum, rounded half to even, then the maximum.
fn int8(row: &[f32]) -> Vec<u8> {
    let maximum = row.iter().fold(0f32, |most, x| most.max(x.abs()));
    let factor = if maximum == 0.0 { 0.0 } else { 127.0 / maximum };
    let codes = row
        .iter()
        .map(|x| (x * factor).round_ties_even() as i8 as u8);
    codes.chain(maximum.to_le_bytes()).collect()
}
