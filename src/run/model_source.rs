//! The model of `eval`, `generate` and `merge`: named by options, by an adapter's configuration or by a run directory.

use std::path::{Path, PathBuf};

use chrono::NaiveDate;

use super::directory::RunDirectory;
use crate::adapter::config::CONFIG_FILE;
use crate::adapter::peft::load_config;
use crate::error::{Error, Kind, Result};
use crate::recipe::{self, Adapter, ModelId, Recipe};

/// What names a model; each part is optional.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelSelection<'a> {
    /// A run directory, or a PEFT adapter's.
    pub run: Option<&'a Path>,
    /// Hub id, directory or `embedded:NAME`; replaces the base model that the run or the adapter names.
    pub model: Option<&'a str>,
    /// Branch, tag or commit of a hub model.
    pub revision: Option<&'a str>,
    /// A GGUF file of the model's repository or directory.
    pub file: Option<&'a str>,
    /// A PEFT adapter's directory.
    pub adapter: Option<&'a Path>,
}

/// A model, with an adapter or without.
#[derive(Debug, Clone)]
pub struct ModelSource {
    /// The base model.
    pub id: ModelId,
    /// Branch, tag or commit of a hub model.
    pub revision: String,
    /// A GGUF file of the model's repository or directory.
    pub file: Option<String>,
    /// A PEFT adapter's directory.
    pub adapter: Option<PathBuf>,
    /// The recipe of the run that was given.
    pub recipe: Option<Recipe>,
}

impl ModelSelection<'_> {
    /// Finds the base model: `model`, else the run's, else the adapter's `base_model_name_or_path`.
    ///
    /// # Errors
    /// Options that contradict each other, a run without a result, an adapter that names no base model.
    pub fn resolve(&self) -> Result<ModelSource> {
        let Some(path) = self.run else {
            return match (self.model, self.adapter) {
                (_, Some(adapter)) => self.with_adapter(adapter),
                (Some(model), None) => Ok(self.source(model_id(model)?, None, None)),
                (None, None) => Err(Error::new(Kind::Usage, "no model was given")
                    .hint("give a run directory, `--model ID|DIRECTORY` or `--adapter DIRECTORY`")),
            };
        };
        if let Some(adapter) = self.adapter {
            return Err(Error::new(
                Kind::Usage,
                "two adapters were given: a directory and `--adapter`",
            )
            .value(format!("{}, {}", path.display(), adapter.display()))
            .hint("leave one of them out"));
        }
        if path.join(CONFIG_FILE).is_file() {
            return self.with_adapter(path);
        }
        self.of_run(&RunDirectory::open(path)?)
    }

    /// The same for one text: a run or adapter directory, else a model.
    ///
    /// # Errors
    /// As [`ModelSelection::resolve`].
    pub fn named(text: &str) -> Result<ModelSource> {
        let path = Path::new(text);
        let is_adapter = path.join(CONFIG_FILE).is_file();
        let is_run = path.is_dir() && RunDirectory::open(path).is_ok();
        let selection = match is_adapter || is_run {
            true => ModelSelection {
                run: Some(path),
                ..ModelSelection::default()
            },
            false => ModelSelection {
                model: Some(text),
                ..ModelSelection::default()
            },
        };
        selection.resolve()
    }

    fn of_run(&self, directory: &RunDirectory) -> Result<ModelSource> {
        let recipe = recipe::load(&directory.recipe(), &[])?;
        let whole_model = matches!(recipe.adapter, Adapter::None);
        let result = directory.result(whole_model);
        if !result.is_dir() {
            let run = directory.path().display();
            return Err(Error::new(Kind::Run, "the run has no result yet")
                .at(result.display().to_string())
                .hint(format!(
                    "finish it with `wattune train --resume {run}`, or give one of {run}/checkpoints/*"
                )));
        }
        let given = self.model.map(model_id).transpose()?;
        let mut source = if whole_model {
            self.source(given.unwrap_or(ModelId::Directory(result)), None, None)
        } else {
            let base = given.unwrap_or_else(|| recipe.model.id.clone());
            self.source(base, Some(&recipe.model.revision), Some(&result))
        };
        if self.model.is_none() && source.file.is_none() {
            source.file.clone_from(&recipe.model.file);
        }
        source.recipe = Some(recipe);
        Ok(source)
    }

    fn with_adapter(&self, adapter: &Path) -> Result<ModelSource> {
        if let Some(model) = self.model {
            return Ok(self.source(model_id(model)?, None, Some(adapter)));
        }
        let config = load_config(adapter)?;
        let place = format!(
            "{}, `base_model_name_or_path`",
            adapter.join(CONFIG_FILE).display()
        );
        let Some(base) = config
            .base_model_name_or_path
            .filter(|base| !base.is_empty())
        else {
            return Err(
                Error::new(Kind::Usage, "the adapter does not name its base model")
                    .at(place)
                    .hint("name it with `--model ID|DIRECTORY`"),
            );
        };
        let id = ModelId::parse(&base, Path::new(""));
        match id.filter(|id| !matches!(id, ModelId::Directory(dir) if !dir.is_dir())) {
            Some(id) => Ok(self.source(id, config.revision.as_deref(), Some(adapter))),
            None => Err(
                Error::new(Kind::Usage, "the adapter's base model is not there")
                    .at(place)
                    .value(base)
                    .hint("give its place of today with `--model ID|DIRECTORY`"),
            ),
        }
    }

    /// `revision` is that of the place which named the model.
    fn source(&self, id: ModelId, revision: Option<&str>, adapter: Option<&Path>) -> ModelSource {
        ModelSource {
            id,
            revision: self.revision.or(revision).unwrap_or("main").to_string(),
            file: self.file.map(str::to_string),
            adapter: adapter.map(Path::to_path_buf),
            recipe: None,
        }
    }
}

impl ModelSource {
    /// The date that the run's chat template writes.
    pub(super) fn chat_date(&self) -> Option<NaiveDate> {
        self.recipe
            .as_ref()
            .and_then(|recipe| recipe.data.chat_date)
    }
}

/// Parses `--model`.
pub(super) fn model_id(text: &str) -> Result<ModelId> {
    ModelId::parse(text, Path::new("")).ok_or_else(|| {
        Error::new(Kind::Usage, "not a model id or model directory")
            .value(text)
            .rule("a hub id `owner/name`, a directory, or `embedded:NAME`")
            .hint("for example `--model HuggingFaceTB/SmolLM2-135M` or `--model ./my-model`")
    })
}
