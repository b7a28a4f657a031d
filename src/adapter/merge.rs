//! Merges an adapter into a model's weights: a model directory that needs no adapter.
//!
//! Takes the model's safetensors files and LoRA pairs; writes `W' = W + scaling * B A`, computed in f32 (f64 where W is F64) and rounded
//! once to the type of W, one tensor at a time. The bytes of every other tensor stay the same. The directory is created atomically. Knows
//! nothing of architectures.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use crate::error::{Error, Kind, Result};
use crate::files::{DraftDirectory, remove_old_leftovers};
use crate::units::Bytes;

use super::peft::{LoraPair, fail_on_problems};
use super::shards::{
    INDEX_FILE, TensorEntry, header, index_json, plan_shards, read_headers, shard_file_name,
};

/// transformers' size of a weights file (`save_pretrained`'s default `max_shard_size`).
pub const DEFAULT_MAX_SHARD: Bytes = Bytes(50_000_000_000);

/// Inputs and output of a merge.
#[derive(Clone, Copy)]
pub struct MergeJob<'a> {
    /// The model's safetensors files: one, or all shards.
    pub weights: &'a [PathBuf],
    /// Names of the model's tensors -> their names in the files; a name that is not listed is the same there.
    pub stored_names: &'a BTreeMap<String, String>,
    /// The adapter on the model: `LoadedAdapter::attach`.
    pub pairs: &'a [LoraPair<'a>],
    /// Names of weights that are the same tensor in the model, as `["lm_head.weight", "model.embed_tokens.weight"]`.
    pub tied: &'a [[String; 2]],
    /// Writes the model's other files into the new directory: configuration, tokenizer, chat template, licence.
    pub other_files: &'a dyn Fn(&Path) -> Result<()>,
    /// The directory to create.
    pub out: &'a Path,
    /// Most bytes of values in one file.
    pub max_shard: Bytes,
}

/// Content of the merged model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeSummary {
    /// The weights' file names, in order.
    pub files: Vec<String>,
    /// Tensors with a pair added.
    pub merged: usize,
    /// Tensors copied unchanged.
    pub kept: usize,
    /// Bytes of all tensors.
    pub size: Bytes,
}

/// Writes the merged model.
///
/// # Errors
/// A target that exists; a pair whose weight is missing, has another shape or type, or is tied to another; a sum out of the type's
/// range; a file that cannot be read or written. Nothing is left behind then.
pub fn merge(job: &MergeJob) -> Result<MergeSummary> {
    if job.out.exists() {
        return Err(exists(job.out));
    }
    let tensors = read_headers(job.weights)?;
    let pairs = match_pairs(&tensors, job)?;
    let shards = plan_shards(&tensors, job.max_shard);
    if job.out.file_name().is_none() {
        let error = Error::new(
            Kind::Usage,
            "the merged model needs a directory with a name",
        )
        .value(job.out.display().to_string());
        return Err(error.hint("write it as in `--out merged`"));
    }
    if let Some(parent) = job.out.parent() {
        remove_old_leftovers(parent, Some(job.out));
    }
    let draft = DraftDirectory::new(job.out)?;
    let files: Vec<String> = (0..shards.len())
        .map(|number| shard_file_name(number, shards.len()))
        .collect();
    for (name, shard) in files.iter().zip(&shards) {
        write_shard(&draft.path().join(name), shard, &tensors, &pairs, job)?;
    }
    if shards.len() > 1 {
        let index = index_json(&tensors, &shards);
        let path = draft.path().join(INDEX_FILE);
        fs::write(&path, index).map_err(|source| Error::io("write", &path, source))?;
    }
    (job.other_files)(draft.path())?;
    if !draft.install_new()? {
        return Err(exists(job.out));
    }
    Ok(MergeSummary {
        files,
        merged: pairs.len(),
        kept: tensors.len() - pairs.len(),
        size: Bytes(tensors.iter().map(|tensor| tensor.size).sum()),
    })
}

/// The pair of each tensor that has one, by the tensor's index. Every pair without a tensor is named in one error.
fn match_pairs<'a>(
    tensors: &[TensorEntry],
    job: &MergeJob<'a>,
) -> Result<BTreeMap<usize, &'a LoraPair<'a>>> {
    let by_name: BTreeMap<&str, usize> = tensors
        .iter()
        .enumerate()
        .map(|(i, tensor)| (tensor.name.as_str(), i))
        .collect();
    let mut problems = Vec::new();
    let mut assigned = BTreeMap::new();
    for pair in job.pairs {
        let path = &pair.site.path;
        let wanted = format!("{path}.weight");
        if let Some(tie) = job.tied.iter().find(|tie| tie.contains(&wanted)) {
            problems.push(format!(
                "`{path}`: `{}` and `{}` are one tensor, and merging would change both",
                tie[0], tie[1]
            ));
            continue;
        }
        let stored = job.stored_names.get(&wanted).unwrap_or(&wanted);
        match by_name.get(stored.as_str()) {
            None => problems.push(format!("`{path}`: the model's files have no `{wanted}`")),
            Some(index) => match pair_problem(&tensors[*index], pair) {
                Some(why) => problems.push(format!("`{path}`: {why}")),
                None => drop(assigned.insert(*index, pair)),
            },
        }
    }
    fail_on_problems(
        problems,
        "cannot be merged",
        None,
        "merge it into the model it was trained on, unquantised and as safetensors",
    )?;
    Ok(assigned)
}

