//! Pages made from templates: HTML with charts, Markdown, model card, comparison of runs.
//!
//! HTML is escaped automatically and may hold neither scripts nor anything to be loaded (its content security policy forbids
//! both). Figures carry the exact value of `report.json` in `<data value>`. Knows nothing of what a section says.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Output, State, UndefinedBehavior, Value, context};
use serde::Serialize;

use super::bars::{energies_of_runs, rates_of_runs, section_figure};
use super::compare::{Comparison, Row};
use super::figures::{Figure, growth_figures, loss_figures, losses_of_runs};
use super::finite::FiniteReport;
use super::format;
use super::history::History;
use super::sections::{Block, Section, bullets, sections};
use super::summary::summary;
use super::types::AdapterType;
use crate::error::{Error, Kind, Result};
use crate::units::{GramsCo2e, Joules, Seconds};

static TEMPLATES: LazyLock<Environment<'static>> = LazyLock::new(environment);

fn environment() -> Environment<'static> {
    let sources = [
        ("layout.html", include_str!("templates/layout.html")),
        ("style.css", include_str!("templates/style.css")),
        ("blocks.html", include_str!("templates/blocks.html")),
        ("report.html", include_str!("templates/report.html")),
        ("compare.html", include_str!("templates/compare.html")),
        ("data.html", include_str!("templates/data.html")),
        ("blocks.md", include_str!("templates/blocks.md")),
        ("report.md", include_str!("templates/report.md")),
        ("model_card.md", include_str!("templates/model_card.md")),
    ];
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(true)
        .build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_formatter(write_escaped);
    environment.add_filter("joules", |value: f64| Joules(value).to_string());
    environment.add_filter("watt_hours", |value: f64| format::watt_hours(Joules(value)));
    environment.add_filter("grams", |value: f64| format::carbon(GramsCo2e(value)));
    environment.add_filter("duration", |value: f64| format::time(Seconds(value)));
    environment.add_filter("number", format::number);
    environment.add_filter("count", format::count);
    environment.add_filter("counted", format::counted);
    environment.add_filter("inline", inline);
    environment.add_filter("unbroken", unbroken);
    environment.add_filter("one_line", one_line);
    environment.add_filter("cell", cell);
    environment.add_filter("fenced", fenced);
    environment.add_filter("quoted", quoted);
    for (name, source) in sources {
        environment
            .add_template(name, source)
            .expect("the templates of the crate parse: every test of a page loads them");
    }
    environment
}

fn render(name: &str, context: Value) -> Result<String> {
    let template = TEMPLATES.get_template(name);
    let page = template.and_then(|template| template.render(context));
    page.map_err(|error| Error::new(Kind::Run, format!("cannot write the page: {error:#}")))
}

/// A page of the records of the recipe `name`; `preview` is what `wattune data --json` prints.
///
/// # Errors
/// [`Kind::Run`] where the template fails.
pub fn data_page(name: &str, preview: &impl Serialize) -> Result<String> {
    let title = format!("{}: records as they are trained", one_line(name));
    let version = env!("CARGO_PKG_VERSION");
    render(
        "data.html",
        context! { title, preview => Serde(preview), version },
    )
}

/// `report.html` of the run `name`.
///
/// # Errors
/// [`Kind::Run`] where the template fails.
pub fn to_html(name: &str, report: &FiniteReport, history: &History) -> Result<String> {
    let name = one_line(name);
    let timeline = history.timeline(report, report.energy.meter);
    let sections = sections(report);
    let figures: BTreeMap<&str, Figure> = sections
        .iter()
        .filter_map(|section| Some((section.title, section_figure(report, section.title)?)))
        .collect();
    render(
        "report.html",
        context! {
            title => format!("{name}, {}: energy report", one_line(&report.model.id)),
            name,
            summary => summary(report),
            energy_range => format::range(&report.energy.total, |joules| joules.to_string()),
            emissions_range => format::range(&report.carbon.emissions, format::carbon),
            report => Serde(report),
            loss_unit => report.training.loss_unit.words(),
            recorded => !timeline.points.is_empty(),
            loss => Serde(loss_figures(report, &timeline)),
            growth => Serde(growth_figures(report, &timeline)),
            sections => Serde(sections),
            figures => Serde(figures),
        },
    )
}

