//! Loading: a file or its text, and the command line's overrides, become a `Recipe` or all its diagnostics.
//!
//! Takes a path, returns what the other files of this room make of it. Knows no key.

use std::io::Read;
use std::path::Path;

use super::contradictions;
use super::diagnostic::{Diagnostic, Diagnostics, render};
use super::key::{KEYS, Keys};
use super::reader::Reader;
use super::sections::Recipe;
use super::setting::is_file_name;
use super::tree::{self, RawRecipe, Source};
use crate::error::{Error, Kind, Result};

/// A recipe is shorter than this, in bytes: what is longer is some other file.
const LONGEST: u64 = 1 << 20;

/// Reads the recipe at `path` and lays `overrides` (`KEY=VALUE`, dots in `KEY`) over it.
///
/// # Errors
///
/// `Kind::Io` where the file cannot be read, `Kind::Recipe` with every diagnostic where it is not a recipe.
pub fn load(path: &Path, overrides: &[String]) -> Result<Recipe> {
    let unreadable = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => Error::io("read", path, source)
            .hint("check the path, or write a recipe to start from with `wattune recipe init`"),
        _ => Error::io("read", path, source),
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .map_err(unreadable)?
        .take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    let extension = path.extension().map(std::ffi::OsStr::to_ascii_lowercase);
    if let Some("yaml" | "yml" | "json") = extension.as_deref().and_then(std::ffi::OsStr::to_str) {
        return Err(Error::new(Kind::Recipe, "a recipe is TOML, not YAML or JSON")
            .at(path.display().to_string())
            .hint(
                "write a commented recipe with `wattune recipe init recipe.toml`, and copy the settings: PEFT's names stand in \
                 [adapter], model.id is the base model, data.train the data set",
            ));
    }
    let not_a_recipe = |what| {
        Error::new(Kind::Recipe, what)
            .at(path.display().to_string())
            .hint("give the path of a recipe, a TOML file")
    };
    if bytes.len() as u64 > LONGEST {
        return Err(not_a_recipe("this file is too long for a recipe").rule("at most 1 MiB"));
    }
    let text =
        String::from_utf8(bytes).map_err(|_| not_a_recipe("this file is no text").rule("UTF-8"))?;
    parse(&text, path, overrides)
}

/// Reads a recipe's `text`; relative paths in it count from the folder of `path`, whose stem names a run without a name.
///
/// ```
/// use std::path::Path;
/// let text = "[model]\nid = \"embedded:tiny\"\n[data]\ntrain = \"a.jsonl\"\n[train]\nsteps = 5\n";
/// let recipe = wattune::recipe::parse(text, Path::new("/demo/demo.toml"), &["train.learning_rate=1e-3".to_string()])?;
/// assert_eq!((recipe.name.as_str(), recipe.train.learning_rate), ("demo", 1e-3));
/// # Ok::<(), wattune::error::Error>(())
/// ```
///
/// # Errors
///
/// `Kind::Recipe`; its text shows every diagnostic with place, caret, rule and hint.
pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Recipe> {
    check(text, path, overrides)
        .map_err(|diagnostics| Error::new(Kind::Recipe, render(&diagnostics)))
}

/// As [`parse`], but returns the diagnostics one by one, in reading order.
///
/// # Errors
///
/// Every diagnostic, at least one.
pub fn check(text: &str, path: &Path, overrides: &[String]) -> Result<Recipe, Vec<Diagnostic>> {
    let sources = sources(text, path, overrides);
    let mut diagnostics = Diagnostics::new(&sources);
    let recipe =
        tree::read(&sources, &mut diagnostics).map(|raw| build(&raw, path, &mut diagnostics));
    match recipe {
        Some(recipe) if diagnostics.is_empty() => Ok(recipe),
        _ => Err(diagnostics.into_sorted()),
    }
}

/// The recipe's text, then the overrides.
fn sources(text: &str, path: &Path, overrides: &[String]) -> Vec<Source> {
    let file = Source {
        name: path.display().to_string(),
        text: text.to_string(),
        is_override: false,
    };
    let set = overrides.iter().map(|text| Source {
        name: format!("--set {text}"),
        text: text.clone(),
        is_override: true,
    });
    std::iter::once(file).chain(set).collect()
}

/// `error`, found in preflight, with line and caret of each recipe key that it names; unchanged where the recipe at `path` cannot be
/// read any more.
pub fn locate(error: Error, path: &Path, overrides: &[String]) -> Error {
    let Ok(text) = std::fs::read_to_string(path) else {
        return error;
    };
    let sources = sources(&text, path, overrides);
    let mut diagnostics = Diagnostics::new(&sources);
    let Some(raw) = tree::read(&sources, &mut diagnostics) else {
        return error;
    };
    error.located(&|name| {
        let key = KEYS.iter().find(|key| key.path() == name)?;
        Some(diagnostics.written(raw.node(key)?.span))
    })
}

/// The recipe, valid only where nothing is noted.
fn build(raw: &RawRecipe, path: &Path, diagnostics: &mut Diagnostics<'_>) -> Recipe {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut reader = Reader {
        raw,
        directory,
        diagnostics,
    };
    reader.note_unknown();
    let mut recipe = Recipe::read(&mut reader);
    contradictions::note(&recipe, &mut reader);
    if directory.to_str().is_none() {
        diagnostics.add(
            diagnostics.end_of_file(),
            "the recipe's folder has a name that is not UTF-8",
            "UTF-8",
            "move the recipe to a folder with a plain name",
        );
    }
    if recipe.name.is_empty() {
        recipe.name = stem(&path);
    }
    recipe
}

/// The file's name without its extension; "run" where it has none that can name a directory.
fn stem(path: &Path) -> String {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    stem.filter(|stem| is_file_name(stem))
        .unwrap_or("run")
        .to_string()
}
