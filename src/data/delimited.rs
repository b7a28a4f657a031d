//! Rows of `.csv` and `.tsv` files as records, read as pandas reads them.
//!
//! Takes an open file, returns its rows with the header's names. The delimiter is the one that the header holds; a `.tsv` file has
//! quoting where its quotes are well-formed throughout (pandas), and is without it elsewhere (IANA text/tab-separated-values). A
//! quote that is not closed, or closed within a cell, is refused with its line. Knows nothing of formats.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::read::{CORRECT_LINE, Content, Location, NeededColumns, RawRecord, RawRecords};
use super::source::{Source, not_utf8};
use crate::error::{Error, Kind, Result};

/// Delimiters in order of preference, after the extension's own.
const DELIMITERS: [u8; 4] = [b',', b'\t', b';', b'|'];

/// The rows of `source`; cells of columns that are not needed are null.
pub(super) fn records(source: Source, columns: &NeededColumns) -> Result<RawRecords> {
    let file = source.name.clone();
    let is_tsv = source.extension == "tsv";
    let delimiter = delimiter(&source.start, if is_tsv { b'\t' } else { b',' });
    let quoting = !is_tsv || is_well_quoted(Path::new(&*file), delimiter)?;
    let quotes = quoting.then(|| Rc::new(RefCell::new(Quotes::new(delimiter))));
    let checked = CheckedReader {
        source: source.into_reader(),
        quotes: quotes.clone(),
    };
    let reader = ::csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(quoting)
        .from_reader(checked);
    Rows::new(file, reader, quotes, columns).map(|rows| Box::new(rows) as RawRecords)
}

/// The first of `own` and the other delimiters that stands in the first line; `own` where none does.
fn delimiter(start: &[u8], own: u8) -> u8 {
    let header = start
        .split(|byte| matches!(byte, b'\n' | b'\r'))
        .next()
        .unwrap_or_default();
    let found = std::iter::once(own)
        .chain(DELIMITERS)
        .find(|delimiter| header.contains(delimiter));
    found.unwrap_or(own)
}

/// Whether every quote at a cell's start is closed at a cell's end, and none spans rows: a quoted cell with both a line end and a
/// tab is two unrelated quotes.
fn is_well_quoted(path: &Path, delimiter: u8) -> Result<bool> {
    let mut quotes = Quotes::new(delimiter);
    let mut source = Source::open(path)?.into_reader();
    loop {
        let buffer = source.fill_buf().map_err(|e| Error::io("read", path, e))?;
        let length = buffer.len();
        quotes.scan(buffer);
        if length == 0 {
            quotes.finish();
        }
        if quotes.spans_rows || !quotes.faults.is_empty() {
            return Ok(false);
        }
        if length == 0 {
            return Ok(true);
        }
        source.consume(length);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    CellStart,
    Unquoted,
    Quoted,
    /// After a quote within a quoted cell: its end, or the first of two.
    QuoteInQuoted,
}

/// The quoting of delimited text, by the rules of the `csv` crate and pandas.
struct Quotes {
    delimiter: u8,
    state: State,
    offset: u64,
    line: u64,
    after_return: bool,
    opened: u64,
    has_line_end: bool,
    has_delimiter: bool,
    /// A quoted cell holds a line end and a delimiter.
    spans_rows: bool,
    faults: VecDeque<QuoteFault>,
}

struct QuoteFault {
    /// Offset of the byte where it shows.
    offset: u64,
    /// Line of the opening quote.
    line: u64,
    is_closed: bool,
}

impl Quotes {
    fn new(delimiter: u8) -> Self {
        Self {
            delimiter,
            state: State::CellStart,
            offset: 0,
            line: 1,
            after_return: false,
            opened: 0,
            has_line_end: false,
            has_delimiter: false,
            spans_rows: false,
            faults: VecDeque::new(),
        }
    }

    fn scan(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let ends_line = matches!(byte, b'\n' | b'\r');
            let ends_cell = ends_line || *byte == self.delimiter;
            self.state = match (self.state, byte) {
                (State::CellStart, b'"') => {
                    self.opened = self.line;
                    self.has_line_end = false;
                    self.has_delimiter = false;
                    State::Quoted
                }
                (State::Quoted, b'"') => State::QuoteInQuoted,
                (State::QuoteInQuoted, b'"') => State::Quoted,
                (State::Quoted, _) => {
                    self.has_line_end |= ends_line;
                    self.has_delimiter |= *byte == self.delimiter;
                    self.spans_rows |= self.has_line_end && self.has_delimiter;
                    State::Quoted
                }
                _ if ends_cell => State::CellStart,
                (State::QuoteInQuoted, _) => {
                    self.fault(true);
                    State::Unquoted
                }
                _ => State::Unquoted,
            };
            self.line += u64::from(ends_line && !(self.after_return && *byte == b'\n'));
            self.after_return = *byte == b'\r';
            self.offset += 1;
        }
    }

    /// The end of the text.
    fn finish(&mut self) {
        if self.state == State::Quoted {
            self.fault(false);
            self.state = State::CellStart;
        }
    }

    fn fault(&mut self, is_closed: bool) {
        self.faults.push_back(QuoteFault {
            offset: self.offset,
            line: self.opened,
            is_closed,
        });
    }

    /// The first fault before the byte at `end`.
    fn take_before(&mut self, end: u64) -> Option<QuoteFault> {
        let mut first = None;
        while let Some(fault) = self
            .faults
            .pop_front_if(|fault| fault.offset < end || !fault.is_closed)
        {
            first.get_or_insert(fault);
        }
        first
    }
}

