//! The learning rate as a pure function of progress.

use clap::ValueEnum;
use serde::Serialize;

/// The shape of the decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Linear decay to zero.
    Linear,
    /// Cosine decay to zero.
    Cosine,
    /// No decay.
    Constant,
}

/// A learning rate over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub peak: f64,
    /// Shape of the decay.
    pub decay: Decay,
    /// Steps of the run.
    pub steps: u64,
    /// Steps of the linear warm-up.
    pub warmup_steps: u64,
}

impl Schedule {
    /// The rate at `progress` (0 at the start, 1 at the end). At `step / steps` it equals
    /// transformers' schedule of the same name.
    ///
    /// ```
    /// use wattune::train::{Decay, Schedule};
    /// let schedule = Schedule { peak: 1.0, decay: Decay::Linear, steps: 10, warmup_steps: 2 };
    /// assert_eq!([0.0, 0.1, 0.2, 0.6, 1.0].map(|p| schedule.lr(p)), [0.0, 0.5, 1.0, 0.5, 0.0]);
    /// ```
    pub fn lr(&self, progress: f64) -> f64 {
        let position = progress * self.steps as f64;
        let warmup = self.warmup_steps as f64;
        if position < warmup {
            return self.peak * position / warmup;
        }
        let left = self.steps as f64 - warmup;
        let share = if left > 0.0 {
            ((position - warmup) / left).min(1.0)
        } else {
            1.0
        };
        match self.decay {
            Decay::Linear => self.peak * (1.0 - share),
            Decay::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()),
            Decay::Constant => self.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// transformers 5.23, get_{linear,cosine}_schedule_with_warmup(optimizer(lr=1), 3, 12): the
    /// rates of steps 0..12, by
    /// `[scheduler.get_last_lr()[0] for _ in range(12) if (optimizer.step(), scheduler.step()) or True]`
    /// from the first.
    #[test]
    fn rates_are_those_of_transformers() {
        let linear = [
            0.0,
            1.0 / 3.0,
            2.0 / 3.0,
            1.0,
            8.0 / 9.0,
            7.0 / 9.0,
            6.0 / 9.0,
            5.0 / 9.0,
            4.0 / 9.0,
            3.0 / 9.0,
            2.0 / 9.0,
            1.0 / 9.0,
        ];
        let cosine = [
            0.0, 0.333333, 0.666667, 1.0, 0.969846, 0.883022, 0.75, 0.586824, 0.413176, 0.25,
            0.116978, 0.030154,
        ];
        for (decay, expected) in [(Decay::Linear, linear), (Decay::Cosine, cosine)] {
            let schedule = Schedule {
                peak: 1.0,
                decay,
                steps: 12,
                warmup_steps: 3,
            };
            for (step, expected) in expected.iter().enumerate() {
                let lr = schedule.lr(step as f64 / 12.0);
                assert!(
                    (lr - expected).abs() < 1e-6,
                    "{decay:?} step {step}: {lr}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn a_constant_rate_only_rises() {
        let schedule = Schedule {
            peak: 2.0,
            decay: Decay::Constant,
            steps: 4,
            warmup_steps: 2,
        };
        assert_eq!(
            [0.0, 0.25, 0.5, 1.0].map(|p| schedule.lr(p)),
            [0.0, 1.0, 2.0, 2.0]
        );
    }
}
