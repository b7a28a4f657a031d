//! rms_norm, swiglu and the embedding.

use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use super::super::swiglu::{swiglu, swiglu_backward, swiglu_recompute};
use super::super::{
    Context, Gradients, Parameters, RmsNorm, Weight, embedding, embedding_backward,
    embedding_backward_cost, embedding_cost, gather_rows, rms_norm_backward_cost, rms_norm_cost,
    scatter_rows, swiglu_backward_cost, swiglu_cost,
};
use super::{Pair, Passed, cases, close, flat, of, random, within};
use crate::work::{Precision, WorkCounter};

/// `tensor` as the only trained one, and a place for its gradient.
fn trained(tensor: &Tensor) -> (Weight, Gradients) {
    let parameters = Parameters::new(
        vec![("w".into(), tensor.dims().to_vec(), flat(tensor))],
        &Device::Cpu,
    )
    .unwrap();
    (parameters.weight(0).unwrap(), Gradients::new(1))
}

fn run_rms_norm(
    context: Context<'_>,
    inputs: &[Tensor],
    dy: &Tensor,
    eps: f64,
    trains: bool,
) -> Passed {
    let (weight, mut gradients) = trained(&inputs[1]);
    let weight = if trains {
        weight
    } else {
        Weight::frozen(inputs[1].clone())
    };
    let norm = RmsNorm { weight, eps };
    let (y, saved) = norm.forward(context, &inputs[0]).unwrap();
    let dx = norm
        .backward(context, dy, &saved, None, &mut gradients)
        .unwrap();
    (y, vec![Some(dx), gradients.get(0).cloned()])
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn rms_norm_is_its_definition(n in 1usize..40, c in 1usize..70, trains: bool, seed: u64) {
        // Away from zero, so that 1 / rms stays below 4 and with it every intermediate.
        let x = random(seed, &[n, c]);
        let x = (&x + x.sign().unwrap()).unwrap().affine(0.5, 0.0).unwrap();
        let inputs = [x, random(seed ^ 1, &[c])];
        let eps = 1e-3;
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| run_rms_norm(context, inputs, dy, eps, trains),
            naive: |inputs: &[Tensor]| {
                let rms = (inputs[0].sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + eps).unwrap().sqrt().unwrap();
                inputs[0].broadcast_div(&rms).unwrap().broadcast_mul(&inputs[1]).unwrap()
            },
            cost: rms_norm_cost(n, c) + rms_norm_backward_cost(n, c, trains),
            roundings: c + n + 48,
        }
        .prove();
    }

    #[test]
    fn swiglu_is_its_definition(n in 1usize..80, f in 1usize..300, seed: u64) {
        let inputs = [random(seed, &[n, f]).affine(6.0, 0.0).unwrap(), random(seed ^ 1, &[n, f])];
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 2, &[n, f]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let (y, saved) = swiglu(context, &inputs[0], &inputs[1]).unwrap();
                let (dgate, dup) = swiglu_backward(context, dy, &saved).unwrap();
                assert_eq!(flat(&swiglu_recompute(context, &saved).unwrap()), flat(&y));
                (y, vec![Some(dgate), Some(dup)])
            },
            naive: |inputs: &[Tensor]| {
                let below = (inputs[0].neg().unwrap().exp().unwrap() + 1.0).unwrap();
                (inputs[0].div(&below).unwrap() * &inputs[1]).unwrap()
            },
            cost: swiglu_cost(n * f).times(2) + swiglu_backward_cost(n * f),
            roundings: 16,
        }
        .prove();
    }

    #[test]
    fn embedding_adds_up_rows_named_twice(n in 1usize..40, v in 1usize..9, c in 1usize..20, seed: u64) {
        let ids: Vec<u32> = super::uniform(seed ^ 3, n).iter().map(|u| (u * v as f32) as u32).collect();
        let ids = Tensor::from_vec(ids, n, &Device::Cpu).unwrap();
        Pair {
            inputs: &[random(seed, &[v, c])],
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let (table, mut gradients) = trained(&inputs[0]);
                let y = embedding(context, &ids, &table).unwrap();
                embedding_backward(context, &ids, dy, &table, &mut gradients).unwrap();
                (y, vec![gradients.get(0).cloned()])
            },
            naive: |inputs: &[Tensor]| inputs[0].index_select(&ids, 0).unwrap(),
            cost: embedding_cost(n, c) + embedding_backward_cost(n, c, v),
            roundings: n,
        }
        .prove();
    }
}

#[test]
fn rows_are_taken_and_put_back_as_candle_does() {
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::F32);
    let reference = Context {
        reference: true,
        ..fused
    };
    for (n, numbers) in [
        (5, vec![3u32, 0, 4]),
        (100, (0..99).rev().collect()),
        (4, vec![2, 2, 1]),
        (3, vec![]),
    ] {
        let (x, dx) = (random(1, &[n, 7]), random(2, &[numbers.len(), 7]));
        let numbers = Tensor::from_vec(numbers.clone(), numbers.len(), &Device::Cpu).unwrap();
        let [ours, candles] =
            [fused, reference].map(|context| flat(&gather_rows(context, &x, &numbers).unwrap()));
        assert_eq!(ours, candles);
        let [ours, candles] = [fused, reference]
            .map(|context| flat(&scatter_rows(context, &dx, &numbers, n).unwrap()));
        assert_eq!(ours, candles);
    }
    let beyond = Tensor::from_vec(vec![5u32], 1, &Device::Cpu).unwrap();
    assert!(gather_rows(fused, &random(1, &[5, 2]), &beyond).is_err());
    assert!(scatter_rows(fused, &random(1, &[1, 2]), &beyond, 5).is_err());
}

