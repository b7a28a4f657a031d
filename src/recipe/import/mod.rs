//! Recipes from the YAML files of other trainers.
//!
//! Takes an Axolotl or LLaMA-Factory file, returns a recipe and the keys that are not in it, each with the reason: nothing is left
//! out silently. The tables of names, and what needs more than another name, stand in `axolotl` and `llama_factory`. Reads the
//! file and LLaMA-Factory's `dataset_info.json` beside it; writes nothing.

mod axolotl;
mod llama_factory;
mod values;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use self::values::{is_set, toml_value};
use super::commented::{Chosen, commented, path_from};
use super::open::parse;
use crate::error::{Error, Kind, Result};

/// A recipe made of another trainer's file.
#[derive(Debug)]
pub struct Imported {
    /// The trainer.
    pub program: &'static str,
    /// The keys of the recipe.
    pub choices: Vec<Chosen>,
    /// Keys of the file that the recipe holds.
    pub carried: usize,
    /// Keys of the file that it does not hold.
    pub left_out: Vec<LeftOut>,
    /// The recipe, which has been read back.
    pub text: String,
}

/// A key that is not carried over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Its name in the file.
    pub key: String,
    /// The reason, and what takes its place.
    pub why: String,
}

/// How a trainer's file is read.
struct Trainer {
    name: &'static str,
    /// Its name of a key, and ours, where the values are the same.
    same: &'static [(&'static str, &'static str)],
    /// Our keys and its defaults in TOML, where they differ from ours.
    defaults: &'static [(&'static str, &'static str)],
    /// Its keys without a counterpart, each with the reason.
    without: &'static [(&'static str, &'static str)],
    /// Everything that is not the same value under another name.
    special: fn(&mut Import<'_>) -> Result<()>,
}

/// An import under way: the keys that are left, and what the others became.
struct Import<'a> {
    keys: Map<String, Value>,
    /// The folder of the imported file.
    folder: &'a Path,
    /// Where the recipe will be written.
    to: &'a Path,
    choices: Vec<Chosen>,
    carried: usize,
    left_out: Vec<LeftOut>,
}

