//! Executed work: matrix products, vector operations and memory sweeps, counted exactly.
//!
//! Owns `Work` and the `WorkCounter` that ops add to as they run. `plan` and the running ops use
//! the same cost functions, so that forecast and execution can be compared for equality. Knows
//! nothing about devices: a device profile turns work into joules.

use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};
use std::sync::Mutex;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Format of a product's inputs; accumulation is always f32.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit IEEE.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE.
    F16,
}

impl Precision {
    /// The name in recipes and profiles.
    pub fn as_str(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> u64 {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 | Precision::F16 => 2,
        }
    }
}

/// The size of a block of values that are stored together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize {
    /// Its values.
    pub values: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// A matrix product (m, k) x (k, n): 2mnk FLOPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Product {
    /// Rows of the result.
    pub m: u64,
    /// Columns of the result.
    pub n: u64,
    /// The summed dimension.
    pub k: u64,
    /// Format of the inputs.
    pub precision: Precision,
    /// How the second is stored, if in another format.
    pub rhs_blocks: Option<BlockSize>,
}

impl Product {
    /// Bytes of the first operand.
    pub fn lhs_bytes(&self) -> u64 {
        let elements = self.m.saturating_mul(self.k);
        elements.saturating_mul(self.precision.size())
    }

    /// Bytes of the second operand as it is stored.
    pub fn rhs_bytes(&self) -> u64 {
        let elements = self.k.saturating_mul(self.n);
        match self.rhs_blocks {
            Some(block) => elements
                .div_ceil(block.values.max(1))
                .saturating_mul(block.bytes),
            None => elements.saturating_mul(self.precision.size()),
        }
    }

    /// 2mnk: a multiply-add is two FLOPs. Counts end at `u64::MAX`, here and in sums.
    pub fn flops(&self) -> u64 {
        let area = self.m.saturating_mul(self.n);
        area.saturating_mul(self.k).saturating_mul(2)
    }
}

/// Executed matrix products, vector operations and memory sweeps.
///
/// ```
/// use wattune::work::{Precision, Work};
/// let one = Work::product(2, 3, 4, Precision::F32);
/// assert_eq!(one.flops(), 48);
/// assert_eq!((one.clone() + one.clone()), one.times(2));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Work {
    products: BTreeMap<Product, u64>,
    /// Bytes of a pass over memory -> number of such passes.
    sweeps: BTreeMap<u64, u64>,
    /// Bytes of file I/O, which no cache serves.
    uncached: u64,
    vector_flops: u64,
}

impl Work {
    /// One product (m, k) x (k, n).
    pub fn product(m: usize, n: usize, k: usize, precision: Precision) -> Self {
        Self::stored_product(m, n, k, precision, None)
    }

    /// `count` equal products (m, k) x (k, n); empty products are no work.
    pub fn products(count: usize, m: usize, n: usize, k: usize, precision: Precision) -> Self {
        Self::product(m, n, k, precision).times(count as u64)
    }

    /// One product (m, k) x (k, n) with a second operand in `rhs_blocks`.
    pub fn stored_product(
        m: usize,
        n: usize,
        k: usize,
        precision: Precision,
        rhs_blocks: Option<BlockSize>,
    ) -> Self {
        let mut work = Self::default();
        if [m, n, k].iter().all(|size| *size > 0) {
            let product = Product {
                m: m as u64,
                n: n as u64,
                k: k as u64,
                precision,
                rhs_blocks,
            };
            work.products.insert(product, 1);
        }
        work
    }

    /// One elementwise pass that touches `bytes` of memory and executes `flops` vector operations.
    pub fn sweep(bytes: usize, flops: usize) -> Self {
        let mut work = Self::default();
        if bytes > 0 {
            work.sweeps.insert(bytes as u64, 1);
        }
        work.vector_flops = flops as u64;
        work
    }

    /// Bytes read from or written to a file.
    pub fn file(bytes: usize) -> Self {
        Self {
            uncached: bytes as u64,
            ..Self::default()
        }
    }

