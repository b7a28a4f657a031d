//! Ids and paths: models, data sets, files, devices and grids by the text that names them.
//!
//! Takes a text and the recipe's directory, tells hub ids from paths, makes paths absolute. Looks at the disk for one
//! question alone: whether an id is a directory or file next to the recipe.

use std::path::{Path, PathBuf};

use serde_json::json;
use toml_edit::{Array, Value};

use super::key::Key;
use super::larger_model::{self, LargerModel};
use super::reader::Field;
use super::setting::{Setting, Values, setting_as, values};
use super::tree::{Node, Raw};
use crate::data::options::EXTENSIONS;
use crate::energy::options::{DeviceRef, GridRef};
use crate::files::expand;

/// The prefix of a model inside the program.
const EMBEDDED: &str = "embedded:";

/// Where a model is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelId {
    /// `owner/name` on the hub.
    Hub(String),
    /// A local directory, or a GGUF file.
    Directory(PathBuf),
    /// A model inside the program: the part after `embedded:`.
    Embedded(String),
}

/// Where records are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// Local files, folders of files, and patterns (`dir/*.jsonl`).
    Files(Vec<PathBuf>),
    /// A data set on the hub.
    Hub {
        /// `owner/name`.
        id: String,
        /// The split after a `:`, else "train".
        split: String,
    },
}

impl ModelId {
    /// The model that `text` names, seen from `directory`; `None` where it is neither a hub id, a directory nor `embedded:NAME`.
    pub fn parse(text: &str, directory: &Path) -> Option<ModelId> {
        if let Some(name) = text.strip_prefix(EMBEDDED) {
            return is_hub_name(name).then(|| ModelId::Embedded(name.to_string()));
        }
        if is_path(text) || text.ends_with(".gguf") || directory.join(text).is_dir() {
            let path = expand(text).unwrap_or_else(|_| text.to_string());
            return Some(ModelId::Directory(tidy(&directory.join(path))));
        }
        (is_hub_name(text) || is_hub_id(text)).then(|| ModelId::Hub(text.to_string()))
    }
}

/// Whether a text can only be a path.
fn is_path(text: &str) -> bool {
    text.starts_with(['.', '~', '/', '$']) || Path::new(text).is_absolute()
}

/// `owner/name`.
pub(super) fn is_hub_id(text: &str) -> bool {
    text.split_once('/')
        .is_some_and(|(owner, name)| is_hub_name(owner) && is_hub_name(name))
}

/// The hub's rule for a part of an id (`huggingface_hub.utils.validate_repo_id`): at most 96 of letters, digits, `-`, `_`, `.`;
/// neither `--` nor `..`, no `-` or `.` at an end, no `.git` at the end.
fn is_hub_name(text: &str) -> bool {
    let is_end = |c: char| !matches!(c, '-' | '.');
    (1..=96).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && text.starts_with(is_end)
        && text.ends_with(is_end)
        && !text.contains("--")
        && !text.contains("..")
        && !text.ends_with(".git")
}

/// Without `.` parts: `./train.jsonl` is shown as `DIRECTORY/train.jsonl`. `..` stays, for a link may stand before it.
fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}

/// An absolute path: `~` and variables are expanded, all else counts from the recipe's directory.
fn resolve(text: String, node: &Node, field: &mut Field<'_, '_>) -> Option<PathBuf> {
    match expand(&text) {
        Ok(path) => Some(tidy(&field.directory.join(path))),
        Err(rule) => field.invalid_by(node, rule, Some("write the whole path, from `/` on".into())),
    }
}

/// Paths of a recipe come from its UTF-8 text and a directory that has been checked to be UTF-8.
fn path_text(path: &Path) -> String {
    path.display().to_string()
}

setting_as! {
    String;
    PathBuf: resolve, |path| path_text(path);
    ModelId: model_id, |id| match id {
        ModelId::Hub(id) => id.clone(),
        ModelId::Directory(path) => path_text(path),
        ModelId::Embedded(name) => format!("{EMBEDDED}{name}"),
    };
    DeviceRef: device, |device| device.to_string();
    LargerModel: larger_model, |model| model.name.clone();
}

fn model_id(text: String, node: &Node, field: &mut Field<'_, '_>) -> Option<ModelId> {
    match ModelId::parse(&text, field.directory) {
        Some(ModelId::Directory(_)) => resolve(text, node, field).map(ModelId::Directory),
        Some(id) => Some(id),
        None => field.invalid_by(
            node,
            "a hub id `owner/name` or `name`, a directory (starting with `.`, `/` or `~` where it does not exist yet), \
             or `embedded:NAME`",
            Some("write for example `id = \"HuggingFaceTB/SmolLM2-135M\"`, `id = \"./my-model\"` or `id = \"embedded:tiny\"`".into()),
        ),
    }
}

