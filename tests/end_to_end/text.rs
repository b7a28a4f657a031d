//! What `generate` writes.

use serde_json::Value;

use super::lab::{Lab, says};

const PROMPT: &str = "Once upon a time";

fn generate(lab: &Lab, more: &[&str]) -> Value {
    lab.json(
        &[
            &[
                "generate",
                "--model",
                "embedded:tiny",
                "--prompt",
                PROMPT,
                "--max-new-tokens",
                "24",
            ],
            more,
        ]
        .concat(),
    )
}

fn text(value: &Value) -> &str {
    value["text"].as_str().unwrap()
}

#[test]
fn greedy_text_is_the_same_every_time() {
    let lab = Lab::new();
    let one = generate(&lab, &["--threads", "1"]);
    assert_eq!(one, generate(&lab, &["--threads", "2", "--seed", "5"]));
    assert!(!text(&one).is_empty() && one["tokens"].as_array().unwrap().len() <= 24);
    // Without --json the text itself, and nothing else, is standard output.
    let output = lab.output(&[
        "generate",
        "--model",
        "embedded:tiny",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "24",
    ]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().trim_end(),
        text(&one).trim_end()
    );
}

#[test]
fn a_stop_text_ends_the_text_before_it() {
    let lab = Lab::new();
    let whole = generate(&lab, &[]);
    let whole = text(&whole);
    // Three letters across the sixth word's beginning: their first half is generated before the second.
    let at = whole.match_indices(' ').nth(5).unwrap().0 - 1;
    let stop = &whole[at..at + 3];
    let first = whole.find(stop).unwrap();
    let stopped = generate(&lab, &["--stop", stop]);
    assert_eq!(text(&stopped), &whole[..first]);
    let output = lab.output(&[
        "generate",
        "--model",
        "embedded:tiny",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "24",
        "--stop",
        stop,
    ]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().trim_end(),
        whole[..first].trim_end()
    );
    // A stop text that never comes, though its beginning is the text's end, takes nothing away.
    let end: String = whole
        .chars()
        .rev()
        .take(2)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    assert_eq!(
        text(&generate(&lab, &["--stop", &format!("{end}~~")])),
        whole
    );
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let lab = Lab::new();
    let drawn =
        |seed: &str| text(&generate(&lab, &["--temperature", "1.5", "--seed", seed])).to_string();
    let first = drawn("1");
    assert_eq!(first, drawn("1"));
    assert!(["2", "3"].iter().any(|seed| drawn(seed) != first));
    // Among the single likeliest token, any temperature is greedy.
    assert_eq!(
        generate(&lab, &["--temperature", "1.5", "--top-k", "1"])["tokens"],
        generate(&lab, &[])["tokens"]
    );
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let lab = Lab::new();
    let generate = ["generate", "--model", "embedded:tiny", "--prompt"];
    let message = lab.refused(2, &[&generate[..], &["hello", "--chat"]].concat());
    says(&message, &["chat template", "hint:"]);
    says(
        &lab.refused(
            2,
            &[&generate[..], &["hello", "--temperature", "nan"]].concat(),
        ),
        &["`--temperature` is out of range"],
    );
    says(
        &lab.refused(2, &[&generate[..], &[""]].concat()),
        &["hint: give a prompt"],
    );
    says(
        &lab.refused(
            2,
            &[&generate[..], &["word ".repeat(600).as_str()]].concat(),
        ),
        &["longer than the model's positions", "below 512"],
    );
    says(
        &lab.refused(
            2,
            &["generate", "--model", "no/such/model", "--prompt", "x"],
        ),
        &["error:"],
    );
}
