//! `wattune plan`.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::Value;

use super::model::DeviceArgument;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::recipe;
use crate::report::show;
use crate::run::{self, Screen};
use crate::units::{Bytes, Flops, GramsCo2e, Joules, Money, Seconds, significant};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The recipe file
    recipe: PathBuf,
    /// Override one key of the recipe, such as `--set train.steps=500`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Also time N steps on this machine, with random weights and random token ids: tokens per second, peak memory
    ///
    /// The model directory may hold config.json alone; where the tokenizer or the data are missing too, the plan has the blocks that need
    /// neither. Every row has its full `data.max_length` tokens and a loss at every one but its first: no data makes a step of these
    /// sizes dearer. One more step runs first, untimed; the step's time is the median. Weights are one block of random numbers,
    /// repeated, and are never updated: the loss means nothing.
    #[arg(long, value_name = "N")]
    probe: Option<NonZeroUsize>,
    #[command(flatten)]
    device: DeviceArgument,
}

const EXAMPLES: &str = "\
Examples:
  wattune plan recipe.toml                                   energy, carbon, time and memory; nothing is trained
  wattune plan recipe.toml --probe 5                         also how fast this machine really is
  wattune plan recipe.toml --probe 5 --set model.id=./new    a model of which only new/config.json exists
  wattune plan recipe.toml --json                            the same as one JSON document

Energy and time are counted on the device profile of `energy.device`: `wattune devices` lists the profiles, `wattune calibrate`
measures one of your own.";

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let recipe = recipe::load(&arguments.recipe, &arguments.overrides)?;
    let name = recipe.name.clone();
    let (device, computing) = arguments.device.device.open()?;
    let mut screen = Terminal::new(common.quiet);
    let document = match arguments.probe {
        Some(steps) => run::plan_with_probe(recipe, steps, &device, computing, &mut screen)?,
        None => {
            run::plan(&run::prepare(
                recipe,
                &device,
                computing,
                screen.downloads(),
            )?)?
            .json
        }
    };
    if common.json {
        out_json(&document)
    } else {
        out(&page(&name, &document))
    }
}

/// A plan's document, read by path.
struct Document<'a>(&'a Value);

impl Document<'_> {
    fn number(&self, path: &str) -> Option<f64> {
        self.0.pointer(path).and_then(Value::as_f64)
    }

    fn whole(&self, path: &str) -> u64 {
        self.0
            .pointer(path)
            .and_then(Value::as_u64)
            .unwrap_or_default()
    }

    fn words(&self, path: &str) -> &str {
        self.0
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or("unknown")
    }

    fn list(&self, path: &str) -> impl Iterator<Item = &Value> {
        self.0
            .pointer(path)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
    }
}

/// The plan for people.
fn page(name: &str, plan: &Value) -> String {
    let plan = Document(plan);
    let (model, class, parameters) = (
        plan.words("/model/id"),
        plan.words("/model/architecture"),
        plan.whole("/model/parameters"),
    );
    let mut rows = vec![(
        "model",
        format!("{model} ({class}, {} parameters)", show::count(parameters)),
    )];
    rows.push((
        "trained",
        format!(
            "{} parameters",
            show::count(plan.whole("/adapter/trainable_parameters"))
        ),
    ));
    // A plan without data or tokenizer has no forecast.
    if plan.0.get("forecast").is_some() {
        rows.extend(forecast(&plan));
    }
    rows.push((
        "memory",
        format!("{} at the peak", Bytes(plan.whole("/memory/peak_bytes"))),
    ));
    let (again, walked) = (
        plan.whole("/recomputation/blocks"),
        plan.whole("/recomputation/of"),
    );
    if again > 0 {
        let energy = Joules(plan.number("/recomputation/energy_j").unwrap_or_default());
        let work = Flops(plan.number("/recomputation/flops").unwrap_or_default());
        let saved = Bytes(plan.whole("/recomputation/saved_bytes"));
        rows.push((
            "",
            format!("{saved} less, because {again} of {walked} blocks compute their activations again: {energy}, {work}"),
        ));
    }
    for baseline in plan.list("/baselines").map(Document) {
        let kind = baseline.words("/kind").replace('_', " ");
        let (energy, ratio) = (
            baseline.number("/energy_j").unwrap_or_default(),
            baseline.number("/ratio").unwrap_or_default(),
        );
        let bounds = show::between(
            baseline.number("/low_ratio"),
            baseline.number("/high_ratio"),
            show::times,
        );
        let bounds = bounds.map_or(String::new(), |bounds| format!(", {bounds}"));
        rows.push((
            "against",
            format!(
                "{kind}: {} ({} times{bounds})",
                Joules(energy),
                show::times(ratio)
            ),
        ));
    }
    for baseline in plan.list("/measured_baselines").map(Document) {
        let joules = |path: &str| Joules(baseline.number(path).unwrap_or_default());
        let (kind, equal, most) = (
            baseline.words("/kind").replace('_', " "),
            joules("/energy_j/equal_energy"),
            joules("/energy_j/most"),
        );
        let limit = baseline.number("/budget_j").map_or(String::new(), |limit| {
            format!(", within {} for all", Joules(limit))
        });
        rows.push((
            "then",
            format!(
                "{kind}, trained for comparison: {equal}, at most {most}{limit}; apart from the run"
            ),
        ));
    }
    if plan.0.get("probe").is_some() {
        rows.extend(probe(&plan));
    }
    let mut text = format!("Plan of {name}\n\n");
    for (label, value) in rows {
        let _ = writeln!(text, "  {label:<12} {value}");
    }
    let choices: Vec<Value> = plan.list("/choices").cloned().collect();
    text += &super::choices::table(&choices);
    for warning in plan.list("/warnings").filter_map(Value::as_str) {
        let _ = writeln!(text, "\n  warning: {warning}");
    }
    text
}

