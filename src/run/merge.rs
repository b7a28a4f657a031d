//! Merging of an adapter into its model, as a model directory.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;

use super::Screen;
use super::export::name_of;
use super::inference::{architecture_for, fetch};
use super::model::{copy_companions, copy_file, read_json, write_json};
use super::model_source::ModelSource;
use super::task::write_labels;
use crate::adapter::shards::TensorEntry;
use crate::adapter::{self, Adaptation, MergeJob, MergeSummary, MergeWeights};
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::model::{Architecture, Weights};
use crate::recipe::{ModelId, Quantization};
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
    let architecture = architecture_for(request.source, &files, Quantization::None, &device)?;
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
    check_head(&architecture, &stored_names, &adaptation)?;
    let other_files = |dir: &Path| {
        copy_companions(&files, dir)?;
        write_atomic(
            &dir.join(MODEL_CARD),
            card(request.source, files.license.as_deref()),
        )?;
        let config = dir.join("config.json");
        let is_changed =
            adaptation.unties || dequantized.is_some() || architecture.classifier().is_some();
        match is_changed {
            true => write_config(
                &files.config,
                &config,
                &architecture,
                adaptation.unties,
                dequantized.is_some(),
            ),
            false => copy_file(&files.config, &config),
        }
    };
    let bytes = |tensor: &TensorEntry| weights.dequantized_bytes(tensor);
    let other_head = |name: &str| architecture.names.is_unread(name);
    let is_classifier = architecture.classifier().is_some();
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
        other_head: is_classifier.then_some(&other_head),
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

/// Refuses a classifier whose head neither the model nor the adapter holds.
fn check_head(
    architecture: &Architecture,
    stored_names: &BTreeMap<String, String>,
    adaptation: &Adaptation,
) -> Result<()> {
    let trained = |name: &String| adaptation.copies.iter().any(|copy| copy.tensor == *name);
    let mut tensors = architecture.tensors().into_iter().map(|tensor| tensor.name);
    let missing = tensors.find(|name| {
        let is_tied = architecture.tie_word_embeddings;
        !is_tied && !stored_names.contains_key(name) && !trained(name)
    });
    missing.map_or(Ok(()), |name| {
        Err(Error::new(
            Kind::Adapter,
            "neither the model nor the adapter has the head",
        )
        .value(name)
        .hint("name the model that the adapter was trained on with `--model`"))
    })
}

/// Copies a config.json: with `tie_word_embeddings` false where the merged embeddings differ, as that of a model in 16 bits where its
/// weights were quantised, and with the class, labels and problem of a classifier.
fn write_config(
    from: &Path,
    to: &Path,
    architecture: &Architecture,
    unties: bool,
    dequantized: bool,
) -> Result<()> {
    let mut config = read_json(from)?;
    write_labels(architecture, &mut config);
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
