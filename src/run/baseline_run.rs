//! Training of one measured baseline in its folder: ledger, steps and checkpoints of its own.
//!
//! First a complete schedule over the steps that take the run's training energy (the loss at equal energy). If its loss is
//! still above the run's, a schedule over `energy_multiple` times that energy continues from there until an evaluation is at
//! or below the run's loss (the energy to equal loss). An interrupted baseline resumes from its newest checkpoint.

use std::path::{Path, PathBuf};

use super::Screen;
use super::loss_curve::{LossCurve, to_equal_loss};
use super::measured_baselines::{Reference, RunContext, label};
use super::prepare::Prepared;
use super::session::{Segment, Session};
use super::spending::interval;
use super::trained_model::{Assembled, fully_trained, open_weights};
use crate::energy::{Account, Budget, Interval, Ledger, Limit, Limits, MeterKind, Phase};
use crate::error::{Error, Result};
use crate::forecast::{BaselineSetup, emissions};
use crate::model::TrainableModel;
use crate::report::baselines::{Baseline, BaselineKind, BaselineStop, Label, MeasuredBaseline};
use crate::report::files::STEPS_JSONL;
use crate::report::steps::truncate_after;
use crate::train::{Checkpoints, Settings, Stop, TrainState};
use crate::units::{Flops, Joules};

/// A baseline with an open ledger.
pub(super) struct BaselineRun<'a> {
    context: &'a RunContext<'a>,
    setup: BaselineSetup<'a>,
    reference: &'a Reference,
    session: Session<'a>,
    ledger: PathBuf,
    /// Steps for the run's training energy.
    equal: u64,
    /// Steps for `energy_multiple` times as much.
    most: u64,
}

/// Why a baseline cannot be trained: not one step fits the run's training energy, or what `limit` leaves of its budget.
pub(super) fn why_impossible(
    setup: &BaselineSetup<'_>,
    equal: u64,
    limit: Option<Joules>,
) -> Option<String> {
    if equal == 0 {
        return Some("one of its steps takes more energy than all the training of the run".into());
    }
    let least = setup.energy(0, 1, equal).joules();
    let left = limit.filter(|limit| *limit < least)?.max(Joules::ZERO);
    Some(format!(
        "`baseline.budget` leaves {left}, and one step with its evaluations takes {least}"
    ))
}

/// The account of a baseline that may spend `limit`, with its own ledger.
fn open_account(
    prepared: &Prepared,
    limit: Option<Joules>,
    ledger: &Path,
    digest: &str,
) -> Result<Account> {
    let limits = Limits {
        energy: limit,
        ..Limits::default()
    };
    let budget = Budget::new(limits, prepared.budget.rates().clone())?;
    let meters = prepared.meters.clone();
    let kind = meters.resolve(prepared.recipe.energy.meter)?;
    let opened = if ledger.exists() {
        Ledger::resume(ledger, digest)?
    } else {
        Ledger::create(ledger, digest)?
    };
    Ok(Account::new(budget, meters, opened, kind))
}

impl<'a> BaselineRun<'a> {
    /// Opens `folder`, new or left by an earlier process. `limit` is the energy it may spend, earlier processes included.
    pub(super) fn open(
        context: &'a RunContext<'a>,
        setup: BaselineSetup<'a>,
        reference: &'a Reference,
        limit: Option<Joules>,
        folder: PathBuf,
    ) -> Result<Self> {
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let ledger = folder.join("ledger.jsonl");
        let account = open_account(context.prepared, limit, &ledger, &setup.digest())?;
        let checkpoints = Checkpoints::new(folder.join("checkpoints"), 1);
        let found = checkpoints.newest(&setup.digest())?;
        checkpoints.tidy(found.as_ref())?;
        if let Some(spent) = found.as_ref().and_then(|state| state.spent.as_ref()) {
            account.check_not_less(spent)?;
        }
        let session = Session {
            prepared: context.prepared,
            account,
            checkpoints,
            steps_log: folder.join(STEPS_JSONL),
            has_checkpoint: found.is_some(),
            state: TrainState {
                recipe: setup.digest(),
                ended: None,
                ..found.unwrap_or_default()
            },
        };
        truncate_after(&session.steps_log, session.state.step)?;
        let [equal, most] = setup.steps(reference.training.energy_j.counted);
        Ok(Self {
            context,
            setup,
            reference,
            session,
            ledger,
            equal,
            most,
        })
    }

