//! Adapters against PEFT: module selection, real files, round trips, merging.
//!
//! Expected values come from scripts/peft_targets.py, which runs PEFT.

mod files;
mod merging;
mod readings;
mod targets;
mod tools;

use std::fs;
use std::path::Path;

use serde_json::Value;
use wattune::adapter::config::PeftConfig;
use wattune::adapter::targets::{Module, ModuleKind};
use wattune::adapter::{LoraConfig, ModelLayout};

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn modules(list: &Value) -> Vec<Module> {
    let one = |entry: &Value| Module {
        path: entry[0].as_str().unwrap().into(),
        out_features: entry[1].as_u64().unwrap() as usize,
        in_features: entry[2].as_u64().unwrap() as usize,
        kind: ModuleKind::Linear,
    };
    list.as_array().unwrap().iter().map(one).collect()
}

/// A model with these linear layers, the output embedding `lm_head` among them.
fn layout(modules: Vec<Module>) -> ModelLayout {
    let tensors = modules.iter().map(|module| {
        let name = format!("{}.weight", module.path);
        (name, vec![module.out_features, module.in_features])
    });
    ModelLayout {
        tensors: tensors.collect(),
        modules,
        output_embedding: "lm_head".into(),
        ..ModelLayout::default()
    }
}

/// LoraConfig's keywords as settings; the scripts' defaults are r = 8, lora_alpha = 16.
fn settings(keywords: &Value) -> LoraConfig {
    let mut object = keywords.as_object().unwrap().clone();
    object.entry("r").or_insert(8.into());
    object.entry("lora_alpha").or_insert(16.into());
    PeftConfig::parse(&Value::Object(object).to_string(), Path::new("keywords"))
        .unwrap()
        .settings()
}
