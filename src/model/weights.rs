//! A model's tensors: safetensors files checked against the architecture, or random values.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use rand_chacha::rand_core::Rng;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::architecture::Architecture;
use super::gguf::{self, Family};
use super::quantized_files;
use super::stored::{StoredTensor, read_at};
use crate::adapter::shards::TensorEntry;
use crate::error::{Error, Kind, Result};
use crate::ops::StoredFormat;
use crate::random::{Purpose, stream};
use crate::text::first_few;

/// Buffers of masks and frequencies in older files, which are no weights.
const BUFFERS: [&str; 6] = [
    "embeddings.position_ids",
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
];
/// Bytes at either end of a tensor that a fingerprint covers.
const SAMPLE: usize = 4096;
/// Bytes of two tensors that are compared at once.
const COMPARED: usize = 1 << 20;

/// Open weight files that hold every tensor of the architecture with its shape.
pub struct Weights {
    files: Vec<(PathBuf, File)>,
    /// Name in the architecture -> location in the files.
    locations: BTreeMap<String, TensorEntry>,
    /// What the files hold besides, by its name there.
    others: BTreeMap<String, TensorEntry>,
    /// Tensors of the architecture whose transposes are stored.
    transposed: BTreeSet<String>,
    architecture: Architecture,
    /// Of a GGUF file.
    gguf: Option<&'static Family>,
}

