//! Models inside the program: `embedded:NAME`.
//!
//! Owns their table. Takes a name and a folder; writes the files there once and returns the directory as a model. Knows
//! nothing of what the files mean.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

use super::cache::write_whole;
use super::model::{ModelFiles, local_model};

/// A file's name and its bytes.
type EmbeddedFile = (&'static str, &'static [u8]);

/// Each model's name and files, `include_bytes!`ed from `recipes/quickstart/`.
const MODELS: &[(&str, &[EmbeddedFile])] = &[(
    "tiny",
    &[
        (
            "config.json",
            include_bytes!("../../recipes/quickstart/tiny/config.json"),
        ),
        (
            "model.safetensors",
            include_bytes!("../../recipes/quickstart/tiny/model.safetensors"),
        ),
        (
            "tokenizer.json",
            include_bytes!("../../recipes/quickstart/tiny/tokenizer.json"),
        ),
        (
            "tokenizer_config.json",
            include_bytes!("../../recipes/quickstart/tiny/tokenizer_config.json"),
        ),
        (
            "README.md",
            include_bytes!("../../recipes/quickstart/tiny/README.md"),
        ),
    ],
)];

/// The model `name`, written under `cache_root` unless it is there.
///
/// # Errors
/// When no such model is inside the program, or the files cannot be written.
pub fn embedded(name: &str, cache_root: &Path) -> Result<ModelFiles> {
    unpack(MODELS, name, cache_root)
}

fn unpack(models: &[(&str, &[EmbeddedFile])], name: &str, cache_root: &Path) -> Result<ModelFiles> {
    let Some((_, files)) = models.iter().find(|(known, _)| *known == name) else {
        let names: Vec<String> = models
            .iter()
            .map(|(known, _)| format!("\"embedded:{known}\""))
            .collect();
        let error = Error::new(Kind::Hub, "no such model is inside the program")
            .value(format!("embedded:{name}"));
        return Err(match names.is_empty() {
            true => error.hint("this build holds none: set model.id to a hub id or a directory"),
            false => error.hint(format!("set model.id to {}", names.join(" or "))),
        });
    };
    // A folder named by its content: two versions of the program never share one.
    let dir = cache_root
        .join(format!("embedded--{name}"))
        .join(content_hash(files));
    for (file, bytes) in *files {
        let path = dir.join(file);
        if !fs::read(&path).is_ok_and(|found| found == *bytes) {
            write_whole(&path, bytes)?;
        }
    }
    Ok(local_model(&dir)?.named(format!("embedded:{name}")))
}

/// The first 16 hexadecimal digits of the SHA-256 of all names, lengths and bytes.
fn content_hash(files: &[EmbeddedFile]) -> String {
    let mut hash = Sha256::new();
    for (name, bytes) in files {
        hash.update(format!("{name}\0{}\0", bytes.len()));
        hash.update(bytes);
    }
    crate::text::hex(&hash.finalize()[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[(&str, &[EmbeddedFile])] = &[
        (
            "one",
            &[("config.json", b"{}"), ("model.safetensors", b"w")],
        ),
        ("two", &[("config.json", b"{ }")]),
    ];

    #[test]
    fn a_model_is_written_once_and_mended_when_damaged() {
        let root = tempfile::tempdir().unwrap();
        let model = unpack(TWO, "one", root.path()).unwrap();
        assert_eq!(model.id, "embedded:one");
        assert_eq!(
            fs::read(&model.require_weights().unwrap()[0]).unwrap(),
            b"w"
        );
        let written = fs::metadata(&model.config).unwrap().modified().unwrap();
        fs::write(&model.weights[0], "damaged").unwrap();
        let again = unpack(TWO, "one", root.path()).unwrap();
        assert_eq!(again, model);
        assert_eq!(fs::read(&again.weights[0]).unwrap(), b"w");
        assert_eq!(
            fs::metadata(&model.config).unwrap().modified().unwrap(),
            written
        );
        assert_ne!(
            unpack(TWO, "two", root.path()).unwrap().dir.file_name(),
            model.dir.file_name()
        );
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = unpack(TWO, "three", Path::new("unused")).unwrap_err();
        assert_eq!(
            error.remedy(),
            Some("set model.id to \"embedded:one\" or \"embedded:two\"")
        );
        assert!(
            unpack(&[], "three", Path::new("unused"))
                .unwrap_err()
                .remedy()
                .unwrap()
                .contains("holds none")
        );
    }
}
