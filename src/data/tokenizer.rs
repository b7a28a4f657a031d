//! A model's tokenizer: text to token ids and back, and its chat template.
//!
//! Takes local files, returns ids with their byte ranges in the text. Owns the choice of the eos token. Refuses files that it cannot
//! read exactly; never falls back to another tokenizer. Knows nothing of records.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use chrono::NaiveDate;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::added_tokens::{add_tokens, check_id, effective_config, token_text};
use super::byte_level;
use super::pipeline::Pipeline;
use super::template::ChatTemplate;
use super::template_files::{special_tokens, templates};
use super::tokenizer_config::{apply, clean_up_spaces, cleans_up_spaces, disable_dropout};
use super::turns::{TurnDelimiters, detect_turn_delimiters};
use crate::error::{Error, Kind, Result, catch_panic};

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
    /// `special_tokens_map.json`: ignored if tokenizer_config.json has an `added_tokens_decoder`.
    pub special_tokens_map: Option<PathBuf>,
    /// `added_tokens.json`: ignored under the same condition.
    pub added_tokens: Option<PathBuf>,
    /// `chat_template.jinja`: takes precedence over tokenizer_config.json's, as in transformers.
    pub chat_template: Option<PathBuf>,
    /// `additional_chat_templates/NAME.jinja`.
    pub additional_chat_templates: Vec<PathBuf>,
    /// `chat_template.json` of a processor, used where no other file has a template.
    pub processor_template: Option<PathBuf>,
    /// The date that chat templates write (`strftime_now`); `None`: today.
    pub chat_date: Option<NaiveDate>,
    /// The model's `config.json`: its eos id is used if tokenizer_config.json names no eos token.
    pub config: Option<PathBuf>,
}

/// Token ids and their byte ranges in the text (empty at 0 for tokens that the tokenizer added).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One (start, end) in bytes per id.
    pub offsets: Vec<(usize, usize)>,
}

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    pipeline: Pipeline,
    /// Rows of the model's embedding: ids are below.
    embedding_rows: usize,
    cleans_up_spaces: bool,
    warnings: Vec<String>,
    template: Option<ChatTemplate>,
    /// Tokens by variable, such as `bos_token`.
    special_tokens: BTreeMap<String, String>,
    eos: Option<(String, u32)>,
    fingerprint: String,
    chat_date: NaiveDate,
    /// Of conversations without and with tools.
    turn_delimiters: [OnceLock<TurnDelimiters>; 2],
}

impl Tokenizer {
    /// Loads a tokenizer; `Kind::Tokenizer` where a file is missing, malformed or of a layout that cannot be read faithfully.
    pub fn load(files: &TokenizerFiles) -> Result<Self> {
        let mut hash = Sha256::new();
        let config = read_json(files.tokenizer_config.as_deref(), &mut hash)?;
        let map = read_json(files.special_tokens_map.as_deref(), &mut hash)?;
        let model_config = read_json(files.config.as_deref(), &mut hash)?;
        let added = read_json(files.added_tokens.as_deref(), &mut hash)?;
        let mut settings = effective_config(config.as_ref(), map.as_ref());
        let class = model_config.as_ref().and_then(|c| c.get("tokenizer_class"));
        if let Some(class) = class {
            let own = settings.entry("tokenizer_class");
            own.or_insert_with(|| class.clone());
        }
        let mut inner = base_tokenizer(files, &mut settings, &mut hash)?;
        if let Some(padding) = inner.get_padding() {
            let pad = settings.entry("pad_token");
            pad.or_insert_with(|| padding.pad_token.clone().into());
        }
        add_tokens(&mut inner, &settings, added.as_ref())?;
        if files.tokenizer_json.is_none() {
            byte_level::add_special_tokens(&mut inner, &settings)?;
        }
        let warnings = configure(&mut inner, &settings)?;
        let eos = eos(&settings, map.as_ref(), model_config.as_ref(), &inner)?;
        let today = || chrono::Local::now().date_naive();
        let chat_date = files.chat_date.unwrap_or_else(today);
        let tokens = special_tokens(config.as_ref(), map.as_ref());
        let template = chat_template(files, config.as_ref(), tokens.clone(), chat_date, &mut hash)?;
        Ok(Self {
            cleans_up_spaces: cleans_up_spaces(&inner, &settings),
            pipeline: Pipeline::new(inner)?,
            embedding_rows: usize::MAX,
            warnings,
            template,
            special_tokens: tokens,
            eos,
            fingerprint: crate::text::hex(hash.finalize()),
            chat_date,
            turn_delimiters: Default::default(),
        })
    }

    /// The tokenizer of a model whose embedding has `rows` rows: encoding refuses every id beyond.
    ///
    /// # Errors
    /// `Kind::Tokenizer` where the eos token lies beyond.
    pub fn with_embedding_rows(mut self, rows: usize) -> Result<Self> {
        self.embedding_rows = rows;
        self.fingerprint = crate::text::hex(Sha256::digest(format!("{} {rows}", self.fingerprint)));
        self.check_ids(self.eos_id().as_slice())?;
        Ok(self)
    }

