//! The feed-forward layers as one pair: every combination of biases, adapters, dropout and trained
//! weights, in tiles or not.

use candle_core::{DType, Tensor};
use proptest::prelude::*;

use super::super::gemm::{available, best};
use super::super::{
    Activation, BackwardDepth, Context, DropoutMask, FeedForward, Gradients, Linear, LinearInput,
    Lora, Masks, Weight, residual_cost,
};
use super::elementwise::naive_activation;
use super::{
    FLOPS_ISSUED, Implementation, Layer, Outputs, Pair, autograd, bits, cases, close, flat,
    for_each_path, layers, mask, named, on, parameters, random,
};
use crate::error::Result;
use crate::work::{Precision, Work};

/// Gate, up and down, and their passes.
#[derive(Debug, Clone, Copy)]
struct Parts {
    activation: Activation,
    layers: [Layer; 3],
    /// Whether frozen weights are stored in bf16.
    narrow: bool,
    /// Whether frozen weights cache their packed forms.
    cached: bool,
    dropout: bool,
    /// Whether the forward pass is told that the backward pass reaches all layers.
    all_layers: bool,
    depth: BackwardDepth,
}

/// Adapters of these ranks on frozen weights, in tiles where the CPU has them.
fn adapters(r: [Option<usize>; 3]) -> Parts {
    let layer = |r| Layer {
        bias: false,
        r,
        trained: false,
    };
    Parts {
        activation: Activation::Silu,
        layers: r.map(layer),
        narrow: true,
        cached: false,
        dropout: false,
        all_layers: true,
        depth: BackwardDepth::Input,
    }
}

impl Parts {
    /// Whether `n` tokens go through tiles.
    fn in_tiles(&self, context: Context<'_>, n: usize, fused: bool) -> bool {
        let plain = |layer: &Layer| !layer.bias && !layer.trained;
        fused
            && best().gemm_unit(context.precision).is_some()
            && n > 1
            && self.layers.iter().all(plain)
            && self.all_layers
            && !self.dropout
    }

    /// Whether the backward pass leaves `down`.
    fn reaches_gate(&self) -> bool {
        self.depth != BackwardDepth::Down
    }

    fn input_gradient(&self) -> bool {
        self.depth == BackwardDepth::Input
    }

    /// Which of the inputs get a gradient.
    fn wanted(&self) -> Vec<bool> {
        let mut wanted = vec![self.input_gradient()];
        for (index, layer) in self.layers.iter().enumerate() {
            let reached = self.reaches_gate() || index == 2;
            wanted.extend(vec![reached && layer.trained; 1 + usize::from(layer.bias)]);
            wanted.extend(vec![reached; if layer.r.is_some() { 2 } else { 0 }]);
        }
        wanted
    }

    /// x (N, C), then the weights of each layer. Gate and up are of the order of 1.
    fn inputs(&self, [n, c, f]: [usize; 3], seed: u64) -> Vec<Tensor> {
        let mut inputs = vec![random(seed, &[n, c])];
        for (layer, (o, i)) in self.layers.iter().zip([(f, c), (f, c), (c, f)]) {
            for (shape, trained) in layer.shapes(o, i) {
                let scale = if shape.last() == Some(&i) {
                    2.0 / (i as f64).sqrt()
                } else {
                    1.0
                };
                let x = random(seed ^ inputs.len() as u64, &shape).affine(scale, 0.0);
                let stored = self.dtype(trained);
                let x = x.and_then(|x| x.to_dtype(stored)?.to_dtype(DType::F32));
                inputs.push(x.unwrap());
            }
        }
        inputs
    }

    fn dtype(&self, trained: bool) -> DType {
        if self.narrow && !trained {
            DType::BF16
        } else {
            DType::F32
        }
    }

    /// The layers on these inputs.
    fn linears(&self, inputs: &[Tensor]) -> [Linear; 3] {
        let slots = parameters(inputs.iter().map(|x| ("", x)));
        let mut next = 1..;
        self.layers.map(|layer| {
            layer.linear(|trained| {
                let i = next.next().unwrap();
                if trained {
                    return slots.weight(i).unwrap();
                }
                let weight = Weight::frozen(inputs[i].to_dtype(self.dtype(false)).unwrap());
                if self.cached && inputs[i].dims().len() == 2 {
                    weight.with_packed_cache()
                } else {
                    weight
                }
            })
        })
    }

