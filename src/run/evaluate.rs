//! The loss of a model on records.

use std::path::PathBuf;

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, load, not_finite};
use crate::data::{self, evaluation_batches};
use crate::error::{Error, Kind, Result};
use crate::ops::Context;
use crate::train::batch_to_device;
use crate::work::WorkCounter;

/// What is evaluated on what.
pub struct EvaluationJob<'a> {
    /// The model.
    pub model: ModelRequest<'a>,
    /// Files of records.
    pub data: Vec<PathBuf>,
    /// How they are read.
    pub options: data::Options,
    /// Records in one forward pass.
    pub micro_batch_size: usize,
    /// Only so many records; `None`: all.
    pub limit: Option<usize>,
}

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Nats per loss token.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens with a loss.
    pub loss_tokens: u64,
    /// Records.
    pub examples: u64,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
}

/// Evaluates.
pub fn evaluate(job: &EvaluationJob<'_>, screen: &mut dyn Screen) -> Result<Evaluation> {
    let loaded = load(&job.model, screen.downloads())?;
    let set = data::load(&job.data, &job.options, &loaded.tokenizer, None)?;
    let count = job.limit.unwrap_or(usize::MAX).min(set.examples.len());
    check(
        &set.examples[..count],
        loaded.architecture.max_position_embeddings,
    )?;
    if set.counts.truncated + set.counts.dropped > 0 {
        let data::Counts {
            records,
            truncated,
            dropped,
            ..
        } = set.counts;
        screen.note(&format!(
            "warning: of {records} records, {truncated} were cut at --max-length and {dropped} had no loss token left"
        ));
    }
    let batches = evaluation_batches(&set.examples[..count], job.micro_batch_size);
    let counter = WorkCounter::default();
    let context = Context::new(&counter, job.model.precision);
    let (mut sum, mut loss_tokens, mut tokens) = (0.0, 0, 0);
    for (done, batch) in batches.iter().enumerate() {
        screen.evaluating(done, batches.len());
        let losses = loaded
            .decoder
            .losses(context, &batch_to_device(batch, job.model.device)?)?;
        sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        loss_tokens += losses.len() as u64;
        tokens += batch.tokens.len() as u64;
    }
    let loss = sum / loss_tokens as f64;
    if !loss.is_finite() {
        return Err(not_finite("loss").value(loss.to_string()).while_running());
    }
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        tokens,
        loss_tokens,
        examples: count as u64,
        flops: counter.take().flops(),
    })
}

/// Refuses what has no loss, and records longer than the model's `positions`.
fn check(examples: &[data::Example], positions: usize) -> Result<()> {
    if examples.iter().all(|example| !example.loss.contains(&true)) {
        return Err(Error::new(
            Kind::Data,
            "there is nothing to evaluate: no record with a loss token",
        )
        .hint("check `--data`, `--format`, `--max-length` and `--limit`"));
    }
    let longest = examples
        .iter()
        .map(|example| example.tokens.len())
        .max()
        .unwrap_or(0);
    match longest > positions {
        true => Err(
            Error::new(Kind::Data, "a record is longer than the model's positions")
                .value(format!("{longest} tokens"))
                .rule(format!("at most max_position_embeddings = {positions}"))
                .hint(format!("add `--max-length {positions}`")),
        ),
        false => Ok(()),
    }
}
