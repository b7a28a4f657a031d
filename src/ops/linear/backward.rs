//! The backward pass of linear layers that read one input: their dx is one sum of products.

use candle_core::{DType, Tensor};

use super::dora::DoraSaved;
use super::{Linear, LinearInput, LinearSaved, Magnitude, count_base, masked};
use crate::error::{Error, Kind, Result};
use crate::ops::gemm::{GemmTerm, Init, Lhs, MatRef, gemm, gemm_sum, skinny_gemm};
use crate::ops::parallel::par_for_each;
use crate::ops::storage::{CpuTensor, ROWS_PER_TASK, check_dims, f32_tensor, uninit_vec};
use crate::ops::{Context, Gradients, Path, matmul, residual_cost};

/// Whether a backward pass computes dx, and what it is added to.
#[derive(Debug, Clone, Copy)]
pub enum InputGradient<'a> {
    /// No dx.
    Skip,
    /// dx.
    Compute,
    /// dx plus this tensor of its shape.
    AddTo(&'a Tensor),
}

impl<'a> InputGradient<'a> {
    /// `Compute` or `Skip`.
    pub fn when(wanted: bool) -> Self {
        if wanted { Self::Compute } else { Self::Skip }
    }

    fn is_wanted(self) -> bool {
        !matches!(self, Self::Skip)
    }

    fn base(self) -> Option<&'a Tensor> {
        match self {
            Self::AddTo(base) => Some(base),
            Self::Skip | Self::Compute => None,
        }
    }
}

impl Linear {
    /// dy (N, out) and the forward pass's x (where it is trained) -> dx (N, in) where wanted; adds
    /// the gradients of trained weights.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        x: Option<&Tensor>,
        saved: &LinearSaved,
        dx: InputGradient<'_>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dy = LinearInput::new(context, dy.clone())?;
        let x = x
            .filter(|_| self.is_trained())
            .map(|x| LinearInput::new(context, x.clone()))
            .transpose()?;
        let branch = Branch {
            linear: self,
            dy: &dy,
            saved,
        };
        backward_shared_input(context, &[branch], x.as_ref(), dx, gradients)
    }
}

/// One of the layers that read the same input, in the backward pass.
#[derive(Clone, Copy)]
pub struct Branch<'a> {
    /// The layer.
    pub linear: &'a Linear,
    /// (N, out).
    pub dy: &'a LinearInput,
    /// From its forward pass.
    pub saved: &'a LinearSaved,
}

/// The backward passes of layers that read one input: x (N, in), where a layer is trained ->
/// the sum of their dx (N, in) where wanted; adds the gradients of trained weights.
pub fn backward_shared_input(
    context: Context<'_>,
    branches: &[Branch<'_>],
    x: Option<&LinearInput>,
    dx: InputGradient<'_>,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let Some(first) = branches.first() else {
        return Ok(None);
    };
    let shape = [first.dy.shape.0, first.linear.weight.dims2()?.1];
    for (index, branch) in branches.iter().enumerate() {
        branch.check_and_count(context, x, shape, dx.is_wanted())?;
        match (dx.is_wanted(), index) {
            (false, _) => {}
            (true, 0) => count_base(context, dx.base(), &shape)?,
            (true, _) => context.counter.add(residual_cost(shape[0], shape[1])),
        }
    }
    let mut sum = dx.base().cloned();
    let mut plain = Vec::with_capacity(branches.len());
    for branch in branches {
        let Some((saved, magnitude)) = branch.dora() else {
            plain.push(*branch);
            continue;
        };
        let wanted = dx.is_wanted();
        let part = branch.backward_dora(context, x, wanted, saved, magnitude, gradients)?;
        sum = match (part, sum) {
            (Some(part), Some(sum)) => Some((part + sum)?),
            (part, sum) => part.or(sum),
        };
    }
    let branches = &plain[..];
    if branches.is_empty() {
        return Ok(sum.filter(|_| dx.is_wanted()));
    }
    let dy = first.dy.x.as_ref();
    if dy.is_none_or(|dy| context.path(dy) == Path::Cpu) {
        let dxa = branches
            .iter()
            .map(|branch| branch.weight_gradients_cpu(context, x, gradients))
            .collect::<Result<Vec<_>>>()?;
        let dx = dx
            .is_wanted()
            .then(|| input_gradient_cpu(context, branches, &dxa, sum.as_ref()));
        return dx.transpose();
    }
    for branch in branches {
        let dx = branch.backward_reference(context, x, dx.is_wanted(), gradients)?;
        sum = match (dx, sum) {
            (Some(dx), Some(sum)) => Some((dx + sum)?),
            (dx, _) => dx,
        };
    }
    Ok(sum)
}

/// The gradient of x A^T, `scaling * dy B`, (N, r); `None` without an adapter.
pub(in crate::ops) type LoraDownGradient = Option<Vec<f32>>;

