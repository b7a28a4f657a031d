//! The recipe: what a run is, in one TOML file.
//!
//! Owns the file format. `sections` declares every key once; reader, writer, JSON Schema and reference follow from it. A
//! `Recipe` is checked: no illegal value exists in it. Every error is reported at once, with line, column, caret, rule and
//! hint. Knows nothing of tensors, devices or the network: whether a model or a file exists is found out later, in preflight.
//!
//! ```text
//! text, --set ──► tree (spans) ──► reader (a Setting for each type) ──► contradictions ──► Recipe ──► write
//!                                     └── sections: every key, declared by `key::section!` ──► starter, schema, reference
//! ```

mod collections;
mod commented;
mod contradictions;
mod diagnostic;
mod ids;
mod import;
mod key;
mod larger_model;
mod open;
mod reader;
mod schema;
mod sections;
mod setting;
mod suggest;
mod tree;
mod write;

pub use commented::{Chosen, commented, in_order, path_from};
pub use diagnostic::Diagnostic;
pub use ids::{DataSource, ModelId};
pub use import::{Imported, LeftOut, import};
pub use larger_model::LargerModel;
pub use open::{check, load, locate, parse};
pub use schema::json_schema;
pub use sections::{
    Adapter, Baseline, Checkpointing, Compared, Data, Energy, Init, Length, Lora, Model,
    ProblemType, Quantization, Recipe, Report, Task, Train, Validation, Warmup,
};
pub use write::{lora_setting, reference, starter};

pub use crate::adapter::options::Targets;
pub use crate::data::options::{Format, OnBadRecord, PromptTemplate, TxtUnit};
pub use crate::train::schedule::Decay;
