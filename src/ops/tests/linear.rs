//! The linear layer: every combination of bias, adapter, dropout and trained W.

use candle_core::{DType, Tensor};
use proptest::prelude::*;

use super::super::gemm::available;
use super::super::{
    Branch, Context, DropoutMask, Gradients, InputGradient, Linear, LinearInput, LinearSaved,
    Weight, backward_shared_input, residual_cost,
};
use super::{
    FLOPS_ISSUED, Implementation, Layer, Outputs, Pair, bits, cases, close, flat, for_each_path,
    largest, layers, mask, on, parameters, random, tensor, within,
};
use crate::error::Result;
use crate::work::{Precision, WorkCounter};

/// A layer and its backward pass.
#[derive(Debug, Clone, Copy)]
struct Parts {
    layer: Layer,
    dropout: bool,
    input_gradient: bool,
}

impl Parts {
    /// The layer on inputs from the `at`th on.
    fn linear(&self, at: usize, inputs: &[Tensor]) -> Linear {
        let slots = parameters(inputs.iter().map(|x| ("", x)));
        let mut next = at..;
        self.layer.linear(|trained| {
            let i = next.next().unwrap();
            if trained {
                slots.weight(i).unwrap()
            } else {
                Weight::frozen(inputs[i].clone())
            }
        })
    }

    fn weights(&self, (o, i): (usize, usize), seed: u64) -> impl Iterator<Item = Tensor> {
        let shapes = self.layer.shapes(o, i).into_iter().enumerate();
        shapes.map(move |(index, (shape, _))| random(seed ^ (1 + index as u64), &shape))
    }
}

const ADAPTED: Parts = Parts {
    layer: Layer {
        bias: false,
        r: Some(2),
        trained: false,
    },
    dropout: false,
    input_gradient: true,
};

fn run(
    parts: Parts,
    mask: Option<&DropoutMask>,
    context: Context<'_>,
    inputs: &[Tensor],
    dy: &Tensor,
) -> Result<Outputs> {
    let linear = parts.linear(1, inputs);
    let mut gradients = Gradients::new(inputs.len());
    let x = Some(&inputs[0]).filter(|_| linear.is_trained());
    let (y, saved) = linear.forward(context, &inputs[0], mask.cloned(), None)?;
    let dx = InputGradient::when(parts.input_gradient);
    let dx = linear.backward(context, dy, x, &saved, dx, &mut gradients)?;
    assert_eq!(dx.is_some(), parts.input_gradient);
    let weights = (1..inputs.len()).map(|i| gradients.get(i).cloned());
    Ok((y, std::iter::once(dx).chain(weights).collect()))
}

prop_compose! {
    fn parts()(layer in layers(1..6), [dropout, input_gradient] in prop::array::uniform2(any::<bool>())) -> Parts {
        Parts { layer, dropout, input_gradient }
    }
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn linear_is_its_definition(n in 1usize..100, i in 1usize..70, o in 1usize..70, parts in parts(), seed: u64) {
        let mut inputs = vec![random(seed, &[n, i])];
        inputs.extend(parts.weights((o, i), seed));
        let mask = parts.dropout.then(|| mask(seed ^ 5, (n, i), 0.3));
        let shape = parts.linear(1, &inputs).shape(n, parts.dropout)?;
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 6, &[n, o]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| run(parts, mask.as_ref(), context, inputs, dy),
            naive: |inputs: &[Tensor]| parts.layer.naive(&inputs[0], inputs[1..].iter(), mask.as_ref()),
            cost: shape.forward_cost(Precision::F32) + shape.backward_cost(Precision::F32, parts.input_gradient),
            roundings: n.max(i).max(o) + 16,
        }
        .prove();
    }

    /// Three layers of one input go back together as they do one by one, their gradients of x added
    /// up.
    #[test]
    fn layers_share_their_input(
        (n, i, o) in (1usize..100, 1usize..70, prop::array::uniform3(1usize..300)),
        parts in prop::array::uniform3(parts()),
        based: bool,
        seed: u64,
    ) {
        SharedInput::new(parts, n, i, o, based, seed).prove();
    }
}

/// Three layers that read one input.
struct SharedInput {
    linears: [Linear; 3],
    /// x, then the weights of every layer.
    inputs: Vec<Tensor>,
    masks: [Option<DropoutMask>; 3],
    dys: [Tensor; 3],
    base: Option<Tensor>,
    input_gradient: bool,
}

/// dx, and the gradient of every input.
type Gradient = (Option<Tensor>, Vec<Option<Vec<u32>>>);

