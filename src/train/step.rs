//! One optimizer step: gradients of all its micro-batches, clipped, one AdamW pass.

use candle_core::Device;

use super::{Settings, StepEnergy, StepRecord, TrainState, Trainer};
use crate::data::MicroBatch;
use crate::energy::Phase;
use crate::error::{Error, Kind, Result};
use crate::model::{Batch, Decoder};
use crate::ops::{AdamW, Context, Gradients, Parameters};

/// A micro-batch's tensors on `device`.
pub fn batch_to_device(batch: &MicroBatch, device: &Device) -> Result<Batch> {
    let lengths: Vec<usize> = batch
        .segments
        .iter()
        .map(|segment| segment.range.len())
        .collect();
    let examples = batch
        .segments
        .iter()
        .map(|segment| segment.example)
        .collect();
    Batch::new(
        &batch.tokens,
        &lengths,
        examples,
        &batch.loss_positions,
        batch.targets.clone(),
        device,
    )
}

/// Runs the step after `state.step` done ones at rate `lr`, charges it and moves `state` on. The inner error is a number that is
/// not finite: the step's place and the records in it; nothing was updated then.
pub(super) fn optimizer_step(
    trainer: &mut Trainer<'_>,
    context: Context<'_>,
    state: &mut TrainState,
    lr: f64,
) -> Result<Result<StepRecord, String>> {
    trainer.account.begin();
    let (settings, step) = (trainer.settings, state.step);
    let batches = trainer.sampler.step(step);
    let loss_tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let mut gradients = Gradients::new(trainer.parameters.slots().len());
    let sum = match accumulate_gradients(
        context,
        trainer.decoder,
        settings,
        step,
        &batches,
        &mut gradients,
    )? {
        Ok(sum) => sum,
        Err(index) => {
            trainer
                .account
                .charge(Phase::Train, step + 1, &context.counter.take())?;
            return Ok(Err(describe_batch(
                "the loss",
                step,
                Some(index),
                &batches[index],
            )));
        }
    };
    let grad_norm = optimizer_update(context, trainer.parameters, settings, &gradients, lr, step)?;
    let reading = trainer
        .account
        .charge(Phase::Train, step + 1, &context.counter.take())?;
    if !grad_norm.is_finite() {
        let culprit = first_not_finite(trainer, &gradients)?;
        return Ok(Err(describe_batch(
            &format!("the gradient of `{culprit}`"),
            step,
            None,
            batches.last().unwrap_or(&MicroBatch::default()),
        )));
    }
    let loss = sum / loss_tokens as f64;
    state.step += 1;
    state.train_loss_last = Some(loss);
    state.tokens += tokens as u64;
    state.loss_tokens += loss_tokens as u64;
    state.train_wall_s += reading.wall.0;
    Ok(Ok(StepRecord {
        step: step + 1,
        loss: Some(loss),
        lr,
        grad_norm: Some(grad_norm),
        tokens: tokens as u64,
        loss_tokens: loss_tokens as u64,
        flops: reading.charge.flops,
        energy_j: StepEnergy::from(&reading),
        wall_s: reading.wall,
        val_loss: None,
    }))
}

/// Adds the gradients of the mean loss over `batches`, the step after `step` done ones, to `gradients`; returns the sum of the losses of
/// their loss tokens. The inner error is the index of the micro-batch whose loss is not finite.
pub fn accumulate_gradients(
    context: Context<'_>,
    decoder: &Decoder,
    settings: &Settings,
    step: u64,
    batches: &[MicroBatch],
    gradients: &mut Gradients,
) -> Result<Result<f64, usize>> {
    let loss_tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    let scale = 1.0 / loss_tokens as f64;
    let dropout = (settings.dropout > 0.0).then_some((settings.dropout, settings.seed, step));
    let mut sum = 0.0;
    for (index, batch) in batches.iter().enumerate() {
        let input = batch_to_device(batch, decoder.device())?;
        let losses = decoder.losses_and_gradients(
            context,
            &input,
            scale,
            settings.recompute,
            dropout,
            gradients,
        )?;
        let loss: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
        if !loss.is_finite() {
            return Ok(Err(index));
        }
        sum += loss;
    }
    Ok(Ok(sum))
}

/// One AdamW pass at rate `lr`, the step after `step` done ones; returns the gradients' norm before clipping. Nothing is updated where
/// it is not finite.
pub fn optimizer_update(
    context: Context<'_>,
    parameters: &Parameters,
    settings: &Settings,
    gradients: &Gradients,
    lr: f64,
    step: u64,
) -> Result<f64> {
    let flat = gradients.flat(parameters).map_err(Error::while_running)?;
    let ((beta1, beta2, epsilon), weight_decay) = (settings.adam, settings.weight_decay);
    let adamw = AdamW {
        learning_rate: lr,
        beta1,
        beta2,
        epsilon,
        weight_decay,
        max_grad_norm: settings.max_grad_norm,
    };
    adamw.step(context, parameters, &flat, step + 1)
}

/// The first trained tensor whose gradient holds a number that is not finite.
fn first_not_finite(trainer: &Trainer<'_>, gradients: &Gradients) -> Result<String> {
    for (index, slot) in trainer.parameters.slots().iter().enumerate() {
        let sum = gradients
            .get(index)
            .map(|g| g.sqr()?.sum_all()?.to_scalar::<f32>())
            .transpose()?;
        if sum.is_none_or(|sum| !sum.is_finite()) {
            return Ok(slot.name.clone());
        }
    }
    Err(Error::new(
        Kind::Diverged,
        "the gradient norm is not finite though every gradient is",
    )
    .while_running())
}

fn describe_batch(what: &str, step: u64, micro_step: Option<usize>, batch: &MicroBatch) -> String {
    const SHOWN: usize = 8;
    let examples: Vec<String> = batch
        .segments
        .iter()
        .take(SHOWN)
        .map(|segment| segment.example.to_string())
        .collect();
    let micro = micro_step.map_or(String::new(), |index| {
        format!(", micro-batch {}", index + 1)
    });
    let more = if batch.segments.len() > SHOWN {
        ", ..."
    } else {
        ""
    };
    format!(
        "{what} is not finite in step {}{micro} (records {}{more})",
        step + 1,
        examples.join(", ")
    )
}
