//! What ops refuse, and that they say so instead of panicking, reading beyond a slice, or leaving rows out.

use candle_core::{DType, Device, Tensor};

use super::super::swiglu::{swiglu, swiglu_backward};
use super::super::{
    AdamW, Attention, Context, FeedForward, Gradients, Linear, LinearInput, LmHead, Parameters,
    RmsNorm, Rope, RopeScaling, Segments, Weight, embedding, embedding_backward,
};
use super::{flat, for_each_path, of, random};
use crate::error::{Kind, Result};
use crate::work::{Precision, WorkCounter};

/// The message of an error of this kind.
fn refused<T>(kind: Kind, result: Result<T>) -> String {
    let error = result.err().expect("it is refused");
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

/// Like `refused`, of a tensor; the message holds `words`.
fn says<T>(words: &str, result: Result<T>) {
    let message = refused(Kind::Tensor, result);
    assert!(message.contains(words), "`{words}` is not in: {message}");
}

/// (rows, columns) with a stride of columns + 3.
fn view(seed: u64, rows: usize, columns: usize) -> Tensor {
    random(seed, &[rows, columns + 3])
        .narrow(1, 2, columns)
        .unwrap()
}

fn norm(c: usize) -> RmsNorm {
    RmsNorm {
        weight: Weight::frozen(random(9, &[c])),
        eps: 1e-6,
    }
}

const ATTENTION: Attention = Attention {
    heads: 2,
    kv_heads: 1,
    head_dim: 2,
    window: None,
};

#[test]
fn fused_passes_name_a_tensor_that_is_not_contiguous() {
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::F32);
    let (x, whole) = (view(1, 4, 6), random(2, &[4, 6]));
    const WORDS: &str = "contiguous";
    let (_, saved) = norm(6).forward(fused, &whole).unwrap();
    says(WORDS, norm(6).forward(fused, &x));
    says(
        WORDS,
        norm(6).backward(fused, &x, &saved, None, &mut Gradients::new(0)),
    );
    says(WORDS, swiglu(fused, &x, &whole));
    says(WORDS, swiglu(fused, &whole, &x));
    says(
        WORDS,
        swiglu_backward(fused, &x, &swiglu(fused, &whole, &whole).unwrap().1),
    );
    let rope = Rope {
        head_dim: 6,
        theta: 10.0,
        scaling: RopeScaling::None,
    };
    let tables = rope
        .tables(&Segments::from_lengths([4]), &Device::Cpu)
        .unwrap();
    says(WORDS, tables.forward(fused, &x));
    let (q, k) = (random(3, &[4, 4]), random(4, &[4, 2]));
    let segments = Segments::from_lengths([4]);
    says(
        WORDS,
        ATTENTION.forward(fused, view(5, 4, 4), k.clone(), k.clone(), &segments),
    );
    says(
        WORDS,
        ATTENTION.forward(fused, q.clone(), view(5, 4, 2), k.clone(), &segments),
    );
    says(
        WORDS,
        ATTENTION.forward(fused, q, k.clone(), view(5, 4, 2), &segments),
    );
    // The reference takes them all.
    let reference = Context {
        reference: true,
        ..fused
    };
    assert_eq!(
        flat(&norm(6).forward(reference, &x).unwrap().0),
        flat(
            &norm(6)
                .forward(reference, &x.contiguous().unwrap())
                .unwrap()
                .0
        )
    );
    assert_eq!(
        flat(&tables.forward(reference, &x).unwrap()),
        flat(&tables.forward(fused, &x.contiguous().unwrap()).unwrap())
    );
}

#[test]
fn products_take_tensors_that_are_not_contiguous() {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let linear = Linear {
        weight: Weight::frozen(random(3, &[5, 6])),
        bias: None,
        lora: None,
    };
    let (x, dy) = (view(1, 4, 6), view(2, 4, 5));
    let run = |x: &Tensor, dy: &Tensor| {
        let (y, saved) = linear.forward(context, x, None, None).unwrap();
        let dx = linear
            .backward(
                context,
                dy,
                (None, &saved),
                (true, None),
                &mut Gradients::new(0),
            )
            .unwrap()
            .unwrap();
        (flat(&y), flat(&dx))
    };
    assert_eq!(
        run(&x, &dy),
        run(&x.contiguous().unwrap(), &dy.contiguous().unwrap())
    );
    let head = LmHead {
        weight: Weight::frozen(random(4, &[7, 6])),
    };
    let targets = [0, 6, 3, 3];
    assert_eq!(
        head.forward(context, &x, &targets).unwrap(),
        head.forward(context, &x.contiguous().unwrap(), &targets)
            .unwrap()
    );
}

#[test]
fn fused_passes_take_f32_alone() {
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::F32);
    let x = random(1, &[4, 6]).to_dtype(DType::BF16).unwrap();
    says("f32", norm(6).forward(fused, &x));
    says("f32", swiglu(fused, &x, &x));
}

