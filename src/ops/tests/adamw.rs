//! AdamW in one pass against the paper's algorithm in f64.

use candle_core::Device;
use proptest::prelude::*;

use super::super::adamw::decayed;
use super::super::{AdamW, Context, Parameters, Slot, adamw_cost};
use super::{Implementation, cases, close, flat, for_each_path, on, parameters, random, tensor};
use crate::work::Precision;

const STEPS: u64 = 4;
const RATE: f64 = 0.05;

pub(super) const ADAMW: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.5,
    lr_ratio: 1.0,
    max_grad_norm: 1.0,
};

/// Loshchilov and Hutter 2019, algorithm 2, after clipping by the global norm (torch adds 1e-6 to
/// the norm): values and moments.
fn naive(adamw: &AdamW, mut values: Vec<f64>, gradients: &[Vec<f64>]) -> ([Vec<f64>; 3], Vec<f64>) {
    let mut m = vec![0.0; values.len()];
    let mut v = vec![0.0; values.len()];
    let mut norms = vec![];
    for (t, gradient) in gradients.iter().enumerate() {
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if adamw.max_grad_norm > 0.0 {
            (adamw.max_grad_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        norms.push(norm);
        let c1 = 1.0 - adamw.beta1.powi(t as i32 + 1);
        let c2 = 1.0 - adamw.beta2.powi(t as i32 + 1);
        for i in 0..values.len() {
            let g = gradient[i] * clip;
            m[i] = adamw.beta1 * m[i] + (1.0 - adamw.beta1) * g;
            v[i] = adamw.beta2 * v[i] + (1.0 - adamw.beta2) * g * g;
            let direction = (m[i] / c1) / ((v[i] / c2).sqrt() + adamw.epsilon);
            values[i] -= RATE * (direction + adamw.weight_decay * values[i]);
        }
    }
    ([values, m, v], norms)
}

fn run(adamw: &AdamW, context: Context<'_>, n: usize, seed: u64) -> ([Vec<f32>; 3], Vec<f64>) {
    let half = n / 2; // two slots: the pass must not care
    let values = random(seed, &[n]);
    let [a, b] = [(0, half), (half, n - half)].map(|(at, n)| values.narrow(0, at, n).unwrap());
    let parameters = parameters([("a", &a), ("b", &b)]);
    let step = |step: u64| adamw.step(context, &parameters, &random(seed + step, &[n]), RATE, step);
    let norms = (1..=STEPS).map(|t| step(t).unwrap()).collect();
    assert_eq!(context.counter.take(), adamw_cost(n).times(STEPS));
    (parameters.snapshot().unwrap(), norms)
}

fn prove(adamw: &AdamW, n: usize, seed: u64) {
    let wide = |seed| -> Vec<f64> {
        flat(&random(seed, &[n]))
            .into_iter()
            .map(f64::from)
            .collect()
    };
    let gradients: Vec<_> = (1..=STEPS).map(|step| wide(seed + step)).collect();
    let (want, want_norms) = naive(adamw, wide(seed), &gradients);
    for implementation in Implementation::all() {
        let run = |context: Context<'_>| run(adamw, context, n, seed);
        let on = |threads| on(threads, || implementation.run(Precision::F32, run));
        let (rows, norms) = on(1);
        if let Implementation::Fused(_) = implementation {
            assert_eq!((&rows, &norms), (&on(2).0, &on(2).1), "one thread and two");
        }
        let names = ["value", "first moment", "second moment"];
        for (name, (row, want)) in names.iter().zip(rows.iter().zip(&want)) {
            let want: Vec<f32> = want.iter().map(|x| *x as f32).collect();
            close(
                name,
                &tensor(row, &[n]),
                &tensor(&want, &[n]),
                16 * STEPS as usize,
            );
        }
        for (norm, want) in norms.iter().zip(&want_norms) {
            assert!(
                (norm - want).abs() <= 1e-12 * want,
                "norm {norm} is not {want}"
            );
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn adamw_is_its_algorithm(n in 2usize..200, decay in 0.0f64..0.5, clip in prop::option::of(0.1f64..10.0), seed in 0..u64::MAX / 2) {
        let adamw = AdamW {
            epsilon: 1e-6,
            weight_decay: decay,
            max_grad_norm: clip.unwrap_or(0.0),
            ..ADAMW
        };
        prove(&adamw, n, seed);
    }
}

/// One parameter, one step, by hand: value 1, gradient 4 clipped to 2 (norm 4, limit 2): m = 0.2, v
/// = 0.004, corrected 2 and 4, so the direction is 2 / (2 + eps) = 1 and the value 1 - 0.1 * (1 +
/// 0.5 * 1) = 0.85. The returned norm is the one before clipping.
#[test]
fn one_step_by_hand() {
    let adamw = AdamW {
        max_grad_norm: 2.0,
        ..ADAMW
    };
    for_each_path(|context| {
        let parameters = parameters([("w", &tensor(&[1.0], &[1]))]);
        let view = parameters.weight(0).unwrap();
        let norm = adamw.step(context, &parameters, &tensor(&[4.0], &[1]), 0.1, 1);
        assert_eq!(norm.unwrap(), 4.0);
        let [value, first, second] = parameters.snapshot().unwrap();
        let state = tensor(&[value[0], first[0], second[0]], &[3]);
        close("state", &state, &tensor(&[0.85, 0.2, 0.004], &[3]), 8);
        assert_eq!(flat(&view.tensor), value, "a view follows the step");
    });
}

/// More than the 64 Ki elements of a task: tasks and the norm's partial sums join without a seam.
#[test]
fn more_elements_than_a_task_takes() {
    let adamw = AdamW {
        beta2: 0.99,
        epsilon: 1e-6,
        weight_decay: 0.1,
        ..ADAMW
    };
    prove(&adamw, 64 * 1024 + 3, 9);
}

/// A gradient that is not finite changes nothing: the caller sees the norm and stops.
#[test]
fn a_non_finite_gradient_changes_nothing() {
    for broken in [f32::NAN, f32::INFINITY] {
        for_each_path(|context| {
            let values = vec![("w".into(), vec![2], vec![1.0, 2.0])];
            let parameters = Parameters::new(values, &Device::Cpu).unwrap();
            let gradient = tensor(&[0.0, broken], &[2]);
            let norm = ADAMW.step(context, &parameters, &gradient, 0.1, 1).unwrap();
            assert!(!norm.is_finite());
            let after = parameters.snapshot().unwrap();
            assert_eq!(after, [vec![1.0, 2.0], vec![0.0; 2], vec![0.0; 2]]);
        });
    }
}

/// scripts/weight_decay.py: transformers' Trainer on models of nine families and on adapters.
#[test]
fn norms_and_biases_are_not_decayed() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/golden/weight_decay.json")).unwrap();
    let mut seen = [0, 0];
    for (model, parameters) in golden["names"].as_object().unwrap() {
        for parameter in parameters.as_array().unwrap() {
            let (slot, wanted) = (slot(parameter), parameter[2].as_bool().unwrap());
            assert_eq!(decayed(&slot), wanted, "{model}: {}", slot.name);
            seen[usize::from(wanted)] += 1;
        }
    }
    assert!(seen[0] > 60 && seen[1] > 60, "{seen:?}");
}

fn slot(parameter: &serde_json::Value) -> Slot {
    Slot {
        name: parameter[0].as_str().unwrap().into(),
        shape: serde_json::from_value(parameter[1].clone()).unwrap(),
        offset: 0,
    }
}

/// scripts/weight_decay.py: three steps of torch.optim.AdamW with the Trainer's two groups, norms
/// between matrices.
#[test]
fn groups_of_parameters_are_stepped_as_by_the_trainer() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/golden/weight_decay.json")).unwrap();
    let floats =
        |value: &serde_json::Value| -> Vec<f32> { serde_json::from_value(value.clone()).unwrap() };
    let adamw = AdamW {
        beta2: 0.99,
        epsilon: 1e-6,
        weight_decay: 0.3,
        ..ADAMW
    };
    let steps = &golden["steps"];
    for_each_path(|context| {
        let tensors = steps["tensors"].as_array().unwrap().iter();
        let tensors = tensors.map(|t| (slot(t).name, slot(t).shape, floats(&t[2])));
        let parameters = Parameters::new(tensors.collect(), &Device::Cpu).unwrap();
        let n = parameters.len();
        for (step, after) in steps["after"].as_array().unwrap().iter().enumerate() {
            let gradient = tensor(&floats(&steps["gradients"][step]), &[n]);
            adamw
                .step(context, &parameters, &gradient, 0.1, step as u64 + 1)
                .unwrap();
            let [values, ..] = parameters.snapshot().unwrap();
            close(
                "values",
                &tensor(&values, &[n]),
                &tensor(&floats(after), &[n]),
                64,
            );
        }
    });
}
