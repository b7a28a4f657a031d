//! Loss spans of a conversation: the characters that the assistant produced.
//!
//! Takes a chat template and a `Chat`, returns the rendered text and the byte ranges with a loss: from the end of the generation
//! prompt to the end-of-turn token. Contents, reasoning and calls are marked with private-use sentinels, rendered, located and
//! stripped; if one is lost or the stripped text differs from the plain rendering, the conversation is refused, never guessed. Knows
//! no token id except the end-of-turn tokens'.

use std::ops::Range;

use serde_json::Value;

use super::sentinel::{CALL, CLOSE, OPEN, REASONING, Sentinel, is_sentinel, sentinel, strip};
use super::template::ChatTemplate;
use super::turns::TurnDelimiters;
use crate::error::{Error, Kind, Result};

/// Fields of an assistant's reasoning (transformers, `_REASONING_FIELDS`).
pub(super) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Delimiters of reasoning within the content.
pub(super) const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

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

/// A conversation's text and its loss spans.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rendered {
    /// Equal to transformers' `apply_chat_template`.
    pub text: String,
    /// Byte ranges, ascending.
    pub spans: Vec<Range<usize>>,
    /// Turns with a loss and nothing in them.
    pub empty_turns: u64,
    /// Turns with a loss whose reasoning the template leaves out.
    pub without_reasoning: u64,
}

/// Where one message's sentinels stand in the stripped text.
#[derive(Debug, Clone, Default)]
struct Marks {
    opens: Vec<usize>,
    closes: Vec<usize>,
    calls: Vec<usize>,
    reasoning: Vec<usize>,
}

impl Marks {
    fn all(&self) -> impl Iterator<Item = usize> {
        let kinds = [&self.opens, &self.closes, &self.calls, &self.reasoning];
        kinds.into_iter().flatten().copied()
    }
}

/// Renders `chat` and locates its loss spans.
pub(super) fn render(
    template: &ChatTemplate,
    turns: &TurnDelimiters,
    chat: &Chat,
) -> Result<Rendered> {
    let messages = Value::Array(chat.messages.clone());
    let tools = chat.tools.as_ref();
    let text = template.render(&messages, tools, false, false)?;
    if text.contains(is_sentinel) {
        return Err(bad_record(
            "the conversation holds characters from U+10FE00 to U+10FE1F, which are reserved here",
        )
        .hint("remove them from the record"));
    }
    let by_tags =
        template.has_generation_tags(tools) && chat.loss_mask == assistant_mask(&chat.messages);
    let empty = learned(chat).filter(|i| is_empty(&chat.messages[*i]));
    let mut out = Rendered {
        empty_turns: empty.count() as u64,
        ..Rendered::default()
    };
    match locate(template, chat, &text, by_tags) {
        Some(sentinels) => {
            let marks = marks_of(chat.messages.len(), &sentinels);
            for i in learned(chat) {
                out.without_reasoning += u64::from(!check_complete(&chat.messages[i], &marks[i])?);
            }
            out.spans = if by_tags {
                let spans = tagged_spans(&sentinels)?;
                check_tagged(chat, &marks, &spans)?;
                spans
            } else {
                turn_spans(chat, turns, &text, &marks)?
            };
        }
        None if by_tags => out.spans = spans_of_tags_alone(template, chat, &messages)?,
        None => return Err(unlocatable()),
    }
    out.text = text;
    Ok(out)
}

/// The `{% generation %}` blocks of a template that changes contents, at least one for each learned message.
fn spans_of_tags_alone(
    template: &ChatTemplate,
    chat: &Chat,
    messages: &Value,
) -> Result<Vec<Range<usize>>> {
    let tagged = template.render(messages, chat.tools.as_ref(), false, true)?;
    let (_, sentinels) = strip(&tagged).ok_or_else(unlocatable)?;
    let spans = tagged_spans(&sentinels)?;
    let is_complete = spans.len() >= learned(chat).count();
    is_complete.then_some(spans).ok_or_else(unlocatable)
}

