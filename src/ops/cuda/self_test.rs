//! A small case of each kernel against the reference on the same device: a wrong layout or driver is an error, not a wrong
//! adapter.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Kind, Result};
use crate::ops::{
    Activation, Attention, Context, DropoutMask, Gradients, Norm, NormKind, Path, Rope,
    RopeScaling, Segments, Weight, cross_entropy, cuda, gather_rows, matmul, scatter_rows,
};
use crate::work::{Precision, WorkCounter};

/// Largest difference, relative to the largest value: bf16 has 8 bits, and attention rounds three times.
const TOLERANCE: f32 = 0.03;

/// Results of an op in a context, on a device.
type Case = fn(Context<'_>, &Device) -> Result<Vec<Tensor>>;

const CASES: [(&str, Case); 8] = [
    ("product", product),
    ("norm", norm),
    ("rope", rope),
    ("activation", activation),
    ("attention", attention),
    ("cross_entropy", losses),
    ("gather", rows),
    ("dropout", dropout),
];

/// Runs every case on `device`, in some milliseconds.
///
/// # Errors
/// [`Kind::Device`] with the kernel whose result differs from the reference's.
pub(in crate::ops) fn self_test(device: &Device) -> Result<()> {
    for (name, case) in CASES {
        let counter = WorkCounter::default();
        let context = Context::new(&counter, Precision::Bf16);
        let reference = Context {
            reference: true,
            ..Context::new(&counter, Precision::F32)
        };
        let (found, expected) = (case(context, device)?, case(reference, device)?);
        for (found, expected) in found.iter().zip(&expected) {
            let (difference, largest) = distance(found, expected)?;
            if difference.is_nan() || difference > TOLERANCE * largest {
                return Err(wrong(name, difference, largest, device));
            }
        }
    }
    Ok(())
}

/// The largest difference, and the largest expected value.
fn distance(found: &Tensor, expected: &Tensor) -> Result<(f32, f32)> {
    let values =
        |x: &Tensor| -> Result<Vec<f32>> { Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
    let (found, expected) = (values(found)?, values(expected)?);
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    // Unlike `f32::max`, keeps a NaN.
    let difference = differences.fold(0f32, |max, x| if x <= max { max } else { x });
    let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    Ok((difference, largest))
}

fn wrong(name: &str, difference: f32, largest: f32, device: &Device) -> Error {
    Error::new(
        Kind::Device,
        "a CUDA kernel gives a wrong result on this device",
    )
    .value(format!(
        "{name} on {:?}: off by {difference} of {largest}",
        device.location()
    ))
    .rule(format!("within {TOLERANCE} of the reference"))
    .hint("use `--device cpu` and report the GPU and its driver; WATTUNE_SKIP_SELF_TEST=1 goes on")
}

/// Values from -1 to 1 that bf16 holds exactly.
fn values(device: &Device, rows: usize, columns: usize) -> Result<Tensor> {
    let value = |i: usize| ((i * 37 + i / 7 * 11) % 129) as f32 / 64.0 - 1.0;
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Ok(Tensor::from_vec(values, (rows, columns), device)?)
}

fn product(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let (a, b) = (values(device, 33, 40)?, values(device, 24, 40)?);
    let y = matmul(context, &a, &b.t()?)?;
    let transposed = matmul(context, &a.t()?, &y)?;
    Ok(vec![y, transposed])
}

fn norm(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    for (kind, columns) in [(NormKind::Rms, 72), (NormKind::Layer, 1032)] {
        let weight = values(device, 1, columns)?.flatten_all()?;
        let norm = Norm {
            kind,
            weight: Weight::frozen(weight),
            bias: None,
            unit_offset: true,
            eps: 1e-5,
            factor: 1.0,
        };
        let x = values(device, 5, columns)?;
        let (y, saved) = norm.forward(context, &x)?;
        let dx = norm.backward(context, &x, &saved, Some(&x), &mut Gradients::new(0))?;
        all.extend([y, dx]);
    }
    Ok(all)
}

fn rope(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let rope = Rope {
        head_dim: 24,
        rotary_dim: 16,
        interleaved: false,
        theta: 100.0,
        scaling: RopeScaling::None,
    };
    let tables = rope.tables(&Segments::from_lengths([3, 6]), device)?;
    let x = values(device, 9, 48)?;
    Ok(vec![
        tables.forward(context, &x)?,
        tables.backward(context, &x)?,
    ])
}

fn activation(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let (gate, up) = (values(device, 3, 101)?, values(device, 3, 101)?);
    let (y, saved) = Activation::Silu.forward(context, &gate, Some(&up))?;
    let (dgate, dup) = Activation::Silu.backward(context, &up, &saved)?;
    Ok([y, dgate].into_iter().chain(dup).collect())
}

fn attention(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    for head_dim in [64, 128] {
        let attention = Attention {
            heads: 2,
            kv_heads: 1,
            head_dim,
            causal: true,
            window: Some(50),
            scale: None,
            softcap: None,
        };
        let segments = Segments::from_lengths([70, 5]);
        let [q, dout] = [
            values(device, 75, 2 * head_dim)?,
            values(device, 75, 2 * head_dim)?,
        ];
        let [k, v] = [values(device, 75, head_dim)?, values(device, 75, head_dim)?];
        let (out, saved) = attention.forward(context, q, k, v, &segments)?;
        let (dq, dk, dv) = attention.backward(context, &dout, &saved, &segments)?;
        all.extend([out, dq, dk, dv]);
    }
    Ok(all)
}

fn losses(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let logits = (values(device, 3, 700)? * 4.0)?;
    let (losses, dz) = cross_entropy(context, logits, &[0, 699, 5], Some(0.5))?;
    let losses = Tensor::from_vec(losses, 3, device)?;
    Ok([losses].into_iter().chain(dz).collect())
}

fn rows(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let x = values(device, 6, 36)?;
    let indices = Tensor::new(&[4u32, 0, 4, 5], device)?;
    let gathered = gather_rows(context, &x, &indices)?;
    let sums = scatter_rows(context, &gathered, &indices, 6)?;
    Ok(vec![gathered, sums])
}

fn dropout(context: Context<'_>, device: &Device) -> Result<Vec<Tensor>> {
    let stream = crate::random::stream(1, crate::random::Purpose::Dropout, &[], "self-test");
    let rows = crate::ops::StreamRows {
        streams: vec![stream],
        segments: vec![0, 0, 0],
        tokens: vec![0, 1, 2],
    };
    let mask = DropoutMask::from_streams((3, 50), 0.25, rows);
    let ones = Tensor::ones((3, 50), DType::F32, device)?;
    Ok(vec![if context.path(&ones) == Path::Cuda {
        cuda::masked(&mask, &ones, DType::F32)?
    } else {
        mask.tensor(device)?
    }])
}
