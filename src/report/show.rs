//! How a figure is written on a page: joules with watt-hours beside them, counts in groups, ratios in words.
//!
//! Owns the forms alone. Takes quantities, returns texts; what is absent or not finite becomes `UNKNOWN`, so that no page ever
//! shows a NaN. Knows nothing of reports.

use std::fmt::Display;

use serde::Serialize;

use crate::units::{Flops, GramsCo2e, Joules, Seconds, significant};

/// What stands where nothing is known.
pub const UNKNOWN: &str = "not known";

/// `text` where `value` is finite.
fn finite(value: f64, text: impl FnOnce() -> String) -> String {
    if value.is_finite() {
        text()
    } else {
        UNKNOWN.to_string()
    }
}

/// Joules with watt-hours beside them: "18 kJ (5 Wh)".
pub fn energy(value: Joules) -> String {
    or_none(value.0, "0 J", || {
        format!("{value} ({})", watt_hours(value))
    })
}

/// Watt-hours alone: "17.98 mWh".
pub fn watt_hours(value: Joules) -> String {
    /// From how many Wh a unit is used, how many Wh it is, and its name.
    const UNITS: [(f64, f64, &str); 6] = [
        (1e9, 1e9, "GWh"),
        (1e6, 1e6, "MWh"),
        (1e3, 1e3, "kWh"),
        (0.1, 1.0, "Wh"),
        (1e-3, 1e-3, "mWh"),
        (0.0, 1e-6, "µWh"),
    ];
    let wh = value.wh();
    let (_, factor, unit) = UNITS
        .into_iter()
        .find(|(floor, ..)| wh.abs() >= *floor)
        .unwrap_or((0.1, 1.0, "Wh"));
    format!("{} {unit}", significant(wh / factor))
}

/// A mass of emissions.
pub fn carbon(value: GramsCo2e) -> String {
    or_none(value.0, "0 gCO2e", || value.to_string())
}

/// A number of FLOPs.
pub fn flops(value: Flops) -> String {
    finite(value.0, || value.to_string())
}

/// A time as a person says it.
pub fn time(value: Seconds) -> String {
    or_none(value.0, "0 s", || value.spoken())
}

/// `text` where `value` is finite, in the plain unit where it is nothing.
fn or_none(value: f64, nothing: &str, text: impl FnOnce() -> String) -> String {
    if value == 0.0 {
        nothing.to_string()
    } else {
        finite(value, text)
    }
}

/// A plain number of four digits.
pub fn number(value: f64) -> String {
    finite(value, || significant(value))
}

/// `part` of `whole` in per cent; what is not nothing and not all is not rounded to either.
pub fn share(part: f64, whole: f64) -> String {
    let percent = part / whole * 100.0;
    finite(percent, || match percent {
        _ if percent > 0.0 && percent < 0.05 => "under 0.1 %".to_string(),
        _ if (99.95..100.0).contains(&percent) => "over 99.9 %".to_string(),
        _ => format!("{percent:.1} %"),
    })
}

/// How many times: "1.5", "8.07 million"; beyond trillions in powers of ten.
pub fn times(ratio: f64) -> String {
    const WORDS: [(f64, &str); 3] = [(1e12, " trillion"), (1e9, " billion"), (1e6, " million")];
    finite(ratio, || {
        match WORDS.into_iter().find(|(floor, _)| ratio >= *floor) {
            Some((floor, word)) if ratio < 1e15 => format!("{}{word}", three_digits(ratio / floor)),
            Some(_) => format!("{ratio:.2e}"),
            None if ratio >= 1000.0 => count(ratio.round() as u64),
            None => three_digits(ratio),
        }
    })
}

/// About three significant digits, for what is not known better.
fn three_digits(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.01.. => format!("{value:.2}"),
        _ => significant(value),
    }
}

/// The word that `report.json` has for a meter, a phase or a label.
pub fn word(value: impl Serialize) -> String {
    let word = serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_string));
    word.unwrap_or_else(|| UNKNOWN.to_string())
}

/// A count in groups of three: "134,515,008".
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let groups = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

/// "1 record", "3 records".
pub fn counted(value: u64, noun: &str) -> String {
    let plural = if value == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(value))
}

/// "between 2 J and 4 J", where both ends are known and are not written alike.
pub fn between<T>(low: Option<T>, high: Option<T>, form: impl Fn(T) -> String) -> Option<String> {
    let (low, high) = (form(low?), form(high?));
    (low != high).then(|| format!("between {low} and {high}"))
}

/// `value` as `form` writes it, or [`UNKNOWN`].
pub fn or_unknown<T, S: Display>(value: Option<T>, form: impl FnOnce(T) -> S) -> String {
    value.map_or_else(|| UNKNOWN.to_string(), |value| form(value).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!(energy(Joules(18_000.0)), "18 kJ (5 Wh)");
        assert_eq!(energy(Joules(3_582.0)), "3.582 kJ (0.995 Wh)");
        assert_eq!(energy(Joules(3.6)), "3.6 J (1 mWh)");
        assert_eq!(energy(Joules(7.2e9)), "7.2 GJ (2 MWh)");
        assert_eq!(energy(Joules(0.0)), "0 J");
        assert_eq!(times(1.5), "1.50");
        assert_eq!(times(8_070_900.48), "8.07 million");
        assert_eq!(times(2_345.6), "2,346");
        assert_eq!(times(3.2e16), "3.20e16");
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(134_515_008), "134,515,008");
        assert_eq!(counted(1, "record"), "1 record");
        assert_eq!(share(1.0, 8.0), "12.5 %");
        assert_eq!(
            [
                share(0.0, 8.0),
                share(1.0, 9999.0),
                share(9998.0, 9999.0),
                share(8.0, 8.0)
            ],
            ["0.0 %", "under 0.1 %", "over 99.9 %", "100.0 %"]
        );
    }

    #[test]
    fn what_is_not_finite_is_not_known() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let shown = [
                energy(Joules(bad)),
                carbon(GramsCo2e(bad)),
                number(bad),
                times(bad),
                time(Seconds(bad)),
            ];
            assert!(shown.iter().all(|text| text == UNKNOWN), "{shown:?}");
        }
        assert_eq!(share(0.0, 0.0), UNKNOWN);
    }
}
