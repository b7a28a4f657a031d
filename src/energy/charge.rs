//! What a `Work` costs on a `Profile`: joules, roofline seconds, bytes by memory level.
//!
//! Owns the counted meter's formula and the one canonical blocking model. Takes a profile and a work, returns a `Charge`, a pure
//! function of the two. Refuses to know which kernel ran, how long it took, or what the work was for.
//!
//! ```text
//! energy = idle_w * t + sum(flops * pJ/FLOP) + sum(bytes * pJ/byte)         rounded to a whole microjoule, once
//! t      = max(sum(flops / (peak * achievable)), DRAM bytes / (bandwidth * achievable))
//! ```
//!
//! A cache whose bandwidth is known, as `calibrate` measures it, can be what `t` waits for as well.
//!
//! A profile that was held against a measured run multiplies each part by `measured_over_counted`.
//!
//! Vector operations run at f32's rate and energy; they are in `energy` and `time`, not in `flops`.
//!
//! Traffic of a product (m, k) x (k, n) with elements of e bytes through a cache of Z bytes: where both operands and the
//! f32 result fit, each crosses once, `e(mk + kn) + 4mn`. Else the product is blocked in square tiles of side
//! `b = floor(sqrt(Z / 3e))`, three to a cache, and `e(mk ceil(n/b) + kn ceil(m/b)) + 4mn` bytes cross: the classical bound
//! (Hong & Kung 1981) as practice reaches it (Goto & van de Geijn 2008). A sweep over memory crosses every level that cannot
//! hold it. What crosses a level is served by the next one out, and the last by DRAM.

use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use super::entry::Parts;
use super::profile::Profile;
use crate::units::{Bytes, Joules, MicroJoules, Seconds};
use crate::work::{Precision, Product, Work};

/// The name of the level behind the last cache.
pub const DRAM: &str = "dram";

/// Bytes by the memory level that served them, "dram" for main memory.
pub type Traffic = BTreeMap<String, Bytes>;

/// What a work costs. The sum of charges is the cost of entries charged one by one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Charge {
    /// The whole, in whole microjoules.
    pub energy: MicroJoules,
    /// Roofline time.
    pub time: Seconds,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// The part spent on operations (and on caches without a figure of their own).
    pub arithmetic: Joules,
    /// The part spent on moving bytes.
    pub movement: Joules,
    /// The part the device draws idle over `time`.
    pub idle: Joules,
    /// Bytes that DRAM would serve if nothing were used twice: both operands of every multiply-add, every result, every sweep.
    pub unreused: Bytes,
}

impl Profile {
    /// What `work` costs when charged as one entry.
    ///
    /// ```
    /// use wattune::{energy::Profile, work::{Precision, Work}};
    /// let t4 = Profile::named("nvidia-t4").unwrap();
    /// let charge = t4.charge(&Work::product(512, 512, 512, Precision::F16));
    /// assert_eq!(charge.flops, 2 * 512 * 512 * 512);
    /// assert_eq!(charge.energy, (charge.idle + charge.arithmetic + charge.movement).rounded());
    /// ```
    pub fn charge(&self, work: &Work) -> Charge {
        let bytes = traffic(self, work);
        let time = roofline(self, work, &bytes);
        let factor = self.times();
        let idle = self.idle_w * time * factor;
        let arithmetic = arithmetic(self, work) * factor;
        let movement = movement(self, &bytes) * factor;
        let energy = (idle + arithmetic + movement).rounded();
        Charge {
            energy,
            time,
            flops: work.flops(),
            bytes,
            arithmetic,
            movement,
            idle,
            unreused: unreused(work),
        }
    }
}

impl AddAssign<&Charge> for Charge {
    fn add_assign(&mut self, other: &Charge) {
        self.energy += other.energy;
        self.time += other.time;
        self.flops = self.flops.saturating_add(other.flops);
        for (level, bytes) in &other.bytes {
            *self.bytes.entry(level.clone()).or_default() += *bytes;
        }
        self.arithmetic += other.arithmetic;
        self.movement += other.movement;
        self.idle += other.idle;
        self.unreused = Bytes(self.unreused.0.saturating_add(other.unreused.0));
    }
}

impl Add for Charge {
    type Output = Charge;
    fn add(mut self, other: Charge) -> Charge {
        self += &other;
        self
    }
}

impl std::iter::Sum for Charge {
    fn sum<I: Iterator<Item = Charge>>(items: I) -> Charge {
        items.fold(Charge::default(), Add::add)
    }
}

impl Charge {
    /// What its energy is made of.
    pub fn parts(&self) -> Parts {
        Parts {
            arithmetic_j: self.arithmetic,
            movement_j: self.movement,
            idle_j: self.idle,
            unreused_bytes: self.unreused,
        }
    }
}

