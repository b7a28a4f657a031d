//! The tokenizer inside a GGUF file -> tokenizer.json and its companions, the inverse of `tokenizer`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json, json};

use super::reader::GgufFile;
use super::tokenizer::{PATTERNS, TokenType};
use crate::error::{Error, Kind, Result};

/// Longest token, in bytes, that merges are derived of.
const MOST_TOKEN: usize = 4096;

impl GgufFile {
    fn tokenizer_text(&self, key: &str) -> Option<&str> {
        self.text(&format!("tokenizer.ggml.{key}"))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.get(&format!("tokenizer.ggml.{key}"))? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    fn list(&self, key: &str) -> Result<&[Value]> {
        match self.get(&format!("tokenizer.ggml.{key}")) {
            Some(Value::Array(values)) => Ok(values),
            _ => Err(self.no_tokenizer(key)),
        }
    }

    fn no_tokenizer(&self, key: &str) -> Error {
        self.refused(
            Kind::Tokenizer,
            "the GGUF file lacks a part of its tokenizer",
        )
        .value(format!("tokenizer.ggml.{key}"))
        .hint("use a file that llama.cpp runs, or the safetensors files of the model")
    }

    fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let texts = self.list(key)?.iter().map(|value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        });
        let texts: Option<Vec<&str>> = texts.collect();
        texts.ok_or_else(|| self.no_tokenizer(key))
    }

    /// The id of a special token such as `bos`.
    fn special_id(&self, name: &str) -> Result<Option<u64>> {
        self.number(&format!("tokenizer.ggml.{name}_token_id"))
    }

    /// The tokens with their types.
    fn tokens(&self) -> Result<Vec<(&str, i64)>> {
        let tokens = self.texts("tokens")?;
        let types = self.list("token_type").unwrap_or_default();
        let kind = |value: &Value| match value {
            Value::I32(kind) => i64::from(*kind),
            Value::U32(kind) => i64::from(*kind),
            _ => TokenType::Normal as i64,
        };
        let types = types
            .iter()
            .map(kind)
            .chain(std::iter::repeat(TokenType::Normal as i64));
        Ok(tokens.into_iter().zip(types).collect())
    }

    /// tokenizer.json.
    ///
    /// # Errors
    /// [`Kind::Tokenizer`] for parts that are missing, another model than BPE, and a pattern that is not known.
    pub fn tokenizer_json(&self) -> Result<Json> {
        let tokens = self.tokens()?;
        let is_known = |kind: i64| kind != TokenType::Unused as i64;
        let mut vocab = Map::new();
        let mut added = Vec::new();
        for (id, (token, kind)) in tokens.iter().enumerate() {
            if is_known(*kind) {
                vocab.insert((*token).to_string(), id.into());
            }
            let is_control =
                *kind == TokenType::Control as i64 || *kind == TokenType::Unknown as i64;
            if is_control || *kind == TokenType::UserDefined as i64 {
                added.push(json!({
                    "id": id, "content": token, "special": is_control, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                }));
            }
        }
        let mut json = match self.tokenizer_text("model") {
            Some("gpt2") => self.byte_level(vocab)?,
            Some("llama") => self.sentencepiece(vocab, &tokens)?,
            other => {
                return Err(self
                    .refused(
                        Kind::Tokenizer,
                        "this kind of tokenizer is not read from GGUF",
                    )
                    .value(other.unwrap_or("none"))
                    .rule("gpt2 or llama")
                    .hint("use the safetensors files of the model"));
            }
        };
        json["version"] = "1.0".into();
        json["added_tokens"] = added.into();
        json["post_processor"] = self.post_processor(&tokens)?;
        Ok(json)
    }

    /// bos before a text, and eos after it, where the file says so.
    fn post_processor(&self, tokens: &[(&str, i64)]) -> Result<Json> {
        let is_llama = self.tokenizer_text("model") == Some("llama");
        let bos = self.special_of("bos", tokens)?;
        let bos = bos.filter(|_| self.flag("add_bos_token").unwrap_or(is_llama));
        let eos = self.special_of("eos", tokens)?;
        let eos = eos.filter(|_| self.flag("add_eos_token").unwrap_or(false));
        if bos.is_none() && eos.is_none() {
            return Ok(Json::Null);
        }
        let mut single = Vec::new();
        let mut special = Map::new();
        let mut add = |token: &(u64, &str), list: &mut Vec<Json>| {
            let (id, text) = token;
            list.push(json!({"SpecialToken": {"id": text, "type_id": 0}}));
            special.insert(
                (*text).to_string(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            );
        };
        bos.iter().for_each(|token| add(token, &mut single));
        single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        eos.iter().for_each(|token| add(token, &mut single));
        let mut pair = single.clone();
        pair.push(json!({"Sequence": {"id": "B", "type_id": 0}}));
        Ok(
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}),
        )
    }

    fn special_of<'a>(
        &self,
        name: &str,
        tokens: &[(&'a str, i64)],
    ) -> Result<Option<(u64, &'a str)>> {
        let Some(id) = self.special_id(name)? else {
            return Ok(None);
        };
        let beyond = || {
            self.refused(
                Kind::Tokenizer,
                "a special token lies beyond the vocabulary",
            )
            .value(format!("tokenizer.ggml.{name}_token_id = {id}"))
        };
        let (text, _) = tokens.get(id as usize).ok_or_else(beyond)?;
        Ok(Some((id, *text)))
    }

    /// Byte-level BPE.
    fn byte_level(&self, vocab: Map<String, Json>) -> Result<Json> {
        let name = self.tokenizer_text("pre").unwrap_or_default();
        let Some(pattern) = PATTERNS
            .iter()
            .find(|pattern| pattern.names.contains(&name))
        else {
            let known: Vec<&str> = PATTERNS
                .iter()
                .flat_map(|pattern| pattern.names)
                .copied()
                .collect();
            return Err(self
                .refused(
                    Kind::Tokenizer,
                    "the pattern of the tokenizer is not known by this name",
                )
                .at("tokenizer.ggml.pre")
                .value(name)
                .rule(format!("one of {}", known.join(", ")))
                .hint("use the safetensors files of the model"));
        };
        let normalizer = if name == "qwen2" {
            json!({"type": "NFC"})
        } else {
            Json::Null
        };
        Ok(json!({
            "normalizer": normalizer,
            "pre_tokenizer": pattern.pre_tokenizer(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pattern.ignores_merges, "vocab": vocab, "merges": self.texts("merges")?,
            },
        }))
    }

    /// SentencePiece BPE: merges are the pairs of tokens that make a token, by its score, as transformers derives them.
    fn sentencepiece(&self, vocab: Map<String, Json>, tokens: &[(&str, i64)]) -> Result<Json> {
        let scores = self.list("scores")?;
        let score = |value: &Value| match value {
            Value::F32(score) => *score,
            _ => 0.0,
        };
        let ids: HashMap<&str, usize> = tokens
            .iter()
            .enumerate()
            .map(|(id, (token, _))| (*token, id))
            .collect();
        let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
        for ((token, kind), value) in tokens.iter().zip(scores) {
            if *kind != TokenType::Normal as i64 {
                continue;
            }
            if token.len() > MOST_TOKEN {
                return Err(self
                    .refused(Kind::Tokenizer, "a token of the GGUF file is too long")
                    .value(format!("{} bytes", token.len()))
                    .rule(format!("at most {MOST_TOKEN}")));
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                    merges.push((score(value), *a, *b, left, right));
                }
            }
        }
        // Highest score first; the pairs of one token by their ids.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let merges: Vec<Json> = merges
            .iter()
            .map(|(.., left, right)| json!([left, right]))
            .collect();
        let unknown = self.special_of("unknown", tokens)?.map(|(_, text)| text);
        let prefix = self.flag("add_space_prefix").unwrap_or(true);
        let mut steps =
            vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            steps.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        }))
    }

    /// tokenizer_config.json: special tokens and the chat template.
    ///
    /// # Errors
    /// As [`GgufFile::tokenizer_json`]'s.
    pub fn tokenizer_config(&self) -> Result<Json> {
        let tokens = self.tokens()?;
        let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
        for (key, name) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            if let Some((_, text)) = self.special_of(name, &tokens)? {
                config[key] = text.into();
            }
        }
        if let Some(template) = self.text("tokenizer.chat_template") {
            config["chat_template"] = template.into();
        }
        Ok(config)
    }

    /// generation_config.json: the tokens that end an answer.
    pub fn generation_config(&self) -> Option<Json> {
        let id = |name| self.special_id(name).ok().flatten();
        let ids: Vec<u64> = ["eos", "eot"].into_iter().filter_map(id).collect();
        (!ids.is_empty()).then(|| json!({"eos_token_id": ids}))
    }
}
