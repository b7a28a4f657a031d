//! Estimates held against published training runs, and the command that prints them.
//!
//! The expected figures are the sources' own (src/forecast/published_runs.csv, made by scripts/published_runs.py). Three classes: where
//! FLOP/s and mean power are published; where device hours and power are; and where FLOPs and the device's name must suffice.

use assert_cmd::Command;
use serde_json::Value;
use wattune::forecast::accelerator::Power;
use wattune::forecast::training_cost::estimate;
use wattune::forecast::{Accelerator, PublishedRun, TrainingJob};
use wattune::units::{Joules, Pue};

fn sound() -> impl Iterator<Item = &'static PublishedRun> {
    PublishedRun::all()
        .iter()
        .filter(|run| run.inconsistent.is_empty())
}

fn run(arguments: &[&str]) -> std::process::Output {
    Command::cargo_bin("wattune")
        .unwrap()
        .arg("baseline")
        .args(arguments)
        .output()
        .unwrap()
}

/// The document of a command that must succeed.
fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The message of a command that must be refused before it ran.
fn refusal(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(2), 0),
        "{arguments:?}"
    );
    String::from_utf8(output.stderr).unwrap()
}

fn figure(document: &Value, path: &str) -> f64 {
    document
        .pointer(path)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{path} in {document}"))
}

fn off(value: f64, expected: f64) -> f64 {
    (value / expected - 1.0).abs()
}

#[test]
fn flops_achieved_rate_and_power_give_published_energy_within_one_percent() {
    // Patterson et al. 2021, table 4 (arXiv:2104.10350): FLOPs, TFLOP/s, watts, PUE, gCO2e/kWh -> MWh, tCO2e.
    let rows = [
        (
            "Evolved Transformer NAS",
            "2.91e21 tpu-v2 24.8 208 1.10 431",
            7.5,
            3.2,
        ),
        ("T5-11B", "4.05e22 tpu-v3 45.6 310 1.12 545", 85.7, 46.7),
        ("Meena", "1.12e23 tpu-v3 42.3 289 1.09 415", 232.0, 96.4),
        ("GShard-600B", "1.33e22 tpu-v3 48.0 288 1.09 177", 24.1, 4.3),
        (
            "Switch Transformer 1.5T",
            "8.22e22 tpu-v3 34.4 245 1.10 330",
            179.0,
            59.1,
        ),
        (
            "GPT-3 175B",
            "3.14e23 nvidia-v100-sxm2 24.6 330 1.10 429",
            1287.0,
            552.1,
        ),
    ];
    let flags = [
        "--flops",
        "--device",
        "--achieved-tflops",
        "--power",
        "--pue",
        "--grid",
    ];
    for (name, values, mwh, tonnes) in rows {
        let typed: Vec<&str> = flags
            .into_iter()
            .zip(values.split(' '))
            .flat_map(|(flag, value)| [flag, value])
            .collect();
        for document in [json(&typed), json(&[name])] {
            assert!(
                off(figure(&document, "/energy_mwh/central"), mwh) < 0.01,
                "{name}: {document}"
            );
            assert!(
                off(figure(&document, "/tco2e/central"), tonnes) < 0.015,
                "{name}: {document}"
            );
            assert_eq!(
                document["energy_mwh"]["low"],
                document["energy_mwh"]["high"]
            );
        }
    }
}

#[test]
fn device_hours_and_power_give_published_energy_within_one_percent() {
    let mut checked = 0;
    for run in sound() {
        let (Some(time), Some(power), Some(published)) = (run.device_time, run.power_w, run.energy)
        else {
            continue;
        };
        let pue = if run.energy_has_pue == Some(true) {
            run.pue
        } else {
            Some(Pue::ONE)
        };
        let job = TrainingJob {
            device_time: Some(time),
            power: Some(Power::exact(power, "published")),
            pue,
            ..TrainingJob::default()
        };
        let energy = estimate(job).unwrap().energy.central;
        assert!(
            off(energy.0, published.0) < 0.01,
            "{}: {energy}, published {published}",
            run.name
        );
        checked += 1;
    }
    // Six of Patterson, seven of LLaMA and BLOOM, seven of Zeus.
    assert_eq!(checked, 20);
}