/// Passes bytes through and notes their quoting, if there is any.
struct CheckedReader<R> {
    source: R,
    quotes: Option<Rc<RefCell<Quotes>>>,
}

impl<R: Read> Read for CheckedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        if let Some(quotes) = &self.quotes {
            let mut quotes = quotes.borrow_mut();
            quotes.scan(&buffer[..count]);
            if count == 0 {
                quotes.finish();
            }
        }
        Ok(count)
    }
}

/// The rows after the header.
struct Rows<R> {
    file: Arc<str>,
    reader: ::csv::Reader<R>,
    quotes: Option<Rc<RefCell<Quotes>>>,
    /// Name of each column; whether it is needed.
    header: Vec<Column>,
    row: ::csv::ByteRecord,
    ended: bool,
}

struct Column {
    name: String,
    is_needed: bool,
}

impl<R: Read> Rows<R> {
    fn new(
        file: Arc<str>,
        mut reader: ::csv::Reader<R>,
        quotes: Option<Rc<RefCell<Quotes>>>,
        columns: &NeededColumns,
    ) -> Result<Self> {
        let place = Location::new(&file, "line", 1);
        let header = reader.byte_headers().map_err(|e| {
            Error::new(Kind::Data, format!("the header cannot be read: {e}")).at(place.to_string())
        })?;
        let names: Vec<&[u8]> = header.iter().collect();
        let names = column_names(&place, &names)?;
        let header = names.into_iter().map(|name| Column {
            is_needed: columns.contains(&name),
            name,
        });
        let mut rows = Self {
            header: header.collect(),
            file,
            reader,
            quotes,
            row: ::csv::ByteRecord::new(),
            ended: false,
        };
        match rows.quote_fault() {
            Some(error) => Err(error),
            None => Ok(rows),
        }
    }

    /// The error of a quote in the row that was just read.
    fn quote_fault(&mut self) -> Option<Error> {
        let quotes = self.quotes.as_ref()?;
        let fault = quotes
            .borrow_mut()
            .take_before(self.reader.position().byte())?;
        let place = Location::new(&self.file, "line", fault.line).to_string();
        if fault.is_closed {
            return Some(
                Error::new(Kind::Data, "text after a cell's closing quote")
                    .at(place)
                    .rule("a quote within a quoted cell is doubled: \"he said \"\"hi\"\"\"")
                    .hint("double or remove the quotes of this row, or set `on_bad_record = \"skip\"`"),
            );
        }
        self.ended = true;
        Some(
            Error::new(
                Kind::Io,
                "a quote opens here and is not closed: the rest of the file is one cell",
            )
            .at(place)
            .rule("a cell that begins with a quote ends with one, and quotes within it are doubled")
            .hint("close, double or remove the quote"),
        )
    }

    fn record(&mut self, place: Location) -> Result<RawRecord> {
        let mut fields = Map::new();
        for (column, cell) in self.header.iter().zip(&self.row) {
            let value = if column.is_needed {
                let cell =
                    std::str::from_utf8(cell).map_err(|_| not_utf8(&self.file, &place, cell))?;
                Value::String(cell.to_string())
            } else {
                Value::Null
            };
            fields.insert(column.name.clone(), value);
        }
        Ok(RawRecord {
            place,
            content: Content::Fields(fields),
        })
    }
}

impl<R: Read> Iterator for Rows<R> {
    type Item = Result<RawRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let mut row = std::mem::take(&mut self.row);
        let read = self.reader.read_byte_record(&mut row);
        self.row = row;
        let position = match &read {
            Ok(_) => self.row.position(),
            Err(e) => e.position(),
        };
        let place = Location::new(
            &self.file,
            "line",
            position.map_or(0, ::csv::Position::line),
        );
        if let Some(error) = self.quote_fault() {
            return Some(Err(error));
        }
        match read {
            Ok(false) => None,
            Ok(true) => Some(self.record(place)),
            Err(e) => Some(Err(self.row_error(&place, &e))),
        }
    }
}

impl<R> Rows<R> {
    fn row_error(&mut self, place: &Location, error: &::csv::Error) -> Error {
        let what = match error.kind() {
            ::csv::ErrorKind::UnequalLengths {
                expected_len, len, ..
            } => format!("{len} cells where the header has {expected_len}"),
            _ => {
                self.ended = true;
                error.to_string()
            }
        };
        Error::new(if self.ended { Kind::Io } else { Kind::Data }, what)
            .at(place.to_string())
            .hint(CORRECT_LINE)
    }
}

/// The header's names as pandas writes them: `name`, `name.1`, ... where one stands several times, `Unnamed: 0` for none.
fn column_names(place: &Location, header: &[&[u8]]) -> Result<Vec<String>> {
    let mut seen = HashSet::new();
    let mut repeated: HashMap<String, usize> = HashMap::new();
    let mut names = Vec::with_capacity(header.len());
    for (i, cell) in header.iter().enumerate() {
        let cell = std::str::from_utf8(cell).map_err(|_| not_utf8(&place.file, place, cell))?;
        let mut name = if cell.is_empty() {
            format!("Unnamed: {i}")
        } else {
            cell.to_string()
        };
        while !seen.insert(name.clone()) {
            let count = repeated.entry(cell.to_string()).or_default();
            *count += 1;
            name = format!("{cell}.{count}");
        }
        names.push(name);
    }
    Ok(names)
}
