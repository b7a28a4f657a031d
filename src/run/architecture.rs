//! The architecture that a command computes with: config.json, corrected by the weight files, and the formats of its weights.

use candle_core::Device;

use crate::error::{Error, Kind, Result};
use crate::hub::ModelFiles;
use crate::model::Architecture;
use crate::ops::StoredFormat;
use crate::recipe::{Init, Quantization};

/// A model's architecture for `device`, with quantised linear layers, corrected by its weight files where they are there and read:
/// a GPU keeps weights in the compute dtype, whatever they are stored in.
pub(super) fn architecture_of(
    files: &ModelFiles,
    init: Init,
    quantization: Quantization,
    device: &Device,
) -> Result<Architecture> {
    let mut architecture = Architecture::from_file(&files.config)?;
    if init == Init::Pretrained
        && let Ok(weights) = files.require_weights()
    {
        architecture.correct_by_files(weights)?;
    }
    architecture.stored_in_bf16 &= device.is_cpu();
    if !architecture.stored_formats.is_empty() {
        check_device(device)?;
    }
    if let Some(format) = stored_format(quantization) {
        let of_key = |error: Error| error.key("model.quantization");
        check_device(device).map_err(of_key)?;
        architecture.quantize_linears(format).map_err(of_key)?;
    }
    Ok(architecture)
}

fn stored_format(quantization: Quantization) -> Option<StoredFormat> {
    match quantization {
        Quantization::None => None,
        Quantization::Nf4 => Some(StoredFormat::NF4),
        Quantization::Int8 => Some(StoredFormat::INT8),
        Quantization::Q8_0 => Some(StoredFormat::Q8_0),
        Quantization::Q4_0 => Some(StoredFormat::Q4_0),
    }
}

fn check_device(device: &Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Model,
        "quantised weights are computed with on the CPU alone",
    )
    .hint("add `--device cpu`; or write `quantization = \"none\"` in [model] and name a model that is not quantised"))
}
