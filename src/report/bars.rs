//! Bars of a report and of a comparison: energy by phase and component, memory, baselines, several runs.
//!
//! Owns values, scales and captions; the page's style draws them. A chart without data is absent.

use serde::Serialize;

use super::baselines::sorted;
use super::chart::Scale;
use super::compare::{Comparison, Row};
use super::energy::shares;
use super::figures::Figure;
use super::format;
use super::sections::memory_parts;
use super::types::Report;
use crate::energy::Interval;
use crate::units::{Bytes, Joules};

/// Ratio of the largest to the smallest bar above which bars are logarithmic.
const LOG_BARS: f64 = 50.0;

/// A bar, its lengths in per cent of the page's width.
#[derive(Debug, Serialize)]
pub(super) struct BarRow {
    name: String,
    figure: String,
    class: &'static str,
    width: String,
    span: Option<[String; 2]>,
}

/// A named value to be drawn as a bar.
struct Bar {
    name: String,
    value: f64,
    /// The value as text.
    figure: String,
    class: &'static str,
    /// Lower and upper bound.
    span: Option<[f64; 2]>,
}

impl Figure {
    /// Bars over a linear scale from zero, or a logarithmic one from well below the smallest value. A value without a
    /// position has no bar, only its text.
    fn bars(
        id: &'static str,
        title: &str,
        bars: Vec<Bar>,
        scale: Scale,
        caption: &str,
    ) -> Option<Self> {
        let ends = bars.iter().flat_map(|bar| {
            [bar.value]
                .into_iter()
                .chain(bar.span.into_iter().flatten())
        });
        let positive: Vec<f64> = ends.filter(|end| end.is_finite() && *end > 0.0).collect();
        let high = positive.iter().copied().fold(0.0, f64::max);
        let low = positive.iter().copied().fold(f64::INFINITY, f64::min) / 4.0;
        let percent = |value: f64| {
            let position = match scale {
                Scale::Linear => value / high,
                Scale::Log => (value / low).ln() / (high / low).ln(),
            };
            let position = if position.is_finite() { position } else { 0.0 };
            format!("{:.2}", position.clamp(0.0, 1.0) * 100.0)
        };
        let row = |bar: Bar| BarRow {
            width: percent(bar.value),
            span: bar.span.map(|span| span.map(percent)),
            name: bar.name,
            figure: bar.figure,
            class: bar.class,
        };
        (!bars.is_empty()).then(|| Self {
            id,
            title: title.to_string(),
            legend: Vec::new(),
            plots: Vec::new(),
            bars: bars.into_iter().map(row).collect(),
            dots: scale == Scale::Log,
            caption: caption.to_string(),
        })
    }
}

/// The chart of the section with this title.
pub fn section_figure(report: &Report, title: &str) -> Option<Figure> {
    match title {
        "Memory" => memory(report),
        "Energy by phase" => by_phase(report),
        "Energy by component" => by_component(report),
        "Comparison" => comparison(report),
        _ => None,
    }
}

fn by_phase(report: &Report) -> Option<Figure> {
    let total = report.energy.total.central;
    let phases = report.energy.by_phase.iter();
    let bars = phases.map(|(phase, joules)| energy_bar(format::word(phase), *joules, total));
    let title = "Energy by phase";
    Figure::bars("phases", title, bars.collect(), Scale::Linear, "")
}

fn by_component(report: &Report) -> Option<Figure> {
    let energy = &report.energy;
    let shares = shares(energy.counted_parts.as_ref()?).into_iter();
    let bars = shares.map(|share| energy_bar(share.name, share.joules, energy.meters.counted_j));
    let title = "Counted energy by component";
    Figure::bars("components", title, bars.collect(), Scale::Linear, "")
}

fn energy_bar(name: String, joules: Joules, total: Joules) -> Bar {
    let share = format::share(joules.0, total.0);
    Bar {
        name,
        value: joules.0,
        figure: format!("{}, {share}", format::energy(joules)),
        class: "energy",
        span: None,
    }
}

/// Measured peak and forecast.
fn memory(report: &Report) -> Option<Figure> {
    let bar = |name: &str, bytes: Bytes, class| Bar {
        name: name.to_string(),
        value: bytes.0 as f64,
        figure: bytes.to_string(),
        class,
        span: None,
    };
    let forecast = memory_parts(report.memory.as_ref()?)
        .into_iter()
        .map(|(name, bytes)| bar(name, bytes, "other"));
    let peak = report.training.peak_rss_bytes;
    let peak = peak.map(|bytes| bar("measured peak", bytes, "energy"));
    let bars = peak.into_iter().chain(forecast).collect();
    Figure::bars("memory", "Memory", bars, Scale::Linear, "")
}

