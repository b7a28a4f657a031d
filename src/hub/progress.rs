//! What a transfer tells whoever watches it.
//!
//! Owns the seam through which the command line draws its bars. Takes file names and byte counts; returns nothing. Knows
//! nothing of terminals.

/// Watches transfers, one file at a time.
pub trait Progress {
    /// A file begins, or begins again from its first byte; `bytes` is its size where the hub said it.
    fn start(&self, file: &str, bytes: Option<u64>);
    /// So many more bytes of it are here (the first call after `start` includes what an earlier run left).
    fn advance(&self, bytes: u64);
    /// It is complete.
    fn finish(&self);
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _file: &str, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}
