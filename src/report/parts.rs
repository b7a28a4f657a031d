//! What the counted energy went into, in words and numbers: arithmetic, bytes by memory level, idle power, and what reuse saved.
//!
//! Owns the `counted_parts` block and the coefficients behind it, their names, order and sentences; the page and the chart share them. Takes
//! the report's `energy` block. A level whose energy per byte is not known is named with its bytes and given no joules. Knows nothing of how the energy was counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::page::Block;
use super::show;
use super::table::Table;
use super::types::Energy;
use crate::units::{Bytes, Flops, Joules};

/// What the counted energy is made of.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CountedParts {
    /// FLOPs times energy per FLOP.
    pub arithmetic_j: Joules,
    /// Bytes times energy per byte.
    pub movement_j: Joules,
    /// Idle power times roofline time.
    pub idle_j: Joules,
    /// Charged before a crash and never accounted for: of which kind it was is not known.
    #[serde(default)]
    pub lost_j: Joules,
    /// `movement_j` by the memory level that served the bytes.
    #[serde(default)]
    pub movement_by_level_j: BTreeMap<String, Joules>,
    /// The levels that moved bytes at an energy the profile does not know: it is part of its energy per FLOP.
    #[serde(default)]
    pub levels_left_out: Vec<String>,
    /// What moving would have taken had every operand come from main memory each time it was used.
    #[serde(default)]
    pub movement_without_reuse_j: Option<Joules>,
}

/// A coefficient behind the counted energy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Factor {
    /// What it is of.
    pub name: String,
    /// Its value with its unit.
    pub value: String,
    /// Where it comes from, with year and licence.
    pub source: String,
    /// Read in the source itself, not recalled or assumed.
    pub verified: bool,
}

/// The machine around an accelerator, which the run's figures leave out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HostLeftOut {
    /// Its part of a machine's power, in 0..1; `None`: not known.
    pub share: Option<f64>,
}

impl HostLeftOut {
    /// How many times the device's energy the whole machine takes.
    pub fn times(self) -> Option<f64> {
        self.share.map(|share| 1.0 / (1.0 - share))
    }
}

/// One share of the counted energy.
pub(super) struct Share {
    /// What it went into.
    pub(super) name: String,
    /// How much.
    pub(super) joules: Joules,
}

/// The shares, the largest kinds first as listed: arithmetic, each memory level from the inside out, idle, lost.
pub(super) fn shares(parts: &CountedParts) -> Vec<Share> {
    let mut shares = vec![share("arithmetic", parts.arithmetic_j)];
    let inner = parts
        .movement_by_level_j
        .iter()
        .filter(|(level, _)| !is_dram(level));
    let outer = parts
        .movement_by_level_j
        .iter()
        .filter(|(level, _)| is_dram(level));
    shares.extend(
        inner
            .chain(outer)
            .map(|(level, joules)| share(&format!("moving data, {}", level_words(level)), *joules)),
    );
    if parts.movement_by_level_j.is_empty() {
        shares.push(share("moving data", parts.movement_j));
    }
    shares.push(share("idle power", parts.idle_j));
    if parts.lost_j > Joules::ZERO {
        shares.push(share("lost in a crash, kind not known", parts.lost_j));
    }
    shares
}

fn share(name: &str, joules: Joules) -> Share {
    Share {
        name: name.to_string(),
        joules,
    }
}

fn is_dram(level: &str) -> bool {
    level.eq_ignore_ascii_case("dram")
}

/// "main memory (DRAM)", "last-level cache (LLC)", "L2 cache".
pub(super) fn level_words(level: &str) -> String {
    match level {
        _ if is_dram(level) => "main memory (DRAM)".to_string(),
        "LLC" => "last-level cache (LLC)".to_string(),
        _ => format!("{} cache", level.to_uppercase()),
    }
}

/// The section: a table of shares, what was moved, what has no figure, and what reuse saved; empty where nothing is known.
pub(super) fn blocks(energy: &Energy) -> Vec<Block> {
    let Some(parts) = &energy.counted_parts else {
        return vec![Block::Paragraph(work(energy))];
    };
    let whole = energy.meters.counted_j;
    let mut table = Table::new(&["counted energy went into", "energy", "share"]);
    for share in shares(parts) {
        table.row([
            share.name,
            show::energy(share.joules),
            show::share(share.joules.0, whole.0),
        ]);
    }
    table.row([
        "all".to_string(),
        show::energy(whole),
        show::share(whole.0, whole.0),
    ]);
    let mut blocks = vec![Block::Table(table), Block::Paragraph(work(energy))];
    blocks.extend(left_out(energy, parts).map(Block::Paragraph));
    blocks.extend(saved(parts).map(Block::Paragraph));
    blocks
}

fn work(energy: &Energy) -> String {
    let flops = show::flops(Flops(energy.flops as f64));
    let level = |(name, bytes): (&String, &Bytes)| format!("{bytes} from {}", level_words(name));
    let moved: Vec<String> = energy.bytes_by_level.iter().map(level).collect();
    match moved.as_slice() {
        [] => format!(
            "The run executed {flops} and moved {} to and from memory.",
            energy.bytes
        ),
        moved => format!("The run executed {flops} and fetched {}.", moved.join(", ")),
    }
}

fn left_out(energy: &Energy, parts: &CountedParts) -> Option<String> {
    let levels: Vec<String> = parts
        .levels_left_out
        .iter()
        .map(|level| level_words(level))
        .collect();
    let (them, takes) = if levels.len() == 1 {
        ("it", "it takes")
    } else {
        ("them", "they take")
    };
    (!levels.is_empty()).then(|| {
        format!(
            "Left out: {}. The profile `{}` knows no energy per byte for {them}, so what {takes} is part of the arithmetic.",
            levels.join(", "),
            energy.device
        )
    })
}

fn saved(parts: &CountedParts) -> Option<String> {
    let without = parts
        .movement_without_reuse_j
        .filter(|without| *without > parts.movement_j)?;
    Some(format!(
        "Had every operand come from main memory each time it was used, moving data would have taken {} instead of {}: reuse in \
         registers and caches saved {} of it.",
        show::energy(without),
        show::energy(parts.movement_j),
        show::share((without - parts.movement_j).0, without.0)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::types::Report;

    #[test]
    fn every_joule_has_a_name_and_the_unknown_level_has_none() {
        let report: Report =
            serde_json::from_str(include_str!("../../tests/fixtures/report.json")).unwrap();
        let mut parts = report.energy.counted_parts.unwrap();
        parts.lost_j = Joules(5.0);
        let shares = shares(&parts);
        // 1,800 + 600 + 1,182 of the fixture, and 5 lost.
        assert_eq!(
            shares.iter().map(|share| share.joules).sum::<Joules>(),
            Joules(3587.0)
        );
        let names: Vec<&str> = shares.iter().map(|share| share.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "arithmetic",
                "moving data, main memory (DRAM)",
                "idle power",
                "lost in a crash, kind not known"
            ]
        );
    }

    #[test]
    fn reuse_that_saved_nothing_is_not_said() {
        let parts = CountedParts {
            movement_j: Joules(2.0),
            movement_without_reuse_j: Some(Joules(2.0)),
            ..CountedParts::default()
        };
        assert_eq!(saved(&parts), None);
        let parts = CountedParts {
            movement_without_reuse_j: Some(Joules(8.0)),
            ..parts
        };
        assert!(saved(&parts).unwrap().contains("saved 75.0 %"));
    }
}
