//! `report.html`: the report as one file that any browser reads, with charts.
//!
//! Owns the page: summary first, key figures, charts, then every section of the other pages. Takes a run's name, its report and its
//! history, returns one document without scripts that loads nothing from anywhere (its own policy forbids both). Every text is
//! escaped; figures carry the exact value of `report.json` in a `<data value>`. Refuses to know how a chart is drawn.

mod bars;
mod beside;
mod comparison;
mod figures;
mod history;
mod layout;
mod units;

pub use comparison::comparison_page;
pub use history::History;

use layout::{FULL, HALF, block, document, figure_html, section};

use super::markup::{escape, inline};
use super::page::{Section, sections};
use super::show;
use super::summary::summary;
use super::types::Report;
use crate::error::Result;
use crate::units::Joules;

/// The page of the run `name`.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_html(name: &str, report: &Report, history: &History) -> Result<String> {
    let report = report.clone().sealed()?;
    let name = name.split_whitespace().collect::<Vec<_>>().join(" ");
    let course = history.course(&report, report.energy.meter);
    let lead = inline(&summary(&report));
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p class=\"lead\">{lead}</p>\n{}</header>\n",
        escape(&name),
        facts(&report)
    );
    body += &progress(&report, &course);
    body += &sections(&report)
        .into_iter()
        .map(|section| laid_out(&report, section))
        .collect::<String>();
    let version = escape(&report.environment.version);
    let footer = format!(
        "Written by wattune {version}. The same figures for programs: <code>report.json</code>."
    );
    Ok(document(&format!("{name}: energy report"), &body, &footer))
}

/// The few figures that a reader in a hurry takes along.
fn facts(report: &Report) -> String {
    let (energy, carbon, training) = (&report.energy, &report.carbon, &report.training);
    let fact = |name: &str, figures: String, beside: String| {
        format!(
            "<div><dt>{name}</dt><dd>{figures}<small>{}</small></dd></div>\n",
            escape(&beside)
        )
    };
    let between = |low: Option<String>, high: Option<String>| match (low, high) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        _ => String::new(),
    };
    let loss = |loss: Option<f64>| {
        loss.map_or_else(
            || show::UNKNOWN.to_string(),
            |loss| data(loss, &show::number(loss)),
        )
    };
    let plain = |joules: Joules| joules.to_string();
    let mut facts = fact(
        "energy",
        data(energy.total_j.0, &plain(energy.total_j)),
        format!(
            "{}, {} {}",
            show::watt_hours(energy.total_j),
            show::word(energy.meter),
            between(energy.low_j.map(plain), energy.high_j.map(plain))
        ),
    );
    facts += &fact(
        "emissions",
        data(carbon.gco2e.0, &show::carbon(carbon.gco2e)),
        between(
            carbon.low_gco2e.map(show::carbon),
            carbon.high_gco2e.map(show::carbon),
        ),
    );
    facts += &fact(
        "validation loss",
        match (training.val_loss_before, training.val_loss_after) {
            (None, None) => show::UNKNOWN.to_string(),
            (before, after) => format!("{} → {}", loss(before), loss(after)),
        },
        "nats per loss token, before and after".to_string(),
    );
    facts += &fact(
        "training",
        data(
            training.steps as f64,
            &show::counted(training.steps, "step"),
        ),
        format!(
            "{} in all, stopped by {}",
            show::time(training.wall_s),
            training.stop_reason
        ),
    );
    format!("<dl class=\"facts\">\n{facts}</dl>\n")
}

/// A figure with the exact number it stands for.
fn data(value: f64, shown: &str) -> String {
    format!("<data value=\"{value}\">{}</data>", escape(shown))
}

/// The charts over the run's course.
fn progress(report: &Report, course: &history::Course) -> String {
    if course.points.is_empty() {
        return section(
            "Course of the run",
            "<p>No step was recorded, so there is no course to draw.</p>\n",
        );
    }
    let along = [
        figures::loss(report, course),
        figures::learning_rate(report, course),
        figures::budget_used(report, course),
    ];
    let grown = [
        figures::energy(report, course),
        figures::emissions(report, course),
    ];
    let beside = beside::beside(report);
    let along: String = along
        .iter()
        .chain([&beside])
        .flatten()
        .map(|figure| figure_html(figure, &FULL))
        .collect();
    let grown: String = grown
        .iter()
        .flatten()
        .map(|figure| figure_html(figure, &HALF))
        .collect();
    section("What the energy bought", &along)
        + &section(
            "How it was spent",
            &format!("<div class=\"pair\">\n{grown}</div>\n"),
        )
}

/// A section with the chart that belongs to it.
fn laid_out(report: &Report, of: Section) -> String {
    let figure = match of.title {
        "Memory" => bars::memory(report),
        "Energy by phase" => bars::by_phase(report),
        "What the energy went into" => bars::by_part(report),
        "Comparison" => bars::comparison(report),
        _ => None,
    };
    let figure = figure.map_or_else(String::new, |figure| figure_html(&figure, &FULL));
    let blocks: String = of.blocks.into_iter().map(block).collect();
    section(of.title, &(figure + &blocks))
}
