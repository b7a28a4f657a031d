//! The licence named in a model card's front matter.
//!
//! Owns that one look into `README.md`. Takes the text, returns the licence's name. Knows no other YAML than the three ways
//! in which the hub's cards write this key: a scalar, a list in brackets, a list of dashes.

/// The `license` of a model card; its `license_name` where that is `other`. `None` where the card names none.
pub(super) fn license(card: &str) -> Option<String> {
    let mut lines = card.trim_start_matches('\u{feff}').lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let head: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    match field(&head, "license")?.as_str() {
        "other" => field(&head, "license_name").or_else(|| Some("other".to_string())),
        license => Some(license.to_string()),
    }
}

/// The value of a top-level key; a list's items joined by commas.
fn field(head: &[&str], key: &str) -> Option<String> {
    let at = head.iter().position(|line| {
        line.strip_prefix(key)
            .is_some_and(|rest| rest.starts_with(':'))
    })?;
    let value = plain(&head[at][key.len() + 1..]);
    let items: Vec<String> = match value.strip_prefix('[') {
        Some(list) => list.trim_end_matches(']').split(',').map(plain).collect(),
        None if value.is_empty() => head[at + 1..]
            .iter()
            .map_while(|line| line.trim_start().strip_prefix("- "))
            .map(plain)
            .collect(),
        None => vec![value],
    };
    let items: Vec<String> = items.into_iter().filter(|item| !item.is_empty()).collect();
    (!items.is_empty()).then(|| items.join(", "))
}

/// A scalar without its comment and quotes.
fn plain(text: &str) -> String {
    let text = text.split(" #").next().unwrap_or_default().trim();
    text.trim_matches(['"', '\'']).to_string()
}

#[cfg(test)]
mod tests {
    use super::license;

    // The forms in the hub's documentation of model cards: a name, `other` with its own name, a list, none.
    #[test]
    fn the_licence_is_read_in_every_form_a_card_has() {
        let of = |card: &str| license(card);
        assert_eq!(
            of("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# X").as_deref(),
            Some("apache-2.0")
        );
        assert_eq!(
            of("---\nlicense: \"mit\" # fine\n---\n").as_deref(),
            Some("mit")
        );
        assert_eq!(
            of("---\nlicense: other\nlicense_name: qwen-research\n---\n").as_deref(),
            Some("qwen-research")
        );
        assert_eq!(of("---\nlicense: other\n---\n").as_deref(), Some("other"));
        assert_eq!(
            of("---\r\nlicense:\r\n- mit\r\n- cc-by-4.0\r\ntags: x\r\n---\r\n").as_deref(),
            Some("mit, cc-by-4.0")
        );
        assert_eq!(
            of("---\nlicense: [mit, apache-2.0]\n---\n").as_deref(),
            Some("mit, apache-2.0")
        );
        assert_eq!(of("---\ntags: [x]\n---\nlicense: mit\n"), None);
        assert_eq!(of("# X\nlicense: mit\n"), None);
        assert_eq!(
            of("---\nlicense_name: x\nlicense:\ntags:\n- y\n---\n"),
            None
        );
    }
}