    /// `masks`: one for each layer, where there is dropout.
    fn run(
        &self,
        context: Context<'_>,
        inputs: &[Tensor],
        [base, dy]: [&Tensor; 2],
        masks: Option<Masks<'_>>,
    ) -> Result<Outputs> {
        let [gate_up @ .., down] = &self.linears(inputs);
        let layers = FeedForward {
            activation: self.activation,
            gated: true,
            gate_up,
            down,
        };
        let x = || LinearInput::new(context, inputs[0].clone());
        let (y, saved) = layers.forward(context, x()?, masks, Some(base), self.all_layers)?;
        let fused = context.fused(&inputs[0]);
        let tiles = masks.is_none() && self.in_tiles(context, inputs[0].dims()[0], fused);
        assert_eq!(saved.in_tiles(), tiles, "tiles, where they should be");
        let x = gate_up.iter().any(Linear::is_trained).then(x).transpose()?;
        let mut gradients = Gradients::new(inputs.len());
        let dx = layers.backward(context, dy, x.as_ref(), &saved, self.depth, &mut gradients)?;
        let weights = (1..inputs.len()).map(|i| gradients.get(i).cloned());
        let all: Vec<_> = std::iter::once(dx).chain(weights).collect();
        let some: Vec<_> = all.iter().map(Option::is_some).collect();
        assert_eq!(some, self.wanted(), "the gradients that are wanted");
        Ok((y, all))
    }

    fn naive(
        &self,
        inputs: &[Tensor],
        base: &Tensor,
        masks: Option<&[DropoutMask; 3]>,
    ) -> candle_core::Result<Tensor> {
        let mut weights = inputs[1..].iter();
        let mut layer = |index: usize, x: &Tensor| {
            self.layers[index].naive(x, &mut weights, masks.map(|masks| &masks[index]))
        };
        let gate = layer(0, &inputs[0])?;
        let up = layer(1, &inputs[0])?;
        let inner = (naive_activation(self.activation, &gate)? * up)?;
        layer(2, &inner)? + base.to_dtype(DType::F64)?
    }

    /// Both passes: the layers, the activation (recomputed for the weight gradients of `down`), the base,
    /// and the sum of the dx of gate and up.
    fn cost(&self, [n, c, f]: [usize; 3], inputs: &[Tensor], precision: Precision) -> Work {
        let linears = self.linears(inputs);
        let shapes = linears
            .each_ref()
            .map(|linear| linear.shape(n, self.dropout));
        let [gate, up, down] = shapes.map(Result::unwrap);
        let mut cost = self.activation.cost(n * f, true) + residual_cost(n, c);
        for shape in [gate, up, down] {
            cost += &shape.forward_cost(precision);
        }
        cost += &down.backward_cost(precision, self.reaches_gate());
        if linears[2].is_trained() {
            cost += &self.activation.cost(n * f, true);
        }
        if self.reaches_gate() {
            cost += &self.activation.backward_cost(n * f, true);
            cost += &gate.backward_cost(precision, self.input_gradient());
            cost += &up.backward_cost(precision, self.input_gradient());
        }
        if self.input_gradient() {
            cost += &residual_cost(n, c);
        }
        cost
    }

    fn masks(&self, [n, c, f]: [usize; 3], seed: u64) -> Option<[DropoutMask; 3]> {
        let mask = |columns: usize, seed: u64| mask(seed, (n, columns), 0.3);
        self.dropout
            .then(|| [mask(c, seed), mask(c, seed ^ 1), mask(f, seed ^ 2)])
    }

