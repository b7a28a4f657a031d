//! Suggestions: the key nearest to one that does not exist, the word nearest to one that is no choice.
//!
//! Takes what was written, returns a hint. Never corrects: what is unknown stays an error.

use super::diagnostic::Diagnostics;
use super::key::{KEYS, Key, of_table};
use super::sections::TABLES;
use super::tree::{Entry, Raw};
use crate::text::nearest;

/// What other programs call a choice.
const FOREIGN_WORDS: [(&str, &str); 9] = [
    ("bfloat16", "bf16"),
    ("float32", "f32"),
    ("fp32", "f32"),
    ("float16", "f16"),
    ("fp16", "f16"),
    ("half", "f16"),
    ("chat", "messages"),
    ("sharegpt", "messages"),
    ("full", "none"),
];

/// Likeness (Jaro-Winkler, 0 to 1) from which a name of the same table is suggested.
const ALIKE: f64 = 0.8;
/// The same for a name of another table, where a chance likeness misleads more.
const VERY_ALIKE: f64 = 0.92;

/// Reports a key that `table` (empty: the top) does not have.
pub(super) fn note_unknown(table: &str, entry: &Entry, diagnostics: &mut Diagnostics<'_>) {
    let is_table = table.is_empty() && matches!(entry.node.raw, Raw::Table(_));
    let (place, whole) = if table.is_empty() {
        (
            "at the top of the recipe".to_string(),
            "a recipe".to_string(),
        )
    } else {
        (format!("in `[{table}]`"), format!("`[{table}]`"))
    };
    let (what, meant) = if is_table {
        let tables = TABLES.iter().map(|(name, _)| *name);
        let meant =
            nearest(&entry.key, tables, ALIKE).map(|name| format!("did you mean `[{name}]`?"));
        (format!("unknown table `[{}]`", entry.key), meant)
    } else {
        let on_command_line = diagnostics.is_override(entry.key_span);
        let meant =
            nearest_key(table, &entry.key).map(|key| did_you_mean(table, key, on_command_line));
        (format!("unknown key `{}` {place}", entry.key), meant)
    };
    let hint = meant.unwrap_or_else(|| format!("remove it; {whole} has {}", listed(table)));
    diagnostics.add(entry.key_span, what, "", hint);
}

fn listed(table: &str) -> String {
    let tables = TABLES
        .iter()
        .filter(|_| table.is_empty())
        .map(|(name, _)| format!("`[{name}]`"));
    let names: Vec<String> = of_table(table)
        .map(|key| format!("`{}`", key.name))
        .chain(tables)
        .collect();
    names.join(", ")
}

/// By its exact name elsewhere, by the name other trainers give it, by likeness; the same table first.
fn nearest_key(table: &str, name: &str) -> Option<&'static Key> {
    let known_as = |key: &&Key| key.known_as.contains(&name);
    let all = || KEYS.iter().copied();
    let alike = |keys: Vec<&'static Key>, least| {
        let best = nearest(name, keys.iter().map(|key| key.name), least)?;
        keys.into_iter().find(|key| key.name == best)
    };
    of_table(table)
        .find(known_as)
        .or_else(|| all().find(|key| key.name == name))
        .or_else(|| alike(of_table(table).collect(), ALIKE))
        .or_else(|| all().find(known_as))
        .or_else(|| alike(all().collect(), VERY_ALIKE))
}

/// Where `key` belongs, for a user who wrote it under `table`.
fn did_you_mean(table: &str, key: &Key, on_command_line: bool) -> String {
    let name = key.name;
    if on_command_line {
        format!("did you mean `--set {}=...`?", key.path())
    } else if key.table == table {
        format!("did you mean `{name}`?")
    } else if key.table.is_empty() {
        format!("did you mean `{name}`, at the top of the file above the first `[table]`?")
    } else {
        format!("did you mean `{name}`, under `[{}]`?", key.table)
    }
}

/// `did you mean` for a choice, if one of `words` is near.
pub(super) fn nearest_word<'a>(written: &str, words: &[&'a str]) -> Option<&'a str> {
    let foreign = FOREIGN_WORDS.iter().find(|(name, _)| *name == written);
    let known = |word: &&str| foreign.is_some_and(|(_, meaning)| meaning == word);
    let words = || words.iter().copied();
    words()
        .find(known)
        .or_else(|| nearest(written, words(), 0.7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn meant(table: &str, name: &str, path: &str) {
        assert_eq!(
            nearest_key(table, name).map(Key::path).as_deref(),
            Some(path),
            "[{table}] {name}"
        );
    }

    #[test]
    fn slips_other_trainers_names_and_wrong_tables_find_their_key() {
        meant("train", "lerning_rate", "train.learning_rate");
        meant("train", "learning-rate", "train.learning_rate");
        meant("train", "lr", "train.learning_rate");
        meant("adapter", "learning_rate", "train.learning_rate");
        meant("", "steps", "train.steps");
        meant("data", "batch_size", "train.micro_batch_size");
        meant("adapter", "rank", "adapter.r");
        meant("data", "seed", "seed");
        assert!(nearest_key("train", "flux_capacitor").is_none());
    }
}
