//! What ops refuse, and that they say so instead of panicking, reading beyond a slice, or leaving
//! rows out.

use candle_core::{DType, Device, Tensor};

use super::super::gemm::best;
use super::super::{
    Activation, Attention, BackwardDepth, Context, FeedForward, Gradients, InputGradient, Linear,
    LinearInput, LmHead, Norm, NormKind, Parameters, Path, Rope, RopeScaling, RopeTables, Segments,
    Weight, embedding, embedding_backward,
};
use super::adamw::ADAMW;
use super::{Implementation, attention, flat, for_each_path, parameters, random, tensor, trained};
use crate::error::{Kind, Result};
use crate::work::Precision;

const SILU: Activation = Activation::Silu;

/// The message of an error of this kind.
fn refused<T>(kind: Kind, result: Result<T>) -> String {
    let error = result.err().expect("it is refused");
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

/// `result` is refused with a message about tensors that contains `text`.
fn says<T>(text: &str, result: Result<T>) {
    let message = refused(Kind::Tensor, result);
    assert!(message.contains(text), "`{text}` is not in: {message}");
}

/// (rows, columns) with a stride of columns + 3.
fn view(seed: u64, rows: usize, columns: usize) -> Tensor {
    let x = random(seed, &[rows, columns + 3]);
    x.narrow(1, 2, columns).unwrap()
}

fn norm(c: usize) -> Norm {
    let weight = Weight::frozen(random(9, &[c]));
    Norm {
        kind: NormKind::Rms,
        weight,
        bias: None,
        unit_offset: false,
        eps: 1e-6,
        factor: 1.0,
    }
}

fn linear(o: usize, i: usize) -> Linear {
    Linear {
        weight: Weight::frozen(random(3, &[o, i])),
        bias: None,
        lora: None,
    }
}

fn head(vocab: usize, hidden: usize) -> LmHead {
    let weight = Weight::frozen(random(4, &[vocab, hidden]));
    LmHead {
        bias: None,
        weight,
        softcap: None,
        lora: None,
    }
}

/// Tables for four tokens.
fn tables(head_dim: usize) -> RopeTables {
    let rope = Rope {
        head_dim,
        rotary_dim: head_dim,
        interleaved: false,
        theta: 10.0,
        scaling: RopeScaling::None,
    };
    rope.tables(&Segments::from_lengths([4]), &Device::Cpu)
        .unwrap()
}

/// Runs `check` on the fused pass.
fn fused<T>(check: impl FnOnce(Context<'_>) -> T) -> T {
    Implementation::Fused(best()).run(Precision::F32, check)
}

const ATTENTION: Attention = attention(2, 1, 2);

#[test]
fn fused_passes_name_a_tensor_that_is_not_contiguous() {
    let (x, all) = (view(1, 4, 6), random(2, &[4, 6]));
    fused(|context| {
        let says = |result: Result<()>| says("contiguous", result);
        let saved = norm(6).forward(context, &all).unwrap().1;
        let none = &mut Gradients::new(0);
        says(norm(6).forward(context, &x).map(drop));
        says(norm(6).backward(context, &x, &saved, None, none).map(drop));
        let saved = SILU.forward(context, &all, Some(&all)).unwrap().1;
        says(SILU.forward(context, &x, Some(&all)).map(drop));
        says(SILU.forward(context, &all, Some(&x)).map(drop));
        says(SILU.backward(context, &x, &saved).map(drop));
        says(tables(6).forward(context, &x).map(drop));
        let segments = Segments::from_lengths([4]);
        for strided in 0..3 {
            let columns = [4, 2, 2];
            let mut qkv = columns.map(|columns| random(3, &[4, columns]));
            qkv[strided] = view(5, 4, columns[strided]);
            let [q, k, v] = qkv;
            says(ATTENTION.forward(context, q, k, v, &segments).map(drop));
        }
    });
    // The other implementations take them all.
    let copy = x.contiguous().unwrap();
    let passes = |context: Context<'_>, x: &Tensor| {
        let normed = norm(6).forward(context, x).unwrap().0;
        (flat(&normed), flat(&tables(6).forward(context, x).unwrap()))
    };
    for implementation in [Implementation::Reference, Implementation::Device] {
        implementation.run(Precision::F32, |context| {
            assert_eq!(passes(context, &x), passes(context, &copy));
        });
    }
}

#[test]
fn products_take_tensors_that_are_not_contiguous() {
    let targets = [0, 6, 3, 3];
    let run = |context: Context<'_>, x: &Tensor, dy: &Tensor| -> Result<_> {
        let (linear, none) = (linear(5, 6), &mut Gradients::new(0));
        let (y, saved) = linear.forward(context, x, None, None)?;
        let dx = linear.backward(context, dy, None, &saved, InputGradient::Compute, none)?;
        let losses = head(7, 6).forward(context, x, &targets)?;
        Ok((flat(&y), flat(&dx.unwrap()), losses))
    };
    let (x, dy) = (view(1, 4, 6), view(2, 4, 5));
    let copies = [&x, &dy].map(|x| x.contiguous().unwrap());
    for_each_path(|context| {
        let got = run(context, &x, &dy).unwrap();
        assert_eq!(got, run(context, &copies[0], &copies[1]).unwrap());
    });
}

