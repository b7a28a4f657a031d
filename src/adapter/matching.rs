//! PEFT's rules for naming modules: lists, regular expressions, layer numbers, patterns.
//!
//! Takes a setting and a module's path; returns whether they match. The rules are those of peft 0.21.2
//! (`tuners/tuners_utils.py: check_target_module_exists`, `utils/other.py: get_pattern_key`). Knows nothing of models or of the
//! use of a match.

use fancy_regex::Regex;

use crate::error::{Error, Kind, Result};

use super::options::Targets;

/// Whether `path` is `name` or ends with `.name`.
pub fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// A regular expression that must match a whole path: Python's `re.fullmatch`.
pub fn fullmatch(pattern: &str, key: &str) -> Result<Regex> {
    // Alone first: `a)(b` would compile inside the group.
    compile(pattern, key)?;
    compile(&format!(r"\A(?:{pattern})\z"), key)
}

/// A key of `rank_pattern` or `alpha_pattern`: the path's end from a dot or the start on, `re.match(r"(.*\.)?(KEY)$", path)`.
pub enum KeyPattern {
    /// A key of names and dots, as most are, from its end: compared without a regular expression.
    Plain(Vec<KeyChar>),
    /// Any other key.
    Regex(Regex),
}

/// A character of a plain key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyChar {
    /// This character.
    Is(char),
    /// A dot: any character but a line's end.
    Any,
}

impl KeyPattern {
    /// Compiles the key `pattern` of the setting `key`.
    pub fn new(pattern: &str, key: &str) -> Result<Self> {
        if let Some(plain) = plain_key(pattern) {
            return Ok(Self::Plain(plain));
        }
        compile(pattern, key)?;
        Ok(Self::Regex(compile(
            &format!(r"\A(.*\.)?({pattern})$"),
            key,
        )?))
    }

    /// Whether it matches `path`.
    pub fn matches(&self, path: &str) -> Result<bool> {
        let plain = match self {
            Self::Regex(regex) => return matches(regex, path),
            Self::Plain(plain) => plain,
        };
        let mut rest = path.chars().rev();
        let equal = plain.iter().all(|wanted| {
            rest.next().is_some_and(|char| match wanted {
                KeyChar::Is(wanted) => char == *wanted,
                KeyChar::Any => char != '\n',
            })
        });
        Ok(equal && rest.next().is_none_or(|before| before == '.'))
    }
}

/// The characters of a key of letters, digits, `_`, `-`, `.` and `\.`, last first; `None` for any other.
fn plain_key(pattern: &str) -> Option<Vec<KeyChar>> {
    let mut chars = pattern.chars();
    let mut plain = Vec::with_capacity(pattern.len());
    while let Some(char) = chars.next() {
        plain.push(match char {
            '.' => KeyChar::Any,
            '\\' => KeyChar::Is(chars.next().filter(|escaped| *escaped == '.')?),
            _ if char.is_ascii_alphanumeric() || matches!(char, '_' | '-') => KeyChar::Is(char),
            _ => return None,
        });
    }
    plain.reverse();
    (!plain.is_empty()).then_some(plain)
}

fn compile(pattern: &str, key: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|source| {
        Error::new(Kind::Adapter, format!("`{key}` holds no valid regular expression: {source}"))
            .value(format!("`{pattern}`"))
            .rule("Python's regular expression syntax")
            .hint("write module names as a list, as in `target_modules = [\"q_proj\", \"v_proj\"]`, to match them literally")
    })
}

/// Whether `regex` matches `path`. An expression that backtracks without end is an error.
pub fn matches(regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(|source| {
        Error::new(
            Kind::Adapter,
            format!("a regular expression cannot be decided: {source}"),
        )
        .at(format!("module `{path}`"))
        .value(format!("`{}`", regex.as_str()))
        .hint("simplify the expression: no repetition inside a repetition")
    })
}

