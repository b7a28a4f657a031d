//! Model and data set ids -> local files; a finished run -> a repository.
//!
//! Owns the use of the hub: hf-hub lists repositories and uploads, the transfer of files resumes and
//! verifies, the cache is the one of `huggingface_hub`. Takes an id and a revision; returns paths and
//! their commit. Knows nothing of what is in a file. Never prints.
//!
//! ```text
//! settings  endpoint, token, cache, offline       client    HTTP clients, retries, listings
//! repo      ids, revisions, file names            download  one file: metadata, resume, verify
//! errors    HTTP errors -> messages               cache     models--owner--name/{blobs,refs,snapshots}
//! model     a model's directory and its files     dataset   the files of a split
//! embedded  models embedded in the program             upload    a folder as one commit
//! ```

use std::time::Duration;

mod cache;
mod client;
mod dataset;
mod download;
mod embedded;
mod errors;
mod model;
mod repo;
mod settings;
mod upload;

pub use client::{Hub, RetryPolicy};
pub use dataset::{DatasetFiles, is_data_file, split_in_name};
pub use embedded::embedded;
pub use model::ModelFiles;
pub use settings::{Settings, Token};
pub use upload::{Upload, Uploaded};

/// Watches transfers, one at a time.
pub trait Progress {
    /// A request failed for this reason and is sent again after the delay.
    fn retry(&self, reason: &str, delay: Duration);

    /// A transfer begins, or begins again from its first byte; `bytes` is its size where known.
    fn start(&self, file: &str, bytes: Option<u64>);
    /// So many more bytes are done (after `start`, first those that an earlier run left).
    fn advance(&self, bytes: u64);
    /// The transfer is complete.
    fn finish(&self);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn retry(&self, _reason: &str, _delay: Duration) {}
    fn start(&self, _file: &str, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}
