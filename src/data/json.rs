//! The layouts of JSON records: one object a line, a list of objects, objects over several lines, a list in the field `data`.
//!
//! Takes an open file, returns the text of each record unparsed, so that memory is bounded by the longest record and parsing runs
//! in parallel; then parses one text. The extension does not matter. Knows nothing of formats.

use std::fmt;
use std::io::{self, BufRead, Cursor, Read};
use std::sync::{Arc, LazyLock};

use regex::{Captures, Regex};
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Deserializer, Map, Value};

use super::read::{CORRECT_LINE, Content, Location, NeededColumns, RawRecord, RawRecords, Record};
use super::source::{Source, not_utf8};
use crate::error::{Error, Kind, Result};

/// The text of one record, or of several on a line, and where it begins.
pub(super) struct JsonText {
    pub bytes: Vec<u8>,
    /// Counted from 1.
    line: usize,
    /// Counted from 1.
    column: usize,
}

/// The records of `source`.
pub(super) fn records(source: Source) -> Result<RawRecords> {
    let file = source.name.clone();
    let is_list = source.start.trim_ascii_start().first() == Some(&b'[');
    let mut reader = source.into_reader();
    if is_list {
        return Ok(Box::new(Values::new(file, reader, true)));
    }
    let mut start = Vec::new();
    let over_lines = spans_lines(&mut reader, &mut start).map_err(|e| unreadable(&file, &e))?;
    let content = Cursor::new(start).chain(reader);
    let mut records: RawRecords = if over_lines {
        Box::new(Values::new(file, content, false))
    } else {
        Box::new(lines(file, content))
    };
    let first = records.next();
    let second = records.next();
    match (first, second) {
        (Some(Ok(only)), None) => Ok(data_field(only)),
        (first, second) => Ok(Box::new(first.into_iter().chain(second).chain(records))),
    }
}

/// Whether the first JSON object spans several lines; the lines read are appended to `start`.
fn spans_lines(reader: &mut impl BufRead, start: &mut Vec<u8>) -> io::Result<bool> {
    while start.trim_ascii().is_empty() {
        if reader.read_until(b'\n', start)? == 0 {
            return Ok(false);
        }
    }
    if fault(start) != Some(Category::Eof) {
        return Ok(false);
    }
    // An object cut short is followed by a line that cannot continue it.
    let more = reader.read_until(b'\n', start)?;
    Ok(more > 0 && matches!(fault(start), None | Some(Category::Eof)))
}

/// The first fault of a series of JSON values.
fn fault(bytes: &[u8]) -> Option<Category> {
    let text = String::from_utf8_lossy(bytes);
    let text = non_numbers_as_null(&text).unwrap_or_else(|| text.into_owned());
    let mut values = Deserializer::from_str(&text).into_iter::<IgnoredAny>();
    values.find_map(Result::err).map(|e| e.classify())
}

fn unreadable(file: &str, error: &io::Error) -> Error {
    Error::new(Kind::Io, format!("the file cannot be read on: {error}")).at(file)
}

/// A record a line; blank lines are passed over.
fn lines(
    file: Arc<str>,
    source: impl BufRead + 'static,
) -> impl Iterator<Item = Result<RawRecord>> {
    let lines = (1..).zip(source.split(b'\n'));
    lines.filter_map(move |(number, line)| {
        let line = match line {
            Ok(line) => line,
            Err(e) => return Some(Err(unreadable(&file, &e))),
        };
        let blank = line.iter().all(u8::is_ascii_whitespace);
        (!blank).then(|| Ok(raw_record(&file, "line", number, line, number as usize, 1)))
    })
}

fn raw_record(
    file: &Arc<str>,
    unit: &'static str,
    number: u64,
    bytes: Vec<u8>,
    line: usize,
    column: usize,
) -> RawRecord {
    RawRecord {
        place: Location::new(file, unit, number),
        content: Content::Json(JsonText {
            bytes,
            line,
            column,
        }),
    }
}

