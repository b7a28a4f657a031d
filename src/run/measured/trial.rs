//! One baseline from its folder to its block of the report.
//!
//! Takes a finished run and a kind, opens the baseline's ledger (new, or what an earlier process left), goes on from its newest checkpoint
//! and returns what the report shows of it. Knows nothing of the other baselines.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::curve::{Curve, to_equal_loss};
use super::leg::Leg;
use super::{Finish, Place, folder, words};
use crate::energy::{Account, Budget, Ledger, Limit, Limits, MeterKind, Meters, Phase};
use crate::error::{Error, Result};
use crate::forecast::BaselineSetup;
use crate::model::TrainableModel;
use crate::report::files::STEPS_JSONL;
use crate::report::measured::{BaselineStop, MeasuredBaseline};
use crate::report::steps::truncate_after;
use crate::report::types::{self, BaselineKind, Label};
use crate::run::Screen;
use crate::run::spending::{bounds, carbon_block, interval};
use crate::run::trainee::{fully_trained, open_weights};
use crate::train::{Checkpoints, Stop, TrainState};
use crate::units::{Flops, Joules};

/// One baseline in training.
pub(super) struct Trial<'a> {
    place: &'a Place<'a>,
    field: BaselineSetup<'a>,
    finish: &'a Finish,
    /// On the baseline's own budget and ledger.
    account: Account,
    checkpoints: Checkpoints,
    folder: PathBuf,
    /// Steps for the run's training energy, and for `energy_multiple` times as much.
    steps: [u64; 2],
    standing: TrainState,
}

impl<'a> Trial<'a> {
    /// Opens its folder and ledger; the inner error says why it cannot be trained. `limit` is what its own budget leaves it, with what it has
    /// spent already.
    pub(super) fn begin(
        place: &'a Place<'a>,
        kind: BaselineKind,
        finish: &'a Finish,
        limit: Option<Joules>,
    ) -> Result<std::result::Result<Self, String>> {
        let prepared = place.prepared;
        let field = BaselineSetup::new(prepared.subject(), kind)?;
        let steps = field.steps(finish.training.energy_j.counted);
        if steps[0] == 0 {
            return Ok(Err(
                "one of its steps takes more energy than all the training of the run".into(),
            ));
        }
        let folder = folder(place.directory, kind);
        let least = field.energy(0, 1, steps[0]).joules();
        if let Some(limit) = limit.filter(|limit| *limit < least && !folder.exists()) {
            let left = limit.max(Joules::ZERO);
            return Ok(Err(format!(
                "`baseline.budget` leaves {left}, and one step with its evaluations takes {least}"
            )));
        }
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let budget = Budget::new(
            Limits {
                energy: limit,
                ..Limits::default()
            },
            prepared.budget.rates().clone(),
        )?;
        let meters = Meters::open(prepared.profile.clone(), place.computing);
        let meter = meters.resolve(prepared.recipe.energy.meter)?;
        let account = Account::new(budget, meters, ledger(&folder.join(LEDGER))?, meter);
        let checkpoints = Checkpoints::new(folder.join("checkpoints"), 1);
        let found = checkpoints.newest(&field.digest())?;
        let standing = found.unwrap_or_else(|| TrainState {
            recipe: field.digest(),
            ..TrainState::default()
        });
        truncate_after(&folder.join(STEPS_JSONL), standing.step)?;
        Ok(Ok(Self {
            place,
            field,
            finish,
            account,
            checkpoints,
            folder,
            steps,
            standing,
        }))
    }

    pub(super) fn announcement(&self) -> String {
        let [equal, most] = self.steps;
        let further = if most > equal {
            format!(", then up to step {most} to the run's loss")
        } else {
            String::new()
        };
        let plural = if equal == 1 { "step" } else { "steps" };
        let energy = self.finish.training.energy_j.counted.joules();
        let from = match self.standing.step {
            0 => String::new(),
            step => format!(", resuming after step {step}"),
        };
        format!(
            "measuring the {} baseline: {equal} {plural} for the run's training energy of {energy} (counted){further}{from}",
            words(self.field.kind)
        )
    }

