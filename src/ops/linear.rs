//! `y = x W^T + bias + scaling * dropout(x) A^T B^T`: a linear layer with an optional LoRA pair.
//!
//! x is (N, in), W (out, in), A (r, in), B (out, r), y (N, out). A frozen W costs two products a token (forward and input gradient);
//! its own gradient is computed only where W is trained. Source of the pair: Hu et al. 2021, "LoRA", section 4.1.

use candle_core::{DType, Tensor};

use super::dropout::DropoutMask;
use super::gemm::{
    GemmTerm, Init, Lhs, MatRef, PackedLhs, gemm, gemm_by_packed, gemm_sum, skinny_gemm,
};
use super::parallel::par_for_each;
use super::storage::{
    CpuTensor, ROWS_PER_TASK, check_dims, check_shape, f32_tensor, load_activation,
    to_f32_contiguous, uninit_vec,
};
use super::{Context, Gradients, Weight, matmul, residual_cost};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// The low-rank pair beside a linear layer.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, (r, in).
    pub a: Weight,
    /// B, (out, r).
    pub b: Weight,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scaling: f64,
}

/// A linear layer: W, its bias and its adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    /// W, (out, in).
    pub weight: Weight,
    /// (out).
    pub bias: Option<Weight>,
    /// The adapter, where this layer is a target.
    pub lora: Option<Lora>,
}

/// What linear layers multiply, x or dy, prepared once for all that read it.
pub struct LinearInput {
    /// (N, in).
    shape: (usize, usize),
    /// None where only the packed form was made.
    x: Option<Tensor>,
    prepared: PackedLhs,
}

impl LinearInput {
    /// x (N, in).
    pub fn new(context: Context<'_>, x: Tensor) -> Result<Self> {
        let shape = x.dims2()?;
        if !context.fused(&x) {
            return Ok(Self {
                shape,
                x: Some(x),
                prepared: PackedLhs::default(),
            });
        }
        let x = x.contiguous()?;
        let prepared = PackedLhs::new(
            context.precision,
            &CpuTensor::borrow(&x)?.matrix(shape.0, shape.1),
        );
        // Where nothing was packed it is read as f32, by every layer.
        let x = if prepared.packed().is_none() {
            load_activation(context, &x)?
        } else {
            x
        };
        Ok(Self {
            shape,
            x: Some(x),
            prepared,
        })
    }

    /// What was packed, and nothing else.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn packed(shape: (usize, usize), prepared: PackedLhs) -> Self {
        Self {
            shape,
            x: None,
            prepared,
        }
    }

    /// (N, in).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Its packed form, where there is one.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn prepared(&self) -> &PackedLhs {
        &self.prepared
    }

    /// x (N, in), in whatever type layers read it.
    pub fn tensor(&self) -> Result<&Tensor> {
        self.x.as_ref().ok_or_else(only_packed)
    }

    fn host(&self) -> Result<Option<CpuTensor<'_>>> {
        self.x.as_ref().map(CpuTensor::borrow).transpose()
    }

    /// As the left side of products; `host` is its own.
    pub(super) fn left<'a>(&self, host: &'a Option<CpuTensor<'_>>) -> Result<Lhs<'a>> {
        let (rows, columns) = self.shape;
        match Lhs::from_packed(rows, columns, &self.prepared) {
            Some(left) => Ok(left),
            None => Ok(Lhs::with_packed(
                host.as_ref().ok_or_else(only_packed)?.matrix(rows, columns),
                PackedLhs::default(),
            )),
        }
    }

    /// The rows of an adapter, (r, N), times this.
    fn skinny_gemm(&self, precision: Precision, few: MatRef<'_>) -> Result<Vec<f32>> {
        let (rows, columns) = self.shape;
        if let Some(packed) = self.prepared.packed() {
            return Ok(gemm_by_packed(few, packed, columns));
        }
        Ok(skinny_gemm(
            precision,
            few,
            CpuTensor::borrow(self.tensor()?)?.matrix(rows, columns),
        ))
    }
}