/// The records in the field `data` of a file's only object, where it is a list of objects.
fn data_field(only: RawRecord) -> RawRecords {
    let Content::Json(text) = &only.content else {
        return Box::new(std::iter::once(Ok(only)));
    };
    let items = match serde_json::from_slice(&text.bytes) {
        Ok(Value::Object(mut fields)) => fields.get_mut("data").map(Value::take),
        _ => None,
    };
    match items {
        Some(Value::Array(items)) if items.iter().all(Value::is_object) => {
            let file = only.place.file;
            let objects = items.into_iter().filter_map(|item| match item {
                Value::Object(fields) => Some(fields),
                _ => None,
            });
            Box::new((1..).zip(objects).map(move |(number, fields)| {
                Ok(RawRecord {
                    place: Location::new(&file, "record", number),
                    content: Content::Fields(fields),
                })
            }))
        }
        _ => Box::new(std::iter::once(Ok(only))),
    }
}

/// Cuts a stream into JSON values by their brackets: the items of a list, or values one after another.
struct Values<R> {
    file: Arc<str>,
    source: R,
    in_list: bool,
    /// Values found.
    count: u64,
    /// Of the next byte, from 1.
    line: usize,
    column: usize,
    ended: bool,
}

impl<R: BufRead> Values<R> {
    fn new(file: Arc<str>, source: R, in_list: bool) -> Self {
        Self {
            file,
            source,
            in_list,
            count: 0,
            line: 1,
            column: 1,
            ended: false,
        }
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Result<Option<u8>> {
        loop {
            let buffer = self.source.fill_buf();
            let next = buffer
                .map_err(|e| unreadable(&self.file, &e))?
                .first()
                .copied();
            match next {
                Some(byte) if byte.is_ascii_whitespace() => self.pass(byte),
                next => return Ok(next),
            }
        }
    }

    fn pass(&mut self, byte: u8) {
        self.source.consume(1);
        self.advance(byte);
    }

    fn advance(&mut self, byte: u8) {
        self.column += 1;
        if byte == b'\n' {
            self.line += 1;
            self.column = 1;
        }
    }

    fn broken(&self, what: &str) -> Error {
        Error::new(Kind::Io, format!("not valid JSON: {what}"))
            .at(format!("{}, line {}, column {}", self.file, self.line, self.column))
            .hint("correct the file, or write it again if it was cut short; one object per line confines a mistake to its line")
    }

    /// Moves to the next value; `false` at the end.
    fn find(&mut self) -> Result<bool> {
        let next = self.peek()?;
        if !self.in_list {
            return Ok(next.is_some());
        }
        let expected = if self.count == 0 { b'[' } else { b',' };
        let ends = match next {
            Some(b']') if self.count > 0 => true,
            Some(byte) if byte == expected => {
                self.pass(byte);
                match self.peek()? {
                    Some(b']') if self.count > 0 => {
                        return Err(self.broken("a comma before the list's end"));
                    }
                    next => next == Some(b']'),
                }
            }
            Some(_) => return Err(self.broken("neither `,` nor `]` after a record")),
            None => return Err(self.broken("the list is not closed")),
        };
        if ends {
            self.pass(b']');
            if self.peek()?.is_some() {
                return Err(self.broken("text after the list's end"));
            }
        }
        Ok(!ends)
    }

    /// The bytes of the value that begins here.
    fn value(&mut self) -> Result<Vec<u8>> {
        let mut value = Vec::new();
        let mut brackets = Brackets::default();
        loop {
            let buffer = match self.source.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) => return Err(unreadable(&self.file, &e)),
            };
            if buffer.is_empty() {
                return if brackets.is_open() {
                    Err(self.broken("the file ends within a record"))
                } else {
                    Ok(value)
                };
            }
            let length = buffer.iter().position(|byte| brackets.ends_before(*byte));
            let bytes = &buffer[..length.unwrap_or(buffer.len())];
            value.extend_from_slice(bytes);
            let count = bytes.len();
            let new_lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            let last_line = bytes.iter().rev().position(|byte| *byte == b'\n');
            self.line += new_lines;
            self.column = last_line.map_or(self.column + count, |since| since + 1);
            self.source.consume(count);
            if length.is_some() {
                return Ok(value);
            }
        }
    }
}

impl<R: BufRead> Iterator for Values<R> {
    type Item = Result<RawRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let found = self.find().and_then(|found| {
            let (line, column) = (self.line, self.column);
            if !found {
                return Ok(None);
            }
            let bytes = self.value()?;
            self.count += 1;
            let (unit, number) = if self.in_list {
                ("record", self.count)
            } else {
                ("line", line as u64)
            };
            Ok(Some(raw_record(
                &self.file, unit, number, bytes, line, column,
            )))
        });
        self.ended = !matches!(found, Ok(Some(_)));
        found.transpose()
    }
}

