//! A model, with its adapter merged, as a GGUF file or a Hugging Face directory.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value as Json;

use super::inference::fetch;
use super::merge::{MergeRequest, merge_model};
use super::model::tokenizer_of;
use super::model_source::ModelSource;
use super::prepare::architecture_of;
use super::{Screen, read_text};
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::export::modelfile::modelfile;
use crate::export::tokenizer::TokenizerFacts;
use crate::export::{self, Family, Format, Quantization, TensorInfo, Value};
use crate::files::{DraftDirectory, remove_directory, remove_old_leftovers, temporary_path};
use crate::hub::{ModelFiles, Progress};
use crate::model::{Architecture, Weights};
use crate::recipe::{Init, ModelId};
use crate::units::Bytes;

/// A kind of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// A Hugging Face directory: config.json, safetensors, tokenizer.
    Hf,
    /// One GGUF file, with a Modelfile for Ollama.
    Gguf,
}

/// A model to write.
pub struct ExportRequest<'a> {
    /// The model and its adapter.
    pub source: &'a ModelSource,
    /// The quantisation of a GGUF file.
    pub quantization: Quantization,
    /// The directory to create.
    pub out: &'a Path,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// The GGUF file.
    pub file: PathBuf,
    /// Its size.
    pub size: Bytes,
    /// Its tensors.
    pub tensors: usize,
    /// Bits that a weight takes on average.
    pub bits_per_weight: f64,
}

/// A tensor of the file, and where its values come from.
struct Planned {
    info: TensorInfo,
    source: Source,
}

/// Where a tensor's values come from.
enum Source {
    /// The model's tensor of this name.
    Model(String),
    /// Here.
    Values(Vec<f32>),
}

/// A model with everything that goes into the file.
struct Model {
    family: &'static Family,
    architecture: Architecture,
    weights: Weights,
    metadata: Vec<(String, Value)>,
    tensors: Vec<Planned>,
}

/// Writes the model as a GGUF file. An adapter is merged first, into a temporary directory beside `out`.
///
/// # Errors
/// As [`merge_model`]; a model type, tokenizer or rotary embedding that GGUF cannot hold; files that cannot be written.
pub fn export_gguf(request: &ExportRequest<'_>, screen: &mut dyn Screen) -> Result<Exported> {
    if request.out.exists() {
        return Err(
            Error::new(Kind::Usage, "the directory for the export exists already")
                .at(request.out.display().to_string())
                .hint("choose another with `--out DIR`, or remove it"),
        );
    }
    let files = fetch(request.source, screen.downloads())?;
    let architecture = architecture_of(&files, Init::Pretrained, &Device::Cpu)?;
    let tokenizer = tokenizer_of(&files, architecture.vocab_size, request.source.chat_date())?;
    let warnings = [
        export::tokenizer::warning(&tokenizer.to_json()?),
        export::family(&architecture)?.warning(&architecture),
    ];
    for warning in warnings.into_iter().flatten() {
        screen.note(&format!("warning: {warning}"));
    }
    if let Some(parent) = request.out.parent() {
        remove_old_leftovers(parent, Some(request.out));
    }
    if request.source.adapter.is_none() {
        return write_file(&files, &tokenizer, request, screen.downloads());
    }
    // What cannot be exported is found before the merge.
    Model::open(&files, &tokenizer, request)?;
    screen.note("merging the adapter");
    let merged = temporary_path(request.out, "partial");
    let merge = MergeRequest {
        source: request.source,
        out: &merged,
    };
    let exported = merge_model(&merge, screen).and_then(|_| {
        write_file(
            &ModelFiles::open(&merged)?,
            &tokenizer,
            request,
            screen.downloads(),
        )
    });
    remove_directory(&merged)?;
    exported
}

/// Writes the directory: the file and its Modelfile.
fn write_file(
    files: &ModelFiles,
    tokenizer: &Tokenizer,
    request: &ExportRequest<'_>,
    progress: &dyn Progress,
) -> Result<Exported> {
    let model = Model::open(files, tokenizer, request)?;
    let name = format!("model-{}.gguf", request.quantization.name());
    let draft = DraftDirectory::new(request.out)?;
    let path = draft.path().join(&name);
    let unwritten = |source| Error::io("write", &path, source);
    let total: usize = model.tensors.iter().map(|tensor| tensor.info.size()).sum();
    progress.start(&format!("writing {name}"), Some(total as u64));
    let file = File::create(&path).map_err(unwritten)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    model.write(&mut out, progress)?;
    let file = out.into_inner().map_err(|e| unwritten(e.into_error()))?;
    file.sync_all().map_err(unwritten)?;
    let size = Bytes(file.metadata().map_err(unwritten)?.len());
    let stops: Vec<String> = tokenizer
        .eos()
        .into_iter()
        .map(|(token, _)| token)
        .collect();
    let modelfile_path = draft.path().join("Modelfile");
    std::fs::write(&modelfile_path, modelfile(&name, &stops))
        .map_err(|source| Error::io("write", &modelfile_path, source))?;
    progress.finish();
    if !draft.install_new()? {
        return Err(
            Error::new(Kind::Usage, "the directory for the export exists already")
                .at(request.out.display().to_string()),
        );
    }
    let weights: usize = model
        .tensors
        .iter()
        .map(|tensor| tensor.info.shape.iter().product::<usize>())
        .sum();
    Ok(Exported {
        file: request.out.join(name),
        size,
        tensors: model.tensors.len(),
        bits_per_weight: 8.0 * total as f64 / weights as f64,
    })
}

