//! The trained model of a run: built from weights, and exported as adapter or model directory.

use std::borrow::Cow;
use std::path::Path;

use candle_core::Device;

use super::model::{copy_companions, read_json, write_json};
use super::prepare::{Prepared, Target};
use super::target::saved_config;
use super::task::write_labels;
use crate::adapter::convert::joined;
use crate::adapter::peft::StoredValues;
use crate::adapter::shards::{F32Tensor, transpose, write_f32s};
use crate::adapter::{self, Adaptation, AdapterTensor, LoraConfig, Part, Place};
use crate::error::{Error, Kind, Result};
use crate::forecast::model_name;
use crate::model::{
    AdapterStart, Architecture, TensorShape, TrainableModel, Weights, initial_values, random_tensor,
};
use crate::ops::{Parameters, Slot};
use crate::recipe::Init;

/// A model in training, and the start of its adapter.
pub(super) struct Assembled {
    pub(super) model: TrainableModel,
    /// Holds the factors that the base weights have lost.
    pub(super) start: AdapterStart,
}

impl From<TrainableModel> for Assembled {
    /// A model whose base weights are as stored.
    fn from(model: TrainableModel) -> Self {
        let start = AdapterStart::default();
        Self { model, start }
    }
}

/// Reads the weights, or draws them, and builds the model.
pub(super) fn assemble(prepared: &Prepared, device: &Device) -> Result<Assembled> {
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
            let start = AdapterStart::new(&weights, adaptation, recipe.seed)?;
            let weight = |name: &str, shape: &[usize]| {
                weights.frozen_without(&start, name, shape, recipe.model.dtype, device)
            };
            let values = initial_values(&weights, from.as_deref(), &start)?;
            let model =
                TrainableModel::with_adapters(architecture, adaptation, &weight, values, device)?;
            Ok(Assembled { model, start })
        }
        Target::All => fully_trained(prepared, weights.as_ref(), device).map(Assembled::from),
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
    assembled: &Assembled,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    copy_companions(&prepared.files, dir)?;
    match &prepared.target {
        Target::Lora {
            settings,
            adaptation,
            ..
        } => export_adapter(prepared, settings, adaptation, assembled, dir),
        Target::All => export_model(prepared, &assembled.model.parameters, dir, trained_tokens),
    }
}

/// Writes PEFT's files of an adapter. The factors that the base weights have lost are subtracted.
fn export_adapter(
    prepared: &Prepared,
    settings: &LoraConfig,
    adaptation: &Adaptation,
    assembled: &Assembled,
    dir: &Path,
) -> Result<()> {
    let Assembled { model, start } = assembled;
    let parameters = &model.parameters;
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
        let trained = adaptation.tensors();
        let with_values = trained.iter().zip(parameters.slots());
        let with_values: Vec<_> = with_values
            .map(|(tensor, slot)| {
                (
                    tensor,
                    saved_values(tensor, slot, &values[slot.range()], start),
                )
            })
            .collect();
        let mut tensors = Vec::new();
        for (tensor, (shape, values)) in &with_values {
            let names = tensor.names().into_iter();
            tensors.extend(names.map(|name| (name, shape.clone(), values.as_ref())));
        }
        adapter::save(dir, &config, &tensors)
    })
}

/// Shape and values of a trained tensor in its file.
fn saved_values<'v>(
    tensor: &AdapterTensor<'_>,
    slot: &Slot,
    values: &'v [f32],
    start: &AdapterStart,
) -> (Vec<usize>, Cow<'v, [f32]>) {
    if let Place::Part(site, part) = tensor.place
        && let Some(factors) = start.factors(&site.path)
    {
        let initial = if part == Part::A {
            &factors.a
        } else {
            &factors.b
        };
        let trained = StoredValues {
            shape: slot.shape.clone(),
            values: values.to_vec(),
        };
        let joined = joined(part, &trained, initial);
        return (joined.shape, joined.values.into());
    }
    (slot.shape.clone(), values.into())
}

fn export_model(
    prepared: &Prepared,
    parameters: &Parameters,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    let architecture = &prepared.architecture;
    parameters.with_rows(|[values, ..]| {
        let tensors = architecture.tensors();
        let slots = parameters.slots().iter().zip(&tensors);
        let stored = slots
            .flat_map(|(slot, tensor)| stored_tensors(architecture, tensor, &values[slot.range()]));
        let stored: Vec<(String, Vec<usize>, Cow<'_, [f32]>)> = stored.collect();
        let tensors = stored
            .iter()
            .filter_map(|(name, shape, values)| F32Tensor::new(name, shape.clone(), values));
        write_f32s(&dir.join("model.safetensors"), tensors.collect(), true)
    })?;
    write_model_config(prepared, dir, trained_tokens)
}

/// A tensor of the architecture as files hold it: a Conv1D's weight transposed, a stack of experts as
/// a matrix for each.
fn stored_tensors<'v>(
    architecture: &Architecture,
    tensor: &TensorShape,
    values: &'v [f32],
) -> Vec<(String, Vec<usize>, Cow<'v, [f32]>)> {
    let shape = tensor.stored_shape();
    match (tensor.shape.as_slice(), architecture.experts) {
        ([rows, columns], _) if tensor.transposed => {
            let values = transpose(values, *rows, *columns).into();
            vec![(tensor.name.clone(), shape, values)]
        }
        ([_, _, columns], Some(sizes)) => {
            let names = architecture.names.expert_parts(&tensor.name, sizes.count);
            let size = values.len() / names.len().max(1);
            let parts = names.into_iter().zip(values.chunks(size.max(1)));
            let shape = vec![size / columns, *columns];
            parts
                .map(|(name, part)| (name, shape.clone(), part.into()))
                .collect()
        }
        _ => vec![(tensor.name.clone(), shape, values.into())],
    }
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
