//! The cache layout of `huggingface_hub` and hf-hub, shared with both.
//!
//! ```text
//! models--owner--name/blobs/ETAG                the contents of a file, complete or absent
//!                    /blobs/ETAG.incomplete     a partial download
//!                    /snapshots/COMMIT/FILE     a symbolic link to its blob
//!                    /refs/REVISION             the commit of a branch or tag
//! .locks/models--owner--name/ETAG.lock          locked while the blob is written
//! ```
//!
//! hf-hub 1.0 keeps the functions for these paths private.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::{is_temporary, temporary_path, write_atomic};

use super::repo::{Repo, is_commit};

/// One repository's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(root: &Path, repo: &Repo) -> Self {
        let name = repo.cache_folder();
        Self {
            folder: root.join(&name),
            locks: root.join(".locks").join(name),
        }
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The commit of `revision` when it was last fetched.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Writes the commit of `revision`; a commit needs no ref.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_file(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// The relative paths of a commit's files whose blobs exist, sorted.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let mut files = Vec::new();
        collect_files(&self.snapshot(commit), "", &mut files);
        files.sort();
        files
    }

    /// Links `file` of `commit` to the blob `etag`; returns its path.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        create_parent(&pointer)?;
        let temporary = temporary_path(&pointer, "tmp");
        // From snapshots/COMMIT/a/b up to the repository's folder: two levels and one for each folder in `file`.
        let up = "../".repeat(2 + file.matches('/').count());
        symlink(Path::new(&format!("{up}blobs/{etag}")), &temporary)
            // Without symbolic links (file system, account): a hard link, else a copy.
            .or_else(|_| fs::hard_link(&blob, &temporary))
            .or_else(|_| fs::copy(&blob, &temporary).map(drop))
            .and_then(|()| fs::rename(&temporary, &pointer))
            .map_err(|source| {
                let _ = fs::remove_file(&temporary);
                Error::io("create", &pointer, source)
            })?;
        Ok(pointer)
    }

    /// Waits until no other process writes the blob `etag`. `None` where the file system has no locks.
    pub(super) fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|source| Error::io("create", &path, source))?;
        // An flock, as Python's: released when the file is closed, also by a crash.
        Ok(file.lock().is_ok().then_some(file))
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Replaces the file at `path` atomically, and creates the folder it is in.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    create_parent(path)?;
    write_atomic(path, bytes)
}

/// Creates the folder of `path`.
pub(super) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|source| {
        Error::io("create", parent, source)
            .hint("set HF_HOME to a directory you may write to, on a disk with room")
    })
}

fn collect_files(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{prefix}{name}");
        // Follows the link: one to a missing blob is skipped.
        match fs::metadata(entry.path()) {
            Ok(found) if found.is_dir() => {
                collect_files(&entry.path(), &format!("{path}/"), files);
            }
            Ok(_) if !is_temporary(&name) && !name.ends_with(".incomplete") => files.push(path),
            _ => {}
        }
    }
}
