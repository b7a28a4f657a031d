//! Accuracy on multiple-choice records, as lm-evaluation-harness computes it.

use std::path::PathBuf;

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, load, not_finite, open};
use crate::data::{MicroBatch, MultipleChoice, Tokenizer, multiple_choices};
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, Decoder};
use crate::ops::Context;
use crate::train::batch_to_device;
use crate::train::metrics::{ChoiceHit, share};
use crate::work::WorkCounter;

/// An evaluation on multiple-choice records.
pub struct ChoiceJob<'a> {
    /// The model.
    pub model: ModelRequest<'a>,
    /// Files of records.
    pub data: Vec<PathBuf>,
    /// Wanted field (prompt, choices, label) -> column.
    pub columns: Vec<(String, String)>,
    /// Only the first N records; `None`: all.
    pub limit: Option<usize>,
}

/// The accuracies, with the harness's names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChoiceScores {
    /// Share of records whose likeliest choice is the right one.
    pub acc: f64,
    /// Standard error of `acc`; `None` of one record.
    pub acc_stderr: Option<f64>,
    /// The same by log-likelihood per character of the choice.
    pub acc_norm: f64,
    /// Standard error of `acc_norm`.
    pub acc_norm_stderr: Option<f64>,
    /// Records.
    pub examples: u64,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// Log-likelihood of each choice of each record, in nats.
    pub loglikelihoods: Vec<Vec<f64>>,
}

/// Evaluates.
///
/// # Errors
/// A model or data that cannot be loaded, a classifier, and losses that are not finite.
pub fn evaluate_choices(job: &ChoiceJob<'_>, screen: &mut dyn Screen) -> Result<ChoiceScores> {
    let mut model = open(&job.model, screen)?;
    refuse_classifier(&model.architecture, "--multiple-choice")?;
    let records = multiple_choices(&job.data, &job.columns, job.limit.unwrap_or(usize::MAX))?;
    refuse_empty(&records)?;
    let loaded = load(&mut model, &job.model, screen)?;
    let counter = WorkCounter::default();
    let scoring = Scoring {
        decoder: &loaded.decoder,
        tokenizer: &model.tokenizer,
        context: Context::new(&counter, job.model.precision),
        positions: model.architecture.max_position_embeddings,
    };
    let mut hits = Vec::new();
    let mut loglikelihoods = Vec::new();
    for (done, record) in records.iter().enumerate() {
        screen.evaluating(done, records.len());
        let found = scoring.loglikelihoods(record)?;
        let characters: Vec<usize> = record
            .choices
            .iter()
            .map(|choice| choice.chars().count())
            .collect();
        hits.push(ChoiceHit::new(&found, &characters, record.label));
        loglikelihoods.push(found);
    }
    let acc = share(hits.iter().map(|hit| hit.by_sum));
    let acc_norm = share(hits.iter().map(|hit| hit.by_character));
    Ok(ChoiceScores {
        acc: acc.mean,
        acc_stderr: acc.standard_error,
        acc_norm: acc_norm.mean,
        acc_norm_stderr: acc_norm.standard_error,
        examples: records.len() as u64,
        flops: counter.take().flops(),
        loglikelihoods,
    })
}

/// Refuses an option of decoders for a classifier.
pub(super) fn refuse_classifier(architecture: &Architecture, option: &str) -> Result<()> {
    if architecture.classifier().is_none() {
        return Ok(());
    }
    Err(
        Error::new(Kind::Usage, "a classifier predicts classes, not text")
            .at(option)
            .value(architecture.class.clone())
            .hint("leave the option out"),
    )
}

/// Refuses an evaluation without records.
pub(super) fn refuse_empty<T>(records: &[T]) -> Result<()> {
    if !records.is_empty() {
        return Ok(());
    }
    Err(
        Error::new(Kind::Data, "there is nothing to evaluate: no record")
            .hint("check `--data` and `--limit`"),
    )
}

struct Scoring<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    context: Context<'a>,
    positions: usize,
}

impl Scoring<'_> {
    /// The log-likelihood of each choice, in one forward pass.
    fn loglikelihoods(&self, record: &MultipleChoice) -> Result<Vec<f64>> {
        let examples = record.encode(self.tokenizer, self.positions)?;
        let batch = MicroBatch::new((0..).zip(&examples));
        let input = batch_to_device(&batch, self.decoder.device())?;
        let losses = self.decoder.losses(self.context, &input)?;
        let sum = |range: std::ops::Range<usize>| {
            -losses[range]
                .iter()
                .map(|loss| f64::from(*loss))
                .sum::<f64>()
        };
        let found: Vec<f64> = batch.loss_ranges().map(sum).collect();
        match found.iter().find(|sum| !sum.is_finite()) {
            Some(sum) => Err(not_finite("loss").value(sum.to_string()).while_running()),
            None => Ok(found),
        }
    }
}
