//! Private-use characters that mark places of a conversation while a chat template renders it.
//!
//! Owns how a sentinel is written and read back. Knows nothing of templates.

// Sentinels are in the last private-use plane, which common scripts, emoji and icon fonts do not use.

/// Before a content.
pub(super) const OPEN: char = '\u{10FE00}';
/// After it.
pub(super) const CLOSE: char = '\u{10FE01}';
/// Before the name of a called function.
pub(super) const CALL: char = '\u{10FE02}';
/// Ends every sentinel, after its kind and the message's index in digits from `ZERO`.
const END: char = '\u{10FE03}';
/// Before reasoning.
pub(super) const REASONING: char = '\u{10FE04}';
const ZERO: u32 = 0x10FE10;
/// Where a `{% generation %}` block begins.
pub(super) const GENERATION_OPEN: &str = "\u{10FE00}\u{10FE03}";
/// Where it ends.
pub(super) const GENERATION_CLOSE: &str = "\u{10FE01}\u{10FE03}";

/// A sentinel found in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sentinel {
    /// `OPEN`, `CLOSE`, `CALL` or `REASONING`.
    pub kind: char,
    /// The message it belongs to; none for a `{% generation %}` block.
    pub message: Option<usize>,
    /// Byte offset in the stripped text.
    pub at: usize,
}

/// A sentinel of `message`.
pub(super) fn sentinel(kind: char, message: usize) -> String {
    let number = message.to_string();
    let digits = number
        .bytes()
        .map(|d| char::from_u32(ZERO + u32::from(d - b'0')).expect("a private-use character"));
    [kind].into_iter().chain(digits).chain([END]).collect()
}

/// Whether a character is reserved for sentinels.
pub(super) fn is_sentinel(c: char) -> bool {
    ('\u{10FE00}'..='\u{10FE1F}').contains(&c)
}

/// Removes the sentinels from `text`; `None` if one is malformed.
pub(super) fn strip(text: &str) -> Option<(String, Vec<Sentinel>)> {
    let (mut plain, mut sentinels) = (String::with_capacity(text.len()), Vec::new());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if !is_sentinel(c) {
            plain.push(c);
            continue;
        }
        if !matches!(c, OPEN | CLOSE | CALL | REASONING) {
            return None;
        }
        let mut message = None;
        loop {
            match chars.next()? {
                END => break,
                d if (ZERO..ZERO + 10).contains(&(d as u32)) => {
                    message = Some(
                        message.unwrap_or(0_usize).checked_mul(10)? + (d as u32 - ZERO) as usize,
                    );
                }
                _ => return None,
            }
        }
        sentinels.push(Sentinel {
            kind: c,
            message,
            at: plain.len(),
        });
    }
    Some((plain, sentinels))
}
