//! Reads the tree by the table of keys: unknown keys, missing keys, types and ranges, each mistake noted.
//!
//! Takes the tree, returns `Given`: a value for every key that has one, and what the recipe itself wrote. A value that broke its
//! rule is noted and stood in for, so that one mistake hides no other. Knows nothing of what keys mean together.

use std::ops::RangeInclusive;

use super::given::{Given, Value};
use super::keys::{self, ALL_LINEAR, FIELDS, KEYS, Key, Kind, Presence, Quantity, Range, TABLES};
use super::mistake::Mistakes;
use super::raw::{self, Entry, Node, Place, Raw, Source};
use super::suggest;
use crate::units::GramsPerKwh;

/// Reads every entry, then fills in defaults and notes what is missing.
pub(super) fn given(entries: &[Entry], mistakes: &mut Mistakes) -> Given {
    let mut given = Given::default();
    for entry in entries {
        match TABLES.iter().find(|(name, _)| *name == entry.key) {
            Some((table, _)) => read_table(table, entry, &mut given, mistakes),
            None => read_key("", entry, &mut given, mistakes),
        }
    }
    for key in KEYS.iter().filter(|key| key.presence != Presence::Optional) {
        if key.presence == Presence::Needed && given.written(key.path).is_none() {
            let place = given.place_of_table(key.split().0, mistakes);
            mistakes.add(
                place,
                format!("`{}` is missing", key.path),
                rule(key),
                given.remedy_for_missing(key),
            );
        }
        given.values.entry(key.path).or_insert_with(|| builtin(key));
    }
    given
}

fn read_table(table: &'static str, entry: &Entry, given: &mut Given, mistakes: &mut Mistakes) {
    given.tables.insert(table, entry.key_place);
    let Raw::Table(inner) = &entry.node.raw else {
        let what = format!(
            "`{table}` is {} where a table is needed",
            entry.node.raw.called()
        );
        let rule = format!("`[{table}]` on a line of its own, its keys below");
        let example = keys::of_table(table)
            .next()
            .map(Key::sample)
            .unwrap_or_default();
        return mistakes.add(
            entry.node.place,
            what,
            rule,
            format!("write `[{table}]`, and below it for example `{example}`"),
        );
    };
    for entry in inner {
        read_key(table, entry, given, mistakes);
    }
}

fn read_key(table: &str, entry: &Entry, given: &mut Given, mistakes: &mut Mistakes) {
    let Some(key) = keys::of_table(table).find(|key| key.name() == entry.key) else {
        return suggest::unknown_key(table, entry, mistakes);
    };
    given.written.insert(key.path, entry.node.place);
    if let Some(value) = read_value(key, &entry.node, mistakes) {
        given.values.insert(key.path, value);
    }
}

/// The table's own default or example.
fn builtin(key: &Key) -> Value {
    let sources = [Source {
        name: key.path.to_string(),
        text: format!("x = {}", key.value),
        is_override: false,
    }];
    let mut mistakes = Mistakes::new(&sources);
    let value = raw::read(&sources, &mut mistakes)
        .and_then(|entries| read_value(key, &entries.first()?.node, &mut mistakes));
    value.expect("the table's own values obey its rules")
}

/// The example after a mistake, in the form of the place where the mistake is.
fn as_in(key: &Key, place: Place, mistakes: &Mistakes) -> String {
    let shown = if key.path == "name" {
        "\"my-run\""
    } else {
        key.value
    };
    match mistakes.is_override(place) {
        true => format!("write for example `--set '{}={shown}'`", key.path),
        false => format!("write for example `{} = {shown}`", key.name()),
    }
}

