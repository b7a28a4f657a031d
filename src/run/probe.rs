//! How fast a recipe's steps run here: a few of them timed on random weights and random token ids.
//!
//! Takes a recipe whose model directory may hold config.json alone; returns the plan with a `probe` block, or, where tokenizer or data
//! are missing, the blocks that need neither. The steps are the training loop's own. Nothing is learned, written or fetched but the
//! model's small files; the loss means nothing.

use std::num::NonZeroUsize;
use std::time::Instant;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rand_chacha::rand_core::Rng;
use serde::Serialize;
use serde_json::{Value, json};

use super::machine::check_precision;
use super::model::find_model;
use super::options::settings;
use super::prepare::{
    Target, architecture_of, check_length, recompute, refuse_adapter_on_random_weights, shape_of,
    target,
};
use super::reporting::{adapter_block, model_block};
use super::spending::memory_block;
use super::trainee::{Trainee, adapter_on, decoder_of};
use super::{Screen, plan, prepare};
use crate::data::{Example, MicroBatch};
use crate::energy::meter::Computing;
use crate::error::{Error, Kind, Result};
use crate::hub::{ModelFiles, Progress};
use crate::measure::machine::{free_memory, peak_rss};
use crate::model::{Architecture, Decoder, MemoryForecast, WeightSource};
use crate::ops::{Context, Gradients, Parameters, Slot, Weight};
use crate::random::{Purpose, stream};
use crate::recipe::{DataSource, Recipe, Validation};
use crate::train::{self, accumulate_gradients, optimizer_update};
use crate::units::{Bytes, Seconds};
use crate::work::{Precision, WorkCounter};

/// What a probe measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// Steps timed; one more ran before them untimed.
    pub steps: usize,
    /// Tokens of a step, every row at its full length, over `step_s`.
    pub tokens_per_second: f64,
    /// Wall time of a step: the median.
    pub step_s: Seconds,
    /// The largest resident memory of this process so far; `None` where the system does not say.
    pub peak_rss_bytes: Option<Bytes>,
    /// Executed FLOPs of a step's matrix products and attention, over `step_s`.
    pub flops_per_second: f64,
}

/// The plan of `recipe` as JSON, with a `probe` block from `steps` timed steps. Where the tokenizer or a local data file is missing the
/// document holds `model`, `adapter`, `memory`, `probe` and `warnings` alone; a warning says what is missing.
///
/// # Errors
/// What preflight refuses, and a step whose numbers are not finite.
pub fn plan_with_probe(
    recipe: Recipe,
    steps: NonZeroUsize,
    device: &Device,
    computing: Computing,
    screen: &mut dyn Screen,
) -> Result<Value> {
    let trial = Trial::new(&recipe, device, screen.downloads())?;
    let missing = missing(&recipe, &trial.files);
    let warnings = [trial.warnings.as_slice(), missing.as_slice()].concat();
    let (rows, length) = (recipe.train.micro_batch_size, recipe.data.max_length);
    let mut document = match missing.is_empty() {
        true => {
            plan(
                &prepare(recipe, device, computing, screen.downloads())?,
                computing,
            )?
            .json
        }
        false => json!({
            "model": model_block(&recipe.model.id, &trial.files, &trial.architecture),
            "adapter": adapter_block(&trial.target, &trial.architecture),
            "memory": memory_block(&trial.memory, free_memory()),
            "warnings": warnings,
        }),
    };
    screen.note(&format!(
        "probing: {steps} steps of {} x {rows} x {length} tokens on random weights",
        trial.batches.len()
    ));
    document["probe"] = json!(trial.run(steps, device).map_err(Error::while_running)?);
    Ok(document)
}

/// What a whole plan would need and is not there.
fn missing(recipe: &Recipe, files: &ModelFiles) -> Vec<String> {
    let mut missing = Vec::new();
    if files.tokenizer_json.is_none() && (files.vocab_json.is_none() || files.merges.is_none()) {
        missing.push(format!(
            "`{}` holds no tokenizer: data, energy and time are not forecast",
            files.id
        ));
    }
    let validation = match &recipe.data.validation {
        Validation::Source(source) => Some(source),
        Validation::None | Validation::Fraction(_) => None,
    };
    for source in [&recipe.data.train].into_iter().chain(validation) {
        if let DataSource::File(path) = source
            && !path.exists()
        {
            missing.push(format!(
                "there is no file `{}`: data, energy and time are not forecast",
                path.display()
            ));
        }
    }
    missing
}

