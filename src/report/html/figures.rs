//! Which charts over a run's course a report has, and what each shows.
//!
//! Owns the choice of axes, series and limits, and the words under each chart. Takes a report and its course, returns figures; a
//! chart that nothing is known for is absent. Draws nothing itself: `chart` does.

use super::history::{Course, Point};
use super::units::{energy_tick, mass_tick, number_tick, percent_tick, step_tick};
use crate::report::chart::{Axis, Bars, Mark, Plot, Rule, Scale, Series, Shape};
use crate::report::show;
use crate::report::types::Report;
use crate::units::{GramsCo2e, Joules};

/// From this ratio of the largest to the smallest loss a linear axis would hide the end of training.
const LOG_FROM: f64 = 20.0;
/// A limit is drawn where it is at most so many times what was spent; farther off it would squeeze the curve into a corner.
const LIMIT_WITHIN: f64 = 2.5;
/// Most points of a line; of a longer run the least and the largest of each stretch are drawn.
const MOST_POINTS: usize = 400;

/// A chart before it has a width.
pub enum Chart {
    /// Two axes.
    Plot(Box<Plot>),
    /// Bars.
    Bars(Bars),
}

/// A chart with what stands under it.
pub struct Figure {
    /// Unique on the page.
    pub id: &'static str,
    /// The chart.
    pub chart: Chart,
    /// (form, class, name) of each series that needs a name.
    pub legend: Vec<(&'static str, &'static str, String)>,
    /// What to know when reading it.
    pub caption: String,
}

impl Figure {
    /// A plot whose series name themselves.
    pub fn plot(id: &'static str, plot: Plot, caption: String) -> Self {
        let form = |shape: &Shape| match shape {
            Shape::Line(_) => "line",
            Shape::Marks(_) => "mark",
            Shape::Band(_) => "band",
        };
        let legend = plot
            .series
            .iter()
            .filter(|series| !series.name.is_empty())
            .map(|series| (form(&series.shape), series.class, series.name.clone()))
            .collect();
        Self {
            id,
            chart: Chart::Plot(Box::new(plot)),
            legend,
            caption,
        }
    }

    /// Bars, which name themselves.
    pub fn bars(id: &'static str, bars: Bars, caption: String) -> Self {
        Self {
            id,
            chart: Chart::Bars(bars),
            legend: Vec::new(),
            caption,
        }
    }
}

/// The energy limit where it can be shown beside what was spent.
fn near_limit(report: &Report) -> Option<Joules> {
    report
        .budget
        .limits
        .energy_j
        .filter(|limit| limit.0 > 0.0 && limit.0 <= LIMIT_WITHIN * report.energy.total_j.0)
}

/// What is said of a limit that is too far off to be drawn.
fn far_limit(report: &Report) -> String {
    let far = report
        .budget
        .limits
        .energy_j
        .filter(|_| near_limit(report).is_none());
    far.map_or_else(String::new, |limit| {
        format!(
            " The energy budget of {} lies beyond the edge.",
            show::energy(limit)
        )
    })
}

/// A horizontal axis of joules: from nothing to the end or to just past the limit.
fn joules_axis(report: &Report) -> Option<Axis> {
    let ends = [
        Some(Joules::ZERO),
        Some(report.energy.total_j),
        near_limit(report).map(|limit| limit * 1.03),
    ];
    let label = format!("energy spent, {}", show::word(report.energy.meter));
    let axis = Axis::over(
        &label,
        Scale::Linear,
        energy_tick,
        ends.into_iter().flatten().map(|joules| joules.0),
    )?;
    Some(axis.tight())
}

