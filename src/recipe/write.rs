//! A recipe as text: one as resolved, with every default written out, and one to start from.
//!
//! Takes a `Recipe` (or nothing, for the starter), returns TOML that reads back as the same. Layout, order and comments come
//! from the table of keys.

use std::fmt::Write;

use toml_edit::{Array, InlineTable, Value};

use super::check::EMBEDDED;
use super::keys::{self, ALL_LINEAR, Key, Kind, Presence, TABLES};
use super::words::Word;
use super::*;
use crate::units::Per;

/// Column at which a comment starts, where the value leaves room.
const COMMENT: usize = 40;

/// How a key stands in the text.
enum Line {
    /// `key = value`.
    Written(String),
    /// `# key = value`: known, but not in force.
    Commented(String),
    /// Not at all.
    Absent,
}

impl Recipe {
    /// The recipe as resolved: every default written out, paths absolute. Reading it back gives the same recipe.
    ///
    /// With `adapter.init_from`, keys that the adapter decides and the recipe did not write stand as comments: written out they
    /// would contradict the adapter.
    pub fn to_toml(&self) -> String {
        let head = "# As resolved by wattune: every default is written out, paths are absolute.\n"
            .to_string();
        lay_out(head, |key| match self.value(key.path) {
            Some(value) if self.is_left_to_the_adapter(key) => Line::Commented(value.to_string()),
            Some(value) => Line::Written(value.to_string()),
            None => Line::Absent,
        })
    }

    fn is_left_to_the_adapter(&self, key: &Key) -> bool {
        match &self.adapter {
            Adapter::Lora(lora) if lora.init_from.is_some() && key.is_of_lora() => {
                key.name() != "init_from" && !lora.written.iter().any(|name| name == key.name())
            }
            _ => false,
        }
    }

    /// The value of `path` in TOML; `None` where it has none.
    fn value(&self, path: &str) -> Option<Value> {
        let (table, name) = path.split_once('.').unwrap_or(("", path));
        match (table, name) {
            ("", "name") => Some(self.name.as_str().into()),
            ("", "seed") => Some(count(self.seed)),
            ("model", _) => self.model.value(name),
            ("adapter", _) => self.adapter.value(name),
            ("data", _) => self.data.value(name),
            ("train", _) => self.train.value(name),
            ("budget", _) => limit(&self.budget, name),
            ("energy", _) => self.energy.value(name),
            ("baseline", _) => self.baseline.value(name),
            ("report", _) => self.report.value(name),
            _ => None,
        }
    }
}

/// A commented recipe to start from: what most runs set is written, all else is there as a comment with its default.
pub fn starter() -> String {
    let head = "# A wattune recipe. Paths are relative to this file. Uncomment a line to change its default.\n\
                # Check it with `wattune recipe check FILE`, forecast it with `wattune plan FILE`.\n";
    lay_out(head.to_string(), |key| match key.in_starter {
        true => Line::Written(key.value.to_string()),
        false => Line::Commented(key.value.to_string()),
    })
}

/// Every table with its keys, each followed by what it means.
fn lay_out(mut text: String, line: impl Fn(&Key) -> Line) -> String {
    let tables = std::iter::once(("", "")).chain(TABLES);
    for (table, about) in tables {
        let lines: Vec<String> = keys::of_table(table)
            .filter_map(|key| laid_out(key, line(key)))
            .collect();
        if !table.is_empty() && !lines.is_empty() {
            let _ = write!(text, "\n# {about}.\n[{table}]\n");
        }
        lines
            .iter()
            .for_each(|line| text.extend([line.as_str(), "\n"]));
    }
    text
}

fn laid_out(key: &Key, line: Line) -> Option<String> {
    let (mark, value) = match line {
        Line::Written(value) => ("", value),
        Line::Commented(value) => ("# ", value),
        Line::Absent => return None,
    };
    let optional = if key.presence == Presence::Optional && !mark.is_empty() {
        "; none unless given"
    } else {
        ""
    };
    let words = match key.kind {
        Kind::Choice(words) => format!(" ({})", words().join(" | ")),
        Kind::ChoiceOrCount { words, of } => format!(" ({} | number of {of})", words().join(" | ")),
        _ => String::new(),
    };
    let pair = format!("{mark}{} = {value}", key.name());
    Some(format!("{pair:COMMENT$} # {}{words}{optional}", key.doc))
}

