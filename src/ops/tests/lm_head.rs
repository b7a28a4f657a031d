//! The output embedding and its cross-entropy, chunk by chunk.

use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{Context, FLOPS_ISSUED, Gradients, LmHead, LmHeadShape, Parameters, Weight};
use super::{
    Pair, Passed, bits, cases, close, flat, for_each_path, of, on, random, uniform, with, within,
};
use crate::work::{Precision, WorkCounter};

const SCALE: f64 = 0.375;

fn weight(tensor: &Tensor, trained: bool) -> Weight {
    let named = vec![(
        "lm_head.weight".into(),
        tensor.dims().to_vec(),
        flat(tensor),
    )];
    match trained {
        true => Parameters::new(named, &Device::Cpu)
            .unwrap()
            .weight(0)
            .unwrap(),
        false => Weight::frozen(tensor.clone()),
    }
}

fn run(
    context: Context<'_>,
    inputs: &[Tensor],
    targets: &[u32],
    trained: bool,
    input_gradient: bool,
) -> Passed {
    let head = LmHead {
        weight: weight(&inputs[1], trained),
    };
    let mut gradients = Gradients::new(1);
    let (losses, dh) = head
        .forward_backward(
            context,
            &inputs[0],
            targets,
            SCALE,
            input_gradient,
            &mut gradients,
        )
        .unwrap();
    (
        Tensor::from_vec(losses, targets.len(), &Device::Cpu).unwrap(),
        vec![dh, gradients.get(0).cloned()],
    )
}

/// log sum exp of each row less its target's logit.
fn naive(inputs: &[Tensor], targets: &[u32]) -> Tensor {
    let logits = inputs[0].matmul(&inputs[1].t().unwrap()).unwrap();
    let max = logits.max_keepdim(D::Minus1).unwrap().detach();
    let sum = logits
        .broadcast_sub(&max)
        .unwrap()
        .exp()
        .unwrap()
        .sum_keepdim(D::Minus1)
        .unwrap();
    let index = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu).unwrap();
    let chosen = logits.gather(&index, 1).unwrap();
    ((sum.log().unwrap() + max).unwrap() - chosen)
        .unwrap()
        .squeeze(1)
        .unwrap()
}

fn prove(n: usize, c: usize, v: usize, trained: bool, input_gradient: bool, seed: u64) {
    let targets: Vec<u32> = uniform(seed ^ 3, n)
        .iter()
        .map(|u| (u * v as f32) as u32)
        .collect();
    let shape = LmHeadShape {
        loss_tokens: n,
        hidden: c,
        vocab: v,
        trained,
    };
    Pair {
        inputs: &[random(seed, &[n, c]), random(seed ^ 1, &[v, c])],
        dy: &of(&vec![SCALE as f32; n], &[n]),
        op: |context: Context<'_>, inputs: &[Tensor], _: &Tensor| {
            run(context, inputs, &targets, trained, input_gradient)
        },
        naive: |inputs: &[Tensor]| naive(inputs, &targets),
        cost: shape.backward_cost(Precision::F32, input_gradient),
        roundings: c + n + 48,
    }
    .prove();
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn cross_entropy_is_its_definition(
        n in 1usize..100, c in 1usize..20, v in 1usize..200, trained: bool, input_gradient: bool, seed: u64,
    ) {
        prove(n, c, v, trained, input_gradient, seed);
    }
}

/// Words in several parts, each row's largest logit in any of them, and rows in several blocks.
#[test]
fn many_words_are_one_vocabulary() {
    for (n, c, v) in [(1, 1, 1025), (70, 33, 1500), (200, 16, 1024)] {
        prove(n, c, v, false, true, 7);
        prove(n, c, v, false, false, 8);
    }
}

/// Sums over more channels than any instruction set's panel holds at once.
#[test]
fn deep_rows_are_sums_of_their_parts() {
    let (n, c, v) = (35, 6200, 40);
    let small = |seed, shape: &[usize]| random(seed, shape).affine(0.1, 0.0).unwrap();
    let (inputs, targets) = ([small(1, &[n, c]), small(2, &[v, c])], vec![3; n]);
    let wanted = naive(&inputs, &targets);
    let (_, reference) = run(
        Context {
            reference: true,
            ..Context::new(&WorkCounter::default(), Precision::F32)
        },
        &inputs,
        &targets,
        false,
        true,
    );
    for_each_path(|context| {
        let (losses, gradients) = run(context, &inputs, &targets, false, true);
        within("losses", &losses, &wanted, 1e-5);
        within(
            "dh",
            gradients[0].as_ref().unwrap(),
            reference[0].as_ref().unwrap(),
            1e-6,
        );
    });
}

