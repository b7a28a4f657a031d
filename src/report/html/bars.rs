//! The charts made of bars: energy by phase and by what it went into, memory, other ways of training, several runs.
//!
//! Owns which bars each has, their axes and captions. Takes a report, returns figures; a chart that nothing is known for is absent.
//! Draws nothing itself: `chart` does.

use super::figures::Figure;
use super::units::{energy_tick, number_tick};
use crate::report::chart::{Axis, Bar, Bars, Scale};
use crate::report::memory::named;
use crate::report::page::name;
use crate::report::parts::shares;
use crate::report::show;
use crate::report::types::{Baseline, Report};
use crate::units::{Bytes, Joules};

/// From this ratio of the largest to the smallest bar a linear axis would hide the small ones.
const LOG_FROM: f64 = 50.0;

/// Energy by what it was spent on.
pub fn by_phase(report: &Report) -> Option<Figure> {
    let energy = &report.energy;
    let bars = energy
        .by_phase
        .iter()
        .map(|(phase, joules)| energy_bar(&show::word(phase), *joules, energy.total_j));
    linear("phases", "Energy by phase", bars.collect(), "")
}

/// Counted energy by what it went into.
pub fn by_part(report: &Report) -> Option<Figure> {
    let energy = &report.energy;
    let shares = shares(energy.counted_parts.as_ref()?).into_iter();
    let bars = shares.map(|share| energy_bar(&share.name, share.joules, energy.meters.counted_j));
    linear(
        "parts",
        "What the counted energy went into",
        bars.collect(),
        "",
    )
}

fn energy_bar(name: &str, joules: Joules, of: Joules) -> Bar {
    let figure = format!("{}, {}", show::energy(joules), show::share(joules.0, of.0));
    Bar {
        name: name.to_string(),
        value: joules.0,
        figure,
        class: "energy",
        span: None,
    }
}

fn linear(id: &'static str, title: &str, bars: Vec<Bar>, caption: &str) -> Option<Figure> {
    let axis = Axis::over(
        "energy",
        Scale::Linear,
        energy_tick,
        bars.iter().map(|bar| bar.value).chain([0.0]),
    )?;
    figure(id, title, axis, bars, caption.to_string())
}

fn figure(
    id: &'static str,
    title: &str,
    axis: Axis,
    bars: Vec<Bar>,
    caption: String,
) -> Option<Figure> {
    let desc = bars
        .iter()
        .map(|bar| format!("{}: {}", bar.name, bar.figure))
        .collect::<Vec<_>>()
        .join("; ");
    (!bars.is_empty()).then(|| {
        Figure::bars(
            id,
            Bars {
                title: title.to_string(),
                desc,
                axis,
                bars,
            },
            caption,
        )
    })
}

/// The memory forecast by its parts, and the peak that was seen.
pub fn memory(report: &Report) -> Option<Figure> {
    let memory = report.memory.as_ref()?;
    let seen = report.training.peak_rss_bytes;
    let (unit, size) = if memory.peak_bytes.0 >= 2 << 30 {
        ("GiB", 1u64 << 30)
    } else {
        ("MiB", 1 << 20)
    };
    let bar = |(name, bytes, class): (&str, Bytes, &'static str)| Bar {
        name: name.to_string(),
        value: bytes.0 as f64 / size as f64,
        figure: bytes.to_string(),
        class,
        span: None,
    };
    let forecast = named(memory)
        .into_iter()
        .map(|(name, bytes)| (name, bytes, "other"));
    let seen = seen.map(|bytes| ("peak of the process", bytes, "energy"));
    let bars: Vec<Bar> = seen.into_iter().chain(forecast).map(bar).collect();
    let axis = Axis::over(
        &format!("memory, {unit}"),
        Scale::Linear,
        number_tick,
        bars.iter().map(|bar| bar.value).chain([0.0]),
    )?;
    figure("memory", "Memory", axis, bars, String::new())
}

