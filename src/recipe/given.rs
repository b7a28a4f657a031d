//! What a recipe gives: a value by path for every key that has one, and where the recipe itself wrote it.
//!
//! Filled by `read`, asked by `check`. Every value in it obeys its key's rule. Knows nothing of what keys mean together.

use std::collections::BTreeMap;

use super::keys::{self, Key};
use super::mistake::Mistakes;
use super::raw::Place;
use super::words::Word;

/// A value that obeys its key's rule.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Text(String),
    Flag(bool),
    Count(u64),
    Number(f64),
    Names(Vec<String>),
    Counts(Vec<u64>),
    Ranks(Vec<(String, u64)>),
    Alphas(Vec<(String, f64)>),
    Columns(Vec<(String, String)>),
}

/// What a recipe gives: its own values, and defaults where it has none.
#[derive(Default)]
pub(super) struct Given {
    /// By path.
    pub values: BTreeMap<&'static str, Value>,
    /// Where the recipe wrote a path, sound or not.
    pub written: BTreeMap<&'static str, Place>,
    /// Where the recipe named a table.
    pub tables: BTreeMap<&'static str, Place>,
}

impl Given {
    /// Where the recipe wrote `path`, if it did.
    pub fn written(&self, path: &str) -> Option<Place> {
        self.written.get(path).copied()
    }

    /// The paths of `table` that the recipe wrote, in the order of the table of keys.
    pub fn written_in<'a>(
        &'a self,
        table: &'a str,
    ) -> impl Iterator<Item = (&'static Key, Place)> + 'a {
        keys::of_table(table).filter_map(|key| Some((key, self.written(key.path)?)))
    }

    /// The value of `path`: absent only for an optional key.
    pub fn get(&self, path: &str) -> Option<&Value> {
        self.values.get(path)
    }

    /// A text or a word.
    pub fn text(&self, path: &str) -> Option<&str> {
        match self.get(path) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The value of a key that always has one, taken out by `pick`.
    fn sure<T>(&self, path: &str, pick: impl Fn(&Value) -> Option<T>) -> T {
        self.get(path)
            .and_then(pick)
            .expect("a key with a default has a value of its kind")
    }

    /// A flag with a default.
    pub fn flag(&self, path: &str) -> bool {
        self.sure(path, |value| {
            if let Value::Flag(flag) = value {
                Some(*flag)
            } else {
                None
            }
        })
    }

    /// A count with a default.
    pub fn count(&self, path: &str) -> u64 {
        self.sure(path, Value::count)
    }

    /// A count with a default, as a size in memory (its rule keeps it below 2^32).
    pub fn size(&self, path: &str) -> usize {
        self.count(path) as usize
    }

    /// A number with a default.
    pub fn number(&self, path: &str) -> f64 {
        self.sure(path, Value::number)
    }

    /// A choice with a default.
    pub fn word<W: Word>(&self, path: &str) -> W {
        self.sure(path, |value| {
            if let Value::Text(word) = value {
                W::from_word(word)
            } else {
                None
            }
        })
    }

    /// A quantity, if given; its rule has made sure that it reads.
    pub fn quantity<Q: std::str::FromStr>(&self, path: &str) -> Option<Q> {
        self.text(path).and_then(|text| text.parse().ok())
    }

    /// Where something missing from `table` is best shown: at the table's name, else at the end of the file.
    pub fn place_of_table(&self, table: &str, mistakes: &Mistakes) -> Place {
        self.tables
            .get(table)
            .copied()
            .unwrap_or_else(|| mistakes.end_of_file())
    }

    /// How to add `key` to the recipe.
    pub fn remedy_for_missing(&self, key: &Key) -> String {
        let (table, _) = key.split();
        match self.tables.contains_key(table) {
            true => format!("under `[{table}]` add `{}`", key.sample()),
            false => format!("add a line `[{table}]` and below it `{}`", key.sample()),
        }
    }
}

impl Value {
    /// The whole number in it.
    pub fn count(&self) -> Option<u64> {
        if let Value::Count(count) = self {
            Some(*count)
        } else {
            None
        }
    }

    /// The number in it.
    pub fn number(&self) -> Option<f64> {
        if let Value::Number(number) = self {
            Some(*number)
        } else {
            None
        }
    }
}
