//! Reports: plan and run report as types, and every page made of them.
//!
//! Owns `report.json`, `steps.jsonl`, Markdown, HTML with charts, terminal text, the model card, CodeCarbon's CSV and the
//! comparison of runs. Takes figures with their units, returns text and files. Measures nothing, counts nothing, prints nothing.

mod bars;
pub mod baselines;
mod chart;
pub mod compare;
pub mod emissions;
pub mod energy;
mod figures;
pub mod files;
mod finite;
pub mod format;
mod history;
mod inference;
pub mod place;
pub mod plan;
mod sections;
pub mod steps;
mod summary;
mod templates;
pub mod text;
pub mod types;

pub use compare::{Comparison, compare};
pub use emissions::{Emissions, EnergyParts};
pub use files::{read_report, to_json, to_plan_json};
pub use finite::FiniteReport;
pub use history::History;
pub use plan::Plan;
pub use steps::{StepLog, read_steps};
pub use templates::{CardFacts, comparison_page, data_page, to_html, to_markdown, to_model_card};
pub use text::{to_brief, to_text};
pub use types::Report;
