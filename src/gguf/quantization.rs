//! The quantisations of a whole model: which tensor gets which format, as `llama-quantize` chooses.
//!
//! Source of the rules: `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp` (MIT).

use clap::ValueEnum;

use crate::ops::StoredFormat;

/// A quantisation of a model, by llama.cpp's name.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    /// 32-bit floats.
    #[value(name = "f32")]
    F32,
    /// 16-bit floats.
    #[value(name = "f16")]
    F16,
    /// bfloat16.
    #[value(name = "bf16")]
    BF16,
    /// 8.5 bits a weight.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits a weight.
    #[value(name = "q4_0")]
    Q4_0,
    /// 5.5 bits a weight.
    #[value(name = "q5_0")]
    Q5_0,
    /// 4.8 bits a weight in large models: Q4_K, half of the sensitive matrices in Q6_K.
    #[value(name = "q4_k_m")]
    Q4_K_M,
    /// 6.6 bits a weight.
    #[value(name = "q6_k")]
    Q6_K,
}

/// What a tensor is for, as far as its format depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The output embedding, or the input embedding where the two are one.
    Output,
    /// v or down in a block: more sensitive than others.
    Sensitive {
        /// Index of the block.
        layer: usize,
        /// Number of blocks.
        layers: usize,
    },
    /// Any other.
    Other,
}

impl Quantization {
    /// llama.cpp's name: `Q4_K_M`.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::F32 => "F32",
            Quantization::F16 => "F16",
            Quantization::BF16 => "BF16",
            Quantization::Q8_0 => "Q8_0",
            Quantization::Q4_0 => "Q4_0",
            Quantization::Q5_0 => "Q5_0",
            Quantization::Q4_K_M => "Q4_K_M",
            Quantization::Q6_K => "Q6_K",
        }
    }

    /// `general.file_type`.
    pub fn file_type(self) -> u32 {
        match self {
            Quantization::F32 => 0,
            Quantization::F16 => 1,
            Quantization::BF16 => 32,
            Quantization::Q4_0 => 2,
            Quantization::Q8_0 => 7,
            Quantization::Q5_0 => 8,
            Quantization::Q4_K_M => 15,
            Quantization::Q6_K => 18,
        }
    }

    /// The format of a tensor with this shape (outermost dimension first). Vectors stay F32.
    pub fn format(self, shape: &[usize], role: Role) -> StoredFormat {
        let [.., _, row] = *shape else {
            return StoredFormat::F32;
        };
        let wanted = match self {
            Quantization::F32 => StoredFormat::F32,
            Quantization::F16 => StoredFormat::F16,
            Quantization::BF16 => StoredFormat::BF16,
            Quantization::Q8_0 => StoredFormat::Q8_0,
            Quantization::Q6_K => StoredFormat::Q6_K,
            Quantization::Q4_0 | Quantization::Q5_0 | Quantization::Q4_K_M
                if role == Role::Output =>
            {
                StoredFormat::Q6_K
            }
            Quantization::Q4_0 => StoredFormat::Q4_0,
            Quantization::Q5_0 => StoredFormat::Q5_0,
            Quantization::Q4_K_M => match role {
                Role::Sensitive { layer, layers } if uses_more_bits(layer, layers) => {
                    StoredFormat::Q6_K
                }
                _ => StoredFormat::Q4_K,
            },
        };
        that_fits(wanted, row)
    }
}

/// The blocks whose sensitive matrices get more bits: the first and last eighth, and every third between.
fn uses_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// `wanted`, or what llama.cpp takes where a row is not whole blocks of it.
fn that_fits(wanted: StoredFormat, row: usize) -> StoredFormat {
    if row.is_multiple_of(wanted.block_values()) {
        return wanted;
    }
    let smaller = match wanted {
        StoredFormat::Q4_K => StoredFormat::Q5_0,
        StoredFormat::Q5_K => StoredFormat::Q5_1,
        StoredFormat::Q6_K => StoredFormat::Q8_0,
        _ => StoredFormat::F16,
    };
    if row.is_multiple_of(smaller.block_values()) {
        smaller
    } else {
        StoredFormat::F16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_no_whole_blocks_get_a_smaller_block() {
        let formats = [
            (Quantization::Q4_K_M, Role::Other, 256, StoredFormat::Q4_K),
            (Quantization::Q4_K_M, Role::Other, 576, StoredFormat::Q5_0),
            (Quantization::Q4_K_M, Role::Output, 576, StoredFormat::Q8_0),
            (Quantization::Q4_0, Role::Output, 512, StoredFormat::Q6_K),
            (Quantization::Q8_0, Role::Output, 512, StoredFormat::Q8_0),
            (Quantization::Q8_0, Role::Other, 172, StoredFormat::F16),
            (Quantization::BF16, Role::Other, 7, StoredFormat::BF16),
        ];
        for (quantization, role, row, format) in formats {
            assert_eq!(
                quantization.format(&[3, row], role),
                format,
                "{quantization:?} {row}"
            );
        }
        assert_eq!(
            Quantization::Q4_0.format(&[64], Role::Other),
            StoredFormat::F32
        );
    }
}
