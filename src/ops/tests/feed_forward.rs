//! The feed-forward layers as one pair: every combination of biases, adapters, dropout and trained weights, in blocks or not.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::{available, best};
use super::super::{
    Context, DropoutMask, FeedForward, FeedForwardLayer, Gradients, Linear, LinearInput, Lora,
    Masks, Parameters, Weight, residual_cost, swiglu_backward_cost, swiglu_cost,
};
use super::{Pair, Passed, autograd, bits, cases, flat, mask, named, on, random, with};
use crate::work::{Precision, Work, WorkCounter};

const SCALING: f64 = 1.5;

/// What one of the layers is made of, beside W.
#[derive(Debug, Clone, Copy)]
struct Layer {
    bias: bool,
    r: Option<usize>,
    trained: bool,
}

/// Gate, up and down, and what is asked of them.
#[derive(Debug, Clone, Copy)]
struct Parts {
    layers: [Layer; 3],
    /// Whether what is frozen is stored in bf16.
    narrow: bool,
    /// Whether its packed forms stay.
    kept: bool,
    dropout: bool,
    /// Whether the forward pass knows that the backward pass goes through.
    known: bool,
    through: bool,
    input_gradient: bool,
}

impl Parts {
    /// Whether `n` tokens go through blocks.
    fn in_tiles(&self, context: Context<'_>, n: usize) -> bool {
        let plain = self
            .layers
            .iter()
            .all(|layer| !layer.bias && !layer.trained);
        !context.reference
            && best().gemm_unit(context.precision).is_some()
            && n > 1
            && plain
            && self.known
            && !self.dropout
    }

    /// Which of the inputs get a gradient.
    fn wanted(&self) -> Vec<bool> {
        let mut wanted = vec![self.input_gradient];
        for (index, layer) in self.layers.iter().enumerate() {
            let reached = self.through || index == 2;
            wanted.extend(vec![reached && layer.trained; 1 + usize::from(layer.bias)]);
            wanted.extend(vec![reached; if layer.r.is_some() { 2 } else { 0 }]);
        }
        wanted
    }

    /// x (N, C), then of each layer W, and bias, A, B where there are any. Gate and up are of the order of 1.
    fn inputs(&self, [n, c, f]: [usize; 3], seed: u64) -> Vec<Tensor> {
        let mut inputs = vec![random(seed, &[n, c])];
        for (layer, (o, i)) in self.layers.iter().zip([(f, c), (f, c), (c, f)]) {
            let mut push = |shape: &[usize], scale: f64, trained: bool| {
                let x = random(seed ^ inputs.len() as u64, shape)
                    .affine(scale, 0.0)
                    .unwrap();
                let x = if self.narrow && !trained {
                    x.to_dtype(DType::BF16).unwrap()
                } else {
                    x
                };
                inputs.push(x.to_dtype(DType::F32).unwrap());
            };
            let scale = 2.0 / (i as f64).sqrt();
            push(&[o, i], scale, layer.trained);
            if layer.bias {
                push(&[o], 1.0, layer.trained);
            }
            if let Some(r) = layer.r {
                push(&[r, i], scale, true);
                push(&[o, r], 1.0, true);
            }
        }
        inputs
    }

    /// The layers on these inputs.
    fn linears(&self, inputs: &[Tensor]) -> [Linear; 3] {
        let slots = |(i, x): (usize, &Tensor)| (i.to_string(), x.dims().to_vec(), flat(x));
        let parameters =
            Parameters::new(inputs.iter().enumerate().map(slots).collect(), &Device::Cpu).unwrap();
        let frozen = |x: &Tensor| {
            x.to_dtype(if self.narrow { DType::BF16 } else { DType::F32 })
                .unwrap()
        };
        let mut next = 1..;
        self.layers.map(|layer| {
            let mut weight = |trained: bool| match (trained, next.next().unwrap()) {
                (true, i) => parameters.weight(i).unwrap(),
                (false, i) if self.kept && inputs[i].dims().len() == 2 => {
                    Weight::frozen(frozen(&inputs[i])).with_packed_cache()
                }
                (false, i) => Weight::frozen(frozen(&inputs[i])),
            };
            Linear {
                weight: weight(layer.trained),
                bias: layer.bias.then(|| weight(layer.trained)),
                lora: layer.r.map(|_| Lora {
                    a: weight(true),
                    b: weight(true),
                    scaling: SCALING,
                }),
            }
        })
    }

