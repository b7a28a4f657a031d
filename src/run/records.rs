//! Training and validation records of a recipe, loaded and counted.

use std::path::PathBuf;

use super::checks::Failures;
use super::model::cache_root;
use super::options::data_options;
use crate::data::{self, Dataset, Tokenizer};
use crate::error::Result;
use crate::hub::{Hub, Progress};
use crate::recipe::{DataSource, Recipe, Validation};

/// The records of a run.
pub(super) struct Records {
    pub(super) train: Dataset,
    pub(super) validation: Option<Dataset>,
    /// Paths, or hub ids with their commits.
    pub(super) sources: Vec<String>,
    /// Variables that the chat template prints and the tokenizer does not define.
    undefined_tokens: Vec<String>,
}

impl Records {
    /// Reads and tokenizes the recipe's data in the files of `found`.
    ///
    /// # Errors
    /// Data that cannot be read or tokenized.
    pub(super) fn load(
        recipe: &Recipe,
        found: Sources,
        tokenizer: &Tokenizer,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let options = data_options(recipe);
        let cache = cache_root().ok().map(|root| root.join("tokens"));
        let load =
            |paths: &[PathBuf]| data::load(paths, &options, tokenizer, cache.as_deref(), progress);
        let train = load(&found.train)?;
        let (train, validation) = match (&recipe.data.validation, &found.validation) {
            (Validation::Fraction(fraction), _) => {
                let (train, validation) = train.split(*fraction, recipe.seed)?;
                (train, Some(validation))
            }
            (_, Some(paths)) => (train, Some(load(paths)?)),
            (_, None) => (train, None),
        };
        Ok(Self {
            train,
            validation,
            sources: found.names,
            undefined_tokens: tokenizer.undefined_tokens(),
        })
    }

    /// Content hashes of the data.
    pub(super) fn fingerprints(&self) -> impl Iterator<Item = &[u8]> {
        let sets = [Some(&self.train), self.validation.as_ref()];
        sets.into_iter()
            .flatten()
            .map(|set| set.fingerprint.as_bytes())
    }

    /// Warnings about truncated, dropped and skipped records, and about the chat template.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = set_warnings("training", &self.train);
        if let Some(validation) = &self.validation {
            warnings.extend(set_warnings("validation", validation));
        }
        if self.train.counts.conversations > 0 {
            warnings.extend(self.undefined_tokens.iter().map(|token| {
                format!(
                    "the chat template prints `{token}`, which no file of the tokenizer defines: \
                     nothing stands there (transformers renders the same)"
                )
            }));
        }
        warnings
    }
}

/// Files of a recipe's records.
pub(super) struct Sources {
    train: Vec<PathBuf>,
    validation: Option<Vec<PathBuf>>,
    /// Paths, or hub ids with their commits.
    names: Vec<String>,
}

impl Sources {
    /// The training files.
    pub(super) fn training_files(&self) -> &[PathBuf] {
        &self.train
    }

    /// Finds the files, those of the hub fetched, and looks at the beginning of each local one.
    ///
    /// # Errors
    /// All that cannot be found, fetched or opened.
    pub(super) fn find(recipe: &Recipe, progress: &dyn Progress) -> Result<Self> {
        let mut failures = Failures::default();
        let mut names = Vec::new();
        let mut find = |key: &'static str, source: &DataSource| {
            let (paths, name) = failures.note(locate(source, progress).map_err(|e| e.key(key)))?;
            names.push(name);
            let files = failures.note(data::files(&paths).map_err(|e| e.key(key)));
            for file in files.iter().flatten() {
                failures.note(data::check_file(file).map_err(|e| e.key(key)));
            }
            Some(paths)
        };
        let train = find("data.train", &recipe.data.train);
        let validation = match &recipe.data.validation {
            Validation::Source(source) => find("data.validation", source),
            Validation::None | Validation::Fraction(_) => None,
        };
        failures.or(train).map(|train| Self {
            train,
            validation,
            names,
        })
    }
}

/// The local files that a source stands for; none of a data set on the hub.
///
/// # Errors
/// As [`data::files`].
pub fn data_files(source: &DataSource) -> Result<Vec<PathBuf>> {
    match source {
        DataSource::Files(paths) => data::files(paths),
        DataSource::Hub { .. } => Ok(Vec::new()),
    }
}

/// Local paths of a source, and its name in the report.
pub(super) fn locate(
    source: &DataSource,
    progress: &dyn Progress,
) -> Result<(Vec<PathBuf>, String)> {
    match source {
        DataSource::Files(paths) => {
            let names: Vec<String> = paths
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            Ok((paths.clone(), names.join(", ")))
        }
        DataSource::Hub { id, split } => {
            let files = Hub::from_env()?.dataset(id, "main", split, progress)?;
            Ok((files.files, format!("{id}:{split}@{}", files.commit)))
        }
    }
}

fn set_warnings(name: &str, set: &Dataset) -> Vec<String> {
    let counts = &set.counts;
    let events = [
        (
            counts.truncated,
            "are longer than max_length and were cut at the end",
        ),
        (counts.dropped, "have no loss token left and were dropped"),
        (counts.skipped, "could not be read and were skipped"),
        (
            counts.glued,
            "have no space between prompt and completion: where one belongs there, set data.prompt_template = \"{prompt} \"",
        ),
        (
            counts.empty_answers,
            "have an empty answer: they teach the model to stop at once",
        ),
        (
            counts.without_reasoning,
            "have reasoning that the model's chat template leaves out",
        ),
    ];
    let mut warnings = Vec::new();
    for (count, event) in events {
        if count > 0 {
            warnings.push(format!(
                "{count} of {} {name} records {event}",
                counts.records
            ));
        }
    }
    let classified = set
        .examples
        .iter()
        .any(|example| !example.labels.is_empty());
    if !set.eos_trained && !classified {
        warnings.push(format!(
            "no {name} record ends with the end-of-text token: the model will not learn to stop"
        ));
    }
    warnings
}