/// This run beside the other ways of training.
pub fn comparison(report: &Report) -> Option<Figure> {
    let energy = &report.energy;
    let own = Bar {
        name: "this run".to_string(),
        value: energy.total_j.0,
        figure: show::energy(energy.total_j),
        class: "energy",
        span: span(energy.low_j, energy.high_j),
    };
    let mut baselines: Vec<&Baseline> = report.baselines.iter().collect();
    baselines.sort_by_key(|baseline| baseline.kind);
    let other = |baseline: &&Baseline| {
        let energy = baseline.energy_j?;
        let ratio = baseline.ratio.map_or_else(String::new, |ratio| {
            format!(", {} times", show::times(ratio))
        });
        Some(Bar {
            name: match baseline.measured {
                Some(_) => name(baseline),
                None => format!("{} ({})", name(baseline), show::word(baseline.label)),
            },
            value: energy.0,
            figure: show::energy(energy) + &ratio,
            class: "other",
            span: span(baseline.low_j, baseline.high_j),
        })
    };
    let bars: Vec<Bar> = [own]
        .into_iter()
        .chain(baselines.iter().filter_map(other))
        .collect();
    if bars.len() < 2 {
        return None;
    }
    let mut caption =
        "The axis is logarithmic: each power of ten takes the same length, so read the figures and not the lengths.".to_string();
    if bars.iter().any(|bar| bar.span.is_some()) {
        caption += " The thin lines reach from the lower to the upper bound.";
    }
    figure(
        "comparison",
        "Energy of other ways of training",
        logarithmic(&bars)?,
        bars,
        caption,
    )
}

fn span(low: Option<Joules>, high: Option<Joules>) -> Option<[f64; 2]> {
    low.zip(high).map(|(low, high)| [low.0, high.0])
}

/// Bars begin well below the smallest, so that it has a length too.
fn logarithmic(bars: &[Bar]) -> Option<Axis> {
    let ends = || {
        bars.iter().flat_map(|bar| {
            bar.span
                .unwrap_or([bar.value; 2])
                .into_iter()
                .chain([bar.value])
        })
    };
    let least = ends()
        .filter(|value| *value > 0.0)
        .fold(f64::INFINITY, f64::min);
    Axis::over(
        "energy, logarithmic",
        Scale::Log,
        energy_tick,
        ends().chain([least / 4.0]),
    )
}

/// The energy of several runs, each a (name, central, low and high).
pub fn energies(runs: &[(String, Joules, Option<[f64; 2]>)]) -> Option<Figure> {
    let bar = |(name, joules, span): &(String, Joules, Option<[f64; 2]>)| Bar {
        name: name.clone(),
        value: joules.0,
        figure: show::energy(*joules),
        class: "energy",
        span: *span,
    };
    let bars: Vec<Bar> = runs.iter().map(bar).collect();
    let positive = || {
        bars.iter()
            .map(|bar| bar.value)
            .filter(|value| *value > 0.0)
    };
    let wide =
        positive().fold(0.0, f64::max) / positive().fold(f64::INFINITY, f64::min) >= LOG_FROM;
    let tops = bars
        .iter()
        .flat_map(|bar| [bar.value, bar.span.map_or(bar.value, |[_, high]| high)]);
    let axis = if wide {
        logarithmic(&bars)?
    } else {
        Axis::over("energy", Scale::Linear, energy_tick, tops.chain([0.0]))?
    };
    let spans = if bars.iter().any(|bar| bar.span.is_some()) {
        "The thin lines reach from the lower to the upper bound."
    } else {
        ""
    };
    figure("energies", "Energy", axis, bars, spans.to_string())
}

/// What each run's kilojoule bought, nats of validation loss; a run for which that is not known has a name and no bar.
pub fn bought(runs: &[(String, Option<f64>)]) -> Option<Figure> {
    let bar = |(name, rate): &(String, Option<f64>)| Bar {
        name: name.clone(),
        value: rate.unwrap_or(f64::NAN).max(0.0),
        figure: show::or_unknown(*rate, show::number),
        class: "emissions",
        span: None,
    };
    let bars: Vec<Bar> = runs.iter().map(bar).collect();
    let rates = runs.iter().filter_map(|(_, rate)| *rate);
    rates.clone().find(|rate| *rate > 0.0)?;
    let axis = Axis::over(
        "loss bought, nats a kilojoule",
        Scale::Linear,
        number_tick,
        rates.map(|rate| rate.max(0.0)).chain([0.0]),
    )?;
    let caption = "Nats per loss token that the validation loss fell for each kilojoule.";
    figure(
        "bought",
        "Loss bought by a kilojoule",
        axis,
        bars,
        caption.to_string(),
    )
}
