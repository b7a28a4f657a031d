//! How many blocks are computed again in the backward pass.

/// Activation checkpointing (Chen et al. 2016): of this many blocks only the input is saved, and
/// their forward pass runs again in the backward pass.
///
/// They are the lowest of the blocks that the backward pass visits: by then the memory of the
/// others is free again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recompute(usize);

impl Recompute {
    /// In no block.
    pub const NONE: Self = Self(0);
    /// In every block.
    pub const ALL: Self = Self(usize::MAX);

    /// In the lowest `blocks` of those that the backward pass visits, or in all of them if there
    /// are fewer.
    pub fn lowest(blocks: usize) -> Self {
        Self(blocks)
    }

    /// In how many of the `visited` blocks.
    pub fn count(self, visited: usize) -> usize {
        self.0.min(visited)
    }
}
