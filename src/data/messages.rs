//! Conversation formats -> the form that chat templates read.
//!
//! Takes OpenAI-style `messages`, ShareGPT's `conversations` and TRL's prompt and completion lists, returns a `Chat`: content as
//! text, tool calls with parsed arguments, tools as functions, and which messages have a loss. Refuses images, unknown roles of
//! ShareGPT and loss weights other than 0 and 1. Knows nothing of templates.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::chat::{Chat, REASONING_FIELDS, assistant_mask};
use crate::error::{Error, Kind, Result};

/// Keys for a message's loss weight: LLaMA-Factory's, OpenAI's, axolotl's.
const WEIGHTS: [&str; 3] = ["loss_weight", "weight", "train"];
/// Fields of what an assistant said that no chat template writes.
const UNWRITTEN: [&str; 3] = ["function_call", "refusal", "audio"];

fn bad_record(what: impl Into<String>) -> Error {
    Error::new(Kind::Data, what)
}

/// `messages` or `conversations`; `system` is prepended if the list has no system message.
pub(super) fn from_list(
    list: &[Value],
    system: Option<&str>,
    tools: Option<&Value>,
) -> Result<Chat> {
    let mut messages = Vec::with_capacity(list.len() + 1);
    let mut weights = Vec::with_capacity(list.len() + 1);
    for (i, item) in list.iter().enumerate() {
        let (message, weight) =
            message(item).map_err(|e| e.value(format!("message {}: {}", i + 1, excerpt(item))))?;
        messages.push(Value::Object(message));
        weights.push(weight);
    }
    if let Some(text) = system.filter(|_| messages.first().is_none_or(|m| m["role"] != "system")) {
        messages.insert(0, json!({"role": "system", "content": text}));
        weights.insert(0, None);
    }
    check_roles(&messages)?;
    let loss_mask = assistant_mask(&messages)
        .into_iter()
        .zip(weights)
        .map(|(assistant_mask, weight)| weight.unwrap_or(assistant_mask))
        .collect();
    Ok(Chat {
        loss_mask,
        messages,
        tools: tools.map(functions).transpose()?.flatten(),
    })
}

/// TRL's conversational prompt and completion: only the completion's assistant turns have a loss.
pub(super) fn from_prompt_and_completion(
    prompt: &[Value],
    completion: &[Value],
    tools: Option<&Value>,
) -> Result<Chat> {
    let all: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
    let mut chat = from_list(&all, None, tools)?;
    chat.loss_mask[..prompt.len()].fill(false);
    Ok(chat)
}

/// A list of messages, or its JSON text, as columnar files have it.
pub(super) fn list(value: &Value) -> Result<Cow<'_, [Value]>> {
    let rule = "[{\"role\": \"user\", \"content\": \"...\"}, ...], or its JSON text";
    match value {
        Value::Array(list) => Ok(Cow::Borrowed(list.as_slice())),
        Value::String(text) => from_json_text("messages", text, rule).map(Cow::Owned),
        other => Err(bad_record("a record's `messages` is not a list")
            .value(excerpt(other))
            .rule(rule)),
    }
}

/// A list written as JSON text in `field`.
fn from_json_text(field: &str, text: &str, rule: &str) -> Result<Vec<Value>> {
    serde_json::from_str(text).map_err(|e| {
        let error = bad_record(format!("`{field}` is text that is no JSON list: {e}"))
            .value(text.chars().take(120).collect::<String>())
            .rule(rule);
        // pandas writes a list to CSV as Python's `str` of it.
        if text.contains("{'") {
            error.hint(format!(
                "the text is Python's notation of a list: write it as JSON, as with `df[\"{field}\"] = df[\"{field}\"].map(json.dumps)`"
            ))
        } else {
            error.hint("correct the record, or set `on_bad_record = \"skip\"`")
        }
    })
}

fn excerpt(value: &Value) -> String {
    value.to_string().chars().take(120).collect()
}

