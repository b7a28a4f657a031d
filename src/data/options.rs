//! How records are read and encoded: the choices a recipe or a command line makes.
//!
//! Plain values without behaviour, so that a recipe can hold them.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::Serialize;

/// File extensions that can be read.
pub const EXTENSIONS: [&str; 6] = ["jsonl", "json", "csv", "tsv", "txt", "parquet"];

/// The fields that `data.columns` may map: those of the record formats.
pub const COLUMN_FIELDS: [&str; 11] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "tools",
    "instruction",
    "input",
    "output",
    "label",
    "tokens",
    "labels",
];

/// How a record is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// By the records' fields.
    Auto,
    /// `{text}`.
    Text,
    /// `{prompt, completion}` or `{question, answer}`; two lists of messages make a conversation, as in TRL.
    Completion,
    /// `{messages}` or ShareGPT's `{conversations}`.
    Messages,
    /// `{instruction, input, output}`.
    Alpaca,
    /// `{text, label}`, or the words and their classes, `{tokens, labels}`.
    Classification,
}

/// Effect of a record that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRecord {
    /// Stops loading, naming file and line.
    Stop,
    /// Is left out and counted.
    Skip,
}

/// What the label of a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LabelKind {
    /// One class.
    #[default]
    Class,
    /// A list of those labels that apply.
    Labels,
    /// A number.
    Number,
    /// A class of each word.
    ClassesOfWords,
}

/// How a `.txt` file is cut into texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum TxtUnit {
    /// One text per blank-line paragraph.
    Paragraph,
    /// One text per file.
    File,
}

/// What a prompt becomes before its completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptTemplate {
    /// Text around the prompt.
    Text {
        /// Before it.
        before: String,
        /// Between it and the completion.
        after: String,
    },
    /// The user's turn of the model's chat template; the completion is the assistant's.
    Chat,
}

impl PromptTemplate {
    /// The values that are read.
    pub const RULE: &str = "a text that holds `{prompt}` once, or \"chat\"";
    const PROMPT: &str = "{prompt}";
}

impl FromStr for PromptTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(Self::PROMPT) {
            _ if text == "chat" => Ok(Self::Chat),
            Some((before, after)) if !after.contains(Self::PROMPT) => Ok(Self::Text {
                before: before.to_string(),
                after: after.to_string(),
            }),
            _ => Err(Self::RULE.to_string()),
        }
    }
}

impl fmt::Display for PromptTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text { before, after } => write!(f, "{before}{}{after}", Self::PROMPT),
            Self::Chat => f.write_str("chat"),
        }
    }
}

/// How files are read and encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How a record is read.
    pub format: Format,
    /// Wanted field -> the file's column.
    pub columns: Vec<(String, String)>,
    /// Longest example in tokens, at least 2.
    pub max_length: usize,
    /// Effect of a record that cannot be read.
    pub on_bad_record: OnBadRecord,
    /// How a `.txt` file is cut into texts.
    pub txt_unit: TxtUnit,
    /// What a prompt becomes; `None`: as the format has it.
    pub prompt_template: Option<PromptTemplate>,
    /// Names of the classes, by id; empty: the class of a record is not read.
    pub labels: Vec<String>,
    /// What the label of a record is.
    pub label_kind: LabelKind,
}
