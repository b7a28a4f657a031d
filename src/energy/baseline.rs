//! Baselines: what other ways to the same model would have cost.
//!
//! Owns the 6ND formula, the table of published token counts, and the form of a comparison. Takes parameters, tokens and a
//! profile, returns a labelled `Baseline` that names its source and every assumption. Knows nothing of the run it is held against
//! but its joules.

use serde::{Deserialize, Serialize};

use super::budget::Rates;
use super::carbon::carbon;
use super::entry::Parts;
use super::interval::MODEL_FACTOR;
use super::profile::Profile;
use super::ratio;
use crate::units::{Bytes, Flops, GramsCo2e, Joules, significant};
use crate::work::{Precision, Work};

/// What a run is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaselineKind {
    /// The same data, every weight trained.
    FullFineTuning,
    /// The same architecture with random weights, on the same data.
    FromScratchSameTask,
    /// Training the base model, from nothing, on all its tokens.
    Pretraining,
}

/// How a figure was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// Run, and metered.
    Measured,
    /// Counted from the work it would be.
    Counted,
    /// From a published number.
    Published,
    /// From a rule of thumb.
    Assumed,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Baseline {
    /// With what.
    pub kind: BaselineKind,
    /// How sure.
    pub label: Label,
    /// Its FLOPs.
    pub flops: Flops,
    /// Its energy on the same device as the run's, without the facility's overhead.
    #[serde(rename = "energy_j")]
    pub energy: Joules,
    /// Its greenhouse gas at the same rates as the run's.
    pub gco2e: GramsCo2e,
    /// What that energy is made of, where it was counted.
    #[serde(skip)]
    pub parts: Option<Parts>,
    /// What its counted energy was multiplied with to stand beside a run on another meter.
    pub metered_over_counted: Option<f64>,
    /// Its energy over the run's; `None` until held against one.
    pub ratio: Option<f64>,
    /// The least and the most that ratio may be.
    pub ratio_bounds: Option<[f64; 2]>,
    /// Where its size comes from.
    pub source: String,
    /// Everything taken for granted.
    pub assumptions: Vec<String>,
}

impl Baseline {
    /// A baseline whose work was counted, or whose energy was measured.
    pub fn known(
        kind: BaselineKind,
        label: Label,
        flops: Flops,
        energy: Joules,
        rates: &Rates,
        source: &str,
    ) -> Baseline {
        let gco2e = carbon(energy, rates.pue, rates.grid);
        let source = source.to_string();
        let (parts, metered_over_counted, ratio, ratio_bounds, assumptions) =
            (None, None, None, None, Vec::new());
        Baseline {
            kind,
            label,
            flops,
            energy,
            gco2e,
            parts,
            metered_over_counted,
            ratio,
            ratio_bounds,
            source,
            assumptions,
        }
    }

    /// The same as the meter of a run would show it that showed `factor` times the run's counted energy. Held against the run without it, a
    /// baseline would be as much too cheap or too dear as the profile is wrong.
    pub fn metered(mut self, factor: f64) -> Baseline {
        (self.energy, self.gco2e) = (self.energy * factor, self.gco2e * factor);
        self.metered_over_counted = Some(factor);
        let said =
            "its counted energy times {}, what this run's meter showed over what was counted of it";
        self.assumptions
            .push(said.replace("{}", &significant(factor)));
        self
    }

    /// The same, held against a run of `energy`; no ratio to a run that spent nothing. With the `parts` of what was counted of the run the
    /// error of the coefficients is shared (see [`ratio`]); a run without them is taken as exact, and the baseline is not.
    pub fn against(mut self, energy: Joules, parts: Option<&Parts>) -> Baseline {
        if energy.0 > 0.0 {
            let central = self.energy / energy;
            self.ratio = Some(central);
            self.ratio_bounds = match (parts, &self.parts) {
                (_, None) => None,
                (Some(own), Some(other)) => {
                    ratio::bounds(own, other).map(|bounds| bounds.map(|bound| bound * central))
                }
                (None, Some(_)) => Some([central / MODEL_FACTOR, central * MODEL_FACTOR]),
            };
        }
        self
    }
}

/// The shape that attention's own FLOPs need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Decoder layers.
    pub layers: u64,
    /// Query heads times their dimension.
    pub attention_size: u64,
    /// Tokens in one training sequence.
    pub sequence: u64,
}

/// FLOPs of training `params` weights on `tokens` tokens: 6ND (Kaplan et al. 2020, section 2.1: 2N forward, 4N backward), and with
/// a shape attention's 12 L H Q T for each token, the full square (Chowdhery et al. 2022, appendix B).
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

