//! A run's results into the report's blocks, and the report's files.

use std::collections::BTreeMap;
use std::path::Path;

use super::baselines::baselines;
use super::directory::RunDirectory;
use super::machine;
use super::plan::interval;
use super::prepare::{Prepared, Target};
use super::reconcile::{profile_factor, reconciliation};
use super::trainee::{self, base_name, copy_companions};
use crate::adapter::PeftConfig;
use crate::energy::ledger::Totals;
use crate::energy::{Account, Baseline, Limits, Phase, Spent, baseline, carbon};
use crate::error::{Error, Result};
use crate::hub::ModelFiles;
use crate::model::Architecture;
use crate::ops::Parameters;
use crate::recipe::ModelId;
use crate::report::types::{self, Amounts};
use crate::report::{CardFacts, Emissions, EnergyParts, History, Report, StopReason, html, json, markdown, model_card};
use crate::train::{Checkpoints, Outcome, Stop};
use crate::units::{Bytes, Flops, Joules, Seconds};

/// What a report is made of.
pub(super) struct Inputs<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) outcome: &'a Outcome,
    pub(super) account: &'a Account,
    pub(super) checkpoints: &'a Checkpoints,
    /// ((prompt, before), after).
    pub(super) sample: Option<((String, String), String)>,
    pub(super) wall: Seconds,
}

/// Writes the adapter (or model), report.json, report.md, report.html, the model card and emissions.csv. A diverged run's values are not
/// exported: its last checkpoint is the result.
pub(super) fn write_reports(inputs: &Inputs<'_>, directory: &RunDirectory, parameters: &Parameters) -> Result<Report> {
    let prepared = inputs.prepared;
    let report = report(inputs)?.sealed()?;
    if !matches!(inputs.outcome.stop, Stop::Diverged(_)) {
        write_result(inputs, directory, parameters, &report)?;
    }
    json::write_report(&directory.report(), &report)?;
    let write = crate::report::files::write_whole;
    write(&directory.page(), &markdown::to_markdown(&prepared.recipe.name, &report)?)?;
    let history = History::read(&directory.steps(), &directory.ledger())?;
    write(&directory.html_page(), &html::to_html(&prepared.recipe.name, &report, &history)?)?;
    write(&directory.emissions(), &emissions(inputs).to_csv(&report)?)?;
    Ok(report)
}

