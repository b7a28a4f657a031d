//! Every op pair against outside opinions.
//!
//! `prove` holds one pair, over random shapes and in every instruction set of this processor, to four of them: the other implementation,
//! candle's autograd on a naive formulation in f64, central finite differences, and itself on another number of threads; and its counter to
//! its cost and to the products issued.
//! PyTorch's figures are in `golden`. Knows nothing of models.

mod adamw;
mod attention;
mod costs;
mod dropout;
mod elementwise;
mod feed_forward;
mod golden;
mod linear;
mod lm_head;
mod refusals;
mod rope;

use candle_core::{DType, Device, Tensor, Var};
use proptest::test_runner::Config;

use super::gemm::{FORCED_ISA, Isa, available};
use super::{Context, DropoutMask, FLOPS_ISSUED};
use crate::work::{Precision, Work, WorkCounter};

/// Half the width of a central difference: its error is this squared times a third derivative, 6e-5, and rounding adds as much.
const STEP: f32 = 1.0 / 128.0;

/// An op pair's output, and the gradients of `sum(y * dy)` by input; `None` for an input that is not trained.
type Passed = (Tensor, Vec<Option<Tensor>>);

/// One op pair under proof.
struct Pair<'a, Op, Naive> {
    /// What is differentiated.
    inputs: &'a [Tensor],
    /// dy.
    dy: &'a Tensor,
    /// Forward and backward of ours.
    op: Op,
    /// The same value from candle's differentiable primitives, on the inputs in f64.
    naive: Naive,
    /// What both passes must have counted.
    cost: Work,
    /// f32 operations on the way to one number of the result.
    roundings: usize,
}

