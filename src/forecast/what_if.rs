//! What each choice a person could make would cost, beside the recipe's own.
//!
//! Takes a prepared recipe and its forecast, returns rows: joules a step, joules for the same tokens, peak memory, and how many times the
//! recipe's own. Every row comes from the functions that the forecast itself sums, for a few of its steps: `ModelShape::training`,
//! `adamw_cost`, `Profile::charge`, `forecast_memory`. Evaluations and saves are left out. Trains nothing, reads no weights.

mod row_length;

use serde::Serialize;

use self::row_length::regrouped;
use super::subject::{Subject, Target};
use crate::adapter::{LoraSettings, Site, Targets, select};
use crate::data::BatchShape;
use crate::energy::{Charge, Profile};
use crate::error::Result;
use crate::model::{ModelShape, Recompute, forecast_memory};
use crate::ops::adamw_cost;
use crate::recipe::Adapter;
use crate::units::{Bytes, Joules, Seconds};
use crate::work::{Precision, Work};

/// Steps that stand for all, evenly spread over the run; of a shorter run each one.
const SAMPLED: u64 = 4;
/// Ranks that people choose.
const RANKS: [usize; 5] = [4, 8, 16, 32, 64];
/// Devices from a desk to a data centre.
const DEVICES: [&str; 7] = [
    "raspberry-pi-5",
    "generic-laptop",
    "apple-m4",
    "nvidia-t4",
    "nvidia-l4",
    "nvidia-rtx-4090",
    "nvidia-h100-sxm5-80gb",
];

/// One row: what training would cost under one choice, all else as the recipe has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// What is chosen: `recipe`, `rank`, `targets`, `layers`, `max_length`, `activation_checkpointing`, `dtype`, `trained` or `device`.
    pub kind: &'static str,
    /// The choice in words.
    pub choice: String,
    /// What to give to `--set`; empty where one key does not say it.
    pub set: Vec<String>,
    /// Whether it is the recipe as it stands.
    pub own: bool,
    /// Numbers that are trained.
    pub trainable_parameters: usize,
    /// Mean energy of a step on the counted meter.
    pub step_j: Joules,
    /// Energy of the steps that train on as many tokens as the plan does.
    pub same_tokens_j: Joules,
    /// FLOPs of the same.
    pub same_tokens_flops: f64,
    /// Roofline time of the same: at least so long.
    pub same_tokens_s: Seconds,
    /// Memory at the peak.
    pub peak_bytes: Bytes,
    /// `same_tokens_j` over the recipe's own.
    pub ratio: f64,
}

/// What is chosen, in words and as `--set` takes it.
struct Label {
    kind: &'static str,
    choice: String,
    set: Vec<String>,
}

fn label(
    kind: &'static str,
    choice: impl Into<String>,
    set: impl IntoIterator<Item = String>,
) -> Label {
    Label {
        kind,
        choice: choice.into(),
        set: set.into_iter().collect(),
    }
}

/// What a step's cost depends on beside its batches.
#[derive(Clone)]
struct Setup {
    shape: ModelShape,
    trained: usize,
    recompute: Recompute,
}

impl Setup {
    fn work(&self, step: &[BatchShape]) -> Work {
        let of = |batch: &BatchShape| {
            self.shape
                .training(&batch.segments, batch.loss_tokens, self.recompute)
        };
        step.iter().map(of).sum::<Work>() + adamw_cost(self.trained)
    }
}

/// Makes rows against the recipe's own.
struct SensitivityTable<'a> {
    subject: &'a Subject<'a>,
    own: Setup,
    /// The sampled steps.
    steps: Vec<Vec<BatchShape>>,
    /// Their charge as the recipe stands.
    charge: Charge,
    /// What the plan counts for all its training steps.
    planned: Charge,
    /// Steps of the plan.
    count: u64,
}

