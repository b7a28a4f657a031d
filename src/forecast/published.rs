//! Table of published training runs, and the fraction of a device's peak FLOP/s (MFU) that they reached.
//!
//! Owns `published_runs.csv`, made by `scripts/published_runs.py`, and the lookup by name. A row that contradicts its own
//! source is refused by name.

use std::sync::LazyLock;

use serde::{Deserialize, Deserializer, Serialize};

use super::accelerator::Accelerator;
use crate::energy::Interval;
use crate::error::{Error, Kind, Result};
use crate::text::{did_you_mean, near_matches};
use crate::units::{Count, Flops, GramsCo2e, GramsPerKwh, Joules, Pue, Seconds, Watts};

/// A row of the table; `None` where the source prints nothing.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct PublishedRun {
    /// The name that lookups match.
    pub name: String,
    /// Whether this is another paper's account of a run that has its own row.
    #[serde(deserialize_with = "yes")]
    pub restated: bool,
    /// Parameters active per token (of a mixture of experts, not all).
    pub parameters: Option<Count>,
    /// Training tokens.
    pub tokens: Option<Count>,
    /// Published, else 6ND.
    pub flops: Option<Flops>,
    /// "published", "6ND" or empty.
    pub flops_basis: String,
    /// The device as printed.
    pub hardware: String,
    /// The device's name in [`Accelerator::named`]; empty if unknown.
    pub device: String,
    /// Number of devices.
    pub count: Option<u64>,
    /// Total over all devices.
    #[serde(rename = "device_hours", deserialize_with = "hours")]
    pub device_time: Option<Seconds>,
    /// FLOP/s of one device, averaged over the run.
    #[serde(rename = "achieved_tflops", deserialize_with = "tera")]
    pub achieved: Option<f64>,
    /// Power of one device.
    pub power_w: Option<Watts>,
    /// "measured", "rated" or empty.
    pub power_is: String,
    /// The facility's overhead.
    #[serde(deserialize_with = "pue")]
    pub pue: Option<Pue>,
    /// Grid intensity the source used.
    pub gco2e_per_kwh: Option<GramsPerKwh>,
    /// Energy, with or without overhead as `energy_has_pue` says.
    #[serde(rename = "energy_mwh", deserialize_with = "mwh")]
    pub energy: Option<Joules>,
    /// Whether `energy` contains the overhead; `None` where the source does not say.
    #[serde(deserialize_with = "yes_or_no")]
    pub energy_has_pue: Option<bool>,
    /// Greenhouse gas, with or without overhead as `tco2e_has_pue` says.
    #[serde(rename = "tco2e", deserialize_with = "tonnes")]
    pub carbon: Option<GramsCo2e>,
    /// Whether `carbon` contains the overhead; `None` where the source does not say.
    #[serde(deserialize_with = "yes_or_no")]
    pub tco2e_has_pue: Option<bool>,
    /// Why the row is refused; empty if it is not.
    pub inconsistent: String,
    /// A caveat for readers.
    pub remark: String,
    /// Paper, report or model card.
    pub source: String,
}

/// All published runs.
pub fn published_runs() -> &'static [PublishedRun] {
    &RUNS
}

fn scaled<'de, D: Deserializer<'de>, T>(
    d: D,
    f: impl Fn(f64) -> T,
) -> std::result::Result<Option<T>, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.map(f))
}

fn hours<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<Seconds>, D::Error> {
    scaled(d, |hours| Seconds(hours * 3600.0))
}

fn tera<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<f64>, D::Error> {
    scaled(d, |tflops| tflops * 1e12)
}

fn mwh<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<Joules>, D::Error> {
    scaled(d, |mwh| Joules(mwh * 3.6e9))
}

fn tonnes<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<GramsCo2e>, D::Error> {
    scaled(d, |tonnes| GramsCo2e(tonnes * 1e6))
}

fn pue<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<Pue>, D::Error> {
    scaled(d, Pue::new).map(Option::flatten)
}

fn yes_or_no<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<bool>, D::Error> {
    match String::deserialize(d)?.as_str() {
        "" => Ok(None),
        "yes" => Ok(Some(true)),
        "no" => Ok(Some(false)),
        other => Err(serde::de::Error::custom(format!(
            "`{other}` is neither yes nor no"
        ))),
    }
}

fn yes<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<bool, D::Error> {
    yes_or_no(d).map(|answer| answer == Some(true))
}

static RUNS: LazyLock<Vec<PublishedRun>> = LazyLock::new(|| {
    let mut reader = csv::Reader::from_reader(include_bytes!("published_runs.csv").as_slice());
    reader
        .deserialize()
        .map(|row| row.expect("the shipped table is valid: a test reads it"))
        .collect()
});

