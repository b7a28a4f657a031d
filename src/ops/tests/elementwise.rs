//! Norms, the activations and the embedding.

use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use super::super::gemm::best;
use super::super::{
    Activation, Context, Gradients, Norm, NormKind, Path, Weight, add_scaled, add_scaled_cost,
    embedding, embedding_backward, embedding_backward_cost, embedding_cost, gather_rows,
    norm_backward_cost, norm_cost, scale, scale_cost, scatter_rows,
};
use super::{
    Implementation, Outputs, Pair, cases, close, flat, for_each_path, indices, parameters, random,
    tensor, trained, within,
};
use crate::error::Result;
use crate::work::Precision;

const ALL: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
];

/// A norm of `inputs` x, weight and, if given, bias, that multiplies its result by 0.75.
fn run_norm(
    context: Context<'_>,
    kind: NormKind,
    inputs: &[Tensor],
    dy: &Tensor,
    eps: f64,
    [trains, unit_offset]: [bool; 2],
) -> Result<Outputs> {
    let mut gradients = Gradients::new(2);
    let names = ["weight", "bias"].into_iter();
    let slots = parameters(names.zip(&inputs[1..]));
    let weight = |index: usize| {
        let weight = slots.weight(index).unwrap();
        if trains {
            weight
        } else {
            Weight::frozen(weight.tensor)
        }
    };
    let norm = Norm {
        kind,
        weight: weight(0),
        bias: (inputs.len() == 3).then(|| weight(1)),
        unit_offset,
        eps,
        factor: 0.75,
    };
    let (y, saved) = norm.forward(context, &inputs[0])?;
    let dx = norm.backward(context, dy, &saved, None, &mut gradients)?;
    let of_weights = (1..inputs.len()).map(|i| gradients.get(i - 1).cloned());
    Ok((y, std::iter::once(Some(dx)).chain(of_weights).collect()))
}

