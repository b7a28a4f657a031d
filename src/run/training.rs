//! `train`: a run from recipe to report, in its directory.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Device;

use super::checks::check_disk;
use super::directory::RunDirectory;
use super::measured_baselines::{RunContext, pending, train_pending};
use super::model::fetch_weights;
use super::prepare::{Prepared, Purpose, prepare};
use super::reporting::{Ended, write_pages, write_reports};
use super::resume::{finished_report, load_recipe};
use super::sample::{SamplePrompt, sample_prompt};
use super::session::{Segment, Session};
use super::{Screen, plan, trained_model};
use crate::energy::{Account, Computing, Ledger, Limit, Phase, Verdict};
use crate::error::{Error, Kind, Result};
use crate::files::remove_leftovers;
use crate::model::Decoder;
use crate::recipe::{Init, Recipe};
use crate::report::steps::truncate_after;
use crate::report::types::{AdapterType, Sample};
use crate::report::{FiniteReport, to_plan_json};
use crate::train::{Checkpoints, Scheduled, StepCosts, Stop, TrainState};
use crate::units::Seconds;
use crate::work::Work;

/// A run to start or to resume.
pub struct TrainRequest<'a> {
    /// The recipe. A resumed run has its own, which one given here must equal.
    pub recipe: Option<Recipe>,
    /// Directory of a new run.
    pub out: PathBuf,
    /// Directory of the run to resume.
    pub resume: Option<&'a Path>,
    /// Compute device.
    pub device: Device,
    /// The counter that measures it.
    pub computing: Computing,
    /// Set when the user interrupts.
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
    /// Whether the user interrupted its measured baselines.
    pub baselines_interrupted: bool,
}

impl Finished {
    /// Directory of the adapter, or of the model if every weight was trained.
    pub fn result(&self) -> PathBuf {
        self.directory
            .result(self.report.adapter.r#type == AdapterType::None)
    }
}

/// Trains, and writes the report whatever ended the run.
///
/// # Errors
/// What preflight refuses; later ones, marked as while running, of files, device and data.
pub fn train(request: TrainRequest<'_>, screen: &mut dyn Screen) -> Result<Finished> {
    let recipe = load_recipe(&request)?;
    let mut prepared = prepare(
        recipe,
        &request.device,
        request.computing,
        Purpose::Run,
        screen.downloads(),
    )?;
    for warning in &prepared.warnings {
        screen.note(&format!("warning: {warning}"));
    }
    if let Some(machine) = &prepared.machine {
        let device = &prepared.profile.name;
        let machine = &machine.name;
        screen.note(&format!(
            "energy is counted for `{device}`, not for this machine (`{machine}`)"
        ));
    }
    let forecast = plan::plan(&prepared, screen)?;
    if prepared.recipe.model.init == Init::Pretrained {
        fetch_weights(&mut prepared.files, screen.downloads())?;
    }
    if request.resume.is_none() {
        // A resumed run's checkpoints occupy their space already.
        check_disk(&prepared, &request.out)?;
    }
    let directory = if let Some(run) = request.resume {
        let directory = RunDirectory::open(run)?;
        if let Some(report) = finished_report(&directory) {
            return complete(&request, &prepared, directory, report, screen)
                .map_err(Error::while_running);
        }
        directory
    } else {
        forecast.check_affordable(&prepared)?;
        let recipe = prepared.recipe.to_toml();
        RunDirectory::create(&request.out, &recipe, &to_plan_json(&forecast.plan)?)?
    };
    let run = Run::open(&request, &prepared, directory, screen)?;
    let finished = match run.session.state.ended.clone() {
        Some(stop) => run.finish_ended(stop, screen),
        None => run.train(forecast.steps(), screen),
    };
    // A budget that turns out too small for one step is refused as in preflight.
    finished.map_err(|error| match error.kind() {
        Kind::Budget => error,
        _ => error.while_running(),
    })
}

/// A run in its directory.
struct Run<'a> {
    request: &'a TrainRequest<'a>,
    prepared: &'a Prepared,
    directory: RunDirectory,
    session: Session<'a>,
    prompt: Option<SamplePrompt>,
    load: Work,
}