/// Brackets and quotes of a JSON value that are open.
#[derive(Default)]
struct Brackets {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// A bracket was closed, or a string outside brackets.
    closed: bool,
    begun: bool,
}

impl Brackets {
    fn is_open(&self) -> bool {
        self.depth > 0 || self.in_string
    }

    /// Takes the next byte; `true` where the value ended before it.
    fn ends_before(&mut self, byte: u8) -> bool {
        if self.begun && !self.is_open() {
            let separates = matches!(byte, b',' | b']' | b'}') || byte.is_ascii_whitespace();
            if self.closed || separates {
                return true;
            }
        }
        self.begun = true;
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.in_string => self.escaped = true,
            b'"' => self.in_string = !self.in_string,
            _ if self.in_string => return false,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => return false,
        }
        self.closed = !self.is_open();
        false
    }
}

/// The objects of `text`, usually one; a fault anywhere in it is one error.
pub(super) fn parse(
    place: &Location,
    text: &JsonText,
    columns: &NeededColumns,
) -> Vec<Result<Record>> {
    let bytes = text
        .bytes
        .strip_prefix(b"\xef\xbb\xbf")
        .unwrap_or(&text.bytes);
    let Ok(json) = std::str::from_utf8(bytes) else {
        return vec![Err(not_utf8(&place.file, place, bytes))];
    };
    let parsed = objects(json, columns).or_else(|e| match non_numbers_as_null(json) {
        Some(json) => objects(&json, columns),
        None => Err(e),
    });
    match parsed {
        Ok(objects) => objects
            .into_iter()
            .map(|fields| {
                Ok(Record {
                    place: place.clone(),
                    fields,
                })
            })
            .collect(),
        Err(e) => vec![Err(not_an_object(place, text, &e))],
    }
}

fn objects(json: &str, columns: &NeededColumns) -> serde_json::Result<Vec<Map<String, Value>>> {
    let mut source = Deserializer::from_str(json);
    let mut objects = Vec::new();
    while objects.is_empty() || source.end().is_err() {
        objects.push(Fields(columns).deserialize(&mut source)?);
    }
    Ok(objects)
}

fn not_an_object(place: &Location, text: &JsonText, error: &serde_json::Error) -> Error {
    let message = error.to_string();
    let reason = message.split(" at line ").next().unwrap_or_default();
    let line = text.line + error.line().saturating_sub(1);
    let column = if error.line() > 1 {
        error.column()
    } else {
        text.column + error.column().saturating_sub(1)
    };
    let line = if place.unit == "line" && line as u64 == place.number {
        String::new()
    } else {
        format!("line {line}, ")
    };
    Error::new(
        Kind::Data,
        format!("not a JSON object: {reason}, {line}column {column}"),
    )
    .at(place.to_string())
    .rule("{\"field\": value, ...}")
    .hint(CORRECT_LINE)
}

/// `json` with Python's NaN, Infinity and -Infinity as null; `None` where it has none.
fn non_numbers_as_null(json: &str) -> Option<String> {
    static TOKENS: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r#""(?:[^"\\]|\\.)*"|-?Infinity\b|NaN\b"#).expect("the pattern is valid")
    });
    if !json.contains("NaN") && !json.contains("Infinity") {
        return None;
    }
    let replaced = TOKENS.replace_all(json, |found: &Captures<'_>| {
        let token = &found[0];
        if token.starts_with('"') {
            token.to_string()
        } else {
            "null".to_string()
        }
    });
    Some(replaced.into_owned())
}

/// Reads an object; the values of columns that are not needed become null without being decoded.
struct Fields<'a>(&'a NeededColumns);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: serde::Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut source: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = source.next_key::<String>()? {
            if !self.0.contains(&name) {
                source.next_value::<IgnoredAny>()?;
                fields.insert(name, Value::Null);
                continue;
            }
            let value = source.next_value()?;
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format!("`{name}` stands twice")));
            }
            fields.insert(name, value);
        }
        Ok(fields)
    }
}
