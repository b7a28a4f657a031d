//! A data file as it is opened: a regular file whose first bytes fit its extension.
//!
//! Takes a path, returns a `Source` that counts the bytes read. Refuses pipes and devices, compressed files, git LFS pointers, HTML
//! pages and encodings other than UTF-8, each with the command that converts the file. Knows nothing of records.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use chardetng::{EncodingDetector, Iso2022JpDetection, Utf8Detection};

use super::options::EXTENSIONS;
use crate::error::{Error, Kind, Result};

/// Bytes at the start of a file by which its content is recognised.
const START: u64 = 8192;
/// Capacity of the read buffer.
const BUFFER: usize = 1 << 18;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// First bytes, what a file that begins so is, and how to convert it; `{in}` and `{out}` stand for file names.
const SIGNATURES: [(&[u8], &str, &str); 15] = [
    (
        b"version https://git-lfs.github.com/spec/",
        "a git LFS pointer, not the data it stands for",
        "fetch the data with `git lfs pull`",
    ),
    (
        b"\x1f\x8b",
        "gzip data",
        "unpack it, as with `gunzip -c {in} > {out}`",
    ),
    (
        b"PK\x03\x04",
        "a zip archive or an Excel workbook",
        "unpack it with `unzip {in}`, or save the workbook as CSV",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "zstd data",
        "unpack it, as with `zstd -dc {in} > {out}`",
    ),
    (
        b"BZh",
        "bzip2 data",
        "unpack it, as with `bunzip2 -c {in} > {out}`",
    ),
    (
        b"\xfd7zXZ\0",
        "xz data",
        "unpack it, as with `xz -dc {in} > {out}`",
    ),
    (
        b"\x04\x22\x4d\x18",
        "lz4 data",
        "unpack it, as with `lz4 -dc {in} > {out}`",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7z archive",
        "unpack it with `7z x {in}`",
    ),
    (
        b"ARROW1",
        "an Arrow file",
        "write it as Parquet, as with pandas' `to_parquet`",
    ),
    (
        b"SQLite format 3\0",
        "a SQLite database",
        "export the table as CSV, as with `sqlite3 -header -csv`",
    ),
    (
        b"\xff\xfe\0\0",
        "UTF-32 text",
        "convert it with `iconv -f utf-32 -t utf-8 {in} > {out}`",
    ),
    (
        b"\0\0\xfe\xff",
        "UTF-32 text",
        "convert it with `iconv -f utf-32 -t utf-8 {in} > {out}`",
    ),
    (
        b"\xff\xfe",
        "UTF-16 text",
        "convert it with `iconv -f utf-16 -t utf-8 {in} > {out}`",
    ),
    (
        b"\xfe\xff",
        "UTF-16 text",
        "convert it with `iconv -f utf-16 -t utf-8 {in} > {out}`",
    ),
    (b"PAR1", "a Parquet file", "rename it to end in .parquet"),
];

/// An open data file.
pub(super) struct Source {
    /// The path, as given.
    pub name: Arc<str>,
    /// In lower case.
    pub extension: String,
    /// The first `START` bytes, without a byte order mark.
    pub start: Vec<u8>,
    /// Bytes read so far; shared with the reader.
    pub consumed: Rc<Cell<u64>>,
    /// The size when it was opened, in bytes.
    pub size: u64,
    pub file: File,
}

