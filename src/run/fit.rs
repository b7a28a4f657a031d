//! Precision, micro-batch and activation checkpointing that fit in this machine's memory.
//!
//! Takes a recipe and its model's files, tries settings from the cheapest to the smallest, returns the first whose forecast peak
//! fits. Reads no weights.

use candle_core::Device;

use super::architecture::architecture_of;
use super::checks::checkpointing_value;
use super::target::{shape_of, target};
use super::task::resolve_task;
use crate::energy::Profile;
use crate::error::Result;
use crate::hub::ModelFiles;
use crate::measure::machine::free_memory;
use crate::model::{ModelShape, Recompute, forecast_memory, least_recompute};
use crate::recipe::{Checkpointing, Chosen, Init, Quantization, Recipe};
use crate::units::Bytes;
use crate::work::Precision;

/// Share of free memory that a run may fill: other programs grow too.
const FILLED: f64 = 0.8;
/// Least `max_length` that is tried.
const LEAST_LENGTH: usize = 128;
/// Most rows of a micro-batch.
const MOST_ROWS: usize = 8;
/// bf16 is chosen where it saves at least this share of energy.
const WORTHWHILE: f64 = 0.03;

/// What is to fit.
pub(super) struct Fitting<'a> {
    pub recipe: &'a Recipe,
    pub files: &'a ModelFiles,
    pub device: &'a Device,
    pub profile: &'a Profile,
    /// Wanted tokens of a row.
    pub max_length: usize,
}

/// Settings that fit, or the smallest that were tried.
pub(super) struct Fit {
    dtype: Precision,
    /// Energy of bf16 over that of f32.
    bf16_over_f32: f64,
    quantization: Quantization,
    micro_batch_size: usize,
    gradient_accumulation_steps: usize,
    max_length: usize,
    /// Whether `max_length` is shorter than wanted.
    is_cut: bool,
    recompute: Recompute,
    peak: Bytes,
    free: Option<Bytes>,
}

/// A model in one precision and storage.
struct Stored {
    dtype: Precision,
    quantization: Quantization,
    shape: ModelShape,
    trained: u64,
}

impl Fitting<'_> {
    /// The cheapest settings for steps of `rows` rows that fit in memory: all activations saved before recomputed ones, weights as
    /// they are before nf4, the wanted length before a shorter one.
    pub(super) fn find(&self, rows: usize) -> Result<Fit> {
        let f32 = self.stored(Precision::F32, Quantization::None)?;
        let bf16 = self.stored(Precision::Bf16, Quantization::None)?;
        let energy = |stored: &Stored| {
            let segments = vec![self.max_length; rows.min(MOST_ROWS)];
            let tokens = segments.iter().sum();
            let work = stored.shape.training(&segments, tokens, Recompute::NONE);
            self.profile.charge(&work).energy.joules().0
        };
        let ratio = energy(&bf16) / energy(&f32);
        let mut stored = vec![f32, bf16];
        if ratio < 1.0 - WORTHWHILE {
            stored.swap(0, 1);
        }
        // A model that is quantised already is not quantised again.
        stored.extend(self.stored(Precision::Bf16, Quantization::Nf4).ok());
        let free = free_memory(&candle_core::Device::Cpu);
        let fits = |fit: &Fit| free.is_none_or(|free| (fit.peak.0 as f64) < FILLED * free.0 as f64);
        let tried = || {
            self.lengths()
                .flat_map(|length| candidates(&stored, length, rows, free))
        };
        let mut fit = match tried().find(fits) {
            Some(fit) => fit,
            // The plan says what is missing.
            None => tried()
                .min_by_key(|fit| fit.peak)
                .unwrap_or_else(|| unreachable!("a length is always tried")),
        };
        fit.bf16_over_f32 = ratio;
        fit.is_cut = fit.max_length < self.max_length;
        Ok(fit)
    }

    fn lengths(&self) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(self.max_length), |length| {
            Some(length / 2).filter(|shorter| *shorter >= LEAST_LENGTH)
        })
    }

    fn stored(&self, dtype: Precision, quantization: Quantization) -> Result<Stored> {
        let mut recipe = self.recipe.clone();
        recipe.model.dtype = dtype;
        let mut architecture =
            architecture_of(self.files, Init::Pretrained, quantization, self.device)?;
        resolve_task(&mut recipe, &mut architecture, None)?;
        let target = target(&mut recipe, &architecture)?;
        Ok(Stored {
            dtype,
            quantization,
            shape: shape_of(&recipe, &architecture, &target),
            trained: target.parameters(&architecture) as u64,
        })
    }
}

