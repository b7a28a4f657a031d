//! Profiles from measurements: calibration on a machine, reconciliation with a measured run.
//!
//! Takes a profile and measured figures, returns a validated profile of another name in which every
//! replaced figure states its source.

use std::collections::BTreeMap;

use super::profile::{Profile, Source};
use super::profile_rules::{FACTOR_RULE, check, is_factor};
use crate::error::{Error, Kind, Result};
use crate::units::{Bytes, Watts};
use crate::work::Precision;

/// Figures measured on a device.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Measured {
    /// Display name; `None`: the base profile's.
    pub title: Option<String>,
    /// FLOP/s reached by products, by precision.
    pub rates: BTreeMap<Precision, f64>,
    /// Bytes per second of a stream, reads plus writes.
    pub bandwidth: f64,
    /// Cache figures; levels without one stay as they are.
    pub caches: Vec<MeasuredCache>,
    /// `None` without a readable counter.
    pub power: Option<MeasuredPower>,
}

/// Figures of one cache level.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredCache {
    /// Its name in the profile.
    pub name: String,
    /// Capacity of a private cache, if the system reports it.
    pub bytes: Option<Bytes>,
    /// Bytes per second served to all cores, reads plus writes, and the working set of each thread.
    pub bandwidth: Option<(f64, Bytes)>,
}

/// Power measured by a counter of the device.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredPower {
    /// With nothing running.
    pub idle: Watts,
    /// With large products running.
    pub load: Watts,
    /// While memory is copied; `None` if it is not more than `idle`.
    pub streaming: Option<Watts>,
    /// "rapl", "nvml:0".
    pub counter: String,
}

impl Profile {
    /// This device with measured figures. Derived pJ/FLOP are derived again, so that the device
    /// still draws `load_w` at full load; a precision without a measurement keeps its rate.
    /// Measured power replaces every pJ/FLOP and drops the load points. A reconciliation factor is
    /// dropped with the figures it was for.
    pub fn calibrated(&self, name: &str, measured: &Measured) -> Result<Profile> {
        let mut profile = self.file_form();
        profile.name = name.to_string();
        if let Some(title) = &measured.title {
            profile.title = title.clone();
        }
        profile.measured_over_counted = None;
        profile.sources.remove("measured_over_counted");
        for (precision, peak) in &mut profile.peak_flops {
            *peak = self.rate(*precision);
        }
        profile.peak_flops.extend(&measured.rates);
        profile.bandwidth = measured.bandwidth;
        profile.achievable_flops = 1.0;
        profile.achievable_bandwidth = 1.0;
        let source = format!("measured on this machine; the rest as {}", self.name);
        profile.set_sources(&["peak_flops", "bandwidth", "achievable"], &source);
        profile.set_caches(&measured.caches);
        if let Some(power) = &measured.power {
            profile.set_power(power);
        }
        profile.complete(None, Some("measured by `wattune calibrate`".to_string()))
    }

    /// This device with every counted joule multiplied by a further `ratio`: measured over counted
    /// energy of a run charged to this profile.
    ///
    /// # Errors
    /// A ratio that no device has, or an invalid name.
    pub fn reconciled(&self, name: &str, ratio: f64, source: &str) -> Result<Profile> {
        let mut profile = Profile {
            name: name.to_string(),
            ..self.clone()
        };
        check(&profile, None)?;
        let factor = ratio * self.measured_over_counted.unwrap_or(1.0);
        if !is_factor(factor) {
            let error = Error::new(Kind::Energy, "measured over counted is no factor");
            return Err(error.value(factor.to_string()).rule(FACTOR_RULE));
        }
        profile.measured_over_counted = Some(factor);
        let key = "measured_over_counted".to_string();
        profile.sources.insert(key, Source::user(source, true));
        Ok(profile)
    }

    fn set_sources(&mut self, fields: &[&str], title: &str) {
        for field in fields {
            self.sources
                .insert((*field).to_string(), Source::user(title, false));
        }
    }

    fn set_power(&mut self, power: &MeasuredPower) {
        self.idle_w = power.idle;
        self.load_w = power.load;
        self.load_points.clear();
        self.pj_per_flop.clear();
        self.dram_pj_per_byte = power
            .streaming
            .map(|watts| (watts - power.idle).0 / self.bandwidth * 1e12);
        let source = format!("measured on this machine with {}", power.counter);
        self.set_sources(&["idle", "load", "pj_per_flop", "dram"], &source);
    }

    /// Replaces measured capacities and bandwidths.
    fn set_caches(&mut self, measured: &[MeasuredCache]) {
        let mut sized = Vec::new();
        let mut timed = Vec::new();
        for cache in measured {
            let Some(level) = self
                .caches
                .iter_mut()
                .find(|level| level.name == cache.name)
            else {
                continue;
            };
            if let Some(bytes) = cache.bytes {
                level.bytes = bytes;
                sized.push(cache.name.clone());
            }
            if let Some((bandwidth, working_set)) = cache.bandwidth {
                level.bandwidth = Some(bandwidth);
                timed.push(format!(
                    "{} by copies within {working_set} a thread",
                    cache.name
                ));
            }
        }
        self.grow_outer_caches();
        if measured.is_empty() {
            return;
        }
        let rest = self.sources.get("caches").map(|source| &source.title);
        let sources = [
            ("sizes as the system shows them: ", sized.join(", ")),
            ("bandwidth measured on this machine: ", timed.join(", ")),
            ("the rest: ", rest.cloned().unwrap_or_default()),
        ];
        let stated = sources.iter().filter(|(_, figures)| !figures.is_empty());
        let titles: Vec<String> = stated
            .map(|(kind, figures)| format!("{kind}{figures}"))
            .collect();
        self.set_sources(&["caches"], &titles.join("; "));
    }

