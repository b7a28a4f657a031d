//! How far a model's predictions are from another's, such as those of a quantised file from its original's.
//!
//! The figures are those of llama.cpp's `llama-perplexity --kl-divergence`: the Kullback-Leibler divergence at each loss token in nats,
//! and the share of tokens that both think likeliest.

use candle_core::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::Screen;
use super::evaluate::{EvaluationJob, check, options_for};
use super::inference::{ModelRequest, load, not_finite, open};
use crate::data::{self, MicroBatch, evaluation_batches};
use crate::error::{Error, Kind, Result};
use crate::model::Decoder;
use crate::ops::Context;
use crate::train::batch_to_device;
use crate::work::WorkCounter;

/// Predictions of a model beside a reference's, over loss tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean loss of the model in nats per token.
    pub loss: f64,
    /// Mean loss of the reference.
    pub reference_loss: f64,
    /// Mean divergence of the model's distribution from the reference's, sum of p ln(p / q), in nats.
    pub kl_divergence: f64,
    /// Its median.
    pub kl_median: f64,
    /// Its 99th percentile.
    pub kl_99: f64,
    /// Share of tokens whose likeliest successor is the same.
    pub same_top: f64,
    /// Tokens with a loss.
    pub loss_tokens: u64,
}

/// Figures of one loss token.
struct TokenFigures {
    losses: [f64; 2],
    divergence: f64,
    same_top: bool,
}

/// Compares `job`'s model with `reference` on its records, one record at a time. Both are in memory.
///
/// # Errors
/// As [`super::evaluate()`]; a classifier; models of different vocabularies.
pub fn divergence(
    job: &EvaluationJob<'_>,
    reference: &ModelRequest<'_>,
    screen: &mut dyn Screen,
) -> Result<Divergence> {
    let mut models = [open(reference, screen)?, open(&job.model, screen)?];
    let [first, second] = &models;
    let classifies = models
        .iter()
        .any(|model| model.architecture.classifier().is_some());
    let sizes = [
        first.architecture.vocab_size,
        second.architecture.vocab_size,
    ];
    if classifies || sizes[0] != sizes[1] {
        return Err(Error::new(
            Kind::Usage,
            "the two models' predictions cannot be compared",
        )
        .at("--against")
        .value(format!(
            "vocabularies of {} and {} tokens",
            sizes[0], sizes[1]
        ))
        .rule("both predict the next token of one vocabulary"));
    }
    let options = options_for(&second.architecture, &job.options)?;
    let set = data::load(
        &job.data,
        &options,
        &second.tokenizer,
        None,
        screen.downloads(),
    )?;
    let examples = &set.examples[..job.limit.unwrap_or(usize::MAX).min(set.examples.len())];
    let positions = models
        .iter()
        .map(|model| model.architecture.max_position_embeddings)
        .min();
    check(examples, positions.unwrap_or(0))?;
    let decoders = [
        load(&mut models[0], reference, screen)?,
        load(&mut models[1], &job.model, screen)?,
    ];
    let batches = evaluation_batches(examples, 1);
    let mut figures = Vec::new();
    for (done, batch) in batches.iter().enumerate() {
        screen.evaluating(done, batches.len());
        let rows = [
            (&decoders[0].decoder, reference),
            (&decoders[1].decoder, &job.model),
        ];
        let [p, q] = rows.map(|(decoder, request)| logits(decoder, request, batch));
        figures.extend(compare(&p?, &q?, &batch.targets));
    }
    summary(figures).ok_or_else(|| not_finite("loss").while_running())
}

/// Logits at the positions with a loss (L, V), row by row.
fn logits(
    decoder: &Decoder,
    request: &ModelRequest<'_>,
    batch: &MicroBatch,
) -> Result<Vec<Vec<f32>>> {
    let counter = WorkCounter::default();
    let input = batch_to_device(batch, request.device)?;
    let logits = decoder.logits(Context::new(&counter, request.precision), &input)?;
    let positions = Tensor::from_slice(
        &batch.loss_positions,
        batch.loss_positions.len(),
        request.device,
    )?;
    Ok(logits.index_select(&positions, 0)?.to_vec2()?)
}

fn compare(p: &[Vec<f32>], q: &[Vec<f32>], targets: &[u32]) -> Vec<TokenFigures> {
    let tokens = p.par_iter().zip(q).zip(targets);
    let figures = tokens.map(|((p, q), target)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        TokenFigures {
            losses: [-p[*target as usize], -q[*target as usize]],
            divergence: p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum(),
            same_top: likeliest(&p) == likeliest(&q),
        }
    });
    figures.collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = logits.iter().map(|x| f64::from(x - most));
    let log_sum = shifted.clone().map(f64::exp).sum::<f64>().ln();
    shifted.map(|x| x - log_sum).collect()
}

fn likeliest(values: &[f64]) -> Option<usize> {
    let values = values.iter().enumerate();
    values
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(index, _)| index)
}

/// `None` without tokens, and where a figure is not finite.
fn summary(mut tokens: Vec<TokenFigures>) -> Option<Divergence> {
    tokens.sort_by(|a, b| a.divergence.total_cmp(&b.divergence));
    let count = tokens.len();
    let mean =
        |of: &dyn Fn(&TokenFigures) -> f64| tokens.iter().map(of).sum::<f64>() / count as f64;
    // Nearest rank.
    let quantile = |share: f64| {
        tokens
            .get(((share * count as f64).ceil() as usize).saturating_sub(1))
            .map(|token| token.divergence)
    };
    let found = Divergence {
        loss: mean(&|token| token.losses[1]),
        reference_loss: mean(&|token| token.losses[0]),
        kl_divergence: mean(&|token| token.divergence),
        kl_median: quantile(0.5)?,
        kl_99: quantile(0.99)?,
        same_top: mean(&|token| f64::from(u8::from(token.same_top))),
        loss_tokens: count as u64,
    };
    [found.loss, found.reference_loss, found.kl_divergence]
        .iter()
        .all(|x| x.is_finite())
        .then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4) diverge by ln 2 / 4.
    #[test]
    fn the_divergence_is_that_of_the_two_distributions() {
        let ln = |x: f32| x.ln();
        let p = vec![vec![ln(0.5), ln(0.25), ln(0.25)], vec![7.0, 7.0, 7.0]];
        let q = vec![
            vec![ln(0.25) + 3.0, ln(0.5) + 3.0, ln(0.25) + 3.0],
            vec![0.0, 0.0, 0.0],
        ];
        let found = summary(compare(&p, &q, &[0, 2])).unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        near(found.kl_divergence, 0.25 * 2f64.ln() / 2.0);
        near(found.kl_median, 0.0);
        near(found.kl_99, 0.25 * 2f64.ln());
        near(found.reference_loss, (2f64.ln() + 3f64.ln()) / 2.0);
        near(found.loss, (4f64.ln() + 3f64.ln()) / 2.0);
        near(found.same_top, 0.5);
        assert_eq!(found.loss_tokens, 2);
        assert!(summary(Vec::new()).is_none());
    }
}
