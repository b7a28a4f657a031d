//! `adapter diff`: how two adapters differ.
//!
//! Takes two adapters of one model; returns the configuration keys that differ, and for each module the Frobenius norms and the
//! cosine of its deltas D = scaling B A, computed from products of (r, r) matrices without D. Other tensors are compared as they
//! are. Knows nothing of models.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::error::Result;

use super::adaptation::PREFIX;
use super::config::PeftConfig;
use super::directory::{WeightsFile, load_config};
use super::pairs::{NamedTensors, Pair, pairs, read_named};
use super::peft::base_embedding;
use super::unsupported::parse_tensor_name;

/// The differences of two adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Keys of `adapter_config.json` with different values.
    pub config: Vec<KeyDifference>,
    /// Modules with LoRA in either, by path.
    pub modules: Vec<DeltaDifference>,
    /// Other trained tensors in either, by name.
    pub tensors: Vec<DeltaDifference>,
    /// All of them as one vector.
    pub total: Norms,
}

/// A configuration key.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct KeyDifference {
    pub key: String,
    pub first: Value,
    pub second: Value,
}

/// A module or tensor. What one adapter lacks is zero there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeltaDifference {
    /// Path or name.
    pub name: String,
    /// `true`: the shapes differ, and there is nothing to compare.
    pub shapes_differ: bool,
    /// Norms of both and of their difference.
    #[serde(flatten)]
    pub norms: Norms,
}

/// Frobenius norms of two deltas.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Norms {
    /// Of the first.
    pub first: f64,
    /// Of the second.
    pub second: f64,
    /// Of their difference.
    pub difference: f64,
    /// Cosine of the angle between them; `None` if one is zero.
    pub cosine: Option<f64>,
}

/// Inner products of two deltas.
#[derive(Clone, Copy, Default)]
struct Products {
    first: f64,
    second: f64,
    both: f64,
}

impl Products {
    fn norms(self) -> Norms {
        let Self {
            first,
            second,
            both,
        } = self;
        let product = (first * second).sqrt();
        Norms {
            first: first.sqrt(),
            second: second.sqrt(),
            difference: (first + second - 2.0 * both).max(0.0).sqrt(),
            cosine: (product > 0.0).then(|| (both / product).clamp(-1.0, 1.0)),
        }
    }

    fn add(&mut self, other: Self) {
        self.first += other.first;
        self.second += other.second;
        self.both += other.both;
    }
}

/// Compares the adapters in the directories `first` and `second`.
///
/// # Errors
/// Files that cannot be read, and pairs that do not fit their configuration.
pub fn diff(first: &Path, second: &Path) -> Result<Difference> {
    let open = |dir: &Path| -> Result<(PeftConfig, NamedTensors)> {
        Ok((load_config(dir)?, read_named(&WeightsFile::read(dir)?)?))
    };
    let (first_config, first_tensors) = open(first)?;
    let (second_config, second_tensors) = open(second)?;
    let mut total = Products::default();
    let first_pairs = pairs(&first_config, &first_tensors)?;
    let second_pairs = pairs(&second_config, &second_tensors)?;
    let modules = compare(&by_path(&first_pairs), &by_path(&second_pairs), &mut total);
    let [first_rest, second_rest] = [&first_tensors, &second_tensors].map(other_tensors);
    let tensors = compare(&first_rest, &second_rest, &mut total);
    Ok(Difference {
        config: key_differences(&first_config, &second_config),
        modules,
        tensors,
        total: total.norms(),
    })
}

/// A matrix that can be compared with its like.
trait Delta {
    /// Its dimensions.
    fn shape(&self) -> Vec<usize>;
    /// The sum of products of corresponding elements.
    fn dot(&self, other: &Self) -> f64;
}

