//! Loss spans of a conversation: the characters that the assistant produced.
//!
//! Takes a chat template and a `Chat`, returns the rendered text and the byte ranges with a loss. Content is wrapped in private-use
//! sentinels, rendered, located and stripped; if a sentinel is lost or the stripped text differs from the plain rendering, the
//! conversation is refused, never guessed. Knows no token id except the end-of-turn token's.

use std::ops::Range;

use serde_json::{Value, json};

use super::template::ChatTemplate;
use crate::error::{Error, Kind, Result};

// Sentinels are in the last private-use plane, which common scripts, emoji and icon fonts do not use.
const OPEN: char = '\u{10FE00}';
const CLOSE: char = '\u{10FE01}';
const CALL: char = '\u{10FE02}';
/// Ends every sentinel, after its kind and the message's index in digits from `ZERO`.
const END: char = '\u{10FE03}';
const ZERO: u32 = 0x10FE10;
/// Where a `{% generation %}` block begins.
pub(super) const GENERATION_OPEN: &str = "\u{10FE00}\u{10FE03}";
/// Where it ends.
pub(super) const GENERATION_CLOSE: &str = "\u{10FE01}\u{10FE03}";

/// A conversation ready for a template.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chat {
    /// `{role, content, tool_calls, ...}`, content as text.
    pub messages: Vec<Value>,
    /// Functions the assistant may call.
    pub tools: Option<Value>,
    /// Whether each message has a loss.
    pub loss_mask: Vec<bool>,
}

/// A template's delimiters of an assistant's turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TurnDelimiters {
    /// The generation prompt before the turn, if the template has one.
    pub header: Option<String>,
    /// The end-of-turn token and its id, if one follows the content.
    pub end: Option<(String, u32)>,
}

/// A conversation's text and its loss spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rendered {
    /// Equal to transformers' `apply_chat_template`.
    pub text: String,
    /// Byte ranges, ascending.
    pub spans: Vec<Range<usize>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sentinel {
    kind: char,
    /// The message it belongs to; none for a `{% generation %}` block.
    message: Option<usize>,
    /// Byte offset in the stripped text.
    at: usize,
}

fn sentinel(kind: char, message: usize) -> String {
    let number = message.to_string();
    let digits = number
        .bytes()
        .map(|d| char::from_u32(ZERO + u32::from(d - b'0')).expect("a private-use character"));
    [kind].into_iter().chain(digits).chain([END]).collect()
}

fn is_sentinel(c: char) -> bool {
    ('\u{10FE00}'..='\u{10FE1F}').contains(&c)
}

/// Removes the sentinels from `text`; `None` if one is malformed.
fn strip(text: &str) -> Option<(String, Vec<Sentinel>)> {
    let (mut plain, mut sentinels) = (String::with_capacity(text.len()), Vec::new());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if !is_sentinel(c) {
            plain.push(c);
            continue;
        }
        if !matches!(c, OPEN | CLOSE | CALL) {
            return None;
        }
        let mut message = None;
        loop {
            match chars.next()? {
                END => break,
                d if (ZERO..ZERO + 10).contains(&(d as u32)) => {
                    message = Some(
                        message.unwrap_or(0_usize).checked_mul(10)? + (d as u32 - ZERO) as usize,
                    );
                }
                _ => return None,
            }
        }
        sentinels.push(Sentinel {
            kind: c,
            message,
            at: plain.len(),
        });
    }
    Some((plain, sentinels))
}

