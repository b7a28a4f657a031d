//! Attention: blocks, segments, windows and grouped heads against the full square.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{
    Attention, Context, Segments, attention_backward_cost, attention_decode_cost,
    attention_forward_cost,
};
use super::{Pair, Passed, cases, close, flat, for_each_path, named, of, random, with, within};
use crate::work::{Precision, WorkCounter};

/// Softmax over the full (N, N) square: 1 where i sees j, 0 elsewhere. Logits of a test are small, so exp needs no shift.
fn naive(attention: &Attention, lengths: &[usize], inputs: &[Tensor]) -> Tensor {
    let (d, n) = (attention.head_dim, lengths.iter().sum::<usize>());
    let segment: Vec<usize> = lengths
        .iter()
        .enumerate()
        .flat_map(|(i, length)| vec![i; *length])
        .collect();
    let window = attention.window.unwrap_or(n);
    let sees = |i: usize, j: usize| {
        f64::from(u8::from(
            segment[i] == segment[j] && j <= i && i - j < window,
        ))
    };
    let mask: Vec<f64> = (0..n * n).map(|at| sees(at / n, at % n)).collect();
    let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu).unwrap();
    let heads = |x: &Tensor, heads: usize| {
        let shape = (n, heads, attention.heads / heads, d);
        let x = x
            .reshape((n, heads, 1, d))
            .unwrap()
            .broadcast_as(shape)
            .unwrap();
        x.reshape((n, attention.heads, d))
            .unwrap()
            .transpose(0, 1)
            .unwrap()
            .contiguous()
            .unwrap()
    };
    let (q, k, v) = (
        heads(&inputs[0], attention.heads),
        heads(&inputs[1], attention.kv_heads),
        heads(&inputs[2], attention.kv_heads),
    );
    let scores = q
        .matmul(&k.transpose(1, 2).unwrap().contiguous().unwrap())
        .unwrap();
    let e = (scores / (d as f64).sqrt())
        .unwrap()
        .exp()
        .unwrap()
        .broadcast_mul(&mask)
        .unwrap();
    let p = e.broadcast_div(&e.sum_keepdim(2).unwrap()).unwrap();
    p.matmul(&v)
        .unwrap()
        .transpose(0, 1)
        .unwrap()
        .reshape((n, attention.heads * d))
        .unwrap()
}

/// q, k, v and dy.
fn inputs(attention: &Attention, tokens: usize, seed: u64) -> ([Tensor; 3], Tensor) {
    let wide = |seed: u64, heads: usize| random(seed, &[tokens, heads * attention.head_dim]);
    let x = [
        wide(seed, attention.heads),
        wide(seed ^ 1, attention.kv_heads),
        wide(seed ^ 2, attention.kv_heads),
    ];
    (x, wide(seed ^ 3, attention.heads))
}

fn run(
    attention: &Attention,
    context: Context<'_>,
    x: &[Tensor],
    dy: &Tensor,
    lengths: &[usize],
) -> Passed {
    let segments = Segments::from_lengths(lengths.iter().copied());
    let (y, saved) = attention
        .forward(context, x[0].clone(), x[1].clone(), x[2].clone(), &segments)
        .unwrap();
    let (dq, dk, dv) = attention.backward(context, dy, &saved, &segments).unwrap();
    (y, vec![Some(dq), Some(dk), Some(dv)])
}

fn prove(attention: Attention, lengths: &[usize], seed: u64) {
    let d = attention.head_dim;
    let (inputs, dy) = inputs(&attention, lengths.iter().sum(), seed);
    Pair {
        inputs: &inputs,
        dy: &dy,
        op: |context: Context<'_>, x: &[Tensor], dy: &Tensor| {
            run(&attention, context, x, dy, lengths)
        },
        naive: |inputs: &[Tensor]| naive(&attention, lengths, inputs),
        cost: attention_forward_cost(&attention, lengths)
            + attention_backward_cost(&attention, lengths),
        // Sums over a head's channels, a segment's tokens and a key head's group, their errors of either sign.
        roundings: d + lengths.iter().max().unwrap() + attention.heads / attention.kv_heads + 32,
    }
    .prove();
}