/// Letters and digits in lower case: "GPT-3 175B" and "gpt3_175b" are one name.
fn normalized(name: &str) -> String {
    name.chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

impl PublishedRun {
    /// Every row, refused ones included.
    pub fn all() -> &'static [PublishedRun] {
        &RUNS
    }

    /// A run by its name or a unique prefix. Case, spaces and hyphens are ignored.
    ///
    /// ```
    /// use wattune::forecast::PublishedRun;
    /// assert_eq!(PublishedRun::find("gpt-3").unwrap().name, "GPT-3 175B");
    /// assert!(PublishedRun::find("Llama-3.3-70B").is_err()); // its card contradicts itself
    /// ```
    pub fn find(name: &str) -> Result<&'static PublishedRun> {
        let wanted = normalized(name);
        let same = RUNS.iter().find(|run| normalized(&run.name) == wanted);
        let run = match same {
            Some(run) => run,
            None => find_by_prefix(name, &wanted)?,
        };
        if run.inconsistent.is_empty() {
            return Ok(run);
        }
        let error = Error::new(
            Kind::Energy,
            format!(
                "the published figures of {} contradict each other",
                run.name
            ),
        );
        Err(error
            .at(run.source.clone())
            .value(run.inconsistent.clone())
            .rule("a published run is used where its figures agree with each other")
            .hint("give what you trust yourself: `wattune baseline --hours DEVICE_HOURS --device NAME --pue P --grid G`"))
    }

    /// MFU: the fraction of its device's peak FLOP/s that the run reached over all its hours.
    pub fn fraction(&self) -> Option<f64> {
        let peak = Accelerator::named(&self.device).ok()?.peak_flops;
        let over_hours = || Some(self.flops?.0 / self.device_time?.0);
        Some(self.achieved.or_else(over_hours)? / peak)
    }
}

fn find_by_prefix(name: &str, wanted: &str) -> Result<&'static PublishedRun> {
    let begins =
        |run: &&PublishedRun| !wanted.is_empty() && normalized(&run.name).starts_with(wanted);
    let all: Vec<&PublishedRun> = RUNS.iter().filter(begins).collect();
    let own: Vec<&PublishedRun> = all.iter().copied().filter(|run| !run.restated).collect();
    if let [run] = own[..] {
        return Ok(run);
    }
    let names: Vec<&str> = if all.is_empty() {
        near_matches(name, RUNS.iter().map(|run| run.name.as_str()))
    } else {
        all.iter().map(|run| run.name.as_str()).collect()
    };
    let what = if all.is_empty() {
        "no published training run of this name is known"
    } else {
        "several published training runs begin so"
    };
    let otherwise = "for another model give `--params N --tokens D --device NAME`";
    Err(Error::new(Kind::Energy, what)
        .value(name)
        .hint(did_you_mean(&names, otherwise)))
}

/// The MFU that training reaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Achieved {
    /// Least, median and most of the published runs.
    pub fraction: Interval<f64>,
    /// Which runs.
    pub basis: String,
}

/// Runs that a device family needs for its own median.
const MIN_FOR_MEDIAN: usize = 3;
/// Runs that it needs for its own range: one more run lies within the range of n with probability (n-1)/(n+1), here 80 %.
const MIN_FOR_RANGE: usize = 9;

/// The MFU of training on `device`: median and range of the published runs on its family, or of all runs if the family has
/// too few; at most the fraction that tuned GEMM reaches. `except` excludes a run from its own estimate.
pub fn achieved(device: &Accelerator, except: Option<&str>) -> Achieved {
    let own = sorted_mfus(Some(device.family()), except);
    let all = sorted_mfus(None, except);
    let central = if own.len() >= MIN_FOR_MEDIAN {
        &own
    } else {
        &all
    };
    let ends = if own.len() >= MIN_FOR_RANGE {
        &own
    } else {
        &all
    };
    let median = (central[(central.len() - 1) / 2] + central[central.len() / 2]) / 2.0;
    let fraction = Interval {
        low: ends[0],
        central: median,
        high: ends[ends.len() - 1],
    };
    let whose = |runs: &[f64]| {
        format!(
            "{} published runs on {}",
            runs.len(),
            if runs == own {
                device.family()
            } else {
                "all devices"
            }
        )
    };
    let basis = format!("median of {}, ends of {}", whose(central), whose(ends));
    Achieved {
        fraction: fraction.map(|share| share.min(device.achievable)),
        basis,
    }
}

