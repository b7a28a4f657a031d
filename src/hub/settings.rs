//! Who asks the hub, where, and with which token.
//!
//! Owns `Settings` and `Token`, and reads them from the environment by the same variables, in the same order, as Python's
//! `huggingface_hub` (its `constants.py` and `utils/_auth.py`). Refuses to know what is asked for.

use std::fmt;
use std::path::{Path, PathBuf};

use reqwest::header::HeaderValue;

use crate::error::{Error, Kind, Result};

/// The hub itself.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A secret that proves who asks. It is never shown: neither `Debug` nor `Display` nor any error holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token in `text`, without surrounding space.
    ///
    /// # Errors
    /// When it is empty or holds what cannot stand in an HTTP header. The error does not repeat it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            let error = Error::new(
                Kind::Hub,
                "the hub token is empty or holds a character that no token has",
            );
            return Err(error.hint("set HF_TOKEN to a token from https://huggingface.co/settings/tokens, or run `hf auth login`"));
        }
        Ok(Self(text.to_string()))
    }

    /// The header's value, marked so that no log of the HTTP client shows it.
    pub(super) fn bearer(&self) -> HeaderValue {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0))
            .expect("a token is printable ASCII");
        value.set_sensitive(true);
        value
    }

    /// `text` without the token, should a server have echoed it.
    pub(super) fn scrub(&self, text: &str) -> String {
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

/// Where files come from and where they are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The cache that holds `models--owner--name` folders.
    pub cache: PathBuf,
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// The token, where there is one.
    pub token: Option<Token>,
    /// Nothing is asked over the network.
    pub offline: bool,
}

impl Settings {
    /// The settings the environment asks for: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (else the token file), `HF_ENDPOINT`,
    /// `HF_HUB_OFFLINE`, and the older names `huggingface_hub` still reads.
    ///
    /// # Errors
    /// When the token cannot stand in a header, or no home directory is known and no cache is named.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var(name).ok())
    }

    /// The same over any source of variables.
    fn from_lookup(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        // An empty path variable counts as absent: Python would use the current directory, which nobody means.
        let path = |name: &str| {
            variable(name)
                .filter(|text| !text.is_empty())
                .map(|text| expanded(&text, variable))
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")));
        let home = home.or_else(|| {
            path("HOME")
                .or_else(|| path("USERPROFILE"))
                .map(|home| home.join(".cache/huggingface"))
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| {
                Error::new(
                    Kind::Hub,
                    "no place for downloaded models: neither HF_HOME nor HOME is set",
                )
                .hint("set HF_HOME=/a/directory")
            })?;
        let endpoint = variable("HF_ENDPOINT").filter(|text| !text.trim().is_empty());
        let endpoint = endpoint.unwrap_or_else(|| DEFAULT_ENDPOINT.to_string());
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
            .iter()
            .find_map(|name| variable(name).filter(|text| !text.is_empty()));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        Ok(Self {
            cache,
            endpoint: endpoint.trim().trim_end_matches('/').to_string(),
            token: token(variable, token_file.as_deref())?,
            offline: offline.is_some_and(|text| is_true(&text)),
        })
    }
}

/// The token of the environment, else of the file that `hf auth login` writes.
fn token(variable: &dyn Fn(&str) -> Option<String>, file: Option<&Path>) -> Result<Option<Token>> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|text| is_true(&text)) {
        return Ok(None);
    }
    let named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
        .iter()
        .find_map(|name| variable(name).filter(|text| !text.trim().is_empty()));
    // A token file that is absent or unreadable is no token, as in Python: public models need none.
    let text = named
        .or_else(|| std::fs::read_to_string(file?).ok())
        .filter(|text| !text.trim().is_empty());
    text.map(|text| Token::new(&text)).transpose()
}

/// The words `huggingface_hub` reads as yes.
fn is_true(text: &str) -> bool {
    matches!(
        text.to_ascii_uppercase().as_str(),
        "1" | "ON" | "YES" | "TRUE"
    )
}

