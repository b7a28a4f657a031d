//! Baselines that are trained: the same architecture from random weights, or every weight of the pretrained model, on the same data for
//! the energy that the run's training took.
//!
//! Takes a finished run and trains the baselines it asked for, each in a folder of its own with its own ledger: nothing of it is part of
//! the run's energy or budget. Energies are held equal on the counted meter, so that the same seed gives the same steps everywhere. A
//! baseline first does a whole run (the recipe's schedule from its rise to its end) for the run's training energy: the loss at equal energy. Is
//! that loss still above the run's, it goes on from there with the same schedule stretched over `energy_multiple` times the energy, until an
//! evaluation is at or below the run's loss: the energy to equal loss.

mod curve;
mod leg;

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

pub(super) use self::curve::of_steps;
use self::curve::{Curve, to_equal_loss};
use self::leg::{Field, Leg};
use super::Screen;
use super::directory::RunDirectory;
use super::options::meter;
use super::prepare::Prepared;
use super::spending::{bounds, carbon_block, interval};
use super::trainee::{Trainee, fully_trained, load_work};
use crate::energy::ledger::Totals;
use crate::energy::meter::Computing;
use crate::energy::{Account, Budget, Ledger, Limits, MeterKind, Meters, Phase, Spent};
use crate::error::{Error, Result};
use crate::model::Weights;
use crate::recipe::{Compared, Recipe};
use crate::report::measured::{BaselineStop, MeasuredBaseline};
use crate::report::types::{self, BaselineKind, Label};
use crate::train::{Checkpoints, Standing, Stop};
use crate::units::{Flops, Joules, MicroJoules};

/// The baselines that `recipe` wants trained, in the order in which they are.
pub(super) fn asked(recipe: &Recipe) -> impl Iterator<Item = BaselineKind> + '_ {
    let wanted = [
        (BaselineKind::FullFineTuning, recipe.baseline.full_fine_tuning),
        (BaselineKind::FromScratchSameTask, recipe.baseline.from_scratch),
    ];
    wanted.into_iter().filter(|(_, how)| *how == Compared::Measured).map(|(kind, _)| kind)
}

/// The finished run that baselines are held against.
pub(super) struct Finish {
    /// Its training on each meter.
    pub(super) training: Totals,
    /// Its validation loss, nats per loss token.
    pub(super) val_loss: f64,
    /// All that it spent, on the meter that decides.
    pub(super) energy: Joules,
}

/// Where and with what baselines are trained.
pub(super) struct Place<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) directory: &'a RunDirectory,
    pub(super) device: &'a Device,
    pub(super) computing: Computing,
    /// Set when the person asks to stop.
    pub(super) interrupted: &'a AtomicBool,
}

/// What a baseline is expected to spend, all phases: for its equal-energy run, and at most.
pub(super) fn expected(prepared: &Prepared, kind: BaselineKind, training: MicroJoules) -> Result<(Joules, Joules)> {
    let field = Field::new(prepared, kind)?;
    let [equal, most] = field.steps(training);
    let first = field.forecast(0, equal, equal);
    let second = if most > equal { field.forecast(equal, most, equal) } else { MicroJoules::ZERO };
    Ok((first.joules(), (first + second).joules()))
}

/// Trains every baseline asked for. Returns what is to be added to the report, a warning for each that could not be trained, and whether the
/// person stopped it: what was reached by then is in the report too.
pub(super) fn measure(
    place: &Place<'_>,
    finish: &Finish,
    screen: &mut dyn Screen,
) -> Result<(Vec<types::Baseline>, Vec<String>, bool)> {
    let (mut blocks, mut warnings, mut spent) = (Vec::new(), Vec::new(), Joules::ZERO);
    for kind in asked(&place.prepared.recipe) {
        let limit = place.prepared.recipe.baseline.budget.map(|budget| budget - spent);
        match Trial::begin(place, kind, finish, limit)? {
            Err(why) => warnings.push(format!("the {} baseline was not trained: {why}", words(kind))),
            Ok(trial) => {
                screen.note(&trial.announcement());
                let block = trial.run(screen)?;
                spent += block.energy_j.unwrap_or_default();
                blocks.push(block);
            }
        }
        if place.interrupted.load(Ordering::Relaxed) {
            return Ok((blocks, warnings, true));
        }
    }
    Ok((blocks, warnings, false))
}

