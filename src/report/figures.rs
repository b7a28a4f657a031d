//! Plots of a report and of a comparison: axes, series, limits, captions.
//!
//! A plot without data is absent. `chart` draws it.

use serde::Serialize;

use super::bars::BarRow;
use super::baselines::{Baseline, CurvePoint, kind_name};
use super::chart::{Axis, Mark, Plot, Rule, Scale, Series, Shape};
use super::compare::Comparison;
use super::format::{self, energy_tick, mass_tick, number_tick, percent_tick, step_tick};
use super::history::{History, Point, Timeline};
use super::types::{LossUnit, Report};
use crate::energy::Interval;
use crate::units::{GramsCo2e, Joules};

/// Ratio of the largest to the smallest loss above which the axis is logarithmic.
const LOG_LOSS: f64 = 20.0;
/// A limit is drawn up to this multiple of what was spent; further away it would squeeze the curve.
const LIMIT_WITHIN: f64 = 2.5;
/// Most points of a line; a longer one is thinned to the extremes of each stretch.
const MAX_POINTS: usize = 400;
/// CSS class and width in pixels of a plot on a desktop and on a phone.
const FULL: [(&str, f64); 2] = [("wide", 760.0), ("narrow", 340.0)];
/// Half the width of a desktop, or a phone.
const HALF: [(&str, f64); 1] = [("half", 370.0)];
/// CSS classes of runs, distinguished by colour and dashes.
const RUNS: [&str; 8] = [
    "run-0", "run-1", "run-2", "run-3", "run-4", "run-5", "run-6", "run-7",
];
/// CSS classes of thin lines: the run and its trained baselines.
const THIN: [&str; 3] = ["run-0 thin", "run-1 thin", "run-2 thin"];

/// A chart with its legend and caption, as the templates take it.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub(super) id: &'static str,
    pub(super) title: String,
    pub(super) legend: Vec<Key>,
    pub(super) plots: Vec<Drawn>,
    pub(super) bars: Vec<BarRow>,
    /// Dots at the values instead of bars from zero.
    pub(super) dots: bool,
    pub(super) caption: String,
}

/// Legend entry.
#[derive(Debug, Serialize)]
pub(super) struct Key {
    form: &'static str,
    class: &'static str,
    name: String,
}

/// A plot for one page width.
#[derive(Debug, Serialize)]
pub(super) struct Drawn {
    class: &'static str,
    svg: String,
}

