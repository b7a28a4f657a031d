//! Measured against counted: a run's block of the report, and a finished run's factor into its device profile.
//!
//! Takes an account, returns what its counters said beside what was counted. Takes a run directory whose report compares the two, returns the profile that the run was charged to with the factor in it. Refuses a
//! run that was not measured, and a profile that is no longer what the run was charged to. Writes nothing.

use std::path::Path;

use super::directory::RunDirectory;
use crate::energy::ledger::{Gapped, Totals};
use crate::energy::meter::Computing;
use crate::energy::{Account, Phase, Profile};
use crate::error::{Error, Kind, Result};
use crate::recipe;
use crate::report::json::read_report;
use crate::report::reconciliation::{Compared, Gap, ProfileFactor, Reconciliation};
use crate::report::{Report, types};
use crate::units::{MicroJoules, significant};

/// A profile held against a run.
#[derive(Debug)]
pub struct Reconciled {
    /// The profile that the run was charged to.
    pub base: Profile,
    /// That profile with the factor.
    pub profile: Profile,
    /// What was compared.
    pub compared: Compared,
    /// What to keep in mind.
    pub notes: Vec<String>,
}

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
        Compared::of(counted.joules(), measured.joules())
    };
    let gap = |(phase, reason, gapped): (Phase, &str, &Gapped)| Gap {
        phase,
        reason: reason.to_string(),
        entries: gapped.entries,
        wall_s: gapped.wall_s,
        filled: types::Meter::Counted,
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

/// The profile of the run in `directory`, with what its counters showed, called `name`; the default name is the profile's with
/// "reconciled" behind it.
///
/// # Errors
/// [`Kind::Run`] where the run was not measured or its profile has changed since; a name that no profile may have.
pub fn reconcile(directory: &Path, name: Option<&str>) -> Result<Reconciled> {
    let run = RunDirectory::open(directory)?;
    let report = read_report(&run.report())?;
    let (found, compared, ratio) = compared(directory, &report)?;
    let recipe = recipe::load(&run.recipe(), &[])?;
    // A resolved recipe names its device: what computes here does not matter.
    let base = Profile::resolve(&recipe.energy.device, Path::new(""), Computing::Other)?;
    let factor = report
        .energy
        .profile_factor
        .as_ref()
        .map(|factor| factor.value);
    if base.name != report.energy.device || base.measured_over_counted != factor {
        return Err(Error::new(
            Kind::Run,
            "the device profile is no longer what this run was charged to",
        )
        .at(recipe.energy.device)
        .value(format!(
            "then `{}`, now `{}`",
            report.energy.device, base.name
        ))
        .hint("run it again with the profile as it is now, then reconcile that run"));
    }
    let name = name.map_or_else(|| default_name(&base.name), str::to_string);
    let of = directory
        .file_name()
        .map_or_else(|| recipe.name.clone(), |name| name.display().to_string());
    let source = format!(
        "{} measured over {} counted in the run {of}, by {}",
        compared.measured_j,
        compared.counted_j,
        found.measured_by.join(", ")
    );
    let profile = base
        .reconciled(&name, ratio, &source)
        .map_err(|e| e.hint("give another name: `--name my-machine`"))?;
    let notes = notes(found);
    Ok(Reconciled {
        base,
        profile,
        compared,
        notes,
    })
}

fn compared<'a>(
    directory: &Path,
    report: &'a Report,
) -> Result<(&'a Reconciliation, Compared, f64)> {
    let found = report.energy.reconciliation.as_ref();
    let compared = found.and_then(|found| Some((found, found.all?, found.all?.ratio?)));
    compared.ok_or_else(|| {
        let why = report.energy.measured_absent.as_ref();
        let remedy = why.map_or(
            "let a run be measured first: `wattune devices` shows what can be",
            |absent| absent.remedy.as_str(),
        );
        let error = Error::new(Kind::Run, "this run's energy was not measured")
            .at(directory.display().to_string());
        let error = if let Some(absent) = why {
            error.value(absent.reason.clone())
        } else {
            error
        };
        error
            .rule("a factor is measured joules over counted ones")
            .hint(remedy)
    })
}

fn notes(found: &Reconciliation) -> Vec<String> {
    let phases = found.by_phase.iter().filter_map(|(phase, compared)| {
        let word = serde_json::to_value(phase).ok()?;
        Some(format!(
            "{} {}",
            word.as_str()?,
            significant(compared.ratio?)
        ))
    });
    let mut notes = vec![format!(
        "measured over counted by phase: {}",
        phases.collect::<Vec<_>>().join(", ")
    )];
    let gaps: u64 = found.gaps.iter().map(|gap| gap.entries).sum();
    if gaps > 0 {
        notes.push(format!(
            "in {gaps} entries the counters failed: these are not in the factor"
        ));
    }
    notes
}

/// "generic-cpu@2" -> "generic-cpu-cores-2-reconciled"; a profile that was reconciled before keeps its name.
fn default_name(base: &str) -> String {
    let base = base.replace('@', "-cores-");
    format!(
        "{}-reconciled",
        base.strip_suffix("-reconciled").unwrap_or(&base)
    )
}
