//! Attention: blocks, segments, windows and grouped heads against the full square.

use candle_core::{DType, Device, Tensor};
use candle_nn::kv_cache::ConcatKvCache;
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{
    Attention, Context, Segments, attention_backward_cost, attention_decode_cost,
    attention_forward_cost,
};
use super::{
    FLOPS_ISSUED, Implementation, Outputs, Pair, attention, bits, cases, close, flat,
    for_each_path, largest, named, on, random, tensor, with, within,
};
use crate::error::Result;
use crate::work::{Precision, WorkCounter};

/// Softmax over the full (N, N) square: 1 where i sees j, 0 elsewhere. Logits of a test are small,
/// so exp needs no shift.
fn naive(
    attention: &Attention,
    lengths: &[usize],
    inputs: &[Tensor],
) -> candle_core::Result<Tensor> {
    let (d, n) = (attention.head_dim, lengths.iter().sum::<usize>());
    let segments = lengths.iter().enumerate();
    let segment: Vec<usize> = segments.flat_map(|(i, length)| vec![i; *length]).collect();
    let window = attention.window.unwrap_or(n);
    let sees = |i: usize, j: usize| {
        let before = j <= i || !attention.causal;
        segment[i] == segment[j] && before && i.abs_diff(j) < window
    };
    let mask = (0..n * n).map(|at| f64::from(u8::from(sees(at / n, at % n))));
    let mask = Tensor::from_iter(mask, &Device::Cpu)?.reshape((n, n))?;
    let heads = |x: &Tensor, heads: usize| {
        let x = x.reshape((n, heads, 1, d))?;
        let x = x.broadcast_as((n, heads, attention.heads / heads, d))?;
        x.reshape((n, attention.heads, d))?
            .transpose(0, 1)?
            .contiguous()
    };
    let q = heads(&inputs[0], attention.heads)?;
    let k = heads(&inputs[1], attention.kv_heads)?;
    let v = heads(&inputs[2], attention.kv_heads)?;
    let mut scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (d as f64).sqrt())?;
    if let Some(c) = attention.softcap {
        scores = ((scores / c)?.tanh()? * c)?;
    }
    let e = scores.exp()?.broadcast_mul(&mask)?;
    let p = e.broadcast_div(&e.sum_keepdim(2)?)?;
    p.matmul(&v)?
        .transpose(0, 1)?
        .reshape((n, attention.heads * d))
}

/// q, k, v and dy.
fn inputs(attention: &Attention, tokens: usize, seed: u64) -> ([Tensor; 3], Tensor) {
    let wide = |seed: u64, heads: usize| random(seed, &[tokens, heads * attention.head_dim]);
    let q = wide(seed, attention.heads);
    let k = wide(seed ^ 1, attention.kv_heads);
    let v = wide(seed ^ 2, attention.kv_heads);
    ([q, k, v], wide(seed ^ 3, attention.heads))
}

fn run(
    attention: &Attention,
    context: Context<'_>,
    x: &[Tensor],
    dy: &Tensor,
    lengths: &[usize],
) -> Result<Outputs> {
    let segments = Segments::from_lengths(lengths.iter().copied());
    let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
    let (y, saved) = attention.forward(context, q, k, v, &segments)?;
    let (dq, dk, dv) = attention.backward(context, dy, &saved, &segments)?;
    Ok((y, vec![Some(dq), Some(dk), Some(dv)]))
}

fn prove(attention: Attention, lengths: &[usize], seed: u64) {
    let (inputs, dy) = inputs(&attention, lengths.iter().sum(), seed);
    let longest = lengths.iter().max().unwrap();
    Pair {
        inputs: &inputs,
        dy: &dy,
        op: |context: Context<'_>, x: &[Tensor], dy: &Tensor| {
            run(&attention, context, x, dy, lengths)
        },
        naive: |inputs: &[Tensor]| naive(&attention, lengths, inputs),
        cost: attention_forward_cost(&attention, lengths)
            + attention_backward_cost(&attention, lengths),
        // Sums over a head's channels, a segment's tokens and a key head's group, their errors of
        // either sign.
        roundings: attention.head_dim + longest + attention.heads / attention.kv_heads + 32,
    }
    .prove();
}

