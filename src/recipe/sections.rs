//! Every key of a recipe, once: its type, default, bounds and meaning.
//!
//! The reader, the writer, the starter, the JSON Schema and the reference follow from these declarations. A doc comment here
//! is also the comment in the file: one sentence without a final full stop.

use std::path::PathBuf;

use chrono::NaiveDate;
use clap::ValueEnum;
use serde::Serialize;

use super::ids::{DataSource, ModelId};
use super::key::*;
use super::larger_model::LargerModel;
use super::reader::Reader;
use super::setting::Setting;
use crate::adapter::options::{Bias, LoraConfig, LoraInit, Targets, TokenIndices};
use crate::data::options::{Format, OnBadRecord, PromptTemplate, TxtUnit};
use crate::energy::options::{DeviceRef, GridRef, Limits, MeterKind};
use crate::train::schedule::Decay;
use crate::units::{Flops, GramsCo2e, Joules, Money, Price, Pue, Seconds};
use crate::work::Precision;

/// The tables in the order they are written, each with its subject.
pub(super) const TABLES: [(&str, &str); 8] = [
    ("model", "Which model"),
    ("adapter", "What is trained; names and meaning are PEFT's"),
    ("data", "What it is trained on"),
    ("train", "How it is trained"),
    (
        "budget",
        "What it may spend; the first limit to bind stops the run",
    ),
    ("energy", "How energy, carbon and cost are counted"),
    ("baseline", "What it is compared with"),
    ("report", "What the report says of the time after training"),
];

section! {
    /// A checked recipe with every default filled in. Paths are absolute.
    pub struct Recipe in "" mod top {
        /// Names the run's folder; empty: the recipe file's own name
        name: String = default("\"\"").example("\"my-run\"").within(Bounds::FileName)
            .known_as(&["run_name"]),
        /// Seeds every random choice
        seed: u64 = default("42").within(SEED).in_starter(),
        /// The model.
        model: Model,
        /// The trained parameters.
        adapter: Adapter,
        /// The records.
        data: Data,
        /// The training loop.
        train: Train,
        /// The limits of the run.
        budget: Limits,
        /// How energy is counted.
        energy: Energy,
        /// The comparisons.
        baseline: Baseline,
        /// The use after training.
        report: Report,
    }
}

section! {
    /// The `[model]` table.
    pub struct Model in "model" mod model {
        /// Hub id, directory, or "embedded:tiny"
        id: ModelId = required("\"HuggingFaceTB/SmolLM2-135M\"")
            .known_as(&["base_model", "model_name_or_path", "model_name", "model_id", "name", "path"])
            .in_starter(),
        /// Branch, tag or commit of a hub model
        revision: String = default("\"main\""),
        /// GGUF file in the hub repository or directory
        file: Option<String> = optional("\"model-Q4_K_M.gguf\"").known_as(&["gguf_file", "hf_file"]),
        /// Compute precision
        dtype: Precision = default("\"f32\"").known_as(&["torch_dtype", "precision"]).in_starter(),
        /// "random" trains from scratch
        init: Init = default("\"pretrained\""),
        /// What the model's head computes; auto: what its class in config.json does
        task: Task = default("\"auto\"").known_as(&["task_type"]),
        /// What the outputs of sequence-classification mean; auto: as config.json says, else by the labels of the training records
        problem_type: ProblemType = default("\"auto\""),
        /// Stores the frozen linear layers in fewer bits: nf4 is QLoRA's
        quantization: Quantization = default("\"none\"").known_as(&["load_in", "quant_type", "bnb_4bit_quant_type"]),
    }
}

/// What a model's head computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// By the class in config.json.
    Auto,
    /// The next token.
    CausalLm,
    /// The class of a text.
    SequenceClassification,
    /// The class of each word.
    TokenClassification,
}

