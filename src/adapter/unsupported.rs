//! Features of PEFT adapters that cannot be loaded.
//!
//! Takes a configuration or a tensor's name; returns the reasons, one sentence each. Names everything that would be dropped or
//! computed differently from PEFT, so that nothing is silently left out. Knows nothing of shapes and values.

use super::adaptation::{PREFIX, Part};
use super::config::{InitWeights, OneOrMany, PeftConfig};
use super::keys;

/// Values of `init_lora_weights` that leave the base model as it is, and whether PEFT reads them in any case.
const INITS_ON_THE_SAME_BASE: [(&str, bool); 4] = [
    ("gaussian", true),
    ("eva", false),
    ("orthogonal", false),
    ("mica", true),
];
/// The beginnings of those that change it.
const INITS_OF_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Each reason why an adapter with this configuration cannot be loaded.
pub fn unsupported_settings(config: &PeftConfig) -> Vec<String> {
    let mut reasons = Vec::new();
    match config.peft_type.as_deref() {
        Some("LORA") => {}
        Some(other) => reasons.push(format!(
            "`peft_type` is `{other}`: only `LORA` adapters are supported"
        )),
        None => reasons.push("`peft_type` is missing: it must be `LORA`".to_string()),
    }
    if let Some(task) = config
        .task_type
        .as_deref()
        .filter(|task| !["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"].contains(task))
    {
        reasons.push(format!(
            "`task_type` is `{task}`: only `CAUSAL_LM`, `SEQ_CLS` and `TOKEN_CLS` are supported"
        ));
    }
    if config.r == 0 || config.rank_pattern.0.iter().any(|(_, r)| *r == 0) {
        reasons
            .push("a rank is 0: `r` and every rank of `rank_pattern` are at least 1".to_string());
    }
    if !(0.0..=1.0).contains(&config.lora_dropout) {
        reasons.push(format!(
            "`lora_dropout` is {}: a probability is from 0 to 1",
            config.lora_dropout
        ));
    }
    reasons.extend(keys::refused(&config.variants));
    reasons.extend(unsupported_init(&config.init_lora_weights));
    if config.lora_bias && config.use_dora {
        reasons.push("`lora_bias` is true beside `use_dora`: PEFT refuses the two".to_string());
    }
    reasons.extend(contradicting_targets(config));
    reasons
}

/// The rules of LoraConfig's `__post_init__`, and a file without `target_modules`.
fn contradicting_targets(config: &PeftConfig) -> Option<String> {
    let layers_pattern = config.settings().layers_pattern;
    let reason = match &config.target_modules {
        None => "`target_modules` is missing: which modules it means depends on PEFT's version",
        Some(OneOrMany::One(_)) if config.layers_to_transform.is_some() => {
            "`layers_to_transform` needs a list of `target_modules`: PEFT refuses it beside a text"
        }
        Some(OneOrMany::One(_)) if config.layers_pattern.is_some() => {
            "`layers_pattern` needs a list of `target_modules`: PEFT refuses it beside a text"
        }
        Some(_) if config.layers_to_transform.is_none() && !layers_pattern.is_empty() => {
            "`layers_pattern` needs `layers_to_transform`, which is missing"
        }
        Some(_) => return None,
    };
    Some(reason.to_string())
}

/// Whether the scheme `init` of `init_lora_weights` changes the base weights.
pub(super) fn changes_the_base(init: &str) -> bool {
    let lower = init.to_lowercase();
    let mut schemes = INITS_OF_THE_BASE.iter();
    schemes.any(|scheme| lower.starts_with(scheme))
}

fn unsupported_init(init: &InitWeights) -> Option<String> {
    let InitWeights::Named(name) = init else {
        return None;
    };
    let lower = name.to_lowercase();
    let harmless = INITS_ON_THE_SAME_BASE
        .iter()
        .any(|(init, any_case)| name == init || (*any_case && lower == *init));
    if harmless {
        return None;
    }
    let why = if changes_the_base(name) {
        "it changed the base weights, so the adapter alone is wrong on the original model; save it again with PEFT's \
         `path_initial_model_for_weight_conversion`"
    } else {
        "PEFT has no such initialisation"
    };
    Some(format!("`init_lora_weights` is `{name}`: {why}"))
}

/// The layer's path and the part in a tensor's name, or the reason why it cannot be loaded.
pub fn parse_tensor_name(name: &str) -> Result<(&str, Part), &'static str> {
    let Some(inner) = name.strip_prefix(PREFIX) else {
        return Err(
            "its name does not begin with `base_model.model.`: it was not written by PEFT's save_pretrained",
        );
    };
    for part in Part::ALL {
        let path = inner.strip_suffix(part.suffix());
        if let Some(path) = path.filter(|path| !path.is_empty()) {
            // Nested wrappers appear where one module has several LoRAs (target_parameters).
            return if path.ends_with(".base_layer") {
                Err("LoRA on bare parameters is not supported")
            } else {
                Ok((path, part))
            };
        }
    }
    Err(unsupported_tensor(inner))
}

