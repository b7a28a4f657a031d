//! Each op pair alone: GFLOP/s or GB/s, and its share of what this processor can do at most.
//!
//!     cargo bench --bench kernels              every line
//!     cargo bench --bench kernels -- linear    lines whose name holds `linear`
//!
//! The peaks are measured first, in the same process on the same threads: a large product in each precision, or multiply-adds on registers
//! where they are faster (tile registers multiply faster than they do), and a copy far beyond the caches.
//! Sizes are SmolLM2-135M's at 4 x 256 tokens. The best of several runs counts: other work on the machine makes single runs slower.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use wattune::ops::{
    Attention, Context, Gradients, Linear, LmHead, Lora, Parameters, RmsNorm, Segments, Weight,
    instruction_set, swiglu, swiglu_backward,
};
use wattune::work::{Precision, WorkCounter};

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const VOCABULARY: usize = 49152;
const RANK: usize = 16;

fn main() {
    let wanted = std::env::args()
        .skip(1)
        .find(|word| !word.starts_with("--"))
        .unwrap_or_default();
    let (adds, [wide, narrow]) = (
        multiply_adds(),
        [Precision::F32, Precision::Bf16].map(large_product),
    );
    let peaks = Peaks {
        f32: adds.max(wide),
        bf16: adds.max(narrow),
        bytes: copy(),
    };
    println!(
        "{} threads, {}: GFLOP/s of f32 multiply-adds {:.0}, of large products {:.0} in f32 and {:.0} in bf16; {:.1} GB/s of copying",
        rayon::current_num_threads(),
        instruction_set(),
        adds / 1e9,
        wide / 1e9,
        narrow / 1e9,
        peaks.bytes / 1e9
    );
    println!(
        "{:<34} {:>9} {:>9} {:>9} {:>7}",
        "", "ms", "GFLOP/s", "GB/s", "of peak"
    );
    for precision in [Precision::F32, Precision::Bf16] {
        linears(precision, &wanted, &peaks);
        attentions(precision, &wanted, &peaks);
        head(precision, &wanted, &peaks);
        elementwise(precision, &wanted, &peaks);
    }
}

struct Peaks {
    /// FLOP/s in f32.
    f32: f64,
    /// FLOP/s in bf16.
    bf16: f64,
    /// Bytes/s.
    bytes: f64,
}

impl Peaks {
    fn flops(&self, precision: Precision) -> f64 {
        if precision == Precision::F32 {
            self.f32
        } else {
            self.bf16
        }
    }
}

