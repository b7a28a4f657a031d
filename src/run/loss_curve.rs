//! Validation loss against training energy, and the energy to a given loss.

use std::collections::BTreeMap;
use std::path::Path;

use crate::energy::ledger::read_entries;
use crate::energy::{MeterKind, Phase};
use crate::error::Result;
use crate::report::baselines::{CurvePoint, EqualLoss, Reached};
use crate::report::steps::read_steps;
use crate::units::{Joules, MicroJoules};

/// Points of a curve in a report, about; all evaluations are among them.
const MAX_POINTS: usize = 300;
/// Evaluations that the power law is fitted to.
const FITTED: usize = 4;
/// Extrapolations beyond this multiple of the training energy are dropped.
const MAX_EXTRAPOLATION: f64 = 100.0;

/// One point before the first step and one after each.
#[derive(Debug, Default)]
pub(super) struct LossCurve(Vec<CurvePoint>);

impl LossCurve {
    /// From steps.jsonl and ledger.jsonl, on the meter `kind`; `before` is the validation loss before the first step. Of a step
    /// repeated after a crash the last entry counts; gaps of a counter are filled.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(super) fn read(
        steps: &Path,
        ledger: &Path,
        before: Option<f64>,
        kind: MeterKind,
    ) -> Result<Self> {
        let start = CurvePoint {
            step: 0,
            energy_j: Joules::ZERO,
            train_loss: None,
            val_loss: before,
        };
        let steps = if steps.exists() {
            read_steps(steps)?
        } else {
            Vec::new()
        };
        let entries = read_entries(ledger)?;
        let training = entries.iter().filter(|entry| entry.phase == Phase::Train);
        let energies: BTreeMap<u64, MicroJoules> =
            training.map(|entry| (entry.step, entry.on(kind))).collect();
        let mut spent = MicroJoules::ZERO;
        let points = steps.iter().map(|step| {
            spent += energies.get(&step.step).copied().unwrap_or_default();
            CurvePoint {
                step: step.step,
                energy_j: spent.joules(),
                train_loss: step.loss,
                val_loss: step.val_loss,
            }
        });
        Ok(Self(std::iter::once(start).chain(points).collect()))
    }

    fn evaluations(&self) -> impl Iterator<Item = (Joules, f64)> + '_ {
        self.0.iter().filter_map(|point| {
            Some((
                point.energy_j,
                point.val_loss.filter(|loss| loss.is_finite())?,
            ))
        })
    }

    /// Validation loss after `step` steps, if evaluated there.
    pub(super) fn val_loss_at(&self, step: u64) -> Option<f64> {
        self.0.iter().find(|point| point.step == step)?.val_loss
    }

    /// Training energy.
    pub(super) fn trained(&self) -> Joules {
        self.0.last().map_or(Joules::ZERO, |point| point.energy_j)
    }

    /// At most about `MAX_POINTS` points.
    pub(super) fn thinned(self) -> Vec<CurvePoint> {
        let stride = self.0.len().div_ceil(MAX_POINTS).max(1);
        let last = self.0.len().saturating_sub(1);
        let kept = self.0.into_iter().enumerate();
        kept.filter(|(index, point)| {
            index % stride == 0 || *index == last || point.val_loss.is_some()
        })
        .map(|(_, point)| point)
        .collect()
    }
}

/// The energy to `target`: of the first evaluation at or below it, else extrapolated by the power law through the last
/// evaluations, else none. `run` is the run's training energy.
pub(super) fn to_equal_loss(curve: &LossCurve, target: f64, run: Joules) -> EqualLoss {
    let trained = curve.trained();
    let reached = curve
        .evaluations()
        .find(|(_, loss)| *loss <= target)
        .map(|(energy, _)| energy);
    let (how, energy_j) = match reached {
        Some(energy) => (Reached::Measured, Some(energy)),
        None => match power_law(&curve.evaluations().collect::<Vec<_>>(), target) {
            Some(energy) if energy <= trained * MAX_EXTRAPOLATION => {
                (Reached::Extrapolated, Some(energy.max(trained)))
            }
            _ => (Reached::No, None),
        },
    };
    let times = energy_j
        .map(|energy| energy / run)
        .filter(|times| times.is_finite());
    EqualLoss {
        how,
        energy_j,
        times,
        tried_j: trained,
    }
}

