//! Which tokens attend to each other: ranges of a token list, each a sequence of its own.

use std::ops::Range;

/// Sequences laid end to end in one token list. Attention never crosses one; positions restart in each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments(Vec<Range<usize>>);

impl Segments {
    /// Segments of the given lengths, end to end; empty ones are left out.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut start = 0;
        let ranges = lengths.into_iter().filter(|n| *n > 0).map(|n| {
            start += n;
            start - n..start
        });
        Self(ranges.collect())
    }

    /// Each segment's range, in order.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.0
    }

    /// Tokens in all segments.
    pub fn tokens(&self) -> usize {
        self.0.last().map_or(0, |range| range.end)
    }
}