/// The validation losses, each where the weights that had it were reached.
pub fn validation(report: &Report, course: &Course) -> Vec<Mark> {
    let training = &report.training;
    let before = training
        .val_loss_before
        .map(|loss| (0, course.before, loss));
    let between = course
        .points
        .iter()
        .filter_map(|point| Some((point.step, point.spent, point.val_loss?)));
    let mut losses: Vec<(u64, Joules, f64)> = before.into_iter().chain(between).collect();
    let marked = losses
        .last()
        .is_some_and(|(step, ..)| *step == training.steps);
    if let (false, Some(loss), Some(last)) = (marked, training.val_loss_after, course.points.last())
    {
        losses.push((last.step, last.spent, loss));
    }
    let count = losses.len();
    let mark = |(index, (step, spent, loss)): (usize, (u64, Joules, f64))| Mark {
        at: [spent.0, loss],
        says: format!(
            "step {}: validation loss {} after {}",
            show::count(step),
            show::number(loss),
            show::energy(spent)
        ),
        label: (index == 0 || index + 1 == count).then(|| show::number(loss)),
    };
    losses.into_iter().enumerate().map(mark).collect()
}

/// By ratios where a linear axis would hide the end of training.
pub fn loss_scale(losses: impl Iterator<Item = f64>) -> Scale {
    let ends = losses
        .filter(|loss| loss.is_finite())
        .map(|loss| (loss, loss));
    match ends.reduce(|(least, largest), (loss, _)| (least.min(loss), largest.max(loss))) {
        Some((least, largest)) if least > 0.0 && largest / least >= LOG_FROM => Scale::Log,
        _ => Scale::Linear,
    }
}

/// What stands beside an axis of losses.
pub fn loss_label(scale: Scale) -> &'static str {
    match scale {
        Scale::Log => "loss, nats per loss token (logarithmic)",
        Scale::Linear => "loss, nats per loss token",
    }
}

/// Loss against energy: what each joule bought.
pub fn loss(report: &Report, course: &Course) -> Option<Figure> {
    let line: Vec<[f64; 2]> = course
        .points
        .iter()
        .map(|point| [point.spent.0, point.loss.unwrap_or(f64::NAN)])
        .collect();
    let marks = validation(report, course);
    let values = || {
        line.iter()
            .chain(marks.iter().map(|mark| &mark.at))
            .map(|at| at[1])
            .filter(|loss| loss.is_finite())
    };
    let scale = loss_scale(values());
    let y = Axis::over(loss_label(scale), scale, number_tick, values())?;
    let desc = match (marks.first(), marks.last()) {
        (Some(first), Some(last)) if marks.len() > 1 => {
            format!("From {} to {}.", first.says, last.says)
        }
        _ => format!(
            "The training loss of {}.",
            show::counted(course.points.len() as u64, "step")
        ),
    };
    let mut series = vec![Series {
        name: "training loss".to_string(),
        class: "training",
        shape: Shape::Line(thinned(&line)),
    }];
    if !marks.is_empty() {
        series.push(Series {
            name: "validation loss".to_string(),
            class: "validation",
            shape: Shape::Marks(marks),
        });
    }
    let plot = Plot {
        title: "Loss against energy".to_string(),
        desc,
        x: joules_axis(report)?,
        y,
        series,
        rules: near_limit(report)
            .map(|limit| Rule::X(limit.0, format!("budget {limit}")))
            .into_iter()
            .collect(),
        height: 320.0,
    };
    let caption = "Each loss stands at all that the run had spent when its weights were reached, evaluations and saves included.";
    Some(Figure::plot(
        "loss",
        plot,
        caption.to_string() + &far_limit(report),
    ))
}