/// The rule of a key, in words.
pub(super) fn rule(key: &Key) -> String {
    match &key.kind {
        Kind::Text => "text in double quotes, not empty".into(),
        Kind::Name => {
            "text in double quotes, without `/`, `\\` or control characters, and not `.` or `..`"
                .into()
        }
        Kind::Choice(words) => format!("one of {}", quoted(&words())),
        Kind::ChoiceOrCount { words, of } => {
            format!("one of {}, or a number of {of}", quoted(&words()))
        }
        Kind::Flag => "`true` or `false`, without quotes".into(),
        Kind::Count { least, .. } => format!("a whole number of at least {least}"),
        Kind::Number(range) => range.rule(),
        Kind::Quantity(quantity) => {
            let rule = (quantity.read)("")
                .err()
                .map(|error| error.rule)
                .unwrap_or_default();
            let zero = if quantity.zero {
                ""
            } else {
                ", more than zero"
            };
            let quotes = if quantity.bare {
                ""
            } else {
                ", in double quotes"
            };
            format!("{rule}{zero}{quotes}")
        }
        Kind::Grid => {
            "a grid's name in double quotes, or a finite number of gCO2e/kWh of at least 0".into()
        }
        Kind::Modules { all_linear } => {
            let word = if *all_linear { "\"all-linear\", " } else { "" };
            format!("{word}a list of module names, or a regex for a module's whole path")
        }
        Kind::Layers => "a list of layer numbers, from 0".into(),
        Kind::Ranks => "a table of module patterns, each with a whole number of at least 1".into(),
        Kind::Alphas => "a table of module patterns, each with a finite number above 0".into(),
        Kind::Columns => format!(
            "a table of the file's columns by wanted field ({})",
            FIELDS.join(", ")
        ),
    }
}

fn quoted(words: &[&str]) -> String {
    words
        .iter()
        .map(|word| format!("\"{word}\""))
        .collect::<Vec<_>>()
        .join(", ")
}

/// A value that obeys the key's rule, or `None` with the mistake noted.
fn read_value(key: &Key, node: &Node, mistakes: &mut Mistakes) -> Option<Value> {
    let on_command_line = mistakes.is_override(node.place);
    match (&key.kind, &node.raw) {
        // `--set model.revision=1234567`: what the shell passed is the text that was meant.
        (Kind::Text | Kind::Name, Raw::Integer(_) | Raw::Float(_) | Raw::Flag(_) | Raw::Date)
            if on_command_line =>
        {
            Some(Value::Text(mistakes.words(node.place).to_string()))
        }
        (Kind::Text, Raw::Text(text)) => {
            fits(key, node, !text.trim().is_empty(), mistakes).then(|| Value::Text(text.clone()))
        }
        (Kind::Name, Raw::Text(text)) => {
            fits(key, node, is_name(text), mistakes).then(|| Value::Text(text.clone()))
        }
        (Kind::Choice(words) | Kind::ChoiceOrCount { words, .. }, Raw::Text(text)) => {
            read_choice(key, node, text, &words(), mistakes)
        }
        (Kind::ChoiceOrCount { .. }, Raw::Integer(number)) => {
            read_count(key, node, *number, 0..=keys::MANY, mistakes)
        }
        (Kind::Flag, Raw::Flag(flag)) => Some(Value::Flag(*flag)),
        (Kind::Count { least, most }, Raw::Integer(number)) => {
            read_count(key, node, *number, *least..=*most, mistakes)
        }
        (Kind::Number(range), raw) if number_of(raw).is_some() => {
            let number = number_of(raw)?;
            fits(key, node, range.holds(number), mistakes).then_some(Value::Number(number))
        }
        (Kind::Quantity(quantity), Raw::Text(text)) => {
            read_quantity(key, node, text, quantity, mistakes)
        }
        (Kind::Quantity(quantity), Raw::Integer(_) | Raw::Float(_)) if quantity.bare => {
            read_quantity(key, node, mistakes.words(node.place), quantity, mistakes)
        }
        (Kind::Grid, Raw::Text(text)) => {
            // A text that reads as a number is one.
            let sound = text
                .trim()
                .parse::<f64>()
                .map_or(!text.trim().is_empty(), at_least_zero);
            fits(key, node, sound, mistakes).then(|| Value::Text(text.clone()))
        }
        (Kind::Grid, raw) if number_of(raw).is_some() => {
            let number = number_of(raw)?;
            fits(key, node, at_least_zero(number), mistakes)
                .then(|| Value::Text(GramsPerKwh(number).0.to_string()))
        }
        (Kind::Modules { all_linear }, Raw::Text(text)) => {
            let sound =
                (*all_linear && text == ALL_LINEAR) || read_pattern(key, node, text, mistakes);
            sound.then(|| Value::Text(text.clone()))
        }
        (Kind::Modules { .. }, Raw::List(items)) => read_names(key, node, items, mistakes),
        (Kind::Layers, Raw::List(items)) => read_layers(key, node, items, mistakes),
        (Kind::Layers, Raw::Integer(_)) => {
            read_layers(key, node, std::slice::from_ref(node), mistakes)
        }
        (Kind::Ranks | Kind::Alphas | Kind::Columns, Raw::Table(entries)) => {
            read_pairs(key, entries, mistakes)
        }
        _ => wrong_type(key, node, mistakes),
    }
}

