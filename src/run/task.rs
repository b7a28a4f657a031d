//! The task of a recipe: resolved against the model's head, with the classes of a classifier.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::model::read_json;
use crate::adapter::config::CONFIG_FILE;
use crate::data::{self, Format, LabelKind};
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, Classified, ProblemType};
use crate::recipe::{self, Adapter, Recipe, Task};

/// Most classes of a head.
const MOST_LABELS: usize = 1000;

/// Resolves `model.task`, and for a classifier `model.problem_type`, `data.format`, `data.labels` and
/// the head among `adapter.modules_to_save`; gives the head its outputs and class weights.
///
/// # Errors
/// A task that the model's head does not compute, settings of another task, and data whose labels
/// are no classes.
pub(super) fn resolve_task(
    recipe: &mut Recipe,
    architecture: &mut Architecture,
    training_files: Option<&[PathBuf]>,
) -> Result<()> {
    if let Some(classified) = wanted(recipe)? {
        architecture.classify(classified, generic_labels(2))?;
    }
    let Some((classified, head)) = architecture.classified().zip(architecture.classifier()) else {
        return check_causal_lm(recipe);
    };
    if recipe.model.task == Task::CausalLm {
        return Err(refused(
            "model.task",
            "\"causal-lm\"",
            "the model classifies: it predicts no next token",
        )
        .hint("write `task = \"sequence-classification\"` in [model], or choose a decoder"));
    }
    recipe.model.task = match classified {
        Classified::Sequences => Task::SequenceClassification,
        Classified::Tokens => Task::TokenClassification,
    };
    resolve_format(recipe)?;
    resolve_outputs(recipe, architecture, training_files)?;
    architecture.set_class_weights(class_weights(recipe)?);
    if let Adapter::Lora(lora) = &mut recipe.adapter
        && lora.init_from.is_none()
    {
        // PEFT adds the head by itself.
        let saved = &mut lora.config.modules_to_save;
        if !saved.iter().any(|name| head.ends_with(name.as_str())) {
            saved.push(head.to_string());
        }
    }
    Ok(())
}

fn resolve_format(recipe: &mut Recipe) -> Result<()> {
    match recipe.data.format {
        Format::Auto => recipe.data.format = Format::Classification,
        Format::Classification => {}
        _ => {
            return Err(refused("data.format", "another format", "a classifier learns from a text and its label")
                .hint("write `format = \"classification\"` in [data], and name the columns: columns = { text = \"COLUMN\", label = \"COLUMN\" }, of words tokens and labels"));
        }
    }
    Ok(())
}

/// Resolves what the head's outputs mean and their names, and gives them to the head.
fn resolve_outputs(
    recipe: &mut Recipe,
    architecture: &mut Architecture,
    training_files: Option<&[PathBuf]>,
) -> Result<()> {
    let words = architecture.classified() == Some(Classified::Tokens);
    let asked = named_problem_type(recipe.model.problem_type);
    let columns = &recipe.data.columns;
    let survey = |files| data::labels(files, columns, words);
    let found = match training_files {
        Some(files) if asked.is_none() || recipe.data.labels.is_empty() => Some(survey(files)?),
        _ => None,
    };
    let saved = continued(recipe).map(saved_head).transpose()?.flatten();
    let of_saved = saved.as_ref().and_then(|saved| saved.problem_type);
    let of_model = architecture.problem_type();
    let stated = of_model.filter(|kind| *kind != ProblemType::SingleLabel);
    let by_labels = found.as_ref().map(|found| match found.kind {
        LabelKind::Labels => ProblemType::MultiLabel,
        LabelKind::Number => ProblemType::Regression,
        LabelKind::Class | LabelKind::ClassesOfWords => ProblemType::SingleLabel,
    });
    let problem_type = asked.or(of_saved).or(stated).or(by_labels);
    let problem_type = problem_type.unwrap_or(ProblemType::SingleLabel);
    if words && problem_type != ProblemType::SingleLabel {
        let what = "each word has one class";
        return Err(refused("model.problem_type", problem_type.name(), what)
            .hint("remove `problem_type`, or write `task = \"sequence-classification\"`"));
    }
    recipe.model.problem_type = recipe_word(problem_type);
    if recipe.data.labels.is_empty() {
        let generic = (0..)
            .zip(architecture.labels())
            .all(|(id, label): (usize, _)| *label == format!("LABEL_{id}"));
        recipe.data.labels = match (saved, found) {
            (Some(saved), _) => saved.labels,
            (None, _) if problem_type == ProblemType::Regression => generic_labels(1),
            (None, Some(found)) if generic => found.names,
            (None, _) => architecture.labels().to_vec(),
        };
    }
    check_labels(&recipe.data.labels, problem_type)?;
    architecture.set_labels(&recipe.data.labels);
    architecture.set_problem_type(problem_type);
    Ok(())
}

