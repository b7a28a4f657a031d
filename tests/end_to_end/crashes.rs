//! A run survives a lost terminal, and one killed at any point is finished by `--resume` with nothing missing and nothing forgotten.

#![cfg(unix)]

use std::fs::{self, OpenOptions};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::lab::{Lab, flags, says, set};

const FILES: [&str; 4] = ["report.md", "report.html", "emissions.csv", "report.json"];

fn keys() -> Vec<String> {
    set(&[
        "train.steps=4",
        "train.save_every=2",
        "train.keep_best=false",
    ])
}

fn report(lab: &Lab, run: &str) -> Value {
    serde_json::from_slice(&lab.read(&format!("{run}/report.json"))).unwrap()
}

#[test]
fn a_lost_terminal_never_costs_a_run() {
    let lab = Lab::new();
    let keys = keys();
    let train = |run: &str, stderr: Stdio| {
        let arguments = [&["train", "recipe.toml", "--out", run], &flags(&keys)[..]].concat();
        lab.wattune(&arguments)
            .stdout(Stdio::null())
            .stderr(stderr)
            .status()
            .unwrap()
    };
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert!(train("full", full.into()).success());
    // As in `wattune train ... 2>&1 | head -1`: the reader has gone.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert!(train("pipe", writer.into()).success());
    for run in ["full", "pipe"] {
        assert_eq!(report(&lab, run)["training"]["steps"], 4, "{run}");
    }
}