impl Branch<'_> {
    fn check_and_count(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        [tokens, in_features]: [usize; 2],
        input_gradient: bool,
    ) -> Result<()> {
        let Branch { linear, dy, saved } = self;
        let shape = linear.shape(tokens, saved.has_mask())?;
        let out_features = shape.out_features;
        check_dims("dy", &[dy.shape.0, dy.shape.1], &[tokens, out_features])?;
        let (rows, columns) = linear.weight.dims2()?;
        check_dims("weight", &[rows, columns], &[out_features, in_features])?;
        if let Some(x) = x {
            check_dims("x", &[x.shape.0, x.shape.1], &[tokens, in_features])?;
        }
        context
            .counter
            .add(shape.backward_cost(context.precision, input_gradient));
        if linear.is_trained() && x.is_none() {
            return Err(Error::new(
                Kind::Tensor,
                "a linear layer that is trained needs its input in the backward pass",
            ));
        }
        Ok(())
    }

    fn backward_reference(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dy = self.dy.tensor()?;
        let weight = &self.linear.weight;
        let x = x.map(LinearInput::tensor).transpose()?;
        let dx = input_gradient.then(|| matmul(context, dy, &weight.dequantized()?));
        let mut dx = dx.transpose()?;
        if let (true, Some(x)) = (weight.is_trained(), x) {
            gradients.add(weight, matmul(context, &dy.t()?, x)?)?;
        }
        self.bias_gradient(gradients)?;
        if let (Some(lora), Some(saved), Some(x)) = (&self.linear.lora, &self.saved.lora, x) {
            let mask = saved.mask.as_ref();
            let dxa = (matmul(context, dy, &lora.b.tensor)? * lora.scaling)?; // (N, r)
            let db = (matmul(context, &dy.t()?, &saved.xa)? * lora.scaling)?;
            gradients.add(&lora.b, db)?;
            gradients.add(
                &lora.a,
                matmul(context, &dxa.t()?, &masked(context, x, mask)?)?,
            )?;
            if let Some(sum) = dx {
                dx = Some((sum + masked(context, &matmul(context, &dxa, &lora.a.tensor)?, mask)?)?);
            }
        }
        Ok(dx)
    }

    /// Adds the gradients of trained weights.
    fn weight_gradients_cpu(
        &self,
        context: Context<'_>,
        x: Option<&LinearInput>,
        gradients: &mut Gradients,
    ) -> Result<LoraDownGradient> {
        if let (true, Some(x)) = (self.linear.weight.is_trained(), x) {
            let (n, o) = self.dy.shape;
            let i = x.shape.1;
            let dy = CpuTensor::borrow(self.dy.tensor()?)?;
            let x = CpuTensor::borrow(x.tensor()?)?;
            let dw = gemm(context.precision, dy.matrix(n, o).t(), x.matrix(n, i));
            gradients.add(&self.linear.weight, f32_tensor(dw, (o, i))?)?;
        }
        self.bias_gradient(gradients)?;
        let (Some(x), Some(dxa)) = (x, self.lora_b_gradient(context, gradients)?) else {
            return Ok(None);
        };
        self.lora_a_gradient(context, x, &dxa, gradients)?;
        Ok(Some(dxa))
    }

    /// Adds dB of an adapter; returns the gradient of x A^T.
    pub(in crate::ops) fn lora_b_gradient(
        &self,
        context: Context<'_>,
        gradients: &mut Gradients,
    ) -> Result<LoraDownGradient> {
        let (Some(lora), Some(saved)) = (&self.linear.lora, &self.saved.lora) else {
            return Ok(None);
        };
        let (n, o) = self.dy.shape;
        let r = saved.xa.dims2()?.1;
        let scaling = lora.scaling as f32;
        let dy = self.dy.borrow()?;
        let b = CpuTensor::borrow(&lora.b.tensor)?;
        let xa = CpuTensor::borrow_f32(&saved.xa)?;
        let term = GemmTerm {
            lhs: &self.dy.lhs(&dy)?,
            rhs: b.matrix(o, r),
        };
        let mut dxa = gemm_sum(&[term], Init::Zero);
        dxa.iter_mut().for_each(|d| *d *= scaling);
        // dB^T has rows as long as B has: they lie along the vectors.
        let db_t = self
            .dy
            .skinny_gemm(context.precision, xa.matrix(n, r).t())?;
        let db = scaled_transpose(&db_t, r, o, scaling);
        gradients.add(&lora.b, f32_tensor(db, (o, r))?)?;
        Ok(Some(dxa))
    }

    /// Adds dA of an adapter, from the layer's input and the gradient of x A^T.
    pub(in crate::ops) fn lora_a_gradient(
        &self,
        context: Context<'_>,
        x: &LinearInput,
        dxa: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (Some(lora), Some(saved)) = (&self.linear.lora, &self.saved.lora) else {
            return Ok(());
        };
        let (n, i) = x.shape;
        let r = saved.xa.dims2()?.1;
        let dxa_t = MatRef::from_f32(dxa, n, r).t();
        let da = match &saved.mask {
            None => x.skinny_gemm(context.precision, dxa_t)?,
            Some(mask) => {
                let x = mask.apply(x.tensor()?)?;
                skinny_gemm(context.precision, dxa_t, MatRef::from_f32(&x, n, i))
            }
        };
        gradients.add(&lora.a, f32_tensor(da, (r, i))?)
    }

    /// The forward pass's tensors of DoRA, and the magnitude.
    fn dora(&self) -> Option<(&DoraSaved, &Magnitude)> {
        let magnitude = self.linear.lora.as_ref()?.magnitude.as_ref()?;
        Some((self.saved.dora.as_ref()?, magnitude))
    }

    /// Adds the gradients of the biases of the layer and of its adapter.
    pub(super) fn bias_gradient(&self, gradients: &mut Gradients) -> Result<()> {
        let bias = self.linear.bias.as_ref().filter(|bias| bias.is_trained());
        let lora = self.linear.lora.as_ref();
        let of_lora = lora.and_then(|lora| Some((lora.bias.as_ref()?, lora.scaling)));
        for (bias, factor) in bias.map(|bias| (bias, 1.0)).into_iter().chain(of_lora) {
            let sum = self.dy.tensor()?.to_dtype(DType::F32)?.sum(0)?;
            gradients.add(bias, (sum * factor)?)?;
        }
        Ok(())
    }
}

