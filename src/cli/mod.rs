//! The command line: arguments, progress, tables, hints, exit codes. The only room that prints.
//!
//! Data goes to standard output, everything else to standard error; with `--json` standard output holds one JSON document. One file
//! per command. Exit status: 0 done, 1 failed while running, 2 refused before it ran, 130 interrupted with a checkpoint saved.

mod adapter;
mod baseline;
mod calibrate;
mod choices;
mod data;
mod devices;
mod eval;
mod export;
mod first_recipe;
mod generate;
mod merge;
mod meter;
mod model;
mod place;
mod plan;
mod predict;
mod push;
mod recipe;
mod report;
mod screen;
mod train;

use std::any::TypeId;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::files::expand;
use crate::report::text as report_text;
use crate::run;
use crate::text::printable;

/// Fine-tune an open transformer within an energy budget, and report what it cost.
#[derive(Debug, Parser)]
#[command(name = "wattune", version, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "\
Examples:
  wattune train recipes/quickstart.toml            fine-tune a small model, offline, in under a minute
  wattune plan recipes/quickstart.toml             forecast its cost without training
  wattune report runs/quickstart-20260101-120000   report what a run cost
  wattune recipe init --model M --data D           write a recipe for a model and data, with its reasons
  wattune data recipes/quickstart.toml             show the records as they will be trained

Exit status: 0 done (a budget stop is done), 1 failed while running, 2 refused before it ran, 130 interrupted with a checkpoint saved.";

/// Flags of every command.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Common {
    /// Print one JSON document, and nothing else, on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Hide progress and notes
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Number of threads [default: RAYON_NUM_THREADS, else all CPUs the process may use]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a recipe; writes adapter, checkpoints and report to a run directory
    Train(train::Arguments),
    /// Forecast a recipe's energy, time and memory without training
    ///
    /// Reads configuration, tokenizer and data, simulates the run on the counted meter (executed work times device profile) and shows
    /// where the budget would stop it. With --probe it also times a few steps on random weights.
    Plan(plan::Arguments),
    /// Show a recipe's records as they will be trained: loss mask, lengths, packing, duplicates
    ///
    /// Reads configuration, tokenizer and data; no weights. Text with a loss is green on a terminal and stands between »« without colour.
    Data(data::Arguments),
    /// Evaluate a model's loss on records
    Eval(eval::Arguments),
    /// Predict the class of each record with a classifier
    ///
    /// Writes the likeliest class and the probability of every class, one record a line in the order of the data. A label in the records
    /// is not read.
    Predict(eval::Arguments),
    /// Generate text from a model
    Generate(generate::Arguments),
    /// Merge an adapter into its model; writes a complete model directory
    Merge(merge::Arguments),
    /// Inspect, convert or compare PEFT adapters
    #[command(subcommand)]
    Adapter(adapter::Command),
    /// Write a model as a GGUF file for llama.cpp and Ollama, or as a Hugging Face directory
    ///
    /// An adapter is merged first. Formats and names are llama.cpp's; a Modelfile for Ollama is written beside the file.
    Export(export::Arguments),
    /// Upload a run's adapter (or trained model) and its model card to the hub
    ///
    /// One commit, or with --create-pr a pull request. The token comes from HF_TOKEN or `hf auth login` and needs write access. Large
    /// files go through the hub's xet storage, whose client reports transfer statistics to the hub: HF_HUB_DISABLE_TELEMETRY=1 stops
    /// that.
    Push(push::Arguments),
    /// Show a run's cost, its baselines and the uncertainty of the figures
    Report(report::Arguments),
    /// Compare runs by loss reduction per joule
    Compare(report::CompareArguments),
    /// Estimate the cost of training a model: a published run by name, or parameters, tokens and a device
    ///
    /// Shows energy and emissions with their intervals, the PUE applied once, and every assumption with its source. Options override
    /// published and assumed values. A published run with contradictory figures is refused.
    Baseline(baseline::Arguments),
    /// Find where a model answers a request with the least energy: device, power limit, stored format, batch, split
    ///
    /// Counts every combination on device profiles and prints the cheapest one within each deadline, those that none beats in both
    /// energy and latency, whether the memory holds them, and the command that runs each. Loads nothing.
    Place(place::Arguments),
    /// List device profiles and this machine's energy counters
    ///
    /// Shows the profile of the detected device and how it was recognised, the energy counters this process may read, how to enable the
    /// others, and every shipped profile by the name that `energy.device` takes.
    Devices(devices::Arguments),
    /// Meter the energy of another program: of a command, or window by window
    Meter(meter::Arguments),
    /// Measure this machine and write a device profile, in under a minute
    ///
    /// Starts from the nearest profile and replaces the figures that can be measured: FLOP/s of matrix products by precision, memory and
    /// cache bandwidth, and idle and load power if an energy counter is readable. The notes name the figures that were kept. Run it on
    /// an idle machine: other load makes the figures too low. With --from-run it stores a run's ratio of measured to counted energy as a
    /// factor of every counted joule.
    Calibrate(calibrate::Arguments),
    /// Write or check recipes, or print their JSON Schema
    #[command(subcommand)]
    Recipe(recipe::Command),
    /// Print shell completions
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write man pages to a directory
    Man {
        /// Directory for `wattune.1`, `wattune-train.1`, ...
        dir: std::path::PathBuf,
    },
}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = with_expanded_paths(Cli::command()).try_get_matches();
    let cli = match arguments.and_then(|found| Cli::from_arg_matches(&found)) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let json = cli.common.json;
    report_text::set_width(terminal_width());
    // On a thread of the pool: from outside it every parallel loop would put this thread to sleep and wake it again.
    match set_threads(cli.common.threads).and_then(|()| rayon::scope(|_| dispatch(cli))) {
        Ok(code) => code,
        Err(error) => {
            screen::announce(&format!("error: {error}"));
            if json && !DOCUMENT_WRITTEN.load(Ordering::Relaxed) {
                // The failure that is reported already counts.
                let _ = out_json(&error.to_json());
            }
            ExitCode::from(error.exit_status())
        }
    }
}

