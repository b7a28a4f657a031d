//! The model put together for training: frozen weights, trained values, and how they are written out.

use std::path::Path;

use candle_core::{DType, Device};
use safetensors::tensor::Dtype;

use super::model::companions;
use super::prepare::{Prepared, Target};
use crate::adapter::shards::{F32s, write_f32s};
use crate::adapter::{self, PeftConfig, Site, kaiming_uniform};
use crate::error::{Error, Kind, Result};
use crate::forecast::model_name;
use crate::model::{Architecture, Decoder, WeightSource, Weights, random_tensor};
use crate::ops::{Lora, Parameters, Slot, Weight, dtype};
use crate::recipe::Init;
use crate::work::Precision;

/// A decoder and what is trained in it.
pub(super) struct Trainee {
    pub(super) decoder: Decoder,
    pub(super) parameters: Parameters,
}

/// PEFT's tensor names of a site: A, then B.
fn names(site: &Site) -> [String; 2] {
    use adapter::unsupported::Factor;
    [Factor::A, Factor::B].map(|half| adapter::peft::tensor_name(&site.path, half))
}

/// Reads the weights (or draws them) and puts the decoder together.
pub(super) fn assemble(prepared: &Prepared, device: &Device) -> Result<Trainee> {
    let weights = match prepared.recipe.model.init {
        Init::Pretrained => Some(Weights::open(
            prepared.files.require_weights()?,
            &prepared.architecture,
        )?),
        Init::Random => None,
    };
    match &prepared.target {
        Target::Lora { sites, from, .. } => {
            let weights = weights
                .ok_or_else(|| Error::new(Kind::Model, "an adapter needs pretrained weights"))?;
            let parameters = first_values(prepared, sites, from.as_deref(), device)?;
            let decoder = decoder_with_adapter(
                &prepared.architecture,
                &weights,
                prepared.recipe.model.dtype,
                sites,
                &parameters,
                device,
            )?;
            Ok(Trainee {
                decoder,
                parameters,
            })
        }
        Target::All => fully_trained(prepared, weights.as_ref(), device),
    }
}

/// A and B of each site in model order: drawn and zero, or the continued adapter's.
fn first_values(
    prepared: &Prepared,
    sites: &[Site],
    from: Option<&adapter::LoadedAdapter>,
    device: &Device,
) -> Result<Parameters> {
    let modules = prepared.architecture.modules();
    let fitted = from.map(|loaded| loaded.attach(&modules)).transpose()?;
    let make = |index: usize, slot: &Slot| {
        // A and B of a site are neighbours.
        let (site, is_a) = (index / 2, index.is_multiple_of(2));
        Ok(match (&fitted, is_a) {
            (Some(fitted), true) => fitted[site].a.to_vec(),
            (Some(fitted), false) => fitted[site].b.to_vec(),
            (None, true) => kaiming_uniform(
                sites[site].in_features,
                sites[site].r,
                prepared.recipe.seed,
                &sites[site].path,
            ),
            (None, false) => vec![0.0; slot.len()],
        })
    };
    Parameters::from_fn(sites.iter().flat_map(pair).collect(), make, device)
}

/// Names and shapes of a site's A and B.
fn pair(site: &Site) -> [(String, Vec<usize>); 2] {
    let [a, b] = names(site);
    [
        (a, vec![site.r, site.in_features]),
        (b, vec![site.out_features, site.r]),
    ]
}

/// A frozen decoder with adapters whose values are slots of `parameters`, in the order of `sites`.
pub(super) fn decoder_with_adapter(
    architecture: &Architecture,
    weights: &Weights,
    precision: Precision,
    sites: &[Site],
    parameters: &Parameters,
    device: &Device,
) -> Result<Decoder> {
    let weight = |name: &str, shape: &[usize]| {
        // Norms and biases act on the f32 residual stream and stay f32; matrices take the compute type, or on a CPU stay bf16 as they are
        // stored: its products read them so, without a rounding.
        let stays = device.is_cpu() && weights.dtype(name)? == Dtype::BF16;
        let kind = match shape.len() {
            1 => DType::F32,
            _ if stays => DType::BF16,
            _ => dtype(precision),
        };
        Ok(Weight::frozen(weights.get(name, kind, device)?))
    };
    let lora = |path: &str| adapter_on(path, sites, parameters);
    Decoder::assemble(
        architecture,
        &WeightSource {
            weight: &weight,
            lora: &lora,
        },
        device,
    )
}

