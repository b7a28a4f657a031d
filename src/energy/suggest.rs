//! Suggestions for an unknown name.

/// The names most similar to `text` by Jaro-Winkler distance, best first, at most five.
pub(crate) fn near_matches<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = text.to_lowercase();
    let similarity = |name: &str| {
        let name = name.to_lowercase();
        let contained = name.contains(&wanted) || wanted.contains(&name);
        strsim::jaro_winkler(&wanted, &name) + if contained { 0.2 } else { 0.0 }
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
pub(crate) fn did_you_mean(near: &[&str], otherwise: &str) -> String {
    if near.is_empty() {
        return otherwise.to_string();
    }
    let quoted: Vec<String> = near.iter().map(|name| format!("`{name}`")).collect();
    format!("did you mean {}? {otherwise}", quoted.join(", "))
}
