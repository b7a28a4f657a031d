//! An encoded data set and its counts.
//!
//! Owns the counts of records read, truncated, dropped and skipped, a sample for display, and the split into training and
//! validation. Knows nothing of files or tokenizers.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::Example;
use super::permutation::{Purpose, permutation};
use crate::error::{Error, Kind, Result};

/// Counts of records and tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Records read, bad ones included.
    pub records: u64,
    /// Examples encoded from them.
    pub examples: u64,
    /// Tokens of all examples.
    pub tokens: u64,
    /// Tokens with a loss.
    pub loss_tokens: u64,
    /// Records truncated at the maximum length.
    pub truncated: u64,
    /// Records with no loss token left, hence without an example; counted as truncated too if they were.
    pub dropped: u64,
    /// Bad records omitted.
    pub skipped: u64,
    /// Examples that are windows of a text longer than the maximum length.
    pub windows: u64,
    /// Completions with no space between them and their prompt: perhaps the prompt lacks a line end.
    pub glued: u64,
    /// Conversations rendered by the chat template.
    pub conversations: u64,
    /// Records with an answer without text: they teach to end at once.
    pub empty_answers: u64,
    /// Conversations with reasoning that the chat template leaves out.
    pub without_reasoning: u64,
}

/// A span of an example's text, with or without a loss.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextSpan {
    /// The decoded tokens, special ones included.
    pub text: String,
    /// Whether they have a loss.
    pub loss: bool,
}

/// The text of an example by loss mask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenderedSample {
    /// File and line of its record.
    pub place: String,
    /// Its text in order, by loss mask.
    pub pieces: Vec<TextSpan>,
}

/// An encoded data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// In file order.
    pub examples: Arc<[Example]>,
    /// The record of each example, ascending; windows of one text share it.
    pub(super) records: Arc<[u64]>,
    /// Counts of records and tokens.
    pub counts: Counts,
    /// Whether eos, or the end-of-turn token of a chat template, is a loss token of some example.
    pub eos_trained: bool,
    /// Sha256 (hex) of the files' contents, the options and the tokenizer.
    pub fingerprint: String,
    /// The first example.
    pub first: Option<RenderedSample>,
}

impl Dataset {
    /// Splits off `fraction` of the records for validation, chosen by `seed`; both parts are in file order and have at least one
    /// record. Windows of one text stay together unless there is only one text. Truncated, dropped and skipped records are counted in
    /// the training part. Returns (training, validation).
    ///
    /// # Errors
    /// `Kind::Data` where the fraction is not in (0, 1) or there are fewer than two examples.
    pub fn split(&self, fraction: f64, seed: u64) -> Result<(Dataset, Dataset)> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(
                Error::new(Kind::Data, "the validation fraction is out of range")
                    .value(fraction.to_string())
                    .rule("above 0 and below 1")
                    .hint("set validation_fraction = 0.05"),
            );
        }
        if self.examples.len() < 2 {
            return Err(Error::new(
                Kind::Data,
                "the data set is too small to set validation records aside",
            )
            .value(format!("{} examples", self.examples.len()))
            .rule("at least 2")
            .hint("add records, or give `data.validation` a file of its own"));
        }
        let (validation, train): (Vec<usize>, Vec<usize>) = {
            let is_validation = self.validation_mask(fraction, seed);
            (0..self.examples.len()).partition(|i| is_validation[*i])
        };
        Ok((
            self.subset(&train, "train", self.counts),
            self.subset(&validation, "validation", Counts::default()),
        ))
    }

    /// Whether each example is in the validation part: by record, or by example if there is only one record.
    fn validation_mask(&self, fraction: f64, seed: u64) -> Vec<bool> {
        let mut records: Vec<u64> = self.records.to_vec();
        records.dedup();
        let by_record = records.len() > 1;
        let units = if by_record {
            records.len()
        } else {
            self.examples.len()
        };
        let count = ((units as f64 * fraction).round() as usize).clamp(1, units - 1);
        let mut chosen = vec![false; units];
        for unit in &permutation(units, seed, Purpose::Split, 0)[..count] {
            chosen[*unit as usize] = true;
        }
        if !by_record {
            return chosen;
        }
        let unit_of: BTreeMap<u64, usize> = records.into_iter().zip(0..).collect();
        let records = self.records.iter();
        records.map(|record| chosen[unit_of[record]]).collect()
    }

    fn subset(&self, indices: &[usize], name: &str, counts: Counts) -> Dataset {
        let examples: Vec<Example> = indices.iter().map(|i| self.examples[*i].clone()).collect();
        let records: Vec<u64> = indices.iter().map(|i| self.records[*i]).collect();
        let mut distinct = records.clone();
        distinct.dedup();
        let left_out = counts.dropped + counts.skipped;
        let windows = if self.counts.windows == 0 {
            0
        } else {
            windows(&records)
        };
        let counts = Counts {
            records: distinct.len() as u64 + left_out,
            windows,
            ..with_token_counts(counts, &examples)
        };
        let fingerprint = format!("{}-{name}-{}", self.fingerprint, examples.len());
        let first = self.first.clone().filter(|_| indices.first() == Some(&0));
        Dataset {
            examples: examples.into(),
            records: records.into(),
            counts,
            eos_trained: self.eos_trained,
            fingerprint,
            first,
        }
    }
}