impl Model {
    fn value(&self, name: &str) -> Option<Value> {
        match name {
            "id" => Some(match &self.id {
                ModelId::Hub(id) => id.as_str().into(),
                ModelId::Directory(path) => path_value(path),
                ModelId::Embedded(name) => format!("{EMBEDDED}{name}").into(),
            }),
            "revision" => Some(self.revision.as_str().into()),
            "dtype" => Some(self.dtype.word().into()),
            "init" => Some(self.init.word().into()),
            _ => None,
        }
    }
}

impl Adapter {
    fn value(&self, name: &str) -> Option<Value> {
        match self {
            Adapter::None if name == "type" => Some("none".into()),
            Adapter::None => None,
            Adapter::Lora(_) if name == "type" => Some("lora".into()),
            Adapter::Lora(lora) => lora.value(name),
        }
    }
}

impl Lora {
    fn value(&self, name: &str) -> Option<Value> {
        let config = &self.config;
        match name {
            "r" => Some(count(config.r as u64)),
            "lora_alpha" => Some(number(config.lora_alpha)),
            "lora_dropout" => Some(number(config.lora_dropout)),
            "target_modules" => Some(targets(&config.target_modules)),
            "exclude_modules" => config.exclude_modules.as_ref().map(targets),
            "use_rslora" => Some(config.use_rslora.into()),
            "rank_pattern" => map(config
                .rank_pattern
                .iter()
                .map(|(pattern, rank)| (pattern, count(*rank as u64)))),
            "alpha_pattern" => map(config
                .alpha_pattern
                .iter()
                .map(|(pattern, alpha)| (pattern, number(*alpha)))),
            "layers_to_transform" => config
                .layers_to_transform
                .as_ref()
                .map(|layers| layers.iter().map(|layer| count(*layer as u64)).collect()),
            "init_from" => self.init_from.as_deref().map(path_value),
            _ => None,
        }
    }
}

impl Data {
    fn value(&self, name: &str) -> Option<Value> {
        match (name, &self.validation) {
            ("train", _) => Some(source(&self.train)),
            ("validation", Validation::Source(records)) => Some(source(records)),
            ("validation_fraction", Validation::Fraction(fraction)) => Some(number(*fraction)),
            ("format", _) => Some(self.format.word().into()),
            ("columns", _) => map(self
                .columns
                .iter()
                .map(|(field, column)| (field, column.as_str().into()))),
            ("max_length", _) => Some(count(self.max_length as u64)),
            ("packing", _) => Some(self.packing.into()),
            ("shuffle", _) => Some(self.shuffle.into()),
            ("on_bad_record", _) => Some(self.on_bad_record.word().into()),
            ("txt_unit", _) => Some(self.txt_unit.word().into()),
            _ => None,
        }
    }
}

impl Train {
    fn value(&self, name: &str) -> Option<Value> {
        match (name, self.length, self.warmup) {
            ("steps", Length::Steps(steps), _) => Some(count(steps)),
            ("epochs", Length::Epochs(epochs), _) => Some(number(epochs)),
            ("warmup_ratio", _, Warmup::Ratio(ratio)) => Some(number(ratio)),
            ("warmup_steps", _, Warmup::Steps(steps)) => Some(count(steps)),
            ("micro_batch_size", ..) => Some(count(self.micro_batch_size as u64)),
            ("gradient_accumulation_steps", ..) => {
                Some(count(self.gradient_accumulation_steps as u64))
            }
            ("learning_rate", ..) => Some(number(self.learning_rate)),
            ("schedule", ..) => Some(self.schedule.word().into()),
            ("adam_beta1", ..) => Some(number(self.adam_beta1)),
            ("adam_beta2", ..) => Some(number(self.adam_beta2)),
            ("adam_epsilon", ..) => Some(number(self.adam_epsilon)),
            ("weight_decay", ..) => Some(number(self.weight_decay)),
            ("max_grad_norm", ..) => Some(number(self.max_grad_norm)),
            ("eval_every", ..) => Some(count(self.eval_every)),
            ("save_every", ..) => Some(count(self.save_every)),
            ("save_total_limit", ..) => Some(count(self.save_total_limit as u64)),
            ("keep_best", ..) => Some(self.keep_best.into()),
            ("activation_checkpointing", ..) => Some(match self.activation_checkpointing {
                Checkpointing::Blocks(blocks) => count(blocks as u64),
                word => word.word().into(),
            }),
            _ => None,
        }
    }
}

