//! Activations, RoPE, dropout, dequantisation, AdamW.

use rand_chacha::rand_core::Rng;
use wattune::ops::{
    Activation, AdamW, DropoutMask, Parameters, Rope, RopeScaling, Segments, StoredFormat,
};
use wattune::random::{Purpose, stream};

use super::harness::{Arg, Buffer, Device, close, in_every_order, largest, within};
use super::{Type, random, reference, tensor, values};

const ACTIVATIONS: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
];
const TYPES: [(Type, Type); 4] = [
    (Type::F32, Type::F32),
    (Type::F32, Type::Bf16),
    (Type::Bf16, Type::Bf16),
    (Type::Bf16, Type::F32),
];

/// Gate and up of an activation, from -8 to 8, or without up.
fn inputs(x: Type, n: usize, gated: bool) -> (Vec<f32>, Option<Vec<f32>>) {
    let gate = x.random(5, n).iter().map(|x| 8.0 * x).collect();
    (gate, gated.then(|| x.random(6, n)))
}

fn blocks(items: usize) -> [usize; 3] {
    [items.div_ceil(64), 1, 1]
}

fn optional(buffer: &Option<Buffer>) -> Arg {
    buffer.as_ref().map_or(Arg::Pointer(0), Buffer::arg)
}

#[test]
fn activations_equal_the_reference() {
    for ((at, activation), (x, y), n, gated) in
        ACTIVATIONS.iter().enumerate().flat_map(|activation| {
            let sizes = [(1, true), (259, true), (64, false)];
            TYPES
                .iter()
                .flat_map(move |t| sizes.map(|(n, gated)| (activation, *t, n, gated)))
        })
    {
        let name = format!("activation_{}_{}", x.name(), y.name());
        let (gate, up) = inputs(x, n, gated);
        let found = in_every_order(&name, |device| {
            let (gate, up) = (x.input(&gate), up.as_ref().map(|up| x.input(up)));
            let out = y.output(n);
            let copies = [
                Some(Type::Bf16.output(n)),
                up.as_ref().map(|_| Type::Bf16.output(n)),
            ];
            let args = [
                gate.arg(),
                optional(&up),
                out.arg(),
                optional(&copies[0]),
                optional(&copies[1]),
                Arg::Long(n as i64),
                Arg::Int(at as i32),
            ];
            device.launch(&name, blocks(n.div_ceil(4)), [64, 1, 1], 0, &args);
            let copies = copies.iter().flatten().map(Buffer::bf16s);
            [y.get(&out)].into_iter().chain(copies).collect()
        });
        let Some(found) = found else { return };
        close(&name, &found[1], &gate, Type::Bf16.error());
        if let Some(up) = &up {
            close(&name, &found[2], up, Type::Bf16.error());
        }
        let up = up.map(|up| tensor(&up, (1, n)));
        let expected = reference(|c| {
            activation
                .forward(c, &tensor(&gate, (1, n)), up.as_ref())
                .unwrap()
                .0
        });
        within(
            &format!("{name}, {activation:?}, {n}"),
            &found[0],
            &values(&expected),
            y.error() * largest(&values(&expected)).max(1.0),
        );
    }
}

#[test]
fn activation_gradients_equal_the_reference() {
    let types = [
        (Type::F32, Type::F32),
        (Type::Bf16, Type::F32),
        (Type::Bf16, Type::Bf16),
    ];
    for ((at, activation), (x, y), n, gated) in
        ACTIVATIONS.iter().enumerate().flat_map(|activation| {
            let sizes = [(3, true), (517, true), (64, false)];
            types
                .iter()
                .flat_map(move |t| sizes.map(|(n, gated)| (activation, *t, n, gated)))
        })
    {
        let name = format!("activation_backward_f32_{}_{}", x.name(), y.name());
        let ((gate, up), dy) = (inputs(x, n, gated), random(7, n));
        let found = in_every_order(&name, |device| {
            let (gate, up) = (x.input(&gate), up.as_ref().map(|up| x.input(up)));
            let dy = Buffer::new(&dy);
            let (dgate, dup) = (y.output(n), up.as_ref().map(|_| y.output(n)));
            let args = [
                dy.arg(),
                gate.arg(),
                optional(&up),
                dgate.arg(),
                optional(&dup),
                Arg::Long(n as i64),
                Arg::Int(at as i32),
            ];
            device.launch(&name, blocks(n.div_ceil(4)), [64, 1, 1], 0, &args);
            let dup = dup.map(|dup| y.get(&dup));
            [y.get(&dgate)].into_iter().chain(dup).collect()
        });
        let Some(found) = found else { return };
        let (dgate, dup) = reference(|c| {
            let up = up.as_ref().map(|up| tensor(up, (1, n)));
            let (_, saved) = activation
                .forward(c, &tensor(&gate, (1, n)), up.as_ref())
                .unwrap();
            activation
                .backward(c, &tensor(&dy, (1, n)), &saved)
                .unwrap()
        });
        let name = format!("{name}, {activation:?}, {n}");
        // The reference's sigmoid cancels where it is near 1.
        close(&name, &found[0], &values(&dgate), y.error().max(1e-5));
        if let Some(dup) = dup {
            close(&name, &found[1], &values(&dup), y.error().max(1e-5));
        }
    }
}

