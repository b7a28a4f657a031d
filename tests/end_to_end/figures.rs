//! The figures of a real run: what its joules went into, how far they may be off, what its place and device add.

use serde_json::Value;

use super::lab::{Lab, flags, microjoules, number, says, set, word};

/// `a` and `b` agree to a millionth.
fn close(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-6
}

/// A cloud's accelerator in the Emirates, at a price: everything a report can show.
fn keys() -> Vec<String> {
    set(&[
        "train.steps=3",
        "energy.device=nvidia-h100-sxm5-80gb",
        "energy.grid=aws:me-central-1",
        "energy.pue=1.5",
        "energy.price=0.30 USD/kWh",
    ])
}

fn parts(report: &Value) -> [f64; 3] {
    ["arithmetic_j", "movement_j", "idle_j"]
        .map(|part| number(report, &format!("/energy/counted_parts/{part}")))
}

#[test]
fn a_run_says_what_its_joules_went_into() {
    let lab = Lab::new();
    let (plan, report) = (lab.plan(&keys()), lab.train("run", &keys()));
    // Each entry is rounded to a microjoule.
    let entries = lab
        .lines("run/ledger.jsonl")
        .iter()
        .filter(|line| line.get("phase").is_some())
        .count();
    let off = parts(&report).iter().sum::<f64>() - number(&report, "/energy/meters/counted_j");
    assert!(
        off.abs() <= entries as f64 * 0.5e-6 + 1e-12,
        "{off} of {entries} entries"
    );
    for (planned, executed) in parts(&plan).into_iter().zip(parts(&report)) {
        assert!(
            close(planned, executed),
            "planned {planned}, executed {executed}"
        );
    }
    // The profile's 200 pJ a streamed byte; the L2's is not known.
    let dram = number(&report, "/energy/bytes_by_level/dram");
    assert!(close(
        number(&report, "/energy/counted_parts/movement_by_level_j/dram"),
        dram * 200e-12
    ));
    assert!(close(parts(&report)[1], dram * 200e-12));
    assert_eq!(
        report["energy"]["counted_parts"]["levels_left_out"],
        serde_json::json!(["L2"])
    );
    assert_eq!(number(&report, "/energy/counted_parts/lost_j"), 0.0);
    // f32: two operands of 4 bytes for each two operations, and results and sweeps on top.
    let fetched = number(&report, "/energy/flops") * 4.0 * 200e-12;
    let without = number(&report, "/energy/counted_parts/movement_without_reuse_j");
    assert!(
        without > fetched && without < 1.5 * fetched,
        "{without} against {fetched}"
    );
    let page = String::from_utf8(lab.read("run/report.md")).unwrap();
    assert!(
        page.contains("| data movement, main memory (DRAM) |")
            && page.contains("Not shown apart: L2 cache."),
        "{page}"
    );
}

#[test]
fn bounds_are_carried_to_carbon_money_and_ratios() {
    let lab = Lab::new();
    let report = lab.train("run", &keys());
    let total = number(&report, "/energy/total_j");
    assert!(
        close(number(&report, "/energy/low_j"), total / 1.37)
            && close(number(&report, "/energy/high_j"), total * 1.37)
    );
    // 467.51 g/kWh in 2024 (Our World in Data), PUE 1.5; the table has no range of years for the place.
    let grams = |joules: f64| joules / 3.6e6 * 1.5 * 467.51;
    assert!(close(number(&report, "/carbon/gco2e"), grams(total)));
    assert!(close(
        number(&report, "/carbon/low_gco2e"),
        grams(total / 1.37)
    ));
    assert!(close(
        number(&report, "/budget/spent_high/carbon_gco2e"),
        grams(total * 1.37)
    ));
    let dollars = |joules: f64| joules / 3.6e6 * 1.5 * 0.30;
    assert!(close(
        number(&report, "/budget/spent/cost/amount"),
        dollars(total)
    ));
    assert!(close(
        number(&report, "/budget/spent_low/cost/amount"),
        dollars(total / 1.37)
    ));
    for baseline in report["baselines"].as_array().unwrap() {
        let of = |key: &str| number(baseline, key);
        assert!(
            close(of("/high_j"), of("/energy_j") * 1.37)
                && close(of("/low_gco2e"), of("/gco2e") / 1.37),
            "{baseline}"
        );
        // The same profile charges both: the ratio is surer than two independent errors would leave it.
        assert!(
            of("/low_ratio") <= of("/ratio") && of("/ratio") <= of("/high_ratio"),
            "{baseline}"
        );
        assert!(
            of("/high_ratio") / of("/low_ratio") < 1.37_f64.powi(4),
            "{baseline}"
        );
    }
}

