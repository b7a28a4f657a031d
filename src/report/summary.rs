//! The report in one paragraph of plain language.
//!
//! Owns the sentences: what the run cost, against what, what bound it, how sure the numbers are. Takes a report, returns
//! sentences whose every figure names its source. Leaves out what is not known and never calls a forecast a measurement.

use super::budget::entries;
use super::show;
use super::types::{AdapterType, Baseline, BaselineKind, Meter, Report};
use crate::energy::Limit;
use crate::units::Joules;

/// The paragraph.
pub fn summary(report: &Report) -> String {
    let sentences = [
        cost(report),
        bought(report),
        against(report),
        bound(report),
        certainty(report),
    ];
    sentences
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(" ")
}

fn cost(report: &Report) -> Option<String> {
    let (energy, carbon, training) = (&report.energy, &report.carbon, &report.training);
    let what = match (report.adapter.r#type, report.adapter.r) {
        (AdapterType::Lora, Some(r)) => format!(
            "Specialising `{}` with a LoRA adapter of rank {r}",
            report.model.id
        ),
        (AdapterType::Lora, None) => {
            format!("Specialising `{}` with a LoRA adapter", report.model.id)
        }
        (AdapterType::None, _) => format!("Training every weight of `{}`", report.model.id),
    };
    let bounds = show::between(carbon.low_gco2e, carbon.high_gco2e, show::carbon);
    let bounds = bounds.map_or_else(String::new, |bounds| format!(" ({bounds})"));
    let money = report
        .budget
        .spent
        .cost
        .as_ref()
        .map_or_else(String::new, |cost| format!(", for {cost}"));
    Some(format!(
        "{what} took {} in {}, {} of energy ({}) and {}{bounds} on the grid `{}`{money}.",
        show::counted(training.steps, "step"),
        show::time(training.wall_s),
        show::energy(energy.total_j),
        show::word(energy.meter),
        show::carbon(carbon.gco2e),
        carbon.grid
    ))
}

fn bought(report: &Report) -> Option<String> {
    let bought = report.loss_bought()?;
    let (before, after) = (
        report.training.val_loss_before?,
        report.training.val_loss_after?,
    );
    let verb = match bought {
        _ if bought > 0.0 => "fell",
        _ if bought < 0.0 => "rose",
        _ => {
            return Some(format!(
                "The validation loss stayed at {} nats per loss token.",
                show::number(before)
            ));
        }
    };
    Some(format!(
        "The validation loss {verb} from {} to {} nats per loss token.",
        show::number(before),
        show::number(after)
    ))
}

fn against(report: &Report) -> Option<String> {
    let kinds = [
        BaselineKind::FullFineTuning,
        BaselineKind::FromScratchSameTask,
        BaselineKind::Pretraining,
    ];
    let of_kind = |kind| {
        report
            .baselines
            .iter()
            .filter(move |baseline| baseline.kind == kind)
    };
    let clauses: Vec<String> = kinds
        .into_iter()
        .flat_map(of_kind)
        .filter_map(clause)
        .collect();
    match clauses.as_slice() {
        [] => Some("It was not compared with any other way of training.".to_string()),
        [one] => Some(format!("For comparison, {one}.")),
        [start @ .., last] => Some(format!("For comparison, {}, and {last}.", start.join(", "))),
    }
}

fn clause(baseline: &Baseline) -> Option<String> {
    let label = show::word(baseline.label);
    if let Some(loss) = baseline
        .val_loss_at_equal_energy
        .filter(|loss| loss.is_finite())
    {
        let how = if baseline.kind == BaselineKind::FullFineTuning {
            "on every weight"
        } else {
            "from random weights"
        };
        return Some(format!(
            "the same energy spent {how} reached a loss of {} ({label})",
            show::number(loss)
        ));
    }
    // What a baseline that was cut short spent is no price of anything.
    let ratio = show::times(
        baseline
            .ratio
            .filter(|ratio| ratio.is_finite() && baseline.measured.is_none())?,
    );
    let bounds = show::between(baseline.low_ratio, baseline.high_ratio, show::times);
    let how = bounds.map_or_else(|| label.clone(), |bounds| format!("{label}, {bounds}"));
    Some(match baseline.kind {
        BaselineKind::FullFineTuning => {
            format!("training every weight on the same data takes {ratio} times the energy ({how})")
        }
        BaselineKind::FromScratchSameTask => {
            format!("training from random weights takes {ratio} times the energy ({how})")
        }
        BaselineKind::Pretraining => {
            format!("pretraining the model takes {ratio} times the energy on this device ({how})")
        }
    })
}