/// Times `run` and prints what it executed by its own counter, against the peak that binds it.
fn line(
    name: &str,
    precision: Precision,
    wanted: &str,
    peaks: &Peaks,
    mut run: impl FnMut(Context<'_>),
) {
    let name = format!("{name} {}", precision.as_str());
    if !name.contains(wanted) {
        return;
    }
    let counter = WorkCounter::default();
    let context = Context::new(&counter, precision);
    run(context);
    let work = counter.take();
    let seconds = best(|| run(context));
    let bytes: u64 = work
        .iter_sweeps()
        .map(|(bytes, count)| bytes.0 * count)
        .sum();
    let (flops, bytes) = (work.flops() as f64 / seconds, bytes as f64 / seconds);
    let share = if flops > 0.0 {
        flops / peaks.flops(precision)
    } else {
        bytes / peaks.bytes
    };
    let show = |rate: f64| {
        if rate > 0.0 {
            format!("{:.1}", rate / 1e9)
        } else {
            "-".into()
        }
    };
    println!(
        "{name:<34} {:>9.3} {:>9} {:>9} {:>6.0}%",
        1e3 * seconds,
        show(flops),
        show(bytes),
        100.0 * share
    );
}

/// The shortest of at least five runs and half a second.
fn best(mut run: impl FnMut()) -> f64 {
    let (mut best, mut runs, begun) = (f64::INFINITY, 0, Instant::now());
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

fn linears(precision: Precision, wanted: &str, peaks: &Peaks) {
    for (name, input, output) in [
        ("q_proj", HIDDEN, HIDDEN),
        ("k_proj", HIDDEN, 192),
        ("up_proj", HIDDEN, INNER),
        ("down_proj", INNER, HIDDEN),
    ] {
        let lora = [
            ("a".to_string(), vec![RANK, input]),
            ("b".to_string(), vec![output, RANK]),
        ];
        let values = lora.map(|(name, shape)| {
            let values = vec![0.01; shape.iter().product()];
            (name, shape, values)
        });
        let parameters = Parameters::new(values.into(), &Device::Cpu).expect("parameters");
        let weight = |slot: usize| parameters.weight(slot).expect("a slot");
        let linear = Linear {
            weight: Weight::frozen(random(&[output, input], wattune::ops::dtype(precision))),
            bias: None,
            lora: Some(Lora {
                a: weight(0),
                b: weight(1),
                scaling: 2.0,
            }),
        };
        let (x, dy) = (
            random(&[TOKENS, input], DType::F32),
            random(&[TOKENS, output], DType::F32),
        );
        line(
            &format!("linear {name} forward"),
            precision,
            wanted,
            peaks,
            |context| {
                linear.forward(context, &x, None, None).expect("forward");
            },
        );
        let (_, saved) = linear
            .forward(
                Context::new(&WorkCounter::default(), precision),
                &x,
                None,
                None,
            )
            .expect("forward");
        line(
            &format!("linear {name} backward"),
            precision,
            wanted,
            peaks,
            |context| {
                linear
                    .backward(
                        context,
                        &dy,
                        (Some(&x), &saved),
                        (true, None),
                        &mut Gradients::new(2),
                    )
                    .expect("backward");
            },
        );
    }
}

fn attentions(precision: Precision, wanted: &str, peaks: &Peaks) {
    let attention = Attention {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        window: None,
    };
    for length in [256, 1024] {
        let segments = Segments::from_lengths(vec![length; TOKENS / length]);
        let (q, kv) = (
            random(&[TOKENS, HIDDEN], DType::F32),
            random(&[TOKENS, 192], DType::F32),
        );
        line(
            &format!("attention {length} forward"),
            precision,
            wanted,
            peaks,
            |context| {
                attention
                    .forward(context, q.clone(), kv.clone(), kv.clone(), &segments)
                    .expect("forward");
            },
        );
        let counter = WorkCounter::default();
        let (_, saved) = attention
            .forward(
                Context::new(&counter, precision),
                q.clone(),
                kv.clone(),
                kv,
                &segments,
            )
            .expect("forward");
        line(
            &format!("attention {length} backward"),
            precision,
            wanted,
            peaks,
            |context| {
                attention
                    .backward(context, &q, &saved, &segments)
                    .expect("backward");
            },
        );
    }
}

fn head(precision: Precision, wanted: &str, peaks: &Peaks) {
    let head = LmHead {
        weight: Weight::frozen(random(
            &[VOCABULARY, HIDDEN],
            wattune::ops::dtype(precision),
        )),
    };
    let (h, targets) = (random(&[256, HIDDEN], DType::F32), vec![7u32; 256]);
    line(
        "head forward and backward",
        precision,
        wanted,
        peaks,
        |context| {
            head.forward_backward(context, &h, &targets, 1.0, true, &mut Gradients::new(0))
                .expect("a loss");
        },
    );
}

fn elementwise(precision: Precision, wanted: &str, peaks: &Peaks) {
    let (x, norm) = (
        random(&[TOKENS, HIDDEN], DType::F32),
        RmsNorm {
            weight: Weight::frozen(random(&[HIDDEN], DType::F32)),
            eps: 1e-5,
        },
    );
    line("rms_norm forward", precision, wanted, peaks, |context| {
        norm.forward(context, &x).expect("forward");
    });
    let counter = WorkCounter::default();
    let (_, saved) = norm
        .forward(Context::new(&counter, precision), &x)
        .expect("forward");
    line("rms_norm backward", precision, wanted, peaks, |context| {
        norm.backward(context, &x, &saved, None, &mut Gradients::new(0))
            .expect("backward");
    });
    let gate = random(&[TOKENS, INNER], DType::F32);
    line("swiglu forward", precision, wanted, peaks, |context| {
        swiglu(context, &gate, &gate).expect("forward");
    });
    let (_, saved) = swiglu(Context::new(&counter, precision), &gate, &gate).expect("forward");
    line("swiglu backward", precision, wanted, peaks, |context| {
        swiglu_backward(context, &gate, &saved).expect("backward");
    });
}

/// FLOP/s of a product of 2048 x 2048 matrices.
fn large_product(precision: Precision) -> f64 {
    const SIDE: usize = 2048;
    let weight = Weight::frozen(random(&[SIDE, SIDE], wattune::ops::dtype(precision)));
    let (linear, x) = (
        Linear {
            weight,
            bias: None,
            lora: None,
        },
        random(&[SIDE, SIDE], DType::F32),
    );
    let counter = WorkCounter::default();
    let seconds = best(|| {
        linear
            .forward(Context::new(&counter, precision), &x, None, None)
            .expect("a product");
    });
    (2 * SIDE * SIDE * SIDE) as f64 / seconds
}

/// FLOP/s of multiply-adds that never leave the registers, on every thread.
fn multiply_adds() -> f64 {
    const ROUNDS: usize = 2_000_000;
    struct Chains<const NUMBERS: usize>;
    impl<const NUMBERS: usize> pulp::NullaryFnOnce for Chains<NUMBERS> {
        type Output = f32;
        #[inline(always)]
        fn call(self) -> f32 {
            let mut sums = [0.5f32; NUMBERS];
            for _ in 0..ROUNDS {
                sums.iter_mut()
                    .for_each(|sum| *sum = sum.mul_add(0.999, 0.001));
            }
            sums.iter().sum()
        }
    }
    fn rate<const NUMBERS: usize>() -> f64 {
        let threads = rayon::current_num_threads();
        let seconds = best(|| {
            let chains = |_| pulp::Arch::new().dispatch(Chains::<NUMBERS>);
            std::hint::black_box(
                (0..threads)
                    .into_par_iter()
                    .with_max_len(1)
                    .map(chains)
                    .sum::<f32>(),
            );
        });
        (2 * threads * ROUNDS * NUMBERS) as f64 / seconds
    }
    // Twelve vectors of eight numbers, then of sixteen: enough for every unit at once, and no more than the registers.
    rate::<96>().max(rate::<192>())
}

/// Bytes read and written a second by copying 256 MiB.
fn copy() -> f64 {
    let from = vec![1u64; 32 << 20];
    let mut to = vec![0u64; 32 << 20];
    let seconds = best(|| {
        to.par_chunks_mut(1 << 20)
            .zip(from.par_chunks(1 << 20))
            .for_each(|(to, from)| to.copy_from_slice(from))
    });
    (2 * 8 * from.len()) as f64 / seconds
}
