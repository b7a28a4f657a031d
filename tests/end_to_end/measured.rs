//! A run on a machine with an energy counter: here a powercap tree that the test drives at a constant power.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::lab::{Lab, flags, microjoules, number, says, set, word};

/// What the package draws.
const WATTS: f64 = 20.0;

/// A machine with one package whose counter starts anew every `resets` milliseconds (0: never), and is
/// updated every `period` milliseconds.
struct Machine {
    root: PathBuf,
    stop: Arc<AtomicBool>,
    resets: Arc<AtomicU64>,
    period: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Machine {
    fn new(lab: &Lab) -> Machine {
        let root = lab.path("powercap");
        let zone = root.join("intel-rapl:0");
        std::fs::create_dir_all(&zone).unwrap();
        std::fs::write(zone.join("name"), "package-0\n").unwrap();
        std::fs::write(zone.join("max_energy_range_uj"), "262143328850\n").unwrap();
        show(&zone, 0);
        let stop = Arc::new(AtomicBool::new(false));
        let resets = Arc::new(AtomicU64::new(0));
        let period = Arc::new(AtomicU64::new(1));
        let (stopped, every) = (Arc::clone(&stop), Arc::clone(&resets));
        let pause = Arc::clone(&period);
        let run = move || {
            let mut start = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                let (every, since) = (every.load(Ordering::Relaxed), start.elapsed());
                if every > 0 && since > Duration::from_millis(every) {
                    start = Instant::now();
                }
                show(&zone, (start.elapsed().as_secs_f64() * WATTS * 1e6) as u64);
                std::thread::sleep(Duration::from_millis(pause.load(Ordering::Relaxed)));
            }
        };
        Machine {
            root,
            stop,
            resets,
            period,
            thread: Some(std::thread::spawn(run)),
        }
    }

