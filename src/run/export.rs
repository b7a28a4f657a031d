//! A model, with its adapter merged, as a GGUF file or a Hugging Face directory.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value as Json;

use super::Screen;
use super::architecture::architecture_of;
use super::inference::fetch;
use super::merge::{MergeRequest, merge_model};
use super::model::{read_json, tokenizer_of};
use super::model_source::ModelSource;
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::files::{DraftDirectory, remove_directory, remove_old_leftovers, temporary_path};
use crate::forecast::model_name;
use crate::gguf::modelfile::modelfile;
use crate::gguf::tokenizer::TokenizerFacts;
use crate::gguf::{self, Quantization, TensorInfo, Value, container};
use crate::hub::{ModelFiles, Progress};
use crate::model::{Architecture, Family, Weights};
use crate::ops::StoredFormat;
use crate::recipe::{self, Init, ModelId};
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
    /// Text of the token that ends an answer.
    eos: Option<String>,
    warnings: Vec<String>,
}

/// Writes the model as a GGUF file. An adapter is merged first, into a temporary directory beside `out`.
///
/// # Errors
/// As [`merge_model`]; a model type, tokenizer or rotary embedding that GGUF cannot hold; files that cannot be written.
pub fn export_gguf(request: &ExportRequest<'_>, screen: &mut dyn Screen) -> Result<Exported> {
    if request.out.exists() {
        return Err(exists(request.out));
    }
    let files = fetch(request.source, screen.downloads())?;
    // Of a model with an adapter, this finds before the merge what cannot be exported.
    let model = Model::open(&files, request)?;
    for warning in &model.warnings {
        screen.note(&format!("warning: {warning}"));
    }
    if let Some(parent) = request.out.parent() {
        remove_old_leftovers(parent, Some(request.out));
    }
    if request.source.adapter.is_none() {
        return write_file(&model, request, screen.downloads());
    }
    screen.note("merging the adapter");
    let merged = temporary_path(request.out, "partial");
    let merge = MergeRequest {
        source: request.source,
        out: &merged,
    };
    let exported = merge_model(&merge, screen).and_then(|_| {
        let model = Model::open(&ModelFiles::open(&merged)?, request)?;
        write_file(&model, request, screen.downloads())
    });
    remove_directory(&merged)?;
    exported
}

fn exists(out: &Path) -> Error {
    Error::new(Kind::Usage, "the directory for the export exists already")
        .at(out.display().to_string())
        .hint("choose another with `--out DIR`, or remove it")
}

/// Writes the directory: the file and its Modelfile.
fn write_file(
    model: &Model,
    request: &ExportRequest<'_>,
    progress: &dyn Progress,
) -> Result<Exported> {
    let name = format!("model-{}.gguf", request.quantization.name());
    let infos: Vec<&TensorInfo> = model.tensors.iter().map(|tensor| &tensor.info).collect();
    let draft = DraftDirectory::new(request.out)?;
    write_container(
        &draft.path().join(&name),
        &model.metadata,
        &infos,
        progress,
        |index| {
            let tensor = &model.tensors[index];
            let columns = tensor.info.shape.last().copied().unwrap_or(1);
            tensor
                .info
                .format
                .encode(&model.values(&tensor.source)?, columns)
        },
    )?;
    let modelfile_path = draft.path().join("Modelfile");
    std::fs::write(&modelfile_path, modelfile(&name, model.eos.as_deref()))
        .map_err(|source| Error::io("write", &modelfile_path, source))?;
    install(draft, request.out, &name, &infos)
}