fn pair_problem(tensor: &TensorEntry, pair: &LoraPair) -> Option<String> {
    let wanted = [pair.site.out_features, pair.site.in_features];
    if tensor.shape != wanted {
        return Some(format!(
            "`{}` has the shape {:?}, not {wanted:?}",
            tensor.name, tensor.shape
        ));
    }
    if pair.a.len() != pair.site.r * wanted[1] || pair.b.len() != pair.site.r * wanted[0] {
        return Some(format!(
            "A and B have {} and {} values, which rank {} does not give",
            pair.a.len(),
            pair.b.len(),
            pair.site.r
        ));
    }
    match tensor.dtype {
        Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => None,
        other => Some(format!(
            "`{}` is stored as {other:?}; F64, F32, F16 and BF16 can be merged",
            tensor.name
        )),
    }
}

fn exists(out: &Path) -> Error {
    Error::new(
        Kind::Usage,
        "the directory for the merged model exists already",
    )
    .at(out.display().to_string())
    .hint("choose another with `--out DIR`, or remove it")
}

fn write_shard(
    path: &Path,
    shard: &[usize],
    tensors: &[TensorEntry],
    pairs: &BTreeMap<usize, &LoraPair>,
    job: &MergeJob,
) -> Result<()> {
    let failed = |source| Error::io("write", path, source);
    let listed: Vec<&TensorEntry> = shard.iter().map(|index| &tensors[*index]).collect();
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    writer.write_all(&header(&listed)?).map_err(failed)?;
    for index in shard {
        let tensor = &tensors[*index];
        let mut values = open_at(&job.weights[tensor.file], tensor)?;
        match pairs.get(index) {
            None => drop(std::io::copy(&mut values, &mut writer).map_err(failed)?),
            Some(pair) => {
                let mut bytes = Vec::with_capacity(tensor.size as usize);
                values
                    .read_to_end(&mut bytes)
                    .map_err(|source| Error::io("read", &job.weights[tensor.file], source))?;
                add_pair(&mut bytes, tensor, pair)?;
                writer.write_all(&bytes).map_err(failed)?;
            }
        }
    }
    let file = writer
        .into_inner()
        .map_err(|source| failed(source.into_error()))?;
    file.sync_all().map_err(failed)
}

/// A reader of the bytes of `tensor`.
fn open_at(path: &Path, tensor: &TensorEntry) -> Result<std::io::Take<File>> {
    let opened = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(tensor.start))?;
        Ok(file.take(tensor.size))
    });
    opened.map_err(|source| Error::io("read", path, source))
}

/// `W + scaling * B A` in place, by rows in parallel.
fn add_pair(bytes: &mut [u8], tensor: &TensorEntry, pair: &LoraPair) -> Result<()> {
    let (columns, r) = (pair.site.in_features, pair.site.r);
    if bytes.is_empty() {
        return Ok(());
    }
    let row_bytes = bytes.len() / pair.site.out_features;
    bytes
        .par_chunks_mut(row_bytes)
        .enumerate()
        .try_for_each(|(row, bytes)| {
            let mut delta = vec![0.0f32; columns];
            for (k, b) in pair.b[row * r..(row + 1) * r].iter().enumerate() {
                for (delta, a) in delta.iter_mut().zip(&pair.a[k * columns..]) {
                    *delta += b * a;
                }
            }
            add_row(bytes, tensor.dtype, &delta, pair.site.scaling as f32)
                .ok_or_else(|| overflow(tensor, row))
        })
}

/// Adds `scale * delta` to a row of stored values, in f64 where these are F64, else in f32; `None` if a sum is not finite.
fn add_row(bytes: &mut [u8], dtype: Dtype, delta: &[f32], scale: f32) -> Option<()> {
    match dtype {
        Dtype::F64 => add_each(bytes, delta, |stored, delta| {
            let sum = f64::from_le_bytes(stored) + f64::from(delta * scale);
            sum.is_finite().then(|| sum.to_le_bytes())
        }),
        Dtype::F32 => add_each(bytes, delta, |stored, delta| {
            let sum = f32::from_le_bytes(stored) + delta * scale;
            sum.is_finite().then(|| sum.to_le_bytes())
        }),
        Dtype::F16 => add_each(bytes, delta, |stored, delta| {
            let sum = f16::from_f32(f16::from_le_bytes(stored).to_f32() + delta * scale);
            sum.is_finite().then(|| sum.to_le_bytes())
        }),
        Dtype::BF16 => add_each(bytes, delta, |stored, delta| {
            let sum = bf16::from_f32(bf16::from_le_bytes(stored).to_f32() + delta * scale);
            sum.is_finite().then(|| sum.to_le_bytes())
        }),
        _ => None,
    }
}

/// Replaces each stored value of `N` bytes by the result of `add`, until one is `None`.
fn add_each<const N: usize>(
    bytes: &mut [u8],
    delta: &[f32],
    add: impl Fn([u8; N], f32) -> Option<[u8; N]>,
) -> Option<()> {
    let stored = bytes.as_chunks_mut::<N>().0;
    for (stored, delta) in stored.iter_mut().zip(delta) {
        *stored = add(*stored, *delta)?;
    }
    Some(())
}

fn overflow(tensor: &TensorEntry, row: usize) -> Error {
    Error::new(Kind::Adapter, format!("`{}` with the adapter holds a value that {:?} cannot", tensor.name, tensor.dtype))
        .at(format!("row {row}"))
        .rule("every merged weight is a finite number")
        .hint("use the adapter beside the model without merging, or merge into a copy of the model stored as BF16 or F32")
}
