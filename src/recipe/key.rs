//! The declaration of a recipe key, and what follows from it.
//!
//! `section!` takes a struct whose fields are keys and generates the struct, a static [`Key`] for each field and the
//! [`Keys`] implementation that reads and writes them. Default, bounds and other names come from the expression behind
//! the field, everything else from its type (see `setting`). Knows no key.

use std::sync::LazyLock;

use super::reader::Reader;
use super::sections::Recipe;
use super::setting::{Setting, Values};

/// One key: everything but its Rust type.
pub(super) struct Key {
    /// Its table; empty at the top of the file.
    pub table: &'static str,
    /// Its name within the table.
    pub name: &'static str,
    doc: &'static str,
    /// Whether it may be left out.
    pub presence: Presence,
    /// The default, else an example. Valid TOML.
    pub value: &'static str,
    /// An example where the default is none.
    pub example: &'static str,
    /// Bounds on the values of its type.
    pub bounds: Bounds,
    /// Names that other trainers give it.
    pub known_as: &'static [&'static str],
    /// Written in the starter recipe, not commented out.
    pub in_starter: bool,
    values: fn(&Key) -> Values,
}

/// Whether a key may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Required,
    /// Absent means no value.
    Optional,
    /// Absent means the default.
    Defaulted,
}

/// Bounds on the values of a type.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bounds {
    None,
    Count {
        least: u64,
        most: u64,
    },
    Number(Range),
    /// Text that can be part of a directory name, or empty.
    FileName,
    /// Modules that may also be the word "all-linear".
    AllLinear,
    /// Texts of this kind, not names or patterns of modules.
    Of(&'static str),
}

/// An interval of finite numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    /// Lower end.
    pub low: f64,
    /// Whether the lower end is included.
    pub with_low: bool,
    /// Upper end, excluded.
    pub below: Option<f64>,
}

impl Range {
    pub fn contains(&self, number: f64) -> bool {
        let above = number > self.low || (self.with_low && number == self.low);
        number.is_finite() && above && self.below.is_none_or(|end| number < end)
    }

    /// "a number of at least 0 and below 1".
    pub fn rule(&self) -> String {
        let low = if self.with_low {
            format!("of at least {}", self.low)
        } else {
            format!("above {}", self.low)
        };
        match self.below {
            Some(end) => format!("a number {low} and below {end}"),
            None => format!("a finite number {low}"),
        }
    }
}

/// The largest tensor size or number of steps.
pub(super) const MANY: u64 = u32::MAX as u64;

const fn at_least(least: u64) -> Bounds {
    Bounds::Count { least, most: MANY }
}

const fn range(low: f64, with_low: bool, below: Option<f64>) -> Bounds {
    Bounds::Number(Range {
        low,
        with_low,
        below,
    })
}

pub(super) const SIZE: Bounds = at_least(1);
pub(super) const TOKENS: Bounds = at_least(2);
pub(super) const INTERVAL: Bounds = at_least(0);
/// TOML's integers end at `i64::MAX`.
pub(super) const SEED: Bounds = Bounds::Count {
    least: 0,
    most: i64::MAX as u64,
};
pub(super) const POSITIVE: Bounds = range(0.0, false, None);
pub(super) const NOT_NEGATIVE: Bounds = range(0.0, true, None);
pub(super) const AT_LEAST_ONE: Bounds = range(1.0, true, None);
/// [0, 1)
pub(super) const SHARE: Bounds = range(0.0, true, Some(1.0));
/// (0, 1)
pub(super) const FRACTION: Bounds = range(0.0, false, Some(1.0));

const fn undeclared(presence: Presence, value: &'static str) -> Key {
    Key {
        table: "",
        name: "",
        doc: "",
        presence,
        value,
        example: value,
        bounds: Bounds::None,
        known_as: &[],
        in_starter: false,
        values: bool::values,
    }
}

/// A key that may not be left out, with an example.
pub(super) const fn required(example: &'static str) -> Key {
    undeclared(Presence::Required, example)
}

/// A key without a default, with an example.
pub(super) const fn optional(example: &'static str) -> Key {
    undeclared(Presence::Optional, example)
}

/// A key with a default.
pub(super) const fn default(value: &'static str) -> Key {
    undeclared(Presence::Defaulted, value)
}

impl Key {
    pub const fn within(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    pub const fn known_as(mut self, names: &'static [&'static str]) -> Self {
        self.known_as = names;
        self
    }

    pub const fn in_starter(mut self) -> Self {
        self.in_starter = true;
        self
    }

    pub const fn example(mut self, example: &'static str) -> Self {
        self.example = example;
        self
    }

    /// The name in the file where it cannot be the field's.
    pub const fn named(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    /// Completes the declaration with what the field says.
    pub const fn declared<T: Setting>(
        mut self,
        table: &'static str,
        field: &'static str,
        doc: &'static str,
    ) -> Self {
        self.table = table;
        if self.name.is_empty() {
            self.name = field;
        }
        self.doc = doc;
        self.values = T::values;
        self
    }

    /// `table.key`, or the key alone at the top.
    pub fn path(&self) -> String {
        if self.table.is_empty() {
            self.name.to_string()
        } else {
            format!("{}.{}", self.table, self.name)
        }
    }

    /// Its meaning, one sentence.
    pub fn doc(&self) -> &'static str {
        self.doc.trim_start()
    }