impl Delta for &Pair<'_> {
    fn shape(&self) -> Vec<usize> {
        vec![self.b.shape[0], self.a.shape[1]]
    }

    /// `s1 s2 sum((B1^T B2) * (A1 A2^T))`, elementwise on (r1, r2) matrices.
    fn dot(&self, other: &Self) -> f64 {
        let (r1, r2) = (self.r(), other.r());
        let mut of_b = vec![0.0; r1 * r2];
        let rows = self.b.values.chunks_exact(r1.max(1));
        for (row1, row2) in rows.zip(other.b.values.chunks_exact(r2.max(1))) {
            for (i, x) in row1.iter().enumerate() {
                for (j, y) in row2.iter().enumerate() {
                    of_b[i * r2 + j] += f64::from(*x) * f64::from(*y);
                }
            }
        }
        let columns = self.a.shape[1].max(1);
        let mut sum = 0.0;
        for (i, row1) in self.a.values.chunks_exact(columns).enumerate() {
            for (j, row2) in other.a.values.chunks_exact(columns).enumerate() {
                sum += of_b[i * r2 + j] * dot(row1, row2);
            }
        }
        self.scaling * other.scaling * sum
    }
}

impl Delta for &super::peft::StoredValues {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dot(&self, other: &Self) -> f64 {
        dot(&self.values, &other.values)
    }
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
    products.sum()
}

fn by_path<'p, 't>(pairs: &'p [Pair<'t>]) -> BTreeMap<&'p str, &'p Pair<'t>> {
    pairs
        .iter()
        .map(|pair| (pair.path.as_str(), pair))
        .collect()
}

/// The tensors outside pairs, without copies of the base's embeddings.
fn other_tensors(tensors: &NamedTensors) -> BTreeMap<&str, &super::peft::StoredValues> {
    use super::adaptation::Part;
    let in_pair = |name: &str| {
        matches!(
            parse_tensor_name(name),
            Ok((_, Part::A | Part::B | Part::EmbeddingA | Part::EmbeddingB))
        )
    };
    let others = tensors
        .iter()
        .filter(|(name, _)| !in_pair(name) && base_embedding(name).is_none());
    let bare = |name: &'_ str| name.strip_prefix(PREFIX).map_or(0, |_| PREFIX.len());
    others
        .map(|(name, tensor)| (&name[bare(name)..], &tensor.stored))
        .collect()
}

/// Compares what both maps hold, and adds to `total`.
fn compare<D: Delta>(
    first: &BTreeMap<&str, D>,
    second: &BTreeMap<&str, D>,
    total: &mut Products,
) -> Vec<DeltaDifference> {
    let names: BTreeSet<&&str> = first.keys().chain(second.keys()).collect();
    let compared = names.into_iter().map(|name| {
        let (one, two) = (first.get(name), second.get(name));
        let square = |delta: Option<&D>| delta.map_or(0.0, |delta| delta.dot(delta));
        let both = one.zip(two);
        let shapes_differ = both.is_some_and(|(one, two)| one.shape() != two.shape());
        let both = both.filter(|_| !shapes_differ);
        let products = Products {
            first: square(one),
            second: square(two),
            both: both.map_or(0.0, |(one, two)| one.dot(two)),
        };
        total.add(products);
        DeltaDifference {
            name: name.to_string(),
            shapes_differ,
            norms: products.norms(),
        }
    });
    compared.collect()
}

/// The keys whose values differ, `peft_version` aside.
fn key_differences(first: &PeftConfig, second: &PeftConfig) -> Vec<KeyDifference> {
    let fields = |config: &PeftConfig| {
        let object: BTreeMap<String, Value> =
            serde_json::from_str(&config.to_text()).unwrap_or_default();
        object
    };
    let (first, mut second) = (fields(first), fields(second));
    let pairs = first.into_iter().map(|(key, first)| KeyDifference {
        second: second.remove(&key).unwrap_or_default(),
        key,
        first,
    });
    let differs = |pair: &KeyDifference| {
        sorted(&pair.first) != sorted(&pair.second) && pair.key != "peft_version"
    };
    pairs.filter(differs).collect()
}

/// A list of names is a set in PEFT.
fn sorted(value: &Value) -> Value {
    let mut value = value.clone();
    if let Value::Array(items) = &mut value {
        items.sort_by_key(Value::to_string);
    }
    value
}
