//! Energy in use: requests counted as by hand, and when a fine-tuning has paid for itself.

use serde_json::Value;

use super::lab::{Lab, number, says, set, word};

/// 10 W idle, 1e12 FLOP/s and 1e10 B/s reached, 5 pJ a FLOP, 100 pJ a byte of main memory, no caches.
const DESK: &str = "name = \"desk\"\nkind = \"cpu\"\ncores = 4\nidle_w = 10\nload_w = 60\nbandwidth = 2e10\nachievable_flops = 0.5\n\
    achievable_bandwidth = 0.5\npeak_flops = { f32 = 2e12 }\npj_per_flop = { f32 = 5 }\ndram_pj_per_byte = 100\ncaches = []\n";

fn report(lab: &Lab, out: &str, keys: &[&str]) -> Value {
    lab.write("desk.toml", DESK);
    lab.train(
        out,
        &set(&[&["train.steps=1", "energy.device=desk.toml"], keys].concat()),
    )
}

fn served<'a>(report: &'a Value, model: &str) -> &'a Value {
    let models = report["inference"]["models"].as_array().unwrap();
    models
        .iter()
        .find(|served| served["model"] == model)
        .unwrap_or_else(|| panic!("no {model} in {models:?}"))
}

/// The bounds at `pointer` are those of the whole report: energy divided and multiplied by 1.37, on the grid at its lowest and highest.
fn bounded(report: &Value, of: &Value, pointer: &str, energy: f64) {
    let bound = |end: &str| number(of, &format!("{pointer}/{end}"));
    assert!(
        (bound("low_j") * 1.37 / energy - 1.0).abs() < 1e-9
            && (bound("high_j") / 1.37 / energy - 1.0).abs() < 1e-9,
        "{of}"
    );
    let grams = |end: &str| {
        number(report, &format!("/carbon/{end}_gco2e"))
            / number(report, &format!("/energy/{end}_j"))
    };
    for end in ["low", "high"] {
        let per_joule = bound(&format!("{end}_gco2e")) / bound(&format!("{end}_j"));
        assert!((per_joule / grams(end) - 1.0).abs() < 1e-9, "{end}: {of}");
    }
}

#[test]
fn a_request_executes_what_it_does_by_hand() {
    // embedded:tiny, one prompt token and two generated: the prompt gives the first, one more pass the second. Weights of a layer: q and o
    // 128 * 128, k and v 64 * 128, gate, up and down 352 * 128 each: 184 320, times 4 layers 737 280. Logits 1024 * 128 = 131 072. Attention
    // 4 * 128 for each key in each of 4 layers: 1 key, then 2. FLOPs: 2 * (2 * 737280 + 2 * 131072) + 4 * 128 * 4 * 3 = 3 479 552.
    // The adapter beside it, rank 2: 2 * 2 * 2336 * 4 layers a token (see the choices), two tokens: 74 752.
    let lab = Lab::new();
    let report = report(
        &lab,
        "run",
        &["report.prompt_tokens=1", "report.generated_tokens=2"],
    );
    let flops = |model: &str| number(served(&report, model), "/request_flops");
    assert_eq!(
        (flops("base"), flops("merged"), flops("adapter")),
        (3_479_552.0, 3_479_552.0, 3_554_304.0)
    );
    // Two tokens a request: 1,000 tokens are 500 requests. Emissions at 473 g/kWh or whatever the grid says, overhead 1.
    for model in ["base", "adapter", "merged"] {
        let energy = number(served(&report, model), "/per_1000_tokens_j");
        assert!((energy - 500.0 * number(served(&report, model), "/request_j")).abs() < 1e-12);
        let grams = energy / 3.6e6 * number(&report, "/carbon/gco2e_per_kwh");
        assert!(
            (number(served(&report, model), "/per_1000_tokens_gco2e") / grams - 1.0).abs() < 1e-9
        );
        bounded(
            &report,
            served(&report, model),
            "/per_1000_tokens_bounds",
            energy,
        );
    }
    assert!(
        number(served(&report, "adapter"), "/request_j")
            > number(served(&report, "merged"), "/request_j")
    );
}

