//! Classes and their probabilities of records, by a classifier.

use serde::Serialize;

use super::evaluate::options_for;
use super::inference::{load, not_finite, open};
use super::{EvaluationJob, Screen};
use crate::data::{self, LabelKind, evaluation_batches};
use crate::error::{Error, Kind, Result};
use crate::model::ProblemType;
use crate::ops::Context;
use crate::train::batch_to_device;
use crate::train::metrics::predicted_class;
use crate::work::WorkCounter;

/// The predictions of a classifier.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Predictions {
    /// Names of the outputs, by id.
    pub labels: Vec<String>,
    /// One for each record, in order.
    pub predictions: Vec<RecordPrediction>,
}

/// The prediction for a record, or those for its words.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RecordPrediction {
    /// Of the record.
    Text(Prediction),
    /// Those labels of the record that apply.
    Labels(LabelsPrediction),
    /// The number of the record.
    Value {
        /// The output of a regression.
        value: f64,
    },
    /// Of each word.
    Words(Vec<Prediction>),
}

/// A class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// The likeliest class.
    pub label: String,
    /// Of each class, by id.
    pub probabilities: Vec<f64>,
}

/// Labels.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelsPrediction {
    /// Those with a probability above one half.
    pub labels: Vec<String>,
    /// Of each label, by id: the sigmoid of its logit.
    pub probabilities: Vec<f64>,
}

/// Predicts the label of each record; a label in the records is not read.
///
/// # Errors
/// A model without classes, a model or data that cannot be loaded, records without tokens or longer
/// than the positions, and output that is not finite.
pub fn predict(job: &EvaluationJob<'_>, screen: &mut dyn Screen) -> Result<Predictions> {
    let mut model = open(&job.model, screen)?;
    if model.architecture.classifier().is_none() {
        return Err(
            Error::new(Kind::Usage, "the model predicts tokens, not classes")
                .value(model.architecture.class.clone())
                .hint("use `wattune generate`, or choose a classifier"),
        );
    }
    let options = data::Options {
        labels: Vec::new(),
        ..options_for(&model.architecture, &job.options)?
    };
    let downloads = screen.downloads();
    let set = data::load(&job.data, &options, &model.tokenizer, None, downloads)?;
    let words = options.label_kind == LabelKind::ClassesOfWords;
    check_counts(&set.counts, words)?;
    let count = job.limit.unwrap_or(usize::MAX).min(set.examples.len());
    super::evaluate::check(
        &set.examples[..count],
        model.architecture.max_position_embeddings,
    )?;
    let loaded = load(&mut model, &job.model, screen)?;
    let batches = evaluation_batches(&set.examples[..count], job.micro_batch_size);
    let counter = WorkCounter::default();
    let context = Context::new(&counter, job.model.precision);
    let labels = model.architecture.labels();
    let mut predictions = Vec::with_capacity(count);
    for (done, batch) in batches.iter().enumerate() {
        screen.evaluating(done, batches.len());
        let input = batch_to_device(batch, job.model.device)?;
        let logits = loaded.decoder.logits(context, &input)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(not_finite("output").while_running());
        }
        let rows = logits.chunks(labels.len());
        match model.architecture.problem_type() {
            Some(ProblemType::MultiLabel) => {
                predictions.extend(rows.map(|row| RecordPrediction::Labels(several(row, labels))));
                continue;
            }
            Some(ProblemType::Regression) => {
                let values = logits.iter().map(|value| f64::from(*value));
                predictions.extend(values.map(|value| RecordPrediction::Value { value }));
                continue;
            }
            Some(ProblemType::SingleLabel) | None => {}
        }
        let mut classes = logits.chunks(labels.len()).map(|logits| Prediction {
            label: labels[predicted_class(logits)].clone(),
            probabilities: probabilities(logits),
        });
        if words {
            let of_record = |range| {
                classes
                    .by_ref()
                    .take(ExactSizeIterator::len(&range))
                    .collect()
            };
            let records = batch.loss_ranges().map(of_record);
            predictions.extend(records.map(RecordPrediction::Words));
        } else {
            predictions.extend(classes.map(RecordPrediction::Text));
        }
    }
    Ok(Predictions {
        labels: labels.to_vec(),
        predictions,
    })
}

/// Refuses records without text, and words that would get no class.
fn check_counts(counts: &data::Counts, words: bool) -> Result<()> {
    if counts.dropped + counts.skipped > 0 {
        return Err(
            Error::new(Kind::Data, "some records have no text to classify")
                .value(format!(
                    "{} of {}",
                    counts.dropped + counts.skipped,
                    counts.records
                ))
                .hint("remove them, or name the column: --column text=COLUMN"),
        );
    }
    if words && counts.truncated > 0 {
        return Err(Error::new(Kind::Data, "some words lie beyond `max_length`")
            .value(format!(
                "in {} of {} records",
                counts.truncated, counts.records
            ))
            .hint("give a larger `--max-length`, or split the records"));
    }
    Ok(())
}

/// The labels with a logit above 0.
fn several(logits: &[f32], labels: &[String]) -> LabelsPrediction {
    let applies = labels.iter().zip(logits).filter(|(_, logit)| **logit > 0.0);
    let sigmoid = |logit: &f32| 1.0 / (1.0 + (-f64::from(*logit)).exp());
    LabelsPrediction {
        labels: applies.map(|(label, _)| label.clone()).collect(),
        probabilities: logits.iter().map(sigmoid).collect(),
    }
}

/// The softmax of a row.
fn probabilities(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = logits.iter().map(|logit| f64::from(logit - largest).exp());
    let exp: Vec<f64> = exp.collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|exp| exp / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// e^ln 3 : e^0 = 3 : 1, also far beyond the range of exp.
    #[test]
    fn probabilities_are_the_softmax() {
        let ln_3 = 3f32.ln();
        for offset in [0.0, 1e4, -1e4] {
            let found = probabilities(&[offset + ln_3, offset]);
            let near = |x: f64, y: f64| (x - y).abs() < 1e-3;
            assert!(near(found[0], 0.75) && near(found[1], 0.25), "{found:?}");
        }
    }
}
