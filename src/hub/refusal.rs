//! What the hub said no to, in words that say what to type.
//!
//! Owns the meaning of statuses and of the hub's `X-Error-Code`. Takes a status, headers and what was asked; returns a
//! `Failure`. Knows nothing of transfers. What a server wrote is shown short, plain, and never with the token in it.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::error::{Error, Kind};

use super::client::{Again, Failure, cause};
use super::names::{Repo, RepoKind};
use super::settings::Token;

/// What a request is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) repo: &'a Repo,
    pub(super) file: Option<&'a str>,
}

impl Subject<'_> {
    /// The place for a message.
    pub(super) fn place(&self) -> String {
        match self.file {
            Some(file) => format!("`{file}` of {}", self.repo.called()),
            None => self.repo.called(),
        }
    }

    /// The page a person opens.
    fn page(&self, endpoint: &str) -> String {
        match self.repo.kind {
            RepoKind::Model => format!("{endpoint}/{}", self.repo.id),
            RepoKind::Dataset => format!("{endpoint}/datasets/{}", self.repo.id),
        }
    }
}

/// The failure that a status means.
pub(super) fn refused(
    status: StatusCode,
    headers: &HeaderMap,
    subject: &Subject<'_>,
    endpoint: &str,
    token: Option<&Token>,
) -> Failure {
    let code = headers
        .get("x-error-code")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let page = subject.page(endpoint);
    let failure = match (status.as_u16(), code) {
        (401 | 403, "GatedRepo") | (403, _) => Failure::from(gated(&page, token.is_some())),
        (401, _) => Failure::from(unauthorised(subject, endpoint, token.is_some())),
        (404 | 410, _) | (_, "RepoNotFound" | "RevisionNotFound" | "EntryNotFound") => {
            Failure::from(missing(code, subject, &page))
        }
        (429, _) => rate_limited(headers, token.is_some()),
        (408 | 500..=599, _) => busy(status, headers),
        _ => Failure::from(
            Error::new(Kind::Hub, format!("the hub refuses the request: {status}"))
                .hint(format!("look at {page}")),
        ),
    };
    let error = failure.error.at(subject.place());
    let error = match said(headers, token) {
        Some(said) => error.value(said),
        None => error,
    };
    Failure {
        error,
        again: failure.again,
    }
}

/// The failure that no answer means.
pub(super) fn unreachable(
    source: &reqwest::Error,
    address: &str,
    subject: &Subject<'_>,
) -> Failure {
    let what = match source.is_timeout() {
        true => format!("no answer from {address} in time"),
        false => format!("cannot reach {address}: {}", cause(source)),
    };
    let error = Error::new(Kind::Hub, what).at(subject.place()).hint(format!(
        "check the network, and HTTPS_PROXY or HF_ENDPOINT if you use them; a {} that is in the cache works with HF_HUB_OFFLINE=1; if \
         `{}` is meant as a path, there is nothing at it",
        subject.repo.kind.word(),
        subject.repo.id
    ));
    let again = if source.is_builder() {
        Again::Never
    } else {
        Again::Soon
    };
    Failure { error, again }
}

fn gated(page: &str, has_token: bool) -> Error {
    let token = if has_token {
        "HF_TOKEN must belong to that account"
    } else {
        "set HF_TOKEN to that account's token"
    };
    Error::new(
        Kind::Hub,
        "the hub gives this only to accounts that were granted access",
    )
    .hint(format!(
        "accept the licence on {page} while signed in; {token}"
    ))
}

fn unauthorised(subject: &Subject<'_>, endpoint: &str, has_token: bool) -> Error {
    let word = subject.repo.kind.word();
    match has_token {
        true => Error::new(Kind::Hub, "the hub does not accept the token").hint(format!(
            "make a new one on {endpoint}/settings/tokens and set HF_TOKEN, or unset HF_TOKEN for a public {word}"
        )),
        false => Error::new(Kind::Hub, format!("there is no such {word}, or it is private")).hint(format!(
            "check the id `{}` ({}); for a private {word} set HF_TOKEN or run `hf auth login`",
            subject.repo.id,
            subject.repo.kind.key()
        )),
    }
}

