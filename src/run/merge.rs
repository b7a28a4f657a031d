//! Merging of an adapter into its model, as a model directory.

use std::path::Path;

use candle_core::Device;

use super::Screen;
use super::architecture::architecture_of;
use super::export::name_of;
use super::inference::fetch;
use super::model::{copy_companions, copy_file, read_json, write_json};
use super::model_source::ModelSource;
use crate::adapter::{self, MergeJob, MergeSummary};
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::model::{Weights, is_gguf};
use crate::recipe::{Init, ModelId, Quantization};
use crate::report::files::MODEL_CARD;

/// A merge.
pub struct MergeRequest<'a> {
    /// The base model and its adapter.
    pub source: &'a ModelSource,
    /// The directory to create.
    pub out: &'a Path,
}

/// Merges W + scaling B A and the weights trained in full, in f32, rounded once to the file's dtype.
///
/// # Errors
/// A model or adapter that cannot be loaded, or that do not fit each other.
pub fn merge_model(request: &MergeRequest<'_>, screen: &mut dyn Screen) -> Result<MergeSummary> {
    let device = Device::Cpu;
    let adapter = adapter_of(request.source)?;
    let files = fetch(request.source, screen.downloads())?;
    let architecture = architecture_of(&files, Init::Pretrained, Quantization::None, &device)?;
    if is_gguf(&files.weights) {
        return Err(Error::new(Kind::Usage, "merging into a GGUF file is not supported")
            .value(files.weights[0].display().to_string())
            .hint("name the model that it was made from with `--model ID|DIRECTORY`, and merge into that"));
    }
    if architecture.classifier().is_some() {
        return Err(
            Error::new(Kind::Usage, "merging the adapter of a classifier is not supported")
                .value(architecture.class.clone())
                .hint("use the adapter as it is: `--adapter DIRECTORY` of `wattune predict`, or PEFT's `merge_and_unload`"),
        );
    }
    // Refuses weights that do not fit config.json before anything is written.
    let stored_names = Weights::open(&files.weights, &architecture)?.stored_names();
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
        if adaptation.unties {
            return write_untied_config(&files.config, &config);
        }
        copy_file(&files.config, &config)
    };
    adapter::merge(&MergeJob {
        weights: &files.weights,
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
fn adapter_of(source: &ModelSource) -> Result<&Path> {
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

/// Copies a config.json with `tie_word_embeddings` false: the merged embeddings differ.
fn write_untied_config(from: &Path, to: &Path) -> Result<()> {
    let mut config = read_json(from)?;
    config["tie_word_embeddings"] = false.into();
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
