//! A training run from recipe to report, in its directory.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::Device;

use super::directory::RunDirectory;
use super::model::fetch_weights;
use super::options::meter;
use super::prepare::{Prepared, Target, prepare};
use super::reporting::{Inputs, write_reports};
use super::sample::{SamplePrompt, sample_prompt};
use super::trainee::{self, Trainee};
use super::{Screen, StepView, plan};
use crate::energy::meter::Computing;
use crate::energy::{Account, Ledger, Meters, Phase, Verdict};
use crate::error::{Error, Kind, Result};
use crate::recipe::{self, Init, Recipe};
use crate::report::{Report, StepEnergy, StepLog, StepRecord as StepLine, steps::truncate_after};
use crate::train::{self, Checkpoints, Job, Observer, Outcome, Standing, StepRecord, Stop};
use crate::units::{Joules, Seconds};
use crate::work::Work;

/// What `train` is asked to do.
pub struct TrainRequest<'a> {
    /// The recipe; a resumed run has its own.
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
    pub report: Report,
    /// Why it ended.
    pub stop: Stop,
}

impl Finished {
    /// Where the adapter (or the whole model) is.
    pub fn result(&self) -> PathBuf {
        self.directory.result(self.report.adapter.r#type == crate::report::types::AdapterType::None)
    }
}

/// Trains, and writes the report whatever ended the run.
pub fn train(request: TrainRequest<'_>, screen: &mut dyn Screen) -> Result<Finished> {
    let recipe = the_recipe(&request)?;
    let mut prepared = prepare(recipe, &request.device, request.computing, screen.downloads())?;
    prepared.warnings.iter().for_each(|warning| screen.note(&format!("warning: {warning}")));
    let forecast = plan::plan(&prepared, request.computing)?;
    if prepared.recipe.model.init == Init::Pretrained {
        let id = prepared.recipe.model.id.clone();
        fetch_weights(&id, &mut prepared.files, screen.downloads())?;
    }
    let directory = match request.resume {
        Some(run) => RunDirectory::open(run)?,
        None => {
            if forecast.steps == 0 {
                return Err(forecast.refusal());
            }
            let directory = RunDirectory::create(&request.out)?;
            crate::report::files::write_whole(&directory.recipe(), &prepared.recipe.to_toml())?;
            crate::report::files::write_whole(&directory.plan(), &forecast.to_json_text()?)?;
            directory
        }
    };
    run_in(&request, &prepared, directory, forecast.steps, screen).map_err(Error::while_running)
}

/// The recipe asked for; a resumed run's own, which a given one must equal.
fn the_recipe(request: &TrainRequest<'_>) -> Result<Recipe> {
    let Some(run) = request.resume else {
        return request.recipe.clone().ok_or_else(|| Error::new(Kind::Usage, "no recipe was given").hint("wattune train RECIPE"));
    };
    recipe::load(&RunDirectory::open(run)?.recipe(), &[])
}

/// Meters and ledger opened; what an earlier process spent is spent.
fn open_account(request: &TrainRequest<'_>, prepared: &Prepared, directory: &RunDirectory) -> Result<Account> {
    let meters = Meters::open(prepared.profile.clone(), request.computing);
    let kind = meters.resolve(meter(prepared.recipe.energy.meter))?;
    let ledger = match request.resume {
        Some(_) => Ledger::resume(&directory.ledger())?,
        None => Ledger::create(&directory.ledger())?,
    };
    Ok(Account::new(prepared.budget.clone(), meters, ledger, kind))
}

fn run_in(
    request: &TrainRequest<'_>,
    prepared: &Prepared,
    directory: RunDirectory,
    expected_steps: u64,
    screen: &mut dyn Screen,
) -> Result<Finished> {
    let mut account = open_account(request, prepared, &directory)?;
    let started = std::time::Instant::now();
    let load = trainee::load_work(&prepared.architecture, prepared.recipe.model.dtype);
    if let (Verdict::Stop(limit), Some(_)) = (account.admit(Phase::Load, &load, &[])?, request.resume) {
        return Err(Error::new(Kind::Budget, format!("nothing is left of the {} budget of this run", limit.as_str()))
            .hint("its report and last checkpoint are in the run directory"));
    }
    account.begin();
    let Trainee { decoder, parameters } = trainee::assemble(prepared, &request.device)?;
    let checkpoints = Checkpoints::new(directory.checkpoints(), prepared.recipe.train.save_total_limit);
    let standing = match request.resume {
        Some(_) => checkpoints.restore(&parameters, prepared.digest())?.unwrap_or_default(),
        None => Standing::default(),
    };
    let standing = Standing { recipe: prepared.digest().to_string(), ..standing };
    account.charge(Phase::Load, standing.step, &load)?;
    if request.resume.is_some() {
        truncate_after(&directory.steps(), standing.step)?;
        screen.note(&format!("resuming after step {}", standing.step));
    }
    let prompt = sample_prompt(prepared)?;
    let before = sample(prepared, &decoder, prompt.as_ref(), &mut account, standing.step)?;
    let ending: Vec<(Phase, Work)> = prompt.iter().map(|prompt| (Phase::Eval, prompt.work(&prepared.shape))).collect();
    let outcome = {
        let export = |dir: &Path| trainee::export(prepared, &parameters, dir, None);
        let mut observer = Watch::new(&directory, screen, prepared.settings.steps, expected_steps)?;
        let mut job = Job {
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
        let outcome = train::train(&mut job, standing, &mut observer)?;
        observer.flush()?;
        outcome
    };
    let after = match outcome.stop {
        Stop::Diverged(_) => None,
        _ => sample(prepared, &decoder, prompt.as_ref(), &mut account, outcome.standing.step)?,
    };
    account.close()?;
    let inputs = Inputs {
        prepared,
        outcome: &outcome,
        account: &account,
        checkpoints: &checkpoints,
        sample: prompt.map(|prompt| prompt.text).zip(before).zip(after),
        wall: Seconds(started.elapsed().as_secs_f64()),
    };
    let report = write_reports(&inputs, &directory, &parameters)?;
    let Outcome { stop, .. } = outcome;
    Ok(Finished { directory, report, stop })
}

/// One sample, charged as evaluation; `None` where there is no prompt.
fn sample(
    prepared: &Prepared,
    decoder: &crate::model::Decoder,
    prompt: Option<&SamplePrompt>,
    account: &mut Account,
    step: u64,
) -> Result<Option<String>> {
    let Some(prompt) = prompt else { return Ok(None) };
    account.admit(Phase::Eval, &prompt.work(&prepared.shape), &[])?;
    account.begin();
    let (text, work) = prompt.generate(prepared, decoder)?;
    account.charge(Phase::Eval, step, &work)?;
    Ok(Some(text))
}

/// Writes steps.jsonl and tells the screen. A step's line waits for the validation loss that may follow it.
struct Watch<'a> {
    log: StepLog,
    pending: Option<StepLine>,
    screen: &'a mut dyn Screen,
    view: StepView,
}

impl<'a> Watch<'a> {
    fn new(directory: &RunDirectory, screen: &'a mut dyn Screen, steps: u64, expected_steps: u64) -> Result<Self> {
        let log = StepLog::append_to(&directory.steps())?;
        let view = StepView { steps, expected_steps, spent: Joules::ZERO, budget: None, tokens: 0, train_wall: Seconds::ZERO };
        Ok(Self { log, pending: None, screen, view })
    }