/// Examples that share their record with another.
fn windows(records: &[u64]) -> u64 {
    records
        .chunk_by(|a, b| a == b)
        .map(<[u64]>::len)
        .filter(|n| *n > 1)
        .sum::<usize>() as u64
}

/// `counts` with examples, tokens and loss tokens recounted.
pub(super) fn with_token_counts(counts: Counts, examples: &[Example]) -> Counts {
    Counts {
        examples: examples.len() as u64,
        tokens: examples.iter().map(|e| e.tokens.len() as u64).sum(),
        loss_tokens: examples.iter().map(|e| e.loss_tokens() as u64).sum(),
        ..counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(records: &[u64]) -> Dataset {
        let examples: Vec<Example> = (0..records.len() as u32)
            .map(|i| Example {
                tokens: vec![i, i],
                loss: vec![false, true],
                labels: Vec::new(),
                values: Vec::new(),
            })
            .collect();
        let counts = with_token_counts(
            Counts {
                records: 20,
                skipped: 2,
                ..Counts::default()
            },
            &examples,
        );
        let records = records.into();
        Dataset {
            examples: examples.into(),
            records,
            counts,
            eos_trained: true,
            fingerprint: "f".into(),
            first: None,
        }
    }

    #[test]
    fn a_split_is_a_partition_that_the_seed_decides() {
        let whole = dataset(&(0..20).collect::<Vec<_>>());
        let (train, validation) = whole.split(0.25, 7).unwrap();
        assert_eq!((train.examples.len(), validation.examples.len()), (15, 5));
        let mut ids: Vec<u32> = train
            .examples
            .iter()
            .chain(&*validation.examples)
            .map(|e| e.tokens[0])
            .collect();
        assert!(ids[..15].is_sorted() && ids[15..].is_sorted());
        ids.sort_unstable();
        assert_eq!(ids, (0..20).collect::<Vec<_>>());
        assert_eq!(whole.split(0.25, 7).unwrap().1, validation);
        assert_ne!(whole.split(0.25, 8).unwrap().1, validation);
        assert_eq!(
            (
                train.counts.loss_tokens,
                train.counts.skipped,
                validation.counts.tokens,
                validation.counts.skipped
            ),
            (15, 2, 10, 0)
        );
    }

    #[test]
    fn windows_of_one_text_stay_together() {
        let (train, validation) = dataset(&[0, 0, 0, 1, 1, 2, 2, 2]).split(0.34, 1).unwrap();
        assert!(
            validation
                .records
                .iter()
                .all(|r| !train.records.contains(r))
                && !validation.records.is_empty()
        );
        let (train, validation) = dataset(&[4, 4, 4]).split(0.01, 1).unwrap();
        assert_eq!((train.examples.len(), validation.examples.len()), (2, 1));
        assert!(dataset(&[0]).split(0.5, 1).is_err() && dataset(&[0, 1]).split(1.0, 1).is_err());
    }
}
