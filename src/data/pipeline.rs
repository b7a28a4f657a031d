//! A `tokenizers` pipeline behind a boundary for its panics, for texts of any length.
//!
//! Takes text, returns ids with their byte ranges; owns the names of the components in errors and the splitting of long texts into
//! windows. Knows nothing of a model's other files.

use std::ops::Range;

use rayon::prelude::*;
use tokenizers::{DecoderWrapper, Encoding, Model, OffsetType, PreTokenizer};

use super::tokenizer::Encoded;
use crate::error::{Error, Kind, Result, catch_panic};

/// A text that every component has something to do with.
const SAMPLE: &str = "Hello, WORLD 1.5 don't\n\n  \u{c0}E\u{301} \u{2122} \u{fb01} \u{4f60}\u{597d} \u{1f600}\t\u{200b}<x> a";
/// Bytes that are encoded at once: the pipeline needs some 180 times as many.
const WINDOW: usize = 1 << 16;
/// Bytes on each side of the start of a window within which its tokens are compared with those of an undivided text.
const MARGIN: usize = 512;
/// Bytes before a window that are encoded with it, so that it does not begin like a text.
const CONTEXT: usize = 64;

/// A pipeline that encodes and decodes [`SAMPLE`].
#[derive(Debug)]
pub(super) struct Pipeline {
    inner: tokenizers::Tokenizer,
    /// Special tokens before and after a text; `None` if they are not the same around each text.
    around: Option<[Vec<u32>; 2]>,
}

impl Pipeline {
    /// Tries `inner` on a sample. A text that its vocabulary cannot express is no failure here.
    ///
    /// # Errors
    /// `Kind::Tokenizer`, naming the component that panics.
    pub(super) fn new(inner: tokenizers::Tokenizer) -> Result<Self> {
        let mut pipeline = Self {
            inner,
            around: None,
        };
        pipeline.decode(&[])?;
        for text in ["", SAMPLE] {
            let encode = |special| pipeline.inner.encode(text, special).map(Encoded::from);
            let both = catch_panic(|| Ok::<_, String>([encode(false), encode(true)]));
            let Ok(both) = both else {
                // Names the component, which panics again.
                pipeline.encode_whole(text, true)?;
                continue;
            };
            let [Ok(plain), Ok(special)] = both else {
                continue;
            };
            pipeline.decode(&special.ids)?;
            for id in &special.ids {
                pipeline.decode(&[*id])?;
            }
            pipeline.around = special_tokens_around(&plain.ids, &special.ids);
        }
        Ok(pipeline)
    }

    /// The `tokenizers` pipeline.
    pub(super) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Encodes `text`; `special` adds the special tokens of the post-processor. A long text is split where its windows encode like the
    /// undivided text.
    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Encoded> {
        let windows = match &self.around {
            Some(_) => self.windows(text)?,
            None => Vec::new(),
        };
        let (Some([before, after]), [_, _, ..]) = (&self.around, windows.as_slice()) else {
            return self.encode_whole(text, special).map(Encoded::from);
        };
        let encoded: Vec<Encoded> = windows
            .par_iter()
            .map(|window| self.encode_window(text, window))
            .collect::<Result<_>>()?;
        let special_tokens = |ids: &[u32]| Encoded {
            ids: ids.to_vec(),
            offsets: vec![(0, 0); ids.len()],
        };
        let mut joined = Encoded::default();
        if special {
            joined.append(special_tokens(before));
        }
        for window in encoded {
            joined.append(window);
        }
        if special {
            joined.append(special_tokens(after));
        }
        Ok(joined)
    }

    /// Token ids of `words` with special tokens, and of each id its word. As in transformers, a
    /// byte-level pipeline reads a space before each word.
    pub(super) fn encode_words(&self, words: &[String]) -> Result<(Vec<u32>, Vec<Option<usize>>)> {
        let by_bytes = matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let spaced = |word: &String| {
            if by_bytes {
                format!(" {word}")
            } else {
                word.clone()
            }
        };
        let words: Vec<String> = words.iter().map(spaced).collect();
        let encoding = guarded("model", || self.inner.encode(words, true))?;
        let word_ids = encoding.get_word_ids().iter();
        let word_ids = word_ids.map(|word| word.map(|word| word as usize));
        Ok((encoding.get_ids().to_vec(), word_ids.collect()))
    }

