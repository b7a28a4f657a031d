//! The delimiters of an assistant's turn in a chat template, and where they stand in a rendered text.
//!
//! Takes a template and the tokenizer's added tokens, returns generation prompts and end-of-turn tokens as the template writes them.
//! Knows no conversation but the one that it renders to look at.

use std::ops::Range;

use serde_json::{Value, json};

use super::chat::THINK;
use super::sentinel::{CLOSE, OPEN, sentinel, strip};
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
    let marked = |role: &str, i: usize| {
        let content = format!("{}x{}", sentinel(OPEN, i), sentinel(CLOSE, i));
        json!({"role": role, "content": content})
    };
    let render = |messages: &[Value], prompt: bool| {
        template.render(&json!(messages), tools, prompt, false).ok()
    };
    let roles = ["user", "assistant", "user", "assistant"];
    let messages: Vec<Value> = roles
        .iter()
        .zip(0..)
        .map(|(role, i)| marked(role, i))
        .collect();
    let added_tokens: Vec<(String, u32)> = added_tokens
        .iter()
        .filter(|(token, _)| !token.trim().is_empty())
        .cloned()
        .collect();
    let rendered = render(&messages, false).and_then(|text| strip(&text));
    let Some((text, sentinels)) = rendered else {
        return TurnDelimiters::default();
    };
    let at = |kind: char, message: usize| {
        let mut found = sentinels
            .iter()
            .filter(|s| s.kind == kind && s.message == Some(message));
        found.next().map(|s| s.at)
    };
    let prompts = render(&messages[..1], true).zip(render(&messages[..1], false));
    let prompts = prompts.and_then(|(with, without)| Some((strip(&with)?.0, strip(&without)?.0)));
    let prompt = prompts.map(|(with, without)| added_text(&with, &without, &added_tokens));
    let headers = prompt.map_or(Vec::new(), |prompt| {
        let before = [(0, at(OPEN, 1)), (at(CLOSE, 2).unwrap_or(0), at(OPEN, 3))];
        let is_used = |header: &&str| {
            let mut regions = before
                .iter()
                .filter_map(|(from, to)| text.get(*from..(*to)?));
            regions.any(|region| region.contains(header))
        };
        let forms = headers(&prompt, &added_tokens);
        forms
            .into_iter()
            .filter(is_used)
            .map(str::to_string)
            .collect()
    });
    let gap = |from: usize, to: Option<usize>| {
        let from = at(CLOSE, from)?;
        text.get(from..to.unwrap_or(text.len()))
    };
    let between = gap(1, at(OPEN, 2)).unwrap_or_default();
    let ends = turn_ends(between, gap(3, None).unwrap_or_default(), &added_tokens);
    let begins_a_turn = |token: &&str| {
        let mut rests = ends.iter().filter_map(|end| {
            let rest = between.strip_prefix(end.before.as_str())?;
            rest.strip_prefix(end.token.as_str())
        });
        let header = headers.last().map_or("", String::as_str);
        header.starts_with(*token) && rests.any(|rest| rest.trim_start().starts_with(*token))
    };
    let tokens = added_tokens.iter().map(|(token, _)| token.as_str());
    let start = tokens.filter(begins_a_turn).max_by_key(|token| token.len());
    let start = start.map(str::to_string);
    TurnDelimiters {
        headers,
        start,
        ends,
        added_tokens,
    }
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
