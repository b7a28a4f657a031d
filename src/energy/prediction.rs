//! Prediction of metered energy and wall time from recent entries.
//!
//! Keeps the ratios of observed to charged amounts of the last [`WINDOW`] entries of each phase. An
//! entry in which a counter did not move is judged together with the one in which it does.
//! The upper bound is the charge-weighted mean plus three standard deviations: weighted, so that
//! small noisy entries do not inflate large ones.

use std::collections::VecDeque;

use super::entry::Phase;

/// Entries of a phase that a prediction is based on.
const WINDOW: usize = 20;

/// Statistic of the recent ratios.
#[derive(Debug, Clone, Copy)]
pub(super) enum Statistic {
    Mean,
    /// Mean plus three (population) standard deviations.
    UpperBound,
}

/// An observed-to-charged ratio, weighted by the charge.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    ratio: f64,
    charged: f64,
}

impl Sample {
    pub fn new(ratio: f64, charged: f64) -> Sample {
        Sample { ratio, charged }
    }
}

/// The most recent samples.
#[derive(Debug, Clone, Default)]
struct Window(VecDeque<Sample>);

impl Window {
    /// Adds a sample unless its ratio is undefined.
    fn push(&mut self, sample: Sample) {
        if sample.ratio.is_finite() && sample.charged > 0.0 {
            self.0.push_back(sample);
        }
        if self.0.len() > WINDOW {
            self.0.pop_front();
        }
    }

    /// `None` without samples.
    fn statistic(&self, statistic: Statistic) -> Option<f64> {
        let mean = self.weighted_mean(|ratio| ratio)?;
        match statistic {
            Statistic::Mean => Some(mean),
            Statistic::UpperBound => {
                let variance = self.weighted_mean(|ratio| (ratio - mean).powi(2))?;
                Some(mean + 3.0 * variance.sqrt())
            }
        }
    }

    fn weighted_mean(&self, f: impl Fn(f64) -> f64) -> Option<f64> {
        let total: f64 = self.0.iter().map(|sample| sample.charged).sum();
        let sum: f64 = self
            .0
            .iter()
            .map(|sample| f(sample.ratio) * sample.charged)
            .sum();
        (total > 0.0).then(|| sum / total)
    }
}

/// Recent ratios of every phase. A phase without samples takes those of training.
#[derive(Debug, Clone, Default)]
pub(super) struct Predictor {
    energy: [Window; Phase::ALL.len()],
    time: [Window; Phase::ALL.len()],
    /// Charges of the entries since the counters last moved.
    unshown: f64,
}

impl Predictor {
    /// Adds an entry's ratios of metered to counted energy and of wall to roofline time.
    pub fn record(&mut self, phase: Phase, energy: Sample, time: Sample) {
        self.time[phase as usize].push(time);
        if energy.ratio == 0.0 {
            self.unshown += energy.charged;
            return;
        }
        let unshown = if energy.ratio.is_finite() {
            std::mem::take(&mut self.unshown)
        } else {
            0.0
        };
        let charged = energy.charged + unshown;
        let ratio = energy.ratio * energy.charged / charged;
        self.energy[phase as usize].push(Sample::new(ratio, charged));
    }

    /// Counted joules of the entries that the counters have not shown yet.
    pub fn unshown(&self) -> f64 {
        self.unshown
    }

    /// Metered over counted energy of a phase.
    pub fn energy_ratio(&self, phase: Phase, statistic: Statistic) -> Option<f64> {
        ratio(&self.energy, phase, statistic)
    }

    /// Wall time over roofline time of a phase.
    pub fn time_ratio(&self, phase: Phase, statistic: Statistic) -> Option<f64> {
        ratio(&self.time, phase, statistic)
    }

    /// Whether the wall time of any training step is known.
    pub fn knows_step_time(&self) -> bool {
        !self.time[Phase::Train as usize].0.is_empty()
    }
}

fn ratio(windows: &[Window], phase: Phase, statistic: Statistic) -> Option<f64> {
    let own = windows[phase as usize].statistic(statistic);
    own.or_else(|| windows[Phase::Train as usize].statistic(statistic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upper_bound(samples: &[(f64, f64)]) -> Option<f64> {
        let mut window = Window::default();
        for (ratio, charged) in samples {
            window.push(Sample::new(*ratio, *charged));
        }
        window.statistic(Statistic::UpperBound)
    }

    #[test]
    fn entries_that_a_slow_counter_has_not_shown_are_judged_with_the_next() {
        // Ten steps of one joule each, shown as 30 at the tenth: three times the counted energy.
        let mut predictor = Predictor::default();
        for step in 1..=10 {
            let shown = if step == 10 { 30.0 } else { 0.0 };
            assert_eq!(predictor.unshown(), (step - 1) as f64);
            predictor.record(Phase::Train, Sample::new(shown, 1.0), Sample::new(1.0, 1.0));
        }
        let bound = predictor.energy_ratio(Phase::Train, Statistic::UpperBound);
        assert_eq!((bound, predictor.unshown()), (Some(3.0), 0.0));
    }

    #[test]
    fn the_upper_bound_is_weighted_by_charge() {
        // 97 parts at ratio 28 and 3 at 100: the mean is 30.16, the variance 97 % of 2.16 squared +
        // 3 % of 69.84 squared = 150.9.
        let bound = upper_bound(&[(28.0, 0.97), (100.0, 0.03)]).unwrap();
        let expected = 30.16 + 3.0 * (0.97 * 2.16_f64.powi(2) + 0.03 * 69.84_f64.powi(2)).sqrt();
        assert!((bound - expected).abs() < 1e-9);
        // Entries of one size have equal weight: 2 and 4 have mean 3 and deviation 1.
        assert_eq!(upper_bound(&[(2.0, 0.1), (4.0, 0.1)]), Some(6.0));
        assert_eq!(upper_bound(&[]), None);
    }
}
