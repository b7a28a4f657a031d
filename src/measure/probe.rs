//! Training throughput on this machine: a few steps timed on random weights and random token ids.
//!
//! The steps are the training loop's, with every row at its full length; the loss means nothing.

use std::num::NonZeroUsize;
use std::time::Instant;

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use rand_chacha::rand_core::Rng;

use super::machine::peak_rss;
use crate::adapter::AdapterTensor;
use crate::data::{Example, MicroBatch};
use crate::energy::Profile;
use crate::error::{Error, Kind, Result};
use crate::forecast::Target;
use crate::model::{Architecture, ProblemType, TrainableModel};
use crate::ops::{Context, Gradients, Slot, Weight};
use crate::random::{Purpose, stream};
use crate::recipe::{Length, Recipe};
use crate::report::plan::Probe;
use crate::train::{Settings, accumulate_gradients};
use crate::units::Seconds;
use crate::work::{Precision, Work, WorkCounter};

/// Times `steps` steps of `recipe` on random weights, and counts one on `profile`, after one that warms up caches, allocator and thread pool.
///
/// # Errors
/// A step whose loss or gradient is not finite.
pub fn probe(
    recipe: &Recipe,
    architecture: &Architecture,
    target: &Target,
    settings: &Settings,
    profile: &Profile,
    steps: NonZeroUsize,
    device: &Device,
) -> Result<Probe> {
    let model = random_model(architecture, target, settings, device)?;
    let batches = random_batches(recipe, architecture);
    let counter = WorkCounter::default();
    let context = Context::new(&counter, settings.precision);
    train_step(context, &model, settings, &batches, 0)?;
    let steps = steps.get();
    let mut walls = Vec::with_capacity(steps);
    let mut work = Work::default();
    for step in 1..=steps as u64 {
        counter.take();
        let start = Instant::now();
        train_step(context, &model, settings, &batches, step)?;
        walls.push(start.elapsed().as_secs_f64());
        work = counter.take();
    }
    let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let step_s = median(walls);
    let charge = profile.charge(&work);
    let step_j = charge.energy.joules();
    let all_steps = match recipe.train.length {
        Length::Steps(steps) => Some(steps),
        Length::Epochs(_) | Length::Budget => None,
    };
    Ok(Probe {
        steps,
        tokens_per_second: tokens as f64 / step_s,
        step_s: Seconds(step_s),
        peak_rss_bytes: peak_rss(),
        flops_per_second: charge.flops as f64 / step_s,
        step_j,
        device: profile.name.clone(),
        all_steps_j: all_steps.map(|steps| step_j * steps as f64),
    })
}

/// One training step at learning rate 0: AdamW takes as long, and random weights cannot diverge.
fn train_step(
    context: Context<'_>,
    model: &TrainableModel,
    settings: &Settings,
    batches: &[MicroBatch],
    step: u64,
) -> Result<()> {
    let TrainableModel {
        decoder,
        parameters,
    } = model;
    let mut gradients = Gradients::new(parameters.slots().len());
    accumulate_gradients(context, decoder, settings, step, batches, &mut gradients).map_err(
        |error| match error.kind() {
            Kind::Diverged => not_finite(step),
            _ => error,
        },
    )?;
    let gradients = gradients.flat(parameters).map_err(Error::while_running)?;
    let norm = settings
        .optimizer
        .step(context, parameters, &gradients, 0.0, step + 1)?;
    decoder.device().synchronize()?;
    if norm.is_finite() {
        Ok(())
    } else {
        Err(not_finite(step))
    }
}

fn not_finite(step: u64) -> Error {
    Error::new(
        Kind::Diverged,
        "a probe's loss or gradient is not finite: its time would mean nothing",
    )
    .at(format!("probe step {step}"))
    .hint("try `--set model.dtype=f32`")
}

/// The model with random weights, frozen ones in the dtype that a run keeps them in.
fn random_model(
    architecture: &Architecture,
    target: &Target,
    settings: &Settings,
    device: &Device,
) -> Result<TrainableModel> {
    let noise = Noise::new(settings.seed);
    match target {
        Target::Lora { adaptation, .. } => {
            let precision = architecture.frozen_precision(settings.precision);
            let weight = |name: &str, shape: &[usize]| {
                if let (Some(format), [rows, columns]) =
                    (architecture.stored_formats.get(name), shape)
                {
                    let values = noise.values(name, shape);
                    return Weight::quantize(*format, [*rows, *columns], &values);
                }
                let tensor = noise.tensor(name, shape, precision, device)?;
                Ok(Weight::frozen(tensor))
            };
            let values = |tensor: &AdapterTensor<'_>| Ok(noise.values(&tensor.name, &tensor.shape));
            TrainableModel::with_adapters(architecture, adaptation, &weight, values, device)
        }
        Target::All => {
            let values = |_, slot: &Slot| Ok(noise.values(&slot.name, &slot.shape));
            TrainableModel::fully_trained(architecture, values, device)
        }
    }
}