/// Expands `~` and variables in every path argument: a shell leaves those after `--out=` and within quotes as they are.
fn with_expanded_paths(command: clap::Command) -> clap::Command {
    let expanded = |text: OsString| match text.into_string() {
        Ok(text) => expand(&text).map(PathBuf::from),
        Err(text) => Ok(PathBuf::from(text)),
    };
    let with_path = move |argument: clap::Arg| {
        if argument.get_value_parser().type_id() == TypeId::of::<PathBuf>() {
            argument.value_parser(OsStringValueParser::new().try_map(expanded))
        } else {
            argument
        }
    };
    command
        .mut_args(with_path)
        .mut_subcommands(with_expanded_paths)
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    let common = cli.common;
    match cli.command {
        Command::Train(arguments) => train::run(&arguments, common),
        Command::Plan(arguments) => plan::run(&arguments, common),
        Command::Data(arguments) => data::run(&arguments, common),
        Command::Eval(arguments) => eval::run(&arguments, common),
        Command::Predict(arguments) => predict::run(&arguments, common),
        Command::Generate(arguments) => generate::run(&arguments, common),
        Command::Merge(arguments) => merge::run(&arguments, common),
        Command::Adapter(command) => adapter::run(&command, common),
        Command::Export(arguments) => export::run(&arguments, common),
        Command::Push(arguments) => push::run(&arguments, common),
        Command::Report(arguments) => report::run(&arguments, common),
        Command::Compare(arguments) => report::compare(&arguments, common),
        Command::Baseline(arguments) => baseline::run(&arguments, common),
        Command::Place(arguments) => place::run(&arguments, common),
        Command::Devices(arguments) => devices::run(&arguments, common),
        Command::Meter(arguments) => meter::run(&arguments, common),
        Command::Calibrate(arguments) => calibrate::run(&arguments, common),
        Command::Recipe(command) => recipe::run(&command, common),
        Command::Man { dir } => std::fs::create_dir_all(&dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &dir))
            .map(|()| ExitCode::SUCCESS)
            .map_err(|e| Error::io("write man pages to", &dir, e)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "wattune", &mut script);
            out(&String::from_utf8_lossy(&script))
        }
    }
}

/// Most threads per core: more only wait for each other.
const MOST_THREADS: usize = 16;
/// Stack size of pool threads: that of a process's main thread.
const STACK: usize = 8 << 20;

