//! Record formats: text, prompt and completion, instruction, conversation.
//!
//! Takes a `Record`, a `Format` and a map of columns, returns a `TypedRecord` for encoding. `Auto` reads the first record only; a
//! missing field or one of the wrong type is an error that lists the record's fields. Knows nothing of tokens.

use serde_json::{Map, Value};

use super::alpaca;
use super::chat::Chat;
use super::messages;
use super::options::{COLUMN_FIELDS, Format};
use super::read::Record;
use crate::error::{Error, Kind, Result};

/// A record in a known format.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TypedRecord {
    /// Every token has a loss.
    Text(String),
    /// The completion has a loss.
    Completion { prompt: String, completion: String },
    /// The assistant's turns have a loss.
    Chat(Chat),
}

/// Wanted field -> the file's column, which may be a dotted path into nested fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns<'a>(pub &'a [(String, String)]);

/// Of these, the optional fields.
const OPTIONAL: [&str; 2] = ["tools", "input"];
/// Field names of `Completion`, in order of preference.
const PAIRS: [(&str, &str); 2] = [("prompt", "completion"), ("question", "answer")];
/// Field names of `Messages`.
const CONVERSATIONS: [&str; 2] = ["messages", "conversations"];

impl<'a> Columns<'a> {
    /// Refuses a map of a field that no format reads.
    pub fn check(&self) -> Result<()> {
        match self.0.iter().find(|(wanted, _)| !COLUMN_FIELDS.contains(&wanted.as_str())) {
            None => Ok(()),
            Some((wanted, column)) => Err(Error::new(Kind::Data, "`columns` maps a field that no format reads")
                .value(format!("{wanted} = \"{column}\""))
                .rule(format!("one of {}", COLUMN_FIELDS.join(", ")))
                .hint("the field is on the left and the file's column on the right: columns = { prompt = \"question\" }")),
        }
    }

    fn mapped(&self, wanted: &str) -> Option<&'a str> {
        self.0
            .iter()
            .find(|(name, _)| name == wanted)
            .map(|(_, column)| column.as_str())
    }

    /// The value of `wanted`; JSON null counts as absent.
    fn get<'r>(&self, record: &'r Map<String, Value>, wanted: &str) -> Option<&'r Value> {
        let column = self.mapped(wanted).unwrap_or(wanted);
        let found = record.get(column).or_else(|| {
            let mut parts = column.split('.');
            let first = record.get(parts.next()?)?;
            if column.contains('.') {
                parts.try_fold(first, |value, part| value.get(part))
            } else {
                None
            }
        });
        found.filter(|value| !value.is_null())
    }

    /// Refuses a map to columns that the first record lacks: no other column may replace them silently.
    pub fn check_first(&self, record: &Record) -> Result<()> {
        let absent = |wanted: &str| {
            !OPTIONAL.contains(&wanted) && self.get(&record.fields, wanted).is_none()
        };
        match self.0.iter().find(|(wanted, _)| absent(wanted)) {
            None => Ok(()),
            Some((wanted, column)) => Err(Error::new(
                Kind::Data,
                format!("the first record has no `{column}`, which `columns` names"),
            )
            .at(record.place.to_string())
            .value(format!("its fields: {}", names(&record.fields)))
            .hint(format!(
                "correct the map: columns = {{ {wanted} = \"COLUMN\" }}"
            ))),
        }
    }

    /// The field names of this record's prompt and completion; only the mapped ones if either is mapped.
    fn pair(&self, record: &Map<String, Value>) -> Option<(&'static str, &'static str)> {
        let mapped = self.mapped(PAIRS[0].0).is_some() || self.mapped(PAIRS[0].1).is_some();
        let pairs = if mapped { &PAIRS[..1] } else { &PAIRS };
        pairs.iter().copied().find(|(prompt, completion)| {
            self.get(record, prompt).is_some() && self.get(record, completion).is_some()
        })
    }
}