#[test]
fn published_energy_and_grid_give_published_carbon_with_the_overhead_counted_once() {
    let mut checked = 0;
    for run in sound() {
        let (Some(grid), Some(published), Some(energy)) =
            (run.gco2e_per_kwh, run.carbon, run.energy)
        else {
            continue;
        };
        let overhead = run.pue.map_or(1.0, Pue::value);
        let scope = |has: Option<bool>| if has == Some(true) { overhead } else { 1.0 };
        let facility = Joules(energy.0 / scope(run.energy_has_pue) * scope(run.tco2e_has_pue));
        assert!(
            off((grid * facility).0, published.0) < 0.015,
            "{}: {}",
            run.name,
            grid * facility
        );
        checked += 1;
    }
    assert_eq!(checked, 15);
}

#[test]
fn flops_and_a_device_suffice_for_an_interval_that_holds_the_published_energy() {
    let (mut held, mut errors) = (0, Vec::new());
    for run in sound() {
        // The machines' own energy: as published without overhead, else hours times the published power.
        let with_pue = run.energy_has_pue == Some(true);
        let machines = run.energy.map(|energy| {
            if with_pue {
                energy / run.pue.unwrap().value()
            } else {
                energy
            }
        });
        let by_hours = run
            .device_time
            .zip(run.power_w)
            .map(|(time, power)| power * time);
        let (Some(flops), Some(published)) = (run.flops, machines.or(by_hours)) else {
            continue;
        };
        let device = Some(Accelerator::named(&run.device).unwrap());
        // By its name the run's own hours are left out of the shares it is estimated by.
        let job = TrainingJob {
            published_name: Some(run.name.clone()),
            flops: Some(flops),
            device,
            pue: Some(Pue::ONE),
            ..TrainingJob::default()
        };
        let energy = estimate(job).unwrap().energy;
        let within = energy.low <= published && published <= energy.high;
        held += usize::from(within);
        errors.push(off(energy.central.0, published.0));
        eprintln!(
            "{:<32} {:>6.1} % {}",
            run.name,
            100.0 * (energy.central / published - 1.0),
            if within { "" } else { "outside" }
        );
    }
    errors.sort_by(f64::total_cmp);
    let median = errors[errors.len() / 2];
    eprintln!(
        "{held} of {} within, median error {:.1} %",
        errors.len(),
        100.0 * median
    );
    assert!(
        errors.len() >= 20 && held * 10 >= errors.len() * 8,
        "{held} of {}",
        errors.len()
    );
    assert!(median < 0.25, "{median}");
}

#[test]
fn both_figures_of_gpt_3_are_explained() {
    let document = json(&["gpt-3"]);
    let remark = document["published"]["remark"].as_str().unwrap();
    assert!(
        remark.contains("552.1") && remark.contains("502") && remark.contains("once"),
        "{remark}"
    );
    // The overhead leaves with `--pue 1`: 552.1 / 1.10 = 501.9.
    assert!(
        off(
            figure(&json(&["gpt-3", "--pue", "1"]), "/tco2e/central"),
            502.0
        ) < 0.002
    );
    let restated = json(&["GPT-3 175B (as restated)"]);
    assert!(
        off(figure(&restated, "/tco2e/central"), 552.1) < 0.002
            && off(figure(&restated, "/energy_mwh/central"), 1287.0) < 1e-9
    );
    assert_eq!(figure(&restated, "/published/tco2e"), 502.0);
}

#[test]
fn every_published_run_is_told_or_refused_with_the_reason() {
    for row in PublishedRun::all() {
        let output = run(&[&row.name, "--json"]);
        let message = String::from_utf8(output.stderr).unwrap();
        let known = row.energy.is_some()
            || (!row.device.is_empty() && (row.device_time.is_some() || row.flops.is_some()));
        if row.inconsistent.is_empty() && known {
            assert!(output.status.success(), "{}: {message}", row.name);
            let document: Value = serde_json::from_slice(&output.stdout).unwrap();
            for block in ["energy_mwh", "tco2e"] {
                let end = |end: &str| figure(&document, &format!("/{block}/{end}"));
                assert!(
                    0.0 < end("low")
                        && end("low") <= end("central")
                        && end("central") <= end("high"),
                    "{document}"
                );
            }
        } else {
            assert_eq!(output.status.code(), Some(2), "{}", row.name);
            assert!(message.contains("hint:"), "{message}");
        }
    }
    let message = refusal(&["llama-3.3-70b"]);
    assert!(
        message.contains("12.9 tCO2e") && message.contains("rule:") && message.contains("hint:"),
        "{message}"
    );
    assert!(refusal(&["gtp-3"]).contains("`GPT-3 175B`"));
}

