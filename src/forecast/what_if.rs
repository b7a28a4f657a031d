//! What-if table of the plan: the cost of the recipe, and of each alternative rank, target, length, dtype and device.
//!
//! Each row is counted for a few sampled steps by the functions that the plan sums (`ModelShape::training`, `adamw_cost`,
//! `Profile::charge`, `forecast_memory`) and scaled to the plan's tokens. Evaluations and saves are left out.

mod row_length;

use serde::Serialize;

use self::row_length::regrouped;
use super::subject::{Subject, Target};
use crate::adapter::targets::{check_ranks, select_matching};
use crate::adapter::{Adaptation, LoraConfig, Site, Targets};
use crate::data::BatchShape;
use crate::energy::{Charge, Profile};
use crate::error::Result;
use crate::model::{ModelShape, Recompute, forecast_memory};
use crate::ops::adamw_cost;
use crate::recipe::Adapter;
use crate::units::{Bytes, Joules, Seconds};
use crate::work::{Precision, Work};

/// Steps sampled evenly over the run; a shorter run is counted in full.
const SAMPLED: u64 = 4;
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

/// One row: the cost of training with one choice changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// `recipe`, `rank`, `targets`, `layers`, `max_length`, `activation_checkpointing`, `dtype`, `trained` or `device`.
    pub kind: &'static str,
    /// The choice in words.
    pub choice: String,
    /// Arguments of `--set`; empty where no key expresses the choice.
    pub set: Vec<String>,
    /// Whether this is the recipe unchanged.
    pub own: bool,
    /// Trainable parameter count.
    pub trainable_parameters: usize,
    /// Mean energy of a step on the counted meter.
    pub step_j: Joules,
    /// Energy of training on as many tokens as the plan does.
    pub same_tokens_j: Joules,
    /// FLOPs of the same.
    pub same_tokens_flops: f64,
    /// Roofline time of the same: as tuned code takes it.
    pub same_tokens_s: Seconds,
    /// Peak memory.
    pub peak_bytes: Bytes,
    /// `same_tokens_j` over the recipe's.
    pub ratio: f64,
}

/// One configuration to count: everything that a row's figures depend on.
#[derive(Clone)]
struct Variant {
    shape: ModelShape,
    trained: usize,
    recompute: Recompute,
    /// The sampled steps' micro-batches.
    steps: Vec<Vec<BatchShape>>,
    /// Tokens of the largest micro-batch.
    longest_batch: usize,
    /// Steps over the plan's tokens.
    count: f64,
}

impl Variant {
    /// The recipe's own, in a run of `steps` steps.
    fn of_recipe(subject: &Subject<'_>, steps: u64) -> Self {
        let steps = steps.max(1);
        let samples = steps.min(SAMPLED);
        Self {
            shape: subject.shape.clone(),
            trained: subject.trained(),
            recompute: subject.settings.recompute,
            steps: (0..samples)
                .map(|sample| subject.sampler.step_shape(sample * steps / samples))
                .collect(),
            longest_batch: subject.longest_batch,
            count: steps as f64,
        }
    }

    fn work(&self, step: &[BatchShape]) -> Work {
        step.iter()
            .map(|batch| {
                self.shape
                    .training(&batch.segments, batch.loss_tokens, self.recompute)
            })
            .sum::<Work>()
            + adamw_cost(self.trained)
    }

    fn charge(&self, profile: &Profile) -> Charge {
        self.steps
            .iter()
            .map(|step| profile.charge(&self.work(step)))
            .sum()
    }
}

/// Energy of `steps` training steps on the computing device, over that on the run's profile; `None` where they are the same.
pub fn machine_over_profile(subject: &Subject<'_>, steps: u64) -> Option<f64> {
    let recipe = Variant::of_recipe(subject, steps);
    let joules = |profile| recipe.charge(profile).energy.joules();
    Some(joules(subject.machine?) / joules(subject.profile))
}

