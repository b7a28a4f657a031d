//! Baselines that are trained: equal energy, equal loss, a budget of their own, and a run that they leave as it was.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::lab::{Lab, microjoules, number, says, set, word};

const SCRATCH: &str = "baseline.from_scratch=measured";

/// The entry of a kind that was measured.
fn measured<'a>(report: &'a Value, kind: &str) -> &'a Value {
    let all = report["baselines"].as_array().unwrap();
    all.iter()
        .find(|entry| entry["kind"] == kind && entry["label"] == "measured")
        .unwrap_or_else(|| panic!("no {kind} in {all:#?}"))
}

/// Counted microjoules of the training entries in a ledger, one by one.
fn training(lab: &Lab, ledger: &str) -> Vec<u64> {
    let entries = lab.lines(ledger);
    let training = entries.iter().filter(|line| line["phase"] == "train");
    training
        .map(|line| microjoules(&line["energy_j"]["counted"]))
        .collect()
}

#[test]
fn from_scratch_is_compared_with_the_run_at_equal_energy() {
    let lab = Lab::new();
    let keys = set(&["train.steps=12", SCRATCH, "baseline.energy_multiple=1"]);
    let plan = lab.plan(&keys);
    let report = lab.train("run", &keys);
    let scratch = measured(&report, "from_scratch_same_task");
    let block = &scratch["measured"];
    // As many steps as fit the run's training energy, by the two ledgers; a thirteenth of the plan's "every weight" steps would pass it.
    let run: u64 = training(&lab, "run/ledger.jsonl").iter().sum();
    let own = training(&lab, "run/baselines/from_scratch/ledger.jsonl");
    let spent: u64 = own.iter().sum();
    assert!(
        spent <= run && spent + own.iter().max().unwrap() > run,
        "{spent} of {run}: {own:?}"
    );
    assert_eq!(block["steps_at_equal_energy"], own.len());
    assert_eq!(
        (block["steps"].as_u64(), word(block, "/stop_reason")),
        (Some(own.len() as u64), "equal_energy")
    );
    assert_eq!(
        (
            microjoules(&block["run_training_j"]),
            microjoules(&block["training_j"])
        ),
        (run, spent)
    );
    // What the plan said it would spend, to the microjoule, and apart from the run.
    assert_eq!(
        scratch["energy_j"],
        plan["measured_baselines"][0]["energy_j"]["equal_energy"]
    );
    assert_eq!(
        microjoules(&scratch["energy_j"]),
        lab.ledger("run/baselines/from_scratch")
    );
    check_curves(&report, scratch, run, spent);
    // Pretraining and the counted full fine-tuning stay, and the page shows the comparison.
    let kinds: Vec<&str> = report["baselines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| word(entry, "/kind"))
        .collect();
    assert_eq!(
        kinds,
        ["full_fine_tuning", "pretraining", "from_scratch_same_task"]
    );
    says(
        &String::from_utf8(lab.read("run/report.md")).unwrap(),
        &["at equal training energy (this run: "],
    );
    assert!(!lab.path("run/baselines/from_scratch/checkpoints").exists());
}

/// The baseline's and the run's curves begin at their losses before training and end at their training energies.
fn check_curves(report: &Value, scratch: &Value, run: u64, spent: u64) {
    let block = &scratch["measured"];
    // Random weights know nothing: every one of 1024 tokens is as likely as another, ln 1024 = 6.93 nats.
    let curve = block["curve"].as_array().unwrap();
    assert!(
        (number(&curve[0], "/val_loss") - 6.93).abs() < 0.1,
        "{}",
        curve[0]
    );
    let last = &curve[curve.len() - 1];
    assert_eq!(
        (&last["val_loss"], microjoules(&last["energy_j"])),
        (&scratch["val_loss_at_equal_energy"], spent)
    );
    // Twelve steps from random weights are no match for a pretrained model.
    assert!(
        number(scratch, "/val_loss_at_equal_energy") > number(report, "/training/val_loss_after")
    );
    assert_eq!(block["run_val_loss"], report["training"]["val_loss_after"]);
    // The run's own curve ends at its own training energy.
    let own_curve = report["training"]["curve"].as_array().unwrap();
    let last = &own_curve[own_curve.len() - 1];
    assert_eq!(
        (
            own_curve.len(),
            microjoules(&last["energy_j"]),
            &last["val_loss"]
        ),
        (13, run, &report["training"]["val_loss_after"])
    );
}

#[test]
fn a_measured_baseline_leaves_the_run_as_it_is_and_is_the_same_on_any_number_of_threads() {
    let lab = Lab::new();
    let keys = ["train.steps=6", "train.eval_every=3"];
    let alone = lab.train("alone", &set(&keys));
    let with = set(&[
        &keys[..],
        &[
            SCRATCH,
            "baseline.full_fine_tuning=measured",
            "baseline.energy_multiple=2",
        ],
    ]
    .concat());
    let mut blocks = Vec::new();
    for threads in ["1", "2"] {
        let flags: Vec<&str> = with
            .iter()
            .flat_map(|pair| ["--set", pair.as_str()])
            .collect();
        let report = lab.json(
            &[
                &[
                    "train",
                    "recipe.toml",
                    "--out",
                    threads,
                    "--quiet",
                    "--threads",
                    threads,
                ],
                &flags[..],
            ]
            .concat(),
        );
        assert_eq!(
            (&report["energy"]["total_j"], &report["carbon"]["gco2e"]),
            (&alone["energy"]["total_j"], &alone["carbon"]["gco2e"])
        );
        assert_eq!(
            (lab.adapter(threads), lab.ledger(threads)),
            (lab.adapter("alone"), lab.ledger("alone"))
        );
        blocks.push([
            measured(&report, "from_scratch_same_task").clone(),
            measured(&report, "full_fine_tuning").clone(),
        ]);
    }
    assert_eq!(blocks[0], blocks[1]);
    // It went on beyond equal energy, to at most twice as much.
    let block = &blocks[0][0]["measured"];
    assert!(
        block["steps"].as_u64() > block["steps_at_equal_energy"].as_u64(),
        "{block}"
    );
    assert!(number(block, "/training_j") <= 2.0 * number(block, "/run_training_j"));
    assert_eq!(word(block, "/stop_reason"), "energy_multiple");
    assert_ne!(word(block, "/equal_loss/how"), "measured");
    assert_eq!(block["equal_loss"]["tried_j"], block["training_j"]);
}

#[test]
fn the_energy_to_equal_loss_is_that_of_the_first_evaluation_there() {
    let lab = Lab::new();
    // The run hardly learns; every weight at a good rate soon does better.
    let keys = [
        "train.steps=8",
        "train.learning_rate=1e-6",
        "baseline.learning_rate=2e-3",
        "baseline.full_fine_tuning=measured",
    ];
    let report = lab.train("run", &set(&keys));
    let full = measured(&report, "full_fine_tuning");
    let block = &full["measured"];
    let target = number(&report, "/training/val_loss_after");
    let curve = block["curve"].as_array().unwrap();
    let first = curve
        .iter()
        .find(|point| {
            point["val_loss"]
                .as_f64()
                .is_some_and(|loss| loss <= target)
        })
        .unwrap();
    assert!(
        first["step"].as_u64() > Some(0),
        "the pretrained model is not yet there"
    );
    assert_eq!(
        (
            word(block, "/equal_loss/how"),
            &block["equal_loss"]["energy_j"]
        ),
        ("measured", &first["energy_j"])
    );
    assert_eq!(full["energy_to_equal_loss_j"], first["energy_j"]);
    assert_eq!(
        (number(block, "/learning_rate"), word(block, "/stop_reason")),
        (2e-3, "equal_energy")
    );
    // The counted row of the same kind stays first.
    assert_eq!(word(&report, "/baselines/0/label"), "counted");
}

#[test]
fn a_baseline_keeps_to_its_own_budget() {
    let lab = Lab::new();
    let keys = |budget: &str| {
        set(&[
            "train.steps=12",
            SCRATCH,
            &format!("baseline.budget={budget}"),
        ])
    };
    let plan = lab.plan(&keys("1 kJ"));
    let equal = number(&plan, "/measured_baselines/0/energy_j/equal_energy");
    let report = lab.train("half", &keys(&format!("{} J", equal * 0.6)));
    let scratch = measured(&report, "from_scratch_same_task");
    assert_eq!(word(scratch, "/measured/stop_reason"), "budget");
    assert!(
        number(scratch, "/energy_j") <= equal * 0.6
            && scratch["val_loss_at_equal_energy"].is_null(),
        "{scratch}"
    );
    says(
        &String::from_utf8(lab.read("half/report.md")).unwrap(),
        &["stopped at `baseline.budget`"],
    );
    // Too little for one step: the run stands, and says why there is no baseline.
    let report = lab.train("none", &keys("1 mJ"));
    says(
        &report["warnings"].to_string(),
        &[
            "the from-scratch baseline was not trained",
            "`baseline.budget` leaves 1 mJ",
        ],
    );
    assert_eq!(report["training"]["steps"], 12);
}

#[test]
fn ctrl_c_during_a_baseline_keeps_the_finished_run() {
    let lab = Lab::new();
    // A rate at which nothing is learnt: it would go on for a long time.
    let keys = [
        "train.steps=2",
        SCRATCH,
        "baseline.energy_multiple=100000",
        "baseline.learning_rate=1e-12",
    ];
    let flags: Vec<&str> = keys.iter().flat_map(|pair| ["--set", pair]).collect();
    let mut child = lab
        .wattune(&[&["train", "recipe.toml", "--out", "run"], &flags[..]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(1200);
    while lab.lines("run/baselines/from_scratch/steps.jsonl").len() < 5 {
        if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
            let _ = child.kill();
            panic!("the baseline did not begin");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // The report was whole before the baseline began.
    let before: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
    assert_eq!(word(&before, "/training/stop_reason"), "steps");
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{message}");
    says(
        &message,
        &[
            "measuring the from-scratch baseline",
            "the run is finished and its report is complete",
        ],
    );
    let report: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
    assert_eq!(
        (
            word(&report, "/training/stop_reason"),
            report["training"]["steps"].as_u64()
        ),
        ("steps", Some(2))
    );
    assert_eq!(
        word(
            measured(&report, "from_scratch_same_task"),
            "/measured/stop_reason"
        ),
        "interrupted"
    );
    assert_eq!(report["energy"], before["energy"]);
    assert!(lab.adapter("run").len() > 8 * 1024);
}

/// Starts a command and waits until the baseline in this folder has logged `steps` steps.
fn until_baseline(lab: &Lab, arguments: &[&str], folder: &str, steps: usize) -> Child {
    let mut child = lab
        .wattune(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(1200);
    while lab.lines(&format!("{folder}/steps.jsonl")).len() < steps {
        if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
            let _ = child.kill();
            panic!("the baseline did not come to step {steps}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn report(lab: &Lab, run: &str) -> Value {
    serde_json::from_slice(&lab.read(&format!("{run}/report.json"))).unwrap()
}

/// What a baseline found, without what it spent on the way.
fn found(report: &Value, kind: &str) -> Vec<Value> {
    let entry = measured(report, kind);
    let block = [
        "steps",
        "steps_at_equal_energy",
        "stop_reason",
        "training_j",
        "equal_loss",
        "curve",
    ];
    block
        .iter()
        .map(|key| &entry["measured"][*key])
        .chain([&entry["val_loss_at_equal_energy"]])
        .cloned()
        .collect()
}

#[test]
fn an_interrupted_or_killed_baseline_resumes_and_finds_the_same() {
    let lab = Lab::new();
    let keys = [
        "train.steps=12",
        SCRATCH,
        "baseline.full_fine_tuning=measured",
        "baseline.energy_multiple=4",
    ];
    let whole = lab.train("whole", &set(&keys));
    let equal = whole["baselines"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["kind"] == "from_scratch_same_task")
        .unwrap();
    let equal = equal["measured"]["steps_at_equal_energy"].as_u64().unwrap() as usize;
    assert!(
        equal > 4
            && found(&whole, "from_scratch_same_task")[0].as_u64().unwrap() as usize > equal + 6
    );
    let flags: Vec<&str> = keys.iter().flat_map(|pair| ["--set", pair]).collect();

    // Asked to stop before equal energy, and again beyond it.
    let begin = [&["train", "recipe.toml", "--out", "asked"], &flags[..]].concat();
    for (arguments, steps) in [
        (&begin[..], 2),
        (&["train", "--resume", "asked"], equal + 3),
    ] {
        let child = until_baseline(&lab, arguments, "asked/baselines/from_scratch", steps);
        assert!(
            std::process::Command::new("kill")
                .args(["-INT", &child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130));
        says(
            &String::from_utf8(output.stderr).unwrap(),
            &["continue the baseline with `wattune train --resume asked`"],
        );
        assert_eq!(
            word(
                measured(&report(&lab, "asked"), "from_scratch_same_task"),
                "/measured/stop_reason"
            ),
            "interrupted"
        );
    }
    // The machine goes down: of this nothing is saved, and the steps since the last checkpoint are done, and paid, again.
    let begin = [
        &["train", "recipe.toml", "--out", "killed", "--quiet"],
        &flags[..],
    ]
    .concat();
    let mut child = until_baseline(&lab, &begin, "killed/baselines/from_scratch", 2);
    child.kill().unwrap();
    child.wait().unwrap();
    let other = lab.read("killed/baselines/full_fine_tuning/ledger.jsonl");
    assert_eq!(
        found(&report(&lab, "killed"), "full_fine_tuning"),
        found(&whole, "full_fine_tuning")
    );

    for run in ["asked", "killed"] {
        check_resumed(&lab, run, &whole);
    }
    // The other baseline, which was whole, was not touched.
    assert_eq!(
        lab.read("killed/baselines/full_fine_tuning/ledger.jsonl"),
        other
    );
}

/// Resumes `run` to its end: its baselines find what those of the uninterrupted run `whole` did.
fn check_resumed(lab: &Lab, run: &str, whole: &Value) {
    let before = report(lab, run);
    let after = lab.json(&["train", "--resume", run, "--quiet"]);
    for kind in ["from_scratch_same_task", "full_fine_tuning"] {
        assert_eq!(found(&after, kind), found(whole, kind), "{run}: {kind}");
    }
    assert_eq!(
        after["baselines"].as_array().unwrap().len(),
        whole["baselines"].as_array().unwrap().len()
    );
    assert_eq!(after["energy"], before["energy"]);
    let (spent, alone) = (
        measured(&after, "from_scratch_same_task"),
        measured(whole, "from_scratch_same_task"),
    );
    assert_eq!(
        microjoules(&spent["energy_j"]),
        lab.ledger(&format!("{run}/baselines/from_scratch"))
    );
    assert!(
        number(spent, "/energy_j") > number(alone, "/energy_j"),
        "{run}: what was lost and saved is spent"
    );
    assert_eq!(after["training"]["curve"], whole["training"]["curve"]);
    assert!(
        !lab.path(&format!("{run}/baselines/from_scratch/checkpoints"))
            .exists()
    );
    says(
        &lab.refused(2, &["train", "--resume", run]),
        &["this run is finished"],
    );
}

/// A run of twelve steps beside one baseline that has a budget of its own, in joules.
fn twelve_steps(baseline: &str, budget: f64) -> Vec<String> {
    set(&[
        "train.steps=12",
        baseline,
        "baseline.energy_multiple=1",
        &format!("baseline.budget={budget} J"),
    ])
}

/// What that baseline takes, in joules, where its budget lets it come to the run's energy.
fn equal_energy(lab: &Lab, keys: impl Fn(f64) -> Vec<String>) -> f64 {
    number(
        &lab.plan(&keys(1000.0)),
        "/measured_baselines/0/energy_j/equal_energy",
    )
}

#[test]
fn a_baseline_s_budget_holds_however_often_it_is_killed() {
    let lab = Lab::new();
    let keys = |budget| twelve_steps(SCRATCH, budget);
    let equal = equal_energy(&lab, keys);
    let budget = equal * 1.3;
    let keys = keys(budget);
    let flags: Vec<&str> = keys.iter().flat_map(|pair| ["--set", pair]).collect();
    let begin = [
        &["train", "recipe.toml", "--out", "run", "--quiet"],
        &flags[..],
    ]
    .concat();
    let mut child = until_baseline(&lab, &begin, "run/baselines/from_scratch", 5);
    child.kill().unwrap();
    child.wait().unwrap();
    let after = lab.json(&["train", "--resume", "run", "--quiet"]);
    let scratch = measured(&after, "from_scratch_same_task");
    assert_eq!(word(scratch, "/measured/stop_reason"), "budget");
    assert!(
        number(scratch, "/energy_j") <= budget
            && lab.ledger("run/baselines/from_scratch") <= (budget * 1e6) as u64
    );
}

#[test]
fn a_baseline_that_died_before_it_told_its_end_is_what_it_was() {
    let lab = Lab::new();
    let keys = |budget| twelve_steps("baseline.full_fine_tuning=measured", budget);
    let equal = equal_energy(&lab, keys);
    // A budget that is spent to a microjoule at equal energy, and one that ends the baseline earlier: neither holds another step.
    for (run, budget, reason) in [
        ("whole", equal + 1e-6, "equal_energy"),
        ("short", equal * 0.7, "budget"),
    ] {
        let flags: Vec<String> = keys(budget);
        let begin = [
            &["train", "recipe.toml", "--out", run, "--quiet"],
            &super::lab::flags(&flags)[..],
        ]
        .concat();
        let mut child = until_baseline(
            &lab,
            &begin,
            &format!("{run}/baselines/full_fine_tuning"),
            1,
        );
        // Where its report belongs there is a folder: it dies with everything done and nothing told.
        let (place, aside) = (
            lab.path(&format!("{run}/report.json")),
            lab.path(&format!("{run}/aside.json")),
        );
        std::fs::rename(&place, &aside).unwrap();
        std::fs::create_dir(&place).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
        std::fs::remove_dir(&place).unwrap();
        std::fs::rename(&aside, &place).unwrap();
        let spent = lab.ledger(&format!("{run}/baselines/full_fine_tuning"));

        let after = lab.json(&["train", "--resume", run, "--quiet"]);
        let full = measured(&after, "full_fine_tuning");
        assert_eq!(word(full, "/measured/stop_reason"), reason);
        // Nothing was loaded or evaluated again.
        assert_eq!(
            (
                microjoules(&full["energy_j"]),
                lab.ledger(&format!("{run}/baselines/full_fine_tuning"))
            ),
            (spent, spent)
        );
        assert_eq!(
            full["val_loss_at_equal_energy"].is_number(),
            reason == "equal_energy"
        );
    }
}

#[test]
fn a_baseline_with_no_room_to_load_is_not_trained_further() {
    let lab = Lab::new();
    let keys = |budget| twelve_steps("baseline.full_fine_tuning=measured", budget);
    let equal = equal_energy(&lab, keys);
    let (budget, folder) = (equal * 1.5, "run/baselines/full_fine_tuning");
    let keys = keys(budget);
    let flags: Vec<&str> = keys.iter().flat_map(|pair| ["--set", pair]).collect();
    let begin = [
        &["train", "recipe.toml", "--out", "run", "--quiet"],
        &flags[..],
    ]
    .concat();
    let child = until_baseline(&lab, &begin, folder, 3);
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let done = lab.lines(&format!("{folder}/steps.jsonl")).len();
    // A crash took all but a microjoule.
    let lost = budget - lab.ledger(folder) as f64 * 1e-6 - 1e-6;
    let line = format!(
        "{{\"phase\":\"lost\",\"step\":{done},\"energy_j\":{{\"counted\":{lost},\"measured\":null,\"timed\":0.0}},\"flops\":0,\
         \"bytes\":{{}},\"wall_s\":0.0,\"t\":0.0}}\n"
    );
    let ledger = String::from_utf8(lab.read(&format!("{folder}/ledger.jsonl"))).unwrap() + &line;
    lab.write(&format!("{folder}/ledger.jsonl"), &ledger);
    let after = lab.json(&["train", "--resume", "run", "--quiet"]);
    let full = measured(&after, "full_fine_tuning");
    assert_eq!(
        (
            word(full, "/measured/stop_reason"),
            full["measured"]["steps"].as_u64()
        ),
        ("budget", Some(done as u64))
    );
    assert!(number(full, "/energy_j") <= budget && lab.ledger(folder) as f64 <= budget * 1e6);
}
