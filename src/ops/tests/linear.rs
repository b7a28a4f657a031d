//! The linear layer: every combination of bias, adapter, dropout and trained W.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{
    Branch, Context, DropoutMask, Gradients, Linear, LinearInput, LinearSaved, Lora, Parameters,
    Weight, backward_shared_input, residual_cost,
};
use super::{
    FLOPS_ISSUED, Pair, Passed, bits, cases, close, flat, for_each_path, mask, of, on, random,
    with, within,
};
use crate::work::{Precision, WorkCounter};

const SCALING: f64 = 1.5;

/// What a linear layer is made of, beside x and W.
#[derive(Debug, Clone, Copy)]
struct Parts {
    bias: bool,
    r: Option<usize>,
    dropout: bool,
    trained: bool,
    input_gradient: bool,
}

/// W, the `at`th of the inputs, then bias, A, B where there are any -> the layer on them, W and bias trained or not, A and B always.
fn layer(parts: Parts, at: usize, inputs: &[Tensor]) -> (Linear, Parameters) {
    let named = |(i, x): (usize, &Tensor)| (i.to_string(), x.dims().to_vec(), flat(x));
    let parameters =
        Parameters::new(inputs.iter().enumerate().map(named).collect(), &Device::Cpu).unwrap();
    let weight = |i: usize, trained: bool| match trained {
        true => parameters.weight(i).unwrap(),
        false => Weight::frozen(inputs[i].clone()),
    };
    let first = at + 1 + usize::from(parts.bias);
    let linear = Linear {
        weight: weight(at, parts.trained),
        bias: parts.bias.then(|| weight(at + 1, parts.trained)),
        lora: parts.r.map(|_| Lora {
            a: weight(first, true),
            b: weight(first + 1, true),
            scaling: SCALING,
        }),
    };
    (linear, parameters)
}

fn run(
    parts: Parts,
    mask: Option<&DropoutMask>,
    context: Context<'_>,
    inputs: &[Tensor],
    dy: &Tensor,
) -> Passed {
    let (linear, _) = layer(parts, 1, inputs);
    let mut gradients = Gradients::new(inputs.len());
    let x = Some(&inputs[0]).filter(|_| linear.needs_input());
    let (y, saved) = linear
        .forward(context, &inputs[0], mask.cloned(), None)
        .unwrap();
    let dx = linear
        .backward(
            context,
            dy,
            (x, &saved),
            (parts.input_gradient, None),
            &mut gradients,
        )
        .unwrap();
    assert_eq!(dx.is_some(), parts.input_gradient);
    (
        y,
        std::iter::once(dx)
            .chain((1..inputs.len()).map(|i| gradients.get(i).cloned()))
            .collect(),
    )
}

fn naive(parts: Parts, mask: Option<&DropoutMask>, inputs: &[Tensor]) -> Tensor {
    let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
    let x = &inputs[0];
    let mut y = product(x, &inputs[1]);
    let first = 2 + usize::from(parts.bias);
    if parts.bias {
        y = y.broadcast_add(&inputs[2]).unwrap();
    }
    if parts.r.is_some() {
        let x = mask.map_or(x.clone(), |mask| {
            (x * mask
                .tensor(&Device::Cpu)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap())
            .unwrap()
        });
        let low = product(&product(&x, &inputs[first]), &inputs[first + 1]);
        y = (y + (low * SCALING).unwrap()).unwrap();
    }
    y
}

/// W, then bias, A, B where there are any.
fn weights(parts: Parts, (o, i): (usize, usize), seed: u64) -> Vec<Tensor> {
    let mut weights = vec![random(seed ^ 1, &[o, i])];
    weights.extend(parts.bias.then(|| random(seed ^ 2, &[o])));
    if let Some(r) = parts.r {
        weights.extend([random(seed ^ 3, &[r, i]), random(seed ^ 4, &[o, r])]);
    }
    weights
}

fn parts() -> impl Strategy<Value = Parts> {
    (
        any::<bool>(),
        prop::option::of(1usize..6),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(bias, r, dropout, trained, input_gradient)| Parts {
            bias,
            r,
            dropout,
            trained,
            input_gradient,
        })
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn linear_is_its_definition(n in 1usize..100, i in 1usize..70, o in 1usize..70, parts in parts(), seed: u64) {
        let mut inputs = vec![random(seed, &[n, i])];
        inputs.extend(weights(parts, (o, i), seed));
        let mask = parts.dropout.then(|| mask(seed ^ 5, (n, i), 0.3));
        let shape = layer(parts, 1, &inputs).0.shape(n, parts.dropout).unwrap();
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 6, &[n, o]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| run(parts, mask.as_ref(), context, inputs, dy),
            naive: |inputs: &[Tensor]| naive(parts, mask.as_ref(), inputs),
            cost: shape.forward_cost(Precision::F32) + shape.backward_cost(Precision::F32, parts.input_gradient),
            roundings: n.max(i).max(o) + 16,
        }
        .prove();
    }

    /// Three layers of one input go back together as they do one by one, their gradients of x added up.
    #[test]
    fn layers_go_back_together(
        (n, i, o) in (1usize..100, 1usize..70, prop::array::uniform3(1usize..300)),
        parts in prop::array::uniform3(parts()),
        based: bool,
        seed: u64,
    ) {
        together(parts, (n, i, o), based, seed);
    }
}

