//! A model's directory and the files in it.
//!
//! A hub model becomes a directory (a snapshot in the cache), first with its small files, then with its
//! weights; an embedded one is written to a directory. Knows nothing of configurations and tensors.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Kind, Result};

use super::Progress;
use super::client::{Hub, Listing};
use super::errors::not_cached;
use super::repo::{Repo, RepoKind, is_relative_path};

const CONFIG: &str = "config.json";
const CARD: &str = "README.md";
/// Folder of further chat templates, one `.jinja` file each.
const CHAT_TEMPLATES: &str = "additional_chat_templates";
/// Files that every copy of a model carries besides its weights and configuration, as far as their names follow no pattern: all
/// that transformers reads or writes for a tokenizer, a processor and generation.
const COMPANIONS: [&str; 13] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
];
/// Starts and endings of the names of vocabulary files: tokenizers, SentencePiece, tiktoken.
const VOCABULARY_START: &str = "tokenizer.";
const VOCABULARY_ENDINGS: [&str; 2] = [".model", ".tiktoken"];
/// Words in the names of licence files, in lower case, and the endings that such a file may have.
const LICENCE_WORDS: [&str; 6] = [
    "license",
    "licence",
    "notice",
    "copying",
    "copyright",
    "use_policy",
];
const LICENCE_ENDINGS: [&str; 6] = ["", "txt", "md", "rst", "html", "pdf"];
/// All weights in one file; transformers, too, prefers it to an index.
const SINGLE: &str = "model.safetensors";
/// Tensor name -> shard.
const INDEX: &str = "model.safetensors.index.json";
/// The first bytes of the file that Git LFS leaves in place of the real one.
const LFS_POINTER: &[u8] = b"version https://git-lfs";
/// The revision of a model in a directory.
const LOCAL: &str = "local";

/// A model in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// The hub id, `embedded:NAME`, or the directory as given.
    pub id: String,
    /// The branch, tag or commit of a hub model, else `local`.
    pub revision: String,
    /// The commit of a hub model.
    pub commit: Option<String>,
    /// The directory.
    pub dir: PathBuf,
    /// `config.json`.
    pub config: PathBuf,
    /// The safetensors files, shards in the index's order; empty until fetched, and where there are none.
    pub weights: Vec<PathBuf>,
    /// The licence in the model card's front matter.
    pub license: Option<String>,
    /// All file names: those in the directory, or those on the hub.
    listing: Vec<String>,
}

impl ModelFiles {
    /// The model in a directory. [`ModelFiles::require_weights`] refuses one without weights.
    ///
    /// # Errors
    /// When there is no such directory, no `config.json` in it, or an index with missing shards.
    pub fn open(dir: &Path) -> Result<Self> {
        let place = dir.display().to_string();
        if !dir.is_dir() {
            let what = if dir.exists() {
                "the model is a file, not a directory"
            } else {
                "there is no such model directory"
            };
            return Err(Error::new(Kind::Hub, what).at(place).hint(
                "set model.id to a hub id as in `owner/name`, or to a directory with `config.json` in it",
            ));
        }
        let entries = std::fs::read_dir(dir).map_err(|source| Error::io("read", dir, source))?;
        let names = |entries: std::fs::ReadDir| {
            let names = entries.flatten().map(|entry| entry.file_name());
            names.filter_map(|name| name.into_string().ok())
        };
        let mut listing: Vec<String> = names(entries).collect();
        if let Ok(entries) = std::fs::read_dir(dir.join(CHAT_TEMPLATES)) {
            listing.extend(names(entries).map(|name| format!("{CHAT_TEMPLATES}/{name}")));
        }
        listing.sort();
        let mut model = Self::in_directory(dir, place, listing)?;
        model.find_weights()?;
        Ok(model)
    }

    /// The same with these weight files.
    pub fn with_weights(self, weights: Vec<PathBuf>) -> Self {
        Self { weights, ..self }
    }

    fn in_directory(dir: &Path, id: String, listing: Vec<String>) -> Result<Self> {
        if !listing.iter().any(|name| name == CONFIG) {
            return Err(no_config(&id, &listing));
        }
        // A card that is not UTF-8 still names its licence in ASCII.
        let card = std::fs::read(dir.join(CARD)).unwrap_or_default();
        Ok(Self {
            id,
            revision: LOCAL.to_string(),
            commit: None,
            dir: dir.to_path_buf(),
            config: dir.join(CONFIG),
            weights: Vec::new(),
            license: license(&String::from_utf8_lossy(&card)),
            listing,
        })
    }

