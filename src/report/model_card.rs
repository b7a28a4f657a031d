//! The model card: `README.md` beside the trained weights.
//!
//! Owns the card's YAML front matter, as huggingface_hub reads it, and its body. Takes a report and what only the composition
//! root knows (licence, hub ids, hyperparameters), returns one text. A field that is not known is left out, never invented;
//! emissions are in grams, as the hub asks. Knows nothing of adapters' files.

use super::markdown::{fenced, one_line, to_markdown_body};
use super::show;
use super::summary::summary;
use super::table::Table;
use super::types::{AdapterType, Report};
use super::yaml;
use crate::error::Result;

/// What a card says beyond the report.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CardFacts {
    /// The card's heading.
    pub name: String,
    /// The base model's hub id (`owner/name`); `None` for a local or embedded model, which the hub cannot link.
    pub base_model: Option<String>,
    /// The licence's hub identifier ("apache-2.0"), as the base model states it.
    pub license: Option<String>,
    /// Hub ids of the training data.
    pub datasets: Vec<String>,
    /// Where the electricity was used, in words.
    pub location: Option<String>,
    /// The device, in words.
    pub hardware: Option<String>,
    /// Name and value of each hyperparameter, in reading order.
    pub hyperparameters: Vec<(String, String)>,
}

/// The card of a trained adapter, or of a model whose every weight was trained.
///
/// # Errors
/// As [`Report::sealed`].
pub fn to_model_card(facts: &CardFacts, report: &Report) -> Result<String> {
    let mut report = report.clone().sealed()?;
    // How to open a counter on the machine that trained is of no use to who downloads the card.
    report.energy.measured_absent = None;
    let sections = [
        front_matter(facts, &report),
        format!(
            "# {}\n\n{}\n",
            one_line(&facts.name),
            one_line(&summary(&report))
        ),
        how_trained(facts, &report),
        format!(
            "## Energy and emissions\n\n{}",
            to_markdown_body(&report, &["Energy by meter", "Comparison", "Emissions"])
        ),
        loading(facts, &report),
    ];
    Ok(sections.join("\n"))
}

/// Everything between the two `---` lines, and those.
fn front_matter(facts: &CardFacts, report: &Report) -> String {
    let mut lines = vec!["---".to_string()];
    let mut field = |name: &str, value: &Option<String>| {
        lines.extend(
            value
                .as_ref()
                .map(|value| format!("{name}: {}", yaml::quoted(value))),
        );
    };
    let lora = report.adapter.r#type == AdapterType::Lora;
    field("base_model", &facts.base_model);
    field(
        "library_name",
        &Some(if lora { "peft" } else { "transformers" }.to_string()),
    );
    field("license", &facts.license);
    field("pipeline_tag", &Some("text-generation".to_string()));
    if !facts.datasets.is_empty() {
        lines.push("datasets:".to_string());
        lines.extend(
            facts
                .datasets
                .iter()
                .map(|id| format!("  - {}", yaml::quoted(id))),
        );
    }
    lines.push("tags:".to_string());
    let tags: &[&str] = if lora {
        &["lora", "wattune"]
    } else {
        &["wattune"]
    };
    lines.extend(tags.iter().map(|tag| format!("  - {}", yaml::quoted(tag))));
    lines.extend(emissions(facts, report));
    lines.push("---\n".to_string());
    lines.join("\n")
}

/// The hub's `co2_eq_emissions` mapping; empty where the grams are not a number.
fn emissions(facts: &CardFacts, report: &Report) -> Vec<String> {
    let Some(grams) = yaml::number(report.carbon.gco2e.0) else {
        return Vec::new();
    };
    let grid = &report.carbon.grid;
    let source = format!(
        "wattune {}: {} energy, grid {grid} at {} gCO2e/kWh, PUE {}",
        report.environment.version,
        show::word(report.energy.meter),
        show::number(report.carbon.gco2e_per_kwh.0),
        show::number(report.carbon.pue.value())
    );
    let mut lines = vec![
        "co2_eq_emissions:".to_string(),
        format!("  emissions: {grams}"),
        format!("  source: {}", yaml::quoted(&source)),
        format!("  training_type: {}", yaml::quoted("fine-tuning")),
    ];
    let known = [
        ("geographical_location", &facts.location),
        ("hardware_used", &facts.hardware),
    ];
    lines.extend(
        known.iter().filter_map(|(name, value)| {
            Some(format!("  {name}: {}", yaml::quoted(value.as_ref()?)))
        }),
    );
    lines
}

fn how_trained(facts: &CardFacts, report: &Report) -> String {
    let mut table = Table::new(&["hyperparameter", "value"]);
    for (name, value) in &facts.hyperparameters {
        table.row([format!("`{name}`"), value.clone()]);
    }
    let data = &report.data;
    let records = format!(
        "Trained on {} ({}, {} of them with a loss).",
        show::counted(data.examples, "record"),
        show::counted(data.tokens, "token"),
        show::count(data.loss_tokens)
    );
    let hyperparameters = if facts.hyperparameters.is_empty() {
        String::new()
    } else {
        format!("\n{}", table.markdown())
    };
    format!("## How it was trained\n\n{records}\n{hyperparameters}")
}

/// Code that loads it, `.` standing for the card's own folder.
fn loading(facts: &CardFacts, report: &Report) -> String {
    let base = serde_json::Value::from(
        facts
            .base_model
            .clone()
            .unwrap_or_else(|| report.model.id.clone()),
    )
    .to_string();
    let code = match report.adapter.r#type {
        AdapterType::Lora => format!(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             base = AutoModelForCausalLM.from_pretrained({base})\n\
             model = PeftModel.from_pretrained(base, \".\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\".\")"
        ),
        AdapterType::None => "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             model = AutoModelForCausalLM.from_pretrained(\".\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\".\")"
            .to_string(),
    };
    let missing = match facts.base_model {
        None if report.adapter.r#type == AdapterType::Lora => {
            format!(
                "The base model `{}` is not on the hub: put the path of its folder there.\n\n",
                one_line(&report.model.id)
            )
        }
        _ => String::new(),
    };
    let where_it_is = "In this folder, with `\".\"` replaced by its path elsewhere:";
    format!(
        "## How to load it\n\n{where_it_is}\n\n{missing}{}",
        fenced(&code, "python")
    )
}