#[test]
fn an_interruption_is_saved_when_its_message_cannot_be_written() {
    let lab = Lab::new();
    let keys = set(&["train.steps=400", "train.eval_every=0"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let arguments = [&["train", "recipe.toml", "--out", "run"], &flags(&keys)[..]].concat();
    let mut child = lab
        .wattune(&arguments)
        .stdout(Stdio::null())
        .stderr(writer)
        .spawn()
        .unwrap();
    while lab.lines("run/steps.jsonl").len() < 2 {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let pid = child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-INT", &pid])
        .status();
    assert!(sent.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(
        report(&lab, "run")["training"]["stop_reason"],
        "interrupted"
    );
}

#[test]
fn a_run_killed_after_its_last_step_is_finished_for_nothing() {
    let lab = Lab::new();
    let whole = lab.train("whole", &keys());
    lab.train("run", &keys());
    // As after a kill between the last checkpoint and the report: no report, no result.
    for file in FILES {
        fs::remove_file(lab.path(&format!("run/{file}"))).unwrap();
    }
    fs::remove_dir_all(lab.path("run/adapter")).unwrap();
    let spent = lab.ledger("run");
    let finished = lab.json(&["train", "--resume", "run", "--quiet"]);
    assert_eq!(lab.ledger("run"), spent, "finishing spends nothing");
    assert_eq!(lab.adapter("run"), lab.adapter("whole"));
    for key in ["steps", "stop_reason", "val_loss_after", "train_loss_last"] {
        assert_eq!(finished["training"][key], whole["training"][key], "{key}");
    }
    assert_eq!(finished["energy"]["total_j"], whole["energy"]["total_j"]);
    for file in FILES.map(String::from).into_iter().chain(
        fs::read_dir(lab.path("whole/adapter"))
            .unwrap()
            .map(|entry| format!("adapter/{}", entry.unwrap().file_name().to_string_lossy())),
    ) {
        assert!(lab.path(&format!("run/{file}")).is_file(), "{file}");
    }
    // Killed between the pages and report.json, which is written last.
    fs::remove_file(lab.path("run/report.json")).unwrap();
    lab.json(&["train", "--resume", "run", "--quiet"]);
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &["this run is finished"],
    );
    // A page that was deleted since is written again.
    fs::remove_file(lab.path("run/report.html")).unwrap();
    lab.json(&["train", "--resume", "run", "--quiet"]);
    assert!(lab.path("run/report.html").is_file());
}

#[test]
fn a_budget_that_is_spent_does_not_keep_a_run_from_being_finished() {
    let lab = Lab::new();
    let keys = set(&["train.steps=400", "budget.energy=2 J"]);
    let whole = lab.train("run", &keys);
    assert_eq!(whole["training"]["stop_reason"], "budget:energy");
    fs::remove_file(lab.path("run/report.json")).unwrap();
    let finished = lab.json(&["train", "--resume", "run", "--quiet"]);
    assert_eq!(finished["training"]["stop_reason"], "budget:energy");
    for key in ["energy_j", "carbon_gco2e", "flops"] {
        let pointer = format!("/budget/spent/{key}");
        assert_eq!(finished.pointer(&pointer), whole.pointer(&pointer), "{key}");
    }
}

#[test]
fn spending_is_not_forgotten() {
    let lab = Lab::new();
    let keys = set(&[
        "train.steps=400",
        "train.save_every=2",
        "budget.energy=40 J",
    ]);
    let arguments = [
        &["train", "recipe.toml", "--out", "run", "--quiet"],
        &flags(&keys)[..],
    ]
    .concat();
    let kill_after = |steps: usize| {
        let mut child = lab.wattune(&arguments).spawn().unwrap();
        while lab.lines("run/steps.jsonl").len() < steps {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    };
    // Before the first checkpoint the ledger's first line holds the recipe's digest.
    kill_after(1);
    fs::remove_dir_all(lab.path("run/checkpoints")).ok();
    let recipe = String::from_utf8(lab.read("run/recipe.toml")).unwrap();
    assert!(recipe.contains("\"40 J\""), "{recipe}");
    lab.write("run/recipe.toml", &recipe.replace("\"40 J\"", "\"80 J\""));
    says(
        &lab.refused(2, &["train", "--resume", "run"]),
        &["no longer those that this run began with"],
    );
    fs::remove_dir_all(lab.path("run")).unwrap();
    kill_after(5);
    let ledger = lab.read("run/ledger.jsonl");
    for damaged in [Vec::new(), vec![0; ledger.len()], {
        let first = ledger.iter().position(|byte| *byte == b'\n').unwrap();
        ledger[..=first].to_vec()
    }] {
        fs::write(lab.path("run/ledger.jsonl"), damaged).unwrap();
        says(
            &lab.refused(2, &["train", "--resume", "run"]),
            &["the ledger has lost entries"],
        );
    }
}

#[test]
fn what_a_killed_process_left_is_swept() {
    let lab = Lab::new();
    let ended = u32::MAX;
    lab.train("run", &keys());
    fs::remove_file(lab.path("run/report.json")).unwrap();
    fs::create_dir(lab.path(&format!("run/checkpoints/.step-000004.{ended}.deleted"))).unwrap();
    fs::write(lab.path(&format!("run/.report.json.{ended}.tmp")), "{").unwrap();
    lab.json(&["train", "--resume", "run", "--quiet"]);
    for folder in ["run", "run/checkpoints"] {
        let entries = fs::read_dir(lab.path(folder)).unwrap();
        let left: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with('.'))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "{folder}");
    }
}

#[test]
fn a_run_resumes_where_its_folder_was_moved() {
    let lab = Lab::new();
    lab.train("run", &keys());
    fs::remove_file(lab.path("run/report.json")).unwrap();
    fs::create_dir(lab.path("there")).unwrap();
    for name in ["run", "train.jsonl", "validation.jsonl"] {
        fs::rename(lab.path(name), lab.path(&format!("there/{name}"))).unwrap();
    }
    // The resolved recipe holds absolute paths, which the user corrects.
    let here = lab.path("").display().to_string();
    let recipe = String::from_utf8(lab.read("there/run/recipe.toml")).unwrap();
    assert!(recipe.contains(&here), "{recipe}");
    let moved = recipe.replace(&here, &format!("{here}there/"));
    lab.write("there/run/recipe.toml", &moved);
    let report = lab.json(&["train", "--resume", "there/run", "--quiet"]);
    assert_eq!(report["training"]["steps"], 4);
    // Other data at the new place are not those that the run began with.
    fs::remove_file(lab.path("there/run/report.json")).unwrap();
    lab.records("there/train.jsonl", "recipes/quickstart/train.jsonl", 23);
    says(
        &lab.refused(2, &["train", "--resume", "there/run"]),
        &["no longer those that this run began with"],
    );
}

#[test]
fn a_report_of_an_unfinished_run_says_how_far_it_is() {
    let lab = Lab::new();
    let train = [
        "train",
        "recipe.toml",
        "--out",
        "run",
        "--set",
        "train.steps=100000",
    ];
    let mut child = lab.wattune(&train).spawn().unwrap();
    let asked = |lab: &Lab| {
        let output = lab.output(&["report", "run"]);
        String::from_utf8(output.stderr).unwrap()
    };
    let begun = Instant::now();
    let running = loop {
        let said = asked(&lab);
        if said.contains("training loss") || begun.elapsed() > Duration::from_secs(120) {
            break said;
        }
    };
    assert!(running.contains("this run is still training"), "{running}");
    assert!(running.contains("tail -f run/steps.jsonl"), "{running}");
    child.kill().unwrap();
    child.wait().unwrap();
    let cut = asked(&lab);
    assert!(
        cut.contains("was cut off") && cut.contains("training loss"),
        "{cut}"
    );
    assert!(cut.contains("wattune train --resume run"), "{cut}");
    // A resumed run keeps its recipe.
    let other = ["train", "--resume", "run", "--set", "train.steps=9"];
    let refused = lab.output(&other);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        refused.status.code() == Some(2) && said.contains("adapter.init_from"),
        "{said}"
    );
}