/// The sentinels of `chat` in its rendered `text`; `None` where the template changes a marked content.
fn locate(
    template: &ChatTemplate,
    chat: &Chat,
    text: &str,
    by_tags: bool,
) -> Option<Vec<Sentinel>> {
    let locate = |with_bounds: bool| {
        let marked = Value::Array(with_sentinels(chat, with_bounds));
        let marked = template.render(&marked, chat.tools.as_ref(), false, by_tags);
        let (stripped, sentinels) = strip(&marked.ok()?)?;
        (stripped == text).then_some(sentinels)
    };
    let has_calls = learned(chat).any(|i| calls_of(&chat.messages[i]) > 0);
    locate(has_calls).or_else(|| locate(false).filter(|_| has_calls))
}

/// The default loss mask: the assistant's messages.
pub(super) fn assistant_mask(messages: &[Value]) -> Vec<bool> {
    messages.iter().map(is_assistant).collect()
}

fn is_assistant(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

/// The messages with a loss.
fn learned(chat: &Chat) -> impl Iterator<Item = usize> {
    (0..chat.messages.len()).filter(|i| chat.loss_mask[*i])
}

fn text_of<'a>(message: &'a Value, field: &str) -> &'a str {
    message
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .trim()
}

fn calls_of(message: &Value) -> usize {
    let calls = message.get("tool_calls").and_then(Value::as_array);
    calls.map_or(0, Vec::len)
}

/// Without text, reasoning and calls.
fn is_empty(message: &Value) -> bool {
    let mut fields = REASONING_FIELDS.iter().chain([&"content"]);
    let has_text = fields.any(|field| !text_of(message, field).is_empty());
    !has_text && calls_of(message) == 0
}

fn bad_record(what: &str) -> Error {
    Error::new(Kind::Data, what)
}

fn unlocatable() -> Error {
    bad_record("the chat template changes the assistant's content, so what to learn of it cannot be located")
        .rule("the template prints each learned message's content once, unchanged but for spaces at its ends")
        .hint("put `{% generation %}` tags into the model's chat_template.jinja around the assistant's part, or set `on_bad_record = \"skip\"`")
}

/// The messages with sentinels around the contents with a loss (inside spaces at their ends, which templates trim), before the
/// names of called functions, and within reasoning; `with_bounds`: also before the content that follows calls.
fn with_sentinels(chat: &Chat, with_bounds: bool) -> Vec<Value> {
    let mut messages = chat.messages.clone();
    for i in learned(chat) {
        let message = &mut messages[i];
        let calls = calls_of(message);
        for call in 0..calls {
            let call = &mut message["tool_calls"][call];
            let function = match call.get("function").is_some() {
                true => &mut call["function"],
                false => call,
            };
            if let Some(Value::String(name)) = function.get_mut("name") {
                name.insert_str(0, &sentinel(CALL, i));
            }
        }
        for field in REASONING_FIELDS {
            if let Some(Value::String(text)) = message.get_mut(field) {
                insert_reasoning(text, 0, i);
            }
        }
        if let Some(Value::String(content)) = message.get_mut("content")
            && (calls == 0 || !content.trim().is_empty())
        {
            let start = content.len() - content.trim_start().len();
            let end = start + content.trim().len();
            content.insert_str(end, &sentinel(CLOSE, i));
            if let Some(from) = reasoning_in(content) {
                insert_reasoning(content, from, i);
            }
            content.insert_str(start, &sentinel(OPEN, i));
        }
        let is_bound = with_bounds && calls > 0 && chat.loss_mask.get(i + 1) == Some(&false);
        if is_bound && let Some(Value::String(content)) = messages[i + 1].get_mut("content") {
            let start = content.len() - content.trim_start().len();
            content.insert_str(start, &sentinel(OPEN, i + 1));
        }
    }
    messages
}

