//! Safetensors files: headers of a model's shards, the layout of new shards, and writing of f32 tensors.
//!
//! Takes file paths; reads headers only. Returns the location of each tensor, the split of tensors into shards, and the header
//! and index of such shards, named as in transformers. Never reads a tensor's values.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::files::write_atomic_with;
use crate::ops::StoredFormat;
use crate::units::Bytes;

/// File name of the index of sharded weights.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The format's limit of a header's length.
const MAX_HEADER: u64 = 100_000_000;
/// Elements written at once.
const CHUNK: usize = 1 << 18;
/// The length field before the header.
const LENGTH_FIELD: u64 = 8;

/// Location of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Stored type of an element; of a quantised tensor bytes.
    pub dtype: Dtype,
    /// The blocks of a quantised tensor.
    pub format: Option<StoredFormat>,
    /// The tensors with the scales of a quantised one, where its file holds them apart.
    pub scales: Vec<TensorEntry>,
    /// Shape.
    pub shape: Vec<usize>,
    /// Index of the file.
    pub file: usize,
    /// Offset of its first byte in that file.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// An F32 tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct F32Tensor<'a> {
    name: &'a str,
    shape: Vec<usize>,
    values: &'a [f32],
}

impl<'a> F32Tensor<'a> {
    /// `values` row by row; `None` if their count does not fit `shape`.
    pub(crate) fn new(name: &'a str, shape: Vec<usize>, values: &'a [f32]) -> Option<Self> {
        (shape.iter().product::<usize>() == values.len()).then_some(Self {
            name,
            shape,
            values,
        })
    }

    /// A vector.
    pub(crate) fn flat(name: &'a str, values: &'a [f32]) -> Self {
        Self {
            name,
            shape: vec![values.len()],
            values,
        }
    }
}

/// The transpose (columns, rows) of the elements (rows, columns), row-major.
pub(crate) fn transpose<T: Copy + Send + Sync>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    let column = |column: usize| (0..rows).map(move |row| x[row * columns + column]);
    let columns = (0..columns).into_par_iter();
    columns.flat_map_iter(column).collect()
}

/// Writes a safetensors file of F32 tensors atomically, sorted by name; `pytorch_format` marks it as PyTorch's. The same tensors give the
/// same bytes. Values are written in chunks, without a second copy in memory.
pub(crate) fn write_f32s(
    path: &Path,
    mut tensors: Vec<F32Tensor<'_>>,
    pytorch_format: bool,
) -> Result<()> {
    tensors.sort_by_key(|tensor| tensor.name);
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += size_of_val(tensor.values);
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        (tensor.name.to_string(), info)
    });
    let header = encode_header(infos.collect(), pytorch_format)?;
    write_atomic_with(path, |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header)?;
        for part in tensors
            .iter()
            .flat_map(|tensor| tensor.values.chunks(CHUNK))
        {
            if cfg!(target_endian = "little") {
                file.write_all(bytemuck::cast_slice(part))?;
            } else {
                for value in part {
                    file.write_all(&value.to_le_bytes())?;
                }
            }
        }
        file.flush()
    })
}

/// The tensors of `files`, in the order of files and of offsets.
pub(crate) fn read_headers(files: &[PathBuf]) -> Result<Vec<TensorEntry>> {
    let mut tensors = Vec::new();
    let mut owner: BTreeMap<String, usize> = BTreeMap::new();
    for (file, path) in files.iter().enumerate() {
        for tensor in read_header(path, file)? {
            if let Some(first) = owner.insert(tensor.name.clone(), file) {
                return Err(Error::new(
                    Kind::Model,
                    format!("the tensor `{}` is in two files", tensor.name),
                )
                .at(format!("{} and {}", files[first].display(), path.display()))
                .hint("name the files of one model only"));
            }
            tensors.push(tensor);
        }
    }
    Ok(tensors)
}

fn damaged(path: &Path, why: &str) -> Error {
    let what = format!("the file is damaged or no safetensors file: {why}");
    Error::new(Kind::Model, what)
        .at(path.display().to_string())
        .hint("fetch the file again")
}

fn read_header(path: &Path, file: usize) -> Result<Vec<TensorEntry>> {
    let failed = |source| Error::io("read", path, source);
    let damaged = |why: String| damaged(path, &why);
    let mut reader = File::open(path).map_err(failed)?;
    let total = reader.metadata().map_err(failed)?.len();
    if total < LENGTH_FIELD {
        return Err(damaged(format!("it has {total} bytes")));
    }
    let mut length = [0; LENGTH_FIELD as usize];
    reader.read_exact(&mut length).map_err(failed)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > total - LENGTH_FIELD {
        return Err(damaged(format!("its header would have {length} bytes")));
    }
    let mut header = vec![0; length as usize];
    reader.read_exact(&mut header).map_err(failed)?;
    // Deserialisation checks that offsets are contiguous and agree with shapes.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|source| damaged(source.to_string()))?;
    let data = LENGTH_FIELD + length;
    if data + metadata.data_len() as u64 != total {
        return Err(damaged(format!(
            "it has {total} bytes where its header asks for {}",
            data + metadata.data_len() as u64
        )));
    }
    let stored = |name: String| {
        let info = metadata.info(&name)?;
        let (start, end) = info.data_offsets;
        let (start, size) = (data + start as u64, (end - start) as u64);
        Some(TensorEntry {
            dtype: info.dtype,
            format: None,
            scales: Vec::new(),
            shape: info.shape.clone(),
            name,
            file,
            start,
            size,
        })
    };
    Ok(metadata
        .offset_keys()
        .into_iter()
        .filter_map(stored)
        .collect())
}

