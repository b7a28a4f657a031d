//! What the ledger's lines hold, and their sums.
//!
//! Owns phases, amounts on every meter, entries, leases and totals: plain values that are added, subtracted and written as JSON.
//! Takes nothing from a file and keeps nothing; knows nothing of budgets.

use serde::{Deserialize, Serialize};

use super::budget::Spent;
use super::charge::EnergyBreakdown;
use super::options::MeterKind;
use super::traffic::Traffic;
use crate::units::{MicroJoules, Seconds};

/// What energy was spent on.
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

    /// The word in the ledger and in reports.
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

/// One amount on every meter. In files: joules, exact to the microjoule up to 2^53 of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Energies {
    /// Work times profile.
    #[serde(with = "as_joules")]
    pub counted: MicroJoules,
    /// The machine's counters; `None` where there were none or they failed.
    #[serde(with = "as_joules_or_null")]
    pub measured: Option<MicroJoules>,
    /// Profile power times wall time.
    #[serde(with = "as_joules")]
    pub timed: MicroJoules,
}

impl Energies {
    /// The amount on `kind`; the counted one where there is no measured one (an entry knows better: `Entry::on`).
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

/// One line of spending.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// On what.
    pub phase: Phase,
    /// The optimizer step it belongs to.
    pub step: u64,
    /// How much.
    pub energy_j: Energies,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// What the counted energy is made of; not known of what a crash took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<EnergyBreakdown>,
    /// Wall time.
    pub wall_s: Seconds,
    /// When, in Unix seconds.
    pub t: f64,
    /// Where the counters failed: why, and what stands in for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<Filled>,
}

impl Entry {
    /// The amount on `kind`; where the counters failed, what fills the gap.
    pub fn on(&self, kind: MeterKind) -> MicroJoules {
        match (&self.gap, kind) {
            (Some(filled), MeterKind::Measured) => filled.energy_j,
            _ => self.energy_j.on(kind),
        }
    }
}

/// What stands in for the counters where they failed. Never nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// Why they failed.
    pub reason: String,
    /// The meter it is taken from.
    pub filled: MeterKind,
    /// Times that meter: this run's measured over counted so far, 1 before anything was measured.
    pub times: f64,
    /// The amount.
    #[serde(with = "as_joules")]
    pub energy_j: MicroJoules,
}

/// Steps paid for before they run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Lease {
    /// How many steps.
    pub steps: u64,
    /// Their energy.
    pub energy_j: Energies,
    /// Their FLOPs.
    pub flops: u64,
    /// Their wall time.
    pub time_s: Seconds,
}

impl Lease {
    /// What is left of it after `entry`.
    pub(super) fn less(&self, entry: &Entry) -> Lease {
        let (mine, spent) = (&self.energy_j, &entry.energy_j);
        Lease {
            steps: self.steps.saturating_sub(1),
            energy_j: Energies {
                counted: mine.counted.saturating_sub(spent.counted),
                measured: mine
                    .measured
                    .map(|measured| measured.saturating_sub(entry.on(MeterKind::Measured))),
                timed: mine.timed.saturating_sub(spent.timed),
            },
            flops: self.flops.saturating_sub(entry.flops),
            time_s: (self.time_s - entry.wall_s).max(Seconds::ZERO),
        }
    }
}

/// Sums over entries.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Totals {
    /// Joules by meter; `measured` is the sum over entries that were measured, `None` where none was.
    pub energy_j: Energies,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// What the counted energy is made of, over the entries that know it.
    pub parts: EnergyBreakdown,
    /// The counted energy of the others.
    #[serde(skip)]
    pub unparted: MicroJoules,
    /// Wall time.
    pub wall_s: Seconds,
    /// Entries.
    pub entries: u64,
    /// Entries without a measured energy.
    pub unmeasured: u64,
    /// The counted joules of the entries that were measured: what `energy_j.measured` is to be compared with.
    pub counted_where_measured: MicroJoules,
    /// The sum of `Entry::on(Measured)`: measured, and filled in the gaps.
    #[serde(skip)]
    measured_or_filled: MicroJoules,
}

impl Totals {
    pub(super) fn add(&mut self, entry: &Entry) {
        self.energy_j.counted += entry.energy_j.counted;
        self.energy_j.timed += entry.energy_j.timed;
        self.measured_or_filled += entry.on(MeterKind::Measured);
        match entry.energy_j.measured {
            Some(measured) => {
                self.energy_j.measured =
                    Some(self.energy_j.measured.unwrap_or_default() + measured);
                self.counted_where_measured += entry.energy_j.counted;
            }
            None => self.unmeasured += 1,
        }
        self.flops = self.flops.saturating_add(entry.flops);
        for (level, bytes) in &entry.bytes {
            *self.bytes.entry(level.clone()).or_default() += *bytes;
        }
        match &entry.parts {
            Some(parts) => self.parts += parts,
            None => self.unparted += entry.energy_j.counted,
        }
        self.wall_s += entry.wall_s;
        self.entries += 1;
    }

    /// Adds what was measured, and what was counted beside it.
    pub(super) fn add_measured(&mut self, other: &Totals) {
        let measured = self
            .energy_j
            .measured
            .into_iter()
            .chain(other.energy_j.measured);
        self.energy_j.measured = measured.reduce(std::ops::Add::add);
        self.counted_where_measured += other.counted_where_measured;
    }

    /// The total on one meter; on `Measured` with what fills the gaps.
    pub fn on(&self, kind: MeterKind) -> MicroJoules {
        match kind {
            MeterKind::Counted => self.energy_j.counted,
            MeterKind::Measured => self.measured_or_filled,
            MeterKind::Timed => self.energy_j.timed,
        }
    }

    /// Measured over counted, of the entries that were measured; `None` where nothing was.
    pub fn ratio(&self) -> Option<f64> {
        let ratio = self.energy_j.measured?.joules() / self.counted_where_measured.joules();
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }

    /// The total as a budget sees it.
    pub fn spent(&self, kind: MeterKind) -> Spent {
        Spent {
            energy: self.on(kind),
            flops: self.flops,
            time: self.wall_s,
        }
    }
}
