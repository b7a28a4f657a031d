//! Models embedded in the program: `embedded:NAME`.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

use super::cache::write_file;
use super::model::ModelFiles;

/// A file's name and contents.
type EmbeddedFile = (&'static str, &'static [u8]);

macro_rules! files {
    ($folder:literal, $($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!($folder, $name)))),+]
    };
}

/// Each model's name and files.
const MODELS: &[(&str, &[EmbeddedFile])] = &[(
    "tiny",
    files!(
        "../../recipes/quickstart/tiny/",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ),
)];

/// The model `name`, written below `cache_root` unless it is there.
///
/// # Errors
/// When there is no such model, or the files cannot be written.
pub fn embedded(name: &str, cache_root: &Path) -> Result<ModelFiles> {
    let Some((_, files)) = MODELS.iter().find(|(known, _)| *known == name) else {
        let names: Vec<String> = MODELS
            .iter()
            .map(|(known, _)| format!("\"embedded:{known}\""))
            .collect();
        return Err(Error::new(Kind::Hub, "no embedded model has this name")
            .value(format!("embedded:{name}"))
            .hint(format!("set model.id to {}", names.join(" or "))));
    };
    // Named by its contents: two versions of the program never share a folder.
    let folder = cache_root.join(format!("embedded--{name}"));
    let dir = folder.join(content_hash(files));
    for (file, bytes) in *files {
        let path = dir.join(file);
        if !fs::read(&path).is_ok_and(|found| found == *bytes) {
            write_file(&path, bytes)?;
        }
    }
    let mut model = ModelFiles::open(&dir)?;
    model.id = format!("embedded:{name}");
    Ok(model)
}

/// The first 16 hexadecimal digits of the SHA-256 of all names, lengths and contents.
fn content_hash(files: &[EmbeddedFile]) -> String {
    let mut hash = Sha256::new();
    for (name, bytes) in files {
        hash.update(format!("{name}\0{}\0", bytes.len()));
        hash.update(bytes);
    }
    crate::text::hex(&hash.finalize()[..8])
}
