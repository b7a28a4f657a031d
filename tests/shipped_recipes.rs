//! Every recipe under recipes/ is planned through the command line: it gives a forecast, or is refused for the one thing that is not
//! in the tree (the network, generated text, another run's adapter).

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Recipes that need something from outside the tree, and a word of the refusal that names it.
const NEEDS: [(&str, &str); 4] = [
    ("hub-completion.toml", "HF_HUB_OFFLINE"),
    ("chat.toml", "HF_HUB_OFFLINE"),
    ("continue-adapter.toml", "runs/quickstart/adapter"),
    ("pretrain.toml", "corpus.txt"),
];

fn recipes(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(recipes(&path));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn every_recipe_is_planned_or_says_what_it_needs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let all = recipes(&root);
    assert!(all.len() >= 6, "{all:?}");
    // Caches of its own: what this machine has fetched before must not decide.
    let copy = tempfile::tempdir().unwrap();
    for path in &all {
        let name = path.file_name().unwrap().to_str().unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_wattune"))
            .args(["plan", path.to_str().unwrap(), "--json", "--quiet"])
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", copy.path().join("hub"))
            .env("WATTUNE_CACHE", copy.path().join("cache"))
            .output()
            .unwrap();
        let (shown, refusal) = (
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        );
        let needs = NEEDS.iter().find(|(recipe, _)| *recipe == name);
        match (output.status.code(), needs) {
            (Some(0), _) => {
                let plan: Value = serde_json::from_str(&shown).unwrap();
                assert!(
                    plan["forecast"]["steps_affordable"].as_u64().unwrap() > 0,
                    "{name}: {plan}"
                );
                assert!(
                    plan["forecast"]["energy_j"]["central"].as_f64().unwrap() > 0.0,
                    "{name}"
                );
            }
            (Some(2), Some((_, word))) => assert!(refusal.contains(word), "{name}: {refusal}"),
            other => panic!("{name}: {other:?}\n{refusal}"),
        }
    }
}
