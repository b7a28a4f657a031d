//! Files to records: `.jsonl .json .csv .tsv .txt .parquet`.
//!
//! Takes one local file, returns its records in order, each with its location, so that errors name file and line. Refuses an
//! unknown extension. Knows nothing of formats.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::options::{EXTENSIONS, TxtUnit};
use super::parquet;
use crate::error::{Error, Kind, Result};

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
    fn line(file: &Arc<str>, number: u64) -> Self {
        Self {
            file: file.clone(),
            unit: "line",
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

/// Remedy for another encoding.
const RECODE: &str = "convert the file, as with `iconv -f latin1 -t utf-8`";
const CORRECT_LINE: &str = "correct or remove the line, or set `on_bad_record = \"skip\"`";

/// Opens `path` by its extension.
///
/// # Errors
/// `Kind::Io` where the file cannot be opened; `Kind::Data` for an unknown extension, a file that is not what its extension says,
/// and, from the iterator, for a record that cannot be read.
pub fn read(path: &Path, txt_unit: TxtUnit) -> Result<Records> {
    let name: Arc<str> = path.display().to_string().into();
    let open = || File::open(path).map_err(|e| Error::io("read", path, e));
    match extension(path).as_str() {
        "jsonl" | "ndjson" => Ok(Box::new(json_lines(name, BufReader::new(open()?)))),
        "json" => json(name, path),
        "csv" => csv(name, open()?, b',', true),
        // Tab-separated values have no quoting (IANA text/tab-separated-values): a quote is a character.
        "tsv" => csv(name, open()?, b'\t', false),
        "txt" => txt(name, path, txt_unit),
        "parquet" => parquet::records(name, open()?),
        _ => Err(Error::new(Kind::Data, "a file of an unknown kind")
            .at(name.as_ref())
            .rule(format!(
                "the file's name ends with .{}",
                EXTENSIONS.join(" .")
            ))
            .hint("rename or convert the file; a compressed file must be unpacked first")),
    }
}

/// The extension in lower case.
pub(super) fn extension(path: &Path) -> String {
    path.extension()
        .map(|e| e.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

fn record_error(place: &Location, what: impl Into<String>) -> Error {
    Error::new(Kind::Data, what).at(place.to_string())
}

fn json_lines(
    file: Arc<str>,
    source: impl BufRead + 'static,
) -> impl Iterator<Item = Result<Record>> {
    let mut number = 0;
    let mut lines = source.split(b'\n');
    std::iter::from_fn(move || {
        loop {
            number += 1;
            let place = Location::line(&file, number);
            let line = match lines.next()? {
                Ok(line) => line,
                Err(e) => {
                    return Some(Err(record_error(
                        &place,
                        format!("the file cannot be read on: {e}"),
                    )));
                }
            };
            let line = if number == 1 {
                line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line)
            } else {
                &line
            };
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Some(json_record(place, line));
            }
        }
    })
}

fn json_record(place: Location, line: &[u8]) -> Result<Record> {
    let text = std::str::from_utf8(line).map_err(|e| {
        record_error(
            &place,
            format!(
                "not valid UTF-8, from byte {} of it on",
                e.valid_up_to() + 1
            ),
        )
        .hint(RECODE)
    })?;
    let value = serde_json::from_str(text).map_err(|e| {
        record_error(
            &place,
            format!(
                "not a JSON object: {}, column {}",
                json_reason(&e),
                e.column()
            ),
        )
        .hint(CORRECT_LINE)
    })?;
    object(place, value)
}

/// serde_json's message without line and column.
fn json_reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line ")
        .map_or(text.clone(), |(reason, _)| reason.to_string())
}

fn object(place: Location, value: Value) -> Result<Record> {
    match value {
        Value::Object(fields) => Ok(Record { place, fields }),
        other => Err(record_error(&place, "a record is not a JSON object")
            .value(other.to_string().chars().take(80).collect::<String>())
            .rule("{\"field\": value, ...}")
            .hint("correct or remove it, or set `on_bad_record = \"skip\"`")),
    }
}

/// A list of objects, one object per line, or an object whose field `data` is a list of objects.
fn json(file: Arc<str>, path: &Path) -> Result<Records> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let numbered = move |items: Vec<Value>| {
        let record = move |(number, value)| {
            let place = Location {
                file: file.clone(),
                unit: "record",
                number,
            };
            object(place, value)
        };
        Box::new((1..).zip(items).map(record)) as Records
    };
    match serde_json::from_str(text) {
        Ok(Value::Array(items)) => Ok(numbered(items)),
        Ok(Value::Object(mut fields)) => match fields.get_mut("data").map(Value::take) {
            Some(Value::Array(items)) if items.iter().all(Value::is_object) => Ok(numbered(items)),
            Some(data) => {
                fields.insert("data".into(), data);
                Ok(numbered(vec![Value::Object(fields)]))
            }
            None => Ok(numbered(vec![Value::Object(fields)])),
        },
        // Several documents, one per line: JSON lines under another name.
        Err(_) if text.trim_start().starts_with('{') => {
            let lines = std::io::Cursor::new(text.to_string().into_bytes());
            Ok(Box::new(json_lines(path.display().to_string().into(), lines)))
        }
        Ok(_) => Err(Error::new(Kind::Data, "the file holds no records")
            .at(path.display().to_string())
            .rule("a list of objects, or one object per line")
            .hint("write the records as [{...}, {...}]")),
        Err(e) => Err(Error::new(Kind::Data, format!("not valid JSON: {}", json_reason(&e)))
            .at(format!("{}, line {}, column {}", path.display(), e.line(), e.column()))
            .hint("correct the file; one object per line in a .jsonl file confines a mistake to its line")),
    }
}

