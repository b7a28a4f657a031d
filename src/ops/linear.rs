//! `y = x W^T + bias + scaling * dropout(x) A^T B^T`: a linear layer with an optional LoRA pair.
//!
//! x is (N, in), W (out, in), A (r, in), B (out, r), y (N, out). A frozen W costs two products a token (forward and input gradient);
//! its own gradient is computed only where W is trained. Source of the pair: Hu et al. 2021, "LoRA", section 4.1.

use candle_core::{D, DType, Tensor};

use super::host::{Host, ROWS_PER_TASK, expect, f32_contiguous, restored, tensor, uninitialized};
use super::product::{Left, Matrix, Prepared, Start, Term, product, product_of_few, products};
use super::residual::residual_cost;
use super::team::each;
use super::{Context, Gradients, Weight, matmul};
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

/// What linear layers multiply, prepared once for all that read it.
pub struct LinearInput {
    /// (N, in).
    x: Tensor,
    prepared: Prepared,
}

impl LinearInput {
    /// x (N, in).
    pub fn new(context: Context<'_>, x: Tensor) -> Result<Self> {
        let (n, i) = x.dims2()?;
        if !context.fused(&x) {
            return Ok(Self { x, prepared: Prepared::default() });
        }
        let x = x.contiguous()?;
        let prepared = Prepared::new(context.precision, &Host::open_any(&x)?.matrix(n, i));
        // Where nothing was packed it is read as f32, by every layer.
        let x = if prepared.is_empty() { restored(context, &x)? } else { x };
        Ok(Self { x, prepared })
    }

    /// x (N, in), in whatever type layers read it.
    pub fn tensor(&self) -> &Tensor {
        &self.x
    }
}

/// What `backward` needs of a forward pass beside its input: the adapter's mask (where there is dropout) and masked input times A, (N, r).
#[derive(Debug, Clone)]
pub struct LinearSaved {
    low: Option<Low>,
}

#[derive(Debug, Clone)]
struct Low {
    mask: Option<Tensor>,
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
        let &Self { tokens: n, in_features: i, out_features: o, .. } = self;
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
        let &Self { tokens: n, in_features: i, out_features: o, .. } = self;
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
        let r = self.lora.as_ref().map(|lora| lora.a.tensor.dims2()).transpose()?.map(|(r, _)| r);
        let (bias, trained) = (self.bias.is_some(), self.weight.is_trained());
        Ok(LinearShape { tokens, in_features, out_features, r, bias, trained, dropout })
    }

    /// Whether `backward` wants x.
    pub fn keeps_input(&self) -> bool {
        self.lora.is_some() || self.weight.is_trained()
    }

    /// x (N, in) -> y (N, out), added to `base` (N, out) where there is one. `mask` (N, in) multiplies the adapter's input: zero or
    /// `1 / (1 - p)`.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<Tensor>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        self.forward_prepared(context, &LinearInput::new(context, x.clone())?, mask, base)
    }

    /// The same for an input that other layers read too.
    pub fn forward_prepared(
        &self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<Tensor>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let x = &input.x;
        let shape = self.shape(x.dims2()?.0, mask.is_some())?;
        expect("x", x, &[shape.tokens, shape.in_features])?;
        context.tally.add(shape.forward_cost(context.precision));
        count_base(context, base, &[shape.tokens, shape.out_features])?;
        if context.fused(x) {
            self.forward_cpu(context, input, mask, base)
        } else {
            self.forward_reference(context, x, mask, base)
        }
    }

    /// dy (N, out) and the forward pass's x (where `keeps_input`) -> dx (N, in) where `input_gradient`, added to `base` (N, in) where
    /// there is one; the gradients of what is trained go to `gradients`.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        (x, saved): (Option<&Tensor>, &LinearSaved),
        (input_gradient, base): (bool, Option<&Tensor>),
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dropout = saved.low.as_ref().is_some_and(|low| low.mask.is_some());
        let shape = self.shape(dy.dims2()?.0, dropout)?;
        expect("dy", dy, &[shape.tokens, shape.out_features])?;
        x.map_or(Ok(()), |x| expect("x", x, &[shape.tokens, shape.in_features]))?;
        context.tally.add(shape.backward_cost(context.precision, input_gradient));
        if input_gradient {
            count_base(context, base, &[shape.tokens, shape.in_features])?;
        }
        if self.keeps_input() && x.is_none() {
            return Err(Error::new(Kind::Tensor, "a linear layer that is trained needs its input in the backward pass"));
        }
        let pass = Backward { linear: self, context, dy, x, saved, base: base.filter(|_| input_gradient), input_gradient };
        if context.fused(dy) { pass.cpu(gradients) } else { pass.reference(gradients) }
    }

    fn forward_reference(
        &self,
        context: Context<'_>,
        x: &Tensor,
        mask: Option<Tensor>,
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
            low = Some(Low { mask, xa });
        }
        if let Some(base) = base {
            y = (y + base)?;
        }
        Ok((y, LinearSaved { low }))
    }

    /// W and the adapter in one pass over y: the adapter lengthens the sum by r.
    fn forward_cpu<'a>(
        &'a self,
        context: Context<'_>,
        input: &LinearInput,
        mask: Option<Tensor>,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let x = &input.x;
        let ((n, _), (o, i), precision) = (x.dims2()?, self.weight.tensor.dims2()?, context.precision);
        let (x_host, w) = (Host::open_any(x)?, Host::open_any(&self.weight.tensor)?);
        let left = Left::of(x_host.matrix(n, i), input.prepared.clone());
        let through = |lora: &'a Lora| -> Result<_> {
            let (r, a, b) = (lora.a.tensor.dim(0)?, Host::open_any(&lora.a.tensor)?, Host::open_any(&lora.b.tensor)?);
            let xa = match &mask {
                None => products(&[Term { a: &left, b: a.matrix(r, i).t() }], Start::Zero),
                Some(_) => {
                    let input = masked(x, mask.as_ref())?;
                    let input = Host::open_any(&input)?;
                    product(precision, input.matrix(n, i), a.matrix(r, i).t())
                }
            };
            let scaled: Vec<f32> = xa.iter().map(|xa| xa * lora.scaling as f32).collect();
            Ok((tensor(xa, (n, r))?, scaled, b, r))
        };
        let adapter = self.lora.as_ref().map(through).transpose()?;
        let low =
            adapter.as_ref().map(|(_, scaled, b, r)| (Left::new(precision, Matrix::of(scaled, n, *r)), b.matrix(o, *r).t()));
        let mut terms = vec![Term { a: &left, b: w.matrix(o, i).t() }];
        terms.extend(low.as_ref().map(|(a, b)| Term { a, b: *b }));
        let bias = self.bias.as_ref().map(|bias| f32_contiguous(&bias.tensor)).transpose()?;
        let base = base.map(Tensor::contiguous).transpose()?;
        let (bias_host, base_host) = (bias.as_ref().map(Host::open).transpose()?, base.as_ref().map(Host::open).transpose()?);
        let start = match (&base_host, &bias_host) {
            (Some(base), _) => Start::Matrix(base.slice()),
            (None, Some(bias)) => Start::Row(bias.slice()),
            (None, None) => Start::Zero,
        };
        let mut y = tensor(products(&terms, start), (n, o))?;
        if let (Some(_), Some(bias)) = (&base, &bias) {
            y = y.broadcast_add(bias)?;
        }
        drop(terms);
        let low = adapter.map(|(xa, ..)| Low { mask, xa });
        Ok((y, LinearSaved { low }))
    }
}