/// Creates the directory `out` with one GGUF file; `values` gives the stored bytes of each tensor.
pub(super) fn write_new(
    out: &Path,
    name: &str,
    metadata: &[(String, Value)],
    infos: &[&TensorInfo],
    progress: &dyn Progress,
    values: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<Exported> {
    if out.exists() {
        return Err(exists(out));
    }
    let draft = DraftDirectory::new(out)?;
    write_container(&draft.path().join(name), metadata, infos, progress, values)?;
    install(draft, out, name, infos)
}

/// Writes a GGUF file.
fn write_container(
    path: &Path,
    metadata: &[(String, Value)],
    infos: &[&TensorInfo],
    progress: &dyn Progress,
    mut values: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let total: usize = infos.iter().map(|info| info.size()).sum();
    let name = path.file_name().unwrap_or_default().display();
    progress.start(&format!("writing {name}"), Some(total as u64));
    let unwritten = |source| Error::io("write", path, source);
    let mut file = File::create(path).map_err(unwritten)?;
    file.write_all(&container::head(metadata, infos)?)
        .map_err(unwritten)?;
    for (index, info) in infos.iter().enumerate() {
        let mut stored = values(index)?;
        container::align(&mut stored);
        file.write_all(&stored).map_err(unwritten)?;
        progress.advance(info.size() as u64);
    }
    file.sync_all().map_err(unwritten)?;
    progress.finish();
    Ok(())
}

/// Gives the directory its name.
fn install(
    draft: DraftDirectory,
    out: &Path,
    name: &str,
    infos: &[&TensorInfo],
) -> Result<Exported> {
    let path = draft.path().join(name);
    let size = std::fs::metadata(&path).map_err(|source| Error::io("read", &path, source))?;
    if !draft.install_new()? {
        return Err(exists(out));
    }
    let elements = infos
        .iter()
        .map(|info| info.shape.iter().product::<usize>());
    let total: usize = infos.iter().map(|info| info.size()).sum();
    Ok(Exported {
        file: out.join(name),
        size: Bytes(size.len()),
        tensors: infos.len(),
        bits_per_weight: 8.0 * total as f64 / elements.sum::<usize>() as f64,
    })
}

impl Model {
    fn open(files: &ModelFiles, request: &ExportRequest<'_>) -> Result<Self> {
        let architecture = architecture_of(
            files,
            Init::Pretrained,
            recipe::Quantization::None,
            &Device::Cpu,
        )?;
        let family = gguf::family(&architecture)?;
        let rows = architecture.vocab_size;
        let tokenizer = tokenizer_of(files, rows, request.source.chat_date())?;
        let json = tokenizer.to_json()?;
        let quantization = request.quantization;
        let text = |text: String| Value::Text(text);
        let mut metadata = family.metadata(&architecture, &read_json(&files.config)?)?;
        let mut add = |key: &str, value| metadata.push((format!("general.{key}"), value));
        add("type", text("model".into()));
        add("name", text(name_of(&request.source.id)));
        add("quantization_version", Value::U32(2));
        add("file_type", Value::U32(quantization.file_type()));
        if let Some(license) = &files.license {
            add("license", text(license.clone()));
        }
        metadata.extend(tokenizer_metadata(&tokenizer, &json, rows)?);
        let warnings = [
            gguf::tokenizer::warning(&json),
            family.warning(&architecture),
        ];
        Ok(Self {
            tensors: plan_tensors(family, &architecture, quantization)?,
            weights: Weights::open(files.require_weights()?, &architecture)?,
            eos: tokenizer.eos().map(|(token, _)| token),
            warnings: warnings.into_iter().flatten().collect(),
            family,
            architecture,
            metadata,
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

/// The file's tensors: the divisors of the rotary frequencies, then the model's in its order.
fn plan_tensors(
    family: &Family,
    architecture: &Architecture,
    quantization: Quantization,
) -> Result<Vec<Planned>> {
    let divisors = family.rope_divisors(architecture);
    let of_rope = divisors.map(|divisors| Planned {
        info: TensorInfo {
            name: "rope_freqs.weight".into(),
            shape: vec![divisors.len()],
            format: StoredFormat::F32,
        },
        source: Source::Values(divisors),
    });
    let mut planned: Vec<Planned> = of_rope.into_iter().collect();
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

fn tokenizer_metadata(
    tokenizer: &Tokenizer,
    json: &Json,
    rows: usize,
) -> Result<Vec<(String, Value)>> {
    let ids = tokenizer.encode("a", true)?.ids;
    let plain = tokenizer.encode("a", false)?.ids;
    let added = ids.len().saturating_sub(plain.len());
    let adds_bos = added > 0 && ids.ends_with(&plain) || added > 1;
    let mut special = tokenizer.special_tokens().clone();
    if let Some((eos, _)) = tokenizer.eos() {
        special.insert("eos_token".into(), eos);
    }
    gguf::tokenizer::metadata(&TokenizerFacts {
        json,
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
        ModelId::Directory(dir) => dir
            .file_name()
            .map_or_else(|| "model".into(), |name| name.display().to_string()),
        id => model_name(id),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The sizes of Llama-3.1-8B in GiB that the README of `llama-quantize` lists (llama.cpp at f364eb6f, MIT).
    #[test]
    fn sizes_of_llama_3_1_8b_are_those_of_published_files() {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": false,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"
            },
        });
        let architecture = Architecture::from_config(&config).unwrap();
        let family = gguf::family(&architecture).unwrap();
        let published = [
            (Quantization::Q8_0, 7.95),
            (Quantization::Q6_K, 6.14),
            (Quantization::Q4_K_M, 4.58),
        ];
        for (quantization, size) in published {
            let tensors = plan_tensors(family, &architecture, quantization).unwrap();
            let bytes: usize = tensors.iter().map(|tensor| tensor.info.size()).sum();
            // The tokenizer in the head of a file takes 8 MB.
            let found = (bytes as f64 + 8e6) / f64::from(1 << 30);
            assert_eq!(
                format!("{found:.2}"),
                format!("{size:.2}"),
                "{quantization:?}"
            );
        }
    }
}
