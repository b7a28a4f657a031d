//! The ledger: entries and leases on disk, and their sums.
//!
//! Takes entries and leases, writes them to `ledger.jsonl` (`ledger_file`), returns totals by phase
//! and meter in integer microjoules. Entries are written at once but not synced; the lease in the
//! last synced line covers whatever a crash or power cut takes. On resume, that lease less the
//! entries after it becomes an entry of phase "lost" and counts as spent.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::entry::as_joules;
pub use super::entry::{Energies, Entry, GapFill, Lease, Phase, Totals};
use super::ledger_file::{LedgerFile, LedgerLine, lost_entries, now, read_lines};
pub use super::ledger_file::{changed_inputs, read_entries};
use super::options::MeterKind;
use super::traffic::Traffic;
use crate::error::Result;
use crate::units::{MicroJoules, Seconds};

/// The sums of a ledger at one moment; those of the same ledger never decrease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Counted energy.
    #[serde(with = "as_joules")]
    pub counted_j: MicroJoules,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
}

/// The gaps of one phase and one reason.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GapTotals {
    /// Meter that the last one is estimated from.
    pub meter: MeterKind,
    /// Number of entries.
    pub entries: u64,
    /// Their wall time.
    pub wall_s: Seconds,
    /// The energy that fills them.
    pub energy: MicroJoules,
}

/// The file and its sums.
#[derive(Debug)]
pub struct Ledger {
    file: LedgerFile,
    /// Remainder of the last lease.
    lease: Lease,
    /// In the order of `Phase::ALL`.
    phases: [Totals; Phase::ALL.len()],
    total: Totals,
    /// Wall time of the run, also between entries.
    elapsed: Seconds,
    gaps: BTreeMap<(Phase, String), GapTotals>,
}

impl Ledger {
    /// Creates a ledger whose first line is `run`, the digest of recipe, model and data;
    /// atomically.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`], also if the file exists.
    pub fn create(path: &Path, run: &str) -> Result<Ledger> {
        let line = LedgerLine::Run {
            run: run.to_string(),
            t: now(),
        };
        LedgerFile::create(path, &line).map(Self::empty)
    }

    fn empty(file: LedgerFile) -> Ledger {
        Ledger {
            file,
            lease: Lease::default(),
            phases: Default::default(),
            total: Totals::default(),
            elapsed: Seconds::ZERO,
            gaps: BTreeMap::new(),
        }
    }

    /// Opens the ledger of a run to be continued: cuts off an incomplete last line and enters an
    /// unsettled lease as lost, on disk. `run` is the present digest of recipe, model and data.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`]; [`crate::error::Kind::Run`] if a line is invalid, another process
    /// uses the ledger, it is empty, or it was created for another digest.
    pub fn resume(path: &Path, run: &str) -> Result<Ledger> {
        let mut ledger = Self::empty(LedgerFile::open(path)?);
        let mut step = 0;
        let mut first_run = None;
        let extent = read_lines(path, |line| match line {
            LedgerLine::Entry(entry) => {
                step = entry.step;
                ledger.add(&entry);
            }
            LedgerLine::Lease {
                lease, elapsed_s, ..
            } => {
                ledger.lease = lease;
                ledger.elapsed = ledger.elapsed.max(elapsed_s);
            }
            LedgerLine::Settled { elapsed_s, .. } => {
                ledger.lease = Lease::default();
                ledger.elapsed = ledger.elapsed.max(elapsed_s);
            }
            LedgerLine::Run { run, .. } => first_run = Some(run),
        })?;
        if extent.complete == 0 {
            return Err(lost_entries(path, "it is empty"));
        }
        match first_run {
            Some(first_run) if first_run == run => {}
            Some(_) => return Err(changed_inputs(path)),
            None => {
                return Err(lost_entries(
                    path,
                    "it does not begin with the run's digest",
                ));
            }
        }
        ledger.file.truncate(&extent)?;
        ledger.enter_lost_lease(step)?;
        Ok(ledger)
    }

    /// Flushes the ledger to disk and returns its sums.
    pub fn record(&mut self) -> Result<Recorded> {
        self.file.sync()?;
        Ok(Recorded {
            counted_j: self.total.energy_j.counted,
            flops: self.total.flops,
        })
    }

