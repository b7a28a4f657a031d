//! The tables that profiles are read from: the shipped one and a user's own file.
//!
//! Owns `profiles.toml`, the form of a profile in TOML, its rules, and the derivation of pJ/FLOP. Takes text, returns profiles in
//! which no rule is broken, or the first broken one with its key. Knows nothing of what a profile is used for.
//!
//! Where pJ/FLOP is not published it is *derived*, so that a large matrix product draws `load_w`: for the product
//! 4096 x 4096 x 4096 in that precision, with its roofline time t and its DRAM traffic from the blocking model,
//! `pj_per_flop = ((load_w - idle_w) * t - movement) / flops`. Dynamic power at full load is thereby split between arithmetic
//! (with the caches) and memory, and no joule is counted twice.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::profile::{CacheLevel, DeviceKind, Profile, Source};
use super::traffic;
use crate::error::{Error, Kind, Result};
use crate::units::{Bytes, GramsCo2e, Seconds, Watts, significant};
use crate::work::{Precision, Work};

/// Exactly a `[[profile]]` of the table, or a user's profile file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: String,
    #[serde(default)]
    title: Option<String>,
    kind: DeviceKind,
    cores: Option<usize>,
    #[serde(default)]
    matches: Vec<String>,
    #[serde(default)]
    cpuid: Vec<String>,
    idle_w: f64,
    load_w: f64,
    #[serde(default)]
    load_points: Vec<(f64, f64)>,
    peak_flops: BTreeMap<Precision, f64>,
    #[serde(default)]
    pj_per_flop: BTreeMap<Precision, f64>,
    bandwidth: f64,
    #[serde(default = "default_fraction")]
    achievable_flops: f64,
    #[serde(default = "default_fraction")]
    achievable_bandwidth: f64,
    caches: Vec<CacheLevel>,
    dram_pj_per_byte: f64,
    #[serde(default)]
    measured_over_counted: Option<f64>,
    #[serde(default)]
    host_share: Option<f64>,
    embodied_kgco2e: Option<f64>,
    #[serde(default)]
    source: BTreeMap<String, String>,
}

impl Raw {
    /// A profile as its file; derived figures are left out, to be derived again.
    fn of(profile: &Profile) -> Raw {
        let published = |precision: &Precision| !profile.derived.contains(precision);
        let mut source = profile
            .sources
            .iter()
            .map(|(field, source)| (field.clone(), source.title.clone()))
            .collect::<BTreeMap<_, _>>();
        if !profile.derived.is_empty() {
            source.remove("pj_per_flop");
        }
        Raw {
            name: profile.name.replace('@', "-cores-"),
            title: Some(profile.title.clone()),
            kind: profile.kind,
            cores: profile.cores,
            matches: Vec::new(),
            cpuid: Vec::new(),
            idle_w: profile.idle_w.0,
            load_w: profile.load_w.0,
            load_points: profile
                .load_points
                .iter()
                .map(|(load, watts)| (*load, watts.0))
                .collect(),
            peak_flops: profile.peak_flops.clone(),
            pj_per_flop: profile
                .pj_per_flop
                .iter()
                .filter(|(p, _)| published(p))
                .map(|(p, pj)| (*p, *pj))
                .collect(),
            bandwidth: profile.bandwidth,
            achievable_flops: profile.achievable_flops,
            achievable_bandwidth: profile.achievable_bandwidth,
            caches: profile.caches.clone(),
            dram_pj_per_byte: profile.dram_pj_per_byte,
            measured_over_counted: profile.measured_over_counted,
            host_share: profile.host_share,
            embodied_kgco2e: profile.embodied.map(|grams| grams.0 / 1000.0),
            source,
        }
    }
}

/// What was measured on a device.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Measured {
    /// What the device is called; `None`: as the nearest profile calls its own.
    pub title: Option<String>,
    /// FLOP/s that products reach, by precision.
    pub rates: BTreeMap<Precision, f64>,
    /// Bytes per second of a stream, read and written.
    pub bandwidth: f64,
    /// What was found of caches; those of which nothing was stay as they are.
    pub caches: Vec<MeasuredCache>,
    /// `None` where no counter could be read.
    pub power: Option<MeasuredPower>,
}

