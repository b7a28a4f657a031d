//! `wattune report` and `wattune compare`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::report::{
    FiniteReport, History, compare as compare_reports, comparison_page, read_report, read_steps,
    to_html, to_markdown, to_text,
};
use crate::run::RunDirectory;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Run directory
    run: PathBuf,
    /// Output format [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Formats of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Text for a terminal
    Text,
    /// JSON; the same as `--json`
    Json,
    /// Markdown
    Md,
    /// HTML page with charts
    Html,
    /// CodeCarbon's columns, as written by the run
    Csv,
}

#[derive(Debug, clap::Args)]
pub(super) struct CompareArguments {
    /// Run directories
    #[arg(required = true, num_args = 2..)]
    runs: Vec<PathBuf>,
    /// Output format [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<CompareFormat>,
}

/// Formats of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CompareFormat {
    /// Text for a terminal
    Text,
    /// JSON; the same as `--json`
    Json,
    /// HTML page with charts
    Html,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let directory = RunDirectory::open(&arguments.run)?;
    let report = read(&arguments.run)?;
    let name = directory_name(&arguments.run);
    match format(arguments.format, common.json, Format::Json, Format::Text)? {
        Format::Json => out_json(&report),
        Format::Text => out(&to_text(&name, &report)),
        Format::Md => out(&to_markdown(&name, &report)?),
        Format::Html => out(&to_html(&name, &report, &history(&arguments.run)?)?),
        Format::Csv => {
            let path = directory.emissions();
            out(&std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?)
        }
    }
}

/// The run's name on a page: its directory without the path, which may hold private names.
fn directory_name(run: &Path) -> String {
    run.file_name().map_or_else(
        || run.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// The chosen format; `--json` is one of them.
fn format<F: PartialEq>(format: Option<F>, json: bool, as_json: F, otherwise: F) -> Result<F> {
    match (format, json) {
        (Some(other), true) if other != as_json => Err(Error::new(
            Kind::Usage,
            "`--json` and another `--format` contradict each other",
        )
        .hint("give one of them")),
        (None, true) => Ok(as_json),
        (format, _) => Ok(format.unwrap_or(otherwise)),
    }
}

pub(super) fn compare(arguments: &CompareArguments, common: Common) -> Result<ExitCode> {
    let named = |run: &PathBuf| Ok((run.display().to_string(), read(run)?));
    let runs = arguments
        .runs
        .iter()
        .map(named)
        .collect::<Result<Vec<_>>>()?;
    let mut comparison = compare_reports(&runs);
    let recipes = arguments.runs.iter().map(|run| recipe_of(run));
    comparison.note_recipes(&recipes.collect::<Result<Vec<_>>>()?);
    match format(
        arguments.format,
        common.json,
        CompareFormat::Json,
        CompareFormat::Text,
    )? {
        CompareFormat::Json => out_json(&comparison),
        CompareFormat::Text => out(&comparison.text()),
        CompareFormat::Html => {
            let histories = arguments.runs.iter().map(|run| history(run));
            let reports = runs.into_iter().map(|(_, report)| report);
            let runs: Vec<(FiniteReport, History)> = reports
                .zip(histories)
                .map(|(report, history)| Ok((report, history?)))
                .collect::<Result<_>>()?;
            out(&comparison_page(&comparison, &runs)?)
        }
    }
}

fn recipe_of(run: &Path) -> Result<toml::Table> {
    let path = RunDirectory::open(run)?.recipe();
    let text = std::fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))?;
    text.parse().map_err(|source: toml::de::Error| {
        Error::new(Kind::Run, "the run's recipe cannot be read")
            .at(path.display().to_string())
            .value(source.message())
    })
}

fn history(run: &Path) -> Result<History> {
    let directory = RunDirectory::open(run)?;
    History::read(&directory.steps(), &directory.ledger())
}

fn read(run: &Path) -> Result<FiniteReport> {
    let directory = RunDirectory::open(run)?;
    if !directory.report().exists() {
        return Err(no_report(run, &directory));
    }
    read_report(&directory.report())
}

/// A run that still trains, or that was cut off, with what its log tells.
fn no_report(run: &Path, directory: &RunDirectory) -> Error {
    let steps = read_steps(&directory.steps()).unwrap_or_default();
    let progress = steps.last().map_or("no step yet".to_string(), |last| {
        let loss = last
            .loss
            .map_or("not finite".to_string(), |loss| format!("{loss:.4}"));
        format!("step {}, training loss {loss}", last.step)
    });
    let run = run.display();
    let (what, hint) = if directory.is_running() {
        let steps = directory.steps();
        let hint = format!(
            "wait for its end, or follow it: `tail -f {}`",
            steps.display()
        );
        ("this run is still training", hint)
    } else {
        let hint = format!("resume it: `wattune train --resume {run}`");
        ("this run was cut off before its end", hint)
    };
    Error::new(Kind::Run, what)
        .at(run.to_string())
        .value(progress)
        .rule("a run writes its report when it ends")
        .hint(hint)
}
