//! A PEFT adapter's directory: loading, attaching to a model, saving.
//!
//! Takes a directory with `adapter_config.json` and `adapter_model.safetensors`; returns a checked configuration and pairs of
//! A and B as f32, or writes both files. Strict: features other than plain LoRA, and tensors and configuration that disagree, are
//! refused by name, all in one error. Knows nothing of computation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::text::first_few;

use super::config::{CONFIG_FILE, PeftConfig};
use super::keys;
use super::options::{LoraConfig, Targets};
use super::shards::{F32Tensor, write_f32s};
use super::target_errors::last_segments;
use super::targets::{Module, RankResolver, Site, select_modules, unmatched_entries};
use super::unsupported::{Factor, PREFIX, parse_tensor_name, unsupported_settings};

/// File name of the weights in an adapter's directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// A matrix of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows and columns: A is (r, in), B is (out, r).
    pub shape: [usize; 2],
    /// Values, row by row.
    pub values: Vec<f32>,
}

/// A checked adapter: every name is a LoRA factor, every pair is complete and of the configured rank, every value is finite.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedAdapter {
    /// Its `adapter_config.json`.
    pub config: PeftConfig,
    /// Its matrices by full PEFT name.
    pub tensors: BTreeMap<String, Matrix>,
}

/// A LoRA pair on its layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair<'a> {
    /// Layer, rank and scaling.
    pub site: Site,
    /// A, shape (r, in), row by row.
    pub a: &'a [f32],
    /// B, shape (out, r), row by row.
    pub b: &'a [f32],
}

/// The full PEFT name of a factor of the pair on the module `path`.
pub fn tensor_name(path: &str, half: Factor) -> String {
    let letter = match half {
        Factor::A => 'A',
        Factor::B => 'B',
    };
    format!("{PREFIX}{path}.lora_{letter}.weight")
}

/// Reads the adapter in the directory `dir`.
///
/// # Errors
/// A file that is missing or damaged; features other than plain LoRA, all in one error.
pub fn load(dir: &Path) -> Result<LoadedAdapter> {
    let config = load_config(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).map_err(|source| missing_weights(dir, &path, source))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|source| {
        Error::new(
            Kind::Adapter,
            format!("`{WEIGHTS_FILE}` is damaged or no safetensors file: {source}"),
        )
        .at(path.display().to_string())
        .hint("fetch the file again")
    })?;
    let mut problems = unsupported_settings(&config);
    let mut tensors = BTreeMap::new();
    let mut views: Vec<_> = file.iter().collect();
    views.sort_by(|a, b| a.0.cmp(b.0));
    for (name, view) in views {
        match read_matrix(name, &view) {
            Ok(matrix) => drop(tensors.insert(name.to_string(), matrix)),
            Err(reason) => problems.push(format!("`{name}`: {reason}")),
        }
    }
    problems.extend(pair_problems(&tensors, &config)?);
    if tensors.is_empty() && problems.is_empty() {
        problems.push(format!("`{WEIGHTS_FILE}` holds no tensor"));
    }
    fail_on_problems(
        problems,
        "cannot be loaded",
        Some(dir),
        "train a plain LoRA (`bias` none, no DoRA, no `modules_to_save`), or merge it with PEFT",
    )?;
    Ok(LoadedAdapter { config, tensors })
}

/// Reads `adapter_config.json` of the directory `dir`.
pub fn load_config(dir: &Path) -> Result<PeftConfig> {
    let path = dir.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|source| {
        if source.kind() != std::io::ErrorKind::NotFound {
            return Error::io("read", &path, source);
        }
        let error = Error::new(Kind::Adapter, format!("there is no `{CONFIG_FILE}`"))
            .at(dir.display().to_string());
        match adapter_below(dir) {
            Some(inner) => error.hint(format!(
                "there is one in `{}`: name that directory",
                inner.display()
            )),
            None => error.hint(
                "name the directory that PEFT's save_pretrained, or a run's `adapter/`, wrote",
            ),
        }
    })?;
    PeftConfig::parse(&text, &path)
}

/// The first directory below `dir` with an adapter: PEFT saves an adapter not named "default" in a subdirectory.
fn adapter_below(dir: &Path) -> Option<std::path::PathBuf> {
    let mut inner: Vec<_> = fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    inner.sort();
    inner
        .into_iter()
        .find(|path| path.join(CONFIG_FILE).is_file())
}