    /// The path of a file, if it is in the directory.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.dir.join(name)).filter(|path| path.is_file())
    }

    /// Names, in the directory, of the files that a copy of the model carries besides weights and configuration: tokenizer, chat
    /// templates, processor, generation settings, licence.
    pub fn companions(&self) -> impl Iterator<Item = &str> {
        let names = self.listing.iter().map(String::as_str);
        names.filter(|name| is_companion(name) && self.dir.join(name).is_file())
    }

    /// The chat templates besides `chat_template.jinja`, in order of their names.
    pub fn additional_chat_templates(&self) -> Vec<PathBuf> {
        let is_template = |name: &&str| {
            name.split_once('/')
                .is_some_and(|(folder, _)| folder == CHAT_TEMPLATES)
        };
        let mut names: Vec<&str> = self.companions().filter(is_template).collect();
        names.sort_unstable();
        names.into_iter().map(|name| self.dir.join(name)).collect()
    }

    fn lists(&self, name: &str) -> bool {
        self.listing.iter().any(|file| file == name)
    }

    /// The weight files.
    ///
    /// # Errors
    /// When there are none (names what there is, and how to convert PyTorch files), or one is empty or a Git LFS pointer.
    pub fn require_weights(&self) -> Result<&[PathBuf]> {
        if self.weights.is_empty() {
            let place = match self.commit {
                Some(_) => format!("model `{}` at revision `{}`", self.id, self.revision),
                None => self.id.clone(),
            };
            if self.lists(SINGLE) || self.lists(INDEX) {
                let what = "the model's weights are not fetched yet";
                return Err(Error::new(Kind::Hub, what)
                    .at(place)
                    .hint("run `wattune train` with a network: it fetches them"));
            }
            return Err(no_weights(&self.id, &self.listing).at(place));
        }
        self.weights.iter().try_for_each(|path| check_file(path))?;
        Ok(&self.weights)
    }

    /// Fills `weights` from the directory.
    fn find_weights(&mut self) -> Result<()> {
        let names = if self.lists(SINGLE) {
            vec![SINGLE.to_string()]
        } else if self.lists(INDEX) {
            shards(&self.dir.join(INDEX))?
        } else {
            return Ok(());
        };
        let is_missing = |name: &&String| !self.dir.join(name).is_file();
        let missing: Vec<&str> = names
            .iter()
            .filter(is_missing)
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            return Err(Error::new(Kind::Hub, "weights are missing")
                .at(self.dir.display().to_string())
                .value(missing.join(", "))
                .rule(format!("every file that `{INDEX}` names"))
                .hint("copy the missing files there"));
        }
        self.weights = names.iter().map(|name| self.dir.join(name)).collect();
        Ok(())
    }
}

/// A file in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedFile {
    /// Its path in the snapshot of the commit.
    pub path: PathBuf,
    /// The commit it is of.
    pub commit: String,
}

impl Hub {
    /// Fetches a model's small files: configuration, tokenizer, chat template, model card.
    ///
    /// # Errors
    /// When the id or revision is invalid, the request fails, the files are not in the cache offline, or the model has no
    /// `config.json`.
    pub fn model(&self, id: &str, revision: &str, progress: &dyn Progress) -> Result<ModelFiles> {
        let repo = Repo::new(RepoKind::Model, id, revision)?;
        let listing = self.listing(&repo, progress)?;
        if self.is_offline() && !listing.contains(CONFIG) {
            return Err(not_cached(&repo, Some(CONFIG)));
        }
        if !listing.contains(CONFIG) {
            return Err(no_config(&repo.place(None), &listing.files));
        }
        let is_small =
            |name: &&String| [CONFIG, CARD].contains(&name.as_str()) || is_companion(name);
        for file in listing.files.iter().filter(is_small) {
            self.file(&listing, file, progress)?;
        }
        let cache = self.cache(&repo);
        cache.write_ref(revision, &listing.commit)?;
        let dir = cache.snapshot(&listing.commit);
        let mut model = ModelFiles::in_directory(&dir, repo.id, listing.files)?;
        model.revision = repo.revision;
        model.commit = Some(listing.commit);
        Ok(model)
    }

