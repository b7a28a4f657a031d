//! The CUDA kernels without a GPU: their sources, compiled for the host with `cuda_kernels/emulation.h`, against the reference
//! of each op, over odd sizes, with poisoned outputs and shared memory, in several orders of blocks and threads.
//!
//! What only a GPU shows is not covered: speed, races of warps that the emulation runs one after another, the hardware's
//! own rounding of `expf` and `tanhf`. Without a C++ compiler every test says that it was skipped.

#[path = "cuda_kernels/attention.rs"]
mod attention;
#[path = "cuda_kernels/elementwise.rs"]
mod elementwise;
#[path = "cuda_kernels/harness.rs"]
mod harness;
#[path = "cuda_kernels/library.rs"]
mod library;
#[path = "cuda_kernels/norm.rs"]
mod norm;
#[path = "cuda_kernels/rows.rs"]
mod rows;

use candle_core::{Device, Tensor};
use harness::Buffer;
use wattune::ops::Context;
use wattune::work::{Precision, WorkCounter};

/// `n` values from -1 to 1.
fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..3).for_each(|_| _ = next());
    (0..n).map(|_| next()).collect()
}

/// The same, rounded to bf16.
fn random_bf16(seed: u64, n: usize) -> Vec<f32> {
    let round = |x: f32| half::bf16::from_f32(x).to_f32();
    random(seed, n).into_iter().map(round).collect()
}

fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Runs `work` with a context of the reference implementation in f32.
fn reference<T>(work: impl FnOnce(Context<'_>) -> T) -> T {
    let counter = WorkCounter::default();
    work(Context {
        reference: true,
        ..Context::new(&counter, Precision::F32)
    })
}

/// The element type of a kernel's argument.
#[derive(Clone, Copy, PartialEq)]
enum Type {
    F32,
    Bf16,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    fn random(self, seed: u64, n: usize) -> Vec<f32> {
        match self {
            Self::F32 => random(seed, n),
            Self::Bf16 => random_bf16(seed, n),
        }
    }

    fn input(self, values: &[f32]) -> Buffer {
        match self {
            Self::F32 => Buffer::new(values),
            Self::Bf16 => Buffer::bf16(values),
        }
    }

    fn output(self, n: usize) -> Buffer {
        match self {
            Self::F32 => Buffer::f32_output(n),
            Self::Bf16 => Buffer::bf16_output(n),
        }
    }

    fn get(self, buffer: &Buffer) -> Vec<f32> {
        match self {
            Self::F32 => buffer.f32s(),
            Self::Bf16 => buffer.bf16s(),
        }
    }

    /// Relative error of a result: rounding to bf16, or some operations in f32.
    fn error(self) -> f32 {
        match self {
            Self::F32 => 3e-6,
            Self::Bf16 => 1.0 / 256.0,
        }
    }
}

#[test]
fn a_missing_barrier_shows() {
    let ordered = harness::is_ordered(|device| {
        let y = Buffer::f32_output(64);
        device.launch("missing_barrier", [1; 3], [64, 1, 1], 0, &[y.arg()]);
        y.f32s()
    });
    assert_ne!(ordered, Some(true));
}
