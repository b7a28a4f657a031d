//! `place`: a model or a run as served shapes by stored format, and what serves each; nothing is loaded.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use clap::ValueEnum;

use super::architecture::architecture_of;
use super::directory::RunDirectory;
use super::model::find_model;
use super::model_source::{ModelSelection, ModelSource};
use crate::adapter::config::CONFIG_FILE;
use crate::energy::profile::DeviceKind;
use crate::energy::{Computing, DeviceRef, OperatingPoint, Profile};
use crate::error::{Error, Kind, Result};
use crate::forecast::place::{Candidates, Placement, StoredModel};
use crate::forecast::split::{Link, SplitRequest, splits};
use crate::forecast::{model_name, place};
use crate::gguf::Quantization;
use crate::gguf::quantization::Role;
use crate::hub::Progress;
use crate::measure::machine::memory;
use crate::model::{Architecture, ServedShape};
use crate::ops::StoredFormat;
use crate::recipe::{Init, Quantization as Loaded};
use crate::units::Seconds;
use crate::work::Precision;

/// Devices from a desk to a data centre.
const DEVICES: [&str; 6] = [
    "auto",
    "raspberry-pi-5",
    "nvidia-jetson-agx-orin-64gb",
    "nvidia-rtx-4090",
    "nvidia-l4",
    "nvidia-h100-sxm5-80gb",
];
const FORMATS: [&str; 3] = ["bf16", "q8_0", "q4_k_m"];
const OPERATING_POINTS: [&str; 3] = ["none", "80 %", "60 %"];
const BATCHES: [usize; 3] = [1, 8, 32];
/// The format of a model that is quantised already.
const AS_STORED: &str = "stored";

/// What is placed, and among what; empty lists take the defaults.
#[derive(Debug, Clone, Default)]
pub struct PlaceRequest {
    /// Hub id, directory with config.json at least, GGUF file, `embedded:NAME`, run directory or adapter directory.
    pub model: String,
    /// Names of device profiles, `auto`, or profile files.
    pub devices: Vec<String>,
    /// As [`OperatingPoint`] reads them.
    pub operating_points: Vec<String>,
    /// Names of stored formats.
    pub formats: Vec<String>,
    /// Requests that run together.
    pub batches: Vec<usize>,
    /// Tokens of a request's prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer.
    pub generated_tokens: usize,
    /// Seconds a request may take.
    pub deadlines: Vec<f64>,
    /// The profile of a server that later blocks may run on.
    pub server: Option<String>,
    /// The link to it.
    pub link: String,
    /// Blocks that have to stay on the device.
    pub keep_on_device: usize,
}

/// Places a model.
///
/// # Errors
/// Unknown names, a model that generates nothing, a request longer than the model's positions.
pub fn place_model(request: &PlaceRequest, progress: &dyn Progress) -> Result<Placement> {
    let source = source(&request.model)?;
    let files = find_model(
        &source.id,
        &source.revision,
        source.file.as_deref(),
        progress,
    )?;
    let architecture = architecture_of(&files, Init::Pretrained, Loaded::None, &Device::Cpu)?;
    check(&architecture, request)?;
    let candidates = candidates(request)?;
    let formats = formats(request, &architecture);
    let stored = formats
        .into_iter()
        .map(|name| Ok((stored_as(&architecture, &name)?, name)));
    let stored: Vec<(Architecture, String)> = stored.collect::<Result<_>>()?;
    let shapes: Vec<_> = (stored.iter())
        .map(|(a, _)| |precision: Precision| served(a, precision, 0..a.num_hidden_layers))
        .collect();
    let serves: Vec<_> = (stored.iter())
        .map(|(_, format)| {
            |device: &Profile, batch: usize| serve(request, &source, device, format, batch)
        })
        .collect();
    let models: Vec<StoredModel<'_>> = (stored.iter().zip(&shapes).zip(&serves))
        .map(|(((_, format), shape), serve)| StoredModel {
            format: format.clone(),
            shape,
            serve,
        })
        .collect();
    let mut rows = place::place(&models, &candidates);
    let mut statements = Vec::new();
    if let Some(server) = &request.server {
        let server = device(server)?;
        let link = Link::parse(&request.link)?;
        for device in candidates
            .devices
            .iter()
            .filter(|device| device.name != server.name)
        {
            for (a, format) in &stored {
                let found = splits(
                    &SplitRequest {
                        device,
                        server: &server,
                        link: &link,
                        keep_on_device: request.keep_on_device,
                        blocks: a.num_hidden_layers,
                        format,
                        serve: serve(request, &source, &server, format, 1),
                        part: &|precision, blocks| served(a, precision, blocks),
                    },
                    &candidates,
                );
                rows.extend(found.rows);
                statements.push(format!(
                    "{} and {}, {format}: {}",
                    device.name, server.name, found.statement
                ));
            }
        }
    }
    let name = model_name(&source.id);
    Ok(Placement::new(
        name,
        architecture.parameters(),
        rows,
        &candidates,
        statements,
    ))
}