/// The recipe's own row, then one for each choice that is not it. `planned` is the charge of the plan's `count` training steps; of a plan
/// that holds none, one step stands for it.
pub(super) fn what_if(subject: &Subject<'_>, count: u64, planned: &Charge) -> Result<Vec<Choice>> {
    let steps = sampled(subject, count.max(1));
    let own = Setup {
        shape: subject.shape.clone(),
        trained: subject.trained(),
        recompute: subject.settings.recompute,
    };
    let charge = charged(&own, &steps, subject.profile);
    let planned = if count == 0 {
        charge.clone()
    } else {
        planned.clone()
    };
    let table = SensitivityTable {
        subject,
        own,
        steps,
        charge,
        planned,
        count: count.max(1),
    };
    let mut rows = vec![table.row(label("recipe", "this recipe", None), &table.own)];
    rows[0].own = true;
    rows.extend(table.ranks()?);
    rows.extend(table.targets()?);
    rows.extend(table.upper_half()?);
    rows.extend(table.lengths());
    rows.extend(table.checkpointing());
    rows.extend(table.precisions()?);
    rows.extend(table.every_weight()?);
    rows.extend(table.devices()?);
    Ok(rows)
}

/// The batches of some steps of a run of `count`.
fn sampled(subject: &Subject<'_>, count: u64) -> Vec<Vec<BatchShape>> {
    let some = count.min(SAMPLED);
    (0..some)
        .map(|index| subject.sampler.step_shape(index * count / some))
        .collect()
}

fn charged(setup: &Setup, steps: &[Vec<BatchShape>], profile: &Profile) -> Charge {
    steps
        .iter()
        .map(|step| profile.charge(&setup.work(step)))
        .sum()
}