fn missing_weights(dir: &Path, path: &Path, source: std::io::Error) -> Error {
    if source.kind() != std::io::ErrorKind::NotFound {
        return Error::io("read", path, source);
    }
    if dir.join("adapter_model.bin").exists() {
        return Error::new(Kind::Adapter, "the adapter's weights are a pickle, which can run code when it is read")
            .at(dir.join("adapter_model.bin").display().to_string())
            .rule(format!("the weights are in `{WEIGHTS_FILE}`"))
            .hint(
                "convert it in that directory: python -c \"import torch, safetensors.torch as s; \
                 s.save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True, \
                 map_location='cpu').items()}, 'adapter_model.safetensors', metadata={'format': 'pt'})\"",
            );
    }
    Error::new(Kind::Adapter, format!("there is no `{WEIGHTS_FILE}`"))
        .at(dir.display().to_string())
        .hint("copy the file beside `adapter_config.json`; sharded adapters must be joined first")
}

fn read_matrix(name: &str, view: &TensorView) -> Result<Matrix, String> {
    parse_tensor_name(name)?;
    let &[rows, columns] = view.shape() else {
        return Err(format!("its shape is {:?}, not two numbers", view.shape()));
    };
    let values = to_f32(view.dtype(), view.data()).ok_or_else(|| {
        format!(
            "its type is {:?}; F32, F16 and BF16 can be read",
            view.dtype()
        )
    })?;
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(format!("it holds {value}, which is not a finite number")),
        None => Ok(Matrix {
            shape: [rows, columns],
            values,
        }),
    }
}

/// Little-endian values as f32, or none if `dtype` is not a float of 16 or 32 bits.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let words = bytes.as_chunks().0.iter().copied();
    let halves = bytes.as_chunks().0.iter().copied();
    match dtype {
        Dtype::F32 => Some(words.map(f32::from_le_bytes).collect()),
        Dtype::F16 => Some(
            halves
                .map(|b| half::f16::from_le_bytes(b).to_f32())
                .collect(),
        ),
        Dtype::BF16 => Some(
            halves
                .map(|b| half::bf16::from_le_bytes(b).to_f32())
                .collect(),
        ),
        _ => None,
    }
}

/// Factors without their counterpart, and shapes that contradict the configured rank.
fn pair_problems(tensors: &BTreeMap<String, Matrix>, config: &PeftConfig) -> Result<Vec<String>> {
    let ranks = RankResolver::new(&config.settings())?;
    let mut problems = Vec::new();
    for path in paths(tensors) {
        let [a, b] = [Factor::A, Factor::B].map(|half| tensor_name(path, half));
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
            let shape = a_matrix.shape;
            problems.push(format!(
                "`{a}`: its shape is {shape:?}, but `{CONFIG_FILE}` gives it rank {r}, so {r} rows"
            ));
        }
        if b_matrix.shape[1] != r {
            let shape = b_matrix.shape;
            problems.push(format!("`{b}`: its shape is {shape:?}, but `{CONFIG_FILE}` gives it rank {r}, so {r} columns"));
        }
    }
    Ok(problems)
}

