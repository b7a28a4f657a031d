//! The recipe's words into the other rooms' plain arguments: configuration stops here.

use crate::adapter::{LoraSettings, Targets};
use crate::data;
use crate::energy::{Limits, MeterKind};
use crate::model::Recompute;
use crate::recipe::{self, Recipe};
use crate::train::{Decay, Schedule, Settings};

pub(super) fn data_options(data: &recipe::Data) -> data::Options {
    data::Options {
        format: match data.format {
            recipe::Format::Text => data::Format::Text,
            recipe::Format::Completion => data::Format::Completion,
            recipe::Format::Messages => data::Format::Messages,
            recipe::Format::Alpaca => data::Format::Alpaca,
            recipe::Format::Auto => data::Format::Auto,
        },
        columns: data.columns.clone(),
        max_length: data.max_length,
        on_bad_record: match data.on_bad_record {
            recipe::OnBadRecord::Stop => data::OnBadRecord::Stop,
            recipe::OnBadRecord::Skip => data::OnBadRecord::Skip,
        },
        txt_unit: match data.txt_unit {
            recipe::TxtUnit::Paragraph => data::TxtUnit::Paragraph,
            recipe::TxtUnit::File => data::TxtUnit::File,
        },
    }
}

pub(super) fn sampler_options(recipe: &Recipe) -> data::SamplerOptions {
    data::SamplerOptions {
        micro_batch_size: recipe.train.micro_batch_size,
        gradient_accumulation_steps: recipe.train.gradient_accumulation_steps,
        max_length: recipe.data.max_length,
        packing: recipe.data.packing,
        shuffle: recipe.data.shuffle,
        seed: recipe.seed,
    }
}

fn targets(targets: &recipe::Targets) -> Targets {
    match targets {
        recipe::Targets::AllLinear => Targets::AllLinear,
        recipe::Targets::Names(names) => Targets::Names(names.clone()),
        recipe::Targets::Regex(regex) => Targets::Regex(regex.clone()),
    }
}

pub(super) fn lora_settings(lora: &recipe::Lora) -> LoraSettings {
    LoraSettings {
        r: lora.r,
        lora_alpha: lora.lora_alpha,
        lora_dropout: lora.lora_dropout,
        targets: targets(&lora.target_modules),
        exclude: lora.exclude_modules.as_ref().map(targets),
        use_rslora: lora.use_rslora,
        rank_pattern: lora.rank_pattern.clone(),
        alpha_pattern: lora.alpha_pattern.clone(),
        layers_to_transform: lora.layers_to_transform.clone(),
        layers_pattern: Vec::new(),
    }
}

pub(super) fn limits(budget: &recipe::Budget) -> Limits {
    Limits {
        energy: budget.energy,
        carbon: budget.carbon,
        flops: budget.flops,
        time: budget.time,
        cost: budget.cost.clone(),
    }
}

/// The meter asked for; `None`: measured where complete, else counted.
pub(super) fn meter(meter: recipe::Meter) -> Option<MeterKind> {
    match meter {
        recipe::Meter::Auto => None,
        recipe::Meter::Counted => Some(MeterKind::Counted),
        recipe::Meter::Measured => Some(MeterKind::Measured),
        recipe::Meter::Timed => Some(MeterKind::Timed),
    }
}

/// The recipe's word for the meter that decides.
pub(super) fn decided(meter: MeterKind) -> recipe::Meter {
    match meter {
        MeterKind::Counted => recipe::Meter::Counted,
        MeterKind::Measured => recipe::Meter::Measured,
        MeterKind::Timed => recipe::Meter::Timed,
    }
}

/// The loop's settings; `digest` names the resolved recipe.
pub(super) fn settings(
    recipe: &Recipe,
    steps_per_epoch: u64,
    recompute: Recompute,
    digest: String,
) -> Settings {
    let train = &recipe.train;
    let (steps, by_epochs) = match train.length {
        recipe::Length::Steps(steps) => (steps, false),
        recipe::Length::Epochs(epochs) => (
            (epochs * steps_per_epoch as f64).ceil().max(1.0) as u64,
            true,
        ),
    };
    let warmup_steps = match train.warmup {
        recipe::Warmup::Steps(steps) => steps,
        recipe::Warmup::Ratio(ratio) => (steps as f64 * ratio).ceil() as u64,
    };
    let decay = match train.schedule {
        recipe::Schedule::Linear => Decay::Linear,
        recipe::Schedule::Cosine => Decay::Cosine,
        recipe::Schedule::Constant => Decay::Constant,
    };
    Settings {
        steps,
        by_epochs,
        schedule: Schedule {
            peak: train.learning_rate,
            decay,
            steps,
            warmup_steps,
        },
        adam: (train.adam_beta1, train.adam_beta2, train.adam_epsilon),
        weight_decay: train.weight_decay,
        max_grad_norm: train.max_grad_norm,
        eval_every: train.eval_every,
        save_every: train.save_every,
        keep_best: train.keep_best && recipe.data.validation != recipe::Validation::None,
        recompute,
        dropout: match &recipe.adapter {
            recipe::Adapter::Lora(lora) => lora.lora_dropout,
            recipe::Adapter::None => 0.0,
        },
        seed: recipe.seed,
        precision: recipe.model.dtype,
        recipe: digest,
    }
}