    /// Encodes `text`; `special` adds the tokenizer's special tokens, such as bos.
    ///
    /// # Errors
    /// `Kind::Tokenizer` where a component of the tokenizer fails, or a token lies beyond the embedding.
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoded> {
        let encoded = self.pipeline.encode(text, special)?;
        self.check_ids(&encoded.ids)?;
        Ok(encoded)
    }

    /// Token ids of `words`, one by one, between the special tokens; and of each id its word, `None`
    /// of a special token.
    pub fn encode_words(&self, words: &[String]) -> Result<(Vec<u32>, Vec<Option<usize>>)> {
        let encoded = self.pipeline.encode_words(words)?;
        self.check_ids(&encoded.0)?;
        Ok(encoded)
    }

    /// Refuses ids beyond the model's embedding.
    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let rows = self.embedding_rows;
        let Some(id) = ids.iter().find(|id| **id as usize >= rows) else {
            return Ok(());
        };
        let token = self.pipeline.inner().id_to_token(*id).unwrap_or_default();
        Err(beyond_embedding(&format!("`{token}`, id {id}"), rows))
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self.pipeline.decode(ids)?;
        if self.cleans_up_spaces {
            return Ok(clean_up_spaces(&text));
        }
        Ok(text)
    }

    /// As tokenizer.json, with every added token.
    ///
    /// # Errors
    /// `Kind::Tokenizer` where it cannot be serialized.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(self.pipeline.inner()).map_err(|e| {
            Error::new(
                Kind::Tokenizer,
                format!("the tokenizer has no JSON form: {e}"),
            )
        })
    }

    /// Special tokens by variable, such as `bos_token`.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// The chat template as written.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().and_then(ChatTemplate::source)
    }

    /// Settings of its files that are not followed, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
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
        self.pipeline.inner().get_vocab_size(true)
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

    /// The date that the chat template writes; `None` where it writes none.
    pub fn chat_date(&self) -> Option<NaiveDate> {
        let uses_date = self.template.as_ref().is_some_and(ChatTemplate::uses_date);
        uses_date.then_some(self.chat_date)
    }

    /// Variables of special tokens that the chat template prints and no file defines.
    pub fn undefined_tokens(&self) -> Vec<String> {
        let template = self.template.iter();
        template
            .flat_map(ChatTemplate::undefined_tokens)
            .map(str::to_string)
            .collect()
    }

    /// SHA-256 (hex) of its files, and of the chat template's date if it writes one.
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
    pub(super) fn turn_delimiters(&self, tools: Option<&Value>) -> Result<&TurnDelimiters> {
        let template = self.template()?;
        Ok(
            self.turn_delimiters[usize::from(tools.is_some())].get_or_init(|| {
                let added: Vec<(String, u32)> = self
                    .pipeline
                    .inner()
                    .get_added_tokens_decoder()
                    .into_iter()
                    .map(|(id, t)| (t.content, id))
                    .collect();
                detect_turn_delimiters(template, tools, &added)
            }),
        )
    }
}

/// The tokenizer of tokenizer.json, else of vocab.json and merges.txt, without the tokens that other files add.
fn base_tokenizer(
    files: &TokenizerFiles,
    settings: &mut Map<String, Value>,
    hash: &mut Sha256,
) -> Result<tokenizers::Tokenizer> {
    match (&files.tokenizer_json, &files.vocab_json, &files.merges) {
        (Some(path), ..) => from_tokenizer_json(path, hash),
        (None, Some(vocab), Some(merges)) => {
            let vocab = read_text(vocab, hash)?;
            let merges = read_text(merges, hash)?;
            byte_level::tokenizer(&vocab, &merges, settings)
        }
        _ => Err(Error::new(
            Kind::Tokenizer,
            "the model has no tokenizer that can be read",
        )
        .rule("`tokenizer.json`, or `vocab.json` with `merges.txt`")
        .hint(CONVERT)),
    }
}

/// The compiled chat template; `hash` gets its text, and `date` if it writes one.
fn chat_template(
    files: &TokenizerFiles,
    config: Option<&Value>,
    special_tokens: BTreeMap<String, String>,
    date: NaiveDate,
    hash: &mut Sha256,
) -> Result<Option<ChatTemplate>> {
    let processor = read_json(files.processor_template.as_deref(), hash)?;
    let templates = templates(jinja_files(files, hash)?, config, processor.as_ref())?;
    if templates.is_empty() {
        return Ok(None);
    }
    let template = ChatTemplate::new(&templates, special_tokens, date)?;
    if template.uses_date() {
        hash.update(date.to_string());
    }
    Ok(Some(template))
}

/// The templates in .jinja files by name: `default` for chat_template.jinja.
fn jinja_files(files: &TokenizerFiles, hash: &mut Sha256) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    if let Some(path) = &files.chat_template {
        templates.insert("default".to_string(), read_text(path, hash)?);
    }
    for path in &files.additional_chat_templates {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        hash.update(name.as_bytes());
        templates.insert(name.into_owned(), read_text(path, hash)?);
    }
    Ok(templates)
}

