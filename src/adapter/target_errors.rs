//! Errors about modules that a setting names and the model does not have, with what to write instead.
//!
//! Takes the model's linear layers and the settings; returns the error. Knows nothing of the selection itself.

use super::matching::{Matcher, fullmatch, is_suffix, matches};
use super::options::{LoraConfig, Targets};
use super::targets::{Module, ModuleKind};
use crate::error::{Error, Kind};
use crate::text::{first_few, nearest};

/// Other spellings of `all-linear`, in lower case with `-` for any separator.
const ALL_LINEAR_WORDS: [&str; 5] = ["all-linear", "all", "linear", "alllinear", "all-linears"];

/// The last segments of the linear layers' paths, once each, in model order.
pub(super) fn last_segments(modules: &[Module]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    let is_linear = |module: &&Module| module.kind != ModuleKind::Embedding;
    for module in modules.iter().filter(is_linear) {
        let name = module.path.rsplit('.').next().unwrap_or(&module.path);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The error about the (setting, entry) pairs `unmatched`; the hint is about the first.
pub(super) fn no_such_module(
    modules: &[Module],
    unmatched: &[(&'static str, String)],
    settings: &LoraConfig,
) -> Error {
    const SHOWN: usize = 20;
    let written: Vec<String> = unmatched
        .iter()
        .map(|(setting, entry)| format!("`{entry}` of `{setting}`"))
        .collect();
    let (verb, layer) = match unmatched {
        [(setting, _)] if setting.ends_with("_pattern") => ("matches", "adapted linear layer"),
        [_] => ("matches", "linear layer"),
        _ => ("match", "linear layer"),
    };
    let (setting, entry) = &unmatched[0];
    Error::new(
        Kind::Adapter,
        format!(
            "{} {verb} no {layer} of the model",
            first_few(written, SHOWN).join(", ")
        ),
    )
    .rule(format!(
        "the linear layers are {}",
        last_segments(modules).join(", ")
    ))
    .hint(remedy(modules, setting, entry, settings))
}

/// What to write instead of `entry`.
fn remedy(modules: &[Module], setting: &str, entry: &str, settings: &LoraConfig) -> String {
    let names = last_segments(modules);
    let example = names.first().unwrap_or(&"q_proj");
    let targets = match setting {
        "target_modules" => Some(&settings.target_modules),
        "exclude_modules" => settings.exclude_modules.as_ref(),
        _ => None,
    };
    let written = match targets {
        Some(Targets::Regex(_)) => text_remedy(modules, setting, entry),
        Some(Targets::Names(_)) => listed_remedy(modules, setting, entry),
        _ => None,
    };
    if let Some(written) = written {
        return written;
    }
    let last_segment = entry.rsplit('.').next().unwrap_or(entry);
    match nearest(last_segment, names.iter().copied(), 0.7) {
        Some(name) if name != entry => format!("`{name}` is nearest to `{entry}`"),
        _ if setting == "layers_to_transform" => "layers are counted from 0".to_string(),
        _ => format!("write names of that list, as in `target_modules = [\"{example}\"]`"),
    }
}

/// The remedy for a `target_modules` string, which is a regular expression: a list of the module names in it, `all-linear`, or
/// an expression that matches full module paths.
fn text_remedy(modules: &[Module], setting: &str, text: &str) -> Option<String> {
    if let Some(names) = names_in(modules, text) {
        return Some(format!(
            "a text is a regular expression for a module's whole path; name modules in a list: `{setting} = {names}`"
        ));
    }
    if setting == "target_modules" && is_all_linear(text) {
        return Some("every linear layer is `target_modules = \"all-linear\"`".to_string());
    }
    let whole = [
        format!(".*{text}"),
        format!("{text}.*"),
        format!(".*{text}.*"),
    ];
    let whole = whole.into_iter().find(|pattern| {
        let regex = fullmatch(pattern, setting);
        regex.is_ok_and(|regex| {
            let mut paths = modules.iter().map(|module| &module.path);
            paths.any(|path| matches(&regex, path).unwrap_or(false))
        })
    })?;
    let path = &modules.first()?.path;
    Some(format!(
        "the expression must match a whole path, such as `{path}`: `{setting} = '{whole}'`"
    ))
}

/// For an entry of a list that is no name: `all-linear`, several names in one text, or a regular expression.
fn listed_remedy(modules: &[Module], setting: &str, entry: &str) -> Option<String> {
    if setting == "target_modules" && is_all_linear(entry) {
        return Some(
            "every linear layer is `target_modules = \"all-linear\"`, without brackets".to_string(),
        );
    }
    if entry.contains([',', ' ', '|', ';']) {
        let names = names_in(modules, entry)?;
        return Some(format!("write each name by itself: {names}"));
    }
    let expression = Targets::Regex(entry.to_string());
    let matcher = Matcher::new(&expression, setting).ok()?;
    let is_match = |module: &Module| {
        matcher
            .find(&module.path)
            .is_ok_and(|kind| kind != super::matching::MatchKind::None)
    };
    modules.iter().any(is_match).then(|| {
        format!("a list holds names; a regular expression stands alone: `{setting} = '{entry}'`")
    })
}

fn is_all_linear(text: &str) -> bool {
    let word = text.trim().to_lowercase().replace(['_', ' '], "-");
    ALL_LINEAR_WORDS.contains(&word.as_str())
}

/// The module names that `text` enumerates, each corrected to the nearest, as a list in TOML; `None` if a part is no name.
fn names_in(modules: &[Module], text: &str) -> Option<String> {
    let last = last_segments(modules);
    let parts = text.split([',', ' ', '|', ';', '(', ')', '[', ']', '"', '\'']);
    let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
    let name = |part: &&str| {
        if modules.iter().any(|module| is_suffix(&module.path, part)) {
            return Some(format!("\"{part}\""));
        }
        nearest(part, last.iter().copied(), 0.85).map(|name| format!("\"{name}\""))
    };
    let names: Option<Vec<String>> = parts.iter().map(name).collect();
    let names = names.filter(|names| !names.is_empty())?;
    Some(format!("[{}]", names.join(", ")))
}

/// The error about settings that leave no module.
pub(super) fn no_modules_selected(modules: &[Module], settings: &LoraConfig) -> Error {
    let mut narrowing = vec!["`target_modules`"];
    narrowing.extend(
        settings
            .exclude_modules
            .as_ref()
            .map(|_| "`exclude_modules`"),
    );
    narrowing.extend(
        settings
            .layers_to_transform
            .as_ref()
            .map(|_| "`layers_to_transform`"),
    );
    Error::new(
        Kind::Adapter,
        format!(
            "no linear layer is left to adapt by {}",
            narrowing.join(" and ")
        ),
    )
    .rule(format!(
        "the linear layers are {}",
        last_segments(modules).join(", ")
    ))
    .hint("name at least one of them, as in `target_modules = \"all-linear\"`")
}
