//! One file from the hub into the cache: complete or absent.
//!
//! Owns `Hub` and the transfer: a HEAD for name and size, a GET that is taken up again where it broke, a check of size and
//! SHA-256, a rename, a link. Takes a listing and a file's name; returns its path. Knows nothing of what the file is for.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::CONTENT_RANGE;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

use super::cache::{RepoCache, make_parent, unique_beside};
use super::client::{Client, Facts, Failure, Patience, Request, Tries, cause};
use super::listing::{Listing, not_cached};
use super::names::Repo;
use super::progress::Progress;
use super::settings::Settings;

/// The beginning of a broken transfer is kept for the next run when it is at least this long, in bytes.
const WORTH_KEEPING: u64 = 1 << 20;
/// Bytes read at a time.
const CHUNK: usize = 128 << 10;

/// The hub, its cache and whoever asks.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    client: Client,
}

/// The bytes of a file that are here so far.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    /// Of those bytes; only where the blob's name is a SHA-256.
    hash: Option<Sha256>,
}

impl Hub {
    /// A hub with these settings.
    ///
    /// # Errors
    /// When the endpoint is not an address or HTTPS cannot be set up.
    pub fn new(settings: Settings) -> Result<Self> {
        Self::with_patience(settings, Patience::default())
    }

    /// The same with another idea of how often to try again.
    ///
    /// # Errors
    /// As [`Hub::new`].
    pub fn with_patience(settings: Settings, patience: Patience) -> Result<Self> {
        let client = Client::new(&settings, patience)?;
        Ok(Self { settings, client })
    }

    /// The repository's folder in the cache.
    pub(super) fn cache(&self, repo: &Repo) -> RepoCache {
        RepoCache::new(&self.settings.cache, repo)
    }

    /// Whether the network may not be used.
    pub(super) fn is_offline(&self) -> bool {
        self.settings.offline
    }

    /// What the repository holds.
    pub(super) fn listing(&self, repo: &Repo) -> Result<Listing> {
        match self.settings.offline {
            true => Listing::cached(&self.cache(repo), repo),
            false => Listing::fetch(&self.client, repo),
        }
    }

