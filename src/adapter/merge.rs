//! Merges an adapter into a model's weights: a model directory that needs no adapter.
//!
//! Takes the model's safetensors files and what an adapter changes; writes `W' = W + scaling * B A` and the weights trained in
//! full, computed in f32 (f64 where W is F64) and rounded once to the type of W, one tensor at a time. The bytes of every other
//! tensor stay the same. The directory is created atomically. Knows nothing of architectures.

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

use super::adaptation::{Adaptation, ModelLayout, Part};
use super::peft::{LoadedAdapter, fail_on_problems};
use super::shards::{
    INDEX_FILE, TensorEntry, header, index_json, plan_shards, read_headers, shard_file_name,
    transpose,
};
use super::targets::{ModuleKind, Site};

/// transformers' size of a weights file (`save_pretrained`'s default `max_shard_size`).
pub const DEFAULT_MAX_SHARD: Bytes = Bytes(50_000_000_000);

/// The file of a tensor that no file has.
const NO_FILE: usize = usize::MAX;

/// Inputs and output of a merge.
#[derive(Clone, Copy)]
pub struct MergeJob<'a> {
    /// The model's tensors.
    pub weights: MergeWeights<'a>,
    /// Names of the model's tensors -> their names in the files; a name that is not listed is the same there.
    pub stored_names: &'a BTreeMap<String, String>,
    /// The model's modules.
    pub layout: &'a ModelLayout,
    /// The adapter.
    pub adapter: &'a LoadedAdapter,
    /// The tensors that the adapter changes: [`LoadedAdapter::adaptation`].
    pub adaptation: &'a Adaptation,
    /// Of a classifier: whether a tensor of the files belongs to another head. Those are left out, the
    /// head's own are added where the files lack them, and all others have the model's names.
    pub other_head: Option<&'a dyn Fn(&str) -> bool>,
    /// Writes the model's other files into the new directory: configuration, tokenizer, chat template, licence.
    pub other_files: &'a dyn Fn(&Path) -> Result<()>,
    /// The directory to create.
    pub out: &'a Path,
    /// Most bytes of values in one file.
    pub max_shard: Bytes,
}

/// Where a merge reads a model's tensors.
#[derive(Clone, Copy)]
pub enum MergeWeights<'a> {
    /// Safetensors files: one, or all shards.
    Files(&'a [PathBuf]),
    /// Files of quantised weights: their tensors as they are merged, in 16 bits where they are quantised, and the bytes of each.
    Dequantized {
        /// Names, types and shapes.
        tensors: &'a [TensorEntry],
        /// Reads one.
        bytes: &'a dyn Fn(&TensorEntry) -> Result<Vec<u8>>,
    },
}

impl MergeWeights<'_> {
    fn tensors(&self) -> Result<Vec<TensorEntry>> {
        match self {
            Self::Files(paths) => read_headers(paths),
            Self::Dequantized { tensors, .. } => Ok(tensors.to_vec()),
        }
    }

    /// Appends the bytes of `tensor` with its change to `writer`.
    fn write(
        &self,
        tensor: &TensorEntry,
        change: Option<&Change<'_>>,
        writer: &mut impl Write,
        path: &Path,
    ) -> Result<()> {
        let failed = |source| Error::io("write", path, source);
        let mut bytes = match (self, change) {
            // Added for the values that replace it.
            _ if tensor.file == NO_FILE => vec![0; tensor.size as usize],
            (Self::Files(paths), None) => {
                let mut values = open_at(&paths[tensor.file], tensor)?;
                return std::io::copy(&mut values, writer).map(drop).map_err(failed);
            }
            (Self::Files(paths), Some(_)) => {
                let path = &paths[tensor.file];
                let mut bytes = Vec::with_capacity(tensor.size as usize);
                open_at(path, tensor)?
                    .read_to_end(&mut bytes)
                    .map_err(|source| Error::io("read", path, source))?;
                bytes
            }
            (Self::Dequantized { bytes, .. }, _) => bytes(tensor)?,
        };
        if let Some(change) = change {
            change.apply(&mut bytes, tensor)?;
        }
        writer.write_all(&bytes).map_err(failed)
    }
}

/// Content of the merged model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeSummary {
    /// The weights' file names, in order.
    pub files: Vec<String>,
    /// Tensors that the adapter changed.
    pub merged: usize,
    /// Tensors copied unchanged.
    pub kept: usize,
    /// Bytes of all tensors.
    pub size: Bytes,
}

