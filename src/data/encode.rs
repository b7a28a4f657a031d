//! TypedRecord records -> token ids and loss masks.
//!
//! Takes a `TypedRecord` and a `Tokenizer`, returns `Example`s of at most `max_length` tokens. Owns the loss mask, by a token's
//! position in the text, never by its id. Knows nothing of files or order.

use std::ops::Range;

use super::batch::Example;
use super::chat::{self, Chat};
use super::format::{Label, TypedRecord};
use super::tokenizer::{Encoded, Tokenizer};
use crate::error::{Error, Kind, Result};

/// One record encoded.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct EncodedRecord {
    /// One example, several windows of a long text, or none.
    pub examples: Vec<Example>,
    /// Truncated at `max_length`.
    pub truncated: bool,
    /// No loss token is left.
    pub dropped: bool,
    /// Eos or the end-of-turn token is a loss token.
    pub ends: bool,
    /// No space between prompt and completion.
    pub glued: bool,
    /// Rendered by the chat template.
    pub is_chat: bool,
    /// An answer without text.
    pub empty_answer: bool,
    /// Reasoning that the chat template leaves out.
    pub without_reasoning: bool,
}

/// Encodes one record. A record without text is dropped: it would train only the end of text.
pub(super) fn encode(
    typed: &TypedRecord,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<EncodedRecord> {
    let dropped = EncodedRecord {
        dropped: true,
        ..EncodedRecord::default()
    };
    match typed {
        TypedRecord::Text(text) if text.is_empty() => Ok(dropped),
        TypedRecord::Text(text) => {
            let example = text_example(text, tokenizer)?;
            Ok(text_windows(example, tokenizer, max_length))
        }
        TypedRecord::Labelled { text, label } => labelled_text(text, label, tokenizer, max_length),
        TypedRecord::LabelledWords { words, labels } => {
            labelled_words(words, labels, tokenizer, max_length)
        }
        TypedRecord::Completion { prompt, completion } => {
            if prompt.is_empty() && completion.is_empty() {
                return Ok(dropped);
            }
            let outcome = EncodedRecord {
                glued: missing_separator(prompt, completion),
                empty_answer: completion.trim().is_empty(),
                ..EncodedRecord::default()
            };
            let example = completion_example(prompt, completion, tokenizer)?;
            let ends = Vec::from_iter(tokenizer.eos_id());
            Ok(truncate(example, &ends, max_length, outcome))
        }
        TypedRecord::Chat(chat) => encode_chat(chat, tokenizer, max_length),
    }
}

fn encode_chat(chat: &Chat, tokenizer: &Tokenizer, max_length: usize) -> Result<EncodedRecord> {
    let turns = tokenizer.turn_delimiters(chat.tools.as_ref())?;
    let rendered = chat::render(tokenizer.template()?, turns, chat)?;
    let outcome = EncodedRecord {
        is_chat: true,
        empty_answer: rendered.empty_turns > 0,
        without_reasoning: rendered.without_reasoning > 0,
        ..EncodedRecord::default()
    };
    let encoded = tokenizer.encode(&rendered.text, false)?;
    let loss = in_spans(&encoded, &rendered.spans);
    let ends = turns.ends.iter().map(|end| end.id);
    let ends: Vec<u32> = ends.chain(tokenizer.eos_id()).collect();
    let example = masked(encoded.ids, loss);
    Ok(truncate(example, &ends, max_length, outcome))
}

fn masked(tokens: Vec<u32>, mut loss: Vec<bool>) -> Example {
    // The first token has nothing before it to be predicted from.
    if let Some(first) = loss.first_mut() {
        *first = false;
    }
    Example {
        tokens,
        loss,
        labels: Vec::new(),
        values: Vec::new(),
    }
}

/// The tokenizer's special tokens, the text, and eos unless present: every token but the first has a loss.
fn text_example(text: &str, tokenizer: &Tokenizer) -> Result<Example> {
    let mut tokens = tokenizer.encode(text, true)?.ids;
    if let Some(eos) = tokenizer.eos_id().filter(|eos| tokens.last() != Some(eos)) {
        tokens.push(eos);
    }
    let loss = vec![true; tokens.len()];
    Ok(masked(tokens, loss))
}

/// Prompt and completion as one string: a token has a loss if it ends past the prompt, and so has eos.
fn completion_example(prompt: &str, completion: &str, tokenizer: &Tokenizer) -> Result<Example> {
    let encoded = tokenizer.encode(&format!("{prompt}{completion}"), true)?;
    let mut tokens = encoded.ids;
    let mut loss: Vec<bool> = encoded
        .offsets
        .iter()
        .map(|(_, end)| *end > prompt.len())
        .collect();
    if let Some(eos) = tokenizer.eos_id() {
        match loss.last_mut() {
            Some(last) if tokens.last() == Some(&eos) => *last = true,
            _ => {
                tokens.push(eos);
                loss.push(true);
            }
        }
    }
    Ok(masked(tokens, loss))
}

/// A text between the tokenizer's special tokens, its last tokens cut off before the special ones
/// that end it; the first token has the label.
fn labelled_text(
    text: &str,
    label: &Label,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<EncodedRecord> {
    let Encoded {
        ids: mut tokens,
        offsets,
    } = tokenizer.encode(text, true)?;
    let is_special = |offset: &&(usize, usize)| **offset == (0, 0);
    let ending = offsets.iter().rev().take_while(is_special).count();
    let truncated = cut_before_end(&mut tokens, ending, max_length);
    let (class, values) = match label {
        Label::Class(class) => (*class, Vec::new()),
        Label::Values(values) => (0, values.clone()),
    };
    let labels: Vec<_> = (0..tokens.len())
        .map(|i| (i == 0).then_some(class))
        .collect();
    Ok(labelled_tokens(tokens, &labels, values, truncated))
}

/// Words between the tokenizer's special tokens, cut off as in `labelled_text`; the first token of
/// each word has its class.
///
/// # Errors
/// A word without tokens.
fn labelled_words(
    words: &[String],
    classes: &[u32],
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<EncodedRecord> {
    let (mut tokens, mut word_of) = tokenizer.encode_words(words)?;
    if let Some(word) = (0..words.len()).find(|word| !word_of.contains(&Some(*word))) {
        return Err(Error::new(Kind::Data, "a word has no token")
            .value(format!("{:?}, word {}", words[word], word + 1))
            .hint("remove it and its label"));
    }
    let ending = word_of
        .iter()
        .rev()
        .take_while(|word| word.is_none())
        .count();
    let truncated = cut_before_end(&mut tokens, ending, max_length);
    cut_before_end(&mut word_of, ending, max_length);
    let label = |i: usize| {
        let word = word_of[i]?;
        let begins = i == 0 || word_of[i - 1] != Some(word);
        begins.then(|| classes[word])
    };
    let labels: Vec<_> = (0..tokens.len()).map(label).collect();
    Ok(labelled_tokens(tokens, &labels, Vec::new(), truncated))
}

/// Cuts `items` to `max_length`, before the last `ending` of them; returns whether it was longer.
fn cut_before_end<T>(items: &mut Vec<T>, ending: usize, max_length: usize) -> bool {
    let truncated = items.len() > max_length;
    if truncated {
        let end = items.len() - ending;
        items.drain(max_length.saturating_sub(ending).min(end)..end);
    }
    truncated
}

/// Tokens of which those with a label are loss tokens.
fn labelled_tokens(
    tokens: Vec<u32>,
    labels: &[Option<u32>],
    values: Vec<f32>,
    truncated: bool,
) -> EncodedRecord {
    let example = Example {
        tokens,
        loss: labels.iter().map(Option::is_some).collect(),
        labels: labels.iter().flatten().copied().collect(),
        values,
    };
    let dropped = example.labels.is_empty();
    EncodedRecord {
        examples: if dropped { vec![] } else { vec![example] },
        truncated,
        dropped,
        ..EncodedRecord::default()
    }
}

fn missing_separator(prompt: &str, completion: &str) -> bool {
    let is_text = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
    is_text(prompt.chars().next_back()) && is_text(completion.chars().next())
}

/// Whether each token overlaps a span. Tokenizers trim spaces from offsets: a token begins at its predecessor's end.
fn in_spans(encoded: &Encoded, spans: &[Range<usize>]) -> Vec<bool> {
    let mut previous_end = 0;
    let mut at = 0;
    encoded
        .offsets
        .iter()
        .map(|(start, end)| {
            let start = previous_end.min(*start);
            previous_end = *end;
            while spans.get(at).is_some_and(|span| span.end <= start) {
                at += 1;
            }
            spans
                .get(at)
                .is_some_and(|span| *end > span.start && start < span.end)
        })
        .collect()
}

/// Truncates a long record.
fn truncate(
    mut example: Example,
    ends: &[u32],
    max_length: usize,
    outcome: EncodedRecord,
) -> EncodedRecord {
    let truncated = example.tokens.len() > max_length;
    example.tokens.truncate(max_length);
    example.loss.truncate(max_length);
    let dropped = !example.loss.contains(&true);
    let ends = trains_token(&example, ends);
    EncodedRecord {
        examples: if dropped { vec![] } else { vec![example] },
        truncated,
        dropped,
        ends,
        ..outcome
    }
}

fn trains_token(example: &Example, ends: &[u32]) -> bool {
    example
        .tokens
        .iter()
        .zip(&example.loss)
        .any(|(token, loss)| *loss && ends.contains(token))
}

/// Splits a long text into windows that share one token, so that every token but the first has a loss exactly once.
fn text_windows(example: Example, tokenizer: &Tokenizer, max_length: usize) -> EncodedRecord {
    let ends = trains_token(&example, &Vec::from_iter(tokenizer.eos_id()));
    let stride = max_length.saturating_sub(1).max(1);
    let windows = example.tokens.len().saturating_sub(1).div_ceil(stride);
    let examples: Vec<Example> = (0..windows)
        .map(|w| {
            let tokens = example.tokens
                [w * stride..(w * stride + stride + 1).min(example.tokens.len())]
                .to_vec();
            let loss = vec![true; tokens.len()];
            masked(tokens, loss)
        })
        .collect();
    EncodedRecord {
        dropped: examples.is_empty(),
        examples,
        ends,
        ..EncodedRecord::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::tests::word_tokenizer;
    use proptest::prelude::*;

    const WORDS: [&str; 9] = ["<unk>", "<eos>", "a", " b", " c", "\n", "<u>", "<m>", "d"];
    const TEMPLATE: &str = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<m>' }}{{ m.content + '<eos>\\n' }}{% endfor %}";

    fn tokenizer() -> Tokenizer {
        word_tokenizer(&WORDS, "<eos>", Some(TEMPLATE))
    }

    fn completion(prompt: &str, completion: &str, max_length: usize) -> EncodedRecord {
        encode(
            &TypedRecord::Completion {
                prompt: prompt.into(),
                completion: completion.into(),
            },
            &tokenizer(),
            max_length,
        )
        .unwrap()
    }

    fn one(outcome: &EncodedRecord) -> (Vec<u32>, String) {
        let [example] = outcome.examples.as_slice() else {
            panic!("one example: {outcome:?}")
        };
        (
            example.tokens.clone(),
            example
                .loss
                .iter()
                .map(|l| if *l { '1' } else { '0' })
                .collect(),
        )
    }

    #[test]
    fn a_completion_and_eos_have_a_loss() {
        let outcome = completion("a b", " c", 9);
        assert_eq!(one(&outcome), (vec![2, 3, 4, 1], "0011".into()));
        assert!(outcome.ends && !outcome.truncated && !outcome.glued);
        // " b" straddles the prompt's end: it ends past it, so it has a loss.
        assert_eq!(
            one(&completion("a ", "b", 9)),
            (vec![2, 3, 1], "011".into())
        );
        assert_eq!(
            one(&completion("a", " b<eos>", 9)),
            (vec![2, 3, 1], "011".into())
        );
        assert_eq!(
            one(&completion("", "a b", 9)),
            (vec![2, 3, 1], "011".into())
        );
        assert!(completion("a", "d", 9).glued);
    }

    #[test]
    fn a_long_record_is_truncated_and_may_be_dropped() {
        let outcome = completion("a b", " c", 3);
        assert_eq!(one(&outcome), (vec![2, 3, 4], "001".into()));
        assert!(outcome.truncated && !outcome.ends);
        let outcome = completion("a b", " c", 2);
        assert!(outcome.truncated && outcome.dropped && outcome.examples.is_empty());
    }

    #[test]
    fn the_assistants_turn_and_its_end_have_a_loss() {
        let message =
            |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let messages = vec![
            message("user", "a<eos>"),
            message("assistant", "a b"),
            message("user", "d"),
            message("assistant", ""),
        ];
        let chat = chat::Chat {
            loss_mask: chat::assistant_mask(&messages),
            messages,
            tools: None,
        };
        let outcome = encode(&TypedRecord::Chat(chat), &tokenizer(), 99).unwrap();
        let tokens = vec![6, 2, 1, 1, 5, 7, 2, 3, 1, 5, 6, 8, 1, 5, 7, 1, 5];
        assert_eq!(one(&outcome), (tokens, "00000011100000010".into()));
        assert!(outcome.ends);
    }

    #[test]
    fn offsets_that_tokenizers_trim_or_share_are_covered() {
        // "x" | "\n" trimmed to an empty range | three byte tokens of one emoji; the span is "\n😀" = 1..6.
        let encoded = Encoded {
            ids: vec![0; 6],
            offsets: vec![(0, 1), (2, 2), (2, 6), (2, 6), (2, 6), (6, 7)],
        };
        assert_eq!(
            in_spans(&encoded, std::slice::from_ref(&(1..6))),
            [false, true, true, true, true, false]
        );
        // A trimmed token at a span's end still lies in it.
        assert_eq!(
            in_spans(&encoded, std::slice::from_ref(&(0..2))),
            [true, true, false, false, false, false]
        );
        assert_eq!(
            in_spans(&encoded, &[0..1, 6..7]),
            [true, false, false, false, false, true]
        );
    }

    #[test]
    fn an_empty_text_is_dropped() {
        let outcome = encode(&TypedRecord::Text(String::new()), &tokenizer(), 4).unwrap();
        assert!(outcome.dropped && outcome.examples.is_empty());
    }

    proptest! {
        #[test]
        fn windows_cover_a_text_once(words in 1_usize..40, max_length in 2_usize..9) {
            let text = "a".to_string() + &" b".repeat(words - 1);
            let whole: Vec<u32> = std::iter::once(2).chain(std::iter::repeat_n(3, words - 1)).chain([1]).collect();
            let outcome = encode(&TypedRecord::Text(text), &tokenizer(), max_length).unwrap();
            let mut joined = vec![whole[0]];
            for example in &outcome.examples {
                prop_assert!(example.tokens.len() <= max_length && example.tokens.len() >= 2);
                prop_assert_eq!(example.tokens[0], *joined.last().unwrap());
                prop_assert!(!example.loss[0] && example.loss[1..].iter().all(|l| *l));
                joined.extend_from_slice(&example.tokens[1..]);
            }
            prop_assert_eq!(joined, whole);
        }
    }
}