/// Fixes the number of threads: `--threads`, else RAYON_NUM_THREADS, else all that the process may use.
///
/// candle keeps a second, spinning pool for its elementwise operations, which takes the cores away from ours; it is switched off
/// (benches/LOG.md has the measurement). Its products size themselves by RAYON_NUM_THREADS and otherwise read the processor list anew
/// at every call.
fn set_threads(threads: Option<usize>) -> Result<()> {
    let cores = run::allowed_threads();
    let threads = requested_threads(threads)?.unwrap_or(cores);
    if threads > MOST_THREADS * cores {
        return Err(
            Error::new(Kind::Usage, "more threads than the machine has use for")
                .value(threads.to_string())
                .rule(format!("at most {MOST_THREADS} for each of {cores} cores"))
                .hint(format!("write `--threads {cores}`, or leave it out")),
        );
    }
    // SAFETY: this is the program's first act: no other thread exists that could read the environment meanwhile.
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
        std::env::set_var("CANDLE_NUM_THREADS", "1");
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK)
        .build_global();
    pool.map_err(|e| {
        Error::new(
            Kind::Usage,
            format!("the thread pool cannot be set up: {e}"),
        )
    })
}

/// `--threads`, else RAYON_NUM_THREADS.
fn requested_threads(threads: Option<usize>) -> Result<Option<usize>> {
    match (threads, std::env::var("RAYON_NUM_THREADS")) {
        (Some(0), _) => Err(Error::new(Kind::Usage, "`--threads` must be at least one").value("0")),
        (None, Ok(text)) if !text.is_empty() => match text.parse() {
            Ok(threads) if threads > 0 => Ok(Some(threads)),
            _ => Err(
                Error::new(Kind::Usage, "RAYON_NUM_THREADS is not a number of threads")
                    .value(text)
                    .rule("a whole number of at least one")
                    .hint("unset it, or write `--threads 2`"),
            ),
        },
        (threads, _) => Ok(threads),
    }
}

/// Whether standard output shows colours: a terminal, unless NO_COLOR is set (no-color.org).
fn has_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !refused
}

/// Columns of the terminal on standard output; `usize::MAX` for a file or a pipe.
fn terminal_width() -> usize {
    let size = terminal_size::terminal_size_of(std::io::stdout());
    size.map_or(usize::MAX, |size| usize::from(size.0.0))
}

/// Writes a line to standard error. A closed terminal or a full device is ignored: it must not end a run.
fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", printable(text));
}

/// Writes data to standard output; ignores a closed pipe (EPIPE). Control characters are escaped if it is a terminal.
fn out(text: &str) -> Result<ExitCode> {
    write_out(&format!("{}\n", text.trim_end()))
}

/// Writes `text` to standard output without appending a newline.
fn write_out(text: &str) -> Result<ExitCode> {
    if std::io::stdout().is_terminal() {
        write_styled(&printable(text))
    } else {
        write_styled(text)
    }
}

/// Writes `text`, which may hold escape sequences of ours, to standard output as it is.
fn write_styled(text: &str) -> Result<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::new(
            Kind::Io,
            format!("cannot write to standard output: {e}"),
        )
        .while_running()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Whether `--json` has got its document.
static DOCUMENT_WRITTEN: AtomicBool = AtomicBool::new(false);

/// Writes a JSON document to standard output, control characters as JSON escapes.
fn out_json(value: &impl serde::Serialize) -> Result<ExitCode> {
    DOCUMENT_WRITTEN.store(true, Ordering::Relaxed);
    let text =
        serde_json::to_string_pretty(value).map_err(|e| Error::new(Kind::Io, e.to_string()))?;
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    out(&escaped)
}

/// Writes one line of JSON to standard output at once.
fn out_line(value: &impl serde::Serialize) -> Result<ExitCode> {
    DOCUMENT_WRITTEN.store(true, Ordering::Relaxed);
    let text = serde_json::to_string(value).map_err(|e| Error::new(Kind::Io, e.to_string()))?;
    write_styled(&format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_expanded_in_every_path_argument() {
        let home = std::env::home_dir().unwrap();
        for (line, expanded) in [
            ("wattune train ~/r.toml --out=~/x", 2),
            ("wattune train --resume=~/x", 1),
            ("wattune eval --model a/b --data=~/d.jsonl --adapter ~/a", 2),
            ("wattune merge --model a/b --adapter=~/a --out=~/m", 2),
            ("wattune report ~/run", 1),
            ("wattune recipe check ~/r.toml", 1),
            ("wattune man ~", 1),
            ("wattune generate --model a/b --prompt ~/x", 0),
        ] {
            let parsed = with_expanded_paths(Cli::command()).try_get_matches_from(line.split(' '));
            let shown = format!("{:?}", Cli::from_arg_matches(&parsed.unwrap()).unwrap());
            let found = shown.matches(&format!("\"{}", home.display())).count();
            assert_eq!(found, expanded, "{shown}");
        }
    }
}
