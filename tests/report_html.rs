//! The page with charts: well-formed, closed to the outside, and with the numbers of `report.json`.
//!
//! From `tests/fixtures/report.json` and a course that adds up to its 3,582 J: load 40, evaluation 111, 150 steps of 22 J,
//! evaluation 111, save 20. So the first step begins at 151 J and the last ends at 3,451 J.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use wattune::energy::Energies;
use wattune::energy::ledger::{Entry, Lease, Ledger, Phase};
use wattune::report::html::to_html;
use wattune::report::types::Report;
use wattune::report::{History, StepEnergy, StepLog, StepRecord, files, json, markdown};
use wattune::units::{GramsCo2e, Joules, Seconds};

const HOSTILE: &str =
    "</pre></title><script>alert(1)</script>\"' onload=x <img src=\"https://example.org/a.png\"> & `<b>`\u{0}\u{1b}[2J";

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
        energy_j: StepEnergy { counted: Joules(22.0), measured: None, timed: Some(Joules(36.0)) },
        wall_s: Seconds(0.8),
        val_loss,
    }
}

fn entry(phase: Phase, step: u64, joules: f64) -> Entry {
    let energy = Joules(joules).rounded();
    let energy_j = Energies { counted: energy, measured: None, timed: energy };
    Entry { phase, step, energy_j, flops: 1, bytes: Default::default(), wall_s: Seconds(0.1), t: 0.0, gap: None }
}

fn history() -> History {
    let start = [entry(Phase::Load, 0, 40.0), entry(Phase::Eval, 0, 111.0)];
    let end = [entry(Phase::Eval, 150, 111.0), entry(Phase::Save, 150, 20.0)];
    let entries = start.into_iter().chain((1..=150).map(|step| entry(Phase::Train, step, 22.0))).chain(end);
    History { steps: (1..=150).map(step).collect(), entries: entries.collect() }
}

fn page() -> String {
    to_html("e2e-20260131-120000", &fixture(), &history()).unwrap()
}

/// Every tag as (name, the rest of it); fails where one is not closed in order.
fn tags(page: &str) -> Vec<(String, String)> {
    let (mut open, mut found) = (Vec::new(), Vec::new());
    let document = page.strip_prefix("<!DOCTYPE html>\n").expect("a document type");
    for piece in document.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap_or_else(|| panic!("`<{piece}` has no end"));
        assert!(!text.contains('>'), "a bare > in {text}");
        let name: String = tag.trim_start_matches('/').chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_ref(), Some(&name), "</{name}> closes another tag");
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
    page.split(&format!(" {attribute}=\"")).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn the_page_is_well_formed_and_its_pictures_have_names() {
    let page = page();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&folder).unwrap();
    // For scripts/check_html.py.
    files::write_whole(&folder.join(files::REPORT_HTML), &page).unwrap();
    let tags = tags(&page);
    let pictures = tags.iter().filter(|(name, _)| name == "svg");
    // Loss, rate, phases and comparison in two widths each; energy and emissions in one.
    assert_eq!(pictures.clone().count(), 4 * 2 + 2);
    let mut ids = values(&page, "id");
    for (_, attributes) in pictures {
        let named = values(attributes, "aria-labelledby")[0];
        assert!(attributes.contains("role=\"img\"") && named.split(' ').all(|id| ids.contains(&id)), "{attributes}");
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id stands twice");
}

#[test]
fn nothing_is_loaded_and_nothing_runs() {
    let page = page();
    for way in ["src=", "href=", "url(", "@import", "://", "<script", "<link", "<iframe", " on"] {
        let found = tags(&page).into_iter().any(|(name, rest)| format!("<{name}{rest}").contains(way));
        assert!(!found, "{way}");
    }
    let style = page.split("<style>").nth(1).unwrap().split("</style>").next().unwrap();
    assert!(!["url(", "@import", "://"].iter().any(|way| style.contains(way)));
    assert!(page.contains("content=\"default-src 'none'; style-src 'unsafe-inline'\""));
}

