//! `wattune plan`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use super::model::DeviceArgument;
use super::screen::Terminal;
use super::{Common, choices, out, out_json};
use crate::error::Result;
use crate::recipe;
use crate::report::baselines::{Baseline, kind_name};
use crate::report::format;
use crate::report::plan::{Plan, PlannedRun, PlannedTraining, Probe};
use crate::report::text::{Table, paragraph};
use crate::run::{self, Purpose, Screen, Stop};
use crate::units::{Bytes, Flops, Joules, Seconds, significant};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Recipe file
    recipe: PathBuf,
    /// Override a recipe key, such as `--set train.steps=500`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Also time N steps on this machine with random weights and token ids: tokens per second, peak memory
    ///
    /// config.json alone is enough: without tokenizer or data, the plan has only the blocks that need neither. Every row has
    /// `data.max_length` tokens and a loss at every token but its first, so no data makes such a step more expensive. One untimed
    /// step runs first; the reported time is the median. Weights are random and never updated: the loss means nothing.
    #[arg(long, value_name = "N")]
    probe: Option<NonZeroUsize>,
    #[command(flatten)]
    device: DeviceArgument,
}

const EXAMPLES: &str = "\
Examples:
  wattune plan recipe.toml                                   energy, carbon, time and memory; nothing is trained
  wattune plan recipe.toml --probe 5                         also time 5 steps on this machine
  wattune plan recipe.toml --probe 5 --set model.id=./new    a model of which only new/config.json exists
  wattune plan recipe.toml --json                            the same as one JSON document

Energy and time are counted on the device profile of `energy.device`: `wattune devices` lists the profiles, `wattune calibrate`
measures a new one.";

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let recipe = recipe::load(&arguments.recipe, &arguments.overrides)?;
    let name = recipe.name.clone();
    let (device, computing) = arguments.device.device.open()?;
    let mut screen = Terminal::new(common.quiet);
    let plan = if let Some(steps) = arguments.probe {
        run::plan_with_probe(recipe, steps, &device, computing, &mut screen)
    } else {
        let plan = Purpose::Plan;
        run::prepare(recipe, &device, computing, plan, screen.downloads())
            .and_then(|prepared| Ok(run::plan(&prepared, &mut screen)?.plan))
    };
    let plan = plan.map_err(|e| recipe::locate(e, &arguments.recipe, &arguments.overrides))?;
    screen.clear();
    if common.json {
        out_json(&plan)
    } else {
        out(&page(&name, &plan))
    }
}

