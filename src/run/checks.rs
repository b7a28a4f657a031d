//! Preflight checks: what memory, disk, model or settings rule out before weights are read.

use std::path::Path;

use super::options::MAX_STEPS;
use super::prepare::{Prepared, Target};
use crate::adapter::Targets;
use crate::error::{Error, Kind, Result};
use crate::files::available_space;
use crate::forecast::measured_kinds;
use crate::model::{
    Architecture, ConfigDropout, MemoryForecast, ModelShape, Recompute, forecast_memory,
    least_recompute,
};
use crate::recipe::{Adapter, Checkpointing, Init, Recipe};
use crate::train::{Settings, checkpoint_bytes};
use crate::units::Bytes;

/// Failures of checks that do not depend on each other.
#[derive(Default)]
pub(super) struct Failures(Vec<Error>);

impl Failures {
    /// The value; notes a failure.
    pub(super) fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.0.push(error)).ok()
    }

    /// `value`, which is there if nothing failed.
    ///
    /// # Errors
    /// All failures.
    pub(super) fn or<T>(self, value: Option<T>) -> Result<T> {
        match (Error::all(self.0), value) {
            (Some(error), _) => Err(error),
            (None, value) => Ok(value.expect("a value is missing only where a check failed")),
        }
    }
}

pub(super) fn refuse_adapter_on_random_weights(recipe: &Recipe) -> Result<()> {
    if recipe.model.init == Init::Random && matches!(recipe.adapter, Adapter::Lora(_)) {
        return Err(Error::new(Kind::Recipe, "an adapter cannot be trained on random weights")
            .at("model.init")
            .value("random")
            .hint("write `type = \"none\"` in [adapter] to train every weight, or `init = \"pretrained\"` in [model]"));
    }
    Ok(())
}

/// Refuses to train a decoder whose config.json has dropout: transformers applies it in training.
/// Encoders are published with dropout, and so are decoders whose class has it by default (GPT-2): see
/// [`dropout_warning`].
pub(super) fn refuse_dropout(architecture: &Architecture) -> Result<()> {
    let is_default = architecture
        .dropout
        .iter()
        .all(|dropout| dropout.is_default);
    let refused = !is_default && architecture.classifier().is_none();
    let found = dropouts(architecture).filter(|_| refused);
    let Some(found) = found else {
        return Ok(());
    };
    let zero = |dropout: &ConfigDropout| format!("`\"{}\": 0.0`", dropout.key);
    let wanted: Vec<_> = architecture.dropout.iter().map(zero).collect();
    Err(Error::new(
        Kind::Model,
        "config.json has dropout, which is not supported in training",
    )
    .value(found)
    .rule("0: only `adapter.lora_dropout` drops elements")
    .hint(format!(
        "set {} in the config.json of a local copy, and `lora_dropout` in [adapter]",
        wanted.join(", ")
    )))
}

/// The warning about dropout in config.json that is not refused.
pub(super) fn dropout_warning(architecture: &Architecture) -> Option<String> {
    let found = dropouts(architecture)?;
    Some(format!(
        "config.json has dropout ({found}), which transformers applies in training and this run does not: `lora_dropout` in [adapter] \
         is what drops elements"
    ))
}

/// The warning that `all-linear` leaves out a model's experts, which PEFT would adapt.
pub(super) fn experts_warning(architecture: &Architecture, targets: &Targets) -> Option<String> {
    let left_out = architecture.experts.is_some() && *targets == Targets::AllLinear;
    left_out.then(|| {
        "`all-linear` means the layers of attention: the experts and their routers stay frozen \
         (PEFT would adapt them through `target_parameters`)"
            .to_string()
    })
}

/// The dropouts above zero.
fn dropouts(architecture: &Architecture) -> Option<String> {
    let dropout = architecture.dropout.iter();
    let found: Vec<_> = dropout
        .map(|dropout| format!("{} = {}", dropout.key, dropout.p))
        .collect();
    (!found.is_empty()).then(|| found.join(", "))
}

pub(super) fn check_length(recipe: &Recipe, architecture: &Architecture) -> Result<()> {
    let length = recipe.data.max_length;
    let most = architecture.max_position_embeddings;
    if length <= most {
        return Ok(());
    }
    Err(Error::new(
        Kind::Recipe,
        "records may be longer than the model's positions",
    )
    .at("data.max_length")
    .value(length.to_string())
    .rule(format!("at most max_position_embeddings = {most}"))
    .hint(format!("write `max_length = {most}` in [data]")))
}

pub(super) fn check_steps(settings: &Settings) -> Result<()> {
    if settings.steps <= MAX_STEPS {
        return Ok(());
    }
    let key = if settings.by_epochs {
        "train.epochs"
    } else {
        "train.steps"
    };
    Err(
        Error::new(Kind::Recipe, "these are more steps than a run can have")
            .at(key)
            .value(format!("{} steps", settings.steps))
            .rule(format!("at most {MAX_STEPS}"))
            .hint("write fewer: a budget in [budget] ends a run earlier than its steps"),
    )
}