/// The page of `comparison`; `runs` in the order of its rows.
///
/// # Errors
/// [`Kind::Run`] where the template fails.
pub fn comparison_page(
    comparison: &Comparison,
    runs: &[(FiniteReport, History)],
) -> Result<String> {
    let names = short_names(&comparison.runs);
    let heading = format!("Comparison of {} runs", comparison.runs.len());
    let histories = runs.iter().map(|(report, history)| (&**report, history));
    let loss: Vec<Figure> = losses_of_runs(comparison, &names, histories)
        .into_iter()
        .chain(rates_of_runs(comparison, &names))
        .collect();
    let table = Block::Table(comparison.table());
    let figures: Vec<Block> = [table]
        .into_iter()
        .chain(bullets(comparison.ranges()))
        .collect();
    render(
        "compare.html",
        context! {
            title => format!("{heading}: energy and loss"),
            heading,
            lead => format!("{} {}", comparison.verdict(), comparison.basis()),
            loss => Serde(loss),
            energy => Serde(energies_of_runs(comparison, &names)),
            figures => Serde(figures),
            notes => Serde(bullets(comparison.notes.clone())),
            version => env!("CARGO_PKG_VERSION"),
        },
    )
}

/// The last parts of the runs' paths, where they are unique.
fn short_names(rows: &[Row]) -> Vec<String> {
    let last = |row: &Row| {
        let name = row.name.trim_end_matches('/');
        name.rsplit('/').next().unwrap_or(name).to_string()
    };
    let short: Vec<String> = rows.iter().map(last).collect();
    let ambiguous = short
        .iter()
        .enumerate()
        .any(|(index, name)| name.is_empty() || short[..index].contains(name));
    if ambiguous {
        rows.iter().map(|row| row.name.clone()).collect()
    } else {
        short
    }
}

/// `report.md` of the run `name`.
///
/// # Errors
/// [`Kind::Run`] where the template fails.
pub fn to_markdown(name: &str, report: &FiniteReport) -> Result<String> {
    let context = context! {
        name,
        summary => summary(report),
        sections => Serde(sections(report)),
    };
    render("report.md", context)
}

/// Facts of a model card that are not in the report.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct CardFacts {
    /// The card's heading.
    pub name: String,
    /// Hub id of the base model; `None` for a local or embedded model, which the hub cannot link.
    pub base_model: Option<String>,
    /// Hub identifier of the base model's licence, such as "apache-2.0".
    pub license: Option<String>,
    /// Hub ids of the training data.
    pub datasets: Vec<String>,
    /// Location of the electricity.
    pub location: Option<String>,
    /// The device.
    pub hardware: Option<String>,
    /// Name and value of each hyperparameter, in reading order.
    pub hyperparameters: Vec<(String, String)>,
}

/// The model card of an adapter or a fully trained model: YAML front matter for the hub, then Markdown. Unknown fields are left
/// out; emissions are in grams, as the hub asks.
///
/// # Errors
/// [`Kind::Run`] where the template fails.
pub fn to_model_card(card: &CardFacts, report: &FiniteReport) -> Result<String> {
    let context = context! {
        card => Serde(card),
        report => Serde(report),
        lora => report.adapter.r#type == AdapterType::Lora,
        pipeline => pipeline(&report.model.architecture),
        // YAML 1.1 reads `1e-5` as text: plain decimals.
        grams => report.carbon.emissions.central.0.to_string(),
        summary => summary(report),
        sections => Serde(card_sections(report, &["Energy by meter", "Comparison", "Emissions"])),
        portability => Serde(card_sections(report, &["Portability"])),
    };
    render("model_card.md", context)
}

/// The hub's name of what a model of this class does.
fn pipeline(class: &str) -> &'static str {
    if class.ends_with("ForSequenceClassification") {
        "text-classification"
    } else if class.ends_with("ForTokenClassification") {
        "token-classification"
    } else {
        "text-generation"
    }
}

/// The sections with these titles. How to open a counter on the training machine is of no use to readers of the card.
fn card_sections(report: &FiniteReport, titles: &[&str]) -> Vec<Section> {
    let mut report = report.clone().into_inner();
    report.energy.measured_absent = None;
    let all = sections(&report).into_iter();
    all.filter(|section| titles.contains(&section.title))
        .collect()
}

