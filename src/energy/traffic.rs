//! Bytes moved between memory levels: the blocking model of the counted meter.
//!
//! A product (m, k) x (k, n) with `e` bytes an element (for a quantised B its stored bytes in place of
//! `ekn`) through a cache of `Z` bytes: if both operands and the f32 result fit, each crosses once, `e(mk + kn) + 4mn`. Otherwise the product is
//! tiled in squares of side `b = floor(sqrt(Z / 3e))`, three to a cache, and
//! `e(mk ceil(n/b) + kn ceil(m/b)) + 4mn` bytes cross: the lower bound of Hong & Kung (1981) as
//! blocked implementations reach it (Goto & van de Geijn 2008). A sweep over memory crosses every
//! level smaller than itself. Bytes that cross a level are served by the next level out, and those
//! that cross the last by DRAM.

use std::collections::BTreeMap;

use super::profile::CacheLevel;
use crate::units::Bytes;
use crate::work::{Product, Work};

/// Name of main memory among the levels.
pub const DRAM: &str = "dram";

/// Bytes by the memory level that served them.
pub type Traffic = BTreeMap<String, Bytes>;

/// The bytes of every product and sweep of `work`, through `caches` from the inside out: those that each next level serves, main
/// memory last.
pub(super) fn traffic(caches: &[CacheLevel], work: &Work) -> Vec<u64> {
    let crossing = |capacity| crossing(capacity, work).0;
    capacities(caches).map(crossing).collect()
}

/// The capacity in front of each level that serves; `None` without caches.
pub(super) fn capacities(caches: &[CacheLevel]) -> impl Iterator<Item = Option<u64>> + '_ {
    let inner = caches.iter().map(|level| Some(level.bytes.0));
    inner.chain(caches.is_empty().then_some(None))
}

/// The names of the levels that serve, from the inside out.
pub(super) fn servers(caches: &[CacheLevel]) -> impl Iterator<Item = &str> {
    let outer = caches.iter().skip(1).map(|level| level.name.as_str());
    outer.chain([DRAM])
}

/// Bytes of `work` that DRAM would serve without any reuse: both operands of every multiply-add,
/// every result, every sweep and file.
pub(super) fn without_reuse(work: &Work) -> Bytes {
    total(work, unblocked_product, |_| true)
}

/// Bytes that cross a cache of `capacity`; `None`: no cache, every operand and sweep once.
fn crossing(capacity: Option<u64>, work: &Work) -> Bytes {
    total(
        work,
        |product| blocked_product(capacity, product),
        |sweep| capacity.is_none_or(|capacity| sweep.0 > capacity),
    )
}

/// Bytes of all products, of the sweeps that cross, and of files.
fn total(
    work: &Work,
    product_bytes: impl Fn(&Product) -> u64,
    crosses: impl Fn(Bytes) -> bool,
) -> Bytes {
    let products = work
        .iter_products()
        .map(|(product, count)| product_bytes(&product).saturating_mul(count));
    let sweeps = work
        .iter_sweeps()
        .filter(|(bytes, _)| crosses(*bytes))
        .map(|(bytes, count)| bytes.0.saturating_mul(count));
    let bytes = products.chain(sweeps).chain([work.file_bytes().0]);
    Bytes(bytes.fold(0, u64::saturating_add))
}

/// Bytes of one product through a cache (see the module's documentation).
fn blocked_product(capacity: Option<u64>, product: &Product) -> u64 {
    let &Product { m, n, .. } = product;
    let element = product.precision.size();
    let lhs = product.lhs_bytes();
    let rhs = product.rhs_bytes();
    let result = 4 * m * n;
    match capacity {
        Some(capacity) if lhs + rhs + result > capacity => {
            let tile = (capacity / (3 * element)).isqrt().max(1);
            lhs * n.div_ceil(tile) + rhs * m.div_ceil(tile) + result
        }
        _ => lhs + rhs + result,
    }
}

/// Tiles of side one: both operands are fetched for each multiply-add.
fn unblocked_product(product: &Product) -> u64 {
    let &Product { m, n, .. } = product;
    let lhs = product.lhs_bytes().saturating_mul(n);
    let rhs = product.rhs_bytes().saturating_mul(m);
    lhs.saturating_add(rhs).saturating_add(4 * m * n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes served by the LLC and by DRAM, with caches of 120 000 and 1 200 000 bytes.
    fn served(work: &Work) -> [u64; 2] {
        let level = |name: &str, bytes| CacheLevel {
            name: name.to_string(),
            bytes: Bytes(bytes),
            pj_per_byte: None,
            bandwidth: None,
            shared: false,
        };
        let served = traffic(&[level("L2", 120_000), level("LLC", 1_200_000)], work);
        [served[0], served[1]]
    }

    #[test]
    fn a_sweep_crosses_the_levels_smaller_than_itself() {
        assert_eq!(served(&Work::sweep(120_000, 0)), [0, 0]);
        assert_eq!(served(&Work::sweep(120_001, 0)), [120_001, 0]);
        assert_eq!(served(&Work::sweep(1_200_001, 0)), [1_200_001, 1_200_001]);
    }

    #[test]
    fn file_bytes_cross_every_level() {
        assert_eq!(served(&Work::file(7)), [7, 7]);
    }

    #[test]
    fn sweeps_and_files_have_no_reuse() {
        assert_eq!(
            without_reuse(&(Work::sweep(100, 7) + Work::file(11))),
            Bytes(111)
        );
    }
}
