//! Tiny random models against transformers and PEFT: logits, losses, every gradient, ten AdamW steps; and forecast against execution.
//!
//! The golden files are made by `scripts/reference.py`, which documents their contents.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use wattune::adapter::Site;
use wattune::model::{
    Architecture, Batch, Decoder, ModelShape, Recompute, Session, WeightSource, Weights,
};
use wattune::ops::{AdamW, Context, Gradients, Lora, Parameters, Weight};
use wattune::work::{Precision, WorkCounter};

/// What the whole project is held to.
const TOLERANCE: f32 = 1e-4;
const SCALING: f64 = 12.0 / 4.0;
const R: usize = 4;

struct Golden {
    dir: PathBuf,
    tensors: HashMap<String, Tensor>,
    json: Value,
    architecture: Architecture,
}

impl Golden {
    fn open(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/tiny")
            .join(name);
        let tensors =
            candle_core::safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
        let json =
            serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let architecture = Architecture::from_file(&dir.join("config.json")).unwrap();
        Self {
            dir,
            tensors,
            json,
            architecture,
        }
    }

    fn lengths(&self) -> Vec<usize> {
        self.json["segments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as usize)
            .collect()
    }

    fn list(&self, key: &str) -> Vec<u32> {
        self.json[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect()
    }

    /// The golden sequences `which` as one batch.
    fn batch(&self, which: &[usize]) -> Batch {
        let (ids, lengths) = (self.list("input_ids"), self.lengths());
        let mask = if self.json.get("loss_mask").is_some() {
            self.list("loss_mask")
        } else {
            vec![0; ids.len()]
        };
        let (mut tokens, mut positions, mut targets) = (vec![], vec![], vec![]);
        for s in which {
            let start: usize = lengths[..*s].iter().sum();
            let base = tokens.len();
            tokens.extend(&ids[start..start + lengths[*s]]);
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
    }

    fn base(&self, name: &str) -> Tensor {
        let weights =
            Weights::open(&[self.dir.join("model.safetensors")], &self.architecture).unwrap();
        weights.get(name, DType::F32, &Device::Cpu).unwrap()
    }

    fn frozen(&self) -> Decoder {
        let weight = |name: &str, _: &[usize]| Ok(Weight::frozen(self.base(name)));
        Decoder::assemble(
            &self.architecture,
            &WeightSource {
                weight: &weight,
                lora: &|_| Ok(None),
            },
            &Device::Cpu,
        )
        .unwrap()
    }

    fn sites(&self) -> Vec<Site> {
        let modules = self.architecture.modules();
        let linears = modules.into_iter().filter(|m| m.path != "lm_head");
        let site = |m: wattune::adapter::Module| Site {
            path: m.path,
            in_features: m.in_features,
            out_features: m.out_features,
            r: R,
            lora_alpha: 12.0,
            scaling: SCALING,
        };
        linears.map(site).collect()
    }

    /// The model with PEFT's adapter, and the names of its tensors in slot order.
    fn adapted(&self) -> (Decoder, Parameters) {
        let file = candle_core::safetensors::load(
            self.dir.join("adapter/adapter_model.safetensors"),
            &Device::Cpu,
        )
        .unwrap();
        let mut tensors = Vec::new();
        for site in self.sites() {
            for half in ["lora_A", "lora_B"] {
                let name = format!("base_model.model.{}.{half}.weight", site.path);
                let tensor = &file[&name];
                let values = tensor.flatten_all().unwrap().to_vec1().unwrap();
                tensors.push((name, tensor.dims().to_vec(), values));
            }
        }
        let parameters = Parameters::new(tensors, &Device::Cpu).unwrap();
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
                scaling: SCALING,
            }))
        };
        let weight = |name: &str, _: &[usize]| Ok(Weight::frozen(self.base(name)));
        let decoder = Decoder::assemble(
            &self.architecture,
            &WeightSource {
                weight: &weight,
                lora: &lora,
            },
            &Device::Cpu,
        )
        .unwrap();
        (decoder, parameters)
    }

    /// The model with every weight trained.
    fn trained(&self) -> (Decoder, Parameters) {
        let tensors = self.architecture.tensors().into_iter().map(|t| {
            let values = self.base(&t.name).flatten_all().unwrap().to_vec1().unwrap();
            (t.name, t.shape, values)
        });
        let parameters = Parameters::new(tensors.collect(), &Device::Cpu).unwrap();
        let weight = |name: &str, _: &[usize]| {
            parameters.weight(
                parameters
                    .slots()
                    .iter()
                    .position(|s| s.name == name)
                    .unwrap(),
            )
        };
        let decoder = Decoder::assemble(
            &self.architecture,
            &WeightSource {
                weight: &weight,
                lora: &|_| Ok(None),
            },
            &Device::Cpu,
        )
        .unwrap();
        (decoder, parameters)
    }

    fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap()
    }
}

