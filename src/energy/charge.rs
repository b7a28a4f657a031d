//! The counted meter: energy, time and memory traffic of a `Work` on a `Profile`.
//!
//! ```text
//! energy = idle_w * t + sum(flops * pJ/FLOP) + sum(bytes * pJ/byte)         rounded to a microjoule, once
//! t      = max(sum(flops / (peak * achievable)), DRAM bytes / (bandwidth * achievable),
//!              (sum(flops * pJ/FLOP) + sum(bytes * pJ/byte)) / (load_w - idle_w))
//! ```
//!
//! The time is a roofline (Williams et al. 2009) with the device's power as a further roof (Choi et al. 2013, 2014); a cache with a
//! measured bandwidth (`calibrate`) may bound it too. A profile reconciled with a measured run multiplies each part by
//! `measured_over_counted`. Vector operations run at f32's rate and energy; they are in `energy`
//! and `time`, not in `flops`. `traffic` counts the bytes. A pure function of profile and work,
//! whatever kernel runs.

use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use super::profile::Profile;
use super::spent::Spent;
use super::traffic::{DRAM, Traffic, capacities, servers, traffic, without_reuse};
use crate::units::{Bytes, Joules, MicroJoules, Seconds};
use crate::work::{Precision, Work};

/// The cost of a work. A sum of charges is the cost of works charged one by one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Charge {
    /// Total, in integer microjoules.
    pub energy: MicroJoules,
    /// Roofline time: as tuned code takes it.
    pub time: Seconds,
    /// Lower bound of the time: the arithmetic at the highest rate of the device.
    pub least_time: Seconds,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Bytes by memory level.
    pub bytes: Traffic,
    /// Composition of `energy`.
    pub breakdown: EnergyBreakdown,
}

/// Composition of a counted energy; the three energies sum to it within half a microjoule a charge.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct EnergyBreakdown {
    /// Energy of all FLOPs; includes the caches without a known energy per byte.
    pub arithmetic_j: Joules,
    /// Energy of the bytes moved, on the levels with a known energy per byte.
    pub movement_j: Joules,
    /// Idle power over the roofline time.
    pub idle_j: Joules,
    /// Bytes that DRAM would have served without any reuse.
    pub unreused_bytes: Bytes,
}

impl AddAssign<&EnergyBreakdown> for EnergyBreakdown {
    fn add_assign(&mut self, other: &EnergyBreakdown) {
        self.arithmetic_j += other.arithmetic_j;
        self.movement_j += other.movement_j;
        self.idle_j += other.idle_j;
        self.unreused_bytes += other.unreused_bytes;
    }
}

/// FLOPs and bytes that a charge follows from. Integers: their sums do not depend on an order, so that the totals of a work are those
/// of its parts together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkTotals {
    /// FLOPs of matrix products and attention, by [`Precision`] in its order.
    flops: [u64; 3],
    vector_flops: u64,
    /// Bytes that each level of the profile serves, from the inside out.
    served: Vec<u64>,
    /// Bytes without any reuse.
    unreused: u64,
}

impl WorkTotals {
    /// FLOPs of each precision that there are any of.
    fn products(&self) -> impl Iterator<Item = (Precision, u64)> + '_ {
        let all = [Precision::F32, Precision::Bf16, Precision::F16];
        all.into_iter()
            .zip(self.flops)
            .filter(|(_, flops)| *flops > 0)
    }

    /// Adds vector operations.
    pub fn add_vector_flops(&mut self, flops: u64) {
        self.vector_flops = self.vector_flops.saturating_add(flops);
    }
}

impl AddAssign<&WorkTotals> for WorkTotals {
    fn add_assign(&mut self, other: &WorkTotals) {
        let add = |sum: &mut u64, part: &u64| *sum = sum.saturating_add(*part);
        self.served
            .resize(self.served.len().max(other.served.len()), 0);
        let sums = self.flops.iter_mut().chain(&mut self.served);
        let parts = other.flops.iter().chain(&other.served);
        sums.zip(parts).for_each(|(sum, part)| add(sum, part));
        add(&mut self.vector_flops, &other.vector_flops);
        add(&mut self.unreused, &other.unreused);
    }
}

impl Charge {
    /// The quantities that a budget limits.
    pub fn spent(&self) -> Spent {
        Spent {
            energy: self.energy,
            flops: self.flops,
            time: self.time,
        }
    }
}

