//! Mixtures of experts: both layouts of their files, and what is refused.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use wattune::adapter::{Adaptation, LoraConfig, Targets};
use wattune::model::Weights;

use crate::golden::Golden;

const EXPERTS: [&str; 3] = ["qwen3_moe", "olmoe", "mixtral"];

/// transformers 5 names the stacks, which its `save_pretrained` writes as a matrix for each expert.
#[test]
fn a_file_with_stacks_of_experts_holds_the_same_weights() {
    for name in EXPERTS {
        let golden = Golden::open(name);
        let architecture = &golden.architecture;
        let open = |path: PathBuf| Weights::open(&[path], architecture).unwrap();
        let apart = open(golden.dir.join("model.safetensors"));
        let read =
            |weights: &Weights, name: &str| weights.get(name, DType::F32, &Device::Cpu).unwrap();
        let tensors: HashMap<String, Tensor> = architecture
            .tensors()
            .into_iter()
            .map(|tensor| (tensor.name.clone(), read(&apart, &tensor.name)))
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let stacked = open(path);
        let mut stacks = 0;
        for (tensor, values) in &tensors {
            let same = read(&stacked, tensor);
            assert_eq!(same.dims(), values.dims(), "{name}: {tensor}");
            let [a, b] = [&same, values].map(|x| x.flatten_all().unwrap().to_vec1::<f32>());
            assert_eq!(a.unwrap(), b.unwrap(), "{name}: {tensor}");
            let flat = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(apart.values(tensor).unwrap(), flat, "{name}: {tensor}");
            stacks += usize::from(values.rank() == 3);
        }
        assert!(stacks >= 4, "{name}");
    }
}

/// PEFT's names of an MLP mean the experts there; they are refused, and so are copies of experts.
#[test]
fn experts_are_no_targets() {
    for name in EXPERTS {
        let layout = Golden::open(name).architecture.layout();
        let select = |targets: Targets, saved: &[&str]| {
            let settings = LoraConfig {
                target_modules: targets,
                modules_to_save: saved.iter().map(|name| name.to_string()).collect(),
                ..LoraConfig::default()
            };
            Adaptation::select(&layout, &settings)
        };
        let error = select(Targets::Names(vec!["gate_proj".into()]), &[]).unwrap_err();
        assert!(error.to_string().contains("`gate_proj`"), "{name}: {error}");
        let error = select(Targets::AllLinear, &["mlp.experts"]).unwrap_err();
        assert!(error.to_string().contains("experts"), "{name}: {error}");
        let sites = select(Targets::AllLinear, &[]).unwrap().sites;
        let in_attention = |path: &str| path.contains(".self_attn.");
        assert!(sites.iter().all(|site| in_attention(&site.path)), "{name}");
    }
}

/// By hand, for Qwen3-30B-A3B: 48 blocks of 128 experts of 3 x 768 x 2048, of which a token uses 8.
#[test]
fn a_token_is_multiplied_by_its_experts_alone() {
    let config = serde_json::json!({
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "num_experts": 128,
    });
    let architecture = wattune::model::Architecture::from_config(&config).unwrap();
    let expert = 3 * 768 * 2048;
    let unused = 48 * (128 - 8) * expert;
    let active = architecture.active_parameters();
    assert_eq!(active + unused, architecture.parameters());
}