impl SharedInput {
    fn new(parts: [Parts; 3], n: usize, i: usize, o: [usize; 3], based: bool, seed: u64) -> Self {
        let (mut inputs, mut at) = (vec![random(seed, &[n, i])], [0; 3]);
        for (index, parts) in parts.iter().enumerate() {
            at[index] = inputs.len();
            inputs.extend(parts.weights((o[index], i), seed ^ (16 << index)));
        }
        let dropout = |index: usize| mask(seed ^ 6 ^ index as u64, (n, i), 0.3);
        Self {
            linears: [0, 1, 2].map(|index| parts[index].linear(at[index], &inputs)),
            inputs,
            masks: [0, 1, 2].map(|index| parts[index].dropout.then(|| dropout(index))),
            dys: [0, 1, 2].map(|index| random(seed ^ 5 ^ (16 << index), &[n, o[index]])),
            base: based.then(|| random(seed ^ 7, &[n, i])),
            input_gradient: parts[0].input_gradient,
        }
    }

    fn forward(&self, context: Context<'_>) -> [LinearSaved; 3] {
        let forward = |index: usize| {
            let mask = self.masks[index].clone();
            self.linears[index].forward(context, &self.inputs[0], mask, None)
        };
        let saved = [0, 1, 2].map(|index| forward(index).unwrap().1);
        context.counter.take();
        saved
    }

    fn gradients(&self, dx: Option<Tensor>, gradients: &Gradients) -> Gradient {
        assert_eq!(dx.is_some(), self.input_gradient);
        let all = 0..self.inputs.len();
        (dx, all.map(|i| gradients.get(i).map(bits)).collect())
    }

    fn one_by_one(&self, context: Context<'_>, saved: &[LinearSaved; 3]) -> Gradient {
        let (mut gradients, mut sum) = (Gradients::new(self.inputs.len()), self.base.clone());
        let dx = InputGradient::when(self.input_gradient);
        for (linear, (dy, saved)) in self.linears.iter().zip(self.dys.iter().zip(saved)) {
            let x = Some(&self.inputs[0]);
            let dx = linear.backward(context, dy, x, saved, dx, &mut gradients);
            if let Some(dx) = dx.unwrap() {
                sum = Some(sum.map_or(dx.clone(), |sum| (sum + dx).unwrap()));
            }
        }
        self.gradients(sum.filter(|_| self.input_gradient), &gradients)
    }

    fn at_once(&self, context: Context<'_>, saved: &[LinearSaved; 3]) -> Gradient {
        let input = |x: &Tensor| LinearInput::new(context, x.clone()).unwrap();
        let wanted = self.linears.iter().any(Linear::is_trained);
        let x = wanted.then(|| input(&self.inputs[0]));
        let dys = self.dys.each_ref().map(input);
        let branches = [0, 1, 2].map(|index| Branch {
            linear: &self.linears[index],
            dy: &dys[index],
            saved: &saved[index],
        });
        let dx = match &self.base {
            Some(base) if self.input_gradient => InputGradient::AddTo(base),
            _ => InputGradient::when(self.input_gradient),
        };
        let mut gradients = Gradients::new(self.inputs.len());
        let dx = backward_shared_input(context, &branches, x.as_ref(), dx, &mut gradients);
        self.gradients(dx.unwrap(), &gradients)
    }

    fn check(&self, context: Context<'_>) {
        let saved = self.forward(context);
        let (want, gradients) = self.one_by_one(context, &saved);
        let mut work = context.counter.take();
        if self.input_gradient {
            let (n, i) = self.inputs[0].dims2().unwrap();
            let additions = 2 + usize::from(self.base.is_some());
            (0..additions).for_each(|_| work += &residual_cost(n, i));
        }
        FLOPS_ISSUED.set(0);
        let (got, together) = self.at_once(context, &saved);
        assert_eq!(context.counter.take(), work, "work");
        assert_eq!(FLOPS_ISSUED.get(), work.flops(), "FLOPs issued and counted");
        if let (Some(got), Some(want)) = (got, want) {
            let o: usize = self.dys.iter().map(|dy| dy.dims()[1]).sum();
            close("dx", &got, &want, o + 32);
        }
        assert_eq!(together, gradients, "gradients of trained weights");
    }

    fn prove(&self) {
        for isa in available() {
            let run = |threads: usize| {
                let fused = Implementation::Fused(isa);
                let run = |context: Context<'_>| self.at_once(context, &self.forward(context));
                let (dx, gradients) = on(threads, || fused.run(Precision::F32, run));
                (dx.as_ref().map(bits), gradients)
            };
            let one = run(1);
            assert!(
                one == run(2) && one == run(3),
                "{}: bytes by threads",
                isa.name
            );
        }
        for implementation in Implementation::all() {
            for precision in [Precision::F32, Precision::Bf16] {
                implementation.run(precision, |context| self.check(context));
            }
        }
    }
}

