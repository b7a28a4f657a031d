//! A PEFT adapter's directory: loading, attaching to a model, saving.
//!
//! Takes a directory with `adapter_config.json` and `adapter_model.safetensors`; returns a checked configuration and tensors as
//! f32, or writes both files. Strict: features that are not supported, and tensors and configuration that disagree, are refused
//! by name, all in one error. Knows nothing of computation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;

use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::text::first_few;

use super::adaptation::{
    Adaptation, ModelLayout, PREFIX, Part, Place, TOKEN_ROWS, is_saved, token_problem,
};
use super::config::{CONFIG_FILE, PeftConfig};
pub use super::directory::{WEIGHTS_FILE, load_config};
use super::directory::{WeightsFile, to_f32};
use super::keys;
use super::options::{Bias, LoraConfig, Targets};
use super::shards::{F32Tensor, write_f32s};
use super::target_errors::last_segments;
use super::targets::{
    Module, ModuleKind, RankResolver, select_matching, select_modules, unmatched_entries,
};
use super::unsupported::{parse_tensor_name, unsupported_settings};

/// A tensor of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredValues {
    /// Its dimensions: A is (r, in), B is (out, r).
    pub shape: Vec<usize>,
    /// Values, row by row.
    pub values: Vec<f32>,
}

/// A checked adapter: every name is known, every pair is complete and of the configured rank, every value is finite.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedAdapter {
    /// Its `adapter_config.json`.
    pub config: PeftConfig,
    /// Its tensors by full PEFT name.
    pub tensors: BTreeMap<String, StoredValues>,
    /// The base model's embeddings, which PEFT saves beside LoRA on them, by name in the model.
    pub base_embeddings: BTreeMap<String, StoredValues>,
}

/// Reads the adapter in the directory `dir`.
///
/// # Errors
/// A file that is missing or damaged; features that are not supported, all in one error.
pub fn load(dir: &Path) -> Result<LoadedAdapter> {
    let checked = check(load_config(dir)?, &WeightsFile::read(dir)?)?;
    fail_on_problems(
        checked.problems,
        "cannot be loaded",
        Some(dir),
        "train LoRA or DoRA, or merge it with PEFT",
    )?;
    Ok(checked.adapter)
}

/// An adapter and the reasons why it cannot be loaded.
pub(super) struct Checked {
    /// The tensors that can be read.
    pub(super) adapter: LoadedAdapter,
    /// One sentence each; none: it can be loaded.
    pub(super) problems: Vec<String>,
}

/// Checks configuration and tensors.
///
/// # Errors
/// A damaged file, and a pattern that is no regular expression.
pub(super) fn check(config: PeftConfig, file: &WeightsFile) -> Result<Checked> {
    let mut problems = unsupported_settings(&config);
    let mut tensors = BTreeMap::new();
    let mut base_embeddings = BTreeMap::new();
    for (name, view) in file.tensors()? {
        let name = name.as_str();
        if let Some(tensor) = base_embedding(name) {
            let values = to_f32(view.dtype(), view.data()).unwrap_or_default();
            let shape = view.shape().to_vec();
            base_embeddings.insert(tensor, StoredValues { shape, values });
            continue;
        }
        match read_tensor(name, &view, &config) {
            Ok(tensor) => drop(tensors.insert(name.to_string(), tensor)),
            Err(reason) => problems.push(format!("`{name}`: {reason}")),
        }
    }
    problems.extend(pair_problems(&tensors, &config)?);
    if tensors.is_empty() && problems.is_empty() {
        problems.push(format!("`{WEIGHTS_FILE}` holds no tensor"));
    }
    let adapter = LoadedAdapter {
        config,
        tensors,
        base_embeddings,
    };
    Ok(Checked { adapter, problems })
}