    /// `masks`: one for each layer, where there is dropout.
    fn run(
        &self,
        context: Context<'_>,
        inputs: &[Tensor],
        (base, dy): (&Tensor, &Tensor),
        masks: Option<Masks<'_>>,
    ) -> Passed {
        let [gate, up, down] = &self.linears(inputs);
        let (layers, x) = (FeedForward { gate, up, down }, || {
            LinearInput::new(context, inputs[0].clone()).unwrap()
        });
        let (y, saved) = layers
            .forward(context, x(), masks, base, self.known)
            .unwrap();
        let tiles = masks.is_none() && self.in_tiles(context, inputs[0].dims()[0]);
        assert_eq!(saved.in_tiles(), tiles, "blocks, where they should be");
        let (x, mut gradients) = (
            (gate.needs_input() || up.needs_input()).then(x),
            Gradients::new(inputs.len()),
        );
        let asked = (self.through, self.input_gradient);
        let dx = layers
            .backward(context, dy, (x.as_ref(), &saved), asked, &mut gradients)
            .unwrap();
        let all: Vec<_> = std::iter::once(dx)
            .chain((1..inputs.len()).map(|i| gradients.get(i).cloned()))
            .collect();
        assert_eq!(
            all.iter().map(Option::is_some).collect::<Vec<_>>(),
            self.wanted(),
            "gradients of what is asked for"
        );
        (y, all)
    }

    fn naive(&self, inputs: &[Tensor], base: &Tensor, masks: Option<&[DropoutMask; 3]>) -> Tensor {
        let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let mut next = inputs[1..].iter();
        let mut layer = |index: usize, x: &Tensor| {
            let Layer { bias, r, .. } = self.layers[index];
            let mut y = product(x, next.next().unwrap());
            if bias {
                y = y.broadcast_add(next.next().unwrap()).unwrap();
            }
            if r.is_some() {
                let x = masks.map_or(x.clone(), |masks| {
                    (x * wide(&masks[index].tensor(&Device::Cpu).unwrap())).unwrap()
                });
                let low = product(&x, next.next().unwrap());
                y = (y + (product(&low, next.next().unwrap()) * SCALING).unwrap()).unwrap();
            }
            y
        };
        let (gate, up) = (layer(0, &inputs[0]), layer(1, &inputs[0]));
        let below = (gate.neg().unwrap().exp().unwrap() + 1.0).unwrap();
        let inner = (gate.div(&below).unwrap() * up).unwrap();
        (layer(2, &inner) + wide(base)).unwrap()
    }

