//! Preflight: a recipe -> everything a run needs before weights are read, or the reason why it cannot run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::machine;
use super::model::{cache_root, find_model, tokenizer_of};
use super::options::{data_options, sampler_options, settings};
use crate::adapter::shards::read_headers;
use crate::adapter::{self, LoraConfig};
use crate::data::{self, Dataset, MicroBatch, Sampler, Tokenizer, evaluation_batches};
use crate::energy::meter::Computing;
use crate::energy::{Budget, DeviceRef, Grid, Meters, Profile, Rates};
use crate::error::{Error, Kind, Result};
pub(super) use crate::forecast::Target;
use crate::forecast::{Subject, measured_kinds};
use crate::hub::{Hub, ModelFiles, Progress, Settings as HubSettings};
use crate::measure::machine::{free_disk, free_memory};
use crate::model::{
    Architecture, MemoryForecast, ModelShape, Recompute, Weights, forecast_memory, least_recompute,
};
use crate::recipe::{self, Adapter, Checkpointing, DataSource, Init, Recipe, Validation};
use crate::train::{self, checkpoint_bytes};
use crate::units::Bytes;

/// Steps of a run, at most.
const MOST_STEPS: u64 = 10_000_000;

/// A recipe found runnable.
pub struct Prepared {
    /// With every `auto` resolved.
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
    /// Where the records came from: paths, or hub ids with their commits.
    pub sources: Vec<String>,
    /// Training batches.
    pub sampler: Sampler,
    /// Validation batches.
    pub validation_batches: Vec<MicroBatch>,
    /// What is trained.
    pub target: Target,
    /// What a step's work depends on.
    pub shape: ModelShape,
    /// The loop's settings.
    pub settings: train::Settings,
    /// The device that is counted.
    pub profile: Profile,
    /// Where its electricity comes from.
    pub grid: Grid,
    /// What may be spent.
    pub budget: Budget,
    /// Tokens of the largest micro-batch, as far as it was looked for.
    pub longest_batch: usize,
    /// What memory it will take.
    pub memory: MemoryForecast,
    /// What a person should know before starting.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Trainable parameter count.
    pub fn trained(&self) -> usize {
        self.target.parameters(&self.architecture)
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
        }
    }

    /// Names the resolved recipe, the model's commit and the data's contents: a checkpoint goes on only under them.
    pub fn digest(&self) -> &str {
        &self.settings.recipe
    }
}

/// Runs the whole preflight of `recipe` for `device`.
pub fn prepare(
    mut recipe: Recipe,
    device: &Device,
    computing: Computing,
    progress: &dyn Progress,
) -> Result<Prepared> {
    machine::check_precision(device, recipe.model.dtype)?;
    refuse_adapter_on_random_weights(&recipe)?;
    let profile = Profile::resolve(&recipe.energy.device, computing)?;
    let grid = Grid::resolve(&recipe.energy.grid)?;
    let rates = Rates {
        grid: grid.gco2e_per_kwh,
        pue: recipe.energy.pue,
        price: recipe.energy.price.clone(),
    };
    let budget = Budget::new(recipe.budget.clone(), rates)?;

    let files = find_model(&recipe.model.id, &recipe.model.revision, progress)?;
    let architecture = architecture_of(&files, device)?;
    let pretraining_tokens = pretraining_tokens(&files)?;
    let target = target(&recipe, &architecture)?;
    let weights = weights_name(&recipe, &files, &architecture)?;
    let tokenizer = tokenizer_of(&files)?;
    check_length(&recipe, &architecture)?;

    let mut warnings = Vec::new();
    let (train, validation, sources) = datasets(&recipe, &tokenizer, progress)?;
    note_counts("training", &train, &mut warnings);
    validation
        .iter()
        .for_each(|set| note_counts("validation", set, &mut warnings));
    let sampler = Sampler::new(Arc::clone(&train.examples), sampler_options(&recipe))?;
    let validation_batches = match &validation {
        Some(set) => evaluation_batches(&set.examples, recipe.train.micro_batch_size),
        None => Vec::new(),
    };
    let shape = shape_of(&recipe, &architecture, &target);
    let tokens = longest_batch(&sampler, &validation_batches);
    let trained = target.parameters(&architecture);
    let (recompute, memory) = recompute(&recipe, &shape, trained, tokens, &mut warnings)?;
    if recipe.train.activation_checkpointing == Checkpointing::Auto {
        recipe.train.activation_checkpointing = resolved(recompute, shape.backward_blocks());
    }
    check_measured_baselines(&recipe, &architecture, tokens)?;
    if recipe.energy.device == DeviceRef::Auto {
        recipe.energy.device = profile.reference();
    }
    let meters = Meters::open(profile.clone(), computing);
    recipe.energy.meter = Some(meters.resolve(recipe.energy.meter)?);
    let seen = [Some(&train), validation.as_ref()]
        .into_iter()
        .flatten()
        .map(|set| set.fingerprint.as_bytes());
    let digest = digest_of(&recipe, weights.as_deref().into_iter().chain(seen));
    let settings = settings(&recipe, sampler.steps_per_epoch(), recompute, digest);
    check_steps(&settings)?;
    warnings.extend(profile.note.clone());
    Ok(Prepared {
        recipe,
        files,
        architecture,
        pretraining_tokens,
        tokenizer,
        train,
        validation,
        sources,
        sampler,
        validation_batches,
        target,
        shape,
        settings,
        profile,
        grid,
        budget,
        longest_batch: tokens,
        memory,
        warnings,
    })
}

