//! Which charts a report has, and what each shows.
//!
//! Owns the choice of axes, series and limits, and the words under each chart. Takes a report and its course, returns figures; a
//! chart that nothing is known for is absent. Draws nothing itself: `chart` does.

use super::history::{Course, Point};
use super::units::{energy_tick, mass_tick, number_tick, step_tick};
use crate::report::chart::{Axis, Bar, Bars, Mark, Plot, Rule, Scale, Series, Shape};
use crate::report::page::kind_words;
use crate::report::show;
use crate::report::types::{Baseline, Report};
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
    fn plot(id: &'static str, plot: Plot, caption: String) -> Self {
        let form = |shape: &Shape| match shape {
            Shape::Line(_) => "line",
            Shape::Marks(_) => "mark",
            Shape::Band(_) => "band",
        };
        let legend = plot.series.iter().map(|series| (form(&series.shape), series.class, series.name.clone())).collect();
        Self { id, chart: Chart::Plot(Box::new(plot)), legend, caption }
    }

    fn bars(id: &'static str, bars: Bars, caption: String) -> Self {
        Self { id, chart: Chart::Bars(bars), legend: Vec::new(), caption }
    }
}

/// The energy limit where it can be shown beside what was spent.
fn near_limit(report: &Report) -> Option<Joules> {
    report.budget.limits.energy_j.filter(|limit| limit.0 > 0.0 && limit.0 <= LIMIT_WITHIN * report.energy.total_j.0)
}

/// What is said of a limit that is too far off to be drawn.
fn far_limit(report: &Report) -> String {
    let far = report.budget.limits.energy_j.filter(|_| near_limit(report).is_none());
    far.map_or_else(String::new, |limit| format!(" The energy budget of {} lies beyond the edge.", show::energy(limit)))
}

/// A horizontal axis of joules: from nothing to the end or to just past the limit.
fn joules_axis(report: &Report) -> Option<Axis> {
    let ends = [Some(Joules::ZERO), Some(report.energy.total_j), near_limit(report).map(|limit| limit * 1.03)];
    let label = format!("energy spent, {}", show::word(report.energy.meter));
    let axis = Axis::over(&label, Scale::Linear, energy_tick, ends.into_iter().flatten().map(|joules| joules.0))?;
    Some(axis.tight())
}

/// The validation losses, each where the weights that had it were reached.
fn validation(report: &Report, course: &Course) -> Vec<Mark> {
    let training = &report.training;
    let before = training.val_loss_before.map(|loss| (0, course.before, loss));
    let between = course.points.iter().filter_map(|point| Some((point.step, point.spent, point.val_loss?)));
    let mut losses: Vec<(u64, Joules, f64)> = before.into_iter().chain(between).collect();
    let marked = losses.last().is_some_and(|(step, ..)| *step == training.steps);
    if let (false, Some(loss), Some(last)) = (marked, training.val_loss_after, course.points.last()) {
        losses.push((last.step, last.spent, loss));
    }
    let count = losses.len();
    let mark = |(index, (step, spent, loss)): (usize, (u64, Joules, f64))| Mark {
        at: [spent.0, loss],
        says: format!("step {}: validation loss {} after {}", show::count(step), show::number(loss), show::energy(spent)),
        label: (index == 0 || index + 1 == count).then(|| show::number(loss)),
    };
    losses.into_iter().enumerate().map(mark).collect()
}

