//! A training run from recipe to report, in its directory.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use super::checks::check_disk;
use super::directory::RunDirectory;
use super::model::fetch_weights;
use super::prepare::{Prepared, Target, prepare};
use super::reporting::{Ended, write_pages, write_reports};
use super::sample::{SamplePrompt, sample_prompt};
use super::step_logger::StepLogger;
use super::trainee;
use super::{Screen, measured_baselines, plan};
use crate::energy::Computing;
use crate::energy::{Account, DeviceRef, Ledger, Phase, Verdict};
use crate::error::{Error, Kind, Result};
use crate::files::remove_leftovers;
use crate::forecast::load_work;
use crate::model::TrainableModel;
use crate::recipe::{self, Checkpointing, Init, Recipe};
use crate::report::steps::truncate_after;
use crate::report::types::{AdapterType, Sample};
use crate::report::{FiniteReport, read_report, to_plan_json};
use crate::train::{Checkpoints, Outcome, Scheduled, StepCosts, Stop, TrainState, Trainer};
use crate::units::Seconds;
use crate::work::Work;

/// What `train` is asked to do.
pub struct TrainRequest<'a> {
    /// The recipe. A resumed run has its own, which one given here must equal.
    pub recipe: Option<Recipe>,
    /// Where a new run goes.
    pub out: PathBuf,
    /// The run to continue.
    pub resume: Option<&'a Path>,
    /// Where to compute.
    pub device: Device,
    /// Which counter measures it.
    pub computing: Computing,
    /// Set when the person asks to stop.
    pub interrupted: &'a AtomicBool,
}

/// A finished run.
#[derive(Debug)]
pub struct Finished {
    /// Its directory.
    pub directory: RunDirectory,
    /// Its report.
    pub report: FiniteReport,
    /// Why it ended.
    pub stop: Stop,
    /// Whether the person stopped the baselines that are trained after it.
    pub baselines_interrupted: bool,
}

