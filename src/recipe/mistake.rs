//! Mistakes: collected all together, each shown with its line, a caret, the rule and the remedy.
//!
//! Takes places and sentences, returns `Mistake`s in reading order and the text that shows them. Knows nothing of what a
//! recipe means.

use serde::Serialize;

use super::raw::{Place, Source};

/// Characters of a line shown at most.
const SHOWN: usize = 110;

/// One mistake in a recipe or in a `--set`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mistake {
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
    pub(super) picture: String,
}

/// The collector.
pub(super) struct Mistakes<'a> {
    sources: &'a [Source],
    found: Vec<(Place, Mistake)>,
}

impl<'a> Mistakes<'a> {
    /// None yet.
    pub fn new(sources: &'a [Source]) -> Self {
        Self {
            sources,
            found: Vec::new(),
        }
    }

    /// Notes one.
    pub fn add(
        &mut self,
        place: Place,
        what: impl Into<String>,
        rule: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let source = &self.sources[place.source];
        let spot = Spot::of(&source.text, place);
        let (name, line, column) = match source.is_override {
            true => (source.name.clone(), None, None),
            false => (
                format!(
                    "line {}, column {} of {}",
                    spot.line, spot.column, source.name
                ),
                Some(spot.line),
                Some(spot.column),
            ),
        };
        let picture = spot.picture(line);
        let mistake = Mistake {
            place: name,
            line,
            column,
            what: what.into(),
            rule: rule.into(),
            hint: hint.into(),
            picture,
        };
        self.found.push((place, mistake));
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The source's own words at `place`.
    pub fn words(&self, place: Place) -> &'a str {
        self.sources[place.source]
            .text
            .get(place.start..place.end)
            .unwrap_or("")
    }

    /// Whether `place` is on the command line.
    pub fn is_override(&self, place: Place) -> bool {
        self.sources[place.source].is_override
    }

    /// How another mistake refers to `place`.
    pub fn name(&self, place: Place) -> String {
        let source = &self.sources[place.source];
        if source.is_override {
            format!("`{}`", source.name)
        } else {
            format!("line {}", Spot::of(&source.text, place).line)
        }
    }

    /// Just past the last thing written in the file.
    pub fn end_of_file(&self) -> Place {
        let end = self.sources[0].text.trim_end().len();
        Place {
            source: 0,
            start: end,
            end,
        }
    }

    /// All of them in reading order: the file's, then the overrides'.
    pub fn into_sorted(mut self) -> Vec<Mistake> {
        self.found.sort_by_key(|(place, _)| *place);
        self.found.into_iter().map(|(_, mistake)| mistake).collect()
    }
}

/// Shows `mistakes` as one text.
pub(super) fn shown(mistakes: &[Mistake]) -> String {
    let title = match mistakes.len() {
        1 => "the recipe has a mistake".to_string(),
        n => format!("the recipe has {n} mistakes"),
    };
    mistakes.iter().fold(title, |text, mistake| {
        let Mistake {
            place,
            what,
            rule,
            hint,
            picture,
            ..
        } = mistake;
        let rule = if rule.is_empty() {
            String::new()
        } else {
            format!("\n  rule: {rule}")
        };
        format!("{text}\n\n{what}\n  at {place}\n{picture}{rule}\n  hint: {hint}")
    })
}

/// Where a place lies in its text, in a person's terms.
struct Spot {
    line: usize,
    column: usize,
    /// The line's characters; those no terminal should be sent are replaced.
    characters: Vec<char>,
    /// Characters the caret spans, at least one.
    width: usize,
}

impl Spot {
    fn of(text: &str, place: Place) -> Self {
        let start = floor_boundary(text, place.start);
        let end = floor_boundary(text, place.end.max(start));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let characters = text[line_start..line_end]
            .trim_end()
            .chars()
            .map(shown_char)
            .collect();
        Self {
            line: text[..line_start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            characters,
            width: text[start..end.min(line_end)]
                .trim_end()
                .chars()
                .count()
                .max(1),
        }
    }

    /// The line between a gutter and a caret; `line` is absent on a command line.
    fn picture(&self, line: Option<usize>) -> String {
        let number = line.map(|n| n.to_string()).unwrap_or_default();
        let gutter = " ".repeat(number.len());
        let first = if self.column > SHOWN {
            self.column - SHOWN / 2
        } else {
            0
        };
        let cut: String = self.characters.iter().skip(first).take(SHOWN).collect();
        let before = if first > 0 { "…" } else { "" };
        let after = if self.characters.len() > first + SHOWN {
            "…"
        } else {
            ""
        };
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

fn floor_boundary(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at.min(text.len()))
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

    #[test]
    fn a_column_counts_characters_and_a_caret_spans_the_value() {
        // "é" is two bytes but one character: the value's first quote is byte 13 of the text and character 7 of its line.
        let sources = file("a = 1\n\"é\" = \"xyz\"\n");
        let mut mistakes = Mistakes::new(&sources);
        mistakes.add(
            Place {
                source: 0,
                start: 13,
                end: 18,
            },
            "w",
            "",
            "h",
        );
        let found = mistakes.into_sorted();
        assert_eq!((found[0].line, found[0].column), (Some(2), Some(7)));
        assert_eq!(
            found[0].picture,
            "    |\n  2 | \"é\" = \"xyz\"\n    |       ^^^^^"
        );
    }

    #[test]
    fn a_long_line_is_cut_around_the_caret() {
        let text = format!("x = \"{}\" # {}", "a".repeat(300), "b".repeat(300));
        let sources = file(&text);
        let mut mistakes = Mistakes::new(&sources);
        mistakes.add(
            Place {
                source: 0,
                start: 307,
                end: 308,
            },
            "w",
            "",
            "h",
        );
        let picture = mistakes.into_sorted().remove(0).picture;
        let lines: Vec<&str> = picture.lines().collect();
        let caret = lines[2].chars().position(|c| c == '^');
        assert_eq!(
            caret.and_then(|at| lines[1].chars().nth(at)),
            Some('#'),
            "{picture}"
        );
        assert!(lines[1].chars().count() < SHOWN + 12, "{picture}");
    }

    #[test]
    fn mistakes_come_in_reading_order_and_ends_are_safe() {
        let sources = file("a = 1\nb = 2");
        let mut mistakes = Mistakes::new(&sources);
        mistakes.add(mistakes.end_of_file(), "last", "", "h");
        mistakes.add(
            Place {
                source: 0,
                start: 0,
                end: 1,
            },
            "first",
            "",
            "h",
        );
        let found = mistakes.into_sorted();
        assert_eq!(
            (found[0].what.as_str(), found[1].column),
            ("first", Some(6))
        );
        let empty = file("");
        let mut mistakes = Mistakes::new(&empty);
        mistakes.add(mistakes.end_of_file(), "missing", "", "h");
        assert_eq!(
            mistakes.into_sorted()[0].place,
            "line 1, column 1 of r.toml"
        );
    }
}
