//! The `inference` block of `report.json`: what the model takes once it is in use.
//!
//! Owns its types and how its section reads. Takes counted figures with their assumptions; nothing here was measured, and the page says so.
//! Knows nothing of how work is counted.

use serde::{Deserialize, Serialize};

use super::page::Block;
use super::show;
use super::table::Table;
use crate::units::{GramsCo2e, Joules, Seconds};

/// What a request takes, counted on the run's device profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// The device profile.
    pub device: String,
    /// Tokens of a request's prompt.
    pub prompt_tokens: u64,
    /// Tokens of its answer.
    pub generated_tokens: u64,
    /// Before and after training.
    pub models: Vec<Served>,
    /// What would be prompted instead; `None` where nothing is comparable.
    pub alternative: Option<Alternative>,
    /// The first year, where the recipe says how many requests come.
    pub year: Option<Year>,
    /// What has to hold for it.
    pub assumptions: Vec<String>,
}

/// Which model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServedModel {
    /// The model before training.
    Base,
    /// The model with its adapter beside it.
    Adapter,
    /// The adapter merged into the weights.
    Merged,
    /// The model of which every weight was trained.
    Trained,
}

/// What one model takes for a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// Which.
    pub model: ServedModel,
    /// FLOPs of a request.
    pub request_flops: u64,
    /// Energy of reading the prompt.
    pub prompt_j: Joules,
    /// Energy of a whole request.
    pub request_j: Joules,
    /// Energy of 1,000 generated tokens, their prompts included.
    pub per_1000_tokens_j: Joules,
    /// The same in emissions, facility overhead included.
    pub per_1000_tokens_gco2e: GramsCo2e,
    /// The bounds of the two; `None` in a report that was written before there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_bounds: Option<Bounds>,
}

/// The bounds of a counted energy and of its emissions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// With every coefficient at the end that gives least.
    pub low_j: Joules,
    /// At the end that gives most.
    pub high_j: Joules,
    /// The least energy on the grid at its lowest.
    pub low_gco2e: GramsCo2e,
    /// The most on the grid at its highest.
    pub high_gco2e: GramsCo2e,
}

/// What sort of thing would be prompted instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlternativeKind {
    /// A larger model with the same prompt.
    LargerModel,
    /// The base model with examples in its prompt.
    FewShot,
}

/// Prompting instead of fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// Which sort.
    pub kind: AlternativeKind,
    /// In words.
    pub name: String,
    /// Parameters of the model that answers.
    pub parameters: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Energy of a request.
    pub request_j: Joules,
    /// Energy of 1,000 generated tokens, their prompts included.
    pub per_1000_tokens_j: Joules,
    /// The same in emissions, facility overhead included; `None` in a report that was written before they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_gco2e: Option<GramsCo2e>,
    /// The bounds of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_1000_tokens_bounds: Option<Bounds>,
    /// What the fine-tuned model takes less, a request; negative where it takes more.
    pub saved_per_request_j: Joules,
    /// Requests after which the run's whole energy is saved; `None` where a request saves nothing.
    pub pays_after_requests: Option<u64>,
}

/// The first year of use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Year {
    /// Requests a day.
    pub requests_per_day: f64,
    /// Requests in 365 days.
    pub requests: f64,
    /// Energy of them.
    pub energy_j: Joules,
    /// Their emissions, facility overhead included.
    pub gco2e: GramsCo2e,
    /// The bounds of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Bounds>,
    /// Use over use and fine-tuning together.
    pub share_of_life_cycle: f64,
    /// Fine-tuning over the same.
    pub fine_tuning_share: f64,
    /// Days after which the run's whole energy is saved.
    pub pays_after_days: Option<f64>,
}

