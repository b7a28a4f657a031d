//! How the ticks of a chart are written: short, each with its own unit.
//!
//! Owns the forms alone. Takes a tick's value, returns its text. Knows nothing of axes.

use crate::report::show;
use crate::units::{GramsCo2e, Joules};

/// "20 J".
pub fn energy_tick(value: f64) -> String {
    if value == 0.0 {
        "0".to_string()
    } else {
        Joules(value).to_string()
    }
}

/// "2 mg": that it is of CO2e stands beside the axis.
pub fn mass_tick(value: f64) -> String {
    if value == 0.0 {
        "0".to_string()
    } else {
        GramsCo2e(value).to_string().replace("CO2e", "")
    }
}

/// "0.05", "2e-4".
pub fn number_tick(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || (1e-3..1e6).contains(&size) => show::number(value),
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

/// "20 %".
pub fn percent_tick(value: f64) -> String {
    format!("{} %", show::number((value * 1000.0).round() / 10.0))
}

/// "1,500".
pub fn step_tick(value: f64) -> String {
    show::count(value.max(0.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

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
