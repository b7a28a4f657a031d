//! Losses of the outputs of a head that predicts no token: one class, several labels, or values.
//!
//! Each row of logits (K) has one loss, as in transformers (`loss_utils.ForSequenceClassificationLoss`):
//! the cross-entropy of its class; the mean binary cross-entropy of its outputs, `max(z, 0) - z y +
//! ln(1 + e^-|z|)`; or the mean squared error of its outputs, `(z - y)^2`.

use candle_core::Tensor;

use super::Context;
use super::cross_entropy::{Losses, cross_entropy, cross_entropy_cost};
use super::storage::{check_dims, f32_tensor};
use crate::error::Result;
use crate::work::Work;

/// The loss of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputLoss {
    /// Of one class.
    CrossEntropy,
    /// Mean over the outputs, each a logit of 0 or 1.
    BinaryCrossEntropy,
    /// Mean over the outputs.
    SquaredError,
}

/// The targets of logits (L, K).
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputTargets<'a> {
    /// Of cross-entropy (L).
    pub classes: &'a [u32],
    /// Factor of a row's cross-entropy by its class (K), as torch's `CrossEntropyLoss(weight=)`
    /// before its mean; empty: 1.
    pub class_weights: &'a [f32],
    /// Of the other losses (L, K).
    pub values: &'a [f32],
}

impl OutputLoss {
    /// Work of the losses of `rows` rows of logits (K), and with `backward` of their gradients.
    pub fn cost(self, rows: usize, k: usize, weighted: bool, backward: bool) -> Work {
        let elements = rows * k;
        // Operations of an element's loss and gradient; bytes are the logits and targets, and gradients.
        let (loss, gradient) = match self {
            Self::CrossEntropy => {
                let factors = if weighted && backward { elements } else { 0 };
                return cross_entropy_cost(rows, k, backward) + Work::sweep(8 * factors, factors);
            }
            Self::BinaryCrossEntropy => (7, 4),
            Self::SquaredError => (3, 2),
        };
        let gradient = if backward { gradient } else { 0 };
        Work::sweep(8 * elements, loss * elements)
            + Work::sweep(4 * gradient.min(1) * elements, gradient * elements)
    }

    /// logits (L, K) in f32 -> each row's loss, and with `scale` the logits' gradient (L, K) of `scale
    /// * sum of losses`.
    ///
    /// # Errors
    /// Targets of another size, and a class of K or more.
    pub fn losses(
        self,
        context: Context<'_>,
        logits: Tensor,
        targets: OutputTargets<'_>,
        scale: Option<f64>,
    ) -> Result<Losses> {
        let (rows, k) = logits.dims2()?;
        if self != Self::CrossEntropy {
            check_dims("targets", &[targets.values.len()], &[rows * k])?;
            context
                .counter
                .add(self.cost(rows, k, false, scale.is_some()));
            return self.of_values(&logits, targets.values, scale);
        }
        let weights = targets.class_weights;
        let (losses, gradient) = cross_entropy(context, logits, targets.classes, scale)?;
        if weights.is_empty() {
            return Ok((losses, gradient));
        }
        check_dims("class_weights", &[weights.len()], &[k])?;
        let factors = targets.classes.iter().map(|class| weights[*class as usize]);
        let factors: Vec<f32> = factors.collect();
        let losses = losses
            .iter()
            .zip(&factors)
            .map(|(loss, w)| loss * w)
            .collect();
        let Some(gradient) = gradient else {
            return Ok((losses, None));
        };
        context.counter.add(Work::sweep(8 * rows * k, rows * k));
        let factors = Tensor::from_vec(factors, (rows, 1), gradient.device())?;
        Ok((losses, Some(gradient.broadcast_mul(&factors)?)))
    }

    /// The losses whose targets are values; counts no work.
    fn of_values(self, logits: &Tensor, values: &[f32], scale: Option<f64>) -> Result<Losses> {
        let (rows, k) = logits.dims2()?;
        let z: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let loss_and_slope = |(z, y): (&f32, &f32)| {
            let (z, y) = (f64::from(*z), f64::from(*y));
            match self {
                Self::SquaredError => ((z - y).powi(2), 2.0 * (z - y)),
                _ => {
                    let loss = z.max(0.0) - z * y + (-z.abs()).exp().ln_1p();
                    (loss, 1.0 / (1.0 + (-z).exp()) - y)
                }
            }
        };
        let each: Vec<(f64, f64)> = z.iter().zip(values).map(loss_and_slope).collect();
        let mean = |row: &[(f64, f64)]| row.iter().map(|(loss, _)| loss).sum::<f64>() / k as f64;
        let losses = each.chunks(k.max(1)).map(|row| mean(row) as f32).collect();
        let Some(scale) = scale else {
            return Ok((losses, None));
        };
        let factor = scale / k as f64;
        let gradient = each.iter().map(|(_, slope)| (slope * factor) as f32);
        let gradient = f32_tensor(gradient.collect(), (rows, k))?;
        Ok((losses, Some(gradient.to_device(logits.device())?)))
    }
}
