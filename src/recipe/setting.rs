//! The types of a recipe's values: how each is read, written and described.
//!
//! One implementation of [`Setting`] for each scalar type. Takes a node and the key's bounds, returns the value or notes a
//! diagnostic. Lists and tables are in `collections`, ids and paths in `ids`. Knows no key.

use std::fmt::Display;
use std::str::FromStr;

use chrono::NaiveDate;
use clap::ValueEnum;
use serde_json::{Value as Json, json};
use toml_edit::Value;

use super::key::{Bounds, Key, MANY, Range};
use super::reader::Field;
use super::sections::{
    AdapterType, Checkpointing, Compared, Init, ProblemType, Quantization, Task,
};
use super::suggest;
use super::tree::{Node, Raw};
use crate::adapter::options::{Bias, LoraInit};
use crate::data::options::{Format, OnBadRecord, PromptTemplate, TxtUnit};
use crate::energy::options::MeterKind;
use crate::train::schedule::Decay;
use crate::units::{
    Flops, GramsCo2e, Joules, Money, ParseQuantityError, Per, Price, Pue, Seconds, Unit,
};
use crate::work::Precision;

/// A type of recipe value.
pub(super) trait Setting: Sized {
    /// The values that may stand there.
    fn values(key: &Key) -> Values;

    /// The value of `node`, or `None` with a diagnostic.
    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self>;

    /// The value in TOML; `None` where it is not written.
    fn write(&self) -> Option<Value>;

    /// The value of an optional key that is absent; `None` for types that always have a value.
    fn absent() -> Option<Self> {
        None
    }
}

/// The values of a key.
pub(super) struct Values {
    /// In words.
    pub rule: String,
    /// As JSON Schema.
    pub schema: Json,
    /// The words of a choice; empty for other types.
    pub words: Vec<String>,
}

pub(super) fn values(rule: impl Into<String>, schema: Json) -> Values {
    Values {
        rule: rule.into(),
        schema,
        words: Vec::new(),
    }
}

impl<T: Setting> Setting for Option<T> {
    fn values(key: &Key) -> Values {
        T::values(key)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        T::read(node, field).map(Some)
    }

    fn write(&self) -> Option<Value> {
        self.as_ref().and_then(T::write)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }
}

