//! What a run will execute and where its budget will stop it, before it starts; and how far it is, while it runs.

use super::{Settings, Stop, TrainState, checkpoint_bytes};
use crate::data::{BatchShape, MicroBatch, Sampler};
use crate::energy::budget::Allowance;
use crate::energy::{Account, Budget, Charge, Phase, Profile, Spent};
use crate::model::ModelShape;
use crate::ops::adamw_cost;
use crate::work::Work;

/// What is due after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// An evaluation.
    pub evaluation: bool,
    /// A checkpoint.
    pub save: bool,
}

impl Settings {
    /// What is due once `step` steps are done. The end of the run brings its own evaluation and checkpoint.
    pub fn scheduled_after(&self, step: u64) -> Scheduled {
        let every = |n: u64| n > 0 && step.is_multiple_of(n) && step < self.steps;
        let evaluation = every(self.eval_every);
        Scheduled {
            evaluation,
            save: every(self.save_every) || (evaluation && self.keep_best),
        }
    }
}

/// The work of each thing a run does.
pub struct StepCosts<'a> {
    shape: &'a ModelShape,
    sampler: &'a Sampler,
    settings: &'a Settings,
    trained: usize,
    evaluation: Option<Work>,
    save: Work,
    /// What the caller does when the loop has ended, within the same budget.
    ending: Vec<(Phase, Work)>,
}

/// Work of saving `trained` numbers: one pass over a checkpoint's bytes.
pub(super) fn save_work(trained: usize) -> Work {
    Work::file(checkpoint_bytes(trained))
}

impl<'a> StepCosts<'a> {
    /// Of a run with these parts.
    pub fn new(
        shape: &'a ModelShape,
        sampler: &'a Sampler,
        validation: &[MicroBatch],
        trained: usize,
        settings: &'a Settings,
        ending: Vec<(Phase, Work)>,
    ) -> Self {
        let of = |batch: &MicroBatch| {
            let BatchShape {
                segments,
                loss_tokens,
            } = batch.shape();
            shape.evaluation(&segments, loss_tokens)
        };
        let evaluation = (!validation.is_empty()).then(|| validation.iter().map(of).sum());
        Self {
            shape,
            sampler,
            settings,
            trained,
            evaluation,
            save: save_work(trained),
            ending,
        }
    }

    /// Whether there is anything to evaluate on.
    pub fn has_validation(&self) -> bool {
        self.evaluation.is_some()
    }

    /// Work of one evaluation, if there are any.
    pub fn evaluation(&self) -> Option<&Work> {
        self.evaluation.as_ref()
    }

    /// Work of the step after `step` done ones: its micro-batches and the optimizer.
    pub fn step(&self, step: u64) -> Work {
        self.step_of(&self.sampler.step_shape(step))
    }

    fn step_of(&self, batches: &[BatchShape]) -> Work {
        let of = |batch: &BatchShape| {
            self.shape
                .training(&batch.segments, batch.loss_tokens, self.settings.recompute)
        };
        batches.iter().map(of).sum::<Work>() + adamw_cost(self.trained)
    }

    /// What must still be possible after a step: what is due after it, and the entries that end the run.
    pub fn reserve(&self, due: Scheduled) -> Vec<(Phase, Work)> {
        let due_evaluation = self.evaluation.as_ref().filter(|_| due.evaluation);
        let evaluations = due_evaluation
            .into_iter()
            .chain(&self.evaluation)
            .map(|work| (Phase::Eval, work.clone()));
        let saves = due
            .save
            .then_some(&self.save)
            .into_iter()
            .chain([&self.save])
            .map(|work| (Phase::Save, work.clone()));
        evaluations
            .chain(saves)
            .chain(self.ending.clone())
            .collect()
    }

    /// Work amortised per step (evaluation, checkpoint), with its frequency per step.
    fn amortized(&self) -> Vec<(Phase, Work, f64)> {
        let often = |every: u64| if every > 0 { 1.0 / every as f64 } else { 0.0 };
        let evaluated = often(self.settings.eval_every);
        let saved = often(self.settings.save_every)
            + if self.settings.keep_best {
                evaluated
            } else {
                0.0
            };
        let evaluation = self
            .evaluation
            .iter()
            .map(|work| (Phase::Eval, work.clone(), evaluated));
        evaluation
            .chain([(Phase::Save, self.save.clone(), saved)])
            .collect()
    }

    /// Work of a checkpoint.
    pub fn save(&self) -> &Work {
        &self.save
    }
}

/// Where a run will end, as far as counting tells.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// Steps done when it ends.
    pub steps: u64,
    /// Why it ends.
    pub stop: Stop,
    /// What is spent in each phase from now on.
    pub phases: Vec<(Phase, Charge)>,
    /// Evaluations and saves from now on.
    pub evaluations: usize,
    /// Checkpoints from now on.
    pub saves: usize,
    /// Tokens and loss tokens of the steps from now on.
    pub tokens: (u64, u64),
}

impl Forecast {
    /// The energy, FLOPs and roofline time of all phases together.
    pub fn total(&self) -> Spent {
        self.phases.iter().map(|(_, charge)| spent(charge)).sum()
    }
}

