//! Records -> rendered text and loss mask -> tokens -> packed batches.
//!
//! Owns file formats, chat templates, encoding, packing and the order of records. Takes local files and a tokenizer's files,
//! returns `Dataset`s of `Example`s and the `MicroBatch`es of each step. Never guesses: a malformed record is refused by file and
//! line. Token ids stay `u32`. Knows nothing of tensors, models, recipes or the network.

mod added_tokens;
mod alpaca;
pub mod batch;
mod byte_level;
mod cache;
mod chat;
mod choices;
mod dataset;
mod delimited;
mod detect;
mod encode;
mod format;
mod jinja;
mod json;
mod load;
mod messages;
pub mod options;
mod packing;
mod parquet;
mod paths;
mod permutation;
mod pipeline;
mod prompted;
mod pyjson;
mod python;
mod read;
mod sampler;
mod sentinel;
mod source;
mod template;
mod template_files;
mod tokenizer;
mod tokenizer_config;
mod turns;

pub use batch::{BatchShape, Example, MicroBatch, Segment};
pub use choices::{MultipleChoice, multiple_choices};
pub use dataset::{Counts, Dataset, RenderedSample, TextSpan};
pub use detect::{Detected, Wanted, detect};
pub use load::{FoundLabels, check_file, labels, load, text_spans};
pub use options::{Format, LabelKind, OnBadRecord, Options, PromptTemplate, TxtUnit};
pub use paths::files;
pub use prompted::{Prompted, prompted};
pub use read::{Location, Record, read};
pub use sampler::{Sampler, SamplerOptions, evaluation_batches};
pub use tokenizer::{Encoded, Tokenizer, TokenizerFiles};

/// A file of `tests/golden`; its test names the script that wrote it.
#[cfg(test)]
fn golden(name: &str) -> serde_json::Value {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}