fn unsupported_tensor(inner: &str) -> &'static str {
    let has = |part: &str| inner.contains(part);
    let is_factor = has(".lora_A.") || has(".lora_B.");
    if is_factor {
        "the adapter's name is part of it: the file is a raw state dict; save it again with PEFT's save_pretrained"
    } else if has(".token_adapter.") {
        "trained token rows that `trainable_token_indices` does not name"
    } else if has(".lora_") {
        "a part of a LoRA variant that is not plain LoRA"
    } else if has("embed_tokens.") || has("lm_head.") || has(".wte.") {
        "an embedding saved in full; save it again with PEFT's `save_embedding_layers=False` if it was not trained"
    } else if inner.ends_with(".bias") {
        "a trained bias is not supported"
    } else {
        "a weight saved in full, which `modules_to_save` does not name"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_pair_are_parsed() {
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(
            parse_tensor_name(name),
            Ok(("model.layers.0.self_attn.q_proj", Part::A))
        );
        assert_eq!(
            parse_tensor_name("base_model.model.x.lora_B.weight"),
            Ok(("x", Part::B))
        );
        for part in Part::ALL {
            assert_eq!(parse_tensor_name(&part.name("x.y")), Ok(("x.y", part)));
        }
    }

    #[test]
    fn other_tensors_are_refused_by_kind() {
        for (name, word) in [
            ("model.layers.0.q.lora_A.weight", "base_model.model."),
            (
                "base_model.model.m.q.lora_magnitude_vector.weight",
                "variant",
            ),
            (
                "base_model.model.m.q.lora_A.default.weight",
                "raw state dict",
            ),
            (
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
                "token rows",
            ),
            (
                "base_model.model.model.embed_tokens.weight",
                "embedding saved in full",
            ),
            (
                "base_model.model.lm_head.base_layer.weight",
                "embedding saved in full",
            ),
            ("base_model.model.m.q.base_layer.bias", "trained bias"),
            ("base_model.model.score.weight", "modules_to_save"),
            (
                "base_model.model.m.experts.base_layer.lora_A.weight",
                "bare parameters",
            ),
            ("base_model.model.m.q.lora_diag", "variant"),
        ] {
            let reason = parse_tensor_name(name).unwrap_err();
            assert!(reason.contains(word), "{name}: {reason}");
        }
    }

    #[test]
    fn every_variant_of_the_configuration_is_refused() {
        let plain = r#"{"peft_type":"LORA","target_modules":["q"],"task_type":"CAUSAL_LM"}"#;
        let with = |extra: &str| {
            let text = format!("{},{extra}}}", plain.trim_end_matches('}'));
            PeftConfig::parse(&text, std::path::Path::new("x")).unwrap()
        };
        for harmless in [
            "\"r\":4",
            "\"init_lora_weights\":\"gaussian\"",
            "\"modules_to_save\":[]",
            "\"loftq_config\":{}",
            "\"fan_in_fan_out\":true",
            "\"use_dora\":null",
            "\"trainable_token_indices\":[1]",
        ] {
            assert_eq!(
                unsupported_settings(&with(harmless)),
                Vec::<String>::new(),
                "{harmless}"
            );
        }
        for (extra, word) in [
            (r#""r":0"#, "at least 1"),
            (r#""rank_pattern":{"q":0}"#, "at least 1"),
            (r#""use_dora":true,"lora_bias":true"#, "refuses the two"),
            (r#""use_qalora":true"#, "QALoRA"),
            (r#""target_parameters":["x"]"#, "experts"),
            (r#""alora_invocation_tokens":[1]"#, "activated"),
            (r#""layer_replication":[[0,4]]"#, "layers"),
            (r#""use_bdlora":{}"#, "block-diagonal"),
            (r#""target_modules":"q","layers_to_transform":[0]"#, "list"),
            (r#""layers_pattern":"h""#, "layers_to_transform"),
            (r#""init_lora_weights":"Kaiming""#, "no such"),
            (r#""velora_config":{}"#, "VeLoRA"),
            (r#""kasa_config":{"beta":1}"#, "KaSA"),
            (r#""init_lora_weights":"pissa_niter_16""#, "pissa_niter_16"),
            (r#""init_lora_weights":"olora""#, "olora"),
            (r#""init_lora_weights":"corda""#, "corda"),
            (r#""init_lora_weights":"loftq""#, "loftq"),
            (r#""init_lora_weights":"lora_ga""#, "lora_ga"),
        ] {
            let reasons = unsupported_settings(&with(extra));
            assert!(
                reasons.len() == 1 && reasons[0].contains(word),
                "{extra}: {reasons:?}"
            );
        }
        let wrong_kind = r#"{"peft_type":"IA3","task_type":"FEATURE_EXTRACTION"}"#;
        assert_eq!(
            unsupported_settings(
                &PeftConfig::parse(wrong_kind, std::path::Path::new("x")).unwrap()
            )
            .len(),
            3
        );
    }
}