impl Source {
    /// Opens `path` and looks at its first bytes.
    ///
    /// # Errors
    /// `Kind::Io` where it cannot be read or is no regular file, `Kind::Data` for an unknown extension or content that does not fit it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        let extension = extension(path);
        let unreadable = |e| Error::io("read", path, e);
        let size = file.metadata().map_err(unreadable)?.len();
        let mut start = Vec::new();
        (&file)
            .take(START)
            .read_to_end(&mut start)
            .map_err(unreadable)?;
        check_content(path, &extension, &start)?;
        if !EXTENSIONS.contains(&extension.as_str()) {
            return Err(Error::new(Kind::Data, "a file of an unknown kind")
                .at(path.display().to_string())
                .rule(format!(
                    "the file's name ends with .{}",
                    EXTENSIONS.join(" .")
                ))
                .hint("rename or convert the file; a compressed file must be unpacked first"));
        }
        let mark = start
            .starts_with(BYTE_ORDER_MARK)
            .then_some(BYTE_ORDER_MARK.len());
        start.drain(..mark.unwrap_or(0));
        let mut source = Self {
            name: path.display().to_string().into(),
            extension,
            start,
            consumed: Rc::default(),
            size,
            file,
        };
        source
            .file
            .seek(io::SeekFrom::Start(mark.unwrap_or(0) as u64))
            .map_err(unreadable)?;
        Ok(source)
    }

    /// The content after a byte order mark.
    pub fn into_reader(self) -> BufReader<CountingReader> {
        let reader = CountingReader {
            file: self.file,
            consumed: self.consumed,
        };
        BufReader::with_capacity(BUFFER, reader)
    }
}

/// Counts the bytes that are read from a file.
pub(super) struct CountingReader {
    file: File,
    consumed: Rc<Cell<u64>>,
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.consumed.set(self.consumed.get() + count as u64);
        Ok(count)
    }
}