fn at_least_zero(number: f64) -> bool {
    number.is_finite() && number >= 0.0
}

/// Whether a text can be part of a folder's name.
pub(super) fn is_name(text: &str) -> bool {
    text != "."
        && text != ".."
        && !text.contains(|c: char| matches!(c, '/' | '\\') || c.is_control())
}

fn number_of(raw: &Raw) -> Option<f64> {
    match raw {
        Raw::Integer(number) => Some(*number as f64),
        Raw::Float(number) => Some(*number),
        _ => None,
    }
}

/// Notes a value that breaks its rule; says whether it fits.
fn fits(key: &Key, node: &Node, fits: bool, mistakes: &mut Mistakes) -> bool {
    if !fits {
        let what = format!("`{}` cannot be {}", key.path, mistakes.words(node.place));
        mistakes.add(
            node.place,
            what,
            rule(key),
            as_in(key, node.place, mistakes),
        );
    }
    fits
}

fn wrong_type(key: &Key, node: &Node, mistakes: &mut Mistakes) -> Option<Value> {
    let unquoted = match (&node.raw, &key.kind) {
        (Raw::Text(text), Kind::Flag) => text.parse::<bool>().is_ok(),
        (Raw::Text(text), Kind::Count { .. }) => text.parse::<u64>().is_ok(),
        (Raw::Text(text), Kind::Number(_)) => text.parse::<f64>().is_ok(),
        _ => false,
    };
    let hint = match &node.raw {
        Raw::Text(text) if unquoted => format!("remove the quotes: `{} = {text}`", key.name()),
        _ => as_in(key, node.place, mistakes),
    };
    mistakes.add(
        node.place,
        format!("`{}` cannot be {}", key.path, node.raw.called()),
        rule(key),
        hint,
    );
    None
}

fn read_count(
    key: &Key,
    node: &Node,
    number: i128,
    range: RangeInclusive<u64>,
    mistakes: &mut Mistakes,
) -> Option<Value> {
    if number > i128::from(*range.end()) {
        let what = format!("`{}` cannot be {}", key.path, mistakes.words(node.place));
        mistakes.add(
            node.place,
            what,
            format!("a whole number of at most {}", range.end()),
            as_in(key, node.place, mistakes),
        );
        return None;
    }
    let count = u64::try_from(number)
        .ok()
        .filter(|count| range.contains(count));
    fits(key, node, count.is_some(), mistakes).then_some(Value::Count(count?))
}

