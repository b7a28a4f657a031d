//! Real pretrained weights and data: the training course that PEFT and torch took, step by step, and losses that transformers computes.

use std::path::Path;

use serde_json::Value;

use super::common;
use super::lab::{Lab, flags, number, set};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// The recipe of `scripts/peft_ten_steps.py`: continue PEFT's starting adapter on the first 80 E2E records in file order.
fn ten_steps(assets: &Path) -> Lab {
    let lab = Lab::new();
    lab.records(
        "train.jsonl",
        assets.join("datasets/e2e_nlg/train.jsonl"),
        80,
    );
    let recipe = format!(
        "name = \"ten-steps\"
[model]
id = \"{}\"
[adapter]
init_from = \"{GOLDEN}/tinystories_start_adapter\"
[data]
train = \"train.jsonl\"
format = \"completion\"
max_length = 128
packing = false
shuffle = false
[train]
steps = 10
micro_batch_size = 8
learning_rate = 2e-4
schedule = \"linear\"
warmup_steps = 0
eval_every = 0
save_every = 0
",
        assets.join("models/TinyStories-656K").display()
    );
    lab.write("recipe.toml", &recipe);
    lab
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(Path::new(GOLDEN).join(name)).unwrap()).unwrap()
}

#[test]
fn ten_steps_on_e2e_are_those_of_peft_and_torch() {
    let Some(assets) = common::assets("pretrained::ten_steps_on_e2e_are_those_of_peft_and_torch")
    else {
        return;
    };
    let lab = ten_steps(&assets);
    let plain = golden("tinystories_e2e_ten_steps.json");
    let loraplus = golden("tinystories_loraplus_ten_steps.json");
    for (run, golden, keys) in [
        ("8x1", &plain, &[][..]),
        (
            "1x8",
            &plain,
            &[
                "train.micro_batch_size=1",
                "train.gradient_accumulation_steps=8",
            ],
        ),
        (
            "loraplus",
            &loraplus,
            &["adapter.loraplus_lr_ratio=16.0", "train.weight_decay=0.1"],
        ),
    ] {
        let expected = golden["steps"].as_array().unwrap();
        lab.train(run, &set(keys));
        let steps = lab.lines(&format!("{run}/steps.jsonl"));
        assert_eq!((steps.len(), expected.len()), (10, 10));
        for (step, expected) in steps.iter().zip(expected) {
            for (key, tolerance) in [("/loss", 1e-4), ("/grad_norm", 1e-4), ("/lr", 1e-12)] {
                let (ours, theirs) = (number(step, key), number(expected, key));
                assert!(
                    (ours - theirs).abs() < tolerance,
                    "{run}, step {}: {key} {ours}, PEFT {theirs}",
                    step["step"]
                );
            }
            assert_eq!(
                (&step["tokens"], &step["loss_tokens"]),
                (&expected["tokens"], &expected["loss_tokens"]),
                "{run}"
            );
        }
        // The adapter afterwards: each tensor's norm. AdamW's first steps move every value by about the rate, whatever its gradient.
        let bytes = lab.adapter(run);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let norms = golden["end_norms"].as_object().unwrap();
        assert_eq!(file.names().len(), norms.len());
        for (name, norm) in norms {
            let view = file.tensor(name).unwrap();
            let square = |b: &[u8; 4]| f64::from(f32::from_le_bytes(*b)).powi(2);
            let ours = view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(square)
                .sum::<f64>()
                .sqrt();
            let theirs = norm.as_f64().unwrap();
            assert!(
                (ours / theirs - 1.0).abs() < 1e-4,
                "{run}: {name} {ours}, PEFT {theirs}"
            );
        }
    }
}

#[test]
fn a_packed_row_is_its_records_side_by_side() {
    let Some(assets) = common::assets("pretrained::a_packed_row_is_its_records_side_by_side")
    else {
        return;
    };
    let lab = ten_steps(&assets);
    // Two rows of up to 400 tokens in file order: some number of whole records, which the unpacked run takes as so many rows.
    let packed = set(&[
        "train.steps=1",
        "data.packing=true",
        "data.max_length=400",
        "train.micro_batch_size=2",
    ]);
    let tokens = lab.plan(&packed)["training"]["tokens"].clone();
    let unpacked = |rows: usize| {
        set(&[
            "train.steps=1",
            "data.max_length=400",
            &format!("train.micro_batch_size={rows}"),
        ])
    };
    let rows = (3..40)
        .find(|rows| lab.plan(&unpacked(*rows))["training"]["tokens"] == tokens)
        .expect("whole records in file order");
    lab.train("packed", &packed);
    lab.train("unpacked", &unpacked(rows));
    let (one, other) = (
        &lab.lines("packed/steps.jsonl")[0],
        &lab.lines("unpacked/steps.jsonl")[0],
    );
    assert_eq!(one["loss_tokens"], other["loss_tokens"]);
    for key in ["/loss", "/grad_norm"] {
        assert!(
            (number(one, key) - number(other, key)).abs() < 1e-6,
            "{key}: {one} {other}"
        );
    }
}