/// What was found of one cache level.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredCache {
    /// Its name in the profile.
    pub name: String,
    /// Its size, where it is a core's own and the system tells it.
    pub bytes: Option<Bytes>,
    /// Bytes per second that it serves to all cores, read and written, and the bytes that each thread copied within.
    pub bandwidth: Option<(f64, Bytes)>,
}

/// Power that a counter of the device showed.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredPower {
    /// With nothing running.
    pub idle: Watts,
    /// With large products running.
    pub load: Watts,
    /// "rapl", "nvml:0".
    pub counter: String,
}

/// What tuned kernels usually reach; assumed, for a profile file that does not say.
fn default_fraction() -> f64 {
    0.8
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    sources: BTreeMap<String, Source>,
    profile: Vec<Raw>,
}

static TABLE: LazyLock<Vec<Profile>> = LazyLock::new(|| {
    let table: Table = toml::from_str(include_str!("profiles.toml"))
        .expect("the shipped table is valid: a test reads it");
    let build = |raw: Raw| {
        let name = raw.name.clone();
        Profile::build(raw, &table.sources, None)
            .unwrap_or_else(|e| unreachable!("shipped profile {name}: {e}"))
    };
    table.profile.into_iter().map(build).collect()
});

impl Profile {
    /// Every shipped profile.
    pub fn all() -> &'static [Profile] {
        &TABLE
    }

    /// A profile of the user's own: one TOML file with the keys of a `[[profile]]` of the shipped table.
    pub fn from_file(path: &Path) -> Result<Profile> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let place = path.display().to_string();
        let raw: Raw = toml::from_str(&text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            Error::new(Kind::Energy, format!("this is not a device profile: {}", e.message()))
                .at(format!("{place}, line {line}"))
                .hint("a profile has name, kind, idle_w, load_w, peak_flops, bandwidth, caches, dram_pj_per_byte, and cores for a cpu")
        })?;
        check(&raw, Some(&text)).map_err(|e| e.at(&place))?;
        Self::build(raw, &BTreeMap::new(), Some(&place)).map_err(|e| e.at(&place))
    }

    /// The same device with what was measured on it. What pJ/FLOP was derived is derived anew, so that the device still draws `load_w`
    /// at full load; a precision that was not measured keeps its rate. With measured power all pJ/FLOP is derived from it, and load
    /// points that somebody else measured are dropped.
    pub fn calibrated(&self, name: &str, measured: &Measured) -> Result<Profile> {
        let mut raw = Raw::of(self);
        raw.name = name.to_string();
        raw.title = measured.title.clone().or(raw.title);
        // It was the factor of the figures that are replaced now.
        raw.measured_over_counted = None;
        raw.source.remove("measured_over_counted");
        raw.peak_flops = self
            .peak_flops
            .keys()
            .map(|precision| (*precision, self.rate(*precision)))
            .collect();
        raw.peak_flops.extend(&measured.rates);
        raw.bandwidth = measured.bandwidth;
        (raw.achievable_flops, raw.achievable_bandwidth) = (1.0, 1.0);
        for field in ["peak_flops", "bandwidth", "achievable"] {
            raw.source.insert(
                field.to_string(),
                format!("measured on this machine; the rest as {}", self.name),
            );
        }
        note_caches(&mut raw, &measured.caches);
        if let Some(power) = &measured.power {
            (raw.idle_w, raw.load_w) = (power.idle.0, power.load.0);
            raw.load_points.clear();
            raw.pj_per_flop.clear();
            for field in ["idle", "load", "pj_per_flop"] {
                raw.source.insert(
                    field.to_string(),
                    format!("measured on this machine with {}", power.counter),
                );
            }
        }
        Self::build(raw, &BTreeMap::new(), Some("calibrate"))
    }

    /// The same profile under another name, as a file of its own.
    pub(super) fn renamed(&self, name: &str) -> Result<Profile> {
        let raw = Raw {
            name: name.to_string(),
            ..Raw::of(self)
        };
        check(&raw, None)?;
        Ok(Profile {
            name: raw.name,
            ..self.clone()
        })
    }

    /// The profile as a file that `from_file` reads.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(&Raw::of(self)).expect("a profile holds numbers and words only")
    }

    fn build(raw: Raw, sources: &BTreeMap<String, Source>, file: Option<&str>) -> Result<Profile> {
        check(&raw, None)?;
        let source = |text: &String| match sources.get(text) {
            Some(source) => source.clone(),
            None => Source {
                title: text.clone(),
                year: 0,
                licence: "user".to_string(),
                verified: false,
            },
        };
        let mut profile = Profile {
            title: raw.title.unwrap_or_else(|| raw.name.clone()),
            name: raw.name,
            kind: raw.kind,
            cores: raw.cores,
            idle_w: Watts(raw.idle_w),
            load_w: Watts(raw.load_w),
            load_points: raw
                .load_points
                .into_iter()
                .map(|(load, watts)| (load, Watts(watts)))
                .collect(),
            peak_flops: raw.peak_flops,
            achievable_flops: raw.achievable_flops,
            bandwidth: raw.bandwidth,
            achievable_bandwidth: raw.achievable_bandwidth,
            pj_per_flop: raw.pj_per_flop,
            derived: Vec::new(),
            caches: raw.caches,
            dram_pj_per_byte: raw.dram_pj_per_byte,
            measured_over_counted: raw.measured_over_counted,
            host_share: raw.host_share,
            embodied: raw.embodied_kgco2e.map(|kg| GramsCo2e(kg * 1000.0)),
            sources: raw
                .source
                .iter()
                .map(|(field, text)| (field.clone(), source(text)))
                .collect(),
            matches: raw.matches,
            cpuid: raw.cpuid,
            note: file.map(|file| format!("from the profile file {file}")),
        };
        let factor = profile.factor().map(|(factor, source)| {
            format!("; counted joules times {}: {source}", significant(factor))
        });
        profile.note = profile.note.map(|note| note + &factor.unwrap_or_default());
        profile.derive_energy_of_flops()?;
        Ok(profile)
    }

    /// Fills in pJ/FLOP for every precision that has a peak but no published figure (see the module's documentation).
    fn derive_energy_of_flops(&mut self) -> Result<()> {
        let missing: Vec<Precision> = self
            .peak_flops
            .keys()
            .copied()
            .filter(|p| !self.pj_per_flop.contains_key(p))
            .collect();
        for precision in missing {
            let product = Work::product(4096, 4096, 4096, precision);
            let flops = product.flops() as f64;
            let traffic = traffic::traffic(&self.caches, &product);
            let time = self.roofline(&product, &traffic);
            let movement = self.movement_energy(&traffic);
            let arithmetic = (self.load_w - self.idle_w) * Seconds(time.0) - movement;
            if arithmetic.0 <= 0.0 {
                return Err(Error::new(
                    Kind::Energy,
                    "moving the operands of a matrix product would draw more than the device does",
                )
                .value(format!("dram_pj_per_byte = {}", self.dram_pj_per_byte))
                .rule("(load_w - idle_w) must cover memory traffic and arithmetic")
                .hint("lower `dram_pj_per_byte`, raise `load_w`, or give `pj_per_flop`"));
            }
            self.pj_per_flop
                .insert(precision, arithmetic.0 / flops * 1e12);
            self.derived.push(precision);
        }
        if !self.derived.is_empty() {
            let title =
                "derived: a 4096-cube product at the achievable rate draws load_w".to_string();
            let source = Source {
                title,
                year: 2026,
                licence: "facts".to_string(),
                verified: false,
            };
            self.sources.insert("pj_per_flop".to_string(), source);
        }
        Ok(())
    }
}

