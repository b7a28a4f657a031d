//! Small pieces of text used in messages: hexadecimal digests, the nearest known name, a list cut to its first entries, text without
//! terminal escape sequences.

use std::borrow::Cow;
use std::fmt::Write;

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    let mut text = String::with_capacity(2 * bytes.as_ref().len());
    for byte in bytes.as_ref() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The candidate most similar to `word` by Jaro-Winkler, if its similarity is at least `threshold` (0 to 1). Case is ignored, and `-`
/// counts as `_`. Of equals the last one wins.
pub fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
    threshold: f64,
) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&word, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= threshold)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// The names most similar to `text`, best first, at most five: those that contain all its words
/// ("rtx4090" in "nvidia-rtx-4090"), and those near by Jaro-Winkler distance.
pub fn near_matches<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = text.to_lowercase();
    let words = wanted.split(|c: char| !c.is_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let similarity = |name: &str| {
        let name = name.to_lowercase();
        let squeezed = name.replace(|c: char| !c.is_alphanumeric(), "");
        let likeness = strsim::jaro_winkler(&wanted, &name);
        let has_words = !words.is_empty() && words.iter().all(|word| squeezed.contains(word));
        if has_words {
            0.8 + 0.4 * likeness
        } else if wanted.contains(&name) {
            likeness + 0.2
        } else {
            likeness
        }
    };
    let mut scored: Vec<(f64, &str)> = names
        .map(|name| (similarity(name), name))
        .filter(|(score, _)| *score > 0.75)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(5).map(|(_, name)| name).collect()
}

/// "did you mean `a`, `b`?" followed by `otherwise`; `otherwise` alone without a near match.
pub fn did_you_mean(near: &[&str], otherwise: &str) -> String {
    if near.is_empty() {
        return otherwise.to_string();
    }
    let quoted: Vec<String> = near.iter().map(|name| format!("`{name}`")).collect();
    format!("did you mean {}? {otherwise}", quoted.join(", "))
}

/// The local time; also of a clock that is set before 1970, at which `chrono::Local::now` panics.
pub fn local_time() -> chrono::DateTime<chrono::Local> {
    std::time::SystemTime::now().into()
}

/// The first `limit` items, followed by "and N more" if some are left out.
pub fn first_few(mut items: Vec<String>, limit: usize) -> Vec<String> {
    let more = items.len().saturating_sub(limit);
    items.truncate(limit);
    if more > 0 {
        items.push(format!("and {more} more"));
    }
    items
}

/// `text` with control characters other than line feed and tab written as escapes: names and records from elsewhere cannot send
/// escape sequences to the terminal.
pub fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if harmless(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_two_lower_case_digits_each() {
        assert_eq!(hex([0x00, 0x0f, 0xa0, 0xff]), "000fa0ff");
    }

    #[test]
    fn the_nearest_name_is_near_enough_or_none() {
        let names = ["lora_alpha", "lora_dropout", "r"];
        assert_eq!(nearest("Lora-Aplha", names, 0.85), Some("lora_alpha"));
        assert_eq!(nearest("temperature", names, 0.85), None);
    }

    #[test]
    fn names_are_found_by_their_words() {
        let names = [
            "nvidia-rtx-4090",
            "nvidia-a40",
            "intel-xeon-platinum-8592plus",
            "apple-m4-max",
        ];
        let found = |text: &str| near_matches(text, names.into_iter());
        for text in ["rtx4090", "RTX 4090", "4090", "nvidia_rtx_4090"] {
            assert_eq!(found(text)[0], "nvidia-rtx-4090", "{text}");
        }
        assert_eq!(found("xeon 8592+"), ["intel-xeon-platinum-8592plus"]);
        assert_eq!(found("m4max"), ["apple-m4-max"]);
        assert!(found("").is_empty() && found("toaster").is_empty());
    }

    #[test]
    fn a_long_list_says_how_many_it_leaves_out() {
        let items: Vec<String> = (1..=5).map(|n| n.to_string()).collect();
        assert_eq!(first_few(items.clone(), 5).len(), 5);
        assert_eq!(first_few(items, 3), ["1", "2", "3", "and 2 more"]);
    }

    #[test]
    fn control_characters_are_shown_and_not_sent() {
        assert_eq!(printable("a\tb\nc é"), "a\tb\nc é");
        let osc = "\u{1b}]0;title\u{7}x\r\u{9b}2J";
        assert_eq!(printable(osc), "\\u{1b}]0;title\\u{7}x\\r\\u{9b}2J");
    }
}
