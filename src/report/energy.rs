//! The `energy` block of `report.json`, and its sections: energy by phase, component and meter, measured against counted.
//!
//! A memory level of unknown energy per byte is named with its bytes and has no joules. Only entries that were measured are
//! compared with counted ones. Knows nothing of how the energy was counted.
#![allow(
    missing_docs,
    reason = "fields are keys of report.json; units are in their names"
)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::format;
use super::sections::Block;
use super::text::Table;
use super::types::{Absent, Meter, Phase, keys};
use crate::energy::Interval;
use crate::units::{Bytes, Flops, Joules, Seconds};

/// Energy of the run, without facility overhead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Meter of `total_j`, `by_phase` and the budget.
    pub meter: Meter,
    /// The run on that meter: `total_j`, `low_j`, `high_j`.
    #[serde(flatten, with = "keys::total")]
    pub total: Interval<Joules>,
    /// Sums to `total_j`.
    pub by_phase: BTreeMap<Phase, Joules>,
    pub meters: Meters,
    /// Why `measured_j` is absent.
    #[serde(default)]
    pub measured_absent: Option<Absent>,
    /// Sums to `counted_j`.
    #[serde(default)]
    pub counted_parts: Option<CountedParts>,
    #[serde(default)]
    pub profile_factor: Option<ProfileFactor>,
    #[serde(default)]
    pub reconciliation: Option<Reconciliation>,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes moved to and from main memory, by the profile's cache model.
    pub bytes: Bytes,
    #[serde(default)]
    pub bytes_by_level: BTreeMap<String, Bytes>,
    /// Name of the device profile.
    pub device: String,
    /// The machine that ran, where `device` is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub this_machine: Option<ThisMachine>,
    /// Coefficients of the profile.
    #[serde(default)]
    pub factors: Vec<Factor>,
    /// The host of an accelerator that `total_j` leaves out; `None` where nothing is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_left_out: Option<HostLeftOut>,
}

/// Energy of the run on every available meter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Meters {
    pub counted_j: Joules,
    /// Where the machine has complete counters.
    pub measured_j: Option<Joules>,
    /// Where the profile has a power.
    pub timed_j: Option<Joules>,
}

/// Components of the counted energy.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CountedParts {
    /// FLOPs times energy per FLOP.
    pub arithmetic_j: Joules,
    /// Bytes times energy per byte.
    pub movement_j: Joules,
    /// Idle power times roofline time.
    pub idle_j: Joules,
    /// Charged before a crash; component not known.
    #[serde(default)]
    pub lost_j: Joules,
    /// `movement_j` by the memory level that served the bytes.
    #[serde(default)]
    pub movement_by_level_j: BTreeMap<String, Joules>,
    /// Levels whose energy per byte is part of the profile's energy per FLOP.
    #[serde(default)]
    pub levels_left_out: Vec<String>,
    /// `movement_j` if every operand came from main memory each time it is used.
    #[serde(default)]
    pub movement_without_reuse_j: Option<Joules>,
}

/// A coefficient behind the counted energy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Factor {
    pub name: String,
    /// With its unit.
    pub value: String,
    /// With year and licence.
    pub source: String,
    /// Read in the source itself.
    pub verified: bool,
}

/// The machine that runs what is counted for another device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThisMachine {
    /// Name of its profile.
    pub device: String,
    /// The same steps counted on that profile.
    pub counted_j: Joules,
}

impl ThisMachine {
    /// "counted for `raspberry-pi-5`, not for this machine: on its profile `generic-cpu@2` the same work counts 12 J".
    pub fn beside(&self, device: &str) -> String {
        format!(
            "counted for `{device}`, not for this machine: on its profile `{}` the same work counts {}",
            self.device,
            format::energy(self.counted_j)
        )
    }
}

/// The machine around an accelerator, left out of the run's energy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HostLeftOut {
    /// Share of the machine's power, in 0..1; `None`: not known.
    pub share: Option<f64>,
}

impl HostLeftOut {
    /// Energy of the machine over that of the device.
    pub fn times(self) -> Option<f64> {
        self.share.map(|share| 1.0 / (1.0 - share))
    }
}

/// Hardware counters compared with counted energy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reconciliation {
    /// The counters, and what is modelled in addition.
    pub measured_by: Vec<String>,
    pub by_phase: BTreeMap<Phase, Compared>,
    /// Sum over phases; `None` where nothing was measured.
    pub all: Option<Compared>,
    pub gaps: Vec<Gap>,
}

/// Joules of the same entries on two meters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    pub counted_j: Joules,
    pub measured_j: Joules,
    /// Measured minus counted.
    pub residual_j: Joules,
    /// Measured over counted; `wattune calibrate --from-run` uses that of `all`. `None` where nothing was counted.
    pub ratio: Option<f64>,
}

