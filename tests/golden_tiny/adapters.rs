//! Adapters beyond plain LoRA against PEFT: losses, every gradient, ten AdamW steps, merged models; and forecast against execution.
//!
//! The golden files are made by `scripts/adapter_methods.py`, which documents their contents.

use std::collections::BTreeMap;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::Value;
use wattune::adapter::{self, Adaptation, LoadedAdapter, MergeJob, MergeWeights};
use wattune::model::{
    AdapterStart, Architecture, Decoder, ModelShape, Recompute, TrainableModel, WeightSource,
    Weights, initial_values,
};
use wattune::ops::{Context, StoredFormat, Weight};
use wattune::units::Bytes;
use wattune::work::{Precision, WorkCounter};

use super::golden::{ADAMW, Golden, close, contexts, near};
use super::loss_and_gradients;

/// Every case of the script.
fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters");
    let mut names: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    assert!(names.len() >= 7, "{names:?}");
    names.into_iter().map(Case::open).collect()
}

/// An adapter with its base model and golden figures.
struct Case {
    name: String,
    /// The sequences and figures; `architecture` and `dir` are the base model's.
    golden: Golden,
    loaded: LoadedAdapter,
    adaptation: Adaptation,
    quantised: bool,
}

impl Case {
    fn open(dir: PathBuf) -> Self {
        let text = std::fs::read(dir.join("golden.json")).unwrap();
        let json: Value = serde_json::from_slice(&text).unwrap();
        let base = dir.join("../../tiny").join(json["base"].as_str().unwrap());
        let file = dir.join("golden.safetensors");
        let mut architecture = Architecture::from_file(&base.join("config.json")).unwrap();
        let format = match json["quantization"].as_str() {
            Some("nf4") => Some(StoredFormat::NF4),
            Some("int8") => Some(StoredFormat::INT8),
            _ => None,
        };
        if let Some(format) = format {
            architecture.quantize_linears(format).unwrap();
        }
        let golden = Golden {
            tensors: candle_core::safetensors::load(file, &Device::Cpu).unwrap(),
            architecture,
            dir: base,
            json,
        };
        let loaded = adapter::load(&dir.join("adapter")).unwrap();
        Self {
            quantised: format.is_some(),
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            adaptation: loaded.adaptation(&golden.architecture.layout()).unwrap(),
            loaded,
            golden,
        }
    }

    fn weights(&self) -> Weights {
        let file = self.golden.dir.join("model.safetensors");
        Weights::open(&[file], &self.golden.architecture).unwrap()
    }

    fn model(&self) -> TrainableModel {
        let weights = self.weights();
        TrainableModel::with_adapters(
            &self.golden.architecture,
            &self.adaptation,
            &|name, shape| weights.frozen(name, shape, Precision::F32, &Device::Cpu),
            initial_values(&weights, Some(&self.loaded), &AdapterStart::default()).unwrap(),
            &Device::Cpu,
        )
        .unwrap()
    }

    fn step(
        &self,
        context: Context<'_>,
        model: &TrainableModel,
        recompute: Recompute,
    ) -> (f64, wattune::ops::Gradients) {
        let batch = self.golden.batch(&[0, 1]);
        let slots = model.parameters.slots().len();
        loss_and_gradients(context, &model.decoder, &batch, slots, recompute)
    }
}

