//! Jinja source as jinja2 reads it -> source that minijinja reads alike.
//!
//! Takes a chat template's text, returns text for minijinja: line ends and string escapes as in Python, the operator `%` as a filter,
//! dictionary methods as attributes, `{% generation %}` tags as sentinels. Owns the limits of a template's size. Evaluates nothing.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;

use crate::error::{Error, Kind, Result};

/// Longest template, in bytes; published ones have up to 30,000.
const MAX_BYTES: usize = 1 << 20;
/// Most tokens in one tag: minijinja compiles nested operators by recursion.
const MAX_TAG_TOKENS: usize = 4096;
/// Most `elif` tags: minijinja parses them by recursion.
const MAX_ELIF: usize = 1024;

/// Filter of the operator `%`.
pub(super) const MODULO: &str = "python_modulo";
/// Filter of a dictionary's method that is read, not called.
pub(super) const ATTRIBUTE: &str = "python_attribute";
/// Filter of what is assigned to an attribute of a namespace.
pub(super) const BOUNDED: &str = "bounded";
/// Methods of a dictionary that the sandbox of jinja2 allows.
const DICT_METHODS: [&str; 5] = ["items", "keys", "values", "get", "copy"];
/// Keywords that end the left operand of `%`.
const KEYWORDS: [&str; 14] = [
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "for",
    "set",
    "with",
    "call",
    "filter",
    "recursive",
];

/// Python's escapes of one character, a line end among them.
const ESCAPES: [(char, &str); 11] = [
    ('\n', ""),
    ('\\', "\\"),
    ('\'', "'"),
    ('"', "\""),
    ('a', "\x07"),
    ('b', "\x08"),
    ('f', "\x0c"),
    ('n', "\n"),
    ('r', "\r"),
    ('t', "\t"),
    ('v', "\x0b"),
];

/// A translated template.
#[derive(Debug, Default)]
pub(super) struct Translated {
    /// Source for minijinja.
    pub text: String,
    /// Whether it has `{% generation %}` tags.
    pub generation: bool,
    /// Variables named `*_token` that `{{ }}` tags use without testing them.
    pub printed_tokens: BTreeSet<String>,
}

#[derive(Debug, Clone)]
struct Token<'a> {
    /// White space before it.
    space: &'a str,
    text: Cow<'a, str>,
}

/// Translates `source`, with the texts `open` and `close` around what `{% generation %}` blocks print.
///
/// # Errors
/// `Kind::Tokenizer` where the template is longer, or a tag or an `if` has more parts, than the limits.
pub(super) fn translate(source: &str, open: &str, close: &str) -> Result<Translated> {
    if source.len() > MAX_BYTES {
        return Err(too_large("bytes", source.len(), MAX_BYTES));
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = Translated::default();
    let mut rest = source.as_str();
    let mut elifs = 0;
    while let Some(start) = find_tag(rest) {
        out.text.push_str(&rest[..start]);
        rest = &rest[start..];
        let Some((tokens, tail)) = tokens_of(rest)? else {
            // A comment, or a tag without an end: minijinja names the fault.
            let (comment, tail) = rest.split_at(comment_length(rest));
            out.text.push_str(comment);
            rest = tail;
            continue;
        };
        let tag = &rest[..rest.len() - tail.len()];
        let is_block = tag.starts_with("{%");
        let words: Vec<&str> = tokens.iter().map(|token| &*token.text).take(2).collect();
        rest = tail;
        match (is_block, words.as_slice()) {
            (true, ["raw"]) => rest = out.copy_raw(tag, tail),
            (true, ["generation"]) => {
                out.generation = true;
                out.print(tag, "if true", open, "with");
            }
            (true, ["endgeneration"]) => out.print(tag, "endwith", close, "endif"),
            (_, words) => {
                elifs += usize::from(is_block && words.first() == Some(&"elif"));
                if elifs > MAX_ELIF {
                    return Err(too_large("`elif` tags", elifs, MAX_ELIF));
                }
                out.rewrite(tag, tokens, is_block);
            }
        }
    }
    out.text.push_str(rest);
    Ok(out)
}

impl Translated {
    /// Copies a raw block of the tag `tag`; returns the text after the block.
    fn copy_raw<'a>(&mut self, tag: &str, tail: &'a str) -> &'a str {
        static END: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"\{%[-+]?\s*endraw\s*[-+]?%\}").expect("a fixed pattern"));
        self.text.push_str(tag);
        // jinja2 keeps the line end after this tag, minijinja does not.
        if !tag.ends_with("-%}") && tail.starts_with('\n') {
            self.text.push('\n');
        }
        let end = END.find(tail).map_or(tail.len(), |end| end.end());
        self.text.push_str(&tail[..end]);
        &tail[end..]
    }

    /// The tags `before` and `after` with `printed` between them, with the white space controls of `tag`.
    fn print(&mut self, tag: &str, before: &str, printed: &str, after: &str) {
        let (left, right) = controls(tag);
        self.text +=
            &format!("{{%{left} {before} %}}{{{{ \"{printed}\" }}}}{{% {after} {right}%}}");
    }

    /// A tag of `tokens`, rewritten for minijinja.
    fn rewrite(&mut self, tag: &str, tokens: Vec<Token<'_>>, is_block: bool) {
        if !is_block {
            self.printed_tokens.extend(printed_tokens(&tokens));
        }
        let (left, right) = controls(tag);
        self.text += &tag[..2];
        self.text += left;
        for token in rewritten(tokens, is_block) {
            self.text += token.space;
            self.text += &token.text;
        }
        self.text += &format!(" {right}{}", if is_block { "%}" } else { "}}" });
    }
}

