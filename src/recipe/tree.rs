//! The recipe as written: TOML with the span of every key and value, the command line's `--set` laid over it.
//!
//! Takes the recipe's text and the overrides, returns a tree of nodes. Knows how TOML is written; knows no key, no type, no
//! default.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::Diagnostics;
use super::key::Key;

/// One text that values were read from.
pub(super) struct Source {
    /// The file's path, or `--set KEY=VALUE`.
    pub name: String,
    /// The text that spans count in.
    pub text: String,
    /// Given on the command line.
    pub is_override: bool,
}

/// A range of bytes of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span {
    /// Index of the source: 0 is the file.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    fn new(source: usize, offset: usize, span: Range<usize>) -> Self {
        Self {
            source,
            start: offset + span.start,
            end: offset + span.end,
        }
    }
}

/// A value with its span.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub span: Span,
    pub raw: Raw,
}

/// TOML's values. An integer too large for 128 bits becomes the end of the range, which no rule allows.
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
    /// An integer or a float.
    pub fn number(&self) -> Option<f64> {
        match self {
            Raw::Integer(number) => Some(*number as f64),
            Raw::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// The type in words.
    pub fn type_name(&self) -> &'static str {
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
    pub key_span: Span,
    pub node: Node,
}

/// The tree of a recipe.
#[derive(Debug)]
pub(super) struct RawRecipe(pub Vec<Entry>);

impl RawRecipe {
    /// The value given to `key`.
    pub fn node(&self, key: &Key) -> Option<&Node> {
        let table = if key.table.is_empty() {
            &self.0
        } else {
            match &self.entry(key.table)?.node.raw {
                Raw::Table(entries) => entries,
                _ => return None,
            }
        };
        let entry = table.iter().find(|entry| entry.key == key.name)?;
        Some(&entry.node)
    }

    /// Where the recipe names `table`.
    pub fn table_span(&self, table: &str) -> Option<Span> {
        self.entry(table).map(|entry| entry.key_span)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.key == name)
    }
}

/// Reads the file (source 0) and lays the overrides (sources 1, 2, ...) over it. `None` where the file is not TOML.
pub(super) fn read(sources: &[Source], diagnostics: &mut Diagnostics<'_>) -> Option<RawRecipe> {
    let mut entries = read_file(&sources[0].text, diagnostics);
    for (index, source) in sources.iter().enumerate().skip(1) {
        let Some((keys, key_span, node)) = read_override(index, &source.text, diagnostics) else {
            continue;
        };
        if let Some(entries) = &mut entries {
            set(entries, &keys, key_span, node);
        }
    }
    entries.map(RawRecipe)
}

/// The file's entries, or every syntax error the parser could tell apart.
fn read_file(text: &str, diagnostics: &mut Diagnostics<'_>) -> Option<Vec<Entry>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let span = Span::new(0, 0, error.span().unwrap_or(0..0));
        let message = error.message();
        let what = format!("this is not TOML: {}", one_line(message));
        diagnostics.add(span, what, "", syntax_hint(message));
    }
    errors
        .is_empty()
        .then(|| entries_of(0, 0, table.into_inner()))
}

fn one_line(message: &str) -> String {
    let lines: Vec<&str> = message.lines().map(str::trim).collect();
    lines.join(", ")
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
    diagnostics: &mut Diagnostics<'_>,
) -> Option<(Vec<String>, Span, Node)> {
    // A quoted key may hold `=`: the first one that leaves a whole key before it is the separator.
    let parsed = text.match_indices('=').find_map(|(at, _)| {
        let keys = toml_edit::Key::parse(text[..at].trim()).ok()?;
        Some((at, keys))
    });
    let Some((at, keys)) = parsed else {
        let hint = "write KEY=VALUE, as in `--set train.steps=100`";
        diagnostics.add(
            Span::new(source, 0, 0..text.len()),
            "`--set` needs a key and a value",
            "KEY=VALUE with dots in KEY",
            hint,
        );
        return None;
    };
    let value = text[at + 1..].trim();
    let offset = text.len() - text[at + 1..].trim_start().len();
    let span = Span::new(source, offset, 0..value.len());
    let node = match DeValue::parse(value) {
        Ok(parsed) => node_of(source, offset, parsed),
        Err(error) => Node {
            raw: bare_string(value, span, &error, diagnostics)?,
            span,
        },
    };
    let key_end = text[..at].trim_end().len();
    Some((
        keys.iter().map(|key| key.get().to_string()).collect(),
        Span::new(source, 0, 0..key_end),
        node,
    ))
}

/// A value that is not TOML as text. An opening bracket or quote means TOML: as a bare string the value would change.
fn bare_string(
    value: &str,
    span: Span,
    error: &toml::de::Error,
    diagnostics: &mut Diagnostics<'_>,
) -> Option<Raw> {
    if !value.starts_with(['[', '{', '"', '\'']) {
        return Some(Raw::Text(value.to_string()));
    }
    let hint = "quote the whole for the shell and each text inside, as in `--set 'adapter.target_modules=[\"q_proj\"]'`";
    let what = format!("this value is not TOML: {}", one_line(error.message()));
    diagnostics.add(span, what, "", hint);
    None
}

/// Puts `node` at the path `keys`, creating tables. Where the file has a value in place of a table, the file's mistake is
/// reported.
fn set(entries: &mut Vec<Entry>, keys: &[String], key_span: Span, node: Node) {
    let Some((key, rest)) = keys.split_first() else {
        return;
    };
    let at = entries.iter().position(|entry| entry.key == *key);
    let at = at.unwrap_or_else(|| {
        entries.push(Entry {
            key: key.clone(),
            key_span,
            node: Node {
                span: key_span,
                raw: Raw::Table(Vec::new()),
            },
        });
        entries.len() - 1
    });
    let entry = &mut entries[at];
    if rest.is_empty() {
        entry.key_span = key_span;
        entry.node = node;
    } else if let Raw::Table(inner) = &mut entry.node.raw {
        set(inner, rest, key_span, node);
    }
}

/// A table's entries in file order (the parser hands them over sorted by name).
fn entries_of(source: usize, offset: usize, table: DeTable<'_>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| Entry {
            key_span: Span::new(source, offset, key.span()),
            key: key.into_inner().into_owned(),
            node: node_of(source, offset, value),
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_span);
    entries
}

fn node_of(source: usize, offset: usize, value: Spanned<DeValue<'_>>) -> Node {
    let span = Span::new(source, offset, value.span());
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
    Node { span, raw }
}

fn integer(digits: &str, radix: u32) -> i128 {
    let end_of_range = if digits.starts_with('-') {
        i128::MIN
    } else {
        i128::MAX
    };
    i128::from_str_radix(digits, radix).unwrap_or(end_of_range)
}
