//! Emissions of an energy, and a device's share of its manufacture.

use crate::units::{GramsCo2e, GramsPerKwh, Joules, Pue, Seconds};

/// Emissions of `energy` at the machine: energy x PUE x grid intensity.
///
/// ```
/// use wattune::energy::carbon;
/// use wattune::units::{GramsCo2e, GramsPerKwh, Joules, Pue};
/// assert_eq!(carbon(Joules(3.6e6), Pue::ONE, GramsPerKwh(473.0)), GramsCo2e(473.0));
/// ```
pub fn carbon(energy: Joules, pue: Pue, grid: GramsPerKwh) -> GramsCo2e {
    grid * (pue * energy)
}

/// Assumed service life of a device, in continuous use: three years, as in EcoLogits and the
/// depreciation of many data centres.
pub const LIFE_YEARS: f64 = 3.0;

/// Embodied emissions attributed to `time` on a device, spread evenly over [`LIFE_YEARS`].
///
/// ```
/// use wattune::energy::carbon::embodied_share;
/// use wattune::units::{GramsCo2e, Seconds};
/// // 164 kg over 3 years of 8,766 hours: 6.236 g an hour.
/// assert!((embodied_share(GramsCo2e(164_000.0), Seconds(3600.0)).0 - 6.236).abs() < 1e-3);
/// ```
pub fn embodied_share(embodied: GramsCo2e, time: Seconds) -> GramsCo2e {
    const YEAR_S: f64 = 365.25 * 86_400.0;
    embodied * (time.0 / (LIFE_YEARS * YEAR_S))
}