/// The value of the first pattern that matches `path`.
pub fn first_match<T: Copy>(patterns: &[(KeyPattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Compiled `target_modules` or `exclude_modules`.
pub enum Matcher<'a> {
    /// Every module; the caller leaves the output embedding out.
    All,
    /// Paths and suffixes.
    Names(&'a [String]),
    /// A full path.
    Whole(Regex),
}

/// How a path matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatchKind {
    /// No match.
    None,
    /// Equal to a listed name: the layer filter does not apply.
    ExactPath,
    /// Ends with a listed name.
    Suffix,
    /// Matched by a regular expression or `all-linear`.
    Pattern,
}

impl<'a> Matcher<'a> {
    /// Compiles `targets`; `key` is the setting's name, for errors.
    pub fn new(targets: &'a Targets, key: &str) -> Result<Self> {
        Ok(match targets {
            Targets::AllLinear => Self::All,
            Targets::Names(names) => Self::Names(names),
            Targets::Regex(pattern) => Self::Whole(fullmatch(pattern, key)?),
        })
    }

    /// How `path` matches.
    pub fn find(&self, path: &str) -> Result<MatchKind> {
        Ok(match self {
            Self::All => MatchKind::Pattern,
            Self::Names(names) if names.iter().any(|name| name == path) => MatchKind::ExactPath,
            Self::Names(names) if names.iter().any(|name| is_suffix(path, name)) => {
                MatchKind::Suffix
            }
            Self::Names(_) => MatchKind::None,
            Self::Whole(regex) if matches(regex, path)? => MatchKind::Pattern,
            Self::Whole(_) => MatchKind::None,
        })
    }
}

/// The compiled `layers_pattern` of `layers_to_transform`.
pub struct LayerFilter {
    /// Expressions with a group `idx`; the first that matches gives the number.
    patterns: Vec<Regex>,
}

impl LayerFilter {
    /// Compiles the names of the module lists that hold layers; none: the first list in a path.
    pub fn new(layers_pattern: &[String]) -> Result<Self> {
        let patterns = if layers_pattern.is_empty() {
            // The first number, not the last: `layers.1.experts.0` is layer 1.
            vec![compile(
                r"\A.*?\.[^.]*\.(?P<idx>\d+)\.",
                "layers_to_transform",
            )?]
        } else {
            let one = |name: &String| {
                compile(
                    &format!(r"\A(?:^|.*?\.){name}\.(?P<idx>\d+)\."),
                    "layers_pattern",
                )
            };
            layers_pattern.iter().map(one).collect::<Result<_>>()?
        };
        Ok(Self { patterns })
    }

    /// The number of the layer that contains `path`, if any.
    pub fn index(&self, path: &str) -> Result<Option<usize>> {
        for regex in &self.patterns {
            let captures = regex.captures(path).map_err(|source| {
                Error::new(
                    Kind::Adapter,
                    format!("`layers_pattern` cannot be decided: {source}"),
                )
                .at(format!("module `{path}`"))
            })?;
            if let Some(found) = captures {
                // The first pattern that matches decides, even where its number is too large to be one.
                return Ok(found.name("idx").and_then(|idx| idx.as_str().parse().ok()));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suffix_starts_after_a_dot() {
        assert!(is_suffix("model.layers.1.mlp.up_proj", "up_proj"));
        assert!(is_suffix("model.layers.1.mlp.up_proj", "mlp.up_proj"));
        assert!(is_suffix("up_proj", "up_proj"));
        assert!(!is_suffix("model.layers.1.mlp.up_proj", "proj"));
        assert!(!is_suffix("model.layers.11.x", "1.x"));
    }

    #[test]
    fn a_whole_match_tries_every_alternative() {
        let regex = fullmatch("up|up_proj", "target_modules").unwrap();
        assert!(matches(&regex, "up_proj").unwrap());
        assert!(!matches(&regex, "up_projection").unwrap());
        assert!(!matches(&regex, "x.up").unwrap());
        assert!(fullmatch("a)(b", "target_modules").is_err());
    }

    #[test]
    fn an_endless_expression_is_an_error_not_a_hang() {
        let regex = fullmatch(r"(a*)*(?=c)\1b", "target_modules").unwrap();
        let error = matches(&regex, &"a".repeat(64)).unwrap_err();
        assert_eq!(error.kind(), Kind::Adapter);
    }

    #[test]
    fn the_first_number_is_the_layer() {
        let layers = LayerFilter::new(&[]).unwrap();
        assert_eq!(
            layers.index("model.layers.12.experts.0.w1").unwrap(),
            Some(12)
        );
        assert_eq!(layers.index("lm_head").unwrap(), None);
        // No parent before the list: PEFT's expression wants two segments before the number.
        assert_eq!(layers.index("h.3.attn").unwrap(), None);
        assert_eq!(
            LayerFilter::new(&["h".into()])
                .unwrap()
                .index("h.3.attn")
                .unwrap(),
            Some(3)
        );
    }
}
