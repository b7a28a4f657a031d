//! Measured compared with counted energy: the report's block, and `calibrate --from-run`.

use std::path::Path;

use super::directory::RunDirectory;
use crate::energy::ledger::{GapTotals, Totals};
use crate::energy::{Account, Phase, Profile};
use crate::error::Result;
use crate::measure::{self, Reconciled};
use crate::recipe;
use crate::report::energy::{Compared, Gap, ProfileFactor, Reconciliation};
use crate::report::read_report;
use crate::units::MicroJoules;

/// The factor that the profile keeps.
pub(super) fn profile_factor(profile: &Profile) -> Option<ProfileFactor> {
    profile.factor().map(|(value, source)| ProfileFactor {
        value,
        source: source.to_string(),
    })
}

/// Measured against counted, where there are counters. What a crash took was predicted, not measured: it is not compared.
pub(super) fn reconciliation(account: &Account) -> Option<Reconciliation> {
    let measured_by = account.meters().measured_by();
    if measured_by.is_empty() {
        return None;
    }
    let compared = |totals: &Totals| {
        let measured = totals.energy_j.measured?;
        Some((totals.counted_where_measured, measured))
    };
    let phases: Vec<_> = account
        .by_phase()
        .filter(|(phase, _)| *phase != Phase::Lost)
        .collect();
    let sums = phases
        .iter()
        .filter_map(|(_, totals)| compared(totals))
        .reduce(|a, b| (a.0 + b.0, a.1 + b.1));
    let of = |(counted, measured): (MicroJoules, MicroJoules)| {
        Compared::new(counted.joules(), measured.joules())
    };
    let gap = |(phase, reason, gapped): (Phase, &str, &GapTotals)| Gap {
        phase,
        reason: reason.to_string(),
        entries: gapped.entries,
        wall_s: gapped.wall_s,
        filled: gapped.meter,
        energy_j: gapped.energy.joules(),
    };
    Some(Reconciliation {
        measured_by,
        by_phase: phases
            .iter()
            .filter_map(|(phase, totals)| Some((*phase, of(compared(totals)?))))
            .collect(),
        all: sums.map(of),
        gaps: account.gaps().map(gap).collect(),
    })
}

/// The profile of the run in `directory`, with what its counters showed, called `name`.
///
/// # Errors
/// No run, one that was not measured, a profile that has changed since, and a name that no profile may have.
pub fn reconcile(directory: &Path, name: Option<&str>) -> Result<Reconciled> {
    let run = RunDirectory::open(directory)?;
    let report = read_report(&run.report())?;
    let recipe = recipe::load(&run.recipe(), &[])?;
    measure::reconcile(directory, &recipe, &report, name)
}
