//! Diagnostics: all of a recipe's errors, each with its line, a caret, the rule and a hint.
//!
//! Takes spans and sentences, returns `Diagnostic`s in reading order and the text that shows them. Knows nothing of what a
//! recipe means.

use serde::Serialize;

use super::tree::{Source, Span};
use crate::error::Written;

/// Characters of a line shown at most.
const SHOWN: usize = 110;

/// One error in a recipe or in a `--set`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// `line 3, column 9 of recipe.toml`, or `--set KEY=VALUE`.
    pub place: String,
    /// Line of the recipe, from 1; absent for a `--set`.
    pub line: Option<usize>,
    /// Column in characters, from 1; absent for a `--set`.
    pub column: Option<usize>,
    /// What is wrong, one sentence without a final full stop.
    pub what: String,
    /// What may stand there; empty where `what` says it all.
    pub rule: String,
    /// What to type instead.
    pub hint: String,
    /// The line with a caret under the value.
    #[serde(skip)]
    pub(super) snippet: String,
}

/// Collects diagnostics.
pub(super) struct Diagnostics<'a> {
    sources: &'a [Source],
    found: Vec<(Span, Diagnostic)>,
}

impl<'a> Diagnostics<'a> {
    pub fn new(sources: &'a [Source]) -> Self {
        Self {
            sources,
            found: Vec::new(),
        }
    }

    /// Adds one.
    pub fn add(
        &mut self,
        span: Span,
        what: impl Into<String>,
        rule: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let source = &self.sources[span.source];
        let Location { line, column, .. } = Location::new(&source.text, span);
        let in_file = |number| (!source.is_override).then_some(number);
        let Written { place, snippet, .. } = self.written(span);
        let diagnostic = Diagnostic {
            place,
            line: in_file(line),
            column: in_file(column),
            what: what.into(),
            rule: rule.into(),
            hint: hint.into(),
            snippet,
        };
        self.found.push((span, diagnostic));
    }

    /// The place and the line of `span`.
    pub fn written(&self, span: Span) -> Written {
        let source = &self.sources[span.source];
        let location = Location::new(&source.text, span);
        let Location { line, column, .. } = location;
        let place = if source.is_override {
            source.name.clone()
        } else {
            format!("line {line}, column {column} of {}", source.name)
        };
        Written {
            place,
            snippet: location.snippet((!source.is_override).then_some(line)),
            order: (span.source, span.start),
        }
    }

    /// Whether the recipe is valid.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The characters of the source at `span`.
    pub fn source_text(&self, span: Span) -> &'a str {
        self.sources[span.source]
            .text
            .get(span.start..span.end)
            .unwrap_or("")
    }

    /// Whether `span` is on the command line.
    pub fn is_override(&self, span: Span) -> bool {
        self.sources[span.source].is_override
    }

    /// How another diagnostic refers to `span`.
    pub fn location(&self, span: Span) -> String {
        let source = &self.sources[span.source];
        if source.is_override {
            format!("`{}`", source.name)
        } else {
            format!("line {}", Location::new(&source.text, span).line)
        }
    }

    /// Just past the last thing written in the file.
    pub fn end_of_file(&self) -> Span {
        let end = self.sources[0].text.trim_end().len();
        Span {
            source: 0,
            start: end,
            end,
        }
    }

    /// All of them in reading order: the file's, then the overrides'.
    pub fn into_sorted(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|(span, _)| *span);
        self.found.into_iter().map(|(_, found)| found).collect()
    }
}

/// All `diagnostics` as one text.
pub(super) fn render(diagnostics: &[Diagnostic]) -> String {
    let mut text = match diagnostics.len() {
        1 => "the recipe has a mistake".to_string(),
        n => format!("the recipe has {n} mistakes"),
    };
    for found in diagnostics {
        text += &format!(
            "\n\n{}\n  at {}\n{}",
            found.what, found.place, found.snippet
        );
        if !found.rule.is_empty() {
            text += &format!("\n  rule: {}", found.rule);
        }
        text += &format!("\n  hint: {}", found.hint);
    }
    text
}

