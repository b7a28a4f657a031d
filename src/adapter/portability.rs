//! Whether other runtimes load an adapter correctly.
//!
//! Takes a configuration; returns one sentence for each runtime that would refuse it or scale it differently. Sources: vLLM
//! `vllm/lora/peft_helper.py` and `vllm/config/lora.py`, llama.cpp `convert_lora_to_gguf.py` and `src/llama-adapter.h`,
//! mistral.rs `docs/guides/customize/lora-adapters.mdx`. Knows nothing of tensors.

use super::config::{OneOrMany, PeftConfig};
use super::matching::is_suffix;
use super::options::Bias;

/// vLLM's default `max_lora_rank`.
const VLLM_DEFAULT_RANK: usize = 16;
/// The largest `max_lora_rank` of vLLM.
const VLLM_MAX_RANK: usize = 512;
/// mistral.rs's largest rank.
const MISTRALRS_MAX_RANK: usize = 256;

/// One sentence for each runtime that refuses or mis-scales an adapter with this configuration; empty: it is portable.
pub fn portability(config: &PeftConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    if config.use_rslora {
        warnings.push(
            "llama.cpp scales by alpha / r whatever `use_rslora` says, and so too weakly; \
             `use_rslora = false` with `lora_alpha` times sqrt(r) means the same everywhere"
                .to_string(),
        );
    }
    if !config.alpha_pattern.0.is_empty() {
        warnings.push(
            "llama.cpp and vLLM ignore `alpha_pattern` and scale every module by `lora_alpha`"
                .to_string(),
        );
    }
    if !config.rank_pattern.0.is_empty() {
        warnings.push(
            "vLLM ignores `rank_pattern` and scales every module by `lora_alpha` and `r`"
                .to_string(),
        );
    }
    warnings.extend(rank_warnings(config));
    let saved = config
        .modules_to_save
        .as_ref()
        .is_some_and(|names| !names.is_empty());
    for (used, what) in [
        (saved, "weights trained in full (`modules_to_save`)"),
        (config.use_dora, "DoRA (`use_dora`)"),
        (config.bias != Bias::None, "trained biases (`bias`)"),
        (config.lora_bias, "biases on B (`lora_bias`)"),
    ] {
        if used {
            warnings.push(format!(
                "vLLM, llama.cpp and mistral.rs refuse {what}; merge the adapter for them"
            ));
        }
    }
    warnings.extend(target_warnings(config));
    warnings
}

fn rank_warnings(config: &PeftConfig) -> Vec<String> {
    let rank = config
        .rank_pattern
        .0
        .iter()
        .map(|(_, r)| *r)
        .fold(config.r, usize::max);
    let mut warnings = Vec::new();
    if rank > VLLM_MAX_RANK {
        warnings.push(format!(
            "vLLM refuses rank {rank}: it accepts {VLLM_MAX_RANK} at most"
        ));
    } else if rank > VLLM_DEFAULT_RANK {
        // The values that the option takes.
        let option = [32, 64, 128, 256, 320, 512]
            .into_iter()
            .find(|option| rank <= *option)
            .unwrap_or(VLLM_MAX_RANK);
        warnings.push(format!(
            "vLLM refuses rank {rank} unless it is started with `--max-lora-rank {option}`"
        ));
    }
    if rank > MISTRALRS_MAX_RANK {
        warnings.push(format!(
            "mistral.rs refuses rank {rank}: it accepts {MISTRALRS_MAX_RANK} at most"
        ));
    }
    warnings
}

fn target_warnings(config: &PeftConfig) -> Vec<String> {
    match &config.target_modules {
        Some(OneOrMany::Many(names))
            if names
                .iter()
                .any(|name| is_suffix(name, "lm_head") || is_suffix(name, "embed_tokens")) =>
        {
            vec!["mistral.rs refuses LoRA on `lm_head` and `embed_tokens`; llama.cpp does where the two are tied".to_string()]
        }
        Some(OneOrMany::Many(_)) => Vec::new(),
        Some(OneOrMany::One(_)) | None => {
            vec!["vLLM wants `target_modules` as a list of names".to_string()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::config::{JsonNumber, ModulePattern};

    fn plain() -> PeftConfig {
        PeftConfig {
            r: 16,
            target_modules: Some(OneOrMany::Many(vec!["q_proj".into()])),
            ..PeftConfig::default()
        }
    }

    #[test]
    fn a_plain_adapter_is_portable() {
        assert_eq!(portability(&plain()), Vec::<String>::new());
    }

    #[test]
    fn each_runtime_is_named_with_its_reason() {
        let named = |config: PeftConfig, words: &[&str]| {
            let warnings = portability(&config);
            assert_eq!(warnings.len(), words.len(), "{warnings:?}");
            for (warning, word) in warnings.iter().zip(words) {
                assert!(warning.contains(word), "{warning}");
            }
        };
        named(
            PeftConfig {
                use_rslora: true,
                ..plain()
            },
            &["llama.cpp"],
        );
        named(
            PeftConfig {
                alpha_pattern: ModulePattern(vec![("q_proj".into(), JsonNumber(3.0))]),
                ..plain()
            },
            &["llama.cpp and vLLM"],
        );
        named(
            PeftConfig {
                rank_pattern: ModulePattern(vec![("q_proj".into(), 65)]),
                ..plain()
            },
            &["vLLM ignores", "--max-lora-rank 128"],
        );
        named(
            PeftConfig {
                use_dora: true,
                bias: Bias::All,
                modules_to_save: Some(vec!["score".into()]),
                ..plain()
            },
            &["`modules_to_save`", "`use_dora`", "`bias`"],
        );
        named(PeftConfig { r: 17, ..plain() }, &["--max-lora-rank 32"]);
        named(
            PeftConfig { r: 513, ..plain() },
            &["512 at most", "256 at most"],
        );
        named(
            PeftConfig {
                target_modules: Some(OneOrMany::Many(vec!["lm_head".into()])),
                ..plain()
            },
            &["lm_head"],
        );
        named(
            PeftConfig {
                target_modules: Some(OneOrMany::One(".*q".into())),
                ..plain()
            },
            &["vLLM wants"],
        );
    }
}
