//! The energy options of a recipe: device, grid, meter and limits as the user names them.
//!
//! Plain values with their text forms; `detect` resolves a device to a profile, `grid` a name to a
//! grid.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::units::{Flops, GramsCo2e, GramsPerKwh, Joules, Money, Seconds};

/// A meter, as named in every figure.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum MeterKind {
    /// Work times profile: exact, and the same on every machine.
    Counted,
    /// The machine's hardware energy counters.
    Measured,
    /// Profile power times wall time.
    Timed,
}

impl MeterKind {
    /// The word of recipes and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            MeterKind::Counted => "counted",
            MeterKind::Measured => "measured",
            MeterKind::Timed => "timed",
        }
    }
}

/// An amount of each quantity that a budget can limit: a limit, or what was spent. `None`: no
/// limit, or not known.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// The machine's energy, without the facility's overhead.
    #[serde(rename = "energy_j")]
    pub energy: Option<Joules>,
    /// Greenhouse gas, the facility's overhead included.
    #[serde(rename = "carbon_gco2e")]
    pub carbon: Option<GramsCo2e>,
    /// FLOPs of matrix products and attention.
    pub flops: Option<Flops>,
    /// Wall time.
    #[serde(rename = "time_s")]
    pub time: Option<Seconds>,
    /// Money, by the price of the rates.
    pub cost: Option<Money>,
}

/// A device as a recipe names it.
///
/// ```
/// use wattune::energy::DeviceRef;
/// let named = DeviceRef::Named { name: "raspberry-pi-5".into(), cores: Some(2) };
/// assert_eq!("raspberry-pi-5@2".parse(), Ok(named));
/// assert_eq!("desk.toml".parse(), Ok(DeviceRef::File("desk.toml".into())));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceRef {
    /// The device that computes.
    Auto,
    /// A shipped profile.
    Named {
        /// The profile's name.
        name: String,
        /// A processor's profile is scaled to this many cores; the text form is `NAME@CORES`.
        cores: Option<usize>,
    },
    /// A profile file; a path that ends in `.toml` where given as text.
    File(PathBuf),
}

impl DeviceRef {
    /// The texts that can be read, for messages.
    pub const RULE: &str = "`auto`, a profile's name, `NAME@CORES` with a whole number of cores, or a path that ends in `.toml`";
}

impl FromStr for DeviceRef {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(DeviceRef::Auto);
        }
        if text.ends_with(".toml") {
            return Ok(DeviceRef::File(text.into()));
        }
        let (name, cores) = match text.split_once('@') {
            Some((name, cores)) => (name, Some(cores.parse().map_err(|_| Self::RULE)?)),
            None => (text, None),
        };
        Ok(DeviceRef::Named {
            name: name.to_string(),
            cores,
        })
    }
}

impl fmt::Display for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceRef::Auto => f.write_str("auto"),
            DeviceRef::Named { name, cores: None } => f.write_str(name),
            DeviceRef::Named {
                name,
                cores: Some(cores),
            } => write!(f, "{name}@{cores}"),
            DeviceRef::File(path) => path.display().fmt(f),
        }
    }
}

/// An electricity grid as a recipe names it.
///
/// ```
/// use wattune::energy::GridRef;
/// use wattune::units::GramsPerKwh;
/// assert_eq!("FR".parse(), Ok(GridRef::Named("FR".into())));
/// assert_eq!("250".parse(), Ok(GridRef::Intensity(GramsPerKwh(250.0))));
/// assert_eq!("250 gCO2e/kWh".parse(), Ok(GridRef::Intensity(GramsPerKwh(250.0))));
/// assert!("-1".parse::<GridRef>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum GridRef {
    /// ISO code, country, US state, cloud region or `world`.
    Named(String),
    /// The user's intensity, finite and not negative.
    Intensity(GramsPerKwh),
}

impl GridRef {
    /// The texts that can be read, for messages.
    pub const RULE: &str =
        "a grid's name in double quotes, or a finite number of gCO2e/kWh of at least 0";

    /// The grid of a number of gCO2e/kWh; `None` below zero or where not finite.
    pub fn from_intensity(gco2e_per_kwh: f64) -> Option<Self> {
        (gco2e_per_kwh.is_finite() && gco2e_per_kwh >= 0.0)
            .then_some(GridRef::Intensity(GramsPerKwh(gco2e_per_kwh)))
    }
}

impl FromStr for GridRef {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        match text.parse() {
            Ok(number) => Self::from_intensity(number).ok_or(Self::RULE),
            Err(_) if text.is_empty() => Err(Self::RULE),
            Err(_) => Ok(text
                .parse()
                .map_or_else(|_| GridRef::Named(text.to_string()), GridRef::Intensity)),
        }
    }
}

impl fmt::Display for GridRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GridRef::Named(name) => f.write_str(name),
            GridRef::Intensity(intensity) => write!(f, "{}", intensity.0),
        }
    }
}