fn words(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full fine-tuning",
        BaselineKind::FromScratchSameTask => "from-scratch",
        BaselineKind::Pretraining => "pretraining",
    }
}

/// One baseline in training.
struct Trial<'a> {
    place: &'a Place<'a>,
    field: Field<'a>,
    finish: &'a Finish,
    account: Account,
    checkpoints: Checkpoints,
    folder: std::path::PathBuf,
    /// Steps for the run's training energy, and for `energy_multiple` times as much.
    steps: [u64; 2],
}

impl<'a> Trial<'a> {
    /// Opens its folder and ledger; the inner error says why it cannot be trained.
    fn begin(
        place: &'a Place<'a>,
        kind: BaselineKind,
        finish: &'a Finish,
        limit: Option<Joules>,
    ) -> Result<std::result::Result<Self, String>> {
        let prepared = place.prepared;
        let field = Field::new(prepared, kind)?;
        let steps = field.steps(finish.training.energy_j.counted);
        if steps[0] == 0 {
            return Ok(Err("one of its steps takes more energy than all the training of the run".into()));
        }
        let least = field.forecast(0, 1, steps[0]).joules();
        if let Some(limit) = limit.filter(|limit| *limit < least) {
            let left = limit.max(Joules::ZERO);
            return Ok(Err(format!("`baseline.budget` leaves {left}, and one step with its evaluations takes {least}")));
        }
        let folder =
            place.directory.baseline(if kind == BaselineKind::FullFineTuning { "full_fine_tuning" } else { "from_scratch" });
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let budget = Budget::new(Limits { energy: limit, ..Limits::default() }, prepared.budget.rates().clone())?;
        let meters = Meters::open(prepared.profile.clone(), place.computing);
        let meter = meters.resolve(meter(prepared.recipe.energy.meter))?;
        let account = Account::new(budget, meters, Ledger::create(&folder.join("ledger.jsonl"))?, meter);
        let checkpoints = Checkpoints::new(folder.join("checkpoints"), 1);
        Ok(Ok(Self { place, field, finish, account, checkpoints, folder, steps }))
    }

    fn announcement(&self) -> String {
        let [equal, most] = self.steps;
        let further = if most > equal { format!(", then up to step {most} to the run's loss") } else { String::new() };
        let plural = if equal == 1 { "step" } else { "steps" };
        let energy = self.finish.training.energy_j.counted.joules();
        format!(
            "measuring the {} baseline: {equal} {plural} for the run's training energy of {energy} (counted){further}",
            words(self.field.kind)
        )
    }

    fn run(mut self, screen: &mut dyn Screen) -> Result<types::Baseline> {
        let trainee = self.assemble()?;
        let mut curve = Curve::default();
        let start = Standing { recipe: self.field.name(), ..Standing::default() };
        let [equal, most] = self.steps;
        let mut outcome = self.leg(&trainee, start, [equal, equal], false, &mut curve, screen)?;
        let at_equal = outcome.standing.val_loss_last.filter(|last| last.step == equal).map(|last| last.val_loss);
        if outcome.stop == Stop::Steps && at_equal.is_some_and(|loss| loss > self.finish.val_loss) && most > equal {
            outcome = self.leg(&trainee, outcome.standing, [equal, most], true, &mut curve, screen)?;
        }
        self.account.close()?;
        // The checkpoints served a crash; a baseline has no result but its figures.
        let _ = std::fs::remove_dir_all(self.folder.join("checkpoints"));
        self.block(&outcome.stop, outcome.standing.step, at_equal, curve)
    }

    fn leg(
        &mut self,
        trainee: &Trainee,
        standing: Standing,
        steps: [u64; 2],
        stop_at_loss: bool,
        curve: &mut Curve,
        screen: &mut dyn Screen,
    ) -> Result<crate::train::Outcome> {
        let stop = AtomicBool::new(false);
        let leg = Leg { field: &self.field, trainee, steps, target: stop_at_loss.then_some(self.finish.val_loss) };
        leg.run(standing, &mut self.account, &self.checkpoints, &self.folder, curve, [self.place.interrupted, &stop], screen)
    }

