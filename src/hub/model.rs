//! Which files a model is made of, wherever they come from.
//!
//! Owns `ModelFiles`: from a directory, from the hub in two steps (first what is small, then the weights), or from the cache.
//! Takes an id or a directory; returns paths that exist. Knows nothing of what a configuration or a tensor is.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

use super::fetch::Hub;
use super::front_matter;
use super::listing::{Listing, not_cached};
use super::names::{Repo, RepoKind};
use super::progress::Progress;
use super::refusal::Subject;
use super::weights::{self, INDEX, Layout, SINGLE};

const CONFIG: &str = "config.json";
const CARD: &str = "README.md";
/// The small files of a model: all that is fetched before the weights.
const SMALL: [&str; 9] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    CARD,
];
/// The revision of a model that has none.
const LOCAL: &str = "local";

/// A model's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// The hub id, or the directory as it was given.
    pub id: String,
    /// The branch, tag or commit asked for; `local` for a directory.
    pub revision: String,
    /// The commit it stood at; none for a directory.
    pub commit: Option<String>,
    /// The directory that holds the files.
    pub dir: PathBuf,
    /// `config.json`.
    pub config: PathBuf,
    /// The safetensors files, shards in the index's order; empty until they are fetched or where there are none.
    pub weights: Vec<PathBuf>,
    /// `model.safetensors.index.json`, where the weights are sharded and fetched.
    pub weight_map: Option<PathBuf>,
    /// `tokenizer.json`.
    pub tokenizer_json: Option<PathBuf>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<PathBuf>,
    /// `chat_template.jinja`.
    pub chat_template: Option<PathBuf>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<PathBuf>,
    /// `generation_config.json`.
    pub generation_config: Option<PathBuf>,
    /// `vocab.json`.
    pub vocab_json: Option<PathBuf>,
    /// `merges.txt`.
    pub merges: Option<PathBuf>,
    /// The licence that the model card names.
    pub license: Option<String>,
    /// All files the model has, here or on the hub.
    listing: Vec<String>,
}

/// The model in a directory. Weights may be absent (a random start needs none): [`ModelFiles::require_weights`] refuses that.
///
/// # Errors
/// When there is no such directory, no `config.json` in it, or an index whose shards are not all there.
pub fn local_model(dir: &Path) -> Result<ModelFiles> {
    if !dir.is_dir() {
        let what = if dir.exists() {
            "the model is a file, not a directory"
        } else {
            "there is no such model directory"
        };
        let error = Error::new(Kind::Hub, what).at(dir.display().to_string());
        return Err(error.hint("set model.id to a hub id as in `owner/name`, or to a directory with `config.json` in it"));
    }
    let mut listing = names_in(dir)?;
    listing.sort();
    if !listing.iter().any(|name| name == CONFIG) {
        return Err(no_config(&dir.display().to_string(), &listing));
    }
    let mut model = ModelFiles::gather(
        dir.display().to_string(),
        LOCAL.to_string(),
        None,
        dir,
        listing,
    );
    match model.layout() {
        Layout::Single => model.weights = vec![dir.join(SINGLE)],
        Layout::Sharded => {
            let index = dir.join(INDEX);
            model.weights = weights::shards(&index)?
                .iter()
                .map(|shard| dir.join(shard))
                .collect();
            model.weight_map = Some(index);
            let missing: Vec<String> = model
                .weights
                .iter()
                .filter(|path| !path.is_file())
                .map(|path| name_of(path))
                .collect();
            if !missing.is_empty() {
                let error = Error::new(Kind::Hub, "weights are missing")
                    .at(dir.display().to_string())
                    .value(missing.join(", "));
                return Err(error
                    .rule(format!("every file that `{INDEX}` names"))
                    .hint("copy the missing files there"));
            }
        }
        Layout::Absent => {}
    }
    Ok(model)
}

impl ModelFiles {
    /// The weight files.
    ///
    /// # Errors
    /// When there are none (says what is there instead, and how to convert PyTorch files), or one is empty or a Git LFS pointer.
    pub fn require_weights(&self) -> Result<&[PathBuf]> {
        if self.weights.is_empty() {
            let hub = format!("model `{}` at revision `{}`", self.id, self.revision);
            let place = if self.commit.is_some() {
                hub
            } else {
                self.id.clone()
            };
            if self.layout() != Layout::Absent {
                let error =
                    Error::new(Kind::Hub, "the model's weights are not fetched yet").at(place);
                return Err(error.hint("run `wattune train` with a network: it fetches them"));
            }
            return Err(weights::absent(&place, &self.id, &self.listing));
        }
        self.weights
            .iter()
            .try_for_each(|path| weights::check(path))?;
        Ok(&self.weights)
    }