    /// A command that must succeed, on this machine.
    fn json(&self, lab: &Lab, arguments: &[&str]) -> Value {
        let output = lab
            .wattune(&[arguments, &["--json"]].concat())
            .env("WATTUNE_POWERCAP", &self.root)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn train(&self, lab: &Lab, out: &str, keys: &[String]) -> Value {
        self.json(
            lab,
            &[
                &["train", "recipe.toml", "--out", out, "--quiet"],
                &flags(keys)[..],
            ]
            .concat(),
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The part of the machine's processors that this process, and what it starts, may use.
fn share() -> f64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let all = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    (std::thread::available_parallelism().unwrap().get() as f64 / all as f64).min(1.0)
}

/// Sets the counter, so that no reader sees half of it.
fn show(zone: &Path, energy: u64) {
    std::fs::write(zone.join("next"), energy.to_string()).unwrap();
    std::fs::rename(zone.join("next"), zone.join("energy_uj")).unwrap();
}

/// The phases of a report add up to its total, in microjoules.
fn adds_up(report: &Value) {
    let phases: u64 = report["energy"]["by_phase"]
        .as_object()
        .unwrap()
        .values()
        .map(microjoules)
        .sum();
    assert_eq!(phases, microjoules(&report["energy"]["total_j"]));
}

#[test]
fn a_measured_run_gives_its_profile_a_factor() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let report = machine.train(
        &lab,
        "run",
        &set(&["train.steps=8", "energy.meter=measured"]),
    );
    let measured_over_counted = check_reconciliation(&lab, &report);
    let kept = lab.json(&[
        "calibrate",
        "--from-run",
        "run",
        "--name",
        "mine",
        "--out",
        "mine.toml",
    ]);
    let factor = number(&kept, "/measured_over_counted/value");
    assert!((factor - measured_over_counted).abs() < 1e-9);
    let plain = lab.plan(&[]);
    let mine = lab.plan(&set(&["energy.device=./mine.toml"]));
    let ratio = number(&mine, "/energy/total_j") / number(&plain, "/energy/total_j");
    assert!((ratio / factor - 1.0).abs() < 1e-4, "{ratio} of {factor}");
    assert!(
        (number(&mine, "/energy/profile_factor/value") - factor).abs() < 1e-12
            && plain["energy"]["profile_factor"].is_null()
    );
    says(
        word(&mine, "/energy/profile_factor/source"),
        &["in the run run", "rapl (package-0"],
    );
    // A plan is what is executed, also with a factor.
    let executed = lab.train("counted", &set(&["energy.device=./mine.toml"]));
    assert_eq!(
        microjoules(&executed["energy"]["total_j"]),
        microjoules(&mine["energy"]["total_j"])
    );
    let message = lab.refused(
        2,
        &["calibrate", "--from-run", "counted", "--out", "other.toml"],
    );
    says(&message, &["not measured"]);
}

/// The report of `run` compares its counter's joules with the counted ones; returns their ratio.
fn check_reconciliation(lab: &Lab, report: &Value) -> f64 {
    assert_eq!(word(report, "/energy/meter"), "measured");
    adds_up(report);
    let found = &report["energy"]["reconciliation"];
    says(
        word(found, "/measured_by/0"),
        &[
            "rapl (package-0",
            if share() < 1.0 {
                "attributed, not measured"
            } else {
                ")"
            },
        ],
    );
    assert_eq!(found["gaps"].as_array().unwrap().len(), 0);
    // Every joule is the counter's: 20 W over the entries' own time.
    let wall: f64 = lab
        .lines("run/ledger.jsonl")
        .iter()
        .filter_map(|line| line["wall_s"].as_f64())
        .sum();
    let (counted, measured) = (
        number(found, "/all/counted_j"),
        number(found, "/all/measured_j"),
    );
    assert!(
        (measured / (WATTS * share() * wall) - 1.0).abs() < 0.3,
        "{measured} J in {wall} s"
    );
    assert_eq!(
        microjoules(&found["all"]["measured_j"]),
        microjoules(&report["energy"]["total_j"])
    );
    assert!((number(found, "/all/residual_j") - (measured - counted)).abs() < 1e-9);
    let phases = found["by_phase"].as_object().unwrap();
    let sum = |key: &str| {
        phases
            .values()
            .map(|phase| microjoules(&phase[key]))
            .sum::<u64>()
    };
    assert_eq!(sum("counted_j"), microjoules(&found["all"]["counted_j"]));
    let page = String::from_utf8(lab.read("run/report.md")).unwrap();
    says(
        &page,
        &["## Measured vs counted", "Measured by rapl (package-0"],
    );
    measured / counted
}

#[test]
fn a_measured_run_is_held_against_baselines_as_its_counter_would_show_them() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let keys = |meter: &str| {
        set(&[
            "train.steps=8",
            &format!("energy.meter={meter}"),
            "report.requests_per_day=1000",
        ])
    };
    let (measured, counted) = (
        machine.train(&lab, "measured", &keys("measured")),
        machine.train(&lab, "counted", &keys("counted")),
    );
    let times =
        number(&measured, "/energy/total_j") / number(&measured, "/energy/meters/counted_j");
    for (own, other) in measured["baselines"]
        .as_array()
        .unwrap()
        .iter()
        .zip(counted["baselines"].as_array().unwrap())
    {
        // The same steps: the counter multiplies run and baseline alike, and what is dearer by count stays so.
        let ratio = |entry: &Value, key: &str| number(entry, key);
        for key in ["/ratio", "/low_ratio", "/high_ratio"] {
            assert!(
                (ratio(own, key) / ratio(other, key) - 1.0).abs() < 1e-4,
                "{key}: {own} {other}"
            );
        }
        assert!(
            (ratio(own, "/energy_j") / ratio(other, "/energy_j") / times - 1.0).abs() < 1e-4,
            "{own} {other}"
        );
        assert!(
            (ratio(own, "/metered_over_counted") / times - 1.0).abs() < 1e-4
                && other["metered_over_counted"].is_null()
        );
    }
    // What requests save is counted; so is what they pay back.
    let pays = |report: &Value| number(report, "/inference/alternative/pays_after_requests");
    assert!(
        (pays(&measured) - pays(&counted)).abs() <= 1.0,
        "{} {}",
        pays(&measured),
        pays(&counted)
    );
    let page = String::from_utf8(lab.read("measured/report.md")).unwrap();
    says(
        &page,
        &[
            "The measured energy of this run is ",
            "| counted, scaled by ",
            "not with its measured energy",
        ],
    );
}

#[test]
fn the_rate_of_a_measured_run_leaves_out_evaluations_that_it_will_never_reach() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    // What one step and the evaluations before and after it take here.
    let one = machine.train(
        &lab,
        "one",
        &set(&["train.steps=1", "energy.meter=measured"]),
    );
    let phase = |phase: &str| number(&one, &format!("/energy/by_phase/{phase}"));
    assert!(
        number(&one, "/energy/total_j") > 1.5 * number(&one, "/energy/meters/counted_j"),
        "{}",
        one["energy"]
    );
    let budget = phase("load") + 20.0 * (phase("eval") + phase("train") + phase("save"));
    // By count this budget holds thousands of steps, and more evaluations than it could pay for by the counter.
    let keys = [
        "train.steps=4000",
        "train.eval_every=2",
        "energy.meter=measured",
        &format!("budget.energy={budget} J"),
    ];
    let run = machine.train(&lab, "run", &set(&keys));
    assert_eq!(word(&run, "/training/stop_reason"), "budget:energy");
    let rates: Vec<f64> = lab
        .lines("run/steps.jsonl")
        .iter()
        .map(|step| number(step, "/lr"))
        .collect();
    assert!(
        rates[0] > 2.5e-3 && rates.len() > 2,
        "of a peak of 5e-3: {rates:?}"
    );
    // At its end when the budget is, and not before.
    assert!(
        rates.iter().filter(|rate| **rate < 5e-5).count() <= 3,
        "{rates:?}"
    );
}

