//! `wattune export`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::eval::divergence_text;
use super::model::ModelArguments;
use super::screen::Terminal;
use super::{Common, merge, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::recipe::{self, ModelId, Validation};
use crate::run::{
    self, Divergence, EvaluationJob, ExportFormat, ExportRequest, ModelRequest, ModelSource,
    Quantization, Screen as _,
};
use crate::work::Precision;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Kind of output
    #[arg(long, value_enum)]
    format: ExportFormat,
    /// Quantisation of a GGUF file [default: f16]
    #[arg(long, value_enum, ignore_case = true)]
    quantization: Option<Quantization>,
    /// Write the adapter alone, as a GGUF file for llama.cpp's `--lora`
    #[arg(long)]
    adapter_only: bool,
    /// Records on which the file's predictions are compared with the model's [default: the run's validation files, if it has some]
    #[arg(long, num_args = 1..)]
    data: Vec<PathBuf>,
    /// Compare on the first N records; 0: do not compare
    #[arg(long, default_value_t = 32, value_name = "N")]
    limit: usize,
    /// Output directory; must not exist
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let source = arguments.model.resolve()?;
    if arguments.adapter_only {
        return adapter(arguments, &source, common);
    }
    if arguments.format == ExportFormat::Hf {
        if arguments.quantization.is_some() {
            return Err(Error::new(
                Kind::Usage,
                "a Hugging Face directory keeps the model's dtype",
            )
            .at("--quantization")
            .hint("leave `--quantization` out, or write `--format gguf`"));
        }
        return merge::write(&source, &arguments.out, common);
    }
    let request = ExportRequest {
        source: &source,
        quantization: arguments.quantization.unwrap_or(Quantization::F16),
        out: &arguments.out,
    };
    let mut screen = Terminal::new(common.quiet);
    let written = run::export_gguf(&request, &mut screen)?;
    let compared = compare(arguments, &source, &written.file, &mut screen)?;
    screen.clear();
    let file = written.file.display();
    if common.json {
        return out_json(&json!({
            "out": arguments.out.display().to_string(),
            "file": file.to_string(),
            "quantization": request.quantization.name(),
            "bytes": written.size,
            "tensors": written.tensors,
            "bits_per_weight": written.bits_per_weight,
            "divergence": compared,
        }));
    }
    let compared = compared.map(|found| format!("{}\n", divergence_text(&found)));
    out(&format!(
        "Wrote {} tensors to `{file}` ({}, {:.2} bits a weight).\n{}\n\
         llama-server -m {file}\n\
         ollama create NAME -f {}",
        written.tensors,
        written.size,
        written.bits_per_weight,
        compared.unwrap_or_default(),
        arguments.out.join("Modelfile").display()
    ))
}

/// How far the file's predictions are from the model's; `None` without records.
fn compare(
    arguments: &Arguments,
    source: &ModelSource,
    file: &Path,
    screen: &mut Terminal,
) -> Result<Option<Divergence>> {
    let no_data = arguments.data.is_empty()
        && !source
            .recipe
            .as_ref()
            .is_some_and(|recipe| matches!(recipe.data.validation, Validation::Source(_)));
    if arguments.limit == 0 || no_data {
        return Ok(None);
    }
    let data = match arguments.data.as_slice() {
        [] => run::validation_files(source, screen.downloads())?,
        files => files.to_vec(),
    };
    let written = ModelSource {
        id: ModelId::Directory(file.to_path_buf()),
        file: None,
        adapter: None,
        ..source.clone()
    };
    let device = run::Device::Cpu;
    let request = |source, quantization| ModelRequest {
        source,
        device: &device,
        precision: Precision::F32,
        quantization,
    };
    let of_run = source.recipe.as_ref();
    let job = EvaluationJob {
        model: request(&written, recipe::Quantization::None),
        data,
        options: super::eval::default_options(of_run),
        micro_batch_size: 1,
        limit: Some(arguments.limit),
    };
    let trained_on = of_run.map_or(recipe::Quantization::None, |recipe| {
        recipe.model.quantization
    });
    run::divergence(&job, &request(source, trained_on), screen).map(Some)
}

/// Writes the adapter alone.
fn adapter(arguments: &Arguments, source: &ModelSource, common: Common) -> Result<ExitCode> {
    if arguments.format == ExportFormat::Hf || arguments.quantization.is_some() {
        return Err(Error::new(Kind::Usage, "an adapter alone is written as a GGUF file in f32")
            .at("--adapter-only")
            .hint("write `--format gguf` without `--quantization`; the adapter of a run is a PEFT directory as it stands"));
    }
    let mut screen = Terminal::new(common.quiet);
    let written = run::export_adapter(source, &arguments.out, &mut screen)?;
    screen.clear();
    let file = written.file.display();
    if common.json {
        return out_json(&json!({
            "out": arguments.out.display().to_string(),
            "file": file.to_string(),
            "bytes": written.size,
            "tensors": written.tensors,
        }));
    }
    out(&format!(
        "Wrote {} tensors to `{file}` ({}).\n\nllama-server -m BASE.gguf --lora {file}",
        written.tensors, written.size,
    ))
}
