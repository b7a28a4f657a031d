//! RoPE, activations and dropout by their kernels.

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, Launch, output, type_name};
use crate::error::Result;
use crate::ops::dropout::words_of;
use crate::ops::storage::to_f32_contiguous;
use crate::ops::{Activation, Context, DropoutMask, StreamRows, dtype};
use crate::work::Precision;

/// Elements of a thread.
const ELEMENTS: usize = 4;

/// The tables and layout of a rotation.
pub(in crate::ops) struct Rotation<'a> {
    /// cos and sin (N, half).
    pub(in crate::ops) tables: [&'a Tensor; 2],
    pub(in crate::ops) head_dim: usize,
    pub(in crate::ops) interleaved: bool,
    /// 1 or -1.
    pub(in crate::ops) direction: f32,
}

impl Rotation<'_> {
    /// x (N, H D) in f32 or bf16 -> (N, H D) in the compute type.
    pub(in crate::ops) fn run(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let half = self.tables[0].dims2()?.1;
        let x = x.contiguous()?;
        let [cos, sin] = [self.tables[0].contiguous()?, self.tables[1].contiguous()?];
        let y = output(x.device(), dtype(context.precision), (rows, width))?;
        let heads = width / self.head_dim;
        let args = [
            Arg::from(&x),
            Arg::from(&cos),
            Arg::from(&sin),
            Arg::from(&y),
            Arg::Int(rows),
            Arg::Int(heads),
            Arg::Int(self.head_dim),
            Arg::Int(half),
            Arg::Int(usize::from(self.interleaved)),
            Arg::Float(f64::from(self.direction)),
        ];
        let [from, to] = [type_name(x.dtype())?, type_name(y.dtype())?];
        let items = rows * heads * (self.head_dim - half);
        Launch::of_items("rope", &format!("rope_{from}_{to}"), items).run(x.device(), &args)?;
        Ok(y)
    }
}

impl Activation {
    /// Its number in activation.cu.
    fn index(self) -> Arg<'static> {
        Arg::Int(match self {
            Self::Silu => 0,
            Self::Gelu => 1,
            Self::GeluTanh => 2,
            Self::Relu => 3,
            Self::Tanh => 4,
        })
    }

    /// gate, up (N, F) in one type -> y (N, F) in the compute type, and gate and up to save.
    pub(in crate::ops) fn forward_cuda(
        self,
        context: Context<'_>,
        gate: &Tensor,
        up: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let (device, shape, n) = (gate.device(), gate.shape(), gate.elem_count());
        let gate = gate.contiguous()?;
        let up = up
            .map(|up| up.to_dtype(gate.dtype())?.contiguous())
            .transpose()?;
        let y = output(device, dtype(context.precision), shape)?;
        let narrow = context.precision == Precision::Bf16 && gate.dtype() == DType::F32;
        let copy = |wanted: bool| {
            wanted
                .then(|| output(device, DType::BF16, shape))
                .transpose()
        };
        let (gate_copy, up_copy) = (copy(narrow)?, copy(narrow && up.is_some())?);
        let args = [
            Arg::from(&gate),
            Arg::Tensor(up.as_ref()),
            Arg::from(&y),
            Arg::Tensor(gate_copy.as_ref()),
            Arg::Tensor(up_copy.as_ref()),
            Arg::Long(n),
            self.index(),
        ];
        let [from, to] = [type_name(gate.dtype())?, type_name(y.dtype())?];
        let kernel = format!("activation_{from}_{to}");
        Launch::of_items("activation", &kernel, n.div_ceil(ELEMENTS)).run(device, &args)?;
        Ok((y, gate_copy.unwrap_or(gate), up_copy.or(up)))
    }

    /// dy (N, F) and the saved gate and up -> dgate, and dup if there is an up, in the compute type.
    pub(in crate::ops) fn backward_cuda(
        self,
        context: Context<'_>,
        dy: &Tensor,
        gate: &Tensor,
        up: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (device, shape, n) = (gate.device(), gate.shape(), gate.elem_count());
        let dy = to_f32_contiguous(dy)?;
        let of_input = || output(device, dtype(context.precision), shape);
        let dgate = of_input()?;
        let dup = up.map(|_| of_input()).transpose()?;
        let args = [
            Arg::from(&dy),
            Arg::from(gate),
            Arg::Tensor(up),
            Arg::from(&dgate),
            Arg::Tensor(dup.as_ref()),
            Arg::Long(n),
            self.index(),
        ];
        let [from, to] = [type_name(gate.dtype())?, type_name(dgate.dtype())?];
        let kernel = format!("activation_backward_f32_{from}_{to}");
        Launch::of_items("activation", &kernel, n.div_ceil(ELEMENTS)).run(device, &args)?;
        Ok((dgate, dup))
    }
}

/// x (N, in) in f32 or bf16, masked, in `dtype`.
pub(in crate::ops) fn masked(mask: &DropoutMask, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let device = x.device();
    // bf16 -> f32 has no kernel.
    let x = if dtype == DType::F32 {
        to_f32_contiguous(x)?
    } else {
        x.contiguous()?
    };
    let kept = mask.bits(device)?;
    let y = output(device, dtype, (rows, width))?;
    let args = [
        Arg::from(&x),
        Arg::from(&kept),
        Arg::Tensor(None),
        Arg::from(&y),
        Arg::Int(rows),
        Arg::Int(width),
        Arg::Int(kept.dims2()?.1),
        Arg::Float(f64::from(mask.scale())),
    ];
    let [from, to] = [type_name(x.dtype())?, type_name(dtype)?];
    let items = rows * width.div_ceil(ELEMENTS);
    Launch::of_items("dropout", &format!("dropout_{from}_{to}"), items).run(device, &args)?;
    Ok(y)
}

/// The bits (N, words) of a mask of `shape`, from the streams' keys.
pub(in crate::ops) fn draw_bits(
    device: &Device,
    rows: &StreamRows,
    (count, width): (usize, usize),
    threshold: u32,
) -> Result<Tensor> {
    let words = words_of(width);
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u32::from(*byte))
    };
    let keys = rows.streams.iter().flat_map(|stream| {
        let key = stream.get_seed();
        key.chunks(4).map(word).collect::<Vec<_>>()
    });
    let keys: Vec<u32> = keys.collect();
    let keys = Tensor::from_vec(keys, (rows.streams.len(), 8), device)?;
    let segments = Tensor::from_slice(&rows.segments, count, device)?;
    let tokens = Tensor::from_slice(&rows.tokens, count, device)?;
    let kept = output(device, DType::U32, (count, words))?;
    let args = [
        Arg::from(&keys),
        Arg::from(&segments),
        Arg::from(&tokens),
        Arg::from(&kept),
        Arg::Int(count),
        Arg::Int(width),
        Arg::Int(words),
        Arg::Uint(threshold),
    ];
    Launch::of_items("dropout", "dropout_mask", count * words).run(device, &args)?;
    Ok(kept)
}