/// Everything a step needs but its weights.
struct Trial {
    files: ModelFiles,
    architecture: Architecture,
    target: Target,
    settings: train::Settings,
    memory: MemoryForecast,
    batches: Vec<MicroBatch>,
    warnings: Vec<String>,
}

impl Trial {
    /// The part of preflight that reads neither tokenizer nor data: a micro-batch is taken to have every row at its full length.
    fn new(recipe: &Recipe, device: &Device, progress: &dyn Progress) -> Result<Self> {
        check_precision(device, recipe.model.dtype)?;
        refuse_adapter_on_random_weights(recipe)?;
        let files = find_model(&recipe.model.id, &recipe.model.revision, progress)?;
        let architecture = architecture_of(&files, device)?;
        let target = target(recipe, &architecture)?;
        check_length(recipe, &architecture)?;
        let mut warnings = Vec::new();
        let tokens = recipe.train.micro_batch_size * recipe.data.max_length;
        let shape = shape_of(recipe, &architecture, &target)?;
        let (recompute, memory) = recompute(
            recipe,
            &shape,
            target.parameters(&architecture),
            tokens,
            &mut warnings,
        )?;
        // Neither steps nor epochs matter: the probe has a count of its own.
        let settings = settings(recipe, 1, recompute, String::new());
        let batches = random_batches(recipe, architecture.vocab_size);
        Ok(Self {
            files,
            architecture,
            target,
            settings,
            memory,
            batches,
            warnings,
        })
    }

    /// Times `steps` steps after one that warms up caches, allocator and thread pool.
    fn run(&self, steps: NonZeroUsize, device: &Device) -> Result<Probe> {
        let Trainee {
            decoder,
            parameters,
        } = self.trainee(device)?;
        let counter = WorkCounter::default();
        let context = Context::new(&counter, self.settings.precision);
        self.step(context, &decoder, &parameters, 0)?;
        let steps = steps.get();
        let mut walls = Vec::with_capacity(steps);
        let mut flops = 0;
        for step in 1..=steps as u64 {
            counter.take();
            let start = Instant::now();
            self.step(context, &decoder, &parameters, step)?;
            walls.push(start.elapsed().as_secs_f64());
            flops = counter.take().flops();
        }
        let tokens: usize = self.batches.iter().map(|batch| batch.tokens.len()).sum();
        let step_s = median(walls);
        let (tokens_per_second, flops_per_second) = (tokens as f64 / step_s, flops as f64 / step_s);
        Ok(Probe {
            steps,
            tokens_per_second,
            step_s: Seconds(step_s),
            peak_rss_bytes: peak_rss(),
            flops_per_second,
        })
    }

    /// One step of the training loop. Its rate is zero: AdamW takes as long, and random weights cannot diverge.
    fn step(
        &self,
        context: Context<'_>,
        decoder: &Decoder,
        parameters: &Parameters,
        step: u64,
    ) -> Result<()> {
        let mut gradients = Gradients::new(parameters.slots().len());
        let losses = accumulate_gradients(
            context,
            decoder,
            &self.settings,
            step,
            &self.batches,
            &mut gradients,
        )?;
        let norm = optimizer_update(context, parameters, &self.settings, &gradients, 0.0, step)?;
        decoder.device().synchronize()?;
        match losses {
            Ok(_) if norm.is_finite() => Ok(()),
            _ => Err(Error::new(
                Kind::Diverged,
                "a probe's loss or gradient is not finite: its time would mean nothing",
            )
            .at(format!("probe step {step}"))
            .hint("try `--set model.dtype=f32`")),
        }
    }

