//! RMSNorm and LayerNorm, forward and backward.

use wattune::ops::{Norm, NormKind, Weight};

use super::harness::{Arg, Buffer, close, in_every_order};
use super::{Type, random, reference, tensor, values};

/// Rows, columns and the block that runs them: one warp a row, or a block a row.
const SHAPES: [(usize, usize, [usize; 3]); 6] = [
    (1, 1, [32, 4, 1]),
    (5, 7, [32, 4, 1]),
    (6, 64, [32, 4, 1]),
    (3, 130, [32, 2, 1]),
    (2, 257, [64, 1, 1]),
    (3, 1032, [256, 1, 1]),
];
/// Kind, epsilon, factor of the result, offset of the weight.
const NORMS: [(NormKind, f64, f64, bool); 3] = [
    (NormKind::Rms, 1e-6, 1.0, false),
    (NormKind::Rms, 1e-5, 0.25, true),
    (NormKind::Layer, 1e-5, 1.0, false),
];

fn norm_of(case: (NormKind, f64, f64, bool), cols: usize) -> Norm {
    let (kind, eps, factor, unit_offset) = case;
    let weight = |seed| {
        let values = random(seed, cols);
        Weight::frozen(candle_core::Tensor::new(&values[..], &candle_core::Device::Cpu).unwrap())
    };
    Norm {
        kind,
        weight: weight(90),
        bias: (kind == NormKind::Layer).then(|| weight(91)),
        unit_offset,
        eps,
        factor,
    }
}

/// The scalars at the end of a norm kernel's arguments.
fn scalars(norm: &Norm, rows: usize, cols: usize) -> Vec<Arg> {
    vec![
        Arg::Int(rows as i32),
        Arg::Int(cols as i32),
        Arg::Float(norm.eps as f32),
        Arg::Float(norm.factor as f32),
        Arg::Float(f32::from(u8::from(norm.unit_offset))),
        Arg::Int(i32::from(norm.kind == NormKind::Layer)),
    ]
}

fn bias_arg(bias: &Option<Buffer>) -> Arg {
    bias.as_ref().map_or(Arg::Pointer(0), Buffer::arg)
}

#[test]
fn norms_equal_the_reference() {
    let types = [
        (Type::F32, Type::F32),
        (Type::F32, Type::Bf16),
        (Type::Bf16, Type::Bf16),
        (Type::Bf16, Type::F32),
    ];
    for case in NORMS {
        for ((x_type, y_type), (rows, cols, block)) in
            types.iter().flat_map(|t| SHAPES.map(|s| (*t, s)))
        {
            let name = format!("norm_forward_{}_{}", x_type.name(), y_type.name());
            let norm = norm_of(case, cols);
            let x = x_type.random(1, rows * cols);
            let found = in_every_order(&name, |device| {
                let (x, weight) = (x_type.input(&x), Buffer::new(&values(&norm.weight.tensor)));
                let bias = norm.bias.as_ref().map(|b| Buffer::new(&values(&b.tensor)));
                let (y, copy) = (y_type.output(rows * cols), Type::Bf16.output(rows * cols));
                let mut args = vec![x.arg(), weight.arg(), bias_arg(&bias), y.arg(), copy.arg()];
                args.extend(scalars(&norm, rows, cols));
                let grid = [rows.div_ceil(block[1]), 1, 1];
                device.launch(&name, grid, block, 0, &args);
                vec![y_type.get(&y), copy.bf16s()]
            });
            let Some(found) = found else { return };
            let expected = reference(|c| norm.forward(c, &tensor(&x, (rows, cols))).unwrap().0);
            let name = format!("{name}, {case:?}, {rows} x {cols}");
            close(&name, &found[0], &values(&expected), y_type.error());
            close(&name, &found[1], &x, 1.0 / 256.0);
        }
    }
}

