//! Counted budgets bind to the microjoule, and what `plan` forecasts is what `train` executes.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;

use super::lab::{Lab, flags, microjoules, number, says, set, word};

/// The forecast and the report, key by key: equal, not close.
fn assert_executed_as_planned(plan: &Value, report: &Value) {
    let keys = [
        "/training/steps",
        "/training/stop_reason",
        "/training/tokens",
        "/training/loss_tokens",
        "/energy/flops",
        "/energy/bytes_by_level",
        "/energy/total_j",
        "/energy/by_phase",
        "/carbon/gco2e",
        "/adapter/trainable_parameters",
    ];
    for key in keys {
        let (planned, executed) = (plan.pointer(key), report.pointer(key));
        assert!(
            planned.is_some() && planned == executed,
            "{key}: planned {planned:?}, executed {executed:?}"
        );
    }
}

/// Energy, carbon and FLOPs spent lie within their limits.
fn assert_within(report: &Value) {
    for key in ["energy_j", "carbon_gco2e", "flops"] {
        if let Some(limit) = report
            .pointer(&format!("/budget/limits/{key}"))
            .and_then(Value::as_f64)
        {
            let spent = number(report, &format!("/budget/spent/{key}"));
            assert!(spent <= limit, "{key}: {spent} of {limit}");
        }
    }
    assert_eq!(number(report, "/budget/overshoot_j"), 0.0);
}

/// Plans and trains with these keys; the run ends by `reason`, as planned, within its budget.
fn run(lab: &Lab, out: &str, keys: &[String], reason: &str) -> Value {
    let plan = lab.plan(keys);
    let report = lab.train(out, keys);
    assert_eq!(word(&report, "/training/stop_reason"), reason);
    assert_executed_as_planned(&plan, &report);
    assert_within(&report);
    // The ledger's lines add up to the report's total.
    assert_eq!(lab.ledger(out), microjoules(&report["energy"]["total_j"]));
    // The last step's line carries the last validation loss, whether a checkpoint came between or not.
    let steps = lab.lines(&format!("{out}/steps.jsonl"));
    assert_eq!(
        steps.last().unwrap()["val_loss"],
        report["training"]["val_loss_after"]
    );
    assert_eq!(
        steps.len() as u64,
        report["training"]["steps"].as_u64().unwrap()
    );
    report
}

#[test]
fn an_energy_budget_binds_to_the_microjoule() {
    let lab = Lab::new();
    let four = lab.plan(&set(&["train.steps=4"]));
    let exact = microjoules(&four["energy"]["total_j"]);
    let with = |microjoules: u64| {
        set(&[
            "train.steps=50",
            &format!("budget.energy={} J", microjoules as f64 / 1e6),
        ])
    };
    let report = run(&lab, "exact", &with(exact), "budget:energy");
    // Room for four steps and what goes with them: four are done, and nothing is left.
    assert_eq!(report["training"]["steps"], 4);
    assert_eq!(microjoules(&report["budget"]["spent"]["energy_j"]), exact);
    // One microjoule less holds three.
    let report = run(&lab, "less", &with(exact - 1), "budget:energy");
    assert_eq!(report["training"]["steps"], 3);
    assert!(microjoules(&report["budget"]["spent"]["energy_j"]) < exact);
    assert_eq!(lab.lines("less/steps.jsonl").len(), 3);
    // What the run left is whole.
    assert!(lab.adapter("less").len() > 8 * 1024);
    let config: Value =
        serde_json::from_slice(&lab.read("less/adapter/adapter_config.json")).unwrap();
    assert_eq!(
        (config["r"].as_u64(), config["lora_alpha"].as_f64()),
        (Some(2), Some(6.0))
    );
    for file in [
        "recipe.toml",
        "plan.json",
        "report.json",
        "report.md",
        "emissions.csv",
        "adapter/README.md",
        "adapter/tokenizer.json",
    ] {
        assert!(!lab.read(&format!("less/{file}")).is_empty(), "{file}");
    }
}

