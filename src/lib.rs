//! wattune specialises an open transformer inside an energy budget, and proves what it cost.
//!
//! ```text
//! recipe ──► plan ──► data ──► model (frozen) + adapter ──► train loop ◄──► meter, budget ──► report
//!  TOML     cost in    text      safetensors    LoRA A, B      one step       ledger        PEFT adapter,
//!           joules     to packed                                at a time                   emissions report
//!           before     tokens
//!           weights
//! ```
//!
//! One direction, no back and forth. Read this page, then `run` (the parts put together), then `train` (the loop).
//!
//! Invariants, held by `tests/architecture.rs`:
//!
//! - a quantity is never a bare `f64` outside `units`;
//! - `recipe` and `data` know nothing of tensors; `hub` does not know what a tensor is; `energy` knows nothing of training;
//! - `forecast` counts without weights; `measure` writes no files;
//! - `ops` know nothing of models; `train` does not print; only `cli` prints; only `run` knows every room;
//! - gradients are written, not recorded: no candle `Var`, graph or `GradStore` outside tests.

#![deny(
    missing_docs,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used
)]

pub mod adapter;
pub mod cli;
pub mod data;
pub mod energy;
pub mod error;
pub mod files;
pub mod forecast;
pub mod gguf;
pub mod hub;
pub mod measure;
pub mod model;
pub mod ops;
pub mod random;
pub mod recipe;
pub mod report;
pub mod run;
pub mod text;
pub mod train;
pub mod units;
pub mod work;