/// The token count that a model trained by wattune carries in its configuration.
fn pretraining_tokens(files: &ModelFiles) -> Result<Option<f64>> {
    let config: Option<serde_json::Value> =
        serde_json::from_str(&super::read_text(&files.config)?).ok();
    Ok(config.and_then(|config| config.get("pretraining_tokens")?.as_f64()))
}

/// What tells the pretrained weights from others: a hub model's commit, else what the files hold, which are checked; none where there are none
/// yet.
fn weights_name(
    recipe: &Recipe,
    files: &ModelFiles,
    architecture: &Architecture,
) -> Result<Option<Vec<u8>>> {
    match (&files.commit, files.require_weights()) {
        _ if recipe.model.init == Init::Random => Ok(None),
        (Some(commit), _) => Ok(Some(commit.clone().into_bytes())),
        (None, Ok(weights)) => Weights::open(weights, architecture)?
            .fingerprint()
            .map(Some),
        (None, Err(_)) => Ok(None),
    }
}

/// Names a resolved recipe with what it was found to read.
fn digest_of<'a>(recipe: &Recipe, read: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new_with_prefix(recipe.to_toml());
    for name in read {
        hash.update(" ");
        hash.update(name);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A model's architecture, for computing on `device`: a graphics processor keeps weights in the compute type, however they are stored.
pub(super) fn architecture_of(files: &ModelFiles, device: &Device) -> Result<Architecture> {
    let mut architecture = Architecture::from_file(&files.config)?;
    architecture.stored_in_bf16 =
        device.is_cpu() && in_bf16(files).unwrap_or(architecture.stored_in_bf16);
    Ok(architecture)
}

/// Whether all matrices in the model's files are bf16; `None` where they are not there yet or cannot be read.
fn in_bf16(files: &ModelFiles) -> Option<bool> {
    let tensors = read_headers(files.require_weights().ok()?).ok()?;
    Some(
        tensors
            .iter()
            .filter(|tensor| tensor.shape.len() > 1)
            .all(|tensor| tensor.dtype == Dtype::BF16),
    )
}

/// What a step's work and memory depend on.
pub(super) fn shape_of(
    recipe: &Recipe,
    architecture: &Architecture,
    target: &Target,
) -> ModelShape {
    let dropout = matches!(&recipe.adapter, Adapter::Lora(lora) if lora.config.lora_dropout > 0.0);
    match target {
        Target::Lora { sites, .. } => {
            ModelShape::with_adapters(architecture, sites, dropout, recipe.model.dtype)
        }
        Target::All => ModelShape::fully_trained(architecture, recipe.model.dtype),
    }
}

pub(super) fn refuse_adapter_on_random_weights(recipe: &Recipe) -> Result<()> {
    if recipe.model.init == Init::Random && matches!(recipe.adapter, Adapter::Lora(_)) {
        return Err(Error::new(Kind::Recipe, "an adapter cannot be trained on random weights")
            .at("model.init")
            .value("random")
            .hint("write `type = \"none\"` in [adapter] to train every weight, or `init = \"pretrained\"` in [model]"));
    }
    Ok(())
}

/// What the recipe trains, every target found in the model.
pub(super) fn target(recipe: &Recipe, architecture: &Architecture) -> Result<Target> {
    let Adapter::Lora(lora) = &recipe.adapter else {
        return Ok(Target::All);
    };
    let modules = architecture.modules();
    let mut settings = lora.config.clone();
    let mut from = None;
    if let Some(path) = &lora.init_from {
        let loaded = adapter::load(path)?;
        let held = loaded.config.settings();
        contradictions(lora, &held)?;
        settings = LoraConfig {
            lora_dropout: settings.lora_dropout,
            ..held
        };
        from = Some(Box::new(loaded));
    }
    let sites = match &from {
        Some(loaded) => loaded
            .attach(&modules)?
            .into_iter()
            .map(|fitted| fitted.site)
            .collect(),
        None => adapter::select(&modules, "lm_head", &settings)?,
    };
    if let Some(site) = sites.iter().find(|site| site.path == "lm_head") {
        return Err(Error::new(
            Kind::Adapter,
            "an adapter on the output embedding is not supported",
        )
        .value(site.path.clone())
        .hint("leave `lm_head` out of target_modules"));
    }
    Ok(Target::Lora {
        settings: Box::new(settings),
        sites,
        from,
    })
}

/// With `init_from` the adapter's own settings hold; what the recipe wrote may repeat them, not contradict them.
fn contradictions(lora: &recipe::Lora, held: &LoraConfig) -> Result<()> {
    let written = &lora.config;
    let differs = |key: &str| match key {
        "r" => (written.r != held.r).then(|| held.r.to_string()),
        "lora_alpha" => {
            (written.lora_alpha != held.lora_alpha).then(|| held.lora_alpha.to_string())
        }
        "use_rslora" => {
            (written.use_rslora != held.use_rslora).then(|| held.use_rslora.to_string())
        }
        "target_modules" => (written.target_modules != held.target_modules)
            .then(|| format!("{:?}", held.target_modules)),
        "rank_pattern" => {
            (written.rank_pattern != held.rank_pattern).then(|| format!("{:?}", held.rank_pattern))
        }
        "alpha_pattern" => (written.alpha_pattern != held.alpha_pattern)
            .then(|| format!("{:?}", held.alpha_pattern)),
        _ => None,
    };
    let found = lora
        .written
        .iter()
        .find_map(|key| Some((key, differs(key)?)));
    let Some((key, value)) = found else {
        return Ok(());
    };
    Err(Error::new(
        Kind::Recipe,
        format!("`adapter.{key}` contradicts the adapter that `init_from` continues"),
    )
    .at(format!("adapter.{key}"))
    .rule(format!("the adapter holds {value}"))
    .hint(format!("leave `{key}` out of [adapter]")))
}

pub(super) fn check_length(recipe: &Recipe, architecture: &Architecture) -> Result<()> {
    let (wanted, most) = (recipe.data.max_length, architecture.max_position_embeddings);
    if wanted <= most {
        return Ok(());
    }
    Err(Error::new(
        Kind::Recipe,
        "records may be longer than the model's positions",
    )
    .at("data.max_length")
    .value(wanted.to_string())
    .rule(format!("at most max_position_embeddings = {most}"))
    .hint(format!("write `max_length = {most}` in [data]")))
}

/// A run is played through step by step before it starts.
fn check_steps(settings: &train::Settings) -> Result<()> {
    match settings.steps > MOST_STEPS {
        false => Ok(()),
        true => Err(
            Error::new(Kind::Recipe, "these are more steps than a run can have")
                .at(if settings.by_epochs {
                    "train.epochs"
                } else {
                    "train.steps"
                })
                .value(format!("{} steps", settings.steps))
                .rule(format!("at most {MOST_STEPS}"))
                .hint("write fewer: a budget in [budget] ends a run earlier than its steps"),
        ),
    }
}

/// Training and validation records, and where they came from.
fn datasets(
    recipe: &Recipe,
    tokenizer: &Tokenizer,
    progress: &dyn Progress,
) -> Result<(Dataset, Option<Dataset>, Vec<String>)> {
    let options = data_options(&recipe.data);
    let cache = cache_root().ok().map(|root| root.join("tokens"));
    let load = |source: &DataSource| -> Result<(Dataset, String)> {
        let (paths, name) = locate(source, progress)?;
        Ok((
            data::load(&paths, &options, tokenizer, cache.as_deref())?,
            name,
        ))
    };
    let (train, name) = load(&recipe.data.train)?;
    match &recipe.data.validation {
        Validation::None => Ok((train, None, vec![name])),
        Validation::Source(source) => {
            let (validation, other) = load(source)?;
            Ok((train, Some(validation), vec![name, other]))
        }
        Validation::Fraction(fraction) => {
            let (train, validation) = train.split(*fraction, recipe.seed)?;
            Ok((train, Some(validation), vec![name]))
        }
    }
}

fn locate(source: &DataSource, progress: &dyn Progress) -> Result<(Vec<PathBuf>, String)> {
    match source {
        DataSource::File(path) => Ok((vec![path.clone()], path.display().to_string())),
        DataSource::Hub { id, split } => {
            let files = Hub::new(HubSettings::from_env()?)?.dataset(id, "main", split, progress)?;
            Ok((files.files, format!("{id}:{split}@{}", files.commit)))
        }
    }
}

fn note_counts(which: &str, set: &Dataset, warnings: &mut Vec<String>) {
    let counts = &set.counts;
    let mut note = |count: u64, what: &str| {
        if count > 0 {
            warnings.push(format!(
                "{count} of {} {which} records {what}",
                counts.records
            ));
        }
    };
    note(
        counts.truncated,
        "are longer than max_length and were cut at the end",
    );
    note(counts.dropped, "have no loss token left and were dropped");
    note(counts.skipped, "could not be read and were skipped");
    note(counts.glued, "have no space between prompt and completion");
    if !set.eos_trained {
        warnings.push(format!(
            "no {which} record ends with the end-of-text token: the model will not learn to stop"
        ));
    }
}

/// Tokens of the largest micro-batch among the first epoch's steps and the evaluation.
fn longest_batch(sampler: &Sampler, validation: &[MicroBatch]) -> usize {
    const LOOKED_AT: u64 = 2000;
    let steps = 0..sampler.steps_per_epoch().min(LOOKED_AT);
    let trained = steps
        .flat_map(|step| sampler.step_shape(step))
        .map(|shape| shape.tokens());
    trained
        .chain(validation.iter().map(|batch| batch.tokens.len()))
        .max()
        .unwrap_or(0)
}

/// A baseline trains every weight after the run, in the run's own way with activations: it must fit in memory too. The recipe's
/// `activation_checkpointing` is resolved.
fn check_measured_baselines(
    recipe: &Recipe,
    architecture: &Architecture,
    tokens: usize,
) -> Result<()> {
    if measured_kinds(recipe).next().is_none() {
        return Ok(());
    }
    let shape = ModelShape::fully_trained(architecture, recipe.model.dtype);
    let fitted = recompute(
        recipe,
        &shape,
        Target::All.parameters(architecture),
        tokens,
        &mut Vec::new(),
    );
    fitted
        .map(|_| ())
        .map_err(|e| e.at("[baseline]: a measured baseline trains every weight"))
}

/// In which blocks activations are recomputed (`auto`: in as few as memory allows), and the memory forecast; refused where it does not fit.
pub(super) fn recompute(
    recipe: &Recipe,
    shape: &ModelShape,
    trained: usize,
    tokens: usize,
    warnings: &mut Vec<String>,
) -> Result<(Recompute, MemoryForecast)> {
    let (free, walked) = (free_memory(), shape.backward_blocks());
    let chosen = match recipe.train.activation_checkpointing {
        Checkpointing::Always => Recompute::ALL,
        Checkpointing::Never => Recompute::NONE,
        Checkpointing::Blocks(blocks) if blocks > walked => {
            return Err(too_many_blocks(blocks, walked));
        }
        Checkpointing::Blocks(blocks) => Recompute::lowest(blocks),
        Checkpointing::Auto => free.map_or(Recompute::NONE, |free| {
            least_recompute(shape, trained as u64, tokens, free)
        }),
    };
    if recipe.train.activation_checkpointing == Checkpointing::Auto && chosen != Recompute::NONE {
        let blocks = chosen.count(walked);
        warnings.push(format!("not all activations fit in memory: those of {blocks} of {walked} blocks are computed again"));
    }
    let memory = forecast_memory(shape, trained as u64, tokens, chosen);
    match free.filter(|free| memory.peak() > *free) {
        None => Ok((chosen, memory)),
        Some(free) => Err(Error::new(Kind::Resources, "this run does not fit in memory")
            .value(format!("{} needed, {free} free", memory.peak()))
            .hint("lower `micro_batch_size` or `max_length`, use `dtype = \"bf16\"`, or write `activation_checkpointing = \"always\"`")),
    }
}

/// What a recipe says instead of `auto`.
fn resolved(recompute: Recompute, walked: usize) -> Checkpointing {
    match recompute.count(walked) {
        0 => Checkpointing::Never,
        blocks if blocks == walked => Checkpointing::Always,
        blocks => Checkpointing::Blocks(blocks),
    }
}

fn too_many_blocks(blocks: usize, walked: usize) -> Error {
    Error::new(
        Kind::Recipe,
        "activations cannot be computed again in more blocks than the backward pass walks",
    )
    .at("train.activation_checkpointing")
    .value(blocks.to_string())
    .rule(format!(
        "at most {walked}, the blocks from the lowest trained layer up"
    ))
    .hint("write `activation_checkpointing = \"always\"` for all of them")
}

/// Refuses a run into `out` where its disk cannot hold the checkpoints: its own, and that of a baseline that is trained after it.
pub(super) fn check_disk(prepared: &Prepared, out: &Path) -> Result<()> {
    let (recipe, of) = (&prepared.recipe, |trained: usize, keep: usize| {
        (checkpoint_bytes(trained) * (keep + 2)) as u64
    });
    let baseline = measured_kinds(recipe)
        .next()
        .map_or(0, |_| of(Target::All.parameters(&prepared.architecture), 1));
    let disk = Bytes(of(prepared.trained(), recipe.train.save_total_limit) + baseline);
    match free_disk(out).filter(|space| *space < disk) {
        None => Ok(()),
        Some(space) => Err(Error::new(Kind::Resources, "the disk has no room for the checkpoints")
            .at(out.display().to_string())
            .value(format!("{disk} needed, {space} free"))
            .hint("free some space, lower `save_total_limit` in [train], or choose another disk with `--out`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_written_as_what_it_became() {
        let of = |blocks: usize| resolved(Recompute::lowest(blocks), 22);
        assert_eq!(
            [of(0), of(1), of(21)],
            [
                Checkpointing::Never,
                Checkpointing::Blocks(1),
                Checkpointing::Blocks(21)
            ]
        );
        assert_eq!(
            [of(22), resolved(Recompute::ALL, 22)],
            [Checkpointing::Always; 2]
        );
    }
}