    /// Fetches one file of a model.
    ///
    /// # Errors
    /// When the repository has no such file, or as [`Hub::model`].
    pub fn model_file(
        &self,
        id: &str,
        revision: &str,
        file: &str,
        progress: &dyn Progress,
    ) -> Result<FetchedFile> {
        let repo = Repo::new(RepoKind::Model, id, revision)?;
        let listing = self.listing(&repo, progress)?;
        if !listing.contains(file) {
            if self.is_offline() {
                return Err(not_cached(&repo, Some(file)));
            }
            let same_kind =
                |name: &&String| Path::new(name).extension() == Path::new(file).extension();
            let found: Vec<&str> = listing
                .files
                .iter()
                .filter(same_kind)
                .map(String::as_str)
                .collect();
            return Err(Error::new(Kind::Hub, "the repository has no such file")
                .at(repo.place(None))
                .value(file)
                .rule(format!(
                    "one of {}",
                    if found.is_empty() {
                        "none: it has no file of this kind".into()
                    } else {
                        found.join(", ")
                    }
                ))
                .hint("correct `file` in [model], or `--model-file`"));
        }
        let path = self.file(&listing, file, progress)?;
        self.cache(&repo).write_ref(revision, &listing.commit)?;
        Ok(FetchedFile {
            path,
            commit: listing.commit,
        })
    }

    /// Fetches a hub model's weights: one safetensors file, or the index and its shards. A model from a directory has them.
    ///
    /// # Errors
    /// When the model has no safetensors weights, or as [`Hub::model`].
    pub fn model_weights(&self, model: &mut ModelFiles, progress: &dyn Progress) -> Result<()> {
        let Some(commit) = model.commit.clone() else {
            return model.require_weights().map(drop);
        };
        let listing = Listing {
            repo: Repo::new(RepoKind::Model, &model.id, &model.revision)?,
            commit,
            files: model.listing.clone(),
        };
        if model.lists(SINGLE) {
            self.file(&listing, SINGLE, progress)?;
        } else if model.lists(INDEX) {
            let shards = shards(&self.file(&listing, INDEX, progress)?)?;
            self.require_listed(&listing, &shards)?;
            for shard in &shards {
                self.file(&listing, shard, progress)?;
            }
        } else if self.is_offline() {
            // Weights in another format tell more than "not in the cache".
            let other = |file: &String| file.ends_with(".bin") || file.ends_with(".gguf");
            if !listing.files.iter().any(other) {
                return Err(not_cached(&listing.repo, Some(SINGLE)));
            }
        }
        model.find_weights()?;
        model.require_weights().map(drop)
    }

    /// Refuses an index with a missing shard before the first shard is fetched.
    fn require_listed(&self, listing: &Listing, shards: &[String]) -> Result<()> {
        let is_missing = |shard: &&String| !listing.contains(shard);
        let missing: Vec<&str> = shards
            .iter()
            .filter(is_missing)
            .map(String::as_str)
            .collect();
        match missing.first() {
            None => Ok(()),
            Some(file) if self.is_offline() => Err(not_cached(&listing.repo, Some(file))),
            Some(_) => {
                let what = "the index names weights that the model does not have";
                Err(Error::new(Kind::Hub, what)
                    .at(listing.repo.place(Some(INDEX)))
                    .value(missing.join(", "))
                    .hint("choose another revision"))
            }
        }
    }
}

fn is_companion(name: &str) -> bool {
    if let Some((folder, file)) = name.split_once('/') {
        return folder == CHAT_TEMPLATES && !file.contains('/') && file.ends_with(".jinja");
    }
    let lower = name.to_lowercase();
    let ending = lower.rsplit_once('.').map_or("", |(_, ending)| ending);
    COMPANIONS.contains(&name)
        || name.starts_with(VOCABULARY_START)
        || VOCABULARY_ENDINGS.iter().any(|end| name.ends_with(end))
        || (LICENCE_ENDINGS.contains(&ending)
            && LICENCE_WORDS.iter().any(|word| lower.contains(word)))
}

/// The shards of an index, in order of first mention.
fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        /// In the file's order.
        weight_map: serde_json::Map<String, serde_json::Value>,
    }
    let invalid = |value: String| {
        Error::new(Kind::Hub, "the index of the weights cannot be used")
            .at(index.display().to_string())
            .value(value)
            .rule("`weight_map` names a safetensors file beside the index for each tensor")
            .hint("fetch the model's files again")
    };
    let text = std::fs::read(index).map_err(|source| Error::io("read", index, source))?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|source| invalid(source.to_string()))?;
    let mut shards: Vec<String> = Vec::new();
    for (tensor, shard) in &parsed.weight_map {
        let Some(shard) = shard.as_str() else {
            return Err(invalid(format!("{tensor}: {shard}")));
        };
        if !is_relative_path(shard) || !shard.ends_with(".safetensors") {
            return Err(invalid(shard.escape_debug().to_string()));
        }
        // Neighbours are nearly always in the same shard.
        if shards.last().is_none_or(|last| last != shard) && !shards.iter().any(|s| s == shard) {
            shards.push(shard.to_string());
        }
    }
    if shards.is_empty() {
        return Err(invalid("an empty `weight_map`".to_string()));
    }
    Ok(shards)
}

