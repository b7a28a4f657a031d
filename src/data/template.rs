//! Chat templates: Jinja as transformers runs it.
//!
//! Takes named templates, the special tokens and a date, returns rendered conversations. Owns the environment (`tojson`,
//! `raise_exception`, `strftime_now`, `trim_blocks`, `lstrip_blocks`, Python's methods by `python`) and the limits of a rendering.
//! Knows nothing of tokens; `chat` reads the sentinels.

use std::collections::{BTreeMap, BTreeSet};

use chrono::NaiveDate;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::Value;

use super::jinja::{ATTRIBUTE, BOUNDED, MODULO, Translated, translate};
use super::pyjson::{Style, dumps, python_float};
use super::python::{self, invalid};
use super::sentinel::{GENERATION_CLOSE, GENERATION_OPEN};
use crate::error::{Error, Kind, Result};

/// The template for conversations without tools, and with them where a model names no other.
const DEFAULT: &str = "default";
/// The template for conversations with tools.
const TOOL_USE: &str = "tool_use";
/// Suffix of the variant whose `{% generation %}` blocks are delimited by sentinels.
const WITH_SENTINELS: &str = "#marked";

/// Steps of one rendering (minijinja's fuel: an instruction, or 64 bytes of data), and more for each byte of the conversation.
const STEPS: u64 = 4_000_000;
const STEPS_PER_BYTE: u64 = 32;
/// Output limit of one rendering in bytes: a constant, and an allowance for each byte of the conversation.
const OUTPUT_BYTES: u64 = 16 << 20;
const OUTPUT_PER_BYTE: u64 = 16;
/// What an object of the conversation counts for, in bytes.
const BYTES_PER_VALUE: u64 = 32;
/// Most spaces of a level that `tojson` indents.
const MAX_INDENT: usize = 100;
/// The stack for compiling: minijinja recurses over nested operators.
const COMPILER_STACK: usize = 64 << 20;

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// Variables such as `bos_token`.
    special_tokens: BTreeMap<String, String>,
    /// Names of all templates.
    names: Vec<String>,
    /// Those with `{% generation %}` tags.
    generation: BTreeSet<String>,
    /// Variables named `*_token` that are printed and not defined.
    undefined_tokens: BTreeSet<String>,
    uses_date: bool,
    /// The template named `default`, as written.
    source: Option<String>,
}

impl ChatTemplate {
    /// Compiles the templates named `default` and `tool_use`; `strftime_now` writes `date`.
    ///
    /// # Errors
    /// `Kind::Tokenizer` where one does not parse or is too large.
    pub fn new(
        templates: &BTreeMap<String, String>,
        special_tokens: BTreeMap<String, String>,
        date: NaiveDate,
    ) -> Result<Self> {
        let mut sources = Vec::new();
        let mut generation = BTreeSet::new();
        let mut printed = BTreeSet::new();
        let mut uses_date = false;
        for name in [DEFAULT, TOOL_USE] {
            let Some(source) = templates.get(name) else {
                continue;
            };
            let plain = translate(source, "", "")?;
            let marked = translate(source, GENERATION_OPEN, GENERATION_CLOSE)?;
            let Translated { printed_tokens, .. } = marked;
            printed.extend(printed_tokens);
            uses_date |= source.contains("strftime_now");
            if plain.generation {
                generation.insert(name.to_string());
            }
            sources.push((name.to_string(), plain.text));
            sources.push((format!("{name}{WITH_SENTINELS}"), marked.text));
        }
        let environment = compile(sources, date)?;
        let undeclared: BTreeSet<String> = environment
            .templates()
            .flat_map(|(_, template)| template.undeclared_variables(false))
            .collect();
        let is_undefined =
            |name: &String| undeclared.contains(name) && !special_tokens.contains_key(name);
        Ok(Self {
            undefined_tokens: printed.into_iter().filter(is_undefined).collect(),
            environment,
            special_tokens,
            names: templates.keys().cloned().collect(),
            generation,
            uses_date,
            source: templates.get(DEFAULT).cloned(),
        })
    }

    /// The template named `default`, as written.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// Whether a template calls `strftime_now`.
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// Variables of special tokens that a template prints though the tokenizer does not define them: printed as nothing.
    pub fn undefined_tokens(&self) -> impl Iterator<Item = &str> {
        self.undefined_tokens.iter().map(String::as_str)
    }

