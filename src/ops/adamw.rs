//! AdamW over the flat parameter buffer in one pass (Loshchilov and Hutter 2019, algorithm 2; in
//! torch.optim.AdamW's order of operations, with the parameter groups of transformers' Trainer).

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Tensor};

use super::parallel::par_for_each;
use super::simd::simd;
use super::storage::{CpuTensor, check_shape};
use super::{Context, Parameters, Path, Slot, cuda};
use crate::error::Result;
use crate::work::Work;

/// Elements per task, and per partial sum of the gradient norm: the size is fixed, so the norm is
/// the same to the bit for any number of threads.
const ELEMENTS_PER_TASK: usize = 64 * 1024;

/// Hyperparameters of AdamW.
///
/// The first step moves a parameter by the learning rate against the sign of its gradient:
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{AdamW, Context, Parameters};
/// # use wattune::work::{Precision, WorkCounter};
/// let (beta1, beta2, epsilon) = (0.9, 0.999, 1e-8);
/// let (weight_decay, lr_ratio, max_grad_norm) = (0., 1., 1.);
/// let adamw = AdamW { beta1, beta2, epsilon, weight_decay, lr_ratio, max_grad_norm };
/// let tensors = vec![("w".to_string(), vec![2], vec![1f32, 1.])];
/// let parameters = Parameters::new(tensors, &Device::Cpu)?;
/// let gradient = Tensor::new(&[3f32, -4.], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let norm = adamw.step(context, &parameters, &gradient, 0.1, 1)?;
/// let values = parameters.values(0)?;
/// assert!(norm == 5. && (values[0] - 0.9).abs() < 1e-6 && (values[1] - 1.1).abs() < 1e-6);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay of the values of [`decayed`] slots.
    pub weight_decay: f64,
    /// Factor on the rate of an adapter's B and vectors (LoRA+, Hayou et al. 2024); 1 for one rate.
    pub lr_ratio: f64,
    /// Limit of the global gradient norm; 0 disables clipping.
    pub max_grad_norm: f64,
}

/// Work of one step over n parameters: reads value, gradient and moments, writes value and moments.
pub fn adamw_cost(n: usize) -> Work {
    Work::sweep(32 * n, 16 * n)
}

/// Whether weight decay applies to `slot`: to all but norm weights and biases, as in transformers'
/// `Trainer.get_decay_parameter_names`. A vector called `weight` is a norm's.
pub fn decayed(slot: &Slot) -> bool {
    let is_norm = slot.shape.len() == 1 && slot.name.ends_with(".weight");
    !is_norm && !slot.name.contains("bias")
}

/// Whether `lr_ratio` applies to `slot`: to B and vectors, as in PEFT's `create_loraplus_optimizer`.
fn has_raised_rate(slot: &Slot) -> bool {
    slot.name.contains("lora_B") || slot.shape.len() == 1
}

/// Scalars of neighbouring elements: the factor on the value, and lr / (1 - beta1^step) at the
/// group's lr.
#[derive(Debug, Clone, Copy, PartialEq)]
struct GroupRun {
    len: usize,
    decay: f32,
    step_size: f32,
}

/// The scalars of one step, equal for all elements: `rate1` = 1 - beta1, `rate2` = 1 - beta2,
/// `root_correction` = sqrt(1 - beta2^step).
struct FusedStep {
    clip: f32,
    runs: Vec<GroupRun>,
    rate1: f32,
    beta2: f32,
    rate2: f32,
    root_correction: f32,
    epsilon: f32,
}