fn close(what: &str, found: &Tensor, golden: &Tensor) {
    let golden = golden.to_dtype(DType::F32).unwrap();
    assert_eq!(found.dims(), golden.dims(), "{what}");
    let scale = golden
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap()
        .max(1.0);
    let difference = (found - golden)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(
        difference <= TOLERANCE * scale,
        "{what}: differs by {difference} at a scale of {scale}"
    );
}

fn near(what: &str, found: f64, golden: f64) {
    assert!(
        (found - golden).abs() <= f64::from(TOLERANCE) * golden.abs().max(1.0),
        "{what}: {found}, golden {golden}"
    );
}

/// Both ways every op can run.
fn contexts(counter: &WorkCounter) -> [Context<'_>; 2] {
    let fused = Context::new(counter, Precision::F32);
    [
        fused,
        Context {
            reference: true,
            ..fused
        },
    ]
}

const FULL: [&str; 5] = ["gqa", "tied", "biases", "qwen2", "llama3rope"];
const LOGITS_ONLY: [&str; 4] = ["linear", "dynamic", "yarn", "mistral"];

#[test]
fn logits_equal_those_of_transformers() {
    for name in FULL.into_iter().chain(LOGITS_ONLY) {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let decoder = golden.frozen();
            for s in 0..golden.lengths().len() {
                let logits = decoder.logits(context, &golden.batch(&[s])).unwrap();
                close(
                    &format!("{name}: logits {s}"),
                    &logits,
                    &golden.tensors[&format!("base.logits.{s}")],
                );
            }
        }
    }
}

/// Read token by token, with the adapter, past any room that the cache of keys and values had at first.
#[test]
fn a_text_read_token_by_token_has_the_logits_of_the_whole() {
    for name in FULL {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let (decoder, _) = golden.adapted();
            let tokens: Vec<u32> = golden
                .list("input_ids")
                .into_iter()
                .cycle()
                .take(240)
                .collect();
            let batch = Batch::new(
                &tokens,
                &[tokens.len()],
                vec![0],
                &[0],
                vec![tokens[1]],
                &Device::Cpu,
            )
            .unwrap();
            let whole = decoder.logits(context, &batch).unwrap();
            let mut session = Session::new(&decoder, context);
            session.read(&tokens[..5]).unwrap();
            for t in 5..tokens.len() {
                let logits =
                    Tensor::new(session.read(&tokens[t..t + 1]).unwrap(), &Device::Cpu).unwrap();
                close(
                    &format!("{name}: logits of token {t}"),
                    &logits,
                    &whole.get(t).unwrap(),
                );
            }
        }
    }
}

#[test]
fn older_configs_are_read_alike() {
    for name in ["llama3rope", "linear", "dynamic", "yarn"] {
        let golden = Golden::open(name);
        let older = Architecture::from_file(&golden.dir.join("config_v4.json")).unwrap();
        assert_eq!(older, golden.architecture, "{name}");
    }
}