    pub(super) fn run(mut self, screen: &mut dyn Screen) -> Result<types::Baseline> {
        // An earlier process may have done all that there was to do and died before it told so, or spent so much that nothing more fits.
        let stop = if self.finished() {
            Stop::Steps
        } else if self.has_room() {
            self.train(screen)?
        } else {
            Stop::Budget(Limit::Energy)
        };
        self.account.close()?;
        self.block(&stop)
    }

    /// Whether it stands, evaluated, where its training ends.
    fn finished(&self) -> bool {
        let (step, [equal, most]) = (self.standing.step, self.steps);
        let evaluated = self
            .standing
            .val_loss_last
            .is_some_and(|last| last.step == step);
        evaluated && (step == most || (step >= equal && !self.above_the_run()))
    }

    /// Whether its budget still holds loading, a step, and what follows the last one.
    fn has_room(&self) -> bool {
        let step = self.standing.step;
        let again = self
            .field
            .load()
            .filter(|_| step > 0)
            .map(|work| self.account.forecast(&[(Phase::Load, work)]).energy);
        let least = self.field.energy(step, step + 1, self.steps[0]) + again.unwrap_or_default();
        let limit = self.account.budget().limits().energy;
        limit.is_none_or(|limit| self.account.spent().energy.joules() + least.joules() <= limit)
    }

    /// Both legs, or what is left of them.
    fn train(&mut self, screen: &mut dyn Screen) -> Result<Stop> {
        let trainee = self.assemble()?;
        let [equal, most] = self.steps;
        let mut stop = Stop::Steps;
        if self.standing.step <= equal {
            stop = self.leg(&trainee, [equal, equal], None, screen)?;
        }
        if stop == Stop::Steps && self.above_the_run() && most > equal {
            stop = self.leg(&trainee, [equal, most], Some(self.finish.val_loss), screen)?;
        }
        Ok(stop)
    }

    fn leg(
        &mut self,
        trainee: &TrainableModel,
        steps: [u64; 2],
        target: Option<f64>,
        screen: &mut dyn Screen,
    ) -> Result<Stop> {
        let stop = AtomicBool::new(false);
        let leg = Leg {
            prepared: self.place.prepared,
            field: &self.field,
            trainee,
            steps,
            target,
        };
        let flags = [self.place.interrupted, &stop];
        let outcome = leg.run(
            self.standing.clone(),
            &mut self.account,
            &self.checkpoints,
            &self.folder,
            flags,
            screen,
        )?;
        self.standing = outcome.state;
        Ok(outcome.stop)
    }

    /// Whether its last evaluation was above the run's loss.
    fn above_the_run(&self) -> bool {
        self.standing
            .val_loss_last
            .is_some_and(|last| last.val_loss > self.finish.val_loss)
    }

    /// Random weights, or the pretrained ones, which are loaded at their cost; then those of the checkpoint, where there is one.
    fn assemble(&mut self) -> Result<TrainableModel> {
        let prepared = self.place.prepared;
        let trainee = match self.field.load() {
            None => fully_trained(prepared, None, self.place.device)?,
            Some(load) => {
                self.account.admit(Phase::Load, &load, &[])?;
                self.account.begin();
                let weights = open_weights(prepared)?;
                let trainee = fully_trained(prepared, Some(&weights), self.place.device)?;
                self.account
                    .charge(Phase::Load, self.standing.step, &load)?;
                trainee
            }
        };
        if self.standing.step > 0 {
            self.checkpoints
                .restore(self.standing.step, &trainee.parameters)?;
        }
        Ok(trainee)
    }

