//! The page with charts: well-formed, closed to the outside, and with the numbers of `report.json`.
//!
//! From `tests/fixtures/report.json` and a course that adds up to its 3,582 J: load 40, evaluation 111, 150 steps of 22 J,
//! evaluation 111, save 20. So the first step begins at 151 J and the last ends at 3,451 J.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use wattune::energy::ledger::{Entry, Lease, Ledger, Phase};
use wattune::energy::{Energies, Interval};
use wattune::report::baselines::{
    BaselineKind, BaselineStop, CurvePoint, EqualLoss, MeasuredBaseline, Reached,
};
use wattune::report::{
    Comparison, FiniteReport, History, Report, StepLog, compare, comparison_page, files, to_json,
    to_markdown,
};
use wattune::train::{StepEnergy, StepRecord};
use wattune::units::{GramsCo2e, Joules, Seconds};

const HOSTILE: &str = "</pre></title><script>alert(1)</script>\"' onload=x <img src=\"https://example.org/a.png\"> & `<b>`\u{0}\u{1b}[2J";

fn fixture() -> Report {
    serde_json::from_str(include_str!("fixtures/report.json")).unwrap()
}

fn step(step: u64) -> StepRecord {
    let val_loss = match step {
        50 => Some(2.6),
        100 => Some(2.3),
        150 => Some(2.05),
        _ => None,
    };
    StepRecord {
        step,
        // A step without a finite loss interrupts the line.
        loss: (step != 75).then(|| 3.2 - 1.22 * step as f64 / 150.0),
        lr: 2e-4 * (1.0 - step as f64 / 150.0),
        grad_norm: Some(1.0),
        tokens: 2048,
        loss_tokens: 1024,
        flops: 1,
        energy_j: StepEnergy {
            counted: Joules(22.0),
            measured: None,
            timed: Some(Joules(36.0)),
        },
        wall_s: Seconds(0.8),
        val_loss,
    }
}

fn entry(phase: Phase, step: u64, joules: f64) -> Entry {
    let energy = Joules(joules).rounded();
    let energy_j = Energies {
        counted: energy,
        measured: None,
        timed: energy,
    };
    Entry {
        phase,
        step,
        energy_j,
        flops: 1,
        bytes: Default::default(),
        breakdown: None,
        wall_s: Seconds(0.1),
        t: 0.0,
        gap: None,
    }
}

fn history() -> History {
    let start = [entry(Phase::Load, 0, 40.0), entry(Phase::Eval, 0, 111.0)];
    let end = [
        entry(Phase::Eval, 150, 111.0),
        entry(Phase::Save, 150, 20.0),
    ];
    let entries = start
        .into_iter()
        .chain((1..=150).map(|step| entry(Phase::Train, step, 22.0)))
        .chain(end);
    History {
        steps: (1..=150).map(step).collect(),
        entries: entries.collect(),
    }
}

fn finite(report: &Report) -> FiniteReport {
    FiniteReport::new(report.clone()).unwrap()
}

fn to_html(name: &str, report: &Report, history: &History) -> String {
    wattune::report::to_html(name, &finite(report), history).unwrap()
}

fn page() -> String {
    to_html("e2e-20260131-120000", &fixture(), &history())
}

/// Every tag as (name, the rest of it); fails where one is not closed in order.
fn tags(page: &str) -> Vec<(String, String)> {
    let (mut open, mut found) = (Vec::new(), Vec::new());
    let document = page
        .strip_prefix("<!DOCTYPE html>\n")
        .expect("a document type");
    for piece in document.split('<').skip(1) {
        let (tag, text) = piece
            .split_once('>')
            .unwrap_or_else(|| panic!("`<{piece}` has no end"));
        assert!(!text.contains('>'), "a bare > in {text}");
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric())
            .collect();
        if tag.starts_with('/') {
            assert_eq!(
                open.pop().as_ref(),
                Some(&name),
                "</{name}> closes another tag"
            );
            continue;
        }
        if !tag.ends_with('/') {
            open.push(name.clone());
        }
        found.push((name.clone(), tag[name.len()..].to_string()));
    }
    assert_eq!(open, Vec::<String>::new(), "tags are left open");
    found
}