/// The problem type that a recipe names; `None`: auto.
pub(super) fn named_problem_type(word: recipe::ProblemType) -> Option<ProblemType> {
    ProblemType::NAMES
        .into_iter()
        .map(|(kind, _)| kind)
        .find(|kind| recipe_word(*kind) == word)
}

fn recipe_word(problem_type: ProblemType) -> recipe::ProblemType {
    match problem_type {
        ProblemType::SingleLabel => recipe::ProblemType::SingleLabelClassification,
        ProblemType::MultiLabel => recipe::ProblemType::MultiLabelClassification,
        ProblemType::Regression => recipe::ProblemType::Regression,
    }
}

/// `train.class_weights` by class id; empty if none are given.
fn class_weights(recipe: &Recipe) -> Result<Vec<f32>> {
    let (given, labels) = (&recipe.train.class_weights, &recipe.data.labels);
    if given.is_empty() {
        return Ok(Vec::new());
    }
    if recipe.model.problem_type != recipe::ProblemType::SingleLabelClassification {
        let what = "class weights are for one class of all";
        return Err(Error::new(Kind::Recipe, what)
            .at("train.class_weights")
            .hint("remove `class_weights`"));
    }
    let mut weights = vec![1.0; labels.len()];
    for (name, weight) in given {
        let class = labels.iter().position(|label| label == name);
        let class = class.ok_or_else(|| {
            refused("train.class_weights", name, "there is no such class")
                .rule(format!("one of {}", labels.join(", ")))
                .hint("write `class_weights = { NAME = WEIGHT }` with the names of `data.labels`")
        })?;
        weights[class] = *weight as f32;
    }
    Ok(weights)
}

/// The adapter that a recipe continues.
fn continued(recipe: &Recipe) -> Option<&Path> {
    match &recipe.adapter {
        Adapter::Lora(lora) => lora.init_from.as_deref(),
        Adapter::None => None,
    }
}

/// What the recipe, or the adapter that it continues, asks to classify.
fn wanted(recipe: &Recipe) -> Result<Option<Classified>> {
    match (recipe.model.task, continued(recipe)) {
        (Task::Auto, Some(adapter)) => classified_by(adapter),
        (task, _) => Ok(classified(task)),
    }
}

/// What a task classifies.
pub(super) fn classified(task: Task) -> Option<Classified> {
    match task {
        Task::SequenceClassification => Some(Classified::Sequences),
        Task::TokenClassification => Some(Classified::Tokens),
        Task::Auto | Task::CausalLm => None,
    }
}

