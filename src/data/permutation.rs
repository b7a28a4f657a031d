//! Permutations keyed by (seed, purpose, number): any epoch's order can be drawn without drawing the earlier ones.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// The purpose of an order: two purposes of one seed are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The validation split.
    Split = 1,
    /// The order in which records are packed into rows.
    Packing = 2,
    /// The order of an epoch.
    Epoch = 3,
    /// The order of an epoch's micro-batches.
    MicroBatches = 4,
}

/// A permutation of `0..len` (Fisher-Yates on ChaCha8, keyed by the SHA-256 of the key's words).
pub(super) fn permutation(len: usize, seed: u64, purpose: Purpose, number: u64) -> Vec<u32> {
    let mut hash = Sha256::new();
    hash.update(b"wattune data order");
    for word in [seed, purpose as u64, number] {
        hash.update(word.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        // The high word of a 64 x 64 bit product: a bias below len / 2^64.
        let j = ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_key_matters_and_every_index_stays() {
        let base = permutation(100, 1, Purpose::Epoch, 0);
        for other in [
            permutation(100, 2, Purpose::Epoch, 0),
            permutation(100, 1, Purpose::Split, 0),
            permutation(100, 1, Purpose::Epoch, 1),
        ] {
            assert_ne!(base, other);
        }
        assert_eq!(base, permutation(100, 1, Purpose::Epoch, 0));
        let mut sorted = base;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert!(permutation(0, 1, Purpose::Epoch, 0).is_empty());
    }

    #[test]
    fn each_place_is_equally_likely() {
        // 6000 permutations of 3: each of the 6 is expected 1000 times, with a deviation of 29.
        let mut seen = std::collections::BTreeMap::new();
        (0..6000).for_each(|i| {
            *seen
                .entry(permutation(3, i, Purpose::Epoch, 0))
                .or_insert(0) += 1
        });
        assert!(
            seen.len() == 6 && seen.values().all(|n| (850..1150).contains(n)),
            "{seen:?}"
        );
    }
}
