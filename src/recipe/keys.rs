//! Every key of a recipe: its type, rule, default and meaning, once.
//!
//! The reader, the writer, the starter and the JSON Schema all go by this table. Knows nothing of how a file is read or of the
//! checked `Recipe`.

use crate::units::{Flops, GramsCo2e, Joules, Money, ParseQuantityError, Price, Seconds};
use crate::work::Precision;

use super::words::Word;
use super::{Checkpointing, Compared, Decay, Format, Init, MeterKind, OnBadRecord, TxtUnit};

/// One key.
pub(super) struct Key {
    /// `table.key`, or the key alone at the top.
    pub path: &'static str,
    /// What its value may be.
    pub kind: Kind,
    /// Whether it may be left out.
    pub presence: Presence,
    /// The default; where there is none, an example. Valid TOML.
    pub value: &'static str,
    /// What it means, one sentence.
    pub doc: &'static str,
    /// What other trainers call it.
    pub known_as: &'static [&'static str],
    /// Written out in the starter recipe, not commented.
    pub in_starter: bool,
}

/// Whether a key may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// It may not.
    Needed,
    /// It may; then it has no value.
    Optional,
    /// It may; then it has its default.
    Defaulted,
}

/// What a value may be.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// A text of at least one character.
    Text,
    /// A text that can be part of a folder's name; may be empty.
    Name,
    /// One of these words.
    Choice(fn() -> Vec<&'static str>),
    /// One of these words, or a whole number.
    ChoiceOrCount {
        /// The words.
        words: fn() -> Vec<&'static str>,
        /// What the number counts.
        of: &'static str,
    },
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Count {
        /// The smallest allowed.
        least: u64,
        /// The largest allowed.
        most: u64,
    },
    /// A finite number.
    Number(Range),
    /// A text with a number and a unit.
    Quantity(Quantity),
    /// A grid's name, or a number of gCO2e/kWh.
    Grid,
    /// A list of module names or a regex, or `"all-linear"` where allowed.
    Modules {
        /// Whether `"all-linear"` is a word here and not a regex.
        all_linear: bool,
    },
    /// Layer numbers: one, or a list.
    Layers,
    /// Module pattern -> rank.
    Ranks,
    /// Module pattern -> alpha.
    Alphas,
    /// Wanted field -> the file's column.
    Columns,
}

/// An interval of numbers.
#[derive(Clone, Copy)]
pub(super) struct Range {
    /// Its lower end.
    pub low: f64,
    /// Whether the lower end itself is allowed.
    pub with_low: bool,
    /// Its upper end, itself never allowed; absent for none.
    pub below: Option<f64>,
}

impl Range {
    /// Whether `number` is in it: finite in any case.
    pub fn holds(&self, number: f64) -> bool {
        let above = number > self.low || (self.with_low && number == self.low);
        number.is_finite() && above && self.below.is_none_or(|end| number < end)
    }

    /// In words.
    pub fn rule(&self) -> String {
        let low = if self.with_low {
            format!("of at least {}", self.low)
        } else {
            format!("above {}", self.low)
        };
        match self.below {
            Some(end) => format!("a number {low} and below {end}"),
            None => format!("a finite number {low}"),
        }
    }
}

/// A kind of quantity: how `units` reads it, and what may be written.
#[derive(Clone, Copy)]
pub(super) struct Quantity {
    /// The number in the base unit.
    pub read: fn(&str) -> Result<f64, ParseQuantityError>,
    /// The units as a regex.
    pub units: &'static str,
    /// Whether a bare TOML number will do.
    pub bare: bool,
    /// Whether zero is allowed.
    pub zero: bool,
}

/// Counts that end up as sizes of tensors or numbers of steps.
pub(super) const MANY: u64 = u32::MAX as u64;
/// TOML's integers end here.
const LARGEST: u64 = i64::MAX as u64;

