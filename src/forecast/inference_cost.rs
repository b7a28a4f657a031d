//! What the model takes once it is in use: a request of the base model, of the fine-tuned one, and of what would be prompted instead.
//!
//! Takes a prepared recipe and what the fine-tuning spent, returns the report's `inference` block. Every figure is counted by the functions
//! that count a run's own sample: `ModelShape::prefill` and `ModelShape::decoding`, the prompt and each token charged as an entry of its
//! own. Generates nothing.

use super::inference::{
    Alternative, AlternativeKind, Bounds, Inference, Served, ServedModel, Year,
};
use super::subject::{Subject, Target, emissions};
use crate::energy::{Charge, Interval, MeterKind, carbon};
use crate::error::Result;
use crate::model::ModelShape;
use crate::recipe::LargerModel;
use crate::units::{Joules, MicroJoules};
use crate::work::Work;

const DAYS: f64 = 365.0;

/// Energy of one request.
#[derive(Clone, Copy)]
struct Request {
    prompt: MicroJoules,
    whole: MicroJoules,
    flops: u64,
}

impl Request {
    /// Of the charges of a prompt and of each further token.
    fn of(prompt: Charge, tokens: impl Iterator<Item = Charge>) -> Self {
        let (energy, flops) = (prompt.energy, prompt.flops);
        tokens.fold(
            Self {
                prompt: energy,
                whole: energy,
                flops,
            },
            |sum, token| Self {
                whole: sum.whole + token.energy,
                flops: sum.flops + token.flops,
                ..sum
            },
        )
    }
}

/// Why no request is counted: the recipe's does not fit the model's positions.
pub fn request_too_long(subject: &Subject<'_>) -> Option<String> {
    let report = &subject.recipe.report;
    let (prompt, generated) = (report.prompt_tokens, report.generated_tokens);
    let most = subject.architecture.max_position_embeddings;
    (prompt + generated > most).then(|| {
        format!(
            "energy in use is not counted: a request of {prompt} prompt and {generated} generated tokens does not fit the model's {most} \
             positions; set `prompt_tokens` and `generated_tokens` in [report]"
        )
    })
}

/// Energy of requests after a run of which `fine_tuning` was counted; requests are counted too, whatever meter decided.
///
/// Holds where [`request_too_long`] is `None`.
pub fn inference_cost(
    subject: &Subject<'_>,
    fine_tuning: Joules,
    meter: MeterKind,
) -> Result<Inference> {
    let asked = &subject.recipe.report;
    let prompt = asked.prompt_tokens;
    let base =
        ModelShape::with_adapters(subject.architecture, &[], false, subject.recipe.model.dtype)?;
    let before = request(subject, &base, prompt);
    let shown = |model, request: Request| served(subject, model, request);
    let models = match subject.target {
        Target::Lora { .. } => vec![
            shown(ServedModel::Base, before),
            shown(
                ServedModel::Adapter,
                request(subject, subject.shape, prompt),
            ),
            shown(ServedModel::Merged, before),
        ],
        Target::All => vec![
            shown(ServedModel::Base, before),
            shown(ServedModel::Trained, before),
        ],
    };
    let own = before.whole.joules();
    let alternative = alternative(subject, &base, own, fine_tuning);
    let saved = alternative
        .as_ref()
        .and_then(|other| other.pays_after_requests);
    let rates = subject.budget.rates();
    let year = asked.requests_per_day.map(|requests_per_day| {
        let requests = requests_per_day * DAYS;
        let energy = own * requests;
        let whole = energy + fine_tuning;
        Year {
            requests_per_day,
            requests,
            energy_j: energy,
            gco2e: carbon(energy, rates.pue, rates.grid),
            bounds: Some(bounds_of(subject, energy)),
            share_of_life_cycle: energy / whole,
            fine_tuning_share: fine_tuning / whole,
            pays_after_days: saved.map(|requests| requests as f64 / requests_per_day),
        }
    });
    let mut assumptions = assumptions(subject, alternative.as_ref());
    if meter != MeterKind::Counted {
        assumptions.push(format!(
            "requests are held against what was counted of the fine-tuning ({fine_tuning}), not against its {} energy",
            meter.as_str()
        ));
    }
    Ok(Inference {
        device: subject.profile.name.clone(),
        prompt_tokens: prompt as u64,
        generated_tokens: asked.generated_tokens as u64,
        models,
        alternative,
        year,
        assumptions,
    })
}

/// A request with `prompt` tokens before the generated ones; the prompt's own logits give the first of them.
fn request(subject: &Subject<'_>, shape: &ModelShape, prompt: usize) -> Request {
    let profile = subject.profile;
    let further = prompt..prompt + subject.recipe.report.generated_tokens - 1;
    Request::of(
        profile.charge(&shape.prefill(prompt)),
        further.map(|before| profile.charge(&shape.decoding(before))),
    )
}

/// A model of which only the size is known: every weight in one product, attention left out.
fn larger_request(subject: &Subject<'_>, model: &LargerModel) -> Request {
    let (profile, precision) = (subject.profile, subject.recipe.model.dtype);
    let side = model.parameters.0.sqrt().round().max(1.0) as usize;
    let charge = |tokens| profile.charge(&Work::product(tokens, side, side, precision));
    let further = subject.recipe.report.generated_tokens - 1;
    Request::of(
        charge(subject.recipe.report.prompt_tokens),
        std::iter::repeat_n(charge(1), further),
    )
}

