//! What a person probably meant: the key nearest to one that does not exist, the word nearest to one that is no choice.
//!
//! Takes what was written, returns the remedy. Never decides for the person: what is unknown stays a mistake.

use super::keys::{self, KEYS, Key, TABLES};
use super::mistake::Mistakes;
use super::raw::{Entry, Raw};

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
pub(super) fn unknown_key(table: &str, entry: &Entry, mistakes: &mut Mistakes) {
    let is_table = table.is_empty() && matches!(entry.node.raw, Raw::Table(_));
    let shown = if is_table {
        format!("[{}]", entry.key)
    } else {
        entry.key.clone()
    };
    let whole = if table.is_empty() {
        "a recipe".to_string()
    } else {
        format!("`[{table}]`")
    };
    let meant = match is_table {
        true => nearest(&entry.key, TABLES.iter().map(|(name, _)| *name), ALIKE)
            .map(|name| format!("did you mean `[{name}]`?")),
        false => nearest_key(table, &entry.key)
            .map(|key| remedy(table, key, mistakes.is_override(entry.key_place))),
    };
    let hint = meant.unwrap_or_else(|| format!("remove it; {whole} has {}", listed(table)));
    mistakes.add(
        entry.key_place,
        format!("`{shown}` is no part of {whole}"),
        "",
        hint,
    );
}

fn listed(table: &str) -> String {
    let tables = TABLES
        .iter()
        .filter(|_| table.is_empty())
        .map(|(name, _)| format!("`[{name}]`"));
    let names: Vec<String> = keys::of_table(table)
        .map(|key| format!("`{}`", key.name()))
        .chain(tables)
        .collect();
    names.join(", ")
}

/// By its exact name elsewhere, by the name other trainers give it, by likeness; the same table first.
fn nearest_key(table: &str, name: &str) -> Option<&'static Key> {
    let known_as = |key: &&Key| key.known_as.contains(&name);
    let alike = |keys: &mut dyn Iterator<Item = &'static Key>, least| {
        let keys: Vec<&'static Key> = keys.collect();
        let best = nearest(name, keys.iter().map(|key| key.name()), least)?;
        keys.into_iter().find(|key| key.name() == best)
    };
    None.or_else(|| keys::of_table(table).find(known_as))
        .or_else(|| KEYS.iter().find(|key| key.name() == name))
        .or_else(|| alike(&mut keys::of_table(table), ALIKE))
        .or_else(|| KEYS.iter().find(known_as))
        .or_else(|| alike(&mut KEYS.iter(), VERY_ALIKE))
}

/// How to write `key` for someone who wrote under `table`.
fn remedy(table: &str, key: &Key, on_command_line: bool) -> String {
    let (home, name) = key.split();
    match () {
        () if on_command_line => format!("did you mean `--set {}=...`?", key.path),
        () if home == table => format!("did you mean `{name}`?"),
        () if home.is_empty() => {
            format!("did you mean `{name}`, at the top of the file above the first `[table]`?")
        }
        () => format!("did you mean `{name}`, under `[{home}]`?"),
    }
}

/// The candidate most like `word`, if it is at least so much alike. Case and `-` for `_` do not count.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
    least: f64,
) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    candidates
        .map(|candidate| (strsim::jaro_winkler(&word, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= least)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// `did you mean` for a choice, if one of `words` is near.
pub(super) fn nearest_word(written: &str, words: &[&'static str]) -> Option<&'static str> {
    let foreign = FOREIGN_WORDS
        .iter()
        .find(|(foreign, _)| *foreign == written)
        .map(|(_, word)| *word);
    foreign
        .filter(|word| words.contains(word))
        .or_else(|| nearest(written, words.iter().copied(), 0.7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn meant(table: &str, name: &str, path: &str) {
        assert_eq!(
            nearest_key(table, name).map(|key| key.path),
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