impl<Op, Naive> Pair<'_, Op, Naive>
where
    Op: Fn(Context<'_>, &[Tensor], &Tensor) -> Passed + Sync,
    Naive: Fn(&[Tensor]) -> Tensor + Sync,
{
    fn prove(&self) {
        let reference = named(self.run(None, 1));
        let oracle = named(autograd(self.inputs, self.dy, &self.naive));
        for ((name, reference), (_, want)) in reference.iter().zip(&oracle) {
            if let Some(reference) = reference {
                close(
                    &format!("{name}, reference"),
                    reference,
                    want.as_ref().unwrap(),
                    self.roundings,
                );
            }
        }
        for isa in available() {
            let (fused, others) = (named(self.run(Some(isa), 1)), named(self.run(Some(isa), 2)));
            for (i, (name, ours)) in fused.iter().enumerate() {
                assert_eq!(
                    ours.is_some(),
                    reference[i].1.is_some(),
                    "{name}: only one implementation has it"
                );
                let Some(ours) = ours else { continue };
                let name = format!("{name}, {}", isa.name);
                close(&name, ours, oracle[i].1.as_ref().unwrap(), self.roundings);
                assert_eq!(
                    bits(ours),
                    bits(others[i].1.as_ref().unwrap()),
                    "{name} at one thread and at two"
                );
                if let Some(input) = i.checked_sub(1) {
                    with(isa, || self.differentiate(input, ours));
                }
            }
        }
    }

    /// Runs the pair, the reference or fused in an instruction set, on a pool of `threads`; what it counted, and what one thread issued,
    /// must be the cost.
    fn run(&self, isa: Option<&'static Isa>, threads: usize) -> Passed {
        on(threads, || {
            let counter = WorkCounter::default();
            let context = Context {
                counter: &counter,
                precision: Precision::F32,
                reference: isa.is_none(),
            };
            let name = isa.map_or("reference", |isa| isa.name);
            FLOPS_ISSUED.set(0);
            let passed = with(isa.unwrap_or(available()[0]), || {
                (self.op)(context, self.inputs, self.dy)
            });
            let counted = counter.take();
            assert_eq!(counted, self.cost, "counter and cost, {name}");
            if threads == 1 {
                assert_eq!(
                    FLOPS_ISSUED.get(),
                    counted.flops(),
                    "products issued and counted, {name}"
                );
            }
            passed
        })
    }

    /// Holds three coordinates of `gradient` of input number `input` to the slope of the fused forward pass.
    fn differentiate(&self, input: usize, gradient: &Tensor) {
        let (values, gradient) = (flat(&self.inputs[input]), flat(gradient));
        let largest = gradient.iter().fold(1.0f32, |a, b| a.max(b.abs()));
        for at in [0, values.len() / 2, values.len() - 1] {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                let mut inputs = self.inputs.to_vec();
                inputs[input] =
                    Tensor::from_vec(values, inputs[input].shape(), &Device::Cpu).unwrap();
                let y = flat(
                    &(self.op)(
                        Context::new(&WorkCounter::default(), Precision::F32),
                        &inputs,
                        self.dy,
                    )
                    .0,
                );
                y.iter()
                    .zip(flat(self.dy))
                    .map(|(y, dy)| f64::from(*y) * f64::from(dy))
                    .sum::<f64>()
            };
            let slope = ((moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)) as f32;
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
fn autograd(inputs: &[Tensor], dy: &Tensor, naive: impl Fn(&[Tensor]) -> Tensor) -> Passed {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|x| Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap())
        .collect();
    let y = naive(
        &vars
            .iter()
            .map(|v| v.as_tensor().clone())
            .collect::<Vec<_>>(),
    );
    let loss = (&y * dy.to_dtype(DType::F64).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let gradients = loss.backward().unwrap();
    (
        y.detach(),
        vars.iter()
            .map(|v| Some(gradients.get(v).unwrap().detach()))
            .collect(),
    )
}

/// What a pair gave, each with its name.
fn named((y, gradients): Passed) -> Vec<(String, Option<Tensor>)> {
    let gradients = gradients
        .into_iter()
        .enumerate()
        .map(|(i, gradient)| (format!("gradient {i}"), gradient));
    std::iter::once(("y".to_string(), Some(y)))
        .chain(gradients)
        .collect()
}

/// Runs `work` with the fused passes that this thread begins in one instruction set.
pub(super) fn with<T>(isa: &'static Isa, work: impl FnOnce() -> T) -> T {
    let before = FORCED_ISA.replace(Some(isa));
    let done = work();
    FORCED_ISA.set(before);
    done
}

/// Runs `check` on the reference, then on the fused pass in every instruction set of this processor.
fn for_each_path(check: impl Fn(Context<'_>)) {
    let counter = WorkCounter::default();
    let fused = Context::new(&counter, Precision::F32);
    check(Context {
        reference: true,
        ..fused
    });
    available()
        .iter()
        .for_each(|isa| with(isa, || check(fused)));
}

/// Runs `work` on a rayon pool of its own.
pub(super) fn on<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}

/// A mask of random numbers.
fn mask(seed: u64, (rows, columns): (usize, usize), p: f64) -> DropoutMask {
    let drawn = uniform(seed, rows * columns);
    let bits = |u: &f32| ((f64::from(*u) * f64::from(1u32 << 24)) as u32) << 8;
    DropoutMask::sample((rows, columns), p, |row, numbers| {
        numbers
            .iter_mut()
            .zip(&drawn[row * columns..])
            .for_each(|(number, u)| *number = bits(u));
    })
}

/// Two ways to a number, each of at most `roundings` f32 operations on numbers no larger than `size`, end within
/// `2 * roundings * (EPSILON / 2) * size` of each other; inputs are of the order of 1, so `size` is 1 or the largest result.
fn close(name: &str, got: &Tensor, want: &Tensor, roundings: usize) {
    let size = flat(want).iter().fold(1.0f32, |a, b| a.max(b.abs()));
    within(name, got, want, roundings as f32 * f32::EPSILON * size);
}

/// Every number of `got` lies within `distance` of `want`'s; not a number is never within.
fn within(name: &str, got: &Tensor, want: &Tensor, distance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    for (i, (got, want)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        assert!(
            (got - want).abs() <= distance,
            "{name}: number {i} is {got}, not {want} (within {distance:e})"
        );
    }
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all()
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    flat(x).into_iter().map(f32::to_bits).collect()
}

/// Uniform numbers in [0, 1): splitmix64's upper 24 bits (Steele et al. 2014).
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

/// A tensor of uniform numbers in [-1, 1).
fn random(seed: u64, shape: &[usize]) -> Tensor {
    let values = uniform(seed, shape.iter().product())
        .iter()
        .map(|u| 2.0 * u - 1.0)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn of(values: &[f32], shape: &[usize]) -> Tensor {
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
