//! From what a recipe gives to the checked `Recipe`: ids and paths told apart, contradictions noted.
//!
//! Takes `Given` and the recipe's folder, returns a `Recipe`; it is only to be used if no mistake was noted. Looks at the disk for
//! one question alone: whether an id is a folder or a file beside the recipe.

use std::path::{Path, PathBuf};

use super::given::{Given, Value};
use super::keys::ALL_LINEAR;
use super::larger;
use super::mistake::Mistakes;
use super::*;
use crate::units::Pue;

/// File extensions that data may have.
pub(super) const DATA_EXTENSIONS: [&str; 6] = ["jsonl", "json", "csv", "tsv", "txt", "parquet"];

/// What marks a model inside the program.
pub(super) const EMBEDDED: &str = "embedded:";

/// Builds the recipe; `folder` is absolute, `stem` names a run that has no name.
pub(super) fn build(given: &Given, folder: &Path, stem: &str, mistakes: &mut Mistakes) -> Recipe {
    contradictions::note(given, mistakes);
    let mut reader = Reader {
        given,
        folder,
        mistakes,
    };
    Recipe {
        name: given
            .text("name")
            .filter(|name| !name.is_empty())
            .unwrap_or(stem)
            .to_string(),
        seed: given.count("seed"),
        model: reader.model(),
        adapter: reader.adapter(),
        data: reader.data(),
        train: train(given),
        budget: Limits {
            energy: given.quantity("budget.energy"),
            carbon: given.quantity("budget.carbon"),
            flops: given.quantity("budget.flops"),
            time: given.quantity("budget.time"),
            cost: given.quantity("budget.cost"),
        },
        energy: reader.energy(),
        baseline: Baseline {
            from_scratch: given.word("baseline.from_scratch"),
            full_fine_tuning: given.word("baseline.full_fine_tuning"),
            energy_multiple: given.number("baseline.energy_multiple"),
            learning_rate: given.get("baseline.learning_rate").and_then(Value::number),
            budget: given.quantity("baseline.budget"),
        },
        report: reader.report(),
    }
}

/// Turns values into ids and paths.
struct Reader<'g, 'm, 's> {
    given: &'g Given,
    folder: &'g Path,
    mistakes: &'m mut Mistakes<'s>,
}