/// N = 1, in = 2, out = 1, r = 1, by hand. W = [1, 2], A = [1, -1], B = [3], scaling 1.5, x = [4,
/// 5], mask = [2, 0]: y = 4 + 10 + 1.5 * 3 * (8 - 0) = 50. With dy = 1: dxa = 1.5 * 3 = 4.5, dA =
/// 4.5 * [8, 0], dB = 1.5 * 8, dx = [1, 2] + 4.5 * [1, -1] * [2, 0] = [10, 2].
#[test]
fn one_adapter_by_hand() {
    let row = |x: [f32; 2]| tensor(&x, &[1, 2]);
    let inputs = [
        row([4.0, 5.0]),
        row([1.0, 2.0]),
        row([1.0, -1.0]),
        tensor(&[3.0], &[1, 1]),
    ];
    let parts = Parts {
        layer: Layer {
            r: Some(1),
            ..ADAPTED.layer
        },
        dropout: true,
        ..ADAPTED
    };
    let mask = DropoutMask::sample((1, 2), 0.5, |_, words| {
        words.copy_from_slice(&[u32::MAX, 0])
    });
    for_each_path(|context| {
        let dy = tensor(&[1.0], &[1, 1]);
        let (y, gradients) = run(parts, Some(&mask), context, &inputs, &dy).unwrap();
        let gradient = |i: usize| flat(gradients[i].as_ref().unwrap());
        assert_eq!((flat(&y), gradient(0)), (vec![50.0], vec![10.0, 2.0]));
        assert!(gradients[1].is_none(), "W is frozen");
        assert_eq!((gradient(2), gradient(3)), (vec![36.0, 0.0], vec![12.0]));
        // 2mnk: y and dx 2*2 each; x A^T, (x A^T) B^T 4 + 2; dxa 2, dB 2, dA 4, dx through A 4.
        assert_eq!(context.counter.take().flops(), 4 + 4 + 6 + 2 + 2 + 4 + 4);
    });
}

/// In bf16 both factors are bf16 (x is here, so that rounding it changes nothing) and sums are f32.
/// The reference rounds the result too.
#[test]
fn bf16_products_sum_in_f32() -> Result<()> {
    let bf16 = |seed, shape: &[usize]| random(seed, shape).to_dtype(DType::BF16);
    let (x, w) = (
        bf16(1, &[7, 300])?.to_dtype(DType::F32)?,
        bf16(2, &[5, 300])?,
    );
    let want = x
        .to_dtype(DType::F64)?
        .matmul(&w.to_dtype(DType::F64)?.t()?)?;
    let want = want.to_dtype(DType::F32)?;
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
        let (y, _) = linear.forward(context, &x, None, None)?;
        assert_eq!(y.dtype(), DType::F32);
        // 300 f32 additions of products no larger than 1; the reference's result is off by 2^-8 of
        // itself.
        let rounding = if reference {
            largest(&want) / 256.0
        } else {
            0.0
        };
        within("y", &y, &want, 300.0 * f32::EPSILON + rounding);
        let counted = counter.take();
        let (product, _) = counted.iter_products().next().unwrap();
        assert_eq!(product.precision, Precision::Bf16);
    }
    Ok(())
}

/// A base is added once, in both directions, with a bias and with dropout too.
#[test]
fn a_base_is_added() {
    let x = random(1, &[4, 6]);
    let (base, base_below, dy) = (random(7, &[4, 5]), random(8, &[4, 6]), random(9, &[4, 5]));
    for (bias, dropout) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut parts = ADAPTED;
        parts.layer.bias = bias;
        let mut inputs = vec![x.clone()];
        inputs.extend(parts.weights((5, 6), 2));
        let linear = parts.linear(1, &inputs);
        let mask = dropout.then(|| mask(5, (4, 6), 0.3));
        for_each_path(|context| {
            let run = |base: Option<&Tensor>, dx: InputGradient<'_>| {
                let mut gradients = Gradients::new(inputs.len());
                let (y, saved) = linear.forward(context, &x, mask.clone(), base).unwrap();
                let dx = linear.backward(context, &dy, Some(&x), &saved, dx, &mut gradients);
                (y, dx.unwrap().unwrap())
            };
            let (y, dx) = run(None, InputGradient::Compute);
            let (with_base, dx_with_base) = run(Some(&base), InputGradient::AddTo(&base_below));
            within("y", &with_base, &(y + &base).unwrap(), 1e-5);
            within("dx", &dx_with_base, &(dx + &base_below).unwrap(), 1e-5);
        });
    }
}
