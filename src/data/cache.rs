//! Cache of encoded data sets on disk.
//!
//! Owns the file's layout: magic, a JSON header with its length, then per example its record, length, tokens and mask, and the
//! number of its classes and the classes, all little endian, and the SHA-256 of all preceding bytes. A file that is damaged, of another layout or of other data is ignored.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::batch::Example;
use super::dataset::{Counts, Dataset, RenderedSample};
use crate::error::{Error, Result};
use crate::files::{remove_old_leftovers, write_atomic_with};

const MAGIC: &[u8; 16] = b"wattune tokens 3";
const CHECKSUM: usize = 32;

#[derive(Serialize, Deserialize)]
struct Header {
    fingerprint: String,
    counts: Counts,
    eos_trained: bool,
    first: Option<RenderedSample>,
}

fn path(folder: &Path, fingerprint: &str) -> PathBuf {
    folder.join(format!("{fingerprint}.tokens"))
}

/// The data set of `fingerprint`, if `folder` has an intact file of it.
pub(super) fn load(folder: &Path, fingerprint: &str) -> Option<Dataset> {
    let file = File::open(path(folder, fingerprint)).ok()?;
    let size = file.metadata().ok()?.len();
    let mut body = CacheReader {
        left: size.checked_sub(CHECKSUM as u64)?,
        file: BufReader::new(file),
        hash: Sha256::new(),
    };
    let dataset = parse(&mut body).filter(|dataset| dataset.fingerprint == fingerprint)?;
    body.verify().then_some(dataset)
}

/// Writes `dataset` to `folder` atomically.
pub(super) fn save(folder: &Path, dataset: &Dataset) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    remove_old_leftovers(folder, None);
    write_atomic_with(&path(folder, &dataset.fingerprint), |file| {
        let mut out = CacheWriter {
            file: BufWriter::new(file),
            hash: Sha256::new(),
        };
        write_body(&mut out, dataset)?;
        let CacheWriter { mut file, hash } = out;
        file.write_all(&hash.finalize())?;
        file.flush()
    })
}

/// A writer that updates a SHA-256 with every byte written.
struct CacheWriter<W> {
    file: W,
    hash: Sha256,
}

impl<W: Write> CacheWriter<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)
    }
}

fn write_body(out: &mut CacheWriter<impl Write>, dataset: &Dataset) -> io::Result<()> {
    let header = serde_json::to_vec(&Header {
        fingerprint: dataset.fingerprint.clone(),
        counts: dataset.counts,
        eos_trained: dataset.eos_trained,
        first: dataset.first.clone(),
    })?;
    out.put(MAGIC)?;
    out.put(&(header.len() as u64).to_le_bytes())?;
    out.put(&header)?;
    for (example, record) in dataset.examples.iter().zip(&*dataset.records) {
        out.put(&record.to_le_bytes())?;
        out.put(&(example.tokens.len() as u64).to_le_bytes())?;
        let bytes = |ids: &[u32]| {
            ids.iter()
                .flat_map(|id| id.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let loss: Vec<u8> = example.loss.iter().map(|loss| u8::from(*loss)).collect();
        out.put(&bytes(&example.tokens))?;
        out.put(&loss)?;
        out.put(&(example.labels.len() as u64).to_le_bytes())?;
        out.put(&bytes(&example.labels))?;
        let values: Vec<u32> = example.values.iter().map(|value| value.to_bits()).collect();
        out.put(&(values.len() as u64).to_le_bytes())?;
        out.put(&bytes(&values))?;
    }
    Ok(())
}

/// A reader that updates a SHA-256 with every byte read; it stops before the trailing checksum.
struct CacheReader {
    file: BufReader<File>,
    hash: Sha256,
    left: u64,
}

impl CacheReader {
    fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        self.left = self.left.checked_sub(length as u64)?;
        let mut bytes = vec![0; length];
        self.file.read_exact(&mut bytes).ok()?;
        self.hash.update(&bytes);
        Some(bytes)
    }

    fn take_u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn take_length(&mut self) -> Option<usize> {
        usize::try_from(self.take_u64()?).ok()
    }

    fn take_ids(&mut self, count: usize) -> Option<Vec<u32>> {
        let bytes = self.take(count.checked_mul(4)?)?;
        let ids = bytes.as_chunks().0.iter();
        Some(ids.map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    /// Whether the checksum that follows is that of the bytes read.
    fn verify(mut self) -> bool {
        let mut checksum = [0; CHECKSUM];
        let read = self.file.read_exact(&mut checksum);
        read.is_ok() && self.hash.finalize().as_slice() == checksum
    }
}

fn parse(body: &mut CacheReader) -> Option<Dataset> {
    if body.take(MAGIC.len())? != MAGIC {
        return None;
    }
    let header_length = body.take_length()?;
    let header: Header = serde_json::from_slice(&body.take(header_length)?).ok()?;
    let mut examples = Vec::new();
    let mut records = Vec::new();
    while body.left > 0 {
        records.push(body.take_u64()?);
        let length = body.take_length()?;
        let tokens = body.take_ids(length)?;
        let loss = body.take(length)?.iter().map(|b| *b != 0).collect();
        let classes = body.take_length()?;
        let labels = body.take_ids(classes)?;
        let outputs = body.take_length()?;
        let values = body.take_ids(outputs)?.into_iter().map(f32::from_bits);
        examples.push(Example {
            tokens,
            loss,
            labels,
            values: values.collect(),
        });
    }
    Some(Dataset {
        examples: examples.into(),
        records: records.into(),
        counts: header.counts,
        eos_trained: header.eos_trained,
        fingerprint: header.fingerprint,
        first: header.first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset() -> Dataset {
        let example = |tokens: &[u32], loss: &[bool]| Example {
            tokens: tokens.to_vec(),
            loss: loss.to_vec(),
            labels: loss.iter().map(|loss| 4 + u32::from(*loss)).collect(),
            values: loss
                .iter()
                .map(|loss| f32::from(u8::from(*loss)) - 0.5)
                .collect(),
        };
        let examples = vec![example(&[7, 70_000], &[false, true]), example(&[], &[])];
        Dataset {
            examples: examples.into(),
            records: [0, 2].as_slice().into(),
            counts: Counts {
                records: 3,
                glued: 1,
                ..Counts::default()
            },
            eos_trained: true,
            fingerprint: "ab".into(),
            first: Some(RenderedSample {
                place: "f, line 1".into(),
                pieces: vec![],
            }),
        }
    }

    #[test]
    fn what_was_saved_is_loaded_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset();
        save(folder.path(), &dataset).unwrap();
        assert_eq!(load(folder.path(), "ab"), Some(dataset));
        assert_eq!(load(folder.path(), "cd"), None);

        let file = path(folder.path(), "ab");
        let good = std::fs::read(&file).unwrap();
        for at in [0, 20, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&file, &bad).unwrap();
            assert_eq!(load(folder.path(), "ab"), None, "byte {at}");
        }
        std::fs::write(&file, &good[..good.len() - 5]).unwrap();
        assert_eq!(load(folder.path(), "ab"), None);
        std::fs::write(path(folder.path(), "cd"), &good).unwrap();
        assert_eq!(load(folder.path(), "cd"), None, "another data set's file");
    }
}
