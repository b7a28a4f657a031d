//! RMSNorm and LayerNorm by the kernels of norm.cu.

use candle_core::{DType, Tensor};

use super::launch::{Arg, Launch, output, type_name};
use crate::error::Result;
use crate::ops::storage::to_f32_contiguous;
use crate::ops::{Context, Norm, NormKind, dtype};
use crate::work::Precision;

/// Columns of a row up to which one warp takes it.
const WARP_COLUMNS: usize = 1024;
/// Rows of a warp's block.
const WARPS: usize = 8;
/// Rows whose weight gradients one thread sums.
const ROWS_PER_PART: usize = 64;

/// What every kernel of a norm takes last.
fn scalars(norm: &Norm, rows: usize, cols: usize) -> [Arg<'static>; 6] {
    [
        Arg::Int(rows),
        Arg::Int(cols),
        Arg::Float(norm.eps),
        Arg::Float(norm.factor),
        Arg::Float(f64::from(u8::from(norm.unit_offset))),
        Arg::Int(usize::from(norm.kind == NormKind::Layer)),
    ]
}

/// The blocks of a pass over rows.
fn launch(kernel: &str, rows: usize, cols: usize) -> Launch<'_> {
    let narrow = cols <= WARP_COLUMNS;
    let whole = Launch::of_rows("norm", kernel, rows);
    if !narrow {
        return whole;
    }
    Launch {
        grid: [rows.div_ceil(WARPS), 1, 1],
        block: [32, WARPS, 1],
        ..whole
    }
}

impl Norm {
    /// x (N, C) in f32 or bf16 -> y (N, C) in the compute type, and x to save.
    pub(in crate::ops) fn forward_cuda(
        &self,
        context: Context<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, cols) = x.dims2()?;
        let x = x.contiguous()?;
        let weight = to_f32_contiguous(&self.weight.tensor)?;
        let bias = self.bias.as_ref();
        let bias = bias
            .map(|bias| to_f32_contiguous(&bias.tensor))
            .transpose()?;
        let y = output(x.device(), dtype(context.precision), (rows, cols))?;
        let narrow = context.precision == Precision::Bf16 && x.dtype() == DType::F32;
        let copy = narrow.then(|| output(x.device(), DType::BF16, (rows, cols)));
        let copy = copy.transpose()?;
        let mut args = vec![
            Arg::from(&x),
            Arg::from(&weight),
            Arg::Tensor(bias.as_ref()),
            Arg::from(&y),
            Arg::Tensor(copy.as_ref()),
        ];
        args.extend(scalars(self, rows, cols));
        let [from, to] = [type_name(x.dtype())?, type_name(y.dtype())?];
        launch(&format!("norm_forward_{from}_{to}"), rows, cols).run(x.device(), &args)?;
        Ok((y, copy.unwrap_or(x)))
    }

    /// dy (N, C) and the saved x -> dx (N, C) in f32, added to `base` if given; and where the norm is trained the gradients
    /// of weight and bias (2, C).
    pub(in crate::ops) fn backward_cuda(
        &self,
        dy: &Tensor,
        x: &Tensor,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, cols) = x.dims2()?;
        let device = x.device();
        let dy = to_f32_contiguous(dy)?;
        let weight = to_f32_contiguous(&self.weight.tensor)?;
        let base = base.map(to_f32_contiguous).transpose()?;
        let dx = output(device, DType::F32, (rows, cols))?;
        let statistics = self
            .is_trained()
            .then(|| output(device, DType::F32, (rows, 2)));
        let statistics = statistics.transpose()?;
        let mut args = vec![
            Arg::from(&dy),
            Arg::from(x),
            Arg::from(&weight),
            Arg::Tensor(base.as_ref()),
            Arg::from(&dx),
            Arg::Tensor(statistics.as_ref()),
        ];
        args.extend(scalars(self, rows, cols));
        let from = type_name(x.dtype())?;
        launch(&format!("norm_backward_f32_{from}"), rows, cols).run(device, &args)?;
        let of_weights = statistics.map(|statistics| self.weight_gradients(&dy, x, &statistics));
        Ok((dx, of_weights.transpose()?))
    }

    /// The gradients of weight and bias, (2, C).
    fn weight_gradients(&self, dy: &Tensor, x: &Tensor, statistics: &Tensor) -> Result<Tensor> {
        let (rows, cols) = x.dims2()?;
        let device = x.device();
        let parts = rows.div_ceil(ROWS_PER_PART).max(1);
        let partial = Tensor::zeros((2, parts, cols), DType::F32, device)?;
        let args = [
            Arg::from(dy),
            Arg::from(x),
            Arg::from(statistics),
            Arg::from(&partial),
            Arg::Int(rows),
            Arg::Int(cols),
            Arg::Int(ROWS_PER_PART),
        ];
        let kernel = format!("norm_weight_gradient_f32_{}", type_name(x.dtype())?);
        let of_columns = |kernel, parts| {
            let launch = Launch::of_items("norm", kernel, cols);
            Launch {
                grid: [launch.grid[0], parts, 1],
                ..launch
            }
        };
        of_columns(&kernel, parts).run(device, &args)?;
        let sums = output(device, DType::F32, (2, cols))?;
        let args = [
            Arg::from(&partial),
            Arg::from(&sums),
            Arg::Int(parts),
            Arg::Int(cols),
            Arg::Float(self.factor),
        ];
        of_columns("norm_sum_parts", 2).run(device, &args)?;
        Ok(sums)
    }
}
