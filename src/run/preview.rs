//! The records of a recipe as they will be trained: text by loss mask, lengths, rows and duplicates.
//!
//! Takes a recipe, reads its model's configuration and tokenizer and its records, returns a `Preview`. Reads no weights and needs
//! no memory for a run.

use std::collections::HashSet;

use candle_core::Device;
use serde::Serialize;

use super::architecture::architecture_of;
use super::model::{find_model, tokenizer_of};
use super::options::sampler_options;
use super::records::{Records, Sources};
use super::task::resolve_task;
use crate::data::{Counts, Dataset, Example, Sampler, TextSpan, Tokenizer, text_spans};
use crate::error::Result;
use crate::hub::Progress;
use crate::recipe::{Init, Quantization, Recipe};

/// Bars of a histogram at most.
const BARS: usize = 12;

/// A recipe's records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preview {
    /// The training records.
    pub train: SetPreview,
    /// The validation records, if there are any.
    pub validation: Option<SetPreview>,
    /// How examples share rows.
    pub rows: RowsPreview,
    /// Examples that occur more than once.
    pub duplicates: Duplicates,
    /// What preflight would warn of.
    pub warnings: Vec<String>,
}

/// One set of records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetPreview {
    /// Records and tokens.
    #[serde(flatten)]
    pub counts: Counts,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Tokens of the median example.
    pub median: usize,
    /// Whether the end of text, or of a turn, is learned.
    pub eos_trained: bool,
    /// Examples by length, the shortest first.
    pub lengths: Vec<LengthBar>,
    /// Some examples.
    pub shown: Vec<ShownExample>,
}

/// Examples with a length in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LengthBar {
    /// Fewest tokens.
    pub from: usize,
    /// Most tokens.
    pub to: usize,
    /// Examples.
    pub examples: u64,
}

/// One example.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownExample {
    /// Its number in the set, from 1.
    pub number: usize,
    /// Tokens.
    pub tokens: usize,
    /// Tokens with a loss.
    pub loss_tokens: usize,
    /// Whether it has `max_length` tokens: it was cut there, or just fits.
    pub at_max_length: bool,
    /// Its classes, if it is classified.
    pub labels: Vec<String>,
    /// Its text in order, by loss mask.
    pub pieces: Vec<TextSpan>,
}

/// How examples share rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RowsPreview {
    /// Whether a row may hold several examples.
    pub packing: bool,
    /// Rows of an epoch.
    pub rows: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Tokens of a packed row at most.
    pub max_length: usize,
    /// Tokens of all rows over what they could hold.
    pub filled: f64,
}

/// Examples with the same tokens and loss mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Duplicates {
    /// Training examples that repeat an earlier one.
    pub in_train: u64,
    /// Validation examples that are training examples too: their loss says nothing of new records.
    pub validation_in_train: u64,
}

/// The records of `recipe`; `show` examples of each set, spread over it.
///
/// # Errors
/// A model or records that cannot be found or read.
pub fn preview(mut recipe: Recipe, show: usize, progress: &dyn Progress) -> Result<Preview> {
    let sources = Sources::find(&recipe, progress)?;
    let files = find_model(
        &recipe.model.id,
        &recipe.model.revision,
        recipe.model.file.as_deref(),
        progress,
    )?;
    let mut architecture = architecture_of(&files, Init::Random, Quantization::None, &Device::Cpu)?;
    resolve_task(
        &mut recipe,
        &mut architecture,
        Some(sources.training_files()),
    )?;
    let tokenizer = tokenizer_of(&files, architecture.vocab_size, recipe.data.chat_date)?;
    let records = Records::load(&recipe, sources, &tokenizer, progress)?;
    let looking = Looking {
        recipe: &recipe,
        tokenizer: &tokenizer,
        show,
    };
    let mut warnings = tokenizer.warnings().to_vec();
    warnings.extend(records.warnings());
    let validation = records.validation.as_ref();
    Ok(Preview {
        train: looking.set(&records.train)?,
        validation: validation.map(|set| looking.set(set)).transpose()?,
        rows: looking.rows(&records.train)?,
        duplicates: duplicates(
            &records.train.examples,
            validation.map_or(&[], |set| &set.examples),
        ),
        warnings,
    })
}

