//! Physical quantities and money, their parsing ("5 Wh", "18 kJ", "2 g", "10 min", "1e15 FLOP") and display.
//!
//! Every other module uses these types for quantities instead of a bare `f64`.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Joules in one watt-hour.
pub const JOULES_PER_WH: f64 = 3600.0;
/// Joules in one kilowatt-hour.
pub const JOULES_PER_KWH: f64 = 3.6e6;

/// A text that is not a quantity, and the accepted form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseQuantityError {
    /// The text.
    pub value: String,
    /// The accepted form, with an example.
    pub rule: String,
}

impl fmt::Display for ParseQuantityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a quantity here: {}", self.value, self.rule)
    }
}

impl std::error::Error for ParseQuantityError {}

impl ParseQuantityError {
    fn new(value: &str, rule: &str) -> Self {
        Self {
            value: value.to_string(),
            rule: rule.to_string(),
        }
    }
}

/// Splits "5 Wh" into number and unit; `None` unless the number is finite and not negative.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    // The longest prefix that is a number: the `e` of an exponent is part of it, the `E` of "EFLOP" is not.
    let prefixes = (1..=text.len())
        .rev()
        .filter_map(|end| text.split_at_checked(end));
    let mut numbers = prefixes.filter_map(|(number, unit)| Some((parse_number(number)?, unit)));
    let (number, unit) = numbers.next()?;
    (number.is_finite() && number >= 0.0).then_some((number, unit.trim()))
}

/// Parses digits with `_`, a decimal point and an exponent; no "inf" or "nan".
fn parse_number(text: &str) -> Option<f64> {
    let allowed = |c: char| c.is_ascii_digit() || matches!(c, '.' | '_' | 'e' | 'E' | '+' | '-');
    let digits = text.chars().all(allowed).then(|| text.replace('_', ""))?;
    digits.parse().ok()
}

