//! The input of one forward pass on its device, and its split for data parallelism.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::architecture::Architecture;
use crate::error::{Error, Kind, Result};
use crate::ops::{OutputTargets, Segments};

/// Minimum average number of tokens of a shard.
const MIN_SHARD_TOKENS: usize = 256;
/// Maximum number of shards of a batch: each has a copy of the gradients until they are summed.
const MAX_SHARDS: usize = 8;

/// The input of one forward pass on the device.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Token ids (N), u32.
    pub(super) ids: Tensor,
    pub(super) segments: Segments,
    /// Index of each segment's example.
    pub(super) examples: Vec<u64>,
    /// Rows with a loss (L), u32, ascending.
    pub(super) loss_positions: Tensor,
    /// Token ids to predict, or classes (L).
    pub(super) targets: Vec<u32>,
    /// Of several labels or a regression: the target of each output (L, K).
    values: Vec<f32>,
}

impl Batch {
    /// `tokens` (N) of segments with the given lengths and example indices, end to end; the logits
    /// at `loss_positions` (ascending) predict `targets`.
    pub fn new(
        tokens: &[u32],
        lengths: &[usize],
        examples: Vec<u64>,
        loss_positions: &[u32],
        targets: Vec<u32>,
        device: &Device,
    ) -> Result<Self> {
        let segments = Segments::from_lengths(lengths.iter().copied());
        let ids = Tensor::from_slice(tokens, tokens.len(), device)?;
        let loss_positions = Tensor::from_slice(loss_positions, loss_positions.len(), device)?;
        Ok(Self {
            ids,
            segments,
            examples,
            loss_positions,
            targets,
            values: Vec::new(),
        })
    }

    /// The batch with a target for each output (L, K).
    pub fn with_values(mut self, values: Vec<f32>) -> Self {
        self.values = values;
        self
    }

    /// The targets of outputs, of classes with these weights.
    pub(super) fn output_targets<'a>(&'a self, class_weights: &'a [f32]) -> OutputTargets<'a> {
        OutputTargets {
            classes: &self.targets,
            class_weights,
            values: &self.values,
        }
    }

    /// Number of targets.
    pub fn loss_tokens(&self) -> usize {
        self.targets.len()
    }

    /// The sum of the weights of the targets in the training loss of a model.
    pub fn loss_weight(&self, architecture: &Architecture) -> f64 {
        architecture.loss_weight(&self.targets)
    }

    /// Tokens of each segment.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.segments.ranges().iter().map(Range::len).collect()
    }

    /// The last row of the segment of each row with a loss (L), u32.
    pub(super) fn last_rows(&self) -> Result<Tensor> {
        let ranges = self.segments.ranges();
        let positions = self.loss_positions.to_vec1::<u32>()?;
        let last = |position: &u32| {
            let segment = ranges.partition_point(|range| range.end <= *position as usize);
            ranges[segment].end as u32 - 1
        };
        let rows: Vec<u32> = positions.iter().map(last).collect();
        let count = rows.len();
        Ok(Tensor::from_vec(rows, count, self.loss_positions.device())?)
    }

    /// The segments of the rows with a loss, and their examples.
    pub(super) fn loss_segments(&self) -> Result<(Segments, Vec<u64>)> {
        let positions = self.loss_positions.to_vec1::<u32>()?;
        let rows = |range: &Range<usize>| {
            let inside = |position: &&u32| range.contains(&(**position as usize));
            positions.iter().filter(inside).count()
        };
        let lengths: Vec<usize> = self.segments.ranges().iter().map(rows).collect();
        let examples = self.examples.iter().zip(&lengths);
        let examples = examples.filter(|(_, rows)| **rows > 0);
        let examples = examples.map(|(example, _)| *example).collect();
        Ok((Segments::from_lengths(lengths), examples))
    }

    /// Refuses token ids out of the embedding's range; targets are such if `predicts_tokens`.
    pub(super) fn check(&self, vocab_size: usize, predicts_tokens: bool) -> Result<()> {
        let targets = self.targets.iter().filter(|_| predicts_tokens);
        let highest = self
            .ids
            .max(0)?
            .to_scalar::<u32>()?
            .max(targets.copied().max().unwrap_or(0));
        if (highest as usize) < vocab_size {
            return Ok(());
        }
        Err(Error::new(
            Kind::Tokenizer,
            "a token id lies beyond the model's embedding",
        )
        .value(highest.to_string())
        .rule(format!("below vocab_size = {vocab_size}"))
        .hint("use the tokenizer that was published with the model"))
    }

    /// Shards of nearly equal size, segments undivided and in order: a function of the segments'
    /// lengths alone.
    pub(super) fn split(&self) -> Result<Vec<Self>> {
        let ids = self.ids.to_vec1::<u32>()?;
        let positions = self.loss_positions.to_vec1::<u32>()?;
        let ranges = self.segments.ranges();
        let shard = |shard: Range<usize>| {
            let tokens = ranges[shard.start].start..ranges[shard.end - 1].end;
            let losses_before =
                |token: usize| positions.partition_point(|position| (*position as usize) < token);
            let losses = losses_before(tokens.start)..losses_before(tokens.end);
            let shard_positions: Vec<u32> = positions[losses.clone()]
                .iter()
                .map(|position| position - tokens.start as u32)
                .collect();
            let lengths: Vec<usize> = ranges[shard.clone()].iter().map(Range::len).collect();
            let outputs = self.values.len() / self.targets.len().max(1);
            let values = &self.values[losses.start * outputs..losses.end * outputs];
            let batch = Self::new(
                &ids[tokens],
                &lengths,
                self.examples[shard].to_vec(),
                &shard_positions,
                self.targets[losses].to_vec(),
                self.ids.device(),
            )?;
            Ok(batch.with_values(values.to_vec()))
        };
        shard_ranges(ranges).into_iter().map(shard).collect()
    }
}

