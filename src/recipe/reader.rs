//! Reads keys from the tree of a recipe: absent, unknown and invalid ones are noted, none hides another.
//!
//! Takes the tree and the recipe's directory, gives each key's value. Knows how a diagnostic of a key is worded; knows no
//! key and no type.

use std::path::Path;
use std::str::FromStr;

use super::diagnostic::Diagnostics;
use super::key::{Key, Presence, of_table};
use super::sections::TABLES;
use super::setting::Setting;
use super::suggest;
use super::tree::{self, Node, Raw, RawRecipe, Source, Span};

/// Reads the keys of one recipe.
pub(super) struct Reader<'a, 's> {
    pub raw: &'a RawRecipe,
    /// The directory that relative paths count from; absolute.
    pub directory: &'a Path,
    pub diagnostics: &'a mut Diagnostics<'s>,
}

/// One key while its value is read.
pub(super) struct Field<'a, 's> {
    pub key: &'static Key,
    pub directory: &'a Path,
    pub diagnostics: &'a mut Diagnostics<'s>,
}

impl Reader<'_, '_> {
    /// Notes every key and table that does not exist, and every value where a table belongs.
    pub fn note_unknown(&mut self) {
        let raw = self.raw;
        for entry in &raw.0 {
            let table = TABLES.iter().find(|(name, _)| *name == entry.key);
            let (table, entries) = match (table, &entry.node.raw) {
                (Some((table, _)), Raw::Table(entries)) => (*table, entries.as_slice()),
                (Some((table, _)), _) => {
                    self.not_a_table(table, &entry.node);
                    continue;
                }
                (None, _) => ("", std::slice::from_ref(entry)),
            };
            for entry in entries {
                if !of_table(table).any(|key| key.name == entry.key) {
                    suggest::note_unknown(table, entry, self.diagnostics);
                }
            }
        }
    }

    fn not_a_table(&mut self, table: &str, node: &Node) {
        let found = node.raw.type_name();
        let example = of_table(table).next().map(Key::sample).unwrap_or_default();
        self.diagnostics.add(
            node.span,
            format!("`{table}` is {found} where a table is needed"),
            format!("`[{table}]` on a line of its own, its keys below"),
            format!("write `[{table}]`, and below it for example `{example}`"),
        );
    }

    /// The value of `key`: its default where it is absent, a valid value where it is missing or invalid, which is noted.
    pub fn value<T: Setting>(&mut self, key: &'static Key) -> T {
        let read = match self.raw.node(key) {
            Some(node) => {
                let mut field = Field {
                    key,
                    directory: self.directory,
                    diagnostics: self.diagnostics,
                };
                T::read(node, &mut field)
            }
            None => {
                if key.presence == Presence::Required {
                    let what = format!("`{}` is missing", key.path());
                    self.missing(key, what, key.rule(), String::new());
                }
                None
            }
        };
        read.unwrap_or_else(|| declared_value(key, self.directory))
    }

    /// Where the recipe gives a value to `key`.
    pub fn span(&self, key: &Key) -> Option<Span> {
        self.raw.node(key).map(|node| node.span)
    }

    /// Notes something missing at its table, else at the end of the file, with the line to add.
    pub fn missing(&mut self, key: &Key, what: String, rule: String, or: String) {
        let table = key.table;
        let span = self.raw.table_span(table);
        let add = if span.is_some() {
            format!("under `[{table}]` add `{}`{or}", key.sample())
        } else {
            format!("add a line `[{table}]` and below it `{}`{or}", key.sample())
        };
        let span = span.unwrap_or_else(|| self.diagnostics.end_of_file());
        self.diagnostics.add(span, what, rule, add);
    }

    /// Of two keys that say the same thing at most one may be given; the later one is pointed at.
    pub fn exclusive(&mut self, one: &Key, other: &Key) {
        let (Some(a), Some(b)) = (self.span(one), self.span(other)) else {
            return;
        };
        let (one, other) = (one.path(), other.path());
        let place = self.diagnostics.location(a.min(b));
        self.diagnostics.add(
            a.max(b),
            format!("`{one}` and `{other}` cannot both be given (the other one is at {place})"),
            format!("`{one}` or `{other}`"),
            "remove one of the two from the recipe",
        );
    }
}

