//! Work of a linear layer and its LoRA adapter, from shapes alone.

use super::{Linear, Lora, Weight};
use crate::error::Result;
use crate::ops::StoredFormat;
use crate::work::{Precision, Work};

/// What the cost of an adapter depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraShape {
    /// Its rank.
    pub r: usize,
    /// With a bias on B.
    pub bias: bool,
    /// With DoRA's magnitude.
    pub magnitude: bool,
}

/// Everything that the cost of a linear layer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x.
    pub in_features: usize,
    /// Columns of y.
    pub out_features: usize,
    /// The adapter's rank.
    pub r: Option<usize>,
    /// Whether the adapter has a bias on B.
    pub lora_bias: bool,
    /// Whether the adapter has DoRA's magnitude.
    pub magnitude: bool,
    /// With a bias.
    pub bias: bool,
    /// The format of a quantised W.
    pub stored: Option<StoredFormat>,
    /// Whether W is trained.
    pub trained: bool,
    /// Whether the bias is trained.
    pub bias_trained: bool,
    /// With LoRA dropout.
    pub dropout: bool,
}

impl LinearShape {
    /// Whether anything of the layer is trained.
    pub fn is_trained(&self) -> bool {
        self.r.is_some() || self.trained || self.bias_trained
    }

    /// Work of `forward`.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let (n, i, o) = (self.tokens, self.in_features, self.out_features);
        let mut work = self.product(n, o, i, precision);
        if let Some(r) = self.r {
            work += &Work::product(n, r, i, precision);
            work += &Work::product(n, o, r, precision);
            work += &Work::sweep(8 * n * r, n * r);
        }
        if self.bias || self.lora_bias {
            work += &Work::sweep(8 * n * o, n * o);
        }
        if let Some(r) = self.r.filter(|_| self.magnitude) {
            work += &self.row_norms_cost(r);
            work += &Work::sweep(12 * n * o, n * o);
            if self.dropout {
                work += &self.product(n, o, i, precision);
                work += &Work::sweep(12 * n * i + 12 * n * o, n * i + n * o);
            }
        }
        if self.dropout && self.r.is_some() {
            work += &Work::sweep(12 * n * i, n * i);
        }
        work
    }

    /// A product with W or its transpose as the second operand; of a quantised W each value is decoded once.
    fn product(&self, m: usize, n: usize, k: usize, precision: Precision) -> Work {
        let Some(format) = self.stored else {
            return Work::product(m, n, k, precision);
        };
        let block = format.block_size(self.in_features);
        let decoded = Work::sweep(0, format.decode_operations() * n * k);
        Work::stored_product(m, n, k, precision, Some(block)) + decoded
    }

    /// Work of `backward`; `input_gradient`: with dx.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let (n, i, o) = (self.tokens, self.in_features, self.out_features);
        let mut work = Work::default();
        if input_gradient {
            work += &self.product(n, i, o, precision);
        }
        if self.trained {
            work += &Work::product(o, i, n, precision);
        }
        for _ in 0..usize::from(self.bias_trained) + usize::from(self.lora_bias) {
            work += &Work::sweep(4 * n * o, n * o);
        }
        if self.magnitude {
            work += &Work::sweep(20 * n * o, 3 * n * o);
            if self.dropout && input_gradient {
                work += &self.product(n, i, o, precision);
                work += &Work::sweep(24 * n * i, 2 * n * i);
            }
        }
        if let Some(r) = self.r {
            work += &Work::product(n, r, o, precision); // dy B
            work += &Work::product(o, r, n, precision); // dB
            work += &Work::product(r, i, n, precision); // dA
            work += &Work::sweep(8 * n * r, n * r);
            if self.dropout {
                work += &Work::sweep(12 * n * i, n * i);
            }
            if input_gradient {
                work += &Work::product(n, i, r, precision);
                if self.dropout {
                    work += &Work::sweep(24 * n * i, 2 * n * i);
                }
            }
        }
        work
    }
}

impl LinearShape {
    /// Work of the norms of the rows of W + scaling * B A.
    fn row_norms_cost(&self, r: usize) -> Work {
        let (i, o) = (self.in_features, self.out_features);
        Work::product(o, r, i, Precision::F32)
            + Work::product(r, r, i, Precision::F32)
            + Work::product(o, r, r, Precision::F32)
            + Work::sweep(16 * o * r, 6 * o * r)
    }
}

impl Linear {
    /// The layer's shape for `tokens` rows.
    pub fn shape(&self, tokens: usize, dropout: bool) -> Result<LinearShape> {
        let (out_features, in_features) = self.weight.dims2()?;
        let lora = self.lora.as_ref().map(Lora::shape).transpose()?;
        Ok(LinearShape {
            tokens,
            in_features,
            out_features,
            r: lora.map(|lora| lora.r),
            lora_bias: lora.is_some_and(|lora| lora.bias),
            magnitude: lora.is_some_and(|lora| lora.magnitude),
            bias: self.bias.is_some(),
            stored: self.weight.stored_format(),
            trained: self.weight.is_trained(),
            bias_trained: self.bias.as_ref().is_some_and(Weight::is_trained),
            dropout,
        })
    }
}
