//! Speed of each op: GFLOP/s or GB/s, and the fraction of this CPU's measured peak.
//!
//!     cargo bench --bench kernels              every op
//!     cargo bench --bench kernels -- linear    ops whose name contains `linear`
//!
//! The peaks are measured first, on the same threads: a large GEMM in each precision, or FMAs in
//! registers if faster, and a copy far beyond the caches. Sizes are SmolLM2-135M's at 4 x 256
//! tokens. The best of several runs counts, since other processes only slow runs down.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use wattune::ops::{
    Activation, Attention, Context, Gradients, InputGradient, Linear, LmHead, Lora, Norm, NormKind,
    Parameters, Segments, Weight, instruction_set,
};
use wattune::work::{Precision, WorkCounter};

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const VOCABULARY: usize = 49152;
const RANK: usize = 16;

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|word| !word.starts_with("--"))
        .unwrap_or_default();
    let fma = fma_peak();
    let [gemm_f32, gemm_bf16] = [Precision::F32, Precision::Bf16].map(large_gemm);
    let bandwidth = copy_bandwidth();
    println!(
        "{} threads, {}: GFLOP/s of f32 FMAs {:.0}, of a large GEMM {:.0} in f32 and {:.0} in bf16; {:.1} GB/s of copying",
        rayon::current_num_threads(),
        instruction_set(),
        fma / 1e9,
        gemm_f32 / 1e9,
        gemm_bf16 / 1e9,
        bandwidth / 1e9
    );
    println!(
        "{:<34} {:>9} {:>9} {:>9} {:>7}",
        "", "ms", "GFLOP/s", "GB/s", "of peak"
    );
    for (precision, gemm) in [(Precision::F32, gemm_f32), (Precision::Bf16, gemm_bf16)] {
        let bench = Bench {
            filter: &filter,
            precision,
            peak_flops: fma.max(gemm),
            peak_bandwidth: bandwidth,
        };
        linears(&bench);
        attentions(&bench);
        head(&bench);
        elementwise(&bench);
    }
}

struct Bench<'a> {
    filter: &'a str,
    precision: Precision,
    /// FLOP/s.
    peak_flops: f64,
    /// Bytes/s.
    peak_bandwidth: f64,
}