/// The values of an attribute.
fn values<'a>(page: &'a str, attribute: &str) -> Vec<&'a str> {
    page.split(&format!(" {attribute}=\""))
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .collect()
}

#[test]
fn the_page_is_well_formed_and_its_charts_have_names() {
    let page = page();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&folder).unwrap();
    // For scripts/check_html.py.
    wattune::files::write_atomic(&folder.join(files::REPORT_HTML), &page).unwrap();
    let tags = tags(&page);
    let pictures = tags.iter().filter(|(name, _)| name == "svg");
    // Loss, rate and budget in two widths each; energy and emissions in one. Bars are lists: phases, components, memory, comparison.
    assert_eq!(pictures.clone().count(), 3 * 2 + 2);
    let lists = values(&page, "aria-label");
    assert_eq!(lists.len(), 4, "{lists:?}");
    let mut ids = values(&page, "id");
    for (_, attributes) in pictures {
        let named = values(attributes, "aria-labelledby")[0];
        assert!(
            attributes.contains("role=\"img\"") && named.split(' ').all(|id| ids.contains(&id)),
            "{attributes}"
        );
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id stands twice");
}

#[test]
fn the_page_begins_with_figures_and_the_sample() {
    let mut report = fixture();
    report
        .hyperparameters
        .insert("train.learning_rate".to_string(), 2e-4.into());
    let page = to_html("run", &report, &history());
    let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text}"));
    let order = [
        "<dl class=\"facts\">",
        "<p class=\"lead\">",
        "<h2>Sample</h2>",
        "<h2>Loss vs energy</h2>",
        "<h2>Result</h2>",
    ];
    assert!(order.map(at).is_sorted(), "{:?}", order.map(at));
    assert_eq!(page.matches("<h2>Sample</h2>").count(), 1);
    assert!(page.contains("<th scope=\"row\">train.learning_rate</th><td>0.0002</td>"));
    assert!(!page.contains("SHA-256"));
    // A table below its chart is folded, any other is not.
    let section = |title: &str| {
        let rest = &page[at(&format!("<h2>{title}</h2>"))..];
        &rest[..rest.find("</section>").unwrap()]
    };
    for title in ["Energy by phase", "Memory", "Comparison"] {
        assert!(section(title).contains("<details>"), "{title}");
    }
    assert!(!section("Result").contains("<details>"));
    // Lengths on a logarithmic scale say nothing.
    assert!(section("Comparison").contains("class=\"bars dots\""));
    assert!(!section("Memory").contains("dots"));
}

#[test]
fn the_page_loads_and_runs_nothing() {
    let page = page();
    for way in [
        "src=", "href=", "url(", "@import", "://", "<script", "<link", "<iframe", " on",
    ] {
        let found = tags(&page)
            .into_iter()
            .any(|(name, rest)| format!("<{name}{rest}").contains(way));
        assert!(!found, "{way}");
    }
    let style = page
        .split("<style>")
        .nth(1)
        .unwrap()
        .split("</style>")
        .next()
        .unwrap();
    assert!(
        !["url(", "@import", "://"]
            .iter()
            .any(|way| style.contains(way))
    );
    assert!(page.contains("content=\"default-src 'none'; style-src 'unsafe-inline'\""));
}

