//! Initialisations that change the base weights against PEFT: factors, gradients, ten AdamW steps, converted files.
//!
//! The golden files are made by `scripts/adapter_inits.py`, which documents their contents.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;
use wattune::adapter::{Adaptation, LoraInit, PeftConfig, load};
use wattune::model::{
    AdapterStart, Architecture, Recompute, TrainableModel, Weights, initial_values,
};
use wattune::ops::Context;
use wattune::work::{Precision, WorkCounter};

use super::golden::{ADAMW, Golden, close, near};
use super::loss_and_gradients;

/// A case of the script: its figures, and our model with a new adapter.
struct Case {
    golden: Golden,
    weights: Weights,
    adaptation: Adaptation,
    start: AdapterStart,
}

impl Case {
    fn open(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/adapter_inits")
            .join(name);
        let text = std::fs::read(dir.join("golden.json")).unwrap();
        let json: Value = serde_json::from_slice(&text).unwrap();
        let base = dir.join("../../tiny").join(json["base"].as_str().unwrap());
        let file = dir.join("golden.safetensors");
        let golden = Golden {
            tensors: candle_core::safetensors::load(file, &Device::Cpu).unwrap(),
            architecture: Architecture::from_file(&base.join("config.json")).unwrap(),
            dir: base,
            json,
        };
        let mut keywords = golden.json["settings"].clone();
        keywords["r"] = 4.into();
        keywords["lora_alpha"] = 12.into();
        let init = keywords["init_lora_weights"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        let config = PeftConfig::parse(&keywords.to_string(), Path::new("settings")).unwrap();
        let mut settings = config.settings();
        settings.init_lora_weights = init;
        let adaptation = Adaptation::select(&golden.architecture.layout(), &settings).unwrap();
        let file = golden.dir.join("model.safetensors");
        let weights = Weights::open(&[file], &golden.architecture).unwrap();
        Self {
            start: AdapterStart::new(&weights, &adaptation, 3).unwrap(),
            golden,
            weights,
            adaptation,
        }
    }

    fn model(&self) -> TrainableModel {
        let weight = |name: &str, shape: &[usize]| {
            let (start, device) = (&self.start, &Device::Cpu);
            self.weights
                .frozen_without(start, name, shape, Precision::F32, device)
        };
        let values = initial_values(&self.weights, None, &self.start).unwrap();
        let architecture = &self.golden.architecture;
        TrainableModel::with_adapters(
            architecture,
            &self.adaptation,
            &weight,
            values,
            &Device::Cpu,
        )
        .unwrap()
    }

    /// PEFT's tensor `kind.NAME` with the signs of its components, the rows of A and columns of B, as ours have them: singular
    /// vectors have no sign of their own.
    fn expected(&self, kind: &str, name: &str, own: &Tensor) -> Tensor {
        let tensor = &self.golden.tensors[&format!("{kind}.{name}")];
        let initial = &self.golden.tensors[&format!("initial.{name}")];
        let axis = usize::from(name.contains("lora_A"));
        let products = (own * initial).unwrap().sum_keepdim(axis).unwrap();
        tensor.broadcast_mul(&products.sign().unwrap()).unwrap()
    }
}

#[test]
fn factors_gradients_and_ten_steps_equal_those_of_peft() {
    for name in ["pissa", "pissa_patterns", "olora"] {
        let case = Case::open(name);
        let model = case.model();
        let counter = WorkCounter::default();
        let context = Context::new(&counter, Precision::F32);
        let slots = model.parameters.slots();
        let step = || {
            let batch = case.golden.batch(&[0, 1]);
            loss_and_gradients(
                context,
                &model.decoder,
                &batch,
                slots.len(),
                Recompute::NONE,
            )
        };
        let (loss, gradients) = step();
        near(name, loss, case.golden.number("base_loss"));
        near(name, loss, case.golden.number("loss"));
        for (i, slot) in slots.iter().enumerate() {
            let what = format!("{name}: {}", slot.name);
            let own = model.parameters.weight(i).unwrap();
            let own = own.tensor;
            close(&what, &own, &case.expected("initial", &slot.name, &own));
            let gradient = gradients.get(i).expect(&what);
            close(&what, gradient, &case.expected("grad", &slot.name, &own));
        }
        for (i, expected) in case.golden.json["steps"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            let (loss, gradients) = step();
            near(
                &format!("{name}: loss of step {i}"),
                loss,
                expected["loss"].as_f64().unwrap(),
            );
            let flat = gradients.flat(&model.parameters).unwrap();
            let lr = expected["lr"].as_f64().unwrap();
            ADAMW
                .step(context, &model.parameters, &flat, lr, i as u64 + 1)
                .unwrap();
        }
        near(name, step().0, case.golden.number("loss_after"));
    }
}

/// PEFT draws A with a standard deviation of 1 / r.
#[test]
fn a_gaussian_start_has_pefts_deviation() {
    let case = Case::open("pissa");
    let mut adaptation = case.adaptation.clone();
    adaptation.init = LoraInit::Gaussian;
    let start = AdapterStart::new(&case.weights, &adaptation, 5).unwrap();
    let mut values = initial_values(&case.weights, None, &start).unwrap();
    let tensors = adaptation.tensors();
    let drawn: Vec<f32> = tensors
        .iter()
        .filter(|tensor| tensor.name.contains("lora_A"))
        .flat_map(|tensor| values(tensor).unwrap())
        .collect();
    let n = drawn.len() as f64;
    let variance = drawn.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
    // r = 4; three standard errors of a variance, 3 sqrt(2 / n) of it.
    assert!(
        (variance - 0.0625).abs() < 0.0625 * 3.0 * (2.0 / n).sqrt(),
        "{variance} of {n}"
    );
}

/// PEFT's converted adapter on the original weights.
#[test]
fn a_converted_adapter_of_peft_has_its_loss() {
    for name in ["pissa", "pissa_patterns", "olora"] {
        let case = Case::open(name);
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapter_inits");
        let loaded = load(&dir.join(name).join("adapter")).unwrap();
        let layout = case.golden.architecture.layout();
        let adaptation = loaded.adaptation(&layout).unwrap();
        assert_eq!(adaptation.sites.len(), case.adaptation.sites.len());
        let start = AdapterStart::default();
        let weight = |name: &str, shape: &[usize]| {
            case.weights
                .frozen(name, shape, Precision::F32, &Device::Cpu)
        };
        let values = initial_values(&case.weights, Some(&loaded), &start).unwrap();
        let architecture = &case.golden.architecture;
        let model =
            TrainableModel::with_adapters(architecture, &adaptation, &weight, values, &Device::Cpu)
                .unwrap();
        let counter = WorkCounter::default();
        let context = Context::new(&counter, Precision::F32);
        let losses = model
            .decoder
            .losses(context, &case.golden.batch(&[0, 1]))
            .unwrap();
        let mean = losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len() as f64;
        near(name, mean, case.golden.number("converted_loss"));
    }
}
