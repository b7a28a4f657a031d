//! The delimiters of an assistant's turn in a chat template, and where they stand in a rendered text.
//!
//! Takes a template and the tokenizer's added tokens, returns generation prompts and end-of-turn tokens as the template writes them.
//! Knows no conversation but the one that it renders to look at.

use std::ops::Range;

use serde_json::{Value, json};

use super::chat::THINK;
use super::sentinel::{CLOSE, OPEN, Sentinel, sentinel, strip};
use super::template::ChatTemplate;

/// A template's delimiters of an assistant's turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TurnDelimiters {
    /// The generation prompt as it stands before turns, the longest form first; none if the template has none.
    pub headers: Vec<String>,
    /// The token that begins both the user's and the assistant's turns, if it is the same.
    pub start: Option<String>,
    /// What ends a turn.
    pub ends: Vec<TurnEnd>,
    /// The added tokens that are no white space.
    added_tokens: Vec<(String, u32)>,
}

/// An end-of-turn token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TurnEnd {
    /// The template's text between the content and the token.
    pub before: String,
    /// The token.
    pub token: String,
    /// Its id.
    pub id: u32,
}

impl TurnDelimiters {
    /// The end of the last generation prompt within `range`; `None` if there is none, or a turn ends after it.
    pub fn turn_start(&self, text: &str, range: Range<usize>) -> Option<usize> {
        let region = &text[range.clone()];
        let at = region.rfind(self.headers.last()?.as_str())?;
        let mut forms = self.headers.iter();
        let header = forms.find(|header| region[at..].starts_with(header.as_str()))?;
        let between = &region[at + header.len()..];
        let is_over = self
            .ends
            .iter()
            .any(|end| between.contains(end.token.as_str()));
        (!is_over).then_some(range.start + at + header.len())
    }

    /// The end of the end-of-turn token that follows within `range`, which is `bounded` where no other message stands in it.
    pub fn turn_end(&self, text: &str, range: Range<usize>, bounded: bool) -> Option<usize> {
        let region = &text[range.clone()];
        let next_turn = self.start.as_ref().map(|start| region.find(start.as_str()));
        if next_turn.is_none() && !bounded {
            // Only what the template always writes after a content is sure to end this turn.
            let rest = region.trim_start();
            let rest = self.ends.iter().find_map(|end| {
                let rest = rest.strip_prefix(end.before.trim_start())?;
                rest.strip_prefix(end.token.as_str())
            });
            return rest.map(|rest| range.end - rest.len());
        }
        let next_turn = next_turn.flatten();
        let region = &region[..next_turn.unwrap_or(region.len())];
        let known = self.ends.iter().filter_map(|end| {
            let at = region.find(end.token.as_str())?;
            Some(at + end.token.len())
        });
        known.min().map(|end| range.start + end).or_else(|| {
            // Some templates end a turn of calls by another token.
            let region = region.trim_end();
            let mut tokens = self.added_tokens.iter();
            let ends_here = tokens.any(|(token, _)| region.ends_with(token.as_str()));
            (next_turn.is_some() && ends_here).then_some(range.start + region.len())
        })
    }
}

/// Renders a conversation of two questions and answers to find the delimiters of the answers.
pub(super) fn detect_turn_delimiters(
    template: &ChatTemplate,
    tools: Option<&Value>,
    added_tokens: &[(String, u32)],
) -> TurnDelimiters {
    let render = |messages: &[Value], prompt: bool| {
        let text = template.render(&json!(messages), tools, prompt, false);
        strip(&text.ok()?)
    };
    let messages = sample_messages();
    let Some((text, sentinels)) = render(&messages, false) else {
        return TurnDelimiters::default();
    };
    let sample = Sample { text, sentinels };
    let added_tokens: Vec<(String, u32)> = added_tokens
        .iter()
        .filter(|(token, _)| !token.trim().is_empty())
        .cloned()
        .collect();
    let question = &messages[..1];
    let prompts = render(question, true).zip(render(question, false));
    let prompt =
        prompts.map(|((with, _), (without, _))| added_text(&with, &without, &added_tokens));
    let prompt = prompt.unwrap_or_default();
    let headers: Vec<String> = headers(&prompt, &added_tokens)
        .into_iter()
        .filter(|header| sample.is_before_an_answer(header))
        .map(str::to_string)
        .collect();
    let between = sample.after_content(1);
    let ends = turn_ends(between, sample.after_content(3), &added_tokens);
    let start = turn_start_token(&headers, between, &ends, &added_tokens);
    TurnDelimiters {
        headers,
        start,
        ends,
        added_tokens,
    }
}

/// Two questions and two answers with sentinels around their contents.
fn sample_messages() -> [Value; 4] {
    let mut index = 0..;
    ["user", "assistant", "user", "assistant"].map(|role| {
        let i = index.next().unwrap_or_default();
        let content = format!("{}x{}", sentinel(OPEN, i), sentinel(CLOSE, i));
        json!({"role": role, "content": content})
    })
}

