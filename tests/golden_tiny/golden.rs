//! The golden files of a tiny model, and comparisons with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use wattune::adapter::targets::ModuleKind;
use wattune::adapter::{Adaptation, Site, WeightCopy};
use wattune::error::Result;
use wattune::model::{Architecture, Batch, Decoder, WeightSource, Weights};
use wattune::ops::{AdamW, Context, Lora, Parameters, Weight};
use wattune::work::{Precision, WorkCounter};

/// The optimiser of the ten steps.
pub const ADAMW: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
    lr_ratio: 1.0,
    max_grad_norm: 1.0,
};

/// The project's tolerance, relative to the largest element.
const TOLERANCE: f32 = 1e-4;
const SCALING: f64 = 12.0 / 4.0;
const R: usize = 4;

pub struct Golden {
    pub dir: PathBuf,
    pub tensors: HashMap<String, Tensor>,
    pub json: Value,
    pub architecture: Architecture,
}

impl Golden {
    pub fn open(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/tiny")
            .join(name);
        let tensors =
            candle_core::safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
        let json =
            serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let mut architecture = Architecture::from_file(&dir.join("config.json")).unwrap();
        let json: Value = json;
        if let Ok(weights) = serde_json::from_value(json["class_weights"].clone()) {
            architecture.set_class_weights(weights);
        }
        Self {
            dir,
            tensors,
            json,
            architecture,
        }
    }

