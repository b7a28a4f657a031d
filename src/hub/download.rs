//! One file of a repository -> the cache: metadata, ranged transfer, verification, link.
//!
//! hf-hub 1.0 lists the repository; the transfer is ours because there
//! - `get_file_metadata` follows the redirect of a large file and loses its ETag, size and commit;
//! - `download_file` writes the body of any status, restarts a partial file and checks neither size nor SHA-256;
//! - a ranged stream does not tell a 206 from a 200, and an error not its Retry-After.
//!
//! Plain HTTP: the hub serves a file stored with xet through a bridge, to which its redirect leads.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::Url;
use reqwest::blocking::{RequestBuilder, Response};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, RANGE,
};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::files::{available_space, temporary_path};
use crate::text;
use crate::units::Bytes;

use super::Progress;
use super::cache::{RepoCache, create_parent};
use super::client::{Backoff, Client, Hub, Listing};
use super::errors::{RequestContext, RequestError, Retry, not_cached, root_cause};
use super::repo::{RepoKind, blob_name, is_commit};

const CHUNK: usize = 128 << 10;
/// The largest file of a model that is neither weights nor data: several times the largest tokenizer.
const MAX_SMALL_FILE: u64 = 256 << 20;
/// Below this rate, in bytes per second over the policy's stall timeout, a transfer counts as stalled (curl's `--speed-limit`).
const MIN_RATE: u64 = 1 << 10;
/// A failed transfer of at least so many bytes is left for the next run.
const WORTH_KEEPING: u64 = 1 << 20;

/// The hub's answer to a HEAD request for a file.
struct FileMetadata {
    /// The name of its blob: the SHA-256 of a large file, git's hash of a small one.
    etag: String,
    size: Option<u64>,
}

/// A file on its way.
struct Download<'a> {
    client: &'a Client,
    context: RequestContext<'a>,
    url: Url,
    commit: &'a str,
    file: &'a str,
    progress: &'a dyn Progress,
}

impl Hub {
    /// The local path of a listed file, fetched unless it is in the cache.
    pub(super) fn file(
        &self,
        listing: &Listing,
        file: &str,
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let cache = self.cache(&listing.repo);
        let pointer = cache.snapshot(&listing.commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        let Some(client) = &self.client else {
            return Err(not_cached(&listing.repo, Some(file)));
        };
        let download = Download {
            client,
            context: client.context(&listing.repo, Some(file)),
            url: client.file_url(&listing.repo, &listing.commit, file),
            commit: &listing.commit,
            file,
            progress,
        };
        let metadata = client.retry(progress, || download.metadata())?;
        if !is_complete(&cache.blob(&metadata.etag), metadata.size) {
            download.fill_blob(&cache, &metadata)?;
        }
        cache.link(&listing.commit, file, &metadata.etag)
    }
}

impl Download<'_> {
    /// Sends a request. The token goes along: the address is the endpoint's.
    fn send(&self, request: RequestBuilder) -> Result<Response, RequestError> {
        // A range or a size of a compressed body would mean something else.
        let request = request.header(ACCEPT_ENCODING, "identity");
        let request = match &self.client.token {
            Some(token) => request.bearer_auth(token.secret()),
            None => request,
        };
        let sent = request.send();
        sent.map_err(|source| self.context.transport_error(source))
    }

    /// Blob name and size. A large file's are in the X-Linked headers of the redirect that leaves the hub.
    fn metadata(&self) -> Result<FileMetadata, RequestError> {
        let response = self.send(self.client.metadata.head(self.url.clone()))?;
        let (status, headers) = (response.status(), response.headers());
        if !status.is_success() && !status.is_redirection() {
            return Err(self.context.status_error(status, headers));
        }
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if text("x-repo-commit") != Some(self.commit) {
            let error = self
                .context
                .unexpected("the hub answers without the commit of the request");
            return Err(error.into());
        }
        let etag = text("x-linked-etag").or_else(|| text(ETAG.as_str()));
        let Some(etag) = etag.and_then(blob_name) else {
            return Err(self
                .context
                .unexpected("the hub's answer has no ETag")
                .into());
        };
        let length = text(CONTENT_LENGTH.as_str()).filter(|_| status.is_success());
        let size = text("x-linked-size").or(length);
        Ok(FileMetadata {
            etag: etag.to_string(),
            size: size.and_then(|size| size.trim().parse().ok()),
        })
    }

