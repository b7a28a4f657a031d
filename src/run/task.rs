//! The task of a recipe: resolved against the model's head, with the classes of a classifier.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::model::read_json;
use crate::adapter::config::CONFIG_FILE;
use crate::data::{self, Format};
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, Classified};
use crate::recipe::{Adapter, Recipe, Task};

/// Most classes of a head.
const MOST_LABELS: usize = 1000;

/// Resolves `model.task`, and for a classifier `data.format`, `data.labels` and the head among
/// `adapter.modules_to_save`; gives the head its classes.
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
        architecture.classify(classified, generic_labels())?;
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
    match recipe.data.format {
        Format::Auto => recipe.data.format = Format::Classification,
        Format::Classification => {}
        _ => {
            return Err(refused("data.format", "another format", "a classifier learns from a text and its label")
                .hint("write `format = \"classification\"` in [data], and name the columns: columns = { text = \"COLUMN\", label = \"COLUMN\" }, of words tokens and labels"));
        }
    }
    if recipe.data.labels.is_empty() {
        recipe.data.labels = labels(recipe, architecture, training_files)?;
    }
    check_labels(&recipe.data.labels)?;
    architecture.set_labels(&recipe.data.labels);
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

/// What the recipe, or the adapter that it continues, asks to classify.
fn wanted(recipe: &Recipe) -> Result<Option<Classified>> {
    let continued = match &recipe.adapter {
        Adapter::Lora(lora) => lora.init_from.as_deref(),
        Adapter::None => None,
    };
    match (recipe.model.task, continued) {
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

/// Names of two classes, as transformers gives them.
pub(super) fn generic_labels() -> Vec<String> {
    (0..2).map(|id| format!("LABEL_{id}")).collect()
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
    } else {
        return Ok(());
    };
    Err(error)
}

fn refused(key: &str, value: &str, what: &str) -> Error {
    Error::new(Kind::Recipe, what).at(key).value(value)
}

/// The classes of the continued adapter, of the model, or of the training records.
fn labels(
    recipe: &Recipe,
    architecture: &Architecture,
    training_files: Option<&[PathBuf]>,
) -> Result<Vec<String>> {
    if let Adapter::Lora(lora) = &recipe.adapter
        && let Some(adapter) = &lora.init_from
        && let Some(labels) = saved_labels(adapter)?
    {
        return Ok(labels);
    }
    let of_model = architecture.labels();
    let generic = (0..)
        .zip(of_model)
        .all(|(id, label): (usize, _)| *label == format!("LABEL_{id}"));
    match training_files.filter(|_| generic) {
        Some(files) => {
            let of_words = architecture.classified() == Some(Classified::Tokens);
            data::labels(files, &recipe.data.columns, of_words)
        }
        None => Ok(of_model.to_vec()),
    }
}

fn check_labels(labels: &[String]) -> Result<()> {
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
        .hint("name the column of the classes: columns = { label = \"COLUMN\" }; a number to predict (regression) is not supported"))
}

/// The classes in the config.json of a directory, if it has both.
pub(super) fn saved_labels(dir: &Path) -> Result<Option<Vec<String>>> {
    let path = dir.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let config = read_json(&path)?;
    Ok(config.get("id2label").and_then(label_list))
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
    if config.get("num_labels").is_some() {
        config["num_labels"] = labels.len().into();
    }
}