/// The borrowed tensors of a branch that the GEMM of dx reads.
struct BranchStorage<'a> {
    dy: Option<CpuTensor<'a>>,
    w: CpuTensor<'a>,
    a: Option<CpuTensor<'a>>,
}

impl<'a> BranchStorage<'a> {
    fn borrow(branch: &Branch<'a>) -> Result<Self> {
        let lora = branch.linear.lora.as_ref();
        Ok(Self {
            dy: branch.dy.borrow()?,
            w: branch.linear.weight.storage()?,
            a: lora
                .map(|lora| CpuTensor::borrow(&lora.a.tensor))
                .transpose()?,
        })
    }
}

/// base + the sum of dy W and dxa A over all branches, in one GEMM; terms with a dropout mask are
/// added afterwards.
fn input_gradient_cpu(
    context: Context<'_>,
    branches: &[Branch<'_>],
    dxa: &[LoraDownGradient],
    base: Option<&Tensor>,
) -> Result<Tensor> {
    let n = branches[0].dy.shape.0;
    let i = branches[0].linear.weight.dims2()?.1;
    let storage = branches.iter().map(BranchStorage::borrow);
    let storage = storage.collect::<Result<Vec<_>>>()?;
    let mut lhs = Vec::new();
    for ((branch, storage), dxa) in branches.iter().zip(&storage).zip(dxa) {
        let r = branch.linear.rank()?;
        let dxa = dxa.as_ref().map(|dxa| MatRef::from_f32(dxa, n, r));
        let dxa = dxa.map(|dxa| Lhs::new(context.precision, dxa));
        lhs.push((branch.dy.lhs(&storage.dy)?, dxa));
    }
    let mut terms = Vec::new();
    let mut masked = Vec::new();
    for ((branch, storage), (dy, dxa)) in branches.iter().zip(&storage).zip(&lhs) {
        let rhs = branch.linear.weight.matrix(&storage.w)?;
        terms.push(GemmTerm { lhs: dy, rhs });
        let (Some(lhs), Some(a)) = (dxa, &storage.a) else {
            continue;
        };
        let rhs = a.matrix(branch.linear.rank()?, i);
        let term = GemmTerm { lhs, rhs };
        match branch.saved.mask() {
            None => terms.push(term),
            Some(mask) => masked.push((term, mask)),
        }
    }
    let base = base.map(Tensor::contiguous).transpose()?;
    let base = base.as_ref().map(CpuTensor::borrow_f32).transpose()?;
    let init = base
        .as_ref()
        .map_or(Init::Zero, |base| Init::Matrix(base.f32_slice()));
    let mut dx = gemm_sum(&terms, init);
    for (term, mask) in masked {
        mask.add_masked(&gemm_sum(&[term], Init::Zero), &mut dx);
    }
    f32_tensor(dx, (n, i))
}

/// x (rows, columns) -> `scale` x^T (columns, rows).
fn scaled_transpose(x: &[f32], rows: usize, columns: usize, scale: f32) -> Vec<f32> {
    const COLUMNS_PER_TASK: usize = 4 * ROWS_PER_TASK;
    // SAFETY: the loop writes every element.
    let mut out: Vec<f32> = unsafe { uninit_vec(x.len()) };
    let tasks = out.chunks_mut((rows * COLUMNS_PER_TASK).max(1)).enumerate();
    par_for_each(tasks, |(index, out)| {
        for (column, out) in out.chunks_exact_mut(rows).enumerate() {
            let column = index * COLUMNS_PER_TASK + column;
            for (row, out) in out.iter_mut().enumerate() {
                *out = scale * x[row * columns + column];
            }
        }
    });
    out
}
