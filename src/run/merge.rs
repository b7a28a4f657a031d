//! Merging of an adapter into its model, as a model directory.

use std::path::Path;

use candle_core::Device;

use super::Screen;
use super::inference::{ModelRequest, fetch};
use super::model::{copy_companions, copy_file};
use super::prepare::architecture_of;
use crate::adapter::{self, MergeJob, MergeSummary};
use crate::error::Result;
use crate::files::write_atomic;
use crate::hub::ModelFiles;
use crate::model::Weights;
use crate::recipe::Init;
use crate::report::files::MODEL_CARD;
use crate::work::Precision;

/// A merge.
pub struct MergeRequest<'a> {
    /// The base model.
    pub model: &'a str,
    /// Its revision on the hub.
    pub revision: &'a str,
    /// The adapter's directory.
    pub adapter: &'a Path,
    /// The directory to create.
    pub out: &'a Path,
}

/// Merges W + scaling B A in f32, rounded once to the file's dtype.
///
/// # Errors
/// A model or adapter that cannot be loaded, or that do not fit each other.
pub fn merge_model(request: &MergeRequest<'_>, screen: &mut dyn Screen) -> Result<MergeSummary> {
    let device = Device::Cpu;
    let model = ModelRequest {
        model: request.model,
        revision: request.revision,
        adapter: Some(request.adapter),
        device: &device,
        precision: Precision::F32,
    };
    let files = fetch(&model, screen.downloads())?;
    let architecture = architecture_of(&files, Init::Pretrained, &device)?;
    // Refuses weights that do not fit config.json before anything is written.
    Weights::open(&files.weights, &architecture)?;
    let loaded = adapter::load(request.adapter)?;
    let modules = architecture.modules();
    let output_embedding = architecture.output_embedding();
    let pairs = loaded.attach(&modules, output_embedding)?;
    for warning in loaded.warnings(&modules, output_embedding)? {
        screen.note(&format!("warning: {warning}"));
    }
    let tied = if architecture.tie_word_embeddings {
        vec![[
            "lm_head.weight".to_string(),
            "model.embed_tokens.weight".to_string(),
        ]]
    } else {
        Vec::new()
    };
    let other_files = |dir: &Path| {
        copy_companions(&files, dir)?;
        write_atomic(&dir.join(MODEL_CARD), card(request, &files))?;
        copy_file(&files.config, &dir.join("config.json"))
    };
    adapter::merge(&MergeJob {
        weights: &files.weights,
        pairs: &pairs,
        tied: &tied,
        other_files: &other_files,
        out: request.out,
        max_shard: adapter::merge::DEFAULT_MAX_SHARD,
    })
}

/// The model card of the merged model: its base and the base's licence.
fn card(request: &MergeRequest<'_>, files: &ModelFiles) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let license = files.license.as_deref();
    let license = license.map_or(String::new(), |name| format!("license: {}\n", quoted(name)));
    format!(
        "---\nlibrary_name: transformers\nbase_model: {}\n{license}---\n\n`{}` with the LoRA adapter `{}` merged into its weights by wattune.\n",
        quoted(&files.id),
        files.id,
        request.adapter.display(),
    )
}
