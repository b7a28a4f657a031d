//! The report as sections of paragraphs, tables and lists, before any layout.
//!
//! Owns what a report says and in which order. Takes a report, returns sections; `markdown` and `text` lay out the same ones, so
//! that no figure is on one page and not on the other. Knows nothing of files or terminals.

use super::budget::entries;
use super::limits;
use super::measured::at_equal;
use super::memory;
use super::parts::{self, HostLeftOut};
use super::reconciliation;
use super::show;
use super::table::Table;
use super::types::{Baseline, BaselineKind, Meter, Report};
use crate::energy::Limit;
use crate::units::{Flops, Joules};

/// A part of a section.
pub enum Block {
    /// One paragraph.
    Paragraph(String),
    /// A table.
    Table(Table),
    /// A list.
    Bullets(Vec<String>),
    /// A caption and text to be shown as it stands.
    Verbatim(&'static str, String),
}

/// A heading and what stands under it.
pub struct Section {
    /// The heading.
    pub title: &'static str,
    /// What stands under it.
    pub blocks: Vec<Block>,
}

/// Every section of the page, in reading order; empty ones are left out.
pub fn sections(report: &Report) -> Vec<Section> {
    let all = [
        ("Result", result(report)),
        ("Memory", memory::blocks(report)),
        ("Energy by phase", by_phase(report)),
        ("What the energy went into", parts::blocks(&report.energy)),
        ("Energy by meter", by_meter(report)),
        (
            "Measured against counted",
            reconciliation::section(report.energy.reconciliation.as_ref()),
        ),
        ("Comparison", comparison(report)),
        ("Budget", budget(report)),
        ("Emissions", emissions(report)),
        (
            "In use",
            super::inference::section(report.inference.as_ref()),
        ),
        ("Data", data(report)),
        ("Warnings", list(report.warnings.clone())),
        ("Sample", sample(report)),
        ("Assumptions and sources", list(limits::assumptions(report))),
        (
            "What these numbers cannot say",
            list(limits::limits(report)),
        ),
        ("Environment", environment(report)),
    ];
    all.into_iter()
        .filter(|(_, blocks)| !blocks.is_empty())
        .map(|(title, blocks)| Section { title, blocks })
        .collect()
}

fn list(items: Vec<String>) -> Vec<Block> {
    if items.is_empty() {
        Vec::new()
    } else {
        vec![Block::Bullets(items)]
    }
}

/// A table of names and values.
pub fn pairs(head: [&str; 2], rows: Vec<(&str, String)>) -> Block {
    let mut table = Table::new(&head);
    rows.into_iter()
        .for_each(|(name, value)| table.row([name.to_string(), value]));
    Block::Table(table)
}

fn result(report: &Report) -> Vec<Block> {
    let (training, adapter, model) = (&report.training, &report.adapter, &report.model);
    let trained = show::share(adapter.trainable_parameters as f64, model.parameters as f64);
    let mut rows = vec![
        (
            "model",
            format!(
                "`{}`, {}, {} weights",
                model.id,
                model.architecture,
                show::count(model.parameters)
            ),
        ),
        (
            "trained weights",
            format!(
                "{} ({trained} of the model's number)",
                show::count(adapter.trainable_parameters)
            ),
        ),
        ("steps", show::count(training.steps)),
        ("stopped by", format!("`{}`", training.stop_reason)),
        (
            "validation loss before",
            show::or_unknown(training.val_loss_before, show::number),
        ),
        (
            "validation loss after",
            show::or_unknown(training.val_loss_after, show::number),
        ),
        (
            "last training loss",
            show::or_unknown(training.train_loss_last, show::number),
        ),
        (
            "tokens per second",
            show::or_unknown(training.tokens_per_second, show::number),
        ),
        ("wall time", show::time(training.wall_s)),
    ];
    if let Some(tokens) = training.tokens {
        rows.insert(3, ("tokens trained on", show::count(tokens)));
    }
    if let Some(best) = &training.best {
        let place = format!(
            "step {}, loss {}, `{}`",
            show::count(best.step),
            show::number(best.val_loss),
            best.path
        );
        rows.push(("best checkpoint", place));
    }
    vec![
        pairs(["result", "value"], rows),
        Block::Paragraph("Losses are in nats per loss token.".to_string()),
    ]
}

fn by_phase(report: &Report) -> Vec<Block> {
    let energy = &report.energy;
    let mut table = Table::new(&["phase", "energy", "share"]);
    for (phase, joules) in &energy.by_phase {
        let name = show::word(phase);
        table.row([
            name,
            show::energy(*joules),
            show::share(joules.0, energy.total_j.0),
        ]);
    }
    table.row([
        "all".to_string(),
        show::energy(energy.total_j),
        show::share(energy.total_j.0, energy.total_j.0),
    ]);
    vec![Block::Table(table)]
}

fn by_meter(report: &Report) -> Vec<Block> {
    let energy = &report.energy;
    let meters = &energy.meters;
    let mut table = Table::new(&["meter", "energy", "to counted", "is"]);
    let counters = energy
        .reconciliation
        .as_ref()
        .map(|found| found.measured_by.join("; "));
    let counters = counters.unwrap_or_else(|| "the hardware's energy counters".to_string());
    let counted = "executed FLOPs and bytes times the device profile, plus idle power".to_string();
    let rows = [
        (Meter::Counted, Some(meters.counted_j), counted),
        (Meter::Measured, meters.measured_j, counters),
        (
            Meter::Timed,
            meters.timed_j,
            "profile power times wall time".to_string(),
        ),
    ];
    for (meter, joules, is) in rows {
        let used = if meter == energy.meter { " (used)" } else { "" };
        let ratio = show::or_unknown(joules, |joules| show::times(joules / meters.counted_j));
        let shown = joules.map_or_else(|| "not available".to_string(), show::energy);
        table.row([format!("{}{used}", show::word(meter)), shown, ratio, is]);
    }
    let mut blocks = vec![Block::Table(table)];
    if let Some(absent) = &energy.measured_absent {
        blocks.push(Block::Paragraph(format!(
            "Not measured: {}. To measure: {}",
            absent.reason, absent.remedy
        )));
    }
    blocks
}

fn comparison(report: &Report) -> Vec<Block> {
    if report.baselines.is_empty() {
        return vec![Block::Paragraph("No baseline was counted.".to_string())];
    }
    let mut table = Table::new(&[
        "way of training",
        "FLOPs",
        "energy",
        "emissions",
        "times this run",
        "known how",
    ]);
    let (energy, own) = (&report.energy, "this run".to_string());
    let flops = show::flops(Flops(energy.flops as f64));
    let how = show::word(energy.meter);
    table.row([
        own,
        flops,
        show::energy(energy.total_j),
        show::carbon(report.carbon.gco2e),
        "1".to_string(),
        how,
    ]);
    let mut baselines: Vec<&Baseline> = report.baselines.iter().collect();
    baselines.sort_by_key(|baseline| baseline.kind);
    if baselines[0].kind != BaselineKind::FullFineTuning {
        let mut row = vec![kind_words(BaselineKind::FullFineTuning).to_string()];
        row.resize(6, show::UNKNOWN.to_string());
        table.row(row);
    }
    for baseline in &baselines {
        table.row([
            name(baseline),
            show::or_unknown(baseline.flops, show::flops),
            show::or_unknown(baseline.energy_j, show::energy),
            show::or_unknown(baseline.gco2e, show::carbon),
            show::or_unknown(baseline.ratio, show::times) + &ratio_bounds(baseline),
            known_how(baseline, energy.meter),
        ]);
    }
    let mut beside: Vec<String> = baselines
        .iter()
        .filter_map(|baseline| between(baseline))
        .collect();
    beside.extend(baselines.iter().flat_map(|baseline| at_equal(baseline)));
    let mut blocks = vec![Block::Table(table)];
    blocks.extend(as_metered(&baselines, energy.meter));
    blocks.extend(list(beside));
    if baselines
        .iter()
        .any(|baseline| baseline.kind == BaselineKind::Pretraining)
    {
        let yardstick = "Beside pretraining every fine-tuning looks cheap; the yardstick for an adapter is full fine-tuning.";
        blocks.push(Block::Paragraph(yardstick.to_string()));
    }
    blocks
}

/// " (1.2 to 1.3)"; nothing where it is not known or does not show.
fn ratio_bounds(baseline: &Baseline) -> String {
    let bounds = baseline
        .low_ratio
        .map(show::times)
        .zip(baseline.high_ratio.map(show::times));
    bounds
        .filter(|(low, high)| low != high)
        .map_or_else(String::new, |(low, high)| format!(" ({low} to {high})"))
}

/// How far a baseline's energy and emissions may be off.
fn between(baseline: &Baseline) -> Option<String> {
    let energy = show::between(baseline.low_j, baseline.high_j, |joules| joules.to_string());
    let carbon = show::between(baseline.low_gco2e, baseline.high_gco2e, show::carbon);
    let both: Vec<String> = [energy, carbon].into_iter().flatten().collect();
    (!both.is_empty()).then(|| format!("{}: {}", name(baseline), both.join(", ")))
}

/// A baseline's name on a page; one that was trained stands beside the counted one of its kind.
pub fn name(baseline: &Baseline) -> String {
    let trained = if baseline.measured.is_some() {
        ", trained here"
    } else {
        ""
    };
    format!("{}{trained}", kind_words(baseline.kind))
}

/// Where a baseline's figures come from. What was trained read its energy on the run's meter.
fn known_how(baseline: &Baseline, meter: Meter) -> String {
    match baseline.measured {
        Some(_) => format!("trained, its energy {}", show::word(meter)),
        None => {
            let times = baseline
                .metered_over_counted
                .map_or_else(String::new, |times| {
                    format!(", times {}", show::number(times))
                });
            show::word(baseline.label) + &times
        }
    }
}

/// What "counted, times 7.2" is, where a row says so.
fn as_metered(baselines: &[&Baseline], meter: Meter) -> Option<Block> {
    let times = baselines
        .iter()
        .find_map(|baseline| baseline.metered_over_counted)?;
    Some(Block::Paragraph(format!(
        "This run is {} and took {} times what was counted of it; counted baselines are multiplied with that, to be held against it.",
        show::word(meter),
        show::number(times)
    )))
}

/// The name of a kind of baseline.
pub fn kind_words(kind: BaselineKind) -> &'static str {
    match kind {
        BaselineKind::FullFineTuning => "full fine-tuning",
        BaselineKind::FromScratchSameTask => "from scratch, same task",
        BaselineKind::Pretraining => "pretraining",
    }
}