impl Setting for bool {
    fn values(_: &Key) -> Values {
        values(
            "`true` or `false`, without quotes",
            json!({ "type": "boolean" }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match node.raw {
            Raw::Flag(flag) => Some(flag),
            _ => field.unquoted(node),
        }
    }

    fn write(&self) -> Option<Value> {
        Some((*self).into())
    }
}

fn count_bounds(key: &Key) -> (u64, u64) {
    match key.bounds {
        Bounds::Count { least, most } => (least, most),
        _ => (0, MANY),
    }
}

/// An integer within bounds; one that is too large breaks a rule of its own.
fn read_count(node: &Node, number: i128, field: &mut Field<'_, '_>) -> Option<u64> {
    let (least, most) = count_bounds(field.key);
    if number > i128::from(most) {
        return field.invalid_by(node, format!("a whole number of at most {most}"), None);
    }
    let count = u64::try_from(number).ok().filter(|count| *count >= least);
    count.or_else(|| field.invalid(node))
}

impl Setting for u64 {
    fn values(key: &Key) -> Values {
        let (least, most) = count_bounds(key);
        let schema = json!({ "type": "integer", "minimum": least, "maximum": most });
        values(format!("a whole number of at least {least}"), schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match node.raw {
            Raw::Integer(number) => read_count(node, number, field),
            _ => field.unquoted(node),
        }
    }

    fn write(&self) -> Option<Value> {
        Some(i64::try_from(*self).unwrap_or(i64::MAX).into())
    }
}

/// A type read from and written as another; `read` takes the value, its node and the field.
macro_rules! setting_as {
    ($base:ty; $($type:ty: $read:expr, $write:expr;)+) => {$(
        impl Setting for $type {
            fn values(key: &Key) -> Values {
                <$base as Setting>::values(key)
            }

            fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
                let value = <$base as Setting>::read(node, field)?;
                $read(value, node, field)
            }

            fn write(&self) -> Option<Value> {
                let write: fn(&$type) -> $base = $write;
                write(self).write()
            }
        }
    )+};
}

pub(super) use setting_as;

setting_as! {
    u64;
    usize: |count, _, _| Some(count as usize), |size| *size as u64;
}

fn range(key: &Key) -> Range {
    match key.bounds {
        Bounds::Number(range) => range,
        _ => unreachable!("a number is declared with its range"),
    }
}

impl Setting for f64 {
    fn values(key: &Key) -> Values {
        let range = range(key);
        let low = if range.with_low {
            "minimum"
        } else {
            "exclusiveMinimum"
        };
        let mut schema = json!({ "type": "number", low: range.low });
        if let Some(end) = range.below {
            schema["exclusiveMaximum"] = json!(end);
        }
        values(range.rule(), schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match node.raw.number() {
            Some(number) if range(field.key).contains(number) => Some(number),
            Some(_) => field.invalid(node),
            None => field.unquoted(node),
        }
    }

    /// The fewest digits that read back as the same, with an exponent where it is far from one (`1e-8`).
    fn write(&self) -> Option<Value> {
        let shortest = format!("{self:?}").parse();
        Some(shortest.unwrap_or_else(|_| (*self).into()))
    }
}

setting_as! {
    f64;
    Pue: |ratio, _, _| Pue::new(ratio), |pue| pue.value();
}

/// Whether a text can be part of a directory name.
pub(super) fn is_file_name(text: &str) -> bool {
    let separates = |c: char| matches!(c, '/' | '\\') || c.is_control();
    text != "." && text != ".." && !text.contains(separates)
}

impl Setting for String {
    fn values(key: &Key) -> Values {
        match key.bounds {
            Bounds::FileName => values(
                "text in double quotes, without `/`, `\\` or control characters, and not `.` or `..`",
                json!({ "type": "string", "pattern": "^[^/\\\\]*$" }),
            ),
            _ => values(
                "text in double quotes, not empty",
                json!({ "type": "string", "minLength": 1 }),
            ),
        }
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let text = match &node.raw {
            Raw::Text(text) => text.clone(),
            // `--set model.revision=1234567`: the characters that the shell passed are the text.
            Raw::Integer(_) | Raw::Float(_) | Raw::Flag(_) | Raw::Date
                if field.is_override(node) =>
            {
                return Some(field.source_text(node).to_string());
            }
            _ => return field.wrong_type(node),
        };
        let fits = match field.key.bounds {
            Bounds::FileName => is_file_name(&text),
            _ => !text.trim().is_empty(),
        };
        if fits {
            Some(text)
        } else {
            field.invalid(node)
        }
    }

    fn write(&self) -> Option<Value> {
        Some(self.as_str().into())
    }
}

/// A text that `T` is parsed from.
fn parsed<T: FromStr>(node: &Node, field: &mut Field<'_, '_>) -> Option<T> {
    let Raw::Text(text) = &node.raw else {
        return field.wrong_type(node);
    };
    text.parse().ok().or_else(|| field.invalid(node))
}

impl Setting for PromptTemplate {
    fn values(_: &Key) -> Values {
        let schema = json!({ "type": "string", "pattern": r"^chat$|\{prompt\}" });
        values(Self::RULE, schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        parsed(node, field)
    }

    fn write(&self) -> Option<Value> {
        Some(self.to_string().into())
    }
}

impl Setting for LoraInit {
    fn values(_: &Key) -> Values {
        let schema = json!({ "type": "string", "pattern": "^(default|gaussian|pissa|pissa_niter_[0-9]+|olora)$" });
        values(Self::RULE, schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        parsed(node, field)
    }

    fn write(&self) -> Option<Value> {
        Some(self.to_string().into())
    }
}

impl Setting for NaiveDate {
    fn values(_: &Key) -> Values {
        let schema = json!({ "type": "string", "format": "date" });
        values("a date as YEAR-MONTH-DAY", schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let text = match &node.raw {
            Raw::Text(text) => text.as_str(),
            Raw::Date => field.source_text(node),
            _ => return field.wrong_type(node),
        };
        text.parse().ok().or_else(|| field.invalid(node))
    }

    fn write(&self) -> Option<Value> {
        Some(self.to_string().into())
    }
}

/// An enum written as a word: its variants, in order, are the words.
trait Choice: ValueEnum {}

impl Choice for AdapterType {}
impl Choice for Bias {}
impl Choice for Compared {}
impl Choice for Decay {}
impl Choice for Format {}
impl Choice for Init {}
impl Choice for Quantization {}
impl Choice for OnBadRecord {}
impl Choice for Precision {}
impl Choice for ProblemType {}
impl Choice for Task {}
impl Choice for TxtUnit {}

/// The word of a variant; empty for one that is not written as a word.
fn word<T: ValueEnum>(choice: &T) -> String {
    let value = choice.to_possible_value();
    value
        .map(|value| value.get_name().to_string())
        .unwrap_or_default()
}

fn choices<T: ValueEnum>() -> Vec<(String, T)> {
    let variants = T::value_variants().iter();
    variants
        .map(|choice| (word(choice), choice.clone()))
        .collect()
}

fn choice_values<T>(choices: &[(String, T)]) -> Values {
    let words: Vec<String> = choices.iter().map(|(word, _)| word.clone()).collect();
    let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    Values {
        rule: format!("one of {}", quoted.join(", ")),
        schema: json!({ "enum": words }),
        words,
    }
}

/// One of `choices` by its word, else a diagnostic that names the nearest.
fn read_word<T: Clone>(
    node: &Node,
    field: &mut Field<'_, '_>,
    choices: &[(String, T)],
) -> Option<T> {
    let Raw::Text(text) = &node.raw else {
        return field.wrong_type(node);
    };
    if let Some((_, choice)) = choices.iter().find(|(word, _)| word == text) {
        return Some(choice.clone());
    }
    let words: Vec<&str> = choices.iter().map(|(word, _)| word.as_str()).collect();
    let hint = suggest::nearest_word(text, &words).map(|word| format!("did you mean \"{word}\"?"));
    field.invalid_by(node, field.key.rule(), hint)
}

impl<T: Choice> Setting for T {
    fn values(_: &Key) -> Values {
        choice_values(&choices::<T>())
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        read_word(node, field, &choices())
    }

    fn write(&self) -> Option<Value> {
        Some(word(self).into())
    }
}

/// The meters; none is written as "auto".
fn meters() -> Vec<(String, Option<MeterKind>)> {
    let kinds = choices().into_iter().map(|(word, kind)| (word, Some(kind)));
    std::iter::once(("auto".to_string(), None))
        .chain(kinds)
        .collect()
}

impl Setting for Option<MeterKind> {
    fn values(_: &Key) -> Values {
        choice_values(&meters())
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        read_word(node, field, &meters())
    }

    fn write(&self) -> Option<Value> {
        Some(self.map_or("auto", MeterKind::as_str).into())
    }
}

impl Setting for Checkpointing {
    fn values(_: &Key) -> Values {
        let mut values = choice_values(&choices::<Self>());
        values.rule += ", or a number of blocks";
        values.words.push("number of blocks".into());
        let blocks = json!({ "type": "integer", "minimum": 0, "maximum": MANY });
        values.schema = json!({ "anyOf": [values.schema, blocks] });
        values
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match node.raw {
            Raw::Integer(number) => {
                read_count(node, number, field).map(|blocks| Self::Blocks(blocks as usize))
            }
            _ => read_word(node, field, &choices()),
        }
    }

    fn write(&self) -> Option<Value> {
        match self {
            Self::Blocks(blocks) => blocks.write(),
            named => Some(word(named).into()),
        }
    }
}

/// An unsigned number in a regular expression.
const NUMBER: &str = r"[0-9.][0-9._]*([eE][+-]?[0-9]+)?";

/// The alternatives of a regular expression that matches a unit.
fn any_of(units: &[Unit]) -> String {
    let names: Vec<&str> = units.iter().map(|(name, _)| *name).collect();
    format!("({})", names.join("|"))
}

/// An amount, or its printed forms: "18 kJ (5 Wh)".
fn amount(units: &[Unit]) -> String {
    let one = format!(r"{NUMBER}\s*{}", any_of(units));
    format!(r"{one}(\s*\(\s*{one}\s*\))?")
}

/// A sum of amounts: "2 min 25 s".
fn sum(units: &[Unit]) -> String {
    format!(r"({NUMBER}\s*{}\s*)+", any_of(units))
}

/// A sum of money before `unit`.
fn money(unit: &str) -> String {
    format!(r"{NUMBER}\s*[A-Z]{{3}}{unit}")
}

/// What is accepted of a quantity, beside a positive number with a unit in quotes.
#[derive(Clone, Copy, PartialEq)]
enum Also {
    Nothing,
    /// A TOML number.
    Bare,
    /// Zero.
    Zero,
}

/// `form`: a regular expression of the texts that are read.
fn quantity_values<T: FromStr<Err = ParseQuantityError>>(form: &str, also: Also) -> Values {
    let rule = T::from_str("")
        .err()
        .map(|error| error.rule)
        .unwrap_or_default();
    let zero = if also == Also::Zero {
        ""
    } else {
        ", more than zero"
    };
    let bare = also == Also::Bare;
    let quotes = if bare { "" } else { ", in double quotes" };
    let types = if bare {
        json!(["string", "number"])
    } else {
        json!("string")
    };
    let pattern = format!(r"^\s*{form}\s*$");
    let schema = json!({ "type": types, "pattern": pattern });
    values(format!("{rule}{zero}{quotes}"), schema)
}

/// A quantity whose `number` in the base unit is finite and positive, or zero where that is accepted.
fn read_quantity<T: FromStr>(
    node: &Node,
    field: &mut Field<'_, '_>,
    also: Also,
    number: fn(&T) -> f64,
) -> Option<T> {
    let text = match &node.raw {
        Raw::Text(text) => text.as_str(),
        Raw::Integer(_) | Raw::Float(_) if also == Also::Bare => field.source_text(node),
        _ => return field.wrong_type(node),
    };
    let accepted = |quantity: &T| {
        let number = number(quantity);
        number.is_finite() && (number > 0.0 || (also == Also::Zero && number == 0.0))
    };
    let quantity = text.parse().ok().filter(accepted);
    quantity.or_else(|| field.invalid(node))
}

/// The short form where it reads back as the same, else `exact`.
fn write_quantity<T: Display + FromStr + PartialEq>(quantity: &T, exact: String) -> Option<Value> {
    let short = quantity.to_string();
    let same = short.parse().is_ok_and(|read: T| read == *quantity);
    Some(if same { short } else { exact }.into())
}

macro_rules! quantities {
    ($($type:ident: $form:expr, $also:ident, |$q:ident| $number:expr, $exact:expr;)+) => {$(
        impl Setting for $type {
            fn values(_: &Key) -> Values {
                quantity_values::<Self>(&$form, Also::$also)
            }

            fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
                read_quantity(node, field, Also::$also, |$q: &Self| $number)
            }

            fn write(&self) -> Option<Value> {
                let $q = self;
                write_quantity(self, $exact)
            }
        }
    )+};
}

quantities! {
    Joules: amount(Joules::UNITS), Nothing, |q| q.0, format!("{} J", q.0);
    GramsCo2e: amount(GramsCo2e::UNITS), Nothing, |q| q.0, format!("{} g", q.0);
    Flops: amount(Flops::UNITS), Bare, |q| q.0, format!("{:e}", q.0);
    Seconds: sum(Seconds::UNITS), Nothing, |q| q.0, format!("{} s", q.0);
    Money: money(""), Nothing, |q| q.amount, exact_money(q);
    Price: money(r"\s*/\s*(kWh|h)"), Zero, |q| q.money.amount,
        format!("{}/{}", exact_money(&q.money), per(q.per));
}

fn exact_money(money: &Money) -> String {
    format!("{} {}", money.amount, money.currency)
}

/// The unit of a price.
pub(super) fn per(per: Per) -> &'static str {
    match per {
        Per::KilowattHour => "kWh",
        Per::DeviceHour => "h",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of a recipe are those of the JSON documents.
    #[test]
    fn a_word_is_what_serde_writes() {
        fn check<T: ValueEnum + serde::Serialize>() {
            for (word, choice) in choices::<T>() {
                assert_eq!(serde_json::to_value(choice).unwrap(), word);
            }
        }
        check::<Checkpointing>();
        check::<Compared>();
        check::<Decay>();
        check::<Format>();
        check::<Init>();
        check::<MeterKind>();
        check::<OnBadRecord>();
        check::<Bias>();
        check::<Precision>();
        check::<ProblemType>();
        check::<Task>();
        check::<Quantization>();
        check::<TxtUnit>();
    }
}
