//! A model id -> its files and tokenizer.

use std::path::PathBuf;

use crate::data::{Tokenizer, TokenizerFiles};
use crate::error::{Error, Kind, Result};
use crate::hub::{self, Hub, ModelFiles, Progress, Settings};
use crate::recipe::ModelId;

/// The files of a model; a hub model's weights are fetched only by `fetch_weights`.
pub fn find_model(id: &ModelId, revision: &str, progress: &dyn Progress) -> Result<ModelFiles> {
    match id {
        ModelId::Directory(dir) => hub::local_model(dir),
        ModelId::Embedded(name) => {
            hub::embedded(name, &cache_root()?.join("embedded")).map_err(|e| match e.kind() {
                Kind::Io => e.hint("set WATTUNE_CACHE to a folder you may write to"),
                _ => e,
            })
        }
        ModelId::Hub(id) => Hub::new(Settings::from_env()?)?.model_metadata(id, revision, progress),
    }
}

/// Fetches a hub model's weights; checks that another model's are there.
pub(super) fn fetch_weights(
    id: &ModelId,
    files: &mut ModelFiles,
    progress: &dyn Progress,
) -> Result<()> {
    match id {
        ModelId::Hub(_) => Hub::new(Settings::from_env()?)?.model_weights(files, progress),
        _ => files.require_weights().map(|_| ()),
    }
}

/// The tokenizer among a model's files.
pub fn tokenizer_of(files: &ModelFiles) -> Result<Tokenizer> {
    Tokenizer::load(&TokenizerFiles {
        tokenizer_json: files.tokenizer_json.clone(),
        vocab_json: files.vocab_json.clone(),
        merges: files.merges.clone(),
        tokenizer_config: files.tokenizer_config.clone(),
        special_tokens_map: files.special_tokens_map.clone(),
        chat_template: files.chat_template.clone(),
        config: Some(files.config.clone()),
    })
}

/// The files that a copy of the model needs beside its weights.
pub(super) fn companions(files: &ModelFiles) -> Vec<PathBuf> {
    let optional = [
        &files.tokenizer_json,
        &files.tokenizer_config,
        &files.special_tokens_map,
        &files.chat_template,
        &files.vocab_json,
        &files.merges,
    ];
    optional.into_iter().flatten().cloned().collect()
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
