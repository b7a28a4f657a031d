//! tokenizer.json -> the tokenizer inside a GGUF file.
//!
//! Two kinds: byte-level BPE (`gpt2`), whose `pre` names the pattern that splits a text, and SentencePiece BPE (`llama`), whose
//! scores are the ranks of its merges. A tokenizer of another kind, or with an unknown pattern, is refused: a guessed one would
//! encode other tokens than the model was trained on.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::CONVERT;
use super::container::Value;
use crate::error::{Error, Kind, Result};

/// A tokenizer and what is known beside its tokenizer.json.
#[derive(Debug)]
pub struct TokenizerFacts<'a> {
    /// tokenizer.json, with every added token.
    pub json: &'a Json,
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token` by name.
    pub special: &'a BTreeMap<String, String>,
    /// The template named `default`.
    pub chat_template: Option<&'a str>,
    /// Whether encoding a text begins with bos.
    pub adds_bos: bool,
    /// Whether it ends with eos.
    pub adds_eos: bool,
    /// Rows of the embedding.
    pub rows: usize,
}

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy)]
pub(super) enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// How byte-level BPE splits a text, by llama.cpp's names (`tokenizer.ggml.pre`; the first is written).
pub(super) struct Pattern {
    pub(super) names: &'static [&'static str],
    split: Split,
    /// Whether a word of the vocabulary is one token, whatever the merges say.
    pub(super) ignores_merges: bool,
}

/// The steps before byte-level BPE.
enum Split {
    /// GPT-2's pattern, which the step to bytes holds.
    Words,
    /// Single digits, then GPT-2's pattern.
    DigitsAndWords,
    /// A pattern of its own.
    Regex(&'static str),
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) const PATTERNS: [Pattern; 6] = [
    pattern(&["gpt-2"], Split::Words, false),
    pattern(&["smollm"], Split::DigitsAndWords, false),
    pattern(
        &["llama-bpe", "llama3", "llama-v3"],
        Split::Regex(LLAMA_3),
        true,
    ),
    pattern(&["dbrx"], Split::Regex(LLAMA_3), false),
    pattern(&["qwen2"], Split::Regex(QWEN_2), false),
    pattern(&["gpt-4o"], Split::Regex(GPT_4O), false),
];

const fn pattern(names: &'static [&'static str], split: Split, ignores_merges: bool) -> Pattern {
    Pattern {
        names,
        split,
        ignores_merges,
    }
}

impl Pattern {
    /// tokenizer.json's `pre_tokenizer`.
    pub(super) fn pre_tokenizer(&self) -> Json {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let first = match self.split {
            Split::Words => return bytes(true),
            Split::DigitsAndWords => json!({"type": "Digits", "individual_digits": true}),
            Split::Regex(regex) => json!({
                "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
            }),
        };
        let last = bytes(matches!(self.split, Split::DigitsAndWords));
        json!({"type": "Sequence", "pretokenizers": [first, last]})
    }
}

/// The metadata of the tokenizer.
///
/// # Errors
/// [`Kind::Tokenizer`] for a tokenizer that llama.cpp would read as another one.
pub fn metadata(facts: &TokenizerFacts<'_>) -> Result<Vec<(String, Value)>> {
    let model = &facts.json["model"];
    if model["type"] != "BPE" {
        let kind = model["type"].as_str().unwrap_or("none");
        return Err(refused("its model is not BPE").value(kind));
    }
    let is_sentencepiece = model["byte_fallback"] == true;
    let vocabulary = Vocabulary::new(facts, is_sentencepiece)?;
    let mut own = Vec::new();
    if is_sentencepiece {
        own.push(("ggml.model", Value::Text("llama".into())));
        own.push(("ggml.pre", Value::Text("default".into())));
        own.push((
            "ggml.scores",
            Value::F32s(scores(model, &vocabulary.tokens)?),
        ));
        let space = adds_space_prefix(facts.json)?;
        own.push(("ggml.add_space_prefix", Value::Bool(space)));
    } else {
        own.push(("ggml.model", Value::Text("gpt2".into())));
        own.push(("ggml.pre", Value::Text(pattern_name(facts.json)?.into())));
        own.push(("ggml.merges", Value::Texts(merges(model)?)));
    }
    for (name, key) in [
        ("bos_token", "ggml.bos_token_id"),
        ("eos_token", "ggml.eos_token_id"),
        ("unk_token", "ggml.unknown_token_id"),
        ("pad_token", "ggml.padding_token_id"),
    ] {
        let token = facts.special.get(name);
        if let Some(id) = token.and_then(|token| vocabulary.id(token)) {
            own.push((key, Value::U32(id)));
        }
    }
    own.push(("ggml.add_bos_token", Value::Bool(facts.adds_bos)));
    own.push(("ggml.add_eos_token", Value::Bool(facts.adds_eos)));
    own.push(("ggml.tokens", Value::Texts(vocabulary.tokens)));
    own.push(("ggml.token_type", Value::I32s(vocabulary.types)));
    if let Some(template) = facts.chat_template {
        own.push(("chat_template", Value::Text(template.into())));
    }
    Ok(own
        .into_iter()
        .map(|(key, value)| (format!("tokenizer.{key}"), value))
        .collect())
}

/// What llama.cpp cannot encode that the model's own tokenizer can.
pub fn warning(json: &Json) -> Option<String> {
    let model = &json["model"];
    let words = model["vocab"].as_object()?;
    let bytes = words.keys().filter(|token| is_byte(token)).count();
    (model["byte_fallback"] == true && bytes < 256).then(|| {
        format!(
            "the tokenizer has {bytes} of 256 byte tokens: llama.cpp refuses a text with other characters"
        )
    })
}

/// Every row of the embedding as a token.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn new(facts: &TokenizerFacts<'_>, is_sentencepiece: bool) -> Result<Self> {
        let unknown = facts.json["model"]["unk_token"].as_str();
        let mut rows: Vec<(String, TokenType)> = (0..facts.rows)
            .map(|id| (format!("[PAD{id}]"), TokenType::Unused))
            .collect();
        let mut set = |id: &Json, token: &str, kind: TokenType| {
            let row = id.as_u64().and_then(|id| rows.get_mut(id as usize));
            row.map(|row| *row = (token.to_string(), kind))
                .ok_or_else(|| refused("a token has no row in the embedding").value(token))
        };
        let words = facts.json["model"]["vocab"].as_object();
        for (token, id) in words.into_iter().flatten() {
            let kind = if is_sentencepiece && is_byte(token) {
                TokenType::Byte
            } else if Some(token.as_str()) == unknown {
                TokenType::Unknown
            } else {
                TokenType::Normal
            };
            set(id, token, kind)?;
        }
        for added in facts.json["added_tokens"].as_array().into_iter().flatten() {
            let token = added["content"].as_str().unwrap_or_default();
            let kind = match added["special"] == true {
                true if Some(token) == unknown && is_sentencepiece => TokenType::Unknown,
                true => TokenType::Control,
                false => TokenType::UserDefined,
            };
            set(&added["id"], token, kind)?;
        }
        let (tokens, types) = rows
            .into_iter()
            .map(|(token, kind)| (token, kind as i32))
            .unzip();
        Ok(Self { tokens, types })
    }

    fn id(&self, token: &str) -> Option<u32> {
        let index = self.tokens.iter().position(|known| known == token)?;
        u32::try_from(index).ok()
    }
}

/// `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let hex = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// The two parts of each merge, in order.
fn merge_parts(model: &Json) -> Result<Vec<[&str; 2]>> {
    let merges = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    merges
        .iter()
        .map(|merge| match merge {
            Json::String(text) => text.split_once(' ').map(|(a, b)| [a, b]),
            Json::Array(parts) => Some([parts.first()?.as_str()?, parts.get(1)?.as_str()?]),
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(|| refused("a merge is not a pair"))
}

/// `a b`; a space inside a part would be taken for the separator.
fn merges(model: &Json) -> Result<Vec<String>> {
    let written = |[a, b]: [&str; 2]| {
        if a.contains(' ') || b.contains(' ') {
            return Err(refused("a merge contains a space").value(format!("{a:?}, {b:?}")));
        }
        Ok(format!("{a} {b}"))
    };
    merge_parts(model)?.into_iter().map(written).collect()
}

/// Minus the rank of the first merge that makes the token: llama.cpp merges the pair with the highest score first.
fn scores(model: &Json, tokens: &[String]) -> Result<Vec<f32>> {
    let merges = merge_parts(model)?;
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for (rank, [a, b]) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let score = |token: &String| ranks.get(token).map_or(0.0, |rank| -(*rank as f32));
    Ok(tokens.iter().map(score).collect())
}

/// Whether a space is put before a text; the normaliser, or the splitter of newer files, says so.
fn adds_space_prefix(json: &Json) -> Result<bool> {
    let steps = flatten(&json["normalizer"], "normalizers");
    let replaces = steps
        .iter()
        .any(|step| step["type"] == "Replace" && step["content"] == "▁");
    let splits = flatten(&json["pre_tokenizer"], "pretokenizers");
    match (replaces, splits.as_slice()) {
        (true, []) => Ok(steps.iter().any(|step| step["type"] == "Prepend")),
        (true, [split]) if split["type"] == "Split" && split["pattern"]["String"] == " " => {
            Ok(steps.iter().any(|step| step["type"] == "Prepend"))
        }
        (false, [split]) if split["type"] == "Metaspace" && split["split"] != true => {
            Ok(split["prepend_scheme"] != "never")
        }
        _ => Err(refused("its treatment of spaces is not one of llama.cpp's")
            .value(format!("{} {}", json["normalizer"], json["pre_tokenizer"]))),
    }
}

/// llama.cpp's name of the pattern that splits a text before byte-level BPE.
fn pattern_name(json: &Json) -> Result<&'static str> {
    let steps = |splitter: &Json| -> Vec<String> {
        let steps = flatten(splitter, "pretokenizers");
        steps.iter().map(|step| describe(step)).collect()
    };
    let found = steps(&json["pre_tokenizer"]);
    let ignores_merges = json["model"]["ignore_merges"] == true;
    let is_it = |pattern: &&Pattern| {
        pattern.ignores_merges == ignores_merges && steps(&pattern.pre_tokenizer()) == found
    };
    let pattern = PATTERNS.iter().find(is_it).ok_or_else(|| {
        refused("its pattern is not one that llama.cpp knows by name")
            .value(json["pre_tokenizer"].to_string())
    })?;
    Ok(pattern.names[0])
}

/// A step of a splitter: its pattern, or a name.
fn describe(step: &Json) -> String {
    let kind = step["type"].as_str().unwrap_or_default();
    match kind {
        // Both keep what the pattern matches.
        "Split"
            if step["behavior"] == "Isolated" && step["invert"] != true
                || step["behavior"] == "Removed" && step["invert"] == true =>
        {
            step["pattern"]["Regex"].as_str().unwrap_or("?").to_string()
        }
        "Digits" if step["individual_digits"] == true => "digits".into(),
        "ByteLevel" if step["add_prefix_space"] == true => "bytes after a space".into(),
        "ByteLevel" if step["use_regex"] == false => "bytes".into(),
        "ByteLevel" => "bytes by words".into(),
        other => other.into(),
    }
}

/// The steps of a sequence, or the one step.
fn flatten<'a>(step: &'a Json, list: &str) -> Vec<&'a Json> {
    match step {
        Json::Null => Vec::new(),
        step if step["type"] == "Sequence" => step[list].as_array().map_or(Vec::new(), |steps| {
            steps.iter().flat_map(|step| flatten(step, list)).collect()
        }),
        step => vec![step],
    }
}