fn csv(file: Arc<str>, source: File, delimiter: u8, quoting: bool) -> Result<Records> {
    let mut reader = ::csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(quoting)
        .from_reader(source);
    let header = reader.headers().map_err(|e| {
        let message = format!("the header cannot be read: {e}");
        record_error(&Location::line(&file, 1), message)
    })?;
    let names: Vec<String> = header
        .iter()
        .map(|name| name.trim_start_matches('\u{feff}').to_string())
        .collect();
    let mut rows = reader.into_records();
    Ok(Box::new(std::iter::from_fn(move || {
        let row = rows.next()?;
        let position = match &row {
            Ok(row) => row.position(),
            Err(e) => e.position(),
        };
        let place = Location::line(&file, position.map_or(0, ::csv::Position::line));
        let row = row.map_err(|e| record_error(&place, csv_reason(&e)).hint(CORRECT_LINE));
        Some(row.map(|row| {
            let cells = row.iter().map(|cell| Value::String(cell.to_string()));
            let fields = names.iter().cloned().zip(cells).collect();
            Record { place, fields }
        }))
    })))
}

fn csv_reason(error: &::csv::Error) -> String {
    match error.kind() {
        ::csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!("{len} cells where the header has {expected_len}"),
        ::csv::ErrorKind::Utf8 { .. } => "not valid UTF-8".to_string(),
        _ => error.to_string(),
    }
}

/// Paragraphs (blank lines between them) or the entire file, as `{text}`.
fn txt(file: Arc<str>, path: &Path, unit: TxtUnit) -> Result<Records> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|b| **b == b'\n').count();
        record_error(&Location::line(&file, line as u64), "not valid UTF-8").hint(RECODE)
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let texts = match unit {
        TxtUnit::File => vec![(1, text.to_string())],
        TxtUnit::Paragraph => paragraphs(text),
    };
    Ok(Box::new(texts.into_iter().map(move |(number, text)| {
        let fields = Map::from_iter([("text".to_string(), Value::String(text))]);
        let place = Location::line(&file, number);
        Ok(Record { place, fields })
    })))
}

/// (first line, text) of each paragraph, its line ends as `\n`.
fn paragraphs(text: &str) -> Vec<(u64, String)> {
    let mut found: Vec<(u64, String)> = Vec::new();
    let mut open = false;
    for (i, line) in text.lines().enumerate() {
        let blank = line.trim().is_empty();
        match found.last_mut() {
            Some((_, paragraph)) if open && !blank => {
                paragraph.push('\n');
                paragraph.push_str(line);
            }
            _ if !blank => found.push((i as u64 + 1, line.to_string())),
            _ => {}
        }
        open = !blank;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

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
