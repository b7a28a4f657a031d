//! Files and directories that are complete or absent: written under a temporary name, flushed,
//! renamed.
//!
//! Also `~` and variables in paths. Owns the temporary names (`.NAME.PID-THREAD.tmp` for a file, `.partial` for a directory,
//! `.deleted` for one being deleted) and the removal of leftovers. Knows nothing of file contents.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use regex::Regex;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::text::hex;
use crate::units::Bytes;

const TEMPORARY: [&str; 3] = ["tmp", "partial", "deleted"];
/// A leftover of another process may be removed when it is older.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Free space on the disk that holds `path` or its nearest existing parent; `None` where the system does not tell.
pub fn available_space(path: &Path) -> Option<Bytes> {
    let path = std::path::absolute(path).ok()?;
    let existing = path.ancestors().find(|p| p.exists())?.canonicalize().ok()?;
    let disks = sysinfo::Disks::new_with_refreshed_list().ok()?;
    let holds = disks
        .iter()
        .filter(|disk| existing.starts_with(disk.mount_point()));
    holds
        .max_by_key(|disk| disk.mount_point().as_os_str().len())
        .map(|disk| Bytes(disk.available_space()))
}

/// Replaces the file at `path` atomically by `bytes`.
///
/// # Errors
/// [`crate::error::Kind::Io`] if the folder cannot be written to; the previous file is then unchanged.
pub fn write_atomic(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes.as_ref()))
}

/// Replaces the file at `path` atomically by what `write` writes.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_atomic_with(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<()> {
    let temporary = temporary_path(path, "tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all()
    });
    written
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|source| {
            // The write's error is the one to report.
            let _ = fs::remove_file(&temporary);
            Error::io("write", path, source)
        })?;
    sync(parent_of(path))
}

/// Creates the file at `path` with `bytes`, whole or not at all; of two processes that do so at once, one succeeds.
///
/// # Errors
/// As [`write_atomic`]; also if the file exists.
pub fn create_atomic(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let temporary = temporary_path(path, "tmp");
    write_atomic(&temporary, bytes)?;
    let linked = match fs::hard_link(&temporary, path) {
        // A file system without hard links.
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists && !path.exists() => {
            fs::rename(&temporary, path)
        }
        linked => linked,
    };
    let _ = fs::remove_file(&temporary);
    linked.map_err(|e| Error::io("create", path, e))?;
    sync(parent_of(path))
}

/// A directory being filled under a temporary name. Dropped before it is installed, it is removed again.
#[derive(Debug)]
pub struct DraftDirectory {
    draft: PathBuf,
    place: PathBuf,
}

impl DraftDirectory {
    /// Creates an empty draft beside `place`, and the folders above it.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`]; also if the temporary name exists, so that no planted link is followed.
    pub fn new(place: &Path) -> Result<Self> {
        let parent = parent_of(place);
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        let draft = temporary_path(place, "partial");
        remove_all(&draft)?;
        fs::create_dir(&draft).map_err(|e| Error::io("create", &draft, e))?;
        let place = place.to_path_buf();
        Ok(Self { draft, place })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.draft
    }

    /// Flushes the draft to disk and moves it to its place, replacing a directory there.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`]; the previous directory then stays.
    pub fn replace(self) -> Result<()> {
        sync_tree(&self.draft)?;
        let previous = temporary_path(&self.place, "deleted");
        remove_all(&previous)?;
        let had_previous = match fs::rename(&self.place, &previous) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(Error::io("rename", &self.place, e)),
        };
        if let Err(e) = fs::rename(&self.draft, &self.place) {
            if had_previous {
                // The rename's error is the one to report.
                let _ = fs::rename(&previous, &self.place);
            }
            return Err(Error::io("rename", &self.draft, e));
        }
        sync(parent_of(&self.place))?;
        remove_all(&previous)
    }

    /// Flushes the draft to disk and moves it to its place; returns `false` if a directory that is not empty stands there.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`].
    pub fn install_new(self) -> Result<bool> {
        sync_tree(&self.draft)?;
        match fs::rename(&self.draft, &self.place) {
            Ok(()) => sync(parent_of(&self.place)).map(|()| true),
            Err(_) if self.place.symlink_metadata().is_ok() => Ok(false),
            Err(e) => Err(Error::io("create", &self.place, e)),
        }
    }
}

impl Drop for DraftDirectory {
    fn drop(&mut self) {
        // After a move there is nothing to remove; otherwise the error that led here is the one to report.
        let _ = remove_all(&self.draft);
    }
}

