//! The run's report: what it cost, against what, what bound it, and how sure the numbers are.
//!
//! Owns the types of `report.json` and `steps.jsonl`, and every page made of them: Markdown, HTML with charts, terminal text, the
//! adapter's model card, CodeCarbon's CSV, the comparison of runs. Takes plain numbers, returns texts and files. Refuses to know how
//! a number was obtained: it measures nothing, counts nothing, prints nothing and never invents what it was not given.

mod budget;
mod chart;
pub mod compare;
pub mod emissions;
pub mod files;
pub mod html;
pub mod inference;
pub mod json;
mod limits;
pub mod markdown;
mod markup;
pub mod measured;
pub mod memory;
pub mod model_card;
mod page;
pub mod parts;
pub mod reconciliation;
mod seal;
pub(crate) mod show;
pub mod steps;
mod summary;
mod table;
pub mod text;
pub mod types;
mod yaml;

pub use compare::{Comparison, compare};
pub use emissions::{Emissions, EnergyParts};
pub use html::{History, comparison_page};
pub use model_card::CardFacts;
pub use steps::StepLog;
pub use types::Report;
