//! What a run will cost before it starts: the report's blocks, forecast.

use serde_json::{Value, json};

use super::baselines::{Run, baselines};
use super::choices::{Choice, choices};
use super::machine;
use super::measured::{asked, expected};
use super::options::meter;
use super::prepare::Prepared;
use super::reconcile::profile_factor;
use super::reporting::{adapter_block, baseline_blocks, data_block, model_block};
use super::sample::sample_prompt;
use super::spending::{
    budget_block, carbon_block, counted_parts, host_left_out, interval, memory_block,
};
use super::trainee::load_work;
use crate::energy::meter::Computing;
use crate::energy::{Charge, Limit, MeterKind, Meters, Phase, Spent};
use crate::error::{Error, Kind, Result};
use crate::model::{Recompute, forecast_memory};
use crate::report::types::BaselineKind;
use crate::train::{Forecast, Settings, StepCosts, Stop, TrainState, forecast};
use crate::units::{Bytes, Joules, MicroJoules};
use crate::work::Work;

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
    least: Option<(Limit, String)>,
}

/// Plays the run through without training.
pub fn plan(prepared: &Prepared, computing: Computing) -> Result<Plan> {
    let meters = Meters::open(prepared.profile.clone(), computing);
    let kind = meters.resolve(meter(prepared.recipe.energy.meter))?;
    let sample = sample_prompt(prepared)?.map(|prompt| prompt.work(&prepared.shape));
    let ending: Vec<(Phase, Work)> = sample
        .iter()
        .map(|work| (Phase::Eval, work.clone()))
        .collect();
    let trained = prepared.trained();
    let costs = StepCosts::new(
        &prepared.shape,
        &prepared.sampler,
        &prepared.validation_batches,
        trained,
        &prepared.settings,
        ending,
    );
    let charge = |work: &Work| prepared.profile.charge(work);
    let load = charge(&load_work(
        &prepared.architecture,
        prepared.recipe.model.dtype,
    ));
    // Before the first step: a sample and an evaluation.
    let opening: Vec<Charge> = sample
        .iter()
        .chain(costs.evaluation())
        .map(charge)
        .collect();
    let before: Spent = opening.iter().chain([&load]).map(spent).sum();
    let run = forecast(
        &costs,
        &prepared.settings,
        &prepared.profile,
        &prepared.budget,
        before,
        &TrainState::default(),
    );
    let mut phases = vec![(Phase::Load, load)];
    for (phase, mut sum) in run.phases.clone() {
        if phase == Phase::Eval {
            opening.iter().for_each(|charge| sum += charge);
        }
        phases.push((phase, sum));
    }
    let total: Charge = phases.iter().map(|(_, charge)| charge.clone()).sum();
    let least = match &run.stop {
        Stop::Budget(limit) if run.steps == 0 => {
            Some((*limit, least_needed(&costs, prepared, before)))
        }
        _ => None,
    };
    let training: Charge = run
        .phases
        .iter()
        .filter(|(phase, _)| *phase == Phase::Train)
        .map(|(_, charge)| charge.clone())
        .sum();
    let choices = choices(prepared, run.steps, &training)?;
    let mut json = to_json(prepared, kind, &run, &phases, &total)?;
    json["choices"] = json!(choices);
    json["recomputation"] = recomputation(prepared, run.steps, &training);
    json["measured_baselines"] = measured_baselines(prepared, training.energy)?;
    Ok(Plan {
        steps: run.steps,
        stop: run.stop,
        energy: total.energy.joules(),
        choices,
        json,
        least,
    })
}

fn spent(charge: &Charge) -> Spent {
    Spent {
        energy: charge.energy,
        flops: charge.flops,
        time: charge.time,
    }
}

