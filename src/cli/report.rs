//! `wattune report` and `wattune compare`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Common, out, out_json};
use crate::error::Result;
use crate::report::json::read_report;
use crate::report::text::to_text;
use crate::report::{Report, compare as compare_reports};
use crate::run::RunDirectory;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The run's directory
    run: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct CompareArguments {
    /// The runs' directories
    #[arg(required = true, num_args = 2..)]
    runs: Vec<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let report = read(&arguments.run)?;
    if common.json { out_json(&report) } else { out(&to_text(&arguments.run.display().to_string(), &report)?) }
}

pub(super) fn compare(arguments: &CompareArguments, common: Common) -> Result<ExitCode> {
    let named = |run: &PathBuf| Ok((run.display().to_string(), read(run)?));
    let runs = arguments.runs.iter().map(named).collect::<Result<Vec<_>>>()?;
    let comparison = compare_reports(&runs);
    if common.json { out_json(&comparison.json()) } else { out(&comparison.text()) }
}

fn read(run: &Path) -> Result<Report> {
    read_report(&RunDirectory::open(run)?.report())
}
