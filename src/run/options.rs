//! Recipe sections as the plain arguments of data and training; no other room takes a recipe's section.

use crate::data::{self, LabelKind};
use crate::model::Recompute;
use crate::ops::AdamW;
use crate::recipe::{self, Adapter, Length, ProblemType, Recipe, Task};
use crate::train::{EarlyStopping, Schedule, Settings};

/// Steps of a run, at most: a plan plays each of them through.
pub(super) const MAX_STEPS: u64 = 10_000_000;

/// How the recipe's records are read and tokenized.
pub fn data_options(recipe: &Recipe) -> data::Options {
    let data = &recipe.data;
    data::Options {
        format: data.format,
        columns: data.columns.clone(),
        max_length: data.max_length,
        on_bad_record: data.on_bad_record,
        txt_unit: data.txt_unit,
        prompt_template: data.prompt_template.clone(),
        labels: data.labels.clone(),
        label_kind: match (recipe.model.task, recipe.model.problem_type) {
            (Task::TokenClassification, _) => LabelKind::ClassesOfWords,
            (_, ProblemType::MultiLabelClassification) => LabelKind::Labels,
            (_, ProblemType::Regression) => LabelKind::Number,
            _ => LabelKind::Class,
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

/// The loop's settings; `digest` names the resolved recipe.
pub(super) fn settings(
    recipe: &Recipe,
    steps_per_epoch: u64,
    recompute: Recompute,
    digest: String,
) -> Settings {
    let train = &recipe.train;
    let steps = match train.length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => (epochs * steps_per_epoch as f64).ceil().max(1.0) as u64,
        Length::Budget => MAX_STEPS,
    };
    let lora = match &recipe.adapter {
        Adapter::Lora(lora) => Some(lora),
        Adapter::None => None,
    };
    Settings {
        steps,
        by_epochs: matches!(train.length, Length::Epochs(_)),
        schedule: schedule(train, steps),
        optimizer: AdamW {
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            epsilon: train.adam_epsilon,
            weight_decay: train.weight_decay,
            lr_ratio: lora.and_then(|l| l.loraplus_lr_ratio).unwrap_or(1.0),
            max_grad_norm: train.max_grad_norm,
        },
        eval_every: train.eval_every,
        save_every: train.save_every,
        keep_best: train.keep_best && recipe.data.validation != recipe::Validation::None,
        target_loss: None,
        early_stopping: early_stopping(train),
        recompute,
        dropout: lora.map_or(0.0, |lora| lora.config.lora_dropout),
        seed: recipe.seed,
        precision: recipe.model.dtype,
        recipe: digest,
    }
}

fn early_stopping(train: &recipe::Train) -> Option<EarlyStopping> {
    train.early_stopping.map(|patience| EarlyStopping {
        patience,
        gain_per_kj: train.early_stopping_gain,
    })
}

/// The learning rate over `steps` steps.
pub(super) fn schedule(train: &recipe::Train, steps: u64) -> Schedule {
    let warmup_steps = match train.warmup {
        recipe::Warmup::Steps(steps) => steps,
        recipe::Warmup::Ratio(ratio) => (steps as f64 * ratio).ceil() as u64,
    };
    Schedule {
        peak: train.learning_rate,
        decay: train.schedule,
        steps,
        warmup_steps,
    }
}