/// In bf16 every instruction set gives what the reference gives for the same rounded inputs, but for what it rounds on the way.
fn prove_bf16(attention: Attention, lengths: &[usize], seed: u64) {
    let (inputs, dy) = inputs(&attention, lengths.iter().sum(), seed);
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::Bf16);
    let want = named(run(
        &attention,
        Context {
            reference: true,
            ..fused
        },
        &inputs,
        &dy,
        lengths,
    ));
    for isa in available() {
        let got = named(with(isa, || run(&attention, fused, &inputs, &dy, lengths)));
        assert_eq!(
            got[0].1.as_ref().unwrap().dtype(),
            DType::BF16,
            "the next layer multiplies it in bf16"
        );
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
            let size = flat(want).iter().fold(1.0f32, |a, b| a.max(b.abs()));
            // Rounding is off by 2^-8 at most, at random. The output is rounded once more; blocks round both factors of what they
            // multiply: P and dO, dS and Q or K.
            within(&format!("{name}, {}", isa.name), got, want, size / 128.0);
        }
    }
}

/// Heads of one channel, of odd numbers of them, and of more than one tile.
fn head_dims() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..10, 31usize..70]
}

prop_compose! {
    fn attentions()(
        kv_heads in 1usize..4,
        group in 1usize..4,
        head_dim in head_dims(),
        window in prop::option::of(1usize..80),
    ) -> Attention {
        Attention { heads: kv_heads * group, kv_heads, head_dim, window }
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn attention_is_the_full_square(attention in attentions(), lengths in prop::collection::vec(1usize..100, 1..5), seed: u64) {
        prove(attention, &lengths, seed);
    }

    #[test]
    fn attention_in_bf16_is_the_reference(
        attention in attentions(), lengths in prop::collection::vec(1usize..100, 1..5), seed: u64,
    ) {
        prove_bf16(attention, &lengths, seed);
    }
}

/// Around the block of 64 rows and the run of 256 keys, alone and behind one another, with windows below, at and above them.
#[test]
fn block_edges_do_not_show() {
    let attention = |window| Attention {
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        window,
    };
    for lengths in [
        &[1][..],
        &[63],
        &[64],
        &[65],
        &[130],
        &[257],
        &[1, 64, 1, 65, 63, 1],
    ] {
        prove(attention(None), lengths, 11);
    }
    for window in [1, 16, 63, 64, 65, 1000] {
        prove(attention(Some(window)), &[130, 1], 12);
    }
    for window in [1, 63, 127, 128, 129, 200, 255, 256, 257] {
        prove(attention(Some(window)), &[300], 13);
    }
}

/// Keys of long segments go back in several parts, whose dQ are summed; with windows that end before, in and behind the next part.
#[test]
fn parts_of_the_keys_do_not_show() {
    let attention = |window| Attention {
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        window,
    };
    for (window, lengths) in [
        (None, &[513][..]),
        (Some(40), &[1100]),
        (Some(600), &[3, 1030, 700]),
    ] {
        prove(attention(window), lengths, 14);
        prove_bf16(attention(window), lengths, 15);
    }
}

/// A segment gives the same bytes alone and between others: nothing is seen across its ends.
#[test]
fn a_segment_knows_nothing_of_its_neighbours() {
    let attention = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        window: None,
    };
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let (lengths, middle) = ([70, 66, 3], (70, 66));
    let inputs = [
        random(1, &[139, 32]),
        random(2, &[139, 16]),
        random(3, &[139, 16]),
        random(4, &[139, 32]),
    ];
    let run = |inputs: [Tensor; 4], segments: Segments| {
        let [q, k, v, dy] = inputs;
        let (y, saved) = attention.forward(context, q, k, v, &segments).unwrap();
        let (dq, dk, dv) = attention.backward(context, &dy, &saved, &segments).unwrap();
        [y, dq, dk, dv]
    };
    let cut = |x: &Tensor| x.narrow(0, middle.0, middle.1).unwrap();
    for isa in available() {
        let together = with(isa, || run(inputs.clone(), Segments::from_lengths(lengths)));
        let alone = with(isa, || {
            run(
                inputs.each_ref().map(cut),
                Segments::from_lengths([middle.1]),
            )
        });
        for (together, alone) in together.iter().zip(&alone) {
            assert_eq!(flat(&cut(together)), flat(alone), "{}", isa.name);
        }
    }
}

