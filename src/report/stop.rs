//! Why a run ended: the contract's nine words.
//!
//! Owns the words and nothing else: takes one, gives one back, and refuses every other. Knows nothing of budgets or loops.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why training stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
pub enum StopReason {
    /// The recipe's number of steps.
    Steps,
    /// The recipe's number of epochs.
    Epochs,
    /// One more step would have passed the energy budget.
    BudgetEnergy,
    /// One more step would have passed the carbon budget.
    BudgetCarbon,
    /// One more step would have passed the FLOP budget.
    BudgetFlops,
    /// One more step would have passed the time budget.
    BudgetTime,
    /// One more step would have passed the money budget.
    BudgetCost,
    /// Somebody asked it to.
    Interrupted,
    /// A loss or a gradient was not finite.
    Diverged,
}

/// The one place where each word stands.
const WORDS: [(StopReason, &str); 9] = [
    (StopReason::Steps, "steps"),
    (StopReason::Epochs, "epochs"),
    (StopReason::BudgetEnergy, "budget:energy"),
    (StopReason::BudgetCarbon, "budget:carbon"),
    (StopReason::BudgetFlops, "budget:flops"),
    (StopReason::BudgetTime, "budget:time"),
    (StopReason::BudgetCost, "budget:cost"),
    (StopReason::Interrupted, "interrupted"),
    (StopReason::Diverged, "diverged"),
];

impl StopReason {
    /// The contract's word.
    pub fn as_str(self) -> &'static str {
        WORDS
            .iter()
            .find(|(reason, _)| *reason == self)
            .map_or("", |(_, word)| word)
    }

    /// Which budget stopped the run (`energy`, `carbon`, `flops`, `time`, `cost`), if one did.
    pub fn budget(self) -> Option<&'static str> {
        self.as_str().strip_prefix("budget:")
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<StopReason> for &'static str {
    fn from(reason: StopReason) -> Self {
        reason.as_str()
    }
}

impl FromStr for StopReason {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known = || WORDS.map(|(_, word)| word).join(", ");
        let found = WORDS.iter().find(|(_, word)| *word == text);
        found
            .map(|(reason, _)| *reason)
            .ok_or_else(|| format!("`{text}` is not a stop reason: one of {}", known()))
    }
}

impl TryFrom<String> for StopReason {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_the_contracts_and_comes_back() {
        // Typed from the contract, in its order.
        let contract = "steps epochs budget:energy budget:carbon budget:flops budget:time budget:cost interrupted diverged";
        let ours: Vec<_> = WORDS
            .iter()
            .map(|(reason, _)| serde_json::to_value(reason).unwrap())
            .collect();
        assert_eq!(ours, contract.split(' ').collect::<Vec<_>>());
        for (reason, word) in WORDS {
            assert_eq!(
                serde_json::from_value::<StopReason>(word.into()).unwrap(),
                reason
            );
        }
        assert!(serde_json::from_value::<StopReason>("budget:joules".into()).is_err());
        assert_eq!(StopReason::BudgetTime.budget(), Some("time"));
        assert_eq!(StopReason::Steps.budget(), None);
    }
}