impl AdamW {
    /// Updates `parameters` by the flat `gradient` (n) at rate `lr`; `step` counts from 1. Returns
    /// the gradient's norm before clipping; a norm that is not finite updates nothing.
    pub fn step(
        &self,
        context: Context<'_>,
        parameters: &Parameters,
        gradient: &Tensor,
        lr: f64,
        step: u64,
    ) -> Result<f64> {
        check_shape("gradient", gradient, &[parameters.len()])?;
        context.counter.add(adamw_cost(parameters.len()));
        let norm = if context.path(gradient) == Path::Cuda {
            cuda::square_sum(gradient)?.sqrt()
        } else {
            norm(gradient)?
        };
        if !norm.is_finite() {
            return Ok(norm);
        }
        let clip = if self.max_grad_norm > 0.0 {
            (self.max_grad_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        let fused = FusedStep {
            clip: clip as f32,
            runs: self.runs(parameters.slots(), lr, step),
            // Subtracted in f64: 1 - 0.999 in f32 is off by 5e-5 of itself.
            rate1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rate2: (1.0 - self.beta2) as f32,
            root_correction: (1.0 - self.beta2.powf(step as f64)).sqrt() as f32,
            epsilon: self.epsilon as f32,
        };
        match context.path(gradient) {
            Path::Cpu => parameters.state().inplace_op2(gradient, &fused)?,
            Path::Cuda => fused.by_kernel(parameters.state(), gradient)?,
            Path::Device | Path::Reference => fused.reference(parameters.state(), gradient)?,
        }
        Ok(norm)
    }

    /// The buffer's runs of equal scalars.
    fn runs(&self, slots: &[Slot], lr: f64, step: u64) -> Vec<GroupRun> {
        let correction = 1.0 - self.beta1.powf(step as f64);
        let mut runs: Vec<GroupRun> = Vec::new();
        for slot in slots {
            let ratio = if has_raised_rate(slot) {
                self.lr_ratio
            } else {
                1.0
            };
            let decay = if decayed(slot) {
                self.weight_decay
            } else {
                0.0
            };
            let run = GroupRun {
                len: slot.len(),
                decay: (1.0 - lr * ratio * decay) as f32,
                step_size: (lr * ratio / correction) as f32,
            };
            match runs.last_mut() {
                Some(last)
                    if GroupRun {
                        len: last.len,
                        ..run
                    } == *last =>
                {
                    last.len += run.len
                }
                _ => runs.push(run),
            }
        }
        runs
    }
}

/// The Euclidean norm, summed in f64 over chunks of `ELEMENTS_PER_TASK`.
fn norm(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.to_device(&Device::Cpu)?;
    let gradient = CpuTensor::borrow_f32(&gradient)?;
    let chunks = gradient.f32_slice().chunks(ELEMENTS_PER_TASK);
    let sum_of_squares = |chunk: &[f32]| {
        simd!(|_| {
            let (chunks, rest) = chunk.as_chunks::<8>();
            let square = |g: &f32| f64::from(*g) * f64::from(*g);
            let mut lanes = [0.0f64; 8];
            for chunk in chunks {
                let pairs = lanes.iter_mut().zip(chunk);
                pairs.for_each(|(lane, g)| *lane += square(g));
            }
            lanes.iter().sum::<f64>() + rest.iter().map(square).sum::<f64>()
        })
    };
    let mut partial = vec![0.0; chunks.len()];
    par_for_each(partial.iter_mut().zip(chunks), |(partial, chunk)| {
        *partial = sum_of_squares(chunk);
    });
    Ok(partial.iter().sum::<f64>().sqrt())
}

impl FusedStep {
    /// Updates one parameter and its moments in place.
    #[inline(always)]
    fn update(
        &self,
        group: &GroupRun,
        value: &mut f32,
        first: &mut f32,
        second: &mut f32,
        gradient: f32,
    ) {
        let gradient = gradient * self.clip;
        *first += (gradient - *first) * self.rate1;
        *second = *second * self.beta2 + gradient * gradient * self.rate2;
        let denominator = second.sqrt() / self.root_correction + self.epsilon;
        *value = *value * group.decay - group.step_size * (*first / denominator);
    }

    /// `elements` (n) times the `scalar` of each run.
    fn scaled(&self, elements: &Tensor, scalar: impl Fn(&GroupRun) -> f32) -> Result<Tensor> {
        if let [run] = &self.runs[..] {
            return Ok((elements * f64::from(scalar(run)))?);
        }
        let runs = self.runs.iter();
        let scalars = runs.flat_map(|run| std::iter::repeat_n(scalar(run), run.len));
        Ok((elements * Tensor::from_iter(scalars, elements.device())?)?)
    }

    /// The step by the CUDA kernel, in place.
    fn by_kernel(&self, state: &Tensor, gradient: &Tensor) -> Result<()> {
        let run = |run: &GroupRun| cuda::RunScalars {
            len: run.len,
            decay: run.decay,
            step_size: run.step_size,
        };
        let runs: Vec<_> = self.runs.iter().map(run).collect();
        let scalars = cuda::StepScalars {
            clip: self.clip,
            rate1: self.rate1,
            beta2: self.beta2,
            rate2: self.rate2,
            root_correction: self.root_correction,
            epsilon: self.epsilon,
        };
        cuda::adamw(state, gradient, &runs, &scalars)
    }

    /// The step in candle primitives on any device; `state` is (3, n), `gradient` (n).
    fn reference(&self, state: &Tensor, gradient: &Tensor) -> Result<()> {
        let row = |i: usize| state.narrow(0, i, 1)?.flatten_all()?.copy();
        let (value, first, second) = (row(0)?, row(1)?, row(2)?);
        let gradient = (gradient * f64::from(self.clip))?;
        let first = (&first + ((&gradient - &first)? * f64::from(self.rate1))?)?;
        let second =
            ((second * f64::from(self.beta2))? + (gradient.sqr()? * f64::from(self.rate2))?)?;
        let denominator =
            ((second.sqrt()? / f64::from(self.root_correction))? + f64::from(self.epsilon))?;
        let update = self.scaled(&(&first / denominator)?, |run| run.step_size)?;
        let value = (self.scaled(&value, |run| run.decay)? - update)?;
        for (i, row) in [value, first, second].iter().enumerate() {
            state.slice_set(&row.unsqueeze(0)?, 0, i)?;
        }
        Ok(())
    }
}

impl InplaceOp2 for FusedStep {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        state: &mut CpuStorage,
        _: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::F32(state), CpuStorage::F32(gradient)) = (state, gradient) else {
            candle_core::bail!("adamw needs state and gradient in f32");
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("adamw needs a contiguous gradient");
        };
        let mut gradient = &gradient[start..end];
        let (mut value, moments) = state.split_at_mut(gradient.len());
        let (mut first, mut second) = moments.split_at_mut(gradient.len());
        let mut tasks = Vec::new();
        for run in &self.runs {
            let values = value.split_off_mut(..run.len).unwrap_or_default();
            let firsts = first.split_off_mut(..run.len).unwrap_or_default();
            let seconds = second.split_off_mut(..run.len).unwrap_or_default();
            let gradients = gradient.split_off(..run.len).unwrap_or_default();
            let chunks = values
                .chunks_mut(ELEMENTS_PER_TASK)
                .zip(firsts.chunks_mut(ELEMENTS_PER_TASK))
                .zip(seconds.chunks_mut(ELEMENTS_PER_TASK))
                .zip(gradients.chunks(ELEMENTS_PER_TASK));
            tasks.extend(chunks.map(|chunk| (run, chunk)));
        }
        par_for_each(
            tasks.into_iter(),
            |(run, (((value, first), second), gradient))| {
                simd!(|_| {
                    let elements = value.iter_mut().zip(first).zip(second).zip(gradient);
                    elements.for_each(|(((value, first), second), gradient)| {
                        self.update(run, value, first, second, *gradient)
                    });
                });
            },
        );
        Ok(())
    }
}
