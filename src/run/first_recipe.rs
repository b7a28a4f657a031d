//! A recipe for a model and data that no recipe describes yet.
//!
//! Reads the model's configuration and tokenizer and all records, and chooses every value by what they hold and what fits in this
//! machine's memory. Returns the choices, each with its reason, and the plan of the recipe. Writes no file.

use std::path::{Path, PathBuf};

use candle_core::Device;

use super::fit::{Fit, Fitting};
use super::model::{find_model, tokenizer_of};
use super::model_source::model_id;
use super::options::data_options;
use super::records::Sources;
use super::target::{shape_of, target};
use super::task::resolve_task;
use super::{Planned, Prepared, Purpose, Screen, architecture, plan, prepare};
use crate::data::{self, Dataset, Detected, Format, Tokenizer, Wanted, detect};
use crate::energy::{Computing, Profile};
use crate::error::{Error, Kind, Result};
use crate::hub::ModelFiles;
use crate::model::{Architecture, Classified};
use crate::recipe::{self, Chosen, Init, ModelId, Quantization, Recipe, path_from};
use crate::units::{Flops, GramsCo2e, Joules, Seconds};

/// Longest record whose length is looked at, in tokens.
const LONGEST: usize = 32_768;
/// Rows of packed records are at least so long.
const LEAST_ROW: usize = 256;
/// Texts without an answer are cut into windows of at most so many tokens.
const LONGEST_WINDOW: usize = 1024;
/// An epoch has at least so many steps, as far as a step of one row allows.
const STEPS_PER_EPOCH: usize = 50;
/// Rows of a step at most: LoRA learns worse from large batches (Schulman et al., "LoRA Without Regret", 2025).
const MOST_ROWS: usize = 16;
/// Data sets of at least so many records are read once, others three times.
const MANY: usize = 10_000;
/// Records set aside for validation: this share of them, at most so many, and none of very few.
const VALIDATION_SHARE: f64 = 0.05;
const MOST_VALIDATION: f64 = 500.0;
const LEAST_RECORDS: usize = 20;
/// Evaluations during a run, about.
const EVALUATIONS: u64 = 10;
/// Names of a validation file beside the training file.
const VALIDATION_NAMES: [&str; 5] = ["validation", "valid", "val", "dev", "eval"];

/// What a recipe is wanted for.
#[derive(Debug)]
pub struct FirstRecipe<'a> {
    /// Where the recipe will be written; relative paths in it count from its folder.
    pub path: &'a Path,
    /// Hub id, directory or GGUF file.
    pub model: &'a str,
    /// File, folder, pattern or hub id of the records.
    pub data: &'a str,
    /// The same of validation records; `None`: a file beside the training file, else a part of it.
    pub validation: Option<&'a str>,
    /// Wanted field -> column; empty: by the fields' names.
    pub columns: &'a [(String, String)],
    /// A limit in any unit of energy, carbon, time or work.
    pub budget: Option<&'a str>,
}

/// A recipe with its reasons and its plan.
pub struct Suggestion {
    /// Every key that is set.
    pub choices: Vec<Chosen>,
    /// The recipe.
    pub text: String,
    /// The recipe, prepared for a plan.
    pub prepared: Prepared,
    /// Its plan.
    pub planned: Planned,
}

/// Chooses a recipe for `request` on `device`.
///
/// # Errors
/// A model or records that cannot be read, fields that say nothing of their meaning, and everything that a plan refuses.
pub fn first_recipe(
    request: &FirstRecipe<'_>,
    device: &Device,
    computing: Computing,
    screen: &mut dyn Screen,
) -> Result<Suggestion> {
    let mut choices = named_choices(request)?;
    let looked = Looked::at(request, &mut choices, device, screen)?;
    let set = looked.longest_records(request, &mut choices, screen)?;
    let wanted_length = length_choice(&set, &looked, &mut choices);
    let recipe = parsed(request.path, &choices)?;
    let mut prepared_recipe = recipe.clone();
    let mut architecture = looked.architecture.clone();
    resolve_task(
        &mut prepared_recipe,
        &mut architecture,
        Some(&looked.files_of_data),
    )?;
    let profile = Profile::resolve(&recipe.energy.device, computing)?;
    let fitting = Fitting {
        recipe: &prepared_recipe,
        files: &looked.files,
        device,
        profile: &profile,
        max_length: wanted_length,
    };
    let rows = rows_per_epoch(&set, wanted_length, recipe.data.packing);
    let fit = fitting.find(rows_per_step(rows))?;
    let target = target(&mut prepared_recipe, &architecture)?;
    let blocks = shape_of(&prepared_recipe, &architecture, &target).backward_blocks();
    choices.extend(fit.choices(blocks));
    choices.extend(training_choices(&set, &fit, rows));
    if recipe.data.validation == recipe::Validation::None {
        choices.extend(validation_choice(set.examples.len()));
    }
    let text = recipe::commented(&head(request), &choices);
    let recipe = recipe::parse(&text, request.path, &[])?;
    let prepared = prepare(recipe, device, computing, Purpose::Plan, screen.downloads())?;
    let planned = plan(&prepared, screen)?;
    planned.check_affordable(&prepared)?;
    Ok(Suggestion {
        choices,
        text,
        prepared,
        planned,
    })
}