#[test]
fn a_report_holds_every_key_of_the_contract() {
    let lab = Lab::new();
    let report = lab.train("run", &set(&["train.steps=2", "budget.energy=5 Wh"]));
    let keys = [
        ("model", "id revision architecture parameters"),
        (
            "adapter",
            "type r lora_alpha target_modules trainable_parameters",
        ),
        ("data", "examples tokens loss_tokens truncated dropped"),
        (
            "training",
            "steps stop_reason val_loss_before val_loss_after train_loss_last tokens_per_second wall_s peak_rss_bytes",
        ),
        ("energy", "meter total_j by_phase meters flops bytes device"),
        ("energy/meters", "counted_j measured_j timed_j"),
        ("budget", "limits spent overshoot_j"),
        ("carbon", "gco2e grid gco2e_per_kwh pue"),
        (
            "baselines/0",
            "kind label flops energy_j gco2e ratio source",
        ),
        ("environment", "version cpu threads os"),
    ];
    for (block, names) in keys {
        for name in names.split(' ') {
            assert!(
                report.pointer(&format!("/{block}/{name}")).is_some(),
                "{block}.{name}"
            );
        }
    }
    let file: Value = serde_json::from_slice(&lab.read("run/report.json")).unwrap();
    assert_eq!(file, report);
    let line = &lab.lines("run/steps.jsonl")[0];
    for name in [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "loss_tokens",
        "flops",
        "energy_j",
        "wall_s",
    ] {
        assert!(line.get(name).is_some(), "steps.jsonl: {name}");
    }
    // Before and after, by the same 3 records: the loss fell.
    assert!(
        number(&report, "/training/val_loss_after") < number(&report, "/training/val_loss_before")
    );
}

#[test]
fn runs_that_end_by_steps_or_epochs_execute_their_plan() {
    let lab = Lab::new();
    let every = set(&[
        "train.steps=5",
        "train.eval_every=2",
        "train.save_every=3",
        "train.keep_best=false",
    ]);
    let report = run(&lab, "steps", &every, "steps");
    // Evaluations before, after 2 and 4, and at the end; validation losses stand in the steps' lines.
    let losses: Vec<u64> = lab
        .lines("steps/steps.jsonl")
        .iter()
        .filter(|l| l.get("val_loss").is_some())
        .map(|l| l["step"].as_u64().unwrap())
        .collect();
    assert_eq!(losses, [2, 4, 5]);
    assert!(
        lab.path("steps")
            .join(word(&report, "/training/best/path"))
            .is_dir()
    );
    // A quarter of 12 steps an epoch.
    lab.edit("steps = 4\n", "epochs = 0.25\n");
    let report = run(&lab, "epochs", &set(&["train.eval_every=1"]), "epochs");
    assert_eq!(
        (
            report["training"]["steps"].as_u64(),
            number(&report, "/training/epochs")
        ),
        (Some(3), 0.25)
    );
    lab.edit("r = 2\nlora_alpha = 6\n", "type = \"none\"\n");
    let report = run(&lab, "full", &[], "epochs");
    assert_eq!(
        report["adapter"]["trainable_parameters"],
        report["model"]["parameters"]
    );
}

#[test]
fn a_best_checkpoint_is_named_only_if_it_was_kept() {
    let lab = Lab::new();
    // The rate rises from 0 to far too much: the last loss is not the best, and without keep_best only it is saved.
    let keys = [
        "train.steps=3",
        "train.warmup_steps=2",
        "train.learning_rate=0.5",
        "train.eval_every=1",
    ];
    let report = lab.train("kept", &set(&keys));
    let best = word(&report, "/training/best/path");
    assert!(
        best != "checkpoints/step-000003" && lab.path("kept").join(best).is_dir(),
        "{best}"
    );
    let report = lab.train(
        "unkept",
        &set(&[&keys[..], &["train.keep_best=false"]].concat()),
    );
    assert!(
        report["training"].get("best").is_none_or(Value::is_null),
        "{}",
        report["training"]
    );
}

