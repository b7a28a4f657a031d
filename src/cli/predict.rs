//! `wattune predict`.

use std::process::ExitCode;

use super::eval;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::run::{self, Prediction, RecordPrediction};

pub(super) fn run(arguments: &eval::Arguments, common: Common) -> Result<ExitCode> {
    let source = arguments.source()?;
    let device = arguments.device()?;
    let mut screen = Terminal::new(common.quiet);
    let job = arguments.job(&source, &device, &mut screen)?;
    let result = run::predict(&job, &mut screen)?;
    screen.clear();
    if common.json {
        return out_json(&result);
    }
    let mut lines = vec![format!("label\t{}", result.labels.join("\t"))];
    lines.extend(result.predictions.iter().map(|record| match record {
        RecordPrediction::Text(prediction) => line(prediction),
        // A line for each word, and an empty one after the record.
        RecordPrediction::Words(words) => words.iter().map(|word| line(word) + "\n").collect(),
    }));
    out(&lines.join("\n"))
}

fn line(prediction: &Prediction) -> String {
    let probabilities = prediction.probabilities.iter();
    let probabilities: Vec<String> = probabilities.map(|p| format!("{p:.6}")).collect();
    format!("{}\t{}", prediction.label, probabilities.join("\t"))
}
