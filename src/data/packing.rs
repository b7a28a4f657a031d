//! Packing: records into rows of at most a given length.
//!
//! Takes lengths in a given order, returns rows of indices: each record undivided in exactly one row. Knows nothing of tokens.

use std::collections::BTreeMap;

/// Records that `best_fit` packs at a time: bounds memory and makes packing linear in the data set.
const WINDOW: usize = 4096;

/// Next-fit packing in order: a row is closed when the next record does not fit.
pub(super) fn next_fit(order: &[u32], lengths: &[usize], max_length: usize) -> Vec<Vec<u32>> {
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut used = 0;
    for index in order {
        let length = lengths[*index as usize];
        match rows.last_mut() {
            Some(row) if used + length <= max_length => {
                row.push(*index);
                used += length;
            }
            _ => {
                rows.push(vec![*index]);
                used = length;
            }
        }
    }
    rows
}

/// Best-fit decreasing within windows of the order: the longest record first, each into the fullest row that still holds it.
pub(super) fn best_fit(order: &[u32], lengths: &[usize], max_length: usize) -> Vec<Vec<u32>> {
    order
        .chunks(WINDOW)
        .flat_map(|window| best_fit_window(window, lengths, max_length))
        .collect()
}

fn best_fit_window(window: &[u32], lengths: &[usize], max_length: usize) -> Vec<Vec<u32>> {
    let mut longest_first = window.to_vec();
    longest_first.sort_by_key(|index| std::cmp::Reverse(lengths[*index as usize]));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Free tokens -> the rows with that many.
    let mut free: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in longest_first {
        let length = lengths[index as usize];
        let tightest = free.range(length..).next().map(|(left, _)| *left);
        let (row, left) = match tightest {
            Some(left) => {
                let same = free.get_mut(&left).expect("a key just found");
                let row = same.pop().expect("no list of rows is empty");
                if same.is_empty() {
                    free.remove(&left);
                }
                (row, left)
            }
            None => {
                rows.push(Vec::new());
                // A record longer than a row is alone in one.
                (rows.len() - 1, max_length.max(length))
            }
        };
        rows[row].push(index);
        free.entry(left - length).or_default().push(row);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tightest_row_is_filled_first() {
        // Lengths 6 5 4 3 2 into rows of 10: 6+4, 5+3+2.
        assert_eq!(
            best_fit(&[4, 3, 2, 1, 0], &[6, 5, 4, 3, 2], 10),
            [vec![0, 2], vec![1, 3, 4]]
        );
        assert_eq!(
            next_fit(&[0, 1, 2, 3, 4], &[6, 5, 4, 3, 2], 10),
            [vec![0], vec![1, 2], vec![3, 4]]
        );
        assert!(best_fit(&[], &[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn no_record_is_lost_doubled_or_split(lengths in proptest::collection::vec(1_usize..40, 0..200), seed in any::<u64>()) {
            let order = crate::data::permutation::permutation(lengths.len(), seed, crate::data::permutation::Purpose::Packing, 0);
            for rows in [best_fit(&order, &lengths, 32), next_fit(&order, &lengths, 32)] {
                let mut all: Vec<u32> = rows.concat();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len() as u32).collect::<Vec<_>>());
                for row in rows {
                    let total: usize = row.iter().map(|i| lengths[*i as usize]).sum();
                    prop_assert!(total <= 32 || row.len() == 1);
                }
            }
        }
    }
}