#[test]
fn rotations_equal_the_reference() {
    // Head dimension, rotated channels, heads, neighbouring pairs.
    let shapes = [
        (2, 2, 1, false),
        (20, 8, 3, false),
        (64, 64, 2, false),
        (20, 8, 3, true),
    ];
    let directions = [1.0, -1.0];
    for ((x, y), (head_dim, rotary_dim, heads, interleaved), direction) in TYPES
        .iter()
        .flat_map(|t| shapes.map(|s| (*t, s)))
        .flat_map(|(t, s)| directions.map(|d| (t, s, d)))
    {
        let rope = Rope {
            head_dim,
            rotary_dim,
            interleaved,
            theta: 100.0,
            scaling: RopeScaling::None,
        };
        let segments = Segments::from_lengths([3, 1, 5]);
        let (rows, half) = (segments.tokens(), rotary_dim / 2);
        let n = rows * heads * head_dim;
        let input = x.random(8, n);
        let name = format!("rope_{}_{}", x.name(), y.name());
        let angles: Vec<f32> = [0, 1, 2, 0, 0, 1, 2, 3, 4]
            .iter()
            .flat_map(|position| {
                (0..half).map(move |i| {
                    *position as f32 * 100f32.powf(-2.0 * i as f32 / rotary_dim as f32)
                })
            })
            .collect();
        let found = in_every_order(&name, |device| {
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let (cos, sin) = (Buffer::new(&cos), Buffer::new(&sin));
            let (input, out) = (x.input(&input), y.output(n));
            let mut args = vec![input.arg(), cos.arg(), sin.arg(), out.arg()];
            let sizes = [rows, heads, head_dim, half, usize::from(interleaved)];
            args.extend(sizes.map(|size| Arg::Int(size as i32)));
            args.push(Arg::Float(direction));
            let items = rows * heads * (head_dim - half);
            device.launch(&name, blocks(items), [64, 1, 1], 0, &args);
            vec![y.get(&out)]
        });
        let Some(found) = found else { return };
        let expected = reference(|c| {
            let tables = rope.tables(&segments, &candle_core::Device::Cpu).unwrap();
            let input = tensor(&input, (rows, heads * head_dim));
            if direction > 0.0 {
                tables.forward(c, &input).unwrap()
            } else {
                tables.backward(c, &input).unwrap()
            }
        });
        let name = format!("{name}, {rotary_dim} of {head_dim}, {interleaved}");
        close(&name, &found[0], &values(&expected), y.error());
    }
}

