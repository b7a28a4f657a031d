//! Device profiles: what a device draws, does at its best, and spends on an operation or a byte.
//!
//! Owns what a profile is and the scaling of a processor to some of its cores. Takes a name, returns a `Profile` in which every
//! number has a source. Knows nothing of the files profiles are read from (`table`), the work they will be charged for
//! (`charge`), nor how the machine is recognised (`detect`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::meter::Computing;
use super::options::DeviceRef;
use super::{did_you_mean, near_matches};
use crate::error::{Error, Kind, Result};
use crate::units::{Bytes, GramsCo2e, Watts};
use crate::work::Precision;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A processor: it can be scaled to some of its cores.
    Cpu,
    /// A discrete graphics processor.
    Gpu,
    /// Processor and graphics processor in one package with one memory.
    Soc,
}

/// A cache level. The traffic that misses it is served by the next level out, the last one's by DRAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheLevel {
    /// "L1", "L2", "LLC", ...
    pub name: String,
    /// Capacity: of one core's own cache, or of the whole where shared.
    pub bytes: Bytes,
    /// Energy of a byte that this level serves to the one inside it; where absent it is part of pJ/FLOP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pj_per_byte: Option<f64>,
    /// Bytes per second that it serves to all cores together, as copies reach it; where absent it is never what limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<f64>,
    /// Shared by all cores, so that a share of the cores gets a share of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// Where a number comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Document or table.
    pub title: String,
    /// Year of the figure or of the table it was read from.
    pub year: u16,
    /// Licence of the table; "facts" for bare specifications.
    pub licence: String,
    /// Read in the source itself; false for recalled and assumed figures.
    pub verified: bool,
}

/// A device. Every number has an entry in `sources`, under its field's name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// Slug ("nvidia-h100-sxm5-80gb"); with `@N` behind it where scaled to N cores.
    pub name: String,
    /// For people.
    pub title: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Physical cores of a processor.
    pub cores: Option<usize>,
    /// Drawn when nothing runs.
    pub idle_w: Watts,
    /// Drawn when a large matrix product runs: measured at full load, else the rated power.
    pub load_w: Watts,
    /// Measured (load in 0..1, watts) pairs in rising order, where somebody measured them.
    pub load_points: Vec<(f64, Watts)>,
    /// Dense peak in FLOP/s; a precision without one runs at the rate of f32.
    pub peak_flops: BTreeMap<Precision, f64>,
    /// Share of the peak that tuned matrix products reach, in (0, 1].
    pub achievable_flops: f64,
    /// Memory bandwidth in bytes/s.
    pub bandwidth: f64,
    /// Share of the bandwidth that streams reach, in (0, 1].
    pub achievable_bandwidth: f64,
    /// Energy of one FLOP in picojoules, by precision: published, else derived (then it is in `derived`).
    pub pj_per_flop: BTreeMap<Precision, f64>,
    /// The precisions whose pJ/FLOP is derived.
    pub derived: Vec<Precision>,
    /// From the inside out.
    pub caches: Vec<CacheLevel>,
    /// Energy of one byte from or to main memory, in picojoules.
    pub dram_pj_per_byte: f64,
    /// What every counted joule is multiplied with: measured over counted of an earlier run on this device. 1 where nobody compared them.
    pub measured_over_counted: Option<f64>,
    /// The part of a training machine's power that is not its accelerators': the host. It is in no figure of the profile.
    pub host_share: Option<f64>,
    /// Greenhouse gas of making the device.
    pub embodied: Option<GramsCo2e>,
    /// Field -> source.
    pub sources: BTreeMap<String, Source>,
    /// The names under which a driver or a system reports the device.
    #[serde(skip)]
    pub matches: Vec<String>,
    /// vendor/family/model of `/proc/cpuinfo` that this profile stands for.
    #[serde(skip)]
    pub cpuid: Vec<String>,
    /// How the device was chosen, where that needs saying.
    pub note: Option<String>,
}

