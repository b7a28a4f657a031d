//! The section of a page about the model in use.
//!
//! Owns how the `inference` block reads. Takes counted figures with their assumptions; nothing here was measured, and the page says so.

use super::page::Block;
use super::show;
use super::table::Table;
pub use crate::forecast::{
    Alternative, AlternativeKind, Bounds, Inference, Served, ServedModel, Year,
};
use crate::units::{Joules, Seconds};

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
