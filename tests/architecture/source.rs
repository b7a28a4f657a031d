//! Rust source as text: comments and literals blanked, tests removed, functions measured.
//!
//! Takes a file's text and returns text of the same lines, so that every finding keeps its line number. Knows no rule of the
//! project, no file system and no macro expansion; a lexer for what `src/` holds, not a parser.

/// `text` with comments and the insides of string and character literals turned to spaces. Quotes and line ends stay.
pub fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if next(&chars, at) == Some('/') => line_end(&chars, at),
            '/' if next(&chars, at) == Some('*') => comment_end(&chars, at),
            '"' => string_end(&chars, at),
            'r' if !ends_a_word(&chars, at) => raw_string_end(&chars, at).unwrap_or(at + 1),
            '\'' => character_end(&chars, at).unwrap_or(at + 1),
            _ => at + 1,
        };
        let quoted = end - at > 1 && !matches!(chars[at], '/');
        for (i, &c) in chars[at..end].iter().enumerate() {
            let edge = quoted && (i == 0 || i == end - at - 1);
            let kept = end - at == 1 || c == '\n' || (edge && (c == '"' || c == '\''));
            out.push(if kept { c } else { ' ' });
        }
        at = end;
    }
    out
}

fn next(chars: &[char], at: usize) -> Option<char> {
    chars.get(at + 1).copied()
}

/// Whether the character at `at` goes on a word, as the `r` of `for` does. `b` and `c` may stand before a raw string.
fn ends_a_word(chars: &[char], at: usize) -> bool {
    let before = |back: usize| at.checked_sub(back).is_some_and(|i| is_word(chars[i]));
    before(1) && (before(2) || !matches!(chars[at - 1], 'b' | 'c'))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn line_end(chars: &[char], at: usize) -> usize {
    chars[at..]
        .iter()
        .position(|&c| c == '\n')
        .map_or(chars.len(), |n| at + n)
}

/// Block comments nest.
fn comment_end(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < chars.len() {
        match (chars[at], next(chars, at)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at.min(chars.len())
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// Past the end of `r"..."` or `r#"..."#`; `None` where the `r` starts something else, such as `r#type`.
fn raw_string_end(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |at: &usize| {
        chars[*at] == '"' && chars[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes
    };
    Some(
        (open + 1..chars.len())
            .find(closes)
            .map_or(chars.len(), |at| at + 1 + hashes),
    )
}

/// Past the end of `'x'` or `'\n'`; `None` for a lifetime.
fn character_end(chars: &[char], start: usize) -> Option<usize> {
    if next(chars, start)? == '\\' {
        return (start + 3..chars.len())
            .find(|&at| chars[at] == '\'')
            .map(|at| at + 1);
    }
    (chars.get(start + 2) == Some(&'\'')).then_some(start + 3)
}

/// Code without the items that only tests compile: `#[cfg(test)]` and its like, with what they stand on, turned to spaces.
pub fn without_tests(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(start) = rest.find("#[cfg(") {
        let (before, item) = rest.split_at(start);
        let condition = item.find(']').map_or(item.len(), |n| n + 1);
        let of_tests =
            has_word(&item[..condition], "test") && !item[..condition].contains("not(test)");
        let (item, after) = item.split_at(if of_tests {
            item_end(item, condition)
        } else {
            condition
        });
        out.push_str(before);
        out.extend(
            item.chars()
                .map(|c| if of_tests && c != '\n' { ' ' } else { c }),
        );
        rest = after;
    }
    out + rest
}

/// Past the `;` or the closing `}` of the item that begins at `at`, attributes before it included.
fn item_end(text: &str, at: usize) -> usize {
    let mut depth = 0;
    for (i, c) in text[at..].char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth -= 1;
                if depth < 0 || (depth == 0 && c == '}') {
                    return at + i + 1;
                }
            }
            ';' if depth == 0 => return at + i + 1,
            _ => {}
        }
    }
    text.len()
}

/// Every place where `word` stands whole in `text`, as (line from 1, the text after it).
pub fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    text.match_indices(word).filter_map(move |(at, _)| {
        let after = &text[at + word.len()..];
        let before_ok =
            !text[..at].chars().next_back().is_some_and(is_word) || !word.starts_with(is_word);
        let after_ok = !after.chars().next().is_some_and(is_word) || !word.ends_with(is_word);
        (before_ok && after_ok).then(|| (line(text, at), after))
    })
}

/// Whether `word` stands whole somewhere in `text`.
pub fn has_word(text: &str, word: &str) -> bool {
    words(text, word).next().is_some()
}

/// The line of byte `at`, from 1.
pub fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Every function with a body: its name, its first line and its number of lines, signature and braces included.
pub fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for (first, after) in words(code, "fn") {
        let name: String = after
            .trim_start()
            .chars()
            .take_while(|&c| is_word(c))
            .collect();
        let end = item_end(after, 0);
        if !name.is_empty() && after[..end].ends_with('}') {
            found.push((name, first, after[..end].matches('\n').count() + 1));
        }
    }
    found
}