/// A step's micro-batches: rows of `max_length` random token ids, all but the first of a row with a loss; of a
/// classifier the first alone.
fn random_batches(recipe: &Recipe, architecture: &Architecture) -> Vec<MicroBatch> {
    let classifies = architecture.classifier().is_some();
    let problem_type = architecture.problem_type();
    let outputs = match problem_type {
        None | Some(ProblemType::SingleLabel) => 0,
        Some(ProblemType::MultiLabel | ProblemType::Regression) => architecture.labels().len(),
    };
    let vocab_size = architecture.vocab_size;
    let mut random = stream(recipe.seed, Purpose::Probe, &[], "tokens");
    let mut example = || {
        let mut token = || ((u64::from(random.next_u32()) * vocab_size as u64) >> 32) as u32;
        let tokens: Vec<u32> = (0..recipe.data.max_length).map(|_| token()).collect();
        let loss = (0..tokens.len())
            .map(|index| (index == 0) == classifies)
            .collect();
        let labels = if classifies { vec![0] } else { Vec::new() };
        let values = vec![0.0; outputs];
        Example {
            tokens,
            loss,
            labels,
            values,
        }
    };
    let mut batch = || {
        let rows: Vec<Example> = (0..recipe.train.micro_batch_size)
            .map(|_| example())
            .collect();
        MicroBatch::new((0..).zip(&rows))
    };
    (0..recipe.train.gradient_accumulation_steps)
        .map(|_| batch())
        .collect()
}

/// Random values for weights: one block, repeated, because a ChaCha draw for each of a billion weights takes longer than the
/// steps. The time of a GEMM does not depend on the values as long as they are finite and of ordinary size.
struct Noise(Vec<f32>);

impl Noise {
    /// The largest prime below 2^16: rows of a matrix begin at different offsets of the block.
    const BLOCK: usize = 65_521;
    /// Half the width of a uniform distribution with standard deviation 0.02.
    const HALF_WIDTH: f32 = 0.034_641;

    fn new(seed: u64) -> Self {
        let mut random = stream(seed, Purpose::Probe, &[], "weights");
        let mut draw =
            || (random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0) * Self::HALF_WIDTH;
        Self((0..Self::BLOCK).map(|_| draw()).collect())
    }

    /// f32 values of a tensor: norms 1, biases 0, matrices from the block.
    fn values(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        if let [n] = shape {
            let value = f32::from(u8::from(name.ends_with("norm.weight")));
            return vec![value; *n];
        }
        repeat(&self.0, shape.iter().product())
    }

    /// A frozen tensor: matrices in `precision`, norms and biases in f32.
    fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        precision: Precision,
        device: &Device,
    ) -> Result<Tensor> {
        let count = shape.iter().product();
        Ok(match precision {
            _ if shape.len() == 1 => Tensor::from_vec(self.values(name, shape), shape, device)?,
            Precision::F32 => Tensor::from_vec(repeat(&self.0, count), shape, device)?,
            Precision::Bf16 => self.cast(bf16::from_f32, shape, device)?,
            Precision::F16 => self.cast(f16::from_f32, shape, device)?,
        })
    }

    fn cast<T: WithDType>(
        &self,
        convert: fn(f32) -> T,
        shape: &[usize],
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let block: Vec<T> = self.0.iter().map(|value| convert(*value)).collect();
        Tensor::from_vec(repeat(&block, shape.iter().product()), shape, device)
    }
}

/// `block` repeated to `count` elements.
fn repeat<T: Copy>(block: &[T], count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        values.extend_from_slice(&block[..block.len().min(count - values.len())]);
    }
    values
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 100.0]), 3.0);
    }

    #[test]
    fn noise_fills_any_shape_in_the_compute_type_and_has_no_equal_rows() {
        let noise = Noise::new(7);
        let (rows, columns) = (3, 40_000);
        let values = noise.values("x", &[rows, columns]);
        assert_eq!(values.len(), rows * columns);
        assert!(
            values
                .chunks(columns)
                .collect::<Vec<_>>()
                .windows(2)
                .all(|pair| pair[0] != pair[1])
        );
        // A uniform distribution on (-w, w) has variance w^2 / 3: 0.034641^2 / 3 = 0.0004 = 0.02^2.
        let variance =
            values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!((variance.sqrt() - 0.02).abs() < 2e-4, "{variance}");
        assert_eq!(noise.values("model.norm.weight", &[2]), [1.0, 1.0]);
        assert_eq!(noise.values("q_proj.bias", &[2]), [0.0, 0.0]);
        let tensor = noise
            .tensor("x", &[4, 4], Precision::Bf16, &Device::Cpu)
            .unwrap();
        assert_eq!(
            (tensor.dtype(), tensor.dims()),
            (candle_core::DType::BF16, [4, 4].as_slice())
        );
        let norm = noise
            .tensor("norm.weight", &[4], Precision::Bf16, &Device::Cpu)
            .unwrap();
        assert_eq!(norm.dtype(), candle_core::DType::F32);
    }
}