/// Deletes a directory, if there is one; it disappears at once from its place, never in part.
///
/// # Errors
/// [`crate::error::Kind::Io`].
pub fn remove_directory(path: &Path) -> Result<()> {
    let doomed = temporary_path(path, "deleted");
    remove_all(&doomed)?;
    match fs::rename(path, &doomed) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("remove", path, e)),
        Ok(()) => remove_all(&doomed),
    }
}

fn remove_all(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Removes every leftover of an interrupted write from `folder`, not from its subfolders. The caller
/// is the only user of the folder. Failures are ignored: leftovers do no harm.
pub fn remove_leftovers(folder: &Path) {
    sweep(folder, |_, _| true);
}

/// Removes leftovers older than a day from a folder that other processes may use; of `place` alone,
/// if it is given.
pub fn remove_old_leftovers(folder: &Path, place: Option<&Path>) {
    let name = place.map(|place| place.file_name().unwrap_or_default().to_string_lossy());
    sweep(folder, |of, entry| {
        let modified = entry.metadata().and_then(|found| found.modified()).ok();
        let age = modified.and_then(|time| time.elapsed().ok());
        age.is_some_and(|age| age > MAX_AGE) && name.as_ref().is_none_or(|name| of == name)
    });
}

/// Removes the temporary names that `stale` selects by the name they stand for.
fn sweep(folder: &Path, stale: impl Fn(&str, &fs::DirEntry) -> bool) {
    let folder = non_empty(folder);
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if temporary_of(&name.to_string_lossy()).is_some_and(|of| stale(of, &entry)) {
            let _ = remove_all(&entry.path());
        }
    }
}

/// The temporary name of `path` in the same folder, so that renaming never crosses file systems;
/// that of no other thread or process.
pub fn temporary_path(path: &Path, suffix: &str) -> PathBuf {
    static THREADS: AtomicU32 = AtomicU32::new(0);
    thread_local!(static THREAD: u32 = THREADS.fetch_add(1, Ordering::Relaxed));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let writer = format!("{}-{}", std::process::id(), THREAD.with(|thread| *thread));
    path.with_file_name(format!(".{name}.{writer}.{suffix}"))
}

/// Whether a file name is a temporary one.
pub fn is_temporary(name: &str) -> bool {
    temporary_of(name).is_some()
}

/// The name that a temporary name stands for; `None` for other names.
fn temporary_of(name: &str) -> Option<&str> {
    let (rest, suffix) = name.strip_prefix('.')?.rsplit_once('.')?;
    let (of, writer) = rest.rsplit_once('.')?;
    let (process, thread) = writer.split_once('-').unwrap_or((writer, "0"));
    let is_writer = process.parse::<u32>().is_ok() && thread.parse::<u32>().is_ok();
    (TEMPORARY.contains(&suffix) && is_writer && !of.is_empty()).then_some(of)
}

/// Flushes every file below `dir`, and `dir` itself, to disk.
fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            sync(&path)?;
        }
    }
    sync(dir)
}

/// SHA-256 of a file in hexadecimal digits.
///
/// # Errors
/// Those of reading the file.
pub fn sha256(path: &Path) -> io::Result<String> {
    sha256_of(File::open(path)?)
}

/// SHA-256 of the rest of `source` in hexadecimal digits.
///
/// # Errors
/// Those of reading it.
pub fn sha256_of(mut source: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = source.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

/// A path with `~`, `$NAME` and `${NAME}` replaced, as a shell does it.
///
/// # Errors
/// The rule that the path breaks: a variable is not set, or there is no home directory.
pub fn expand(path: &str) -> Result<String, String> {
    static VARIABLE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"^~(?:/|$)|\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")
            .expect("the pattern is valid")
    });
    if path.starts_with('~') && !path.starts_with("~/") && path != "~" {
        return Err("`~` stands alone or before `/`: another user's home is not looked up".into());
    }
    let mut expanded = String::new();
    let mut end = 0;
    for found in VARIABLE.captures_iter(path) {
        let all = found.get(0).expect("the entire match");
        let name = found
            .get(1)
            .or(found.get(2))
            .map_or("HOME", |name| name.as_str());
        let value = match name {
            "HOME" => {
                std::env::home_dir().and_then(|home| home.into_os_string().into_string().ok())
            }
            name => std::env::var(name).ok(),
        };
        let value = value.filter(|value| !value.is_empty());
        expanded.push_str(&path[end..all.start()]);
        expanded.push_str(&value.ok_or_else(|| format!("the variable `{name}` is set, in UTF-8"))?);
        if all.as_str() == "~/" {
            expanded.push('/');
        }
        end = all.end();
    }
    expanded.push_str(&path[end..]);
    Ok(expanded)
}

