//! `report.json`: written whole, read with a message that says where it fails.
//!
//! Owns the file's form (pretty JSON, one document). Takes and returns a `Report`. Refuses figures that are not finite, and
//! knows nothing of what the report says.

use std::path::Path;

use super::files::write_whole;
use super::types::Report;
use crate::error::{Error, Kind, Result};

/// The document that `--json` prints and `report.json` holds.
///
/// # Errors
/// [`Kind::Run`] where a figure that a report cannot do without is not finite.
pub fn to_json(report: &Report) -> Result<String> {
    let sealed = report.clone().sealed()?;
    let text = serde_json::to_string_pretty(&sealed).map_err(|source| {
        Error::new(
            Kind::Run,
            format!("cannot put the report into JSON: {source}"),
        )
    })?;
    Ok(text + "\n")
}

/// Writes `report` to `path`, whole or not at all.
///
/// # Errors
/// As [`to_json`], and [`Kind::Io`].
pub fn write_report(path: &Path, report: &Report) -> Result<()> {
    write_whole(path, &to_json(report)?)
}

/// Reads what [`write_report`] wrote; unknown keys, as a later version may write them, are passed over.
///
/// # Errors
/// [`Kind::Io`] where the file cannot be read; [`Kind::Run`] where it is not a report.
pub fn read_report(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            Kind::Run,
            format!("there is no report at `{}`", path.display()),
        )
        .rule("a run writes its report when it ends")
        .hint("if the run was cut off, finish it first: `wattune train RECIPE --resume RUN_DIR`"),
        _ => Error::io("read", path, source),
    })?;
    serde_json::from_str(&text).map_err(|source| {
        Error::new(Kind::Run, "this file is not a run's report")
            .at(format!(
                "{}, line {}, column {}",
                path.display(),
                source.line(),
                source.column()
            ))
            .value(source.to_string())
            .hint("write it again by finishing the run: `wattune train RECIPE --resume RUN_DIR`")
    })
}