/// Maximum number of shards of a batch of `tokens` tokens.
pub(super) fn max_shards(tokens: usize) -> usize {
    (tokens / MIN_SHARD_TOKENS).clamp(1, MAX_SHARDS)
}

/// The segments of each shard: it ends with the first segment that reaches its share of the tokens.
fn shard_ranges(segments: &[Range<usize>]) -> Vec<Range<usize>> {
    let tokens = segments.last().map_or(0, |last| last.end);
    let shards = max_shards(tokens);
    let mut start = 0;
    let mut ranges = Vec::with_capacity(shards);
    for shard in 1..=shards {
        let last = segments.partition_point(|segment| segment.end * shards < tokens * shard);
        let end = (last + 1).min(segments.len());
        if start < end {
            ranges.push(start..end);
            start = end;
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(lengths: &[usize]) -> Vec<Range<usize>> {
        shard_ranges(Segments::from_lengths(lengths.iter().copied()).ranges())
    }

    #[test]
    fn shards_hold_undivided_segments_of_nearly_equal_size() {
        assert_eq!(cut(&[128; 8]), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!((cut(&[511]).len(), cut(&[2048]).len()), (1, 1));
        assert_eq!(cut(&[1000, 10, 10, 1000]), [0..1, 1..4]);
        assert_eq!(cut(&[1; 600]), [0..300, 300..600]);
        assert_eq!(cut(&[64; 100]).len(), MAX_SHARDS);
        assert!(cut(&[]).is_empty());
    }

    #[test]
    fn a_shard_has_the_segments_of_the_batch() {
        let tokens: Vec<u32> = (0..600).collect();
        let batch = Batch::new(
            &tokens,
            &[200, 100, 300],
            vec![7, 8, 9],
            &[5, 299, 300, 598],
            vec![6, 1, 2, 3],
            &Device::Cpu,
        )
        .unwrap();
        let shards = batch.split().unwrap();
        let content = |shard: &Batch| {
            (
                shard.ids.to_vec1::<u32>().unwrap()[0],
                shard.lengths(),
                shard.examples.clone(),
                shard.loss_positions.to_vec1::<u32>().unwrap(),
                shard.targets.clone(),
            )
        };
        assert_eq!(shards.len(), 2);
        assert_eq!(
            content(&shards[0]),
            (0, vec![200, 100], vec![7, 8], vec![5, 299], vec![6, 1])
        );
        assert_eq!(
            content(&shards[1]),
            (300, vec![300], vec![9], vec![0, 298], vec![2, 3])
        );
    }
}
