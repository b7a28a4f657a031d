//! The same numbers, however the work is cut up: threads, micro-batches, dropout masks, rank and alpha.

use super::lab::{Lab, number, says, set};

#[test]
fn the_thread_count_changes_no_byte() {
    let lab = Lab::new();
    let keys = set(&[
        "train.steps=3",
        "adapter.lora_dropout=0.2",
        "train.micro_batch_size=4",
    ]);
    for threads in ["1", "2"] {
        let arguments = [
            &[
                "train",
                "recipe.toml",
                "--quiet",
                "--threads",
                threads,
                "--out",
                threads,
            ],
            &super::lab::flags(&keys)[..],
        ];
        let report = lab.json(&arguments.concat());
        assert_eq!(report["environment"]["threads"].to_string(), threads);
    }
    assert_eq!(lab.course("1"), lab.course("2"));
    assert!(lab.adapter("1") == lab.adapter("2"), "the adapters differ");
}

#[test]
fn one_micro_batch_of_eight_equals_eight_of_one() {
    let lab = Lab::new();
    // Unequal lengths, and masks keyed by record: only the rounding of sums may differ.
    let keys = |rows: u32, times: u32| {
        set(&[
            "train.steps=2",
            "adapter.lora_dropout=0.3",
            "data.shuffle=false",
            &format!("train.micro_batch_size={rows}"),
            &format!("train.gradient_accumulation_steps={times}"),
        ])
    };
    let (wide, deep) = (
        lab.train("wide", &keys(8, 1)),
        lab.train("deep", &keys(1, 8)),
    );
    for (one, other) in lab
        .lines("wide/steps.jsonl")
        .iter()
        .zip(&lab.lines("deep/steps.jsonl"))
    {
        assert_eq!(one["loss_tokens"], other["loss_tokens"]);
        let (loss, norm) = (
            number(one, "/loss") - number(other, "/loss"),
            number(one, "/grad_norm") / number(other, "/grad_norm"),
        );
        assert!(
            loss.abs() < 1e-6 && (norm - 1.0).abs() < 1e-5,
            "step {}: loss by {loss}, norm by {norm}",
            one["step"]
        );
    }
    // Without dropout the losses are others: the masks do something.
    let dry = lab.train(
        "dry",
        &[keys(8, 1), set(&["adapter.lora_dropout=0.0"])].concat(),
    );
    let last = |report| number(report, "/training/train_loss_last");
    assert!((last(&wide) - last(&dry)).abs() > 1e-4 && (last(&wide) - last(&deep)).abs() < 1e-6);
}

#[test]
fn recomputed_activations_change_no_loss() {
    let lab = Lab::new();
    for mode in ["always", "never", "1", "3"] {
        lab.train(
            mode,
            &set(&[
                "train.steps=3",
                "adapter.lora_dropout=0.2",
                &format!("train.activation_checkpointing={mode}"),
            ]),
        );
    }
    let losses = |run: &str| {
        lab.lines(&format!("{run}/steps.jsonl"))
            .iter()
            .map(|line| number(line, "/loss"))
            .collect::<Vec<_>>()
    };
    for mode in ["always", "1", "3"] {
        assert_eq!(losses(mode), losses("never"), "{mode}");
        assert!(
            lab.adapter(mode) == lab.adapter("never"),
            "the adapters of {mode} and never differ"
        );
    }
}

#[test]
fn a_merged_model_is_the_base_with_its_adapter() {
    let lab = Lab::new();
    // alpha / r = 3; trained far enough that adapter and base differ.
    lab.train("run", &set(&["train.steps=6", "train.learning_rate=2e-2"]));
    let data = ["--data", "validation.jsonl", "--quiet"];
    let eval = |model: &[&str]| number(&lab.json(&[&["eval"], model, &data].concat()), "/loss");
    let base = eval(&["--model", "embedded:tiny"]);
    let adapted = eval(&["--model", "embedded:tiny", "--adapter", "run/adapter"]);
    lab.json(&[
        "merge",
        "--model",
        "embedded:tiny",
        "--adapter",
        "run/adapter",
        "--out",
        "merged",
        "--quiet",
    ]);
    let merged = eval(&["--model", "./merged"]);
    assert!(
        (merged - adapted).abs() < 1e-5,
        "merged {merged}, with adapter {adapted}"
    );
    assert!(
        (base - adapted).abs() > 0.05,
        "base {base}, with adapter {adapted}"
    );
    // What eval says is what the run saw after its last step.
    let report = lab.json(&["report", "run"]);
    assert!((number(&report, "/training/val_loss_after") - adapted).abs() < 1e-6);
    assert!((number(&report, "/training/val_loss_before") - base).abs() < 1e-6);
    // The run names the model, the adapter and the validation files; an adapter names its model.
    assert_eq!(eval_of(&lab, &["run"]), adapted);
    assert_eq!(eval_of(&lab, &["run/adapter", data[0], data[1]]), adapted);
    assert_eq!(
        eval_of(&lab, &["--adapter", "run/adapter", data[0], data[1]]),
        adapted
    );
    assert_ne!(eval_of(&lab, &["run", "--model", "./merged"]), adapted);
    // A second merge does not overwrite the first.
    let message = lab.refused(
        2,
        &[
            "merge",
            "--model",
            "embedded:tiny",
            "--adapter",
            "run/adapter",
            "--out",
            "merged",
        ],
    );
    says(&message, &["merged"]);
}

