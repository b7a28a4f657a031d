//! DoRA (Liu et al. 2024): `y = g (W x + scaling * B A x) + bias`, with `g = m / n`, a trained
//! magnitude m (out), and n the norms of the rows of W + scaling * B A, which get no gradient
//! (section 4.3).
//!
//! With dropout also W acts on the dropped input, as far as g differs from 1 (PEFT's
//! `tuners/lora/dora.py`): `y = W (x - x') + g (W x' + scaling * B A x') + bias`, x' = dropout(x).

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Tensor};

use super::{Branch, InputGradient, Linear, LinearInput, LinearSaved, Lora, masked};
use crate::error::Result;
use crate::ops::dropout::DropoutMask;
use crate::ops::{Context, Gradients, Weight, matmul};
use crate::work::WorkCounter;

/// The magnitude of a DoRA adapter.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// m, (out).
    pub weight: Weight,
    /// The squared norms of the rows of the frozen W, (out), once they are computed.
    squared_norms: Arc<OnceLock<Tensor>>,
}

impl Magnitude {
    /// The magnitude `weight` (out).
    pub fn new(weight: Weight) -> Self {
        Self {
            weight,
            squared_norms: Arc::default(),
        }
    }

    /// The squared norms of the rows of W (out, in).
    fn squared_norms(&self, w: &Weight) -> Result<Tensor> {
        if let Some(known) = self.squared_norms.get() {
            return Ok(known.clone());
        }
        let norms = w.dequantized()?.to_dtype(DType::F32)?.sqr()?.sum(1)?;
        Ok(self.squared_norms.get_or_init(|| norms).clone())
    }
}

/// Saved by the forward pass.
#[derive(Debug, Clone)]
pub(super) struct DoraSaved {
    /// W x' + scaling * B A x', (N, out).
    v: Tensor,
    /// n, (out).
    norms: Tensor,
    mask: Option<DropoutMask>,
    inner: Box<LinearSaved>,
}

impl DoraSaved {
    pub(super) fn has_mask(&self) -> bool {
        self.mask.is_some()
    }
}

impl Linear {
    /// W with the adapter's A and B alone.
    fn without_magnitude(&self) -> Self {
        let lora = self.lora.clone().map(|lora| Lora {
            magnitude: None,
            bias: None,
            ..lora
        });
        Self {
            weight: self.weight.clone(),
            bias: None,
            lora,
        }
    }

    fn plain(&self) -> Self {
        Self {
            weight: self.weight.clone(),
            bias: None,
            lora: None,
        }
    }

    /// n: the norms of the rows of W + scaling * B A, (out):
    /// n^2 = |W|^2 + 2 scaling (W A^T) B + scaling^2 B (A A^T) B.
    fn row_norms(&self, context: Context<'_>, lora: &Lora, m: &Magnitude) -> Result<Tensor> {
        let context = context.in_f32();
        let (a, b) = (&lora.a.tensor, &lora.b.tensor);
        let wa = matmul(context, &self.weight.dequantized()?, &a.t()?)?;
        let aa = matmul(context, a, &a.t()?)?;
        let baa = matmul(context, b, &aa)?;
        let cross = ((wa * (2.0 * lora.scaling))? + (baa * lora.scaling.powi(2))?)?;
        let sum = (m.squared_norms(&self.weight)? + (cross * b)?.sum(1)?)?;
        // Rounding may leave a vanishing row below zero.
        Ok(sum.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()?)
    }

    /// As `forward_input`, for an adapter with a magnitude. Counts no work.
    pub(super) fn forward_dora(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
        lora: &Lora,
        m: &Magnitude,
    ) -> Result<(Tensor, LinearSaved)> {
        let uncounted = WorkCounter::default();
        let context = Context {
            counter: &uncounted,
            ..context
        };
        let inner = self.without_magnitude();
        let (v, rest, saved) = match &mask {
            None => {
                let (v, saved) = inner.forward_input(context, input, None, None)?;
                (v, None, saved)
            }
            Some(mask) => {
                let x = input.tensor()?.to_dtype(DType::F32)?;
                let dropped = masked(context, &x, Some(mask))?;
                let (v, saved) = inner.forward(context, &dropped, None, None)?;
                let rest = (x - dropped)?;
                let (rest, _) = self.plain().forward(context, &rest, None, None)?;
                (v, Some(rest), saved)
            }
        };
        let norms = self.row_norms(context, lora, m)?;
        let g = (&m.weight.tensor / &norms)?;
        let mut y = v.broadcast_mul(&g)?;
        if let Some(rest) = rest {
            y = (y + rest)?;
        }
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.tensor.to_dtype(DType::F32)?)?;
        }
        if let Some(base) = base {
            y = (y + base)?;
        }
        let dora = DoraSaved {
            v,
            norms,
            mask,
            inner: Box::new(saved),
        };
        let saved = LinearSaved {
            lora: None,
            dora: Some(dora),
        };
        Ok((y, saved))
    }
}

impl Branch<'_> {
    /// The backward pass of an adapter with a magnitude: dx (N, in) where wanted; adds the gradients
    /// of trained weights. Counts no work.
    pub(super) fn backward_dora(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        input_gradient: bool,
        saved: &DoraSaved,
        magnitude: &Magnitude,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let uncounted = WorkCounter::default();
        let context = Context {
            counter: &uncounted,
            ..context
        };
        let dy = self.dy.tensor()?.to_dtype(DType::F32)?;
        let dm = ((&dy * &saved.v)?.sum(0)? / &saved.norms)?;
        gradients.add(&magnitude.weight, dm)?;
        self.bias_gradient(gradients)?;
        let g = (&magnitude.weight.tensor / &saved.norms)?;
        let dv = dy.broadcast_mul(&g)?;
        let inner = self.linear.without_magnitude();
        let mask = saved.mask.as_ref();
        let x = x.map(LinearInput::tensor).transpose()?;
        let x = x.map(|x| masked(context, x, mask)).transpose()?;
        let wanted = InputGradient::when(input_gradient);
        let dx = inner.backward(context, &dv, x.as_ref(), &saved.inner, wanted, gradients)?;
        let (Some(dx), Some(mask)) = (&dx, mask) else {
            return Ok(dx);
        };
        let dw = self.linear.plain().backward(
            context,
            &dy,
            None,
            &LinearSaved::default(),
            InputGradient::Compute,
            gradients,
        )?;
        let Some(dw) = dw else { return Ok(None) };
        Ok(Some((&dw + masked(context, &(dx - &dw)?, Some(mask))?)?))
    }
}