fn read_tensor(name: &str, view: &TensorView, config: &PeftConfig) -> Result<StoredValues, String> {
    let shape = view.shape().to_vec();
    if saved_weight(name, config).is_none() && !is_token_rows(name, config) {
        let (_, part) = parse_tensor_name(name)?;
        let dimensions = if matches!(part, Part::Magnitude | Part::Bias) {
            1
        } else {
            2
        };
        if shape.len() != dimensions {
            return Err(format!("its shape is {shape:?}, not {dimensions} numbers"));
        }
    }
    let values = to_f32(view.dtype(), view.data()).ok_or_else(|| {
        format!(
            "its type is {:?}; F32, F16 and BF16 can be read",
            view.dtype()
        )
    })?;
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(format!("it holds {value}, which is not a finite number")),
        None => Ok(StoredValues { shape, values }),
    }
}

/// The name in the model of the frozen weight below LoRA that the tensor `name` holds.
pub(super) fn base_embedding(name: &str) -> Option<String> {
    let path = name
        .strip_prefix(PREFIX)?
        .strip_suffix(".base_layer.weight")?;
    Some(format!("{path}.weight"))
}

/// The weight of the model that the tensor `name` replaces, if `modules_to_save` names it or it is a trained bias.
fn saved_weight<'n>(name: &'n str, config: &PeftConfig) -> Option<&'n str> {
    let tensor = name.strip_prefix(PREFIX)?;
    let names = config.modules_to_save.as_deref().unwrap_or_default();
    let bias = tensor.ends_with(".bias") && !tensor.ends_with(Part::Bias.suffix());
    // Where the tie is ensured the other embedding is saved too, although no name is its own.
    let tied = config.ensure_weight_tying
        && !names.is_empty()
        && parse_tensor_name(name).is_err()
        && !name.ends_with(TOKEN_ROWS);
    (is_saved(tensor, names) || tied || (bias && config.bias != Bias::None)).then_some(tensor)
}

/// Whether the tensor `name` holds the trained rows of an embedding.
fn is_token_rows(name: &str, config: &PeftConfig) -> bool {
    config.trainable_token_indices.is_some() && name.ends_with(TOKEN_ROWS)
}

/// Factors without their counterpart, parts that the configuration does not have, and shapes that contradict its rank.
fn pair_problems(
    tensors: &BTreeMap<String, StoredValues>,
    config: &PeftConfig,
) -> Result<Vec<String>> {
    let ranks = RankResolver::new(&config.settings())?;
    let mut problems = Vec::new();
    for path in paths(tensors) {
        let embedding = [Part::EmbeddingA, Part::EmbeddingB];
        let is_embedding = embedding
            .iter()
            .any(|part| tensors.contains_key(&part.name(path)));
        let pair = if is_embedding {
            embedding
        } else {
            [Part::A, Part::B]
        };
        let [a, b] = pair.map(|part| part.name(path));
        let (Some(a_matrix), Some(b_matrix)) = (tensors.get(&a), tensors.get(&b)) else {
            let (there, missing) = if tensors.contains_key(&a) {
                (&a, &b)
            } else {
                (&b, &a)
            };
            problems.push(format!("`{there}`: its other half `{missing}` is missing"));
            continue;
        };
        let r = ranks.rank(path)?;
        if a_matrix.shape[0] != r {
            let shape = &a_matrix.shape;
            problems.push(format!(
                "`{a}`: its shape is {shape:?}, but `{CONFIG_FILE}` gives it rank {r}, so {r} rows"
            ));
        }
        if b_matrix.shape[1] != r {
            let shape = &b_matrix.shape;
            problems.push(format!("`{b}`: its shape is {shape:?}, but `{CONFIG_FILE}` gives it rank {r}, so {r} columns"));
        }
        for (part, key, wanted) in [
            (Part::Magnitude, "use_dora", config.use_dora),
            (Part::Bias, "lora_bias", config.lora_bias),
        ] {
            let name = part.name(path);
            match (tensors.contains_key(&name), wanted) {
                (true, false) => {
                    problems.push(format!("`{name}`: `{key}` of `{CONFIG_FILE}` is false"))
                }
                (false, true) => problems.push(format!(
                    "`{name}` is missing: `{key}` of `{CONFIG_FILE}` is true"
                )),
                _ => {}
            }
        }
    }
    Ok(problems)
}

/// The module paths that have a tensor, sorted, once each.
fn paths(tensors: &BTreeMap<String, StoredValues>) -> BTreeSet<&str> {
    tensors
        .keys()
        .filter_map(|name| parse_tensor_name(name).ok())
        .map(|(path, _)| path)
        .collect()
}

