//! Model options shared by several commands.

use std::path::PathBuf;

use crate::run::{Device, DeviceChoice, ModelRequest};
use crate::work::Precision;

#[derive(Debug, clap::Args)]
pub(super) struct ModelArguments {
    /// Model: hub id, directory, or embedded:tiny
    #[arg(long)]
    pub(super) model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long, default_value = "main")]
    pub(super) revision: String,
    /// PEFT adapter directory
    #[arg(long)]
    pub(super) adapter: Option<PathBuf>,
    /// Compute precision
    #[arg(long, default_value = "f32")]
    pub(super) dtype: Precision,
    #[command(flatten)]
    pub(super) device: DeviceArgument,
}

/// `--device`, the same for every command that computes.
#[derive(Debug, clap::Args)]
pub(super) struct DeviceArgument {
    /// Compute device: cpu, cuda, cuda:N, metal, metal:N or auto
    #[arg(long, default_value = "auto")]
    pub(super) device: DeviceChoice,
}

impl ModelArguments {
    pub(super) fn request<'a>(&'a self, device: &'a Device) -> ModelRequest<'a> {
        ModelRequest {
            model: &self.model,
            revision: &self.revision,
            adapter: self.adapter.as_deref(),
            device,
            precision: self.dtype,
        }
    }
}
