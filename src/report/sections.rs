//! The report as sections of paragraphs, tables and lists, before layout.
//!
//! Owns what a report shows and in which order; every page lays out the same sections, so that all show the same figures.
//! Knows nothing of files, templates or terminals.

use serde::Serialize;

use super::energy::{self, Factor, HostLeftOut};
use super::text::Table;
use super::types::{Amounts, Budget, Carbon, Memory, Meter, Report};
use super::{baselines, format, inference};
use crate::energy::Limit;
use crate::energy::interval::{MODEL_FACTOR, TIMED_FACTOR};
use crate::units::{Bytes, Flops, GramsCo2e, Joules, Money, Seconds};

/// A part of a section. Text between backticks is code.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// One paragraph.
    Paragraph(String),
    /// A table.
    Table(Table),
    /// A list.
    Bullets(Vec<String>),
    /// Preformatted text.
    Verbatim {
        /// Its caption.
        caption: &'static str,
        /// The text.
        text: String,
    },
}

/// A heading and its blocks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Section {
    /// The heading.
    pub title: &'static str,
    /// In reading order.
    pub blocks: Vec<Block>,
}

/// Every section in reading order; empty ones are left out.
pub fn sections(report: &Report) -> Vec<Section> {
    let reconciliation = report.energy.reconciliation.as_ref();
    let all = [
        ("Result", result(report)),
        ("Confusion matrix", confusion(report)),
        ("Sample", sample(report)),
        ("Memory", memory(report)),
        ("Energy by phase", energy::by_phase(&report.energy)),
        ("Energy by component", energy::by_component(&report.energy)),
        ("Energy by meter", energy::by_meter(&report.energy)),
        (
            "Measured vs counted",
            energy::reconciliation(reconciliation),
        ),
        ("Comparison", baselines::comparison(report)),
        ("Budget", budget(report)),
        ("Emissions", emissions(report)),
        ("Inference", inference::section(report.inference.as_ref())),
        ("Data", data(report)),
        ("Portability", portability(report)),
        ("Hyperparameters", hyperparameters(report)),
        ("Warnings", bullets(report.warnings.clone())),
        ("Assumptions and sources", bullets(assumptions(report))),
        ("Limitations", bullets(limitations(report))),
        ("Environment", environment(report)),
    ];
    all.into_iter()
        .filter(|(_, blocks)| !blocks.is_empty())
        .map(|(title, blocks)| Section { title, blocks })
        .collect()
}

fn hyperparameters(report: &Report) -> Vec<Block> {
    let rows = report.hyperparameters.iter().map(|(key, value)| {
        let value = match value.as_str() {
            Some(text) => text.to_string(),
            None => value.to_string(),
        };
        (key.as_str(), value)
    });
    let rows: Vec<(&str, String)> = rows.collect();
    if rows.is_empty() {
        return Vec::new();
    }
    vec![Block::Table(Table::pairs(["recipe key", "value"], rows))]
}

/// A list; no block where it is empty.
pub(super) fn bullets(items: Vec<String>) -> Vec<Block> {
    if items.is_empty() {
        Vec::new()
    } else {
        vec![Block::Bullets(items)]
    }
}

