//! The larger model to prompt instead of a fine-tuned one, by its number of parameters or by a hub id that contains it.
//!
//! Takes a text, returns name and parameters. Never asks the hub and has no table of models.

use std::sync::LazyLock;

use regex::Regex;

use super::ids::is_hub_id;
use crate::units::Count;

/// Valid values, for messages.
pub(super) const RULE: &str = "a number of parameters, or a hub id `owner/name` whose name says it";
/// An example of each, for messages.
pub(super) const HINT: &str =
    "write for example `larger_model = \"7B\"` or `larger_model = \"Qwen/Qwen2.5-7B\"`";

/// A model known by its size alone.
#[derive(Debug, Clone, PartialEq)]
pub struct LargerModel {
    /// As given in the recipe.
    pub name: String,
    /// Number of parameters.
    pub parameters: Count,
}

impl LargerModel {
    /// Reads "7B", "1.5e9" or "Qwen/Qwen2.5-7B-Instruct". `None` without a size, and for experts ("8x7B"), whose
    /// name gives neither the total nor the active parameters.
    ///
    /// ```
    /// use wattune::{recipe::LargerModel, units::Count};
    /// assert_eq!(LargerModel::parse("HuggingFaceTB/SmolLM2-1.7B-Instruct").unwrap().parameters, Count(1.7e9));
    /// assert_eq!(LargerModel::parse("mistralai/Mixtral-8x7B-v0.1"), None);
    /// ```
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let size = if is_hub_id(text) {
            size_in(text)
        } else {
            text.parse().ok()
        };
        let parameters = size.filter(|size: &Count| size.0 >= 1.0 && size.0.is_finite())?;
        Some(Self {
            name: text.to_string(),
            parameters,
        })
    }
}

/// The part of a model's name that is a number and `M` or `B`, between its dashes, underscores or dots.
fn size_in(id: &str) -> Option<Count> {
    static SIZE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)(?:^|[-_/])([0-9]+(?:\.[0-9]+)?[mb])(?:$|[-_.])")
            .expect("the pattern is a regex")
    });
    SIZE.captures(id)?
        .get(1)?
        .as_str()
        .to_uppercase()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_typed_or_stands_in_the_name() {
        let parameters = |text: &str| LargerModel::parse(text).map(|model| model.parameters.0);
        // Names and sizes as the hub lists them.
        for (id, size) in [
            ("7B", 7e9),
            ("135000000", 135e6),
            ("HuggingFaceTB/SmolLM2-135M", 135e6),
            ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
            ("meta-llama/Llama-3.1-70B", 70e9),
            ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9),
            ("EleutherAI/pythia-410m", 410e6),
        ] {
            assert_eq!(parameters(id), Some(size), "{id}");
        }
        for none in [
            "",
            "large",
            "-7B",
            "0",
            "openai-community/gpt2",
            "mistralai/Mixtral-8x7B-v0.1",
            "microsoft/phi-2",
            "inf",
        ] {
            assert_eq!(parameters(none), None, "{none}");
        }
    }
}