/// The change of one tensor.
#[derive(Clone, Copy)]
enum Change<'a> {
    /// `W + scaling * B A`, with a magnitude each row scaled to it; its transpose for an embedding.
    Add {
        site: &'a Site,
        a: &'a [f32],
        b: &'a [f32],
        magnitude: Option<&'a [f32]>,
    },
    /// `W + scale * values`.
    AddValues { values: &'a [f32], scale: f64 },
    /// Other values.
    Replace(&'a [f32]),
    /// Other rows for some tokens.
    ReplaceRows { tokens: &'a [u32], rows: &'a [f32] },
}

/// Writes the merged model.
///
/// # Errors
/// A target that exists; a tensor that is missing or has another shape or type; a value out of the type's range; a file that
/// cannot be read or written. Nothing is left behind then.
pub fn merge(job: &MergeJob) -> Result<MergeSummary> {
    if job.out.exists() {
        return Err(exists(job.out));
    }
    let mut tensors = job.weights.tensors()?;
    if job.adaptation.unties {
        add_tied_tensor(&mut tensors, job);
    }
    if let Some(is_other) = job.other_head {
        replace_head(&mut tensors, job, is_other);
    }
    let changes = changes(&tensors, job)?;
    if job.other_head.is_some() {
        rename(&mut tensors, job);
    }
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
        write_shard(&draft.path().join(name), shard, &tensors, &changes, job)?;
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
        merged: changes.len(),
        kept: tensors.len() - changes.len(),
        size: Bytes(tensors.iter().map(|tensor| tensor.size).sum()),
    })
}

/// Lists the stored one of two tied embeddings under the other's name too.
fn add_tied_tensor(tensors: &mut Vec<TensorEntry>, job: &MergeJob<'_>) {
    let names = [job.layout.table(), job.layout.head()];
    let stored = names.each_ref().map(|name| find(tensors, job, name));
    let copy = |tensors: &[TensorEntry], from: usize, name: &String| TensorEntry {
        name: name.clone(),
        ..tensors[from].clone()
    };
    let added = match stored {
        [Some(table), None] => copy(tensors, table, &names[1]),
        [None, Some(head)] => copy(tensors, head, &names[0]),
        _ => return,
    };
    tensors.push(added);
}

/// Leaves out the tensors of another head, and lists those trained in full that the files lack.
fn replace_head(
    tensors: &mut Vec<TensorEntry>,
    job: &MergeJob<'_>,
    is_other: &dyn Fn(&str) -> bool,
) {
    let read = |name: &String| job.stored_names.values().any(|stored| stored == name);
    tensors.retain(|tensor| read(&tensor.name) || !is_other(&tensor.name));
    let floats = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
    let mut dtypes = tensors.iter().map(|tensor| tensor.dtype);
    let dtype = dtypes
        .find(|dtype| floats.contains(dtype))
        .unwrap_or(Dtype::F32);
    for copy in &job.adaptation.copies {
        if find(tensors, job, &copy.tensor).is_none() {
            let elements = copy.shape.iter().product::<usize>() as u64;
            tensors.push(TensorEntry {
                name: copy.tensor.clone(),
                dtype,
                format: None,
                scales: Vec::new(),
                shape: copy.shape.clone(),
                file: NO_FILE,
                start: 0,
                size: elements * (dtype.bitsize() / 8) as u64,
            });
        }
    }
}

/// Gives the tensors that the model reads its names.
fn rename(tensors: &mut [TensorEntry], job: &MergeJob<'_>) {
    for (name, stored) in job.stored_names {
        let mut tensors = tensors.iter_mut();
        if let Some(tensor) = tensors.find(|tensor| tensor.name == *stored) {
            tensor.name.clone_from(name);
        }
    }
}

/// The index of a model's tensor in its files.
fn find(tensors: &[TensorEntry], job: &MergeJob<'_>, name: &str) -> Option<usize> {
    let stored = job.stored_names.get(name).map_or(name, String::as_str);
    tensors.iter().position(|tensor| tensor.name == stored)
}

/// The changes by the tensor's index. Every change without a tensor that takes it is named in one error.
fn changes<'a>(tensors: &[TensorEntry], job: &MergeJob<'a>) -> Result<BTreeMap<usize, Change<'a>>> {
    let mut problems = Vec::new();
    let mut changes = BTreeMap::new();
    for (names, change) in wanted_changes(job)? {
        let places: Vec<usize> = names
            .iter()
            .filter_map(|name| find(tensors, job, name))
            .collect();
        if places.is_empty() {
            problems.push(format!("the model's files have no `{}`", names[0]));
        }
        for index in places {
            match change.problem(&tensors[index]) {
                Some(why) => problems.push(why),
                None => drop(changes.insert(index, change)),
            }
        }
    }
    fail_on_problems(
        problems,
        "cannot be merged",
        None,
        "merge it into the model it was trained on",
    )?;
    Ok(changes)
}

