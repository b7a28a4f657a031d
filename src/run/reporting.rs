//! A run's results into the report's blocks, and the report's files.

use std::path::Path;

use super::directory::RunDirectory;
use super::machine;
use super::prepare::{Prepared, Target};
use super::spending::{budget_block, carbon_block, energy_block, interval, memory_block};
use super::trainee::{self, copy_companions};
use crate::adapter::PeftConfig;
use crate::energy::{Account, Baseline, Interval, Phase, baseline};
use crate::error::{Error, Result};
use crate::forecast::{Metered, baselines, inference_cost, model_name, request_too_long};
use crate::hub::ModelFiles;
use crate::measure::machine::{memory, peak_rss};
use crate::model::Architecture;
use crate::ops::Parameters;
use crate::recipe::ModelId;
use crate::report::types;
use crate::report::{
    CardFacts, Emissions, EnergyParts, History, Report, html, json, markdown, model_card,
};
use crate::train::{Checkpoints, Outcome, Stop, put_in_place, remove_directory};
use crate::units::{Bytes, Joules, Seconds};

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
pub(super) fn write_reports(
    inputs: &Inputs<'_>,
    directory: &RunDirectory,
    parameters: &Parameters,
) -> Result<Report> {
    let report = report(inputs)?.sealed()?;
    if !matches!(inputs.outcome.stop, Stop::Diverged(_)) {
        write_result(inputs, directory, parameters, &report)?;
    }
    write_pages(
        inputs.prepared,
        inputs.account.spent().energy.joules(),
        directory,
        &report,
    )?;
    Ok(report)
}

/// Every file that shows `report`, of a run that spent `total`; the model card only where there is a result for it to stand in.
pub(super) fn write_pages(
    prepared: &Prepared,
    total: Joules,
    directory: &RunDirectory,
    report: &Report,
) -> Result<()> {
    let write = crate::report::files::write_whole;
    json::write_report(&directory.report(), report)?;
    write(
        &directory.page(),
        &markdown::to_markdown(&prepared.recipe.name, report)?,
    )?;
    let history = History::read(&directory.steps(), &directory.ledger())?;
    write(
        &directory.html_page(),
        &html::to_html(&prepared.recipe.name, report, &history)?,
    )?;
    write(
        &directory.emissions(),
        &emissions(prepared, total).to_csv(report)?,
    )?;
    let result = directory.result(prepared.whole_model());
    if result.is_dir() {
        write_card(prepared, &result, report)?;
    }
    Ok(())
}

fn write_card(prepared: &Prepared, dir: &Path, report: &Report) -> Result<()> {
    let card = model_card::to_model_card(&card_facts(prepared), report)?;
    crate::report::files::write_whole(&dir.join(crate::report::files::MODEL_CARD), &card)
}

/// The adapter or model directory, complete or absent.
fn write_result(
    inputs: &Inputs<'_>,
    directory: &RunDirectory,
    parameters: &Parameters,
    report: &Report,
) -> Result<()> {
    let prepared = inputs.prepared;
    let place = directory.result(prepared.whole_model());
    let draft = place.with_extension("partial");
    remove_directory(&draft)?;
    std::fs::create_dir_all(&draft).map_err(|e| Error::io("create", &draft, e))?;
    trainee::export(
        prepared,
        parameters,
        &draft,
        Some(inputs.outcome.state.tokens),
    )?;
    if !prepared.whole_model() {
        copy_companions(prepared, &draft)?;
    }
    write_card(prepared, &draft, report)?;
    put_in_place(&draft, &place)
}