/// One message and its loss weight, if it has one.
fn message(item: &Value) -> Result<(Map<String, Value>, Option<bool>)> {
    let fields = item.as_object().ok_or_else(|| {
        bad_record("a message is not an object").rule("{\"role\": ..., \"content\": ...}")
    })?;
    // Columnar files fill absent keys with null.
    let mut fields: Map<String, Value> = fields
        .iter()
        .filter(|(_, v)| !v.is_null())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let weight = take_weight(&mut fields)?;
    if !fields.contains_key("role") && fields.contains_key("from") {
        fields = from_sharegpt(&fields)?;
    }
    let Some(role) = fields.get("role").and_then(Value::as_str) else {
        return Err(bad_record("a message has no role")
            .rule("{\"role\": ..., \"content\": ...} or {\"from\": ..., \"value\": ...}"));
    };
    if let Some(role) = known_role(role) {
        fields.insert("role".into(), json!(role));
    }
    let content = content(fields.get("content"), fields.contains_key("tool_calls"))?;
    fields.insert("content".into(), Value::String(content));
    if let Some(calls) = fields.get_mut("tool_calls") {
        tool_calls(calls)?;
        if calls.as_array().is_some_and(Vec::is_empty) {
            fields.shift_remove("tool_calls");
        }
    }
    refuse_unwritten(&fields)?;
    Ok((with_reasoning(fields)?, weight))
}

fn refuse_unwritten(fields: &Map<String, Value>) -> Result<()> {
    let has = |field: &&&str| fields.get(**field).is_some_and(|value| *value != json!(""));
    let field = UNWRITTEN.iter().find(has);
    match field.filter(|_| fields.get("role") == Some(&json!("assistant"))) {
        None => Ok(()),
        Some(field) => Err(bad_record(format!("a message has a `{field}`, which chat templates leave out"))
            .rule("what the assistant said: content, reasoning_content, tool_calls")
            .hint("write a `function_call` as `tool_calls` and a refusal as `content`, or set `on_bad_record = \"skip\"`")),
    }
}

/// Reasoning under the names that templates read, as transformers' `_alias_reasoning_fields`.
fn with_reasoning(fields: Map<String, Value>) -> Result<Map<String, Value>> {
    let Some(reasoning) = REASONING_FIELDS
        .iter()
        .find_map(|name| fields.get(*name).cloned())
    else {
        return Ok(fields);
    };
    if !reasoning.is_string() {
        return Err(bad_record("a message's reasoning is not text")
            .rule("reasoning_content: a string")
            .hint("correct the record, or set `on_bad_record = \"skip\"`"));
    }
    let mut named = Map::from_iter([("thinking".to_string(), reasoning.clone())]);
    named.extend(fields);
    named.insert(REASONING_FIELDS[0].into(), reasoning);
    Ok(named)
}

fn take_weight(fields: &mut Map<String, Value>) -> Result<Option<bool>> {
    let mut weight = None;
    for key in WEIGHTS {
        let Some(value) = fields.shift_remove(key) else {
            continue;
        };
        let read = match &value {
            Value::Bool(learned) => Some(*learned),
            Value::Number(n) if n.as_f64() == Some(0.0) => Some(false),
            Value::Number(n) if n.as_f64() == Some(1.0) => Some(true),
            _ => None,
        };
        let read = read.ok_or_else(|| {
            bad_record(format!("a message's `{key}` is neither 0 nor 1"))
                .rule("0: read but not learned; 1: learned")
                .hint("every learned token counts alike: use 0 or 1, or repeat the record")
        })?;
        weight = weight.or(Some(read));
    }
    Ok(weight)
}

/// `{from, value}` -> `{role, content}`; a function call becomes a turn with tool calls.
fn from_sharegpt(fields: &Map<String, Value>) -> Result<Map<String, Value>> {
    let from = fields
        .get("from")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let value = fields.get("value").cloned().unwrap_or(Value::Null);
    let role = match from {
        "observation" | "function_response" => "tool",
        "function_call" => {
            let calls = parse_calls(value.as_str().unwrap_or_default())?;
            return Ok(Map::from_iter([
                ("role".to_string(), json!("assistant")),
                ("tool_calls".to_string(), calls),
            ]));
        }
        other => known_role(other).ok_or_else(|| {
            bad_record("a message is from somebody unknown")
                .rule("from: human, gpt, system, function_call or observation")
                .hint("rename the speaker, or write the record as `messages`")
        })?,
    };
    Ok(Map::from_iter([
        ("role".to_string(), json!(role)),
        ("content".to_string(), value),
    ]))
}

/// The role that a data set means by a name in any case: axolotl's and ShareGPT's names, OpenAssistant's `prompter`.
fn known_role(name: &str) -> Option<&'static str> {
    match name.to_lowercase().as_str() {
        "human" | "user" | "prompter" => Some("user"),
        "gpt" | "assistant" | "model" | "chatgpt" | "bot" | "chatbot" | "ai" => Some("assistant"),
        "system" => Some("system"),
        "tool" => Some("tool"),
        _ => None,
    }
}

