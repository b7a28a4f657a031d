//! The CUDA passes on the host: what `Pair::prove`, which runs in f32, does not reach. Without a C++ compiler nothing runs
//! here, and tests/cuda_kernels.rs says so.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::{FORCED_PATH, Implementation, flat, largest, random, within};
use crate::ops::cuda::backend::{BROKEN, LAUNCHES, is_available};
use crate::ops::cuda::self_test;
use crate::ops::{Attention, Context, DropoutMask, Path, Segments, StreamRows, cuda, matmul};
use crate::random::{Purpose, stream};
use crate::work::Precision;

/// The results of both implementations in bf16.
fn both(work: impl Fn(Context<'_>) -> Vec<Tensor>) -> Option<[Vec<Tensor>; 2]> {
    if !is_available() {
        return None;
    }
    let before = LAUNCHES.get();
    let found = Implementation::Cuda.run(Precision::Bf16, &work);
    assert!(LAUNCHES.get() > before, "no kernel ran");
    Some([found, Implementation::Reference.run(Precision::F32, &work)])
}

/// Fails unless each value is within `relative` of the largest expected one.
fn near(name: &str, found: &Tensor, expected: &Tensor, relative: f32) {
    let found = found.to_dtype(DType::F32).unwrap();
    assert!(flat(&found).iter().all(|x| x.is_finite()), "{name}");
    within(name, &found, expected, relative * largest(expected));
}

#[test]
fn attention_in_bf16_runs_on_the_kernels() {
    let attention = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 40,
        causal: true,
        window: Some(30),
        scale: Some(0.2),
        softcap: Some(5.0),
    };
    let segments = Segments::from_lengths([3, 70, 1]);
    let n = segments.tokens();
    let [q, dout] = [1, 2].map(|seed| random(seed, &[n, 160]));
    let [k, v] = [3, 4].map(|seed| random(seed, &[n, 80]));
    let Some([found, expected]) = both(|context| {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let (out, saved) = attention.forward(context, q, k, v, &segments).unwrap();
        assert_eq!(
            out.dtype() == DType::BF16,
            context.precision == Precision::Bf16
        );
        let (dq, dk, dv) = attention
            .backward(context, &dout, &saved, &segments)
            .unwrap();
        vec![out, dq, dk, dv]
    }) else {
        return;
    };
    for (name, (found, expected)) in ["out", "dq", "dk", "dv"]
        .iter()
        .zip(found.iter().zip(&expected))
    {
        near(name, found, expected, 0.02);
    }
}

#[test]
fn products_take_transposed_and_strided_operands() {
    let a = random(5, &[7, 20]);
    let b = random(6, &[20, 9]);
    let columns = |x: &Tensor| x.t().unwrap().contiguous().unwrap().t().unwrap();
    let part = |x: &Tensor| x.narrow(1, 2, 5).unwrap();
    let inner = |x: &Tensor| x.narrow(0, 1, 3).unwrap();
    let cases: [[Tensor; 2]; 5] = [
        [a.clone(), b.clone()],
        [columns(&a), b.clone()],
        [a.clone(), columns(&b)],
        [part(&a), columns(&b.narrow(0, 4, 5).unwrap())],
        [inner(&columns(&a)), part(&b)],
    ];
    for [a, b] in &cases {
        let Some([found, expected]) = both(|context| {
            // A launch, which a product is not.
            let mask = DropoutMask::sample((1, 1), 0.0, |_, bits| bits.fill(u32::MAX));
            if context.precision == Precision::Bf16 {
                let one = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
                cuda::masked(&mask, &one, DType::F32).unwrap();
            }
            vec![matmul(context, a, b).unwrap()]
        }) else {
            return;
        };
        near("product", &found[0], &expected[0], 0.01);
    }
}

#[test]
fn dropout_masks_are_those_of_the_cpu() {
    let Some([found, expected]) = both(|context| {
        let streams: Vec<ChaCha8Rng> = [0, 5]
            .map(|example| stream(7, Purpose::Dropout, &[example], "q_proj"))
            .into();
        let rows = StreamRows {
            streams,
            segments: vec![0, 0, 1],
            tokens: vec![0, 1, 4],
        };
        let mask = DropoutMask::from_streams((3, 45), 0.25, rows);
        let ones = Tensor::ones((3, 45), DType::F32, &Device::Cpu).unwrap();
        vec![if context.precision == Precision::Bf16 {
            cuda::masked(&mask, &ones, DType::F32).unwrap()
        } else {
            mask.tensor(&Device::Cpu).unwrap()
        }]
    }) else {
        return;
    };
    near("mask", &found[0], &expected[0], 0.0);
}

#[test]
fn the_self_test_passes_and_names_a_kernel_that_fails() {
    if !is_available() {
        return;
    }
    FORCED_PATH.set(Some(Path::Cuda));
    let before = LAUNCHES.get();
    let passed = self_test(&Device::Cpu);
    let launches = LAUNCHES.get() - before;
    BROKEN.set(Some("attention_backward_keys_128"));
    let failed = self_test(&Device::Cpu);
    BROKEN.set(None);
    FORCED_PATH.set(None);
    passed.unwrap();
    assert!(launches >= 20, "{launches}");
    let message = failed.unwrap_err().to_string();
    assert!(message.contains("attention on"), "{message}");
}