/// What the outputs of a head mean; the words are transformers'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ProblemType {
    /// By config.json or the labels.
    Auto,
    /// One class of all.
    SingleLabelClassification,
    /// Each label applies or not.
    MultiLabelClassification,
    /// A number.
    Regression,
}

/// How the weights of linear layers are stored while an adapter is trained on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// As they are.
    None,
    /// bitsandbytes' NormalFloat: 4.5 bits a weight (QLoRA).
    Nf4,
    /// bitsandbytes' LLM.int8 of weights: 8 bits.
    Int8,
    /// GGUF: 8.5 bits.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// GGUF: 4.5 bits.
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The model's files.
    Pretrained,
    /// Random initialisation: training from scratch.
    Random,
}

section! {
    struct AdapterKeys in "adapter" mod adapter {
        /// "none" trains every weight
        kind: AdapterType = default("\"lora\"").named("type").known_as(&["peft_type", "method"]),
        /// LoRA.
        config: LoraConfig,
        /// LoRA+: the rate of B is this many times learning_rate
        loraplus_lr_ratio: Option<f64> = optional("16.0").within(POSITIVE),
        /// Refuse settings with which vLLM, llama.cpp or mistral.rs would not load the adapter
        portable: bool = default("false"),
        /// Continue from a PEFT adapter: its r, alpha and targets hold
        init_from: Option<PathBuf> = optional("\"path-to-adapter\"")
            .known_as(&["resume_from", "adapter_path"]),
    }
}

/// The words of `adapter.type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AdapterType {
    Lora,
    None,
}

section! {
    impl LoraConfig in "adapter" mod lora {
        /// Rank
        r: usize = default("16").within(SIZE).known_as(&["rank", "lora_r", "lora_rank"]).in_starter(),
        /// Scaling is lora_alpha / r
        lora_alpha: f64 = default("32").within(POSITIVE).known_as(&["alpha"]).in_starter(),
        /// Probability that an input of the adapter is dropped
        lora_dropout: f64 = default("0.0").within(SHARE).known_as(&["dropout"]),
        /// Every linear layer, or a list of names, or a regex for the whole path
        target_modules: Targets = default("\"all-linear\"").within(Bounds::AllLinear)
            .known_as(&["lora_target_modules", "targets", "modules", "lora_target_linear"])
            .in_starter(),
        /// Modules left out in any case: a list or a regex
        exclude_modules: Option<Targets> = optional("[\"down_proj\"]"),
        /// Scaling is lora_alpha / sqrt(r)
        use_rslora: bool = default("false").known_as(&["rslora"]),
        /// Module pattern -> rank; the first that matches holds
        rank_pattern: Vec<(String, usize)> = optional("{ q_proj = 32 }"),
        /// Module pattern -> alpha; the first that matches holds
        alpha_pattern: Vec<(String, f64)> = optional("{ q_proj = 64 }"),
        /// Only these layers, for a list of target_modules
        layers_to_transform: Option<Vec<usize>> = optional("[0, 1, 2]"),
        /// Initial A and B; "pissa", "pissa_niter_16" and "olora" take them from the base weight, and are saved as LoRA of rank 2r
        init_lora_weights: LoraInit = default("\"default\"").known_as(&["init_weights"]),
        /// Modules trained in full beside LoRA, by the ends of their paths
        modules_to_save: Vec<String> = optional("[\"lm_head\"]"),
        /// Tokens whose embeddings are trained: a list, or lists by module, { embed_tokens = [5], lm_head = [5] }
        trainable_token_indices: Option<TokenIndices> = optional("[5, 7]"),
        /// Train tied embeddings of modules_to_save as one table
        ensure_weight_tying: bool = default("false"),
        /// DoRA: train a magnitude for each row of the adapted weights
        use_dora: bool = default("false").known_as(&["dora"]),
        /// Biases trained in full: of the layers with LoRA, or all
        bias: Bias = default("\"none\""),
        /// Train a bias on each B
        lora_bias: bool = default("false"),
    } with { layers_pattern: Vec::new() }
}

