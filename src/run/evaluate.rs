//! Validation loss and perplexity of a model on records.

use std::path::PathBuf;

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, load, not_finite, open};
use super::model_source::ModelSource;
use super::records::locate;
use crate::data::{self, Format, LabelKind, MicroBatch, evaluation_batches};
use crate::error::{Error, Kind, Result};
use crate::hub::Progress;
use crate::model::{Architecture, BatchLosses, Classified, Decoder, ProblemType};
use crate::ops::Context;
use crate::recipe::Validation;
use crate::train::batch_to_device;
use crate::train::metrics::{Metrics, Scores};
use crate::work::WorkCounter;

/// An evaluation.
pub struct EvaluationJob<'a> {
    /// The model.
    pub model: ModelRequest<'a>,
    /// Files of records.
    pub data: Vec<PathBuf>,
    /// How the records are read and tokenized.
    pub options: data::Options,
    /// Records in one forward pass.
    pub micro_batch_size: usize,
    /// Only the first N records; `None`: all.
    pub limit: Option<usize>,
}

/// The loss on the records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Nats per loss token; of a regression the mean squared error.
    pub loss: f64,
    /// e to the loss; `None` of a classifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens with a loss.
    pub loss_tokens: u64,
    /// Records evaluated.
    pub examples: u64,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// Of a classifier.
    #[serde(flatten)]
    pub classification: Option<Classification>,
}

/// How well a classifier or regression did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Classification {
    /// Its figures.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// Names of the outputs, by id.
    pub labels: Vec<String>,
    /// Records by true class (row) and predicted class (column), if each has one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub confusion_matrix: Vec<Vec<u64>>,
}

/// The validation files of the run that `source` was given by.
///
/// # Errors
/// No run, a run without a validation set of its own, a data set that cannot be fetched.
pub fn validation_files(source: &ModelSource, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    let none = |reason: &str| {
        Err(Error::new(Kind::Usage, reason).hint("name the records with `--data FILE...`"))
    };
    let Some(recipe) = &source.recipe else {
        return none("no data was given");
    };
    match &recipe.data.validation {
        Validation::Source(source) => Ok(locate(source, progress)?.0),
        Validation::Fraction(_) => none("the run's validation set is a part of its training data"),
        Validation::None => none("the run has no validation set"),
    }
}

/// Evaluates.
///
/// # Errors
/// A model or data that cannot be loaded, records longer than the positions, and a loss that is not finite.
pub fn evaluate(job: &EvaluationJob<'_>, screen: &mut dyn Screen) -> Result<Evaluation> {
    let mut model = open(&job.model, screen)?;
    let options = options_for(&model.architecture, &job.options)?;
    let downloads = screen.downloads();
    let set = data::load(&job.data, &options, &model.tokenizer, None, downloads)?;
    let count = job.limit.unwrap_or(usize::MAX).min(set.examples.len());
    let examples = &set.examples[..count];
    check(examples, model.architecture.max_position_embeddings)?;
    let data::Counts {
        records,
        truncated,
        dropped,
        ..
    } = set.counts;
    if truncated + dropped > 0 {
        screen.note(&format!(
            "warning: of {records} records, {truncated} were cut at --max-length and {dropped} had no loss token left"
        ));
    }
    let loaded = load(&mut model, &job.model, screen)?;
    let batches = evaluation_batches(examples, job.micro_batch_size);
    losses_of(&loaded.decoder, job, &batches, screen)
}

/// The mean loss over `batches`.
fn losses_of(
    decoder: &Decoder,
    job: &EvaluationJob<'_>,
    batches: &[MicroBatch],
    screen: &mut dyn Screen,
) -> Result<Evaluation> {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, job.model.precision);
    let mut sum = 0.0;
    let mut loss_tokens = 0;
    let labels = decoder.architecture().labels();
    let mut scores = Scores::new(decoder.architecture());
    for (done, batch) in batches.iter().enumerate() {
        screen.evaluating(done, batches.len());
        let input = batch_to_device(batch, job.model.device)?;
        let BatchLosses { losses, outputs } = decoder.evaluate(context, &input)?;
        scores.add(batch, &outputs);
        sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        loss_tokens += losses.len() as u64;
    }
    let loss = sum / loss_tokens as f64;
    if !loss.is_finite() {
        return Err(not_finite("loss").value(loss.to_string()).while_running());
    }
    Ok(Evaluation {
        loss,
        perplexity: labels.is_empty().then(|| loss.exp()),
        tokens: batches.iter().map(|batch| batch.tokens.len() as u64).sum(),
        loss_tokens,
        examples: batches
            .iter()
            .map(|batch| batch.segments.len() as u64)
            .sum(),
        flops: counter.take().flops(),
        classification: scores.metrics().map(|metrics| Classification {
            metrics,
            labels: labels.to_vec(),
            confusion_matrix: scores.confusion(),
        }),
    })
}

/// The options for the model's task: a classifier reads a text and one of its classes.
///
/// # Errors
/// A format of another task.
pub(super) fn options_for(
    architecture: &Architecture,
    options: &data::Options,
) -> Result<data::Options> {
    let classifies = architecture.classifier().is_some();
    let format = match (options.format, classifies) {
        (Format::Auto | Format::Classification, true) => Format::Classification,
        (format, false) if format != Format::Classification => format,
        _ => {
            let (what, rule) = if classifies {
                (
                    "a classifier reads texts or words with labels",
                    "classification",
                )
            } else {
                (
                    "the model predicts tokens, not classes",
                    "text, completion, messages or alpaca",
                )
            };
            return Err(Error::new(Kind::Usage, what).at("--format").rule(rule));
        }
    };
    Ok(data::Options {
        format,
        labels: architecture.labels().to_vec(),
        label_kind: label_kind(architecture),
        ..options.clone()
    })
}

/// What the labels of records are that the model is evaluated on.
fn label_kind(architecture: &Architecture) -> LabelKind {
    match (architecture.classified(), architecture.problem_type()) {
        (Some(Classified::Tokens), _) => LabelKind::ClassesOfWords,
        (_, Some(ProblemType::MultiLabel)) => LabelKind::Labels,
        (_, Some(ProblemType::Regression)) => LabelKind::Number,
        _ => LabelKind::Class,
    }
}

/// Refuses records without a loss token, and those longer than `positions`.
pub(super) fn check(examples: &[data::Example], positions: usize) -> Result<()> {
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
    if longest <= positions {
        return Ok(());
    }
    Err(
        Error::new(Kind::Data, "a record is longer than the model's positions")
            .value(format!("{longest} tokens"))
            .rule(format!("at most max_position_embeddings = {positions}"))
            .hint(format!("add `--max-length {positions}`")),
    )
}