fn result(report: &Report) -> Vec<Block> {
    let training = &report.training;
    let model = &report.model;
    let trainable = report.adapter.trainable_parameters;
    let share = format::share(trainable as f64, model.parameters as f64);
    let count = format::count(model.parameters);
    let loss = |loss| format::or_unknown(loss, format::number);
    let mut rows = vec![
        (
            "model",
            format!("`{}`, {}, {count} parameters", model.id, model.architecture),
        ),
        (
            "trainable parameters",
            format!("{} ({share} of all parameters)", format::count(trainable)),
        ),
        ("steps", format::count(training.steps)),
        ("stop reason", format!("`{}`", training.stop_reason)),
        ("validation loss before", loss(training.val_loss_before)),
        ("validation loss after", loss(training.val_loss_after)),
        ("last training loss", loss(training.train_loss_last)),
        ("tokens per second", loss(training.tokens_per_second)),
        ("wall time", format::time(training.wall_s)),
    ];
    if let Some(cpu) = training.cpu_s {
        let threads = report.environment.threads;
        let share = format::share(cpu.0, training.wall_s.0 * threads as f64);
        let of = format::counted(threads, "thread");
        let text = format!("{}, {share} of {of}", format::time(cpu));
        rows.push(("processor time", text));
    }
    if let Some(metrics) = training.metrics {
        let figures = metrics.named().into_iter();
        rows.extend(figures.map(|(name, figure)| (name, format::number(figure))));
    }
    if let Some(tokens) = training.tokens {
        rows.insert(3, ("training tokens", format::count(tokens)));
    }
    if let Some(best) = &training.best {
        let step = format::count(best.step);
        let loss = format::number(best.val_loss);
        let place = format!("step {step}, loss {loss}, `{}`", best.path);
        rows.push(("best checkpoint", place));
    }
    let mut note = format!("Losses are {}.", training.loss_unit.sentence());
    if training.metrics.is_some() {
        note += " Metrics are those of the validation records after training.";
    }
    vec![
        Block::Table(Table::pairs(["result", "value"], rows)),
        Block::Paragraph(note),
    ]
}

/// Counts of the validation records by true and predicted class.
fn confusion(report: &Report) -> Vec<Block> {
    /// Most classes of a table that can be read.
    const MOST_SHOWN: usize = 20;
    let Some(matrix) = &report.training.confusion_matrix else {
        return Vec::new();
    };
    if matrix.labels.len() > MOST_SHOWN {
        let classes = format::count(matrix.labels.len() as u64);
        let text = format!("The matrix of {classes} classes is in `report.json`.");
        return vec![Block::Paragraph(text)];
    }
    let head = ["true class \\ predicted"].into_iter();
    let head: Vec<&str> = head
        .chain(matrix.labels.iter().map(String::as_str))
        .collect();
    let mut table = Table::new(&head);
    for (label, counts) in matrix.labels.iter().zip(&matrix.counts) {
        let counts = counts.iter().map(|count| format::count(*count));
        table.row(std::iter::once(label.clone()).chain(counts));
    }
    vec![Block::Table(table)]
}

/// What other programs do with the adapter.
fn portability(report: &Report) -> Vec<Block> {
    let verdicts = &report.adapter.portability;
    if verdicts.is_empty() {
        return Vec::new();
    }
    let mut table = Table::new(&["runtime", "verdict", "reasons"]);
    for verdict in verdicts {
        let (runtime, words) = (verdict.runtime.clone(), verdict.verdict.clone());
        table.row([runtime, words, verdict.reasons.join("; ")]);
    }
    vec![Block::Table(table)]
}

/// The measured peak, then the forecast.
fn memory(report: &Report) -> Vec<Block> {
    let peak = report.training.peak_rss_bytes;
    let measured = ("measured peak", format::or_unknown(peak, |bytes| bytes));
    let forecast = report.memory.iter().flat_map(memory_parts);
    let rows = [measured]
        .into_iter()
        .chain(forecast.map(|(name, bytes)| (name, bytes.to_string())));
    vec![Block::Table(Table::pairs(
        ["memory", "size"],
        rows.collect(),
    ))]
}

