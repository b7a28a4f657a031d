//! The report of a run: results as blocks, and the files of the run directory.

use std::path::Path;

use super::directory::RunDirectory;
use super::machine;
use super::prepare::{Prepared, Target};
use super::session::Session;
use super::spending::{budget_block, carbon_block, energy_block, interval, memory_block};
use super::target::saved_config;
use crate::adapter::{Verdict, portability};
use crate::energy::{Grid, Interval, Phase, Profile};
use crate::error::Result;
use crate::files::{DraftDirectory, write_atomic};
use crate::forecast::{
    Metered, baselines, emissions, inference_cost, model_name, request_too_long,
};
use crate::hub::ModelFiles;
use crate::measure::machine::{cpu_time, memory, peak_rss};
use crate::model::{Architecture, Classified, ProblemType};
use crate::recipe::ModelId;
use crate::report::baselines::{Baseline, Label};
use crate::report::files::MODEL_CARD;
use crate::report::types::{self, Report, Sample};
use crate::report::{
    CardFacts, Emissions, EnergyParts, FiniteReport, History, to_html, to_json, to_markdown,
    to_model_card,
};
use crate::train::Stop;
use crate::units::{Joules, Seconds};

/// A run that has ended.
pub(super) struct Ended<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) stop: &'a Stop,
    pub(super) sample: Option<Sample>,
    pub(super) wall: Seconds,
}

/// Writes the adapter (or model) by `export`, then the pages, and report.json last: a run is finished when it is there. A diverged
/// run's weights are not exported: its last checkpoint is the result.
pub(super) fn write_reports(
    run: &Ended<'_>,
    directory: &RunDirectory,
    export: &dyn Fn(&Path) -> Result<()>,
) -> Result<FiniteReport> {
    let report = FiniteReport::new(report(run)?)?;
    if !matches!(run.stop, Stop::Diverged(_)) {
        write_result(run, directory, export, &report)?;
    }
    let total = run.session.account.spent().energy.joules();
    write_pages(run.session.prepared, total, directory, &report)?;
    Ok(report)
}

/// Every file made of `report`, of a run that spent `total`; the model card only next to trained weights.
pub(super) fn write_pages(
    prepared: &Prepared,
    total: Joules,
    directory: &RunDirectory,
    report: &FiniteReport,
) -> Result<()> {
    let name = &prepared.recipe.name;
    let history = History::read(&directory.steps(), &directory.ledger())?;
    let row = emissions_row(EmissionsOf {
        name,
        run_id: &prepared.digest()[..16],
        profile: &prepared.profile,
        grid: &prepared.grid,
        energy: total,
    });
    let csv = row.to_csv(report)?;
    write_atomic(&directory.page(), to_markdown(name, report)?)?;
    write_atomic(&directory.html_page(), to_html(name, report, &history)?)?;
    write_atomic(&directory.emissions(), csv)?;
    let result = directory.result(prepared.whole_model());
    if result.is_dir() && !matches!(report.training.stop_reason, Stop::Diverged(_)) {
        write_card(prepared, &result, report)?;
    }
    write_atomic(&directory.report(), to_json(report)?)
}

fn write_card(prepared: &Prepared, dir: &Path, report: &FiniteReport) -> Result<()> {
    let card = to_model_card(&card_facts(prepared), report)?;
    write_atomic(&dir.join(MODEL_CARD), card)
}

/// The adapter or model directory, complete or absent.
fn write_result(
    run: &Ended<'_>,
    directory: &RunDirectory,
    export: &dyn Fn(&Path) -> Result<()>,
    report: &FiniteReport,
) -> Result<()> {
    let prepared = run.session.prepared;
    let draft = DraftDirectory::new(&directory.result(prepared.whole_model()))?;
    export(draft.path())?;
    write_card(prepared, draft.path(), report)?;
    draft.replace()
}

fn report(run: &Ended<'_>) -> Result<Report> {
    let prepared = run.session.prepared;
    let account = &run.session.account;
    let spent = account.spent();
    let energy = interval(account.kind(), spent.energy.joules());
    let wall = spent.time.max(run.wall);
    let mut warnings = warnings(run)?;
    let inference = match request_too_long(&prepared.subject()) {
        Some(why) => {
            warnings.push(why);
            None
        }
        None => {
            let counted = account.totals().energy_j.counted.joules();
            let kind = account.kind();
            Some(inference_cost(&prepared.subject(), counted, kind))
        }
    };
    Ok(Report {
        model: model_block(
            &prepared.recipe.model.id,
            &prepared.files,
            &prepared.architecture,
        ),
        adapter: adapter_block(&prepared.target, &prepared.architecture)?,
        data: data_block(prepared),
        training: training_block(run, wall),
        energy: energy_block(prepared, account, run.session.state.step),
        budget: types::Budget {
            overshoot_j: Some(account.overshoot().joules()),
            margin_j: account.margin().map(|margin| margin.joules()),
            ..budget_block(prepared, &spent, energy)
        },
        carbon: carbon_block(prepared, energy, wall),
        baselines: counted_baselines(run, energy.central),
        memory: Some(memory_block(&prepared.memory, None)),
        environment: machine::environment(),
        inference,
        hyperparameters: prepared.recipe.hyperparameters(),
        warnings,
        sample: run.sample.clone(),
    })
}