fn only_packed() -> Error {
    Error::new(
        Kind::Tensor,
        "only the packed form of these numbers was made",
    )
}

/// What `backward` needs of a forward pass beside its input: the adapter's mask (where there is dropout) and masked input times A, (N, r).
#[derive(Debug, Clone, Default)]
pub struct LinearSaved {
    low: Option<LoraSaved>,
}

#[derive(Debug, Clone)]
struct LoraSaved {
    mask: Option<DropoutMask>,
    xa: Tensor,
}

/// All that a linear layer's cost depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x.
    pub in_features: usize,
    /// Columns of y.
    pub out_features: usize,
    /// The adapter's rank.
    pub r: Option<usize>,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether W (and the bias) is trained.
    pub trained: bool,
    /// Whether the adapter's input is masked.
    pub dropout: bool,
}

impl LinearShape {
    /// Work of `forward`.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let &Self {
            tokens: n,
            in_features: i,
            out_features: o,
            ..
        } = self;
        let mut work = Work::product(n, o, i, precision);
        if let Some(r) = self.r {
            work += &Work::product(n, r, i, precision);
            work += &Work::product(n, o, r, precision);
            work += &Work::sweep(8 * n * r, n * r);
        }
        if self.bias {
            work += &Work::sweep(8 * n * o, n * o);
        }
        if self.dropout && self.r.is_some() {
            work += &Work::sweep(12 * n * i, n * i);
        }
        work
    }

    /// Work of `backward`; `input_gradient`: whether dx is wanted.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let &Self {
            tokens: n,
            in_features: i,
            out_features: o,
            ..
        } = self;
        let mut work = Work::default();
        if input_gradient {
            work += &Work::product(n, i, o, precision);
        }
        if self.trained {
            work += &Work::product(o, i, n, precision);
            if self.bias {
                work += &Work::sweep(4 * n * o, n * o);
            }
        }
        if let Some(r) = self.r {
            work += &Work::product(n, r, o, precision); // dy B
            work += &Work::product(o, r, n, precision); // dB
            work += &Work::product(r, i, n, precision); // dA
            work += &Work::sweep(8 * n * r, n * r);
            if self.dropout {
                work += &Work::sweep(12 * n * i, n * i);
            }
            if input_gradient {
                work += &Work::product(n, i, r, precision);
                if self.dropout {
                    work += &Work::sweep(24 * n * i, 2 * n * i);
                }
            }
        }
        work
    }
}

impl Linear {
    /// The layer's shape for `tokens` rows.
    pub fn shape(&self, tokens: usize, dropout: bool) -> Result<LinearShape> {
        let (out_features, in_features) = self.weight.tensor.dims2()?;
        let r = self
            .lora
            .as_ref()
            .map(|lora| lora.a.tensor.dims2())
            .transpose()?
            .map(|(r, _)| r);
        let (bias, trained) = (self.bias.is_some(), self.weight.is_trained());
        Ok(LinearShape {
            tokens,
            in_features,
            out_features,
            r,
            bias,
            trained,
            dropout,
        })
    }

    /// Whether `backward` wants x.
    pub fn needs_input(&self) -> bool {
        self.lora.is_some() || self.weight.is_trained()
    }