/// Where a content's reasoning begins.
fn reasoning_in(content: &str) -> Option<usize> {
    let from = content.find(THINK)? + THINK.len();
    let length = content[from..].find(THINK_END)?;
    let is_blank = content[from..from + length].trim().is_empty();
    (!is_blank).then_some(from)
}

/// Marks the reasoning that begins at `from`, if there is any.
fn insert_reasoning(text: &mut String, from: usize, message: usize) {
    let rest = text[from..].trim_start();
    if !rest.is_empty() {
        let at = text.len() - rest.len();
        text.insert_str(at, &sentinel(REASONING, message));
    }
}

fn marks_of(messages: usize, sentinels: &[Sentinel]) -> Vec<Marks> {
    let mut marks = vec![Marks::default(); messages];
    for sentinel in sentinels {
        let Some(marks) = sentinel.message.and_then(|i| marks.get_mut(i)) else {
            continue;
        };
        match sentinel.kind {
            OPEN => marks.opens.push(sentinel.at),
            CLOSE => marks.closes.push(sentinel.at),
            CALL => marks.calls.push(sentinel.at),
            _ => marks.reasoning.push(sentinel.at),
        }
    }
    marks
}

/// Refuses a message whose content or calls the template leaves out; whether its reasoning is printed, if it has any.
fn check_complete(message: &Value, marks: &Marks) -> Result<bool> {
    if marks.calls.len() < calls_of(message) {
        return Err(bad_record("the chat template leaves out the assistant's tool calls")
            .value(message.to_string().chars().take(120).collect::<String>())
            .rule("everything that the assistant said is learned as the template writes it")
            .hint("train a model whose chat template has tools, or set `on_bad_record = \"skip\"`"));
    }
    let content = text_of(message, "content");
    if marks.closes.is_empty() && !content.is_empty() {
        return Err(unlocatable());
    }
    let has_reasoning = reasoning_in(content).is_some()
        || REASONING_FIELDS
            .iter()
            .any(|field| !text_of(message, field).is_empty());
    Ok(!has_reasoning || !marks.reasoning.is_empty())
}

/// The `{% generation %}` blocks.
fn tagged_spans(sentinels: &[Sentinel]) -> Result<Vec<Range<usize>>> {
    let tags: Vec<&Sentinel> = sentinels.iter().filter(|s| s.message.is_none()).collect();
    let mut spans = Vec::new();
    for pair in tags.chunks(2) {
        match pair {
            [open, close] if open.kind == OPEN && close.kind == CLOSE => {
                spans.push(open.at..close.at)
            }
            _ => return Err(unlocatable()),
        }
    }
    Ok(spans)
}

/// Refuses a conversation with a learned message outside all `{% generation %}` blocks.
fn check_tagged(chat: &Chat, marks: &[Marks], spans: &[Range<usize>]) -> Result<()> {
    let is_tagged = |from: usize, to: usize| {
        let next = spans.partition_point(|span| span.end < to);
        spans.get(next).is_some_and(|span| span.start <= from)
    };
    // A call and reasoning are at least one character long.
    let is_complete = |marks: &Marks| {
        let texts = marks.opens.iter().chain(&marks.closes);
        let others = marks.calls.iter().chain(&marks.reasoning);
        texts.copied().all(|at| is_tagged(at, at))
            && others.copied().all(|at| is_tagged(at, at + 1))
    };
    match learned(chat).find(|i| !is_complete(&marks[*i])) {
        None => Ok(()),
        Some(i) => Err(bad_record(
            "the chat template's `{% generation %}` tags leave out what the assistant said",
        )
        .value(format!("message {}", i + 1))
        .rule(
            "each of the assistant's messages stands within the tags, with its reasoning and calls",
        )
        .hint(
            "move the tags in the model's chat_template.jinja, or set `on_bad_record = \"skip\"`",
        )),
    }
}

