//! Metrics of generated text against a reference: ROUGE as rouge-score computes it (no stemming), BLEU as sacrebleu does
//! (tokenizer 13a, exponential smoothing).

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

/// Longest n-gram of BLEU.
const ORDER: usize = 4;

/// F1 of ROUGE-`n`, from 0 to 1.
pub fn rouge_n(said: &str, reference: &str, n: usize) -> f64 {
    let said = rouge_words(said);
    let reference = rouge_words(reference);
    let said = ngrams(&said, n);
    let reference = ngrams(&reference, n);
    let total = |counts: &HashMap<&[String], usize>| counts.values().sum::<usize>();
    f1(clipped(&said, &reference), total(&said), total(&reference))
}

/// F1 of ROUGE-L, by the longest common subsequence.
pub fn rouge_l(said: &str, reference: &str) -> f64 {
    let said = rouge_words(said);
    let reference = rouge_words(reference);
    let mut row = vec![0; reference.len() + 1];
    for word in &said {
        let mut diagonal = 0;
        for (index, other) in reference.iter().enumerate() {
            let above = row[index + 1];
            row[index + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[index])
            };
            diagonal = above;
        }
    }
    f1(row[reference.len()], said.len(), reference.len())
}

fn f1(common: usize, said: usize, reference: usize) -> f64 {
    if common == 0 {
        return 0.0;
    }
    let precision = common as f64 / said as f64;
    let recall = common as f64 / reference as f64;
    2.0 * precision * recall / (precision + recall)
}

/// Lower-case runs of ASCII letters and digits.
fn rouge_words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .filter(|word| !word.is_empty())
        .map(str::to_string)
        .collect()
}

fn ngrams(words: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(n) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

/// N-grams in both, each as often as in the one with fewer.
fn clipped(said: &HashMap<&[String], usize>, reference: &HashMap<&[String], usize>) -> usize {
    let common = |(ngram, count): (&&[String], &usize)| {
        reference.get(*ngram).map_or(0, |other| *count.min(other))
    };
    said.iter().map(common).sum()
}

/// Corpus BLEU of (generated, reference) pairs so far.
#[derive(Debug, Clone, Default)]
pub struct Bleu {
    correct: [usize; ORDER],
    total: [usize; ORDER],
    said: usize,
    reference: usize,
}

impl Bleu {
    /// Counts a pair.
    pub fn add(&mut self, said: &str, reference: &str) {
        let said = words_13a(said);
        let reference = words_13a(reference);
        self.said += said.len();
        self.reference += reference.len();
        for n in 1..=ORDER {
            let of_said = ngrams(&said, n);
            self.total[n - 1] += of_said.values().sum::<usize>();
            self.correct[n - 1] += clipped(&of_said, &ngrams(&reference, n));
        }
    }

    /// The score, from 0 to 100.
    pub fn score(&self) -> f64 {
        if self.correct.iter().all(|count| *count == 0) || self.total.contains(&0) {
            return 0.0;
        }
        let mut smoothing = 1.0;
        let mut logarithms = 0.0;
        for (correct, total) in self.correct.iter().zip(self.total) {
            let mut matched = *correct as f64;
            if *correct == 0 {
                smoothing *= 2.0;
                matched = 1.0 / smoothing;
            }
            logarithms += (matched / total as f64).ln();
        }
        let (said, reference) = (self.said as f64, self.reference as f64);
        let brevity = if said < reference {
            1.0 - reference / said
        } else {
            0.0
        };
        100.0 * (brevity + logarithms / ORDER as f64).exp()
    }
}

/// The tokens of mteval-v13a: punctuation apart, but within numbers.
fn words_13a(text: &str) -> Vec<String> {
    static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
        [
            (r"([\{-\~\[-` -\&\(-\+:-@/])", " $1 "),
            (r"([^0-9])([.,])", "$1 $2 "),
            (r"([.,])([^0-9])", " $1 $2"),
            (r"([0-9])(-)", "$1 $2 "),
        ]
        .map(|(pattern, to)| {
            (
                Regex::new(pattern).expect("the rules of 13a are patterns"),
                to,
            )
        })
    });
    let entities = [
        ("&quot;", "\""),
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
    ];
    let mut line = text
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    for (entity, character) in entities {
        line = line.replace(entity, character);
    }
    line = format!(" {line} ");
    for (pattern, to) in RULES.iter() {
        line = pattern.replace_all(&line, *to).into_owned();
    }
    line.split_whitespace().map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// rouge-score and sacrebleu, by scripts/eval_reference.py.
    #[test]
    fn figures_are_those_of_rouge_score_and_sacrebleu() {
        let golden: Value = serde_json::from_str(include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/text_metrics.json"
        )))
        .unwrap();
        let pairs: Vec<(String, String)> = serde_json::from_value(golden["pairs"].clone()).unwrap();
        let near = |ours: f64, key: &str| {
            let theirs = golden[key].as_f64().unwrap();
            assert!((ours - theirs).abs() < 1e-9, "{key}: {ours}, not {theirs}");
        };
        let mean = |metric: &dyn Fn(&str, &str) -> f64| {
            let sum: f64 = pairs
                .iter()
                .map(|(said, reference)| metric(said, reference))
                .sum();
            sum / pairs.len() as f64
        };
        near(
            mean(&|said, reference| rouge_n(said, reference, 1)),
            "rouge1",
        );
        near(
            mean(&|said, reference| rouge_n(said, reference, 2)),
            "rouge2",
        );
        near(mean(&rouge_l), "rougeL");
        let bleu = |pairs: &[(String, String)]| {
            let mut bleu = Bleu::default();
            for (said, reference) in pairs {
                bleu.add(said, reference);
            }
            bleu.score()
        };
        near(bleu(&pairs), "bleu");
        near(bleu(&pairs[..2]), "bleu_first_two");
        near(
            bleu(&[("cat".to_string(), "cat".to_string())]),
            "bleu_one_word",
        );
        assert_eq!(Bleu::default().score(), 0.0);
    }
}