    /// The text of `ids`, special tokens included.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded("decoder", || self.inner.decode(ids, false))
    }

    fn encode_whole(&self, text: &str, special: bool) -> Result<Encoding> {
        let inner = &self.inner;
        let added = inner.get_added_vocabulary();
        let mut pieces = guarded("normalizer", || {
            Ok(added.extract_and_normalize(inner.get_normalizer(), text))
        })?;
        if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
            catch_panic(|| pre_tokenizer.pre_tokenize(&mut pieces)).map_err(|cause| {
                // A normalizer that breaks a text fails only when the text is split.
                let raw = catch_panic(|| pre_tokenizer.pre_tokenize(&mut text.into()));
                let broken = ["pre_tokenizer", "normalizer"][usize::from(raw.is_ok())];
                failed(broken, &cause)
            })?;
        }
        let encoding = guarded("model", || {
            inner
                .get_model()
                .tokenize_in_pretokenized(&mut pieces, None)?;
            pieces.into_encoding(None, 0, OffsetType::Byte)
        })?;
        guarded("post_processor", || {
            inner.post_process(encoding, None, special)
        })
    }

    /// The tokens of `window`, encoded with the text's last bytes before it.
    fn encode_window(&self, text: &str, window: &Range<usize>) -> Result<Encoded> {
        let start = text.floor_char_boundary(window.start.saturating_sub(CONTEXT));
        let context = window.start - start;
        let mut encoded = Encoded::from(self.encode_whole(&text[start..window.end], false)?);
        let first = encoded.tokens_before(context).unwrap_or(0);
        encoded.ids.drain(..first);
        encoded.offsets.drain(..first);
        for (from, to) in &mut encoded.offsets {
            *from += start;
            *to += start;
        }
        Ok(encoded)
    }

    /// Splits `text` into windows of some [`WINDOW`] bytes: between a letter or digit and another character, where the tokens around
    /// the border are the same for the undivided text and for two parts of it.
    fn windows(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let mut windows = Vec::new();
        let mut start = 0;
        let mut from = WINDOW;
        while text.len() > start + WINDOW && from < text.len() {
            let from_char = text.floor_char_boundary(from);
            let mut found = None;
            for border in borders(text, from_char).take(BORDERS) {
                if self.is_independent(text, border)? {
                    found = Some(border);
                    break;
                }
            }
            if let Some(border) = found {
                windows.push(start..border);
                start = border;
            }
            from = from.max(start) + WINDOW;
        }
        windows.push(start..text.len());
        Ok(windows)
    }

    /// Whether the text around `border` encodes to the same tokens in one piece and in two.
    fn is_independent(&self, text: &str, border: usize) -> Result<bool> {
        let start = text.floor_char_boundary(border.saturating_sub(MARGIN));
        let end = text.ceil_char_boundary(border + MARGIN);
        let mut whole = Encoded::from(self.encode_whole(&text[start..end], false)?);
        let left = self.encode_whole(&text[start..border], false)?;
        let right = self.encode_window(text, &(border..end))?;
        let Some(first) = whole.tokens_before(border - start) else {
            return Ok(false);
        };
        let rest = whole.ids.split_off(first);
        Ok(whole.ids == left.get_ids() && rest == right.ids)
    }
}

/// Borders that are tried before a window grows by another [`WINDOW`] bytes.
const BORDERS: usize = 8;

/// Positions from `from` on between a letter or digit and another character.
fn borders(text: &str, from: usize) -> impl Iterator<Item = usize> {
    let mut after_word = false;
    text[from..].char_indices().filter_map(move |(at, c)| {
        let before = std::mem::replace(&mut after_word, c.is_alphanumeric());
        (before && !after_word).then_some(from + at)
    })
}

/// The ids of `special` before and after those of `plain`.
fn special_tokens_around(plain: &[u32], special: &[u32]) -> Option<[Vec<u32>; 2]> {
    let mut windows = special.windows(plain.len().max(1));
    let start = windows.position(|ids| ids == plain)?;
    let end = start + plain.len();
    Some([special[..start].to_vec(), special[end..].to_vec()])
}

/// Calls a component of the pipeline; an error or a panic becomes an error that names it.
fn guarded<T>(component: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    catch_panic(call).map_err(|cause| failed(component, &cause))
}

fn failed(component: &str, cause: &str) -> Error {
    Error::new(
        Kind::Tokenizer,
        format!("the tokenizer's `{component}` fails: {cause}"),
    )
    .hint(format!(
        "correct `{component}` in tokenizer.json, or take the file that was published with the model"
    ))
}

impl Encoded {
    /// Number of tokens that end at byte `at` or before; `None` if a token crosses it.
    fn tokens_before(&self, at: usize) -> Option<usize> {
        let first = self.offsets.iter().position(|(_, end)| *end > at);
        let Some(first) = first else {
            return Some(self.ids.len());
        };
        (self.offsets[first].0 >= at).then_some(first)
    }

    fn append(&mut self, other: Self) {
        self.ids.extend(other.ids);
        self.offsets.extend(other.offsets);
    }
}