/// Refuses an empty weight file and a Git LFS pointer.
fn check_file(path: &Path) -> Result<()> {
    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LFS_POINTER.len() as u64).read_to_end(&mut start))
        .map_err(|source| Error::io("read", path, source))?;
    let (what, hint) = match start.as_slice() {
        [] => ("the weights are an empty file", "fetch the file again"),
        LFS_POINTER => (
            "this is a Git LFS pointer, not the weights",
            "run `git lfs install && git lfs pull` in that directory",
        ),
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Hub, what)
        .at(path.display().to_string())
        .hint(hint))
}

fn no_config(place: &str, files: &[String]) -> Error {
    let has = |name: &str| files.iter().any(|file| file == name);
    let error = Error::new(Kind::Hub, "the model has no `config.json`").at(place);
    if has("adapter_config.json") {
        return error.hint(
            "this is an adapter: name it with `--adapter` or init_from under [adapter], and its base model as the model",
        );
    }
    if has("snapshots") {
        return error.hint(
            "this is the hub's cache folder: use the model's id, or a directory under `snapshots`",
        );
    }
    match files.iter().find(|file| file.ends_with(".gguf")) {
        Some(file) => error
            .value(format!("a GGUF file: {file}"))
            .hint("name the file: `file = \"NAME.gguf\"` in [model], or `--model-file NAME.gguf`"),
        None => error.hint(
            "choose a model in transformers format: `config.json`, `tokenizer.json` and `model.safetensors`",
        ),
    }
}

/// No safetensors weights: names what there is instead, and the way to safetensors.
fn no_weights(source: &str, files: &[String]) -> Error {
    let find = |extensions: &[&str]| {
        let has_extension = |file: &&String| extensions.iter().any(|end| file.ends_with(end));
        files.iter().find(has_extension)
    };
    let error = Error::new(Kind::Hub, "the model has no weights in safetensors format")
        .rule(format!("`{SINGLE}`, or `{INDEX}` and the shards it names"));
    if let Some(file) = find(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return error.value(format!("only PyTorch weights: {file}")).hint(format!(
            "convert them once: python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
             M.from_pretrained('{source}').save_pretrained('converted'); T.from_pretrained('{source}')\
             .save_pretrained('converted')\", and set model.id to that directory"
        ));
    }
    match find(&[".gguf", ".h5", ".msgpack", ".onnx"]) {
        Some(file) => error
            .value(format!("only weights in another format: {file}"))
            .hint("choose the repository these were converted from"),
        None => error.hint(format!(
            "put `{SINGLE}` there, or set init = \"random\" under [model] to train from scratch"
        )),
    }
}

/// The `license` of a model card's front matter, or its `license_name` where that is `other`. Reads the three forms of the
/// hub's cards: a scalar, a list in brackets, a list of dashes.
fn license(card: &str) -> Option<String> {
    let mut lines = card.trim_start_matches('\u{feff}').lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let head: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    let plain = |text: &str| {
        let text = text.split(" #").next().unwrap_or_default();
        text.trim().trim_matches(['"', '\'']).to_string()
    };
    let field = |key: &str| {
        let prefix = format!("{key}:");
        let at = head.iter().position(|line| line.starts_with(&prefix))?;
        let value = plain(&head[at][prefix.len()..]);
        let items: Vec<String> = if let Some(list) = value.strip_prefix('[') {
            list.trim_end_matches(']').split(',').map(plain).collect()
        } else if value.is_empty() {
            let rest = head[at + 1..].iter();
            let items = rest.map_while(|line| line.trim_start().strip_prefix("- "));
            items.map(plain).collect()
        } else {
            vec![value]
        };
        let items: Vec<String> = items.into_iter().filter(|item| !item.is_empty()).collect();
        (!items.is_empty()).then(|| items.join(", "))
    };
    let license = field("license")?;
    if license == "other" {
        return field("license_name").or(Some(license));
    }
    Some(license)
}
