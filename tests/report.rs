//! The report's pages, from one fixture whose numbers were derived by hand.
//!
//! `tests/fixtures/report.json`, and where its numbers come from:
//!
//! - weights trained: r (in + out) over SmolLM2-135M's seven projections (576, 576/192, 1536):
//!   16 x (1152 + 768 + 768 + 1152 + 2112 + 2112 + 2112) x 30 layers = 4,884,480;
//! - energy: 2e14 FLOP x 9 pJ = 1,800 J; 2e12 bytes x 300 pJ = 600 J; 10 W x 118.2 s = 1,182 J; together 3,582 J = 0.995 Wh,
//!   which is load 40 + train 3,300 + eval 222 + save 20; timed: 45 W x 130 s = 5,850 J;
//! - emissions: 3,582 / 3.6e6 kWh x PUE 1.2 x 473 g/kWh = 0.000995 x 567.6 = 0.564762 g;
//! - full fine-tuning: 6N over 4N FLOPs, 1.5 times; pretraining: 6 x 134,515,008 x 2e12 = 1.614180096e21 FLOP, 8,070,900.48 times.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use wattune::energy::Limit;
use wattune::report::baselines::BaselineKind;
use wattune::report::emissions::{COLUMNS, Emissions, EnergyParts};
use wattune::report::energy::HostLeftOut;
use wattune::report::types::{AdapterType, Meter, Phase, Report};
use wattune::report::{
    CardFacts, Comparison, FiniteReport, compare, files, read_report, to_json, to_markdown,
    to_model_card, to_text,
};
use wattune::train::Stop;
use wattune::units::{GramsCo2e, Joules, Seconds};

fn fixture() -> Report {
    serde_json::from_str(include_str!("fixtures/report.json")).unwrap()
}

fn finite(report: &Report) -> FiniteReport {
    FiniteReport::new(report.clone()).unwrap()
}

