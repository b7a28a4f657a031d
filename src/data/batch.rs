//! Training inputs: examples, rows and micro-batches.

use std::ops::Range;

/// One encoded record.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each token is a loss token: predicted from those before it, which the first never is,
    /// or classified.
    pub loss: Vec<bool>,
    /// Class of each loss token, if they are classified; 0 with `values`; else empty.
    pub labels: Vec<u32>,
    /// The target of each output of the record: 0 or 1 of each label, or a number; else empty.
    pub values: Vec<f32>,
}

impl Example {
    /// Number of loss tokens.
    pub fn loss_tokens(&self) -> usize {
        self.loss.iter().filter(|loss| **loss).count()
    }
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MicroBatch {
    /// Token ids of all rows.
    pub tokens: Vec<u32>,
    /// The records in it, in order, covering `tokens`.
    pub segments: Vec<Segment>,
    /// Positions whose output has a loss, ascending: those before a loss token, or the loss tokens
    /// themselves if they are classified.
    pub loss_positions: Vec<u32>,
    /// The loss token after the position, or the position's class.
    pub targets: Vec<u32>,
    /// The target of each output at the positions (L, K); empty where `targets` are.
    pub values: Vec<f32>,
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
            let losses = (0..example.tokens.len()).filter(|i| example.loss[*i]);
            if example.labels.is_empty() {
                for i in losses.filter(|i| *i > 0) {
                    batch.loss_positions.push((start + i - 1) as u32);
                    batch.targets.push(example.tokens[i]);
                }
            } else {
                batch
                    .loss_positions
                    .extend(losses.map(|i| (start + i) as u32));
                batch.targets.extend_from_slice(&example.labels);
                batch.values.extend_from_slice(&example.values);
            }
        }
        batch
    }

    /// The range in `targets` of each record, in order.
    pub fn loss_ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let before = |position: usize| {
            let positions = &self.loss_positions;
            positions.partition_point(|at| (*at as usize) < position)
        };
        self.segments
            .iter()
            .map(move |segment| before(segment.range.start)..before(segment.range.end))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The target at a position: the next token (causal LM), or the class of this one (classification).
    #[test]
    fn classes_have_their_losses_at_their_tokens() {
        let example = |labels: &[u32]| Example {
            tokens: vec![5, 6, 7],
            loss: vec![labels.len() == 2, true, false],
            labels: labels.to_vec(),
            values: Vec::new(),
        };
        let batch =
            |labels: &[u32]| MicroBatch::new([(3, &example(labels)), (9, &example(labels))]);
        let (predicted, classified) = (batch(&[]), batch(&[1, 0]));
        assert_eq!(predicted.loss_positions, [0, 3]);
        assert_eq!(predicted.targets, [6, 6]);
        assert_eq!(classified.loss_positions, [0, 1, 3, 4]);
        assert_eq!(classified.targets, [1, 0, 1, 0]);
        assert_eq!(classified.shape().loss_tokens, 4);
    }
}