impl Profile {
    /// The names of the shipped profiles.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::all().iter().map(|profile| profile.name.as_str())
    }

    /// The shipped profile `name`, of the whole device; "NAME@4" is a processor's profile scaled to four of its cores.
    ///
    /// ```
    /// use wattune::energy::Profile;
    /// assert_eq!(Profile::named("raspberry-pi-5@2").unwrap().cores, Some(2));
    /// assert!(Profile::named("nvidia-h100").unwrap_err().to_string().contains("nvidia-h100-sxm5-80gb"));
    /// ```
    pub fn named(name: &str) -> Result<Profile> {
        match name.parse() {
            Ok(DeviceRef::Named { name, cores }) => Self::shipped(&name, cores),
            Ok(DeviceRef::Auto | DeviceRef::File(_)) => Err(unknown(name)),
            Err(_) => Err(not_scalable(name)),
        }
    }

    /// The shipped profile `name`, a processor's scaled to `cores`.
    fn shipped(name: &str, cores: Option<usize>) -> Result<Profile> {
        let profile = Self::all()
            .iter()
            .find(|profile| profile.name == name)
            .ok_or_else(|| unknown(name))?;
        match (cores, profile.cores) {
            (None, _) => Ok(profile.clone()),
            (Some(cores), Some(all))
                if profile.kind == DeviceKind::Cpu && (1..=all).contains(&cores) =>
            {
                Ok(profile.scaled_to(cores))
            }
            (Some(cores), _) => Err(not_scalable(&format!("{name}@{cores}"))),
        }
    }

    /// The profile of a recipe's `energy.device`. A name is the whole device on every machine; `auto`, the device that computes,
    /// is "NAME@CORES" for a processor.
    pub fn resolve(device: &DeviceRef, computing: Computing) -> Result<Profile> {
        match device {
            DeviceRef::Auto => Self::of_machine(computing),
            DeviceRef::File(path) => Self::from_file(path),
            DeviceRef::Named { name, cores } => Self::shipped(name, *cores),
        }
    }

    /// The reference under which a recipe finds this profile again.
    pub fn reference(&self) -> DeviceRef {
        let whole = || DeviceRef::Named {
            name: self.name.clone(),
            cores: None,
        };
        self.name.parse().unwrap_or_else(|_| whole())
    }

    /// The same processor with `cores` of its cores: a share of its power, peak, bandwidth and shared caches.
    /// Other devices, and a number of cores it does not exceed, are returned unchanged.
    pub fn scaled_to(&self, cores: usize) -> Profile {
        let mut scaled = self.clone();
        let Some(all) = self
            .cores
            .filter(|all| self.kind == DeviceKind::Cpu && cores > 0 && cores < *all)
        else {
            return scaled;
        };
        let share = cores as f64 / all as f64;
        scaled.name = format!(
            "{}@{cores}",
            self.name.split('@').next().unwrap_or(&self.name)
        );
        scaled.cores = Some(cores);
        scaled.idle_w = self.idle_w * share;
        scaled.load_w = self.load_w * share;
        scaled
            .load_points
            .iter_mut()
            .for_each(|(_, watts)| *watts = *watts * share);
        scaled
            .peak_flops
            .values_mut()
            .for_each(|peak| *peak *= share);
        scaled.bandwidth *= share;
        scaled.embodied = self.embodied.map(|grams| grams * share);
        let own = self
            .caches
            .iter()
            .filter(|level| !level.shared)
            .map(|level| level.bytes)
            .max()
            .unwrap_or_default();
        scaled
            .caches
            .iter_mut()
            .for_each(|level| level.bandwidth = level.bandwidth.map(|rate| rate * share));
        for level in scaled.caches.iter_mut().filter(|level| level.shared) {
            // A level never holds less than the one inside it.
            level.bytes = Bytes((level.bytes.0 as f64 * share) as u64).max(own);
        }
        scaled
    }

    /// How many times the device's own energy the whole machine takes; `None` where its host's share is not known.
    ///
    /// ```
    /// use wattune::energy::Profile;
    /// let times = Profile::named("nvidia-h100-sxm5-80gb").unwrap().whole_machine().unwrap();
    /// assert!((times - 1.0 / 0.7).abs() < 1e-12);
    /// ```
    pub fn whole_machine(&self) -> Option<f64> {
        self.host_share.map(|share| 1.0 / (1.0 - share))
    }

    /// The factor of every counted joule, with its source; `None` where the profile has none.
    pub fn factor(&self) -> Option<(f64, &str)> {
        let source = self
            .sources
            .get("measured_over_counted")
            .map_or("the profile file does not say", |source| {
                source.title.as_str()
            });
        self.measured_over_counted.map(|factor| (factor, source))
    }

    /// The same device with every counted joule multiplied by `ratio` more: what was measured over what this profile counted.
    ///
    /// # Errors
    /// A ratio that is not a number above zero, and a name that no profile may have.
    pub fn reconciled(&self, name: &str, ratio: f64, source: &str) -> Result<Profile> {
        let mut profile = self.renamed(name)?;
        if !(ratio.is_finite() && ratio > 0.0) {
            let error = Error::new(Kind::Energy, "measured over counted is no factor")
                .value(ratio.to_string());
            return Err(error.rule("a number above zero"));
        }
        profile.measured_over_counted = Some(ratio * self.measured_over_counted.unwrap_or(1.0));
        let source = Source {
            title: source.to_string(),
            year: 0,
            licence: "user".to_string(),
            verified: true,
        };
        profile
            .sources
            .insert("measured_over_counted".to_string(), source);
        Ok(profile)
    }

    /// FLOP/s that tuned products of this precision reach.
    pub fn rate(&self, precision: Precision) -> f64 {
        let peak = self
            .peak_flops
            .get(&precision)
            .or(self.peak_flops.get(&Precision::F32));
        peak.expect("build requires a peak for f32") * self.achievable_flops
    }

    /// Picojoules of one FLOP of this precision; f32's where the device has no unit for it.
    pub fn pj_per_flop(&self, precision: Precision) -> f64 {
        let energy = self
            .pj_per_flop
            .get(&precision)
            .or(self.pj_per_flop.get(&Precision::F32));
        *energy.expect("build fills in f32")
    }

    /// Power at `load` in 0..1: between the measured points, else on the line from idle to full load.
    pub fn power_at(&self, load: f64) -> Watts {
        let load = load.clamp(0.0, 1.0);
        let mut below = (0.0, self.idle_w);
        for &(at, watts) in self.load_points.iter().chain([&(1.0, self.load_w)]) {
            if load <= at {
                let share = if at > below.0 {
                    (load - below.0) / (at - below.0)
                } else {
                    1.0
                };
                return below.1 + (watts - below.1) * share;
            }
            below = (at, watts);
        }
        self.load_w
    }
}

