//! `adapter inspect`: what an adapter's files hold, and which programs load them.
//!
//! Takes a directory, or `adapter_config.json` alone; reads any PEFT method's files. Knows nothing of models.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::units::Bytes;

use super::config::{CONFIG_FILE, InitWeights, OneOrMany, PeftConfig};
use super::directory::{WEIGHTS_FILE, WeightsFile, load_config};
use super::keys;
use super::options::Bias;
use super::peft::{base_embedding, check};
use super::portability::{Verdict, portability};
use super::unsupported::unsupported_settings;

/// An adapter's content.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The method, with its variants.
    pub kind: String,
    /// Its configuration.
    pub config: PeftConfig,
    /// Trained values: all tensors but the base embeddings that PEFT also saves with LoRA on them (`save_embedding_layers`).
    pub parameters: usize,
    /// Bytes of all tensors.
    pub bytes: Bytes,
    /// The tensors, sorted by name.
    pub tensors: Vec<TensorInfo>,
    /// Whether other programs load it.
    pub portability: Vec<Verdict>,
    /// Why wattune does not load it; empty: it does.
    pub problems: Vec<String>,
    /// Keys that have no effect.
    pub notes: Vec<String>,
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its stored type, such as `F32`.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

/// Reads the adapter at `path`.
///
/// # Errors
/// A configuration that cannot be read, and a damaged weights file. Missing weights are a problem of the result.
pub fn inspect(path: &Path) -> Result<Inspection> {
    if path.is_file() {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let config = PeftConfig::parse(&text, path)?;
        let mut problems = unsupported_settings(&config);
        problems.push(format!("a configuration alone holds no weights: name the directory of `{CONFIG_FILE}` and `{WEIGHTS_FILE}`"));
        return Ok(Inspection::new(config, Vec::new(), problems));
    }
    let config = load_config(path)?;
    let file = match WeightsFile::read(path) {
        Ok(file) => file,
        Err(error) => {
            let mut problems = unsupported_settings(&config);
            problems.push(error.what().to_string());
            return Ok(Inspection::new(config, Vec::new(), problems));
        }
    };
    let tensors = file.tensors()?.into_iter();
    let tensors = tensors.map(|(name, view)| (name, view.dtype(), view.shape().to_vec()));
    let checked = check(config.clone(), &file)?;
    Ok(Inspection::new(config, tensors.collect(), checked.problems))
}

impl Inspection {
    fn new(
        config: PeftConfig,
        tensors: Vec<(String, Dtype, Vec<usize>)>,
        problems: Vec<String>,
    ) -> Self {
        let names: Vec<&str> = tensors.iter().map(|tensor| tensor.0.as_str()).collect();
        let trained = tensors
            .iter()
            .filter(|tensor| base_embedding(&tensor.0).is_none());
        let count = |tensor: &(String, Dtype, Vec<usize>)| tensor.2.iter().product::<usize>();
        let bytes = tensors
            .iter()
            .map(|tensor| count(tensor) * tensor.1.bitsize() / 8);
        let unknown = config.unknown.iter().map(|key| keys::unknown(key));
        Self {
            kind: kind(&config),
            parameters: trained.map(count).sum(),
            bytes: Bytes(bytes.sum::<usize>() as u64),
            portability: portability(&config, &names),
            notes: unknown.chain(keys::ignored(&config.variants)).collect(),
            problems,
            tensors: tensors
                .into_iter()
                .map(|(name, dtype, shape)| TensorInfo {
                    name,
                    dtype: format!("{dtype:?}"),
                    shape,
                })
                .collect(),
            config,
        }
    }

    /// The ranks of its modules, ascending.
    pub fn ranks(&self) -> Vec<usize> {
        let patterns = self.config.rank_pattern.0.iter().map(|(_, r)| *r);
        let mut ranks: Vec<usize> = patterns.chain([self.config.r]).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// `target_modules` in words.
    pub fn targets(&self) -> String {
        match &self.config.target_modules {
            Some(OneOrMany::One(text)) => text.clone(),
            Some(OneOrMany::Many(names)) => names.join(", "),
            None => "none".into(),
        }
    }
}

/// The method and its variants, comma-separated.
fn kind(config: &PeftConfig) -> String {
    if config.peft_type.as_deref() != Some("LORA") {
        let other = config.peft_type.clone();
        return other.unwrap_or_else(|| "no `peft_type`".into());
    }
    let saved = config.modules_to_save.as_ref();
    let init = match &config.init_lora_weights {
        InitWeights::Named(name) => Some(name.clone()),
        InitWeights::Plain(_) => None,
    };
    let mut parts = vec!["LoRA".to_string()];
    for (used, part) in [
        (config.use_rslora, "rsLoRA"),
        (config.use_dora, "DoRA"),
        (config.lora_bias, "bias on B"),
        (config.bias != Bias::None, "trained biases"),
        (
            saved.is_some_and(|names| !names.is_empty()),
            "modules trained in full",
        ),
        (
            config.trainable_token_indices.is_some(),
            "trained token rows",
        ),
    ] {
        parts.extend(used.then(|| part.to_string()));
    }
    parts.extend(init.map(|name| format!("initialised by {name}")));
    parts.join(", ")
}