fn together(parts: [Parts; 3], (n, i, o): (usize, usize, [usize; 3]), based: bool, seed: u64) {
    let (mut inputs, mut at) = (vec![random(seed, &[n, i])], [0; 3]);
    for (index, parts) in parts.iter().enumerate() {
        at[index] = inputs.len();
        inputs.extend(weights(*parts, (o[index], i), seed ^ (16 << index)));
    }
    let linears = [0, 1, 2].map(|index| layer(parts[index], at[index], &inputs).0);
    let dys = [0, 1, 2].map(|index| random(seed ^ 5 ^ (16 << index), &[n, o[index]]));
    let mask = |index: u64| mask(seed ^ 6 ^ index, (n, i), 0.3);
    let (base, input_gradient) = (
        based.then(|| random(seed ^ 7, &[n, i])),
        parts[0].input_gradient,
    );
    let one_by_one = |context: Context<'_>| {
        let (mut gradients, mut sum) = (Gradients::new(inputs.len()), base.clone());
        let saved = [0, 1, 2].map(|index| {
            let mask = parts[index].dropout.then(|| mask(index as u64));
            linears[index]
                .forward(context, &inputs[0], mask, None)
                .unwrap()
                .1
        });
        context.counter.take();
        for (linear, (dy, saved)) in linears.iter().zip(dys.iter().zip(&saved)) {
            let x = (Some(&inputs[0]), saved);
            if let Some(dx) = linear
                .backward(context, dy, x, (input_gradient, None), &mut gradients)
                .unwrap()
            {
                sum = Some(sum.map_or(dx.clone(), |sum| (sum + dx).unwrap()));
            }
        }
        (saved, sum.filter(|_| input_gradient), gradients)
    };
    let at_once = |context: Context<'_>, saved: &[LinearSaved; 3]| {
        let x = linears
            .iter()
            .any(Linear::needs_input)
            .then(|| LinearInput::new(context, inputs[0].clone()).unwrap());
        let dys = dys
            .each_ref()
            .map(|dy| LinearInput::new(context, dy.clone()).unwrap());
        let branch = |index: usize| Branch {
            linear: &linears[index],
            dy: &dys[index],
            saved: &saved[index],
        };
        let (branches, mut gradients) = ([0, 1, 2].map(branch), Gradients::new(inputs.len()));
        let asked = (input_gradient, base.as_ref());
        let dx =
            backward_shared_input(context, &branches, x.as_ref(), asked, &mut gradients).unwrap();
        assert_eq!(dx.is_some(), input_gradient);
        (dx, gradients)
    };
    let all_bits = |gradients: &Gradients| {
        (0..inputs.len())
            .map(|i| gradients.get(i).map(bits))
            .collect::<Vec<_>>()
    };
    let check = |context: Context<'_>| {
        let (saved, want, gradients) = one_by_one(context);
        let mut work = context.counter.take();
        let additions = if input_gradient {
            2 + usize::from(based)
        } else {
            0
        };
        (0..additions).for_each(|_| work += &residual_cost(n, i));
        FLOPS_ISSUED.set(0);
        let (got, together) = at_once(context, &saved);
        assert_eq!(context.counter.take(), work, "work");
        assert_eq!(
            FLOPS_ISSUED.get(),
            work.flops(),
            "products issued and counted"
        );
        got.iter()
            .zip(&want)
            .for_each(|(got, want)| close("dx", got, want, o.iter().sum::<usize>() + 32));
        assert_eq!(
            all_bits(&together),
            all_bits(&gradients),
            "gradients of what is trained"
        );
    };
    for isa in available() {
        let run = |threads: usize| {
            on(threads, || {
                with(isa, || {
                    let counter = WorkCounter::default();
                    let context = Context::new(&counter, Precision::F32);
                    let (dx, gradients) = at_once(context, &one_by_one(context).0);
                    (dx.as_ref().map(bits), all_bits(&gradients))
                })
            })
        };
        let one = run(1);
        assert!(
            one == run(2) && one == run(3),
            "{}: bytes by the number of threads",
            isa.name
        );
    }
    for_each_path(check);
    for_each_path(|context| {
        check(Context {
            precision: Precision::Bf16,
            ..context
        })
    });
}