/// Settings for one length, the cheapest first.
fn candidates(
    stored: &[Stored],
    max_length: usize,
    rows: usize,
    free: Option<Bytes>,
) -> impl Iterator<Item = Fit> {
    let sizes = move || {
        let largest = rows.min(MOST_ROWS);
        std::iter::successors(Some(largest), |size| {
            Some(size / 2).filter(|half| *half > 0)
        })
    };
    let quantised = [false, true].into_iter();
    let kinds = quantised.flat_map(move |quantised| {
        let of_kind =
            move |stored: &&Stored| (stored.quantization != Quantization::None) == quantised;
        [false, true].into_iter().flat_map(move |recomputed| {
            stored
                .iter()
                .filter(of_kind)
                .map(move |stored| (stored, recomputed))
        })
    });
    kinds.flat_map(move |(stored, recomputed)| {
        sizes().map(move |size| {
            let tokens = size * max_length;
            let recompute = match free.filter(|_| recomputed) {
                Some(free) => {
                    let filled = Bytes((FILLED * free.0 as f64) as u64);
                    least_recompute(&stored.shape, stored.trained, tokens, filled)
                }
                None => Recompute::NONE,
            };
            Fit {
                dtype: stored.dtype,
                bf16_over_f32: 1.0,
                quantization: stored.quantization,
                micro_batch_size: size,
                gradient_accumulation_steps: rows.div_ceil(size),
                max_length,
                is_cut: false,
                recompute,
                peak: forecast_memory(&stored.shape, stored.trained, tokens, recompute).peak(),
                free,
            }
        })
    })
}

impl Fit {
    /// Rows of a step.
    pub(super) fn rows(&self) -> usize {
        self.micro_batch_size * self.gradient_accumulation_steps
    }

    /// The settings with their reasons; `blocks`: those that the backward pass walks.
    pub(super) fn choices(&self, blocks: usize) -> Vec<Chosen> {
        let memory = match self.free {
            Some(free) => format!("{} peak, {free} free", self.peak),
            None => format!("{} peak", self.peak),
        };
        let mut choices = vec![self.dtype_choice()];
        if self.quantization == Quantization::Nf4 {
            let why = format!("Weights do not fit as they are ({memory} with nf4)");
            choices.push(Chosen::new("model.quantization", "nf4", why));
        }
        if self.is_cut {
            let why = format!("As long as fits in memory: {memory}");
            choices.push(Chosen::new("data.max_length", self.max_length as i64, why));
        }
        let rows = self.rows();
        let of = if rows == 1 {
            "A step has one row".to_string()
        } else {
            format!("Of the {rows} rows of a step as many as fit in memory")
        };
        let why = format!("{of}: {memory}");
        choices.push(Chosen::new(
            "train.micro_batch_size",
            self.micro_batch_size as i64,
            why,
        ));
        let accumulated = self.gradient_accumulation_steps;
        if accumulated > 1 {
            let why = format!(
                "Rows of a step over rows at once: {} / {}",
                self.rows(),
                self.micro_batch_size
            );
            choices.push(Chosen::new(
                "train.gradient_accumulation_steps",
                accumulated as i64,
                why,
            ));
        }
        choices.push(checkpointing_choice(checkpointing_value(
            self.recompute,
            blocks,
        )));
        choices
    }

    fn dtype_choice(&self) -> Chosen {
        let percent = 100.0 * (1.0 - self.bf16_over_f32);
        let is_cheaper = self.bf16_over_f32 < 1.0 - WORTHWHILE;
        let why = match self.dtype {
            Precision::F32 => "bf16 would save no energy on this device, as counted".to_string(),
            _ if is_cheaper => {
                format!("{percent:.0} % less energy than f32 on this device, as counted")
            }
            _ => "f32 does not fit in memory".to_string(),
        };
        Chosen::new(
            "model.dtype",
            if self.dtype == Precision::F32 {
                "f32"
            } else {
                "bf16"
            },
            why,
        )
    }
}

fn checkpointing_choice(value: Checkpointing) -> Chosen {
    const KEY: &str = "train.activation_checkpointing";
    match value {
        Checkpointing::Always => Chosen::new(
            KEY,
            "always",
            "Activations of all blocks are recomputed: they do not fit in memory",
        ),
        Checkpointing::Blocks(blocks) => Chosen::new(
            KEY,
            blocks as i64,
            "Blocks whose activations are recomputed: not all fit in memory",
        ),
        Checkpointing::Never | Checkpointing::Auto => Chosen::new(
            KEY,
            "never",
            "All activations fit in memory: recomputing some would cost energy",
        ),
    }
}