fn head(request: &FirstRecipe<'_>) -> String {
    format!(
        "A wattune recipe for {} on {}.\nThe reason for each value stands above it; all keys: `wattune recipe init` without options, \
         or docs/recipe.md.\nPaths are relative to this file.",
        request.model, request.data
    )
}

fn parsed(path: &Path, choices: &[Chosen]) -> Result<Recipe> {
    recipe::parse(&recipe::commented("", choices), path, &[])
}

/// What the request names: model, data and budget.
fn named_choices(request: &FirstRecipe<'_>) -> Result<Vec<Chosen>> {
    let id = match model_id(request.model)? {
        ModelId::Directory(_) => path_from(request.path, request.model),
        ModelId::Hub(_) | ModelId::Embedded(_) => request.model.to_string(),
    };
    let data = path_from(request.path, request.data);
    let mut choices = vec![
        Chosen::new("model.id", id, ""),
        Chosen::new("data.train", data, ""),
        Chosen::new("train.epochs", 1.0, ""),
    ];
    if let Some(budget) = request.budget {
        let why = "Given: training stops before it is passed";
        choices.push(Chosen::new(limit_of(budget)?, budget, why));
    }
    Ok(choices)
}

/// The limit that a text with a unit names.
pub(super) fn limit_of(budget: &str) -> Result<&'static str> {
    let is_known = [
        (budget.parse::<Joules>().is_ok(), "budget.energy"),
        (budget.parse::<GramsCo2e>().is_ok(), "budget.carbon"),
        (budget.parse::<Seconds>().is_ok(), "budget.time"),
        (budget.parse::<Flops>().is_ok(), "budget.flops"),
    ];
    let known = is_known.into_iter().find(|(known, _)| *known);
    known.map(|(_, key)| key).ok_or_else(|| {
        Error::new(Kind::Usage, "the budget has no unit that is known")
            .value(budget)
            .rule("energy (\"5 Wh\"), carbon (\"2 g\"), time (\"10 min\") or work (\"1e15 FLOP\")")
            .hint("write `--budget \"5 Wh\"`")
    })
}

/// The model and data as far as they decide the recipe.
struct Looked {
    files: ModelFiles,
    architecture: Architecture,
    tokenizer: Tokenizer,
    files_of_data: Vec<PathBuf>,
    detected: Detected,
}

impl Looked {
    fn at(
        request: &FirstRecipe<'_>,
        choices: &mut Vec<Chosen>,
        device: &Device,
        screen: &mut dyn Screen,
    ) -> Result<Self> {
        let recipe = parsed(request.path, choices)?;
        let files = find_model(
            &recipe.model.id,
            &recipe.model.revision,
            recipe.model.file.as_deref(),
            screen.downloads(),
        )?;
        let architecture =
            architecture::architecture_of(&files, Init::Pretrained, Quantization::None, device)?;
        let tokenizer = tokenizer_of(&files, architecture.vocab_size, None)?;
        let files_of_data =
            data::files(Sources::find(&recipe, screen.downloads())?.training_files())?;
        let wanted = match architecture.classified() {
            None => Wanted::Text,
            Some(Classified::Sequences) => Wanted::Classes,
            Some(Classified::Tokens) => Wanted::WordClasses,
        };
        let detected = detect(&files_of_data, wanted, request.columns)?;
        choices.extend(format_choices(&detected, request));
        Ok(Self {
            files,
            architecture,
            tokenizer,
            files_of_data,
            detected,
        })
    }