/// The `[adapter]` table.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a run holds one of it")]
pub enum Adapter {
    /// Low-rank adapters on a frozen model.
    Lora(Lora),
    /// Every weight is trained.
    None,
}

/// The LoRA settings of a recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// PEFT's configuration.
    pub config: LoraConfig,
    /// Ratio of the rate of B to that of A (LoRA+).
    pub loraplus_lr_ratio: Option<f64>,
    /// Whether every runtime must load the adapter alike.
    pub portable: bool,
    /// An existing PEFT adapter to continue from.
    pub init_from: Option<PathBuf>,
    /// The keys that the recipe gives: with `init_from` only these may contradict the adapter. Empty without `init_from`.
    pub written: Vec<String>,
}

impl Keys for Adapter {
    fn list(to: &mut Vec<&'static Key>) {
        AdapterKeys::list(to);
    }

    fn read(reader: &mut Reader<'_, '_>) -> Self {
        let keys = AdapterKeys::read(reader);
        if keys.kind == AdapterType::None {
            return Adapter::None;
        }
        // Without an adapter to contradict it makes no difference which keys are given, and equal recipes are equal.
        let given = keys_of::<LoraConfig>()
            .into_iter()
            .filter(|key| keys.init_from.is_some() && reader.span(key).is_some());
        Adapter::Lora(Lora {
            written: given.map(|key| key.name.to_string()).collect(),
            config: keys.config,
            loraplus_lr_ratio: keys.loraplus_lr_ratio,
            portable: keys.portable,
            init_from: keys.init_from,
        })
    }

    fn write(&self, to: &mut Vec<Written>) {
        match self {
            Adapter::None => to.push((&adapter::kind, AdapterType::None.write())),
            Adapter::Lora(lora) => AdapterKeys {
                kind: AdapterType::Lora,
                config: lora.config.clone(),
                loraplus_lr_ratio: lora.loraplus_lr_ratio,
                portable: lora.portable,
                init_from: lora.init_from.clone(),
            }
            .write(to),
        }
    }
}

section! {
    /// The `[data]` table.
    pub struct Data in "data" mod data {
        /// A .jsonl .json .csv .tsv .txt .parquet file, a folder, "dir/*.jsonl", a list of these, or a hub id with :split
        train: DataSource = required("\"train.jsonl\"")
            .known_as(&["train_file", "train_path", "dataset", "path", "file"])
            .in_starter(),
        /// Where the loss is evaluated.
        validation: Validation,
        /// How a record is read; auto: by the fields of all
        format: Format = default("\"auto\"").known_as(&["type"]),
        /// Wanted field -> the file's column
        columns: Vec<(String, String)> =
            optional("{ prompt = \"question\", completion = \"answer\" }"),
        /// Names of the classes by id; else the model's, or those of the training records in order
        labels: Vec<String> = optional("[\"negative\", \"positive\"]")
            .within(Bounds::Of("class names")).known_as(&["label_names", "class_names"]),
        /// Longest record in tokens
        max_length: usize = default("512").within(TOKENS)
            .known_as(&["max_seq_length", "max_seq_len", "sequence_len", "seq_len", "block_size", "cutoff_len"])
            .in_starter(),
        /// Several records in one row; none sees another
        packing: bool = default("true").known_as(&["sample_packing"]),
        /// A new order each epoch
        shuffle: bool = default("true"),
        /// "skip" leaves bad records out and counts them
        on_bad_record: OnBadRecord = default("\"stop\""),
        /// What one text of a .txt file is
        txt_unit: TxtUnit = default("\"paragraph\""),
        /// What a prompt becomes before its completion; "chat": the user's turn of the chat template
        prompt_template: Option<PromptTemplate> = optional("\"{prompt} \"")
            .known_as(&["template", "prompt_style", "separator", "prompt_format"]),
        /// Date that a chat template writes (strftime_now), else the run's first day
        chat_date: Option<NaiveDate> = optional("\"2026-01-31\""),
    }
}

