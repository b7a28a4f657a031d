//! Files to records: `.jsonl .json .csv .tsv .txt .parquet`.
//!
//! Takes one local file, returns its records in order, each with its location, so that errors name file and line. Owns the types
//! that the readers of each kind of file share. Knows nothing of formats.

use std::cell::Cell;
use std::fmt;
use std::io::BufRead;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::json::{self, JsonText};
use super::options::TxtUnit;
use super::source::{Source, not_utf8};
use super::{delimited, parquet};
use crate::error::{Error, Result};

/// One record: its fields in file order, and its location.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The file and line, row or record.
    pub place: Location,
    /// Column or key -> value.
    pub fields: Map<String, Value>,
}

/// Location of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file, as given.
    pub file: Arc<str>,
    /// "line", "record" or "row".
    pub unit: &'static str,
    /// Counted from 1.
    pub number: u64,
}

impl Location {
    pub(super) fn new(file: &Arc<str>, unit: &'static str, number: u64) -> Self {
        Self {
            file: file.clone(),
            unit,
            number,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} {}", self.file, self.unit, self.number)
    }
}

/// Records in file order; a bad one is an error and does not end the iteration.
pub type Records = Box<dyn Iterator<Item = Result<Record>>>;

/// Records whose JSON is not parsed yet, in file order. An error of `Kind::Data` is one record's; any other ends the file.
pub(super) type RawRecords = Box<dyn Iterator<Item = Result<RawRecord>>>;

/// A record before parsing.
pub(super) struct RawRecord {
    pub place: Location,
    pub content: Content,
}

pub(super) enum Content {
    Json(JsonText),
    Fields(Map<String, Value>),
}

/// The columns to decode; others are null.
#[derive(Debug, Clone)]
pub(super) enum NeededColumns {
    All,
    Named(Vec<String>),
}

/// An open data file.
pub(super) struct OpenFile {
    pub records: RawRecords,
    /// Bytes read so far.
    pub consumed: Rc<Cell<u64>>,
}

pub(super) const CORRECT_LINE: &str =
    "correct or remove the line, or set `on_bad_record = \"skip\"`";

impl NeededColumns {
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.iter().any(|needed| needed == name),
        }
    }
}

impl RawRecord {
    /// Bytes of text, about.
    pub fn size(&self) -> usize {
        match &self.content {
            Content::Json(text) => text.bytes.len(),
            Content::Fields(fields) => fields
                .values()
                .filter_map(Value::as_str)
                .map(str::len)
                .sum(),
        }
    }

    /// The record, or several that stand in one line.
    pub fn parse(self, columns: &NeededColumns) -> Vec<Result<Record>> {
        let place = self.place;
        match self.content {
            Content::Json(text) => json::parse(&place, &text, columns),
            Content::Fields(fields) => vec![Ok(Record { place, fields })],
        }
    }
}

/// Opens `path` by its extension.
///
/// # Errors
/// `Kind::Io` where the file cannot be opened; `Kind::Data` for an unknown extension, a file that is not what its extension says,
/// and, from the iterator, for a record that cannot be read.
pub fn read(path: &Path, txt_unit: TxtUnit) -> Result<Records> {
    let columns = NeededColumns::All;
    let file = open(Source::open(path)?, txt_unit, &columns)?;
    Ok(Box::new(file.records.flat_map(move |raw| match raw {
        Ok(raw) => raw.parse(&columns),
        Err(e) => vec![Err(e)],
    })))
}

/// The records of `source` by its extension.
pub(super) fn open(source: Source, txt_unit: TxtUnit, columns: &NeededColumns) -> Result<OpenFile> {
    let consumed = source.consumed.clone();
    let records = match source.extension.as_str() {
        "parquet" => parquet::records(source, columns)?,
        "csv" | "tsv" => delimited::records(source, columns)?,
        "txt" => texts(source, txt_unit),
        _ => json::records(source)?,
    };
    Ok(OpenFile { records, consumed })
}

/// Paragraphs (blank lines between them) or the entire file, as `{text}`; line ends of a paragraph become `\n`.
fn texts(source: Source, unit: TxtUnit) -> RawRecords {
    let file = source.name.clone();
    let mut reader = source.into_reader();
    let mut line = 0;
    Box::new(std::iter::from_fn(move || {
        let text = match unit {
            TxtUnit::File if line > 0 => return None,
            TxtUnit::File => entire(&file, &mut reader, &mut line),
            TxtUnit::Paragraph => paragraph(&file, &mut reader, &mut line),
        };
        text.transpose()
    }))
}

