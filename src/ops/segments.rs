//! Sequences packed into one batch: ranges of a token list that do not attend to each other.

use std::ops::Range;

/// Sequences laid end to end in one token list. Attention never crosses one; positions restart in
/// each.
///
/// ```
/// use wattune::ops::Segments;
/// let segments = Segments::from_lengths([3, 0, 2]);
/// assert_eq!(segments.ranges(), [0..3, 3..5]);
/// assert_eq!(segments.tokens(), 5);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments(Vec<Range<usize>>);

impl Segments {
    /// Segments of these lengths; empty ones are dropped.
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