#[test]
fn a_larger_model_is_counted_and_paid_back_as_by_hand() {
    // 1e8 weights: 2e8 FLOPs a token at 5 pJ are 1 mJ. 4e8 bytes at 100 pJ are 40 mJ and take, at 1e10 B/s, 40 ms, in which 10 W idle
    // are 400 mJ: 441 mJ a token, prompt or generated. Two passes a request: 882 mJ.
    let lab = Lab::new();
    let keys = [
        "report.prompt_tokens=1",
        "report.generated_tokens=2",
        "report.larger_model=100M",
        "report.requests_per_day=100",
    ];
    let report = report(&lab, "run", &keys);
    let other = &report["inference"]["alternative"];
    assert_eq!(
        (word(other, "/kind"), other["parameters"].as_u64()),
        ("larger_model", Some(100_000_000))
    );
    assert!(
        (number(other, "/request_j") - 0.882).abs() < 1e-9,
        "{other}"
    );
    assert!(
        (number(other, "/per_1000_tokens_j") - 441.0).abs() < 1e-6,
        "{other}"
    );
    let (total, own) = (
        number(&report, "/energy/total_j"),
        number(served(&report, "merged"), "/request_j"),
    );
    let requests = (total / (0.882 - own)).ceil();
    assert_eq!(number(other, "/pays_after_requests"), requests);
    // 36,500 requests a year.
    let year = &report["inference"]["year"];
    let share = 36_500.0 * own / (36_500.0 * own + total);
    assert!(
        (number(year, "/share_of_life_cycle") - share).abs() < 1e-12
            && (number(year, "/fine_tuning_share") + share - 1.0).abs() < 1e-12
    );
    assert_eq!(number(year, "/pays_after_days"), requests / 100.0);
    bounded(&report, year, "/bounds", 36_500.0 * own);
    bounded(
        &report,
        other,
        "/per_1000_tokens_bounds",
        number(other, "/per_1000_tokens_j"),
    );
    let grams =
        number(other, "/per_1000_tokens_j") / 3.6e6 * number(&report, "/carbon/gco2e_per_kwh");
    assert!(
        (number(other, "/per_1000_tokens_gco2e") / grams - 1.0).abs() < 1e-9,
        "{other}"
    );
    let page = String::from_utf8(lab.read("run/report.md")).unwrap();
    says(
        &page,
        &[
            "## Inference",
            "a model of 100 M parameters",
            "pays off after",
            "a year of use takes",
        ],
    );
}

#[test]
fn without_a_larger_model_examples_in_the_prompt_stand_in() {
    let lab = Lab::new();
    let first = report(
        &lab,
        "few",
        &["report.prompt_tokens=20", "report.generated_tokens=10"],
    );
    let other = &first["inference"]["alternative"];
    let example = (number(&first, "/data/tokens") / number(&first, "/data/examples")).ceil();
    assert_eq!(
        (word(other, "/kind"), number(other, "/prompt_tokens")),
        ("few_shot", 20.0 + 5.0 * example)
    );
    assert!(first["inference"].get("year").is_none_or(Value::is_null));
    let said = first["inference"]["assumptions"].to_string();
    says(
        &said,
        &[
            "no `larger_model` in [report]",
            "assumes equal answer quality",
        ],
    );
    // 512 positions: 480 + 32 hold no example, and 513 not even the request.
    let tight = report(
        &lab,
        "tight",
        &["report.prompt_tokens=480", "report.generated_tokens=32"],
    );
    assert!(
        tight["inference"]["alternative"].is_null(),
        "{}",
        tight["inference"]
    );
    let over = report(
        &lab,
        "over",
        &["report.prompt_tokens=481", "report.generated_tokens=32"],
    );
    assert!(over.get("inference").is_none());
    says(
        &over["warnings"].to_string(),
        &["481 prompt and 32 generated tokens does not fit the model's 512 positions"],
    );
}
