//! Files -> an encoded data set.
//!
//! Takes local files, `Options` and a `Tokenizer`, returns a `Dataset` that does not depend on the number of threads, from the
//! cache if the same contents were encoded before. Knows nothing of recipes.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Seek;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::batch::Example;
use super::cache;
use super::dataset::{Counts, Dataset, RenderedSample, TextSpan, with_token_counts};
use super::encode::{EncodedRecord, encode};
use super::format::{
    Columns, FieldsSeen, has_label_list, interpret, label_texts, needed_columns, number,
};
use super::options::{Format, LabelKind, OnBadRecord, Options, PromptTemplate, TxtUnit};
use super::paths;
use super::read::{Location, NeededColumns, RawRecord, RawRecords, Record, open, read};
use super::source::{Source, extension, open_regular};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::files::sha256_of;
use crate::hub::Progress;
use crate::text::hex;

/// Records, and bytes of their text, encoded in parallel before they are collected in order.
const CHUNK: usize = 4096;
const CHUNK_BYTES: usize = 16 << 20;
/// Progress is shown for files of at least so many bytes.
const LARGE: u64 = 16 << 20;
/// Increment when reading or encoding changes: caches of other versions are ignored.
const ENCODING_VERSION: u32 = 5;

/// Loads `data` (files, folders or patterns) in order as one data set; `cache` is a folder for encoded data sets.
///
/// # Errors
/// `Kind::Io` and `Kind::Data` for files and records that cannot be read (with `OnBadRecord::Skip`, records only where all are bad)
/// and files that change meanwhile; `Kind::Tokenizer` where the format needs a chat template that the model lacks.
pub fn load(
    data: &[PathBuf],
    options: &Options,
    tokenizer: &Tokenizer,
    cache: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Dataset> {
    check(options)?;
    let paths = paths::files(data)?;
    let digests = paths
        .iter()
        .map(|path| digest(path))
        .collect::<Result<Vec<_>>>()?;
    let fingerprint = fingerprint(&paths, &digests, options, tokenizer);
    if let Some(mut dataset) = cache.and_then(|folder| cache::load(folder, &fingerprint)) {
        if let Some(first) = &mut dataset.first {
            first.place = place_from_cache(&first.place, &paths);
        }
        return Ok(dataset);
    }
    let loading = Loading {
        paths: &paths,
        digests: &digests,
        needed: needed_columns(Columns(&options.columns)),
        options,
        tokenizer,
        progress,
    };
    let dataset = loading.dataset()?.finish(fingerprint, &paths)?;
    if let Some(folder) = cache {
        let mut cached = dataset.clone();
        if let Some(first) = &mut cached.first {
            first.place = place_for_cache(&first.place, &paths);
        }
        // Without a cache the next run encodes again: not an error.
        let _ = cache::save(folder, &cached);
    }
    Ok(dataset)
}

/// Opens a data file and looks at its first bytes.
///
/// # Errors
/// As [`load`] for a file that cannot be opened or is not what its extension says.
pub fn check_file(path: &Path) -> Result<()> {
    Source::open(path).map(drop)
}

/// The labels of records.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundLabels {
    /// What the labels are: lists if one is a list; numbers if all are and one is no whole number.
    pub kind: LabelKind,
    /// The distinct ones in order: by value if all are whole numbers, else by name.
    pub names: Vec<String>,
}

/// The labels of the records that have one.
///
/// # Errors
/// Files that cannot be found or opened.
pub fn labels(
    data: &[PathBuf],
    columns: &[(String, String)],
    of_words: bool,
) -> Result<FoundLabels> {
    let mut labels = BTreeSet::new();
    let mut lists = false;
    for path in paths::files(data)? {
        // `load` names what is wrong with a record.
        for record in read(&path, TxtUnit::Paragraph)?.flatten() {
            let columns = Columns(columns);
            lists |= has_label_list(&record, columns);
            labels.extend(
                label_texts(&record, columns, of_words)
                    .into_iter()
                    .flatten(),
            );
        }
    }
    let whole = |label: &String| label.parse::<i64>().ok();
    let mut names: Vec<String> = labels.into_iter().collect();
    let all_whole = names.iter().all(|label| whole(label).is_some());
    if all_whole {
        names.sort_by_key(whole);
    }
    let kind = if of_words {
        LabelKind::ClassesOfWords
    } else if lists {
        LabelKind::Labels
    } else if !all_whole && names.iter().all(|label| number(label).is_some()) {
        LabelKind::Number
    } else {
        LabelKind::Class
    };
    Ok(FoundLabels { kind, names })
}