    /// x (N, in) -> y (N, out), added to `base` (N, out) where there is one. `mask` (N, in): where dropout is on the
    /// adapter's input.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        self.forward_input(context, &LinearInput::new(context, x.clone())?, mask, base)
    }

    /// The same for an input that other layers read too.
    pub fn forward_input(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let shape = self.shape(input.shape.0, mask.is_some())?;
        self.expect_input(input)?;
        context.counter.add(shape.forward_cost(context.precision));
        count_base(context, base, &[shape.tokens, shape.out_features])?;
        match &input.x {
            Some(x) if !context.fused(x) => self.forward_reference(context, x, mask, base),
            _ => self.forward_cpu(context, input, mask, base),
        }
    }

    pub(super) fn expect_input(&self, x: &LinearInput) -> Result<()> {
        check_dims(
            "x",
            &[x.shape.0, x.shape.1],
            &[x.shape.0, self.weight.tensor.dims2()?.1],
        )
    }

    /// dy (N, out) and the forward pass's x (where `needs_input`) -> dx (N, in) where `input_gradient`, added to `base` (N, in) where
    /// there is one; the gradients of what is trained go to `gradients`.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        (x, saved): (Option<&Tensor>, &LinearSaved),
        (input_gradient, base): (bool, Option<&Tensor>),
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dy = LinearInput::new(context, dy.clone())?;
        let x = x
            .filter(|_| self.needs_input())
            .map(|x| LinearInput::new(context, x.clone()))
            .transpose()?;
        let branch = Branch {
            linear: self,
            dy: &dy,
            saved,
        };
        backward_shared_input(
            context,
            &[branch],
            x.as_ref(),
            (input_gradient, base),
            gradients,
        )
    }

    fn forward_reference(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let mut y = matmul(context, x, &self.weight.tensor.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.tensor.to_dtype(y.dtype())?)?;
        }
        let mut low = None;
        if let Some(lora) = &self.lora {
            let xa = matmul(context, &masked(x, mask.as_ref())?, &lora.a.tensor.t()?)?;
            let scaled = (&xa * lora.scaling)?; // (N, r): the smallest place to scale
            y = (y + matmul(context, &scaled, &lora.b.tensor.t()?)?)?;
            low = Some(LoraSaved { mask, xa });
        }
        if let Some(base) = base {
            y = (y + base)?;
        }
        Ok((y, LinearSaved { low }))
    }

    /// W and the adapter in one pass over y: the adapter lengthens the sum by r.
    fn forward_cpu(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<DropoutMask>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let ((n, _), o, precision) = (
            input.shape,
            self.weight.tensor.dims2()?.0,
            context.precision,
        );
        let (host, w) = (input.host()?, CpuTensor::borrow(&self.weight.tensor)?);
        let left = input.left(&host)?;
        let adapter = self.low(context, input, &left, mask)?;
        let b = self
            .lora
            .as_ref()
            .map(|lora| CpuTensor::borrow(&lora.b.tensor))
            .transpose()?;
        let r = lora_shape(self)?.0;
        let low = adapter.as_ref().zip(b.as_ref());
        let low = low.map(|((_, scaled), b)| {
            (
                Lhs::new(precision, MatRef::from_f32(scaled, n, r)),
                b.matrix(o, r).t(),
            )
        });
        let mut terms = vec![GemmTerm {
            lhs: &left,
            rhs: self.weight.matrix(&w)?.t(),
        }];
        terms.extend(low.as_ref().map(|(a, b)| GemmTerm { lhs: a, rhs: *b }));
        let bias = self
            .bias
            .as_ref()
            .map(|bias| to_f32_contiguous(&bias.tensor))
            .transpose()?;
        let base = base.map(Tensor::contiguous).transpose()?;
        let (bias_host, base_host) = (
            bias.as_ref().map(CpuTensor::borrow_f32).transpose()?,
            base.as_ref().map(CpuTensor::borrow_f32).transpose()?,
        );
        let start = match (&base_host, &bias_host) {
            (Some(base), _) => Init::Matrix(base.f32_slice()),
            (None, Some(bias)) => Init::Bias(bias.f32_slice()),
            (None, None) => Init::Zero,
        };
        let mut y = f32_tensor(gemm_sum(&terms, start), (n, o))?;
        if let (Some(_), Some(bias)) = (&base, &bias) {
            y = y.broadcast_add(bias)?;
        }
        drop(terms);
        Ok((y, adapter.map(|(saved, _)| saved).unwrap_or_default()))
    }

    /// The adapter's first half, where there is one: what its backward pass needs, and `scaling` times masked x A^T, (N, r).
    pub(super) fn low(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        left: &Lhs<'_>,
        mask: Option<DropoutMask>,
    ) -> Result<Option<(LinearSaved, Vec<f32>)>> {
        let Some(lora) = &self.lora else {
            return Ok(None);
        };
        let ((n, i), (r, _), a) = (
            input.shape,
            lora.a.tensor.dims2()?,
            CpuTensor::borrow(&lora.a.tensor)?,
        );
        let xa = match &mask {
            None => gemm_sum(
                &[GemmTerm {
                    lhs: left,
                    rhs: a.matrix(r, i).t(),
                }],
                Init::Zero,
            ),
            Some(mask) => gemm(
                context.precision,
                MatRef::from_f32(&mask.apply(input.tensor()?)?, n, i),
                a.matrix(r, i).t(),
            ),
        };
        let scaled = xa.iter().map(|xa| xa * lora.scaling as f32).collect();
        Ok(Some((
            LinearSaved {
                low: Some(LoraSaved {
                    mask,
                    xa: f32_tensor(xa, (n, r))?,
                }),
            },
            scaled,
        )))
    }
}