fn entire(file: &Arc<str>, reader: &mut impl BufRead, line: &mut u64) -> Result<Option<RawRecord>> {
    let mut bytes = Vec::new();
    *line = 1;
    reader
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io("read", Path::new(&**file), e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let bytes = e.as_bytes();
        let start = e.utf8_error().valid_up_to();
        let number = 1 + bytes[..start].iter().filter(|b| **b == b'\n').count();
        let from = bytes[..start]
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        let place = Location::new(file, "line", number as u64);
        not_utf8(
            file,
            place,
            bytes[from..]
                .split(|b| *b == b'\n')
                .next()
                .unwrap_or_default(),
        )
    })?;
    Ok(Some(text_record(Location::new(file, "line", 1), text)))
}

/// The next paragraph; `line` counts the lines read.
fn paragraph(
    file: &Arc<str>,
    reader: &mut impl BufRead,
    line: &mut u64,
) -> Result<Option<RawRecord>> {
    let mut text = String::new();
    let mut place = None;
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let count = reader.read_until(b'\n', &mut bytes);
        let count = count.map_err(|e| Error::io("read", Path::new(&**file), e))?;
        *line += 1;
        let read = std::str::from_utf8(&bytes)
            .map_err(|_| not_utf8(file, Location::new(file, "line", *line), &bytes))?;
        let read = read.strip_suffix('\n').unwrap_or(read);
        let read = read.strip_suffix('\r').unwrap_or(read);
        match (&place, read.trim().is_empty()) {
            (None, true) if count == 0 => return Ok(None),
            (None, true) => continue,
            (Some(_), true) => break,
            (None, false) => place = Some(Location::new(file, "line", *line)),
            (Some(_), false) => text.push('\n'),
        }
        text.push_str(read);
    }
    Ok(place.map(|place| text_record(place, text)))
}