#[test]
fn foreign_text_is_escaped() {
    let text = || HOSTILE.to_string();
    let mut report = fixture();
    let sample = report.sample.as_mut().unwrap();
    (sample.prompt, sample.before, sample.after) = (text(), text(), text());
    (
        report.model.id,
        report.model.architecture,
        report.carbon.grid,
    ) = (text(), text(), text());
    (
        report.environment.cpu,
        report.environment.version,
        report.energy.device,
    ) = (text(), text(), text());
    report.carbon.source = Some(text());
    (
        report.carbon.place,
        report.carbon.basis,
        report.carbon.licence,
    ) = (Some(text()), Some(text()), Some(text()));
    report.carbon.dataset_sha256 = Some(text());
    for factor in &mut report.energy.factors {
        (factor.name, factor.value, factor.source) = (text(), text(), text());
    }
    report
        .energy
        .counted_parts
        .as_mut()
        .unwrap()
        .levels_left_out = vec![text()];
    report.data.sources = vec![text()];
    report.warnings = vec![text()];
    report.baselines[0].source = text();
    report.baselines[0].assumptions = vec![text()];
    let hostile = to_html(HOSTILE, &report, &history());
    // Code in backticks is the only markup that a text may bring.
    let shape = |page: &str| {
        let all = tags(page)
            .into_iter()
            .map(|(name, rest)| format!("{name}{rest}"));
        all.filter(|tag| tag != "code" && !tag.starts_with("data "))
            .collect::<Vec<_>>()
    };
    assert_eq!(shape(&hostile), shape(&page()));
    assert!(hostile.contains(
        "&lt;/pre&gt;&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39; onload=x"
    ));
    assert!(!hostile.contains(['\u{0}', '\u{1b}']));
}

#[test]
fn figures_match_the_other_formats() {
    let page = page();
    let written: serde_json::Value =
        serde_json::from_str(&to_json(&finite(&fixture())).unwrap()).unwrap();
    let paths = [
        "/energy/total_j",
        "/carbon/gco2e",
        "/training/val_loss_before",
        "/training/val_loss_after",
        "/training/steps",
    ];
    let exact: Vec<f64> = page
        .split("<data value=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(
        exact,
        paths.map(|path| written.pointer(path).unwrap().as_f64().unwrap())
    );
    // Every row of the Markdown tables stands in the page, cell by cell.
    let mut plain = page
        .replace("<code>", "`")
        .replace("</code>", "`")
        .replace('\u{a0}', " ");
    // The name of the column that a phone shows in each cell of a wide table.
    while let Some(at) = plain.find(" data-head=\"") {
        let end = at + plain[at..].find("\">").unwrap() + 1;
        plain.replace_range(at..end, "");
    }
    let rows: Vec<String> = to_markdown("e2e", &finite(&fixture()))
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
        .map(|line| {
            // The last cell may be empty.
            line[2..line.len() - 2]
                .replace(" | ", "|")
                .replace('\'', "&#39;")
        })
        .collect();
    assert!(rows.len() > 40);
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        let (first, rest) = (
            format!("<th scope=\"row\">{}</th>", cells[0]),
            cells[1..].iter().map(|c| format!("<td>{c}</td>")),
        );
        let body = format!("<tr>{first}{}</tr>", rest.collect::<String>());
        let head = cells
            .iter()
            .map(|c| format!("<th scope=\"col\">{c}</th>"))
            .collect::<String>();
        assert!(
            plain.contains(&body) || plain.contains(&format!("<tr>{head}</tr>")),
            "{row}"
        );
    }
}

/// The picture with this id, and from it the numbers in the attributes of the first tag of a class.
fn numbers(page: &str, id: &str, class: &str) -> Vec<f64> {
    let picture = page
        .split(&format!("aria-labelledby=\"{id}-t"))
        .nth(1)
        .unwrap()
        .split("</svg>")
        .next()
        .unwrap();
    let tag = picture
        .split(&format!("class=\"{class}\""))
        .nth(1)
        .unwrap_or_else(|| panic!("no {class} in {picture}"));
    let attributes = tag.split('>').next().unwrap();
    attributes
        .split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-'))
        .filter_map(|n| n.parse().ok())
        .collect()
}