/// The energy of `flops` in large products on `profile`, and what it is made of: what the 4096-cube product costs, scaled.
fn energy_of(profile: &Profile, flops: Flops, precision: Precision) -> (Joules, Parts) {
    let product = profile.charge(&Work::product(4096, 4096, 4096, precision));
    let times = flops.0 / product.flops as f64;
    let parts = Parts {
        arithmetic_j: product.arithmetic * times,
        movement_j: product.movement * times,
        idle_j: product.idle * times,
        unreused_bytes: Bytes((product.unreused.0 as f64 * times) as u64),
    };
    (product.energy.joules() * times, parts)
}

/// How many tokens a family of models saw.
struct Tokens {
    /// Start of the hub id, in lower case; the longest that fits holds.
    prefix: &'static str,
    tokens: f64,
    source: &'static str,
    /// Read in the source itself, not recalled.
    verified: bool,
}

const fn row(prefix: &'static str, tokens: f64, source: &'static str, verified: bool) -> Tokens {
    Tokens {
        prefix,
        tokens,
        source,
        verified,
    }
}

const PUBLISHED: [Tokens; 40] = [
    row(
        "huggingfacetb/smollm2-135m",
        2e12,
        "SmolLM2 model card",
        true,
    ),
    row(
        "huggingfacetb/smollm2-360m",
        4e12,
        "SmolLM2 model card",
        true,
    ),
    row(
        "huggingfacetb/smollm2-1.7b",
        11e12,
        "SmolLM2 (arXiv:2502.02737)",
        true,
    ),
    row(
        "huggingfacetb/smollm-135m",
        600e9,
        "SmolLM model card",
        false,
    ),
    row(
        "huggingfacetb/smollm-360m",
        600e9,
        "SmolLM model card",
        false,
    ),
    row(
        "huggingfacetb/smollm-1.7b",
        1e12,
        "SmolLM model card",
        false,
    ),
    row(
        "huggingfacetb/smollm3-3b",
        11.2e12,
        "SmolLM3 model card",
        true,
    ),
    row(
        "tinyllama/tinyllama-1.1b-chat-v1.0",
        3e12,
        "TinyLlama README (arXiv:2401.02385)",
        true,
    ),
    row(
        "tinyllama/tinyllama-1.1b-intermediate-step-1431k-3t",
        3e12,
        "TinyLlama README (arXiv:2401.02385)",
        true,
    ),
    row(
        "meta-llama/llama-2",
        2e12,
        "Llama 2 model card (arXiv:2307.09288)",
        true,
    ),
    row(
        "meta-llama/meta-llama-3-",
        15e12,
        "Llama 3 model card",
        true,
    ),
    row(
        "meta-llama/llama-3.1",
        15e12,
        "Llama 3.1 model card (\"15T+\")",
        true,
    ),
    row(
        "meta-llama/meta-llama-3.1",
        15e12,
        "Llama 3.1 model card (\"15T+\")",
        true,
    ),
    row(
        "meta-llama/llama-3.2",
        9e12,
        "Llama 3.2 model card (\"up to 9T\", pruned and distilled)",
        true,
    ),
    row(
        "meta-llama/llama-3.3",
        15e12,
        "Llama 3.3 model card (\"15T+\")",
        true,
    ),
    row(
        "huggyllama/llama-7b",
        1e12,
        "LLaMA (arXiv:2302.13971)",
        true,
    ),
    row(
        "huggyllama/llama-13b",
        1e12,
        "LLaMA (arXiv:2302.13971)",
        true,
    ),
    row(
        "huggyllama/llama-30b",
        1.4e12,
        "LLaMA (arXiv:2302.13971)",
        true,
    ),
    row(
        "huggyllama/llama-65b",
        1.4e12,
        "LLaMA (arXiv:2302.13971)",
        true,
    ),
    row(
        "qwen/qwen2.5",
        18e12,
        "Qwen2.5 report (arXiv:2412.15115)",
        true,
    ),
    row(
        "qwen/qwen2-0.5b",
        12e12,
        "Qwen2 report (arXiv:2407.10671)",
        false,
    ),
    row(
        "qwen/qwen2-",
        7e12,
        "Qwen2 report (arXiv:2407.10671)",
        false,
    ),
    row(
        "qwen/qwen3-",
        36e12,
        "Qwen3 report (arXiv:2505.09388)",
        false,
    ),
    row(
        "eleutherai/pythia",
        299_892_736_000.0,
        "Pythia README (arXiv:2304.01373)",
        true,
    ),
    row("eleutherai/gpt-j-6b", 402e9, "GPT-J model card", false),
    row(
        "eleutherai/gpt-neo-125m",
        300e9,
        "GPT-Neo model card",
        false,
    ),
    row(
        "eleutherai/gpt-neo-1.3b",
        380e9,
        "GPT-Neo model card",
        false,
    ),
    row(
        "eleutherai/gpt-neo-2.7b",
        420e9,
        "GPT-Neo model card",
        false,
    ),
    row(
        "allenai/olmo-2-1124-7b",
        4.05e12,
        "OLMo 2 (6ND of its published FLOPs)",
        true,
    ),
    row(
        "allenai/olmo-2-1124-13b",
        5.6e12,
        "OLMo 2 (6ND of its published FLOPs)",
        true,
    ),
    row("mosaicml/mpt-7b", 1e12, "MPT-7B announcement", true),
    row("google/gemma-2b", 3e12, "Gemma (arXiv:2403.08295)", true),
    row("google/gemma-7b", 6e12, "Gemma (arXiv:2403.08295)", true),
    row(
        "google/gemma-2-2b",
        2e12,
        "Gemma 2 (arXiv:2408.00118)",
        false,
    ),
    row(
        "google/gemma-2-9b",
        8e12,
        "Gemma 2 (arXiv:2408.00118)",
        false,
    ),
    row(
        "google/gemma-2-27b",
        13e12,
        "Gemma 2 (arXiv:2408.00118)",
        false,
    ),
    row(
        "bigscience/bloom",
        366e9,
        "BLOOM 176B (arXiv:2211.05100), taken for the whole family",
        false,
    ),
    row("facebook/opt-", 180e9, "OPT (arXiv:2205.01068)", false),
    row("tiiuae/falcon-7b", 1.5e12, "Falcon-7B model card", false),
    row("microsoft/phi-2", 1.4e12, "Phi-2 model card", false),
];