/// A record's place with the file's index instead of its path: equal contents at another path share a cache entry.
fn place_for_cache(place: &str, paths: &[PathBuf]) -> String {
    let of_file = |(index, path): (usize, &PathBuf)| {
        let rest = place.strip_prefix(&path.display().to_string())?;
        Some(format!("{index}{rest}"))
    };
    let shortened = paths.iter().enumerate().find_map(of_file);
    shortened.unwrap_or_else(|| place.to_string())
}

fn place_from_cache(place: &str, paths: &[PathBuf]) -> String {
    let digits = place.len() - place.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (index, rest) = place.split_at(digits);
    match index.parse().ok().and_then(|index: usize| paths.get(index)) {
        Some(path) => format!("{}{rest}", path.display()),
        None => place.to_string(),
    }
}

fn check(options: &Options) -> Result<()> {
    if options.max_length < 2 {
        return Err(
            Error::new(Kind::Data, "`max_length` leaves nothing to predict")
                .value(options.max_length.to_string())
                .rule("at least 2")
                .hint("set data.max_length = 512"),
        );
    }
    Columns(&options.columns).check()
}

fn digest(path: &Path) -> Result<String> {
    sha256_of(open_regular(path)?).map_err(|e| Error::io("read", path, e))
}

/// SHA-256 of everything that the encoded data set depends on; of file names only the extension.
fn fingerprint(
    paths: &[PathBuf],
    digests: &[String],
    options: &Options,
    tokenizer: &Tokenizer,
) -> String {
    let mut hash = Sha256::new();
    let Options {
        format,
        columns,
        max_length,
        on_bad_record,
        txt_unit,
        prompt_template,
        labels,
        label_kind,
    } = options;
    let words = format!(
        "{ENCODING_VERSION} {format:?} {columns:?} {max_length} {on_bad_record:?} {txt_unit:?} {prompt_template:?} {labels:?} {label_kind:?} {}",
        tokenizer.fingerprint()
    );
    hash.update(words);
    for (path, digest) in paths.iter().zip(digests) {
        hash.update(format!(" {} {digest}", extension(path)));
    }
    hex(hash.finalize())
}

/// The files of a data set being read.
struct Loading<'a> {
    paths: &'a [PathBuf],
    /// SHA-256 of each file's content, part of the fingerprint.
    digests: &'a [String],
    needed: NeededColumns,
    options: &'a Options,
    tokenizer: &'a Tokenizer,
    progress: &'a dyn Progress,
}

/// How far one pass over the files came.
struct Pass {
    builder: DatasetBuilder,
    /// Records were read, encoded or not.
    begun: bool,
    format: Option<Format>,
}

impl Loading<'_> {
    /// Encodes all records; `Format::Auto` is decided by all of them, and a field that appears late restarts the pass.
    fn dataset(&self) -> Result<DatasetBuilder> {
        let mut seen = FieldsSeen::default();
        loop {
            let mut pass = Pass {
                builder: DatasetBuilder::default(),
                begun: false,
                format: self.format(&seen),
            };
            let mut is_whole = true;
            for (path, digest) in self.paths.iter().zip(self.digests) {
                is_whole = self.read_file(path, digest, &mut seen, &mut pass)?;
                if !is_whole {
                    break;
                }
            }
            if is_whole {
                let without_format = match pass.format {
                    None => seen.no_format(self.columns()),
                    Some(_) => None,
                };
                return without_format.map_or(Ok(pass.builder), Err);
            }
        }
    }

    fn columns(&self) -> Columns<'_> {
        Columns(&self.options.columns)
    }

    fn format(&self, seen: &FieldsSeen) -> Option<Format> {
        match self.options.format {
            Format::Auto => seen.format(self.columns()),
            format => Some(format),
        }
    }

    /// Reads one file into `pass`; `false` where the format turns out to be another one.
    fn read_file(
        &self,
        path: &Path,
        digest: &str,
        seen: &mut FieldsSeen,
        pass: &mut Pass,
    ) -> Result<bool> {
        let unreadable = |e| Error::io("read", path, e);
        let source = Source::open(path)?;
        let mut content = source.file.try_clone().map_err(unreadable)?;
        let is_large = source.size >= LARGE;
        if is_large {
            self.progress
                .start(&format!("reading {}", path.display()), Some(source.size));
        }
        let mut file = open(source, self.options.txt_unit, &self.needed)?;
        let mut shown = 0;
        loop {
            let chunk = next_chunk(&mut file.records);
            if is_large {
                self.progress.advance(file.consumed.get() - shown);
                shown = file.consumed.get();
            }
            if chunk.is_empty() {
                break;
            }
            if !self.add(chunk, seen, pass)? {
                return Ok(false);
            }
        }
        if is_large {
            self.progress.finish();
        }
        check_unchanged(path, &mut content, digest)?;
        Ok(true)
    }

    /// Parses and encodes a chunk; `false` where its fields change the format after other records were read.
    fn add(
        &self,
        chunk: Vec<Result<RawRecord>>,
        seen: &mut FieldsSeen,
        pass: &mut Pass,
    ) -> Result<bool> {
        let needed = &self.needed;
        let parse = |raw: Result<RawRecord>| match raw {
            Ok(raw) => raw.parse(needed),
            Err(error) => vec![Err(error)],
        };
        let records: Vec<Result<Record>> = chunk.into_par_iter().flat_map_iter(parse).collect();
        for record in records.iter().flatten() {
            seen.add(record, self.columns());
        }
        let format = self.format(seen);
        if format != pass.format && pass.begun {
            return Ok(false);
        }
        pass.begun = true;
        pass.format = format;
        match format {
            Some(format) => pass
                .builder
                .add(records, format, self.options, self.tokenizer)?,
            None => {
                for error in records.into_iter().filter_map(Result::err) {
                    pass.builder.counts.records += 1;
                    pass.builder.skip(error, self.options)?;
                }
            }
        }
        Ok(true)
    }
}