fn bound(report: &Report) -> Option<String> {
    let reason = &report.training.stop_reason;
    let budget = entries(&report.budget)
        .into_iter()
        .find(|entry| reason.budget().map(Limit::as_str) == Some(entry.name));
    let end = match (reason.to_string().as_str(), budget) {
        (_, Some(entry)) => format!("The {} budget of {} stopped it.", entry.name, entry.allowed),
        ("steps", _) => "It ended with the last step the recipe asked for.".to_string(),
        ("epochs", _) => "It ended with the last epoch the recipe asked for.".to_string(),
        ("interrupted", _) => {
            "It was interrupted; what it had learnt by then was saved.".to_string()
        }
        ("diverged", _) => {
            "It diverged: a loss or a gradient was not finite, and the run stopped there."
                .to_string()
        }
        (word, None) => format!("It ended by `{word}`."),
    };
    let passed = report.budget.overshoot_j.filter(|over| over.0 > 0.0);
    Some(
        end + &passed.map_or_else(String::new, |over| {
            format!(" It passed the energy budget by {}.", show::energy(over))
        }),
    )
}

fn certainty(report: &Report) -> Option<String> {
    let energy = &report.energy;
    let interval = match (energy.low_j, energy.high_j) {
        (Some(low), Some(high)) if low.0.is_finite() && high.0.is_finite() => {
            format!(
                ", and between {} and {} with the coefficients at their bounds",
                show::energy(low),
                show::energy(high)
            )
        }
        _ => String::new(),
    };
    let source = match energy.meter {
        Meter::Counted => format!(
            "counted from the executed work and the coefficients of the profile `{}`",
            energy.device
        ),
        Meter::Measured => {
            "read from the hardware's own counters, which see other programs too".to_string()
        }
        Meter::Timed => format!(
            "the power of the profile `{}` times the wall time",
            energy.device
        ),
    };
    let others: Vec<String> = other_meters(report)
        .into_iter()
        .map(|(name, ratio)| format!("{ratio} times as much by the {name} meter"))
        .collect();
    let beside = if others.is_empty() {
        String::new()
    } else {
        format!("; it is {}", others.join(" and "))
    };
    let host = energy.host_left_out.map_or_else(String::new, |host| {
        let times = host.times().map_or_else(String::new, |times| {
            format!(": with it, about {} times as much", show::times(times))
        });
        format!(" The machine around the device is not in it{times}.")
    });
    let unread = if energy.meters.measured_j.is_none() {
        " No counter of the machine confirms it."
    } else {
        ""
    };
    Some(format!(
        "The energy is {source}{interval}{beside}.{host}{unread}"
    ))
}

/// The meters that `total_j` does not go by, each with its ratio to it.
fn other_meters(report: &Report) -> Vec<(String, String)> {
    let meters = &report.energy.meters;
    let all = [
        (Meter::Counted, Some(meters.counted_j)),
        (Meter::Measured, meters.measured_j),
        (Meter::Timed, meters.timed_j),
    ];
    let others = all
        .into_iter()
        .filter(|(meter, _)| *meter != report.energy.meter);
    let ratio =
        |joules: Joules| Some(joules / report.energy.total_j).filter(|ratio| ratio.is_finite());
    others
        .filter_map(|(meter, joules)| Some((show::word(meter), show::times(ratio(joules?)?))))
        .collect()
}
