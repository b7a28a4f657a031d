//! Baselines: the energy of other ways to train the same model.
//!
//! Holds the 6ND formula, the table of published token counts (`pretraining_tokens.csv`) and the
//! comparison itself. Takes parameters, tokens and a profile, returns a labelled [`Baseline`] with
//! its source and every assumption.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::budget::Rates;
use super::carbon::carbon;
use super::charge::EnergyBreakdown;
use super::interval::{MODEL_FACTOR, ratio_bounds};
use super::profile::Profile;
use super::profile_file::large_product;
use crate::units::{Bytes, Flops, GramsCo2e, Joules, significant};
use crate::work::Precision;

/// What a run is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaselineKind {
    /// Training every weight on the same data.
    FullFineTuning,
    /// Training the same architecture from random weights on the same data.
    FromScratchSameTask,
    /// Training the base model from random weights on all its tokens.
    Pretraining,
}

/// Method by which a figure was obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// Run and metered.
    Measured,
    /// Counted from its work.
    Counted,
    /// From a published number.
    Published,
    /// From a rule of thumb.
    Assumed,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Baseline {
    /// Kind of training.
    pub kind: BaselineKind,
    /// Method of its figures.
    pub label: Label,
    /// FLOPs of matrix products and attention.
    pub flops: Flops,
    /// Energy on the run's device, without the facility's overhead.
    #[serde(rename = "energy_j")]
    pub energy: Joules,
    /// Emissions at the run's rates.
    pub gco2e: GramsCo2e,
    /// Composition of a counted energy.
    #[serde(skip)]
    pub breakdown: Option<EnergyBreakdown>,
    /// Factor that converted its counted energy to the run's meter.
    pub metered_over_counted: Option<f64>,
    /// Its energy over the run's; `None` before `compared_to`.
    pub ratio: Option<f64>,
    /// Lower and upper bound of `ratio`.
    pub ratio_bounds: Option<[f64; 2]>,
    /// Source of its size.
    pub source: String,
    /// Everything assumed.
    pub assumptions: Vec<String>,
}

impl Baseline {
    /// A baseline of counted work or measured energy.
    pub fn new(
        kind: BaselineKind,
        label: Label,
        flops: Flops,
        energy: Joules,
        rates: &Rates,
        source: &str,
    ) -> Baseline {
        Baseline {
            kind,
            label,
            flops,
            energy,
            gco2e: carbon(energy, rates.pue, rates.grid),
            breakdown: None,
            metered_over_counted: None,
            ratio: None,
            ratio_bounds: None,
            source: source.to_string(),
            assumptions: Vec::new(),
        }
    }

    /// Converts the counted energy to the meter of a run, by `factor`: energy of the run on that
    /// meter over its counted energy. Without it the ratio to a metered run would include the error
    /// of the profile.
    pub fn on_meter(mut self, factor: f64) -> Baseline {
        self.energy = self.energy * factor;
        self.gco2e = self.gco2e * factor;
        self.metered_over_counted = Some(factor);
        self.assumptions.push(format!(
            "counted energy times {}, the run's metered over counted energy",
            significant(factor)
        ));
        self
    }

    /// Sets the ratio to a run of `energy`; none to a run of zero energy. With the `breakdown` of
    /// the run's counted energy the errors they share cancel (see [`ratio_bounds`]); a run without
    /// one is taken as exact.
    pub fn compared_to(mut self, energy: Joules, breakdown: Option<&EnergyBreakdown>) -> Baseline {
        if energy.0 > 0.0 {
            let ratio = self.energy / energy;
            self.ratio = Some(ratio);
            self.ratio_bounds = match (breakdown, &self.breakdown) {
                (_, None) => None,
                (Some(run), Some(own)) => {
                    ratio_bounds(run, own).map(|bounds| bounds.map(|bound| bound * ratio))
                }
                (None, Some(_)) => Some([ratio / MODEL_FACTOR, ratio * MODEL_FACTOR]),
            };
        }
        self
    }
}

/// The dimensions that the FLOPs of attention depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Decoder layers.
    pub layers: u64,
    /// Query heads times head dimension.
    pub attention_size: u64,
    /// Tokens in a training sequence.
    pub sequence: u64,
}

/// FLOPs of training `params` weights on `tokens` tokens: 6ND (Kaplan et al. 2020, section 2.1: 2N
/// forward, 4N backward), and with a shape attention's 12 L H Q T for each token, the full square
/// (Chowdhery et al. 2022, appendix B).
///
/// ```
/// use wattune::energy::baseline::training_flops;
/// assert_eq!(training_flops(175e9, 300e9, None).0, 3.15e23); // GPT-3: 3.14e23 published
/// ```
pub fn training_flops(params: f64, tokens: f64, shape: Option<Shape>) -> Flops {
    let attention = shape.map_or(0.0, |s| {
        12.0 * s.layers as f64 * s.attention_size as f64 * s.sequence as f64
    });
    Flops((6.0 * params + attention) * tokens)
}