/// The changes, each with the names of the tensors that it is for.
fn wanted_changes<'a>(job: &MergeJob<'a>) -> Result<Vec<(Vec<String>, Change<'a>)>> {
    let mut changes = Vec::new();
    for site in &job.adaptation.sites {
        let values = |part: Part| job.adapter.values(&part.name(&site.path));
        let parts = job.adaptation.parts(site);
        let magnitude = parts.contains(&Part::Magnitude);
        let change = Change::Add {
            site,
            a: values(parts[0])?,
            b: values(parts[1])?,
            magnitude: magnitude.then(|| values(Part::Magnitude)).transpose()?,
        };
        changes.push((vec![format!("{}.weight", site.path)], change));
        if parts.contains(&Part::Bias) {
            let (values, scale) = (values(Part::Bias)?, site.scaling);
            let change = Change::AddValues { values, scale };
            changes.push((vec![format!("{}.bias", site.path)], change));
        }
    }
    for copy in &job.adaptation.copies {
        let change = Change::Replace(job.adapter.values(&copy.name())?);
        changes.push((copy.tensors().cloned().collect(), change));
    }
    for set in &job.adaptation.tokens {
        let (tokens, rows) = (&set.tokens, job.adapter.values(&set.name())?);
        let mut names = vec![format!("{}.weight", set.path)];
        names.extend(set.tied.then(|| job.layout.head()));
        changes.push((names, Change::ReplaceRows { tokens, rows }));
    }
    Ok(changes)
}

impl Change<'_> {
    /// Why `tensor` cannot take this change.
    fn problem(&self, tensor: &TensorEntry) -> Option<String> {
        if let Self::Add { site, .. } = self {
            let mut wanted = [site.out_features, site.in_features];
            if site.kind != ModuleKind::Linear {
                wanted.reverse();
            }
            if tensor.shape != wanted {
                return Some(format!(
                    "`{}` has the shape {:?}, not {wanted:?}",
                    tensor.name, tensor.shape
                ));
            }
        }
        match tensor.dtype {
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => None,
            other => Some(format!(
                "`{}` is stored as {other:?}; F64, F32, F16 and BF16 can be merged",
                tensor.name
            )),
        }
    }

    /// Applies it to the stored bytes of `tensor`.
    fn apply(&self, bytes: &mut [u8], tensor: &TensorEntry) -> Result<()> {
        let (Self::Add { site, .. }, [rows, columns]) = (self, tensor.shape.as_slice()) else {
            return self.apply_rows(bytes, tensor);
        };
        if site.kind != ModuleKind::Conv1d {
            return self.apply_rows(bytes, tensor);
        }
        transpose_bytes(bytes, *rows, *columns);
        let upright = TensorEntry {
            shape: vec![*columns, *rows],
            ..tensor.clone()
        };
        self.apply_rows(bytes, &upright)?;
        transpose_bytes(bytes, *columns, *rows);
        Ok(())
    }

    /// Applies it by rows in parallel.
    fn apply_rows(&self, bytes: &mut [u8], tensor: &TensorEntry) -> Result<()> {
        let rows = tensor.shape.first().copied().unwrap_or(1).max(1);
        let columns = tensor.shape.iter().product::<usize>() / rows;
        if columns == 0 {
            return Ok(());
        }
        let row_bytes = bytes.len() / rows;
        let rows = bytes.par_chunks_mut(row_bytes).enumerate();
        rows.try_for_each(|(row, bytes)| {
            let written = match self {
                Self::Add {
                    site,
                    a,
                    b,
                    magnitude,
                } => {
                    let delta = match site.kind {
                        ModuleKind::Linear | ModuleKind::Conv1d => {
                            low_rank_row(site.r, &b[row * site.r..], a, columns)
                        }
                        ModuleKind::Embedding => low_rank_column(site, row, a, b),
                    };
                    let scale = site.scaling as f32;
                    let sum = |w: f64, delta: f32| w + f64::from(delta * scale);
                    match magnitude {
                        None => update(bytes, tensor.dtype, &delta, sum),
                        Some(m) => {
                            let mut squares = 0.0;
                            fold(bytes, tensor.dtype, &delta, |w, delta| {
                                squares += sum(w, delta).powi(2);
                            });
                            let factor = f64::from(m[row]) / f64::sqrt(squares);
                            update(bytes, tensor.dtype, &delta, |w, delta| {
                                factor * sum(w, delta)
                            })
                        }
                    }
                }
                Self::AddValues { values, scale } => {
                    let values = &values[row * columns..];
                    update(bytes, tensor.dtype, values, |w, value| {
                        w + f64::from(value) * scale
                    })
                }
                Self::ReplaceRows { tokens, rows } => {
                    let Some(place) = tokens.iter().position(|token| *token as usize == row) else {
                        return Ok(());
                    };
                    let values = &rows[place * columns..];
                    update(bytes, tensor.dtype, values, |_, value| f64::from(value))
                }
                Self::Replace(values) => {
                    let values = &values[row * columns..];
                    update(bytes, tensor.dtype, values, |_, value| f64::from(value))
                }
            };
            written.ok_or_else(|| overflow(tensor, row))
        })
    }
}

