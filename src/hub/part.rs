//! The bytes of a file that are here so far, and the check that they are all of it.
//!
//! Owns the `.incomplete` file of a blob. Takes bytes in order; returns nothing but errors. Knows nothing of where they come from.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// Bytes read at a time.
pub(super) const CHUNK: usize = 128 << 10;

/// The bytes of a file that are here so far.
pub(super) struct Part {
    path: PathBuf,
    file: File,
    pub(super) len: u64,
    /// Of those bytes; only where the blob's name is a SHA-256.
    hash: Option<Sha256>,
}

impl Part {
    /// Opens what an earlier run left, or begins. Without a known size and hash nothing is taken up: another program may have
    /// left a file with holes.
    pub(super) fn open(path: PathBuf, etag: &str, size: Option<u64>) -> Result<Self> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path);
        let file = file.map_err(|source| Error::io("create", &path, source))?;
        let hash = is_sha256(etag).then(Sha256::new);
        let mut part = Self {
            path,
            file,
            len: 0,
            hash,
        };
        let len = part.file.metadata().map_or(0, |found| found.len());
        if part.hash.is_some() && size.is_some_and(|size| len <= size) {
            part.take_up()?
        } else {
            part.restart()?
        }
        Ok(part)
    }

    /// Reads what is there, so that the hash covers it.
    fn take_up(&mut self) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let got = self
                .file
                .read(&mut chunk)
                .map_err(|source| Error::io("read", &self.path, source))?;
            if got == 0 {
                return Ok(());
            }
            self.count(&chunk[..got]);
        }
    }

    pub(super) fn restart(&mut self) -> Result<()> {
        let emptied = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|source| Error::io("write", &self.path, source))?;
        self.len = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| {
            Error::io("write", &self.path, source)
                .hint("free some space, or set HF_HOME to a directory on another disk")
        })?;
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
    }

    /// Checks the whole and puts it on the disk. What fails the check is emptied: it is of no use to a later run.
    pub(super) fn finish(&mut self, place: &str, etag: &str, size: Option<u64>) -> Result<()> {
        if let Some(size) = size.filter(|size| *size != self.len) {
            let error = wrong_size(place, self.len, size);
            self.restart()?;
            return Err(error);
        }
        let hash = self.hash.clone().map(|hash| {
            hash.finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        });
        if let Some(hash) = hash.filter(|hash| !hash.eq_ignore_ascii_case(etag)) {
            self.restart()?;
            let error = Error::new(Kind::Hub, "the bytes received are not the file's").at(place);
            return Err(error
                .value(format!("SHA-256 {hash}"))
                .rule(format!("SHA-256 {etag}"))
                .hint("run the same command again"));
        }
        self.file
            .sync_data()
            .map_err(|source| Error::io("write", &self.path, source))
    }
}

pub(super) fn wrong_size(place: &str, got: u64, size: u64) -> Error {
    let what = if got < size {
        "the hub sent less than it promised"
    } else {
        "the hub sent more than it promised"
    };
    let error = Error::new(Kind::Hub, what).at(place);
    error
        .value(format!("{got} bytes"))
        .rule(format!("{size} bytes"))
        .hint("run the same command again")
}

/// Large files are named by their content's SHA-256; small ones by git's SHA-1 of a header and the content, which is not checked.
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}
