//! The block formats of GGUF tensors: sizes, and values -> blocks.
//!
//! A block holds consecutive values of one row. F16, BF16, Q4_0, Q5_0, Q5_1 and Q8_0 equal gguf-py's `quants.quantize` bit for
//! bit; K-quants are candle's port of ggml's reference quantisers.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::{Error, Kind, Result};

/// How a tensor's values are stored, by ggml's names.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits and a scale for 32 values.
    Q4_0,
    /// 5 bits and a scale for 32 values.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 values.
    Q5_1,
    /// 8 bits and a scale for 32 values.
    Q8_0,
    /// 4 bits, a 6-bit scale and minimum for 32 of 256 values.
    Q4_K,
    /// 5 bits, likewise.
    Q5_K,
    /// 6 bits and an 8-bit scale for 16 of 256 values.
    Q6_K,
}

/// Values of a row that are quantised together.
const BLOCK: usize = 32;
/// Blocks that a thread encodes at once.
const BLOCKS_PER_TASK: usize = 1 << 10;

impl Format {
    /// ggml's number of the type.
    pub fn id(self) -> u32 {
        self.layout().0
    }

    /// ggml's number, values and bytes of a block.
    fn layout(self) -> (u32, usize, usize) {
        match self {
            Format::F32 => (0, 1, 4),
            Format::F16 => (1, 1, 2),
            Format::BF16 => (30, 1, 2),
            Format::Q4_0 => (2, 32, 18),
            Format::Q5_0 => (6, 32, 22),
            Format::Q5_1 => (7, 32, 24),
            Format::Q8_0 => (8, 32, 34),
            Format::Q4_K => (12, 256, 144),
            Format::Q5_K => (13, 256, 176),
            Format::Q6_K => (14, 256, 210),
        }
    }

    /// Values of a block; a row is whole blocks.
    pub fn block_values(self) -> usize {
        self.layout().1
    }

    /// Bytes of `elements` values in whole blocks.
    pub fn bytes_of(self, elements: usize) -> usize {
        let (_, values, bytes) = self.layout();
        elements / values * bytes
    }

    /// The stored form of `values`, rows of whole blocks one after another.
    ///
    /// # Errors
    /// Values that candle's quantiser refuses.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>> {
        let each = |encode: fn(f32) -> [u8; 2]| values.iter().flat_map(|x| encode(*x)).collect();
        Ok(match self {
            Format::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Format::F16 => each(|x| f16::from_f32(x).to_le_bytes()),
            Format::BF16 => each(|x| bf16::from_f32(x).to_le_bytes()),
            Format::Q4_0 => self.encode_blocks(values, q4_0),
            Format::Q5_0 => self.encode_blocks(values, q5_0),
            Format::Q5_1 => self.encode_blocks(values, q5_1),
            Format::Q8_0 => self.encode_blocks(values, q8_0),
            Format::Q4_K => encode_k(values, GgmlDType::Q4K)?,
            Format::Q5_K => encode_k(values, GgmlDType::Q5K)?,
            Format::Q6_K => encode_k(values, GgmlDType::Q6K)?,
        })
    }

    fn encode_blocks(
        self,
        values: &[f32],
        encode: impl Fn(&[f32; BLOCK], &mut [u8]) + Sync,
    ) -> Vec<u8> {
        let (_, _, bytes) = self.layout();
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

/// d = (largest - least) / 31, m = least, q = trunc((x - m) / d + 0.5) at most 31.
fn q5_1(block: &[f32; BLOCK], out: &mut [u8]) {
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let d = (most - least) / 31.0;
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// `scripts/gguf_blocks.py`.
    const GOLDEN: &str = include_str!("../../tests/golden/gguf_blocks.json");

    #[test]
    fn blocks_equal_those_of_gguf_py() {
        let formats = [
            ("F16", Format::F16),
            ("BF16", Format::BF16),
            ("Q4_0", Format::Q4_0),
            ("Q5_0", Format::Q5_0),
            ("Q5_1", Format::Q5_1),
            ("Q8_0", Format::Q8_0),
        ];
        let golden: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
        let mut compared = 0;
        for row in &golden {
            let bits = row["bits"].as_array().unwrap();
            let values: Vec<f32> = bits
                .iter()
                .map(|bits| f32::from_bits(bits.as_u64().unwrap() as u32))
                .collect();
            for (name, format) in formats {
                let Some(expected) = row["stored"][name].as_str() else {
                    continue;
                };
                let stored = format.encode(&values).unwrap();
                assert_eq!(
                    crate::text::hex(&stored),
                    expected,
                    "{name} of {}",
                    row["name"]
                );
                assert_eq!(stored.len(), format.bytes_of(values.len()));
                compared += 1;
            }
        }
        assert_eq!(compared, 53);
    }

    #[test]
    fn k_quants_are_near_their_values() {
        let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
        for (format, dtype, most) in [
            (Format::Q4_K, GgmlDType::Q4K, 0.01),
            (Format::Q5_K, GgmlDType::Q5K, 0.005),
            (Format::Q6_K, GgmlDType::Q6K, 0.004),
        ] {
            let stored = format.encode(&values).unwrap();
            let read = candle_core::quantized::ggml_file::qtensor_from_ggml(
                dtype,
                &stored,
                vec![512],
                &Device::Cpu,
            );
            let read = read.unwrap().dequantize(&Device::Cpu).unwrap();
            for (x, y) in values.iter().zip(read.to_vec1::<f32>().unwrap()) {
                assert!((x - y).abs() < most, "{format:?}: {x} {y}");
            }
        }
    }
}