#[test]
fn a_plan_shows_the_bounds_and_what_the_profile_leaves_out() {
    let lab = Lab::new();
    let plan = lab.plan(&keys());
    let report = lab.train("run", &keys());
    let output = lab.output(&[&["plan", "recipe.toml"], &flags(&keys())[..]].concat());
    let page = String::from_utf8(output.stdout).unwrap();
    let carbon = |end: &str| {
        wattune::units::GramsCo2e(number(&report, &format!("/carbon/{end}_gco2e"))).to_string()
    };
    let ratio = |end: &str| {
        format!(
            "{:.2}",
            number(&report, &format!("/baselines/0/{end}_ratio"))
        )
    };
    let grams = wattune::report::format::span(&carbon("low"), &carbon("high"));
    let bounds = [
        format!("on the grid aws:me-central-1, range {grams}"),
        format!("times, range {} to {})", ratio("low"), ratio("high")),
    ];
    says(&page, &bounds.each_ref().map(String::as_str));
    // What an accelerator's machine takes beside it is said, not hidden.
    let factors = report["energy"]["factors"].as_array().unwrap();
    let host = factors
        .iter()
        .find(|factor| factor["name"] == "the machine around the device")
        .unwrap();
    says(
        word(host, "/value"),
        &[
            "not in the counted figures: 30 % of a machine's power, with it they are 1.429 times as much",
        ],
    );
    says(word(host, "/source"), &["Dodge et al. 2022"]);
    assert_eq!(
        [
            &plan["energy"]["host_left_out"],
            &report["energy"]["host_left_out"]
        ],
        [&serde_json::json!({ "share": 0.3 }); 2]
    );
    says(
        &page,
        &["host machine not included: 30.0 % of the machine's power"],
    );
    assert!(
        lab.plan(&[])["energy"]["host_left_out"].is_null(),
        "a processor's profile is its machine"
    );
    let peak = factors
        .iter()
        .find(|factor| factor["name"] == "peak rate")
        .unwrap();
    says(
        word(peak, "/value"),
        &["TFLOP/s in f32, ", "TFLOP/s in bf16"],
    );
}

#[test]
fn embodied_carbon_and_the_cloud_region_are_reported() {
    let lab = Lab::new();
    let report = lab.train("run", &keys());
    // 164 kg (EcoLogits) over three years of 365.25 days.
    let share = 164_000.0 * number(&report, "/training/wall_s") / (3.0 * 365.25 * 86_400.0);
    assert!(close(number(&report, "/carbon/embodied_gco2e"), share));
    assert!(word(&report, "/carbon/embodied_source").contains("EcoLogits"));
    assert_eq!(
        (
            word(&report, "/carbon/grid"),
            number(&report, "/carbon/year")
        ),
        ("aws:me-central-1", 2024.0)
    );
    assert_eq!(word(&report, "/carbon/dataset_sha256").len(), 64);
    let csv = String::from_utf8(lab.read("run/emissions.csv")).unwrap();
    assert!(csv.contains(",aws,me-central-1,"), "{csv}");
}

#[test]
fn assumed_powers_are_marked_where_devices_are_listed() {
    let lab = Lab::new();
    let list = String::from_utf8(lab.output(&["devices"]).stdout).unwrap();
    let row = |name: &str| {
        list.lines()
            .find(|line| line.trim_start().starts_with(name))
            .unwrap_or_else(|| panic!("{name} in {list}"))
    };
    // A datasheet's rated power with a tenth of it for idle; a published idle power.
    says(row("nvidia-a40 "), &["  ~30 W     300 W"]);
    says(row("nvidia-t4 "), &["  8 W  "]);
}

#[test]
fn runs_are_compared_alike_in_every_form() {
    let lab = Lab::new();
    lab.train("long", &set(&["train.steps=6", "energy.grid=US-CA"]));
    let short = lab.train(
        "short",
        &set(&["train.steps=2", "energy.grid=FR", "energy.price=2.50 USD/h"]),
    );
    // Hours are not joules: their price has no bounds.
    assert!(
        short["budget"]["spent"]["cost"].is_object()
            && short["budget"]["spent_low"]["cost"].is_null()
    );
    // CodeCarbon's columns name a country by its code of three letters, also that of a state.
    assert!(
        String::from_utf8(lab.read("long/emissions.csv"))
            .unwrap()
            .contains(",United States,USA,California,")
    );
    assert!(
        String::from_utf8(lab.read("short/emissions.csv"))
            .unwrap()
            .contains(",France,FRA,")
    );
    let document = lab.json(&["compare", "long", "short"]);
    let shown = |format: &str| {
        let output = lab.output(&["compare", "long", "short", "--format", format]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    // So few steps change the loss by less than its standard error, or not: both is said.
    let verdict = match document["best"].as_str() {
        Some(best) => format!("Largest loss reduction per joule: {best}."),
        None => "a tie: the loss reductions per joule of".to_string(),
    };
    let differs = "train.steps differs (long: 6; short: 2)";
    let (page, text) = (shown("html"), shown("text"));
    for said in [verdict.as_str(), differs] {
        assert!(page.contains(said) && text.contains(said), "{said}: {text}");
    }
    assert_eq!(
        serde_json::from_str::<Value>(&shown("json")).unwrap(),
        document
    );
    for run in document["runs"].as_array().unwrap() {
        let rate = wattune::units::significant(number(run, "/loss_per_kj"));
        assert!(
            page.contains(&format!(">{rate}</td>")) && text.contains(&rate),
            "{rate} in {text}"
        );
        assert!(microjoules(&run["low_j"]) < microjoules(&run["energy_j"]));
    }
    lab.refused(
        2,
        &["compare", "long", "short", "--format", "html", "--json"],
    );
}