    /// Refuses a ledger whose sums are below those of `earlier`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Run`].
    pub fn check_not_less(&self, earlier: &Recorded) -> Result<()> {
        let total = &self.total;
        if total.energy_j.counted >= earlier.counted_j && total.flops >= earlier.flops {
            return Ok(());
        }
        let why = format!(
            "it holds {}, and a checkpoint was written when it held {}",
            total.energy_j.counted.joules(),
            earlier.counted_j.joules()
        );
        Err(lost_entries(self.file.path(), &why))
    }

    /// Appends an entry. Not synced: the lease covers it.
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        self.file.append(&LedgerLine::Entry(entry.clone()))?;
        self.add(entry);
        Ok(())
    }

    /// Records the lease of steps before they run; replaces the last lease and syncs to disk.
    /// `elapsed` is the wall time of the run so far.
    pub fn lease(&mut self, lease: Lease, elapsed: Seconds) -> Result<()> {
        self.elapsed = self.elapsed.max(elapsed);
        self.file.append(&LedgerLine::Lease {
            lease,
            elapsed_s: self.elapsed,
            t: now(),
        })?;
        self.file.sync()?;
        self.lease = lease;
        Ok(())
    }

    /// Remainder of the last lease.
    pub fn leased(&self) -> &Lease {
        &self.lease
    }

    /// Wall time of the run over all its processes, as far as it was recorded.
    pub fn elapsed(&self) -> Seconds {
        self.elapsed
    }

    /// Ends a run in order: releases the lease and syncs to disk. `elapsed` as for `lease`.
    pub fn settle(&mut self, elapsed: Seconds) -> Result<()> {
        self.elapsed = self.elapsed.max(elapsed);
        self.file.append(&LedgerLine::Settled {
            settled: true,
            elapsed_s: self.elapsed,
            t: now(),
        })?;
        self.file.sync()?;
        self.lease = Lease::default();
        Ok(())
    }

    /// Sums over all entries.
    pub fn total(&self) -> &Totals {
        &self.total
    }

    /// Sums over one phase; those of all phases add up to the total exactly.
    pub fn phase(&self, phase: Phase) -> &Totals {
        &self.phases[phase as usize]
    }

    /// Sums by phase, in the order of a run.
    pub fn by_phase(&self) -> impl Iterator<Item = (Phase, &Totals)> {
        Phase::ALL.into_iter().zip(&self.phases)
    }

    /// Entries whose counters failed, by phase and reason.
    pub fn gaps(&self) -> impl Iterator<Item = (Phase, &str, &GapTotals)> {
        let gaps = self.gaps.iter();
        gaps.map(|((phase, reason), totals)| (*phase, reason.as_str(), totals))
    }

    /// Adds an entry to the sums and deducts it from the lease.
    fn add(&mut self, entry: &Entry) {
        if let Some(gap) = &entry.gap {
            let none = GapTotals {
                meter: gap.meter,
                entries: 0,
                wall_s: Seconds::ZERO,
                energy: MicroJoules::ZERO,
            };
            let reason = gap.reason.clone();
            let totals = self.gaps.entry((entry.phase, reason)).or_insert(none);
            totals.entries += 1;
            totals.wall_s += entry.wall_s;
            totals.energy += gap.energy_j;
            totals.meter = gap.meter;
        }
        self.elapsed += entry.wall_s;
        self.total.add(entry);
        self.phases[entry.phase as usize].add(entry);
        self.lease = self.lease.after(entry);
    }

    /// Enters the remainder of an unsettled lease as lost.
    fn enter_lost_lease(&mut self, step: u64) -> Result<()> {
        let lease = std::mem::take(&mut self.lease);
        let is_empty = lease.energy_j == Energies::default() && lease.flops == 0;
        if lease.steps == 0 || is_empty {
            return Ok(());
        }
        self.append(&Entry {
            phase: Phase::Lost,
            step,
            energy_j: lease.energy_j,
            flops: lease.flops,
            bytes: Traffic::new(),
            breakdown: None,
            wall_s: lease.time_s,
            t: now(),
            gap: None,
        })?;
        self.settle(self.elapsed)
    }
}

#[cfg(test)]
mod tests;