#[test]
fn shapes_that_contradict_each_other_are_refused() {
    let counter = WorkCounter::default();
    let (x, short) = (random(1, &[4, 6]), random(2, &[3, 6]));
    for reference in [false, true] {
        let context = Context {
            reference,
            ..Context::new(&counter, Precision::F32)
        };
        says("`weight`", norm(5).forward(context, &x));
        let (_, saved) = norm(6).forward(context, &x).unwrap();
        says(
            "`dy`",
            norm(6).backward(context, &short, &saved, None, &mut Gradients::new(0)),
        );
        says("`up`", swiglu(context, &x, &short));
        says(
            "`dy`",
            swiglu_backward(context, &short, &swiglu(context, &x, &x).unwrap().1),
        );
        let rope = Rope {
            head_dim: 4,
            theta: 10.0,
            scaling: RopeScaling::None,
        };
        let tables = rope
            .tables(&Segments::from_lengths([4]), &Device::Cpu)
            .unwrap();
        says("whole heads", tables.forward(context, &x));
        says("`cos`", tables.forward(context, &random(1, &[5, 4])));
        let head = LmHead {
            weight: Weight::frozen(random(3, &[5, 6])),
        };
        says("`h`", head.forward(context, &x, &[0, 1, 2]));
        says("`h`", head.forward(context, &random(1, &[1, 5]), &[0]));
        says("below 5", head.forward(context, &x, &[0, 1, 2, 5]));
        says(
            "below 5",
            head.forward_backward(
                context,
                &x,
                &[0, 1, 2, 5],
                1.0,
                true,
                &mut Gradients::new(0),
            ),
        );
    }
    assert!(
        counter.take().flops() == 0,
        "what is refused is not counted"
    );
}

/// In blocks and without.
#[test]
fn feed_forward_layers_that_contradict_each_other_are_refused() {
    let linear = |o: usize, i: usize| Linear {
        weight: Weight::frozen(random(1, &[o, i])),
        bias: None,
        lora: None,
    };
    let (up, down, wide) = (linear(5, 6), linear(6, 5), linear(7, 6));
    for_each_path(|context| {
        let layers = FeedForward {
            gate: &up,
            up: &up,
            down: &down,
        };
        let input = |rows: usize| LinearInput::new(context, random(2, &[rows, 6])).unwrap();
        let base = random(3, &[4, 6]);
        says(
            "`up`",
            FeedForward {
                up: &wide,
                ..layers
            }
            .forward(context, input(4), None, &base, true),
        );
        says(
            "`x`",
            FeedForward {
                down: &up,
                ..layers
            }
            .forward(context, input(4), None, &base, true),
        );
        says(
            "`base`",
            layers.forward(context, input(3), None, &base, true),
        );
        let (_, saved) = layers
            .forward(context, input(4), None, &base, true)
            .unwrap();
        for dy in [[3, 6], [5, 6], [4, 5]] {
            let gradients = &mut Gradients::new(0);
            says(
                "`dy`",
                layers.backward(
                    context,
                    &random(4, &dy),
                    (None, &saved),
                    (true, true),
                    gradients,
                ),
            );
        }
    });
}

/// The fused pass computes addresses from these sizes: a contradiction may not reach it.
#[test]
fn attention_refuses_sizes_it_would_read_or_write_beyond() {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let forward = |attention: Attention, shapes: [&[usize]; 3], length: usize| {
        let [q, k, v] = shapes.map(|shape| random(1, shape));
        attention.forward(context, q, k, v, &Segments::from_lengths([length]))
    };
    says("`q`", forward(ATTENTION, [&[4, 40], &[4, 2], &[4, 2]], 4));
    says("`q`", forward(ATTENTION, [&[4, 4], &[4, 2], &[4, 2]], 5));
    says("`q`", forward(ATTENTION, [&[4, 4], &[4, 2], &[4, 2]], 3));
    says("`k`", forward(ATTENTION, [&[4, 4], &[3, 2], &[4, 2]], 4));
    says("`v`", forward(ATTENTION, [&[4, 4], &[4, 2], &[4, 1]], 4));
    let sizes = [
        Attention {
            heads: 3,
            kv_heads: 2,
            ..ATTENTION
        },
        Attention {
            kv_heads: 0,
            ..ATTENTION
        },
        Attention {
            heads: 0,
            ..ATTENTION
        },
        Attention {
            head_dim: 0,
            ..ATTENTION
        },
        Attention {
            window: Some(0),
            ..ATTENTION
        },
    ];
    for attention in sizes {
        says(
            "kv_heads divides heads",
            forward(attention, [&[4, 4], &[4, 2], &[4, 2]], 4),
        );
    }
    let (_, saved) = forward(ATTENTION, [&[4, 4], &[4, 2], &[4, 2]], 4).unwrap();
    says(
        "`dout`",
        ATTENTION.backward(
            context,
            &random(1, &[3, 4]),
            &saved,
            &Segments::from_lengths([4]),
        ),
    );
    says(
        "`q`",
        ATTENTION.backward(
            context,
            &random(1, &[4, 4]),
            &saved,
            &Segments::from_lengths([5]),
        ),
    );
    let none = Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
    says(
        "`k`",
        ATTENTION.decode(context, &random(1, &[1, 4]), &none, &none),
    );
    says(
        "`q`",
        ATTENTION.decode(
            context,
            &random(1, &[2, 4]),
            &random(1, &[4, 2]),
            &random(1, &[4, 2]),
        ),
    );
}