    /// What `dir` holds of a model's small files.
    fn gather(
        id: String,
        revision: String,
        commit: Option<String>,
        dir: &Path,
        listing: Vec<String>,
    ) -> Self {
        let found = |name: &str| Some(dir.join(name)).filter(|path| path.is_file());
        // A card that is no UTF-8 still names its licence in ASCII.
        let card = found(CARD).and_then(|path| std::fs::read(path).ok());
        Self {
            id,
            revision,
            commit,
            dir: dir.to_path_buf(),
            config: dir.join(CONFIG),
            weights: Vec::new(),
            weight_map: None,
            tokenizer_json: found("tokenizer.json"),
            tokenizer_config: found("tokenizer_config.json"),
            chat_template: found("chat_template.jinja"),
            special_tokens_map: found("special_tokens_map.json"),
            generation_config: found("generation_config.json"),
            vocab_json: found("vocab.json"),
            merges: found("merges.txt"),
            license: card.and_then(|card| front_matter::license(&String::from_utf8_lossy(&card))),
            listing,
        }
    }

    fn layout(&self) -> Layout {
        weights::layout(|name| self.listing.iter().any(|file| file == name))
    }

    /// The same model under another name.
    pub(super) fn named(mut self, id: String) -> Self {
        self.id = id;
        self
    }
}

impl Hub {
    /// Fetches a model's small files: configuration, tokenizer, chat template, model card.
    ///
    /// # Errors
    /// When the id or revision is none, the hub refuses or cannot be reached, offline when the files are not in the cache, or
    /// when the model has no `config.json`.
    pub fn model_metadata(
        &self,
        id: &str,
        revision: &str,
        progress: &dyn Progress,
    ) -> Result<ModelFiles> {
        let repo = Repo::new(RepoKind::Model, id, revision)?;
        let listing = self.listing(&repo)?;
        let cache = self.cache(&repo);
        if !listing.files.iter().any(|file| file == CONFIG) {
            return Err(if self.is_offline() {
                not_cached(&repo, Some(CONFIG))
            } else {
                no_config(&repo.called(), &listing.files)
            });
        }
        for file in SMALL
            .iter()
            .filter(|file| listing.files.iter().any(|listed| listed == *file))
        {
            self.file(&listing, file, progress)?;
        }
        cache.record(revision, &listing.commit)?;
        let dir = cache.snapshot(&listing.commit);
        Ok(ModelFiles::gather(
            repo.id,
            repo.revision,
            Some(listing.commit),
            &dir,
            listing.files,
        ))
    }

    /// Fetches a model's weights: one safetensors file, or the index and the shards it names. A model from a directory has them.
    ///
    /// # Errors
    /// When the model has no safetensors weights, or as [`Hub::model_metadata`].
    pub fn model_weights(&self, model: &mut ModelFiles, progress: &dyn Progress) -> Result<()> {
        let Some(commit) = model.commit.clone() else {
            return model.require_weights().map(drop);
        };
        let repo = Repo::new(RepoKind::Model, &model.id, &model.revision)?;
        let listing = Listing {
            repo,
            commit,
            files: model.listing.clone(),
        };
        match model.layout() {
            Layout::Single => model.weights = vec![self.file(&listing, SINGLE, progress)?],
            Layout::Sharded => {
                let index = self.file(&listing, INDEX, progress)?;
                let shards = weights::shards(&index)?;
                self.require_listed(&listing, &shards)?;
                model.weights = shards
                    .iter()
                    .map(|shard| self.file(&listing, shard, progress))
                    .collect::<Result<_>>()?;
                model.weight_map = Some(index);
            }
            Layout::Absent if self.is_offline() && !self.has_other_weights(&listing) => {
                return Err(not_cached(&listing.repo, Some(SINGLE)));
            }
            Layout::Absent => {}
        }
        model.require_weights().map(drop)
    }

    /// Refuses before the first byte of a large file when one of its companions is not there.
    fn require_listed(&self, listing: &Listing, shards: &[String]) -> Result<()> {
        let missing: Vec<&str> = shards
            .iter()
            .map(String::as_str)
            .filter(|shard| !listing.files.iter().any(|file| file == shard))
            .collect();
        match missing.first() {
            None => Ok(()),
            Some(file) if self.is_offline() => Err(not_cached(&listing.repo, Some(file))),
            Some(_) => {
                let place = Subject {
                    repo: &listing.repo,
                    file: Some(INDEX),
                }
                .place();
                let error = Error::new(
                    Kind::Hub,
                    "the index names weights that the model does not have",
                )
                .at(place);
                Err(error
                    .value(missing.join(", "))
                    .hint("choose another revision"))
            }
        }
    }

    /// Offline, weights in another format say more about a model than "not in the cache".
    fn has_other_weights(&self, listing: &Listing) -> bool {
        listing
            .files
            .iter()
            .any(|file| file.ends_with(".bin") || file.ends_with(".gguf"))
    }
}

