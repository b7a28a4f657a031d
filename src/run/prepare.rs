//! Preflight: turns a recipe into everything that a run needs before weights are read, or refuses it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use sha2::{Digest, Sha256};

use super::architecture::architecture_of;
use super::checks::{
    Failures, check_baseline_memory, check_length, check_steps, checkpointing_value, recompute,
    refuse_adapter_on_random_weights, refuse_dropout,
};
use super::machine::check_precision;
use super::model::{find_model, tokenizer_of};
use super::options::{sampler_options, schedule, settings};
use super::records::{Records, Sources};
use super::target::{config_warnings, shape_of, target};
use super::task::resolve_task;
use crate::adapter::config::CONFIG_FILE;
use crate::adapter::peft::WEIGHTS_FILE;
use crate::data::{Dataset, MicroBatch, Sampler, Tokenizer, evaluation_batches};
use crate::energy::Computing;
use crate::energy::{Budget, DeviceRef, Grid, Meters, Profile, Rates};
use crate::error::{Error, Result};
use crate::files::sha256;
pub(super) use crate::forecast::Target;
use crate::forecast::{Subject, forecast_run};
use crate::hub::{ModelFiles, Progress};
use crate::measure::machine::free_memory;
use crate::model::{Architecture, MemoryForecast, ModelShape, Recompute, Weights};
use crate::recipe::{
    Adapter, Checkpointing, DataSource, Init, Length, ModelId, Recipe, Validation,
};
use crate::train::{Schedule, Settings, unseen};
use crate::units::Bytes;

/// What a recipe is prepared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Training on this machine, now or later.
    Run,
    /// A plan, which may be for another device.
    Plan,
}

/// A recipe that can run.
pub struct Prepared {
    /// When preparing began.
    pub started: Instant,
    /// The recipe with every `auto` resolved.
    pub recipe: Recipe,
    /// The model's files.
    pub files: ModelFiles,
    /// Read from config.json.
    pub architecture: Architecture,
    /// The token count in config.json of a model that wattune trained from scratch.
    pub pretraining_tokens: Option<f64>,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// Training records.
    pub train: Dataset,
    /// Validation records.
    pub validation: Option<Dataset>,
    /// Sources of the records: paths, or hub ids with their commits.
    pub sources: Vec<String>,
    /// Training batches.
    pub sampler: Sampler,
    /// Validation batches.
    pub validation_batches: Vec<MicroBatch>,
    /// What is trained.
    pub target: Target,
    /// The shape that a step's work follows from.
    pub shape: ModelShape,
    /// The training loop's settings.
    pub settings: Settings,
    /// The device profile that work is charged to.
    pub profile: Profile,
    /// The computing device's profile, where `profile` is of another device.
    pub machine: Option<Profile>,
    /// Free memory of the computing device.
    pub room: Option<Bytes>,
    /// The meters of the machine, opened once.
    pub meters: Meters,
    /// The electricity grid.
    pub grid: Grid,
    /// The limits and rates.
    pub budget: Budget,
    /// Tokens of the largest micro-batch, as far as searched.
    pub longest_batch: usize,
    /// The memory forecast.
    pub memory: MemoryForecast,
    /// Warnings to show before starting.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Trainable parameter count.
    pub fn trained(&self) -> usize {
        self.target.parameters(&self.architecture)
    }

    /// Where the budget alone ends the run: the learning rate over the steps that it admits, as counted.
    fn with_schedule_over_budget(mut self) -> Result<Self> {
        if self.recipe.train.length == Length::Budget {
            let forecast = forecast_run(&self.subject(), None, &mut unseen)?;
            self.settings.schedule = schedule(&self.recipe.train, forecast.steps.max(1));
        }
        Ok(self)
    }

    /// The parts that forecasts need.
    pub fn subject(&self) -> Subject<'_> {
        Subject {
            recipe: &self.recipe,
            digest: self.digest(),
            architecture: &self.architecture,
            pretraining_tokens: self.pretraining_tokens,
            target: &self.target,
            shape: &self.shape,
            settings: &self.settings,
            sampler: &self.sampler,
            validation: &self.validation_batches,
            counts: &self.train.counts,
            profile: &self.profile,
            grid: &self.grid,
            budget: &self.budget,
            longest_batch: self.longest_batch,
            memory: &self.memory,
            machine: self.machine.as_ref(),
        }
    }

    /// Hash of the resolved recipe, the model's commit and the data: a checkpoint resumes only under the same.
    pub fn digest(&self) -> &str {
        &self.settings.recipe
    }
}

