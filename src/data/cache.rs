//! Cache of encoded data sets on disk.
//!
//! Owns the file's layout: magic, a JSON header with its length, then per example its record, length, tokens and mask, all little
//! endian, and the SHA-256 of all preceding bytes. A file that is damaged, of another layout or of other data is ignored.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::batch::Example;
use super::dataset::{Counts, Dataset, RenderedSample};
use crate::error::{Error, Kind, Result};
use crate::files::{remove_old_leftovers, write_atomic};

const MAGIC: &[u8; 16] = b"wattune tokens 1";
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
    let bytes = std::fs::read(path(folder, fingerprint)).ok()?;
    let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM)?)?;
    if Sha256::digest(body).as_slice() != checksum {
        return None;
    }
    parse(body).filter(|dataset| dataset.fingerprint == fingerprint)
}

/// Writes `dataset` to `folder` atomically.
pub(super) fn save(folder: &Path, dataset: &Dataset) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let target = path(folder, &dataset.fingerprint);
    let mut body = body(dataset)?;
    let checksum = Sha256::digest(&body);
    body.extend_from_slice(&checksum);
    remove_old_leftovers(folder, None);
    write_atomic(&target, body)
}

fn body(dataset: &Dataset) -> Result<Vec<u8>> {
    let Dataset {
        counts,
        eos_trained,
        fingerprint,
        first,
        ..
    } = dataset.clone();
    let header = serde_json::to_vec(&Header {
        fingerprint,
        counts,
        eos_trained,
        first,
    })
    .map_err(|e| Error::new(Kind::Data, e.to_string()))?;
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&(header.len() as u64).to_le_bytes());
    out.extend_from_slice(&header);
    for (example, record) in dataset.examples.iter().zip(&*dataset.records) {
        out.extend_from_slice(&record.to_le_bytes());
        out.extend_from_slice(&(example.tokens.len() as u64).to_le_bytes());
        example
            .tokens
            .iter()
            .for_each(|token| out.extend_from_slice(&token.to_le_bytes()));
        out.extend(example.loss.iter().map(|loss| u8::from(*loss)));
    }
    Ok(out)
}

fn parse(body: &[u8]) -> Option<Dataset> {
    let mut rest = body.strip_prefix(MAGIC)?;
    let header_length = usize::try_from(take_u64(&mut rest)?).ok()?;
    let Header {
        fingerprint,
        counts,
        eos_trained,
        first,
    } = serde_json::from_slice(take(&mut rest, header_length)?).ok()?;
    let (mut examples, mut records) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        records.push(take_u64(&mut rest)?);
        let length = usize::try_from(take_u64(&mut rest)?).ok()?;
        let tokens = take(&mut rest, length.checked_mul(4)?)?;
        let tokens = tokens
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
            .collect();
        let loss = take(&mut rest, length)?.iter().map(|b| *b != 0).collect();
        examples.push(Example { tokens, loss });
    }
    Some(Dataset {
        examples: examples.into(),
        records: records.into(),
        counts,
        eos_trained,
        fingerprint,
        first,
    })
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn take_u64(rest: &mut &[u8]) -> Option<u64> {
    take(rest, 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let examples = vec![
            Example {
                tokens: vec![7, 70_000],
                loss: vec![false, true],
            },
            Example {
                tokens: vec![],
                loss: vec![],
            },
        ];
        let first = Some(RenderedSample {
            place: "f, line 1".into(),
            pieces: vec![],
        });
        let counts = Counts {
            records: 3,
            glued: 1,
            ..Counts::default()
        };
        let records = [0, 2].as_slice().into();
        let dataset = Dataset {
            examples: examples.into(),
            records,
            counts,
            eos_trained: true,
            fingerprint: "ab".into(),
            first,
        };
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
