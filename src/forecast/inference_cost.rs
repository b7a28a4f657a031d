//! Energy of the model in use: requests to the base model, to the fine-tuned one, and to what would be prompted instead.
//!
//! Counted by [`RequestCost`]: the prompts of a batch and each further token are charged as separate ledger entries. Generates
//! nothing.

use super::inference::{
    Alternative, AlternativeKind, Bounds, Inference, Served, ServedModel, Year,
};
use super::request::{RequestCost, RequestSize};
use super::stored_formats::effect_of_formats;
use super::subject::{Subject, Target, emissions};
use crate::energy::{Interval, MeterKind, carbon};
use crate::model::ServedShape;
use crate::recipe::LargerModel;
use crate::units::{GramsCo2e, Joules};

const DAYS_PER_YEAR: f64 = 365.0;

/// Why no request is counted: the model generates no tokens, or the recipe's request does not fit its
/// positions.
pub fn request_too_long(subject: &Subject<'_>) -> Option<String> {
    if subject.architecture.classifier().is_some() {
        return Some("energy in use is not counted: a classifier generates no tokens".into());
    }
    let report = &subject.recipe.report;
    let prompt = report.prompt_tokens;
    let generated = report.generated_tokens;
    let most = subject.architecture.max_position_embeddings;
    (prompt + generated > most).then(|| {
        format!(
            "energy in use is not counted: a request of {prompt} prompt and {generated} generated tokens does not fit the model's {most} \
             positions; set `prompt_tokens` and `generated_tokens` in [report]"
        )
    })
}

/// The `inference` block of a run of which `fine_tuning` was counted. Requests are counted whatever meter decided in the run.
///
/// Holds if [`request_too_long`] is `None`.
pub fn inference_cost(subject: &Subject<'_>, fine_tuning: Joules, meter: MeterKind) -> Inference {
    let report = &subject.recipe.report;
    let prompt = report.prompt_tokens;
    let base_shape = ServedShape::new(subject.architecture, subject.precision());
    let base = &request(subject, &base_shape, prompt);
    let mut models = vec![served(subject, ServedModel::Base, base)];
    match subject.target {
        Target::Lora { adaptation, .. } => {
            let saved = adaptation.as_saved();
            let shape = base_shape
                .clone()
                .with_adapter(subject.architecture, &saved);
            let unmerged = request(subject, &shape, prompt);
            models.push(served(subject, ServedModel::Adapter, &unmerged));
            models.push(served(subject, ServedModel::Merged, base));
        }
        Target::All => models.push(served(subject, ServedModel::Trained, base)),
    }
    let alternative = alternative(subject, &base_shape, base.energy(), fine_tuning);
    let payback = alternative
        .as_ref()
        .and_then(|other| other.pays_after_requests);
    let year = report
        .requests_per_day
        .map(|per_day| year(subject, per_day, base.energy(), fine_tuning, payback));
    let mut assumptions = assumptions(subject, alternative.as_ref());
    assumptions.extend(effect_of_formats(subject));
    if meter != MeterKind::Counted {
        assumptions.push(format!(
            "requests are compared with the counted energy of the fine-tuning ({fine_tuning}), not with its {} energy",
            meter.as_str()
        ));
    }
    Inference {
        device: subject.profile.name.clone(),
        prompt_tokens: prompt as u64,
        generated_tokens: report.generated_tokens as u64,
        batch: report.batch as u64,
        models,
        alternative,
        year,
        assumptions,
    }
}

/// A request with `prompt` tokens before the generated ones.
fn request(subject: &Subject<'_>, shape: &ServedShape, prompt: usize) -> RequestCost {
    let report = &subject.recipe.report;
    let size = RequestSize {
        prompt,
        generated: report.generated_tokens,
        batch: report.batch,
    };
    RequestCost::new(subject.profile, shape, size)
}

fn served(subject: &Subject<'_>, model: ServedModel, request: &RequestCost) -> Served {
    let per_1000_tokens_j = per_1000_tokens(subject, request);
    Served {
        model,
        request_flops: request.flops(),
        prompt_j: request.prompt_energy(),
        request_j: request.energy(),
        per_1000_tokens_j,
        per_1000_tokens_gco2e: operational_carbon(subject, per_1000_tokens_j),
        per_1000_tokens_bounds: Some(bounds(subject, per_1000_tokens_j)),
    }
}

fn operational_carbon(subject: &Subject<'_>, energy: Joules) -> GramsCo2e {
    let rates = subject.budget.rates();
    carbon(energy, rates.pue, rates.grid)
}

/// Bounds of a counted energy and of its emissions on the recipe's grid.
fn bounds(subject: &Subject<'_>, energy: Joules) -> Bounds {
    let energy = Interval::counted(energy);
    let gco2e = emissions(energy, subject.grid, subject.budget.rates());
    Bounds {
        low_j: energy.low,
        high_j: energy.high,
        low_gco2e: gco2e.low,
        high_gco2e: gco2e.high,
    }
}

fn per_1000_tokens(subject: &Subject<'_>, request: &RequestCost) -> Joules {
    request.energy() * (1000.0 / subject.recipe.report.generated_tokens as f64)
}

