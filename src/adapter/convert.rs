//! `adapter convert`: an adapter rewritten under PEFT's names, in another dtype, or as plain LoRA.
//!
//! Takes a directory; writes a new one. Plain LoRA has one rank and one scaling for all modules, which every runtime reads alike.
//! Only forms of the same function are written: what is no low-rank delta is refused by name. Knows nothing of models.

use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

use crate::error::{Error, Kind, Result};
use crate::files::{DraftDirectory, write_atomic};
use crate::units::Bytes;
use crate::work::Precision;

use super::adaptation::Part;
use super::config::{CONFIG_FILE, InitWeights, JsonNumber, ModulePattern, OneOrMany, PeftConfig};
use super::directory::{WEIGHTS_FILE, WeightsFile, load_config};
use super::keys;
use super::options::Bias;
use super::pairs::{NamedTensors, Pair, pairs, peft_name, read_named};
use super::peft::{StoredValues, base_embedding, fail_on_problems};
use super::portability::{Verdict, portability};
use super::unsupported::{changes_the_base, parse_tensor_name};

/// What to write.
#[derive(Debug, Clone, Copy)]
pub struct Conversion<'a> {
    /// The adapter's directory.
    pub dir: &'a Path,
    /// The directory to create.
    pub out: &'a Path,
    /// The type of all tensors; none: each keeps its own.
    pub dtype: Option<Precision>,
    /// Whether to write plain LoRA.
    pub plain: bool,
    /// The adapter before training, of an initialisation that changed the base weights.
    pub initial: Option<&'a Path>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// One sentence for each change.
    pub changes: Vec<String>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all values.
    pub bytes: Bytes,
    /// Whether other programs load the new adapter.
    pub portability: Vec<Verdict>,
}

/// Writes the adapter of `job` anew.
///
/// # Errors
/// Files that cannot be read, a target that exists, what has no plain form, and values out of the new type's range.
pub fn convert(job: &Conversion<'_>) -> Result<Converted> {
    let mut config = load_config(job.dir)?;
    let file = WeightsFile::read(job.dir)?;
    let mut tensors = read_named(&file)?;
    let mut changes = Vec::new();
    let mut renamed = 0;
    for (name, _) in file.tensors()? {
        renamed += usize::from(peft_name(&name)? != name);
    }
    if renamed > 0 {
        changes.push(format!("{renamed} tensors have PEFT's names"));
    }
    if let Some(initial) = job.initial {
        changes.push(subtract_initial(&mut config, &mut tensors, initial)?);
    }
    if job.plain {
        changes.extend(plain(&mut config, &mut tensors)?);
    }
    if let Some(dtype) = job.dtype {
        let stored = match dtype {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
            Precision::F16 => Dtype::F16,
        };
        let others = tensors.values_mut().filter(|tensor| tensor.dtype != stored);
        let converted = others.map(|tensor| tensor.dtype = stored).count();
        if converted > 0 {
            changes.push(format!("{converted} tensors are stored as {stored:?}"));
        }
    }
    let bytes = write(job.out, &config, &tensors)?;
    let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    Ok(Converted {
        changes,
        tensors: tensors.len(),
        bytes,
        portability: portability(&config, &names),
    })
}

/// Adds the negative of an initial adapter to the trained one: rank and alpha double, `[A; A0]`, `[B, -B0]`, as PEFT's
/// `subtract_mutated_init`.
fn subtract_initial(
    config: &mut PeftConfig,
    tensors: &mut NamedTensors,
    initial: &Path,
) -> Result<String> {
    let refuse =
        |what: &str| Error::new(Kind::Adapter, what).at(format!("--initial {}", initial.display()));
    let initial_config = load_config(initial)?;
    let initial_tensors = read_named(&WeightsFile::read(initial)?)?;
    pairs(&initial_config, &initial_tensors)?;
    pairs(config, tensors)?;
    for (name, tensor) in tensors.iter_mut() {
        let part = parse_tensor_name(name).map(|(_, part)| part);
        let (true, Ok(part)) = (matches!(part, Ok(Part::A | Part::B)), part) else {
            return Err(refuse("only plain LoRA can be converted").value(name.clone()));
        };
        let other = initial_tensors.get(name).map(|tensor| &tensor.stored);
        let other = other.filter(|other| other.shape == tensor.stored.shape);
        let other = other.ok_or_else(|| {
            refuse("the initial adapter has no such tensor of the same shape").value(name.clone())
        })?;
        tensor.stored = joined(part, &tensor.stored, other);
    }
    double_rank(config).map_err(|error| error.at(initial.display().to_string()))?;
    Ok("the initial adapter is subtracted: the base weights are the original ones".into())
}

