//! Files of a run directory: their names, atomic writing, and `report.json`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::finite::FiniteReport;
use super::plan::Plan;
use crate::error::{Error, Kind, Result};

/// The report for programs.
pub const REPORT_JSON: &str = "report.json";
/// The report as Markdown.
pub const REPORT_MD: &str = "report.md";
/// The report with charts.
pub const REPORT_HTML: &str = "report.html";
/// One line a step.
pub const STEPS_JSONL: &str = "steps.jsonl";
/// CodeCarbon's columns.
pub const EMISSIONS_CSV: &str = "emissions.csv";
/// The adapter's folder.
pub const ADAPTER_DIR: &str = "adapter";
/// The model card inside the adapter's folder.
pub const MODEL_CARD: &str = "README.md";

/// Writes `text` to `path` atomically: a temporary file in the same folder, synced, then renamed.
///
/// # Errors
/// [`Kind::Io`] where the folder cannot be written to.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let temp = temp_path(path);
    let written = File::create(&temp).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written
        .and_then(|()| fs::rename(&temp, path))
        .map_err(|source| {
            // Best effort: the error to report is the first one.
            let _ = fs::remove_file(&temp);
            Error::io("write", path, source)
        })
}

/// A name in the same folder (a rename never crosses file systems), unique to the process.
fn temp_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// `report.json`.
///
/// # Errors
/// [`Kind::Run`] where it cannot be serialized.
pub fn to_json(report: &FiniteReport) -> Result<String> {
    pretty(report)
}

/// `plan.json`.
///
/// # Errors
/// [`Kind::Run`] where it cannot be serialized.
pub fn to_plan_json(plan: &Plan) -> Result<String> {
    pretty(plan)
}

fn pretty(document: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(document)
        .map_err(|source| Error::new(Kind::Run, format!("cannot write as JSON: {source}")))?;
    Ok(text + "\n")
}

/// Reads a `report.json`; unknown keys, as a later version may write them, are ignored.
///
/// # Errors
/// [`Kind::Io`] where the file cannot be read; [`Kind::Run`] where it is not a report.
pub fn read_report(path: &Path) -> Result<FiniteReport> {
    let text = fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            Kind::Run,
            format!("no report at `{}`", path.display()),
        )
        .rule("a run writes its report when it ends")
        .hint("if the run was cut off, finish it first: `wattune train RECIPE --resume RUN_DIR`"),
        _ => Error::io("read", path, source),
    })?;
    let report = serde_json::from_str(&text).map_err(|source| {
        Error::new(Kind::Run, "this file is not a run's report")
            .at(format!(
                "{}, line {}, column {}",
                path.display(),
                source.line(),
                source.column()
            ))
            .value(source.to_string())
            .hint("write it again by finishing the run: `wattune train RECIPE --resume RUN_DIR`")
    })?;
    FiniteReport::new(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_atomically_and_no_temporary_file_stays() {
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
