//! Contents of the ledger's lines, and their sums.
//!
//! Plain values: phases, energies on every meter, entries, leases and totals.

use serde::{Deserialize, Serialize};

use super::charge::EnergyBreakdown;
use super::options::MeterKind;
use super::spent::Spent;
use super::traffic::Traffic;
use crate::units::{MicroJoules, Seconds};

/// Activity that energy is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Loading the model and the data.
    Load,
    /// Optimizer steps.
    Train,
    /// Evaluations.
    Eval,
    /// Checkpoints and the final files.
    Save,
    /// Leased, then lost in a crash.
    Lost,
}

impl Phase {
    /// Every phase, in the order of a run.
    pub const ALL: [Phase; 5] = [
        Phase::Load,
        Phase::Train,
        Phase::Eval,
        Phase::Save,
        Phase::Lost,
    ];

    /// Name in the ledger and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Load => "load",
            Phase::Train => "train",
            Phase::Eval => "eval",
            Phase::Save => "save",
            Phase::Lost => "lost",
        }
    }
}

/// An energy on every meter. In files it is in joules, exact to the microjoule up to 2^53
/// microjoules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Energies {
    /// Work times profile.
    #[serde(with = "as_joules")]
    pub counted: MicroJoules,
    /// The machine's counters; `None` if absent or failed.
    #[serde(with = "as_joules_or_null")]
    pub measured: Option<MicroJoules>,
    /// Full-load power times wall time.
    #[serde(with = "as_joules")]
    pub timed: MicroJoules,
}

impl Energies {
    /// The energy on `kind`; the counted one if the measured one is missing (see also `Entry::on`).
    pub fn on(&self, kind: MeterKind) -> MicroJoules {
        match kind {
            MeterKind::Counted => self.counted,
            MeterKind::Measured => self.measured.unwrap_or(self.counted),
            MeterKind::Timed => self.timed,
        }
    }
}

pub(super) mod as_joules {
    use crate::units::{Joules, MicroJoules};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(energy: &MicroJoules, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(energy.joules().0)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<MicroJoules, D::Error> {
        f64::deserialize(d).map(|joules| Joules(joules).rounded())
    }
}

mod as_joules_or_null {
    use crate::units::{Joules, MicroJoules};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(energy: &Option<MicroJoules>, s: S) -> Result<S::Ok, S::Error> {
        energy.map(|energy| energy.joules().0).serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<MicroJoules>, D::Error> {
        Ok(Option::<f64>::deserialize(d)?.map(|joules| Joules(joules).rounded()))
    }
}

/// One charged activity: a training step, an evaluation, a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Activity.
    pub phase: Phase,
    /// Number of the training step, from 1; in other phases, of steps completed before.
    pub step: u64,
    /// Energy on every meter.
    pub energy_j: Energies,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// Composition of the counted energy; unknown for energy lost in a crash.
    #[serde(rename = "parts", default, skip_serializing_if = "Option::is_none")]
    pub breakdown: Option<EnergyBreakdown>,
    /// Wall time.
    pub wall_s: Seconds,
    /// Unix seconds.
    pub t: f64,
    /// Failure of the counters, with the energy that fills the gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<GapFill>,
}

impl Entry {
    /// The energy on `kind`, with the fill of a gap in the measured one.
    pub fn on(&self, kind: MeterKind) -> MicroJoules {
        match (&self.gap, kind) {
            (Some(gap), MeterKind::Measured) => gap.energy_j,
            _ => self.energy_j.on(kind),
        }
    }
}

/// Estimate in place of failed counters; never zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GapFill {
    /// Cause of the failure.
    pub reason: String,
    /// Meter it is estimated from.
    #[serde(rename = "filled")]
    pub meter: MeterKind,
    /// Factor on that meter: measured energy of the run so far over its energy on that meter, 1
    /// before any measurement.
    #[serde(rename = "times")]
    pub factor: f64,
    /// The estimate.
    #[serde(with = "as_joules")]
    pub energy_j: MicroJoules,
}