#[test]
fn texts_from_outside_stay_texts() {
    let text = || HOSTILE.to_string();
    let mut report = fixture();
    let sample = report.sample.as_mut().unwrap();
    (sample.prompt, sample.before, sample.after) = (text(), text(), text());
    (report.model.id, report.model.architecture, report.carbon.grid) = (text(), text(), text());
    (report.environment.cpu, report.environment.version, report.energy.device) = (text(), text(), text());
    report.carbon.source = Some(text());
    report.data.sources = vec![text()];
    report.warnings = vec![text()];
    report.baselines[0].source = text();
    report.baselines[0].assumptions = vec![text()];
    let hostile = to_html(HOSTILE, &report, &history()).unwrap();
    // Code in backticks is the only markup that a text may bring.
    let shape = |page: &str| {
        let all = tags(page).into_iter().map(|(name, rest)| format!("{name}{rest}"));
        all.filter(|tag| tag != "code" && !tag.starts_with("data ")).collect::<Vec<_>>()
    };
    assert_eq!(shape(&hostile), shape(&page()));
    assert!(hostile.contains("&lt;/pre&gt;&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39; onload=x"));
    assert!(!hostile.contains(['\u{0}', '\u{1b}']));
}

#[test]
fn the_figures_are_those_of_the_other_files() {
    let page = page();
    let written: serde_json::Value = serde_json::from_str(&json::to_json(&fixture()).unwrap()).unwrap();
    let paths = ["/energy/total_j", "/carbon/gco2e", "/training/val_loss_before", "/training/val_loss_after", "/training/steps"];
    let exact: Vec<f64> =
        page.split("<data value=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse().unwrap()).collect();
    assert_eq!(exact, paths.map(|path| written.pointer(path).unwrap().as_f64().unwrap()));
    // Every row of the Markdown tables stands in the page, cell by cell.
    let plain = page.replace("<code>", "`").replace("</code>", "`");
    let rows: Vec<String> = markdown::to_markdown("e2e", &fixture())
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
        .map(|line| line.trim_matches(['|', ' ']).replace(" | ", "|").replace('\'', "&#39;"))
        .collect();
    assert!(rows.len() > 40);
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        let (first, rest) = (format!("<th scope=\"row\">{}</th>", cells[0]), cells[1..].iter().map(|c| format!("<td>{c}</td>")));
        let body = format!("<tr>{first}{}</tr>", rest.collect::<String>());
        let head = cells.iter().map(|c| format!("<th scope=\"col\">{c}</th>")).collect::<String>();
        assert!(plain.contains(&body) || plain.contains(&format!("<tr>{head}</tr>")), "{row}");
    }
}

/// The picture with this id, and from it the numbers in the attributes of the first tag of a class.
fn numbers(page: &str, id: &str, class: &str) -> Vec<f64> {
    let picture = page.split(&format!("aria-labelledby=\"{id}-t")).nth(1).unwrap().split("</svg>").next().unwrap();
    let tag = picture.split(&format!("class=\"{class}\"")).nth(1).unwrap_or_else(|| panic!("no {class} in {picture}"));
    let attributes = tag.split('>').next().unwrap();
    attributes.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-')).filter_map(|n| n.parse().ok()).collect()
}