impl Bench<'_> {
    /// Times `run` and prints its work by its own counter, relative to the peak that bounds it.
    fn line(&self, name: &str, mut run: impl FnMut(Context<'_>)) {
        let name = format!("{name} {}", self.precision.as_str());
        if !name.contains(self.filter) {
            return;
        }
        let counter = WorkCounter::default();
        let context = Context::new(&counter, self.precision);
        run(context);
        let work = counter.take();
        let seconds = best(|| run(context));
        let sweeps = work.iter_sweeps().map(|(bytes, count)| bytes.0 * count);
        let bandwidth = sweeps.sum::<u64>() as f64 / seconds;
        let flops = work.flops() as f64 / seconds;
        let fraction = if flops > 0.0 {
            flops / self.peak_flops
        } else {
            bandwidth / self.peak_bandwidth
        };
        let giga = |rate: f64| {
            if rate > 0.0 {
                format!("{:.1}", rate / 1e9)
            } else {
                "-".into()
            }
        };
        println!(
            "{name:<34} {:>9.3} {:>9} {:>9} {:>6.0}%",
            1e3 * seconds,
            giga(flops),
            giga(bandwidth),
            100.0 * fraction
        );
    }

    /// Calls `run` once, uncounted.
    fn once<T>(&self, run: impl FnOnce(Context<'_>) -> T) -> T {
        run(Context::new(&WorkCounter::default(), self.precision))
    }

    fn frozen(&self, shape: &[usize]) -> Weight {
        Weight::frozen(random(shape, wattune::ops::dtype(self.precision)))
    }
}

/// The shortest of at least five runs and half a second.
fn best(mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let mut runs = 0;
    let begun = Instant::now();
    while runs < 5 || begun.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn random(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::rand(-1.0f32, 1.0, shape, &Device::Cpu)
        .and_then(|x| x.to_dtype(dtype))
        .expect("a tensor")
}

fn linears(bench: &Bench<'_>) {
    for (name, input, output) in [
        ("q_proj", HIDDEN, HIDDEN),
        ("k_proj", HIDDEN, 192),
        ("up_proj", HIDDEN, INNER),
        ("down_proj", INNER, HIDDEN),
    ] {
        let lora = [("a", vec![RANK, input]), ("b", vec![output, RANK])];
        let slots = lora.map(|(name, shape)| {
            let values = vec![0.01; shape.iter().product()];
            (name.to_string(), shape, values)
        });
        let parameters = Parameters::new(slots.into(), &Device::Cpu).expect("parameters");
        let weight = |slot: usize| parameters.weight(slot).expect("a slot");
        let linear = Linear {
            weight: bench.frozen(&[output, input]),
            bias: None,
            lora: Some(Lora {
                a: weight(0),
                b: weight(1),
                bias: None,
                magnitude: None,
                scaling: 2.0,
            }),
        };
        let x = random(&[TOKENS, input], DType::F32);
        let dy = random(&[TOKENS, output], DType::F32);
        let forward =
            |context: Context<'_>| linear.forward(context, &x, None, None).expect("forward");
        bench.line(&format!("linear {name} forward"), |context| {
            forward(context);
        });
        let (_, saved) = bench.once(forward);
        bench.line(&format!("linear {name} backward"), |context| {
            let gradients = &mut Gradients::new(2);
            linear
                .backward(
                    context,
                    &dy,
                    Some(&x),
                    &saved,
                    InputGradient::Compute,
                    gradients,
                )
                .expect("backward");
        });
    }
}

fn attentions(bench: &Bench<'_>) {
    let attention = Attention {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        causal: true,
        window: None,
        scale: None,
        softcap: None,
    };
    for length in [256, 1024] {
        let segments = Segments::from_lengths(vec![length; TOKENS / length]);
        let q = random(&[TOKENS, HIDDEN], DType::F32);
        let kv = random(&[TOKENS, 192], DType::F32);
        let forward = |context: Context<'_>| {
            attention
                .forward(context, q.clone(), kv.clone(), kv.clone(), &segments)
                .expect("forward")
        };
        bench.line(&format!("attention {length} forward"), |context| {
            forward(context);
        });
        let (_, saved) = bench.once(forward);
        bench.line(&format!("attention {length} backward"), |context| {
            attention
                .backward(context, &q, &saved, &segments)
                .expect("backward");
        });
    }
}

fn head(bench: &Bench<'_>) {
    let head = LmHead {
        bias: None,
        weight: bench.frozen(&[VOCABULARY, HIDDEN]),
        softcap: None,
        lora: None,
    };
    let h = random(&[256, HIDDEN], DType::F32);
    let targets = vec![7u32; 256];
    bench.line("head forward and backward", |context| {
        head.forward_backward(context, &h, &targets, 1.0, true, &mut Gradients::new(0))
            .expect("a loss");
    });
}

fn elementwise(bench: &Bench<'_>) {
    let x = random(&[TOKENS, HIDDEN], DType::F32);
    let norm = Norm {
        kind: NormKind::Rms,
        weight: Weight::frozen(random(&[HIDDEN], DType::F32)),
        bias: None,
        unit_offset: false,
        eps: 1e-5,
        factor: 1.0,
    };
    bench.line("rms_norm forward", |context| {
        norm.forward(context, &x).expect("forward");
    });
    let (_, saved) = bench.once(|context| norm.forward(context, &x).expect("forward"));
    bench.line("rms_norm backward", |context| {
        norm.backward(context, &x, &saved, None, &mut Gradients::new(0))
            .expect("backward");
    });
    let gate = random(&[TOKENS, INNER], DType::F32);
    for (name, activation) in [
        ("swiglu", Activation::Silu),
        ("geglu", Activation::Gelu),
        ("geglu tanh", Activation::GeluTanh),
    ] {
        let forward = |context: Context<'_>| activation.forward(context, &gate, Some(&gate));
        bench.line(&format!("{name} forward"), |context| {
            forward(context).expect("forward");
        });
        let (_, saved) = bench.once(|context| forward(context).expect("forward"));
        bench.line(&format!("{name} backward"), |context| {
            let gradients = activation.backward(context, &gate, &saved);
            gradients.expect("backward");
        });
    }
}

/// FLOP/s of a GEMM of 2048 x 2048 matrices.
fn large_gemm(precision: Precision) -> f64 {
    const SIDE: usize = 2048;
    let weight = Weight::frozen(random(&[SIDE, SIDE], wattune::ops::dtype(precision)));
    let linear = Linear {
        weight,
        bias: None,
        lora: None,
    };
    let x = random(&[SIDE, SIDE], DType::F32);
    let counter = WorkCounter::default();
    let seconds = best(|| {
        linear
            .forward(Context::new(&counter, precision), &x, None, None)
            .expect("forward");
    });
    (2 * SIDE * SIDE * SIDE) as f64 / seconds
}

/// FLOP/s of FMAs in registers, on every thread.
fn fma_peak() -> f64 {
    const ROUNDS: usize = 2_000_000;
    struct Chains<const N: usize>;
    impl<const N: usize> pulp::NullaryFnOnce for Chains<N> {
        type Output = f32;
        #[inline(always)]
        fn call(self) -> f32 {
            let mut sums = [0.5f32; N];
            for _ in 0..ROUNDS {
                sums.iter_mut()
                    .for_each(|sum| *sum = sum.mul_add(0.999, 0.001));
            }
            sums.iter().sum()
        }
    }
    fn rate<const N: usize>() -> f64 {
        let threads = rayon::current_num_threads();
        let seconds = best(|| {
            let chains = |_| pulp::Arch::new().dispatch(Chains::<N>);
            std::hint::black_box(
                (0..threads)
                    .into_par_iter()
                    .with_max_len(1)
                    .map(chains)
                    .sum::<f32>(),
            );
        });
        (2 * threads * ROUNDS * N) as f64 / seconds
    }
    // Twelve vectors of eight lanes, then of sixteen: enough to hide the latency, and they fit the
    // registers.
    rate::<96>().max(rate::<192>())
}

/// Bytes read and written a second by copying 256 MiB.
fn copy_bandwidth() -> f64 {
    let from = vec![1u64; 32 << 20];
    let mut to = vec![0u64; 32 << 20];
    let seconds = best(|| {
        to.par_chunks_mut(1 << 20)
            .zip(from.par_chunks(1 << 20))
            .for_each(|(to, from)| to.copy_from_slice(from))
    });
    (2 * 8 * from.len()) as f64 / seconds
}
