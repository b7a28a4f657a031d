//! Failed hub requests -> messages with a remedy, and whether a retry can help.
//!
//! Text from a server is shown on one line, shortened, and never with the token; a URL without its
//! query, where signed links carry secrets.

use std::time::Duration;

use hf_hub::HFError;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{StatusCode, Url};

use crate::error::{Error, Kind};

use super::repo::Repo;
use super::settings::Token;

/// When a failed request may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    Never,
    /// After the policy's exponential backoff.
    Backoff,
    /// Not before the delay that the server asks for.
    After(Duration),
}

/// A failed request.
#[derive(Debug)]
pub(super) struct RequestError {
    pub(super) error: Error,
    pub(super) retry: Retry,
}

impl RequestError {
    pub(super) fn new(error: Error, retry: Retry) -> Self {
        Self { error, retry }
    }
}

impl From<Error> for RequestError {
    fn from(error: Error) -> Self {
        Self::new(error, Retry::Never)
    }
}

/// What a request is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestContext<'a> {
    pub(super) repo: &'a Repo,
    pub(super) file: Option<&'a str>,
    /// The key or flag that names the repository.
    pub(super) key: &'a str,
    pub(super) endpoint: &'a Url,
    pub(super) token: Option<&'a Token>,
    /// It changes the repository.
    pub(super) upload: bool,
}

impl RequestContext<'_> {
    /// The place for a message.
    pub(super) fn place(&self) -> String {
        self.repo.place(self.file)
    }

    /// A response that the hub never gives.
    pub(super) fn unexpected(&self, what: &str) -> Error {
        Error::new(Kind::Hub, what)
            .at(self.place())
            .hint("check HF_ENDPOINT and the proxy: this server does not respond like the hub")
    }

    /// An error status of our own request.
    pub(super) fn status_error(&self, status: StatusCode, headers: &HeaderMap) -> RequestError {
        let text = |name: &str| Some(String::from_utf8_lossy(headers.get(name)?.as_bytes()));
        let code = text("x-error-code").unwrap_or_default();
        let message = text("x-error-message").unwrap_or_default();
        self.refusal(status.as_u16(), &code, &message, retry_after(headers))
    }

    /// An error of hf-hub.
    pub(super) fn hf_error(&self, error: HFError) -> RequestError {
        let (context, delay) = match error {
            HFError::RateLimited {
                context,
                retry_after,
            } => (Some(context), retry_after),
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context } => (Some(context), None),
            HFError::RepoNotFound { context, .. } | HFError::RevisionNotFound { context, .. } => {
                (context, None)
            }
            HFError::Request { source, .. } if is_json(&source) => {
                let error = self.unexpected("the hub's answer cannot be read");
                return error.value(root_cause(&source)).into();
            }
            HFError::Request { source, .. } => return self.transport_error(source),
            other => {
                let what = format!("the request failed: {}", root_cause(&other));
                let error = Error::new(Kind::Hub, self.one_line(&what)).at(self.place());
                return error.hint("run the same command again").into();
            }
        };
        match context {
            Some(context) => self.refusal(
                context.status.as_u16(),
                context.error_code.as_deref().unwrap_or_default(),
                context.server_message.as_deref().unwrap_or_default(),
                delay,
            ),
            None => self.refusal(404, "", "", None),
        }
    }

    /// A request without a response.
    pub(super) fn transport_error(&self, source: reqwest::Error) -> RequestError {
        let address = self.one_line(&display_url(source.url().unwrap_or(self.endpoint)));
        let source = source.without_url();
        let what = if source.is_timeout() {
            format!("no answer from {address} in time")
        } else {
            format!("cannot reach {address}: {}", root_cause(&source))
        };
        let Repo { kind, id, .. } = self.repo;
        let error = Error::new(Kind::Hub, what).at(self.place()).hint(format!(
            "check the network, and HTTPS_PROXY or HF_ENDPOINT if you use them; a {} that is in the cache works \
             with HF_HUB_OFFLINE=1; if `{id}` is meant as a path, it does not exist",
            kind.name()
        ));
        if source.is_builder() || source.is_redirect() {
            return error.into();
        }
        RequestError::new(error, Retry::Backoff)
    }

    /// An error status: `code` is the hub's X-Error-Code, `message` its explanation.
    fn refusal(
        &self,
        status: u16,
        code: &str,
        message: &str,
        delay: Option<Duration>,
    ) -> RequestError {
        let (what, hint) = self.explain(status, code, delay);
        let error = Error::new(Kind::Hub, what).at(self.place()).hint(hint);
        let message = self.one_line(message);
        let error = if message.is_empty() {
            error
        } else {
            error.value(message)
        };
        let retry = match status {
            408 | 429 | 500..=599 => delay.map_or(Retry::Backoff, Retry::After),
            _ => Retry::Never,
        };
        RequestError::new(error, retry)
    }

    /// What an error status means, and the remedy.
    fn explain(&self, status: u16, code: &str, delay: Option<Duration>) -> (String, String) {
        let is_absent = matches!(status, 404 | 410)
            || matches!(code, "RevisionNotFound" | "EntryNotFound" | "RepoNotFound");
        match status {
            401 | 403 => self.explain_access(status, code),
            _ if is_absent => self.explain_absence(code),
            _ => self.explain_failure(status, delay),
        }
    }

    /// The repository's page on the hub.
    fn page(&self) -> String {
        format!("{}/{}", display_url(self.endpoint), self.repo.page())
    }

    /// A repository that the token, or none, does not open.
    fn explain_access(&self, status: u16, code: &str) -> (String, String) {
        let Repo { kind, id, .. } = self.repo;
        let (name, key) = (kind.name(), self.key);
        let endpoint = display_url(self.endpoint);
        if status == 403 && self.upload {
            return (
                format!("the token may not write to `{id}`"),
                format!(
                    "set HF_TOKEN to a token with write access from {endpoint}/settings/tokens, or change {key}"
                ),
            );
        }
        if status == 403 || code == "GatedRepo" {
            let account = match self.token {
                Some(_) => "HF_TOKEN must belong to that account",
                None => "set HF_TOKEN to that account's token",
            };
            let page = self.page();
            return (
                format!("the {name} is gated: only accounts with granted access can read it"),
                format!("accept the licence on {page} while signed in; {account}"),
            );
        }
        if self.token.is_some() {
            return (
                "the hub does not accept the token".to_string(),
                format!(
                    "make a new one on {endpoint}/settings/tokens and set HF_TOKEN, or unset HF_TOKEN for a public {name}"
                ),
            );
        }
        (
            format!("there is no such {name}, or it is private"),
            format!(
                "check the id `{id}` ({key}); for a private {name} set HF_TOKEN or run `hf auth login`"
            ),
        )
    }

    /// A repository, revision or file that the hub does not have.
    fn explain_absence(&self, code: &str) -> (String, String) {
        let Repo { kind, id, revision } = self.repo;
        let (name, key, page) = (kind.name(), self.key, self.page());
        match (code, self.file) {
            ("RevisionNotFound", _) => (
                format!("{name} `{id}` has no revision `{revision}`"),
                format!("choose a branch, tag or commit listed on {page}/tree/main"),
            ),
            ("EntryNotFound", Some(file)) => (
                format!("{name} `{id}` has no file `{file}`"),
                format!("look at its files on {page}/tree/{revision}"),
            ),
            (code, Some(file)) if code != "RepoNotFound" => (
                format!("the hub does not find `{file}` of {name} `{id}`"),
                format!("check the id, the revision and the files on {page}/tree/{revision}"),
            ),
            _ => (
                format!("the hub has no {name} `{id}`"),
                format!("check the id ({key}): it is `owner/name` as on {page}"),
            ),
        }
    }

    /// A request that the hub does not serve now, or never.
    fn explain_failure(&self, status: u16, delay: Option<Duration>) -> (String, String) {
        let wait = delay.map_or("some minutes".into(), |delay| {
            format!("{} s", delay.as_secs())
        });
        let quota = match self.token {
            Some(_) => "",
            None => ", or set HF_TOKEN: an account may send more requests",
        };
        match status {
            429 => (
                "the hub limits the rate of requests".to_string(),
                format!("wait {wait} and try again{quota}"),
            ),
            408 | 500..=599 => (
                format!("the hub reports an error: {}", status_line(status)),
                "try again later; https://status.huggingface.co shows the state of the hub"
                    .to_string(),
            ),
            _ => (
                format!("the hub refuses the request: {}", status_line(status)),
                format!("look at {}", self.page()),
            ),
        }
    }

    /// A server's text on one line of at most 200 characters, without the token.
    fn one_line(&self, text: &str) -> String {
        let text = self
            .token
            .map_or(text.to_string(), |token| token.redact(text));
        let line: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        line.trim().to_string()
    }
}

