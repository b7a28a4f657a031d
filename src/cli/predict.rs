//! `wattune predict`.

use std::process::ExitCode;

use super::eval;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::run::{self, RecordPrediction};

pub(super) fn run(arguments: &eval::Arguments, common: Common) -> Result<ExitCode> {
    arguments.check_predicts()?;
    let source = arguments.source()?;
    let device = arguments.device()?;
    let mut screen = Terminal::new(common.quiet);
    let job = arguments.job(&source, &device, &mut screen)?;
    let result = run::predict(&job, &mut screen)?;
    screen.clear();
    if common.json {
        return out_json(&result);
    }
    let is_number = matches!(
        result.predictions.first(),
        Some(RecordPrediction::Value { .. })
    );
    let mut lines = vec![if is_number {
        "value".to_string()
    } else {
        format!("label\t{}", result.labels.join("\t"))
    }];
    lines.extend(result.predictions.iter().map(|record| {
        match record {
            RecordPrediction::Text(prediction) => {
                line(&prediction.label, &prediction.probabilities)
            }
            RecordPrediction::Labels(found) => line(&found.labels.join(", "), &found.probabilities),
            RecordPrediction::Value { value } => value.to_string(),
            // A line for each word, and an empty one after the record.
            RecordPrediction::Words(words) => words
                .iter()
                .map(|word| line(&word.label, &word.probabilities) + "\n")
                .collect(),
        }
    }));
    out(&lines.join("\n"))
}

fn line(label: &str, probabilities: &[f64]) -> String {
    let probabilities = probabilities.iter();
    let probabilities: Vec<String> = probabilities.map(|p| format!("{p:.6}")).collect();
    format!("{label}\t{}", probabilities.join("\t"))
}