impl Setting for DataSource {
    fn values(_: &Key) -> Values {
        let path = json!({ "type": "string", "minLength": 1 });
        let list = json!({ "type": "array", "items": path, "minItems": 1 });
        values(data_rule(), json!({ "anyOf": [path, list] }))
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match &node.raw {
            Raw::Text(text) if !text.is_empty() => data_source(text, node, field),
            Raw::List(paths) if !paths.is_empty() => {
                let read: Vec<Option<PathBuf>> =
                    paths.iter().map(|node| data_path(node, field)).collect();
                read.into_iter()
                    .collect::<Option<_>>()
                    .map(DataSource::Files)
            }
            Raw::Text(_) | Raw::List(_) => field.invalid(node),
            _ => field.wrong_type(node),
        }
    }

    fn write(&self) -> Option<Value> {
        Some(match self {
            DataSource::Files(paths) => match paths.as_slice() {
                [path] => path_text(path).into(),
                paths => paths
                    .iter()
                    .map(|path| path_text(path))
                    .collect::<Array>()
                    .into(),
            },
            DataSource::Hub { id, split } => format!("{id}:{split}").into(),
        })
    }
}

fn data_rule() -> String {
    format!(
        "a file that ends in .{}, a folder of such files, a pattern (\"dir/*.jsonl\"), a list of these, \
         or a hub id `owner/name` or `owner/name:split`",
        EXTENSIONS.join(" .")
    )
}

/// An item of a list: a path in any form.
fn data_path(node: &Node, field: &mut Field<'_, '_>) -> Option<PathBuf> {
    match &node.raw {
        Raw::Text(text) if !text.is_empty() => resolve(text.clone(), node, field),
        _ => field.invalid_by(node, "a list of paths in double quotes", None),
    }
}

/// A path by its extension, first character, `*` or existence; else a hub id with an optional split.
fn data_source(text: &str, node: &Node, field: &mut Field<'_, '_>) -> Option<DataSource> {
    let has_extension = Path::new(text).extension().is_some_and(|extension| {
        EXTENSIONS
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    });
    let is_pattern = text.contains(['*', '?', '[']);
    if has_extension || is_pattern || is_path(text) || field.directory.join(text).exists() {
        return resolve(text.to_string(), node, field).map(|path| DataSource::Files(vec![path]));
    }
    let (id, split) = text.split_once(':').unwrap_or((text, "train"));
    if is_hub_id(id) && !split.is_empty() && !split.contains(char::is_whitespace) {
        return Some(DataSource::Hub {
            id: id.to_string(),
            split: split.to_string(),
        });
    }
    let name = field.key.name;
    field.invalid_by(
        node,
        data_rule(),
        Some(format!(
            "write for example `{name} = \"./{name}.jsonl\"` or `{name} = \"owner/name:train\"`"
        )),
    )
}

fn device(text: String, node: &Node, field: &mut Field<'_, '_>) -> Option<DeviceRef> {
    // A profile's name may contain a slash ("NVIDIA A10 / A10G").
    if is_path(&text) || text.ends_with(".toml") || field.directory.join(&text).is_file() {
        return resolve(text, node, field).map(DeviceRef::File);
    }
    match text.parse() {
        Ok(device) => Some(device),
        Err(rule) => field.invalid_by(node, rule, None),
    }
}

fn larger_model(text: String, node: &Node, field: &mut Field<'_, '_>) -> Option<LargerModel> {
    LargerModel::parse(&text).or_else(|| {
        let hint = larger_model::HINT.to_string();
        field.invalid_by(node, larger_model::RULE, Some(hint))
    })
}

impl Setting for GridRef {
    fn values(_: &Key) -> Values {
        let schema = json!({ "type": ["string", "number"], "minLength": 1, "minimum": 0 });
        values(Self::RULE, schema)
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let grid = match &node.raw {
            Raw::Text(text) => text.parse().ok(),
            raw => match raw.number() {
                Some(number) => Self::from_intensity(number),
                None => return field.wrong_type(node),
            },
        };
        grid.or_else(|| field.invalid(node))
    }

    fn write(&self) -> Option<Value> {
        Some(self.to_string().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cases derived by hand from the rule above, clause by clause.
    #[test]
    fn hub_names_follow_the_hubs_rule() {
        for good in ["Foo-BAR_foo.bar123", "x", &"a".repeat(96)] {
            assert!(is_hub_name(good), "{good}");
        }
        let too_long = "a".repeat(97);
        for bad in [
            "", "foo--bar", "foo..bar", ".foo", "foo-", "foo.git", "foo bar", "foo/bar", "é",
            &too_long,
        ] {
            assert!(!is_hub_name(bad), "{bad}");
        }
        assert!(is_hub_id("owner/name") && !is_hub_id("name") && !is_hub_id("owner/name/more"));
    }
}