impl Weights {
    /// Opens the files and checks their headers. Reads no values, except those of a tied head that
    /// is stored beside its embedding.
    ///
    /// # Errors
    /// A damaged or truncated file; missing, mis-shaped and surplus tensors, all in one error; two
    /// different tensors where the architecture has a tied one.
    pub fn open(paths: &[PathBuf], architecture: &Architecture) -> Result<Self> {
        let headers = gguf::headers(paths, architecture)?;
        if architecture.tie_word_embeddings && has_separate_head(architecture, paths, &headers)? {
            let [head, embedding] = architecture.tied_tensors();
            return Err(Error::new(
                Kind::Model,
                "config.json ties the embeddings, but the weight files hold two different ones",
            )
            .value(format!("`{head}` differs from `{embedding}`"))
            .rule("`tie_word_embeddings` = true is for one tensor, or two equal ones")
            .hint("run the command again now that the files are there: the head is then read as stored"));
        }
        let mut stored: BTreeMap<String, TensorEntry> = headers
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
        let found = stored
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shape.clone()))
            .collect();
        let locations = match_tensors(architecture, &found)?
            .into_iter()
            .filter_map(|(name, in_file)| Some((name, stored.remove(&in_file)?)));
        let locations = locations.collect();
        let tensors = architecture.tensors().into_iter();
        let tensors = tensors.filter(|tensor| tensor.transposed);
        let open = |path: &PathBuf| {
            Ok((
                path.clone(),
                File::open(path).map_err(|source| Error::io("read", path, source))?,
            ))
        };
        Ok(Self {
            files: paths.iter().map(open).collect::<Result<_>>()?,
            locations,
            others: stored,
            gguf: Family::of(&architecture.model_type).filter(|_| gguf::is_gguf(paths)),
            transposed: tensors.map(|tensor| tensor.name).collect(),
            architecture: architecture.clone(),
        })
    }

    /// Identifies these weights among others of the same shapes: a digest of every tensor's name,
    /// type, shape, first and last bytes.
    pub fn fingerprint(&self) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        for (name, tensor) in &self.locations {
            hash.update(format!("{name} {:?} {:?} ", tensor.dtype, tensor.shape));
            let (path, file) = &self.files[tensor.file];
            let length = tensor.size.min(SAMPLE as u64);
            for start in [tensor.start, tensor.start + tensor.size - length] {
                let mut bytes = [0; SAMPLE];
                let bytes = &mut bytes[..length as usize];
                read_at(file, bytes, start).map_err(|e| Error::io("read", path, e))?;
                hash.update(bytes);
            }
        }
        Ok(hash.finalize().to_vec())
    }

    /// The tensor `name` of the architecture as `dtype` on `device`, read and converted in one
    /// pass.
    pub fn get(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let parts = self.parts(name);
        if parts.is_empty() {
            return self.stored(name, dtype, device);
        }
        let parts = parts.iter().map(|part| self.get(part, dtype, device));
        let parts = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
        let (experts, columns) = (self.experts(), parts.dims2()?.1);
        Ok(parts.reshape((experts, (), columns))?)
    }

    /// A tensor of the files.
    fn stored(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let source = self.source(name)?;
        if self.gguf.is_none() && source.tensor.format.is_none() {
            return source.tensor(dtype, device);
        }
        let shape = source.tensor.shape.as_slice();
        let values = Tensor::from_vec(self.values(name)?, shape, device)?;
        Ok(values.to_dtype(dtype)?)
    }

    fn experts(&self) -> usize {
        self.architecture.experts.map_or(0, |sizes| sizes.count)
    }

    /// The tensors that the files hold in place of a stack of experts; empty for any other.
    fn parts(&self, name: &str) -> Vec<String> {
        if self.locations.contains_key(name) {
            return Vec::new();
        }
        let names = &self.architecture.names;
        names.expert_parts(name, self.experts())
    }

    /// The values of the tensor `name` in f32, or random ones where the files lack a layer of the
    /// head.
    pub fn values_or_random(&self, name: &str, shape: &[usize], seed: u64) -> Result<Vec<f32>> {
        if self.source(name).is_ok() {
            return self.values(name);
        }
        Ok(random_tensor(&self.architecture, name, shape, seed))
    }

    /// The stored type of the tensor `name` of the architecture.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        let parts = self.parts(name);
        let stored = parts.first().map_or(name, String::as_str);
        Ok(self.source(stored)?.tensor.dtype)
    }

    /// The values of the tensor `name` of the architecture in f32, row-major.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let parts = self.parts(name);
        if !parts.is_empty() {
            let values = parts.iter().map(|part| self.values(part));
            return Ok(values.collect::<Result<Vec<_>>>()?.concat());
        }
        let source = self.source(name)?;
        let mut values = self.decoded(&source)?;
        let Some(family) = self.gguf else {
            return Ok(values);
        };
        if self.architecture.norm_unit_offset && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|weight| *weight -= 1.0);
        }
        let width = source.tensor.shape.get(1).copied().unwrap_or(1);
        Ok(self.in_order(family, name, values, width))
    }

    /// The blocks of the tensor `name` (rows, columns) in `format`: as they are stored, or quantised.
    pub(super) fn blocks(
        &self,
        name: &str,
        format: StoredFormat,
        columns: usize,
    ) -> Result<Vec<u8>> {
        let source = self.source(name)?;
        if source.tensor.format != Some(format) {
            return format.encode(&self.values(name)?, columns);
        }
        let blocks = self.stored_blocks(&source)?;
        Ok(match self.gguf {
            Some(family) => self.in_order(family, name, blocks, format.bytes_of(columns)),
            None => blocks,
        })
    }

    /// The blocks of a quantised tensor in the order of its rows in the files.
    fn stored_blocks(&self, source: &StoredTensor<'_>) -> Result<Vec<u8>> {
        if source.tensor.scales.is_empty() {
            return source.bytes();
        }
        quantized_files::blocks(source.tensor, &|tensor| self.in_file(tensor).bytes())
    }

    /// The tensors of the files, as they are stored.
    fn stored_tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        self.locations.values().chain(self.others.values())
    }

    /// The tensors of the files as a merge writes them, quantised ones in bf16; `None` if the files are safetensors without any.
    pub(crate) fn dequantized_tensors(&self) -> Option<Vec<TensorEntry>> {
        let is_plain = |tensor: &TensorEntry| tensor.format.is_none();
        if self.gguf.is_none() && self.stored_tensors().all(is_plain) {
            return None;
        }
        let written = |tensor: &TensorEntry| match tensor.format {
            None => tensor.clone(),
            Some(_) => TensorEntry {
                dtype: Dtype::BF16,
                size: 2 * tensor.shape.iter().product::<usize>() as u64,
                ..tensor.clone()
            },
        };
        Some(self.stored_tensors().map(written).collect())
    }

    /// The values of one of [`Weights::dequantized_tensors`] as its type stores them.
    pub(crate) fn dequantized_bytes(&self, written: &TensorEntry) -> Result<Vec<u8>> {
        let mut tensors = self.stored_tensors();
        let Some(tensor) =
            tensors.find(|tensor| tensor.start == written.start && tensor.file == written.file)
        else {
            return Err(Error::new(
                Kind::Model,
                format!("the model has no tensor `{}`", written.name),
            ));
        };
        let source = self.in_file(tensor);
        let values = match (self.gguf, tensor.format) {
            (None, None) => return source.bytes(),
            (None, Some(_)) => self.decoded(&source)?,
            (Some(_), _) => self.values(&tensor.name)?,
        };
        let format = match written.dtype {
            Dtype::F32 => StoredFormat::F32,
            Dtype::F16 => StoredFormat::F16,
            _ => StoredFormat::BF16,
        };
        format.encode(&values, 1)
    }

    /// The values of a tensor in f32, its rows in the order of the files.
    fn decoded(&self, source: &StoredTensor<'_>) -> Result<Vec<f32>> {
        let Some(format) = source.tensor.format else {
            return source.f32s();
        };
        let columns = source.tensor.shape.last().copied().unwrap_or(1);
        let rows = source.tensor.shape.iter().product::<usize>() / columns.max(1);
        Ok(format.decode(&self.stored_blocks(source)?, [rows, columns]))
    }

    /// Rows of `width` elements in the order of the architecture.
    fn in_order<T: Copy>(&self, family: &Family, name: &str, rows: Vec<T>, width: usize) -> Vec<T> {
        match family.interleaved_heads(name, &self.architecture) {
            Some(_) => gguf::deinterleave(&rows, width, self.architecture.attention.head_dim),
            None => rows,
        }
    }

    /// The format that the tensor `name` is quantised to.
    pub(super) fn format(&self, name: &str) -> Option<StoredFormat> {
        self.architecture.stored_formats.get(name).copied()
    }

    /// The name in the files of each tensor of the architecture.
    pub fn stored_names(&self) -> BTreeMap<String, String> {
        let names = self.locations.iter();
        names
            .map(|(name, tensor)| (name.clone(), tensor.name.clone()))
            .collect()
    }

    /// A tied head is the embedding's tensor.
    fn source(&self, name: &str) -> Result<StoredTensor<'_>> {
        let [head, table] = self.architecture.tied_tensors();
        let is_tied = self.architecture.tie_word_embeddings && name == head;
        let tied = || self.locations.get(&table).filter(|_| is_tied);
        let Some(tensor) = self.locations.get(name).or_else(tied) else {
            return Err(Error::new(
                Kind::Model,
                format!("the model has no tensor `{name}`"),
            )
            .hint("a layer of the head that the files lack is trained from random values: name it in `modules_to_save` in [adapter]"));
        };
        Ok(StoredTensor {
            transposed: self.transposed.contains(name),
            ..self.in_file(tensor)
        })
    }

    /// `tensor` as its file holds it.
    fn in_file<'a>(&'a self, tensor: &'a TensorEntry) -> StoredTensor<'a> {
        let (path, file) = &self.files[tensor.file];
        StoredTensor {
            path,
            file,
            tensor,
            transposed: false,
        }
    }
}