    /// The screen's line before it trains.
    pub(super) fn announcement(&self) -> String {
        let Self { equal, most, .. } = *self;
        let further = if most > equal {
            format!(", then up to step {most} to the run's loss")
        } else {
            String::new()
        };
        let resumed = match self.session.state.step {
            0 => String::new(),
            step => format!(", resuming after step {step}"),
        };
        format!(
            "measuring the {} baseline: {equal} step{} for the run's training energy of {} (counted){further}{resumed}",
            label(self.setup.kind),
            if equal == 1 { "" } else { "s" },
            self.reference.training.energy_j.counted.joules(),
        )
    }

    /// Trains what is left and returns the report's entry.
    pub(super) fn run(mut self, screen: &mut dyn Screen) -> Result<Baseline> {
        let stop = if self.is_complete() {
            Stop::Steps
        } else if self.has_room() {
            self.train(screen)?
        } else {
            Stop::Budget(Limit::Energy)
        };
        self.session.account.close()?;
        self.block(&stop)
    }

    /// Whether an earlier process reached the end and evaluated there.
    fn is_complete(&self) -> bool {
        let step = self.session.state.step;
        let evaluated = self
            .session
            .state
            .val_loss_last
            .is_some_and(|last| last.step == step);
        evaluated && (step == self.most || (step >= self.equal && !self.is_above_run()))
    }

    /// Whether the last evaluation was above the run's loss.
    fn is_above_run(&self) -> bool {
        let last = self.session.state.val_loss_last;
        last.is_some_and(|last| last.val_loss > self.reference.val_loss)
    }

    /// Whether the budget holds loading, a step, and what follows the last one.
    fn has_room(&self) -> bool {
        let step = self.session.state.step;
        let reload = self
            .setup
            .load()
            .filter(|_| step > 0)
            .map(|work| self.session.account.forecast(&[(Phase::Load, work)]).energy);
        let least = self.setup.energy(step, step + 1, self.equal) + reload.unwrap_or_default();
        let limit = self.session.account.budget().limits().energy;
        limit.is_none_or(|limit| {
            self.session.account.spent().energy.joules() + least.joules() <= limit
        })
    }

    fn train(&mut self, screen: &mut dyn Screen) -> Result<Stop> {
        let model = self.load_model()?;
        let mut stop = Stop::Steps;
        if self.session.state.step <= self.equal {
            stop = self.segment(&model, self.equal, None, screen)?;
        }
        if stop == Stop::Steps && self.is_above_run() && self.most > self.equal {
            let target = Some(self.reference.val_loss);
            stop = self.segment(&model, self.most, target, screen)?;
        }
        Ok(stop)
    }

    /// Trains to step `steps`, where the schedule ends, or to the first evaluation at or below `target_loss`.
    fn segment(
        &mut self,
        model: &TrainableModel,
        steps: u64,
        target_loss: Option<f64>,
        screen: &mut dyn Screen,
    ) -> Result<Stop> {
        let settings = Settings {
            target_loss,
            early_stopping: None,
            ..self.setup.settings(steps, self.equal)
        };
        let segment = Segment {
            model,
            shape: &self.setup.shape,
            settings: &settings,
            ending: Vec::new(),
            expected_steps: steps,
            export: &|_| Ok(()),
            interrupted: self.context.interrupted,
        };
        self.session.train(segment, screen)
    }

    /// Random or pretrained weights, of which only the latter are charged.
    fn load_model(&mut self) -> Result<TrainableModel> {
        let RunContext {
            prepared, device, ..
        } = *self.context;
        let load = self.setup.load();
        let assembled = self.session.load_model(load.as_ref(), || {
            let weights = load.is_some().then(|| open_weights(prepared)).transpose()?;
            fully_trained(prepared, weights.as_ref(), device).map(Assembled::from)
        })?;
        Ok(assembled.model)
    }

