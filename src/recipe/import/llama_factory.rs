//! LLaMA-Factory's YAML. Names and defaults: `src/llamafactory/hparams/` of hiyouga/LLaMA-Factory, and transformers'
//! `TrainingArguments`.

use serde_json::Value;

use super::super::commented::Chosen;
use super::values::number;
use super::{Import, Trainer};
use crate::error::{Error, Kind, Result};

pub(super) const LLAMA_FACTORY: Trainer = Trainer {
    name: "LLaMA-Factory",
    same: &[
        ("model_name_or_path", "model.id"),
        ("model_revision", "model.revision"),
        ("seed", "seed"),
        ("cutoff_len", "data.max_length"),
        ("packing", "data.packing"),
        ("lora_rank", "adapter.r"),
        ("lora_alpha", "adapter.lora_alpha"),
        ("lora_dropout", "adapter.lora_dropout"),
        ("use_dora", "adapter.use_dora"),
        ("use_rslora", "adapter.use_rslora"),
        ("loraplus_lr_ratio", "adapter.loraplus_lr_ratio"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        (
            "gradient_accumulation_steps",
            "train.gradient_accumulation_steps",
        ),
        ("learning_rate", "train.learning_rate"),
        ("num_train_epochs", "train.epochs"),
        ("warmup_ratio", "train.warmup_ratio"),
        ("weight_decay", "train.weight_decay"),
        ("max_grad_norm", "train.max_grad_norm"),
        ("adam_beta1", "train.adam_beta1"),
        ("adam_beta2", "train.adam_beta2"),
        ("adam_epsilon", "train.adam_epsilon"),
        ("save_total_limit", "train.save_total_limit"),
        ("early_stopping_steps", "train.early_stopping"),
        ("load_best_model_at_end", "train.keep_best"),
    ],
    defaults: &[
        ("data.max_length", "2048"),
        ("data.packing", "false"),
        ("train.learning_rate", "5e-5"),
        ("train.epochs", "3.0"),
        ("train.warmup_ratio", "0.0"),
    ],
    without: &[
        ("output_dir", "write `--out DIR` on the command line"),
        (
            "overwrite_output_dir",
            "a run directory is never overwritten",
        ),
        (
            "report_to",
            "steps.jsonl and report.html have the course of a run",
        ),
        ("plot_loss", "report.html has the curves"),
        ("logging_steps", "every step is logged"),
        (
            "logging_dir",
            "steps.jsonl and report.html have the course of a run",
        ),
        ("template", "the model's own chat template is used"),
        (
            "overwrite_cache",
            "the cache goes by the content of the data",
        ),
        ("preprocessing_num_workers", "`--threads N`"),
        ("dataloader_num_workers", "`--threads N`"),
        ("resume_from_checkpoint", "`wattune train --resume RUN_DIR`"),
        ("flash_attn", "attention is always in tiles"),
        (
            "per_device_eval_batch_size",
            "evaluation takes `train.micro_batch_size`",
        ),
        (
            "eval_strategy",
            "`train.eval_every` is in steps; 0: before and after only",
        ),
        (
            "save_strategy",
            "`train.save_every` is in steps; 0: at the end only",
        ),
        ("ddp_", "one process trains"),
        ("deepspeed", "one process trains"),
        ("fsdp", "one process trains"),
        ("trust_remote_code", "no code of a model is run"),
        (
            "max_samples",
            "cut the file, or end the run by `train.steps`",
        ),
    ],
    special,
};

fn special(import: &mut Import<'_>) -> Result<()> {
    if let Some(stage) = import.take_text("stage") {
        if !["sft", "pt"].contains(&stage.as_str()) {
            return Err(import.refuse("stage", &stage));
        }
        import.same_already();
    }
    adapter(import)?;
    import.precision(Some("pure_bf16"));
    import.optimizer("optim");
    import.schedule("lr_scheduler_type");
    import.validation_share("val_size");
    import.length();
    import.warmup();
    import.interval("eval_steps", "train.eval_every");
    import.interval("save_steps", "train.save_every");
    import.checkpointing("gradient_checkpointing", true);
    import.checkpointing("disable_gradient_checkpointing", false);
    for key in ["do_train", "do_eval"] {
        if import.take_flag(key).is_some() {
            import.same_already();
        }
    }
    if let Some(true) = import.take_flag("neat_packing") {
        import.carry("neat_packing", "data.packing", true);
    }
    match import.take_flag("train_on_prompt") {
        Some(true) => import.leave(
            "train_on_prompt",
            "prompts have no loss; records of `format = \"text\"` have one on every token",
        ),
        Some(false) => import.same_already(),
        None => {}
    }
    let folder = import
        .take_text("dataset_dir")
        .unwrap_or_else(|| "data".to_string());
    data_set(import, "dataset", "data.train", &folder)?;
    data_set(import, "eval_dataset", "data.validation", &folder)
}

/// LoRA or every weight, and how the frozen weights are stored.
fn adapter(import: &mut Import<'_>) -> Result<()> {
    match import.take_text("finetuning_type").as_deref() {
        Some("full") => {
            import.carry("finetuning_type", "adapter.type", "none");
            return Ok(());
        }
        None => {}
        Some("lora") => import.same_already(),
        Some(other) => return Err(import.refuse("finetuning_type", other)),
    }
    let r = import.keys.get("lora_rank").and_then(number).unwrap_or(8.0);
    let default = |key, value: i64| Chosen::new(key, value, "LLaMA-Factory's default");
    import.choices.push(default("adapter.r", 8));
    import
        .choices
        .push(default("adapter.lora_alpha", 2 * r as i64));
    if let Some(targets) = import.take_text("lora_target") {
        let names: toml_edit::Array = targets.split(',').map(str::trim).collect();
        match targets.as_str() {
            "all" => import.carry("lora_target", "adapter.target_modules", "all-linear"),
            _ => import.carry("lora_target", "adapter.target_modules", names),
        }
    }
    if let Some(modules) = import.take_text("additional_target") {
        let names: toml_edit::Array = modules.split(',').map(str::trim).collect();
        import.carry("additional_target", "adapter.modules_to_save", names);
    }
    if let Some(path) = import.take_text("adapter_name_or_path") {
        let path = import.path(&path);
        import.carry("adapter_name_or_path", "adapter.init_from", path);
    }
    if let Some(bits) = import.take("quantization_bit") {
        match number(&bits) {
            Some(4.0) => import.carry("quantization_bit", "model.quantization", "nf4"),
            Some(8.0) => import.carry("quantization_bit", "model.quantization", "int8"),
            _ => import.leave(
                "quantization_bit",
                format!("{bits}: `model.quantization` has 4 and 8 bits"),
            ),
        }
    }
    pissa(import);
    Ok(())
}

fn pissa(import: &mut Import<'_>) {
    let Some(on) = import.take_flag("pissa_init") else {
        return;
    };
    let iterations = import
        .take("pissa_iter")
        .as_ref()
        .and_then(number)
        .unwrap_or(16.0);
    match on {
        true if iterations < 0.0 => {
            import.carry("pissa_init", "adapter.init_lora_weights", "pissa")
        }
        true => import.carry(
            "pissa_init",
            "adapter.init_lora_weights",
            format!("pissa_niter_{iterations}"),
        ),
        false => import.same_already(),
    }
}

/// The files of data sets, by `dataset_info.json`.
fn data_set(import: &mut Import<'_>, key: &str, ours: &'static str, folder: &str) -> Result<()> {
    let Some(names) = import.take(key) else {
        return Ok(());
    };
    let names: Vec<String> = match &names {
        Value::Array(names) => names
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_string)
            .collect(),
        names => names
            .as_str()
            .unwrap_or_default()
            .split(',')
            .map(|name| name.trim().to_string())
            .collect(),
    };
    let places = [
        import.folder.join(folder),
        import.folder.to_path_buf(),
        folder.into(),
    ];
    let found = places
        .iter()
        .map(|place| place.join("dataset_info.json"))
        .find(|path| path.is_file());
    let Some(info) = found else {
        return Err(Error::new(Kind::Recipe, "the data sets are not described")
            .at(key.to_string())
            .value(names.join(", "))
            .rule(format!(
                "`dataset_info.json` in `{folder}` says which files they are"
            ))
            .hint("put it beside the YAML file, or remove the key and give `--data FILE`"));
    };
    let text = std::fs::read_to_string(&info).map_err(|e| Error::io("read", &info, e))?;
    let described: Value = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Recipe, format!("not JSON: {e}")).at(info.display().to_string())
    })?;
    let mut files = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let set = &described[name.as_str()];
        let beside = |file: &Value| Some(info.with_file_name(file.as_str()?).display().to_string());
        let hub = || Some(set["hf_hub_url"].as_str()?.to_string());
        let Some(file) = beside(&set["file_name"]).or_else(hub) else {
            import.leave(
                key,
                format!(
                    "`{name}` has no file_name or hf_hub_url in {}",
                    info.display()
                ),
            );
            continue;
        };
        files.push(super::path_from(import.to, &file));
        if index == 0 && ours == "data.train" {
            format(import, set);
        }
    }
    match files.as_slice() {
        [] => {}
        [file] => import.carry(key, ours, file.as_str()),
        files => import.carry(key, ours, files.iter().collect::<toml_edit::Array>()),
    }
    Ok(())
}

/// `data.format` and `data.columns` of a data set's description.
fn format(import: &mut Import<'_>, set: &Value) {
    const FIELDS: [(&str, &str); 4] = [
        ("prompt", "instruction"),
        ("query", "input"),
        ("response", "output"),
        ("messages", "messages"),
    ];
    let is_chat = set["formatting"] == "sharegpt";
    let format = if is_chat { "messages" } else { "alpaca" };
    import
        .choices
        .push(Chosen::new("data.format", format, "By dataset_info.json"));
    let mut columns = toml_edit::InlineTable::new();
    for (theirs, ours) in FIELDS {
        let column = set["columns"][theirs].as_str();
        if let Some(column) =
            column.filter(|column| *column != ours && (ours == "messages") == is_chat)
        {
            columns.insert(ours, column.into());
        }
    }
    if !columns.is_empty() {
        import
            .choices
            .push(Chosen::new("data.columns", columns, "By dataset_info.json"));
    }
}
