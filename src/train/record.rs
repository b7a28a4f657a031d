//! The record of a step and the reason a run stopped, as written to `steps.jsonl` and
//! `report.json`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::energy::{Limit, Reading};
use crate::units::{Joules, Seconds};

/// Energy of one step by meter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepEnergy {
    /// Executed work times the device profile.
    pub counted: Joules,
    /// Hardware counters, where the machine has any.
    pub measured: Option<Joules>,
    /// Profile power times wall time.
    pub timed: Option<Joules>,
}

impl From<&Reading> for StepEnergy {
    fn from(reading: &Reading) -> Self {
        let energies = reading.energies();
        Self {
            counted: energies.counted.joules(),
            measured: energies.measured.map(|energy| energy.joules()),
            timed: Some(energies.timed.joules()),
        }
    }
}

/// One line of `steps.jsonl`. A loss or norm that is not finite is `null` in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Step number, from 1.
    pub step: u64,
    /// Nats per loss token over the step's batch, before the update.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens in the batch.
    pub tokens: u64,
    /// Tokens with a loss.
    pub loss_tokens: u64,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// Joules by meter.
    pub energy_j: StepEnergy,
    /// Wall time of the step.
    pub wall_s: Seconds,
    /// Validation loss, on the steps followed by an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// Why a run stopped; `stop_reason` in the files, such as `steps` or `budget:energy`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Stop {
    /// All steps were done.
    Steps,
    /// All epochs were done.
    Epochs,
    /// The next step would have exceeded this budget.
    Budget(Limit),
    /// The validation loss fell too little.
    EarlyStopping,
    /// Interrupted by the user.
    Interrupted,
    /// A loss or gradient was not finite; the text names step and records, and is not part of the
    /// files.
    Diverged(String),
}

impl Stop {
    /// Every reason, in the order of the recipe reference.
    const ALL: [Stop; 10] = [
        Stop::Steps,
        Stop::Epochs,
        Stop::Budget(Limit::Energy),
        Stop::Budget(Limit::Carbon),
        Stop::Budget(Limit::Flops),
        Stop::Budget(Limit::Time),
        Stop::Budget(Limit::Cost),
        Stop::EarlyStopping,
        Stop::Interrupted,
        Stop::Diverged(String::new()),
    ];

    /// The budget that stopped the run.
    pub fn budget(&self) -> Option<Limit> {
        match self {
            Stop::Budget(limit) => Some(*limit),
            _ => None,
        }
    }

    /// Whether the run reached its end: steps, epochs, a budget or a loss that falls no more.
    pub fn is_regular(&self) -> bool {
        !matches!(self, Stop::Interrupted | Stop::Diverged(_))
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Steps => f.write_str("steps"),
            Stop::Epochs => f.write_str("epochs"),
            Stop::Budget(limit) => write!(f, "budget:{}", limit.as_str()),
            Stop::EarlyStopping => f.write_str("early_stopping"),
            Stop::Interrupted => f.write_str("interrupted"),
            Stop::Diverged(_) => f.write_str("diverged"),
        }
    }
}

impl From<Stop> for String {
    fn from(stop: Stop) -> Self {
        stop.to_string()
    }
}

impl FromStr for Stop {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|stop| stop.to_string() == text);
        known.ok_or_else(|| {
            let all = Self::ALL.map(|stop| stop.to_string()).join(", ");
            format!("`{text}` is not a stop reason: one of {all}")
        })
    }
}

impl TryFrom<String> for Stop {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_reasons_are_the_contracts_and_round_trip() {
        // Typed from the contract, in its order.
        let contract = "steps epochs budget:energy budget:carbon budget:flops budget:time budget:cost early_stopping interrupted diverged";
        let ours: Vec<_> = Stop::ALL
            .iter()
            .map(|stop| serde_json::to_value(stop).unwrap())
            .collect();
        assert_eq!(ours, contract.split(' ').collect::<Vec<_>>());
        for (stop, word) in Stop::ALL.into_iter().zip(ours) {
            assert_eq!(serde_json::from_value::<Stop>(word).unwrap(), stop);
        }
        assert!(serde_json::from_value::<Stop>("budget:joules".into()).is_err());
        assert_eq!(Stop::Budget(Limit::Time).budget(), Some(Limit::Time));
        assert_eq!(Stop::Steps.budget(), None);
    }
}