#[test]
fn an_id_beyond_the_table_is_refused() {
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let parameters =
        Parameters::new(vec![("t".into(), vec![3, 2], vec![0.0; 6])], &Device::Cpu).unwrap();
    let (table, ids) = (
        parameters.weight(0).unwrap(),
        Tensor::new(&[0u32, 3], &Device::Cpu).unwrap(),
    );
    says("index", embedding(context, &ids, &table));
    says(
        "index",
        embedding_backward(
            context,
            &ids,
            &random(1, &[2, 2]),
            &table,
            &mut Gradients::new(1),
        ),
    );
}

#[test]
fn parameters_hold_what_their_shapes_say() {
    let new = |values: Vec<f32>| {
        Parameters::new(
            vec![("layer.lora_A".into(), vec![2, 3], values)],
            &Device::Cpu,
        )
    };
    says(
        "`layer.lora_A` holds 5 numbers where its shape wants 6",
        new(vec![0.0; 5]),
    );
    let parameters = new(vec![1.0; 6]).unwrap();
    let (row, short) = (vec![2.0; 6], vec![2.0; 5]);
    let message = refused(Kind::Run, parameters.restore_row(2, &short));
    assert!(
        message.contains("5 trained numbers where this recipe has 6"),
        "{message}"
    );
    for (index, row) in [&row[..], &[3.0; 6], &[4.0; 6]].into_iter().enumerate() {
        parameters.restore_row(index, row).unwrap();
    }
    assert_eq!(
        parameters.snapshot().unwrap(),
        [vec![2.0; 6], vec![3.0; 6], vec![4.0; 6]]
    );
    assert_eq!(parameters.values(0).unwrap(), row);
    let empty = Parameters::new(vec![], &Device::Cpu).unwrap();
    assert!(empty.is_empty() && empty.slots().is_empty());
}

#[test]
fn gradients_are_whole_or_refused() {
    let named = |name: &str, n: usize| (name.to_string(), vec![n], vec![0.0; n]);
    let parameters =
        Parameters::new(vec![named("first", 2), named("second", 1)], &Device::Cpu).unwrap();
    let (first, second) = (parameters.weight(0).unwrap(), parameters.weight(1).unwrap());
    let mut gradients = Gradients::new(2);
    says(
        "not trained",
        gradients.add(&Weight::frozen(first.tensor.clone()), of(&[1.0, 2.0], &[2])),
    );
    gradients.add(&first, of(&[1.0, 2.0], &[2])).unwrap();
    gradients.add(&first, of(&[10.0, 20.0], &[2])).unwrap();
    let missing = refused(Kind::Diverged, gradients.flat(&parameters));
    assert!(
        missing.contains("`second` is trained but received no gradient"),
        "{missing}"
    );
    gradients.add(&second, of(&[5.0], &[1])).unwrap();
    assert_eq!(
        flat(&gradients.flat(&parameters).unwrap()),
        [11.0, 22.0, 5.0]
    );
    // Too few places: the last slot has none. A gradient of another shape would shift all that follow it.
    let mut few = Gradients::new(1);
    few.add(&first, of(&[1.0, 2.0], &[2])).unwrap();
    assert!(refused(Kind::Diverged, few.flat(&parameters)).contains("`second`"));
    let mut wide = Gradients::new(2);
    wide.add(&first, of(&[1.0; 3], &[3])).unwrap();
    wide.add(&second, of(&[5.0], &[1])).unwrap();
    says("`first`", wide.flat(&parameters));
}

#[test]
fn an_optimizer_step_takes_one_gradient_of_every_number() {
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    };
    let parameters =
        Parameters::new(vec![("w".into(), vec![4], vec![1.0; 4])], &Device::Cpu).unwrap();
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    says(
        "`gradient`",
        adamw.step(context, &parameters, &random(1, &[3]), 0.1, 1),
    );
    says(
        "`gradient`",
        adamw.step(context, &parameters, &random(1, &[12]), 0.1, 1),
    );
    let strided = random(1, &[4, 2])
        .narrow(1, 0, 1)
        .unwrap()
        .squeeze(1)
        .unwrap();
    says(
        "contiguous",
        adamw.step(context, &parameters, &strided, 0.1, 1),
    );
    assert_eq!(
        parameters.snapshot().unwrap()[0],
        [1.0; 4],
        "a refused step changes nothing"
    );
}