/// The next records, at most `CHUNK` of them and little more than `CHUNK_BYTES`.
fn next_chunk(records: &mut RawRecords) -> Vec<Result<RawRecord>> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    while chunk.len() < CHUNK && bytes < CHUNK_BYTES {
        let Some(record) = records.next() else { break };
        bytes += record.as_ref().map_or(0, RawRecord::size);
        chunk.push(record);
    }
    chunk
}

/// The file that was read must be the one that was hashed before: the fingerprint stands for what was encoded.
fn check_unchanged(path: &Path, content: &mut File, digest: &str) -> Result<()> {
    let rewound = content.rewind().and_then(|()| sha256_of(content));
    if rewound.map_err(|e| Error::io("read", path, e))? == digest {
        return Ok(());
    }
    Err(Error::new(
        Kind::Io,
        format!("`{}` changed while it was read", path.display()),
    )
    .rule("a data file stays as it is until it has been read")
    .hint("run the command again once nothing writes to the file"))
}

/// Collects encoded records into a data set.
#[derive(Default)]
struct DatasetBuilder {
    examples: Vec<Example>,
    records: Vec<u64>,
    counts: Counts,
    eos_trained: bool,
    first: Option<RenderedSample>,
    first_bad: Option<Error>,
}

impl DatasetBuilder {
    fn add(
        &mut self,
        records: Vec<Result<Record>>,
        format: Format,
        options: &Options,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let template = options.prompt_template.as_ref();
        let unprompted = matches!(
            format,
            Format::Text | Format::Messages | Format::Classification
        );
        if template.is_some() && unprompted {
            return Err(Error::new(
                Kind::Data,
                "the records have no prompt for the prompt template",
            )
            .at("data.prompt_template")
            .rule("prompt and completion, or instruction and output")
            .hint(
                "remove `data.prompt_template`, or say which columns to read in `data.columns`",
            ));
        }
        if format == Format::Messages || template == Some(&PromptTemplate::Chat) {
            // Without a template every record would fail: an error of the model, not of a record.
            tokenizer.template()?;
        }
        let encode_record = |record: Result<Record>| {
            let record = record?;
            let typed = interpret(&record, format, options)?;
            let encoded = encode(&typed, tokenizer, options.max_length)
                .map_err(|e| e.at(record.place.to_string()))?;
            Ok((record.place, encoded))
        };
        let encoded: Vec<Result<_>> = records.into_par_iter().map(encode_record).collect();
        for record in encoded {
            self.counts.records += 1;
            match record {
                Ok((place, encoded)) => self.add_encoded(&place, encoded, tokenizer)?,
                Err(error) => self.skip(error, options)?,
            }
        }
        Ok(())
    }

    /// Counts a bad record, or returns its error.
    fn skip(&mut self, error: Error, options: &Options) -> Result<()> {
        if options.on_bad_record == OnBadRecord::Stop || error.kind() != Kind::Data {
            return Err(error);
        }
        self.counts.skipped += 1;
        self.first_bad.get_or_insert(error);
        Ok(())
    }

