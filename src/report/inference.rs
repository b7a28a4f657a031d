//! The inference section: energy of the model in use. Every figure is counted, none is measured.

use super::format;
use super::sections::Block;
use super::text::Table;
use crate::forecast::{Alternative, Bounds, Inference, ServedModel, Year};
use crate::units::Seconds;

pub(super) fn section(inference: Option<&Inference>) -> Vec<Block> {
    let Some(inference) = inference else {
        return Vec::new();
    };
    let request = format!(
        "Counted on the profile `{}`, not measured: a request of {} prompt and {} generated tokens, {} at a time; figures include the prompt.",
        inference.device,
        format::count(inference.prompt_tokens),
        format::count(inference.generated_tokens),
        inference.batch
    );
    let mut blocks = vec![
        Block::Table(models_table(inference)),
        Block::Paragraph(request),
    ];
    let payback = inference.alternative.as_ref().map(payback);
    let year = inference.year.as_ref().map(year);
    blocks.extend(payback.into_iter().chain(year).map(Block::Paragraph));
    blocks.push(Block::Bullets(inference.assumptions.clone()));
    blocks
}

fn models_table(inference: &Inference) -> Table {
    let mut table = Table::new(&[
        "model",
        "energy per 1,000 tokens",
        "energy per request",
        "emissions per 1,000 tokens",
    ]);
    for served in &inference.models {
        let name = match served.model {
            ServedModel::Base => "base model",
            ServedModel::Adapter => "with adapter, not merged",
            ServedModel::Merged => "with adapter merged",
            ServedModel::Trained => "trained model",
        };
        let bounds = served.per_1000_tokens_bounds.as_ref();
        table.row([
            name.to_string(),
            format::energy(served.per_1000_tokens_j) + &energy_bounds(bounds),
            format::energy(served.request_j),
            format::carbon(served.per_1000_tokens_gco2e) + &emission_bounds(bounds),
        ]);
    }
    if let Some(other) = &inference.alternative {
        let bounds = other.per_1000_tokens_bounds.as_ref();
        table.row([
            other.name.clone(),
            format::energy(other.per_1000_tokens_j) + &energy_bounds(bounds),
            format::energy(other.request_j),
            format::or_unknown(other.per_1000_tokens_gco2e, format::carbon)
                + &emission_bounds(bounds),
        ]);
    }
    table
}

/// ", range 40 to 60 J".
fn energy_bounds(bounds: Option<&Bounds>) -> String {
    let text = bounds.map(|bounds| {
        let span = format::span(&bounds.low_j.to_string(), &bounds.high_j.to_string());
        format!(", range {span}")
    });
    text.unwrap_or_default()
}

fn emission_bounds(bounds: Option<&Bounds>) -> String {
    let text = bounds.map(|bounds| {
        let low = format::carbon(bounds.low_gco2e);
        let high = format::carbon(bounds.high_gco2e);
        format!(", range {}", format::span(&low, &high))
    });
    text.unwrap_or_default()
}

fn payback(other: &Alternative) -> String {
    match other.pays_after_requests {
        Some(requests) => format!(
            "Compared with prompting {}, fine-tuning pays off after {}; each saves {}.",
            other.name,
            format::counted(requests, "request"),
            format::energy(other.saved_per_request_j)
        ),
        None => format!(
            "Compared with prompting {}, fine-tuning never pays off: a request saves nothing.",
            other.name
        ),
    }
}

/// "12.5 days"; below two days in hours and minutes.
fn days_or_less(days: f64) -> String {
    if days < 2.0 {
        format::time(Seconds(days * 86_400.0))
    } else {
        format!("{} days", format::number(days))
    }
}

fn year(year: &Year) -> String {
    let payback = year
        .pays_after_days
        .map(|days| format!("; fine-tuning pays off after {} of use", days_or_less(days)));
    format!(
        "At {} requests a day, a year of use takes {}{} and {}{}. Of the life cycle, use is {} and fine-tuning {}{}.",
        format::number(year.requests_per_day),
        format::energy(year.energy_j),
        energy_bounds(year.bounds.as_ref()),
        format::carbon(year.gco2e),
        emission_bounds(year.bounds.as_ref()),
        format::share(year.share_of_life_cycle, 1.0),
        format::share(year.fine_tuning_share, 1.0),
        payback.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_than_two_days_are_hours_and_minutes() {
        // 0.0326 x 86,400 s = 2,816.6 s; 1.5 days are 36 hours.
        assert_eq!(
            [0.0326, 1.5, 12.5].map(days_or_less),
            ["46 min 57 s", "36 h 00 min", "12.5 days"]
        );
    }
}