fn text_record(place: Location, text: String) -> RawRecord {
    RawRecord {
        place,
        content: Content::Fields(Map::from_iter([("text".to_string(), Value::String(text))])),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::{Kind, Result};

    fn all(name: &str, content: &[u8], unit: TxtUnit) -> Vec<Result<Record, String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        match read(&path, unit) {
            Ok(records) => records.map(|r| r.map_err(|e| e.to_string())).collect(),
            Err(e) => vec![Err(e.to_string())],
        }
    }

    fn first_error(records: &[Result<Record, String>]) -> &str {
        records.iter().find_map(|r| r.as_ref().err()).unwrap()
    }

    fn texts(records: &[Result<Record, String>]) -> Vec<(u64, &str)> {
        records
            .iter()
            .flatten()
            .map(|r| (r.place.number, r.fields["text"].as_str().unwrap()))
            .collect()
    }

    /// Files that are not read as `datasets` reads them, and our error (or what is read instead).
    const DEPARTURES: &[(&str, &str)] = &[
        // No records: an error of the data set, not of the file.
        ("empty_list.json", "{}"),
        ("empty.jsonl", "{}"),
        ("header_only.csv", r#"{"text": []}"#),
        ("empty.csv", "{}"),
        ("no_rows.parquet", "{}"),
        // Errors in both.
        ("cut.jsonl", "line 2"),
        ("trailing_comma.json", "line 1, column 31"),
        ("scalars.jsonl", "line 1"),
        ("doubled_key.jsonl", "`text` stands twice"),
        ("lone_surrogate.jsonl", "line 1"),
        ("unclosed.csv", "line 2"),
        ("unclosed_header.csv", "line 1"),
        (
            "long_row.csv",
            "3 cells where the header has 2\n  at FILE, line 3",
        ),
        ("doubled_column.parquet", "two columns `text`"),
        ("utf16.jsonl", "iconv -f utf-16 -t utf-8 FILE >"),
        ("utf16le.jsonl", "iconv -f utf-16le -t utf-8 FILE >"),
        ("utf16be.csv", "iconv -f utf-16be -t utf-8 FILE >"),
        ("utf16.csv", "iconv -f utf-16 -t utf-8 FILE >"),
        ("utf32.json", "iconv -f utf-32 -t utf-8 FILE >"),
        ("cp1252.csv", "iconv -f cp1252 -t utf-8 FILE >"),
        ("cp1252.jsonl", "iconv -f cp1252 -t utf-8 FILE >"),
        ("shift_jis.csv", "iconv -f shift_jis -t utf-8 FILE >"),
        ("gbk.jsonl", "iconv -f gbk -t utf-8 FILE >"),
        ("cp1251.csv", "iconv -f cp1251 -t utf-8 FILE >"),
        ("pointer.jsonl", "git lfs pull"),
        ("page.json", "HTML page"),
        // Read there, refused here: the text is damaged, or rows are lost.
        ("page.csv", "HTML page"),
        ("text_after_quote.csv", "closing quote\n  at FILE, line 2"),
        ("quote_not_doubled.csv", "closing quote\n  at FILE, line 2"),
        ("swallowed.csv", "closing quote\n  at FILE, line 2"),
        (
            "short_row.csv",
            "1 cells where the header has 2\n  at FILE, line 3",
        ),
        ("lz4.parquet", "gzip or zstd"),
        ("brotli.parquet", "gzip or zstd"),
        // Refused there, read here.
        ("map.parquet", r#"{"text": ["x", "y"]}"#),
        ("map_of_dates.parquet", r#"{"text": ["x", "y"]}"#),
        ("all_columns.parquet", r#"{"text": ["x", "y"]}"#),
        ("open_quote.tsv", r#"{"text": ["\"open", "x"]}"#),
        // Rows that are read as one there.
        ("two_open_quotes.tsv", r#"{"text": ["\"open", "\"shut"]}"#),
        // Columns that are read as one there.
        ("semicolon.csv", r#"{"prompt": ["a"], "completion": ["b"]}"#),
        ("commas.tsv", r#"{"prompt": ["a"], "completion": ["b"]}"#),
        // Every cell is text here.
        ("space_before_quote.csv", r#"{"text": ["1"]}"#),
    ];

    /// Reads the needed columns of a file, as training does.
    fn columns_of(path: &Path, values: &Map<String, Value>) -> Result<Map<String, Value>, String> {
        let columns = match values.is_empty() {
            true => NeededColumns::All,
            false => NeededColumns::Named(values.keys().cloned().collect()),
        };
        let file = open(
            Source::open(path).map_err(|e| e.to_string())?,
            TxtUnit::File,
            &columns,
        );
        let mut found: Map<String, Value> = values
            .keys()
            .map(|name| (name.clone(), json!([])))
            .collect();
        for raw in file.map_err(|e| e.to_string())?.records {
            for record in raw.map_err(|e| e.to_string())?.parse(&columns) {
                let record = record.map_err(|e| e.to_string())?;
                for (name, column) in &mut found {
                    let value = record.fields.get(name).cloned().unwrap_or_default();
                    column.as_array_mut().unwrap().push(value);
                }
            }
        }
        Ok(found)
    }

    /// The cases of `scripts/tables.py`.
    fn golden_tables() -> Vec<Value> {
        let mut golden = crate::data::golden("tables.json");
        serde_json::from_value(golden["cases"].take()).unwrap()
    }

    /// A case's file: one character a byte.
    fn bytes_of(case: &Value) -> Vec<u8> {
        let text = case["content"].as_str().unwrap();
        text.chars().map(|c| c as u8).collect()
    }

    /// Reads the file of `case` at `path` and compares with `datasets`, or with our departure from it.
    fn compare(case: &Value, path: &Path) -> Result<(), String> {
        let name = case["file"].as_str().unwrap();
        std::fs::write(path, bytes_of(case)).unwrap();
        let departure = DEPARTURES.iter().find(|(file, _)| *file == name);
        let departure = departure.map(|(_, ours)| *ours);
        let expected = match departure {
            Some(values) if values.starts_with('{') => serde_json::from_str(values).unwrap(),
            Some(_) => Value::Null,
            None => case["reference"]["values"].clone(),
        };
        let none = Map::new();
        let found = columns_of(path, expected.as_object().unwrap_or(&none));
        let as_expected = match (&found, departure) {
            (Ok(found), _) => expected == Value::Object(found.clone()),
            (Err(error), Some(words)) => {
                let error = error.replace(path.to_str().unwrap(), "FILE");
                expected.is_null() && error.contains(words)
            }
            (Err(_), None) => false,
        };
        let difference = format!("{name}: {found:?}, not {departure:?} or {expected}");
        as_expected.then_some(()).ok_or(difference)
    }

    #[test]
    fn tables_are_read_as_datasets_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let compare =
            |case: &Value| compare(case, &folder.path().join(case["file"].as_str()?)).err();
        let failures: Vec<String> = golden_tables().iter().filter_map(compare).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    /// Damage at 1,500 places of a Parquet file with every type: rows or errors, no panic.
    #[test]
    fn damaged_parquet_files_do_not_panic() {
        let cases = golden_tables();
        let mut cases = cases.iter();
        let case = cases.find(|case| case["file"] == "all_columns.parquet");
        let whole = bytes_of(case.unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.parquet");
        let mut errors = 0;
        for step in 0..1500 {
            let mut damaged = whole.clone();
            damaged[step * 7919 % whole.len()] ^= 1 << (step % 8);
            std::fs::write(&path, damaged).unwrap();
            let rows = read(&path, TxtUnit::File);
            let is_damage = |error: &Error| error.kind() != Kind::Data;
            errors += usize::from(match rows {
                Ok(mut rows) => rows.any(|row| row.is_err_and(|e| is_damage(&e))),
                Err(error) => is_damage(&error),
            });
        }
        assert!(errors > 100 && errors < 1500, "{errors}");
    }

    #[test]
    fn a_bad_line_is_an_error_and_the_rest_is_read() {
        let records = all(
            "a.jsonl",
            b"\xef\xbb\xbf{\"text\": \"x\"}\n\n{bad\n[1]\n{\"text\": \"y\"}\r\n\xff\n",
            TxtUnit::File,
        );
        assert_eq!(texts(&records), [(1, "x"), (5, "y")]);
        let errors: Vec<_> = records.iter().filter_map(|r| r.as_ref().err()).collect();
        assert_eq!(errors.len(), 3);
        for (error, line) in errors.iter().zip(["line 3", "line 4", "line 6"]) {
            assert!(error.contains(&format!("a.jsonl, {line}\n")), "{error}");
        }
    }

    #[test]
    fn json_is_a_list_or_lines_or_a_data_field() {
        for content in [
            "[{\"text\": \"x\"}, {\"text\": \"y\"}]",
            "{\"text\": \"x\"}\n{\"text\": \"y\"}",
            "{\"data\": [{\"text\": \"x\"}, {\"text\": \"y\"}]}",
        ] {
            assert_eq!(
                texts(&all("a.json", content.as_bytes(), TxtUnit::File)),
                [(1, "x"), (2, "y")],
                "{content}"
            );
        }
        let records = all("a.json", b"[{\"text\": 1},\n {]", TxtUnit::File);
        assert!(first_error(&records).contains("line 2, column 3"));
    }

    #[test]
    fn csv_quotes_and_tsv_does_not() {
        let records = all(
            "a.csv",
            b"text,n\n\"x,\n\"\"y\"\"\",1\nz\nw,2\n",
            TxtUnit::File,
        );
        assert_eq!(texts(&records), [(2, "x,\n\"y\""), (5, "w")]);
        let error = first_error(&records);
        assert!(
            error.contains("1 cells where the header has 2") && error.contains("line 4"),
            "{error}"
        );
        assert_eq!(
            texts(&all("a.tsv", b"text\tlabel\n\"open\t1\n", TxtUnit::File)),
            [(2, "\"open")]
        );
    }

    #[test]
    fn paragraphs_end_at_blank_lines() {
        let content = b"a\nb\n\n \n\nc\r\nd\n";
        assert_eq!(
            texts(&all("a.txt", content, TxtUnit::Paragraph)),
            [(1, "a\nb"), (6, "c\nd")]
        );
        assert_eq!(
            texts(&all("a.txt", b"a\n\nb\n", TxtUnit::File)),
            [(1, "a\n\nb\n")]
        );
        let unknown = all("a.doc", b"", TxtUnit::File);
        assert!(first_error(&unknown).contains(".parquet"));
        let latin1 = all("a.txt", b"a\n\xff", TxtUnit::File);
        assert!(first_error(&latin1).contains("line 2"));
    }
}