    /// The template for a conversation, as transformers chooses it.
    fn name(&self, tools: Option<&Value>) -> Result<&'static str> {
        let has = |name: &str| self.names.iter().any(|other| other == name);
        match tools {
            Some(_) if has(TOOL_USE) => Ok(TOOL_USE),
            _ if has(DEFAULT) => Ok(DEFAULT),
            _ => Err(Error::new(
                Kind::Tokenizer,
                "the model has several chat templates and none named `default`",
            )
            .value(self.names.join(", "))
            .rule("one named `default`, or only `tool_use` for conversations with tools")
            .hint("copy the one to train with to `chat_template.jinja` in the model's directory")),
        }
    }

    /// Whether `{% generation %}` tags mark the assistant's output in the template for `tools`.
    pub fn has_generation_tags(&self, tools: Option<&Value>) -> bool {
        self.name(tools)
            .is_ok_and(|name| self.generation.contains(name))
    }

    /// Renders a conversation, with sentinels around `{% generation %}` blocks if `sentinels`.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        sentinels: bool,
    ) -> Result<String> {
        let mut name = self.name(tools)?.to_string();
        if sentinels {
            name.push_str(WITH_SENTINELS);
        }
        let tokens = self.special_tokens.iter();
        let mut context: BTreeMap<&str, Jinja> = tokens
            .map(|(name, token)| (name.as_str(), Jinja::from(token.as_str())))
            .collect();
        context.insert("messages", Jinja::from(Serde(messages)));
        context.insert(
            "tools",
            tools.map_or(Jinja::from(()), |tools| Jinja::from(Serde(tools))),
        );
        context.insert("documents", Jinja::from(()));
        context.insert("add_generation_prompt", Jinja::from(add_generation_prompt));
        let bytes = size(messages) + tools.map_or(0, size);
        let steps = STEPS + STEPS_PER_BYTE * bytes;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(steps));
        let text = environment
            .get_template(&name)
            .and_then(|template| template.render(Jinja::from_pairs(context)))
            .map_err(|e| refused(&e, steps))?;
        let limit = OUTPUT_BYTES + OUTPUT_PER_BYTE * bytes;
        if text.len() as u64 > limit {
            return Err(limit_passed("writes too much")
                .value(format!("{} bytes", text.len()))
                .rule(format!(
                    "limit: at most {limit} bytes for this conversation"
                )));
        }
        Ok(text)
    }
}

/// The size of a value, in bytes: its text and what each value counts for.
fn size(value: &Value) -> u64 {
    let inner = match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => {
            let sizes = fields
                .iter()
                .map(|(key, value)| key.len() as u64 + size(value));
            sizes.sum()
        }
        _ => 0,
    };
    BYTES_PER_VALUE + inner
}

fn compile(sources: Vec<(String, String)>, date: NaiveDate) -> Result<Environment<'static>> {
    let compiler = move || {
        let mut environment = environment(date);
        for (name, source) in sources {
            environment.add_template_owned(name, source)?;
        }
        Ok(environment)
    };
    let cannot = |reason: String| {
        Error::new(Kind::Tokenizer, format!("the chat template cannot be compiled: {reason}"))
            .hint("correct the chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json), or use a format without one")
    };
    let thread = std::thread::Builder::new()
        .stack_size(COMPILER_STACK)
        .spawn(compiler)
        .map_err(|e| cannot(e.to_string()))?;
    match thread.join() {
        Ok(compiled) => compiled.map_err(|e: minijinja::Error| cannot(explain(&e))),
        Err(_) => Err(cannot("the compiler of templates failed".to_string())),
    }
}

fn limit_passed(what: &str) -> Error {
    Error::new(Kind::Tokenizer, format!("the model's chat template {what}"))
        .hint("use the chat template that the model's publisher gives")
}

fn refused(error: &minijinja::Error, steps: u64) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        return limit_passed("takes too long")
            .value(explain(error))
            .rule(format!(
                "limit: at most {steps} steps for this conversation"
            ));
    }
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
fn environment(date: NaiveDate) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::call_method);
    environment.add_filter("tojson", tojson);
    environment.add_filter(MODULO, python::modulo);
    environment.add_filter(ATTRIBUTE, python::attribute);
    environment.add_filter("default", python::default);
    environment.add_filter("d", python::default);
    for name in ["escape", "e", "forceescape"] {
        environment.add_filter(name, |value: &Jinja| python::escape(&value.to_string()));
    }
    environment.add_test("sequence", python::is_sequence);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            let float = f64::try_from(value.clone())?;
            out.write_str(&python_float(float))
                .map_err(minijinja::Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter(BOUNDED, python::bounded);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<String, minijinja::Error> { Err(invalid(message)) },
    );
    environment.add_function("strftime_now", move |format: &str| strftime(date, format));
    environment
}

