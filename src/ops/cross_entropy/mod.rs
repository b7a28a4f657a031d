//! LM head and cross-entropy in one op: a (tokens, vocabulary) matrix of logits never exists.
//!
//! For a row h with logits z = W h: loss = log sum exp z - z[target] and dz = scale (softmax z -
//! onehot target). Only rows at loss positions come in, so prompt tokens cost nothing here. A
//! frozen W on the CPU takes vocabulary chunks (`chunked`); otherwise logits come in chunks of
//! rows.

mod chunked;

use std::ops::Range;
use std::sync::Mutex;

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use super::gemm::gemm;
use super::parallel::par_for_each;
use super::simd::{self, simd};
use super::softcap::{
    CAP_OPERATIONS, SLOPE_OPERATIONS, capped, capped_gradient, capped_tensor, slope,
};
use super::storage::{CpuTensor, ELEMENTS_PER_TASK, check_shape, f32_tensor};
use super::token_rows::{TokenRows, token_logits_backward_cost, token_logits_cost};
use super::{
    Context, DropoutMask, Gradients, InputGradient, Linear, LinearShape, Lora, LoraShape, Path,
    StoredFormat, Weight, cuda, dtype, matmul, softmax,
};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work, WorkCounter};

/// Approximate number of logits in one chunk of rows: 24 MiB of f32. W is packed once per chunk, so
/// short chunks cost time.
const CHUNK_LOGITS: usize = 6 << 20;
/// A chunk has a multiple of this many rows: whole GEMM tiles.
const CHUNK_ROWS: usize = 32;

/// The output embedding.
///
/// With W = 0 every token has probability 1 / V, so the loss of a row is ln V:
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use wattune::ops::{Context, LmHead, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// let zeros = Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?;
/// let weight = Weight::frozen(zeros);
/// let head = LmHead { weight, bias: None, softcap: None, lora: None };
/// let h = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let losses = head.forward(Context::new(&counter, Precision::F32), &h, &[3])?;
/// assert!((losses[0] - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LmHead {
    /// W, (V, C); the input embedding where the two are tied.
    pub weight: Weight,
    /// (V) (Phi-2).
    pub bias: Option<Weight>,
    /// c of c tanh(logit / c) (Gemma 2).
    pub softcap: Option<f64>,
    /// The adapter, where the head is a target.
    pub lora: Option<Lora>,
}

/// Everything that the cost of the LM head depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LmHeadShape {
    /// Rows with a loss.
    pub loss_tokens: usize,
    /// C.
    pub hidden: usize,
    /// V.
    pub vocab: usize,
    /// The format of a quantised W.
    pub stored: Option<StoredFormat>,
    /// Whether W is trained.
    pub trained: bool,
    /// Whether logits have a bias.
    pub bias: bool,
    /// Whether it is trained.
    pub bias_trained: bool,
    /// Rows of W that are trained alone.
    pub token_rows: usize,
    /// Whether logits are capped.
    pub softcap: bool,
    /// The adapter.
    pub lora: Option<LoraShape>,
    /// With LoRA dropout.
    pub dropout: bool,
}

impl LmHeadShape {
    /// Rows of each chunk, in order.
    fn row_chunks(&self) -> impl Iterator<Item = usize> + use<> {
        // A trained W adds a gradient of its size per chunk: few chunks, each of that size too.
        let logits = if self.trained {
            CHUNK_LOGITS.max(self.vocab * self.hidden)
        } else {
            CHUNK_LOGITS
        };
        let rows = (logits / self.vocab.max(1))
            .max(1)
            .next_multiple_of(CHUNK_ROWS);
        let total = self.loss_tokens;
        (0..total)
            .step_by(rows)
            .map(move |start| rows.min(total - start))
    }

