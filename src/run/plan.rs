//! The plan of a run: its forecast as blocks of the report.

use super::prepare::Prepared;
use super::reconcile::profile_factor;
use super::reporting::{adapter_block, baseline_blocks, data_block, model_block};
use super::sample::sample_prompt;
use super::spending::{
    budget_block, carbon_block, counted_parts, host_left_out, interval, memory_block, this_machine,
};
use super::{Screen, machine};
use crate::energy::traffic::DRAM;
use crate::energy::{Interval, Limit, MeterKind, Spent};
use crate::error::{Error, Kind, Result};
use crate::forecast::{Metered, RunForecast, baselines, emissions, forecast_run};
use crate::recipe::Length;
use crate::report::energy::Meters as MeterTotals;
use crate::report::plan::{Forecast, Plan, PlannedEnergy, PlannedRun, PlannedTraining};
use crate::units::Joules;

/// A forecast, and the plan that shows it.
#[derive(Debug)]
pub struct Planned {
    /// `plan.json`.
    pub plan: Plan,
    forecast: RunForecast,
}

/// Plays the run through without training.
pub fn plan(prepared: &Prepared, screen: &mut dyn Screen) -> Result<Planned> {
    let kind = prepared.meters.resolve(prepared.recipe.energy.meter)?;
    let sample = sample_prompt(prepared)?.map(|prompt| prompt.work(&prepared.shape));
    let mut progress = |done, of| screen.planning(done, of);
    let forecast = forecast_run(&prepared.subject(), sample.as_ref(), &mut progress)?;
    let plan = Plan {
        model: model_block(
            &prepared.recipe.model.id,
            &prepared.files,
            &prepared.architecture,
        ),
        adapter: adapter_block(&prepared.target, &prepared.architecture)?,
        run: Some(planned_run(prepared, kind, &forecast)),
        memory: memory_block(&prepared.memory, prepared.room),
        warnings: prepared.warnings.clone(),
        probe: None,
    };
    Ok(Planned { plan, forecast })
}

impl Planned {
    /// Steps that the budget admits.
    pub fn steps(&self) -> u64 {
        self.forecast.steps
    }

    /// Energy of all phases on the counted meter.
    pub fn energy(&self) -> Joules {
        self.forecast.total.energy.joules()
    }

    /// # Errors
    /// [`Kind::Budget`] where the budget does not hold one step.
    pub fn check_affordable(&self, prepared: &Prepared) -> Result<()> {
        if self.steps() > 0 {
            return Ok(());
        }
        let unknown = (Limit::Energy, Spent::default());
        let (limit, least) = self.forecast.too_small.unwrap_or(unknown);
        let least = prepared.budget.amount(limit, &least);
        Err(Error::new(Kind::Budget, "the budget cannot hold one step, the evaluations and the save")
            .at(format!("budget.{limit}"))
            .value(prepared.budget.allowed(limit).unwrap_or_default())
            .rule(format!("one step with its evaluations and its save takes {least} on the counted meter"))
            .hint("raise the budget, or make the run cheaper: fewer validation records, a smaller `micro_batch_size` or `max_length`"))
    }
}

fn planned_run(prepared: &Prepared, kind: MeterKind, run: &RunForecast) -> PlannedRun {
    let total = &run.total;
    let central = total.energy.joules();
    // A plan is counted, whatever the run's meter.
    let energy = interval(MeterKind::Counted, central);
    let counted = Metered {
        spent: central,
        metered_over_counted: 1.0,
        parts: &total.breakdown,
    };
    let baselines = baselines(&prepared.subject(), run.steps, run.evaluations, &counted);
    PlannedRun {
        data: data_block(prepared),
        training: PlannedTraining {
            steps: run.steps,
            stop_reason: run.stop.clone(),
            steps_requested: (prepared.recipe.train.length != Length::Budget)
                .then_some(prepared.settings.steps),
            tokens: run.tokens,
            loss_tokens: run.loss_tokens,
            steps_per_epoch: prepared.sampler.steps_per_epoch(),
            activation_checkpointing: prepared.recipe.train.activation_checkpointing,
        },
        energy: planned_energy(prepared, kind, run),
        budget: budget_block(prepared, &total.spent(), energy),
        carbon: carbon_block(prepared, energy, total.time),
        baselines: baseline_blocks(baselines, prepared),
        environment: machine::environment(),
        forecast: forecast_block(prepared, run, energy),
        choices: run.choices.clone(),
        recomputation: run.recomputation.clone(),
        measured_baselines: run.measured_baselines.clone(),
    }
}

fn planned_energy(prepared: &Prepared, kind: MeterKind, run: &RunForecast) -> PlannedEnergy {
    let profile = &prepared.profile;
    let total = &run.total;
    let counted_j = total.energy.joules();
    let by_phase = run
        .phases
        .iter()
        .map(|(phase, charge)| (*phase, charge.energy.joules()));
    PlannedEnergy {
        meter: kind,
        total_j: counted_j,
        by_phase: by_phase.collect(),
        meters: MeterTotals {
            counted_j,
            measured_j: None,
            timed_j: None,
        },
        flops: total.flops,
        bytes: total.bytes.get(DRAM).copied(),
        bytes_by_level: total.bytes.clone(),
        counted_parts: counted_parts(profile, &total.breakdown, &total.bytes, Joules::ZERO),
        device: profile.name.clone(),
        this_machine: this_machine(prepared, run.steps, total.energy.joules()),
        profile_factor: profile_factor(profile),
        host_left_out: host_left_out(profile, MeterKind::Counted),
    }
}

/// What the budget admits, and its cost.
fn forecast_block(prepared: &Prepared, run: &RunForecast, energy: Interval<Joules>) -> Forecast {
    let rates = prepared.budget.rates();
    let time = run.total.time;
    let cost = |joules: Joules| {
        let price = rates.price.as_ref()?;
        Some(price.cost(rates.pue * joules, time))
    };
    let Interval { low, central, high } = energy.map(cost);
    Forecast {
        energy_j: energy,
        carbon_gco2e: emissions(energy, &prepared.grid, rates),
        cost: low
            .zip(central)
            .zip(high)
            .map(|((low, central), high)| Interval { low, central, high }),
        wall_s: time,
        least_s: run.total.least_time,
        steps_affordable: run.steps,
        tokens_affordable: run.tokens,
    }
}