fn turn_spans(
    chat: &Chat,
    turns: &TurnDelimiters,
    text: &str,
    marks: &[Marks],
) -> Result<Vec<Range<usize>>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for i in learned(chat) {
        let after = marks[i + 1..].iter().find_map(|marks| marks.all().min());
        let previous_end = spans.last().map_or(0, |span| span.end);
        let bounds = previous_end..after.unwrap_or(text.len());
        let message = &chat.messages[i];
        let span = match is_assistant(message) {
            true => assistant_span(turns, text, message, &marks[i], bounds)?,
            false => content_span(turns, text, &marks[i], bounds)?,
        };
        if previous_end > span.start || span.end < span.start {
            return Err(unlocatable());
        }
        spans.push(span);
    }
    Ok(spans)
}

/// From the end of the generation prompt to the end-of-turn token; from the content where the template has no such prompt.
fn assistant_span(
    turns: &TurnDelimiters,
    text: &str,
    message: &Value,
    marks: &Marks,
    bounds: Range<usize>,
) -> Result<Range<usize>> {
    let (Some(first), Some(last)) = (marks.all().min(), marks.all().max()) else {
        return Err(unlocatable());
    };
    if marks.opens.len() > 1 || marks.closes.len() > 1 || first < bounds.start || last > bounds.end
    {
        return Err(unlocatable());
    }
    let has_beginning = marks.closes.first() != Some(&first) || marks.opens.first() == Some(&first);
    let header = turns.headers.last().map_or("", String::as_str);
    if !has_beginning && text_of(message, "content").contains(header) {
        return Err(no_turn_delimiters());
    }
    let is_plain = marks.calls.is_empty() && marks.opens.first() == Some(&first);
    let start = match turns.turn_start(text, bounds.start..first) {
        Some(start) => start,
        None if is_plain => first,
        None => return Err(no_turn_delimiters()),
    };
    let is_bounded = !marks.calls.is_empty() && bounds.end < text.len();
    match turns.turn_end(text, last..bounds.end, is_bounded) {
        Some(end) => Ok(start..end),
        None if marks.calls.is_empty() => Ok(start..last),
        None => Err(no_turn_delimiters()),
    }
}

/// Another role's content and the end-of-turn token after it.
fn content_span(
    turns: &TurnDelimiters,
    text: &str,
    marks: &Marks,
    bounds: Range<usize>,
) -> Result<Range<usize>> {
    match (marks.opens.as_slice(), marks.closes.as_slice()) {
        ([start], [end]) if *end <= bounds.end => Ok(*start
            ..turns
                .turn_end(text, *end..bounds.end, false)
                .unwrap_or(*end)),
        _ => Err(unlocatable()),
    }
}

