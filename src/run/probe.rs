//! `plan --probe`: the plan with the throughput of a few timed steps.
//!
//! The model directory may hold config.json alone: without tokenizer or data only the blocks that need neither are given.

use std::num::NonZeroUsize;

use candle_core::Device;

use super::architecture::architecture_of;
use super::checks::{check_length, recompute, refuse_adapter_on_random_weights, refuse_dropout};
use super::machine::check_precision;
use super::model::find_model;
use super::options::settings;
use super::prepare::{Purpose, Target};
use super::reporting::{adapter_block, model_block};
use super::spending::memory_block;
use super::target::{config_warnings, shape_of, target};
use super::task::resolve_task;
use super::{Screen, plan, prepare};
use crate::data;
use crate::energy::{Computing, Profile};
use crate::error::{Error, Result};
use crate::hub::{ModelFiles, Progress};
use crate::measure::machine::free_memory;
use crate::measure::probe;
use crate::model::{Architecture, MemoryForecast};
use crate::recipe::{DataSource, Recipe, Validation};
use crate::report::Plan;
use crate::train;
use crate::units::Bytes;

/// The plan of `recipe` with a `probe` block from `steps` timed steps. Where the tokenizer or a local data file is missing, the plan has
/// no run and a warning says what is missing.
///
/// # Errors
/// What preflight refuses, and a step that is not finite.
pub fn plan_with_probe(
    mut recipe: Recipe,
    steps: NonZeroUsize,
    device: &Device,
    computing: Computing,
    screen: &mut dyn Screen,
) -> Result<Plan> {
    let profile = Profile::resolve(&recipe.energy.device, computing)?;
    let parts = ModelParts::new(&mut recipe, device, screen.downloads())?;
    let missing = missing(&recipe, &parts.files);
    let mut document = if missing.is_empty() {
        let (recipe, downloads) = (recipe.clone(), screen.downloads());
        let prepared = prepare(recipe, device, computing, Purpose::Plan, downloads)?;
        plan(&prepared, screen)?.plan
    } else {
        parts.plan_without_run(&recipe, &missing)?
    };
    screen.note(&format!(
        "probing: {steps} steps of {} x {} x {} tokens on random weights",
        recipe.train.gradient_accumulation_steps,
        recipe.train.micro_batch_size,
        recipe.data.max_length
    ));
    let found = probe(
        &recipe,
        &parts.architecture,
        &parts.target,
        &parts.settings,
        &profile,
        steps,
        device,
    );
    document.probe = Some(found.map_err(Error::while_running)?);
    Ok(document)
}

/// What a complete plan needs and is missing.
fn missing(recipe: &Recipe, files: &ModelFiles) -> Vec<String> {
    let mut missing = Vec::new();
    let has = |name: &str| files.file(name).is_some();
    let tokenizer = has("tokenizer.json") || (has("vocab.json") && has("merges.txt"));
    if !tokenizer {
        missing.push(format!(
            "`{}` holds no tokenizer: energy and time are those of full rows, not of the data",
            files.id
        ));
    }
    let validation = match &recipe.data.validation {
        Validation::Source(source) => Some(source),
        Validation::None | Validation::Fraction(_) => None,
    };
    for source in [&recipe.data.train].into_iter().chain(validation) {
        if let DataSource::Files(paths) = source {
            let files = data::files(paths).unwrap_or_else(|_| paths.clone());
            let absent = files.iter().filter(|path| !path.exists());
            missing.extend(absent.map(|path| {
                format!(
                    "there is no file `{}`: energy and time are those of full rows, not of the data",
                    path.display()
                )
            }));
        }
    }
    missing
}

/// The part of a prepared run that needs neither tokenizer nor data.
struct ModelParts {
    files: ModelFiles,
    architecture: Architecture,
    target: Target,
    settings: train::Settings,
    memory: MemoryForecast,
    /// Free memory of the device.
    room: Option<Bytes>,
    warnings: Vec<String>,
}

impl ModelParts {
    /// Every row of a micro-batch is taken at its full length.
    fn new(recipe: &mut Recipe, device: &Device, progress: &dyn Progress) -> Result<Self> {
        check_precision(device, recipe.model.dtype)?;
        refuse_adapter_on_random_weights(recipe)?;
        let files = find_model(
            &recipe.model.id,
            &recipe.model.revision,
            recipe.model.file.as_deref(),
            progress,
        )?;
        let mut architecture =
            architecture_of(&files, recipe.model.init, recipe.model.quantization, device)?;
        refuse_dropout(&architecture)?;
        resolve_task(recipe, &mut architecture, None)?;
        let target = target(recipe, &architecture)?;
        check_length(recipe, &architecture)?;
        let mut warnings = config_warnings(&target, &architecture)?;
        let tokens = recipe.train.micro_batch_size * recipe.data.max_length;
        let shape = shape_of(recipe, &architecture, &target);
        let room = free_memory(device);
        let (recompute, memory) = recompute(
            recipe,
            &shape,
            target.parameters(&architecture),
            tokens,
            room,
            &mut warnings,
        )?;
        // The probe has its step count: neither steps nor epochs matter.
        let settings = settings(recipe, 1, recompute, String::new());
        Ok(Self {
            files,
            architecture,
            target,
            settings,
            memory,
            room,
            warnings,
        })
    }

    /// The plan's blocks that need no data; `missing` joins the warnings.
    fn plan_without_run(&self, recipe: &Recipe, missing: &[String]) -> Result<Plan> {
        Ok(Plan {
            model: model_block(&recipe.model.id, &self.files, &self.architecture),
            adapter: adapter_block(&self.target, &self.architecture)?,
            run: None,
            memory: memory_block(&self.memory, self.room),
            warnings: [&self.warnings, missing].concat(),
            probe: None,
        })
    }
}