fn eval_of(lab: &Lab, arguments: &[&str]) -> f64 {
    number(&lab.json(&[&["eval"], arguments].concat()), "/loss")
}

#[test]
fn a_model_is_found_or_what_is_missing_is_named() {
    let lab = Lab::new();
    lab.train("run", &set(&["train.steps=1"]));
    lab.edit("r = 2\nlora_alpha = 6", "type = \"none\"");
    lab.edit("validation = \"validation.jsonl\"\n", "");
    lab.train("full", &set(&["train.steps=1"]));
    let generate = |arguments: &[&str]| {
        let end = ["--prompt", "Once", "--max-new-tokens", "2"];
        lab.json(&[&["generate"], arguments, &end].concat())["tokens"].clone()
    };
    assert_eq!(generate(&["full"]), generate(&["--model", "./full/model"]));
    let config = String::from_utf8(lab.read("run/adapter/adapter_config.json")).unwrap();
    for (folder, base) in [("moved", "\"/nowhere/base\""), ("nameless", "null")] {
        std::fs::create_dir(lab.path(folder)).unwrap();
        let config = config.replace("\"embedded:tiny\"", base);
        lab.write(&format!("{folder}/adapter_config.json"), &config);
        lab.write(&format!("{folder}/adapter_model.safetensors"), "");
    }
    std::fs::remove_dir_all(lab.path("run/adapter")).unwrap();
    let cases: [(&[&str], &[&str]); 8] = [
        (
            &["generate", "--prompt", "x"],
            &["no model", "run directory"],
        ),
        (
            &["generate", "recipe.toml", "--prompt", "x"],
            &["not a run directory"],
        ),
        (
            &["generate", "moved", "--prompt", "x"],
            &["/nowhere/base", "base_model_name_or_path"],
        ),
        (
            &["generate", "nameless", "--prompt", "x"],
            &["does not name", "--model"],
        ),
        (
            &["generate", "run", "--prompt", "x"],
            &["no result yet", "--resume run", "checkpoints"],
        ),
        (
            &["generate", "full", "--adapter", "moved", "--prompt", "x"],
            &["two adapters"],
        ),
        (
            &["merge", "full", "--out", "out"],
            &["trained every weight", "full/model"],
        ),
        (&["eval", "full"], &["no validation set", "--data"]),
    ];
    for (arguments, parts) in cases {
        says(&lab.refused(2, arguments), parts);
    }
}

#[test]
fn an_untrained_adapter_changes_nothing() {
    let lab = Lab::new();
    // One step of warm-up: the first rate is 0, so B stays 0.
    lab.train("run", &set(&["train.steps=1", "train.warmup_steps=1"]));
    assert_eq!(number(&lab.lines("run/steps.jsonl")[0], "/lr"), 0.0);
    let eval = |model: &[&str]| {
        lab.json(
            &[
                &[
                    "eval",
                    "--data",
                    "validation.jsonl",
                    "--model",
                    "embedded:tiny",
                ],
                model,
            ]
            .concat(),
        )
    };
    assert_eq!(
        eval(&[])["loss"],
        eval(&["--adapter", "run/adapter"])["loss"]
    );
}

#[test]
fn an_adapter_can_be_continued() {
    let lab = Lab::new();
    let first = lab.train("first", &[]);
    lab.edit("r = 2\nlora_alpha = 6\n", "init_from = \"first/adapter\"\n");
    let second = lab.train("second", &[]);
    assert_eq!(second["adapter"], first["adapter"]);
    assert!(
        (number(&second, "/training/val_loss_before") - number(&first, "/training/val_loss_after"))
            .abs()
            < 1e-6
    );
    // What the adapter holds cannot be contradicted.
    let message = lab.refused(
        2,
        &[
            "train",
            "recipe.toml",
            "--set",
            "adapter.r=5",
            "--out",
            "third",
        ],
    );
    says(
        &message,
        &[
            "`adapter.r` contradicts",
            "the adapter holds `r = 2`",
            "leave `r` out",
        ],
    );
}
