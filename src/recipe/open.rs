//! The way in: a file, or its text, and the command line's overrides become a `Recipe` or all its mistakes.
//!
//! Takes a path, returns what the other files of this room make of it. Knows no key.

use std::io::Read;
use std::path::Path;

use super::mistake::{self, Mistake, Mistakes};
use super::raw::Source;
use super::{Recipe, check as checked, raw, read};
use crate::error::{Error, Kind, Result};

/// A recipe is shorter than this, in bytes: what is longer is some other file.
const LONGEST: u64 = 1 << 20;

/// Reads the recipe at `path` and lays `overrides` (`KEY=VALUE`, dots in `KEY`) over it.
///
/// # Errors
///
/// `Kind::Io` where the file cannot be read, `Kind::Recipe` with every mistake where it is not a recipe.
pub fn load(path: &Path, overrides: &[String]) -> Result<Recipe> {
    let refuse = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => Error::io("read", path, source)
            .hint("check the path, or write a recipe to start from with `wattune recipe init`"),
        _ => Error::io("read", path, source),
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .map_err(refuse)?
        .take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(refuse)?;
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
/// `Kind::Recipe`; its text shows every mistake with place, caret, rule and remedy.
pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Recipe> {
    check(text, path, overrides)
        .map_err(|mistakes| Error::new(Kind::Recipe, mistake::shown(&mistakes)))
}

/// As [`parse`], but hands over the mistakes one by one, in reading order.
///
/// # Errors
///
/// Every mistake, at least one.
pub fn check(text: &str, path: &Path, overrides: &[String]) -> Result<Recipe, Vec<Mistake>> {
    let file = Source {
        name: path.display().to_string(),
        text: text.to_string(),
        is_override: false,
    };
    let on_command_line = |text: &String| Source {
        name: format!("--set {text}"),
        text: text.clone(),
        is_override: true,
    };
    let sources: Vec<Source> = std::iter::once(file)
        .chain(overrides.iter().map(on_command_line))
        .collect();
    let mut mistakes = Mistakes::new(&sources);
    let recipe = raw::read(&sources, &mut mistakes).map(|entries| {
        let given = read::given(&entries, &mut mistakes);
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let folder = path.parent().unwrap_or(Path::new("/"));
        if folder.to_str().is_none() {
            let hint = "move the recipe to a folder with a plain name";
            mistakes.add(
                mistakes.end_of_file(),
                "the recipe's folder has a name that is not UTF-8",
                "UTF-8",
                hint,
            );
        }
        checked::build(&given, folder, &stem(&path), &mut mistakes)
    });
    match recipe {
        Some(recipe) if mistakes.is_empty() => Ok(recipe),
        _ => Err(mistakes.into_sorted()),
    }
}

/// The file's name without its extension; "run" where it has none that can name a folder.
fn stem(path: &Path) -> String {
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .filter(|stem| read::is_name(stem));
    stem.unwrap_or("run").to_string()
}