/// Bytes by the level that serves them, for every product and sweep of `work`.
pub(super) fn traffic(profile: &Profile, work: &Work) -> Traffic {
    let servers = profile
        .caches
        .iter()
        .skip(1)
        .map(|level| level.name.as_str())
        .chain([DRAM]);
    let mut served = Traffic::new();
    for (level, server) in profile.caches.iter().zip(servers) {
        served.insert(server.to_string(), crossing(Some(level.bytes.0), work));
    }
    if profile.caches.is_empty() {
        served.insert(DRAM.to_string(), crossing(None, work));
    }
    served
}

/// Bytes that cross a cache of `capacity`; every operand and sweep in full where there is no cache at all.
fn crossing(capacity: Option<u64>, work: &Work) -> Bytes {
    let products = work
        .iter_products()
        .map(|(product, count)| product_crossing(capacity, &product).saturating_mul(count));
    let sweeps = work
        .iter_sweeps()
        .filter(|(bytes, _)| capacity.is_none_or(|capacity| bytes.0 > capacity));
    let sweeps = sweeps.map(|(bytes, count)| bytes.0.saturating_mul(count));
    Bytes(
        products
            .chain(sweeps)
            .chain([work.file_bytes().0])
            .fold(0, u64::saturating_add),
    )
}

fn product_crossing(capacity: Option<u64>, product: &Product) -> u64 {
    let &Product { m, n, k, precision } = product;
    let element = precision.size();
    let (left, right, result) = (element * m * k, element * k * n, 4 * m * n);
    match capacity {
        Some(capacity) if left + right + result > capacity => {
            let side = (capacity / (3 * element)).isqrt().max(1);
            left * n.div_ceil(side) + right * m.div_ceil(side) + result
        }
        _ => left + right + result,
    }
}

/// Blocks of side one: an operand is fetched anew for each of its multiply-adds. Files and sweeps as they are.
fn unreused(work: &Work) -> Bytes {
    let products = work
        .iter_products()
        .map(|(Product { m, n, k, precision }, count)| {
            let fetched = (2 * precision.size())
                .saturating_mul(m)
                .saturating_mul(n)
                .saturating_mul(k);
            fetched.saturating_add(4 * m * n).saturating_mul(count)
        });
    let sweeps = work
        .iter_sweeps()
        .map(|(bytes, count)| bytes.0.saturating_mul(count));
    Bytes(
        products
            .chain(sweeps)
            .chain([work.file_bytes().0])
            .fold(0, u64::saturating_add),
    )
}

/// The time of `work` when the slowest of arithmetic, DRAM and each cache of known bandwidth decides.
pub(super) fn roofline(profile: &Profile, work: &Work, bytes: &Traffic) -> Seconds {
    let products: f64 = work
        .iter_products()
        .map(|(p, count)| p.flops() as f64 * count as f64 / profile.rate(p.precision))
        .sum();
    let compute = products + work.vector_flops() as f64 / profile.rate(Precision::F32);
    let served = bytes
        .iter()
        .filter_map(|(level, bytes)| Some(bytes.0 as f64 / profile.bandwidth_of(level)?));
    Seconds(served.fold(compute, f64::max))
}

fn arithmetic(profile: &Profile, work: &Work) -> Joules {
    let products: f64 = work
        .iter_products()
        .map(|(p, count)| p.flops() as f64 * count as f64 * profile.pj_per_flop(p.precision))
        .sum();
    Joules((products + work.vector_flops() as f64 * profile.pj_per_flop(Precision::F32)) * 1e-12)
}

/// The energy of bytes moved; a cache level without a figure of its own adds none.
pub(super) fn movement(profile: &Profile, bytes: &Traffic) -> Joules {
    let picojoules = bytes
        .iter()
        .map(|(level, bytes)| profile.pj_per_byte(level).unwrap_or(0.0) * bytes.0 as f64);
    Joules(picojoules.sum::<f64>() * 1e-12)
}

impl Profile {
    /// What every counted joule is multiplied with.
    fn times(&self) -> f64 {
        self.measured_over_counted.unwrap_or(1.0)
    }

    /// Bytes per second that `level` serves; `None` where the profile does not know it.
    fn bandwidth_of(&self, level: &str) -> Option<f64> {
        match level {
            DRAM => Some(self.bandwidth * self.achievable_bandwidth),
            _ => {
                self.caches
                    .iter()
                    .find(|cache| cache.name == level)?
                    .bandwidth
            }
        }
    }

    /// Picojoules of one byte that `level` serves; `None` where the profile does not know it.
    fn pj_per_byte(&self, level: &str) -> Option<f64> {
        match level {
            DRAM => Some(self.dram_pj_per_byte),
            _ => {
                self.caches
                    .iter()
                    .find(|cache| cache.name == level)?
                    .pj_per_byte
            }
        }
    }

