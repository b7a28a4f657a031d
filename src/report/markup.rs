//! Text into HTML and SVG: what a model, a file or a recipe said is shown and never read as markup.
//!
//! Owns escaping. Takes any text, returns text that is well-formed between tags and inside double-quoted attributes, in HTML and
//! in XML. Control characters, which XML refuses, are left out. Knows nothing of pages or charts.

/// `text` as it stands, in HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            // Neither may stand in an XML document.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

/// [`escape`]d on one line, with what stands between two backticks as code.
pub fn inline(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts: Vec<&str> = line.split('`').collect();
    // An even number of parts means a backtick without its pair.
    if parts.len().is_multiple_of(2) {
        return escape(&line);
    }
    let part = |(index, part): (usize, &&str)| match index % 2 {
        0 => escape(part),
        _ => format!("<code>{}</code>", escape(part)),
    };
    parts.iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_opens_a_tag_or_ends_an_attribute() {
        assert_eq!(
            escape("<b class=\"x\">&'\u{1b}[2J\u{0}</b>"),
            "&lt;b class=&quot;x&quot;&gt;&amp;&#39;[2J&lt;/b&gt;"
        );
        assert_eq!(escape("a\n\tb"), "a\n\tb");
    }

    #[test]
    fn backticks_become_code_in_pairs_alone() {
        assert_eq!(
            inline("run `a<b` on `c`"),
            "run <code>a&lt;b</code> on <code>c</code>"
        );
        assert_eq!(inline("one ` alone\nhere"), "one ` alone here");
    }
}
