//! Hub endpoint, cache directory and credentials, from the environment variables of `huggingface_hub`.
//!
//! Same variables, same precedence as its `constants.py` and `utils/_auth.py`. hf-hub's own look-up is
//! not used: it knows fewer variables, and every setting is passed to it explicitly.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// An access token. `Debug` and `Display` hide it, and no error contains it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token in `text`, trimmed.
    ///
    /// # Errors
    /// When it is empty or not printable ASCII. The error does not repeat it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            let what = "the hub token is empty or holds a character that no token has";
            return Err(Error::new(Kind::Hub, what).hint(
                "set HF_TOKEN to a token from https://huggingface.co/settings/tokens, or run `hf auth login`",
            ));
        }
        Ok(Self(text.to_string()))
    }

    /// The token itself, for the Authorization header.
    pub(super) fn secret(&self) -> &str {
        &self.0
    }

    /// `text` with every occurrence of the token replaced.
    pub(super) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "<token>")
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(<hidden>)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<hidden>")
    }
}

/// Hub endpoint, cache directory and credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The cache directory with its `models--owner--name` folders.
    pub cache: PathBuf,
    /// The endpoint, without a trailing slash.
    pub endpoint: String,
    /// The access token.
    pub token: Option<Token>,
    /// No request is sent.
    pub offline: bool,
}

impl Settings {
    /// Reads `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (else the token file), `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the
    /// older names that `huggingface_hub` still reads.
    ///
    /// # Errors
    /// When the token is not printable ASCII, or neither a cache nor a home directory is set.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// The same from any source of variables.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let text = |name: &str| variable(name).filter(|text| !text.trim().is_empty());
        // An empty path counts as unset: Python would use the current directory, which nobody means.
        let path = |name: &str| text(name).map(|path| expand(&path, variable));
        let home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(Path::new(&home_directory(variable)?).join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or_else(|| {
            let what = "no place for downloaded models: neither HF_HOME nor HOME is set";
            Error::new(Kind::Hub, what).hint("set HF_HOME=/a/directory")
        })?;
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_string());
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        Ok(Self {
            cache,
            endpoint: endpoint.trim().trim_end_matches('/').to_string(),
            token: find_token(&text, token_file.as_deref())?,
            offline: offline.is_some_and(|text| is_true(&text)),
        })
    }
}

/// The token of the environment, else of the file that `hf auth login` writes.
fn find_token(text: &dyn Fn(&str) -> Option<String>, file: Option<&Path>) -> Result<Option<Token>> {
    if text("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|text| is_true(&text)) {
        return Ok(None);
    }
    // An absent or unreadable token file means no token, as in Python: public models need none.
    let found = text("HF_TOKEN")
        .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
        .or_else(|| std::fs::read_to_string(file?).ok())
        .filter(|text| !text.trim().is_empty());
    found.map(|text| Token::new(&text)).transpose()
}

/// The values that `huggingface_hub` takes as true.
fn is_true(text: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str())
}

fn home_directory(variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    ["HOME", "USERPROFILE"]
        .iter()
        .find_map(|name| variable(name).filter(|text| !text.is_empty()))
}

/// Python's `expanduser`, then `expandvars` (`$NAME`, `${NAME}`); an unknown name stays.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let text = match (text.strip_prefix('~'), home_directory(variable)) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => home + rest,
        _ => text.to_string(),
    };
    let pattern = regex::Regex::new(r"\$(?:(\w+)|\{([^}]*)\})").expect("the pattern is valid");
    let expanded = pattern.replace_all(&text, |found: &regex::Captures<'_>| {
        let name = found.get(1).or_else(|| found.get(2));
        name.and_then(|name| variable(name.as_str()))
            .unwrap_or_else(|| found[0].to_string())
    });
    PathBuf::from(expanded.into_owned())
}
