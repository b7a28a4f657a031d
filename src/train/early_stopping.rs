//! When the fall of the validation loss no longer pays for going on.
//!
//! Takes losses and the energy spent up to each, returns whether the run ends. Its state is part of a checkpoint.

use serde::{Deserialize, Serialize};

use crate::units::Joules;

/// The rule, as transformers' `EarlyStoppingCallback` has it, with its threshold on the energy axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations in a row without a lower loss that end the run.
    pub patience: u64,
    /// Fall in nats per kilojoule spent since the lowest loss that counts as lower.
    pub gain_per_kj: f64,
}

/// The lowest loss so far, and how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Waited {
    lowest: Option<f64>,
    /// Spent when it was reached.
    lowest_j: f64,
    evaluations: u64,
}

impl EarlyStopping {
    /// Notes an evaluation after `spent`.
    pub fn note(&self, waited: &mut Waited, val_loss: f64, spent: Joules) {
        let is_lower = waited.lowest.is_none_or(|lowest| {
            let kilojoules = (spent.0 - waited.lowest_j) / 1000.0;
            val_loss < lowest && lowest - val_loss >= self.gain_per_kj * kilojoules
        });
        if is_lower {
            *waited = Waited {
                lowest: Some(val_loss),
                lowest_j: spent.0,
                evaluations: 0,
            };
        } else {
            waited.evaluations += 1;
        }
    }

    /// Whether the run ends.
    pub fn is_over(&self, waited: &Waited) -> bool {
        waited.evaluations >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the run is over after each (loss, joules).
    fn course(rule: EarlyStopping, evaluations: &[(f64, f64)]) -> Vec<bool> {
        let mut waited = Waited::default();
        let over = evaluations.iter().map(|(loss, joules)| {
            rule.note(&mut waited, *loss, Joules(*joules));
            rule.is_over(&waited)
        });
        over.collect()
    }

    #[test]
    fn patience_counts_evaluations_since_the_lowest_loss() {
        let rule = EarlyStopping {
            patience: 2,
            gain_per_kj: 0.0,
        };
        let losses = [3.0, 2.0, 2.5, 1.9, 1.9, 2.0].map(|loss| (loss, 0.0));
        assert_eq!(
            course(rule, &losses),
            [false, false, false, false, false, true]
        );
    }

    /// 0.5 nats for a kilojoule suffice, 0.4 for another do not, 1.0 for the two together do.
    #[test]
    fn a_fall_counts_by_the_energy_it_took() {
        let rule = EarlyStopping {
            patience: 2,
            gain_per_kj: 0.5,
        };
        let paid = [(3.0, 0.0), (2.5, 1000.0), (2.1, 2000.0), (1.5, 3000.0)];
        assert_eq!(course(rule, &paid), [false; 4]);
        let slow = [(3.0, 0.0), (2.8, 1000.0), (2.6, 2000.0)];
        assert_eq!(course(rule, &slow), [false, false, true]);
    }
}