#[test]
fn dropout_draws_the_bits_of_the_cpu() {
    // Two examples, of which the second row begins within a block of the stream.
    let (seed, path, p) = (42, "layers.0.q_proj", 0.3);
    let (segments, tokens) = ([0u32, 0, 1, 1, 1], [0u32, 1, 0, 1, 2]);
    for width in [1, 31, 50, 64] {
        let streams = [0u64, 9].map(|example| stream(seed, Purpose::Dropout, &[3, example], path));
        let mask = DropoutMask::sample((5, width), p, |row, bits| {
            let mut stream = streams[segments[row] as usize].clone();
            stream.set_word_pos(u128::from(tokens[row]) * width as u128);
            bits.iter_mut().for_each(|word| *word = stream.next_u32());
        });
        let expected = values(&mask.tensor(&candle_core::Device::Cpu).unwrap());
        let words = width.div_ceil(32);
        let (scale, n) = ((1.0 / (1.0 - p)) as f32, 5 * width);
        for (x, y) in [
            (Type::F32, Type::F32),
            (Type::F32, Type::Bf16),
            (Type::Bf16, Type::Bf16),
        ] {
            let found = in_every_order("dropout", |device| {
                let keys: Vec<u8> = streams.iter().flat_map(|s| s.get_seed()).collect();
                let (keys, kept) = (Buffer::new(&keys), Buffer::new(&vec![0u32; 5 * words]));
                let (segments, tokens) = (Buffer::new(&segments), Buffer::new(&tokens));
                let sizes = [5, width, words].map(|size| Arg::Int(size as i32));
                let mut args = vec![keys.arg(), segments.arg(), tokens.arg(), kept.arg()];
                args.extend(sizes);
                args.push(Arg::Uint((p * f64::from(1 << 24)).ceil() as u32));
                device.launch("dropout_mask", blocks(5 * words), [64, 1, 1], 0, &args);
                let (ones, base) = (x.input(&vec![1.0; n]), Buffer::new(&random(4, n)));
                [Arg::Pointer(0), base.arg()]
                    .map(|base| {
                        let out = y.output(n);
                        let mut args = vec![ones.arg(), kept.arg(), base, out.arg()];
                        args.extend([5, width, words].map(|size| Arg::Int(size as i32)));
                        args.push(Arg::Float(scale));
                        let name = format!("dropout_{}_{}", x.name(), y.name());
                        let quads = 5 * width.div_ceil(4);
                        device.launch(&name, blocks(quads), [64, 1, 1], 0, &args);
                        y.get(&out)
                    })
                    .into()
            });
            let Some(found) = found else { return };
            let added: Vec<f32> = expected
                .iter()
                .zip(random(4, n))
                .map(|(x, b)| x + b)
                .collect();
            close(
                &format!("dropout of {width}"),
                &found[0],
                &expected,
                y.error(),
            );
            close(
                &format!("dropout of {width}, added"),
                &found[1],
                &added,
                y.error(),
            );
        }
    }
}

#[test]
fn dequantised_weights_equal_the_cpu() {
    for ((rows, cols), y) in [(1, 3), (3, 50), (2, 64), (5, 77)]
        .iter()
        .flat_map(|s| [Type::F32, Type::Bf16].map(|y| (*s, y)))
    {
        for format in [StoredFormat::NF4, StoredFormat::INT8] {
            let bytes = format.bytes_of_matrix(rows, cols).unwrap();
            let random_bytes = random(9, bytes)
                .into_iter()
                .map(|x| (x * 127.0) as i8 as u8);
            let mut blocks_of: Vec<u8> = random_bytes.collect();
            let maxima: Vec<usize> = match format {
                StoredFormat::NF4 => (0..bytes).step_by(36).collect(),
                _ => (0..rows).map(|row| (row + 1) * cols + row * 4).collect(),
            };
            for (at, maximum) in maxima.iter().zip(random(10, maxima.len())) {
                blocks_of[*at..at + 4].copy_from_slice(&maximum.to_le_bytes());
            }
            let (n, name) = (
                rows * cols,
                format!("{}_{}", format.name().to_lowercase(), y.name()),
            );
            let found = in_every_order(&name, |device| {
                let (input, out) = (Buffer::new(&blocks_of), y.output(n));
                let mut args = vec![input.arg(), out.arg()];
                let items = if format == StoredFormat::NF4 {
                    args.push(Arg::Long(n as i64));
                    n.div_ceil(8)
                } else {
                    args.extend([rows, cols].map(|size| Arg::Int(size as i32)));
                    rows * cols.div_ceil(8)
                };
                let kernel = format!("dequantize_{name}");
                device.launch(&kernel, blocks(items), [64, 1, 1], 0, &args);
                vec![y.get(&out)]
            });
            let Some(found) = found else { return };
            let expected = format.decode(&blocks_of, [rows, cols]);
            let error = if y == Type::F32 { 0.0 } else { y.error() };
            close(
                &format!("{name}, {rows} x {cols}"),
                &found[0],
                &expected,
                error,
            );
        }
    }
}