/// One error for all `problems`, or none.
pub(super) fn fail_on_problems(
    problems: Vec<String>,
    verdict: &str,
    dir: Option<&Path>,
    hint: &str,
) -> Result<()> {
    const SHOWN: usize = 20;
    if problems.is_empty() {
        return Ok(());
    }
    let list = first_few(problems, SHOWN).join("\n  - ");
    let error = Error::new(Kind::Adapter, format!("the adapter {verdict}:\n  - {list}")).hint(hint);
    Err(match dir {
        Some(dir) => error.at(dir.display().to_string()),
        None => error,
    })
}

impl LoadedAdapter {
    /// What the adapter changes in a model of this layout.
    ///
    /// # Errors
    /// A tensor whose module is not there or has other sizes; a tensor whose module `adapter_config.json` does not select, which
    /// PEFT drops; a module that it selects and that has no tensor. All of them in one error.
    pub fn adaptation(&self, layout: &ModelLayout) -> Result<Adaptation> {
        let settings = self.config.settings();
        let selected = select_matching(&layout.modules, &layout.output_embedding, &settings)?;
        let adaptation = Adaptation::new(layout, &settings, selected);
        let mut problems = self.shape_mismatches(&layout.modules);
        if problems.is_empty() {
            let present = paths(&self.tensors);
            let selected = adaptation.sites.iter().map(|site| site.path.as_str());
            problems.extend(selection_mismatches(
                &present,
                selected.collect(),
                &settings,
            ));
        }
        problems.extend(self.weight_mismatches(&adaptation));
        problems.extend(token_problem(layout, &settings, &adaptation));
        problems.extend(adaptation.unsupported(layout, &settings));
        let base = self
            .config
            .base_model_name_or_path
            .as_deref()
            .unwrap_or("a model it does not name");
        let hint = format!(
            "the adapter was trained on {base}: choose that model, and keep `{CONFIG_FILE}` and `{WEIGHTS_FILE}` as they were saved"
        );
        fail_on_problems(problems, "does not fit the model", None, &hint)?;
        Ok(adaptation)
    }

    /// The values of a tensor of [`LoadedAdapter::adaptation`].
    ///
    /// # Errors
    /// A tensor that the adapter lacks.
    pub fn values(&self, name: &str) -> Result<&[f32]> {
        let stored = self.tensors.get(name).ok_or_else(|| {
            Error::new(Kind::Adapter, "the adapter lacks a tensor").value(name.to_string())
        })?;
        Ok(&stored.values)
    }

    /// Weights saved in full that the model lacks, that have another shape, or that are missing.
    fn weight_mismatches(&self, adaptation: &Adaptation) -> Vec<String> {
        let trained = adaptation.tensors().into_iter();
        let whole = trained.filter(|tensor| !matches!(tensor.place, Place::Part(..)));
        let wanted: BTreeMap<String, Vec<usize>> = whole
            .flat_map(|tensor| {
                tensor
                    .names()
                    .into_iter()
                    .map(move |name| (name, tensor.shape.clone()))
            })
            .collect();
        let stored = self.tensors.iter();
        let stored = stored.filter(|(name, _)| {
            saved_weight(name, &self.config).is_some() || is_token_rows(name, &self.config)
        });
        let mut problems = Vec::new();
        for (name, tensor) in stored {
            match wanted.get(name) {
                Some(shape) if tensor.shape == **shape => {}
                Some(shape) => problems.push(format!(
                    "`{name}`: its shape is {:?}, the model's {shape:?}",
                    tensor.shape
                )),
                None => problems.push(format!("`{name}`: the model has no such tensor")),
            }
        }
        let missing = wanted
            .keys()
            .filter(|name| !self.tensors.contains_key(*name));
        problems.extend(missing.map(|name| {
            format!("`{name}`: `modules_to_save`, `bias` or `trainable_token_indices` of `{CONFIG_FILE}` names it, but `{WEIGHTS_FILE}` lacks it")
        }));
        problems
    }