/// Amounts recorded for steps before they run; after a crash they count as spent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Lease {
    /// Number of steps.
    pub steps: u64,
    /// Energy.
    pub energy_j: Energies,
    /// FLOPs.
    pub flops: u64,
    /// Wall time.
    pub time_s: Seconds,
}

impl Lease {
    /// The remainder of the lease after `entry`.
    pub(super) fn after(&self, entry: &Entry) -> Lease {
        let measured = self.energy_j.measured;
        Lease {
            steps: self.steps.saturating_sub(1),
            energy_j: Energies {
                counted: self.energy_j.counted.saturating_sub(entry.energy_j.counted),
                measured: measured
                    .map(|leased| leased.saturating_sub(entry.on(MeterKind::Measured))),
                timed: self.energy_j.timed.saturating_sub(entry.energy_j.timed),
            },
            flops: self.flops.saturating_sub(entry.flops),
            time_s: (self.time_s - entry.wall_s).max(Seconds::ZERO),
        }
    }
}

/// Sums over entries.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Totals {
    /// Energy by meter; `measured` sums the measured entries, `None` without any.
    pub energy_j: Energies,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// Composition of the counted energy, over the entries that state it.
    #[serde(rename = "parts")]
    pub breakdown: EnergyBreakdown,
    /// Counted energy of the entries without a composition.
    #[serde(skip)]
    pub without_breakdown: MicroJoules,
    /// Wall time.
    pub wall_s: Seconds,
    /// Number of entries.
    pub entries: u64,
    /// Number of entries without a measured energy.
    pub unmeasured: u64,
    /// Counted energy of the measured entries, for comparison with `energy_j.measured`.
    pub counted_where_measured: MicroJoules,
    /// Timed energy of the measured entries.
    #[serde(skip)]
    timed_where_measured: MicroJoules,
    /// Sum of `Entry::on(Measured)`: measured energy and gap fills.
    #[serde(skip)]
    measured_or_filled: MicroJoules,
}

impl Totals {
    pub(super) fn add(&mut self, entry: &Entry) {
        self.energy_j.counted += entry.energy_j.counted;
        self.energy_j.timed += entry.energy_j.timed;
        self.measured_or_filled += entry.on(MeterKind::Measured);
        match entry.energy_j.measured {
            Some(energy) => {
                self.energy_j.measured = Some(self.energy_j.measured.unwrap_or_default() + energy);
                self.counted_where_measured += entry.energy_j.counted;
                self.timed_where_measured += entry.energy_j.timed;
            }
            None => self.unmeasured += 1,
        }
        self.flops = self.flops.saturating_add(entry.flops);
        for (level, bytes) in &entry.bytes {
            *self.bytes.entry(level.clone()).or_default() += *bytes;
        }
        match &entry.breakdown {
            Some(breakdown) => self.breakdown += breakdown,
            None => self.without_breakdown += entry.energy_j.counted,
        }
        self.wall_s += entry.wall_s;
        self.entries += 1;
    }

    /// The total on one meter; on `Measured` with the gap fills.
    pub fn on(&self, kind: MeterKind) -> MicroJoules {
        match kind {
            MeterKind::Counted => self.energy_j.counted,
            MeterKind::Measured => self.measured_or_filled,
            MeterKind::Timed => self.energy_j.timed,
        }
    }

    /// Measured over counted energy of the measured entries; `None` without any.
    pub fn ratio(&self) -> Option<f64> {
        self.measured_over(self.counted_where_measured)
    }

    /// Measured over timed energy of the measured entries: their power over the timed meter's;
    /// `None` without any.
    pub fn power_ratio(&self) -> Option<f64> {
        self.measured_over(self.timed_where_measured)
    }

    fn measured_over(&self, energy: MicroJoules) -> Option<f64> {
        let ratio = self.energy_j.measured?.joules() / energy.joules();
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }

    /// The total in the quantities of a budget.
    pub fn spent(&self, kind: MeterKind) -> Spent {
        Spent {
            energy: self.on(kind),
            flops: self.flops,
            time: self.wall_s,
        }
    }
}
