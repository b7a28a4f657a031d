//! Repository ids, revisions, file names, commits and ETags, validated before they enter a path or a URL.

use crate::error::{Error, Kind, Result};

/// The type of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    /// The name in messages.
    pub(super) fn name(self) -> &'static str {
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

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repo {
    pub(super) kind: RepoKind,
    pub(super) id: String,
    pub(super) revision: String,
}

impl Repo {
    /// Validates `id` as `huggingface_hub.utils.validate_repo_id` does, and `revision` as a path.
    pub(super) fn new(kind: RepoKind, id: &str, revision: &str) -> Result<Self> {
        let is_name = |part: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty()
                && part.chars().all(legal)
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let is_id = id.split('/').count() <= 2
            && id.split('/').all(is_name)
            && id.len() <= 96
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git");
        if !is_id {
            let what = format!("this is not a valid {} id", kind.name());
            let key = kind.key();
            return Err(Error::new(Kind::Hub, what)
                .value(id)
                .rule("`owner/name` of letters, digits, `-`, `_` and `.`, at most 96 characters, without `--`, `..` or `.git` at the end")
                .hint(format!("set {key} to an id as on its page, or to a path that exists")));
        }
        if !is_relative_path(revision) {
            return Err(Error::new(Kind::Hub, "this is not a valid revision")
                .value(revision)
                .rule("a branch, a tag or a commit")
                .hint("leave `revision` out to use `main`"));
        }
        Ok(Self {
            kind,
            id: id.to_string(),
            revision: revision.to_string(),
        })
    }

    /// The path of its page below the endpoint: `owner/name` or `datasets/owner/name`.
    pub(super) fn page(&self) -> String {
        match self.kind {
            RepoKind::Model => self.id.clone(),
            RepoKind::Dataset => format!("datasets/{}", self.id),
        }
    }

    /// The folder in the cache: `models--owner--name`.
    pub(super) fn cache_folder(&self) -> String {
        let kind = match self.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// The repository, or a file in it, as the place for a message.
    pub(super) fn place(&self, file: Option<&str>) -> String {
        let Self { kind, id, revision } = self;
        let repo = format!("{} `{id}` at revision `{revision}`", kind.name());
        match file {
            Some(file) => format!("`{file}` of {repo}"),
            None => repo,
        }
    }
}

/// Whether a listed path stays inside the folder it is joined to.
pub(super) fn is_relative_path(path: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && !part.chars().any(char::is_control)
    };
    !path.contains(['\\', ':']) && path.split('/').all(is_part)
}

/// Whether `revision` is a full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The blob name in an ETag header: without weak mark and quotes. `None` where it cannot be a file name.
pub(super) fn blob_name(etag: &str) -> Option<&str> {
    let name = etag.trim().trim_start_matches("W/").trim_matches('"');
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (name.bytes().all(legal) && !name.is_empty() && !name.starts_with('.') && name.len() <= 128)
        .then_some(name)
}
