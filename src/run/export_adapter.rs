//! A LoRA adapter as a GGUF file of its own, which llama.cpp applies to its base model (`llama-server --lora`).
//!
//! Names and metadata are those of llama.cpp's `convert_lora_to_gguf.py` (MIT).

use std::path::Path;

use candle_core::Device;

use super::Screen;
use super::architecture::architecture_of;
use super::export::{Exported, write_new};
use super::inference::fetch;
use super::merge::adapter_of;
use super::model_source::ModelSource;
use crate::adapter::{self, LoadedAdapter, Part, Site};
use crate::error::{Error, Kind, Result};
use crate::gguf::{self, TensorInfo, Value};
use crate::model::{Architecture, Family};
use crate::ops::StoredFormat;
use crate::recipe::{Init, Quantization};

/// Writes A and B of each layer in f32. A scaling other than `lora_alpha / r` of the adapter, by patterns or rank-stabilised LoRA, is in B.
///
/// # Errors
/// An adapter that is more than LoRA on linear layers, a model type that GGUF does not know, an adapter that does not fit its model.
pub fn export_adapter(
    source: &ModelSource,
    out: &Path,
    screen: &mut dyn Screen,
) -> Result<Exported> {
    let path = adapter_of(source)?;
    let files = fetch(source, screen.downloads())?;
    let architecture = architecture_of(&files, Init::Pretrained, Quantization::None, &Device::Cpu)?;
    let family = gguf::family(&architecture)?;
    let loaded = adapter::load(path)?;
    let layout = architecture.layout();
    let adaptation = loaded.adaptation(&layout)?;
    let only_lora = |site: &Site| adaptation.parts(site) == [Part::A, Part::B];
    if !adaptation.copies.is_empty()
        || !adaptation.tokens.is_empty()
        || !adaptation.sites.iter().all(only_lora)
    {
        return Err(Error::new(Kind::Adapter, "the adapter cannot be written as GGUF")
            .at(path.display().to_string())
            .rule("A and B on linear layers alone: no weights trained in full, biases, magnitudes or token rows")
            .hint("merge it: leave `--adapter-only` out"));
    }
    let alpha = loaded.settings(&layout)?.lora_alpha;
    let text = |text: &str| Value::Text(text.into());
    let metadata = [
        ("general.architecture", text(family.arch)),
        ("general.type", text("adapter")),
        ("general.name", text(&super::export::name_of(&source.id))),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ];
    let metadata: Vec<(String, Value)> = metadata
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect();
    let mut tensors = Vec::with_capacity(2 * adaptation.sites.len());
    for site in &adaptation.sites {
        tensors.extend(pair(site, alpha, &loaded, family, &architecture)?);
    }
    let infos: Vec<&TensorInfo> = tensors.iter().map(|(info, _)| info).collect();
    write_new(
        out,
        "adapter-F32.gguf",
        &metadata,
        &infos,
        screen.downloads(),
        |index| {
            let (info, values) = &tensors[index];
            info.format.encode(values, 1)
        },
    )
}

/// A (r, in) and B (out, r) of a layer.
fn pair(
    site: &Site,
    alpha: f64,
    adapter: &LoadedAdapter,
    family: &Family,
    architecture: &Architecture,
) -> Result<[(TensorInfo, Vec<f32>); 2]> {
    let weight = format!("{}.weight", site.path);
    let Some(name) = family.tensor_name(&weight, architecture) else {
        return Err(Error::new(Kind::Model, "a layer has no name in GGUF").value(site.path.clone()));
    };
    // llama.cpp scales by alpha / r.
    let factor = (site.scaling * site.r as f64 / alpha) as f32;
    let b: Vec<f32> = adapter
        .values(&Part::B.name(&site.path))?
        .iter()
        .map(|x| x * factor)
        .collect();
    let info = |end: &str, part: Part| TensorInfo {
        name: format!("{name}.{end}"),
        shape: part.shape(site),
        format: StoredFormat::F32,
    };
    Ok([
        (
            info("lora_a", Part::A),
            adapter.values(&Part::A.name(&site.path))?.to_vec(),
        ),
        (
            info("lora_b", Part::B),
            family.convert(&weight, b, architecture),
        ),
    ])
}
