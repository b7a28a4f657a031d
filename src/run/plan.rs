//! What a run will cost before it starts: the report's blocks, forecast.

use serde_json::{Value, json};

use super::baselines::baselines;
use super::machine;
use super::options::meter;
use super::prepare::Prepared;
use super::reconcile::profile_factor;
use super::reporting::{adapter_block, amounts, baseline_blocks, carbon_block, data_block, model_block, stop_reason};
use super::sample::sample_prompt;
use super::trainee::load_work;
use crate::energy::meter::Computing;
use crate::energy::{Charge, Limit, MeterKind, Meters, Phase, Spent};
use crate::error::{Error, Kind, Result};
use crate::model::MemoryForecast;
use crate::train::{Costs, Forecast, Standing, Stop, forecast};
use crate::units::{Joules, Seconds};
use crate::work::Work;

/// A power model made from rated power is wrong by 27 to 37 % on average (Newkirk et al. 2025, arXiv:2506.14551): the interval's factor.
const UNCERTAINTY: f64 = 1.37;

/// A forecast.
#[derive(Debug)]
pub struct Plan {
    /// Steps that the budget admits.
    pub steps: u64,
    /// Why the run will end.
    pub stop: Stop,
    /// Energy on the counted meter, all phases.
    pub energy: Joules,
    /// The whole forecast, block by block.
    pub json: Value,
    least: Option<(Limit, String)>,
}

/// The energy interval around a counted figure.
pub(super) fn interval(central: Joules) -> (Joules, Joules) {
    (central / UNCERTAINTY, central * UNCERTAINTY)
}

/// Plays the run through without training.
pub fn plan(prepared: &Prepared, computing: Computing) -> Result<Plan> {
    let meters = Meters::open(prepared.profile.clone(), computing);
    let kind = meters.resolve(meter(prepared.recipe.energy.meter))?;
    let sample = sample_prompt(prepared)?.map(|prompt| prompt.work(&prepared.shape));
    let ending: Vec<(Phase, Work)> = sample.iter().map(|work| (Phase::Eval, work.clone())).collect();
    let trained = prepared.trained();
    let costs = Costs::new(&prepared.shape, &prepared.sampler, &prepared.validation_batches, trained, &prepared.settings, ending);
    let charge = |work: &Work| prepared.profile.charge(work);
    let load = charge(&load_work(&prepared.architecture, prepared.recipe.model.dtype));
    // Before the first step: a sample and an evaluation.
    let opening: Vec<Charge> = sample.iter().chain(costs.evaluation()).map(charge).collect();
    let before: Spent = opening.iter().chain([&load]).map(spent).sum();
    let run = forecast(&costs, &prepared.settings, &prepared.profile, &prepared.budget, before, &Standing::default());
    let mut phases = vec![(Phase::Load, load)];
    for (phase, mut sum) in run.phases.clone() {
        if phase == Phase::Eval {
            opening.iter().for_each(|charge| sum += charge);
        }
        phases.push((phase, sum));
    }
    let total: Charge = phases.iter().map(|(_, charge)| charge.clone()).sum();
    let least = match &run.stop {
        Stop::Budget(limit) if run.steps == 0 => Some((*limit, least_needed(&costs, prepared, before))),
        _ => None,
    };
    let json = to_json(prepared, kind, &run, &phases, &total)?;
    Ok(Plan { steps: run.steps, stop: run.stop, energy: total.energy.joules(), json, least })
}

fn spent(charge: &Charge) -> Spent {
    Spent { energy: charge.energy, flops: charge.flops, time: charge.time }
}

/// What the shortest run needs: everything before the first step, one step, and what ends a run.
fn least_needed(costs: &Costs<'_>, prepared: &Prepared, before: Spent) -> String {
    let charge = |work: &Work| spent(&prepared.profile.charge(work));
    let due = prepared.settings.due_after(1);
    let ending: Spent = costs.after(due).iter().map(|(_, work)| charge(work)).sum();
    let least = before + charge(&costs.step(0)) + ending;
    format!("{} and {}", least.energy, crate::units::Flops(least.flops as f64))
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
        serde_json::to_string_pretty(&self.json).map(|text| text + "\n").map_err(|e| Error::new(Kind::Io, e.to_string()))
    }
}

/// A memory forecast's block.
pub(super) fn memory_block(memory: &MemoryForecast) -> Value {
    json!({
        "peak_bytes": memory.peak(),
        "weights": memory.weights,
        "trained": memory.trained,
        "activations": memory.activations,
        "temporaries": memory.temporaries,
        "available_bytes": machine::memory().map(|(free, _)| free),
    })
}

fn to_json(prepared: &Prepared, kind: MeterKind, run: &Forecast, phases: &[(Phase, Charge)], total: &Charge) -> Result<Value> {
    let central = total.energy.joules();
    let (low, high) = interval(central);
    let by_phase: serde_json::Map<String, Value> =
        phases.iter().map(|(phase, charge)| (phase.as_str().to_string(), json!(charge.energy.joules()))).collect();
    let evaluations = run.evaluations + usize::from(!prepared.validation_batches.is_empty());
    let baselines = baselines(prepared, run.steps, evaluations, central)?;
    let spent = Spent { energy: total.energy, flops: total.flops, time: total.time };
    let pjoule = |energy: Joules| json!(energy);
    Ok(json!({
        "model": model_block(&prepared.recipe.model.id, &prepared.files, &prepared.architecture),
        "adapter": adapter_block(&prepared.target, &prepared.architecture),
        "data": data_block(prepared),
        "training": {
            "steps": run.steps,
            "stop_reason": stop_reason(&run.stop),
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
            "arithmetic_j": total.arithmetic,
            "movement_j": total.movement,
            "idle_j": total.idle,
            "device": prepared.profile.name,
            "profile_factor": profile_factor(&prepared.profile),
        },
        "budget": { "limits": amounts(prepared.budget.limits()), "spent": super::reporting::spent_amounts(prepared, &spent) },
        "carbon": carbon_block(prepared, central),
        "baselines": baseline_blocks(&baselines),
        "environment": machine::environment(),
        "memory": memory_block(&prepared.memory),
        "forecast": {
            "energy_j": { "low": low, "central": central, "high": high },
            "wall_s": Seconds(total.time.0),
            "steps_affordable": run.steps,
        },
        "warnings": prepared.warnings,
    }))
}
