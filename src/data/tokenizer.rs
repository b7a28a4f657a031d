//! A model's tokenizer: text to token ids and back, and its chat template.
//!
//! Takes local files, returns ids with their byte ranges in the text. Owns the choice of the eos token. Refuses files that it cannot
//! read exactly; never falls back to another tokenizer. Knows nothing of records.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::byte_level;
use super::chat::{TurnDelimiters, detect_turn_delimiters};
use super::template::ChatTemplate;
use crate::error::{Error, Kind, Result};

/// Paths of a tokenizer's files; an absent one is `None`.
#[derive(Debug, Clone, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json`: sufficient for encoding.
    pub tokenizer_json: Option<PathBuf>,
    /// `vocab.json` of a byte-level BPE, used without a `tokenizer.json`.
    pub vocab_json: Option<PathBuf>,
    /// `merges.txt` of the same BPE.
    pub merges: Option<PathBuf>,
    /// `tokenizer_config.json`: the eos token, added tokens, the chat template.
    pub tokenizer_config: Option<PathBuf>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<PathBuf>,
    /// `chat_template.jinja`: takes precedence over tokenizer_config.json's, as in transformers.
    pub chat_template: Option<PathBuf>,
    /// The model's `config.json`: its eos id is used if tokenizer_config.json names no eos token.
    pub config: Option<PathBuf>,
}

/// Token ids and their byte ranges in the text (empty at 0 for tokens that the tokenizer added).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One (start, end) in bytes per id.
    pub offsets: Vec<(usize, usize)>,
}

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    eos: Option<(String, u32)>,
    fingerprint: String,
    turn_delimiters: OnceLock<TurnDelimiters>,
}

impl Tokenizer {
    /// Loads a tokenizer; `Kind::Tokenizer` where a file is missing, malformed or of a layout that cannot be read faithfully.
    pub fn load(files: &TokenizerFiles) -> Result<Self> {
        let mut hash = Sha256::new();
        let config = read_json(files.tokenizer_config.as_deref(), &mut hash)?;
        let map = read_json(files.special_tokens_map.as_deref(), &mut hash)?;
        let model_config = read_json(files.config.as_deref(), &mut hash)?;
        let mut inner = match (&files.tokenizer_json, &files.vocab_json, &files.merges) {
            (Some(path), ..) => from_tokenizer_json(path, &mut hash)?,
            (None, Some(vocab), Some(merges)) => {
                let (vocab, merges) = (read_text(vocab, &mut hash)?, read_text(merges, &mut hash)?);
                byte_level::tokenizer(&vocab, &merges, config.as_ref())?
            }
            _ => {
                return Err(Error::new(
                    Kind::Tokenizer,
                    "the model has no tokenizer that can be read",
                )
                .rule("`tokenizer.json`, or `vocab.json` with `merges.txt`")
                .hint(CONVERT));
            }
        };
        // A published tokenizer.json may contain the padding and truncation of an earlier run.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::new(Kind::Tokenizer, e.to_string()))?;
        let eos = eos(config.as_ref(), map.as_ref(), model_config.as_ref(), &inner)?;
        let jinja = files
            .chat_template
            .as_deref()
            .map(|path| read_text(path, &mut hash))
            .transpose()?;
        let template = template(
            jinja,
            config.as_ref(),
            special_tokens(config.as_ref(), map.as_ref()),
        )?;
        Ok(Self {
            inner,
            template,
            eos,
            fingerprint: crate::text::hex(hash.finalize()),
            turn_delimiters: OnceLock::new(),
        })
    }