    /// Random weights, or the pretrained ones, which are loaded at their cost.
    fn assemble(&mut self) -> Result<Trainee> {
        let prepared = self.place.prepared;
        if self.field.kind == BaselineKind::FromScratchSameTask {
            return fully_trained(prepared, None, self.place.device);
        }
        let load = load_work(&prepared.architecture, prepared.recipe.model.dtype);
        self.account.admit(Phase::Load, &load, &[])?;
        self.account.begin();
        let weights = Weights::open(prepared.files.require_weights()?, &prepared.architecture)?;
        let trainee = fully_trained(prepared, Some(&weights), self.place.device)?;
        self.account.charge(Phase::Load, 0, &load)?;
        Ok(trainee)
    }

    fn block(&self, stop: &Stop, steps: u64, at_equal: Option<f64>, curve: Curve) -> Result<types::Baseline> {
        let (kind, spent) = (self.account.kind(), self.account.spent());
        let energy = spent.energy.joules();
        let within = interval(kind, energy);
        let ((low_j, high_j), carbon) = (bounds(within), carbon_block(self.place.prepared, within, spent.time));
        let trained = self.account.spent_on(Phase::Train).energy.joules();
        let run_training = self.finish.training.on(kind).joules();
        let equal = to_equal_loss(&curve, self.finish.val_loss, trained, run_training);
        let stop_reason = match stop {
            Stop::Interrupted if self.place.interrupted.load(Ordering::Relaxed) => BaselineStop::Interrupted,
            // Our own flag: the run's loss was reached.
            Stop::Interrupted => BaselineStop::EqualLoss,
            Stop::Budget(_) => BaselineStop::Budget,
            Stop::Diverged(_) => BaselineStop::Diverged,
            Stop::Steps | Stop::Epochs if steps == self.steps[0] => BaselineStop::EqualEnergy,
            Stop::Steps | Stop::Epochs => BaselineStop::EnergyMultiple,
        };
        Ok(types::Baseline {
            kind: self.field.kind,
            label: Label::Measured,
            flops: Some(Flops(spent.flops as f64)),
            energy_j: Some(energy),
            gco2e: Some(carbon.gco2e),
            ratio: Some(energy / self.finish.energy).filter(|ratio| ratio.is_finite()),
            low_j,
            high_j,
            low_gco2e: carbon.low_gco2e,
            high_gco2e: carbon.high_gco2e,
            // Where it stopped was chosen: its ratio is no estimate that could be off.
            low_ratio: None,
            high_ratio: None,
            source: format!("trained here: {steps} steps, every weight, {}", start_words(self.field.kind)),
            assumptions: self.assumptions(kind),
            val_loss_at_equal_energy: at_equal,
            energy_to_equal_loss_j: equal.energy_j,
            measured: Some(MeasuredBaseline {
                steps,
                steps_at_equal_energy: self.steps[0],
                stop_reason,
                learning_rate: self.field.learning_rate(),
                run_training_j: run_training,
                training_j: trained,
                run_val_loss: self.finish.val_loss,
                equal_loss: equal,
                curve: curve.thinned(),
            }),
        })
    }

    fn assumptions(&self, kind: MeterKind) -> Vec<String> {
        let recipe = &self.place.prepared.recipe;
        let rate = if recipe.baseline.learning_rate.is_some() { "`baseline.learning_rate`" } else { "the run's own" };
        let mut all = vec![
            format!(
                "the same records in the same order, batches, optimizer and seed; peak learning rate {} ({rate})",
                self.field.learning_rate()
            ),
            format!(
                "as much training energy as the run, on the counted meter; evaluated every {} steps",
                self.field.eval_every(self.steps[0], self.steps[0])
            ),
            "one run with one seed".to_string(),
        ];
        if self.steps[1] > self.steps[0] {
            let multiple = recipe.baseline.energy_multiple;
            all.push(format!(
                "beyond equal energy the schedule begins again, stretched over {multiple} times the energy, and ends there"
            ));
        }
        if kind != MeterKind::Counted {
            all.push("its joules are read on the meter of the run, which may differ from the counted one".to_string());
        }
        all
    }
}

fn start_words(kind: BaselineKind) -> &'static str {
    if kind == BaselineKind::FullFineTuning { "from the pretrained weights" } else { "from random weights" }
}

/// What an account that has spent nothing has spent.
const NOTHING: Spent = Spent { energy: MicroJoules::ZERO, flops: 0, time: crate::units::Seconds::ZERO };