fn served(subject: &Subject<'_>, model: ServedModel, request: Request) -> Served {
    let rates = subject.budget.rates();
    let per_1000_tokens_j = per_1000(subject, request);
    Served {
        model,
        request_flops: request.flops,
        prompt_j: request.prompt.joules(),
        request_j: request.whole.joules(),
        per_1000_tokens_j,
        per_1000_tokens_gco2e: carbon(per_1000_tokens_j, rates.pue, rates.grid),
        per_1000_tokens_bounds: Some(bounds_of(subject, per_1000_tokens_j)),
    }
}

/// The bounds of a counted energy, and of its emissions on the recipe's grid.
fn bounds_of(subject: &Subject<'_>, energy: Joules) -> Bounds {
    let energy = Interval::counted(energy);
    let gco2e = emissions(energy, subject.grid, subject.budget.rates());
    Bounds {
        low_j: energy.low,
        high_j: energy.high,
        low_gco2e: gco2e.low,
        high_gco2e: gco2e.high,
    }
}

fn per_1000(subject: &Subject<'_>, request: Request) -> Joules {
    request.whole.joules() * (1000.0 / subject.recipe.report.generated_tokens as f64)
}

/// The larger model of the recipe; else the base model with examples before its prompt, as many as fit. `None` where not one fits.
fn alternative(
    subject: &Subject<'_>,
    base: &ModelShape,
    own: Joules,
    fine_tuning: Joules,
) -> Option<Alternative> {
    let asked = &subject.recipe.report;
    let (kind, name, parameters, prompt, request) = match &asked.larger_model {
        Some(model) => {
            let is_an_id = model.name.contains('/');
            let name = match is_an_id {
                true => format!("{} ({} parameters)", model.name, model.parameters),
                false => format!("a model of {} parameters", model.parameters),
            };
            let request = larger_request(subject, model);
            (
                AlternativeKind::LargerModel,
                name,
                model.parameters.0 as u64,
                asked.prompt_tokens,
                request,
            )
        }
        None => {
            let room = subject.architecture.max_position_embeddings
                - asked.prompt_tokens
                - asked.generated_tokens;
            let example = example_tokens(subject);
            let examples = asked.few_shot_examples.min(room / example);
            if examples == 0 {
                return None;
            }
            let prompt = asked.prompt_tokens + examples * example;
            let plural = if examples == 1 { "example" } else { "examples" };
            let name = format!("the base model with {examples} {plural} in its prompt");
            let request = request(subject, base, prompt);
            (
                AlternativeKind::FewShot,
                name,
                subject.architecture.parameters(),
                prompt,
                request,
            )
        }
    };
    let saved = request.whole.joules() - own;
    let (rates, per_1000_tokens_j) = (subject.budget.rates(), per_1000(subject, request));
    Some(Alternative {
        kind,
        name,
        parameters,
        prompt_tokens: prompt as u64,
        request_j: request.whole.joules(),
        per_1000_tokens_j,
        per_1000_tokens_gco2e: Some(carbon(per_1000_tokens_j, rates.pue, rates.grid)),
        per_1000_tokens_bounds: Some(bounds_of(subject, per_1000_tokens_j)),
        saved_per_request_j: saved,
        pays_after_requests: (saved.0 > 0.0).then(|| (fine_tuning / saved).ceil() as u64),
    })
}

/// Tokens of a training record, on average and rounded up.
fn example_tokens(subject: &Subject<'_>) -> usize {
    let counts = subject.counts;
    counts.tokens.div_ceil(counts.examples.max(1)).max(1) as usize
}

fn assumptions(subject: &Subject<'_>, alternative: Option<&Alternative>) -> Vec<String> {
    let asked = &subject.recipe.report;
    let mut all = vec![
        format!(
            "one request at a time in {} on {}, keys and values cached, as many as its {} tokens at its end",
            subject.recipe.model.dtype.as_str(),
            subject.profile.name,
            asked.prompt_tokens + asked.generated_tokens
        ),
        "a server that answers many requests at once takes less for each".to_string(),
    ];
    if !subject.target.is_whole_model() {
        all.push("a merged model executes what the base model does; the requests below are taken to be merged".to_string());
    }
    match alternative.map(|other| other.kind) {
        Some(AlternativeKind::LargerModel) => {
            all.push("of the larger model only the number of weights is known: each is read and multiplied once a token, attention is left out".into());
        }
        Some(AlternativeKind::FewShot) => all.push(format!(
            "no `larger_model` is given in [report], so the base model with examples stands in; an example is {} tokens, the mean training record",
            example_tokens(subject)
        )),
        None => all.push("no `larger_model` is given in [report], and not one example fits the base model's prompt".into()),
    }
    all.push(
        "that the other answers as well as the fine-tuned model is taken for granted".to_string(),
    );
    if asked.requests_per_day.is_some() {
        all.push(
            "the life cycle is fine-tuning and a year of use; pretraining and the device's manufacture are not in it".to_string(),
        );
    }
    all
}