fn limit(limits: &Limits, name: &str) -> Option<Value> {
    match name {
        "energy" => limits
            .energy
            .map(|energy| exact(&energy, format!("{} J", energy.0))),
        "carbon" => limits
            .carbon
            .map(|carbon| exact(&carbon, format!("{} g", carbon.0))),
        "flops" => limits
            .flops
            .map(|flops| exact(&flops, format!("{:e}", flops.0))),
        "time" => limits
            .time
            .map(|time| exact(&time, format!("{} s", time.0))),
        "cost" => limits
            .cost
            .as_ref()
            .map(|cost| exact(cost, format!("{} {}", cost.amount, cost.currency))),
        _ => None,
    }
}

impl Energy {
    fn value(&self, name: &str) -> Option<Value> {
        match name {
            "device" => Some(self.device.to_string().into()),
            "meter" => Some(self.meter.word().into()),
            "grid" => Some(self.grid.to_string().into()),
            "pue" => Some(number(self.pue.value())),
            "price" => self.price.as_ref().map(|price| {
                let per = if price.per == Per::KilowattHour {
                    "kWh"
                } else {
                    "h"
                };
                exact(
                    price,
                    format!("{} {}/{per}", price.money.amount, price.money.currency),
                )
            }),
            _ => None,
        }
    }
}

impl Baseline {
    fn value(&self, name: &str) -> Option<Value> {
        match name {
            "from_scratch" => Some(self.from_scratch.word().into()),
            "full_fine_tuning" => Some(self.full_fine_tuning.word().into()),
            "energy_multiple" => Some(number(self.energy_multiple)),
            "learning_rate" => self.learning_rate.map(number),
            "budget" => self
                .budget
                .map(|energy| exact(&energy, format!("{} J", energy.0))),
            _ => None,
        }
    }
}

impl Report {
    fn value(&self, name: &str) -> Option<Value> {
        match name {
            "requests_per_day" => self.requests_per_day.map(number),
            "prompt_tokens" => Some(count(self.prompt_tokens as u64)),
            "generated_tokens" => Some(count(self.generated_tokens as u64)),
            "larger_model" => self
                .larger_model
                .as_ref()
                .map(|model| model.name.as_str().into()),
            "few_shot_examples" => Some(count(self.few_shot_examples as u64)),
            _ => None,
        }
    }
}

/// A quantity as it is shown to people where that loses nothing, else in its base unit with every digit.
fn exact<Q: std::fmt::Display + std::str::FromStr + PartialEq>(
    quantity: &Q,
    in_base_unit: String,
) -> Value {
    let shown = quantity.to_string();
    let reads_back = shown.parse::<Q>().is_ok_and(|read| read == *quantity);
    if reads_back {
        shown.into()
    } else {
        in_base_unit.into()
    }
}

/// A count; those of a recipe end where TOML's integers do.
fn count(count: u64) -> Value {
    i64::try_from(count).unwrap_or(i64::MAX).into()
}

/// A number with the fewest digits that read back as the same, and an exponent where it is far from one (`1e-8`).
fn number(number: f64) -> Value {
    format!("{number:?}")
        .parse()
        .unwrap_or_else(|_| number.into())
}

/// Paths of a recipe come from its UTF-8 text and a folder that has been checked to be UTF-8.
fn path_value(path: &std::path::Path) -> Value {
    path.display().to_string().into()
}

fn source(source: &DataSource) -> Value {
    match source {
        DataSource::File(path) => path_value(path),
        DataSource::Hub { id, split } => format!("{id}:{split}").into(),
    }
}

fn targets(targets: &Targets) -> Value {
    match targets {
        Targets::AllLinear => ALL_LINEAR.into(),
        Targets::Names(names) => names.iter().map(String::as_str).collect::<Array>().into(),
        Targets::Regex(regex) => regex.as_str().into(),
    }
}

/// An inline table in the given order; `None` where it would be empty.
fn map<'a>(pairs: impl Iterator<Item = (&'a String, Value)>) -> Option<Value> {
    let table: InlineTable = pairs.collect();
    (!table.is_empty()).then(|| table.into())
}
