//! The charge of one step after another, in time that does not grow with the model.
//!
//! A step's cost is the sum of what depends on its tokens, on its loss tokens and on the segments of each row; each part is counted
//! once for each size, and for each row, that occurs. Sums are of integers ([`WorkTotals`]), so that a step's charge is that of its work counted in one piece, exactly.

use std::ops::Range;

use super::StepCosts;
use crate::data::Sampler;
use crate::energy::{Charge, Profile, WorkTotals};
use crate::model::{ModelShape, Recompute};
use crate::ops::adamw_cost;
use crate::work::Work;

/// Charges the steps of a run.
pub struct StepCharges<'a> {
    sampler: &'a Sampler,
    profile: &'a Profile,
    parts: Parts<'a>,
    optimizer: WorkTotals,
    /// Bytes of the sweeps of each attention pass in a micro-batch.
    sweeps: Vec<u64>,
}

/// One step.
#[derive(Debug, Default)]
pub(super) struct ChargedStep {
    /// Without bytes by level.
    pub charge: Charge,
    /// What the charge follows from.
    pub totals: WorkTotals,
    pub tokens: u64,
    pub loss_tokens: u64,
}

/// A sum of charges.
#[derive(Debug, Default)]
pub(super) struct ChargeSum {
    charge: Charge,
    totals: WorkTotals,
}

impl ChargeSum {
    pub fn add(&mut self, step: &ChargedStep) {
        self.charge += &step.charge;
        self.totals += &step.totals;
    }

    pub fn finish(self, profile: &Profile) -> Charge {
        Charge {
            bytes: profile.traffic_of(&self.totals),
            ..self.charge
        }
    }
}

impl<'a> StepCharges<'a> {
    pub(super) fn new(costs: &'a StepCosts<'a>, profile: &'a Profile) -> Self {
        let recompute = costs.settings.recompute;
        let passes = costs.shape.attention_training(&[], recompute);
        Self {
            sampler: costs.sampler,
            profile,
            optimizer: profile.totals(&adamw_cost(costs.trained)),
            sweeps: vec![0; passes.len()],
            parts: Parts {
                shape: costs.shape,
                recompute,
                profile,
                passes: passes.into_iter().map(|(_, count)| count).collect(),
                by_tokens: Memo::default(),
                by_loss_tokens: Memo::default(),
                by_length: Memo::default(),
                by_row: Memo::default(),
            },
        }
    }

    /// Step `step`, counted from 0.
    pub(super) fn step(&mut self, step: u64) -> ChargedStep {
        let mut charged = ChargedStep {
            totals: self.optimizer.clone(),
            ..ChargedStep::default()
        };
        let sampler = self.sampler;
        sampler.visit_step(step, |batch| self.add_batch(&mut charged, batch));
        charged.charge = self.profile.charge_without_bytes(&charged.totals);
        charged
    }

    fn add_batch(&mut self, step: &mut ChargedStep, rows: &[u32]) {
        let mut tokens = 0;
        let mut loss_tokens = 0;
        self.sweeps.fill(0);
        for row in rows {
            let row = self.parts.row(self.sampler, *row);
            step.totals += &row.products;
            for (sum, bytes) in self.sweeps.iter_mut().zip(&row.sweeps) {
                *sum += bytes;
            }
            tokens += row.tokens;
            loss_tokens += row.loss_tokens;
        }
        let profile = self.profile;
        for (bytes, count) in self.sweeps.iter().zip(&self.parts.passes) {
            profile.add_sweeps(&mut step.totals, *bytes, *count);
        }
        step.totals += self.parts.tokens(tokens);
        step.totals += self.parts.losses(loss_tokens);
        let scatter = self.parts.shape.scatter_training(tokens, loss_tokens);
        for (bytes, count) in scatter.iter_sweeps() {
            profile.add_sweeps(&mut step.totals, bytes.0, count);
        }
        step.totals.add_vector_flops(scatter.vector_flops());
        step.tokens += tokens as u64;
        step.loss_tokens += loss_tokens as u64;
    }

    /// The charge of all `steps`.
    pub fn sum(mut self, steps: Range<u64>) -> Charge {
        let mut sum = ChargeSum::default();
        steps.for_each(|step| sum.add(&self.step(step)));
        sum.finish(self.profile)
    }

    /// The charge of a step, without bytes by level.
    pub fn charge(&mut self, step: u64) -> Charge {
        self.step(step).charge
    }
}

/// A micro-batch's parts by size, counted when they first occur.
struct Parts<'a> {
    shape: &'a ModelShape,
    recompute: Recompute,
    profile: &'a Profile,
    /// How often each kind of attention pass runs.
    passes: Vec<u64>,
    by_tokens: Memo<WorkTotals>,
    by_loss_tokens: Memo<WorkTotals>,
    by_length: Memo<AttentionTotals>,
    by_row: Memo<RowTotals>,
}

/// The attention within a segment, or within those of a row.
#[derive(Default)]
struct AttentionTotals {
    /// Products and vector operations of all passes.
    products: WorkTotals,
    /// Bytes of the sweeps of one pass of each kind.
    sweeps: Vec<u64>,
}