/// MFUs in ascending order, of the runs on a family of devices or of all.
fn sorted_mfus(family: Option<&str>, except: Option<&str>) -> Vec<f64> {
    let of_family = |run: &PublishedRun| {
        let rest = |family| run.device.strip_prefix(family);
        family.is_none_or(|family| {
            rest(family).is_some_and(|rest: &str| rest.is_empty() || rest.starts_with('-'))
        })
    };
    let usable = |run: &&PublishedRun| {
        run.inconsistent.is_empty() && Some(run.name.as_str()) != except && of_family(run)
    };
    let mut shares: Vec<f64> = RUNS
        .iter()
        .filter(usable)
        .filter_map(PublishedRun::fraction)
        .collect();
    shares.sort_by(f64::total_cmp);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_by_its_name_or_its_beginning() {
        for name in ["GPT-3 175B", "gpt-3", "gpt3", "GPT 3 175b"] {
            assert_eq!(
                PublishedRun::find(name).unwrap().carbon,
                Some(GramsCo2e(552.1e6)),
                "{name}"
            );
        }
        assert!(
            PublishedRun::find("GPT-3 175B (as restated)")
                .unwrap()
                .restated
        );
        // The name itself holds before longer ones that begin so.
        assert_eq!(
            PublishedRun::find("llama-3.2-1b").unwrap().name,
            "Llama-3.2-1B"
        );
        let several = PublishedRun::find("llama-3.1").unwrap_err().to_string();
        assert!(
            several.contains("`Llama-3.1-405B`") && several.contains("`Llama-3.1-8B`"),
            "{several}"
        );
        assert!(
            PublishedRun::find("GTP-3")
                .unwrap_err()
                .remedy()
                .unwrap()
                .contains("GPT-3 175B")
        );
        for bad in ["", "zzz", "-"] {
            assert_eq!(
                PublishedRun::find(bad).unwrap_err().kind(),
                Kind::Energy,
                "{bad}"
            );
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_the_reason() {
        let llama = PublishedRun::find("Llama-3.3-70B").unwrap_err().to_string();
        assert!(llama.contains("12.9") && llama.contains("2,040"), "{llama}");
        let opt = PublishedRun::find("OPT-175B (as restated)")
            .unwrap_err()
            .to_string();
        assert!(opt.contains("74.8"), "{opt}");
        assert_eq!(
            PublishedRun::all()
                .iter()
                .filter(|run| !run.inconsistent.is_empty())
                .count(),
            2
        );
    }

    /// The first rule that a row breaks.
    fn broken_rule(run: &PublishedRun) -> Option<&'static str> {
        let basis = run.flops_basis.as_str();
        let power = ["measured", "rated"].contains(&run.power_is.as_str());
        let is_share = |share: f64| (0.02..0.6).contains(&share);
        let as_counted = match (run.parameters, run.tokens, run.flops) {
            (Some(n), Some(d), Some(flops)) if basis == "6ND" => {
                let counted = crate::energy::baseline::training_flops(n.0, d.0, None);
                (counted / flops - 1.0).abs() < 1e-4
            }
            _ => true,
        };
        let rules = [
            (
                run.device.is_empty() || Accelerator::named(&run.device).is_ok(),
                "the device is known",
            ),
            (
                ["published", "6ND", ""].contains(&basis),
                "the basis of FLOPs is known",
            ),
            (!run.source.is_empty(), "there is a source"),
            (
                run.flops.is_some() != basis.is_empty(),
                "FLOPs have a basis",
            ),
            (run.power_w.is_some() == power, "power has a basis"),
            (run.fraction().is_none_or(is_share), "the share is likely"),
            (as_counted, "6ND is 6ND"),
        ];
        rules
            .into_iter()
            .find(|(holds, _)| !holds)
            .map(|(_, rule)| rule)
    }

    #[test]
    fn every_row_is_sound() {
        let mut names = std::collections::BTreeSet::new();
        for run in RUNS.iter() {
            assert_eq!(broken_rule(run), None, "{}", run.name);
            assert!(names.insert(normalized(&run.name)), "{} twice", run.name);
        }
    }

    #[test]
    fn the_share_of_the_peak_is_that_of_published_runs() {
        // TPU v3, TFLOP/s of Patterson et al. 2021 over 123: 45.6, 42.3, 48.0, 34.4; Gopher 5.04e23 / (3768320 h x 3600) = 37.15.
        // The median is 42.3 / 123. Five are too few for ends: all runs', from Llama 3.1 8B to the search on TPU v2 (24.8 of 46).
        let tpu = achieved(&Accelerator::named("tpu-v3").unwrap(), None);
        assert_eq!(
            (tpu.fraction.central, tpu.fraction.high),
            (42.3e12 / 123e12, 24.8e12 / 46e12)
        );
        assert!((tpu.fraction.low / (7.2e23 / (1.46e6 * 3600.0) / 989.4e12) - 1.0).abs() < 1e-9);
        assert!(
            tpu.basis.contains("5 published runs on tpu-v3"),
            "{}",
            tpu.basis
        );
        // The A100 has ends of its own: Pythia 70M, 1.26723e20 / (510 h x 3600) = 69.02 TFLOP/s, and LLaMA-13B,
        // 7.8e22 / (135168 h x 3600) = 160.30, of 312.
        let a100 = achieved(&Accelerator::named("nvidia-a100-sxm4-80gb").unwrap(), None).fraction;
        assert!(
            (a100.low * 312.0 - 69.02).abs() < 0.01 && (a100.high * 312.0 - 160.30).abs() < 0.01,
            "{a100:?}"
        );
        // Without Meena: the mean of 37.15 and 45.6.
        let without = achieved(&Accelerator::named("tpu-v3").unwrap(), Some("Meena"))
            .fraction
            .central;
        assert!((without * 123.0 - 41.376).abs() < 0.01, "{without}");
        // A device without three runs takes all of them.
        assert!(
            achieved(&Accelerator::named("nvidia-v100-sxm2").unwrap(), None)
                .basis
                .starts_with("median of 37 published runs on all")
        );
    }
}