struct Looking<'a> {
    recipe: &'a Recipe,
    tokenizer: &'a Tokenizer,
    show: usize,
}

impl Looking<'_> {
    fn set(&self, set: &Dataset) -> Result<SetPreview> {
        let mut lengths: Vec<usize> = set.examples.iter().map(|one| one.tokens.len()).collect();
        lengths.sort_unstable();
        let count = lengths.len();
        let shown = self.show.min(count);
        let examples = (0..shown).map(|index| self.example(set, index * count / shown));
        Ok(SetPreview {
            counts: set.counts,
            longest: lengths.last().copied().unwrap_or_default(),
            median: lengths.get(count / 2).copied().unwrap_or_default(),
            eos_trained: set.eos_trained,
            lengths: histogram(&lengths),
            shown: examples.collect::<Result<_>>()?,
        })
    }

    fn example(&self, set: &Dataset, index: usize) -> Result<ShownExample> {
        let example = &set.examples[index];
        let label = |id: &u32| self.recipe.data.labels.get(*id as usize).cloned();
        Ok(ShownExample {
            number: index + 1,
            tokens: example.tokens.len(),
            loss_tokens: example.loss_tokens(),
            at_max_length: example.tokens.len() == self.recipe.data.max_length,
            labels: example.labels.iter().filter_map(label).collect(),
            pieces: text_spans(example, self.tokenizer)?,
        })
    }

    fn rows(&self, train: &Dataset) -> Result<RowsPreview> {
        let sampler = Sampler::new(train.examples.clone(), sampler_options(self.recipe))?;
        let data = &self.recipe.data;
        let room = sampler.rows() * data.max_length;
        Ok(RowsPreview {
            packing: data.packing,
            rows: sampler.rows() as u64,
            steps_per_epoch: sampler.steps_per_epoch(),
            max_length: data.max_length,
            filled: train.counts.tokens as f64 / room as f64,
        })
    }
}

/// Examples by length, from the sorted lengths: bars of equal width, a multiple of 8 tokens.
fn histogram(lengths: &[usize]) -> Vec<LengthBar> {
    let (Some(shortest), Some(longest)) = (lengths.first(), lengths.last()) else {
        return Vec::new();
    };
    let width = (longest - shortest + 1).div_ceil(BARS).next_multiple_of(8);
    let first = shortest / width * width;
    let starts = (first..=*longest).step_by(width);
    let bar = |from: usize| {
        let below = |end: usize| lengths.partition_point(|length| *length < end);
        LengthBar {
            from,
            to: from + width - 1,
            examples: (below(from + width) - below(from)) as u64,
        }
    };
    starts.map(bar).collect()
}

fn duplicates(train: &[Example], validation: &[Example]) -> Duplicates {
    let distinct: HashSet<_> = train.iter().map(identity).collect();
    Duplicates {
        in_train: (train.len() - distinct.len()) as u64,
        validation_in_train: validation
            .iter()
            .filter(|example| distinct.contains(&identity(example)))
            .count() as u64,
    }
}

fn identity(example: &Example) -> (&[u32], &[bool]) {
    (&example.tokens, &example.loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(tokens: &[u32]) -> Example {
        Example {
            tokens: tokens.to_vec(),
            loss: vec![true; tokens.len()],
            labels: Vec::new(),
            values: Vec::new(),
        }
    }

    /// By hand: lengths 3 to 40 are 38 apart, 12 bars of 4 become 8 wide.
    #[test]
    fn bars_are_of_equal_width_and_hold_every_example() {
        let bars = histogram(&[3, 7, 8, 8, 40]);
        let counts: Vec<u64> = bars.iter().map(|bar| bar.examples).collect();
        assert_eq!(counts, [2, 2, 0, 0, 0, 1]);
        assert_eq!((bars[0].from, bars[0].to, bars[5].to), (0, 7, 47));
        assert_eq!(histogram(&[]), []);
        assert_eq!(histogram(&[5, 5]).len(), 1);
    }

    #[test]
    fn repeated_examples_are_counted_once_each() {
        let train = [&[1, 2][..], &[1, 2], &[1, 2], &[3]].map(example);
        let validation = [&[3][..], &[3], &[4]].map(example);
        let found = duplicates(&train, &validation);
        assert_eq!((found.in_train, found.validation_in_train), (2, 2));
    }
}