    /// In f32, as a pair.
    fn prove(&self, shape: [usize; 3], seed: u64) {
        let [n, c, f] = shape;
        let inputs = self.inputs(shape, seed);
        let masks = self.masks(shape, seed ^ 20);
        let base = random(seed ^ 30, &[n, c]);
        let mask = |layer: usize, _: &LinearInput| masks.as_ref().map(|masks| masks[layer].clone());
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 31, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                self.run(
                    context,
                    inputs,
                    [&base, dy],
                    self.dropout.then_some(&mask as _),
                )
            },
            naive: |inputs: &[Tensor]| self.naive(inputs, &base, masks.as_ref()),
            cost: self.cost(shape, &inputs, Precision::F32),
            roundings: n + c + f + 64,
        }
        .prove();
    }

    /// In bf16, by every implementation. Each of the products behind a result rounds its factors by
    /// 2^-9 at most, at random; what is left of one element may be little, so that all of them are
    /// compared together, where there are eight rows or more.
    fn prove_bf16(&self, shape: [usize; 3], seed: u64) {
        let [n, c, _] = shape;
        let inputs = self.inputs(shape, seed);
        let masks = self.masks(shape, seed ^ 20);
        let (base, dy) = (random(seed ^ 30, &[n, c]), random(seed ^ 31, &[n, c]));
        let mask = |layer: usize, _: &LinearInput| masks.as_ref().map(|masks| masks[layer].clone());
        let naive = |inputs: &[Tensor]| self.naive(inputs, &base, masks.as_ref());
        let want = named(autograd(&inputs, &dy, naive).unwrap());
        let cost = self.cost(shape, &inputs, Precision::Bf16);
        for implementation in Implementation::all() {
            let run = |threads: usize| {
                let run = |context: Context<'_>| {
                    FLOPS_ISSUED.set(0);
                    let masks = self.dropout.then_some(&mask as _);
                    let outputs = self.run(context, &inputs, [&base, &dy], masks).unwrap();
                    assert_eq!(context.counter.take(), cost, "counter and cost");
                    let issued = FLOPS_ISSUED.get();
                    assert!(
                        threads > 1 || issued == cost.flops(),
                        "FLOPs issued and counted"
                    );
                    outputs
                };
                named(on(threads, || implementation.run(Precision::Bf16, run)))
            };
            let (got, others) = (run(1), run(2));
            for (((name, got), (_, others)), (_, want)) in got.iter().zip(&others).zip(&want) {
                let (Some(got), Some(want)) = (got, want) else {
                    continue;
                };
                let name = format!("{name}, {}", implementation.name());
                assert_eq!(got.dims(), want.dims(), "{name}");
                let (values, wanted) = (flat(got), flat(want));
                let off = length(values.iter().zip(&wanted).map(|(got, want)| got - want));
                let off = off / length(wanted.iter().copied());
                assert!(n < 8 || off < 1.0 / 32.0, "{name} is off by {off}");
                assert_eq!(
                    bits(got),
                    bits(others.as_ref().unwrap()),
                    "{name}, 1 and 2 threads"
                );
            }
        }
    }

    /// Through tiles, with packed W cached and not, and layer by layer: the same bytes and work.
    /// Layer by layer: as with dropout, but without a mask.
    fn prove_tiles(&self, shape: [usize; 3], seed: u64) {
        let [n, c, _] = shape;
        let inputs = self.inputs(shape, seed);
        let (base, dy) = (random(seed ^ 30, &[n, c]), random(seed ^ 31, &[n, c]));
        let no_mask = |_: usize, _: &LinearInput| None;
        for isa in available().iter().filter(|isa| isa.matrix_unit.is_some()) {
            for precision in [Precision::F32, Precision::Bf16] {
                let run = |threads: usize, tiles: bool, cached: bool| {
                    let run = |context: Context<'_>| {
                        let masks = (!tiles).then_some(&no_mask as _);
                        let parts = Parts { cached, ..*self };
                        let outputs = parts.run(context, &inputs, [&base, &dy], masks);
                        let bits =
                            |(name, x): (String, Option<Tensor>)| (name, x.as_ref().map(bits));
                        let outputs: Vec<_> =
                            named(outputs.unwrap()).into_iter().map(bits).collect();
                        (outputs, context.counter.take())
                    };
                    on(threads, || Implementation::Fused(isa).run(precision, run))
                };
                let (want, work) = run(1, false, false);
                for (threads, cached) in [(1, false), (2, false), (3, false), (1, true), (3, true)]
                {
                    let (got, counted) = run(threads, true, cached);
                    assert_eq!(counted, work, "work in {precision:?}");
                    for ((name, got), (_, want)) in got.iter().zip(&want) {
                        let same = got == want;
                        assert!(
                            same,
                            "{name}, {precision:?}, {threads} threads, cached: {cached}"
                        );
                    }
                }
            }
        }
    }
}

/// relu apart, whose corner finite differences would cross.
fn activation() -> impl Strategy<Value = Activation> {
    prop::sample::select(vec![
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
    ])
}

fn rank() -> impl Strategy<Value = Option<usize>> {
    prop::option::of(1usize..40)
}

/// Nothing but W and adapters: what tiles take.
fn plain() -> impl Strategy<Value = Parts> {
    let flags = prop::array::uniform3(any::<bool>());
    let parts = (prop::array::uniform3(rank()), flags, activation());
    parts.prop_map(|(r, [narrow, cached, input_gradient], activation)| Parts {
        activation,
        narrow,
        cached,
        depth: if input_gradient {
            BackwardDepth::Input
        } else {
            BackwardDepth::Weights
        },
        ..adapters(r)
    })
}

fn parts() -> impl Strategy<Value = Parts> {
    let flags = prop::array::uniform6(any::<bool>());
    let parts = (prop::array::uniform3(layers(1..40)), flags, activation());
    parts.prop_map(|(layers, flags, activation)| {
        let [
            narrow,
            cached,
            dropout,
            all_layers,
            reaches_gate,
            input_gradient,
        ] = flags;
        let depth = match (all_layers || reaches_gate, input_gradient) {
            (true, true) => BackwardDepth::Input,
            (true, false) => BackwardDepth::Weights,
            (false, _) => BackwardDepth::Down,
        };
        Parts {
            activation,
            layers,
            narrow,
            cached,
            dropout,
            all_layers,
            depth,
        }
    })
}

