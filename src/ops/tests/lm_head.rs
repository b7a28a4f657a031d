//! The LM head and its cross-entropy, by chunks of rows and of the vocabulary.

use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{Context, FLOPS_ISSUED, Gradients, LmHead, LmHeadShape, Weight};
use super::{
    Implementation, Outputs, Pair, bits, cases, close, flat, for_each_path, indices, on, random,
    tensor, trained, within,
};
use crate::error::{Error, Result};
use crate::work::{Precision, WorkCounter};

const SCALE: f64 = 0.375;

fn head(weight: &Tensor, trains: bool) -> LmHead {
    let weight = if trains {
        trained(weight)
    } else {
        Weight::frozen(weight.clone())
    };
    LmHead {
        bias: None,
        weight,
        softcap: None,
        lora: None,
    }
}

fn run(
    context: Context<'_>,
    inputs: &[Tensor],
    targets: &[u32],
    trains: bool,
    input_gradient: bool,
) -> Result<Outputs> {
    run_head(
        context,
        &head(&inputs[1], trains),
        &inputs[0],
        targets,
        input_gradient,
    )
}

fn run_head(
    context: Context<'_>,
    head: &LmHead,
    h: &Tensor,
    targets: &[u32],
    input_gradient: bool,
) -> Result<Outputs> {
    let mut gradients = Gradients::new(1);
    let (losses, dh) =
        head.forward_backward(context, h, targets, SCALE, input_gradient, &mut gradients)?;
    let losses = tensor(&losses, &[targets.len()]);
    Ok((losses, vec![dh, gradients.get(0).cloned()]))
}

/// log sum exp of each row less its target's logit.
fn naive(inputs: &[Tensor], targets: &[u32], softcap: Option<f64>) -> candle_core::Result<Tensor> {
    let mut logits = inputs[0].matmul(&inputs[1].t()?)?;
    if let Some(c) = softcap {
        logits = ((logits / c)?.tanh()? * c)?;
    }
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu)?;
    ((sum.log()? + max)? - logits.gather(&index, 1)?)?.squeeze(1)
}

fn shape(loss_tokens: usize, hidden: usize, vocab: usize, trained: bool) -> LmHeadShape {
    LmHeadShape {
        bias: false,
        bias_trained: false,
        loss_tokens,
        hidden,
        vocab,
        stored: None,
        trained,
        token_rows: 0,
        softcap: false,
        lora: None,
        dropout: false,
    }
}

fn prove(n: usize, c: usize, v: usize, trained: bool, input_gradient: bool, seed: u64) {
    prove_capped([n, c, v], None, trained, input_gradient, seed);
}

fn prove_capped(
    [n, c, v]: [usize; 3],
    softcap: Option<f64>,
    trained: bool,
    input_gradient: bool,
    seed: u64,
) {
    let targets = indices(seed ^ 3, n, v);
    Pair {
        inputs: &[random(seed, &[n, c]), random(seed ^ 1, &[v, c])],
        dy: &tensor(&vec![SCALE as f32; n], &[n]),
        op: |context: Context<'_>, inputs: &[Tensor], _: &Tensor| {
            let head = LmHead {
                bias: None,
                softcap,
                ..head(&inputs[1], trained)
            };
            run_head(context, &head, &inputs[0], &targets, input_gradient)
        },
        naive: |inputs: &[Tensor]| naive(inputs, &targets, softcap),
        cost: LmHeadShape {
            softcap: softcap.is_some(),
            ..shape(n, c, v, trained)
        }
        .backward_cost(Precision::F32, input_gradient),
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

    /// Logits of up to 4 against caps around them, over several vocabulary chunks.
    #[test]
    fn capped_cross_entropy_is_its_definition(
        n in 1usize..60, c in 1usize..20, v in 1usize..1200, softcap in 0.5..6.0, trained: bool, seed: u64,
    ) {
        prove_capped([n, c, v], Some(softcap), trained, true, seed);
    }
}

/// c tanh(z / c) of z = 1, 2 and -100 with c = 2.
#[test]
fn logits_are_capped() {
    let head = LmHead {
        bias: None,
        softcap: Some(2.0),
        ..head(&tensor(&[1.0, 2.0, -100.0], &[3, 1]), false)
    };
    for_each_path(|context| {
        let logits = head.logits(context, &tensor(&[1.0], &[1, 1])).unwrap();
        let want = tensor(&[0.924_234_3, 1.523_188_3, -2.0], &[1, 3]);
        within("logits", &logits, &want, 1e-6);
    });
}