/// Flushes one file or directory to disk.
fn sync(path: &Path) -> Result<()> {
    match File::open(path).and_then(|file| file.sync_all()) {
        // Some file systems cannot flush a directory.
        Err(e)
            if path.is_dir()
                && matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
        {
            Ok(())
        }
        flushed => flushed.map_err(|e| Error::io("sync", path, e)),
    }
}

fn parent_of(path: &Path) -> &Path {
    non_empty(path.parent().unwrap_or(Path::new("")))
}

/// `.` for the empty path, as `Path::parent` gives it.
fn non_empty(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_and_no_temporary_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.md");
        write_atomic(&path, "a longer first text").unwrap();
        write_atomic(&path, "second").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        let failed = write_atomic_with(&path, |_| Err(io::Error::other("disk full")));
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(names(folder.path()), ["report.md"]);
        let error = write_atomic(&folder.path().join("absent/report.md"), "x").unwrap_err();
        assert!(error.to_string().starts_with("cannot write"), "{error}");
    }

    #[test]
    fn a_path_is_expanded_as_by_a_shell() {
        let home = std::env::home_dir().unwrap().display().to_string();
        let search = std::env::var("PATH").unwrap();
        for (path, expanded) in [
            ("~", home.clone()),
            ("~/a/~", format!("{home}/a/~")),
            ("$HOME/a", format!("{home}/a")),
            ("a/${PATH}.csv", format!("a/{search}.csv")),
            ("$PATH-1", format!("{search}-1")),
            ("a~b/$/5$", "a~b/$/5$".into()),
        ] {
            assert_eq!(expand(path).as_ref(), Ok(&expanded), "{path}");
        }
        for (path, reason) in [
            ("$NOT_SET_ANYWHERE/a", "NOT_SET_ANYWHERE"),
            ("${}", "``"),
            ("~other/a", "another user"),
        ] {
            assert!(expand(path).unwrap_err().contains(reason), "{path}");
        }
    }

    #[test]
    fn a_directory_is_replaced_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("adapter");
        for text in ["first", "second"] {
            let draft = DraftDirectory::new(&place).unwrap();
            fs::write(draft.path().join(text), text).unwrap();
            draft.replace().unwrap();
            assert_eq!(names(&place), [text]);
            assert_eq!(names(folder.path()), ["adapter"]);
        }
        drop(DraftDirectory::new(&place).unwrap());
        assert!(!DraftDirectory::new(&place).unwrap().install_new().unwrap());
        assert_eq!(names(folder.path()), ["adapter"]);
        assert_eq!(names(&place), ["second"], "the previous directory stays");
        remove_directory(&place).unwrap();
        remove_directory(&place).unwrap();
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }

    #[test]
    fn leftovers_are_removed_and_other_names_stay() {
        let folder = tempfile::tempdir().unwrap();
        let left = [".step-000004.7.deleted", ".run.7.partial"];
        let kept = [
            ".hidden.7.txt",
            ".tmp",
            ".a.b.tmp",
            "report.7.tmp",
            "..7.tmp",
        ];
        for name in left.iter().chain(&kept) {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let run = folder.path().join("run");
        remove_old_leftovers(folder.path(), Some(&run));
        assert_eq!(names(folder.path()).len(), 7, "they may be in use");
        for name in left {
            let long_ago = std::time::SystemTime::now() - 2 * MAX_AGE;
            let entry = File::open(folder.path().join(name)).unwrap();
            entry.set_modified(long_ago).unwrap();
        }
        remove_old_leftovers(folder.path(), Some(&run));
        assert_eq!(names(folder.path()).len(), 6, "of this place alone");
        remove_leftovers(folder.path());
        let mut kept = kept.to_vec();
        kept.sort();
        assert_eq!(names(folder.path()), kept);
    }

    #[cfg(unix)]
    #[test]
    fn a_planted_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("precious"), "x").unwrap();
        let place = folder.path().join("merged");
        let planted = temporary_path(&place, "partial");
        std::os::unix::fs::symlink(&target, &planted).unwrap();
        let draft = DraftDirectory::new(&place).unwrap();
        assert!(!fs::symlink_metadata(draft.path()).unwrap().is_symlink());
        assert_eq!(names(&target), ["precious"]);
    }
}