fn loss_and_gradients(
    context: Context<'_>,
    decoder: &Decoder,
    batch: &Batch,
    slots: usize,
    recompute: Recompute,
) -> (f64, Gradients) {
    let mut gradients = Gradients::new(slots);
    let scale = 1.0 / batch.loss_tokens() as f64;
    let losses = decoder
        .losses_and_gradients(context, batch, scale, recompute, None, &mut gradients)
        .unwrap();
    (
        losses.iter().map(|l| f64::from(*l)).sum::<f64>() * scale,
        gradients,
    )
}

#[test]
fn losses_and_every_gradient_equal_those_of_peft() {
    for name in FULL {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            for (kind, (decoder, parameters)) in
                [("adapter", golden.adapted()), ("base", golden.trained())]
            {
                for recompute in [Recompute::NONE, Recompute::lowest(1), Recompute::ALL] {
                    let slots = parameters.slots();
                    let (loss, gradients) = loss_and_gradients(
                        context,
                        &decoder,
                        &golden.batch(&[0, 1]),
                        slots.len(),
                        recompute,
                    );
                    near(
                        &format!("{name}: {kind} loss"),
                        loss,
                        golden.number(&format!("{kind}_loss")),
                    );
                    for (i, slot) in slots.iter().enumerate() {
                        let gradient = gradients
                            .get(i)
                            .unwrap_or_else(|| panic!("{name}: `{}` has no gradient", slot.name));
                        close(
                            &format!("{name}: {}", slot.name),
                            gradient,
                            &golden.tensors[&format!("{kind}.grad.{}", slot.name)],
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_torch() {
    for name in FULL {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let (decoder, parameters) = golden.adapted();
            let batch = golden.batch(&[0, 1]);
            for (i, expected) in golden.json["steps"].as_array().unwrap().iter().enumerate() {
                let (loss, gradients) = loss_and_gradients(
                    context,
                    &decoder,
                    &batch,
                    parameters.slots().len(),
                    Recompute::NONE,
                );
                near(
                    &format!("{name}: loss of step {i}"),
                    loss,
                    expected["loss"].as_f64().unwrap(),
                );
                let adamw = AdamW {
                    learning_rate: expected["lr"].as_f64().unwrap(),
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                    max_grad_norm: 1.0,
                };
                let norm = adamw
                    .step(
                        context,
                        &parameters,
                        &gradients.flat(&parameters).unwrap(),
                        i as u64 + 1,
                    )
                    .unwrap();
                // Ten steps at a rate of 1e-2 amplify rounding: two of transformers' own attention variants differ by 2.4e-4 here.
                let golden_norm = expected["grad_norm"].as_f64().unwrap();
                assert!(
                    (norm - golden_norm).abs() < 5e-4 * golden_norm,
                    "{name}: norm of step {i}: {norm}, golden {golden_norm}"
                );
            }
            for (i, slot) in parameters.slots().iter().enumerate() {
                let found = parameters.weight(i).unwrap().tensor;
                close(
                    &format!("{name}: final {}", slot.name),
                    &found,
                    &golden.tensors[&format!("adapter.final.{}", slot.name)],
                );
            }
        }
    }
}

#[test]
fn eight_rows_at_once_and_one_by_one_give_the_same_gradients() {
    let golden = Golden::open("gqa");
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let (decoder, parameters) = golden.adapted();
    let slots = parameters.slots().len();
    let (_, together) = loss_and_gradients(
        context,
        &decoder,
        &golden.batch(&[0, 1]),
        slots,
        Recompute::NONE,
    );
    let mut apart = Gradients::new(slots);
    let scale = 1.0 / golden.batch(&[0, 1]).loss_tokens() as f64;
    for s in [0, 1] {
        decoder
            .losses_and_gradients(
                context,
                &golden.batch(&[s]),
                scale,
                Recompute::NONE,
                None,
                &mut apart,
            )
            .unwrap();
    }
    for i in 0..slots {
        close(
            &parameters.slots()[i].name,
            together.get(i).unwrap(),
            apart.get(i).unwrap(),
        );
    }
}

#[test]
fn the_forecast_is_what_was_executed() {
    for name in FULL {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        let (lengths, batch) = (golden.lengths(), golden.batch(&[0, 1]));
        let loss_tokens = batch.loss_tokens();
        let lora =
            ModelShape::with_adapters(&golden.architecture, &golden.sites(), false, Precision::F32)
                .unwrap();
        let full = ModelShape::fully_trained(&golden.architecture, Precision::F32).unwrap();
        for context in contexts(&counter) {
            for (shape, (decoder, parameters)) in
                [(&lora, golden.adapted()), (&full, golden.trained())]
            {
                for recompute in [Recompute::NONE, Recompute::lowest(1), Recompute::ALL] {
                    loss_and_gradients(
                        context,
                        &decoder,
                        &batch,
                        parameters.slots().len(),
                        recompute,
                    );
                    assert_eq!(
                        counter.take(),
                        shape.training(&lengths, loss_tokens, recompute),
                        "{name} {recompute:?}"
                    );
                }
                decoder.losses(context, &batch).unwrap();
                assert_eq!(
                    counter.take(),
                    shape.evaluation(&lengths, loss_tokens),
                    "{name}"
                );
            }
        }
    }
}

/// A small model's batch is cut into parts, which threads take side by side: what it gives is the whole's, its work is counted as the
/// whole's, and the bytes are the same on any number of threads.
#[test]
fn parts_of_a_batch_give_what_the_whole_gives() {
    let golden = Golden::open("gqa");
    let which: Vec<usize> = (0..)
        .map(|i| i % 2)
        .take(2000 / golden.lengths().iter().sum::<usize>() * 2)
        .collect();
    let batch = golden.batch(&which);
    let lengths: Vec<usize> = which.iter().map(|s| golden.lengths()[*s]).collect();
    assert!(lengths.iter().sum::<usize>() > 1500);
    let counter = WorkCounter::default();
    for (kind, (decoder, parameters)) in [("adapter", golden.adapted()), ("base", golden.trained())]
    {
        let slots = parameters.slots();
        for dropout in [None, Some((0.3, 5, 2))] {
            let run = |threads: usize, reference: bool| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                pool.install(|| {
                    let context = Context {
                        reference,
                        ..Context::new(&counter, Precision::F32)
                    };
                    let (mut gradients, nothing) = (Gradients::new(slots.len()), Recompute::NONE);
                    let losses = decoder
                        .losses_and_gradients(
                            context,
                            &batch,
                            1e-3,
                            nothing,
                            dropout,
                            &mut gradients,
                        )
                        .unwrap();
                    let work = counter.take();
                    assert_eq!(decoder.losses(context, &batch).unwrap().len(), losses.len());
                    (losses, gradients, (work, counter.take()))
                })
            };
            let (whole, [one, two, three]) =
                (run(1, true), [1, 2, 3].map(|threads| run(threads, false)));
            for parts in [&two, &three] {
                assert_eq!(parts.0, one.0, "{kind}: losses");
                assert!(
                    bits(&parts.1, slots.len()) == bits(&one.1, slots.len()),
                    "{kind}: gradients"
                );
                assert_eq!(parts.2, one.2, "{kind}: work");
            }
            assert_eq!(one.2, whole.2, "{kind}: work");
            let of = |losses: &[f32]| Tensor::new(losses, &Device::Cpu).unwrap();
            close(&format!("{kind}: losses"), &of(&one.0), &of(&whole.0));
            for (i, slot) in slots.iter().enumerate() {
                close(&slot.name, one.1.get(i).unwrap(), whole.1.get(i).unwrap());
            }
        }
    }
}

/// The bits of every gradient.
fn bits(gradients: &Gradients, slots: usize) -> Vec<Vec<u32>> {
    let bits = |i| {
        gradients
            .get(i)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
    };
    (0..slots).map(|i| bits(i).collect()).collect()
}

#[test]
fn gradients_are_the_same_bytes_however_many_blocks_are_computed_again() {
    let golden = Golden::open("gqa");
    let (decoder, parameters) = golden.adapted();
    let (batch, slots, counter) = (
        golden.batch(&[0, 1]),
        parameters.slots().len(),
        WorkCounter::default(),
    );
    for precision in [Precision::F32, Precision::Bf16] {
        for dropout in [None, Some((0.3, 5, 2))] {
            let of = |recompute| {
                let mut gradients = Gradients::new(slots);
                let context = Context::new(&counter, precision);
                decoder
                    .losses_and_gradients(context, &batch, 0.1, recompute, dropout, &mut gradients)
                    .unwrap();
                bits(&gradients, slots)
            };
            let kept = of(Recompute::NONE);
            for again in [Recompute::lowest(1), Recompute::lowest(2), Recompute::ALL] {
                assert!(of(again) == kept, "{precision:?} {dropout:?} {again:?}");
            }
        }
    }
}

#[test]
fn a_partly_adapted_model_walks_back_no_further_than_it_must() {
    let golden = Golden::open("gqa");
    let all = golden.sites();
    for keep in [
        "layers.1.mlp.down_proj",
        "layers.1.mlp.up_proj",
        "layers.1.self_attn.o_proj",
        "layers.1.self_attn.v_proj",
        "layers.0.self_attn.q_proj",
    ] {
        let sites: Vec<Site> = all
            .iter()
            .filter(|s| s.path.ends_with(keep))
            .cloned()
            .collect();
        let tensors = sites.iter().flat_map(|s| {
            [
                ("lora_A", [s.r, s.in_features]),
                ("lora_B", [s.out_features, s.r]),
            ]
            .map(|(half, shape)| {
                let values = (0..shape[0] * shape[1])
                    .map(|i| ((i * 37 % 11) as f32 - 5.0) / 20.0)
                    .collect();
                (format!("{}.{half}", s.path), shape.to_vec(), values)
            })
        });
        let parameters = Parameters::new(tensors.collect(), &Device::Cpu).unwrap();
        let lora = |path: &str| match sites.iter().any(|s| s.path == path) {
            true => Ok(Some(Lora {
                a: parameters.weight(0)?,
                b: parameters.weight(1)?,
                scaling: 0.5,
            })),
            false => Ok(None),
        };
        let weight = |name: &str, _: &[usize]| Ok(Weight::frozen(golden.base(name)));
        let decoder = Decoder::assemble(
            &golden.architecture,
            &WeightSource {
                weight: &weight,
                lora: &lora,
            },
            &Device::Cpu,
        )
        .unwrap();
        let shape =
            ModelShape::with_adapters(&golden.architecture, &sites, false, Precision::F32).unwrap();
        let counter = WorkCounter::default();
        let batch = golden.batch(&[0, 1]);
        let context = Context::new(&counter, Precision::F32);
        let (loss, gradients) = loss_and_gradients(context, &decoder, &batch, 2, Recompute::NONE);
        assert_eq!(
            counter.take(),
            shape.training(&golden.lengths(), batch.loss_tokens(), Recompute::NONE),
            "{keep}"
        );
        // One block is computed again: the lowest that the walk comes to, and with it all of the work that is done twice.
        let (again, same) = loss_and_gradients(context, &decoder, &batch, 2, Recompute::lowest(1));
        assert_eq!(
            counter.take(),
            shape.training(&golden.lengths(), batch.loss_tokens(), Recompute::lowest(1)),
            "{keep}"
        );
        assert!(
            again == loss && bits(&same, 2) == bits(&gradients, 2),
            "{keep}"
        );
        // A finite difference on one element of B: the gradient did arrive.
        let h = 1e-2;
        let mut rows = parameters.snapshot().unwrap();
        let at = parameters.slots()[1].offset + 1;
        rows[0][at] += h;
        rows.iter()
            .enumerate()
            .for_each(|(index, row)| parameters.restore_row(index, row).unwrap());
        let (moved, _) = loss_and_gradients(context, &decoder, &batch, 2, Recompute::NONE);
        let slope = (moved - loss) / f64::from(h);
        let gradient = gradients
            .get(1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()[1];
        assert!(
            (slope - f64::from(gradient)).abs() < 2e-3 + 0.05 * slope.abs(),
            "{keep}: slope {slope}, gradient {gradient}"
        );
    }
}