impl Architecture {
    /// Corrects what config.json states by the weight files: the stored type of the matrices, and
    /// the tie of the embeddings, the formats of quantised tensors. As in transformers 5, a head that is stored beside its embedding
    /// and differs from it is not tied.
    ///
    /// # Errors
    /// A damaged file.
    pub fn correct_by_files(&mut self, paths: &[PathBuf]) -> Result<()> {
        let headers = gguf::headers(paths, self)?;
        let quantised = headers
            .iter()
            .filter_map(|tensor| Some((tensor.name.clone(), tensor.format?)));
        self.stored_formats = quantised.collect();
        let decoder = headers
            .iter()
            .filter(|tensor| !self.names.is_of_tower(&tensor.name) && tensor.format.is_none());
        let mut matrices = decoder.filter(|tensor| tensor.shape.len() > 1);
        self.stored_in_bf16 = matrices.all(|tensor| tensor.dtype == Dtype::BF16);
        if self.tie_word_embeddings && has_separate_head(self, paths, &headers)? {
            self.tie_word_embeddings = false;
        }
        Ok(())
    }
}

/// Whether the files hold a head that differs from the embedding.
fn has_separate_head(
    architecture: &Architecture,
    paths: &[PathBuf],
    tensors: &[TensorEntry],
) -> Result<bool> {
    let [head, embedding] = architecture.tied_tensors();
    let find = |wanted: &str| {
        let other = architecture.names.other_name(wanted);
        let named = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
        named(wanted).or_else(|| named(&other))
    };
    let (Some(head), Some(embedding)) = (find(&head), find(&embedding)) else {
        return Ok(false);
    };
    if (head.dtype, &head.shape) != (embedding.dtype, &embedding.shape) {
        return Ok(true);
    }
    let open = |tensor: &TensorEntry| {
        let path = &paths[tensor.file];
        File::open(path).map_err(|source| Error::io("read", path, source))
    };
    let files = [open(head)?, open(embedding)?];
    let mut buffers = [vec![0; COMPARED], vec![0; COMPARED]];
    for offset in (0..head.size).step_by(COMPARED) {
        let length = (head.size - offset).min(COMPARED as u64) as usize;
        for ((file, tensor), buffer) in files.iter().zip([head, embedding]).zip(&mut buffers) {
            read_at(file, &mut buffer[..length], tensor.start + offset)
                .map_err(|source| Error::io("read", &paths[tensor.file], source))?;
        }
        if buffers[0][..length] != buffers[1][..length] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Maps the names of the architecture's tensors to their names in the files. `found`: the shape of
/// each tensor in the files.
fn match_tensors(
    architecture: &Architecture,
    found: &BTreeMap<String, Vec<usize>>,
) -> Result<BTreeMap<String, String>> {
    let tied = architecture.tied_tensors();
    let tied = tied
        .iter()
        .flat_map(|name| [name.clone(), architecture.names.other_name(name)]);
    let tied: Vec<String> = tied.filter(|_| architecture.tie_word_embeddings).collect();
    let head: Vec<String> = architecture
        .head_linears()
        .iter()
        .map(|layer| format!("{}.", layer.name))
        .collect();
    let is_head = |name: &str| {
        architecture.classifier().is_some() && head.iter().any(|path| name.starts_with(path))
    };
    let mut names = BTreeMap::new();
    let mut problems = Vec::new();
    for (name, shape) in stored_tensors(architecture, found) {
        let stored = stored_name(architecture, found, &name);
        match found.get(&stored) {
            // Trained from random values; `Weights::frozen` refuses it.
            None if is_head(&name) => {}
            None => problems.push(format!("missing: `{name}` {shape:?}")),
            Some(other) => {
                if *other != shape {
                    let says = if is_head(&name) {
                        "the labels need"
                    } else {
                        "config.json says"
                    };
                    problems.push(format!("`{stored}` has shape {other:?}, {says} {shape:?}"));
                }
                names.insert(name, stored);
            }
        }
    }
    let known = |name: &str| {
        names.values().any(|stored| stored == name)
            || BUFFERS.iter().any(|suffix| name.ends_with(suffix))
            || architecture.names.is_unread(name)
            || tied.iter().any(|tied| tied == name)
            || architecture.names.is_of_tower(name)
    };
    problems.extend(
        found
            .keys()
            .filter(|name| !known(name))
            .map(|name| format!("surplus: `{name}` is not part of this architecture")),
    );
    if problems.is_empty() {
        return Ok(names);
    }
    const SHOWN: usize = 12;
    Err(Error::new(
        Kind::Model,
        format!(
            "the weight files do not fit config.json:\n  {}",
            first_few(problems, SHOWN).join("\n  ")
        ),
    )
    .hint("config.json and the weights must come from the same revision of the same model"))
}

/// The architecture's tensors as the files hold them, with their shapes there: a stack of experts may
/// be stored as a matrix for each.
fn stored_tensors(
    architecture: &Architecture,
    found: &BTreeMap<String, Vec<usize>>,
) -> Vec<(String, Vec<usize>)> {
    let count = architecture.experts.map_or(0, |sizes| sizes.count);
    let mut tensors = Vec::new();
    for tensor in architecture.tensors() {
        let parts = architecture.names.expert_parts(&tensor.name, count);
        let stacked = found.contains_key(&stored_name(architecture, found, &tensor.name));
        let [experts, rows, columns] = tensor.shape[..] else {
            tensors.push((tensor.name.clone(), tensor.stored_shape()));
            continue;
        };
        if stacked {
            tensors.push((tensor.name, tensor.shape));
            continue;
        }
        let rows = experts * rows / parts.len().max(1);
        tensors.extend(parts.into_iter().map(|part| (part, vec![rows, columns])));
    }
    tensors
}

/// The name in the files of the tensor `name` of the architecture. A tied embedding may be stored
/// as the head.
fn stored_name(
    architecture: &Architecture,
    found: &BTreeMap<String, Vec<usize>>,
    name: &str,
) -> String {
    let [head, embedding] = architecture.tied_tensors();
    let is_tied = architecture.tie_word_embeddings && name == embedding;
    let alias = is_tied.then_some(head);
    // Files of TensorFlow's time name the parts of a norm otherwise.
    let older = [
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
    ];
    let older = older.into_iter().find_map(|(new, old)| {
        let path = name.strip_suffix(new)?;
        Some(format!("{path}{old}"))
    });
    let names = std::iter::once(name.to_string()).chain(alias).chain(older);
    let mut names = names.flat_map(|name| {
        let other = architecture.names.other_name(&name);
        [name, other]
    });
    let stored = names.find(|name| found.contains_key(name));
    stored.unwrap_or_else(|| name.to_string())
}

/// Initial values of a tensor for training from scratch, as in transformers: scales of norms one, biases
/// zero, all others normal with standard deviation `initializer_range`; in GPT-2's layers that add to
/// the residual stream, of which there are two a block, that by the root of their number. Each tensor
/// has a separate random stream, keyed by seed and name.
pub fn random_tensor(
    architecture: &Architecture,
    name: &str,
    shape: &[usize],
    seed: u64,
) -> Vec<f32> {
    let count = shape.iter().product();
    if name.ends_with(".weight") && shape.len() == 1 {
        let scale = if architecture.norm_unit_offset {
            0.0
        } else {
            1.0
        };
        return vec![scale; count];
    }
    if name.ends_with(".bias") {
        return vec![0.0; count];
    }
    let mut deviation = architecture.initializer_range;
    if architecture.transposed_linears && name.ends_with("c_proj.weight") {
        deviation /= (2.0 * architecture.num_hidden_layers as f64).sqrt();
    }
    normal(name, count, deviation, seed)
}

/// `count` normal values with this standard deviation, by the random stream of `name`.
pub(super) fn normal(name: &str, count: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let mut random = stream(seed, Purpose::WeightInit, &[], name);
    let mut uniform = move || (f64::from(random.next_u32()) + 0.5) / 4_294_967_296.0;
    // Box and Muller 1958: two independent normal variates from two uniform ones.
    let pair = move || {
        let radius = (-2.0 * uniform().ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform();
        [radius * angle.cos(), radius * angle.sin()]
    };
    std::iter::repeat_with(pair)
        .flatten()
        .take(count)
        .map(|z| (z * deviation) as f32)
        .collect()
}
