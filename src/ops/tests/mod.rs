//! Every op pair against independent oracles.
//!
//! `Pair::prove` checks one pair, over random shapes, in the reference, on the device path and in
//! every instruction set of this CPU, against candle's autograd of a naive formulation in f64,
//! central finite differences, and itself on another number of threads; and its counted work
//! against its cost function and the products issued. PyTorch's values are in `golden`, candle-nn's
//! in `oracles`. Knows nothing of models.

mod adamw;
mod attention;
mod columns;
mod costs;
mod cuda;
mod dora;
mod dropout;
mod elementwise;
mod experts;
mod feed_forward;
mod golden;
mod linear;
mod lm_head;
mod oracles;
mod refusals;
mod rope;

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use proptest::test_runner::Config;

use super::gemm::{FORCED_ISA, Isa, available};
use super::{
    Attention, Context, DropoutMask, FLOPS_ISSUED, FORCED_PATH, Linear, Lora, Parameters, Path,
    Weight,
};
use crate::error::Result;
use crate::work::{Precision, Work, WorkCounter};

/// Half the width of a central difference: its error is this squared times a third derivative,
/// 6e-5, and rounding adds as much.
const STEP: f32 = 1.0 / 128.0;

/// An op's output, and the gradients of `sum(y * dy)` by input; `None` for an input that is not
/// trained.
type Outputs = (Tensor, Vec<Option<Tensor>>);

/// One implementation of the ops.
#[derive(Clone, Copy)]
enum Implementation {
    Reference,
    /// Our CUDA kernels, compiled for the host.
    Cuda,
    /// candle-nn's kernels, on the CPU device.
    Device,
    Fused(&'static Isa),
}

impl Implementation {
    /// Every implementation that this machine can run.
    fn all() -> impl Iterator<Item = Self> {
        let fused = available().iter().map(|isa| Self::Fused(isa));
        let cuda = super::cuda::backend::is_available().then_some(Self::Cuda);
        [Self::Reference, Self::Device]
            .into_iter()
            .chain(cuda)
            .chain(fused)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Cuda => "cuda",
            Self::Device => "device",
            Self::Fused(isa) => isa.name,
        }
    }

    /// Runs ops that this thread begins.
    fn run<T>(self, precision: Precision, work: impl FnOnce(Context<'_>) -> T) -> T {
        let counter = WorkCounter::default();
        let context = Context {
            reference: matches!(self, Self::Reference),
            ..Context::new(&counter, precision)
        };
        FORCED_PATH.set(match self {
            Self::Cuda => Some(Path::Cuda),
            Self::Device => Some(Path::Device),
            Self::Reference | Self::Fused(_) => None,
        });
        let done = match self {
            Self::Fused(isa) => with(isa, || work(context)),
            Self::Reference | Self::Cuda | Self::Device => work(context),
        };
        FORCED_PATH.set(None);
        done
    }
}

/// Runs `check` in f32 on every implementation.
fn for_each_path(check: impl Fn(Context<'_>)) {
    Implementation::all().for_each(|implementation| implementation.run(Precision::F32, &check));
}

/// Runs `work` with the fused passes that this thread begins in one instruction set.
pub(super) fn with<T>(isa: &'static Isa, work: impl FnOnce() -> T) -> T {
    let before = FORCED_ISA.replace(Some(isa));
    let done = work();
    FORCED_ISA.set(before);
    done
}

/// Runs `work` on a rayon pool of its own.
pub(super) fn on<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(work)
}

/// One op pair under proof.
struct Pair<'a, Op, Naive> {
    /// What is differentiated.
    inputs: &'a [Tensor],
    /// dy.
    dy: &'a Tensor,
    /// Our forward and backward.
    op: Op,
    /// The same value from candle's differentiable primitives, on the inputs in f64.
    naive: Naive,
    /// What both passes must count.
    cost: Work,
    /// f32 operations behind one element of the result.
    roundings: usize,
}