/// Puts what was found of caches into their levels, and says where it comes from.
fn note_caches(raw: &mut Raw, found: &[MeasuredCache]) {
    let (mut sizes, mut rates) = (Vec::new(), Vec::new());
    for cache in found {
        let Some(level) = raw.caches.iter_mut().find(|level| level.name == cache.name) else {
            continue;
        };
        if let Some(bytes) = cache.bytes {
            level.bytes = bytes;
            sizes.push(cache.name.clone());
        }
        if let Some((rate, set)) = cache.bandwidth {
            level.bandwidth = Some(rate);
            rates.push(format!("{} by copies within {set} a thread", cache.name));
        }
    }
    // A level never holds less than the one inside it.
    let mut inner = Bytes(0);
    for level in &mut raw.caches {
        level.bytes = level.bytes.max(inner);
        inner = level.bytes;
    }
    let said = [
        ("sizes as the system shows them: ", sizes),
        ("bandwidth measured on this machine: ", rates),
    ];
    let said = said
        .iter()
        .filter(|(_, of)| !of.is_empty())
        .map(|(what, of)| format!("{what}{}", of.join(", ")));
    let rest = raw
        .source
        .get("caches")
        .map(|source| format!("the rest: {source}"));
    if !found.is_empty() {
        raw.source.insert(
            "caches".to_string(),
            said.chain(rest).collect::<Vec<_>>().join("; "),
        );
    }
}