/// Refuses a conversation without the assistant's turns where a role is unknown: it may be the assistant's.
fn check_roles(messages: &[Value]) -> Result<()> {
    let roles: Vec<&str> = messages.iter().filter_map(|m| m["role"].as_str()).collect();
    let unknown = roles.iter().find(|role| known_role(role).is_none());
    match unknown {
        Some(unknown) if !roles.contains(&"assistant") => {
            Err(bad_record("no message has the role `assistant`")
                .value(roles.join(", "))
                .rule("role: system, user, assistant or tool")
                .hint(format!(
                    "if `{unknown}` is the assistant, rename the role in the data, or set `on_bad_record = \"skip\"`"
                )))
        }
        _ => Ok(()),
    }
}

/// `{"name", "arguments"}`, or a list of them, written as text.
fn parse_calls(text: &str) -> Result<Value> {
    let parsed: Value = serde_json::from_str(text)
        .map_err(|e| bad_record(format!("a function call is not JSON: {e}")).rule(CALL))?;
    let calls = match parsed {
        Value::Array(calls) => calls,
        one => vec![one],
    };
    Ok(calls
        .into_iter()
        .map(|function| json!({"type": "function", "function": function}))
        .collect())
}

const CALL: &str = "{\"name\": \"...\", \"arguments\": {...}}";

/// Checks each call and parses its arguments where they are text (OpenAI's form; templates want the object); the list itself may be
/// JSON text.
fn tool_calls(calls: &mut Value) -> Result<()> {
    if let Value::String(text) = calls {
        let list = match text.trim() {
            "" => Vec::new(),
            text => from_json_text("tool_calls", text, CALL)?,
        };
        *calls = Value::Array(list);
    }
    let list = calls.as_array_mut().ok_or_else(|| {
        bad_record("`tool_calls` is not a list").rule("[{\"function\": {...}}, ...]")
    })?;
    for call in list {
        let function = if call.get("function").is_some() {
            &mut call["function"]
        } else {
            call
        };
        if function.get("name").and_then(Value::as_str).is_none() {
            return Err(bad_record("a tool call names no function").rule(CALL));
        }
        if let Some(Value::String(text)) = function.get("arguments") {
            let parsed: Value = serde_json::from_str(text)
                .ok()
                .filter(Value::is_object)
                .ok_or_else(|| {
                    bad_record("a tool call's arguments are not a JSON object").rule(CALL)
                })?;
            function["arguments"] = parsed;
        }
    }
    Ok(())
}

/// Content as one text: a string, or text parts laid end to end.
fn content(value: Option<&Value>, has_calls: bool) -> Result<String> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        None | Some(Value::Null) if has_calls => Ok(String::new()),
        _ => Err(bad_record("a message has no text")
            .rule("content: a string, or a list of {\"type\": \"text\", \"text\": ...}")),
    }
}

fn part(part: &Value) -> Result<String> {
    let text = part
        .get("text")
        .or_else(|| part.get("value"))
        .and_then(Value::as_str);
    match (part.get("type").and_then(Value::as_str), text) {
        (Some("text"), Some(text)) => Ok(text.to_string()),
        _ => Err(bad_record("a message holds a part that is not text")
            .rule("{\"type\": \"text\", \"text\": ...}")
            .hint("this trains text models: remove the record, or set `on_bad_record = \"skip\"`")),
    }
}

