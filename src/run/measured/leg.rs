//! A stretch of a baseline's training: what it costs, and the loop over it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::NOTHING;
use crate::energy::{Account, Budget, Limits};
use crate::error::Result;
use crate::model::ModelShape;
use crate::report::types::BaselineKind;
use crate::run::Screen;
use crate::run::prepare::Prepared;
use crate::run::trainee::{Trainee, load_work};
use crate::run::watch::Watch;
use crate::train::{
    self, Checkpoints, Observer, Outcome, Schedule, Settings, StepCosts, StepRecord, TrainState,
    Trainer, forecast,
};
use crate::units::MicroJoules;
use crate::work::Work;

/// Evaluations on the way to equal energy, at least: fewer would make no curve.
const EVALUATIONS: u64 = 8;
/// Evaluations beyond equal energy, at most.
const FURTHER_EVALUATIONS: u64 = 100;

/// What a baseline trains: every weight of the run's model, on the run's batches.
pub(super) struct Field<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) kind: BaselineKind,
    shape: ModelShape,
    trained: usize,
}

impl<'a> Field<'a> {
    pub(super) fn new(prepared: &'a Prepared, kind: BaselineKind) -> Result<Self> {
        let shape = ModelShape::fully_trained(&prepared.architecture, prepared.recipe.model.dtype)?;
        Ok(Self {
            prepared,
            kind,
            shape,
            trained: prepared.architecture.parameters() as usize,
        })
    }

    /// Names the baseline in its checkpoints.
    pub(super) fn name(&self) -> String {
        format!("{} {:?}", self.prepared.digest(), self.kind)
    }

    pub(super) fn learning_rate(&self) -> f64 {
        self.prepared
            .recipe
            .baseline
            .learning_rate
            .unwrap_or(self.prepared.recipe.train.learning_rate)
    }

    /// How often a baseline of `steps` steps, of which `equal` are those to equal energy, is evaluated: as the run, but often enough for a
    /// curve, and not so often that a long way costs more in evaluations than in steps.
    pub(super) fn eval_every(&self, steps: u64, equal: u64) -> u64 {
        let often = equal.div_ceil(EVALUATIONS).max(1);
        let own = self.prepared.settings.eval_every;
        let every = if own > 0 { own.min(often) } else { often };
        if steps > equal {
            every.max(steps.div_ceil(FURTHER_EVALUATIONS))
        } else {
            every
        }
    }

    /// The run's settings for a schedule over `steps` steps, of which `equal` are those to equal energy. The rise of the rate takes the same
    /// share as in the run.
    fn settings(&self, steps: u64, equal: u64) -> Settings {
        let own = &self.prepared.settings;
        let rise = own.schedule.warmup_steps as f64 / own.schedule.steps.max(1) as f64;
        let warmup_steps = (rise * steps as f64).ceil() as u64;
        Settings {
            steps,
            by_epochs: false,
            schedule: Schedule {
                peak: self.learning_rate(),
                steps,
                warmup_steps,
                ..own.schedule
            },
            eval_every: self.eval_every(steps, equal),
            save_every: 0,
            keep_best: false,
            dropout: 0.0,
            recipe: self.name(),
            ..own.clone()
        }
    }

    fn costs<'s>(&'s self, settings: &'s Settings) -> StepCosts<'s> {
        let prepared = self.prepared;
        StepCosts::new(
            &self.shape,
            &prepared.sampler,
            &prepared.validation_batches,
            self.trained,
            settings,
            Vec::new(),
        )
    }

    /// Steps whose counted energy is at most `training`, and at most `energy_multiple` times as much.
    pub(super) fn steps(&self, training: MicroJoules) -> [u64; 2] {
        let settings = self.settings(1, 1);
        let costs = self.costs(&settings);
        let most = (training.joules() * self.prepared.recipe.baseline.energy_multiple)
            .rounded()
            .max(training);
        let (mut spent, mut step, mut equal) = (MicroJoules::ZERO, 0, 0);
        loop {
            spent += self.prepared.profile.charge(&costs.step(step)).energy;
            if spent > most {
                return [equal, step];
            }
            step += 1;
            if spent <= training {
                equal = step;
            }
        }
    }

    /// Counted energy of the steps from `from` to `to`, with their evaluations and the checkpoint, and of all that comes before the first.
    pub(super) fn forecast(&self, from: u64, to: u64, equal: u64) -> MicroJoules {
        let settings = self.settings(to, equal);
        let costs = self.costs(&settings);
        let (profile, rates) = (&self.prepared.profile, self.prepared.budget.rates().clone());
        let Ok(unlimited) = Budget::new(Limits::default(), rates) else {
            return MicroJoules::ZERO;
        };
        let standing = TrainState {
            step: from,
            ..TrainState::default()
        };
        let run = forecast(&costs, &settings, profile, &unlimited, NOTHING, &standing);
        let load = self.load();
        let before = load
            .iter()
            .chain(costs.evaluation())
            .filter(|_| from == 0)
            .map(|work| profile.charge(work).energy);
        let before: MicroJoules = before.sum();
        before + run.total().energy
    }

    /// Loading the weights that it begins with; random ones are drawn at no cost.
    pub(super) fn load(&self) -> Option<Work> {
        let loads = self.kind == BaselineKind::FullFineTuning;
        loads.then(|| {
            load_work(
                &self.prepared.architecture,
                self.prepared.recipe.model.dtype,
            )
        })
    }
}

/// One call of the training loop.
pub(super) struct Leg<'a> {
    pub(super) field: &'a Field<'a>,
    pub(super) trainee: &'a Trainee,
    /// Steps to equal energy, and at which the schedule ends.
    pub(super) steps: [u64; 2],
    /// Stops at the first evaluation at or below this loss.
    pub(super) target: Option<f64>,
}

impl Leg<'_> {
    /// Trains from `standing`; `asked` is the person's flag, `stop` our own.
    pub(super) fn run(
        &self,
        standing: TrainState,
        account: &mut Account,
        checkpoints: &Checkpoints,
        folder: &Path,
        [asked, stop]: [&AtomicBool; 2],
        screen: &mut dyn Screen,
    ) -> Result<Outcome> {
        let [equal, steps] = self.steps;
        let settings = self.field.settings(steps, equal);
        let watch = Watch::new(
            folder.join(crate::report::files::STEPS_JSONL),
            screen,
            steps,
            steps,
        )?;
        let mut observer = Racer {
            watch,
            target: self.target,
            asked,
            stop,
        };
        let prepared = self.field.prepared;
        let mut trainer = Trainer {
            decoder: &self.trainee.decoder,
            parameters: &self.trainee.parameters,
            shape: &self.field.shape,
            sampler: &prepared.sampler,
            validation: &prepared.validation_batches,
            settings: &settings,
            account,
            checkpoints,
            export: &|_| Ok(()),
            interrupted: stop,
            ending: Vec::new(),
        };
        let outcome = train::train(&mut trainer, standing, &mut observer)?;
        observer.watch.flush()?;
        Ok(outcome)
    }
}

/// Watches a leg, and stops it where the person or the loss says so.
struct Racer<'a> {
    watch: Watch<'a>,
    target: Option<f64>,
    asked: &'a AtomicBool,
    stop: &'a AtomicBool,
}

impl Observer for Racer<'_> {
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.watch.step(record, account)
    }

    fn evaluating(&mut self, done: usize, of: usize) {
        self.watch.evaluating(done, of);
    }

    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()> {
        if self.target.is_some_and(|target| val_loss <= target) {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.watch.evaluated(step, val_loss)
    }

    fn saving(&mut self) -> Result<()> {
        self.watch.saving()
    }
}
