//! Edited adapter files: read as PEFT reads them, or refused with the key or module named.
//!
//! Expected values come from scripts/peft_readings.py, which edits an adapter that PEFT saved and loads it with PEFT.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value};
use wattune::adapter::{load, peft};
use wattune::error::{Kind, Result};

use super::{golden, layout, modules};

/// Values that PEFT fails on by accident and that have one meaning: no pattern.
const READ_BY_US_ALONE: [&str; 2] = [r#"{"alpha_pattern":null}"#, r#"{"rank_pattern":null}"#];

/// Keys with values that PEFT reads as a plain LoRA of other layers, for want of tensors or because nothing is left of them, and
/// that are refused by name here.
const REFUSED: [&str; 12] = [
    "target_modules",
    "bias",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "init_lora_weights",
    "modules_to_save",
    "alora_invocation_tokens",
    "layer_replication",
    "task_type",
];

struct Reading {
    sites: Vec<(String, u64, f64)>,
    warnings: Vec<String>,
}

/// The tensors of the golden file with the names of the case `kind` (see `moved` in the script).
fn renamed(tensors: &Map<String, Value>, kind: &str) -> Vec<(String, Value)> {
    const Q1: &str = "layers.1.self_attn.q_proj";
    const O1: &str = "layers.1.self_attn.o_proj";
    let mut renamed = Vec::new();
    for (name, tensor) in tensors {
        let elsewhere = name.replace(Q1, O1);
        let names = match kind {
            "one module lost" if name.contains(Q1) => vec![],
            "one module elsewhere" => vec![elsewhere],
            "one module more" if name.contains(Q1) => vec![name.clone(), elsewhere],
            "prefix lost" => vec![name.replacen("base_model.model.", "", 1)],
            "adapter name kept" => vec![name.replace(".weight", ".default.weight")],
            _ => vec![name.clone()],
        };
        renamed.extend(names.into_iter().map(|name| (name, tensor.clone())));
    }
    renamed
}

fn write_tensors(path: &Path, tensors: &[(String, Value)]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, tensor)| {
            let values: Vec<f32> = serde_json::from_value(tensor[1].clone()).unwrap();
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| {
        let shape: Vec<usize> = serde_json::from_value(tensor[0].clone()).unwrap();
        (name, TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn read(golden: &Value, case: &Value, dir: &Path) -> Result<Reading> {
    let mut config = golden["config"].as_object().unwrap().clone();
    config.extend(case["set"].as_object().unwrap().clone());
    for key in case["remove"].as_array().unwrap() {
        config.remove(key.as_str().unwrap());
    }
    fs::write(
        dir.join("adapter_config.json"),
        Value::from(config).to_string(),
    )
    .unwrap();
    let kind = case["tensors"].as_str().unwrap_or_default();
    let tensors = renamed(golden["tensors"].as_object().unwrap(), kind);
    write_tensors(&dir.join(peft::WEIGHTS_FILE), &tensors);
    let layout = layout(modules(&golden["modules"]));
    let loaded = load(dir)?;
    let sites = loaded.adaptation(&layout)?.sites.into_iter();
    Ok(Reading {
        sites: sites
            .map(|site| (site.path, site.r as u64, site.scaling))
            .collect(),
        warnings: loaded.warnings(&layout, None)?,
    })
}

fn sites(case: &Value) -> Vec<(String, u64, f64)> {
    serde_json::from_value(case["sites"].clone()).unwrap()
}

#[test]
fn edited_files_are_read_as_by_peft_or_refused() {
    let golden = golden("peft_readings.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 200);
    let dir = tempfile::tempdir().unwrap();
    let (mut read_alike, mut refused) = (0, 0);
    for case in cases {
        let set = case["set"].to_string();
        let name = format!("{set} {} {}", case["remove"], case["tensors"]);
        let reading = read(&golden, case, dir.path());
        let empty = |list: &str| case[list].as_array().is_none_or(Vec::is_empty);
        let whole = case["plain"] == true && empty("dropped") && empty("missing");
        match reading {
            Ok(_) if READ_BY_US_ALONE.contains(&set.as_str()) => {}
            Ok(reading) => {
                assert!(
                    whole,
                    "{name}: PEFT does not read it as a whole, plain LoRA"
                );
                assert_eq!(reading.sites, sites(case), "{name}");
                // PEFT's warning about a default of the initialisation drops nothing.
                let is_about_init = case["set"].get("init_lora_weights").is_some();
                assert!(
                    case["warned"] == false || is_about_init || !reading.warnings.is_empty(),
                    "{name}: PEFT warns"
                );
                read_alike += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::Adapter, "{name}");
                let text = error.to_string();
                assert!(!text.contains("untagged"), "{name}: {text}");
                let keys = case["set"].as_object().unwrap().keys();
                let named = keys.clone().any(|key| text.contains(&format!("`{key}`")))
                    || text.contains("self_attn")
                    || case["remove"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .any(|key| text.contains(key.as_str().unwrap()));
                assert!(named, "{name}: {text}");
                let by_name = keys.clone().any(|key| REFUSED.contains(&key.as_str()))
                    || case["remove"] == serde_json::json!(["target_modules"]);
                assert!(!whole || by_name, "{name}: PEFT reads it: {text}");
                refused += 1;
            }
        }
    }
    assert!(read_alike > 100 && refused > 80, "{read_alike} {refused}");
}

#[test]
fn keys_without_effect_are_named() {
    let golden = golden("peft_readings.json");
    let dir = tempfile::tempdir().unwrap();
    for (set, words) in [
        (
            r#"{"unknown_key": 1}"#,
            vec!["`unknown_key`", "no such key"],
        ),
        (r#"{"lora_aplha": 16}"#, vec!["did you mean `lora_alpha`?"]),
        (
            r#"{"fan_in_fan_out": true}"#,
            vec!["`fan_in_fan_out` = true"],
        ),
        (
            r#"{"target_modules": ["q_proj", "v_proj", "nope"]}"#,
            vec!["`nope`", "target_modules"],
        ),
        (
            r#"{"rank_pattern": {"o_proj": 2}}"#,
            vec!["`o_proj`", "rank_pattern"],
        ),
        (
            r#"{"exclude_modules": ["nope"]}"#,
            vec!["`nope`", "exclude_modules"],
        ),
        (
            r#"{"loftq_config": {"loftq_bits": 4}}"#,
            vec!["loftq_config", "initial values"],
        ),
    ] {
        let set: Value = serde_json::from_str(set).unwrap();
        let case = serde_json::json!({"set": set, "remove": []});
        let warnings = read(&golden, &case, dir.path())
            .unwrap()
            .warnings
            .join("\n");
        for word in words {
            assert!(warnings.contains(word), "{set}: {warnings}");
        }
    }
}

#[test]
fn every_wrong_field_is_named_in_one_error() {
    let golden = golden("peft_readings.json");
    let dir = tempfile::tempdir().unwrap();
    let set = r#"{"r": "4", "lora_alpha": null, "use_rslora": "yes", "layers_to_transform": -1, "rank_pattern": [1]}"#;
    let set: Value = serde_json::from_str(set).unwrap();
    let case = serde_json::json!({"set": set, "remove": []});
    let error = read(&golden, &case, dir.path()).map(|_| ()).unwrap_err();
    let text = error.to_string();
    for word in [
        "`r` is \"4\": it must be a whole number",
        "`lora_alpha` is null: it must be a number",
        "`use_rslora` is \"yes\": it must be true or false",
        "`layers_to_transform` is -1",
        "`rank_pattern` is [1]",
        "adapter_config.json",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
}
