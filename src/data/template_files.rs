//! The chat templates and special tokens among a tokenizer's files, found as transformers finds them.
//!
//! Takes the contents of the files, returns templates by name and tokens by variable. Reads no file, renders nothing.

use std::collections::BTreeMap;

use serde_json::Value;

use super::added_tokens::token_text;
use crate::error::{Error, Kind, Result};

/// Special tokens that a tokenizer's class defines where tokenizer_config.json has no such key: the defaults of `__init__` in
/// transformers 5.
const CLASS_TOKENS: [(&str, &[(&str, &str)]); 7] = [
    ("LlamaTokenizer", LLAMA),
    ("CodeLlamaTokenizer", LLAMA),
    ("GPT2Tokenizer", GPT2),
    ("CodeGenTokenizer", GPT2),
    (
        "GPTNeoXTokenizer",
        &[
            ("unk_token", "<|endoftext|>"),
            ("bos_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|padding|>"),
        ],
    ),
    (
        "Qwen2Tokenizer",
        &[
            ("unk_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|endoftext|>"),
        ],
    ),
    (
        "GemmaTokenizer",
        &[
            ("unk_token", "<unk>"),
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
    ),
];
const LLAMA: &[(&str, &str)] = &[
    ("unk_token", "<unk>"),
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
];
const GPT2: &[(&str, &str)] = &[
    ("unk_token", "<|endoftext|>"),
    ("bos_token", "<|endoftext|>"),
    ("eos_token", "<|endoftext|>"),
];

/// The variables of a chat template that are special tokens, such as `bos_token`: tokenizer_config.json's `*_token` keys, the class's
/// defaults, special_tokens_map.json (which wins in files without `added_tokens_decoder`), and the named `extra_special_tokens`.
pub(super) fn special_tokens(
    config: Option<&Value>,
    map: Option<&Value>,
) -> BTreeMap<String, String> {
    let field = |name: &str| config.and_then(|config| config.get(name));
    let class = field("tokenizer_class")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let class = class.strip_suffix("Fast").unwrap_or(class);
    let defaults = CLASS_TOKENS.iter().find(|(name, _)| *name == class);
    let mut tokens: BTreeMap<String, String> = defaults
        .into_iter()
        .flat_map(|(_, tokens)| *tokens)
        .map(|(name, token)| (name.to_string(), token.to_string()))
        .collect();
    let map = map.filter(|_| field("added_tokens_decoder").is_none());
    let files = [config, map];
    for (name, value) in files.into_iter().flat_map(entries) {
        if name.ends_with("_token") {
            match token_text(value) {
                Some(token) => tokens.insert(name.clone(), token.to_string()),
                None => tokens.remove(name),
            };
        }
    }
    for field in ["model_specific_special_tokens", "extra_special_tokens"] {
        let named = files
            .iter()
            .flat_map(|file| entries(file.and_then(|file| file.get(field))));
        let named = named.filter_map(|(name, token)| Some((name, token_text(token)?)));
        tokens.extend(named.map(|(name, token)| (name.clone(), token.to_string())));
    }
    tokens
}

/// Templates by name: those of .jinja files, else tokenizer_config.json's `chat_template`, else that of a processor's
/// chat_template.json. A single one is named `default`.
pub(super) fn templates(
    jinja: BTreeMap<String, String>,
    config: Option<&Value>,
    processor: Option<&Value>,
) -> Result<BTreeMap<String, String>> {
    if !jinja.is_empty() {
        return Ok(jinja);
    }
    let written = [config, processor]
        .into_iter()
        .flatten()
        .filter_map(|file| file.get("chat_template"))
        .find(|template| !template.is_null());
    let text = |value: &Value| value.as_str().map(str::to_string);
    let named = match written {
        None => Some(BTreeMap::new()),
        Some(Value::String(source)) => Some(BTreeMap::from([("default".into(), source.clone())])),
        Some(Value::Object(named)) => named
            .iter()
            .map(|(name, source)| Some((name.clone(), text(source)?)))
            .collect(),
        Some(Value::Array(list)) => list
            .iter()
            .map(|item| Some((text(item.get("name")?)?, text(item.get("template")?)?)))
            .collect(),
        Some(_) => None,
    };
    named.ok_or_else(|| {
        Error::new(
            Kind::Tokenizer,
            "the `chat_template` of the tokenizer's files is malformed",
        )
        .rule("a string, or a list of {\"name\": ..., \"template\": ...}")
        .hint("correct it in tokenizer_config.json, or write the template to chat_template.jinja")
    })
}

fn entries(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The cases of one list of tests/golden/chat_files.json.
    fn golden(list: &str) -> Vec<Value> {
        let mut golden = crate::data::golden("chat_files.json");
        serde_json::from_value(golden[list].take()).unwrap()
    }

    /// Expected: `AutoTokenizer.from_pretrained(..).special_tokens_map` of transformers 5.24 for such files
    /// (scripts/chat_files.py prints it).
    #[test]
    fn special_tokens_are_those_of_transformers() {
        let cases = golden("special_tokens");
        for case in &cases {
            let file = |name: &str| case.get(name).filter(|file| !file.is_null());
            let ours = special_tokens(file("tokenizer_config"), file("special_tokens_map"));
            assert_eq!(json!(ours), case["expected"], "{case}");
        }
        assert!(cases.len() > 10);
    }

    #[test]
    fn templates_are_those_of_transformers() {
        let cases = golden("templates");
        for case in &cases {
            let jinja = serde_json::from_value(case["jinja"].clone()).unwrap();
            let ours = templates(jinja, Some(&case["tokenizer_config"]), None).unwrap();
            let choose = |with_tools: bool| {
                let names = if with_tools {
                    &["tool_use", "default"][..]
                } else {
                    &["default"]
                };
                json!(names.iter().find_map(|name| ours.get(*name)))
            };
            assert_eq!(
                json!([choose(false), choose(true)]),
                case["expected"],
                "{case}"
            );
        }
        assert!(cases.len() > 7);
    }

    #[test]
    fn a_processors_template_is_the_last_choice() {
        let processor = json!({"chat_template": "P"});
        let ours = templates(BTreeMap::new(), Some(&json!({})), Some(&processor)).unwrap();
        assert_eq!(ours["default"], "P");
        let config = json!({"chat_template": 3});
        assert!(templates(BTreeMap::new(), Some(&config), Some(&processor)).is_err());
    }
}
