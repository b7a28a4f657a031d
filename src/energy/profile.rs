//! Device profiles: power, achievable rates and energy per operation and byte of a device.
//!
//! A [`Profile`] is read from TOML by `profile_file`, validated by `profile_rules`, recognised on
//! this machine by `detect` and used by `charge`. This file holds its figures and their scaling to
//! some of a processor's cores.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::units::{Bytes, GramsCo2e, Watts};
use crate::work::Precision;

/// Class of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A processor, which can be scaled to some of its cores.
    Cpu,
    /// A discrete GPU.
    Gpu,
    /// Processor and GPU in one package with shared memory.
    Soc,
}

/// A cache level. Its misses are served by the next level out, those of the last by DRAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheLevel {
    /// "L1", "L2", "LLC", ...
    pub name: String,
    /// Capacity: per core, or in total if shared.
    pub bytes: Bytes,
    /// Energy of a byte served to the next level in; if absent it is part of pJ/FLOP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pj_per_byte: Option<f64>,
    /// Bytes per second served to all cores together, as a copy loop reaches it; if absent,
    /// the level does not bound the roofline time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<f64>,
    /// Shared by all cores; a profile scaled to some of the cores has their share of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// Source of a figure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Document or table.
    pub title: String,
    /// Year of the figure or of its table.
    pub year: u16,
    /// Licence of the table; "facts" for bare specifications.
    pub licence: String,
    /// Whether the figure was read in the source itself; false for figures from memory and
    /// assumptions.
    pub verified: bool,
}

impl Source {
    /// A source stated by the user, or measured on the user's machine.
    pub(super) fn user(title: impl Into<String>, verified: bool) -> Source {
        Source {
            title: title.into(),
            year: 0,
            licence: "user".to_string(),
            verified,
        }
    }
}

/// A device. Every figure has an entry in `sources`, under its field's name.
///
/// Deserialized from the TOML form (`[[profile]]` of `profiles.toml`); serialized for listings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Slug ("nvidia-h100-sxm5-80gb"), followed by `@N` if scaled to N cores.
    pub name: String,
    /// Display name.
    #[serde(default)]
    pub title: String,
    /// Class.
    pub kind: DeviceKind,
    /// Physical cores of a processor.
    pub cores: Option<usize>,
    /// Power when idle.
    pub idle_w: Watts,
    /// Power during a large matrix product: measured at full load, else the rated power.
    pub load_w: Watts,
    /// Measured (load in 0..1, watts) pairs, load rising.
    #[serde(default)]
    pub load_points: Vec<(f64, Watts)>,
    /// Dense peak in FLOP/s; a precision without one runs at the rate of f32.
    pub peak_flops: BTreeMap<Precision, f64>,
    /// Share of the peak that tuned matrix products reach, in (0, 1].
    #[serde(default = "default_fraction")]
    pub achievable_flops: f64,
    /// Memory bandwidth in bytes/s.
    pub bandwidth: f64,
    /// Share of the bandwidth that streams reach, in (0, 1].
    #[serde(default = "default_fraction")]
    pub achievable_bandwidth: f64,
    /// Picojoules per FLOP by precision: published, or listed in `derived`.
    #[serde(default)]
    pub pj_per_flop: BTreeMap<Precision, f64>,
    /// Precisions with a derived pJ/FLOP.
    #[serde(skip_deserializing)]
    pub derived: Vec<Precision>,
    /// From the inside out.
    pub caches: Vec<CacheLevel>,
    /// Picojoules that the device draws above idle per byte it streams from or to main memory; `None`: derived, see
    /// [`Profile::streamed_pj_per_byte`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dram_pj_per_byte: Option<f64>,
    /// Memory that holds weights and caches; of a board sold with several sizes the largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Highest core clock in MHz.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest_mhz: Option<f64>,
    /// Factor of every counted joule: measured over counted energy of an earlier run on this
    /// device.
    pub measured_over_counted: Option<f64>,
    /// Share of a training machine's power outside its accelerators. Not included in any other
    /// figure.
    pub host_share: Option<f64>,
    /// Emissions of manufacturing the device.
    #[serde(
        rename(deserialize = "embodied_kgco2e"),
        deserialize_with = "kilograms",
        default
    )]
    pub embodied: Option<GramsCo2e>,
    /// Source by field.
    #[serde(rename(deserialize = "source"), deserialize_with = "titles", default)]
    pub sources: BTreeMap<String, Source>,
    /// Names by which a driver or a system reports the device.
    #[serde(skip_serializing, default)]
    pub matches: Vec<String>,
    /// vendor/family/model in `/proc/cpuinfo` that this profile represents.
    #[serde(skip_serializing, default)]
    pub cpuid: Vec<String>,
    /// How the device was chosen.
    #[serde(skip_deserializing)]
    pub note: Option<String>,
}