/// Loss against energy: what each joule bought.
pub fn loss(report: &Report, course: &Course) -> Option<Figure> {
    let line: Vec<[f64; 2]> = course.points.iter().map(|point| [point.spent.0, point.loss.unwrap_or(f64::NAN)]).collect();
    let marks = validation(report, course);
    let values = || line.iter().chain(marks.iter().map(|mark| &mark.at)).map(|at| at[1]).filter(|loss| loss.is_finite());
    let (least, largest) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let scale = if least > 0.0 && largest / least >= LOG_FROM { Scale::Log } else { Scale::Linear };
    let label = if scale == Scale::Log { "loss, nats per loss token (logarithmic)" } else { "loss, nats per loss token" };
    let y = Axis::over(label, scale, number_tick, values())?;
    let desc = match (marks.first(), marks.last()) {
        (Some(first), Some(last)) if marks.len() > 1 => format!("From {} to {}.", first.says, last.says),
        _ => format!("The training loss of {}.", show::counted(course.points.len() as u64, "step")),
    };
    let mut series = vec![Series { name: "training loss".to_string(), class: "training", shape: Shape::Line(thinned(&line)) }];
    if !marks.is_empty() {
        series.push(Series { name: "validation loss".to_string(), class: "validation", shape: Shape::Marks(marks) });
    }
    let plot = Plot {
        title: "Loss against energy".to_string(),
        desc,
        x: joules_axis(report)?,
        y,
        series,
        rules: near_limit(report).map(|limit| Rule::X(limit.0, format!("budget {limit}"))).into_iter().collect(),
        height: 320.0,
    };
    let caption = "Each loss stands at all that the run had spent when its weights were reached, evaluations and saves included.";
    Some(Figure::plot("loss", plot, caption.to_string() + &far_limit(report)))
}

/// The learning rate under the loss, over the same joules.
pub fn learning_rate(report: &Report, course: &Course) -> Option<Figure> {
    let line: Vec<[f64; 2]> = course.points.iter().map(|point| [point.spent.0, point.lr]).collect();
    let rates = line.iter().map(|at| at[1]);
    let plot = Plot {
        title: "Learning rate against energy".to_string(),
        desc: format!("The highest rate is {}.", number_tick(rates.clone().fold(0.0, f64::max))),
        y: Axis::over("learning rate", Scale::Linear, number_tick, rates.chain([0.0]))?,
        x: joules_axis(report)?,
        series: vec![Series { name: "learning rate".to_string(), class: "rate", shape: Shape::Line(thinned(&line)) }],
        rules: Vec::new(),
        height: 150.0,
    };
    (!line.is_empty()).then(|| Figure { legend: Vec::new(), ..Figure::plot("rate", plot, String::new()) })
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
        bounds: energy.low_j.zip(energy.high_j).map(|(low, high)| [low.0, high.0]),
        limit: near_limit(report).map(|limit| (limit.0, format!("budget {limit}"))),
        shown: |value| show::energy(Joules(value)),
    };
    grown.figure(report, course)
}

/// Emissions as the steps went by.
pub fn emissions(report: &Report, course: &Course) -> Option<Figure> {
    let carbon = &report.carbon;
    let limit = report.budget.limits.carbon_gco2e.filter(|limit| limit.0 > 0.0 && limit.0 <= LIMIT_WITHIN * carbon.gco2e.0);
    let grown = Growth {
        id: "emissions",
        title: "Emissions (CO2e)",
        class: "emissions",
        form: mass_tick,
        total: carbon.gco2e.0,
        bounds: carbon.low_gco2e.zip(carbon.high_gco2e).map(|(low, high)| [low.0, high.0]),
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
        let steps = course.points.iter().map(|Point { step, spent, .. }| [*step as f64, share(*spent)]);
        // Where the run ends: the last evaluation and save are in its total.
        let shares: Vec<[f64; 2]> = [start].into_iter().chain(steps).chain([[last.step as f64, 1.0]]).collect();
        let shares = thinned(&shares);
        let grown = |factor: f64| shares.iter().map(move |[step, share]| [*step, share * factor]);
        let line = Series { name: "central".to_string(), class: self.class, shape: Shape::Line(grown(self.total).collect()) };
        let mut series = Vec::new();
        if let Some([low, high]) = self.bounds {
            let band = shares.iter().map(|[step, share]| [*step, share * low, share * high]).collect();
            series.push(Series { name: "interval".to_string(), class: self.class, shape: Shape::Band(band) });
        }
        series.push(line);
        let limit = self.limit.as_ref().map(|(limit, _)| *limit);
        let tops = [Some(0.0), Some(self.total), self.bounds.map(|[_, high]| high), limit];
        let x = Axis::over("step", Scale::Linear, step_tick, shares.iter().map(|[step, _]| *step))?;
        let bounds = self.bounds.map(|[low, high]| format!(", between {} and {}", (self.shown)(low), (self.shown)(high)));
        let said = format!("{}{}", (self.shown)(self.total), bounds.unwrap_or_default());
        let plot = Plot {
            title: format!("{} against steps", self.title),
            desc: format!("In the end {said}."),
            x: x.whole().tight(),
            y: Axis::over(self.title, Scale::Linear, self.form, tops.into_iter().flatten())?,
            series,
            rules: self.limit.map(|(at, text)| Rule::Y(at, text)).into_iter().collect(),
            height: 240.0,
        };
        Some(Figure::plot(self.id, plot, format!("In the end {said}.")))
    }
}