/// Missing from the cache while requests are forbidden.
pub(super) fn not_cached(repo: &Repo, file: Option<&str>) -> Error {
    let (name, key) = (repo.kind.name(), repo.kind.key());
    let what = format!("this {name} is not in the cache, and HF_HUB_OFFLINE forbids requests");
    Error::new(Kind::Hub, what)
        .at(repo.place(file))
        .hint(format!(
            "run the same command once with a network as `HF_HUB_OFFLINE=0 wattune ...`, or copy the {name}'s files \
             here and set {key} to their path"
        ))
}

/// The delay of a Retry-After header: seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = chrono::DateTime::parse_from_rfc2822(text).ok()?.to_utc();
    Some((date - chrono::Utc::now()).to_std().unwrap_or_default())
}

/// "404 Not Found".
fn status_line(status: u16) -> String {
    StatusCode::from_u16(status).map_or(status.to_string(), |status| status.to_string())
}

/// A URL for a message: without user, password, query and fragment.
pub(super) fn display_url(url: &Url) -> String {
    let origin = url.origin().ascii_serialization();
    format!("{origin}{}", url.path().trim_end_matches('/'))
}

/// The innermost cause; the outer ones repeat the address.
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Whether a body was received but is not the JSON that was expected.
fn is_json(error: &reqwest::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<serde_json::Error>())
}