fn refused(why: &str) -> Error {
    Error::new(
        Kind::Tokenizer,
        format!("the tokenizer cannot be written as GGUF: {why}"),
    )
    .rule("byte-level BPE with a known pattern, or SentencePiece BPE with byte fallback")
    .hint(CONVERT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(pattern: &str) -> Json {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn sequence(steps: &[Json]) -> Json {
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    #[test]
    fn patterns_have_their_names_in_llama_cpp_or_are_refused() {
        let words = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let (llama3, qwen2) = (split(LLAMA_3), split(QWEN_2));
        let cases = [
            (words.clone(), false, Some("gpt-2")),
            (words.clone(), true, None),
            (
                sequence(&[digits.clone(), words.clone()]),
                false,
                Some("smollm"),
            ),
            (
                sequence(&[llama3.clone(), bytes.clone()]),
                true,
                Some("llama-bpe"),
            ),
            (sequence(&[llama3, bytes.clone()]), false, Some("dbrx")),
            (sequence(&[qwen2, bytes.clone()]), false, Some("qwen2")),
            (
                sequence(&[split(GPT_4O), bytes.clone()]),
                false,
                Some("gpt-4o"),
            ),
            (sequence(&[split(r"\p{N}+"), bytes.clone()]), false, None),
            (bytes, false, None),
            (
                json!({"type": "ByteLevel", "add_prefix_space": true}),
                false,
                None,
            ),
            (json!({"type": "Whitespace"}), false, None),
            (Json::Null, false, None),
        ];
        for (splitter, ignores_merges, name) in cases {
            let json =
                json!({"pre_tokenizer": splitter, "model": {"ignore_merges": ignores_merges}});
            assert_eq!(pattern_name(&json).ok(), name, "{splitter}");
        }
    }

    #[test]
    fn a_sentencepiece_model_is_written_with_scores_types_and_its_space() {
        let json = json!({
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 7, "content": "<tool>", "special": false}],
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "abb": 6},
                "merges": [["a", "b"], "ab b"]},
        });
        let special = BTreeMap::from([("bos_token".to_string(), "<s>".to_string())]);
        let facts = TokenizerFacts {
            json: &json,
            special: &special,
            chat_template: None,
            adds_bos: true,
            adds_eos: false,
            rows: 9,
        };
        let written: BTreeMap<String, Value> = metadata(&facts).unwrap().into_iter().collect();
        let get = |key: &str| written[&format!("tokenizer.ggml.{key}")].clone();
        assert_eq!(
            get("token_type"),
            Value::I32s(vec![2, 3, 6, 1, 1, 1, 1, 4, 5])
        );
        let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0];
        assert_eq!(get("scores"), Value::F32s(scores.to_vec()));
        assert_eq!(get("add_space_prefix"), Value::Bool(true));
        assert_eq!(get("bos_token_id"), Value::U32(1));
        assert!(warning(&json).is_some_and(|text| text.contains("1 of 256")));
        // A row that the embedding lacks.
        let short = TokenizerFacts { rows: 7, ..facts };
        assert!(metadata(&short).is_err_and(|error| error.to_string().contains("<tool>")));
    }
}