/// One of the layers that read an input: what its backward pass starts from.
#[derive(Clone, Copy)]
pub struct Branch<'a> {
    /// The layer.
    pub linear: &'a Linear,
    /// (N, out).
    pub dy: &'a LinearInput,
    /// What its forward pass kept.
    pub saved: &'a LinearSaved,
}

/// The backward passes of layers that read one input x: dx (N, in) where `input_gradient`, the sum of theirs, added to `base` (N, in) where
/// there is one; the gradients of what is trained go to `gradients`.
pub fn backward_shared_input(
    context: Context<'_>,
    branches: &[Branch<'_>],
    x: Option<&LinearInput>,
    (input_gradient, base): (bool, Option<&Tensor>),
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let Some(first) = branches.first() else {
        return Ok(None);
    };
    let (tokens, in_features) = (first.dy.shape.0, first.linear.weight.tensor.dims2()?.1);
    for (index, Branch { linear, dy, saved }) in branches.iter().enumerate() {
        let dropout = saved.low.as_ref().is_some_and(|low| low.mask.is_some());
        let shape = linear.shape(tokens, dropout)?;
        check_dims(
            "dy",
            &[dy.shape.0, dy.shape.1],
            &[tokens, shape.out_features],
        )?;
        check_shape(
            "weight",
            &linear.weight.tensor,
            &[shape.out_features, in_features],
        )?;
        x.map_or(Ok(()), |x| {
            check_dims("x", &[x.shape.0, x.shape.1], &[tokens, in_features])
        })?;
        context
            .counter
            .add(shape.backward_cost(context.precision, input_gradient));
        match (input_gradient, index) {
            (false, _) => {}
            (true, 0) => count_base(context, base, &[tokens, in_features])?,
            (true, _) => context.counter.add(residual_cost(tokens, in_features)),
        }
        if linear.needs_input() && x.is_none() {
            return Err(Error::new(
                Kind::Tensor,
                "a linear layer that is trained needs its input in the backward pass",
            ));
        }
    }
    let reference = first.dy.x.as_ref().is_some_and(|dy| !context.fused(dy));
    if !reference {
        let lows = branches
            .iter()
            .map(|branch| branch.parameters(context, x, gradients))
            .collect::<Result<Vec<_>>>()?;
        return input_gradient
            .then(|| input_gradient_cpu(context, branches, &lows, base))
            .transpose();
    }
    let mut sum = base.cloned();
    for branch in branches {
        let dx = branch.reference(context, x, input_gradient, gradients)?;
        sum = match (dx, sum) {
            (Some(dx), Some(sum)) => Some((dx + sum)?),
            (dx, _) => dx,
        };
    }
    Ok(sum)
}

/// `scaling` times dy B, (N, r).
pub(super) type LoraDownGradient = Option<Vec<f32>>;

impl Branch<'_> {
    fn reference(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (dy, weight) = (self.dy.tensor()?, &self.linear.weight);
        let x = x.map(LinearInput::tensor).transpose()?;
        let mut dx = input_gradient
            .then(|| matmul(context, dy, &weight.tensor))
            .transpose()?;
        if let (true, Some(x)) = (weight.is_trained(), x) {
            gradients.add(weight, matmul(context, &dy.t()?, x)?)?;
        }
        self.bias(gradients)?;
        if let (Some(lora), Some(low), Some(x)) = (&self.linear.lora, &self.saved.low, x) {
            let d_low = (matmul(context, dy, &lora.b.tensor)? * lora.scaling)?; // (N, r)
            gradients.add(
                &lora.b,
                (matmul(context, &dy.t()?, &low.xa)? * lora.scaling)?,
            )?;
            gradients.add(
                &lora.a,
                matmul(context, &d_low.t()?, &masked(x, low.mask.as_ref())?)?,
            )?;
            if let Some(sum) = dx {
                let through = masked(&matmul(context, &d_low, &lora.a.tensor)?, low.mask.as_ref())?;
                dx = Some((sum + through)?);
            }
        }
        Ok(dx)
    }

    /// The gradients of what is trained.
    fn parameters(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        gradients: &mut Gradients,
    ) -> Result<LoraDownGradient> {
        if let (true, Some(x)) = (self.linear.weight.is_trained(), x) {
            let (precision, (n, o)) = (context.precision, self.dy.shape);
            let (i, dy, x) = (
                x.shape.1,
                CpuTensor::borrow(self.dy.tensor()?)?,
                CpuTensor::borrow(x.tensor()?)?,
            );
            let dw = gemm(precision, dy.matrix(n, o).t(), x.matrix(n, i));
            gradients.add(&self.linear.weight, f32_tensor(dw, (o, i))?)?;
        }
        self.bias(gradients)?;
        let (Some(x), Some(d_low)) = (x, self.lora_b_gradient(context, gradients)?) else {
            return Ok(None);
        };
        self.lora_a_gradient(context, x, &d_low, gradients)?;
        Ok(Some(d_low))
    }

    /// dB, where there is an adapter; returns `scaling` times dy B, (N, r).
    pub(super) fn lora_b_gradient(
        &self,
        context: Context<'_>,
        gradients: &mut Gradients,
    ) -> Result<LoraDownGradient> {
        let (Some(lora), Some(low)) = (&self.linear.lora, &self.saved.low) else {
            return Ok(None);
        };
        let ((n, o), (_, r), scaling) = (self.dy.shape, low.xa.dims2()?, lora.scaling as f32);
        let (b, xa, host) = (
            CpuTensor::borrow(&lora.b.tensor)?,
            CpuTensor::borrow_f32(&low.xa)?,
            self.dy.host()?,
        );
        let mut d_low = gemm_sum(
            &[GemmTerm {
                lhs: &self.dy.left(&host)?,
                rhs: b.matrix(o, r),
            }],
            Init::Zero,
        );
        d_low.iter_mut().for_each(|d| *d *= scaling);
        // By its transpose: rows of r, so that B's long side lies along the vectors.
        let db = self
            .dy
            .skinny_gemm(context.precision, xa.matrix(n, r).t())?;
        gradients.add(
            &lora.b,
            f32_tensor(scaled_transpose(&db, (r, o), scaling), (o, r))?,
        )?;
        Ok(Some(d_low))
    }

    /// dA, from the layer's input and what `lora_b_gradient` returned.
    pub(super) fn lora_a_gradient(
        &self,
        context: Context<'_>,
        x: &LinearInput,
        d_low: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (Some(lora), Some(low), (n, i)) = (&self.linear.lora, &self.saved.low, x.shape) else {
            return Ok(());
        };
        let r = low.xa.dims2()?.1;
        let few = MatRef::from_f32(d_low, n, r).t();
        let da = match &low.mask {
            None => x.skinny_gemm(context.precision, few)?,
            Some(mask) => skinny_gemm(
                context.precision,
                few,
                MatRef::from_f32(&mask.apply(x.tensor()?)?, n, i),
            ),
        };
        gradients.add(&lora.a, f32_tensor(da, (r, i))?)
    }

    fn bias(&self, gradients: &mut Gradients) -> Result<()> {
        match self.linear.bias.as_ref().filter(|bias| bias.is_trained()) {
            Some(bias) => gradients.add(bias, self.dy.tensor()?.to_dtype(DType::F32)?.sum(0)?),
            None => Ok(()),
        }
    }
}