#[test]
fn carbon_and_flop_budgets_bind_where_the_plan_says() {
    let lab = Lab::new();
    let whole = lab.plan(&set(&["train.steps=6"]));
    let carbon = format!("budget.carbon={} g", 0.7 * number(&whole, "/carbon/gco2e"));
    let report = run(
        &lab,
        "carbon",
        &set(&["train.steps=6", "train.eval_every=2", &carbon]),
        "budget:carbon",
    );
    assert!((1..6).contains(&report["training"]["steps"].as_u64().unwrap()));
    let flops = format!("budget.flops={}", 0.7 * number(&whole, "/energy/flops"));
    let report = run(
        &lab,
        "flops",
        &set(&["train.steps=6", "train.save_every=1", &flops]),
        "budget:flops",
    );
    assert!((1..6).contains(&report["training"]["steps"].as_u64().unwrap()));
    // The rate follows what may be spent, not the six steps: after the last step that fits it is nearly at its end.
    let rates: Vec<f64> = lab
        .lines("flops/steps.jsonl")
        .iter()
        .map(|line| number(line, "/lr"))
        .collect();
    assert!(rates.is_sorted_by(|a, b| a > b), "{rates:?}");
    let steps = rates.len() as f64;
    assert!(
        rates[rates.len() - 1] < 5e-3 * (1.0 - (steps - 1.0) / 6.0),
        "{rates:?}"
    );
}

#[test]
fn a_budget_alone_says_how_long_to_train() {
    let lab = Lab::new();
    let six = lab.plan(&set(&["train.steps=6"]));
    let exact = microjoules(&six["energy"]["total_j"]);
    lab.edit("steps = 4\n", "");
    lab.edit("warmup_steps = 0\n", "warmup_steps = 2\n");
    let keys = set(&[&format!("budget.energy={} J", exact as f64 / 1e6)]);
    let report = run(&lab, "run", &keys, "budget:energy");
    assert_eq!(report["training"]["steps"], 6);
    let check = [&["recipe", "check", "recipe.toml"][..], &flags(&keys)].concat();
    let check = String::from_utf8(lab.output(&check).stdout).unwrap();
    says(&check, &["Steps: 6 (energy budget)"]);
    // The rate rises over two of the six steps, and falls to its end.
    let lines = lab.lines("run/steps.jsonl");
    let rates: Vec<f64> = lines.iter().map(|line| number(line, "/lr")).collect();
    assert!(rates[0] < rates[1] && rates[2] > rates[5], "{rates:?}");
    assert!(rates[5] < 1e-3, "of a peak of 5e-3: {rates:?}");
    let message = lab.refused(2, &["train", "recipe.toml", "--out", "none"]);
    says(
        &message,
        &[
            "`train.steps` or `train.epochs` is missing",
            "or a limit in [budget]",
        ],
    );
}

#[test]
fn a_time_budget_that_holds_no_step_is_refused() {
    let lab = Lab::new();
    // Enough for a step as counted, not for starting the program.
    let one = lab.plan(&set(&["train.steps=1"]));
    let seconds = 1.01 * number(&one, "/forecast/wall_s");
    let time = format!("budget.time={seconds} s");
    let keys = set(&["train.steps=500", &time]);
    let arguments = [&["train", "recipe.toml", "--out", "run"][..], &flags(&keys)].concat();
    let message = lab.refused(2, &arguments);
    says(
        &message,
        &[
            "the time budget cannot hold one step",
            "budget.time",
            "hint: raise the budget",
        ],
    );
    assert!(!lab.path("run/report.json").exists());
    let message = lab.refused(2, &["train", "--resume", "run"]);
    says(&message, &["no room left"]);
}

#[test]
fn a_limit_that_is_too_small_is_answered_in_its_own_unit() {
    let lab = Lab::new();
    let cases = [
        (vec!["budget.carbon=1 ug"], "CO2e on the counted meter"),
        (vec!["budget.energy=1 uJ"], "J on the counted meter"),
        (vec!["budget.flops=1000"], "FLOP on the counted meter"),
        (
            vec!["budget.cost=1e-12 EUR", "energy.price=0.3 EUR/kWh"],
            "EUR on the counted meter",
        ),
    ];
    for (keys, unit) in cases {
        let keys = set(&keys);
        let arguments = [
            &["train", "recipe.toml", "--out", "run"][..],
            &flags(&keys)[..],
        ]
        .concat();
        says(&lab.refused(2, &arguments), &["cannot hold one step", unit]);
    }
}