/// In primitives that autograd follows in f64.
pub(super) fn naive_activation(activation: Activation, x: &Tensor) -> candle_core::Result<Tensor> {
    match activation {
        Activation::Silu => x.div(&(x.neg()?.exp()? + 1.0)?),
        Activation::Gelu => x * (x / std::f64::consts::SQRT_2)?.erf()?.affine(0.5, 0.5)?,
        Activation::GeluTanh => {
            let z = (x + (x.powf(3.0)? * 0.044715)?)?;
            x * (z * (2.0 / std::f64::consts::PI).sqrt())?
                .tanh()?
                .affine(0.5, 0.5)?
        }
        Activation::Relu => x.relu(),
        Activation::Tanh => x.tanh(),
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn rms_norm_is_its_definition(n in 1usize..40, c in 1usize..70, [trains, unit_offset]: [bool; 2], seed: u64) {
        // Away from zero, so that 1 / rms stays below 4 and with it every intermediate.
        let x = random(seed, &[n, c]);
        let x = (&x + x.sign()?)?.affine(0.5, 0.0)?;
        let eps = 1e-3;
        Pair {
            inputs: &[x, random(seed ^ 1, &[c])],
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| run_norm(context, NormKind::Rms, inputs, dy, eps, [trains, unit_offset]),
            naive: |inputs: &[Tensor]| {
                let rms = (inputs[0].sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
                let scale = (&inputs[1] + if unit_offset { 1.0 } else { 0.0 })?;
                inputs[0].broadcast_div(&rms)?.broadcast_mul(&scale)? * 0.75
            },
            cost: norm_cost(NormKind::Rms, n, c) + norm_backward_cost(NormKind::Rms, n, c, trains),
            roundings: c + n + 48,
        }
        .prove();
    }

    #[test]
    fn layer_norm_is_its_definition(n in 1usize..40, c in 4usize..70, [bias, trains]: [bool; 2], seed: u64) {
        // Alternately near 0.75 and -0.75, so that 1 / standard deviation stays below 4.
        let sign: Vec<f32> = (0..n * c).map(|i| if i % c % 2 == 0 { 0.5 } else { -0.5 }).collect();
        let x = (random(seed, &[n, c]).affine(0.25, 0.3)? + tensor(&sign, &[n, c]))?;
        let (kind, eps) = (NormKind::Layer, 1e-3);
        let inputs = [x, random(seed ^ 1, &[c]), random(seed ^ 3, &[c])];
        Pair {
            inputs: &inputs[..if bias { 3 } else { 2 }],
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| run_norm(context, kind, inputs, dy, eps, [trains, false]),
            naive: |inputs: &[Tensor]| {
                let centred = inputs[0].broadcast_sub(&inputs[0].mean_keepdim(D::Minus1)?)?;
                let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
                let y = centred.broadcast_div(&deviation)?.broadcast_mul(&inputs[1])?;
                match inputs.get(2) {
                    Some(bias) => y.broadcast_add(bias)? * 0.75,
                    None => y * 0.75,
                }
            },
            cost: norm_cost(kind, n, c) + norm_backward_cost(kind, n, c, trains),
            roundings: 2 * c + n + 64,
        }
        .prove();
    }

    /// Beyond one parallel task.
    #[test]
    fn add_scaled_is_its_definition(n in 1usize..40, c in 1usize..1000, seed: u64) {
        let inputs = [random(seed, &[n, c]), random(seed ^ 1, &[n, c])];
        Pair {
            inputs: &inputs,
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let y = add_scaled(context, &inputs[0], &inputs[1], 0.75)?;
                Ok((y, vec![Some(dy.clone()), Some(scale(context, dy, 0.75)?)]))
            },
            naive: |inputs: &[Tensor]| &inputs[0] + (&inputs[1] * 0.75)?,
            cost: add_scaled_cost(n, c) + scale_cost(n, c, 0.75),
            roundings: 4,
        }
        .prove();
    }

    #[test]
    fn activations_are_their_definitions(n in 1usize..80, f in 1usize..300, gated: bool, index in 0..ALL.len(), seed: u64) {
        let activation = ALL[index];
        // Away from the corner of relu, which finite differences must not cross.
        let x = random(seed, &[n, f]);
        let x = x.affine(5.0, 0.0)? + (x.sign()? * 0.1)?;
        Pair {
            inputs: &[x?, random(seed ^ 1, &[n, f])][..1 + usize::from(gated)],
            dy: &random(seed ^ 2, &[n, f]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let (y, saved) = activation.forward(context, &inputs[0], inputs.get(1))?;
                let (dx, dup) = activation.backward(context, dy, &saved)?;
                assert_eq!(flat(&activation.recompute(context, &saved)?), flat(&y));
                let gradients = std::iter::once(dx).chain(dup).map(Some);
                Ok((y, gradients.collect()))
            },
            naive: |inputs: &[Tensor]| {
                let y = naive_activation(activation, &inputs[0])?;
                if gated { y * &inputs[1] } else { Ok(y) }
            },
            cost: activation.cost(n * f, gated).times(2) + activation.backward_cost(n * f, gated),
            roundings: 32,
        }
        .prove();
    }

    #[test]
    fn embedding_adds_up_rows_of_repeated_ids(n in 1usize..40, v in 1usize..9, c in 1usize..20, seed: u64) {
        let ids = Tensor::from_vec(indices(seed ^ 3, n, v), n, &Device::Cpu)?;
        Pair {
            inputs: &[random(seed, &[v, c])],
            dy: &random(seed ^ 2, &[n, c]),
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let (table, mut gradients) = (trained(&inputs[0]), Gradients::new(1));
                let y = embedding(context, &ids, &table)?;
                embedding_backward(context, &ids, dy, &table, &mut gradients)?;
                Ok((y, vec![gradients.get(0).cloned()]))
            },
            naive: |inputs: &[Tensor]| inputs[0].index_select(&ids, 0),
            cost: embedding_cost(n, c, None) + embedding_backward_cost(n, c, v),
            roundings: n,
        }
        .prove();
    }
}