impl SensitivityTable<'_> {
    fn row(&self, label: Label, setup: &Setup) -> Choice {
        let charge = charged(setup, &self.steps, self.subject.profile);
        self.row_of(
            label,
            setup,
            &charge,
            self.subject.longest_batch,
            self.count as f64,
        )
    }

    /// A row from the `charge` of the sampled tokens, the `tokens` of its largest micro-batch and its number of `steps`.
    fn row_of(
        &self,
        label: Label,
        setup: &Setup,
        charge: &Charge,
        tokens: usize,
        steps: f64,
    ) -> Choice {
        let ratio = charge.energy.joules() / self.charge.energy.joules();
        let same_tokens_j = self.planned.energy.joules() * ratio;
        let trained = setup.trained;
        let memory = forecast_memory(&setup.shape, trained as u64, tokens, setup.recompute);
        Choice {
            kind: label.kind,
            choice: label.choice,
            set: label.set,
            own: false,
            trainable_parameters: trained,
            step_j: same_tokens_j / steps,
            same_tokens_j,
            same_tokens_flops: self.planned.flops as f64
                * (charge.flops as f64 / self.charge.flops as f64),
            same_tokens_s: self.planned.time * (charge.time / self.charge.time),
            peak_bytes: memory.peak(),
            ratio,
        }
    }

    /// The adapter's settings, where a person may still choose them: an adapter that is continued has its own.
    fn settings(&self) -> Option<&LoraSettings> {
        match self.subject.target {
            Target::Lora {
                settings,
                from: None,
                ..
            } => Some(settings),
            _ => None,
        }
    }

    fn dropout(&self) -> bool {
        matches!(&self.subject.recipe.adapter, Adapter::Lora(lora) if lora.lora_dropout > 0.0)
    }

    fn with_sites(&self, sites: &[Site]) -> Result<Setup> {
        let shape = ModelShape::with_adapters(
            self.subject.architecture,
            sites,
            self.dropout(),
            self.own.shape.precision(),
        )?;
        Ok(Setup {
            shape,
            trained: sites.iter().map(Site::parameters).sum(),
            ..self.own.clone()
        })
    }

    fn sites(&self, settings: &LoraSettings) -> Result<Vec<Site>> {
        select(&self.subject.architecture.modules(), "lm_head", settings)
    }

    fn ranks(&self) -> Result<Vec<Choice>> {
        let Some(settings) = self.settings() else {
            return Ok(Vec::new());
        };
        let other = RANKS
            .iter()
            .filter(|r| **r != settings.r || !settings.rank_pattern.is_empty());
        let row = |r: &usize| {
            let sites = self.sites(&LoraSettings {
                r: *r,
                rank_pattern: Vec::new(),
                ..settings.clone()
            })?;
            // A pattern would go on holding beside the key.
            let set = settings
                .rank_pattern
                .is_empty()
                .then(|| format!("adapter.r={r}"));
            Ok(self.row(
                label("rank", format!("rank {r}"), set),
                &self.with_sites(&sites)?,
            ))
        };
        other.map(row).collect()
    }

    fn targets(&self) -> Result<Vec<Choice>> {
        let Some(settings) = self.settings() else {
            return Ok(Vec::new());
        };
        let names =
            |names: &[&str]| Targets::Names(names.iter().map(|name| name.to_string()).collect());
        let attention = ["q_proj", "k_proj", "v_proj", "o_proj"];
        let all = [
            (
                "targets q_proj, v_proj",
                names(&["q_proj", "v_proj"]),
                listed(&["q_proj", "v_proj"]),
            ),
            (
                "targets the attention",
                names(&attention),
                listed(&attention),
            ),
            (
                "targets all-linear",
                Targets::AllLinear,
                "all-linear".to_string(),
            ),
        ];
        let own = self.sites(settings)?;
        let mut rows = Vec::new();
        for (choice, targets, value) in all {
            // A regex and a list of layers cannot stand together, nor "all-linear" and a list of layers.
            if targets == Targets::AllLinear && settings.layers_to_transform.is_some() {
                continue;
            }
            let sites = self.sites(&LoraSettings {
                targets,
                rank_pattern: Vec::new(),
                ..settings.clone()
            })?;
            let places = |sites: &[Site]| {
                sites
                    .iter()
                    .map(|site| site.path.clone())
                    .collect::<Vec<_>>()
            };
            if places(&sites) != places(&own) {
                let set = settings
                    .rank_pattern
                    .is_empty()
                    .then(|| format!("adapter.target_modules={value}"));
                rows.push(self.row(label("targets", choice, set), &self.with_sites(&sites)?));
            }
        }
        Ok(rows)
    }

    /// Adapters on the upper half of the layers alone: the backward pass ends there.
    fn upper_half(&self) -> Result<Vec<Choice>> {
        let (Some(settings), layers) =
            (self.settings(), self.subject.architecture.num_hidden_layers)
        else {
            return Ok(Vec::new());
        };
        if settings.layers_to_transform.is_some() || layers < 2 {
            return Ok(Vec::new());
        }
        let upper: Vec<usize> = (layers / 2..layers).collect();
        let in_upper = |site: &Site| {
            let index = site
                .path
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split('.').next()?.parse().ok());
            index.is_some_and(|index: usize| upper.contains(&index))
        };
        let sites: Vec<Site> = self.sites(settings)?.into_iter().filter(in_upper).collect();
        if sites.is_empty() {
            return Ok(Vec::new());
        }
        let numbers = format!("adapter.layers_to_transform={upper:?}");
        let set = match &settings.targets {
            Targets::Names(_) => vec![numbers],
            // PEFT wants names beside a list of layers.
            Targets::AllLinear => vec![
                format!("adapter.target_modules={}", listed(&LINEARS)),
                numbers,
            ],
            Targets::Regex(_) => Vec::new(),
        };
        let choice = format!("layers {} to {} of {layers}", upper[0], layers - 1);
        Ok(vec![self.row(
            label("layers", choice, set),
            &self.with_sites(&sites)?,
        )])
    }

    /// Half and twice the length, where that changes anything.
    fn lengths(&self) -> Vec<Choice> {
        let (data, rows) = (
            &self.subject.recipe.data,
            self.subject.recipe.train.micro_batch_size,
        );
        let most = self.subject.architecture.max_position_embeddings;
        let lengths = [data.max_length / 2, data.max_length * 2]
            .into_iter()
            .filter(|length| (2..=most).contains(length));
        let row = |length: usize| {
            let again = regrouped(
                &self.steps,
                data.max_length,
                length,
                data.packing.then_some(rows),
            )?;
            let accumulated = self.steps.first().map_or(1, Vec::len).max(1);
            let steps: Vec<Vec<BatchShape>> = again
                .chunks(accumulated)
                .map(<[BatchShape]>::to_vec)
                .collect();
            let charge = charged(&self.own, &steps, self.subject.profile);
            // Windows of one record stay in its micro-batch where rows are not packed.
            let longest = self.subject.longest_batch;
            let tokens = if data.packing {
                longest * length / data.max_length
            } else {
                longest
            };
            let count = self.count as f64 * steps.len() as f64 / self.steps.len() as f64;
            let label = label(
                "max_length",
                format!("max_length {length}"),
                [format!("data.max_length={length}")],
            );
            Some(self.row_of(label, &self.own, &charge, tokens, count))
        };
        lengths.filter_map(row).collect()
    }

    /// Every block's activations kept, and every block's computed again.
    fn checkpointing(&self) -> Vec<Choice> {
        let walked = self.own.shape.backward_blocks();
        let all = [
            (Recompute::NONE, "activations kept", "never"),
            (Recompute::ALL, "activations computed again", "always"),
        ];
        let others = all
            .into_iter()
            .filter(|(recompute, ..)| recompute.count(walked) != self.own.recompute.count(walked));
        let row = |(recompute, choice, word): (Recompute, &str, &str)| {
            let set = [format!("train.activation_checkpointing={word}")];
            self.row(
                label("activation_checkpointing", choice, set),
                &Setup {
                    recompute,
                    ..self.own.clone()
                },
            )
        };
        others.map(row).collect()
    }

    fn precisions(&self) -> Result<Vec<Choice>> {
        let others = [Precision::F32, Precision::Bf16]
            .into_iter()
            .filter(|precision| *precision != self.own.shape.precision());
        let row = |precision: Precision| {
            let word = precision.as_str();
            let architecture = self.subject.architecture;
            let shape = match self.subject.target {
                Target::Lora { sites, .. } => {
                    ModelShape::with_adapters(architecture, sites, self.dropout(), precision)?
                }
                Target::All => ModelShape::fully_trained(architecture, precision)?,
            };
            let setup = Setup {
                shape,
                ..self.own.clone()
            };
            Ok(self.row(
                label(
                    "dtype",
                    format!("dtype {word}"),
                    [format!("model.dtype={word}")],
                ),
                &setup,
            ))
        };
        others.map(row).collect()
    }

    /// No adapter: what PEFT calls full fine-tuning. A recipe that writes keys of LoRA refuses the one key that would say it.
    fn every_weight(&self) -> Result<Vec<Choice>> {
        if self.subject.target.is_whole_model() {
            return Ok(Vec::new());
        }
        let architecture = self.subject.architecture;
        let shape = ModelShape::fully_trained(architecture, self.own.shape.precision())?;
        let setup = Setup {
            shape,
            trained: architecture.parameters() as usize,
            ..self.own.clone()
        };
        Ok(vec![self.row(
            label("trained", "every weight trained", None),
            &setup,
        )])
    }

    /// The same work on other devices, in the same precision.
    fn devices(&self) -> Result<Vec<Choice>> {
        let own = self
            .subject
            .profile
            .name
            .split('@')
            .next()
            .unwrap_or_default();
        let works: Vec<Work> = self.steps.iter().map(|step| self.own.work(step)).collect();
        let row = |name: &str| {
            let profile = Profile::named(name)?;
            let charge: Charge = works.iter().map(|work| profile.charge(work)).sum();
            let label = label(
                "device",
                format!("device {name}"),
                [format!("energy.device={name}")],
            );
            Ok(self.row_of(
                label,
                &self.own,
                &charge,
                self.subject.longest_batch,
                self.count as f64,
            ))
        };
        DEVICES
            .into_iter()
            .filter(|name| *name != own)
            .map(row)
            .collect()
    }
}

/// The linear layers of a block, as a recipe names them.
const LINEARS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// `["a","b"]`, as `--set` takes a list.
fn listed(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    format!("[{}]", quoted.join(","))
}