#[test]
fn a_calibration_asks_the_counter_of_a_machine_that_it_has_to_itself() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let found = machine
        .json(
            &lab,
            &["calibrate", "--each", "100 ms", "--name", "mine", "--quiet"],
        )
        .to_string();
    // Whatever is computed, this machine draws the same: that is measured, or noted where noise made idle power the higher.
    says(
        &found,
        &[if share() < 1.0 {
            "its counter would show all of them"
        } else {
            "rapl (package-0)"
        }],
    );
    let profile = String::from_utf8(lab.read("mine.toml")).unwrap();
    says(&profile, &["threads\""]);
}

#[test]
fn a_counter_that_is_reset_leaves_named_gaps_and_no_zero() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    machine.resets.store(40, Ordering::Relaxed);
    let report = machine.train(
        &lab,
        "run",
        &set(&["train.steps=8", "energy.meter=measured"]),
    );
    adds_up(&report);
    let gaps = report["energy"]["reconciliation"]["gaps"]
        .as_array()
        .unwrap();
    assert!(
        !gaps.is_empty(),
        "a run of more than 40 ms has a reset in it"
    );
    // Before its phase or training was measured, a gap is filled by the measured power.
    let fills = ["counted", "timed"];
    for gap in gaps {
        let estimated = fills.contains(&word(gap, "/filled"));
        assert!(estimated && number(gap, "/energy_j") > 0.0, "{gap}");
        assert!(
            word(gap, "/reason").contains("rapl: ") && number(gap, "/wall_s") > 0.0,
            "{gap}"
        );
    }
    let unmeasured: Vec<Value> = lab
        .lines("run/ledger.jsonl")
        .into_iter()
        .filter(|line| {
            line.pointer("/energy_j/measured")
                .is_some_and(Value::is_null)
        })
        .collect();
    assert!(
        !unmeasured.is_empty()
            && unmeasured
                .iter()
                .all(|line| fills.contains(&word(line, "/gap/filled"))),
        "{unmeasured:?} of {:?}",
        lab.lines("run/ledger.jsonl")
    );
    says(
        &String::from_utf8(lab.read("run/report.md")).unwrap(),
        &["A gap is filled with its counted energy"],
    );
}

#[test]
fn a_counter_that_moves_rarely_is_believed_fully() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    machine.period.store(400, Ordering::Relaxed);
    let keys = set(&["train.steps=60", "energy.meter=measured"]);
    let report = machine.train(&lab, "run", &keys);
    adds_up(&report);
    let found = &report["energy"]["reconciliation"];
    assert_eq!(found["gaps"].as_array().unwrap().len(), 0, "{found}");
    let lines = lab.lines("run/ledger.jsonl");
    let wall: f64 = lines
        .iter()
        .filter_map(|line| line["wall_s"].as_f64())
        .sum();
    let measured = number(&report, "/energy/total_j");
    // To a period at either end.
    let error = (measured - WATTS * share() * wall).abs();
    assert!(error < WATTS * 0.9, "{measured} J in {wall} s");
}

#[test]
fn a_counter_that_stands_still_is_no_measurement() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    machine.stop.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(50));
    let four = lab.plan(&set(&["train.steps=4"]));
    let exact = microjoules(&four["energy"]["total_j"]);
    let budget = format!("budget.energy={} J", exact as f64 / 1e6);
    let keys = set(&["train.steps=50", "energy.meter=auto", &budget]);
    let report = machine.train(&lab, "run", &keys);
    // The counted meter decides, the budget binds, and the report says why.
    assert_eq!(word(&report, "/energy/meter"), "counted");
    assert_eq!(word(&report, "/training/stop_reason"), "budget:energy");
    assert_eq!(report["training"]["steps"], 4);
    assert!(report["energy"]["meters"]["measured_j"].is_null());
    says(
        word(&report, "/energy/measured_absent/reason"),
        &["package-0", "stands still"],
    );
    says(
        word(&report, "/warnings/0"),
        &["energy is counted, not measured", "stands still"],
    );
    let asked = [
        "train",
        "recipe.toml",
        "--out",
        "none",
        "--set",
        "energy.meter=measured",
    ];
    let refused = lab
        .wattune(&asked)
        .env("WATTUNE_POWERCAP", &machine.root)
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    says(
        &String::from_utf8(refused.stderr).unwrap(),
        &[
            "energy cannot be measured here",
            "stands still",
            "meter = \"counted\"",
        ],
    );
}