impl Compared {
    pub fn new(counted_j: Joules, measured_j: Joules) -> Self {
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
    pub phase: Phase,
    pub reason: String,
    pub entries: u64,
    pub wall_s: Seconds,
    /// Meter that fills the gap.
    pub filled: Meter,
    /// Estimate from that meter, scaled by what was measured up to the gap.
    pub energy_j: Joules,
}

/// Factor on the counted joules of a device profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileFactor {
    /// Measured over counted, from an earlier run.
    pub value: f64,
    pub source: String,
}

/// A component of the counted energy, by name.
pub(super) struct Share {
    pub(super) name: String,
    pub(super) joules: Joules,
}

/// Arithmetic, memory levels from the inside out, idle power, lost energy.
pub(super) fn shares(parts: &CountedParts) -> Vec<Share> {
    let share = |name: &str, joules: Joules| Share {
        name: name.to_string(),
        joules,
    };
    let mut shares = vec![share("arithmetic", parts.arithmetic_j)];
    for outer in [false, true] {
        for (level, joules) in &parts.movement_by_level_j {
            if is_dram(level) == outer {
                shares.push(share(
                    &format!("data movement, {}", level_name(level)),
                    *joules,
                ));
            }
        }
    }
    if parts.movement_by_level_j.is_empty() {
        shares.push(share("data movement", parts.movement_j));
    }
    shares.push(share("idle power", parts.idle_j));
    if parts.lost_j > Joules::ZERO {
        shares.push(share("lost in a crash, component not known", parts.lost_j));
    }
    shares
}

fn is_dram(level: &str) -> bool {
    level.eq_ignore_ascii_case("dram")
}

/// "main memory (DRAM)", "last-level cache (LLC)", "L2 cache".
fn level_name(level: &str) -> String {
    match level {
        _ if is_dram(level) => "main memory (DRAM)".to_string(),
        "LLC" => "last-level cache (LLC)".to_string(),
        _ => format!("{} cache", level.to_uppercase()),
    }
}

/// A table of joules and their shares of `total`, with the sum in its last row.
fn share_table(name: &str, rows: impl Iterator<Item = (String, Joules)>, total: Joules) -> Block {
    let mut table = Table::new(&[name, "energy", "share"]);
    for (name, joules) in rows.chain([("total".to_string(), total)]) {
        table.row([
            name,
            format::energy(joules),
            format::share(joules.0, total.0),
        ]);
    }
    Block::Table(table)
}

pub(super) fn by_phase(energy: &Energy) -> Vec<Block> {
    let rows = energy
        .by_phase
        .iter()
        .map(|(phase, joules)| (format::word(phase), *joules));
    vec![share_table("phase", rows, energy.total.central)]
}

/// Components of the counted energy, bytes moved, what is not included, and what reuse saved.
pub(super) fn by_component(energy: &Energy) -> Vec<Block> {
    let Some(parts) = &energy.counted_parts else {
        return vec![Block::Paragraph(executed_work(energy))];
    };
    let rows = shares(parts)
        .into_iter()
        .map(|share| (share.name, share.joules));
    let mut blocks = vec![
        share_table("component", rows, energy.meters.counted_j),
        Block::Paragraph(executed_work(energy)),
    ];
    blocks.extend(left_out(energy, parts).map(Block::Paragraph));
    blocks.extend(saved_by_reuse(parts).map(Block::Paragraph));
    blocks
}

fn executed_work(energy: &Energy) -> String {
    let flops = format::flops(Flops(energy.flops as f64));
    if energy.bytes_by_level.is_empty() {
        return format!(
            "The run executed {flops} and moved {} to and from memory.",
            energy.bytes
        );
    }
    let level = |(name, bytes): (&String, &Bytes)| format!("{bytes} from {}", level_name(name));
    let moved: Vec<String> = energy.bytes_by_level.iter().map(level).collect();
    format!("The run executed {flops} and read {}.", moved.join(", "))
}

fn left_out(energy: &Energy, parts: &CountedParts) -> Option<String> {
    let levels: Vec<String> = parts
        .levels_left_out
        .iter()
        .map(|level| level_name(level))
        .collect();
    (!levels.is_empty()).then(|| {
        format!(
            "Not shown apart: {}. The profile `{}` has no energy per byte for this level; it is part of arithmetic.",
            levels.join(", "),
            energy.device
        )
    })
}