fn spent(charge: &Charge) -> Spent {
    Spent {
        energy: charge.energy,
        flops: charge.flops,
        time: charge.time,
    }
}

/// Plays the run through from `state` on the counted meter: every step, evaluation and checkpoint that `budget` admits after `before`.
pub fn forecast(
    costs: &StepCosts<'_>,
    settings: &Settings,
    profile: &Profile,
    budget: &Budget,
    before: Spent,
    state: &TrainState,
) -> Forecast {
    let evaluation = costs.evaluation.as_ref().map(|work| profile.charge(work));
    let save = profile.charge(&costs.save);
    let ending: Vec<(Phase, Charge)> = costs
        .ending
        .iter()
        .map(|(phase, work)| (*phase, profile.charge(work)))
        .collect();
    let reserve: Spent = evaluation
        .iter()
        .chain([&save])
        .chain(ending.iter().map(|(_, charge)| charge))
        .map(spent)
        .sum();
    let (mut so_far, mut step, mut tokens) = (before, state.step, (0, 0));
    let (mut training, mut evaluations, mut saves) = (Charge::default(), 0, 0);
    let mut last = Scheduled {
        evaluation: false,
        save: false,
    };
    let stop = loop {
        if step == settings.steps {
            break if settings.by_epochs {
                Stop::Epochs
            } else {
                Stop::Steps
            };
        }
        let due = settings.scheduled_after(step + 1);
        let shapes = costs.sampler.step_shape(step);
        let charge = profile.charge(&costs.step_of(&shapes));
        let mut next = spent(&charge);
        next += evaluation
            .iter()
            .filter(|_| due.evaluation)
            .map(spent)
            .sum();
        next += due.save.then(|| spent(&save)).into_iter().sum();
        if let Err(limit) = budget.admits(&so_far, &next, &reserve) {
            break Stop::Budget(limit);
        }
        so_far += next;
        training += &charge;
        evaluations += usize::from(due.evaluation && evaluation.is_some());
        saves += usize::from(due.save);
        tokens.0 += shapes.iter().map(|s| s.tokens() as u64).sum::<u64>();
        tokens.1 += shapes.iter().map(|s| s.loss_tokens as u64).sum::<u64>();
        (step, last) = (step + 1, due);
    };
    evaluations += usize::from(!last.evaluation && evaluation.is_some());
    saves += usize::from(!(last.save && (last.evaluation || evaluation.is_none())));
    let times =
        |charge: &Charge, count: usize| std::iter::repeat_n(charge.clone(), count).sum::<Charge>();
    let evaluated = evaluation.map_or_else(Charge::default, |charge| times(&charge, evaluations));
    let mut phases = vec![
        (Phase::Train, training),
        (Phase::Eval, evaluated),
        (Phase::Save, times(&save, saves)),
    ];
    for (phase, charge) in ending {
        phases
            .iter_mut()
            .filter(|(other, _)| *other == phase)
            .for_each(|(_, sum)| *sum += &charge);
    }
    Forecast {
        steps: step,
        stop,
        phases,
        evaluations,
        saves,
        tokens,
    }
}

/// How far a run is: what the learning rate follows.
pub struct BudgetProgress {
    steps: u64,
    spending: Spending,
}

/// What training may spend, on the meter that decides.
enum Spending {
    /// There is no budget.
    Unlimited,
    /// All that comes beside training is known: so much in the whole run.
    Planned(Allowance),
    /// Only what was seen tells what will be: asked anew before every step.
    Observed {
        /// Work amortised per step (evaluation, checkpoint), with its frequency per step.
        amortized: Vec<(Phase, Work, f64)>,
        /// What ends the run.
        ending: Vec<(Phase, Work)>,
    },
}

impl BudgetProgress {
    /// Of a run that goes on from `state`; asked once, before the first step.
    pub fn new(
        costs: &StepCosts<'_>,
        settings: &Settings,
        account: &Account,
        state: &TrainState,
    ) -> Self {
        let spending = if !account.budget().is_limited() {
            Spending::Unlimited
        } else if account.foresees() {
            let plan = forecast(
                costs,
                settings,
                account.meters().profile(),
                account.budget(),
                account.spent(),
                state,
            );
            let evaluations = costs.evaluation.iter().flat_map(|work| {
                std::iter::repeat_n((Phase::Eval, work.clone()), plan.evaluations)
            });
            let saves = std::iter::repeat_n((Phase::Save, costs.save.clone()), plan.saves);
            let reserved: Vec<_> = evaluations
                .chain(saves)
                .chain(costs.ending.clone())
                .collect();
            Spending::Planned(account.allowance(&reserved))
        } else {
            Spending::Observed {
                amortized: costs.amortized(),
                ending: costs.reserve(Scheduled {
                    evaluation: false,
                    save: false,
                }),
            }
        };
        Self {
            steps: settings.steps,
            spending,
        }
    }

    /// The larger of steps done over all steps and, where there is a budget, what training has spent at the midpoint of the step whose
    /// work is `next` over what training may spend. With no budget the rates are transformers' own.
    pub(super) fn progress(&self, state: &TrainState, account: &Account, next: &Work) -> f64 {
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
