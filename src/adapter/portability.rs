//! Which runtimes load an adapter, and whether they compute the same.
//!
//! Takes a configuration and, where there is a file, the names of its tensors; returns a verdict for each runtime. [`RULES`] is the
//! only declaration. Sources: PEFT `utils/save_and_load.py`, vLLM `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and
//! `vllm/config/lora.py`, llama.cpp `convert_lora_to_gguf.py` and `src/llama-adapter.h`, mistral.rs
//! `docs/guides/customize/lora-adapters.mdx`. Knows nothing of values.

use serde::Serialize;

use super::adaptation::PREFIX;
use super::config::{InitWeights, OneOrMany, PeftConfig};
use super::keys::is_truthy;
use super::matching::is_suffix;
use super::options::Bias;
use super::unsupported::changes_the_base;
use crate::error::{Error, Kind, Result};

/// vLLM's default `max_lora_rank`.
const VLLM_DEFAULT_RANK: usize = 16;
/// The values of vLLM's `max_lora_rank` above the default.
const VLLM_RANKS: [usize; 6] = [32, 64, 128, 256, 320, 512];
/// mistral.rs's largest rank.
const MISTRALRS_MAX_RANK: usize = 256;

/// A program that reads PEFT's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Runtime {
    /// Hugging Face PEFT.
    #[serde(rename = "PEFT")]
    Peft,
    /// vLLM.
    #[serde(rename = "vLLM")]
    Vllm,
    /// llama.cpp, by `convert_lora_to_gguf.py`.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
    /// mistral.rs.
    #[serde(rename = "mistral.rs")]
    MistralRs,
}

use Runtime::{LlamaCpp, MistralRs, Peft, Vllm};

impl Runtime {
    /// Every runtime.
    pub const ALL: [Self; 4] = [Peft, Vllm, LlamaCpp, MistralRs];

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Peft => "PEFT",
            Vllm => "vLLM",
            LlamaCpp => "llama.cpp",
            MistralRs => "mistral.rs",
        }
    }
}

/// What a runtime does with an adapter, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Loads it and computes the same.
    Loads,
    /// Does so under a condition, which the reason names.
    Conditional,
    /// Loads it and computes something else, without an error.
    Differs,
    /// Refuses it.
    Refuses,
}

use Effect::{Conditional, Differs, Refuses};

impl Effect {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Loads => "loads",
            Conditional => "loads, with a condition",
            Differs => "computes differently",
            Refuses => "refuses",
        }
    }
}

/// A runtime's verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The runtime.
    pub runtime: Runtime,
    /// The worst effect of all reasons.
    pub effect: Effect,
    /// One clause each, the worst first.
    pub reasons: Vec<String>,
}

/// A property of adapters that some runtimes do not support.
struct Rule {
    runtimes: &'static [Runtime],
    effect: Effect,
    /// The reason, where it applies; names are those of the file's tensors.
    reason: fn(&PeftConfig, &[&str]) -> Option<String>,
}

const fn rule(
    runtimes: &'static [Runtime],
    effect: Effect,
    reason: fn(&PeftConfig, &[&str]) -> Option<String>,
) -> Rule {
    Rule {
        runtimes,
        effect,
        reason,
    }
}

const ALL_BUT_PEFT: &[Runtime] = &[Vllm, LlamaCpp, MistralRs];