    /// Transfers the file into its blob. One process at a time writes a blob; the next finds it complete.
    fn fill_blob(&self, cache: &RepoCache, metadata: &FileMetadata) -> Result<()> {
        let blob = cache.blob(&metadata.etag);
        create_parent(&blob)?;
        let lock = cache.lock(&metadata.etag)?;
        if is_complete(&blob, metadata.size) {
            return Ok(());
        }
        let path = match lock {
            Some(_) => blob.with_file_name(format!("{}.incomplete", metadata.etag)),
            None => temporary_path(&blob, "tmp"),
        };
        let mut partial = PartialDownload::open(path.clone(), metadata)?;
        if let Err(error) = self.check_size(&blob, metadata.size, partial.len) {
            // A partial download stays for a disk with more room; an empty file is of no use.
            let _ = (partial.len == 0).then(|| fs::remove_file(&path));
            return Err(error);
        }
        let resumed = partial.len > 0;
        let mut outcome = self.transfer(&mut partial, metadata);
        if resumed && outcome.is_err() && partial.len == 0 {
            // The partial file was not the beginning of this one: again without it.
            outcome = self.transfer(&mut partial, metadata);
        }
        let resumable = lock.is_some() && partial.hash.is_some();
        if outcome.is_err() && (partial.len < WORTH_KEEPING || !resumable) {
            // A failed removal leaves only what the next run resumes.
            let _ = fs::remove_file(&path);
        }
        outcome?;
        fs::rename(&path, &blob).map_err(|source| Error::io("write", &blob, source))?;
        self.progress.finish();
        Ok(())
    }

    /// Receives until the end and verifies. Only attempts without progress count as failures.
    fn transfer(&self, partial: &mut PartialDownload, metadata: &FileMetadata) -> Result<()> {
        self.progress.start(self.file, metadata.size);
        if partial.len > 0 {
            self.progress.advance(partial.len);
        }
        let least = least_bytes(self.client.policy.stall_timeout);
        let mut furthest = partial.len;
        let mut backoff = Backoff::new(self.client.policy, self.progress);
        while metadata.size.is_none_or(|size| partial.len < size) {
            let Err(failed) = self.receive(partial, metadata.size) else {
                break;
            };
            if partial.len > furthest + least {
                furthest = partial.len;
                backoff.reset();
            }
            backoff.wait(failed)?;
        }
        partial.verify(&self.context.place(), metadata)
    }

    /// One GET request, from the first missing byte.
    fn receive(
        &self,
        partial: &mut PartialDownload,
        size: Option<u64>,
    ) -> Result<(), RequestError> {
        let mut response = self.request_from(partial, size)?;
        let mut chunk = vec![0; CHUNK];
        let most = size.unwrap_or(self.max_size());
        let (mut window, mut in_window) = (Instant::now(), 0);
        while partial.len <= most {
            let received = response.read(&mut chunk).map_err(|source| {
                let what = format!("the connection broke: {}", root_cause(&source));
                self.interrupted(&what, "check the network and run the same command again")
            })?;
            if received == 0 {
                break;
            }
            partial.append(&chunk[..received])?;
            self.progress.advance(received as u64);
            in_window += received as u64;
            let elapsed = window.elapsed();
            if elapsed >= self.client.policy.stall_timeout {
                if in_window < least_bytes(elapsed) {
                    return Err(self.interrupted(
                        "the connection stalled: less than 1 KB/s arrives",
                        "check the network and run the same command again",
                    ));
                }
                (window, in_window) = (Instant::now(), 0);
            }
        }
        match size {
            None if partial.len > most => Err(self.too_large(partial.len).into()),
            Some(size) if partial.len < size => {
                let error = wrong_size(&self.context.place(), partial.len, size);
                Err(RequestError::new(error, Retry::Backoff))
            }
            _ => Ok(()),
        }
    }

    /// Requests the missing bytes; without ranges on the server, all of them.
    fn request_from(
        &self,
        partial: &mut PartialDownload,
        size: Option<u64>,
    ) -> Result<Response, RequestError> {
        let from = partial.len;
        let mut request = self.client.contents.get(self.url.clone());
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let response = self.send(request)?;
        let status = response.status();
        let refused_range = from > 0 && status == StatusCode::RANGE_NOT_SATISFIABLE;
        if !status.is_success() && !refused_range {
            return Err(self.context.status_error(status, response.headers()));
        }
        if let Some(encoding) = response.headers().get(CONTENT_ENCODING)
            && encoding != "identity"
        {
            let error = self.context.unexpected("the hub's answer is compressed");
            return Err(error
                .value(format!("{encoding:?}"))
                .rule("the file's own bytes")
                .into());
        }
        if from > 0 && !continues_at(&response, from) {
            partial.restart()?;
            self.progress.start(self.file, size);
            if status != StatusCode::OK {
                let what = "the hub does not continue a broken transfer";
                return Err(self.interrupted(what, "run the same command again"));
            }
        }
        Ok(response)
    }

    /// The most bytes of this file that are accepted.
    fn max_size(&self) -> u64 {
        let is_small =
            self.context.repo.kind == RepoKind::Model && !self.file.ends_with(".safetensors");
        if is_small { MAX_SMALL_FILE } else { u64::MAX }
    }

    /// Refuses a file that is larger than any of its kind, or than the free space.
    fn check_size(&self, blob: &Path, size: Option<u64>, present: u64) -> Result<()> {
        let Some(size) = size else {
            return Ok(());
        };
        if size > self.max_size() {
            return Err(self.too_large(size));
        }
        let missing = Bytes(size.saturating_sub(present));
        match available_space(blob).filter(|free| *free < missing) {
            None => Ok(()),
            Some(free) => Err(Error::new(Kind::Hub, "the disk is too full for this file")
                .at(self.context.place())
                .value(format!("{missing} to fetch"))
                .rule(format!("{free} are free at {}", blob.display()))
                .hint("free some space, or set HF_HOME to a directory on another disk")),
        }
    }