section! {
    struct ValidationKeys in "data" mod validation {
        /// Records the loss is evaluated on
        validation: Option<DataSource> = optional("\"validation.jsonl\"")
            .known_as(&["valid", "val", "eval", "validation_file", "eval_file", "test"]),
        /// Or this share of the training records, chosen by the seed
        validation_fraction: Option<f64> = optional("0.05").within(FRACTION)
            .known_as(&["val_fraction", "val_size", "val_set_size", "test_size", "validation_split", "val_split", "eval_split"]),
    }
}

/// Where validation records come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Validation {
    /// No validation.
    None,
    /// Separate records.
    Source(DataSource),
    /// This share of the training records, chosen by the seed.
    Fraction(f64),
}

impl Keys for Validation {
    fn list(to: &mut Vec<&'static Key>) {
        ValidationKeys::list(to);
    }

    fn read(reader: &mut Reader<'_, '_>) -> Self {
        let keys = ValidationKeys::read(reader);
        reader.exclusive(&validation::validation, &validation::validation_fraction);
        match (keys.validation, keys.validation_fraction) {
            (Some(source), _) => Validation::Source(source),
            (None, Some(fraction)) => Validation::Fraction(fraction),
            (None, None) => Validation::None,
        }
    }

    fn write(&self, to: &mut Vec<Written>) {
        let (validation, validation_fraction) = match self {
            Validation::None => (None, None),
            Validation::Source(source) => (Some(source.clone()), None),
            Validation::Fraction(fraction) => (None, Some(*fraction)),
        };
        ValidationKeys {
            validation,
            validation_fraction,
        }
        .write(to);
    }
}

section! {
    struct LengthKeys in "train" mod length {
        /// Optimizer steps; or epochs, or as many as a limit in [budget] holds
        steps: Option<u64> = optional("200").within(SIZE)
            .known_as(&["max_steps", "iters", "num_steps", "max_iters"])
            .in_starter(),
        /// Passes over the data, fractions allowed; or steps
        epochs: Option<f64> = optional("1.0").within(POSITIVE)
            .known_as(&["num_train_epochs", "num_epochs"]),
    }
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the data, fractions allowed.
    Epochs(f64),
    /// As many steps as the budget holds.
    Budget,
}

impl Keys for Length {
    fn list(to: &mut Vec<&'static Key>) {
        LengthKeys::list(to);
    }

    fn read(reader: &mut Reader<'_, '_>) -> Self {
        let keys = LengthKeys::read(reader);
        reader.exclusive(&length::steps, &length::epochs);
        let given = |key: &Key| reader.span(key).is_some();
        let limits = [
            &budget::energy,
            &budget::carbon,
            &budget::flops,
            &budget::time,
            &budget::cost,
        ];
        let by_budget = limits.into_iter().any(given);
        let is_given = given(&length::steps) || given(&length::epochs);
        if !is_given && !by_budget {
            reader.missing(
                &length::steps,
                "`train.steps` or `train.epochs` is missing".into(),
                "one of the two, or a limit in [budget], says how long to train".into(),
                format!(" (or `{}`)", length::epochs.sample()),
            );
        }
        match (keys.steps, keys.epochs) {
            (None, Some(epochs)) => Length::Epochs(epochs),
            (None, None) if !is_given && by_budget => Length::Budget,
            // Neither is valid: a diagnostic has been noted.
            (steps, _) => Length::Steps(steps.unwrap_or(1)),
        }
    }

    fn write(&self, to: &mut Vec<Written>) {
        let (steps, epochs) = match *self {
            Length::Steps(steps) => (Some(steps), None),
            Length::Epochs(epochs) => (None, Some(epochs)),
            Length::Budget => (None, None),
        };
        LengthKeys { steps, epochs }.write(to);
    }
}

