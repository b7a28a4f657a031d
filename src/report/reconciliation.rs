//! Measured against counted: the block of `report.json`, and its section of the page.
//!
//! Owns the comparison phase by phase, the gaps of the counters with what fills them, and the factor that a device profile can keep.
//! Takes joules, returns the same in rows. Only entries that were measured are compared: their counted joules with their measured ones.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::page::Block;
use super::show;
use super::table::Table;
use super::types::{Meter, Phase};
use crate::units::{Joules, Seconds};

/// What the counters said beside what was counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reconciliation {
    /// The counters, and what is modelled beside them.
    pub measured_by: Vec<String>,
    /// Phase by phase, where anything was measured.
    pub by_phase: BTreeMap<Phase, Compared>,
    /// Everything that was measured; the phases' sum. `None` where nothing was.
    pub all: Option<Compared>,
    /// Where the counters failed.
    pub gaps: Vec<Gap>,
}

/// Joules of the same entries on two meters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Counted.
    pub counted_j: Joules,
    /// Measured.
    pub measured_j: Joules,
    /// Measured less counted.
    pub residual_j: Joules,
    /// Measured over counted: what `wattune calibrate --from-run` keeps of `all`. `None` where nothing was counted.
    pub ratio: Option<f64>,
}

impl Compared {
    /// The comparison of two sums.
    pub fn of(counted_j: Joules, measured_j: Joules) -> Self {
        let ratio = Some(measured_j / counted_j).filter(|ratio| ratio.is_finite());
        Self {
            counted_j,
            measured_j,
            residual_j: measured_j - counted_j,
            ratio,
        }
    }
}

/// Entries of one phase whose counters failed for one reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// In which phase.
    pub phase: Phase,
    /// Why.
    pub reason: String,
    /// How many entries.
    pub entries: u64,
    /// How long they took.
    pub wall_s: Seconds,
    /// The meter that fills them.
    pub filled: Meter,
    /// What stands in for them: the counted joules, times measured over counted as the run had shown it by then.
    pub energy_j: Joules,
}

/// What the device profile's counted joules were multiplied with, and who says so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileFactor {
    /// Measured over counted, from an earlier run.
    pub value: f64,
    /// Which run, and what measured it.
    pub source: String,
}

/// The section; nothing where there was no counter.
pub(super) fn section(found: Option<&Reconciliation>) -> Vec<Block> {
    let Some(found) = found else {
        return Vec::new();
    };
    let mut blocks = vec![Block::Paragraph(format!(
        "Measured by {}.",
        found.measured_by.join("; ")
    ))];
    if let Some(all) = found.all {
        let mut table = Table::new(&[
            "phase",
            "counted",
            "measured",
            "measured less counted",
            "ratio",
        ]);
        let mut row = |name: String, compared: &Compared| {
            let Compared {
                counted_j,
                measured_j,
                residual_j,
                ratio,
            } = *compared;
            let joules = [counted_j, measured_j, residual_j].map(show::energy);
            table.row(
                [name]
                    .into_iter()
                    .chain(joules)
                    .chain([show::or_unknown(ratio, show::number)]),
            );
        };
        found
            .by_phase
            .iter()
            .for_each(|(phase, compared)| row(show::word(phase), compared));
        row("all that was measured".to_string(), &all);
        blocks.push(Block::Table(table));
    }
    if found.gaps.is_empty() {
        return blocks;
    }
    let mut table = Table::new(&["gap", "entries", "how long", "filled", "why"]);
    for gap in &found.gaps {
        let filled = format!("{}: {}", show::word(gap.filled), show::energy(gap.energy_j));
        table.row([
            show::word(gap.phase),
            show::count(gap.entries),
            show::time(gap.wall_s),
            filled,
            gap.reason.clone(),
        ]);
    }
    blocks.push(Block::Table(table));
    let how = "A gap is filled with its counted energy times what measured over counted was in the run by then.";
    blocks.push(Block::Paragraph(how.to_string()));
    blocks
}
