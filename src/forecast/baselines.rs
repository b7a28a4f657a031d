//! What other ways to the same model would have cost, counted on the same device.

use super::subject::{Subject, model_name};
use crate::energy::baseline::{BaselineKind, Label, Shape};
use crate::energy::{Baseline, Charge, EnergyBreakdown, baseline};
use crate::error::Result;
use crate::model::ModelShape;
use crate::ops::adamw_cost;
use crate::recipe::{Compared, Init};
use crate::units::{Flops, Joules};
use crate::work::Work;

/// What a run spent, for its baselines to be held against.
pub struct Metered<'a> {
    /// On the meter that decides.
    pub spent: Joules,
    /// That meter over the counted one.
    pub metered_over_counted: f64,
    /// What the counted energy is made of.
    pub parts: &'a EnergyBreakdown,
}

/// Full fine-tuning over the same `steps` and `evaluations`, and pretraining; each on the meter of `run` and against it.
pub fn baselines(
    subject: &Subject<'_>,
    steps: u64,
    evaluations: usize,
    run: &Metered<'_>,
) -> Result<Vec<Baseline>> {
    let mut all = Vec::new();
    if !subject.target.is_whole_model() && subject.recipe.baseline.full_fine_tuning != Compared::Off
    {
        all.push(full_fine_tuning(subject, steps, evaluations)?);
    }
    if subject.recipe.baseline.from_scratch != Compared::Off {
        all.push(pretraining(subject));
    }
    let held = |baseline: Baseline| {
        let metered = if run.metered_over_counted == 1.0 {
            baseline
        } else {
            baseline.on_meter(run.metered_over_counted)
        };
        metered.compared_to(run.spent, Some(run.parts))
    };
    Ok(all.into_iter().map(held).collect())
}

/// The same batches with every weight trained.
fn full_fine_tuning(subject: &Subject<'_>, steps: u64, evaluations: usize) -> Result<Baseline> {
    let shape = ModelShape::fully_trained(subject.architecture, subject.recipe.model.dtype);
    let parameters = subject.architecture.parameters() as usize;
    let recompute = subject.settings.recompute;
    let step_work = |step: u64| -> Work {
        let batches = subject.sampler.step_shape(step);
        batches
            .iter()
            .map(|batch| shape.training(&batch.segments, batch.loss_tokens, recompute))
            .sum::<Work>()
            + adamw_cost(parameters)
    };
    let trained: Charge = (0..steps)
        .map(|step| subject.profile.charge(&step_work(step)))
        .sum();
    let evaluation: Work = subject
        .validation
        .iter()
        .map(|batch| batch.shape())
        .map(|batch| shape.evaluation(&batch.segments, batch.loss_tokens))
        .sum();
    let evaluated: Charge =
        std::iter::repeat_n(subject.profile.charge(&evaluation), evaluations).sum();
    let total = trained + evaluated;
    let (flops, energy, rates) = (
        Flops(total.flops as f64),
        total.energy.joules(),
        subject.budget.rates(),
    );
    let source = "counted: the same batches and evaluations, every weight trained";
    let mut baseline = Baseline::new(
        BaselineKind::FullFineTuning,
        Label::Counted,
        flops,
        energy,
        rates,
        source,
    );
    baseline.breakdown = Some(total.breakdown);
    baseline.assumptions = vec![
        format!(
            "{steps} steps on the same records, the same device ({})",
            subject.profile.name
        ),
        "as many steps as this run; full fine-tuning may need fewer or more to the same loss"
            .to_string(),
    ];
    Ok(baseline)
}

/// What training the base model cost: its published token count, its own configuration's, or 20 tokens a parameter.
fn pretraining(subject: &Subject<'_>) -> Baseline {
    let architecture = subject.architecture;
    let shape = Shape {
        layers: architecture.num_hidden_layers as u64,
        attention_size: (architecture.attention.heads * architecture.attention.head_dim) as u64,
        sequence: subject.recipe.data.max_length as u64,
    };
    let (parameters, rates) = (architecture.parameters() as f64, subject.budget.rates());
    let name = model_name(&subject.recipe.model.id);
    let mut baseline = baseline::pretraining(
        &name,
        parameters,
        subject.pretraining_tokens,
        Some(shape),
        subject.profile,
        rates,
    );
    if subject.recipe.model.init == Init::Random {
        baseline
            .assumptions
            .push("this run itself trains from random weights".into());
    }
    baseline
}
