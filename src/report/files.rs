//! Files of a run directory: their names, and `report.json`.

use std::fs;
use std::path::Path;

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
    let text = fs::read_to_string(path).map_err(|source| {
        let missing = source.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io("read", path, source);
        if missing {
            return error.hint(
                "a run writes its report when it ends; if it was cut off: `wattune train --resume RUN_DIR`",
            );
        }
        error
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
            .hint("move the file away and write it again with `wattune train --resume RUN_DIR`")
    })?;
    FiniteReport::new(report)
}