/// A table that is stored in bf16 gives f32 products the same bits as its numbers in f32.
#[test]
fn a_table_in_bf16_is_its_f32() {
    let (n, c, v) = (40, 100, 700);
    let narrow = random(2, &[v, c]).to_dtype(DType::BF16).unwrap();
    let (h, wide) = (random(1, &[n, c]), narrow.to_dtype(DType::F32).unwrap());
    let targets: Vec<u32> = (0..n as u32).map(|i| 17 * i).collect();
    for isa in available() {
        let of = |table: &Tensor| {
            let counter = WorkCounter::default();
            with(isa, || {
                run(
                    Context::new(&counter, Precision::F32),
                    &[h.clone(), table.clone()],
                    &targets,
                    false,
                    true,
                )
            })
        };
        let ((losses, gradients), (others, more)) = (of(&narrow), of(&wide));
        assert_eq!(bits(&losses), bits(&others), "{}", isa.name);
        assert_eq!(
            bits(gradients[0].as_ref().unwrap()),
            bits(more[0].as_ref().unwrap()),
            "{}",
            isa.name
        );
    }
}

/// A table that is packed for good gives the bits of one that is packed as it is read, whatever it was packed for first.
#[test]
fn a_table_that_stays_packed_changes_no_byte() {
    let (n, c, v) = (70, 33, 1500);
    let (h, targets): (_, Vec<u32>) = (random(1, &[n, c]), (0..n as u32).map(|i| 21 * i).collect());
    for table in [
        random(2, &[v, c]),
        random(2, &[v, c]).to_dtype(DType::BF16).unwrap(),
    ] {
        let heads = [
            Weight::frozen(table.clone()),
            Weight::frozen(table).with_packed_cache(),
        ]
        .map(|weight| LmHead { weight });
        for isa in available().iter().chain(available()) {
            for (precision, threads) in [
                (Precision::F32, 1),
                (Precision::Bf16, 2),
                (Precision::F32, 3),
            ] {
                let [want, got] = heads.each_ref().map(|head| {
                    on(threads, || {
                        with(isa, || {
                            let (counter, mut gradients) =
                                (WorkCounter::default(), Gradients::new(0));
                            let context = Context::new(&counter, precision);
                            let passed = head
                                .forward_backward(
                                    context,
                                    &h,
                                    &targets,
                                    SCALE,
                                    true,
                                    &mut gradients,
                                )
                                .unwrap();
                            (
                                passed.0,
                                bits(&passed.1.unwrap()),
                                head.forward(context, &h, &targets).unwrap(),
                            )
                        })
                    })
                });
                assert_eq!(got, want, "{}, {precision:?}", isa.name);
            }
        }
    }
}

/// 6 Mi numbers to a chunk, in whole tiles of 32 rows: with 600 000 words 65 rows are chunks of 32, 32 and 1.
#[test]
fn a_chunk_has_rows_enough() {
    let shape = LmHeadShape {
        loss_tokens: 65,
        hidden: 1,
        vocab: 600_000,
        trained: true,
    };
    let forward: Vec<_> = shape
        .forward_cost(Precision::F32)
        .iter_products()
        .map(|(p, count)| (p.m, p.n, p.k, count))
        .collect();
    assert_eq!(forward, [(1, 600_000, 1, 1), (32, 600_000, 1, 2)]);
}

