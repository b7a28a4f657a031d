//! Physical quantities: what every other room speaks in.
//!
//! Owns the types (`Joules`, `Watts`, `Seconds`, `Flops`, `Bytes`, `GramsCo2e`, `GramsPerKwh`, `Pue`, `Money`, `Price`), how
//! they are written ("5 Wh", "18 kJ", "2 g", "10 min", "1e15 FLOP") and how they are shown. Knows nothing about where a
//! quantity comes from. A bare `f64` never stands for a quantity outside this file.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Joules in one watt-hour.
pub const JOULES_PER_WH: f64 = 3600.0;
/// Joules in one kilowatt-hour.
pub const JOULES_PER_KWH: f64 = 3.6e6;

/// A text that is not a quantity: the text and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseQuantityError {
    /// What was written.
    pub value: String,
    /// What may be written, with an example.
    pub rule: String,
}

impl fmt::Display for ParseQuantityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a quantity here: {}", self.value, self.rule)
    }
}

impl std::error::Error for ParseQuantityError {}

/// Splits "5 Wh" into its number and its unit; the number must be finite and not negative.
fn number_and_unit<'a>(text: &'a str, rule: &str) -> Result<(f64, &'a str), ParseQuantityError> {
    let refuse = || ParseQuantityError {
        value: text.to_string(),
        rule: rule.to_string(),
    };
    let trimmed = text.trim();
    // The longest prefix that reads as a number: an `e` of an exponent belongs to it, the `E` of "EFLOP" does not.
    let end = (1..=trimmed.len())
        .rev()
        .find(|&i| {
            trimmed.is_char_boundary(i)
                && !trimmed[..i].ends_with(' ')
                && is_plain_number(&trimmed[..i])
        })
        .ok_or_else(refuse)?;
    let number: f64 = trimmed[..end]
        .replace('_', "")
        .parse()
        .map_err(|_| refuse())?;
    if !number.is_finite() || number < 0.0 {
        return Err(refuse());
    }
    Ok((number, trimmed[end..].trim()))
}

fn is_plain_number(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_ascii_digit() || matches!(c, '.' | '_' | 'e' | 'E' | '+' | '-'))
        && text.replace('_', "").parse::<f64>().is_ok()
}

/// Parses `text` against a table of (unit, factor to the base unit).
fn parse_with(text: &str, units: &[(&str, f64)], rule: &str) -> Result<f64, ParseQuantityError> {
    let (number, unit) = number_and_unit(text, rule)?;
    let factor = units
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, factor)| factor);
    match factor {
        Some(factor) => Ok(number * factor),
        None => Err(ParseQuantityError {
            value: text.to_string(),
            rule: rule.to_string(),
        }),
    }
}

/// Writes `value` with three or four significant digits in the largest unit that keeps it at or above one.
fn scaled(f: &mut fmt::Formatter<'_>, value: f64, units: &[(f64, &str)]) -> fmt::Result {
    let (factor, unit) = units
        .iter()
        .rev()
        .find(|(factor, _)| value.abs() >= *factor)
        .or(units.first())
        .copied()
        .unwrap_or((1.0, ""));
    write!(f, "{} {unit}", significant(value / factor))
}

/// A number with about four significant digits and no needless zeros.
pub fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..=6).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let decimals = (3 - magnitude).clamp(0, 8) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, units $units:expr, shown $shown:expr, rule $rule:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl $name {
            /// Nothing of it.
            pub const ZERO: Self = Self(0.0);

            /// The larger of the two.
            pub fn max(self, other: Self) -> Self {
                Self(self.0.max(other.0))
            }

            /// The smaller of the two.
            pub fn min(self, other: Self) -> Self {
                Self(self.0.min(other.0))
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }

        impl Mul<f64> for $name {
            type Output = Self;
            fn mul(self, factor: f64) -> Self {
                Self(self.0 * factor)
            }
        }

        impl Div<f64> for $name {
            type Output = Self;
            fn div(self, divisor: f64) -> Self {
                Self(self.0 / divisor)
            }
        }

        impl Div for $name {
            type Output = f64;
            fn div(self, other: Self) -> f64 {
                self.0 / other.0
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                items.fold(Self::ZERO, Add::add)
            }
        }

        impl FromStr for $name {
            type Err = ParseQuantityError;
            fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
                parse_with(text, &$units, $rule).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                scaled(f, self.0, &$shown)
            }
        }
    };
}

