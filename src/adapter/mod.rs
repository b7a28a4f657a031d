//! LoRA on disk and by name: which modules, PEFT's files, merging.

mod init;
mod matching;
mod targets;

pub use init::kaiming_uniform;
pub use targets::{LoraSettings, Module, Site, Targets, select};
