//! Tables and text for a terminal of 80 to 100 columns, and the report as such text.
//!
//! Owns column widths, alignment and wrapping. Prints nothing; control characters in a model's output are removed.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use super::finite::FiniteReport;
use super::sections::{Block, sections};
use super::summary::summary;

/// The most columns of a line, and those of text that is not for a terminal.
const MAX_WIDTH: usize = 100;
/// The fewest columns of a line; a narrower terminal wraps.
const LEAST_WIDTH: usize = 80;
static WIDTH: AtomicUsize = AtomicUsize::new(MAX_WIDTH);
/// Spaces between two columns of a table.
const GAP: usize = 2;
/// Least width of a column.
const MIN_WIDTH: usize = 8;
/// Spaces before everything under a heading.
const INDENT: usize = 2;
/// Sections of the short form.
const BRIEF: [&str; 4] = ["Comparison", "Sample", "Portability", "Warnings"];

/// Fits all later text to a terminal of so many columns.
pub fn set_width(columns: usize) {
    let columns = columns.clamp(LEAST_WIDTH, MAX_WIDTH);
    WIDTH.store(columns, Ordering::Relaxed);
}

fn width() -> usize {
    WIDTH.load(Ordering::Relaxed)
}

/// Column names and rows of the same length; without names only rows are shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    /// First right-aligned column.
    #[serde(skip)]
    right_from: usize,
    /// Rows with a blank line above.
    #[serde(skip)]
    breaks: Vec<usize>,
}

impl Table {
    /// An empty table with these column names.
    pub fn new(head: &[&str]) -> Self {
        Self {
            head: head.iter().map(|name| name.to_string()).collect(),
            rows: Vec::new(),
            right_from: usize::MAX,
            breaks: Vec::new(),
        }
    }

    /// A table of names and values.
    pub fn pairs(head: [&str; 2], rows: Vec<(&str, String)>) -> Self {
        let mut table = Self::new(&head);
        for (name, value) in rows {
            table.row([name.to_string(), value]);
        }
        table
    }

    /// Right-aligns the columns from `column` on.
    pub fn right_from(mut self, column: usize) -> Self {
        self.right_from = column;
        self
    }

    /// Adds a row; a short one is filled with empty cells, a long one is cut.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<String> = cells.into_iter().collect();
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
    }

    /// Leaves a blank line before the next row.
    pub fn blank_line(&mut self) {
        self.breaks.push(self.rows.len());
    }

    /// The rows, each as long as the head.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// Aligned columns, at most as wide as the terminal, each line after `indent` spaces; backticks are removed.
    pub fn text(&self, indent: usize) -> String {
        let plain_row = |row: &Vec<String>| row.iter().map(|cell| plain(cell)).collect();
        let head: Vec<String> = plain_row(&self.head);
        let rows: Vec<Vec<String>> = self.rows.iter().map(plain_row).collect();
        let widths = widths(&head, &rows, width() - indent);
        let mut out = String::new();
        if head.iter().any(|name| !name.is_empty()) {
            let named = head.iter().zip(&widths);
            let rule =
                named.map(|(name, width)| "-".repeat(if name.is_empty() { 0 } else { *width }));
            let rule: Vec<String> = rule.collect();
            out += &self.line(&head, &widths, indent);
            out += &self.line(&rule, &widths, indent);
        }
        for (index, row) in rows.iter().enumerate() {
            if self.breaks.contains(&index) {
                out.push('\n');
            }
            out += &self.line(row, &widths, indent);
        }
        out
    }

    /// One row, its cells wrapped to their widths.
    fn line(&self, row: &[String], widths: &[usize], indent: usize) -> String {
        let cells: Vec<Vec<String>> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| wrapped(cell, *width))
            .collect();
        let mut out = String::new();
        for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
            let mut text = " ".repeat(indent);
            for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let part = cell.get(line).map_or("", String::as_str);
                text += &if column >= self.right_from {
                    format!("{part:>width$}")
                } else {
                    format!("{part:<width$}")
                };
                text += &" ".repeat(GAP);
            }
            out += text.trim_end();
            out.push('\n');
        }
        out
    }
}

/// The widest cell of each column, the widest column narrowed until all fit into `room`.
fn widths(head: &[String], rows: &[Vec<String>], room: usize) -> Vec<usize> {
    let mut widths: Vec<usize> = head.iter().map(|name| columns(name).max(1)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = columns(cell).max(*width);
        }
    }
    let room = room.saturating_sub(GAP * widths.len().saturating_sub(1));
    while widths.iter().sum::<usize>() > room {
        match widths.iter_mut().max() {
            Some(width) if *width > MIN_WIDTH => *width -= 1,
            _ => break,
        }
    }
    widths
}

