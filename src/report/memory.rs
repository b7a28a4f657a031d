//! The `memory` block of `report.json`, and its section: what a run was forecast to take, and the peak that was seen.
//!
//! Owns the block and the names of its parts; the page and the chart share them. Takes sizes, returns them in rows. Knows nothing of how
//! a forecast is made.

use serde::{Deserialize, Serialize};

use super::page::{Block, pairs};
use super::show;
use super::types::Report;
use crate::units::Bytes;

/// The `memory` block: the forecast's parts; what was really taken is `training.peak_rss_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All parts together.
    pub peak_bytes: Bytes,
    /// Frozen weights.
    pub weights: Bytes,
    /// Trained values, moments and gradients.
    pub trained: Bytes,
    /// What the backward pass keeps of the forward pass.
    pub activations: Bytes,
    /// Chunks of logits and the largest temporaries.
    pub temporaries: Bytes,
    /// The program itself.
    pub program: Bytes,
    /// What was free when the forecast was made; `None` afterwards, where it says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<Bytes>,
}

/// The section: the peak that was seen beside the forecast and its parts.
pub(super) fn blocks(report: &Report) -> Vec<Block> {
    let seen = (
        "peak of the process",
        show::or_unknown(report.training.peak_rss_bytes, |bytes| bytes.to_string()),
    );
    let mut rows = vec![seen];
    rows.extend(
        report
            .memory
            .iter()
            .flat_map(named)
            .map(|(name, bytes)| (name, bytes.to_string())),
    );
    vec![pairs(["memory", "size"], rows)]
}

/// The forecast and what it is made of, by name.
pub(super) fn named(memory: &Memory) -> [(&'static str, Bytes); 6] {
    [
        ("forecast, all", memory.peak_bytes),
        ("forecast, weights", memory.weights),
        ("forecast, what is trained", memory.trained),
        ("forecast, activations", memory.activations),
        ("forecast, logits and temporaries", memory.temporaries),
        ("forecast, the program", memory.program),
    ]
}