/// Where pages are left for `scripts/check_model_card.py` and `scripts/check_emissions.py`.
fn out(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

fn card_facts() -> CardFacts {
    CardFacts {
        name: "e2e: restaurant descriptions".to_string(),
        base_model: Some("HuggingFaceTB/SmolLM2-135M".to_string()),
        license: Some("apache-2.0".to_string()),
        datasets: vec!["tuetschek/e2e_nlg".to_string()],
        location: Some("no: \"anywhere\"\n24_700_000".to_string()),
        hardware: Some("Example CPU 2.0 GHz, 2 threads".to_string()),
        hyperparameters: vec![
            ("r".to_string(), "16".to_string()),
            ("lora_alpha".to_string(), "32".to_string()),
            ("target_modules".to_string(), "q_proj|v_proj".to_string()),
            ("learning_rate".to_string(), "0.0002".to_string()),
        ],
    }
}

fn emissions() -> Emissions {
    Emissions {
        timestamp: "2026-01-31T12:00:00".to_string(),
        project_name: "e2e, small".to_string(),
        run_id: "e2e-20260131-120000".to_string(),
        parts: EnergyParts {
            cpu: Some(Joules(3582.0)),
            gpu: Some(Joules::ZERO),
            ram: None,
        },
        cpu_count: Some(4),
        ..Emissions::default()
    }
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn the_fixture_adds_up() {
    let report = fixture();
    let energy = &report.energy;
    assert_eq!(
        energy.by_phase.values().copied().sum::<Joules>(),
        energy.total.central
    );
    let parts = energy.counted_parts.as_ref().unwrap();
    assert_eq!(
        parts.arithmetic_j + parts.movement_j + parts.idle_j,
        energy.meters.counted_j
    );
    let grams = report.carbon.gco2e_per_kwh * (report.carbon.pue * energy.total.central);
    assert!((grams - report.carbon.emissions.central).0.abs() < 1e-9);
}

#[test]
fn the_keys_are_the_contracts() {
    let written: Value = serde_json::from_str(&to_json(&finite(&fixture())).unwrap()).unwrap();
    // Typed out from the contract; after the bar, what it adds.
    let contract = [
        (
            "",
            "model adapter data training energy budget carbon baselines environment | memory warnings sample",
        ),
        ("/model", "id revision architecture parameters |"),
        (
            "/adapter",
            "type r lora_alpha target_modules trainable_parameters | portability",
        ),
        (
            "/data",
            "examples tokens loss_tokens truncated dropped | skipped sources fingerprint",
        ),
        (
            "/training",
            "steps stop_reason val_loss_before val_loss_after train_loss_last tokens_per_second wall_s peak_rss_bytes \
             | cpu_s epochs tokens loss_tokens best",
        ),
        (
            "/energy",
            "meter total_j by_phase meters flops bytes device | low_j high_j measured_absent counted_parts bytes_by_level \
             factors profile_factor reconciliation",
        ),
        ("/energy/meters", "counted_j measured_j timed_j |"),
        (
            "/energy/counted_parts",
            "| arithmetic_j movement_j idle_j lost_j movement_by_level_j levels_left_out movement_without_reuse_j",
        ),
        (
            "/memory",
            "| peak_bytes weights trained activations temporaries program",
        ),
        ("/energy/by_phase", "load train eval save |"),
        (
            "/budget",
            "limits spent overshoot_j | spent_low spent_high margin_j",
        ),
        (
            "/budget/limits",
            "energy_j carbon_gco2e flops time_s cost |",
        ),
        (
            "/carbon",
            "gco2e grid gco2e_per_kwh pue | low_gco2e high_gco2e embodied_gco2e embodied_source year source place basis licence dataset_sha256",
        ),
        (
            "/baselines/0",
            "kind label flops energy_j gco2e ratio source | low_j high_j low_gco2e high_gco2e low_ratio high_ratio assumptions val_loss_at_equal_energy energy_to_equal_loss_j",
        ),
        ("/environment", "version cpu threads os |"),
    ];
    for (block, words) in contract {
        let mut expected: Vec<&str> = words
            .split_whitespace()
            .filter(|word| *word != "|")
            .collect();
        let mut found = keys(written.pointer(block).unwrap());
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected, "block `{block}`");
    }
    assert_eq!(written["training"]["stop_reason"], "budget:energy");
    assert_eq!(written["energy"]["meters"]["measured_j"], Value::Null);
}

#[test]
fn a_report_round_trips() {
    let path = out(files::REPORT_JSON);
    wattune::files::write_atomic(&path, to_json(&finite(&fixture())).unwrap()).unwrap();
    assert_eq!(read_report(&path).unwrap().into_inner(), fixture());
    // Neither more nor less than the fixture's own document.
    let written: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(
        written,
        serde_json::from_str::<Value>(include_str!("fixtures/report.json")).unwrap()
    );
}

#[test]
fn an_invalid_report_file_is_named() {
    let path = out("broken.json");
    fs::write(&path, "{\n  \"model\": 3\n}\n").unwrap();
    let message = read_report(&path).unwrap_err().to_string();
    assert!(message.contains("broken.json, line 2"), "{message}");
    let message = read_report(&out("absent.json")).unwrap_err().to_string();
    assert!(message.contains("--resume"), "{message}");
    let mut low = serde_json::to_value(fixture()).unwrap();
    low["carbon"]["pue"] = 0.9.into();
    fs::write(&path, low.to_string()).unwrap();
    assert!(
        read_report(&path)
            .unwrap_err()
            .to_string()
            .contains("pue: 0.9 is below 1")
    );
}

#[test]
fn the_page() {
    insta::assert_snapshot!(to_markdown("e2e-20260131-120000", &finite(&fixture())).unwrap());
}

#[test]
fn the_terminal() {
    let shown = to_text("e2e-20260131-120000", &finite(&fixture()));
    assert!(shown.lines().all(|line| line.chars().count() <= 100));
    insta::assert_snapshot!(shown);
}

#[test]
fn model_output_cannot_break_a_page() {
    let mut report = fixture();
    report.sample.as_mut().unwrap().after = "\u{1b}[2J```\n# heading".to_string();
    let report = finite(&report);
    assert!(!to_text("run", &report).contains('\u{1b}'));
    let page = to_markdown("run", &report).unwrap();
    assert!(
        page.contains("````text\n") && page.ends_with(".\n"),
        "{page}"
    );
}

#[test]
fn the_model_card() {
    let card = to_model_card(&card_facts(), &finite(&fixture())).unwrap();
    wattune::files::write_atomic(&out(files::MODEL_CARD), &card).unwrap();
    insta::assert_snapshot!(card);
}

#[test]
fn a_card_leaves_out_unknown_fields() {
    let mut report = fixture();
    report.adapter.r#type = AdapterType::None;
    let card = to_model_card(
        &CardFacts {
            name: "plain".to_string(),
            ..CardFacts::default()
        },
        &finite(&report),
    )
    .unwrap();
    let front = card.split("---\n").nth(1).unwrap();
    for absent in [
        "base_model",
        "license",
        "datasets",
        "geographical_location",
        "hardware_used",
        "peft",
        "lora",
    ] {
        assert!(!front.contains(absent), "{absent} in {front}");
    }
    assert!(
        front.contains("library_name: \"transformers\"")
            && front.contains("  emissions: 0.564762\n"),
        "{front}"
    );
}

#[test]
fn emissions_in_codecarbons_columns_and_units() {
    let csv = emissions().to_csv(&finite(&fixture())).unwrap();
    wattune::files::write_atomic(&out(files::EMISSIONS_CSV), &csv).unwrap();
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    assert_eq!(reader.headers().unwrap(), &COLUMNS[..]);
    let row = reader.records().next().unwrap().unwrap();
    let cell = |name: &str| &row[COLUMNS.iter().position(|column| *column == name).unwrap()];
    let number = |name: &str| cell(name).parse::<f64>().unwrap();
    // 0.564762 g over 130 s; 3,582 J x 1.2 = 4,298.4 J = 0.001194 kWh, 33.0646 W.
    assert_eq!(number("duration"), 130.0);
    assert!((number("emissions") - 0.000_564_762).abs() < 1e-12);
    assert!((number("emissions_rate") - 4.344_323_077e-6).abs() < 1e-14);
    assert!((number("energy_consumed") - 0.001_194).abs() < 1e-12);
    assert!((number("cpu_power") - 33.064_615).abs() < 1e-6);
    assert_eq!(
        (
            cell("gpu_energy"),
            cell("ram_energy"),
            cell("wue"),
            cell("country_name")
        ),
        ("0", "", "", "")
    );
    assert_eq!(
        (
            cell("project_name"),
            cell("tracking_mode"),
            cell("pue"),
            cell("cpu_count")
        ),
        ("e2e, small", "process", "1.2", "4")
    );
}

#[test]
fn device_energy_is_not_machine_energy() {
    let mut report = fixture();
    let page = |report: &Report| to_markdown("run", &finite(report)).unwrap();
    let said = [
        "| device energy | 3.582 kJ",
        "The host machine is not included",
        "Device energy does not include the host machine",
    ];
    assert!(page(&report).contains("| machine energy | 3.582 kJ"));
    assert!(
        said.iter().all(|words| !page(&report).contains(words)),
        "{}",
        page(&report)
    );
    // Three tenths of the machine's power beside seven: 3582 J x 3 / 7 = 1535.1 J, and 1 / 0.7 = 1.43 times as much.
    report.energy.host_left_out = Some(HostLeftOut { share: Some(0.3) });
    let with = page(&report);
    let figures = [
        "not included | about 1.535 kJ (0.4264 Wh): 30.0 % of the machine's power |",
        "with it, about 1.43 times as much.",
    ];
    assert!(
        said.iter()
            .chain(&figures)
            .all(|words| with.contains(words)),
        "{with}"
    );
    report.energy.host_left_out = Some(HostLeftOut { share: None });
    let with = page(&report);
    assert!(
        said.iter().all(|words| with.contains(words))
            && with.contains("not included | share not known |"),
        "{with}"
    );
}

/// The fixture, half as long: 75 steps for 2,000 J and 1.0 nats: 0.5 per kJ, against 1.2 / 3.582 = 0.3350.
fn half() -> Report {
    let mut report = fixture();
    report.training.steps = 75;
    report.training.tokens = Some(153_600);
    report.training.stop_reason = Stop::Steps;
    report.training.val_loss_after = Some(2.25);
    report.energy.total.central = Joules(2000.0);
    report.energy.meters.counted_j = Joules(2000.0);
    report.carbon.emissions.central = GramsCo2e(0.315333);
    report
}

#[test]
fn runs_side_by_side() {
    let comparison = compare(&[
        ("whole".to_string(), finite(&fixture())),
        ("half".to_string(), finite(&half())),
    ]);
    assert_eq!(comparison.best.as_deref(), Some("half"));
    assert_eq!(comparison.runs[1].loss_per_kj, Some(0.5));
    assert_eq!(comparison.notes, Vec::<String>::new());
    insta::assert_snapshot!(comparison.text());
    insta::assert_snapshot!(
        "compare_json",
        serde_json::to_string_pretty(&comparison).unwrap()
    );
}

#[test]
fn runs_within_a_standard_error_are_tied() {
    let (mut lower, mut higher) = (fixture(), fixture());
    lower.training.val_loss_after = Some(2.00);
    higher.training.val_loss_after = Some(2.01);
    let compared = |standard_error| {
        let runs = [("lower", &lower), ("higher", &higher)].map(|(name, report)| {
            let mut report = report.clone();
            report.training.val_loss_after_se = standard_error;
            (name.to_string(), finite(&report))
        });
        compare(&runs)
    };
    let both = |comparison: &Comparison| {
        let name = |run: &Option<String>| run.clone().unwrap_or_default();
        [name(&comparison.best), name(&comparison.lowest_loss)]
    };
    for known in [None, Some(0.009)] {
        assert_eq!(both(&compared(known)), ["lower", "lower"]);
    }
    let tied = compared(Some(0.011));
    assert_eq!(both(&tied), ["", ""]);
    assert!(tied.notes.iter().all(|note| note.contains("a tie")) && tied.notes.len() == 2);
    assert!(tied.text().contains("Runs are not ranked."));
    // Two copies of one run, whatever is known.
    let copies = [("a", fixture()), ("b", fixture())];
    let copies = copies.map(|(name, report)| (name.to_string(), finite(&report)));
    assert_eq!(both(&compare(&copies)), ["", ""]);
}

#[test]
fn incomparable_runs_are_not_ranked() {
    let mut other = half();
    other.data.fingerprint = Some("sha256:000000".to_string());
    let comparison = compare(&[
        ("whole".to_string(), finite(&fixture())),
        ("other".to_string(), finite(&other)),
    ]);
    assert_eq!(comparison.best, None);
    assert!(
        comparison.notes[0].contains("different data"),
        "{:?}",
        comparison.notes
    );
    other.data.fingerprint = None;
    let comparison = compare(&[
        ("whole".to_string(), finite(&fixture())),
        ("other".to_string(), finite(&other)),
    ]);
    assert!(
        comparison.best.is_none() && comparison.notes[0].contains("not known"),
        "{:?}",
        comparison.notes
    );
    other = half();
    other.model.id = "another".to_string();
    let comparison = compare(&[
        ("whole".to_string(), finite(&fixture())),
        ("other".to_string(), finite(&other)),
    ]);
    assert!(
        comparison.best.is_none() && comparison.notes[0].contains("different models"),
        "{:?}",
        comparison.notes
    );
}

#[test]
fn runs_on_different_meters_are_compared_on_the_counted_one() {
    let mut measured = half();
    measured.energy.meter = Meter::Measured;
    measured.energy.total.central = Joules(9000.0);
    measured.energy.meters.measured_j = Some(Joules(9000.0));
    let comparison = compare(&[
        ("whole".to_string(), finite(&fixture())),
        ("measured".to_string(), finite(&measured)),
    ]);
    assert_eq!(
        (comparison.meter, comparison.runs[1].energy.central),
        (Meter::Counted, Joules(2000.0))
    );
    assert!(
        comparison.notes[0].contains("different meters"),
        "{:?}",
        comparison.notes
    );
}

#[test]
fn a_difference_is_named_once_with_all_its_runs() {
    let mut other = half();
    other.energy.device = "nvidia-a40".to_string();
    other.energy.host_left_out = Some(HostLeftOut { share: Some(0.3) });
    other.training.val_loss_after = Some(2.2);
    let runs = [("a", fixture()), ("b", other), ("c", half())]
        .map(|(name, report)| (name.to_string(), finite(&report)));
    let expected = [
        "the runs used different device profiles (a, c: generic-laptop; b: nvidia-a40)",
        "host machine not included for b",
    ];
    assert_eq!(compare(&runs).notes, expected);
    // All alike, nothing is unfair.
    assert_eq!(compare(&runs[1..2]).notes, Vec::<String>::new());
}

/// The fixture with everything that may be missing or not finite made so.
fn poisoned(bad: f64) -> Report {
    let mut report = fixture();
    let training = &mut report.training;
    training.stop_reason = Stop::Diverged(String::new());
    training.val_loss_before = Some(bad);
    training.val_loss_after = Some(bad);
    training.train_loss_last = Some(bad);
    training.tokens_per_second = Some(bad);
    training.epochs = Some(bad);
    report.adapter.lora_alpha = Some(bad);
    report.energy.total.low = Joules(bad);
    report.energy.meters.timed_j = Some(Joules(bad));
    report.budget.limits.time = Some(Seconds(bad));
    report.budget.overshoot_j = Some(Joules(bad));
    report.carbon.embodied_gco2e = Some(GramsCo2e(bad));
    for baseline in &mut report.baselines {
        baseline.ratio.as_mut().unwrap().central = bad;
        baseline.energy.as_mut().unwrap().central = Joules(bad);
        baseline.val_loss_at_equal_energy = Some(bad);
    }
    report
}

#[test]
fn no_page_shows_a_non_finite_number() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let report = poisoned(bad);
        let named = finite(&report);
        assert_eq!(named.training.train_loss_last, None);
        assert!(
            named
                .warnings
                .iter()
                .any(|warning| warning.starts_with("training.train_loss_last was not")),
            "{:?}",
            named.warnings
        );
        assert!(
            named
                .warnings
                .iter()
                .any(|warning| warning.starts_with("baselines.2.ratio was not")),
            "{:?}",
            named.warnings
        );
        assert_eq!(named.warnings.len(), 1 + 11 + 9);
        let comparison = compare(&[
            ("a".to_string(), named.clone()),
            ("b".to_string(), finite(&fixture())),
        ]);
        let pages = [
            to_json(&named).unwrap(),
            to_markdown("run", &named).unwrap(),
            to_text("run", &named),
            to_model_card(&card_facts(), &named).unwrap(),
            emissions().to_csv(&named).unwrap(),
            comparison.text(),
            serde_json::to_string(&comparison).unwrap(),
        ];
        for page in pages {
            let mut words = page.split(|c: char| !c.is_ascii_alphanumeric());
            assert!(
                !words.any(|word| ["nan", "inf"].contains(&word.to_lowercase().as_str())),
                "{page}"
            );
        }
    }
}