fn no_turn_delimiters() -> Error {
    bad_record("the chat template does not show where an assistant's turn with tool calls or reasoning begins and ends")
        .rule("a generation prompt before it and a token of its own after it")
        .hint("put `{% generation %}` tags into the model's chat_template.jinja around the assistant's part, or set `on_bad_record = \"skip\"`")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::NaiveDate;

    use serde_json::json;

    use super::*;
    use crate::data::turns::detect_turn_delimiters;

    const CHATML: &str = "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content | trim }}{% for c in m.tool_calls %}\
        {{ '(' + c.function.name + c.function.arguments | tojson + ')' }}{% endfor %}{{ '<e>\\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}";

    fn compiled(source: &str) -> (ChatTemplate, TurnDelimiters) {
        let templates = BTreeMap::from([("default".to_string(), source.to_string())]);
        let template = ChatTemplate::new(&templates, BTreeMap::new(), NaiveDate::MIN).unwrap();
        let tokens =
            [("<s>", 1), ("<e>", 2), ("<c>", 3), ("\n", 4)].map(|(t, id)| (t.to_string(), id));
        let turns = detect_turn_delimiters(&template, None, &tokens);
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
        let turns = compiled(CHATML).1;
        assert_eq!(turns.headers, ["<s>assistant\n"]);
        assert_eq!(turns.start.as_deref(), Some("<s>"));
        let ends: Vec<_> = turns
            .ends
            .iter()
            .map(|end| (end.token.as_str(), end.id))
            .collect();
        assert_eq!(ends, [("<e>", 2)]);
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

    /// Role tokens around every message, as in gpt-oss, Llama 3 and DeepSeek; `calls` and `why` as their templates write them.
    const ROLES: &str = "{% for m in messages %}{{ '<s>' + m.role }}{% if m.reasoning_content %}<c>why{{ m.reasoning_content }}{% endif %}\
        {{ '<c>' + m.content }}{% for c in m.tool_calls %}{{ '<c>' + c.name }}{% endfor %}{{ '<e>' if m.role != 'assistant' or not m.tool_calls else '<c>' }}\n{% endfor %}\
        {% if add_generation_prompt %}<s>assistant{% endif %}";

    #[test]
    fn a_turn_is_learned_from_the_generation_prompt_to_its_end() {
        let user = json!({"role": "user", "content": "q <s>assistant"});
        let call = json!({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]});
        let result = json!({"role": "tool", "content": "r"});
        let answer =
            json!({"role": "assistant", "content": "<s>assistant", "reasoning_content": "r"});
        let chat = json!([user, call, result, answer]);
        // A turn of tool calls has a different end-of-turn token; template text quoted by the user does not end a turn.
        assert_eq!(
            learned(ROLES, chat, None).unwrap(),
            ["<c><c>f<c>", "<c>whyr<c><s>assistant<e>"]
        );
        // A suffix of the template stands between the answer and the token that ends it.
        let suffix = CHATML.replace("'<e>\\n'", "'</a><e>\\n'");
        let chat = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(learned(&suffix, chat.clone(), None).unwrap(), ["a</a><e>"]);
        // A token of the next turn's header ends none.
        let long = json!([chat[0], chat[1], chat[0], chat[1]]);
        for end in [";", ""] {
            let header = "{% for m in messages %}<s>{{ m.role }}<c>{{ m.content }}END{% endfor %}{% if add_generation_prompt %}<s>assistant<c>{% endif %}";
            let header = header.replace("END", end);
            assert_eq!(learned(&header, long.clone(), None).unwrap(), ["a", "a"]);
        }
        // Without generation prompt and tokens the content alone is learned.
        let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
        assert_eq!(learned(plain, chat, None).unwrap(), ["a"]);
    }

    #[test]
    fn what_the_template_leaves_out_is_refused_or_counted() {
        let source = "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}";
        let (template, turns) = compiled(source);
        let outcome = |field: &str, value: Value| {
            let answer = json!({"role": "assistant", "content": "a", field: value});
            let chat = Chat {
                messages: vec![json!({"role": "user", "content": "q"}), answer],
                tools: None,
                loss_mask: vec![false, true],
            };
            render(&template, &turns, &chat)
        };
        let reasoning = REASONING_FIELDS.map(|field| (field, "r", [1, 0]));
        let blank = REASONING_FIELDS.map(|field| (field, " ", [0, 0]));
        let others = [
            ("content", "<think>r</think>a", [0, 0]),
            ("content", " ", [0, 1]),
            ("name", "n", [0, 0]),
        ];
        for (field, value, counts) in [&reasoning[..], &blank, &others].concat() {
            let rendered = outcome(field, json!(value)).unwrap();
            let found = [rendered.without_reasoning, rendered.empty_turns];
            assert_eq!(found, counts, "{field} = {value:?}");
        }
        let error = outcome("tool_calls", json!([{"name": "f"}])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("leaves out the assistant's tool calls"),
            "{text}"
        );
    }

    #[test]
    fn tags_that_leave_out_calls_are_refused() {
        let tags = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
        let call = json!([{"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}]);
        let text = learned(tags, call, None).unwrap_err().to_string();
        assert!(text.contains("`{% generation %}` tags leave out"), "{text}");
    }
}
