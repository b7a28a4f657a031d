//! Which files hold a model's weights.
//!
//! Owns the names of weight files and the shape of `model.safetensors.index.json`. Takes the names a model has, or an index;
//! returns names. Knows nothing of what is inside a safetensors file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Kind, Result};

use super::names;

/// All weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Tensor name -> shard.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// How a file begins that Git LFS left in place of the real one.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// How a model's weights are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `model.safetensors`; transformers, too, takes it before an index.
    Single,
    /// An index and its shards.
    Sharded,
    /// Neither.
    Absent,
}

/// The layout among these file names.
pub(super) fn layout(has: impl Fn(&str) -> bool) -> Layout {
    if has(SINGLE) {
        Layout::Single
    } else if has(INDEX) {
        Layout::Sharded
    } else {
        Layout::Absent
    }
}

#[derive(Deserialize)]
struct Index {
    /// serde_json keeps the file's order, with which the shards come out in theirs.
    weight_map: serde_json::Map<String, serde_json::Value>,
}

/// The shards an index names, in the order in which it first names each.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read(index).map_err(|source| Error::io("read", index, source))?;
    let wrong = |what: String| {
        let error = Error::new(Kind::Hub, "the index of the weights cannot be used")
            .at(index.display().to_string())
            .value(what);
        error
            .rule("`weight_map` names a safetensors file beside the index for each tensor")
            .hint("fetch the model's files again")
    };
    let index: Index = serde_json::from_slice(&text).map_err(|source| wrong(source.to_string()))?;
    let mut shards: Vec<String> = Vec::new();
    for (tensor, shard) in &index.weight_map {
        match shard.as_str() {
            Some(shard) if !names::is_relative_path(shard) || !shard.ends_with(".safetensors") => {
                return Err(wrong(shard.escape_debug().to_string()));
            }
            Some(shard)
                if shards.last().is_some_and(|last| last == shard)
                    || shards.iter().any(|known| known == shard) => {}
            Some(shard) => shards.push(shard.to_string()),
            None => return Err(wrong(format!("{tensor}: {shard}"))),
        }
    }
    if shards.is_empty() {
        Err(wrong("an empty `weight_map`".to_string()))
    } else {
        Ok(shards)
    }
}

/// No weights that can be loaded: says what is there instead and how to get from it to safetensors.
pub(super) fn absent(place: &str, source: &str, files: &[String]) -> Error {
    let with = |extensions: &[&str]| {
        files
            .iter()
            .find(|file| extensions.iter().any(|extension| file.ends_with(extension)))
    };
    let error = Error::new(Kind::Hub, "the model has no weights in safetensors format").at(place);
    let error = error.rule(format!("`{SINGLE}`, or `{INDEX}` and the shards it names"));
    let convert = format!(
        "convert them once: python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained('{source}')\
         .save_pretrained('converted'); T.from_pretrained('{source}').save_pretrained('converted')\", and set model.id to that directory"
    );
    if let Some(file) = with(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return error
            .value(format!("only PyTorch weights: {file}"))
            .hint(convert);
    }
    match with(&[".gguf", ".h5", ".msgpack", ".onnx"]) {
        Some(file) => error
            .value(format!("only weights in another format: {file}"))
            .hint("choose the repository these were converted from"),
        None => error.hint(format!(
            "put `{SINGLE}` there, or set init = \"random\" under [model] to train from scratch"
        )),
    }
}

/// Checks that a local weight file holds something.
pub(super) fn check(path: &Path) -> Result<()> {
    let mut start = [0; LFS_POINTER.len()];
    let read = File::open(path).and_then(|file| file.take(start.len() as u64).read(&mut start));
    let read = read.map_err(|source| Error::io("read", path, source))?;
    if start[..read] == *LFS_POINTER {
        let error = Error::new(Kind::Hub, "this is a Git LFS pointer, not the weights")
            .at(path.display().to_string());
        return Err(error.hint("run `git lfs install && git lfs pull` in that directory"));
    }
    match read {
        0 => Err(Error::new(Kind::Hub, "the weights are an empty file")
            .at(path.display().to_string())
            .hint("fetch the file again")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(INDEX);
        std::fs::write(&path, text).unwrap();
        shards(&path)
    }

    #[test]
    fn shards_come_in_the_order_of_the_index_each_once() {
        let text = r#"{"metadata": {"total_size": 3}, "weight_map": {"z": "b.safetensors", "a": "a.safetensors", "m": "b.safetensors"}}"#;
        assert_eq!(index(text).unwrap(), ["b.safetensors", "a.safetensors"]);
    }

    #[test]
    fn an_index_that_leads_elsewhere_or_nowhere_is_refused() {
        for bad in [
            r#"{"weight_map": {"a": "../a.safetensors"}}"#,
            r#"{"weight_map": {"a": "/a.safetensors"}}"#,
            r#"{"weight_map": {"a": "a.bin"}}"#,
            r#"{"weight_map": {"a": 1}}"#,
            r#"{"weight_map": {}}"#,
            r#"{}"#,
            "",
        ] {
            assert_eq!(index(bad).unwrap_err().kind(), Kind::Hub, "{bad}");
        }
    }
}