/// Several vocabulary chunks, each row's largest logit in any of them, and several blocks of rows.
#[test]
fn vocabulary_chunks_do_not_show() {
    for (n, c, v) in [(1, 1, 1025), (70, 33, 1500), (200, 16, 1024)] {
        prove(n, c, v, false, true, 7);
        prove(n, c, v, false, false, 8);
    }
}

/// Sums over more channels than any instruction set's panel holds at once.
#[test]
fn deep_rows_are_sums_of_their_parts() -> Result<()> {
    let (n, c, v) = (35, 6200, 40);
    let small = |seed, shape: &[usize]| random(seed, shape).affine(0.1, 0.0);
    let inputs = [small(1, &[n, c])?, small(2, &[v, c])?];
    let targets = vec![3; n];
    let want = naive(&inputs, &targets, None)?;
    let run = |context: Context<'_>| run(context, &inputs, &targets, false, true).unwrap();
    let (_, reference) = Implementation::Reference.run(Precision::F32, run);
    for_each_path(|context| {
        let (losses, gradients) = run(context);
        within("losses", &losses, &want, 1e-5);
        let (dh, want) = (
            gradients[0].as_ref().unwrap(),
            reference[0].as_ref().unwrap(),
        );
        within("dh", dh, want, 1e-6);
    });
    Ok(())
}

/// A table that is stored in bf16 gives f32 products the same bits as its elements in f32.
#[test]
fn a_bf16_table_equals_its_f32_copy() -> Result<()> {
    let (n, c, v) = (40, 100, 700);
    let narrow = random(2, &[v, c]).to_dtype(DType::BF16)?;
    let wide = narrow.to_dtype(DType::F32)?;
    let h = random(1, &[n, c]);
    let targets: Vec<u32> = (0..n as u32).map(|i| 17 * i).collect();
    for isa in available() {
        let run = |table: &Tensor| {
            let inputs = [h.clone(), table.clone()];
            let run = |context: Context<'_>| run(context, &inputs, &targets, false, true);
            let (losses, gradients) = Implementation::Fused(isa).run(Precision::F32, run)?;
            Ok::<_, Error>((bits(&losses), bits(gradients[0].as_ref().unwrap())))
        };
        assert_eq!(run(&narrow)?, run(&wide)?, "{}", isa.name);
    }
    Ok(())
}

/// A table with cached packed forms gives the bits of one that is packed as it is read, whatever it
/// was packed for first.
#[test]
fn cached_packing_changes_no_byte() -> Result<()> {
    let (n, c, v) = (70, 33, 1500);
    let h = random(1, &[n, c]);
    let targets: Vec<u32> = (0..n as u32).map(|i| 21 * i).collect();
    let wide = random(2, &[v, c]);
    let narrow = wide.to_dtype(DType::BF16)?;
    let ways = [
        (Precision::F32, 1),
        (Precision::Bf16, 2),
        (Precision::F32, 3),
    ];
    for table in [wide, narrow] {
        let plain = Weight::frozen(table);
        let cached = plain.clone().with_packed_cache();
        let heads = [plain, cached].map(|weight| LmHead {
            bias: None,
            weight,
            softcap: Some(3.0),
            lora: None,
        });
        for isa in available().iter().chain(available()) {
            for (precision, threads) in ways {
                let run = |head: &LmHead| {
                    let run = |context: Context<'_>| -> Result<_> {
                        let mut gradients = Gradients::new(0);
                        let (losses, dh) = head.forward_backward(
                            context,
                            &h,
                            &targets,
                            SCALE,
                            true,
                            &mut gradients,
                        )?;
                        let alone = head.forward(context, &h, &targets)?;
                        Ok((losses, bits(&dh.unwrap()), alone))
                    };
                    let fused = Implementation::Fused(isa);
                    on(threads, || fused.run(precision, run)).unwrap()
                };
                let [want, got] = heads.each_ref().map(run);
                assert_eq!(got, want, "{}, {precision:?}", isa.name);
            }
        }
    }
    Ok(())
}

/// 6 Mi logits to a chunk, in whole tiles of 32 rows: with a vocabulary of 600 000, 65 rows are
/// chunks of 32, 32 and 1.
#[test]
fn a_chunk_has_rows_enough() {
    let cost = shape(65, 1, 600_000, true).forward_cost(Precision::F32);
    let products = cost.iter_products();
    let products: Vec<_> = products.map(|(p, count)| (p.m, p.n, p.k, count)).collect();
    assert_eq!(products, [(1, 600_000, 1, 1), (32, 600_000, 1, 2)]);
}