/// All rules.
#[rustfmt::skip]
const RULES: [Rule; 27] = [
    rule(ALL_BUT_PEFT, Refuses, |config, _| other_type(config)),
    rule(ALL_BUT_PEFT, Refuses, |config, _| when(has_modules_to_save(config), "weights trained in full (`modules_to_save`)")),
    rule(ALL_BUT_PEFT, Refuses, |config, names| whole_weight(names).filter(|_| !has_modules_to_save(config))),
    rule(ALL_BUT_PEFT, Refuses, |config, _| when(config.use_dora, "DoRA (`use_dora`)")),
    rule(ALL_BUT_PEFT, Refuses, |config, _| when(config.bias != Bias::None, "trained biases (`bias`)")),
    rule(ALL_BUT_PEFT, Refuses, |config, _| when(config.lora_bias, "biases on B (`lora_bias`)")),
    rule(ALL_BUT_PEFT, Refuses, |config, _| when(config.trainable_token_indices.is_some(), "trained token rows (`trainable_token_indices`)")),
    rule(&[LlamaCpp], Differs, |config, _| when(config.use_rslora,
        "scales by alpha / r whatever `use_rslora` says, and so too weakly: `use_rslora = false` with `lora_alpha` times sqrt(r) means the same everywhere")),
    rule(&[Vllm, LlamaCpp], Differs, |config, _| when(!config.alpha_pattern.0.is_empty(), "ignores `alpha_pattern` and scales every module by `lora_alpha`")),
    rule(&[Vllm], Differs, |config, _| when(!config.rank_pattern.0.is_empty(), "ignores `rank_pattern` and scales every module by `lora_alpha` and `r`")),
    rule(&[Vllm], Refuses, |config, _| rank_above(config, VLLM_RANKS[VLLM_RANKS.len() - 1])),
    rule(&[Vllm], Conditional, |config, _| vllm_option(config)),
    rule(&[MistralRs], Refuses, |config, _| rank_above(config, MISTRALRS_MAX_RANK)),
    rule(&[MistralRs], Refuses, |config, _| when(names_embedding(config), "LoRA on `lm_head` and `embed_tokens`")),
    rule(&[MistralRs], Refuses, |config, _| when(config.ensure_weight_tying, "tied weights (`ensure_weight_tying`)")),
    rule(&[LlamaCpp], Conditional, |config, _| when(names_embedding(config), "LoRA on `lm_head` and `embed_tokens` only where the model does not tie the two")),
    rule(&[Vllm], Refuses, |config, _| when(config.target_modules.is_none(), "files without `target_modules`")),
    rule(&[Vllm], Conditional, |config, _| when(matches!(config.target_modules, Some(OneOrMany::One(_))),
        "`target_modules` is safest as a list of names")),
    rule(&[Vllm], Conditional, |config, _| is_set(config, "target_parameters", "expert LoRA (`target_parameters`) needs a version of mid 2026 or later")),
    rule(&[MistralRs], Refuses, |config, _| is_set(config, "alora_invocation_tokens", "activated LoRA (`alora_invocation_tokens`)")),
    rule(&[MistralRs], Refuses, |config, _| is_set(config, "use_qalora", "QALoRA (`use_qalora`)")),
    rule(&[MistralRs], Refuses, |config, _| is_set(config, "use_bdlora", "block-diagonal LoRA (`use_bdlora`)")),
    rule(&[MistralRs], Refuses, |config, _| is_set(config, "layer_replication", "replicated layers (`layer_replication`)")),
    rule(&[Peft], Conditional, |config, _| changed_base(config).map(|init| format!("repeats {init} on the base weights, which is exact for schemes without random numbers only"))),
    rule(&[MistralRs], Refuses, |config, _| changed_base(config)),
    rule(&[Vllm, LlamaCpp], Differs, |config, _| changed_base(config).map(|init| format!("computes on the original base weights, which {init} has changed"))),
    rule(&Runtime::ALL, Differs, |_, names| unprefixed(names)),
];

/// The verdict of each runtime on an adapter with this configuration, in the order of [`Runtime::ALL`]. `names` are those of its
/// tensors, empty where there are none yet.
pub fn portability(config: &PeftConfig, names: &[&str]) -> Vec<Verdict> {
    let verdict = |runtime: Runtime| {
        let rules = RULES.iter().filter(|rule| rule.runtimes.contains(&runtime));
        let applying = rules.filter_map(|rule| Some((rule.effect, (rule.reason)(config, names)?)));
        let mut reasons: Vec<(Effect, String)> = applying.collect();
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.0));
        Verdict {
            runtime,
            effect: reasons.first().map_or(Effect::Loads, |reason| reason.0),
            reasons: reasons.into_iter().map(|(_, reason)| reason).collect(),
        }
    };
    Runtime::ALL.map(verdict).into()
}