#[test]
fn fused_passes_take_f32_alone() {
    let x = random(1, &[4, 6]).to_dtype(DType::BF16).unwrap();
    fused(|context| {
        says("f32", norm(6).forward(context, &x));
        says("f32", SILU.forward(context, &x, Some(&x)));
    });
}

#[test]
fn shapes_that_contradict_each_other_are_refused() {
    let (x, short) = (random(1, &[4, 6]), random(2, &[3, 6]));
    for_each_path(|context| {
        let none = &mut Gradients::new(0);
        says("`weight`", norm(5).forward(context, &x));
        let saved = norm(6).forward(context, &x).unwrap().1;
        says(
            "`dy`",
            norm(6).backward(context, &short, &saved, None, none),
        );
        says("`up`", SILU.forward(context, &x, Some(&short)));
        let saved = SILU.forward(context, &x, Some(&x)).unwrap().1;
        says("`dy`", SILU.backward(context, &short, &saved));
        says("whole heads", tables(4).forward(context, &x));
        says("`cos`", tables(4).forward(context, &random(1, &[5, 4])));
        let head = head(5, 6);
        says("`h`", head.forward(context, &x, &[0, 1, 2]));
        says("`h`", head.forward(context, &random(1, &[1, 5]), &[0]));
        let beyond = [0, 1, 2, 5];
        says("below 5", head.forward(context, &x, &beyond));
        says(
            "below 5",
            head.forward_backward(context, &x, &beyond, 1.0, true, none),
        );
        let counted = context.counter.take().flops();
        assert_eq!(counted, 0, "what is refused is not counted");
    });
}

/// In tiles and without.
#[test]
fn feed_forward_layers_that_contradict_each_other_are_refused() {
    let (up, down, wide) = (linear(5, 6), linear(6, 5), linear(7, 6));
    for_each_path(|context| {
        let (same, other) = ([up.clone(), up.clone()], [up.clone(), wide.clone()]);
        let layers = FeedForward {
            activation: SILU,
            gated: true,
            gate_up: &same,
            down: &down,
        };
        let base = random(3, &[4, 6]);
        let forward = |layers: FeedForward<'_>, rows: usize| {
            let x = LinearInput::new(context, random(2, &[rows, 6])).unwrap();
            layers.forward(context, x, None, Some(&base), true)
        };
        says(
            "`up`",
            forward(
                FeedForward {
                    gate_up: &other,
                    ..layers
                },
                4,
            ),
        );
        says(
            "`x`",
            forward(
                FeedForward {
                    down: &up,
                    ..layers
                },
                4,
            ),
        );
        says("`base`", forward(layers, 3));
        let saved = forward(layers, 4).unwrap().1;
        for dy in [[3, 6], [5, 6], [4, 5]].map(|shape| random(4, &shape)) {
            let none = &mut Gradients::new(0);
            let dx = layers.backward(context, &dy, None, &saved, BackwardDepth::Input, none);
            says("`dy`", dx);
        }
    });
}

/// The fused pass computes addresses from these sizes: a contradiction may not reach it.
#[test]
fn attention_refuses_sizes_it_would_read_or_write_beyond() {
    fused(|context| {
        let forward = |attention: Attention, shapes: [[usize; 2]; 3], length: usize| {
            let [q, k, v] = shapes.map(|shape| random(1, &shape));
            attention.forward(context, q, k, v, &Segments::from_lengths([length]))
        };
        says("`q`", forward(ATTENTION, [[4, 40], [4, 2], [4, 2]], 4));
        says("`q`", forward(ATTENTION, [[4, 4], [4, 2], [4, 2]], 5));
        says("`q`", forward(ATTENTION, [[4, 4], [4, 2], [4, 2]], 3));
        says("`k`", forward(ATTENTION, [[4, 4], [3, 2], [4, 2]], 4));
        says("`v`", forward(ATTENTION, [[4, 4], [4, 2], [4, 1]], 4));
        let no_window = Attention {
            window: Some(0),
            ..ATTENTION
        };
        for sizes in [
            attention(3, 2, 2),
            attention(2, 0, 2),
            attention(0, 1, 2),
            attention(2, 1, 0),
            no_window,
        ] {
            let forward = forward(sizes, [[4, 4], [4, 2], [4, 2]], 4);
            says("kv_heads divides heads", forward);
        }
        let saved = forward(ATTENTION, [[4, 4], [4, 2], [4, 2]], 4).unwrap().1;
        let backward = |rows: usize, length: usize| {
            let (dout, segments) = (random(1, &[rows, 4]), Segments::from_lengths([length]));
            ATTENTION.backward(context, &dout, &saved, &segments)
        };
        says("`dout`", backward(3, 4));
        says("`q`", backward(4, 5));
        let decode =
            |rows: usize, kv: &Tensor| ATTENTION.decode(context, &random(1, &[rows, 4]), kv, kv);
        let empty = Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
        says("`k`", decode(1, &empty));
        says("`q`", decode(2, &random(1, &[4, 2])));
    });
}