#[test]
fn a_non_finite_total_is_rejected_by_name() {
    let mut report = fixture();
    report
        .energy
        .by_phase
        .insert(Phase::Train, Joules(f64::NAN));
    let error = FiniteReport::new(report).unwrap_err();
    assert!(
        error.to_string().contains("energy.by_phase.train"),
        "{error}"
    );
}

#[test]
fn the_summary_names_the_budget_that_stopped_the_run() {
    let mut report = fixture();
    let summary = |report: &Report| {
        to_text("run", &finite(report))
            .split("\nRESULT")
            .next()
            .unwrap()
            .replace('\n', " ")
    };
    report.training.stop_reason = Stop::Budget(Limit::Time);
    assert!(
        summary(&report).contains("It stopped at its 10 min 00 s time budget."),
        "{}",
        summary(&report)
    );
    assert!(!summary(&report).contains("exceeded the energy budget"));
    report.energy.meter = Meter::Measured;
    report.budget.spent.energy = report
        .budget
        .limits
        .energy
        .map(|limit| limit + Joules(36.0));
    assert!(
        summary(&report).contains("It exceeded the energy budget by 36 J (10 mWh)."),
        "{}",
        summary(&report)
    );
    // Each in its own unit, and none that was not set.
    report.budget.limits.energy = None;
    report.budget.spent.time = report.budget.limits.time.map(|limit| limit + Seconds(0.36));
    let text = summary(&report);
    assert!(
        text.contains("It exceeded the time budget by 360 ms."),
        "{text}"
    );
    assert!(!text.contains("energy budget"), "{text}");
    report
        .baselines
        .retain(|baseline| baseline.kind != BaselineKind::FullFineTuning);
    let page = to_markdown("run", &finite(&report)).unwrap();
    assert!(page.contains("| full fine-tuning | not known |"), "{page}");
}