const SIZE: Kind = Kind::Count {
    least: 1,
    most: MANY,
};
const EVERY: Kind = Kind::Count {
    least: 0,
    most: MANY,
};
const POSITIVE: Kind = Kind::Number(Range {
    low: 0.0,
    with_low: false,
    below: None,
});
const NOT_NEGATIVE: Kind = Kind::Number(Range {
    low: 0.0,
    with_low: true,
    below: None,
});
const AT_LEAST_ONE: Kind = Kind::Number(Range {
    low: 1.0,
    with_low: true,
    below: None,
});
const SHARE: Kind = Kind::Number(Range {
    low: 0.0,
    with_low: true,
    below: Some(1.0),
});
const PART: Kind = Kind::Number(Range {
    low: 0.0,
    with_low: false,
    below: Some(1.0),
});

const ENERGY: Quantity = Quantity {
    read: |text| text.parse().map(|energy: Joules| energy.0),
    units: "J|mJ|uJ|µJ|kJ|MJ|GJ|Wh|mWh|kWh|MWh|GWh",
    bare: false,
    zero: false,
};
const CARBON: Quantity = Quantity {
    read: |text| text.parse().map(|mass: GramsCo2e| mass.0),
    units: "g|gCO2e|mg|kg|kgCO2e|t|tCO2e",
    bare: false,
    zero: false,
};
const FLOPS: Quantity = Quantity {
    read: |text| text.parse().map(|flops: Flops| flops.0),
    units: "|FLOP|FLOPs|MFLOP|GFLOP|TFLOP|PFLOP|EFLOP",
    bare: true,
    zero: false,
};
const TIME: Quantity = Quantity {
    read: |text| text.parse().map(|time: Seconds| time.0),
    units: "s|ms|min|h|d",
    bare: false,
    zero: false,
};
const COST: Quantity = Quantity {
    read: |text| text.parse().map(|money: Money| money.amount),
    units: "[A-Z]{3}",
    bare: false,
    zero: false,
};
const PRICE: Quantity = Quantity {
    read: |text| text.parse().map(|price: Price| price.money.amount),
    units: "[A-Z]{3}\\s*/\\s*(kWh|h)",
    bare: false,
    zero: true,
};

/// The values of `adapter.type`.
pub(super) const ADAPTER_TYPES: [&str; 2] = ["lora", "none"];
/// The words for "every linear layer but the output embedding".
pub(super) const ALL_LINEAR: &str = "all-linear";
/// The fields that `data.columns` may map: those the formats are made of.
pub(super) const FIELDS: [&str; 8] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "tools",
    "instruction",
    "input",
    "output",
];

/// The tables in the order they are written, each with what it is about.
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

const fn key(
    path: &'static str,
    kind: Kind,
    presence: Presence,
    value: &'static str,
    doc: &'static str,
) -> Key {
    Key {
        path,
        kind,
        presence,
        value,
        doc,
        known_as: &[],
        in_starter: false,
    }
}

impl Key {
    const fn known_as(mut self, names: &'static [&'static str]) -> Self {
        self.known_as = names;
        self
    }

    const fn in_starter(mut self) -> Self {
        self.in_starter = true;
        self
    }

    /// Its table (empty at the top) and its name there.
    pub fn split(&self) -> (&'static str, &'static str) {
        self.path.split_once('.').unwrap_or(("", self.path))
    }

    /// Its name within its table.
    pub fn name(&self) -> &'static str {
        self.split().1
    }

    /// `key = value`, as it might stand in the file.
    pub fn sample(&self) -> String {
        format!("{} = {}", self.name(), self.value)
    }

    /// Whether it says something of LoRA alone.
    pub fn is_of_lora(&self) -> bool {
        self.split().0 == "adapter" && self.name() != "type"
    }
}

/// The key at `path`.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// The keys of a table, in order; of the top where `table` is empty.
pub(super) fn of_table(table: &str) -> impl Iterator<Item = &'static Key> + '_ {
    KEYS.iter().filter(move |key| key.split().0 == table)
}

use Kind::{
    Alphas, Choice, ChoiceOrCount, Columns, Count, Flag, Grid, Layers, Modules, Name,
    Quantity as Of, Ranks, Text,
};
use Presence::{Defaulted, Needed, Optional};