/// Transposes the stored elements (rows, columns).
fn transpose_bytes(bytes: &mut [u8], rows: usize, columns: usize) {
    fn each<const N: usize>(bytes: &mut [u8], rows: usize, columns: usize) {
        let elements = transpose(bytes.as_chunks::<N>().0, rows, columns);
        bytes.copy_from_slice(elements.as_flattened());
    }
    match bytes.len() / (rows * columns).max(1) {
        8 => each::<8>(bytes, rows, columns),
        4 => each::<4>(bytes, rows, columns),
        _ => each::<2>(bytes, rows, columns),
    }
}

/// A row of B A: `b` (r) times A (r, columns).
pub(super) fn low_rank_row(r: usize, b: &[f32], a: &[f32], columns: usize) -> Vec<f32> {
    let mut row = vec![0.0f32; columns];
    for (b, a) in b[..r].iter().zip(a.chunks_exact(columns)) {
        for (sum, a) in row.iter_mut().zip(a) {
            *sum += b * a;
        }
    }
    row
}

/// The column `id` of B A (C, V) of an embedding, with A (r, V) and B (C, r).
fn low_rank_column(site: &Site, id: usize, a: &[f32], b: &[f32]) -> Vec<f32> {
    let column: Vec<f32> = a
        .iter()
        .skip(id)
        .step_by(site.in_features)
        .copied()
        .collect();
    let rows = b.chunks_exact(site.r);
    rows.map(|row| row.iter().zip(&column).map(|(b, a)| b * a).sum())
        .collect()
}

/// Passes each stored value with its operand to `visit`.
fn fold(bytes: &mut [u8], dtype: Dtype, operands: &[f32], mut visit: impl FnMut(f64, f32)) {
    update(bytes, dtype, operands, |stored, operand| {
        visit(stored, operand);
        stored
    });
}

/// Replaces each stored value by `new` of it and its operand, rounded once; `None` if one is not finite.
fn update(
    bytes: &mut [u8],
    dtype: Dtype,
    operands: &[f32],
    mut new: impl FnMut(f64, f32) -> f64,
) -> Option<()> {
    // A sum of two f32 in f64 rounds to f32 as their f32 sum does.
    match dtype {
        Dtype::F64 => update_each(bytes, operands, |stored, operand| {
            let value = new(f64::from_le_bytes(stored), operand);
            value.is_finite().then(|| value.to_le_bytes())
        }),
        Dtype::F32 => update_each(bytes, operands, |stored, operand| {
            let value = new(f32::from_le_bytes(stored).into(), operand) as f32;
            value.is_finite().then(|| value.to_le_bytes())
        }),
        Dtype::F16 => update_each(bytes, operands, |stored, operand| {
            let value = new(f16::from_le_bytes(stored).into(), operand) as f32;
            let value = f16::from_f32(value);
            value.is_finite().then(|| value.to_le_bytes())
        }),
        Dtype::BF16 => update_each(bytes, operands, |stored, operand| {
            let value = new(bf16::from_le_bytes(stored).into(), operand) as f32;
            let value = bf16::from_f32(value);
            value.is_finite().then(|| value.to_le_bytes())
        }),
        _ => None,
    }
}

/// Replaces each stored value of `N` bytes by the result of `new`, until one is `None`.
fn update_each<const N: usize>(
    bytes: &mut [u8],
    operands: &[f32],
    mut new: impl FnMut([u8; N], f32) -> Option<[u8; N]>,
) -> Option<()> {
    let stored = bytes.as_chunks_mut::<N>().0;
    for (stored, operand) in stored.iter_mut().zip(operands) {
        *stored = new(*stored, *operand)?;
    }
    Some(())
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
    changes: &BTreeMap<usize, Change<'_>>,
    job: &MergeJob,
) -> Result<()> {
    let failed = |source| Error::io("write", path, source);
    let listed: Vec<&TensorEntry> = shard.iter().map(|index| &tensors[*index]).collect();
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    writer.write_all(&header(&listed)?).map_err(failed)?;
    for index in shard {
        let tensor = &tensors[*index];
        job.weights
            .write(tensor, changes.get(index), &mut writer, path)?;
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

fn overflow(tensor: &TensorEntry, row: usize) -> Error {
    Error::new(Kind::Adapter, format!("`{}` with the adapter holds a value that {:?} cannot", tensor.name, tensor.dtype))
        .at(format!("row {row}"))
        .rule("every merged weight is a finite number")
        .hint("use the adapter beside the model without merging, or merge into a copy of the model stored as BF16 or F32")
}