/// The bound of the time is one on this machine, for one thread and for two.
#[test]
fn a_run_takes_no_less_than_its_least_time() {
    let lab = Lab::new();
    for threads in ["1", "2"] {
        let keys = set(&["train.steps=6", "energy.device=auto"]);
        let arguments = [&["--threads", threads][..], &flags(&keys)].concat();
        let plan = lab.json(&[&["plan", "recipe.toml"][..], &arguments].concat());
        let out = format!("run-{threads}");
        let train = ["train", "recipe.toml", "--quiet", "--out", &out];
        let report = lab.json(&[&train[..], &arguments].concat());
        let least = number(&plan, "/forecast/least_s");
        let wall = number(&report, "/training/wall_s");
        assert!(least > 0.0 && least <= wall, "{threads}: {least} of {wall}");
        assert!(least <= number(&plan, "/forecast/wall_s"));
        let device = word(&plan, "/energy/device");
        let cores: usize = device
            .split('@')
            .nth(1)
            .map_or(1, |cores| cores.parse().unwrap());
        assert!(cores <= threads.parse().unwrap(), "{device}");
    }
}

/// Keys of a random small run, and which counted budget at which part of the unlimited run.
fn anything() -> impl Strategy<Value = (Vec<String>, Option<&'static str>, f64)> {
    let sizes = (1..4u32, 1..7u32, 1..4u32, 1..3u32, 0..4u32, 0..4u32);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), 0..6usize);
    let budget = (
        proptest::sample::select(vec![None, Some("energy"), Some("carbon"), Some("flops")]),
        0.05..1.2f64,
    );
    (sizes, flags, budget).prop_map(
        |(
            (r, steps, rows, accumulated, eval, save),
            (best, packing, dropout, again),
            (kind, part),
        )| {
            let keys = set(&[
                &format!("adapter.r={r}"),
                &format!("train.steps={steps}"),
                &format!("train.micro_batch_size={rows}"),
                &format!("train.gradient_accumulation_steps={accumulated}"),
                &format!("train.eval_every={eval}"),
                &format!("train.save_every={save}"),
                &format!("train.keep_best={best}"),
                &format!("data.packing={packing}"),
                &format!("adapter.lora_dropout={}", if dropout { 0.1 } else { 0.0 }),
                &format!(
                    "train.activation_checkpointing={}",
                    ["never", "0", "1", "3", "4", "always"][again]
                ),
            ]);
            (keys, kind, part)
        },
    )
}

#[test]
fn no_recipe_passes_a_counted_budget_or_leaves_its_plan() {
    let lab = Lab::new();
    lab.records("validation.jsonl", "recipes/quickstart/validation.jsonl", 1);
    let config = Config {
        cases: 12,
        failure_persistence: None,
        max_shrink_iters: 8,
        ..Config::default()
    };
    let (case, bound, refused) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let checked = runner.run(&anything(), |(mut keys, kind, part)| {
        case.set(case.get() + 1);
        let free = lab.plan(&keys);
        if let Some(kind) = kind {
            let (pointer, unit) = match kind {
                "energy" => ("/energy/total_j", " J"),
                "carbon" => ("/carbon/gco2e", " g"),
                _ => ("/energy/flops", ""),
            };
            keys.push(format!(
                "budget.{kind}={}{unit}",
                part * number(&free, pointer)
            ));
        }
        let plan = lab.plan(&keys);
        let out = format!("run-{}", case.get());
        let arguments = [
            &["train", "recipe.toml", "--out", &out, "--quiet"],
            &flags(&keys)[..],
        ]
        .concat();
        if plan["training"]["steps"] == 0 {
            let message = lab.refused(2, &arguments);
            says(&message, &["the budget cannot hold one step", "hint:"]);
            assert!(!lab.path(&out).exists());
            refused.set(refused.get() + 1);
            return Ok(());
        }
        let report = lab.json(&arguments);
        assert_executed_as_planned(&plan, &report);
        assert_within(&report);
        bound.set(
            bound.get()
                + usize::from(word(&report, "/training/stop_reason").starts_with("budget:")),
        );
        Ok(())
    });
    checked.unwrap();
    // The cases are always the same: some of each kind are among them.
    assert!(
        bound.get() > 0 && refused.get() > 0,
        "{bound:?} bound, {refused:?} refused of {case:?}"
    );
}
