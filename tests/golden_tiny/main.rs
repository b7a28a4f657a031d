//! Tiny random models against transformers and PEFT: logits, losses, every gradient, ten AdamW steps; and forecast against execution.
//!
//! The golden files are made by `scripts/reference.py`, which documents their contents.

mod adapters;
mod experts;
mod golden;
mod inits;
mod merging;

use candle_core::{Device, Tensor};
use golden::{ADAMW, Golden, close, contexts, near};
use wattune::adapter::Site;
use wattune::model::{
    Architecture, BackwardOptions, Batch, Decoder, Dropout, ModelShape, Recompute, Sampling,
    Session,
};
use wattune::ops::{Context, Gradients, Lora, Parameters, Rope};
use wattune::work::{Precision, WorkCounter};

/// Variants of Llama.
const LLAMA: [&str; 5] = ["gqa", "tied", "biases", "qwen2", "llama3rope"];
const FAMILIES: [&str; 28] = [
    "hunyuan",
    "phi",
    "qwen3",
    "smollm3",
    "granite",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "starcoder2",
    "stablelm",
    "gemma3_vision",
    "ministral3",
    "gpt2",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "exaone4",
    "ernie4_5",
    "seed_oss",
    "helium",
    "qwen3_moe",
    "olmoe",
    "mixtral",
];
const CLASSIFIERS: [&str; 12] = [
    "bert_regression",
    "llama_labels",
    "bert_weighted",
    "bert_tokens",
    "qwen2_tokens",
    "bert",
    "roberta",
    "electra",
    "distilbert",
    "llama_score",
    "qwen2_score",
    "qwen3_score",
];

fn decoders() -> impl Iterator<Item = &'static str> {
    LLAMA.into_iter().chain(FAMILIES)
}

/// Models with a golden loss, gradients and steps.
fn full() -> impl Iterator<Item = &'static str> {
    decoders().chain(CLASSIFIERS)
}

const LOGITS_ONLY: [&str; 6] = [
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "mistral",
    "neox_serial",
];

#[test]
fn logits_equal_those_of_transformers() {
    for name in full().chain(LOGITS_ONLY) {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let decoder = golden.frozen();
            for s in 0..golden.lengths().len() {
                let logits = decoder.logits(context, &golden.batch(&[s])).unwrap();
                let key = format!("base.logits.{s}");
                close(
                    &format!("{name}: logits {s}"),
                    &logits.reshape(golden.tensors[&key].dims()).unwrap(),
                    &golden.tensors[&key],
                );
            }
        }
    }
}

/// Token by token, with the adapter, past the first capacity of the KV cache, and past the length at
/// which LongRoPE changes the rotation of every position.
#[test]
fn decoding_token_by_token_gives_the_logits_of_one_pass() {
    for name in decoders() {
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
            let one_pass = |tokens: &[u32]| {
                let targets = vec![tokens[1]];
                let batch = Batch::new(
                    tokens,
                    &[tokens.len()],
                    vec![0],
                    &[0],
                    targets,
                    &Device::Cpu,
                );
                decoder.logits(context, &batch.unwrap()).unwrap()
            };
            let whole = one_pass(&tokens);
            let mut ropes = golden.architecture.ropes.iter();
            let long_above = ropes.find_map(Rope::long_above).unwrap_or(0);
            let mut session = Session::new(&decoder, context);
            session.read(&tokens[..5]).unwrap();
            for t in 5..tokens.len() {
                let logits =
                    Tensor::new(session.read(&tokens[t..t + 1]).unwrap(), &Device::Cpu).unwrap();
                let expected = if t < long_above {
                    one_pass(&tokens[..=t]).get(t)
                } else {
                    whole.get(t)
                };
                close(
                    &format!("{name}: logits of token {t}"),
                    &logits,
                    &expected.unwrap(),
                );
            }
        }
    }
}

#[test]
fn greedy_ids_equal_those_of_transformers() {
    for name in FAMILIES {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        for context in contexts(&counter) {
            let (decoder, _) = golden.adapted();
            let mut session = Session::new(&decoder, context);
            let mut logits = session
                .read(&golden.list("input_ids")[..golden.lengths()[0]])
                .unwrap();
            for expected in golden.list("greedy") {
                assert_eq!(Sampling::GREEDY.choose(&logits, 0), expected, "{name}");
                logits = session.read(&[expected]).unwrap();
            }
        }
    }
}

#[test]
fn older_configs_give_the_same_architecture() {
    for name in ["llama3rope", "linear", "dynamic", "yarn", "longrope"] {
        let golden = Golden::open(name);
        let older = Architecture::from_file(&golden.dir.join("config_v4.json")).unwrap();
        assert_eq!(older, golden.architecture, "{name}");
    }
}

fn options(scale: f64, recompute: Recompute) -> BackwardOptions {
    BackwardOptions {
        scale,
        recompute,
        dropout: None,
    }
}

/// No dropout, and some.
const DROPOUT: [Option<Dropout>; 2] = [
    None,
    Some(Dropout {
        p: 0.3,
        seed: 5,
        step: 2,
    }),
];

fn loss_and_gradients(
    context: Context<'_>,
    decoder: &Decoder,
    batch: &Batch,
    slots: usize,
    recompute: Recompute,
) -> (f64, Gradients) {
    let mut gradients = Gradients::new(slots);
    let scale = 1.0 / batch.loss_weight(decoder.architecture());
    let losses = decoder
        .losses_and_gradients(context, batch, options(scale, recompute), &mut gradients)
        .unwrap();
    (
        losses.iter().map(|l| f64::from(*l)).sum::<f64>() * scale,
        gradients,
    )
}