/// The energy at which `loss = a energy^b`, fitted to the last evaluations by least squares in logarithms, is `target`; `None`
/// with too few evaluations or a loss that does not fall.
fn power_law(evaluations: &[(Joules, f64)], target: f64) -> Option<Joules> {
    let logs: Vec<(f64, f64)> = evaluations
        .iter()
        .filter(|(energy, loss)| energy.0 > 0.0 && *loss > 0.0)
        .map(|(e, loss)| (e.0.ln(), loss.ln()))
        .collect();
    let last = &logs[logs.len().checked_sub(FITTED)?..];
    let count = last.len() as f64;
    let x = last.iter().map(|p| p.0).sum::<f64>() / count;
    let y = last.iter().map(|p| p.1).sum::<f64>() / count;
    let slope = last.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>()
        / last.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
    let energy = (x + (target.ln() - y) / slope).exp();
    (slope < 0.0 && energy.is_finite()).then_some(Joules(energy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64, energy: f64, val_loss: Option<f64>) -> CurvePoint {
        CurvePoint {
            step,
            energy_j: Joules(energy),
            train_loss: Some(5.0),
            val_loss,
        }
    }

    fn curve(evaluations: &[(f64, f64)]) -> LossCurve {
        let points = (1..)
            .zip(evaluations)
            .map(|(step, (energy, loss))| point(step, *energy, Some(*loss)));
        LossCurve(
            std::iter::once(point(0, 0.0, Some(6.0)))
                .chain(points)
                .collect(),
        )
    }

    /// loss = 8 energy^-1/2: 4, 2, 1, 1/2 at 4, 16, 64, 256 J. It comes to 1/4 at 1024 J, to 1/20 at 25 600 J = 100 times 256 J, and to
    /// less only beyond.
    const HALVING: [(f64, f64); 4] = [(4.0, 4.0), (16.0, 2.0), (64.0, 1.0), (256.0, 0.5)];

    fn to(target: f64) -> (Reached, Option<f64>) {
        let equal = to_equal_loss(&curve(&HALVING), target, Joules(64.0));
        assert_eq!(equal.times, equal.energy_j.map(|energy| energy.0 / 64.0));
        (equal.how, equal.energy_j.map(|energy| energy.0))
    }

    #[test]
    fn a_loss_is_reached_or_extrapolated_or_neither() {
        assert_eq!(to(1.0), (Reached::Measured, Some(64.0)));
        assert_eq!(to(1.5), (Reached::Measured, Some(64.0)));
        let (how, energy) = to(0.25);
        assert!(
            how == Reached::Extrapolated && (energy.unwrap() - 1024.0).abs() < 1e-6,
            "{energy:?}"
        );
        assert_eq!(to(0.0501).0, Reached::Extrapolated);
        assert_eq!(to(0.0499), (Reached::No, None));
        // A loss that rises, and too few evaluations.
        let rising = curve(&[(1.0, 1.0), (2.0, 1.1), (3.0, 1.2), (4.0, 1.3)]);
        assert_eq!(to_equal_loss(&rising, 0.5, Joules(4.0)).how, Reached::No);
        assert_eq!(
            to_equal_loss(&curve(&[(1.0, 4.0)]), 0.5, Joules(4.0)).how,
            Reached::No
        );
    }

    #[test]
    fn an_extrapolation_is_never_less_than_what_was_tried() {
        // The last point lies above the fit, which would already be below the target there.
        let bent = curve(&[(1.0, 8.0), (2.0, 4.0), (4.0, 1.0), (8.0, 1.2)]);
        let equal = to_equal_loss(&bent, 0.9, Joules(4.0));
        assert_eq!(
            (equal.how, equal.energy_j),
            (Reached::Extrapolated, Some(Joules(8.0)))
        );
    }

    /// A line of steps.jsonl, and an entry of the ledger for it.
    fn line(step: u64) -> String {
        format!(
            "{{\"step\":{step},\"loss\":2.5,\"lr\":0.1,\"grad_norm\":1.0,\"tokens\":9,\"loss_tokens\":9,\"flops\":1,\
             \"energy_j\":{{\"counted\":1.0,\"measured\":null,\"timed\":1.0}},\"wall_s\":1.0}}\n"
        )
    }

    fn entry(phase: &str, step: u64, measured: &str, gap: &str) -> String {
        format!(
            "{{\"phase\":\"{phase}\",\"step\":{step},\"energy_j\":{{\"counted\":1.0,\"measured\":{measured},\"timed\":9.0}},\
             \"flops\":1,\"bytes\":{{}},\"wall_s\":1.0,\"t\":0.0{gap}}}\n"
        )
    }

    #[test]
    fn a_curve_is_what_the_ledger_says_with_gaps_filled_and_steps_done_again_once() {
        let folder = tempfile::tempdir().unwrap();
        let (steps, ledger) = (
            folder.path().join("steps.jsonl"),
            folder.path().join("ledger.jsonl"),
        );
        std::fs::write(&steps, (1..=3).map(line).collect::<String>()).unwrap();
        let gap =
            ",\"gap\":{\"reason\":\"reset\",\"filled\":\"counted\",\"times\":7.0,\"energy_j\":7.0}";
        // Step 2 was done, lost with the process and done again; in step 3 the counter failed; an evaluation is no training.
        let entries = [
            entry("train", 1, "3.0", ""),
            entry("train", 2, "100.0", ""),
            entry("eval", 2, "50.0", ""),
            entry("train", 2, "4.0", ""),
            entry("train", 3, "null", gap),
        ];
        std::fs::write(&ledger, entries.concat()).unwrap();
        let read = |kind| LossCurve::read(&steps, &ledger, Some(6.0), kind).unwrap();
        let energies = |kind| {
            read(kind)
                .0
                .iter()
                .map(|point| point.energy_j.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(energies(MeterKind::Measured), [0.0, 3.0, 7.0, 14.0]);
        assert_eq!(energies(MeterKind::Counted), [0.0, 1.0, 2.0, 3.0]);
        let curve = read(MeterKind::Measured);
        assert_eq!(
            (curve.trained(), curve.val_loss_at(0), curve.val_loss_at(1)),
            (Joules(14.0), Some(6.0), None)
        );
        // Without a step there is the beginning alone.
        let none = LossCurve::read(
            &folder.path().join("none"),
            &ledger,
            None,
            MeterKind::Counted,
        )
        .unwrap();
        assert_eq!((none.0.len(), none.trained()), (1, Joules::ZERO));
    }

    #[test]
    fn a_long_curve_keeps_its_evaluations_and_its_ends() {
        let evaluated = |step: u64| (step % 100 == 7).then_some(0.5);
        let long = LossCurve(
            (0..=1000)
                .map(|step| point(step, step as f64, evaluated(step)))
                .collect(),
        );
        let points = long.thinned();
        assert!(points.len() < 350, "{}", points.len());
        assert_eq!(
            points
                .iter()
                .filter(|point| point.val_loss == Some(0.5))
                .count(),
            10
        );
        // The point of step 0 counts as the first.
        assert_eq!((points[0].step, points[points.len() - 1].step), (0, 1000));
    }
}