fn budget(report: &Report) -> Vec<Block> {
    let entries = entries(&report.budget);
    if entries.is_empty() {
        let none = Block::Paragraph("The recipe set no budget.".to_string());
        return [none]
            .into_iter()
            .chain(money(report).map(Block::Paragraph))
            .collect();
    }
    let mut table = Table::new(&["budget", "allowed", "spent", "used", "stopped the run"]);
    for entry in entries {
        let stopped = if report.training.stop_reason.budget().map(Limit::as_str) == Some(entry.name)
        {
            "yes"
        } else {
            "no"
        };
        table.row([
            entry.name.to_string(),
            entry.allowed,
            entry.spent,
            entry.used,
            stopped.to_string(),
        ]);
    }
    let mut blocks = vec![Block::Table(table)];
    blocks.extend(money(report).map(Block::Paragraph));
    blocks.extend(
        report
            .budget
            .overshoot_j
            .map(|over| Block::Paragraph(passed(over, report.budget.margin_j))),
    );
    blocks
}

/// By how much an energy budget was passed, and by how much at most it could have been.
fn passed(over: Joules, margin: Option<Joules>) -> String {
    let passed = match over.0 > 0.0 {
        true => format!("The energy budget was passed by {}.", show::energy(over)),
        false => "The energy budget was not passed.".to_string(),
    };
    match margin.filter(|margin| margin.0 > 0.0) {
        Some(margin) => {
            let margin = show::energy(margin);
            format!(
                "{passed} On a sensor a step's cost is predicted: the last step and what followed it cost {margin} more than that."
            )
        }
        None => passed,
    }
}

