//! One forward pass's input on its device, and how it is cut where threads take parts of it.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::error::{Error, Kind, Result};
use crate::ops::Segments;

/// Tokens of a part, on average at least; and parts of a batch, at most: each has gradients of its own until they are summed.
const MIN_SHARD_TOKENS: usize = 256;
const MAX_SHARDS: usize = 8;

/// One forward pass's input on the device.
#[derive(Debug, Clone)]
pub struct Batch {
    pub(super) ids: Tensor,
    pub(super) segments: Segments,
    pub(super) examples: Vec<u64>,
    pub(super) loss_positions: Tensor,
    pub(super) targets: Vec<u32>,
}

impl Batch {
    /// `tokens` of segments with the given lengths and example numbers, laid end to end; the logits at `loss_positions` (ascending) predict
    /// `targets`.
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
        })
    }

    /// Targets in all.
    pub fn loss_tokens(&self) -> usize {
        self.targets.len()
    }

    /// Tokens of each segment.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.segments.ranges().iter().map(Range::len).collect()
    }

    /// Refuses token ids beyond the embedding.
    pub(super) fn check(&self, vocab_size: usize) -> Result<()> {
        let highest = self
            .ids
            .max(0)?
            .to_scalar::<u32>()?
            .max(self.targets.iter().copied().max().unwrap_or(0));
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

    /// Whole segments in parts of nearly one size, in order: a function of the segments' lengths alone.
    pub(super) fn split(&self) -> Result<Vec<Self>> {
        let (ids, positions) = (
            self.ids.to_vec1::<u32>()?,
            self.loss_positions.to_vec1::<u32>()?,
        );
        let ranges = self.segments.ranges();
        let part = |part: Range<usize>| {
            let tokens = ranges[part.start].start..ranges[part.end - 1].end;
            let before =
                |token: usize| positions.partition_point(|position| (*position as usize) < token);
            let losses = before(tokens.start)..before(tokens.end);
            let own: Vec<u32> = positions[losses.clone()]
                .iter()
                .map(|position| position - tokens.start as u32)
                .collect();
            let lengths: Vec<usize> = ranges[part.clone()].iter().map(Range::len).collect();
            let targets = self.targets[losses].to_vec();
            Self::new(
                &ids[tokens],
                &lengths,
                self.examples[part].to_vec(),
                &own,
                targets,
                self.ids.device(),
            )
        };
        shard_ranges(ranges).into_iter().map(part).collect()
    }
}

/// Parts of a batch of `tokens` tokens, at most.
pub(super) fn max_shards(tokens: usize) -> usize {
    (tokens / MIN_SHARD_TOKENS).clamp(1, MAX_SHARDS)
}

/// Which segments each part holds: it ends with the first that reaches its share of the tokens.
fn shard_ranges(segments: &[Range<usize>]) -> Vec<Range<usize>> {
    let tokens = segments.last().map_or(0, |last| last.end);
    let parts = max_shards(tokens);
    let ends = (1..=parts)
        .map(|part| segments.partition_point(|segment| segment.end * parts < tokens * part) + 1);
    let mut start = 0;
    let part = |end: usize| {
        let part = start..end.min(segments.len());
        start = part.end;
        part
    };
    ends.map(part).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(lengths: &[usize]) -> Vec<Range<usize>> {
        shard_ranges(Segments::from_lengths(lengths.iter().copied()).ranges())
    }

    #[test]
    fn parts_hold_whole_segments_of_as_many_tokens() {
        assert_eq!(cut(&[128; 8]), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!((cut(&[511]).len(), cut(&[2048]).len()), (1, 1));
        assert_eq!(cut(&[1000, 10, 10, 1000]), [0..1, 1..4]);
        assert_eq!(cut(&[1; 600]), [0..300, 300..600]);
        assert_eq!(cut(&[64; 100]).len(), MAX_SHARDS);
        assert!(cut(&[]).is_empty());
    }

    #[test]
    fn a_part_is_what_its_segments_were_in_the_batch() {
        let (lengths, tokens): (_, Vec<u32>) = ([200, 100, 300], (0..600).collect());
        let batch = Batch::new(
            &tokens,
            &lengths,
            vec![7, 8, 9],
            &[5, 299, 300, 598],
            vec![6, 1, 2, 3],
            &Device::Cpu,
        )
        .unwrap();
        let parts = batch.split().unwrap();
        let of = |part: &Batch| {
            let (ids, positions) = (
                part.ids.to_vec1::<u32>().unwrap(),
                part.loss_positions.to_vec1::<u32>().unwrap(),
            );
            (
                ids[0],
                part.lengths(),
                part.examples.clone(),
                positions,
                part.targets.clone(),
            )
        };
        assert_eq!(parts.len(), 2);
        assert_eq!(
            of(&parts[0]),
            (0, vec![200, 100], vec![7, 8], vec![5, 299], vec![6, 1])
        );
        assert_eq!(
            of(&parts[1]),
            (300, vec![300], vec![9], vec![0, 298], vec![2, 3])
        );
    }
}