/// With 280 000 words a chunk is 32 rows (6291456 / 280000, up to whole tiles), and 33 rows are two; row by row there is one each.
#[test]
fn chunks_do_not_show() {
    let (n, v) = (33, 280_000);
    let shape = LmHeadShape {
        loss_tokens: n,
        hidden: 1,
        vocab: v,
        trained: true,
    };
    let inputs = [random(1, &[n, 1]), random(2, &[v, 1])];
    let targets: Vec<u32> = (0..n as u32).map(|i| 4_000 * i).collect();
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let (losses, gradients) = run(context, &inputs, &targets, true, true);
    assert_eq!(counter.take(), shape.backward_cost(Precision::F32, true));
    let head = LmHead {
        weight: weight(&inputs[1], false),
    };
    assert_eq!(
        head.forward(context, &inputs[0], &targets).unwrap(),
        flat(&losses)
    );
    assert_eq!(counter.take(), shape.forward_cost(Precision::F32));
    let dw = flat(gradients[1].as_ref().unwrap());
    for i in [0, 1, 31, 32] {
        let row = [inputs[0].narrow(0, i, 1).unwrap(), inputs[1].clone()];
        let (loss, alone) = run(context, &row, &targets[i..=i], false, true);
        assert_eq!(flat(&losses)[i], flat(&loss)[0]);
        close(
            "dh",
            &gradients[0].as_ref().unwrap().narrow(0, i, 1).unwrap(),
            alone[0].as_ref().unwrap(),
            64,
        );
        // Of a target's row of dW nearly all is its own h times (p - 1) * scale: the other rows' p are 7e-6 each.
        let own = -(SCALE as f32) * flat(&row[0])[0];
        assert!(
            (dw[targets[i] as usize] - own).abs() < 1e-4,
            "row {i}: {} is not {own}",
            dw[targets[i] as usize]
        );
    }
}

