//! `report.md`: the page a person reads.
//!
//! Owns the Markdown layout. Takes a run's name and its report, returns one page: the summary first, then every section. A text
//! that came from a model or a file cannot break out of its block. Knows nothing of what the sections say.

use super::page::{Block, sections};
use super::summary::summary;
use super::types::Report;
use crate::error::Result;

/// The page of the run `name`.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_markdown(name: &str, report: &Report) -> Result<String> {
    let report = report.clone().sealed()?;
    let head = format!("# {}\n\n{}\n", one_line(name), one_line(&summary(&report)));
    let body = sections(&report)
        .into_iter()
        .map(|section| format!("\n## {}\n\n{}", section.title, body(section.blocks)));
    Ok(head + &body.collect::<String>())
}

/// The sections with these titles, one after another and without their headings.
pub fn to_markdown_body(report: &Report, titles: &[&str]) -> String {
    let wanted = sections(report)
        .into_iter()
        .filter(|section| titles.contains(&section.title));
    wanted
        .map(|section| body(section.blocks))
        .collect::<Vec<_>>()
        .join("\n")
}

fn body(blocks: Vec<Block>) -> String {
    let texts = blocks.into_iter().map(|block| match block {
        Block::Paragraph(text) => one_line(&text) + "\n",
        Block::Table(table) => table.markdown(),
        Block::Bullets(items) => items
            .iter()
            .map(|item| format!("- {}\n", one_line(item)))
            .collect(),
        Block::Verbatim(caption, text) => format!("{caption}:\n\n{}", fenced(&text, "text")),
    });
    texts.collect::<Vec<_>>().join("\n")
}

/// `text` on one line: a line feed in a name or a warning starts no heading and no list.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A code block whose fence is longer than any run of backticks inside.
pub fn fenced(text: &str, language: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!(
        "{fence}{language}\n{}\n{fence}\n",
        text.trim_end_matches('\n')
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_cannot_close_its_fence() {
        assert_eq!(fenced("a", "text"), "```text\na\n```\n");
        assert_eq!(
            fenced("x\n````\ny\n", "text"),
            "`````text\nx\n````\ny\n`````\n"
        );
        assert_eq!(one_line("a\n# b"), "a # b");
    }
}