fn too_large(unit: &str, count: usize, limit: usize) -> Error {
    Error::new(
        Kind::Tokenizer,
        "the chat template is larger than any honest one",
    )
    .value(format!("{count} {unit}"))
    .rule(format!("limit: at most {limit} {unit}"))
    .hint("use the chat template that the model's publisher gives")
}

fn find_tag(text: &str) -> Option<usize> {
    let mut starts = text.match_indices('{').map(|(at, _)| at);
    starts.find(|at| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')))
}

/// The bytes of a comment, or of all of `text` if it is an unfinished tag.
fn comment_length(text: &str) -> usize {
    let end = text.strip_prefix("{#").and_then(|body| body.find("#}"));
    end.map_or(text.len(), |end| end + 4)
}

/// The white space controls of a tag.
fn controls(tag: &str) -> (&'static str, &'static str) {
    let control = |at: usize| match tag.as_bytes()[at] {
        b'-' => "-",
        b'+' => "+",
        _ => "",
    };
    (control(2), control(tag.len() - 3))
}

/// The tokens of the tag at the start of `text`, and the text after the tag; `None` for a comment and an unfinished tag.
fn tokens_of(text: &str) -> Result<Option<(Vec<Token<'_>>, &str)>> {
    let end = match &text[..2] {
        "{{" => "}}",
        "{%" => "%}",
        _ => return Ok(None),
    };
    let (mut at, mut depth) = (2, 0_usize);
    at += usize::from(matches!(text.as_bytes().get(2), Some(b'-' | b'+')));
    let mut tokens = Vec::new();
    loop {
        let body = &text[at..];
        let space = &body[..body.len() - body.trim_start().len()];
        let body = &body[space.len()..];
        if body.is_empty() {
            return Ok(None);
        }
        let unsigned = body.strip_prefix(['-', '+']).unwrap_or(body);
        if depth == 0
            && let Some(tail) = body
                .strip_prefix(end)
                .or_else(|| unsigned.strip_prefix(end))
        {
            return Ok(Some((tokens, tail)));
        }
        let Some(length) = token_length(body) else {
            return Ok(None);
        };
        match &body[..length] {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        let text = unescaped(&body[..length]);
        tokens.push(Token { space, text });
        if tokens.len() > MAX_TAG_TOKENS {
            let limit = MAX_TAG_TOKENS;
            return Err(too_large(
                "operators and operands in one tag",
                tokens.len(),
                limit,
            ));
        }
        at += space.len() + length;
    }
}

/// The bytes of the token at the start of `text`; `None` for a string without an end.
fn token_length(text: &str) -> Option<usize> {
    let first = text.chars().next()?;
    if first == '\'' || first == '"' {
        let mut escaped = false;
        for (at, c) in text.char_indices().skip(1) {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                c if c == first => return Some(at + 1),
                _ => {}
            }
        }
        return None;
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    if is_word(first) {
        return Some(text.find(|c| !is_word(c)).unwrap_or(text.len()));
    }
    let two = ["//", "**", "==", "!=", ">=", "<="];
    if two.iter().any(|operator| text.starts_with(operator)) {
        return Some(2);
    }
    Some(first.len_utf8())
}

/// A string with the escapes of Python's literals, as a literal without any but `\\` and `\'`; other tokens as they are.
fn unescaped(token: &str) -> Cow<'_, str> {
    if !token.starts_with(['\'', '"']) || !token.contains('\\') {
        return Cow::Borrowed(token);
    }
    let mut out = String::from("'");
    let mut rest = &token[1..token.len() - 1];
    while let Some(at) = rest.find('\\') {
        push_quoted(&mut out, &rest[..at]);
        let escape = &rest[at + 1..];
        match (escaped_text(escape), escape.chars().next()) {
            (Some((text, length)), _) => {
                push_quoted(&mut out, &text);
                rest = &escape[length..];
            }
            // Surrogates: minijinja joins or refuses them.
            (None, Some('u')) => return Cow::Borrowed(token),
            // Names of characters and malformed escapes: minijinja refuses this one.
            (None, Some('N' | 'x' | 'U')) => return Cow::Borrowed("'\\x'"),
            // No escape of Python's: the backslash stays.
            (None, _) => {
                push_quoted(&mut out, "\\");
                rest = escape;
            }
        }
    }
    push_quoted(&mut out, rest);
    out.push('\'');
    Cow::Owned(out)
}

fn push_quoted(out: &mut String, text: &str) {
    for c in text.chars() {
        if matches!(c, '\\' | '\'') {
            out.push('\\');
        }
        out.push(c);
    }
}

/// What the escape at the start of `text`, after its backslash, stands for, and its bytes.
fn escaped_text(text: &str) -> Option<(Cow<'static, str>, usize)> {
    let escape = text.chars().next()?;
    if let Some((_, meaning)) = ESCAPES.iter().find(|(name, _)| *name == escape) {
        return Some((Cow::Borrowed(meaning), 1));
    }
    let octal = text.chars().take(3).take_while(|c| c.is_digit(8)).count();
    let (digits, radix) = match escape {
        'x' => (1..3, 16),
        'u' => (1..5, 16),
        'U' => (1..9, 16),
        '0'..='7' => (0..octal, 8),
        _ => return None,
    };
    let code = u32::from_str_radix(text.get(digits.clone())?, radix).ok()?;
    let character = char::from_u32(code)?;
    Some((Cow::Owned(character.to_string()), digits.end))
}

fn printed_tokens<'a>(tokens: &'a [Token<'_>]) -> impl Iterator<Item = String> + 'a {
    let text = |at: usize| tokens.get(at).map_or("", |token| &*token.text);
    let is_printed = move |at: &usize| {
        text(*at).ends_with("_token")
            && !text(*at).starts_with(['\'', '"'])
            && (*at == 0 || text(at - 1) != ".")
            && !matches!(text(at + 1), "is" | "=")
    };
    (0..tokens.len())
        .filter(is_printed)
        .map(move |at| text(at).to_string())
}

fn rewritten(mut tokens: Vec<Token<'_>>, is_block: bool) -> Vec<Token<'_>> {
    let is_set = is_block && tokens.first().is_some_and(|token| token.text == "set");
    let target = if is_set {
        let assign = tokens.iter().position(|token| token.text == "=");
        assign.unwrap_or(tokens.len())
    } else {
        0
    };
    let has_dot = tokens[..target].iter().any(|token| token.text == ".");
    if has_dot && target < tokens.len() {
        tokens.insert(target + 1, token(" ("));
        tokens.extend([token(")|"), token(BOUNDED)]);
    }
    replace_method_attributes(&mut tokens, target);
    replace_modulo(&mut tokens);
    tokens
}

fn token(text: &str) -> Token<'_> {
    Token {
        space: "",
        text: Cow::Borrowed(text),
    }
}

/// `a.items` and `a['items']`, not called: Python finds the method as well as the key.
fn replace_method_attributes(tokens: &mut Vec<Token<'_>>, from: usize) {
    let text = |tokens: &[Token<'_>], at: usize| {
        tokens
            .get(at)
            .map_or(String::new(), |token| token.text.to_string())
    };
    for at in from.max(1)..tokens.len() {
        let (name, length) = match tokens[at].text.as_ref() {
            "." => (text(tokens, at + 1), 2),
            "[" if text(tokens, at + 2) == "]" && is_operand_end(&text(tokens, at - 1)) => {
                (text(tokens, at + 1).replace(['\'', '"'], ""), 3)
            }
            _ => continue,
        };
        let next = text(tokens, at + length);
        let is_quoted = text(tokens, at + 1).starts_with(['\'', '"']);
        let is_method = DICT_METHODS.contains(&name.as_str()) && is_quoted == (length == 3);
        if is_method && !matches!(next.as_str(), "(" | "." | "[") {
            let call = format!("|{ATTRIBUTE}('{name}', {is_quoted})");
            tokens[at].text = Cow::Owned(call);
            for token in &mut tokens[at + 1..at + length] {
                token.text = Cow::Borrowed("");
            }
        }
    }
    tokens.retain(|token| !token.text.is_empty());
}

/// `left % right` -> `(left)|python_modulo(right)`: minijinja's operator takes no strings.
fn replace_modulo(tokens: &mut Vec<Token<'_>>) {
    let mut from = 0;
    while let Some(at) = tokens[from..].iter().position(|token| token.text == "%") {
        let at = from + at;
        let start = operand_start(tokens, at);
        let end = operand_end(tokens, at + 1);
        if start == at || end == at + 1 {
            return;
        }
        tokens.insert(end, token(")"));
        tokens[at].text = Cow::Owned(format!(")|{MODULO}("));
        tokens.insert(start, token(" ("));
        from = at + 2;
    }
}

fn is_operand_end(text: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || "_'\")]}".contains(c);
    text.ends_with(is_word) && !KEYWORDS.contains(&text)
}

/// The first token of the product that ends before `at`.
fn operand_start(tokens: &[Token<'_>], at: usize) -> usize {
    let mut depth = 0_usize;
    for i in (0..at).rev() {
        match &*tokens[i].text {
            ")" | "]" | "}" => depth += 1,
            "(" | "[" | "{" | " (" if depth == 0 => return i + 1,
            "(" | "[" | "{" | " (" => depth -= 1,
            text if depth == 0 => {
                let is_lower = ["~", "==", "!=", "<", ">", "<=", ">=", ",", ":", "="];
                let is_binary =
                    ["+", "-"].contains(&text) && i > 0 && is_operand_end(&tokens[i - 1].text);
                if is_binary || is_lower.contains(&text) || KEYWORDS.contains(&text) {
                    return i + 1;
                }
            }
            _ => {}
        }
    }
    0
}

/// The token after the operand that begins at `at`: signs, a value, what is called, indexed, filtered or raised on it.
fn operand_end(tokens: &[Token<'_>], at: usize) -> usize {
    let text = |i: usize| tokens.get(i).map_or("", |token| &*token.text);
    let mut i = at;
    loop {
        while matches!(text(i), "-" | "+") {
            i += 1;
        }
        i = after_group(tokens, i);
        loop {
            match text(i) {
                "." | "|" => i += 2,
                "(" | "[" => i = after_group(tokens, i),
                next if next.starts_with(['\'', '"']) => i += 1,
                _ => break,
            }
        }
        if text(i) != "**" {
            return i.min(tokens.len());
        }
        i += 1;
    }
}

/// The token after the bracketed group, or after the single token, at `at`.
fn after_group(tokens: &[Token<'_>], at: usize) -> usize {
    let mut depth = 0_usize;
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match &*token.text {
            "(" | "[" | "{" | " (" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}