/// The energy of `flops` in large products on `profile`.
fn energy_of(profile: &Profile, flops: Flops, precision: Precision) -> (Joules, EnergyBreakdown) {
    let product = profile.charge(&large_product(precision));
    let count = flops.0 / product.flops as f64;
    let one = product.breakdown;
    let breakdown = EnergyBreakdown {
        arithmetic_j: one.arithmetic_j * count,
        movement_j: one.movement_j * count,
        idle_j: one.idle_j * count,
        unreused_bytes: Bytes((one.unreused_bytes.0 as f64 * count) as u64),
    };
    (product.energy.joules() * count, breakdown)
}

/// Training tokens of a family of models.
#[derive(Debug, Deserialize)]
struct PublishedTokens {
    /// Prefix of the hub id, in lower case.
    prefix: String,
    tokens: f64,
    source: String,
    /// Read in the source itself, not recalled.
    verified: bool,
}

static PUBLISHED: LazyLock<Vec<PublishedTokens>> = LazyLock::new(|| {
    csv::Reader::from_reader(include_str!("pretraining_tokens.csv").as_bytes())
        .deserialize()
        .map(|row| row.expect("the shipped table is valid: a test reads it"))
        .collect()
});

/// The row with the longest prefix of `model_id`.
fn published_tokens(model_id: &str) -> Option<&'static PublishedTokens> {
    let id = model_id.to_lowercase();
    PUBLISHED
        .iter()
        .filter(|row| id.starts_with(&row.prefix))
        .max_by_key(|row| row.prefix.len())
}

/// A token count in words: "2 trillion tokens".
pub(crate) fn describe_tokens(tokens: f64) -> String {
    const WORDS: [(f64, &str); 3] = [(1e12, " trillion"), (1e9, " billion"), (1e6, " million")];
    let (unit, word) = WORDS
        .into_iter()
        .find(|(unit, _)| tokens >= *unit)
        .unwrap_or((1.0, ""));
    format!("{}{word} tokens", significant(tokens / unit))
}

/// A token count with its label, source and caveat.
struct TokenCount {
    tokens: f64,
    label: Label,
    source: String,
    caveat: Option<&'static str>,
}

/// The published token count of `model_id`, else the given one, else 20 tokens a parameter
/// (Hoffmann et al. 2022).
fn token_count(model_id: &str, params: f64, given: Option<f64>) -> TokenCount {
    if let Some(row) = published_tokens(model_id) {
        return TokenCount {
            tokens: row.tokens,
            label: Label::Published,
            source: format!("{}: {}", describe_tokens(row.tokens), row.source),
            caveat: (!row.verified)
                .then_some("the published token count was not read again for this table"),
        };
    }
    if let Some(tokens) = given {
        return TokenCount {
            tokens,
            label: Label::Counted,
            source: format!("{}, as given", describe_tokens(tokens)),
            caveat: None,
        };
    }
    let tokens = 20.0 * params;
    TokenCount {
        tokens,
        label: Label::Assumed,
        source: format!("{}, assumed", describe_tokens(tokens)),
        caveat: Some(
            "no token count is known for this model: 20 for each parameter are assumed (Hoffmann et al. 2022)",
        ),
    }
}