/// Renders a conversation of one question and one answer to find the delimiters of the answer.
pub(super) fn detect_turn_delimiters(
    template: &ChatTemplate,
    added_tokens: &[(String, u32)],
) -> TurnDelimiters {
    let user = json!({"role": "user", "content": "x"});
    let answer = json!({"role": "assistant", "content": format!("{}y{}", sentinel(OPEN, 1), sentinel(CLOSE, 1))});
    let render =
        |messages: Value, prompt: bool| template.render(&messages, None, prompt, false).ok();
    let Some((text, sentinels)) =
        render(json!([user, answer]), false).and_then(|text| strip(&text))
    else {
        return TurnDelimiters::default();
    };
    let header = render(json!([user]), true)
        .zip(render(json!([user]), false))
        .and_then(|(with, without)| {
            let header = &with[common_prefix(&with, &without)..];
            (text.starts_with(&with) && !header.is_empty()).then(|| header.to_string())
        });
    let end = sentinels
        .iter()
        .find(|m| m.kind == CLOSE)
        .and_then(|close| {
            let rest = text[close.at..].trim_start();
            added_tokens
                .iter()
                .filter(|(token, _)| !token.is_empty() && rest.starts_with(token.as_str()))
                .max_by_key(|(token, _)| token.len())
        });
    TurnDelimiters {
        header,
        end: end.cloned(),
    }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices()
        .zip(b.chars())
        .find(|((_, x), y)| x != y)
        .map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// Renders `chat` and locates its loss spans.
pub(super) fn render(
    template: &ChatTemplate,
    turns: &TurnDelimiters,
    chat: &Chat,
) -> Result<Rendered> {
    let messages = Value::Array(chat.messages.clone());
    let text = template.render(&messages, chat.tools.as_ref(), false, false)?;
    if text.contains(is_sentinel) {
        return Err(bad_record(
            "the conversation holds characters from U+10FE00 to U+10FE1F, which are reserved here",
        )
        .hint("remove them from the record"));
    }
    let by_tags =
        template.has_generation_tags() && chat.loss_mask == assistant_mask(&chat.messages);
    let marked = match by_tags {
        true => template.render(&messages, chat.tools.as_ref(), false, true)?,
        false => template.render(
            &Value::Array(with_sentinels(chat)),
            chat.tools.as_ref(),
            false,
            false,
        )?,
    };
    let (stripped, sentinels) = strip(&marked).ok_or_else(unlocatable)?;
    if stripped != text {
        return Err(unlocatable());
    }
    let spans = if by_tags {
        tagged_spans(&sentinels)?
    } else {
        sentinel_spans(chat, turns, &text, &sentinels)?
    };
    Ok(Rendered { text, spans })
}

/// The default loss mask: the assistant's messages.
pub(super) fn assistant_mask(messages: &[Value]) -> Vec<bool> {
    messages
        .iter()
        .map(|m| m.get("role").and_then(Value::as_str) == Some("assistant"))
        .collect()
}

fn bad_record(what: &str) -> Error {
    Error::new(Kind::Data, what)
}

fn unlocatable() -> Error {
    bad_record("the chat template changes the assistant's content, so what to learn of it cannot be located")
        .rule("the template prints each learned message's content once, unchanged but for spaces at its ends")
        .hint("put `{% generation %}` tags into the model's chat_template.jinja around the assistant's part, or set `on_bad_record = \"skip\"`")
}

/// The messages with sentinels around the contents with a loss (inside spaces at their ends, which templates trim) and before the
/// names of called functions.
fn with_sentinels(chat: &Chat) -> Vec<Value> {
    let mut messages = chat.messages.clone();
    let masked = messages.iter_mut().zip(&chat.loss_mask).enumerate();
    for (i, (message, _)) in masked.filter(|(_, (_, has_loss))| **has_loss) {
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        let called = calls.is_some();
        for call in calls.into_iter().flatten() {
            let function = if call.get("function").is_some() {
                &mut call["function"]
            } else {
                call
            };
            if let Some(Value::String(name)) = function.get_mut("name") {
                name.insert_str(0, &sentinel(CALL, i));
            }
        }
        if let Some(Value::String(content)) = message.get_mut("content") {
            let core = content.trim();
            if called && core.is_empty() {
                continue;
            }
            let start = content.len() - content.trim_start().len();
            let (before, after) = (&content[..start], &content[start + core.len()..]);
            *content = format!(
                "{before}{}{core}{}{after}",
                sentinel(OPEN, i),
                sentinel(CLOSE, i)
            );
        }
    }
    messages
}

/// The `{% generation %}` blocks.
fn tagged_spans(sentinels: &[Sentinel]) -> Result<Vec<Range<usize>>> {
    let mut spans = Vec::new();
    for pair in sentinels.chunks(2) {
        match pair {
            [open, close] if open.kind == OPEN && close.kind == CLOSE => {
                spans.push(open.at..close.at)
            }
            _ => return Err(unlocatable()),
        }
    }
    Ok(spans)
}

fn sentinel_spans(
    chat: &Chat,
    turns: &TurnDelimiters,
    text: &str,
    sentinels: &[Sentinel],
) -> Result<Vec<Range<usize>>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for i in (0..chat.messages.len()).filter(|i| chat.loss_mask[*i]) {
        let [open, close, calls] = [OPEN, CLOSE, CALL].map(|kind| {
            let matching = sentinels
                .iter()
                .filter(|s| s.kind == kind && s.message == Some(i));
            matching.map(|s| s.at).collect::<Vec<_>>()
        });
        let span = match (open.as_slice(), close.as_slice(), calls.as_slice()) {
            ([start], [end], []) => *start..after_turn_end(text, *end, turns),
            // The template split the content (reasoning in <think> tags): the turn still ends where the content does.
            ([], [end], []) => turn_start(text, *end, turns)?..after_turn_end(text, *end, turns),
            ([] | [_], [] | [_], [first, .., last] | [first @ last]) => {
                let first = open.iter().chain(&close).fold(*first, |a, b| a.min(*b));
                turn_start(text, first, turns)?..next_turn_end(text, *last, turns)?
            }
            _ => return Err(unlocatable()),
        };
        if spans
            .last()
            .is_some_and(|previous| previous.end > span.start)
        {
            return Err(unlocatable());
        }
        spans.push(span);
    }
    Ok(spans)
}

/// The end of the end-of-turn token if only spaces precede it, else `at`.
fn after_turn_end(text: &str, at: usize, turns: &TurnDelimiters) -> usize {
    let rest = text[at..].trim_start();
    match &turns.end {
        Some((token, _)) if rest.starts_with(token.as_str()) => {
            text.len() - rest.len() + token.len()
        }
        _ => at,
    }
}