#[test]
fn an_id_beyond_the_table_is_refused() {
    let table = trained(&tensor(&[0.0; 6], &[3, 2]));
    let ids = Tensor::new(&[0u32, 3], &Device::Cpu).unwrap();
    for_each_path(|context| {
        if context.path(&table.tensor) == Path::Cuda {
            // A kernel cannot refuse: see `rows_are_gathered_and_scattered_as_candle_does`.
            return;
        }
        says("index", embedding(context, &ids, &table));
        let (dx, gradients) = (random(1, &[2, 2]), &mut Gradients::new(1));
        says(
            "index",
            embedding_backward(context, &ids, &dx, &table, gradients),
        );
    });
}

#[test]
fn parameters_have_the_shapes_of_their_tensors() {
    let new = |values: Vec<f32>| {
        let named = vec![("layer.lora_A".into(), vec![2, 3], values)];
        Parameters::new(named, &Device::Cpu)
    };
    says(
        "`layer.lora_A` holds 5 numbers where its shape wants 6",
        new(vec![0.0; 5]),
    );
    let parameters = new(vec![1.0; 6]).unwrap();
    let message = refused(Kind::Run, parameters.restore_row(2, &[2.0; 5]));
    assert!(
        message.contains("5 trained numbers where this recipe has 6"),
        "{message}"
    );
    let rows = [vec![2.0; 6], vec![3.0; 6], vec![4.0; 6]];
    for (index, row) in rows.iter().enumerate() {
        parameters.restore_row(index, row).unwrap();
    }
    assert_eq!(parameters.snapshot().unwrap(), rows);
    assert_eq!(parameters.values(0).unwrap(), rows[0]);
    let empty = Parameters::new(vec![], &Device::Cpu).unwrap();
    assert!(empty.is_empty() && empty.slots().is_empty());
}

#[test]
fn gradients_are_complete_or_refused() {
    let (two, one) = (tensor(&[0.0; 2], &[2]), tensor(&[0.0], &[1]));
    let parameters = parameters([("first", &two), ("second", &one)]);
    let (first, second) = (parameters.weight(0).unwrap(), parameters.weight(1).unwrap());
    let mut gradients = Gradients::new(2);
    let frozen = Weight::frozen(first.tensor.clone());
    says("not trained", gradients.add(&frozen, two.clone()));
    gradients.add(&first, tensor(&[1.0, 2.0], &[2])).unwrap();
    gradients.add(&first, tensor(&[10.0, 20.0], &[2])).unwrap();
    let missing = refused(Kind::Diverged, gradients.flat(&parameters));
    assert!(
        missing.contains("`second` is trained but received no gradient"),
        "{missing}"
    );
    gradients.add(&second, tensor(&[5.0], &[1])).unwrap();
    let flattened = gradients.flat(&parameters).unwrap();
    assert_eq!(flat(&flattened), [11.0, 22.0, 5.0]);
    // Too few slots: the last has no gradient.
    let mut few = Gradients::new(1);
    few.add(&first, two).unwrap();
    assert!(refused(Kind::Diverged, few.flat(&parameters)).contains("`second`"));
    // A gradient of another shape would shift all that follow it.
    let mut wide = Gradients::new(2);
    wide.add(&first, tensor(&[1.0; 3], &[3])).unwrap();
    wide.add(&second, one).unwrap();
    says("`first`", wide.flat(&parameters));
}

#[test]
fn an_optimizer_step_takes_one_gradient_of_every_parameter() {
    let parameters = parameters([("w", &tensor(&[1.0; 4], &[4]))]);
    let strided = random(1, &[4, 2]).narrow(1, 0, 1).unwrap().squeeze(1);
    fused(|context| {
        let step = |gradient: &Tensor| ADAMW.step(context, &parameters, gradient, 0.1, 1);
        says("`gradient`", step(&random(1, &[3])));
        says("`gradient`", step(&random(1, &[12])));
        says("contiguous", step(&strided.unwrap()));
    });
    let values = &parameters.snapshot().unwrap()[0];
    assert_eq!(values, &[1.0; 4], "a refused step changes nothing");
}