/// A run, an adapter, or a model by its id.
fn source(model: &str) -> Result<ModelSource> {
    let path = Path::new(model);
    let is_run = RunDirectory::open(path).is_ok() || path.join(CONFIG_FILE).is_file();
    let selection = ModelSelection {
        run: is_run.then_some(path),
        model: (!is_run).then_some(model),
        ..ModelSelection::default()
    };
    selection.resolve()
}

fn check(architecture: &Architecture, request: &PlaceRequest) -> Result<()> {
    if architecture.classifier().is_some() {
        return Err(
            Error::new(Kind::Usage, "a classifier generates no tokens to place")
                .value(request.model.as_str())
                .rule("a model that generates text")
                .hint("`wattune plan` counts the energy of an evaluation"),
        );
    }
    let (prompt, generated) = (request.prompt_tokens, request.generated_tokens);
    let most = architecture.max_position_embeddings;
    let batches = request.batches.iter().all(|batch| *batch > 0);
    if prompt > 0 && generated > 0 && batches && prompt + generated <= most {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, "the model cannot answer such requests")
        .value(format!("{prompt} prompt and {generated} generated tokens"))
        .rule(format!("one of each at least, at most {most} positions together, and batches of one request at least"))
        .hint("set `--prompt-tokens`, `--generated-tokens` and `--batch`"))
}

fn candidates(request: &PlaceRequest) -> Result<Candidates> {
    let or = |given: &[String], usual: &[&str]| -> Vec<String> {
        if given.is_empty() {
            usual.iter().map(|name| name.to_string()).collect()
        } else {
            given.to_vec()
        }
    };
    let point = |text: &String| {
        text.parse::<OperatingPoint>().map_err(|rule| {
            Error::new(Kind::Usage, "this is no operating point")
                .at("--operating-point")
                .value(text)
                .rule(rule)
                .hint("write `--operating-point '60 %'`")
        })
    };
    let deadline = |seconds: &f64| {
        if seconds.is_finite() && *seconds > 0.0 {
            return Ok(Seconds(*seconds));
        }
        Err(Error::new(Kind::Usage, "this is no deadline")
            .at("--deadline")
            .value(seconds.to_string())
            .rule("seconds, more than zero")
            .hint("write `--deadline 2.5`"))
    };
    let devices = or(&request.devices, &DEVICES);
    let points = or(&request.operating_points, &OPERATING_POINTS);
    Ok(Candidates {
        devices: devices
            .iter()
            .map(|name| device(name))
            .collect::<Result<_>>()?,
        operating_points: points.iter().map(point).collect::<Result<_>>()?,
        batches: if request.batches.is_empty() {
            BATCHES.to_vec()
        } else {
            request.batches.clone()
        },
        prompt: request.prompt_tokens,
        generated: request.generated_tokens,
        deadlines: request
            .deadlines
            .iter()
            .map(deadline)
            .collect::<Result<_>>()?,
    })
}

/// The profile of this name; this machine's processor has this machine's memory.
fn device(name: &str) -> Result<Profile> {
    let reference: DeviceRef = name.parse().unwrap_or_else(|_| DeviceRef::Named {
        name: name.to_string(),
        cores: None,
    });
    let mut profile =
        Profile::resolve(&reference, Computing::Cpu).map_err(|e| e.at("--devices"))?;
    if matches!(reference, DeviceRef::Auto) {
        profile.memory = memory().map(|(_, all)| all);
    }
    Ok(profile)
}

fn formats(request: &PlaceRequest, architecture: &Architecture) -> Vec<String> {
    if !request.formats.is_empty() {
        return request.formats.clone();
    }
    if !architecture.stored_formats.is_empty() {
        return vec![AS_STORED.to_string()];
    }
    FORMATS.map(str::to_string).to_vec()
}

/// The served shape of some blocks; a cache of 16-bit keys and values, as servers keep it.
fn served(a: &Architecture, precision: Precision, blocks: std::ops::Range<usize>) -> ServedShape {
    ServedShape::of_blocks(a, precision, blocks).with_cache_of(Precision::F16)
}

