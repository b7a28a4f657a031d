//! The curves of baselines that were trained, beside the run's own.
//!
//! Owns one chart: validation loss against training energy, so that a place on it compares like with like. Takes a report, returns a
//! figure; absent where no baseline was trained. Draws nothing itself: `chart` does.

use super::figures::{Figure, loss_label, loss_scale, thinned};
use super::units::{energy_tick, number_tick};
use crate::report::chart::{Axis, Mark, Plot, Rule, Scale, Series, Shape};
use crate::report::measured::CurvePoint;
use crate::report::page::kind_words;
use crate::report::show;
use crate::report::types::{Baseline, Report};

/// The classes of the lines: the run's own first.
const LINES: [&str; 3] = ["run-0", "run-1", "run-2"];

/// Loss of the run and of every trained baseline against the energy of their steps alone.
pub fn beside(report: &Report) -> Option<Figure> {
    let trained = |baseline: &Baseline| {
        let measured = baseline.measured.as_ref()?;
        Some((
            kind_words(baseline.kind).to_string(),
            measured.curve.clone(),
            measured.run_training_j,
        ))
    };
    let baselines: Vec<_> = report.baselines.iter().filter_map(trained).collect();
    let equal = baselines.first()?.2;
    let others = baselines.into_iter().map(|(name, curve, _)| (name, curve));
    let curves = [("this run".to_string(), report.training.curve.clone())]
        .into_iter()
        .chain(others);
    let series: Vec<Series> = LINES
        .iter()
        .zip(curves)
        .flat_map(|(class, (name, curve))| drawn(class, name, &curve))
        .collect();
    let at = || series.iter().flat_map(Series::points);
    let scale = loss_scale(at().map(|[_, loss]| loss));
    let x = Axis::over(
        "training energy",
        Scale::Linear,
        energy_tick,
        at().map(|[energy, _]| energy).chain([0.0, equal.0 * 1.03]),
    )?;
    let plot = Plot {
        title: "Loss against training energy, beside what was trained otherwise".to_string(),
        desc: format!("The run's training took {}.", show::energy(equal)),
        x: x.tight(),
        y: Axis::over(
            loss_label(scale),
            scale,
            number_tick,
            at().map(|[_, loss]| loss),
        )?,
        series,
        rules: vec![Rule::X(equal.0, "equal energy".to_string())],
        height: 280.0,
    };
    let caption = "Validation losses (thin: training losses) by the energy of the steps alone, without loading, evaluations and saves.";
    Some(Figure::plot("beside", plot, caption.to_string()))
}

/// The training losses as a thin line, the validation losses as marks on a line of their own.
fn drawn(class: &'static str, name: String, curve: &[CurvePoint]) -> Vec<Series> {
    let training: Vec<[f64; 2]> = curve
        .iter()
        .filter_map(|point| Some([point.energy_j.0, point.train_loss?]))
        .collect();
    let mark = |point: &CurvePoint| {
        let loss = point.val_loss?;
        let says = format!(
            "{name}, step {}: {} after {}",
            show::count(point.step),
            show::number(loss),
            show::energy(point.energy_j)
        );
        Some(Mark {
            at: [point.energy_j.0, loss],
            says,
            label: None,
        })
    };
    let marks: Vec<Mark> = curve.iter().filter_map(mark).collect();
    let line = marks.iter().map(|mark| mark.at).collect();
    vec![
        Series {
            name: String::new(),
            class: thin(class),
            shape: Shape::Line(thinned(&training)),
        },
        Series {
            name,
            class,
            shape: Shape::Line(line),
        },
        Series {
            name: String::new(),
            class,
            shape: Shape::Marks(marks),
        },
    ]
}

/// The same colour, drawn thin.
fn thin(class: &str) -> &'static str {
    match class {
        "run-0" => "run-0 thin",
        "run-1" => "run-1 thin",
        _ => "run-2 thin",
    }
}
