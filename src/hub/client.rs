//! One request to the hub: addresses, redirects, the token's reach, and trying again.
//!
//! Owns the HTTP client. Takes an address built from checked names; returns a response and what the hub said about the file
//! on the way to it. Knows nothing of the cache. The token goes to the endpoint's own scheme, host and port and nowhere else.

use std::time::Duration;

use reqwest::blocking::Response;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, ETAG, HeaderMap, LOCATION, RANGE,
};
use reqwest::{Method, StatusCode, Url};

use crate::error::{Error, Kind, Result};

use super::names::{self, Repo, RepoKind};
use super::refusal::{self, Subject};
use super::settings::{Settings, Token};

/// Waiting for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Waiting for the next bytes of a response; a whole body may take as long as it takes.
const SILENCE: Duration = Duration::from_secs(60);
/// As many redirects as browsers and `huggingface_hub` follow at most, and then some.
const MAX_REDIRECTS: usize = 10;

/// How often and how long a failing request is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Attempts in a row without progress, the first included.
    pub attempts: u32,
    /// The wait after the first failure; it doubles after each.
    pub first_wait: Duration,
    /// A server that asks for a longer wait than this is not waited for.
    pub longest_wait: Duration,
}

impl Default for Patience {
    /// Five attempts over about four seconds, and up to the five minutes after which the hub's rate limits start anew.
    fn default() -> Self {
        Self {
            attempts: 5,
            first_wait: Duration::from_millis(250),
            longest_wait: Duration::from_secs(300),
        }
    }
}

/// Whether and when a failed request may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    Never,
    Soon,
    After(Duration),
}

/// A request that failed, and whether trying again can help.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) again: Again,
}

impl Failure {
    pub(super) fn soon(error: Error) -> Self {
        Self {
            error,
            again: Again::Soon,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            again: Again::Never,
        }
    }
}

/// Counts failures in a row and waits between them.
pub(super) struct Tries {
    patience: Patience,
    failed: u32,
}

impl Tries {
    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            failed: 0,
        }
    }

    /// Waits before the next attempt, or gives the failure back when there is to be none.
    pub(super) fn wait(&mut self, failure: Failure) -> Result<()> {
        let backoff = self
            .patience
            .first_wait
            .saturating_mul(1 << self.failed.min(16));
        self.failed += 1;
        let wait = match failure.again {
            Again::Never => return Err(failure.error),
            Again::Soon => backoff.min(self.patience.longest_wait),
            Again::After(wait) => wait.max(backoff),
        };
        if self.failed >= self.patience.attempts || wait > self.patience.longest_wait {
            return Err(failure.error);
        }
        std::thread::sleep(wait);
        Ok(())
    }

    /// Progress was made: the count starts anew.
    pub(super) fn succeeded_partly(&mut self) {
        self.failed = 0;
    }
}

/// What the hub says about a file, gathered along the redirects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// The name of the file's blob.
    pub(super) etag: Option<String>,
    /// Its size in bytes.
    pub(super) size: Option<u64>,
    /// The commit it belongs to.
    pub(super) commit: Option<String>,
}

/// What is asked: an address and, when above zero, the first byte wanted.
#[derive(Debug, Clone)]
pub(super) struct Request {
    method: Method,
    url: Url,
    from: u64,
}

impl Request {
    pub(super) fn get(url: Url, from: u64) -> Self {
        Self {
            method: Method::GET,
            url,
            from,
        }
    }

    pub(super) fn head(url: Url) -> Self {
        Self {
            method: Method::HEAD,
            url,
            from: 0,
        }
    }
}

/// The HTTP client with its endpoint and token.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::blocking::Client,
    endpoint: Url,
    token: Option<Token>,
    pub(super) patience: Patience,
}