impl From<Encoding> for Encoded {
    fn from(encoding: Encoding) -> Self {
        Self {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::{Path, PathBuf};

    fn byte_level() -> Value {
        crate::data::golden("tokenizer_files.json")["bases"]["byte_level"].clone()
    }

    fn load(tokenizer: &Value) -> Result<Pipeline> {
        let inner = guarded("file", || {
            tokenizers::Tokenizer::from_bytes(tokenizer.to_string())
        })?;
        Pipeline::new(inner)
    }

    #[test]
    fn a_component_that_panics_is_named() {
        let template = json!({"type": "TemplateProcessing", "special_tokens": {},
            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]});
        let replace =
            |pattern: Value| json!({"type": "Replace", "pattern": pattern, "content": "x"});
        let strip = json!({"type": "Strip", "content": "a", "start": 1, "stop": 1});
        let fused = json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip]});
        // Each panics in Python's `tokenizers` 0.23.3 as well.
        let cases = [
            (
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
            ),
            (
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
            ),
            ("normalizer", replace(json!({"String": ""}))),
            ("normalizer", replace(json!({"Regex": ""}))),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            ("post_processor", template),
            ("decoder", fused),
        ];
        for (component, value) in cases {
            let mut tokenizer = byte_level();
            tokenizer[component] = value.clone();
            let error = load(&tokenizer).map(drop).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), Kind::Tokenizer);
            assert!(
                text.contains(&format!("`{component}` fails")),
                "{value}: {text}"
            );
        }
        let mut prefix = byte_level();
        prefix["model"]["continuing_subword_prefix"] = "######".into();
        assert!(load(&prefix).is_err());
        load(&byte_level()).unwrap();
    }

    #[test]
    fn a_text_beyond_the_vocabulary_fails_when_it_comes() {
        let mut tokenizer = byte_level();
        tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
        tokenizer["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"});
        let pipeline = load(&tokenizer).unwrap();
        assert_eq!(pipeline.encode("a a", true).unwrap().ids, [0, 0]);
        let error = pipeline.encode("b", true).unwrap_err().to_string();
        assert!(error.contains("`model` fails"), "{error}");
    }

    /// Texts of `length` bytes and more: prose, code, one line without spaces, Chinese, combining marks.
    fn long_texts(length: usize) -> [String; 5] {
        let prose = "It was 1905; \u{201c}don't\u{201d}, said M\u{fc}ller \u{2014} <im> and left.\n\n  Then: nothing...\t ";
        let code = "def f(x):\r\n    return x**2  # a_b _c\n\n\n";
        let line = "0123456789abcdefghijklmnopqrstuvwxyz";
        let chinese = "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{3002}";
        let marks = "e\u{301}a\u{308} n\u{303}o ";
        [prose, code, line, chinese, marks].map(|part| part.repeat(length / part.len() + 1))
    }

    fn equals_the_undivided(pipeline: &Pipeline, name: &str) {
        let mut split = 0;
        for text in long_texts(3 * WINDOW) {
            let whole = Encoded::from(pipeline.inner.encode(text.as_str(), true).unwrap());
            let encoded = pipeline.encode(&text, true).unwrap();
            assert!(encoded == whole, "{name}: {:?}", &text[..40]);
            let windows = pipeline.windows(&text).unwrap();
            assert!(windows[0].start == 0 && windows.last().unwrap().end == text.len());
            assert!(windows.windows(2).all(|pair| pair[0].end == pair[1].start));
            split += usize::from(windows.len() > 1);
        }
        assert!(split >= 2, "{name}: prose and code have windows");
    }

    #[test]
    fn windows_of_a_long_text_encode_like_the_text() {
        let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false});
        let bytes: serde_json::Map<String, Value> = (0..=255_u32)
            .map(|byte| (format!("<0x{byte:02X}>"), byte.into()))
            .collect();
        let mut sentencepiece = byte_level();
        sentencepiece["pre_tokenizer"] = metaspace;
        sentencepiece["model"] =
            json!({"type": "BPE", "vocab": bytes, "merges": [], "byte_fallback": true});
        let bos = json!({"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]});
        let mut with_bos = byte_level();
        with_bos["post_processor"] = bos;
        with_bos["normalizer"] = json!({"type": "NFC"});
        with_bos["added_tokens"] = json!([{"id": 261, "content": "<im>", "lstrip": true, "rstrip": true, "single_word": false,
            "normalized": false, "special": true}]);
        for (name, tokenizer) in [
            ("bytes", byte_level()),
            ("bos", with_bos),
            ("\u{2581}", sentencepiece),
        ] {
            equals_the_undivided(&load(&tokenizer).unwrap(), name);
        }
    }

    #[test]
    fn windows_of_published_tokenizers_encode_like_the_text() {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets");
        let assets = std::env::var_os("WATTUNE_ASSETS").map_or(beside, PathBuf::from);
        for name in [
            "tokenizers/gpt2",
            "tokenizers/phi-3-mini",
            "models/TinyStories-656K",
        ] {
            let Ok(bytes) = std::fs::read(assets.join(name).join("tokenizer.json")) else {
                eprintln!("skipped: {name} needs the assets folder (set WATTUNE_ASSETS)");
                continue;
            };
            let inner = tokenizers::Tokenizer::from_bytes(bytes).unwrap();
            equals_the_undivided(&Pipeline::new(inner).unwrap(), name);
        }
    }
}