fn report(inputs: &Inputs<'_>) -> Result<Report> {
    let Inputs {
        prepared,
        outcome,
        account,
        ..
    } = inputs;
    let standing = &outcome.state;
    let spent = account.spent();
    let energy = interval(account.kind(), spent.energy.joules());
    let wall = spent.time.max(inputs.wall);
    let evaluations = account
        .by_phase()
        .find(|(phase, _)| *phase == Phase::Eval)
        .map_or(0, |(_, totals)| totals.entries);
    let samples =
        usize::from(standing.sample_before.is_some()) + usize::from(inputs.sample.is_some());
    let evaluated = (evaluations as usize).saturating_sub(samples);
    let counted = account.totals().energy_j.counted.joules();
    let (metered_over_counted, parts) = (account.metered_over_counted(), &account.totals().parts);
    let run = Metered {
        spent: energy.central,
        metered_over_counted,
        parts,
    };
    let baselines = baselines(&prepared.subject(), standing.step, evaluated, &run)?;
    let mut warnings = prepared.warnings.clone();
    if let Stop::Diverged(what) = &outcome.stop {
        warnings.push(match inputs.checkpoints.steps()?.last() {
            Some(step) => format!(
                "{what}; no result is written, the last checkpoint is `{}`",
                checkpoint_name(inputs, *step)
            ),
            None => format!("{what}; no result is written, and no checkpoint was saved before"),
        });
    }
    if let (Some(before), Some(last)) = (standing.val_loss_before, standing.val_loss_last)
        && last.val_loss > before
    {
        warnings.push(format!(
            "the validation loss rose from {before:.4} to {:.4}: the model is worse at these data than before, and a lower `learning_rate` \
             in [train] may help",
            last.val_loss
        ));
    }
    let too_long = request_too_long(&prepared.subject());
    let inference = if too_long.is_none() {
        Some(inference_cost(
            &prepared.subject(),
            counted,
            account.kind(),
        )?)
    } else {
        None
    };
    warnings.extend(too_long);
    Ok(Report {
        model: model_block(
            &prepared.recipe.model.id,
            &prepared.files,
            &prepared.architecture,
        ),
        adapter: adapter_block(&prepared.target, &prepared.architecture),
        data: data_block(prepared),
        training: training_block(inputs, wall),
        energy: energy_block(prepared, account),
        budget: types::Budget {
            overshoot_j: Some(account.overshoot().joules()),
            margin_j: account.margin().map(|margin| margin.joules()),
            ..budget_block(prepared, &spent, energy)
        },
        carbon: carbon_block(prepared, energy, wall),
        baselines: baseline_blocks(&baselines, prepared),
        memory: Some(memory_block(&prepared.memory, None)),
        environment: machine::environment(),
        inference,
        warnings,
        sample: inputs
            .sample
            .clone()
            .map(|((prompt, before), after)| types::Sample {
                prompt,
                before,
                after,
            }),
    })
}

pub(super) fn model_block(
    id: &ModelId,
    files: &ModelFiles,
    architecture: &Architecture,
) -> types::Model {
    types::Model {
        id: model_name(id),
        revision: files
            .commit
            .clone()
            .or_else(|| Some(files.revision.clone())),
        architecture: architecture.class.clone(),
        parameters: architecture.parameters(),
    }
}