/// In bf16 against f64's softmax of the rounded numbers, by every instruction set and any number of threads.
fn prove_bf16([n, c, v]: [usize; 3], size: f64, seed: u64) {
    let targets: Vec<u32> = uniform(seed ^ 3, n)
        .iter()
        .map(|u| (u * v as f32) as u32)
        .collect();
    let rounded = |seed, shape: &[usize]| {
        let x = random(seed, shape).affine(size, 0.0).unwrap();
        x.to_dtype(DType::BF16)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let inputs = [rounded(seed, &[n, c]), rounded(seed ^ 1, &[v, c])];
    let (h, w) = (flat(&inputs[0]), flat(&inputs[1]));
    let dot = |i: usize, word: usize| {
        (0..c)
            .map(|k| f64::from(h[i * c + k]) * f64::from(w[word * c + k]))
            .sum::<f64>()
    };
    let (mut losses, mut dh) = (vec![0.0f64; n], vec![0.0f64; n * c]);
    for (i, target) in targets.iter().enumerate() {
        let z: Vec<f64> = (0..v)
            .map(|word| dot(i, word) - dot(i, *target as usize))
            .collect();
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        losses[i] = sum.ln();
        for (word, z) in z.iter().enumerate() {
            let dz = SCALE * (z.exp() / sum - if word == *target as usize { 1.0 } else { 0.0 });
            (0..c).for_each(|k| dh[i * c + k] += dz * f64::from(w[word * c + k]));
        }
    }
    let largest = w.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let shape = LmHeadShape {
        loss_tokens: n,
        hidden: c,
        vocab: v,
        trained: false,
    };
    let stored = [inputs[0].clone(), inputs[1].to_dtype(DType::BF16).unwrap()];
    for isa in available() {
        let run = |threads: usize| {
            on(threads, || {
                with(isa, || {
                    let counter = WorkCounter::default();
                    FLOPS_ISSUED.set(0);
                    let got = run(
                        Context::new(&counter, Precision::Bf16),
                        &stored,
                        &targets,
                        false,
                        true,
                    );
                    assert_eq!(counter.take(), shape.backward_cost(Precision::Bf16, true));
                    assert!(
                        threads > 1
                            || FLOPS_ISSUED.get()
                                == shape.backward_cost(Precision::Bf16, true).flops(),
                        "{}",
                        isa.name
                    );
                    let head = LmHead {
                        weight: Weight::frozen(stored[1].clone()),
                    };
                    let forward = head
                        .forward(
                            Context::new(&counter, Precision::Bf16),
                            &stored[0],
                            &targets,
                        )
                        .unwrap();
                    assert_eq!(forward, flat(&got.0), "{}: losses alone", isa.name);
                    got
                })
            })
        };
        let (got, gradients) = run(1);
        let got_dh = gradients[0].as_ref().unwrap();
        for threads in [2, 3] {
            let (more, gradients) = run(threads);
            assert_eq!(
                (bits(&got), bits(got_dh)),
                (bits(&more), bits(gradients[0].as_ref().unwrap())),
                "{}",
                isa.name
            );
        }
        for (i, (got, want)) in flat(&got).iter().zip(&losses).enumerate() {
            let within = 2e-5 * (1.0 + want.abs());
            assert!(
                (f64::from(*got) - want).abs() <= within,
                "{}: loss {i} is {got}, not {want}",
                isa.name
            );
        }
        // A probability, and a gradient of a logit, is rounded to bf16: 2^-8 of itself at most, and these add up to 2.
        let within = 2.0 * SCALE * f64::from(largest) / 256.0;
        for (i, (got, want)) in flat(got_dh).iter().zip(&dh).enumerate() {
            assert!(
                (f64::from(*got) - want).abs() <= within,
                "{}: dh {i} is {got}, not {want}",
                isa.name
            );
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn cross_entropy_in_bf16_is_its_definition(n in 1usize..80, c in 1usize..50, v in 1usize..150, seed: u64) {
        prove_bf16([n, c, v], 1.0, seed);
    }
}

/// Several tasks and panels; and losses of up to hundreds of nats, which no sum of e^(z - z[target]) holds.
#[test]
fn losses_in_bf16_of_any_size() {
    prove_bf16([70, 33, 1500], 1.0, 1);
    prove_bf16([40, 40, 200], 4.0, 2);
}

/// Logits of 1e4 and -1e4: a loss of 0 for the winner, of their distance for the loser, and no overflow.
#[test]
fn large_logits_do_not_overflow() {
    let inputs = [
        of(&[100.0, 100.0, 100.0], &[3, 1]),
        of(&[100.0, -100.0, 100.0], &[3, 1]),
    ];
    for_each_path(|context| {
        let (losses, gradients) = run(context, &inputs, &[0, 1, 2], false, true);
        // Two logits tie, so the winners' loss is ln 2 = 0.693 (at 1e4 the next number is 1e-3 away), the loser's 2e4 + ln 2.
        within(
            "losses",
            &losses,
            &of(&[0.693, 20_000.693, 0.693], &[3]),
            2e-3,
        );
        // dz = (1/2, 0, 1/2) - onehot: against W = (100, -100, 100) that is 0, 200 and 0, times the scale.
        within(
            "dh",
            gradients[0].as_ref().unwrap(),
            &of(&[0.0, 75.0, 0.0], &[3, 1]),
            0.1,
        );
    });
}

/// A word of logit 0 and 151 935 of ln 0.3: log sum exp = ln(1 + 151935 * 0.3) = 10.72726. Equal terms are what a running f32 sum
/// rounds the same way each time.
#[test]
fn a_long_sum_of_equal_terms_keeps_its_digits() {
    let mut logits = vec![0.3f32.ln(); 151_936];
    logits[0] = 0.0;
    let head = LmHead {
        weight: Weight::frozen(of(&logits, &[151_936, 1])),
    };
    let counter = WorkCounter::default();
    let losses = head
        .forward(
            Context::new(&counter, Precision::F32),
            &of(&[1.0], &[1, 1]),
            &[0],
        )
        .unwrap();
    let want = (1.0 + 151_935.0 * f64::from(0.3f32.ln()).exp()).ln() as f32;
    assert!(
        (losses[0] - want).abs() < 2e-6,
        "{} is not {want}",
        losses[0]
    );
    assert!((want - 10.72726).abs() < 1e-4);
}

/// Without rows there is no loss, no dh and no gradient of W, and no work.
#[test]
fn no_rows_are_no_work() {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let head = LmHead {
        weight: weight(&random(1, &[5, 2]), true),
    };
    let h = Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
    let mut gradients = Gradients::new(1);
    assert_eq!(head.forward(context, &h, &[]).unwrap(), [0.0f32; 0]);
    let (losses, dh) = head
        .forward_backward(context, &h, &[], 1.0, true, &mut gradients)
        .unwrap();
    assert_eq!(
        (losses.len(), dh.is_none(), gradients.get(0).is_none()),
        (0, true, true)
    );
    assert_eq!(counter.take().flops(), 0);
}
