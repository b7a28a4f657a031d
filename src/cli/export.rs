//! `wattune export`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::model::ModelArguments;
use super::screen::Terminal;
use super::{Common, merge, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::run::{self, ExportFormat, ExportRequest, Quantization};

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
    /// Output directory; must not exist
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let source = arguments.model.resolve()?;
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
        }));
    }
    out(&format!(
        "Wrote {} tensors to `{file}` ({}, {:.2} bits a weight).\n\n\
         llama-server -m {file}\n\
         ollama create NAME -f {}",
        written.tensors,
        written.size,
        written.bits_per_weight,
        arguments.out.join("Modelfile").display()
    ))
}