    /// config.json.
    pub fn config(&self) -> Value {
        let text = std::fs::read(self.dir.join("config.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub fn lengths(&self) -> Vec<usize> {
        self.json["segments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as usize)
            .collect()
    }

    pub fn list(&self, key: &str) -> Vec<u32> {
        self.json[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect()
    }

    /// The golden sequences `which` as one batch.
    pub fn batch(&self, which: &[usize]) -> Batch {
        let (ids, lengths) = (self.list("input_ids"), self.lengths());
        let mask = if self.json.get("loss_mask").is_some() {
            self.list("loss_mask")
        } else {
            vec![0; ids.len()]
        };
        let (mut tokens, mut positions, mut targets) = (vec![], vec![], vec![]);
        let mut values = vec![];
        for s in which {
            let start: usize = lengths[..*s].iter().sum();
            let base = tokens.len();
            tokens.extend(&ids[start..start + lengths[*s]]);
            if self.json.get("labels").is_some() {
                let marked = |range: std::ops::Range<usize>| range.filter(|i| mask[*i] == 1);
                let before = marked(0..start).count();
                let here = marked(start..start + lengths[*s]);
                positions.extend(here.map(|i| (base + i - start) as u32));
                let count = marked(start..start + lengths[*s]).count();
                targets.extend(&self.list("labels")[before..before + count]);
                let of_segment: Option<Vec<f32>> =
                    serde_json::from_value(self.json["values"][*s].clone()).unwrap();
                values.extend(of_segment.into_iter().flatten());
                continue;
            }
            for i in 1..lengths[*s] {
                if mask[start + i] == 1 {
                    positions.push((base + i - 1) as u32);
                    targets.push(ids[start + i]);
                }
            }
        }
        let chosen: Vec<usize> = which.iter().map(|s| lengths[*s]).collect();
        Batch::new(
            &tokens,
            &chosen,
            vec![0; which.len()],
            &positions,
            targets,
            &Device::Cpu,
        )
        .unwrap()
        .with_values(values)
    }

    fn base(&self, name: &str) -> Tensor {
        let weights =
            Weights::open(&[self.dir.join("model.safetensors")], &self.architecture).unwrap();
        weights.get(name, DType::F32, &Device::Cpu).unwrap()
    }

    fn assemble(
        &self,
        weight: &dyn Fn(&str, &[usize]) -> Result<Weight>,
        lora: &dyn Fn(&str) -> Result<Option<Lora>>,
    ) -> Decoder {
        let source = WeightSource {
            tied: self.architecture.tie_word_embeddings,
            weight,
            lora,
        };
        Decoder::assemble(&self.architecture, &source, &Device::Cpu).unwrap()
    }

    /// The frozen model with these adapters.
    pub fn with_adapters(&self, lora: &dyn Fn(&str) -> Result<Option<Lora>>) -> Decoder {
        self.assemble(&|name, _| Ok(Weight::frozen(self.base(name))), lora)
    }

    pub fn frozen(&self) -> Decoder {
        self.with_adapters(&|_| Ok(None))
    }

    /// What PEFT's adapter trains: LoRA, and a classifier in full.
    pub fn adaptation(&self) -> Adaptation {
        let head = self.architecture.classifier();
        let is_saved = |name: &str| {
            let (path, _) = name.rsplit_once('.').unwrap();
            head.is_some_and(|head| path.ends_with(head) || path.starts_with(&format!("{head}.")))
        };
        let tensors = self.architecture.tensors().into_iter();
        let copies = tensors.filter(|tensor| is_saved(&tensor.name));
        Adaptation {
            copies: copies
                .map(|tensor| WeightCopy {
                    tensor: tensor.name,
                    shape: tensor.shape,
                    aliases: Vec::new(),
                    in_lora_layer: false,
                })
                .collect(),
            ..self.sites().into()
        }
    }

    pub fn sites(&self) -> Vec<Site> {
        let modules = self.architecture.modules();
        let head = self.architecture.output_embedding();
        let linears = modules
            .into_iter()
            .filter(|m| m.path != head && m.kind != ModuleKind::Embedding);
        let site = |m: wattune::adapter::Module| Site {
            path: m.path,
            in_features: m.in_features,
            out_features: m.out_features,
            r: R,
            lora_alpha: 12.0,
            scaling: SCALING,
            kind: m.kind,
        };
        linears.map(site).collect()
    }

    /// The model with PEFT's adapter, and the names of its tensors in slot order.
    pub fn adapted(&self) -> (Decoder, Parameters) {
        let file = candle_core::safetensors::load(
            self.dir.join("adapter/adapter_model.safetensors"),
            &Device::Cpu,
        )
        .unwrap();
        let adaptation = self.adaptation();
        let tensors = adaptation.tensors().into_iter().map(|tensor| {
            let values = file[&tensor.name].flatten_all().unwrap();
            (tensor.name, tensor.shape, values.to_vec1().unwrap())
        });
        let parameters = Parameters::new(tensors.collect(), &Device::Cpu).unwrap();
        let slot = |name: String| parameters.slots().iter().position(|s| s.name == name);
        let lora = |path: &str| {
            let name = |half: &str| format!("base_model.model.{path}.{half}.weight");
            let Some(a) = slot(name("lora_A")) else {
                return Ok(None);
            };
            let b = slot(name("lora_B")).unwrap();
            Ok(Some(Lora {
                a: parameters.weight(a)?,
                b: parameters.weight(b)?,
                bias: None,
                magnitude: None,
                scaling: SCALING,
            }))
        };
        let weight = |name: &str, _: &[usize]| match slot(format!("base_model.model.{name}")) {
            Some(copy) => parameters.weight(copy),
            None => Ok(Weight::frozen(self.base(name))),
        };
        (self.assemble(&weight, &lora), parameters)
    }

    /// The model with every weight trained.
    pub fn trained(&self) -> (Decoder, Parameters) {
        let tensors = self.architecture.tensors().into_iter().map(|t| {
            let values = self.base(&t.name).flatten_all().unwrap().to_vec1().unwrap();
            (t.name, t.shape, values)
        });
        let parameters = Parameters::new(tensors.collect(), &Device::Cpu).unwrap();
        let weight = |name: &str, _: &[usize]| {
            let slot = parameters.slots().iter().position(|s| s.name == name);
            parameters.weight(slot.unwrap())
        };
        (self.assemble(&weight, &|_| Ok(None)), parameters)
    }

    /// The gradient of the base or of the adapter; a transposed weight's as (out, in).
    pub fn gradient(&self, kind: &str, name: &str) -> Tensor {
        let gradient = &self.tensors[&format!("{kind}.grad.{name}")];
        let tensors = self.architecture.tensors();
        let transposed = tensors.iter().any(|t| t.name == name && t.transposed);
        if transposed {
            gradient.t().unwrap()
        } else {
            gradient.clone()
        }
    }

    pub fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap()
    }
}

/// The largest magnitude of `x`'s elements.
fn largest(x: &Tensor) -> f32 {
    let x = x.abs().unwrap().flatten_all().unwrap();
    x.max(0).unwrap().to_scalar().unwrap()
}

pub fn close(what: &str, found: &Tensor, golden: &Tensor) {
    let golden = golden.to_dtype(DType::F32).unwrap();
    assert_eq!(found.dims(), golden.dims(), "{what}");
    let scale = largest(&golden).max(1.0);
    let difference = largest(&(found - golden).unwrap());
    assert!(
        difference <= TOLERANCE * scale,
        "{what}: differs by {difference} at a scale of {scale}"
    );
}

pub fn near(what: &str, found: f64, golden: f64) {
    assert!(
        (found - golden).abs() <= f64::from(TOLERANCE) * golden.abs().max(1.0),
        "{what}: {found}, golden {golden}"
    );
}

/// The fused and the reference path of every op.
pub fn contexts(counter: &WorkCounter) -> [Context<'_>; 2] {
    let fused = Context::new(counter, Precision::F32);
    [
        fused,
        Context {
            reference: true,
            ..fused
        },
    ]
}
