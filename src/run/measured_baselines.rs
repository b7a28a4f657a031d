//! Baselines that are trained after the run: every weight, from random or from pretrained weights, on the same data for the
//! same training energy.
//!
//! Takes a finished run and its report, trains each baseline of the recipe in a folder with a ledger of its own, and writes
//! the report's files again after each: nothing of a baseline is part of the run's energy or budget.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use super::Screen;
use super::baseline_run::{BaselineRun, why_impossible};
use super::directory::RunDirectory;
use super::loss_curve::LossCurve;
use super::prepare::Prepared;
use super::reporting::write_pages;
use crate::energy::ledger::Totals;
use crate::energy::{Account, Phase};
use crate::error::Result;
use crate::forecast::{BaselineSetup, measured_kinds};
use crate::recipe::Recipe;
use crate::report::baselines::{BaselineKind, BaselineStop, CurvePoint};
use crate::report::{FiniteReport, Report, read_report};
use crate::units::Joules;

/// Where and with what baselines are trained.
pub(super) struct RunContext<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) directory: &'a RunDirectory,
    pub(super) device: &'a Device,
    /// Set when the user interrupts.
    pub(super) interrupted: &'a AtomicBool,
}

/// The finished run that baselines are compared with.
pub(super) struct Reference {
    /// Its training on each meter.
    pub(super) training: Totals,
    /// Its validation loss, nats per loss token.
    pub(super) val_loss: f64,
    /// Energy of all its phases, on the meter that decides.
    pub(super) energy: Joules,
}

impl Reference {
    /// `None` for a run that ended early or has no validation loss.
    fn of(report: &Report, account: &Account) -> Option<Self> {
        let loss = report.training.val_loss_after;
        let val_loss = loss.filter(|_| report.training.stop_reason.is_regular())?;
        let training = account.by_phase().find(|(phase, _)| *phase == Phase::Train);
        Some(Self {
            training: training.map_or_else(Totals::default, |(_, totals)| totals.clone()),
            val_loss,
            energy: account.spent().energy.joules(),
        })
    }
}

/// The report of a finished run some of whose measured baselines are pending; `None` for any other.
pub(super) fn pending(recipe: &Recipe, directory: &RunDirectory) -> Option<FiniteReport> {
    let report = read_report(&directory.report()).ok()?;
    let comparable =
        report.training.stop_reason.is_regular() && report.training.val_loss_after.is_some();
    let pending = measured_kinds(recipe).any(|kind| !is_complete(&report, kind));
    (comparable && pending).then_some(report)
}

/// Whether a baseline was trained to its end, or found to be impossible.
fn is_complete(report: &Report, kind: BaselineKind) -> bool {
    let mut entries = report.baselines.iter().filter(|entry| entry.kind == kind);
    match entries.find_map(|entry| entry.measured.as_ref()) {
        Some(measured) => measured.stop_reason != BaselineStop::Interrupted,
        None => {
            let warning = not_trained(kind);
            report
                .warnings
                .iter()
                .any(|text| text.starts_with(&warning))
        }
    }
}

/// The start of the warning about a baseline that could not be trained.
fn not_trained(kind: BaselineKind) -> String {
    format!("the {} baseline was not trained", label(kind))
}

/// Trains the pending baselines of `report`, whose run spent through `account`. After each the report's files are written
/// again. Returns the report and whether the user interrupted.
pub(super) fn train_pending(
    context: &RunContext<'_>,
    account: &Account,
    mut report: FiniteReport,
    screen: &mut dyn Screen,
) -> Result<(FiniteReport, bool)> {
    let recipe = &context.prepared.recipe;
    let Some(reference) = Reference::of(&report, account) else {
        return Ok((report, false));
    };
    let mut spent = Joules::ZERO;
    for kind in measured_kinds(recipe) {
        let folder = context.directory.baseline(folder_name(kind));
        if !is_complete(&report, kind) {
            if context.interrupted.load(Ordering::Relaxed) {
                return Ok((report, true));
            }
            let limit = recipe.baseline.budget.map(|budget| budget - spent);
            let mut next = report.into_inner();
            let (folder, target) = (folder.clone(), &mut next);
            train_one(context, kind, &reference, limit, folder, target, screen)?;
            next.training.curve = run_curve(context.directory, account, &next)?;
            report = FiniteReport::new(next)?;
            let energy = reference.energy;
            write_pages(context.prepared, energy, context.directory, &report)?;
        }
        if !is_complete(&report, kind) {
            return Ok((report, true));
        }
        // Checkpoints only served to resume: a baseline has no result but its figures.
        let _ = std::fs::remove_dir_all(folder.join("checkpoints"));
        spent += measured_energy(&report, kind).unwrap_or(Joules::ZERO);
    }
    Ok((report, false))
}

/// The energy of a trained baseline.
fn measured_energy(report: &Report, kind: BaselineKind) -> Option<Joules> {
    let mut entries = report.baselines.iter();
    let entry = entries.find(|entry| entry.kind == kind && entry.measured.is_some())?;
    entry.energy.map(|energy| energy.central)
}

/// Trains one baseline into `report`, or adds a warning why not.
fn train_one(
    context: &RunContext<'_>,
    kind: BaselineKind,
    reference: &Reference,
    limit: Option<Joules>,
    folder: PathBuf,
    report: &mut Report,
    screen: &mut dyn Screen,
) -> Result<()> {
    report
        .baselines
        .retain(|entry| entry.kind != kind || entry.measured.is_none());
    let setup = BaselineSetup::new(context.prepared.subject(), kind);
    let [equal, _] = setup.steps(reference.training.energy_j.counted);
    // A baseline that was begun is resumed, whatever is left.
    let fresh_limit = limit.filter(|_| !folder.exists());
    if let Some(why) = why_impossible(&setup, equal, fresh_limit) {
        report
            .warnings
            .push(format!("{}: {why}", not_trained(kind)));
        return Ok(());
    }
    let run = BaselineRun::open(context, setup, reference, limit, folder)?;
    screen.note(&run.announcement());
    report.baselines.push(run.run(screen)?);
    Ok(())
}

/// The run's loss against its training energy.
fn run_curve(
    directory: &RunDirectory,
    account: &Account,
    report: &Report,
) -> Result<Vec<CurvePoint>> {
    let before = report.training.val_loss_before;
    let curve = LossCurve::read(
        &directory.steps(),
        &directory.ledger(),
        before,
        account.kind(),
    )?;
    Ok(curve.thinned())
}

fn folder_name(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full_fine_tuning",
        _ => "from_scratch",
    }
}

/// A kind in words.
pub(super) fn label(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full fine-tuning",
        BaselineKind::FromScratchSameTask => "from-scratch",
        BaselineKind::Pretraining => "pretraining",
    }
}
