//! Field types of `adapter_config.json` that are more than a text, a number or a switch, as PEFT writes them.

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
                f.write_str("an object of module patterns, or null")
            }
            fn visit_unit<E>(self) -> Result<ModulePattern<T>, E> {
                Ok(ModulePattern::default())
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
        deserializer.deserialize_any(InFileOrder(std::marker::PhantomData))
    }
}