/// What the run cost, where there was a price.
fn money(report: &Report) -> Option<String> {
    let budget = &report.budget;
    let between = show::between(
        budget.spent_low.cost.clone(),
        budget.spent_high.cost.clone(),
        |money| money.to_string(),
    );
    let between = between.map_or_else(String::new, |between| {
        format!(", {between} with the coefficients at their bounds")
    });
    budget
        .spent
        .cost
        .as_ref()
        .map(|cost| format!("At the recipe's price the run cost {cost}{between}."))
}

fn emissions(report: &Report) -> Vec<Block> {
    let (carbon, total) = (&report.carbon, report.energy.total_j);
    let year = carbon
        .year
        .map_or_else(|| "year not known".to_string(), |year| year.to_string());
    let host = report.energy.host_left_out;
    let mut rows = vec![(
        if host.is_some() {
            "the device's energy"
        } else {
            "the machine's energy"
        },
        show::energy(total),
    )];
    rows.extend(host.map(|host| ("the machine around it, not included", around(host, total))));
    rows.extend([
        (
            "facility overhead",
            format!(
                "{} (PUE {})",
                show::energy(carbon.pue * total - total),
                show::number(carbon.pue.value())
            ),
        ),
        ("facility energy", show::energy(carbon.pue * total)),
        (
            "grid",
            format!(
                "`{}`, {} gCO2e/kWh, {year}",
                carbon.grid,
                show::number(carbon.gco2e_per_kwh.0)
            ),
        ),
    ]);
    rows.extend(
        carbon
            .place
            .iter()
            .map(|place| ("the grid's place", place.clone())),
    );
    rows.extend(
        carbon
            .basis
            .iter()
            .map(|basis| ("what its intensity counts", basis.clone())),
    );
    rows.push(("emitted", show::carbon(carbon.gco2e)));
    let bounds = show::between(carbon.low_gco2e, carbon.high_gco2e, show::carbon);
    rows.extend(bounds.map(|bounds| ("with the coefficients at their bounds", bounds)));
    let made = match carbon.embodied_gco2e {
        Some(embodied) => show::carbon(embodied),
        None => "not known for this device".to_string(),
    };
    rows.push(("the device's manufacture, not included", made));
    rows.extend(
        carbon
            .dataset_sha256
            .iter()
            .map(|hash| ("SHA-256 of the grid tables", format!("`{hash}`"))),
    );
    vec![pairs(["emissions of the electricity", "value"], rows)]
}