/// Data, steps, energy, carbon, work and time.
fn forecast(plan: &Document<'_>) -> Vec<(&'static str, String)> {
    let whole = |path: &str| plan.whole(path);
    let (examples, tokens, loss_tokens) = (
        whole("/data/examples"),
        whole("/data/tokens"),
        whole("/data/loss_tokens"),
    );
    let [examples, tokens, loss_tokens] = [examples, tokens, loss_tokens].map(show::count);
    let mut rows = vec![(
        "data",
        format!("{examples} examples, {tokens} tokens, {loss_tokens} with a loss"),
    )];
    let (steps, reason, tokens) = (
        whole("/training/steps"),
        plan.words("/training/stop_reason"),
        whole("/training/tokens"),
    );
    rows.push((
        "steps",
        format!(
            "{} (ends by {reason}), {} tokens",
            show::count(steps),
            show::count(tokens)
        ),
    ));
    let (low, high) = (
        plan.number("/forecast/energy_j/low"),
        plan.number("/forecast/energy_j/high"),
    );
    let interval = low.zip(high).map_or(String::new(), |(low, high)| {
        format!(", between {} and {}", Joules(low), Joules(high))
    });
    let total = plan.number("/energy/total_j").map(Joules);
    let total = total.map_or("unknown".into(), show::energy);
    rows.push(("energy", format!("{total}{interval}")));
    for (phase, value) in plan
        .0
        .pointer("/energy/by_phase")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        rows.push((
            "",
            format!("{phase:<6} {}", Joules(value.as_f64().unwrap_or_default())),
        ));
    }
    if plan
        .0
        .pointer("/energy/host_left_out")
        .is_some_and(|host| !host.is_null())
    {
        let share = plan.number("/energy/host_left_out/share");
        let share = share.map_or("its share is not known".into(), |share| {
            format!("{} of a machine's power", show::share(share, 1.0))
        });
        rows.push((
            "",
            format!("without the machine around the device: {share}"),
        ));
    }
    let carbon = plan
        .number("/carbon/gco2e")
        .map(GramsCo2e)
        .map_or("unknown".into(), |g| g.to_string());
    let bounds = plan
        .number("/forecast/carbon_gco2e/low")
        .zip(plan.number("/forecast/carbon_gco2e/high"));
    let bounds = bounds.map_or(String::new(), |(low, high)| {
        format!(", between {} and {}", GramsCo2e(low), GramsCo2e(high))
    });
    rows.push((
        "carbon",
        format!(
            "{carbon} on the grid of {}{bounds}",
            plan.words("/carbon/grid")
        ),
    ));
    if let Some(cost) = plan
        .0
        .pointer("/forecast/cost")
        .filter(|cost| !cost.is_null())
    {
        let money = |key: &str| {
            serde_json::from_value::<Money>(cost[key].clone())
                .map_or("unknown".into(), |money| money.to_string())
        };
        rows.push((
            "cost",
            format!(
                "{}, between {} and {}",
                money("central"),
                money("low"),
                money("high")
            ),
        ));
    }
    rows.push((
        "work",
        Flops(plan.number("/energy/flops").unwrap_or_default()).to_string(),
    ));
    rows.push(("device", plan.words("/energy/device").to_string()));
    if let Some(factor) = plan.number("/energy/profile_factor/value") {
        let source = plan.words("/energy/profile_factor/source");
        rows.push((
            "",
            format!("counted joules times {}: {source}", significant(factor)),
        ));
    }
    rows.push((
        "time",
        format!(
            "at least {}",
            Seconds(plan.number("/forecast/wall_s").unwrap_or_default()).spoken()
        ),
    ));
    rows
}

/// What was timed here, and the time of all steps at that speed.
fn probe(plan: &Document<'_>) -> Vec<(&'static str, String)> {
    let number = |path: &str| plan.number(path).unwrap_or_default();
    let (steps, step, speed) = (
        plan.whole("/probe/steps"),
        number("/probe/step_s"),
        number("/probe/tokens_per_second"),
    );
    let work = Flops(number("/probe/flops_per_second"));
    let mut rows = vec![(
        "probe",
        format!(
            "{speed:.0} tokens/s, {} a step (median of {steps}), {work}/s",
            Seconds(step).spoken()
        ),
    )];
    if let Some(peak) = plan.number("/probe/peak_rss_bytes") {
        rows.push(("", format!("{} resident at the peak", Bytes(peak as u64))));
    }
    if let Some(tokens) = plan.number("/training/tokens") {
        rows.push((
            "",
            format!(
                "{} for all training steps at this speed",
                Seconds(tokens / speed).spoken()
            ),
        ));
    }
    rows
}
