//! Tokens that a model's files add to the vocabulary of its tokenizer.
//!
//! Takes the files of a tokenizer as JSON, returns their tokens in the order in which transformers 5 adds them
//! (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`), with their flags and declared ids. A token that gets
//! another id than its file declares is refused. Knows nothing of encoding.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{Error, Kind, Result, catch_panic};

/// The named tokens of every tokenizer, in the order in which transformers adds them.
pub(super) const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
/// The key of tokens with their ids; a tokenizer_config.json with this key makes the two older files void.
const DECODER: &str = "added_tokens_decoder";

/// tokenizer_config.json with special_tokens_map.json over it, which counts only without `added_tokens_decoder`.
pub(super) fn effective_config(config: Option<&Value>, map: Option<&Value>) -> Map<String, Value> {
    let object = |file: Option<&Value>| file.and_then(Value::as_object).cloned();
    let mut merged = object(config).unwrap_or_default();
    if has_decoder(&merged) {
        return merged;
    }
    for (name, mut value) in object(map).unwrap_or_default() {
        if let Some(token) = value
            .as_object_mut()
            .filter(|_| name != "extra_special_tokens")
        {
            token.insert("special".to_string(), true.into());
        }
        merged.insert(name, value);
    }
    merged
}

fn has_decoder(config: &Map<String, Value>) -> bool {
    config.get(DECODER).is_some_and(Value::is_object)
}

/// Adds the tokens of `config` ([`effective_config`]) and of added_tokens.json to `tokenizer`.
///
/// # Errors
/// `Kind::Tokenizer` where a token has no content, or another id than its file declares.
pub(super) fn add_tokens(
    tokenizer: &mut Tokenizer,
    config: &Map<String, Value>,
    added_tokens: Option<&Value>,
) -> Result<()> {
    let named = named_tokens(config)?;
    let (file, declared) = if has_decoder(config) {
        (DECODER, decoder_tokens(config)?)
    } else {
        let special = |content: &str| named.iter().any(|token| token.content == content);
        let known = tokenizer.get_added_vocabulary().get_vocab();
        let new = legacy_tokens(added_tokens, special)
            .filter(|(_, token)| !known.contains_key(&token.content));
        ("added_tokens.json", new.collect())
    };
    add(tokenizer, declared.values().cloned().collect())?;
    for (id, token) in &declared {
        check_id(tokenizer, &token.content, *id, file)?;
    }
    for token in named {
        if !tokenizer
            .get_added_vocabulary()
            .get_vocab()
            .contains_key(&token.content)
        {
            add(tokenizer, vec![token])?;
        }
    }
    Ok(())
}

/// Refuses `token` if its id is not the one that `file` declares.
///
/// # Errors
/// `Kind::Tokenizer`.
pub(super) fn check_id(
    tokenizer: &Tokenizer,
    token: &str,
    declared: u32,
    file: &str,
) -> Result<()> {
    let id = tokenizer.token_to_id(token);
    if id == Some(declared) || token.is_empty() {
        return Ok(());
    }
    let found = id.map_or("none".to_string(), |id| id.to_string());
    Err(Error::new(
        Kind::Tokenizer,
        format!("the added token `{token}` cannot have the id that `{file}` declares"),
    )
    .value(format!("{declared} declared, {found} by its place"))
    .rule("an added token has the id of its entry in the vocabulary, else the next id after all others")
    .hint(format!(
        "correct the id in `{file}`, or take the tokenizer's files from one revision of the model"
    )))
}

fn add(tokenizer: &mut Tokenizer, tokens: Vec<AddedToken>) -> Result<()> {
    let added = catch_panic(|| tokenizer.add_tokens(tokens));
    added.map(drop).map_err(|cause| {
        Error::new(Kind::Tokenizer, format!("a token cannot be added: {cause}"))
            .hint("correct the added tokens in tokenizer_config.json")
    })
}

/// `added_tokens_decoder` by id.
fn decoder_tokens(config: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>> {
    let entries = config.get(DECODER).and_then(Value::as_object);
    let mut tokens = BTreeMap::new();
    for (id, value) in entries.into_iter().flatten() {
        let place = || format!("tokenizer_config.json, `{DECODER}`");
        let number = id.parse().map_err(|_| {
            Error::new(
                Kind::Tokenizer,
                "an added token's id is not an unsigned 32-bit number",
            )
            .at(place())
            .value(id.clone())
            .hint("write the token's id as the key")
        })?;
        tokens.insert(
            number,
            token(value, false).ok_or_else(|| no_content(&place(), value))?,
        );
    }
    Ok(tokens)
}

/// added_tokens.json by id: tokens whose content is a named token's are special.
fn legacy_tokens(
    file: Option<&Value>,
    special: impl Fn(&str) -> bool,
) -> impl Iterator<Item = (u32, AddedToken)> {
    let entries = file.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(move |(content, id)| {
        let id = u32::try_from(id.as_u64()?).ok()?;
        Some((id, AddedToken::from(content.clone(), special(content))))
    })
}

/// Named tokens, tokens of the model's own names, and the list of further special tokens.
fn named_tokens(config: &Map<String, Value>) -> Result<Vec<AddedToken>> {
    let is_named = |name: &str| NAMED_TOKENS.contains(&name);
    let own = |(name, value): &(&String, &Value)| {
        name.ends_with("_token") && !is_named(name) && (value.is_string() || value.is_object())
    };
    let extra = config.get("extra_special_tokens");
    let is_empty = |value: &Value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(names) => names.is_empty(),
        _ => true,
    };
    let extra = extra
        .filter(|extra| !is_empty(extra))
        .or(config.get("additional_special_tokens"));
    let listed: Vec<&Value> = match extra {
        Some(Value::Array(list)) => list.iter().collect(),
        Some(Value::Object(names)) => names.values().collect(),
        _ => Vec::new(),
    };
    let named = NAMED_TOKENS.iter().filter_map(|name| config.get(*name));
    let own = config.iter().filter(own).map(|(_, value)| value);
    let values = named
        .filter(|value| !value.is_null())
        .chain(own)
        .chain(listed);
    values
        .map(|value| token(value, true).ok_or_else(|| no_content("tokenizer_config.json", value)))
        .collect()
}

