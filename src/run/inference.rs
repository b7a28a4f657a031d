//! Loading of a model, with or without an adapter, for evaluation and generation.

use candle_core::Device;

use super::Screen;
use super::architecture::architecture_of;
use super::machine::check_precision;
use super::model::{end_ids, fetch_weights, find_model, tokenizer_of};
use super::model_source::ModelSource;
use super::task::{classified, classified_by, generic_labels, named_problem_type, saved_head};
use crate::adapter::{self, Adaptation};
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::hub::{ModelFiles, Progress};
use crate::model::{AdapterStart, Architecture, Decoder, TrainableModel, Weights, initial_values};
use crate::ops::Parameters;
use crate::recipe::{Init, Quantization};
use crate::work::Precision;

/// A model to run, and where.
pub struct ModelRequest<'a> {
    /// The model and its adapter.
    pub source: &'a ModelSource,
    /// Compute device.
    pub device: &'a Device,
    /// Compute dtype.
    pub precision: Precision,
    /// How the linear layers are stored.
    pub quantization: Quantization,
}

/// A model whose weights are not read yet.
pub(super) struct OpenedModel {
    files: ModelFiles,
    pub(super) architecture: Architecture,
    pub(super) tokenizer: Tokenizer,
    /// Ids that end a generation besides the tokenizer's eos.
    pub(super) end_ids: Vec<u32>,
}

/// The weights of a model, with an adapter's.
pub(super) struct LoadedModel {
    pub(super) decoder: Decoder,
    /// Owns the adapter's values, which the decoder reads.
    _parameters: Parameters,
}

/// A model's files, weights included.
pub(super) fn fetch(source: &ModelSource, progress: &dyn Progress) -> Result<ModelFiles> {
    let mut files = find_model(
        &source.id,
        &source.revision,
        source.file.as_deref(),
        progress,
    )?;
    fetch_weights(&mut files, progress)?;
    Ok(files)
}

/// Reads configuration and tokenizer of a model; shows the tokenizer's warnings.
pub(super) fn open(request: &ModelRequest<'_>, screen: &mut dyn Screen) -> Result<OpenedModel> {
    check_precision(request.device, request.precision)?;
    let source = request.source;
    let files = find_model(
        &source.id,
        &source.revision,
        source.file.as_deref(),
        screen.downloads(),
    )?;
    let architecture = architecture(request, &files)?;
    let tokenizer = tokenizer_of(&files, architecture.vocab_size, source.chat_date())?;
    for warning in tokenizer.warnings() {
        screen.note(&format!("warning: {warning}"));
    }
    Ok(OpenedModel {
        end_ids: end_ids(&files, architecture.vocab_size)?,
        files,
        architecture,
        tokenizer,
    })
}

/// The architecture by config.json; a classifier has the classes of its run, of its adapter, or its own.
fn architecture(request: &ModelRequest<'_>, files: &ModelFiles) -> Result<Architecture> {
    let (quantization, device) = (request.quantization, request.device);
    architecture_for(request.source, files, quantization, device)
}

/// [`architecture`] of the model and adapter of `source`.
pub(super) fn architecture_for(
    source: &ModelSource,
    files: &ModelFiles,
    quantization: Quantization,
    device: &Device,
) -> Result<Architecture> {
    let mut architecture = architecture_of(files, Init::Pretrained, quantization, device)?;
    let adapter = source.adapter.as_deref();
    let by_recipe = source.recipe.as_ref().map(|recipe| recipe.model.task);
    let wanted = match (by_recipe.and_then(classified), adapter) {
        (None, Some(adapter)) => classified_by(adapter)?,
        (by_recipe, _) => by_recipe,
    };
    if let Some(classified) = wanted {
        architecture.classify(classified, generic_labels(2))?;
    }
    if architecture.classifier().is_none() {
        return Ok(architecture);
    }
    if let Some(recipe) = &source.recipe {
        architecture.set_labels(&recipe.data.labels);
        if let Some(problem_type) = named_problem_type(recipe.model.problem_type) {
            architecture.set_problem_type(problem_type);
        }
    } else if let Some(saved) = adapter.map(saved_head).transpose()?.flatten() {
        saved.apply(&mut architecture);
    }
    Ok(architecture)
}

/// Reads the weights of an opened model and the adapter; shows the parts of the adapter's configuration that have no effect.
pub(super) fn load(
    opened: &mut OpenedModel,
    request: &ModelRequest<'_>,
    screen: &mut dyn Screen,
) -> Result<LoadedModel> {
    fetch_weights(&mut opened.files, screen.downloads())?;
    opened.architecture = architecture(request, &opened.files)?;
    let architecture = &opened.architecture;
    let weights = Weights::open(&opened.files.weights, architecture)?;
    let loaded = request
        .source
        .adapter
        .as_deref()
        .map(adapter::load)
        .transpose()?;
    let layout = architecture.layout();
    let mut adaptation = Adaptation::default();
    if let Some(adapter) = &loaded {
        adaptation = adapter.adaptation(&layout)?;
        let beside = architecture.names.tower_modules();
        for warning in adapter.warnings(&layout, beside.as_deref())? {
            screen.note(&format!("warning: {warning}"));
        }
    }
    let model = TrainableModel::with_adapters(
        architecture,
        &adaptation,
        &|name, shape| weights.frozen(name, shape, request.precision, request.device),
        initial_values(&weights, loaded.as_ref(), &AdapterStart::default())?,
        request.device,
    )?;
    Ok(LoadedModel {
        decoder: model.decoder,
        _parameters: model.parameters,
    })
}

/// The error about output that is not finite.
pub(super) fn not_finite(what: &str) -> Error {
    Error::new(Kind::Model, format!("the model's {what} is not finite"))
        .rule("weights are finite numbers")
        .hint("the weights may be damaged: fetch or convert them again; with `--adapter`, try the model without it")
}
