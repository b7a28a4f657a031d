//! A recipe of chosen values, each below the reason for it.
//!
//! Takes keys with values and reasons, returns TOML in the order of the declarations. Knows no reason.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use toml_edit::Value;

use super::key::{KEYS, Key};
use super::write::about;

/// A key with its value and the reason for it.
#[derive(Debug, Clone, Serialize)]
pub struct Chosen {
    /// `table.key`.
    pub key: &'static str,
    /// The value in TOML.
    pub value: String,
    /// One sentence without a final full stop; empty: none.
    pub why: String,
}

impl Chosen {
    /// A choice.
    pub fn new(key: &'static str, value: impl Into<Value>, why: impl Into<String>) -> Self {
        let value = value.into();
        // A JSON string is a TOML string of one line.
        let text = value
            .as_str()
            .map(|text| serde_json::Value::from(text).to_string());
        Self {
            key,
            value: text.unwrap_or_else(|| value.to_string().trim().to_string()),
            why: why.into(),
        }
    }
}

/// The choices in the order of the declarations; of several for one key the last.
pub fn in_order(choices: &[Chosen]) -> Vec<Chosen> {
    let last = |key: &&'static Key| {
        let path = key.path();
        choices.iter().rfind(|choice| choice.key == path).cloned()
    };
    KEYS.iter().filter_map(last).collect()
}

/// A recipe of `choices` below the comment `head`; of several choices for one key the last holds.
pub fn commented(head: &str, choices: &[Chosen]) -> String {
    let mut text: String = head.lines().map(|line| format!("# {line}\n")).collect();
    let mut last = "";
    for choice in in_order(choices) {
        let (table, name) = choice.key.rsplit_once('.').unwrap_or(("", choice.key));
        if table != last {
            last = table;
            let _ = write!(text, "\n# {}.\n[{table}]\n", about(table));
        }
        if !choice.why.is_empty() {
            let _ = writeln!(text, "# {}", choice.why);
        }
        let _ = writeln!(text, "{name} = {}", choice.value);
    }
    text
}

/// A path as a recipe at `recipe` writes it: as it is in the same folder, else absolute. A hub id stays as it is.
pub fn path_from(recipe: &Path, path: &str) -> String {
    let in_this_folder = recipe
        .parent()
        .is_none_or(|folder| folder.as_os_str().is_empty());
    let is_local = Path::new(path).exists() || path.contains('*');
    match std::path::absolute(path) {
        Ok(absolute) if is_local && !in_this_folder => absolute.display().to_string(),
        _ => path.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_below_their_reasons_in_the_declared_order() {
        let choices = [
            Chosen::new("train.epochs", 3.0, ""),
            Chosen::new("model.id", "embedded:tiny", "given"),
            Chosen::new("train.epochs", 1.0, "many records"),
            Chosen::new("seed", 7, ""),
            Chosen::new("data.prompt_template", "{prompt}\n", ""),
        ];
        assert_eq!(
            commented("a recipe\nof two lines", &choices),
            "# a recipe\n# of two lines\nseed = 7\n\n# Which model.\n[model]\n# given\nid = \"embedded:tiny\"\n\n\
             # What it is trained on.\n[data]\nprompt_template = \"{prompt}\\n\"\n\n\
             # How it is trained.\n[train]\n# many records\nepochs = 1.0\n"
        );
    }
}
