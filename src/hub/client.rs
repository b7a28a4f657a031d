//! `Hub`: settings, HTTP clients, retries, and the listing of a repository.
//!
//! Listings and uploads go through hf-hub. The transfer of a file has clients of its own; `download`
//! says why. The token is sent to the scheme, host and port of the endpoint alone.

use std::path::PathBuf;
use std::time::Duration;

use hf_hub::{HFClient, HFClientSync, split_id};
use reqwest::Url;
use reqwest::redirect::Policy;

use crate::error::{Error, Kind, Result};

use super::Progress;
use super::cache::RepoCache;
use super::errors::{RequestContext, RequestError, Retry, not_cached, root_cause};
use super::repo::{Repo, RepoKind, is_commit, is_relative_path};
use super::settings::{Settings, Token};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the answer to a commit after its upload: the hub verifies the files first.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(120);
const MAX_REDIRECTS: usize = 10;

/// How often and how long a failed request is retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in a row without progress, the first included.
    pub max_attempts: u32,
    /// The delay after the first failure; it doubles after each.
    pub base_delay: Duration,
    /// The longest wait without progress, over all attempts: a server that asks for more is not waited for.
    pub max_delay: Duration,
    /// A server that sends nothing, or next to nothing, for so long is disconnected.
    pub stall_timeout: Duration,
}

impl Default for RetryPolicy {
    /// Five attempts over about four seconds, and up to five minutes: the window of the hub's rate limits.
    fn default() -> Self {
        Self {
            max_attempts: 5,
            base_delay: Duration::from_millis(250),
            max_delay: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// Exponential backoff over consecutive failures.
pub(super) struct Backoff<'a> {
    policy: RetryPolicy,
    progress: &'a dyn Progress,
    failures: u32,
    waited: Duration,
}

impl<'a> Backoff<'a> {
    pub(super) fn new(policy: RetryPolicy, progress: &'a dyn Progress) -> Self {
        Self {
            policy,
            progress,
            failures: 0,
            waited: Duration::ZERO,
        }
    }

    /// Sleeps before the next attempt, or returns the error when retries are exhausted or cannot help.
    pub(super) fn wait(&mut self, failed: RequestError) -> Result<()> {
        let backoff = self.policy.base_delay * (1 << self.failures.min(16));
        self.failures += 1;
        let delay = match failed.retry {
            Retry::Never => return Err(failed.error),
            Retry::Backoff => backoff.min(self.policy.max_delay),
            Retry::After(delay) => delay.max(backoff),
        };
        self.waited += delay;
        if self.failures >= self.policy.max_attempts || self.waited > self.policy.max_delay {
            return Err(failed.error);
        }
        self.progress.retry(failed.error.what(), delay);
        std::thread::sleep(delay);
        Ok(())
    }

    /// Starts over after progress.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
        self.waited = Duration::ZERO;
    }
}

/// The hub, its cache and the settings to use them with.
#[derive(Debug)]
pub struct Hub {
    pub(super) cache: PathBuf,
    /// None offline.
    pub(super) client: Option<Client>,
}

/// The files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) repo: Repo,
    pub(super) commit: String,
    /// Validated relative paths; offline only those in the cache.
    pub(super) files: Vec<String>,
}

impl Listing {
    pub(super) fn contains(&self, file: &str) -> bool {
        self.files.iter().any(|listed| listed == file)
    }
}

impl Hub {
    /// A hub with these settings.
    ///
    /// # Errors
    /// When the endpoint is not a URL or HTTPS cannot be set up.
    pub fn new(settings: Settings) -> Result<Self> {
        Self::with_retry_policy(settings, RetryPolicy::default())
    }

    /// A hub with the settings of the environment.
    ///
    /// # Errors
    /// As [`Settings::from_env`] and [`Hub::new`].
    pub fn from_env() -> Result<Self> {
        Self::new(Settings::from_env()?)
    }

    /// The same with another retry policy.
    ///
    /// # Errors
    /// As [`Hub::new`].
    pub fn with_retry_policy(settings: Settings, policy: RetryPolicy) -> Result<Self> {
        let client = if settings.offline {
            None
        } else {
            Some(Client::new(&settings, policy)?)
        };
        let cache = settings.cache;
        Ok(Self { cache, client })
    }

    pub(super) fn cache(&self, repo: &Repo) -> RepoCache {
        RepoCache::new(&self.cache, repo)
    }

    pub(super) fn is_offline(&self) -> bool {
        self.client.is_none()
    }

    /// The files of a repository: as the hub lists them, or offline as the cache has them.
    pub(super) fn listing(&self, repo: &Repo, progress: &dyn Progress) -> Result<Listing> {
        if let Some(client) = &self.client {
            return client.retry(progress, || client.list(repo));
        }
        let cache = self.cache(repo);
        let commit = cache.commit_of(&repo.revision);
        let commit = commit.ok_or_else(|| not_cached(repo, None))?;
        let files = cache.files(&commit);
        if files.is_empty() {
            return Err(not_cached(repo, None));
        }
        let repo = repo.clone();
        Ok(Listing {
            repo,
            commit,
            files,
        })
    }
}

/// The clients for requests to one endpoint.
#[derive(Debug)]
pub(super) struct Client {
    /// Listings and uploads. Follows redirects.
    pub(super) api: HFClientSync,
    /// Metadata of a file: follows redirects within the endpoint and stops where one leaves it.
    pub(super) metadata: reqwest::blocking::Client,
    /// Contents of a file. Follows redirects.
    pub(super) contents: reqwest::blocking::Client,
    pub(super) endpoint: Url,
    pub(super) token: Option<Token>,
    pub(super) policy: RetryPolicy,
}