    /// The values that may stand there.
    pub fn values(&self) -> Values {
        (self.values)(self)
    }

    /// The values in words.
    pub fn rule(&self) -> String {
        self.values().rule
    }

    /// `key = value`, as it might stand in the file.
    pub fn sample(&self) -> String {
        format!("{} = {}", self.name, self.value)
    }
}

/// A value read from several keys: a table of the recipe, or a part of one.
pub(super) trait Keys: Sized {
    /// Appends the keys in the order they are written.
    fn list(to: &mut Vec<&'static Key>);
    /// Reads every key; a missing or invalid value is noted and replaced.
    fn read(reader: &mut Reader<'_, '_>) -> Self;
    /// Appends each key with its value in TOML.
    fn write(&self, to: &mut Vec<Written>);
}

/// A key with its value; `None` where it is not written.
pub(super) type Written = (&'static Key, Option<toml_edit::Value>);

/// The keys of `T`.
pub(super) fn keys_of<T: Keys>() -> Vec<&'static Key> {
    let mut keys = Vec::new();
    T::list(&mut keys);
    keys
}

/// Every key, in the order they are written.
pub(super) static KEYS: LazyLock<Vec<&'static Key>> = LazyLock::new(keys_of::<Recipe>);

/// The keys of a table, in order; of the top where `table` is empty.
pub(super) fn of_table(table: &str) -> impl Iterator<Item = &'static Key> + '_ {
    KEYS.iter().copied().filter(move |key| key.table == table)
}

/// Declares keys. A field with `= default(..)`, `= optional(..)` or `= required(..)` is a key; a field without is a
/// type that implements `Keys`. `mod` names the module of the statics. `impl TYPE` takes a struct that another room
/// declares; `with` sets its fields that are no keys.
macro_rules! section {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident in $table:literal mod $module:ident {
            $( $(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $key:expr)? ),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        $vis struct $name { $( $(#[doc = $doc])+ pub $field: $type, )+ }

        section! {
            impl $name in $table mod $module { $( $(#[doc = $doc])+ $field: $type $(= $key)? ),+ }
        }
    };
    (
        impl $name:ident in $table:literal mod $module:ident {
            $( $(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $key:expr)? ),+ $(,)?
        } $(with { $($rest:tt)+ })?
    ) => {
        #[allow(non_upper_case_globals)]
        pub(super) mod $module {
            use super::*;
            $( section!(@static $table, $field, $type, concat!($($doc),+) $(, $key)?); )+
        }

        impl Keys for $name {
            fn list(to: &mut Vec<&'static Key>) {
                $( section!(@list to, $module::$field, $type $(, $key)?); )+
            }

            fn read(reader: &mut Reader<'_, '_>) -> Self {
                Self {
                    $( $field: section!(@read reader, $module::$field, $type $(, $key)?), )+
                    $($($rest)+)?
                }
            }

            fn write(&self, to: &mut Vec<Written>) {
                $( section!(@write to, $module::$field, self.$field $(, $key)?); )+
            }
        }
    };
    (@static $table:literal, $field:ident, $type:ty, $doc:expr, $key:expr) => {
        pub static $field: Key = $key.declared::<$type>($table, stringify!($field), $doc);
    };
    (@static $table:literal, $field:ident, $type:ty, $doc:expr) => {};
    (@list $to:ident, $static:path, $type:ty, $key:expr) => { $to.push(&$static) };
    (@list $to:ident, $static:path, $type:ty) => { <$type as Keys>::list($to) };
    (@read $reader:ident, $static:path, $type:ty, $key:expr) => {
        $reader.value::<$type>(&$static)
    };
    (@read $reader:ident, $static:path, $type:ty) => { <$type as Keys>::read($reader) };
    (@write $to:ident, $static:path, $value:expr, $key:expr) => {
        $to.push((&$static, Setting::write(&$value)))
    };
    (@write $to:ident, $static:path, $value:expr) => { Keys::write(&$value, $to) };
}

pub(super) use section;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_contains_what_its_rule_says() {
        let (Bounds::Number(share), Bounds::Number(positive)) = (SHARE, POSITIVE) else {
            panic!("both are ranges of numbers");
        };
        assert!(share.contains(0.0) && share.contains(0.999) && !share.contains(1.0));
        assert!(!share.contains(-1e-9) && !share.contains(f64::NAN));
        assert_eq!(share.rule(), "a number of at least 0 and below 1");
        assert!(positive.contains(1e-300) && !positive.contains(0.0));
        assert!(!positive.contains(f64::INFINITY));
        assert_eq!(positive.rule(), "a finite number above 0");
    }

    #[test]
    fn no_key_is_declared_twice_and_each_has_a_rule_and_a_meaning() {
        for (index, key) in KEYS.iter().enumerate() {
            let path = key.path();
            assert!(KEYS[..index].iter().all(|other| other.path() != path));
            assert!(!key.rule().is_empty() && !key.doc().is_empty(), "{path}");
            assert!(!key.doc().ends_with('.'), "{path}");
        }
    }
}
