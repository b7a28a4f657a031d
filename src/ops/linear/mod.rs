//! `y = x W^T + bias + scaling * dropout(x) A^T B^T`: a linear layer with an optional LoRA adapter
//! (Hu et al. 2021, section 4.1).
//!
//! x is (N, in), W (out, in), A (r, in), B (out, r), y (N, out). A frozen W costs two products per
//! token, forward and dx; its gradient is computed only where it is trained. On devices all
//! products are candle's matmul.

mod backward;
mod cost;
mod dora;

use candle_core::{DType, Tensor};

pub use self::backward::{Branch, InputGradient, backward_shared_input};
pub use self::cost::{LinearShape, LoraShape};
use self::dora::DoraSaved;
pub use self::dora::Magnitude;
use super::dropout::DropoutMask;
use super::gemm::{
    GemmTerm, Init, Lhs, MatRef, PackedLhs, gemm, gemm_by_packed, gemm_sum, skinny_gemm,
};
use super::storage::{
    CpuTensor, check_dims, check_shape, f32_tensor, load_activation, to_f32_contiguous,
};
use super::{Context, Path, Weight, cuda, matmul, residual_cost};
use crate::error::{Error, Kind, Result};
use crate::work::Precision;

/// A LoRA adapter.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, (r, in).
    pub a: Weight,
    /// B, (out, r).
    pub b: Weight,
    /// Added to B's result before the scaling, (out).
    pub bias: Option<Weight>,
    /// DoRA's magnitude.
    pub magnitude: Option<Magnitude>,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scaling: f64,
}

/// A linear layer with its bias and adapter.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Context, Linear, Lora, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// # let weight = |x: &[[f32; 2]; 1]| Tensor::new(x, &Device::Cpu).map(Weight::frozen);
/// let lora = Lora {
///     a: weight(&[[1., -1.]])?, // r = 1
///     b: Weight::frozen(Tensor::new(&[[3f32]], &Device::Cpu)?),
///     bias: None,
///     magnitude: None,
///     scaling: 1.5,
/// };
/// let linear = Linear { weight: weight(&[[1., 2.]])?, bias: None, lora: Some(lora) };
/// let x = Tensor::new(&[[4f32, 5.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let (y, _) = linear.forward(Context::new(&counter, Precision::F32), &x, None, None)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[9.5]]); // 4 + 10 + 1.5 * 3 * (4 - 5)
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Linear {
    /// W, (out, in).
    pub weight: Weight,
    /// (out).
    pub bias: Option<Weight>,
    /// The adapter, where this layer is a target.
    pub lora: Option<Lora>,
}

/// The left-hand side of linear layers, x or dy, packed once for all layers that read it.
pub struct LinearInput {
    /// (N, in).
    shape: (usize, usize),
    /// `None` where only the packed form exists.
    x: Option<Tensor>,
    packed: PackedLhs,
}

impl LinearInput {
    /// x (N, in).
    pub fn new(context: Context<'_>, x: Tensor) -> Result<Self> {
        let shape = x.dims2()?;
        if context.path(&x) != Path::Cpu {
            return Ok(Self {
                shape,
                x: Some(x),
                packed: PackedLhs::default(),
            });
        }
        let mut x = x.contiguous()?;
        let matrix = CpuTensor::borrow(&x)?;
        let packed = PackedLhs::new(context.precision, &matrix.matrix(shape.0, shape.1));
        drop(matrix);
        if packed.packed().is_none() {
            // Every layer reads it as f32.
            x = load_activation(context, &x)?;
        }
        Ok(Self {
            shape,
            x: Some(x),
            packed,
        })
    }