#[test]
fn losses_and_every_gradient_equal_those_of_peft() {
    for name in full() {
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
                            &golden.gradient(kind, &slot.name),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_torch() {
    for name in full() {
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
                let norm = ADAMW
                    .step(
                        context,
                        &parameters,
                        &gradients.flat(&parameters).unwrap(),
                        expected["lr"].as_f64().unwrap(),
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
    let options = options(scale, Recompute::NONE);
    for s in [0, 1] {
        decoder
            .losses_and_gradients(context, &golden.batch(&[s]), options, &mut apart)
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
    for name in full() {
        let golden = Golden::open(name);
        let counter = WorkCounter::default();
        let (lengths, batch) = (golden.lengths(), golden.batch(&[0, 1]));
        let loss_tokens = batch.loss_tokens();
        let adaptation = golden.adaptation();
        let lora =
            ModelShape::with_adapters(&golden.architecture, &adaptation, false, Precision::F32);
        let full = ModelShape::fully_trained(&golden.architecture, Precision::F32);
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

/// A small model's batch is split for data parallelism: results and work are those of the whole batch, bytes the same on any number of
/// threads.
#[test]
fn shards_of_a_batch_give_the_results_of_the_whole() {
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
        for dropout in DROPOUT {
            let options = BackwardOptions {
                dropout,
                ..options(1e-3, Recompute::NONE)
            };
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
                    let mut gradients = Gradients::new(slots.len());
                    let losses = decoder
                        .losses_and_gradients(context, &batch, options, &mut gradients)
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
fn gradients_are_the_same_bytes_however_many_blocks_are_recomputed() {
    let golden = Golden::open("gqa");
    let (decoder, parameters) = golden.adapted();
    let (batch, slots, counter) = (
        golden.batch(&[0, 1]),
        parameters.slots().len(),
        WorkCounter::default(),
    );
    for precision in [Precision::F32, Precision::Bf16] {
        for dropout in DROPOUT {
            let gradient_bits = |recompute| {
                let mut gradients = Gradients::new(slots);
                let context = Context::new(&counter, precision);
                let options = BackwardOptions {
                    dropout,
                    ..options(0.1, recompute)
                };
                decoder
                    .losses_and_gradients(context, &batch, options, &mut gradients)
                    .unwrap();
                bits(&gradients, slots)
            };
            let saved = gradient_bits(Recompute::NONE);
            for recompute in [Recompute::lowest(1), Recompute::lowest(2), Recompute::ALL] {
                assert!(
                    gradient_bits(recompute) == saved,
                    "{precision:?} {dropout:?} {recompute:?}"
                );
            }
        }
    }
}

/// Two trained matrices, A and B, on one site.
fn lora_parameters(site: &Site) -> Parameters {
    let shapes = [
        ("lora_A", [site.r, site.in_features]),
        ("lora_B", [site.out_features, site.r]),
    ];
    let tensors = shapes.map(|(factor, shape)| {
        let values = (0..shape[0] * shape[1])
            .map(|i| ((i * 37 % 11) as f32 - 5.0) / 20.0)
            .collect();
        (format!("{}.{factor}", site.path), shape.to_vec(), values)
    });
    Parameters::new(tensors.to_vec(), &Device::Cpu).unwrap()
}

#[test]
fn backward_of_a_partly_adapted_model_stops_at_the_lowest_adapter() {
    let golden = Golden::open("gqa");
    for adapted in [
        "layers.1.mlp.down_proj",
        "layers.1.mlp.up_proj",
        "layers.1.self_attn.o_proj",
        "layers.1.self_attn.v_proj",
        "layers.0.self_attn.q_proj",
    ] {
        let sites = golden.sites();
        let site = sites.iter().find(|s| s.path.ends_with(adapted)).unwrap();
        let parameters = lora_parameters(site);
        let decoder = golden.with_adapters(&|path| {
            if path != site.path {
                return Ok(None);
            }
            Ok(Some(Lora {
                a: parameters.weight(0)?,
                b: parameters.weight(1)?,
                bias: None,
                magnitude: None,
                scaling: 0.5,
            }))
        });
        let sites = vec![site.clone()].into();
        let shape = ModelShape::with_adapters(&golden.architecture, &sites, false, Precision::F32);
        let counter = WorkCounter::default();
        let batch = golden.batch(&[0, 1]);
        let run = |recompute| {
            let context = Context::new(&counter, Precision::F32);
            loss_and_gradients(context, &decoder, &batch, 2, recompute)
        };
        let forecast =
            |recompute| shape.training(&golden.lengths(), batch.loss_tokens(), recompute);
        let (loss, gradients) = run(Recompute::NONE);
        assert_eq!(counter.take(), forecast(Recompute::NONE), "{adapted}");
        // The recomputed block is the lowest that the backward pass visits, and all of the work that is done twice.
        let (again, same) = run(Recompute::lowest(1));
        assert_eq!(counter.take(), forecast(Recompute::lowest(1)), "{adapted}");
        assert!(
            again == loss && bits(&same, 2) == bits(&gradients, 2),
            "{adapted}"
        );
        // A finite difference on one element of B: its gradient is right.
        let h = 1e-2;
        let mut rows = parameters.snapshot().unwrap();
        rows[0][parameters.slots()[1].offset + 1] += h;
        for (index, row) in rows.iter().enumerate() {
            parameters.restore_row(index, row).unwrap();
        }
        let (moved, _) = run(Recompute::NONE);
        let slope = (moved - loss) / f64::from(h);
        let gradient = gradients.get(1).unwrap().flatten_all().unwrap();
        let gradient = f64::from(gradient.to_vec1::<f32>().unwrap()[1]);
        assert!(
            (slope - gradient).abs() < 2e-3 + 0.05 * slope.abs(),
            "{adapted}: slope {slope}, gradient {gradient}"
        );
    }
}