fn missing(code: &str, subject: &Subject<'_>, page: &str) -> Error {
    let (word, id) = (subject.repo.kind.word(), &subject.repo.id);
    match (code, subject.file) {
        ("RevisionNotFound", _) => Error::new(
            Kind::Hub,
            format!("{word} `{id}` has no revision `{}`", subject.repo.revision),
        )
        .hint(format!(
            "choose a branch, tag or commit listed on {page}/tree/main"
        )),
        ("EntryNotFound", Some(file)) => {
            Error::new(Kind::Hub, format!("{word} `{id}` has no file `{file}`")).hint(format!(
                "look at its files on {page}/tree/{}",
                subject.repo.revision
            ))
        }
        ("RepoNotFound", _) | (_, None) => {
            Error::new(Kind::Hub, format!("the hub has no {word} `{id}`")).hint(format!(
                "check the id ({}): it is `owner/name` as on {page}",
                subject.repo.kind.key()
            ))
        }
        (_, Some(file)) => Error::new(
            Kind::Hub,
            format!("the hub does not find `{file}` of {word} `{id}`"),
        )
        .hint(format!(
            "check the id, the revision and the files on {page}/tree/{}",
            subject.repo.revision
        )),
    }
}

fn rate_limited(headers: &HeaderMap, has_token: bool) -> Failure {
    let wait = retry_after(headers);
    let spoken = wait.map_or("some minutes".to_string(), |wait| {
        format!("{} s", wait.as_secs())
    });
    let more = if has_token {
        ""
    } else {
        ", or set HF_TOKEN: an account may ask more often"
    };
    let error = Error::new(Kind::Hub, "the hub limits how often it is asked")
        .hint(format!("wait {spoken} and try again{more}"));
    Failure {
        error,
        again: wait.map_or(Again::Soon, Again::After),
    }
}

fn busy(status: StatusCode, headers: &HeaderMap) -> Failure {
    let error = Error::new(Kind::Hub, format!("the hub is out of order: {status}"))
        .hint("try again later; https://status.huggingface.co says how the hub is");
    Failure {
        error,
        again: retry_after(headers).map_or(Again::Soon, Again::After),
    }
}

/// The wait that a server asks for: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = chrono::DateTime::parse_from_rfc2822(text).ok()?;
    Some(
        (date.to_utc() - chrono::Utc::now())
            .to_std()
            .unwrap_or_default(),
    )
}

/// The server's own message: one line, at most 200 characters, without the token.
fn said(headers: &HeaderMap, token: Option<&Token>) -> Option<String> {
    let text = String::from_utf8_lossy(headers.get("x-error-message")?.as_bytes());
    let text = token.map_or(text.to_string(), |token| token.scrub(&text));
    let line: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    (!line.trim().is_empty()).then(|| line.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_read_as_seconds_or_as_a_date() {
        let after = |text: &str| {
            retry_after(&HeaderMap::from_iter([(
                RETRY_AFTER,
                text.parse().unwrap(),
            )]))
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = (chrono::Utc::now() + chrono::Duration::seconds(30))
            .format("%a, %d %b %Y %H:%M:%S GMT")
            .to_string();
        assert!((28..=30).contains(&after(&soon).unwrap().as_secs()));
        assert_eq!(after("tomorrow"), None);
    }

    #[test]
    fn a_servers_words_are_short_plain_and_without_the_token() {
        let token = Token::new("hf_secret").unwrap();
        let headers = |text: &str| {
            HeaderMap::from_iter([("x-error-message".parse().unwrap(), text.parse().unwrap())])
        };
        assert_eq!(
            said(&headers("your hf_secret\tis bad"), Some(&token)).unwrap(),
            "your <token>is bad"
        );
        assert_eq!(said(&headers(&"x".repeat(900)), None).unwrap().len(), 200);
        assert_eq!(said(&HeaderMap::new(), None), None);
    }
}