/// `~` and `$NAME` or `${NAME}` replaced, as Python's `expanduser` and `expandvars` do; an unknown name stays as it is.
fn expanded(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let name = regex::Regex::new(r"\$(?:(\w+)|\{([^}]*)\})").expect("the pattern is valid");
    let home = variable("HOME").or_else(|| variable("USERPROFILE"));
    let text = match (text.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            format!("{home}{rest}")
        }
        _ => text.to_string(),
    };
    let whole = name.replace_all(&text, |found: &regex::Captures<'_>| {
        let wanted = found
            .get(1)
            .or_else(|| found.get(2))
            .map_or("", |name| name.as_str());
        variable(wanted).unwrap_or_else(|| found[0].to_string())
    });
    PathBuf::from(whole.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        read(variables).unwrap()
    }

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_lookup(&|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_string())
        })
    }

    // Expected values: the order of precedence in huggingface_hub's src/huggingface_hub/constants.py.
    #[test]
    fn the_cache_is_where_python_looks_for_it() {
        assert_eq!(
            settings(&[("HOME", "/h")]).cache,
            Path::new("/h/.cache/huggingface/hub")
        );
        assert_eq!(
            settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).cache,
            Path::new("/x/huggingface/hub")
        );
        assert_eq!(
            settings(&[
                ("HOME", "/h"),
                ("HF_HOME", "~/hf"),
                ("XDG_CACHE_HOME", "/x")
            ])
            .cache,
            Path::new("/h/hf/hub")
        );
        assert_eq!(
            settings(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]).cache,
            Path::new("/old")
        );
        let both = [
            ("HF_HOME", "/hf"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HUB_CACHE", "${S}/$S$U/c"),
            ("S", "/s"),
        ];
        assert_eq!(settings(&both).cache, Path::new("/s//s$U/c"));
        assert!(
            read(&[])
                .unwrap_err()
                .remedy()
                .unwrap()
                .contains("HF_HOME=")
        );
    }

    #[test]
    fn the_token_comes_from_the_environment_then_from_its_file() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(
            settings(&[("HF_HOME", home)]).token,
            Some(Token("hf_file".into()))
        );
        assert_eq!(
            settings(&[("HF_HOME", home), ("HF_TOKEN", " hf_env\n")]).token,
            Some(Token("hf_env".into()))
        );
        assert_eq!(
            settings(&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).token,
            Some(Token("hf_old".into()))
        );
        assert_eq!(
            settings(&[("HF_HOME", home), ("HF_TOKEN_PATH", "/nowhere")]).token,
            None
        );
        assert_eq!(
            settings(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token,
            None
        );
    }

    #[test]
    fn offline_is_what_python_reads_as_true() {
        for (text, offline) in [
            ("1", true),
            ("on", true),
            ("Yes", true),
            ("TRUE", true),
            ("0", false),
            ("", false),
            ("2", false),
        ] {
            assert_eq!(
                settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", text)]).offline,
                offline,
                "{text}"
            );
        }
        assert!(settings(&[("HOME", "/h"), ("TRANSFORMERS_OFFLINE", "1")]).offline);
        assert!(
            !settings(&[
                ("HOME", "/h"),
                ("HF_HUB_OFFLINE", "0"),
                ("TRANSFORMERS_OFFLINE", "1")
            ])
            .offline
        );
        assert_eq!(
            settings(&[("HOME", "/h"), ("HF_ENDPOINT", "https://mirror.example/")]).endpoint,
            "https://mirror.example"
        );
        assert_eq!(
            settings(&[("HOME", "/h")]).endpoint,
            "https://huggingface.co"
        );
    }

    #[test]
    fn a_token_is_never_shown() {
        let with = settings(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret")]);
        let token = with.token.clone().unwrap();
        for shown in [
            format!("{with:?}"),
            format!("{token:?}"),
            format!("{token}"),
            format!("{:?}", token.bearer()),
        ] {
            assert!(!shown.contains("secret"), "{shown}");
        }
        let bad = read(&[("HOME", "/h"), ("HF_TOKEN", "hf_sec ret")]).unwrap_err();
        assert!(
            !bad.to_string().contains("ret\n") && !bad.to_string().contains("hf_sec"),
            "{bad}"
        );
        assert_eq!(token.scrub("x hf_secret y"), "x <token> y");
    }
}
