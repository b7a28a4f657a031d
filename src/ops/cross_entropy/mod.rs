//! Output embedding and negative log-likelihood together: a (tokens, vocabulary) matrix never exists. Where W is frozen, the fused pass keeps
//! no logits (`words`); elsewhere they come in chunks of rows.
//!
//! For row i with logits z = h W^T (+ adapter-free): loss = log sum exp z - z[target]; dz = (softmax z - onehot target) * scale. Only rows at
//! loss positions are given in, so a prompt costs nothing here.

mod chunked;

use candle_core::{D, DType, Tensor};

use super::gemm::{MatRef, gemm};
use super::parallel::par_for_each;
use super::simd::{self, dispatch};
use super::storage::{CpuTensor, check_shape, f32_tensor};
use super::{Context, Gradients, Weight, matmul};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Numbers one chunk of logits holds, about (24 MiB of f32: W is packed once for each chunk, so that few rows cost time), in whole
/// tiles of rows.
const CHUNK_LOGITS: usize = 6 << 20;
const CHUNK_ROWS: usize = 32;

/// The output embedding: W (V, C).
#[derive(Debug, Clone)]
pub struct LmHead {
    /// (V, C); the input embedding itself where they are tied.
    pub weight: Weight,
}

/// All that the head's cost depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LmHeadShape {
    /// Rows with a loss.
    pub loss_tokens: usize,
    /// C.
    pub hidden: usize,
    /// V.
    pub vocab: usize,
    /// Whether W is trained.
    pub trained: bool,
}

impl LmHeadShape {
    /// Rows of each chunk, in order.
    fn chunks(&self) -> impl Iterator<Item = usize> + use<> {
        // Where W is trained each chunk makes a gradient of W's size, and adds it to the last: few chunks, each of that size too.
        let numbers = if self.trained {
            CHUNK_LOGITS.max(self.vocab * self.hidden)
        } else {
            CHUNK_LOGITS
        };
        let rows = (numbers / self.vocab.max(1))
            .max(1)
            .next_multiple_of(CHUNK_ROWS);
        let total = self.loss_tokens;
        (0..total)
            .step_by(rows)
            .map(move |start| rows.min(total - start))
    }

    /// Work of losses alone.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let sweep = |rows: usize| Work::sweep(4 * rows * self.vocab, 3 * rows * self.vocab);
        self.chunks()
            .map(|rows| Work::product(rows, self.vocab, self.hidden, precision) + sweep(rows))
            .sum()
    }

    /// Work of losses and gradients; `input_gradient`: whether dh is wanted.
    pub fn backward_cost(&self, precision: Precision, input_gradient: bool) -> Work {
        let mut work = self.forward_cost(precision);
        for rows in self.chunks() {
            work += &Work::sweep(8 * rows * self.vocab, 2 * rows * self.vocab);
            if input_gradient {
                work += &Work::product(rows, self.hidden, self.vocab, precision);
            }
            if self.trained {
                work += &Work::product(self.vocab, self.hidden, rows, precision);
            }
        }
        work
    }
}

/// Each row's loss, and dh (L, C) where it is wanted.
type Losses = (Vec<f32>, Option<Tensor>);

impl LmHead {
    fn shape(&self, loss_tokens: usize) -> Result<LmHeadShape> {
        let (vocab, hidden) = self.weight.tensor.dims2()?;
        Ok(LmHeadShape {
            loss_tokens,
            hidden,
            vocab,
            trained: self.weight.is_trained(),
        })
    }

    /// The shape for these rows; refuses rows without a target and targets beyond the vocabulary.
    fn checked(&self, h: &Tensor, targets: &[u32]) -> Result<LmHeadShape> {
        let shape = self.shape(targets.len())?;
        check_shape("h", h, &[shape.loss_tokens, shape.hidden])?;
        if let Some(beyond) = targets
            .iter()
            .find(|target| **target as usize >= shape.vocab)
        {
            return Err(
                Error::new(Kind::Tensor, "a target lies beyond the vocabulary")
                    .value(beyond.to_string())
                    .rule(format!("below {}", shape.vocab)),
            );
        }
        Ok(shape)
    }

    /// h (N, C) -> logits (N, V), for generation and tests.
    pub fn logits(&self, context: Context<'_>, h: &Tensor) -> Result<Tensor> {
        let shape = self.shape(h.dims2()?.0)?;
        context.counter.add(Work::product(
            shape.loss_tokens,
            shape.vocab,
            shape.hidden,
            context.precision,
        ));
        match context.fused(h) {
            true => f32_tensor(
                self.logits_cpu(context, h)?,
                (shape.loss_tokens, shape.vocab),
            ),
            false => matmul(context, h, &self.weight.tensor.t()?),
        }
    }

    /// h (L, C), targets (L) -> the loss of each row in nats.
    pub fn forward(&self, context: Context<'_>, h: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        let shape = self.checked(h, targets)?;
        context.counter.add(shape.forward_cost(context.precision));
        if self.uses_vocabulary_chunks(context, h) {
            return Ok(self
                .fused_linear_cross_entropy(context, h, targets, None)?
                .0);
        }
        let mut losses = Vec::with_capacity(targets.len());
        for rows in shape.chunks() {
            let start = losses.len();
            let (h, targets) = (h.narrow(0, start, rows)?, &targets[start..start + rows]);
            if context.fused(&h) {
                let mut logits = self.logits_cpu(context, &h)?;
                losses.extend(self::losses(&mut logits, targets, None));
            } else {
                losses.extend(row_losses(
                    &matmul(context, &h, &self.weight.tensor.t()?)?,
                    targets,
                )?);
            }
        }
        Ok(losses)
    }

