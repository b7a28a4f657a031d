//! A baseline that is trained after the run: its settings, its steps and its energy, counted before it starts.
//!
//! Every weight is trained on the run's batches, from random or from pretrained weights. Energies are compared on the
//! counted meter, so that the same seed gives the same steps on every machine.

use super::subject::{Subject, load_work};
use crate::energy::baseline::BaselineKind;
use crate::energy::{Budget, Limits, Spent};
use crate::model::ModelShape;
use crate::recipe::{Compared, Recipe};
use crate::train::{Schedule, Settings, StepCosts, TrainState, forecast, unseen};
use crate::units::{Joules, MicroJoules};
use crate::work::Work;

/// Evaluations before equal energy, at least: fewer give no curve.
const MIN_EVALUATIONS: u64 = 8;
/// Evaluations after equal energy, at most.
const MAX_FURTHER_EVALUATIONS: u64 = 100;

/// The baselines that `recipe` wants measured, in training order.
pub fn measured_kinds(recipe: &Recipe) -> impl Iterator<Item = BaselineKind> + '_ {
    let settings = &recipe.baseline;
    let all = [
        (BaselineKind::FullFineTuning, settings.full_fine_tuning),
        (BaselineKind::FromScratchSameTask, settings.from_scratch),
    ];
    all.into_iter()
        .filter(|(_, how)| *how == Compared::Measured)
        .map(|(kind, _)| kind)
}

/// How one measured baseline is trained.
pub struct BaselineSetup<'a> {
    subject: Subject<'a>,
    /// From pretrained or from random weights.
    pub kind: BaselineKind,
    /// With every weight trained.
    pub shape: ModelShape,
    trained: usize,
}

impl<'a> BaselineSetup<'a> {
    /// The baseline `kind` of the run `subject`.
    pub fn new(subject: Subject<'a>, kind: BaselineKind) -> Self {
        let shape = ModelShape::fully_trained(subject.architecture, subject.precision());
        let trained = subject.architecture.parameters() as usize;
        Self {
            subject,
            kind,
            shape,
            trained,
        }
    }

    /// Names the baseline in its checkpoints.
    pub fn digest(&self) -> String {
        format!("{} {:?}", self.subject.digest, self.kind)
    }

    /// Peak learning rate.
    pub fn learning_rate(&self) -> f64 {
        let recipe = self.subject.recipe;
        recipe
            .baseline
            .learning_rate
            .unwrap_or(recipe.train.learning_rate)
    }

    /// Steps between evaluations of a baseline of `steps` steps that reaches equal energy after `equal`: the run's, but
    /// at least `MIN_EVALUATIONS` up to equal energy and about `MAX_FURTHER_EVALUATIONS` after it.
    pub fn eval_every(&self, steps: u64, equal: u64) -> u64 {
        let for_curve = equal.div_ceil(MIN_EVALUATIONS).max(1);
        let every = match self.subject.settings.eval_every {
            0 => for_curve,
            of_run => of_run.min(for_curve),
        };
        if steps > equal {
            every.max(steps.div_ceil(MAX_FURTHER_EVALUATIONS))
        } else {
            every
        }
    }

    /// The run's settings with a schedule over `steps` steps and the same share of warm-up.
    pub fn settings(&self, steps: u64, equal: u64) -> Settings {
        let of_run = self.subject.settings;
        let warmup = of_run.schedule.warmup_steps as f64 / of_run.schedule.steps.max(1) as f64;
        Settings {
            steps,
            by_epochs: false,
            schedule: Schedule {
                peak: self.learning_rate(),
                steps,
                warmup_steps: (warmup * steps as f64).ceil() as u64,
                ..of_run.schedule
            },
            eval_every: self.eval_every(steps, equal),
            save_every: 0,
            keep_best: false,
            dropout: 0.0,
            recipe: self.digest(),
            ..of_run.clone()
        }
    }

    fn costs<'s>(&'s self, settings: &'s Settings) -> StepCosts<'s> {
        self.subject
            .step_costs(&self.shape, self.trained, settings, Vec::new())
    }

    /// Steps whose counted energy is at most `training`, and at most `energy_multiple` times as much.
    pub fn steps(&self, training: MicroJoules) -> [u64; 2] {
        let settings = self.settings(1, 1);
        let costs = self.costs(&settings);
        let mut charges = costs.charges(self.subject.profile);
        let most = (training.joules() * self.subject.recipe.baseline.energy_multiple)
            .rounded()
            .max(training);
        let mut spent = MicroJoules::ZERO;
        let mut step = 0;
        let mut equal = 0;
        loop {
            spent += charges.charge(step).energy;
            if spent > most {
                return [equal, step];
            }
            step += 1;
            if spent <= training {
                equal = step;
            }
        }
    }

    /// Counted energy of the steps from `from` to `to`, their evaluations and the checkpoint; from 0 with loading and
    /// the first evaluation.
    pub fn energy(&self, from: u64, to: u64, equal: u64) -> MicroJoules {
        let settings = self.settings(to, equal);
        let costs = self.costs(&settings);
        let profile = self.subject.profile;
        let Ok(unlimited) = Budget::new(Limits::default(), self.subject.budget.rates().clone())
        else {
            return MicroJoules::ZERO;
        };
        let standing = TrainState {
            step: from,
            ..TrainState::default()
        };
        let run = forecast(
            &costs,
            &settings,
            profile,
            &unlimited,
            Spent::default(),
            &standing,
            &mut unseen,
        );
        let load = self.load();
        let before: MicroJoules = load
            .iter()
            .chain(costs.evaluation())
            .filter(|_| from == 0)
            .map(|work| profile.charge(work).energy)
            .sum();
        before + run.total().energy
    }

    /// Expected energy of all phases: up to equal energy, and at most.
    pub fn expected(&self, training: MicroJoules) -> [Joules; 2] {
        let [equal, most] = self.steps(training);
        let first = self.energy(0, equal, equal);
        let second = if most > equal {
            self.energy(equal, most, equal)
        } else {
            MicroJoules::ZERO
        };
        [first.joules(), (first + second).joules()]
    }

    /// Work of loading pretrained weights; random ones are drawn at no cost.
    pub fn load(&self) -> Option<Work> {
        let loads = self.kind == BaselineKind::FullFineTuning;
        loads.then(|| load_work(self.subject.architecture, self.subject.precision()))
    }
}