impl<Op, Naive> Pair<'_, Op, Naive>
where
    Op: Fn(Context<'_>, &[Tensor], &Tensor) -> Result<Outputs> + Sync,
    Naive: Fn(&[Tensor]) -> candle_core::Result<Tensor> + Sync,
{
    fn prove(&self) {
        let oracle = named(autograd(self.inputs, self.dy, &self.naive).unwrap());
        let expected: Vec<_> = named(self.run(Implementation::Reference, 1))
            .iter()
            .map(|(_, tensor)| tensor.is_some())
            .collect();
        for implementation in Implementation::all() {
            let ours = named(self.run(implementation, 1));
            for (i, (name, ours)) in ours.iter().enumerate() {
                let name = format!("{name}, {}", implementation.name());
                assert_eq!(ours.is_some(), expected[i], "{name}: not in the reference");
                let Some(ours) = ours else { continue };
                close(&name, ours, oracle[i].1.as_ref().unwrap(), self.roundings);
            }
            if let Implementation::Fused(isa) = implementation {
                let others = named(self.run(implementation, 2));
                for (i, (name, ours)) in ours.iter().enumerate() {
                    let Some(ours) = ours else { continue };
                    let others = bits(others[i].1.as_ref().unwrap());
                    assert_eq!(bits(ours), others, "{name}, {}, 1 and 2 threads", isa.name);
                    if let Some(input) = i.checked_sub(1) {
                        self.differentiate(implementation, input, ours);
                    }
                }
            }
        }
    }

    /// Runs the pair; checks what it counted, and what one thread issued, against the cost.
    fn run(&self, implementation: Implementation, threads: usize) -> Outputs {
        let name = implementation.name();
        on(threads, || {
            implementation.run(Precision::F32, |context| {
                FLOPS_ISSUED.set(0);
                let outputs = (self.op)(context, self.inputs, self.dy).unwrap();
                let counted = context.counter.take();
                assert_eq!(counted, self.cost, "counter and cost, {name}");
                if threads == 1 {
                    let issued = FLOPS_ISSUED.get();
                    assert_eq!(issued, counted.flops(), "FLOPs issued and counted, {name}");
                }
                outputs
            })
        })
    }

    /// Checks three elements of the gradient of input `input` against the slope of the forward
    /// pass.
    fn differentiate(&self, implementation: Implementation, input: usize, gradient: &Tensor) {
        let (values, gradient) = (flat(&self.inputs[input]), flat(gradient));
        let largest = gradient.iter().fold(1.0f32, |a, b| a.max(b.abs()));
        for at in [0, values.len() / 2, values.len() - 1] {
            let loss = |delta: f32| {
                let mut values = values.clone();
                values[at] += delta;
                let mut inputs = self.inputs.to_vec();
                inputs[input] = tensor(&values, inputs[input].dims());
                let run = |context: Context<'_>| (self.op)(context, &inputs, self.dy);
                let y = flat(&implementation.run(Precision::F32, run).unwrap().0);
                let products = y.iter().zip(flat(self.dy));
                products
                    .map(|(y, dy)| f64::from(*y) * f64::from(dy))
                    .sum::<f64>()
            };
            let slope = ((loss(STEP) - loss(-STEP)) / f64::from(2.0 * STEP)) as f32;
            let distance = (slope - gradient[at]).abs();
            assert!(
                distance <= 4e-3 * largest,
                "gradient {input} at {at}: {} but the slope is {slope}",
                gradient[at]
            );
        }
    }
}

/// Value and gradients by candle's autograd, in f64.
fn autograd(
    inputs: &[Tensor],
    dy: &Tensor,
    naive: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Outputs> {
    let vars = inputs
        .iter()
        .map(|x| Var::from_tensor(&x.to_dtype(DType::F64)?));
    let vars = vars.collect::<candle_core::Result<Vec<_>>>()?;
    let tensors: Vec<_> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = naive(&tensors)?;
    let gradients = (&y * dy.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
    let gradients = vars.iter().map(|v| Some(gradients.get(v)?.detach()));
    Ok((y.detach(), gradients.collect()))
}

/// The outputs, each with its name.
fn named((y, gradients): Outputs) -> Vec<(String, Option<Tensor>)> {
    let gradients = gradients.into_iter().enumerate();
    let gradients = gradients.map(|(i, gradient)| (format!("gradient {i}"), gradient));
    std::iter::once(("y".to_string(), Some(y)))
        .chain(gradients)
        .collect()
}

const fn attention(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    Attention {
        heads,
        kv_heads,
        head_dim,
        causal: true,
        window: None,
        scale: None,
        softcap: None,
    }
}

/// The parts of a linear layer besides W.
#[derive(Debug, Clone, Copy)]
struct Layer {
    bias: bool,
    r: Option<usize>,
    trained: bool,
}

impl Layer {
    const SCALING: f64 = 1.5;

    /// Shapes of W (o, i), and of the bias, A and B where it has them; and which are trained.
    fn shapes(&self, o: usize, i: usize) -> Vec<(Vec<usize>, bool)> {
        let mut shapes = vec![(vec![o, i], self.trained)];
        shapes.extend(self.bias.then(|| (vec![o], self.trained)));
        if let Some(r) = self.r {
            shapes.extend([(vec![r, i], true), (vec![o, r], true)]);
        }
        shapes
    }

    /// The layer on these weights, in the order of `shapes`; `weight` takes whether it is trained.
    fn linear(&self, mut weight: impl FnMut(bool) -> Weight) -> Linear {
        Linear {
            weight: weight(self.trained),
            bias: self.bias.then(|| weight(self.trained)),
            lora: self.r.map(|_| Lora {
                a: weight(true),
                b: weight(true),
                bias: None,
                magnitude: None,
                scaling: Self::SCALING,
            }),
        }
    }

    /// x W^T + bias + scaling * masked x A^T B^T in candle's primitives, f64.
    fn naive<'a>(
        &self,
        x: &Tensor,
        mut weights: impl Iterator<Item = &'a Tensor>,
        mask: Option<&DropoutMask>,
    ) -> candle_core::Result<Tensor> {
        let mut weight = || weights.next().unwrap();
        let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t()?);
        let mut y = product(x, weight())?;
        if self.bias {
            y = y.broadcast_add(weight())?;
        }
        if self.r.is_some() {
            let mask = mask.map(|mask| mask.tensor(&Device::Cpu).unwrap());
            let x = match mask {
                Some(mask) => (x * mask.to_dtype(DType::F64)?)?,
                None => x.clone(),
            };
            let low = product(&product(&x, weight())?, weight())?;
            y = (y + (low * Self::SCALING)?)?;
        }
        Ok(y)
    }
}

prop_compose! {
    fn layers(ranks: std::ops::Range<usize>)(
        r in prop::option::of(ranks),
        [bias, trained] in prop::array::uniform2(any::<bool>()),
    ) -> Layer {
        Layer { bias, r, trained }
    }
}

/// A random dropout mask.
fn mask(seed: u64, (rows, columns): (usize, usize), p: f64) -> DropoutMask {
    let drawn = uniform(seed, rows * columns);
    let bits = |u: &f32| ((f64::from(*u) * f64::from(1u32 << 24)) as u32) << 8;
    DropoutMask::sample((rows, columns), p, |row, words| {
        let drawn = &drawn[row * columns..];
        words
            .iter_mut()
            .zip(drawn)
            .for_each(|(word, u)| *word = bits(u));
    })
}

/// `tensors` as trained parameters of these names.
fn parameters<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Parameters {
    let tensors = tensors.into_iter();
    let named = tensors.map(|(name, x)| (name.to_string(), x.dims().to_vec(), flat(x)));
    Parameters::new(named.collect(), &Device::Cpu).unwrap()
}

/// `tensor` as the only trained parameter.
fn trained(tensor: &Tensor) -> Weight {
    parameters([("w", tensor)]).weight(0).unwrap()
}

/// Two ways to a value, each of at most `roundings` f32 operations on values no larger than `size`,
/// end within `2 * roundings * (EPSILON / 2) * size` of each other; inputs are of the order of 1,
/// so `size` is 1 or the largest result.
fn close(name: &str, got: &Tensor, want: &Tensor, roundings: usize) {
    within(
        name,
        got,
        want,
        roundings as f32 * f32::EPSILON * largest(want),
    );
}

/// The largest magnitude, at least 1.
fn largest(x: &Tensor) -> f32 {
    flat(x).iter().fold(1.0f32, |a, b| a.max(b.abs()))
}

/// Every element of `got` lies within `distance` of `want`'s; NaN never does.
fn within(name: &str, got: &Tensor, want: &Tensor, distance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    for (i, (got, want)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        assert!(
            (got - want).abs() <= distance,
            "{name}: element {i} is {got}, not {want} (within {distance:e})"
        );
    }
}

fn flat(x: &Tensor) -> Vec<f32> {
    let x = x.flatten_all().and_then(|x| x.to_dtype(DType::F32));
    x.and_then(|x| x.to_vec1()).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    flat(x).into_iter().map(f32::to_bits).collect()
}

/// Uniform values in [0, 1): splitmix64's upper 24 bits (Steele et al. 2014).
pub(super) fn uniform(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| next()).collect()
}

/// A tensor of uniform values in [-1, 1).
fn random(seed: u64, shape: &[usize]) -> Tensor {
    let values = uniform(seed, shape.iter().product());
    let values: Vec<_> = values.iter().map(|u| 2.0 * u - 1.0).collect();
    tensor(&values, shape)
}

/// Uniform indices below `end`.
fn indices(seed: u64, n: usize, end: usize) -> Vec<u32> {
    let drawn = uniform(seed, n);
    drawn.iter().map(|u| (u * end as f32) as u32).collect()
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// `cases` random cases, or as many as PROPTEST_CASES says.
pub(super) fn cases(cases: u32) -> Config {
    let default = Config {
        failure_persistence: None,
        ..Config::default()
    };
    if std::env::var_os("PROPTEST_CASES").is_some() {
        default
    } else {
        Config { cases, ..default }
    }
}