    /// The local path of a listed file, fetched unless it is here.
    pub(super) fn file(&self, listing: &Listing, file: &str, progress: &dyn Progress) -> Result<PathBuf> {
        let cache = self.cache(&listing.repo);
        let pointer = cache.snapshot(&listing.commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        if self.settings.offline {
            return Err(not_cached(&listing.repo, Some(file)));
        }
        let (etag, size) = self.name_and_size(listing, file)?;
        if !is_complete(&cache.blob(&etag), size) {
            self.fetch(listing, file, &etag, size, progress)?;
        }
        cache.link(&listing.commit, file, &etag)
    }

    /// The name of a file's blob and its size, from a HEAD.
    fn name_and_size(&self, listing: &Listing, file: &str) -> Result<(String, Option<u64>)> {
        let request = Request::head(self.client.file_url(&listing.repo, &listing.commit, file));
        let mut tries = Tries::new(self.client.patience);
        let facts = loop {
            match self.client.send(&request, &listing.subject(file)) {
                Ok((_, facts)) => break facts,
                Err(failure) => tries.wait(failure)?,
            }
        };
        let odd = |what: &str| {
            let error = Error::new(Kind::Hub, what).at(listing.subject(file).place());
            error.hint("check HF_ENDPOINT and the proxy: this does not answer as the hub does")
        };
        match facts {
            Facts { commit: Some(commit), .. } if commit != listing.commit => {
                Err(odd("the hub answers with another commit").value(commit))
            }
            Facts { commit: None, .. } => Err(odd("the hub's answer names no commit")),
            Facts { etag: Some(etag), size, .. } => Ok((etag, size)),
            Facts { etag: None, .. } => Err(odd("the hub's answer has no ETag")),
        }
    }

    /// Transfers a file into its blob. One process at a time writes a blob; a second one finds it there.
    fn fetch(&self, listing: &Listing, file: &str, etag: &str, size: Option<u64>, progress: &dyn Progress) -> Result<()> {
        let cache = self.cache(&listing.repo);
        let blob = cache.blob(etag);
        make_parent(&blob)?;
        let lock = cache.lock(etag)?;
        if is_complete(&blob, size) {
            return Ok(());
        }
        let path = match lock {
            Some(_) => blob.with_file_name(format!("{etag}.incomplete")),
            None => unique_beside(&blob),
        };
        let mut part = Part::open(path.clone(), etag, size)?;
        let outcome =
            self.transfer(listing, file, &mut part, size, progress).and_then(|()| part.finish(listing, file, etag, size));
        if outcome.is_err() && (part.len < WORTH_KEEPING || lock.is_none()) {
            // Nothing is lost by starting anew, and a failed removal leaves only what the next run takes up.
            let _ = fs::remove_file(&path);
        }
        outcome?;
        fs::rename(&path, &blob).map_err(|source| Error::io("write", &blob, source))?;
        progress.finish();
        Ok(())
    }

    /// Receives until the end, taking up again where a connection broke; only attempts without any progress count as failed.
    fn transfer(&self, listing: &Listing, file: &str, part: &mut Part, size: Option<u64>, progress: &dyn Progress) -> Result<()> {
        progress.start(file, size);
        if part.len > 0 {
            progress.advance(part.len);
        }
        let mut furthest = part.len;
        let mut tries = Tries::new(self.client.patience);
        while size.is_none_or(|size| part.len < size) {
            let Err(failure) = self.receive(listing, file, part, size, progress) else { break };
            if part.len > furthest {
                furthest = part.len;
                tries.succeeded_partly();
            }
            tries.wait(failure)?;
        }
        Ok(())
    }

    /// One GET, from the first byte that is missing.
    fn receive(
        &self,
        listing: &Listing,
        file: &str,
        part: &mut Part,
        size: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<(), Failure> {
        let subject = listing.subject(file);
        let request = Request::get(self.client.file_url(&listing.repo, &listing.commit, file), part.len);
        let (mut response, _) = self.client.send(&request, &subject)?;
        if part.len > 0 && !continues_at(&response, part.len) {
            part.restart()?;
            progress.start(file, size);
            if response.status() != StatusCode::OK {
                let error = Error::new(Kind::Hub, "the hub does not continue a broken transfer").at(subject.place());
                return Err(Failure::soon(error.hint("run the same command again")));
            }
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let got = response.read(&mut chunk).map_err(|source| {
                let error = Error::new(Kind::Hub, format!("the connection broke: {}", cause(&source))).at(subject.place());
                Failure::soon(error.hint("check the network and run the same command again"))
            })?;
            if got == 0 {
                break;
            }
            part.append(&chunk[..got])?;
            progress.advance(got as u64);
            if size.is_some_and(|size| part.len > size) {
                break;
            }
        }
        match size {
            Some(size) if part.len < size => Err(Failure::soon(wrong_size(listing, file, part.len, size))),
            _ => Ok(()),
        }
    }
}

impl Part {
    /// Opens what an earlier run left, or begins. Without a known size nothing is taken up.
    fn open(path: PathBuf, etag: &str, size: Option<u64>) -> Result<Self> {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.map_err(|source| Error::io("create", &path, source))?;
        let hash = is_sha256(etag).then(Sha256::new);
        let mut part = Self { path, file, len: 0, hash };
        let len = part.file.metadata().map_or(0, |found| found.len());
        if size.is_some_and(|size| len <= size) {
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
            let got = self.file.read(&mut chunk).map_err(|source| Error::io("read", &self.path, source))?;
            if got == 0 {
                return Ok(());
            }
            self.count(&chunk[..got]);
        }
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|source| Error::io("write", &self.path, source))?;
        self.len = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| {
            Error::io("write", &self.path, source).hint("free some space, or set HF_HOME to a directory on another disk")
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
    fn finish(&mut self, listing: &Listing, file: &str, etag: &str, size: Option<u64>) -> Result<()> {
        if let Some(size) = size.filter(|size| *size != self.len) {
            let error = wrong_size(listing, file, self.len, size);
            self.restart()?;
            return Err(error);
        }
        let hash = self.hash.take().map(|hash| hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        if let Some(hash) = hash.filter(|hash| !hash.eq_ignore_ascii_case(etag)) {
            self.restart()?;
            let error = Error::new(Kind::Hub, "the bytes received are not the file's").at(listing.subject(file).place());
            return Err(error
                .value(format!("SHA-256 {hash}"))
                .rule(format!("SHA-256 {etag}"))
                .hint("run the same command again"));
        }
        self.file.sync_data().map_err(|source| Error::io("write", &self.path, source))
    }
}

fn wrong_size(listing: &Listing, file: &str, got: u64, size: u64) -> Error {
    let what = if got < size { "the hub sent less than it promised" } else { "the hub sent more than it promised" };
    let error = Error::new(Kind::Hub, what).at(listing.subject(file).place());
    error.value(format!("{got} bytes")).rule(format!("{size} bytes")).hint("run the same command again")
}

/// Whether a blob is there in full; where the hub said no size, whether it is there.
fn is_complete(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob).is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

/// Whether a response holds the bytes from `from` on.
fn continues_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

/// Large files are named by their content's SHA-256; small ones by git's SHA-1 of a header and the content, which is not checked.
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}
