//! `steps.jsonl`: one line a step, written before the next step begins.
//!
//! Owns the append-only log, its reader and its truncation on resume. A last line without line feed was cut off by a crash; only
//! [`truncate_after`] removes it. Knows nothing of the training loop.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::train::StepRecord;

/// The open log of a run.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: File,
}

impl StepLog {
    /// Opens or creates the log at `path` to append to it. A resumed run calls [`truncate_after`] first.
    ///
    /// # Errors
    /// [`Kind::Io`].
    pub fn append_to(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self {
            path: path.to_path_buf(),
            file: file.map_err(|source| Error::io("open", path, source))?,
        })
    }

    /// Replaces the log at `path` atomically by one of these records, and opens it to append to it.
    ///
    /// # Errors
    /// Those of [`StepLog::write`].
    pub fn replace(path: &Path, records: &[StepRecord]) -> Result<Self> {
        let lines: Vec<String> = records.iter().map(line_text).collect::<Result<_>>()?;
        write_atomic(path, lines.concat())?;
        Self::append_to(path)
    }

    /// Appends one line in a single write, so that concurrent readers see complete lines.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Run`] where the learning rate, an energy or the time is not finite.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        self.file
            .write_all(line_text(record)?.as_bytes())
            .map_err(|source| Error::io("write", &self.path, source))
    }
}

/// A record as a line, its line feed included.
fn line_text(record: &StepRecord) -> Result<String> {
    let energy = record.energy_j;
    let required = [record.lr, energy.counted.0, record.wall_s.0];
    let meters = [energy.measured, energy.timed]
        .into_iter()
        .flatten()
        .map(|joules| joules.0);
    if let Some(bad) = required
        .into_iter()
        .chain(meters)
        .find(|number| !number.is_finite())
    {
        return Err(Error::new(
            Kind::Run,
            "a step's learning rate, energy and time must be finite",
        )
        .at(format!("step {}", record.step))
        .value(bad.to_string())
        .hint("check the recipe's `learning_rate` and the device profile"));
    }
    let line = serde_json::to_string(record).map_err(|source| {
        Error::new(
            Kind::Run,
            format!("cannot serialize step {}: {source}", record.step),
        )
    })?;
    Ok(line + "\n")
}

/// Every record of the log at `path`.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Run`] naming file and line of the first malformed or incomplete line.
pub fn read_steps(path: &Path) -> Result<Vec<StepRecord>> {
    let text = std::fs::read(path).map_err(|source| Error::io("read", path, source))?;
    lines(&text).map(|line| line.record(path)).collect()
}

/// Truncates the log at `path` after `step`, and drops an incomplete last line. A missing log is no error.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Run`] naming file and line of a malformed complete line.
pub fn truncate_after(path: &Path, step: u64) -> Result<()> {
    let text = match std::fs::read(path) {
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        read => read.map_err(|source| Error::io("read", path, source))?,
    };
    let mut kept = 0;
    for line in lines(&text) {
        if !line.complete || line.record(path)?.step > step {
            break;
        }
        kept += line.bytes.len();
    }
    let cut = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(kept as u64).and_then(|()| file.sync_all()));
    cut.map_err(|source| Error::io("cut", path, source))
}

/// A line of the file, its line feed included.
struct Line<'a> {
    /// From 1.
    number: usize,
    bytes: &'a [u8],
    /// Ends with a line feed.
    complete: bool,
}

