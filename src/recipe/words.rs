//! The words of a recipe's choices: each enum's values as they are written.
//!
//! One table per enum feeds the reader, the writer and the schema. Knows nothing of keys.

use super::{Checkpointing, Compared, Decay, Format, Init, MeterKind, OnBadRecord, TxtUnit};
use crate::work::Precision;

/// A choice written as a word.
pub(super) trait Word: Copy + PartialEq + 'static {
    /// Every word with its meaning, in the order they are listed to a person.
    const WORDS: &'static [(&'static str, Self)];

    /// The meaning of `word`.
    fn from_word(word: &str) -> Option<Self> {
        Self::WORDS
            .iter()
            .find(|(known, _)| *known == word)
            .map(|(_, meaning)| *meaning)
    }

    /// The word for it.
    fn word(self) -> &'static str {
        Self::WORDS
            .iter()
            .find(|(_, meaning)| *meaning == self)
            .map_or("", |(word, _)| word)
    }

    /// Every word.
    fn words() -> Vec<&'static str> {
        Self::WORDS.iter().map(|(word, _)| *word).collect()
    }
}

macro_rules! words {
    ($($type:ident: $($word:literal => $meaning:ident),+;)+) => {
        $(impl Word for $type {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, $type::$meaning)),+];
        }
        // A meaning without a word does not compile.
        const _: fn($type) = |meaning| match meaning { $($type::$meaning => ()),+ };)+

        #[cfg(test)]
        mod tests {
            use super::*;

            /// The words of a recipe are those of the JSON documents.
            #[test]
            fn a_word_is_what_serde_writes() {
                $(for (word, meaning) in $type::WORDS {
                    assert_eq!(serde_json::to_value(meaning).unwrap(), *word);
                    assert_eq!(meaning.word(), *word);
                })+
            }
        }
    };
}

/// A number of blocks is written as a number.
impl Word for Checkpointing {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", Checkpointing::Auto),
        ("always", Checkpointing::Always),
        ("never", Checkpointing::Never),
    ];
}

/// No meter is written as `auto`.
impl Word for Option<MeterKind> {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", None),
        ("counted", Some(MeterKind::Counted)),
        ("measured", Some(MeterKind::Measured)),
        ("timed", Some(MeterKind::Timed)),
    ];
}

words! {
    Precision: "f32" => F32, "bf16" => Bf16, "f16" => F16;
    Init: "pretrained" => Pretrained, "random" => Random;
    Format: "auto" => Auto, "text" => Text, "completion" => Completion, "messages" => Messages, "alpaca" => Alpaca;
    OnBadRecord: "stop" => Stop, "skip" => Skip;
    TxtUnit: "paragraph" => Paragraph, "file" => File;
    Decay: "linear" => Linear, "cosine" => Cosine, "constant" => Constant;
    Compared: "counted" => Counted, "measured" => Measured, "off" => Off;
}
