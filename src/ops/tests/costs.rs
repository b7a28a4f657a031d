//! Cost functions against hand counts and torch's FlopCounterMode. `Pair::run` checks that a
//! running op counts its cost and issues just those products.

use serde_json::Value;

use super::super::{
    Attention, LinearShape, LmHeadShape, StoredFormat, attention_backward_cost,
    attention_forward_cost,
};
use super::attention;
use crate::work::{Precision::F32, Work};

/// A frozen layer without a bias or an adapter.
fn linear(tokens: usize, in_features: usize, out_features: usize) -> LinearShape {
    LinearShape {
        tokens,
        in_features,
        out_features,
        r: None,
        bias: false,
        stored: None,
        trained: false,
        bias_trained: false,
        lora_bias: false,
        magnitude: false,
        dropout: false,
    }
}

/// Query-key pairs of one head, by hand from blocks of 64 query rows: rows x keys from the first
/// row's first key to the block's end.
///
/// | T | no window | window 16 |
/// |---|---|---|
/// | 1 | 1x1 | 1x1 |
/// | 64 | 64x64 | 64x64: row 0 sees key 0 |
/// | 65 | 64x64 + 1x65 | 64x64 + 1x16: row 64 sees keys 49 to 64 |
/// | 130 | 64x64 + 64x128 + 2x130 | 64x64 + 64x79 (keys 49 to 127) + 2x17 (113 to 129) |
#[test]
fn attention_costs_its_blocks() {
    let pairs = [
        (1, 1, 1),
        (64, 4096, 4096),
        (65, 4096 + 65, 4096 + 16),
        (130, 4096 + 64 * 128 + 2 * 130, 4096 + 64 * 79 + 2 * 17),
    ];
    for (length, all, near) in pairs {
        for (window, pairs) in [(None, all), (Some(16), near)] {
            let attention = Attention {
                window,
                ..attention(6, 2, 5)
            };
            // Forward q k^T and p v, backward q k^T, dy v^T, ds k, ds^T q, p^T dy; 2 * D FLOPs a
            // pair, in each query head.
            let forward = |lengths: &[usize]| attention_forward_cost(&attention, lengths).flops();
            let backward = attention_backward_cost(&attention, &[length]).flops();
            let one = forward(&[length]);
            assert_eq!(one, 6 * 2 * 2 * 5 * pairs, "T {length} {window:?}");
            assert_eq!(backward, 6 * 5 * 2 * 5 * pairs, "T {length} {window:?}");
            assert_eq!(forward(&[length; 3]), 3 * one, "segments add up");
            let square = 6 * 2 * 2 * 5 * (length * length) as u64;
            let within = one <= square && (one == square) == (length <= 64);
            assert!(within, "never beyond the square");
        }
    }
}

/// The same by hand if every token attends to all, or to those up to 15 away on both sides:
///
/// | T | all | window 16 |
/// |---|---|---|
/// | 65 | 64x65 + 1x65 | 64x65 + 1x16: row 64 sees keys 49 to 64 |
/// | 130 | 130x130 | 64x79 (keys 0 to 78) + 64x81 (49 to 129) + 2x17 (113 to 129) |
#[test]
fn bidirectional_attention_costs_its_blocks() {
    let pairs = [
        (65, 65 * 65, 64 * 65 + 16),
        (130, 130 * 130, 64 * 79 + 64 * 81 + 2 * 17),
    ];
    for (length, all, near) in pairs {
        for (window, pairs) in [(None, all), (Some(16), near)] {
            let attention = Attention {
                causal: false,
                window,
                ..attention(6, 2, 5)
            };
            let forward = attention_forward_cost(&attention, &[length]).flops();
            assert_eq!(forward, 6 * 2 * 2 * 5 * pairs, "T {length} {window:?}");
        }
    }
}

/// T 2, D 3, one head: (queries, keys, D) for scores, again for the scores and dP of the backward
/// pass; (queries, D, keys) for P V.
#[test]
fn attention_costs_products_of_their_shapes() {
    let attention = attention(1, 1, 3);
    let shapes = |work: Work| {
        let products = work.iter_products();
        products
            .map(|(p, count)| ((p.m, p.n, p.k), count))
            .collect::<Vec<_>>()
    };
    let forward = shapes(attention_forward_cost(&attention, &[2]));
    assert_eq!(forward, [((2, 2, 3), 1), ((2, 3, 2), 1)]);
    let backward = shapes(attention_backward_cost(&attention, &[2]));
    assert_eq!(backward, [((2, 2, 3), 2), ((2, 3, 2), 3)]);
}

/// N 3, in 5, out 7, r 2: 2mnk of each product.
#[test]
fn a_linear_layer_costs_its_products() {
    let (w, a, b) = (2 * 3 * 5 * 7, 2 * 3 * 5 * 2, 2 * 3 * 2 * 7);
    let plain = LinearShape {
        bias: true,
        ..linear(3, 5, 7)
    };
    let backward = |shape: &LinearShape| {
        [true, false].map(|input_gradient| shape.backward_cost(F32, input_gradient).flops())
    };
    assert_eq!(plain.forward_cost(F32).flops(), w);
    assert_eq!(backward(&plain), [w, 0]);
    let trained = LinearShape {
        trained: true,
        ..plain
    };
    assert_eq!(backward(&trained), [2 * w, w]);
    let lora = LinearShape {
        r: Some(2),
        dropout: true,
        ..plain
    };
    assert_eq!(lora.forward_cost(F32).flops(), w + a + b);
    // dy B, dB and dA always; W's and A's share of dx where it is wanted.
    assert_eq!(backward(&lora), [2 * b + a + w + a, 2 * b + a]);
}