    /// An input (N, in) that exists in packed form only.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn from_packed(shape: (usize, usize), packed: PackedLhs) -> Self {
        Self {
            shape,
            x: None,
            packed,
        }
    }

    /// (N, in).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The packed form, if any.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn packed(&self) -> &PackedLhs {
        &self.packed
    }

    /// x (N, in) in f32 or bf16; an error if only the packed form exists.
    pub fn tensor(&self) -> Result<&Tensor> {
        self.x.as_ref().ok_or_else(only_packed)
    }

    fn borrow(&self) -> Result<Option<CpuTensor<'_>>> {
        self.x.as_ref().map(CpuTensor::borrow).transpose()
    }

    /// The left-hand side of a GEMM; `x` is what `borrow` returned.
    pub(super) fn lhs<'a>(&self, x: &'a Option<CpuTensor<'_>>) -> Result<Lhs<'a>> {
        let (rows, columns) = self.shape;
        if let Some(lhs) = Lhs::from_packed(rows, columns, &self.packed) {
            return Ok(lhs);
        }
        let x = x.as_ref().ok_or_else(only_packed)?.matrix(rows, columns);
        Ok(Lhs::with_packed(x, PackedLhs::default()))
    }

    /// `few` (r, N) times x (N, in): the gradient of a low-rank factor.
    fn skinny_gemm(&self, precision: Precision, few: MatRef<'_>) -> Result<Vec<f32>> {
        let (rows, columns) = self.shape;
        if let Some(packed) = self.packed.packed() {
            return Ok(gemm_by_packed(few, packed, columns));
        }
        let x = CpuTensor::borrow(self.tensor()?)?;
        Ok(skinny_gemm(precision, few, x.matrix(rows, columns)))
    }
}

fn only_packed() -> Error {
    Error::new(Kind::Tensor, "this layer input exists only in packed form")
}

/// Saved by `forward` for `backward`, which also takes x.
#[derive(Debug, Clone, Default)]
pub struct LinearSaved {
    lora: Option<LoraSaved>,
    dora: Option<DoraSaved>,
}

#[derive(Debug, Clone)]
struct LoraSaved {
    mask: Option<DropoutMask>,
    /// dropout(x) A^T, (N, r).
    xa: Tensor,
}

impl LinearSaved {
    fn has_mask(&self) -> bool {
        self.mask().is_some() || self.dora.as_ref().is_some_and(DoraSaved::has_mask)
    }

    fn mask(&self) -> Option<&DropoutMask> {
        self.lora.as_ref()?.mask.as_ref()
    }
}

impl Lora {
    /// What its cost depends on.
    pub fn shape(&self) -> Result<LoraShape> {
        Ok(LoraShape {
            r: self.a.tensor.dims2()?.0,
            bias: self.bias.is_some(),
            magnitude: self.magnitude.is_some(),
        })
    }

    /// Whether A and B are all of it.
    pub(super) fn is_plain(&self) -> bool {
        self.bias.is_none() && self.magnitude.is_none()
    }
}

impl Linear {
    /// The adapter's rank; 0 without one.
    fn rank(&self) -> Result<usize> {
        self.lora
            .as_ref()
            .map_or(Ok(0), |lora| Ok(lora.a.tensor.dims2()?.0))
    }

    /// Whether anything of the layer is trained: `backward` then takes x.
    pub fn is_trained(&self) -> bool {
        let bias = self.bias.as_ref().is_some_and(Weight::is_trained);
        self.lora.is_some() || self.weight.is_trained() || bias
    }

