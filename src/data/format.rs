//! Record formats: text, prompt and completion, instruction, conversation.
//!
//! Takes a `Record`, a `Format` and a map of columns, returns a `TypedRecord` for encoding. `Auto` is decided by the fields of all
//! records; a missing field or one of the wrong type is an error that lists the record's fields. Knows nothing of tokens.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::alpaca;
use super::chat::Chat;
use super::messages;
use super::options::{COLUMN_FIELDS, Format, LabelKind, Options, PromptTemplate};
use super::read::{NeededColumns, Record};
use crate::error::{Error, Kind, Result};

/// A record in a known format.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TypedRecord {
    /// Every token has a loss.
    Text(String),
    /// The text has a label.
    Labelled { text: String, label: Label },
    /// Each word has a class.
    LabelledWords {
        words: Vec<String>,
        labels: Vec<u32>,
    },
    /// The completion has a loss.
    Completion { prompt: String, completion: String },
    /// The assistant's turns have a loss.
    Chat(Chat),
}

/// The label of a text.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Label {
    /// Its class.
    Class(u32),
    /// The target of each output.
    Values(Vec<f32>),
}

/// Wanted field -> the file's column, which may be a dotted path into nested fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns<'a>(pub &'a [(String, String)]);

/// Field names of `Completion`, in order of preference.
const PAIRS: [(&str, &str); 2] = [("prompt", "completion"), ("question", "answer")];
/// Field names of `Messages`.
pub(super) const CONVERSATIONS: [&str; 2] = ["messages", "conversations"];

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
    pub fn get<'r>(&self, record: &'r Map<String, Value>, wanted: &str) -> Option<&'r Value> {
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

    /// The field names of this record's prompt and completion; only the mapped ones if either is mapped.
    fn pair(&self, record: &Map<String, Value>) -> Option<(&'static str, &'static str)> {
        let mapped = self.mapped(PAIRS[0].0).is_some() || self.mapped(PAIRS[0].1).is_some();
        let pairs = if mapped { &PAIRS[..1] } else { &PAIRS };
        pairs.iter().copied().find(|(prompt, completion)| {
            self.get(record, prompt).is_some() && self.get(record, completion).is_some()
        })
    }
}

/// The required fields of each format in order of preference; the last two are two forms of one.
const REQUIRED: [(Format, &[&str]); 6] = [
    (Format::Messages, &["messages"]),
    (Format::Messages, &["conversations"]),
    (Format::Alpaca, &["instruction", "output"]),
    (Format::Completion, &["prompt", "completion"]),
    (Format::Completion, &["question", "answer"]),
    (Format::Text, &["text"]),
];

/// Fields that some format reads besides the required ones.
const FURTHER: [&str; 7] = [
    "input", "tools", "system", "history", "label", "tokens", "labels",
];

/// The columns that the formats read.
pub(super) fn needed_columns(columns: Columns) -> NeededColumns {
    let known = REQUIRED
        .iter()
        .flat_map(|(_, fields)| *fields)
        .chain(&FURTHER);
    let mapped = columns.0.iter().map(|(_, column)| column.clone());
    let roots = columns
        .0
        .iter()
        .filter_map(|(_, column)| column.split('.').next());
    let names = known
        .copied()
        .chain(roots)
        .map(str::to_string)
        .chain(mapped);
    NeededColumns::Named(names.collect())
}

/// The fields of a data set so far, by which `Format::Auto` is resolved: a null or missing field in one record decides nothing.
#[derive(Debug, Default)]
pub(super) struct FieldsSeen {
    /// Required fields that some record has.
    present: BTreeSet<&'static str>,
    /// Location and field names of the first record.
    first: Option<(String, String)>,
}