type Rows = Vec<(&'static str, String)>;

fn page(name: &str, plan: &Plan) -> String {
    let model = &plan.model;
    let parameters = format::count(model.parameters);
    let trainable = format::count(plan.adapter.trainable_parameters);
    let mut rows = vec![
        (
            "model",
            format!(
                "{} ({}, {parameters} parameters)",
                model.id, model.architecture
            ),
        ),
        ("trainable", format!("{trainable} parameters")),
    ];
    if let Some(run) = &plan.run {
        rows.extend(forecast(run));
    }
    rows.push(("memory", format!("{} peak", plan.memory.peak_bytes)));
    if let Some(run) = &plan.run {
        rows.extend(recomputation(run));
        rows.extend(run.baselines.iter().map(baseline));
        rows.extend(measured_baselines(run));
    }
    if let Some(timed) = &plan.probe {
        rows.extend(probe(timed, plan.run.as_ref()));
    }
    let mut text = format!("Plan of {name}\n\n{}", Table::pairs(["", ""], rows).text(2));
    if let Some(run) = &plan.run {
        text += &choices::table(&run.choices);
    }
    for warning in &plan.warnings {
        text += &format!("\n{}", paragraph(&format!("warning: {warning}"), 2));
    }
    text
}

/// Data, steps, energy, emissions, cost, work, device and time.
fn forecast(run: &PlannedRun) -> Rows {
    let data = &run.data;
    let training = &run.training;
    let energy = &run.energy;
    let examples = format!(
        "{} examples, {} tokens, {} with a loss",
        format::count(data.examples),
        format::count(data.tokens),
        format::count(data.loss_tokens)
    );
    let tokens = format::count(training.tokens);
    let steps = format!("{}, {tokens} tokens", ending(training));
    let mut rows = vec![("data", examples), ("steps", steps)];
    if let Some(machine) = &energy.this_machine {
        rows.push(("device", machine.beside(&energy.device)));
    }
    let range = format::range_suffix(&run.forecast.energy_j, |joules| joules.to_string());
    rows.push(("energy", format::energy(energy.total_j) + &range));
    for (phase, joules) in &energy.by_phase {
        rows.push(("", format!("{} {joules}", format::word(phase))));
    }
    if let Some(host) = energy.host_left_out {
        let share = host.share.map(|share| format::share(share, 1.0));
        let share = share.map_or("share not known".to_string(), |share| {
            format!("{share} of the machine's power")
        });
        rows.push(("", format!("host machine not included: {share}")));
    }
    rows.extend(cost(run));
    rows
}

/// Emissions, money, work, device and time.
fn cost(run: &PlannedRun) -> Rows {
    let energy = &run.energy;
    let carbon = &run.carbon;
    let range = format::range_suffix(&carbon.emissions, format::carbon);
    let mut rows = vec![(
        "emissions",
        format!(
            "{} on the grid {}{range}",
            format::carbon(carbon.emissions.central),
            carbon.grid,
        ),
    )];
    if let Some(cost) = &run.forecast.cost {
        let bounds = format::span(&cost.low.to_string(), &cost.high.to_string());
        rows.push(("cost", format!("{}, range {bounds}", cost.central)));
    }
    rows.push(("work", Flops(energy.flops as f64).to_string()));
    if energy.this_machine.is_none() {
        rows.push(("device", energy.device.clone()));
    }
    if let Some(factor) = &energy.profile_factor {
        let value = significant(factor.value);
        rows.push((
            "",
            format!("counted energy scaled by {value}: {}", factor.source),
        ));
    }
    rows.push((
        "time",
        format!(
            "{} at the profile's usual rates, at least {}",
            format::time(run.forecast.wall_s),
            format::time(run.forecast.least_s)
        ),
    ));
    rows
}

/// The steps of a run, and what ends it: "31 of 200 (energy budget)".
pub(super) fn ending(training: &PlannedTraining) -> String {
    let steps = format::count(training.steps);
    let limit = match &training.stop_reason {
        Stop::Steps => "step limit".to_string(),
        Stop::Epochs => "epoch limit".to_string(),
        Stop::Budget(limit) => format!("{limit} budget"),
        stop @ (Stop::EarlyStopping | Stop::Interrupted | Stop::Diverged(_)) => stop.to_string(),
    };
    match training.steps_requested {
        Some(requested) if requested > training.steps => {
            format!("{steps} of {} ({limit})", format::count(requested))
        }
        _ => format!("{steps} ({limit})"),
    }
}

/// Cost and gain of activation checkpointing.
fn recomputation(run: &PlannedRun) -> Option<(&'static str, String)> {
    let found = &run.recomputation;
    (found.blocks > 0).then(|| {
        let work = Flops(found.flops as f64);
        let text = format!(
            "{} less by activation checkpointing in {} of {} blocks, for {} and {work}",
            found.saved_bytes, found.blocks, found.of, found.energy_j
        );
        ("", text)
    })
}

fn baseline(baseline: &Baseline) -> (&'static str, String) {
    let energy = baseline.energy.map(|energy| energy.central);
    let energy = format::or_unknown(energy, |joules: Joules| joules);
    let ratio = baseline.ratio.map(|ratio| {
        let range = format::range_suffix(&ratio, format::times);
        format!(" ({} times{range})", format::times(ratio.central))
    });
    let text = format!("{}: {energy}{}", baseline.name(), ratio.unwrap_or_default());
    ("compared with", text)
}

/// Baselines to be trained after the run.
fn measured_baselines(run: &PlannedRun) -> Rows {
    let row = |planned: &run::MeasuredForecast| {
        let limit = planned
            .budget_j
            .map(|limit| format!(", within {limit} for all"));
        let text = format!(
            "{}, trained for comparison: {}, at most {}{}; apart from the run",
            kind_name(planned.kind),
            planned.energy_j.equal_energy,
            planned.energy_j.most,
            limit.unwrap_or_default()
        );
        ("afterwards", text)
    };
    run.measured_baselines.iter().map(row).collect()
}

/// Timed speed, and the time of all steps at that speed.
fn probe(probe: &Probe, run: Option<&PlannedRun>) -> Rows {
    let mut rows = vec![(
        "probe",
        format!(
            "{:.0} tokens/s, {} per step (median of {}), {}/s",
            probe.tokens_per_second,
            probe.step_s.spoken(),
            probe.steps,
            Flops(probe.flops_per_second)
        ),
    )];
    let all = probe.all_steps_j;
    let all = all.map(|energy| format!(", {energy} for all steps of such rows"));
    rows.push((
        "",
        format!(
            "{} of counted energy per step on {}{}",
            probe.step_j,
            probe.device,
            all.unwrap_or_default()
        ),
    ));
    rows.extend(
        probe
            .peak_rss_bytes
            .map(|peak: Bytes| ("", format!("{peak} peak resident memory"))),
    );
    if let Some(run) = run {
        let time = Seconds(run.training.tokens as f64 / probe.tokens_per_second);
        rows.push((
            "",
            format!("{} for all training steps at this speed", time.spoken()),
        ));
    }
    rows
}
