//! Chat templates: Jinja as transformers runs it.
//!
//! Takes a template's source and the special tokens, returns rendered conversations. Owns the environment
//! (`tojson`, `raise_exception`, `strftime_now`, Python's string methods, `trim_blocks`, `lstrip_blocks`) and the rewriting of
//! `{% generation %}` tags into sentinels. Knows nothing of tokens; `chat` reads the sentinels.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind};
use regex::{Captures, Regex};
use serde_json::Value;

use super::chat::{GENERATION_CLOSE, GENERATION_OPEN};
use super::pyjson::{Style, dumps};
use crate::error::{Error, Kind, Result};

/// The template for conversations without tools.
const CHAT: &str = "chat";
/// The template for conversations with tools, where a model names one.
const TOOL_USE: &str = "tool_use";
/// Suffix of the variant whose `{% generation %}` blocks are delimited by sentinels.
const WITH_SENTINELS: &str = "#marked";

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// Variables such as `bos_token`.
    special_tokens: Vec<(String, String)>,
    has_tool_use: bool,
    generation: bool,
}

impl ChatTemplate {
    /// Compiles `source`, and `tool_use` for conversations with tools. Refuses a template that does not parse.
    pub fn new(
        source: &str,
        tool_use: Option<&str>,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self> {
        let mut environment = environment();
        let mut generation = true;
        for (name, text) in
            std::iter::once((CHAT, source)).chain(tool_use.map(|text| (TOOL_USE, text)))
        {
            generation &= generation_tag().is_match(text);
            for (suffix, open, close) in [
                ("", "", ""),
                (WITH_SENTINELS, GENERATION_OPEN, GENERATION_CLOSE),
            ] {
                let source = replace_generation_tags(text, open, close);
                environment.add_template_owned(format!("{name}{suffix}"), source).map_err(|e| {
                    Error::new(Kind::Tokenizer, format!("the chat template cannot be compiled: {}", explain(&e)))
                        .hint("correct `chat_template` in tokenizer_config.json (or chat_template.jinja), or use a format without a template")
                })?;
            }
        }
        Ok(Self {
            environment,
            special_tokens,
            has_tool_use: tool_use.is_some(),
            generation,
        })
    }

    /// Whether `{% generation %}` tags mark the assistant's output in the template.
    pub fn has_generation_tags(&self) -> bool {
        self.generation
    }

    /// Renders a conversation, with sentinels around `{% generation %}` blocks if `sentinels`.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        sentinels: bool,
    ) -> Result<String> {
        let mut context: Vec<(String, Jinja)> = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.clone(), Jinja::from(token.as_str())))
            .collect();
        context.push(("messages".into(), Jinja::from(Serde(messages))));
        context.push((
            "tools".into(),
            tools.map_or(Jinja::from(()), |tools| Jinja::from(Serde(tools))),
        ));
        context.push(("documents".into(), Jinja::from(())));
        context.push((
            "add_generation_prompt".into(),
            Jinja::from(add_generation_prompt),
        ));
        let mut name = CHAT.to_string();
        if tools.is_some() && self.has_tool_use {
            name = TOOL_USE.to_string();
        }
        if sentinels {
            name.push_str(WITH_SENTINELS);
        }
        let template = self
            .environment
            .get_template(&name)
            .map_err(|e| refused(&e))?;
        template
            .render(Jinja::from_pairs(context))
            .map_err(|e| refused(&e))
    }
}

fn refused(error: &minijinja::Error) -> Error {
    Error::new(
        Kind::Data,
        format!(
            "the model's chat template refuses the conversation: {}",
            explain(error)
        ),
    )
    .hint("change the conversation's roles or fields to what the template expects")
}

/// The reason and the template's line, without minijinja's listing.
fn explain(error: &minijinja::Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or_else(
        || detail.clone(),
        |line| format!("{detail} (template line {line})"),
    )
}

/// The environment of transformers' `_compile_jinja_template`.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("`{format}` is not a date format"),
        )
    })?;
    Ok(text)
}

fn tojson(value: Jinja, indent: Option<usize>, options: Kwargs) -> Result<Jinja, minijinja::Error> {
    let json = serde_json::to_value(&value).map_err(|e| {
        minijinja::Error::new(
            ErrorKind::BadSerialization,
            format!("not a JSON value: {e}"),
        )
    })?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = Style {
        indent: match options.get::<Option<usize>>("indent")? {
            Some(indent) => Some(indent),
            None => indent,
        },
        separators: separators
            .and_then(|s| <[String; 2]>::try_from(s).ok())
            .map(|[item, key]| (item, key)),
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    Ok(Jinja::from(dumps(&json, &style)))
}

fn generation_tag() -> Regex {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a fixed pattern")
}

/// minijinja cannot parse `{% generation %}`: each tag becomes two `if` tags around a literal, so that whitespace control on
/// either side works as on the tag itself.
fn replace_generation_tags(source: &str, open: &str, close: &str) -> String {
    generation_tag()
        .replace_all(source, |tag: &Captures| {
            let (left, right) = (&tag[1], &tag[3]);
            match tag.get(2) {
                None => format!("{{%{left} if true %}}{{{{ \"{open}\" }}}}{{% if true {right}%}}"),
                Some(_) => format!("{{%{left} endif %}}{{{{ \"{close}\" }}}}{{% endif {right}%}}"),
            }
        })
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str) -> Result<String> {
        let messages =
            json!([{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Yo"}]);
        ChatTemplate::new(source, None, vec![("eos_token".into(), "</s>".into())])?
            .render(&messages, None, false, false)
    }

    #[test]
    fn pythons_methods_and_loop_controls_work() {
        let source = "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m['content'].upper() }}{% endfor %}{{ eos_token }}";
        assert_eq!(render(source).unwrap(), "YO</s>");
        assert_eq!(
            render("{{ messages[0].content.rstrip('\\n').split('i')[0] }}{{ none }}{{ true }}")
                .unwrap(),
            "HNoneTrue"
        );
    }

    #[test]
    fn a_raised_exception_reaches_the_reader() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error.kind(), Kind::Data);
        assert!(
            error
                .to_string()
                .contains("roles must alternate (template line 1)"),
            "{error}"
        );
        assert_eq!(render("{% for %}").unwrap_err().kind(), Kind::Tokenizer);
    }

    #[test]
    fn the_tool_template_is_used_with_tools_only() {
        let template = ChatTemplate::new("plain", Some("tools"), vec![]).unwrap();
        assert_eq!(
            template.render(&json!([]), None, false, false).unwrap(),
            "plain"
        );
        assert_eq!(
            template
                .render(&json!([]), Some(&json!([{}])), false, false)
                .unwrap(),
            "tools"
        );
    }
}
