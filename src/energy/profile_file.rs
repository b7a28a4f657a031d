//! Device profiles as TOML: the shipped table `profiles.toml` and a user's profile file.
//!
//! Reads, completes, validates and writes profiles, and looks up shipped ones by name.
//!
//! A pJ/FLOP that is not published is derived so that a large matrix product draws `load_w`: for
//! the product 8192 x 8192 x 8192 in that precision, with its roofline time t and its DRAM traffic
//! from the blocking model, `pj_per_flop = ((load_w - idle_w) * t - movement) / flops`. Dynamic
//! power at full load is thereby split between arithmetic (with the caches) and memory, and no
//! joule is counted twice. A `dram_pj_per_byte` that was not measured follows from the watts while
//! streaming ([`Profile::streamed_pj_per_byte`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;
use toml_edit::{InlineTable, value};

use super::options::DeviceRef;
use super::profile::{DeviceKind, Profile, Source};
use super::profile_rules::check;
use crate::error::{Error, Kind, Result};
use crate::text::{did_you_mean, near_matches};
use crate::units::significant;
use crate::work::{Precision, Work};

/// `profiles.toml`; a profile's `source` holds keys of `sources`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    sources: BTreeMap<String, Source>,
    profile: Vec<Profile>,
}

static SHIPPED: LazyLock<Vec<Profile>> = LazyLock::new(|| {
    let table: Table = toml::from_str(include_str!("profiles.toml"))
        .expect("the shipped table is valid: a test reads it");
    let complete = |mut profile: Profile| {
        for source in profile.sources.values_mut() {
            if let Some(listed) = table.sources.get(&source.title) {
                *source = listed.clone();
            }
        }
        let name = profile.name.clone();
        profile
            .complete(None, None)
            .unwrap_or_else(|e| unreachable!("shipped profile {name}: {e}"))
    };
    table.profile.into_iter().map(complete).collect()
});

impl Profile {
    /// Every shipped profile.
    pub fn all() -> &'static [Profile] {
        &SHIPPED
    }

    /// The names of the shipped profiles.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::all().iter().map(|profile| profile.name.as_str())
    }

    /// The shipped profile `name`; "NAME@4" is a processor's profile scaled to four of its cores.
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

    /// The shipped profile `name`, scaled to `cores` if given.
    pub(super) fn shipped(name: &str, cores: Option<usize>) -> Result<Profile> {
        let profile = Self::all()
            .iter()
            .find(|profile| profile.name == name)
            .ok_or_else(|| unknown(name))?;
        let Some(cores) = cores else {
            return Ok(profile.clone());
        };
        let all = profile.cores.filter(|_| profile.kind == DeviceKind::Cpu);
        if all.is_some_and(|all| (1..=all).contains(&cores)) {
            Ok(profile.scaled_to(cores))
        } else {
            Err(not_scalable(&format!("{name}@{cores}")))
        }
    }

    /// Reads a user's profile: a TOML file with the keys of a `[[profile]]` of the shipped table.
    pub fn from_file(path: &Path) -> Result<Profile> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let place = path.display().to_string();
        let profile: Profile = toml::from_str(&text).map_err(|e| {
            let before = e.span().map_or("", |span| &text[..span.start.min(text.len())]);
            let line = 1 + before.matches('\n').count();
            Error::new(Kind::Energy, format!("this is not a device profile: {}", e.message()))
                .at(format!("{place}, line {line}"))
                .hint("a profile has name, kind, idle_w, load_w, peak_flops, bandwidth, caches, and cores for a cpu")
        })?;
        let note = format!("from the profile file {place}");
        profile
            .complete(Some(&text), Some(note))
            .map_err(|e| e.at(&place))
    }

    /// The profile as a file that `from_file` reads; derived figures are left out, to be derived
    /// again.
    pub fn to_toml(&self) -> String {
        let profile = self.file_form();
        let mut file = toml_edit::ser::to_document(&profile)
            .expect("a profile holds only values that TOML can represent");
        for key in ["derived", "embodied", "sources", "note"] {
            file.remove(key);
        }
        if let Some(grams) = profile.embodied {
            file["embodied_kgco2e"] = value(grams.0 / 1000.0);
        }
        let sources = profile.sources.iter();
        let titles = sources.map(|(field, source)| (field.as_str(), source.title.as_str()));
        file["source"] = value(titles.collect::<InlineTable>());
        file.to_string()
    }

    /// The profile without its derived figures, names of devices and details of sources.
    pub(super) fn file_form(&self) -> Profile {
        let mut profile = Profile {
            name: self.name.replace('@', "-cores-"),
            matches: Vec::new(),
            cpuid: Vec::new(),
            note: None,
            ..self.clone()
        };
        for precision in std::mem::take(&mut profile.derived) {
            profile.pj_per_flop.remove(&precision);
            profile.sources.remove("pj_per_flop");
        }
        for source in profile.sources.values_mut() {
            *source = Source::user(std::mem::take(&mut source.title), false);
        }
        profile
    }

    /// Checks the rules, then fills in the title and pJ/FLOP; `text` is the profile's TOML.
    pub(super) fn complete(mut self, text: Option<&str>, note: Option<String>) -> Result<Profile> {
        check(&self, text)?;
        if self.title.is_empty() {
            self.title = self.name.clone();
        }
        let factor = self.factor().map(|(factor, source)| {
            format!("; counted joules times {}: {source}", significant(factor))
        });
        self.note = note.map(|note| note + &factor.unwrap_or_default());
        if self.dram_pj_per_byte.is_none() {
            let title = "derived: streaming at the achievable bandwidth draws 0.85 of the way from idle_w to load_w, as an H100 does";
            self.sources.insert("dram".to_string(), derived(title));
        }
        self.derive_pj_per_flop()?;
        Ok(self)
    }

    /// Derives pJ/FLOP for every precision with a peak but no published figure (see the module's
    /// documentation).
    fn derive_pj_per_flop(&mut self) -> Result<()> {
        let peaks = self.peak_flops.keys().copied();
        let missing: Vec<Precision> = peaks
            .filter(|p| !self.pj_per_flop.contains_key(p))
            .collect();
        for precision in &missing {
            let product = large_product(*precision);
            let totals = self.totals(&product);
            let dynamic = (self.load_w - self.idle_w) * self.roofline(&totals);
            let arithmetic = dynamic - self.movement_energy(&totals);
            if arithmetic.0 <= 0.0 {
                return Err(self.no_energy_for_arithmetic());
            }
            let picojoules = arithmetic.0 / product.flops() as f64 * 1e12;
            self.pj_per_flop.insert(*precision, picojoules);
        }
        if !missing.is_empty() {
            let title = "derived: an 8192-cube product at the achievable rate draws load_w";
            self.sources
                .insert("pj_per_flop".to_string(), derived(title));
        }
        self.derived = missing;
        Ok(())
    }

    fn no_energy_for_arithmetic(&self) -> Error {
        let what = "moving the operands of a matrix product would draw more than the device does";
        Error::new(Kind::Energy, what)
            .value(format!(
                "dram_pj_per_byte = {}",
                self.streamed_pj_per_byte()
            ))
            .rule("(load_w - idle_w) must cover memory traffic and arithmetic")
            .hint("lower `dram_pj_per_byte`, raise `load_w`, or give `pj_per_flop`")
    }
}