/// The forecast and its parts, by name.
pub(super) fn memory_parts(memory: &Memory) -> [(&'static str, Bytes); 6] {
    [
        ("forecast: total", memory.peak_bytes),
        ("forecast: weights", memory.weights),
        (
            "forecast: trainable parameters and optimizer",
            memory.trained,
        ),
        ("forecast: activations", memory.activations),
        ("forecast: logits and temporaries", memory.temporaries),
        ("forecast: executable", memory.program),
    ]
}

/// A limit of the recipe, as text.
pub(super) struct BudgetRow {
    pub(super) limit: Limit,
    pub(super) allowed: String,
    pub(super) spent: String,
    pub(super) used: String,
    /// What was spent beyond it.
    pub(super) excess: Option<String>,
}

/// The limits that were set, in the recipe's order.
pub(super) fn budget_rows(budget: &Budget) -> Vec<BudgetRow> {
    const LIMITS: [Limit; 5] = [
        Limit::Energy,
        Limit::Carbon,
        Limit::Flops,
        Limit::Time,
        Limit::Cost,
    ];
    let row = |limit: Limit| {
        let allowed = size(&budget.limits, limit)?;
        let spent = size(&budget.spent, limit);
        let currency = budget
            .limits
            .cost
            .as_ref()
            .map(|cost| cost.currency.as_str());
        let text = |size: f64| amount_text(limit, size, currency.unwrap_or_default());
        let excess = spent.map(|spent| spent - allowed);
        Some(BudgetRow {
            limit,
            used: format::or_unknown(spent, |spent| format::share(spent, allowed)),
            spent: format::or_unknown(spent, text),
            excess: excess
                .filter(|excess| *excess > ROUNDING * allowed)
                .map(text),
            allowed: text(allowed),
        })
    };
    LIMITS.into_iter().filter_map(row).collect()
}

/// Relative error of sums in another order.
const ROUNDING: f64 = 1e-9;

/// A limited quantity in its base unit.
fn size(amounts: &Amounts, limit: Limit) -> Option<f64> {
    match limit {
        Limit::Energy => amounts.energy.map(|energy| energy.0),
        Limit::Carbon => amounts.carbon.map(|carbon| carbon.0),
        Limit::Flops => amounts.flops.map(|flops| flops.0),
        Limit::Time => amounts.time.map(|time| time.0),
        Limit::Cost => amounts.cost.as_ref().map(|cost| cost.amount),
    }
}

fn amount_text(limit: Limit, size: f64, currency: &str) -> String {
    match limit {
        Limit::Energy => format::energy(Joules(size)),
        Limit::Carbon => format::carbon(GramsCo2e(size)),
        Limit::Flops => format::flops(Flops(size)),
        Limit::Time => format::time(Seconds(size)),
        Limit::Cost => Money {
            amount: size,
            currency: currency.to_string(),
        }
        .to_string(),
    }
}

fn budget(report: &Report) -> Vec<Block> {
    let rows = budget_rows(&report.budget);
    let money = money(&report.budget).map(Block::Paragraph);
    if rows.is_empty() {
        let none = Block::Paragraph("No budget set.".to_string());
        return [none].into_iter().chain(money).collect();
    }
    let mut table = Table::new(&["budget", "limit", "spent", "used", "stopped the run"]);
    let exceeded = exceeded(&rows, report.budget.margin_j);
    for row in rows {
        let stopped = report.training.stop_reason.budget() == Some(row.limit);
        table.row([
            row.limit.as_str().to_string(),
            row.allowed,
            row.spent,
            row.used,
            if stopped { "yes" } else { "no" }.to_string(),
        ]);
    }
    [Block::Table(table)]
        .into_iter()
        .chain(money)
        .chain([Block::Paragraph(exceeded)])
        .collect()
}

/// What was spent beyond each budget, in its own unit, and the upper bound of energy on a sensor.
fn exceeded(rows: &[BudgetRow], margin: Option<Joules>) -> String {
    let over = rows.iter().filter_map(|row| {
        let excess = row.excess.as_ref()?;
        Some(format!(
            "The {} budget was exceeded by {excess}.",
            row.limit
        ))
    });
    let mut sentences: Vec<String> = over.collect();
    if sentences.is_empty() {
        sentences.push("No budget was exceeded.".to_string());
    }
    if let Some(margin) = margin.filter(|margin| margin.0 > 0.0) {
        sentences.push(format!(
            "On a sensor, step costs are predicted: the last step and what followed it cost {} more than predicted.",
            format::energy(margin)
        ));
    }
    sentences.join(" ")
}

/// Cost at the recipe's price.
fn money(budget: &Budget) -> Option<String> {
    let cost = budget.spent.cost.as_ref()?;
    let bounds = budget
        .spent_low
        .cost
        .as_ref()
        .zip(budget.spent_high.cost.as_ref());
    let range = bounds.map(|(low, high)| format!(", range {low} to {high}"));
    Some(format!(
        "At the recipe's price, the run cost {cost}{}.",
        range.unwrap_or_default()
    ))
}

fn emissions(report: &Report) -> Vec<Block> {
    let carbon = &report.carbon;
    let total = report.energy.total.central;
    let facility = carbon.pue * total;
    let overhead = format::energy(facility - total);
    let pue = format::number(carbon.pue.value());
    let intensity = format::number(carbon.gco2e_per_kwh.0);
    let year = format::or_unknown(carbon.year, |year| year);
    let host = report.energy.host_left_out;
    let name = if host.is_some() {
        "device energy"
    } else {
        "machine energy"
    };
    let mut rows = vec![(name, format::energy(total))];
    rows.extend(host.map(|host| ("host machine, not included", host_energy(host, total))));
    rows.extend([
        ("facility overhead", format!("{overhead} (PUE {pue})")),
        ("facility energy", format::energy(facility)),
        (
            "grid",
            format!("`{}`, {intensity} gCO2e/kWh, year {year}", carbon.grid),
        ),
    ]);
    rows.extend(carbon.place.clone().map(|place| ("location", place)));
    rows.extend(carbon.basis.clone().map(|basis| ("intensity scope", basis)));
    rows.push(("emissions", format::carbon(carbon.emissions.central)));
    let range = format::range(&carbon.emissions, format::carbon);
    rows.extend(range.map(|range| ("range", range.replace("range ", ""))));
    let made = match carbon.embodied_gco2e {
        Some(embodied) => format::carbon(embodied),
        None => "not known for this device".to_string(),
    };
    rows.push(("device manufacturing, not included", made));
    vec![Block::Table(Table::pairs(
        ["emissions of electricity", "value"],
        rows,
    ))]
}

/// Energy of the host while the device takes `energy`.
fn host_energy(host: HostLeftOut, energy: Joules) -> String {
    match host.share.zip(host.times()) {
        Some((share, times)) => format!(
            "about {}: {} of the machine's power",
            format::energy(energy * (times - 1.0)),
            format::share(share, 1.0)
        ),
        None => "share not known".to_string(),
    }
}

fn data(report: &Report) -> Vec<Block> {
    let data = &report.data;
    let code = |text: &String| format!("`{text}`");
    let mut rows = vec![
        ("records", format::count(data.examples)),
        ("tokens", format::count(data.tokens)),
        ("loss tokens", format::count(data.loss_tokens)),
        ("truncated to `max_length`", format::count(data.truncated)),
        (
            "dropped: nothing left to train on",
            format::count(data.dropped),
        ),
        ("skipped: could not be read", format::count(data.skipped)),
    ];
    if !data.sources.is_empty() {
        let sources: Vec<String> = data.sources.iter().map(code).collect();
        rows.push(("source", sources.join(", ")));
    }
    vec![Block::Table(Table::pairs(["training set", "count"], rows))]
}

fn sample(report: &Report) -> Vec<Block> {
    let Some(sample) = &report.sample else {
        return Vec::new();
    };
    let verbatim = |caption, text: &String| Block::Verbatim {
        caption,
        text: text.trim_end_matches('\n').to_string(),
    };
    vec![
        verbatim("Prompt", &sample.prompt),
        verbatim("Before", &sample.before),
        verbatim("After", &sample.after),
    ]
}

fn environment(report: &Report) -> Vec<Block> {
    let environment = &report.environment;
    vec![Block::Paragraph(format!(
        "wattune {} on {}, {}, {}; device profile `{}`.",
        environment.version,
        environment.os,
        environment.cpu,
        format::counted(environment.threads, "thread"),
        report.energy.device
    ))]
}

/// Each coefficient with value and source, then each baseline's source and assumptions.
fn assumptions(report: &Report) -> Vec<String> {
    let energy = &report.energy;
    let scaled = energy.profile_factor.as_ref().map(|factor| {
        let value = format::number(factor.value);
        format!(", counted energy scaled by {value}: {}", factor.source)
    });
    let mut found = vec![format!(
        "energy coefficients: device profile `{}`{}",
        energy.device,
        scaled.unwrap_or_default()
    )];
    found.extend(energy.factors.iter().map(source_of_factor));
    found.extend(sources_of_carbon(&report.carbon));
    found.extend(source_of_bounds(report));
    for baseline in &report.baselines {
        let name = baseline.name();
        let facts = [&baseline.source].into_iter().chain(&baseline.assumptions);
        found.extend(facts.map(|fact| format!("{name}: {fact}")));
    }
    found
}

fn source_of_factor(factor: &Factor) -> String {
    let Factor {
        name,
        value,
        source,
        ..
    } = factor;
    let doubt = if factor.verified {
        ""
    } else {
        "; not verified"
    };
    format!("{name}: {value}. Source: {source}{doubt}")
}

/// Grid, facility overhead and the device's manufacture.
fn sources_of_carbon(carbon: &Carbon) -> Vec<String> {
    let source = carbon.source.as_deref().unwrap_or("source not known");
    let licence = carbon.licence.as_ref();
    let licence = licence.map(|licence| format!(" ({licence})"));
    let mut found = vec![
        format!(
            "grid `{}`: {} gCO2e/kWh, {source}{}",
            carbon.grid,
            format::number(carbon.gco2e_per_kwh.0),
            licence.unwrap_or_default()
        ),
        format!(
            "facility overhead: PUE {}, from the recipe",
            format::number(carbon.pue.value())
        ),
    ];
    found.extend(carbon.embodied_source.as_ref().map(|source| {
        format!(
            "device manufacturing: {source}; in use day and night for that time, host machine not included"
        )
    }));
    found
}

fn source_of_bounds(report: &Report) -> Option<String> {
    let total = &report.energy.total;
    if total.low == total.central {
        return None;
    }
    Some(match report.energy.meter {
        Meter::Counted => format!(
            "range: counted energy divided and multiplied by {MODEL_FACTOR}, the largest mean error published for models from rated \
             power (arXiv:2506.14551); two counted energies share the error, so their ratio is more certain than either"
        ),
        Meter::Timed => format!(
            "range: timed energy divided and multiplied by {TIMED_FACTOR}, the largest error found against wall meters \
             (arXiv:2509.22092)"
        ),
        Meter::Measured => "range: as given with the counter reading".to_string(),
    })
}

/// Caveats that hold for the meters in the report, with their published sources.
fn limitations(report: &Report) -> Vec<String> {
    let meters = &report.energy.meters;
    let counted = "Counted energy is a model. Published models of this kind, calibrated on FLOPs, miss a node's meter by 11 % on \
                   average, those made from a device's rated power by 27 to 37 % (arXiv:2506.14551).";
    let measured = "A hardware counter includes every program on the device, but no power supply, fans or disks: in one published \
                    pair the processor's counter read 60 % of the wall plug (CodeCarbon's load profiles, Threadripper 1950X).";
    let timed = "Rated power x wall time, without counters, has been found off by up to 40 % against wall meters \
                 (arXiv:2509.22092).";
    let host = "Device energy does not include the host machine: processor, memory and fans around the device are in no counted or \
                timed figure here, nor in the baselines.";
    let carbon = "Emissions use the yearly average intensity of the grid, not the hour of the run nor the marginal plant.";
    let scope =
        "Not included: earlier attempts, downloads, the screen, and use of the model afterwards.";
    let caveats = [
        (true, counted),
        (meters.measured_j.is_some(), measured),
        (meters.timed_j.is_some(), timed),
        (report.energy.host_left_out.is_some(), host),
        (true, carbon),
        (true, scope),
    ];
    let holding = caveats.into_iter().filter(|(holds, _)| *holds);
    holding.map(|(_, text)| text.to_string()).collect()
}
