//! `eval --multiple-choice` on a real pretrained model gives the figures of lm-evaluation-harness; `eval --generate` compares what
//! `generate` writes.

use std::path::Path;

use serde_json::Value;

use crate::common;
use crate::lab::{Lab, number};

/// tests/golden/choices.json: scripts/eval_reference.py.
#[test]
fn accuracies_are_those_of_the_harness() {
    let Some(assets) = common::assets("accuracies_are_those_of_the_harness") else {
        return;
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/choices.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let lab = Lab::new();
    let records = golden["records"].as_array().unwrap();
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    lab.write("choices.jsonl", &(lines.join("\n") + "\n"));
    let model = assets.join("models/TinyStories-656K").display().to_string();
    let eval = [
        "eval",
        "--model",
        &model,
        "--data",
        "choices.jsonl",
        "--multiple-choice",
    ];
    let found = lab.json(&eval);
    for key in ["/acc", "/acc_norm", "/acc_stderr", "/acc_norm_stderr"] {
        let difference = number(&found, key) - number(&golden, key);
        assert!(difference.abs() < 1e-12, "{key}: {found}");
    }
    for (ours, theirs) in found["loglikelihoods"]
        .as_array()
        .unwrap()
        .iter()
        .zip(records)
    {
        let theirs = theirs["loglikelihoods"].as_array().unwrap();
        assert_eq!(ours.as_array().unwrap().len(), theirs.len());
        for (ours, theirs) in ours.as_array().unwrap().iter().zip(theirs) {
            let (ours, theirs) = (ours.as_f64().unwrap(), theirs.as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-3, "{ours}, not {theirs}");
        }
    }
    let said = String::from_utf8(lab.output(&eval).stdout).unwrap();
    assert!(
        said.starts_with(&format!("acc {:.4}", number(&golden, "/acc"))),
        "{said}"
    );
    lab.refused(
        2,
        &[
            "predict",
            "--model",
            &model,
            "--data",
            "choices.jsonl",
            "--multiple-choice",
        ],
    );
}

#[test]
fn answers_are_those_of_generate() {
    let lab = Lab::new();
    let model = ["--model", "embedded:tiny"];
    let eval = [
        "--data",
        "train.jsonl",
        "--generate",
        "--limit",
        "2",
        "--max-new-tokens",
        "12",
    ];
    let found = lab.json(&[&["eval"], &model[..], &eval].concat());
    assert_eq!(found["examples"], 2);
    let records = lab.lines("train.jsonl");
    for (said, record) in found["generated"].as_array().unwrap().iter().zip(&records) {
        let prompt = record["prompt"].as_str().unwrap();
        let generate = ["--prompt", prompt, "--max-new-tokens", "12"];
        let alone = lab.json(&[&["generate"], &model[..], &generate].concat());
        assert_eq!(
            said.as_str().unwrap(),
            alone["text"].as_str().unwrap().trim()
        );
    }
    assert!(
        number(&found, "/rougeL") <= number(&found, "/rouge1"),
        "{found}"
    );
    lab.refused(2, &[&["predict"], &model[..], &eval].concat());
}