    /// Both passes: the layers, SwiGLU (again where the last layer's gradient needs it), the base, and what gate and up give back added up.
    fn cost(&self, [n, c, f]: [usize; 3], inputs: &[Tensor], precision: Precision) -> Work {
        let linears = self.linears(inputs);
        let [gate, up, down] = linears
            .each_ref()
            .map(|linear| linear.shape(n, self.dropout).unwrap());
        let mut cost = gate.forward_cost(precision)
            + up.forward_cost(precision)
            + down.forward_cost(precision);
        cost += &(swiglu_cost(n * f)
            + residual_cost(n, c)
            + down.backward_cost(precision, self.through));
        if linears[2].needs_input() {
            cost += &swiglu_cost(n * f);
        }
        if self.through {
            let outer = [gate, up].map(|shape| shape.backward_cost(precision, self.input_gradient));
            outer
                .iter()
                .chain([&swiglu_backward_cost(n * f)])
                .for_each(|work| cost += work);
        }
        if self.input_gradient {
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
        let (inputs, masks, base) = (
            self.inputs(shape, seed),
            self.masks(shape, seed ^ 20),
            random(seed ^ 30, &[n, c]),
        );
        let mask = |part: FeedForwardLayer, _: &LinearInput| {
            masks.as_ref().map(|masks| masks[part as usize].clone())
        };
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 31, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                self.run(
                    context,
                    inputs,
                    (&base, dy),
                    self.dropout.then_some(&mask as _),
                )
            },
            naive: |inputs: &[Tensor]| self.naive(inputs, &base, masks.as_ref()),
            cost: self.cost(shape, &inputs, Precision::F32),
            roundings: n + c + f + 64,
        }
        .prove();
    }
}

fn rank() -> impl Strategy<Value = Option<usize>> {
    prop::option::of(1usize..40)
}

/// Nothing but W and adapters: what blocks take, where the forward pass knows what is to come.
fn plain() -> impl Strategy<Value = Parts> {
    (
        prop::array::uniform3(rank()),
        prop::array::uniform3(any::<bool>()),
    )
        .prop_map(|(r, [narrow, kept, input_gradient])| {
            let layers = r.map(|r| Layer {
                bias: false,
                r,
                trained: false,
            });
            Parts {
                layers,
                narrow,
                kept,
                dropout: false,
                known: true,
                through: true,
                input_gradient,
            }
        })
}

