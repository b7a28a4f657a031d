//! Adapter directories: round trips, refusals, real files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use wattune::adapter::config::{OneOrMany, PeftConfig};
use wattune::adapter::targets::{Module, ModuleKind, Site, select};
use wattune::adapter::{Adaptation, LoraConfig, Part, Targets, load, peft, save};
use wattune::error::Kind;

use super::{layout, settings};

/// The folder of real models and adapters, or a visible note that `test` is skipped.
pub fn assets(test: &str) -> Option<PathBuf> {
    let root = std::env::var_os("WATTUNE_ASSETS").map_or(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"),
        PathBuf::from,
    );
    if root.join("adapters").is_dir() {
        return Some(root);
    }
    eprintln!("skipped: {test} needs {}", root.join("adapters").display());
    None
}

/// Two layers with one LoRA target each.
fn tiny_modules() -> Vec<Module> {
    let one = |path: &str, out_features, in_features| Module {
        path: path.into(),
        out_features,
        in_features,
        kind: ModuleKind::Linear,
    };
    vec![
        one("model.layers.0.q_proj", 3, 2),
        one("model.layers.1.q_proj", 3, 2),
        one("lm_head", 5, 2),
    ]
}

fn tiny_settings() -> LoraConfig {
    settings(
        &serde_json::json!({"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "rank_pattern": {"1.q_proj": 2}}),
    )
}

fn tiny_sites() -> Vec<Site> {
    select(&tiny_modules(), "lm_head", &tiny_settings()).unwrap()
}

/// (name, shape, values) of every matrix of `tiny_sites`, with values 0.5, 1.0, 1.5, ...
fn tiny_tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut tensors = Vec::new();
    for site in tiny_sites() {
        for (part, shape) in [
            (Part::B, vec![site.out_features, site.r]),
            (Part::A, vec![site.r, site.in_features]),
        ] {
            let values = (1..=shape[0] * shape[1]).map(|i| i as f32 / 2.0).collect();
            tensors.push((part.name(&site.path), shape, values));
        }
    }
    tensors
}

fn tiny_config() -> PeftConfig {
    PeftConfig::for_sites(
        &tiny_settings(),
        &tiny_sites(),
        &tiny_modules(),
        "tiny/base",
        Some("main"),
    )
    .unwrap()
}

fn save_tiny(dir: &Path, config: &PeftConfig, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let borrowed: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| (name.clone(), shape.clone(), values.as_slice()))
        .collect();
    save(dir, config, &borrowed).unwrap();
}

#[test]
fn an_adapter_survives_a_round_trip_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("deeper/two"));
    let mut tensors = tiny_tensors();
    save_tiny(&one, &tiny_config(), &tensors);
    tensors.reverse();
    save_tiny(&two, &tiny_config(), &tensors);
    for file in [peft::WEIGHTS_FILE, "adapter_config.json"] {
        assert_eq!(
            fs::read(one.join(file)).unwrap(),
            fs::read(two.join(file)).unwrap(),
            "{file}"
        );
    }
    assert_eq!(fs::read_dir(&one).unwrap().count(), 2);

    let loaded = load(&one).unwrap();
    assert_eq!(loaded.config, tiny_config());
    let adaptation = loaded.adaptation(&layout(tiny_modules())).unwrap();
    assert_eq!(adaptation, Adaptation::from(tiny_sites()));
    let values = |part: Part, path: &str| loaded.values(&part.name(path)).unwrap();
    assert_eq!(values(Part::A, "model.layers.0.q_proj"), [0.5, 1.0]);
    let b = values(Part::B, "model.layers.1.q_proj");
    assert_eq!(b, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);

    // The file follows the format: names sorted, marked as PyTorch's.
    let bytes = fs::read(one.join(peft::WEIGHTS_FILE)).unwrap();
    let header = std::str::from_utf8(
        &bytes[8..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize],
    )
    .unwrap();
    let header: serde_json::Map<String, Value> = serde_json::from_str(header).unwrap();
    assert_eq!(header["__metadata__"], serde_json::json!({"format": "pt"}));
    let names: Vec<&String> = header.keys().filter(|key| *key != "__metadata__").collect();
    assert!(names.is_sorted() && names.len() == 4, "{names:?}");
}

#[test]
fn half_precision_is_read() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(dir.path(), &tiny_config(), &tiny_tensors());
    let original = load(dir.path()).unwrap();
    for (dtype, encode) in [
        (
            safetensors::Dtype::F16,
            (|v| half::f16::from_f32(v).to_le_bytes()) as fn(f32) -> [u8; 2],
        ),
        (safetensors::Dtype::BF16, |v| {
            half::bf16::from_f32(v).to_le_bytes()
        }),
    ] {
        let encoded: Vec<(String, Vec<usize>, Vec<u8>)> = tiny_tensors()
            .into_iter()
            .map(|(name, shape, values)| {
                (name, shape, values.into_iter().flat_map(encode).collect())
            })
            .collect();
        let views = encoded.iter().map(|(name, shape, bytes)| {
            (
                name,
                safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap(),
            )
        });
        fs::write(
            dir.path().join(peft::WEIGHTS_FILE),
            safetensors::serialize(views, None).unwrap(),
        )
        .unwrap();
        // Halves up to 3.0 are exact in both types.
        assert_eq!(load(dir.path()).unwrap(), original);
    }
}