/// `[A; A0]`, or `[B, -B0]`.
pub fn joined(part: Part, trained: &StoredValues, initial: &StoredValues) -> StoredValues {
    let [rows, columns] = [trained.shape[0], trained.shape[1]];
    if part == Part::A {
        return StoredValues {
            shape: vec![2 * rows, columns],
            values: [trained.values.as_slice(), &initial.values].concat(),
        };
    }
    let rows_of = |values: &StoredValues, row: usize| -> Vec<f32> {
        values.values[row * columns..(row + 1) * columns].to_vec()
    };
    let negative = |row| rows_of(initial, row).into_iter().map(|value| -value);
    let values = (0..rows).flat_map(|row| rows_of(trained, row).into_iter().chain(negative(row)));
    StoredValues {
        shape: vec![rows, 2 * columns],
        values: values.collect(),
    }
}

/// Doubles every rank at the same scaling, and `init_lora_weights` is true, as PEFT's
/// `path_initial_model_for_weight_conversion`.
///
/// # Errors
/// `use_rslora` with `rank_pattern` or `alpha_pattern`, which PEFT refuses.
pub fn double_rank(config: &mut PeftConfig) -> Result<()> {
    let patterns = !config.rank_pattern.0.is_empty() || !config.alpha_pattern.0.is_empty();
    if config.use_rslora && patterns {
        return Err(Error::new(
            Kind::Adapter,
            "an initialisation that changes the base weights cannot be combined with `use_rslora` and patterns",
        )
        .rule("PEFT cannot convert such an adapter to plain LoRA")
        .hint("leave out `use_rslora`, or `rank_pattern` and `alpha_pattern`"));
    }
    config.init_lora_weights = InitWeights::Plain(true);
    config.r *= 2;
    config.lora_alpha.0 *= if config.use_rslora {
        f64::sqrt(2.0)
    } else {
        2.0
    };
    config.rank_pattern.0.iter_mut().for_each(|(_, r)| *r *= 2);
    let alphas = config.alpha_pattern.0.iter_mut();
    alphas.for_each(|(_, alpha)| alpha.0 *= 2.0);
    Ok(())
}

/// One rank and one scaling `lora_alpha / r` for all modules: factors are padded with zeros, other scalings multiplied into B.
fn plain(config: &mut PeftConfig, tensors: &mut NamedTensors) -> Result<Vec<String>> {
    refuse_without_plain_form(config, tensors)?;
    let mut changes = Vec::new();
    let all = tensors.len();
    tensors.retain(|name, _| base_embedding(name).is_none());
    if tensors.len() < all {
        changes.push("the copies of the base's embeddings are left out".to_string());
    }
    let found = pairs(config, tensors)?;
    let r = found.iter().map(Pair::r).fold(1, usize::max);
    let scaling = found.first().map_or(1.0, |pair| pair.scaling);
    let mut padded = Vec::new();
    for pair in &found {
        let factor = pair.scaling / scaling;
        for (part, values) in pair.parts.into_iter().zip([pair.a, pair.b]) {
            padded.push((part.name(&pair.path), padded_to(r, part, values, factor)));
        }
    }
    let scaled = found.iter().filter(|pair| pair.scaling != scaling).count();
    let grown = found.iter().filter(|pair| pair.r() != r).count();
    let paths: Vec<String> = found.iter().map(|pair| pair.path.clone()).collect();
    for (name, values) in padded {
        if let Some(tensor) = tensors.get_mut(&name) {
            tensor.stored = values;
        }
    }
    if scaled > 0 {
        changes.push(format!(
            "the scaling of {scaled} modules is multiplied into B"
        ));
    }
    if grown > 0 {
        changes.push(format!("{grown} modules are padded with zeros to rank {r}"));
    }
    if config.use_rslora {
        changes.push("`use_rslora` is false, with `lora_alpha` for the same scaling".into());
    }
    if !matches!(config.target_modules, Some(OneOrMany::Many(_))) {
        changes.push("`target_modules` is a list".into());
        config.target_modules = Some(OneOrMany::Many(paths));
    }
    config.r = r;
    config.lora_alpha = JsonNumber(scaling * r as f64);
    config.use_rslora = false;
    config.rank_pattern = ModulePattern::default();
    config.alpha_pattern = ModulePattern::default();
    config.init_lora_weights = InitWeights::Plain(true);
    Ok(changes)
}