/// Training the base model from random weights: 6ND for the published token count of `model_id`,
/// else for the given `tokens`, else for an assumed count. `shape` adds attention.
pub fn pretraining(
    model_id: &str,
    params: f64,
    tokens: Option<f64>,
    shape: Option<Shape>,
    profile: &Profile,
    rates: &Rates,
) -> Baseline {
    let count = token_count(model_id, params, tokens);
    let flops = training_flops(params, count.tokens, shape);
    let precision = if profile.peak_flops.contains_key(&Precision::Bf16) {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let (energy, breakdown) = energy_of(profile, flops, precision);
    let formula = if shape.is_some() {
        "6ND plus attention over full sequences"
    } else {
        "6ND, attention left out"
    };
    let device = format!(
        "on {} at its achievable rate, failed and trial runs left out",
        profile.name
    );
    let mut assumptions = vec![formula.to_string(), device];
    assumptions.extend(count.caveat.map(str::to_string));
    Baseline {
        breakdown: Some(breakdown),
        assumptions,
        ..Baseline::new(
            BaselineKind::Pretraining,
            count.label,
            flops,
            energy,
            rates,
            &count.source,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GramsPerKwh, Pue};

    fn rates() -> Rates {
        Rates {
            grid: GramsPerKwh(473.0),
            pue: Pue::ONE,
            price: None,
        }
    }

    fn a100() -> Profile {
        Profile::named("nvidia-a100-sxm4-80gb").unwrap()
    }

    fn baseline(model: &str, tokens: Option<f64>) -> Baseline {
        pretraining(model, 135e6, tokens, None, &a100(), &rates())
    }

    #[test]
    fn the_shipped_token_counts_are_valid() {
        assert_eq!(PUBLISHED.len(), 40);
        assert!(
            PUBLISHED
                .iter()
                .all(|row| row.tokens > 1e11 && !row.source.is_empty())
        );
        assert!(
            PUBLISHED
                .iter()
                .all(|row| row.prefix == row.prefix.to_lowercase())
        );
    }

    #[test]
    fn a_token_count_is_published_given_or_assumed() {
        let published = baseline("HuggingFaceTB/SmolLM2-135M-Instruct", Some(1.0));
        assert_eq!(published.label, Label::Published);
        assert_eq!(published.flops, Flops(6.0 * 135e6 * 2e12));
        let source = &published.source;
        assert!(source.starts_with("2 trillion tokens: "), "{source}");
        let given = baseline("my/model", Some(1e9));
        assert_eq!(given.flops, Flops(6.0 * 135e6 * 1e9));
        let source = baseline("my/model", Some(6.0231e6)).source;
        assert_eq!(source, "6.023 million tokens, as given");
        let assumed = baseline("my/model", None);
        assert_eq!(assumed.label, Label::Assumed);
        assert_eq!(assumed.flops, Flops(6.0 * 135e6 * 20.0 * 135e6));
        assert!(assumed.assumptions.iter().any(|text| text.contains("20")));
        // The longest prefix applies: Llama 3.1 is not Llama 3; a copy under another owner has no
        // row.
        assert!(
            baseline("meta-llama/Llama-3.2-1B", None)
                .source
                .contains("3.2")
        );
        assert_eq!(baseline("someone/SmolLM2-135M", None).label, Label::Assumed);
    }

    #[test]
    fn published_training_flops_are_reproduced() {
        // Llama 3.1 405B: 3.8e25 FLOPs for 15.6e12 tokens (arXiv:2407.21783, section 3.2).
        assert!((training_flops(405e9, 15.6e12, None).0 / 3.8e25 - 1.0).abs() < 0.01);
        // PaLM 540B, 118 layers, 48 heads of 256, sequences of 2048, 780e9 tokens: 2.5272e24
        // published for all of it (arXiv:2204.02311, table 21: 6ND, to which attention adds 12 *
        // 118 * 12288 * 2048 = 3.56e10 a token over 6N = 3.24e12, 1.1 %).
        let shape = Shape {
            layers: 118,
            attention_size: 12_288,
            sequence: 2048,
        };
        let flops = |shape| training_flops(540.35e9, 780e9, shape).0;
        let with_attention = flops(Some(shape)) / flops(None);
        assert!((with_attention - 1.011).abs() < 0.0005, "{with_attention}");
    }

    #[test]
    fn energy_follows_the_device() {
        // An A100 at 400 W and 0.869 of 312 TFLOPS: 1.475 pJ a FLOP, so 1e15 FLOPs are 1475 J.
        let (energy, parts) = energy_of(&a100(), Flops(1e15), Precision::Bf16);
        assert!((energy.0 - 1475.3).abs() < 1.0, "{energy}");
        let sum = parts.arithmetic_j + parts.movement_j + parts.idle_j;
        assert!((sum / energy - 1.0).abs() < 1e-6, "{sum}");
    }

    #[test]
    fn ratio_bounds_depend_on_what_is_known_of_the_run() {
        let kind = BaselineKind::FullFineTuning;
        let flops = Flops(1e15);
        let measured = Baseline::new(
            kind,
            Label::Counted,
            flops,
            Joules(300.0),
            &rates(),
            "counted",
        );
        assert_eq!(
            measured
                .clone()
                .compared_to(Joules(100.0), None)
                .ratio_bounds,
            None
        );
        let (_, parts) = energy_of(&a100(), flops, Precision::Bf16);
        let baseline = Baseline {
            breakdown: Some(parts),
            ..measured
        };
        // Against a measured run: 3, and 3 times or over 1.37.
        let exact = baseline.clone().compared_to(Joules(100.0), None);
        assert_eq!(exact.ratio, Some(3.0));
        assert_eq!(exact.ratio_bounds, Some([3.0 / 1.37, 3.0 * 1.37]));
        // Against a counted run of the same mix the error is shared.
        let counted = baseline.clone().compared_to(Joules(100.0), Some(&parts));
        let [low, high] = counted.ratio_bounds.unwrap();
        assert!((low - 3.0).abs() < 1e-12 && (high - 3.0).abs() < 1e-12);
        // On the meter of a run that showed twice its counted energy: twice the energy and
        // emissions, the same ratio.
        let metered = baseline
            .clone()
            .on_meter(2.0)
            .compared_to(Joules(200.0), Some(&parts));
        assert_eq!(
            (metered.energy, metered.gco2e),
            (Joules(600.0), baseline.gco2e * 2.0)
        );
        assert_eq!(
            (metered.ratio, metered.metered_over_counted),
            (Some(3.0), Some(2.0))
        );
        assert!(metered.assumptions[0].contains("times 2,"), "{metered:?}");
        assert_eq!(baseline.compared_to(Joules(0.0), None).ratio, None);
    }
}