impl<'a> Run<'a> {
    /// Opens the ledger and, of a resumed run, the newest checkpoint.
    fn open(
        request: &'a TrainRequest<'a>,
        prepared: &'a Prepared,
        directory: RunDirectory,
        screen: &mut dyn Screen,
    ) -> Result<Self> {
        let keep = prepared.recipe.train.save_total_limit;
        let checkpoints = Checkpoints::new(directory.checkpoints(), keep);
        let resumed = request.resume.is_some();
        let account = open_account(request, prepared, &directory)?;
        let found = if resumed {
            remove_leftovers(directory.path());
            newest_state(&checkpoints, prepared.digest(), &account, screen)?
        } else {
            None
        };
        let mut run = Self {
            request,
            prepared,
            prompt: sample_prompt(prepared)?,
            load: prepared.subject().load_work(),
            session: Session {
                prepared,
                account,
                checkpoints,
                steps_log: directory.steps(),
                has_checkpoint: found.is_some(),
                state: TrainState {
                    recipe: prepared.digest().to_string(),
                    ..found.unwrap_or_default()
                },
            },
            directory,
        };
        if resumed && run.session.state.ended.is_none() {
            run.session.state.ended = run.end_without_room()?;
        }
        Ok(run)
    }

    /// Entries charged after the loop.
    fn ending(&self) -> Vec<(Phase, Work)> {
        self.prompt
            .iter()
            .map(|prompt| (Phase::Eval, prompt.work(&self.prepared.shape)))
            .collect()
    }

