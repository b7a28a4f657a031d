//! The report in one paragraph: cost, loss, baselines, stop reason, certainty.
//!
//! Every figure names its source; what is not known is left out.

use super::baselines::{Baseline, BaselineKind, sorted};
use super::energy::Energy;
use super::format;
use super::sections::budget_rows;
use super::types::{AdapterType, Meter, Report};
use crate::train::Stop;
use crate::units::Joules;

/// The paragraph.
pub fn summary(report: &Report) -> String {
    let loss = loss(report);
    let machine = report.energy.this_machine.as_ref();
    let machine =
        machine.map(|machine| format!("Energy is {}.", machine.beside(&report.energy.device)));
    let sentences = [machine, Some(cost(report)), loss, Some(comparison(report))];
    let ending = [stop(report), certainty(report)];
    let all: Vec<String> = sentences.into_iter().flatten().chain(ending).collect();
    all.join(" ")
}

fn cost(report: &Report) -> String {
    let method = match (report.adapter.r#type, report.adapter.r) {
        (AdapterType::Lora, Some(r)) => format!("with a LoRA adapter of rank {r}"),
        (AdapterType::Lora, None) => "with a LoRA adapter".to_string(),
        (AdapterType::None, _) => "with every weight trained".to_string(),
    };
    let carbon = &report.carbon;
    let range = format::range(&carbon.emissions, format::carbon).map(|range| format!(" ({range})"));
    let money = report.budget.spent.cost.as_ref();
    let money = money.map(|cost| format!(", for {cost}"));
    format!(
        "Fine-tuning `{}` {method} took {}, {}, {} of {} energy and {}{} on the grid `{}`{}.",
        report.model.id,
        format::counted(report.training.steps, "step"),
        format::time(report.training.wall_s),
        format::energy(report.energy.total.central),
        format::word(report.energy.meter),
        format::carbon(carbon.emissions.central),
        range.unwrap_or_default(),
        carbon.grid,
        money.unwrap_or_default()
    )
}

fn loss(report: &Report) -> Option<String> {
    let reduction = report.loss_reduction()?;
    let before = format::number(report.training.val_loss_before?);
    let after = format::number(report.training.val_loss_after?);
    let unit = report.training.loss_unit.words();
    Some(if reduction > 0.0 {
        format!("Validation loss fell from {before} to {after} {unit}.")
    } else if reduction < 0.0 {
        format!("Validation loss rose from {before} to {after} {unit}.")
    } else {
        format!("Validation loss stayed at {before} {unit}.")
    })
}

fn comparison(report: &Report) -> String {
    let baselines = sorted(report);
    let clauses: Vec<String> = baselines.into_iter().filter_map(clause).collect();
    match clauses.as_slice() {
        [] => "No baseline was computed.".to_string(),
        [one] => format!("For comparison, {one}."),
        [start @ .., last] => format!("For comparison, {}, and {last}.", start.join(", ")),
    }
}

fn clause(baseline: &Baseline) -> Option<String> {
    let label = format::word(baseline.label);
    if let Some(loss) = baseline.val_loss_at_equal_energy {
        let start = if baseline.kind == BaselineKind::FullFineTuning {
            "on every weight"
        } else {
            "from random weights"
        };
        let loss = format::number(loss);
        return Some(format!(
            "the same energy spent {start} reached a loss of {loss} ({label})"
        ));
    }
    // The energy of an incomplete training says nothing.
    if baseline.measured.is_some() {
        return None;
    }
    let ratio = baseline.ratio?;
    let times = format::times(ratio.central);
    let basis = match format::range(&ratio, format::times) {
        Some(range) => format!("{label}, {range}"),
        None => label,
    };
    let what = match baseline.kind {
        BaselineKind::FullFineTuning => "full fine-tuning on the same data takes",
        BaselineKind::FromScratchSameTask => "training from random weights takes",
        BaselineKind::Pretraining => "pretraining the model on this device takes",
    };
    Some(format!("{what} {times} times the energy ({basis})"))
}