/// Names every part of the adapter that is no low-rank delta.
fn refuse_without_plain_form(config: &PeftConfig, tensors: &NamedTensors) -> Result<()> {
    let mut problems = keys::refused(&config.variants);
    let init = match &config.init_lora_weights {
        InitWeights::Named(name) if changes_the_base(name) => Some(name),
        _ => None,
    };
    problems.extend(init.map(|name| {
        format!(
            "`init_lora_weights` is `{name}`: give the adapter before training, `--initial DIR`"
        )
    }));
    for (used, why) in [
        (
            config.peft_type.as_deref() != Some("LORA"),
            "`peft_type` is not `LORA`",
        ),
        (
            config.use_dora,
            "`use_dora`: its delta has the rank of the base weight",
        ),
        (config.bias != Bias::None, "`bias`: trained biases"),
        (config.lora_bias, "`lora_bias`: biases on B"),
    ] {
        problems.extend(used.then(|| why.to_string()));
    }
    let is_factor = |name: &str| {
        let part = parse_tensor_name(name).map(|(_, part)| part);
        matches!(
            part,
            Ok(Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB)
        )
    };
    let others = tensors
        .keys()
        .filter(|name| !is_factor(name) && base_embedding(name).is_none());
    problems.extend(others.map(|name| format!("`{name}`: no factor of LoRA")));
    let hint = "merge it: `wattune merge --adapter DIR --out MODEL`";
    fail_on_problems(problems, "has no plain LoRA form", None, hint)
}

/// A factor with rank `r`, B multiplied by `factor`.
fn padded_to(r: usize, part: Part, values: &StoredValues, factor: f64) -> StoredValues {
    let [rows, columns] = [values.shape[0], values.shape[1]];
    if matches!(part, Part::A | Part::EmbeddingA) {
        let mut padded = values.values.clone();
        padded.resize(r * columns, 0.0);
        return StoredValues {
            shape: vec![r, columns],
            values: padded,
        };
    }
    let mut padded = vec![0.0; rows * r];
    for (row, values) in values.values.chunks_exact(columns).enumerate() {
        for (to, value) in padded[row * r..].iter_mut().zip(values) {
            *to = (f64::from(*value) * factor) as f32;
        }
    }
    StoredValues {
        shape: vec![rows, r],
        values: padded,
    }
}

/// Writes a new adapter directory, and returns the bytes of its values.
fn write(out: &Path, config: &PeftConfig, tensors: &NamedTensors) -> Result<Bytes> {
    let exists = || {
        Error::new(Kind::Usage, "the output directory exists already")
            .at(out.display().to_string())
            .hint("choose another with `--out DIR`")
    };
    if out.exists() {
        return Err(exists());
    }
    let mut encoded = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let bytes = encode(&tensor.stored.values, tensor.dtype).map_err(|value| {
            Error::new(
                Kind::Adapter,
                format!("`{name}` does not fit {:?}", tensor.dtype),
            )
            .value(value.to_string())
            .hint("choose `--dtype bf16` or `--dtype f32`")
        })?;
        encoded.push((name, tensor, bytes));
    }
    let failed = |why: safetensors::SafeTensorError| Error::new(Kind::Adapter, why.to_string());
    let views = encoded.iter().map(|(name, tensor, bytes)| {
        let view = TensorView::new(tensor.dtype, tensor.stored.shape.clone(), bytes)?;
        Ok((name.as_str(), view))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(failed)?;
    let format = [("format".to_string(), "pt".to_string())]
        .into_iter()
        .collect();
    let file = safetensors::serialize(views, Some(format)).map_err(failed)?;
    let draft = DraftDirectory::new(out)?;
    write_atomic(&draft.path().join(WEIGHTS_FILE), file)?;
    write_atomic(&draft.path().join(CONFIG_FILE), config.to_text())?;
    if !draft.install_new()? {
        return Err(exists());
    }
    let size = encoded.iter().map(|(_, _, bytes)| bytes.len() as u64);
    Ok(Bytes(size.sum()))
}

/// Little-endian values in `dtype`, or the first that is out of its range.
fn encode(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, f32> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    for value in values {
        let rounded = match dtype {
            Dtype::F16 => {
                let half = f16::from_f32(*value);
                bytes.extend(half.to_le_bytes());
                half.to_f32()
            }
            Dtype::BF16 => {
                let half = bf16::from_f32(*value);
                bytes.extend(half.to_le_bytes());
                half.to_f32()
            }
            _ => {
                bytes.extend(value.to_le_bytes());
                *value
            }
        };
        if value.is_finite() && !rounded.is_finite() {
            return Err(*value);
        }
    }
    Ok(bytes)
}