/// `eval` on the first 200 validation records against the golden file's loss `name`.
fn check_losses(test: &str, name: &str, more: &[&str]) {
    let Some(assets) = common::assets(test) else {
        return;
    };
    let lab = Lab::new();
    let theirs = &golden("tinystories_e2e_eval.json")[name];
    let (model, data) = (
        assets.join("models/TinyStories-656K"),
        assets.join("datasets/e2e_nlg/valid.jsonl"),
    );
    let arguments = [
        "eval",
        "--model",
        model.to_str().unwrap(),
        "--data",
        data.to_str().unwrap(),
        "--limit",
        "200",
        "--quiet",
    ];
    let ours = lab.json(&[&arguments[..], more].concat());
    assert!(
        (number(&ours, "/loss") - number(theirs, "/loss")).abs() < 1e-5,
        "{ours}, golden {theirs}"
    );
    for key in ["tokens", "loss_tokens", "examples"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
}

#[test]
fn the_loss_on_e2e_is_that_of_transformers() {
    check_losses(
        "pretrained::the_loss_on_e2e_is_that_of_transformers",
        "base",
        &[],
    );
}

#[test]
fn the_loss_with_an_adapter_is_that_of_peft() {
    let adapter = format!("{GOLDEN}/tinystories_start_adapter");
    check_losses(
        "pretrained::the_loss_with_an_adapter_is_that_of_peft",
        "start_adapter",
        &["--adapter", &adapter],
    );
}

#[test]
fn a_run_on_real_weights_stays_within_its_budget() {
    let Some(assets) = common::assets("pretrained::a_run_on_real_weights_stays_within_its_budget")
    else {
        return;
    };
    let lab = ten_steps(&assets);
    let device = set(&["energy.device=raspberry-pi-5", "energy.meter=counted"]);
    let free = lab.plan(&device);
    let budget = format!("budget.energy={} J", 0.6 * number(&free, "/energy/total_j"));
    let keys = [device, set(&[&budget])].concat();
    let plan = lab.plan(&keys);
    let report = lab.json(
        &[
            &["train", "recipe.toml", "--out", "run", "--quiet"],
            &flags(&keys)[..],
        ]
        .concat(),
    );
    assert_eq!(report["training"]["stop_reason"], "budget:energy");
    assert_eq!(
        (&report["training"]["steps"], &report["energy"]["total_j"]),
        (&plan["training"]["steps"], &plan["energy"]["total_j"])
    );
    assert!(
        number(&report, "/budget/spent/energy_j") <= number(&report, "/budget/limits/energy_j")
    );
}

/// Two hundred steps in bf16 end within 1 % of f32's loss, on records that were trained and on others.
#[test]
fn training_in_bf16_follows_f32() {
    let Some(assets) = common::assets("pretrained::training_in_bf16_follows_f32") else {
        return;
    };
    let lab = ten_steps(&assets);
    lab.records(
        "train.jsonl",
        assets.join("datasets/e2e_nlg/train.jsonl"),
        800,
    );
    lab.records(
        "validation.jsonl",
        assets.join("datasets/e2e_nlg/valid.jsonl"),
        40,
    );
    let common = [
        "train.steps=200",
        "train.micro_batch_size=4",
        "train.learning_rate=2e-3",
        "data.validation=\"validation.jsonl\"",
    ];
    let train = |dtype: &str| {
        let dtype = format!("model.dtype=\"{dtype}\"");
        let keys = set(&[&common[..], &[&dtype]].concat());
        lab.json(
            &[
                &["train", "recipe.toml", "--out", &dtype[13..16], "--quiet"],
                &flags(&keys)[..],
            ]
            .concat(),
        )
    };
    let (wide, narrow) = (train("f32"), train("bf16"));
    let before = number(&wide, "/training/val_loss_before");
    for key in ["/training/val_loss_after", "/training/train_loss_last"] {
        let (wide, narrow) = (number(&wide, key), number(&narrow, key));
        assert!(
            wide < 0.8 * before,
            "{key}: {wide} of {before}: something is learned"
        );
        assert!(
            (narrow / wide - 1.0).abs() < 0.01,
            "{key}: {narrow} in bf16, {wide} in f32"
        );
    }
}
