//! What a repository holds at a revision, and which commit that is.
//!
//! Owns `Listing`. Asks the hub's API, or offline the cache. Every file name is checked before it can become a path. Knows
//! nothing of what the files are for.

use std::io::Read;

use serde::Deserialize;

use crate::error::{Error, Kind, Result};

use super::cache::RepoCache;
use super::client::{Client, Failure, Request, Tries, cause};
use super::names::{self, Repo};
use super::refusal::Subject;

/// More than the listing of any repository that is a model or a data set for us.
const MAX_LISTING: u64 = 256 << 20;

/// The files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) repo: Repo,
    pub(super) commit: String,
    /// Paths with `/`, checked; offline only those that are in the cache.
    pub(super) files: Vec<String>,
}

/// The part of the API's answer that is used.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    pub(super) fn subject<'a>(&'a self, file: &'a str) -> Subject<'a> {
        Subject {
            repo: &self.repo,
            file: Some(file),
        }
    }

    /// Asks the hub.
    pub(super) fn fetch(client: &Client, repo: &Repo) -> Result<Self> {
        let subject = Subject { repo, file: None };
        let request = Request::get(client.listing_url(repo), 0);
        let mut tries = Tries::new(client.patience);
        let body = loop {
            match client
                .send(&request, &subject)
                .and_then(|(response, _)| read(response, &subject))
            {
                Ok(body) => break body,
                Err(failure) => tries.wait(failure)?,
            }
        };
        let odd = |what: &str| {
            Error::new(Kind::Hub, what)
                .at(subject.place())
                .hint("check HF_ENDPOINT and the proxy: this does not answer as the hub does")
        };
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|source| odd("the hub's listing cannot be read").value(source.to_string()))?;
        if !names::is_commit(&answer.sha) {
            return Err(odd("the hub's listing names no commit"));
        }
        let files: Vec<String> = answer
            .siblings
            .into_iter()
            .map(|sibling| sibling.rfilename)
            .collect();
        match files.iter().find(|file| !names::is_relative_path(file)) {
            Some(file) => Err(
                odd("the hub's listing holds a file name that leads elsewhere")
                    .value(file.escape_debug().to_string()),
            ),
            None => Ok(Self {
                repo: repo.clone(),
                commit: answer.sha,
                files,
            }),
        }
    }

    /// Asks the cache.
    pub(super) fn cached(cache: &RepoCache, repo: &Repo) -> Result<Self> {
        let absent = || not_cached(repo, None);
        let commit = cache.commit_of(&repo.revision).ok_or_else(absent)?;
        let files = cache.files_of(&commit);
        if files.is_empty() {
            Err(absent())
        } else {
            Ok(Self {
                repo: repo.clone(),
                commit,
                files,
            })
        }
    }
}

/// What is wanted is not in the cache and the hub must not be asked.
pub(super) fn not_cached(repo: &Repo, file: Option<&str>) -> Error {
    let word = repo.kind.word();
    Error::new(Kind::Hub, format!("this {word} is not in the cache, and HF_HUB_OFFLINE forbids asking the hub"))
        .at(Subject { repo, file }.place())
        .hint(format!(
            "run the same command once with a network as `HF_HUB_OFFLINE=0 wattune ...`, or copy the {word}'s files here and set {} to their path",
            repo.kind.key()
        ))
}

fn read(response: reqwest::blocking::Response, subject: &Subject<'_>) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    match response.take(MAX_LISTING).read_to_end(&mut body) {
        Ok(_) => Ok(body),
        Err(source) => {
            let error = Error::new(
                Kind::Hub,
                format!("the connection to the hub broke: {}", cause(&source)),
            )
            .at(subject.place());
            Err(Failure::soon(
                error.hint("check the network and run the same command again"),
            ))
        }
    }
}