/// The adapter on the layer `path`, if it is one of `sites`; A and B of each site are neighbouring slots of `parameters`.
pub(super) fn adapter_on(
    path: &str,
    sites: &[Site],
    parameters: &Parameters,
) -> Result<Option<Lora>> {
    let Some(index) = sites.iter().position(|site| site.path == path) else {
        return Ok(None);
    };
    let (a, b) = (
        parameters.weight(2 * index)?,
        parameters.weight(2 * index + 1)?,
    );
    Ok(Some(Lora {
        a,
        b,
        scaling: sites[index].scaling,
    }))
}

/// Every weight a slot of the parameters: read from `weights`, or drawn by the recipe's seed.
pub(super) fn fully_trained(
    prepared: &Prepared,
    weights: Option<&Weights>,
    device: &Device,
) -> Result<Trainee> {
    let (architecture, seed) = (&prepared.architecture, prepared.recipe.seed);
    let shapes = architecture
        .tensors()
        .into_iter()
        .map(|tensor| (tensor.name, tensor.shape))
        .collect();
    let make = |_, slot: &Slot| match weights {
        Some(weights) => weights.values(&slot.name),
        None => Ok(random_tensor(
            &slot.name,
            &slot.shape,
            architecture.initializer_range,
            seed,
        )),
    };
    let parameters = Parameters::from_fn(shapes, make, device)?;
    let decoder = decoder_of(architecture, &parameters, device)?;
    Ok(Trainee {
        decoder,
        parameters,
    })
}

/// A decoder whose every weight is a slot of `parameters`.
pub(super) fn decoder_of(
    architecture: &Architecture,
    parameters: &Parameters,
    device: &Device,
) -> Result<Decoder> {
    let weight =
        |name: &str, _: &[usize]| {
            let slot = parameters.slots().iter().position(|slot| slot.name == name);
            parameters.weight(slot.ok_or_else(|| {
                Error::new(Kind::Model, format!("the model has no tensor `{name}`"))
            })?)
        };
    Decoder::assemble(
        architecture,
        &WeightSource {
            weight: &weight,
            lora: &|_| Ok(None),
        },
        device,
    )
}

/// Writes what was trained into `dir`: PEFT's files, or a whole model directory. `trained_tokens` goes into the configuration of a model
/// trained from scratch, where baselines look for it.
pub(super) fn export(
    prepared: &Prepared,
    parameters: &Parameters,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    match &prepared.target {
        Target::Lora {
            settings, sites, ..
        } => {
            let recipe = &prepared.recipe.model;
            let revision = prepared.files.commit.as_deref();
            let modules = prepared.architecture.modules();
            let config = PeftConfig::for_sites(
                settings,
                sites,
                &modules,
                &model_name(&recipe.id),
                revision,
            )?;
            parameters.with_rows(|[values, ..]| {
                let tensor = |slot: &Slot| {
                    (
                        slot.name.clone(),
                        [slot.shape[0], slot.shape[1]],
                        &values[slot.range()],
                    )
                };
                adapter::save(
                    dir,
                    &config,
                    &parameters.slots().iter().map(tensor).collect::<Vec<_>>(),
                )
            })
        }
        Target::All => export_model(prepared, parameters, dir, trained_tokens),
    }
}

fn export_model(
    prepared: &Prepared,
    parameters: &Parameters,
    dir: &Path,
    trained_tokens: Option<u64>,
) -> Result<()> {
    parameters.with_rows(|[values, ..]| {
        let slots = parameters.slots().iter();
        let tensors = slots
            .filter_map(|slot| F32s::new(&slot.name, slot.shape.clone(), &values[slot.range()]));
        write_f32s(&dir.join("model.safetensors"), tensors.collect(), true)
    })?;
    let mut config: serde_json::Value =
        serde_json::from_str(&super::read_text(&prepared.files.config)?)
            .map_err(|e| Error::new(Kind::Model, format!("config.json is not JSON: {e}")))?;
    if let (Some(tokens), Init::Random) = (trained_tokens, prepared.recipe.model.init) {
        config["pretraining_tokens"] = tokens.into();
    }
    config["torch_dtype"] = "float32".into();
    // The later name of the same key.
    if let Some(dtype) = config.get_mut("dtype") {
        *dtype = "float32".into();
    }
    let text = serde_json::to_string_pretty(&config)
        .map_err(|e| Error::new(Kind::Model, e.to_string()))?;
    crate::report::files::write_whole(&dir.join("config.json"), &(text + "\n"))?;
    copy_companions(prepared, dir)
}

/// Copies tokenizer and chat template into `dir`.
pub(super) fn copy_companions(prepared: &Prepared, dir: &Path) -> Result<()> {
    for file in companions(&prepared.files) {
        if let Some(name) = file.file_name() {
            let to = dir.join(name);
            std::fs::copy(&file, &to).map_err(|e| Error::io("write", &to, e))?;
        }
    }
    Ok(())
}