impl FieldsSeen {
    pub fn add(&mut self, record: &Record, columns: Columns) {
        if self.first.is_none() {
            self.first = Some((record.place.to_string(), names(&record.fields)));
        }
        for (format, fields) in REQUIRED {
            for field in fields {
                let value = columns.get(&record.fields, field);
                let fits = |value| format != Format::Messages || is_conversation(value);
                if value.is_some_and(fits) {
                    self.present.insert(field);
                }
            }
        }
    }

    /// The format whose required fields are present, each in some record, and which reads every mapped field.
    pub fn format(&self, columns: Columns) -> Option<Format> {
        let reads = |fields: &[&str], format, wanted: &str| match wanted {
            "tools" => matches!(format, Format::Messages | Format::Completion),
            "input" => format == Format::Alpaca,
            "label" | "tokens" | "labels" => false,
            wanted => fields.contains(&wanted),
        };
        let fits = |(format, fields): &&(Format, &[&str])| {
            fields.iter().all(|field| self.present.contains(field))
                && columns
                    .0
                    .iter()
                    .all(|(wanted, _)| reads(fields, *format, wanted))
        };
        REQUIRED.iter().find(fits).map(|(format, _)| *format)
    }

    /// The error of a data set that no format fits; `None` without records.
    pub fn no_format(&self, columns: Columns) -> Option<Error> {
        let (place, names) = self.first.as_ref()?;
        let is_absent = |wanted: &String| {
            let required = |(_, fields): &(Format, &[&str])| fields.contains(&wanted.as_str());
            REQUIRED.iter().any(required) && !self.present.contains(wanted.as_str())
        };
        let absent = columns.0.iter().find(|(wanted, _)| is_absent(wanted));
        let (what, remedy) = match absent {
            Some((wanted, column)) => (
                format!("no record has `{column}`, which `columns` names"),
                format!("correct the map: columns = {{ {wanted} = \"COLUMN\" }}"),
            ),
            None => (
                "no format fits the records' fields".to_string(),
                "say which columns to read: columns = { prompt = \"COLUMN\", completion = \"COLUMN\" }; the first line of a .csv or .tsv file names its columns".to_string(),
            ),
        };
        Some(Error::new(Kind::Data, what)
            .at(place.clone())
            .value(format!("the first record's fields: {names}"))
            .rule("text | prompt, completion | question, answer | instruction, output | messages | conversations")
            .hint(remedy))
    }
}

/// Whether a value is a list of messages, or may be its JSON text.
fn is_conversation(value: &Value) -> bool {
    match value {
        Value::Array(_) => true,
        Value::String(text) => text.trim_start().starts_with('['),
        _ => false,
    }
}