fn stop(report: &Report) -> String {
    let reason = &report.training.stop_reason;
    let steps = format::counted(report.training.steps, "step");
    let rows = budget_rows(&report.budget);
    let row = |limit| rows.iter().find(|row| row.limit == limit);
    let mut text = match reason {
        Stop::Budget(limit) => {
            let allowed = row(*limit).map(|row| format!("{} ", row.allowed));
            format!(
                "It stopped at its {}{limit} budget.",
                allowed.unwrap_or_default()
            )
        }
        Stop::Steps => format!("It stopped after the requested {steps}."),
        Stop::Epochs => format!("It stopped after the requested epochs, {steps}."),
        Stop::EarlyStopping => {
            format!("It stopped early, after {steps}: the validation loss fell too little.")
        }
        Stop::Interrupted => "It was interrupted; progress is saved.".to_string(),
        Stop::Diverged(_) => "It diverged: a loss or gradient was not finite.".to_string(),
    };
    for row in &rows {
        if let Some(excess) = &row.excess {
            text += &format!(" It exceeded the {} budget by {excess}.", row.limit);
        }
    }
    text
}

/// Source and range of the energy, the other meters, and what is not included.
fn certainty(report: &Report) -> String {
    let energy = &report.energy;
    let source = match energy.meter {
        Meter::Counted => format!(
            "counted from executed work and the coefficients of the profile `{}`",
            energy.device
        ),
        Meter::Measured => format!(
            "read from hardware counters, which include other programs{}",
            estimated(report)
        ),
        Meter::Timed => format!(
            "the rated power of the profile `{}` x wall time",
            energy.device
        ),
    };
    let range = format::range_suffix(&energy.total, |joules| joules.to_string());
    let mut text = format!("Energy is {source}{range}.");
    text += &other_meters(energy);
    if let Some(host) = energy.host_left_out {
        let times = host
            .times()
            .map(|times| format!(": with it, about {} times as much", format::times(times)));
        text += &format!(
            " The host machine is not included{}.",
            times.unwrap_or_default()
        );
    }
    if energy.meters.measured_j.is_none() && energy.meter != Meter::Measured {
        let absent = energy.measured_absent.as_ref();
        text += &absent.filter(|absent| absent.distrusted).map_or_else(
            || " No hardware counter available.".to_string(),
            |absent| format!(" Not measured: {}.", absent.reason),
        );
    }
    text
}

/// A sentence for each further meter.
fn other_meters(energy: &Energy) -> String {
    let meters = &energy.meters;
    let others = [
        (Meter::Counted, "Counting gives", Some(meters.counted_j)),
        (Meter::Measured, "Hardware counters give", meters.measured_j),
        (
            Meter::Timed,
            "Rated power x wall time gives",
            meters.timed_j,
        ),
    ];
    let sentences = others.into_iter().filter_map(|(meter, gives, joules)| {
        let joules = joules.filter(|_| meter != energy.meter)?;
        Some(format!(
            " {gives} {}.",
            other_meter(joules, energy.total.central)
        ))
    });
    sentences.collect()
}

/// The share of a measured total that stands in for failed readings.
fn estimated(report: &Report) -> String {
    let gaps = report
        .energy
        .reconciliation
        .iter()
        .flat_map(|found| &found.gaps);
    let filled: Joules = gaps.map(|gap| gap.energy_j).sum();
    if filled.0 > 0.0 {
        let share = format::share(filled.0, report.energy.total.central.0);
        format!("; {share} of it is estimated, where they failed")
    } else {
        String::new()
    }
}

/// "5.85 kJ (1.63 times)".
fn other_meter(joules: Joules, total: Joules) -> String {
    let ratio = Some(joules / total).filter(|ratio| ratio.is_finite());
    let ratio = ratio.map(|ratio| format!(" ({} times)", format::times(ratio)));
    format!("{joules}{}", ratio.unwrap_or_default())
}