    /// The layer of the logits for `rows` rows.
    fn linear(&self, rows: usize) -> LinearShape {
        LinearShape {
            tokens: rows,
            in_features: self.hidden,
            out_features: self.vocab,
            r: self.lora.map(|lora| lora.r),
            lora_bias: self.lora.is_some_and(|lora| lora.bias),
            magnitude: self.lora.is_some_and(|lora| lora.magnitude),
            bias: self.bias,
            stored: self.stored,
            trained: self.trained,
            bias_trained: self.bias_trained,
            dropout: self.dropout,
        }
    }

    /// Work of the logits of all rows.
    pub fn logits_cost(&self, precision: Precision) -> Work {
        let product = self.product_cost(self.loss_tokens, precision);
        if !self.softcap {
            return product;
        }
        let logits = self.loss_tokens * self.vocab;
        product + Work::sweep(8 * logits, CAP_OPERATIONS * logits)
    }

    /// Work of the logits of `rows` rows before the cap.
    fn product_cost(&self, rows: usize, precision: Precision) -> Work {
        let product = self.linear(rows).forward_cost(precision);
        if self.token_rows == 0 {
            return product;
        }
        product + token_logits_cost(rows, self.hidden, self.token_rows, precision)
    }

    /// Work of the losses alone.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let operations = 3 + if self.softcap { CAP_OPERATIONS } else { 0 };
        let sweep =
            |rows: usize| Work::sweep(4 * rows * self.vocab, operations * rows * self.vocab);
        self.row_chunks()
            .map(|rows| self.product_cost(rows, precision) + sweep(rows))
            .sum()
    }

    /// Work of losses and gradients; `input_gradient`: with dh.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let mut work = self.forward_cost(precision);
        let operations = 2 + if self.softcap { SLOPE_OPERATIONS } else { 0 };
        for rows in self.row_chunks() {
            work += &Work::sweep(8 * rows * self.vocab, operations * rows * self.vocab);
            work += &self.linear(rows).backward_cost(precision, input_gradient);
            if self.token_rows > 0 {
                let (c, n) = (self.hidden, self.token_rows);
                work += &token_logits_backward_cost(rows, c, n, precision, input_gradient);
            }
        }
        work
    }
}

/// LoRA dropout masks for ranges of rows of h.
pub type HeadMasks<'a> = &'a dyn Fn(Range<usize>) -> DropoutMask;

/// Each row's loss, and dh (L, C) if it is wanted.
pub(super) type Losses = (Vec<f32>, Option<Tensor>);

/// The gradients to compute with the losses: those of `scale * sum of losses`.
struct Backward<'a> {
    scale: f64,
    input_gradient: bool,
    masks: Option<HeadMasks<'a>>,
    gradients: &'a mut Gradients,
}

impl LmHead {
    fn shape(&self, loss_tokens: usize) -> Result<LmHeadShape> {
        let (vocab, hidden) = self.weight.dims2()?;
        Ok(LmHeadShape {
            loss_tokens,
            hidden,
            vocab,
            stored: self.weight.stored_format(),
            trained: self.weight.is_trained(),
            bias: self.bias.is_some(),
            bias_trained: self.bias.as_ref().is_some_and(Weight::is_trained),
            token_rows: self.weight.token_rows().map_or(0, TokenRows::len),
            softcap: self.softcap.is_some(),
            lora: self.lora.as_ref().map(Lora::shape).transpose()?,
            dropout: false,
        })
    }

    /// The layer of the logits.
    fn linear(&self) -> Linear {
        Linear {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            lora: self.lora.clone(),
        }
    }

    /// The shape for these rows; refuses rows without a target and targets beyond the vocabulary.
    fn checked_shape(&self, h: &Tensor, targets: &[u32]) -> Result<LmHeadShape> {
        let shape = self.shape(targets.len())?;
        check_shape("h", h, &[shape.loss_tokens, shape.hidden])?;
        check_targets(targets, shape.vocab)?;
        Ok(shape)
    }