/// "2 trillion tokens".
pub(crate) fn worded(tokens: f64) -> String {
    const WORDS: [(f64, &str); 3] = [(1e12, " trillion"), (1e9, " billion"), (1e6, " million")];
    let (unit, word) = WORDS
        .into_iter()
        .find(|(unit, _)| tokens >= *unit)
        .unwrap_or((1.0, ""));
    format!("{}{word} tokens", significant(tokens / unit))
}

/// Training the base model from nothing: 6ND for the published token count of `model_id`, else for the `tokens` given, else for
/// 20 tokens a parameter (Hoffmann et al. 2022), which is said. `shape` adds attention.
pub fn pretraining(
    model_id: &str,
    params: f64,
    tokens: Option<f64>,
    shape: Option<Shape>,
    profile: &Profile,
    rates: &Rates,
) -> Baseline {
    let id = model_id.to_lowercase();
    let fits = PUBLISHED
        .iter()
        .filter(|known| id.starts_with(known.prefix));
    let (label, tokens, source, caveat) = match (
        fits.max_by_key(|known| known.prefix.len()),
        tokens,
    ) {
        (Some(known), _) => {
            let caveat = (!known.verified)
                .then_some("the published token count was not read again for this table");
            (
                Label::Published,
                known.tokens,
                format!("{}: {}", worded(known.tokens), known.source),
                caveat,
            )
        }
        (None, Some(tokens)) => (
            Label::Counted,
            tokens,
            format!("{}, as given", worded(tokens)),
            None,
        ),
        (None, None) => {
            let caveat = "no token count is known for this model: 20 for each parameter are assumed (Hoffmann et al. 2022)";
            (
                Label::Assumed,
                20.0 * params,
                format!("{}, assumed", worded(20.0 * params)),
                Some(caveat),
            )
        }
    };
    let flops = training_flops(params, tokens, shape);
    let precision = if profile.peak_flops.contains_key(&Precision::Bf16) {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let (energy, parts) = energy_of(profile, flops, precision);
    let mut baseline = Baseline::known(
        BaselineKind::Pretraining,
        label,
        flops,
        energy,
        rates,
        &source,
    );
    baseline.parts = Some(parts);
    let attention = if shape.is_some() {
        "6ND plus attention over full sequences"
    } else {
        "6ND, attention left out"
    };
    baseline.assumptions = vec![
        attention.to_string(),
        format!(
            "on {} at its achievable rate, failed and trial runs left out",
            profile.name
        ),
    ];
    baseline.assumptions.extend(caveat.map(str::to_string));
    baseline
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

    fn of(model: &str, tokens: Option<f64>) -> Baseline {
        pretraining(
            model,
            135e6,
            tokens,
            None,
            &Profile::named("nvidia-a100-sxm4-80gb").unwrap(),
            &rates(),
        )
    }

    #[test]
    fn a_token_count_is_published_or_given_or_assumed_and_says_so() {
        let published = of("HuggingFaceTB/SmolLM2-135M-Instruct", Some(1.0));
        assert_eq!(
            (published.label, published.flops),
            (Label::Published, Flops(6.0 * 135e6 * 2e12))
        );
        assert!(
            published.source.starts_with("2 trillion tokens: "),
            "{}",
            published.source
        );
        assert_eq!(of("my/model", Some(1e9)).flops, Flops(6.0 * 135e6 * 1e9));
        assert_eq!(
            of("my/model", Some(6.0231e6)).source,
            "6.023 million tokens, as given"
        );
        let assumed = of("my/model", None);
        assert_eq!(
            (assumed.label, assumed.flops),
            (Label::Assumed, Flops(6.0 * 135e6 * 20.0 * 135e6))
        );
        assert!(assumed.assumptions.iter().any(|text| text.contains("20")));
        // The longest prefix holds: Llama 3.1 is not Llama 3, and somebody else's copy is nobody's.
        assert!(of("meta-llama/Llama-3.2-1B", None).source.contains("3.2"));
        assert_eq!(of("someone/SmolLM2-135M", None).label, Label::Assumed);
    }

    #[test]
    fn published_flops_are_met() {
        // Llama 3.1 405B: 3.8e25 FLOPs for 15.6e12 tokens (arXiv:2407.21783, section 3.2).
        assert!((training_flops(405e9, 15.6e12, None).0 / 3.8e25 - 1.0).abs() < 0.01);
        // PaLM 540B, 118 layers, 48 heads of 256, sequences of 2048, 780e9 tokens: 2.5272e24 published for all of it (arXiv:2204.02311,
        // table 21: 6ND, to which attention adds 12 * 118 * 12288 * 2048 = 3.56e10 a token over 6N = 3.24e12, 1.1 %).
        let shape = Shape {
            layers: 118,
            attention_size: 12_288,
            sequence: 2048,
        };
        let with = training_flops(540.35e9, 780e9, Some(shape)).0
            / training_flops(540.35e9, 780e9, None).0;
        assert!((with - 1.011).abs() < 0.0005, "{with}");
    }

    #[test]
    fn energy_and_ratio_follow_the_device() {
        // An A100 at 400 W and 0.869 of 312 TFLOPS: 1.475 pJ a FLOP, so 1e15 FLOPs are 1475 J.
        let a100 = Profile::named("nvidia-a100-sxm4-80gb").unwrap();
        let (energy, parts) = energy_of(&a100, Flops(1e15), Precision::Bf16);
        assert!((energy.0 - 1475.3).abs() < 1.0, "{energy}");
        let sum = parts.arithmetic_j + parts.movement_j + parts.idle_j;
        assert!((sum / energy - 1.0).abs() < 1e-6, "{sum}");
        let mut baseline = Baseline::known(
            BaselineKind::FullFineTuning,
            Label::Counted,
            Flops(1e15),
            Joules(300.0),
            &rates(),
            "counted",
        );
        assert_eq!(
            baseline.clone().against(Joules(100.0), None).ratio_bounds,
            None
        );
        baseline.parts = Some(parts);
        // Against a measured run: 3, and 3 times or over 1.37.
        let held = baseline.clone().against(Joules(100.0), None);
        assert_eq!(
            (held.ratio, held.ratio_bounds),
            (Some(3.0), Some([3.0 / 1.37, 3.0 * 1.37]))
        );
        // Against a counted run of the same mix the error is shared.
        let [low, high] = baseline
            .clone()
            .against(Joules(100.0), Some(&parts))
            .ratio_bounds
            .unwrap();
        assert!((low - 3.0).abs() < 1e-12 && (high - 3.0).abs() < 1e-12);
        // On the meter of a run that showed twice what was counted of it: twice the energy and the gas, and no other ratio.
        let metered = baseline
            .clone()
            .metered(2.0)
            .against(Joules(200.0), Some(&parts));
        assert_eq!(
            (metered.energy, metered.gco2e, metered.ratio),
            (Joules(600.0), baseline.gco2e * 2.0, Some(3.0))
        );
        assert!(
            metered.assumptions[0].contains("times 2,")
                && metered.metered_over_counted == Some(2.0),
            "{metered:?}"
        );
        assert_eq!(baseline.against(Joules(0.0), None).ratio, None);
    }
}
