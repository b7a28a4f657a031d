//! `y = x W^T + bias + scaling * dropout(x) A^T B^T`: a linear layer with an optional LoRA pair.
//!
//! x is (N, in), W (out, in), A (r, in), B (out, r), y (N, out). A frozen W costs two products a token (forward and input gradient);
//! its own gradient is computed only where W is trained. Source of the pair: Hu et al. 2021, "LoRA", section 4.1.

use candle_core::{D, Tensor};

use super::{Context, Gradients, Weight, matmul, residual};
use crate::error::Result;
use crate::work::{Precision, Work};

/// The low-rank pair beside a linear layer.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, (r, in).
    pub a: Weight,
    /// B, (out, r).
    pub b: Weight,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scaling: f64,
}

/// A linear layer: W, its bias and its adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    /// W, (out, in).
    pub weight: Weight,
    /// (out).
    pub bias: Option<Weight>,
    /// The adapter, where this layer is a target.
    pub lora: Option<Lora>,
}

/// What `backward` needs of a forward pass.
#[derive(Debug, Clone)]
pub struct LinearSaved {
    x: Option<Tensor>,
    low: Option<Low>,
}

/// The adapter's inside: its input after dropout (where there is any) and that input times A.
#[derive(Debug, Clone)]
struct Low {
    mask: Option<Tensor>,
    xa: Tensor,
}

/// All that a linear layer's cost depends on.
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
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether W (and the bias) is trained.
    pub trained: bool,
    /// Whether the adapter's input is masked.
    pub dropout: bool,
}

impl LinearShape {
    /// Work of `forward`.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let &Self { tokens: n, in_features: i, out_features: o, .. } = self;
        let mut work = Work::product(n, o, i, precision);
        if let Some(r) = self.r {
            work += &Work::product(n, r, i, precision);
            work += &Work::product(n, o, r, precision);
            work += &Work::sweep(12 * n * o, 2 * n * o);
        }
        if self.bias {
            work += &Work::sweep(8 * n * o, n * o);
        }
        if self.dropout && self.r.is_some() {
            work += &Work::sweep(12 * n * i, n * i);
        }
        work
    }

    /// Work of `backward`; `input_gradient`: whether dx is wanted.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let &Self { tokens: n, in_features: i, out_features: o, .. } = self;
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
                work += &Work::sweep(12 * n * i, n * i);
                if self.dropout {
                    work += &Work::sweep(12 * n * i, n * i);
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
        let r = self.lora.as_ref().map(|lora| lora.a.tensor.dims2()).transpose()?.map(|(r, _)| r);
        let (bias, trained) = (self.bias.is_some(), self.weight.is_trained());
        Ok(LinearShape { tokens, in_features, out_features, r, bias, trained, dropout })
    }

    /// x (N, in) -> y (N, out). `mask` (N, in) multiplies the adapter's input: zero or `1 / (1 - p)`.
    pub fn forward(&self, context: Context<'_>, x: &Tensor, mask: Option<Tensor>) -> Result<(Tensor, LinearSaved)> {
        let shape = self.shape(x.dims2()?.0, mask.is_some())?;
        context.tally.add(shape.forward_cost(context.precision));
        let mut y = matmul(context, x, &self.weight.tensor.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.tensor.to_dtype(y.dtype())?)?;
        }
        let mut low = None;
        if let Some(lora) = &self.lora {
            let input = masked(x, mask.as_ref())?;
            let xa = matmul(context, &input, &lora.a.tensor.t()?)?;
            let scaled = (&xa * lora.scaling)?; // (N, r): the smallest place to scale
            y = residual::add(context, &y, &matmul(context, &scaled, &lora.b.tensor.t()?)?)?;
            low = Some(Low { mask, xa });
        }
        let keeps_input = self.weight.is_trained() || low.is_some();
        Ok((y, LinearSaved { x: keeps_input.then(|| x.clone()), low }))
    }

    /// dy (N, out) -> dx (N, in) where `input_gradient`; the gradients of what is trained go to `gradients`.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: &LinearSaved,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dropout = saved.low.as_ref().is_some_and(|low| low.mask.is_some());
        let shape = self.shape(dy.dims2()?.0, dropout)?;
        context.tally.add(shape.backward_cost(context.precision, input_gradient));
        let mut dx = input_gradient.then(|| matmul(context, dy, &self.weight.tensor)).transpose()?;
        if let (true, Some(x)) = (self.weight.is_trained(), &saved.x) {
            gradients.add(&self.weight, matmul(context, &dy.t()?, x)?)?;
            if let Some(bias) = self.bias.as_ref().filter(|bias| bias.is_trained()) {
                gradients.add(bias, dy.sum(0)?)?;
            }
        }
        if let (Some(lora), Some(low), Some(x)) = (&self.lora, &saved.low, &saved.x) {
            let d_low = (matmul(context, dy, &lora.b.tensor)? * lora.scaling)?; // (N, r)
            gradients.add(&lora.b, (matmul(context, &dy.t()?, &low.xa)? * lora.scaling)?)?;
            gradients.add(&lora.a, matmul(context, &d_low.t()?, &masked(x, low.mask.as_ref())?)?)?;
            if let Some(sum) = dx {
                let through = masked(&matmul(context, &d_low, &lora.a.tensor)?, low.mask.as_ref())?;
                dx = Some(residual::add(context, &sum, &through)?);
            }
        }
        Ok(dx)
    }
}

fn masked(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => (x * mask)?,
        None => x.clone(),
    })
}

/// A dropout mask of x's shape from uniform numbers `u` in [0, 1): zero where u < p, else `1 / (1 - p)`.
pub fn dropout_mask(mut u: Vec<f32>, p: f64, like: &Tensor) -> Result<Tensor> {
    let keep = (1.0 / (1.0 - p)) as f32;
    u.iter_mut().for_each(|u| *u = if f64::from(*u) < p { 0.0 } else { keep });
    debug_assert_eq!(u.len() % like.dim(D::Minus1)?, 0);
    Ok(Tensor::from_vec(u, like.shape(), like.device())?)
}