/// N = 1, in = 2, out = 1, r = 1, by hand. W = [1, 2], A = [1, -1], B = [3], scaling 1.5, x = [4, 5], mask = [2, 0]:
/// y = 4 + 10 + 1.5 * 3 * (8 - 0) = 50. With dy = 1: d_low = 1.5 * 3 = 4.5, dA = 4.5 * [8, 0], dB = 1.5 * 8,
/// dx = [1, 2] + 4.5 * [1, -1] * [2, 0] = [10, 2].
#[test]
fn one_adapter_by_hand() {
    let inputs = [
        of(&[4.0, 5.0], &[1, 2]),
        of(&[1.0, 2.0], &[1, 2]),
        of(&[1.0, -1.0], &[1, 2]),
        of(&[3.0], &[1, 1]),
    ];
    let parts = Parts {
        bias: false,
        r: Some(1),
        dropout: true,
        trained: false,
        input_gradient: true,
    };
    let counter = WorkCounter::default();
    let mask = DropoutMask::sample((1, 2), 0.5, |_, numbers| {
        numbers.copy_from_slice(&[u32::MAX, 0])
    });
    let (y, gradients) = run(
        parts,
        Some(&mask),
        Context::new(&counter, Precision::F32),
        &inputs,
        &of(&[1.0], &[1, 1]),
    );
    let gradient = |i: usize| flat(gradients[i].as_ref().unwrap());
    assert_eq!((flat(&y), gradient(0)), (vec![50.0], vec![10.0, 2.0]));
    assert!(gradients[1].is_none(), "W is frozen");
    assert_eq!((gradient(2), gradient(3)), (vec![36.0, 0.0], vec![12.0]));
    // 2mnk: y and dx 2*2 each; x A^T, (x A^T) B^T 4 + 2; d_low 2, dB 2, dA 4, dx through A 4.
    assert_eq!(counter.take().flops(), 4 + 4 + 6 + 2 + 2 + 4 + 4);
}

/// In bf16 both factors are bf16 (x is here, so that rounding it changes nothing) and sums are f32. The reference rounds the result too.
#[test]
fn bf16_products_sum_in_f32() {
    let [x, w] =
        [random(1, &[7, 300]), random(2, &[5, 300])].map(|x| x.to_dtype(DType::BF16).unwrap());
    let x = x.to_dtype(DType::F32).unwrap();
    let want = x
        .to_dtype(DType::F64)
        .unwrap()
        .matmul(&w.to_dtype(DType::F64).unwrap().t().unwrap())
        .unwrap();
    let linear = Linear {
        weight: Weight::frozen(w),
        bias: None,
        lora: None,
    };
    for reference in [false, true] {
        let counter = WorkCounter::default();
        let context = Context {
            reference,
            ..Context::new(&counter, Precision::Bf16)
        };
        let (y, _) = linear.forward(context, &x, None, None).unwrap();
        assert_eq!(y.dtype(), DType::F32);
        // 300 f32 additions of products no larger than 1; the reference's result is off by 2^-8 of itself.
        let size = flat(&want.to_dtype(DType::F32).unwrap())
            .iter()
            .fold(0.0f32, |size, y| size.max(y.abs()));
        let off = 300.0 * f32::EPSILON + if reference { size / 256.0 } else { 0.0 };
        within("y", &y, &want.to_dtype(DType::F32).unwrap(), off);
        assert_eq!(
            counter.take().iter_products().next().unwrap().0.precision,
            Precision::Bf16
        );
    }
}

/// What a product starts from is added once, in both directions, with a bias and with dropout too.
#[test]
fn a_base_is_added() {
    let (x, w, a, b) = (
        random(1, &[4, 6]),
        random(2, &[5, 6]),
        random(4, &[2, 6]),
        random(6, &[5, 2]),
    );
    let (base, base_below, dy) = (random(7, &[4, 5]), random(8, &[4, 6]), random(9, &[4, 5]));
    let mask = mask(5, (4, 6), 0.3);
    for (bias, dropout) in [(false, false), (true, false), (false, true), (true, true)] {
        let parts = Parts {
            bias,
            r: Some(2),
            dropout,
            trained: false,
            input_gradient: true,
        };
        let mut inputs = vec![x.clone(), w.clone()];
        inputs.extend(bias.then(|| random(3, &[5])));
        inputs.extend([a.clone(), b.clone()]);
        let (linear, _) = layer(parts, 1, &inputs);
        let mask = dropout.then(|| mask.clone());
        for_each_path(|context| {
            let run = |base: Option<&Tensor>, base_below: Option<&Tensor>| {
                let mut gradients = Gradients::new(inputs.len());
                let (y, saved) = linear.forward(context, &x, mask.clone(), base).unwrap();
                let dx = linear
                    .backward(
                        context,
                        &dy,
                        (Some(&x), &saved),
                        (true, base_below),
                        &mut gradients,
                    )
                    .unwrap();
                (y, dx.unwrap())
            };
            let ((y, dx), (with, dx_with)) = (run(None, None), run(Some(&base), Some(&base_below)));
            within("y", &with, &(y + &base).unwrap(), 1e-5);
            within("dx", &dx_with, &(dx + &base_below).unwrap(), 1e-5);
        });
    }
}