impl Reader<'_, '_, '_> {
    fn model(&mut self) -> Model {
        let id = self.given.text("model.id").unwrap_or_default();
        Model {
            id: self.model_id(id),
            revision: self
                .given
                .text("model.revision")
                .unwrap_or_default()
                .to_string(),
            dtype: self.given.word("model.dtype"),
            init: self.given.word("model.init"),
        }
    }

    fn model_id(&mut self, id: &str) -> ModelId {
        const RULE: &str = "a hub id `owner/name` or `name`, a directory (starting with `.`, `/` or `~` where it does not exist yet), \
                            or `embedded:NAME`";
        match ModelId::parse(id, self.folder) {
            Some(ModelId::Directory(_)) => ModelId::Directory(self.resolve("model.id", id)),
            Some(found) => found,
            None => {
                self.refuse(
                    "model.id",
                    RULE,
                    "write for example `id = \"HuggingFaceTB/SmolLM2-135M\"`, `id = \"./my-model\"` or `id = \"embedded:tiny\"`",
                );
                ModelId::Hub(id.to_string())
            }
        }
    }

    fn adapter(&mut self) -> Adapter {
        let given = self.given;
        if given.text("adapter.type") == Some("none") {
            return Adapter::None;
        }
        let init_from = given
            .text("adapter.init_from")
            .map(|path| self.resolve("adapter.init_from", path));
        // Without an adapter to contradict, who wrote a key makes no difference, and equal recipes are equal.
        let written = given
            .written_in("adapter")
            .filter(|(key, _)| init_from.is_some() && key.is_of_lora());
        let written = written
            .map(|(key, _)| key.name().to_string())
            .filter(|name| name != "init_from")
            .collect();
        Adapter::Lora(self.lora(init_from, written))
    }

    fn lora(&self, init_from: Option<PathBuf>, written: Vec<String>) -> Lora {
        let given = self.given;
        let config = LoraConfig {
            r: given.size("adapter.r"),
            lora_alpha: given.number("adapter.lora_alpha"),
            lora_dropout: given.number("adapter.lora_dropout"),
            target_modules: given
                .get("adapter.target_modules")
                .and_then(|value| targets(value, true))
                .unwrap_or(Targets::AllLinear),
            exclude_modules: given
                .get("adapter.exclude_modules")
                .and_then(|value| targets(value, false)),
            use_rslora: given.flag("adapter.use_rslora"),
            rank_pattern: match given.get("adapter.rank_pattern") {
                Some(Value::Ranks(ranks)) => ranks
                    .iter()
                    .map(|(pattern, rank)| (pattern.clone(), *rank as usize))
                    .collect(),
                _ => Vec::new(),
            },
            alpha_pattern: match given.get("adapter.alpha_pattern") {
                Some(Value::Alphas(alphas)) => alphas.clone(),
                _ => Vec::new(),
            },
            layers_to_transform: match given.get("adapter.layers_to_transform") {
                Some(Value::Counts(layers)) => {
                    Some(layers.iter().map(|layer| *layer as usize).collect())
                }
                _ => None,
            },
            layers_pattern: Vec::new(),
        };
        Lora {
            config,
            init_from,
            written,
        }
    }

    fn data(&mut self) -> Data {
        let given = self.given;
        let validation = match (
            given.text("data.validation"),
            given
                .get("data.validation_fraction")
                .and_then(Value::number),
        ) {
            (Some(source), _) => Validation::Source(self.source("data.validation", source)),
            (None, Some(fraction)) => Validation::Fraction(fraction),
            (None, None) => Validation::None,
        };
        Data {
            train: self.source("data.train", given.text("data.train").unwrap_or_default()),
            validation,
            format: given.word("data.format"),
            columns: match given.get("data.columns") {
                Some(Value::Columns(columns)) => columns.clone(),
                _ => Vec::new(),
            },
            max_length: given.size("data.max_length"),
            packing: given.flag("data.packing"),
            shuffle: given.flag("data.shuffle"),
            on_bad_record: given.word("data.on_bad_record"),
            txt_unit: given.word("data.txt_unit"),
        }
    }

    /// A file if it says so by its extension, by how it starts or by being there; else a hub id with an optional split.
    fn source(&mut self, path: &str, text: &str) -> DataSource {
        let has_extension = Path::new(text).extension().is_some_and(|extension| {
            DATA_EXTENSIONS
                .iter()
                .any(|known| extension.eq_ignore_ascii_case(known))
        });
        if has_extension || says_path(text) || self.folder.join(text).exists() {
            return DataSource::File(self.resolve(path, text));
        }
        let (id, split) = text.split_once(':').unwrap_or((text, "train"));
        if !is_hub_id(id) || split.is_empty() || split.contains(char::is_whitespace) {
            let rule = format!(
                "a file that ends in .{}, or a hub id `owner/name` or `owner/name:split`",
                DATA_EXTENSIONS.join(" .")
            );
            let name = path.rsplit('.').next().unwrap_or(path);
            self.refuse(
                path,
                &rule,
                &format!("write for example `{name} = \"./{name}.jsonl\"` or `{name} = \"owner/name:train\"`"),
            );
        }
        DataSource::Hub {
            id: id.to_string(),
            split: split.to_string(),
        }
    }

    fn energy(&mut self) -> Energy {
        let given = self.given;
        let device = given.text("energy.device").unwrap_or_default();
        // A profile's own name may hold a slash ("NVIDIA A10 / A10G").
        let is_file =
            says_path(device) || device.ends_with(".toml") || self.folder.join(device).is_file();
        let named = if is_file {
            Ok(DeviceRef::File(self.resolve("energy.device", device)))
        } else {
            device.parse()
        };
        let device = named.unwrap_or_else(|rule| {
            let hint = "write for example `device = \"amd-epyc-7763@4\"`";
            self.refuse("energy.device", rule, hint);
            DeviceRef::Auto
        });
        let grid = given.text("energy.grid").and_then(|text| text.parse().ok());
        Energy {
            device,
            meter: given.word("energy.meter"),
            grid: grid.unwrap_or_else(|| GridRef::Named("world".into())),
            pue: Pue::new(given.number("energy.pue")).unwrap_or(Pue::ONE),
            price: given.quantity("energy.price"),
        }
    }

    fn report(&mut self) -> Report {
        let given = self.given;
        let larger_model = given.text("report.larger_model").and_then(|text| {
            let parsed = LargerModel::parse(text);
            if parsed.is_none() {
                self.refuse("report.larger_model", larger::RULE, larger::HINT);
            }
            parsed
        });
        Report {
            requests_per_day: given.get("report.requests_per_day").and_then(Value::number),
            prompt_tokens: given.size("report.prompt_tokens"),
            generated_tokens: given.size("report.generated_tokens"),
            larger_model,
            few_shot_examples: given.size("report.few_shot_examples"),
        }
    }

    /// A path of the recipe as an absolute path: `~` is the home folder, all else counts from the recipe's folder.
    fn resolve(&mut self, key: &str, text: &str) -> PathBuf {
        let rest = match text.strip_prefix('~') {
            Some("") => Some(""),
            Some(rest) => rest.strip_prefix('/'),
            None => return tidy(&self.folder.join(text)),
        };
        match (
            rest,
            std::env::home_dir().filter(|home| home.is_absolute() && home.to_str().is_some()),
        ) {
            (Some(rest), Some(home)) => tidy(&home.join(rest)),
            _ => {
                self.refuse(
                    key,
                    "`~` alone or `~/...`, with a home folder that is known",
                    "write the whole path, from `/` on",
                );
                PathBuf::from(text)
            }
        }
    }

    /// Notes that what the recipe wrote for `key` is neither an id nor a path.
    fn refuse(&mut self, key: &str, rule: &str, hint: &str) {
        if let Some(place) = self.given.written(key) {
            let what = format!("`{key}` cannot be {}", self.mistakes.words(place));
            self.mistakes.add(place, what, rule, hint);
        }
    }
}

