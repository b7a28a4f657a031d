//! Methods, operators and filters of Python's values in chat templates, beyond those of minijinja's `pycompat`.
//!
//! Takes a value, a method's name and its arguments, returns the value that Python gives. A method that is missing here and there
//! is an error that names it. Knows nothing of conversations.

use std::sync::LazyLock;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;

/// Deepest value that a namespace may hold.
const MAX_DEPTH: usize = 64;
/// Widest field of a formatted value and widest padding, in characters.
const MAX_WIDTH: usize = 10_000;

type Result<T> = std::result::Result<T, Error>;

pub(super) fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// Calls `method` of `value`.
pub(super) fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value> {
    let found = match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => string_method(text, method, args)?,
            None => None,
        },
        ValueKind::Map if method == "get" => {
            let (_, _): (Value, Option<Value>) = from_args(args)?;
            None
        }
        ValueKind::Map if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, args)?,
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>> {
    let result = match method {
        "split" | "rsplit" => split(text, method == "rsplit", args)?,
        "partition" | "rpartition" => partition(text, method, args)?,
        "find" | "rfind" | "index" | "rindex" => find(text, method, args)?,
        "startswith" | "endswith" => has_affix(text, method, args)?,
        "removeprefix" | "removesuffix" | "strip" | "lstrip" | "rstrip" => {
            trim(text, method, args)?
        }
        "count" => count(text, args)?,
        "splitlines" => split_lines(text, args)?,
        "isspace" | "isdigit" | "isdecimal" | "isnumeric" => consists_of(text, method, args)?,
        "title" | "swapcase" => recase(text, method, args)?,
        "center" | "ljust" | "rjust" | "zfill" => pad(text, method, args)?,
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            if let Some(item) = items.try_iter()?.find(|item| item.as_str().is_none()) {
                return Err(invalid(format!("join: {} is no string", item.kind())));
            }
            return Ok(None);
        }
        "format" => {
            check_widths(text)?;
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

fn count(text: &str, args: &[Value]) -> Result<Value> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (text, _) = range(text, start, end);
    Ok(Value::from(match part {
        "" => text.chars().count() + 1,
        part => text.matches(part).count(),
    }))
}

/// `isspace`, `isdigit` and its like.
fn consists_of(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let () = from_args(args)?;
    let is_space_wanted = method == "isspace";
    if !is_space_wanted && text.chars().any(|c| c.is_numeric() && !c.is_ascii()) {
        return Err(invalid(format!("{method} of a digit that is not ASCII")));
    }
    let fits = |c: char| match is_space_wanted {
        true => is_space(c),
        false => c.is_ascii_digit(),
    };
    Ok(Value::from(!text.is_empty() && text.chars().all(fits)))
}

fn recase(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let () = from_args(args)?;
    if method == "title" {
        return Ok(Value::from(title(text)));
    }
    let swap = |c: char| match c.is_uppercase() {
        true => c.to_lowercase().to_string(),
        false => c.to_uppercase().to_string(),
    };
    Ok(Value::from(text.chars().map(swap).collect::<String>()))
}

fn partition(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (separator,): (&str,) = from_args(args)?;
    let cut = match method {
        _ if separator.is_empty() => return Err(invalid("empty separator")),
        "partition" => text.split_once(separator),
        _ => text.rsplit_once(separator),
    };
    let parts = match cut {
        Some((before, after)) => [before, separator, after],
        None if method == "partition" => [text, "", ""],
        None => ["", "", text],
    };
    Ok(Tuple::from(parts.map(Value::from)).into())
}

fn trim(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (part,): (Option<&str>,) = from_args(args)?;
    let matches = |c: char| match part {
        Some(characters) => characters.contains(c),
        None => is_space(c),
    };
    let trimmed = match (method, part) {
        ("strip", _) => text.trim_matches(matches),
        ("lstrip", _) => text.trim_start_matches(matches),
        ("rstrip", _) => text.trim_end_matches(matches),
        (_, None) => return Err(Error::from(ErrorKind::MissingArgument)),
        ("removeprefix", Some(prefix)) => text.strip_prefix(prefix).unwrap_or(text),
        (_, Some(suffix)) => text.strip_suffix(suffix).unwrap_or(text),
    };
    Ok(Value::from(trimmed))
}

/// White space by Python's `str.isspace`.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value> {
    let (positional, named): (Rest<Value>, Kwargs) = from_args(args)?;
    let argument = |at: usize, name: &str| match positional.get(at) {
        Some(value) => Ok(Some(value.clone())),
        None => named.get::<Option<Value>>(name),
    };
    let separator = argument(0, "sep")?.filter(|value| !value.is_none());
    let limit = match argument(1, "maxsplit")? {
        Some(limit) => i64::try_from(limit)?,
        None => -1,
    };
    named.assert_all_used()?;
    if positional.len() > 2 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let pieces = usize::try_from(limit).map_or(usize::MAX, |limit| limit.saturating_add(1));
    let parts: Vec<&str> = match separator.as_ref().map(Value::as_str) {
        None => split_spaces(text, from_right, pieces),
        Some(None | Some("")) => {
            return Err(invalid("split: the separator is no string, or empty"));
        }
        Some(Some(separator)) if from_right => {
            let mut parts: Vec<&str> = text.rsplitn(pieces, separator).collect();
            parts.reverse();
            parts
        }
        Some(Some(separator)) => text.splitn(pieces, separator).collect(),
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn split_spaces(text: &str, from_right: bool, pieces: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = trim_near(text, from_right);
    while !rest.is_empty() {
        let cut = match from_right {
            _ if parts.len() + 1 >= pieces => None,
            true => rest
                .char_indices()
                .rfind(|(_, c)| is_space(*c))
                .map(|(at, c)| at + c.len_utf8()),
            false => rest.find(is_space),
        };
        let Some(at) = cut else {
            parts.push(rest);
            break;
        };
        let (before, after) = rest.split_at(at);
        let (part, others) = if from_right {
            (after, before)
        } else {
            (before, after)
        };
        parts.push(part);
        rest = trim_near(others, from_right);
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn trim_near(text: &str, from_right: bool) -> &str {
    match from_right {
        true => text.trim_end_matches(is_space),
        false => text.trim_start_matches(is_space),
    }
}

/// `text[start:end]` and the characters before it.
fn range(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    if start.is_none() && end.is_none() {
        return (text, 0);
    }
    let length = text.chars().count();
    let index = |at: i64| {
        let from_end = usize::try_from(at.unsigned_abs()).unwrap_or(usize::MAX);
        match at < 0 {
            true => length.saturating_sub(from_end),
            false => from_end.min(length),
        }
    };
    let start = start.map_or(0, index);
    let end = end.map_or(length, index).max(start);
    let byte = |at: usize| {
        text.char_indices()
            .nth(at)
            .map_or(text.len(), |(byte, _)| byte)
    };
    (&text[byte(start)..byte(end)], start)
}

fn find(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (text, skipped) = range(text, start, end);
    let found = match method.starts_with('r') {
        true => text.rfind(part),
        false => text.find(part),
    };
    match found {
        Some(at) => Ok(Value::from(text[..at].chars().count() + skipped)),
        None if method.ends_with("index") => Err(invalid("substring not found")),
        None => Ok(Value::from(-1)),
    }
}

fn has_affix(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (affix, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
    let (text, _) = range(text, start, end);
    let affixes = match affix.as_str() {
        Some(_) => vec![affix],
        None if affix.is_tuple() => affix.try_iter()?.collect(),
        None => {
            return Err(invalid(format!(
                "{method} takes a string or a tuple of strings"
            )));
        }
    };
    for affix in &affixes {
        let affix = affix
            .as_str()
            .ok_or_else(|| invalid(format!("{method} takes strings")))?;
        let has = match method {
            "startswith" => text.starts_with(affix),
            _ => text.ends_with(affix),
        };
        if has {
            return Ok(Value::from(true));
        }
    }
    Ok(Value::from(false))
}

fn split_lines(text: &str, args: &[Value]) -> Result<Value> {
    let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(named.get("keepends")?).unwrap_or(false);
    named.assert_all_used()?;
    let is_end = |c: char| "\n\r\x0b\x0c\x1c\x1d\x1e\u{85}\u{2028}\u{2029}".contains(c);
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = match &rest[at..] {
            line if line.starts_with("\r\n") => at + 2,
            line => at + line.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    lines.extend(Some(rest).filter(|rest| !rest.is_empty()));
    Ok(lines.into_iter().map(Value::from).collect())
}

/// Python's `str.title`: a capital after each character that is no letter.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        in_word = c.is_alphabetic();
    }
    out
}

fn pad(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    if width > MAX_WIDTH {
        return Err(too_wide());
    }
    let fill = match (method, fill.unwrap_or(" ")) {
        ("zfill", _) => "0",
        (_, fill) if fill.chars().count() == 1 => fill,
        _ => {
            return Err(invalid(
                "the fill character must be exactly one character long",
            ));
        }
    };
    let missing = width.saturating_sub(text.chars().count());
    let left = match method {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let sign = match method {
        "zfill" => text.len() - text.strip_prefix(['-', '+']).unwrap_or(text).len(),
        _ => 0,
    };
    let (sign, body) = text.split_at(sign);
    let right = fill.repeat(missing - left);
    Ok(Value::from(format!(
        "{sign}{}{body}{right}",
        fill.repeat(left)
    )))
}

fn too_wide() -> Error {
    invalid(format!(
        "a field is wider than the limit of {MAX_WIDTH} characters"
    ))
}

/// Refuses a format string with a width or precision of five digits and more, or one that is an argument.
fn check_widths(text: &str) -> Result<()> {
    static WIDE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*:[^{}]*\d{5}").expect("a fixed pattern")
    });
    match WIDE.is_match(text) {
        true => Err(too_wide()),
        false => Ok(()),
    }
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>> {
    match method {
        "index" => {
            let (wanted,): (Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == wanted);
            let at = at.ok_or_else(|| invalid(format!("{wanted} is not in the list")))?;
            Ok(Some(Value::from(at)))
        }
        "count" => {
            let (wanted,): (Value,) = from_args(args)?;
            let count = value.try_iter()?.filter(|item| *item == wanted).count();
            Ok(Some(Value::from(count)))
        }
        "copy" if !value.is_tuple() => {
            let () = from_args(args)?;
            Ok(Some(value.try_iter()?.collect()))
        }
        _ => Ok(None),
    }
}

/// The operator `%`: a string formatted, or the remainder with the divisor's sign.
pub(super) fn modulo(left: &Value, right: &Value) -> Result<Value> {
    if let Some(text) = left.as_str() {
        return format_with_percent(text, right).map(Value::from);
    }
    let unsupported = || {
        invalid(format!(
            "`%` takes a string or numbers, not {} and {}",
            left.kind(),
            right.kind()
        ))
    };
    let integers = i128::try_from(left.clone())
        .ok()
        .zip(i128::try_from(right.clone()).ok());
    match integers.filter(|_| left.is_integer() && right.is_integer()) {
        Some((_, 0)) => Err(invalid("modulo by zero")),
        Some((a, b)) => Ok(Value::from((a % b + b) % b)),
        None => {
            let float = |value: &Value| match value.is_number() {
                true => f64::try_from(value.clone()).map_err(|_| unsupported()),
                false => Err(unsupported()),
            };
            let (a, b) = (float(left)?, float(right)?);
            match b == 0.0 {
                true => Err(invalid("modulo by zero")),
                false => Ok(Value::from(a - (a / b).floor() * b)),
            }
        }
    }
}

fn format_with_percent(text: &str, right: &Value) -> Result<String> {
    check_widths(text)?;
    let arguments: Vec<Value> = match right.is_tuple() {
        true => right.try_iter()?.collect(),
        false => vec![right.clone()],
    };
    let fields = text.replace("%%", "");
    let expected = fields.matches('%').count();
    if right.kind() != ValueKind::Map && expected != arguments.len() {
        return Err(invalid(format!(
            "{} arguments for {expected} fields of a format string",
            arguments.len()
        )));
    }
    format(FormatStyle::Printf, text, &arguments)
}

/// `value.name` or `value['name']` where `name` is a method of dictionaries that is not called. As an attribute it is the method, and
/// as an item where there is no such key: something defined and true.
pub(super) fn attribute(value: &Value, name: &str, is_item: bool) -> Result<Value> {
    let item = value.get_attr(name);
    let is_dict = value.kind() == ValueKind::Map && !is_namespace(value);
    match item {
        Ok(item) if is_dict && (!is_item || item.is_undefined()) => Ok(Value::from_function(|| ())),
        item => item,
    }
}

/// jinja2's test `sequence`: what has a length and items.
pub(super) fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Seq => true,
        ValueKind::Map => !is_namespace(value),
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// jinja2's filter `escape`.
pub(super) fn escape(text: &str) -> String {
    let escapes = [
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("\"", "&#34;"),
        ("'", "&#39;"),
    ];
    escapes
        .iter()
        .fold(text.to_string(), |text, (from, to)| text.replace(from, to))
}

/// jinja2's filter `default(default_value='', boolean=false)`.
pub(super) fn default(value: Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value> {
    let argument = |at: usize, name: &str| match arguments.get(at) {
        Some(value) => Ok(Some(value.clone())),
        None => named.get::<Option<Value>>(name),
    };
    let other = argument(0, "default_value")?.unwrap_or_else(|| Value::from(""));
    let boolean = argument(1, "boolean")?.is_some_and(|boolean| boolean.is_true());
    named.assert_all_used()?;
    let is_kept = !value.is_undefined() && (!boolean || value.is_true());
    Ok(if is_kept { value } else { other })
}

fn is_namespace(value: &Value) -> bool {
    let object = value.as_object();
    object.is_some_and(|object| object.type_name().ends_with("Namespace"))
}

/// A value for an attribute of a namespace: lists as they are now, nested no deeper than the limit. Assignments in a loop could else
/// nest without end.
pub(super) fn bounded(state: &State, value: Value) -> Result<Value> {
    limited(state, value, MAX_DEPTH)
}

fn limited(state: &State, value: Value, depth: usize) -> Result<Value> {
    if depth == 0 {
        return Err(invalid(format!(
            "a value is nested deeper than the limit of {MAX_DEPTH}"
        )));
    }
    if is_namespace(&value) {
        return Err(invalid("a namespace cannot hold a namespace"));
    }
    let items = |value: &Value| -> Result<Vec<Value>> {
        let mut items = Vec::new();
        for item in value.try_iter()? {
            state.consume_fuel(1)?;
            items.push(limited(state, item, depth - 1)?);
        }
        Ok(items)
    };
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable if value.is_tuple() => {
            Ok(Tuple::from(items(&value)?).into())
        }
        ValueKind::Seq | ValueKind::Iterable => items(&value).map(Value::from),
        ValueKind::Map => {
            for key in value.try_iter()? {
                state.consume_fuel(1)?;
                limited(state, value.get_item(&key)?, depth - 1)?;
            }
            Ok(value)
        }
        _ => Ok(value),
    }
}