#[test]
fn rows_are_gathered_and_scattered_as_candle_does() -> Result<()> {
    let index = |rows: Vec<u32>| Tensor::from_vec(rows.clone(), rows.len(), &Device::Cpu);
    for (n, rows) in [
        (5, vec![3, 0, 4]),
        (100, (0..99).rev().collect()),
        (4, vec![2, 2, 1]),
        (3, vec![]),
    ] {
        let (x, dx) = (random(1, &[n, 7]), random(2, &[rows.len(), 7]));
        let rows = index(rows)?;
        let gathered = flat(&x.index_select(&rows, 0)?);
        let scattered = flat(&x.zeros_like()?.index_add(&rows, &dx, 0)?);
        for_each_path(|context| {
            assert_eq!(flat(&gather_rows(context, &x, &rows).unwrap()), gathered);
            assert_eq!(
                flat(&scatter_rows(context, &dx, &rows, n).unwrap()),
                scattered
            );
        });
    }
    let beyond = index(vec![5])?;
    for_each_path(|context| {
        let gathered = gather_rows(context, &random(1, &[5, 2]), &beyond);
        let scattered = scatter_rows(context, &random(1, &[1, 2]), &beyond, 5);
        if context.path(&random(1, &[1])) == Path::Cuda {
            // A kernel cannot refuse: no row is read or written.
            assert!(flat(&gathered.unwrap()).iter().all(|x| x.is_nan()));
            assert_eq!(flat(&scattered.unwrap()), [0.0; 10]);
        } else {
            assert!(gathered.is_err() && scattered.is_err());
        }
    });
    Ok(())
}

/// A row of zeros has rms sqrt(eps): y = 0 and dx = dy * factor weight / sqrt(eps), factor 0.75.
#[test]
fn eps_bounds_rms_norm_of_zeros() {
    let inputs = [tensor(&[0.0; 4], &[2, 2]), tensor(&[3.0, -1.0], &[2])];
    let dy = tensor(&[1.0, 2.0, 0.0, 4.0], &[2, 2]);
    for_each_path(|context| {
        let (y, gradients) =
            run_norm(context, NormKind::Rms, &inputs, &dy, 1e-6, [true, false]).unwrap();
        assert_eq!(flat(&y), [0.0; 4]);
        let want = tensor(&[2.25e3, -1.5e3, 0.0, -3e3], &[2, 2]);
        within("dx", gradients[0].as_ref().unwrap(), &want, 1e-2);
        assert_eq!(flat(gradients[1].as_ref().unwrap()), [0.0; 2]);
    });
}

/// y = 0 far below and gate * up far above; the slope is 0 or up. exp overflows on the way and must
/// do no harm.
#[test]
fn activations_saturate_without_overflow() {
    let row = |values: [f32; 4]| tensor(&values, &[1, 4]);
    let gate = row([-1e4, -200.0, 200.0, 1e4]);
    for activation in ALL.into_iter().filter(|f| *f != Activation::Tanh) {
        for_each_path(|context| {
            let (y, saved) = activation
                .forward(context, &gate, Some(&row([2.0; 4])))
                .unwrap();
            close("y", &y, &row([0.0, 0.0, 400.0, 2e4]), 1);
            let dy = row([1.0; 4]);
            let (dgate, dup) = activation.backward(context, &dy, &saved).unwrap();
            close("dgate", &dgate, &row([0.0, 0.0, 2.0, 2.0]), 1);
            close("dup", &dup.unwrap(), &row([0.0, 0.0, 200.0, 1e4]), 1);
        });
    }
}