/// The learning rate under the loss, over the same joules.
pub fn learning_rate(report: &Report, course: &Course) -> Option<Figure> {
    let line: Vec<[f64; 2]> = course
        .points
        .iter()
        .map(|point| [point.spent.0, point.lr])
        .collect();
    let rates = line.iter().map(|at| at[1]);
    let plot = Plot {
        title: "Learning rate against energy".to_string(),
        desc: format!(
            "The highest rate is {}.",
            number_tick(rates.clone().fold(0.0, f64::max))
        ),
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
    (!line.is_empty()).then(|| Figure {
        legend: Vec::new(),
        ..Figure::plot("rate", plot, String::new())
    })
}

/// How much of each budget was used, under the loss, over the same joules. A time budget goes by the wall time of what was metered.
pub fn budget_used(report: &Report, course: &Course) -> Option<Figure> {
    let (limits, budget) = (&report.budget.limits, &report.budget);
    let last = course.points.last()?;
    let of = |name: &str, class, limit: Option<f64>, used: &dyn Fn(&Point) -> f64| {
        let limit = limit.filter(|limit| *limit > 0.0)?;
        let line: Vec<[f64; 2]> = course
            .points
            .iter()
            .map(|point| [point.spent.0, used(point) / limit])
            .collect();
        Some(Series {
            name: name.to_string(),
            class,
            shape: Shape::Line(thinned(&line)),
        })
    };
    let total = report.energy.total_j;
    let in_proportion = |whole: f64| move |point: &Point| whole * (point.spent / total);
    let carbon = in_proportion(report.carbon.gco2e.0);
    // Only a price of energy has bounds; a price of time goes by the clock.
    let money = budget
        .spent
        .cost
        .as_ref()
        .zip(budget.spent_high.cost.as_ref())
        .map(|(spent, _)| spent.amount);
    let cost = in_proportion(money.unwrap_or_default());
    let lines = [
        of(
            "energy",
            "used-energy",
            limits.energy_j.map(|limit| limit.0),
            &|point| point.spent.0,
        ),
        of(
            "carbon",
            "used-carbon",
            limits.carbon_gco2e.map(|limit| limit.0),
            &carbon,
        ),
        of(
            "FLOPs",
            "used-flops",
            limits.flops.map(|limit| limit.0),
            &|point| point.flops as f64,
        ),
        of(
            "time",
            "used-time",
            limits.time_s.map(|limit| limit.0),
            &|point| point.wall.0,
        ),
        of(
            "cost",
            "used-cost",
            limits
                .cost
                .as_ref()
                .filter(|_| money.is_some())
                .map(|limit| limit.amount),
            &cost,
        ),
    ];
    let series: Vec<Series> = lines.into_iter().flatten().collect();
    let ends: Vec<String> = series
        .iter()
        .filter_map(|series| Some(format!("{} {}", series.name, percent_tick(series.end()?))))
        .collect();
    let tops = series.iter().filter_map(Series::end);
    let plot = Plot {
        title: "Budget used against energy".to_string(),
        desc: format!(
            "After step {}: {}.",
            show::count(last.step),
            ends.join(", ")
        ),
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
    let caption = format!(
        "After the last step: {}. The last evaluation and save come on top.",
        ends.join(", ")
    );
    (!plot.series.is_empty()).then(|| Figure::plot("used", plot, caption))
}

/// Energy as the steps went by, from nothing to the total.
pub fn energy(report: &Report, course: &Course) -> Option<Figure> {
    let energy = &report.energy;
    let grown = Growth {
        id: "energy",
        title: "Energy spent",
        class: "energy",
        form: energy_tick,
        total: energy.total_j.0,
        bounds: energy
            .low_j
            .zip(energy.high_j)
            .map(|(low, high)| [low.0, high.0]),
        limit: near_limit(report).map(|limit| (limit.0, format!("budget {limit}"))),
        shown: |value| show::energy(Joules(value)),
    };
    grown.figure(report, course)
}

/// Emissions as the steps went by.
pub fn emissions(report: &Report, course: &Course) -> Option<Figure> {
    let carbon = &report.carbon;
    let limit = report
        .budget
        .limits
        .carbon_gco2e
        .filter(|limit| limit.0 > 0.0 && limit.0 <= LIMIT_WITHIN * carbon.gco2e.0);
    let grown = Growth {
        id: "emissions",
        title: "Emissions (CO2e)",
        class: "emissions",
        form: mass_tick,
        total: carbon.gco2e.0,
        bounds: carbon
            .low_gco2e
            .zip(carbon.high_gco2e)
            .map(|(low, high)| [low.0, high.0]),
        limit: limit.map(|limit| (limit.0, format!("budget {}", mass_tick(limit.0)))),
        shown: |value| show::carbon(GramsCo2e(value)),
    };
    grown.figure(report, course)
}

/// An amount that grows with the energy, in proportion.
struct Growth {
    id: &'static str,
    title: &'static str,
    class: &'static str,
    form: fn(f64) -> String,
    total: f64,
    bounds: Option<[f64; 2]>,
    limit: Option<(f64, String)>,
    shown: fn(f64) -> String,
}

impl Growth {
    fn figure(self, report: &Report, course: &Course) -> Option<Figure> {
        let (first, last) = (course.points.first()?, course.points.last()?);
        let share = |spent: Joules| spent / report.energy.total_j;
        let start = [first.step.saturating_sub(1) as f64, share(course.before)];
        let steps = course
            .points
            .iter()
            .map(|point| [point.step as f64, share(point.spent)]);
        // Where the run ends: the last evaluation and save are in its total.
        let shares: Vec<[f64; 2]> = [start]
            .into_iter()
            .chain(steps)
            .chain([[last.step as f64, 1.0]])
            .collect();
        let shares = thinned(&shares);
        let grown = |factor: f64| {
            shares
                .iter()
                .map(move |[step, share]| [*step, share * factor])
        };
        let line = Series {
            name: "central".to_string(),
            class: self.class,
            shape: Shape::Line(grown(self.total).collect()),
        };
        let mut series = Vec::new();
        if let Some([low, high]) = self.bounds {
            let band = shares
                .iter()
                .map(|[step, share]| [*step, share * low, share * high])
                .collect();
            series.push(Series {
                name: "interval".to_string(),
                class: self.class,
                shape: Shape::Band(band),
            });
        }
        series.push(line);
        let limit = self.limit.as_ref().map(|(limit, _)| *limit);
        let tops = [
            Some(0.0),
            Some(self.total),
            self.bounds.map(|[_, high]| high),
            limit,
        ];
        let x = Axis::over(
            "step",
            Scale::Linear,
            step_tick,
            shares.iter().map(|[step, _]| *step),
        )?;
        let bounds = self.bounds.map(|[low, high]| {
            format!(", between {} and {}", (self.shown)(low), (self.shown)(high))
        });
        let said = format!("{}{}", (self.shown)(self.total), bounds.unwrap_or_default());
        let plot = Plot {
            title: format!("{} against steps", self.title),
            desc: format!("In the end {said}."),
            x: x.whole().tight(),
            y: Axis::over(
                self.title,
                Scale::Linear,
                self.form,
                tops.into_iter().flatten(),
            )?,
            series,
            rules: self
                .limit
                .map(|(at, text)| Rule::Y(at, text))
                .into_iter()
                .collect(),
            height: 240.0,
        };
        Some(Figure::plot(self.id, plot, format!("In the end {said}.")))
    }
}

/// At most [`MOST_POINTS`] points: of each stretch the first of its least and the first of its largest, in their order.
pub fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let (ends, inner) = (
        [points[0], points[points.len() - 1]],
        &points[1..points.len() - 1],
    );
    let stretch = inner.len().div_ceil(MOST_POINTS / 2 - 1);
    let extremes = inner.chunks(stretch).flat_map(|chunk| {
        let by = |better: fn(f64, f64) -> bool| {
            (1..chunk.len()).fold(0, |best, next| {
                if better(chunk[next][1], chunk[best][1]) {
                    next
                } else {
                    best
                }
            })
        };
        let (least, largest) = (by(|a, b| a < b), by(|a, b| a > b));
        // A stretch that holds a gap keeps it.
        let gap = chunk.iter().position(|[_, y]| !y.is_finite());
        let mut kept: Vec<usize> = [least, largest].into_iter().chain(gap).collect();
        kept.sort_unstable();
        kept.dedup();
        kept.into_iter().map(|index| chunk[index])
    });
    [ends[0]]
        .into_iter()
        .chain(extremes)
        .chain([ends[1]])
        .collect()
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
        assert!(thin.len() <= MOST_POINTS + 1, "{}", thin.len());
        for kept in [0, 4_321, 6_789, 9_999] {
            assert!(thin.contains(&points[kept]), "{kept}");
        }
        assert!(thin.iter().any(|[x, y]| *x == 7_777.0 && y.is_nan()));
        assert!(thin.is_sorted_by(|a, b| a[0] < b[0]));
        assert_eq!(thinned(&points[..400]), points[..400]);
    }
}