/// One backward pass.
struct Backward<'a> {
    linear: &'a Linear,
    context: Context<'a>,
    dy: &'a Tensor,
    x: Option<&'a Tensor>,
    saved: &'a LinearSaved,
    base: Option<&'a Tensor>,
    input_gradient: bool,
}

impl Backward<'_> {
    fn reference(&self, gradients: &mut Gradients) -> Result<Option<Tensor>> {
        let (context, dy, weight) = (self.context, self.dy, &self.linear.weight);
        let mut dx = self.input_gradient.then(|| matmul(context, dy, &weight.tensor)).transpose()?;
        if let (true, Some(x)) = (weight.is_trained(), self.x) {
            gradients.add(weight, matmul(context, &dy.t()?, x)?)?;
        }
        self.bias(gradients)?;
        if let (Some(lora), Some(low), Some(x)) = (&self.linear.lora, &self.saved.low, self.x) {
            let d_low = (matmul(context, dy, &lora.b.tensor)? * lora.scaling)?; // (N, r)
            gradients.add(&lora.b, (matmul(context, &dy.t()?, &low.xa)? * lora.scaling)?)?;
            gradients.add(&lora.a, matmul(context, &d_low.t()?, &masked(x, low.mask.as_ref())?)?)?;
            if let Some(sum) = dx {
                let through = masked(&matmul(context, &d_low, &lora.a.tensor)?, low.mask.as_ref())?;
                dx = Some((sum + through)?);
            }
        }
        match (dx, self.base) {
            (Some(dx), Some(base)) => Ok(Some((dx + base)?)),
            (dx, _) => Ok(dx),
        }
    }

    fn cpu(&self, gradients: &mut Gradients) -> Result<Option<Tensor>> {
        let ((n, o), (_, i)) = (self.dy.dims2()?, self.linear.weight.tensor.dims2()?);
        let dy = self.dy.contiguous()?;
        let (dy, w) = (Host::open_any(&dy)?, Host::open_any(&self.linear.weight.tensor)?);
        let (precision, left) = (self.context.precision, Left::new(self.context.precision, dy.matrix(n, o)));
        let x = self.x.map(Tensor::contiguous).transpose()?;
        if let (true, Some(x)) = (self.linear.weight.is_trained(), &x) {
            let x = Host::open_any(x)?;
            let dw = product(precision, dy.matrix(n, o).t(), x.matrix(n, i));
            gradients.add(&self.linear.weight, tensor(dw, (o, i))?)?;
        }
        self.bias(gradients)?;
        let (mut d_low, mut mask) = (None, None);
        if let (Some(lora), Some(low), Some(x)) = (&self.linear.lora, &self.saved.low, &x) {
            let (r, scaling) = (low.xa.dims2()?.1, lora.scaling as f32);
            let (b, xa) = (Host::open_any(&lora.b.tensor)?, Host::open(&low.xa)?);
            let mut d = products(&[Term { a: &left, b: b.matrix(o, r) }], Start::Zero);
            d.iter_mut().for_each(|d| *d *= scaling);
            // dB by its transpose: rows of r, so that B's long side lies along the vectors.
            let db = product_of_few(precision, xa.matrix(n, r).t(), dy.matrix(n, o));
            gradients.add(&lora.b, tensor(transposed(&db, (r, o), scaling), (o, r))?)?;
            let x = masked(x, low.mask.as_ref())?;
            let x = Host::open_any(&x)?;
            let da = product_of_few(precision, Matrix::of(&d, n, r).t(), x.matrix(n, i));
            gradients.add(&lora.a, tensor(da, (r, i))?)?;
            (d_low, mask) = (Some((d, r, Host::open_any(&lora.a.tensor)?)), low.mask.as_ref());
        }
        if !self.input_gradient {
            return Ok(None);
        }
        let low = d_low.as_ref().map(|(d, r, a)| (Left::new(precision, Matrix::of(d, n, *r)), a.matrix(*r, i)));
        let through = low.as_ref().map(|(a, b)| Term { a, b: *b });
        let mut terms = vec![Term { a: &left, b: w.matrix(o, i) }];
        terms.extend(through.filter(|_| mask.is_none()));
        let base = self.base.map(Tensor::contiguous).transpose()?;
        let base = base.as_ref().map(Host::open).transpose()?;
        let dx = products(&terms, base.as_ref().map_or(Start::Zero, |base| Start::Matrix(base.slice())));
        let dx = tensor(dx, (n, i))?;
        match (through, mask) {
            (Some(through), Some(mask)) => {
                let through = tensor(products(&[through], Start::Zero), (n, i))?;
                Ok(Some((dx + (through * mask)?)?))
            }
            _ => Ok(Some(dx)),
        }
    }

    fn bias(&self, gradients: &mut Gradients) -> Result<()> {
        match self.linear.bias.as_ref().filter(|bias| bias.is_trained()) {
            Some(bias) => gradients.add(bias, self.dy.to_dtype(DType::F32)?.sum(0)?),
            None => Ok(()),
        }
    }
}