/// Activation checkpointing (`auto`: of as few blocks as memory allows) and the memory forecast of `trained` parameters and
/// `tokens` in the largest micro-batch. `free`: memory of the device; `None` if it is not known.
///
/// # Errors
/// More blocks than the backward pass walks, and a run that does not fit in free memory.
pub(super) fn recompute(
    recipe: &Recipe,
    shape: &ModelShape,
    trained: usize,
    tokens: usize,
    free: Option<Bytes>,
    warnings: &mut Vec<String>,
) -> Result<(Recompute, MemoryForecast)> {
    let walked = shape.backward_blocks();
    let chosen = match recipe.train.activation_checkpointing {
        Checkpointing::Always => Recompute::ALL,
        Checkpointing::Never => Recompute::NONE,
        Checkpointing::Blocks(blocks) if blocks > walked => {
            return Err(too_many_blocks(blocks, walked));
        }
        Checkpointing::Blocks(blocks) => Recompute::lowest(blocks),
        Checkpointing::Auto => free.map_or(Recompute::NONE, |free| {
            least_recompute(shape, trained as u64, tokens, free)
        }),
    };
    if recipe.train.activation_checkpointing == Checkpointing::Auto && chosen != Recompute::NONE {
        let blocks = chosen.count(walked);
        warnings.push(format!("not all activations fit in memory: those of {blocks} of {walked} blocks are computed again"));
    }
    let memory = forecast_memory(shape, trained as u64, tokens, chosen);
    match free.filter(|free| memory.peak() > *free) {
        None => Ok((chosen, memory)),
        Some(free) => Err(Error::new(Kind::Resources, "this run does not fit in memory")
            .value(format!("{} needed, {free} free", memory.peak()))
            .hint("lower `micro_batch_size` or `max_length`, use `dtype = \"bf16\"`, or write `activation_checkpointing = \"always\"`")),
    }
}

fn too_many_blocks(blocks: usize, walked: usize) -> Error {
    Error::new(
        Kind::Recipe,
        "activations cannot be computed again in more blocks than the backward pass walks",
    )
    .at("train.activation_checkpointing")
    .value(blocks.to_string())
    .rule(format!(
        "at most {walked}, the blocks from the lowest trained layer up"
    ))
    .hint("write `activation_checkpointing = \"always\"` for all of them")
}

/// The recipe's value for `recompute`, in place of `auto`.
pub(super) fn checkpointing_value(recompute: Recompute, walked: usize) -> Checkpointing {
    match recompute.count(walked) {
        0 => Checkpointing::Never,
        blocks if blocks == walked => Checkpointing::Always,
        blocks => Checkpointing::Blocks(blocks),
    }
}

/// Refuses a measured baseline, which trains every weight, if it does not fit in memory. The recipe's
/// `activation_checkpointing` is resolved.
pub(super) fn check_baseline_memory(
    recipe: &Recipe,
    architecture: &Architecture,
    tokens: usize,
    free: Option<Bytes>,
) -> Result<()> {
    if measured_kinds(recipe).next().is_none() {
        return Ok(());
    }
    let shape = ModelShape::fully_trained(architecture, recipe.model.dtype);
    let trained = Target::All.parameters(architecture);
    recompute(recipe, &shape, trained, tokens, free, &mut Vec::new())
        .map(|_| ())
        .map_err(|e| e.at("[baseline]: a measured baseline trains every weight"))
}

/// Refuses a run into `out` if its disk cannot hold the checkpoints of the run and of a measured baseline after it.
pub(super) fn check_disk(prepared: &Prepared, out: &Path) -> Result<()> {
    let recipe = &prepared.recipe;
    let checkpoints = |trained: usize, limit: usize| checkpoint_bytes(trained) * (limit + 2);
    let mut needed = checkpoints(prepared.trained(), recipe.train.save_total_limit);
    if measured_kinds(recipe).next().is_some() {
        needed += checkpoints(Target::All.parameters(&prepared.architecture), 1);
    }
    let needed = Bytes(needed as u64);
    match available_space(out).filter(|free| *free < needed) {
        None => Ok(()),
        Some(free) => Err(Error::new(Kind::Resources, "the disk has no room for the checkpoints")
            .at(out.display().to_string())
            .value(format!("{needed} needed, {free} free"))
            .hint("free some space, lower `save_total_limit` in [train], or choose another disk with `--out`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_checkpointing_is_written_as_a_value() {
        let value = |blocks: usize| checkpointing_value(Recompute::lowest(blocks), 22);
        assert_eq!(
            [value(0), value(1), value(21)],
            [
                Checkpointing::Never,
                Checkpointing::Blocks(1),
                Checkpointing::Blocks(21)
            ]
        );
        assert_eq!(
            [value(22), checkpointing_value(Recompute::ALL, 22)],
            [Checkpointing::Always; 2]
        );
    }
}
