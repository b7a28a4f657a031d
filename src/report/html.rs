//! `report.html`: the report as one file that any browser reads, with charts.
//!
//! Owns the page: summary first, key figures, charts, then every section of the other pages. Takes a run's name, its report and its
//! history, returns one document without scripts that loads nothing from anywhere (its own policy forbids both). Every text is
//! escaped; figures carry the exact value of `report.json` in a `<data value>`. Refuses to know how a chart is drawn.

mod figures;
mod history;
mod units;

pub use history::History;

use figures::{Chart, Figure};

use super::markup::{escape, inline};
use super::page::{Block, Section, sections};
use super::show;
use super::summary::summary;
use super::table::Table;
use super::types::Report;
use crate::error::Result;
use crate::units::Joules;

/// The page's only style: colours for light, dark and print, and the charts' classes.
const STYLE: &str = include_str!("html/style.css");

/// Widths in pixels that a chart is drawn for: a desk, a phone, and half of a desk.
const WIDE: f64 = 760.0;
const NARROW: f64 = 340.0;
const HALF: f64 = 370.0;

/// The page of the run `name`.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_html(name: &str, report: &Report, history: &History) -> Result<String> {
    let report = report.clone().sealed()?;
    let name = escape(&name.split_whitespace().collect::<Vec<_>>().join(" "));
    let course = history.course(&report);
    let mut body =
        format!("<header>\n<h1>{name}</h1>\n<p class=\"lead\">{}</p>\n{}</header>\n", inline(&summary(&report)), facts(&report));
    body += &progress(&report, &course);
    body += &sections(&report).into_iter().map(|section| laid_out(&report, section)).collect::<String>();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{name}: energy report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         <footer>Written by wattune {}. The same figures for programs: <code>report.json</code>.</footer>\n</body>\n</html>\n",
        escape(&report.environment.version)
    ))
}

/// The few figures that a reader in a hurry takes along.
fn facts(report: &Report) -> String {
    let (energy, carbon, training) = (&report.energy, &report.carbon, &report.training);
    let fact = |name: &str, figures: String, beside: String| {
        format!("<div><dt>{name}</dt><dd>{figures}<small>{}</small></dd></div>\n", escape(&beside))
    };
    let between = |low: Option<String>, high: Option<String>| match (low, high) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        _ => String::new(),
    };
    let loss = |loss: Option<f64>| loss.map_or_else(|| show::UNKNOWN.to_string(), |loss| data(loss, &show::number(loss)));
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
        between(carbon.low_gco2e.map(show::carbon), carbon.high_gco2e.map(show::carbon)),
    );
    facts += &fact(
        "validation loss",
        format!("{} → {}", loss(training.val_loss_before), loss(training.val_loss_after)),
        "nats per loss token, before and after".to_string(),
    );
    facts += &fact(
        "training",
        data(training.steps as f64, &show::counted(training.steps, "step")),
        format!("{} in all, stopped by {}", show::time(training.wall_s), training.stop_reason),
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
        return "<section>\n<h2>Course of the run</h2>\n<p>No step was recorded, so there is no course to draw.</p>\n</section>\n".to_string();
    }
    let both = [figures::loss(report, course), figures::learning_rate(report, course)];
    let grown = [figures::energy(report, course), figures::emissions(report, course)];
    let wide: String = both.iter().flatten().map(|figure| figure_html(figure, &[("wide", WIDE), ("narrow", NARROW)])).collect();
    let half: String = grown.iter().flatten().map(|figure| figure_html(figure, &[("half", HALF)])).collect();
    format!(
        "<section>\n<h2>What the energy bought</h2>\n{wide}</section>\n<section>\n<h2>How it was spent</h2>\n<div class=\"pair\">\n{half}</div>\n</section>\n"
    )
}

fn figure_html(figure: &Figure, widths: &[(&str, f64)]) -> String {
    let drawn = widths.iter().map(|(class, width)| {
        let id = format!("{}-{class}", figure.id);
        let svg = match &figure.chart {
            Chart::Plot(plot) => plot.svg(&id, *width),
            Chart::Bars(bars) => bars.svg(&id, *width),
        };
        format!("<div class=\"chart {class}\">{svg}</div>\n")
    });
    let key = |(form, class, name): &(&str, &str, String)| format!("<li class=\"key {form} {class}\">{}</li>\n", escape(name));
    let legend = match figure.legend.len() {
        0 | 1 => String::new(),
        _ => format!("<ul class=\"legend\">\n{}</ul>\n", figure.legend.iter().map(key).collect::<String>()),
    };
    let caption = match figure.caption.as_str() {
        "" => String::new(),
        text => format!("<figcaption>{}</figcaption>\n", inline(text)),
    };
    format!("<figure>\n{legend}{}{caption}</figure>\n", drawn.collect::<String>())
}

/// A section with the chart that belongs to it.
fn laid_out(report: &Report, section: Section) -> String {
    let figure = match section.title {
        "Energy by phase" => figures::by_phase(report),
        "Comparison" => figures::comparison(report),
        _ => None,
    };
    let figure = figure.map_or_else(String::new, |figure| figure_html(&figure, &[("wide", WIDE), ("narrow", NARROW)]));
    let blocks: String = section.blocks.into_iter().map(block).collect();
    format!("<section>\n<h2>{}</h2>\n{figure}{blocks}</section>\n", escape(section.title))
}

fn block(block: Block) -> String {
    match block {
        Block::Paragraph(text) => format!("<p>{}</p>\n", inline(&text)),
        Block::Table(table) => table_html(&table),
        Block::Bullets(items) => {
            let items: String = items.iter().map(|item| format!("<li>{}</li>\n", inline(item))).collect();
            format!("<ul>\n{items}</ul>\n")
        }
        Block::Verbatim(caption, text) => {
            format!(
                "<p class=\"caption\">{}</p>\n<pre dir=\"auto\">{}</pre>\n",
                escape(caption),
                escape(text.trim_end_matches('\n'))
            )
        }
    }
}

/// Many columns scroll by themselves on a phone, so that the page does not.
fn table_html(table: &Table) -> String {
    let head: String = table.head().iter().map(|name| format!("<th scope=\"col\">{}</th>", inline(name))).collect();
    let row = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(index, cell)| match index {
            0 => format!("<th scope=\"row\">{}</th>", inline(cell)),
            _ => format!("<td>{}</td>", inline(cell)),
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let class = if table.head().len() > 3 { "table many" } else { "table" };
    let rows: String = table.rows().iter().map(row).collect();
    format!(
        "<div class=\"{class}\" tabindex=\"0\">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )
}