/// One LoRA step of a model, from our costs alone, is torch's count to the last FLOP: T = 64 is one
/// block, so that the attention's blocks are torch's square, and torch's fused attention computes
/// the scores again in its backward pass as ours does.
#[test]
fn a_step_costs_what_torch_counts() {
    let text = include_str!("../../../tests/golden/torch_flops.json");
    let torch: Value = serde_json::from_str(text).unwrap();
    for name in ["gqa", "tinystories"] {
        check_step(name, &Torch(&torch[name]));
    }
}

/// Torch's counts of one step of a model.
struct Torch<'a>(&'a Value);

impl Torch<'_> {
    fn size(&self, key: &str) -> usize {
        self.0["shape"][key].as_u64().unwrap() as usize
    }

    /// The sum of these terms of its closed form.
    fn flops(&self, terms: &[&str]) -> i64 {
        let form = &self.0["sdpa"]["closed_form"];
        terms.iter().map(|term| form[*term].as_i64().unwrap()).sum()
    }
}

/// Our costs of one step's parts, each with the terms of torch's closed form that it equals.
fn counted_parts(torch: &Torch<'_>) -> [(i64, &'static [&'static str]); 6] {
    let [hidden, inner, length] =
        ["hidden_size", "intermediate_size", "length"].map(|key| torch.size(key));
    let layers = torch.size("num_hidden_layers") as i64;
    let [heads, kv_heads, head_dim] =
        ["num_attention_heads", "num_key_value_heads", "head_dim"].map(|key| torch.size(key));
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let segments = vec![length; torch.size("batch")];
    let tokens = segments.len() * length;
    let site = |(in_features, out_features)| LinearShape {
        r: Some(torch.size("r")),
        ..linear(tokens, in_features, out_features)
    };
    let qkv = [(hidden, q), (hidden, kv), (hidden, kv)].map(site);
    let others = [
        (q, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    .map(site);
    let all = [&qkv[..], &others].concat();
    let sum = |sites: &[LinearShape], cost: &dyn Fn(&LinearShape) -> Work| -> i64 {
        sites.iter().map(|site| cost(site).flops() as i64).sum()
    };
    let forward = |site: &LinearShape| site.forward_cost(F32);
    let backward = |site: &LinearShape| site.backward_cost(F32, true);
    let without_dx = |site: &LinearShape| site.backward_cost(F32, false);
    let attention = attention(heads, kv_heads, head_dim);
    let scores = attention_forward_cost(&attention, &segments).flops() as i64;
    let scores_backward = attention_backward_cost(&attention, &segments).flops() as i64;
    let head = LmHeadShape {
        bias: false,
        bias_trained: false,
        token_rows: 0,
        loss_tokens: tokens,
        hidden,
        vocab: torch.size("vocab_size"),
        stored: None,
        trained: false,
        softcap: false,
        lora: None,
        dropout: false,
    };
    [
        (
            layers * sum(&all, &forward),
            &["base_linear_forward", "lora_forward"],
        ),
        (
            layers * sum(&all, &backward),
            &["base_linear_dx", "lora_dx", "lora_dw"],
        ),
        (
            sum(&qkv, &without_dx) - sum(&qkv, &backward),
            &["layer0_dx_not_needed"],
        ),
        (layers * scores, &["attention_square_forward"]),
        (layers * scores_backward, &["attention_square_backward"]),
        (
            head.backward_cost(F32, true).flops() as i64,
            &["lm_head_forward", "lm_head_dx"],
        ),
    ]
}

fn check_step(name: &str, torch: &Torch<'_>) {
    let counts = counted_parts(torch);
    for (ours, terms) in counts {
        assert_eq!(ours, torch.flops(terms), "{name}, {terms:?}");
    }
    let total: i64 = counts.iter().map(|(ours, _)| ours).sum();
    assert_eq!(Some(total), torch.0["sdpa"]["total"].as_i64(), "{name}");
}

/// By hand: 3 rows, 64 inputs, 5 outputs in Q8_0: the product's FLOPs are those of any format, B has 34 bytes for 32 values, and each
/// value is decoded with two operations, forward and for dx.
#[test]
fn a_quantised_layer_reads_its_stored_bytes_and_decodes_them() {
    let dense = linear(3, 64, 5);
    let stored = LinearShape {
        stored: Some(StoredFormat::Q8_0),
        ..dense
    };
    let costs = |shape: &LinearShape| [shape.forward_cost(F32), shape.backward_cost(F32, true)];
    for (with, without) in costs(&stored).into_iter().zip(costs(&dense)) {
        assert_eq!(with.flops(), without.flops());
        assert_eq!(with.vector_flops() - without.vector_flops(), 2 * 64 * 5);
        let bytes = |work: &Work| {
            work.iter_products()
                .map(|(product, _)| product.rhs_bytes())
                .sum::<u64>()
        };
        assert_eq!([bytes(&with), bytes(&without)], [5 * 2 * 34, 5 * 64 * 4]);
    }
}