/// Logits of 4e4, far beyond exp's range in f32: the row's largest wins, and a tie is shared.
#[test]
fn large_logits_do_not_overflow() {
    let attention = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        window: None,
    };
    let (q, k) = (
        of(&[200.0, 200.0, -200.0, 200.0], &[4, 1]),
        of(&[-200.0, 200.0, 0.0, 200.0], &[4, 1]),
    );
    let v = of(&[1.0, 2.0, 4.0, 8.0], &[4, 1]);
    let segments = Segments::from_lengths([4]);
    for_each_path(|context| {
        let (y, saved) = attention
            .forward(context, q.clone(), k.clone(), v.clone(), &segments)
            .unwrap();
        // Row 0 sees key 0 alone; row 1 prefers key 1; row 2, negative, prefers key 0; row 3 is torn between keys 1 and 3.
        assert_eq!(flat(&y), [1.0, 2.0, 1.0, 5.0]);
        let (dq, dk, dv) = attention
            .backward(context, &of(&[1.0; 4], &[4, 1]), &saved, &segments)
            .unwrap();
        // dp = v, so ds = p (v - y): row 3 alone has two probabilities, 0.5 (2 - 5) and 0.5 (8 - 5); dk = ds q, dq = sum of ds k = 0.
        // The lse is 4e4, whose neighbour is 2^-8 away: p is good to 0.4 %, and so are dv and dk.
        within("dv", &dv, &of(&[2.0, 1.5, 0.0, 0.5], &[4, 1]), 4e-3);
        within("dk", &dk, &of(&[0.0, -300.0, 0.0, 300.0], &[4, 1]), 1.2);
        within("dq", &dq, &of(&[0.0; 4], &[4, 1]), 2.4);
    });
}

/// Decoding token by token over a cache equals the forward pass over the whole, window or not, in one run of keys or several.
#[test]
fn decoding_continues_the_forward_pass() {
    for (tokens, window, read) in [
        (9, None, 0..9),
        (9, Some(3), 0..9),
        (600, None, 254..258),
        (600, Some(300), 597..600),
    ] {
        let attention = Attention {
            heads: 6,
            kv_heads: 2,
            head_dim: 4,
            window,
        };
        let (q, k, v) = (
            random(1, &[tokens, 24]),
            random(2, &[tokens, 8]),
            random(3, &[tokens, 8]),
        );
        for_each_path(|context| {
            let segments = Segments::from_lengths([tokens]);
            let (whole, _) = attention
                .forward(context, q.clone(), k.clone(), v.clone(), &segments)
                .unwrap();
            context.counter.take();
            for t in read.clone() {
                let (row, seen) = (q.narrow(0, t, 1).unwrap(), |x: &Tensor| {
                    x.narrow(0, 0, t + 1).unwrap()
                });
                super::FLOPS_ISSUED.set(0);
                let y = attention
                    .decode(context, &row, &seen(&k), &seen(&v))
                    .unwrap();
                // Averages of values below 1 over as many keys as are seen, with scores of four products each.
                close(
                    "token",
                    &y,
                    &whole.narrow(0, t, 1).unwrap(),
                    32 + (t + 1).min(window.unwrap_or(tokens)),
                );
                let counted = context.counter.take();
                assert_eq!(counted, attention_decode_cost(&attention, t + 1));
                // Two products of (1, 4) by (4, keys) in each of six heads.
                let keys = (t + 1).min(window.unwrap_or(tokens)) as u64;
                assert_eq!(
                    (counted.flops(), super::FLOPS_ISSUED.get()),
                    (2 * 6 * 2 * 4 * keys, counted.flops())
                );
            }
        });
    }
}

/// Which thread took which keys leaves no trace.
#[test]
fn decoded_bytes_do_not_depend_on_the_threads() {
    let attention = Attention {
        heads: 6,
        kv_heads: 3,
        head_dim: 5,
        window: None,
    };
    let (q, k, v) = (
        random(1, &[1, 30]),
        random(2, &[1000, 15]),
        random(3, &[1000, 15]),
    );
    let bytes = |threads: usize| {
        super::on(threads, || {
            let counter = WorkCounter::default();
            super::bits(
                &attention
                    .decode(Context::new(&counter, Precision::F32), &q, &k, &v)
                    .unwrap(),
            )
        })
    };
    assert_eq!(bytes(1), bytes(2));
    assert_eq!(bytes(1), bytes(3));
}

/// The reference runs on what the fused pass refuses: a tensor that is not contiguous.
#[test]
fn a_gradient_may_be_a_view() {
    let attention = Attention {
        heads: 2,
        kv_heads: 2,
        head_dim: 2,
        window: None,
    };
    let segments = Segments::from_lengths([5]);
    let [q, k, v] = [1, 2, 3].map(|seed| random(seed, &[5, 4]));
    let dy = random(4, &[5, 8]).narrow(1, 2, 4).unwrap();
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let (_, saved) = attention.forward(context, q, k, v, &segments).unwrap();
    let (view, copy) = (
        attention.backward(context, &dy, &saved, &segments).unwrap(),
        attention
            .backward(context, &dy.contiguous().unwrap(), &saved, &segments)
            .unwrap(),
    );
    assert_eq!(
        (flat(&view.0), flat(&view.1), flat(&view.2)),
        (flat(&copy.0), flat(&copy.1), flat(&copy.2))
    );
    assert_eq!(view.0.dtype(), DType::F32);
}
