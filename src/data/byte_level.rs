//! Byte-level BPE from `vocab.json` and `merges.txt`, for models published without a `tokenizer.json`.
//!
//! Takes the two files' text and tokenizer_config.json, returns a `tokenizers` pipeline equal to the one transformers' converter
//! builds for Qwen2 and GPT-2 tokenizers. Refuses other tokenizer classes: their splitting rules are not in these files.

use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::tokenizer::token_text;
use crate::error::{Error, Kind, Result};

/// Qwen2's pre-tokenisation (transformers, `Qwen2Converter`; Apache-2.0).
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokenizer families with these files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Gpt2,
    Qwen2,
}

/// Builds the tokenizer from the text of its files.
pub(super) fn tokenizer(vocab: &str, merges: &str, config: Option<&Value>) -> Result<Tokenizer> {
    let family = family(config)?;
    let bpe = bpe(vocab, merges)?;
    let mut tokenizer = Tokenizer::new(bpe);
    let prefix_space = config
        .and_then(|c| c.get("add_prefix_space")?.as_bool())
        .unwrap_or(false);
    match family {
        Family::Gpt2 => {
            tokenizer.with_pre_tokenizer(Some(ByteLevel::new(prefix_space, true, true)));
            tokenizer.with_post_processor(Some(ByteLevel::new(true, false, true)));
        }
        Family::Qwen2 => {
            let words = Split::new(
                SplitPattern::Regex(QWEN2_WORDS.into()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(broken)?;
            let bytes = ByteLevel::new(prefix_space, false, false);
            let both = vec![
                PreTokenizerWrapper::Split(words),
                PreTokenizerWrapper::ByteLevel(bytes),
            ];
            tokenizer.with_normalizer(Some(NFC)).map_err(broken)?;
            tokenizer.with_pre_tokenizer(Some(Sequence::new(both)));
            tokenizer.with_post_processor(Some(ByteLevel::new(false, false, false)));
        }
    }
    tokenizer.with_decoder(Some(ByteLevel::default()));
    add_tokens(&mut tokenizer, config)?;
    Ok(tokenizer)
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Tokenizer,
        format!("vocab.json and merges.txt do not make a tokenizer: {error}"),
    )
    .hint("download both files again; they must come from the same model")
}

fn family(config: Option<&Value>) -> Result<Family> {
    match config.and_then(|c| c.get("tokenizer_class")?.as_str()) {
        None => Ok(Family::Gpt2),
        Some(class) if class.starts_with("GPT2Tokenizer") => Ok(Family::Gpt2),
        Some(class) if class.starts_with("Qwen2Tokenizer") => Ok(Family::Qwen2),
        Some(class) => Err(Error::new(
            Kind::Tokenizer,
            "vocab.json and merges.txt do not say how this tokenizer splits text",
        )
        .value(class)
        .rule("without tokenizer.json: Qwen2Tokenizer or GPT2Tokenizer")
        .hint(
            "write its tokenizer.json once: python -c \"from transformers import AutoTokenizer; \
                AutoTokenizer.from_pretrained('MODEL_DIR').save_pretrained('MODEL_DIR')\"",
        )),
    }
}

fn bpe(vocab: &str, merges: &str) -> Result<BPE> {
    let vocab: std::collections::HashMap<String, u32> =
        serde_json::from_str(vocab).map_err(broken)?;
    let merges = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| {
            let (left, right) = line
                .split_once(' ')
                .ok_or_else(|| broken(format!("`{line}` is no pair")))?;
            Ok((left.to_string(), right.to_string()))
        })
        .collect::<Result<Vec<_>>>()?;
    let vocab: Vocab = vocab.into_iter().collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(broken)
}

/// Adds tokenizer_config.json's `added_tokens_decoder` in the order of ids, which must result as written.
fn add_tokens(tokenizer: &mut Tokenizer, config: Option<&Value>) -> Result<()> {
    let Some(table) = config.and_then(|c| c.get("added_tokens_decoder")?.as_object()) else {
        return Ok(());
    };
    let mut tokens: Vec<(u32, &Value)> = table
        .iter()
        .filter_map(|(id, token)| Some((id.parse().ok()?, token)))
        .collect();
    tokens.sort_by_key(|(id, _)| *id);
    for (id, token) in tokens {
        let content =
            token_text(token).ok_or_else(|| broken(format!("added token {id} has no content")))?;
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        let added = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        if flag("special") {
            tokenizer.add_special_tokens([added])
        } else {
            tokenizer.add_tokens([added])
        }
        .map_err(broken)?;
        if tokenizer.token_to_id(content) != Some(id) {
            return Err(broken(format!(
                "added token `{content}` cannot have id {id}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const VOCAB: &str = r#"{"a": 0, "b": 1, "Ġ": 2, "Ġb": 3, "1": 4}"#;

    #[test]
    fn qwen_splits_digits_and_keeps_added_ids() {
        let config = json!({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"5": {"content": "<|e|>", "special": true}}});
        let merges = "#version: 0.2\nĠ b\n1 1";
        assert!(
            tokenizer(VOCAB, merges, Some(&config)).is_err(),
            "`11` is no token"
        );
        let t = tokenizer(VOCAB, "Ġ b", Some(&config)).unwrap();
        assert_eq!(
            t.encode("a b11<|e|>", false).unwrap().get_ids(),
            [0, 3, 4, 4, 5]
        );
        assert_eq!(t.decode(&[0, 3, 5], false).unwrap(), "a b<|e|>");
    }

    #[test]
    fn an_added_token_with_a_wrong_id_and_an_unknown_class_are_refused() {
        let config = json!({"added_tokens_decoder": {"9": {"content": "<|e|>"}}});
        assert!(
            tokenizer(VOCAB, "Ġ b", Some(&config))
                .unwrap_err()
                .to_string()
                .contains("cannot have id 9")
        );
        let config = json!({"tokenizer_class": "CodeGenTokenizer"});
        assert_eq!(
            tokenizer(VOCAB, "Ġ b", Some(&config)).unwrap_err().kind(),
            Kind::Tokenizer
        );
    }
}
