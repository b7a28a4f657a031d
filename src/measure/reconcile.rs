//! A finished run's measured-over-counted factor, for its device profile.
//!
//! Takes a run's recipe and report, returns the profile that the run was charged to with the factor in it. Refuses a run that
//! was not measured, and a profile that is no longer what the run was charged to.

use std::path::Path;

use crate::energy::Computing;
use crate::energy::Profile;
use crate::error::{Error, Kind, Result};
use crate::recipe::Recipe;
use crate::report::Report;
use crate::report::energy::{Compared, Reconciliation};
use crate::units::significant;

/// A profile with the factor of a run.
#[derive(Debug)]
pub struct Reconciled {
    /// The profile that the run was charged to.
    pub base: Profile,
    /// That profile with the factor.
    pub profile: Profile,
    /// Counted and measured energy of the run.
    pub compared: Compared,
    /// Caveats.
    pub notes: Vec<String>,
}

/// The profile of the run in `directory` with its measured factor, called `name`; the default name is the profile's with
/// "reconciled" behind it.
///
/// # Errors
/// [`Kind::Run`] where the run was not measured or its profile has changed since; a name that no profile may have.
pub fn reconcile(
    directory: &Path,
    recipe: &Recipe,
    report: &Report,
    name: Option<&str>,
) -> Result<Reconciled> {
    let (found, compared, ratio) = compared(directory, report)?;
    // A resolved recipe names its device: what computes here does not matter.
    let base = Profile::resolve(&recipe.energy.device, Computing::Other)?;
    check_profile(&base, recipe, report)?;
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

/// Refuses a profile that has changed since the run.
fn check_profile(base: &Profile, recipe: &Recipe, report: &Report) -> Result<()> {
    let energy = &report.energy;
    let factor = energy.profile_factor.as_ref().map(|factor| factor.value);
    if base.name == energy.device && base.measured_over_counted == factor {
        return Ok(());
    }
    Err(Error::new(
        Kind::Run,
        "the device profile is no longer what this run was charged to",
    )
    .at(recipe.energy.device.to_string())
    .value(format!("then `{}`, now `{}`", energy.device, base.name))
    .hint("run it again with the profile as it is now, then reconcile that run"))
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
