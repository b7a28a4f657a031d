//! A recipe as text: as resolved, with every default; to start from; and as a reference of every key.
//!
//! Takes a `Recipe`, or nothing, returns TOML that reads back as the same, or Markdown. Layout, order and comments come from
//! the declarations.

use std::fmt::Write;

use toml_edit::Value;

use super::key::{KEYS, Key, Keys, Presence, of_table};
use super::sections::{Adapter, Recipe, TABLES};
use crate::adapter::options::LoraConfig;

/// Column at which a comment starts, where the value leaves room.
const COMMENT: usize = 40;

/// `key = value`; commented out where it has no effect.
struct Line {
    key: &'static Key,
    value: String,
    commented: bool,
}

impl Recipe {
    /// The recipe as resolved: every default written out, paths absolute. Reading it back gives the same recipe.
    ///
    /// With `adapter.init_from`, keys that the adapter decides and the recipe does not give are commented out: they would
    /// contradict the adapter.
    pub fn to_toml(&self) -> String {
        let mut written = Vec::new();
        self.write(&mut written);
        let lines = written.into_iter().filter_map(|(key, value)| {
            Some(Line {
                key,
                value: value?.to_string(),
                commented: self.is_left_to_the_adapter(key),
            })
        });
        let head = "# As resolved by wattune: every default is written out, paths are absolute.\n";
        lay_out(head, lines)
    }

    /// `table.key = value` of every key that differs from its default, one a line: what identifies a recipe. A later
    /// version's new keys and reworded comments leave it as it is.
    pub fn changed_keys(&self) -> String {
        let mut written = Vec::new();
        self.write(&mut written);
        let mut text = String::new();
        for (key, value) in written {
            let Some(value) = value else {
                continue;
            };
            let is_default = key.presence == Presence::Defaulted && is_same(&value, key.value);
            if !is_default && !self.is_left_to_the_adapter(key) {
                let _ = writeln!(text, "{}.{} = {value}", key.table, key.name);
            }
        }
        text
    }

    /// The keys that decide what is trained, with their values: those of [adapter] and [train], and a few of other tables.
    pub fn hyperparameters(&self) -> serde_json::Map<String, serde_json::Value> {
        const OTHERS: [&str; 4] = ["seed", "model.dtype", "data.max_length", "data.packing"];
        let mut written = Vec::new();
        self.write(&mut written);
        let is_one = |key: &Key| {
            ["adapter", "train"].contains(&key.table) || OTHERS.contains(&key.path().as_str())
        };
        let pairs = written.into_iter().filter(|(key, _)| is_one(key));
        pairs
            .filter_map(|(key, value)| {
                // TOML writes numbers, flags, texts and lists as JSON does.
                let text = value?.to_string();
                let json = serde_json::from_str(text.trim()).unwrap_or_else(|_| text.into());
                Some((key.path(), json))
            })
            .collect()
    }

    fn is_left_to_the_adapter(&self, key: &Key) -> bool {
        match &self.adapter {
            Adapter::Lora(lora) if lora.init_from.is_some() && key.table == "adapter" => {
                let given = lora.written.iter().any(|name| name == key.name);
                let not_peft = ["type", "loraplus_lr_ratio", "portable", "init_from"];
                !given && !not_peft.contains(&key.name)
            }
            _ => false,
        }
    }
}

/// `key = value` of a LoRA key as a recipe writes it; `None` where it is not written.
pub fn lora_setting(config: &LoraConfig, key: &str) -> Option<String> {
    let mut written = Vec::new();
    config.write(&mut written);
    let (key, value) = written.into_iter().find(|(found, _)| found.name == key)?;
    Some(format!("{} = {}", key.name, value?))
}

/// A commented recipe to start from: keys that most runs set are written, all others are comments with their default.
pub fn starter() -> String {
    let head = "# A wattune recipe. Paths are relative to this file. Uncomment a line to change its default.\n\
                # Check it with `wattune recipe check FILE`, forecast it with `wattune plan FILE`.\n";
    let lines = KEYS.iter().map(|key| Line {
        key,
        value: key.value.to_string(),
        commented: !key.in_starter,
    });
    lay_out(head, lines)
}

/// The lines under their tables, each followed by its meaning.
fn lay_out(head: &str, lines: impl Iterator<Item = Line>) -> String {
    let mut text = head.to_string();
    let mut table = "";
    for line in lines {
        if line.key.table != table {
            table = line.key.table;
            let about = about(table);
            let _ = write!(text, "\n# {about}.\n[{table}]\n");
        }
        let Line {
            key,
            value,
            commented,
        } = line;
        let mark = if commented { "# " } else { "" };
        let words = key.values().words;
        let words = if words.is_empty() {
            String::new()
        } else {
            format!(" ({})", words.join(" | "))
        };
        let absent = if commented && key.presence == Presence::Optional {
            "; none unless given"
        } else {
            ""
        };
        let pair = format!("{mark}{} = {value}", key.name);
        let _ = writeln!(text, "{pair:COMMENT$} # {}{words}{absent}", key.doc());
    }
    text
}

/// Whether a value is the one that `text` writes: `32.0` and `32` are.
fn is_same(value: &Value, text: &str) -> bool {
    let number = value
        .as_float()
        .or(value.as_integer().map(|number| number as f64));
    number.map_or_else(
        || value.to_string() == text,
        |number| text.parse() == Ok(number),
    )
}

pub(super) fn about(table: &str) -> &'static str {
    let known = TABLES.iter().find(|(name, _)| *name == table);
    known.map(|(_, about)| *about).unwrap_or_default()
}

/// Every key with its rule, default and meaning, in Markdown.
pub fn reference() -> String {
    let mut text = "# Recipe reference\n\n\
        A recipe is one TOML file. Every key below may also be given on the command line as `--set TABLE.KEY=VALUE`.\n\
        Relative paths count from the recipe's directory. `wattune recipe init` writes a commented recipe to start from,\n\
        `wattune recipe schema` prints a JSON Schema for editors.\n"
        .to_string();
    for (table, about) in std::iter::once(("", "")).chain(TABLES) {
        if table.is_empty() {
            text += "\n## Top of the file\n";
        } else {
            let _ = write!(text, "\n## `[{table}]`\n\n{about}.\n");
        }
        text += "\n| Key | Meaning | Value | Default |\n| --- | --- | --- | --- |\n";
        for key in of_table(table) {
            let default = match key.presence {
                Presence::Required => format!("required, such as `{}`", key.value),
                Presence::Optional => format!("none; for example `{}`", key.value),
                Presence::Defaulted => format!("`{}`", key.value),
            };
            let cells = [key.doc(), &key.rule(), &default].map(|cell| cell.replace('|', "\\|"));
            let _ = writeln!(text, "| `{}` | {} |", key.name, cells.join(" | "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::recipe::parse;

    #[test]
    fn only_changed_keys_identify_a_recipe() {
        let changed = |adapter: &str| {
            let text = format!(
                "[model]\nid = \"embedded:tiny\"\n[data]\ntrain = \"a.jsonl\"\n[train]\nsteps = 5\n[adapter]\n{adapter}"
            );
            parse(&text, Path::new("/a/b.toml"), &[])
                .unwrap()
                .changed_keys()
        };
        assert_eq!(changed(""), changed("r = 16\n"));
        assert!(!changed("").contains("adapter."), "{}", changed(""));
        // An optional key has no default: its example is a value like any other.
        let own = changed("r = 8\nloraplus_lr_ratio = 16.0\n");
        assert!(
            own.contains("adapter.r = 8\nadapter.loraplus_lr_ratio = 16.0\n"),
            "{own}"
        );
    }
}
