//! A GGUF file as a model: its configuration and tokenizer in a directory of their own, the file as weights.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::model::{cache_root, write_json};
use crate::error::{Error, Kind, Result};
use crate::gguf::reader::GgufFile;
use crate::hub::ModelFiles;

/// Writes configuration and tokenizer of a GGUF file into the cache, unless they are there, and opens them with the file.
///
/// # Errors
/// A file that is damaged, of a family or with a tokenizer that is not read; a cache that cannot be written.
pub(super) fn open_gguf(path: &Path) -> Result<ModelFiles> {
    if !path.is_file() {
        return Err(
            Error::new(Kind::Hub, "there is no such GGUF file").at(path.display().to_string())
        );
    }
    let path = std::path::absolute(path).map_err(|source| Error::io("read", path, source))?;
    let file = GgufFile::open(&path)?;
    let mut files = vec![
        ("config.json", file.config_json()?),
        ("tokenizer.json", file.tokenizer_json()?),
        ("tokenizer_config.json", file.tokenizer_config()?),
    ];
    if let Some(settings) = file.generation_config() {
        files.push(("generation_config.json", settings));
    }
    let mut hash = Sha256::new();
    for (name, value) in &files {
        hash.update(format!("{name} {value} "));
    }
    let digest = crate::text::hex(hash.finalize());
    let dir = cache_root()?.join("gguf").join(&digest[..16]);
    std::fs::create_dir_all(&dir).map_err(|source| Error::io("create", &dir, source))?;
    for (name, value) in files {
        let path = dir.join(name);
        if !path.is_file() {
            write_json(&value, &path)?;
        }
    }
    if let Some(license) = file.license() {
        let card = dir.join("README.md");
        crate::files::write_atomic(&card, format!("---\nlicense: {license}\n---\n"))?;
    }
    let mut model = ModelFiles::open(&dir)?.with_weights(vec![path.clone()]);
    model.id = path.display().to_string();
    Ok(model)
}
