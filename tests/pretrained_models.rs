//! Per-token losses and greedy text of real pretrained models, against golden files made by independent implementations.

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::Value;
use wattune::model::{Architecture, Batch, Decoder, Sampling, Session, WeightSource, Weights};
use wattune::ops::{Context, Weight};
use wattune::work::{Precision, WorkCounter};

fn load(dir: &Path) -> Decoder {
    let architecture = Architecture::from_file(&dir.join("config.json")).unwrap();
    let weights = Weights::open(&[dir.join("model.safetensors")], &architecture).unwrap();
    let weight = |name: &str, _: &[usize]| {
        Ok(Weight::frozen(weights.get(
            name,
            DType::F32,
            &Device::Cpu,
        )?))
    };
    Decoder::assemble(
        &architecture,
        &WeightSource {
            tied: architecture.tie_word_embeddings,
            weight: &weight,
            lora: &|_| Ok(None),
        },
        &Device::Cpu,
    )
    .unwrap()
}

fn numbers<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| read(v).unwrap())
        .collect()
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().map(|v| v as u32)
}

fn check(model: &str, reference: bool) {
    let Some(assets) = common::assets(&format!("pretrained_models::{model}")) else {
        return;
    };
    let dir = assets.join("models").join(model);
    let golden: Value =
        serde_json::from_slice(&std::fs::read(dir.join("reference/golden.json")).unwrap()).unwrap();
    let decoder = load(&dir);
    let counter = WorkCounter::default();
    let context = Context {
        reference,
        ..Context::new(&counter, Precision::F32)
    };

    let stories = golden["stories"].as_array().unwrap();
    let ids: Vec<Vec<u32>> = stories.iter().map(|s| numbers(&s["ids"], id)).collect();
    let (mut tokens, mut positions, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for ids in &ids {
        positions.extend((0..ids.len() - 1).map(|i| (tokens.len() + i) as u32));
        targets.extend(&ids[1..]);
        tokens.extend(ids);
    }
    let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
    let examples = (0..ids.len() as u64).collect();
    let batch = Batch::new(
        &tokens,
        &lengths,
        examples,
        &positions,
        targets,
        &Device::Cpu,
    )
    .unwrap();
    let losses = decoder.losses(context, &batch).unwrap();
    let mut left = losses.as_slice();
    for (s, story) in stories.iter().enumerate() {
        let (own, rest) = left.split_at(ids[s].len() - 1);
        left = rest;
        for (i, (loss, expected)) in own
            .iter()
            .zip(numbers(&story["nll_first32"], Value::as_f64))
            .enumerate()
        {
            assert!(
                (f64::from(*loss) - expected).abs() < 1e-4,
                "{model}: story {s}, token {i}: {loss}, golden {expected}"
            );
        }
        let mean = own.iter().map(|loss| f64::from(*loss)).sum::<f64>() / own.len() as f64;
        let expected = story["mean_nll"].as_f64().unwrap();
        assert!(
            (mean - expected).abs() < 1e-4,
            "{model}: story {s}: mean {mean}, golden {expected}"
        );
    }

    let greedy = numbers(&golden["greedy_ids"], id);
    let mut session = Session::new(&decoder, context);
    let mut logits = session.read(&greedy[..1]).unwrap();
    for (i, expected) in greedy.iter().enumerate().skip(1) {
        let token = Sampling::GREEDY.choose(&logits, i as u64);
        assert_eq!(token, *expected, "{model}: greedy token {i}");
        logits = session.read(&[token]).unwrap();
    }
}

#[test]
fn tinystories_656k_equals_its_golden_file() {
    check("TinyStories-656K", false);
}

#[test]
fn tinystories_656k_by_the_reference_ops_equals_its_golden_file() {
    check("TinyStories-656K", true);
}

#[test]
fn stories260k_equals_its_golden_file() {
    check("stories260K", false);
}

/// Published configurations: the parameters are those that transformers counts, or the model type
/// is refused by name.
#[test]
fn published_configurations_have_their_parameters() {
    let Some(assets) = common::assets("published_configurations_have_their_parameters") else {
        return;
    };
    let configs = assets.join("configs");
    let read =
        |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let counts = read(&configs.join("param_counts.json"));
    let mut counted = 0;
    for (file, expected) in counts.as_object().unwrap() {
        match Architecture::from_config(&read(&configs.join(file))) {
            Ok(found) => {
                assert_eq!(found.parameters(), expected.as_u64().unwrap(), "{file}");
                counted += 1;
            }
            Err(error) => assert!(error.to_string().contains("model type"), "{file}: {error}"),
        }
    }
    assert_eq!(counted, 49);
    // The language model of transformers' Mistral3ForConditionalGeneration, whose head is tied.
    let composite = read(&configs.join("mlc_presets/ministral3_3b_2512.json"));
    let decoder = Architecture::from_config(&composite).unwrap();
    assert_eq!(decoder.parameters(), 3_429_006_336);
}