/// The architecture with every weight in the format of this name.
fn stored_as(architecture: &Architecture, name: &str) -> Result<Architecture> {
    let mut a = architecture.clone();
    if name == AS_STORED && !a.stored_formats.is_empty() {
        return Ok(a);
    }
    let linears = match name {
        "nf4" => Some(StoredFormat::NF4),
        "int8" => Some(StoredFormat::INT8),
        _ => None,
    };
    let quantization = match linears {
        Some(_) => Quantization::BF16,
        None => Quantization::from_str(name, true).map_err(|_| unknown_format(name))?,
    };
    let formats = a.tensors().into_iter().map(|tensor| {
        let format = quantization.format(&tensor.shape, role(&a, &tensor.name));
        (tensor.name, format)
    });
    a.stored_formats = formats.collect::<BTreeMap<_, _>>();
    if let Some(format) = linears {
        a.quantize_linears(format)?;
    }
    Ok(a)
}

fn unknown_format(name: &str) -> Error {
    let names = Quantization::value_variants().iter();
    let names = names.map(|format| format.name().to_lowercase());
    let names: Vec<String> = names.chain(["nf4".into(), "int8".into()]).collect();
    Error::new(Kind::Usage, "weights have no such format")
        .at("--format")
        .value(name)
        .rule(names.join(", "))
        .hint("write `--format q4_k_m`")
}

/// What a tensor is for, as far as llama.cpp's choice of formats depends on it.
fn role(a: &Architecture, name: &str) -> Role {
    let [head, embed_tokens] = a.tied_tensors();
    if name == head || (a.tie_word_embeddings && name == embed_tokens) {
        return Role::Output;
    }
    let sensitive = [".v_proj.weight", ".down_proj.weight"];
    match a.names.layer_of(name) {
        Some(layer) if sensitive.iter().any(|end| name.ends_with(end)) => Role::Sensitive {
            layer,
            layers: a.num_hidden_layers,
        },
        _ => Role::Other,
    }
}

/// The command that serves the model in this format on this device.
fn serve(
    request: &PlaceRequest,
    source: &ModelSource,
    device: &Profile,
    format: &str,
    batch: usize,
) -> String {
    let model = &request.model;
    let name = Path::new(model).file_name();
    let name = name.map_or(model.clone(), |name| name.to_string_lossy().into_owned());
    let is_run = source.adapter.is_some();
    let given = if is_run {
        model.clone()
    } else {
        format!("--model {model}")
    };
    let (merge, merged) = if is_run {
        (
            format!("wattune merge {given} --out {name}-merged && "),
            format!("{name}-merged"),
        )
    } else {
        (String::new(), model.clone())
    };
    let gpu = device.kind == DeviceKind::Gpu;
    match format {
        AS_STORED => format!("llama-server -m {model} -np {batch}"),
        "f32" | "bf16" | "f16" if gpu => {
            let dtype = match format {
                "f32" => "float32",
                "f16" => "float16",
                _ => "bfloat16",
            };
            format!("{merge}vllm serve {merged} --dtype {dtype} --max-num-seqs {batch}")
        }
        "nf4" | "int8" if gpu => {
            format!("{merge}vllm serve {merged} --quantization bitsandbytes --max-num-seqs {batch}")
        }
        "nf4" | "int8" => format!("wattune generate {given} --quantization {format} --prompt TEXT"),
        _ => format!(
            "wattune export {given} --format gguf --quantization {format} --out {name}-{format} && llama-server -m {name}-{format}/*.gguf -np {batch}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_by_format_are_llama_cpps_from_config_json_alone() {
        // Llama-3.1-8B in GiB (ggml-org/llama.cpp, tools/quantize/README.md): F16 14.96, Q8_0 7.95, Q6_K 6.14, Q4_K_M 4.58.
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": false,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        let architecture = Architecture::from_config(&config).unwrap();
        for (format, gib) in [
            ("f16", "14.96"),
            ("q8_0", "7.95"),
            ("q6_k", "6.14"),
            ("q4_k_m", "4.58"),
        ] {
            let stored = stored_as(&architecture, format).unwrap();
            let shape = served(&stored, Precision::Bf16, 0..32);
            let size = shape.weight_bytes as f64 / (1u64 << 30) as f64;
            assert_eq!(format!("{size:.2}"), gib, "{format}");
        }
        let error = stored_as(&architecture, "q3").unwrap_err().to_string();
        assert!(error.contains("q4_k_m") && error.contains("nf4"), "{error}");
    }
}
