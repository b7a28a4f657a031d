//! The little YAML a model card needs: double-quoted strings and plain decimal numbers.
//!
//! Owns the quoting. Takes any text or finite number, returns what YAML 1.1 and 1.2 readers give back unchanged: `no`,
//! `24_700_000`, a colon or a line feed stay strings, a small number stays a number. Knows nothing of cards.

use std::fmt::Write;

/// `text` as a double-quoted scalar; what YAML calls not printable is escaped.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            _ if is_plain(c) => out.push(c),
            // All that is not plain lies in the basic plane.
            _ => write!(out, "\\u{:04X}", u32::from(c)).expect("writing to a String never fails"),
        }
    }
    out.push('"');
    out
}

/// YAML's `c-printable` (YAML 1.2.2, section 5.1) without line separators and the byte order mark, which readers fold or strip.
fn is_plain(c: char) -> bool {
    matches!(c, ' '..='~' | '\u{A0}'..='\u{2027}' | '\u{202A}'..='\u{D7FF}' | '\u{E000}'..='\u{FEFE}' | '\u{FF00}'..='\u{FFFD}'
        | '\u{10000}'..='\u{10FFFF}')
}

/// A finite number as plain decimals: YAML 1.1 reads `1e-5` as a string. `None` where it is not finite.
pub fn number(value: f64) -> Option<String> {
    value.is_finite().then(|| format!("{value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_survive() {
        // A JSON string is the same subset: serde_json is the other reader.
        for text in [
            "no",
            "24_700_000",
            "a: b #c",
            "two\nlines\r\n\ttab",
            "\"quoted\" \\",
            "\u{85}\u{2028}\u{FEFF}\u{7F}\u{1}",
            "é😀",
        ] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
        }
        assert_eq!(quoted("\u{85}x\u{1}"), "\"\\u0085x\\u0001\"");
    }

    proptest::proptest! {
        #[test]
        fn any_string_survives(text: String) {
            let quoted = quoted(&text);
            proptest::prop_assert!(!quoted.contains(char::is_control));
            proptest::prop_assert_eq!(serde_json::from_str::<String>(&quoted).unwrap(), text);
        }
    }

    #[test]
    fn numbers_are_plain_decimals() {
        assert_eq!(number(24_700_000.0).unwrap(), "24700000");
        assert_eq!(number(0.000_012_5).unwrap(), "0.0000125");
        assert_eq!(number(f64::NAN), None);
    }
}
