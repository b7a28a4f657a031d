//! LoRA adapters: target modules, PEFT's files, initial values, merging.
//!
//! Takes module names and shapes, settings, and files; returns sites (layer, rank and scaling of each LoRA), checked tensors, and
//! merged model directories. Files are PEFT's, so that every program that reads PEFT adapters reads ours. Knows nothing of recipes,
//! computation or training.

pub mod adaptation;
pub mod config;
pub mod convert;
pub mod decomposition;
mod diff;
mod directory;
mod fields;
pub mod init;
mod inspect;
mod keys;
pub mod matching;
pub mod merge;
pub mod options;
mod pairs;
pub mod peft;
pub mod portability;
pub(crate) mod shards;
mod target_errors;
pub mod targets;
pub mod unsupported;

pub use adaptation::{Adaptation, AdapterTensor, ModelLayout, Part, Place, WeightCopy};
pub use config::PeftConfig;
pub use convert::{Conversion, Converted, convert};
pub use decomposition::Factors;
pub use diff::{Difference, diff};
pub use init::kaiming_uniform;
pub use inspect::{Inspection, inspect};
pub use merge::{MergeJob, MergeSummary, MergeWeights, merge};
pub use options::{LoraConfig, LoraInit, Targets};
pub use peft::{LoadedAdapter, load, save};
pub use portability::{Verdict, check_portable, portability};
pub use targets::{Module, Site, select};