/// Refuses an adapter that a runtime refuses or computes differently.
///
/// # Errors
/// Every such runtime with its reasons.
pub fn check_portable(config: &PeftConfig) -> Result<()> {
    let verdicts = portability(config, &[]);
    let failing = verdicts.iter().filter(|verdict| verdict.effect >= Differs);
    let failing: Vec<String> = failing.map(sentence).collect();
    if failing.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Adapter,
        format!("the adapter would not be portable:\n  - {}", failing.join("\n  - ")),
    )
    .rule("`adapter.portable = true`: PEFT, vLLM, llama.cpp and mistral.rs load it and compute the same")
    .hint("leave out the settings named, or `portable`; `wattune merge` gives those runtimes a whole model"))
}

/// `RUNTIME EFFECT: reasons`.
pub fn sentence(verdict: &Verdict) -> String {
    let Verdict {
        runtime,
        effect,
        reasons,
    } = verdict;
    let (name, effect) = (runtime.name(), effect.words());
    if reasons.is_empty() {
        return format!("{name} {effect}");
    }
    format!("{name} {effect}: {}", reasons.join("; "))
}

fn when(applies: bool, reason: &str) -> Option<String> {
    applies.then(|| reason.to_string())
}

/// `reason`, if the key is set among those of adapter_config.json that `PeftConfig` has no field for.
fn is_set(config: &PeftConfig, key: &str, reason: &str) -> Option<String> {
    when(config.variants.get(key).is_some_and(is_truthy), reason)
}

fn other_type(config: &PeftConfig) -> Option<String> {
    let found = config.peft_type.as_deref().unwrap_or_default();
    (found != "LORA").then(|| format!("`peft_type` is `{found}`, not `LORA`"))
}

fn has_modules_to_save(config: &PeftConfig) -> bool {
    let names = config.modules_to_save.as_ref();
    names.is_some_and(|names| !names.is_empty())
}

/// A weight trained in full that `modules_to_save` does not name: the head that PEFT adds for a classifier.
fn whole_weight(names: &[&str]) -> Option<String> {
    let is_whole = |name: &&&str| {
        let inner = name.strip_prefix(PREFIX).unwrap_or_default();
        let is_part = [".lora_", ".base_layer.", ".token_adapter."];
        !inner.is_empty()
            && !inner.ends_with(".bias")
            && !is_part.iter().any(|part| inner.contains(part))
    };
    let name = names.iter().find(is_whole)?;
    Some(format!("`{name}`, a weight trained in full"))
}

fn largest_rank(config: &PeftConfig) -> usize {
    let patterns = config.rank_pattern.0.iter();
    patterns.map(|(_, r)| *r).fold(config.r, usize::max)
}

fn rank_above(config: &PeftConfig, most: usize) -> Option<String> {
    let r = largest_rank(config);
    (r > most).then(|| format!("rank {r}: it accepts {most} at most"))
}

fn vllm_option(config: &PeftConfig) -> Option<String> {
    let r = largest_rank(config);
    let option = VLLM_RANKS.into_iter().find(|option| r <= *option)?;
    (r > VLLM_DEFAULT_RANK)
        .then(|| format!("rank {r} needs `--max-lora-rank {option}` when it is started"))
}

fn names_embedding(config: &PeftConfig) -> bool {
    let Some(OneOrMany::Many(names)) = &config.target_modules else {
        return false;
    };
    let mut names = names.iter();
    names.any(|name| is_suffix(name, "lm_head") || is_suffix(name, "embed_tokens"))
}

fn changed_base(config: &PeftConfig) -> Option<String> {
    match &config.init_lora_weights {
        InitWeights::Named(name) if changes_the_base(name) => {
            Some(format!("`init_lora_weights = \"{name}\"`"))
        }
        _ => None,
    }
}