/// Runs the preflight of `recipe` for `device`.
///
/// # Errors
/// Everything that preflight refuses: files, data, memory, and settings that contradict the model. Failures that do not follow from
/// each other come together.
pub fn prepare(
    mut recipe: Recipe,
    device: &Device,
    computing: Computing,
    purpose: Purpose,
    progress: &dyn Progress,
) -> Result<Prepared> {
    let started = Instant::now();
    let Inputs {
        counting,
        model,
        sources,
    } = Inputs::find(&mut recipe, device, computing, purpose, progress)?;
    let Counting {
        profile,
        grid,
        budget,
        meters,
    } = counting;
    let PreparedModel {
        files,
        architecture,
        tokenizer,
        target,
        weights,
    } = model;
    recipe.data.chat_date = tokenizer.chat_date();
    let pretraining_tokens = pretraining_tokens(&files)?;
    let records = Records::load(&recipe, sources, &tokenizer, progress)?;
    let mut warnings = config_warnings(&target, &architecture)?;
    warnings.extend(tokenizer.warnings().iter().cloned());
    warnings.extend(records.warnings());
    let examples = Arc::clone(&records.train.examples);
    let sampler = Sampler::new(examples, sampler_options(&recipe))?;
    let batches = |set: &Dataset| evaluation_batches(&set.examples, recipe.train.micro_batch_size);
    let validation_batches = records.validation.as_ref().map(batches).unwrap_or_default();
    let shape = shape_of(&recipe, &architecture, &target);
    let longest_batch = longest_batch(&sampler, &validation_batches);
    let trained = target.parameters(&architecture);
    let machine = machine_beside(&recipe, &profile, computing);
    let room = free_memory(device);
    let free = room.filter(|_| purpose == Purpose::Run || machine.is_none());
    let (recompute, memory) =
        recompute(&recipe, &shape, trained, longest_batch, free, &mut warnings)?;
    warnings.extend(meters.warning().filter(|_| recipe.energy.meter.is_none()));
    let recomputed = checkpointing_value(recompute, shape.backward_blocks());
    resolve_autos(&mut recipe, recomputed, &profile, &meters)?;
    check_baseline_memory(&recipe, &architecture, longest_batch, free)?;
    let files_read = local_inputs(&recipe, &files, &profile)?;
    let contents = weights.as_deref().into_iter().chain(records.fingerprints());
    let digest = digest_of(&recipe, files.commit.is_some(), contents, &files_read);
    let settings = checked_settings(&recipe, &sampler, recompute, digest)?;
    warnings.extend(last_warnings(&profile, &settings, &budget));
    Prepared {
        started,
        recipe,
        files,
        architecture,
        pretraining_tokens,
        tokenizer,
        train: records.train,
        validation: records.validation,
        sources: records.sources,
        sampler,
        validation_batches,
        target,
        shape,
        settings,
        profile,
        machine,
        room,
        meters,
        grid,
        budget,
        longest_batch,
        memory,
        warnings,
    }
    .with_schedule_over_budget()
}

/// The settings of a run that has steps.
fn checked_settings(
    recipe: &Recipe,
    sampler: &Sampler,
    recompute: Recompute,
    digest: String,
) -> Result<Settings> {
    let settings = settings(recipe, sampler.steps_per_epoch(), recompute, digest);
    check_steps(&settings)?;
    Ok(settings)
}

/// What a recipe names, found.
struct Inputs {
    counting: Counting,
    model: PreparedModel,
    sources: Sources,
}

impl Inputs {
    fn find(
        recipe: &mut Recipe,
        device: &Device,
        computing: Computing,
        purpose: Purpose,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut failures = Failures::default();
        failures.note(check_precision(device, recipe.model.dtype));
        failures.note(refuse_adapter_on_random_weights(recipe));
        let counting = failures.note(Counting::resolve(recipe, computing));
        let sources = failures.note(Sources::find(recipe, progress));
        let training_files = sources.as_ref().map(Sources::training_files);
        let model = PreparedModel::open(recipe, training_files, device, purpose, progress);
        let model = failures.note(model);
        let inputs = counting.zip(model).zip(sources);
        failures.or(inputs.map(|((counting, model), sources)| Self {
            counting,
            model,
            sources,
        }))
    }
}

/// How energy is counted and limited.
struct Counting {
    profile: Profile,
    grid: Grid,
    budget: Budget,
    meters: Meters,
}