/// A row's sizes and its attention.
struct RowTotals {
    tokens: usize,
    loss_tokens: usize,
    products: WorkTotals,
    sweeps: Vec<u64>,
}

impl Parts<'_> {
    fn tokens(&mut self, tokens: usize) -> &WorkTotals {
        let work = || self.shape.tokens_training(tokens, self.recompute);
        self.by_tokens.get(tokens, || self.profile.totals(&work()))
    }

    fn losses(&mut self, loss_tokens: usize) -> &WorkTotals {
        let work = || self.shape.losses_training(loss_tokens);
        let totals = || self.profile.totals(&work());
        self.by_loss_tokens.get(loss_tokens, totals)
    }

    fn row(&mut self, sampler: &Sampler, row: u32) -> &RowTotals {
        let Self {
            shape,
            recompute,
            profile,
            by_length,
            by_row,
            ..
        } = self;
        by_row.get(row as usize, || {
            let examples = sampler.row(row);
            let mut sum = AttentionTotals::default();
            for example in examples {
                let length = sampler.tokens_of(*example);
                let passes = || shape.attention_training(&[length], *recompute);
                sum.add(by_length.get(length, || AttentionTotals::new(profile, &passes())));
            }
            RowTotals {
                tokens: examples.iter().map(|i| sampler.tokens_of(*i)).sum(),
                loss_tokens: examples.iter().map(|i| sampler.loss_tokens_of(*i)).sum(),
                products: sum.products,
                sweeps: sum.sweeps,
            }
        })
    }
}

