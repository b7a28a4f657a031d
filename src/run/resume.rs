//! The recipe of a new or resumed run, and runs that are finished.

use super::directory::RunDirectory;
use super::measured_baselines::pending;
use super::training::TrainRequest;
use crate::energy::DeviceRef;
use crate::error::{Error, Kind, Result};
use crate::recipe::{self, Checkpointing, Recipe};
use crate::report::{FiniteReport, read_report};

/// The request's recipe; of a resumed run its own, which the request's must equal apart from `auto` values.
///
/// # Errors
/// No recipe, another recipe than the run's, and a run that is finished.
pub(super) fn load_recipe(request: &TrainRequest<'_>) -> Result<Recipe> {
    let Some(run) = request.resume else {
        return request.recipe.clone().ok_or_else(|| {
            Error::new(Kind::Usage, "no recipe was given").hint("wattune train RECIPE")
        });
    };
    let directory = RunDirectory::open(run)?;
    let own = recipe::load(&directory.recipe(), &[])?;
    refuse_finished(&directory, &own)?;
    let Some(mut given) = request.recipe.clone() else {
        return Ok(own);
    };
    if given.energy.device == DeviceRef::Auto {
        given.energy.device.clone_from(&own.energy.device);
    }
    given.energy.meter = given.energy.meter.or(own.energy.meter);
    if given.train.activation_checkpointing == Checkpointing::Auto {
        given.train.activation_checkpointing = own.train.activation_checkpointing;
    }
    if given.to_toml() == own.to_toml() {
        return Ok(own);
    }
    Err(Error::new(
        Kind::Run,
        "the recipe is not the one that this run began with",
    )
    .at(directory.recipe().display().to_string())
    .rule("a run goes on under its own recipe")
    .hint(format!(
        "leave the recipe out: `wattune train --resume {}`",
        run.display()
    )))
}

/// Refuses a run whose loop, measured baselines and pages are complete. A run without a readable report is taken as interrupted.
fn refuse_finished(directory: &RunDirectory, recipe: &Recipe) -> Result<()> {
    let run = directory.path().display();
    let Some(report) = finished_report(directory) else {
        return Ok(());
    };
    if pending(recipe, directory).is_some() || !directory.missing_pages().is_empty() {
        return Ok(());
    }
    let reason = &report.training.stop_reason;
    Err(Error::new(Kind::Run, "this run is finished: there is nothing to resume")
        .at(run.to_string())
        .value(format!("stop_reason {reason}, {} steps", report.training.steps))
        .hint(format!(
            "`wattune report {run}` shows it; to train on, start a new run with `init_from = \"{run}/adapter\"` in [adapter]"
        )))
}

/// The report of a run that reached its end.
pub(super) fn finished_report(directory: &RunDirectory) -> Option<FiniteReport> {
    let report = read_report(&directory.report()).ok()?;
    report.training.stop_reason.is_regular().then_some(report)
}