/// A row of zeros has rms sqrt(eps): y = 0 and dx = dy * weight / sqrt(eps).
#[test]
fn rms_norm_of_zeros_is_held_up_by_eps() {
    let counter = WorkCounter::default();
    for reference in [false, true] {
        let context = Context {
            reference,
            ..Context::new(&counter, Precision::F32)
        };
        let inputs = [of(&[0.0; 4], &[2, 2]), of(&[3.0, -1.0], &[2])];
        let (y, gradients) = run_rms_norm(
            context,
            &inputs,
            &of(&[1.0, 2.0, 0.0, 4.0], &[2, 2]),
            1e-6,
            true,
        );
        assert_eq!(flat(&y), [0.0; 4]);
        within(
            "dx",
            gradients[0].as_ref().unwrap(),
            &of(&[3e3, -2e3, 0.0, -4e3], &[2, 2]),
            1e-2,
        );
        assert_eq!(flat(gradients[1].as_ref().unwrap()), [0.0; 2]);
    }
}

/// y = 0 far below and gate * up far above; the slope is 0 or up. exp overflows on the way and must do no harm.
#[test]
fn swiglu_saturates_without_overflow() {
    let (gate, up) = (
        of(&[-1e4, -200.0, 200.0, 1e4], &[1, 4]),
        of(&[2.0; 4], &[1, 4]),
    );
    let counter = WorkCounter::default();
    for reference in [false, true] {
        let context = Context {
            reference,
            ..Context::new(&counter, Precision::F32)
        };
        let (y, saved) = swiglu(context, &gate, &up).unwrap();
        close("y", &y, &of(&[0.0, 0.0, 400.0, 2e4], &[1, 4]), 1);
        let (dgate, dup) = swiglu_backward(context, &of(&[1.0; 4], &[1, 4]), &saved).unwrap();
        close("dgate", &dgate, &of(&[0.0, 0.0, 2.0, 2.0], &[1, 4]), 1);
        close("dup", &dup, &of(&[0.0, 0.0, 200.0, 1e4], &[1, 4]), 1);
    }
}

/// More elements than one parallel task of swiglu takes (16 Ki): the second task must read where it writes.
#[test]
fn swiglu_beyond_one_task_is_the_reference() {
    let [gate, up, dy] = [1, 2, 3].map(|seed| random(seed, &[3, 16 * 1024 / 2 + 5]));
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::F32);
    let reference = Context {
        reference: true,
        ..fused
    };
    let run = |context: Context<'_>| {
        let (y, saved) = swiglu(context, &gate, &up).unwrap();
        let (dgate, dup) = swiglu_backward(context, &dy, &saved).unwrap();
        [y, dgate, dup, swiglu_recompute(context, &saved).unwrap()]
    };
    let names = ["y", "dgate", "dup", "y again"];
    run(fused)
        .iter()
        .zip(&run(reference))
        .zip(names)
        .for_each(|((ours, theirs), name)| close(name, ours, theirs, 16));
}

/// In bf16 what is kept and what goes into products is rounded (at most 2^-8 of itself); what is computed is f32, by both implementations alike.
#[test]
fn what_bf16_keeps_is_rounded_once() {
    let [gate, up, dy, weight] =
        [1, 2, 3, 4].map(|seed| random(seed, if seed == 4 { &[37] } else { &[5, 37] }));
    let norm = RmsNorm {
        weight: Weight::frozen(weight),
        eps: 1e-3,
    };
    let counter = WorkCounter::default();
    let run = |precision: Precision, reference: bool| {
        let context = Context {
            reference,
            ..Context::new(&counter, precision)
        };
        let (y, saved) = swiglu(context, &gate, &up).unwrap();
        let (dgate, dup) = swiglu_backward(context, &dy, &saved).unwrap();
        let (h, kept) = norm.forward(context, &gate).unwrap();
        let dx = norm
            .backward(context, &dy, &kept, None, &mut Gradients::new(0))
            .unwrap();
        let all = [
            y,
            h,
            dgate,
            dup,
            swiglu_recompute(context, &saved).unwrap(),
            norm.recompute(context, &kept).unwrap(),
            dx,
        ];
        all.map(|x| (x.dtype(), x.to_dtype(DType::F32).unwrap()))
    };
    let (wide, fused, reference) = (
        run(Precision::F32, false),
        run(Precision::Bf16, false),
        run(Precision::Bf16, true),
    );
    for (i, ((wide, fused), reference)) in wide.iter().zip(&fused).zip(&reference).enumerate() {
        let ((wide, (dtype, fused)), reference) = ((&wide.1, fused), &reference.1);
        // The last goes on along the residual stream; all others go into products.
        assert_eq!(*dtype, if i == 6 { DType::F32 } else { DType::BF16 }, "{i}");
        if i == 6 {
            close("both ways", fused, reference, 64);
        }
        let near = |x: &f32, y: &f32| (x - y).abs() <= y.abs() / 255.0 + 1e-6;
        assert!(
            flat(fused)
                .iter()
                .zip(&flat(reference))
                .all(|(x, y)| i == 6 || near(x, y)),
            "{i}, both ways"
        );
        // Slopes of what follows rounded inputs are below 8.
        within(&format!("{i}"), fused, wide, 8.0 / 512.0);
        assert!(flat(fused) != flat(wide), "{i} was kept in f32");
    }
}
