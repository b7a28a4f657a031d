//! Work of a linear layer and its LoRA adapter, from shapes alone.

use super::Linear;
use crate::error::Result;
use crate::work::{Precision, Work};

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
    /// With a bias.
    pub bias: bool,
    /// Whether W (and the bias) is trained.
    pub trained: bool,
    /// With LoRA dropout.
    pub dropout: bool,
}

impl LinearShape {
    /// Work of `forward`.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let (n, i, o) = (self.tokens, self.in_features, self.out_features);
        let mut work = Work::product(n, o, i, precision);
        if let Some(r) = self.r {
            work += &Work::product(n, r, i, precision);
            work += &Work::product(n, o, r, precision);
            work += &Work::sweep(8 * n * r, n * r);
        }
        if self.bias {
            work += &Work::sweep(8 * n * o, n * o);
        }
        if self.dropout && self.r.is_some() {
            work += &Work::sweep(12 * n * i, n * i);
        }
        work
    }

    /// Work of `backward`; `input_gradient`: with dx.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let (n, i, o) = (self.tokens, self.in_features, self.out_features);
        let mut work = Work::default();
        if input_gradient {
            work += &Work::product(n, i, o, precision);
        }
        if self.trained {
            work += &Work::product(o, i, n, precision);
            if self.bias {
                work += &Work::sweep(4 * n * o, n * o);
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

impl Linear {
    /// The layer's shape for `tokens` rows.
    pub fn shape(&self, tokens: usize, dropout: bool) -> Result<LinearShape> {
        let (out_features, in_features) = self.weight.tensor.dims2()?;
        Ok(LinearShape {
            tokens,
            in_features,
            out_features,
            r: self.lora.as_ref().map(|_| self.rank()).transpose()?,
            bias: self.bias.is_some(),
            trained: self.weight.is_trained(),
            dropout,
        })
    }
}