impl Counting {
    fn resolve(recipe: &Recipe, computing: Computing) -> Result<Self> {
        let mut failures = Failures::default();
        let energy = &recipe.energy;
        let profile = Profile::resolve(&energy.device, computing);
        let profile = failures.note(profile.map_err(|e| e.key("energy.device")));
        let grid = failures.note(Grid::resolve(&energy.grid).map_err(|e| e.key("energy.grid")));
        let budget = grid.as_ref().map(|grid| budget(recipe, grid));
        let budget = budget.and_then(|budget| failures.note(budget));
        let meters = profile.as_ref().map(|profile| {
            let meters = Meters::open(profile.clone(), computing, energy.meter);
            failures.note(meters.resolve(energy.meter));
            meters
        });
        let parts = profile.zip(grid).zip(budget.zip(meters));
        failures.or(parts.map(|((profile, grid), (budget, meters))| Self {
            profile,
            grid,
            budget,
            meters,
        }))
    }
}

/// A model's files, as far as preflight reads them.
struct PreparedModel {
    files: ModelFiles,
    architecture: Architecture,
    tokenizer: Tokenizer,
    target: Target,
    /// Identifies pretrained weights.
    weights: Option<Vec<u8>>,
}

impl PreparedModel {
    /// `training_files`: if they were found, for the names of a classifier's classes.
    fn open(
        recipe: &mut Recipe,
        training_files: Option<&[PathBuf]>,
        device: &Device,
        purpose: Purpose,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let of_model = |error: Error| error.key("model.id");
        let files = find_model(
            &recipe.model.id,
            &recipe.model.revision,
            recipe.model.file.as_deref(),
            progress,
        );
        let files = files.map_err(of_model)?;
        let mut failures = Failures::default();
        let architecture =
            architecture_of(&files, recipe.model.init, recipe.model.quantization, device);
        let architecture = failures.note(architecture.map_err(of_model));
        let rows = architecture.as_ref().map_or(usize::MAX, |a| a.vocab_size);
        let tokenizer = tokenizer_of(&files, rows, recipe.data.chat_date);
        let tokenizer = failures.note(tokenizer.map_err(of_model));
        if purpose == Purpose::Run
            && recipe.model.init == Init::Pretrained
            && files.commit.is_none()
        {
            failures.note(files.require_weights().map(drop).map_err(of_model));
        }
        let of_architecture = architecture.map(|mut architecture| {
            failures.note(refuse_dropout(&architecture).map_err(of_model));
            failures.note(resolve_task(recipe, &mut architecture, training_files));
            failures.note(check_length(recipe, &architecture));
            let weights = weights_fingerprint(recipe, &files, &architecture);
            let weights = failures.note(weights.map_err(of_model));
            let target = failures.note(target(recipe, &architecture));
            weights
                .zip(target)
                .map(|(weights, target)| (architecture, weights, target))
        });
        let parts = of_architecture.flatten().zip(tokenizer);
        failures.or(
            parts.map(|((architecture, weights, target), tokenizer)| Self {
                files,
                architecture,
                tokenizer,
                target,
                weights,
            }),
        )
    }
}

/// Replaces each `auto` of the recipe.
fn resolve_autos(
    recipe: &mut Recipe,
    recomputed: Checkpointing,
    profile: &Profile,
    meters: &Meters,
) -> Result<()> {
    if recipe.train.activation_checkpointing == Checkpointing::Auto {
        recipe.train.activation_checkpointing = recomputed;
    }
    if recipe.energy.device == DeviceRef::Auto {
        recipe.energy.device = profile.reference();
    }
    recipe.energy.meter = Some(meters.resolve(recipe.energy.meter)?);
    Ok(())
}

/// The computing device's profile, if the recipe names the shipped profile of another device.
fn machine_beside(recipe: &Recipe, profile: &Profile, computing: Computing) -> Option<Profile> {
    let base = |profile: &Profile| profile.name.split('@').next().map(str::to_string);
    let is_named = matches!(recipe.energy.device, DeviceRef::Named { .. });
    let machine = Profile::of_machine(computing).ok().filter(|_| is_named)?;
    (base(&machine) != base(profile)).then_some(machine)
}

/// The profile's note and the schedule's warning.
fn last_warnings(profile: &Profile, settings: &Settings, budget: &Budget) -> Vec<String> {
    let note = profile.note.clone().into_iter();
    note.chain(warmup_warning(settings, budget)).collect()
}

/// A warning if the rate never reaches its peak.
fn warmup_warning(settings: &Settings, budget: &Budget) -> Option<String> {
    let Schedule {
        steps,
        warmup_steps,
        peak,
        ..
    } = settings.schedule;
    (warmup_steps >= steps && !budget.is_limited()).then(|| {
        let first = if steps == 1 {
            "is 0 in its only step".to_string()
        } else {
            format!("never reaches {peak}")
        };
        format!(
            "warm-up takes {warmup_steps} of {steps} steps: the learning rate {first}; write `warmup_steps = 0` in [train]"
        )
    })
}

