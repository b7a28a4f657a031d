//! Byte-level BPE from `vocab.json` and `merges.txt`, for models published without a `tokenizer.json`.
//!
//! Takes the two files' text and tokenizer_config.json, returns a `tokenizers` pipeline equal to the one transformers' converter
//! builds for Qwen2 and GPT-2 tokenizers. Refuses other tokenizer classes: their splitting rules are not in these files.

use serde_json::{Map, Value};
use tokenizers::Tokenizer;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::added_tokens::token_text;
use crate::error::{Error, Kind, Result};

/// Qwen2's pre-tokenisation (transformers, `Qwen2Converter`; Apache-2.0).
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokenizer families with these files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Gpt2,
    Qwen2,
}

/// Builds the tokenizer from the text of its files, without added tokens; `settings` gets the token that both classes name by default.
pub(super) fn tokenizer(
    vocab: &str,
    merges: &str,
    settings: &mut Map<String, Value>,
) -> Result<Tokenizer> {
    let family = family(settings)?;
    let bpe = bpe(vocab, merges)?;
    let mut tokenizer = Tokenizer::new(bpe);
    let unknown = settings.entry("unk_token");
    unknown.or_insert_with(|| "<|endoftext|>".into());
    let prefix_space = settings.get("add_prefix_space").and_then(Value::as_bool);
    let prefix_space = prefix_space.unwrap_or(false);
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
    Ok(tokenizer)
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Tokenizer,
        format!("vocab.json and merges.txt do not make a tokenizer: {error}"),
    )
    .hint("download both files again; they must come from the same model")
}

fn family(settings: &Map<String, Value>) -> Result<Family> {
    match settings.get("tokenizer_class").and_then(Value::as_str) {
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

/// Puts bos and eos around every text where `settings` say so (`add_bos_token`, `add_eos_token`).
pub(super) fn add_special_tokens(
    tokenizer: &mut Tokenizer,
    settings: &Map<String, Value>,
) -> Result<()> {
    let wanted = |flag: &str, name: &str| {
        let is_on = settings.get(flag).and_then(Value::as_bool) == Some(true);
        let token = settings.get(name).and_then(token_text)?;
        let id = tokenizer.token_to_id(token)?;
        is_on.then(|| (token.to_string(), id))
    };
    let bos = wanted("add_bos_token", "bos_token");
    let eos = wanted("add_eos_token", "eos_token");
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let name = |token: &Option<(String, u32)>| token.iter().map(|(text, _)| text.clone()).collect();
    let [before, after]: [Vec<String>; 2] = [name(&bos), name(&eos)];
    let pieces = [before, vec!["$A".to_string()], after].concat();
    let special: Vec<(String, u32)> = bos.into_iter().chain(eos).collect();
    let template = TemplateProcessing::builder()
        .try_single(pieces)
        .map_err(broken)?
        .special_tokens(special)
        .build()
        .map_err(broken)?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const VOCAB: &str = r#"{"a": 0, "b": 1, "Ġ": 2, "Ġb": 3, "1": 4}"#;

    #[test]
    fn qwen_splits_digits() {
        let mut settings = json!({"tokenizer_class": "Qwen2Tokenizer"});
        let settings = settings.as_object_mut().unwrap();
        let merges = "#version: 0.2\nĠ b\n1 1";
        assert!(
            tokenizer(VOCAB, merges, settings).is_err(),
            "`11` is no token"
        );
        let t = tokenizer(VOCAB, "Ġ b", settings).unwrap();
        assert_eq!(t.encode("a b11", false).unwrap().get_ids(), [0, 3, 4, 4]);
        assert_eq!(t.decode(&[0, 3], false).unwrap(), "a b");
    }

    #[test]
    fn an_unknown_class_is_refused() {
        let mut settings = json!({"tokenizer_class": "CodeGenTokenizer"});
        let error = tokenizer(VOCAB, "Ġ b", settings.as_object_mut().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Tokenizer);
    }
}
