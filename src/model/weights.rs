//! A model's tensors: memory-mapped safetensors files held against the architecture, or drawn at random.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use rand_chacha::rand_core::Rng;

use super::architecture::{Architecture, TensorShape};
use crate::error::{Error, Kind, Result};
use crate::random::{Use, stream};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Opened weight files in which every tensor of the architecture was found with its shape.
pub struct Weights {
    files: MmapedSafetensors,
    /// The architecture's name -> the file's.
    names: BTreeMap<String, String>,
}

impl Weights {
    /// Maps the files and checks them: missing, mis-shaped and surplus tensors are all named in one error.
    pub fn open(paths: &[PathBuf], architecture: &Architecture) -> Result<Self> {
        for path in paths {
            check_whole(path)?;
        }
        // SAFETY: the files are mapped read-only; a file that another process truncates meanwhile would fault, as in every
        // memory-mapping loader, and the hub cache never rewrites a blob in place.
        let files = unsafe { MmapedSafetensors::multi(paths) };
        let files = files.map_err(|e| Error::new(Kind::Model, format!("the weight files cannot be read: {e}")))?;
        let found: BTreeMap<String, Vec<usize>> =
            files.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
        let names = names(architecture, &found)?;
        Ok(Self { files, names })
    }

    /// The tensor that the architecture calls `name`, as `dtype` on `device`.
    pub fn get(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(stored) = self.names.get(name) else {
            return Err(Error::new(Kind::Model, format!("the model has no tensor `{name}`")));
        };
        Ok(self.files.load(stored, device)?.to_dtype(dtype)?)
    }
}

/// Refuses a file that is shorter than its own header promises, or is no safetensors file.
fn check_whole(path: &PathBuf) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|e| Error::io("read", path, e))?;
    // SAFETY: mapped read-only for the time of this check.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
    safetensors::SafeTensors::deserialize(&map).map(|_| ()).map_err(|e| {
        Error::new(Kind::Model, "a weight file is damaged or cut short")
            .at(path.display().to_string())
            .value(e.to_string())
            .hint("delete it and download it again")
    })
}

/// Finds each tensor of the architecture among those found in the files.
fn names(architecture: &Architecture, found: &BTreeMap<String, Vec<usize>>) -> Result<BTreeMap<String, String>> {
    // Files saved from the bare decoder lack the prefix `model.`.
    let bare = !found.keys().any(|name| name.starts_with("model."));
    let mut names = BTreeMap::new();
    let mut problems = Vec::new();
    for TensorShape { name, shape } in architecture.tensors() {
        let stored = stored_name(architecture, found, &name, bare);
        match found.get(&stored) {
            None => problems.push(format!("missing: `{name}` {shape:?}")),
            Some(other) if *other != shape => {
                problems.push(format!("`{stored}` has shape {other:?}, config.json says {shape:?}"));
            }
            Some(_) => {
                names.insert(name, stored);
            }
        }
    }
    let known = |name: &str| {
        names.values().any(|stored| stored == name)
            || name.ends_with("rotary_emb.inv_freq")
            || (architecture.tie_word_embeddings && (name == HEAD || name == EMBEDDING))
    };
    problems.extend(
        found.keys().filter(|name| !known(name)).map(|name| format!("surplus: `{name}` is not part of this architecture")),
    );
    if problems.is_empty() {
        return Ok(names);
    }
    const SHOWN: usize = 12;
    let more = problems.len().saturating_sub(SHOWN);
    problems.truncate(SHOWN);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    Err(Error::new(Kind::Model, format!("the weight files do not fit config.json:\n  {}", problems.join("\n  ")))
        .hint("config.json and the weights must come from the same revision of the same model"))
}

fn stored_name(architecture: &Architecture, found: &BTreeMap<String, Vec<usize>>, name: &str, bare: bool) -> String {
    let stored = if bare { name.strip_prefix("model.").unwrap_or(name) } else { name };
    let tied_alias = architecture.tie_word_embeddings && name == EMBEDDING && !found.contains_key(stored);
    if tied_alias { HEAD.to_string() } else { stored.to_string() }
}

/// A tensor of a model trained from scratch, as transformers draws it: norms one, biases zero, all else normal with
/// `initializer_range`. Each has a stream of its own, keyed by seed and name.
pub fn random_tensor(name: &str, shape: &[usize], initializer_range: f64, seed: u64) -> Vec<f32> {
    let count = shape.iter().product();
    if name.ends_with("norm.weight") {
        return vec![1.0; count];
    }
    if name.ends_with(".bias") {
        return vec![0.0; count];
    }
    let mut random = stream(seed, Use::WeightInit, &[], name);
    let mut uniform = move || (f64::from(random.next_u32()) + 0.5) / 4_294_967_296.0;
    // Box and Muller 1958: two independent normal numbers from two uniform ones.
    let mut pairs = std::iter::repeat_with(move || {
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
        [radius * angle.cos(), radius * angle.sin()]
    })
    .flatten();
    pairs.by_ref().take(count).map(|z| (z * initializer_range) as f32).collect()
}
