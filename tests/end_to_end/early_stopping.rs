//! `train.early_stopping`: a run ends when its validation loss no longer falls, resumed or not.

use crate::lab::{Lab, set};

/// No fall is worth a million nats per kilojoule: after the evaluation before training, two more end the run.
fn impatient() -> Vec<String> {
    set(&[
        "train.steps=20",
        "train.eval_every=1",
        "train.save_every=1",
        "train.early_stopping=2",
        "train.early_stopping_gain=1e6",
    ])
}

#[test]
fn a_run_stops_when_its_loss_falls_too_little() {
    let lab = Lab::new();
    let report = lab.train("run", &impatient());
    assert_eq!(report["training"]["stop_reason"], "early_stopping");
    assert_eq!(report["training"]["steps"], 2);
    let page = String::from_utf8(lab.output(&["report", "run"]).stdout).unwrap();
    assert!(page.contains("It stopped early, after 2 steps"), "{page}");

    // The same rule without a price: this loss falls at every evaluation.
    let falling = [
        impatient(),
        set(&["train.steps=4", "train.early_stopping_gain=0.0"]),
    ]
    .concat();
    let report = lab.train("falling", &falling);
    assert_eq!(report["training"]["stop_reason"], "steps");
}

/// Cut back to its first checkpoint, one evaluation has been waited for already.
#[test]
fn a_resumed_run_has_waited_as_long() {
    let lab = Lab::new();
    let whole = lab.train("run", &impatient());
    let adapter = lab.adapter("run");
    for directory in ["adapter", "checkpoints/step-000002"] {
        std::fs::remove_dir_all(lab.path("run").join(directory)).unwrap();
    }
    std::fs::remove_file(lab.path("run/report.json")).unwrap();
    let report = lab.json(&["train", "--resume", "run", "--quiet"]);
    assert_eq!(report["training"]["stop_reason"], "early_stopping");
    assert_eq!(report["training"]["steps"], whole["training"]["steps"]);
    assert_eq!(lab.adapter("run"), adapter);
}