/// Every rule a profile must keep; all that are broken are reported at once, with their lines where `text` is the profile's own.
fn check(raw: &Raw, text: Option<&str>) -> Result<()> {
    let slug = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let not_negative = |value: f64| value.is_finite() && value >= 0.0;
    let fraction = |value: f64| value > 0.0 && value <= 1.0;
    let point = |&(load, watts): &(f64, f64)| (0.0..=1.0).contains(&load) && positive(watts);
    let rising = raw.load_points.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let growing = raw
        .caches
        .windows(2)
        .all(|pair| pair[0].bytes <= pair[1].bytes);
    let level = |level: &CacheLevel| {
        level.bytes.0 > 0
            && level.pj_per_byte.is_none_or(not_negative)
            && level.bandwidth.is_none_or(positive)
    };
    let cores = raw.cores != Some(0) && (raw.kind != DeviceKind::Cpu || raw.cores.is_some());

    let mut rules = Rules {
        text,
        broken: Vec::new(),
    };
    rules.keep(
        "name",
        !raw.name.is_empty() && raw.name.chars().all(slug),
        "lower-case letters, digits and hyphens",
        &raw.name,
    );
    rules.keep(
        "cores",
        cores,
        "one or more; a processor says how many physical cores it has",
        &raw.cores,
    );
    rules.keep(
        "idle_w",
        not_negative(raw.idle_w),
        "watts, zero or more",
        &raw.idle_w,
    );
    rules.keep(
        "load_w",
        positive(raw.load_w) && raw.load_w > raw.idle_w,
        "watts, more than `idle_w`",
        &raw.load_w,
    );
    rules.keep(
        "load_points",
        raw.load_points.iter().all(point) && rising,
        "[load in 0..1, watts], load rising",
        &raw.load_points,
    );
    rules.keep(
        "peak_flops",
        raw.peak_flops.contains_key(&Precision::F32),
        "a peak for `f32` at least",
        &raw.peak_flops,
    );
    rules.keep(
        "peak_flops",
        raw.peak_flops.values().all(|v| positive(*v)),
        "FLOP/s, more than zero",
        &raw.peak_flops,
    );
    rules.keep(
        "pj_per_flop",
        raw.pj_per_flop.values().all(|v| positive(*v)),
        "picojoules, more than zero",
        &raw.pj_per_flop,
    );
    rules.keep(
        "bandwidth",
        positive(raw.bandwidth),
        "bytes per second, more than zero",
        &raw.bandwidth,
    );
    rules.keep(
        "achievable_flops",
        fraction(raw.achievable_flops),
        "above 0, at most 1",
        &raw.achievable_flops,
    );
    rules.keep(
        "achievable_bandwidth",
        fraction(raw.achievable_bandwidth),
        "above 0, at most 1",
        &raw.achievable_bandwidth,
    );
    rules.keep(
        "caches",
        raw.caches.iter().all(level) && growing,
        "from the inside out, none smaller than the one before",
        &raw.caches,
    );
    rules.keep(
        "dram_pj_per_byte",
        not_negative(raw.dram_pj_per_byte),
        "picojoules, zero or more",
        &raw.dram_pj_per_byte,
    );
    let factor = raw.measured_over_counted.is_none_or(positive);
    rules.keep(
        "measured_over_counted",
        factor,
        "measured joules over counted ones, more than zero",
        &raw.measured_over_counted,
    );
    let host = raw
        .host_share
        .is_none_or(|share| (0.0..1.0).contains(&share));
    rules.keep(
        "host_share",
        host,
        "the part of the machine's power that is not the device's, from 0 to below 1",
        &raw.host_share,
    );
    rules.keep(
        "embodied_kgco2e",
        raw.embodied_kgco2e.is_none_or(not_negative),
        "kilograms, zero or more",
        &raw.embodied_kgco2e,
    );
    rules.verdict()
}