    /// Encodes `text`; `special` adds the tokenizer's special tokens, such as bos.
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoded> {
        let encoding = self.inner.encode(text, special).map_err(|e| {
            Error::new(
                Kind::Tokenizer,
                format!("the tokenizer cannot encode a text: {e}"),
            )
        })?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, false)
            .map_err(|e| Error::new(Kind::Tokenizer, format!("the tokenizer cannot decode: {e}")))
    }

    /// The eos token and its id, if the model names one.
    pub fn eos(&self) -> Option<(String, u32)> {
        self.eos.clone()
    }

    /// The id of the eos token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(_, id)| *id)
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Renders `messages` (a list of `{role, content, ...}`) by the model's chat template, as transformers' `apply_chat_template`.
    pub fn render_chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.template()?
            .render(messages, tools, add_generation_prompt, false)
    }

    /// SHA-256 (hex) of its files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::new(Kind::Tokenizer, "the model has no chat template, so conversations cannot be rendered")
                .rule("`chat_template` in tokenizer_config.json, or a chat_template.jinja beside it")
                .hint("train the -Instruct or -Chat variant of the model, add its chat_template.jinja, or use `format = \"completion\"`")
        })
    }

    /// The template's delimiters of an assistant's turn, detected once.
    pub(super) fn turn_delimiters(&self) -> Result<&TurnDelimiters> {
        let template = self.template()?;
        Ok(self.turn_delimiters.get_or_init(|| {
            let added: Vec<(String, u32)> = self
                .inner
                .get_added_tokens_decoder()
                .into_iter()
                .map(|(id, t)| (t.content, id))
                .collect();
            detect_turn_delimiters(template, &added)
        }))
    }
}

/// Remedy for a layout that only transformers reads.
const CONVERT: &str = "convert it once: python -c \"from transformers import AutoTokenizer; \
    AutoTokenizer.from_pretrained('MODEL_DIR').save_pretrained('MODEL_DIR')\"";

fn from_tokenizer_json(path: &Path, hash: &mut Sha256) -> Result<tokenizers::Tokenizer> {
    let text = read_text(path, hash)?;
    tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(|e| {
        Error::new(
            Kind::Tokenizer,
            format!("tokenizer.json cannot be read: {e}"),
        )
        .at(path.display().to_string())
        .rule("the layout that tokenizers 0.14 and later write")
        .hint(CONVERT)
    })
}

fn read_text(path: &Path, hash: &mut Sha256) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(&text);
    Ok(text)
}

fn read_json(path: Option<&Path>, hash: &mut Sha256) -> Result<Option<Value>> {
    let Some(path) = path else {
        hash.update([0]);
        return Ok(None);
    };
    hash.update([1]);
    let text = read_text(path, hash)?;
    let value = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Tokenizer, format!("not valid JSON: {e}"))
            .at(path.display().to_string())
            .hint("download the file again")
    })?;
    Ok(Some(value))
}

/// A token written as a string or as `{"content": ...}`.
pub(super) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// tokenizer_config.json's eos token, else config.json's id if it is a single one, else special_tokens_map.json's.
fn eos(
    config: Option<&Value>,
    map: Option<&Value>,
    model_config: Option<&Value>,
    inner: &tokenizers::Tokenizer,
) -> Result<Option<(String, u32)>> {
    let named = |file: Option<&Value>| {
        file.and_then(|c| token_text(c.get("eos_token")?))
            .map(str::to_string)
    };
    if let Some(token) = named(config) {
        return with_id(token, inner).map(Some);
    }
    if let Some(id) = model_config.and_then(|c| c.get("eos_token_id")?.as_u64()) {
        let token = u32::try_from(id)
            .ok()
            .and_then(|id| Some((inner.id_to_token(id)?, id)));
        return token.map(Some).ok_or_else(|| {
            Error::new(
                Kind::Tokenizer,
                "config.json's `eos_token_id` is no token of the tokenizer",
            )
            .value(id.to_string())
            .hint("name the token as `eos_token` in tokenizer_config.json")
        });
    }
    named(map).map(|token| with_id(token, inner)).transpose()
}

fn with_id(token: String, inner: &tokenizers::Tokenizer) -> Result<(String, u32)> {
    let id = inner.token_to_id(&token).ok_or_else(|| {
        Error::new(
            Kind::Tokenizer,
            "the `eos_token` is no token of the tokenizer",
        )
        .value(token.clone())
        .hint("correct `eos_token` in tokenizer_config.json")
    })?;
    Ok((token, id))
}

/// `bos_token`, `eos_token` and the like: variables of the chat template.
fn special_tokens(config: Option<&Value>, map: Option<&Value>) -> Vec<(String, String)> {
    [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ]
    .into_iter()
    .filter_map(|name| {
        let token = [config, map]
            .into_iter()
            .flatten()
            .find_map(|file| token_text(file.get(name)?))?;
        Some((name.to_string(), token.to_string()))
    })
    .collect()
}

