//! Field types of `adapter_config.json` that are more than a text, a number or a switch, as PEFT writes them.

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::keys;

/// The keys of a file that are not read yet, and the mistakes found so far.
pub(super) struct Fields {
    values: Map<String, Value>,
    pub(super) problems: Vec<String>,
}

impl Fields {
    pub(super) fn new(values: Map<String, Value>) -> Self {
        let problems = Vec::new();
        Self { values, problems }
    }

    /// The value of `key`, which `rule` describes; `None` if it is absent or null.
    pub(super) fn optional<T: DeserializeOwned>(&mut self, key: &str, rule: &str) -> Option<T> {
        let value = self.values.remove(key).filter(|value| !value.is_null())?;
        let read = T::deserialize(&value);
        if read.is_err() {
            self.problems
                .push(format!("`{key}` is {value}: it must be {rule}"));
        }
        read.ok()
    }

    /// As `optional`, for a key that may be absent but not null.
    pub(super) fn required<T: DeserializeOwned>(&mut self, key: &str, rule: &str, default: T) -> T {
        if self.values.get(key).is_some_and(Value::is_null) {
            self.problems
                .push(format!("`{key}` is null: it must be {rule}"));
        }
        self.optional(key, rule).unwrap_or(default)
    }

    /// A switch that is off by default, by Python's truth of its value; a text is refused, because "false" is true in Python.
    pub(super) fn switch(&mut self, key: &str) -> bool {
        let value = self.values.remove(key).unwrap_or_default();
        if value.is_string() {
            self.problems
                .push(format!("`{key}` is {value}: it must be true or false"));
        }
        keys::is_truthy(&value)
    }

    /// `init_lora_weights`: null and an empty text are false.
    pub(super) fn init_weights(&mut self) -> InitWeights {
        let key = "init_lora_weights";
        let value = self.values.get(key);
        if value.is_some_and(|value| !keys::is_truthy(value)) {
            self.values.remove(key);
            return InitWeights::Plain(false);
        }
        let rule = "true, false or the name of a scheme";
        self.optional(key, rule).unwrap_or(InitWeights::Plain(true))
    }

    /// `defaults` with the values that the file gives.
    pub(super) fn variants(&mut self, mut defaults: Map<String, Value>) -> Map<String, Value> {
        for (key, value) in &mut defaults {
            if let Some(given) = self.values.remove(key) {
                *value = given;
            }
        }
        defaults
    }

    /// The keys that nothing has read, sorted.
    pub(super) fn unknown(&mut self) -> Vec<String> {
        let mut unknown: Vec<String> = self.values.keys().cloned().collect();
        unknown.sort();
        unknown
    }
}

/// One value or a list of values, as PEFT allows for module names and layer indices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value; of a text the field says whether it is a name or a regular expression.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The list; one value is a list of one.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// `init_lora_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitWeights {
    /// True: Kaiming-uniform A and zero B; false: both random.
    Plain(bool),
    /// A named scheme.
    Named(String),
}

/// A JSON object whose order matters: the first key that matches a module decides. Written sorted, as PEFT does.
#[derive(Debug, Clone, PartialEq)]
pub struct ModulePattern<T>(pub Vec<(String, T)>);

impl<T> Default for ModulePattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// A number that is written without a fraction where it has none: `32`, `1.5`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct JsonNumber(pub f64);

impl Serialize for JsonNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // 2^53: every integer below it is exact in f64.
        if self.0.fract() == 0.0 && self.0.abs() < 9_007_199_254_740_992.0 {
            serializer.serialize_i64(self.0 as i64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

impl<T: Serialize> Serialize for ModulePattern<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut sorted: Vec<&(String, T)> = self.0.iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        let mut map = serializer.serialize_map(Some(sorted.len()))?;
        for (key, value) in sorted {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ModulePattern<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InFileOrder<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InFileOrder<T> {
            type Value = ModulePattern<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of module patterns")
            }
            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> Result<ModulePattern<T>, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(ModulePattern(entries))
            }
        }
        deserializer.deserialize_map(InFileOrder(std::marker::PhantomData))
    }
}