quantity!(
    /// Energy in joules.
    ///
    /// ```
    /// use wattune::units::Joules;
    /// assert_eq!("5 Wh".parse::<Joules>().unwrap(), Joules(18_000.0));
    /// assert_eq!("18 kJ".parse::<Joules>().unwrap().to_string(), "18 kJ");
    /// ```
    Joules,
    units [("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("µJ", 1e-6), ("kJ", 1e3), ("MJ", 1e6), ("GJ", 1e9), ("Wh", 3600.0), ("mWh", 3.6),
        ("kWh", 3.6e6), ("MWh", 3.6e9), ("GWh", 3.6e12)],
    shown [(1e-6, "µJ"), (1e-3, "mJ"), (1.0, "J"), (1e3, "kJ"), (1e6, "MJ"), (1e9, "GJ"), (1e12, "TJ")],
    rule "a number and one of J, kJ, MJ, GJ, mWh, Wh, kWh, MWh, as in \"5 Wh\" or \"18 kJ\""
);

quantity!(
    /// Power in watts.
    Watts,
    units [("W", 1.0), ("mW", 1e-3), ("kW", 1e3), ("MW", 1e6)],
    shown [(1e-3, "mW"), (1.0, "W"), (1e3, "kW"), (1e6, "MW")],
    rule "a number and one of W, kW, MW, as in \"65 W\""
);

quantity!(
    /// A count of floating-point operations of matrix products and attention; one multiply-add is two.
    Flops,
    units [("", 1.0), ("FLOP", 1.0), ("FLOPs", 1.0), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15), ("EFLOP", 1e18)],
    shown [(1.0, "FLOP"), (1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP")],
    rule "a number, alone or with FLOP, GFLOP, TFLOP, PFLOP or EFLOP, as in \"1e15\" or \"2 PFLOP\""
);

quantity!(
    /// How many: parameters, tokens, hours. The letters are those of model names: 7 B parameters, 1.4 T tokens.
    Count,
    units [("", 1.0), ("K", 1e3), ("k", 1e3), ("M", 1e6), ("m", 1e6), ("B", 1e9), ("b", 1e9), ("T", 1e12), ("t", 1e12)],
    shown [(1.0, ""), (1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T")],
    rule "a number, alone or with K, M, B or T, as in \"1.75e11\", \"175B\" or \"1.4T\""
);

quantity!(
    /// Mass of greenhouse gas in grams of CO2 equivalent.
    GramsCo2e,
    units [("g", 1.0), ("gCO2e", 1.0), ("mg", 1e-3), ("kg", 1e3), ("kgCO2e", 1e3), ("t", 1e6), ("tCO2e", 1e6)],
    shown [(1e-6, "µgCO2e"), (1e-3, "mgCO2e"), (1.0, "gCO2e"), (1e3, "kgCO2e"), (1e6, "tCO2e")],
    rule "a number and one of mg, g, kg, t, as in \"2 g\""
);

quantity!(
    /// Intensity of an electricity grid in grams of CO2 equivalent per kilowatt-hour.
    GramsPerKwh,
    units [("", 1.0), ("g/kWh", 1.0), ("gCO2e/kWh", 1.0)],
    shown [(1.0, "gCO2e/kWh")],
    rule "a number of gCO2e per kWh, as in \"473\""
);

quantity!(
    /// Time in seconds.
    Seconds,
    units [("s", 1.0), ("ms", 1e-3), ("min", 60.0), ("h", 3600.0), ("d", 86400.0)],
    shown [(1e-6, "µs"), (1e-3, "ms"), (1.0, "s")],
    rule "a number and one of s, min, h, d, as in \"10 min\""
);

impl Joules {
    /// The energy in watt-hours.
    pub fn wh(self) -> f64 {
        self.0 / JOULES_PER_WH
    }

    /// The energy in kilowatt-hours.
    pub fn kwh(self) -> f64 {
        self.0 / JOULES_PER_KWH
    }

    /// The same energy as a whole number of microjoules, rounded half away from zero and held at zero below.
    pub fn rounded(self) -> MicroJoules {
        MicroJoules((self.0 * 1e6).round().max(0.0) as u64)
    }
}

impl Mul<Seconds> for Watts {
    type Output = Joules;
    fn mul(self, time: Seconds) -> Joules {
        Joules(self.0 * time.0)
    }
}

impl Mul<Joules> for GramsPerKwh {
    type Output = GramsCo2e;
    fn mul(self, energy: Joules) -> GramsCo2e {
        GramsCo2e(self.0 * energy.kwh())
    }
}

impl Seconds {
    /// The time as a person says it: "12 s", "3 min 05 s", "2 h 07 min".
    pub fn spoken(self) -> String {
        let whole = self.0.round() as u64;
        match whole {
            _ if self.0 < 60.0 => format!("{self}"),
            0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
            _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        }
    }
}

/// Energy as a whole number of microjoules: the unit of the ledger, where sums must be exact.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct MicroJoules(pub u64);

impl MicroJoules {
    /// No energy.
    pub const ZERO: Self = Self(0);

    /// The same energy as floating-point joules.
    pub fn joules(self) -> Joules {
        Joules(self.0 as f64 / 1e6)
    }

    /// The difference, held at zero.
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for MicroJoules {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for MicroJoules {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for MicroJoules {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for MicroJoules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.joules().fmt(f)
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(f64, &str); 5] = [
            (1.0, "B"),
            (1024.0, "KiB"),
            (1048576.0, "MiB"),
            (1073741824.0, "GiB"),
            (1099511627776.0, "TiB"),
        ];
        scaled(f, self.0 as f64, &UNITS)
    }
}

/// Power usage effectiveness: facility energy over the machines' own, at least one.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Pue(f64);

impl Pue {
    /// A facility without overhead.
    pub const ONE: Self = Self(1.0);

    /// A power usage effectiveness; `None` below one or where not finite.
    pub fn new(value: f64) -> Option<Self> {
        (value.is_finite() && value >= 1.0).then_some(Self(value))
    }

    /// The plain ratio.
    pub fn value(self) -> f64 {
        self.0
    }
}

impl Mul<Joules> for Pue {
    type Output = Joules;
    fn mul(self, energy: Joules) -> Joules {
        Joules(self.0 * energy.0)
    }
}

/// An amount of money with its currency ("0.05 USD").
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Money {
    /// How much.
    pub amount: f64,
    /// ISO 4217 code, three capital letters.
    pub currency: String,
}

impl FromStr for Money {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let rule = "an amount and a currency of three capital letters, as in \"0.05 USD\"";
        let (amount, currency) = number_and_unit(text, rule)?;
        if !is_currency(currency) {
            return Err(ParseQuantityError {
                value: text.to_string(),
                rule: rule.to_string(),
            });
        }
        Ok(Self {
            amount,
            currency: currency.to_string(),
        })
    }
}

fn is_currency(text: &str) -> bool {
    text.len() == 3 && text.bytes().all(|b| b.is_ascii_uppercase())
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", significant(self.amount), self.currency)
    }
}

/// What a price is paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Each kilowatt-hour of facility energy.
    KilowattHour,
    /// Each hour a device is held.
    DeviceHour,
}

/// A price of electricity ("0.30 USD/kWh") or of a rented device ("2.50 USD/h").
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Price {
    /// The price of one unit.
    pub money: Money,
    /// The unit.
    pub per: Per,
}

impl Price {
    /// What `energy` (facility side) or `time` on the device costs.
    pub fn of(&self, energy: Joules, time: Seconds) -> Money {
        let units = match self.per {
            Per::KilowattHour => energy.kwh(),
            Per::DeviceHour => time.0 / 3600.0,
        };
        Money {
            amount: self.money.amount * units,
            currency: self.money.currency.clone(),
        }
    }
}

impl FromStr for Price {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let rule = "an amount, a currency and /kWh or /h, as in \"0.30 USD/kWh\" or \"2.50 USD/h\"";
        let refuse = || ParseQuantityError {
            value: text.to_string(),
            rule: rule.to_string(),
        };
        let (money, unit) = text.split_once('/').ok_or_else(refuse)?;
        let per = match unit.trim() {
            "kWh" => Per::KilowattHour,
            "h" => Per::DeviceHour,
            _ => return Err(refuse()),
        };
        Ok(Self {
            money: money.parse().map_err(|_| refuse())?,
            per,
        })
    }
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per {
            Per::KilowattHour => "kWh",
            Per::DeviceHour => "h",
        };
        write!(f, "{}/{unit}", self.money)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_in_their_units() {
        assert_eq!("5 Wh".parse(), Ok(Joules(18_000.0)));
        assert_eq!("2.5kWh".parse(), Ok(Joules(9e6)));
        assert_eq!("1e15".parse(), Ok(Flops(1e15)));
        assert_eq!("1e15 FLOP".parse(), Ok(Flops(1e15)));
        assert_eq!("3 EFLOP".parse(), Ok(Flops(3e18)));
        assert_eq!("3EFLOP".parse(), Ok(Flops(3e18)));
        assert_eq!("10 min".parse(), Ok(Seconds(600.0)));
        assert_eq!(
            ["1.75e11", "175B", "175 b"].map(str::parse),
            [Ok(Count(1.75e11)), Ok(Count(1.75e11)), Ok(Count(1.75e11))]
        );
        assert_eq!(
            ["7M", "1.4T"].map(str::parse),
            [Ok(Count(7e6)), Ok(Count(1.4e12))]
        );
        assert_eq!("2 g".parse(), Ok(GramsCo2e(2.0)));
    }

    #[test]
    fn what_is_no_quantity_is_refused_with_its_rule() {
        for bad in [
            "",
            "5",
            "Wh",
            "-5 Wh",
            "5 wh",
            "inf J",
            "nan J",
            "5 Wh extra",
        ] {
            let error = bad.parse::<Joules>().unwrap_err();
            assert!(error.rule.contains("\"5 Wh\""), "{bad}: {error}");
        }
        assert!("0.30 USD".parse::<Price>().is_err());
        assert!("0.30 usd/kWh".parse::<Price>().is_err());
    }

    #[test]
    fn a_price_is_paid_for_energy_or_for_time() {
        let price: Price = "0.30 USD/kWh".parse().unwrap();
        assert!((price.of(Joules(3.6e6), Seconds(7.0)).amount - 0.30).abs() < 1e-12);
        let price: Price = "2.50 USD/h".parse().unwrap();
        assert!((price.of(Joules(3.6e6), Seconds(1800.0)).amount - 1.25).abs() < 1e-12);
    }

    #[test]
    fn numbers_are_shown_short() {
        assert_eq!(Joules(41_230.0).to_string(), "41.23 kJ");
        assert_eq!(Joules(0.0).to_string(), "0 µJ");
        assert_eq!(Bytes(3 << 20).to_string(), "3 MiB");
        assert_eq!(Seconds(185.2).spoken(), "3 min 05 s");
        assert_eq!(GramsPerKwh(473.0).to_string(), "473 gCO2e/kWh");
    }

    #[test]
    fn a_gram_is_intensity_times_energy() {
        assert_eq!(
            GramsPerKwh(429.0) * (Pue::new(1.1).unwrap() * Joules(3.6e6)),
            GramsCo2e(429.0 * 1.1)
        );
        assert_eq!(Pue::new(0.9), None);
    }
}