#[test]
fn losses_are_plotted_over_cumulative_energy() {
    let page = page();
    // 151 J = 41.94 mWh; 3,451 J = 0.9586 Wh.
    assert!(page.contains("<title>step 0: validation loss 3.25 after 151 J (41.94 mWh)</title>"));
    assert!(
        page.contains("<title>step 150: validation loss 2.05 after 3.451 kJ (0.9586 Wh)</title>")
    );
    // The axis begins at nothing spent and the budget of 3,600 J fixes its scale; "x1" and "y1" leave a 1 before each number.
    let base = numbers(&page, "loss-wide", "base");
    let rule = numbers(&page, "loss-wide", "rule");
    let first = numbers(&page, "loss-wide", "mark validation");
    let (zero, budget) = (base[1], rule[1]);
    let expected = zero + (budget - zero) * 151.0 / 3600.0;
    assert!(
        (first[0] - expected).abs() < 0.2,
        "{zero} {budget} {first:?}"
    );
    assert!(page.contains(">budget 3.6 kJ</text>"));
    // Step 75 has no loss: the line is in two parts.
    let line = page
        .split("class=\"line training\" d=\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    assert_eq!(
        (line.matches('M').count(), line.matches('L').count()),
        (2, 147)
    );
}

#[test]
fn a_wide_range_of_losses_has_a_logarithmic_axis() {
    assert!(!page().contains("(logarithmic)"));
    let mut report = fixture();
    report.training.val_loss_before = Some(3.7);
    let mut history = history();
    history.steps[149].val_loss = Some(0.0037);
    assert!(
        to_html("run", &report, &history).contains(">loss, nats per token (logarithmic)</text>")
    );
}

#[test]
fn a_distant_budget_is_named_and_not_drawn() {
    let mut report = fixture();
    report.budget.limits.energy = Some(Joules(360_000.0));
    let page = to_html("run", &report, &history());
    assert!(page.contains("The energy budget of 360 kJ (100 Wh) is beyond the plotted range."));
    assert!(!page.contains("class=\"rule\""));
}

#[test]
fn a_run_without_steps_has_no_plots() {
    let page = to_html("run", &fixture(), &History::default());
    tags(&page);
    assert!(page.contains("No steps recorded"));
}

#[test]
fn no_chart_shows_a_non_finite_number() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0] {
        let (mut report, mut history) = (fixture(), history());
        report.training.val_loss_before = Some(bad);
        report.training.val_loss_after = Some(bad);
        report.energy.total.low = Joules(bad);
        report.energy.meters.timed_j = Some(Joules(bad));
        report.budget.limits.energy = Some(Joules(bad));
        report.budget.limits.carbon = Some(GramsCo2e(bad));
        report
            .baselines
            .iter_mut()
            .for_each(|baseline| baseline.energy = Some(Interval::exact(Joules(bad))));
        if bad == 0.0 {
            report.energy.total = Interval::exact(Joules(0.0));
            report.carbon.emissions = Interval::exact(GramsCo2e(0.0));
            report
                .energy
                .by_phase
                .values_mut()
                .for_each(|joules| *joules = Joules(0.0));
        }
        for step in &mut history.steps {
            (step.loss, step.val_loss, step.lr) = (Some(bad), Some(bad), bad);
        }
        let page = to_html("run", &report, &history);
        tags(&page);
        let mut words = page.split(|c: char| !c.is_ascii_alphanumeric());
        assert!(
            !words.any(|word| ["nan", "inf"].contains(&word.to_lowercase().as_str())),
            "{bad}: {page}"
        );
    }
}

/// A finished run's directory.
fn run_directory() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("recipe.toml"), "").unwrap();
    fs::write(run.join("plan.json"), "{}").unwrap();
    fs::write(run.join("plan.json"), "{}").unwrap();
    fs::write(run.join(files::EMISSIONS_CSV), "timestamp\nnow\n").unwrap();
    let report = to_json(&finite(&fixture())).unwrap();
    wattune::files::write_atomic(&run.join(files::REPORT_JSON), &report).unwrap();
    let mut log = StepLog::append_to(&run.join(files::STEPS_JSONL)).unwrap();
    let mut ledger = Ledger::create(&run.join("ledger.jsonl"), "run").unwrap();
    let history = history();
    history
        .steps
        .iter()
        .for_each(|record| log.write(record).unwrap());
    ledger.lease(Lease::default(), Seconds::ZERO).unwrap();
    history
        .entries
        .iter()
        .for_each(|entry| ledger.append(entry).unwrap());
    ledger.settle(Seconds::ZERO).unwrap();
    (folder, run)
}