fn not_scalable(name: &str) -> Error {
    let slug = name.split('@').next().unwrap_or(name);
    Error::new(Kind::Energy, "a profile cannot be scaled to these cores")
        .value(name)
        .rule("a processor's profile, then `@` and a number of cores from 1 to the processor's own")
        .hint(format!(
            "write `{slug}`, or `{slug}@2` if it is a processor"
        ))
}

fn unknown(name: &str) -> Error {
    let near = near_matches(name, Profile::names());
    Error::new(Kind::Energy, "there is no device profile of this name")
        .value(name)
        .hint(did_you_mean(&near, "`wattune devices` lists every profile; a path ending in `.toml` is read as a profile file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_scaled_to_its_cores() {
        let whole = Profile::named("amd-epyc-7763").unwrap();
        let two = Profile::named("amd-epyc-7763@2").unwrap();
        assert_eq!(two.name, "amd-epyc-7763@2");
        assert!((two.load_w.0 - 280.0 * 2.0 / 64.0).abs() < 1e-9);
        assert!((two.rate(Precision::F32) - whole.rate(Precision::F32) / 32.0).abs() < 1.0);
        assert_eq!(
            (two.caches[1].bytes, two.caches[2].bytes),
            (whole.caches[1].bytes, Bytes(8 << 20))
        );
        assert_eq!(whole.scaled_to(64), whole);
        assert_eq!(whole.scaled_to(1000), whole);
        for bad in [
            "amd-epyc-7763@0",
            "amd-epyc-7763@65",
            "amd-epyc-7763@x",
            "nvidia-t4@2",
        ] {
            assert_eq!(
                Profile::named(bad).unwrap_err().kind(),
                Kind::Energy,
                "{bad}"
            );
        }
    }

    #[test]
    fn power_follows_measured_points() {
        // EPYC 8024P (RAPL): 18.6 W at 10 %, 43.2 W at 50 %, 46.1 W at 100 %; half-way between the last two is 44.65 W.
        let epyc = Profile::named("amd-epyc-8024p").unwrap();
        assert!((epyc.power_at(0.75).0 - 44.65).abs() < 1e-9);
        assert_eq!(epyc.power_at(1.0), Watts(46.1));
        assert_eq!(epyc.power_at(0.0), epyc.idle_w);
        assert!((Profile::named("nvidia-t4").unwrap().power_at(0.5).0 - 39.0).abs() < 1e-9);
    }
}