impl Client {
    fn new(settings: &Settings, policy: RetryPolicy) -> Result<Self> {
        let endpoint = parse_endpoint(&settings.endpoint)?;
        let token = settings.token.clone();
        let blocking = |stay: bool| {
            reqwest::blocking::ClientBuilder::from(http(&endpoint, stay))
                // Here the timeout of each read, not of the transfer.
                .timeout(policy.stall_timeout)
                .build()
                .map_err(|source| no_https(&source))
        };
        let http = http(&endpoint, false).read_timeout(UPLOAD_TIMEOUT);
        Ok(Self {
            api: hf_client(http, &endpoint, token.as_ref())?,
            metadata: blocking(true)?,
            contents: blocking(false)?,
            endpoint,
            token,
            policy,
        })
    }

    /// Sends a request until it succeeds or the retry policy ends.
    pub(super) fn retry<T>(
        &self,
        progress: &dyn Progress,
        mut request: impl FnMut() -> Result<T, RequestError>,
    ) -> Result<T> {
        let mut backoff = Backoff::new(self.policy, progress);
        loop {
            match request() {
                Ok(done) => return Ok(done),
                Err(failed) => backoff.wait(failed)?,
            }
        }
    }

    pub(super) fn context<'a>(
        &'a self,
        repo: &'a Repo,
        file: Option<&'a str>,
    ) -> RequestContext<'a> {
        RequestContext {
            repo,
            file,
            key: repo.kind.key(),
            endpoint: &self.endpoint,
            token: self.token.as_ref(),
            upload: false,
        }
    }

    /// `ENDPOINT/[datasets/]ID/resolve/COMMIT/FILE`, each segment percent-encoded.
    pub(super) fn file_url(&self, repo: &Repo, commit: &str, file: &str) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .expect("an http address has a path")
            .pop_if_empty()
            .extend(repo.page().split('/'))
            .extend(["resolve", commit])
            .extend(file.split('/'));
        url
    }

    fn list(&self, repo: &Repo) -> Result<Listing, RequestError> {
        let context = self.context(repo, None);
        let (owner, name) = split_id(&repo.id);
        let revision = repo.revision.as_str();
        let info = match repo.kind {
            RepoKind::Model => {
                let model = self.api.model(owner, name);
                let info = model.info().revision(revision).send();
                info.map(|info| (info.sha, info.siblings))
            }
            RepoKind::Dataset => {
                let dataset = self.api.dataset(owner, name);
                let info = dataset.info().revision(revision).send();
                info.map(|info| (info.sha, info.siblings))
            }
        };
        let (commit, siblings) = info.map_err(|error| context.hf_error(error))?;
        let Some(commit) = commit.filter(|commit| is_commit(commit)) else {
            return Err(context
                .unexpected("the hub's listing names no commit")
                .into());
        };
        let siblings = siblings.unwrap_or_default().into_iter();
        let files: Vec<String> = siblings.map(|sibling| sibling.rfilename).collect();
        if let Some(file) = files.iter().find(|file| !is_relative_path(file)) {
            let error =
                context.unexpected("the hub's listing contains a path outside the repository");
            return Err(error.value(file.escape_debug().to_string()).into());
        }
        let repo = repo.clone();
        Ok(Listing {
            repo,
            commit,
            files,
        })
    }
}

fn parse_endpoint(text: &str) -> Result<Url> {
    let url = Url::parse(text).ok();
    let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| {
        // A user and password may stand before an `@`.
        let shown = text.rsplit_once('@').map_or(text, |(_, rest)| rest);
        Error::new(Kind::Hub, "the hub endpoint is not a valid URL")
            .value(shown)
            .rule("http:// or https:// and a host")
            .hint("unset HF_ENDPOINT, or set it as in HF_ENDPOINT=https://huggingface.co")
    })
}

/// The options of all clients. reqwest removes the Authorization header where a redirect changes host or port.
fn http(endpoint: &Url, stay: bool) -> reqwest::ClientBuilder {
    let origin = endpoint.origin();
    let policy = Policy::custom(move |attempt| {
        let encrypted = attempt.previous().last().map(Url::scheme) == Some("https");
        if encrypted && attempt.url().scheme() != "https" {
            return attempt.error("a redirect from https to http");
        }
        if attempt.previous().len() > MAX_REDIRECTS {
            return attempt.error("too many redirects");
        }
        if stay && attempt.url().origin() != origin {
            return attempt.stop();
        }
        attempt.follow()
    });
    let builder = reqwest::Client::builder()
        .user_agent(concat!("wattune/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(policy);
    let host = endpoint.host_str().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    if host == "localhost" || address.is_ok_and(|address| address.is_loopback()) {
        // A proxy on another host cannot reach this loopback.
        return builder.no_proxy();
    }
    builder
}

fn hf_client(
    http: reqwest::ClientBuilder,
    endpoint: &Url,
    token: Option<&Token>,
) -> Result<HFClientSync> {
    let http = http.build().map_err(|source| no_https(&source))?;
    HFClient::builder()
        .client(http)
        .endpoint(endpoint.as_str())
        // Without a token hf-hub would look for one; a text that cannot be a header is sent nowhere.
        .token(token.map_or("\n", Token::secret))
        // Retries are ours: hf-hub's ignore Retry-After.
        .retry_max_attempts(0)
        .build_sync()
        .map_err(|source| no_https(&source))
}

fn no_https(source: &dyn std::error::Error) -> Error {
    let what = format!("cannot set up HTTPS: {}", root_cause(source));
    Error::new(Kind::Hub, what).hint(
        "install the system's CA certificates (package `ca-certificates`), or set SSL_CERT_FILE to a file that holds some",
    )
}