/// The extension in lower case.
pub(super) fn extension(path: &Path) -> String {
    path.extension()
        .map(|e| e.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

/// Opens a regular file: a pipe or a device may never end, and cannot be read twice.
///
/// # Errors
/// `Kind::Io`.
pub(super) fn open_regular(path: &Path) -> Result<File> {
    let unreadable = |e: io::Error| match (e.kind(), path.parent()) {
        (io::ErrorKind::NotFound, Some(folder)) if folder.is_absolute() => {
            Error::io("read", path, e)
                .hint(format!("`ls {}` shows the files there", folder.display()))
        }
        _ => Error::io("read", path, e),
    };
    let found = std::fs::metadata(path).map_err(unreadable)?;
    if !found.is_file() {
        return Err(Error::new(
            Kind::Io,
            format!("`{}` is {}", path.display(), file_type(&found)),
        )
        .rule("a regular file: it is read twice, once to hash it")
        .hint("write the data to a file first"));
    }
    File::open(path).map_err(unreadable)
}

#[cfg(unix)]
fn file_type(found: &std::fs::Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = found.file_type();
    if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

#[cfg(not(unix))]
fn file_type(found: &std::fs::Metadata) -> &'static str {
    if found.is_dir() {
        "a folder"
    } else {
        "a device"
    }
}

/// Refuses content that `extension` does not announce.
fn check_content(path: &Path, extension: &str, start: &[u8]) -> Result<()> {
    let signature = SIGNATURES
        .iter()
        .find(|(bytes, ..)| start.starts_with(bytes));
    let (what, remedy) = match signature {
        Some((b"PAR1", ..)) if extension == "parquet" => return Ok(()),
        Some((_, what, remedy)) => (*what, *remedy),
        None if extension == "parquet" => return Ok(()),
        None if extension != "txt" && is_html(start) => (
            "an HTML page, as a server sends in place of a file",
            "download the file again, and look at the page: it names the reason",
        ),
        None => match utf16_without_mark(start) {
            Some("le") => (
                "UTF-16 text",
                "convert it with `iconv -f utf-16le -t utf-8 {in} > {out}`",
            ),
            Some(_) => (
                "UTF-16 text",
                "convert it with `iconv -f utf-16be -t utf-8 {in} > {out}`",
            ),
            None if matches!(extension, "csv" | "tsv") && is_json(start) => {
                ("JSON", "rename it to end in .jsonl")
            }
            None => return Ok(()),
        },
    };
    Err(Error::new(Kind::Data, format!("the file is {what}"))
        .at(path.display().to_string())
        .rule(format!("a .{} file; text in UTF-8", EXTENSIONS.join(" .")))
        .hint(remedy_for(remedy, path)))
}

/// `remedy` with the names of the file and of its conversion: `a.converted.csv` for `a.csv`, `a.csv` for `a.csv.gz`.
fn remedy_for(remedy: &str, path: &Path) -> String {
    let extension = extension(path);
    let converted = if EXTENSIONS.contains(&extension.as_str()) {
        path.with_extension(format!("converted.{extension}"))
    } else {
        path.with_extension("")
    };
    remedy
        .replace("{in}", &path.display().to_string())
        .replace("{out}", &converted.display().to_string())
}

fn is_html(start: &[u8]) -> bool {
    let text = start.trim_ascii_start();
    let begins = |tag: &str| {
        text.get(..tag.len())
            .is_some_and(|t| t.eq_ignore_ascii_case(tag.as_bytes()))
    };
    begins("<!doctype html") || begins("<html") || begins("<head") || begins("<body")
}

fn is_json(start: &[u8]) -> bool {
    let text = start.trim_ascii_start();
    text.starts_with(b"{\"") || text.starts_with(b"[{")
}

/// The byte order of UTF-16 text without a byte order mark: every other byte of its ASCII characters is zero.
fn utf16_without_mark(start: &[u8]) -> Option<&'static str> {
    let zeros = |odd: usize| {
        start
            .iter()
            .skip(odd)
            .step_by(2)
            .filter(|b| **b == 0)
            .count()
    };
    let most = start.len() / 2;
    match (zeros(0), zeros(1)) {
        (0, odd) if odd > 0 && odd >= most / 4 => Some("le"),
        (even, 0) if even > 0 && even >= most / 4 => Some("be"),
        _ => None,
    }
}

/// The error of `bytes` at `place` that are not UTF-8, with the encoding that they fit.
pub(super) fn not_utf8(file: &str, place: impl ToString, bytes: &[u8]) -> Error {
    let valid = std::str::from_utf8(bytes).map_or_else(|e| e.valid_up_to(), str::len);
    let mut detector = EncodingDetector::new(Iso2022JpDetection::Allow);
    detector.feed(bytes, true);
    // The names of the WHATWG, of which iconv knows these.
    let name = detector
        .guess(None, Utf8Detection::Deny)
        .name()
        .to_lowercase();
    let encoding = name.replace("windows-", "cp");
    let remedy = format!(
        "if the file is in {encoding}, convert it with `iconv -f {encoding} -t utf-8 {{in}} > {{out}}`"
    );
    Error::new(
        Kind::Data,
        format!("not valid UTF-8, from byte {} of it on", valid + 1),
    )
    .at(place.to_string())
    .rule(format!("UTF-8; the bytes fit {encoding}"))
    .hint(remedy_for(&remedy, Path::new(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, content: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let error = Source::open(&path).err().unwrap().to_string();
        error.replace(&folder.path().display().to_string(), "DIR")
    }

    #[test]
    fn other_content_is_refused_with_the_command_that_converts_it() {
        // First bytes from the formats' specifications (RFC 1952, RFC 8878, APPNOTE.TXT, Parquet's README).
        for (name, content, remedy) in [
            (
                "a.jsonl.gz",
                &b"\x1f\x8b\x08"[..],
                "gunzip -c DIR/a.jsonl.gz > DIR/a.jsonl`",
            ),
            (
                "a.csv",
                b"\x1f\x8b\x08",
                "gunzip -c DIR/a.csv > DIR/a.converted.csv`",
            ),
            ("a.csv", b"\x28\xb5\x2f\xfd", "zstd -dc DIR/a.csv"),
            ("a.xlsx", b"PK\x03\x04", "save the workbook as CSV"),
            ("a.csv", b"PAR1", "rename it to end in .parquet"),
            ("a.csv", b" {\"text\": 1}", "rename it to end in .jsonl"),
            (
                "a.txt",
                b"version https://git-lfs.github.com/spec/v1\n",
                "git lfs pull",
            ),
            ("a.doc", b"text", "rename or convert"),
        ] {
            let error = refused(name, content);
            assert!(error.contains(remedy), "{name}: {error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_device_or_a_socket_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s.jsonl");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, name) in [
            (Path::new("/dev/zero"), "a device"),
            (&socket, "a socket"),
            (folder.path(), "a folder"),
        ] {
            let error = open_regular(path).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
