//! The page of several runs: which bought the most loss per joule, every run's course over the same joules, and the table.
//!
//! Owns the page's order and its charts. Takes a comparison and, for each of its runs, the report and the history, returns one
//! document. Its table, best run and notes are those of the comparison's text and JSON. Knows nothing of how runs are ranked.

use super::figures::{Figure, thinned};
use super::history::History;
use super::layout::{FULL, block, document, figure_html, section};
use super::units::{energy_tick, number_tick};
use super::{bars, figures};
use crate::report::chart::{Axis, Mark, Plot, Series, Shape};
use crate::report::compare::{Comparison, Row};
use crate::report::markup::{escape, inline};
use crate::report::page::Block;
use crate::report::show;
use crate::report::types::Report;
use crate::units::Joules;

/// The classes of the runs' lines, told apart by colour and dashes.
const LINES: [&str; 8] = [
    "run-0", "run-1", "run-2", "run-3", "run-4", "run-5", "run-6", "run-7",
];

/// The page of `comparison`, which was made of `runs`, in the same order.
pub fn comparison_page(comparison: &Comparison, runs: &[(Report, History)]) -> String {
    let rows = &comparison.runs;
    let names = short_names(rows);
    let title = format!("{} side by side", show::counted(rows.len() as u64, "run"));
    let lead = format!("{} {}", comparison.verdict(), comparison.basis());
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p class=\"lead\">{}</p>\n</header>\n",
        escape(&title),
        inline(&lead)
    );
    let html = |figure: Option<Figure>| {
        figure.map_or_else(String::new, |figure| figure_html(&figure, &FULL))
    };
    let named = |row: &Row, name: &String| {
        let best = comparison.best.as_ref() == Some(&row.name);
        if best {
            format!("{name} (the most)")
        } else {
            name.clone()
        }
    };
    let rates: Vec<_> = rows
        .iter()
        .zip(&names)
        .map(|(row, name)| (named(row, name), row.loss_per_kj))
        .collect();
    let energy = |(row, name): (&Row, &String)| {
        (
            name.clone(),
            row.energy_j,
            row.low_j.zip(row.high_j).map(|(low, high)| [low.0, high.0]),
        )
    };
    let energies: Vec<_> = rows.iter().zip(&names).map(energy).collect();
    let bought = html(losses(comparison, &names, runs)) + &html(bars::bought(&rates));
    if !bought.is_empty() {
        body += &section("What the energy bought", &bought);
    }
    body += &section("What it took", &html(bars::energies(&energies)));
    let bounds = Some(comparison.bounds()).filter(|bounds| !bounds.is_empty());
    let bounds = bounds.map_or_else(String::new, |bounds| block(Block::Bullets(bounds)));
    body += &section(
        "In figures",
        &(block(Block::Table(comparison.table())) + &bounds),
    );
    if !comparison.notes.is_empty() {
        body += &section(
            "What makes them unlike",
            &block(Block::Bullets(comparison.notes.clone())),
        );
    }
    let footer = format!(
        "Written by wattune {}. The same figures for programs: <code>compare --json</code>.",
        env!("CARGO_PKG_VERSION")
    );
    document(&format!("{title}: energy and loss"), &body, &footer)
}

/// The last parts of the runs' names, where they tell the runs apart.
fn short_names(rows: &[Row]) -> Vec<String> {
    let last = |row: &Row| {
        row.name
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or(&row.name)
            .to_string()
    };
    let short: Vec<String> = rows.iter().map(last).collect();
    let alike = short
        .iter()
        .enumerate()
        .any(|(index, name)| name.is_empty() || short[..index].contains(name));
    if alike {
        rows.iter().map(|row| row.name.clone()).collect()
    } else {
        short
    }
}

/// Every run's loss over its joules: validation losses where there are any, training losses elsewhere.
fn losses(comparison: &Comparison, names: &[String], runs: &[(Report, History)]) -> Option<Figure> {
    let mut series = Vec::new();
    for ((class, name), (report, history)) in LINES.iter().zip(names).zip(runs) {
        let course = history.course(report, comparison.meter);
        let marks: Vec<Mark> = figures::validation(report, &course)
            .into_iter()
            .map(|mark| Mark {
                label: None,
                ..mark
            })
            .collect();
        let line: Vec<[f64; 2]> = match marks.len() {
            0 | 1 => course
                .points
                .iter()
                .map(|point| [point.spent.0, point.loss.unwrap_or(f64::NAN)])
                .collect(),
            _ => marks.iter().map(|mark| mark.at).collect(),
        };
        let name = if marks.len() > 1 {
            name.clone()
        } else {
            format!("{name} (training loss)")
        };
        if line.iter().any(|[_, loss]| loss.is_finite()) {
            series.push(Series {
                name,
                class,
                shape: Shape::Line(thinned(&line)),
            });
            series.push(Series {
                name: String::new(),
                class,
                shape: Shape::Marks(marks),
            });
        }
    }
    let at = || series.iter().flat_map(Series::points);
    let scale = figures::loss_scale(at().map(|[_, loss]| loss));
    let most = comparison
        .runs
        .iter()
        .map(|row| row.energy_j)
        .fold(Joules::ZERO, Joules::max);
    let plot = Plot {
        title: "Loss of each run against its energy".to_string(),
        desc: comparison.verdict(),
        x: Axis::over(
            &format!("energy spent, {}", show::word(comparison.meter)),
            crate::report::chart::Scale::Linear,
            energy_tick,
            [0.0, most.0],
        )?
        .tight(),
        y: Axis::over(
            figures::loss_label(scale),
            scale,
            number_tick,
            at().map(|[_, loss]| loss),
        )?,
        series,
        rules: Vec::new(),
        height: 320.0,
    };
    let caption = match names.len() > LINES.len() {
        true => format!(
            "Validation losses; only the first {} runs are drawn.",
            LINES.len()
        ),
        false => "Validation losses, each at all that its run had spent by then.".to_string(),
    };
    Some(Figure::plot("losses", plot, caption))
}
