//! A model id -> a directory with its files; the tokenizer in it.

use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde_json::Value;

use super::gguf::open_gguf;
use crate::data::{Tokenizer, TokenizerFiles};
use crate::error::{Error, Kind, Result};
use crate::hub::{self, Hub, ModelFiles, Progress};
use crate::model::is_gguf;
use crate::recipe::ModelId;

/// The directory of a model; a hub model's weights are fetched by [`fetch_weights`] alone, but a GGUF `file`, which holds its
/// configuration, at once.
pub fn find_model(
    id: &ModelId,
    revision: &str,
    file: Option<&str>,
    progress: &dyn Progress,
) -> Result<ModelFiles> {
    match (id, file) {
        (ModelId::Directory(dir), Some(file)) => return open_gguf(&dir.join(file)),
        (ModelId::Hub(id), Some(file)) => {
            let fetched = Hub::from_env()?.model_file(id, revision, file, progress)?;
            let mut model = open_gguf(&fetched.path)?;
            model.id.clone_from(id);
            model.revision = revision.to_string();
            model.commit = Some(fetched.commit);
            return Ok(model);
        }
        (ModelId::Embedded(name), Some(file)) => {
            return Err(Error::new(Kind::Hub, "an embedded model has no files")
                .value(file)
                .at(format!("embedded:{name}"))
                .hint("remove `file` in [model], or leave `--model-file` out"));
        }
        (_, None) => {}
    }
    match id {
        ModelId::Directory(file) if is_gguf(std::slice::from_ref(file)) => open_gguf(file),
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
    if files.commit.is_some() && !is_gguf(&files.weights) {
        return Hub::from_env()?.model_weights(files, progress);
    }
    files.require_weights().map(drop)
}

/// The tokenizer among a model's files, for an embedding of `rows` rows; its chat template writes `chat_date`, or
/// today's date.
///
/// # Errors
/// Files that are missing, malformed or contradict each other; an eos token beyond the embedding.
pub fn tokenizer_of(
    files: &ModelFiles,
    rows: usize,
    chat_date: Option<NaiveDate>,
) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::load(&TokenizerFiles {
        tokenizer_json: files.file("tokenizer.json"),
        vocab_json: files.file("vocab.json"),
        merges: files.file("merges.txt"),
        tokenizer_config: files.file("tokenizer_config.json"),
        special_tokens_map: files.file("special_tokens_map.json"),
        added_tokens: files.file("added_tokens.json"),
        chat_template: files.file("chat_template.jinja"),
        additional_chat_templates: files.additional_chat_templates(),
        processor_template: files.file("chat_template.json"),
        chat_date,
        config: Some(files.config.clone()),
    })?;
    end_ids(files, rows)?;
    tokenizer.with_embedding_rows(rows)
}

/// The ids that end a generation: generation_config.json's `eos_token_id`, one or several, below `rows`.
///
/// # Errors
/// A file that is not JSON, and an id beyond the embedding.
pub(super) fn end_ids(files: &ModelFiles, rows: usize) -> Result<Vec<u32>> {
    let Some(path) = files.file("generation_config.json") else {
        return Ok(Vec::new());
    };
    let place = path.display().to_string();
    let config: Value = serde_json::from_str(&super::read_text(&path)?).map_err(|e| {
        Error::new(
            Kind::Model,
            format!("generation_config.json is not JSON: {e}"),
        )
        .at(&place)
        .hint("download the file again")
    })?;
    let ids = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
        None => &[],
    };
    let mut ends = Vec::new();
    for id in ids.iter().filter_map(Value::as_u64) {
        if id >= rows as u64 {
            return Err(Error::new(
                Kind::Model,
                "an end token lies beyond the model's embedding",
            )
            .at(format!("{place}, `eos_token_id`"))
            .value(id.to_string())
            .rule(format!(
                "below {rows}, the rows of the embedding (`vocab_size` in config.json)"
            ))
            .hint("correct the id: it is that of the tokenizer's `eos_token`"));
        }
        ends.push(id as u32);
    }
    Ok(ends)
}

/// Copies tokenizer, chat templates, processor, generation settings and licence of a model into `dir`.
pub(super) fn copy_companions(files: &ModelFiles, dir: &Path) -> Result<()> {
    for name in files.companions() {
        copy_file(&files.dir.join(name), &dir.join(name))?;
    }
    Ok(())
}

/// Copies the content of a file, with the permissions of a new one; creates its folder.
pub(super) fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let content = std::fs::read(from).map_err(|e| Error::io("read", from, e))?;
    let folder = to.parent().map_or(Ok(()), std::fs::create_dir_all);
    let written = folder.and_then(|()| std::fs::write(to, content));
    written.map_err(|e| Error::io("write", to, e))
}

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&super::read_text(path)?).map_err(|error| {
        Error::new(Kind::Model, format!("not JSON: {error}")).at(path.display().to_string())
    })
}

/// Writes a JSON file, indented.
pub(super) fn write_json(value: &serde_json::Value, path: &Path) -> Result<()> {
    crate::files::write_atomic(path, format!("{value:#}\n"))
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
