//! The names of this room's files and how a whole file is put in place.
//!
//! Owns the names inside a run directory and the rule that such a file is complete or absent: written beside its place,
//! flushed to disk, then renamed. Takes a path and a text. Knows nothing of what is in it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The machine's form of the report.
pub const REPORT_JSON: &str = "report.json";
/// The page.
pub const REPORT_MD: &str = "report.md";
/// The page with charts.
pub const REPORT_HTML: &str = "report.html";
/// One line a step.
pub const STEPS_JSONL: &str = "steps.jsonl";
/// CodeCarbon's columns.
pub const EMISSIONS_CSV: &str = "emissions.csv";
/// The adapter's folder.
pub const ADAPTER_DIR: &str = "adapter";
/// The model card inside the adapter's folder.
pub const MODEL_CARD: &str = "README.md";

/// Puts `text` at `path`, whole or not at all.
///
/// # Errors
/// [`crate::error::Kind::Io`] where the folder cannot be written to.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let beside = beside(path);
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
    });
    let placed = written.and_then(|()| fs::rename(&beside, path));
    placed.map_err(|source| {
        // The half-written neighbour is of no use; that it cannot be removed either changes nothing about the failure.
        let _ = fs::remove_file(&beside);
        Error::io("write", path, source)
    })
}

/// A name in the same folder (a rename never crosses file systems), told apart by the process.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(REPORT_MD);
        write_whole(&path, "a longer first text").unwrap();
        write_whole(&path, "second").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write_whole(&folder.path().join("absent/report.md"), "x").unwrap_err();
        assert!(error.to_string().starts_with("cannot write"), "{error}");
    }
}