fn year(
    subject: &Subject<'_>,
    requests_per_day: f64,
    request: Joules,
    fine_tuning: Joules,
    payback: Option<u64>,
) -> Year {
    let requests = requests_per_day * DAYS_PER_YEAR;
    let energy = request * requests;
    let life_cycle = energy + fine_tuning;
    Year {
        requests_per_day,
        requests,
        energy_j: energy,
        gco2e: operational_carbon(subject, energy),
        bounds: Some(bounds(subject, energy)),
        share_of_life_cycle: energy / life_cycle,
        fine_tuning_share: fine_tuning / life_cycle,
        pays_after_days: payback.map(|requests| requests as f64 / requests_per_day),
    }
}

/// The recipe's larger model, else the base model with as many examples in its prompt as fit; `None` if not one fits.
fn alternative(
    subject: &Subject<'_>,
    base: &ServedShape,
    tuned: Joules,
    fine_tuning: Joules,
) -> Option<Alternative> {
    let other = match &subject.recipe.report.larger_model {
        Some(model) => larger_model(subject, model),
        None => few_shot(subject, base)?,
    };
    let energy = other.request.energy();
    let saved = energy - tuned;
    let per_1000_tokens_j = per_1000_tokens(subject, &other.request);
    Some(Alternative {
        kind: other.kind,
        name: other.name,
        parameters: other.parameters,
        prompt_tokens: other.prompt as u64,
        request_j: energy,
        per_1000_tokens_j,
        per_1000_tokens_gco2e: Some(operational_carbon(subject, per_1000_tokens_j)),
        per_1000_tokens_bounds: Some(bounds(subject, per_1000_tokens_j)),
        saved_per_request_j: saved,
        pays_after_requests: (saved.0 > 0.0).then(|| (fine_tuning / saved).ceil() as u64),
    })
}

/// What would be prompted instead of the fine-tuned model.
struct Other {
    kind: AlternativeKind,
    name: String,
    parameters: u64,
    /// Tokens of its prompt.
    prompt: usize,
    request: RequestCost,
}

fn larger_model(subject: &Subject<'_>, model: &LargerModel) -> Other {
    let name = if model.name.contains('/') {
        format!("{} ({} parameters)", model.name, model.parameters)
    } else {
        format!("a model of {} parameters", model.parameters)
    };
    Other {
        kind: AlternativeKind::LargerModel,
        name,
        parameters: model.parameters.0 as u64,
        prompt: subject.recipe.report.prompt_tokens,
        request: request(
            subject,
            &ServedShape::of_size(model.parameters.0 as u64, subject.precision()),
            subject.recipe.report.prompt_tokens,
        ),
    }
}

/// The base model with examples in its prompt; `None` if not one fits.
fn few_shot(subject: &Subject<'_>, base: &ServedShape) -> Option<Other> {
    let report = &subject.recipe.report;
    let positions = subject.architecture.max_position_embeddings;
    let room = positions - report.prompt_tokens - report.generated_tokens;
    let example = example_tokens(subject);
    let examples = report.few_shot_examples.min(room / example);
    if examples == 0 {
        return None;
    }
    let prompt = report.prompt_tokens + examples * example;
    let plural = if examples == 1 { "example" } else { "examples" };
    Some(Other {
        kind: AlternativeKind::FewShot,
        name: format!("the base model with {examples} {plural} in its prompt"),
        parameters: subject.architecture.parameters(),
        prompt,
        request: request(subject, base, prompt),
    })
}

/// Mean tokens of a training record, rounded up.
fn example_tokens(subject: &Subject<'_>) -> usize {
    let counts = subject.counts;
    counts.tokens.div_ceil(counts.examples.max(1)).max(1) as usize
}

fn assumptions(subject: &Subject<'_>, alternative: Option<&Alternative>) -> Vec<String> {
    let report = &subject.recipe.report;
    let mut all = vec![format!(
        "{} in {} on {}, KV cache of {} tokens; weights and cache are read once a step, activations are left out",
        match report.batch {
            1 => "one request at a time".to_string(),
            batch => format!("{batch} requests at a time"),
        },
        subject.precision().as_str(),
        subject.profile.name,
        report.prompt_tokens + report.generated_tokens
    )];
    if report.batch == 1 {
        all.push("a server that batches requests takes less for each".to_string());
    }
    if !subject.target.is_whole_model() {
        all.push("a merged model executes the base model's operations; the comparison and the year assume it".to_string());
    }
    match alternative.map(|other| other.kind) {
        Some(AlternativeKind::LargerModel) => {
            all.push("of the larger model only the parameter count is known: each weight is read and multiplied once a token, attention is left out".into());
        }
        Some(AlternativeKind::FewShot) => all.push(format!(
            "no `larger_model` in [report]: compared with the base model and examples of {} tokens, the mean training record",
            example_tokens(subject)
        )),
        None => all.push("no `larger_model` in [report], and no example fits the base model's prompt".into()),
    }
    all.push("assumes equal answer quality".to_string());
    if report.requests_per_day.is_some() {
        all.push(
            "the life cycle is fine-tuning and a year of use, without pretraining and the device's manufacture".to_string(),
        );
    }
    all
}