impl Figure {
    /// `plot` drawn for each of `widths`, with the named series in the legend.
    fn plot(
        id: &'static str,
        plot: &Plot,
        widths: &[(&'static str, f64)],
        caption: String,
    ) -> Self {
        let named = plot.series.iter().filter(|series| !series.name.is_empty());
        let legend = named.map(|series| Key {
            form: match series.shape {
                Shape::Line(_) => "line",
                Shape::Marks(_) => "mark",
                Shape::Band(_) => "band",
            },
            class: series.class,
            name: series.name.clone(),
        });
        let plots = widths.iter().map(|(class, width)| Drawn {
            class,
            svg: plot.svg(&format!("{id}-{class}"), *width),
        });
        Self {
            id,
            title: plot.title.clone(),
            legend: legend.collect(),
            plots: plots.collect(),
            bars: Vec::new(),
            dots: false,
            caption,
        }
    }
}

/// Loss, learning rate, budgets and trained baselines.
pub fn loss_figures(report: &Report, timeline: &Timeline) -> Vec<Figure> {
    let figures = [
        loss(report, timeline),
        learning_rate(report, timeline),
        budget_used(report, timeline),
        trained_baselines(report),
    ];
    figures.into_iter().flatten().collect()
}

/// The energy limit, where it can be drawn.
fn near_limit(report: &Report) -> Option<Joules> {
    let limit = report.budget.limits.energy?;
    let reach = LIMIT_WITHIN * report.energy.total.central.0;
    (limit.0 > 0.0 && limit.0 <= reach).then_some(limit)
}

/// A horizontal axis of joules: from zero to the total, or to just past the limit.
fn joules_axis(report: &Report) -> Option<Axis> {
    let ends = [
        Some(Joules::ZERO),
        Some(report.energy.total.central),
        near_limit(report).map(|limit| limit * 1.03),
    ];
    let label = format!("energy spent, {}", format::word(report.energy.meter));
    let ends = ends.into_iter().flatten().map(|joules| joules.0);
    Some(Axis::over(&label, Scale::Linear, energy_tick, ends)?.fit())
}

/// Validation losses, at the energy spent when their weights were reached.
fn validation(report: &Report, timeline: &Timeline) -> Vec<Mark> {
    let training = &report.training;
    let before = training
        .val_loss_before
        .map(|loss| (0, timeline.before, loss));
    let during = timeline
        .points
        .iter()
        .filter_map(|point| Some((point.step, point.spent, point.val_loss?)));
    let mut losses: Vec<(u64, Joules, f64)> = before.into_iter().chain(during).collect();
    let complete = losses
        .last()
        .is_some_and(|(step, ..)| *step == training.steps);
    if let Some(loss) = training.val_loss_after.filter(|_| !complete)
        && let Some(last) = timeline.points.last()
    {
        losses.push((last.step, last.spent, loss));
    }
    let count = losses.len();
    let mark = |(index, (step, spent, loss)): (usize, (u64, Joules, f64))| Mark {
        at: [spent.0, loss],
        tooltip: format!(
            "step {}: validation loss {} after {}",
            format::count(step),
            format::number(loss),
            format::energy(spent)
        ),
        label: (index == 0 || index + 1 == count).then(|| format::number(loss)),
    };
    losses.into_iter().enumerate().map(mark).collect()
}

/// An axis of losses; logarithmic where a linear one would hide the end of training.
fn loss_axis(unit: LossUnit, losses: impl Iterator<Item = f64> + Clone) -> Option<Axis> {
    let finite = losses.clone().filter(|loss| loss.is_finite());
    let least = finite.clone().fold(f64::INFINITY, f64::min);
    let most = finite.fold(f64::NEG_INFINITY, f64::max);
    let (scale, label) = if least > 0.0 && most / least >= LOG_LOSS {
        (Scale::Log, format!("loss, {} (logarithmic)", unit.words()))
    } else {
        (Scale::Linear, format!("loss, {}", unit.words()))
    };
    Axis::over(&label, scale, number_tick, losses)
}

/// Losses over energy.
fn loss(report: &Report, timeline: &Timeline) -> Option<Figure> {
    let line = line_of(timeline, |point| point.loss.unwrap_or(f64::NAN));
    let marks = validation(report, timeline);
    let desc = match marks.as_slice() {
        [first, .., last] => format!("From {} to {}.", first.tooltip, last.tooltip),
        _ => {
            let steps = format::counted(timeline.points.len() as u64, "step");
            format!("Training loss of {steps}.")
        }
    };
    let line = Shape::Line(thinned(&line));
    let mut series = vec![Series::new("training loss", "training", line)];
    if !marks.is_empty() {
        let marks = Shape::Marks(marks);
        series.push(Series::new("validation loss", "validation", marks));
    }
    let losses: Vec<f64> = series
        .iter()
        .flat_map(Series::points)
        .map(|at| at[1])
        .collect();
    let limit = near_limit(report);
    let rule = limit.map(|limit| Rule::X(limit.0, format!("budget {limit}")));
    let plot = Plot {
        title: "Loss against energy".to_string(),
        desc,
        x: joules_axis(report)?,
        y: loss_axis(report.training.loss_unit, losses.into_iter())?,
        series,
        rules: rule.into_iter().collect(),
        height: 320.0,
    };
    let mut caption =
        "Loss against cumulative energy, evaluations and checkpoints included.".to_string();
    if let Some(far) = report.budget.limits.energy.filter(|_| limit.is_none()) {
        let far = format::energy(far);
        caption += &format!(" The energy budget of {far} is beyond the plotted range.");
    }
    Some(Figure::plot("loss", &plot, &FULL, caption))
}

/// Learning rate over energy.
fn learning_rate(report: &Report, timeline: &Timeline) -> Option<Figure> {
    let line = line_of(timeline, |point| point.lr);
    let rates = line.iter().map(|at| at[1]);
    let peak = number_tick(rates.clone().fold(0.0, f64::max));
    let plot = Plot {
        title: "Learning rate against energy".to_string(),
        desc: format!("Peak learning rate {peak}."),
        y: Axis::over(
            "learning rate",
            Scale::Linear,
            number_tick,
            rates.chain([0.0]),
        )?,
        x: joules_axis(report)?,
        series: vec![Series {
            name: "learning rate".to_string(),
            class: "rate",
            shape: Shape::Line(thinned(&line)),
        }],
        rules: Vec::new(),
        height: 150.0,
    };
    (!line.is_empty()).then(|| Figure::plot("rate", &plot, &FULL, String::new()))
}

/// Used fraction of each budget over energy. The time budget uses metered wall time.
fn budget_used(report: &Report, timeline: &Timeline) -> Option<Figure> {
    let last = timeline.points.last()?;
    let series = budget_series(report, timeline);
    let used = |series: &Series| {
        let end = percent_tick(series.end()?);
        Some(format!("{} {end}", series.name))
    };
    let ends: Vec<String> = series.iter().filter_map(used).collect();
    let ends = ends.join(", ");
    let tops = series.iter().filter_map(Series::end);
    let plot = Plot {
        title: "Budget used against energy".to_string(),
        desc: format!("After step {}: {ends}.", format::count(last.step)),
        y: Axis::over(
            "budget used",
            Scale::Linear,
            percent_tick,
            tops.chain([0.0, 1.0]),
        )?,
        x: joules_axis(report)?,
        series,
        rules: Vec::new(),
        height: 150.0,
    };
    let caption =
        format!("After the last step: {ends}. The final evaluation and checkpoint add to this.");
    (!plot.series.is_empty()).then(|| Figure::plot("used", &plot, &FULL, caption))
}

fn budget_series(report: &Report, timeline: &Timeline) -> Vec<Series> {
    let budget = &report.budget;
    let limits = &budget.limits;
    let total = report.energy.total.central;
    let grams = report.carbon.emissions.central.0;
    // A price of energy has bounds; a price of time does not, and its cost is not proportional to energy.
    let by_energy = budget.spent_high.cost.is_some();
    let cost = budget.spent.cost.as_ref().filter(|_| by_energy);
    let money = cost.map_or(0.0, |cost| cost.amount);
    let series = |name: &str, class, limit: Option<f64>, used: &dyn Fn(&Point) -> f64| {
        let limit = limit.filter(|limit| *limit > 0.0)?;
        let line = line_of(timeline, |point| used(point) / limit);
        Some(Series {
            name: name.to_string(),
            class,
            shape: Shape::Line(thinned(&line)),
        })
    };
    let energy = limits.energy.map(|limit| limit.0);
    let carbon = limits.carbon.map(|limit| limit.0);
    let flops = limits.flops.map(|limit| limit.0);
    let time = limits.time.map(|limit| limit.0);
    let price = limits.cost.as_ref().filter(|_| cost.is_some());
    let price = price.map(|limit| limit.amount);
    let share = |point: &Point| point.spent / total;
    let all = [
        series("energy", "used-energy", energy, &|point| point.spent.0),
        series("carbon", "used-carbon", carbon, &|point| {
            grams * share(point)
        }),
        series("FLOPs", "used-flops", flops, &|point| point.flops as f64),
        series("time", "used-time", time, &|point| point.wall.0),
        series("cost", "used-cost", price, &|point| money * share(point)),
    ];
    all.into_iter().flatten().collect()
}

/// Energy and emissions over steps.
pub fn growth_figures(report: &Report, timeline: &Timeline) -> Vec<Figure> {
    let grams = &report.carbon.emissions;
    let reach = LIMIT_WITHIN * grams.central.0;
    let gram_limit = report.budget.limits.carbon;
    let gram_limit = gram_limit.filter(|limit| limit.0 > 0.0 && limit.0 <= reach);
    let energy = Growth {
        id: "energy",
        title: "Energy spent",
        class: "energy",
        tick: energy_tick,
        amount: report.energy.total.map(|joules| joules.0),
        limit: near_limit(report).map(|limit| (limit.0, format!("budget {limit}"))),
        text: |value| format::energy(Joules(value)),
    };
    let emissions = Growth {
        id: "emissions",
        title: "Emissions (CO2e)",
        class: "emissions",
        tick: mass_tick,
        amount: grams.map(|grams| grams.0),
        limit: gram_limit.map(|limit| (limit.0, format!("budget {}", mass_tick(limit.0)))),
        text: |value| format::carbon(GramsCo2e(value)),
    };
    let figures = [energy, emissions].map(|growth| growth.figure(report, timeline));
    figures.into_iter().flatten().collect()
}

/// An amount proportional to the energy spent.
struct Growth {
    id: &'static str,
    title: &'static str,
    class: &'static str,
    tick: fn(f64) -> String,
    amount: Interval<f64>,
    limit: Option<(f64, String)>,
    text: fn(f64) -> String,
}

impl Growth {
    fn figure(self, report: &Report, timeline: &Timeline) -> Option<Figure> {
        let shares = shares_spent(report, timeline)?;
        let Interval { low, central, high } = self.amount;
        let mut series = Vec::new();
        if low != high {
            let edges = shares
                .iter()
                .map(|[step, share]| [*step, share * low, share * high]);
            series.push(Series {
                name: "range".to_string(),
                class: self.class,
                shape: Shape::Band(edges.collect()),
            });
        }
        let line = shares.iter().map(|[step, share]| [*step, share * central]);
        series.push(Series {
            name: "central".to_string(),
            class: self.class,
            shape: Shape::Line(line.collect()),
        });
        let steps = shares.iter().map(|[step, _]| *step);
        let limit = self.limit.as_ref().map(|(limit, _)| *limit);
        let tops = [0.0, central, high].into_iter().chain(limit);
        let range = format::range_suffix(&self.amount, self.text);
        let total = format!("Total: {}{range}.", (self.text)(central));
        let rule = self.limit.map(|(limit, name)| Rule::Y(limit, name));
        let plot = Plot {
            title: format!("{} against steps", self.title),
            desc: total.clone(),
            x: Axis::over("step", Scale::Linear, step_tick, steps)?
                .integer_ticks()
                .fit(),
            y: Axis::over(self.title, Scale::Linear, self.tick, tops)?,
            series,
            rules: rule.into_iter().collect(),
            height: 240.0,
        };
        Some(Figure::plot(self.id, &plot, &HALF, total))
    }
}

/// Fraction of the total energy spent by each step, from before the first to the end of the run.
fn shares_spent(report: &Report, timeline: &Timeline) -> Option<Vec<[f64; 2]>> {
    let total = report.energy.total.central;
    let first = timeline.points.first()?.step.saturating_sub(1);
    let last = timeline.points.last()?.step;
    let mut shares = vec![[first as f64, timeline.before / total]];
    shares.extend(
        timeline
            .points
            .iter()
            .map(|point| [point.step as f64, point.spent / total]),
    );
    // The last evaluation and checkpoint follow the last step.
    shares.push([last as f64, 1.0]);
    Some(thinned(&shares))
}

/// Validation loss of the run and of trained baselines over the energy of their steps alone.
fn trained_baselines(report: &Report) -> Option<Figure> {
    let trained = |baseline: &Baseline| {
        let measured = baseline.measured.clone()?;
        Some((kind_name(baseline.kind), measured))
    };
    let baselines: Vec<_> = report.baselines.iter().filter_map(trained).collect();
    let equal = baselines.first()?.1.run_training_j;
    let run = ("this run", report.training.curve.clone());
    let others = baselines
        .into_iter()
        .map(|(name, measured)| (name, measured.curve));
    let curves = [run].into_iter().chain(others);
    let series: Vec<Series> = RUNS
        .into_iter()
        .zip(THIN)
        .zip(curves)
        .flat_map(|((class, thin), (name, curve))| curve_series(class, thin, name, &curve))
        .collect();
    let points: Vec<[f64; 2]> = series.iter().flat_map(Series::points).collect();
    let energies = points.iter().map(|at| at[0]).chain([0.0, equal.0 * 1.03]);
    let plot = Plot {
        title: "Loss against training energy, with trained baselines".to_string(),
        desc: format!("The run's training took {}.", format::energy(equal)),
        x: Axis::over("training energy", Scale::Linear, energy_tick, energies)?.fit(),
        y: loss_axis(report.training.loss_unit, points.iter().map(|at| at[1]))?,
        series,
        rules: vec![Rule::X(equal.0, "equal energy".to_string())],
        height: 280.0,
    };
    let caption = "Validation losses (thin: training losses) over the energy of steps alone, without loading, evaluations and \
                   checkpoints.";
    Some(Figure::plot("baselines", &plot, &FULL, caption.to_string()))
}

/// Training losses as a thin line, validation losses as a line with marks.
fn curve_series(
    class: &'static str,
    thin: &'static str,
    name: &str,
    curve: &[CurvePoint],
) -> Vec<Series> {
    let training: Vec<[f64; 2]> = curve
        .iter()
        .filter_map(|point| Some([point.energy_j.0, point.train_loss?]))
        .collect();
    let mark = |point: &CurvePoint| {
        let loss = point.val_loss?;
        let step = format::count(point.step);
        let energy = format::energy(point.energy_j);
        Some(Mark {
            at: [point.energy_j.0, loss],
            tooltip: format!(
                "{name}, step {step}: {} after {energy}",
                format::number(loss)
            ),
            label: None,
        })
    };
    let marks: Vec<Mark> = curve.iter().filter_map(mark).collect();
    let line = marks.iter().map(|mark| mark.at).collect();
    vec![
        Series::new("", thin, Shape::Line(thinned(&training))),
        Series::new(name, class, Shape::Line(line)),
        Series::new("", class, Shape::Marks(marks)),
    ]
}

/// Loss of several runs over their energy: validation losses where there are at least two, else training losses.
pub fn losses_of_runs<'a>(
    comparison: &Comparison,
    names: &[String],
    runs: impl Iterator<Item = (&'a Report, &'a History)>,
) -> Option<Figure> {
    let mut runs = runs.peekable();
    let unit = runs.peek().map(|(report, _)| report.training.loss_unit);
    let named = RUNS.into_iter().zip(names).zip(runs);
    let series: Vec<Series> = named
        .filter_map(|((class, name), (report, history))| {
            loss_of_run(
                name,
                class,
                report,
                &history.timeline(report, comparison.meter),
            )
        })
        .flatten()
        .collect();
    let points: Vec<[f64; 2]> = series.iter().flat_map(Series::points).collect();
    let energies = comparison.runs.iter().map(|row| row.energy.central.0);
    let label = format!("energy spent, {}", format::word(comparison.meter));
    let plot = Plot {
        title: "Loss of each run against its energy".to_string(),
        desc: comparison.verdict(),
        x: Axis::over(&label, Scale::Linear, energy_tick, energies.chain([0.0]))?.fit(),
        y: loss_axis(unit.unwrap_or_default(), points.iter().map(|at| at[1]))?,
        series,
        rules: Vec::new(),
        height: 320.0,
    };
    let mut caption = "Validation losses against cumulative energy.".to_string();
    if names.len() > RUNS.len() {
        caption += &format!(" Only the first {} runs are drawn.", RUNS.len());
    }
    Some(Figure::plot("losses", &plot, &FULL, caption))
}

/// One run's line and marks; `None` without a finite loss.
fn loss_of_run(
    name: &str,
    class: &'static str,
    report: &Report,
    timeline: &Timeline,
) -> Option<[Series; 2]> {
    let mut marks = validation(report, timeline);
    marks.iter_mut().for_each(|mark| mark.label = None);
    let (line, suffix) = if marks.len() > 1 {
        (marks.iter().map(|mark| mark.at).collect(), "")
    } else {
        let line = line_of(timeline, |point| point.loss.unwrap_or(f64::NAN));
        (line, " (training loss)")
    };
    let is_finite = line.iter().any(|at| at[1].is_finite());
    is_finite.then(|| {
        [
            Series::new(
                &format!("{name}{suffix}"),
                class,
                Shape::Line(thinned(&line)),
            ),
            Series::new("", class, Shape::Marks(marks)),
        ]
    })
}

/// (energy spent, `value`) of every step.
fn line_of(timeline: &Timeline, value: impl Fn(&Point) -> f64) -> Vec<[f64; 2]> {
    let points = timeline.points.iter();
    points.map(|point| [point.spent.0, value(point)]).collect()
}

/// At most [`MAX_POINTS`] points: of each stretch the first minimum and the first maximum, in order.
fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    let [first, inner @ .., last] = points else {
        return points.to_vec();
    };
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let mut thin = vec![*first];
    for chunk in inner.chunks(inner.len().div_ceil(MAX_POINTS / 2 - 1)) {
        let extreme = |better: fn(f64, f64) -> bool| {
            (1..chunk.len()).fold(0, |best, next| {
                if better(chunk[next][1], chunk[best][1]) {
                    next
                } else {
                    best
                }
            })
        };
        let mut kept = vec![extreme(|a, b| a < b), extreme(|a, b| a > b)];
        // A stretch with a gap keeps it.
        kept.extend(chunk.iter().position(|[_, y]| !y.is_finite()));
        kept.sort_unstable();
        kept.dedup();
        thin.extend(kept.into_iter().map(|index| chunk[index]));
    }
    thin.push(*last);
    thin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_ends_extremes_and_gaps() {
        let mut points: Vec<[f64; 2]> = (0..10_000).map(|i| [f64::from(i), 1.0]).collect();
        points[4_321][1] = 9.0;
        points[6_789][1] = 0.5;
        points[7_777][1] = f64::NAN;
        let thin = thinned(&points);
        assert!(thin.len() <= MAX_POINTS + 1, "{}", thin.len());
        for kept in [0, 4_321, 6_789, 9_999] {
            assert!(thin.contains(&points[kept]), "{kept}");
        }
        assert!(thin.iter().any(|[x, y]| *x == 7_777.0 && y.is_nan()));
        assert!(thin.is_sorted_by(|a, b| a[0] < b[0]));
        assert_eq!(thinned(&points[..400]), points[..400]);
    }
}
