//! Model options shared by several commands.

use std::path::PathBuf;

use crate::error::Result;
use crate::recipe::Quantization;
use crate::run::{Device, DeviceChoice, ModelRequest, ModelSelection, ModelSource};
use crate::work::Precision;

/// The model of `eval`, `generate` and `merge`.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArguments {
    /// Run directory, or a PEFT adapter's directory: the base model and the adapter come from it
    run: Option<PathBuf>,
    /// Model: hub id, directory, or embedded:tiny; replaces the base model of a run or adapter
    #[arg(long)]
    model: Option<String>,
    /// Branch, tag or commit of a hub model [default: that of the run or adapter, else main]
    #[arg(long)]
    revision: Option<String>,
    /// GGUF file of a hub model or model directory
    #[arg(long, value_name = "FILE")]
    model_file: Option<String>,
    /// PEFT adapter directory; names the base model where `--model` does not
    #[arg(long)]
    adapter: Option<PathBuf>,
}

/// `--device` and `--dtype`.
#[derive(Debug, clap::Args)]
pub(super) struct ComputeArguments {
    /// Compute precision [default: the run's, else f32]
    #[arg(long)]
    dtype: Option<Precision>,
    /// Stores the linear layers in fewer bits [default: as the run did, else none]
    #[arg(long)]
    quantization: Option<Quantization>,
    #[command(flatten)]
    device: DeviceArgument,
}

/// `--device`, the same for every command that computes.
#[derive(Debug, clap::Args)]
pub(super) struct DeviceArgument {
    /// Compute device: cpu, cuda, cuda:N, metal, metal:N or auto
    #[arg(long, default_value = "auto")]
    pub(super) device: DeviceChoice,
}

impl ModelArguments {
    pub(super) fn resolve(&self) -> Result<ModelSource> {
        let selection = ModelSelection {
            run: self.run.as_deref(),
            model: self.model.as_deref(),
            revision: self.revision.as_deref(),
            file: self.model_file.as_deref(),
            adapter: self.adapter.as_deref(),
        };
        selection.resolve()
    }
}

impl ComputeArguments {
    pub(super) fn open(&self) -> Result<Device> {
        Ok(self.device.device.open()?.0)
    }

    pub(super) fn request<'a>(
        &self,
        source: &'a ModelSource,
        device: &'a Device,
    ) -> ModelRequest<'a> {
        let of_run = source.recipe.as_ref().map(|recipe| &recipe.model);
        let dtype = self.dtype.or(of_run.map(|model| model.dtype));
        let quantization = self.quantization.or(of_run.map(|model| model.quantization));
        ModelRequest {
            source,
            device,
            precision: dtype.unwrap_or(Precision::F32),
            quantization: quantization.unwrap_or(Quantization::None),
        }
    }
}
