//! A model id -> a directory with its files; the tokenizer in it.

use std::path::PathBuf;

use crate::data::{Tokenizer, TokenizerFiles};
use crate::error::{Error, Kind, Result};
use crate::hub::{self, Hub, ModelFiles, Progress};
use crate::recipe::ModelId;

/// The directory of a model; a hub model's weights are fetched by [`fetch_weights`] alone.
pub fn find_model(id: &ModelId, revision: &str, progress: &dyn Progress) -> Result<ModelFiles> {
    match id {
        ModelId::Directory(dir) => ModelFiles::open(dir),
        ModelId::Embedded(name) => {
            hub::embedded(name, &cache_root()?.join("embedded")).map_err(|e| match e.kind() {
                Kind::Io => e.hint("set WATTUNE_CACHE to a folder you may write to"),
                _ => e,
            })
        }
        ModelId::Hub(id) => Hub::from_env()?.model(id, revision, progress),
    }
}

/// Fetches the weights that are not in the model's directory yet; checks them.
pub(super) fn fetch_weights(files: &mut ModelFiles, progress: &dyn Progress) -> Result<()> {
    if files.commit.is_some() {
        return Hub::from_env()?.model_weights(files, progress);
    }
    files.require_weights().map(drop)
}

/// The tokenizer among a model's files.
pub fn tokenizer_of(files: &ModelFiles) -> Result<Tokenizer> {
    Tokenizer::load(&TokenizerFiles {
        tokenizer_json: files.file("tokenizer.json"),
        vocab_json: files.file("vocab.json"),
        merges: files.file("merges.txt"),
        tokenizer_config: files.file("tokenizer_config.json"),
        special_tokens_map: files.file("special_tokens_map.json"),
        chat_template: files.file("chat_template.jinja"),
        config: Some(files.config.clone()),
    })
}

/// The files that a copy of the model needs besides its weights.
pub(super) fn companions(files: &ModelFiles) -> Vec<PathBuf> {
    let names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
    ];
    names.iter().filter_map(|name| files.file(name)).collect()
}

/// The folder for what wattune itself caches: `WATTUNE_CACHE`, else `wattune` in the user's cache folder.
pub(super) fn cache_root() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("WATTUNE_CACHE") {
        return Ok(PathBuf::from(folder));
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || {
        Some(
            PathBuf::from(std::env::var_os("HOME").or_else(|| std::env::var_os("USERPROFILE"))?)
                .join(".cache"),
        )
    };
    base.or_else(home)
        .map(|base| base.join("wattune"))
        .ok_or_else(|| {
            Error::new(
                Kind::Io,
                "there is no cache folder: neither HOME nor XDG_CACHE_HOME is set",
            )
            .hint("set WATTUNE_CACHE to a folder")
        })
}
