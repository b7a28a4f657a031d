//! The work of a run; before it starts, the step at which the budget will stop it; while it runs,
//! its progress.

use super::step_charges::{ChargeSum, ChargedStep, StepCharges};
use super::{Settings, Stop, TrainState, checkpoint_bytes};
use crate::data::{BatchShape, MicroBatch, Sampler};
use crate::energy::{Account, Allowance, Budget, Charge, Phase, Profile, Spent};
use crate::model::ModelShape;
use crate::ops::adamw_cost;
use crate::work::Work;

/// The activities scheduled after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scheduled {
    /// An evaluation.
    pub evaluation: bool,
    /// A checkpoint.
    pub save: bool,
}

impl Settings {
    /// The activities scheduled after `step` completed steps. The evaluation and checkpoint at the
    /// end of the run are not among them.
    pub fn scheduled_after(&self, step: u64) -> Scheduled {
        let every = |n: u64| n > 0 && step.is_multiple_of(n) && step < self.steps;
        let evaluation = every(self.eval_every);
        Scheduled {
            evaluation,
            save: every(self.save_every) || (evaluation && self.keep_best),
        }
    }
}

/// The work of each activity of a run: step, evaluation, checkpoint and the caller's work after the
/// loop.
pub struct StepCosts<'a> {
    pub(super) shape: &'a ModelShape,
    pub(super) sampler: &'a Sampler,
    pub(super) settings: &'a Settings,
    pub(super) trained: usize,
    evaluation: Option<Work>,
    save: Work,
    /// Work of the caller after the loop, within the same budget.
    ending: Vec<(Phase, Work)>,
}

impl<'a> StepCosts<'a> {
    /// The costs of a run that trains `trained` parameters and evaluates on `validation`.
    pub fn new(
        shape: &'a ModelShape,
        sampler: &'a Sampler,
        validation: &[MicroBatch],
        trained: usize,
        settings: &'a Settings,
        ending: Vec<(Phase, Work)>,
    ) -> Self {
        let batch = |batch: &MicroBatch| {
            let shape_of_batch = batch.shape();
            shape.evaluation(&shape_of_batch.segments, shape_of_batch.loss_tokens)
        };
        let evaluation = (!validation.is_empty()).then(|| validation.iter().map(batch).sum());
        Self {
            shape,
            sampler,
            settings,
            trained,
            evaluation,
            save: Work::file(checkpoint_bytes(trained)),
            ending,
        }
    }

    /// Whether the run evaluates.
    pub fn has_validation(&self) -> bool {
        self.evaluation.is_some()
    }

    /// Work of one evaluation.
    pub fn evaluation(&self) -> Option<&Work> {
        self.evaluation.as_ref()
    }

    /// Work of a checkpoint: one pass over its bytes.
    pub fn save(&self) -> &Work {
        &self.save
    }

    /// Work of step `step`, counted from 0: its micro-batches and the optimizer.
    pub fn step(&self, step: u64) -> Work {
        let recompute = self.settings.recompute;
        let training = |batch: BatchShape| {
            self.shape
                .training(&batch.segments, batch.loss_tokens, recompute)
        };
        let batches = self.sampler.step_shape(step).into_iter();
        batches.map(training).sum::<Work>() + adamw_cost(self.trained)
    }

    /// The charges of many steps on `profile`.
    pub fn charges<'s>(&'s self, profile: &'s Profile) -> StepCharges<'s> {
        StepCharges::new(self, profile)
    }

    /// Work to reserve before a step is admitted: the activities `due` after it, and the last
    /// evaluation, checkpoint and work of the caller.
    pub fn reserve(&self, due: Scheduled) -> Vec<(Phase, Work)> {
        let evaluations = 1 + usize::from(due.evaluation);
        let saves = 1 + usize::from(due.save);
        self.entries(evaluations, saves)
    }

    /// This many evaluations and checkpoints, and the caller's work after the loop.
    fn entries(&self, evaluations: usize, saves: usize) -> Vec<(Phase, Work)> {
        let repeat = |phase, work: &Work, count| std::iter::repeat_n((phase, work.clone()), count);
        self.evaluation
            .iter()
            .flat_map(|work| repeat(Phase::Eval, work, evaluations))
            .chain(repeat(Phase::Save, &self.save, saves))
            .chain(self.ending.iter().cloned())
            .collect()
    }

