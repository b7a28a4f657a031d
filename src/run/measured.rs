//! Baselines that are trained: the same architecture from random weights, or every weight of the pretrained model, on the same data for
//! the energy that the run's training took.
//!
//! Takes a finished run and trains the baselines it asked for, each in a folder of its own with its own ledger: nothing of it is part of
//! the run's energy or budget. Energies are held equal on the counted meter, so that the same seed gives the same steps everywhere. A
//! baseline first does a whole run (the recipe's schedule from its rise to its end) for the run's training energy: the loss at equal energy. Is
//! that loss still above the run's, it goes on from there with the same schedule stretched over `energy_multiple` times the energy, until an
//! evaluation is at or below the run's loss: the energy to equal loss.
//!
//! A baseline that was cut off goes on from its checkpoint when the run is resumed; what is done by then stands in the report.

mod curve;
mod leg;
mod trial;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use self::curve::Curve;
use self::trial::Trial;
use super::Screen;
use super::directory::RunDirectory;
use super::prepare::Prepared;
use super::reporting::write_pages;
use crate::energy::ledger::Totals;
use crate::energy::meter::Computing;
use crate::energy::{Account, Phase};
use crate::error::Result;
use crate::forecast::measured_kinds;
use crate::recipe::Recipe;
use crate::report::measured::{BaselineStop, CurvePoint};
use crate::report::types::BaselineKind;
use crate::report::{Report, json::read_report};
use crate::units::Joules;

/// The report of a run that ended as it was meant to, of whose measured baselines some are not whole; `None` of any other.
pub(super) fn unfinished(recipe: &Recipe, directory: &RunDirectory) -> Option<Report> {
    let report = read_report(&directory.report()).ok()?;
    let comparable =
        report.training.stop_reason.is_regular() && report.training.val_loss_after.is_some();
    (comparable && measured_kinds(recipe).any(|kind| !settled(&report, kind))).then_some(report)
}

/// Whether a baseline is done with: trained to its end, or found to be impossible.
fn settled(report: &Report, kind: BaselineKind) -> bool {
    let measured = report
        .baselines
        .iter()
        .filter(|block| block.kind == kind)
        .find_map(|block| block.measured.as_ref());
    let impossible = report
        .warnings
        .iter()
        .any(|warning| warning.starts_with(&not_trained(kind)));
    measured.map_or(impossible, |measured| {
        measured.stop_reason != BaselineStop::Interrupted
    })
}

/// How the warning about a baseline begins that could not be trained.
fn not_trained(kind: BaselineKind) -> String {
    format!("the {} baseline was not trained", words(kind))
}

/// The finished run that baselines are held against.
struct Finish {
    /// Its training on each meter.
    training: Totals,
    /// Its validation loss, nats per loss token.
    val_loss: f64,
    /// All that it spent, on the meter that decides.
    energy: Joules,
}

/// Where and with what baselines are trained.
pub(super) struct Place<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) directory: &'a RunDirectory,
    pub(super) device: &'a Device,
    pub(super) computing: Computing,
    /// Set when the person asks to stop.
    pub(super) interrupted: &'a AtomicBool,
}

/// Trains every baseline asked for that `report`, of the finished run that spent through `account`, does not hold whole yet. After each the
/// report's files are written again, with a warning for one that could not be trained. Returns the report and whether the person stopped it.
pub(super) fn measure(
    place: &Place<'_>,
    account: &Account,
    mut report: Report,
    screen: &mut dyn Screen,
) -> Result<(Report, bool)> {
    let Place {
        prepared,
        directory,
        ..
    } = place;
    let Some(val_loss) = report
        .training
        .val_loss_after
        .filter(|_| report.training.stop_reason.is_regular())
    else {
        return Ok((report, false));
    };
    let training = account
        .by_phase()
        .find(|(phase, _)| *phase == Phase::Train)
        .map(|(_, totals)| totals.clone())
        .unwrap_or_default();
    let finish = Finish {
        training,
        val_loss,
        energy: account.spent().energy.joules(),
    };
    let mut spent = Joules::ZERO;
    for kind in measured_kinds(&prepared.recipe) {
        if !settled(&report, kind) {
            if place.interrupted.load(Ordering::Relaxed) {
                return Ok((report, true));
            }
            let limit = prepared.recipe.baseline.budget.map(|budget| budget - spent);
            report = with_baseline(place, kind, &finish, limit, report, screen)?;
            report.training.curve = own_curve(directory, account, &report)?;
            report = report.sealed()?;
            write_pages(prepared, finish.energy, directory, &report)?;
        }
        if !settled(&report, kind) {
            return Ok((report, true));
        }
        // The checkpoints served to go on; a baseline has no result but its figures.
        let _ = std::fs::remove_dir_all(folder(directory, kind).join("checkpoints"));
        let block = report
            .baselines
            .iter()
            .find(|block| block.kind == kind && block.measured.is_some());
        spent += block.and_then(|block| block.energy_j).unwrap_or_default();
    }
    Ok((report, false))
}

/// The report with the baseline of this kind trained, or with a warning why it is not, in place of what it held of it.
fn with_baseline(
    place: &Place<'_>,
    kind: BaselineKind,
    finish: &Finish,
    limit: Option<Joules>,
    mut report: Report,
    screen: &mut dyn Screen,
) -> Result<Report> {
    report
        .baselines
        .retain(|block| block.kind != kind || block.measured.is_none());
    match Trial::begin(place, kind, finish, limit)? {
        Err(why) => report
            .warnings
            .push(format!("{}: {why}", not_trained(kind))),
        Ok(trial) => {
            screen.note(&trial.announcement());
            report.baselines.push(trial.run(screen)?);
        }
    }
    Ok(report)
}

/// The run's own loss against its training energy.
fn own_curve(
    directory: &RunDirectory,
    account: &Account,
    report: &Report,
) -> Result<Vec<CurvePoint>> {
    let curve = Curve::read(
        &directory.steps(),
        &directory.ledger(),
        report.training.val_loss_before,
        account.kind(),
    )?;
    Ok(curve.thinned())
}

/// Where a baseline's ledger, steps and checkpoints are.
fn folder(directory: &RunDirectory, kind: BaselineKind) -> PathBuf {
    directory.baseline(if kind == BaselineKind::FullFineTuning {
        "full_fine_tuning"
    } else {
        "from_scratch"
    })
}

fn words(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full fine-tuning",
        BaselineKind::FromScratchSameTask => "from-scratch",
        BaselineKind::Pretraining => "pretraining",
    }
}
