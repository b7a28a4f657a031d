//! Settings of tokenizer_config.json that change the pipeline of tokenizer.json.
//!
//! Takes the pipeline and the settings, changes it as transformers' classes do. tokenizer.json decides everything else: a class that
//! transformers 5 builds anew from vocabulary and merges keeps the normalizer and splitting of its file here, as in
//! transformers 4; `add_bos_token` and `add_eos_token` are ignored if there is a tokenizer.json, and so is `add_prefix_space` for
//! a class that transformers 5 does not build. Knows nothing of added tokens.

use serde_json::{Map, Value};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// Classes with byte-level splitting that follows `add_prefix_space`.
const BYTE_LEVEL_CLASSES: [&str; 7] = [
    "CodeGenTokenizer",
    "CohereTokenizer",
    "DebertaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "RobertaTokenizer",
    "WhisperTokenizer",
];

/// Applies `split_special_tokens` and `add_prefix_space`.
pub(super) fn apply(
    tokenizer: &mut Tokenizer,
    config: &Map<String, Value>,
) -> tokenizers::Result<()> {
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    tokenizer.set_encode_special_tokens(flag("split_special_tokens").unwrap_or(false));
    let class = config.get("tokenizer_class").and_then(Value::as_str);
    let class = class.unwrap_or_default().trim_end_matches("Fast");
    let Some(prefix) = flag("add_prefix_space") else {
        return Ok(());
    };
    if class == "LlamaTokenizer" && is_sentencepiece(tokenizer) {
        return build_sentencepiece(tokenizer, prefix, flag("legacy").unwrap_or(false));
    }
    if BYTE_LEVEL_CLASSES.contains(&class) {
        let mut splitting = tokenizer.get_pre_tokenizer().cloned();
        if let Some(splitting) = &mut splitting {
            set_prefix_space(splitting, prefix);
        }
        tokenizer.with_pre_tokenizer(splitting);
    }
    Ok(())
}

/// Switches the dropout of merges off: encoding is a function of the text. Returns whether it was on.
pub(super) fn disable_dropout(tokenizer: &mut Tokenizer) -> bool {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else {
        return false;
    };
    if bpe.dropout.is_none_or(|share| share == 0.0) {
        return false;
    }
    let mut bpe = bpe.clone();
    bpe.dropout = None;
    tokenizer.with_model(bpe);
    true
}

/// Whether decoded text loses the spaces before punctuation: `clean_up_tokenization_spaces`, which transformers 5 ignores for BPE.
pub(super) fn cleans_up_spaces(tokenizer: &Tokenizer, config: &Map<String, Value>) -> bool {
    let flag = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
    flag("clean_up_tokenization_spaces")
        && (!matches!(tokenizer.get_model(), ModelWrapper::BPE(_))
            || flag("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
}

/// `text` without the spaces that transformers' `clean_up_tokenization` removes.
pub(super) fn clean_up_spaces(text: &str) -> String {
    const RULES: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES
        .iter()
        .fold(text.to_string(), |text, (from, to)| text.replace(from, to))
}

fn set_prefix_space(splitting: &mut PreTokenizerWrapper, prefix: bool) {
    match splitting {
        PreTokenizerWrapper::ByteLevel(bytes) => bytes.add_prefix_space = prefix,
        PreTokenizerWrapper::Sequence(parts) => parts
            .as_mut()
            .iter_mut()
            .for_each(|part| set_prefix_space(part, prefix)),
        _ => {}
    }
}

/// Whether spaces become `▁` by a normalizer or by `Metaspace`.
fn is_sentencepiece(tokenizer: &Tokenizer) -> bool {
    match tokenizer.get_pre_tokenizer() {
        None => tokenizer.get_normalizer().is_some(),
        Some(splitting) => matches!(splitting, PreTokenizerWrapper::Metaspace(_)),
    }
}

/// The pipeline of transformers' `LlamaTokenizer`, which both versions build anew for an explicit `add_prefix_space`.
fn build_sentencepiece(
    tokenizer: &mut Tokenizer,
    prefix: bool,
    legacy: bool,
) -> tokenizers::Result<()> {
    let scheme = match (prefix, legacy) {
        (false, _) => PrependScheme::Never,
        (true, false) => PrependScheme::First,
        (true, true) => PrependScheme::Always,
    };
    tokenizer.with_normalizer(None::<NormalizerWrapper>)?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', scheme, false)));
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(())
}
