//! Names that come from a person or a server, checked before they become part of a path or an address.
//!
//! Owns the rules for repository ids, revisions, file names, ETags and commits. Takes text; returns it, or an error that
//! states the rule. Knows nothing of files or the network.

use crate::error::{Error, Kind, Result};

/// A repository's kind: decides its folder's prefix and its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    /// The plural that stands in folders and in the API.
    pub(super) fn plural(self) -> &'static str {
        match self {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        }
    }

    /// The word for a person.
    pub(super) fn word(self) -> &'static str {
        match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "data set",
        }
    }

    /// The recipe key that names such a repository.
    pub(super) fn key(self) -> &'static str {
        match self {
            RepoKind::Model => "model.id",
            RepoKind::Dataset => "data.train",
        }
    }
}

/// A repository at a revision, both checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repo {
    pub(super) kind: RepoKind,
    pub(super) id: String,
    pub(super) revision: String,
}

impl Repo {
    /// Checks `id` by the hub's own rule (`huggingface_hub.utils.validate_repo_id`) and `revision` as a path.
    pub(super) fn new(kind: RepoKind, id: &str, revision: &str) -> Result<Self> {
        let plain = |part: &str| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let parts: Vec<&str> = id.split('/').collect();
        let legal = parts.len() <= 2
            && parts.iter().all(|part| plain(part))
            && !id.contains("--")
            && !id.contains("..");
        if !legal || id.len() > 96 || id.ends_with(".git") {
            let error = Error::new(
                Kind::Hub,
                format!("this is no {} id of the hub", kind.word()),
            )
            .value(id);
            return Err(error
                .rule("`owner/name` of letters, digits, `-`, `_` and `.`, at most 96 characters, without `--`, `..` or `.git` at the end")
                .hint(format!("set {} to an id as on its page, or to a path that exists", kind.key())));
        }
        if !is_relative_path(revision) {
            let error = Error::new(Kind::Hub, "this is no revision").value(revision);
            return Err(error
                .rule("a branch, a tag or a commit")
                .hint("leave `revision` out to use `main`"));
        }
        Ok(Self {
            kind,
            id: id.to_string(),
            revision: revision.to_string(),
        })
    }

    /// The folder in the cache: `models--owner--name`.
    pub(super) fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }

    /// What a message calls it.
    pub(super) fn called(&self) -> String {
        format!(
            "{} `{}` at revision `{}`",
            self.kind.word(),
            self.id,
            self.revision
        )
    }
}

/// Whether a path of a listing stays inside the folder it is joined to.
pub(super) fn is_relative_path(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\\', ':', '\0'])
        && path.split('/').all(|part| {
            !part.is_empty() && part != "." && part != ".." && !part.chars().any(char::is_control)
        })
}

/// Whether `revision` is a full commit.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The part of an ETag header that names a blob: without the weak mark and the quotes.
pub(super) fn etag(header: &str) -> Option<&str> {
    let text = header.trim();
    let text = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    let legal = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    (legal && !text.is_empty() && !text.starts_with('.') && text.len() <= 128).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Examples after the rule and examples in the docs of huggingface_hub's `validate_repo_id`.
    #[test]
    fn ids_follow_the_hubs_rule() {
        for good in [
            "123",
            "foo",
            "foo/bar",
            "Foo-BAR_foo.bar123",
            "HuggingFaceTB/SmolLM2-135M",
        ] {
            assert!(Repo::new(RepoKind::Model, good, "main").is_ok(), "{good}");
        }
        for bad in [
            "",
            "datasets/foo/bar",
            ".repo_id",
            "foo--bar",
            "foo..bar",
            "foo.git",
            "a/../b",
            "-x",
            "x y",
            "a/",
            "/a",
        ] {
            let error = Repo::new(RepoKind::Model, bad, "main").unwrap_err();
            assert!(error.to_string().contains("owner/name"), "{bad}");
        }
        assert_eq!(
            Repo::new(RepoKind::Dataset, "a/b", "main")
                .unwrap()
                .folder(),
            "datasets--a--b"
        );
        assert_eq!(
            Repo::new(RepoKind::Model, "gpt2", "refs/pr/1")
                .unwrap()
                .folder(),
            "models--gpt2"
        );
    }

    #[test]
    fn a_name_never_leaves_its_folder() {
        for bad in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            "C:x",
            "a\\..\\b",
            "",
            "a\nb",
        ] {
            assert!(!is_relative_path(bad), "{bad}");
            assert!(Repo::new(RepoKind::Model, "a/b", bad).is_err(), "{bad}");
        }
        assert!(is_relative_path("data/train-00000-of-00001.parquet"));
        assert_eq!(etag("W/\"abc-1\""), Some("abc-1"));
        assert_eq!(etag("\"../../x\""), None);
        assert_eq!(etag("\"\""), None);
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567") && !is_commit("main"));
    }
}