    /// Work amortised per step (evaluation, checkpoint), with its frequency per step.
    fn amortized(&self) -> Vec<(Phase, Work, f64)> {
        let frequency = |every: u64| if every > 0 { 1.0 / every as f64 } else { 0.0 };
        let evaluated = frequency(self.settings.eval_every);
        let mut saved = frequency(self.settings.save_every);
        if self.settings.keep_best {
            saved += evaluated;
        }
        self.evaluation
            .iter()
            .map(|work| (Phase::Eval, work.clone(), evaluated))
            .chain([(Phase::Save, self.save.clone(), saved)])
            .collect()
    }
}

/// The end of a run as simulated on the counted meter; figures are those from `state` on.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// Steps done at the end, earlier ones included.
    pub steps: u64,
    /// Why the run ends.
    pub stop: Stop,
    /// Charge by phase.
    pub phases: Vec<(Phase, Charge)>,
    /// Evaluations.
    pub evaluations: usize,
    /// Checkpoints.
    pub saves: usize,
    /// Tokens of the training steps.
    pub tokens: u64,
    /// Loss tokens of the training steps.
    pub loss_tokens: u64,
}

impl Forecast {
    /// The charge of `phase`.
    pub fn charge(&self, phase: Phase) -> Charge {
        let of_phase = self.phases.iter().filter(|(other, _)| *other == phase);
        of_phase.map(|(_, charge)| charge.clone()).sum()
    }

    /// Energy, FLOPs and roofline time of all phases.
    pub fn total(&self) -> Spent {
        self.phases.iter().map(|(_, charge)| charge.spent()).sum()
    }

    /// After `step` steps of a run, with nothing counted yet.
    pub(super) fn at(step: u64, settings: &Settings) -> Self {
        Self {
            steps: step,
            stop: settings.last_step(),
            phases: Vec::new(),
            evaluations: 0,
            saves: 0,
            tokens: 0,
            loss_tokens: 0,
        }
    }

    pub(super) fn count_step(&mut self, step: &ChargedStep, due: Scheduled) {
        self.steps += 1;
        self.evaluations += usize::from(due.evaluation);
        self.saves += usize::from(due.save);
        self.tokens += step.tokens;
        self.loss_tokens += step.loss_tokens;
    }
}

/// Charges of a run's recurring activities on one device profile.
struct Charges {
    evaluation: Option<Charge>,
    save: Charge,
    ending: Vec<(Phase, Charge)>,
}

impl Charges {
    fn new(costs: &StepCosts<'_>, profile: &Profile) -> Self {
        let ending = costs.ending.iter();
        Self {
            evaluation: costs.evaluation.as_ref().map(|work| profile.charge(work)),
            save: profile.charge(&costs.save),
            ending: ending
                .map(|(phase, work)| (*phase, profile.charge(work)))
                .collect(),
        }
    }

    /// The last evaluation, the last checkpoint and the caller's work after the loop.
    fn reserve(&self) -> Spent {
        let ending = self.ending.iter().map(|(_, charge)| charge);
        let charges = self.evaluation.iter().chain([&self.save]).chain(ending);
        charges.map(Charge::spent).sum()
    }

    /// A step with charge `step` and the activities `due` after it.
    fn step(&self, step: &Charge, due: Scheduled) -> Spent {
        let evaluation = self.evaluation.iter().filter(|_| due.evaluation);
        let save = due.save.then_some(&self.save);
        [step]
            .into_iter()
            .chain(evaluation)
            .chain(save)
            .map(Charge::spent)
            .sum()
    }

    /// Charge by phase of a run with charge `training` for all its steps.
    fn phases(&self, training: Charge, evaluations: usize, saves: usize) -> Vec<(Phase, Charge)> {
        let repeat =
            |charge: &Charge, count| std::iter::repeat_n(charge.clone(), count).sum::<Charge>();
        let evaluation = self.evaluation.as_ref();
        let mut phases = vec![
            (Phase::Train, training),
            (
                Phase::Eval,
                evaluation
                    .map(|charge| repeat(charge, evaluations))
                    .unwrap_or_default(),
            ),
            (Phase::Save, repeat(&self.save, saves)),
        ];
        for (phase, charge) in &self.ending {
            for (_, sum) in phases.iter_mut().filter(|(other, _)| other == phase) {
                *sum += charge;
            }
        }
        phases
    }
}