impl Finished {
    /// Where the adapter (or the whole model) is.
    pub fn result(&self) -> PathBuf {
        self.directory
            .result(self.report.adapter.r#type == AdapterType::None)
    }
}

/// Trains, and writes the report whatever ended the run.
pub fn train(request: TrainRequest<'_>, screen: &mut dyn Screen) -> Result<Finished> {
    let recipe = load_recipe(&request)?;
    let mut prepared = prepare(
        recipe,
        &request.device,
        request.computing,
        screen.downloads(),
    )?;
    prepared
        .warnings
        .iter()
        .for_each(|warning| screen.note(&format!("warning: {warning}")));
    let forecast = plan::plan(&prepared)?;
    if prepared.recipe.model.init == Init::Pretrained {
        fetch_weights(&mut prepared.files, screen.downloads())?;
    }
    check_disk(&prepared, request.resume.unwrap_or(&request.out))?;
    let directory = match request.resume {
        Some(run) => RunDirectory::open(run)?,
        None => {
            forecast.check_affordable()?;
            RunDirectory::create(
                &request.out,
                &prepared.recipe.to_toml(),
                &to_plan_json(&forecast.plan)?,
            )?
        }
    };
    if let Some(report) = request
        .resume
        .and_then(|_| measured_baselines::pending(&prepared.recipe, &directory))
    {
        return resume_baselines(&request, &prepared, directory, report, screen)
            .map_err(Error::while_running);
    }
    if request.resume.is_some()
        && let Some(report) = finished_report(&directory)
    {
        return restore_pages(&request, &prepared, directory, report).map_err(Error::while_running);
    }
    let start = Start::find(&request, &prepared, directory, screen)?;
    if start.ended().is_some() {
        return finish_ended(&request, &prepared, start, screen).map_err(Error::while_running);
    }
    run_in(&request, &prepared, start, forecast.steps(), screen).map_err(Error::while_running)
}

/// The recipe asked for; a resumed run's own, which a given one must equal but for every `auto` that the run resolved.
fn load_recipe(request: &TrainRequest<'_>) -> Result<Recipe> {
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

/// A run that ended as it was meant to, and whose measured baselines did, has nothing to go on with. One whose report cannot be read is
/// taken as cut off.
fn refuse_finished(directory: &RunDirectory, recipe: &Recipe) -> Result<()> {
    let run = directory.path().display();
    let Some(report) = finished_report(directory) else {
        return Ok(());
    };
    if measured_baselines::pending(recipe, directory).is_some()
        || !directory.missing_pages().is_empty()
    {
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

/// The report of a run that ended as its recipe says.
fn finished_report(directory: &RunDirectory) -> Option<FiniteReport> {
    read_report(&directory.report())
        .ok()
        .filter(|report| report.training.stop_reason.is_regular())
}

/// Writes the pages of a finished run again.
fn restore_pages(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: RunDirectory,
    report: FiniteReport,
) -> Result<Finished> {
    let account = open_account(request, prepared, &directory)?;
    write_pages(
        prepared,
        account.spent().energy.joules(),
        &directory,
        &report,
    )?;
    let stop = report.training.stop_reason.clone();
    Ok(Finished {
        directory,
        report,
        stop,
        baselines_interrupted: false,
    })
}

/// Writes the result and the report of a run whose loop had ended when its process was killed, from its last checkpoint. Nothing is
/// computed, so nothing is spent.
fn finish_ended(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    start: Start,
    screen: &mut dyn Screen,
) -> Result<Finished> {
    let Start {
        directory,
        mut account,
        checkpoints,
        found,
        ..
    } = start;
    let state = found.unwrap_or_default();
    let stop = state.ended.clone().unwrap_or(Stop::Interrupted);
    screen.note(&format!(
        "the run had ended after step {}: writing its result and report",
        state.step
    ));
    truncate_after(&directory.steps(), state.step)?;
    account.close()?;
    let wall = account.spent().time;
    let outcome = Outcome { stop, state };
    let ended = Ended {
        prepared,
        outcome: &outcome,
        account: &account,
        checkpoints: &checkpoints,
        sample: None,
        wall,
    };
    let step = outcome.state.step;
    let export = |dir: &Path| {
        checkpoints.copy_export(step, dir)?;
        if prepared.whole_model() {
            trainee::write_model_config(prepared, dir, Some(outcome.state.tokens))?;
        }
        Ok(())
    };
    let report = write_reports(&ended, &directory, &export)?;
    let (report, baselines_interrupted) =
        add_measured_baselines(request, prepared, &account, &directory, report, screen)?;
    Ok(Finished {
        directory,
        report,
        stop: outcome.stop,
        baselines_interrupted,
    })
}

/// Where a run starts: its directory, what was spent already, and the checkpoint to go on from.
struct Start {
    directory: RunDirectory,
    account: Account,
    checkpoints: Checkpoints,
    found: Option<TrainState>,
    prompt: Option<SamplePrompt>,
    load: Work,
}

impl Start {
    fn find(
        request: &TrainRequest<'_>,
        prepared: &Prepared,
        directory: RunDirectory,
        screen: &mut dyn Screen,
    ) -> Result<Self> {
        let checkpoints = Checkpoints::new(
            directory.checkpoints(),
            prepared.recipe.train.save_total_limit,
        );
        if request.resume.is_some()
            && !directory.ledger().exists()
            && !checkpoints.steps()?.is_empty()
        {
            return Err(Error::new(
                Kind::Run,
                "the ledger of this run is gone: what it has spent is not known",
            )
            .at(directory.ledger().display().to_string())
            .rule("a run that was begun goes on with what is left of its budget")
            .hint("put the file back, or start a new run with another `--out`"));
        }
        let account = open_account(request, prepared, &directory)?;
        let mut found = None;
        if request.resume.is_some() {
            remove_leftovers(directory.path());
            checkpoints.tidy()?;
            found = checkpoints.newest(prepared.digest())?;
            if let Some(spent) = found.as_ref().and_then(|state| state.spent.as_ref()) {
                account.check_not_less(spent)?;
            }
            if found.is_none() && account.spent_on(Phase::Train).flops > 0 {
                screen.note(&format!(
                    "warning: this run has no checkpoint: it starts again from step 0, and what it spent ({}) stays spent",
                    account.spent().energy.joules()
                ));
            }
        }
        let load = load_work(&prepared.architecture, prepared.recipe.model.dtype);
        let start = Self {
            directory,
            account,
            checkpoints,
            found,
            prompt: sample_prompt(prepared)?,
            load,
        };
        if request.resume.is_some() && start.ended().is_none() {
            start.check_room(prepared)?;
        }
        Ok(start)
    }

    /// Why the loop had ended already, if it had.
    fn ended(&self) -> Option<&Stop> {
        self.found.as_ref()?.ended.as_ref()
    }

    /// What the loop's caller does after the loop, within the same budget.
    fn ending(&self, prepared: &Prepared) -> Vec<(Phase, Work)> {
        self.prompt
            .iter()
            .map(|prompt| (Phase::Eval, prompt.work(&prepared.shape)))
            .collect()
    }

    /// Refuses to go on where the budget cannot hold loading again and everything that ends a run.
    fn check_room(&self, prepared: &Prepared) -> Result<()> {
        let (trained, ending) = (prepared.trained(), self.ending(prepared));
        let costs = StepCosts::new(
            &prepared.shape,
            &prepared.sampler,
            &prepared.validation_batches,
            trained,
            &prepared.settings,
            ending,
        );
        let mut rest = costs.reserve(Scheduled {
            evaluation: false,
            save: false,
        });
        if self
            .found
            .as_ref()
            .is_none_or(|standing| standing.step == 0)
        {
            rest.extend(self.ending(prepared));
            rest.extend(costs.evaluation().map(|work| (Phase::Eval, work.clone())));
        }
        let Verdict::Stop(limit) = self.account.fits(Phase::Load, &self.load, &rest) else {
            return Ok(());
        };
        let error = Error::new(Kind::Budget, format!("the {} budget of this run has no room left to go on", limit.as_str()))
            .at(self.directory.path().display().to_string())
            .rule("loading, the last evaluation and the save must fit; what a run that was cut off had spent is spent");
        Err(match &self.found {
            Some(standing) => error.hint(format!(
                "its last checkpoint is whole: `{}`",
                self.checkpoints.path(standing.step).display()
            )),
            None => error.hint("start a new run with a larger budget and another `--out`"),
        })
    }
}

/// Meters and ledger opened; what an earlier process spent is spent.
fn open_account(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: &RunDirectory,
) -> Result<Account> {
    let meters = prepared.meters.clone();
    let kind = meters.resolve(prepared.recipe.energy.meter)?;
    // A run cut off before its first entry has no ledger yet.
    let ledger = match directory.ledger() {
        path if request.resume.is_some() && path.exists() => {
            Ledger::resume_run(&path, prepared.digest())?
        }
        path => Ledger::create_for_run(&path, prepared.digest())?,
    };
    Ok(Account::new(prepared.budget.clone(), meters, ledger, kind))
}

fn run_in(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    start: Start,
    expected_steps: u64,
    screen: &mut dyn Screen,
) -> Result<Finished> {
    let started = std::time::Instant::now();
    let ending = start.ending(prepared);
    let Start {
        directory,
        mut account,
        checkpoints,
        found,
        prompt,
        load,
    } = start;
    account.admit(Phase::Load, &load, &[])?;
    account.begin();
    let TrainableModel {
        decoder,
        parameters,
    } = trainee::assemble(prepared, &request.device)?;
    if let Some(standing) = &found {
        checkpoints.restore(standing.step, &parameters)?;
    }
    let mut standing = TrainState {
        recipe: prepared.digest().to_string(),
        ..found.unwrap_or_default()
    };
    account.charge(Phase::Load, standing.step, &load)?;
    if request.resume.is_some() {
        truncate_after(&directory.steps(), standing.step)?;
        screen.note(&format!("resuming after step {}", standing.step));
    }
    // Who asked to stop before the first step has both before the first step of the resumed run.
    if standing.step == 0
        && standing.sample_before.is_none()
        && !request.interrupted.load(Ordering::Relaxed)
    {
        standing.sample_before = sample(prepared, &decoder, prompt.as_ref(), &mut account, 0)?;
    }
    let outcome = {
        let export = |dir: &Path| trainee::export(prepared, &parameters, dir, None);
        let mut observer = StepLogger::new(
            directory.steps(),
            screen,
            prepared.settings.steps,
            expected_steps,
        )?;
        let mut trainer = Trainer {
            decoder: &decoder,
            parameters: &parameters,
            shape: &prepared.shape,
            sampler: &prepared.sampler,
            validation: &prepared.validation_batches,
            settings: &prepared.settings,
            account: &mut account,
            checkpoints: &checkpoints,
            export: &export,
            interrupted: request.interrupted,
            ending,
        };
        let outcome = trainer.train(standing, &mut observer)?;
        observer.flush()?;
        outcome
    };
    let after = match outcome.stop {
        Stop::Diverged(_) | Stop::Interrupted => None,
        _ => sample(
            prepared,
            &decoder,
            prompt.as_ref(),
            &mut account,
            outcome.state.step,
        )?,
    };
    account.close()?;
    let ended = Ended {
        prepared,
        outcome: &outcome,
        account: &account,
        checkpoints: &checkpoints,
        sample: prompt
            .zip(outcome.state.sample_before.clone())
            .zip(after)
            .map(|((prompt, before), after)| Sample {
                prompt: prompt.text,
                before,
                after,
            }),
        wall: Seconds(started.elapsed().as_secs_f64()),
    };
    let tokens = outcome.state.tokens;
    let export = |dir: &Path| trainee::export(prepared, &parameters, dir, Some(tokens));
    let report = write_reports(&ended, &directory, &export)?;
    // A baseline needs the memory that the run no longer does.
    drop((decoder, parameters));
    let (report, baselines_interrupted) =
        add_measured_baselines(request, prepared, &account, &directory, report, screen)?;
    let Outcome { stop, .. } = outcome;
    Ok(Finished {
        directory,
        report,
        stop,
        baselines_interrupted,
    })
}

/// Trains the baselines that the recipe asks for once the run's own report is whole, and writes its pages again with them.
fn add_measured_baselines(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    account: &Account,
    directory: &RunDirectory,
    report: FiniteReport,
    screen: &mut dyn Screen,
) -> Result<(FiniteReport, bool)> {
    let TrainRequest {
        ref device,
        interrupted,
        ..
    } = *request;
    let place = measured_baselines::RunContext {
        prepared,
        directory,
        device,
        interrupted,
    };
    measured_baselines::train_pending(&place, account, report, screen)
}

/// Goes on with the baselines of a run that is finished itself.
fn resume_baselines(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: RunDirectory,
    report: FiniteReport,
    screen: &mut dyn Screen,
) -> Result<Finished> {
    let account = open_account(request, prepared, &directory)?;
    let stop = report.training.stop_reason.clone();
    let (report, baselines_interrupted) =
        add_measured_baselines(request, prepared, &account, &directory, report, screen)?;
    Ok(Finished {
        directory,
        report,
        stop,
        baselines_interrupted,
    })
}

/// One sample, charged as evaluation; `None` where there is no prompt.
fn sample(
    prepared: &Prepared,
    decoder: &crate::model::Decoder,
    prompt: Option<&SamplePrompt>,
    account: &mut Account,
    step: u64,
) -> Result<Option<String>> {
    let Some(prompt) = prompt else {
        return Ok(None);
    };
    account.admit(Phase::Eval, &prompt.work(&prepared.shape), &[])?;
    account.begin();
    let (text, work) = prompt.generate(prepared, decoder)?;
    account.charge(Phase::Eval, step, &work)?;
    Ok(Some(text))
}

impl Prepared {
    /// Whether the run's result is a whole model rather than an adapter.
    pub(super) fn whole_model(&self) -> bool {
        matches!(self.target, Target::All)
    }
}