/// Collects the rows.
struct SensitivityTable<'a> {
    subject: &'a Subject<'a>,
    recipe: Variant,
    /// The charge of the recipe's sampled steps.
    sampled: Charge,
    /// The charge of all the plan's training steps.
    planned: Charge,
    rows: Vec<Choice>,
}

/// The recipe's row, then one for each alternative. `planned` is the charge of the plan's `count` training steps; one step
/// stands for a plan without steps.
pub(super) fn what_if(subject: &Subject<'_>, count: u64, planned: &Charge) -> Result<Vec<Choice>> {
    let recipe = Variant::of_recipe(subject, count);
    let sampled = recipe.charge(subject.profile);
    let planned = if count == 0 { &sampled } else { planned };
    let mut table = SensitivityTable {
        subject,
        planned: planned.clone(),
        sampled,
        recipe,
        rows: Vec::new(),
    };
    table.add("recipe", "this recipe", Vec::new(), &table.recipe.clone());
    table.rows[0].own = true;
    // An adapter that is continued keeps its settings.
    if let Target::Lora {
        settings,
        from: None,
        ..
    } = subject.target
    {
        table.ranks(settings)?;
        table.targets(settings)?;
        table.upper_layers(settings)?;
    }
    table.lengths();
    table.checkpointing();
    table.precisions()?;
    table.every_weight()?;
    table.devices()?;
    Ok(table.rows)
}

