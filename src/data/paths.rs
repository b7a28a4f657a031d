//! Data paths to files: a file, the data files of a folder, or those that a pattern matches.
//!
//! Takes paths, returns files in the order given, those of one folder or pattern by name. Looks at names alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::source::extension;
use crate::error::{Error, Kind, Result};
use crate::hub::{is_data_file, split_in_name};
use crate::text::first_few;

/// Names in a message.
const SHOWN: usize = 12;

/// The files that `data` stands for.
///
/// # Errors
/// `Kind::Data` where there is none, and for a folder whose files are of several kinds or splits; `Kind::Io` where a folder cannot be read.
pub fn files(data: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if data.is_empty() {
        return Err(
            Error::new(Kind::Data, "there are no data files").hint("set data.train to a file")
        );
    }
    let mut files = Vec::new();
    for path in data {
        if path.is_dir() {
            files.extend(files_of_folder(path)?);
        } else if is_pattern(path) && !path.exists() {
            files.extend(files_of_pattern(path)?);
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

/// Whether a path holds `*`, `?` or `[`.
pub(super) fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn files_of_pattern(path: &Path) -> Result<Vec<PathBuf>> {
    let refuse = |what: String| {
        Error::new(Kind::Data, what)
            .at(path.display().to_string())
            .rule("`*` and `?` stand for characters of a name, `**` for folders, `[ab]` for one of some characters")
            .hint("correct the pattern, or list the files: train = [\"a.jsonl\", \"b.jsonl\"]")
    };
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        ..glob::MatchOptions::default()
    };
    let found = glob::glob_with(&path.to_string_lossy(), options);
    let found = found.map_err(|e| refuse(format!("not a pattern of file names: {e}")))?;
    let files: Vec<PathBuf> = found.flatten().filter(|path| !path.is_dir()).collect();
    if files.is_empty() {
        return Err(refuse("no file matches the pattern".into()));
    }
    Ok(files)
}

/// The data files of a folder, not of its subfolders; hidden files and those that hold no records are left out.
fn files_of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| Error::io("read", folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    let is_data = |name: &String| is_data_file(name) && !folder.join(name).is_dir();
    let (data, others): (Vec<String>, Vec<String>) = names.into_iter().partition(is_data);
    let kinds: BTreeSet<String> = data.iter().map(|name| extension(Path::new(name))).collect();
    let splits: BTreeSet<Option<&str>> = data.iter().map(|name| split_in_name(name)).collect();
    let (what, remedy) = if data.is_empty() {
        (
            "the folder holds no data files",
            "name the files, or a pattern",
        )
    } else if kinds.len() > 1 {
        (
            "the folder holds data files of several kinds, perhaps the same records twice",
            "choose one kind by a pattern",
        )
    } else if splits.len() > 1 {
        (
            "the folder holds files of several splits",
            "name the files of one split, or a pattern",
        )
    } else {
        return Ok(data.into_iter().map(|name| folder.join(name)).collect());
    };
    let shown = if data.is_empty() { others } else { data };
    let pattern = folder.join("*.jsonl");
    Err(Error::new(Kind::Data, what)
        .at(folder.display().to_string())
        .value(first_few(shown, SHOWN).join(", "))
        .hint(format!("{remedy}: train = \"{}\"", pattern.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(folder: &Path, data: &[&str]) -> Result<Vec<String>> {
        let data: Vec<PathBuf> = data.iter().map(|path| folder.join(path)).collect();
        let relative = |path: PathBuf| path.strip_prefix(folder).unwrap().display().to_string();
        files(&data).map(|files| files.into_iter().map(relative).collect())
    }

    /// A folder with empty files.
    fn folder_of(names: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        root
    }

    #[test]
    fn files_folders_and_patterns_are_files_in_order() {
        let root = folder_of(&[
            "d/b.jsonl",
            "d/a.jsonl",
            "d/README.md",
            "d/.hidden.jsonl",
            "d/license.txt",
            "d/sub/c.jsonl",
            "x[1].csv",
        ]);
        for (data, files) in [
            (&["d"][..], &["d/a.jsonl", "d/b.jsonl"][..]),
            (&["d/*.jsonl"], &["d/a.jsonl", "d/b.jsonl"]),
            (&["d/[b].jsonl", "d/a.jsonl"], &["d/b.jsonl", "d/a.jsonl"]),
            (
                &["d/**/?.jsonl"],
                &["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl"],
            ),
            (&["x[1].csv"], &["x[1].csv"]),
            (&["absent.csv"], &["absent.csv"]),
        ] {
            assert_eq!(found(root.path(), data).unwrap(), files, "{data:?}");
        }
    }

    #[test]
    fn folders_and_patterns_that_name_no_data_set_are_refused() {
        let root = folder_of(&[
            "d/a.jsonl",
            "mixed/a.csv",
            "mixed/a.parquet",
            "split/train.csv",
            "split/test.csv",
            "none/a.md",
        ]);
        for (data, reason) in [
            ("d/*.csv", "no file matches"),
            ("d/[.csv", "not a pattern"),
            ("mixed", "several kinds"),
            ("split", "several splits"),
            ("none", "no data files"),
        ] {
            let error = found(root.path(), &[data]).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("hint"), "{error}");
        }
        assert!(files(&[]).is_err());
    }
}
