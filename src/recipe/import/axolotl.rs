//! Axolotl's YAML. Names and defaults: `src/axolotl/utils/schemas/` of axolotl-ai-cloud/axolotl.

use serde_json::Value;

use super::super::commented::Chosen;
use super::values::is_set;
use super::{Import, Trainer};
use crate::error::Result;

pub(super) const AXOLOTL: Trainer = Trainer {
    name: "Axolotl",
    same: &[
        ("base_model", "model.id"),
        ("revision_of_model", "model.revision"),
        ("seed", "seed"),
        ("sequence_len", "data.max_length"),
        ("sample_packing", "data.packing"),
        ("lora_r", "adapter.r"),
        ("lora_alpha", "adapter.lora_alpha"),
        ("lora_dropout", "adapter.lora_dropout"),
        ("lora_target_modules", "adapter.target_modules"),
        ("lora_modules_to_save", "adapter.modules_to_save"),
        ("peft_layers_to_transform", "adapter.layers_to_transform"),
        ("peft_use_dora", "adapter.use_dora"),
        ("peft_use_rslora", "adapter.use_rslora"),
        ("loraplus_lr_ratio", "adapter.loraplus_lr_ratio"),
        ("micro_batch_size", "train.micro_batch_size"),
        (
            "gradient_accumulation_steps",
            "train.gradient_accumulation_steps",
        ),
        ("learning_rate", "train.learning_rate"),
        ("num_epochs", "train.epochs"),
        ("warmup_ratio", "train.warmup_ratio"),
        ("weight_decay", "train.weight_decay"),
        ("max_grad_norm", "train.max_grad_norm"),
        ("adam_beta1", "train.adam_beta1"),
        ("adam_beta2", "train.adam_beta2"),
        ("adam_epsilon", "train.adam_epsilon"),
        ("save_total_limit", "train.save_total_limit"),
        ("early_stopping_patience", "train.early_stopping"),
    ],
    defaults: &[
        ("data.max_length", "512"),
        ("data.packing", "false"),
        ("train.micro_batch_size", "1"),
        ("train.epochs", "1.0"),
        ("train.schedule", "\"cosine\""),
    ],
    without: &[
        ("output_dir", "write `--out DIR` on the command line"),
        (
            "wandb_",
            "steps.jsonl and report.html have the course of a run",
        ),
        (
            "mlflow_",
            "steps.jsonl and report.html have the course of a run",
        ),
        (
            "use_tensorboard",
            "steps.jsonl and report.html have the course of a run",
        ),
        ("evals_per_epoch", "write `train.eval_every` in steps"),
        ("saves_per_epoch", "write `train.save_every` in steps"),
        ("special_tokens", "the tokenizer's files name them"),
        (
            "tokens",
            "`adapter.trainable_token_indices` trains tokens that the tokenizer has",
        ),
        ("resume_from_checkpoint", "`wattune train --resume RUN_DIR`"),
        ("flash_attention", "attention is always in tiles"),
        ("sdp_attention", "attention is always in tiles"),
        ("xformers_attention", "attention is always in tiles"),
        ("attn_implementation", "attention is always in tiles"),
        (
            "pad_to_sequence_len",
            "rows are never padded further than they need",
        ),
        ("logging_steps", "every step is logged"),
        ("model_type", "config.json names the class"),
        ("tokenizer_type", "the tokenizer's files name the class"),
        ("deepspeed", "one process trains"),
        ("fsdp", "one process trains"),
        (
            "dataset_prepared_path",
            "WATTUNE_CACHE is the cache's folder",
        ),
        (
            "excess_length_strategy",
            "longer records are cut at the end and counted",
        ),
    ],
    special,
};

fn special(import: &mut Import<'_>) -> Result<()> {
    if let Some(method) = import.take_text("rl") {
        return Err(import.refuse("rl", &method));
    }
    adapter(import)?;
    import.precision(None);
    import.optimizer("optimizer");
    import.schedule("lr_scheduler");
    import.validation_share("val_set_size");
    import.length();
    import.warmup();
    import.interval("eval_steps", "train.eval_every");
    import.interval("save_steps", "train.save_every");
    import.checkpointing("gradient_checkpointing", true);
    if let Some(name) = import.take_text("chat_template") {
        if name == "tokenizer_default" {
            import.same_already();
        } else {
            import.leave(
                "chat_template",
                format!("`{name}`: the model's own template is used"),
            );
        }
    }
    match import.take_flag("train_on_inputs") {
        Some(true) => import.leave(
            "train_on_inputs",
            "prompts have no loss; records of `format = \"text\"` have one on every token",
        ),
        Some(false) => import.same_already(),
        None => {}
    }
    data_sets(import, "datasets", "data.train");
    data_sets(import, "test_datasets", "data.validation");
    Ok(())
}