impl Model {
    fn open(
        files: &ModelFiles,
        tokenizer: &Tokenizer,
        request: &ExportRequest<'_>,
    ) -> Result<Self> {
        let architecture = architecture_of(files, Init::Pretrained, &Device::Cpu)?;
        let family = export::family(&architecture)?;
        let config: Json = serde_json::from_str(&read_text(&files.config)?)
            .map_err(|e| Error::new(Kind::Model, format!("config.json is not JSON: {e}")))?;
        let quantization = request.quantization;
        let mut metadata = family.metadata(&architecture, &config)?;
        metadata.push(("general.type".into(), Value::Text("model".into())));
        metadata.push((
            "general.name".into(),
            Value::Text(name_of(&request.source.id)),
        ));
        metadata.push(("general.quantization_version".into(), Value::U32(2)));
        metadata.push((
            "general.file_type".into(),
            Value::U32(quantization.file_type()),
        ));
        if let Some(license) = &files.license {
            metadata.push(("general.license".into(), Value::Text(license.clone())));
        }
        metadata.extend(tokenizer_metadata(tokenizer, architecture.vocab_size)?);
        Ok(Self {
            tensors: plan_tensors(family, &architecture, quantization)?,
            weights: Weights::open(files.require_weights()?, &architecture)?,
            family,
            architecture,
            metadata,
        })
    }

    fn write(&self, out: &mut impl Write, progress: &dyn Progress) -> Result<()> {
        let infos: Vec<TensorInfo> = self
            .tensors
            .iter()
            .map(|tensor| tensor.info.clone())
            .collect();
        let mut sources = self.tensors.iter().map(|tensor| &tensor.source);
        // An error of the values passes through the writer's.
        let failed = Cell::new(None);
        let written = export::container::write(out, &self.metadata, &infos, |info| {
            progress.advance(info.size() as u64);
            let values = sources.next().map(|source| self.values(source));
            let stored = values
                .unwrap_or(Ok(Vec::new()))
                .and_then(|values| info.format.encode(&values));
            stored.map_err(|error| {
                failed.set(Some(error));
                io::Error::other("values")
            })
        });
        written.map_err(|source| {
            let error = failed.take();
            error.unwrap_or_else(|| {
                Error::new(
                    Kind::Io,
                    format!("the GGUF file cannot be written: {source}"),
                )
            })
        })
    }

    fn values(&self, source: &Source) -> Result<Vec<f32>> {
        match source {
            Source::Values(values) => Ok(values.clone()),
            Source::Model(name) => {
                let values = self.weights.values(name)?;
                Ok(self.family.convert(name, values, &self.architecture))
            }
        }
    }
}

/// The file's tensors: those of the rotary embedding, then the model's in its order.
fn plan_tensors(
    family: &Family,
    architecture: &Architecture,
    quantization: Quantization,
) -> Result<Vec<Planned>> {
    let of_rope = |(name, divisors): (&str, Vec<f32>)| Planned {
        info: TensorInfo {
            name: name.into(),
            shape: vec![divisors.len()],
            format: Format::F32,
        },
        source: Source::Values(divisors),
    };
    let rope = family.rope_tensors(architecture);
    let mut planned: Vec<Planned> = rope.into_iter().map(of_rope).collect();
    for tensor in architecture.tensors() {
        let (name, role) = family.tensor(&tensor.name, architecture).ok_or_else(|| {
            Error::new(Kind::Model, "a tensor has no name in GGUF").value(tensor.name.clone())
        })?;
        planned.push(Planned {
            info: TensorInfo {
                name,
                format: quantization.format(&tensor.shape, role),
                shape: tensor.shape,
            },
            source: Source::Model(tensor.name),
        });
    }
    Ok(planned)
}

fn tokenizer_metadata(tokenizer: &Tokenizer, rows: usize) -> Result<Vec<(String, Value)>> {
    let special = tokenizer.special_tokens();
    let ids = tokenizer.encode("a", true)?.ids;
    let plain = tokenizer.encode("a", false)?.ids;
    let added = ids.len().saturating_sub(plain.len());
    let adds_bos = added > 0 && ids.ends_with(&plain) || added > 1;
    let mut special = special.clone();
    if let Some((eos, _)) = tokenizer.eos() {
        special.insert("eos_token".into(), eos);
    }
    export::tokenizer::metadata(&TokenizerFacts {
        json: &tokenizer.to_json()?,
        special: &special,
        chat_template: tokenizer.chat_template(),
        adds_bos,
        adds_eos: added > usize::from(adds_bos),
        rows,
    })
}

/// A name for the model, without a place on this machine.
pub(super) fn name_of(id: &ModelId) -> String {
    match id {
        ModelId::Hub(id) => id.clone(),
        ModelId::Directory(dir) => dir
            .file_name()
            .map_or_else(|| "model".into(), |name| name.display().to_string()),
        ModelId::Embedded(name) => format!("embedded:{name}"),
    }
}
