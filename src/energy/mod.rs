//! Energy: device profiles, meters, emissions, budget and ledger.
//!
//! ```text
//! profile, traffic ──► charge ─────────────┐
//! sensor ──► counters ──► meter ───────────┤
//! spent ──► budget, entry ──► ledger ──────┴─► account
//! ```
//!
//! A `Work` is charged to a [`Profile`]; [`Meters`] measure it in a window; a [`Budget`] decides
//! whether more may be spent; the [`Ledger`] stores it on disk; an [`Account`] combines them. Files
//! import in this direction only. Independent of tensors, models and training: a phase is a name, a
//! step a number.

pub mod account;
pub mod baseline;
pub mod budget;
mod calibration;
pub mod carbon;
pub mod charge;
pub mod counters;
mod detect;
mod entry;
pub mod grid;
pub mod interval;
pub mod ledger;
mod ledger_file;
pub mod meter;
pub mod operating_point;
pub mod options;
mod prediction;
pub mod profile;
mod profile_file;
mod profile_rules;
pub mod sensor;
mod spent;
pub mod traffic;

pub use account::{Account, Verdict};
pub use baseline::Baseline;
pub use budget::{Budget, Limit, Rates};
pub use calibration::{Measured, MeasuredCache, MeasuredPower};
pub use carbon::carbon;
pub use charge::{Charge, EnergyBreakdown, WorkTotals};
pub use counters::Counters;
pub use detect::{Computing, allowed_cores, computing_cores, part_of_machine};
pub use grid::Grid;
pub use interval::Interval;
pub use ledger::{Energies, Entry, Ledger, Phase};
pub use meter::{Meters, Reading};
pub use operating_point::{OperatingPoint, Scaling};
pub use options::{DeviceRef, GridRef, Limits, MeterKind};
pub use profile::Profile;
pub use spent::{Allowance, Spent};