/// The module paths that have a tensor, sorted, once each.
fn paths(tensors: &BTreeMap<String, Matrix>) -> BTreeSet<&str> {
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
    /// Each LoRA pair with its layer, in the order of `modules` (the model's linear layers, of which `output_embedding` is the one
    /// that `all-linear` leaves out).
    ///
    /// # Errors
    /// A tensor whose module is not there or has other sizes; a tensor whose module `adapter_config.json` does not select, which
    /// PEFT drops; a module that it selects and that has no tensor. All of them in one error.
    pub fn attach(&self, modules: &[Module], output_embedding: &str) -> Result<Vec<LoraPair<'_>>> {
        let settings = self.config.settings();
        let ranks = RankResolver::new(&settings)?;
        let mut problems = self.shape_mismatches(modules);
        let present = paths(&self.tensors);
        let selected = select_modules(modules, output_embedding, &settings)?;
        let selected: Vec<&str> = selected.iter().map(|module| module.path.as_str()).collect();
        if problems.is_empty() {
            problems.extend(selection_mismatches(&present, &selected, &settings));
        }
        let base = self
            .config
            .base_model_name_or_path
            .as_deref()
            .unwrap_or("a model it does not name");
        let hint = format!(
            "the adapter was trained on {base}: choose that model, and keep `{CONFIG_FILE}` and `{WEIGHTS_FILE}` as they were saved"
        );
        fail_on_problems(problems, "does not fit the model", None, &hint)?;
        let mut fitted = Vec::new();
        for module in modules
            .iter()
            .filter(|module| present.contains(module.path.as_str()))
        {
            let [a, b] = [Factor::A, Factor::B].map(|half| {
                self.tensors[&tensor_name(&module.path, half)]
                    .values
                    .as_slice()
            });
            fitted.push(LoraPair {
                site: ranks.site(module)?,
                a,
                b,
            });
        }
        Ok(fitted)
    }

    /// The configuration's settings without the entries that match none of `modules`.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn settings(&self, modules: &[Module], output_embedding: &str) -> Result<LoraConfig> {
        let mut settings = self.config.settings();
        let selected = select_modules(modules, output_embedding, &settings)?;
        let unmatched = unmatched_entries(modules, &selected, output_embedding, &settings)?;
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
        Ok(settings)
    }

    /// One sentence for each part of `adapter_config.json` that has no effect: keys that PEFT does not know or ignores, and
    /// entries that match none of `modules`, except the expression `beside` for modules of the model that are not listed.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn warnings(
        &self,
        modules: &[Module],
        output_embedding: &str,
        beside: Option<&str>,
    ) -> Result<Vec<String>> {
        let settings = self.config.settings();
        let selected = select_modules(modules, output_embedding, &settings)?;
        let unmatched = unmatched_entries(modules, &selected, output_embedding, &settings)?;
        let unknown = self.config.unknown.iter().map(|key| keys::unknown(key));
        let ignored = keys::ignored(&self.config.variants);
        let unmatched = unmatched
            .iter()
            .filter(|(_, entry)| beside != Some(entry.as_str()));
        let unmatched = unmatched.map(|(setting, entry)| {
            format!(
                "`{entry}` of the adapter's `{setting}` matches no adapted layer and has no effect"
            )
        });
        Ok(unknown.chain(ignored).chain(unmatched).collect())
    }

    /// Tensors whose module is not in `modules` or has other sizes.
    fn shape_mismatches(&self, modules: &[Module]) -> Vec<String> {
        let by_path: BTreeMap<&str, &Module> = modules
            .iter()
            .map(|module| (module.path.as_str(), module))
            .collect();
        let mut problems = Vec::new();
        for (name, matrix) in &self.tensors {
            let Ok((path, half)) = parse_tensor_name(name) else {
                problems.push(format!("`{name}`: not a LoRA tensor"));
                continue;
            };
            let [rows, columns] = matrix.shape;
            match (by_path.get(path), half) {
                (None, _) => problems.push(format!("`{name}`: {}", no_module(path, modules))),
                (Some(module), Factor::A) if columns != module.in_features => {
                    problems.push(format!(
                        "`{name}`: {columns} columns, but the module has {} inputs",
                        module.in_features
                    ));
                }
                (Some(module), Factor::B) if rows != module.out_features => {
                    problems.push(format!(
                        "`{name}`: {rows} rows, but the module has {} outputs",
                        module.out_features
                    ));
                }
                _ => {}
            }
        }
        problems
    }
}

/// Modules with tensors that `selected` lacks, and the reverse, by path.
fn selection_mismatches(
    present: &BTreeSet<&str>,
    selected: &[&str],
    settings: &LoraConfig,
) -> Vec<String> {
    let selected: BTreeSet<&str> = selected.iter().copied().collect();
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
/// A file that cannot be written; a name, shape or count that is not a LoRA factor's.
pub fn save(
    dir: &Path,
    config: &PeftConfig,
    tensors: &[(String, [usize; 2], &[f32])],
) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    let mut seen = BTreeSet::new();
    for (name, shape, values) in tensors {
        let refuse = |why: String| {
            Error::new(Kind::Adapter, format!("`{name}` cannot be saved: {why}"))
                .value(format!("{shape:?}"))
        };
        parse_tensor_name(name).map_err(|why| refuse(why.to_string()))?;
        if !seen.insert(name) {
            return Err(refuse("the name occurs twice".to_string()));
        }
        let view = F32Tensor::new(name, shape.to_vec(), values);
        views.push(view.ok_or_else(|| refuse(format!("it has {} values", values.len())))?);
    }
    fs::create_dir_all(dir).map_err(|source| Error::io("create", dir, source))?;
    write_f32s(&dir.join(WEIGHTS_FILE), views, true)?;
    write_atomic(&dir.join(CONFIG_FILE), config.to_text())
}