impl AddAssign<&Charge> for Charge {
    fn add_assign(&mut self, other: &Charge) {
        self.energy += other.energy;
        self.time += other.time;
        self.least_time += other.least_time;
        self.flops = self.flops.saturating_add(other.flops);
        for (level, bytes) in &other.bytes {
            *self.bytes.entry(level.clone()).or_default() += *bytes;
        }
        self.breakdown += &other.breakdown;
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

impl Profile {
    /// The cost of `work`, charged at once: its arithmetic and traffic overlap.
    ///
    /// ```
    /// use wattune::{energy::Profile, work::{Precision, Work}};
    /// let t4 = Profile::named("nvidia-t4").unwrap();
    /// let charge = t4.charge(&Work::product(512, 512, 512, Precision::F16));
    /// assert_eq!(charge.flops, 2 * 512 * 512 * 512);
    /// let parts = charge.breakdown;
    /// assert_eq!(charge.energy, (parts.idle_j + parts.arithmetic_j + parts.movement_j).rounded());
    /// ```
    pub fn charge(&self, work: &Work) -> Charge {
        let totals = self.totals(work);
        Charge {
            bytes: self.traffic_of(&totals),
            ..self.charge_without_bytes(&totals)
        }
    }

    /// What the charge of `work` follows from.
    pub fn totals(&self, work: &Work) -> WorkTotals {
        let mut totals = WorkTotals {
            vector_flops: work.vector_flops(),
            served: traffic(&self.caches, work),
            unreused: without_reuse(work).0,
            ..WorkTotals::default()
        };
        for (product, count) in work.iter_products() {
            let flops = &mut totals.flops[product.precision as usize];
            *flops = flops.saturating_add(product.flops().saturating_mul(count));
        }
        totals
    }

    /// What the charge of streaming `bytes` follows from, with `flops` of products in `precision` and vector operations meanwhile.
    /// Levels that hold all of `resident`, the bytes that are streamed again and again, are not left.
    pub fn streamed_totals(
        &self,
        precision: Precision,
        flops: u64,
        vector_flops: u64,
        bytes: Bytes,
        resident: Bytes,
    ) -> WorkTotals {
        let crosses = |capacity: Option<u64>| capacity.is_none_or(|capacity| resident.0 > capacity);
        let served =
            capacities(&self.caches).map(|capacity| bytes.0 * u64::from(crosses(capacity)));
        let mut totals = WorkTotals {
            vector_flops,
            served: served.collect(),
            unreused: bytes.0,
            ..WorkTotals::default()
        };
        totals.flops[precision as usize] = flops;
        totals
    }

    /// Adds `count` passes over `bytes` of memory.
    pub fn add_sweeps(&self, totals: &mut WorkTotals, bytes: u64, count: u64) {
        let all = bytes.saturating_mul(count);
        for (served, capacity) in totals.served.iter_mut().zip(capacities(&self.caches)) {
            if capacity.is_none_or(|capacity| bytes > capacity) {
                *served = served.saturating_add(all);
            }
        }
        totals.unreused = totals.unreused.saturating_add(all);
    }

    /// The charge of works with these totals; `bytes` stays empty.
    pub fn charge_without_bytes(&self, totals: &WorkTotals) -> Charge {
        let (arithmetic, movement) = (self.arithmetic_energy(totals), self.movement_energy(totals));
        let by_power = Seconds((arithmetic + movement) / Joules((self.load_w - self.idle_w).0));
        let time = self.roofline(totals).max(by_power);
        let factor = self.calibration_factor();
        let breakdown = EnergyBreakdown {
            arithmetic_j: arithmetic * factor,
            movement_j: movement * factor,
            idle_j: self.idle_w * time * factor,
            unreused_bytes: Bytes(totals.unreused),
        };
        let EnergyBreakdown {
            arithmetic_j,
            movement_j,
            idle_j,
            ..
        } = breakdown;
        Charge {
            energy: (idle_j + arithmetic_j + movement_j).rounded(),
            time,
            least_time: self.arithmetic_time(totals, Self::highest_rate),
            flops: totals.flops.iter().copied().fold(0, u64::saturating_add),
            bytes: Traffic::new(),
            breakdown,
        }
    }

    /// The bytes of `totals` by the level that serves them.
    pub fn traffic_of(&self, totals: &WorkTotals) -> Traffic {
        let named = servers(&self.caches).zip(&totals.served);
        named
            .map(|(level, bytes)| (level.to_string(), Bytes(*bytes)))
            .collect()
    }

    /// The roofline time without the power's roof: the longest of arithmetic, DRAM and each cache with a known bandwidth.
    pub(super) fn roofline(&self, totals: &WorkTotals) -> Seconds {
        let compute = self.arithmetic_time(totals, Self::rate).0;
        let transfers = servers(&self.caches)
            .zip(&totals.served)
            .filter_map(|(level, bytes)| Some(*bytes as f64 / self.bandwidth_of(level)?));
        Seconds(transfers.fold(compute, f64::max))
    }

    /// The time of all FLOPs at the rates of their precisions.
    fn arithmetic_time(&self, totals: &WorkTotals, rate: fn(&Self, Precision) -> f64) -> Seconds {
        let products: f64 = totals
            .products()
            .map(|(precision, flops)| flops as f64 / rate(self, precision))
            .sum();
        Seconds(products + totals.vector_flops as f64 / rate(self, Precision::F32))
    }

    /// The energy of all FLOPs before calibration.
    fn arithmetic_energy(&self, totals: &WorkTotals) -> Joules {
        let products: f64 = totals
            .products()
            .map(|(precision, flops)| flops as f64 * self.pj_per_flop(precision))
            .sum();
        let vector = totals.vector_flops as f64 * self.pj_per_flop(Precision::F32);
        Joules((products + vector) * 1e-12)
    }

    /// The energy of the bytes moved before calibration; a level without an energy per byte adds none.
    pub(super) fn movement_energy(&self, totals: &WorkTotals) -> Joules {
        let picojoules = servers(&self.caches)
            .zip(&totals.served)
            .map(|(level, bytes)| self.pj_per_byte(level).unwrap_or(0.0) * *bytes as f64);
        Joules(picojoules.sum::<f64>() * 1e-12)
    }

    /// Factor of every counted joule.
    fn calibration_factor(&self) -> f64 {
        self.measured_over_counted.unwrap_or(1.0)
    }

    /// Achievable bytes per second of `level`; `None` if unknown.
    fn bandwidth_of(&self, level: &str) -> Option<f64> {
        if level == DRAM {
            return Some(self.bandwidth * self.achievable_bandwidth);
        }
        let cache = self.caches.iter().find(|cache| cache.name == level)?;
        cache.bandwidth
    }

    /// Picojoules of a byte that `level` serves; `None` if unknown.
    fn pj_per_byte(&self, level: &str) -> Option<f64> {
        if level == DRAM {
            return Some(self.streamed_pj_per_byte());
        }
        let cache = self.caches.iter().find(|cache| cache.name == level)?;
        cache.pj_per_byte
    }

    /// The energy of `bytes` by the level that served them, without the `unknown_levels`.
    ///
    /// ```
    /// use wattune::{energy::Profile, work::{Precision, Work}};
    /// let t4 = Profile::named("nvidia-t4").unwrap();
    /// let bytes = t4.charge(&Work::file(1_000_000_000)).bytes;
    /// let dram = t4.movement_by_level(&bytes)["dram"].0;
    /// assert!((dram - 1e9 * t4.streamed_pj_per_byte() * 1e-12).abs() < 1e-9);
    /// assert_eq!(t4.unknown_levels(&bytes), ["L2"]);
    /// ```
    pub fn movement_by_level(&self, bytes: &Traffic) -> BTreeMap<String, Joules> {
        let factor = self.calibration_factor();
        let known = bytes.iter().filter_map(|(level, bytes)| {
            let joules = self.pj_per_byte(level)? * bytes.0 as f64 * 1e-12 * factor;
            Some((level.clone(), Joules(joules)))
        });
        known.collect()
    }

    /// The levels of `bytes` without an energy per byte: it is part of pJ/FLOP.
    pub fn unknown_levels(&self, bytes: &Traffic) -> Vec<String> {
        let unknown = bytes
            .keys()
            .filter(|level| self.pj_per_byte(level).is_none());
        unknown.cloned().collect()
    }

    /// The energy of `bytes`, all served by DRAM.
    pub fn dram_energy(&self, bytes: Bytes) -> Joules {
        Joules(self.streamed_pj_per_byte() * bytes.0 as f64 * 1e-12 * self.calibration_factor())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 W idle, 1e12 FLOP/s and 1e10 B/s reached, 5 pJ/FLOP (3 in bf16), 100 pJ a DRAM byte, 2 pJ
    /// an LLC byte.
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

    fn product(precision: Precision) -> Work {
        Work::product(300, 200, 400, precision)
    }

    fn microjoules(joules: Joules) -> f64 {
        (joules.0 * 1e9).round() / 1e3
    }

    #[test]
    fn a_product_costs_the_hand_computed_energy() {
        // (m, n, k) = (300, 200, 400), f32.
        // Operands: 4*(300*400 + 400*200) + 4*300*200 = 800 000 + 240 000 = 1 040 000 bytes.
        // L2, 120 000: does not fit; b = floor(sqrt(120000/12)) = 100;
        //   4*(120000*ceil(200/100) + 80000*ceil(300/100)) + 240000
        //   = 4*(240000 + 240000) + 240000 = 2 160 000, served by the LLC.
        // LLC, 1 200 000: fits, 1 040 000 from DRAM.
        // flops = 2*300*200*400 = 48e6. t = max(48e6/1e12, 1.04e6/1e10) = max(48, 104) us = 104 us.
        // idle 10 W * 104 us = 1040 uJ; arithmetic 48e6 * 5 pJ = 240 uJ; movement 2.16e6*2 +
        // 1.04e6*100 pJ = 4.32 + 104 uJ.
        let charge = desk().charge(&product(Precision::F32));
        assert_eq!(
            (charge.bytes["LLC"].0, charge.bytes[DRAM].0),
            (2_160_000, 1_040_000)
        );
        assert!((charge.time.0 - 104e-6).abs() < 1e-12);
        assert_eq!(charge.energy, MicroJoules(1388)); // 1040 + 240 + 108.32 = 1388.32
        assert_eq!(charge.flops, 48_000_000);
    }

    #[test]
    fn the_breakdown_and_the_energy_by_level_are_as_computed_by_hand() {
        // The product above: arithmetic 240 uJ, idle 1040 uJ, LLC 2.16e6 * 2 pJ = 4.32 uJ, DRAM
        // 1.04e6 * 100 pJ = 104 uJ. Without reuse: 300*200*400 multiply-adds of two operands of 4
        // bytes and 300*200 results of 4: 192 000 000 + 240 000 bytes, 19 224 uJ.
        let profile = desk();
        let charge = profile.charge(&product(Precision::F32));
        let parts = charge.breakdown;
        let energies = [parts.arithmetic_j, parts.movement_j, parts.idle_j].map(microjoules);
        assert_eq!(energies, [240.0, 108.32, 1040.0]);
        let levels = profile.movement_by_level(&charge.bytes);
        assert_eq!(levels.keys().collect::<Vec<_>>(), ["LLC", DRAM]);
        assert_eq!(
            levels.into_values().map(microjoules).collect::<Vec<_>>(),
            [4.32, 104.0]
        );
        assert_eq!(parts.unreused_bytes, Bytes(192_240_000));
        assert_eq!(
            microjoules(profile.dram_energy(parts.unreused_bytes)),
            19_224.0
        );
    }

    #[test]
    fn the_calibration_factor_multiplies_every_part() {
        let doubled = Profile {
            measured_over_counted: Some(2.0),
            ..desk()
        };
        let charge = doubled.charge(&product(Precision::F32));
        let parts = charge.breakdown;
        let levels = doubled.movement_by_level(&charge.bytes).into_values();
        assert_eq!(levels.map(microjoules).sum::<f64>(), 2.0 * 108.32);
        assert_eq!(microjoules(parts.movement_j), 2.0 * 108.32);
        assert_eq!(
            microjoules(doubled.dram_energy(parts.unreused_bytes)),
            2.0 * 19_224.0
        );
    }

    #[test]
    fn a_level_without_energy_per_byte_is_listed_as_unknown() {
        let mut profile = desk();
        profile.caches[1].pj_per_byte = None;
        let bytes = profile.charge(&product(Precision::F32)).bytes;
        assert_eq!(profile.unknown_levels(&bytes), ["LLC"]);
        let levels = profile.movement_by_level(&bytes);
        assert_eq!(levels.into_keys().collect::<Vec<_>>(), [DRAM]);
    }

    #[test]
    fn precision_decides_bytes_rate_and_energy() {
        // The same in bf16: operands 2*200000 + 240000 = 640 000;
        // L2: b = floor(sqrt(120000/6)) = 141; 2*(120000*2 + 80000*3) + 240000 = 1 200 000.
        // t = max(48e6/2e12, 64e-6) = 64 us: 640 + 144 + 2.4 + 64 = 850.4 uJ.
        let charge = desk().charge(&product(Precision::Bf16));
        assert_eq!(
            (charge.bytes["LLC"].0, charge.bytes[DRAM].0),
            (1_200_000, 640_000)
        );
        assert_eq!(charge.energy, MicroJoules(850));
        // f16 has no peak here: f32's rate and energy, two bytes an element. 640 + 240 + 2.4 + 64 =
        // 946.4 uJ.
        assert_eq!(
            desk().charge(&product(Precision::F16)).energy,
            MicroJoules(946)
        );
    }

    #[test]
    fn vector_operations_cost_energy_but_are_not_flops() {
        // 1e9 operations at f32: 1 ms, so 10 000 uJ idle, and 5000 uJ of arithmetic.
        let charge = desk().charge(&Work::sweep(8, 1_000_000_000));
        assert_eq!((charge.flops, charge.energy), (0, MicroJoules(15_000)));
    }

    #[test]
    fn works_charged_together_overlap() {
        // One is bound by arithmetic, the other by memory.
        let compute = Work::sweep(8, 1_000_000_000);
        let memory = Work::sweep(10_000_000, 0);
        let profile = desk();
        let apart = profile.charge(&compute) + profile.charge(&memory);
        let together = profile.charge(&(compute + memory));
        assert!(together.energy < apart.energy);
        assert_eq!((together.flops, together.bytes), (apart.flops, apart.bytes));
    }
}
