//! Loss against training energy, and the energy to a given loss.
//!
//! Takes what a loop reported, returns points for the report and the energy at which a loss was reached, or would be. Knows nothing of
//! models.

use crate::report::StepRecord;
use crate::report::measured::{CurvePoint, EqualLoss, Reached};
use crate::report::types::Meter;
use crate::units::Joules;

/// Points of a curve in a report, at most about so many; every evaluation stays.
const MOST: usize = 300;
/// Evaluations that an extrapolation goes through.
const FITTED: usize = 4;
/// An extrapolation beyond so many times what was trained says nothing.
const FARTHEST: f64 = 100.0;

/// A baseline's course.
#[derive(Debug, Default)]
pub(super) struct Curve(Vec<CurvePoint>);

impl Curve {
    /// A step was done, after which training had spent `energy_j`.
    pub(super) fn step(&mut self, step: u64, energy_j: Joules, loss: f64) {
        self.0.push(CurvePoint { step, energy_j, train_loss: Some(loss), val_loss: None });
    }

    /// An evaluation after `step` steps.
    pub(super) fn evaluated(&mut self, step: u64, val_loss: f64) {
        match self.0.last_mut() {
            Some(point) => point.val_loss = Some(val_loss),
            None => self.0.push(CurvePoint { step, energy_j: Joules::ZERO, train_loss: None, val_loss: Some(val_loss) }),
        }
    }

    fn evaluations(&self) -> impl Iterator<Item = (Joules, f64)> + '_ {
        self.0.iter().filter_map(|point| Some((point.energy_j, point.val_loss.filter(|loss| loss.is_finite())?)))
    }

    /// Few enough points for a report.
    pub(super) fn thinned(self) -> Vec<CurvePoint> {
        thinned(self.0)
    }
}

fn thinned(points: Vec<CurvePoint>) -> Vec<CurvePoint> {
    let (stride, last) = (points.len().div_ceil(MOST).max(1), points.len().saturating_sub(1));
    let kept = points.into_iter().enumerate();
    kept.filter(|(index, point)| index % stride == 0 || *index == last || point.val_loss.is_some())
        .map(|(_, point)| point)
        .collect()
}

/// The run's own curve, from its steps and its first validation loss, on `meter`.
pub(in crate::run) fn of_steps(steps: &[StepRecord], before: Option<f64>, meter: Meter) -> Vec<CurvePoint> {
    let start = CurvePoint { step: 0, energy_j: Joules::ZERO, train_loss: None, val_loss: before };
    let energy = |step: &StepRecord| match meter {
        Meter::Counted => Some(step.energy_j.counted),
        Meter::Measured => step.energy_j.measured,
        Meter::Timed => step.energy_j.timed,
    };
    let mut spent = Joules::ZERO;
    let points = steps.iter().map(|step| {
        spent += energy(step).unwrap_or_default();
        CurvePoint { step: step.step, energy_j: spent, train_loss: step.loss, val_loss: step.val_loss }
    });
    thinned(std::iter::once(start).chain(points).collect())
}

/// The energy to `target`: where an evaluation was at or below it, else where the power law through the last evaluations would be, else
/// nothing. `trained` joules were tried; `run` is what the run's training took.
pub(super) fn to_equal_loss(curve: &Curve, target: f64, trained: Joules, run: Joules) -> EqualLoss {
    let reached = curve.evaluations().find(|(_, loss)| *loss <= target).map(|(energy, _)| energy);
    let (how, energy_j) = match reached {
        Some(energy) => (Reached::Measured, Some(energy)),
        None => match power_law(&curve.evaluations().collect::<Vec<_>>(), target) {
            Some(energy) if energy <= trained * FARTHEST => (Reached::Extrapolated, Some(energy.max(trained))),
            _ => (Reached::No, None),
        },
    };
    let times = energy_j.map(|energy| energy / run).filter(|times| times.is_finite());
    EqualLoss { how, energy_j, times, tried_j: trained }
}