    /// h (N, C) -> logits (N, V), for generation and tests.
    pub fn logits(&self, context: Context<'_>, h: &Tensor) -> Result<Tensor> {
        let shape = self.shape(h.dims2()?.0)?;
        let (n, hidden, vocab) = (shape.loss_tokens, shape.hidden, shape.vocab);
        context.counter.add(shape.logits_cost(context.precision));
        if self.lora.is_some() || shape.token_rows > 0 || shape.bias {
            let uncounted = WorkCounter::default();
            let context = Context {
                counter: &uncounted,
                ..context
            };
            let (mut logits, _) = self.linear().forward(context, h, None, None)?;
            if let Some(rows) = self.weight.token_rows() {
                logits = rows.replace_logits(context, h, &logits)?;
            }
            return capped_tensor(logits, self.softcap);
        }
        if context.path(h) != Path::Cpu {
            let logits = matmul(context, h, &self.weight.dequantized()?.t()?)?;
            return capped_tensor(logits, self.softcap);
        }
        let h = h.contiguous()?;
        let h = CpuTensor::borrow(&h)?;
        let w = self.weight.storage()?;
        let w_t = self.weight.matrix(&w)?.with_cache(None).t();
        let mut logits = gemm(context.precision, h.matrix(n, hidden), w_t);
        cap(&mut logits, self.softcap);
        f32_tensor(logits, (n, vocab))
    }

    /// h (L, C), targets (L) -> the loss of each row in nats.
    pub fn forward(&self, context: Context<'_>, h: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        let shape = self.checked_shape(h, targets)?;
        context.counter.add(shape.forward_cost(context.precision));
        Ok(self.losses(context, h, targets, shape, None)?.0)
    }

    /// h (L, C), targets (L) -> each row's loss in nats, and dh (L, C) of `scale * sum of losses`;
    /// adds W's gradient where W is trained. With L = 0 there is no dh and no gradient of W.
    pub fn forward_backward(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: f64,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        self.forward_backward_masked(context, h, targets, scale, input_gradient, None, gradients)
    }

    /// `forward_backward` with LoRA dropout.
    #[expect(clippy::too_many_arguments, reason = "the inputs of an op")]
    pub fn forward_backward_masked(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: f64,
        input_gradient: bool,
        masks: Option<HeadMasks<'_>>,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        let shape = LmHeadShape {
            dropout: masks.is_some(),
            ..self.checked_shape(h, targets)?
        };
        let cost = shape.backward_cost(context.precision, input_gradient);
        context.counter.add(cost);
        let backward = Backward {
            scale,
            input_gradient,
            masks,
            gradients,
        };
        self.losses(context, h, targets, shape, Some(backward))
    }

    /// As `forward_backward`; without `backward` the losses alone. Counts no work.
    fn losses(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        shape: LmHeadShape,
        mut backward: Option<Backward<'_>>,
    ) -> Result<Losses> {
        let is_frozen = !shape.trained && shape.lora.is_none() && shape.token_rows == 0;
        if context.path(h) == Path::Cpu && is_frozen && !shape.bias {
            let backward = backward.filter(|backward| backward.input_gradient);
            let scale = backward.map(|backward| backward.scale);
            return self.fused_linear_cross_entropy(context, h, targets, scale);
        }
        let mut losses = Vec::with_capacity(targets.len());
        let mut parts = Vec::new();
        for rows in shape.row_chunks() {
            let start = losses.len();
            let h = h.narrow(0, start, rows)?;
            let rows = start..start + rows;
            let (chunk, dh) = self.chunk(context, &h, rows, targets, backward.as_mut())?;
            losses.extend(chunk);
            parts.extend(dh);
        }
        let dh = match parts.len() {
            0 | 1 => parts.pop(),
            _ => Some(Tensor::cat(&parts, 0)?),
        };
        Ok((losses, dh))
    }

    /// Losses and gradients of the chunk `rows` of rows, with their h. Counts no work.
    fn chunk(
        &self,
        context: Context<'_>,
        h: &Tensor,
        rows: Range<usize>,
        targets: &[u32],
        backward: Option<&mut Backward<'_>>,
    ) -> Result<Losses> {
        let uncounted = WorkCounter::default();
        let context = Context {
            counter: &uncounted,
            ..context
        };
        let targets = &targets[rows.clone()];
        let masks = backward.as_ref().and_then(|backward| backward.masks);
        let mask = masks.map(|masks| masks(rows));
        let linear = self.linear();
        let (mut logits, saved) = linear.forward(context, h, mask, None)?;
        let rows = self.weight.token_rows();
        if let Some(rows) = rows {
            logits = rows.replace_logits(context, h, &logits)?;
        }
        let op = CrossEntropy {
            targets,
            scale: backward.as_ref().map(|backward| backward.scale),
            softcap: self.softcap,
            losses: Mutex::default(),
        };
        let (losses, dz) = match context.path(h) {
            Path::Cpu => op.in_place(logits)?,
            Path::Cuda => op.by_kernel(context, &logits)?,
            path => op.reference(path, logits)?,
        };
        let Some((backward, dz)) = backward.zip(dz) else {
            return Ok((losses, None));
        };
        let wanted = InputGradient::when(backward.input_gradient);
        let gradients = &mut *backward.gradients;
        let mut of_rows = None;
        let mut dz = dz;
        if let Some(rows) = rows {
            let wanted = backward.input_gradient;
            (dz, of_rows) = rows.logits_backward(context, h, &dz, wanted, gradients)?;
        }
        let mut dh = linear.backward(context, &dz, Some(h), &saved, wanted, gradients)?;
        if let (Some(sum), Some(part)) = (&dh, of_rows) {
            dh = Some((sum + part)?);
        }
        Ok((losses, dh))
    }
}