/// The format of a data set, by its first record.
pub(super) fn detect_format(record: &Record, columns: Columns) -> Result<Format> {
    let has = |name: &str| columns.get(&record.fields, name).is_some();
    if CONVERSATIONS.iter().any(|name| {
        columns
            .get(&record.fields, name)
            .is_some_and(Value::is_array)
    }) {
        Ok(Format::Messages)
    } else if has("instruction") && has("output") {
        Ok(Format::Alpaca)
    } else if columns.pair(&record.fields).is_some() {
        Ok(Format::Completion)
    } else if has("text") {
        Ok(Format::Text)
    } else {
        Err(Error::new(Kind::Data, "no format fits the first record's fields")
            .at(record.place.to_string())
            .value(names(&record.fields))
            .rule("text | prompt, completion | question, answer | instruction, output | messages | conversations")
            .hint("say which columns to read: columns = { prompt = \"COLUMN\", completion = \"COLUMN\" }"))
    }
}

/// Reads `record` as `format`; `detect_format` must have resolved `Format::Auto`.
pub(super) fn interpret(record: &Record, format: Format, columns: Columns) -> Result<TypedRecord> {
    let fields = &record.fields;
    let typed = match format {
        Format::Text | Format::Auto => text(fields, columns, "text").map(TypedRecord::Text),
        Format::Completion => completion(fields, columns),
        Format::Alpaca => instruction(fields, columns),
        Format::Messages => conversation(fields, columns),
    };
    typed.map_err(|e| e.at(record.place.to_string()))
}