impl Line<'_> {
    fn record(&self, path: &Path) -> Result<StepRecord> {
        let malformed = |why: String| {
            let error = Error::new(Kind::Run, "this line is not a training step")
                .at(format!("{}, line {}", path.display(), self.number))
                .value(why);
            if self.complete {
                error.hint("remove the line, or start a new run")
            } else {
                error
                    .rule("every line ends with a line feed: the run was cut off while writing this one")
                    .hint("continue the run, which cuts the line off: `wattune train RECIPE --resume RUN_DIR`")
            }
        };
        if self.complete {
            serde_json::from_slice(self.bytes).map_err(|source| malformed(source.to_string()))
        } else {
            let text = String::from_utf8_lossy(self.bytes);
            Err(malformed(text.chars().take(80).collect()))
        }
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let pieces = text.split_inclusive(|byte| *byte == b'\n').enumerate();
    pieces.map(|(index, bytes)| Line {
        number: index + 1,
        bytes,
        complete: bytes.ends_with(b"\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::StepEnergy;
    use crate::units::{Joules, Seconds};

    fn record(step: u64) -> StepRecord {
        let energy_j = StepEnergy {
            counted: Joules(22.0),
            measured: None,
            timed: Some(Joules(36.0)),
        };
        StepRecord {
            step,
            loss: Some(3.5),
            lr: 2e-4,
            grad_norm: Some(0.5),
            tokens: 2048,
            loss_tokens: 1024,
            flops: 1 << 40,
            energy_j,
            wall_s: Seconds(0.8),
            val_loss: None,
        }
    }

    fn log_of(steps: u64) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steps.jsonl");
        let mut log = StepLog::append_to(&path).unwrap();
        (1..=steps).for_each(|step| log.write(&record(step)).unwrap());
        (folder, path)
    }

    #[test]
    fn a_line_has_the_contracts_keys_and_round_trips() {
        let (_folder, path) = log_of(2);
        let text = std::fs::read_to_string(&path).unwrap();
        // Written out from the contract.
        let first = r#"{"step":1,"loss":3.5,"lr":0.0002,"grad_norm":0.5,"tokens":2048,"loss_tokens":1024,"flops":1099511627776,"energy_j":{"counted":22.0,"measured":null,"timed":36.0},"wall_s":0.8}"#;
        assert_eq!(text.lines().next(), Some(first));
        assert_eq!(read_steps(&path).unwrap(), [record(1), record(2)]);
    }

    #[test]
    fn a_loss_that_is_not_finite_is_null_and_an_energy_is_refused() {
        let (_folder, path) = log_of(0);
        let mut log = StepLog::append_to(&path).unwrap();
        log.write(&StepRecord {
            loss: Some(f64::NAN),
            grad_norm: Some(f64::INFINITY),
            ..record(1)
        })
        .unwrap();
        let back = read_steps(&path).unwrap();
        assert_eq!((back[0].loss, back[0].grad_norm), (None, None));
        let mut bad = record(2);
        bad.energy_j.timed = Some(Joules(f64::NAN));
        assert_eq!(log.write(&bad).unwrap_err().kind(), Kind::Run);
        assert_eq!(read_steps(&path).unwrap().len(), 1);
    }

    #[test]
    fn a_bad_line_is_named() {
        let (_folder, path) = log_of(2);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 3}\n");
        std::fs::write(&path, &text).unwrap();
        for error in [
            read_steps(&path).unwrap_err(),
            truncate_after(&path, 9).unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Run);
            assert!(error.to_string().contains("steps.jsonl, line 3"), "{error}");
        }
    }

    #[test]
    fn a_log_is_replaced_atomically_and_appended_to() {
        let (folder, path) = log_of(2);
        // A reader that holds the old file open sees all of its lines.
        std::fs::hard_link(&path, folder.path().join("old")).unwrap();
        let amended = StepRecord {
            val_loss: Some(2.5),
            ..record(2)
        };
        let mut log = StepLog::replace(&path, &[record(1), amended.clone()]).unwrap();
        log.write(&record(3)).unwrap();
        assert_eq!(read_steps(&path).unwrap(), [record(1), amended, record(3)]);
        assert_eq!(
            read_steps(&folder.path().join("old")).unwrap(),
            [record(1), record(2)]
        );
    }

    #[test]
    fn resume_truncates_to_a_step_and_drops_an_incomplete_line() {
        let (_folder, path) = log_of(3);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 4, \"lo");
        std::fs::write(&path, &text).unwrap();
        assert!(
            read_steps(&path)
                .unwrap_err()
                .to_string()
                .contains("line 4")
        );
        truncate_after(&path, 9).unwrap();
        assert_eq!(read_steps(&path).unwrap().len(), 3);
        truncate_after(&path, 2).unwrap();
        StepLog::append_to(&path)
            .unwrap()
            .write(&record(3))
            .unwrap();
        assert_eq!(
            read_steps(&path).unwrap(),
            [record(1), record(2), record(3)]
        );
        truncate_after(&path, 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        truncate_after(&path.with_file_name("absent.jsonl"), 0).unwrap();
    }
}
