//! The report as sections of paragraphs, tables and lists, before any layout.
//!
//! Owns what a report says and in which order. Takes a report, returns sections; `markdown` and `text` lay out the same ones, so
//! that no figure is on one page and not on the other. Knows nothing of files or terminals.

use super::budget::entries;
use super::limits;
use super::measured::at_equal;
use super::show;
use super::table::Table;
use super::types::{Baseline, BaselineKind, Meter, Report};
use crate::units::{Bytes, Flops, Joules};

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
        ("Energy by phase", by_phase(report)),
        ("Energy by meter", by_meter(report)),
        ("Comparison", comparison(report)),
        ("Budget", budget(report)),
        ("Emissions", emissions(report)),
        ("In use", super::inference::section(report.inference.as_ref())),
        ("Data", data(report)),
        ("Warnings", list(report.warnings.clone())),
        ("Sample", sample(report)),
        ("Assumptions and sources", list(limits::assumptions(report))),
        ("What these numbers cannot say", list(limits::limits(report))),
        ("Environment", environment(report)),
    ];
    all.into_iter().filter(|(_, blocks)| !blocks.is_empty()).map(|(title, blocks)| Section { title, blocks }).collect()
}

fn list(items: Vec<String>) -> Vec<Block> {
    if items.is_empty() { Vec::new() } else { vec![Block::Bullets(items)] }
}

/// A table of names and values.
fn pairs(head: [&str; 2], rows: Vec<(&str, String)>) -> Block {
    let mut table = Table::new(&head);
    rows.into_iter().for_each(|(name, value)| table.row([name.to_string(), value]));
    Block::Table(table)
}

fn result(report: &Report) -> Vec<Block> {
    let (training, adapter, model) = (&report.training, &report.adapter, &report.model);
    let trained = show::share(adapter.trainable_parameters as f64, model.parameters as f64);
    let mut rows = vec![
        ("model", format!("`{}`, {}, {} weights", model.id, model.architecture, show::count(model.parameters))),
        ("trained weights", format!("{} ({trained} of the model's number)", show::count(adapter.trainable_parameters))),
        ("steps", show::count(training.steps)),
        ("stopped by", format!("`{}`", training.stop_reason)),
        ("validation loss before", show::or_unknown(training.val_loss_before, show::number)),
        ("validation loss after", show::or_unknown(training.val_loss_after, show::number)),
        ("last training loss", show::or_unknown(training.train_loss_last, show::number)),
        ("tokens per second", show::or_unknown(training.tokens_per_second, show::number)),
        ("wall time", show::time(training.wall_s)),
        ("peak memory", show::or_unknown(training.peak_rss_bytes, |bytes| bytes.to_string())),
    ];
    if let Some(tokens) = training.tokens {
        rows.insert(3, ("tokens trained on", show::count(tokens)));
    }
    if let Some(best) = &training.best {
        let place = format!("step {}, loss {}, `{}`", show::count(best.step), show::number(best.val_loss), best.path);
        rows.push(("best checkpoint", place));
    }
    vec![pairs(["result", "value"], rows), Block::Paragraph("Losses are in nats per loss token.".to_string())]
}

fn by_phase(report: &Report) -> Vec<Block> {
    let energy = &report.energy;
    let mut table = Table::new(&["phase", "energy", "share"]);
    for (phase, joules) in &energy.by_phase {
        let name = show::word(phase);
        table.row([name, show::energy(*joules), show::share(joules.0, energy.total_j.0)]);
    }
    table.row(["all".to_string(), show::energy(energy.total_j), show::share(energy.total_j.0, energy.total_j.0)]);
    let mut blocks = vec![Block::Table(table)];
    if let Some(parts) = &energy.counted_parts {
        let whole = energy.meters.counted_j.0;
        let part = |joules: Joules| show::share(joules.0, whole);
        blocks.push(Block::Paragraph(format!(
            "Of the counted energy, {} went into arithmetic, {} into moving data and {} into the device's idle power.",
            part(parts.arithmetic_j),
            part(parts.movement_j),
            part(parts.idle_j)
        )));
    }
    let work =
        format!("The run executed {} and moved {} to and from memory", show::flops(Flops(energy.flops as f64)), energy.bytes);
    blocks.push(Block::Paragraph(match energy.bytes_by_level.is_empty() {
        true => work + ".",
        false => format!("{work}; by level: {}.", levels(energy.bytes_by_level.iter())),
    }));
    blocks
}

fn levels<'a>(levels: impl Iterator<Item = (&'a String, &'a Bytes)>) -> String {
    levels.map(|(name, bytes)| format!("{name} {bytes}")).collect::<Vec<_>>().join(", ")
}