/// The product that a device draws `load_w` for: larger ones take no less traffic per FLOP from a cache of today.
pub(super) fn large_product(precision: Precision) -> Work {
    Work::product(8192, 8192, 8192, precision)
}

/// The source of a figure that follows from others.
fn derived(title: &str) -> Source {
    Source {
        title: title.to_string(),
        year: 2026,
        licence: "facts".to_string(),
        verified: false,
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
    fn a_written_profile_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.toml");
        let work = Work::product(700, 800, 900, Precision::F32);
        for name in ["amd-epyc-8024p", "nvidia-h100-sxm5-80gb", "raspberry-pi-5"] {
            let profile = Profile::named(name).unwrap();
            std::fs::write(&path, profile.to_toml()).unwrap();
            let read_back = Profile::from_file(&path).unwrap();
            assert_eq!(read_back.charge(&work), profile.charge(&work));
            assert_eq!(read_back.load_points, profile.load_points);
            assert_eq!(read_back.file_form(), profile.file_form());
        }
    }

    #[test]
    fn every_shipped_profile_is_valid_and_sourced() {
        assert!(Profile::all().len() >= 70);
        let names: std::collections::BTreeSet<&str> = Profile::names().collect();
        assert_eq!(names.len(), Profile::all().len());
        for Profile { name, sources, .. } in Profile::all() {
            for field in [
                "idle",
                "load",
                "peak_flops",
                "bandwidth",
                "achievable",
                "caches",
                "dram",
            ] {
                // A key without an entry in `[sources]` would have become a title without a year.
                let source = sources.get(field).filter(|source| source.year > 2000);
                assert!(source.is_some(), "{name}: no listed source for {field}");
            }
        }
        for profile in Profile::all() {
            assert!(profile.pj_per_flop(Precision::F32) > 0.0);
            assert!(
                profile.idle_w.0 < 0.4 * profile.load_w.0,
                "{}",
                profile.name
            );
        }
        for name in [
            "nvidia-h100-sxm5-80gb",
            "raspberry-pi-5",
            "generic-cpu",
            "generic-laptop",
            "amd-mi300x",
            "nvidia-b200-sxm-180gb",
        ] {
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn an_unknown_core_count_is_refused() {
        for name in [
            "amd-epyc-7763@0",
            "amd-epyc-7763@65",
            "amd-epyc-7763@x",
            "nvidia-t4@2",
        ] {
            let error = Profile::named(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Energy, "{name}");
        }
    }

    #[test]
    fn with_a_derived_pj_per_flop_a_large_product_draws_the_rated_power() {
        // The definition of the derivation: joules over roofline seconds of the 8192-cube product
        // is load_w.
        for name in [
            "nvidia-a100-sxm4-80gb",
            "raspberry-pi-5",
            "intel-xeon-platinum-8480plus",
        ] {
            let profile = Profile::named(name).unwrap();
            let charge = profile.charge(&large_product(Precision::F32));
            let watts = charge.energy.joules().0 / charge.time.0;
            let load = profile.load_w;
            assert!(
                (watts / load.0 - 1.0).abs() < 1e-4,
                "{name}: {watts} W of {load}"
            );
        }
        // LLaMA's own A100 runs spent 2.5-3.0 pJ/FLOP at 400 W and a utilisation of 0.43-0.51
        // (arXiv:2302.13971, table 15); at the achievable 0.869 the same 400 W give 400 / (312e12 *
        // 0.869) = 1.475 pJ/FLOP, idle and memory included.
        let a100 = Profile::named("nvidia-a100-sxm4-80gb").unwrap();
        let charge = a100.charge(&large_product(Precision::Bf16));
        let pj = charge.energy.joules().0 / charge.flops as f64 * 1e12;
        assert!((pj - 1.475).abs() < 0.001, "{pj}");
    }
}