fn shape() -> impl Strategy<Value = [usize; 3]> {
    (prop_oneof![1usize..4, 1usize..80], 1usize..80, 1usize..110).prop_map(|(n, c, f)| [n, c, f])
}

/// The root of the sum of squares.
fn length(x: impl Iterator<Item = f32>) -> f32 {
    x.map(|x| x * x).sum::<f32>().sqrt()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn feed_forward_is_its_definition(parts in prop_oneof![plain(), parts()], shape in shape(), seed: u64) {
        parts.prove(shape, seed);
    }

    #[test]
    fn feed_forward_in_bf16_is_its_definition(
        parts in prop_oneof![plain(), parts()],
        (n, c, f) in (1usize..80, 16usize..80, 16usize..110),
        seed: u64,
    ) {
        parts.prove_bf16([n, c, f], seed);
    }

    /// Through tiles or layer by layer: the same bytes and the same work, by any number of threads.
    #[test]
    fn tiles_change_no_byte(parts in plain(), shape in shape(), seed: u64) {
        parts.prove_tiles(shape, seed);
    }
}

/// One layer with a bias, or trained, is enough for none to go through tiles.
#[test]
fn tiles_take_adapters_alone() {
    for at in 0..3 {
        for (bias, trained) in [(true, false), (false, true)] {
            let mut parts = adapters([Some(2); 3]);
            parts.layers[at].bias = bias;
            parts.layers[at].trained = trained;
            parts.prove([5, 7, 40], at as u64);
        }
    }
}

/// Deep enough for several passes through k in every product, wide enough for several tasks.
#[test]
fn deep_layers_change_no_byte_in_tiles() {
    for narrow in [false, true] {
        let parts = Parts {
            narrow,
            ..adapters([Some(16), None, Some(40)])
        };
        parts.prove_tiles([70, 710, 1500], 3);
        parts.prove_tiles([33, 2100, 740], 4);
        parts.prove_tiles([710, 50, 90], 5);
    }
}

/// gate and up as one layer with one adapter: as two layers, of which each has A and its rows of B.
#[test]
fn one_layer_of_gate_and_up_is_both() {
    let (n, c, f, r) = (5, 6, 9, 2);
    let [x, dy] = [[n, c], [n, c]].map(|shape| random(9, &shape));
    let [w, a, b, down] =
        [[2 * f, c], [r, c], [2 * f, r], [c, f]].map(|shape| random(shape[0] as u64, &shape));
    let half = |x: &Tensor, part: usize| x.narrow(0, part * f, f).unwrap();
    let tensors = [&a, &b, &a, &half(&b, 0), &a, &half(&b, 1)];
    let slots = parameters(tensors.map(|x| ("", x)));
    let linear = |w: Tensor, first: Option<usize>| Linear {
        weight: Weight::frozen(w),
        bias: None,
        lora: first.map(|first| Lora {
            a: slots.weight(first).unwrap(),
            b: slots.weight(first + 1).unwrap(),
            bias: None,
            magnitude: None,
            scaling: 0.5,
        }),
    };
    let down = linear(down, None);
    let both = [linear(w.clone(), Some(0))];
    let apart = [0, 1].map(|part| linear(half(&w, part), Some(2 + 2 * part)));
    for_each_path(|context| {
        let run = |gate_up: &[Linear]| {
            let layers = FeedForward {
                activation: Activation::GeluTanh,
                gated: true,
                gate_up,
                down: &down,
            };
            let x = || LinearInput::new(context, x.clone()).unwrap();
            let (y, saved) = layers.forward(context, x(), None, None, true).unwrap();
            let gradients = &mut Gradients::new(6);
            let dx = layers.backward(
                context,
                &dy,
                Some(&x()),
                &saved,
                BackwardDepth::Input,
                gradients,
            );
            let weights: Vec<_> = (0..6).filter_map(|i| gradients.get(i).cloned()).collect();
            ([y, dx.unwrap().unwrap()], weights)
        };
        let ((outputs, weights), (wanted, parts)) = (run(&both), run(&apart));
        close("y", &outputs[0], &wanted[0], c + f);
        close("dx", &outputs[1], &wanted[1], c + f);
        close("dA", &weights[0], &(&parts[0] + &parts[2]).unwrap(), n + f);
        let db = Tensor::cat(&[&parts[1], &parts[3]], 0).unwrap();
        close("dB", &weights[1], &db, n + f);
    });
}