    /// All records at the greatest length that the model reads, with the prompt template that they need.
    fn longest_records(
        &self,
        request: &FirstRecipe<'_>,
        choices: &mut Vec<Chosen>,
        screen: &mut dyn Screen,
    ) -> Result<Dataset> {
        let has_prompt = matches!(self.detected.format, Format::Completion | Format::Alpaca);
        if has_prompt && self.tokenizer.chat_template().is_some() {
            let why = "The model has a chat template: prompts become its user's turn, as programs that serve it send them";
            choices.push(Chosen::new("data.prompt_template", "chat", why));
        }
        let set = self.load(request, choices, screen)?;
        if 2 * set.counts.glued <= set.counts.records {
            return Ok(set);
        }
        let why =
            "Prompts and answers have no space between them: a line end keeps their tokens apart";
        choices.push(Chosen::new("data.prompt_template", "{prompt}\n", why));
        self.load(request, choices, screen)
    }

    fn load(
        &self,
        request: &FirstRecipe<'_>,
        choices: &[Chosen],
        screen: &mut dyn Screen,
    ) -> Result<Dataset> {
        let mut recipe = parsed(request.path, choices)?;
        let mut architecture = self.architecture.clone();
        resolve_task(&mut recipe, &mut architecture, Some(&self.files_of_data))?;
        recipe.data.max_length = self.longest();
        let options = data_options(&recipe);
        data::load(
            &self.files_of_data,
            &options,
            &self.tokenizer,
            None,
            screen.downloads(),
        )
    }

    fn longest(&self) -> usize {
        self.architecture.max_position_embeddings.min(LONGEST)
    }
}

/// Format, columns and validation records.
fn format_choices(detected: &Detected, request: &FirstRecipe<'_>) -> Vec<Chosen> {
    let format = match detected.format {
        Format::Completion => "completion",
        Format::Messages => "messages",
        Format::Alpaca => "alpaca",
        Format::Classification => "classification",
        Format::Text | Format::Auto => "text",
    };
    let fields = detected.fields.join(", ");
    let mut why = format!("The records have the fields {fields}");
    let has_label = detected
        .fields
        .iter()
        .any(|field| field == "label" || field == "labels");
    if has_label && detected.format == Format::Text {
        why += "; a classifier of them: `task = \"sequence-classification\"` in [model] and `format = \"classification\"` here";
    }
    let mut choices = vec![Chosen::new("data.format", format, why)];
    if !detected.columns.is_empty() {
        let mut columns = toml_edit::InlineTable::new();
        for (field, column) in &detected.columns {
            columns.insert(field, column.as_str().into());
        }
        let why = "Read as the fields on the left";
        choices.push(Chosen::new("data.columns", columns, why));
    }
    let beside = || validation_beside(Path::new(request.data));
    let found = request.validation.map(str::to_string).or_else(beside);
    if let Some(file) = found {
        let why = match request.validation {
            Some(_) => "Given",
            None => "Found beside the training records",
        };
        let file = path_from(request.path, &file);
        choices.push(Chosen::new("data.validation", file, why));
    }
    choices
}

/// `validation.jsonl` and the like in the folder of a training file.
fn validation_beside(train: &Path) -> Option<String> {
    let extension = train.extension().filter(|_| train.is_file())?;
    let mut paths = VALIDATION_NAMES
        .iter()
        .map(|name| train.with_file_name(name).with_extension(extension));
    let found = paths.find(|path| path.is_file() && path.as_path() != train)?;
    Some(found.display().to_string())
}

/// `data.max_length`, by the lengths of the records.
fn length_choice(set: &Dataset, looked: &Looked, choices: &mut Vec<Chosen>) -> usize {
    let mut lengths: Vec<usize> = set.examples.iter().map(|one| one.tokens.len()).collect();
    lengths.sort_unstable();
    let most = looked.longest();
    let (length, mut why) = covering_length(&lengths, looked.detected.format, most);
    let cut = set.counts.truncated;
    if cut > 0 && length == most {
        why = format!("The model reads at most {most} tokens: {cut} longer records are cut");
    }
    choices.push(Chosen::new("data.max_length", length as i64, why));
    length
}

/// A length that covers the sorted `lengths`, or 99 % of them if the longest are far longer; at most `most`.
fn covering_length(lengths: &[usize], format: Format, most: usize) -> (usize, String) {
    const MULTIPLE: usize = 64;
    let count = lengths.len();
    let longest = lengths[count - 1];
    let usual = lengths[(count * 99).div_ceil(100) - 1];
    let covered = if 2 * longest <= 3 * usual {
        longest
    } else {
        usual
    };
    let mut length = covered.next_multiple_of(MULTIPLE).max(LEAST_ROW);
    if format == Format::Text {
        length = length.min(LONGEST_WINDOW);
    }
    let length = length.min(most);
    let longer = lengths.iter().filter(|one| **one > length).count();
    let shorter = |what: &str| {
        format!("The longest of {count} {what} has {longest} tokens; shorter ones share a row")
    };
    let why = match longer {
        0 => shorter(if format == Format::Text {
            "texts"
        } else {
            "records"
        }),
        _ if format == Format::Text => {
            format!("Texts have up to {longest} tokens: longer ones become windows of this length")
        }
        longer => format!(
            "99 % of {count} records have at most {usual} tokens; {longer} longer ones are cut, the longest has {longest}"
        ),
    };
    (length, why)
}