/// A span as line and column.
struct Location {
    line: usize,
    column: usize,
    /// The line's characters; those no terminal should be sent are replaced.
    characters: Vec<char>,
    /// Characters the caret spans, at least one.
    width: usize,
}

impl Location {
    fn new(text: &str, span: Span) -> Self {
        let boundary = |at: usize| text.floor_char_boundary(at.min(text.len()));
        let start = boundary(span.start);
        let end = boundary(span.end.max(start));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let line = text[line_start..line_end].trim_end();
        let marked = text[start..end.min(line_end)].trim_end();
        Self {
            line: text[..line_start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            characters: line.chars().map(shown_char).collect(),
            width: marked.chars().count().max(1),
        }
    }

    /// The line between a gutter and a caret; `line` is absent on a command line.
    fn snippet(&self, line: Option<usize>) -> String {
        let number = line.map(|n| n.to_string()).unwrap_or_default();
        let gutter = " ".repeat(number.len());
        let is_far = self.column > SHOWN;
        let first = if is_far { self.column - SHOWN / 2 } else { 0 };
        let is_cut = self.characters.len() > first + SHOWN;
        let cut: String = self.characters.iter().skip(first).take(SHOWN).collect();
        let before = if first > 0 { "…" } else { "" };
        let after = if is_cut { "…" } else { "" };
        let indent = self.column - 1 - first + before.chars().count();
        let width = self.width.min(SHOWN + 1 - (indent.min(SHOWN)));
        let carets = format!("{}{}", " ".repeat(indent), "^".repeat(width));
        let written = format!("{number} | {before}{cut}{after}");
        format!(
            "  {gutter} |\n  {}\n  {gutter} | {carets}",
            written.trim_end()
        )
    }
}

/// A tab as one space, so that the caret lands; other control characters never reach a terminal.
fn shown_char(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Vec<Source> {
        vec![Source {
            name: "r.toml".into(),
            text: text.into(),
            is_override: false,
        }]
    }

    fn span(start: usize, end: usize) -> Span {
        Span {
            source: 0,
            start,
            end,
        }
    }

    #[test]
    fn a_column_counts_characters_and_a_caret_spans_the_value() {
        // "é" is two bytes but one character: the value's first quote is byte 13 of the text and character 7 of its line.
        let sources = file("a = 1\n\"é\" = \"xyz\"\n");
        let mut diagnostics = Diagnostics::new(&sources);
        diagnostics.add(span(13, 18), "w", "", "h");
        let found = diagnostics.into_sorted();
        assert_eq!((found[0].line, found[0].column), (Some(2), Some(7)));
        assert_eq!(
            found[0].snippet,
            "    |\n  2 | \"é\" = \"xyz\"\n    |       ^^^^^"
        );
    }

    #[test]
    fn a_long_line_is_cut_around_the_caret() {
        let text = format!("x = \"{}\" # {}", "a".repeat(300), "b".repeat(300));
        let sources = file(&text);
        let mut diagnostics = Diagnostics::new(&sources);
        diagnostics.add(span(307, 308), "w", "", "h");
        let snippet = diagnostics.into_sorted().remove(0).snippet;
        let lines: Vec<&str> = snippet.lines().collect();
        let caret = lines[2].chars().position(|c| c == '^');
        assert_eq!(
            caret.and_then(|at| lines[1].chars().nth(at)),
            Some('#'),
            "{snippet}"
        );
        assert!(lines[1].chars().count() < SHOWN + 12, "{snippet}");
    }

    #[test]
    fn diagnostics_come_in_reading_order_and_ends_are_safe() {
        let sources = file("a = 1\nb = 2");
        let mut diagnostics = Diagnostics::new(&sources);
        diagnostics.add(diagnostics.end_of_file(), "last", "", "h");
        diagnostics.add(span(0, 1), "first", "", "h");
        let found = diagnostics.into_sorted();
        assert_eq!(
            (found[0].what.as_str(), found[1].column),
            ("first", Some(6))
        );
        let empty = file("");
        let mut diagnostics = Diagnostics::new(&empty);
        diagnostics.add(diagnostics.end_of_file(), "missing", "", "h");
        assert_eq!(
            diagnostics.into_sorted()[0].place,
            "line 1, column 1 of r.toml"
        );
    }
}