#[test]
fn what_is_typed_replaces_what_was_published_or_assumed() {
    // LLaMA-7B (arXiv:2302.13971, table 15): 82432 h x 400 W x 1.1 = 36.27 MWh; x 385 g/kWh = 13.96 t; at 44.2 g/kWh 1.603 t.
    let llama = json(&["llama-7b", "--power", "400"]);
    assert!(
        off(figure(&llama, "/energy_mwh/central"), 36.27) < 1e-4
            && off(figure(&llama, "/tco2e/central"), 13.964) < 1e-3
    );
    assert!(
        off(
            figure(
                &json(&["llama-7b", "--power", "400 W", "--grid", "44.2"]),
                "/tco2e/central"
            ),
            1.6031
        ) < 1e-3
    );
    let by_hours = json(&[
        "--hours", "82432", "--power", "0.4 kW", "--pue", "1.1", "--grid", "385", "--count", "2048",
    ]);
    assert_eq!(by_hours["energy_mwh"], llama["energy_mwh"]);
    assert_eq!(figure(&by_hours, "/device_hours/central"), 82432.0);
    assert_eq!(figure(&by_hours, "/wall_hours/central"), 40.25);
    // The same work on another device is another energy, and says so.
    let moved = json(&["gpt-3", "--device", "nvidia-h100-sxm5-80gb"]);
    assert!(figure(&moved, "/energy_mwh/central") < 500.0 && figure(&moved, "/flops") == 3.14e23);
    assert!(
        moved["assumptions"][1]
            .as_str()
            .unwrap()
            .contains("instead of its own device"),
        "{moved}"
    );
    // 4ND over 6ND.
    let cost = |method: &str| {
        json(&[
            "--params",
            "7B",
            "--tokens",
            "2M",
            "--method",
            method,
            "--device",
            "nvidia-a10",
        ])
    };
    let ratio = figure(&cost("lora"), "/energy_mwh/central")
        / figure(&cost("full_fine_tuning"), "/energy_mwh/central");
    assert!(off(ratio, 4.0 / 6.0) < 1e-9);
    assert_eq!(figure(&cost("lora"), "/flops"), 5.6e16);
    // 20 tokens a parameter: 6 x 1e9 x 20e9.
    assert!(
        off(
            figure(
                &json(&["--params", "1e9", "--device", "nvidia-t4"]),
                "/flops"
            ),
            1.2e20
        ) < 1e-12
    );
}

#[test]
fn what_cannot_be_is_refused_with_value_rule_and_remedy() {
    let refused: [(&[&str], &[&str]); 11] = [
        (
            &["--params", "seven", "--device", "nvidia-t4"],
            &["`--params`", "seven", "175B"],
        ),
        (
            &["--params", "-7B", "--device", "nvidia-t4"],
            &["`--params`", "-7B"],
        ),
        (
            &["--params", "7B", "--tokens", "0", "--device", "nvidia-t4"],
            &["`--tokens`", "more than zero"],
        ),
        (
            &["--params", "7B", "--device", "nvidia-a100"],
            &["--device", "nvidia-a100-sxm4-80gb"],
        ),
        (
            &[
                "--params",
                "7B",
                "--method",
                "lora",
                "--device",
                "nvidia-t4",
            ],
            &["`--tokens D`"],
        ),
        (&["--params", "7B"], &["`--device NAME`"]),
        (&[], &["`--params N`", "wattune baseline gpt-3"]),
        (
            &["--hours", "1", "--power", "400", "--pue", "0.9"],
            &["`--pue`", "0.9", "one or more"],
        ),
        (
            &["--hours", "1", "--power", "400", "--grid", "Germny"],
            &["--grid", "`germany`"],
        ),
        (
            &["--flops", "1e23", "--hours", "1", "--device", "nvidia-t4"],
            &["65 TFLOP/s", "added up over all devices"],
        ),
        (
            &["--hours", "1", "--power", "400", "--count", "1.5"],
            &["`--count`", "whole number"],
        ),
    ];
    for (arguments, words) in refused {
        let message = refusal(arguments);
        for word in words.iter().chain(&["hint:"]) {
            assert!(
                message.contains(word),
                "{arguments:?}: no `{word}` in {message}"
            );
        }
    }
}

#[test]
fn the_page_names_device_hours_and_assumptions() {
    let page = String::from_utf8(run(&["llama-2-7b"]).stdout).unwrap();
    for word in [
        "device hours  184,320",
        "31.22 tCO2e",
        "range ",
        "Assumptions:",
        "PUE: 1.1",
        "2307.09288",
    ] {
        assert!(page.contains(word), "no `{word}` in {page}");
    }
    assert!(!page.to_lowercase().contains("gpu hours"));
}