#[test]
fn losses_and_every_gradient_equal_those_of_peft() {
    for case in cases() {
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let model = case.model();
            for recompute in [Recompute::NONE, Recompute::lowest(1), Recompute::ALL] {
                let (loss, gradients) = case.step(context, &model, recompute);
                near(&case.name, loss, case.golden.number("loss"));
                let slots = model.parameters.slots();
                assert_eq!(slots.len(), case.golden.tensors.len(), "{}", case.name);
                for (i, slot) in slots.iter().enumerate() {
                    let name = format!("{}: {}", case.name, slot.name);
                    let found = gradients.get(i).expect(&name);
                    close(
                        &name,
                        found,
                        &case.golden.tensors[&format!("grad.{}", slot.name)],
                    );
                }
            }
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_torch() {
    for case in cases() {
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let model = case.model();
            for (i, expected) in case.golden.json["steps"]
                .as_array()
                .unwrap()
                .iter()
                .enumerate()
            {
                let (loss, gradients) = case.step(context, &model, Recompute::NONE);
                let what = format!("{}: loss of step {i}", case.name);
                near(&what, loss, expected["loss"].as_f64().unwrap());
                let flat = gradients.flat(&model.parameters).unwrap();
                let lr = expected["lr"].as_f64().unwrap();
                ADAMW
                    .step(context, &model.parameters, &flat, lr, i as u64 + 1)
                    .unwrap();
            }
            let (loss, _) = case.step(context, &model, Recompute::NONE);
            near(&case.name, loss, case.golden.number("loss_after"));
        }
    }
}

#[test]
fn the_forecast_is_what_was_executed() {
    for case in cases() {
        let counter = WorkCounter::default();
        let architecture = &case.golden.architecture;
        let shape =
            ModelShape::with_adapters(architecture, &case.adaptation, false, Precision::F32);
        let (lengths, batch) = (case.golden.lengths(), case.golden.batch(&[0, 1]));
        let loss_tokens = batch.loss_tokens();
        for context in contexts(&counter) {
            let model = case.model();
            for recompute in [Recompute::NONE, Recompute::lowest(1), Recompute::ALL] {
                case.step(context, &model, recompute);
                let forecast = shape.training(&lengths, loss_tokens, recompute);
                assert_eq!(counter.take(), forecast, "{} {recompute:?}", case.name);
            }
            model.decoder.losses(context, &batch).unwrap();
            let forecast = shape.evaluation(&lengths, loss_tokens);
            assert_eq!(counter.take(), forecast, "{}", case.name);
        }
    }
}

/// A merged model without its adapter computes what PEFT's model does. An adapter of quantised weights is merged into the weights
/// they were made from, which have another loss.
#[test]
fn a_merged_model_has_the_loss_of_the_adapted_one() {
    for case in cases().into_iter().filter(|case| !case.quantised) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        adapter::merge(&MergeJob {
            weights: MergeWeights::Files(&[case.golden.dir.join("model.safetensors")]),
            stored_names: &BTreeMap::new(),
            layout: &case.golden.architecture.layout(),
            adapter: &case.loaded,
            adaptation: &case.adaptation,
            other_head: None,
            other_files: &|_| Ok(()),
            out: &out,
            max_shard: Bytes(1 << 30),
        })
        .unwrap();
        let mut architecture = case.golden.architecture.clone();
        architecture.tie_word_embeddings &= !case.adaptation.unties;
        let weights = Weights::open(&[out.join("model.safetensors")], &architecture).unwrap();
        let source = WeightSource {
            tied: architecture.tie_word_embeddings,
            weight: &|name, _| {
                let tensor = weights.get(name, DType::F32, &Device::Cpu)?;
                Ok(Weight::frozen(tensor))
            },
            lora: &|_| Ok(None),
        };
        let decoder = Decoder::assemble(&architecture, &source, &Device::Cpu).unwrap();
        let counter = WorkCounter::default();
        let context = Context::new(&counter, Precision::F32);
        let losses = decoder
            .losses(context, &case.golden.batch(&[0, 1]))
            .unwrap();
        let mean = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len() as f64;
        near(&case.name, mean, case.golden.number("loss"));
    }
}

/// What is saved under PEFT's names is what PEFT saved.
#[test]
fn a_saved_adapter_has_the_tensors_that_peft_saved() {
    for case in cases() {
        let model = case.model();
        let mut names = Vec::new();
        for tensor in case.adaptation.tensors() {
            names.extend(tensor.names());
        }
        names.sort();
        let stored: Vec<String> = case.loaded.tensors.keys().cloned().collect();
        assert_eq!(names, stored, "{}", case.name);
        assert_eq!(model.parameters.len(), case.adaptation.parameters());
    }
}