/// The rules that a profile breaks.
struct Rules<'a> {
    text: Option<&'a str>,
    /// Where, the value and the rule.
    broken: Vec<(String, String, String)>,
}

impl Rules<'_> {
    fn keep(&mut self, key: &str, kept: bool, rule: &str, value: &impl std::fmt::Debug) {
        if !kept {
            let line = self
                .text
                .and_then(|text| text.lines().position(|line| names(line, key)));
            let line = line.map_or_else(String::new, |at| format!(" in line {}", at + 1));
            self.broken.push((
                format!("`{key}`{line}"),
                format!("{value:?}"),
                rule.to_string(),
            ));
        }
    }

    fn verdict(self) -> Result<()> {
        match self.broken.as_slice() {
            [] => Ok(()),
            [(place, value, rule)] => Err(Error::new(
                Kind::Energy,
                format!("the profile's {place} breaks a rule"),
            )
            .value(value)
            .rule(rule)),
            many => {
                let each = many
                    .iter()
                    .map(|(place, value, rule)| format!("{place} is {value}; the rule: {rule}"));
                let each: Vec<String> = each.collect();
                Err(Error::new(
                    Kind::Energy,
                    format!("the profile breaks {} rules", many.len()),
                )
                .value(each.join("\n         ")))
            }
        }
    }
}

/// Whether a line of TOML sets `key` or opens its table.
fn names(line: &str, key: &str) -> bool {
    let rest = line.trim_start_matches(['[', ' ', '\t']).strip_prefix(key);
    rest.is_some_and(|rest| rest.trim_start().starts_with(['=', ']', '.']))
}

#[cfg(test)]
mod tests {
    use super::super::meter::Computing;
    use super::super::options::DeviceRef;
    use super::*;