/// The run and its baselines, on a logarithmic scale.
fn comparison(report: &Report) -> Option<Figure> {
    let total = report.energy.total;
    let mut bars = vec![Bar {
        name: "this run".to_string(),
        value: total.central.0,
        figure: format::energy(total.central),
        class: "energy",
        span: span(&total),
    }];
    for baseline in sorted(report) {
        let Some(energy) = baseline.energy else {
            continue;
        };
        let times = |ratio: Interval<f64>| format!(", {} times", format::times(ratio.central));
        let times = baseline.ratio.map(times).unwrap_or_default();
        bars.push(Bar {
            name: if baseline.measured.is_some() {
                baseline.name()
            } else {
                format!("{} ({})", baseline.name(), format::word(baseline.label))
            },
            value: energy.central.0,
            figure: format::energy(energy.central) + &times,
            class: "other",
            span: span(&energy),
        });
    }
    if bars.len() < 2 {
        return None;
    }
    let caption = caption(&bars, Scale::Log);
    let title = "Energy of this run and its baselines";
    Figure::bars("comparison", title, bars, Scale::Log, &caption)
}

fn span(interval: &Interval<Joules>) -> Option<[f64; 2]> {
    (interval.low != interval.high).then_some([interval.low.0, interval.high.0])
}

/// Energy of several runs.
pub fn energies_of_runs(comparison: &Comparison, names: &[String]) -> Option<Figure> {
    let rows = comparison.runs.iter().zip(names);
    let bars: Vec<Bar> = rows
        .map(|(row, name)| Bar {
            name: name.clone(),
            value: row.energy.central.0,
            figure: format::energy(row.energy.central),
            class: "energy",
            span: span(&row.energy),
        })
        .collect();
    let values = bars
        .iter()
        .map(|bar| bar.value)
        .filter(|value| *value > 0.0);
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let scale = if values.fold(0.0, f64::max) / least >= LOG_BARS {
        Scale::Log
    } else {
        Scale::Linear
    };
    let caption = caption(&bars, scale);
    Figure::bars("energies", "Energy", bars, scale, &caption)
}

fn caption(bars: &[Bar], scale: Scale) -> String {
    let has_spans = bars.iter().any(|bar| bar.span.is_some());
    let sentences = [
        (scale == Scale::Log, "Logarithmic scale."),
        (has_spans, "Thin lines: lower to upper bound."),
    ];
    let holding = sentences.into_iter().filter(|(holds, _)| *holds);
    holding.map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

/// Loss reduction per kilojoule of several runs; `None` where no run has a positive one.
pub fn rates_of_runs(comparison: &Comparison, names: &[String]) -> Option<Figure> {
    let rows = &comparison.runs;
    rows.iter()
        .find(|row| row.loss_per_kj.is_some_and(|rate| rate > 0.0))?;
    let bar = |(row, name): (&Row, &String)| {
        let best = comparison.best.as_ref() == Some(&row.name);
        Bar {
            name: if best {
                format!("{name} (best)")
            } else {
                name.clone()
            },
            value: row.loss_per_kj.unwrap_or(0.0).max(0.0),
            figure: format::or_unknown(row.loss_per_kj, format::number),
            class: "emissions",
            span: None,
        }
    };
    let bars = rows.iter().zip(names).map(bar).collect();
    let caption = "Reduction of the validation loss per kilojoule, nats per token.";
    let title = "Loss reduction per kJ";
    Figure::bars("rates", title, bars, Scale::Linear, caption)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_value_says() {
        let bar = |value, span| Bar {
            name: String::new(),
            value,
            figure: String::new(),
            class: "",
            span,
        };
        let widths = |bars, scale| {
            let figure = Figure::bars("", "", bars, scale, "").unwrap();
            figure.bars.into_iter().map(|bar| (bar.width, bar.span))
        };
        let linear = vec![bar(5.0, None), bar(20.0, None), bar(f64::NAN, None)];
        let linear: Vec<_> = widths(linear, Scale::Linear)
            .map(|(width, _)| width)
            .collect();
        assert_eq!(linear, ["25.00", "100.00", "0.00"]);
        // From 4 / 4 = 1 to 100: two decades.
        let log = vec![bar(10.0, Some([4.0, 100.0])), bar(0.0, None)];
        let mut log = widths(log, Scale::Log);
        let span = ["30.10", "100.00"].map(str::to_string);
        assert_eq!(log.next().unwrap(), ("50.00".to_string(), Some(span)));
        assert_eq!(log.next().unwrap().0, "0.00");
    }
}
