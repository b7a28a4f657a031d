//! Counter-based random numbers: one stream for each (seed, purpose, counters, name).
//!
//! Owns how a key becomes a generator. Takes a seed, a purpose, counters (step, example, ...) and a
//! name (a module's path); returns a ChaCha8 generator. Stateless: a draw depends on its key alone,
//! not on the order of draws or the number of threads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

/// What a stream is for; streams of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Initial values of LoRA's A.
    AdapterInit,
    /// Dropout masks.
    Dropout,
    /// Order of records and the validation split.
    Shuffle,
    /// Initial weights of a model trained from scratch.
    WeightInit,
    /// Token sampling in generation.
    Sampling,
    /// Arbitrary weights and token ids, for timing.
    Probe,
}

impl Purpose {
    /// The purpose in the key; changing one changes the random numbers of every run.
    fn tag(self) -> &'static str {
        match self {
            Self::AdapterInit => "adapter-init",
            Self::Dropout => "dropout",
            Self::Shuffle => "shuffle",
            Self::WeightInit => "weight-init",
            Self::Sampling => "sampling",
            Self::Probe => "probe",
        }
    }
}

/// The generator of a key.
///
/// The ChaCha key is SHA-256 of: the purpose's tag, a zero byte, `seed`, the number of `counters`,
/// the `counters` (each a little-endian u64), then `name`. Every part but the last has a known
/// length, so different keys hash different bytes.
///
/// ```
/// use rand_chacha::rand_core::Rng;
/// use wattune::random::{Purpose, stream};
/// let mut a = stream(42, Purpose::Dropout, &[7, 3], "model.layers.0.mlp.up_proj");
/// let mut b = stream(42, Purpose::Dropout, &[7, 3], "model.layers.0.mlp.up_proj");
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
pub fn stream(seed: u64, purpose: Purpose, counters: &[u64], name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(purpose.tag());
    hash.update([0]);
    hash.update(seed.to_le_bytes());
    hash.update((counters.len() as u64).to_le_bytes());
    for counter in counters {
        hash.update(counter.to_le_bytes());
    }
    hash.update(name);
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::rand_core::Rng;

    #[test]
    fn every_part_of_the_key_counts() {
        let keys: [(u64, Purpose, &[u64], &str); 8] = [
            (1, Purpose::Dropout, &[7, 3], "q"),
            (2, Purpose::Dropout, &[7, 3], "q"),
            (1, Purpose::Shuffle, &[7, 3], "q"),
            (1, Purpose::Dropout, &[3, 7], "q"),
            (1, Purpose::Dropout, &[7], "q"),
            (1, Purpose::Dropout, &[7, 3], "k"),
            (1, Purpose::Dropout, &[], ""),
            // Eight bytes of name must not pass for a counter.
            (1, Purpose::Dropout, &[7], "\u{3}\0\0\0\0\0\0\0q"),
        ];
        let mut first: Vec<u64> = keys
            .iter()
            .map(|(s, u, w, n)| stream(*s, *u, w, n).next_u64())
            .collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), keys.len());
    }

    #[test]
    fn streams_are_chacha8_of_the_hashed_key() {
        // From scripts/random_stream.py, an independent ChaCha8.
        assert_eq!(
            stream(42, Purpose::Shuffle, &[1], "x").next_u64(),
            0xb236_03e3_2c59_32ec
        );
    }
}