impl SensitivityTable<'_> {
    fn add(
        &mut self,
        kind: &'static str,
        choice: impl Into<String>,
        set: Vec<String>,
        variant: &Variant,
    ) {
        let charge = variant.charge(self.subject.profile);
        self.add_charged(kind, choice, set, variant, &charge);
    }

    fn add_charged(
        &mut self,
        kind: &'static str,
        choice: impl Into<String>,
        set: Vec<String>,
        variant: &Variant,
        charge: &Charge,
    ) {
        let ratio = charge.energy.joules() / self.sampled.energy.joules();
        let same_tokens_j = self.planned.energy.joules() * ratio;
        let flops = charge.flops as f64 / self.sampled.flops as f64;
        let memory = forecast_memory(
            &variant.shape,
            variant.trained as u64,
            variant.longest_batch,
            variant.recompute,
        );
        self.rows.push(Choice {
            kind,
            choice: choice.into(),
            set,
            own: false,
            trainable_parameters: variant.trained,
            step_j: same_tokens_j / variant.count,
            same_tokens_j,
            same_tokens_flops: self.planned.flops as f64 * flops,
            same_tokens_s: self.planned.time * (charge.time / self.sampled.time),
            peak_bytes: memory.peak(),
            ratio,
        });
    }

    fn adaptation(&self, settings: &LoraConfig) -> Result<Adaptation> {
        let layout = self.subject.architecture.layout();
        let sites = select_matching(&layout.modules, &layout.output_embedding, settings)?;
        Ok(Adaptation::new(&layout, settings, sites))
    }

    fn with_adapter(&self, adaptation: &Adaptation, precision: Precision) -> Result<Variant> {
        let dropout = matches!(&self.subject.recipe.adapter, Adapter::Lora(lora) if lora.config.lora_dropout > 0.0);
        let architecture = self.subject.architecture;
        Ok(Variant {
            shape: ModelShape::with_adapters(architecture, adaptation, dropout, precision),
            trained: adaptation.parameters(),
            ..self.recipe.clone()
        })
    }

    fn every_weight_in(&self, precision: Precision) -> Result<Variant> {
        let architecture = self.subject.architecture;
        Ok(Variant {
            shape: ModelShape::fully_trained(architecture, precision),
            trained: architecture.parameters() as usize,
            ..self.recipe.clone()
        })
    }

    /// Adds an adapter with other settings, unless they select no layer or too high a rank. A `rank_pattern` would override the
    /// key, so it is dropped and no `--set` is given.
    fn add_adapter(
        &mut self,
        kind: &'static str,
        choice: &str,
        set: String,
        settings: LoraConfig,
    ) -> Result<()> {
        let set = if settings.rank_pattern.is_empty() {
            vec![set]
        } else {
            Vec::new()
        };
        let settings = LoraConfig {
            rank_pattern: Vec::new(),
            ..settings
        };
        let adaptation = self.adaptation(&settings)?;
        let sites = &adaptation.sites;
        if sites.is_empty() || check_ranks(&settings, sites).is_err() {
            return Ok(());
        }
        let variant = self.with_adapter(&adaptation, self.subject.precision())?;
        self.add(kind, choice, set, &variant);
        Ok(())
    }

    fn ranks(&mut self, settings: &LoraConfig) -> Result<()> {
        for r in RANKS {
            if r != settings.r || !settings.rank_pattern.is_empty() {
                let other = LoraConfig {
                    r,
                    ..settings.clone()
                };
                self.add_adapter(
                    "rank",
                    &format!("rank {r}"),
                    format!("adapter.r={r}"),
                    other,
                )?;
            }
        }
        Ok(())
    }

    fn targets(&mut self, settings: &LoraConfig) -> Result<()> {
        let named = |names: &[&str]| {
            let targets = Targets::Names(names.iter().map(|name| name.to_string()).collect());
            (targets, toml_list(names))
        };
        let all = (Targets::AllLinear, "all-linear".to_string());
        let names = &self.subject.architecture.names.linears;
        let target = |name: &&'static str| names.target(name);
        let qkv: Vec<&str> = names.qkv.iter().map(target).collect();
        let mut choices = Vec::new();
        if let [q, _, v] = qkv.as_slice() {
            choices.push((format!("targets {q}, {v}"), named(&[q, v])));
        }
        let attention = [&qkv[..], &[names.target(names.o)]].concat();
        choices.push(("attention only".to_string(), named(&attention)));
        choices.push(("targets all-linear".to_string(), all));
        let paths = |sites: Vec<Site>| sites.into_iter().map(|site| site.path);
        for (choice, (targets, value)) in choices {
            // PEFT refuses a list of layers with "all-linear".
            if targets == Targets::AllLinear && settings.layers_to_transform.is_some() {
                continue;
            }
            let other = LoraConfig {
                target_modules: targets,
                ..settings.clone()
            };
            if !paths(self.adaptation(&other)?.sites).eq(paths(self.adaptation(settings)?.sites)) {
                self.add_adapter(
                    "targets",
                    &choice,
                    format!("adapter.target_modules={value}"),
                    other,
                )?;
            }
        }
        Ok(())
    }

    /// Adapters on the upper half of the layers: the backward pass ends there.
    fn upper_layers(&mut self, settings: &LoraConfig) -> Result<()> {
        let layers = self.subject.architecture.num_hidden_layers;
        if settings.layers_to_transform.is_some() || layers < 2 {
            return Ok(());
        }
        let upper: Vec<usize> = (layers / 2..layers).collect();
        let names = &self.subject.architecture.names;
        let layer_of = |site: &Site| names.layer_of(&site.path);
        let mut adaptation = self.adaptation(settings)?;
        let sites = &mut adaptation.sites;
        sites.retain(|site| layer_of(site).is_some_and(|layer| upper.contains(&layer)));
        if sites.is_empty() {
            return Ok(());
        }
        let layers_key = format!("adapter.layers_to_transform={upper:?}");
        let set = match &settings.target_modules {
            Targets::Names(_) => vec![layers_key],
            // PEFT wants names beside a list of layers.
            Targets::AllLinear => {
                let linears = &names.linears;
                let modules = self.subject.architecture.modules();
                let exists = |name: &&str| modules.iter().any(|module| module.path.ends_with(name));
                let present = linears.iter().filter(exists);
                let targets: Vec<&str> = present.map(|name| linears.target(name)).collect();
                let targets = format!("adapter.target_modules={}", toml_list(&targets));
                vec![targets, layers_key]
            }
            Targets::Regex(_) => Vec::new(),
        };
        let choice = format!("layers {} to {} of {layers}", upper[0], layers - 1);
        let variant = self.with_adapter(&adaptation, self.subject.precision())?;
        self.add("layers", choice, set, &variant);
        Ok(())
    }

    /// Half and twice the length, unless no row changes.
    fn lengths(&mut self) {
        let recipe = self.subject.recipe;
        let length = recipe.data.max_length;
        let rows = recipe.data.packing.then_some(recipe.train.micro_batch_size);
        let most = self.subject.architecture.max_position_embeddings;
        for other in [length / 2, length * 2] {
            if !(2..=most).contains(&other) {
                continue;
            }
            let Some(batches) = regrouped(&self.recipe.steps, length, other, rows) else {
                continue;
            };
            let accumulated = self.recipe.steps.first().map_or(1, Vec::len).max(1);
            let steps: Vec<_> = batches.chunks(accumulated).map(<[_]>::to_vec).collect();
            let variant = Variant {
                // The windows of one record stay in its micro-batch if rows are not packed.
                longest_batch: if recipe.data.packing {
                    self.recipe.longest_batch * other / length
                } else {
                    self.recipe.longest_batch
                },
                count: self.recipe.count * steps.len() as f64 / self.recipe.steps.len() as f64,
                steps,
                ..self.recipe.clone()
            };
            self.add(
                "max_length",
                format!("max_length {other}"),
                vec![format!("data.max_length={other}")],
                &variant,
            );
        }
    }

    fn checkpointing(&mut self) {
        let blocks = self.recipe.shape.backward_blocks();
        let own = self.recipe.recompute.count(blocks);
        let choices = [
            (Recompute::NONE, "no activation checkpointing", "never"),
            (Recompute::ALL, "activation checkpointing", "always"),
        ];
        for (recompute, choice, value) in choices {
            if recompute.count(blocks) != own {
                let variant = Variant {
                    recompute,
                    ..self.recipe.clone()
                };
                let set = vec![format!("train.activation_checkpointing={value}")];
                self.add("activation_checkpointing", choice, set, &variant);
            }
        }
    }

    fn precisions(&mut self) -> Result<()> {
        for precision in [Precision::F32, Precision::Bf16] {
            if precision == self.subject.precision() {
                continue;
            }
            let variant = match self.subject.target {
                Target::Lora { adaptation, .. } => self.with_adapter(adaptation, precision)?,
                Target::All => self.every_weight_in(precision)?,
            };
            let dtype = precision.as_str();
            self.add(
                "dtype",
                format!("dtype {dtype}"),
                vec![format!("model.dtype={dtype}")],
                &variant,
            );
        }
        Ok(())
    }

    /// Full fine-tuning. A recipe with LoRA keys refuses the one key that would say it, so no `--set` is given.
    fn every_weight(&mut self) -> Result<()> {
        if !self.subject.target.is_whole_model() {
            let variant = self.every_weight_in(self.subject.precision())?;
            self.add("trained", "every weight trained", Vec::new(), &variant);
        }
        Ok(())
    }

    /// The same work on other devices, in the same precision.
    fn devices(&mut self) -> Result<()> {
        let own = self.subject.profile.name.split('@').next();
        let recipe = self.recipe.clone();
        for name in DEVICES {
            if Some(name) != own {
                let charge = recipe.charge(&Profile::named(name)?);
                let set = vec![format!("energy.device={name}")];
                self.add_charged("device", format!("device {name}"), set, &recipe, &charge);
            }
        }
        Ok(())
    }
}

/// `["a","b"]`, as `--set` takes a list.
fn toml_list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    format!("[{}]", quoted.join(","))
}