    fn flush(&mut self) -> Result<()> {
        match self.pending.take() {
            Some(line) => self.log.write(&line),
            None => Ok(()),
        }
    }
}

impl Observer for Watch<'_> {
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()> {
        self.flush()?;
        self.view.spent = account.spent().energy.joules();
        self.view.budget = account.largest_fraction().map(|(limit, part)| (limit.as_str(), part));
        self.view.tokens += record.tokens;
        self.view.train_wall += record.reading.wall;
        self.screen.step(record, &self.view);
        let energies = record.reading.energies();
        self.pending = Some(StepLine {
            step: record.step,
            loss: Some(record.loss),
            lr: record.lr,
            grad_norm: Some(record.grad_norm),
            tokens: record.tokens,
            loss_tokens: record.loss_tokens,
            flops: record.reading.charge.flops,
            energy_j: StepEnergy {
                counted: energies.counted.joules(),
                measured: energies.measured.map(|energy| energy.joules()),
                timed: Some(energies.timed.joules()),
            },
            wall_s: record.reading.wall,
            val_loss: None,
        });
        Ok(())
    }

    fn evaluating(&mut self, done: usize, of: usize) {
        self.screen.evaluating(done, of);
    }

    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()> {
        self.screen.evaluated(step, val_loss);
        if let Some(line) = &mut self.pending {
            line.val_loss = Some(val_loss);
        }
        self.flush()
    }

    fn saved(&mut self, _: u64, _: &Path) {}
}

impl Prepared {
    /// Whether the run's result is a whole model rather than an adapter.
    pub(super) fn whole_model(&self) -> bool {
        matches!(self.target, Target::All)
    }
}