/// Reads the file `from`; `given` values replace those of the file. The recipe will be written to `to`.
///
/// # Errors
/// A file that cannot be read, is of no known trainer or trains by another method, and values that a recipe cannot hold.
pub fn import(from: &Path, given: &[(&'static str, String)], to: &Path) -> Result<Imported> {
    let text = std::fs::read_to_string(from).map_err(|e| Error::io("read", from, e))?;
    let document: Value = serde_saphyr::from_str(&text).map_err(|e| {
        Error::new(Kind::Recipe, format!("the file is not YAML: {e}"))
            .at(from.display().to_string())
            .hint("give an Axolotl or LLaMA-Factory file, or chat records that end in .jsonl")
    })?;
    let Value::Object(keys) = document else {
        return Err(of_no_trainer(from));
    };
    let trainer = [&axolotl::AXOLOTL, &llama_factory::LLAMA_FACTORY]
        .into_iter()
        .find(|trainer| keys.contains_key(trainer.same[0].0))
        .ok_or_else(|| of_no_trainer(from))?;
    let mut import = Import {
        keys,
        folder: from.parent().unwrap_or(Path::new("")),
        to,
        choices: Vec::new(),
        carried: 0,
        left_out: Vec::new(),
    };
    import.read(trainer)?;
    for (key, value) in given {
        let value = path_from(to, value);
        import
            .choices
            .push(Chosen::new(key, value, "Given on the command line"));
    }
    import.finish(trainer, from)
}

fn of_no_trainer(from: &Path) -> Error {
    Error::new(
        Kind::Recipe,
        "the file is neither Axolotl's nor LLaMA-Factory's",
    )
    .at(from.display().to_string())
    .rule("`base_model` (Axolotl) or `model_name_or_path` (LLaMA-Factory) at the top")
    .hint("write a recipe by `wattune recipe init --model ID --data FILE`")
}

impl Import<'_> {
    fn read(&mut self, trainer: &Trainer) -> Result<()> {
        for (key, value) in trainer.defaults {
            let why = format!("{}'s default", trainer.name);
            let value: toml_edit::Value = value.parse().expect("a declared default is TOML");
            self.choices.push(Chosen::new(key, value, why));
        }
        (trainer.special)(self)?;
        for (theirs, ours) in trainer.same {
            if let Some(value) = self.take(theirs) {
                match toml_value(&value) {
                    Some(value) => self.carry(theirs, ours, value),
                    None => self.leave(theirs, format!("`{ours}` does not take such a value")),
                }
            }
        }
        for (key, value) in std::mem::take(&mut self.keys) {
            if !is_set(&value) {
                continue;
            }
            let known = trainer
                .without
                .iter()
                .find(|(prefix, _)| key.starts_with(prefix));
            let why = known.map_or("a recipe has no such key", |(_, why)| why);
            self.leave(&key, why);
        }
        Ok(())
    }

    fn finish(self, trainer: &Trainer, from: &Path) -> Result<Imported> {
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        let mut head = format!(
            "A wattune recipe from {}'s {name}. Paths are relative to this file.",
            trainer.name
        );
        for left in &self.left_out {
            head += &format!("\nNot carried over: {} ({})", left.key, left.why);
        }
        let text = commented(&head, &self.choices);
        parse(&text, self.to, &[])?;
        Ok(Imported {
            program: trainer.name,
            choices: self.choices,
            carried: self.carried,
            left_out: self.left_out,
            text,
        })
    }

    /// Takes a key out of the file; `None` where it is absent or empty.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.keys.shift_remove(key).filter(is_set)
    }

    /// Takes a flag.
    fn take_flag(&mut self, key: &str) -> Option<bool> {
        let value = self.take(key)?;
        let by_word = || match value.as_str()? {
            "true" | "auto" | "yes" | "full" => Some(true),
            "false" | "no" => Some(false),
            _ => None,
        };
        let flag = value.as_bool().or_else(by_word);
        if flag.is_none() {
            self.leave(key, "it is neither true nor false");
        }
        flag
    }

    /// Takes a text.
    fn take_text(&mut self, key: &str) -> Option<String> {
        let value = self.take(key)?;
        let text = value.as_str().map(str::to_string);
        if text.is_none() {
            self.leave(key, "it is no text");
        }
        text
    }

    /// Carries a value over.
    fn carry(&mut self, theirs: &str, ours: &'static str, value: impl Into<toml_edit::Value>) {
        let why = format!("From `{theirs}`");
        self.choices.push(Chosen::new(ours, value, why));
        self.carried += 1;
    }

    /// Notes a key whose value is what a recipe does in any case.
    fn same_already(&mut self) {
        self.carried += 1;
    }

    fn leave(&mut self, key: &str, why: impl Into<String>) {
        self.left_out.push(LeftOut {
            key: key.to_string(),
            why: why.into(),
        });
    }

    /// A path of the file as the recipe writes it: from the file's folder where something is there.
    fn path(&self, path: &str) -> String {
        let beside: PathBuf = self.folder.join(path);
        let found = if beside.exists() {
            beside.display().to_string()
        } else {
            path.to_string()
        };
        path_from(self.to, &found)
    }

    /// `train.schedule`, where it is one of ours.
    fn schedule(&mut self, key: &str) {
        match self.take_text(key).as_deref() {
            None => {}
            Some(known @ ("linear" | "cosine")) => self.carry(key, "train.schedule", known),
            Some(known @ ("constant" | "constant_with_warmup")) => {
                self.carry(
                    key,
                    "train.schedule",
                    known.split('_').next().unwrap_or(known),
                );
            }
            Some(other) => self.leave(
                key,
                format!("`{other}`: schedules are linear, cosine and constant"),
            ),
        }
    }

    /// The one optimizer, in whichever implementation.
    fn optimizer(&mut self, key: &str) {
        match self.take_text(key) {
            None => {}
            Some(name) if name.starts_with("adamw") && !name.contains("8bit") => {
                self.same_already()
            }
            Some(name) => self.leave(
                key,
                format!("`{name}`: AdamW with f32 moments is the optimizer"),
            ),
        }
    }

    /// bf16 where either half precision is on.
    fn precision(&mut self, pure: Option<&str>) {
        let bf16 = self.take_flag("bf16");
        let pure = pure.and_then(|key| self.take_flag(key));
        let fp16 = self.take_flag("fp16");
        if bf16 == Some(true) || pure == Some(true) {
            self.carry("bf16", "model.dtype", "bf16");
        } else if bf16.is_some() {
            self.same_already();
        }
        match fp16 {
            Some(true) if bf16 != Some(true) => {
                self.choices
                    .push(Chosen::new("model.dtype", "bf16", "In place of fp16"));
                self.leave("fp16", "bf16 is written in its place: f16 needs a GPU");
            }
            Some(_) => self.same_already(),
            None => {}
        }
    }

    /// A share of validation records; a number of records has no counterpart.
    fn validation_share(&mut self, key: &str) {
        match self.take(key).as_ref().and_then(values::number) {
            None => {}
            Some(0.0) => self.same_already(),
            Some(share) if share < 1.0 => self.carry(key, "data.validation_fraction", share),
            Some(_) => self.leave(
                key,
                "write the share of the records as `data.validation_fraction`",
            ),
        }
    }

    /// Steps where they are given, else epochs.
    fn length(&mut self) {
        let steps = self.take("max_steps").as_ref().and_then(values::number);
        if let Some(steps) = steps.filter(|steps| *steps > 0.0) {
            self.choices.retain(|choice| choice.key != "train.epochs");
            self.carry("max_steps", "train.steps", steps as i64);
            for key in ["num_epochs", "num_train_epochs"] {
                if self.take(key).is_some() {
                    self.leave(key, "`max_steps` holds");
                }
            }
        }
    }

    /// Warm-up in steps where they are given, else as a share.
    fn warmup(&mut self) {
        let steps = self.take("warmup_steps").as_ref().and_then(values::number);
        let Some(steps) = steps.filter(|steps| *steps > 0.0) else {
            return;
        };
        self.choices
            .retain(|choice| choice.key != "train.warmup_ratio");
        self.carry("warmup_steps", "train.warmup_steps", steps as i64);
        if self.take("warmup_ratio").is_some() {
            self.leave("warmup_ratio", "`warmup_steps` holds");
        }
    }

    /// Intervals in steps; a share of the run has no counterpart.
    fn interval(&mut self, key: &str, ours: &'static str) {
        match self.take(key).as_ref().and_then(values::number) {
            None => {}
            Some(steps) if steps >= 1.0 => self.carry(key, ours, steps as i64),
            Some(_) => self.leave(key, format!("write `{ours}` in steps")),
        }
    }

    /// Recomputed activations: where memory forces it, or never.
    fn checkpointing(&mut self, key: &str, on: bool) {
        let Some(flag) = self.take_flag(key) else {
            return;
        };
        let value = if flag == on { "auto" } else { "never" };
        self.carry(key, "train.activation_checkpointing", value);
    }

    fn refuse(&self, key: &str, value: &str) -> Error {
        Error::new(
            Kind::Recipe,
            "the file trains by a method that a recipe does not describe",
        )
        .at(key)
        .value(value)
        .rule("supervised fine-tuning with LoRA, or of every weight")
        .hint("write a recipe by `wattune recipe init --model ID --data FILE`")
    }
}

#[cfg(test)]
mod tests;
