//! A table of texts, laid out for Markdown or for a terminal.
//!
//! Owns the layout: escaping and alignment in Markdown, column widths and wrapping on a terminal. Takes a head and rows of
//! texts, the first column a name and the others figures. Knows nothing of what they mean.

/// Columns on a terminal are kept within this width.
pub const WIDTH: usize = 100;
/// Spaces between two columns.
const GAP: usize = 2;
/// No column is narrowed below this.
const NARROWEST: usize = 8;

/// A head and its rows, all of the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column names.
    pub fn new(head: &[&str]) -> Self {
        Self {
            head: head.iter().map(|name| name.to_string()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; a short one is filled with empty cells, a long one is cut.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<String> = cells.into_iter().collect();
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
    }

    /// The column names.
    pub fn head(&self) -> &[String] {
        &self.head
    }

    /// The rows, each as long as the head.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// A GitHub table.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            format!(
                "| {} |\n",
                cells
                    .iter()
                    .map(|cell| cell_text(cell))
                    .collect::<Vec<_>>()
                    .join(" | ")
            )
        };
        let rule = vec!["---".to_string(); self.head.len()];
        let body: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.head) + &line(&rule) + &body
    }

    /// Aligned columns, at most [`WIDTH`] wide, each line after `indent` spaces.
    pub fn text(&self, indent: usize) -> String {
        let plain_row = |row: &Vec<String>| row.iter().map(|cell| plain(cell)).collect();
        Self {
            head: plain_row(&self.head),
            rows: self.rows.iter().map(plain_row).collect(),
        }
        .aligned(indent)
    }

    fn aligned(&self, indent: usize) -> String {
        let widths = self.widths(WIDTH - indent);
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        let mut out = String::new();
        for row in [&self.head, &rule].into_iter().chain(&self.rows) {
            let cells: Vec<Vec<String>> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| wrapped(cell, *width))
                .collect();
            for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
                let parts = cells.iter().zip(&widths).map(|(cell, width)| {
                    let text = cell.get(line).map_or("", String::as_str);
                    format!(
                        "{text}{}",
                        " ".repeat(width.saturating_sub(columns(text)) + GAP)
                    )
                });
                let text: String = parts.collect();
                out += &format!("{}{}\n", " ".repeat(indent), text.trim_end());
            }
        }
        out
    }

    /// The widest cell of each column, the widest column narrowed until all fit.
    fn widths(&self, room: usize) -> Vec<usize> {
        let widest = |column: usize| {
            let cells = self
                .rows
                .iter()
                .chain([&self.head])
                .map(|row| columns(&row[column]));
            cells.max().unwrap_or(0).max(1)
        };
        let mut widths: Vec<usize> = (0..self.head.len()).map(widest).collect();
        let room = room.saturating_sub(GAP * widths.len().saturating_sub(1));
        while widths.iter().sum::<usize>() > room {
            match widths.iter_mut().max() {
                Some(width) if *width > NARROWEST => *width -= 1,
                _ => break,
            }
        }
        widths
    }
}

/// One line of Markdown that ends no cell and opens no markup of its own.
fn cell_text(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('|', "\\|")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Without the backticks that Markdown needs.
pub fn plain(text: &str) -> String {
    text.replace('`', "")
}

/// Characters stand for columns: names and figures here are of single width.
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
    fn a_cell_cannot_end_itself() {
        let mut table = Table::new(&["a", "b"]);
        table.row(["x|y".to_string(), "two\nlines \\| z".to_string()]);
        assert_eq!(
            table.markdown(),
            "| a | b |\n| --- | --- |\n| x\\|y | two lines \\\\\\| z |\n"
        );
    }

    #[test]
    fn a_terminal_table_keeps_to_its_width() {
        let mut table = Table::new(&["name", "source"]);
        table.row(["short".to_string(), "word ".repeat(60)]);
        table.row(["n".repeat(300), "end".to_string()]);
        let text = table.text(2);
        assert!(text.lines().all(|line| columns(line) <= WIDTH), "{text}");
        assert_eq!(text.matches("word").count(), 60);
        assert_eq!(
            text.matches('n').count(),
            300 + "name".matches('n').count() + "end".matches('n').count()
        );
    }
}
