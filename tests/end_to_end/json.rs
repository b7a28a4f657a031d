//! `--json` prints one document and nothing else; `--quiet` prints nothing on standard error.

use super::lab::Lab;

#[test]
fn every_command_prints_one_document_and_can_be_quiet() {
    let lab = Lab::new();
    let short = ["--set", "train.steps=1"];
    let model = ["--model", "embedded:tiny"];
    let commands: Vec<(Vec<&str>, &[&str])> = vec![
        (
            [&["train", "recipe.toml", "--out", "one"], &short[..]].concat(),
            &["training", "energy", "budget"],
        ),
        (
            [&["train", "recipe.toml", "--out", "two"], &short[..]].concat(),
            &["carbon"],
        ),
        (
            [&["plan", "recipe.toml"], &short[..]].concat(),
            &["memory", "forecast", "training"],
        ),
        (
            [&["eval", "--data", "validation.jsonl"], &model[..]].concat(),
            &["loss", "perplexity", "tokens", "loss_tokens", "examples"],
        ),
        (
            [
                &["generate", "--prompt", "Once", "--max-new-tokens", "2"],
                &model[..],
            ]
            .concat(),
            &["prompt_tokens", "tokens", "text"],
        ),
        (
            [
                &["merge", "--adapter", "one/adapter", "--out", "merged"],
                &model[..],
            ]
            .concat(),
            &["out", "merged"],
        ),
        (
            vec!["report", "one"],
            &["model", "baselines", "environment"],
        ),
        (vec!["compare", "one", "two"], &[]),
        (vec!["devices"], &["here", "profiles", "sensors"]),
        (vec!["recipe", "init", "new.toml"], &["written"]),
        (vec!["recipe", "check", "recipe.toml"], &["ok", "steps"]),
        (vec!["recipe", "schema"], &["$schema"]),
    ];
    for (arguments, keys) in commands {
        let output = lab.output(&[&arguments[..], &["--json", "--quiet"]].concat());
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            output.stderr.is_empty(),
            "{arguments:?} is not quiet: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let document: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}"));
        for key in keys {
            assert!(document.get(key).is_some(), "{arguments:?}: no `{key}`");
        }
    }
}

#[test]
fn a_refusal_is_one_document_too() {
    let lab = Lab::new();
    for arguments in [
        &["train", "absent.toml", "--json"][..],
        &["plan", "absent.toml", "--json"],
        &["report", "absent", "--json"],
    ] {
        let output = lab.output(arguments);
        assert!(
            output.status.code() == Some(2) && output.stderr.starts_with(b"error: "),
            "{arguments:?}"
        );
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let error = &document["error"];
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(error["exit_status"], 2);
        assert!(told.contains(error["what"].as_str().unwrap()), "{error}");
        assert!(told.contains(error["hint"].as_str().unwrap()), "{error}");
    }
}