/// The messages of [`sample_messages`] as the template renders them, sentinels stripped.
struct Sample {
    text: String,
    sentinels: Vec<Sentinel>,
}

impl Sample {
    fn at(&self, kind: char, message: usize) -> Option<usize> {
        let mut found = self.sentinels.iter();
        found
            .find(|s| s.kind == kind && s.message == Some(message))
            .map(|s| s.at)
    }

    /// The text between the content of `message` and the next one, or the end.
    fn after_content(&self, message: usize) -> &str {
        let end = self.at(OPEN, message + 1).unwrap_or(self.text.len());
        let start = self.at(CLOSE, message);
        start
            .and_then(|start| self.text.get(start..end))
            .unwrap_or_default()
    }

    /// Whether `header` stands before the content of an answer.
    fn is_before_an_answer(&self, header: &str) -> bool {
        let starts = [(0, 1), (self.at(CLOSE, 2).unwrap_or(0), 3)];
        starts.into_iter().any(|(from, answer)| {
            let region = self.at(OPEN, answer).and_then(|to| self.text.get(from..to));
            region.is_some_and(|region| region.contains(header))
        })
    }
}

/// The longest token that begins both the generation prompt and the turn after an answer.
fn turn_start_token(
    headers: &[String],
    between: &str,
    ends: &[TurnEnd],
    added_tokens: &[(String, u32)],
) -> Option<String> {
    let header = headers.last().map_or("", String::as_str);
    let begins_a_turn = |token: &&str| {
        let mut rests = ends.iter().filter_map(|end| {
            let rest = between.strip_prefix(end.before.as_str())?;
            rest.strip_prefix(end.token.as_str())
        });
        header.starts_with(*token) && rests.any(|rest| rest.trim_start().starts_with(*token))
    };
    let tokens = added_tokens.iter().map(|(token, _)| token.as_str());
    let start = tokens.filter(begins_a_turn).max_by_key(|token| token.len());
    start.map(str::to_string)
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices()
        .zip(b.chars())
        .find(|((_, x), y)| x != y)
        .map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// What `with` has beyond the beginning that it shares with `without`; a token is not cut in two.
fn added_text(with: &str, without: &str, added_tokens: &[(String, u32)]) -> String {
    let shared = common_prefix(with, without);
    let cut = added_tokens.iter().flat_map(|(token, _)| {
        let places = with.match_indices(token.as_str()).map(|(at, _)| at);
        places
            .filter(|at| *at < shared && shared < at + token.len())
            .collect::<Vec<_>>()
    });
    with[cut.min().unwrap_or(shared)..].to_string()
}

/// The generation prompt, and what it is before each token in it and before reasoning: turns of earlier rounds may end it there.
fn headers<'a>(prompt: &'a str, added_tokens: &[(String, u32)]) -> Vec<&'a str> {
    let tokens = added_tokens.iter().map(|(token, _)| token.as_str());
    let mut cuts: Vec<usize> = tokens
        .chain([THINK])
        .flat_map(|token| prompt.match_indices(token).map(|(at, _)| at))
        .chain([prompt.len()])
        .filter(|at| *at > 0)
        .collect();
    cuts.sort_unstable_by(|a, b| b.cmp(a));
    cuts.dedup();
    cuts.into_iter().map(|at| &prompt[..at]).collect()
}

/// The end-of-turn tokens of text between an answer and the next question, and of text after the last answer: the last token that
/// both begin with, else the tokens that they begin with. A token further on, or between turns alone, may be the next turn's.
fn turn_ends(between: &str, last: &str, added_tokens: &[(String, u32)]) -> Vec<TurnEnd> {
    let all = |gap: &str| {
        let mut found: Vec<(usize, usize, TurnEnd)> = Vec::new();
        for (token, id) in added_tokens {
            for (at, _) in gap.match_indices(token.as_str()) {
                let end = TurnEnd {
                    before: gap[..at].to_string(),
                    token: token.clone(),
                    id: *id,
                };
                found.push((at, at + token.len(), end));
            }
        }
        found.sort_by_key(|(start, end, _)| (*start, std::cmp::Reverse(*end)));
        found
    };
    let shared = &between[..common_prefix(between, last)];
    if let Some((_, _, end)) = all(shared).pop() {
        return vec![end];
    }
    let firsts = [between, last].map(|gap| all(gap).into_iter().next());
    let firsts = firsts.into_iter().flatten().map(|(_, _, end)| end);
    let firsts: Vec<TurnEnd> = firsts.filter(|end| end.before.trim().is_empty()).collect();
    if firsts.len() == 2 {
        firsts
    } else {
        Vec::new()
    }
}
