//! JSON as Python's `json.dumps` writes it, for the filter `tojson` of chat templates.
//!
//! Takes a JSON value and `Style`, returns text equal to Python's byte for byte: `", "` and `": "` between items, floats as by
//! `repr`, non-ASCII unescaped unless `ensure_ascii`. Knows nothing of templates.

use std::fmt::Write;

use serde_json::Value;

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Clone, Default)]
pub(super) struct Style {
    /// Spaces per level; `None` writes one line.
    pub indent: Option<usize>,
    /// Between items and between key and value; Python's defaults where `None`.
    pub separators: Option<(String, String)>,
    /// Escape everything beyond ASCII.
    pub ensure_ascii: bool,
    /// Keys in code point order.
    pub sort_keys: bool,
}

/// Writes `value` as Python would.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
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
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for (i, (key, item)) in items.iter().enumerate() {
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
            c if (c as u32) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
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
fn python_float(value: f64) -> String {
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
        assert_eq!(dumps(&value, &Style::default()), plain);
        let indented = dumps(
            &json!({"a": [1, {}], "b": 2}),
            &Style {
                indent: Some(2),
                ..Style::default()
            },
        );
        assert_eq!(
            indented,
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": 2\n}"
        );
        let ascii = dumps(
            &json!({"b": "😀é", "a": 1}),
            &Style {
                ensure_ascii: true,
                sort_keys: true,
                ..Style::default()
            },
        );
        assert_eq!(ascii, "{\"a\": 1, \"b\": \"\\ud83d\\ude00\\u00e9\"}");
    }
}