/// A kernel run's dx, and the gradients of weight and bias.
fn backward(x_type: Type, norm: &Norm, shape: (usize, usize, [usize; 3])) -> Option<Vec<Vec<f32>>> {
    let (rows, cols, block) = shape;
    let n = rows * cols;
    let name = format!("norm_backward_f32_{}", x_type.name());
    in_every_order(&name, |device| {
        let x = x_type.input(&x_type.random(1, n));
        let (dy, base) = (Buffer::new(&random(2, n)), Buffer::new(&random(3, n)));
        let weight = Buffer::new(&values(&norm.weight.tensor));
        let (dx, statistics) = (Buffer::f32_output(n), Buffer::f32_output(2 * rows));
        let mut args = vec![dy.arg(), x.arg(), weight.arg(), base.arg(), dx.arg()];
        args.push(statistics.arg());
        args.extend(scalars(norm, rows, cols));
        device.launch(&name, [rows.div_ceil(block[1]), 1, 1], block, 0, &args);
        // Two rows a part.
        let parts = rows.div_ceil(2);
        let partial = Buffer::f32_output(2 * parts * cols);
        let args = [
            dy.arg(),
            x.arg(),
            statistics.arg(),
            partial.arg(),
            Arg::Int(rows as i32),
            Arg::Int(cols as i32),
            Arg::Int(2),
        ];
        let name = format!("norm_weight_gradient_f32_{}", x_type.name());
        device.launch(&name, [cols.div_ceil(32), parts, 1], [32, 1, 1], 0, &args);
        let sums = Buffer::f32_output(2 * cols);
        let args = [
            partial.arg(),
            sums.arg(),
            Arg::Int(parts as i32),
            Arg::Int(cols as i32),
            Arg::Float(norm.factor as f32),
        ];
        let grid = [cols.div_ceil(32), 2, 1];
        device.launch("norm_sum_parts", grid, [32, 1, 1], 0, &args);
        vec![dx.f32s(), sums.f32s()]
    })
}

/// The gradients of `sum(y dy)` by x, weight and bias, from candle's autograd of the definition in f64.
fn autograd(norm: &Norm, x: &[f32], dy: &[f32], shape: (usize, usize)) -> [Vec<f32>; 3] {
    use candle_core::{D, DType, Var};
    let wide = |t: candle_core::Tensor| Var::from_tensor(&t.to_dtype(DType::F64).unwrap()).unwrap();
    let (x, weight) = (wide(tensor(x, shape)), wide(norm.weight.tensor.clone()));
    let bias = wide(weight.zeros_like().unwrap());
    let dy = tensor(dy, shape).to_dtype(DType::F64).unwrap();
    let mut centred = x.as_tensor().clone();
    if norm.kind == NormKind::Layer {
        centred = centred
            .broadcast_sub(&centred.mean_keepdim(D::Minus1).unwrap())
            .unwrap();
    }
    let square = centred.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let root = (square + norm.eps).unwrap().sqrt().unwrap();
    let gain = (weight.as_tensor() + f64::from(u8::from(norm.unit_offset))).unwrap();
    let y = centred
        .broadcast_div(&root)
        .unwrap()
        .broadcast_mul(&gain)
        .unwrap();
    let y = (y.broadcast_add(&bias).unwrap() * norm.factor).unwrap();
    let gradients = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    [&x, &weight, &bias]
        .map(|var| values(&gradients.get(var).unwrap().to_dtype(DType::F32).unwrap()))
}

#[test]
fn norm_gradients_equal_autograd() {
    for case in NORMS {
        for (x_type, shape) in [Type::F32, Type::Bf16]
            .iter()
            .flat_map(|t| SHAPES.map(|s| (*t, s)))
        {
            let (rows, cols, _) = shape;
            let norm = norm_of(case, cols);
            let Some(found) = backward(x_type, &norm, shape) else {
                return;
            };
            let x = x_type.random(1, rows * cols);
            let [dx, dweight, dbias] = autograd(&norm, &x, &random(2, rows * cols), (rows, cols));
            let base = random(3, rows * cols);
            let sum: Vec<f32> = dx.iter().zip(base).map(|(dx, base)| dx + base).collect();
            let name = format!(
                "norm_backward, {}, {case:?}, {rows} x {cols}",
                x_type.name()
            );
            close(&name, &found[0], &sum, 1e-4);
            close(&name, &found[1], &[dweight, dbias].concat(), 1e-4);
        }
    }
}