    /// The works of a step, an evaluation, a checkpoint and the end of the run.
    fn costs(&self) -> StepCosts<'a> {
        let prepared = self.prepared;
        prepared.subject().step_costs(
            &prepared.shape,
            prepared.trained(),
            &prepared.settings,
            self.ending(),
        )
    }

    /// Why a resumed run ends at its checkpoint: the budget cannot hold loading and everything that
    /// ends a run.
    ///
    /// # Errors
    /// A run in that state without a trained checkpoint.
    fn end_without_room(&self) -> Result<Option<Stop>> {
        let costs = self.costs();
        let mut rest = costs.reserve(Scheduled::default());
        if self.session.state.step == 0 {
            rest.extend(self.ending());
            rest.extend(costs.evaluation().map(|work| (Phase::Eval, work.clone())));
        }
        let Verdict::Stop(limit) = self.session.account.fits(Phase::Load, &self.load, &rest) else {
            return Ok(None);
        };
        if self.session.has_checkpoint && self.session.state.step > 0 {
            return Ok(Some(Stop::Budget(limit)));
        }
        Err(Error::new(Kind::Budget, format!("the {limit} budget of this run has no room left to go on"))
            .at(self.directory.path().display().to_string())
            .value(self.spent_of(limit))
            .rule("loading, the last evaluation and the save must fit; what a run that was cut off had spent is spent")
            .hint("start a new run with a larger budget and another `--out`"))
    }

    /// "1.2 s of 1 s".
    fn spent_of(&self, limit: Limit) -> String {
        let account = &self.session.account;
        let budget = account.budget();
        let spent = budget.amount(limit, &account.spent());
        format!("{spent} of {}", budget.allowed(limit).unwrap_or_default())
    }

    /// The error of a run whose `limit` was not found too small before its first step was due.
    fn too_small(&self, limit: Limit) -> Error {
        let costs = self.costs();
        let mut rest = costs.reserve(self.prepared.settings.scheduled_after(1));
        rest.push((Phase::Train, costs.step(0)));
        let account = &self.session.account;
        let least = account.budget().amount(limit, &account.forecast(&rest));
        Error::new(
            Kind::Budget,
            format!("the {limit} budget cannot hold one step"),
        )
        .at(format!("budget.{limit}"))
        .value(format!(
            "{} spent before the first step",
            self.spent_of(limit)
        ))
        .rule(format!(
            "one step and everything that ends a run must fit: by prediction at least {least} more"
        ))
        .hint("raise the budget and start a new run with another `--out`")
    }

    /// Loads the model, trains it, and writes result and report.
    fn train(mut self, expected_steps: u64, screen: &mut dyn Screen) -> Result<Finished> {
        let started = Instant::now();
        let prepared = self.prepared;
        let load = self.load.clone();
        let assembled = self.session.load_model(Some(&load), || {
            trained_model::assemble(prepared, &self.request.device)
        })?;
        let model = &assembled.model;
        if self.request.resume.is_some() {
            let step = self.session.state.step;
            truncate_after(&self.directory.steps(), step)?;
            screen.note(&format!("resuming after step {step}"));
        }
        // A run interrupted before its first step samples when it is resumed.
        let state = &self.session.state;
        let interrupted = self.request.interrupted.load(Ordering::Relaxed);
        if state.step == 0 && state.sample_before.is_none() && !interrupted {
            self.session.state.sample_before = self.sample(&model.decoder)?;
        }
        let segment = Segment {
            model,
            shape: &prepared.shape,
            settings: &prepared.settings,
            ending: self.ending(),
            expected_steps,
            export: &|dir| trained_model::export(prepared, &assembled, dir, None),
            interrupted: self.request.interrupted,
        };
        let stop = self.session.train(segment, screen)?;
        if let Stop::Budget(limit) = stop
            && self.session.state.step == 0
        {
            self.session.account.close()?;
            return Err(self.too_small(limit));
        }
        let after = if stop.is_regular() {
            self.sample(&model.decoder)?
        } else {
            None
        };
        self.session.account.close()?;
        let wall = Seconds(started.elapsed().as_secs_f64());
        let tokens = Some(self.session.state.tokens);
        let export = |dir: &Path| trained_model::export(prepared, &assembled, dir, tokens);
        let report = self.write_reports(&stop, after, wall, &export)?;
        // Measured baselines need the model's memory.
        drop(assembled);
        self.finish(stop, report, screen)
    }

    /// Writes result and report of a run that was killed after its loop, from its last checkpoint. Computes and charges nothing.
    fn finish_ended(mut self, stop: Stop, screen: &mut dyn Screen) -> Result<Finished> {
        let prepared = self.prepared;
        let step = self.session.state.step;
        screen.note(&format!(
            "the run had ended after step {step}: writing its result and report"
        ));
        truncate_after(&self.directory.steps(), step)?;
        self.session.account.close()?;
        let wall = self.session.account.spent().time;
        let checkpoints = self.session.checkpoints.clone();
        let tokens = Some(self.session.state.tokens);
        let export = |dir: &Path| {
            checkpoints.copy_export(step, dir)?;
            if prepared.whole_model() {
                trained_model::write_model_config(prepared, dir, tokens)?;
            }
            Ok(())
        };
        let report = self.write_reports(&stop, None, wall, &export)?;
        self.finish(stop, report, screen)
    }

    /// One sample, charged as evaluation; `None` without a prompt.
    fn sample(&mut self, decoder: &Decoder) -> Result<Option<String>> {
        let Some(prompt) = &self.prompt else {
            return Ok(None);
        };
        let account = &mut self.session.account;
        account.admit(Phase::Eval, &prompt.work(&self.prepared.shape), &[])?;
        account.begin();
        let (text, work) = prompt.generate(self.prepared, decoder)?;
        account.charge(Phase::Eval, self.session.state.step, &work)?;
        Ok(Some(text))
    }

    fn write_reports(
        &self,
        stop: &Stop,
        after: Option<String>,
        wall: Seconds,
        export: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<FiniteReport> {
        let before = self.session.state.sample_before.clone();
        let texts = before.zip(after).zip(self.prompt.as_ref());
        let ended = Ended {
            session: &self.session,
            stop,
            sample: texts.map(|((before, after), prompt)| Sample {
                prompt: prompt.text.clone(),
                before,
                after,
            }),
            wall,
        };
        write_reports(&ended, &self.directory, export)
    }

    /// Trains the measured baselines of the recipe.
    fn finish(self, stop: Stop, report: FiniteReport, screen: &mut dyn Screen) -> Result<Finished> {
        let account = &self.session.account;
        let context = context(self.request, self.prepared, &self.directory);
        let (report, baselines_interrupted) = train_pending(&context, account, report, screen)?;
        Ok(Finished {
            directory: self.directory,
            report,
            stop,
            baselines_interrupted,
        })
    }
}

