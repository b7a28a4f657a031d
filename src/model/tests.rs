//! config.json as transformers reads it, and weight files that contradict it. The golden file is
//! made by scripts/config_reference.py, which documents its contents.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::{Architecture, ConfigDropout, Weights};
use crate::error::Kind;
use crate::ops::Rope;
use crate::work::Precision;

fn variants() -> serde_json::Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config_variants.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut variants: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    variants.remove("versions");
    variants
}

/// The figures of an architecture under the golden file's names.
fn figures(a: &Architecture) -> Value {
    let tensors = a.tensors();
    let outer = tensors
        .iter()
        .filter(|tensor| a.names.layer_of(&tensor.name).unwrap_or(0) == 0)
        .map(|tensor| (tensor.name.clone(), json!(tensor.stored_shape())));
    let windows: Vec<_> = a.layers.iter().map(|layer| layer.window).collect();
    json!({
        "parameters": a.parameters(), "tensors": outer.collect::<serde_json::Map<_, _>>(),
        "tied": a.tie_word_embeddings, "layers": a.num_hidden_layers, "heads": a.attention.heads,
        "head_dim": a.attention.head_dim, "eps": a.norm_eps,
        "max_position_embeddings": a.max_position_embeddings, "windows": windows,
        "initializer_range": a.initializer_range, "bf16": a.stored_in_bf16,
        "softcaps": [a.attention.softcap, a.logits_softcap],
        "factors": [a.embedding_factor, a.residual_factor, 1.0 / a.logits_factor],
    })
}

/// Largest difference of a block's rotation at positions 1 and 7 from transformers' factor and
/// frequencies, which are rounded to f32.
fn rope_error(rope: Option<&Rope>, read: &Value) -> f64 {
    let Some(read) = read.as_array() else {
        assert!(rope.is_none());
        return 0.0;
    };
    let read: Vec<f64> = read.iter().map(|value| value.as_f64().unwrap()).collect();
    let (factor, frequencies) = read.split_first().unwrap();
    let mut worst: f64 = 0.0;
    for position in [1, 7] {
        let (cos, sin) = rope.unwrap().angles(position, 1, position + 1);
        assert_eq!(cos.len(), frequencies.len());
        for (i, frequency) in frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            worst = worst.max((f64::from(cos[i]) - angle.cos() * factor).abs());
            worst = worst.max((f64::from(sin[i]) - angle.sin() * factor).abs());
        }
    }
    worst
}

#[test]
fn configurations_are_read_as_transformers_reads_them() {
    for (name, variant) in variants() {
        let found = Architecture::from_config(&variant["config"]);
        let Some(read) = variant.get("read") else {
            let error = found.expect_err(&name);
            assert_eq!(error.kind(), Kind::Model, "{name}");
            assert!(
                error.to_string().contains("value:") || error.remedy().is_some(),
                "{name}"
            );
            continue;
        };
        let found = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        for (key, value) in figures(&found).as_object().unwrap() {
            assert_eq!(value, &read[key], "{name}: {key}");
        }
        let scaling = read["scaling"].as_f64().unwrap();
        assert!((found.attention.scale() - scaling).abs() < 1e-9, "{name}");
        for (layer, rope) in found.layers.iter().zip(read["ropes"].as_array().unwrap()) {
            let error = rope_error(layer.rope.map(|index| &found.ropes[index]), rope);
            assert!(error < 1e-6, "{name}: {error}");
        }
    }
}

/// The key that is wrong is the one that the error names.
#[test]
fn a_refused_value_is_named() {
    for (name, key) in [
        ("rope_scaling no object", "rope_scaling"),
        ("rope_parameters no object", "rope_parameters"),
        ("linear, factor negative", "factor"),
        ("theta zero", "rope_theta"),
        ("eps negative", "rms_norm_eps"),
        ("partial_rotary_factor", "partial_rotary_factor"),
        (
            "partial_rotary_factor in the table",
            "partial_rotary_factor",
        ),
        ("llama, sliding_window", "sliding_window"),
        ("an activation that nothing implements", "hidden_act"),
        ("dtype unknown", "dtype"),
        ("model_type absent", "model_type"),
        ("vocabulary null", "vocab_size"),
    ] {
        let error = Architecture::from_config(&variants()[name]["config"]).unwrap_err();
        assert!(
            error.to_string().contains(&format!("`{key}`")),
            "{name}: {error}"
        );
    }
}