    fn add_encoded(
        &mut self,
        place: &Location,
        encoded: EncodedRecord,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let counts = &mut self.counts;
        counts.truncated += u64::from(encoded.truncated);
        counts.dropped += u64::from(encoded.dropped);
        counts.glued += u64::from(encoded.glued);
        counts.conversations += u64::from(encoded.is_chat);
        counts.empty_answers += u64::from(encoded.empty_answer);
        counts.without_reasoning += u64::from(encoded.without_reasoning);
        if encoded.examples.len() > 1 {
            counts.windows += encoded.examples.len() as u64;
        }
        self.eos_trained |= encoded.ends;
        if let (None, Some(example)) = (&self.first, encoded.examples.first()) {
            self.first = Some(RenderedSample {
                place: place.to_string(),
                pieces: text_spans(example, tokenizer)?,
            });
        }
        let record = self.counts.records - 1;
        self.records.extend(encoded.examples.iter().map(|_| record));
        self.examples.extend(encoded.examples);
        Ok(())
    }

    fn finish(self, fingerprint: String, paths: &[PathBuf]) -> Result<Dataset> {
        let counts = self.counts;
        if let (true, Some(error)) = (counts.skipped == counts.records, self.first_bad) {
            return Err(error.rule("at least one record can be read; all of them are bad"));
        }
        if self.examples.is_empty() {
            return Err(nothing_to_learn(&counts, paths));
        }
        Ok(Dataset {
            counts: with_token_counts(counts, &self.examples),
            examples: self.examples.into(),
            records: self.records.into(),
            eos_trained: self.eos_trained,
            fingerprint,
            first: self.first,
        })
    }
}

fn nothing_to_learn(counts: &Counts, paths: &[PathBuf]) -> Error {
    let paths: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    let Counts {
        records,
        skipped,
        dropped,
        ..
    } = counts;
    Error::new(Kind::Data, "the data hold nothing to learn")
        .at(paths.join(", "))
        .value(format!("{records} records, {skipped} skipped, {dropped} dropped for want of a loss token"))
        .hint(match records {
            0 => "the file holds no record: check that it is the right one",
            _ => "raise `data.max_length` if prompts fill it, and check `data.format` and `data.columns`",
        })
}

/// The example's text, split where its loss mask changes.
///
/// # Errors
/// Tokens that the tokenizer does not decode.
pub fn text_spans(example: &Example, tokenizer: &Tokenizer) -> Result<Vec<TextSpan>> {
    let mut spans = Vec::new();
    let mut start = 0;
    for run in example.loss.chunk_by(|a, b| a == b) {
        let tokens = &example.tokens[start..start + run.len()];
        spans.push(TextSpan {
            text: tokenizer.decode(tokens)?,
            loss: run[0],
        });
        start += run.len();
    }
    Ok(spans)
}

#[cfg(test)]
mod tests {
    use super::super::options::TxtUnit;
    use super::*;
    use crate::data::tokenizer::tests::word_tokenizer;
    use crate::hub::Silent;

    fn options() -> Options {
        Options {
            format: Format::Auto,
            columns: vec![],
            max_length: 4,
            on_bad_record: OnBadRecord::Stop,
            txt_unit: TxtUnit::Paragraph,
            prompt_template: None,
            labels: vec![],
            label_kind: LabelKind::Class,
        }
    }

    fn tokenizer() -> Tokenizer {
        word_tokenizer(&["<unk>", "<eos>", "a", " b", " c"], "<eos>", None)
    }

    const LINES: &str = "{\"prompt\": \"a\", \"completion\": \" b\"}\n{\"prompt\": 1}\n{\"prompt\": \"a b c a\", \"completion\": \" b\"}\n\
        {\"prompt\": \"a\", \"completion\": \" b b b b\"}\n";