/// Opens the ledger with the run's budget; energy spent by an earlier process counts.
fn open_account(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: &RunDirectory,
) -> Result<Account> {
    let meters = prepared.meters.clone();
    let kind = meters.resolve(prepared.recipe.energy.meter)?;
    let path = directory.ledger();
    let resumed = request.resume.is_some();
    let keep = prepared.recipe.train.save_total_limit;
    let checkpoints = Checkpoints::new(directory.checkpoints(), keep);
    let ledger = if resumed && path.exists() {
        Ledger::resume(&path, prepared.digest())?
    } else if resumed && (directory.report().exists() || !checkpoints.steps()?.is_empty()) {
        return Err(Error::new(
            Kind::Run,
            "the ledger of this run is gone: what it has spent is not known",
        )
        .at(path.display().to_string())
        .rule("a run that was begun goes on with what is left of its budget")
        .hint("put the file back, or start a new run with another `--out`"));
    } else {
        // A new run, or one killed before its first entry.
        Ledger::create(&path, prepared.digest())?
    };
    let account =
        Account::new(prepared.budget.clone(), meters, ledger, kind).started_at(prepared.started);
    if resumed && let Some(spent) = checkpoints.newest_spent() {
        account.check_not_less(&spent)?;
    }
    Ok(account)
}

/// State of a resumed run's newest checkpoint.
fn newest_state(
    checkpoints: &Checkpoints,
    digest: &str,
    account: &Account,
    screen: &mut dyn Screen,
) -> Result<Option<TrainState>> {
    let found = checkpoints.newest(digest)?;
    checkpoints.tidy(found.as_ref())?;
    if found.is_none() && account.spent_on(Phase::Train).flops > 0 {
        screen.note(&format!(
            "warning: this run has no checkpoint: it starts again from step 0, and what it spent ({}) stays spent",
            account.spent().energy.joules()
        ));
    }
    Ok(found)
}

fn context<'a>(
    request: &'a TrainRequest<'_>,
    prepared: &'a Prepared,
    directory: &'a RunDirectory,
) -> RunContext<'a> {
    RunContext {
        prepared,
        directory,
        device: &request.device,
        interrupted: request.interrupted,
    }
}

/// Writes the missing pages of a finished run and trains its pending baselines.
fn complete(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: RunDirectory,
    report: FiniteReport,
    screen: &mut dyn Screen,
) -> Result<Finished> {
    let account = open_account(request, prepared, &directory)?;
    if !directory.missing_pages().is_empty() {
        write_pages(
            prepared,
            account.spent().energy.joules(),
            &directory,
            &report,
        )?;
    }
    let stop = report.training.stop_reason.clone();
    let (report, baselines_interrupted) = if pending(&prepared.recipe, &directory).is_some() {
        let context = context(request, prepared, &directory);
        train_pending(&context, &account, report, screen)?
    } else {
        (report, false)
    };
    Ok(Finished {
        directory,
        report,
        stop,
        baselines_interrupted,
    })
}

impl Prepared {
    /// Whether the run's result is a model rather than an adapter.
    pub(super) fn whole_model(&self) -> bool {
        self.target.is_whole_model()
    }
}
