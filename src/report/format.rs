//! Figures as text: joules with watt-hours, grouped counts, ratios, ranges, chart ticks.
//!
//! A figure that is absent or not finite becomes [`UNKNOWN`]. Knows nothing of reports.

use std::fmt::Display;

use serde::Serialize;

use crate::energy::Interval;
use crate::units::{Flops, GramsCo2e, Joules, Seconds, significant};

/// Text of an unknown figure.
pub const UNKNOWN: &str = "not known";

/// `text` where `value` is finite.
fn finite(value: f64, text: impl FnOnce() -> String) -> String {
    if value.is_finite() {
        text()
    } else {
        UNKNOWN.to_string()
    }
}

/// Joules with watt-hours: "18 kJ (5 Wh)".
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

/// A duration in words.
pub fn time(value: Seconds) -> String {
    or_none(value.0, "0 s", || value.spoken())
}

/// `text` where `value` is finite; a zero in its plain unit.
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

/// `part` of `whole` in per cent; never rounded to 0 % or 100 %.
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

/// About three significant digits.
fn three_digits(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.01.. => format!("{value:.2}"),
        _ => significant(value),
    }
}

/// The name of a meter, phase or label in `report.json`.
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

/// "range 2.866 to 4.298 kJ"; `None` where both ends read alike.
pub fn range<T: Copy>(interval: &Interval<T>, form: impl Fn(T) -> String) -> Option<String> {
    let low = form(interval.low);
    let high = form(interval.high);
    (low != high).then(|| format!("range {}", span(&low, &high)))
}

/// ", range 2.866 to 4.298 kJ"; empty where both ends read alike.
pub fn range_suffix<T: Copy>(interval: &Interval<T>, form: impl Fn(T) -> String) -> String {
    let range = range(interval, form).map(|range| format!(", {range}"));
    range.unwrap_or_default()
}

/// "2.866 to 4.298 kJ": a unit that both ends share is written once.
pub fn span(low: &str, high: &str) -> String {
    match (low.rsplit_once(' '), high.rsplit_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => format!("{number} to {high}"),
        _ => format!("{low} to {high}"),
    }
}

/// `value` as `form` writes it, or [`UNKNOWN`].
pub fn or_unknown<T, S: Display>(value: Option<T>, form: impl FnOnce(T) -> S) -> String {
    value.map_or_else(|| UNKNOWN.to_string(), |value| form(value).to_string())
}

/// A tick of an energy axis: "20 J".
pub fn energy_tick(value: f64) -> String {
    if value == 0.0 {
        "0".to_string()
    } else {
        Joules(value).to_string()
    }
}

/// A tick of an emissions axis: "2 mg". The axis label names CO2e.
pub fn mass_tick(value: f64) -> String {
    if value == 0.0 {
        "0".to_string()
    } else {
        GramsCo2e(value).to_string().replace("CO2e", "")
    }
}

/// A plain tick: "0.05", "2e-4".
pub fn number_tick(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || (1e-3..1e6).contains(&size) => number(value),
        _ => {
            let text = format!("{value:.2e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            format!(
                "{}e{exponent}",
                digits.trim_end_matches('0').trim_end_matches('.')
            )
        }
    }
}

/// A tick of a percentage axis: "20 %".
pub fn percent_tick(value: f64) -> String {
    format!("{} %", number((value * 1000.0).round() / 10.0))
}

/// A tick of a step axis: "1,500".
pub fn step_tick(value: f64) -> String {
    count(value.max(0.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::{Count, GramsPerKwh, Money, Price, Watts};

    /// A printer, its parser, and the largest relative error of a printed figure.
    type Form = (fn(f64) -> String, fn(&str) -> Option<f64>, f64);

    /// The parser of a quantity.
    macro_rules! parse {
        ($quantity:ty, $($amount:tt).+) => {
            |text| Some(text.parse::<$quantity>().ok()?.$($amount).+)
        };
    }

    /// Every form in which a quantity that a recipe or an option takes is printed.
    const FORMS: [Form; 15] = [
        (|x| Joules(x).to_string(), parse!(Joules, 0), 5e-4),
        (|x| energy(Joules(x)), parse!(Joules, 0), 5e-4),
        (|x| watt_hours(Joules(x)), parse!(Joules, 0), 5e-4),
        (energy_tick, parse!(Joules, 0), 5e-4),
        (|x| Watts(x).to_string(), parse!(Watts, 0), 5e-4),
        (|x| flops(Flops(x)), parse!(Flops, 0), 5e-4),
        (|x| carbon(GramsCo2e(x)), parse!(GramsCo2e, 0), 5e-4),
        (mass_tick, parse!(GramsCo2e, 0), 5e-4),
        (|x| GramsPerKwh(x).to_string(), parse!(GramsPerKwh, 0), 5e-4),
        (|x| Seconds(x).to_string(), parse!(Seconds, 0), 5e-4),
        // Whole seconds from a minute on, whole minutes from an hour on.
        (|x| time(Seconds(x)), parse!(Seconds, 0), 1.0 / 60.0),
        (|x| Count(x).to_string(), parse!(Count, 0), 5e-4),
        (|x| count(x as u64), parse!(Count, 0), 1.0),
        (|x| money(x).to_string(), parse!(Money, amount), 5e-4),
        (|x| price(x).to_string(), parse!(Price, money.amount), 5e-4),
    ];

    fn money(amount: f64) -> Money {
        let currency = "EUR".to_string();
        Money { amount, currency }
    }

    fn price(amount: f64) -> Price {
        let per = crate::units::Per::KilowattHour;
        Price {
            money: money(amount),
            per,
        }
    }

    proptest! {
        /// What is printed can be typed back, to the digits that are shown.
        #[test]
        fn every_printed_quantity_is_read_back(exponent in -10.0..19.0_f64, form in 0..FORMS.len()) {
            let (print, parse, error) = FORMS[form];
            let value = 10f64.powf(exponent);
            let text = print(value);
            let read = parse(&text);
            prop_assert!(read.is_some_and(|read| (read - value).abs() <= 1.01 * error * value), "{text}: {read:?} of {value}");
        }
    }

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
    fn a_range_names_a_shared_unit_once() {
        let interval = Interval {
            low: Joules(40.0),
            central: Joules(50.0),
            high: Joules(60.0),
        };
        let text = |joules: Joules| joules.to_string();
        assert_eq!(range(&interval, text).unwrap(), "range 40 to 60 J");
        assert_eq!(range(&Interval::exact(Joules(2.0)), text), None);
        assert_eq!(span("900 J", "1.1 kJ"), "900 J to 1.1 kJ");
        assert_eq!(span("1.2", "1.3"), "1.2 to 1.3");
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

    #[test]
    fn ticks_are_short() {
        assert_eq!([0.0, 20.0, 1e9].map(energy_tick), ["0", "20 J", "1 GJ"]);
        assert_eq!([0.0, 0.002, 1000.0].map(mass_tick), ["0", "2 mg", "1 kg"]);
        assert_eq!(
            [0.0, 0.05, 2e-4, 1.5e-5, 1e6].map(number_tick),
            ["0", "0.05", "2e-4", "1.5e-5", "1e6"]
        );
        assert_eq!([0.2, 0.9961].map(percent_tick), ["20 %", "99.6 %"]);
        assert_eq!(step_tick(1500.0), "1,500");
    }
}