/// Energy by what it was spent on.
pub fn by_phase(report: &Report) -> Option<Figure> {
    let energy = &report.energy;
    let bar = |(phase, joules): (_, &Joules)| Bar {
        name: show::word(phase),
        value: joules.0,
        figure: format!("{}, {}", show::energy(*joules), show::share(joules.0, energy.total_j.0)),
        class: "energy",
    };
    let bars: Vec<Bar> = energy.by_phase.iter().map(bar).collect();
    let axis = Axis::over("energy", Scale::Linear, energy_tick, bars.iter().map(|bar| bar.value).chain([0.0]))?;
    let desc = bars.iter().map(|bar| format!("{}: {}", bar.name, bar.figure)).collect::<Vec<_>>().join("; ");
    (!bars.is_empty()).then(|| {
        let bars = Bars { title: "Energy by phase".to_string(), desc, axis, bars };
        Figure::bars("phases", bars, String::new())
    })
}

/// This run beside the other ways of training.
pub fn comparison(report: &Report) -> Option<Figure> {
    let own = Bar {
        name: "this run".to_string(),
        value: report.energy.total_j.0,
        figure: show::energy(report.energy.total_j),
        class: "energy",
    };
    let mut baselines: Vec<&Baseline> = report.baselines.iter().collect();
    baselines.sort_by_key(|baseline| baseline.kind);
    let other = |baseline: &&Baseline| {
        let energy = baseline.energy_j?;
        let ratio = baseline.ratio.map_or_else(String::new, |ratio| format!(", {} times", show::times(ratio)));
        Some(Bar {
            name: format!("{} ({})", kind_words(baseline.kind), show::word(baseline.label)),
            value: energy.0,
            figure: show::energy(energy) + &ratio,
            class: "other",
        })
    };
    let bars: Vec<Bar> = [own].into_iter().chain(baselines.iter().filter_map(other)).collect();
    let least = bars.iter().map(|bar| bar.value).filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
    // Bars begin half a decade below the smallest, so that it has a length too.
    let values = bars.iter().map(|bar| bar.value).chain([least / 4.0]);
    let axis = Axis::over("energy, logarithmic", Scale::Log, energy_tick, values)?;
    let desc = bars.iter().map(|bar| format!("{}: {}", bar.name, bar.figure)).collect::<Vec<_>>().join("; ");
    let caption = "The axis is logarithmic: each power of ten takes the same length, so read the figures and not the lengths.";
    (bars.len() > 1).then(|| {
        let bars = Bars { title: "Energy of other ways of training".to_string(), desc, axis, bars };
        Figure::bars("comparison", bars, caption.to_string())
    })
}

/// At most [`MOST_POINTS`] points: of each stretch the first of its least and the first of its largest, in their order.
fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let (ends, inner) = ([points[0], points[points.len() - 1]], &points[1..points.len() - 1]);
    let stretch = inner.len().div_ceil(MOST_POINTS / 2 - 1);
    let extremes = inner.chunks(stretch).flat_map(|chunk| {
        let by = |better: fn(f64, f64) -> bool| {
            (1..chunk.len()).fold(0, |best, next| if better(chunk[next][1], chunk[best][1]) { next } else { best })
        };
        let (least, largest) = (by(|a, b| a < b), by(|a, b| a > b));
        // A stretch that holds a gap keeps it.
        let gap = chunk.iter().position(|[_, y]| !y.is_finite());
        let mut kept: Vec<usize> = [least, largest].into_iter().chain(gap).collect();
        kept.sort_unstable();
        kept.dedup();
        kept.into_iter().map(|index| chunk[index])
    });
    [ends[0]].into_iter().chain(extremes).chain([ends[1]]).collect()
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