/// What the model of the adapter in a directory classifies.
pub(super) fn classified_by(adapter: &Path) -> Result<Option<Classified>> {
    let path = adapter.join(CONFIG_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let config = read_json(&path)?;
    let task = config.get("task_type").and_then(Value::as_str);
    Ok(task.and_then(Classified::from_task_type))
}

/// Names of outputs, as transformers gives them.
pub(super) fn generic_labels(count: usize) -> Vec<String> {
    (0..count).map(|id| format!("LABEL_{id}")).collect()
}

/// Refuses settings of a classifier for a model that predicts tokens.
fn check_causal_lm(recipe: &Recipe) -> Result<()> {
    const HINT: &str = "write `task = \"sequence-classification\"` in [model]";
    let predicts_tokens = "the model predicts tokens, not classes";
    let error = if recipe.data.format == Format::Classification {
        refused("data.format", "\"classification\"", predicts_tokens)
            .hint(format!("{HINT}, or `format = \"completion\"` in [data]"))
    } else if !recipe.data.labels.is_empty() {
        refused(
            "data.labels",
            &recipe.data.labels.join(", "),
            predicts_tokens,
        )
        .hint(format!("{HINT}, or remove `labels`"))
    } else if !recipe.train.class_weights.is_empty() {
        let names = recipe.train.class_weights.iter();
        let names: Vec<&str> = names.map(|(name, _)| name.as_str()).collect();
        refused("train.class_weights", &names.join(", "), predicts_tokens)
            .hint(format!("{HINT}, or remove `class_weights`"))
    } else if let Some(problem_type) = named_problem_type(recipe.model.problem_type) {
        refused("model.problem_type", problem_type.name(), predicts_tokens)
            .hint(format!("{HINT}, or remove `problem_type`"))
    } else {
        return Ok(());
    };
    Err(error)
}

fn refused(key: &str, value: &str, what: &str) -> Error {
    Error::new(Kind::Recipe, what).at(key).value(value)
}

fn check_labels(labels: &[String], problem_type: ProblemType) -> Result<()> {
    if problem_type == ProblemType::Regression {
        return match labels {
            [_] => Ok(()),
            _ => Err(refused(
                "data.labels",
                &format!("{} labels", labels.len()),
                "a regression has one output",
            )
            .hint("remove `labels`, or write `problem_type = \"single_label_classification\"` in [model]")),
        };
    }
    let mut sorted = labels.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() == labels.len() && (2..=MOST_LABELS).contains(&labels.len()) {
        return Ok(());
    }
    Err(Error::new(Kind::Data, "the labels are no classes to choose from")
        .at("data.labels")
        .value(format!("{} labels, {} of them different", labels.len(), sorted.len()))
        .rule(format!("from 2 to {MOST_LABELS} different names"))
        .hint("name the column of the classes: columns = { label = \"COLUMN\" }; to predict a number write `problem_type = \"regression\"` in [model]"))
}

/// What the config.json of a trained head says of its outputs.
pub(super) struct SavedHead {
    labels: Vec<String>,
    problem_type: Option<ProblemType>,
}

impl SavedHead {
    pub(super) fn apply(&self, architecture: &mut Architecture) {
        architecture.set_labels(&self.labels);
        if let Some(problem_type) = self.problem_type {
            architecture.set_problem_type(problem_type);
        }
    }
}

/// The head that the config.json of a directory describes, if it has both.
pub(super) fn saved_head(dir: &Path) -> Result<Option<SavedHead>> {
    let path = dir.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let config = read_json(&path)?;
    let labels = config.get("id2label").and_then(label_list);
    let problem_type = config.get("problem_type").and_then(Value::as_str);
    Ok(labels.map(|labels| SavedHead {
        labels,
        problem_type: problem_type.and_then(ProblemType::from_name),
    }))
}

/// The names of an `id2label`, by id; `None` if the ids are not 0, 1, 2 and so on.
fn label_list(id2label: &Value) -> Option<Vec<String>> {
    let names = id2label.as_object()?;
    let name = |id: usize| Some(names.get(&id.to_string())?.as_str()?.to_string());
    (0..names.len()).map(name).collect()
}

/// Writes the class and the label map of a classifier into its config.json.
pub(super) fn write_labels(architecture: &Architecture, config: &mut Value) {
    if architecture.classifier().is_none() {
        return;
    }
    let labels = architecture.labels();
    let pairs = || labels.iter().zip(0_u64..);
    let by_id: Map<String, Value> = pairs()
        .map(|(label, id)| (id.to_string(), label.as_str().into()))
        .collect();
    let by_label: Map<String, Value> = pairs()
        .map(|(label, id)| (label.clone(), id.into()))
        .collect();
    config["architectures"] = vec![architecture.class.clone()].into();
    config["id2label"] = by_id.into();
    config["label2id"] = by_label.into();
    if let (Some(Classified::Sequences), Some(problem_type)) =
        (architecture.classified(), architecture.problem_type())
    {
        config["problem_type"] = problem_type.name().into();
    }
    if config.get("num_labels").is_some() {
        config["num_labels"] = labels.len().into();
    }
}
