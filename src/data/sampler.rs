//! The micro-batches of each step.
//!
//! Takes the examples and the sizes of a step, returns the micro-batches of any step: a pure function of the step's number, which
//! makes resuming exact. Records are concatenated without padding. Knows nothing of training.

use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{BatchShape, Example, MicroBatch};
use super::packing::{best_fit, next_fit};
use super::permutation::{Purpose, permutation};
use crate::error::{Error, Kind, Result};

/// Micro-batches of a megabatch, within which records are sorted by length (transformers, `LengthGroupedSampler`: at most 50 batches).
const MEGABATCH: usize = 50;

/// The sizes of a step and the order of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerOptions {
    /// Rows in one micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches in one step.
    pub gradient_accumulation_steps: usize,
    /// Tokens of a packed row.
    pub max_length: usize,
    /// Several records in one row; otherwise a row is one record.
    pub packing: bool,
    /// A new order each epoch; otherwise the file's order.
    pub shuffle: bool,
    /// Decides every order.
    pub seed: u64,
}

/// One epoch: the rows of its micro-batches, in order.
type Epoch = Vec<u32>;

/// Draws the micro-batches of any step.
#[derive(Debug)]
pub struct Sampler {
    examples: Arc<[Example]>,
    /// Loss tokens of each example.
    loss_tokens: Vec<usize>,
    options: SamplerOptions,
    /// Example indices by row, equal in every epoch, so that every epoch has as many steps.
    rows: Vec<Vec<u32>>,
    /// Tokens of each row.
    row_lengths: Vec<usize>,
    /// The epoch used last.
    cached_epoch: Mutex<Option<(u64, Arc<Epoch>)>>,
}

