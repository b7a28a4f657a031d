//! The tensors of any PEFT file under PEFT's names, and the LoRA pairs among them.
//!
//! Takes the tensors of a file; returns values by the name that PEFT's save_pretrained gives them, and for each module its factors
//! and scaling. Knows nothing of what can be trained.

use std::collections::BTreeMap;

use regex::Regex;
use safetensors::tensor::Dtype;

use crate::error::{Error, Kind, Result};

use super::adaptation::{PREFIX, Part};
use super::config::{CONFIG_FILE, PeftConfig};
use super::directory::{WEIGHTS_FILE, WeightsFile, to_f32};
use super::peft::StoredValues;
use super::targets::{Module, ModuleKind, RankResolver};
use super::unsupported::parse_tensor_name;

/// Names in a state dict that PEFT's save_pretrained changes: it removes the adapter's name and the wrappers of modules.
const RENAMES: [(&str, &str); 5] = [
    (r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", ".$1.$2"),
    (r"\.(lora_embedding_[AB])\.[^.]+$", ".$1"),
    (
        r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$",
        ".lora_magnitude_vector",
    ),
    (r"\.modules_to_save\.[^.]+\.", "."),
    (
        r"\.token_adapter\.trainable_tokens_delta\.[^.]+$",
        ".token_adapter.trainable_tokens_delta",
    ),
];

/// The tensors of a file by PEFT's names.
pub(super) type NamedTensors = BTreeMap<String, NamedTensor>;

/// A tensor and its type in the file.
pub(super) struct NamedTensor {
    /// The type it was stored in.
    pub(super) dtype: Dtype,
    /// Its values.
    pub(super) stored: StoredValues,
}

/// Reads every tensor of `file`, renamed as PEFT saves it.
///
/// # Errors
/// A damaged file, a type that is not F32, F16 or BF16, and two tensors with one name.
pub(super) fn read_named(file: &WeightsFile) -> Result<NamedTensors> {
    let mut tensors = NamedTensors::new();
    for (name, view) in file.tensors()? {
        let dtype = view.dtype();
        let refuse = |what: String| {
            Error::new(Kind::Adapter, what)
                .at(format!("`{name}` of `{WEIGHTS_FILE}`"))
                .hint("save the adapter again with PEFT's `model.save_pretrained(DIR)`")
        };
        let values = to_f32(dtype, view.data()).ok_or_else(|| {
            refuse("the tensor's type cannot be read".into())
                .value(format!("{dtype:?}"))
                .rule("F32, F16 or BF16")
        })?;
        let shape = view.shape().to_vec();
        let tensor = NamedTensor {
            dtype,
            stored: StoredValues { shape, values },
        };
        if tensors.insert(peft_name(&name)?, tensor).is_some() {
            return Err(
                refuse("two tensors have the same name in PEFT".into()).value(peft_name(&name)?)
            );
        }
    }
    Ok(tensors)
}

/// The name that PEFT's save_pretrained gives the tensor `name` of a state dict.
pub(super) fn peft_name(name: &str) -> Result<String> {
    let mut name = name.to_string();
    for (pattern, replacement) in RENAMES {
        let regex =
            Regex::new(pattern).map_err(|source| Error::new(Kind::Adapter, source.to_string()))?;
        name = regex.replace(&name, replacement).into_owned();
    }
    if name.starts_with(PREFIX) {
        return Ok(name);
    }
    Ok(format!("{PREFIX}{name}"))
}

/// LoRA on one module: the delta is `scaling * B A`.
pub(super) struct Pair<'t> {
    /// The module.
    pub(super) path: String,
    /// A (r, in), or that of an embedding.
    pub(super) a: &'t StoredValues,
    /// B (out, r).
    pub(super) b: &'t StoredValues,
    /// Its A and B.
    pub(super) parts: [Part; 2],
    /// `alpha / r` or `alpha / sqrt(r)` of this module.
    pub(super) scaling: f64,
}

impl Pair<'_> {
    /// Its rank.
    pub(super) fn r(&self) -> usize {
        self.a.shape[0]
    }
}

/// The pairs among `tensors`, by path.
///
/// # Errors
/// A factor without its counterpart, or with another rank than the configuration's.
pub(super) fn pairs<'t>(config: &PeftConfig, tensors: &'t NamedTensors) -> Result<Vec<Pair<'t>>> {
    let ranks = RankResolver::new(&config.settings())?;
    let mut pairs = Vec::new();
    for (name, a) in tensors {
        let parts = match parse_tensor_name(name) {
            Ok((_, Part::A)) => [Part::A, Part::B],
            Ok((_, Part::EmbeddingA)) => [Part::EmbeddingA, Part::EmbeddingB],
            _ => continue,
        };
        let (path, _) = parse_tensor_name(name).map_err(|why| Error::new(Kind::Adapter, why))?;
        let refuse = |what: String| {
            Error::new(Kind::Adapter, what)
                .at(format!("`{name}` of `{WEIGHTS_FILE}`"))
                .hint("save the adapter again with PEFT's `model.save_pretrained(DIR)`")
        };
        let (a, r) = (&a.stored, ranks.rank(path)?);
        let missing =
            || refuse("the other half of a pair is missing".into()).value(parts[1].name(path));
        let b = &tensors
            .get(&parts[1].name(path))
            .ok_or_else(missing)?
            .stored;
        if a.shape.len() != 2 || b.shape.len() != 2 || a.shape[0] != r || b.shape[1] != r {
            return Err(refuse("the shapes of a pair do not fit its rank".into())
                .value(format!("{:?} and {:?}", a.shape, b.shape))
                .rule(format!(
                    "(r, in) and (out, r) with r = {r}, as `{CONFIG_FILE}` says"
                )));
        }
        let module = Module {
            path: path.to_string(),
            out_features: b.shape[0],
            in_features: a.shape[1],
            kind: ModuleKind::Linear,
        };
        pairs.push(Pair {
            scaling: ranks.site(&module)?.scaling,
            path: module.path,
            a,
            b,
            parts,
        });
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as in `get_peft_model_state_dict`, and as in `model.state_dict()`.
    #[test]
    fn names_of_a_state_dict_become_those_of_a_file() {
        for (raw, saved) in [
            (
                "base_model.model.m.q.lora_A.default.weight",
                "m.q.lora_A.weight",
            ),
            (
                "base_model.model.m.q.lora_B.my_name.bias",
                "m.q.lora_B.bias",
            ),
            (
                "model.layers.0.q.lora_A.weight",
                "model.layers.0.q.lora_A.weight",
            ),
            (
                "base_model.model.m.e.lora_embedding_A.default",
                "m.e.lora_embedding_A",
            ),
            (
                "base_model.model.m.q.lora_magnitude_vector.default.weight",
                "m.q.lora_magnitude_vector",
            ),
            (
                "base_model.model.m.q.lora_magnitude_vector.weight",
                "m.q.lora_magnitude_vector",
            ),
            (
                "base_model.model.m.q.lora_magnitude_vector",
                "m.q.lora_magnitude_vector",
            ),
            (
                "base_model.model.lm_head.modules_to_save.default.weight",
                "lm_head.weight",
            ),
            (
                "base_model.model.m.e.token_adapter.trainable_tokens_delta.default",
                "m.e.token_adapter.trainable_tokens_delta",
            ),
        ] {
            assert_eq!(peft_name(raw).unwrap(), format!("{PREFIX}{saved}"), "{raw}");
        }
    }
}