impl Client {
    pub(super) fn new(settings: &Settings, patience: Patience) -> Result<Self> {
        let endpoint = Url::parse(&settings.endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint = endpoint.ok_or_else(|| {
            let error = Error::new(Kind::Hub, "the hub's address is not one")
                .value(shown_text(&settings.endpoint));
            error
                .rule("http:// or https:// and a host")
                .hint("unset HF_ENDPOINT, or set it as in HF_ENDPOINT=https://huggingface.co")
        })?;
        let mut builder = reqwest::blocking::Client::builder()
            .user_agent(concat!("wattune/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            // In the blocking client this bounds each wait (for the headers, then for each read), not the whole transfer.
            .timeout(SILENCE);
        if is_loopback(&endpoint) {
            // No proxy elsewhere can reach this machine's own loopback.
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|source| {
            let error = Error::new(Kind::Hub, format!("cannot set up HTTPS: {}", cause(&source)));
            error.hint("install the system's CA certificates (package `ca-certificates`), or set SSL_CERT_FILE to a file that holds some")
        })?;
        Ok(Self {
            http,
            endpoint,
            token: settings.token.clone(),
            patience,
        })
    }

    /// `ENDPOINT/api/models/ID/revision/REVISION`.
    pub(super) fn listing_url(&self, repo: &Repo) -> Url {
        let mut parts = vec!["api", repo.kind.plural()];
        parts.extend(repo.id.split('/'));
        parts.extend(["revision", &repo.revision]);
        self.address(&parts)
    }

    /// `ENDPOINT/[datasets/]ID/resolve/COMMIT/FILE`.
    pub(super) fn file_url(&self, repo: &Repo, commit: &str, file: &str) -> Url {
        let mut parts = match repo.kind {
            RepoKind::Model => vec![],
            RepoKind::Dataset => vec!["datasets"],
        };
        parts.extend(repo.id.split('/'));
        parts.extend(["resolve", commit]);
        parts.extend(file.split('/'));
        self.address(&parts)
    }

    /// The endpoint with path segments, each percent-encoded (a `/` in a revision too, as the hub wants it).
    fn address(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .expect("an http address has a path")
            .pop_if_empty()
            .extend(parts);
        url
    }

    /// Sends `request` and follows its redirects, once. A HEAD stops where a redirect leaves the hub: the hub's own answer has
    /// said all there is to know.
    pub(super) fn send(
        &self,
        request: &Request,
        subject: &Subject<'_>,
    ) -> Result<(Response, Facts), Failure> {
        let mut url = request.url.clone();
        let mut facts = Facts::default();
        let mut linked = false;
        for _ in 0..=MAX_REDIRECTS {
            let response = self
                .hop(request, &url)
                .map_err(|source| refusal::unreachable(&source, &shown(&url), subject))?;
            linked = facts.note(response.status(), response.headers(), linked);
            let Some(next) = redirect(&response, &url) else {
                return self.accepted(request, response, facts, subject);
            };
            if request.method == Method::HEAD && !self.is_hub(&next) {
                return Ok((response, facts));
            }
            if url.scheme() == "https" && next.scheme() != "https" {
                let error = Error::new(
                    Kind::Hub,
                    "the hub redirects to an address that is not encrypted",
                )
                .at(subject.place());
                return Err(error
                    .value(shown(&next))
                    .hint("check HF_ENDPOINT and the proxy")
                    .into());
            }
            url = next;
        }
        let error = Error::new(Kind::Hub, "the hub's redirects lead nowhere")
            .at(subject.place())
            .value(shown(&url));
        Err(error.hint("check HF_ENDPOINT and the proxy").into())
    }

    fn hop(&self, request: &Request, url: &Url) -> reqwest::Result<Response> {
        // Bytes as they are stored: a size or a range of a compressed body would mean something else.
        let mut sent = self
            .http
            .request(request.method.clone(), url.clone())
            .header(ACCEPT_ENCODING, "identity");
        if request.from > 0 {
            sent = sent.header(RANGE, format!("bytes={}-", request.from));
        }
        if let Some(token) = self.token.as_ref().filter(|_| self.is_hub(url)) {
            sent = sent.header(AUTHORIZATION, token.bearer());
        }
        sent.send()
    }

    fn accepted(
        &self,
        request: &Request,
        response: Response,
        facts: Facts,
        subject: &Subject<'_>,
    ) -> Result<(Response, Facts), Failure> {
        let status = response.status();
        // A range that is not there is the business of whoever asked for it.
        if status.is_success() || (status == StatusCode::RANGE_NOT_SATISFIABLE && request.from > 0)
        {
            return Ok((response, facts));
        }
        Err(refusal::refused(
            status,
            response.headers(),
            subject,
            &shown(&self.endpoint),
            self.token.as_ref(),
        ))
    }

    /// Whether an address is the hub's own: same scheme, host and port as the endpoint.
    fn is_hub(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }
}

impl Facts {
    /// Takes note of a response's headers. A large file's own ETag and size stand in X-Linked-* headers of the hub's first
    /// answer, and hold against those of later ones; `linked` says that they were seen.
    fn note(&mut self, status: StatusCode, headers: &HeaderMap, linked: bool) -> bool {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let number = |name: &str| text(name).and_then(|text| text.trim().parse().ok());
        if self.commit.is_none() {
            self.commit = text("x-repo-commit")
                .filter(|commit| names::is_commit(commit))
                .map(str::to_string);
        }
        if linked {
            return true;
        }
        let linked_etag = text("x-linked-etag")
            .and_then(names::etag)
            .map(str::to_string);
        let own_size = number(CONTENT_LENGTH.as_str()).filter(|_| status.is_success());
        self.size = number("x-linked-size").or(own_size);
        let linked = linked_etag.is_some();
        self.etag = linked_etag.or_else(|| {
            text(ETAG.as_str())
                .and_then(names::etag)
                .map(str::to_string)
        });
        linked
    }
}

/// Where a redirect leads.
fn redirect(response: &Response, url: &Url) -> Option<Url> {
    let follow = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    let location = response
        .headers()
        .get(LOCATION)
        .filter(|_| follow)?
        .to_str()
        .ok()?;
    url.join(location).ok()
}

/// An address for a message: without user, password, query (signed links carry secrets there) and fragment.
fn shown(url: &Url) -> String {
    format!(
        "{}{}",
        url.origin().ascii_serialization(),
        url.path().trim_end_matches('/')
    )
}

/// The same for a text that is no address: what stands before an `@` may be a password.
fn shown_text(text: &str) -> &str {
    text.rsplit_once('@').map_or(text, |(_, rest)| rest)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// The innermost reason of a failed transfer; the outer ones repeat the address.
pub(super) fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(endpoint: &str) -> Result<Client> {
        let settings = Settings {
            cache: "/c".into(),
            endpoint: endpoint.into(),
            token: None,
            offline: false,
        };
        Client::new(&settings, Patience::default())
    }

    // Expected addresses: huggingface_hub's hf_hub_url and HfApi.repo_info.
    #[test]
    fn addresses_are_the_hubs() {
        let hub = client("https://huggingface.co").unwrap();
        let model = Repo::new(RepoKind::Model, "a/b", "refs/pr/1").unwrap();
        assert_eq!(
            hub.listing_url(&model).as_str(),
            "https://huggingface.co/api/models/a/b/revision/refs%2Fpr%2F1"
        );
        assert_eq!(
            hub.file_url(&model, "c0", "x y/z#.json").as_str(),
            "https://huggingface.co/a/b/resolve/c0/x%20y/z%23.json"
        );
        let data = Repo::new(RepoKind::Dataset, "squad", "main").unwrap();
        let mirror = client("https://mirror.example/hf/").unwrap();
        assert_eq!(
            mirror.file_url(&data, "c0", "t.csv").as_str(),
            "https://mirror.example/hf/datasets/squad/resolve/c0/t.csv"
        );
    }

    #[test]
    fn an_address_that_is_none_is_refused_without_its_password() {
        for bad in ["huggingface.co", "ftp://x", "", "me:secret@host"] {
            let error = client(bad).unwrap_err().to_string();
            assert!(
                error.contains("HF_ENDPOINT=") && !error.contains("secret"),
                "{error}"
            );
        }
        let url = Url::parse("https://u:secret@host:8/p/?sig=secret#secret").unwrap();
        assert_eq!(shown(&url), "https://host:8/p");
    }

    #[test]
    fn the_linked_etag_and_size_hold_against_later_ones() {
        let headers = |pairs: &[(&'static str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect::<HeaderMap>()
        };
        let mut facts = Facts::default();
        let first = headers(&[
            ("x-linked-etag", "\"sha\""),
            ("x-linked-size", "7"),
            ("etag", "\"git\""),
            ("content-length", "99"),
        ]);
        assert!(facts.note(StatusCode::FOUND, &first, false));
        facts.note(
            StatusCode::OK,
            &headers(&[("etag", "\"cdn\""), ("content-length", "8")]),
            true,
        );
        assert_eq!((facts.etag.as_deref(), facts.size), (Some("sha"), Some(7)));

        let mut facts = Facts::default();
        assert!(!facts.note(
            StatusCode::TEMPORARY_REDIRECT,
            &headers(&[("content-length", "99")]),
            false
        ));
        facts.note(
            StatusCode::OK,
            &headers(&[("etag", "W/\"git\""), ("content-length", "8")]),
            false,
        );
        assert_eq!((facts.etag.as_deref(), facts.size), (Some("git"), Some(8)));
    }

    #[test]
    fn a_wait_longer_than_allowed_is_not_begun() {
        let patience = Patience {
            attempts: 9,
            first_wait: Duration::ZERO,
            longest_wait: Duration::from_secs(5),
        };
        let failure = |again| Failure {
            error: Error::new(Kind::Hub, "no"),
            again,
        };
        assert!(
            Tries::new(patience)
                .wait(failure(Again::After(Duration::from_secs(6))))
                .is_err()
        );
        assert!(Tries::new(patience).wait(failure(Again::Never)).is_err());
        let mut tries = Tries::new(Patience {
            attempts: 3,
            ..patience
        });
        let waits: Vec<bool> = (0..3)
            .map(|_| tries.wait(failure(Again::Soon)).is_ok())
            .collect();
        assert_eq!(waits, [true, true, false]);
    }
}
