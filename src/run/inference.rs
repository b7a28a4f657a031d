//! A model, with or without an adapter, ready to evaluate or generate.

use std::path::Path;

use candle_core::Device;

use super::machine::check_precision;
use super::model::{fetch_weights, find_model, tokenizer_of};
use super::trainee::decoder_with_adapter;
use crate::adapter::{self, LoadedAdapter, Site};
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::hub::{ModelFiles, Progress};
use crate::model::{Architecture, Decoder, Weights};
use crate::ops::Parameters;
use crate::recipe::ModelId;
use crate::work::Precision;

/// Which model, which adapter, how to compute.
pub struct ModelRequest<'a> {
    /// Hub id, directory or `embedded:NAME`.
    pub model: &'a str,
    /// Branch, tag or commit of a hub model.
    pub revision: &'a str,
    /// A PEFT adapter's directory.
    pub adapter: Option<&'a Path>,
    /// Where to compute.
    pub device: &'a Device,
    /// In which format.
    pub precision: Precision,
}

/// A loaded model.
pub(super) struct Loadout {
    pub(super) architecture: Architecture,
    pub(super) tokenizer: Tokenizer,
    pub(super) decoder: Decoder,
    /// Keeps the adapter's values alive.
    _parameters: Parameters,
}

/// The id that a command line gives.
pub(super) fn model_id(text: &str) -> Result<ModelId> {
    ModelId::parse(text, Path::new("")).ok_or_else(|| {
        Error::new(Kind::Usage, "this is no model")
            .value(text)
            .rule("a hub id `owner/name`, a directory, or `embedded:NAME`")
            .hint("for example `--model HuggingFaceTB/SmolLM2-135M` or `--model ./my-model`")
    })
}

/// Finds a model's files, its weights included.
pub(super) fn fetch(request: &ModelRequest<'_>, progress: &dyn Progress) -> Result<ModelFiles> {
    let id = model_id(request.model)?;
    let mut files = find_model(&id, request.revision, progress)?;
    fetch_weights(&id, &mut files, progress)?;
    Ok(files)
}

pub(super) fn load(request: &ModelRequest<'_>, progress: &dyn Progress) -> Result<Loadout> {
    check_precision(request.device, request.precision)?;
    let files = fetch(request, progress)?;
    let architecture = Architecture::from_file(&files.config)?;
    let tokenizer = tokenizer_of(&files)?;
    let weights = Weights::open(&files.weights, &architecture)?;
    let loaded = request.adapter.map(adapter::load).transpose()?;
    let (sites, parameters) = adapter_values(loaded.as_ref(), &architecture, request.device)?;
    let decoder = decoder_with_adapter(
        &architecture,
        &weights,
        request.precision,
        &sites,
        &parameters,
        request.device,
    )?;
    Ok(Loadout {
        architecture,
        tokenizer,
        decoder,
        _parameters: parameters,
    })
}

/// What a model gives whose weights hold infinities, or what is not a number.
pub(super) fn not_finite(what: &str) -> Error {
    Error::new(Kind::Model, format!("the model's {what} is not finite"))
        .rule("weights are finite numbers")
        .hint("the weights may be damaged: fetch or convert them again; with `--adapter`, try the model without it")
}

fn adapter_values(
    loaded: Option<&LoadedAdapter>,
    architecture: &Architecture,
    device: &Device,
) -> Result<(Vec<Site>, Parameters)> {
    let mut tensors = Vec::new();
    let mut sites = Vec::new();
    for fitted in loaded
        .map(|loaded| loaded.attach(&architecture.modules()))
        .transpose()?
        .unwrap_or_default()
    {
        let site = fitted.site;
        tensors.push((
            format!("{}.a", site.path),
            vec![site.r, site.in_features],
            fitted.a.to_vec(),
        ));
        tensors.push((
            format!("{}.b", site.path),
            vec![site.out_features, site.r],
            fitted.b.to_vec(),
        ));
        sites.push(site);
    }
    if tensors.is_empty() {
        // A buffer without numbers is not a tensor candle can make.
        tensors.push(("none".to_string(), vec![1], vec![0.0]));
    }
    Ok((sites, Parameters::new(tensors, device)?))
}