    fn load_lines(text: &str, options: &Options, cache: Option<&Path>) -> Result<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, text).unwrap();
        load(&[path], options, &tokenizer(), cache, &Silent)
    }

    fn skip() -> Options {
        Options {
            on_bad_record: OnBadRecord::Skip,
            ..options()
        }
    }

    #[test]
    fn records_and_tokens_are_counted() {
        let error = load_lines(LINES, &options(), None).unwrap_err();
        assert!(error.to_string().contains("d.jsonl, line 2"), "{error}");
        let dataset = load_lines(LINES, &skip(), None).unwrap();
        let counts = Counts {
            records: 4,
            examples: 2,
            tokens: 7,
            loss_tokens: 5,
            truncated: 2,
            dropped: 1,
            skipped: 1,
            ..Counts::default()
        };
        assert_eq!(dataset.counts, counts);
        assert!(dataset.eos_trained);
        let first = dataset.first.unwrap();
        assert!(first.place.ends_with("d.jsonl, line 1"));
        let span = |text: &str, loss| TextSpan {
            text: text.into(),
            loss,
        };
        assert_eq!(first.pieces, [span("a", false), span(" b<eos>", true)]);
    }

    #[test]
    fn the_cache_is_used_until_something_changes() {
        let folder = tempfile::tempdir().unwrap();
        let cached = || load_lines(LINES, &skip(), Some(folder.path())).unwrap();
        let fresh = cached();
        let file = folder.path().join(format!("{}.tokens", fresh.fingerprint));
        assert!(file.exists());
        assert_eq!(cached().examples, fresh.examples);
        std::fs::write(&file, "damaged").unwrap();
        assert_eq!(cached().examples, fresh.examples);
        let options = Options {
            max_length: 9,
            ..skip()
        };
        let longer = load_lines(LINES, &options, None).unwrap();
        let other = load_lines(&LINES.replace(" b b b b", " c"), &skip(), None).unwrap();
        assert!(longer.fingerprint != fresh.fingerprint && other.fingerprint != fresh.fingerprint);
    }

    #[test]
    fn an_empty_data_set_is_an_error_with_its_reason() {
        let text = Options {
            format: Format::Text,
            ..skip()
        };
        // A missing mapped column is an error, even if other fields would fit a format.
        let mapped = Options {
            columns: vec![("text".into(), "body".into())],
            ..options()
        };
        for (lines, options, reason) in [
            ("{}\n{}\n", &text, "all of them are bad"),
            ("{\"text\": \"\"}", &text, "1 dropped"),
            ("", &options(), "0 records"),
            (LINES, &mapped, "no record has `body`"),
        ] {
            let error = load_lines(lines, options, None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let templated = Options {
            prompt_template: Some("{prompt} ".parse().unwrap()),
            ..options()
        };
        let error = load_lines("{\"text\": \"a\"}", &templated, None).unwrap_err();
        assert!(error.to_string().contains("no prompt"), "{error}");
        let error = load_lines("{\"messages\": []}", &options(), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Tokenizer);
        let short = Options {
            max_length: 1,
            ..options()
        };
        assert!(load_lines("{}", &short, None).is_err());
    }

    #[test]
    fn fields_that_appear_late_decide_the_format() {
        let late = "{\"text\": \"a\"}\n".repeat(CHUNK + 1)
            + "{\"prompt\": \"a\", \"completion\": \" b\"}\n";
        let dataset = load_lines(&late, &skip(), None).unwrap();
        let counts = (
            dataset.counts.records,
            dataset.counts.skipped,
            dataset.counts.examples,
        );
        assert_eq!(counts, (CHUNK as u64 + 2, CHUNK as u64 + 1, 1));
        let error = load_lines(&late, &options(), None).unwrap_err().to_string();
        assert!(
            error.contains("no `prompt`") && error.contains("line 1"),
            "{error}"
        );
        let nulls = "{\"prompt\": null}\n".repeat(CHUNK + 1)
            + "{\"prompt\": \"a\", \"completion\": \" b\"}\n";
        assert_eq!(
            load_lines(&nulls, &skip(), None).unwrap().counts.examples,
            1
        );
    }

    #[test]
    fn a_file_that_changed_since_it_was_hashed_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, LINES).unwrap();
        let digest = digest(&path).unwrap();
        let mut content = File::open(&path).unwrap();
        check_unchanged(&path, &mut content, &digest).unwrap();
        std::fs::write(&path, "{}").unwrap();
        let error = check_unchanged(&path, &mut content, &digest).unwrap_err();
        assert!(
            error.kind() == Kind::Io && error.to_string().contains("changed while"),
            "{error}"
        );
    }

    #[test]
    fn a_cached_sample_names_the_file_of_this_recipe() {
        let place = place_for_cache(
            "one/d.jsonl, line 7",
            &["zero".into(), "one/d.jsonl".into()],
        );
        assert_eq!(place, "1, line 7");
        let paths = ["a".into(), "two/d.jsonl".into()];
        assert_eq!(place_from_cache(&place, &paths), "two/d.jsonl, line 7");
        assert_eq!(place_from_cache("9, line 7", &paths), "9, line 7");
    }
}