/// Counts the addition of a `base` and refuses one of another shape.
fn count_base(context: Context<'_>, base: Option<&Tensor>, shape: &[usize; 2]) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    expect("base", base, shape)?;
    context.tally.add(residual_cost(shape[0], shape[1]));
    Ok(())
}

/// x (rows, columns) -> `scale` x^T (columns, rows).
fn transposed(x: &[f32], (rows, columns): (usize, usize), scale: f32) -> Vec<f32> {
    // SAFETY: the loop writes every number.
    let mut out: Vec<f32> = unsafe { uninitialized(x.len()) };
    each(out.chunks_mut((rows * 4 * ROWS_PER_TASK).max(1)).enumerate(), |(index, out)| {
        for (column, out) in out.chunks_exact_mut(rows).enumerate() {
            let column = index * 4 * ROWS_PER_TASK + column;
            out.iter_mut().enumerate().for_each(|(row, out)| *out = scale * x[row * columns + column]);
        }
    });
    out
}

fn masked(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => (x.to_dtype(DType::F32)? * mask)?,
        None => x.clone(),
    })
}

/// A dropout mask of x's shape from uniform numbers `u` in [0, 1): zero where u < p, else `1 / (1 - p)`.
pub fn dropout_mask(mut u: Vec<f32>, p: f64, like: &Tensor) -> Result<Tensor> {
    let keep = (1.0 / (1.0 - p)) as f32;
    u.iter_mut().for_each(|u| *u = if f64::from(*u) < p { 0.0 } else { keep });
    debug_assert_eq!(u.len() % like.dim(D::Minus1)?, 0);
    Ok(Tensor::from_vec(u, like.shape(), like.device())?)
}