#[test]
fn sizes_beyond_any_model_are_refused() {
    let tiny = variants()["plain"]["config"].clone();
    for (key, value) in [
        ("num_hidden_layers", 1u64 << 31),
        ("num_hidden_layers", 10_000),
        ("hidden_size", 1 << 40),
        ("vocab_size", u64::MAX),
        ("head_dim", 1 << 32),
        ("head_dim", (1 << 24) - 2),
        ("num_attention_heads", 1 << 24),
        ("intermediate_size", 0),
    ] {
        let mut config = tiny.clone();
        config[key] = value.into();
        let error = Architecture::from_config(&config).unwrap_err();
        assert!(error.to_string().contains(key), "{key} = {value}: {error}");
    }
    let mut config = tiny;
    for key in ["hidden_size", "intermediate_size", "vocab_size"] {
        config[key] = (1 << 24).into();
    }
    let error = Architecture::from_config(&config).unwrap_err();
    assert!(error.to_string().contains("parameters"), "{error}");
}

/// transformers' Gemma multiplies by sqrt(hidden_size) in the type of the weights: sqrt(3072) =
/// 55.43 is 55.5 in bf16.
#[test]
fn the_embedding_factor_of_gemma_is_rounded() {
    let config = &variants()["gemma, everything absent"]["config"];
    let gemma = Architecture::from_config(config).unwrap();
    assert_eq!(gemma.embedding_factor(Precision::F32), 3072f64.sqrt());
    assert_eq!(gemma.embedding_factor(Precision::Bf16), 55.5);
    let config = json!({"model_type": "granite", "embedding_multiplier": 55.43});
    let granite = Architecture::from_config(&config).unwrap();
    assert_eq!(granite.embedding_factor(Precision::Bf16), 55.43);
}

#[test]
fn dropout_is_reported() {
    let mut config = variants()["plain"]["config"].clone();
    assert_eq!(Architecture::from_config(&config).unwrap().dropout, []);
    config["attention_dropout"] = 0.1.into();
    let dropout = Architecture::from_config(&config).unwrap().dropout;
    let key = "attention_dropout";
    let expected = ConfigDropout {
        key,
        p: 0.1,
        is_default: false,
    };
    assert_eq!(dropout, [expected]);
    let gpt2 = Architecture::from_config(&json!({"model_type": "gpt2"})).unwrap();
    assert!(gpt2.dropout.len() == 3 && gpt2.dropout.iter().all(|dropout| dropout.is_default));
}

/// A tied architecture and a file of its tensors, with a head if `head` gives its first value.
fn tied(dir: &Path, head: Option<f32>, embedding: bool) -> (Architecture, Vec<PathBuf>) {
    let mut config = variants()["plain"]["config"].clone();
    config["tie_word_embeddings"] = true.into();
    let architecture = Architecture::from_config(&config).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let mut tensors: std::collections::HashMap<String, Tensor> = architecture
        .tensors()
        .into_iter()
        .filter(|tensor| embedding || !tensor.name.contains("embed_tokens"))
        .map(|tensor| (tensor.name, zeros(&tensor.shape)))
        .collect();
    if let Some(first) = head {
        let mut values = vec![0.0; architecture.vocab_size * architecture.hidden_size];
        values[0] = first;
        let shape = (architecture.vocab_size, architecture.hidden_size);
        let head = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        tensors.insert("lm_head.weight".into(), head);
    }
    let path = dir.join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    (architecture, vec![path])
}

/// transformers 5 ties the embeddings where the files hold one of them, or two equal ones, and not
/// where they differ (`PreTrainedModel.tie_weights`).
#[test]
fn a_head_that_differs_from_the_embedding_is_not_tied() {
    let dir = tempfile::tempdir().unwrap();
    for (head, embedding, stays_tied) in [
        (None, true, true),
        (Some(0.0), true, true),
        (Some(0.0), false, true),
        (Some(1.0), true, false),
    ] {
        let (mut architecture, paths) = tied(dir.path(), head, embedding);
        let refused = Weights::open(&paths, &architecture).err();
        assert_eq!(refused.is_none(), stays_tied, "{head:?}");
        architecture.correct_by_files(&paths).unwrap();
        assert_eq!(architecture.tie_word_embeddings, stays_tied, "{head:?}");
        let weights = Weights::open(&paths, &architecture).unwrap();
        if !stays_tied {
            let read = |name: &str| weights.values(name).unwrap()[0];
            assert_eq!(
                (read("lm_head.weight"), read("model.embed_tokens.weight")),
                (1.0, 0.0)
            );
        }
    }
}
