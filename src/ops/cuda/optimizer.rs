//! The gradient norm and AdamW by the kernels of adamw.cu.

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, Launch, output};
use crate::error::Result;

/// Elements of a block.
const ELEMENTS: usize = 64 * 1024;
/// Elements of a block of an update.
const UPDATED: usize = 4096;

/// The scalars of one step, as `adamw` of adamw.cu takes them.
pub(in crate::ops) struct StepScalars {
    pub(in crate::ops) clip: f32,
    pub(in crate::ops) rate1: f32,
    pub(in crate::ops) beta2: f32,
    pub(in crate::ops) rate2: f32,
    pub(in crate::ops) root_correction: f32,
    pub(in crate::ops) epsilon: f32,
}

/// Scalars of neighbouring elements.
pub(in crate::ops) struct RunScalars {
    pub(in crate::ops) len: usize,
    pub(in crate::ops) decay: f32,
    pub(in crate::ops) step_size: f32,
}

/// The sum of the squares of x (n) in f32, in f64; 8 bytes come to the host.
pub(in crate::ops) fn square_sum(x: &Tensor) -> Result<f64> {
    let (device, n) = (x.device(), x.elem_count());
    let count = n.div_ceil(ELEMENTS);
    let [parts, total] = [
        output(device, DType::F64, count)?,
        output(device, DType::F64, 1)?,
    ];
    let args = [
        Arg::from(x),
        Arg::from(&parts),
        Arg::Long(n),
        Arg::Int(ELEMENTS),
    ];
    Launch::of_rows("adamw", "square_sum_parts", count).run(device, &args)?;
    let args = [Arg::from(&parts), Arg::from(&total), Arg::Int(count)];
    Launch::of_rows("adamw", "square_sum", 1).run(device, &args)?;
    Ok(total.to_vec1::<f64>()?[0])
}

/// Updates state (3, n) in place by the gradient (n).
pub(in crate::ops) fn adamw(
    state: &Tensor,
    gradient: &Tensor,
    runs: &[RunScalars],
    step: &StepScalars,
) -> Result<()> {
    let n = gradient.elem_count();
    let table = run_table(runs, state.device())?;
    let args = [
        Arg::from(state),
        Arg::from(gradient),
        Arg::from(&table),
        Arg::Int(runs.len()),
        Arg::Long(n),
        Arg::Int(UPDATED),
    ];
    let scalars = [
        step.clip,
        step.rate1,
        step.beta2,
        step.rate2,
        step.root_correction,
        step.epsilon,
    ];
    let scalars = scalars.map(|x| Arg::Float(f64::from(x)));
    let args = [&args[..], &scalars].concat();
    Launch::of_rows("adamw", "adamw", n.div_ceil(UPDATED)).run(state.device(), &args)
}

/// The runs as `GroupRun` of adamw.cu: the end in 64 bits, decay, step size.
fn run_table(runs: &[RunScalars], device: &Device) -> Result<Tensor> {
    let mut end = 0u64;
    let mut words = Vec::with_capacity(4 * runs.len());
    for run in runs {
        end += run.len as u64;
        words.extend([end as u32, (end >> 32) as u32]);
        words.extend([run.decay.to_bits(), run.step_size.to_bits()]);
    }
    let count = words.len();
    Ok(Tensor::from_vec(words, count, device)?)
}
