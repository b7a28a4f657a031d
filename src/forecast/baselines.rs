//! Counted baselines on the run's device: full fine-tuning on the same batches, and pretraining of the base model.

use super::subject::{Subject, model_name};
use crate::energy::baseline::{BaselineKind, Label, Shape};
use crate::energy::{Baseline, Charge, EnergyBreakdown, baseline};
use crate::model::ModelShape;
use crate::recipe::{Compared, Init};
use crate::units::{Flops, Joules};
use crate::work::Work;

/// Energy of a run, which its baselines are compared with.
pub struct Metered<'a> {
    /// On the meter that decides.
    pub spent: Joules,
    /// Ratio of that meter to the counted one.
    pub metered_over_counted: f64,
    /// Parts of the counted energy.
    pub parts: &'a EnergyBreakdown,
}

/// Full fine-tuning over the same `steps` and `evaluations`, and pretraining, scaled to the meter of `run`.
pub fn baselines(
    subject: &Subject<'_>,
    steps: u64,
    evaluations: usize,
    run: &Metered<'_>,
) -> Vec<Baseline> {
    let mut all = Vec::new();
    if !subject.target.is_whole_model() && subject.recipe.baseline.full_fine_tuning != Compared::Off
    {
        all.push(full_fine_tuning(subject, steps, evaluations));
    }
    if subject.recipe.baseline.from_scratch != Compared::Off {
        all.push(pretraining(subject));
    }
    let compared = |baseline: Baseline| {
        let metered = if run.metered_over_counted == 1.0 {
            baseline
        } else {
            baseline.on_meter(run.metered_over_counted)
        };
        metered.compared_to(run.spent, Some(run.parts))
    };
    all.into_iter().map(compared).collect()
}

/// Every weight trained on the same batches.
fn full_fine_tuning(subject: &Subject<'_>, steps: u64, evaluations: usize) -> Baseline {
    let shape = ModelShape::fully_trained(subject.architecture, subject.precision());
    let parameters = subject.architecture.parameters() as usize;
    let costs = subject.step_costs(&shape, parameters, subject.settings, Vec::new());
    let charge = |work: &Work| subject.profile.charge(work);
    let trained: Charge = (0..steps).map(|step| charge(&costs.step(step))).sum();
    let evaluation = costs.evaluation().map(charge).unwrap_or_default();
    let evaluated: Charge = std::iter::repeat_n(evaluation, evaluations).sum();
    let total = trained + evaluated;
    let mut baseline = Baseline::new(
        BaselineKind::FullFineTuning,
        Label::Counted,
        Flops(total.flops as f64),
        total.energy.joules(),
        subject.budget.rates(),
        "counted: the same batches and evaluations, every weight trained",
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
    baseline
}

/// Pretraining of the base model on its published token count, else config.json's, else 20 tokens a parameter.
fn pretraining(subject: &Subject<'_>) -> Baseline {
    let architecture = subject.architecture;
    let shape = Shape {
        layers: architecture.num_hidden_layers as u64,
        attention_size: (architecture.attention.heads * architecture.attention.head_dim) as u64,
        sequence: subject.recipe.data.max_length as u64,
    };
    let mut baseline = baseline::pretraining(
        &model_name(&subject.recipe.model.id),
        architecture.active_parameters() as f64,
        subject.pretraining_tokens,
        Some(shape),
        subject.profile,
        subject.budget.rates(),
    );
    if subject.recipe.model.init == Init::Random {
        baseline
            .assumptions
            .push("this run itself trains from random weights".into());
    }
    baseline
}
