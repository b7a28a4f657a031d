//! A run that is cut off goes on as if it had not been, and what it lost is spent.

#![cfg(unix)]

use std::fs::OpenOptions;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::lab::{Lab, flags, microjoules, number, says, set, word};

/// Starts a command, silent.
fn start(lab: &Lab, arguments: &[&str]) -> Child {
    lab.wattune(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until `steps.jsonl` of `run` has `steps` lines; false where the program ended before.
fn reached(lab: &Lab, child: &mut Child, run: &str, steps: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while lab.lines(&format!("{run}/steps.jsonl")).len() < steps {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "step {steps} was not reached");
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Trains and is killed as soon as the checkpoint after `step` is whole.
pub(super) fn killed_at_checkpoint(lab: &Lab, run: &str, keys: &[String], step: u64) {
    let mut child = start(
        lab,
        &[
            &["train", "recipe.toml", "--out", run, "--quiet"],
            &flags(keys)[..],
        ]
        .concat(),
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while !lab
        .path(&format!("{run}/checkpoints/step-{step:06}"))
        .exists()
    {
        assert!(
            child.try_wait().unwrap().is_none() && Instant::now() < deadline,
            "no checkpoint after step {step}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Trains and is killed once `steps` lines are written.
fn killed_after(lab: &Lab, run: &str, keys: &[String], steps: usize) {
    let mut child = start(
        lab,
        &[
            &["train", "recipe.toml", "--out", run, "--quiet"],
            &flags(keys)[..],
        ]
        .concat(),
    );
    assert!(
        reached(lab, &mut child, run, steps),
        "the run ended before it could be killed"
    );
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Sends "INT" (as Ctrl-C does), "TERM" (as `kill` and batch systems do) or "HUP" (as a terminal that closes does).
fn signal(child: &Child, name: &str) {
    let status = std::process::Command::new("kill")
        .args([&format!("-{name}"), &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn interrupt(child: &Child) {
    signal(child, "INT");
}

pub(super) fn resume(lab: &Lab, run: &str) -> Value {
    lab.json(&["train", "--resume", run, "--quiet"])
}

/// Cuts the last `bytes` bytes off a file.
fn cut(lab: &Lab, file: &str, bytes: u64) {
    let file = OpenOptions::new().write(true).open(lab.path(file)).unwrap();
    file.set_len(file.metadata().unwrap().len() - bytes)
        .unwrap();
}

/// What a checkpoint is for: the same adapter, the same steps, the same report of what was learned.
fn assert_as_uninterrupted(lab: &Lab, run: &str, report: &Value) {
    let whole: Value = serde_json::from_slice(&lab.read("whole/report.json")).unwrap();
    assert_eq!(lab.course(run), lab.course("whole"));
    assert!(
        lab.adapter(run) == lab.adapter("whole"),
        "the adapters differ"
    );
    for key in [
        "steps",
        "stop_reason",
        "val_loss_before",
        "val_loss_after",
        "train_loss_last",
        "tokens",
        "loss_tokens",
    ] {
        assert_eq!(report["training"][key], whole["training"][key], "{key}");
    }
    // Also what the model wrote before the first step, which the resumed process no longer had.
    assert_eq!(report["sample"], whole["sample"]);
}

#[test]
fn a_killed_run_goes_on_with_the_same_bytes_and_keeps_what_it_spent() {
    let lab = Lab::new();
    // Dropout too: its masks are redrawn. Saves without an evaluation at 3, with one at 4 and 8.
    let keys = set(&[
        "train.steps=9",
        "train.save_every=3",
        "train.eval_every=4",
        "adapter.lora_dropout=0.1",
    ]);
    let whole = lab.train("whole", &keys);
    for (run, steps) in [("first", 1), ("middle", 5), ("at a checkpoint", 3)] {
        match run {
            "at a checkpoint" => killed_at_checkpoint(&lab, run, &keys, steps),
            _ => killed_after(&lab, run, &keys, steps as usize),
        }
        let torn = lab.ledger(run);
        if run == "middle" {
            // The last lines half-written, as a power cut may leave them. A step's is whole before its checkpoint is there: the torn one is
            // the step's after the newest.
            cut(&lab, "middle/ledger.jsonl", 9);
            let saved = std::fs::read_dir(lab.path("middle/checkpoints"))
                .unwrap()
                .filter_map(|entry| {
                    entry
                        .unwrap()
                        .file_name()
                        .to_str()?
                        .strip_prefix("step-")?
                        .parse::<usize>()
                        .ok()
                });
            let (steps, newest) = (lab.read("middle/steps.jsonl"), saved.max().unwrap());
            let mut whole = steps
                .split_inclusive(|byte| *byte == b'\n')
                .take(newest)
                .collect::<Vec<_>>()
                .concat();
            whole.extend(b"{\"step\":");
            std::fs::write(lab.path("middle/steps.jsonl"), whole).unwrap();
        }
        let report = resume(&lab, run);
        assert_as_uninterrupted(&lab, run, &report);
        // Every step before the cut was paid for, and so were those done again: dearer than the run that was left alone.
        let total = microjoules(&report["energy"]["total_j"]);
        assert!(
            total > torn && total > microjoules(&whole["energy"]["total_j"]),
            "{run}: {total}, torn at {torn}"
        );
        assert_eq!(total, lab.ledger(run));
        let phases: u64 = report["energy"]["by_phase"]
            .as_object()
            .unwrap()
            .values()
            .map(microjoules)
            .sum();
        assert_eq!(phases, total);
        // What a crash took is named and not guessed to be arithmetic or movement.
        let lost = report["energy"]["by_phase"]
            .get("lost")
            .map_or(0, microjoules);
        assert_eq!(
            microjoules(&report["energy"]["counted_parts"]["lost_j"]),
            lost,
            "{run}"
        );
    }
}

#[test]
fn an_interrupted_run_saves_and_goes_on() {
    let lab = Lab::new();
    let keys = set(&["train.steps=12"]);
    lab.train("whole", &keys);
    for name in ["INT", "TERM"] {
        let mut child = start(
            &lab,
            &[&["train", "recipe.toml", "--out", name], &flags(&keys)[..]].concat(),
        );
        assert!(reached(&lab, &mut child, name, 2));
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{name}");
        let resume_with = format!("wattune train --resume {name}");
        let words = [
            "finishing this step and saving",
            "a checkpoint is saved",
            &resume_with,
        ];
        says(&String::from_utf8(output.stderr).unwrap(), &words);
        let report: Value =
            serde_json::from_slice(&lab.read(&format!("{name}/report.json"))).unwrap();
        assert_eq!(word(&report, "/training/stop_reason"), "interrupted");
        let done = report["training"]["steps"].as_u64().unwrap();
        assert!(
            (2..12).contains(&done)
                && lab
                    .path(&format!("{name}/checkpoints/step-{done:06}"))
                    .is_dir()
        );
        let report = resume(&lab, name);
        assert_as_uninterrupted(&lab, name, &report);
        // Nothing was lost: an orderly end releases its lease.
        assert_eq!(report["energy"]["by_phase"].get("lost"), None);
    }
}

#[test]
fn a_run_that_was_told_to_outlive_its_terminal_does() {
    let lab = Lab::new();
    // What `nohup` does, without its output file.
    let mut shell = std::process::Command::new("sh");
    shell.args([
        "-c",
        "trap '' HUP; exec \"$0\" train recipe.toml --out run --quiet",
        env!("CARGO_BIN_EXE_wattune"),
    ]);
    shell
        .current_dir(lab.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    assert!(reached(&lab, &mut child, "run", 1));
    signal(&child, "HUP");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let report: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
    assert_eq!(word(&report, "/training/stop_reason"), "steps");
}

#[test]
fn a_second_interrupt_leaves_at_once() {
    let lab = Lab::new();
    // A step so long (24 rows, 12 times) that only the second signal can end it soon.
    let keys = set(&[
        "train.micro_batch_size=24",
        "train.gradient_accumulation_steps=12",
    ]);
    let records = String::from_utf8(lab.read("train.jsonl")).unwrap();
    lab.write("train.jsonl", &records.repeat(12));
    let mut child = start(
        &lab,
        &[
            &["train", "recipe.toml", "--out", "run", "--threads", "1"],
            &flags(&keys)[..],
        ]
        .concat(),
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    // Loaded, and the first evaluation done: the first step is on its way.
    while lab
        .lines("run/ledger.jsonl")
        .iter()
        .filter(|line| line["phase"] == "eval")
        .count()
        < 2
    {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
    let asked = Instant::now();
    interrupt(&child);
    std::thread::sleep(Duration::from_millis(100));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        asked.elapsed() < Duration::from_millis(1500),
        "{:?}",
        asked.elapsed()
    );
    assert!(!lab.path("run/report.json").exists());
    assert_eq!(lab.lines("run/steps.jsonl").len(), 0);
}

#[test]
fn another_recipe_and_a_finished_run_are_refused() {
    let lab = Lab::new();
    let keys = six_steps();
    lab.train("whole", &keys);
    // A finished run.
    let before = lab.read("whole/ledger.jsonl");
    let message = lab.refused(2, &["train", "--resume", "whole"]);
    says(
        &message,
        &[
            "this run is finished",
            "stop_reason steps, 6 steps",
            "wattune report whole",
            "init_from",
        ],
    );
    assert_eq!(lab.read("whole/ledger.jsonl"), before);
    // No run, though there is a recipe.
    says(
        &lab.refused(2, &["train", "--resume", "."]),
        &["this is not a run directory", "recipe.toml"],
    );
    // Another recipe.
    killed_after(&lab, "run", &keys, 5);
    let message = lab.refused(
        2,
        &[
            "train",
            "recipe.toml",
            "--resume",
            "run",
            "--set",
            "train.steps=7",
        ],
    );
    says(
        &message,
        &[
            "not the one that this run began with",
            "wattune train --resume run",
        ],
    );
    // Overrides without a recipe would be lost: refused.
    says(
        &lab.refused(2, &["train", "--resume", "run", "--set", "train.steps=7"]),
        &["adapter.init_from"],
    );
}

fn six_steps() -> Vec<String> {
    set(&[
        "train.steps=6",
        "train.save_every=2",
        "train.keep_best=false",
        "train.activation_checkpointing=2",
    ])
}

#[test]
fn changed_data_a_lost_ledger_and_a_damaged_checkpoint_are_refused() {
    let lab = Lab::new();
    let keys = six_steps();
    lab.train("whole", &keys);
    killed_after(&lab, "run", &keys, 5);
    // Other data under the same name.
    let records = lab.read("train.jsonl");
    lab.records("train.jsonl", "recipes/quickstart/train.jsonl", 23);
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &["no longer those that this run began with", "put back"],
    );
    std::fs::write(lab.path("train.jsonl"), records).unwrap();
    // A lost ledger: with it the budget would begin anew.
    std::fs::rename(lab.path("run/ledger.jsonl"), lab.path("ledger")).unwrap();
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &[
            "the ledger of this run is gone",
            "run/ledger.jsonl",
            "put the file back",
        ],
    );
    std::fs::rename(lab.path("ledger"), lab.path("run/ledger.jsonl")).unwrap();
    // A damaged checkpoint: named, with the way out.
    let newest = "run/checkpoints/step-000004";
    cut(&lab, &format!("{newest}/trainer.safetensors"), 100);
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &[
            "a checkpoint cannot be read",
            newest,
            "delete this checkpoint's folder",
        ],
    );
    std::fs::remove_dir_all(lab.path(newest)).unwrap();
    // With the same recipe given, from the checkpoint before. What was `auto` in it is what the run began with.
    let report = lab.json(
        &[
            &["train", "recipe.toml", "--resume", "run", "--quiet"],
            &flags(&keys[..3])[..],
        ]
        .concat(),
    );
    assert!(
        String::from_utf8(lab.read("run/recipe.toml"))
            .unwrap()
            .contains("\nactivation_checkpointing = 2 ")
    );
    assert_as_uninterrupted(&lab, "run", &report);
}

#[test]
fn a_run_that_is_still_going_is_left_alone() {
    let lab = Lab::new();
    let mut child = start(
        &lab,
        &[
            "train",
            "recipe.toml",
            "--out",
            "run",
            "--quiet",
            "--set",
            "train.steps=200",
        ],
    );
    assert!(reached(&lab, &mut child, "run", 2));
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &["another process is using this run", "run/ledger.jsonl"],
    );
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let steps = lab.lines("run/steps.jsonl").len();
    assert_eq!(
        steps,
        lab.lines("run/ledger.jsonl")
            .iter()
            .filter(|line| line["phase"] == "train")
            .count()
    );
}

#[test]
fn a_continued_adapter_is_resumed_too() {
    let lab = Lab::new();
    lab.train("base", &set(&["train.steps=2", "adapter.r=3"]));
    // Its r, alpha and targets are the adapter's, which the recipe leaves out.
    lab.edit("r = 2\nlora_alpha = 6\n", "init_from = \"base/adapter\"\n");
    let keys = set(&["train.steps=5", "train.save_every=2"]);
    let whole = lab.train("whole", &keys);
    assert_eq!(whole["adapter"]["r"], 3);
    killed_after(&lab, "run", &keys, 3);
    let report = resume(&lab, "run");
    assert_as_uninterrupted(&lab, "run", &report);
}

#[test]
fn a_budget_holds_however_often_the_run_is_killed() {
    let lab = Lab::new();
    // Steps of a tenth of a second or so: a lease, which a kill loses, holds few of them.
    let rows = "train.micro_batch_size=8";
    let limit = microjoules(&lab.plan(&set(&["train.steps=30", rows]))["energy"]["total_j"]);
    let keys = set(&[
        "train.steps=99",
        "train.save_every=2",
        rows,
        &format!("budget.energy={} J", limit as f64 / 1e6),
    ]);
    killed_after(&lab, "run", &keys, 1);
    let mut kills = 1;
    let last = loop {
        let done = lab.lines("run/steps.jsonl").len();
        let mut child = start(&lab, &["train", "--resume", "run", "--quiet"]);
        if !reached(&lab, &mut child, "run", done + 2) {
            break child.wait_with_output().unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        assert!(
            lab.ledger("run") <= limit,
            "{} of {limit}",
            lab.ledger("run")
        );
        assert!(kills < 20, "killing a run made its budget endless");
    };
    assert!(kills > 1, "{}", String::from_utf8_lossy(&last.stderr));
    assert!(
        lab.ledger("run") <= limit,
        "{} of {limit}",
        lab.ledger("run")
    );
    if last.status.success() {
        let report: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
        assert_eq!(word(&report, "/training/stop_reason"), "budget:energy");
        assert!(
            number(&report, "/budget/spent/energy_j") <= number(&report, "/budget/limits/energy_j")
        );
        assert!(report["energy"]["by_phase"].get("lost").is_some());
    } else {
        // No checkpoint, and too little left to load once more, evaluate and save.
        assert_eq!(last.status.code(), Some(2));
        let message = String::from_utf8(last.stderr).unwrap();
        says(
            &message,
            &["the energy budget of this run has no room left to go on"],
        );
        assert!(!lab.path("run/checkpoints").exists());
    }
}

#[test]
fn a_run_with_room_to_load_alone_ends_at_its_checkpoint() {
    let lab = Lab::new();
    let limit = microjoules(&lab.plan(&set(&["train.steps=12"]))["energy"]["total_j"]);
    let keys = set(&[
        "train.steps=99",
        "train.save_every=2",
        &format!("budget.energy={} J", limit as f64 / 1e6),
    ]);
    killed_after(&lab, "run", &keys, 3);
    // The lease is released, and one more entry leaves ten times what loading takes: far from an evaluation.
    let lines = lab.lines("run/ledger.jsonl");
    let load = microjoules(
        &lines.iter().find(|line| line["phase"] == "load").unwrap()["energy_j"]["counted"],
    );
    let mut entry = lines
        .iter()
        .find(|line| line["phase"] == "train")
        .unwrap()
        .clone();
    entry["energy_j"]["counted"] = ((limit - lab.ledger("run") - 10 * load) as f64 / 1e6).into();
    let mut ledger = String::from_utf8(lab.read("run/ledger.jsonl")).unwrap();
    ledger.truncate(ledger.rfind('\n').unwrap() + 1);
    lab.write(
        "run/ledger.jsonl",
        &format!("{ledger}{entry}\n{{\"settled\":true,\"t\":0.0}}\n"),
    );
    let before = lab.ledger("run");
    assert_eq!(before, limit - 10 * load);
    let report = resume(&lab, "run");
    assert_eq!(word(&report, "/training/stop_reason"), "budget:energy");
    let steps = report["training"]["steps"].as_u64().unwrap();
    assert!(
        lab.path(&format!("run/checkpoints/step-{steps:06}"))
            .is_dir()
    );
    assert!(!lab.adapter("run").is_empty());
    // Nothing more was spent.
    assert_eq!(lab.ledger("run"), before);
    assert_eq!(number(&report, "/budget/overshoot_j"), 0.0);
}

#[test]
fn a_run_cut_off_before_its_ledger_starts_again() {
    let lab = Lab::new();
    lab.train("whole", &[]);
    std::fs::create_dir(lab.path("run")).unwrap();
    for file in ["recipe.toml", "plan.json"] {
        std::fs::copy(lab.path("whole").join(file), lab.path("run").join(file)).unwrap();
    }
    let report = resume(&lab, "run");
    assert_as_uninterrupted(&lab, "run", &report);
}
