//! Merging of an adapter into its model, as a model directory.

use std::path::Path;

use candle_core::Device;

use super::Screen;
use super::architecture::architecture_of;
use super::export::name_of;
use super::inference::fetch;
use super::model::{copy_companions, copy_file, read_json, write_json};
use super::model_source::ModelSource;
use crate::adapter::shards::TensorEntry;
use crate::adapter::{self, MergeJob, MergeSummary, MergeWeights};
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::model::Weights;
use crate::recipe::{Init, ModelId, Quantization};
use crate::report::files::MODEL_CARD;

/// A merge.
pub struct MergeRequest<'a> {
    /// The base model and its adapter.
    pub source: &'a ModelSource,
    /// The directory to create.
    pub out: &'a Path,
}

/// Merges W + scaling B A and the weights trained in full, in f32, rounded once to the file's dtype; of quantised weights their decoded
/// values, and the result in bf16.
///
/// # Errors
/// A model or adapter that cannot be loaded, or that do not fit each other.
pub fn merge_model(request: &MergeRequest<'_>, screen: &mut dyn Screen) -> Result<MergeSummary> {
    let device = Device::Cpu;
    let adapter = adapter_of(request.source)?;
    let files = fetch(request.source, screen.downloads())?;
    let architecture = architecture_of(&files, Init::Pretrained, Quantization::None, &device)?;
    if architecture.classifier().is_some() {
        return Err(
            Error::new(Kind::Usage, "merging the adapter of a classifier is not supported")
                .value(architecture.class.clone())
                .hint("use the adapter as it is: `--adapter DIRECTORY` of `wattune predict`, or PEFT's `merge_and_unload`"),
        );
    }
    // Refuses weights that do not fit config.json before anything is written.
    let weights = Weights::open(&files.weights, &architecture)?;
    let stored_names = weights.stored_names();
    let dequantized = weights.dequantized_tensors();
    let loaded = adapter::load(adapter)?;
    let layout = architecture.layout();
    let adaptation = loaded.adaptation(&layout)?;
    let beside = architecture.names.tower_modules();
    for warning in loaded.warnings(&layout, beside.as_deref())? {
        screen.note(&format!("warning: {warning}"));
    }
    let other_files = |dir: &Path| {
        copy_companions(&files, dir)?;
        write_atomic(
            &dir.join(MODEL_CARD),
            card(request.source, files.license.as_deref()),
        )?;
        let config = dir.join("config.json");
        match adaptation.unties || dequantized.is_some() {
            true => write_config(
                &files.config,
                &config,
                adaptation.unties,
                dequantized.is_some(),
            ),
            false => copy_file(&files.config, &config),
        }
    };
    let bytes = |tensor: &TensorEntry| weights.dequantized_bytes(tensor);
    adapter::merge(&MergeJob {
        weights: match &dequantized {
            Some(tensors) => MergeWeights::Dequantized {
                tensors,
                bytes: &bytes,
            },
            None => MergeWeights::Files(&files.weights),
        },
        stored_names: &stored_names,
        layout: &layout,
        adapter: &loaded,
        adaptation: &adaptation,
        other_files: &other_files,
        out: request.out,
        max_shard: adapter::merge::DEFAULT_MAX_SHARD,
    })
}

/// The adapter to merge.
pub(super) fn adapter_of(source: &ModelSource) -> Result<&Path> {
    source.adapter.as_deref().ok_or_else(|| match &source.id {
        ModelId::Directory(dir) if source.recipe.is_some() => Error::new(
            Kind::Usage,
            "the run has no adapter: it trained every weight",
        )
        .hint(format!(
            "`{}` is a model directory as it stands",
            dir.display()
        )),
        _ => Error::new(Kind::Usage, "no adapter was given")
            .hint("give a run directory or `--adapter DIRECTORY`"),
    })
}

/// Copies a config.json: with `tie_word_embeddings` false where the merged embeddings differ, and as that of a model in 16 bits where its
/// weights were quantised.
fn write_config(from: &Path, to: &Path, unties: bool, dequantized: bool) -> Result<()> {
    let mut config = read_json(from)?;
    if unties {
        config["tie_word_embeddings"] = false.into();
    }
    if let (true, Some(config)) = (dequantized, config.as_object_mut()) {
        config.remove("quantization_config");
        let key = if config.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        config.insert(key.into(), "bfloat16".into());
    }
    write_json(&config, to)
}

/// The model card of the merged model: its base and the base's licence. No place on this machine is written into it.
fn card(source: &ModelSource, license: Option<&str>) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut lines = vec!["library_name: transformers".to_string()];
    if let ModelId::Hub(id) = &source.id {
        lines.push(format!("base_model: {}", quoted(id)));
    }
    let base = name_of(&source.id);
    lines.extend(license.map(|name| format!("license: {}", quoted(name))));
    format!(
        "---\n{}\n---\n\n`{base}` with a LoRA adapter merged into its weights by wattune.\n",
        lines.join("\n")
    )
}