fn by_meter(report: &Report) -> Vec<Block> {
    let energy = &report.energy;
    let meters = &energy.meters;
    let mut table = Table::new(&["meter", "energy", "to counted", "is"]);
    let rows = [
        (Meter::Counted, Some(meters.counted_j), "executed FLOPs and bytes times the device profile, plus idle power"),
        (Meter::Measured, meters.measured_j, "the hardware's energy counters"),
        (Meter::Timed, meters.timed_j, "profile power times wall time"),
    ];
    for (meter, joules, is) in rows {
        let used = if meter == energy.meter { " (used)" } else { "" };
        let ratio = show::or_unknown(joules, |joules| show::times(joules / meters.counted_j));
        let shown = joules.map_or_else(|| "not available".to_string(), show::energy);
        table.row([format!("{}{used}", show::word(meter)), shown, ratio, is.to_string()]);
    }
    let mut blocks = vec![Block::Table(table)];
    if let Some(absent) = &energy.measured_absent {
        blocks.push(Block::Paragraph(format!("Not measured: {}. To measure: {}", absent.reason, absent.remedy)));
    }
    blocks
}

fn comparison(report: &Report) -> Vec<Block> {
    if report.baselines.is_empty() {
        return vec![Block::Paragraph("No baseline was counted.".to_string())];
    }
    let mut table = Table::new(&["way of training", "FLOPs", "energy", "emissions", "times this run", "known how"]);
    let (energy, own) = (&report.energy, "this run".to_string());
    let flops = show::flops(Flops(energy.flops as f64));
    let how = show::word(energy.meter);
    table.row([own, flops, show::energy(energy.total_j), show::carbon(report.carbon.gco2e), "1".to_string(), how]);
    let mut baselines: Vec<&Baseline> = report.baselines.iter().collect();
    baselines.sort_by_key(|baseline| baseline.kind);
    if baselines[0].kind != BaselineKind::FullFineTuning {
        let mut row = vec![kind_words(BaselineKind::FullFineTuning).to_string()];
        row.resize(6, show::UNKNOWN.to_string());
        table.row(row);
    }
    for baseline in &baselines {
        table.row([
            kind_words(baseline.kind).to_string(),
            show::or_unknown(baseline.flops, show::flops),
            show::or_unknown(baseline.energy_j, show::energy),
            show::or_unknown(baseline.gco2e, show::carbon),
            show::or_unknown(baseline.ratio, show::times),
            show::word(baseline.label),
        ]);
    }
    let equal = baselines.iter().flat_map(|baseline| at_equal(baseline)).collect();
    let mut blocks = vec![Block::Table(table)];
    blocks.extend(list(equal));
    if baselines.iter().any(|baseline| baseline.kind == BaselineKind::Pretraining) {
        let yardstick = "Beside pretraining every fine-tuning looks cheap; the yardstick for an adapter is full fine-tuning.";
        blocks.push(Block::Paragraph(yardstick.to_string()));
    }
    blocks
}

/// A baseline's name on a page.
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
        return vec![Block::Paragraph("The recipe set no budget.".to_string())];
    }
    let mut table = Table::new(&["budget", "allowed", "spent", "used", "stopped the run"]);
    for entry in entries {
        let stopped = if report.training.stop_reason.budget() == Some(entry.name) { "yes" } else { "no" };
        table.row([entry.name.to_string(), entry.allowed, entry.spent, entry.used, stopped.to_string()]);
    }
    let mut blocks = vec![Block::Table(table)];
    blocks.extend(report.budget.overshoot_j.map(|over| {
        Block::Paragraph(match over.0 > 0.0 {
            true => format!("The energy budget was passed by {}.", show::energy(over)),
            false => "The energy budget was not passed.".to_string(),
        })
    }));
    blocks
}

fn emissions(report: &Report) -> Vec<Block> {
    let (carbon, total) = (&report.carbon, report.energy.total_j);
    let year = carbon.year.map_or_else(|| "year not known".to_string(), |year| year.to_string());
    let mut rows = vec![
        ("the machine's energy", show::energy(total)),
        ("facility overhead", format!("{} (PUE {})", show::energy(carbon.pue * total - total), show::number(carbon.pue.value()))),
        ("facility energy", show::energy(carbon.pue * total)),
        ("grid", format!("`{}`, {} gCO2e/kWh, {year}", carbon.grid, show::number(carbon.gco2e_per_kwh.0))),
        ("emitted", show::carbon(carbon.gco2e)),
    ];
    if let (Some(low), Some(high)) = (carbon.low_gco2e, carbon.high_gco2e) {
        rows.push(("between", format!("{} and {}", show::carbon(low), show::carbon(high))));
    }
    if let Some(embodied) = carbon.embodied_gco2e {
        rows.push(("device's manufacture, not included", show::carbon(embodied)));
    }
    vec![pairs(["emissions of the electricity", "value"], rows)]
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
        let sources: Vec<String> = data.sources.iter().map(|source| format!("`{source}`")).collect();
        rows.push(("from", sources.join(", ")));
    }
    if let Some(fingerprint) = &data.fingerprint {
        rows.push(("fingerprint", format!("`{fingerprint}`")));
    }
    vec![pairs(["training set", "count"], rows)]
}

fn sample(report: &Report) -> Vec<Block> {
    let Some(sample) = &report.sample else { return Vec::new() };
    let texts = [("Prompt", &sample.prompt), ("Before", &sample.before), ("After", &sample.after)];
    texts.into_iter().map(|(caption, text)| Block::Verbatim(caption, text.clone())).collect()
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