pub(super) fn adapter_block(target: &Target, architecture: &Architecture) -> types::Adapter {
    let trainable_parameters = target.parameters(architecture) as u64;
    match target {
        Target::Lora {
            settings, sites, ..
        } => {
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

fn training_block(inputs: &Inputs<'_>, wall: Seconds) -> types::Training {
    let (prepared, standing) = (inputs.prepared, &inputs.outcome.state);
    let after = standing
        .val_loss_last
        .filter(|last| last.step == standing.step && last.step > 0);
    let rate = standing.tokens as f64 / standing.train_wall_s;
    types::Training {
        steps: standing.step,
        epochs: Some(standing.step as f64 / prepared.sampler.steps_per_epoch() as f64),
        tokens: Some(standing.tokens),
        loss_tokens: Some(standing.loss_tokens),
        stop_reason: inputs.outcome.stop.clone(),
        val_loss_before: standing.val_loss_before,
        val_loss_after: after.map(|last| last.val_loss),
        train_loss_last: standing.train_loss_last,
        tokens_per_second: rate.is_finite().then_some(rate),
        wall_s: wall,
        peak_rss_bytes: peak_rss(),
        best: standing
            .best
            .filter(|best| inputs.checkpoints.path(best.step).is_dir())
            .map(|best| types::Best {
                step: best.step,
                val_loss: best.val_loss,
                path: checkpoint_name(inputs, best.step),
            }),
        curve: Vec::new(),
    }
}

/// A checkpoint's path in the run directory.
fn checkpoint_name(inputs: &Inputs<'_>, step: u64) -> String {
    let path = inputs.checkpoints.path(step);
    path.file_name().map_or(String::new(), |name| {
        format!("checkpoints/{}", name.display())
    })
}

/// Each baseline with its bounds: its energy is as uncertain as its label says, its emissions also by the grid's years.
pub(super) fn baseline_blocks(baselines: &[Baseline], prepared: &Prepared) -> Vec<types::Baseline> {
    use baseline::Label;
    let bounds = |b: &Baseline| {
        let energy = if b.label == Label::Measured {
            Interval::exact(b.energy)
        } else {
            Interval::counted(b.energy)
        };
        let carbon = carbon_block(prepared, energy, Seconds::ZERO);
        (
            Some(energy).filter(|energy| energy.low != energy.high),
            carbon,
        )
    };
    let block = |(b, (energy, carbon)): (&Baseline, (Option<Interval<Joules>>, types::Carbon))| {
        types::Baseline {
            kind: b.kind,
            label: b.label,
            flops: Some(b.flops),
            energy_j: Some(b.energy),
            metered_over_counted: b.metered_over_counted,
            gco2e: Some(b.gco2e),
            ratio: b.ratio,
            low_j: energy.map(|energy| energy.low),
            high_j: energy.map(|energy| energy.high),
            low_gco2e: carbon.low_gco2e,
            high_gco2e: carbon.high_gco2e,
            low_ratio: b.ratio_bounds.map(|[low, _]| low),
            high_ratio: b.ratio_bounds.map(|[_, high]| high),
            source: b.source.clone(),
            assumptions: b.assumptions.clone(),
            val_loss_at_equal_energy: None,
            energy_to_equal_loss_j: None,
            measured: None,
        }
    };
    baselines
        .iter()
        .map(|b| (b, bounds(b)))
        .map(block)
        .collect()
}

fn card_facts(prepared: &Prepared) -> CardFacts {
    let recipe = &prepared.recipe;
    let pair = |key: &str, value: String| (key.to_string(), value);
    let mut hyperparameters = vec![
        pair("learning_rate", recipe.train.learning_rate.to_string()),
        pair(
            "micro_batch_size",
            recipe.train.micro_batch_size.to_string(),
        ),
        pair(
            "gradient_accumulation_steps",
            recipe.train.gradient_accumulation_steps.to_string(),
        ),
        pair("max_length", recipe.data.max_length.to_string()),
        pair("seed", recipe.seed.to_string()),
    ];
    if let Target::Lora {
        settings, sites, ..
    } = &prepared.target
    {
        hyperparameters.push(pair("r", settings.r.to_string()));
        hyperparameters.push(pair("lora_alpha", settings.lora_alpha.to_string()));
        let modules = prepared.architecture.modules();
        let base = model_name(&recipe.model.id);
        if let Ok(config) = PeftConfig::for_sites(settings, sites, &modules, &base, None) {
            hyperparameters.extend(
                crate::adapter::portability(&config)
                    .into_iter()
                    .map(|note| pair("portability", note)),
            );
        }
    }
    let hub_sources = prepared
        .sources
        .iter()
        .filter_map(|source| source.split_once(':'))
        .map(|(id, _)| id.to_string());
    CardFacts {
        name: recipe.name.clone(),
        base_model: match &recipe.model.id {
            ModelId::Hub(id) => Some(id.clone()),
            _ => None,
        },
        license: prepared.files.license.clone(),
        datasets: hub_sources
            .filter(|id| id.contains('/') && !id.starts_with('/'))
            .collect(),
        location: Some(prepared.grid.name.clone()),
        hardware: Some(prepared.profile.title.clone()),
        hyperparameters,
    }
}

fn emissions(prepared: &Prepared, total: Joules) -> Emissions {
    let cpu = prepared.profile.kind != crate::energy::profile::DeviceKind::Gpu;
    let total = Some(total);
    let grid = &prepared.grid;
    let (cloud_provider, cloud_region) = grid
        .code
        .split_once(':')
        .map(|(p, r)| (p.to_string(), r.to_string()))
        .unzip();
    let country = grid.country();
    let state = grid
        .code
        .split_once('-')
        .filter(|_| cloud_region.is_none())
        .map(|_| grid.name.clone());
    Emissions {
        timestamp: chrono::Local::now().format("%Y-%m-%dT%H:%M:%S").to_string(),
        project_name: prepared.recipe.name.clone(),
        run_id: prepared.digest()[..16].to_string(),
        parts: EnergyParts {
            cpu: total.filter(|_| cpu),
            gpu: total.filter(|_| !cpu),
            ram: None,
        },
        country_iso_code: country.as_ref().and_then(|country| country.iso3.clone()),
        country_name: country.map(|country| country.name),
        region: state,
        cloud_provider,
        cloud_region,
        cpu_count: Some(crate::energy::allowed_cores() as u64),
        gpu_count: (!cpu).then_some(1),
        gpu_model: (!cpu).then(|| prepared.profile.title.clone()),
        ram_total: memory().map(|(_, all)| all).or(None::<Bytes>),
    }
}
