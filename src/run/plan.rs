//! What a run will cost before it starts: the report's blocks, forecast.

use serde_json::{Value, json};

use super::machine;
use super::prepare::Prepared;
use super::reconcile::profile_factor;
use super::reporting::{adapter_block, baseline_blocks, data_block, model_block};
use super::sample::sample_prompt;
use super::spending::{
    budget_block, carbon_block, counted_parts, host_left_out, interval, memory_block,
};
use crate::energy::{Limit, MeterKind, Spent};
use crate::error::{Error, Kind, Result};
use crate::forecast::{Choice, Metered, RunForecast, baselines, forecast_run};
use crate::measure::machine::free_memory;
use crate::train::Stop;
use crate::units::{Flops, Joules};

/// A forecast.
#[derive(Debug)]
pub struct Plan {
    /// Steps that the budget admits.
    pub steps: u64,
    /// Why the run will end.
    pub stop: Stop,
    /// Energy on the counted meter, all phases.
    pub energy: Joules,
    /// What each choice beside the recipe's own would cost.
    pub choices: Vec<Choice>,
    /// The whole forecast, block by block.
    pub json: Value,
    too_small: Option<(Limit, Spent)>,
}

/// Plays the run through without training.
pub fn plan(prepared: &Prepared) -> Result<Plan> {
    let kind = prepared.meters.resolve(prepared.recipe.energy.meter)?;
    let sample = sample_prompt(prepared)?.map(|prompt| prompt.work(&prepared.shape));
    let run = forecast_run(&prepared.subject(), sample.as_ref())?;
    let json = to_json(prepared, kind, &run)?;
    Ok(Plan {
        steps: run.steps,
        energy: run.total.energy.joules(),
        choices: run.choices,
        json,
        too_small: run.too_small,
        stop: run.stop,
    })
}

impl Plan {
    /// Why a run that cannot do one step is refused.
    pub fn refusal(&self) -> Error {
        let (limit, least) = self.too_small.unwrap_or((Limit::Energy, Spent::default()));
        let least = format!("{} and {}", least.energy, Flops(least.flops as f64));
        Error::new(Kind::Budget, "the budget cannot hold one step, the evaluations and the save")
            .at(format!("budget.{}", limit.as_str()))
            .rule(format!("one step with its evaluations and its save takes {least} on the counted meter"))
            .hint("raise the budget, or make the run cheaper: fewer validation records, a smaller `micro_batch_size` or `max_length`")
    }

    /// The forecast as a file's text.
    pub(super) fn to_json_text(&self) -> Result<String> {
        serde_json::to_string_pretty(&self.json)
            .map(|text| text + "\n")
            .map_err(|e| Error::new(Kind::Io, e.to_string()))
    }
}

/// What fits the budget and what it will cost, each figure low, central and high.
fn forecast_block(prepared: &Prepared, run: &RunForecast) -> Value {
    let total = &run.total;
    let central = total.energy.joules();
    let energy = interval(MeterKind::Counted, central);
    let (grams, rates) = (
        carbon_block(prepared, energy, total.time),
        prepared.budget.rates(),
    );
    let cost = rates.price.as_ref().map(|price| {
        let of = |energy: Joules| price.of(rates.pue * energy, total.time);
        json!({ "low": of(energy.low), "central": of(central), "high": of(energy.high) })
    });
    json!({
        "energy_j": energy,
        "carbon_gco2e": { "low": grams.low_gco2e, "central": grams.gco2e, "high": grams.high_gco2e },
        "cost": cost,
        "wall_s": total.time,
        "steps_affordable": run.steps,
        "tokens_affordable": run.tokens,
    })
}

fn to_json(prepared: &Prepared, kind: MeterKind, run: &RunForecast) -> Result<Value> {
    let total = &run.total;
    let central = total.energy.joules();
    // A plan is counted, whatever meter the run will go by.
    let energy = interval(MeterKind::Counted, central);
    let parts = total.breakdown;
    let by_phase: serde_json::Map<String, Value> = run
        .phases
        .iter()
        .map(|(phase, charge)| (phase.as_str().to_string(), json!(charge.energy.joules())))
        .collect();
    let baselines = baselines(
        &prepared.subject(),
        run.steps,
        run.evaluations,
        &Metered {
            spent: central,
            metered_over_counted: 1.0,
            parts: &parts,
        },
    )?;
    let spent = Spent {
        energy: total.energy,
        flops: total.flops,
        time: total.time,
    };
    let pjoule = |energy: Joules| json!(energy);
    Ok(json!({
        "model": model_block(&prepared.recipe.model.id, &prepared.files, &prepared.architecture),
        "adapter": adapter_block(&prepared.target, &prepared.architecture),
        "data": data_block(prepared),
        "training": {
            "steps": run.steps,
            "stop_reason": run.stop,
            "tokens": run.tokens,
            "loss_tokens": run.loss_tokens,
            "steps_per_epoch": prepared.sampler.steps_per_epoch(),
            "activation_checkpointing": prepared.recipe.train.activation_checkpointing,
        },
        "energy": {
            "meter": kind.as_str(),
            "total_j": pjoule(central),
            "by_phase": by_phase,
            "meters": { "counted_j": pjoule(central), "measured_j": null, "timed_j": null },
            "flops": total.flops,
            "bytes": total.bytes.get(crate::energy::traffic::DRAM),
            "bytes_by_level": total.bytes,
            "counted_parts": counted_parts(&prepared.profile, &parts, &total.bytes, Joules::ZERO),
            "device": prepared.profile.name,
            "profile_factor": profile_factor(&prepared.profile),
            "host_left_out": host_left_out(&prepared.profile, MeterKind::Counted),
        },
        "budget": budget_block(prepared, &spent, energy),
        "carbon": carbon_block(prepared, energy, total.time),
        "baselines": baseline_blocks(&baselines, prepared),
        "environment": machine::environment(),
        "memory": memory_block(&prepared.memory, free_memory()),
        "forecast": forecast_block(prepared, run),
        "warnings": prepared.warnings,
        "choices": run.choices,
        "recomputation": run.recomputation,
        "measured_baselines": run.measured_baselines,
    }))
}
