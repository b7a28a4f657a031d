//! `ledger.jsonl`: append-only, one JSON object a line.
//!
//! ```text
//! {"run":"5f3c..","t":..}                                                   first line: digest of the run's inputs
//! {"phase":"train","step":7,"energy_j":{"counted":41.2,"measured":null,"timed":39.0},"flops":..,"bytes":{..},"wall_s":..,"t":..}
//! {"lease":{"steps":12,"energy_j":{..},"flops":..,"time_s":..},"elapsed_s":..,"t":..}   written and synced before those steps run
//! {"settled":true,"elapsed_s":..,"t":..}                                    a clean close: the lease is released
//! ```
//!
//! `elapsed_s` is the wall time of the run so far, over all its processes.
//!
//! An entry whose counters failed has `"measured":null` and the energy that fills the gap:
//! `"gap":{"reason":"rapl: the counter decreased ...","filled":"counted","times":1.08,"energy_j":44.5}`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::entry::{Entry, Lease};
use crate::error::{Error, Kind, Result};
use crate::files::create_atomic;
use crate::units::Seconds;

/// A line of the file; `t` is Unix seconds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum LedgerLine {
    Entry(Entry),
    Lease {
        lease: Lease,
        #[serde(default)]
        elapsed_s: Seconds,
        t: f64,
    },
    Settled {
        settled: bool,
        #[serde(default)]
        elapsed_s: Seconds,
        t: f64,
    },
    Run {
        run: String,
        t: f64,
    },
}

impl LedgerLine {
    fn to_json(&self) -> String {
        let mut text = serde_json::to_string(self).expect("every field has a JSON form");
        text.push('\n');
        text
    }
}

/// Unix seconds.
pub(super) fn now() -> f64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0.0, |time| time.as_secs_f64())
}

/// The file, locked by this process and open for appending.
#[derive(Debug)]
pub(super) struct LedgerFile {
    path: PathBuf,
    file: File,
}

/// Sizes in bytes of a file and of its complete lines.
pub(super) struct Extent {
    pub complete: usize,
    pub total: usize,
}

impl LedgerFile {
    /// Creates a file of one line atomically and opens it; an existing one is refused.
    pub fn create(path: &Path, line: &LedgerLine) -> Result<LedgerFile> {
        create_atomic(path, line.to_json())?;
        Self::open(path)
    }

    /// Opens an existing file.
    pub fn open(path: &Path) -> Result<LedgerFile> {
        let file = OpenOptions::new().append(true).open(path);
        Self::locked(path, file.map_err(|e| Error::io("open", path, e))?)
    }

    /// Locks the file until the process ends; [`Kind::Run`] if another process has the lock.
    fn locked(path: &Path, file: File) -> Result<LedgerFile> {
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::new(Kind::Run, "another process is using this run")
                .at(path.display().to_string())
                .rule("one process at a time trains in a run directory")
                .hint("wait until it has ended, or stop it and resume the run then"));
        }
        // Other errors: some file systems have no locks.
        let path = path.to_path_buf();
        Ok(LedgerFile { path, file })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a line without syncing it to disk.
    pub fn append(&mut self, line: &LedgerLine) -> Result<()> {
        self.file
            .write_all(line.to_json().as_bytes())
            .map_err(|e| Error::io("write", &self.path, e).while_running())
    }

    /// Flushes all lines to disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("sync", &self.path, e).while_running())
    }

    /// Cuts off an incomplete last line.
    pub fn truncate(&mut self, extent: &Extent) -> Result<()> {
        if extent.complete == extent.total {
            return Ok(());
        }
        self.file
            .set_len(extent.complete as u64)
            .map_err(|e| Error::io("cut the incomplete last line of", &self.path, e))
    }
}

/// Passes every complete line to `each`, in order.
pub(super) fn read_lines(path: &Path, mut each: impl FnMut(LedgerLine)) -> Result<Extent> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let last_newline = text.iter().rposition(|byte| *byte == b'\n');
    let complete = last_newline.map_or(0, |index| index + 1);
    let lines = text[..complete].split(|byte| *byte == b'\n');
    for (index, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
        each(serde_json::from_slice(line).map_err(|e| invalid_line(path, index + 1, &e))?);
    }
    let total = text.len();
    Ok(Extent { complete, total })
}

/// Every entry of the ledger at `path`, in the order of spending; other lines and an incomplete
/// last line are skipped.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Run`] with file and line of a complete but invalid line.
pub fn read_entries(path: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    read_lines(path, |line| {
        if let LedgerLine::Entry(entry) = line {
            entries.push(entry);
        }
    })?;
    Ok(entries)
}

/// The error of a run resumed with another recipe, model or data than it was started with.
pub fn changed_inputs(place: &Path) -> Error {
    Error::new(
        Kind::Run,
        "the recipe, the model or the data are no longer those that this run began with",
    )
    .at(place.display().to_string())
    .hint(
        "put back what was changed (`recipe.toml` in the run directory, data files, a moved branch of the hub), or start a new run with another `--out`",
    )
}

pub(super) fn lost_entries(path: &Path, why: &str) -> Error {
    Error::new(
        Kind::Run,
        "the ledger has lost entries: what this run has spent is not known",
    )
    .at(path.display().to_string())
    .value(why)
    .rule("a resumed run has what is left of its budget")
    .hint("restore the file, or start a new run with another `--out`")
}

fn invalid_line(path: &Path, line: usize, source: &serde_json::Error) -> Error {
    Error::new(
        Kind::Run,
        format!("the ledger has an invalid line: {source}"),
    )
    .at(format!("{}, line {line}", path.display()))
    .rule("only the last line may be cut short, by a crash")
    .hint("the file was edited or the disk is damaged: restore it, or start a new run")
}