    /// The model with random weights: frozen ones as a run keeps them, each made once, in place.
    fn trainee(&self, device: &Device) -> Result<Trainee> {
        let (noise, architecture) = (Noise::new(self.settings.seed), &self.architecture);
        match &self.target {
            Target::Lora { sites, .. } => {
                let pairs = sites.iter().flat_map(|site| {
                    let a = (
                        format!("{}.lora_A", site.path),
                        vec![site.r, site.in_features],
                    );
                    let b = (
                        format!("{}.lora_B", site.path),
                        vec![site.out_features, site.r],
                    );
                    [a, b]
                });
                let values = |_, slot: &Slot| Ok(noise.values(&slot.name, &slot.shape));
                let parameters = Parameters::from_fn(pairs.collect(), values, device)?;
                let precision = architecture.frozen_precision(self.settings.precision);
                let weight = |name: &str, shape: &[usize]| {
                    noise
                        .tensor(name, shape, precision, device)
                        .map(Weight::frozen)
                };
                let lora = |path: &str| adapter_on(path, sites, &parameters);
                let decoder = Decoder::assemble(
                    architecture,
                    &WeightSource {
                        weight: &weight,
                        lora: &lora,
                    },
                    device,
                )?;
                Ok(Trainee {
                    decoder,
                    parameters,
                })
            }
            Target::All => {
                let shapes = architecture
                    .tensors()
                    .into_iter()
                    .map(|tensor| (tensor.name, tensor.shape))
                    .collect();
                let parameters = Parameters::from_fn(
                    shapes,
                    |_, slot| Ok(noise.values(&slot.name, &slot.shape)),
                    device,
                )?;
                let decoder = decoder_of(architecture, &parameters, device)?;
                Ok(Trainee {
                    decoder,
                    parameters,
                })
            }
        }
    }
}

/// A step's micro-batches: rows of `max_length` random token ids, of which every one but a row's first is a loss token.
fn random_batches(recipe: &Recipe, vocab_size: usize) -> Vec<MicroBatch> {
    let mut random = stream(recipe.seed, Purpose::Probe, &[], "tokens");
    let mut example = || {
        let mut token = || ((u64::from(random.next_u32()) * vocab_size as u64) >> 32) as u32;
        let tokens: Vec<u32> = (0..recipe.data.max_length).map(|_| token()).collect();
        let loss = (0..tokens.len()).map(|index| index > 0).collect();
        Example { tokens, loss }
    };
    let mut batch = || {
        let rows: Vec<Example> = (0..recipe.train.micro_batch_size)
            .map(|_| example())
            .collect();
        MicroBatch::new(
            rows.iter()
                .enumerate()
                .map(|(index, row)| (index as u64, row)),
        )
    };
    (0..recipe.train.gradient_accumulation_steps)
        .map(|_| batch())
        .collect()
}

/// Random numbers for weights: one block, drawn once and repeated, because a ChaCha draw for each of a billion weights takes longer than
/// the steps. Products take the same time whatever the numbers are, as long as they are finite and of ordinary size.
struct Noise(Vec<f32>);

impl Noise {
    /// The largest prime below 2^16: rows of a matrix begin at different places of the block.
    const BLOCK: usize = 65_521;
    /// Half the width of a uniform distribution with standard deviation 0.02.
    const HALF_WIDTH: f32 = 0.034_641;

    fn new(seed: u64) -> Self {
        let mut random = stream(seed, Purpose::Probe, &[], "weights");
        let mut draw =
            || (random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0) * Self::HALF_WIDTH;
        Self((0..Self::BLOCK).map(|_| draw()).collect())
    }

    /// A trained tensor's values: norms one, biases zero, matrices from the block.
    fn values(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        match shape {
            [n] => vec![
                if name.ends_with("norm.weight") {
                    1.0
                } else {
                    0.0
                };
                *n
            ],
            _ => repeat(&self.0, shape.iter().product()),
        }
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
            Precision::Bf16 => {
                Tensor::from_vec(repeat(&self.each(bf16::from_f32), count), shape, device)?
            }
            Precision::F16 => {
                Tensor::from_vec(repeat(&self.each(f16::from_f32), count), shape, device)?
            }
        })
    }

    fn each<T>(&self, convert: fn(f32) -> T) -> Vec<T> {
        self.0.iter().map(|value| convert(*value)).collect()
    }
}

/// `count` numbers: `block` again and again.
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