impl Sampler {
    /// Prepares the rows.
    ///
    /// # Errors
    /// `Kind::Data` where there are no examples or a size is zero.
    pub fn new(examples: Arc<[Example]>, options: SamplerOptions) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::new(Kind::Data, "the data set holds nothing to learn")
                .rule("at least one example with a loss token")
                .hint("check `data.format` and `data.max_length`; `wattune recipe check` shows what was dropped and why"));
        }
        if options.micro_batch_size == 0
            || options.gradient_accumulation_steps == 0
            || options.max_length == 0
        {
            return Err(Error::new(Kind::Data, "a step holds no tokens").rule(
                "micro_batch_size, gradient_accumulation_steps and max_length are at least 1",
            ));
        }
        let lengths: Vec<usize> = examples.iter().map(|e| e.tokens.len()).collect();
        let count = examples.len();
        let rows = match (options.packing, options.shuffle) {
            (true, true) => best_fit(
                &permutation(count, options.seed, Purpose::Packing, 0),
                &lengths,
                options.max_length,
            ),
            (true, false) => next_fit(
                &(0..count as u32).collect::<Vec<_>>(),
                &lengths,
                options.max_length,
            ),
            (false, _) => (0..count as u32).map(|i| vec![i]).collect(),
        };
        let row_length = |row: &Vec<u32>| row.iter().map(|i| lengths[*i as usize]).sum();
        Ok(Self {
            loss_tokens: examples.iter().map(Example::loss_tokens).collect(),
            examples,
            options,
            row_lengths: rows.iter().map(row_length).collect(),
            rows,
            cached_epoch: Mutex::new(None),
        })
    }

    /// Steps in one pass over the data; the last may be smaller than the others, and no step crosses into the next epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows
            .len()
            .div_ceil(self.options.micro_batch_size)
            .div_ceil(self.options.gradient_accumulation_steps) as u64
    }

    /// Rows in one pass over the data.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The micro-batches of `step`, counted from 0 over all epochs.
    pub fn step(&self, step: u64) -> Vec<MicroBatch> {
        self.map_step(step, |examples| {
            MicroBatch::new(
                examples
                    .iter()
                    .map(|i| (u64::from(*i), &self.examples[*i as usize])),
            )
        })
    }

    /// The sizes of the micro-batches of `step`, without copying tokens.
    pub fn step_shape(&self, step: u64) -> Vec<BatchShape> {
        self.map_step(step, |examples| BatchShape {
            segments: examples.iter().map(|i| self.tokens_of(*i)).collect(),
            loss_tokens: examples.iter().map(|i| self.loss_tokens_of(*i)).sum(),
        })
    }

    /// `make` of the examples of each micro-batch.
    fn map_step<T>(&self, step: u64, make: impl Fn(&[u32]) -> T) -> Vec<T> {
        let mut made = Vec::new();
        self.visit_step(step, |rows| {
            let examples = rows.iter().flat_map(|row| self.row(*row));
            made.push(make(&examples.copied().collect::<Vec<_>>()));
        });
        made
    }

    /// Calls `visit` with the rows of each micro-batch of `step`.
    pub fn visit_step(&self, step: u64, visit: impl FnMut(&[u32])) {
        let per_epoch = self.steps_per_epoch();
        let epoch = self.epoch(step / per_epoch);
        let per_step = self.options.gradient_accumulation_steps;
        let first = (step % per_epoch) as usize * per_step;
        let batches = epoch.chunks(self.options.micro_batch_size);
        batches.skip(first).take(per_step).for_each(visit);
    }

    /// The examples of a row.
    pub fn row(&self, row: u32) -> &[u32] {
        &self.rows[row as usize]
    }

    /// Tokens of an example.
    pub fn tokens_of(&self, example: u32) -> usize {
        self.examples[example as usize].tokens.len()
    }

    /// Loss tokens of an example.
    pub fn loss_tokens_of(&self, example: u32) -> usize {
        self.loss_tokens[example as usize]
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        // A panic in another thread leaves the last epoch or none: both are valid.
        let mut cached_epoch = self
            .cached_epoch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*cached_epoch {
            Some((cached, epoch)) if *cached == number => epoch.clone(),
            _ => {
                let epoch = Arc::new(self.draw_epoch(number));
                *cached_epoch = Some((number, epoch.clone()));
                epoch
            }
        }
    }

    fn draw_epoch(&self, number: u64) -> Epoch {
        let SamplerOptions {
            micro_batch_size,
            packing,
            shuffle,
            seed,
            ..
        } = self.options;
        let mut order = if shuffle {
            permutation(self.rows.len(), seed, Purpose::Epoch, number)
        } else {
            (0..self.rows.len() as u32).collect()
        };
        if shuffle && !packing {
            self.group_by_length(&mut order);
        }
        if !shuffle || packing {
            return order;
        }
        // Sorting put the longest of each megabatch first; only a smaller last micro-batch stays in position.
        let whole = order.len() / micro_batch_size;
        let mixed = permutation(whole, seed, Purpose::MicroBatches, number);
        let batch = |i: u32| &order[i as usize * micro_batch_size..][..micro_batch_size];
        let mut mixed: Epoch = mixed.into_iter().flat_map(batch).copied().collect();
        mixed.extend_from_slice(&order[whole * micro_batch_size..]);
        mixed
    }

    /// Sorts by length within megabatches, so that a micro-batch has records of similar length.
    fn group_by_length(&self, order: &mut [u32]) {
        for megabatch in order.chunks_mut(self.options.micro_batch_size.saturating_mul(MEGABATCH)) {
            megabatch.sort_by_key(|row| std::cmp::Reverse(self.row_lengths[*row as usize]));
        }
    }
}