/// The section of a page.
pub(super) fn section(inference: Option<&Inference>) -> Vec<Block> {
    let Some(inference) = inference else {
        return Vec::new();
    };
    let mut table = Table::new(&[
        "model in use",
        "energy of 1,000 tokens",
        "of a request",
        "emissions of 1,000 tokens",
    ]);
    for served in &inference.models {
        let name = match served.model {
            ServedModel::Base => "base model",
            ServedModel::Adapter => "with its adapter, not merged",
            ServedModel::Merged => "with its adapter merged",
            ServedModel::Trained => "trained model",
        };
        let bounds = served.per_1000_tokens_bounds.as_ref();
        let emissions = show::carbon(served.per_1000_tokens_gco2e) + &grams_between(bounds);
        table.row([
            name.to_string(),
            per_1000(served.per_1000_tokens_j, bounds),
            show::energy(served.request_j),
            emissions,
        ]);
    }
    if let Some(other) = &inference.alternative {
        let bounds = other.per_1000_tokens_bounds.as_ref();
        let emissions = other
            .per_1000_tokens_gco2e
            .map_or_else(|| show::UNKNOWN.to_string(), show::carbon)
            + &grams_between(bounds);
        table.row([
            other.name.clone(),
            per_1000(other.per_1000_tokens_j, bounds),
            show::energy(other.request_j),
            emissions,
        ]);
    }
    let request = format!(
        "Counted on the profile `{}`, not measured: a request of {} prompt and {} generated tokens; the prompt is part of the figures.",
        inference.device,
        show::count(inference.prompt_tokens),
        show::count(inference.generated_tokens)
    );
    let paragraphs = [
        Some(request),
        inference.alternative.as_ref().map(payback),
        inference.year.as_ref().map(year),
    ];
    let mut blocks = vec![Block::Table(table)];
    blocks.extend(paragraphs.into_iter().flatten().map(Block::Paragraph));
    blocks.push(Block::Bullets(inference.assumptions.clone()));
    blocks
}

fn per_1000(energy: Joules, bounds: Option<&Bounds>) -> String {
    show::energy(energy)
        + &bounds.map_or_else(String::new, |bounds| {
            format!(", {} to {}", bounds.low_j, bounds.high_j)
        })
}

fn grams_between(bounds: Option<&Bounds>) -> String {
    let to = |bounds: &Bounds| {
        format!(
            ", {} to {}",
            show::carbon(bounds.low_gco2e),
            show::carbon(bounds.high_gco2e)
        )
    };
    bounds.map_or_else(String::new, to)
}

fn payback(other: &Alternative) -> String {
    match other.pays_after_requests {
        Some(requests) => format!(
            "Against prompting {}, the fine-tuning has paid for itself after {}: each saves {}.",
            other.name,
            show::counted(requests, "request"),
            show::energy(other.saved_per_request_j)
        ),
        None => format!(
            "Against prompting {}, the fine-tuning never pays for itself: a request saves nothing.",
            other.name
        ),
    }
}

/// "12.5 days"; below two, "44 h 44 min" or less.
fn days_or_less(days: f64) -> String {
    if days < 2.0 {
        show::time(Seconds(days * 86_400.0))
    } else {
        format!("{} days", show::number(days))
    }
}

fn year(year: &Year) -> String {
    let days = year.pays_after_days.map_or_else(String::new, |days| {
        format!(", and {} of use pay for it", days_or_less(days))
    });
    format!(
        "At {} requests a day a year of use takes {}{} and {}{}: {} of the life cycle, fine-tuning {}{days}.",
        show::number(year.requests_per_day),
        show::energy(year.energy_j),
        year.bounds.map_or_else(String::new, |bounds| format!(
            " (between {} and {})",
            bounds.low_j, bounds.high_j
        )),
        show::carbon(year.gco2e),
        year.bounds.map_or_else(String::new, |bounds| {
            format!(
                " (between {} and {})",
                show::carbon(bounds.low_gco2e),
                show::carbon(bounds.high_gco2e)
            )
        }),
        show::share(year.share_of_life_cycle, 1.0),
        show::share(year.fine_tuning_share, 1.0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_time_of_use_is_said_in_hours_and_minutes() {
        // 0.0326 x 86,400 s = 2,816.6 s; 1.5 days are 36 hours.
        assert_eq!(
            [0.0326, 1.5, 12.5].map(days_or_less),
            ["46 min 57 s", "36 h 00 min", "12.5 days"]
        );
    }
}