/// Reads `record` as `format`; `FieldsSeen` must have resolved `Format::Auto`.
pub(super) fn interpret(record: &Record, format: Format, options: &Options) -> Result<TypedRecord> {
    let columns = Columns(&options.columns);
    let (template, labels) = (options.prompt_template.as_ref(), &options.labels);
    let fields = &record.fields;
    let typed = match format {
        Format::Text | Format::Auto => text(fields, columns, "text").map(TypedRecord::Text),
        Format::Completion => completion(fields, columns, template),
        Format::Alpaca => instruction(fields, columns, template),
        Format::Messages => conversation(fields, columns),
        Format::Classification => match options.label_kind {
            LabelKind::ClassesOfWords => labelled_words(record, columns, labels),
            kind => labelled(record, columns, labels, kind),
        },
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

/// Whether the label of a record is a list.
pub(super) fn has_label_list(record: &Record, columns: Columns) -> bool {
    matches!(columns.get(&record.fields, "label"), Some(Value::Array(_)))
}

/// The label or labels of a record, or the labels of its words, as text: strings, numbers as written, `true` or `false`.
pub(super) fn label_texts(
    record: &Record,
    columns: Columns,
    of_words: bool,
) -> Result<Vec<String>> {
    let fields = &record.fields;
    let texts = if of_words {
        list(fields, columns, "labels")
    } else if has_label_list(record, columns) {
        list(fields, columns, "label")
    } else if let Some(Value::Bool(flag)) = columns.get(fields, "label") {
        Ok(vec![flag.to_string()])
    } else {
        text(fields, columns, "label").map(|text| vec![text])
    };
    texts.map_err(|e| e.at(record.place.to_string()))
}

/// A field that is a list of strings, numbers or flags, as texts.
fn list(record: &Map<String, Value>, columns: Columns, wanted: &str) -> Result<Vec<String>> {
    let value = columns
        .get(record, wanted)
        .ok_or_else(|| missing(record, columns, wanted))?;
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    };
    let texts = value
        .as_array()
        .and_then(|list| list.iter().map(text).collect());
    texts.ok_or_else(|| {
        Error::new(Kind::Data, format!("a record's `{wanted}` is not a list"))
            .value(value.to_string().chars().take(80).collect::<String>())
            .rule("a list of words, or of their labels")
            .hint("correct the record or the `columns` map")
    })
}

/// The id of a class: by its name, else a number as it is.
pub(super) fn class_id(name: &str, labels: &[String]) -> Option<u32> {
    let by_name = labels.iter().position(|label| label == name);
    let by_number = || name.parse().ok().filter(|id| *id < labels.len());
    by_name.or_else(by_number).map(|id| id as u32)
}

/// The id of a record's class.
fn known_class(name: &str, labels: &[String]) -> Result<u32> {
    class_id(name, labels).ok_or_else(|| {
        Error::new(
            Kind::Data,
            "a record has a label that is none of the classes",
        )
        .value(name)
        .rule(format!("one of {}", labels.join(", ")))
        .hint("correct the record, or name all classes: labels = [\"NAME\", \"NAME\"]")
    })
}

/// The number that a text is; `None` of text that is none, and of infinity.
pub(super) fn number(text: &str) -> Option<f32> {
    text.trim()
        .parse()
        .ok()
        .filter(|number: &f32| number.is_finite())
}

/// A text and its label; without `labels` the label is not read.
fn labelled(
    record: &Record,
    columns: Columns,
    labels: &[String],
    kind: LabelKind,
) -> Result<TypedRecord> {
    let text = text(&record.fields, columns, "text")?;
    if labels.is_empty() {
        let label = Label::Class(0);
        return Ok(TypedRecord::Labelled { text, label });
    }
    let names = label_texts(record, columns, false)?;
    if kind == LabelKind::Labels {
        let mut values = vec![0.0; labels.len()];
        for name in &names {
            values[known_class(name, labels)? as usize] = 1.0;
        }
        let label = Label::Values(values);
        return Ok(TypedRecord::Labelled { text, label });
    }
    let [name] = names.as_slice() else {
        return Err(Error::new(Kind::Data, "a record has several labels, or none")
            .value(names.join(", "))
            .rule("one label")
            .hint("for several labels write `problem_type = \"multi_label_classification\"` in [model]"));
    };
    let label = if kind == LabelKind::Number {
        let value = number(name).ok_or_else(|| {
            Error::new(Kind::Data, "a record's label is not a number")
                .value(name)
                .rule("a finite number, the target of a regression")
                .hint("correct the record, or set `on_bad_record = \"skip\"`")
        })?;
        Label::Values(vec![value])
    } else {
        Label::Class(known_class(name, labels)?)
    };
    Ok(TypedRecord::Labelled { text, label })
}

/// Words and their classes; without `labels` the classes are not read.
fn labelled_words(record: &Record, columns: Columns, labels: &[String]) -> Result<TypedRecord> {
    let words = list(&record.fields, columns, "tokens")?;
    if labels.is_empty() {
        let labels = vec![0; words.len()];
        return Ok(TypedRecord::LabelledWords { words, labels });
    }
    let names = label_texts(record, columns, true)?;
    if names.len() != words.len() {
        return Err(Error::new(
            Kind::Data,
            "a record has another number of labels than of words",
        )
        .value(format!("{} labels, {} words", names.len(), words.len()))
        .hint("correct the record, or set `on_bad_record = \"skip\"`"));
    }
    let labels = names.iter().map(|name| known_class(name, labels));
    let labels = labels.collect::<Result<_>>()?;
    Ok(TypedRecord::LabelledWords { words, labels })
}

/// A prompt in its template, and its completion.
fn templated(
    prompt: String,
    completion: String,
    template: Option<&PromptTemplate>,
) -> Result<TypedRecord> {
    let prompt = match template {
        None => prompt,
        Some(PromptTemplate::Text { before, after }) => format!("{before}{prompt}{after}"),
        Some(PromptTemplate::Chat) => {
            let list = [
                json!({"role": "user", "content": prompt}),
                json!({"role": "assistant", "content": completion}),
            ];
            return messages::from_list(&list, None, None).map(TypedRecord::Chat);
        }
    };
    Ok(TypedRecord::Completion { prompt, completion })
}

fn completion(
    record: &Map<String, Value>,
    columns: Columns,
    template: Option<&PromptTemplate>,
) -> Result<TypedRecord> {
    let (prompt, completion) = columns.pair(record).unwrap_or(PAIRS[0]);
    let messages = (columns.get(record, prompt), columns.get(record, completion));
    if let (Some(Value::Array(prompt)), Some(Value::Array(completion))) = messages {
        if let Some(PromptTemplate::Text { .. }) = template {
            return Err(Error::new(
                Kind::Data,
                "a record's prompt is a list of messages, not text",
            )
            .rule("`data.prompt_template` is put around a text")
            .hint("remove `data.prompt_template`"));
        }
        let tools = columns.get(record, "tools");
        return messages::from_prompt_and_completion(prompt, completion, tools)
            .map(TypedRecord::Chat);
    }
    let prompt = text(record, columns, prompt)?;
    templated(prompt, text(record, columns, completion)?, template)
}

fn instruction(
    record: &Map<String, Value>,
    columns: Columns,
    template: Option<&PromptTemplate>,
) -> Result<TypedRecord> {
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
    let instruction = text(record, columns, "instruction")?;
    let prompt = match template {
        None => alpaca::prompt(&instruction, &input),
        Some(_) if input.is_empty() => instruction,
        Some(_) => format!("{instruction}\n{input}"),
    };
    templated(prompt, text(record, columns, "output")?, template)
}

fn conversation(record: &Map<String, Value>, columns: Columns) -> Result<TypedRecord> {
    let list = CONVERSATIONS
        .iter()
        .find_map(|name| columns.get(record, name));
    let list = list.ok_or_else(|| missing(record, columns, "messages"))?;
    let list = messages::list(list)?;
    let system = record
        .get("system")
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty());
    messages::from_list(&list, system, columns.get(record, "tools")).map(TypedRecord::Chat)
}