/// The end of the next end-of-turn token: after tool calls the template's text comes in between.
fn next_turn_end(text: &str, at: usize, turns: &TurnDelimiters) -> Result<usize> {
    let (token, _) = turns.end.as_ref().ok_or_else(no_turn_delimiters)?;
    Ok(at
        + text[at..]
            .find(token.as_str())
            .ok_or_else(no_turn_delimiters)?
        + token.len())
}

/// The end of the turn's header; no other turn may end in between.
fn turn_start(text: &str, at: usize, turns: &TurnDelimiters) -> Result<usize> {
    let header = turns.header.as_ref().ok_or_else(no_turn_delimiters)?;
    let start = text[..at]
        .rfind(header.as_str())
        .ok_or_else(no_turn_delimiters)?
        + header.len();
    match &turns.end {
        Some((token, _)) if text[start..at].contains(token.as_str()) => Err(no_turn_delimiters()),
        _ => Ok(start),
    }
}

fn no_turn_delimiters() -> Error {
    bad_record("the chat template does not show where an assistant's turn with tool calls or reasoning begins and ends")
        .rule("a generation prompt before it and a token of its own after it")
        .hint("put `{% generation %}` tags into the model's chat_template.jinja around the assistant's part, or set `on_bad_record = \"skip\"`")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content | trim }}{% for c in m.tool_calls %}\
        {{ '(' + c.function.name + c.function.arguments | tojson + ')' }}{% endfor %}{{ '<e>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}";

    fn compiled(source: &str) -> (ChatTemplate, TurnDelimiters) {
        let template = ChatTemplate::new(source, None, vec![]).unwrap();
        let turns = detect_turn_delimiters(&template, &[("<s>".into(), 1), ("<e>".into(), 2)]);
        (template, turns)
    }

    fn learned(source: &str, messages: Value, weights: Option<Vec<bool>>) -> Result<Vec<String>> {
        let (template, turns) = compiled(source);
        let messages = messages.as_array().unwrap().clone();
        let learned = weights.unwrap_or_else(|| assistant_mask(&messages));
        let out = render(
            &template,
            &turns,
            &Chat {
                messages,
                tools: None,
                loss_mask: learned,
            },
        )?;
        Ok(out
            .spans
            .iter()
            .map(|s| out.text[s.clone()].to_string())
            .collect())
    }

    #[test]
    fn content_and_the_token_that_ends_the_turn_are_learned() {
        assert_eq!(
            compiled(CHATML).1,
            TurnDelimiters {
                header: Some("<s>assistant\n".into()),
                end: Some(("<e>".into(), 2))
            }
        );
        let chat = json!([{"role": "user", "content": "q<e>"}, {"role": "assistant", "content": " a1 "},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a2"}]);
        assert_eq!(
            learned(CHATML, chat.clone(), None).unwrap(),
            ["a1<e>", "a2<e>"]
        );
        assert_eq!(
            learned(CHATML, chat, Some(vec![true, false, false, true])).unwrap(),
            ["q<e><e>", "a2<e>"]
        );
    }

    #[test]
    fn a_turn_of_tool_calls_is_learned_whole() {
        let chat = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {}}}]},
            {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(
            learned(CHATML, chat, None).unwrap(),
            ["(f{\"x\": 1})(g{})<e>", "a<e>"]
        );
    }

    #[test]
    fn generation_tags_say_it_themselves() {
        let source = "{% for m in messages %}\n    {%- if m.role == 'assistant' %}\nA: {% generation %}\n{{ m.content }}!{% endgeneration %}\n\
            {% else %}\nU: {{ m.content }}\n{% endif %}{% endfor %}";
        let chat = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(learned(source, chat, None).unwrap(), ["a!"]);
    }

    #[test]
    fn what_cannot_be_located_is_refused() {
        let chat =
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]);
        for source in [
            "{{ messages[1].content | upper }}x{{ messages[1].content }}",
            "{{ messages[1].content[:2] }}",
            "{{ messages[1].content|length }}",
            "{{ messages[1].content|length }}{{ messages[1].content }}",
            "nothing",
        ] {
            assert_eq!(
                learned(source, chat.clone(), None).unwrap_err().kind(),
                Kind::Data,
                "{source}"
            );
        }
        let reserved = json!([{"role": "assistant", "content": "\u{10FE00}"}]);
        assert!(
            learned(CHATML, reserved, None)
                .unwrap_err()
                .to_string()
                .contains("U+10FE00")
        );
    }

    #[test]
    fn reasoning_that_the_template_takes_apart_is_learned_with_its_turn() {
        let source = "{% for m in messages %}{{ '<s>' + m.role + '\\n' }}{% if '</t>' in m.content %}{{ '<t>' + \
            m.content.split('</t>')[0].split('<t>')[-1] + '</t>' + m.content.split('</t>')[-1] }}{% else %}{{ m.content }}{% endif %}\
            {{ '<e>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}";
        let chat = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "<t>why</t>a"}]);
        assert_eq!(learned(source, chat, None).unwrap(), ["<t>why</t>a<e>"]);
    }
}