    /// The energy of `bytes` by the level that served them; a level without a figure of its own is left out (`unknown_levels`).
    ///
    /// ```
    /// use wattune::{energy::Profile, work::{Precision, Work}};
    /// let t4 = Profile::named("nvidia-t4").unwrap();
    /// let bytes = t4.charge(&Work::file(1_000_000_000)).bytes;
    /// let dram = t4.movement_by_level(&bytes)["dram"].0;
    /// assert!((dram - 1e9 * t4.dram_pj_per_byte * 1e-12).abs() < 1e-9);
    /// assert_eq!(t4.unknown_levels(&bytes), ["L2"]);
    /// ```
    pub fn movement_by_level(&self, bytes: &Traffic) -> BTreeMap<String, Joules> {
        let known = bytes.iter().filter_map(|(level, bytes)| {
            Some((
                level,
                self.pj_per_byte(level)? * bytes.0 as f64 * 1e-12 * self.times(),
            ))
        });
        known
            .map(|(level, joules)| (level.clone(), Joules(joules)))
            .collect()
    }

    /// The levels of `bytes` whose energy per byte the profile does not know: it is part of its pJ/FLOP.
    pub fn unknown_levels(&self, bytes: &Traffic) -> Vec<String> {
        bytes
            .keys()
            .filter(|level| self.pj_per_byte(level).is_none())
            .cloned()
            .collect()
    }

