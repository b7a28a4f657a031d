//! The cache on disk, as Python's `huggingface_hub` lays it out, so that both use each other's files.
//!
//! ```text
//! models--owner--name/blobs/ETAG                the bytes, complete or absent
//!                    /blobs/ETAG.incomplete     the beginning of a file, taken up again later
//!                    /snapshots/COMMIT/FILE     a symbolic link to its blob
//!                    /refs/REVISION             the commit a branch or tag stood at
//! .locks/models--owner--name/ETAG.lock          held while a blob is written
//! ```
//!
//! Owns this layout. Takes checked names, returns paths. Knows nothing of the network. Everything is written beside its
//! place and renamed onto it, so that another process sees all of it or nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

use super::names::{Repo, is_commit};

/// One repository's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(root: &Path, repo: &Repo) -> Self {
        Self {
            folder: root.join(repo.folder()),
            locks: root.join(".locks").join(repo.folder()),
        }
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Where the blob with this ETag is, or will be.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The commit that `revision` stood at when it was last fetched.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Records the commit that `revision` stands at; a commit needs no record.
    pub(super) fn record(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// The files of a commit that are here, as paths relative to its snapshot, sorted; a link to a missing blob is not here.
    pub(super) fn files_of(&self, commit: &str) -> Vec<String> {
        let mut files = Vec::new();
        walk(&self.snapshot(commit), "", &mut files);
        files.sort();
        files
    }

    /// Makes `file` of `commit` stand for the blob `etag`; returns its path.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        make_parent(&pointer)?;
        let beside = unique_beside(&pointer);
        // From snapshots/COMMIT/a/b up to the repository's folder: two levels and one for each folder in `file`.
        let up = "../".repeat(2 + file.matches('/').count());
        symlink(Path::new(&format!("{up}blobs/{etag}")), &beside)
            // Where the file system or the account knows no symbolic links: another name for the bytes, else a copy of them.
            .or_else(|_| fs::hard_link(&blob, &beside))
            .or_else(|_| fs::copy(&blob, &beside).map(drop))
            .and_then(|()| fs::rename(&beside, &pointer))
            .map_err(|source| {
                let _ = fs::remove_file(&beside);
                Error::io("create", &pointer, source)
            })?;
        Ok(pointer)
    }

    /// Waits until no other process writes the blob `etag`. `None` where the file system knows no locks: then the caller writes
    /// under a name of its own.
    pub(super) fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(|source| Error::io("create", &path, source))?;
        // The kernel lets go of the lock when the file is closed, a crash included; Python's lock is the same flock.
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

/// Writes a file so that it is there in full or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    make_parent(path)?;
    let beside = unique_beside(path);
    fs::write(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path))
        .map_err(|source| {
            let _ = fs::remove_file(&beside);
            Error::io("write", path, source)
        })
}

/// Creates the folder that `path` is to stand in.
pub(super) fn make_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(|source| {
            Error::io("create", parent, source)
                .hint("set HF_HOME to a directory you may write to, on a disk with room")
        }),
        None => Ok(()),
    }
}

/// A name beside `path` that no other thread or process uses.
pub(super) fn unique_beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{count}.incomplete", std::process::id()))
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{prefix}{name}");
        match fs::metadata(entry.path()) {
            Ok(found) if found.is_dir() => walk(&entry.path(), &format!("{path}/"), files),
            Ok(_) if !name.ends_with(".incomplete") => files.push(path),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::RepoKind;
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache() -> (tempfile::TempDir, RepoCache) {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(
            root.path(),
            &Repo::new(RepoKind::Model, "owner/name", "main").unwrap(),
        );
        (root, cache)
    }

    // Expected paths: huggingface_hub's guide "Understand caching".
    #[cfg(unix)]
    #[test]
    fn the_layout_is_pythons() {
        let (root, cache) = cache();
        let folder = root.path().join("models--owner--name");
        write_whole(&cache.blob("etag1"), b"bytes").unwrap();
        cache.link(COMMIT, "config.json", "etag1").unwrap();
        cache.link(COMMIT, "sub/dir/x.json", "etag1").unwrap();
        cache.record("main", COMMIT).unwrap();
        let snapshot = folder.join("snapshots").join(COMMIT);
        assert_eq!(
            fs::read_link(snapshot.join("config.json")).unwrap(),
            Path::new("../../blobs/etag1")
        );
        assert_eq!(
            fs::read_link(snapshot.join("sub/dir/x.json")).unwrap(),
            Path::new("../../../../blobs/etag1")
        );
        assert_eq!(fs::read(snapshot.join("sub/dir/x.json")).unwrap(), b"bytes");
        assert_eq!(
            fs::read_to_string(folder.join("refs/main")).unwrap(),
            COMMIT
        );
        assert_eq!(cache.files_of(COMMIT), ["config.json", "sub/dir/x.json"]);
    }

    #[test]
    fn a_link_to_a_missing_blob_is_no_file_and_is_replaced() {
        let (_root, cache) = cache();
        write_whole(&cache.blob("old"), b"old").unwrap();
        let pointer = cache.link(COMMIT, "a", "old").unwrap();
        fs::remove_file(cache.blob("old")).unwrap();
        #[cfg(unix)]
        assert_eq!(cache.files_of(COMMIT), Vec::<String>::new());
        write_whole(&cache.blob("new"), b"new").unwrap();
        cache.link(COMMIT, "a", "new").unwrap();
        assert_eq!(fs::read(pointer).unwrap(), b"new");
    }

    #[test]
    fn a_ref_that_holds_no_commit_is_no_ref() {
        let (_root, cache) = cache();
        assert_eq!(cache.commit_of("main"), None);
        cache.record("refs/pr/1", COMMIT).unwrap();
        assert_eq!(cache.commit_of("refs/pr/1").as_deref(), Some(COMMIT));
        write_whole(&cache.folder.join("refs/main"), b"../../x").unwrap();
        assert_eq!(cache.commit_of("main"), None);
        assert_eq!(cache.commit_of(COMMIT).as_deref(), Some(COMMIT));
    }
}
