//! Files as Axolotl's and LLaMA-Factory's documentation shows them; expected recipes by hand.

use super::*;
use crate::recipe::{Adapter, Checkpointing, Format, Length, Quantization, Recipe, Validation};

/// The import of `yaml`, and its recipe read back.
fn imported(yaml: &str, files: &[(&str, &str)]) -> Result<(Imported, Recipe)> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let from = folder.path().join("theirs.yaml");
    std::fs::write(&from, yaml).unwrap();
    let to = folder.path().join("ours.toml");
    let imported = import(&from, &[], &to)?;
    let recipe = parse(&imported.text, &to, &[])?;
    Ok((imported, recipe))
}

fn left(imported: &Imported) -> Vec<&str> {
    imported
        .left_out
        .iter()
        .map(|left| left.key.as_str())
        .collect()
}

const AXOLOTL: &str = "
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train[:100]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - up_proj
wandb_project:
wandb_name: a-run
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.01
special_tokens:
  pad_token: \"<|end_of_text|>\"
";

#[test]
fn an_axolotl_file_becomes_a_recipe_and_the_rest_is_named() {
    let (imported, recipe) = imported(AXOLOTL, &[]).unwrap();
    assert_eq!(imported.program, "Axolotl");
    assert_eq!(recipe.model.quantization, Quantization::Nf4);
    let Adapter::Lora(lora) = &recipe.adapter else {
        panic!("qlora is LoRA");
    };
    let config = &lora.config;
    assert_eq!(
        (config.r, config.lora_alpha, config.lora_dropout),
        (32, 16.0, 0.05)
    );
    let train = &recipe.train;
    assert_eq!(
        (train.micro_batch_size, train.gradient_accumulation_steps),
        (2, 4)
    );
    assert_eq!((train.learning_rate, train.weight_decay), (2e-4, 0.01));
    assert_eq!(
        (train.length, train.activation_checkpointing),
        (Length::Epochs(3.0), Checkpointing::Auto)
    );
    assert_eq!(
        (recipe.data.format, recipe.data.max_length),
        (Format::Alpaca, 2048)
    );
    assert_eq!(
        (recipe.data.packing, &recipe.data.validation),
        (true, &Validation::Fraction(0.1))
    );
    // Empty keys set nothing and are not listed; everything else that is set is carried over or named.
    let mut expected = vec![
        "dataset_prepared_path",
        "eval_sample_packing",
        "evals_per_epoch",
        "flash_attention",
        "optimizer",
        "output_dir",
        "special_tokens",
        "strict",
        "tf32",
        "wandb_name",
    ];
    expected.sort_unstable();
    let mut found = left(&imported);
    found.sort_unstable();
    assert_eq!(found, expected);
    assert!(imported.text.contains("# Not carried over: wandb_name ("));
}

#[test]
fn axolotl_without_an_adapter_trains_every_weight() {
    let yaml = "base_model: a/b\nlearning_rate: 1e-5\nlora_r: 8\ndatasets:\n  - path: d.jsonl\n    type: user_defined\nrl:\n";
    let (imported, recipe) = imported(yaml, &[("d.jsonl", "{}")]).unwrap();
    assert_eq!(recipe.adapter, Adapter::None);
    assert_eq!(left(&imported), ["lora_r", "datasets[0].type"]);
    // Axolotl's defaults, not ours.
    let train = &recipe.train;
    assert_eq!(
        (train.micro_batch_size, train.length),
        (1, Length::Epochs(1.0))
    );
    assert!(!recipe.data.packing);
    let error = super::tests::imported("base_model: a/b\nrl: dpo\n", &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("dpo") && error.contains("supervised"),
        "{error}"
    );
}

#[test]
fn a_llama_factory_file_reads_its_data_sets_description() {
    let yaml = "
model_name_or_path: a/b
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: demo
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
max_steps: 40
lr_scheduler_type: cosine
warmup_ratio: 0.1
fp16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
";
    let info = r#"{"demo": {"file_name": "demo.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}}}"#;
    let (imported, recipe) =
        imported(yaml, &[("dataset_info.json", info), ("demo.json", "[]")]).unwrap();
    let Adapter::Lora(lora) = &recipe.adapter else {
        panic!("lora");
    };
    // LLaMA-Factory's defaults: rank 8, alpha twice the rank.
    assert_eq!((lora.config.r, lora.config.lora_alpha), (8, 16.0));
    assert_eq!(
        recipe.data.columns,
        [("messages".to_string(), "conversations".to_string())]
    );
    assert_eq!(
        (recipe.data.format, recipe.train.length),
        (Format::Messages, Length::Steps(40))
    );
    assert_eq!(
        (recipe.train.eval_every, recipe.model.quantization),
        (500, Quantization::Nf4)
    );
    let mut found = left(&imported);
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "eval_strategy",
            "fp16",
            "max_samples",
            "num_train_epochs",
            "output_dir",
            "template"
        ]
    );
    let error = super::tests::imported("model_name_or_path: a/b\ndataset: x\n", &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("dataset_info.json") && error.contains("--data FILE"),
        "{error}"
    );
}

#[test]
fn what_is_no_trainers_file_is_refused() {
    for (yaml, expected) in [
        ("a: 1\n", "model_name_or_path"),
        ("- 1\n", "neither"),
        ("a: [\n", "not YAML"),
    ] {
        let error = imported(yaml, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
