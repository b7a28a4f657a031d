//! The report on a terminal: the same sections in at most 100 columns.
//!
//! Owns the terminal layout. Takes a run's name and its report, returns lines without colour or cursor movement: control
//! characters in a model's own text are left out. Prints nothing; knows nothing of what the sections say.

use super::page::{Block, sections};
use super::summary::summary;
use super::table::{WIDTH, plain, wrapped};
use super::types::Report;
use crate::error::Result;

/// The sections of the short form.
const BRIEF: [&str; 3] = ["Comparison", "Sample", "Warnings"];

/// Spaces before everything under a heading.
const INDENT: usize = 2;

/// The lines of the run `name`.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_text(name: &str, report: &Report) -> Result<String> {
    lines(name, report, |_| true)
}

/// What a person wants to see when a run has just ended: the summary, the comparison and the sample.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_brief(name: &str, report: &Report) -> Result<String> {
    lines(name, report, |title| BRIEF.contains(&title))
}

fn lines(name: &str, report: &Report, shown: impl Fn(&str) -> bool) -> Result<String> {
    let report = report.clone().sealed()?;
    let mut out = paragraph(name, 0) + "\n" + &paragraph(&plain(&summary(&report)), 0);
    for section in sections(&report)
        .into_iter()
        .filter(|section| shown(section.title))
    {
        out += &format!("\n{}\n", section.title.to_uppercase());
        for block in section.blocks {
            out += &match block {
                Block::Paragraph(text) => paragraph(&plain(&text), INDENT),
                Block::Table(table) => table.text(INDENT),
                Block::Bullets(items) => items.iter().map(|item| bullet(&plain(item))).collect(),
                Block::Verbatim(caption, text) => format!("  {caption}:\n{}", verbatim(&text)),
            };
        }
    }
    Ok(printable(&out))
}

/// Wrapped lines, each after `indent` spaces.
pub fn paragraph(text: &str, indent: usize) -> String {
    wrapped(text, WIDTH - indent)
        .iter()
        .map(|line| format!("{}{line}\n", " ".repeat(indent)))
        .collect()
}

/// A list item whose later lines stand under its first.
pub fn bullet(text: &str) -> String {
    let lines = wrapped(text, WIDTH - INDENT - 2);
    let marked = lines
        .iter()
        .enumerate()
        .map(|(i, line)| format!("  {} {line}\n", if i == 0 { '-' } else { ' ' }));
    marked.collect()
}

fn verbatim(text: &str) -> String {
    text.lines()
        .map(|line| paragraph(line, INDENT * 2))
        .collect()
}

/// Without control characters, so that a model's output moves no cursor.
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_output_moves_no_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c\r\nd"), "a[2Jbc\nd");
    }

    #[test]
    fn later_lines_of_an_item_stand_under_its_first() {
        let item = bullet(&"word ".repeat(30));
        let lines: Vec<&str> = item.lines().collect();
        assert!(
            lines[0].starts_with("  - word") && lines[1].starts_with("    word"),
            "{item}"
        );
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{item}");
    }
}