/// A unit's name and its factor to the base unit.
pub type Unit = (&'static str, f64);

/// Largest relative difference between two printed forms of an amount, each of four digits.
const ROUNDING: f64 = 1.1e-3;

/// The factor of a unit; spaces inside it are ignored, and the Greek letter mu is the micro sign.
fn factor_of(unit: &str, units: &[Unit]) -> Option<f64> {
    let unit: String = unit.chars().filter(|c| !c.is_whitespace()).collect();
    let unit = unit.replace('μ', "µ");
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    Some(*factor)
}

/// Parses an amount, "18 kJ", or two printed forms of it, "18 kJ (5 Wh)", which must agree.
fn parse_amount(text: &str, units: &[Unit]) -> Option<f64> {
    let amount = |text: &str| {
        let (number, unit) = number_and_unit(text)?;
        Some(number * factor_of(unit, units)?)
    };
    let forms = text.trim().strip_suffix(')');
    let Some((first, second)) = forms.and_then(|forms| forms.split_once('(')) else {
        return amount(text);
    };
    let value = amount(first)?;
    let difference = (value - amount(second)?).abs();
    (difference <= ROUNDING * value).then_some(value)
}

/// Parses a sum of amounts in ever smaller units, "2 min 25 s".
fn parse_sum(text: &str, units: &[Unit]) -> Option<f64> {
    let mut rest = text;
    let mut sum = 0.0;
    let mut larger = f64::INFINITY;
    loop {
        let (number, tail) = number_and_unit(rest)?;
        let end = tail.find(|c: char| !c.is_alphabetic());
        let (unit, next) = tail.split_at(end.unwrap_or(tail.len()));
        let factor = factor_of(unit, units).filter(|factor| *factor < larger)?;
        sum += number * factor;
        if next.is_empty() {
            return Some(sum);
        }
        larger = factor;
        rest = next;
    }
}

/// Parses an amount whose digits may be in groups of three, "134,515,008".
fn parse_count(text: &str, units: &[Unit]) -> Option<f64> {
    let digits = |group: &str| group.bytes().take_while(u8::is_ascii_digit).count();
    let (first, groups) = text.trim().split_once(',').unwrap_or((text, ""));
    let is_grouped = groups.split(',').all(|group| digits(group) == 3);
    if groups.is_empty() || ((1..=3).contains(&digits(first)) && is_grouped) {
        parse_amount(&text.replace(',', ""), units)
    } else {
        None
    }
}

/// Formats `value` with up to four significant digits, in the largest unit in which it is at least one.
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

/// Formats with about four significant digits and without trailing zeros.
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
    ($(#[$doc:meta])* $name:ident, $parse:ident of $units:expr, shown $shown:expr, rule $rule:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0.0);

            /// The units that are read.
            pub const UNITS: &[Unit] = &$units;

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
                let parsed = $parse(text, Self::UNITS);
                parsed.map(Self).ok_or_else(|| ParseQuantityError::new(text, $rule))
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
    parse_amount of [("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("µJ", 1e-6), ("kJ", 1e3), ("MJ", 1e6), ("GJ", 1e9), ("TJ", 1e12), ("Wh", 3600.0),
        ("µWh", 3.6e-3), ("uWh", 3.6e-3), ("mWh", 3.6), ("kWh", 3.6e6), ("MWh", 3.6e9), ("GWh", 3.6e12), ("TWh", 3.6e15)],
    shown [(1e-6, "µJ"), (1e-3, "mJ"), (1.0, "J"), (1e3, "kJ"), (1e6, "MJ"), (1e9, "GJ"), (1e12, "TJ")],
    rule "a number and one of J, kJ, MJ, GJ, mWh, Wh, kWh, MWh, or smaller and larger ones, as in \"5 Wh\" or \"18 kJ\""
);

quantity!(
    /// Power in watts.
    Watts,
    parse_amount of [("W", 1.0), ("mW", 1e-3), ("kW", 1e3), ("MW", 1e6)],
    shown [(1e-3, "mW"), (1.0, "W"), (1e3, "kW"), (1e6, "MW")],
    rule "a number and one of W, kW, MW, as in \"65 W\""
);

quantity!(
    /// A count of floating-point operations of matrix products and attention; one multiply-add is two.
    Flops,
    parse_amount of [("", 1.0), ("FLOP", 1.0), ("FLOPs", 1.0), ("kFLOP", 1e3), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15),
        ("EFLOP", 1e18), ("ZFLOP", 1e21), ("YFLOP", 1e24)],
    shown [(1.0, "FLOP"), (1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP")],
    rule "a number, alone or with FLOP, GFLOP, TFLOP, PFLOP or EFLOP, as in \"1e15\" or \"2 PFLOP\""
);

quantity!(
    /// A count of parameters, tokens or hours, with the suffixes of model names: 7 B parameters, 1.4 T tokens.
    Count,
    parse_count of [("", 1.0), ("K", 1e3), ("k", 1e3), ("M", 1e6), ("m", 1e6), ("B", 1e9), ("b", 1e9), ("T", 1e12), ("t", 1e12)],
    shown [(1.0, ""), (1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T")],
    rule "a number, alone or with K, M, B or T, as in \"1.75e11\", \"175B\" or \"1.4T\""
);

quantity!(
    /// Mass of greenhouse gas in grams of CO2 equivalent.
    GramsCo2e,
    parse_amount of [("g", 1.0), ("gCO2e", 1.0), ("mg", 1e-3), ("mgCO2e", 1e-3), ("µg", 1e-6), ("ug", 1e-6), ("µgCO2e", 1e-6), ("ugCO2e", 1e-6),
        ("kg", 1e3), ("kgCO2e", 1e3), ("t", 1e6), ("tCO2e", 1e6)],
    shown [(1e-6, "µgCO2e"), (1e-3, "mgCO2e"), (1.0, "gCO2e"), (1e3, "kgCO2e"), (1e6, "tCO2e")],
    rule "a number and one of µg, mg, g, kg, t, alone or with CO2e, as in \"2 g\" or \"90 mgCO2e\""
);

quantity!(
    /// Intensity of an electricity grid in grams of CO2 equivalent per kilowatt-hour.
    GramsPerKwh,
    parse_amount of [("", 1.0), ("g/kWh", 1.0), ("gCO2e/kWh", 1.0)],
    shown [(1.0, "gCO2e/kWh")],
    rule "a number of gCO2e per kWh, as in \"473\""
);

quantity!(
    /// Time in seconds.
    Seconds,
    parse_sum of [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("us", 1e-6), ("min", 60.0), ("h", 3600.0), ("d", 86400.0)],
    shown [(1e-6, "µs"), (1e-3, "ms"), (1.0, "s")],
    rule "a number and one of ms, s, min, h, d, or a sum of them, as in \"10 min\" or \"2 min 25 s\""
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

    /// Rounds to integer microjoules, half away from zero; negative energies become zero.
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
    /// "12 s", "3 min 05 s", "2 h 07 min".
    pub fn spoken(self) -> String {
        let whole = self.0.round() as u64;
        match whole {
            _ if self.0 < 60.0 => format!("{self}"),
            0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
            _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        }
    }
}

/// Energy in integer microjoules, for the exact sums of the ledger. Arithmetic saturates.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct MicroJoules(pub u64);

impl MicroJoules {
    /// Zero.
    pub const ZERO: Self = Self(0);

    /// The energy in joules.
    pub fn joules(self) -> Joules {
        Joules(self.0 as f64 / 1e6)
    }

    /// The difference, or zero if negative.
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

/// Saturating `+` and `+=` of a count.
macro_rules! saturating_add {
    ($name:ident) => {
        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.saturating_add(other.0))
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }
    };
}

saturating_add!(MicroJoules);
saturating_add!(Bytes);

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

/// Power usage effectiveness: facility energy over machine energy, at least one.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Pue(f64);

impl Pue {
    /// A facility without overhead.
    pub const ONE: Self = Self(1.0);

    /// `None` below one or if not finite.
    pub fn new(value: f64) -> Option<Self> {
        (value.is_finite() && value >= 1.0).then_some(Self(value))
    }

    /// The ratio.
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
    /// In units of the currency.
    pub amount: f64,
    /// ISO 4217 code, three capital letters.
    pub currency: String,
}

impl FromStr for Money {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let rule = "an amount and a currency of three capital letters, as in \"0.05 USD\"";
        let parsed = number_and_unit(text).filter(|(_, currency)| is_currency(currency));
        let (amount, currency) = parsed.ok_or_else(|| ParseQuantityError::new(text, rule))?;
        let currency = currency.to_string();
        Ok(Self { amount, currency })
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

/// Unit of a price.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Kilowatt-hour of facility energy.
    KilowattHour,
    /// Hour of device time.
    DeviceHour,
}

/// A price of electricity ("0.30 USD/kWh") or of a rented device ("2.50 USD/h").
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Price {
    /// The price of one unit.
    pub money: Money,
    /// What it is paid for.
    pub per: Per,
}

impl Price {
    /// The cost of facility `energy` or of device `time`, whichever the price is per.
    pub fn cost(&self, energy: Joules, time: Seconds) -> Money {
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
        let price = text.split_once('/').and_then(|(money, unit)| {
            let per = match unit.trim() {
                "kWh" => Per::KilowattHour,
                "h" => Per::DeviceHour,
                _ => return None,
            };
            let money = money.parse().ok()?;
            Some(Self { money, per })
        });
        price.ok_or_else(|| ParseQuantityError::new(text, rule))
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
    fn quantities_are_parsed_in_their_units() {
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
        assert_eq!("134,515,008".parse(), Ok(Count(134_515_008.0)));
        assert_eq!("1 d 2 h 3 min 4.5 s".parse(), Ok(Seconds(93_784.5)));
        // The Greek letter and the micro sign.
        assert_eq!(
            ["3 μJ", "3 µJ"].map(str::parse),
            [Ok(Joules(3e-6)), Ok(Joules(3e-6))]
        );
        assert_eq!("18 kJ (5 Wh)".parse(), Ok(Joules(18_000.0)));
    }

    #[test]
    fn an_invalid_quantity_is_refused_with_the_accepted_form() {
        for bad in [
            "",
            "5",
            "Wh",
            "-5 Wh",
            "5 wh",
            "inf J",
            "nan J",
            "5 Wh extra",
            "5 Wh 3 J",
            "5 J (2 J)",
            "1,5 J",
        ] {
            let error = bad.parse::<Joules>().unwrap_err();
            assert!(error.rule.contains("\"5 Wh\""), "{bad}: {error}");
        }
        for bad in ["2 s 3 min", "2 min 3", "2 min 3 min", "min"] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad}");
        }
        for bad in ["1,5", "1,5000", "1000,000", ",100"] {
            assert!(bad.parse::<Count>().is_err(), "{bad}");
        }
        assert!("0.30 USD".parse::<Price>().is_err());
        assert!("0.30 usd/kWh".parse::<Price>().is_err());
    }

    #[test]
    fn a_price_is_per_energy_or_per_time() {
        let price: Price = "0.30 USD/kWh".parse().unwrap();
        assert!((price.cost(Joules(3.6e6), Seconds(7.0)).amount - 0.30).abs() < 1e-12);
        let price: Price = "2.50 USD/h".parse().unwrap();
        assert!((price.cost(Joules(3.6e6), Seconds(1800.0)).amount - 1.25).abs() < 1e-12);
    }

    #[test]
    fn quantities_are_displayed_with_four_digits() {
        assert_eq!(Joules(41_230.0).to_string(), "41.23 kJ");
        assert_eq!(Joules(0.0).to_string(), "0 µJ");
        assert_eq!(Bytes(3 << 20).to_string(), "3 MiB");
        assert_eq!(Seconds(185.2).spoken(), "3 min 05 s");
        assert_eq!(GramsPerKwh(473.0).to_string(), "473 gCO2e/kWh");
    }

    #[test]
    fn emissions_are_intensity_times_energy() {
        assert_eq!(
            GramsPerKwh(429.0) * (Pue::new(1.1).unwrap() * Joules(3.6e6)),
            GramsCo2e(429.0 * 1.1)
        );
        assert_eq!(Pue::new(0.9), None);
    }
}