/// `achievable_flops` and `achievable_bandwidth` of a profile file that states none.
fn default_fraction() -> f64 {
    0.8
}

/// Reads `embodied` from kilograms of CO2e.
fn kilograms<'de, D: Deserializer<'de>>(file: D) -> Result<Option<GramsCo2e>, D::Error> {
    let kilograms = Option::<f64>::deserialize(file)?;
    Ok(kilograms.map(|kg| GramsCo2e(kg * 1000.0)))
}

/// Reads `sources` from the title of each field's source.
fn titles<'de, D: Deserializer<'de>>(file: D) -> Result<BTreeMap<String, Source>, D::Error> {
    let titles = BTreeMap::<String, String>::deserialize(file)?.into_iter();
    Ok(titles
        .map(|(field, title)| (field, Source::user(title, false)))
        .collect())
}

/// Bytes per second that one core draws from memory, before `achievable_bandwidth`: a few cores of a
/// socket share its bandwidth less than evenly. Assumed, not verified: one core of a 64-core server
/// processor was seen to read 11 to 12 GB/s.
const CORE_BANDWIDTH: f64 = 1.5e10;

/// Largest ratio of a processor's highest clock to the base clock that its peak is stated for.
/// Assumed, not verified.
const CLOCK_RATIO: f64 = 2.2;

/// Largest ratio of a processor's rate in a 16-bit format to that in f32: 2048 bf16 operations a
/// cycle in AMX tiles over 64 f32 operations in two AVX-512 units.
const HALF_RATIO: f64 = 32.0;

/// Share of the way from `idle_w` to `load_w` that a device draws while it streams from memory: of an H100, 200 pJ a byte times
/// 2.68e12 bytes a second over 630 W.
const STREAMING_LOAD: f64 = 0.85;

impl Profile {
    /// Picojoules of a byte that main memory serves: what the device draws above idle while it streams, over bytes per second. The
    /// memory's own share of it is far smaller (HBM3: 32 pJ).
    ///
    /// ```
    /// use wattune::energy::Profile;
    /// // 0.85 (70 W - 8 W) / (0.8 x 320 GB/s).
    /// let t4 = Profile::named("nvidia-t4").unwrap();
    /// assert!((t4.streamed_pj_per_byte() - 205.9).abs() < 0.1);
    /// ```
    pub fn streamed_pj_per_byte(&self) -> f64 {
        let streaming = (self.load_w - self.idle_w) * STREAMING_LOAD;
        let rate = self.bandwidth * self.achievable_bandwidth;
        self.dram_pj_per_byte
            .unwrap_or_else(|| streaming.0 / rate * 1e12)
    }

    /// The same processor with `cores` of its cores: their share of its power, peak and shared
    /// caches, and of its bandwidth at least what so many cores draw. Other devices, and a number of
    /// cores that is no smaller, are returned unchanged.
    pub fn scaled_to(&self, cores: usize) -> Profile {
        let scalable = self
            .cores
            .filter(|all| self.kind == DeviceKind::Cpu && cores > 0 && cores < *all);
        let Some(all) = scalable else {
            return self.clone();
        };
        let share = cores as f64 / all as f64;
        let base_name = self.name.split('@').next().unwrap_or(&self.name);
        let mut peak_flops = self.peak_flops.clone();
        peak_flops.values_mut().for_each(|peak| *peak *= share);
        let load_points = self.load_points.iter();
        Profile {
            name: format!("{base_name}@{cores}"),
            cores: Some(cores),
            idle_w: self.idle_w * share,
            load_w: self.load_w * share,
            load_points: load_points
                .map(|(load, watts)| (*load, *watts * share))
                .collect(),
            peak_flops,
            bandwidth: (self.bandwidth * share)
                .max(CORE_BANDWIDTH * cores as f64)
                .min(self.bandwidth),
            embodied: self.embodied.map(|grams| grams * share),
            caches: self.scaled_caches(share),
            ..self.clone()
        }
    }

    /// Every bandwidth and the shared capacities times `share`; no level smaller than a private
    /// one.
    fn scaled_caches(&self, share: f64) -> Vec<CacheLevel> {
        let private = self.caches.iter().filter(|level| !level.shared);
        let largest_private = private.map(|level| level.bytes).max().unwrap_or_default();
        let mut caches = self.caches.clone();
        for level in &mut caches {
            level.bandwidth = level.bandwidth.map(|bandwidth| bandwidth * share);
            if level.shared {
                let bytes = Bytes((level.bytes.0 as f64 * share) as u64);
                level.bytes = bytes.max(largest_private);
            }
        }
        caches
    }

