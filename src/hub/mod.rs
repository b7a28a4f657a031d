//! Model and data set ids -> local files.
//!
//! Owns the hub's protocol (listing, redirects, retries, tokens), the cache that Python's `huggingface_hub` shares, model
//! directories and the models inside the program. Takes an id and a revision; returns paths and the commit they belong to.
//! Knows nothing of what is in a file: not what a tensor, a token or a record is. Never prints.
//!
//! ```text
//! settings  who asks, where, with which token      names    ids, revisions and paths that may be used
//! client    one request: redirects, retries        refusal  what the hub said no to, in words
//! cache     models--owner--name/{blobs,refs,...}   fetch    one file: HEAD, GET, resume, link
//! listing   a repository's files at a commit       part     the bytes that are here so far, and their check
//! model     which files a model is made of         dataset  which files a split is made of
//! embedded  models inside the program
//! ```
//!
//! The transfer is plain HTTP: a file stored with xet is served through the hub's own bridge, to which its redirect leads.

mod cache;
mod client;
mod dataset;
mod embedded;
mod fetch;
mod front_matter;
mod listing;
mod model;
mod names;
mod part;
mod progress;
mod refusal;
mod settings;
mod split;
mod weights;

pub use client::Patience;
pub use dataset::DatasetFiles;
pub use embedded::embedded;
pub use fetch::Hub;
pub use model::{ModelFiles, local_model};
pub use progress::{Progress, Silent};
pub use settings::{Settings, Token};