/// Baselines over the run's steps and evaluations, without its samples.
fn counted_baselines(run: &Ended<'_>, spent: Joules) -> Vec<Baseline> {
    let account = &run.session.account;
    let state = &run.session.state;
    let entries = account
        .by_phase()
        .find(|(phase, _)| *phase == Phase::Eval)
        .map_or(0, |(_, totals)| totals.entries);
    let samples = usize::from(state.sample_before.is_some()) + usize::from(run.sample.is_some());
    let evaluations = (entries as usize).saturating_sub(samples);
    let metered = Metered {
        spent,
        metered_over_counted: account.metered_over_counted(),
        parts: &account.totals().breakdown,
    };
    let subject = run.session.prepared.subject();
    let found = baselines(&subject, state.step, evaluations, &metered);
    baseline_blocks(found, run.session.prepared)
}

/// Warnings of the preparation, divergence, and a validation loss that rose.
fn warnings(run: &Ended<'_>) -> Result<Vec<String>> {
    let mut warnings = run.session.prepared.warnings.clone();
    if let Stop::Diverged(what) = run.stop {
        warnings.push(match run.session.checkpoints.steps()?.last() {
            Some(step) => format!(
                "{what}; no result is written, the last checkpoint is `{}`",
                checkpoint_name(run, *step)
            ),
            None => format!("{what}; no result is written, and no checkpoint was saved before"),
        });
    }
    let state = &run.session.state;
    if let (Some(before), Some(last)) = (state.val_loss_before, state.val_loss_last)
        && last.val_loss > before
    {
        warnings.push(format!(
            "validation loss rose from {before:.4} to {:.4}: the model is worse on these data than before; a lower `learning_rate` in \
             [train] may help",
            last.val_loss
        ));
    }
    Ok(warnings)
}

fn training_block(run: &Ended<'_>, wall: Seconds) -> types::Training {
    let state = &run.session.state;
    let steps_per_epoch = run.session.prepared.sampler.steps_per_epoch();
    let after = state
        .val_loss_last
        .filter(|last| last.step == state.step && last.step > 0);
    let rate = state.tokens as f64 / state.train_wall_s;
    let best = state
        .best
        .filter(|best| run.session.checkpoints.path(best.step).is_dir());
    // Earlier processes' CPU time is not known.
    let started = run.session.prepared.started;
    let is_resumed = wall.0 > 1.05 * started.elapsed().as_secs_f64();
    types::Training {
        steps: state.step,
        epochs: Some(state.step as f64 / steps_per_epoch as f64),
        tokens: Some(state.tokens),
        loss_tokens: Some(state.loss_tokens),
        stop_reason: run.stop.clone(),
        val_loss_before: state.val_loss_before,
        val_loss_after: after.map(|last| last.val_loss),
        val_loss_after_se: after.and_then(|last| last.standard_error),
        metrics: after.and_then(|last| last.metrics),
        confusion_matrix: after.and_then(|_| confusion_matrix(run)),
        loss_unit: loss_unit(&run.session.prepared.architecture),
        train_loss_last: state.train_loss_last,
        tokens_per_second: rate.is_finite().then_some(rate),
        wall_s: wall,
        cpu_s: cpu_time().filter(|_| !is_resumed),
        peak_rss_bytes: peak_rss(),
        best: best.map(|best| types::Best {
            step: best.step,
            val_loss: best.val_loss,
            path: checkpoint_name(run, best.step),
        }),
        curve: Vec::new(),
    }
}

fn confusion_matrix(run: &Ended<'_>) -> Option<types::ConfusionMatrix> {
    let counts = run.session.state.confusion_matrix.clone();
    let labels = run.session.prepared.architecture.labels().to_vec();
    (!counts.is_empty()).then_some(types::ConfusionMatrix { labels, counts })
}

fn loss_unit(architecture: &Architecture) -> types::LossUnit {
    match (architecture.classified(), architecture.problem_type()) {
        (_, Some(ProblemType::Regression)) => types::LossUnit::SquaredError,
        (Some(Classified::Sequences), _) => types::LossUnit::NatsPerRecord,
        _ => types::LossUnit::NatsPerToken,
    }
}