    fn block(&self, stop: &Stop) -> Result<Baseline> {
        let steps = self.session.state.step;
        let kind = self.session.account.kind();
        let spent = self.session.account.spent();
        let energy = spent.energy.joules();
        let range = interval(kind, energy);
        let prepared = self.context.prepared;
        let before = self.session.state.val_loss_before;
        let curve = LossCurve::read(&self.session.steps_log, &self.ledger, before, kind)?;
        let run_training_j = self.reference.training.on(kind).joules();
        let equal_loss = to_equal_loss(&curve, self.reference.val_loss, run_training_j);
        let start = match self.setup.kind {
            BaselineKind::FullFineTuning => "pretrained",
            _ => "random",
        };
        Ok(Baseline {
            kind: self.setup.kind,
            label: Label::Measured,
            flops: Some(Flops(spent.flops as f64)),
            energy: Some(range),
            metered_over_counted: None,
            emissions: Some(emissions(range, &prepared.grid, prepared.budget.rates())),
            // Where it stopped was chosen: its ratio has no range.
            ratio: Some(energy / self.reference.energy)
                .filter(|ratio| ratio.is_finite())
                .map(Interval::exact),
            source: format!("{steps} steps on every weight, from {start} weights"),
            assumptions: self.assumptions(kind),
            val_loss_at_equal_energy: curve.val_loss_at(self.equal),
            energy_to_equal_loss_j: equal_loss.energy_j,
            measured: Some(MeasuredBaseline {
                steps,
                steps_at_equal_energy: self.equal,
                stop_reason: stop_reason(stop, steps, self.equal, self.is_above_run()),
                learning_rate: self.setup.learning_rate(),
                run_training_j,
                training_j: curve.trained(),
                run_val_loss: self.reference.val_loss,
                equal_loss,
                curve: curve.thinned(),
            }),
        })
    }

    fn assumptions(&self, kind: MeterKind) -> Vec<String> {
        let recipe = &self.context.prepared.recipe.baseline;
        let evaluated = match self.setup.eval_every(self.equal, self.equal) {
            1 => "after every step".to_string(),
            steps => format!("every {steps} steps"),
        };
        let rate = match recipe.learning_rate {
            Some(_) => "`baseline.learning_rate`",
            None => "the run's own",
        };
        let mut all = vec![
            format!(
                "the same records in the same order, batches, optimizer and seed; peak learning rate {} ({rate})",
                self.setup.learning_rate()
            ),
            format!(
                "as much training energy as the run, on the counted meter; evaluated {evaluated}"
            ),
            "one run with one seed".to_string(),
        ];
        if self.most > self.equal {
            all.push(format!(
                "beyond equal energy the schedule begins again, stretched over {} times the energy, and ends there",
                recipe.energy_multiple
            ));
        }
        if kind != MeterKind::Counted {
            all.push("its joules are read on the meter of the run, which may differ from the counted one".to_string());
        }
        all
    }
}

/// Why a baseline ended after `step` steps, of which `equal` take the run's training energy; `above`: its loss is above the
/// run's.
fn stop_reason(stop: &Stop, step: u64, equal: u64, above: bool) -> BaselineStop {
    match stop {
        Stop::Diverged(_) => BaselineStop::Diverged,
        // At the target, or at the run's loss in its very last step.
        _ if step > equal && !above => BaselineStop::EqualLoss,
        Stop::Budget(_) => BaselineStop::Budget,
        Stop::Interrupted => BaselineStop::Interrupted,
        Stop::Steps | Stop::Epochs | Stop::EarlyStopping if step == equal => {
            BaselineStop::EqualEnergy
        }
        Stop::Steps | Stop::Epochs | Stop::EarlyStopping => BaselineStop::EnergyMultiple,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_that_came_to_the_runs_loss_says_so_whatever_ended_it() {
        let (diverged, budget) = (
            Stop::Diverged("the loss".to_string()),
            Stop::Budget(Limit::Energy),
        );
        // Ten steps take the run's energy.
        let expected = [
            // Beyond equal energy and no longer above the run's loss: only what is not finite says something else.
            (&diverged, 12, false, BaselineStop::Diverged),
            (&budget, 12, false, BaselineStop::EqualLoss),
            (&Stop::Interrupted, 12, false, BaselineStop::EqualLoss),
            (&Stop::Steps, 12, false, BaselineStop::EqualLoss),
            // Beyond it and still above.
            (&budget, 12, true, BaselineStop::Budget),
            (&Stop::Interrupted, 12, true, BaselineStop::Interrupted),
            (&Stop::Epochs, 12, true, BaselineStop::EnergyMultiple),
            // At equal energy the loss is no matter; before it, its budget or the user ended it.
            (&Stop::Steps, 10, false, BaselineStop::EqualEnergy),
            (&Stop::Steps, 10, true, BaselineStop::EqualEnergy),
            (&budget, 10, false, BaselineStop::Budget),
            (&budget, 7, false, BaselineStop::Budget),
            (&Stop::Interrupted, 7, true, BaselineStop::Interrupted),
        ];
        for (stop, step, above, reason) in expected {
            assert_eq!(
                stop_reason(stop, step, 10, above),
                reason,
                "{stop:?} after {step} steps, above: {above}"
            );
        }
    }
}
