//! `adapter inspect`, `convert` and `diff`: an adapter's files without its model.

use std::path::{Path, PathBuf};

use super::directory::RunDirectory;
use crate::adapter::config::CONFIG_FILE;
use crate::adapter::{self, Conversion, Converted, Difference, Inspection};
use crate::error::Result;

/// Describes the adapter at `path`: a directory, a run's, or a configuration file.
///
/// # Errors
/// As [`adapter::inspect`].
pub fn inspect_adapter(path: &Path) -> Result<Inspection> {
    adapter::inspect(&place(path))
}

/// Writes an adapter anew.
///
/// # Errors
/// As [`adapter::convert`].
pub fn convert_adapter(job: &Conversion<'_>) -> Result<Converted> {
    let dir = place(job.dir);
    let initial = job.initial.map(place);
    adapter::convert(&Conversion {
        dir: &dir,
        initial: initial.as_deref(),
        ..*job
    })
}

/// Compares two adapters.
///
/// # Errors
/// As [`adapter::diff`].
pub fn diff_adapters(first: &Path, second: &Path) -> Result<Difference> {
    adapter::diff(&place(first), &place(second))
}

/// The adapter's directory of a run, else `path`.
fn place(path: &Path) -> PathBuf {
    if path.join(CONFIG_FILE).is_file() {
        return path.to_path_buf();
    }
    let of_run = RunDirectory::open(path).map(|run| run.result(false));
    of_run.unwrap_or_else(|_| path.to_path_buf())
}