/// Rows of an epoch.
fn rows_per_epoch(set: &Dataset, length: usize, packing: bool) -> usize {
    let tokens = set.examples.iter().map(|one| one.tokens.len().min(length));
    if packing {
        tokens.sum::<usize>().div_ceil(length)
    } else {
        set.examples.len()
    }
}

/// Rows of a step: a power of two.
fn rows_per_step(rows: usize) -> usize {
    let most = (rows / STEPS_PER_EPOCH).clamp(1, MOST_ROWS);
    1 << most.ilog2()
}

/// Length, rate, evaluation and validation.
fn training_choices(set: &Dataset, fit: &Fit, rows: usize) -> Vec<Chosen> {
    let records = set.examples.len();
    let (epochs, how_many) = if records < MANY {
        (3.0, "few")
    } else {
        (1.0, "many")
    };
    let why = format!(
        "{records} records are {how_many}; `steps`, or a limit in [budget], may end it earlier"
    );
    let mut choices = vec![
        Chosen::new("train.epochs", epochs, why),
        Chosen::new(
            "train.learning_rate",
            rate(),
            "Usual for LoRA: about ten times that of training every weight",
        ),
    ];
    let steps = (epochs * rows as f64 / fit.rows() as f64).ceil() as i64;
    let every = (steps as u64).div_ceil(EVALUATIONS) as i64;
    let why = format!("About {EVALUATIONS} times in about {steps} steps");
    choices.push(Chosen::new("train.eval_every", every, why.clone()));
    choices.push(Chosen::new("train.save_every", every, why));
    choices
}

/// 2e-4, written so.
fn rate() -> toml_edit::Value {
    "2e-4".parse().expect("a number is TOML")
}

/// A share of the training records, if no validation records are named and there are enough.
fn validation_choice(records: usize) -> Option<Chosen> {
    let share = VALIDATION_SHARE.min(MOST_VALIDATION / records as f64);
    let share = (share * 1e4).round().max(1.0) / 1e4;
    let count = (share * records as f64).round();
    let why =
        format!("{count} of {records} records, chosen by the seed, show whether training helps");
    (records >= LEAST_RECORDS).then(|| Chosen::new("data.validation_fraction", share, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_covers_all_records_or_nearly_all() {
        let length = |lengths: &[usize], most| covering_length(lengths, Format::Completion, most).0;
        // 100 records: 99 have 300 tokens, the last 400 is near, 4000 is far.
        let with = |last: usize| [vec![300; 99], vec![last]].concat();
        assert_eq!(length(&with(400), 2048), 448);
        assert_eq!(length(&with(4000), 8192), 320);
        assert_eq!(length(&[10], 8192), LEAST_ROW);
        assert_eq!(length(&[10], 128), 128);
        let text = covering_length(&[5000], Format::Text, 8192);
        assert_eq!(text.0, LONGEST_WINDOW);
        let (_, why) = covering_length(&with(4000), Format::Completion, 8192);
        assert!(why.contains("at most 300 tokens; 1 longer"), "{why}");
    }

    #[test]
    fn an_epoch_has_fifty_steps_where_the_rows_suffice() {
        assert_eq!(
            [10, 99, 100, 450, 10_000].map(rows_per_step),
            [1, 1, 2, 8, 16]
        );
    }

    #[test]
    fn the_unit_names_the_limit() {
        for (text, key) in [
            ("5 Wh", "budget.energy"),
            ("2 g", "budget.carbon"),
            ("10 min", "budget.time"),
            ("1e15 FLOP", "budget.flops"),
        ] {
            assert_eq!(limit_of(text).unwrap(), key);
        }
        let error = limit_of("5 apples").unwrap_err().to_string();
        assert!(
            error.contains("5 apples") && error.contains("--budget"),
            "{error}"
        );
    }

    #[test]
    fn validation_records_are_a_share_but_not_too_many() {
        assert!(validation_choice(19).is_none());
        assert_eq!(validation_choice(1000).unwrap().value, "0.05");
        assert_eq!(validation_choice(100_000).unwrap().value, "0.005");
    }
}
