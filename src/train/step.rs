//! One optimizer step: gradients accumulated over its micro-batches, clipped, one AdamW update.

use candle_core::Device;

use super::{Settings, StepEnergy, StepRecord, Training, diverged};
use crate::data::MicroBatch;
use crate::energy::Phase;
use crate::error::{Error, Result};
use crate::model::{BackwardOptions, Batch, Decoder, Dropout};
use crate::ops::{Context, Gradients};
use crate::work::Work;

/// A micro-batch's tensors on `device`.
pub fn batch_to_device(batch: &MicroBatch, device: &Device) -> Result<Batch> {
    let segments = &batch.segments;
    let lengths: Vec<usize> = segments.iter().map(|segment| segment.range.len()).collect();
    let tensors = Batch::new(
        &batch.tokens,
        &lengths,
        segments.iter().map(|segment| segment.example).collect(),
        &batch.loss_positions,
        batch.targets.clone(),
        device,
    )?;
    Ok(tensors.with_values(batch.values.clone()))
}

impl Training<'_, '_> {
    /// Mean loss (nats per loss token) over the step's micro-batches, and its gradients.
    pub(super) fn forward_backward(&self, batches: &[MicroBatch]) -> Result<(f64, Gradients)> {
        let trainer = &self.trainer;
        let mut gradients = Gradients::new(trainer.parameters.slots().len());
        let loss = accumulate_gradients(
            self.context,
            trainer.decoder,
            trainer.settings,
            self.state.step,
            batches,
            &mut gradients,
        )?;
        Ok((loss, gradients))
    }

    /// Clips and applies the gradients at rate `lr`; returns their global norm before clipping. A
    /// norm that is not finite updates nothing and is an error.
    pub(super) fn optimizer_step(
        &self,
        lr: f64,
        gradients: &Gradients,
        batches: &[MicroBatch],
    ) -> Result<f64> {
        let step = self.state.step;
        let parameters = self.trainer.parameters;
        let flat = gradients.flat(parameters).map_err(Error::while_running)?;
        let optimizer = &self.trainer.settings.optimizer;
        let grad_norm = optimizer.step(self.context, parameters, &flat, lr, step + 1)?;
        if grad_norm.is_finite() {
            return Ok(grad_norm);
        }
        let name = self.first_not_finite(gradients)?;
        let records = describe_batch(batches.last().unwrap_or(&MicroBatch::default()));
        Err(diverged(format!(
            "the gradient of `{name}` is not finite in step {} ({records})",
            step + 1
        )))
    }

    /// The first trained tensor whose gradient holds an element that is not finite.
    fn first_not_finite(&self, gradients: &Gradients) -> Result<String> {
        for (index, slot) in self.trainer.parameters.slots().iter().enumerate() {
            let sum = gradients
                .get(index)
                .map(|g| g.sqr()?.sum_all()?.to_scalar::<f32>())
                .transpose()?;
            if sum.is_none_or(|sum| !sum.is_finite()) {
                return Ok(slot.name.clone());
            }
        }
        Err(diverged(
            "the gradient norm is not finite though every gradient is",
        ))
    }

    /// Charges a completed step and advances the state.
    pub(super) fn charge_step(
        &mut self,
        batches: &[MicroBatch],
        loss: f64,
        lr: f64,
        grad_norm: f64,
    ) -> Result<StepRecord> {
        let reading = self.charge(Phase::Train, self.state.step + 1)?;
        let tokens = batches.iter().map(|batch| batch.tokens.len() as u64).sum();
        let loss_tokens = loss_tokens(batches) as u64;
        let state = &mut self.state;
        state.step += 1;
        state.train_loss_last = Some(loss);
        state.tokens += tokens;
        state.loss_tokens += loss_tokens;
        state.train_wall_s += reading.wall.0;
        Ok(StepRecord {
            step: state.step,
            loss: Some(loss),
            lr,
            grad_norm: Some(grad_norm),
            tokens,
            loss_tokens,
            flops: reading.charge.flops,
            energy_j: StepEnergy::from(&reading),
            wall_s: reading.wall,
            val_loss: None,
        })
    }

    /// Charges the work of a step whose loss or gradient is not finite; nothing after a failed
    /// evaluation, which is already charged.
    pub(super) fn charge_failed_step(&mut self) -> Result<()> {
        let work = self.context.counter.take();
        if work != Work::default() {
            let step = self.state.step + 1;
            self.trainer.account.charge(Phase::Train, step, &work)?;
        }
        Ok(())
    }
}

/// Adds the gradients of the mean loss over `batches` to `gradients` and returns that loss in nats
/// per loss token, weighted by class as torch's CrossEntropyLoss; `step` counts from 0 and keys the dropout masks.
///
/// # Errors
/// `Kind::Diverged`, naming step, micro-batch and records, where a loss is not finite.
pub fn accumulate_gradients(
    context: Context<'_>,
    decoder: &Decoder,
    settings: &Settings,
    step: u64,
    batches: &[MicroBatch],
    gradients: &mut Gradients,
) -> Result<f64> {
    let architecture = decoder.architecture();
    let weights = batches.iter();
    let weight: f64 = weights
        .map(|batch| architecture.loss_weight(&batch.targets))
        .sum();
    let dropout = Dropout {
        p: settings.dropout,
        seed: settings.seed,
        step,
    };
    let options = BackwardOptions {
        scale: 1.0 / weight,
        recompute: settings.recompute,
        dropout: (settings.dropout > 0.0).then_some(dropout),
    };
    let mut sum = 0.0;
    for (index, batch) in batches.iter().enumerate() {
        let input = batch_to_device(batch, decoder.device())?;
        let losses = decoder.losses_and_gradients(context, &input, options, gradients)?;
        let loss: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
        if !loss.is_finite() {
            return Err(diverged(format!(
                "the loss is not finite in step {}, micro-batch {} ({})",
                step + 1,
                index + 1,
                describe_batch(batch)
            )));
        }
        sum += loss;
    }
    Ok(sum / weight)
}

fn loss_tokens(batches: &[MicroBatch]) -> usize {
    batches.iter().map(|batch| batch.targets.len()).sum()
}

/// The records of a micro-batch, for error messages.
fn describe_batch(batch: &MicroBatch) -> String {
    const SHOWN: usize = 8;
    let examples = batch.segments.iter().take(SHOWN);
    let examples: Vec<String> = examples
        .map(|segment| segment.example.to_string())
        .collect();
    let more = if batch.segments.len() > SHOWN {
        ", ..."
    } else {
        ""
    };
    format!("records {}{more}", examples.join(", "))
}