#[test]
fn the_command_prints_every_form() {
    let (_folder, run) = run_directory();
    let shown = |arguments: &[&str]| {
        let output = Command::cargo_bin("wattune")
            .unwrap()
            .arg("report")
            .arg(&run)
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    let name = "run".to_string();
    // What is read back from the files is what was written to them.
    assert_eq!(
        shown(&["--format", "html"]),
        (Some(0), to_html(&name, &fixture(), &history()))
    );
    assert_eq!(
        shown(&["--format", "md"]),
        (Some(0), to_markdown(&name, &finite(&fixture())).unwrap())
    );
    assert_eq!(
        shown(&["--format", "csv"]),
        (Some(0), "timestamp\nnow\n".to_string())
    );
    assert_eq!(shown(&["--format", "json"]), shown(&["--json"]));
    assert_eq!(shown(&["--format", "text"]), shown(&[]));
    let (code, message) = shown(&["--json", "--format", "md"]);
    assert!(
        code == Some(2) && message.contains("contradict"),
        "{message}"
    );
}

/// Two runs: the fixture, and one that stopped half-way with two thirds of the gain.
fn two_runs() -> Vec<(String, Report, History)> {
    let mut half = fixture();
    half.energy.total = Interval::exact(Joules(1801.0));
    half.energy.meters.counted_j = Joules(1801.0);
    (half.training.steps, half.training.val_loss_after) = (75, Some(2.45));
    let mut course = history();
    course.steps.truncate(75);
    course.entries.truncate(2 + 75);
    vec![
        ("runs/whole".to_string(), fixture(), history()),
        ("runs/half".to_string(), half, course),
    ]
}

fn comparison_of(runs: Vec<(String, Report, History)>) -> (Comparison, String) {
    let named: Vec<(String, FiniteReport)> = runs
        .iter()
        .map(|(name, report, _)| (name.clone(), finite(report)))
        .collect();
    let comparison = compare(&named);
    let runs: Vec<(FiniteReport, History)> = runs
        .into_iter()
        .map(|(_, report, history)| (finite(&report), history))
        .collect();
    let page = comparison_page(&comparison, &runs).unwrap();
    (comparison, page)
}

#[test]
fn the_comparison_page_matches_the_other_formats() {
    let (comparison, page) = comparison_of(two_runs());
    tags(&page);
    // 1.2 / 3.582 = 0.3350 against 0.8 / 1.801 = 0.4442 nats a kilojoule.
    assert_eq!(comparison.best.as_deref(), Some("runs/half"));
    let verdict = "Largest loss reduction per joule: runs/half.";
    assert!(page.contains(verdict) && comparison.text().contains(verdict));
    let plain = page.replace('\u{a0}', " ");
    for row in comparison.table().rows() {
        assert!(
            row.iter()
                .all(|cell| plain.contains(&format!(">{cell}</t"))),
            "{row:?}"
        );
    }
    assert!(
        page.contains(">half (best)</span>")
            && page.contains(">0.4442</span>")
            && page.contains(">0.335</span>")
    );
    // Both courses end where their runs did: 3,451 J and 151 + 75 x 22 = 1,801 J of an axis to 3,582 J.
    let ends: Vec<f64> = ["run-0", "run-1"]
        .map(|class| last_x(&page, "losses-wide", class))
        .to_vec();
    let zero = numbers(&page, "losses-wide", "base")[1];
    assert!(
        ((ends[1] - zero) / (ends[0] - zero) - 1801.0 / 3451.0).abs() < 2e-3,
        "{zero} {ends:?}"
    );
}

/// Where the line of this class ends.
fn last_x(page: &str, id: &str, class: &str) -> f64 {
    let picture = page
        .split(&format!("aria-labelledby=\"{id}-t"))
        .nth(1)
        .unwrap();
    let line = picture
        .split(&format!("class=\"line {class}\" d=\""))
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    line.rsplit(['M', 'L'])
        .next()
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn a_comparison_of_unknown_losses_plots_nothing() {
    let mut runs = two_runs();
    for (_, report, history) in &mut runs {
        (
            report.training.val_loss_before,
            report.training.val_loss_after,
        ) = (None, None);
        *history = History::default();
    }
    runs[1].0 = "else/<whole>&".to_string();
    let (comparison, page) = comparison_of(runs);
    tags(&page);
    assert_eq!(comparison.best, None);
    assert!(page.contains("Runs are not ranked.") && !page.contains("Loss vs energy"));
    assert!(page.contains("&lt;whole&gt;&amp;") && !page.to_lowercase().contains("nan"));
}

#[test]
fn budget_use_is_plotted() {
    // 3,451 of 3,600 J after the last step: 95.9 %; 152 entries of 0.1 s of 600 s by then: 2.5 %.
    assert!(page().contains("After the last step: energy 95.9 %, time 2.5 %."));
    let mut report = fixture();
    (report.budget.limits.energy, report.budget.limits.time) = (None, None);
    let page = to_html("run", &report, &history());
    assert!(!page.contains("budget used"));
}

#[test]
fn ranges_are_drawn_over_the_bars() {
    // From 2,865.6 to 4,298.4 J: ln(1.5) long on a logarithmic scale.
    let page = page();
    let bars = page.split("id=\"comparison\"").nth(1).unwrap();
    let percent = |name: &str| -> f64 {
        let value = bars.split(&format!("--{name}:")).nth(1).unwrap();
        value.split('%').next().unwrap().parse().unwrap()
    };
    let [width, low, high] = ["width", "low", "high"].map(percent);
    assert!(low < width && width < high, "{low} {width} {high}");
    let share = (width - low) / (high - low);
    // ln(3582 / 2865.6) / ln(1.5) = 0.5503.
    assert!((share - 0.5503).abs() < 0.02, "{share}");
}

#[test]
fn a_trained_baseline_is_drawn_next_to_the_run() {
    assert!(!page().contains("equal energy"));
    let point = |step, joules, train_loss, val_loss| CurvePoint {
        step,
        energy_j: Joules(joules),
        train_loss,
        val_loss,
    };
    let mut report = fixture();
    report.training.curve = vec![
        point(0, 0.0, None, Some(3.25)),
        point(150, 3300.0, Some(1.98), Some(2.05)),
    ];
    let scratch = &mut report.baselines[1];
    assert_eq!(scratch.kind, BaselineKind::FromScratchSameTask);
    scratch.measured = Some(MeasuredBaseline {
        steps: 75,
        steps_at_equal_energy: 150,
        stop_reason: BaselineStop::Budget,
        learning_rate: 2e-4,
        run_training_j: Joules(3300.0),
        training_j: Joules(1650.0),
        run_val_loss: 2.05,
        equal_loss: EqualLoss {
            how: Reached::No,
            energy_j: None,
            times: None,
            tried_j: Joules(1650.0),
        },
        curve: vec![
            point(0, 0.0, None, Some(7.0)),
            point(75, 1650.0, Some(6.9), Some(6.9)),
        ],
    });
    let page = to_html("run", &report, &history());
    tags(&page);
    // Half of the run's training energy is half-way to the line of equal energy, where the run itself ends.
    let (zero, equal) = (
        numbers(&page, "baselines-wide", "base")[1],
        numbers(&page, "baselines-wide", "rule")[1],
    );
    assert!((last_x(&page, "baselines-wide", "run-0") - equal).abs() < 0.2);
    assert!((last_x(&page, "baselines-wide", "run-1") - (zero + equal) / 2.0).abs() < 0.2);
    assert!(page.contains("<li class=\"key line run-1\">from scratch, same task</li>"));
}
