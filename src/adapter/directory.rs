//! An adapter's directory: its configuration and its weights file, unchecked.
//!
//! Takes a directory; returns the configuration and the tensors of the file. A directory without them is refused with the place of
//! the nearest one. Knows nothing of the meaning of tensors.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::{Error, Kind, Result};

use super::config::{CONFIG_FILE, PeftConfig};

/// File name of the weights in an adapter's directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The bytes of a weights file.
pub(super) struct WeightsFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl WeightsFile {
    /// Reads the file of the directory `dir`.
    ///
    /// # Errors
    /// A file that is missing or cannot be read.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(WEIGHTS_FILE);
        let bytes = fs::read(&path).map_err(|source| missing_weights(dir, &path, source))?;
        Ok(Self { path, bytes })
    }

    /// Its tensors, sorted by name.
    ///
    /// # Errors
    /// A file that is no safetensors file.
    pub(super) fn tensors(&self) -> Result<Vec<(String, TensorView<'_>)>> {
        let file = SafeTensors::deserialize(&self.bytes).map_err(|source| {
            Error::new(
                Kind::Adapter,
                format!("`{WEIGHTS_FILE}` is damaged or no safetensors file: {source}"),
            )
            .at(self.path.display().to_string())
            .hint("fetch the file again")
        })?;
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(tensors)
    }
}

/// Reads `adapter_config.json` of the directory `dir`.
pub fn load_config(dir: &Path) -> Result<PeftConfig> {
    let path = dir.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|source| {
        if source.kind() != std::io::ErrorKind::NotFound {
            return Error::io("read", &path, source);
        }
        let error = Error::new(Kind::Adapter, format!("there is no `{CONFIG_FILE}`"))
            .at(dir.display().to_string());
        match adapter_below(dir) {
            Some(inner) => error.hint(format!(
                "there is one in `{}`: name that directory",
                inner.display()
            )),
            None => error.hint(
                "name the directory that PEFT's save_pretrained, or a run's `adapter/`, wrote",
            ),
        }
    })?;
    PeftConfig::parse(&text, &path)
}

/// The first directory below `dir` with an adapter: PEFT saves an adapter not named "default" in a subdirectory.
fn adapter_below(dir: &Path) -> Option<PathBuf> {
    let mut inner: Vec<_> = fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    inner.sort();
    inner
        .into_iter()
        .find(|path| path.join(CONFIG_FILE).is_file())
}

fn missing_weights(dir: &Path, path: &Path, source: std::io::Error) -> Error {
    if source.kind() != std::io::ErrorKind::NotFound {
        return Error::io("read", path, source);
    }
    if dir.join("adapter_model.bin").exists() {
        return Error::new(Kind::Adapter, "the adapter's weights are a pickle, which can run code when it is read")
            .at(dir.join("adapter_model.bin").display().to_string())
            .rule(format!("the weights are in `{WEIGHTS_FILE}`"))
            .hint(
                "convert it in that directory: python -c \"import torch, safetensors.torch as s; \
                 s.save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True, \
                 map_location='cpu').items()}, 'adapter_model.safetensors', metadata={'format': 'pt'})\"",
            );
    }
    Error::new(Kind::Adapter, format!("there is no `{WEIGHTS_FILE}`"))
        .at(dir.display().to_string())
        .hint("copy the file beside `adapter_config.json`; sharded adapters must be joined first")
}

/// Little-endian values as f32, or none if `dtype` is not a float of 16 or 32 bits.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let words = bytes.as_chunks().0.iter().copied();
    let halves = bytes.as_chunks().0.iter().copied();
    match dtype {
        Dtype::F32 => Some(words.map(f32::from_le_bytes).collect()),
        Dtype::F16 => Some(
            halves
                .map(|b| half::f16::from_le_bytes(b).to_f32())
                .collect(),
        ),
        Dtype::BF16 => Some(
            halves
                .map(|b| half::bf16::from_le_bytes(b).to_f32())
                .collect(),
        ),
        _ => None,
    }
}