/// With a vocabulary of 280 000 a chunk is 32 rows (6291456 / 280000, up to whole tiles), and 33
/// rows are two; row by row there is one each.
#[test]
fn row_chunks_do_not_show() -> Result<()> {
    let (n, v) = (33, 280_000);
    let shape = shape(n, 1, v, true);
    let inputs = [random(1, &[n, 1]), random(2, &[v, 1])];
    let targets: Vec<u32> = (0..n as u32).map(|i| 4_000 * i).collect();
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let (losses, gradients) = run(context, &inputs, &targets, true, true)?;
    let [dh, dw] = [0, 1].map(|i| gradients[i].as_ref().unwrap());
    assert_eq!(counter.take(), shape.backward_cost(Precision::F32, true));
    let alone = head(&inputs[1], false).forward(context, &inputs[0], &targets)?;
    assert_eq!(alone, flat(&losses));
    assert_eq!(counter.take(), shape.forward_cost(Precision::F32));
    for i in [0, 1, 31, 32] {
        let row = [inputs[0].narrow(0, i, 1)?, inputs[1].clone()];
        let (loss, alone) = run(context, &row, &targets[i..=i], false, true)?;
        assert_eq!(flat(&losses)[i], flat(&loss)[0]);
        close("dh", &dh.narrow(0, i, 1)?, alone[0].as_ref().unwrap(), 64);
        // Of a target's row of dW nearly all is its own h times (p - 1) * scale: the other rows' p
        // are 7e-6 each.
        let want = -(SCALE as f32) * flat(&row[0])[0];
        let got = flat(dw)[targets[i] as usize];
        assert!((got - want).abs() < 1e-4, "row {i}: {got} is not {want}");
    }
    Ok(())
}

/// Losses, and dh of `SCALE` times their sum, in f64.
fn softmax_f64(h: &[f32], w: &[f32], targets: &[u32], c: usize) -> (Vec<f64>, Vec<f64>) {
    let dot = |h: &[f32], w: &[f32]| -> f64 {
        h.iter()
            .zip(w)
            .map(|(h, w)| f64::from(*h) * f64::from(*w))
            .sum()
    };
    let mut losses = Vec::new();
    let mut dh = vec![0.0f64; h.len()];
    for ((h, dh), &target) in h.chunks(c).zip(dh.chunks_mut(c)).zip(targets) {
        let target_logit = dot(h, &w[target as usize * c..][..c]);
        let z: Vec<f64> = w.chunks(c).map(|w| dot(h, w) - target_logit).collect();
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        losses.push(sum.ln());
        for (token, (z, w)) in z.iter().zip(w.chunks(c)).enumerate() {
            let one = if token == target as usize { 1.0 } else { 0.0 };
            let dz = SCALE * (z.exp() / sum - one);
            dh.iter_mut()
                .zip(w)
                .for_each(|(dh, w)| *dh += dz * f64::from(*w));
        }
    }
    (losses, dh)
}

