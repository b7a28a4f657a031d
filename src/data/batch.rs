//! Training inputs: examples, rows and micro-batches.

use std::ops::Range;

/// One encoded record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each token is a loss token (predicted from those before it); the first never is.
    pub loss: Vec<bool>,
}

/// The tokens of one record, which attend to each other only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its range in the micro-batch's tokens.
    pub range: Range<usize>,
    /// The record's index in its data set; keys dropout masks.
    pub example: u64,
}

/// One forward pass: rows laid end to end without padding. Attention never crosses a segment; positions restart in each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MicroBatch {
    /// Token ids of all rows.
    pub tokens: Vec<u32>,
    /// The records in it, in order, covering `tokens`.
    pub segments: Vec<Segment>,
    /// Positions whose successor is a loss token, ascending.
    pub loss_positions: Vec<u32>,
    /// That successor, one per loss position.
    pub targets: Vec<u32>,
}

impl MicroBatch {
    /// Lays `examples` (index in the data set, record) end to end.
    pub fn new<'a>(examples: impl IntoIterator<Item = (u64, &'a Example)>) -> Self {
        let mut batch = Self::default();
        for (index, example) in examples {
            let start = batch.tokens.len();
            batch.tokens.extend_from_slice(&example.tokens);
            batch.segments.push(Segment {
                range: start..batch.tokens.len(),
                example: index,
            });
            for i in (1..example.tokens.len()).filter(|i| example.loss[*i]) {
                batch.loss_positions.push((start + i - 1) as u32);
                batch.targets.push(example.tokens[i]);
            }
        }
        batch
    }

    /// The sizes that its cost depends on.
    pub fn shape(&self) -> BatchShape {
        BatchShape {
            segments: self.segments.iter().map(|s| s.range.len()).collect(),
            loss_tokens: self.targets.len(),
        }
    }
}

/// The sizes of a micro-batch, which determine its work.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// Tokens of each record, in order.
    pub segments: Vec<usize>,
    /// Positions with a loss.
    pub loss_tokens: usize,
}

impl BatchShape {
    /// Total tokens.
    pub fn tokens(&self) -> usize {
        self.segments.iter().sum()
    }
}
