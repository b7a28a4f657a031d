//! The format and columns of records that nobody has described yet.
//!
//! Takes data files, returns a format with its `columns` map by the names and types of the first records' fields. Where the names
//! say nothing the error lists the fields: a column is never chosen by its place.

use std::path::PathBuf;

use serde_json::Value;

use super::format::{CONVERSATIONS, Columns, FieldsSeen};
use super::options::{Format, TxtUnit};
use super::read::{Record, read};
use crate::error::{Error, Kind, Result};

/// Records looked at.
const SAMPLED: usize = 200;

/// Names of columns in public data sets, by the field they are read as; the first that is present is taken.
const PROMPTS: &[&str] = &[
    "prompt",
    "question",
    "instruction",
    "query",
    "input",
    "source",
    "context",
    "article",
    "document",
    "dialogue",
    "problem",
    "meaning_representation",
    "mr",
];
const COMPLETIONS: &[&str] = &[
    "completion",
    "answer",
    "response",
    "output",
    "target",
    "summary",
    "highlights",
    "solution",
    "chosen",
    "human_reference",
    "ref",
    "sql",
];

/// A field of a format, and the names that its column has in public data sets.
#[derive(Clone, Copy)]
struct Field {
    name: &'static str,
    columns: &'static [&'static str],
}

const PROMPT: Field = Field {
    name: "prompt",
    columns: PROMPTS,
};
const COMPLETION: Field = Field {
    name: "completion",
    columns: COMPLETIONS,
};
const TEXT: Field = Field {
    name: "text",
    columns: &[
        "text", "content", "sentence", "body", "document", "article", "review", "story", "code",
    ],
};
const LABEL: Field = Field {
    name: "label",
    columns: &[
        "label",
        "labels",
        "class",
        "category",
        "sentiment",
        "intent",
    ],
};
const WORDS: Field = Field {
    name: "tokens",
    columns: &["tokens", "words"],
};
const WORD_LABELS: Field = Field {
    name: "labels",
    columns: &["labels", "ner_tags", "tags", "pos_tags"],
};

/// What a data set is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Text to predict.
    Text,
    /// Texts and their classes.
    Classes,
    /// Words and their classes.
    WordClasses,
}

/// How a data set can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// The format.
    pub format: Format,
    /// Wanted field -> column, where their names differ.
    pub columns: Vec<(String, String)>,
    /// Names of the first record's fields.
    pub fields: Vec<String>,
}

/// Detects format and columns by the first records of `files`; `given` columns are kept as they are.
///
/// # Errors
/// Files that cannot be read or hold no record, and fields that no format fits.
pub fn detect(files: &[PathBuf], wanted: Wanted, given: &[(String, String)]) -> Result<Detected> {
    let records = sample(files)?;
    let first = &records[0];
    let fields: Vec<String> = first.fields.keys().cloned().collect();
    let found = match wanted {
        Wanted::Text => text_columns(&records, Columns(given))?,
        _ if !given.is_empty() => Some((Format::Classification, given.to_vec())),
        Wanted::Classes => pair(Format::Classification, first, TEXT, LABEL),
        Wanted::WordClasses => pair(Format::Classification, first, WORDS, WORD_LABELS),
    };
    let (format, columns) = found.ok_or_else(|| unknown(first, &fields, wanted))?;
    Ok(Detected {
        format,
        columns,
        fields,
    })
}

/// The first records that can be read; at least one.
fn sample(files: &[PathBuf]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for file in files {
        let mut read = read(file, TxtUnit::Paragraph)?;
        while records.len() < SAMPLED {
            match read.next() {
                Some(Ok(record)) => records.push(record),
                Some(Err(error)) if error.kind() == Kind::Data && !records.is_empty() => {}
                Some(Err(error)) => return Err(error),
                None => break,
            }
        }
    }
    if records.is_empty() {
        let names: Vec<String> = files
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Err(Error::new(Kind::Data, "the data hold no record")
            .at(names.join(", "))
            .hint("check that it is the right file"));
    }
    Ok(records)
}

type Found = Option<(Format, Vec<(String, String)>)>;