/// `date` at midnight by a format of `strftime`.
fn strftime(date: NaiveDate, format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    let midnight = date.and_time(chrono::NaiveTime::MIN);
    write!(text, "{}", midnight.format(format))
        .map_err(|_| invalid(format!("`{format}` is not a date format")))?;
    Ok(text)
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    value: &Jinja,
    arguments: Rest<Jinja>,
    named: Kwargs,
) -> Result<String, minijinja::Error> {
    let argument = |at: usize, name: &str| match arguments.get(at) {
        Some(value) => Ok(value.clone()),
        None => named
            .get::<Option<Jinja>>(name)
            .map(|value| value.unwrap_or(Jinja::from(()))),
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_true();
    let indent = argument(1, "indent")?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_true();
    named.assert_all_used()?;
    if value.is_undefined() || arguments.len() > 4 {
        return Err(invalid("tojson takes a value and up to four arguments"));
    }
    let style = Style {
        indent: json_indent(&indent)?,
        separators: json_separators(&separators)?,
        ensure_ascii,
        sort_keys,
        max_bytes: OUTPUT_BYTES as usize,
    };
    let json = serde_json::to_value(value).map_err(|e| {
        let what = format!("not a JSON value: {e}");
        minijinja::Error::new(ErrorKind::BadSerialization, what)
    })?;
    dumps(&json, &style).ok_or_else(|| {
        let limit = format!("tojson writes more than the limit of {OUTPUT_BYTES} bytes");
        invalid(limit)
    })
}

/// `indent` of `json.dumps`: spaces, or the text itself.
fn json_indent(indent: &Jinja) -> Result<Option<String>, minijinja::Error> {
    if indent.is_none() {
        return Ok(None);
    }
    let text = match indent.as_str() {
        Some(text) => text.to_string(),
        None => {
            let spaces = i64::try_from(indent.clone())?.max(0);
            let spaces = usize::try_from(spaces).unwrap_or(usize::MAX);
            " ".repeat(spaces.min(MAX_INDENT + 1))
        }
    };
    if text.len() > MAX_INDENT {
        let limit = format!("tojson indents by more than the limit of {MAX_INDENT} spaces");
        return Err(invalid(limit));
    }
    Ok(Some(text))
}

/// `separators` of `json.dumps`: between items, and between key and value.
fn json_separators(separators: &Jinja) -> Result<Option<(String, String)>, minijinja::Error> {
    if separators.is_none() {
        return Ok(None);
    }
    let parts = separators.try_iter()?;
    let texts: Vec<String> = parts
        .filter_map(|part| part.as_str().map(str::to_string))
        .collect();
    let [item, key] = <[String; 2]>::try_from(texts)
        .map_err(|_| invalid("`separators` of tojson are not two strings"))?;
    Ok(Some((item, key)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compiled(source: &str) -> Result<ChatTemplate> {
        let templates = BTreeMap::from([("default".to_string(), source.to_string())]);
        let tokens = BTreeMap::from([("eos_token".to_string(), "</s>".to_string())]);
        ChatTemplate::new(&templates, tokens, NaiveDate::MIN)
    }

    fn render(source: &str) -> Result<String> {
        let messages =
            json!([{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Yo"}]);
        compiled(source)?.render(&messages, None, false, false)
    }

    /// What transformers renders and this refuses by name: no published template that was looked at has any of it.
    const REFUSED: &[&str] = &[
        "'%r' %",
        "'{!r}'",
        "casefold()",
        "expandtabs",
        "'²'.is",
        "'½'.is",
        "istitle()",
        "isidentifier()",
        "isprintable()",
        "translate(",
        "encode()",
        "\\N{BULLET}",
        "| wordcount",
        "| truncate(",
        "| indent('> ')",
        "| center(9)",
        "| striptags",
        "| urlencode",
        "'x' | int }}",
        "'x' | float }}",
        "| wordwrap(",
        "dict([(",
        "| random",
        "cycler(",
        "{{ + 3",
        "is callable",
        "{1: 'a', none: 'b', true: 'c', 1.5: 'd'} | tojson",
        "{{ varargs }}",
    ];
    /// What transformers refuses and this renders.
    const RENDERED: &[&str] = &[
        "1 in 'abc'",
        "| split(','",
        "1 < 'a'",
        "x | int",
        "x < 1",
        "range(3) | tojson",
        "map(attribute='role') | tojson",
        "namespace(a=1) | tojson",
        "for i in none",
        "namespace(_a=1)",
    ];
    /// What prints otherwise: Python's own names of values that are no text, and characters without a shape in lists.
    const DIFFERENT: &[&str] = &[
        "'\\u200b']",
        "map(attribute='name') | list",
        "map(attribute='content.x')",
        "{{ range(3) }}",
        "f.arguments",
    ];

    /// Expected texts: scripts/chat_expressions.py.
    #[test]
    fn expressions_render_as_in_transformers() {
        let golden = crate::data::golden("chat_expressions.json");
        let tokens: BTreeMap<String, String> =
            serde_json::from_value(golden["special"].clone()).unwrap();
        let date = golden["date"].as_str().unwrap().parse().unwrap();
        let mut failures = Vec::new();
        for case in golden["cases"].as_array().unwrap() {
            let source = case[0].as_str().unwrap();
            let templates = BTreeMap::from([("default".to_string(), source.to_string())]);
            let ours = ChatTemplate::new(&templates, tokens.clone(), date).and_then(|template| {
                template.render(&golden["messages"], Some(&golden["tools"]), false, false)
            });
            let is_of = |list: &[&str]| list.iter().any(|part| source.contains(part));
            let fits = match (case[1].as_str(), &ours) {
                (Some(text), Ok(ours)) => (text == ours) != is_of(DIFFERENT),
                (Some(_), Err(_)) => is_of(REFUSED),
                (None, Ok(_)) => is_of(RENDERED),
                (None, Err(_)) => true,
            };
            if !fits {
                let ours = ours.map_err(|e| e.to_string());
                failures.push(format!(
                    "{source}\n  expected {}\n  rendered {ours:?}",
                    case[1]
                ));
            }
        }
        assert!(
            failures.is_empty(),
            "{}\n{} failures",
            failures.join("\n"),
            failures.len()
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
        let templates = BTreeMap::from(["default", "tool_use"].map(|n| (n.into(), n.into())));
        let template = ChatTemplate::new(&templates, BTreeMap::new(), NaiveDate::MIN).unwrap();
        let tools = json!([{}]);
        for (tools, name) in [(None, "default"), (Some(&tools), "tool_use")] {
            assert_eq!(
                template.render(&json!([]), tools, false, false).unwrap(),
                name
            );
        }
    }

    /// Templates that pass a limit, and words of the error.
    const UNBOUNDED: [(&str, &str); 13] = [
        (
            "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "steps",
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion limit",
        ),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(10000) %}{% set ns.x = [ns.x] %}{% endfor %}",
            "limit of 64",
        ),
        (
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "cannot hold a namespace",
        ),
        ("{{ messages | tojson(indent=10**12) }}", "limit of 100"),
        ("{{ '%999999999d' % 1 }}", "limit of 10000"),
        ("{{ '{:999999999}'.format(1) }}", "limit of 10000"),
        ("{{ '%*d' % (999999999, 1) }}", "limit of 10000"),
        ("{{ '%999999999d' | format(1) }}", "limit: at most"),
        ("{{ 'a'.center(999999999) }}", "limit of 10000"),
        ("{{ 'a' * 10 ** 9 }}", "limit: at most"),
        ("{{ range(10 ** 9) | list }}", "too many elements"),
    ];

    fn refused_by(source: &str, limit: &str) {
        let error = render(source).unwrap_err().to_string();
        let beginning = &source[..source.len().min(80)];
        assert!(error.contains(limit), "{beginning}: {error}");
    }

    #[test]
    fn a_template_without_end_is_refused_by_the_limit_it_passes() {
        for (source, limit) in UNBOUNDED {
            refused_by(source, limit);
        }
    }

    #[test]
    fn a_template_too_large_to_compile_is_refused() {
        let operators = "1".to_string() + &"+1".repeat(50_000);
        let branches = "{% if 0 %}".to_string() + &"{% elif 0 %}".repeat(50_000) + "{% endif %}";
        let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(2000), ")".repeat(2000));
        refused_by(&format!("{{{{ {operators} }}}}"), "at most 4096 operators");
        refused_by(&branches, "at most 1024 `elif`");
        refused_by(&"x".repeat(2 << 20), "at most 1048576 bytes");
        refused_by(&brackets, "recursion limits");
        assert!(render(&format!("{{{{ {}1 }}}}", "1 + ".repeat(2000))).is_ok());
    }

    #[test]
    fn printed_tokens_that_nothing_defines_are_named() {
        let template = compiled(
            "{{ bos_token }}{{ eos_token }}{% if pad_token is defined %}{{ a.b_token }}{% endif %}{% set my_token = 1 %}{{ my_token }}",
        );
        let template = template.unwrap();
        assert_eq!(
            template.undefined_tokens().collect::<Vec<_>>(),
            ["bos_token"]
        );
    }
}
