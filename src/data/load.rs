//! Files -> an encoded data set.
//!
//! Takes local files, `Options` and a `Tokenizer`, returns a `Dataset` that does not depend on the number of threads, from the
//! cache if the same contents were encoded before. Knows nothing of recipes.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::batch::Example;
use super::cache;
use super::dataset::{Counts, Dataset, RenderedSample, TextSpan, with_token_counts};
use super::encode::{EncodedRecord, encode};
use super::format::{Columns, detect_format, interpret};
use super::options::{Format, OnBadRecord, Options};
use super::read::{Location, Record, extension, read};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::files::sha256;
use crate::text::hex;

/// Records encoded in parallel before they are collected in order.
const CHUNK: usize = 4096;
/// Increment when encoding changes: caches of other versions are ignored.
const ENCODING_VERSION: u32 = 3;

/// Loads `paths` in order as one data set; `cache` is a folder for encoded data sets.
///
/// # Errors
/// `Kind::Io` and `Kind::Data` for files and records that cannot be read (with `OnBadRecord::Skip`: only where all are bad);
/// `Kind::Tokenizer` where the format needs a chat template that the model lacks.
pub fn load(
    paths: &[PathBuf],
    options: &Options,
    tokenizer: &Tokenizer,
    cache: Option<&Path>,
) -> Result<Dataset> {
    check(paths, options)?;
    let fingerprint = fingerprint(paths, options, tokenizer)?;
    if let Some(mut dataset) = cache.and_then(|folder| cache::load(folder, &fingerprint)) {
        if let Some(first) = &mut dataset.first {
            first.place = place_from_cache(&first.place, paths);
        }
        return Ok(dataset);
    }
    let mut builder = DatasetBuilder::default();
    for path in paths {
        let mut records = read(path, options.txt_unit)?;
        loop {
            let chunk: Vec<Result<Record>> = records.by_ref().take(CHUNK).collect();
            if chunk.is_empty() {
                break;
            }
            builder.add(chunk, options, tokenizer)?;
        }
    }
    let dataset = builder.finish(fingerprint, paths)?;
    if let Some(folder) = cache {
        let mut cached = dataset.clone();
        if let Some(first) = &mut cached.first {
            first.place = place_for_cache(&first.place, paths);
        }
        // Without a cache the next run encodes again: not an error.
        let _ = cache::save(folder, &cached);
    }
    Ok(dataset)
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

fn check(paths: &[PathBuf], options: &Options) -> Result<()> {
    if paths.is_empty() {
        return Err(
            Error::new(Kind::Data, "there are no data files").hint("set data.train to a file")
        );
    }
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

/// SHA-256 of everything that the encoded data set depends on; of file names only the extension.
fn fingerprint(paths: &[PathBuf], options: &Options, tokenizer: &Tokenizer) -> Result<String> {
    let mut hash = Sha256::new();
    let Options {
        format,
        columns,
        max_length,
        on_bad_record,
        txt_unit,
    } = options;
    let words = format!(
        "{ENCODING_VERSION} {format:?} {columns:?} {max_length} {on_bad_record:?} {txt_unit:?} {}",
        tokenizer.fingerprint()
    );
    hash.update(words);
    for path in paths {
        let content = sha256(path).map_err(|e| Error::io("read", path, e))?;
        hash.update(format!(" {} {content}", extension(path)));
    }
    Ok(hex(hash.finalize()))
}

/// Collects encoded records into a data set.
#[derive(Default)]
struct DatasetBuilder {
    /// Known after the first record.
    format: Option<Format>,
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
        chunk: Vec<Result<Record>>,
        options: &Options,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let columns = Columns(&options.columns);
        if let (None, Some(first)) = (self.format, chunk.iter().flatten().next()) {
            columns.check_first(first)?;
            self.format = Some(match options.format {
                Format::Auto => detect_format(first, columns)?,
                format => format,
            });
        }
        let format = self.format.unwrap_or(options.format);
        if format == Format::Messages {
            // Without a template every record would fail: an error of the model, not of a record.
            tokenizer.template()?;
        }
        let encode_record = |record: Result<Record>| {
            let record = record?;
            let typed = interpret(&record, format, columns)?;
            let encoded = encode(&typed, tokenizer, options.max_length)
                .map_err(|e| e.at(record.place.to_string()))?;
            Ok((record.place, encoded))
        };
        let encoded: Vec<Result<_>> = chunk.into_par_iter().map(encode_record).collect();
        for record in encoded {
            self.counts.records += 1;
            match record {
                Ok((place, encoded)) => self.add_encoded(&place, encoded, tokenizer)?,
                Err(error)
                    if options.on_bad_record == OnBadRecord::Stop || error.kind() != Kind::Data =>
                {
                    return Err(error);
                }
                Err(error) => {
                    self.counts.skipped += 1;
                    self.first_bad.get_or_insert(error);
                }
            }
        }
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
        if encoded.examples.len() > 1 {
            counts.windows += encoded.examples.len() as u64;
        }
        self.eos_trained |= encoded.ends;
        if let (None, Some(example)) = (&self.first, encoded.examples.first()) {
            self.first = Some(render_sample(place, example, tokenizer)?);
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
fn render_sample(
    place: &Location,
    example: &Example,
    tokenizer: &Tokenizer,
) -> Result<RenderedSample> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for run in example.loss.chunk_by(|a, b| a == b) {
        let tokens = &example.tokens[start..start + run.len()];
        pieces.push(TextSpan {
            text: tokenizer.decode(tokens)?,
            loss: run[0],
        });
        start += run.len();
    }
    Ok(RenderedSample {
        place: place.to_string(),
        pieces,
    })
}

#[cfg(test)]
mod tests {
    use super::super::options::TxtUnit;
    use super::*;
    use crate::data::tokenizer::tests::word_tokenizer;

    fn options() -> Options {
        Options {
            format: Format::Auto,
            columns: vec![],
            max_length: 4,
            on_bad_record: OnBadRecord::Stop,
            txt_unit: TxtUnit::Paragraph,
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
        load(&[path], options, &tokenizer(), cache)
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
            (LINES, &mapped, "has no `body`"),
        ] {
            let error = load_lines(lines, options, None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let error = load_lines("{\"messages\": []}", &options(), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Tokenizer);
        let short = Options {
            max_length: 1,
            ..options()
        };
        assert!(load_lines("{}", &short, None).is_err());
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
