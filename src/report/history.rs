//! A run over time, for its charts: `steps.jsonl` joined with `ledger.jsonl`.
//!
//! Every point includes all that was spent before it: evaluations, checkpoints and steps lost in a crash. Knows nothing of charts.

use std::collections::BTreeMap;
use std::path::Path;

use crate::energy::Spent;
use crate::energy::ledger::{Entry, Phase, read_entries};
use crate::error::Result;
use crate::report::steps::read_steps;
use crate::report::types::{Meter, Report};
use crate::train::StepRecord;
use crate::units::{Joules, Seconds};

/// Steps and ledger of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    /// `steps.jsonl`.
    pub steps: Vec<StepRecord>,
    /// The entries of `ledger.jsonl`.
    pub entries: Vec<Entry>,
}

/// A step with the run's spending up to its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// From 1.
    pub step: u64,
    /// Energy on the chosen meter.
    pub spent: Joules,
    /// Executed FLOPs.
    pub flops: u64,
    /// Metered wall time.
    pub wall: Seconds,
    /// Training loss, nats per loss token.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// On steps followed by an evaluation.
    pub val_loss: Option<f64>,
}

/// The run, step by step.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// Energy spent before the first step.
    pub before: Joules,
    /// In the order of steps.
    pub points: Vec<Point>,
}

impl History {
    /// Reads both files; a missing file is empty, as after a run that ended before its first step.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`]; [`crate::error::Kind::Run`] naming a malformed line.
    pub fn read(steps: &Path, ledger: &Path) -> Result<Self> {
        let steps = if steps.exists() {
            read_steps(steps)?
        } else {
            Vec::new()
        };
        let entries = if ledger.exists() {
            read_entries(ledger)?
        } else {
            Vec::new()
        };
        Ok(Self { steps, entries })
    }

    /// What was spent before the first step, and after each. A step repeated after a crash counts where it was last done.
    fn spent(&self, meter: Meter) -> (Spent, BTreeMap<u64, Spent>) {
        let mut sum = Spent::default();
        let mut before = None;
        let mut after = BTreeMap::new();
        for entry in &self.entries {
            if entry.phase == Phase::Train {
                before.get_or_insert(sum);
            }
            sum += Spent {
                energy: entry.on(meter),
                flops: entry.flops,
                time: entry.wall_s,
            };
            if entry.phase == Phase::Train {
                after.insert(entry.step, sum);
            }
        }
        (before.unwrap_or(sum), after)
    }

    /// The steps that both files and the report contain, with energy on `meter`.
    pub(super) fn timeline(&self, report: &Report, meter: Meter) -> Timeline {
        let (before, after) = self.spent(meter);
        let known = self
            .steps
            .iter()
            .filter(|record| record.step <= report.training.steps);
        let points = known.filter_map(|record| {
            let Spent {
                energy,
                flops,
                time,
            } = *after.get(&record.step)?;
            Some(Point {
                step: record.step,
                spent: energy.joules(),
                flops,
                wall: time,
                loss: record.loss,
                lr: record.lr,
                val_loss: record.val_loss,
            })
        });
        Timeline {
            before: before.energy.joules(),
            points: points.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::Energies;

    fn entry(phase: Phase, step: u64, joules: f64) -> Entry {
        let energy = Joules(joules).rounded();
        let energy_j = Energies {
            counted: energy,
            measured: None,
            timed: energy,
        };
        Entry {
            phase,
            step,
            energy_j,
            flops: 0,
            bytes: Default::default(),
            breakdown: None,
            wall_s: Seconds(0.0),
            t: 0.0,
            gap: None,
        }
    }

    fn record(step: u64) -> StepRecord {
        let line = format!(
            r#"{{"step":{step},"loss":2.0,"lr":0.1,"grad_norm":null,"tokens":1,"loss_tokens":1,"flops":1,
                "energy_j":{{"counted":1.0,"measured":null,"timed":1.0}},"wall_s":1.0}}"#
        );
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn evaluations_and_lost_steps_are_included() {
        let mut report: Report =
            serde_json::from_str(include_str!("../../tests/fixtures/report.json")).unwrap();
        report.training.steps = 2;
        let entries = vec![
            entry(Phase::Load, 0, 1.0),
            entry(Phase::Eval, 0, 2.0),
            entry(Phase::Train, 1, 10.0),
            entry(Phase::Train, 2, 10.0),
            entry(Phase::Lost, 2, 5.0),
            entry(Phase::Train, 2, 10.0),
            entry(Phase::Eval, 2, 2.0),
        ];
        // Step 3 is of a resumed run that the report does not include yet.
        let history = History {
            steps: vec![record(1), record(2), record(3)],
            entries,
        };
        let timeline = history.timeline(&report, Meter::Counted);
        assert_eq!(timeline.before, Joules(3.0));
        // 1 + 2 + 10 = 13; 13 + 10 + 5 + 10 = 38: the first try of step 2 was spent too.
        assert_eq!(
            timeline
                .points
                .iter()
                .map(|p| (p.step, p.spent))
                .collect::<Vec<_>>(),
            [(1, Joules(13.0)), (2, Joules(38.0))]
        );
    }
}
