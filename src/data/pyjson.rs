//! JSON as Python's `json.dumps` writes it, for the filter `tojson` of chat templates.
//!
//! Takes a JSON value and `Style`, returns text equal to Python's byte for byte: `", "` and `": "` between items, floats as by
//! `repr`, non-ASCII unescaped unless `ensure_ascii`. Knows nothing of templates.

use std::fmt::Write;

use serde_json::Value;

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Clone, Default)]
pub(super) struct Style {
    /// What a level is indented by; `None` writes one line.
    pub indent: Option<String>,
    /// Between items and between key and value; Python's defaults where `None`.
    pub separators: Option<(String, String)>,
    /// Escape everything beyond ASCII.
    pub ensure_ascii: bool,
    /// Keys in code point order.
    pub sort_keys: bool,
    /// Where writing stops.
    pub max_bytes: usize,
}

/// Writes `value` as Python would; `None` where that takes more than `max_bytes`.
pub(super) fn dumps(value: &Value, style: &Style) -> Option<String> {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    (out.len() <= style.max_bytes).then_some(out)
}

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => match n.as_f64() {
            Some(f) if n.is_f64() => out.push_str(&python_float(f)),
            _ => out.push_str(&n.to_string()),
        },
        Value::String(s) => write_string(out, s, style.ensure_ascii),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| (None, item)).collect();
            write_items(out, ('[', ']'), &items, style, depth);
        }
        Value::Object(map) => {
            let mut items: Vec<_> = map
                .iter()
                .map(|(key, item)| (Some(key.as_str()), item))
                .collect();
            if style.sort_keys {
                items.sort_by_key(|(key, _)| *key);
            }
            write_items(out, ('{', '}'), &items, style, depth);
        }
    }
}

fn write_items(
    out: &mut String,
    (open, close): (char, char),
    items: &[(Option<&str>, &Value)],
    style: &Style,
    depth: usize,
) {
    let (between, colon) = match &style.separators {
        Some((between, colon)) => (between.as_str(), colon.as_str()),
        // Python drops the space after the comma when it indents.
        None if style.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    };
    out.push(open);
    for (i, (key, item)) in items.iter().enumerate() {
        if out.len() > style.max_bytes {
            return;
        }
        if i > 0 {
            out.push_str(between);
        }
        new_line(out, depth + 1);
        if let Some(key) = key {
            write_string(out, key, style.ensure_ascii);
            out.push_str(colon);
        }
        write_value(out, item, style, depth + 1);
    }
    if !items.is_empty() {
        new_line(out, depth);
    }
    out.push(close);
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("writing to a String cannot fail");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A float as Python's `repr`: the shortest digits that read back, an exponent below 1e-4 and from 1e16.
pub(super) fn python_float(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent
            .strip_prefix('-')
            .map_or(('+', exponent), |rest| ('-', rest));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    // Expected texts: printed by Python 3's json.dumps(value, ensure_ascii=False[, indent=2]).
    #[test]
    fn text_equals_pythons() {
        let value = json!({"a": [1, 2.0, 1e16, 1e-5, -0.0001], "é\u{1}": {"x": null, "y": []}, "t\"": true});
        let plain = "{\"a\": [1, 2.0, 1e+16, 1e-05, -0.0001], \"é\\u0001\": {\"x\": null, \"y\": []}, \"t\\\"\": true}";
        let style = |indent: Option<&str>| Style {
            indent: indent.map(str::to_string),
            max_bytes: 100,
            ..Style::default()
        };
        assert_eq!(dumps(&value, &style(None)).unwrap(), plain);
        assert_eq!(dumps(&json!([plain, plain]), &style(None)), None);
        assert_eq!(
            dumps(&json!({"a": [1, {}], "b": 2}), &style(Some("  "))).unwrap(),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": 2\n}"
        );
        let ascii = dumps(
            &json!({"b": "😀é", "a": 1}),
            &Style {
                ensure_ascii: true,
                sort_keys: true,
                ..style(None)
            },
        );
        assert_eq!(
            ascii.unwrap(),
            "{\"a\": 1, \"b\": \"\\ud83d\\ude00\\u00e9\"}"
        );
    }
}
