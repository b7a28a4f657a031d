//! Exactly the file: TOML as written, every key and value with its place, the command line's `--set` laid over it.
//!
//! Takes the recipe's text and the overrides, returns a tree of nodes. Knows how TOML is written; knows no key, no type, no
//! default: what a recipe may say is `keys`' business.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistake::Mistakes;

/// One text that values were read from.
pub(super) struct Source {
    /// The file's path, or `--set KEY=VALUE`.
    pub name: String,
    /// The whole text that places count in.
    pub text: String,
    /// Given on the command line.
    pub is_override: bool,
}

/// A stretch of bytes of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Index of the source: 0 is the file.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Place {
    fn new(source: usize, offset: usize, span: Range<usize>) -> Self {
        Self {
            source,
            start: offset + span.start,
            end: offset + span.end,
        }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub place: Place,
    pub raw: Raw,
}

/// TOML's values. An integer too large for 128 bits is held at the end of the range: no rule allows it.
#[derive(Debug, Clone)]
pub(super) enum Raw {
    Text(String),
    Integer(i128),
    Float(f64),
    Flag(bool),
    Date,
    List(Vec<Node>),
    Table(Vec<Entry>),
}

impl Raw {
    /// What a person calls it.
    pub fn called(&self) -> &'static str {
        match self {
            Raw::Text(_) => "text",
            Raw::Integer(_) => "a whole number",
            Raw::Float(_) => "a number with a fraction",
            Raw::Flag(_) => "true or false",
            Raw::Date => "a date",
            Raw::List(_) => "a list",
            Raw::Table(_) => "a table",
        }
    }
}

/// A key with its value, in file order.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub key_place: Place,
    pub node: Node,
}

/// Reads the file (source 0) and lays the overrides (sources 1, 2, ...) over it. `None` where the file is not TOML.
pub(super) fn read(sources: &[Source], mistakes: &mut Mistakes) -> Option<Vec<Entry>> {
    let mut entries = read_file(&sources[0].text, mistakes);
    for (index, source) in sources.iter().enumerate().skip(1) {
        let Some((keys, key_place, node)) = read_override(index, &source.text, mistakes) else {
            continue;
        };
        if let Some(entries) = &mut entries {
            set(entries, &keys, key_place, node);
        }
    }
    entries
}

/// The file's entries, or every syntax error the parser could tell apart.
fn read_file(text: &str, mistakes: &mut Mistakes) -> Option<Vec<Entry>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let place = Place::new(0, 0, error.span().unwrap_or(0..0));
        mistakes.add(
            place,
            format!("this is not TOML: {}", one_line(error.message())),
            "",
            syntax_hint(error.message()),
        );
    }
    errors
        .is_empty()
        .then(|| entries_of(0, 0, table.into_inner()))
}

fn one_line(message: &str) -> String {
    message
        .lines()
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The commonest slips have a remedy of their own.
fn syntax_hint(message: &str) -> &'static str {
    if message.contains("duplicate key") {
        "keep one of the two"
    } else if message.contains("quoted") || message.contains("string") {
        "put text in double quotes, as in `dtype = \"bf16\"`"
    } else {
        "write `key = value`, one on each line, below its `[table]`"
    }
}

/// One `KEY=VALUE`: its keys, their place and the value; text that is not TOML is a bare string.
fn read_override(
    source: usize,
    text: &str,
    mistakes: &mut Mistakes,
) -> Option<(Vec<String>, Place, Node)> {
    // A quoted key may hold `=`: the first one that leaves a whole key before it is the separator.
    let parsed = text.match_indices('=').find_map(|(at, _)| {
        toml_edit::Key::parse(text[..at].trim())
            .ok()
            .map(|keys| (at, keys))
    });
    let Some((at, keys)) = parsed else {
        let hint = "write KEY=VALUE, as in `--set train.steps=100`";
        mistakes.add(
            Place::new(source, 0, 0..text.len()),
            "`--set` needs a key and a value",
            "KEY=VALUE with dots in KEY",
            hint,
        );
        return None;
    };
    let value = text[at + 1..].trim();
    let offset = text.len() - text[at + 1..].trim_start().len();
    let place = Place::new(source, offset, 0..value.len());
    let node = match DeValue::parse(value) {
        Ok(parsed) => node_of(source, offset, parsed),
        // What opens a list, a table or a quoted text was meant as TOML: as a bare string it would say something else.
        Err(error) if value.starts_with(['[', '{', '"', '\'']) => {
            let hint = "quote the whole for the shell and each text inside, as in `--set 'adapter.target_modules=[\"q_proj\"]'`";
            mistakes.add(
                place,
                format!("this value is not TOML: {}", one_line(error.message())),
                "",
                hint,
            );
            return None;
        }
        Err(_) => Node {
            place,
            raw: Raw::Text(value.to_string()),
        },
    };
    let key_end = text[..at].trim_end().len();
    Some((
        keys.iter().map(|key| key.get().to_string()).collect(),
        Place::new(source, 0, 0..key_end),
        node,
    ))
}

/// Puts `node` at the path `keys`, making tables on the way. Where something else than a table stands in the way, that is
/// the file's own mistake and is reported as such.
fn set(entries: &mut Vec<Entry>, keys: &[String], key_place: Place, node: Node) {
    let Some((key, rest)) = keys.split_first() else {
        return;
    };
    let at = entries.iter().position(|entry| entry.key == *key);
    if rest.is_empty() {
        let entry = Entry {
            key: key.clone(),
            key_place,
            node,
        };
        match at {
            Some(at) => entries[at] = entry,
            None => entries.push(entry),
        }
        return;
    }
    let at = at.unwrap_or_else(|| {
        let table = Node {
            place: key_place,
            raw: Raw::Table(Vec::new()),
        };
        entries.push(Entry {
            key: key.clone(),
            key_place,
            node: table,
        });
        entries.len() - 1
    });
    if let Raw::Table(inner) = &mut entries[at].node.raw {
        set(inner, rest, key_place, node);
    }
}

/// A table's entries in file order (the parser hands them over sorted by name).
fn entries_of(source: usize, offset: usize, table: DeTable<'_>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| Entry {
            key_place: Place::new(source, offset, key.span()),
            key: key.into_inner().into_owned(),
            node: node_of(source, offset, value),
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_place);
    entries
}

fn node_of(source: usize, offset: usize, value: Spanned<DeValue<'_>>) -> Node {
    let place = Place::new(source, offset, value.span());
    let raw = match value.into_inner() {
        DeValue::String(text) => Raw::Text(text.into_owned()),
        DeValue::Integer(number) => Raw::Integer(integer(number.as_str(), number.radix())),
        DeValue::Float(number) => Raw::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(flag) => Raw::Flag(flag),
        DeValue::Datetime(_) => Raw::Date,
        DeValue::Array(items) => Raw::List(
            items
                .into_iter()
                .map(|item| node_of(source, offset, item))
                .collect(),
        ),
        DeValue::Table(table) => Raw::Table(entries_of(source, offset, table)),
    };
    Node { place, raw }
}

fn integer(digits: &str, radix: u32) -> i128 {
    let end_of_range = if digits.starts_with('-') {
        i128::MIN
    } else {
        i128::MAX
    };
    i128::from_str_radix(digits, radix).unwrap_or(end_of_range)
}