/// The cross-entropy of a chunk's logits (L, V).
struct CrossEntropy<'a> {
    /// (L).
    targets: &'a [u32],
    /// Of the gradients of the logits, if they are wanted.
    scale: Option<f64>,
    softcap: Option<f64>,
    /// Receives the losses of the pass in place.
    losses: Mutex<Vec<f32>>,
}

impl CrossEntropy<'_> {
    /// The losses (L) in nats and the gradients of the logits, in candle primitives.
    fn reference(&self, path: Path, logits: Tensor) -> Result<Losses> {
        let logits = capped_tensor(logits, self.softcap)?;
        let (p, lse) = softmax(path, &logits)?;
        let targets = Tensor::from_slice(self.targets, (self.targets.len(), 1), logits.device())?;
        let losses = (lse - logits.gather(&targets, 1)?)?.squeeze(1)?.to_vec1()?;
        let Some(scale) = self.scale else {
            return Ok((losses, None));
        };
        let minus_one = Tensor::full(-1f32, targets.shape(), logits.device())?;
        let dz = (p.scatter_add(&targets, &minus_one, 1)? * scale)?;
        Ok((losses, Some(capped_gradient(dz, &logits, self.softcap)?)))
    }

    /// The same by the CUDA kernel, with gradients in the compute type.
    fn by_kernel(&self, context: Context<'_>, logits: &Tensor) -> Result<Losses> {
        let targets = Tensor::from_slice(self.targets, self.targets.len(), logits.device())?;
        let dtype = dtype(context.precision);
        let (losses, dz) = cuda::cross_entropy(logits, &targets, self.scale, self.softcap, dtype)?;
        Ok((losses.to_vec1()?, dz))
    }

    /// The same on the CPU: the gradients replace the logits.
    fn in_place(self, logits: Tensor) -> Result<Losses> {
        logits.inplace_op1(&self)?;
        let losses = self.losses.into_inner().unwrap_or_default();
        Ok((losses, self.scale.map(|_| logits)))
    }
}

impl InplaceOp1 for CrossEntropy<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(logits), Some((start, end))) = (logits, layout.contiguous_offsets())
        else {
            candle_core::bail!("cross-entropy needs contiguous logits in f32");
        };
        let logits = &mut logits[start..end];
        cap(logits, self.softcap);
        let scale = self.scale.map(|scale| scale as f32);
        let losses = cross_entropy_cpu(logits, self.targets, scale, self.softcap);
        if let Ok(mut slot) = self.losses.lock() {
            *slot = losses;
        }
        Ok(())
    }
}