/// In bf16 against f64's softmax of the rounded inputs, by every instruction set and any number of
/// threads.
fn prove_bf16([n, c, v]: [usize; 3], size: f64, seed: u64) -> Result<()> {
    let targets = indices(seed ^ 3, n, v);
    let bf16 = |seed, shape: &[usize]| random(seed, shape).affine(size, 0.0)?.to_dtype(DType::BF16);
    let (h, w) = (
        bf16(seed, &[n, c])?.to_dtype(DType::F32)?,
        bf16(seed ^ 1, &[v, c])?,
    );
    let (losses, dh) = softmax_f64(&flat(&h), &flat(&w), &targets, c);
    let magnitude = flat(&w).iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let cost = shape(n, c, v, false).backward_cost(Precision::Bf16, true);
    let inputs = [h, w];
    for isa in available() {
        let run = |context: Context<'_>| {
            FLOPS_ISSUED.set(0);
            let (losses, mut gradients) = run(context, &inputs, &targets, false, true)?;
            let issued = FLOPS_ISSUED.get();
            assert_eq!(context.counter.take(), cost);
            let alone = head(&inputs[1], false).forward(context, &inputs[0], &targets)?;
            assert_eq!(alone, flat(&losses), "{}: losses alone", isa.name);
            let dh = gradients.remove(0).unwrap();
            Ok::<_, Error>((flat(&losses), flat(&dh), issued))
        };
        let run = |threads| {
            on(threads, || {
                Implementation::Fused(isa).run(Precision::Bf16, run)
            })
        };
        let (got, got_dh, issued) = run(1)?;
        assert_eq!(issued, cost.flops(), "{}", isa.name);
        for threads in [2, 3] {
            let (more, more_dh, _) = run(threads)?;
            assert_eq!((&got, &got_dh), (&more, &more_dh), "{}", isa.name);
        }
        for (i, (got, want)) in got.iter().zip(&losses).enumerate() {
            let off = (f64::from(*got) - want).abs();
            let within = 2e-5 * (1.0 + want.abs());
            assert!(off <= within, "{}: loss {i} is {got}, not {want}", isa.name);
        }
        // A probability, and a gradient of a logit, is rounded to bf16: 2^-8 of itself at most, and
        // these add up to 2.
        let within = 2.0 * SCALE * f64::from(magnitude) / 256.0;
        for (i, (got, want)) in got_dh.iter().zip(&dh).enumerate() {
            let off = (f64::from(*got) - want).abs();
            assert!(off <= within, "{}: dh {i} is {got}, not {want}", isa.name);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn cross_entropy_in_bf16_is_its_definition(n in 1usize..80, c in 1usize..50, v in 1usize..150, seed: u64) {
        prove_bf16([n, c, v], 1.0, seed)?;
    }
}

/// Several tasks and panels; and losses of up to hundreds of nats, which no sum of e^(z -
/// z[target]) holds.
#[test]
fn losses_in_bf16_of_any_size() -> Result<()> {
    prove_bf16([70, 33, 1500], 1.0, 1)?;
    prove_bf16([40, 40, 200], 4.0, 2)
}

/// Logits of 1e4 and -1e4: a loss of 0 for the winner, of their distance for the loser, and no
/// overflow.
#[test]
fn large_logits_do_not_overflow() {
    let column = |values: [f32; 3]| tensor(&values, &[3, 1]);
    let inputs = [
        column([100.0, 100.0, 100.0]),
        column([100.0, -100.0, 100.0]),
    ];
    for_each_path(|context| {
        let (losses, gradients) = run(context, &inputs, &[0, 1, 2], false, true).unwrap();
        // Two logits tie, so the winners' loss is ln 2 = 0.693 (at 1e4 the next f32 is 1e-3 away),
        // the loser's 2e4 + ln 2.
        within(
            "losses",
            &losses,
            &tensor(&[0.693, 20_000.693, 0.693], &[3]),
            2e-3,
        );
        // dz = (1/2, 0, 1/2) - onehot: against W = (100, -100, 100) that is 0, 200 and 0, times the
        // scale.
        let dh = gradients[0].as_ref().unwrap();
        within("dh", dh, &column([0.0, 75.0, 0.0]), 0.1);
    });
}

/// A token of logit 0 and 151 935 of ln 0.3: log sum exp = ln(1 + 151935 * 0.3) = 10.72726. Equal
/// terms are what a running f32 sum rounds the same way each time.
#[test]
fn a_long_sum_of_equal_terms_keeps_its_digits() -> Result<()> {
    let mut logits = vec![0.3f32.ln(); 151_936];
    logits[0] = 0.0;
    let head = head(&tensor(&logits, &[151_936, 1]), false);
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let losses = head.forward(context, &tensor(&[1.0], &[1, 1]), &[0])?;
    let want = (1.0 + 151_935.0 * f64::from(0.3f32.ln()).exp()).ln() as f32;
    assert!(
        (losses[0] - want).abs() < 2e-6,
        "{} is not {want}",
        losses[0]
    );
    assert!((want - 10.72726).abs() < 1e-4);
    Ok(())
}

/// Without rows there is no loss, no dh and no gradient of W, and no work.
#[test]
fn no_rows_are_no_work() -> Result<()> {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let head = head(&random(1, &[5, 2]), true);
    let h = Tensor::zeros((0, 2), DType::F32, &Device::Cpu)?;
    let mut gradients = Gradients::new(1);
    assert_eq!(head.forward(context, &h, &[])?, [0.0f32; 0]);
    let (losses, dh) = head.forward_backward(context, &h, &[], 1.0, true, &mut gradients)?;
    assert!(losses.is_empty() && dh.is_none() && gradients.get(0).is_none());
    assert_eq!(counter.take().flops(), 0);
    Ok(())
}