fn unprefixed(names: &[&str]) -> Option<String> {
    let name = names.iter().find(|name| !name.starts_with(PREFIX))?;
    Some(format!(
        "`{name}` does not begin with `{PREFIX}` and is not applied"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::config::{JsonNumber, ModulePattern};
    use crate::adapter::options::TokenIndices;

    fn plain() -> PeftConfig {
        PeftConfig {
            peft_type: Some("LORA".into()),
            r: 16,
            target_modules: Some(OneOrMany::Many(vec!["q_proj".into()])),
            ..PeftConfig::default()
        }
    }

    /// Effects on PEFT, vLLM, llama.cpp and mistral.rs.
    fn effects(config: &PeftConfig) -> Vec<Effect> {
        let verdicts = portability(config, &[]);
        verdicts.iter().map(|verdict| verdict.effect).collect()
    }

    #[test]
    fn a_plain_adapter_is_portable() {
        assert_eq!(effects(&plain()), [Effect::Loads; 4]);
        check_portable(&plain()).unwrap();
    }

    #[test]
    fn each_setting_has_the_effect_of_the_runtimes_sources() {
        use Effect::Loads;
        let pattern = |r| ModulePattern(vec![("q_proj".to_string(), r)]);
        let changed = |change: fn(&mut PeftConfig)| {
            let mut config = plain();
            change(&mut config);
            config
        };
        let refused = [Loads, Refuses, Refuses, Refuses];
        for (change, wanted) in [
            (
                (|c| c.use_rslora = true) as fn(&mut PeftConfig),
                [Loads, Loads, Differs, Loads],
            ),
            (|c| c.use_dora = true, refused),
            (|c| c.bias = Bias::All, refused),
            (|c| c.lora_bias = true, refused),
            (|c| c.modules_to_save = Some(vec!["score".into()]), refused),
            (
                |c| c.trainable_token_indices = Some(TokenIndices::Embedding(vec![1])),
                refused,
            ),
            (|c| c.peft_type = Some("IA3".into()), refused),
            (|c| c.r = 17, [Loads, Conditional, Loads, Loads]),
            (|c| c.r = 257, [Loads, Conditional, Loads, Refuses]),
            (|c| c.r = 513, [Loads, Refuses, Loads, Refuses]),
            (
                |c| c.target_modules = Some(OneOrMany::Many(vec!["lm_head".into()])),
                [Loads, Loads, Conditional, Refuses],
            ),
            (
                |c| c.target_modules = Some(OneOrMany::One(".*q".into())),
                [Loads, Conditional, Loads, Loads],
            ),
            (|c| c.target_modules = None, [Loads, Refuses, Loads, Loads]),
            (
                |c| c.init_lora_weights = InitWeights::Named("pissa_niter_4".into()),
                [Conditional, Differs, Differs, Refuses],
            ),
            (
                |c| c.init_lora_weights = InitWeights::Named("gaussian".into()),
                [Loads; 4],
            ),
        ] {
            let config = changed(change);
            assert_eq!(effects(&config), wanted, "{config:?}");
            let portable = wanted.iter().all(|effect| *effect < Differs);
            assert_eq!(check_portable(&config).is_ok(), portable, "{config:?}");
        }
        let config = PeftConfig {
            alpha_pattern: ModulePattern(vec![("q_proj".into(), JsonNumber(3.0))]),
            ..plain()
        };
        assert_eq!(effects(&config), [Loads, Differs, Differs, Loads]);
        let config = PeftConfig {
            rank_pattern: pattern(65),
            ..plain()
        };
        assert_eq!(effects(&config), [Loads, Differs, Loads, Loads]);
        let vllm = sentence(&portability(&config, &[])[1]);
        assert!(vllm.contains("--max-lora-rank 128"), "{vllm}");
    }

    #[test]
    fn a_tensor_without_the_prefix_is_applied_by_none() {
        let verdicts = portability(&plain(), &["model.layers.0.q_proj.lora_A.weight"]);
        assert!(verdicts.iter().all(|verdict| verdict.effect == Differs));
        let verdicts = portability(&plain(), &["base_model.model.score.weight"]);
        assert!(
            verdicts[1..]
                .iter()
                .all(|verdict| verdict.effect == Refuses)
        );
    }
}