/// Without `.` parts: `./train.jsonl` is shown as `FOLDER/train.jsonl`. `..` stays, for a link may stand before it.
fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}

fn train(given: &Given) -> Train {
    let length = match (given.get("train.steps"), given.get("train.epochs")) {
        (Some(Value::Count(steps)), _) => Length::Steps(*steps),
        (_, Some(Value::Number(epochs))) => Length::Epochs(*epochs),
        // Neither: noted as missing or as a mistake of its own.
        _ => Length::Steps(1),
    };
    let warmup = match given.get("train.warmup_steps") {
        Some(Value::Count(steps)) => Warmup::Steps(*steps),
        _ => Warmup::Ratio(given.number("train.warmup_ratio")),
    };
    Train {
        length,
        micro_batch_size: given.size("train.micro_batch_size"),
        gradient_accumulation_steps: given.size("train.gradient_accumulation_steps"),
        learning_rate: given.number("train.learning_rate"),
        schedule: given.word("train.schedule"),
        warmup,
        adam_beta1: given.number("train.adam_beta1"),
        adam_beta2: given.number("train.adam_beta2"),
        adam_epsilon: given.number("train.adam_epsilon"),
        weight_decay: given.number("train.weight_decay"),
        max_grad_norm: given.number("train.max_grad_norm"),
        eval_every: given.count("train.eval_every"),
        save_every: given.count("train.save_every"),
        save_total_limit: given.size("train.save_total_limit"),
        keep_best: given.flag("train.keep_best"),
        activation_checkpointing: match given
            .get("train.activation_checkpointing")
            .and_then(Value::count)
        {
            Some(blocks) => Checkpointing::Blocks(blocks as usize),
            None => given.word("train.activation_checkpointing"),
        },
    }
}

pub(super) fn targets(value: &Value, all_linear: bool) -> Option<Targets> {
    match value {
        Value::Text(text) if all_linear && text == ALL_LINEAR => Some(Targets::AllLinear),
        Value::Text(regex) => Some(Targets::Regex(regex.clone())),
        Value::Names(names) => Some(Targets::Names(names.clone())),
        _ => None,
    }
}

impl ModelId {
    /// What a model's name means, seen from `folder`; `None` where it can be neither a hub id, a directory nor `embedded:NAME`.
    pub fn parse(text: &str, folder: &Path) -> Option<ModelId> {
        if let Some(name) = text.strip_prefix(EMBEDDED) {
            return is_hub_name(name).then(|| ModelId::Embedded(name.to_string()));
        }
        if says_path(text) || folder.join(text).is_dir() {
            return Some(ModelId::Directory(tidy(&folder.join(text))));
        }
        (is_hub_name(text) || is_hub_id(text)).then(|| ModelId::Hub(text.to_string()))
    }
}

/// Whether a text can only be a path.
fn says_path(text: &str) -> bool {
    text.starts_with(['.', '~']) || Path::new(text).is_absolute() || text.starts_with('/')
}

/// `owner/name`.
pub(super) fn is_hub_id(text: &str) -> bool {
    text.split_once('/')
        .is_some_and(|(owner, name)| is_hub_name(owner) && is_hub_name(name))
}

/// The hub's rule for a part of an id (`huggingface_hub.utils.validate_repo_id`): at most 96 of letters, digits, `-`, `_`, `.`;
/// neither `--` nor `..`, no `-` or `.` at an end, no `.git` at the end.
fn is_hub_name(text: &str) -> bool {
    let ends_well = |c: char| !matches!(c, '-' | '.');
    (1..=96).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && text.starts_with(ends_well)
        && text.ends_with(ends_well)
        && !text.contains("--")
        && !text.contains("..")
        && !text.ends_with(".git")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cases derived by hand from the rule above, clause by clause.
    #[test]
    fn hub_names_follow_the_hubs_rule() {
        for good in ["Foo-BAR_foo.bar123", "x", &"a".repeat(96)] {
            assert!(is_hub_name(good), "{good}");
        }
        for bad in [
            "",
            "foo--bar",
            "foo..bar",
            ".foo",
            "foo-",
            "foo.git",
            "foo bar",
            "foo/bar",
            "é",
            &"a".repeat(97),
        ] {
            assert!(!is_hub_name(bad), "{bad}");
        }
        assert!(is_hub_id("owner/name") && !is_hub_id("name") && !is_hub_id("owner/name/more"));
    }
}