fn read_choice(
    key: &Key,
    node: &Node,
    text: &str,
    words: &[&'static str],
    mistakes: &mut Mistakes,
) -> Option<Value> {
    if words.contains(&text) {
        return Some(Value::Text(text.to_string()));
    }
    let what = format!("`{}` cannot be {}", key.path, mistakes.words(node.place));
    let hint = match suggest::nearest_word(text, words) {
        Some(word) => format!("did you mean \"{word}\"?"),
        None => as_in(key, node.place, mistakes),
    };
    mistakes.add(node.place, what, rule(key), hint);
    None
}

fn read_quantity(
    key: &Key,
    node: &Node,
    text: &str,
    quantity: &Quantity,
    mistakes: &mut Mistakes,
) -> Option<Value> {
    let sound = (quantity.read)(text).is_ok_and(|number| {
        number.is_finite() && (number > 0.0 || (quantity.zero && number == 0.0))
    });
    fits(key, node, sound, mistakes).then(|| Value::Text(text.to_string()))
}

/// Whether `text` is a regex; module patterns are matched against a module's whole path.
fn read_pattern(key: &Key, node: &Node, text: &str, mistakes: &mut Mistakes) -> bool {
    let reason = match fancy_regex::Regex::new(&format!("^(?:{text})$")) {
        _ if text.is_empty() => "it is empty".to_string(),
        Ok(_) => return true,
        Err(error) => error
            .to_string()
            .lines()
            .last()
            .unwrap_or_default()
            .trim()
            .to_string(),
    };
    let what = format!(
        "`{}` holds something that is not a regex: {reason}",
        key.path
    );
    mistakes.add(
        node.place,
        what,
        rule(key),
        as_in(key, node.place, mistakes),
    );
    false
}

fn read_names(key: &Key, node: &Node, items: &[Node], mistakes: &mut Mistakes) -> Option<Value> {
    let names: Vec<Option<String>> = items
        .iter()
        .map(|item| match &item.raw {
            Raw::Text(name) if !name.is_empty() => Some(name.clone()),
            _ => {
                fits(key, item, false, mistakes);
                None
            }
        })
        .collect();
    fits(key, node, !items.is_empty(), mistakes)
        .then_some(Value::Names(names.into_iter().collect::<Option<_>>()?))
}

fn read_layers(key: &Key, node: &Node, items: &[Node], mistakes: &mut Mistakes) -> Option<Value> {
    let layers: Vec<Option<u64>> = items
        .iter()
        .map(|item| {
            let layer = if let Raw::Integer(number) = item.raw {
                u32::try_from(number).ok().map(u64::from)
            } else {
                None
            };
            fits(key, item, layer.is_some(), mistakes).then_some(layer?)
        })
        .collect();
    fits(key, node, !items.is_empty(), mistakes)
        .then_some(Value::Counts(layers.into_iter().collect::<Option<_>>()?))
}

/// A table of patterns or of columns; every entry is looked at, whatever the first one is like.
fn read_pairs(key: &Key, entries: &[Entry], mistakes: &mut Mistakes) -> Option<Value> {
    match key.kind {
        Kind::Ranks => pairs(entries, |entry| {
            let rank = if let Raw::Integer(rank) = entry.node.raw {
                u32::try_from(rank).ok().filter(|rank| *rank >= 1)
            } else {
                None
            };
            pattern_entry(key, entry, rank.map(u64::from), mistakes)
        })
        .map(Value::Ranks),
        Kind::Alphas => pairs(entries, |entry| {
            let positive = Range {
                low: 0.0,
                with_low: false,
                below: None,
            };
            let alpha = number_of(&entry.node.raw).filter(|alpha| positive.holds(*alpha));
            pattern_entry(key, entry, alpha, mistakes)
        })
        .map(Value::Alphas),
        _ => pairs(entries, |entry| read_column(key, entry, mistakes)).map(Value::Columns),
    }
}

fn pairs<T>(
    entries: &[Entry],
    read: impl FnMut(&Entry) -> Option<(String, T)>,
) -> Option<Vec<(String, T)>> {
    let read: Vec<Option<(String, T)>> = entries.iter().map(read).collect();
    read.into_iter().collect()
}

fn pattern_entry<T>(
    key: &Key,
    entry: &Entry,
    value: Option<T>,
    mistakes: &mut Mistakes,
) -> Option<(String, T)> {
    let named = Node {
        place: entry.key_place,
        raw: Raw::Text(entry.key.clone()),
    };
    let is_pattern = read_pattern(key, &named, &entry.key, mistakes);
    let sound = fits(key, &entry.node, value.is_some(), mistakes);
    (is_pattern && sound).then_some((entry.key.clone(), value?))
}

fn read_column(key: &Key, entry: &Entry, mistakes: &mut Mistakes) -> Option<(String, String)> {
    if !FIELDS.contains(&entry.key.as_str()) {
        let hint = match suggest::nearest_word(&entry.key, &FIELDS) {
            Some(field) => format!("did you mean `{field}`?"),
            None => "write the wanted field first, then the file's column: `columns = { prompt = \"question\" }`".to_string(),
        };
        mistakes.add(
            entry.key_place,
            format!("`{}` is no field that a record is made of", entry.key),
            rule(key),
            hint,
        );
        return None;
    }
    match &entry.node.raw {
        Raw::Text(column) if !column.is_empty() => Some((entry.key.clone(), column.clone())),
        _ => {
            fits(key, &entry.node, false, mistakes);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program's own defaults and examples pass the program's own rules.
    #[test]
    fn every_default_and_example_obeys_its_rule() {
        for key in KEYS {
            builtin(key);
            assert!(!rule(key).is_empty(), "{}", key.path);
        }
    }
}