/// The default of a key, or its example, as a value.
fn declared_value<T: Setting>(key: &'static Key, directory: &Path) -> T {
    if key.presence == Presence::Optional {
        return T::absent().expect("an optional key has a type with an absent value");
    }
    let sources = [Source {
        name: key.path(),
        text: format!("x = {}", key.value),
        is_override: false,
    }];
    let mut diagnostics = Diagnostics::new(&sources);
    let raw = tree::read(&sources, &mut diagnostics);
    let mut field = Field {
        key,
        directory,
        diagnostics: &mut diagnostics,
    };
    let value = raw.and_then(|raw| T::read(&raw.0.first()?.node, &mut field));
    value.expect("a declared value obeys its rule")
}

impl<'s> Field<'_, 's> {
    /// The characters of the value in its source.
    pub fn source_text(&self, node: &Node) -> &'s str {
        self.diagnostics.source_text(node.span)
    }

    /// Whether the value was given on the command line.
    pub fn is_override(&self, node: &Node) -> bool {
        self.diagnostics.is_override(node.span)
    }

    /// Notes a value that breaks the rule of its key.
    pub fn invalid<T>(&mut self, node: &Node) -> Option<T> {
        self.invalid_by(node, self.key.rule(), None)
    }

    /// Notes a value that breaks `rule`; without a hint the key's example is shown.
    pub fn invalid_by<T>(
        &mut self,
        node: &Node,
        rule: impl Into<String>,
        hint: Option<String>,
    ) -> Option<T> {
        let what = format!("`{}` cannot be {}", self.key.path(), self.source_text(node));
        self.note(node, what, rule, hint);
        None
    }

    /// Notes a value of another type.
    pub fn wrong_type<T>(&mut self, node: &Node) -> Option<T> {
        self.wrong_type_by(node, None)
    }

    /// Notes a value of another type; a text that reads as `T` only needs its quotes removed.
    pub fn unquoted<T: FromStr>(&mut self, node: &Node) -> Option<T> {
        let hint = match &node.raw {
            Raw::Text(text) if text.parse::<T>().is_ok() => {
                Some(format!("remove the quotes: `{} = {text}`", self.key.name))
            }
            _ => None,
        };
        self.wrong_type_by(node, hint)
    }

    fn wrong_type_by<T>(&mut self, node: &Node, hint: Option<String>) -> Option<T> {
        let what = format!("`{}` cannot be {}", self.key.path(), node.raw.type_name());
        self.note(node, what, self.key.rule(), hint);
        None
    }

    /// Notes `what` at `node`; without a hint the key's example is shown.
    pub fn note(
        &mut self,
        node: &Node,
        what: String,
        rule: impl Into<String>,
        hint: Option<String>,
    ) {
        let hint = hint.unwrap_or_else(|| self.example(node));
        self.diagnostics.add(node.span, what, rule, hint);
    }

    /// The key's example, written as where the value is.
    fn example(&self, node: &Node) -> String {
        let example = self.key.example;
        if self.is_override(node) {
            format!("write for example `--set '{}={example}'`", self.key.path())
        } else {
            format!("write for example `{} = {example}`", self.key.name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::check;
    use crate::recipe::key::KEYS;

    #[test]
    fn every_default_and_example_obeys_its_rule() {
        for key in KEYS.iter() {
            let table = match key.table {
                "" => String::new(),
                table => format!("[{table}]\n"),
            };
            let text = format!("{table}{}\n", key.sample());
            let line = text.lines().count();
            let diagnostics = check(&text, Path::new("r.toml"), &[])
                .err()
                .unwrap_or_default();
            let invalid = format!("`{}` cannot be", key.path());
            for found in diagnostics.iter().filter(|found| found.line == Some(line)) {
                let breaks_its_rule =
                    found.what.starts_with(&invalid) && !found.what.contains("cannot be combined");
                assert!(!breaks_its_rule, "{}", found.what);
                assert!(!found.what.contains("regex:"), "{}", found.what);
            }
        }
    }
}
