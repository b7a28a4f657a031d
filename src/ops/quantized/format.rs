//! The formats that weights are stored in: names and sizes.

use crate::work::BlockSize;

/// How a tensor's values are stored. Names are ggml's and bitsandbytes'.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoredFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits and a scale for 32 values.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 values.
    Q4_1,
    /// 5 bits and a scale for 32 values.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 values.
    Q5_1,
    /// 8 bits and a scale for 32 values.
    Q8_0,
    /// 2 bits, a 4-bit scale and minimum for 16 of 256 values.
    Q2_K,
    /// 3 bits and a 6-bit scale for 16 of 256 values.
    Q3_K,
    /// 4 bits, a 6-bit scale and minimum for 32 of 256 values.
    Q4_K,
    /// 5 bits, likewise.
    Q5_K,
    /// 6 bits and an 8-bit scale for 16 of 256 values.
    Q6_K,
    /// 4-bit floats (e2m1) and an 8-bit power of two for 32 values.
    MXFP4,
    /// 4 bits that index the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023), and the absolute maximum in f32 for 64
    /// values.
    NF4,
    /// 4-bit floats of bitsandbytes, and the absolute maximum in f32 for 64 values.
    FP4,
    /// 8-bit floats (e4m3), and a scale in f32 for 128 values of a row.
    FP8,
    /// 4-bit integers, and a scale in f32 for 128 values of a row.
    INT4,
    /// 8 bits, and the absolute maximum of a row in f32 (LLM.int8, Dettmers et al. 2022, of weights alone).
    INT8,
}

impl StoredFormat {
    /// All formats.
    pub const ALL: [Self; 19] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::MXFP4,
        Self::NF4,
        Self::FP4,
        Self::FP8,
        Self::INT4,
        Self::INT8,
    ];

    /// Its name, ggml's number of the type, values of a block, bytes of a block. A block of INT8 is a row.
    fn layout(self) -> (&'static str, Option<u32>, usize, usize) {
        match self {
            Self::F32 => ("F32", Some(0), 1, 4),
            Self::F16 => ("F16", Some(1), 1, 2),
            Self::BF16 => ("BF16", Some(30), 1, 2),
            Self::Q4_0 => ("Q4_0", Some(2), 32, 18),
            Self::Q4_1 => ("Q4_1", Some(3), 32, 20),
            Self::Q5_0 => ("Q5_0", Some(6), 32, 22),
            Self::Q5_1 => ("Q5_1", Some(7), 32, 24),
            Self::Q8_0 => ("Q8_0", Some(8), 32, 34),
            Self::Q2_K => ("Q2_K", Some(10), 256, 84),
            Self::Q3_K => ("Q3_K", Some(11), 256, 110),
            Self::Q4_K => ("Q4_K", Some(12), 256, 144),
            Self::Q5_K => ("Q5_K", Some(13), 256, 176),
            Self::Q6_K => ("Q6_K", Some(14), 256, 210),
            Self::MXFP4 => ("MXFP4", Some(39), 32, 17),
            Self::NF4 => ("NF4", None, 64, 36),
            Self::FP4 => ("FP4", None, 64, 36),
            Self::FP8 => ("FP8", None, 128, 132),
            Self::INT4 => ("INT4", None, 128, 68),
            Self::INT8 => ("INT8", None, 1, 1),
        }
    }

    /// ggml's name of the type, or bitsandbytes' in capitals.
    pub fn name(self) -> &'static str {
        self.layout().0
    }

    /// ggml's number of the type; `None` where it has none.
    pub fn ggml_type(self) -> Option<u32> {
        self.layout().1
    }

    /// Whether values are floats on their own, without a scale.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Values of a block.
    pub fn block_values(self) -> usize {
        self.layout().2
    }

    /// Whether blocks may run over the ends of rows.
    fn runs_over_rows(self) -> bool {
        matches!(self, Self::NF4 | Self::FP4)
    }

    /// Whether a row of `columns` values is whole blocks, or need not be.
    pub fn fits_row(self, columns: usize) -> bool {
        self.runs_over_rows() || columns.is_multiple_of(self.block_values())
    }

    /// Bytes of `elements` values in whole blocks.
    pub fn bytes_of(self, elements: usize) -> usize {
        let (_, _, values, bytes) = self.layout();
        elements.div_ceil(values) * bytes
    }

    /// Bytes of a matrix (rows, columns); `None` beyond the range of an index.
    pub fn bytes_of_matrix(self, rows: usize, columns: usize) -> Option<usize> {
        let (_, _, values, bytes) = self.layout();
        let elements = rows.checked_mul(columns)?;
        if self == Self::INT8 {
            return elements.checked_add(rows.checked_mul(size_of::<f32>())?);
        }
        elements.div_ceil(values).checked_mul(bytes)
    }

    /// The size of a block in a matrix with rows of `columns` values.
    pub fn block_size(self, columns: usize) -> BlockSize {
        let (_, _, values, bytes) = self.layout();
        let (values, bytes) = match self {
            Self::INT8 => (columns.max(1), columns + size_of::<f32>()),
            _ => (values, bytes),
        };
        BlockSize {
            values: values as u64,
            bytes: bytes as u64,
        }
    }

    /// Vector operations that decode one value: conversion and product; masks, shifts, offsets and table reads besides.
    pub fn decode_operations(self) -> usize {
        match self {
            Self::F32 => 0,
            Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::INT8 => 2,
            Self::FP8 | Self::INT4 | Self::Q4_0 | Self::NF4 | Self::FP4 | Self::MXFP4 => 4,
            _ => 6,
        }
    }
}