    /// The configuration's settings without the entries that match none of `modules`.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn settings(&self, layout: &ModelLayout) -> Result<LoraConfig> {
        let mut settings = self.config.settings();
        let unmatched = unmatched(layout, &settings)?;
        let keep = |setting: &str, entry: &str| {
            let mut unmatched = unmatched.iter();
            !unmatched.any(|(from, name)| *from == setting && name == entry)
        };
        if let Targets::Names(names) = &mut settings.target_modules {
            names.retain(|name| keep("target_modules", name));
        }
        settings.exclude_modules = settings
            .exclude_modules
            .and_then(|excluded| match excluded {
                Targets::Names(mut names) => {
                    names.retain(|name| keep("exclude_modules", name));
                    (!names.is_empty()).then_some(Targets::Names(names))
                }
                Targets::Regex(regex) => {
                    keep("exclude_modules", &regex).then_some(Targets::Regex(regex))
                }
                Targets::AllLinear => None,
            });
        settings
            .rank_pattern
            .retain(|(key, _)| keep("rank_pattern", key));
        settings
            .alpha_pattern
            .retain(|(key, _)| keep("alpha_pattern", key));
        if let Some(layers) = &mut settings.layers_to_transform {
            layers.retain(|layer| keep("layers_to_transform", &layer.to_string()));
        }
        settings
            .modules_to_save
            .retain(|name| keep("modules_to_save", name));
        if settings.modules_to_save.is_empty() {
            settings.ensure_weight_tying = false;
        }
        Ok(settings)
    }

    /// One sentence for each part of `adapter_config.json` that has no effect: keys that PEFT does not know or ignores, and
    /// entries that match no module of `layout`. `beside` is a regular expression for modules of the model outside `layout`, such
    /// as a vision tower's; as an entry it has an effect.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn warnings(&self, layout: &ModelLayout, beside: Option<&str>) -> Result<Vec<String>> {
        let unmatched = unmatched(layout, &self.config.settings())?;
        let unknown = self.config.unknown.iter().map(|key| keys::unknown(key));
        let mut variants = self.config.variants.clone();
        let conv1d = |module: &Module| module.kind == ModuleKind::Conv1d;
        if layout.modules.iter().any(conv1d) {
            // Its value for such layers.
            variants.remove("fan_in_fan_out");
        }
        let ignored = keys::ignored(&variants);
        let unmatched = unmatched
            .iter()
            .filter(|(_, entry)| beside != Some(entry.as_str()));
        let unmatched = unmatched.map(|(setting, entry)| {
            format!(
                "`{entry}` of the adapter's `{setting}` matches no adapted module and has no effect"
            )
        });
        let untied = self.config.ensure_weight_tying
            && !(layout.tied && self.config.modules_to_save.is_some());
        let untied = untied.then(|| {
            "`ensure_weight_tying` of the adapter is ignored: it trains no tied module".to_string()
        });
        let ignored = ignored.into_iter().chain(untied);
        Ok(unknown.chain(ignored).chain(unmatched).collect())
    }

    /// Tensors whose module is not in `modules` or has other sizes.
    fn shape_mismatches(&self, modules: &[Module]) -> Vec<String> {
        let by_path: BTreeMap<&str, &Module> = modules
            .iter()
            .map(|module| (module.path.as_str(), module))
            .collect();
        let mut problems = Vec::new();
        for (name, tensor) in &self.tensors {
            if saved_weight(name, &self.config).is_some() || is_token_rows(name, &self.config) {
                continue;
            }
            let Ok((path, part)) = parse_tensor_name(name) else {
                problems.push(format!("`{name}`: not a LoRA tensor"));
                continue;
            };
            let shape = &tensor.shape;
            match (by_path.get(path), part) {
                (None, _) => problems.push(format!("`{name}`: {}", no_module(path, modules))),
                (Some(module), Part::A | Part::EmbeddingA) if shape[1] != module.in_features => {
                    problems.push(format!(
                        "`{name}`: {} columns, but the module has {} inputs",
                        shape[1], module.in_features
                    ));
                }
                (Some(module), part)
                    if part != Part::A
                        && part != Part::EmbeddingA
                        && shape[0] != module.out_features =>
                {
                    problems.push(format!(
                        "`{name}`: {} rows, but the module has {} outputs",
                        shape[0], module.out_features
                    ));
                }
                _ => {}
            }
        }
        problems
    }
}

