//! Multiple-choice records: a prompt, choices, and which of them is right.
//!
//! Takes data files, returns records and their encodings as lm-evaluation-harness makes them (`_encode_pair` of
//! `lm_eval/api/model.py`): the tokens of the prompt alone, then those that prompt and choice together have beyond that number.

use std::path::PathBuf;

use serde_json::Value;

use super::batch::Example;
use super::format::Columns;
use super::options::TxtUnit;
use super::read::{Record, read};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};

/// Between prompt and choice, as the harness's `target_delimiter`.
const DELIMITER: &str = " ";
/// Names of each field, the first that is present is read.
const PROMPTS: [&str; 4] = ["prompt", "question", "query", "context"];
const CHOICES: [&str; 3] = ["choices", "options", "endings"];
const LABELS: [&str; 4] = ["label", "answer", "gold", "answerKey"];

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MultipleChoice {
    /// What precedes each choice.
    pub prompt: String,
    /// The choices, at least two.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub label: usize,
    place: String,
}

impl MultipleChoice {
    /// Each choice after the prompt; a loss token is a token of the choice. Of more than `positions` tokens the first are left out.
    ///
    /// # Errors
    /// `Kind::Data` where a choice has no token of its own.
    pub fn encode(&self, tokenizer: &Tokenizer, positions: usize) -> Result<Vec<Example>> {
        let prompt = self.prompt.trim_end();
        let spaces = &self.prompt[prompt.len()..];
        let context = tokenizer.encode(prompt, true)?.ids;
        let encode = |choice: &String| {
            let text = format!("{prompt}{spaces}{DELIMITER}{choice}");
            let both = tokenizer.encode(&text, true)?.ids;
            let own = both.get(context.len()..).unwrap_or_default();
            if own.is_empty() || context.is_empty() {
                return Err(Error::new(
                    Kind::Data,
                    "a choice has no token of its own after its prompt",
                )
                .at(self.place.clone())
                .value(choice.clone())
                .hint("let the prompt end with a whole word"));
            }
            let mut tokens = [&context, own].concat();
            let left_out = tokens.len().saturating_sub(positions);
            let mut loss: Vec<bool> = (0..tokens.len())
                .map(|index| index >= context.len())
                .collect();
            tokens.drain(..left_out);
            loss.drain(..left_out);
            Ok(Example {
                tokens,
                loss,
                labels: Vec::new(),
                values: Vec::new(),
            })
        };
        self.choices.iter().map(encode).collect()
    }
}

/// The first `limit` records of `files`; `columns`: wanted field (prompt, choices, label) -> column.
///
/// # Errors
/// Files that cannot be read, and a record that is no multiple choice.
pub fn multiple_choices(
    files: &[PathBuf],
    columns: &[(String, String)],
    limit: usize,
) -> Result<Vec<MultipleChoice>> {
    let mut found = Vec::new();
    for file in files {
        for record in read(file, TxtUnit::Paragraph)? {
            if found.len() < limit {
                found.push(multiple_choice(&record?, columns)?);
            }
        }
    }
    Ok(found)
}

fn multiple_choice(record: &Record, columns: &[(String, String)]) -> Result<MultipleChoice> {
    let mapped = |wanted: &str| columns.iter().find(|(field, _)| field == wanted);
    let field = |wanted: &str, names: &[&str]| {
        let found = match mapped(wanted) {
            Some(_) => Columns(columns).get(&record.fields, wanted),
            None => names.iter().find_map(|name| record.fields.get(*name)),
        };
        found.ok_or_else(|| refused(record, &format!("a record has no {wanted}"), wanted, names))
    };
    let prompt = field("prompt", &PROMPTS)?;
    let prompt = prompt
        .as_str()
        .ok_or_else(|| refused(record, "a record's prompt is not text", "prompt", &PROMPTS))?;
    let listed = field("choices", &CHOICES)?;
    // ARC has the texts and their letters in one field.
    let texts = listed.get("text").unwrap_or(listed).as_array();
    let choices: Option<Vec<String>> = texts.and_then(|list| {
        list.iter()
            .map(|text| Some(text.as_str()?.to_string()))
            .collect()
    });
    let choices = choices.filter(|choices| choices.len() > 1).ok_or_else(|| {
        refused(
            record,
            "a record's choices are not two or more texts",
            "choices",
            &CHOICES,
        )
    })?;
    let letters = listed.get("label").and_then(Value::as_array);
    let given = field("label", &LABELS)?;
    let label = label(given, &choices, letters).ok_or_else(|| {
        refused(
            record,
            "a record's label is none of its choices",
            "label",
            &LABELS,
        )
    })?;
    Ok(MultipleChoice {
        prompt: prompt.to_string(),
        choices,
        label,
        place: record.place.to_string(),
    })
}

/// The index of the right choice: a number from 0, else one of `letters`, A, B, C and so on, or the choice itself.
fn label(given: &Value, choices: &[String], letters: Option<&Vec<Value>>) -> Option<usize> {
    if let Some(index) = given.as_u64() {
        return Some(index as usize).filter(|index| *index < choices.len());
    }
    let text = given.as_str()?;
    let by_letter = letters.and_then(|letters| letters.iter().position(|letter| letter == text));
    let by_text = || choices.iter().position(|choice| choice == text);
    let by_number = || text.parse().ok();
    let by_alphabet = || match text.as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        _ => None,
    };
    let found = by_letter
        .or_else(by_text)
        .or_else(by_number)
        .or_else(by_alphabet);
    found.filter(|index| *index < choices.len())
}

fn refused(record: &Record, what: &str, wanted: &str, names: &[&str]) -> Error {
    let fields: Vec<&str> = record.fields.keys().map(String::as_str).collect();
    Error::new(Kind::Data, what)
        .at(record.place.to_string())
        .value(format!("its fields: {}", fields.join(", ")))
        .rule(format!("one of {}", names.join(", ")))
        .hint(format!("name the column: `--column {wanted}=COLUMN`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_one(record: Value) -> Result<MultipleChoice> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, format!("{record}\n")).unwrap();
        multiple_choices(&[path], &[], 9).map(|mut all| all.remove(0))
    }

    #[test]
    fn common_forms_are_read() {
        for (record, right) in [
            (
                json!({"prompt": "p", "choices": ["a", "b"], "label": 1}),
                "b",
            ),
            (
                json!({"question": "p", "options": ["a", "b"], "answer": "B"}),
                "b",
            ),
            (
                json!({"query": "p", "choices": ["a", "b"], "gold": "0"}),
                "a",
            ),
            (
                json!({"question": "p", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}),
                "b",
            ),
            (
                json!({"context": "p", "endings": ["x", "y"], "label": "y"}),
                "y",
            ),
        ] {
            let read = read_one(record.clone()).unwrap();
            assert_eq!(read.choices[read.label], right, "{record}");
        }
        for (record, part) in [
            (
                json!({"prompt": "p", "choices": ["a"], "label": 0}),
                "two or more",
            ),
            (
                json!({"prompt": "p", "choices": ["a", "b"], "label": 2}),
                "none of its choices",
            ),
            (
                json!({"prompt": "p", "label": 2}),
                "--column choices=COLUMN",
            ),
        ] {
            let error = read_one(record).unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains("d.jsonl, line 1"),
                "{error}"
            );
        }
    }
}
