//! The house rules that no compiler checks: who may import whom, how long a file or a function may be, what may not be written.
//!
//! Reads the checkout as text and fails with file, line and rule. The rules and their limits stand in `architecture/rules.rs`, how
//! Rust is read in `architecture/source.rs`. Knows nothing of what the code computes.

#[path = "architecture/rules.rs"]
mod rules;
#[path = "architecture/source.rs"]
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use rules::Finding;
use source::{code, without_tests};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of the checkout but what `.gitignore` names, as paths from the root with `/`, sorted. A pattern counts by its last part.
fn tracked() -> Vec<String> {
    let ignore =
        fs::read_to_string(root().join(".gitignore")).expect("the checkout has a .gitignore");
    let mut names: Vec<&str> = ignore
        .lines()
        .filter_map(|line| line.trim_end_matches('/').rsplit('/').next())
        .collect();
    names.push(".git");
    let ignored = |name: &str| {
        names
            .iter()
            .any(|n| *n == name || n.strip_prefix('*').is_some_and(|end| name.ends_with(end)))
    };
    let (mut files, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder))
            .expect("a folder of the checkout can be listed")
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry
                .file_type()
                .expect("an entry of the checkout has a type");
            match folder.join(&name) {
                _ if ignored(&name) || kind.is_symlink() => {}
                path if kind.is_dir() => folders.push(path),
                path => files.push(path.to_string_lossy().replace('\\', "/")),
            }
        }
    }
    files.sort();
    files
}

/// The text of a file of the checkout; `None` where it is not text.
fn read(path: &str) -> Option<String> {
    String::from_utf8(fs::read(root().join(path)).expect("a file of the checkout can be read")).ok()
}

fn rust_files(folder: &str) -> Vec<(String, String)> {
    let rust = tracked()
        .into_iter()
        .filter(|path| path.starts_with(folder) && path.ends_with(".rs"));
    rust.map(|path| {
        (
            read(&path).unwrap_or_else(|| panic!("{path} is not UTF-8")),
            path,
        )
    })
    .map(|(text, path)| (path, text))
    .collect()
}

/// Files of `src/` that tests alone compile.
fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// Fails with every finding, one a line, in the form editors jump to.
fn none(found: impl IntoIterator<Item = (String, Vec<Finding>)>) {
    let lines = found.into_iter().flat_map(|(path, found)| {
        found
            .into_iter()
            .map(move |f| format!("{path}:{}: {}", f.line, f.rule))
    });
    let lines: Vec<String> = lines.collect();
    assert!(
        lines.is_empty(),
        "{} broken rules\n{}\n",
        lines.len(),
        lines.join("\n")
    );
}

/// Applies a rule to the code of `src/` outside tests.
fn every_source(rule: fn(&str, &str) -> Vec<Finding>) {
    let sources = rust_files("src/")
        .into_iter()
        .filter(|(path, _)| !is_test_file(path));
    none(sources.map(|(path, text)| {
        let found = rule(&path, &without_tests(&code(&text)));
        (path, found)
    }));
}

#[test]
fn no_import_crosses_the_table() {
    every_source(rules::crossing_imports);
    every_source(rules::option_types_only);
}

#[test]
fn files_of_energy_form_no_import_cycle() {
    for folder in ["src/energy/", "src/energy/sensor/"] {
        let sources: Vec<_> = rust_files(folder)
            .into_iter()
            .map(|(path, text)| {
                (
                    path[folder.len()..].to_string(),
                    without_tests(&code(&text)),
                )
            })
            .collect();
        let files = sources.iter().filter_map(|(path, code)| {
            let module = path.strip_suffix(".rs")?;
            (module != "mod" && !module.contains('/')).then_some((module, code.as_str()))
        });
        let cycle = rules::import_cycle(&files.collect::<Vec<_>>());
        assert!(cycle.is_empty(), "{folder}: {cycle:?}");
    }
}

#[test]
fn rooms_name_only_the_crates_of_their_trade() {
    every_source(rules::foreign_crates);
}

#[test]
fn only_the_command_line_prints() {
    every_source(rules::printing);
}

#[test]
fn nothing_panics_on_input_and_no_gradient_is_recorded() {
    every_source(|_, code| rules::never(code));
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let files: Vec<_> = ["src/", "tests/", "benches/", "fuzz/"]
        .into_iter()
        .flat_map(rust_files)
        .collect();
    for (path, text) in files
        .iter()
        .filter(|(_, text)| text.lines().count() > rules::NOTED)
    {
        eprintln!(
            "note: {path} has {} lines; aim at {}",
            text.lines().count(),
            rules::NOTED
        );
    }
    none(
        files
            .into_iter()
            .map(|(path, text)| (path.clone(), rules::file_shape(&path, &text))),
    );
}

#[test]
fn functions_are_short() {
    let files = ["src/", "tests/", "benches/", "fuzz/"]
        .into_iter()
        .flat_map(rust_files);
    none(files.map(|(path, text)| (path.clone(), rules::long_functions(&path, &code(&text)))));
}

#[test]
fn the_project_speaks_of_the_project_alone() {
    // Data is not ours to word, and these two must name what they refuse or ignore.
    let data = |path: &String| {
        [".jsonl", ".safetensors", "/tokenizer.json"]
            .iter()
            .any(|end| path.ends_with(end))
    };
    let files = tracked().into_iter().filter(|path| {
        !data(path) && !["tests/architecture/rules.rs", ".gitignore"].contains(&path.as_str())
    });
    none(files.filter_map(|path| read(&path).map(|text| (path, rules::not_of_the_project(&text)))));
}

#[test]
fn every_package_comes_from_the_public_registry() {
    none([(
        "Cargo.lock".to_string(),
        rules::foreign_packages(&read("Cargo.lock").expect("Cargo.lock is text")),
    )]);
    let found: Vec<_> = tracked()
        .into_iter()
        .filter(|path| path.ends_with(".cargo/config.toml"))
        .collect();
    assert!(
        found.is_empty(),
        "{found:?}: where cargo finds its packages is the machine's matter"
    );
}

#[test]
fn every_recipe_loads() {
    let recipes: Vec<_> = tracked()
        .into_iter()
        .filter(|path| path.starts_with("recipes/") && path.ends_with(".toml"))
        .collect();
    assert!(!recipes.is_empty(), "recipes/ holds no recipe");
    let refused = |path: &String| {
        wattune::recipe::load(&root().join(path), &[])
            .err()
            .map(|e| format!("{path}: {e}"))
    };
    let refused: Vec<_> = recipes.iter().filter_map(refused).collect();
    assert!(refused.is_empty(), "{}", refused.join("\n\n"));
}