/// The adapter or model directory, complete or absent.
fn write_result(inputs: &Inputs<'_>, directory: &RunDirectory, parameters: &Parameters, report: &Report) -> Result<()> {
    let prepared = inputs.prepared;
    let place = directory.result(prepared.whole_model());
    let draft = place.with_extension("partial");
    remove(&draft)?;
    std::fs::create_dir_all(&draft).map_err(|e| Error::io("create", &draft, e))?;
    trainee::export(prepared, parameters, &draft, Some(inputs.outcome.standing.tokens))?;
    if !prepared.whole_model() {
        copy_companions(prepared, &draft)?;
    }
    let card = model_card::to_model_card(&card_facts(prepared), report)?;
    crate::report::files::write_whole(&draft.join(crate::report::files::MODEL_CARD), &card)?;
    remove(&place)?;
    std::fs::rename(&draft, &place).map_err(|e| Error::io("rename", &draft, e))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

fn report(inputs: &Inputs<'_>) -> Result<Report> {
    let Inputs { prepared, outcome, account, .. } = inputs;
    let standing = &outcome.standing;
    let spent = account.spent();
    let energy = spent.energy.joules();
    let evaluations = account.by_phase().find(|(phase, _)| *phase == Phase::Eval).map_or(0, |(_, totals)| totals.entries);
    let evaluated = evaluations as usize - 2 * usize::from(inputs.sample.is_some()).min(evaluations as usize / 2);
    let baselines = baselines(prepared, standing.step, evaluated, energy)?;
    let mut warnings = prepared.warnings.clone();
    if let Stop::Diverged(what) = &outcome.stop {
        warnings.push(match inputs.checkpoints.steps()?.last() {
            Some(step) => format!("{what}; no result is written, the last checkpoint is `{}`", checkpoint_name(inputs, *step)),
            None => format!("{what}; no result is written, and no checkpoint was saved before"),
        });
    }
    Ok(Report {
        model: model_block(&prepared.recipe.model.id, &prepared.files, &prepared.architecture),
        adapter: adapter_block(&prepared.target, &prepared.architecture),
        data: data_block(prepared),
        training: training_block(inputs),
        energy: energy_block(prepared, account),
        budget: types::Budget {
            limits: amounts(prepared.budget.limits()),
            spent: spent_amounts(prepared, &spent),
            overshoot_j: Some(account.overshoot().joules()),
            margin_j: account.margin().map(|margin| margin.joules()),
        },
        carbon: carbon_block(prepared, energy),
        baselines: baseline_blocks(&baselines),
        environment: machine::environment(),
        warnings,
        sample: inputs.sample.clone().map(|((prompt, before), after)| types::Sample { prompt, before, after }),
    })
}

pub(super) fn model_block(id: &ModelId, files: &ModelFiles, architecture: &Architecture) -> types::Model {
    types::Model {
        id: base_name(id),
        revision: files.commit.clone().or_else(|| Some(files.revision.clone())),
        architecture: architecture.class.clone(),
        parameters: architecture.parameters(),
    }
}

pub(super) fn adapter_block(target: &Target, architecture: &Architecture) -> types::Adapter {
    let trainable_parameters = target.parameters(architecture) as u64;
    match target {
        Target::Lora { settings, sites, .. } => {
            let modules = architecture.modules();
            let paths: Vec<&str> = sites.iter().map(|site| site.path.as_str()).collect();
            types::Adapter {
                r#type: types::AdapterType::Lora,
                r: Some(settings.r as u64),
                lora_alpha: Some(settings.lora_alpha),
                target_modules: crate::adapter::targets::shortest_names(&modules, &paths),
                trainable_parameters,
            }
        }
        Target::All => types::Adapter {
            r#type: types::AdapterType::None,
            r: None,
            lora_alpha: None,
            target_modules: Vec::new(),
            trainable_parameters,
        },
    }
}

pub(super) fn data_block(prepared: &Prepared) -> types::Data {
    let counts = &prepared.train.counts;
    types::Data {
        examples: counts.examples,
        tokens: counts.tokens,
        loss_tokens: counts.loss_tokens,
        truncated: counts.truncated,
        dropped: counts.dropped,
        skipped: counts.skipped,
        sources: prepared.sources.clone(),
        fingerprint: Some(prepared.train.fingerprint.clone()),
    }
}

fn training_block(inputs: &Inputs<'_>) -> types::Training {
    let (prepared, standing) = (inputs.prepared, &inputs.outcome.standing);
    let after = standing.val_loss_last.filter(|last| last.step == standing.step && last.step > 0);
    let rate = standing.tokens as f64 / standing.train_wall_s;
    types::Training {
        steps: standing.step,
        epochs: Some(standing.step as f64 / prepared.sampler.steps_per_epoch() as f64),
        tokens: Some(standing.tokens),
        loss_tokens: Some(standing.loss_tokens),
        stop_reason: stop_reason(&inputs.outcome.stop),
        val_loss_before: standing.val_loss_before,
        val_loss_after: after.map(|last| last.val_loss),
        train_loss_last: standing.train_loss_last,
        tokens_per_second: rate.is_finite().then_some(rate),
        wall_s: inputs.account.spent().time.max(inputs.wall),
        peak_rss_bytes: machine::peak_rss(),
        best: standing.best.filter(|best| inputs.checkpoints.path(best.step).is_dir()).map(|best| types::Best {
            step: best.step,
            val_loss: best.val_loss,
            path: checkpoint_name(inputs, best.step),
        }),
    }
}

/// A checkpoint's path in the run directory.
fn checkpoint_name(inputs: &Inputs<'_>, step: u64) -> String {
    let path = inputs.checkpoints.path(step);
    path.file_name().map_or(String::new(), |name| format!("checkpoints/{}", name.display()))
}

pub(super) fn stop_reason(stop: &Stop) -> StopReason {
    use crate::energy::Limit;
    match stop {
        Stop::Steps => StopReason::Steps,
        Stop::Epochs => StopReason::Epochs,
        Stop::Budget(Limit::Energy) => StopReason::BudgetEnergy,
        Stop::Budget(Limit::Carbon) => StopReason::BudgetCarbon,
        Stop::Budget(Limit::Flops) => StopReason::BudgetFlops,
        Stop::Budget(Limit::Time) => StopReason::BudgetTime,
        Stop::Budget(Limit::Cost) => StopReason::BudgetCost,
        Stop::Interrupted => StopReason::Interrupted,
        Stop::Diverged(_) => StopReason::Diverged,
    }
}

pub(super) fn phase(phase: Phase) -> types::Phase {
    match phase {
        Phase::Load => types::Phase::Load,
        Phase::Train => types::Phase::Train,
        Phase::Eval => types::Phase::Eval,
        Phase::Save => types::Phase::Save,
        Phase::Lost => types::Phase::Lost,
    }
}

fn energy_block(prepared: &Prepared, account: &Account) -> types::Energy {
    use crate::energy::MeterKind;
    let kind = account.kind();
    let totals = account.totals();
    let total = account.spent().energy.joules();
    let present = |totals: &Totals| totals.entries > 0;
    let by_phase: BTreeMap<types::Phase, Joules> = account
        .by_phase()
        .filter(|(_, totals)| present(totals))
        .map(|(p, totals)| (phase(p), totals.on(kind).joules()))
        .collect();
    let (low, high) = interval(total);
    let counted = kind == MeterKind::Counted;
    let absent = account.meters().absent();
    types::Energy {
        meter: match kind {
            MeterKind::Counted => types::Meter::Counted,
            MeterKind::Measured => types::Meter::Measured,
            MeterKind::Timed => types::Meter::Timed,
        },
        total_j: total,
        low_j: counted.then_some(low),
        high_j: counted.then_some(high),
        by_phase,
        meters: types::Meters {
            counted_j: totals.energy_j.counted.joules(),
            measured_j: totals.energy_j.measured.map(|energy| energy.joules()),
            timed_j: Some(totals.energy_j.timed.joules()),
        },
        measured_absent: absent.map(|absent| types::Absent { reason: absent.reason.clone(), remedy: absent.remedy.clone() }),
        counted_parts: None,
        profile_factor: profile_factor(&prepared.profile),
        reconciliation: reconciliation(account),
        flops: totals.flops,
        bytes: totals.bytes.get(crate::energy::charge::DRAM).copied().unwrap_or_default(),
        bytes_by_level: totals.bytes.iter().map(|(level, bytes)| (level.clone(), *bytes)).collect(),
        device: prepared.profile.name.clone(),
    }
}

pub(super) fn amounts(limits: &Limits) -> Amounts {
    Amounts {
        energy_j: limits.energy,
        carbon_gco2e: limits.carbon,
        flops: limits.flops,
        time_s: limits.time,
        cost: limits.cost.clone(),
    }
}

/// What was spent of each thing a budget can limit.
pub(super) fn spent_amounts(prepared: &Prepared, spent: &Spent) -> Amounts {
    let rates = prepared.budget.rates();
    let energy = spent.energy.joules();
    Amounts {
        energy_j: Some(energy),
        carbon_gco2e: Some(carbon(energy, rates.pue, rates.grid)),
        flops: Some(Flops(spent.flops as f64)),
        time_s: Some(spent.time),
        cost: rates.price.as_ref().map(|price| price.of(rates.pue * energy, spent.time)),
    }
}

pub(super) fn carbon_block(prepared: &Prepared, energy: Joules) -> types::Carbon {
    let (grid, rates) = (&prepared.grid, prepared.budget.rates());
    let (low, high) = interval(energy);
    types::Carbon {
        gco2e: carbon(energy, rates.pue, rates.grid),
        low_gco2e: Some(carbon(low, rates.pue, grid.low.unwrap_or(rates.grid))),
        high_gco2e: Some(carbon(high, rates.pue, grid.high.unwrap_or(rates.grid))),
        embodied_gco2e: None,
        grid: grid.code.clone(),
        gco2e_per_kwh: rates.grid,
        pue: rates.pue,
        year: grid.year,
        source: Some(grid.source.clone()),
    }
}

pub(super) fn baseline_blocks(baselines: &[Baseline]) -> Vec<types::Baseline> {
    use baseline::{BaselineKind, Label};
    let block = |b: &Baseline| types::Baseline {
        kind: match b.kind {
            BaselineKind::Pretraining => types::BaselineKind::Pretraining,
            BaselineKind::FullFineTuning => types::BaselineKind::FullFineTuning,
            BaselineKind::FromScratchSameTask => types::BaselineKind::FromScratchSameTask,
        },
        label: match b.label {
            Label::Measured => types::Label::Measured,
            Label::Counted => types::Label::Counted,
            Label::Published => types::Label::Published,
            Label::Assumed => types::Label::Assumed,
        },
        flops: Some(b.flops),
        energy_j: Some(b.energy),
        gco2e: Some(b.gco2e),
        ratio: b.ratio,
        source: b.source.clone(),
        assumptions: b.assumptions.clone(),
        val_loss_at_equal_energy: None,
        energy_to_equal_loss_j: None,
    };
    baselines.iter().map(block).collect()
}

fn card_facts(prepared: &Prepared) -> CardFacts {
    let recipe = &prepared.recipe;
    let pair = |key: &str, value: String| (key.to_string(), value);
    let mut hyperparameters = vec![
        pair("learning_rate", recipe.train.learning_rate.to_string()),
        pair("micro_batch_size", recipe.train.micro_batch_size.to_string()),
        pair("gradient_accumulation_steps", recipe.train.gradient_accumulation_steps.to_string()),
        pair("max_length", recipe.data.max_length.to_string()),
        pair("seed", recipe.seed.to_string()),
    ];
    if let Target::Lora { settings, sites, .. } = &prepared.target {
        hyperparameters.push(pair("r", settings.r.to_string()));
        hyperparameters.push(pair("lora_alpha", settings.lora_alpha.to_string()));
        let modules = prepared.architecture.modules();
        let base = base_name(&recipe.model.id);
        if let Ok(config) = PeftConfig::for_sites(settings, sites, &modules, &base, None) {
            hyperparameters.extend(crate::adapter::portability(&config).into_iter().map(|note| pair("portability", note)));
        }
    }
    let hub_sources = prepared.sources.iter().filter_map(|source| source.split_once(':')).map(|(id, _)| id.to_string());
    CardFacts {
        name: recipe.name.clone(),
        base_model: match &recipe.model.id {
            ModelId::Hub(id) => Some(id.clone()),
            _ => None,
        },
        license: prepared.files.license.clone(),
        datasets: hub_sources.filter(|id| id.contains('/') && !id.starts_with('/')).collect(),
        location: Some(prepared.grid.name.clone()),
        hardware: Some(prepared.profile.title.clone()),
        hyperparameters,
    }
}

fn emissions(inputs: &Inputs<'_>) -> Emissions {
    let prepared = inputs.prepared;
    let cpu = prepared.profile.kind != crate::energy::profile::DeviceKind::Gpu;
    let total = Some(inputs.account.spent().energy.joules());
    let (country_iso_code, country_name) = match prepared.grid.code.len() {
        3 => (Some(prepared.grid.code.clone()), Some(prepared.grid.name.clone())),
        _ => (None, None),
    };
    Emissions {
        timestamp: chrono::Local::now().format("%Y-%m-%dT%H:%M:%S").to_string(),
        project_name: prepared.recipe.name.clone(),
        run_id: prepared.digest()[..16].to_string(),
        parts: EnergyParts { cpu: total.filter(|_| cpu), gpu: total.filter(|_| !cpu), ram: None },
        country_name,
        country_iso_code,
        region: None,
        cloud_provider: None,
        cloud_region: None,
        cpu_count: Some(crate::energy::allowed_cores() as u64),
        gpu_count: (!cpu).then_some(1),
        gpu_model: (!cpu).then(|| prepared.profile.title.clone()),
        ram_total: machine::memory().map(|(_, all)| all).or(None::<Bytes>),
    }
}
