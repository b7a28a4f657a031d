//! One file from the hub into the cache: complete or absent.
//!
//! Owns `Hub` and the transfer: a HEAD for name and size, a GET that is taken up again where it broke, a check of size and
//! SHA-256, a rename, a link. Takes a listing and a file's name; returns its path. Knows nothing of what the file is for.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::CONTENT_RANGE;

use crate::error::{Error, Kind, Result};

use super::cache::{RepoCache, make_parent, unique_beside};
use super::client::{Client, Facts, Failure, Patience, Request, Tries, cause};
use super::listing::{Listing, not_cached};
use super::names::Repo;
use super::part::{CHUNK, Part, wrong_size};
use super::progress::Progress;
use super::settings::Settings;

/// The beginning of a broken transfer is kept for the next run when it is at least this long, in bytes.
const WORTH_KEEPING: u64 = 1 << 20;

/// The hub, its cache and whoever asks.
#[derive(Debug)]
pub struct Hub {
    cache: PathBuf,
    /// None offline: nothing that needs a network is even set up.
    client: Option<Client>,
}

/// A file on its way.
struct Transfer<'a> {
    client: &'a Client,
    listing: &'a Listing,
    file: &'a str,
    progress: &'a dyn Progress,
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
        let client = if settings.offline {
            None
        } else {
            Some(Client::new(&settings, patience)?)
        };
        Ok(Self {
            cache: settings.cache,
            client,
        })
    }

    /// The repository's folder in the cache.
    pub(super) fn cache(&self, repo: &Repo) -> RepoCache {
        RepoCache::new(&self.cache, repo)
    }

    /// Whether the network may not be used.
    pub(super) fn is_offline(&self) -> bool {
        self.client.is_none()
    }

    /// What the repository holds.
    pub(super) fn listing(&self, repo: &Repo) -> Result<Listing> {
        match &self.client {
            Some(client) => Listing::fetch(client, repo),
            None => Listing::cached(&self.cache(repo), repo),
        }
    }

    /// The local path of a listed file, fetched unless it is here.
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
        let transfer = Transfer {
            client,
            listing,
            file,
            progress,
        };
        let (etag, size) = transfer.name_and_size()?;
        if !is_complete(&cache.blob(&etag), size) {
            transfer.fill_blob(&cache, &etag, size)?;
        }
        cache.link(&listing.commit, file, &etag)
    }
}

impl Transfer<'_> {
    /// The place for a message.
    fn place(&self) -> String {
        self.listing.subject(self.file).place()
    }

    /// The name of the file's blob and its size, from a HEAD.
    fn name_and_size(&self) -> Result<(String, Option<u64>)> {
        let request = Request::head(self.client.file_url(
            &self.listing.repo,
            &self.listing.commit,
            self.file,
        ));
        let mut tries = Tries::new(self.client.patience);
        let facts = loop {
            match self.client.send(&request, &self.listing.subject(self.file)) {
                Ok((_, facts)) => break facts,
                Err(failure) => tries.wait(failure)?,
            }
        };
        let odd = |what: &str| {
            let error = Error::new(Kind::Hub, what).at(self.place());
            error.hint("check HF_ENDPOINT and the proxy: this does not answer as the hub does")
        };
        match facts {
            Facts {
                commit: Some(commit),
                ..
            } if commit != self.listing.commit => {
                Err(odd("the hub answers with another commit").value(commit))
            }
            Facts { commit: None, .. } => Err(odd("the hub's answer names no commit")),
            Facts {
                etag: Some(etag),
                size,
                ..
            } => Ok((etag, size)),
            Facts { etag: None, .. } => Err(odd("the hub's answer has no ETag")),
        }
    }

    /// Transfers the file into its blob. One process at a time writes a blob; a second one finds it there.
    fn fill_blob(&self, cache: &RepoCache, etag: &str, size: Option<u64>) -> Result<()> {
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
        let taken_up = part.len > 0;
        let receive = |part: &mut Part| {
            self.receive_all(part, size)
                .and_then(|()| part.finish(&self.place(), etag, size))
        };
        let mut outcome = receive(&mut part);
        if taken_up && outcome.is_err() && part.len == 0 {
            // What was there was not this file's beginning: once more without it.
            outcome = receive(&mut part);
        }
        if outcome.is_err() && (part.len < WORTH_KEEPING || lock.is_none()) {
            // Nothing is lost by starting anew, and a failed removal leaves only what the next run takes up.
            let _ = fs::remove_file(&path);
        }
        outcome?;
        fs::rename(&path, &blob).map_err(|source| Error::io("write", &blob, source))?;
        self.progress.finish();
        Ok(())
    }

    /// Receives until the end, taking up again where a connection broke; only attempts without any progress count as failed.
    fn receive_all(&self, part: &mut Part, size: Option<u64>) -> Result<()> {
        self.progress.start(self.file, size);
        if part.len > 0 {
            self.progress.advance(part.len);
        }
        let mut furthest = part.len;
        let mut tries = Tries::new(self.client.patience);
        while size.is_none_or(|size| part.len < size) {
            let Err(failure) = self.receive(part, size) else {
                break;
            };
            if part.len > furthest {
                furthest = part.len;
                tries.succeeded_partly();
            }
            tries.wait(failure)?;
        }
        Ok(())
    }

    /// One GET, from the first byte that is missing.
    fn receive(&self, part: &mut Part, size: Option<u64>) -> Result<(), Failure> {
        let url = self
            .client
            .file_url(&self.listing.repo, &self.listing.commit, self.file);
        let (mut response, _) = self.client.send(
            &Request::get(url, part.len),
            &self.listing.subject(self.file),
        )?;
        if part.len > 0 && !continues_at(&response, part.len) {
            part.restart()?;
            self.progress.start(self.file, size);
            if response.status() != StatusCode::OK {
                let error = Error::new(Kind::Hub, "the hub does not continue a broken transfer")
                    .at(self.place());
                return Err(Failure::soon(error.hint("run the same command again")));
            }
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let got = response.read(&mut chunk).map_err(|source| {
                let error = Error::new(
                    Kind::Hub,
                    format!("the connection broke: {}", cause(&source)),
                )
                .at(self.place());
                Failure::soon(error.hint("check the network and run the same command again"))
            })?;
            if got == 0 {
                break;
            }
            part.append(&chunk[..got])?;
            self.progress.advance(got as u64);
            if size.is_some_and(|size| part.len > size) {
                break;
            }
        }
        match size {
            Some(size) if part.len < size => {
                Err(Failure::soon(wrong_size(&self.place(), part.len, size)))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a blob is there in full; where the hub said no size, whether it is there.
fn is_complete(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob)
        .is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

/// Whether a response holds the bytes from `from` on.
fn continues_at(response: &Response, from: u64) -> bool {
    let range = response
        .headers()
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}