/// In bf16 every implementation gives what the reference gives for the same rounded inputs, within
/// its roundings.
fn prove_bf16(attention: Attention, lengths: &[usize], seed: u64) {
    let (inputs, dy) = inputs(&attention, lengths.iter().sum(), seed);
    let run = |context: Context<'_>| run(&attention, context, &inputs, &dy, lengths).unwrap();
    let want = named(Implementation::Reference.run(Precision::Bf16, run));
    for implementation in Implementation::all() {
        let got = named(implementation.run(Precision::Bf16, run));
        if let Implementation::Fused(_) = implementation {
            let dtype = got[0].1.as_ref().unwrap().dtype();
            assert_eq!(dtype, DType::BF16, "the next layer multiplies it in bf16");
        }
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let (got, want) = (got.as_ref().unwrap(), want.as_ref().unwrap());
            // Rounding is off by 2^-8 at most, at random. The output is rounded once more; tiles
            // round both factors of what they multiply: P and dO, dS and Q or K.
            let name = format!("{name}, {}", implementation.name());
            within(&name, got, want, largest(want) / 128.0);
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
        causal: bool,
        window in prop::option::of(1usize..80),
        softcap in prop::option::of(0.2..3.0),
    ) -> Attention {
        Attention { causal, window, softcap, ..attention(kv_heads * group, kv_heads, head_dim) }
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

/// Around the query block of 64 rows and the key block of 256 keys, alone and behind one another,
/// with windows below, at and above them.
#[test]
fn block_edges_do_not_show() {
    let attention = |causal, window| Attention {
        causal,
        window,
        ..attention(2, 1, 4)
    };
    let many: &[usize] = &[1, 64, 1, 65, 63, 1];
    for lengths in [&[1][..], &[63], &[64], &[65], &[130], &[257], many] {
        prove(attention(true, None), lengths, 11);
    }
    for lengths in [&[65][..], &[257], many] {
        prove(attention(false, None), lengths, 11);
    }
    for window in [1, 16, 63, 64, 65, 1000] {
        prove(attention(true, Some(window)), &[130, 1], 12);
        prove(attention(false, Some(window)), &[130, 1], 12);
    }
    for window in [1, 63, 127, 128, 129, 200, 255, 256, 257] {
        prove(attention(true, Some(window)), &[300], 13);
    }
    for window in [129, 256] {
        prove(attention(false, Some(window)), &[300], 13);
    }
}

/// The backward pass splits the keys of long segments into ranges, whose dQ are summed; windows end
/// before, in and behind the next range.
#[test]
fn key_ranges_do_not_show() {
    let long: [(_, _, &[usize]); 5] = [
        (true, None, &[513]),
        (true, Some(40), &[1100]),
        (true, Some(600), &[3, 1030, 700]),
        (false, None, &[3, 513]),
        (false, Some(600), &[1030]),
    ];
    for (causal, window, lengths) in long {
        let attention = Attention {
            causal,
            window,
            softcap: window.map(|_| 0.7),
            ..attention(2, 1, 4)
        };
        prove(attention, lengths, 14);
        prove_bf16(attention, lengths, 15);
    }
}

/// A segment gives the same bytes alone and between others: nothing is seen across its ends.
#[test]
fn segments_are_independent() {
    let attention = attention(4, 2, 8);
    let (lengths, middle) = ([70, 66, 3], (70, 66));
    let (x, dy) = inputs(&attention, 139, 1);
    let run = |x: &[Tensor], dy: &Tensor, lengths: &[usize]| {
        let run = |context: Context<'_>| run(&attention, context, x, dy, lengths);
        named(run(Context::new(&WorkCounter::default(), Precision::F32)).unwrap())
    };
    let cut = |x: &Tensor| x.narrow(0, middle.0, middle.1).unwrap();
    for isa in available() {
        let together = with(isa, || run(&x, &dy, &lengths));
        let alone = with(isa, || run(&x.each_ref().map(cut), &cut(&dy), &[middle.1]));
        for ((name, together), (_, alone)) in together.iter().zip(&alone) {
            let together = cut(together.as_ref().unwrap());
            assert_eq!(
                flat(&together),
                flat(alone.as_ref().unwrap()),
                "{name}, {}",
                isa.name
            );
        }
    }
}

/// Logits of 4e4, far beyond exp's range in f32: the row's largest wins, and a tie is shared.
#[test]
fn large_logits_do_not_overflow() {
    let attention = attention(1, 1, 1);
    let column = |values: [f32; 4]| tensor(&values, &[4, 1]);
    let q = column([200.0, 200.0, -200.0, 200.0]);
    let k = column([-200.0, 200.0, 0.0, 200.0]);
    let v = column([1.0, 2.0, 4.0, 8.0]);
    let dy = column([1.0; 4]);
    for_each_path(|context| {
        let x = [q.clone(), k.clone(), v.clone()];
        let (y, gradients) = run(&attention, context, &x, &dy, &[4]).unwrap();
        // Row 0 sees key 0 alone; row 1 prefers key 1; row 2, negative, prefers key 0; row 3 is
        // torn between keys 1 and 3.
        assert_eq!(flat(&y), [1.0, 2.0, 1.0, 5.0]);
        let [dq, dk, dv] = [0, 1, 2].map(|i| gradients[i].as_ref().unwrap());
        // dp = v, so ds = p (v - y): row 3 alone has two probabilities, 0.5 (2 - 5) and 0.5 (8 -
        // 5); dk = ds q, dq = sum of ds k = 0. The lse is 4e4, whose neighbour is 2^-8 away: p is
        // good to 0.4 %, and so are dv and dk.
        within("dv", dv, &column([2.0, 1.5, 0.0, 0.5]), 4e-3);
        within("dk", dk, &column([0.0, -300.0, 0.0, 300.0]), 1.2);
        within("dq", dq, &column([0.0; 4]), 2.4);
    });
}

/// Decoding token by token over candle-nn's KV cache equals the forward pass over all tokens,
/// window or not, in one key block or several.
#[test]
fn decoding_continues_the_forward_pass() {
    for (tokens, window, softcap, read) in [
        (9, None, None, 0..9),
        (9, Some(3), Some(0.5), 0..9),
        (600, None, Some(0.5), 254..258),
        (600, Some(300), None, 597..600),
    ] {
        let attention = Attention {
            window,
            softcap,
            ..attention(6, 2, 4)
        };
        let ([q, k, v], _) = inputs(&attention, tokens, 1);
        for_each_path(|context| {
            let segments = Segments::from_lengths([tokens]);
            let all = attention.forward(context, q.clone(), k.clone(), v.clone(), &segments);
            let all = all.unwrap().0;
            context.counter.take();
            let mut cache = ConcatKvCache::new(0);
            let rows = |x: &Tensor, start: usize, n: usize| x.narrow(0, start, n).unwrap();
            if read.start > 0 {
                let start = [&k, &v].map(|x| rows(x, 0, read.start));
                cache.append(&start[0], &start[1]).unwrap();
            }
            for t in read.clone() {
                let (k, v) = cache.append(&rows(&k, t, 1), &rows(&v, t, 1)).unwrap();
                FLOPS_ISSUED.set(0);
                let y = attention.decode(context, &rows(&q, t, 1), &k, &v).unwrap();
                // Averages of values below 1 over the visible keys, with scores of four products
                // each.
                let keys = (t + 1).min(window.unwrap_or(tokens));
                close("token", &y, &rows(&all, t, 1), 32 + keys);
                let counted = context.counter.take();
                assert_eq!(counted, attention_decode_cost(&attention, t + 1));
                // Two products of (1, 4) by (4, keys) in each of six heads.
                let flops = 2 * 6 * 2 * 4 * keys as u64;
                assert_eq!((counted.flops(), FLOPS_ISSUED.get()), (flops, flops));
            }
        });
    }
}

#[test]
fn decoded_bytes_do_not_depend_on_the_threads() {
    let attention = attention(6, 3, 5);
    let q = random(1, &[1, 30]);
    let (k, v) = (random(2, &[1000, 15]), random(3, &[1000, 15]));
    let bytes = |threads: usize| {
        on(threads, || {
            let counter = WorkCounter::default();
            let context = Context::new(&counter, Precision::F32);
            bits(&attention.decode(context, &q, &k, &v).unwrap())
        })
    };
    assert_eq!(bytes(1), bytes(2));
    assert_eq!(bytes(1), bytes(3));
}

/// A gradient that is not contiguous.
#[test]
fn a_gradient_may_be_a_view() {
    let attention = attention(2, 2, 2);
    let (x, _) = inputs(&attention, 5, 1);
    let dy = random(4, &[5, 8]).narrow(1, 2, 4).unwrap();
    let copy = dy.contiguous().unwrap();
    for_each_path(|context| {
        let run = |dy: &Tensor| run(&attention, context, &x, dy, &[5]).unwrap().1;
        for (view, copy) in run(&dy).iter().zip(&run(&copy)) {
            let (view, copy) = (view.as_ref().unwrap(), copy.as_ref().unwrap());
            assert_eq!((flat(view), view.dtype()), (flat(copy), DType::F32));
        }
    });
}