/// PyTorch's: NaN stays NaN (candle's relu drops it), and the slope of relu at 0 is 0.
#[test]
fn fused_activations_pass_nan_on() {
    let x = tensor(&[f32::NAN, 0.0], &[1, 2]);
    for activation in ALL {
        Implementation::Fused(best()).run(Precision::F32, |context| {
            let (y, saved) = activation.forward(context, &x, None).unwrap();
            let dy = tensor(&[1.0; 2], &[1, 2]);
            let dx = flat(&activation.backward(context, &dy, &saved).unwrap().0);
            let slope = match activation {
                Activation::Relu => 0.0,
                Activation::Tanh => 1.0,
                _ => 0.5,
            };
            assert!(flat(&y)[0].is_nan() && flat(&y)[1] == 0.0, "{activation:?}");
            assert!((dx[1] - slope).abs() < 1e-6, "{activation:?}: {dx:?}");
        });
    }
}

/// More elements than one task takes: the second task must read where it writes.
#[test]
fn gated_activation_beyond_one_task_is_the_reference() {
    let [gate, up, dy] = [1, 2, 3].map(|seed| random(seed, &[3, 16 * 1024 / 2 + 5]));
    let run = |context: Context<'_>| -> Result<_> {
        let (y, saved) = Activation::Silu.forward(context, &gate, Some(&up))?;
        let (dgate, dup) = Activation::Silu.backward(context, &dy, &saved)?;
        let dup = dup.unwrap();
        Ok([y, dgate, dup, Activation::Silu.recompute(context, &saved)?])
    };
    let want = Implementation::Reference.run(Precision::F32, run).unwrap();
    for_each_path(|context| {
        let names = ["y", "dgate", "dup", "y again"];
        for (name, (ours, want)) in names.iter().zip(run(context).unwrap().iter().zip(&want)) {
            close(name, ours, want, 16);
        }
    });
}

/// In bf16 what is saved and what goes into products is rounded (at most 2^-8 of itself); what is
/// computed is f32, by both implementations alike.
#[test]
fn bf16_activations_are_rounded_once() {
    let [gate, up, dy] = [1, 2, 3].map(|seed| random(seed, &[5, 37]));
    let weight = Weight::frozen(random(4, &[37]));
    let norm = Norm {
        kind: NormKind::Rms,
        weight,
        bias: None,
        unit_offset: false,
        eps: 1e-3,
        factor: 1.0,
    };
    let run = |context: Context<'_>| -> Result<_> {
        let (y, saved) = Activation::Silu.forward(context, &gate, Some(&up))?;
        let (dgate, dup) = Activation::Silu.backward(context, &dy, &saved)?;
        let dup = dup.unwrap();
        let again = Activation::Silu.recompute(context, &saved)?;
        let (h, saved) = norm.forward(context, &gate)?;
        let dx = norm.backward(context, &dy, &saved, None, &mut Gradients::new(0))?;
        Ok([
            y,
            h,
            dgate,
            dup,
            again,
            norm.recompute(context, &saved)?,
            dx,
        ])
    };
    let isa = best();
    let wide = Implementation::Fused(isa).run(Precision::F32, run).unwrap();
    let fused = Implementation::Fused(isa)
        .run(Precision::Bf16, run)
        .unwrap();
    let reference = Implementation::Reference.run(Precision::Bf16, run).unwrap();
    for (i, ((wide, fused), reference)) in wide.iter().zip(&fused).zip(&reference).enumerate() {
        // The last goes on along the residual stream; all others go into products.
        let residual = i == 6;
        let dtype = if residual { DType::F32 } else { DType::BF16 };
        assert_eq!(fused.dtype(), dtype, "{i}");
        let pairs = flat(fused).into_iter().zip(flat(reference));
        let near = |(x, y): (f32, f32)| (x - y).abs() <= y.abs() / 255.0 + 1e-6;
        if residual {
            close("both ways", fused, reference, 64);
        } else {
            assert!(pairs.into_iter().all(near), "{i}, both ways");
        }
        // Slopes of what follows rounded inputs are below 8.
        within(&format!("{i}"), fused, wide, 8.0 / 512.0);
        assert!(flat(fused) != flat(wide), "{i} was saved in f32");
    }
}