impl AttentionTotals {
    fn new(profile: &Profile, passes: &[(Work, u64)]) -> Self {
        let mut products = WorkTotals::default();
        for (work, count) in passes {
            products += &profile.totals(&work.without_sweeps().times(*count));
        }
        let swept = |work: &Work| work.iter_sweeps().map(|(bytes, n)| bytes.0 * n).sum();
        Self {
            products,
            sweeps: passes.iter().map(|(work, _)| swept(work)).collect(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.products += &other.products;
        self.sweeps.resize(other.sweeps.len(), 0);
        for (sum, bytes) in self.sweeps.iter_mut().zip(&other.sweeps) {
            *sum += bytes;
        }
    }
}

/// Values by size, or by row.
struct Memo<T>(Vec<Option<T>>);

impl<T> Default for Memo<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Memo<T> {
    fn get(&mut self, size: usize, value: impl FnOnce() -> T) -> &T {
        if size >= self.0.len() {
            self.0.resize_with(size + 1, || None);
        }
        self.0[size].get_or_insert_with(value)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::{Module, Site};
    use crate::data::{Example, MicroBatch, SamplerOptions, evaluation_batches};
    use crate::energy::{Budget, Limits, Phase, Rates, Spent};
    use crate::model::Architecture;
    use crate::ops::AdamW;
    use crate::train::{Decay, Forecast, Schedule, Scheduled, Settings, Stop, TrainState};
    use crate::train::{forecast, unseen};
    use crate::units::{GramsPerKwh, Joules, Pue};
    use crate::work::Precision;

    /// Families with tied and untied heads, windows, norms of q and k; their configurations are those of `tests/golden/tiny`.
    const MODELS: [&str; 4] = ["gqa", "mistral", "qwen3", "olmo3"];

    fn architecture(name: &str) -> Architecture {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        Architecture::from_file(&root.join(format!("tests/golden/tiny/{name}/config.json")))
            .unwrap()
    }

    /// Examples of odd lengths, more than the windows of the models.
    fn examples(count: usize) -> Arc<[Example]> {
        let length = |i: usize| 2 + (i * 37 + i * i) % 59;
        let example = |i: usize| Example {
            tokens: vec![0; length(i)],
            loss: (0..length(i)).map(|at| at > i % 7).collect(),
            labels: Vec::new(),
            values: Vec::new(),
        };
        (0..count).map(example).collect()
    }

    fn budget(energy: Option<f64>) -> Budget {
        let limits = Limits {
            energy: energy.map(Joules),
            ..Limits::default()
        };
        let rates = Rates {
            grid: GramsPerKwh(473.0),
            pue: Pue::ONE,
            price: None,
        };
        Budget::new(limits, rates).unwrap()
    }

    /// A run played through with the work of each step counted in one piece.
    fn played(
        costs: &StepCosts<'_>,
        settings: &Settings,
        profile: &Profile,
        budget: &Budget,
    ) -> Forecast {
        let charge = |work: &Work| profile.charge(work);
        let ending = costs.reserve(Scheduled::default());
        let reserve: Spent = ending.iter().map(|(_, work)| charge(work).spent()).sum();
        let mut run = Forecast::at(0, settings);
        let mut so_far = Spent::default();
        let mut training = Charge::default();
        let mut last = Scheduled::default();
        for step in 0..settings.steps {
            let mut due = settings.scheduled_after(step + 1);
            due.evaluation &= costs.has_validation();
            let whole = charge(&costs.step(step));
            let evaluation = costs.evaluation().filter(|_| due.evaluation);
            let save = Some(costs.save()).filter(|_| due.save);
            let after = evaluation.into_iter().chain(save);
            let next = whole.spent() + after.map(|work| charge(work).spent()).sum();
            if let Err(limit) = budget.admits(&so_far, &next, &reserve) {
                run.stop = Stop::Budget(limit);
                break;
            }
            so_far += next;
            training += &whole;
            let batches = costs.sampler.step_shape(step);
            let step = ChargedStep {
                tokens: batches.iter().map(|b| b.tokens() as u64).sum(),
                loss_tokens: batches.iter().map(|b| b.loss_tokens as u64).sum(),
                ..ChargedStep::default()
            };
            run.count_step(&step, due);
            last = due;
        }
        let evaluated = last.evaluation || !costs.has_validation();
        run.evaluations += usize::from(!evaluated);
        run.saves += usize::from(!(last.save && evaluated));
        run.phases = vec![(Phase::Train, training)];
        run
    }

    fn settings(steps: u64, eval_every: u64, save_every: u64, recompute: Recompute) -> Settings {
        Settings {
            steps,
            by_epochs: false,
            schedule: Schedule {
                peak: 1e-3,
                decay: Decay::Linear,
                steps,
                warmup_steps: steps / 3,
            },
            optimizer: AdamW {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                lr_ratio: 1.0,
                max_grad_norm: 1.0,
            },
            eval_every,
            save_every,
            keep_best: save_every == 0,
            target_loss: None,
            early_stopping: None,
            recompute,
            dropout: 0.1,
            seed: 1,
            precision: Precision::F32,
            recipe: String::new(),
        }
    }

    /// Adapters on all layers, on the upper half, and every weight.
    fn shapes(model: &Architecture) -> [ModelShape; 3] {
        let modules = model.modules().into_iter();
        let site = |module: Module| Site {
            path: module.path,
            in_features: module.in_features,
            out_features: module.out_features,
            r: 4,
            lora_alpha: 8.0,
            scaling: 2.0,
            kind: module.kind,
        };
        let blocks = modules.filter(|module| module.path.starts_with("model.layers."));
        let sites: Vec<Site> = blocks.map(site).collect();
        let upper = sites[sites.len() / 2..].to_vec();
        [
            ModelShape::with_adapters(model, &sites.into(), true, Precision::F32),
            ModelShape::with_adapters(model, &upper.into(), false, Precision::Bf16),
            ModelShape::fully_trained(model, Precision::F32),
        ]
    }

    /// Plays runs of `settings` through in both ways.
    fn compare(model: &Architecture, sampler: &Sampler, settings: &Settings, budget: &Budget) {
        let profile = Profile::named("raspberry-pi-5").unwrap();
        let validation: Vec<MicroBatch> = match settings.eval_every {
            0 => Vec::new(),
            _ => evaluation_batches(&examples(3), 2),
        };
        for shape in &shapes(model) {
            let costs = StepCosts::new(shape, sampler, &validation, 1000, settings, Vec::new());
            let expected = played(&costs, settings, &profile, budget);
            let state = TrainState::default();
            let none = Spent::default();
            let run = forecast(
                &costs,
                settings,
                &profile,
                budget,
                none,
                &state,
                &mut unseen,
            );
            let counts = |run: &Forecast| {
                let tokens = [run.steps, run.tokens, run.loss_tokens];
                (tokens, run.evaluations, run.saves, run.stop.clone())
            };
            assert_eq!(counts(&run), counts(&expected), "{sampler:?}, {settings:?}");
            let training = expected.charge(Phase::Train);
            assert_eq!(
                run.charge(Phase::Train),
                training,
                "{sampler:?}, {settings:?}"
            );
            assert_eq!(costs.charges(&profile).sum(0..run.steps), training);
        }
    }

    #[test]
    fn a_run_in_parts_is_charged_as_its_steps_in_one_piece() {
        // Records, micro-batch, accumulation, steps; evaluation and checkpoint intervals; energy budget.
        let cases = [
            (23, 4, 1, 31, 7, 5, None),
            (23, 4, 3, 5, 0, 0, None),
            (40, 7, 2, 20, 3, 0, None),
            (5, 8, 1, 9, 4, 4, None),
            (1, 1, 1, 3, 1, 2, None),
            (40, 3, 2, 50, 6, 10, Some(0.02)),
            (23, 4, 1, 31, 0, 5, Some(0.01)),
        ];
        for (index, case) in cases.into_iter().enumerate() {
            let (records, micro_batch_size, accumulation, steps, eval, save, energy) = case;
            let model = architecture(MODELS[index % MODELS.len()]);
            let settings = settings(steps, eval, save, Recompute::lowest(index % 3));
            for (packing, shuffle) in [(true, true), (true, false), (false, true), (false, false)] {
                let options = SamplerOptions {
                    micro_batch_size,
                    gradient_accumulation_steps: accumulation,
                    max_length: 64,
                    packing,
                    shuffle,
                    seed: index as u64,
                };
                let sampler = Sampler::new(examples(records), options).unwrap();
                compare(&model, &sampler, &settings, &budget(energy));
            }
        }
    }
}
