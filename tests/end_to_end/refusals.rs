//! Exit statuses, and messages that say what to type.

use serde_json::Value;

use super::lab::{Lab, says, word};

fn train<'a>(set: &'a [&'a str]) -> Vec<&'a str> {
    let flags = set.iter().flat_map(|pair| ["--set", *pair]);
    ["train", "recipe.toml", "--out", "run"]
        .into_iter()
        .chain(flags)
        .collect()
}

#[test]
fn preflight_refuses_with_status_2_and_leaves_nothing() {
    let lab = Lab::new();
    let cases: [(&[&str], &[&str]); 13] = [
        (&["data.train=absent.jsonl"], &["absent.jsonl", "hint:"]),
        (
            &["adapter.target_modules=[\"q_prj\"]"],
            &["q_prj", "q_proj", "down_proj"],
        ),
        (
            &["budget.energy=1 uJ"],
            &[
                "the budget cannot hold one step",
                "budget.energy",
                "hint: raise the budget",
            ],
        ),
        (
            &["budget.flops=1000"],
            &["the budget cannot hold one step", "budget.flops"],
        ),
        (
            &["model.dtype=f16"],
            &["f16 cannot be computed in on a CPU", "bf16"],
        ),
        (
            &["energy.device=raspbery-pi-5"],
            &["raspbery-pi-5", "raspberry-pi-5"],
        ),
        (&["energy.grid=Germny"], &["Germny", "hint:"]),
        (
            &["energy.meter=measured", "energy.device=raspberry-pi-5"],
            &["energy cannot be measured here", "meter = \"counted\""],
        ),
        (&["model.id=./absent"], &["absent", "hint:"]),
        (
            &["model.id=embedded:huge"],
            &["embedded:huge", "embedded:tiny"],
        ),
        (
            &["data.max_length=4096"],
            &["max_position_embeddings = 512", "max_length = 512"],
        ),
        (
            &["model.init=random"],
            &[
                "an adapter cannot be trained on random weights",
                "type = \"none\"",
            ],
        ),
        (&["train.stepz=3"], &["stepz", "steps"]),
    ];
    for (set, texts) in cases {
        // A machine that can measure refuses nothing there.
        if set[0] == "energy.meter=measured"
            && lab.json(&["devices"])["sensors"][0]["available"] == true
        {
            continue;
        }
        says(&lab.refused(2, &train(set)), texts);
        assert!(!lab.path("run").exists(), "{set:?} left a run directory");
    }
}

/// Recipe text to replace and parts of the failure that follows; none of them hides another.
const FAULTS: [(&str, &str, &[&str]); 7] = [
    (
        "id = \"embedded:tiny\"",
        "id = \"./bare\"",
        &[
            "no tokenizer that can be read",
            "line 5, column 6",
            "5 | id",
        ],
    ),
    (
        "id = \"embedded:tiny\"",
        "id = \"./absent\"",
        &["there is no such model directory", "line 5, column 6"],
    ),
    (
        "train = \"train.jsonl\"",
        "train = \"absent.jsonl\"",
        &["cannot read", "absent.jsonl", "line 10, column 9", "^^^^"],
    ),
    (
        "validation = \"validation.jsonl\"",
        "validation = [\"validation.jsonl\", \"pointer.jsonl\"]",
        &["git LFS pointer", "line 11, column 14"],
    ),
    (
        "device = \"raspberry-pi-5\"",
        "device = \"raspbery-pi-5\"",
        &["raspbery-pi-5", "line 23, column 10"],
    ),
    (
        "meter = \"counted\"",
        "grid = \"Germny\"",
        &["Germny", "line 24, column 8"],
    ),
    (
        "r = 2",
        "target_modules = [\"q_prj\"]",
        &["q_prj", "line 7, column 18"],
    ),
];

#[test]
fn what_model_data_and_machine_tell_comes_at_once() {
    for faults in [
        &[0, 2, 4][..],
        &[1, 2, 3, 4, 5],
        &[0, 5, 6],
        &[2, 3],
        &[4, 5],
        &[1, 4],
        &[2, 6],
        &[0, 2, 3, 4, 5, 6],
        &[3],
    ] {
        let lab = Lab::new();
        std::fs::create_dir(lab.path("bare")).unwrap();
        let config = include_str!("../../recipes/quickstart/tiny/config.json");
        lab.write("bare/config.json", config);
        lab.write(
            "pointer.jsonl",
            "version https://git-lfs.github.com/spec/v1\n",
        );
        for fault in faults {
            lab.edit(FAULTS[*fault].0, FAULTS[*fault].1);
        }
        // A plan needs no weights, which `bare` lacks too.
        let message = lab.refused(2, &["plan", "recipe.toml"]);
        for fault in faults {
            says(&message, FAULTS[*fault].2);
        }
        let several = format!("the recipe cannot run for {} reasons", faults.len());
        assert_eq!(message.contains(&several), faults.len() > 1, "{message}");
        assert_eq!(
            message.matches(" of recipe.toml").count(),
            faults.len(),
            "{message}"
        );
        let places = message.split("line ").skip(1);
        let lines: Vec<usize> = places
            .filter_map(|place| place.split_once(", column")?.0.parse().ok())
            .collect();
        assert!(
            lines.len() == faults.len() && lines.is_sorted(),
            "{message}"
        );
    }
}

#[test]
fn a_recipe_is_refused_by_line() {
    let lab = Lab::new();
    lab.edit("steps = 4", "stepz = 4");
    says(
        &lab.refused(2, &["train", "recipe.toml"]),
        &["line 16", "column 1", "stepz", "steps"],
    );
    says(
        &lab.refused(2, &["recipe", "check", "recipe.toml"]),
        &["line 16"],
    );
    says(
        &lab.refused(2, &["plan", "absent.toml"]),
        &["absent.toml", "hint:"],
    );
}

#[test]
fn devices_that_are_not_there_are_named() {
    let lab = Lab::new();
    says(
        &lab.refused(2, &["train", "recipe.toml", "--device", "gpu"]),
        &[
            "there is no such device",
            "gpu",
            "cpu, cuda, cuda:N, metal, metal:N or auto",
            "--device cpu",
        ],
    );
    says(
        &lab.refused(2, &["train", "recipe.toml", "--device", "cpu:3"]),
        &["there is no such device", "cpu:3"],
    );
    if !cfg!(feature = "cuda") {
        says(
            &lab.refused(2, &["train", "recipe.toml", "--device", "cuda"]),
            &["no cuda support", "--features cuda"],
        );
    }
    says(
        &lab.refused(2, &["train", "recipe.toml", "--threads", "0"]),
        &["--threads"],
    );
    says(
        &lab.refused(2, &["train", "recipe.toml", "--threads", "99999"]),
        &["99999", "at most 16 for each", "--threads "],
    );
    says(&lab.refused(2, &["train"]), &["RECIPE"]);
}

#[test]
fn a_run_is_never_overwritten() {
    let lab = Lab::new();
    lab.train("run", &["train.steps=1".to_string()]);
    let before = lab.read("run/report.json");
    says(
        &lab.refused(2, &train(&[])),
        &[
            "the run directory exists already",
            "--out DIR",
            "--resume run",
        ],
    );
    assert_eq!(lab.read("run/report.json"), before);
}

#[test]
fn a_bad_record_stops_by_file_and_line_or_is_counted() {
    let lab = Lab::new();
    let records = String::from_utf8(lab.read("train.jsonl")).unwrap();
    let mut lines: Vec<&str> = records.lines().collect();
    lines.insert(4, "{\"prompt\": \"half a rec");
    lab.write("train.jsonl", &(lines.join("\n") + "\n"));
    says(
        &lab.refused(2, &train(&[])),
        &["train.jsonl", "line 5", "on_bad_record"],
    );
    let report = lab.train(
        "run",
        &super::lab::set(&["data.on_bad_record=skip", "train.steps=1"]),
    );
    assert_eq!(
        (
            report["data"]["skipped"].as_u64(),
            report["data"]["examples"].as_u64()
        ),
        (Some(1), Some(24))
    );
    assert!(
        report["warnings"]
            .to_string()
            .contains("1 of 25 training records could not be read and were skipped")
    );
}

#[test]
fn a_diverged_run_fails_and_keeps_its_last_good_checkpoint() {
    let lab = Lab::new();
    // The rate rises from 0: the first step is harmless and saved; after the second every value is near 1e30.
    let set = [
        "train.learning_rate=1e30",
        "train.warmup_steps=1",
        "train.steps=6",
        "train.save_every=1",
        "train.eval_every=1",
    ];
    let output = lab.output(&[&train(&set)[..], &["--json"]].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    says(&message, &["is not finite", "lower `train.learning_rate`"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(word(&report, "/training/stop_reason"), "diverged");
    let file: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
    assert_eq!(file, report);
    // What was learned until then is there; what came after is nowhere.
    assert!(
        report["warnings"]
            .to_string()
            .contains("the last checkpoint is `checkpoints/step-000001`"),
        "{}",
        report["warnings"]
    );
    let checkpoints: Vec<_> = std::fs::read_dir(lab.path("run/checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(checkpoints, ["step-000001"]);
    assert!(!lab.path("run/adapter").exists());
    let good = lab.json(&[
        "eval",
        "--model",
        "embedded:tiny",
        "--adapter",
        "run/checkpoints/step-000001",
        "--data",
        "validation.jsonl",
    ]);
    assert_eq!(good["loss"], report["training"]["val_loss_before"]);
}

#[test]
fn an_evaluation_of_nothing_is_refused() {
    let lab = Lab::new();
    let eval = [
        "eval",
        "--model",
        "embedded:tiny",
        "--data",
        "validation.jsonl",
    ];
    says(
        &lab.refused(2, &[&eval[..], &["--limit", "0"]].concat()),
        &["nothing to evaluate", "--limit"],
    );
    says(
        &lab.refused(2, &[&eval[..], &["--micro-batch-size", "0"]].concat()),
        &["at least 1"],
    );
    says(
        &lab.refused(2, &[&eval[..], &["--format", "prose"]].concat()),
        &["prose", "completion"],
    );
}

#[test]
fn a_recipe_of_another_trainer_is_one_mistake() {
    let lab = Lab::new();
    let axolotl =
        "base_model: HuggingFaceTB/SmolLM2-135M\nadapter: lora\nlora_r: 8\nmicro_batch_size: 2\n";
    for name in ["config.yml", "config.yaml", "config.json"] {
        lab.write(name, axolotl);
        let said = lab.refused(2, &["train", name]);
        assert!(
            said.contains("a recipe is TOML") && said.contains("wattune recipe init"),
            "{said}"
        );
        assert_eq!(said.matches("hint:").count(), 1, "{said}");
    }
}

#[test]
fn the_published_runs_are_listed_and_found_by_their_names() {
    let lab = Lab::new();
    let names = lab.json(&["baseline", "--list"]);
    let names = names.as_array().unwrap();
    let table = String::from_utf8(lab.output(&["baseline", "--list"]).stdout).unwrap();
    assert!(names.len() > 20 && names.contains(&"GPT-3 175B".into()));
    assert!(table.lines().count() > names.len() && table.contains("GPT-3 175B"));
}
