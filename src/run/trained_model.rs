//! The trained model of a run: built from weights, and exported as adapter or model directory.

use std::path::Path;

use candle_core::Device;

use super::model::{copy_companions, read_json, write_json};
use super::prepare::{Prepared, Target};
use super::target::saved_config;
use super::task::write_labels;
use crate::adapter::shards::{F32Tensor, write_f32s};
use crate::adapter::{self, Adaptation, LoraConfig};
use crate::error::{Error, Kind, Result};
use crate::forecast::model_name;
use crate::model::{TrainableModel, Weights, initial_values, random_tensor};
use crate::ops::{Parameters, Slot};
use crate::recipe::Init;

/// Reads the weights, or draws them, and builds the model.
pub(super) fn assemble(prepared: &Prepared, device: &Device) -> Result<TrainableModel> {
    let recipe = &prepared.recipe;
    let weights = match recipe.model.init {
        Init::Pretrained => Some(open_weights(prepared)?),
        Init::Random => None,
    };
    let architecture = &prepared.architecture;
    match &prepared.target {
        Target::Lora {
            adaptation, from, ..
        } => {
            let weights = weights
                .ok_or_else(|| Error::new(Kind::Model, "an adapter needs pretrained weights"))?;
            let weight = |name: &str, shape: &[usize]| {
                weights.frozen(name, shape, recipe.model.dtype, device)
            };
            let values = initial_values(&weights, from.as_deref(), recipe.seed)?;
            TrainableModel::with_adapters(architecture, adaptation, &weight, values, device)
        }
        Target::All => fully_trained(prepared, weights.as_ref(), device),
    }
}

pub(super) fn open_weights(prepared: &Prepared) -> Result<Weights> {
    Weights::open(prepared.files.require_weights()?, &prepared.architecture)
}

/// Every weight trained: read from `weights`, or drawn by the recipe's seed.
pub(super) fn fully_trained(
    prepared: &Prepared,
    weights: Option<&Weights>,
    device: &Device,
) -> Result<TrainableModel> {
    let architecture = &prepared.architecture;
    let values = |_, slot: &Slot| match weights {
        Some(weights) => weights.values_or_random(&slot.name, &slot.shape, prepared.recipe.seed),
        None => Ok(random_tensor(
            architecture,
            &slot.name,
            &slot.shape,
            prepared.recipe.seed,
        )),
    };
    TrainableModel::fully_trained(architecture, values, device)
}

/// Writes PEFT's files, or a model directory, with the model's companion files into `dir`. `trained_tokens` goes into the config.json of a model trained from
/// scratch, where baselines read it.
pub(super) fn export(
    prepared: &Prepared,
    parameters: &Parameters,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    copy_companions(&prepared.files, dir)?;
    match &prepared.target {
        Target::Lora {
            settings,
            adaptation,
            ..
        } => export_adapter(prepared, settings, adaptation, parameters, dir),
        Target::All => export_model(prepared, parameters, dir, trained_tokens),
    }
}

/// Writes PEFT's files of an adapter.
fn export_adapter(
    prepared: &Prepared,
    settings: &LoraConfig,
    adaptation: &Adaptation,
    parameters: &Parameters,
    dir: &Path,
) -> Result<()> {
    let base = model_name(&prepared.recipe.model.id);
    let revision = prepared.files.commit.as_deref();
    let architecture = &prepared.architecture;
    let config = saved_config(settings, adaptation, architecture, &base, revision)?;
    if architecture.classifier().is_some() {
        // PEFT's files of a classifier hold no label map.
        let mut model = read_json(&prepared.files.config)?;
        write_labels(architecture, &mut model);
        write_json(&model, &dir.join("config.json"))?;
    }
    parameters.with_rows(|[values, ..]| {
        let mut tensors = Vec::new();
        for (tensor, slot) in adaptation.tensors().iter().zip(parameters.slots()) {
            let values = &values[slot.range()];
            let names = tensor.names().into_iter();
            tensors.extend(names.map(|name| (name, slot.shape.clone(), values)));
        }
        adapter::save(dir, &config, &tensors)
    })
}

fn export_model(
    prepared: &Prepared,
    parameters: &Parameters,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    parameters.with_rows(|[values, ..]| {
        let slots = parameters.slots().iter();
        let tensors = slots.filter_map(|slot| {
            F32Tensor::new(&slot.name, slot.shape.clone(), &values[slot.range()])
        });
        write_f32s(&dir.join("model.safetensors"), tensors.collect(), true)
    })?;
    write_model_config(prepared, dir, trained_tokens)
}

/// Writes the config.json of an exported model: f32, tied as its tensors are, and for a model trained from scratch the tokens it was trained on.
pub(super) fn write_model_config(
    prepared: &Prepared,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    let mut config = read_json(&prepared.files.config)?;
    if let (Some(tokens), Init::Random) = (trained_tokens, prepared.recipe.model.init) {
        config["pretraining_tokens"] = tokens.into();
    }
    config["tie_word_embeddings"] = prepared.architecture.tie_word_embeddings.into();
    write_labels(&prepared.architecture, &mut config);
    config["torch_dtype"] = "float32".into();
    // The later name of the same key.
    if let Some(dtype) = config.get_mut("dtype") {
        *dtype = "float32".into();
    }
    write_json(&config, &dir.join("config.json"))
}
