//! What this machine does: rates, bandwidths and power for a device profile, and measured against counted energy.
//!
//! Owns calibration, the factor that a measured run gives its profile, and the machine's memory and names. Returns
//! profiles with notes on what was not measured. Writes nothing and knows nothing of run directories.

mod calibrate;
pub mod machine;
mod probe;
mod reconcile;

pub use calibrate::{Calibration, Calibrator, Effort};
pub use probe::probe;
pub use reconcile::{Reconciled, reconcile};