#[cfg(test)]
mod tests {
    use super::super::options::{OnBadRecord, TxtUnit};
    use super::*;
    use crate::data::read::Location;

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

    fn detected(values: &[Value], columns: &[(String, String)]) -> Result<Format> {
        let mut seen = FieldsSeen::default();
        for value in values {
            seen.add(&record(value.clone()), Columns(columns));
        }
        let format = seen.format(Columns(columns));
        format.ok_or_else(|| seen.no_format(Columns(columns)).unwrap())
    }

    fn interpreted(
        record: &Record,
        format: Format,
        columns: Columns,
        template: Option<&PromptTemplate>,
    ) -> Result<TypedRecord> {
        let options = Options {
            format,
            columns: columns.0.to_vec(),
            max_length: 64,
            on_bad_record: OnBadRecord::Stop,
            txt_unit: TxtUnit::Paragraph,
            prompt_template: template.cloned(),
            labels: Vec::new(),
            label_kind: LabelKind::Class,
        };
        interpret(record, format, &options)
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
            (
                json!({"messages": "[{\"role\": \"user\"}]"}),
                Format::Messages,
            ),
            (json!({"conversations": []}), Format::Messages),
        ] {
            // Records with nulls and without the fields decide nothing, wherever they stand.
            let nulls = json!({"messages": null, "prompt": null, "completion": null, "instruction": null, "text": null});
            for records in [[&fields, &nulls], [&nulls, &fields], [&json!({}), &fields]] {
                let found = detected(&records.map(Value::clone), &[]);
                assert_eq!(found.unwrap(), format, "{fields}");
            }
        }
        let halves = [
            json!({"prompt": "a", "completion": null}),
            json!({"prompt": null, "completion": "b"}),
        ];
        assert_eq!(detected(&halves, &[]).unwrap(), Format::Completion);
        assert!(detected(&[json!({"messages": "hello"})], &[]).is_err());
    }

    #[test]
    fn fields_of_no_format_are_listed_and_a_map_names_one() {
        let fields = json!({"sentence": "a", "label": 1, "messages": []});
        let unknown = json!({"sentence": "a", "label": 1});
        let error = detected(&[unknown], &[]).unwrap_err().to_string();
        assert!(
            error.contains("sentence, label") && error.contains("f.jsonl, line 7"),
            "{error}"
        );
        let columns = [("prompt", "sentence"), ("completion", "label")];
        let columns = columns.map(|(field, column)| (field.to_string(), column.to_string()));
        let found = detected(&[fields], &columns).unwrap();
        assert_eq!(found, Format::Completion);
    }

    #[test]
    fn columns_reach_into_nested_fields_and_numbers_are_text() {
        let columns = [
            ("prompt".to_string(), "extra.q".to_string()),
            ("completion".to_string(), "label".to_string()),
        ];
        let typed = interpreted(
            &record(json!({"extra": {"q": "Q"}, "label": 1})),
            Format::Completion,
            Columns(&columns),
            None,
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
        let error = detected(&[json!({"question": "a", "answer": "b"})], &columns).unwrap_err();
        assert!(error.to_string().contains("`extra.q`"), "{error}");
        assert!(interpreted(&other, Format::Completion, Columns(&columns), None).is_err());
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
            let error = interpreted(&record(fields), format, Columns(&[]), None).unwrap_err();
            assert!(
                error.kind() == Kind::Data && error.to_string().contains("f.jsonl, line 7"),
                "{error}"
            );
        }
    }

    #[test]
    fn alpaca_has_two_prompts_and_refuses_what_it_cannot_place() {
        let typed = |value| interpreted(&record(value), Format::Alpaca, Columns(&[]), None);
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

    #[test]
    fn a_prompt_is_put_into_its_template() {
        let pair = json!({"prompt": "P", "completion": "C"});
        let alpaca = json!({"instruction": "I", "input": "X", "output": "C"});
        for (fields, format, template, prompt) in [
            (&pair, Format::Completion, "Q: {prompt}\nA: ", "Q: P\nA: "),
            (&alpaca, Format::Alpaca, "{prompt} ", "I\nX "),
        ] {
            let template = Some(&template.parse().unwrap());
            let typed =
                interpreted(&record(fields.clone()), format, Columns(&[]), template).unwrap();
            let completion = "C".to_string();
            assert_eq!(
                typed,
                TypedRecord::Completion {
                    prompt: prompt.into(),
                    completion
                }
            );
        }
        let chat = Some(&PromptTemplate::Chat);
        let typed = interpreted(&record(pair), Format::Completion, Columns(&[]), chat).unwrap();
        let TypedRecord::Chat(chat) = typed else {
            panic!("{typed:?}")
        };
        assert_eq!(
            chat.messages,
            [
                json!({"role": "user", "content": "P"}),
                json!({"role": "assistant", "content": "C"})
            ]
        );
        for bad in ["", "prompt", "{prompt}{prompt}"] {
            assert!(bad.parse::<PromptTemplate>().is_err(), "{bad}");
        }
    }
}