fn names(record: &Map<String, Value>) -> String {
    record
        .keys()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

fn missing(record: &Map<String, Value>, columns: Columns, wanted: &str) -> Error {
    let column = columns.mapped(wanted).unwrap_or(wanted);
    Error::new(Kind::Data, format!("a record has no `{column}`"))
        .value(format!("its fields: {}", names(record)))
        .hint(format!("say which column to read: columns = {{ {wanted} = \"COLUMN\" }}, or set `on_bad_record = \"skip\"`"))
}

/// A field as text: a string, or a number as written.
fn text(record: &Map<String, Value>, columns: Columns, wanted: &str) -> Result<String> {
    match columns
        .get(record, wanted)
        .ok_or_else(|| missing(record, columns, wanted))?
    {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(
            Error::new(Kind::Data, format!("a record's `{wanted}` is not text"))
                .value(other.to_string().chars().take(80).collect::<String>())
                .rule("a string or a number")
                .hint("correct the record or the `columns` map"),
        ),
    }
}

fn completion(record: &Map<String, Value>, columns: Columns) -> Result<TypedRecord> {
    let (prompt, completion) = columns.pair(record).unwrap_or(PAIRS[0]);
    let messages = (columns.get(record, prompt), columns.get(record, completion));
    if let (Some(Value::Array(prompt)), Some(Value::Array(completion))) = messages {
        let tools = columns.get(record, "tools");
        return messages::from_prompt_and_completion(prompt, completion, tools)
            .map(TypedRecord::Chat);
    }
    Ok(TypedRecord::Completion {
        prompt: text(record, columns, prompt)?,
        completion: text(record, columns, completion)?,
    })
}

fn instruction(record: &Map<String, Value>, columns: Columns) -> Result<TypedRecord> {
    for unread in ["history", "system"] {
        let filled = match columns.get(record, unread) {
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            _ => false,
        };
        if filled {
            return Err(Error::new(
                Kind::Data,
                format!("Alpaca's prompt has no place for a record's `{unread}`"),
            )
            .rule("instruction, input, output")
            .hint("write the record as `messages`"));
        }
    }
    let input = if columns.get(record, "input").is_some() {
        text(record, columns, "input")?
    } else {
        String::new()
    };
    let prompt = alpaca::prompt(&text(record, columns, "instruction")?, &input);
    Ok(TypedRecord::Completion {
        prompt,
        completion: text(record, columns, "output")?,
    })
}

fn conversation(record: &Map<String, Value>, columns: Columns) -> Result<TypedRecord> {
    let list = CONVERSATIONS
        .iter()
        .find_map(|name| columns.get(record, name));
    let list = list.ok_or_else(|| missing(record, columns, "messages"))?;
    let list = list.as_array().ok_or_else(|| {
        Error::new(Kind::Data, "a record's `messages` is not a list")
            .rule("[{\"role\": \"user\", \"content\": \"...\"}, ...]")
    })?;
    let system = record
        .get("system")
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty());
    messages::from_list(list, system, columns.get(record, "tools")).map(TypedRecord::Chat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::read::Location;
    use serde_json::json;

    fn record(value: Value) -> Record {
        let Value::Object(fields) = value else {
            panic!("an object")
        };
        Record {
            place: Location {
                file: "f.jsonl".into(),
                unit: "line",
                number: 7,
            },
            fields,
        }
    }

    fn detected(value: Value, columns: &[(String, String)]) -> Result<Format> {
        detect_format(&record(value), Columns(columns))
    }

    #[test]
    fn the_fields_determine_the_format() {
        for (fields, format) in [
            (json!({"text": "a"}), Format::Text),
            (
                json!({"prompt": "a", "completion": "b", "text": "ab"}),
                Format::Completion,
            ),
            (json!({"question": "a", "answer": "b"}), Format::Completion),
            (
                json!({"instruction": "a", "input": "", "output": "b", "text": "ab"}),
                Format::Alpaca,
            ),
            (json!({"messages": [], "prompt": "a"}), Format::Messages),
            (json!({"conversations": []}), Format::Messages),
        ] {
            assert_eq!(detected(fields.clone(), &[]).unwrap(), format, "{fields}");
        }
        let error = detected(json!({"sentence": "a", "label": 1}), &[])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sentence, label") && error.contains("f.jsonl, line 7"),
            "{error}"
        );
        let columns = [
            ("prompt".to_string(), "sentence".to_string()),
            ("completion".to_string(), "label".to_string()),
        ];
        assert_eq!(
            detected(json!({"sentence": "a", "label": 1}), &columns).unwrap(),
            Format::Completion
        );
    }

    #[test]
    fn columns_reach_into_nested_fields_and_numbers_are_text() {
        let columns = [
            ("prompt".to_string(), "extra.q".to_string()),
            ("completion".to_string(), "label".to_string()),
        ];
        let typed = interpret(
            &record(json!({"extra": {"q": "Q"}, "label": 1})),
            Format::Completion,
            Columns(&columns),
        )
        .unwrap();
        assert_eq!(
            typed,
            TypedRecord::Completion {
                prompt: "Q".into(),
                completion: "1".into()
            }
        );
        // `question` and `answer` are present, but the map names other columns.
        let other = record(json!({"question": "a", "answer": "b"}));
        assert!(
            Columns(&columns)
                .check_first(&other)
                .unwrap_err()
                .to_string()
                .contains("`extra.q`")
        );
        assert!(interpret(&other, Format::Completion, Columns(&columns)).is_err());
        let wrong = [("promt".to_string(), "a".to_string())];
        assert!(
            Columns(&wrong)
                .check()
                .unwrap_err()
                .to_string()
                .contains("promt")
        );
    }

    #[test]
    fn a_missing_or_wrong_field_names_the_line() {
        for (fields, format) in [
            (json!({"prompt": "a"}), Format::Completion),
            (json!({"text": null}), Format::Text),
            (json!({"text": [1]}), Format::Text),
        ] {
            let error = interpret(&record(fields), format, Columns(&[])).unwrap_err();
            assert!(
                error.kind() == Kind::Data && error.to_string().contains("f.jsonl, line 7"),
                "{error}"
            );
        }
    }

    #[test]
    fn alpaca_has_two_prompts_and_refuses_what_it_cannot_place() {
        let typed = |value| interpret(&record(value), Format::Alpaca, Columns(&[]));
        let Ok(TypedRecord::Completion { prompt, .. }) =
            typed(json!({"instruction": "I", "input": "X", "output": "O"}))
        else {
            panic!()
        };
        assert!(prompt.ends_with("### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n"));
        let Ok(TypedRecord::Completion { prompt, .. }) =
            typed(json!({"instruction": "I", "input": "", "output": "O"}))
        else {
            panic!()
        };
        assert!(prompt.ends_with("request.\n\n### Instruction:\nI\n\n### Response:\n"));
        assert!(
            typed(json!({"instruction": "I", "output": "O", "history": [["a", "b"]]})).is_err()
        );
    }
}