section! {
    /// The `[train]` table.
    pub struct Train in "train" mod train {
        /// Steps or epochs.
        length: Length,
        /// Rows in one forward pass
        micro_batch_size: usize = default("8").within(SIZE)
            .known_as(&["batch_size", "per_device_train_batch_size", "train_batch_size"])
            .in_starter(),
        /// Forward passes in one step
        gradient_accumulation_steps: usize = default("1").within(SIZE)
            .known_as(&["gradient_accumulation", "grad_accum", "grad_accumulation_steps", "accumulation"]),
        /// Peak learning rate
        learning_rate: f64 = default("2e-4").within(POSITIVE).known_as(&["lr"]).in_starter(),
        /// Course of the learning rate
        schedule: Decay = default("\"linear\"")
            .known_as(&["lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule"]),
        /// Warmup of the learning rate.
        warmup: Warmup,
        /// AdamW's beta1
        adam_beta1: f64 = default("0.9").within(SHARE).known_as(&["beta1", "adam_b1"]),
        /// AdamW's beta2
        adam_beta2: f64 = default("0.999").within(SHARE).known_as(&["beta2", "adam_b2"]),
        /// AdamW's epsilon
        adam_epsilon: f64 = default("1e-8").within(POSITIVE).known_as(&["epsilon", "eps", "adam_eps"]),
        /// Decoupled weight decay
        weight_decay: f64 = default("0.0").within(NOT_NEGATIVE).known_as(&["decay"]),
        /// The gradient's global norm is clipped here; 0 never clips
        max_grad_norm: f64 = default("1.0").within(NOT_NEGATIVE)
            .known_as(&["grad_clip", "clip_grad_norm", "gradient_clipping", "gradient_clip"]),
        /// Weight of the training loss of each class, by name; 1 where none is given. The validation loss has no weights
        class_weights: Vec<(String, f64)> = optional("{ positive = 3.0 }").within(Bounds::Of("class names")),
        /// Evaluate every so many steps; 0: before and after only
        eval_every: u64 = default("50").within(INTERVAL)
            .known_as(&["eval_steps", "eval_interval", "evals_per_epoch", "steps_per_eval"]),
        /// Save every so many steps; 0: at the end only
        save_every: u64 = default("50").within(INTERVAL)
            .known_as(&["save_steps", "save_interval", "saves_per_epoch"]),
        /// Checkpoints kept
        save_total_limit: usize = default("3").within(SIZE),
        /// Keep the checkpoint of lowest validation loss
        keep_best: bool = default("true").known_as(&["load_best_model_at_end"]),
        /// Stop after so many evaluations in a row without a lower validation loss
        early_stopping: Option<u64> = optional("3").within(SIZE)
            .known_as(&["early_stopping_patience", "patience"]),
        /// Only a fall of so many nats per kilojoule since the lowest loss counts as lower
        early_stopping_gain: f64 = default("0.0").within(NOT_NEGATIVE)
            .known_as(&["early_stopping_threshold", "min_delta"]),
        /// Recompute activations to save memory
        activation_checkpointing: Checkpointing = default("\"auto\"")
            .known_as(&["gradient_checkpointing", "grad_checkpoint"]),
    }
}

section! {
    struct WarmupKeys in "train" mod warmup {
        /// Share of the course in which the rate rises; or warmup_steps
        warmup_ratio: Option<f64> = default("0.03").within(SHARE).known_as(&["warmup"]),
        /// Steps in which the rate rises
        warmup_steps: Option<u64> = optional("10").within(INTERVAL),
    }
}

/// Warmup of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A share of all steps.
    Ratio(f64),
    /// A number of steps.
    Steps(u64),
}

impl Keys for Warmup {
    fn list(to: &mut Vec<&'static Key>) {
        WarmupKeys::list(to);
    }

    fn read(reader: &mut Reader<'_, '_>) -> Self {
        let keys = WarmupKeys::read(reader);
        reader.exclusive(&warmup::warmup_ratio, &warmup::warmup_steps);
        match keys.warmup_steps {
            Some(steps) => Warmup::Steps(steps),
            None => Warmup::Ratio(keys.warmup_ratio.unwrap_or_default()),
        }
    }