/// Caps logits in place, if there is a softcap.
fn cap(logits: &mut [f32], softcap: Option<f64>) {
    let Some(c) = softcap else { return };
    par_for_each(logits.chunks_mut(ELEMENTS_PER_TASK), |logits| {
        simd!(|simd| logits
            .iter_mut()
            .for_each(|z| *z = capped(simd, *z, c as f32)));
    });
}

/// Work of the losses of `rows` logits (K), and with `backward` of their gradients.
pub(super) fn cross_entropy_cost(rows: usize, k: usize, backward: bool) -> Work {
    let forward = Work::sweep(4 * rows * k, 3 * rows * k);
    if backward {
        return forward + Work::sweep(8 * rows * k, 2 * rows * k);
    }
    forward
}

/// logits (L, K) in f32, targets (L) -> each row's loss in nats, and with `scale` the logits'
/// gradient (L, K) of `scale * sum of losses`, which on the CPU replaces the logits.
///
/// # Errors
/// Another number of targets than rows, and a target of K or more.
pub fn cross_entropy(
    context: Context<'_>,
    logits: Tensor,
    targets: &[u32],
    scale: Option<f64>,
) -> Result<Losses> {
    let (rows, k) = logits.dims2()?;
    check_shape("logits", &logits, &[targets.len(), k])?;
    check_targets(targets, k)?;
    context
        .counter
        .add(cross_entropy_cost(rows, k, scale.is_some()));
    let op = CrossEntropy {
        targets,
        scale,
        softcap: None,
        losses: Mutex::default(),
    };
    match context.path(&logits) {
        Path::Cpu => op.in_place(logits),
        Path::Cuda => op.by_kernel(context.in_f32(), &logits),
        path => op.reference(path, logits),
    }
}

/// Refuses targets of `classes` or more.
fn check_targets(targets: &[u32], classes: usize) -> Result<()> {
    let beyond = targets.iter().find(|target| **target as usize >= classes);
    beyond.map_or(Ok(()), |target| {
        Err(
            Error::new(Kind::Tensor, "a target lies beyond the vocabulary")
                .value(target.to_string())
                .rule(format!("below {classes}")),
        )
    })
}

/// Logits (L, V), capped if there is a softcap, and targets (L) -> the losses (L) in nats. With
/// `scale` the logits are replaced by the gradients before the cap, `scale slope (softmax z -
/// onehot target)`.
fn cross_entropy_cpu(
    logits: &mut [f32],
    targets: &[u32],
    scale: Option<f32>,
    softcap: Option<f64>,
) -> Vec<f32> {
    let vocab = logits.len() / targets.len().max(1);
    let mut losses = vec![0.0; targets.len()];
    let rows = logits
        .chunks_mut(vocab.max(1))
        .zip(targets)
        .zip(&mut losses);
    par_for_each(rows, |((z, target), loss)| {
        let target = *target as usize;
        let target_logit = z[target];
        let cap = softcap.filter(|_| scale.is_some()).map(|c| c as f32);
        let slopes: Option<Vec<f32>> = cap.map(|c| z.iter().map(|z| slope(*z, c)).collect());
        let (max, sum) = simd!(|simd| {
            let max = simd::max(z);
            let Some(scale) = scale else {
                return (max, simd::sum_map(z, |z| simd.exp(z - max)));
            };
            z.iter_mut().for_each(|z| *z = simd.exp(*z - max));
            let sum = simd::sum_map(z, |z| z);
            let factor = (f64::from(scale) / sum) as f32;
            z.iter_mut().for_each(|z| *z *= factor);
            (max, sum)
        });
        if let Some(scale) = scale {
            z[target] -= scale;
            let slopes = slopes.iter().flatten();
            z.iter_mut().zip(slopes).for_each(|(z, slope)| *z *= slope);
        }
        *loss = max + sum.ln() as f32 - target_logit;
    });
    losses
}