/// chat_template.jinja, else tokenizer_config.json's `chat_template`: a string, or a list of named ones.
fn template(
    jinja: Option<String>,
    config: Option<&Value>,
    special: Vec<(String, String)>,
) -> Result<Option<ChatTemplate>> {
    let written = config
        .and_then(|c| c.get("chat_template"))
        .filter(|t| !t.is_null());
    if let Some(source) = jinja.as_deref().or_else(|| written?.as_str()) {
        return ChatTemplate::new(source, None, special).map(Some);
    }
    let Some(written) = written else {
        return Ok(None);
    };
    let named = |name: &str| {
        let list = written.as_array()?;
        list.iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some(name))?
            .get("template")?
            .as_str()
    };
    let default = named("default").ok_or_else(|| {
        Error::new(
            Kind::Tokenizer,
            "tokenizer_config.json's `chat_template` has no template named `default`",
        )
        .rule("a string, or a list of {name, template} with one named `default`")
        .hint("name one of the templates `default`")
    })?;
    ChatTemplate::new(default, named("tool_use"), special).map(Some)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// A word-level tokenizer for tests: ids are the order of `words`; `<s>`-like words are added tokens.
    pub(in super::super) fn word_tokenizer(
        words: &[&str],
        eos: &str,
        chat_template: Option<&str>,
    ) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let vocab: serde_json::Map<String, Value> = words
            .iter()
            .enumerate()
            .map(|(i, w)| (w.to_string(), json!(i)))
            .collect();
        let added: Vec<Value> = words
            .iter()
            .enumerate()
            .filter(|(_, w)| w.starts_with('<'))
            .map(|(i, w)| {
                json!({"id": i, "content": w, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r" ?\w+|\n|[^\w\s]"}, "behavior": "Isolated", "invert": false},
            "post_processor": null, "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]}});
        let config = json!({"eos_token": {"content": eos}, "chat_template": chat_template});
        let files = TokenizerFiles {
            tokenizer_json: Some(folder.path().join("tokenizer.json")),
            tokenizer_config: Some(folder.path().join("tokenizer_config.json")),
            ..TokenizerFiles::default()
        };
        std::fs::write(
            files.tokenizer_json.as_ref().unwrap(),
            tokenizer.to_string(),
        )
        .unwrap();
        std::fs::write(files.tokenizer_config.as_ref().unwrap(), config.to_string()).unwrap();
        Tokenizer::load(&files).unwrap()
    }

    #[test]
    fn eos_may_be_written_as_an_object() {
        let tokenizer = word_tokenizer(&["<unk>", "<eos>", "a", " b"], "<eos>", None);
        assert_eq!(tokenizer.eos(), Some(("<eos>".into(), 1)));
        assert_eq!(tokenizer.vocab_size(), 4);
        let encoded = tokenizer.encode("a b<eos>", false).unwrap();
        assert_eq!(
            encoded,
            Encoded {
                ids: vec![2, 3, 1],
                offsets: vec![(0, 1), (1, 3), (3, 8)]
            }
        );
        assert_eq!(tokenizer.decode(&encoded.ids).unwrap(), "a b<eos>");
    }

    #[test]
    fn a_missing_tokenizer_or_template_is_an_error() {
        let error = Tokenizer::load(&TokenizerFiles::default()).unwrap_err();
        assert!(
            error.kind() == Kind::Tokenizer && error.remedy().unwrap().contains("save_pretrained")
        );
        let tokenizer = word_tokenizer(&["<unk>", "<eos>"], "<eos>", None);
        assert!(
            tokenizer
                .render_chat(&json!([]), None, false)
                .unwrap_err()
                .to_string()
                .contains("no chat template")
        );
    }

    #[test]
    fn named_templates_are_found_by_name() {
        let config = json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]});
        let template = template(
            None,
            Some(&config),
            vec![("eos_token".into(), "<e>".into())],
        )
        .unwrap()
        .unwrap();
        assert_eq!(
            template.render(&json!([]), None, false, false).unwrap(),
            "D<e>"
        );
        assert_eq!(
            template
                .render(&json!([]), Some(&json!([])), false, false)
                .unwrap(),
            "T"
        );
    }
}
