//! `wattune plan`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::Value;

use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::recipe;
use crate::run::{self, Screen};
use crate::units::{Bytes, Flops, GramsCo2e, Joules, Seconds};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The recipe file
    recipe: PathBuf,
    /// Override one key of the recipe, such as `--set train.steps=500`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Where it would compute: cpu, cuda, cuda:N, metal or auto
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let recipe = recipe::load(&arguments.recipe, &arguments.overrides)?;
    let name = recipe.name.clone();
    let (device, computing) = run::device(&arguments.device)?;
    let screen = Terminal::new(common.quiet);
    let prepared = run::prepare(recipe, &device, computing, screen.downloads())?;
    let plan = run::plan(&prepared, computing)?;
    if common.json { out_json(&plan.json) } else { out(&page(&name, &plan.json)) }
}

/// The forecast for people.
fn page(name: &str, plan: &Value) -> String {
    let number = |path: &str| plan.pointer(path).and_then(Value::as_f64);
    let joules = |path: &str| number(path).map_or("unknown".to_string(), |j| format!("{} ({:.3} Wh)", Joules(j), Joules(j).wh()));
    let words = |path: &str| plan.pointer(path).and_then(Value::as_str).unwrap_or("unknown").to_string();
    let whole = |path: &str| plan.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    let mut text = format!("Plan of {name}\n\n");
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "  {label:<12} {value}");
    };
    row("model", format!("{} ({}, {} parameters)", words("/model/id"), words("/model/architecture"), whole("/model/parameters")));
    row("trained", format!("{} parameters", whole("/adapter/trainable_parameters")));
    row(
        "data",
        format!(
            "{} examples, {} tokens, {} with a loss",
            whole("/data/examples"),
            whole("/data/tokens"),
            whole("/data/loss_tokens")
        ),
    );
    row(
        "steps",
        format!(
            "{} (ends by {}), {} tokens",
            whole("/training/steps"),
            words("/training/stop_reason"),
            whole("/training/tokens")
        ),
    );
    let (low, high) = (number("/forecast/energy_j/low"), number("/forecast/energy_j/high"));
    let interval = low.zip(high).map_or(String::new(), |(low, high)| format!(", between {} and {}", Joules(low), Joules(high)));
    row("energy", format!("{}{interval}", joules("/energy/total_j")));
    for (phase, value) in plan.pointer("/energy/by_phase").and_then(Value::as_object).into_iter().flatten() {
        row("", format!("{phase:<6} {}", Joules(value.as_f64().unwrap_or_default())));
    }
    let carbon = number("/carbon/gco2e").map(GramsCo2e).map_or("unknown".into(), |g| g.to_string());
    row("carbon", format!("{carbon} on the grid of {}", words("/carbon/grid")));
    row("work", Flops(number("/energy/flops").unwrap_or_default()).to_string());
    row("device", words("/energy/device"));
    row("time", format!("at least {}", Seconds(number("/forecast/wall_s").unwrap_or_default()).spoken()));
    row("memory", format!("{} at the peak", Bytes(whole("/memory/peak_bytes"))));
    for baseline in plan.get("baselines").and_then(Value::as_array).into_iter().flatten() {
        let of = |key: &str| baseline.get(key).and_then(Value::as_f64).unwrap_or_default();
        let kind = baseline.get("kind").and_then(Value::as_str).unwrap_or_default().replace('_', " ");
        row("against", format!("{kind}: {} ({} times)", Joules(of("energy_j")), crate::units::significant(of("ratio"))));
    }
    for warning in plan.get("warnings").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        let _ = writeln!(text, "\n  warning: {warning}");
    }
    text
}