    fn write(&self, to: &mut Vec<Written>) {
        let (warmup_ratio, warmup_steps) = match *self {
            Warmup::Ratio(ratio) => (Some(ratio), None),
            Warmup::Steps(steps) => (None, Some(steps)),
        };
        WarmupKeys {
            warmup_ratio,
            warmup_steps,
        }
        .write(to);
    }
}

/// Blocks in which activations are recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Where memory forces it; resolved by the plan.
    Auto,
    /// Every block.
    Always,
    /// No block.
    Never,
    /// This many of the lowest blocks that the backward pass reaches.
    #[serde(untagged)]
    #[value(skip)]
    Blocks(usize),
}

section! {
    impl Limits in "budget" mod budget {
        /// Energy of the machine itself
        energy: Option<Joules> = optional("\"5 Wh\"").in_starter(),
        /// Emissions, the facility's overhead included
        carbon: Option<GramsCo2e> = optional("\"2 g\"").known_as(&["co2", "emissions"]),
        /// Executed floating-point operations
        flops: Option<Flops> = optional("\"1e15\""),
        /// Wall time
        time: Option<Seconds> = optional("\"10 min\""),
        /// Money; needs energy.price in the same currency
        cost: Option<Money> = optional("\"0.05 USD\"").known_as(&["money"]),
    }
}

section! {
    /// The `[energy]` table.
    pub struct Energy in "energy" mod energy {
        /// A device profile's name, or a profile file
        device: DeviceRef = default("\"auto\""),
        /// The meter the budget binds on; auto: measured where complete, else counted
        meter: Option<MeterKind> = default("\"auto\""),
        /// ISO code, US state, cloud region, "world", or a number in gCO2e/kWh
        grid: GridRef = default("\"world\"")
            .known_as(&["country", "region", "country_iso_code", "grid_intensity"])
            .in_starter(),
        /// The facility's energy over the machine's own
        pue: Pue = default("1.0").within(AT_LEAST_ONE),
        /// Of electricity, or of the device: "2.50 USD/h"
        price: Option<Price> = optional("\"0.30 USD/kWh\""),
    }
}

section! {
    /// The `[baseline]` table.
    #[derive(Copy)]
    pub struct Baseline in "baseline" mod baseline {
        /// How training from scratch is compared; measured: done, for the same energy
        from_scratch: Compared = default("\"counted\""),
        /// How training every weight is compared; measured: done, for the same energy
        full_fine_tuning: Compared = default("\"counted\""),
        /// A measured baseline short of the run's loss goes on to so many times its training energy
        energy_multiple: f64 = default("3.0").within(AT_LEAST_ONE),
        /// Peak learning rate of measured baselines, in place of the run's
        learning_rate: Option<f64> = optional("1e-3").within(POSITIVE),
        /// Energy of all measured baselines together, apart from [budget]
        budget: Option<Joules> = optional("\"5 Wh\""),
    }
}

/// How a comparison is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// By counting.
    Counted,
    /// By training, for the same energy.
    Measured,
    /// Not at all.
    Off,
}

section! {
    /// The `[report]` table.
    pub struct Report in "report" mod report {
        /// Requests a day once it is in use
        requests_per_day: Option<f64> = optional("1000").within(POSITIVE),
        /// Tokens of a request's prompt
        prompt_tokens: usize = default("256").within(SIZE),
        /// Tokens of its answer
        generated_tokens: usize = default("128").within(SIZE),
        /// Requests that are answered at once
        batch: usize = default("1").within(SIZE),
        /// What would be prompted instead: a number of parameters, or a hub id that names it
        larger_model: Option<LargerModel> = optional("\"7B\""),
        /// Where no larger model is given: examples in the base model's prompt instead
        few_shot_examples: usize = default("5").within(SIZE),
    }
}