    /// Energy of the machine over that of the device; `None` if the host's share is unknown.
    ///
    /// ```
    /// use wattune::energy::Profile;
    /// let factor = Profile::named("nvidia-h100-sxm5-80gb").unwrap().whole_machine().unwrap();
    /// assert!((factor - 1.0 / 0.7).abs() < 1e-12);
    /// ```
    pub fn whole_machine(&self) -> Option<f64> {
        self.host_share.map(|share| 1.0 / (1.0 - share))
    }

    /// `measured_over_counted` with the title of its source; `None` if the profile is not
    /// reconciled.
    pub fn factor(&self) -> Option<(f64, &str)> {
        let source = self.sources.get("measured_over_counted");
        let title = source.map_or("the profile file does not say", |source| {
            source.title.as_str()
        });
        self.measured_over_counted.map(|factor| (factor, title))
    }

    /// FLOP/s that tuned products of this precision reach.
    pub fn rate(&self, precision: Precision) -> f64 {
        let peak = self
            .peak_flops
            .get(&precision)
            .or(self.peak_flops.get(&Precision::F32));
        peak.expect("a valid profile has a peak for f32") * self.achievable_flops
    }

    /// FLOP/s that no program passes in this precision: the peak, of a processor at its highest clock
    /// with its fastest units.
    pub(super) fn highest_rate(&self, precision: Precision) -> f64 {
        let peak = self.rate(precision) / self.achievable_flops;
        if self.kind != DeviceKind::Cpu {
            return peak;
        }
        let f32_peak = self.rate(Precision::F32) / self.achievable_flops;
        let units = if precision == Precision::F32 {
            f32_peak
        } else {
            peak.max(HALF_RATIO * f32_peak)
        };
        CLOCK_RATIO * units
    }

    /// Picojoules per FLOP of this precision; f32's if the device has no unit for it.
    pub fn pj_per_flop(&self, precision: Precision) -> f64 {
        let energy = self
            .pj_per_flop
            .get(&precision)
            .or(self.pj_per_flop.get(&Precision::F32));
        *energy.expect("a valid profile has a figure for f32")
    }

    /// Power at `load` in 0..1, interpolated linearly between idle, the measured points and full
    /// load.
    pub fn power_at(&self, load: f64) -> Watts {
        let load = load.clamp(0.0, 1.0);
        let mut previous = (0.0, self.idle_w);
        for &(next_load, watts) in self.load_points.iter().chain([&(1.0, self.load_w)]) {
            if load <= next_load {
                let share = if next_load > previous.0 {
                    (load - previous.0) / (next_load - previous.0)
                } else {
                    1.0
                };
                return previous.1 + (watts - previous.1) * share;
            }
            previous = (next_load, watts);
        }
        self.load_w
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Profile {
        Profile::named(name).unwrap()
    }

    #[test]
    fn a_processor_is_scaled_to_some_of_its_cores() {
        let all = named("amd-epyc-7763");
        let two = named("amd-epyc-7763@2");
        assert_eq!(two.name, "amd-epyc-7763@2");
        assert!((two.load_w.0 - 280.0 * 2.0 / 64.0).abs() < 1e-9);
        assert!((two.rate(Precision::F32) - all.rate(Precision::F32) / 32.0).abs() < 1.0);
        assert_eq!(two.caches[1].bytes, all.caches[1].bytes);
        // Two cores draw more than 2/64 of the bandwidth; 60 draw all of it.
        assert_eq!(two.bandwidth, 2.0 * CORE_BANDWIDTH);
        assert_eq!(named("amd-epyc-7763@60").bandwidth, all.bandwidth);
        assert_eq!(two.caches[2].bytes, Bytes(8 << 20));
        assert_eq!(all.scaled_to(64), all);
        assert_eq!(all.scaled_to(1000), all);
    }

    #[test]
    fn power_is_interpolated_between_measured_points() {
        // EPYC 8024P (RAPL): 18.6 W at 10 %, 43.2 W at 50 %, 46.1 W at 100 %; half-way between the
        // last two is 44.65 W.
        let epyc = named("amd-epyc-8024p");
        assert!((epyc.power_at(0.75).0 - 44.65).abs() < 1e-9);
        assert_eq!(epyc.power_at(1.0), Watts(46.1));
        assert_eq!(epyc.power_at(0.0), epyc.idle_w);
        assert!((named("nvidia-t4").power_at(0.5).0 - 39.0).abs() < 1e-9);
    }
}