/// Without Markdown's backticks.
fn plain(text: &str) -> String {
    text.replace('`', "")
}

/// Width of `text`: names and figures here are of single width.
fn columns(text: &str) -> usize {
    text.chars().count()
}

/// `text` in lines of at most `width` characters, broken between words, inside a word only where it is longer than a line.
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        while !rest.is_empty() {
            let line = lines.last_mut().expect("there is always a last line");
            let used = columns(line);
            let gap = usize::from(used > 0);
            if used + gap + rest.len() <= width || used == 0 {
                let taken: String = rest.drain(..rest.len().min(width.max(1))).collect();
                *line += &format!("{}{taken}", " ".repeat(gap));
            } else {
                lines.push(String::new());
            }
        }
    }
    lines
}

/// The report of the run `name`.
pub fn to_text(name: &str, report: &FiniteReport) -> String {
    page(name, report, |_| true)
}

/// The summary, the comparison, the sample and the warnings of a run that has just ended.
pub fn to_brief(name: &str, report: &FiniteReport) -> String {
    page(name, report, |title| BRIEF.contains(&title))
}

fn page(name: &str, report: &FiniteReport, shown: impl Fn(&str) -> bool) -> String {
    let mut out = paragraph(name, 0) + "\n" + &paragraph(&plain(&summary(report)), 0);
    let shown = sections(report)
        .into_iter()
        .filter(|section| shown(section.title));
    for section in shown {
        out += &format!("\n{}\n", section.title.to_uppercase());
        for block in section.blocks {
            out += &match block {
                Block::Paragraph(text) => paragraph(&plain(&text), INDENT),
                Block::Table(table) => table.text(INDENT),
                Block::Bullets(items) => items.iter().map(|item| bullet(&plain(item))).collect(),
                Block::Verbatim { caption, text } => {
                    let lines = text.lines().map(|line| paragraph(line, INDENT * 2));
                    format!("  {caption}:\n{}", lines.collect::<String>())
                }
            };
        }
    }
    printable(&out)
}

/// Wrapped lines, each after `indent` spaces.
pub fn paragraph(text: &str, indent: usize) -> String {
    let lines = wrapped(text, width() - indent);
    let indented = lines
        .iter()
        .map(|line| format!("{}{line}\n", " ".repeat(indent)));
    indented.collect()
}

/// A list item with its later lines indented.
pub fn bullet(text: &str) -> String {
    let lines = wrapped(text, width() - INDENT - 2);
    let marked = lines
        .iter()
        .enumerate()
        .map(|(index, line)| format!("  {} {line}\n", if index == 0 { '-' } else { ' ' }));
    marked.collect()
}

/// Without control characters: a model's output cannot move the cursor.
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_wrapped_and_long_ones_broken() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrapped("", 4), [""]);
    }

    #[test]
    fn figures_can_be_right_aligned_and_rows_grouped() {
        let mut table = Table::new(&["name", "energy"]).right_from(1);
        table.row(["a".to_string(), "9 J".to_string()]);
        table.blank_line();
        table.row(["b".to_string(), "100 kJ".to_string()]);
        let expected = "name  energy\n----  ------\na        9 J\n\nb     100 kJ\n";
        assert_eq!(table.text(0), expected);
        let pairs = Table::pairs(["", ""], vec![("a", "1".to_string())]);
        assert_eq!(pairs.text(2), "  a  1\n");
    }

    #[test]
    fn a_terminal_table_keeps_to_its_width() {
        let mut table = Table::new(&["name", "source"]);
        table.row(["short".to_string(), "word ".repeat(60)]);
        table.row(["n".repeat(300), "end".to_string()]);
        let text = table.text(2);
        assert!(
            text.lines().all(|line| columns(line) <= MAX_WIDTH),
            "{text}"
        );
        assert_eq!(text.matches("word").count(), 60);
        assert_eq!(
            text.matches('n').count(),
            300 + "name".matches('n').count() + "end".matches('n').count()
        );
    }

    #[test]
    fn a_models_output_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c\r\nd"), "a[2Jbc\nd");
    }

    #[test]
    fn later_lines_of_an_item_are_indented() {
        let item = bullet(&"word ".repeat(30));
        let lines: Vec<&str> = item.lines().collect();
        assert!(
            lines[0].starts_with("  - word") && lines[1].starts_with("    word"),
            "{item}"
        );
        assert!(lines.iter().all(|line| line.len() <= MAX_WIDTH), "{item}");
    }
}