/// Writes `value`, escaped by [`escape`] in HTML templates unless it is markup.
fn write_escaped(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> std::result::Result<(), minijinja::Error> {
    if *state.auto_escape() == AutoEscape::Html && !value.is_safe() {
        return out
            .write_str(&escape(&value.to_string()))
            .map_err(Into::into);
    }
    minijinja::escape_formatter(out, state, value)
}

/// `text` as HTML or SVG text or attribute value. Control characters, which XML rejects, are left out.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

/// HTML on one line, with code between pairs of backticks.
fn inline(text: String) -> Value {
    let line = one_line(&text);
    let parts: Vec<&str> = line.split('`').collect();
    // An even number of parts means an unpaired backtick.
    if parts.len().is_multiple_of(2) {
        return Value::from_safe_string(escape(&line));
    }
    let part = |(index, part): (usize, &&str)| match index % 2 {
        0 => escape(part),
        _ => format!("<code>{}</code>", escape(part)),
    };
    Value::from_safe_string(parts.iter().enumerate().map(part).collect())
}

/// HTML with no-break spaces between numbers and their units.
fn unbroken(html: String) -> Value {
    const WORDS: [&str; 6] = ["and", "to", "of", "on", "in", "at"];
    let mut out = String::with_capacity(html.len());
    for (index, word) in html.split(' ').enumerate() {
        let unit =
            word.starts_with(|c: char| c.is_alphabetic() || c == '%') && !WORDS.contains(&word);
        if index > 0 {
            let joined = unit && out.ends_with(|c: char| c.is_ascii_digit());
            out.push(if joined { '\u{a0}' } else { ' ' });
        }
        out += word;
    }
    Value::from_safe_string(out)
}

/// `text` on one line: a line feed in a name or a warning starts no heading and no list.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A cell of a Markdown table.
fn cell(text: &str) -> String {
    one_line(&text.replace('\\', "\\\\").replace('|', "\\|"))
}

/// A Markdown code block, its fence longer than any run of backticks inside.
fn fenced(text: &str, language: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let text = text.trim_end_matches('\n');
    format!("{fence}{language}\n{text}\n{fence}")
}

/// A double-quoted string that JSON, Python, YAML 1.1 and 1.2 read back unchanged: `no` and `24_700_000` stay strings.
fn quoted(text: &str) -> String {
    // YAML's `c-printable` (YAML 1.2.2, section 5.1) without line separators and the byte order mark, which readers fold or
    // strip; everything else lies in the basic plane.
    let plain = |c| {
        matches!(c, ' '..='~' | '\u{A0}'..='\u{2027}' | '\u{202A}'..='\u{D7FF}' | '\u{E000}'..='\u{FEFE}'
            | '\u{FF00}'..='\u{FFFD}' | '\u{10000}'..='\u{10FFFF}')
    };
    let json = serde_json::Value::from(text).to_string();
    let escaped = json.chars().map(|c| {
        if plain(c) {
            c.to_string()
        } else {
            format!("\\u{:04X}", u32::from(c))
        }
    });
    escaped.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_opens_a_tag_or_ends_an_attribute() {
        assert_eq!(
            escape("<b class=\"x\">&'\u{1b}[2J\u{0}</b>"),
            "&lt;b class=&quot;x&quot;&gt;&amp;&#39;[2J&lt;/b&gt;"
        );
        assert_eq!(escape("a\n\tb"), "a\n\tb");
    }

    #[test]
    fn backticks_become_code_in_pairs_alone() {
        let html = |text: &str| inline(text.to_string()).to_string();
        assert_eq!(
            html("run `a<b` on `c`"),
            "run <code>a&lt;b</code> on <code>c</code>"
        );
        assert_eq!(html("one ` alone\nhere"), "one ` alone here");
    }

    #[test]
    fn a_number_keeps_its_unit() {
        let html = |text: &str| unbroken(text.to_string()).to_string();
        assert_eq!(
            html("64.73 J (17.98 mWh), 85.2 %"),
            "64.73\u{a0}J (17.98\u{a0}mWh), 85.2\u{a0}%"
        );
        assert_eq!(html("between 2 and 3"), "between 2 and 3");
        assert_eq!(html("a b"), "a b");
    }

    #[test]
    fn a_text_cannot_close_its_fence_or_cell() {
        assert_eq!(fenced("a", "text"), "```text\na\n```");
        assert_eq!(
            fenced("x\n````\ny\n", "text"),
            "`````text\nx\n````\ny\n`````"
        );
        assert_eq!(one_line("a\n# b"), "a # b");
        assert_eq!(cell("two\nlines \\| z|y"), "two lines \\\\\\| z\\|y");
    }

    #[test]
    fn quoted_strings_survive() {
        for text in [
            "no",
            "24_700_000",
            "a: b #c",
            "two\nlines\r\n\ttab",
            "\"quoted\" \\",
            "\u{85}\u{2028}\u{FEFF}\u{7F}\u{1}",
            "é😀",
        ] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
        }
        assert_eq!(quoted("\u{85}x\u{1}"), "\"\\u0085x\\u0001\"");
    }

    proptest::proptest! {
        #[test]
        fn any_quoted_string_survives(text: String) {
            let quoted = quoted(&text);
            proptest::prop_assert!(!quoted.contains(char::is_control));
            proptest::prop_assert_eq!(serde_json::from_str::<String>(&quoted).unwrap(), text);
        }
    }
}