#[test]
fn broken_pairs_are_refused_together() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tiny_tensors();
    // Layer 0 loses its A; layer 1, of rank 2, has matrices of rank 1.
    tensors.retain(|(name, ..)| !name.contains("layers.0.q_proj.lora_A"));
    for (name, shape, values) in &mut tensors {
        if name.contains("layers.1.q_proj.lora_B") {
            (*shape, *values) = (vec![3, 1], vec![1.0; 3]);
        } else if name.contains("layers.1.q_proj.lora_A") {
            (*shape, *values) = (vec![1, 2], vec![1.0; 2]);
        }
    }
    save_tiny(dir.path(), &tiny_config(), &tensors);
    let text = load(dir.path()).unwrap_err().to_string();
    assert!(
        text.contains("layers.0.q_proj.lora_A.weight` is missing"),
        "{text}"
    );
    assert!(
        text.contains("its shape is [1, 2]") && text.contains("rank 2, so 2 rows"),
        "{text}"
    );
    assert!(
        text.contains("its shape is [3, 1]") && text.contains("rank 2, so 2 columns"),
        "{text}"
    );

    let mut tensors = tiny_tensors();
    tensors[0].2[0] = f32::NAN;
    save_tiny(dir.path(), &tiny_config(), &tensors);
    assert!(
        load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("holds NaN")
    );
}

#[test]
fn an_adapter_of_another_model_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(dir.path(), &tiny_config(), &tiny_tensors());
    let loaded = load(dir.path()).unwrap();
    let mut others = tiny_modules();
    others[0].path = "model.language.layers.0.q_proj".into();
    others[1].in_features = 7;
    let text = loaded.adaptation(&layout(others)).unwrap_err().to_string();
    assert!(
        text.contains(
            "no linear layer `model.layers.0.q_proj`; nearest is `model.language.layers.0.q_proj`"
        ),
        "{text}"
    );
    assert!(
        text.contains("2 columns, but the module has 7 inputs") && text.contains("tiny/base"),
        "{text}"
    );
    // A deeper model: the list names its third layer, which has no tensor.
    let mut deeper = tiny_modules();
    deeper.push(Module {
        path: "model.layers.2.q_proj".into(),
        out_features: 3,
        in_features: 2,
        kind: ModuleKind::Linear,
    });
    let text = loaded.adaptation(&layout(deeper)).unwrap_err().to_string();
    assert!(
        text.contains("`model.layers.2.q_proj`: `adapter_config.json` names this module"),
        "{text}"
    );
}

#[test]
fn missing_files_are_errors_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(&dir.path().join("inner"), &tiny_config(), &tiny_tensors());
    assert!(
        load(dir.path())
            .unwrap_err()
            .remedy()
            .unwrap()
            .contains("inner")
    );
    let inner = dir.path().join("inner");
    fs::rename(
        inner.join(peft::WEIGHTS_FILE),
        inner.join("adapter_model.bin"),
    )
    .unwrap();
    assert!(
        load(&inner)
            .unwrap_err()
            .remedy()
            .unwrap()
            .contains("save_file")
    );
    fs::write(inner.join(peft::WEIGHTS_FILE), b"\x05\0\0\0\0\0\0\0{}").unwrap();
    assert!(load(&inner).unwrap_err().to_string().contains("damaged"));
}

#[test]
fn real_gpt2_adapter_is_refused_by_name() {
    let Some(assets) = assets("real_gpt2_adapter_is_refused_by_name") else {
        return;
    };
    let error = load(&assets.join("adapters/peft-gpt2-lora")).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), Kind::Adapter);
    assert!(text.contains("`base_model.model.score.weight`"), "{text}");
}

#[test]
fn real_configuration_is_read() {
    let Some(assets) = assets("real_configuration_is_read") else {
        return;
    };
    let path =
        assets.join("adapters/config_only/peft0.19.1_qwen2.5-1.5b_alllinear_adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    let config = PeftConfig::parse(&text, &path).unwrap();
    let Some(OneOrMany::Many(names)) = &config.target_modules else {
        panic!("{config:?}")
    };
    assert_eq!((names.len(), config.r, config.lora_dropout), (7, 16, 0.05));
    assert_eq!(config.layers_to_transform, None::<OneOrMany<usize>>);
    assert_eq!(
        config.settings().target_modules,
        Targets::Names(names.clone())
    );
    // Written again it is equal except for the fields added to PEFT since 0.19.
    let mut again: serde_json::Map<String, Value> =
        serde_json::from_str(&config.to_text()).unwrap();
    for gained in ["kasa_config", "monteclora_config", "velora_config"] {
        assert_eq!(again.remove(gained), Some(Value::Null));
    }
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        Value::Object(again)
    );
}