fn no_config(place: &str, files: &[String]) -> Error {
    let error = Error::new(Kind::Hub, "the model has no `config.json`").at(place);
    let has = |name: &str| files.iter().any(|file| file == name);
    if has("adapter_config.json") {
        return error
            .hint("this is an adapter: name it with `--adapter` or init_from under [adapter], and its base model as the model");
    }
    if has("snapshots") {
        return error.hint(
            "this is the hub's cache folder: use the model's id, or a directory under `snapshots`",
        );
    }
    match files.iter().find(|file| file.ends_with(".gguf")) {
        Some(file) => error.value(format!("a GGUF file: {file}")).hint("choose the repository it was converted from"),
        None => error.hint("choose a model in transformers format: `config.json`, `tokenizer.json` and `model.safetensors`"),
    }
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(|source| Error::io("read", dir, source))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files
            .iter()
            .for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
        folder
    }

    const INDEX_TEXT: &str =
        r#"{"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"}}"#;

    #[test]
    fn a_directory_with_one_weight_file_is_a_model() {
        let dir = folder(&[
            (CONFIG, "{}"),
            (SINGLE, "w"),
            ("merges.txt", ""),
            ("chat_template.jinja", ""),
            (CARD, "---\nlicense: mit\n---\n"),
            (INDEX, INDEX_TEXT),
        ]);
        let model = local_model(dir.path()).unwrap();
        assert_eq!(model.require_weights().unwrap(), [dir.path().join(SINGLE)]);
        assert_eq!(model.config, dir.path().join(CONFIG));
        assert_eq!(model.merges, Some(dir.path().join("merges.txt")));
        assert_eq!(
            model.chat_template,
            Some(dir.path().join("chat_template.jinja"))
        );
        assert_eq!(
            (model.vocab_json, model.tokenizer_json, model.commit),
            (None, None, None)
        );
        assert_eq!(
            (model.license.as_deref(), model.revision.as_str()),
            (Some("mit"), "local")
        );
    }

    #[test]
    fn shards_must_all_be_there() {
        let dir = folder(&[
            (CONFIG, "{}"),
            (INDEX, INDEX_TEXT),
            ("model-2.safetensors", "w"),
        ]);
        let error = local_model(dir.path()).unwrap_err().to_string();
        assert!(error.contains("value: model-1.safetensors\n"), "{error}");
        fs::write(dir.path().join("model-1.safetensors"), "w").unwrap();
        let model = local_model(dir.path()).unwrap();
        assert_eq!(
            model.weights,
            [
                dir.path().join("model-2.safetensors"),
                dir.path().join("model-1.safetensors")
            ]
        );
        assert_eq!(model.weight_map, Some(dir.path().join(INDEX)));
    }

    #[test]
    fn a_configuration_alone_is_a_model_without_weights() {
        let dir = folder(&[(CONFIG, "{}")]);
        let model = local_model(dir.path()).unwrap();
        assert!(model.weights.is_empty());
        assert!(
            model
                .require_weights()
                .unwrap_err()
                .to_string()
                .contains("init = \"random\"")
        );
        let dir = folder(&[(CONFIG, "{}"), ("pytorch_model.bin", "w")]);
        let error = local_model(dir.path())
            .unwrap()
            .require_weights()
            .unwrap_err();
        assert!(
            error.remedy().unwrap().contains("save_pretrained"),
            "{error}"
        );
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
    }

    #[test]
    fn what_is_no_model_says_what_it_is() {
        let remedy = |files: &[(&str, &str)]| {
            local_model(folder(files).path())
                .unwrap_err()
                .remedy()
                .unwrap()
                .to_string()
        };
        assert!(remedy(&[("adapter_config.json", "{}")]).contains("--adapter"));
        assert!(remedy(&[("snapshots", "")]).contains("snapshots"));
        assert!(remedy(&[("m.gguf", "")]).contains("converted from"));
        assert!(remedy(&[]).contains("config.json"));
        assert_eq!(
            local_model(Path::new("no/such/dir")).unwrap_err().kind(),
            Kind::Hub
        );
        let file = folder(&[("x", "")]);
        assert!(
            local_model(&file.path().join("x"))
                .unwrap_err()
                .to_string()
                .contains("a file, not a directory")
        );
    }

    #[test]
    fn a_git_lfs_pointer_is_no_weight_file() {
        let dir = folder(&[
            (CONFIG, "{}"),
            (
                SINGLE,
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            ),
        ]);
        let error = local_model(dir.path())
            .unwrap()
            .require_weights()
            .unwrap_err();
        assert!(error.remedy().unwrap().contains("git lfs pull"), "{error}");
        let dir = folder(&[(CONFIG, "{}"), (SINGLE, "")]);
        assert!(local_model(dir.path()).unwrap().require_weights().is_err());
    }
}
