//! Blocks against gguf-py and bitsandbytes, products against those of decoded weights.

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::decode::decode;
use super::dot::portable_dots;
use super::{QuantizedSlice, StoredFormat, dots};
use crate::ops::Weight;
use crate::ops::gemm::{MatRef, Values, gemm};
use crate::work::Precision;

/// `scripts/gguf_blocks.py`.
const ENCODED: &str = include_str!("../../../tests/golden/gguf_blocks.json");
/// `scripts/quantized_blocks.py`.
const DECODED: &str = include_str!("../../../tests/golden/quantized_blocks.json");
/// Values of a row of that file's NF4, FP4 and INT8.
const COLUMNS: usize = 80;

fn bytes(hex: &Value) -> Vec<u8> {
    let digits = hex.as_str().unwrap().as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

fn floats(hex: &Value) -> Vec<f32> {
    let bytes = bytes(hex);
    let (quads, rest) = bytes.as_chunks();
    assert!(rest.is_empty());
    quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn blocks_equal_those_of_gguf_py() {
    let formats = [
        StoredFormat::F16,
        StoredFormat::BF16,
        StoredFormat::Q4_0,
        StoredFormat::Q4_1,
        StoredFormat::Q5_0,
        StoredFormat::Q5_1,
        StoredFormat::Q8_0,
    ];
    let golden: Vec<Value> = serde_json::from_str(ENCODED).unwrap();
    let mut compared = 0;
    for row in &golden {
        let bits = row["bits"].as_array().unwrap();
        let bits = bits.iter().map(|bits| bits.as_u64().unwrap() as u32);
        let values: Vec<f32> = bits.map(f32::from_bits).collect();
        for format in formats {
            let Some(expected) = row["stored"].get(format.name()) else {
                continue;
            };
            let stored = format.encode(&values, values.len()).unwrap();
            assert_eq!(
                stored,
                bytes(expected),
                "{} of {}",
                format.name(),
                row["name"]
            );
            assert_eq!(stored.len(), format.bytes_of(values.len()));
            compared += 1;
        }
    }
    assert_eq!(compared, 62);
}

/// Golden blocks of every format that is no float, with its name and their decoded values.
fn golden() -> Vec<(StoredFormat, Value)> {
    let golden: Value = serde_json::from_str(DECODED).unwrap();
    let formats = StoredFormat::ALL.into_iter();
    let formats = formats.filter(|format| !format.is_float());
    formats
        .map(|format| (format, golden[format.name()].clone()))
        .collect()
}

/// To the bit, in one piece and in pieces that begin and end inside blocks.
#[test]
fn values_are_those_that_gguf_py_and_bitsandbytes_decode() {
    for (format, golden) in golden() {
        let (blocks, expected) = (bytes(&golden["blocks"]), floats(&golden["values"]));
        for piece in [COLUMNS, 16, 5] {
            let mut decoded = vec![0.0; expected.len()];
            for (index, out) in decoded.chunks_mut(piece).enumerate() {
                decode(format, &blocks, COLUMNS, index * piece, out);
            }
            let name = format.name();
            assert_eq!(bits(&decoded), bits(&expected), "{name} by {piece}");
        }
    }
}

#[test]
fn values_are_quantised_as_bitsandbytes_does() {
    for (format, golden) in golden() {
        if !matches!(format, StoredFormat::NF4 | StoredFormat::INT8) {
            continue;
        }
        let stored = format.encode(&floats(&golden["from"]), COLUMNS).unwrap();
        assert_eq!(stored, bytes(&golden["blocks"]), "{}", format.name());
    }
}

#[test]
fn every_f16_is_read_as_half_reads_it() {
    for bits in 0..=u16::MAX {
        let expected = half::f16::from_bits(bits).to_f32();
        let read = super::decode::f16_at(&bits.to_le_bytes(), 0);
        let same = read.to_bits() == expected.to_bits() || read.is_nan() && expected.is_nan();
        assert!(same, "{bits:#x}: {read} {expected}");
    }
}

#[test]
fn k_quants_are_near_their_values() {
    let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
    for (format, dtype, most) in [
        (StoredFormat::Q4_K, GgmlDType::Q4K, 0.01),
        (StoredFormat::Q5_K, GgmlDType::Q5K, 0.005),
        (StoredFormat::Q6_K, GgmlDType::Q6K, 0.004),
    ] {
        let stored = format.encode(&values, 512).unwrap();
        let mut decoded = vec![0.0; 512];
        decode(format, &stored, 512, 0, &mut decoded);
        let read = candle_core::quantized::ggml_file::qtensor_from_ggml(
            dtype,
            &stored,
            vec![512],
            &Device::Cpu,
        );
        let read = read.unwrap().dequantize(&Device::Cpu).unwrap();
        let read = read.to_vec1::<f32>().unwrap();
        for ((x, y), candle) in values.iter().zip(&decoded).zip(read) {
            assert!((x - y).abs() < most, "{format:?}: {x} {y}");
            assert!((candle - y).abs() < 1e-6, "{format:?}: {candle} {y}");
        }
    }
}

/// A weight (rows, columns) in a format that weights are quantised to.
fn weight(format: StoredFormat, [rows, columns]: [usize; 2]) -> (Vec<u8>, Vec<f32>) {
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.1)
        .collect();
    let stored = format.encode(&values, columns).unwrap();
    let decoded = Weight::quantized(format, [rows, columns], stored.clone()).unwrap();
    let decoded = decoded.dequantized().unwrap();
    (stored, decoded.flatten_all().unwrap().to_vec1().unwrap())
}

/// Products of one, few and many rows with the weight and its transpose equal those with its decoded values to the bit, but for the
/// single row, which sums in another order.
#[test]
fn products_equal_those_of_the_decoded_weight() {
    let formats = [
        (StoredFormat::Q8_0, 288),
        (StoredFormat::Q4_0, 288),
        (StoredFormat::Q4_K, 512),
        (StoredFormat::NF4, 288),
        (StoredFormat::NF4, 75),
        (StoredFormat::INT8, 75),
    ];
    for (format, columns) in formats {
        let rows = 70;
        let (stored, decoded) = weight(format, [rows, columns]);
        let blocks = QuantizedSlice::new(format, &stored, [rows, columns]);
        let quantised = MatRef::new(Values::Quantized(blocks), rows, columns);
        let dense = MatRef::from_f32(&decoded, rows, columns);
        for precision in [Precision::F32, Precision::Bf16] {
            for m in [1, 3, 40] {
                for transposed in [false, true] {
                    let (q, d) = if transposed {
                        (quantised.t(), dense.t())
                    } else {
                        (quantised, dense)
                    };
                    let k = if transposed { columns } else { rows };
                    let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
                    let a = MatRef::from_f32(&a, m, k);
                    let (found, expected) = (gemm(precision, a, q), gemm(precision, a, d));
                    let case = format!("{} {precision:?} {m} {transposed}", format.name());
                    if m > 1 {
                        assert_eq!(found, expected, "{case}");
                    } else {
                        for (found, expected) in found.iter().zip(&expected) {
                            assert!((found - expected).abs() < 1e-5, "{case}");
                        }
                    }
                }
            }
        }
    }
}

/// One row times the rows of every format, from any row on.
#[test]
fn dot_products_are_those_of_decoded_rows() {
    for (format, golden) in golden() {
        let (blocks, values) = (bytes(&golden["blocks"]), floats(&golden["values"]));
        let columns = if values.len().is_multiple_of(COLUMNS) {
            COLUMNS
        } else {
            format.block_values()
        };
        let rows = values.len() / columns;
        let w = QuantizedSlice::new(format, &blocks, [rows, columns]);
        let x: Vec<f32> = (0..columns).map(|i| (i as f32 * 0.7).cos()).collect();
        let mut out = vec![1.0; rows - 1];
        dots(&x, w, 1, &mut out);
        let mut portable = vec![1.0; rows - 1];
        portable_dots(&x, w, 1, &mut portable);
        for (a, b) in out.iter().zip(&portable) {
            assert!(
                (a - b).abs() <= 1e-5 * b.abs().max(1.0),
                "{}",
                format.name()
            );
        }
        let mut tail = vec![1.0; rows - 1];
        dots(&x, w.slice_from(columns), 0, &mut tail);
        assert_eq!(out, tail, "{}", format.name());
        for (found, row) in out.iter().zip(values.chunks(columns).skip(1)) {
            let exact: f64 = x
                .iter()
                .zip(row)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum();
            let size: f64 = x.iter().zip(row).map(|(x, w)| f64::from(x * w).abs()).sum();
            let error = (f64::from(*found) - 1.0 - exact).abs();
            assert!(error <= 1e-5 * size + 1e-6, "{}: {error}", format.name());
        }
    }
}

#[test]
fn rows_of_a_quantised_table_are_gathered() {
    let (stored, decoded) = weight(StoredFormat::Q8_0, [6, 64]);
    let table = Weight::quantized(StoredFormat::Q8_0, [6, 64], stored).unwrap();
    let ids = Tensor::new(&[5u32, 0, 5], &Device::Cpu).unwrap();
    let rows = table.gather_dequantized(&ids).unwrap();
    let rows = rows.to_vec2::<f32>().unwrap();
    for (row, id) in rows.iter().zip([5, 0, 5]) {
        assert_eq!(row, &decoded[id * 64..(id + 1) * 64]);
    }
    let beyond = Tensor::new(&[6u32], &Device::Cpu).unwrap();
    assert!(table.gather_dequantized(&beyond).is_err());
    assert!(Weight::quantized(StoredFormat::Q8_0, [6, 64], vec![0; 7]).is_err());
}
