//! Validation of device profiles.
//!
//! Reports every violated rule at once, with the line of its key if the profile's text is at hand.

use std::fmt::Debug;

use super::profile::{CacheLevel, DeviceKind, Profile};
use crate::error::{Error, Kind, Result};
use crate::work::Precision;

/// A rule for the value of a key.
struct Rule {
    key: &'static str,
    holds: bool,
    text: &'static str,
    /// The value, for the message.
    value: String,
}

fn rule(key: &'static str, holds: bool, text: &'static str, value: &impl Debug) -> Rule {
    let value = format!("{value:?}");
    Rule {
        key,
        holds,
        text,
        value,
    }
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn non_negative(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

/// Rule of `measured_over_counted`.
pub(super) const FACTOR_RULE: &str = "measured joules over counted ones, from 0.0001 to 10000";

/// Whether `value` can be measured over counted energy: within a factor of 10 000 of each other,
/// beyond which one of them is not of this device.
pub(super) fn is_factor(value: f64) -> bool {
    (1e-4..=1e4).contains(&value)
}

fn fraction(value: f64) -> bool {
    value > 0.0 && value <= 1.0
}

/// Checks every rule of a profile; `text` is the profile's TOML.
pub(super) fn check(profile: &Profile, text: Option<&str>) -> Result<()> {
    let rules = [
        identity(profile),
        power(profile),
        throughput(profile),
        memory(profile),
        factors(profile),
    ];
    let violations = rules.into_iter().flatten().filter(|rule| !rule.holds);
    let violations: Vec<(String, Rule)> = violations
        .map(|rule| (place(rule.key, text), rule))
        .collect();
    match violations.as_slice() {
        [] => Ok(()),
        [(place, rule)] => {
            let what = format!("the profile's {place} breaks a rule");
            Err(Error::new(Kind::Energy, what)
                .value(&rule.value)
                .rule(rule.text))
        }
        many => {
            let what = format!("the profile breaks {} rules", many.len());
            let lines = many
                .iter()
                .map(|(place, rule)| format!("{place} is {}; the rule: {}", rule.value, rule.text));
            let lines: Vec<String> = lines.collect();
            Err(Error::new(Kind::Energy, what).value(lines.join("\n         ")))
        }
    }
}

fn identity(p: &Profile) -> Vec<Rule> {
    let slug = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let name = !p.name.is_empty() && p.name.chars().all(slug);
    let cores = p.cores != Some(0) && (p.kind != DeviceKind::Cpu || p.cores.is_some());
    vec![
        rule(
            "name",
            name,
            "lower-case letters, digits and hyphens",
            &p.name,
        ),
        rule(
            "cores",
            cores,
            "one or more; a processor says how many physical cores it has",
            &p.cores,
        ),
    ]
}

fn power(p: &Profile) -> Vec<Rule> {
    let idle = p.idle_w.0;
    let load = p.load_w.0;
    let points: Vec<(f64, f64)> = p.load_points.iter().map(|(load, w)| (*load, w.0)).collect();
    let in_range = points
        .iter()
        .all(|(load, w)| (0.0..=1.0).contains(load) && positive(*w));
    let rising = points.windows(2).all(|pair| pair[0].0 < pair[1].0);
    vec![
        rule("idle_w", non_negative(idle), "watts, zero or more", &idle),
        rule(
            "load_w",
            positive(load) && load > idle,
            "watts, more than `idle_w`",
            &load,
        ),
        rule(
            "load_points",
            in_range && rising,
            "[load in 0..1, watts], load rising",
            &points,
        ),
    ]
}

fn throughput(p: &Profile) -> Vec<Rule> {
    let has_f32 = p.peak_flops.contains_key(&Precision::F32);
    let peaks = p.peak_flops.values().all(|v| positive(*v));
    let energies = p.pj_per_flop.values().all(|v| positive(*v));
    let fraction_of = |key, value: f64| rule(key, fraction(value), "above 0, at most 1", &value);
    vec![
        rule(
            "peak_flops",
            has_f32,
            "a peak for `f32` at least",
            &p.peak_flops,
        ),
        rule("peak_flops", peaks, "FLOP/s, more than zero", &p.peak_flops),
        rule(
            "pj_per_flop",
            energies,
            "picojoules, more than zero",
            &p.pj_per_flop,
        ),
        rule(
            "bandwidth",
            positive(p.bandwidth),
            "bytes per second, more than zero",
            &p.bandwidth,
        ),
        fraction_of("achievable_flops", p.achievable_flops),
        fraction_of("achievable_bandwidth", p.achievable_bandwidth),
    ]
}

fn memory(p: &Profile) -> Vec<Rule> {
    let valid = |level: &CacheLevel| {
        level.bytes.0 > 0
            && level.pj_per_byte.is_none_or(non_negative)
            && level.bandwidth.is_none_or(positive)
    };
    let growing = p
        .caches
        .windows(2)
        .all(|pair| pair[0].bytes <= pair[1].bytes);
    vec![
        rule(
            "caches",
            p.caches.iter().all(valid) && growing,
            "from the inside out, none smaller than the one before",
            &p.caches,
        ),
        rule(
            "dram_pj_per_byte",
            p.dram_pj_per_byte.is_none_or(non_negative),
            "picojoules, zero or more",
            &p.dram_pj_per_byte,
        ),
    ]
}

fn factors(p: &Profile) -> Vec<Rule> {
    let host = p.host_share.is_none_or(|share| (0.0..1.0).contains(&share));
    let embodied = p.embodied.map(|grams| grams.0 / 1000.0);
    vec![
        rule(
            "measured_over_counted",
            p.measured_over_counted.is_none_or(is_factor),
            FACTOR_RULE,
            &p.measured_over_counted,
        ),
        rule(
            "host_share",
            host,
            "the part of the machine's power that is not the device's, from 0 to below 1",
            &p.host_share,
        ),
        rule(
            "highest_mhz",
            p.highest_mhz.is_none_or(positive),
            "megahertz, more than zero",
            &p.highest_mhz,
        ),
        rule(
            "embodied_kgco2e",
            embodied.is_none_or(non_negative),
            "kilograms, zero or more",
            &embodied,
        ),
    ]
}

/// "`key` in line 3"; without the line if the key is not in the text.
fn place(key: &str, text: Option<&str>) -> String {
    let line = text.and_then(|text| text.lines().position(|line| sets_key(line, key)));
    match line {
        Some(index) => format!("`{key}` in line {}", index + 1),
        None => format!("`{key}`"),
    }
}

/// Whether a line of TOML sets `key` or opens its table.
fn sets_key(line: &str, key: &str) -> bool {
    let rest = line.trim_start_matches(['[', ' ', '\t']).strip_prefix(key);
    rest.is_some_and(|rest| rest.trim_start().starts_with(['=', ']', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "name = \"desk\"\nkind = \"cpu\"\ncores = 4\nidle_w = 10\nload_w = 60\nbandwidth = 3e10\n\
        peak_flops = { f32 = 2e11 }\ncaches = [{ name = \"L2\", bytes = 1000000 }]\ndram_pj_per_byte = 100\n";

    fn read(text: &str) -> Result<Profile> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("desk.toml");
        std::fs::write(&path, text).unwrap();
        Profile::from_file(&path)
    }

    #[test]
    fn a_violated_rule_is_named() {
        assert_eq!(read(VALID).unwrap().name, "desk");
        let invalid = [
            ("load_w = 60", "load_w = 5", "`load_w`"),
            ("cores = 4", "", "`cores`"),
            ("f32 = 2e11", "bf16 = 2e11", "`peak_flops`"),
            ("idle_w", "idle", "line 4"),
            ("cores = 4", "cores = 4\nhost_share = 1.0", "`host_share`"),
            (
                "cores = 4",
                "cores = 4\nmeasured_over_counted = 1e-300",
                "`measured_over_counted`",
            ),
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
        for (from, to, word) in invalid {
            let error = read(&VALID.replace(from, to)).unwrap_err();
            assert_eq!(error.kind(), Kind::Energy);
            assert!(error.to_string().contains(word), "{to}: {error}");
        }
    }

    #[test]
    fn all_violations_are_reported_with_their_lines() {
        let three = VALID
            .replace("cores = 4\n", "")
            .replace("idle_w = 10", "idle_w = -1")
            .replace("bytes = 1000000", "bytes = 0");
        let error = read(&three).unwrap_err().to_string();
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