    /// Raises each level to at least the capacity of the one inside it.
    fn grow_outer_caches(&mut self) {
        let mut inner = Bytes(0);
        for level in &mut self.caches {
            level.bytes = level.bytes.max(inner);
            inner = level.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Work;

    fn cube(precision: Precision) -> Work {
        Work::product(8192, 8192, 8192, precision)
    }

    #[test]
    fn a_lower_rate_at_equal_power_raises_the_energy_of_a_flop() {
        // Half the rate at the same watts: twice the energy of a FLOP, idle time included.
        let pi = Profile::named("raspberry-pi-5").unwrap();
        let measured = Measured {
            rates: BTreeMap::from([(Precision::F32, pi.rate(Precision::F32) / 2.0)]),
            bandwidth: 1.5e10,
            ..Measured::default()
        };
        let slow = pi.calibrated("my-pi", &measured).unwrap();
        let energy = |profile: &Profile| profile.charge(&cube(Precision::F32)).energy.joules();
        let ratio = energy(&slow) / energy(&pi);
        assert!((ratio - 2.0).abs() < 1e-6, "{ratio}");
        assert!(slow.sources["peak_flops"].title.contains("measured"));
    }

    #[test]
    fn measured_caches_replace_the_profiles_and_state_their_source() {
        let pi = Profile::named("raspberry-pi-5").unwrap();
        let cache = |name: &str, bytes: Option<u64>, bandwidth: Option<f64>| MeasuredCache {
            name: name.to_string(),
            bytes: bytes.map(Bytes),
            bandwidth: bandwidth.map(|bandwidth| (bandwidth, Bytes(4096))),
        };
        let measured = Measured {
            bandwidth: pi.bandwidth,
            caches: vec![
                cache("L2", Some(4 << 20), Some(1e9)),
                cache("LLC", None, None),
                cache("L9", Some(1), Some(1.0)),
            ],
            ..Measured::default()
        };
        let mine = pi.calibrated("mine", &measured).unwrap();
        let levels = mine.caches.iter();
        let levels: Vec<_> = levels
            .map(|level| (level.name.as_str(), level.bytes.0, level.bandwidth))
            .collect();
        // The last level, of which only 2 MiB were known, holds at least as much as the one inside
        // it.
        let expected = [
            ("L1", 64 << 10, None),
            ("L2", 4 << 20, Some(1e9)),
            ("LLC", 4 << 20, None),
        ];
        assert_eq!(levels, expected);
        let source = &mine.sources["caches"].title;
        let bandwidth = "bandwidth measured on this machine: L2 by copies within 4 KiB";
        assert!(
            source.contains(&format!("shows them: L2; {bandwidth}")),
            "{source}"
        );
        // Read back from its file it is the same; half the cores get half the bandwidth.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        std::fs::write(&path, mine.to_toml()).unwrap();
        let read_back = Profile::from_file(&path).unwrap();
        assert_eq!(read_back.caches, mine.caches);
        assert_eq!(read_back.scaled_to(2).caches[1].bandwidth, Some(5e8));
        // L2 serves L1's misses at 1 GB/s: slower than arithmetic and memory, so it bounds the
        // time.
        let charge = mine.charge(&Work::product(512, 512, 512, Precision::F32));
        let l2_time = charge.bytes["L2"].0 as f64 / 1e9;
        assert!((charge.time.0 - l2_time).abs() < 1e-12, "{charge:?}");
    }

    #[test]
    fn measured_power_replaces_every_figure_that_depends_on_power() {
        // The definition of the derivation: an 8192-cube product draws `load` on average over its
        // roofline time; and idle is idle. 361 W at 2.9e12 bytes a second: 290 W / 2.9e12 = 100 pJ.
        let h100 = Profile::named("nvidia-h100-sxm5-80gb").unwrap();
        let measured = Measured {
            rates: BTreeMap::from([(Precision::Bf16, 6e14)]),
            bandwidth: 2.9e12,
            power: Some(MeasuredPower {
                idle: Watts(71.0),
                load: Watts(655.0),
                streaming: Some(Watts(361.0)),
                counter: "nvml:0".to_string(),
            }),
            ..Measured::default()
        };
        let profile = h100.calibrated("mine", &measured).unwrap();
        for precision in [Precision::Bf16, Precision::F32] {
            let charge = profile.charge(&cube(precision));
            let watts = charge.energy.joules().0 / charge.time.0;
            assert!((watts - 655.0).abs() < 0.1, "{precision:?}");
        }
        assert!((profile.streamed_pj_per_byte() - 100.0).abs() < 1e-9);
        assert_eq!(profile.power_at(0.0), Watts(71.0));
        assert_eq!(profile.power_at(1.0), Watts(655.0));
        assert!(profile.sources["load"].title.contains("nvml:0"));
        assert_eq!(profile.rate(Precision::Bf16), 6e14);
    }
}
