//! What other ways to the same model would have cost, counted on the same device.

use serde_json::Value;

use super::prepare::Prepared;
use super::trainee::base_name;
use crate::energy::baseline::{BaselineKind, Label, Shape};
use crate::energy::{Baseline, Charge, Parts, baseline};
use crate::error::Result;
use crate::model::ModelShape;
use crate::ops::adamw_cost;
use crate::recipe::{Compared, Init};
use crate::units::{Flops, Joules};
use crate::work::Work;

/// What a run spent, for its baselines to be held against.
pub(super) struct Run<'a> {
    /// On the meter that decides.
    pub(super) spent: Joules,
    /// That meter over the counted one.
    pub(super) metered_over_counted: f64,
    /// What the counted energy is made of.
    pub(super) parts: &'a Parts,
}

/// Full fine-tuning over the same `steps` and `evaluations`, and pretraining; each on the meter of `run` and against it.
pub(super) fn baselines(
    prepared: &Prepared,
    steps: u64,
    evaluations: usize,
    run: &Run<'_>,
) -> Result<Vec<Baseline>> {
    let mut all = Vec::new();
    if !prepared.whole_model() && prepared.recipe.baseline.full_fine_tuning != Compared::Off {
        all.push(full_fine_tuning(prepared, steps, evaluations)?);
    }
    if prepared.recipe.baseline.from_scratch != Compared::Off {
        all.push(pretraining(prepared)?);
    }
    let held = |baseline: Baseline| {
        let metered = if run.metered_over_counted == 1.0 {
            baseline
        } else {
            baseline.metered(run.metered_over_counted)
        };
        metered.against(run.spent, Some(run.parts))
    };
    Ok(all.into_iter().map(held).collect())
}

/// The same batches with every weight trained.
fn full_fine_tuning(prepared: &Prepared, steps: u64, evaluations: usize) -> Result<Baseline> {
    let shape = ModelShape::fully_trained(&prepared.architecture, prepared.recipe.model.dtype)?;
    let parameters = prepared.architecture.parameters() as usize;
    let recompute = prepared.settings.recompute;
    let step_work = |step: u64| -> Work {
        let batches = prepared.sampler.step_shape(step);
        batches
            .iter()
            .map(|batch| shape.training(&batch.segments, batch.loss_tokens, recompute))
            .sum::<Work>()
            + adamw_cost(parameters)
    };
    let trained: Charge = (0..steps)
        .map(|step| prepared.profile.charge(&step_work(step)))
        .sum();
    let evaluation: Work = prepared
        .validation_batches
        .iter()
        .map(|batch| batch.shape())
        .map(|batch| shape.evaluation(&batch.segments, batch.loss_tokens))
        .sum();
    let evaluated: Charge =
        std::iter::repeat_n(prepared.profile.charge(&evaluation), evaluations).sum();
    let total = trained + evaluated;
    let (flops, energy, rates) = (
        Flops(total.flops as f64),
        total.energy.joules(),
        prepared.budget.rates(),
    );
    let source = "counted: the same batches and evaluations, every weight trained";
    let mut baseline = Baseline::known(
        BaselineKind::FullFineTuning,
        Label::Counted,
        flops,
        energy,
        rates,
        source,
    );
    baseline.parts = Some(total.parts());
    baseline.assumptions = vec![
        format!(
            "{steps} steps on the same records, the same device ({})",
            prepared.profile.name
        ),
        "as many steps as this run; full fine-tuning may need fewer or more to the same loss"
            .to_string(),
    ];
    Ok(baseline)
}

/// What training the base model cost: its published token count, its own configuration's, or 20 tokens a parameter.
fn pretraining(prepared: &Prepared) -> Result<Baseline> {
    let architecture = &prepared.architecture;
    let tokens = pretraining_tokens(prepared)?;
    let shape = Shape {
        layers: architecture.num_hidden_layers as u64,
        attention_size: (architecture.attention.heads * architecture.attention.head_dim) as u64,
        sequence: prepared.recipe.data.max_length as u64,
    };
    let (parameters, rates) = (architecture.parameters() as f64, prepared.budget.rates());
    let name = base_name(&prepared.recipe.model.id);
    let mut baseline = baseline::pretraining(
        &name,
        parameters,
        tokens,
        Some(shape),
        &prepared.profile,
        rates,
    );
    if prepared.recipe.model.init == Init::Random {
        baseline
            .assumptions
            .push("this run itself trains from random weights".into());
    }
    Ok(baseline)
}

/// The token count that a model trained by wattune carries in its configuration.
fn pretraining_tokens(prepared: &Prepared) -> Result<Option<f64>> {
    let config: Option<Value> =
        serde_json::from_str(&super::read_text(&prepared.files.config)?).ok();
    Ok(config
        .as_ref()
        .and_then(|config| config.get("pretraining_tokens"))
        .and_then(Value::as_f64))
}