fn saved_by_reuse(parts: &CountedParts) -> Option<String> {
    let without = parts
        .movement_without_reuse_j
        .filter(|without| *without > parts.movement_j)?;
    Some(format!(
        "Without reuse in registers and caches, data movement would have taken {} instead of {}: {} saved.",
        format::energy(without),
        format::energy(parts.movement_j),
        format::share((without - parts.movement_j).0, without.0)
    ))
}

/// What each meter includes.
const WHY_METERS_DIFFER: &str = "The meters differ by what they include. Counted: the executed work at the device's usual rates, and idle \
    power for as long as that takes; the same on every machine, without the time that the process waited. Measured: the \
    processor, with every program on it. Timed: the rated power of the cores in use for the whole wall time, busy or waiting. Tools that \
    take the whole processor's rated power, or add memory by its size, arrive at more.";

/// Every meter, its ratio to the counted one, and its definition.
pub(super) fn by_meter(energy: &Energy) -> Vec<Block> {
    let counters = match &energy.reconciliation {
        Some(found) => found.measured_by.join("; "),
        None => "hardware energy counters".to_string(),
    };
    let counted = "executed FLOPs and bytes x device profile, plus idle power".to_string();
    let timed = "rated power of the cores in use x wall time".to_string();
    let meters = &energy.meters;
    let rows = [
        (Meter::Counted, Some(meters.counted_j), counted),
        (Meter::Measured, meters.measured_j, counters),
        (Meter::Timed, meters.timed_j, timed),
    ];
    let mut table = Table::new(&["meter", "energy", "ratio to counted", "definition"]);
    for (meter, joules, definition) in rows {
        let used = if meter == energy.meter { " (used)" } else { "" };
        table.row([
            format!("{}{used}", format::word(meter)),
            joules.map_or_else(|| "not available".to_string(), format::energy),
            format::or_unknown(joules, |joules| format::times(joules / meters.counted_j)),
            definition,
        ]);
    }
    let mut blocks = vec![
        Block::Table(table),
        Block::Paragraph(WHY_METERS_DIFFER.to_string()),
    ];
    if let Some(absent) = &energy.measured_absent {
        blocks.push(Block::Paragraph(format!(
            "Not measured: {}. To measure: {}",
            absent.reason, absent.remedy
        )));
    }
    blocks
}

/// Empty where the machine has no counter.
pub(super) fn reconciliation(found: Option<&Reconciliation>) -> Vec<Block> {
    let Some(found) = found else {
        return Vec::new();
    };
    let counters = format!("Measured by {}.", found.measured_by.join("; "));
    let mut blocks = vec![Block::Paragraph(counters)];
    blocks.extend(
        found
            .all
            .map(|all| Block::Table(compared_table(found, all))),
    );
    if !found.gaps.is_empty() {
        blocks.push(Block::Table(gap_table(&found.gaps)));
        let rule = "A gap is filled with its counted energy, scaled by measured over counted of its phase or of training up to the gap; \
                    before either was measured, with its wall time at the mean power measured so far.";
        blocks.push(Block::Paragraph(rule.to_string()));
    }
    blocks
}

fn compared_table(found: &Reconciliation, all: Compared) -> Table {
    let mut table = Table::new(&[
        "phase",
        "counted",
        "measured",
        "measured - counted",
        "ratio",
    ]);
    let phases = found
        .by_phase
        .iter()
        .map(|(phase, compared)| (format::word(phase), *compared));
    for (name, compared) in phases.chain([("all measured".to_string(), all)]) {
        table.row([
            name,
            format::energy(compared.counted_j),
            format::energy(compared.measured_j),
            format::energy(compared.residual_j),
            format::or_unknown(compared.ratio, format::number),
        ]);
    }
    table
}

fn gap_table(gaps: &[Gap]) -> Table {
    let mut table = Table::new(&["gap", "entries", "duration", "filled", "reason"]);
    for gap in gaps {
        table.row([
            format::word(gap.phase),
            format::count(gap.entries),
            format::time(gap.wall_s),
            format!(
                "{}: {}",
                format::word(gap.filled),
                format::energy(gap.energy_j)
            ),
            gap.reason.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::types::Report;

    #[test]
    fn every_joule_has_a_component() {
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
                "data movement, main memory (DRAM)",
                "idle power",
                "lost in a crash, component not known"
            ]
        );
    }

    #[test]
    fn reuse_that_saves_nothing_is_not_shown() {
        let parts = CountedParts {
            movement_j: Joules(2.0),
            movement_without_reuse_j: Some(Joules(2.0)),
            ..CountedParts::default()
        };
        assert_eq!(saved_by_reuse(&parts), None);
        let parts = CountedParts {
            movement_without_reuse_j: Some(Joules(8.0)),
            ..parts
        };
        assert!(saved_by_reuse(&parts).unwrap().contains("75.0 % saved"));
    }
}