/// What the shortest run needs: everything before the first step, one step, and what ends a run.
fn least_needed(costs: &StepCosts<'_>, prepared: &Prepared, before: Spent) -> String {
    let charge = |work: &Work| spent(&prepared.profile.charge(work));
    let due = prepared.settings.scheduled_after(1);
    let ending: Spent = costs
        .reserve(due)
        .iter()
        .map(|(_, work)| charge(work))
        .sum();
    let least = before + charge(&costs.step(0)) + ending;
    format!(
        "{} and {}",
        least.energy,
        crate::units::Flops(least.flops as f64)
    )
}

impl Plan {
    /// Why a run that cannot do one step is refused.
    pub fn refusal(&self) -> Error {
        let (limit, least) = self.least.clone().unwrap_or((Limit::Energy, "more".into()));
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

/// What computing activations again costs in the plan's `steps` training steps, whose charge is `training`, and what it saves.
fn recomputation(prepared: &Prepared, steps: u64, training: &Charge) -> Value {
    let walked = prepared.shape.backward_blocks();
    let blocks = prepared.settings.recompute.count(walked);
    let settings = Settings {
        recompute: Recompute::NONE,
        ..prepared.settings.clone()
    };
    let (trained, tokens) = (prepared.trained(), prepared.longest_batch);
    let costs = StepCosts::new(
        &prepared.shape,
        &prepared.sampler,
        &[],
        trained,
        &settings,
        Vec::new(),
    );
    let kept: Charge = match blocks {
        0 => training.clone(),
        _ => (0..steps)
            .map(|step| prepared.profile.charge(&costs.step(step)))
            .sum(),
    };
    let peak = forecast_memory(&prepared.shape, trained as u64, tokens, Recompute::NONE).peak();
    json!({
        "blocks": blocks,
        "of": walked,
        "energy_j": MicroJoules(training.energy.0 - kept.energy.0).joules(),
        "flops": training.flops - kept.flops,
        "saved_bytes": Bytes(peak.0.saturating_sub(prepared.memory.peak().0)),
    })
}

/// What the baselines that are to be trained after the run will take, apart from its own energy.
fn measured_baselines(prepared: &Prepared, training: MicroJoules) -> Result<Value> {
    let block = |kind: BaselineKind| -> Result<Value> {
        let (least, most) = expected(prepared, kind, training)?;
        let budget = prepared.recipe.baseline.budget;
        Ok(
            json!({ "kind": kind, "energy_j": { "equal_energy": least, "most": most }, "budget_j": budget }),
        )
    };
    asked(&prepared.recipe).map(block).collect()
}

/// What fits the budget and what it will cost, each figure low, central and high.
fn forecast_block(prepared: &Prepared, run: &Forecast, total: &Charge) -> Value {
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
        "tokens_affordable": run.tokens.0,
    })
}

fn to_json(
    prepared: &Prepared,
    kind: MeterKind,
    run: &Forecast,
    phases: &[(Phase, Charge)],
    total: &Charge,
) -> Result<Value> {
    let central = total.energy.joules();
    // A plan is counted, whatever meter the run will go by.
    let energy = interval(MeterKind::Counted, central);
    let parts = total.parts();
    let by_phase: serde_json::Map<String, Value> = phases
        .iter()
        .map(|(phase, charge)| (phase.as_str().to_string(), json!(charge.energy.joules())))
        .collect();
    let evaluations = run.evaluations + usize::from(!prepared.validation_batches.is_empty());
    let baselines = baselines(
        prepared,
        run.steps,
        evaluations,
        &Run {
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
            "tokens": run.tokens.0,
            "loss_tokens": run.tokens.1,
            "steps_per_epoch": prepared.sampler.steps_per_epoch(),
            "activation_checkpointing": prepared.recipe.train.activation_checkpointing,
        },
        "energy": {
            "meter": kind.as_str(),
            "total_j": pjoule(central),
            "by_phase": by_phase,
            "meters": { "counted_j": pjoule(central), "measured_j": null, "timed_j": null },
            "flops": total.flops,
            "bytes": total.bytes.get(crate::energy::charge::DRAM),
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
        "memory": memory_block(&prepared.memory, machine::free_memory()),
        "forecast": forecast_block(prepared, run, total),
        "warnings": prepared.warnings,
    }))
}
