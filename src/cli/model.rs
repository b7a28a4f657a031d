//! The flags that name a model, shared by the commands that load one.

use std::path::PathBuf;

use crate::error::{Error, Kind, Result};
use crate::run::{Device, ModelRequest};
use crate::work::Precision;

#[derive(Debug, clap::Args)]
pub(super) struct ModelArguments {
    /// Hub id, directory, or embedded:tiny
    #[arg(long)]
    pub(super) model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long, default_value = "main")]
    pub(super) revision: String,
    /// A PEFT adapter's directory
    #[arg(long)]
    pub(super) adapter: Option<PathBuf>,
    /// Compute in f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    pub(super) dtype: String,
    /// Where to compute: cpu, cuda, cuda:N, metal or auto
    #[arg(long, default_value = "auto")]
    pub(super) device: String,
}

impl ModelArguments {
    pub(super) fn request<'a>(&'a self, device: &'a Device) -> Result<ModelRequest<'a>> {
        let precision = match self.dtype.as_str() {
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            "f16" => Precision::F16,
            other => {
                return Err(Error::new(Kind::Usage, "there is no such format")
                    .at("--dtype")
                    .value(other)
                    .rule("f32, bf16 or f16"));
            }
        };
        let (model, revision, adapter) = (
            self.model.as_str(),
            self.revision.as_str(),
            self.adapter.as_deref(),
        );
        Ok(ModelRequest {
            model,
            revision,
            adapter,
            device,
            precision,
        })
    }
}