fn no_content(place: &str, value: &Value) -> Error {
    Error::new(Kind::Tokenizer, "an added token has no content")
        .at(place)
        .value(value.to_string())
        .rule("a string, or an object with `content`")
        .hint("write the token as a string")
}

/// A token written as a string, or as an object with flags; `special` is forced.
fn token(value: &Value, special: bool) -> Option<AddedToken> {
    let content = token_text(value)?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let marked = flag("special").unwrap_or(value.is_string() && special);
    let mut token = AddedToken::from(content, marked)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false));
    if let Some(normalized) = flag("normalized") {
        token = token.normalized(normalized);
    }
    Some(token.special(marked || special))
}

/// The content of a token written as a string or as `{"content": ...}`.
pub(super) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::data::{Tokenizer, TokenizerFiles, golden};
    use crate::error::{Kind, Result};

    /// Loads the tokenizer of a golden case's files.
    fn load(golden: &Value, base: &str, changes: &Value, others: &Value) -> Result<Tokenizer> {
        let folder = tempfile::tempdir().unwrap();
        let mut tokenizer = golden["bases"][base].clone();
        for (name, value) in changes.as_object().unwrap() {
            tokenizer[name] = value.clone();
        }
        let write = |name: &str, content: &Value| {
            let path = folder.path().join(format!("{name}.json"));
            (!content.is_null()).then(|| {
                std::fs::write(&path, content.to_string()).unwrap();
                path
            })
        };
        Tokenizer::load(&TokenizerFiles {
            tokenizer_json: write("tokenizer", &tokenizer),
            tokenizer_config: write("tokenizer_config", &others["tokenizer_config"]),
            special_tokens_map: write("special_tokens_map", &others["special_tokens_map"]),
            added_tokens: write("added_tokens", &others["added_tokens"]),
            ..TokenizerFiles::default()
        })
    }

    /// Expected: transformers (scripts/tokenizer_files.py).
    #[test]
    fn every_file_adds_its_tokens_as_in_transformers() {
        let golden = golden("tokenizer_files.json");
        let mut wrong = Vec::new();
        for case in golden["cases"].as_array().unwrap() {
            let base = case["base"].as_str().unwrap();
            let tokenizer = match load(&golden, base, &case["tokenizer"], &case["files"]) {
                Ok(tokenizer) => tokenizer,
                Err(error) => {
                    wrong.push(format!("{}: {error}", case["name"]));
                    continue;
                }
            };
            for text in case["texts"].as_array().unwrap() {
                let ids = tokenizer
                    .encode(text["text"].as_str().unwrap(), true)
                    .unwrap()
                    .ids;
                let decoded = tokenizer.decode(&ids).unwrap();
                if json!(ids) != text["ids"] || json!(decoded) != text["decoded"] {
                    wrong.push(format!("{}: {text} but {ids:?} {decoded:?}", case["name"]));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn an_id_that_is_not_the_declared_one_is_refused() {
        let golden = golden("tokenizer_files.json");
        let vocabulary = golden["bases"]["byte_level"]["model"]["vocab"].as_object();
        let size = vocabulary.unwrap().len();
        let with_id = |id: usize| {
            json!({"added_tokens": [{"content": "<im>", "special": true, "id": id,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]})
        };
        let token = json!({"content": "<im>", "special": true});
        let config = |config: Value| json!({"tokenizer_config": config});
        let decoder = |id: &str| config(json!({"added_tokens_decoder": {id: token}}));
        let gap = (size + 7).to_string();
        let none = json!({});
        // tokenizer.json changed, or other files beside it.
        let changes = [
            ("a gap in tokenizer.json", with_id(size + 1)),
            ("an id of tokenizer.json that is taken", with_id(3)),
            ("the highest id", with_id(u32::MAX as usize)),
        ];
        let others = [
            ("a gap in the decoder", decoder(&gap)),
            ("a negative id", decoder("-1")),
            ("no content", config(json!({"pad_token": 7}))),
            (
                "a gap in added_tokens.json",
                json!({"added_tokens": {"<im>": size + 1}}),
            ),
        ];
        let changes = changes.iter().map(|(name, changes)| (name, changes, &none));
        let others = others.iter().map(|(name, others)| (name, &none, others));
        for (name, changes, others) in changes.chain(others) {
            let error = load(&golden, "byte_level", changes, others).map(drop);
            let error = error.unwrap_err();
            assert!(
                error.kind() == Kind::Tokenizer && error.remedy().is_some(),
                "{name}: {error}"
            );
        }
        load(&golden, "byte_level", &with_id(size), &none).unwrap();
    }
}