/// A checkpoint's path in the run directory.
fn checkpoint_name(run: &Ended<'_>, step: u64) -> String {
    let path = run.session.checkpoints.path(step);
    let name = path.file_name().unwrap_or_default();
    format!("checkpoints/{}", name.display())
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

/// # Errors
/// A pattern that is no regular expression.
pub(super) fn adapter_block(
    target: &Target,
    architecture: &Architecture,
) -> Result<types::Adapter> {
    let trainable_parameters = target.parameters(architecture) as u64;
    Ok(match target {
        Target::Lora {
            settings,
            adaptation,
            ..
        } => {
            let modules = architecture.modules();
            let sites = adaptation.sites.iter();
            let paths: Vec<&str> = sites.map(|site| site.path.as_str()).collect();
            let config = saved_config(settings, adaptation, architecture, "", None)?;
            let verdicts = portability(&config, &[]).into_iter();
            let verdict = |verdict: Verdict| types::Portability {
                runtime: verdict.runtime.name().to_string(),
                verdict: verdict.effect.words().to_string(),
                reasons: verdict.reasons,
            };
            types::Adapter {
                r#type: types::AdapterType::Lora,
                r: Some(settings.r as u64),
                lora_alpha: Some(settings.lora_alpha),
                target_modules: crate::adapter::targets::shortest_names(&modules, &paths),
                trainable_parameters,
                portability: verdicts.map(verdict).collect(),
            }
        }
        Target::All => types::Adapter {
            r#type: types::AdapterType::None,
            r: None,
            lora_alpha: None,
            target_modules: Vec::new(),
            trainable_parameters,
            portability: Vec::new(),
        },
    })
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

/// Each baseline with its ranges: energy by its label, emissions also by the years of the grid.
pub(super) fn baseline_blocks(
    found: Vec<crate::energy::Baseline>,
    prepared: &Prepared,
) -> Vec<Baseline> {
    let block = |baseline: crate::energy::Baseline| {
        let energy = if baseline.label == Label::Measured {
            Interval::exact(baseline.energy)
        } else {
            Interval::counted(baseline.energy)
        };
        let emissions = emissions(energy, &prepared.grid, prepared.budget.rates());
        let ratio = baseline.ratio.map(|central| {
            let [low, high] = baseline.ratio_bounds.unwrap_or([central; 2]);
            Interval { low, central, high }
        });
        Baseline {
            kind: baseline.kind,
            label: baseline.label,
            flops: Some(baseline.flops),
            energy: Some(energy),
            metered_over_counted: baseline.metered_over_counted,
            emissions: Some(Interval {
                central: baseline.gco2e,
                ..emissions
            }),
            ratio,
            source: baseline.source,
            assumptions: baseline.assumptions,
            val_loss_at_equal_energy: None,
            energy_to_equal_loss_j: None,
            measured: None,
        }
    };
    found.into_iter().map(block).collect()
}

fn card_facts(prepared: &Prepared) -> CardFacts {
    let recipe = &prepared.recipe;
    let sources = prepared.sources.iter();
    let ids = sources.filter_map(|source| Some(source.split_once(':')?.0.to_string()));
    CardFacts {
        name: recipe.name.clone(),
        base_model: match &recipe.model.id {
            ModelId::Hub(id) => Some(id.clone()),
            _ => None,
        },
        license: prepared.files.license.clone(),
        datasets: ids
            .filter(|id| id.contains('/') && !id.starts_with('/'))
            .collect(),
        location: Some(prepared.grid.name.clone()),
        hardware: Some(prepared.profile.title.clone()),
        hyperparameters: hyperparameters(prepared),
    }
}

/// The model card's settings.
fn hyperparameters(prepared: &Prepared) -> Vec<(String, String)> {
    let recipe = &prepared.recipe;
    let train = &recipe.train;
    let accumulation = train.gradient_accumulation_steps;
    let mut pairs = vec![
        ("learning_rate", train.learning_rate.to_string()),
        ("micro_batch_size", train.micro_batch_size.to_string()),
        ("gradient_accumulation_steps", accumulation.to_string()),
        ("max_length", recipe.data.max_length.to_string()),
        ("seed", recipe.seed.to_string()),
    ];
    if let Target::Lora { settings, .. } = &prepared.target {
        pairs.push(("r", settings.r.to_string()));
        pairs.push(("lora_alpha", settings.lora_alpha.to_string()));
    }
    let owned = |(key, value): (&str, String)| (key.to_string(), value);
    pairs.into_iter().map(owned).collect()
}

/// What emissions.csv says of a run apart from its totals.
pub(super) struct EmissionsOf<'a> {
    pub(super) name: &'a str,
    pub(super) run_id: &'a str,
    pub(super) profile: &'a Profile,
    pub(super) grid: &'a Grid,
    pub(super) energy: Joules,
}

pub(super) fn emissions_row(run: EmissionsOf<'_>) -> Emissions {
    let gpu = run.profile.kind == crate::energy::profile::DeviceKind::Gpu;
    let total = Some(run.energy);
    let grid = run.grid;
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
        timestamp: crate::text::local_time()
            .format("%Y-%m-%dT%H:%M:%S")
            .to_string(),
        project_name: run.name.to_string(),
        run_id: run.run_id.to_string(),
        parts: EnergyParts {
            cpu: total.filter(|_| !gpu),
            gpu: total.filter(|_| gpu),
            ram: None,
        },
        country_iso_code: country.as_ref().and_then(|country| country.iso3.clone()),
        country_name: country.map(|country| country.name),
        region: state,
        cloud_provider,
        cloud_region,
        cpu_count: Some(crate::energy::allowed_cores() as u64),
        gpu_count: gpu.then_some(1),
        gpu_model: gpu.then(|| run.profile.title.clone()),
        ram_total: memory().map(|(_, all)| all),
    }
}