/// Tools as the list of `{"type": "function", "function": ...}` that templates print; given as a list or as its JSON text.
fn functions(tools: &Value) -> Result<Option<Value>> {
    let rule = "a list of functions, {\"name\": ..., \"description\": ..., \"parameters\": ...}, or its JSON text";
    let list = match tools {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => from_json_text("tools", text, rule)?,
        Value::Array(list) => list.clone(),
        _ => return Err(bad_record("`tools` is not a list").rule(rule)),
    };
    let wrap = |tool: Value| match tool.get("function").is_some() || tool.get("name").is_none() {
        true => tool,
        false => json!({"type": "function", "function": tool}),
    };
    Ok((!list.is_empty()).then(|| list.into_iter().map(wrap).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(list: Value) -> Result<Chat> {
        from_list(list.as_array().unwrap(), None, None)
    }

    #[test]
    fn parts_are_joined_and_weights_read() {
        let chat = chat(json!([
            {"role": "user", "content": [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}], "loss_weight": 1.0, "tool_calls": null},
            {"role": "assistant", "content": "c", "weight": 0},
            {"role": "assistant", "content": "d"}]))
        .unwrap();
        assert_eq!(chat.messages[0], json!({"role": "user", "content": "ab"}));
        assert_eq!(chat.loss_mask, [true, false, true]);
    }

    #[test]
    fn sharegpt_speaks_of_humans_and_functions() {
        let list = json!([{"from": "human", "value": "q"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": 2}}"},
            {"from": "observation", "value": "{}"}, {"from": "gpt", "value": "a"}]);
        let tools = json!("[{\"name\": \"f\"}]");
        let chat = from_list(list.as_array().unwrap(), Some("S"), Some(&tools)).unwrap();
        let roles: Vec<_> = chat
            .messages
            .iter()
            .map(|m| m["role"].as_str().unwrap())
            .collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool", "assistant"]);
        assert_eq!(
            chat.messages[2].to_string(),
            r#"{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"b":1,"a":2}}}],"content":""}"#
        );
        assert_eq!(chat.loss_mask, [false, false, true, false, true]);
        assert_eq!(
            chat.tools,
            Some(json!([{"type": "function", "function": {"name": "f"}}]))
        );
    }

    #[test]
    fn role_names_are_those_of_other_tools() {
        // axolotl's default map of roles, in any case.
        for (name, role) in [
            ("human", "user"),
            ("User", "user"),
            ("gpt", "assistant"),
            ("Assistant", "assistant"),
            ("bot", "assistant"),
            ("SYSTEM", "system"),
        ] {
            let list =
                json!([{"role": name, "content": "q"}, {"role": "assistant", "content": "a"}]);
            assert_eq!(chat(list).unwrap().messages[0]["role"], role, "{name}");
        }
        let known_to_a_template =
            json!([{"role": "observation", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(
            chat(known_to_a_template).unwrap().messages[0]["role"],
            "observation"
        );
        let error =
            chat(json!([{"role": "user", "content": "q"}, {"role": "Helper", "content": "a"}]))
                .unwrap_err()
                .to_string();
        assert!(
            error.contains("user, Helper") && error.contains("rename the role"),
            "{error}"
        );
        assert!(chat(json!([{"role": "user", "content": "q"}])).is_ok());
    }

    #[test]
    fn lists_may_be_json_text() {
        let text = json!("[{\"role\": \"user\", \"content\": \"q\"}]");
        assert_eq!(list(&text).unwrap().len(), 1);
        let python = list(&json!("[{'role': 'user', 'content': 'q'}]"))
            .unwrap_err()
            .to_string();
        assert!(python.contains("json.dumps"), "{python}");
        assert!(
            list(&json!("hello"))
                .unwrap_err()
                .to_string()
                .contains("no JSON list")
        );
        let calls = "[{\"function\": {\"name\": \"f\", \"arguments\": {}}}]";
        let chat = chat(json!([{"role": "user", "content": "q", "tool_calls": ""}, {"role": "assistant", "tool_calls": calls}])).unwrap();
        assert_eq!(chat.messages[1]["tool_calls"][0]["function"]["name"], "f");
        assert!(chat.messages[0].get("tool_calls").is_none());
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        for (bad, word) in [
            (
                json!([{"role": "user", "content": "a", "loss_weight": 0.5}]),
                "neither 0 nor 1",
            ),
            (
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "not text",
            ),
            (
                json!([{"from": "stranger", "value": "a"}]),
                "somebody unknown",
            ),
            (
                json!([{"from": "function_call", "value": "f(x)"}]),
                "not JSON",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]),
                "JSON object",
            ),
            (json!([{"role": "assistant"}]), "no text"),
            (json!([{"content": "a"}]), "no role"),
            (json!(["a"]), "not an object"),
        ] {
            let error = chat(bad).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("message 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn arguments_as_text_are_parsed_and_the_prompt_is_not_learned() {
        let prompt =
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        let completion = json!([{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\": 1}"}}]}]);
        let chat = from_prompt_and_completion(
            prompt.as_array().unwrap(),
            completion.as_array().unwrap(),
            None,
        )
        .unwrap();
        assert_eq!(chat.loss_mask, [false, false, true]);
        assert_eq!(
            chat.messages[2]["tool_calls"][0]["function"]["arguments"],
            json!({"x": 1})
        );
    }
}