    fn block(&self, stop: &Stop) -> Result<types::Baseline> {
        let steps = self.standing.step;
        let (kind, spent) = (self.account.kind(), self.account.spent());
        let energy = spent.energy.joules();
        let within = interval(kind, energy);
        let ((low_j, high_j), carbon) = (
            bounds(within),
            carbon_block(self.place.prepared, within, spent.time),
        );
        let run_training = self.finish.training.on(kind).joules();
        let (log, before) = (self.folder.join(STEPS_JSONL), self.standing.val_loss_before);
        let curve = Curve::read(&log, &self.folder.join(LEDGER), before, kind)?;
        let equal = to_equal_loss(&curve, self.finish.val_loss, run_training);
        Ok(types::Baseline {
            kind: self.field.kind,
            label: Label::Measured,
            flops: Some(Flops(spent.flops as f64)),
            energy_j: Some(energy),
            metered_over_counted: None,
            gco2e: Some(carbon.gco2e),
            ratio: Some(energy / self.finish.energy).filter(|ratio| ratio.is_finite()),
            low_j,
            high_j,
            low_gco2e: carbon.low_gco2e,
            high_gco2e: carbon.high_gco2e,
            // Where it stopped was chosen: its ratio is no estimate that could be off.
            low_ratio: None,
            high_ratio: None,
            source: format!(
                "{steps} steps on every weight, {}",
                start_words(self.field.kind)
            ),
            assumptions: self.assumptions(kind),
            val_loss_at_equal_energy: curve.val_loss_at(self.steps[0]),
            energy_to_equal_loss_j: equal.energy_j,
            measured: Some(MeasuredBaseline {
                steps,
                steps_at_equal_energy: self.steps[0],
                stop_reason: stop_reason(
                    stop,
                    self.standing.step,
                    self.steps[0],
                    self.above_the_run(),
                ),
                learning_rate: self.field.learning_rate(),
                run_training_j: run_training,
                training_j: curve.trained(),
                run_val_loss: self.finish.val_loss,
                equal_loss: equal,
                curve: curve.thinned(),
            }),
        })
    }

    fn assumptions(&self, kind: MeterKind) -> Vec<String> {
        let recipe = &self.place.prepared.recipe;
        let often = match self.field.eval_every(self.steps[0], self.steps[0]) {
            1 => "after every step".to_string(),
            steps => format!("every {steps} steps"),
        };
        let rate = if recipe.baseline.learning_rate.is_some() {
            "`baseline.learning_rate`"
        } else {
            "the run's own"
        };
        let mut all = vec![
            format!(
                "the same records in the same order, batches, optimizer and seed; peak learning rate {} ({rate})",
                self.field.learning_rate()
            ),
            format!("as much training energy as the run, on the counted meter; evaluated {often}"),
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

/// Why a baseline ended after `step` steps, of which `equal` take the run's training energy; `above`: its loss is still above the run's.
fn stop_reason(stop: &Stop, step: u64, equal: u64, above: bool) -> BaselineStop {
    match stop {
        Stop::Diverged(_) => BaselineStop::Diverged,
        // Our own flag stopped it, or it came to the run's loss at its very last step, whatever made that the last.
        _ if step > equal && !above => BaselineStop::EqualLoss,
        Stop::Budget(_) => BaselineStop::Budget,
        Stop::Interrupted => BaselineStop::Interrupted,
        Stop::Steps | Stop::Epochs if step == equal => BaselineStop::EqualEnergy,
        Stop::Steps | Stop::Epochs => BaselineStop::EnergyMultiple,
    }
}

fn start_words(kind: BaselineKind) -> &'static str {
    if kind == BaselineKind::FullFineTuning {
        "from the pretrained weights"
    } else {
        "from random weights"
    }
}

/// A baseline's own ledger.
const LEDGER: &str = "ledger.jsonl";

/// A new ledger, or the one that an earlier process left: what it spent is spent.
fn ledger(path: &Path) -> Result<Ledger> {
    if path.exists() {
        Ledger::resume(path)
    } else {
        Ledger::create(path)
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
            // At equal energy the loss is no matter; before it, its own budget or a person ended it.
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