/// Steps between two calls of a simulation's `progress`.
const PROGRESS_EVERY: u64 = 4096;

/// Simulates the run from `state` on the counted meter: every step, evaluation and checkpoint that
/// `budget` admits when `before` is already spent. Executes nothing. `progress` is called with the
/// steps simulated and the steps of the run.
pub fn forecast(
    costs: &StepCosts<'_>,
    settings: &Settings,
    profile: &Profile,
    budget: &Budget,
    before: Spent,
    state: &TrainState,
    progress: &mut dyn FnMut(u64, u64),
) -> Forecast {
    let charges = Charges::new(costs, profile);
    let reserve = charges.reserve();
    let mut steps = costs.charges(profile);
    let mut run = Forecast::at(state.step, settings);
    let mut so_far = before;
    let mut training = ChargeSum::default();
    let mut last = Scheduled::default();
    while run.steps < settings.steps {
        let step = steps.step(run.steps);
        let mut due = settings.scheduled_after(run.steps + 1);
        let next = charges.step(&step.charge, due);
        if let Err(limit) = budget.admits(&so_far, &next, &reserve) {
            run.stop = Stop::Budget(limit);
            break;
        }
        so_far += next;
        training.add(&step);
        due.evaluation &= costs.has_validation();
        run.count_step(&step, due);
        last = due;
        if run.steps.is_multiple_of(PROGRESS_EVERY) {
            progress(run.steps, settings.steps);
        }
    }
    // The end of the run repeats neither an evaluation nor a checkpoint that its last step has just
    // made.
    let evaluated = last.evaluation || !costs.has_validation();
    run.evaluations += usize::from(!evaluated);
    run.saves += usize::from(!(last.save && evaluated));
    run.phases = charges.phases(training.finish(profile), run.evaluations, run.saves);
    run
}

/// The progress of a simulation that is not shown.
pub fn unseen(_: u64, _: u64) {}

/// The progress that the learning rate is a function of: by steps, and with a budget also by the
/// amount spent.
pub struct BudgetProgress {
    steps: u64,
    spending: Spending,
}

/// How progress by the budget is determined.
enum Spending {
    /// No budget.
    Unlimited,
    /// All future costs are exactly predictable: the allowance of training over the whole run.
    Planned(Allowance),
    /// Future costs are estimated from past readings, before every step.
    Observed {
        /// Work amortised per step, with its frequency.
        amortized: Vec<(Phase, Work, f64)>,
        /// Work at the end of the run.
        ending: Vec<(Phase, Work)>,
    },
}

impl BudgetProgress {
    /// The progress of a run that continues from `state`, before its first step.
    pub fn new(
        costs: &StepCosts<'_>,
        settings: &Settings,
        account: &Account,
        state: &TrainState,
    ) -> Self {
        let spending = if !account.budget().is_limited() {
            Spending::Unlimited
        } else if account.is_predictable() {
            let profile = account.meters().profile();
            let (budget, spent) = (account.budget(), account.spent());
            let plan = forecast(costs, settings, profile, budget, spent, state, &mut unseen);
            let planned = costs.entries(plan.evaluations, plan.saves);
            Spending::Planned(account.allowance(&planned))
        } else {
            Spending::Observed {
                amortized: costs.amortized(),
                ending: costs.reserve(Scheduled::default()),
            }
        };
        Self {
            steps: settings.steps,
            spending,
        }
    }

    /// Progress in [0, 1] at the step whose work is `next`: the larger of steps done over all steps
    /// and, with a budget, the fraction of training's allowance that is spent at the midpoint of
    /// the step. Without a budget it is `step / steps`, as in transformers.
    pub(super) fn at(&self, state: &TrainState, account: &Account, next: &Work) -> f64 {
        let by_steps = state.step as f64 / self.steps as f64;
        match &self.spending {
            Spending::Unlimited => by_steps,
            Spending::Planned(allowance) => {
                let next = account.forecast(&[(Phase::Train, next.clone())]);
                by_steps.max(allowance.fraction(&(account.spent_on(Phase::Train) + next.half())))
            }
            Spending::Observed { amortized, ending } => {
                by_steps.max(account.progress(next, amortized, ending))
            }
        }
    }
}