/// The sum of the layers' dx, in one sum of products; what went through a dropout mask is added after it.
fn input_gradient_cpu(
    context: Context<'_>,
    branches: &[Branch<'_>],
    lows: &[LoraDownGradient],
    base: Option<&Tensor>,
) -> Result<Tensor> {
    let (n, precision) = (branches[0].dy.shape.0, context.precision);
    let hosts = branches.iter().map(|branch| {
        Ok((
            branch.dy.host()?,
            CpuTensor::borrow(&branch.linear.weight.tensor)?,
        ))
    });
    let hosts = hosts.collect::<Result<Vec<_>>>()?;
    let loras = branches.iter().map(|branch| branch.linear.lora.as_ref());
    let factors = loras
        .map(|lora| {
            lora.map(|lora| CpuTensor::borrow(&lora.a.tensor))
                .transpose()
        })
        .collect::<Result<Vec<_>>>()?;
    let i = branches[0].linear.weight.tensor.dims2()?.1;
    let mut lefts = Vec::new();
    for ((branch, (dy, _)), d_low) in branches.iter().zip(&hosts).zip(lows) {
        let r = lora_shape(branch.linear)?.0;
        let low = d_low
            .as_ref()
            .map(|d_low| Lhs::new(precision, MatRef::from_f32(d_low, n, r)));
        lefts.push((branch.dy.left(dy)?, low));
    }
    let (mut terms, mut apart) = (Vec::new(), Vec::new());
    for (index, (dy, low)) in lefts.iter().enumerate() {
        let Branch { linear, saved, .. } = &branches[index];
        terms.push(GemmTerm {
            lhs: dy,
            rhs: linear.weight.matrix(&hosts[index].1)?,
        });
        let (Some(low), Some(a)) = (low, &factors[index]) else {
            continue;
        };
        let term = GemmTerm {
            lhs: low,
            rhs: a.matrix(lora_shape(linear)?.0, i),
        };
        match saved.low.as_ref().and_then(|low| low.mask.as_ref()) {
            None => terms.push(term),
            Some(mask) => apart.push((term, mask)),
        }
    }
    let base = base.map(Tensor::contiguous).transpose()?;
    let base = base.as_ref().map(CpuTensor::borrow_f32).transpose()?;
    let mut dx = gemm_sum(
        &terms,
        base.as_ref()
            .map_or(Init::Zero, |base| Init::Matrix(base.f32_slice())),
    );
    for (term, mask) in apart {
        mask.add_masked(&gemm_sum(&[term], Init::Zero), &mut dx);
    }
    f32_tensor(dx, (n, i))
}

/// (r, in) of a layer's adapter; (0, 0) where there is none.
fn lora_shape(linear: &Linear) -> Result<(usize, usize)> {
    linear
        .lora
        .as_ref()
        .map_or(Ok((0, 0)), |lora| Ok(lora.a.tensor.dims2()?))
}

/// Counts the addition of a `base` and refuses one of another shape.
fn count_base(context: Context<'_>, base: Option<&Tensor>, shape: &[usize; 2]) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    check_shape("base", base, shape)?;
    context.counter.add(residual_cost(shape[0], shape[1]));
    Ok(())
}

/// x (rows, columns) -> `scale` x^T (columns, rows).
fn scaled_transpose(x: &[f32], (rows, columns): (usize, usize), scale: f32) -> Vec<f32> {
    // SAFETY: the loop writes every number.
    let mut out: Vec<f32> = unsafe { uninit_vec(x.len()) };
    par_for_each(
        out.chunks_mut((rows * 4 * ROWS_PER_TASK).max(1))
            .enumerate(),
        |(index, out)| {
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                let column = index * 4 * ROWS_PER_TASK + column;
                out.iter_mut()
                    .enumerate()
                    .for_each(|(row, out)| *out = scale * x[row * columns + column]);
            }
        },
    );
    out
}

fn masked(x: &Tensor, mask: Option<&DropoutMask>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => (x.to_dtype(DType::F32)? * mask.tensor(x.device())?)?,
        None => x.clone(),
    })
}
