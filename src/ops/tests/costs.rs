//! Cost functions against hand counts and against torch's FlopCounterMode. That a running op counts its cost, and issues just those
//! products, is part of every proof (`Pair::run`).

use serde_json::Value;

use super::super::{
    Attention, LinearShape, LmHeadShape, attention_backward_cost, attention_forward_cost,
};
use crate::work::{Precision::F32, Work};

/// Query-key pairs of one head, by hand from blocks of 64 query rows: rows x keys from the first row's first key to the block's end.
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
                heads: 6,
                kv_heads: 2,
                head_dim: 5,
                window,
            };
            // Forward q k^T and p v, backward q k^T, dy v^T, ds k, ds^T q, p^T dy; 2 * D FLOPs a pair, in each query head.
            assert_eq!(
                attention_forward_cost(&attention, &[length]).flops(),
                6 * 2 * 2 * 5 * pairs,
                "T {length} {window:?}"
            );
            assert_eq!(
                attention_backward_cost(&attention, &[length]).flops(),
                6 * 5 * 2 * 5 * pairs,
                "T {length} {window:?}"
            );
            let (one, three) = (
                attention_forward_cost(&attention, &[length]),
                attention_forward_cost(&attention, &[length; 3]),
            );
            assert_eq!(three.flops(), 3 * one.flops(), "segments add up");
            let square = 6 * 2 * 2 * 5 * (length * length) as u64;
            assert!(
                one.flops() <= square && (one.flops() == square) == (length <= 64),
                "never beyond the square"
            );
        }
    }
}

/// T 2, D 3, one head: (queries, keys, D) for scores, again for the scores and dP of the backward pass; (queries, D, keys) for a mix.
#[test]
fn attention_costs_products_of_their_shapes() {
    let attention = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim: 3,
        window: None,
    };
    let shapes = |work: Work| {
        work.iter_products()
            .map(|(p, count)| ((p.m, p.n, p.k), count))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        shapes(attention_forward_cost(&attention, &[2])),
        [((2, 2, 3), 1), ((2, 3, 2), 1)]
    );
    assert_eq!(
        shapes(attention_backward_cost(&attention, &[2])),
        [((2, 2, 3), 2), ((2, 3, 2), 3)]
    );
}

/// N 3, in 5, out 7, r 2: 2mnk of each product.
#[test]
fn a_linear_layer_costs_its_products() {
    let (w, a, b) = (2 * 3 * 5 * 7, 2 * 3 * 5 * 2, 2 * 3 * 2 * 7);
    let plain = LinearShape {
        tokens: 3,
        in_features: 5,
        out_features: 7,
        r: None,
        bias: true,
        trained: false,
        dropout: false,
    };
    assert_eq!(plain.forward_cost(F32).flops(), w);
    assert_eq!(
        (
            plain.backward_cost(F32, true).flops(),
            plain.backward_cost(F32, false).flops()
        ),
        (w, 0)
    );
    let trained = LinearShape {
        trained: true,
        ..plain
    };
    assert_eq!(
        (
            trained.backward_cost(F32, true).flops(),
            trained.backward_cost(F32, false).flops()
        ),
        (2 * w, w)
    );
    let lora = LinearShape {
        r: Some(2),
        dropout: true,
        ..plain
    };
    assert_eq!(lora.forward_cost(F32).flops(), w + a + b);
    // dy B, dB and dA always; W's and A's share of dx where it is wanted.
    assert_eq!(lora.backward_cost(F32, false).flops(), 2 * b + a);
    assert_eq!(lora.backward_cost(F32, true).flops(), 2 * b + a + w + a);
}

/// One LoRA step of a model, from our costs alone, is torch's count to the last FLOP: T = 64 is one block, so that the attention's
/// blocks are torch's square, and torch's fused attention computes the scores again in its backward pass as ours does.
#[test]
fn a_step_costs_what_torch_counts() {
    let text = include_str!("../../../tests/golden/torch_flops.json");
    let torch: Value = serde_json::from_str(text).unwrap();
    for name in ["gqa", "tinystories"] {
        let size = |key: &str| torch[name]["shape"][key].as_u64().unwrap() as usize;
        let of = |path: &str| torch[name].pointer(path).unwrap().as_i64().unwrap();
        let (hidden, inner, layers, r) = (
            size("hidden_size"),
            size("intermediate_size"),
            size("num_hidden_layers") as i64,
            size("r"),
        );
        let (heads, kv_heads, head_dim) = (
            size("num_attention_heads"),
            size("num_key_value_heads"),
            size("head_dim"),
        );
        let (tokens, segments) = (
            size("batch") * size("length"),
            vec![size("length"); size("batch")],
        );
        let site = |in_features, out_features| LinearShape {
            tokens,
            in_features,
            out_features,
            r: Some(r),
            bias: false,
            trained: false,
            dropout: false,
        };
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let first = [site(hidden, q), site(hidden, kv), site(hidden, kv)];
        let rest = [
            site(q, hidden),
            site(hidden, inner),
            site(hidden, inner),
            site(inner, hidden),
        ];
        let sum = |sites: &[LinearShape], f: &dyn Fn(&LinearShape) -> u64| {
            sites.iter().map(f).sum::<u64>() as i64
        };
        let forward = |s: &LinearShape| s.forward_cost(F32).flops();
        let backward = |s: &LinearShape| s.backward_cost(F32, true).flops();
        let linear_forward = layers * (sum(&first, &forward) + sum(&rest, &forward));
        let linear_backward = layers * (sum(&first, &backward) + sum(&rest, &backward));
        let form = |key: &str| of(&format!("/sdpa/closed_form/{key}"));
        assert_eq!(
            linear_forward,
            form("base_linear_forward") + form("lora_forward"),
            "{name}"
        );
        assert_eq!(
            linear_backward,
            form("base_linear_dx") + form("lora_dx") + form("lora_dw"),
            "{name}"
        );
        let unneeded =
            sum(&first, &|s| s.backward_cost(F32, false).flops()) - sum(&first, &backward);
        assert_eq!(unneeded, form("layer0_dx_not_needed"), "{name}");
        let attention = Attention {
            heads,
            kv_heads,
            head_dim,
            window: None,
        };
        let (into, back) = (
            attention_forward_cost(&attention, &segments),
            attention_backward_cost(&attention, &segments),
        );
        let (into, back) = (layers * into.flops() as i64, layers * back.flops() as i64);
        assert_eq!(
            (into, back),
            (
                form("attention_square_forward"),
                form("attention_square_backward")
            ),
            "{name}"
        );
        let head = LmHeadShape {
            loss_tokens: tokens,
            hidden,
            vocab: size("vocab_size"),
            trained: false,
        };
        let head = head.backward_cost(F32, true).flops() as i64;
        assert_eq!(head, form("lm_head_forward") + form("lm_head_dx"), "{name}");
        assert_eq!(
            linear_forward + linear_backward + unneeded + into + back + head,
            of("/sdpa/total"),
            "{name}"
        );
    }
}