    /// x (N, in) -> y (N, out), added to `base` (N, out) if given. `mask` (N, in): LoRA dropout.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        self.forward_input(context, &LinearInput::new(context, x.clone())?, mask, base)
    }

    /// The same for an input that several layers read.
    pub fn forward_input(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let shape = self.shape(input.shape.0, mask.is_some())?;
        self.check_input(input)?;
        context.counter.add(shape.forward_cost(context.precision));
        count_base(context, base, &[shape.tokens, shape.out_features])?;
        if let Some(lora) = &self.lora
            && let Some(magnitude) = &lora.magnitude
        {
            return self.forward_dora(context, input, mask, base, lora, magnitude);
        }
        match &input.x {
            Some(x) if context.path(x) != Path::Cpu => {
                self.forward_reference(context, x, mask, base)
            }
            _ => self.forward_cpu(context, input, mask, base),
        }
    }

    pub(super) fn check_input(&self, x: &LinearInput) -> Result<()> {
        let in_features = self.weight.dims2()?.1;
        check_dims("x", &[x.shape.0, x.shape.1], &[x.shape.0, in_features])
    }

    fn forward_reference(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let mut y = matmul(context, x, &self.weight.dequantized()?.t()?)?;
        if let Some(bias) = self.whole_bias()? {
            y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
        }
        let mut saved = LinearSaved::default();
        if let Some(lora) = &self.lora {
            let xa = matmul(
                context,
                &masked(context, x, mask.as_ref())?,
                &lora.a.tensor.t()?,
            )?;
            let scaled = (&xa * lora.scaling)?; // (N, r): the smallest place to scale
            y = (y + matmul(context, &scaled, &lora.b.tensor.t()?)?)?;
            saved.lora = Some(LoraSaved { mask, xa });
        }
        if let Some(base) = base {
            y = (y + base)?;
        }
        Ok((y, saved))
    }

    /// W and the adapter in one pass over y: the adapter lengthens k by r.
    fn forward_cpu(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let n = input.shape.0;
        let o = self.weight.dims2()?.0;
        let x = input.borrow()?;
        let lhs = input.lhs(&x)?;
        let w = self.weight.storage()?;
        let down = self.lora_down(context, input, &lhs, mask)?;
        let b = self
            .lora
            .as_ref()
            .map(|lora| CpuTensor::borrow(&lora.b.tensor));
        let b = b.transpose()?;
        let r = self.rank()?;
        let up = down.as_ref().zip(b.as_ref()).map(|((_, scaled), b)| {
            let scaled = MatRef::from_f32(scaled, n, r);
            (Lhs::new(context.precision, scaled), b.matrix(o, r).t())
        });
        let mut terms = vec![GemmTerm {
            lhs: &lhs,
            rhs: self.weight.matrix(&w)?.t(),
        }];
        terms.extend(up.as_ref().map(|(lhs, rhs)| GemmTerm { lhs, rhs: *rhs }));

        let bias = self.whole_bias()?;
        let bias = bias.as_ref().map(to_f32_contiguous).transpose()?;
        let base = base.map(Tensor::contiguous).transpose()?;
        let init = base.as_ref().or(bias.as_ref());
        let init = init.map(CpuTensor::borrow_f32).transpose()?;
        let init = init.as_ref().map_or(Init::Zero, |init| match base {
            Some(_) => Init::Matrix(init.f32_slice()),
            None => Init::Bias(init.f32_slice()),
        });
        let mut y = f32_tensor(gemm_sum(&terms, init), (n, o))?;
        if let (Some(_), Some(bias)) = (&base, &bias) {
            y = y.broadcast_add(bias)?;
        }
        drop(terms);
        Ok((y, down.map(|(saved, _)| saved).unwrap_or_default()))
    }

    /// The bias and the scaled bias of the adapter, (out).
    fn whole_bias(&self) -> Result<Option<Tensor>> {
        let bias = self.bias.as_ref().map(|bias| bias.tensor.clone());
        let Some(lora) = &self.lora else {
            return Ok(bias);
        };
        let Some(added) = &lora.bias else {
            return Ok(bias);
        };
        let scaled = (&added.tensor * lora.scaling)?;
        Ok(Some(match bias {
            Some(bias) => (bias.to_dtype(DType::F32)? + scaled)?,
            None => scaled,
        }))
    }

    /// The adapter's down projection: the saved tensors of the layer, and
    /// `scaling * dropout(x) A^T` (N, r); `None` without an adapter.
    pub(super) fn lora_down(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        lhs: &Lhs<'_>,
        mask: Option<DropoutMask>,
    ) -> Result<Option<(LinearSaved, Vec<f32>)>> {
        let Some(lora) = &self.lora else {
            return Ok(None);
        };
        let (n, i) = input.shape;
        let r = self.rank()?;
        let a = CpuTensor::borrow(&lora.a.tensor)?;
        let a_t = a.matrix(r, i).t();
        let xa = match &mask {
            None => gemm_sum(&[GemmTerm { lhs, rhs: a_t }], Init::Zero),
            Some(mask) => {
                let x = mask.apply(input.tensor()?)?;
                gemm(context.precision, MatRef::from_f32(&x, n, i), a_t)
            }
        };
        let scaled = xa.iter().map(|xa| xa * lora.scaling as f32).collect();
        let xa = f32_tensor(xa, (n, r))?;
        let saved = LinearSaved {
            lora: Some(LoraSaved { mask, xa }),
            dora: None,
        };
        Ok(Some((saved, scaled)))
    }
}

/// Counts the addition of a `base`; refuses one of another shape.
fn count_base(context: Context<'_>, base: Option<&Tensor>, shape: &[usize; 2]) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    check_shape("base", base, shape)?;
    context.counter.add(residual_cost(shape[0], shape[1]));
    Ok(())
}

fn masked(context: Context<'_>, x: &Tensor, mask: Option<&DropoutMask>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) if context.path(x) == Path::Cuda => cuda::masked(mask, x, DType::F32)?,
        Some(mask) => (x.to_dtype(DType::F32)? * mask.tensor(x.device())?)?,
        None => x.clone(),
    })
}
