//! Merged models against PEFT's logits; of composite models, with the other parts as they were.

use std::path::{Path, PathBuf};

use candle_core::Device;
use safetensors::SafeTensors;
use wattune::adapter::{self, MergeJob, MergeWeights};
use wattune::model::{Architecture, Decoder, WeightSource, Weights};
use wattune::ops::Weight;
use wattune::units::Bytes;
use wattune::work::WorkCounter;

use crate::golden::{Golden, close, contexts};

const COMPOSITE: [&str; 2] = ["gemma3_vision", "ministral3"];

#[test]
fn merged_models_give_the_logits_of_the_adapted_ones() {
    for name in [
        "gpt2",
        "qwen3_moe",
        "mixtral",
        "bert",
        "distilbert",
        "llama_score",
    ]
    .into_iter()
    .chain(COMPOSITE)
    {
        let golden = Golden::open(name);
        let architecture = &golden.architecture;
        let dir = tempfile::tempdir().unwrap();
        let merged = merge(&golden, dir.path());
        let weights = Weights::open(&[merged], architecture).unwrap();
        let decoder = frozen(architecture, weights);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let logits = decoder.logits(context, &golden.batch(&[0])).unwrap();
            let wanted = &golden.tensors["adapter.logits.0"];
            close(name, &logits.reshape(wanted.dims()).unwrap(), wanted);
        }
    }
}

#[test]
fn a_merged_composite_model_keeps_its_towers() {
    for name in COMPOSITE {
        let golden = Golden::open(name);
        let dir = tempfile::tempdir().unwrap();
        let paths = [
            golden.dir.join("model.safetensors"),
            merge(&golden, dir.path()),
        ];
        let [before, after] = paths.map(|path| std::fs::read(path).unwrap());
        let [before, after] = [&before, &after].map(|file| SafeTensors::deserialize(file).unwrap());
        let mut names = [before.names(), after.names()];
        names.iter_mut().for_each(|names| names.sort());
        assert_eq!(names[0], names[1], "{name}");
        let towers = names[0]
            .iter()
            .filter(|name| !name.starts_with("language_model."));
        assert!(towers.clone().count() > 5, "{name}");
        for tower in towers {
            let [before, after] = [&before, &after].map(|file| file.tensor(tower).unwrap());
            assert_eq!(before, after, "{name}: {tower}");
        }
    }
}

/// Merges the golden adapter into `dir`; returns the weight file.
fn merge(golden: &Golden, dir: &Path) -> PathBuf {
    let architecture = &golden.architecture;
    let model = golden.dir.join("model.safetensors");
    let weights = Weights::open(std::slice::from_ref(&model), architecture).unwrap();
    let loaded = adapter::load(&golden.dir.join("adapter")).unwrap();
    let layout = architecture.layout();
    let adaptation = loaded.adaptation(&layout).unwrap();
    let out = dir.join("merged");
    let summary = adapter::merge(&MergeJob {
        weights: MergeWeights::Files(std::slice::from_ref(&model)),
        stored_names: &weights.stored_names(),
        layout: &layout,
        adapter: &loaded,
        adaptation: &adaptation,
        other_head: None,
        other_files: &|_| Ok(()),
        out: &out,
        max_shard: Bytes(1 << 20),
    });
    let changed = adaptation.sites.len() + adaptation.copies.len();
    assert_eq!(summary.unwrap().merged, changed);
    out.join("model.safetensors")
}

fn frozen(architecture: &Architecture, weights: Weights) -> Decoder {
    let weight = |name: &str, _: &[usize]| {
        let tensor = weights.get(name, candle_core::DType::F32, &Device::Cpu)?;
        Ok(Weight::frozen(tensor))
    };
    let source = WeightSource {
        tied: architecture.tie_word_embeddings,
        weight: &weight,
        lora: &|_| Ok(None),
    };
    Decoder::assemble(architecture, &source, &Device::Cpu).unwrap()
}

/// The type of the text decoder is named where it is none of the supported ones, and a composite
/// type that is not supported where it is not.
#[test]
fn other_composite_models_are_refused_by_name() {
    let mut config = Golden::open("gemma3_vision").config();
    config["text_config"]["model_type"] = "gemma3n_text".into();
    let error = Architecture::from_config(&config).unwrap_err();
    assert!(error.to_string().contains("gemma3n_text"), "{error}");
    config["model_type"] = "llama4".into();
    let error = Architecture::from_config(&config).unwrap_err();
    assert!(error.to_string().contains("llama4"), "{error}");
}
