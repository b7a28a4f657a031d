//! Random changes of valid files.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bytes and numbers at the edges of what readers expect.
const EDGES: &[&str] = &[
    "0",
    "-1",
    "1",
    "NaN",
    "1e309",
    "-1e-309",
    "4294967296",
    "18446744073709551615",
    "9223372036854775808",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "\u{feff}",
    "\u{0}",
    "\u{1b}[2J",
    "\u{10ffff}",
    "\r\n",
    "\"",
    "\\u0000",
    "\\ud800",
    "[[[[[[[[[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":",
];
const MOST_CHANGES: usize = 4;
const LONGEST: usize = 1 << 20;

/// A stream of mutated files.
pub struct Mutator {
    random: ChaCha8Rng,
    words: &'static [&'static str],
}

impl Mutator {
    pub fn new(seed: u64, words: &'static [&'static str]) -> Self {
        let random = ChaCha8Rng::seed_from_u64(seed);
        Self { random, words }
    }

    fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n.max(1))
    }

    fn span(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        let longest = if self.below(4) == 0 { len } else { 16 };
        let end = (start + self.below(longest + 1)).min(len);
        start..end
    }

    /// One of the seeds with one to four changes.
    pub fn next(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let first = self.below(seeds.len());
        let mut bytes = seeds[first].clone();
        for _ in 0..=self.below(MOST_CHANGES) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let span = self.span(bytes.len());
        match self.below(8) {
            0 if !bytes.is_empty() => {
                let at = self.below(bytes.len());
                bytes[at] ^= 1 << self.below(8);
            }
            1 => drop(bytes.drain(span)),
            2 => {
                let copy = bytes[span.clone()].repeat(1 + self.below(8));
                bytes.splice(span.end..span.end, copy);
            }
            3 => {
                let edge = EDGES[self.below(EDGES.len())];
                bytes.splice(span, edge.bytes());
            }
            4 | 5 if !self.words.is_empty() => {
                let word = self.words[self.below(self.words.len())];
                bytes.splice(span.start..span.start, word.bytes());
            }
            6 => {
                let other = self.below(seeds.len());
                let from = self.span(seeds[other].len());
                bytes.splice(span, seeds[other][from].iter().copied());
            }
            _ => self.replace_value(bytes),
        }
    }

    /// Replaces a number or a word, where there is one.
    fn replace_value(&mut self, bytes: &mut Vec<u8>) {
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        let at = self.below(bytes.len());
        let Some(start) = bytes[at..].iter().position(is_word) else {
            return;
        };
        let start = at + start;
        let len = bytes[start..].iter().position(|byte| !is_word(byte));
        let end = len.map_or(bytes.len(), |len| start + len);
        let edge = EDGES[self.below(EDGES.len())];
        bytes.splice(start..end, edge.bytes());
    }
}