/// By the fields that a format names, else by known names of columns.
fn text_columns(records: &[Record], given: Columns<'_>) -> Result<Found> {
    given.check()?;
    let mut seen = FieldsSeen::default();
    for record in records {
        seen.add(record, given);
    }
    if let Some(format) = seen.format(given) {
        return Ok(Some((format, given.0.to_vec())));
    }
    if !given.0.is_empty() {
        return seen.no_format(given).map_or(Ok(None), Err);
    }
    let first = &records[0];
    let found = pair(Format::Completion, first, PROMPT, COMPLETION);
    let text = || Some((Format::Text, vec![column(first, TEXT, None)?]));
    Ok(found.or_else(text))
}

/// Two fields, each by one of the names of its column.
fn pair(format: Format, record: &Record, one: Field, other: Field) -> Found {
    let one = column(record, one, None)?;
    let other = column(record, other, Some(&one.1))?;
    let columns = [one, other].into_iter();
    let renamed = columns.filter(|(field, column)| field != column);
    Some((format, renamed.collect()))
}

/// The field and the first of its columns that the record has; letter case is ignored.
fn column(record: &Record, field: Field, taken: Option<&str>) -> Option<(String, String)> {
    let fits = |key: &&String| {
        taken != Some(key.as_str())
            && !matches!(record.fields[*key], Value::Null | Value::Object(_))
    };
    let of_name = |name: &&str| {
        let mut keys = record.fields.keys().filter(fits);
        keys.find(|key| key.eq_ignore_ascii_case(name))
    };
    let column = field.columns.iter().find_map(of_name)?;
    Some((field.name.to_string(), column.clone()))
}

fn unknown(first: &Record, fields: &[String], wanted: Wanted) -> Error {
    let (rule, columns) = match wanted {
        Wanted::Text => (
            format!(
                "text | prompt, completion | question, answer | instruction, output | {}",
                CONVERSATIONS.join(" | ")
            ),
            "prompt=COLUMN --column completion=COLUMN",
        ),
        Wanted::Classes => (
            "text, label".to_string(),
            "text=COLUMN --column label=COLUMN",
        ),
        Wanted::WordClasses => (
            "tokens, labels".to_string(),
            "tokens=COLUMN --column labels=COLUMN",
        ),
    };
    Error::new(Kind::Data, "the records' fields do not say which is which")
        .at(first.place.to_string())
        .value(format!("the first record's fields: {}", fields.join(", ")))
        .rule(rule)
        .hint(format!("name the columns: `--column {columns}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detected(lines: &str, wanted: Wanted) -> Result<Detected> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, lines).unwrap();
        detect(&[path], wanted, &[])
    }

    fn columns(found: &Detected) -> String {
        let pairs = found.columns.iter();
        let pairs: Vec<String> = pairs
            .map(|(field, column)| format!("{field}={column}"))
            .collect();
        pairs.join(" ")
    }

    #[test]
    fn known_names_decide_format_and_columns() {
        for (line, wanted, format, expected) in [
            (
                r#"{"question": "a", "answer": "b"}"#,
                Wanted::Text,
                Format::Completion,
                "",
            ),
            (
                r#"{"id": 1, "Article": "a", "highlights": "b"}"#,
                Wanted::Text,
                Format::Completion,
                "prompt=Article completion=highlights",
            ),
            (
                r#"{"story": "a"}"#,
                Wanted::Text,
                Format::Text,
                "text=story",
            ),
            (
                r#"{"sentence": "a", "label": 1}"#,
                Wanted::Classes,
                Format::Classification,
                "text=sentence",
            ),
            (
                r#"{"tokens": ["a"], "ner_tags": [0]}"#,
                Wanted::WordClasses,
                Format::Classification,
                "labels=ner_tags",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "a"}]}"#,
                Wanted::Text,
                Format::Messages,
                "",
            ),
        ] {
            let found = detected(line, wanted).unwrap();
            assert_eq!(
                (found.format, columns(&found).as_str()),
                (format, expected),
                "{line}"
            );
        }
    }

    #[test]
    fn unknown_names_are_listed_not_guessed() {
        let error = detected(r#"{"a": "x", "b": "y"}"#, Wanted::Text)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a, b") && error.contains("--column prompt=COLUMN"),
            "{error}"
        );
        assert!(detected("\n", Wanted::Text).is_err());
        // A label alone is no text, and one column is not two.
        assert!(detected(r#"{"label": 1}"#, Wanted::Classes).is_err());
        assert!(detected(r#"{"document": {"x": 1}, "summary": "s"}"#, Wanted::Text).is_err());
    }
}