fn budget(recipe: &Recipe, grid: &Grid) -> Result<Budget> {
    let rates = Rates {
        grid: grid.gco2e_per_kwh,
        pue: recipe.energy.pue,
        price: recipe.energy.price.clone(),
    };
    Budget::new(recipe.budget.clone(), rates)
}

/// The token count that a model trained by wattune carries in its configuration.
fn pretraining_tokens(files: &ModelFiles) -> Result<Option<f64>> {
    let config: Option<serde_json::Value> =
        serde_json::from_str(&super::read_text(&files.config)?).ok();
    Ok(config.and_then(|config| config.get("pretraining_tokens")?.as_f64()))
}

/// Identifies pretrained weights: a hub model's commit, else a hash of the files, which are checked; `None` before they are
/// fetched.
fn weights_fingerprint(
    recipe: &Recipe,
    files: &ModelFiles,
    architecture: &Architecture,
) -> Result<Option<Vec<u8>>> {
    if recipe.model.init == Init::Random {
        return Ok(None);
    }
    if let Some(commit) = &files.commit {
        return Ok(Some(commit.clone().into_bytes()));
    }
    match files.require_weights() {
        Ok(weights) => Weights::open(weights, architecture)?
            .fingerprint()
            .map(Some),
        Err(_) => Ok(None),
    }
}

/// SHA-256 of a resolved recipe's changed keys and its inputs, in hex. Local paths are left out, because the inputs' contents are in: a run
/// whose folder was moved resumes.
fn digest_of<'a>(
    recipe: &Recipe,
    has_commit: bool,
    contents: impl Iterator<Item = &'a [u8]>,
    files_read: &'a [String],
) -> String {
    let mut hash = Sha256::new_with_prefix(without_paths(recipe, has_commit).changed_keys());
    for input in contents.chain(files_read.iter().map(String::as_bytes)) {
        hash.update(" ");
        hash.update(input);
    }
    crate::text::hex(hash.finalize())
}

/// Hashes of config.json, of the adapter that is continued and of the profile file, if the recipe names any.
fn local_inputs(recipe: &Recipe, files: &ModelFiles, profile: &Profile) -> Result<Vec<String>> {
    let hash = |path: &Path| sha256(path).map_err(|e| Error::io("read", path, e));
    let mut inputs = vec![hash(&files.config)?];
    if let Adapter::Lora(lora) = &recipe.adapter
        && let Some(path) = &lora.init_from
    {
        inputs.push(hash(&path.join(CONFIG_FILE))?);
        inputs.push(hash(&path.join(WEIGHTS_FILE))?);
    }
    if matches!(recipe.energy.device, DeviceRef::File(_)) {
        inputs.push(profile.to_toml());
    }
    Ok(inputs)
}

/// The recipe with `.` for every local path, and no revision if the model's commit is hashed: it can then be pinned later.
fn without_paths(recipe: &Recipe, has_commit: bool) -> Recipe {
    let mut recipe = recipe.clone();
    if has_commit {
        recipe.model.revision.clear();
    }
    let anywhere = || PathBuf::from(".");
    if let ModelId::Directory(path) = &mut recipe.model.id {
        *path = anywhere();
    }
    let validation = match &mut recipe.data.validation {
        Validation::Source(source) => Some(source),
        _ => None,
    };
    for source in validation.into_iter().chain([&mut recipe.data.train]) {
        if let DataSource::Files(paths) = source {
            *paths = vec![anywhere()];
        }
    }
    if let Adapter::Lora(lora) = &mut recipe.adapter {
        lora.init_from = lora.init_from.as_ref().map(|_| anywhere());
    }
    if let DeviceRef::File(path) = &mut recipe.energy.device {
        *path = anywhere();
    }
    recipe
}

/// Tokens of the largest micro-batch among the first epoch's steps and the evaluation.
fn longest_batch(sampler: &Sampler, validation: &[MicroBatch]) -> usize {
    const SEARCHED_STEPS: u64 = 2000;
    let steps = 0..sampler.steps_per_epoch().min(SEARCHED_STEPS);
    let trained = steps
        .flat_map(|step| sampler.step_shape(step))
        .map(|shape| shape.tokens());
    trained
        .chain(validation.iter().map(|batch| batch.tokens.len()))
        .max()
        .unwrap_or(0)
}