/// The tensors (by index) of each file of at most `max` bytes of values, in order, as in huggingface_hub's
/// `split_state_dict_into_shards_factory`: a larger tensor is alone in a file. Within a file they are sorted by type, widest
/// first, then by name, as safetensors does.
pub(super) fn plan_shards(tensors: &[TensorEntry], max: Bytes) -> Vec<Vec<usize>> {
    let mut shards: Vec<Vec<usize>> = Vec::new();
    let (mut current, mut filled) = (Vec::new(), 0u64);
    for (index, tensor) in tensors.iter().enumerate() {
        if tensor.size > max.0 {
            shards.push(vec![index]);
            continue;
        }
        if filled + tensor.size > max.0 {
            shards.push(std::mem::take(&mut current));
            filled = 0;
        }
        current.push(index);
        filled += tensor.size;
    }
    shards.push(current);
    shards.retain(|shard| !shard.is_empty());
    for shard in &mut shards {
        shard.sort_by(|a, b| {
            let (a, b) = (&tensors[*a], &tensors[*b]);
            b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
        });
    }
    shards
}

/// The name of file `index` of `count`.
pub(super) fn shard_file_name(index: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_string()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

/// The start of a file that holds `tensors` in this order: length field and header, padded to eight bytes.
pub(super) fn header(tensors: &[&TensorEntry]) -> Result<Vec<u8>> {
    let mut end = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let start = end;
        end += tensor.size as usize;
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        infos.push((tensor.name.clone(), info));
    }
    encode_header(infos, true)
}

fn encode_header(infos: Vec<(String, TensorInfo)>, pytorch_format: bool) -> Result<Vec<u8>> {
    // One key: the result does not depend on a map's order.
    let mark = pytorch_format.then(|| {
        [("format".to_string(), "pt".to_string())]
            .into_iter()
            .collect()
    });
    let failed = |why: String| {
        Error::new(
            Kind::Model,
            format!("these tensors have no valid header: {why}"),
        )
    };
    let metadata = Metadata::new(mark, infos).map_err(|source| failed(source.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|source| failed(source.to_string()))?;
    text.resize(text.len().next_multiple_of(LENGTH_FIELD as usize), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    Ok(bytes)
}

/// The text of the index of several files.
pub(super) fn index_json(tensors: &[TensorEntry], shards: &[Vec<usize>]) -> String {
    let total: u64 = tensors.iter().map(|tensor| tensor.size).sum();
    let mut places = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        for index in shard {
            places.insert(
                tensors[*index].name.clone(),
                shard_file_name(number, shards.len()),
            );
        }
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
    format!("{index:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, dtype: Dtype, size: u64) -> TensorEntry {
        TensorEntry {
            name: name.into(),
            dtype,
            format: None,
            scales: Vec::new(),
            shape: vec![size as usize],
            file: 0,
            start: 0,
            size,
        }
    }

    #[test]
    fn files_are_cut_as_the_hub_library_cuts_them() {
        // Its own example: [6, 6, 2, 6, 2, 2] in files of 10 become [6], [6 + 2], [6 + 2 + 2].
        let sizes = [6, 6, 2, 6, 2, 2];
        let tensors: Vec<TensorEntry> = sizes
            .iter()
            .enumerate()
            .map(|(i, size)| stored(&i.to_string(), Dtype::U8, *size))
            .collect();
        assert_eq!(
            plan_shards(&tensors, Bytes(10)),
            [vec![0], vec![1, 2], vec![3, 4, 5]]
        );
        // A tensor above the limit is alone; the shard begun before it is continued.
        assert_eq!(
            plan_shards(&tensors, Bytes(5)),
            [vec![0], vec![1], vec![3], vec![2, 4], vec![5]]
        );
        assert_eq!(plan_shards(&tensors, Bytes(24)).len(), 1);
        assert_eq!(plan_shards(&tensors, Bytes(23)).len(), 2);
    }

    #[test]
    fn wide_types_come_first_in_a_file() {
        let tensors = [
            stored("a", Dtype::U8, 1),
            stored("c", Dtype::F32, 4),
            stored("b", Dtype::F32, 4),
        ];
        assert_eq!(plan_shards(&tensors, Bytes(100)), [vec![2, 1, 0]]);
    }

    #[test]
    fn hostile_headers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let gap = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        let short = br#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
        let with_length = |text: &[u8]| [&(text.len() as u64).to_le_bytes()[..], text].concat();
        for content in [
            b"abc".to_vec(),
            u64::MAX.to_le_bytes().to_vec(),
            with_length(gap),
            with_length(short),
            with_length(b"[]"),
        ] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(
                read_headers(std::slice::from_ref(&path))
                    .unwrap_err()
                    .kind(),
                Kind::Model
            );
        }
    }
}