    /// The energy of `bytes` if DRAM served every one.
    pub fn from_dram(&self, bytes: Bytes) -> Joules {
        Joules(self.dram_pj_per_byte * bytes.0 as f64 * 1e-12 * self.times())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 W idle, 1e12 FLOP/s and 1e10 B/s reached, 5 pJ/FLOP (3 in bf16), 100 pJ a DRAM byte, 2 pJ an LLC byte.
    fn desk() -> Profile {
        let text = "name = \"desk\"\nkind = \"cpu\"\ncores = 4\nidle_w = 10\nload_w = 60\nbandwidth = 2e10\n\
            achievable_flops = 0.5\nachievable_bandwidth = 0.5\npeak_flops = { f32 = 2e12, bf16 = 4e12 }\n\
            pj_per_flop = { f32 = 5, bf16 = 3 }\ndram_pj_per_byte = 100\n\
            caches = [{ name = \"L2\", bytes = 120000 }, { name = \"LLC\", bytes = 1200000, pj_per_byte = 2 }]\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("desk.toml");
        std::fs::write(&path, text).unwrap();
        Profile::from_file(&path).unwrap()
    }

    fn bytes(charge: &Charge, level: &str) -> u64 {
        charge.bytes[level].0
    }

    #[test]
    fn a_product_is_charged_as_by_hand() {
        // (m, n, k) = (300, 200, 400), f32. Operands: 4*(300*400 + 400*200) + 4*300*200 = 800 000 + 240 000 = 1 040 000 bytes.
        // L2, 120 000: does not fit; b = floor(sqrt(120000/12)) = 100; 4*(120000*ceil(200/100) + 80000*ceil(300/100)) + 240000
        //   = 4*(240000 + 240000) + 240000 = 2 160 000, served by the LLC. LLC, 1 200 000: fits, 1 040 000 from DRAM.
        // flops = 2*300*200*400 = 48e6. t = max(48e6/1e12, 1.04e6/1e10) = max(48, 104) us = 104 us.
        // idle 10 W * 104 us = 1040 uJ; arithmetic 48e6 * 5 pJ = 240 uJ; movement 2.16e6*2 + 1.04e6*100 pJ = 4.32 + 104 uJ.
        let charge = desk().charge(&Work::product(300, 200, 400, Precision::F32));
        assert_eq!(
            (bytes(&charge, "LLC"), bytes(&charge, "dram")),
            (2_160_000, 1_040_000)
        );
        assert!((charge.time.0 - 104e-6).abs() < 1e-12);
        assert_eq!(charge.energy, MicroJoules(1388)); // 1040 + 240 + 108.32 = 1388.32
        assert_eq!(charge.flops, 48_000_000);
    }

    #[test]
    fn parts_levels_and_what_reuse_saved_are_as_by_hand() {
        // The product above: arithmetic 240 uJ, idle 1040 uJ, LLC 2.16e6 * 2 pJ = 4.32 uJ, DRAM 1.04e6 * 100 pJ = 104 uJ. Without reuse:
        // 300*200*400 multiply-adds of two operands of 4 bytes and 300*200 results of 4: 192 000 000 + 240 000 bytes, 19 224 uJ.
        let profile = desk();
        let charge = profile.charge(&Work::product(300, 200, 400, Precision::F32));
        let parts = charge.parts();
        let micro = |joules: Joules| (joules.0 * 1e9).round() / 1e3;
        assert_eq!(
            [parts.arithmetic_j, parts.movement_j, parts.idle_j].map(micro),
            [240.0, 108.32, 1040.0]
        );
        let levels = profile.movement_by_level(&charge.bytes);
        assert_eq!(
            levels
                .into_iter()
                .map(|(name, j)| (name, micro(j)))
                .collect::<Vec<_>>(),
            [("LLC".to_string(), 4.32), ("dram".to_string(), 104.0)]
        );
        assert_eq!(parts.unreused_bytes, Bytes(192_240_000));
        assert_eq!(micro(profile.from_dram(parts.unreused_bytes)), 19_224.0);
        // A sweep and a file have nothing to use twice.
        assert_eq!(
            profile
                .charge(&(Work::sweep(100, 7) + Work::file(11)))
                .unreused,
            Bytes(111)
        );
        // A factor of the profile's own multiplies every part alike.
        let doubled = Profile {
            measured_over_counted: Some(2.0),
            ..desk()
        };
        let twice = doubled.charge(&Work::product(300, 200, 400, Precision::F32));
        assert_eq!(
            doubled
                .movement_by_level(&twice.bytes)
                .into_values()
                .map(micro)
                .sum::<f64>(),
            2.0 * 108.32
        );
        assert_eq!(
            (
                micro(twice.movement),
                micro(doubled.from_dram(twice.unreused))
            ),
            (2.0 * 108.32, 2.0 * 19_224.0)
        );
        let mut unknown = desk();
        unknown.caches[1].pj_per_byte = None;
        assert_eq!(unknown.unknown_levels(&charge.bytes), ["LLC"]);
        assert_eq!(
            unknown
                .movement_by_level(&charge.bytes)
                .into_keys()
                .collect::<Vec<_>>(),
            ["dram"]
        );
    }

    #[test]
    fn precision_decides_bytes_rate_and_energy() {
        // The same in bf16: operands 2*200000 + 240000 = 640 000; L2: b = floor(sqrt(120000/6)) = 141;
        // 2*(120000*2 + 80000*3) + 240000 = 1 200 000. t = max(48e6/2e12, 64e-6) = 64 us: 640 + 144 + 2.4 + 64 = 850.4 uJ.
        let charge = desk().charge(&Work::product(300, 200, 400, Precision::Bf16));
        assert_eq!(
            (bytes(&charge, "LLC"), bytes(&charge, "dram")),
            (1_200_000, 640_000)
        );
        assert_eq!(charge.energy, MicroJoules(850));
        // f16 has no unit here: f32's rate and energy, two bytes an element. 640 + 240 + 2.4 + 64 = 946.4 uJ.
        assert_eq!(
            desk()
                .charge(&Work::product(300, 200, 400, Precision::F16))
                .energy,
            MicroJoules(946)
        );
    }

    #[test]
    fn a_sweep_crosses_the_levels_that_cannot_hold_it() {
        let profile = desk();
        let of = |size: usize| {
            profile
                .charge(&Work::sweep(size, 0))
                .bytes
                .into_values()
                .map(|b| b.0)
                .collect::<Vec<_>>()
        };
        // Order of names: LLC, dram.
        assert_eq!(of(120_000), [0, 0]);
        assert_eq!(of(120_001), [120_001, 0]);
        assert_eq!(of(1_200_001), [1_200_001, 1_200_001]);
    }

    #[test]
    fn what_comes_from_a_file_crosses_every_level() {
        let bytes = desk()
            .charge(&Work::file(7))
            .bytes
            .into_values()
            .map(|b| b.0)
            .collect::<Vec<_>>();
        assert_eq!(bytes, [7, 7]);
    }

    #[test]
    fn vector_operations_cost_but_are_not_flops() {
        // 1e9 operations at f32: 1 ms, so 10 000 uJ idle, and 5000 uJ of arithmetic.
        let charge = desk().charge(&Work::sweep(8, 1_000_000_000));
        assert_eq!((charge.flops, charge.energy), (0, MicroJoules(15_000)));
    }

    #[test]
    fn a_sum_of_entries_is_not_an_entry_of_the_sum() {
        // One is bound by arithmetic, the other by memory: charged together they overlap, charged one by one they do not.
        let (a, b) = (Work::sweep(8, 1_000_000_000), Work::sweep(10_000_000, 0));
        let profile = desk();
        let apart = profile.charge(&a) + profile.charge(&b);
        let together = profile.charge(&(a + b));
        assert!(together.energy < apart.energy);
        assert_eq!(
            (together.flops, together.bytes.clone()),
            (apart.flops, apart.bytes)
        );
    }
}