    /// This work `count` times.
    pub fn times(&self, count: u64) -> Self {
        let mut work = self.clone();
        if count == 0 {
            return Self::default();
        }
        let counts = work.products.values_mut().chain(work.sweeps.values_mut());
        for n in counts.chain([&mut work.uncached, &mut work.vector_flops]) {
            *n = n.saturating_mul(count);
        }
        work
    }

    /// The work without its passes over memory; their vector operations stay.
    pub fn without_sweeps(&self) -> Self {
        Self {
            sweeps: BTreeMap::new(),
            ..self.clone()
        }
    }

    /// FLOPs of matrix products and attention, without vector operations.
    pub fn flops(&self) -> u64 {
        self.products
            .iter()
            .map(|(product, count)| product.flops().saturating_mul(*count))
            .fold(0, u64::saturating_add)
    }

    /// Elementwise operations.
    pub fn vector_flops(&self) -> u64 {
        self.vector_flops
    }

    /// Each distinct product and its count.
    pub fn iter_products(&self) -> impl Iterator<Item = (Product, u64)> + '_ {
        self.products
            .iter()
            .map(|(product, count)| (*product, *count))
    }

    /// Bytes of file I/O.
    pub fn file_bytes(&self) -> Bytes {
        Bytes(self.uncached)
    }

    /// The bytes of each distinct memory pass and its count.
    pub fn iter_sweeps(&self) -> impl Iterator<Item = (Bytes, u64)> + '_ {
        self.sweeps
            .iter()
            .map(|(bytes, count)| (Bytes(*bytes), *count))
    }
}

impl AddAssign<&Work> for Work {
    fn add_assign(&mut self, other: &Work) {
        let add = |sum: &mut u64, count: &u64| *sum = sum.saturating_add(*count);
        for (product, count) in &other.products {
            add(self.products.entry(*product).or_default(), count);
        }
        for (bytes, count) in &other.sweeps {
            add(self.sweeps.entry(*bytes).or_default(), count);
        }
        add(&mut self.uncached, &other.uncached);
        add(&mut self.vector_flops, &other.vector_flops);
    }
}

impl Add for Work {
    type Output = Work;
    fn add(mut self, other: Work) -> Work {
        self += &other;
        self
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Work>>(items: I) -> Work {
        items.fold(Work::default(), Add::add)
    }
}

/// Work counted by running ops, from any thread.
///
/// ```
/// use wattune::work::{Precision, Work, WorkCounter};
/// let counter = WorkCounter::default();
/// counter.add(Work::product(2, 3, 4, Precision::F32));
/// assert_eq!(counter.take().flops(), 48);
/// assert_eq!(counter.take().flops(), 0);
/// ```
#[derive(Debug, Default)]
pub struct WorkCounter(Mutex<Work>);

impl WorkCounter {
    /// Adds executed work.
    pub fn add(&self, work: Work) {
        *self.lock() += &work;
    }

    /// The work since the last call.
    pub fn take(&self) -> Work {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Work> {
        // A sum that a panic left incomplete does not matter: the run is over.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equality_ignores_the_order_of_addition() {
        let a = Work::product(3, 5, 7, Precision::F32);
        let b = Work::sweep(100, 10);
        assert_eq!(a.clone() + b.clone(), b.clone() + a.clone());
        assert_eq!((a.clone() + b.clone()).times(3).flops(), 3 * 210);
        assert_ne!(a.clone(), Work::product(5, 3, 7, Precision::F32));
        assert_eq!(Work::product(0, 5, 7, Precision::F32), Work::default());
        assert_eq!(a.times(0), Work::default());
    }

    #[test]
    fn take_resets_the_counter() {
        let counter = WorkCounter::default();
        counter.add(Work::product(2, 2, 2, Precision::Bf16));
        assert_eq!(counter.take().flops(), 16);
        assert_eq!(counter.take(), Work::default());
    }
}