#[test]
fn losses_stand_where_their_energy_was_spent() {
    let page = page();
    // 151 J = 41.94 mWh; 3,451 J = 0.9586 Wh.
    assert!(page.contains("<title>step 0: validation loss 3.25 after 151 J (41.94 mWh)</title>"));
    assert!(page.contains("<title>step 150: validation loss 2.05 after 3.451 kJ (0.9586 Wh)</title>"));
    // The axis begins at nothing spent and the budget of 3,600 J fixes its scale; "x1" and "y1" leave a 1 before each number.
    let base = numbers(&page, "loss-wide", "base");
    let rule = numbers(&page, "loss-wide", "rule");
    let first = numbers(&page, "loss-wide", "mark validation");
    let (zero, budget) = (base[1], rule[1]);
    let expected = zero + (budget - zero) * 151.0 / 3600.0;
    assert!((first[0] - expected).abs() < 0.2, "{zero} {budget} {first:?}");
    assert!(page.contains(">budget 3.6 kJ</text>"));
    // Step 75 has no loss: the line is in two parts.
    let line = page.split("class=\"line training\" d=\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!((line.matches('M').count(), line.matches('L').count()), (2, 147));
}

#[test]
fn a_wide_range_of_losses_is_drawn_by_ratios() {
    assert!(!page().contains("(logarithmic)"));
    let mut report = fixture();
    report.training.val_loss_before = Some(3.7);
    let mut history = history();
    history.steps[149].val_loss = Some(0.0037);
    assert!(to_html("run", &report, &history).unwrap().contains(">loss, nats per loss token (logarithmic)</text>"));
}

#[test]
fn a_budget_far_beyond_is_said_and_not_drawn() {
    let mut report = fixture();
    report.budget.limits.energy_j = Some(Joules(360_000.0));
    let page = to_html("run", &report, &history()).unwrap();
    assert!(page.contains("The energy budget of 360 kJ (100 Wh) lies beyond the edge."));
    assert!(!page.contains("class=\"rule\""));
}

#[test]
fn a_run_without_a_step_says_so() {
    let page = to_html("run", &fixture(), &History::default()).unwrap();
    tags(&page);
    assert!(page.contains("No step was recorded"));
}

#[test]
fn no_chart_shows_a_number_that_is_none() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0] {
        let (mut report, mut history) = (fixture(), history());
        report.training.val_loss_before = Some(bad);
        report.training.val_loss_after = Some(bad);
        report.energy.low_j = Some(Joules(bad));
        report.energy.meters.timed_j = Some(Joules(bad));
        report.budget.limits.energy_j = Some(Joules(bad));
        report.budget.limits.carbon_gco2e = Some(GramsCo2e(bad));
        report.baselines.iter_mut().for_each(|baseline| baseline.energy_j = Some(Joules(bad)));
        if bad == 0.0 {
            report.energy.total_j = Joules(0.0);
            report.carbon.gco2e = GramsCo2e(0.0);
            report.energy.by_phase.values_mut().for_each(|joules| *joules = Joules(0.0));
        }
        for step in &mut history.steps {
            (step.loss, step.val_loss, step.lr) = (Some(bad), Some(bad), bad);
        }
        let page = to_html("run", &report, &history).unwrap();
        tags(&page);
        let mut words = page.split(|c: char| !c.is_ascii_alphanumeric());
        assert!(!words.any(|word| ["nan", "inf"].contains(&word.to_lowercase().as_str())), "{bad}: {page}");
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
    json::write_report(&run.join(files::REPORT_JSON), &fixture()).unwrap();
    let mut log = StepLog::append_to(&run.join(files::STEPS_JSONL)).unwrap();
    let mut ledger = Ledger::create(&run.join("ledger.jsonl")).unwrap();
    let history = history();
    history.steps.iter().for_each(|record| log.write(record).unwrap());
    ledger.lease(Lease::default()).unwrap();
    history.entries.iter().for_each(|entry| ledger.append(entry).unwrap());
    ledger.settle().unwrap();
    (folder, run)
}

#[test]
fn the_command_prints_every_form() {
    let (_folder, run) = run_directory();
    let shown = |arguments: &[&str]| {
        let output = Command::cargo_bin("wattune").unwrap().arg("report").arg(&run).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let name = run.display().to_string();
    // What is read back from the files is what was written to them.
    assert_eq!(shown(&["--format", "html"]), (Some(0), to_html(&name, &fixture(), &history()).unwrap()));
    assert_eq!(shown(&["--format", "md"]), (Some(0), markdown::to_markdown(&name, &fixture()).unwrap()));
    assert_eq!(shown(&["--format", "csv"]), (Some(0), "timestamp\nnow\n".to_string()));
    assert_eq!(shown(&["--format", "json"]), shown(&["--json"]));
    assert_eq!(shown(&["--format", "text"]), shown(&[]));
    let (code, message) = shown(&["--json", "--format", "md"]);
    assert!(code == Some(2) && message.contains("contradict"), "{message}");
}