    #[test]
    fn a_profile_written_is_read_back_and_calibration_keeps_its_power() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.toml");
        let work = Work::product(700, 800, 900, Precision::F32);
        for name in ["amd-epyc-8024p", "nvidia-h100-sxm5-80gb", "raspberry-pi-5"] {
            let profile = Profile::named(name).unwrap();
            std::fs::write(&path, profile.to_toml()).unwrap();
            let back = Profile::from_file(&path).unwrap();
            assert_eq!(
                (back.charge(&work), back.load_points),
                (profile.charge(&work), profile.load_points)
            );
        }
        // Half the rate at the same watts: twice the energy of a FLOP, idle time included.
        let pi = Profile::named("raspberry-pi-5").unwrap();
        let rates = BTreeMap::from([(Precision::F32, pi.rate(Precision::F32) / 2.0)]);
        let measured = Measured {
            rates,
            bandwidth: 1.5e10,
            ..Measured::default()
        };
        let slow = pi.calibrated("my-pi", &measured).unwrap();
        let work = Work::product(4096, 4096, 4096, Precision::F32);
        let ratio = slow.charge(&work).energy.joules() / pi.charge(&work).energy.joules();
        assert!((ratio - 2.0).abs() < 1e-6, "{ratio}");
        assert!(slow.sources["peak_flops"].title.contains("measured"));
    }

    #[test]
    fn what_was_found_of_caches_is_kept_with_its_source() {
        let pi = Profile::named("raspberry-pi-5").unwrap();
        let cache = |name: &str, bytes: Option<u64>, bandwidth: Option<f64>| MeasuredCache {
            name: name.to_string(),
            bytes: bytes.map(Bytes),
            bandwidth: bandwidth.map(|rate| (rate, Bytes(4096))),
        };
        let caches = vec![
            cache("L2", Some(4 << 20), Some(1e9)),
            cache("LLC", None, None),
            cache("L9", Some(1), Some(1.0)),
        ];
        let measured = Measured {
            bandwidth: pi.bandwidth,
            caches,
            ..Measured::default()
        };
        let mine = pi.calibrated("mine", &measured).unwrap();
        let levels: Vec<_> = mine
            .caches
            .iter()
            .map(|level| (level.name.as_str(), level.bytes.0, level.bandwidth))
            .collect();
        // The last level, of which only 2 MiB were known, holds at least what the one inside it does.
        assert_eq!(
            levels,
            [
                ("L1", 64 << 10, None),
                ("L2", 4 << 20, Some(1e9)),
                ("LLC", 4 << 20, None)
            ]
        );
        let source = &mine.sources["caches"].title;
        assert!(
            source.contains(
                "shows them: L2; bandwidth measured on this machine: L2 by copies within 4 KiB"
            ),
            "{source}"
        );
        // From its own file it is the same profile, also scaled: half the cores are served half as much.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        std::fs::write(&path, mine.to_toml()).unwrap();
        let again = Profile::from_file(&path).unwrap();
        assert_eq!(
            (&again.caches, again.scaled_to(2).caches[1].bandwidth),
            (&mine.caches, Some(5e8))
        );
        // L2 serves what L1 cannot hold at 1 GB/s: slower than arithmetic and memory, so it is what the time is.
        let charge = mine.charge(&Work::product(512, 512, 512, Precision::F32));
        assert!(
            (charge.time.0 - charge.bytes["L2"].0 as f64 / 1e9).abs() < 1e-12,
            "{charge:?}"
        );
    }

    #[test]
    fn measured_power_replaces_every_figure_that_comes_from_power() {
        // The definition of the derivation: a 4096-cube product draws `load` on average over its roofline time; and idle is idle.
        let h100 = Profile::named("nvidia-h100-sxm5-80gb").unwrap();
        let rates = BTreeMap::from([(Precision::Bf16, 6e14)]);
        let power = MeasuredPower {
            idle: Watts(71.0),
            load: Watts(655.0),
            counter: "nvml:0".to_string(),
        };
        let measured = Measured {
            rates,
            bandwidth: 2.9e12,
            power: Some(power),
            ..Measured::default()
        };
        let profile = h100.calibrated("mine", &measured).unwrap();
        for precision in [Precision::Bf16, Precision::F32] {
            let charge = profile.charge(&Work::product(4096, 4096, 4096, precision));
            assert!(
                (charge.energy.joules().0 / charge.time.0 - 655.0).abs() < 0.1,
                "{precision:?}"
            );
        }
        assert_eq!(
            (profile.power_at(0.0), profile.power_at(1.0)),
            (Watts(71.0), Watts(655.0))
        );
        assert!(profile.sources["load"].title.contains("nvml:0"));
        assert_eq!(profile.rate(Precision::Bf16), 6e14);
    }

    #[test]
    fn every_shipped_profile_is_sound_and_sourced() {
        assert!(Profile::all().len() >= 70);
        let mut names: Vec<&str> = Profile::names().collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Profile::all().len());
        for profile in Profile::all() {
            for field in [
                "idle",
                "load",
                "peak_flops",
                "bandwidth",
                "achievable",
                "caches",
                "dram",
            ] {
                let source = profile
                    .sources
                    .get(field)
                    .unwrap_or_else(|| panic!("{}: no source for {field}", profile.name));
                // A key that is no source of the table would have become its own title with no year.
                assert!(
                    source.year > 2000,
                    "{}: {field} names no source of the table",
                    profile.name
                );
            }
            assert!(profile.pj_per_flop(Precision::F32) > 0.0);
            assert!(
                profile.idle_w.0 < 0.4 * profile.load_w.0,
                "{}",
                profile.name
            );
        }
        for wanted in [
            "nvidia-h100-sxm5-80gb",
            "raspberry-pi-5",
            "generic-cpu",
            "generic-laptop",
            "amd-mi300x",
            "nvidia-b200-sxm-180gb",
        ] {
            assert!(Profile::named(wanted).is_ok(), "{wanted}");
        }
    }

    #[test]
    fn a_derived_flop_makes_a_large_product_draw_the_rated_power() {
        // The definition of the derivation: joules over roofline seconds of the 4096-cube product is load_w.
        for name in [
            "nvidia-a100-sxm4-80gb",
            "raspberry-pi-5",
            "intel-xeon-platinum-8480plus",
        ] {
            let profile = Profile::named(name).unwrap();
            let charge = profile.charge(&Work::product(4096, 4096, 4096, Precision::F32));
            let watts = charge.energy.joules().0 / charge.time.0;
            assert!(
                (watts / profile.load_w.0 - 1.0).abs() < 1e-4,
                "{name}: {watts} W of {}",
                profile.load_w
            );
        }
        // LLaMA's own A100 runs spent 2.5-3.0 pJ/FLOP at 400 W and a utilisation of 0.43-0.51 (arXiv:2302.13971, table 15);
        // at the achievable 0.869 the same 400 W give 400 / (312e12 * 0.869) = 1.475 pJ/FLOP, idle and memory included.
        let a100 = Profile::named("nvidia-a100-sxm4-80gb").unwrap();
        let charge = a100.charge(&Work::product(4096, 4096, 4096, Precision::Bf16));
        let pj = charge.energy.joules().0 / charge.flops as f64 * 1e12;
        assert!((pj - 1.475).abs() < 0.001, "{pj}");
    }

    #[test]
    fn a_profile_file_is_checked() {
        let good = "name = \"desk\"\nkind = \"cpu\"\ncores = 4\nidle_w = 10\nload_w = 60\nbandwidth = 3e10\n\
            peak_flops = { f32 = 2e11 }\ncaches = [{ name = \"L2\", bytes = 1000000 }]\ndram_pj_per_byte = 100\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("desk.toml");
        std::fs::write(&path, good).unwrap();
        assert_eq!(
            Profile::resolve(&DeviceRef::File(path.clone()), Computing::Cpu)
                .unwrap()
                .name,
            "desk"
        );
        let bad = [
            ("load_w = 60", "load_w = 5", "`load_w`"),
            ("cores = 4", "", "`cores`"),
            ("f32 = 2e11", "bf16 = 2e11", "`peak_flops`"),
            ("idle_w", "idle", "line 4"),
            ("cores = 4", "cores = 4\nhost_share = 1.0", "`host_share`"),
            ("bytes = 1000000", "bytes = 0", "`caches`"),
            (
                "bytes = 1000000",
                "bytes = 1000000, bandwidth = 0.0",
                "`caches`",
            ),
            (
                "dram_pj_per_byte = 100",
                "dram_pj_per_byte = 1e9",
                "memory traffic",
            ),
        ];
        for (from, to, word) in bad {
            std::fs::write(&path, good.replace(from, to)).unwrap();
            let error = Profile::from_file(&path).unwrap_err();
            assert!(
                error.kind() == Kind::Energy && error.to_string().contains(word),
                "{to}: {error}"
            );
        }
        // All mistakes at once, each with its line; what is not there has none.
        let three = good
            .replace("cores = 4\n", "")
            .replace("idle_w = 10", "idle_w = -1")
            .replace("bytes = 1000000", "bytes = 0");
        std::fs::write(&path, three).unwrap();
        let error = Profile::from_file(&path).unwrap_err().to_string();
        for words in [
            "breaks 3 rules",
            "`cores` is None",
            "`idle_w` in line 3 is -1.0; the rule: watts",
            "`caches` in line 7 is",
        ] {
            assert!(error.contains(words), "{words}: {error}");
        }
    }
}