fn parts() -> impl Strategy<Value = Parts> {
    let layer = (any::<bool>(), rank(), any::<bool>()).prop_map(|(bias, r, trained)| Layer {
        bias,
        r,
        trained,
    });
    (
        prop::array::uniform3(layer),
        prop::array::uniform6(any::<bool>()),
    )
        .prop_map(|(layers, flags)| {
            let [narrow, kept, dropout, known, through, input_gradient] = flags;
            let through = known || through;
            Parts {
                layers,
                narrow,
                kept,
                dropout,
                known,
                through,
                input_gradient: through && input_gradient,
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

    /// In bf16, by every instruction set and the reference. Each of the products behind a result rounds what goes into it by 2^-9 at most,
    /// at random; what is left of a single number may be little, so that all of them are held together, where there are eight rows or more.
    #[test]
    fn feed_forward_in_bf16_is_its_definition(
        parts in prop_oneof![plain(), parts()],
        (n, c, f) in (1usize..80, 16usize..80, 16usize..110),
        seed: u64,
    ) {
        let shape = [n, c, f];
        let (inputs, masks) = (parts.inputs(shape, seed), parts.masks(shape, seed ^ 20));
        let (base, dy) = (random(seed ^ 30, &[n, c]), random(seed ^ 31, &[n, c]));
        let mask = |part: FeedForwardLayer, _: &LinearInput| masks.as_ref().map(|masks| masks[part as usize].clone());
        let want = named(autograd(&inputs, &dy, |inputs| parts.naive(inputs, &base, masks.as_ref())));
        let run = |threads: usize, reference: bool, isa| on(threads, || with(isa, || {
            let counter = WorkCounter::default();
            let context = Context { reference, ..Context::new(&counter, Precision::Bf16) };
            super::FLOPS_ISSUED.set(0);
            let passed = named(parts.run(context, &inputs, (&base, &dy), parts.dropout.then_some(&mask as _)));
            let counted = counter.take();
            assert_eq!(counted, parts.cost(shape, &inputs, Precision::Bf16), "counter and cost");
            assert!(threads > 1 || super::FLOPS_ISSUED.get() == counted.flops(), "products issued and counted");
            passed
        }));
        for (isa, reference) in available().iter().map(|isa| (*isa, false)).chain([(available()[0], true)]) {
            let (got, others) = (run(1, reference, isa), run(2, reference, isa));
            for (((name, got), (_, others)), (_, want)) in got.iter().zip(&others).zip(&want) {
                let (Some(got), Some(want)) = (got, want) else { continue };
                let name = format!("{name}, {}, reference {reference}", isa.name);
                let (got_all, want_all) = (flat(got), flat(want));
                assert_eq!(got.dims(), want.dims(), "{name}");
                let off = length(got_all.iter().zip(&want_all).map(|(got, want)| got - want)) / length(want_all.iter().copied());
                assert!(n < 8 || off < 1.0 / 32.0, "{name} is off by {off}");
                assert_eq!(bits(got), bits(others.as_ref().unwrap()), "{name} at one thread and at two");
            }
        }
    }

    /// Through blocks or layer by layer: the same bytes and the same work, by any number of threads.
    #[test]
    fn tiles_change_no_byte(parts in plain(), shape in shape(), seed: u64) {
        same_in_tiles(parts, shape, seed);
    }
}

/// `parts` through blocks, with W packed for good and not, and layer by layer: as with dropout, but without a mask.
fn same_in_tiles(parts: Parts, shape: [usize; 3], seed: u64) {
    let [n, c, _] = shape;
    let (inputs, base, dy) = (
        parts.inputs(shape, seed),
        random(seed ^ 30, &[n, c]),
        random(seed ^ 31, &[n, c]),
    );
    let no_mask = |_: FeedForwardLayer, _: &LinearInput| None;
    for isa in available().iter().filter(|isa| isa.matrix_unit.is_some()) {
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |threads: usize, tiles: bool, kept: bool| {
                on(threads, || {
                    with(isa, || {
                        let counter = WorkCounter::default();
                        let context = Context::new(&counter, precision);
                        let masks: Option<Masks<'_>> = if tiles { None } else { Some(&no_mask) };
                        let parts = Parts { kept, ..parts };
                        (
                            named(parts.run(context, &inputs, (&base, &dy), masks)),
                            counter.take(),
                        )
                    })
                })
            };
            let (want, work) = run(1, false, false);
            for (threads, kept) in [(1, false), (2, false), (3, false), (1, true), (3, true)] {
                let (got, counted) = run(threads, true, kept);
                assert_eq!(counted, work, "work of {precision:?}");
                for ((name, got), (_, want)) in got.iter().zip(&want) {
                    let same = got.as_ref().map(bits) == want.as_ref().map(bits);
                    assert!(
                        same,
                        "{name} in {precision:?} at {threads} threads, W packed for good: {kept}"
                    );
                }
            }
        }
    }
}

/// One layer with a bias, or trained, is enough for none to go through blocks.
#[test]
fn tiles_take_adapters_alone() {
    for at in 0..3 {
        for (bias, trained) in [(true, false), (false, true)] {
            let mut layers = [Layer {
                bias: false,
                r: Some(2),
                trained: false,
            }; 3];
            layers[at] = Layer {
                bias,
                trained,
                ..layers[at]
            };
            let parts = Parts {
                layers,
                narrow: true,
                kept: false,
                dropout: false,
                known: true,
                through: true,
                input_gradient: true,
            };
            parts.prove([5, 7, 40], at as u64);
        }
    }
}

/// Deep enough for several passes through k in every product, wide enough for several tasks.
#[test]
fn deep_layers_change_no_byte_in_tiles() {
    let layer = |r| Layer {
        bias: false,
        r,
        trained: false,
    };
    for narrow in [false, true] {
        let layers = [layer(Some(16)), layer(None), layer(Some(40))];
        let parts = Parts {
            layers,
            narrow,
            kept: false,
            dropout: false,
            known: true,
            through: true,
            input_gradient: true,
        };
        same_in_tiles(parts, [70, 710, 1500], 3);
        same_in_tiles(parts, [33, 2100, 740], 4);
        same_in_tiles(parts, [710, 50, 90], 5);
    }
}
