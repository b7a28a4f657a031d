//! AdamW in one pass against the paper's algorithm in f64.

use candle_core::Device;
use proptest::prelude::*;

use super::super::{AdamW, Context, Parameters, adamw_cost};
use super::{cases, close, flat, of, on, random};
use crate::work::{Precision, WorkCounter};

const STEPS: u64 = 4;
const RATE: f64 = 0.05;

/// Loshchilov and Hutter 2019, algorithm 2, after clipping by the global norm (torch adds 1e-6 to the norm): values and moments.
fn naive(adamw: &AdamW, mut values: Vec<f64>, gradients: &[Vec<f64>]) -> ([Vec<f64>; 3], Vec<f64>) {
    let (mut m, mut v, mut norms) = (vec![0.0; values.len()], vec![0.0; values.len()], vec![]);
    for (t, gradient) in gradients.iter().enumerate() {
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if adamw.max_grad_norm > 0.0 {
            (adamw.max_grad_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        norms.push(norm);
        let (c1, c2) = (
            1.0 - adamw.beta1.powi(t as i32 + 1),
            1.0 - adamw.beta2.powi(t as i32 + 1),
        );
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

fn run(adamw: &AdamW, reference: bool, n: usize, seed: u64) -> ([Vec<f32>; 3], Vec<f64>) {
    let counter = WorkCounter::default();
    let context = Context {
        reference,
        ..Context::new(&counter, Precision::F32)
    };
    let half = n / 2; // two slots: the pass must not care
    let values = flat(&random(seed, &[n]));
    let slots = [("a", &values[..half]), ("b", &values[half..])];
    let named = slots
        .map(|(name, values)| (name.to_string(), vec![values.len()], values.to_vec()))
        .to_vec();
    let parameters = Parameters::new(named, &Device::Cpu).unwrap();
    let norms = (1..=STEPS)
        .map(|step| {
            adamw
                .step(context, &parameters, &random(seed + step, &[n]), RATE, step)
                .unwrap()
        })
        .collect();
    assert_eq!(counter.take(), adamw_cost(n).times(STEPS));
    (parameters.snapshot().unwrap(), norms)
}

fn prove(adamw: &AdamW, n: usize, seed: u64) {
    let wide = |seed: u64| {
        flat(&random(seed, &[n]))
            .into_iter()
            .map(f64::from)
            .collect::<Vec<_>>()
    };
    let gradients: Vec<_> = (1..=STEPS).map(|step| wide(seed + step)).collect();
    let (want, want_norms) = naive(adamw, wide(seed), &gradients);
    let ours = on(1, || run(adamw, false, n, seed));
    assert_eq!(
        ours,
        on(2, || run(adamw, false, n, seed)),
        "one thread and two"
    );
    for (rows, norms) in [&ours, &run(adamw, true, n, seed)] {
        for (name, (row, want)) in ["value", "first moment", "second moment"]
            .iter()
            .zip(rows.iter().zip(&want))
        {
            let want: Vec<f32> = want.iter().map(|x| *x as f32).collect();
            close(name, &of(row, &[n]), &of(&want, &[n]), 16 * STEPS as usize);
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
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-6,
            weight_decay: decay,
            max_grad_norm: clip.unwrap_or(0.0),
        };
        prove(&adamw, n, seed);
    }
}

/// One number, one step, by hand: value 1, gradient 4 clipped to 2 (norm 4, limit 2): m = 0.2, v = 0.004, corrected 2 and 4, so the
/// direction is 2 / (2 + eps) = 1 and the value 1 - 0.1 * (1 + 0.5 * 1) = 0.85. The returned norm is the one before clipping.
#[test]
fn one_step_by_hand() {
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.5,
        max_grad_norm: 2.0,
    };
    let counter = WorkCounter::default();
    for reference in [false, true] {
        let context = Context {
            reference,
            ..Context::new(&counter, Precision::F32)
        };
        let parameters =
            Parameters::new(vec![("w".into(), vec![1], vec![1.0])], &Device::Cpu).unwrap();
        let view = parameters.weight(0).unwrap();
        assert_eq!(
            adamw
                .step(context, &parameters, &of(&[4.0], &[1]), 0.1, 1)
                .unwrap(),
            4.0
        );
        let [value, first, second] = parameters.snapshot().unwrap();
        close(
            "state",
            &of(&[value[0], first[0], second[0]], &[3]),
            &of(&[0.85, 0.2, 0.004], &[3]),
            8,
        );
        assert_eq!(flat(&view.tensor), value, "a view follows the step");
    }
}

/// 64 Ki numbers to a task: the tasks and the norm's partial sums meet without a seam.
#[test]
fn more_numbers_than_a_task_takes() {
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-6,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    };
    prove(&adamw, 64 * 1024 + 3, 9);
}

/// A gradient that is not finite changes nothing: the caller sees the norm and stops.
#[test]
fn a_broken_gradient_changes_nothing() {
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.5,
        max_grad_norm: 1.0,
    };
    let counter = WorkCounter::default();
    for broken in [f32::NAN, f32::INFINITY] {
        let parameters =
            Parameters::new(vec![("w".into(), vec![2], vec![1.0, 2.0])], &Device::Cpu).unwrap();
        let context = Context::new(&counter, Precision::F32);
        assert!(
            !adamw
                .step(context, &parameters, &of(&[0.0, broken], &[2]), 0.1, 1)
                .unwrap()
                .is_finite()
        );
        assert_eq!(
            parameters.snapshot().unwrap(),
            [vec![1.0, 2.0], vec![0.0; 2], vec![0.0; 2]]
        );
    }
}