/// Each (setting, entry) that matches nothing in the model.
fn unmatched(layout: &ModelLayout, settings: &LoraConfig) -> Result<Vec<(&'static str, String)>> {
    let (modules, output_embedding) = (&layout.modules, &layout.output_embedding);
    let selected = select_modules(modules, output_embedding, settings)?;
    let mut unmatched = unmatched_entries(modules, &selected, output_embedding, settings)?;
    let missing = layout.missing_modules(&settings.modules_to_save);
    unmatched.extend(missing.into_iter().map(|name| ("modules_to_save", name)));
    Ok(unmatched)
}

/// Modules with tensors that `selected` lacks, and the reverse, by path.
fn selection_mismatches(
    present: &BTreeSet<&str>,
    selected: BTreeSet<&str>,
    settings: &LoraConfig,
) -> Vec<String> {
    let mut by = vec!["target_modules"];
    by.extend(settings.exclude_modules.as_ref().map(|_| "exclude_modules"));
    by.extend(
        settings
            .layers_to_transform
            .as_ref()
            .map(|_| "layers_to_transform"),
    );
    let by = by.join("`, `");
    let dropped = present.difference(&selected).map(|path| {
        format!("`{path}`: `{WEIGHTS_FILE}` holds its tensors, but `{by}` of `{CONFIG_FILE}` leaves it out")
    });
    let missing = selected.difference(present).map(|path| {
        format!(
            "`{path}`: `{CONFIG_FILE}` names this module, but `{WEIGHTS_FILE}` has no tensor for it"
        )
    });
    dropped.chain(missing).collect()
}

/// The error for an unknown `path`: the nearest module with the same last segment, or the names that exist.
fn no_module(path: &str, modules: &[Module]) -> String {
    let last = path.rsplit('.').next().unwrap_or(path);
    // The longest common suffix first: most often the part before the layers differs.
    let alike = |module: &&Module| {
        let common = module
            .path
            .bytes()
            .rev()
            .zip(path.bytes().rev())
            .take_while(|(a, b)| a == b)
            .count();
        (
            std::cmp::Reverse(common),
            strsim::levenshtein(&module.path, path),
        )
    };
    match modules
        .iter()
        .filter(|module| super::matching::is_suffix(&module.path, last))
        .min_by_key(alike)
    {
        Some(module) => format!(
            "the model has no linear layer `{path}`; nearest is `{}`",
            module.path
        ),
        None => format!(
            "the model has no linear layer `{last}`; it has {}",
            last_segments(modules).join(", ")
        ),
    }
}

/// Writes an adapter: `tensors` are (full PEFT name, shape, values row by row), stored as F32, sorted by name. The same input
/// gives the same bytes. Each file is replaced atomically.
///
/// # Errors
/// A file that cannot be written; a name that is not PEFT's or occurs twice; a count that does not fit its shape.
pub fn save(
    dir: &Path,
    config: &PeftConfig,
    tensors: &[(String, Vec<usize>, &[f32])],
) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    let mut seen = BTreeSet::new();
    for (name, shape, values) in tensors {
        let refuse = |why: String| {
            Error::new(Kind::Adapter, format!("`{name}` cannot be saved: {why}"))
                .value(format!("{shape:?}"))
        };
        if saved_weight(name, config).is_none() && !is_token_rows(name, config) {
            parse_tensor_name(name).map_err(|why| refuse(why.to_string()))?;
        }
        if !seen.insert(name) {
            return Err(refuse("the name occurs twice".to_string()));
        }
        let view = F32Tensor::new(name, shape.clone(), values);
        views.push(view.ok_or_else(|| refuse(format!("it has {} values", values.len())))?);
    }
    fs::create_dir_all(dir).map_err(|source| Error::io("create", dir, source))?;
    write_f32s(&dir.join(WEIGHTS_FILE), views, true)?;
    write_atomic(&dir.join(CONFIG_FILE), config.to_text())
}