const ADAMW: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
    lr_ratio: 4.0,
    max_grad_norm: 0.5,
};
const LR: f64 = 0.01;
const STEP: i32 = 3;

/// The norm of `gradient` (n), and `state` (3, n) after the step; `runs`: end, 0, decay and step size.
fn adamw_step(device: &Device, state: &[f32], gradient: &[f32], runs: &[u32]) -> Vec<Vec<f32>> {
    let n = Arg::Long(gradient.len() as i64);
    let (state, gradient) = (Buffer::new(state), Buffer::new(gradient));
    let (parts, total) = (Buffer::new(&[f64::NAN; 4]), Buffer::new(&[f64::NAN]));
    let args = [gradient.arg(), parts.arg(), n, Arg::Int(100)];
    device.launch("square_sum_parts", [4, 1, 1], [64, 1, 1], 0, &args);
    let args = [parts.arg(), total.arg(), Arg::Int(4)];
    device.launch("square_sum", [1; 3], [32, 1, 1], 0, &args);
    let norm = total.get::<f64>()[0].sqrt();
    let count = Arg::Int(runs.len() as i32 / 4);
    let runs = Buffer::new(runs);
    let mut args = vec![state.arg(), gradient.arg(), runs.arg(), count];
    let n = gradient.get::<f32>().len() as i64;
    args.extend([Arg::Long(n), Arg::Int(100)]);
    let clip = ADAMW.max_grad_norm / (norm + 1e-6);
    let [rate1, rate2] = [ADAMW.beta1, ADAMW.beta2].map(|beta| 1.0 - beta);
    let root_correction = (1.0 - ADAMW.beta2.powi(STEP)).sqrt();
    let scalars = [
        clip,
        rate1,
        ADAMW.beta2,
        rate2,
        root_correction,
        ADAMW.epsilon,
    ];
    args.extend(scalars.map(|x| Arg::Float(x as f32)));
    device.launch("adamw", [4, 1, 1], [64, 1, 1], 0, &args);
    vec![vec![norm as f32], state.f32s()]
}

#[test]
fn adamw_equals_the_reference() {
    // End of the slot, whether its rate is raised, and its decay: A; B; a norm; A.
    let slots = [
        ("a.lora_A.weight", vec![3, 7], 21u32, 1.0, 0.1),
        ("b.lora_B.weight", vec![11, 3], 54, 4.0, 0.1),
        ("n.weight", vec![5], 59, 4.0, 0.0),
        ("c.lora_A.weight", vec![2, 150], 359, 1.0, 0.1),
    ];
    let correction = 1.0 - ADAMW.beta1.powi(STEP);
    let run = |end: u32, ratio: f64, decay: f64| {
        let scalars = [1.0 - LR * ratio * decay, LR * ratio / correction];
        let [decay, step_size] = scalars.map(|x| (x as f32).to_bits());
        [end, 0, decay, step_size]
    };
    let runs: Vec<u32> = slots
        .iter()
        .flat_map(|(_, _, end, ratio, decay)| run(*end, *ratio, *decay))
        .collect();
    let tensors: Vec<_> = slots
        .into_iter()
        .map(|(name, shape, end, ..)| {
            let values = random(u64::from(end), shape.iter().product());
            (name.to_string(), shape, values)
        })
        .collect();
    let n = 359;
    let (gradient, moments) = (random(30, n), random(31, 2 * n));
    let moments: Vec<f32> = moments.into_iter().map(f32::abs).collect();
    let values = tensors.iter().flat_map(|(_, _, values)| values.clone());
    let state: Vec<f32> = values.chain(moments.iter().copied()).collect();
    let found = in_every_order("adamw", |device| {
        adamw_step(device, &state, &gradient, &runs)
    });
    let Some(found) = found else { return };
    let parameters = Parameters::new(tensors, &candle_core::Device::Cpu).unwrap();
    for (at, row) in moments.chunks(n).enumerate() {
        parameters.restore_row(at + 1, row).unwrap();
    }
    let flat = candle_core::Tensor::new(&gradient[..], &candle_core::Device::Cpu).unwrap();
    let norm = reference(|c| ADAMW.step(c, &parameters, &flat, LR, STEP as u64).unwrap());
    close("norm", &found[0], &[norm as f32], 1e-6);
    let expected = parameters.snapshot().unwrap().concat();
    close("state", &found[1], &expected, 1e-6);
}
