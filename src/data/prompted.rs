//! Prompts and the answers that their records give: what a generation is compared with.

use std::path::PathBuf;

use serde_json::Value;

use super::format::{Columns, FieldsSeen, TypedRecord, interpret};
use super::options::{Format, Options};
use super::read::read;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Kind, Result};

/// A prompt, encoded up to where the answer begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompted {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The record's answer.
    pub reference: String,
}

/// The first `limit` records of `files`: prompt and completion, or a conversation up to its last message, the assistant's.
///
/// # Errors
/// Files that cannot be read, and records without an answer to compare with.
pub fn prompted(
    files: &[PathBuf],
    options: &Options,
    tokenizer: &Tokenizer,
    limit: usize,
) -> Result<Vec<Prompted>> {
    let columns = Columns(&options.columns);
    let mut records = Vec::new();
    let mut seen = FieldsSeen::default();
    for file in files {
        for record in read(file, options.txt_unit)?.take(limit - records.len()) {
            let record = record?;
            seen.add(&record, columns);
            records.push(record);
        }
    }
    let format = match options.format {
        Format::Auto => seen.format(columns).unwrap_or(Format::Completion),
        format => format,
    };
    let mut found = Vec::new();
    for record in &records {
        let typed = interpret(record, format, options)?;
        let one = with_answer(&typed, tokenizer)?;
        found.push(one.ok_or_else(|| {
            Error::new(Kind::Data, "a record has no answer to compare with")
                .at(record.place.to_string())
                .rule("prompt and completion, instruction and output, or messages that end with the assistant's")
                .hint("name the columns: `--column prompt=COLUMN --column completion=COLUMN`")
        })?);
    }
    Ok(found)
}

fn with_answer(typed: &TypedRecord, tokenizer: &Tokenizer) -> Result<Option<Prompted>> {
    match typed {
        TypedRecord::Completion { prompt, completion } => Ok(Some(Prompted {
            prompt: tokenizer.encode(prompt, true)?.ids,
            reference: completion.clone(),
        })),
        TypedRecord::Chat(chat) => {
            let Some((last, before)) = chat.messages.split_last() else {
                return Ok(None);
            };
            let answer = last["content"]
                .as_str()
                .filter(|_| last["role"] == "assistant");
            let Some(answer) = answer else {
                return Ok(None);
            };
            let text = tokenizer.render_chat(&Value::from(before), chat.tools.as_ref(), true)?;
            Ok(Some(Prompted {
                prompt: tokenizer.encode(&text, false)?.ids,
                reference: answer.to_string(),
            }))
        }
        TypedRecord::Text(_) | TypedRecord::Labelled { .. } | TypedRecord::LabelledWords { .. } => {
            Ok(None)
        }
    }
}