/// LoRA, QLoRA or every weight.
fn adapter(import: &mut Import<'_>) -> Result<()> {
    let kind = import.take_text("adapter");
    let quantised = [("load_in_4bit", "nf4"), ("load_in_8bit", "int8")];
    match kind.as_deref() {
        Some("qlora" | "lora") => import.carry("adapter", "adapter.type", "lora"),
        Some(other) => return Err(import.refuse("adapter", other)),
        None => every_weight(import),
    }
    for (key, format) in quantised {
        match import.take_flag(key) {
            Some(true) => import.carry(key, "model.quantization", format),
            Some(false) => import.same_already(),
            None => {}
        }
    }
    if kind.as_deref() == Some("qlora")
        && import
            .choices
            .iter()
            .all(|choice| choice.key != "model.quantization")
    {
        import
            .choices
            .push(Chosen::new("model.quantization", "nf4", "QLoRA"));
    }
    if let Some(true) = import.take_flag("lora_target_linear") {
        import.carry("lora_target_linear", "adapter.target_modules", "all-linear");
    }
    if let Some(path) = import.take_text("lora_model_dir") {
        let path = import.path(&path);
        import.carry("lora_model_dir", "adapter.init_from", path);
    }
    Ok(())
}

/// Without an adapter its keys mean nothing.
fn every_weight(import: &mut Import<'_>) {
    let why = "The file names no `adapter`: every weight is trained";
    import
        .choices
        .push(Chosen::new("adapter.type", "none", why));
    let of_adapter = |key: &&String| key.starts_with("lora") || key.starts_with("peft_");
    let keys: Vec<String> = import.keys.keys().filter(of_adapter).cloned().collect();
    for key in keys {
        if import.take(&key).is_some() {
            import.leave(&key, "the file names no `adapter`");
        }
    }
}

/// The first data set with its format; files of further ones.
fn data_sets(import: &mut Import<'_>, key: &str, ours: &'static str) {
    let Some(Value::Array(sets)) = import.take(key) else {
        return;
    };
    let mut files = Vec::new();
    for (index, set) in sets.iter().enumerate() {
        let name = |field: &str| format!("{key}[{index}].{field}");
        let Some(path) = set.get("path").and_then(Value::as_str) else {
            import.leave(&name("path"), "it is no text");
            continue;
        };
        let file = set.get("data_files").and_then(first_text).unwrap_or(path);
        let is_hub = !import.folder.join(file).exists() && !file.contains('.');
        if index > 0 && is_hub {
            import.leave(
                &name("path"),
                format!("`{file}`: a recipe reads one data set of the hub; files may be several"),
            );
            continue;
        }
        let split = set
            .get("split")
            .and_then(Value::as_str)
            .filter(|split| is_hub && *split != "train");
        files.push(match split {
            Some(split) => format!("{file}:{split}"),
            None => import.path(file),
        });
        if index == 0 && ours == "data.train" {
            format(import, set, &name("type"));
        }
        further(import, set, key, index);
    }
    match files.as_slice() {
        [] => {}
        [file] => import.carry(key, ours, file.as_str()),
        files => import.carry(key, ours, files.iter().collect::<toml_edit::Array>()),
    }
}

fn first_text(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.as_array()?.first()?.as_str())
}

/// `data.format`, by the prompt strategy.
fn format(import: &mut Import<'_>, set: &Value, key: &str) {
    let Some(kind) = set.get("type").filter(|kind| is_set(kind)) else {
        return;
    };
    let strategy = kind.as_str().unwrap_or("a map");
    let format = match strategy.split(['.', ':']).next().unwrap_or(strategy) {
        "alpaca" => "alpaca",
        "chat_template" | "sharegpt" => "messages",
        "completion" | "pretrain" => "text",
        _ => {
            return import.leave(
                key,
                format!("`{strategy}`: the format is detected by the records' fields"),
            );
        }
    };
    import.carry(key, "data.format", format);
    if let (Some(field), "text") = (set.get("field").and_then(Value::as_str), format) {
        columns(import, "text", field);
    }
    if let (Some(field), "messages") = (set.get("field_messages").and_then(Value::as_str), format) {
        columns(import, "messages", field);
    }
}

fn columns(import: &mut Import<'_>, field: &str, column: &str) {
    if field == column {
        return;
    }
    let mut map = toml_edit::InlineTable::new();
    map.insert(field, column.into());
    import.choices.push(Chosen::new(
        "data.columns",
        map,
        "Where the records hold it",
    ));
}

/// Names the other keys of a data set.
fn further(import: &mut Import<'_>, set: &Value, key: &str, index: usize) {
    const READ: [&str; 6] = [
        "path",
        "type",
        "split",
        "data_files",
        "field",
        "field_messages",
    ];
    for (field, value) in set.as_object().into_iter().flatten() {
        let is_format = field == "ds_type";
        if !READ.contains(&field.as_str()) && is_set(value) && !is_format {
            import.leave(
                &format!("{key}[{index}].{field}"),
                "a recipe has no such key",
            );
        }
    }
}