    fn too_large(&self, size: u64) -> Error {
        Error::new(Kind::Hub, "the file is too large for its kind")
            .at(self.context.place())
            .value(Bytes(size).to_string())
            .rule(format!("at most {}", Bytes(self.max_size())))
            .hint("check the id: no configuration, tokenizer or template is so large")
    }

    fn interrupted(&self, what: &str, hint: &str) -> RequestError {
        let error = Error::new(Kind::Hub, what).at(self.context.place());
        RequestError::new(error.hint(hint), Retry::Backoff)
    }
}

/// The bytes that a transfer at `MIN_RATE` brings in `time`.
fn least_bytes(time: Duration) -> u64 {
    (MIN_RATE as f64 * time.as_secs_f64()) as u64
}

/// Whether a response has the bytes from `from` on.
fn continues_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE);
    let range = range.and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

/// Whether a blob exists with the expected size.
fn is_complete(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob)
        .is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

fn wrong_size(place: &str, received: u64, size: u64) -> Error {
    let what = if received < size {
        "the hub sent less than it promised"
    } else {
        "the hub sent more than it promised"
    };
    Error::new(Kind::Hub, what)
        .at(place)
        .value(format!("{received} bytes"))
        .rule(format!("{size} bytes"))
        .hint("run the same command again")
}

fn wrong_bytes(place: &str, algorithm: &str, received: &str, expected: &str) -> Error {
    Error::new(Kind::Hub, "the bytes received are not the file's")
        .at(place)
        .value(format!("{algorithm} {received}"))
        .rule(format!("{algorithm} {expected}"))
        .hint("run the same command again")
}

/// The `.incomplete` file of a blob.
struct PartialDownload {
    path: PathBuf,
    file: File,
    len: u64,
    /// Of the bytes so far; `None` where the blob's name is not a SHA-256.
    hash: Option<Sha256>,
}

impl PartialDownload {
    /// Opens the file that an earlier run left, or an empty one. It is resumed only with a known size and hash: another
    /// program may have left a file with holes.
    fn open(path: PathBuf, metadata: &FileMetadata) -> Result<Self> {
        let mut options = File::options();
        let options = options.create(true).truncate(false).read(true).write(true);
        let file = options
            .open(&path)
            .map_err(|source| Error::io("create", &path, source))?;
        let etag = metadata.etag.as_bytes();
        let is_sha256 = etag.len() == 64 && etag.iter().all(u8::is_ascii_hexdigit);
        let found = file.metadata().map_or(0, |found| found.len());
        let mut partial = Self {
            path,
            file,
            len: 0,
            hash: is_sha256.then(Sha256::new),
        };
        if is_sha256 && metadata.size.is_some_and(|size| found <= size) {
            partial.hash_existing()?;
        } else {
            partial.restart()?;
        }
        Ok(partial)
    }

    fn hash_existing(&mut self) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = self.file.read(&mut chunk);
            match read.map_err(|source| Error::io("read", &self.path, source))? {
                0 => return Ok(()),
                read => self.count(&chunk[..read]),
            }
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(|source| Error::io("write", &self.path, source))?;
        self.len = 0;
        self.hash = self.hash.take().map(|_| Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
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

    /// Checks size and SHA-256 and flushes to the disk. A file that fails is emptied: no later run can use it.
    fn verify(&mut self, place: &str, metadata: &FileMetadata) -> Result<()> {
        if let Some(size) = metadata.size.filter(|size| *size != self.len) {
            let error = wrong_size(place, self.len, size);
            self.restart()?;
            return Err(error);
        }
        if let Some(hash) = self.hash.clone() {
            let hash = text::hex(hash.finalize());
            if !hash.eq_ignore_ascii_case(&metadata.etag) {
                self.restart()?;
                return Err(wrong_bytes(place, "SHA-256", &hash, &metadata.etag));
            }
        }
        self.verify_git_hash(place, metadata)?;
        let flushed = self.file.sync_data();
        flushed.map_err(|source| Error::io("write", &self.path, source))
    }

    /// Checks the SHA-1 that names a file stored in git: of its blob, or on mirrors of its bytes alone.
    fn verify_git_hash(&mut self, place: &str, metadata: &FileMetadata) -> Result<()> {
        if !is_commit(&metadata.etag) {
            return Ok(());
        }
        let bytes = fs::read(&self.path).map_err(|e| Error::io("read", &self.path, e))?;
        let prefixes = [format!("blob {}\0", bytes.len()), String::new()];
        let sha1 = |prefix| {
            Sha1::new_with_prefix(prefix)
                .chain_update(&bytes)
                .finalize()
        };
        let found = prefixes.map(|prefix| text::hex(sha1(prefix)));
        if found
            .iter()
            .any(|hash| hash.eq_ignore_ascii_case(&metadata.etag))
        {
            return Ok(());
        }
        self.restart()?;
        Err(wrong_bytes(place, "SHA-1", &found[0], &metadata.etag))
    }
}
