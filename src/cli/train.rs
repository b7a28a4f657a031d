//! `wattune train`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use super::model::DeviceArgument;
use super::screen::{Terminal, announce};
use super::{Common, note, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::recipe;
use crate::report::to_brief;
use crate::run::{self, Finished, Stop, TrainRequest};

/// Exit status of an interrupted run.
const INTERRUPTED: u8 = 130;

static ASKED_TO_STOP: AtomicBool = AtomicBool::new(false);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Recipe file (optional with --resume; must then equal the run's)
    #[arg(required_unless_present = "resume")]
    recipe: Option<PathBuf>,
    /// Override a recipe key, such as `--set train.learning_rate=1e-4`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Run directory; must be empty or absent [default: runs/NAME-TIMESTAMP]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Resume a run from its newest complete checkpoint, or its unfinished measured baselines
    #[arg(long, value_name = "RUN_DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgument,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let recipe = match (&arguments.recipe, arguments.overrides.first()) {
        (Some(path), _) => Some(recipe::load(path, &arguments.overrides)?),
        (None, None) => None,
        (None, Some(first)) => return Err(changed_on_resume(first)),
    };
    let (device, computing) = arguments.device.device.open()?;
    stop_when_asked(common.quiet)?;
    let out_dir = match (&arguments.out, &recipe) {
        (Some(out), _) => out.clone(),
        (None, Some(recipe)) => free_directory(&format!(
            "{}-{}",
            recipe.name,
            crate::text::local_time().format("%Y%m%d-%H%M%S")
        )),
        (None, None) => PathBuf::new(),
    };
    let request = TrainRequest {
        recipe,
        out: out_dir,
        resume: arguments.resume.as_deref(),
        device,
        computing,
        interrupted: &ASKED_TO_STOP,
    };
    let mut screen = Terminal::new(common.quiet);
    let finished = run::train(request, &mut screen);
    screen.clear();
    let located = |error| match &arguments.recipe {
        Some(path) => recipe::locate(error, path, &arguments.overrides),
        None => error,
    };
    let finished = finished.map_err(located)?;
    show(&finished, common)?;
    exit_status(finished, common)
}

/// The report, and where the result is.
fn show(finished: &Finished, common: Common) -> Result<()> {
    let path = finished.directory.path();
    if common.json {
        out_json(&finished.report)?;
    } else if !common.quiet {
        out(&to_brief(&path.display().to_string(), &finished.report))?;
        note(&format!(
            "\nThe result is in `{}`; the whole report: `wattune report {}`.",
            finished.result().display(),
            path.display()
        ));
    }
    Ok(())
}

fn exit_status(finished: Finished, common: Common) -> Result<ExitCode> {
    let (state, part) = match finished.stop {
        Stop::Diverged(what) => {
            let hint = "lower `train.learning_rate`, or look at the records named; the last good checkpoint is in the run directory";
            return Err(Error::new(Kind::Diverged, what).hint(hint).while_running());
        }
        Stop::Interrupted => ("a checkpoint is saved", "continue"),
        _ if finished.baselines_interrupted => (
            "the run is finished and its report is complete; of the baseline it holds what was reached",
            "continue the baseline",
        ),
        _ => return Ok(ExitCode::SUCCESS),
    };
    if !common.quiet {
        let path = finished.directory.path().display();
        note(&format!(
            "interrupted: {state}\n\nhint: {part} with `wattune train --resume {path}`"
        ));
    }
    Ok(ExitCode::from(INTERRUPTED))
}

fn changed_on_resume(set: &str) -> Error {
    Error::new(Kind::Usage, "a resumed run keeps its recipe")
        .value(format!("--set {set}"))
        .rule("schedule, budget and data order follow from the recipe that the run began with")
        .hint(
            "leave `--set` out to resume; to train on with other settings, start a run with \
             `--set adapter.init_from=RUN/adapter`",
        )
}

/// A directory for a run that is not there yet: of runs begun in one second the later ones have a number.
fn free_directory(name: &str) -> PathBuf {
    let folder = PathBuf::from("runs");
    let mut path = folder.join(name);
    for number in 2u32.. {
        if !path.exists() {
            break;
        }
        path = folder.join(format!("{name}-{number}"));
    }
    path
}

/// The first Ctrl-C, or a plain `kill` (SIGTERM) as batch systems send it before they take a machine back, asks the loop to stop; the
/// second leaves at once, the last checkpoint whole. So does a terminal that closes, unless `nohup` said that it should not.
fn stop_when_asked(quiet: bool) -> Result<()> {
    let handler = move || {
        if ASKED_TO_STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        if quiet {
            return;
        }
        // A thread of its own: a standard error that blocks must not keep the second signal from being seen.
        std::thread::spawn(|| announce("\nfinishing this step and saving; Ctrl-C again quits now"));
    };
    let hangup_ignored = ignores_hangup();
    ctrlc::set_handler(handler)
        .map_err(|e| Error::new(Kind::Usage, format!("Ctrl-C cannot be watched: {e}")))?;
    if hangup_ignored {
        ignore_hangup();
    }
    Ok(())
}

/// Whether the process was started with `nohup`, or told by other means to outlive its terminal.
#[cfg(unix)]
fn ignores_hangup() -> bool {
    // SAFETY: the call only exchanges what happens at a signal; what it was is put back at once.
    unsafe {
        let before = libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, before);
        before == libc::SIG_IGN
    }
}

#[cfg(unix)]
fn ignore_hangup() {
    // SAFETY: as above; ctrlc's own thread waits for other signals still.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
}

#[cfg(not(unix))]
fn ignores_hangup() -> bool {
    false
}

#[cfg(not(unix))]
fn ignore_hangup() {}