/// What the machine around a device takes while the device takes `energy`.
fn around(host: HostLeftOut, energy: Joules) -> String {
    let known = host.share.zip(host.times());
    known.map_or_else(
        || "its share is not known".to_string(),
        |(share, times)| {
            format!(
                "about {}: {} of a machine's power",
                show::energy(energy * (times - 1.0)),
                show::share(share, 1.0)
            )
        },
    )
}

fn data(report: &Report) -> Vec<Block> {
    let data = &report.data;
    let mut rows = vec![
        ("records", show::count(data.examples)),
        ("tokens", show::count(data.tokens)),
        ("loss tokens", show::count(data.loss_tokens)),
        ("cut at `max_length`", show::count(data.truncated)),
        ("dropped, no loss token left", show::count(data.dropped)),
        ("skipped, could not be read", show::count(data.skipped)),
    ];
    if !data.sources.is_empty() {
        let sources: Vec<String> = data
            .sources
            .iter()
            .map(|source| format!("`{source}`"))
            .collect();
        rows.push(("from", sources.join(", ")));
    }
    if let Some(fingerprint) = &data.fingerprint {
        rows.push(("fingerprint", format!("`{fingerprint}`")));
    }
    vec![pairs(["training set", "count"], rows)]
}

fn sample(report: &Report) -> Vec<Block> {
    let Some(sample) = &report.sample else {
        return Vec::new();
    };
    let texts = [
        ("Prompt", &sample.prompt),
        ("Before", &sample.before),
        ("After", &sample.after),
    ];
    texts
        .into_iter()
        .map(|(caption, text)| Block::Verbatim(caption, text.clone()))
        .collect()
}

fn environment(report: &Report) -> Vec<Block> {
    let environment = &report.environment;
    vec![Block::Paragraph(format!(
        "wattune {} on {}, {}, {}; device profile `{}`.",
        environment.version,
        environment.os,
        environment.cpu,
        show::counted(environment.threads, "thread"),
        report.energy.device
    ))]
}
