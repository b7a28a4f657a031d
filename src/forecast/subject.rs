//! The parts of a prepared run that its cost depends on.

use crate::adapter::decomposition::initial_work;
use crate::adapter::{Adaptation, LoadedAdapter, LoraConfig};
use crate::data::{Counts, MicroBatch, Sampler};
use crate::energy::{Budget, Grid, Interval, Phase, Profile, Rates, carbon};
use crate::model::{Architecture, MemoryForecast, ModelShape};
use crate::recipe::{ModelId, Recipe};
use crate::train::{Settings, StepCosts};
use crate::units::{GramsCo2e, Joules};
use crate::work::{Precision, Work};

/// What is trained.
pub enum Target {
    /// LoRA adapters on these layers.
    Lora {
        /// The recipe's settings, or those of the adapter that `init_from` names.
        settings: Box<LoraConfig>,
        /// What they train.
        adaptation: Adaptation,
        /// The adapter that `init_from` names.
        from: Option<Box<LoadedAdapter>>,
    },
    /// Every weight.
    All,
}

impl Target {
    /// Trainable parameter count.
    pub fn parameters(&self, architecture: &Architecture) -> usize {
        match self {
            Target::Lora { adaptation, .. } => adaptation.parameters(),
            Target::All => architecture.parameters() as usize,
        }
    }

    /// Whether every weight is trained, so that the result is a model rather than an adapter.
    pub fn is_whole_model(&self) -> bool {
        matches!(self, Target::All)
    }
}

/// A prepared run, as far as forecasts need it.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// With every `auto` resolved.
    pub recipe: &'a Recipe,
    /// Names the resolved recipe, the model's commit and the data.
    pub digest: &'a str,
    /// Read from config.json.
    pub architecture: &'a Architecture,
    /// The token count that config.json carries where wattune trained the model.
    pub pretraining_tokens: Option<f64>,
    /// What is trained.
    pub target: &'a Target,
    /// What a step's work depends on.
    pub shape: &'a ModelShape,
    /// The training loop's settings.
    pub settings: &'a Settings,
    /// Training batches.
    pub sampler: &'a Sampler,
    /// Validation batches.
    pub validation: &'a [MicroBatch],
    /// Counts of the training records.
    pub counts: &'a Counts,
    /// The device that is charged.
    pub profile: &'a Profile,
    /// The electricity grid.
    pub grid: &'a Grid,
    /// The limits and rates.
    pub budget: &'a Budget,
    /// Tokens of the largest micro-batch.
    pub longest_batch: usize,
    /// The memory forecast.
    pub memory: &'a MemoryForecast,
    /// The computing device, where `profile` is of another one.
    pub machine: Option<&'a Profile>,
}

impl<'a> Subject<'a> {
    /// Work of each activity if `trained` parameters of `shape` were trained with `settings`.
    pub fn step_costs<'s>(
        &self,
        shape: &'s ModelShape,
        trained: usize,
        settings: &'s Settings,
        ending: Vec<(Phase, Work)>,
    ) -> StepCosts<'s>
    where
        'a: 's,
    {
        StepCosts::new(
            shape,
            self.sampler,
            self.validation,
            trained,
            settings,
            ending,
        )
    }

    /// Work of loading the model and of its adapter's initialisation.
    pub fn load_work(&self) -> Work {
        let load = load_work(self.architecture, self.precision());
        let Target::Lora { adaptation, .. } = self.target else {
            return load;
        };
        let sites = adaptation.sites.iter();
        load + sites.map(|site| initial_work(adaptation.init, site)).sum()
    }

    /// Trainable parameter count.
    pub fn trained(&self) -> usize {
        self.target.parameters(self.architecture)
    }

    /// Compute dtype of matrix products.
    pub fn precision(&self) -> Precision {
        self.recipe.model.dtype
    }
}

/// Greenhouse gas of `energy` at the rates' PUE, between the grid's lowest and highest intensity.
pub fn emissions(energy: Interval<Joules>, grid: &Grid, rates: &Rates) -> Interval<GramsCo2e> {
    let intensity = Interval {
        low: grid.low.unwrap_or(rates.grid),
        central: rates.grid,
        high: grid.high.unwrap_or(rates.grid),
    };
    energy.with(intensity, |energy, intensity| {
        carbon(energy, rates.pue, intensity)
    })
}

/// Work of loading a model: every weight read as f32 and written once in `precision`.
pub fn load_work(architecture: &Architecture, precision: Precision) -> Work {
    Work::file((architecture.parameters() * (4 + precision.size())) as usize)
}

/// The base model's name in adapter files, reports and cards.
pub fn model_name(id: &ModelId) -> String {
    match id {
        ModelId::Hub(id) => id.clone(),
        ModelId::Directory(dir) => dir.display().to_string(),
        ModelId::Embedded(name) => format!("embedded:{name}"),
    }
}