/// Remedy for a layout that only transformers reads.
const CONVERT: &str = "convert it once: python -c \"from transformers import AutoTokenizer; \
    AutoTokenizer.from_pretrained('MODEL_DIR').save_pretrained('MODEL_DIR')\"";

/// The error about `token`, its name and id, of a model whose embedding has `rows` rows.
pub(super) fn beyond_embedding(token: &str, rows: usize) -> Error {
    Error::new(Kind::Tokenizer, "a token lies beyond the model's embedding")
        .value(token)
        .rule(format!("ids below {rows}, the rows of the embedding (`vocab_size` in config.json)"))
        .hint(
            "use the tokenizer that was published with the model, or give the model rows for its new tokens once: \
             python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m, t = M.from_pretrained('MODEL_DIR'), \
             T.from_pretrained('MODEL_DIR'); m.resize_token_embeddings(len(t)); m.save_pretrained('MODEL_DIR')\"",
        )
}

/// Switches off what would make encoding depend on more than the text, and applies `settings`. Returns warnings.
fn configure(
    inner: &mut tokenizers::Tokenizer,
    settings: &Map<String, Value>,
) -> Result<Vec<String>> {
    // A published tokenizer.json may contain the padding and truncation of an earlier run.
    inner.with_padding(None);
    let configured = catch_panic(|| {
        inner.with_truncation(None)?;
        apply(inner, settings)
    });
    configured.map_err(|cause| {
        let what = format!("tokenizer_config.json does not fit the tokenizer: {cause}");
        Error::new(Kind::Tokenizer, what).hint("take both files from one revision of the model")
    })?;
    let mut warnings = Vec::new();
    if disable_dropout(inner) {
        warnings.push("`dropout` of the BPE model in tokenizer.json is switched off: a text always has the same tokens".to_string());
    }
    Ok(warnings)
}

fn from_tokenizer_json(path: &Path, hash: &mut Sha256) -> Result<tokenizers::Tokenizer> {
    /// An added token with its declared id.
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    let text = read_text(path, hash)?;
    let refused = |cause: String| {
        Error::new(
            Kind::Tokenizer,
            format!("tokenizer.json cannot be read: {cause}"),
        )
        .at(path.display().to_string())
        .rule("the layout that tokenizers 0.14 and later write")
        .hint(CONVERT)
    };
    let tokenizer = catch_panic(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()));
    let tokenizer = tokenizer.map_err(refused)?;
    let file: File = serde_json::from_str(&text).map_err(|e| refused(e.to_string()))?;
    for Added { id, content } in file.added_tokens {
        check_id(&tokenizer, &content, id, "tokenizer.json")?;
    }
    Ok(tokenizer)
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

/// tokenizer_config.json's eos token, else config.json's id if it is a single one, else special_tokens_map.json's.
fn eos(
    settings: &Map<String, Value>,
    map: Option<&Value>,
    model_config: Option<&Value>,
    inner: &tokenizers::Tokenizer,
) -> Result<Option<(String, u32)>> {
    let named = |token: Option<&Value>| token.and_then(token_text).map(str::to_string);
    if let Some(token) = named(settings.get("eos_token")) {
        return with_id(token, inner).map(Some);
    }
    if let Some(id) = model_config.and_then(eos_token_id) {
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
    named(map.and_then(|map| map.get("eos_token")))
        .map(|token| with_id(token, inner))
        .transpose()
}

/// config.json's `eos_token_id` if it is a single one; that of the text decoder in a composite
/// model's.
fn eos_token_id(model_config: &Value) -> Option<u64> {
    let text_config = || model_config.get("text_config")?.get("eos_token_id");
    let id = model_config.get("eos_token_id").or_else(text_config)?;
    id.as_u64()
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
    fn an_id_beyond_the_embedding_is_refused() {
        let words = ["<unk>", "a", "<eos>", "<m>"];
        let rows = |rows| word_tokenizer(&words, "<eos>", None).with_embedding_rows(rows);
        let tokenizer = rows(3).unwrap();
        assert_eq!(tokenizer.encode("a<eos>", true).unwrap().ids, [1, 2]);
        let text = tokenizer.encode("a<m>", true).unwrap_err().to_string();
        assert!(
            text.contains("`<m>`, id 3") && text.contains("ids below 3"),
            "{text}"
        );
        assert_ne!(tokenizer.fingerprint(), rows(4).unwrap().fingerprint());
        let text = rows(2).map(drop).unwrap_err().to_string();
        assert!(text.contains("`<eos>`, id 2"), "{text}");
    }

    #[test]
    fn dropout_is_switched_off_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let model = json!({"type": "BPE", "dropout": 1.0, "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]]});
        let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": model});
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::load(&TokenizerFiles {
            tokenizer_json: Some(path),
            ..TokenizerFiles::default()
        })
        .unwrap();
        assert_eq!(tokenizer.encode("aa", true).unwrap().ids, [1]);
        assert!(tokenizer.warnings()[0].contains("`dropout`"));
    }
}