    /// h (L, C), targets (L) -> each row's loss, and dh (L, C) of `scale * sum of losses`; W's gradient where it is trained.
    /// Without a row there is nothing to pass on: no dh, and nothing is added to W's gradient.
    pub fn forward_backward(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: f64,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        let shape = self.checked(h, targets)?;
        context
            .counter
            .add(shape.backward_cost(context.precision, input_gradient));
        if self.uses_vocabulary_chunks(context, h) {
            return self.fused_linear_cross_entropy(
                context,
                h,
                targets,
                input_gradient.then_some(scale),
            );
        }
        let mut losses = Vec::with_capacity(targets.len());
        let mut parts = Vec::new();
        for rows in shape.chunks() {
            let start = losses.len();
            let (h, targets) = (h.narrow(0, start, rows)?, &targets[start..start + rows]);
            if context.fused(&h) {
                let mut logits = self.logits_cpu(context, &h)?;
                losses.extend(self::losses(&mut logits, targets, Some(scale as f32)));
                parts.extend(self.backward_cpu(context, &h, &logits, input_gradient, gradients)?);
                continue;
            }
            let logits = matmul(context, &h, &self.weight.tensor.t()?)?;
            losses.extend(row_losses(&logits, targets)?);
            let dz = logit_gradients_reference(&logits, targets, scale)?;
            if shape.trained {
                gradients.add(&self.weight, matmul(context, &dz.t()?, &h)?)?;
            }
            if input_gradient {
                parts.push(matmul(context, &dz, &self.weight.tensor)?);
            }
        }
        let dh = match parts.len() {
            0 | 1 => parts.pop(),
            _ => Some(Tensor::cat(&parts, 0)?),
        };
        Ok((losses, dh))
    }

    /// Whether rows of h accumulate_chunk the words without logits.
    fn uses_vocabulary_chunks(&self, context: Context<'_>, h: &Tensor) -> bool {
        context.fused(h) && !self.weight.is_trained()
    }

    /// h (L, C) -> logits (L, V).
    fn logits_cpu(&self, context: Context<'_>, h: &Tensor) -> Result<Vec<f32>> {
        let (h, l, (v, c)) = (h.contiguous()?, h.dims2()?.0, self.weight.tensor.dims2()?);
        let (h, w) = (
            CpuTensor::borrow(&h)?,
            CpuTensor::borrow(&self.weight.tensor)?,
        );
        Ok(gemm(context.precision, h.matrix(l, c), w.matrix(v, c).t()))
    }

    /// dz (L, V) -> dh (L, C) where wanted; W's gradient where it is trained.
    fn backward_cpu(
        &self,
        context: Context<'_>,
        h: &Tensor,
        dz: &[f32],
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (l, (v, c)) = (h.dims2()?.0, self.weight.tensor.dims2()?);
        let h = h.contiguous()?;
        let (h, w) = (
            CpuTensor::borrow(&h)?,
            CpuTensor::borrow(&self.weight.tensor)?,
        );
        let dz = MatRef::from_f32(dz, l, v);
        if self.weight.is_trained() {
            let dw = gemm(context.precision, dz.t(), h.matrix(l, c));
            gradients.add(&self.weight, f32_tensor(dw, (v, c))?)?;
        }
        let dh = input_gradient.then(|| gemm(context.precision, dz, w.matrix(v, c)));
        dh.map(|dh| f32_tensor(dh, (l, c))).transpose()
    }
}

/// logits (L, V) -> each row's loss.
fn row_losses(logits: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let max = logits.max_keepdim(D::Minus1)?;
    let sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?;
    let lse = (sum.log()? + max)?.squeeze(1)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    Ok((&lse - logits.gather(&index, 1)?.squeeze(1)?)?.to_vec1()?)
}

/// The same in one pass over logits (L, V), which become their gradients where `scale` is given.
fn losses(logits: &mut [f32], targets: &[u32], scale: Option<f32>) -> Vec<f32> {
    let vocab = logits.len() / targets.len().max(1);
    let mut losses = vec![0.0; targets.len()];
    let rows = logits
        .chunks_mut(vocab.max(1))
        .zip(targets)
        .zip(&mut losses);
    par_for_each(rows, |((z, target), loss)| {
        let target = *target as usize;
        let at_target = z[target];
        let (max, sum) = dispatch(
            #[inline(always)]
            |cpu| {
                let max = simd::max(z);
                let sum = match scale {
                    None => simd::sum_map(z, |z| cpu.exp(z - max)),
                    Some(_) => {
                        z.iter_mut().for_each(|z| *z = cpu.exp(*z - max));
                        simd::sum_map(z, |z| z)
                    }
                };
                if let Some(scale) = scale {
                    let share = (f64::from(scale) / sum) as f32;
                    z.iter_mut().for_each(|z| *z *= share);
                }
                (max, sum)
            },
        );
        if let Some(scale) = scale {
            z[target] -= scale;
        }
        *loss = max + sum.ln() as f32 - at_target;
    });
    losses
}

fn logit_gradients_reference(logits: &Tensor, targets: &[u32], scale: f64) -> Result<Tensor> {
    let max = logits.max_keepdim(D::Minus1)?;
    let e = logits.broadcast_sub(&max)?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    let ones = Tensor::ones((targets.len(), 1), DType::F32, logits.device())?;
    let onehot = p.zeros_like()?.scatter_add(&index, &ones, 1)?;
    Ok(((p - onehot)? * scale)?)
}