/// Every key, in the order they are written.
#[rustfmt::skip]
pub(super) static KEYS: &[Key] = &[
    key("name", Name, Defaulted, "\"\"", "Names the run's folder; empty: the recipe file's own name").known_as(&["run_name"]),
    key("seed", Count { least: 0, most: LARGEST }, Defaulted, "42", "Seeds every random choice").in_starter(),

    key("model.id", Text, Needed, "\"HuggingFaceTB/SmolLM2-135M\"", "Hub id, directory, or \"embedded:tiny\"")
        .known_as(&["base_model", "model_name_or_path", "model_name", "model_id", "name", "path"]).in_starter(),
    key("model.revision", Text, Defaulted, "\"main\"", "Branch, tag or commit of a hub model"),
    key("model.dtype", Choice(Precision::words), Defaulted, "\"f32\"", "Compute precision")
        .known_as(&["torch_dtype", "precision"]).in_starter(),
    key("model.init", Choice(Init::words), Defaulted, "\"pretrained\"", "\"random\" trains from scratch"),

    key("adapter.type", Choice(|| ADAPTER_TYPES.to_vec()), Defaulted, "\"lora\"", "\"none\" trains every weight")
        .known_as(&["peft_type", "method"]),
    key("adapter.r", SIZE, Defaulted, "16", "Rank").known_as(&["rank", "lora_r", "lora_rank"]).in_starter(),
    key("adapter.lora_alpha", POSITIVE, Defaulted, "32", "Scaling is lora_alpha / r").known_as(&["alpha"]).in_starter(),
    key("adapter.lora_dropout", SHARE, Defaulted, "0.0", "Probability that an input of the adapter is dropped").known_as(&["dropout"]),
    key("adapter.target_modules", Modules { all_linear: true }, Defaulted, "\"all-linear\"",
        "Every linear layer, or a list of names, or a regex for the whole path")
        .known_as(&["lora_target_modules", "targets", "modules", "lora_target_linear"]).in_starter(),
    key("adapter.exclude_modules", Modules { all_linear: false }, Optional, "[\"down_proj\"]", "Modules left out in any case: a list or a regex"),
    key("adapter.use_rslora", Flag, Defaulted, "false", "Scaling is lora_alpha / sqrt(r)").known_as(&["rslora"]),
    key("adapter.rank_pattern", Ranks, Optional, "{ q_proj = 32 }", "Module pattern -> rank; the first that matches holds"),
    key("adapter.alpha_pattern", Alphas, Optional, "{ q_proj = 64 }", "Module pattern -> alpha; the first that matches holds"),
    key("adapter.layers_to_transform", Layers, Optional, "[0, 1, 2]", "Only these layers, for a list of target_modules"),
    key("adapter.init_from", Text, Optional, "\"path-to-adapter\"", "Continue from a PEFT adapter: its r, alpha and targets hold")
        .known_as(&["resume_from", "adapter_path"]),

    key("data.train", Text, Needed, "\"train.jsonl\"", "A .jsonl .json .csv .tsv .txt .parquet file, or a hub id with :split")
        .known_as(&["train_file", "train_path", "dataset", "path", "file"]).in_starter(),
    key("data.validation", Text, Optional, "\"validation.jsonl\"", "Records the loss is evaluated on")
        .known_as(&["valid", "val", "eval", "validation_file", "eval_file", "test"]),
    key("data.validation_fraction", PART, Optional, "0.05", "Or this share of the training records, chosen by the seed")
        .known_as(&["val_fraction", "val_size", "val_set_size", "test_size"]),
    key("data.format", Choice(Format::words), Defaulted, "\"auto\"", "How a record is read; auto: by the first one's fields").known_as(&["type"]),
    key("data.columns", Columns, Optional, "{ prompt = \"question\", completion = \"answer\" }", "Wanted field -> the file's column"),
    key("data.max_length", Count { least: 2, most: MANY }, Defaulted, "512", "Longest record in tokens")
        .known_as(&["max_seq_length", "max_seq_len", "sequence_len", "seq_len", "block_size", "cutoff_len"]).in_starter(),
    key("data.packing", Flag, Defaulted, "true", "Several records in one row; none sees another").known_as(&["sample_packing"]),
    key("data.shuffle", Flag, Defaulted, "true", "A new order each epoch"),
    key("data.on_bad_record", Choice(OnBadRecord::words), Defaulted, "\"stop\"", "\"skip\" leaves bad records out and counts them"),
    key("data.txt_unit", Choice(TxtUnit::words), Defaulted, "\"paragraph\"", "What one text of a .txt file is"),

    key("train.steps", SIZE, Optional, "200", "Optimizer steps; or epochs")
        .known_as(&["max_steps", "iters", "num_steps", "max_iters"]).in_starter(),
    key("train.epochs", POSITIVE, Optional, "1.0", "Passes over the data, fractions allowed; or steps")
        .known_as(&["num_train_epochs", "num_epochs"]),
    key("train.micro_batch_size", SIZE, Defaulted, "8", "Rows in one forward pass")
        .known_as(&["batch_size", "per_device_train_batch_size", "train_batch_size"]).in_starter(),
    key("train.gradient_accumulation_steps", SIZE, Defaulted, "1", "Forward passes in one step")
        .known_as(&["gradient_accumulation", "grad_accum", "grad_accumulation_steps", "accumulation"]),
    key("train.learning_rate", POSITIVE, Defaulted, "2e-4", "Peak learning rate").known_as(&["lr"]).in_starter(),
    key("train.schedule", Choice(Decay::words), Defaulted, "\"linear\"", "Course of the learning rate")
        .known_as(&["lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule"]),
    key("train.warmup_ratio", SHARE, Defaulted, "0.03", "Share of the course in which the rate rises; or warmup_steps").known_as(&["warmup"]),
    key("train.warmup_steps", EVERY, Optional, "10", "Steps in which the rate rises"),
    key("train.adam_beta1", SHARE, Defaulted, "0.9", "AdamW's beta1").known_as(&["beta1", "adam_b1"]),
    key("train.adam_beta2", SHARE, Defaulted, "0.999", "AdamW's beta2").known_as(&["beta2", "adam_b2"]),
    key("train.adam_epsilon", POSITIVE, Defaulted, "1e-8", "AdamW's epsilon").known_as(&["epsilon", "eps", "adam_eps"]),
    key("train.weight_decay", NOT_NEGATIVE, Defaulted, "0.0", "Decoupled weight decay").known_as(&["decay"]),
    key("train.max_grad_norm", NOT_NEGATIVE, Defaulted, "1.0", "The gradient's global norm is clipped here; 0 never clips")
        .known_as(&["grad_clip", "clip_grad_norm", "gradient_clipping", "gradient_clip"]),
    key("train.eval_every", EVERY, Defaulted, "50", "Evaluate every so many steps; 0: before and after only")
        .known_as(&["eval_steps", "eval_interval", "evals_per_epoch", "steps_per_eval"]),
    key("train.save_every", EVERY, Defaulted, "50", "Save every so many steps; 0: at the end only")
        .known_as(&["save_steps", "save_interval", "saves_per_epoch"]),
    key("train.save_total_limit", SIZE, Defaulted, "3", "Checkpoints kept"),
    key("train.keep_best", Flag, Defaulted, "true", "Keep the checkpoint of lowest validation loss").known_as(&["load_best_model_at_end"]),
    key("train.activation_checkpointing", ChoiceOrCount { words: Checkpointing::words, of: "blocks" }, Defaulted, "\"auto\"", "Recompute activations to save memory")
        .known_as(&["gradient_checkpointing", "grad_checkpoint"]),

    key("budget.energy", Of(ENERGY), Optional, "\"5 Wh\"", "Energy of the machine itself").in_starter(),
    key("budget.carbon", Of(CARBON), Optional, "\"2 g\"", "Emissions, the facility's overhead included").known_as(&["co2", "emissions"]),
    key("budget.flops", Of(FLOPS), Optional, "\"1e15\"", "Executed floating-point operations"),
    key("budget.time", Of(TIME), Optional, "\"10 min\"", "Wall time"),
    key("budget.cost", Of(COST), Optional, "\"0.05 USD\"", "Money; needs energy.price in the same currency").known_as(&["money"]),

    key("energy.device", Text, Defaulted, "\"auto\"", "A device profile's name, or a profile file"),
    key("energy.meter", Choice(<Option<MeterKind>>::words), Defaulted, "\"auto\"", "The meter the budget binds on; auto: measured where complete, else counted"),
    key("energy.grid", Grid, Defaulted, "\"world\"", "ISO code, US state, cloud region, \"world\", or a number in gCO2e/kWh")
        .known_as(&["country", "region", "country_iso_code", "grid_intensity"]).in_starter(),
    key("energy.pue", AT_LEAST_ONE, Defaulted, "1.0", "The facility's energy over the machine's own"),
    key("energy.price", Of(PRICE), Optional, "\"0.30 USD/kWh\"", "Of electricity, or of the device: \"2.50 USD/h\""),

    key("baseline.from_scratch", Choice(Compared::words), Defaulted, "\"counted\"",
        "How training from scratch is compared; measured: done, for the same energy"),
    key("baseline.full_fine_tuning", Choice(Compared::words), Defaulted, "\"counted\"",
        "How training every weight is compared; measured: done, for the same energy"),
    key("baseline.energy_multiple", AT_LEAST_ONE, Defaulted, "3.0",
        "A measured baseline short of the run's loss goes on to so many times its training energy"),
    key("baseline.learning_rate", POSITIVE, Optional, "1e-3", "Peak learning rate of measured baselines, in place of the run's"),
    key("baseline.budget", Of(ENERGY), Optional, "\"5 Wh\"", "Energy of all measured baselines together, apart from [budget]"),

    key("report.requests_per_day", POSITIVE, Optional, "1000", "Requests a day once it is in use"),
    key("report.prompt_tokens", SIZE, Defaulted, "256", "Tokens of a request's prompt"),
    key("report.generated_tokens", SIZE, Defaulted, "128", "Tokens of its answer"),
    key("report.larger_model", Text, Optional, "\"7B\"", "What would be prompted instead: a number of parameters, or a hub id that names it"),
    key("report.few_shot_examples", SIZE, Defaulted, "5", "Where no larger model is given: examples in the base model's prompt instead"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// One alternative of a `units` pattern that `units` cannot read makes the schema promise too much.
    #[test]
    fn every_unit_named_here_is_read_by_units() {
        for quantity in [ENERGY, CARBON, FLOPS, TIME] {
            for unit in quantity.units.split('|') {
                assert!((quantity.read)(&format!("2 {unit}")).is_ok(), "{unit}");
            }
            assert!((quantity.read)("2 parsec").is_err());
        }
    }

    #[test]
    fn a_range_holds_what_its_rule_says() {
        let share = Range {
            low: 0.0,
            with_low: true,
            below: Some(1.0),
        };
        assert!(
            share.holds(0.0)
                && share.holds(0.999)
                && !share.holds(1.0)
                && !share.holds(-1e-9)
                && !share.holds(f64::NAN)
        );
        assert_eq!(share.rule(), "a number of at least 0 and below 1");
        let positive = Range {
            low: 0.0,
            with_low: false,
            below: None,
        };
        assert!(positive.holds(1e-300) && !positive.holds(0.0) && !positive.holds(f64::INFINITY));
        assert_eq!(positive.rule(), "a finite number above 0");
    }

    #[test]
    fn no_key_is_named_twice_and_every_table_is_known() {
        for (index, key) in KEYS.iter().enumerate() {
            assert!(
                KEYS[..index].iter().all(|other| other.path != key.path),
                "{}",
                key.path
            );
            let (table, _) = key.split();
            assert!(
                table.is_empty() || TABLES.iter().any(|(known, _)| *known == table),
                "{}",
                key.path
            );
            assert!(
                !key.doc.is_empty() && !key.doc.ends_with('.'),
                "{}",
                key.path
            );
        }
    }
}