/// The examples in order, `micro_batch_size` to a micro-batch: an evaluation does not depend on any order.
///
/// # Panics
/// Where `micro_batch_size` is 0.
pub fn evaluation_batches(examples: &[Example], micro_batch_size: usize) -> Vec<MicroBatch> {
    let numbered: Vec<(u64, &Example)> = (0..).zip(examples).collect();
    numbered
        .chunks(micro_batch_size)
        .map(|batch| MicroBatch::new(batch.iter().copied()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn examples(lengths: &[usize]) -> Arc<[Example]> {
        let one = |length: usize| Example {
            tokens: (0..length as u32).collect(),
            loss: (0..length).map(|i| i > length / 2).collect(),
            labels: Vec::new(),
            values: Vec::new(),
        };
        lengths.iter().map(|length| one(*length)).collect()
    }

    fn options(packing: bool, shuffle: bool) -> SamplerOptions {
        SamplerOptions {
            micro_batch_size: 2,
            gradient_accumulation_steps: 2,
            max_length: 16,
            packing,
            shuffle,
            seed: 3,
        }
    }

    fn seen(sampler: &Sampler, step: u64) -> Vec<Vec<u64>> {
        sampler
            .step(step)
            .iter()
            .map(|b| b.segments.iter().map(|s| s.example).collect())
            .collect()
    }

    #[test]
    fn without_shuffling_steps_are_in_file_order_and_the_last_is_smaller() {
        let sampler = Sampler::new(examples(&[3; 7]), options(false, false)).unwrap();
        assert_eq!(sampler.steps_per_epoch(), 2);
        assert_eq!(seen(&sampler, 0), [[0, 1], [2, 3]]);
        assert_eq!(seen(&sampler, 1), [vec![4, 5], vec![6]]);
        assert_eq!(seen(&sampler, 2), seen(&sampler, 0));
        let packed = Sampler::new(examples(&[8, 8, 9, 7, 1]), options(true, false)).unwrap();
        assert_eq!(seen(&packed, 0), [vec![0, 1, 2, 3], vec![4]]);
    }

    #[test]
    fn a_step_depends_on_its_number_alone() {
        let lengths: Vec<usize> = (0..50).map(|i| 2 + i * 7 % 13).collect();
        for packing in [true, false] {
            let sampler = Sampler::new(examples(&lengths), options(packing, true)).unwrap();
            let forward: Vec<_> = (0..40).map(|s| sampler.step(s)).collect();
            let fresh = Sampler::new(examples(&lengths), options(packing, true)).unwrap();
            assert_eq!(fresh.step(37), forward[37]);
            assert_eq!(fresh.step(2), forward[2]);
            assert_ne!(
                fresh.step(sampler.steps_per_epoch()),
                forward[0],
                "a new epoch has a new order"
            );
            let other = Sampler::new(
                examples(&lengths),
                SamplerOptions {
                    seed: 4,
                    ..options(packing, true)
                },
            )
            .unwrap();
            assert_ne!(other.step(0), forward[0]);
        }
    }

    #[test]
    fn records_of_similar_length_share_a_micro_batch() {
        let lengths: Vec<usize> = (0..40).map(|i| 2 + (i * 17) % 40).collect();
        let sampler = Sampler::new(examples(&lengths), options(false, true)).unwrap();
        let spread = |shape: &BatchShape| {
            shape.segments.iter().max().unwrap() - shape.segments.iter().min().unwrap()
        };
        // All 40 lengths differ by one and are in one megabatch: neighbours are paired.
        assert!(
            (0..sampler.steps_per_epoch())
                .flat_map(|s| sampler.step_shape(s))
                .all(|shape| spread(&shape) == 1)
        );
        let firsts: Vec<usize> = (0..10)
            .map(|s| sampler.step_shape(s)[0].segments[0])
            .collect();
        assert!(
            !firsts.is_sorted_by(|a, b| a >= b),
            "long ones do not come first: {firsts:?}"
        );
    }

    #[test]
    fn an_empty_data_set_or_step_is_refused() {
        assert_eq!(
            Sampler::new(examples(&[]), options(true, true))
                .unwrap_err()
                .kind(),
            Kind::Data
        );
        let zero = SamplerOptions {
            micro_batch_size: 0,
            ..options(true, true)
        };
        assert_eq!(
            Sampler::new(examples(&[3]), zero).unwrap_err().kind(),
            Kind::Data
        );
    }

    #[test]
    fn evaluation_keeps_the_order() {
        let batches = evaluation_batches(&examples(&[2, 3, 4]), 2);
        assert_eq!(batches.len(), 2);
        assert_eq!(
            batches[1].segments,
            [super::super::batch::Segment {
                range: 0..4,
                example: 2
            }]
        );
    }

    proptest! {
        #[test]
        fn an_epoch_is_every_record_once(lengths in proptest::collection::vec(2_usize..16, 1..80), packing: bool, shuffle: bool, epoch in 0_u64..3) {
            let sampler = Sampler::new(examples(&lengths), options(packing, shuffle)).unwrap();
            let steps = sampler.steps_per_epoch();
            let mut all = Vec::new();
            for step in epoch * steps..(epoch + 1) * steps {
                let batches = sampler.step(step);
                prop_assert!(!batches.is_empty() && batches.len() <= 2);
                prop_assert_eq!(batches.iter().map(MicroBatch::shape).collect::<Vec<_>>(), sampler.step_shape(step));
                all.extend(batches.iter().flat_map(|b| b.segments.iter().map(|s| s.example)));
            }
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len() as u64).collect::<Vec<_>>());
        }
    }
}