/// The energy at which `loss = a energy^b` through the last evaluations, by least squares in logarithms, comes to `target`; `None` where
/// there are too few or where the loss does not fall.
fn power_law(evaluations: &[(Joules, f64)], target: f64) -> Option<Joules> {
    let logs: Vec<(f64, f64)> = evaluations
        .iter()
        .filter(|(energy, loss)| energy.0 > 0.0 && *loss > 0.0)
        .map(|(e, loss)| (e.0.ln(), loss.ln()))
        .collect();
    let last = &logs[logs.len().checked_sub(FITTED)?..];
    let count = last.len() as f64;
    let (x, y) = (last.iter().map(|p| p.0).sum::<f64>() / count, last.iter().map(|p| p.1).sum::<f64>() / count);
    let slope = last.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / last.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
    let energy = (x + (target.ln() - y) / slope).exp();
    (slope < 0.0 && energy.is_finite()).then_some(Joules(energy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(evaluations: &[(f64, f64)]) -> Curve {
        let mut curve = Curve::default();
        curve.evaluated(0, 6.0);
        for (index, (energy, loss)) in evaluations.iter().enumerate() {
            curve.step(index as u64 + 1, Joules(*energy), 5.0);
            curve.evaluated(index as u64 + 1, *loss);
        }
        curve
    }

    /// loss = 8 energy^-1/2: 4, 2, 1, 1/2 at 4, 16, 64, 256 J. It comes to 1/4 at 1024 J, to 1/20 at 25 600 J = 100 times 256 J, and to
    /// less only beyond.
    const HALVING: [(f64, f64); 4] = [(4.0, 4.0), (16.0, 2.0), (64.0, 1.0), (256.0, 0.5)];

    fn to(target: f64) -> (Reached, Option<f64>) {
        let equal = to_equal_loss(&curve(&HALVING), target, Joules(256.0), Joules(64.0));
        assert_eq!(equal.times, equal.energy_j.map(|energy| energy.0 / 64.0));
        (equal.how, equal.energy_j.map(|energy| energy.0))
    }

    #[test]
    fn a_loss_is_reached_or_extrapolated_or_neither() {
        assert_eq!(to(1.0), (Reached::Measured, Some(64.0)));
        assert_eq!(to(1.5), (Reached::Measured, Some(64.0)));
        let (how, energy) = to(0.25);
        assert!(how == Reached::Extrapolated && (energy.unwrap() - 1024.0).abs() < 1e-6, "{energy:?}");
        assert_eq!(to(0.0501).0, Reached::Extrapolated);
        assert_eq!(to(0.0499), (Reached::No, None));
        // A loss that rises, and too few evaluations.
        let rising = curve(&[(1.0, 1.0), (2.0, 1.1), (3.0, 1.2), (4.0, 1.3)]);
        assert_eq!(to_equal_loss(&rising, 0.5, Joules(4.0), Joules(4.0)).how, Reached::No);
        assert_eq!(to_equal_loss(&curve(&[(1.0, 4.0)]), 0.5, Joules(1.0), Joules(4.0)).how, Reached::No);
    }

    #[test]
    fn an_extrapolation_is_never_less_than_what_was_tried() {
        // The last point lies above the fit, which would already be below the target there.
        let bent = curve(&[(1.0, 8.0), (2.0, 4.0), (4.0, 1.0), (8.0, 1.2)]);
        let equal = to_equal_loss(&bent, 0.9, Joules(8.0), Joules(4.0));
        assert_eq!((equal.how, equal.energy_j), (Reached::Extrapolated, Some(Joules(8.0))));
    }

    #[test]
    fn a_long_curve_keeps_its_evaluations_and_its_ends() {
        let mut long = Curve::default();
        long.evaluated(0, 6.0);
        for step in 1..=1000 {
            long.step(step, Joules(step as f64), 1.0);
            if step % 100 == 7 {
                long.evaluated(step, 0.5);
            }
        }
        let points = long.thinned();
        assert!(points.len() < 350, "{}", points.len());
        assert_eq!(points.iter().filter(|point| point.val_loss == Some(0.5)).count(), 10);
        // The point of step 0 counts as the first.
        assert_eq!((points[0].step, points[points.len() - 1].step), (0, 1000));
    }
}
